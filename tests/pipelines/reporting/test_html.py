"""The report of a small evaluation: every figure, picture and notice in it."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.reporting.curves import figures
from pipelines.reporting.evaluation_report import print_evaluation
from pipelines.reporting.gallery import choose, margins
from pipelines.reporting.html import SCORE_COLUMNS, write_report
from pipelines.reporting.metric_text import percent
from pipelines.reporting.options import ReportOptions
from pipelines.reporting.samples import labelled
from pipelines.runtime.options import TrackingOptions
from tests.pipelines.evaluated import MODEL, Scored, model_entry, write_evaluation
from unianom import files
from unianom.data.image import InputPolicy, prepare_image
from unianom.data.schema import SCORE_SCHEMA
from unianom.data.shards import MANIFEST, ScoreSet
from unianom.errors import DataError, OptionError
from unianom.metrics.pixel import pixel_metrics
from unianom.visual import HeatScale, draw_outline, overlay

POLICY = InputPolicy("stretch", 64, None)
THRESHOLD = 5.0
HOSTILE = 'disc/test/<script>alert("x")</script>&amp;.png'

untracked = partial(ReportOptions, tracking=TrackingOptions(enabled=False))

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Parses a page strictly: every element that is opened is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[dict[str, Any]] = []
        self.pictures: list[tuple[str | None, str | None]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._table = ""
        self._cell: list[str] | None = None
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append((tag, given))
        self.words.append(" ")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = given.get("id") or f"table {len(self.tables)}"
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "figure":
            self.figures.append({"scopes": (given["data-scopes"] or "").split(), "images": [], "text": ""})
        elif tag == "img":
            (self.figures[-1]["images"] if "figure" in self.open else self.pictures).append(
                (given["alt"], given["src"])
            )

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self._table][-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)
        if "figcaption" in self.open:
            self.figures[-1]["text"] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def row(self, table: str, name: str) -> list[str]:
        (found,) = [row[1:] for row in self.tables[table] if row[0] == name]
        return found

    def notices(self) -> list[str]:
        return re.findall(r"(?:Warning|Note)\. .*?(?= Warning\.| Note\.| image AUROC )", self.text)


def _disc(mask: np.ndarray, seed: int) -> np.ndarray:
    """A noisy image, bright where the mask is."""
    grey = np.random.default_rng(seed).integers(60, 120, mask.shape) + mask // 3
    return np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)


def _sample(category: str, number: int, label: int, score: float, maps: bool = True, **changes: Any) -> Scored:
    """A sample whose map is 1 on normal pixels and its score on masked ones, plus a ramp that differs by sample."""
    mask = np.zeros((64, 64), np.uint8)
    if label == 1:
        mask[20:30, 24:40] = 255
    anomaly_map = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    anomaly_map[mask > 0] = score
    defect = ("hole" if number % 2 else "scratch") if label else "good"
    sample = Scored(
        name=f"{category}/test/{defect}/{number:03d}.png",
        category=category,
        label=label,
        defect=defect,
        image=_disc(mask, number),
        score=score,
        mask=mask if label else None,
        anomaly_map=anomaly_map if maps else None,
    )
    return replace(sample, **changes)


def drawn_samples(maps: bool = True) -> list[Scored]:
    """Two categories with anomalies, one without, one rejected sample, one without a label, one with a bad name."""
    normal = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 6.5]
    anomalous = [3.25, 4.5, 5.5, 6.0, 7.0, 8.0, 9.0, 10.0]
    samples = []
    for offset, category in ((0.0, "disc"), (0.25, "stripe")):
        samples += [_sample(category, n, 0, score + offset, maps) for n, score in enumerate(normal)]
        samples += [_sample(category, 50 + n, 1, score + offset, maps) for n, score in enumerate(anomalous)]
    samples += [_sample("plain", n, 0, score, maps) for n, score in enumerate(normal[:4])]
    blank = np.zeros((64, 64, 3), np.uint8)
    samples.append(
        Scored(
            "disc/test/hole/broken.png", "disc", 1, "hole", blank, None, status="corrupt", error="cannot <decode> it"
        )
    )
    samples.append(replace(_sample("disc", 99, 0, 99.0, maps), label=None, defect=None))
    samples.append(_sample("disc", 77, 1, 2.0, maps, name=HOSTILE, mask=None))
    return samples


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
    assert not re.search(r"https?://|@import|url\(", text)
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
    samples = [_sample("polyp", number, 1, 3.0 + number) for number in range(3)]
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
    (notice,) = [notice for notice in page.notices() if "need normal ones" in notice]
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


def test_head_says_what_was_evaluated(evaluation: str, page: Page):
    digest = files.read_json(f"{evaluation}/evaluation.json")["shards"]["digest"]
    for words in (
        "patchcore on drawn",
        "37 (split test): 20 normal, 17 anomalous",
        "3: disc, plain, stripe",
        digest[:12],
        "wide_resnet50_2.tv_in1k, fp32",
        "stretched to 64 × 64, bilinear; masks nearest",
        "4,321 of 43,210 patches of 60 images (coreset ratio 0.1), flat index",
        "5: at most 10 % of normal images fail, at 95 % confidence, from 60 held-out normal images",
        "10.0 % of 20 normal images; set for ≤ 10 %",
        MODEL,
    ):
        assert words in page.text


def test_notices_name_what_limits_the_figures(page: Page):
    notices = page.notices()
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


def _scores(page: Page, verdict: str, scope: str) -> list[float]:
    found = [f for f in page.figures if scope in f["scopes"] and f["text"].strip().startswith(verdict)]
    return [float(re.search(r"score ([\d.]+)", f["text"])[1]) for f in found]


def test_worst_misses_and_false_alarms_come_first(page: Page):
    order = [figure["text"].split()[0] for figure in page.figures if "0" in figure["scopes"]]
    assert order[:4] == ["missed"] * 4
    assert order[4:8] == ["false"] * 2 + ["passed"] * 2
    assert set(order[8:]) == {"found"}
    assert _scores(page, "missed", "0") == [2.0, 3.25, 3.5, 4.5]
    assert _scores(page, "false alarm", "0") == [6.75, 6.5]
    assert _scores(page, "passed", "0") == [4.25, 4.0]


def test_a_tab_shows_the_worst_of_its_category(page: Page):
    buttons = [attributes["data-tab"] for tag, attributes in page.elements if tag == "button"]
    assert buttons == ["0", "1", "2", "3"]  # all, disc, plain, stripe
    assert _scores(page, "missed", "1") == [2.0, 3.25, 4.5]  # two by right, one more since it is in the overall four
    assert _scores(page, "passed", "2") == [2.5, 2.0]
    assert _scores(page, "missed", "3") == [3.5, 4.75]


def test_typical_finds_are_one_of_each_defect_type(page: Page):
    found = [figure["text"] for figure in page.figures if figure["text"].strip().startswith("found")]
    kinds = [re.search(r"(disc|stripe) · anomalous · (\w+)", text).groups() for text in found]
    assert kinds == [("disc", "hole"), ("disc", "scratch"), ("stripe", "hole"), ("stripe", "scratch")]
    # found holes of "disc" (odd numbers) score 6, 8, 10: the median is next
    assert _scores(page, "found", "1")[0] == 8.0


def _picture(figure: dict[str, Any], caption: str) -> np.ndarray:
    (uri,) = [source for alt, source in figure["images"] if alt.startswith(f"{caption} of")]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def _scale(page: Page) -> HeatScale:
    low, high = re.search(r"anomaly value ≤ (\S+) ≥ (\S+)", page.text).groups()
    return HeatScale(float(low), float(high))


def test_one_value_has_one_colour_in_every_heat_map(page: Page):
    maps = {f["text"].split()[-1]: _picture(f, "anomaly map") for f in page.figures}
    assert len(maps) > 10
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    seen = {picture[63, 40].tobytes() for picture in maps.values()}
    assert len(seen) == 1, "outside the defects all maps are the same"
    scale = _scale(page)
    assert 0.4 < scale.low < 0.6, "median of the normal ramp"
    assert 5 < scale.high <= 10.25, "what few pixels reach"
    by_score = {}
    for figure in page.figures:
        if "anomalous" in figure["text"] and "no mask" not in figure["text"]:
            by_score[_scores_of(figure)] = _picture(figure, "anomaly map")[25, 30].astype(int)
    for score, colour in by_score.items():
        assert np.abs(colour - scale.colours(np.array([[score]]))[0, 0]).max() <= 6  # the printed scale is rounded
    assert np.abs(seen.pop()[0] - scale.colours(ramp)[63, 40, 0]) <= 6


def _scores_of(figure: dict[str, Any]) -> float:
    return float(re.search(r"score ([\d.]+)", figure["text"])[1])


def test_pictures_are_what_the_model_saw_with_map_and_mask(page: Page):
    sample = drawn_samples()[8 + 5]
    (figure,) = [f for f in page.figures if sample.sample_id in f["text"]]
    image = prepare_image(sample.image, POLICY)
    mask = sample.mask > 0
    expected = draw_outline(overlay(image, sample.anomaly_map, _scale(page)), mask)
    assert np.abs(_picture(figure, "image").astype(int) - image).mean() < 6  # JPEG
    assert np.abs(_picture(figure, "overlay").astype(int) - expected).mean() < 8


def test_scores_without_maps_give_images_and_say_how_to_get_maps(tmp_path: Path):
    page = _report(tmp_path, drawn_samples(maps=False), [model_entry(POLICY, THRESHOLD)])
    assert (
        "The scores hold no anomaly maps, so only images are shown; jobs/score.py --maps true keeps them." in page.text
    )
    assert any("There are no pixel metrics" in notice for notice in page.notices())
    assert {alt.split(" of ")[0] for figure in page.figures for alt, _ in figure["images"]} == {"image", "mask"}
    assert page.tables["results"][1][1:5] == ["AUROC", "AP", "F1-max", "Acc."]
    assert len(page.tables["results"][1]) == 8


def test_single_category_with_random_weights_and_no_threshold(tmp_path: Path):
    model = model_entry(POLICY, None, categories=["disc"])
    model["config"]["backbone"]["weights"] = "random"
    model["provenance"]["notice"] = "no threshold: too few normal images"
    samples = [s for s in drawn_samples() if s.category == "disc" and s.status == "ok"]
    page = _report(tmp_path, samples, [model])
    notices = " ".join(page.notices())
    assert "The backbone's weights are random" in notices
    assert "There is no threshold" in notices
    assert "From fitting the model: no threshold: too few normal images." in notices
    assert [row[0] for row in page.tables["results"][2:]] == ["disc"], "mean and union would repeat it"
    assert "decisions" not in page.tables
    assert "button" not in {tag for tag, _ in page.elements}
    assert "script" not in {tag for tag, _ in page.elements}
    assert all(figure["text"].strip().startswith("disc") for figure in page.figures), "nothing is decided"


def test_rate_above_the_target_is_a_warning(tmp_path: Path):
    page = _report(tmp_path, drawn_samples(), [model_entry(POLICY, 2.2)], gallery=0)
    (warning,) = [notice for notice in page.notices() if "The threshold flags" in notice]
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


def test_margins_are_distances_from_the_threshold_in_deviations_of_normal_scores():
    rows = [
        {"model": "a", "label": 0, "score": 1.0},
        {"model": "a", "label": 0, "score": 3.0},
        {"model": "a", "label": 1, "score": 9.0},
        {"model": "b", "label": 0, "score": 10.0},
        {"model": "b", "label": 0, "score": 30.0},
        {"model": "b", "label": 1, "score": 90.0},
        {"model": "c", "label": 1, "score": 4.0},
        {"model": "c", "label": 1, "score": 4.0, "category": "stripe"},
    ]
    table = pa.table(
        {
            "model": pa.array([r["model"] for r in rows]).dictionary_encode(),
            "category": pa.array([r.get("category", "disc") for r in rows]).dictionary_encode(),
            "label": pa.array([r["label"] for r in rows], pa.int8()),
            "score": pa.array([r["score"] for r in rows], pa.float32()),
        }
    )
    models = [
        {"digest": "a", "threshold": {"value": 5.0}},
        {"digest": "b", "threshold": None},
        {"digest": "c", "threshold": {"value": 3.0}, "category_thresholds": {"stripe": {"value": 2.0}}},
    ]
    # a: deviation 1 around threshold 5; b: deviation 10 around the median 20; c: one score, no deviation
    assert margins(table, models).tolist() == [-4, -2, 4, -1, 1, 7, 1, 2]


def test_choice_does_not_depend_on_the_order_of_rows(evaluation: str):
    uri = files.read_json(f"{evaluation}/evaluation.json")["scores"]["uri"]
    table = ScoreSet.open(uri).table(columns=SCORE_COLUMNS)
    models = [model_entry(POLICY, THRESHOLD)]

    def chosen(rows: pa.Table) -> list[list[str]]:
        own = labelled(rows)
        choices = choose(own, margins(own, models), 3)
        ids = own["sample_id"].to_pylist()
        return [[ids[choice.row] for choice in group] for group in (choices.missed, choices.alarms, choices.typical)]

    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    assert chosen(table) == chosen(shuffled)


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
    assert any("Pixel metrics of the union are off by at most" in notice for notice in page.notices())
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
        _sample(category, number, label, score, False, name=f"{category}/{number}")
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
