"""The report of scores without an evaluation."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.reporting.html import write_report
from pipelines.reporting.options import ReportOptions
from pipelines.runtime.options import TrackingOptions
from tests.pipelines.evaluated import Scored, model_entry, write_scored
from tests.pipelines.reporting.drawn import POLICY, drawn_samples
from tests.pipelines.reporting.page_parser import Page
from unianom.errors import DataError, OptionError


def unlabelled() -> list[Scored]:
    """All drawn samples, as if nobody had labelled them."""
    return [replace(sample, label=None, defect=None, mask=None) for sample in drawn_samples()]


def _report(folder: Path, samples: list[Scored], threshold: float | None, gallery: int = 2) -> Page:
    scores, shards = write_scored(folder, samples, [model_entry(POLICY, threshold)])
    options = ReportOptions(
        output=str(folder / "report.html"),
        gallery=gallery,
        scores=scores.uri,
        shards=shards.uri,
        tracking=TrackingOptions(enabled=False),
    )
    return Page(Path(write_report(options)).read_text())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return _report(tmp_path_factory.mktemp("unlabelled"), unlabelled(), 5.0)


def test_most_anomalous_images_come_first(page: Page):
    assert [figure.scores[0] for figure in page.block("Most anomalous")] == [99.0, 10.25, 10.0, 9.25, 9.0, 8.25]
    assert [figure.large for figure in page.block("Most anomalous")] == [True] * 4 + [False] * 2
    assert [figure.scores[0] for figure in page.block("Next to the threshold")] == [4.75]
    assert [figure.scores[0] for figure in page.block("Least anomalous")] == [1.0]
    assert all(figure.verdict == "flagged" for figure in page.block("Most anomalous"))


def test_first_screen_says_how_many_are_flagged_and_shows_the_threshold(page: Page):
    """Above 5 are 6 and 2·5.5 … 10.25 (12 defects), 6.5, 6.75 and 99: 15 of 38."""
    for words in (
        "patchcore on drawn",
        "15 of 38 images flagged (39.5 %).",
        "Threshold 5: at most 10 % of normal images fail, at 95 % confidence, from 60 held-out normal images.",
        "images (38)",
        "threshold 5",
        "1 of 39 samples without a score.",
    ):
        assert words in page.first_screen
    assert "missed" not in page.text
    assert "AUROC" not in page.text


def test_tables_hold_decisions_by_category_and_the_highest_scores(page: Page):
    flagged = [row[:3] for row in page.tables["flagged"][1:]]
    assert flagged == [["disc", "18", "8"], ["plain", "4", "0"], ["stripe", "16", "7"]]
    assert len(page.tables["ranking"]) == 1 + 38
    assert page.tables["ranking"][1][1:3] == ["disc", "99"]
    assert page.tables["rejected-samples"][1][2] == "corrupt"


def test_page_needs_nothing_beside_itself(page: Page):
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "data:image/").startswith("data:image/")


def test_without_a_threshold_or_pictures(tmp_path: Path):
    page = _report(tmp_path, unlabelled(), None, gallery=0)
    assert "38 images by score. No threshold, so nothing is flagged." in page.first_screen
    assert page.figures == []
    assert "images (38)" in page.first_screen


def test_labels_are_shown_where_there_are_some_and_the_job_that_uses_them_is_named(tmp_path: Path):
    page = _report(tmp_path, drawn_samples(), 5.0)
    assert any("jobs/evaluate.py" in notice for notice in page.notices)
    assert {"found", "flagged"} == {figure.verdict for figure in page.block("Most anomalous")}


def test_inputs_that_do_not_go_together_are_refused(tmp_path: Path):
    with pytest.raises(OptionError, match=r"--scores and --shards go together"):
        ReportOptions(scores="scores")
    with pytest.raises(OptionError, match=r"either --evaluation FOLDER, or .*; none of them is given"):
        write_report(ReportOptions())
    with pytest.raises(OptionError, match=r"several of them are given"):
        ReportOptions("evaluation", scores="scores", shards="shards")
    scores, _ = write_scored(tmp_path / "one", unlabelled(), [model_entry(POLICY, None)])
    _, other = write_scored(tmp_path / "other", unlabelled()[:5], [model_entry(POLICY, None)])
    with pytest.raises(DataError, match="was scored on other shards"):
        write_report(ReportOptions(output=str(tmp_path / "r.html"), scores=scores.uri, shards=other.uri))
    assert not re.search("html", " ".join(path.name for path in tmp_path.iterdir()))
