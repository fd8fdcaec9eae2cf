"""Images scored from where they lie: the scores of an ingest, without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipelines.data import list_images
from pipelines.data.ingest import ingest
from pipelines.data.options import IngestOptions, ListingOptions
from pipelines.inference.options import ScoreOptions
from pipelines.inference.range_scorer import RangeScorer
from pipelines.inference.score import score
from pipelines.runtime.options import RuntimeOptions
from tests.pipelines.conftest import tiny_method
from tests.pipelines.sharded import picture
from unianom import files
from unianom.data.image import encode_png
from unianom.data.image_listing import ImageListing
from unianom.data.shards import ScoreSet
from unianom.errors import DataError, OptionError
from unianom.memory.index import MemoryBank
from unianom.methods.uniformaly import UniFormaly
from unianom.model import Model

HERE = RuntimeOptions(local=True, workers=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    method = UniFormaly(tiny_method())
    rows = np.random.default_rng(0).normal(size=(40, method.encoder.dimension)).astype(np.float32)
    method.bank = MemoryBank.build(rows)
    folder = tmp_path_factory.mktemp("model")
    Model(method, ["disc"]).save(folder)
    return str(folder)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve images in three folders, of which one is broken, and a text."""
    root = tmp_path / "camera"
    for number in range(12):
        folder = root / f"day {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.png").write_bytes(encode_png(picture([number])))
    (root / "day 1" / "04.png").write_bytes(b"no picture")
    (root / "day 1" / "notes.txt").write_text("seen")
    return root


def options(model: str, output: Path, *images: Path | str, **changes: Any) -> ScoreOptions:
    given = {"maps": "none", "batch_size": 2, "max_reject_fraction": 0.5, "runtime": HERE, **changes}
    return ScoreOptions(model, output=str(output), images=tuple(map(str, images)), **given)


def rows(scores: ScoreSet) -> dict[str, dict[str, Any]]:
    return {row["sample_id"]: row for row in scores.table().to_pylist()}


def test_a_folder_is_scored_as_if_it_was_ingested(model: str, images: Path, tmp_path: Path) -> None:
    found = rows(score(options(model, tmp_path / "scores", images)).scores)
    assert sorted(found) == [f"camera/day {n % 3}/{n:02d}.png" for n in sorted(range(12), key=lambda n: (n % 3, n))]
    ingest(
        IngestOptions(
            "folder", str(images), str(tmp_path / "shards"), {"unlabelled": True}, max_reject_fraction=0.5,
            runtime=HERE,
        )
    )  # fmt: skip
    of_shards = replace(options(model, tmp_path / "of shards", images), shards=str(tmp_path / "shards"), images=())
    expected = rows(score(of_shards).scores)
    assert found.keys() == expected.keys()
    for name, row in found.items():
        same = ("score", "status", "uri", "sha256", "height", "width")
        assert {key: row[key] for key in same if row["status"] == "ok"} == {
            key: expected[name][key] for key in same if row["status"] == "ok"
        }
        assert row["status"] == expected[name]["status"]
        assert (row["split"], row["label"], row["defect"], row["category"]) == ("test", None, None, "disc")
    assert [name for name, row in found.items() if row["status"] == "corrupt"] == ["camera/day 1/04.png"]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_tables_name_images_by_path_or_uri(model: str, images: Path, tmp_path: Path, ending: str) -> None:
    paths = ["camera/day 0/00.png", str(images / "day 2" / "02.png"), "camera/gone.png"]
    table = pa.table({"file": paths, "kind": ["disc"] * 3, "when": [1, 2, 3]})
    path = tmp_path / f"seen.{ending}"
    if ending == "csv":
        pyarrow.csv.write_csv(table, path)
    elif ending == "parquet":
        pq.write_table(table, path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()) + "\n\n")
    listing = ListingOptions(column="file", category_column="kind")
    found = score(options(model, tmp_path / "scores", path, listing=listing)).scores.table().to_pylist()
    whole = rows(score(options(model, tmp_path / "whole", images)).scores)
    assert [row["uri"] for row in found] == [str(images / p.removeprefix(f"{images}/").removeprefix("camera/"))
                                             for p in paths]  # fmt: skip
    assert [row["status"] for row in found] == ["ok", "ok", "missing"]
    assert found[0]["score"] == whole["camera/day 0/00.png"]["score"]
    assert found[1]["score"] == whole["camera/day 2/02.png"]["score"]
    with pytest.raises(DataError, match=r"has no column 'uri'; it has .*; name it by --listing.column"):
        score(options(model, tmp_path / "other", path))


