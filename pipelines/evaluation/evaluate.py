"""Scores and the labels and masks of their shards → every table the labels allow.

    maps and masks ─▶ workers: one task a score part, each map decoded once ─▶ counts of pixels of every group
    scores and labels ────────────────────────────────────────────────────────┴─▶ tables, curves, intervals

Raw and calibrated scores are evaluated side by side; for each, categories by themselves and their mean
(model-unified), the union of each data set, and the union of all (absolute-unified).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.evaluation.options import BootstrapOptions, EvaluateOptions
from pipelines.evaluation.pixel_counts import CALIBRATED, RAW, Counted, Group, PixelPlan, count_pixels, read_counted
from pipelines.reporting.curves import figures, scope_key
from pipelines.reporting.tables import aupro_names, headline_rows, largest_error, percent
from pipelines.runtime import outputs
from pipelines.runtime.cli import console, print_table
from pipelines.runtime.tracking import scope, track
from unianom import __version__, files
from unianom.data.image import InputPolicy
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import ScoreSet, ShardSet
from unianom.errors import DataError, OptionError
from unianom.metrics.bootstrap import (
    chunks,
    draw_resamples,
    histogram_aupro,
    histogram_auroc_ap,
    image_resamples,
    interval,
)
from unianom.metrics.curves import Curve
from unianom.metrics.image import image_curves, image_metrics
from unianom.options import from_plain, to_plain

UNION = "union"
COUNTED = "_pixel_counts"
"""Folder below the evaluation where counts of pixels lie until it is written."""

COUNTS = ("n_images", "n_anomalous", "n_maps", "n_anomalous_maps", "n_regions")
"""Entries of a metrics row that add up over categories instead of being averaged."""

SCORE_COLUMNS = {RAW: "score", CALIBRATED: "calibrated_score"}

RESAMPLED_MAPS = 20_000
"""Above so many maps, intervals of pixel metrics would need their histograms to be kept in gigabytes."""


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Compute all tables and curves and write them, or find them written; return the content of evaluation.json.

    Raises:
        DataError: the scores are not of these shards, nothing is labelled, or the output holds anything else.
        OptionError: a published approximation of AUPRO, of more pixels than are counted exactly.
    """
    scores, shards = ScoreSet.open(options.scores), ShardSet.open(options.shards)
    if scores.manifest["shards"]["digest"] != shards.digest:
        raise DataError(f"{scores.uri} was scored on other shards than {shards.uri}; give the shards it was made from")
    images = Images.of(scores)
    counting = pixel_plan(options, scores, images)
    own = ("aupro_limit", "aupro_variant", "soft_dice", "exact_pixels", "curve_points", "bootstrap")
    plan = {
        "tool": __version__,
        "scores": scores.digest,
        "shards": shards.digest,
        **{name: to_plain(getattr(options, name)) for name in own},
    }
    output = files.full_uri(options.output)
    path = files.join(output, "evaluation.json")
    inputs = {"scores": options.scores, "shards": options.shards}
    with (
        outputs.open_output(output, "evaluation", plan, inputs=inputs, overwrite=options.overwrite),
        track(options.tracking, "evaluate", output, to_plain(options)) as run,
    ):
        if not files.exists(path):
            _write(options, scores, shards, images, counting, output)
        content: dict[str, Any] = files.read_json(path)
        run.tags({"unianom.models": ", ".join(m["digest"] for m in content["models"])})
        for prefix, found in (("", content), ("calibrated/", content["calibrated"])):
            if found is None:
                continue
            metrics = found["metrics"]
            for row in metrics["categories"]:
                own_prefix = f"{prefix}{scope(row['category'])}"
                run.metrics({f"{own_prefix}/{k}": v for k, v in row.items() if k not in ("dataset", "category")})
            run.metrics({f"{prefix}mean/{key}": value for key, value in metrics["mean"].items()})
            run.metrics({f"{prefix}{UNION}/{key}": value for key, value in metrics["union"].items()})
        run.artifacts({"categories.csv": files.read_bytes(files.join(output, "categories.csv"))})
        run.json("evaluation.json", content)
        columns = ["sample_id", "category", "label", "score", "calibrated_score", "status"]
        run.figures(figures(content, scores.table(columns=columns)))
    return content


