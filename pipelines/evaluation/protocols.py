"""Semantic anomalies and few normal images: protocols that fit many banks to the same images.

    embeddings ─▶ actors: a bank for each task or draw, scores of the test split, metrics ─▶ tables, figure, section

The network sees every image once. A unit of work is one bank; it leaves a Parquet file of scores and a record, so a
killed run continues.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.evaluation.embeddings import EmbeddingOptions, EmbeddingReader, EmbeddingSet, Side, embed_once
from pipelines.evaluation.evaluate import plain
from pipelines.reporting.html import percent
from pipelines.runtime import outputs
from pipelines.runtime.actors import run_unfinished
from pipelines.runtime.cli import console, print_table
from pipelines.runtime.models import load_model
from pipelines.runtime.progress import Progress
from pipelines.runtime.tracking import scope, track
from pipelines.training.memory_bank import build_bank
from pipelines.training.per_category import inputs_of, weights_digest
from unianom import __version__, files, visual
from unianom.data.image import decode_mask, prepare_mask
from unianom.data.layouts.class_lists import CIFAR_10, CIFAR_100, SPECIES_60, SPECIES_60_SPLITS
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.splits import few_shot
from unianom.errors import DataError, OptionError
from unianom.methods import METHODS, MemoryMethod
from unianom.metrics.image import image_metrics
from unianom.metrics.pixel import pixel_metrics
from unianom.serialise import to_plain

SECTION = "section.json"
"""What a report shows of a protocol."""


# -- what both protocols share -----------------------------------------------------------------------------------------


def protocol_options(base: type) -> dict[str, type]:
    """The options class of a protocol for every method: those of `base`, and the method's own as `method`."""
    classes: dict[str, type] = {}
    for name, method in METHODS.items():
        fields: list[Any] = [("method", method.Config, field(default_factory=method.Config))]
        cls = dataclasses.make_dataclass(
            f"{base.__name__}_{name}", fields, bases=(base,), frozen=True, namespace={"__post_init__": _check}
        )
        summary, arguments = (base.__doc__ or "").split("\n\n    Args:\n", 1)
        inherited = (EmbeddingOptions.__doc__ or "").split("Args:\n", 1)[1].rstrip()
        documented = f"{inherited}\n{arguments.rstrip()}\n        method: the method's own options."
        cls.__doc__ = f"{summary}\n\nArgs:\n{re.sub('(?m)^    ', '', documented)}"
        classes[name] = cls
    return classes


def method_name(options: Any) -> str:
    """The method that an options class of `protocol_options` belongs to."""
    return next(name for name, method in METHODS.items() if method.Config is type(options.method))


def _check(options: Any) -> None:
    super(type(options), options).__post_init__()
    name = method_name(options)
    if not issubclass(METHODS[name], MemoryMethod):
        memory = ", ".join(sorted(n for n, method in METHODS.items() if issubclass(method, MemoryMethod)))
        raise OptionError(
            f"{name} is trained, so it cannot be fitted to embedded images; {options.otherwise} ({memory})"
        )


@dataclass(frozen=True)
class ProtocolResult:
    """What a protocol found.

    Attributes:
        folder: where it lies.
        fresh: whether this run wrote it.
        content: of its JSON file.
    """

    folder: str
    fresh: bool
    content: dict[str, Any]


def scores_file(number: int) -> str:
    """Name of the file of scores of one bank."""
    return f"scores-{number:05d}.parquet"


KINDS = {"score": pa.float32(), "label": pa.int8(), "shots": pa.int32(), "seed": pa.int32()}
"""Types of the columns of scores that are not text."""


class BankScorer:
    """Fits one bank to embedded images and scores embedded test images with it. What the units of both protocols are.

    Args:
        embedded: the images.
        config: the method's options.
        batch_size: images scored at once.
        output: folder of the results.
        plan: digest of the plan.
        tasks: what each unit is about, by its number; units themselves travel as numbers, since Ray Data would turn
            their lists into arrays.
    """

    def __init__(
        self,
        embedded: EmbeddingSet,
        config: Any,
        batch_size: int,
        output: str,
        plan: str,
        tasks: Sequence[dict[str, Any]],
    ) -> None:
        method = load_model(embedded.encoder, "cpu").method
        assert isinstance(method, MemoryMethod)
        self.method, self.config, self.output, self.plan = method, config, output, plan
        self.tasks = tasks
        self.reader = EmbeddingReader(embedded)
        self._batch_size = batch_size

    def fit(self, chosen: frozenset[str]) -> dict[str, Any]:
        """Build the bank of some training images; tells how large it is."""
        patches = self.reader.patches_of(chosen)
        self.method.bank, _ = build_bank(patches, self.config.bank)
        self.method.check_bank(self.config)
        return {"images": len(chosen), "patches": patches.rows, "bank_rows": self.method.bank.rows}

    def score(
        self, see: Callable[[dict[str, Any], np.ndarray], None] | None = None, categories: tuple[str, ...] = ()
    ) -> list[dict[str, Any]]:
        """Score test images.

        Args:
            see: takes every image and its S×S anomaly map, which is not kept.
            categories: those to score; empty for all.

        Returns:
            What is known of each image, and its `score`.
        """
        scored = []
        for rows, embedding in self.reader.batches(self._batch_size, categories):
            found = self.method.score_patches(embedding)
            scores = found.score.float().numpy()
            for number, (row, value) in enumerate(zip(rows, scores, strict=True)):
                if not np.isfinite(value):
                    raise DataError(f"{row['sample_id']} got the score {value}; check the weights and the precision")
                scored.append({**row, "score": float(value)})
                if see is not None:
                    see(row, found.anomaly_map[number].float().numpy())
        return scored

    def commit(self, number: int, rows: list[dict[str, Any]], record: dict[str, Any]) -> dict[str, Any]:
        """Write the scores of a unit, then its record."""
        name = scores_file(number)
        table = pa.Table.from_pylist(rows)
        table = table.cast(pa.schema([(column, KINDS.get(column, pa.string())) for column in table.column_names]))
        with files.open_atomic(files.join(self.output, name)) as handle:
            pq.write_table(table, handle, compression="zstd")
        record = {"plan": self.plan, "name": name, **record}
        outputs.commit_part(self.output, name, record)
        return record


