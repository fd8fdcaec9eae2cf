"""jobs/report.py: evaluations or scores → one HTML file to hand round, which needs nothing beside itself.

    evaluation.json, scores ─▶ what was missed, figures, tables, curves ─┐
                 └─▶ choice of samples ─▶ their images and maps ─────────┼─▶ report.html
    section.json of other jobs ──────────────────────────────────────────┘

Only the images and maps that are shown are read, and those few maps that set the scales of the heat maps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipelines.reporting.evaluation_page import evaluation_page
from pipelines.reporting.inputs import ReportInput, read_inputs
from pipelines.reporting.options import ReportOptions
from pipelines.reporting.scores_page import scores_page
from pipelines.reporting.sections import Section, read_section
from pipelines.runtime import outputs
from pipelines.runtime.tracking import track
from unianom import __version__, files
from unianom.data.shards import ShardSet
from unianom.options import to_plain


def write_report(options: ReportOptions) -> str:
    """Write the report, or find it written; return its path or URI.

    Raises:
        OptionError: nothing to report is given, or the output lies within what is read.
        DataError: no evaluation there, its scores or shards are gone or were changed since, several evaluations are of
            different shards, a section is missing or not what it should be, or the output is anything but such
            a report.
    """
    options.check_given()
    inputs, shards = read_inputs(options)
    sections = [read_section(folder) for folder in options.sections]
    output = files.full_uri(options.output)
    digest = _plan(options, inputs, sections)
    for named in _inputs_by_option(options, inputs, shards):
        outputs.check_apart(output, named)
    for folder in options.sections:
        outputs.check_apart(output, {"sections": folder})
    with (
        outputs.open_file(output, "a report", digest, _made_by, overwrite=options.overwrite) as made,
        track(options.tracking, "report", output, to_plain(options)) as run,
    ):
        if not made:
            make = scores_page if inputs[0].evaluation is None else evaluation_page
            files.write_bytes(output, make(inputs, shards, options.gallery, sections, digest).encode())
        run.artifacts({output.rsplit("/", 1)[-1]: files.read_bytes(output)})
    return output


def _inputs_by_option(
    options: ReportOptions, inputs: Sequence[ReportInput], shards: ShardSet
) -> list[dict[str, str | None]]:
    """Return all folders that are read, by option; the scores and shards that an evaluation names are, too."""
    if options.scores is not None:
        return [{"scores": options.scores, "shards": options.shards}]
    option = "evaluations" if options.evaluations else "evaluation"
    return [
        {option: folder, f"{option}'s scores": entry.scores.uri, f"{option}'s shards": shards.uri}
        for folder, entry in zip(options.evaluations or (options.evaluation,), inputs, strict=True)
    ]


def _plan(options: ReportOptions, inputs: Sequence[ReportInput], sections: Sequence[Section]) -> str:
    """Return the digest of all that the page is made of."""
    return files.digest_of(
        {
            "tool": __version__,
            "inputs": [[entry.name, entry.digest] for entry in inputs],
            "sections": [files.sha256_of(repr(section).encode()) for section in sections],
            "gallery": options.gallery,
        }
    )


def _made_by(page: bytes) -> str | None:
    """Return the digest of the plan that a report names in its head."""
    digest = re.search(rb'<meta name="unianom-plan" content="([0-9a-f]{64})">', page[:4096])
    return None if digest is None else digest[1].decode()