def _write(
    options: EvaluateOptions, scores: ScoreSet, shards: ShardSet, images: Images, plan: PixelPlan, output: str
) -> None:
    """Compute all tables and curves and write them, evaluation.json last."""
    work = files.join(output, COUNTED)
    # what a killed run has counted is found again by what it depends on
    folder = files.join(work, files.digest_of([scores.digest, shards.digest, asdict(plan)])[:12])
    if scores.manifest["maps"]:
        count_pixels(scores, shards, plan, folder, options.runtime)
    content = tabulate(options, scores, shards, images, plan, folder)
    files.write_bytes(files.join(output, "categories.csv"), _table_csv(content))
    files.write_json(files.join(output, "evaluation.json"), content)
    files.remove(work)


@dataclass(frozen=True, eq=False)
class Images:
    """The labelled images that have a score, in the order of the score set.

    Attributes:
        sample_ids: (n,) names.
        groups: data set and category of each group.
        group: (n,) which group each image belongs to.
        labels: (n,) 0 normal, 1 anomalous.
        scores: by kind, (n,) float64; calibrated ones only if every image has one.
        models: (n,) digests.
        partly_calibrated: whether some, but not all have a calibrated score.
    """

    sample_ids: list[str]
    groups: list[Group]
    group: np.ndarray
    labels: np.ndarray
    scores: dict[str, np.ndarray]
    models: np.ndarray
    partly_calibrated: bool

    @classmethod
    def of(cls, scores: ScoreSet) -> Images:
        """Read them.

        Raises:
            DataError: there is none.
        """
        texts = ("sample_id", "dataset", "category", "model")
        table = scores.table(columns=[*texts, "label", "status", *SCORE_COLUMNS.values()])
        kept = [
            status == "ok" and label is not None
            for status, label in zip(table["status"].to_pylist(), table["label"].to_pylist(), strict=True)
        ]
        table = table.filter(pa.array(kept))
        if len(table) == 0:
            raise DataError(
                f"no sample of {scores.uri} has a score and a label, so there is nothing to evaluate against"
            )
        column = {name: table[name].cast(pa.string()).to_pylist() for name in texts}
        names = list(zip(column["dataset"], column["category"], strict=True))
        groups = sorted(set(names))
        number = {group: index for index, group in enumerate(groups)}
        values = {RAW: table["score"].to_numpy().astype(np.float64)}
        missing = table["calibrated_score"].null_count
        if missing == 0:
            values[CALIBRATED] = table["calibrated_score"].to_numpy().astype(np.float64)
        return cls(
            sample_ids=column["sample_id"],
            groups=groups,
            group=np.array([number[name] for name in names]),
            labels=table["label"].to_numpy().astype(np.int64),
            scores=values,
            models=np.asarray(column["model"], dtype=object),
            partly_calibrated=0 < missing < len(table),
        )

    @property
    def categories(self) -> dict[str, tuple[int, ...]]:
        """Groups of each category: several where data sets share its name."""
        names = sorted({category for _, category in self.groups})
        return {name: tuple(i for i, (_, own) in enumerate(self.groups) if own == name) for name in names}

    @property
    def datasets(self) -> dict[str, tuple[int, ...]]:
        """Groups of each data set."""
        names = sorted({dataset for dataset, _ in self.groups})
        return {name: tuple(i for i, (own, _) in enumerate(self.groups) if own == name) for name in names}

    @property
    def everything(self) -> tuple[int, ...]:
        """All groups."""
        return tuple(range(len(self.groups)))

    def within(self, groups: Sequence[int]) -> np.ndarray:
        """(m,) the images of some groups, group by group."""
        return np.concatenate([np.flatnonzero(self.group == group) for group in groups])


