"""Jobs on a Ray of several nodes, one of which is killed in the middle, end with what an undisturbed run writes."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipelines.data.ingest import ingest
from pipelines.data.options import IngestOptions
from pipelines.inference.options import ScoreOptions
from pipelines.inference.score import score
from pipelines.runtime.cli import parse
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.task_worker import set_threads
from pipelines.training.options import ThresholdOptions, train_options
from pipelines.training.train import train
from pipelines.tuning.tune import tune
from tests.cluster.nodes import Cluster, Node, cluster
from tests.methods.conftest import RECONSTRUCTION
from tests.pipelines.conftest import UNTRACKED, tiny_training, without_ray
from tests.pipelines.tuning.test_tune import memory_options, run_trials_here
from unianom.configs.training import TrainingConfig
from unianom.configs.uniad import UniADConfig
from unianom.data.drawing import draw_corpus
from unianom.options import to_plain

pytestmark = pytest.mark.ray

HERE = RuntimeOptions(local=True, workers=1)
ON_RAY = RuntimeOptions(local=False)

NETWORK = UniADConfig(
    **RECONSTRUCTION, neighbours=3, training=TrainingConfig(iterations=300, batch_size=4, learning_rate=1e-3)
)


@dataclass(frozen=True)
class Undisturbed:
    """What the jobs write in this process, each after the other."""

    corpus: Path
    shards: Path
    bank: Path
    network: Path
    scores: Path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root, threads = tmp_path_factory.mktemp("undisturbed"), torch.get_num_threads()
    made = Undisturbed(*(root / name for name in ("corpus", "shards", "bank", "network", "scores")))
    draw_corpus(made.corpus, ("weave", "cog"), train=20, good=8, per_defect=2, size=64)
    set_threads(1)
    ingest(ingesting(made, made.shards, HERE))
    train(banking(made, made.bank, HERE))
    train(parse(train_options(), command("uniad", networking(made, made.network, HERE), root)))
    score(scoring(made, made.scores, HERE))
    set_threads(threads)
    return made


def ingesting(made: Undisturbed, output: Path, runtime: RuntimeOptions) -> IngestOptions:
    return IngestOptions("mvtec", str(made.corpus), str(output), min_parts=64, runtime=runtime)


def banking(made: Undisturbed, output: Path, runtime: RuntimeOptions) -> Any:
    return tiny_training(made.shards, output, runtime=runtime)


def networking(made: Undisturbed, output: Path, runtime: RuntimeOptions) -> Any:
    return train_options()["uniad"](
        shards=str(made.shards),
        output=str(output),
        method=NETWORK,
        checkpoint_every=20,
        threshold=ThresholdOptions(validation_fraction=0.3),
        tracking=UNTRACKED,
        runtime=replace(runtime, workers=1),
    )


def scoring(made: Undisturbed, output: Path, runtime: RuntimeOptions) -> ScoreOptions:
    return ScoreOptions(
        str(made.bank), str(made.shards), output=str(output), splits=("train", "test"), batch_size=3, runtime=runtime
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("nodes")) as made:
        yield made


def command(job: str, options: Any, folder: Path) -> list[str]:
    """Return the command line of a job with these options."""
    path = folder / "options.yaml"
    path.write_text(yaml.safe_dump(to_plain(options), sort_keys=False))
    return [*shlex.split(job), "--config", str(path)]


def kill_a_node_during(running: Cluster, job: str, output: Path, begun: str, done: str) -> Node:
    """Kill a worker node that is at work, once files of this pattern show that the job has begun to write.

    Args:
        running: the cluster.
        job: its name.
        output: what it writes.
        begun: pattern of files below, of which there must be three.
        done: the file there that a job writes last.
    """
    deadline = time.monotonic() + 200
    while len(list(output.glob(begun))) < 3:
        assert running.running(job), running.jobs.get_job_logs(job)[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    node = next(node for node in running.workers if node.works())
    node.kill()
    assert not (output / done).exists(), "the job was done before a node could be killed"
    return node


def contents(folder: Path, *passing: str) -> dict[str, bytes]:
    """Return the bytes of all files but those that tell of time and place."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name not in passing}


def test_ingest_writes_the_same_shards(running: Cluster, undisturbed: Undisturbed, tmp_path: Path) -> None:
    running.have_workers(2)
    output = tmp_path / "shards"
    job = running.submit(*command("jobs/ingest.py", ingesting(undisturbed, output, ON_RAY), tmp_path))
    kill_a_node_during(running, job, output, "part-*.parquet", "_manifest.json")
    running.finish(job)
    assert contents(output) == contents(undisturbed.shards)


def test_a_bank_is_the_same(running: Cluster, undisturbed: Undisturbed, tmp_path: Path) -> None:
    running.have_workers(2)
    output = tmp_path / "bank"
    job = running.submit(*command("jobs/train.py uniformaly", banking(undisturbed, output, ON_RAY), tmp_path))
    kill_a_node_during(running, job, output, "_work/patches/*/_part-*.json", "model.json")
    running.finish(job)
    assert contents(output) == contents(undisturbed.bank)


def test_a_network_is_the_same(running: Cluster, undisturbed: Undisturbed, tmp_path: Path) -> None:
    running.have_workers(2)
    output = tmp_path / "network"
    job = running.submit(*command("jobs/train.py uniad", networking(undisturbed, output, ON_RAY), tmp_path))
    kill_a_node_during(running, job, output, "_work/checkpoints/checkpoint_*", "model.json")
    logs = running.finish(job)
    assert re.search(r"continuing at step [1-9]", logs), logs[-2000:]
    assert contents(output) == contents(undisturbed.network)


def test_scores_are_the_same(running: Cluster, undisturbed: Undisturbed, tmp_path: Path) -> None:
    running.have_workers(2)
    output = tmp_path / "scores"
    job = running.submit(*command("jobs/score.py", scoring(undisturbed, output, ON_RAY), tmp_path))
    kill_a_node_during(running, job, output, "part-*.parquet", "_manifest.json")
    running.finish(job)
    assert contents(output) == contents(undisturbed.scores)


def test_a_campaign_finds_the_same(running: Cluster, undisturbed: Undisturbed, tmp_path: Path) -> None:
    running.have_workers(2)
    output = tmp_path / "disturbed"
    options = memory_options(undisturbed.shards, output, trials=3, concurrency=2, runtime=ON_RAY)
    job = running.submit(*command("jobs/tune.py uniformaly", options, tmp_path))
    kill_a_node_during(running, job, output, "trials/*", "campaign.json")
    running.finish(job)
    calm = tmp_path / "calm"
    with without_ray(), pytest.MonkeyPatch.context() as patch:
        run_trials_here(patch)
        tune(memory_options(undisturbed.shards, calm, trials=3))
    found = records(calm)
    assert len(found) == 3
    assert records(output) == found


def records(campaign: Path) -> list[dict[str, Any]]:
    """Return what a campaign found of each trial."""
    read = [json.loads(path.read_text()) for path in sorted(campaign.glob("trials/*/record.json"))]
    return [{key: record[key] for key in ("trial", "values", "status", "objective")} for record in read]
