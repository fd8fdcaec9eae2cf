"""Banks of few normal images, drawn several times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.evaluation.bank_protocol import (
    SECTION,
    BankScorer,
    ProtocolResult,
    _plan,
    _state,
    run_banks,
    scores_file,
    spread,
)
from pipelines.evaluation.embeddings import Side
from pipelines.evaluation.evaluate import plain
from pipelines.evaluation.options import LowShotOptions
from pipelines.reporting.tables import percent
from pipelines.runtime import outputs
from pipelines.runtime.cli import console, print_table
from pipelines.runtime.tracking import scope, track
from pipelines.training.per_category import inputs_of
from unianom import __version__, files, visual
from unianom.configs import method_of
from unianom.data.image import decode_mask, prepare_mask
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.splits import few_shot
from unianom.errors import DataError
from unianom.metrics.image import image_metrics
from unianom.metrics.pixel import pixel_metrics
from unianom.options import to_plain

LOW_SHOT_METRICS = {
    "image_auroc": "I-AUROC",
    "image_ap": "I-AP",
    "pixel_auroc": "P-AUROC",
    "pixel_ap": "P-AP",
    "aupro": "AUPRO",
}
"""What is measured of every draw, and its short name."""


def low_shot(options: Any) -> ProtocolResult:
    """Run all draws, continue an interrupted run, or find it done.

    Args:
        options: one of `protocol_options(LowShotOptions)`.

    Raises:
        DataError: no normal training image, no labelled test image, or every number of shots is too large.
        OptionError: see `embed_once`.
    """
    shards = ShardSet.open(options.shards)
    train = Selection(("train",), options.categories, (NORMAL,))
    test = Selection(("test",), options.categories, (NORMAL, ANOMALOUS))
    shards.check(train)
    shards.check(test)
    units, skipped = plan_draws(shards, options)
    own = ("categories", "shots", "draws", "seed", "per_category")
    plan = _plan(options, shards, protocol="low_shot", **{key: to_plain(getattr(options, key)) for key in own})
    output = files.full_uri(options.output)
    inputs = inputs_of(options.shards, options.method)
    with (
        outputs.open_output(output, "low-shot protocol", plan, inputs=inputs, overwrite=options.overwrite) as digest,
        track(options.tracking, "low_shot", output, to_plain(options), plan=digest) as run,
    ):
        fresh = not outputs.is_complete(output)
        if fresh:
            sides: dict[Side, Selection] = {"train": train, "test": test}
            records = run_banks(DrawScorer, options, shards, sides, output, digest, units, "low-shot draws")
            _write_low_shot(output, options, shards, records, skipped)
        content = files.read_json(files.join(output, "low_shot.json"))
        for row in content["summary"]:
            values = {f"{scope(row['category'])}/{key}": row[key]["mean"] for key in LOW_SHOT_METRICS if key in row}
            run.metrics(values, step=row["shots"])
        names = ("draws.csv", "summary.csv")
        run.artifacts({name: files.read_bytes(files.join(output, name)) for name in names})
        run.json("low_shot.json", content)
        run.figures({"low_shot.png": files.read_bytes(files.join(output, "low_shot.png"))})
    return ProtocolResult(output, fresh, content)


def plan_draws(shards: ShardSet, options: LowShotOptions) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The banks to fit, and which numbers of shots which category cannot give.

    Returns:
        Units of number, shots, seed and categories; and rows of category, shots and normal_images.

    Raises:
        DataError: no category has as many normal images as any number of shots.
    """
    categories = list(options.categories) or shards.categories
    have = {name: shards.count(Selection(("train",), (name,), (NORMAL,))) for name in categories}
    units: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for shots in options.shots:
        enough = [name for name in categories if have[name] >= shots]
        skipped += [
            {"category": name, "shots": shots, "normal_images": have[name]} for name in categories if name not in enough
        ]
        groups = [[name] for name in enough] if options.per_category else [enough] * bool(enough)
        for group in groups:
            for seed in range(options.seed, options.seed + options.draws):
                units.append({"number": len(units), "shots": shots, "seed": seed, "categories": group})
    if not units:
        raise DataError(
            f"{shards.uri} has at most {max(have.values())} normal training images of a category, fewer than any of "
            f"shots={list(options.shots)}"
        )
    return units, skipped