def pixel_plan(options: EvaluateOptions, scores: ScoreSet, images: Images) -> PixelPlan:
    """How pixels are to be counted.

    Raises:
        OptionError: a published approximation of AUPRO, of more pixels than are counted exactly.
    """
    sides = [from_plain(InputPolicy, model["config"]["input"]).side for model in scores.manifest["models"]]
    pixels = len(images.labels) * max(sides) ** 2
    binned = pixels > options.exact_pixels
    if binned and options.aupro_variant != "exact" and scores.manifest["maps"]:
        raise OptionError(
            f"aupro_variant={options.aupro_variant} needs every pixel, and {pixels:,} are more than --exact_pixels "
            f"{options.exact_pixels:,}; raise that if there is the memory, or take the exact variant"
        )
    return PixelPlan(
        binned=binned,
        calibrated=CALIBRATED in images.scores,
        resampled=options.bootstrap.resamples > 0 and len(images.labels) <= RESAMPLED_MAPS,
        aupro_limit=options.aupro_limit,
        aupro_variant=options.aupro_variant,
    )


def tabulate(
    options: EvaluateOptions, scores: ScoreSet, shards: ShardSet, images: Images, plan: PixelPlan, folder: str
) -> dict[str, Any]:
    """The content of evaluation.json, from the scores and the counted pixels in a folder."""
    found: dict[str, dict[str, Any]] = {}
    intervals: dict[str, Any] = {}
    left_out: list[str] = []
    for kind in plan.kinds:
        found[kind], intervals[kind], left_out = _of_kind(options, scores, shards, images, plan, folder, kind)
    raw = found[RAW]
    with_maps = raw["metrics"]["union"].get("n_maps") is not None
    return {
        "tool_version": __version__,
        "scores": {"uri": scores.uri, "digest": scores.digest},
        "shards": {"uri": shards.uri, "digest": shards.digest},
        "models": scores.manifest["models"],
        "metrics": raw["metrics"],
        "datasets": raw["datasets"],
        "threshold": _threshold(scores, images),
        "pixel_mode": ("binned" if plan.binned else "exact") if with_maps else None,
        "calibrated": found.get(CALIBRATED),
        "intervals": None
        if not options.bootstrap.resamples
        else {
            "confidence": options.bootstrap.confidence,
            "resamples": options.bootstrap.resamples,
            RAW: intervals[RAW],
            CALIBRATED: intervals.get(CALIBRATED),
        },
        "notes": _notes(options, scores, plan, images, with_maps, left_out),
        "curves": raw["curves"],
        "statuses": scores.manifest["statuses"],
        "rejected": _not_scored(scores),
    }


def _of_kind(
    options: EvaluateOptions,
    scores: ScoreSet,
    shards: ShardSet,
    images: Images,
    plan: PixelPlan,
    folder: str,
    kind: str,
) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """Tables and intervals of one kind of score, and the images that its pixels leave out; the pixels are in memory no
    longer than this takes."""
    counted = Counted({}, {})
    if scores.manifest["maps"]:
        counted = read_counted(scores, shards, plan, folder, kind)
    tables = kind_tables(options, images, counted, kind, plan.accumulator)
    if not options.bootstrap.resamples:
        return tables, None, counted.left_out
    resampling = Resampling(images, counted, kind, options.aupro_limit, options.bootstrap)
    return tables, resampling.intervals(tables["metrics"]), counted.left_out


