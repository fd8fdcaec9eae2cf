"""Tasks of the semantic protocol: choices of normal classes, and a bank for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluation.bank_protocol import BankScorer, scores_file, spread
from pipelines.evaluation.metric_tables import plain
from pipelines.evaluation.options import SemanticOptions
from unianom import __version__
from unianom.configs import method_of
from unianom.data.layouts.class_lists import CIFAR_10, CIFAR_100, SPECIES_60, SPECIES_60_SPLITS
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import ShardSet
from unianom.errors import DataError, OptionError
from unianom.metrics.image import image_metrics
from unianom.options import to_plain


def choose_tasks(options: SemanticOptions, classes: Sequence[str]) -> dict[str, list[str]]:
    """Return the normal classes of every task, by its name.

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


def classes_of(shards: ShardSet) -> list[str]:
    """Return the classes of a data set without labels, sorted.

    Raises:
        DataError: the shards carry labels, are of several categories, or have too few classes.
    """
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

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Fit, score and measure one task."""
        semantic_task = self.tasks[task["number"]]
        normal = set(semantic_task["classes"])
        chosen = frozenset(row["sample_id"] for row in self.reader.samples("train") if row["defect"] in normal)
        if not chosen:
            raise DataError(f"task '{semantic_task['task']}' has no training image of {', '.join(sorted(normal))}")
        made = self.fit(chosen)
        rows = [{**row, "label": NORMAL if row["defect"] in normal else ANOMALOUS} for row in self.score()]
        metrics = image_metrics([row["score"] for row in rows], [row["label"] for row in rows])
        shown = ("image_auroc", "image_ap", "n_images", "n_anomalous")
        record = {**semantic_task, **made, **{key: plain(metrics[key]) for key in shown}}
        return self.commit(semantic_task["number"], [{"task": semantic_task["task"], **row} for row in rows], record)


def semantic_content(
    options: SemanticOptions, shards: ShardSet, tasks: Mapping[str, Sequence[str]], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the content of semantic.json: what was measured of each task, and the means."""
    columns = ("task", "image_auroc", "image_ap", "n_images", "n_anomalous", "images", "patches", "bank_rows")
    rows = [{key: record[key] for key in columns} for record in records]
    mean = {
        key: spread([row[key] for row in rows if row[key] is not None])["mean"] for key in ("image_auroc", "image_ap")
    }
    return {
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
