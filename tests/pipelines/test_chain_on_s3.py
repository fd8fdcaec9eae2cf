"""The jobs one after another on a store that lets every seventh request fail: at the first try, and with the bytes that
they leave on a disk on a good day."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.data.ingest import IngestOptions, ingest
from pipelines.evaluation.evaluate import EvaluateOptions, evaluate
from pipelines.inference.options import ScoreOptions
from pipelines.inference.score import score
from pipelines.runtime.errors import user_error
from pipelines.runtime.options import RuntimeOptions
from pipelines.training.options import ThresholdOptions, train_options
from pipelines.training.train import train
from tests.faulty_proxy import PASSING, Proxy, drawn
from tests.pipelines.conftest import UNTRACKED
from tests.s3_server import Server
from unianom import files, s3
from unianom.configs.backbone import BackboneConfig
from unianom.configs.bank import BankConfig
from unianom.configs.patchcore import PatchCoreConfig
from unianom.data.drawing import draw_corpus
from unianom.data.image import InputPolicy
from unianom.data.shards import ScoreSet, ShardSet
from unianom.errors import UnianomError

HERE = RuntimeOptions(local=True, workers=1)

METHOD = PatchCoreConfig(
    backbone=BackboneConfig("resnet18.tv_in1k", weights="random"),
    input=InputPolicy(resize="stretch", size=64, crop=None),
    bank=BankConfig(coreset_ratio=0.2),
    dimension=64,
)
HELD_OUT = ThresholdOptions(target_fpr=0.6, source="held_out", validation_fraction=0.5)


def ingest_into(root: str, source: str = "s3://bucket/corpus") -> None:
    ingest(IngestOptions("mvtec", source, f"{root}/shards", min_parts=2, runtime=HERE))


def train_into(root: str) -> None:
    places = {"shards": f"{root}/shards", "output": f"{root}/model"}
    train(train_options()["patchcore"](**places, method=METHOD, threshold=HELD_OUT, tracking=UNTRACKED, runtime=HERE))


def score_into(root: str) -> None:
    score(ScoreOptions(f"{root}/model", f"{root}/shards", output=f"{root}/scores", runtime=HERE))


def evaluate_into(root: str) -> None:
    evaluate(
        EvaluateOptions(
            f"{root}/scores", f"{root}/shards", f"{root}/evaluation", soft_dice=True, tracking=UNTRACKED, runtime=HERE
        )
    )


JOBS = {"ingest": ingest_into, "train": train_into, "score": score_into, "evaluate": evaluate_into}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between two tries."""

    async def sleep(_: float) -> None:
        return

    monkeypatch.setattr(s3, "sleep", sleep)


def below(folder: str) -> dict[str, bytes]:
    return {name: files.read_bytes(files.join(folder, name)) for name in files.list_files(folder)}


def test_a_chain_on_a_bad_day_leaves_what_it_leaves_on_a_good_one(proxy: Proxy, store: Server, tmp_path: Path) -> None:
    draw_corpus(tmp_path / "corpus", ("weave",), train=12, good=2, per_defect=1, size=64)
    for name, content in below(str(tmp_path / "corpus")).items():
        store.client().put_object(Bucket="bucket", Key=f"corpus/{name}", Body=content)
    on_disk = str(tmp_path / "output")
    for job in JOBS.values():
        job(on_disk)  # the images are read where the other run reads them, for shards name that place

    proxy.forgive()
    proxy.plan = drawn(0.15, seed=16)
    for job in JOBS.values():
        job("s3://bucket/output")
    assert set(proxy.faults) == set(PASSING)
    assert 0.1 < proxy.faults.total() / len(proxy.requests) < 0.2

    proxy.forgive()
    expected, found = below(on_disk), below("s3://bucket/output")
    evaluation = "evaluation/evaluation.json"  # the only one that names places of outputs
    expected[evaluation] = expected[evaluation].replace(on_disk.encode(), b"s3://bucket/output")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert store.unfinished_uploads() == []
    ingested = ShardSet.open("s3://bucket/output/shards").table(columns=["sample_id"])["sample_id"].to_pylist()
    scored = ScoreSet.open("s3://bucket/output/scores").table(columns=["sample_id"])["sample_id"].to_pylist()
    assert len(set(ingested)) == len(ingested) == 17
    assert len(set(scored)) == len(scored) == 5


@pytest.mark.parametrize("job", JOBS)
def test_wrong_credentials_end_a_job_at_once(proxy: Proxy, store: Server, job: str) -> None:
    with store.checking_credentials(), pytest.raises((OSError, UnianomError)) as raised:
        JOBS[job]("s3://bucket/output")
    assert f"{proxy.endpoint} refuses the credentials (InvalidAccessKeyId" in str(user_error(raised.value))
    assert len(proxy.requests) < 5


@pytest.mark.parametrize("job", JOBS)
def test_a_missing_bucket_ends_a_job_at_once(proxy: Proxy, store: Server, job: str) -> None:
    store.client().delete_bucket(Bucket="bucket")
    with pytest.raises((OSError, UnianomError)) as raised:
        JOBS[job]("s3://bucket/output")
    sentence = f"s3://bucket: there is no such bucket at {proxy.endpoint}; mend its name, or make it"
    assert str(user_error(raised.value)) == sentence
    assert len(proxy.requests) < 5
