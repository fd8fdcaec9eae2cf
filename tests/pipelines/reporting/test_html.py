"""The report of a small evaluation: every figure, picture and notice in it."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.reporting.curves import figures
from pipelines.reporting.evaluation_report import print_evaluation
from pipelines.reporting.html import write_report
from pipelines.reporting.inputs import SCORE_COLUMNS
from pipelines.reporting.metric_text import percent
from tests.pipelines.evaluated import MODEL, Scored, model_entry, write_evaluation
from tests.pipelines.reporting.drawn import HOSTILE, POLICY, THRESHOLD, drawn_sample, drawn_samples, untracked
from tests.pipelines.reporting.page_parser import Figure, Page
from unianom import files
from unianom.data.image import prepare_image
from unianom.data.schema import SCORE_SCHEMA
from unianom.data.shards import MANIFEST, ScoreSet
from unianom.errors import DataError, OptionError
from unianom.metrics.pixel import pixel_metrics
from unianom.visual import HeatScale, draw_outline, overlay


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> str:
    models = [model_entry(POLICY, THRESHOLD, categories=["disc", "plain", "stripe"])]
    return write_evaluation(tmp_path_factory.mktemp("drawn"), drawn_samples(), models)


@pytest.fixture(scope="module")
def text(evaluation: str) -> str:
    path = write_report(untracked(evaluation, f"{evaluation}.html", gallery=4))
    assert path == f"{evaluation}.html"
    return Path(path).read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def _report(folder: Path, samples: list[Scored], models: list[dict[str, Any]], gallery: int = 2) -> Page:
    uri = write_evaluation(folder, samples, models)
    return Page(Path(write_report(untracked(uri, str(folder / "report.html"), gallery))).read_text())


def test_page_needs_nothing_beside_itself(text: str, page: Page):
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert (value or "").startswith("data:image/"), f"<{tag} {name}={value}>"
    assert not re.search(r"https?://|@import|url\((?!data:image/)", text)
    assert "link" not in {tag for tag, _ in page.elements}


def test_every_category_the_mean_and_the_union_are_in_the_results(evaluation: str, page: Page):
    metrics = files.read_json(f"{evaluation}/evaluation.json")["metrics"]
    keys = ["image_auroc", "image_ap", "image_f1_max", "image_accuracy_at_f1_max"]
    keys += ["pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_iou_max", "dsc", "iou", "aupro"]
    names = ["AUROC", "AP", "F1-max", "Acc.", "AUROC", "AP", "F1-max", "IoU-max", "DSC", "IoU", "AUPRO"]
    assert page.tables["results"][1] == ["category", *names, "all", "anomalous", "with mask"]
    rows = {row["category"]: row for row in metrics["categories"]}
    assert set(rows) == {"disc", "plain", "stripe"}
    for name, row in {**rows, "mean": metrics["mean"], "union": metrics["union"]}.items():
        shown = page.row("results", name)[: len(keys)]
        assert shown == ["–" if row.get(k) is None else f"{100 * row[k]:.1f}" for k in keys]
    # by hand: of 8 × 8 pairs in "stripe", 6.75 beats anomalous 3.5, 4.75, 5.75, 6.25; 3.75 and 4.25 beat 3.5
    assert page.row("results", "stripe")[0] == f"{100 * (64 - 6) / 64:.1f}"
    assert page.row("results", "plain")[:4] == ["–"] * 4
    assert page.row("results", "disc")[-3:] == ["17", "9", "8"]
    assert page.row("results", "union")[-3:] == ["37", "17", "16"]


def test_soft_overlaps_are_shown_where_they_were_asked_for_even_without_normal_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As of polyps: every image shows one, so nothing can be told of images, but of pixels."""
    samples = [drawn_sample("polyp", number, 1, 3.0 + number) for number in range(3)]
    uri = write_evaluation(tmp_path, samples, [model_entry(POLICY, None)], soft_dice=True)
    content = files.read_json(f"{uri}/evaluation.json")
    (row,) = content["metrics"]["categories"]
    maps, masks = [s.anomaly_map for s in samples], [s.mask > 0 for s in samples if s.mask is not None]
    expected = pixel_metrics(maps, masks)
    assert row["image_auroc"] is None
    assert (row["soft_dice"], row["soft_iou"]) == pytest.approx((expected.soft_dice, expected.soft_iou), abs=1e-3)
    assert content["metrics"]["mean"]["soft_dice"] == content["metrics"]["union"]["soft_dice"] == row["soft_dice"]
    page = Page(Path(write_report(untracked(uri, str(tmp_path / "report.html")))).read_text())
    shown = dict(zip(page.tables["results"][1][1:], page.row("results", "polyp"), strict=True))
    assert shown["soft DSC"] == f"{100 * row['soft_dice']:.1f}"
    assert shown["soft IoU"] == f"{100 * row['soft_iou']:.1f}"
    (notice,) = [notice for notice in page.notices if "need normal ones" in notice]
    assert "scored are anomalous: AUROC, AP, F1 and accuracy of images need normal ones, too" in notice
    print_evaluation(content)
    told = capsys.readouterr().out
    assert "soft DSC" in told
    assert f"{100 * row['soft_dice']:.1f}" in told


