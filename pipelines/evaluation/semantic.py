"""jobs/semantic.py: some classes of a data set are normal, all others are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.evaluation.bank_protocol import SECTION, ProtocolResult, checked, protocol_plan, run_banks
from pipelines.evaluation.embeddings import Side
from pipelines.evaluation.options import SemanticOptions
from pipelines.evaluation.semantic_tasks import TaskScorer, choose_tasks, classes_of, semantic_content
from pipelines.reporting.semantic_report import semantic_section, task_figure
from pipelines.runtime import outputs
from pipelines.runtime.tracking import scope, track
from pipelines.training.per_category import inputs_of
from unianom import files
from unianom.data.shards import Selection, ShardSet
from unianom.options import to_plain


def semantic(options: SemanticOptions) -> ProtocolResult:
    """Run all tasks, continue an interrupted run, or find it done.

    Args:
        options: one of `protocol_options(SemanticOptions)`.

    Raises:
        DataError: the shards carry labels, are of several categories, or have no class.
        OptionError: see `choose_tasks` and `embed_once`.
    """
    shards = ShardSet.open(options.shards)
    classes = classes_of(shards)
    tasks = choose_tasks(options, classes)
    sides: dict[Side, Selection] = {"train": Selection(("train",)), "test": Selection(("test",))}
    options = checked(options, shards, sides)
    plan = protocol_plan(options, shards, protocol="semantic", tasks=tasks)
    output = files.full_uri(options.output)
    inputs = {"shards": options.shards, **inputs_of(options.method)}
    with (
        outputs.open_output(output, "semantic protocol", plan, inputs=inputs, overwrite=options.overwrite) as digest,
        track(options.tracking, "semantic", output, to_plain(options), plan=digest) as run,
    ):
        fresh = not outputs.is_complete(output)
        if fresh:
            banks = [{"number": n, "task": task, "classes": normal} for n, (task, normal) in enumerate(tasks.items())]
            records = run_banks(TaskScorer, options, shards, sides, output, digest, banks, "semantic tasks")
            _write(output, semantic_content(options, shards, tasks, records), shards.categories)
        content = files.read_json(files.join(output, "semantic.json"))
        run.metrics({f"{scope(row['task'])}/image_auroc": row["image_auroc"] for row in content["tasks"]})
        run.metrics({f"mean/{key}": value for key, value in content["mean"].items()})
        run.artifacts({"tasks.csv": files.read_bytes(files.join(output, "tasks.csv"))})
        run.json("semantic.json", content)
        run.figures({"semantic.png": files.read_bytes(files.join(output, "semantic.png"))})
    return ProtocolResult(output, fresh, content)


def _write(output: str, content: dict[str, Any], categories: Sequence[str]) -> None:
    """Write figure, tables and section, the manifest last."""
    mean, rows = content["mean"], content["tasks"]
    files.write_bytes(files.join(output, "semantic.png"), task_figure(rows, mean["image_auroc"]))
    files.write_bytes(files.join(output, "tasks.csv"), files.csv_bytes([*rows, {"task": "mean", **mean}]))
    files.write_json(files.join(output, SECTION), semantic_section(content, categories))
    files.write_json(files.join(output, "semantic.json"), content)
    outputs.finish(output, {"kind": "semantic protocol", "tasks": len(rows)})
