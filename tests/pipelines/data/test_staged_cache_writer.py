"""Caches filled in three stages: the bytes of filling them in one, for all that runs a network over images."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.data import cache_writer, image_source
from pipelines.data.cache_writer import CacheWriter, range_task
from pipelines.data.extractors import Arrays, BatchFunction, Extractor, ImageBatch, finite
from pipelines.data.feature_cache import FeatureCache
from pipelines.data.image_source import SampleSource, ValidationSource
from pipelines.data.options import ValidationOptions
from pipelines.data.patch_matrix import KeptPatches
from pipelines.data.staged_cache_writer import ArrayWriter, caching_stages
from pipelines.data.validation_set import build_validation_set
from pipelines.evaluation.clustering import AnomalousPatches
from pipelines.runtime import tasks
from pipelines.runtime.device_turn import Device
from pipelines.runtime.models import load_model
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.stage_steps import InOneProcess, StageMaker, compute_step, read_step, write_step
from pipelines.runtime.stage_times import STAGE_TIMES
from pipelines.runtime.stages import Stages
from pipelines.runtime.task_worker import ERROR, error_from_plain
from pipelines.runtime.tasks import has_separate_stages
from pipelines.training.calibrate import calibrate
from pipelines.training.calibration_images import NormalEmbeddings
from pipelines.training.options import CalibrateOptions
from pipelines.training.prepared import FrozenFeatures, PreparedPixels, learnable
from pipelines.training.threshold import ImageScores
from pipelines.training.train import train
from pipelines.tuning.calibration_trials import MapsAndEmbeddings
from pipelines.tuning.encodings import EncodedPatches
from tests.methods.conftest import TINY
from tests.pipelines.conftest import UNTRACKED, Small, tiny_method, tiny_training
from tests.pipelines.sharded import CATEGORIES, LABELLED_PARTS, LIMITS, POLICY, masked, samples, write_shards
from unianom import files
from unianom.configs.calibration import CalibrationConfig, HeadConfig
from unianom.data.image import ImageLimits
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.execution import CPU, Execution
from unianom.methods import METHODS, Method
from unianom.model import Model

FUSED = RuntimeOptions(workers=1, stages="fused")
SEPARATE = RuntimeOptions(workers=1, stages="separate")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("shards") / "set", LABELLED_PARTS)


@pytest.fixture
def short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts have several, and models are loaded once."""
    monkeypatch.setattr(image_source, "RANGE_ROWS", 5)
    monkeypatch.setattr(cache_writer, "load_model", loaded)


@cache
def loaded(folder: str, execution: Execution) -> Model:
    return load_model(folder, execution)


