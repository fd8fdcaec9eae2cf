"""The report of several evaluations of the same images."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.evaluation.options import BootstrapOptions
from pipelines.reporting.html import write_report
from pipelines.reporting.options import ReportOptions
from pipelines.runtime.options import TrackingOptions
from tests.pipelines.evaluated import Scored, model_entry, write_evaluation
from tests.pipelines.reporting.drawn import POLICY, THRESHOLD, drawn_samples
from tests.pipelines.reporting.page_parser import Page
from unianom import files
from unianom.errors import DataError, OptionError


def _second() -> list[Scored]:
    """The same images by a model that scores ten times as high, and the defect of 3.25 in "disc" not worth a miss."""
    samples = []
    for sample in drawn_samples():
        score = 20.0 if sample.category == "disc" and sample.score == 3.25 else sample.score
        own_map = None if sample.anomaly_map is None else 10 * sample.anomaly_map
        samples.append(replace(sample, score=None if score is None else 10 * score, anomaly_map=own_map))
    return samples


def _evaluate(folder: Path, samples: list[Scored], model: dict[str, Any]) -> str:
    return write_evaluation(folder, samples, [model], bootstrap=BootstrapOptions(resamples=0))


def _options(evaluations: list[str], output: Path, **changes: Any) -> ReportOptions:
    quiet = TrackingOptions(enabled=False)
    return ReportOptions(evaluations=tuple(evaluations), output=str(output), gallery=2, tracking=quiet, **changes)


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("two")
    first = _evaluate(folder / "first", drawn_samples(), model_entry(POLICY, THRESHOLD))
    other = model_entry(POLICY, 10 * THRESHOLD, method="uniformaly")
    return [first, _evaluate(folder / "second", _second(), other)]


@pytest.fixture(scope="module")
def page(evaluations: list[str], tmp_path_factory: pytest.TempPathFactory) -> Page:
    output = tmp_path_factory.mktemp("page") / "report.html"
    return Page(Path(write_report(_options(evaluations, output))).read_text())


def test_models_stand_side_by_side_on_the_first_screen(evaluations: list[str], page: Page):
    assert page.tables["models"][0][1:] == ["patchcore", "uniformaly"]
    assert page.row("models", "missed anomalous images") == ["5 of 17 (29.4 %)", "4 of 17 (23.5 %)"]
    assert page.row("models", "flagged normal images") == ["2 of 20 (10.0 %)"] * 2
    means = [files.read_json(f"{uri}/evaluation.json")["metrics"]["mean"] for uri in evaluations]
    assert page.row("models", "image AUROC") == [f"{100 * mean['image_auroc']:.1f} %" for mean in means]
    assert "Threshold 5: at most" in page.row("models", "threshold")[0]
    assert "Threshold 50: at most" in page.row("models", "threshold")[1]
    assert "patchcore and uniformaly on drawn" in page.first_screen
    assert page.tables["by-category"][1][1:3] == ["patchcore", "uniformaly"]


def test_the_best_of_each_row_is_marked_and_equals_are_not(page: Page):
    """AUROC, AP and AUPRO rise with the figure, what is missed falls; "flagged" is the same for both."""
    marked = {name: [cell for cell, best in zip(*cells, strict=True) if best] for name, cells in page.best("models")}
    assert marked["missed anomalous images"] == ["4 of 17 (23.5 %)"]
    assert marked["flagged normal images"] == []
    shares = [float(cell.split()[0]) for cell in page.row("models", "image AUROC")]
    assert marked["image AUROC"] == [f"{max(shares):.1f} %"]


def test_every_sample_has_the_heat_maps_of_all_models_beside_each_other(page: Page):
    assert page.figures
    for figure in page.figures:
        heat = [alt for alt, _ in figure.images if alt.startswith("heat map")]
        assert heat == [f"heat map of {name} over {figure.sample}" for name in ("patchcore", "uniformaly")]
        assert re.search(r"patchcore .*score .*uniformaly .*score", figure.text)


def test_each_model_has_its_own_scale_so_that_the_same_maps_look_alike(page: Page):
    scales = re.findall(r"≤ (\S+) ≥ (\S+) \(mark: threshold (\S+)\)", page.first_screen)
    (low, high, mark), (low_10, high_10, mark_10) = ([float(value) for value in scale] for scale in scales)
    assert (low_10, mark_10) == pytest.approx((10 * low, 10 * mark), rel=1e-3)
    assert high < high_10
    figure = next(one for one in page.figures if one.large and one.block == "stripe")
    first, second = figure.pixels("heat map of patchcore"), figure.pixels("heat map of uniformaly")
    assert np.abs(first.astype(int) - second).mean() < 12


def test_a_defect_that_both_miss_comes_before_one_that_one_misses(page: Page):
    missed = [figure for figure in page.block("disc") if figure.large]
    assert missed[0].scores == [2.0, 20.0]
    assert missed[0].text.count("missed") == 2


def test_names_are_as_given_or_unique(evaluations: list[str], tmp_path: Path):
    same = _evaluate(tmp_path / "third", _second(), model_entry(POLICY, 10 * THRESHOLD))
    pair = [evaluations[0], same]
    page = Page(Path(write_report(_options(pair, tmp_path / "a.html"))).read_text())
    assert page.tables["models"][0][1:] == ["patchcore 1", "patchcore 2"]  # both folders are called "evaluation"
    page = Page(Path(write_report(_options(pair, tmp_path / "b.html", names=("old", "new")))).read_text())
    assert page.tables["models"][0][1:] == ["old", "new"]


def test_evaluations_of_other_images_are_refused(evaluations: list[str], tmp_path: Path):
    other = _evaluate(tmp_path / "other", drawn_samples()[:20], model_entry(POLICY, THRESHOLD))
    with pytest.raises(DataError, match=r"is of other shards .* a report compares models on the same images"):
        write_report(_options([evaluations[0], other], tmp_path / "report.html"))
    with pytest.raises(OptionError, match="must be 2 different names"):
        _options(evaluations, tmp_path / "report.html", names=("one",))
    with pytest.raises(OptionError, match="given twice"):
        _options([evaluations[0]] * 2, tmp_path / "report.html")
    with pytest.raises(OptionError, match="lies within the input --evaluations"):
        write_report(_options(evaluations, Path(evaluations[1]) / "report.html"))
