"""Memory banks of images from where they lie: the models of an ingest, without one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.data import sample_files
from pipelines.data.ingest import ingest
from pipelines.data.listed_shards import ListedShards
from pipelines.data.normal_images import ListingChecker, NormalImages
from pipelines.data.options import IngestOptions, ListingOptions
from pipelines.inference.options import ScoreOptions
from pipelines.inference.score import score
from pipelines.runtime.options import RuntimeOptions
from pipelines.training import memory_bank
from pipelines.training.options import ThresholdOptions, train_options
from pipelines.training.per_category import FitResult
from pipelines.training.train import train
from tests.pipelines.conftest import HERE, UNTRACKED, tiny_method
from tests.pipelines.sharded import picture
from unianom import files
from unianom.data.image import ImageLimits, encode_png
from unianom.data.schema import SCORE_SCHEMA
from unianom.data.shards import Selection
from unianom.errors import DataError, OptionError
from unianom.temporary_database import temporary_database

COUNT = 24
BROKEN = ("day 1/04.png", "day 2/08.png")


def name_of(number: int) -> str:
    return f"day {number % 3}/{number:02d}.png"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """24 images in three folders, of which two are broken, and a text."""
    root = tmp_path / "camera"
    for number in range(COUNT):
        path = root / name_of(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(picture([number])))
    (root / BROKEN[0]).write_bytes(b"no picture")
    (root / BROKEN[1]).write_bytes(encode_png(picture([8]))[:200])
    (root / "day 1" / "notes.txt").write_text("seen")
    return root


def options(output: Path, *images: Path | str, **changes: Any) -> Any:
    given = {"batch_size": 3, "max_reject_fraction": 0.1, **changes}
    shared = {"method": tiny_method(), "tracking": UNTRACKED, "runtime": HERE}
    return train_options()["uniformaly"](output=str(output), images=tuple(map(str, images)), **{**shared, **given})


def train_on_shards(images: Path, output: Path, **changes: Any) -> FitResult:
    layout = {"normal": ".", "category": "all", "train_fraction": 1.0}
    shards = f"{output} shards"
    ingest(IngestOptions("folder", str(images), shards, layout, runtime=HERE, max_reject_fraction=0.1))
    (result,) = train(replace(options(output, images, **changes), images=(), shards=shards))
    return result


def described(folder: Path) -> dict[str, Any]:
    """All of a model but what says whose it is."""
    model: dict[str, Any] = json.loads((folder / "model.json").read_text())
    for name in ("plan_digest", "shards"):
        model["provenance"].pop(name)
    return model


def check_same_model(found: FitResult, expected: FitResult) -> None:
    assert found.threshold is not None
    assert replace(found, folder="", metrics={}) == replace(expected, folder="", metrics={})
    one, other = Path(found.folder), Path(expected.folder)
    assert described(one) == described(other)
    names = files.list_files(str(other / "bank"))
    assert "origins.parquet" in names
    assert files.list_files(str(one / "bank")) == names
    for name in names:
        assert (one / "bank" / name).read_bytes() == (other / "bank" / name).read_bytes(), name
    assert set(files.list_names(str(one))) == {*files.list_names(str(other)), "_listing"}


def test_a_folder_on_a_store_gives_the_model_of_its_shards(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is fetched once to be checked, and once for the bank or for the threshold."""
    how = {"threshold": ThresholdOptions(source="held_out", validation_fraction=0.4), "seed": 3}
    expected = train_on_shards(images, tmp_path / "expected", **how)
    uri, read = "memory:///test-listed-images/camera", sample_files.read_image_file
    fetched: list[str] = []

    def counted(uri: str) -> bytes:
        fetched.append(uri)
        return read(uri)

    for module in ("pipelines.data.fetch", "pipelines.data.sample_files"):
        monkeypatch.setattr(f"{module}.read_image_file", counted)
    try:
        for name in files.list_files(str(images)):
            files.write_bytes(f"{uri}/{name}", (images / name).read_bytes())
        (found,) = train(options(tmp_path / "model", uri, **how))
    finally:
        files.remove("memory:///test-listed-images")
    check_same_model(found, expected)
    assert found.metrics["images"] == 13
    assert Counter(fetched) == {f"{uri}/{name}": 1 if name in BROKEN else 2 for name in map(name_of, range(COUNT))}


