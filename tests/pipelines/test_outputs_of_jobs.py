"""Every job against everything that may lie where it is told to write: nothing of it is ever lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.ingest import ingest
from pipelines.data.options import IngestOptions
from pipelines.demo import run_demo
from pipelines.evaluation.cluster_anomalies import cluster_anomalies
from pipelines.evaluation.compare import compare
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.low_shot import low_shot
from pipelines.evaluation.options import (
    BootstrapOptions,
    ClusterOptions,
    CompareOptions,
    EvaluateOptions,
    LowShotOptions,
    SemanticOptions,
    protocol_options,
)
from pipelines.evaluation.semantic import semantic
from pipelines.inference.decide import decide
from pipelines.inference.options import DecideOptions, ScoreOptions
from pipelines.inference.score import score
from pipelines.reporting.html import write_report
from pipelines.reporting.options import ReportOptions
from pipelines.runtime import outputs
from pipelines.runtime.options import DemoOptions
from pipelines.runtime.outputs import KINDS, PLAN
from pipelines.serving.export import export
from pipelines.serving.options import ExportOptions, GateOptions
from pipelines.training.calibrate import calibrate
from pipelines.training.options import CalibrateOptions, ThresholdOptions, train_options
from pipelines.training.train import train
from pipelines.tuning.options import tune_options
from pipelines.tuning.tune import tune
from tests.pipelines.conftest import ONE, UNTRACKED, Small, tiny_method, tiny_training, without_ray
from unianom import files
from unianom.data.drawing import draw_corpus
from unianom.errors import DataError, OptionError, WeightsError


class Inputs:
    """What all jobs are given: real outputs of the jobs before them, in a folder of their own."""

    def __init__(self, root: Path, small: Small, model: Path) -> None:
        self.root = root
        for name, source in (("corpus", small.corpus), ("shards", small.shards), ("model", model)):
            shutil.copytree(source, root / name)
        self.corpus, self.shards, self.model, self.scores = (
            str(root / name) for name in ("corpus", "shards", "model", "scores")
        )
        score(ScoreOptions(self.model, self.shards, output=self.scores, splits=("train", "test"), runtime=ONE))
        self.evaluation = str(root / "evaluation")
        options = EvaluateOptions(
            self.scores, self.shards, self.evaluation, bootstrap=BootstrapOptions(0), runtime=ONE, tracking=UNTRACKED
        )
        evaluate(options)
        classes = root / "class_corpus"
        draw_corpus(classes, ("weave", "cog"), train=4, good=2, per_defect=1, size=64)
        for split in ("train", "test"):
            for category in ("weave", "cog"):
                shutil.copytree(classes / category / split / "good", root / "classes" / split / category)
        self.classes = str(root / "classes_shards")
        every = {"all_classes": True}
        ingest(IngestOptions("class_folders", str(root / "classes"), self.classes, layout_options=every, runtime=ONE))


@pytest.fixture(scope="module")
def given(small: Small, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    with without_ray():
        return Inputs(tmp_path_factory.mktemp("given"), small, tiny_model)


def _fit(given: Inputs, output: str, **more: Any) -> Any:
    return train(tiny_training(Path(given.shards), Path(output), threshold=ThresholdOptions(), **more))


def _tune(given: Inputs, output: str, **more: Any) -> Any:
    return tune(tune_options()["uniformaly"](given.shards, output, method=tiny_method(), tracking=UNTRACKED, **more))


def _protocol(base: type, run: Callable[[Any], Any], shards: str, output: str, **more: Any) -> Any:
    options = protocol_options(base)["uniformaly"]
    return run(options(shards, output, method=tiny_method(), tracking=UNTRACKED, runtime=ONE, **more))


JOBS: dict[str, tuple[str, tuple[str, ...], Callable[..., Any]]] = {
    "ingest": (
        "shard set",
        ("corpus",),
        lambda g, o, **m: ingest(IngestOptions("mvtec", g.corpus, o, resize=32, runtime=ONE, **m)),
    ),
    "train": ("model", ("shards",), lambda g, o, **m: _fit(g, o, seed=7, **m)),
    "train per category": ("models", ("shards",), lambda g, o, **m: _fit(g, o, seed=7, per_category=True, **m)),
    "score": (
        "score set",
        ("shards", "model"),
        lambda g, o, **m: score(ScoreOptions(g.model, g.shards, output=o, batch_size=2, runtime=ONE, **m)),
    ),
    "calibrate": (
        "calibrated model",
        ("shards", "model"),
        lambda g, o, **m: calibrate(CalibrateOptions(g.model, g.shards, o, tracking=UNTRACKED, runtime=ONE, **m)),
    ),
    "decide": (
        "decision set",
        ("scores", "shards"),
        lambda g, o, **m: decide(
            DecideOptions(g.scores, o, shards=g.shards, target_fpr=0.9, review_fpr=0.95, tracking=UNTRACKED, **m)
        ),
    ),
    "evaluate": (
        "evaluation",
        ("scores", "shards"),
        lambda g, o, **m: evaluate(EvaluateOptions(g.scores, g.shards, o, runtime=ONE, tracking=UNTRACKED, **m)),
    ),
    "compare": (
        "comparison",
        ("evaluation",),
        lambda g, o, **m: compare(CompareOptions((g.evaluation,), o, tracking=UNTRACKED, **m)),
    ),
    "cluster": (
        "clustering",
        ("shards", "model"),
        lambda g, o, **m: cluster_anomalies(ClusterOptions(g.model, g.shards, o, tracking=UNTRACKED, **m)),
    ),
    "semantic": (
        "semantic protocol",
        ("classes",),
        lambda g, o, **m: _protocol(SemanticOptions, semantic, g.classes, o, **m),
    ),
    "low_shot": (
        "low-shot protocol",
        ("shards",),
        lambda g, o, **m: _protocol(LowShotOptions, low_shot, g.shards, o, shots=(1,), draws=1, **m),
    ),
    "export": (
        "export",
        ("shards", "model"),
        lambda g, o, **m: export(ExportOptions(g.model, g.shards, o, gate=GateOptions(images=2), **m)),
    ),
    "tune": ("campaign", ("shards",), lambda g, o, **m: _tune(g, o, **m)),
}
"""Kind of output, inputs, and the job itself, given these and its output."""

TYPICAL = {
    "shard set": ("part-00000.parquet", "_part-00000.json", "_rejected.parquet"),
    "score set": ("part-00000-0123456789ab.parquet", "_part-00000-0123456789ab.json"),
    "model": ("weights.safetensors", "bank/manifest.json", "_work/part-00000.npy", "_work/trained/model.json"),
    "models": ("bottle/model.json", "models.json"),
    "calibrated model": ("weights.safetensors", "calibrator.safetensors"),
    "decision set": ("part-00000-0123456789ab.parquet", "queue.csv", "queue_uncertain.png", "section.json"),
    "evaluation": ("categories.csv", "_pixel_counts/0123456789ab/part.npz"),
    "comparison": ("comparison.csv", "section.json"),
    "clustering": ("clusters.parquet", "categories.csv", "clusters_bottle.png"),
    "semantic protocol": ("scores-00000.parquet", "_scores-00000.json", "tasks.csv"),
    "low-shot protocol": ("scores-00000.parquet", "draws.csv"),
    "export": ("model.onnx", "predict.py", "README.md"),
    "campaign": ("trials/0123456789/record.json", "best.yaml"),
}


def lay_out(folder: Path, target: str) -> None:
    """Something that is there already: another job's output, complete or not, or files of no job."""
    if target == "foreign":
        names = ["categories.csv", "model.json", "_manifest.json", "part-00000.parquet", "_work/notes", "report.tmp"]
        for name in names:
            files.write_bytes(str(folder / name), name.encode())
        return
    kind, finished = target.rsplit(", ", 1)
    plan = {"some": "thing"}
    files.write_json(str(folder / PLAN), {"job": kind, "digest": files.digest_of(plan), "plan": plan})
    for name in (*TYPICAL[kind], "notes.txt", "nested/_manifest.json", "nested/part-00000.parquet"):
        files.write_bytes(str(folder / name), name.encode())
    done = KINDS[kind].done
    if finished == "finished" and done is not None:
        files.write_bytes(str(folder / done), b"{}")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files.list_files(str(folder))}