def test_decisions_show_the_rates_met(page: Page):
    assert page.row("decisions", "disc") == ["5", "8", "12.5", "9", "66.7"]  # 6.5 of the normal, 6 of 9 anomalous
    assert page.row("decisions", "plain") == ["5", "4", "0.0", "0", "–"]
    assert page.row("decisions", "union") == ["5", "20", "10.0", "17", "70.6"]
    kinds = [row for row in page.tables["defects"] if row[0] == "disc"]
    assert kinds == [["disc", "hole", "5", "3", "60.0"], ["disc", "scratch", "4", "3", "75.0"]]


def test_first_screen_answers_whether_it_works(page: Page):
    for words in (
        "patchcore on drawn",
        "It finds 12 of 17 anomalous images and flags 2 of 20 normal ones.",
        "Threshold 5: at most 10 % of normal images fail, at 95 % confidence, from 60 held-out normal images.",
        "missed 5 of 17 29.4 % of the anomalous images",
        "flagged wrongly 2 of 20 10.0 % of the normal images",
        "disc missed 3 of 9 · flagged 1 of 8 normal images · image AUROC",
        "missed: 2 hole, 1 scratch",
        "plain flagged 0 of 4 normal images",
        "(mark: threshold 5)",
    ):
        assert words in page.first_screen
    assert page.first_screen.index("It finds") < page.first_screen.index("image AUROC") < 500


def test_details_say_what_was_evaluated(evaluation: str, page: Page):
    digest = files.read_json(f"{evaluation}/evaluation.json")["shards"]["digest"]
    for words in (
        "37 (split test): 20 normal, 17 anomalous",
        "3: disc, plain, stripe",
        digest[:12],
        "wide_resnet50_2.tv_in1k, fp32",
        "stretched to 64 × 64, bilinear; masks nearest",
        "4,321 of 43,210 patches of 60 images (coreset ratio 0.1), flat index",
        MODEL,
    ):
        assert words in page.text


def test_notices_name_what_limits_the_figures(page: Page):
    notices = page.notices
    assert [notice.split(".")[0] for notice in notices] == ["Warning", "Warning", "Note"]
    assert "1 of 39 samples without a score (1 corrupt)" in notices[0]
    assert "Identical images lie in more than one split (1 group of them)" in notices[1]
    assert "Plain: all images of this category are normal, so metrics that need both kinds are empty" in notices[2]
    assert "random" not in page.text
    assert ["drawn/disc/test/hole/broken.png", "disc", "corrupt", "cannot <decode> it"] in page.tables[
        "rejected-samples"
    ]


def test_hostile_names_are_text(text: str, page: Page):
    assert "<script>alert" not in text
    assert f"drawn/{HOSTILE}" in page.text
    assert sum(tag == "script" for tag, _ in page.elements) == 1, "only the page's own"


def _judged(figures: list[Figure]) -> list[tuple[str, float]]:
    return [(figure.verdict, figure.scores[0]) for figure in figures]


def test_worst_and_best_of_each_category_are_large_and_the_worst_category_comes_first(page: Page):
    """Wrong are 4 of 17 images of "disc", 3 of 16 of "stripe", none of "plain"."""
    blocks = [attributes["data-category"] for _, attributes in page.elements if "data-category" in attributes]
    assert blocks == ["disc", "stripe", "plain"]
    assert _judged(page.block("disc", large=True)) == [("missed", 2.0), ("false alarm", 6.5), ("found", 10.0)]
    assert _judged(page.block("stripe", large=True)) == [("missed", 3.5), ("false alarm", 6.75), ("found", 10.25)]
    assert _judged(page.block("plain", large=True)) == [("passed", 2.5)]
    roles = [re.sub("^(missed|false alarm|found) ", "", figure.text) for figure in page.block("disc", large=True)]
    starts = ("faintest defect", "highest normal", "clearest defect")
    assert all(role.startswith(start) for role, start in zip(roles, starts, strict=True))


