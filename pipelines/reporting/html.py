"""An evaluation → one HTML file to hand round, which needs nothing beside itself.

    evaluation.json ─▶ tables and curves ───────────────────────────┐
    scores, without maps ─▶ score histograms ───────────────────────┼─▶ report.html
                 └─▶ choice of samples ─▶ their images and maps ────┘

Only the images and maps that are shown are read, and those few maps that set the scale of all heat maps.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from pipelines.runtime import outputs
from pipelines.runtime.tracking import TrackingOptions, track
from unianom import __version__, files, visual
from unianom.data.image import (
    ImageLimits,
    InputPolicy,
    decode_image,
    decode_map,
    decode_mask,
    prepare_image,
    prepare_mask,
)
from unianom.data.schema import ANOMALOUS, NORMAL, SPLITS
from unianom.data.shards import PartSet, ScoreSet, ShardSet
from unianom.data.splits import hash_order
from unianom.errors import DataError, OptionError
from unianom.metrics.curves import Curve
from unianom.serialise import flatten, from_plain, to_plain

COLUMNS = (
    "sample_id",
    "category",
    "label",
    "defect",
    "score",
    "calibrated_score",
    "decision",
    "map_offset",
    "status",
    "model",
)
"""Columns of the scores that decide what is shown; `map_offset` tells which samples have a map."""

STORED = ("image", "mask", "height", "width")
"""Columns of the shards that a picture of a sample is made of."""

SHOWN_SIDE = 256
"""Pictures larger than this many pixels a side are reduced to it, to keep the file small."""

SCALE_MAPS = 64
"""How many maps of normal images, and as many of anomalous ones, set the scale of the heat maps."""

UNDEFINED = "–"


@dataclass(frozen=True)
class ReportOptions:
    """Write an evaluation as one HTML file: tables, curves, score histograms and a gallery of heat maps.

    Args:
        evaluation: folder that jobs/evaluate.py wrote; path or URI.
        output: the .html file to write; path or URI.
        sections: folders in which other jobs left a section for the report (section.json and its pictures); paths or
            URIs.
        gallery: pictures of the worst misses, and of the worst false alarms; half as many of each category, and a
            quarter as many typical ones of each defect type. 0 shows none.
        overwrite: replace another report in the output.
        tracking: where MLflow keeps a copy.
    """

    evaluation: str
    output: str
    gallery: int = 8
    sections: tuple[str, ...] = ()
    overwrite: bool = False
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def __post_init__(self) -> None:
        if not self.output.endswith(".html"):
            raise OptionError(f"output={self.output} must be a file name that ends in .html")
        if self.gallery < 0:
            raise OptionError(f"gallery={self.gallery} must be 0 or more")


def write_report(options: ReportOptions) -> str:
    """Write the report, or find it written; return its path or URI.

    Raises:
        DataError: no evaluation there, its scores or shards are gone or were changed since, a section is missing or
            not what it should be, or the output is anything but such a report.
    """
    path = files.join(options.evaluation, "evaluation.json")
    try:
        evaluation = files.read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"no {path}; give the folder jobs/evaluate.py wrote") from error
    scores, shards = ScoreSet.open(evaluation["scores"]["uri"]), ShardSet.open(evaluation["shards"]["uri"])
    for name, found in (("scores", scores), ("shards", shards)):
        if found.digest != evaluation[name]["digest"]:
            raise DataError(f"{found.uri} was changed after {path} was written; run jobs/evaluate.py again")
    table = labelled(scores.table(columns=COLUMNS))
    sections = [read_section(folder) for folder in options.sections]
    output = files.full_uri(options.output)
    digest = files.digest_of(
        {
            "tool": __version__,
            "evaluation": files.sha256_file(path),
            "sections": [files.sha256_of(repr(section).encode()) for section in sections],
            "gallery": options.gallery,
        }
    )
    inputs = {"evaluation": options.evaluation}
    for folder in options.sections:
        outputs.check_apart(output, {"sections": folder})
    with (
        outputs.open_file(output, "a report", digest, _made_by, inputs=inputs, overwrite=options.overwrite) as made,
        track(options.tracking, "report", output, to_plain(options)) as run,
    ):
        if not made:
            gallery = make_gallery(evaluation, table, scores, shards, options.gallery)
            page = render(evaluation, scores.manifest, shards.manifest, table, gallery, sections, digest)
            files.write_bytes(output, page.encode())
        run.artifacts({output.rsplit("/", 1)[-1]: files.read_bytes(output)})
    return output


def _made_by(page: bytes) -> str | None:
    """The digest of the plan that a report names in its head."""
    found = re.search(rb'<meta name="unianom-plan" content="([0-9a-f]{64})">', page[:4096])
    return None if found is None else found[1].decode()


@dataclass(frozen=True)
class Section:
    """What another job has to say in the report.

    Attributes:
        title: its heading.
        text: paragraphs.
        tables: title, columns and rows of each.
        figures: title and data URI of each.
    """

    title: str
    text: list[str]
    tables: list[tuple[str, list[str], list[list[str]]]]
    figures: list[tuple[str, str]]


def read_section(folder: str) -> Section:
    """Read `section.json` of a folder, and the PNG files it names.

    Raises:
        DataError: there is none, it has another form, or a picture is missing or no PNG.
    """
    path = files.join(folder, "section.json")
    try:
        content = files.read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"no {path}; give as a section a folder whose job wrote one") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; run the job that wrote it again") from error
    try:
        tables = [
            (str(t["title"]), list(map(str, t["columns"])), [list(map(str, row)) for row in t["rows"]])
            for t in content["tables"]
        ]
        names = [(str(figure["title"]), str(figure["file"])) for figure in content["figures"]]
        title, text = str(content["title"]), list(map(str, content["text"]))
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no section of a report ({type(error).__name__}: {error}); it needs title, text, tables and "
            f"figures"
        ) from error
    for name, columns, rows in tables:
        if any(len(row) != len(columns) for row in rows):
            raise DataError(f"table '{name}' of {path} has a row of other length than its {len(columns)} columns")
    return Section(title, text, tables, [(words, _section_picture(folder, file)) for words, file in names])


def _section_picture(folder: str, name: str) -> str:
    if not files.is_plain_name(name):
        raise DataError(f"section {folder} names the picture {name}; pictures must lie beside section.json")
    path = files.join(folder, name)
    try:
        content = files.read_bytes(path)
    except FileNotFoundError as error:
        raise DataError(f"no {path}, which section.json beside it names; run the job that wrote it again") from error
    if not content.startswith(b"\x89PNG"):
        raise DataError(f"{path} is no PNG; a section's pictures must be")
    return _data_uri("png", content)


def labelled(table: pa.Table) -> pa.Table:
    """The rows of a score table that an evaluation counts, scored and with a known label, by sample_id."""
    kept = table.filter(pc.and_(pc.equal(table["status"], "ok"), pc.is_valid(table["label"])))
    return kept.sort_by("sample_id")


def _texts(table: pa.Table, column: str) -> np.ndarray:
    """A text column as an (n,) array of str or None."""
    return np.asarray(table[column].cast(pa.string()).to_pylist(), dtype=object)


# -- curves and histograms ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scope:
    """What a set of curves and scores is about: a category, or all of them together.

    Attributes:
        name: its category, or "union".
        key: see `scope_key`.
        title: its name as shown.
        metrics: its row of the results.
        rates: what the threshold does to it, if there is one.
        normal, anomalous: scores of its images.
    """

    name: str
    key: str
    title: str
    metrics: Mapping[str, Any]
    rates: Mapping[str, Any] | None
    normal: np.ndarray
    anomalous: np.ndarray


def scope_key(category: str) -> str:
    """Return the name of a category where those of the mean and of the union of all stand, too.

    It is the category's own unless it could be taken for one of these, or for what is made of such a name here.
    """
    return f"category:{category}" if category in ("mean", "union") or category.startswith("category:") else category


def scopes(evaluation: Mapping[str, Any], table: pa.Table) -> list[Scope]:
    """All categories together, then each of them; of a single category just that."""
    metrics, threshold = evaluation["metrics"], evaluation["threshold"]
    names = [row["category"] for row in metrics["categories"]]
    rates = {row["category"]: row for row in threshold["categories"]} if threshold else {}
    category, label, score = _texts(table, "category"), table["label"].to_numpy(), table["score"].to_numpy()
    normal, anomalous = label == NORMAL, label == ANOMALOUS
    found = [
        Scope(
            name="union",
            key="union",
            title=names[0] if len(names) == 1 else "All categories",
            metrics=metrics["union"],
            rates=threshold["union"] if threshold else None,
            normal=score[normal],
            anomalous=score[anomalous],
        )
    ]
    for name, row in zip(names, metrics["categories"], strict=True):
        own = category == name
        if len(names) > 1:
            found.append(
                Scope(name, scope_key(name), name, row, rates.get(name), score[own & normal], score[own & anomalous])
            )
    return found


def figures(evaluation: Mapping[str, Any], scores_table: pa.Table) -> dict[str, bytes]:
    """Curves and score histograms as pictures, the same as in the report.

    Args:
        evaluation: content of evaluation.json.
        scores_table: the score set's columns sample_id, category, label, score, calibrated_score and status.

    Returns:
        PNG bytes by file name: "union.png" and, of several categories, "scores_by_category.png" and
        "category_<name>.png" each.
    """
    pictures = {}
    table = labelled(scores_table)
    for number, scope in enumerate(scopes(evaluation, table)):
        panels = _panels(evaluation, scope)
        figure, axes = visual.new_figure(len(panels), scope.title)
        for draw, ax in zip(panels, axes, strict=True):
            draw(ax)
        name = "union" if number == 0 else f"category_{files.safe_name(scope.name)}"
        pictures[f"{name}.png"] = visual.png(figure)
    rows = score_rows(evaluation, table)
    if rows is not None:
        pictures["scores_by_category.png"] = visual.png(rows)
    return pictures


def score_rows(evaluation: Mapping[str, Any], table: pa.Table) -> Figure | None:
    """Score histograms of every category on one axis, raw and, where there are any, calibrated; None of one category
    without calibrated scores, whose histogram is shown anyway."""
    names = [row["category"] for row in evaluation["metrics"]["categories"]]
    kinds = {"Raw scores": "score"}
    if evaluation.get("calibrated"):
        kinds["Calibrated scores"] = "calibrated_score"
    if len(names) == 1 and len(kinds) == 1:
        return None
    category, label = _texts(table, "category"), table["label"].to_numpy()
    columns = {}
    for title, column in kinds.items():
        scores = table[column].to_numpy()
        columns[title] = [
            (scores[(category == name) & (label == NORMAL)], scores[(category == name) & (label == ANOMALOUS)])
            for name in names
        ]
    union = evaluation["threshold"] and evaluation["threshold"]["union"]
    threshold = union["threshold"] if union else None
    return visual.score_rows(columns, names, [] if threshold is None else [threshold])


def _panels(evaluation: Mapping[str, Any], scope: Scope) -> list[Callable[[Axes], None]]:
    """What draws each figure of a scope: ROC, precision–recall, PRO where there is one, score histogram."""
    own = evaluation["curves"][scope.key]
    others = [c for key, c in evaluation["curves"].items() if key != "union"] if scope.key == "union" else []
    rates = scope.rates or {}

    def curves(**keys: tuple[str, str]) -> dict[str, Curve]:
        """Curves by their label, which carries the metric that sums the curve up."""
        return {
            f"{level} {percent(scope.metrics.get(metric))} %": _curve(own[key])
            for level, (key, metric) in keys.items()
            if key in own
        }

    def context(key: str) -> list[Curve]:
        return [_curve(other[key]) for other in others if key in other and len(others) > 1]

    point = None
    if rates.get("false_positive_rate") is not None and rates.get("detection_rate") is not None:
        point = (rates["false_positive_rate"], rates["detection_rate"])
    roc = curves(image=("roc", "image_auroc"), pixel=("pixel_roc", "pixel_auroc"))
    pr = curves(image=("pr", "image_ap"), pixel=("pixel_pr", "pixel_ap"))
    panels: list[Callable[[Axes], None]] = [
        partial(visual.draw_curves, kind="roc", curves=roc, context=context("roc"), point=point),
        partial(visual.draw_curves, kind="pr", curves=pr, context=context("pr")),
    ]
    if "pro" in own:
        pro = curves(AUPRO=("pro", _aupro_keys(scope.metrics)[0]))
        panels.append(partial(visual.draw_curves, kind="pro", curves=pro, context=context("pro")))
    histogram = partial(visual.draw_histogram, normal=scope.normal, anomalous=scope.anomalous)
    return [*panels, partial(histogram, threshold=rates.get("threshold"))]


def _curve(content: Mapping[str, Sequence[float]]) -> Curve:
    return Curve(np.asarray(content["x"], np.float64), np.asarray(content["y"], np.float64))


def _svg(draw: Callable[[Axes], None]) -> Markup:
    figure, (axes,) = visual.new_figure()
    draw(axes)
    return Markup(visual.svg(figure))  # matplotlib escapes the text it writes


# -- gallery -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A sample chosen for the gallery.

    Attributes:
        row: in the table of scores.
        overall: whether it is also shown with all categories together.
    """

    row: int
    overall: bool


