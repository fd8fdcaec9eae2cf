"""Evaluation of drawn score sets: raw and calibrated, exact and binned, by one worker or several."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.metric_tables import mean_row
from pipelines.evaluation.options import BootstrapOptions, EvaluateOptions
from pipelines.reporting.evaluation_report import print_evaluation
from pipelines.reporting.headline import headline_rows
from pipelines.runtime.options import RuntimeOptions, TrackingOptions
from tests.pipelines.evaluated import Scored, model_entry, write_evaluation
from unianom import files
from unianom.data.image import InputPolicy, decode_map, encode_map
from unianom.data.shards import ScoreSet
from unianom.errors import DataError, OptionError
from unianom.metrics import image_metrics, pixel_metrics

SIDE = 32
POLICY = InputPolicy("stretch", SIDE, None)
LEVELS = {"disc": (0.0, 1.0), "stripe": (40.0, 8.0), "plain": (-3.0, 0.5)}
"""Offset and scale of the scores of each category: calibration takes them away."""
NAMES = [("first", "disc"), ("first", "plain"), ("second", "stripe")]


def _samples(calibrated: bool = True, per_label: int = 8, maps: bool = True) -> list[Scored]:
    """Three categories of two data sets that differ in the level of their scores."""
    rng = np.random.default_rng(0)
    samples = []
    for dataset, category in NAMES:
        offset, scale = LEVELS[category]
        for number in range(2 * per_label):
            label = number % 2
            mask = np.zeros((SIDE, SIDE), np.uint8)
            if label:
                mask[4 + number % 7 : 14, 6:20] = 255
                mask[25:29, 3 : 6 + number % 5] = 255
            values = rng.gamma(2, 1, (SIDE, SIDE)) + 1.5 * label * (mask > 0)
            samples.append(
                Scored(
                    name=f"{category}/{number:03d}.png",
                    dataset=dataset,
                    category=category,
                    label=label,
                    defect="hole" if label else "good",
                    image=np.zeros((SIDE, SIDE, 3), np.uint8),
                    score=float(offset + scale * (rng.normal() + 1.2 * label)),
                    mask=mask if label else None,
                    anomaly_map=(offset + scale * values).astype(np.float32) if maps else None,
                    calibration=(offset, scale) if calibrated else None,
                )
            )
    return samples


def _write(folder: Path, samples: list[Scored], threshold: float | None = None, **options: Any) -> dict[str, Any]:
    uri = write_evaluation(folder, samples, [model_entry(POLICY, threshold)], parts=3, **options)
    content: dict[str, Any] = files.read_json(f"{uri}/evaluation.json")
    return content


FEW = BootstrapOptions(resamples=60)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _write(tmp_path_factory.mktemp("drawn"), _samples(), bootstrap=FEW)


def _stored_map(sample: Scored, calibrated: bool) -> np.ndarray:
    """The map as it comes back from its 16 bits."""
    assert sample.anomaly_map is not None
    values = decode_map(*encode_map(sample.anomaly_map))
    offset, scale = np.float32(sample.calibration[0]), np.float32(sample.calibration[1])  # type: ignore[index]
    return (values - offset) / scale if calibrated else values


def _expected(samples: list[Scored], calibrated: bool) -> dict[str, float]:
    """Metrics straight from the samples."""
    scores = [np.float32(s.score) for s in samples]
    if calibrated:
        scores = [np.float32((s.score - s.calibration[0]) / s.calibration[1]) for s in samples]  # type: ignore[index]
    masks = [np.zeros((SIDE, SIDE), bool) if s.mask is None else s.mask > 0 for s in samples]
    pixels = pixel_metrics([_stored_map(s, calibrated) for s in samples], masks)
    return {**image_metrics(scores, [s.label for s in samples]), **pixels.as_dict()}


@pytest.mark.parametrize("calibrated", [False, True])
def test_every_table_is_that_of_its_samples(content: dict[str, Any], calibrated: bool):
    samples = _samples()
    found = content["calibrated"] if calibrated else content
    assert [row["category"] for row in found["metrics"]["categories"]] == ["disc", "plain", "stripe"]
    by_category = {c: _expected([s for s in samples if s.category == c], calibrated) for _, c in NAMES}
    for row in found["metrics"]["categories"]:
        assert {k: v for k, v in row.items() if k not in ("dataset", "category")} == by_category[row["category"]]
    assert found["metrics"]["union"] == _expected(samples, calibrated)
    first, second = found["datasets"]
    assert (first["dataset"], second["dataset"]) == ("first", "second")
    assert first["union"] == _expected([s for s in samples if s.dataset == "first"], calibrated)
    assert first["mean"]["pixel_ap"] == pytest.approx(
        (by_category["disc"]["pixel_ap"] + by_category["plain"]["pixel_ap"]) / 2, abs=1e-12
    )
    assert second["union"] == by_category["stripe"]
    assert second["mean"]["image_auroc"] == by_category["stripe"]["image_auroc"]


def test_calibration_closes_the_gap_between_mean_and_union(content: dict[str, Any]):
    raw, calibrated = content["metrics"], content["calibrated"]["metrics"]
    assert raw["mean"]["image_auroc"] == pytest.approx(calibrated["mean"]["image_auroc"], abs=1e-3)
    for key in ("image_auroc", "pixel_auroc", "pixel_ap", "aupro"):
        assert raw["union"][key] < calibrated["union"][key] - 0.03


def test_intervals_hold_their_figures(content: dict[str, Any]):
    intervals = content["intervals"]
    assert (intervals["confidence"], intervals["resamples"]) == (0.95, 60)
    for kind, found in (("raw", content), ("calibrated", content["calibrated"])):
        own, metrics = intervals[kind], found["metrics"]
        rows = {row["category"]: (own["categories"][row["category"]], row) for row in metrics["categories"]}
        for bounds, row in (*rows.values(), (own["mean"], metrics["mean"]), (own["union"], metrics["union"])):
            assert set(bounds) == {"image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro"}
            for key, (low, high) in bounds.items():
                assert 0 <= low <= high <= 1
                assert low - 0.02 <= row[key] <= high + 0.02  # sixty resamples
        widths = [np.subtract(*own["categories"][name]["image_auroc"][::-1]) for name in rows]
        low, high = own["mean"]["image_auroc"]
        assert high - low < max(widths), "a mean of categories is surer than one of them"


def test_pixel_intervals_are_those_of_plain_resampling(tmp_path: Path):
    """Of one category, with the draws made again and the pixels of the drawn maps pooled."""
    samples = [s for s in _samples() if s.category == "disc"]
    found = _write(tmp_path, samples, bootstrap=BootstrapOptions(resamples=300, seed=5))["intervals"]["raw"]["union"]
    maps = {label: [s for s in samples if s.label == label] for label in (0, 1)}
    rng, values = np.random.default_rng(11), []
    for _ in range(150):
        drawn = [maps[label][i] for label in (0, 1) for i in rng.integers(0, 8, 8)]
        masks = [np.zeros((SIDE, SIDE), bool) if s.mask is None else s.mask > 0 for s in drawn]
        pixels = pixel_metrics([_stored_map(s, False) for s in drawn], masks)
        values.append([pixels.auroc, pixels.ap, pixels.aupro])
    plain = np.quantile(values, [0.025, 0.975], axis=0)
    spread = plain[1] - plain[0]
    for column, key in enumerate(("pixel_auroc", "pixel_ap", "aupro")):
        assert found[key] == pytest.approx(plain[:, column].tolist(), abs=0.25 * spread[column])


def test_binned_metrics_say_how_far_off_they_can_be(tmp_path: Path, content: dict[str, Any]):
    binned = _write(tmp_path, _samples(), bootstrap=FEW, exact_pixels=1000)
    assert (content["pixel_mode"], binned["pixel_mode"]) == ("exact", "binned")
    for kind in ("raw", "calibrated"):
        exact, found = ((c if kind == "raw" else c["calibrated"]) for c in (content, binned))
        pairs = list(zip(exact["metrics"]["categories"], found["metrics"]["categories"], strict=True))
        pairs.append((exact["metrics"]["union"], found["metrics"]["union"]))
        pairs += [(a["union"], b["union"]) for a, b in zip(exact["datasets"], found["datasets"], strict=True)]
        for one, other in pairs:
            assert other["image_auroc"] == one["image_auroc"]
            assert "dsc" not in other
            for key in ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_iou_max", "aupro"):
                assert 0 < other[f"{key}_error"] < 0.01
                assert abs(other[key] - one[key]) <= other[f"{key}_error"]
        for key, bounds in content["intervals"][kind]["union"].items():
            assert binned["intervals"][kind]["union"][key] == pytest.approx(bounds, abs=1e-3)
    assert any("pixel metrics come from bins" in note for note in binned["notes"])


def test_without_resamples_there_are_no_intervals(tmp_path: Path):
    assert _write(tmp_path, _samples(False), bootstrap=BootstrapOptions(resamples=0))["intervals"] is None


def test_uncalibrated_scores_are_evaluated_alone(tmp_path: Path):
    found = _write(tmp_path, _samples(False), bootstrap=FEW)
    assert found["calibrated"] is None
    assert found["intervals"]["calibrated"] is None
    assert found["notes"] == []


def test_a_mixture_of_calibrated_and_not_is_told(tmp_path: Path):
    samples = [replace(s, calibration=None) if s.category == "disc" else s for s in _samples()]
    found = _write(tmp_path, samples, bootstrap=FEW)
    assert found["calibrated"] is None
    assert "some have none" in found["notes"][0]


def test_scores_without_maps_have_image_metrics_and_their_intervals(tmp_path: Path):
    found = _write(tmp_path, _samples(maps=False), bootstrap=FEW)
    assert found["pixel_mode"] is None
    assert set(found["intervals"]["calibrated"]["mean"]) == {"image_auroc", "image_ap"}


def test_maps_of_flagged_images_alone_make_no_pixel_metrics(tmp_path: Path):
    """They would tell of the worst images only; what needs no map is as it is with all."""
    samples = [replace(s, anomaly_map=None if s.label == 0 else s.anomaly_map) for s in _samples()]
    found = _write(tmp_path / "flagged", samples, maps="flagged", bootstrap=FEW)
    assert found["pixel_mode"] is None
    assert "pixel_auroc" not in found["metrics"]["mean"]
    (note,) = found["notes"]
    assert note.startswith("only images that come to review or fail have an anomaly map")
    assert note.endswith("score with --maps all to have them")
    none = _write(tmp_path / "none", _samples(maps=False), bootstrap=FEW)
    assert (found["metrics"], found["intervals"]) == (none["metrics"], none["intervals"])


def test_a_category_of_normal_images_alone_has_no_interval(tmp_path: Path):
    samples = [s for s in _samples() if s.category != "plain" or s.label == 0]
    found = _write(tmp_path, samples, bootstrap=FEW)
    assert found["intervals"]["raw"]["categories"]["plain"] == {}
    rows = found["metrics"]["categories"]
    assert mean_row(rows)["image_auroc"] == pytest.approx((rows[0]["image_auroc"] + rows[2]["image_auroc"]) / 2)


def test_images_of_one_category_name_in_two_data_sets(tmp_path: Path):
    samples = [replace(s, category="disc", name=f"{s.category}{s.name}") for s in _samples()]
    found = _write(tmp_path, samples, bootstrap=FEW)
    (row,) = found["metrics"]["categories"]
    assert (row["dataset"], row["n_images"]) == ("first, second", 48)
    assert [entry["union"]["n_images"] for entry in found["datasets"]] == [32, 16]


def test_rates_follow_the_decisions(tmp_path: Path):
    threshold = _write(tmp_path, _samples(), threshold=1.0, bootstrap=FEW)["threshold"]
    samples = [s for s in _samples() if s.label == 0]
    assert threshold["union"]["false_positive_rate"] == np.mean([s.score > 1 for s in samples])  # type: ignore[operator]
    assert [row["category"] for row in threshold["categories"]] == ["disc", "plain", "stripe"]


def test_rates_are_those_of_the_thresholds_of_the_categories(tmp_path: Path):
    entry = model_entry(POLICY, 1.0)
    own = {**entry["threshold"], "value": 0.5, "target_fpr": 0.2, "promised": False}
    entry |= {"category_thresholds": {"stripe": own}, "normal_scores": {"stripe": [0.5]}}
    found = files.read_json(
        f"{write_evaluation(tmp_path, _samples(), [entry], parts=3, bootstrap=FEW)}/evaluation.json"
    )
    limits = {"disc": 1.0, "plain": 1.0, "stripe": 0.5}
    anomalous = [s for s in _samples() if s.label == 1]
    failed = {name: [s.score > limits[name] for s in anomalous if s.category == name] for name in limits}  # type: ignore[operator]
    rates = {row["category"]: row for row in found["threshold"]["categories"]}
    for name in ("disc", "stripe"):
        assert rates[name]["detection_rate"] == np.mean(failed[name])
        assert rates[name]["threshold"] == limits[name]
    assert [rates[name]["target_fpr"] for name in limits] == [0.1, 0.1, 0.2]
    assert [rates[name]["promised"] for name in limits] == [True, True, False]
    union = found["threshold"]["union"]
    assert union["detection_rate"] == np.mean([value for values in failed.values() for value in values])
    assert (union["threshold"], union["target_fpr"], union["promised"]) == (None, 0.2, False)
    assert "normal_scores" not in found["models"][0]


def test_rates_are_those_of_the_threshold_where_a_rule_decided(tmp_path: Path):
    samples = [replace(s, decision="pass") for s in _samples()]
    rule = {"kind": "raw"}
    uri = write_evaluation(tmp_path, samples, [model_entry(POLICY, 1.0, decision_rule=rule)], parts=3, bootstrap=FEW)
    found = files.read_json(f"{uri}/evaluation.json")
    for label, name in ((0, "false_positive_rate"), (1, "detection_rate")):
        above = [s.score > 1 for s in samples if s.label == label]  # type: ignore[operator]
        assert found["threshold"]["union"][name] == np.mean(above) > 0
    assert any("decides by a rule of jobs/decide.py" in note for note in found["notes"])


def _notes_of(folder: Path, samples: list[Scored], capsys: pytest.CaptureFixture[str]) -> list[str]:
    uri = write_evaluation(folder, samples, [model_entry(POLICY, 1.0)], parts=3)
    content = files.read_json(f"{uri}/evaluation.json")
    print_evaluation(content)
    told = capsys.readouterr().out
    assert all(f"note: {note}" in told for note in content["notes"])
    return content["notes"]


@pytest.mark.parametrize(("label", "have", "lack"), [(0, "normal", "anomalous"), (1, "anomalous", "normal")])
def test_images_of_one_kind_are_told(tmp_path: Path, label: int, have: str, lack: str, capsys: Any):
    samples = [s for s in _samples(False) if s.label == label]
    (note,) = _notes_of(tmp_path, samples, capsys)
    assert note.startswith(f"all {len(samples)} images that are labelled and scored are {have}: AUROC")
    assert f"need {lack} ones, too" in note


def test_categories_of_one_kind_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, other, *_ = sorted({s.category for s in _samples()})
    samples = [s for s in _samples(False) if s.category not in (one, other) or s.label == (s.category == other)]
    normal, anomalous = _notes_of(tmp_path, samples, capsys)
    assert normal.startswith(f"{one}: all images of this category are normal, so metrics that need both")
    assert anomalous.startswith(f"{other}: all images of this category are anomalous, so")


def test_maps_without_a_mask_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (note,) = _notes_of(tmp_path, [replace(s, mask=None) for s in _samples(False)], capsys)
    assert note == "no anomalous image has a mask that shows a defect, so there are no pixel metrics"


def test_what_is_printed(content: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    print_evaluation(content)
    told = capsys.readouterr().out
    for words in (
        "metrics of raw scores in %",
        "metrics of calibrated scores in %",
        "mean of first",
        "union of first",
        "raw, model-unified (mean of categories)",
        "calibrated, absolute-unified (union)",
        "95 % confidence intervals, 60 resamples",
        "no threshold in the model",
    ):
        assert words in told
    assert "mean of second" not in told, "it would repeat its only category"
    columns, rows = headline_rows(content)
    assert columns == ["I-AUROC", "I-AP", "P-AUROC", "P-AP", "AUPRO"]
    low, high = content["intervals"]["calibrated"]["union"]["pixel_ap"]
    shown = f"{100 * content['calibrated']['metrics']['union']['pixel_ap']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert rows[3][4] == shown


def test_options_that_do_not_fit_are_refused(tmp_path: Path):
    for wrong, match in (
        ({"resamples": -1}, "resamples=-1 must be at least 0"),
        ({"confidence": 1.0}, r"confidence=1\.0 must be in \(0, 1\)"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ):
        with pytest.raises(OptionError, match=match):
            BootstrapOptions(**wrong)
    with pytest.raises(OptionError, match="exact_pixels=-1"):
        EvaluateOptions("s", "d", "o", exact_pixels=-1)
    with pytest.raises(OptionError, match="needs every pixel"):
        _write(tmp_path, _samples(), exact_pixels=10, aupro_variant="legacy_global_200")
    with pytest.raises(DataError, match="a score and a label"):
        _write(tmp_path / "unlabelled", [replace(s, label=None) for s in _samples()])


def test_bytes_do_not_depend_on_the_number_of_workers(inline: None, tmp_path: Path):
    """Those of one, two and four workers are those of no worker at all."""
    expected = {}
    for pixels in (10**9, 0):
        _write(tmp_path, _samples(), bootstrap=FEW, exact_pixels=pixels)
        expected[pixels] = (tmp_path / "evaluation" / "evaluation.json").read_bytes()
    for workers, pixels in ((1, 10**9), (2, 10**9), (4, 10**9), (4, 0)):
        output = tmp_path / f"{pixels}_by_{workers}"
        options = EvaluateOptions(
            str(tmp_path / "scores"),
            str(tmp_path / "shards"),
            str(output),
            exact_pixels=pixels,
            bootstrap=FEW,
            runtime=RuntimeOptions(workers=workers),
            tracking=TrackingOptions(enabled=False),
        )
        evaluate(options)
        assert sorted(path.name for path in output.iterdir()) == ["_plan.json", "categories.csv", "evaluation.json"]
        assert (output / "evaluation.json").read_bytes() == expected[pixels]
    rows = list(csv.DictReader((tmp_path / f"{10**9}_by_1" / "categories.csv").read_text().splitlines()))
    assert [row["scores"] for row in rows] == ["raw"] * 9 + ["calibrated"] * 9
    assert [row["category"] for row in rows[:5]] == ["disc", "plain", "stripe", "mean", "union"]


def test_a_killed_run_continues_with_the_parts_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = _write(tmp_path, _samples(), bootstrap=FEW)
    read: list[str] = []

    def in_this_process(worker: type, arguments: dict[str, Any], tasks: list[dict[str, Any]], *_: Any) -> Any:
        for task in tasks:
            read.append(task["part"])
            yield worker(**arguments).run(task)

    def killed(worker: type, arguments: dict[str, Any], tasks: list[dict[str, Any]], *_: Any) -> Any:
        yield from in_this_process(worker, arguments, tasks[-1:])  # the last part first
        raise KeyboardInterrupt

    options = EvaluateOptions(
        str(tmp_path / "scores"),
        str(tmp_path / "shards"),
        str(tmp_path / "again"),
        bootstrap=FEW,
        tracking=TrackingOptions(enabled=False),
    )
    monkeypatch.setattr("pipelines.evaluation.pixel_counts.run_tasks", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options)
    assert not (tmp_path / "again" / "evaluation.json").exists()
    monkeypatch.setattr("pipelines.evaluation.pixel_counts.run_tasks", in_this_process)
    assert evaluate(options) == content
    parts = ScoreSet.open(tmp_path / "scores").parts
    assert read == [parts[-1], *parts[:-1]], "each once"
    assert not (tmp_path / "again" / "_work").exists()


@pytest.mark.parametrize("exact_pixels", [1000, 250_000_000])
def test_an_image_whose_mask_the_crop_cuts_away_counts_for_images_alone(tmp_path: Path, exact_pixels: int):
    samples = [s for s in _samples() if s.category == "disc"]
    away = [n for n, s in enumerate(samples) if s.label][:2]
    empty = np.zeros((SIDE, SIDE), np.uint8)
    cut = [replace(s, mask=empty) if n in away else s for n, s in enumerate(samples)]
    found = _write(tmp_path, cut, bootstrap=FEW, exact_pixels=exact_pixels)
    row = found["metrics"]["union"]
    assert (row["n_images"], row["n_anomalous"]) == (len(samples), len(samples) // 2)
    assert (row["n_maps"], row["n_anomalous_maps"]) == (len(samples) - 2, len(samples) // 2 - 2)
    expected = _expected([s for n, s in enumerate(samples) if n not in away], calibrated=False)
    assert row["pixel_auroc"] == pytest.approx(expected["pixel_auroc"], abs=1e-2 if exact_pixels == 1000 else 1e-12)
    (note,) = [note for note in found["notes"] if "left out of pixel metrics" in note]
    assert note.startswith(f"2 anomalous images, e.g. {min(samples[n].sample_id for n in away)}, ")
    whole = _write(tmp_path / "whole", samples, bootstrap=FEW, exact_pixels=exact_pixels)
    assert not any("left out of pixel metrics" in note for note in whole["notes"])