def test_more_of_a_category_are_its_next_worst_and_typical_defects(page: Page):
    """Of the holes of "disc" that are left 6 and 8 are found, of its scratches 5.5, 7 and 9."""
    more = page.block("disc", large=False)
    assert _judged(more) == [("missed", 3.25), ("passed", 4.0), ("found", 6.0), ("found", 7.0)]
    assert ["hole" in figure.text for figure in more[2:]] == [True, False]
    assert "1 more judged wrongly are listed below; --gallery shows more" in page.first_screen


def test_everything_judged_wrongly_is_listed_furthest_first(page: Page):
    listed = [(row[0], float(row[3])) for row in page.tables["wrong"][1:]]
    missed = [2.0, 3.25, 3.5, 4.5, 4.75]
    assert listed == [*(("missed", score) for score in missed), ("false alarm", 6.75), ("false alarm", 6.5)]


def test_large_pictures_can_be_focused_and_all_pictures_have_words(page: Page):
    frames = [attributes for _, attributes in page.elements if "swap" in attributes.get("class", "").split()]
    assert len(frames) == sum(figure.large for figure in page.figures) > 0
    assert all(attributes["tabindex"] == "0" for attributes in frames)
    for figure in page.figures:
        assert [alt for alt, _ in figure.images][-1] == f"heat map over {figure.sample}"


def _scale(page: Page) -> HeatScale:
    low, high = re.search(r"anomaly value ≤ (\S+) ≥ (\S+)", page.text).groups()
    return HeatScale(float(low), float(high))


def test_one_value_has_one_colour_in_every_heat_map(page: Page):
    scale = _scale(page)
    assert 0.4 < scale.low < 0.6, "median of the normal ramp"
    assert 5 < scale.high <= 10.25, "what few pixels reach"
    samples = {sample.sample_id: sample for sample in drawn_samples()}
    assert len(page.figures) > 10
    for figure in page.figures:
        sample = samples[figure.sample]
        if sample.mask is not None:
            expected = overlay(sample.image, sample.anomaly_map, scale)[23:27, 28:36]  # within the outline
            assert np.abs(figure.pixels("heat map")[23:27, 28:36].mean((0, 1)) - expected.mean((0, 1))).max() < 8


def test_threshold_is_marked_on_the_scale_where_scores_are_maxima_of_maps(page: Page, tmp_path: Path):
    scale = _scale(page)
    (mark,) = [a["style"] for tag, a in page.elements if tag == "b" and a.get("style", "").startswith("left")]
    share = (THRESHOLD - scale.low) / (scale.high - scale.low)
    assert share == pytest.approx(0.5, abs=1e-3), "the brightest pixels reach further"
    assert float(re.search(r"left: ([\d.]+)%", mark)[1]) == pytest.approx(100 * share, abs=0.2)
    samples = [replace(s, score=None if s.score is None else 7 * s.score) for s in drawn_samples()]
    other = _report(tmp_path, samples, [model_entry(POLICY, 7 * THRESHOLD)])
    assert "mark: threshold" not in other.text


def test_pictures_show_the_image_the_map_and_the_outlined_mask(page: Page):
    sample = drawn_samples()[8 + 7]
    (figure,) = [figure for figure in page.figures if figure.sample == sample.sample_id]
    assert figure.large
    image = prepare_image(sample.image, POLICY)
    expected = draw_outline(overlay(image, sample.anomaly_map, _scale(page)), sample.mask > 0)
    assert np.abs(figure.pixels("plain").astype(int) - image).mean() < 8  # WebP
    assert np.abs(figure.pixels("heat map").astype(int) - expected).mean() < 10


def test_scores_without_maps_give_images_and_say_how_to_get_maps(tmp_path: Path):
    page = _report(tmp_path, drawn_samples(maps=False), [model_entry(POLICY, THRESHOLD)])
    assert (
        "The scores hold no anomaly maps, so only images are shown; jobs/score.py --maps all keeps them." in page.text
    )
    assert any("There are no pixel metrics" in notice for notice in page.notices)
    assert not any(alt.startswith("heat map") for figure in page.figures for alt, _ in figure.images)
    sample = drawn_samples(maps=False)[8 + 7]
    (figure,) = [figure for figure in page.figures if figure.sample == sample.sample_id]
    outlined = draw_outline(sample.image, sample.mask > 0)
    assert np.abs(figure.pixels("plain" if figure.large else "image").astype(int) - outlined).mean() < 10
    assert page.tables["results"][1][1:5] == ["AUROC", "AP", "F1-max", "Acc."]
    assert len(page.tables["results"][1]) == 8


