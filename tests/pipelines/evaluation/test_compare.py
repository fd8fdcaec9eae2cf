"""Comparison of evaluations: tables, ranks and published results, against values worked out by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy.stats import rankdata

from pipelines.evaluation.compare import compare
from pipelines.evaluation.comparison import Result, mean_ranks, metric_keys, ranks, results_of
from pipelines.evaluation.options import CompareOptions
from pipelines.evaluation.published import PUBLISHED, read_published
from tests.pipelines.conftest import UNTRACKED
from unianom.errors import DataError, OptionError

ONENIP = {
    "backbone": {"name": "tf_efficientnet_b4.aa_in1k", "weights": "pretrained"},
    "input": {"size": 224, "crop": None},
    "training": {"epochs": 1000, "batch_size": 64},
}


def model(method: str = "uniad", categories: tuple[str, ...] = ("a", "b"), **changes: Any) -> dict[str, Any]:
    entry = {
        "digest": "d" * 64,
        "method": method,
        "config": ONENIP,
        "categories": list(categories),
        "threshold": None,
        "provenance": {"training": {"images": 3629}, "held_out_normals": 0, "few_shot": None},
    }
    return entry | changes


def row(dataset: str, category: str, auroc: float, n: int = 10) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "category": category,
        "image_auroc": auroc,
        "image_ap": auroc / 2,
        "aupro": None,
        "n_images": n,
        "n_anomalous": 4,
    }


def evaluation(
    rows: list[dict[str, Any]], models: list[dict[str, Any]], union: float = 0.5, **more: Any
) -> dict[str, Any]:
    mean = {
        "image_auroc": sum(r["image_auroc"] for r in rows) / len(rows),
        "n_images": 10 * len(rows),
        "n_anomalous": 4,
    }
    counts = {"n_images": mean["n_images"], "n_anomalous": 4}
    return {
        "metrics": {"categories": rows, "mean": mean, "union": {"image_auroc": union, **counts}},
        "models": models,
        **more,
    }


def write(folder: Path, content: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(content))
    return str(folder)


def run(folder: Path, contents: dict[str, dict[str, Any]], **options: Any) -> tuple[dict[str, Any], Path]:
    uris = tuple(write(folder / name, content) for name, content in contents.items())
    output = folder / "out"
    return compare(CompareOptions(uris, str(output), tracking=UNTRACKED, **options)), output


def test_several_data_sets_are_told_apart_and_together() -> None:
    content = evaluation(
        [row("x", "a", 0.9), row("x", "b", 0.7), row("y", "c", 0.4)], [model(categories=("a", "b", "c"))]
    )
    lines = {(r.dataset, r.protocol): r for r in results_of("one", content, [])}
    assert set(lines) == {("x", "mean"), ("y", "mean"), ("all", "mean"), ("all", "union")}
    assert lines["x", "mean"].metrics["image_auroc"] == pytest.approx(0.8)
    assert lines["x", "mean"].metrics["n_images"] == 20
    assert lines["y", "mean"].metrics["image_auroc"] == 0.4
    assert lines["all", "union"].metrics["image_auroc"] == 0.5


def test_results_by_data_set_calibrated_ones_and_intervals_are_taken_where_they_are() -> None:
    rows = [row("x", "a", 0.9), row("x", "b", 0.7), row("y", "c", 0.4)]
    given = [{"dataset": "x", "mean": {"image_auroc": 0.8}, "union": {"image_auroc": 0.6}}]
    calibrated = {"metrics": evaluation(rows, [], union=0.95)["metrics"], "datasets": given}
    intervals = {"raw": {"mean": {"image_auroc": [0.6, 0.7]}, "categories": {"c": {"image_auroc": [0.3, 0.5]}}}}
    content = evaluation(rows, [model()], datasets=given, calibrated=calibrated, intervals=intervals)
    lines = {(r.dataset, r.protocol, r.scores): r for r in results_of("one", content, [])}
    assert lines["x", "union", "raw"].metrics["image_auroc"] == 0.6
    assert lines["all", "union", "calibrated"].metrics["image_auroc"] == 0.95
    assert lines["all", "mean", "raw"].intervals == {"image_auroc": [0.6, 0.7]}
    assert lines["y", "mean", "raw"].intervals == {"image_auroc": [0.3, 0.5]}
    assert lines["x", "mean", "raw"].intervals == {}


def lines_of(scores: dict[str, list[float]]) -> list[Any]:
    """Results of models on data sets of one category, x0, x1 …"""
    return [
        result
        for name, values in scores.items()
        for number, value in enumerate(values)
        for result in results_of(name, evaluation([row(f"x{number}", "a", value)], [model()]), [])
    ]


def test_ranks_agree_with_scipy_and_ties_share() -> None:
    scores = {"p": [0.9, 0.8, 0.1], "q": [0.9, 0.6, 0.3], "r": [0.2, 0.7, 0.2]}
    results = lines_of(scores)
    for number in range(3):
        group = [result for result in results if result.dataset == f"x{number}"]
        assert ranks(group, "image_auroc") == rankdata([-values[number] for values in scores.values()]).tolist()
    used, means = mean_ranks(results, "mean")
    assert used == ["x0", "x1", "x2"]
    assert means["p", "raw"]["image_auroc"] == pytest.approx((1.5 + 1 + 3) / 3)
    assert means["q", "raw"]["image_auroc"] == pytest.approx((1.5 + 3 + 1) / 3)
    assert "aupro" not in means["p", "raw"]


def test_mean_ranks_are_over_the_data_sets_that_all_models_have() -> None:
    used, means = mean_ranks(lines_of({"p": [0.9, 0.8], "q": [0.8]}), "mean")
    assert used == ["x0"]
    assert means["p", "raw"]["image_auroc"] == 1


def test_runs_on_other_images_are_not_ranked(tmp_path: Path) -> None:
    one = evaluation([row("x", "a", 0.9)], [model()])
    other = evaluation([row("x", "a", 0.8)], [model()])
    other["metrics"]["mean"]["n_images"] = 11
    content, _ = run(tmp_path, {"one": one, "other": other})
    assert "x: the evaluations are of different images, so they are not ranked" in content["notes"]
    assert content["tables"][0]["best"] == []


def mvtec(models: list[dict[str, Any]], auroc: float = 0.95) -> dict[str, Any]:
    return evaluation([row("mvtec", f"c{n}", auroc) for n in range(15)], models, union=0.9)


ALL_15 = tuple(f"c{n}" for n in range(15))


def nearest(content: dict[str, Any], protocol: str = "mean") -> dict[str, Any] | None:
    return next(r for r in results_of("n", content, read_published(str(PUBLISHED))) if r.protocol == protocol).published


def test_a_run_as_published_is_set_beside_the_published_value() -> None:
    found = nearest(mvtec([model("onenip", ALL_15)]))
    assert found is not None
    assert found["differences"] == []
    assert found["source"] == "OneNIP (Gao, ECCV 2024), Table 1"
    assert found["values"] == {"image_auroc": 97.9, "image_ap": 99.3, "pixel_auroc": 97.9, "pixel_ap": 63.7}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {**ONENIP, "input": {"size": 200}}}, "input.size 200 instead of"),
        ({"config": {**ONENIP, "training": {"epochs": 9, "batch_size": 64}}}, "training.epochs 9 instead of 1000"),
        ({"config": {**ONENIP, "backbone": {"name": "resnet18", "weights": "random"}}}, "backbone.name resnet18"),
        ({"provenance": {"training": {"images": 2903}, "held_out_normals": 726}}, "726 normal images held out"),
        ({"provenance": {"training": {"images": 15}, "few_shot": 1}}, "few-shot"),
    ],
)
def test_what_differs_from_the_published_run_is_said(changes: dict[str, Any], words: str) -> None:
    found = nearest(mvtec([model("onenip", ALL_15, **changes)]))
    assert found is not None
    assert words in "; ".join(found["differences"])


def test_the_published_entry_is_of_the_same_protocol() -> None:
    assert nearest(mvtec([model("onenip", ALL_15)]), "union") is None  # OneNIP published none
    absolute = nearest(mvtec([model("uniad", ALL_15)]), "union")
    assert absolute is not None
    assert absolute["values"]["image_auroc"] == 91.4
    each = [model("uninet", (name,)) for name in ALL_15]
    one_class = nearest(mvtec(each))
    assert one_class is not None
    assert one_class["values"]["image_auroc"] == 99.90
    assert nearest(mvtec(each), "union") is None
    mixed = mvtec([model("onenip", (*ALL_15, "elsewhere"))])
    assert nearest(mixed) is None  # learned from categories of another data set, too


def test_every_published_entry_is_whole_and_plausible() -> None:
    entries = read_published(str(PUBLISHED))
    assert len(entries) > 40
    for entry in entries:
        assert entry["protocol"] in ("one_class", "multi_class", "absolute_unified")
        assert entry["config"]["backbone.name"]
        assert all(20 < value <= 100 for value in entry["values"].values())
    keys = [
        (e["method"], e["dataset"], e["protocol"], e["calibrated"], str(e["trained_on"]), str(e["config"]))
        for e in entries
    ]
    assert len(set(keys)) == len(keys)


def test_all_forms_hold_the_same_figures(tmp_path: Path) -> None:
    contents = {"fine_run": mvtec([model("onenip", ALL_15)], 0.9812), "plain": mvtec([model("uniad", ALL_15)], 0.9)}
    content, output = run(tmp_path, contents)
    assert json.loads((output / "comparison.json").read_text()) == content
    lines = list(csv.DictReader((output / "comparison.csv").open()))
    best = next(line for line in lines if line["name"] == "fine_run" and line["protocol"] == "mean")
    assert float(best["image_auroc"]) == pytest.approx(0.9812)
    assert (best["image_auroc_rank"], best["image_auroc_published"]) == ("1.0", "0.979")
    assert "**98.1**" in (output / "comparison.md").read_text()
    tex = (output / "comparison.tex").read_text()
    assert r"\textbf{98.1}" in tex
    assert r"fine\_run" in tex
    section = json.loads((output / "section.json").read_text())
    assert [table["title"] for table in section["tables"]] == [table["title"] for table in content["tables"]]
    beside = next(table for table in content["tables"] if table["title"].startswith("published results of the same"))
    assert beside["rows"][0][:8] == ["fine_run", "mvtec", "mean", "raw", "I-AUROC", "98.1", "97.9", "+0.2"]
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    compare(CompareOptions(tuple(str(tmp_path / name) for name in contents), str(output), tracking=UNTRACKED))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="two evaluations are called run"):
        CompareOptions(("a/run", "b/run/"), "out")
    with pytest.raises(OptionError, match="1 entries for 2 evaluations"):
        CompareOptions(("a", "b"), "out", names=("x",))
    with pytest.raises(OptionError, match="evaluations is empty"):
        CompareOptions((), "out")
    with pytest.raises(DataError, match=r"give the folder jobs/evaluate\.py wrote"):
        compare(CompareOptions((str(tmp_path),), str(tmp_path / "out"), tracking=UNTRACKED))
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        compare(CompareOptions((str(tmp_path),), str(tmp_path / "out"), tracking=UNTRACKED))
    bad = tmp_path / "published.yaml"
    bad.write_text(yaml.safe_dump([{"method": "uniad", "colour": "red"}]))
    with pytest.raises(DataError, match="entry 1 lacks or does not know colour, dataset"):
        read_published(str(bad))


def test_published_data_sets_may_be_named_by_numbers(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "- {method: 1e3, dataset: 007, protocol: multi_class, source: x, trained_on: [007, no], values: {image_ap: 1}}"
    )
    (entry,) = read_published(str(tmp_path / "own.yaml"))
    assert (entry["method"], entry["dataset"], entry["trained_on"]) == ("1e3", "007", ["007", "no"])
    assert entry["values"] == {"image_ap": 1}
    (tmp_path / "own.yaml").write_text("- {method: [a], dataset: d, protocol: p, source: x, values: {}}")
    with pytest.raises(DataError, match="method of entry 1: expected text"):
        read_published(str(tmp_path / "own.yaml"))


def test_error_bounds_of_binned_metrics_are_not_compared() -> None:
    metrics = {"image_auroc": 0.9, "aupro": 0.5, "aupro_error": 1e-4, "pixel_auroc_error": 1e-5, "aupro_at_0.1": 0.2}
    result = Result("a", "m", "d", "mean", "raw", metrics, {}, None)
    assert metric_keys([result]) == ["image_auroc", "aupro", "aupro_at_0.1"]