def _notes(
    options: EvaluateOptions,
    scores: ScoreSet,
    plan: PixelPlan,
    images: Images,
    with_maps: bool,
    left_out: Sequence[str],
) -> list[str]:
    """What a reader must know of how the figures came about."""
    notes = _one_sided(images)
    if scores.manifest["maps"] and not with_maps and (images.labels == ANOMALOUS).any():
        notes.append("no anomalous image has a mask that shows a defect, so there are no pixel metrics")
    if any(model.get("decision_rule") is not None for model in scores.manifest["models"]):
        notes.append(
            "the model decides by a rule of jobs/decide.py, which tells what that rule does; the rates here are those "
            "of the model's single threshold"
        )
    if images.partly_calibrated:
        notes.append("some images have a calibrated score and some have none, so calibrated scores are not evaluated")
    if left_out:
        notes.append(
            f"{len(left_out)} anomalous images, e.g. {min(left_out)}, have a mask that is empty at the model's "
            f"resolution, as where its crop leaves the defect out; they count for images and are left out of pixel "
            f"metrics"
        )
    if with_maps and plan.binned:
        notes.append(
            f"more than {options.exact_pixels:,} labelled pixels: pixel metrics come from bins, each with the most it "
            f"can be off; mean Dice and IoU of images are left out"
        )
    if with_maps and options.bootstrap.resamples and not plan.resampled:
        notes.append(f"more than {RESAMPLED_MAPS:,} maps: intervals are given for image-level metrics only")
    return notes


def _one_sided(images: Images) -> list[str]:
    """Why metrics are missing that need normal and anomalous images."""
    kinds = np.unique(images.labels)
    if len(kinds) == 1:
        have, lack = ("normal", "anomalous") if kinds[0] == NORMAL else ("anomalous", "normal")
        return [
            f"all {len(images.labels)} images that are labelled and scored are {have}: AUROC, AP, F1 and accuracy of "
            f"images need {lack} ones, too, so there are none; ingest and score a test split that holds both"
        ]
    notes = []
    for label, word in ((NORMAL, "normal"), (ANOMALOUS, "anomalous")):
        names = [
            category
            for category, groups in images.categories.items()
            if (images.labels[np.isin(images.group, groups)] == label).all()
        ]
        if names:
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            notes.append(
                f"{listed}: all images of {'this category' if len(names) == 1 else 'these categories'} are {word}, so "
                f"metrics that need both kinds are empty there and the mean is over the others"
            )
    return notes