def test_pictures_of_flagged_images_show_the_maps_that_are_there(tmp_path: Path):
    samples = [replace(s, anomaly_map=None if s.label == 0 else s.anomaly_map) for s in drawn_samples()]
    uri = write_evaluation(tmp_path, samples, [model_entry(POLICY, THRESHOLD)], maps="flagged")
    page = Page(Path(write_report(untracked(uri, str(tmp_path / "report.html"), 2))).read_text())
    assert any(
        "only images that come to review or fail have an anomaly map" in notice.lower() for notice in page.notices
    )
    assert not any("Pixel metrics are undefined" in notice for notice in page.notices)
    mapped = {s.sample_id: s.anomaly_map is not None for s in samples}
    shown = {
        f.sample: any(alt.startswith("heat map") for alt, _ in f.images) for f in page.figures if f.sample in mapped
    }
    assert set(shown.values()) == {True, False}
    assert all(mapped[sample] for sample, heat in shown.items() if heat)


def test_single_category_with_random_weights_and_no_threshold(tmp_path: Path):
    model = model_entry(POLICY, None, categories=["disc"])
    model["config"]["backbone"]["weights"] = "random"
    model["provenance"]["notice"] = "no threshold: too few normal images"
    samples = [s for s in drawn_samples() if s.category == "disc" and s.status == "ok"]
    page = _report(tmp_path, samples, [model])
    notices = " ".join(page.notices)
    assert "The backbone's weights are random" in notices
    assert "There is no threshold" in notices
    assert "From fitting the model: no threshold: too few normal images." in notices
    assert [row[0] for row in page.tables["results"][2:]] == ["disc"], "mean and union would repeat it"
    assert "decisions" not in page.tables
    assert "button" not in {tag for tag, _ in page.elements}
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.figures
    assert not any(figure.verdict for figure in page.figures), "nothing is decided"
    assert "No threshold, so nothing is decided" in page.first_screen


def test_thresholds_of_categories_have_scales_and_promises_of_their_own(tmp_path: Path):
    """An older threshold is held out and promised, as that for all is here; the others say what they are."""
    model = model_entry(POLICY, THRESHOLD, categories=["disc", "plain", "stripe"])
    own = {**model["threshold"], "value": 4.5, "n_normals": 31, "source": "leave_one_out"}
    poor = {**model["threshold"], "value": 6.0, "n_normals": 5, "promised": False}
    page = _report(tmp_path, drawn_samples(), [model | {"category_thresholds": {"disc": own, "stripe": poor}}])
    for words in (
        "Threshold of disc 4.5: at most 10 % of normal images fail, at 95 % confidence, from 31 normal images, each",
        "Threshold of stripe 6: no promise",
        "Threshold of plain 5: at most 10 % of normal images fail, at 95 % confidence, from 60 held-out normal images.",
    ):
        assert words in page.first_screen
    marks = re.findall(r"mark: threshold (\S+?)\)", page.first_screen)
    assert marks == ["4.5", "6"], "in each block its own; normal maps of plain say nothing of its scores"


def test_rate_above_the_target_is_a_warning(tmp_path: Path):
    page = _report(tmp_path, drawn_samples(), [model_entry(POLICY, 2.2)], gallery=0)
    (warning,) = [notice for notice in page.notices if "The threshold flags" in notice]
    assert "flags 60.0 % of the normal images; it was set for at most 10 %" in warning  # 12 of 20
    assert page.figures == []


def test_models_of_their_own_are_told_apart(tmp_path: Path):
    other = "77" * 32
    samples = [replace(s, model=other) if s.category == "stripe" else s for s in drawn_samples()]
    first, second = model_entry(POLICY, 5.0, categories=["disc", "plain"]), model_entry(POLICY, 8.0, digest=other)
    second["config"]["backbone"]["weights"] = "/weights/own.safetensors"
    page = _report(tmp_path, samples, [first, second])
    assert "weights differs between the models; see Models" in page.text
    assert "backbone wide_resnet50_2.tv_in1k, fp32" in page.text
    assert "/weights/own.safetensors" in page.text
    assert page.row("decisions", "stripe")[0] == "8"
    assert page.row("decisions", "union")[0] == "–"