TARGETS = ("foreign", *(f"{kind}, {state}" for kind in TYPICAL for state in ("finished", "unfinished")))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("job", JOBS)
def test_nothing_in_the_way_is_lost(inline: None, given: Inputs, tmp_path: Path, job: str, overwrite: bool) -> None:
    kind, _, run = JOBS[job]
    inputs = contents(given.root)
    for number, target in enumerate(TARGETS):
        folder = tmp_path / str(number)
        lay_out(folder, target)
        before = contents(folder)
        own = target.rsplit(", ", 1)[0] == kind
        if own and overwrite:
            continue  # which is what it asks for; see the next test
        with pytest.raises(DataError, match=r"choose another output") as raised:
            run(given, str(folder), overwrite=overwrite)
        assert ("--overwrite true" in str(raised.value)) == own
        there = "other files" if target == "foreign" else KINDS[target.rsplit(", ", 1)[0]].words
        assert f"{folder} holds {there}" in str(raised.value)
        assert contents(folder) == before, target
    assert contents(given.root) == inputs


@pytest.mark.parametrize("job", JOBS)
def test_only_what_the_job_writes_is_replaced(inline: None, given: Inputs, tmp_path: Path, job: str) -> None:
    """Claimed with --overwrite true, where an earlier run of the same job left its output among a user's files."""
    kind = JOBS[job][0]
    lay_out(tmp_path, f"{kind}, finished")
    with outputs.open_output(str(tmp_path), kind, {"some": "other"}, overwrite=True):
        left = set(contents(tmp_path)) - {PLAN, outputs.LOCK}
    users = {"notes.txt", "nested/_manifest.json", "nested/part-00000.parquet"}
    assert left == users | ({"bottle/model.json"} if kind == "models" else set())


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("job", JOBS)
def test_no_input_is_an_output(inline: None, given: Inputs, tmp_path: Path, job: str, overwrite: bool) -> None:
    _, names, run = JOBS[job]
    before = contents(given.root)
    for name in names:
        place = getattr(given, name)
        link = tmp_path / f"link to {name}"
        link.symlink_to(place)
        for output in (place, f"{place}/below", str(link), f"{link}/below", str(given.root)):
            if job == "calibrate" and name == "model" and output in (place, str(link)):
                continue  # in place, which is what it does without an output
            with pytest.raises(OptionError, match=r"(is|lies within|contains) the input --"):
                run(given, output, overwrite=overwrite)
            assert contents(given.root) == before, output