def run_steps(stages: Stages, given: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`run_staged` in this process: blocks are handed on as on their way through Ray."""
    made = [StageMaker(pickle.dumps(make), 1) for make in (stages.read, stages.compute, stages.write)]
    device = Device()
    for task in given:
        result = write_step(made[2], compute_step(made[1], device, read_step(made[0], task)))
        if ERROR in result:
            raise error_from_plain(result[ERROR])
        yield result


@pytest.fixture
def staged_here(inline: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages run in this process; the folders that they wrote to."""
    ran: list[str] = []

    def run(stages: Stages, given: Sequence[dict[str, Any]], options: RuntimeOptions) -> Iterator[dict[str, Any]]:
        ran.append(stages.write.keywords["uri"])  # type: ignore[attr-defined]
        return run_steps(stages, given)

    monkeypatch.setattr(tasks, "run_staged", run)
    return ran


def content(folder: Path | str) -> dict[str, bytes]:
    """All files below a folder but the lock of who was here."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "_lock.json"
    }


# ---- every extractor ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, str]:
    """Model folders: of a memory method that masks images of the bank otherwise than others, and of a trained one."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    memory = METHODS["uniformaly"](tiny_method(mask="binary", mask_threshold=0.5)).eval()
    Model(memory, CATEGORIES).save(folder / "memory")
    Model(METHODS["uniad"](TINY["uniad"].config).eval(), CATEGORIES).save(folder / "trained")
    return {"memory": str(folder / "memory"), "trained": str(folder / "trained"), "fitted": str(tiny_model)}


ARRAYS: dict[str, set[str]] = {
    "patches of a bank": {"patches", "keep"},
    "patches to score": {"patches", "keep"},
    "encoded patches": {"patches", "attention"},
    "frozen features": {"descriptor", "neck"},
    "frozen features in half precision": {"descriptor", "neck"},
    "normal embeddings": {"embedding", "statistics", "category", "moments"},
    "anomalous patches": {"distances", "top", "mean"},
    "maps and embeddings": {"anomaly_map", "features"},
    "image scores": {"score"},
    "pixels and masks": {"pixels", "masks"},
}

EXTRACTORS: dict[str, Callable[[dict[str, str]], Extractor]] = {
    "patches of a bank": lambda models: KeptPatches(models["memory"], for_bank=True),
    "patches to score": lambda models: KeptPatches(models["memory"], for_bank=False),
    "encoded patches": lambda models: EncodedPatches(models["memory"]),
    "frozen features": lambda models: FrozenFeatures(models["trained"], half=False),
    "frozen features in half precision": lambda models: FrozenFeatures(models["trained"], half=True),
    "normal embeddings": lambda models: NormalEmbeddings(models["fitted"], tuple(CATEGORIES), half=True),
    "anomalous patches": lambda models: AnomalousPatches(models["fitted"], keep_ratio=0.1),
    "maps and embeddings": lambda models: MapsAndEmbeddings(models["fitted"]),
    "image scores": lambda models: ImageScores(models["fitted"]),
    "pixels and masks": lambda models: PreparedPixels(POLICY, masks=True),
}


def both(tmp_path: Path, source: Any, extractor: Extractor) -> list[dict[str, Any]]:
    """Fill a cache in both ways, and compare all that they write; the records."""
    arguments = ({"some": source}, {"some": extractor}, 2, CPU)
    given = [range_task(within, "some") for within in source.ranges()]
    one = CacheWriter(str(tmp_path / "one"), *arguments, threads=1)
    records = [one.run(task) for task in given]
    for record, result in zip(
        records, run_steps(caching_stages(str(tmp_path / "three"), *arguments), given), strict=True
    ):
        assert {key: result[key] for key in record} == record
    assert content(tmp_path / "one") == content(tmp_path / "three")
    return records


@pytest.mark.parametrize("name", EXTRACTORS)
def test_three_stages_write_the_bytes_of_one(
    short_ranges: None, shards: ShardSet, models: dict[str, str], tmp_path: Path, name: str
) -> None:
    """Of ranges that no batch fills evenly, and of some without an image."""
    selection, masks = learnable(["bolt"], labels=True), "masks" in name
    source = SampleSource(shards, selection, LIMITS, columns=("category",), masks=masks)
    extractor = EXTRACTORS[name](models)
    assert extractor.policy() == extractor.open(lambda folder: loaded(folder, CPU).method).policy
    records = both(tmp_path, source, extractor)
    assert [record["rows"] for record in records] == [4, 3, 0, 0, 3]
    assert set(records[0]["arrays"]) == ARRAYS[name]


def test_validation_images_pass_through_stages(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_source, "RANGE_ROWS", 3)
    held_out = frozenset(row["sample_id"] for row in LABELLED_PARTS[1] if row["label"] == 0)
    uri = build_validation_set(shards, ["nut"], held_out, POLICY, ValidationOptions(), LIMITS, str(tmp_path / "set"))
    records = both(tmp_path, ValidationSource(uri), PreparedPixels(POLICY))
    assert [record["rows"] for record in records] == [3, 1]


def test_one_process_may_run_all_stages(short_ranges: None, shards: ShardSet, tmp_path: Path) -> None:
    source = SampleSource(shards, Selection(("train",)), LIMITS)
    arguments = ({"": source}, {"": PreparedPixels(POLICY)}, 4, CPU)
    worker = InOneProcess(caching_stages(str(tmp_path), *arguments))
    times = [worker.run(range_task(within, ""))[STAGE_TIMES] for within in source.ranges()]
    assert {part for one in times for part in one["cpu"]["read"]} == {"read", "decode"}
    assert all(set(one["cpu"]["write"]) == {"write"} for one in times)


# ---- errors ---------------------------------------------------------------------------------------------------------


class Failing(PreparedPixels):
    """Finds that the second batch is not finite."""

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        counts = count()

        def arrays(batch: ImageBatch, found: Arrays) -> Arrays:
            values = np.array([np.nan if next(counts) else 1.0])
            return {"x": finite(values, f"features of {batch.part} are not finite; check weights")}

        def network(images: Tensor) -> dict[str, Tensor]:
            return {"sums": images.sum((1, 2, 3))}

        return BatchFunction(POLICY, arrays, network)


def errors(tmp_path: Path, source: SampleSource, extractor: Extractor) -> list[str]:
    """What one worker says and what three stages say."""
    arguments = ({"": source}, {"": extractor}, 2, CPU)
    task = range_task(source.ranges()[0], "")
    said = []
    for run in (
        lambda: CacheWriter(str(tmp_path), *arguments, threads=1).run(task),
        lambda: list(run_steps(caching_stages(str(tmp_path), *arguments), [task])),
    ):
        with pytest.raises(DataError) as caught:
            run()
        said.append(str(caught.value))
        assert files.list_names(str(tmp_path)) == [], "nothing is committed"
    return said


def test_errors_are_the_same_sentences(tmp_path: Path) -> None:
    rows = [*masked("nut", "train", 2), *samples("nut", "train", 2)]
    broken = [{**row, "image": b"no image"} if number == 2 else row for number, row in enumerate(rows)]
    unmasked = [{**row, "mask": None} for row in rows]
    whole, unreadable, lacking = (
        write_shards(tmp_path / name, [own]) for name, own in (("a", rows), ("b", broken), ("c", unmasked))
    )
    selection, pixels = learnable(["nut"], labels=True), PreparedPixels(POLICY, masks=True)
    cases: list[tuple[str, ShardSet, ImageLimits, Extractor]] = [
        ("set/nut/train/0/000.png: not an image of a known format", unreadable, LIMITS, pixels),
        ("set/nut/train/1/000.png: .* give --limits as at ingest, or leave", whole, ImageLimits(max_pixels=9), pixels),
        (r"set/nut/train/1/000.png is anomalous but has no mask", lacking, LIMITS, pixels),
        ("features of part-0.parquet are not finite; check weights", whole, LIMITS, Failing(POLICY)),
    ]
    for number, (words, shards, limits, extractor) in enumerate(cases):
        source = SampleSource(shards, selection, limits, masks="mask" in words)
        one, three = errors(tmp_path / f"cache {number}", source, extractor)
        assert one == three
        assert re.match(words, one), one


# ---- jobs -----------------------------------------------------------------------------------------------------------


def test_a_bank_is_the_same_in_both_ways(
    staged_here: list[str], small: Small, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its patches, its vectors, and its thresholds from held-out images."""
    train(tiny_training(small.shards, tmp_path / "model", runtime=SEPARATE))
    assert len(staged_here) == 2, "its patches and the scores of the held-out images"
    assert content(tmp_path / "model") == content(tiny_model)
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if "the device was busy" in line]
    assert [line.split(":")[0] for line in told] == ["embed", "score held-out normals"]
    for word in ("read", "decode", "forward", "write", "CPU ms an image"):
        assert all(word in line for line in told)


def test_a_calibrator_is_the_same_in_both_ways(
    staged_here: list[str], small: Small, tiny_model: Path, tmp_path: Path
) -> None:
    config = CalibrationConfig(iterations=4, batch_size=4, head=HeadConfig(hidden=8))
    for name, runtime in (("one", FUSED), ("three", SEPARATE)):
        calibrate(
            CalibrateOptions(
                str(tiny_model),
                str(small.shards),
                output=str(tmp_path / name),
                folder=str(tmp_path / f"kept {name}"),
                calibration=config,
                runtime=runtime,
                tracking=UNTRACKED,
            )
        )
        assert len(staged_here) == (name == "three")
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert content(tmp_path / "kept one") == content(tmp_path / "kept three")


def test_a_killed_filling_goes_on_in_the_other_way(
    short_ranges: None, staged_here: list[str], shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way is no part of a cache's plan, so what one has written the other does not compute again."""
    source, extractor = SampleSource(shards, Selection(("train",), ("bolt",)), LIMITS), PreparedPixels(POLICY)
    caches = [FeatureCache.below(str(tmp_path / name), "features", {"": source}, {}) for name in ("whole", "killed")]
    caches[0].fill({"": extractor}, 2, FUSED, "prepare")
    real, ran = ArrayWriter.write, []

    def mortal(self: ArrayWriter, task: dict[str, Any], *rest: Any) -> dict[str, Any]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(task["first"])
        return real(self, task, *rest)

    monkeypatch.setattr(ArrayWriter, "write", mortal)
    with pytest.raises(KeyboardInterrupt):
        caches[1].fill({"": extractor}, 2, SEPARATE, "prepare")
    with pytest.raises(DataError, match="is not finished; run the same command again"):
        caches[1].open()
    monkeypatch.setattr(CacheWriter, "run", recorded(CacheWriter.run, again := []))
    caches[1].fill({"": extractor}, 2, FUSED, "prepare")
    assert len(ran) + len(again) == len(source.ranges())
    assert content(caches[1].uri) == content(caches[0].uri)


def recorded(run: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    def wrapped(self: CacheWriter, task: dict[str, Any]) -> Any:
        seen.append(task)
        return run(self, task)

    return wrapped


def test_where_stages_are_separate() -> None:
    gpus = RuntimeOptions(gpus_per_worker=1, local=False)
    assert has_separate_stages(gpus, 1)
    assert not has_separate_stages(dataclasses.replace(gpus, stages="fused"), 10**6)
    assert not has_separate_stages(dataclasses.replace(gpus, local=True), 10**6)
    assert not has_separate_stages(dataclasses.replace(gpus, gpus_per_worker=0), 10**6)
    assert has_separate_stages(SEPARATE, 1)
    with pytest.raises(OptionError, match="stages=separate needs Ray; leave out local, or take fused"):
        RuntimeOptions(local=True, stages="separate")