def test_figures_are_pictures_of_every_scope(evaluation: str):
    content = files.read_json(f"{evaluation}/evaluation.json")
    table = ScoreSet.open(content["scores"]["uri"]).table(columns=[n for n in SCORE_SCHEMA.names if n != "anomaly_map"])
    pictures = figures(content, table)
    categories = [f"category_{name}.png" for name in ("disc", "plain", "stripe")]
    assert list(pictures) == ["union.png", *categories, "scores_by_category.png"]
    for picture in pictures.values():
        image = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
        assert (image[:3] == 255).all(), "on white"
        assert image.std() > 5


def test_calibrated_scores_stand_beside_raw_ones(tmp_path: Path):
    samples = [replace(s, calibration=(1.0, 2.0) if s.category == "disc" else (0.5, 4.0)) for s in drawn_samples()]
    samples = [replace(s, dataset="other") if s.category == "stripe" else s for s in samples]
    page = _report(tmp_path, samples, [model_entry(POLICY, THRESHOLD)], gallery=0)
    content = files.read_json(str(tmp_path / "evaluation" / "evaluation.json"))
    assert page.row("calibrated", "union")[0] == percent(content["calibrated"]["metrics"]["union"]["image_auroc"])
    assert page.tables["protocols"][0] == ["scores, protocol", "I-AUROC", "I-AP", "P-AUROC", "P-AP", "AUPRO"]
    low, high = content["intervals"]["raw"]["mean"]["image_ap"]
    shown = f"{percent(content['metrics']['mean']['image_ap'])} [{percent(low)}, {percent(high)}]"
    assert page.row("protocols", "raw, model-unified (mean of categories)")[1] == shown
    assert [row[:2] for row in page.tables["datasets"][1:]] == [
        [name, words]
        for name in ("drawn", "other")
        for words in ("raw, mean", "raw, union", "calibrated, mean", "calibrated, union")
    ]
    for words in ("Raw scores", "Calibrated scores", "95 % confidence interval, 1,000 resamples"):
        assert words in page.text


def test_binned_metrics_are_told(tmp_path: Path):
    uri = write_evaluation(tmp_path, drawn_samples(), [model_entry(POLICY, THRESHOLD)], exact_pixels=10)
    page = Page(Path(write_report(untracked(uri, str(tmp_path / "report.html"), gallery=0))).read_text())
    assert any("Pixel metrics of the union are off by at most" in notice for notice in page.notices)
    assert "AUPRO" in page.tables["results"][1]
    assert not any("error" in cell for cell in page.tables["results"][1])


def _section(folder: Path, **changes: Any) -> str:
    picture = io.BytesIO()
    Image.new("L", (4, 4)).save(picture, "PNG")
    files.write_bytes(str(folder / "one.png"), picture.getvalue())
    content = {
        "title": "Agreement <b>",
        "text": ["First.", "Second & last."],
        "tables": [{"title": "By type", "columns": ["type", "share"], "rows": [["hole", "0.5"]]}],
        "figures": [{"title": "A grid", "file": "one.png"}],
    }
    files.write_json(str(folder / "section.json"), {**content, **changes})
    return str(folder)


def test_sections_of_other_jobs_are_shown(evaluation: str, tmp_path: Path):
    folder = _section(tmp_path / "section")
    path = write_report(untracked(evaluation, str(tmp_path / "report.html"), gallery=0, sections=(folder,)))
    page = Page(Path(path).read_text())
    for words in ("Agreement <b>", "Second & last.", "By type", "A grid"):
        assert words in page.text
    assert ["hole", "0.5"] in [row for table in page.tables.values() for row in table]
    ((title, uri),) = page.pictures
    assert title == "A grid"
    assert base64.b64decode((uri or "").split(",")[1]) == (tmp_path / "section" / "one.png").read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tables": None}, "is no section"),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [["1", "2"]]}]}, "row of other length"),
        ({"figures": [{"title": "t", "file": "../one.png"}]}, "must lie beside"),
        ({"figures": [{"title": "t", "file": "none.png"}]}, "which section.json beside it names"),
        ({"figures": [{"title": "t", "file": "section.json"}]}, "is no PNG"),
    ],
)
def test_sections_that_are_none_are_refused(evaluation: str, tmp_path: Path, changes: dict[str, Any], words: str):
    folder = _section(tmp_path / "section", **changes)
    with pytest.raises(DataError, match=words):
        write_report(untracked(evaluation, str(tmp_path / "report.html"), sections=(folder,)))
    with pytest.raises(DataError, match=r"whose job wrote one"):
        write_report(untracked(evaluation, str(tmp_path / "report.html"), sections=(str(tmp_path / "none"),)))