@dataclass(frozen=True)
class Choices:
    """The samples of a gallery, in the order they are shown.

    Attributes:
        missed: anomalous, the lowest margins first.
        alarms: normal, the highest margins first.
        typical: anomalous and not among `missed`, those next to the median of their defect type.
    """

    missed: list[Choice]
    alarms: list[Choice]
    typical: list[Choice]


@dataclass(frozen=True)
class Card:
    """A sample of the gallery.

    Attributes:
        sample: its row of the table of scores.
        overall: whether it is also shown with all categories together.
        margin: see `margins`; one decimal, and no minus before a zero.
        verdict: what became of it: "missed", "found", "false alarm", "passed", "review", or "" without a decision.
        pictures: caption and data URI of each picture.
        has_mask: whether the outline of its mask is drawn.
    """

    sample: Mapping[str, Any]
    overall: bool
    margin: float
    verdict: str
    pictures: list[tuple[str, str]]
    has_mask: bool


@dataclass(frozen=True)
class Gallery:
    """Cards of `Choices`, and the scale of their heat maps; no scale if the scores hold no maps."""

    missed: list[Card]
    alarms: list[Card]
    typical: list[Card]
    scale: visual.HeatScale | None


def margins(table: pa.Table, models: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """How far each score lies above its model's threshold: (n,), in standard deviations of normal scores.

    The unit is the spread of the scores that the model gave to normal images (to all, if there are none), so that
    models whose raw scores differ can be compared. A model without a threshold is measured from the median of those
    scores instead.
    """
    thresholds = {model["digest"]: model["threshold"] for model in models}
    model, label, score = _texts(table, "model"), table["label"].to_numpy(), table["score"].to_numpy()
    found = np.zeros(len(score))
    for digest in sorted(set(model)):
        own = model == digest
        usual = score[own & (label == NORMAL)] if np.any(own & (label == NORMAL)) else score[own]
        threshold = thresholds[digest]
        start = np.median(usual) if threshold is None else threshold["value"]
        found[own] = (score[own] - start) / (usual.std() or 1.0)
    return found


def choose(table: pa.Table, margin: np.ndarray, count: int) -> Choices:
    """Choose the samples of a gallery.

    Args:
        table: scores, as `labelled` gives them.
        margin: (n,) of each, see `margins`.
        count: worst misses and worst false alarms overall; half as many (rounded up) of each category, and a quarter
            as many, at least one, of each defect type.
    """
    if count == 0:
        return Choices([], [], [])
    label, category, defect = table["label"].to_numpy(), _texts(table, "category"), _texts(table, "defect")
    rising = np.argsort(margin, kind="stable")
    falling = np.argsort(-margin, kind="stable")
    missed = _first(rising[label[rising] == ANOMALOUS], category, count)
    alarms = _first(falling[label[falling] == NORMAL], category, count)
    shown = {choice.row for choice in missed}
    failed = _texts(table, "decision") != "pass"
    kinds: dict[tuple[str, str], list[int]] = {}
    for row in rising:
        if label[row] == ANOMALOUS and failed[row] and row not in shown:
            kinds.setdefault((category[row], defect[row] or ""), []).append(int(row))
    typical = []
    for _, rows in sorted(kinds.items()):
        middle = np.median(margin[rows])
        rows.sort(key=lambda row: abs(margin[row] - middle))
        typical += [Choice(row, number == 0) for number, row in enumerate(rows[: max(1, count // 4)])]
    return Choices(missed, alarms, typical)


def _first(order: np.ndarray, category: np.ndarray, count: int) -> list[Choice]:
    """The first `count` of an order of rows, and the first of each category in it."""
    overall = set(order[:count].tolist())
    chosen = set(overall)
    for name in set(category[order]):
        chosen.update(order[category[order] == name][: (count + 1) // 2].tolist())
    return [Choice(row, row in overall) for row in order.tolist() if row in chosen]


def make_gallery(
    evaluation: Mapping[str, Any], table: pa.Table, scores: ScoreSet, shards: ShardSet, count: int
) -> Gallery:
    """Choose samples, read their images, masks and maps, and draw them."""
    margin = margins(table, evaluation["models"])
    choices = choose(table, margin, count)
    chosen = [*choices.missed, *choices.alarms, *choices.typical]
    samples = {choice.row: table.slice(choice.row, 1).to_pylist()[0] for choice in chosen}
    wanted = [sample["sample_id"] for sample in samples.values()]
    scaling = _scaling_samples(table) if chosen else {}
    maps = {
        row["sample_id"]: decode_map(row["anomaly_map"], row["map_offset"], row["map_scale"])
        for row in read_samples(scores, {*wanted, *scaling}, ("anomaly_map", "map_offset", "map_scale"))
        if row["anomaly_map"] is not None
    }
    scale = None
    if scaling:
        pixels = {
            label: [maps[i][::4, ::4].ravel() for i, own in scaling.items() if own == label]
            for label in (NORMAL, ANOMALOUS)
        }
        scale = visual.heat_scale(*(np.concatenate([*pixels[label], []]) for label in (NORMAL, ANOMALOUS)))
    policies = {m["digest"]: from_plain(InputPolicy, m["config"]["input"]) for m in evaluation["models"]}
    of_id = {sample["sample_id"]: sample for sample in samples.values()}
    drawn = {}
    for stored in read_samples(shards, set(wanted), STORED):
        sample_id = stored["sample_id"]
        drawn[sample_id] = _draw(stored, maps.get(sample_id), scale, policies[of_id[sample_id]["model"]])

    def cards(group: Iterable[Choice]) -> list[Card]:
        found = []
        for choice in group:
            sample = samples[choice.row]
            pictures, has_mask = drawn[sample["sample_id"]]
            found.append(
                Card(
                    sample,
                    choice.overall,
                    round(float(margin[choice.row]), 1) + 0.0,
                    verdict(sample),
                    pictures,
                    has_mask,
                )
            )
        return found

    return Gallery(cards(choices.missed), cards(choices.alarms), cards(choices.typical), scale)


def _scaling_samples(table: pa.Table) -> dict[str, int]:
    """sample_id and label of the samples whose maps set the scale: as good as drawn at random, the same every time."""
    with_map = table.filter(pc.is_valid(table["map_offset"]))
    found: dict[str, int] = {}
    for label in (NORMAL, ANOMALOUS):
        ids = with_map.filter(pc.equal(with_map["label"], label))["sample_id"].to_pylist()
        found |= dict.fromkeys(hash_order(ids, seed=0)[:SCALE_MAPS], label)
    return found


def read_samples(parts: PartSet, sample_ids: set[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """sample_id and further columns of some samples, in the order they are stored; parts without any are skipped."""
    wanted = pa.array(sorted(sample_ids), pa.string())
    for part in parts.parts:
        ids = (i for batch in parts.read(part, None, ["sample_id"], rows=4096) for i in batch["sample_id"].to_pylist())
        if sample_ids.isdisjoint(ids):
            continue
        for batch in parts.read(part, None, ["sample_id", *columns], rows=16):
            yield from batch.filter(pc.is_in(batch["sample_id"], wanted)).to_pylist()


def verdict(sample: Mapping[str, Any]) -> str:
    """What became of a sample, in one word."""
    if sample["decision"] in (None, "review"):
        return sample["decision"] or ""
    failed = sample["decision"] == "fail"
    if sample["label"] == ANOMALOUS:
        return "found" if failed else "missed"
    return "false alarm" if failed else "passed"


def as_seen(stored: Mapping[str, Any], policy: InputPolicy) -> tuple[np.ndarray, np.ndarray | None]:
    """A sample as the model saw it: S×S×3 uint8, and its mask, S×S bool, if it has one.

    Args:
        stored: its `STORED` columns.
        policy: of the model.
    """
    # it was within the limits of ingest and of scoring, so none apply here
    limits = ImageLimits(stored["height"] * stored["width"], max(len(stored["image"]), len(stored["mask"] or b"")))
    image = prepare_image(decode_image(stored["image"], limits).pixels, policy)
    if stored["mask"] is None:
        return image, None
    return image, prepare_mask(decode_mask(stored["mask"], limits=limits), policy)


def _draw(
    stored: Mapping[str, Any], anomaly_map: np.ndarray | None, scale: visual.HeatScale | None, policy: InputPolicy
) -> tuple[list[tuple[str, str]], bool]:
    """Pictures of a sample as the model saw it, and whether its mask is among them."""
    seen, marked = as_seen(stored, policy)
    image = _reduced(seen)
    mask = np.zeros(image.shape[:2], bool)
    if marked is not None:
        mask = _reduced(marked.astype(np.float32)) > 0
    pictures = [("image", _data_uri("jpeg", visual.jpeg(image)))]
    if anomaly_map is not None and scale is not None:
        shown = _reduced(anomaly_map)
        over = visual.draw_outline(visual.overlay(image, shown, scale), mask)
        pictures.append(("anomaly map", _data_uri("png", visual.heat_png(shown, scale))))
        pictures.append(("overlay", _data_uri("jpeg", visual.jpeg(over))))
    elif mask.any():
        pictures.append(("mask", _data_uri("jpeg", visual.jpeg(visual.draw_outline(image, mask)))))
    return pictures, bool(mask.any())


def _reduced(pixels: np.ndarray) -> np.ndarray:
    """S×S×3 uint8 or S×S float32, at most SHOWN_SIDE a side."""
    if len(pixels) <= SHOWN_SIDE:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BILINEAR))


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# -- words and tables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A column of the results table: its key in the evaluation, its heading, and what it says in a line."""

    key: str
    title: str
    meaning: str


IMAGE_METRICS = (
    Metric(
        "image_auroc",
        "AUROC",
        "how often an anomalous image scores higher than a normal one, over all such pairs; 50 % is guessing",
    ),
    Metric(
        "image_ap",
        "AP",
        "average precision: the share of true alarms among all alarms, averaged over the alarms that find each "
        "anomalous image; guessing gives the share of anomalous images",
    ),
    Metric(
        "image_f1_max",
        "F1-max",
        "harmonic mean of precision and recall at the threshold where it is highest; that threshold is chosen on "
        "these very labels, so this is an upper bound",
    ),
    Metric("image_accuracy_at_f1_max", "Acc.", "share of images judged rightly at the threshold of F1-max"),
)
PIXEL_METRICS = (
    Metric(
        "pixel_auroc",
        "AUROC",
        "as for images, over all pixels; high even for coarse maps, since most pixels are normal and easy",
    ),
    Metric("pixel_ap", "AP", "as for images, over all pixels; guessing gives the share of anomalous pixels"),
    Metric("pixel_f1_max", "F1-max", "as for images, over all pixels; the same as the best pooled Dice coefficient"),
    Metric(
        "pixel_iou_max",
        "IoU-max",
        "overlap of flagged and anomalous pixels over their union, at the threshold where it is highest",
    ),
    Metric(
        "dsc",
        "DSC",
        "Dice coefficient of each image, averaged, at the one threshold with the largest sum of precision and recall",
    ),
    Metric("iou", "IoU", "overlap over union of each image, averaged, at the threshold of DSC"),
    Metric(
        "soft_dice",
        "soft DSC",
        "Dice coefficient of each anomalous image with its map scaled to 0 to 1 in place of a threshold, averaged",
    ),
    Metric("soft_iou", "soft IoU", "overlap over union of the same maps, averaged"),
)
AUPRO_MEANING = (
    "mean share of each anomalous region that is covered, averaged over false-positive rates of pixels from 0 to 30 % "
    "(to another rate, or by a published approximation, where its name says so); small regions count as much as large"
)
OTHER_MEANINGS = (
    ("mean", "average over categories, each judged by itself; categories where the metric is undefined are left out"),
    ("union", "all categories in one pool: scores must also be comparable between categories"),
    ("false-positive rate", "share of normal images above the threshold"),
    ("detection rate", "share of anomalous images above the threshold"),
    (
        "σ",
        "distance of a score from the threshold (from the median of normal images, if there is none), in standard "
        "deviations of the scores of normal images",
    ),
)


def percent(value: float | None) -> str:
    """A share in percent with one decimal, or a dash where it is undefined."""
    return UNDEFINED if value is None else f"{100 * value:.1f}"


def render(
    evaluation: Mapping[str, Any],
    score_manifest: Mapping[str, Any],
    shard_manifest: Mapping[str, Any],
    table: pa.Table,
    gallery: Gallery,
    sections: Sequence[Section] = (),
    plan: str = "",
) -> str:
    """The report as HTML; its head names the digest of its plan."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.reporting", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = scopes(evaluation, table)
    rows = score_rows(evaluation, table)
    calibrated = evaluation.get("calibrated")
    return environment.get_template("report.html").render(
        title=_title(evaluation),
        plan=plan,
        facts=_facts(evaluation, score_manifest, table),
        notices=_notices(evaluation, shard_manifest, table),
        headline=_headline(evaluation),
        results=_results(evaluation["metrics"]),
        calibrated=None if calibrated is None else _results(calibrated["metrics"]),
        protocols=headline_rows(evaluation),
        intervals=evaluation.get("intervals"),
        datasets=_dataset_rows(evaluation),
        score_rows=None if rows is None else Markup(visual.svg(rows)),  # matplotlib escapes the text it writes
        sections=sections,
        threshold=evaluation["threshold"],
        decisions=_decisions(evaluation),
        defects=_defects(table),
        scopes=[{"title": scope.title, "panels": list(map(_svg, _panels(evaluation, scope)))} for scope in shown],
        gallery=_groups(gallery, [scope.name for scope in shown]),
        scale=gallery.scale,
        heat_gradient=", ".join("rgb({} {} {})".format(*colour) for colour in visual.HEAT_COLOURS[::15]),
        outline="rgb({} {} {})".format(*visual.OUTLINE),
        models=[_model_details(model) for model in evaluation["models"]],
        data=_data(evaluation, shard_manifest),
        counts=_counts(shard_manifest["counts"]),
        rejected=evaluation["rejected"],
        n_rejected=_unscored(evaluation["statuses"]),
        meanings=_meanings(evaluation["metrics"]),
        tool_version=evaluation["tool_version"],
    )


def _title(evaluation: Mapping[str, Any]) -> str:
    methods = sorted({model["method"] for model in evaluation["models"]})
    datasets = sorted({row["dataset"] for row in evaluation["metrics"]["categories"]} - {""})
    return f"{', '.join(methods)} on {', '.join(datasets)}"


def _facts(evaluation: Mapping[str, Any], score_manifest: Mapping[str, Any], table: pa.Table) -> list[tuple[str, str]]:
    """Name and value of what a reader must know before the figures."""
    label = table["label"].to_numpy()
    categories = [row["category"] for row in evaluation["metrics"]["categories"]]
    splits = "split " + ", ".join(score_manifest["splits"]) if score_manifest["splits"] else "all splits"
    normal, anomalous = np.sum(label == NORMAL), np.sum(label == ANOMALOUS)
    facts = [
        ("images", f"{len(label):,} ({splits}): {normal:,} normal, {anomalous:,} anomalous"),
        ("categories", f"{len(categories)}: {_listed(categories)}"),
        ("data", f"{evaluation['shards']['uri']} (manifest {evaluation['shards']['digest'][:12]})"),
    ]
    models = [_model_facts(model) for model in evaluation["models"]]
    if len(models) > 1:
        facts.append(("models", f"{len(models)}, each for its own categories"))
    for name in dict.fromkeys(name for model in models for name in model):
        values = {model.get(name) for model in models}
        facts.append((name, models[0][name] if len(values) == 1 else "differs between the models; see Models"))
    return facts


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _model_facts(model: Mapping[str, Any]) -> dict[str, str]:
    """What a model is, by name."""
    config, bank = model["config"], model["provenance"].get("bank")
    facts = {
        "method": model["method"] + (f", preset {config['preset']}" if "preset" in config else ""),
        "backbone": f"{config['backbone']['name']}, {config['backbone']['precision']}",
        "weights": config["backbone"]["weights"],
        "input": _input_words(from_plain(InputPolicy, config["input"])),
    }
    if bank is not None:
        ratio, index = config["bank"]["coreset_ratio"], config["bank"]["index"]
        facts["memory bank"] = (
            f"{bank['rows']:,} of {bank['patches']:,} patches of {bank['images']:,} images "
            f"(coreset ratio {ratio:g}), {index} index"
        )
    threshold = model["threshold"]
    facts["threshold"] = (
        "none"
        if threshold is None
        else (
            f"{threshold['value']:.4g}, from {threshold['n_normals']:,} held-out normal images: at most "
            f"{100 * threshold['target_fpr']:g} % false positives with {100 * threshold['confidence']:g} % confidence"
        )
    )
    return facts


def _input_words(policy: InputPolicy) -> str:
    if policy.resize == "stretch":
        words = f"stretched to {policy.size} × {policy.size}"
    else:
        words = f"shorter side {policy.size}, centre crop {policy.crop}"
    if policy.pad is not None:
        words += f", padded to {policy.pad}"
    return f"{words}, {policy.interpolation}; masks {policy.mask_resize}"


def _unscored(statuses: Mapping[str, int]) -> int:
    return sum(count for status, count in statuses.items() if status != "ok")


def _notices(
    evaluation: Mapping[str, Any], shard_manifest: Mapping[str, Any], table: pa.Table
) -> list[tuple[str, str]]:
    """What limits the figures: "warning" or "note", and a sentence."""
    warnings, notes = [], []
    models, statuses, threshold = evaluation["models"], evaluation["statuses"], evaluation["threshold"]
    if any(model["config"]["backbone"]["weights"] == "random" for model in models):
        warnings.append(
            "The backbone's weights are random: these figures show that the chain works, not how good the method is."
        )
    unscored = _unscored(statuses)
    if unscored:
        reasons = ", ".join(f"{count:,} {status}" for status, count in statuses.items() if status != "ok")
        warnings.append(
            f"{unscored:,} of {_number(sum(statuses.values()), 'sample')} without a score ({reasons}): counted in no "
            f"figure, listed under Rejected samples."
        )
    crossing, conflicting = (
        shard_manifest["summary"][f"duplicates_{kind}"]["groups"] for kind in ("across_splits", "with_other_label")
    )
    if crossing:
        warnings.append(
            f"Identical images lie in more than one split ({_number(crossing, 'group')} of them): some of what was "
            f"tested on may have been trained on."
        )
    if conflicting:
        warnings.append(
            f"Identical images have different labels ({_number(conflicting, 'group')} of them): some labels are wrong."
        )
    if threshold is None:
        notes.append("There is no threshold, so nothing is decided and no rate is given.")
    elif threshold["union"] is not None and _above_target(threshold["union"], threshold):
        warnings.append(
            f"The threshold flags {percent(threshold['union']['false_positive_rate'])} % of the normal images; it was "
            f"set for at most {100 * threshold['target_fpr']:g} %, on normal images that these may differ from."
        )
    notes += [f"From fitting the model: {text}." for text in _model_notices(models)]
    notes += _undefined(evaluation["metrics"]["categories"], table)
    notes += [text[0].upper() + text[1:] + "." for text in evaluation.get("notes", [])]
    if evaluation.get("pixel_mode") == "binned":
        notes.append(
            f"Pixel metrics of the union are off by at most {largest_error(evaluation):.2g} percentage points."
        )
    return [*(("warning", text) for text in warnings), *(("note", text) for text in notes)]


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _above_target(rates: Mapping[str, Any], threshold: Mapping[str, Any]) -> bool:
    """Whether more normal images are flagged than the threshold was set for."""
    return (rates["false_positive_rate"] or 0) > threshold["target_fpr"]


def _model_notices(models: Iterable[Mapping[str, Any]]) -> list[str]:
    """What fitting had to say, each once."""
    texts = [model["provenance"].get("notice") for model in models]
    return [text.rstrip(".") for text in dict.fromkeys(texts) if text]


def _undefined(rows: Sequence[Mapping[str, Any]], table: pa.Table) -> list[str]:
    """Which pixel metrics are undefined, where, and why; the evaluation's notes say it of categories of one kind."""
    sentences = []
    if table["map_offset"].null_count == len(table):
        sentences.append(
            "There are no pixel metrics: the scores hold no anomaly maps; jobs/score.py --maps true keeps them."
        )
        return sentences
    without = [r["category"] for r in rows if r.get("pixel_auroc") is None and 0 < r["n_anomalous"] < r["n_images"]]
    if without:
        sentences.append(f"Pixel metrics are undefined for {_listed(without)}: no anomalous image has a mask.")
    return sentences


def _headline(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The few figures that are looked for first: name, value with unit, what it is of."""
    metrics, threshold = evaluation["metrics"], evaluation["threshold"]
    several = len(metrics["categories"]) > 1
    chosen = [("image AUROC", "image_auroc"), ("pixel AUROC", "pixel_auroc")]
    tiles = []
    for name, key in [*chosen, *(("AUPRO", key) for key in _aupro_keys(metrics["mean"]))]:
        if metrics["mean"].get(key) is not None:
            union = f"mean of categories; union {percent(metrics['union'].get(key))} %"
            tiles.append((name, f"{percent(metrics['mean'][key])} %", union if several else ""))
    rates = threshold["union"] if threshold else None
    if rates is not None:
        promised = f"of {rates['n_normal']:,} normal images; set for ≤ {100 * threshold['target_fpr']:g} %"
        tiles.append(("false positives", f"{percent(rates['false_positive_rate'])} %", promised))
        tiles.append(
            ("detected", f"{percent(rates['detection_rate'])} %", f"of {rates['n_anomalous']:,} anomalous images")
        )
    return tiles


def _aupro_keys(metrics: Mapping[str, Any]) -> list[str]:
    """AUPRO's keys in a row of results: variants and limits other than the usual ones are part of the name."""
    return [key for key in metrics if key.startswith("aupro") and not key.endswith("_error")]


def largest_error(evaluation: Mapping[str, Any]) -> float:
    """The most that a pixel metric of the union can be off, raw or calibrated, in percentage points."""
    tables = [found["metrics"]["union"] for found in (evaluation, evaluation.get("calibrated")) if found is not None]
    return 100 * max((v for row in tables for k, v in row.items() if k.endswith("_error") and v is not None), default=0)


HEADLINE = {"image_auroc": "I-AUROC", "image_ap": "I-AP", "pixel_auroc": "P-AUROC", "pixel_ap": "P-AP"}
"""Metrics of the short table; AUPRO is added under the name of its variant."""


def aupro_names(row: Mapping[str, Any]) -> dict[str, str]:
    """AUPRO's keys in a row of results, and how they are shown."""
    return {key: key.replace("aupro", "AUPRO") for key in _aupro_keys(row)}


def headline_keys(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Keys of the metrics of the short table that are defined, and how they are shown."""
    mean = evaluation["metrics"]["mean"]
    return {key: name for key, name in (HEADLINE | aupro_names(mean)).items() if mean.get(key) is not None}


def headline_rows(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the short table: mean of categories and union of all, raw and calibrated, each figure in %
    with its interval."""
    keys, intervals = headline_keys(evaluation), evaluation.get("intervals") or {}
    rows = []
    for kind, found in (("raw", evaluation), ("calibrated", evaluation.get("calibrated"))):
        if found is None:
            continue
        for scope, words in (("mean", "model-unified (mean of categories)"), ("union", "absolute-unified (union)")):
            bounds = (intervals.get(kind) or {}).get(scope, {})
            cells = [_with_interval(found["metrics"][scope].get(key), bounds.get(key)) for key in keys]
            rows.append([f"{kind}, {words}", *cells])
    return list(keys.values()), rows


def _with_interval(value: float | None, bounds: Sequence[float] | None) -> str:
    if bounds is None:
        return percent(value)
    return f"{percent(value)} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def _dataset_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Mean and union of each data set, raw and calibrated; none of a single data set."""
    if len(evaluation.get("datasets", [])) < 2:
        return []
    keys = headline_keys(evaluation)
    rows = []
    for kind, found in (("raw", evaluation), ("calibrated", evaluation.get("calibrated"))):
        for entry in found["datasets"] if found is not None else []:
            for scope in ("mean", "union"):
                cells = [percent(entry[scope].get(key)) for key in keys]
                rows.append([entry["dataset"], f"{kind}, {scope}", *cells, f"{entry[scope]['n_images']:,}"])
    return sorted(rows, key=lambda row: row[0])


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Metric], list[Metric]]:
    """Image-level and pixel-level columns; pixel metrics only where an evaluation has any."""
    keys = {key: None for row in rows for key in row}
    pixel = [metric for metric in PIXEL_METRICS if metric.key in keys]
    pixel += [Metric(key, key.replace("aupro", "AUPRO").replace("_", " "), AUPRO_MEANING) for key in _aupro_keys(keys)]
    return list(IMAGE_METRICS), pixel


def _results(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The results table: groups of columns, rows of categories, and rows of mean and union."""
    rows = metrics["categories"]
    image, pixel = _columns(rows)
    columns = [*image, *pixel]
    lowest = {}
    for column in columns:
        values = [row[column.key] for row in rows if row.get(column.key) is not None]
        lowest[column.key] = min(values) if len(values) > 2 else None

    def cells(row: Mapping[str, Any], mark: bool) -> list[dict[str, Any]]:
        values = [(column.key, row.get(column.key)) for column in columns]
        return [{"text": percent(v), "low": mark and v is not None and v == lowest[key]} for key, v in values]

    several = len(rows) > 1
    return {
        "groups": [("image level", len(image)), ("pixel level", len(pixel))]
        if pixel
        else [("image level", len(image))],
        "columns": columns,
        "starts": {0, len(image)},
        "rows": [{"name": row["category"], "cells": cells(row, True), "counts": _row_counts(row)} for row in rows],
        "totals": [
            {"name": name, "cells": cells(metrics[name], False), "counts": counts}
            for name, counts in (("mean", ["", "", ""]), ("union", _row_counts(metrics["union"])))
            if several
        ],
        "marked": any(value is not None for value in lowest.values()),
    }


def _row_counts(row: Mapping[str, Any]) -> list[str]:
    """Images, anomalous ones, and those of them with a mask."""
    masked = row.get("n_anomalous_maps")
    return [f"{row['n_images']:,}", f"{row['n_anomalous']:,}", UNDEFINED if masked is None else f"{masked:,}"]


def _decisions(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the thresholds do, by category and over all."""
    threshold = evaluation["threshold"]
    if threshold is None:
        return []
    rows = [(row["category"], row) for row in threshold["categories"]]
    if len(rows) > 1 and threshold["union"] is not None:
        rows.append(("union", threshold["union"]))
    return [
        {
            "name": name,
            "total": name == "union",
            "threshold": UNDEFINED if rates["threshold"] is None else f"{rates['threshold']:.4g}",
            "n_normal": f"{rates['n_normal']:,}",
            "false_positive_rate": percent(rates["false_positive_rate"]),
            "above": _above_target(rates, threshold),
            "n_anomalous": f"{rates['n_anomalous']:,}",
            "detection_rate": percent(rates["detection_rate"]),
        }
        for name, rates in rows
    ]


def _defects(table: pa.Table) -> list[dict[str, Any]]:
    """How many of each defect type are found; empty where nothing is decided."""
    anomalous = table.filter(pc.and_(pc.equal(table["label"], ANOMALOUS), pc.is_valid(table["decision"])))
    kinds: dict[tuple[str, str], list[bool]] = {}
    texts = (_texts(anomalous, name) for name in ("category", "defect", "decision"))
    for category, defect, decision in zip(*texts, strict=True):
        kinds.setdefault((category, defect or UNDEFINED), []).append(decision == "fail")
    return [
        {
            "category": category,
            "defect": defect,
            "images": len(found),
            "found": sum(found),
            "rate": percent(sum(found) / len(found)),
        }
        for (category, defect), found in sorted(kinds.items())
    ]


def _groups(gallery: Gallery, scope_names: Sequence[str]) -> list[dict[str, Any]]:
    """The gallery as the page shows it: every card says in which scopes it appears, by their number."""
    number = {name: index for index, name in enumerate(scope_names)}

    def card(entry: Card) -> dict[str, Any]:
        own = [number[entry.sample["category"]]] if len(scope_names) > 1 else []
        return {"scopes": ([0] if entry.overall else []) + own, "entry": entry}

    groups = [
        ("Anomalous images with the lowest scores", "worst first", gallery.missed),
        ("Normal images with the highest scores", "worst first", gallery.alarms),
        ("Typical anomalous images", "of each defect type, next to its median score", gallery.typical),
    ]
    return [{"title": t, "note": n, "cards": list(map(card, cards))} for t, n, cards in groups if cards]


def _model_details(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's facts, and all of its config and provenance, one name and value a line."""
    plain = {key: model[key] for key in ("config", "threshold", "provenance")}
    return {
        "digest": model["digest"],
        "categories": ", ".join(model["categories"]),
        "facts": _model_facts(model),
        "details": [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in flatten(plain).items()],
    }


def _data(evaluation: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what is known of the shard set and the scores."""
    summary = manifest["summary"]
    span = {key: " to ".join(str(v) for v in dict.fromkeys(summary[key])) for key in ("height", "width")}
    rejected = ", ".join(f"{count:,} {status}" for status, count in manifest["rejected"].items()) or "none"
    rows = [
        ("source", f"{manifest['source']} ({manifest['layout']} layout)"),
        ("shard set", f"{evaluation['shards']['uri']}"),
        ("manifest SHA-256", evaluation["shards"]["digest"]),
        ("size", f"{manifest['bytes'] / 1e6:,.1f} MB in {len(manifest['files']):,} parts"),
        ("image sizes", f"height {span['height']}, width {span['width']}; {summary['distinct_sizes']:,} distinct"),
        ("rejected by ingest", rejected),
        ("groups of identical images", f"{summary['duplicates']['groups']:,}"),
        ("… in more than one split", _with_examples(summary["duplicates_across_splits"])),
        ("… with different labels", _with_examples(summary["duplicates_with_other_label"])),
    ]
    for problem, found in summary["masks"].items():
        rows.append((f"masks {problem.replace('_', ' ')}", f"{found['count']:,}"))
    rows.append(("scores", f"{evaluation['scores']['uri']}"))
    rows.append(("scores SHA-256", evaluation["scores"]["digest"]))
    return rows


def _with_examples(found: Mapping[str, Any]) -> str:
    return f"{found['groups']:,}" + (f", e.g. {' = '.join(found['examples'][0][:2])}" if found["examples"] else "")


def _counts(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples of the shard set by category (rows), split and label (columns)."""
    names = {NORMAL: "normal", ANOMALOUS: "anomalous", None: "unlabelled"}
    cells: dict[tuple[str, str], dict[tuple[str, int | None], int]] = {}
    for entry in entries:
        row = cells.setdefault((entry["dataset"], entry["category"]), {})
        key = (entry["split"], entry["label"])
        row[key] = row.get(key, 0) + entry["count"]
    order = [(split, label) for split in SPLITS for label in names]
    columns = [key for key in order if any(key in row for row in cells.values())]
    return {
        "columns": [f"{split} {names[label]}" for split, label in columns],
        "rows": [
            {
                "dataset": dataset,
                "category": category,
                "cells": [f"{row[c]:,}" if c in row else UNDEFINED for c in columns],
            }
            for (dataset, category), row in sorted(cells.items())
        ],
    }


def _meanings(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every term of the tables and what it says."""
    image, pixel = _columns(metrics["categories"])
    terms = [(f"image {metric.title}", metric.meaning) for metric in image]
    terms += [
        (f"pixel {metric.title}" if metric in PIXEL_METRICS else metric.title, metric.meaning) for metric in pixel
    ]
    return [*terms, *OTHER_MEANINGS]