class DrawScorer(BankScorer):
    """A bank of one draw, and metrics of its categories. A `PartTask`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._masks: dict[tuple[str, ...], dict[str, np.ndarray]] = {}

    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Fit, score and measure one draw."""
        unit = self.tasks[unit["number"]]
        categories = tuple(unit["categories"])
        pool = [row for row in self.reader.samples("train") if row["category"] in categories]
        ids, groups = [row["sample_id"] for row in pool], [row["category"] for row in pool]
        made = self.fit(frozenset(few_shot(ids, groups, unit["shots"], unit["seed"])))
        masks = self._masks_of(categories)
        seen: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {name: ([], []) for name in categories}

        def see(row: dict[str, Any], anomaly_map: np.ndarray) -> None:
            mask = masks.get(row["sample_id"])
            if mask is None and row["label"] == NORMAL:
                mask = np.zeros(anomaly_map.shape, bool)
            if mask is not None:
                seen[row["category"]][0].append(anomaly_map)
                seen[row["category"]][1].append(mask)

        rows = self.score(see, categories)
        measured = []
        for name in categories:
            own = [row for row in rows if row["category"] == name]
            metrics: dict[str, Any] = dict(image_metrics([row["score"] for row in own], [row["label"] for row in own]))
            if any(mask.any() for mask in seen[name][1]):
                metrics |= pixel_metrics(*seen[name]).as_dict()
            values = {key: plain(metrics[key]) for key in LOW_SHOT_METRICS if key in metrics}
            measured.append({"category": name, **values})
        draw = {key: unit[key] for key in ("shots", "seed")}
        return self.commit(unit["number"], [{**draw, **row} for row in rows], {**unit, **made, "metrics": measured})

    def _masks_of(self, categories: tuple[str, ...]) -> dict[str, np.ndarray]:
        """S×S bool masks of the anomalous test images that have one, and not an empty one at this resolution, by
        sample_id; kept for the next draw."""
        if categories not in self._masks:
            shards, policy = self.reader.shards, self.method.input
            selection = Selection(("test",), categories, (ANOMALOUS,))
            found: dict[str, np.ndarray] = {}
            for part in shards.parts:
                for batch in shards.read(part, selection, ["sample_id", "mask"]):
                    for row in batch.to_pylist():
                        if row["mask"] is not None:
                            mask = prepare_mask(decode_mask(row["mask"]), policy)
                            if mask.any():
                                found[row["sample_id"]] = mask
            self._masks[categories] = found
        return self._masks[categories]


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the draws, by category and number of shots, and of the mean over categories.

    Args:
        records: of shots, seed and `metrics` by category.

    Returns:
        Rows of category ("mean" last), shots, draws, categories (how many), and of each metric its `spread`. A mean is
        taken over the categories of each draw first, where all of them have the metric.
    """
    draws: dict[tuple[str, int], dict[int, list[Mapping[str, Any]]]] = {}
    for record in records:
        for row in record["metrics"]:
            for name in (row["category"], "mean"):
                draws.setdefault((name, record["shots"]), {}).setdefault(record["seed"], []).append(row)
    summary = []
    for (name, shots), by_seed in sorted(draws.items(), key=lambda item: (item[0][0] == "mean", item[0])):
        found: dict[str, Any] = {"category": name, "shots": shots, "draws": len(by_seed)}
        found["categories"] = len(next(iter(by_seed.values())))
        for key in LOW_SHOT_METRICS:
            values = [[own[key] for own in group if own.get(key) is not None] for group in by_seed.values()]
            if any(values):
                found[key] = spread([math.fsum(group) / len(group) for group in values if group])
        summary.append(found)
    return summary


def _write_low_shot(
    output: str,
    options: Any,
    shards: ShardSet,
    records: list[dict[str, Any]],
    skipped: list[dict[str, Any]],
) -> None:
    summary = summarise(records)
    rows = [
        {
            "category": row["category"],
            **{key: record[key] for key in ("shots", "seed", "images", "patches", "bank_rows")},
            **{key: row.get(key) for key in LOW_SHOT_METRICS},
        }
        for record in records
        for row in record["metrics"]
    ]
    content = {
        "tool_version": __version__,
        "protocol": "low_shot",
        "method": method_of(options.method),
        "config": to_plain(options.method),
        "shards": {"uri": shards.uri, "digest": shards.digest},
        "per_category": options.per_category,
        "draws": rows,
        "summary": summary,
        "skipped": skipped,
        "scores": [scores_file(record["number"]) for record in records],
    }
    flat = [
        {
            **{key: row[key] for key in ("category", "shots", "draws", "categories")},
            **{f"{key}_{part}": row[key][part] for key in LOW_SHOT_METRICS if key in row for part in ("mean", "sd")},
        }
        for row in summary
    ]
    files.write_bytes(files.join(output, "draws.csv"), files.csv_bytes(rows))
    files.write_bytes(files.join(output, "summary.csv"), files.csv_bytes(flat))
    files.write_bytes(files.join(output, "low_shot.png"), visual.png(_shot_figure(summary)))
    banks = "one bank for each category" if options.per_category else "one bank for all categories"
    section = {
        "title": f"Few normal images: {method_of(options.method)}",
        "text": [
            f"{options.draws} seeded draws of each number of normal images per category, {banks}; mean ± standard "
            f"deviation over the draws, on all test images. Backbone {options.method.backbone.name}.",
            *_skipped_words(skipped),
        ],
        "tables": [
            {"title": f"{title}, in %", "columns": columns, "rows": table}
            for title, columns, table in _shot_tables(summary)
        ],
        "figures": [{"title": "Metrics by number of normal images", "file": "low_shot.png"}],
    }
    files.write_json(files.join(output, SECTION), section)
    files.write_json(files.join(output, "low_shot.json"), content)
    outputs.finish(output, {"kind": "low-shot protocol", "banks": len(records)})


def _skipped_words(skipped: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each category that has too few normal images for some numbers of shots."""
    by_category: dict[str, list[Mapping[str, Any]]] = {}
    for row in skipped:
        by_category.setdefault(row["category"], []).append(row)
    return [
        f"{name} has only {rows[0]['normal_images']} normal images, so it takes no part at "
        f"{', '.join(str(row['shots']) for row in rows)} shots."
        for name, rows in by_category.items()
    ]