def test_the_same_evaluation_gives_the_same_bytes(evaluation: str, text: str, tmp_path: Path):
    again = write_report(untracked(evaluation, str(tmp_path / "again.html"), gallery=4))
    assert Path(again).read_text() == text


def test_a_report_is_replaced_only_by_a_report_that_is_asked_for(evaluation: str, tmp_path: Path):
    path = tmp_path / "report.html"
    write_report(untracked(evaluation, str(path), gallery=0))
    before = path.stat().st_ino
    write_report(untracked(evaluation, str(path), gallery=0))
    assert path.stat().st_ino == before  # not even written again
    with pytest.raises(DataError, match=r"holds a report made of something else; .*--overwrite true"):
        write_report(untracked(evaluation, str(path), gallery=1))
    write_report(untracked(evaluation, str(path), gallery=1, overwrite=True))
    path.write_text("<html>mine</html>")
    with pytest.raises(DataError, match="is a file that is not a report"):
        write_report(untracked(evaluation, str(path), gallery=1, overwrite=True))
    assert path.read_text() == "<html>mine</html>"
    with pytest.raises(OptionError, match="lies within the input --evaluation"):
        write_report(untracked(evaluation, f"{evaluation}/report.html"))
    named = files.read_json(f"{evaluation}/evaluation.json")
    for name in ("scores", "shards"):
        folder = named[name]["uri"]
        with pytest.raises(OptionError, match=f"lies within the input --evaluation's {name} "):
            write_report(untracked(evaluation, f"{folder}/report.html"))
        assert not (Path(folder) / "report.html").exists()


def test_categories_called_as_the_tables_are_keep_their_own_curves(tmp_path: Path):
    """A category "union" has neither the curves nor the picture of the union of all."""
    samples = [
        drawn_sample(category, number, label, score, False, name=f"{category}/{number}")
        for category in ("union", "mean", "a/b", "a:b")
        for number, (label, score) in enumerate([(0, 0.1), (0, 0.2), (1, 0.15 if category == "union" else 0.9)])
    ]
    uri = write_evaluation(tmp_path, samples, [model_entry(POLICY, THRESHOLD)])
    content = files.read_json(f"{uri}/evaluation.json")
    rows = {row["category"]: row for row in content["metrics"]["categories"]}
    assert rows["union"]["image_auroc"] == 0.5
    assert content["metrics"]["union"]["image_auroc"] == pytest.approx((3 * 8 + 4) / 32)
    assert set(content["curves"]) == {"union", "category:union", "category:mean", "a/b", "a:b"}
    assert content["curves"]["union"]["roc"] != content["curves"]["category:union"]["roc"]
    table = ScoreSet.open(content["scores"]["uri"]).table(columns=list(SCORE_COLUMNS))
    pictures = figures(content, table)
    assert len([name for name in pictures if name.startswith("category_")]) == 4
    assert len(set(pictures.values())) == len(pictures)


def test_errors_say_what_to_do(evaluation: str, tmp_path: Path):
    with pytest.raises(OptionError, match=r"ends in \.html"):
        untracked(evaluation, "report")
    with pytest.raises(OptionError, match="gallery=-1"):
        untracked(evaluation, "report.html", gallery=-1)
    with pytest.raises(DataError, match=r"give the folder jobs/evaluate\.py wrote"):
        write_report(untracked(str(tmp_path), str(tmp_path / "report.html")))
    uri = write_evaluation(tmp_path, drawn_samples()[:2], [model_entry(POLICY, THRESHOLD)])
    manifest = tmp_path / "scores" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"cpu"', '"cuda"'))
    with pytest.raises(DataError, match=r"was changed after .* run jobs/evaluate\.py again"):
        write_report(untracked(uri, str(tmp_path / "report.html")))
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("value", "shown"), [(None, "–"), (0.98765, "98.8"), (1.0, "100.0"), (0.0, "0.0")])
def test_percent(value: float | None, shown: str):
    assert percent(value) == shown
