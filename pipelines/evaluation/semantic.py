"""Semantic anomalies: some classes of a data set are normal, all others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
from pipelines.evaluation.options import SemanticOptions
from pipelines.reporting.tables import percent
from pipelines.runtime import outputs
from pipelines.runtime.cli import console, print_table
from pipelines.runtime.tracking import scope, track
from pipelines.training.per_category import inputs_of
from unianom import __version__, files, visual
from unianom.configs import method_of
from unianom.data.layouts.class_lists import CIFAR_10, CIFAR_100, SPECIES_60, SPECIES_60_SPLITS
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.metrics.image import image_metrics
from unianom.options import to_plain


def choose_tasks(options: SemanticOptions, classes: Sequence[str]) -> dict[str, list[str]]:
    """Normal classes of every task, by its name.

    Args:
        options: which tasks.
        classes: those of the data, sorted.

    Raises:
        OptionError: a task names a class that is not there, all of them, or none.
    """
    if options.normal_classes:
        wanted: dict[str, list[Any]] = dict(options.normal_classes)
    elif options.tasks == "one_vs_rest":
        wanted = {name: [name] for name in classes}
    elif options.tasks == "cifar10_splits":
        _require_classes(classes, CIFAR_10, options.tasks)
        wanted = {
            "0-4": list(CIFAR_10[:5]),
            "5-9": list(CIFAR_10[5:]),
            "evens": list(CIFAR_10[::2]),
            "odds": list(CIFAR_10[1::2]),
        }
    elif options.tasks == "cifar100_superclasses":
        _require_classes(classes, [name for names in CIFAR_100.values() for name in names], options.tasks)
        wanted = {name: list(names) for name, names in CIFAR_100.items()}
    else:
        _require_classes(classes, SPECIES_60, options.tasks)
        wanted = {name: [SPECIES_60[n] for n in numbers] for name, numbers in SPECIES_60_SPLITS.items()}
    tasks = {}
    for task, members in wanted.items():
        normal = {_class_named(member, classes, task) for member in members}
        if not 0 < len(normal) < len(classes):
            raise OptionError(
                f"task '{task}' makes {len(normal)} of {len(classes)} classes normal; name at least one, and not all"
            )
        tasks[task] = sorted(normal)
    return tasks


def _require_classes(classes: Sequence[str], expected: Sequence[str], tasks: str) -> None:
    if sorted(classes) != sorted(expected):
        raise OptionError(
            f"tasks={tasks} is defined on {len(expected)} classes ({', '.join(sorted(expected)[:3])}, …), which these "
            f"shards do not hold; they hold {len(classes)} ({', '.join(classes[:3])}, …)"
        )


def _class_named(member: int | str, classes: Sequence[str], task: str) -> str:
    if str(member) in classes:  # a class may be named by a number
        return str(member)
    if isinstance(member, int) and 0 <= member < len(classes):
        return classes[member]
    raise OptionError(f"normal_classes.{task}: there is no class {member!r}; classes are {', '.join(classes)}")


def semantic(options: Any) -> ProtocolResult:
    """Run all tasks, continue an interrupted run, or find it done.

    Args:
        options: one of `protocol_options(SemanticOptions)`.

    Raises:
        DataError: the shards carry labels, are of several categories, or have no class.
        OptionError: see `choose_tasks` and `embed_once`.
    """
    shards = ShardSet.open(options.shards)
    classes = _classes(shards)
    tasks = choose_tasks(options, classes)
    plan = _plan(options, shards, protocol="semantic", tasks=tasks)
    output = files.full_uri(options.output)
    inputs = inputs_of(options.shards, options.method)
    with (
        outputs.open_output(output, "semantic protocol", plan, inputs=inputs, overwrite=options.overwrite) as digest,
        track(options.tracking, "semantic", output, to_plain(options), plan=digest) as run,
    ):
        fresh = not outputs.is_complete(output)
        if fresh:
            sides: dict[Side, Selection] = {"train": Selection(("train",)), "test": Selection(("test",))}
            units = [{"number": n, "task": task, "classes": normal} for n, (task, normal) in enumerate(tasks.items())]
            records = run_banks(TaskScorer, options, shards, sides, output, digest, units, "semantic tasks")
            _write_semantic(output, options, shards, tasks, records)
        content = files.read_json(files.join(output, "semantic.json"))
        run.metrics({f"{scope(row['task'])}/image_auroc": row["image_auroc"] for row in content["tasks"]})
        run.metrics({f"mean/{key}": value for key, value in content["mean"].items()})
        run.artifacts({"tasks.csv": files.read_bytes(files.join(output, "tasks.csv"))})
        run.json("semantic.json", content)
        run.figures({"semantic.png": files.read_bytes(files.join(output, "semantic.png"))})
    return ProtocolResult(output, fresh, content)


def _classes(shards: ShardSet) -> list[str]:
    if len(shards.categories) > 1:
        raise DataError(
            f"{shards.uri} holds the categories {', '.join(shards.categories)}; the semantic protocol takes the "
            f"classes of one data set, ingested with --layout class_folders or cifar"
        )
    counts = shards.manifest["counts"]
    if any(row["label"] is not None for row in counts):
        raise DataError(
            f"{shards.uri} says already what is normal; ingest with --layout_options.all_classes true, so that each "
            f"task can choose"
        )
    of_split = {
        split: {row["defect"] for row in counts if row["split"] == split} - {None} for split in ("train", "test")
    }
    if len(of_split["train"]) < 2 or not of_split["test"]:
        raise DataError(f"{shards.uri} needs a training and a test split of two classes or more, each with its name")
    return sorted(of_split["train"] | of_split["test"])


class TaskScorer(BankScorer):
    """A bank of a task's normal classes, and scores of the whole test split. A `PartTask`."""

    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Fit, score and measure one task."""
        unit = self.tasks[unit["number"]]
        normal = set(unit["classes"])
        chosen = frozenset(row["sample_id"] for row in self.reader.samples("train") if row["defect"] in normal)
        if not chosen:
            raise DataError(f"task '{unit['task']}' has no training image of {', '.join(sorted(normal))}")
        made = self.fit(chosen)
        rows = [{**row, "label": NORMAL if row["defect"] in normal else ANOMALOUS} for row in self.score()]
        metrics = image_metrics([row["score"] for row in rows], [row["label"] for row in rows])
        shown = ("image_auroc", "image_ap", "n_images", "n_anomalous")
        record = {**unit, **made, **{key: plain(metrics[key]) for key in shown}}
        return self.commit(unit["number"], [{"task": unit["task"], **row} for row in rows], record)


def _write_semantic(
    output: str, options: Any, shards: ShardSet, tasks: dict[str, list[str]], records: list[dict[str, Any]]
) -> None:
    columns = ("task", "image_auroc", "image_ap", "n_images", "n_anomalous", "images", "patches", "bank_rows")
    rows = [{key: record[key] for key in columns} for record in records]
    mean = {
        key: spread([row[key] for row in rows if row[key] is not None])["mean"] for key in ("image_auroc", "image_ap")
    }
    content = {
        "tool_version": __version__,
        "protocol": "semantic",
        "method": method_of(options.method),
        "config": to_plain(options.method),
        "shards": {"uri": shards.uri, "digest": shards.digest},
        "normal_classes": tasks,
        "tasks": rows,
        "mean": mean,
        "scores": [scores_file(record["number"]) for record in records],
    }
    title = f"Semantic anomalies: {method_of(options.method)} on {', '.join(shards.categories)}"
    files.write_bytes(files.join(output, "semantic.png"), visual.png(_task_figure(rows, mean["image_auroc"])))
    files.write_bytes(files.join(output, "tasks.csv"), files.csv_bytes([*rows, {"task": "mean", **mean}]))
    section = {
        "title": title,
        "text": [
            f"{len(rows)} choices of normal classes, each with a bank of its own; the whole test split is scored, "
            f"images of all other classes are anomalous.",
            f"Mean image AUROC {percent(mean['image_auroc'])} %, backbone {options.method.backbone.name}.",
        ],
        "tables": [{"title": "Image level, in %", "columns": TASK_COLUMNS, "rows": _task_table(rows, mean)}],
        "figures": [{"title": "Image AUROC of each task", "file": "semantic.png"}],
    }
    files.write_json(files.join(output, SECTION), section)
    files.write_json(files.join(output, "semantic.json"), content)
    outputs.finish(output, {"kind": "semantic protocol", "tasks": len(rows)})


TASK_COLUMNS = ["task", "I-AUROC", "I-AP", "test images", "anomalous", "images in the bank", "bank rows"]


def _task_table(rows: Sequence[Mapping[str, Any]], mean: Mapping[str, Any]) -> list[list[str]]:
    counts = ("n_images", "n_anomalous", "images", "bank_rows")
    table = [
        [row["task"], percent(row["image_auroc"]), percent(row["image_ap"]), *(f"{row[key]:,}" for key in counts)]
        for row in rows
    ]
    return [*table, ["mean", percent(mean["image_auroc"]), percent(mean["image_ap"]), *[""] * len(counts)]]


def _task_figure(rows: Sequence[Mapping[str, Any]], mean: float | None) -> Figure:
    """A dot for each task, the highest AUROC on top, and a line at their mean."""
    known = sorted((row for row in rows if row["image_auroc"] is not None), key=lambda row: row["image_auroc"])
    figure = Figure(figsize=(5.2, 0.9 + 0.19 * len(known)), layout="constrained")
    axes = figure.add_subplot()
    values = [100 * row["image_auroc"] for row in known]
    axes.hlines(range(len(known)), 0, values, color=visual.NORMAL_COLOUR, linewidth=0.8, alpha=0.4)
    axes.scatter(values, range(len(known)), color=visual.NORMAL_COLOUR, s=22, zorder=3)
    for height, value in enumerate(values):
        axes.annotate(f"{value:.1f}", (value, height), (5, 0), "data", "offset points", fontsize=6, va="center")
    title = "Image AUROC by normal class"
    if mean is not None:
        axes.axvline(100 * mean, color=visual.ANOMALOUS_COLOUR, linewidth=1)
        title += f"; line: mean {percent(mean)} %"
    axes.set_yticks(range(len(known)), [row["task"] for row in known])
    axes.set_ylim(-0.7, len(known) - 0.3)
    axes.set_xlim(max(0, min([50, *values]) - 4), 104)
    visual.quiet(axes, title, "image AUROC in %", "")
    return figure


def print_semantic(result: ProtocolResult) -> None:
    """Print the table of tasks."""
    content = result.content
    print_table("image level, in %", TASK_COLUMNS, _task_table(content["tasks"], content["mean"]), footer=1)
    console.print(
        f"semantic protocol {_state(result)}: {result.folder} (semantic.json, tasks.csv, semantic.png, scores)"
    )