def test_single_files_and_folders_may_be_mixed(model: str, images: Path, tmp_path: Path) -> None:
    one, two = images / "day 0" / "00.png", images / "day 2"
    found = score(options(model, tmp_path / "scores", one, two)).scores
    assert found.table(columns=["uri"])["uri"].to_pylist() == [
        str(one), *(str(two / f"{n:02d}.png") for n in (2, 5, 8, 11))
    ]  # fmt: skip
    assert found.manifest["images"] == [str(one), str(two)]


def test_the_listing_is_made_once(model: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that come later are not scored by the job that goes on; one that is gone is a row."""
    monkeypatch.setattr(list_images, "GROUP_ROWS", 4)
    monkeypatch.setattr(list_images, "PART_ROWS", 8)
    run, ran = RangeScorer.run, []

    def ends(self: RangeScorer, task: dict[str, Any]) -> dict[str, Any]:
        ran.append(task["part"])
        if len(ran) == 2:
            raise OSError("the machine is gone")
        return run(self, task)

    monkeypatch.setattr(RangeScorer, "run", ends)
    given = options(model, tmp_path / "scores", images, runtime=RuntimeOptions(local=True, workers=1))
    with pytest.raises(Exception, match="the machine is gone"):
        score(given)
    (images / "day 0" / "99.png").write_bytes(encode_png(picture([99])))
    (images / "day 2" / "11.png").unlink()
    scores = score(given).scores
    assert ran == ["part-00000.parquet", "part-00001.parquet", "part-00001.parquet"]
    found = rows(scores)
    assert len(found) == 12
    assert {name: row["status"] for name, row in found.items() if row["status"] != "ok"} == {
        "camera/day 1/04.png": "corrupt", "camera/day 2/11.png": "missing"
    }  # fmt: skip
    listing = ImageListing.open(tmp_path / "scores" / "_listing")
    assert listing.manifest["left_out"]["files"] == {
        ".txt": {"count": 1, "example": str(images / "day 1" / "notes.txt")}
    }
    assert scores.manifest["shards"]["digest"] == listing.digest
    assert not score(given).fresh


def test_what_cannot_be_listed_is_named(model: str, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores"
    with pytest.raises(DataError, match=r"are both named camera/day 0/00.png; list each image once"):
        score(options(model, output, images, images))
    (tmp_path / "notes.txt").write_text("seen")
    with pytest.raises(DataError, match=r"notes.txt is neither an image .* nor a table"):
        score(options(model, output, tmp_path / "notes.txt"))
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        score(options(model, output, tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images in or below .*empty"):
        score(options(model, output, tmp_path / "empty"))
    (tmp_path / "broken.jsonl").write_text('{"uri": "a.png"}\n{"uri"\n')
    with pytest.raises(DataError, match=r"line 2 of .*broken.jsonl is not JSON"):
        score(options(model, output, tmp_path / "broken.jsonl"))
    with pytest.raises(DataError, match=r"--listing.category names the category 'cap', .* knows disc"):
        score(options(model, output, images, listing=ListingOptions(category="cap")))
    assert not output.exists()


def test_the_category_must_be_known_where_there_are_several(images: Path, tmp_path: Path) -> None:
    method = UniFormaly(tiny_method())
    method.bank = MemoryBank.build(np.ones((3, method.encoder.dimension), np.float32))
    Model(method, ["cap", "disc"]).save(tmp_path / "model")
    model = str(tmp_path / "model")
    with pytest.raises(OptionError, match="knows the categories cap, disc; say of which the images are"):
        score(options(model, tmp_path / "scores", images))
    found = score(options(model, tmp_path / "scores", images, listing=ListingOptions(category="cap"))).scores
    assert {row["category"] for row in found.table().to_pylist()} == {"cap"}


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(OptionError, match="give either --shards, a shard set, or --images"):
        ScoreOptions("m", output="o")
    with pytest.raises(OptionError, match="give either --shards"):
        ScoreOptions("m", "s", output="o", images=("i",))
    with pytest.raises(OptionError, match="listed have no splits"):
        ScoreOptions("m", output="o", images=("i",), splits=("train",))
    with pytest.raises(OptionError, match="--listing says how --images are listed"):
        ScoreOptions("m", "s", output="o", listing=ListingOptions(category="a"))


def test_files_of_the_listing_are_the_jobs_own(model: str, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores"
    score(options(model, output, images))
    with pytest.raises(DataError, match="differing in: batch_size"):
        score(options(model, output, images, batch_size=3))
    (images / "day 2" / "11.png").unlink()
    again = score(options(model, output, images, batch_size=3, overwrite=True)).scores
    assert len(rows(again)) == 11
    assert files.list_files(str(output / "_listing")) == ["_manifest.json", "part-00000.parquet"]