def test_a_job_that_was_ended_goes_on(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended while images are checked, and while the bank is made; the model, and its scores, are those of shards."""
    run, ran = ListingChecker.run, []

    def counted(self: ListingChecker, task: dict[str, Any]) -> dict[str, Any]:
        ran.append(task["number"])
        if len(ran) == 6:
            raise OSError("the machine is gone")
        return run(self, task)

    def full(*_: Any) -> Any:
        raise OSError("no room")

    monkeypatch.setattr(ListingChecker, "run", counted)
    how = {"threshold": ThresholdOptions(source="leave_one_out"), "runtime": RuntimeOptions(local=True, workers=1)}
    given = options(tmp_path / "model", images, **how)
    with pytest.raises(Exception, match="the machine is gone"):
        train(given)
    with monkeypatch.context() as patch:
        patch.setattr(memory_bank, "choose_coreset", full)
        with pytest.raises(OSError, match="no room"):
            train(given)
    assert Counter(ran) == {number: 1 + (number == 5) for number in range(16)}  # as many parts as an ingest makes
    (found,) = train(given)
    assert len(ran) == 17
    assert found.metrics["images_per_second"] == 0  # all patches were there
    expected = train_on_shards(images, tmp_path / "expected", **how)
    check_same_model(found, expected)
    assert not train(given)[0].fresh
    columns = [name for name in SCORE_SCHEMA.names if name != "model"]
    scored = [
        score(
            ScoreOptions(
                folder, output=f"{folder} scores", images=(str(images),), runtime=HERE,
                max_reject_fraction=0.1,
            )
        ).scores.table(columns=columns)
        for folder in (found.folder, expected.folder)
    ]  # fmt: skip
    assert Counter(scored[0]["status"].to_pylist()) == {"ok": 22, "corrupt": 2}
    assert scored[0] == scored[1]


def test_what_was_left_out_is_told_and_kept(images: Path, tmp_path: Path, capsys: Any) -> None:
    given = options(tmp_path / "model", images, max_reject_fraction=0.01)
    with pytest.raises(
        DataError, match=r"2 of 24 samples were rejected \(2 corrupt\), more than --max-reject-fraction"
    ):
        train(given)
    printed = capsys.readouterr().out
    assert "left out: files ending in .txt: 1" in printed
    for name in BROKEN:
        assert f"left out: {images}/{name}: corrupt" in printed
    listing = ListedShards.open(tmp_path / "model" / "_listing")
    assert listing.rejected()["sample_id"].to_pylist() == [f"camera/{name}" for name in BROKEN]
    assert listing.count(Selection(("train",), ("all",), (0,))) == 22
    facts = listing.table(columns=["height", "width", "format"]).to_pylist()
    assert facts == [{"height": 48, "width": 72, "format": "PNG"}] * 22
    (images / "day 0" / "99.png").write_bytes(encode_png(picture([99])))
    with pytest.raises(DataError, match="differing in: images"):
        train(given)
    (result,) = train(replace(given, max_reject_fraction=0.1, overwrite=True))
    assert result.metrics["images"] == 23
    names = [name for number in range(16) for name in (f"_part-{number:05d}.json", f"part-{number:05d}.parquet")]
    assert files.list_names(listing.uri) == sorted(["_manifest.json", "_rejected.parquet", *names])


def test_an_image_that_has_changed_is_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check, path = NormalImages.check, images / "day 0" / "00.png"

    def then(change: Any) -> None:
        def changed(self: NormalImages, output: str, runtime: RuntimeOptions) -> ListedShards:
            shards = check(self, output, runtime)
            change()
            return shards

        monkeypatch.setattr(NormalImages, "check", changed)

    given = options(tmp_path / "model", images)
    then(lambda: path.write_bytes(path.read_bytes()[::-1]))
    with pytest.raises(DataError, match=r"day 0/00.png has changed since it was listed; .* remove .*_listing and run"):
        train(given)
    then(path.unlink)
    with pytest.raises(DataError, match=r"camera/day 0/00.png could be read when it was listed, and now cannot: "):
        train(given)
    monkeypatch.setattr(NormalImages, "check", check)
    with pytest.raises(DataError, match="differing in: images"):
        train(given)


def test_tables_may_name_categories(images: Path, tmp_path: Path) -> None:
    good = [(f"camera/{name_of(n)}", ("odd", "even")[n % 2 == 0]) for n in range(COUNT) if name_of(n) not in BROKEN]
    table = tmp_path / "good.csv"
    table.write_text("file,kind\n" + "".join(f"{path},{kind}\n" for path, kind in good))
    listing = ListingOptions(column="file", category_column="kind")
    given = options(tmp_path / "models", table, listing=listing, per_category=True, few_shot=3, batch_size=8)
    results = train(given)
    assert [(result.categories, result.metrics["images"]) for result in results] == [(["even"], 3), (["odd"], 3)]
    counted = ListedShards.open(tmp_path / "models" / "_listing").manifest["counts"]
    assert [(entry["category"], entry["count"]) for entry in counted] == [("even", 10), ("odd", 12)]
    assert not any(result.fresh for result in train(given))
    with temporary_database() as database:
        named = NormalImages(database, [str(images)], ListingOptions(category="disc"), ImageLimits()).planned()
    assert named.categories == ["disc"]


def test_what_cannot_be_done_is_told_before_an_image_is_read(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ListingChecker, "run", None)
    output = tmp_path / "model"
    with pytest.raises(OptionError, match=r"cannot support a false-positive rate of 0\.001"):
        train(options(output, images, threshold=ThresholdOptions(target_fpr=0.001)))
    with pytest.raises(DataError, match=r"are both named camera/day 0/00.png; list each image once"):
        train(options(output, images, images))
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        train(options(output, tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"camera has no category lid; it has all"):
        train(options(output, images, categories=("lid",)))
    with pytest.raises(OptionError, match="lies within the input --images"):
        train(options(images / "model", images))
    assert not output.exists()


def test_options_that_do_not_go_together() -> None:
    bank, network = train_options()["patchcore"], train_options()["uniad"]
    with pytest.raises(OptionError, match="give either --shards, a shard set, or --images"):
        bank(output="o")
    with pytest.raises(OptionError, match="give either --shards, a shard set, or --images"):
        bank(shards="s", output="o", images=("i",))
    with pytest.raises(OptionError, match="--listing says how --images are listed"):
        bank(shards="s", output="o", listing=ListingOptions(category="a"))
    with pytest.raises(OptionError, match="--calibrate learns from shards"):
        bank(output="o", images=("i",), calibrate="cada")
    sentence = r"memory bank \(.*patchcore.*\); uniad goes over .* jobs/ingest.py and give these by --shards"
    with pytest.raises(OptionError, match=sentence):
        network(output="o", images=("i",))