def test_a_report_takes_nothing_s_place(inline: None, given: Inputs, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<html>")
    for output, error in ((mine, DataError), (Path(given.evaluation) / "new.html", OptionError)):
        for overwrite in (False, True):
            with pytest.raises(error):
                write_report(ReportOptions(given.evaluation, str(output), overwrite=overwrite, tracking=UNTRACKED))
    assert mine.read_text() == "<html>"


def test_a_demo_takes_nothing_s_place(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "mine.png").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"holds other files \(corpus\)"):
        run_demo(DemoOptions(str(tmp_path)))
    assert files.list_files(str(tmp_path)) == ["corpus/mine.png"]


# --------------------------------------------------------------------------------------------------- names made of data
@pytest.mark.parametrize("category", ["../escaped", "/tmp/escaped", "..", "_work", "models.json", "model.json"])
def test_no_category_leads_out_of_the_output(inline: None, tmp_path: Path, category: str) -> None:
    """One model for each category, each in a folder of its own below the output."""
    draw_corpus(tmp_path / "corpus", ("weave",), train=12, good=1, per_defect=1, size=64)
    names = (category, "a b", "a_b")
    rows = [
        {"filename": f"weave/train/good/{image.name}", "category": names[number % 3], "split": "train", "label": 0}
        for number, image in enumerate(sorted((tmp_path / "corpus/weave/train/good").iterdir()))
    ]
    (tmp_path / "corpus" / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = str(tmp_path / "corpus" / "list.jsonl")
    ingest(IngestOptions("manifest", source, str(tmp_path / "shards"), runtime=ONE))
    (outer := tmp_path / "outer").mkdir()
    options = {"per_category": True, "threshold": ThresholdOptions()}
    results = train(tiny_training(tmp_path / "shards", outer / "models", **options))
    assert [name.name for name in outer.iterdir()] == ["models"]
    folders = {result.categories[0]: Path(result.folder) for result in results}
    assert len(set(folders.values())) == 3
    assert {folder.parent for folder in folders.values()} == {outer / "models"}
    assert files.read_json(str(outer / "models" / "models.json")) == {c: f.name for c, f in folders.items()}
    assert folders["a b"].name == "a b"


# ------------------------------------------------------------------------------------------ options that cannot be used
WRONG_METHODS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "name": ({"name": "vit_tiny_patch9000"}, OptionError, "no such model"),
    "weights": ({"weights": "/nowhere/weights.safetensors"}, WeightsError, "no weights file"),
    "blocks": ({}, OptionError, "block"),
}


@pytest.mark.parametrize("wrong", WRONG_METHODS)
@pytest.mark.parametrize("job", ["train", "semantic", "low_shot", "tune"])
def test_a_method_that_cannot_be_made_leaves_nothing(given: Inputs, tmp_path: Path, job: str, wrong: str) -> None:
    """So that the mended command is not refused by what the first one left."""
    backbone, error, words = WRONG_METHODS[wrong]
    method = tiny_method()
    method = dataclasses.replace(method, backbone=dataclasses.replace(method.backbone, **backbone))
    if wrong == "blocks":
        method = dataclasses.replace(method, blocks=(0, 99))
    output = tmp_path / "output"
    run, options, shards = {
        "train": (train, train_options(), given.shards),
        "semantic": (semantic, protocol_options(SemanticOptions), given.classes),
        "low_shot": (low_shot, protocol_options(LowShotOptions), given.shards),
        "tune": (tune, tune_options(), given.shards),
    }[job]
    asked: Any = options["uniformaly"]
    with pytest.raises(error, match=words):
        run(asked(shards=shards, output=str(output), method=method, tracking=UNTRACKED, runtime=ONE))  # type: ignore[operator]
    assert not output.exists()
