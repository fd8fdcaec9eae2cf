"""Banks on images embedded once: the scores of the ordinary path, and tables that say what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.data.cache_writer import CacheWriter
from pipelines.evaluation.bank_protocol import spread
from pipelines.evaluation.low_shot import low_shot
from pipelines.evaluation.low_shot_draws import plan_draws, summarise
from pipelines.evaluation.options import ClusterOptions, LowShotOptions, SemanticOptions, protocol_options
from pipelines.evaluation.semantic import semantic
from pipelines.evaluation.semantic_tasks import choose_tasks
from pipelines.inference.options import ScoreOptions
from pipelines.inference.score import score
from pipelines.reporting.low_shot_report import print_low_shot
from pipelines.reporting.semantic_report import print_semantic
from pipelines.runtime.cli import parse
from pipelines.runtime.options import RuntimeOptions
from pipelines.training.memory_bank import fit_banks
from pipelines.training.options import FitOptions, ThresholdOptions
from tests.data.test_shards import write_set
from tests.pipelines.conftest import UNTRACKED, tiny_method
from tests.pipelines.sharded import masked, picture, sample, samples
from unianom import files
from unianom.configs.bank import BankConfig
from unianom.configs.uniad import UniADConfig
from unianom.data.layouts.class_lists import CIFAR_10, CIFAR_100, SPECIES_60, SPECIES_60_SPLITS
from unianom.data.shards import ScoreSet, ShardSet, write_rejected
from unianom.errors import DataError, OptionError
from unianom.metrics.image import image_metrics

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes" / "protocols"

SEMANTIC, LOW_SHOT = protocol_options(SemanticOptions), protocol_options(LowShotOptions)


def whole_set(folder: Path, parts: list[list[dict[str, Any]]]) -> str:
    """A shard set with all that scoring looks at."""
    uri = write_set(folder, parts, summary={"masks": {"missing": {"count": 0}}})
    write_rejected(uri, [])
    return uri


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Bolts with 6 normal images to learn from and nuts with 3; masks on all anomalous ones but one."""
    parts = [
        samples("bolt", "train", 4) + samples("bolt", "test", 3) + samples("nut", "test", 2),
        samples("nut", "train", 3) + masked("bolt", "test", 3) + masked("nut", "test", 2, first=5),
        samples("bolt", "train", 2, first=4)
        + samples("nut", "test", 2, first=2)
        + samples("bolt", "test", 1, label=1, first=9),
    ]
    return whole_set(tmp_path_factory.mktemp("low") / "shards", parts)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One data set of three classes without labels."""
    parts = []
    for number in range(2):
        rows = []
        for place, name in enumerate(("bee", "cat", "dog")):
            for split, count in (("train", 3), ("test", 2)):
                for image in range(count):
                    row = sample(
                        "pets", split, 100 * place + 10 * number + image, None, picture([place, number, image])
                    )
                    rows.append({**row, "defect": name})
        parts.append(rows)
    return whole_set(tmp_path_factory.mktemp("semantic") / "shards", parts)


def draws_of(folder: Path) -> dict[tuple[int, int, str], float]:
    """Scores by shots, seed and sample."""
    tables = [pq.read_table(path).to_pylist() for path in sorted(folder.glob("scores-*.parquet"))]
    return {(row["shots"], row["seed"], row["sample_id"]): row["score"] for rows in tables for row in rows}


def low_shot_options(shards: str, output: Path, **changes: Any) -> Any:
    values = {"shots": (1, 3, 5), "draws": 2, "tracking": UNTRACKED, "method": tiny_method(), **changes}
    return LOW_SHOT["uniformaly"](shards=shards, output=str(output), **values)


def ordinary_scores(shards: str, folder: Path, shots: int, seed: int, batch_size: int, **changes: Any) -> Any:
    """What jobs/train.py and jobs/score.py give."""
    threshold = ThresholdOptions(validation_fraction=0)
    values = {"few_shot": shots, "seed": seed, "batch_size": batch_size, "threshold": threshold, **changes}
    fit_banks("uniformaly", tiny_method(), FitOptions(shards, str(folder / "model"), **values))
    categories = values.get("categories", ())
    options = ScoreOptions(
        str(folder / "model"), shards, output=str(folder / "scores"), categories=categories, batch_size=batch_size
    )
    score(options)
    return ScoreSet.open(folder / "scores").table(columns=["sample_id", "label", "score"]).to_pylist()


# ---- few normal images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_category", [True, False])
def test_scores_of_a_draw_are_those_of_a_fit_on_it(
    inline: None, shards: str, tmp_path: Path, per_category: bool
) -> None:
    """To the last bit with batches of one."""
    low_shot(low_shot_options(shards, tmp_path / "low", batch_size=1, per_category=per_category))
    found = draws_of(tmp_path / "low")
    for shots, seed in ((1, 0), (3, 1)) if per_category else ((3, 1),):
        for categories in [("bolt",), ("nut",)] if per_category else [("bolt", "nut")]:
            folder = tmp_path / f"{shots}{categories}"
            rows = ordinary_scores(shards, folder, shots, seed, 1, categories=categories)
            assert rows
            assert {row["sample_id"]: row["score"] for row in rows} == {
                row["sample_id"]: found[shots, seed, row["sample_id"]] for row in rows
            }


def test_scores_in_larger_batches_agree_up_to_rounding(inline: None, shards: str, tmp_path: Path) -> None:
    low_shot(low_shot_options(shards, tmp_path / "low", batch_size=4, shots=(3,), draws=1))
    found = draws_of(tmp_path / "low")
    for row in ordinary_scores(shards, tmp_path, 3, 0, 4, categories=("bolt",)):
        assert found[3, 0, row["sample_id"]] == pytest.approx(row["score"], rel=1e-4)


def test_results_do_not_depend_on_the_number_of_workers(inline: None, shards: str, tmp_path: Path) -> None:
    outputs = []
    for workers in (1, 2):
        output = tmp_path / str(workers) / "low"
        low_shot(low_shot_options(shards, output, shots=(1, 3), runtime=RuntimeOptions(workers=workers)))
        outputs.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert outputs[0] == outputs[1]
    assert files.exists(str(tmp_path / "1" / "embeddings"))


def test_metrics_and_what_was_left_out(inline: None, shards: str, tmp_path: Path, capsys: Any) -> None:
    result = low_shot(low_shot_options(shards, tmp_path / "low"))
    content = result.content
    assert content["skipped"] == [{"category": "nut", "shots": 5, "normal_images": 3}]
    assert [(row["category"], row["shots"]) for row in content["summary"]] == [
        *(("bolt", shots) for shots in (1, 3, 5)),
        *(("nut", shots) for shots in (1, 3)),
        *(("mean", shots) for shots in (1, 3, 5)),
    ]
    assert [row["categories"] for row in content["summary"] if row["category"] == "mean"] == [2, 2, 1]
    found = draws_of(tmp_path / "low")
    rows = pq.read_table(tmp_path / "low" / "scores-00000.parquet").to_pylist()
    expected = image_metrics([found[1, 0, row["sample_id"]] for row in rows], [row["label"] for row in rows])
    (first,) = (row for row in content["draws"] if (row["category"], row["shots"], row["seed"]) == ("bolt", 1, 0))
    assert first["image_auroc"] == expected["image_auroc"]
    assert 0 < first["pixel_auroc"] < 1
    assert first["images"] == 1
    print_low_shot(result.content, result.folder, result.fresh)
    printed = capsys.readouterr().out
    assert "nut has only 3 normal images, so it takes no part at 5 shots." in printed
    for name in ("low_shot.png", "draws.csv", "summary.csv", "section.json"):
        assert (tmp_path / "low" / name).stat().st_size > 100
    section = json.loads((tmp_path / "low" / "section.json").read_text())
    assert all(len(row) == len(table["columns"]) for table in section["tables"] for row in table["rows"])
    assert [row[3] for row in section["tables"][0]["rows"]][1:] == ["–", "–"]  # the mean is of both or not given


def test_a_cut_off_run_continues_and_a_third_changes_nothing(inline: None, shards: str, tmp_path: Path) -> None:
    output = tmp_path / "low"
    options = low_shot_options(shards, output)
    assert low_shot(options).fresh
    whole = {path.name: path.read_bytes() for path in output.iterdir()}
    for name in ("_manifest.json", "_scores-00001.json", "low_shot.json", "low_shot.png"):
        (output / name).unlink()
    (output / "scores-00001.parquet").write_bytes(b"half a file")
    assert low_shot(options).fresh
    assert {path.name: path.read_bytes() for path in output.iterdir()} == whole
    assert not low_shot(options).fresh
    assert {path.name: path.read_bytes() for path in output.iterdir()} == whole
    with pytest.raises(DataError, match="differing in: shots"):
        low_shot(low_shot_options(shards, output, shots=(2,)))


def test_another_bank_takes_no_network(
    inline: None, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low_shot(low_shot_options(shards, tmp_path / "low", shots=(1,), draws=1))

    def broken(*_: Any) -> None:
        raise AssertionError("the network ran again")

    monkeypatch.setattr(CacheWriter, "run", broken)
    other = tiny_method(bank=BankConfig(coreset_ratio=0.9))
    assert low_shot(low_shot_options(shards, tmp_path / "other", shots=(1,), draws=1, method=other)).fresh


def test_summary_is_mean_and_deviation_over_draws() -> None:
    values = {(0, "a"): 0.5, (1, "a"): 0.7, (0, "b"): 0.9, (1, "b"): 0.9}
    records = [
        {"shots": 2, "seed": seed, "metrics": [{"category": name, "image_auroc": value}]}
        for (seed, name), value in values.items()
    ]
    rows = {row["category"]: row["image_auroc"] for row in summarise(records)}
    assert rows["a"] == pytest.approx({"mean": 0.6, "sd": math.sqrt(0.02)})
    assert rows["b"] == pytest.approx({"mean": 0.9, "sd": 0})
    assert rows["mean"] == pytest.approx({"mean": 0.75, "sd": np.std([0.7, 0.8], ddof=1)})
    assert spread([0.5]) == {"mean": 0.5, "sd": None}
    assert spread([]) == {"mean": None, "sd": None}


def test_low_shot_errors(shards: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="shots"):
        low_shot_options(shards, tmp_path, shots=(1, 1))
    with pytest.raises(OptionError, match="draws=0"):
        low_shot_options(shards, tmp_path, draws=0)
    with pytest.raises(DataError, match="at most 6 normal training images"):
        plan_draws(ShardSet.open(shards), low_shot_options(shards, tmp_path, shots=(50,)))
    with pytest.raises(OptionError, match="batch_size 1"):
        low_shot(low_shot_options(shards, tmp_path / "low", method=tiny_method(preset="reference")))
    with pytest.raises(OptionError, match=r"uniad is trained.*jobs/train\.py with --few_shot"):
        LOW_SHOT["uniad"](shards=shards, output=str(tmp_path), method=UniADConfig())


# ---- semantic anomalies ---------------------------------------------------------------------------------------------


def test_one_vs_rest_is_a_fit_on_each_class(inline: None, classes: str, tmp_path: Path, capsys: Any) -> None:
    values: dict[str, Any] = {"batch_size": 1, "tracking": UNTRACKED, "method": tiny_method()}
    result = semantic(SEMANTIC["uniformaly"](shards=classes, output=str(tmp_path / "all"), **values))
    assert [row["task"] for row in result.content["tasks"]] == ["bee", "cat", "dog"]
    parts = [list(batches_of(classes, part)) for part in ShardSet.open(classes).parts]
    for number, name in ((0, "bee"), (2, "dog")):
        # the same task as an ordinary data set: training images of the class alone, all test images labelled
        labelled = [
            [
                {**row, "label": int(row["defect"] != name)}
                for row in rows
                if row["split"] == "test" or row["defect"] == name
            ]
            for rows in parts
        ]
        own = whole_set(tmp_path / name / "shards", labelled)
        rows = ordinary_scores(own, tmp_path / name, None, 0, 1)
        found = pq.read_table(tmp_path / "all" / f"scores-0000{number}.parquet").to_pylist()
        assert [(row["sample_id"], row["label"], row["score"]) for row in found] == [
            (row["sample_id"], row["label"], row["score"]) for row in rows
        ]
        expected = image_metrics([row["score"] for row in rows], [row["label"] for row in rows])
        task = result.content["tasks"][number]
        assert (task["image_auroc"], task["n_images"], task["n_anomalous"]) == (expected["image_auroc"], 12, 8)
    aurocs = [task["image_auroc"] for task in result.content["tasks"]]
    assert result.content["mean"]["image_auroc"] == pytest.approx(np.mean(aurocs))
    print_semantic(result.content, result.folder, result.fresh)
    assert "mean" in capsys.readouterr().out
    assert (tmp_path / "all" / "semantic.png").stat().st_size > 1000


def batches_of(shards: str, part: str) -> Iterator[dict[str, Any]]:
    for batch in ShardSet.open(shards).read(part):
        yield from batch.to_pylist()


def test_choices_of_several_classes(inline: None, classes: str, tmp_path: Path) -> None:
    chosen = {"furry": ["cat", 2], "small": ["bee"]}
    values: dict[str, Any] = {"tracking": UNTRACKED, "method": tiny_method(), "normal_classes": chosen}
    result = semantic(SEMANTIC["uniformaly"](shards=classes, output=str(tmp_path / "out"), **values))
    assert result.content["normal_classes"] == {"furry": ["cat", "dog"], "small": ["bee"]}
    assert [(row["images"], row["n_anomalous"]) for row in result.content["tasks"]] == [(12, 4), (6, 8)]


def options_of(tasks: str = "one_vs_rest", **changes: Any) -> Any:
    return SemanticOptions("shards", "output", tasks=tasks, **changes)


def test_published_choices() -> None:
    splits = choose_tasks(options_of("cifar10_splits"), sorted(CIFAR_10))
    assert splits["evens"] == ["airplane", "bird", "deer", "frog", "ship"]
    assert sorted([*splits["0-4"], *splits["5-9"]]) == sorted([*splits["evens"], *splits["odds"]]) == sorted(CIFAR_10)
    fine = sorted(name for names in CIFAR_100.values() for name in names)
    superclasses = choose_tasks(options_of("cifar100_superclasses"), fine)
    assert len(superclasses) == 20
    assert superclasses["trees"] == sorted(CIFAR_100["trees"])
    species = choose_tasks(options_of("species60_splits"), SPECIES_60)
    assert [len(names) for names in species.values()] == [30] * 5
    assert species["split_A"] == sorted(SPECIES_60[number] for number in SPECIES_60_SPLITS["split_A"])
    assert choose_tasks(options_of(), ["a", "b"]) == {"a": ["a"], "b": ["b"]}


def test_semantic_errors(shards: str, classes: str, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, where: str = classes, **changes: Any) -> None:
        values = {"tracking": UNTRACKED, "method": tiny_method(), **changes}
        with pytest.raises(error, match=match):
            semantic(SEMANTIC["uniformaly"](shards=where, output=str(tmp_path / "out"), **values))

    refused(DataError, "holds the categories bolt, nut", shards)
    labelled = write_set(tmp_path / "labelled", [samples("bolt", "train", 2) + samples("bolt", "test", 2)])
    refused(DataError, "all_classes true", labelled)
    refused(OptionError, "defined on 10 classes", tasks="cifar10_splits")
    refused(OptionError, "there is no class 'cow'; classes are bee, cat, dog", normal_classes={"farm": ["cow"]})
    refused(OptionError, "makes 3 of 3 classes normal", normal_classes={"all": [0, 1, 2]})
    with pytest.raises(OptionError, match=r"uniad is trained.*normal_classes and use jobs/train\.py"):
        SEMANTIC["uniad"](shards=classes, output=str(tmp_path), method=UniADConfig())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_config_of_its_protocol(recipe: Path) -> None:
    """The file's name begins with method and protocol."""
    method, name = recipe.stem.split("-")[:2]
    choices = {"semantic": SEMANTIC, "low_shot": LOW_SHOT}.get(name)
    first = [method] if choices else ["--model", "M"]
    options = parse(choices or ClusterOptions, [*first, "--config", str(recipe), "--shards", "S", "--output", "O"])
    plain = yaml.safe_load(recipe.read_text())
    for key in set(plain) - {"method"}:
        assert getattr(options, key) == (tuple(plain[key]) if isinstance(plain[key], list) else plain[key])
