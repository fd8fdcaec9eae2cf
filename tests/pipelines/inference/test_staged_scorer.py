"""Scoring in three stages: the bytes of scoring in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines.data import fetch
from pipelines.data.image_files import AHEAD, AT_ONCE
from pipelines.data.list_images import write_listing
from pipelines.data.options import ListingOptions
from pipelines.inference import range_predictor, range_reader, range_scorer
from pipelines.inference.options import ScoreOptions
from pipelines.inference.range_scorer import RangeScorer, predict_batch
from pipelines.inference.score import score
from pipelines.inference.staged_scorer import scoring_stages
from pipelines.runtime.cli import parse
from pipelines.runtime.model_set import ModelSet, write_index
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.stage_clock import StageClock
from pipelines.runtime.stage_steps import InOneProcess
from tests.pipelines.sharded import picture
from unianom import files
from unianom.calibration import Calibrator
from unianom.configs.calibration import CalibrationConfig
from unianom.data.image import ImageLimits
from unianom.data.image_listing import ImageListing
from unianom.data.maps import MapsKept
from unianom.data.shards import Selection, ShardSet
from unianom.errors import OptionError
from unianom.execution import CPU
from unianom.model import Model
from unianom.options import to_plain


def arguments(model: str, shards: ShardSet | ImageListing, output: Path, **changes: Any) -> dict[str, Any]:
    models = ModelSet.open(model)
    given: dict[str, Any] = {
        "shards": shards,
        "selection": Selection(),
        "model_set": models,
        "digests": {folder: "d" * 64 for folder in models.folders},
        "output": str(output),
        "plan": "0" * 64,
        "maps": "all",
        "batch_size": 3,
        "limits": ImageLimits(),
        "execution": CPU,
        "threads": 1,
        "fold": False,
    }
    return {**given, **changes}


def assert_equal_bytes(model: str, shards: ShardSet | ImageListing, tmp_path: Path, **changes: Any) -> None:
    """Every range as one worker and as three stages write it."""
    one = RangeScorer(**arguments(model, shards, tmp_path / "one", **changes))
    given = arguments(model, shards, tmp_path / "three", **changes)
    three = InOneProcess(scoring_stages(given, ModelSet.open(model).descriptions()))
    for within in shards.ranges(Selection(), 5):
        records = [worker.run(to_plain(within)) for worker in (one, three)]
        same = {key for key in records[0] if key in records[1]}
        assert same == {"plan", "name", "rows", "statuses", "ids", "sha256"}
        assert {key: records[0][key] for key in same} == {key: records[1][key] for key in same}
    names = files.list_names(str(tmp_path / "one"))
    assert names == files.list_names(str(tmp_path / "three"))
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


@pytest.mark.parametrize("maps", ["none", "flagged", "all"])
def test_three_stages_write_the_bytes_of_one(model: str, shards: ShardSet, tmp_path: Path, maps: MapsKept) -> None:
    assert_equal_bytes(model, shards, tmp_path, maps=maps)


def test_images_that_cannot_be_read_stay_in_their_place(model: str, shards: ShardSet, tmp_path: Path) -> None:
    sizes = sorted(len(image) for part in shards.parts for b in shards.read(part) for image in b["image"].to_pylist())
    assert_equal_bytes(model, shards, tmp_path / "some", limits=ImageLimits(max_bytes=sizes[len(sizes) // 2]))
    assert_equal_bytes(model, shards, tmp_path / "none", limits=ImageLimits(max_bytes=10))


def test_batches_are_those_of_fused_stages(
    model: str, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where images cannot be read: what shares a batch decides about last bits."""
    sizes = sorted(len(image) for part in shards.parts for b in shards.read(part) for image in b["image"].to_pylist())
    seen: dict[str, list[int]] = {}
    for module in (range_scorer, range_predictor):
        batches = seen.setdefault(module.__name__, [])

        def counted(model: Any, images: Any, *more: Any, batches: list[int] = batches) -> Any:
            batches.append(len(images))
            return predict_batch(model, images, *more)

        monkeypatch.setattr(module, "predict_batch", counted)
    assert_equal_bytes(model, shards, tmp_path, limits=ImageLimits(max_bytes=sizes[len(sizes) // 2]))
    one, three = seen.values()
    assert one == three
    assert len(set(one)) > 1


def test_files_of_a_range_are_decoded_as_they_come(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range of a listing has hundreds of files of any size, of which few are held at a time."""
    (tmp_path / "camera").mkdir()
    for number in range(6 * AT_ONCE):
        Image.fromarray(picture([1], 40, 40)).save(tmp_path / "camera" / f"{number:03d}.png")
    listing = write_listing(
        str(tmp_path / "listing"), [str(tmp_path / "camera")], ListingOptions(), lambda _: "disc", "test", None
    )
    fetched, ahead = [], []
    read, decode = fetch.read_image_file, range_reader.decode_fitted

    def counted(uri: str) -> bytes:
        fetched.append(uri)
        return read(uri)

    def decoded(*arguments: Any) -> Any:
        ahead.append(len(fetched) - len(ahead))
        return decode(*arguments)

    monkeypatch.setattr(fetch, "read_image_file", counted)
    monkeypatch.setattr(range_reader, "decode_fitted", decoded)
    given = arguments(model, listing, tmp_path / "out")
    reader = scoring_stages(given, ModelSet.open(model).descriptions()).read()
    (within,) = listing.ranges(Selection(), 1000)
    block = reader.read(to_plain(within), StageClock())
    assert len(block.arrays["0"]) == len(ahead) == 6 * AT_ONCE
    assert max(ahead) <= AHEAD + 2 * AT_ONCE


def test_few_large_files_are_handed_on_at_a_time(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of a batch holds 2 GiB at most."""
    (tmp_path / "camera").mkdir()
    contents = {f"{number}.png": bytes(size) for number, size in enumerate((4, 4, 30, 4, 4, 4, 1))}
    for name, content in contents.items():
        (tmp_path / "camera" / name).write_bytes(content)
    monkeypatch.setattr(fetch, "AHEAD_BYTES", 10)
    listing = write_listing(
        str(tmp_path / "listing"), [str(tmp_path / "camera")], ListingOptions(), lambda _: "disc", "test", None
    )
    fetcher = fetch.ImageFetcher(listing, ImageLimits())
    (within,) = listing.ranges(Selection(), 1000)
    batches = [batch["image"].to_pylist() for batch in fetcher.read_range(within, ["sample_id", "image"])]
    assert [[len(image) for image in batch] for batch in batches] == [[4, 4], [30], [4, 4], [4, 1]]


def test_listed_images_are_told_height_and_width_as_they_are_shown(model: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    (tmp_path / "camera").mkdir()
    for name, size, more in (("a.png", (70, 50), {}), ("b.jpg", (90, 40), {"exif": exif}), ("d.jpg", (640, 480), {})):
        Image.fromarray(picture([1], size[1], size[0])).save(tmp_path / "camera" / name, **more)
    (tmp_path / "camera" / "c.png").write_bytes(b"no picture")
    listing = write_listing(
        str(tmp_path / "listing"), [str(tmp_path / "camera")], ListingOptions(), lambda _: "disc", "test", None
    )
    assert_equal_bytes(model, listing, tmp_path)
    (name,) = (name for name in files.list_names(str(tmp_path / "one")) if name.endswith(".parquet"))
    rows = pq.read_table(tmp_path / "one" / name, columns=["status", "height", "width"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("ok", 50, 70), ("ok", 90, 40), ("corrupt", None, None), ("ok", 480, 640)
    ]  # fmt: skip


def test_each_category_has_its_own_model(method: Any, shards: ShardSet, tmp_path: Path) -> None:
    for category in ("disc", "stripe"):
        Model(method, [category]).save(tmp_path / "models" / category)
    write_index(str(tmp_path / "models"), {category: category for category in ("disc", "stripe")})
    assert_equal_bytes(str(tmp_path / "models"), shards, tmp_path, maps="none")


def test_calibrated_scores_are_handed_on(method: Any, shards: ShardSet, tmp_path: Path) -> None:
    embedding = method.predict(torch.zeros(1, 3, method.input.side, method.input.side)).embedding
    torch.manual_seed(0)
    names = ["disc", "stripe"]
    calibrator = Calibrator(CalibrationConfig(), names, embedding.shape[1], tuple(embedding.shape[2:])).eval()
    Model(method, names, calibrator=calibrator).save(tmp_path / "model")
    assert_equal_bytes(str(tmp_path / "model"), shards, tmp_path, maps="none")
    name = next(name for name in files.list_names(str(tmp_path / "three")) if name.endswith(".parquet"))
    assert pq.read_table(tmp_path / "three" / name)["calibrated_score"].null_count == 0


def test_stages_are_an_option_of_running() -> None:
    """For all jobs; before, --stages was one of scoring alone."""
    given = ["--model", "m", "--shards", "s", "--output", "o"]
    assert parse(ScoreOptions, [*given, "--runtime.stages", "separate"]).runtime.stages == "separate"
    with pytest.raises(OptionError, match=r"--stages separate; did you mean --runtime.stages\?"):
        parse(ScoreOptions, [*given, "--stages", "separate"])


@pytest.mark.ray
def test_stages_of_their_own_on_ray(ray_cluster: None, model: str, shards: ShardSet, tmp_path: Path) -> None:
    """The same files as on threads, and a sentence about what the stages took."""
    options = ScoreOptions(
        model, shards.uri, output=str(tmp_path / "one"), maps="flagged", runtime=RuntimeOptions(local=True, workers=1)
    )
    score(options)
    separate = replace(
        options, output=str(tmp_path / "three"), runtime=RuntimeOptions(local=False, workers=1, stages="separate")
    )
    result = score(separate)
    names = [name for name in files.list_names(str(tmp_path / "one")) if name != "_lock.json"]
    assert names == [name for name in files.list_names(str(tmp_path / "three")) if name != "_lock.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    for word in ("decode", "predict", "write", "the device was busy"):
        assert word in result.stages