def kind_tables(
    options: EvaluateOptions, images: Images, counted: Counted, kind: str, empty: Callable[[], Any]
) -> dict[str, Any]:
    """Metrics of categories, data sets and the union of all, and their curves, of one kind of score."""

    @cache
    def result(groups: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        return _scope_result(options, images, counted, kind, groups, empty)

    rows = []
    for category, groups in images.categories.items():
        names = ", ".join(images.groups[group][0] for group in groups)
        rows.append({"dataset": names, "category": category, **result(groups)[0]})
    union, union_curves = result(images.everything)
    return {
        "metrics": {"categories": rows, "mean": mean_row(rows), "union": union},
        "datasets": [
            {"dataset": name, "mean": mean_row([result((g,))[0] for g in groups]), "union": result(groups)[0]}
            for name, groups in images.datasets.items()
        ],
        "curves": {scope_key(name): result(groups)[1] for name, groups in images.categories.items()}
        | {UNION: union_curves},
    }


def _scope_result(
    options: EvaluateOptions,
    images: Images,
    counted: Counted,
    kind: str,
    groups: tuple[int, ...],
    empty: Callable[[], Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and curves of some groups together, as plain data; NaN becomes None."""
    own = images.within(groups)
    values, labels = images.scores[kind][own], images.labels[own]
    metrics: dict[str, Any] = dict(image_metrics(values, labels))
    curves: dict[str, Curve] = image_curves(values, labels, options.curve_points)
    parts = [counted.accumulators[name] for name in (images.groups[g] for g in groups) if name in counted.accumulators]
    if parts:
        pixels: Any = empty()
        for part in parts:
            pixels.merge(part)
        summary, found = pixels.summary(options.curve_points)
        if summary.n_anomalous_maps:
            metrics.update(summary.as_dict(options.soft_dice))
            curves.update({"pixel_roc": found["roc"], "pixel_pr": found["pr"], "pro": found["pro"]})
    return (
        {key: plain(value) for key, value in metrics.items()},
        {name: {"x": curve.x.tolist(), "y": curve.y.tolist()} for name, curve in curves.items()},
    )


def plain(value: float) -> float | int | None:
    """A metric as JSON holds it; None where it is undefined."""
    if isinstance(value, int | np.integer):
        return int(value)
    return float(value) if math.isfinite(value) else None


def mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the categories where a metric is defined; counts are summed."""
    keys = [key for row in rows for key in row if key not in ("dataset", "category")]
    mean: dict[str, Any] = {}
    for key in dict.fromkeys(keys):
        values = [row[key] for row in rows if row.get(key) is not None]
        if key in COUNTS:
            mean[key] = sum(values)
        elif not key.endswith("threshold"):
            mean[key] = math.fsum(values) / len(values) if values else None
    return mean


def _threshold(scores: ScoreSet, images: Images) -> dict[str, Any] | None:
    thresholds = {model["digest"]: model["threshold"] for model in scores.manifest["models"]}
    given = [threshold for threshold in thresholds.values() if threshold is not None]
    if not given:
        return None
    rates = {name: _rates(images, thresholds, groups) for name, groups in images.categories.items()}
    return {
        "target_fpr": given[0]["target_fpr"],
        "confidence": given[0]["confidence"],
        "categories": [{"category": name, **found} for name, found in rates.items() if found is not None],
        "union": _rates(images, thresholds, images.everything),
    }


def _rates(images: Images, thresholds: Mapping[str, Any], groups: Sequence[int]) -> dict[str, Any] | None:
    """What the models' thresholds do to the images of some groups; None where a model has none."""
    own = images.within(groups)
    used = [thresholds[digest] for digest in sorted(set(images.models[own]))]
    if any(threshold is None for threshold in used):
        return None
    # by the threshold, not by `decision`: a rule stored in the model may have decided
    failed = images.scores[RAW][own] > np.array([thresholds[digest]["value"] for digest in images.models[own]])
    normal, anomalous = failed[images.labels[own] == NORMAL], failed[images.labels[own] == ANOMALOUS]
    values = {threshold["value"] for threshold in used}
    return {
        "threshold": values.pop() if len(values) == 1 else None,
        "n_normal": len(normal),
        "false_positive_rate": float(normal.mean()) if len(normal) else None,
        "n_anomalous": len(anomalous),
        "detection_rate": float(anomalous.mean()) if len(anomalous) else None,
    }


def _not_scored(scores: ScoreSet, most: int = 100) -> list[dict[str, Any]]:
    columns = ["sample_id", "category", "status", "error"]
    rows = [row for row in scores.table(columns=columns).to_pylist() if row["status"] != "ok"]
    return rows[:most]


def _table_csv(content: dict[str, Any]) -> bytes:
    """Categories, mean and union, then mean and union of each data set where there are several; column `scores` says
    whether of raw or of calibrated scores."""
    rows = []
    for kind, found in ((RAW, content), (CALIBRATED, content["calibrated"])):
        if found is None:
            continue
        metrics = found["metrics"]
        own = [*metrics["categories"], *_total_rows("", metrics)]
        if len(found["datasets"]) > 1:
            own += [row for entry in found["datasets"] for row in _total_rows(entry["dataset"], entry)]
        rows += [{"scores": kind, **row} for row in own]
    return files.csv_bytes(rows)


def _total_rows(dataset: str, tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"dataset": dataset, "category": name, **tables[name]} for name in ("mean", UNION)]


# -- confidence intervals ----------------------------------------------------------------------------------------------


class Resampling:
    """Confidence intervals of one kind of score; both kinds are resampled by the same draws.

    Args:
        images: all of them.
        counted: pixels; pixel metrics get intervals where it has histograms.
        kind: which scores.
        aupro_limit: see `unianom.metrics.region.aupro`; other variants than the exact one get no interval.
        options: how often, and the seed.
    """

    def __init__(
        self, images: Images, counted: Counted, kind: str, aupro_limit: float, options: BootstrapOptions
    ) -> None:
        self._images, self._counted, self._scores = images, counted, images.scores[kind]
        self._limit, self._options = aupro_limit, options
        self._aupro = "aupro" if aupro_limit == 0.3 else f"aupro_{aupro_limit:g}"

    def intervals(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Lowest and highest value by metric: of the mean, of the union and of each category.

        Histograms tie what lies in one bin. That shifts a metric a little, in all resamples alike; so their distances
        from the histograms' own value are laid around the value in the tables.
        """
        own = self._images.categories
        scopes = {scope_key(name): groups for name, groups in own.items()}
        values = self._values({**scopes, UNION: self._images.everything})
        rows = {row["category"]: row for row in metrics["categories"]}
        categories = {name: self._around(values[scope_key(name)], row) for name, row in rows.items()}
        mean = {
            key: _mean_of_defined([values[scope_key(name)][key] for name in rows if row_has(rows[name], key)])
            for key in values[UNION]
            if any(row_has(row, key) for row in rows.values())
        }
        return {
            "mean": self._around(mean, metrics["mean"]),
            UNION: self._around(values[UNION], metrics["union"]),
            "categories": categories,
        }

    def _around(self, values: Mapping[str, np.ndarray], row: Mapping[str, Any]) -> dict[str, list[float] | None]:
        """Interval of each metric that the row has; the first of the values is of the images as they are."""
        found = {}
        for key, resampled in values.items():
            if row_has(row, key):
                moved = np.clip(resampled[1:] - resampled[0] + row[key], 0, 1)
                found[key] = interval(moved, self._options.confidence)
        return found

    def _values(self, scopes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, np.ndarray]]:
        """By scope and metric: of the images as they are, then of each resample."""
        found: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in scopes}
        names = ["/".join(group) for group in self._images.groups]
        rngs = [np.random.default_rng([self._options.seed, zlib.crc32(name.encode())]) for name in names]
        own = [np.flatnonzero(self._images.group == number) for number in range(len(names))]
        for rows in chunks(self._options.resamples, len(self._scores)):
            drawn = [
                draw_resamples(self._images.labels[images], len(rows), rng)
                for images, rng in zip(own, rngs, strict=True)
            ]
            if rows[0] == 0:
                drawn = [np.concatenate([np.ones((1, d.shape[1]), np.int32), d]) for d in drawn]
            pixels = [self._pixels(number, own[number], drawn[number]) for number in range(len(names))]
            for name, groups in scopes.items():
                for key, values in self._scope_values(groups, drawn, pixels).items():
                    found[name].setdefault(key, []).append(values)
        return {name: {key: np.concatenate(v) for key, v in metrics.items()} for name, metrics in found.items()}

    def _pixels(self, group: int, own: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Histograms of the resampled maps of a group; None if it has none."""
        histograms = self._counted.histograms.get(self._images.groups[group])
        if histograms is None:
            return None
        place = {self._images.sample_ids[image]: column for column, image in enumerate(own.tolist())}
        return histograms.resample(drawn[:, [place[sample_id] for sample_id in histograms.sample_ids]])

    def _scope_values(
        self,
        groups: Sequence[int],
        drawn: Sequence[np.ndarray],
        pixels: Sequence[tuple[np.ndarray, np.ndarray] | None],
    ) -> dict[str, np.ndarray]:
        images = self._images.within(groups)
        together = np.concatenate([drawn[group] for group in groups], axis=1)
        labels = self._images.labels[images]
        found: dict[str, np.ndarray] = {}
        if 0 < np.count_nonzero(labels == ANOMALOUS) < len(labels):
            found |= image_resamples(self._scores[images], labels, together)
        parts = [part for part in (pixels[group] for group in groups) if part is not None]
        if parts:
            bins = np.unique(np.concatenate([held for held, _ in parts]))
            sums = np.zeros((3, len(together), len(bins)))
            for held, own in parts:
                sums[:, :, np.searchsorted(bins, held)] += own
            auroc, ap = histogram_auroc_ap(sums[0], sums[1])
            found |= {"pixel_auroc": auroc, "pixel_ap": ap}
            found[self._aupro] = histogram_aupro(sums[0], sums[2], self._limit)
        return found


def row_has(row: Mapping[str, Any], key: str) -> bool:
    """Whether a metric is defined in a row."""
    return row.get(key) is not None


def _mean_of_defined(values: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over categories, (r,), of those where a resample is defined."""
    stacked = np.stack(values)
    defined = np.isfinite(stacked)
    total = np.where(defined, stacked, 0).sum(axis=0)
    return np.divide(total, defined.sum(axis=0), out=np.full(total.shape, np.nan), where=defined.any(axis=0))


# -- words -------------------------------------------------------------------------------------------------------------


SHOWN = {
    "image_auroc": "I-AUROC",
    "image_ap": "I-AP",
    "image_f1_max": "I-F1max",
    "image_accuracy_at_f1_max": "I-Acc",
    "pixel_auroc": "P-AUROC",
    "pixel_ap": "P-AP",
    "pixel_f1_max": "P-F1max",
    "dsc": "DSC",
    "iou": "IoU",
    "soft_dice": "soft DSC",
    "soft_iou": "soft IoU",
}
"""Metrics of the printed table, and their usual short names; AUPRO is added under the name of its variant."""


def print_evaluation(content: dict[str, Any]) -> None:
    """Print the result tables, raw and calibrated, and the rates met at the threshold."""
    for kind, found in ((RAW, content), (CALIBRATED, content["calibrated"])):
        if found is not None:
            title = "metrics in %" if content["calibrated"] is None else f"metrics of {kind} scores in %"
            _print_metrics(title, found)
    _print_headline(content)
    if content["pixel_mode"] == "binned":
        console.print(f"pixel metrics of the union are off by at most {largest_error(content):.2g} percentage points")
    for note in content["notes"]:
        console.print(f"note: {note}")
    _print_rates(content["threshold"])


def _print_metrics(title: str, found: Mapping[str, Any]) -> None:
    metrics = found["metrics"]
    totals = []
    if len(found["datasets"]) > 1:
        # a data set of one category would repeat its row
        counts = {name: sum(row["dataset"] == name for row in metrics["categories"]) for name in _datasets(found)}
        for entry in found["datasets"]:
            if counts[entry["dataset"]] != 1:
                totals += [{**entry[name], "category": f"{name} of {entry['dataset']}"} for name in ("mean", UNION)]
    totals += [{**metrics["mean"], "category": "mean"}, {**metrics["union"], "category": UNION}]
    rows = [*metrics["categories"], *totals]
    shown = {key: name for key, name in SHOWN.items() if any(row_has(row, key) for row in rows)}
    shown.update(aupro_names(metrics["mean"]))
    table = [
        [row["category"], *(percent(row.get(key)) for key in shown), str(row["n_images"]), str(row["n_anomalous"])]
        for row in rows
    ]
    print_table(title, ["category", *shown.values(), "images", "anomalous"], table, footer=len(totals))


def _datasets(found: Mapping[str, Any]) -> list[str]:
    return [entry["dataset"] for entry in found["datasets"]]


def _print_headline(content: Mapping[str, Any]) -> None:
    intervals = content["intervals"]
    if intervals is None and content["calibrated"] is None:
        return
    columns, rows = headline_rows(content)
    title = "protocols side by side, in %"
    if intervals is not None:
        title += (
            f" [{100 * intervals['confidence']:g} % confidence intervals, {intervals['resamples']:,} resamples of the "
            f"images]"
        )
    print_table(title, ["scores, protocol", *columns], rows)


def _print_rates(threshold: Mapping[str, Any] | None) -> None:
    if threshold is None:
        console.print("no threshold in the model, so no decisions were evaluated")
        return
    met = threshold["union"]
    promised = f"{100 * threshold['target_fpr']:g} % at {100 * threshold['confidence']:g} % confidence"
    if met is not None and met["false_positive_rate"] is not None:
        caught = "–" if met["detection_rate"] is None else f"{100 * met['detection_rate']:.1f} %"
        console.print(
            f"at the threshold: {100 * met['false_positive_rate']:.1f} % of {met['n_normal']} normal images fail "
            f"(promised at most {promised}), {caught} of {met['n_anomalous']} anomalous images are caught"
        )
