"""jobs/low_shot.py: banks of few normal images, drawn several times."""

from __future__ import annotations

from typing import Any

from pipelines.evaluation.bank_protocol import SECTION, ProtocolResult, checked, protocol_plan, run_banks
from pipelines.evaluation.embeddings import Side
from pipelines.evaluation.low_shot_draws import METRICS, DrawScorer, flat_summary, low_shot_content, plan_draws
from pipelines.evaluation.options import LowShotOptions
from pipelines.reporting.low_shot_report import low_shot_section, shot_figure
from pipelines.runtime import outputs
from pipelines.runtime.tracking import scope, track
from pipelines.training.per_category import inputs_of
from unianom import files
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.options import to_plain

PLANNED = ("categories", "shots", "draws", "seed", "per_category")
"""Options of the protocol that the results depend on."""


def low_shot(options: LowShotOptions) -> ProtocolResult:
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
    draws, skipped = plan_draws(shards, options)
    sides: dict[Side, Selection] = {"train": train, "test": test}
    options = checked(options, shards, sides)
    plan = protocol_plan(
        options, shards, protocol="low_shot", **{key: to_plain(getattr(options, key)) for key in PLANNED}
    )
    output = files.full_uri(options.output)
    inputs = {"shards": options.shards, **inputs_of(options.method)}
    with (
        outputs.open_output(output, "low-shot protocol", plan, inputs=inputs, overwrite=options.overwrite) as digest,
        track(options.tracking, "low_shot", output, to_plain(options), plan=digest) as run,
    ):
        fresh = not outputs.is_complete(output)
        if fresh:
            records = run_banks(DrawScorer, options, shards, sides, output, digest, draws, "low-shot draws")
            _write(output, low_shot_content(options, shards, records, skipped))
        content = files.read_json(files.join(output, "low_shot.json"))
        for row in content["summary"]:
            values = {f"{scope(row['category'])}/{key}": row[key]["mean"] for key in METRICS if key in row}
            run.metrics(values, step=row["shots"])
        names = ("draws.csv", "summary.csv")
        run.artifacts({name: files.read_bytes(files.join(output, name)) for name in names})
        run.json("low_shot.json", content)
        run.figures({"low_shot.png": files.read_bytes(files.join(output, "low_shot.png"))})
    return ProtocolResult(output, fresh, content)


def _write(output: str, content: dict[str, Any]) -> None:
    """Write tables, figure and section, the manifest last."""
    summary = content["summary"]
    files.write_bytes(files.join(output, "draws.csv"), files.csv_bytes(content["draws"]))
    files.write_bytes(files.join(output, "summary.csv"), files.csv_bytes(flat_summary(summary)))
    files.write_bytes(files.join(output, "low_shot.png"), shot_figure(summary))
    files.write_json(files.join(output, SECTION), low_shot_section(content))
    files.write_json(files.join(output, "low_shot.json"), content)
    outputs.finish(output, {"kind": "low-shot protocol", "banks": len(content["scores"])})