def _shot_tables(summary: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of a table for each metric: categories by numbers of shots.

    The mean is shown where all categories take part; over fewer it could not be compared.
    """
    shots = sorted({row["shots"] for row in summary})
    names = list(dict.fromkeys(row["category"] for row in summary))
    if len(names) == 2:  # the mean of a single category would repeat it
        names = names[:1]
    cells = {(row["category"], row["shots"]): row for row in summary}
    tables = []
    for key, title in LOW_SHOT_METRICS.items():
        if not any(key in row for row in summary):
            continue
        table = []
        for name in names:
            known = [cells.get((name, number), {}) for number in shots]
            found = [
                row.get(key) if name != "mean" or row.get("categories") == len(names) - 1 else None for row in known
            ]
            table.append([name, *("–" if value is None else _with_spread(value) for value in found)])
        tables.append((title, ["category", *(f"{number} shot{'s' * (number > 1)}" for number in shots)], table))
    return tables


def _with_spread(value: Mapping[str, float | None]) -> str:
    return percent(value["mean"]) + ("" if value["sd"] is None else f"±{100 * value['sd']:.1f}")


_COLOURS = ("#3f83c9", "#dd6b33", "#3a9a6c", "#a45fb5", "#b8962e", "#6b7280")


def _shot_figure(summary: Sequence[Mapping[str, Any]]) -> Figure:
    """Curves over the number of shots on a logarithmic axis, with a band of one standard deviation."""
    keys = [key for key in ("image_auroc", "pixel_auroc", "aupro") if any(key in row for row in summary)]
    figure = Figure(figsize=(3.4 * len(keys), 3.1), layout="constrained")
    names = [name for name in dict.fromkeys(row["category"] for row in summary) if name != "mean"]
    several = len(names) > len(_COLOURS)
    for number, key in enumerate(keys):
        axes = figure.add_subplot(1, len(keys), number + 1)
        for index, name in enumerate(names):
            style: dict[str, Any] = {"color": _COLOURS[index % len(_COLOURS)], "label": name}
            if several:
                style = {"color": "#9aa3b0", "linewidth": 0.7}
            _draw_spread(axes, [row for row in summary if row["category"] == name and key in row], key, style)
        if several:
            every = [row for row in summary if row["category"] == "mean" and row["categories"] == len(names)]
            mean = [row for row in every if key in row]
            _draw_spread(axes, mean, key, {"color": _COLOURS[0], "label": "mean"})
        shots = sorted({row["shots"] for row in summary})
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(s) for s in shots])
        axes.minorticks_off()
        visual.quiet(axes, LOW_SHOT_METRICS[key], "normal images per category", "in %" if number == 0 else "")
        if number == 0:
            axes.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def _draw_spread(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, style: dict[str, Any]) -> None:
    if not rows:
        return
    shots = [row["shots"] for row in rows]
    mean = np.array([100 * row[key]["mean"] for row in rows])
    deviation = np.array([100 * (row[key]["sd"] or 0) for row in rows])
    axes.plot(shots, mean, marker="o", markersize=3.5, **{"linewidth": 1.5, **style})
    if "label" in style:
        axes.fill_between(shots, mean - deviation, mean + deviation, color=style["color"], alpha=0.18, linewidth=0)


def print_low_shot(result: ProtocolResult) -> None:
    """Print a table for each metric, and which categories were left out."""
    for title, columns, table in _shot_tables(result.content["summary"]):
        print_table(f"{title} in %", columns, table, footer=int(len(table) > 1))
    console.print(f"mean ± standard deviation over {max(row['draws'] for row in result.content['summary'])} draws")
    for sentence in _skipped_words(result.content["skipped"]):
        console.print(f"note: {sentence}")
    console.print(
        f"low-shot protocol {_state(result)}: {result.folder} (low_shot.json, draws.csv, summary.csv, low_shot.png, "
        f"scores)"
    )