def _run_banks(
    worker: type,
    options: Any,
    shards: ShardSet,
    sides: dict[Side, Selection],
    output: str,
    plan: str,
    tasks: Sequence[dict[str, Any]],
    words: str,
) -> list[dict[str, Any]]:
    """Embed the images of both sides, then fit and score a bank for each task; the tasks' records, in their order."""
    arguments = {
        "embedded": embed_once(method_name(options), options.method, options, shards, sides),
        "config": options.method,
        "batch_size": options.batch_size,
        "output": output,
        "plan": plan,
        "tasks": tasks,
    }
    units = {scores_file(task["number"]): {"number": task["number"]} for task in tasks}
    runtime = dataclasses.replace(options.runtime, gpus_per_worker=0)
    records, _ = run_unfinished(worker, arguments, units, output, runtime, Progress(words, len(units), "banks"))
    return list(records.values())


def _plan(options: Any, shards: ShardSet, **own: Any) -> dict[str, Any]:
    """What the results depend on."""
    return {
        "tool": __version__,
        "method": method_name(options),
        "config": to_plain(options.method),
        "weights": weights_digest(options.method.backbone.weights),
        "shards": shards.digest,
        "batch_size": options.batch_size,
        "limits": to_plain(options.limits),
        "device": options.runtime.device,
        "threads": options.runtime.cpus_per_worker,
        **own,
    }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation (n − 1 in the denominator) of some values; None where there are too few."""
    mean = math.fsum(values) / len(values) if values else None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": mean, "sd": deviation}


# -- semantic anomalies ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SemanticOptions(EmbeddingOptions):
    """Semantic anomaly detection: some classes are normal, all others anomalous; a bank for every choice of classes.

    Args:
        tasks: choices of normal classes. "one_vs_rest" makes each class normal in turn (CIFAR-10, the superclasses of
            CIFAR-100 as its layout reads them, ImageNet-30); "cifar10_splits" are classes 0 to 4, 5 to 9, the even and
            the odd ones; "cifar100_superclasses" joins the 100 fine classes to 20; "species60_splits" are the five
            published choices of 30 classes.
        normal_classes: choices of one's own in place of `tasks`: a name and its classes, by name or by index in
            alphabetical order, such as {pets: [cat, dog], first: [0, 1, 2]}; a number that is the name of a class
            means that class.
    """

    tasks: Literal["one_vs_rest", "cifar10_splits", "cifar100_superclasses", "species60_splits"] = "one_vs_rest"
    normal_classes: dict[str, list[int | str]] = field(default_factory=dict)

    otherwise: ClassVar[str] = (
        "ingest with --layout_options.normal_classes and use jobs/train.py for each choice, or take a memory method"
    )


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
            records = _run_banks(TaskScorer, options, shards, sides, output, digest, units, "semantic tasks")
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
    """A bank of a task's normal classes, and scores of the whole test split. A `UnitWorker`."""

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
        "method": method_name(options),
        "config": to_plain(options.method),
        "shards": {"uri": shards.uri, "digest": shards.digest},
        "normal_classes": tasks,
        "tasks": rows,
        "mean": mean,
        "scores": [scores_file(record["number"]) for record in records],
    }
    title = f"Semantic anomalies: {method_name(options)} on {', '.join(shards.categories)}"
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


def _state(result: ProtocolResult) -> str:
    return "written" if result.fresh else "was complete already"


# -- few normal images -------------------------------------------------------------------------------------------------

LOW_SHOT_METRICS = {
    "image_auroc": "I-AUROC",
    "image_ap": "I-AP",
    "pixel_auroc": "P-AUROC",
    "pixel_ap": "P-AP",
    "aupro": "AUPRO",
}
"""What is measured of every draw, and its short name."""


@dataclass(frozen=True)
class LowShotOptions(EmbeddingOptions):
    """Low-shot anomaly detection: k normal images of each category, drawn several times; all test images are scored.

    Args:
        categories: those to fit and score; empty for all.
        shots: numbers of normal images per category. A category with fewer is left out at that number, and named.
        draws: how often each number is drawn.
        seed: of the first draw; the following have the seeds after it. A draw is that of jobs/train.py with --few_shot,
            this --seed and --threshold.validation_fraction 0.
        per_category: one bank for each category instead of one for all of them.
    """

    categories: tuple[str, ...] = ()
    shots: tuple[int, ...] = (1, 2, 4, 8, 16, 50)
    draws: int = 5
    seed: int = 0
    per_category: bool = True

    otherwise: ClassVar[str] = "use jobs/train.py with --few_shot, once for each draw, or take a memory method"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shots or min(self.shots) < 1 or len(set(self.shots)) < len(self.shots):
            raise OptionError(f"shots={list(self.shots)} must be different numbers of at least 1")
        if self.draws < 1:
            raise OptionError(f"draws={self.draws} must be at least 1")


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
            records = _run_banks(DrawScorer, options, shards, sides, output, digest, units, "low-shot draws")
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
    """A bank of one draw, and metrics of its categories. A `UnitWorker`."""

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
        "method": method_name(options),
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
        "title": f"Few normal images: {method_name(options)}",
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
