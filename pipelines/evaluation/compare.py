"""jobs/compare.py: many evaluations → one comparison: a table for each data set, mean ranks, and published results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluation.comparison import (
    Result,
    comparison_csv,
    comparison_notes,
    metric_keys,
    plain_mean_ranks,
    ranked_groups,
    results_of,
)
from pipelines.evaluation.options import CompareOptions
from pipelines.evaluation.published import PUBLISHED, read_published
from pipelines.reporting.comparison_report import comparison_section, comparison_tables, plain_table
from pipelines.reporting.table_formats import latex, markdown
from pipelines.runtime import outputs
from pipelines.runtime.tracking import track
from unianom import __version__, files
from unianom.errors import DataError
from unianom.options import to_plain

FORMS = ("comparison.csv", "comparison.md", "comparison.tex", "section.json", "comparison.json")
"""Files of a comparison, in the order they are written."""


def compare(options: CompareOptions) -> dict[str, Any]:
    """Compare evaluations and write all forms of the result, or find them written; return the content of
    comparison.json.

    Raises:
        DataError: an evaluation or the file of published results is missing or damaged, or the output holds anything
            else.
    """
    source = options.published or str(PUBLISHED)
    published = read_published(source)
    results: list[Result] = []
    for name, uri in zip(options.labels, options.evaluations, strict=True):
        results += results_of(name, _read_evaluation(uri), published)
    plan = {
        "tool": __version__,
        "evaluations": [files.sha256_file(files.join(uri, "evaluation.json")) for uri in options.evaluations],
        "names": options.labels,
        "published": files.sha256_file(source),
    }
    output = files.full_uri(options.output)
    inputs = {"published": options.published}
    for uri in options.evaluations:
        outputs.check_apart(output, {"evaluations": uri})
    with (
        outputs.open_output(output, "comparison", plan, inputs=inputs, overwrite=options.overwrite),
        track(options.tracking, "compare", output, to_plain(options)) as run,
    ):
        if not files.exists(files.join(output, "comparison.json")):
            _write(output, results, published)
        for result in results:
            prefix = "/".join([result.name, result.dataset, result.protocol, result.scores])
            run.metrics({f"{prefix}/{key}": value for key, value in result.metrics.items()})
        run.artifacts({name: files.read_bytes(files.join(output, name)) for name in FORMS})
        content: dict[str, Any] = files.read_json(files.join(output, "comparison.json"))
    return content


def _write(output: str, results: Sequence[Result], published: Sequence[Mapping[str, Any]]) -> None:
    """Write all forms of the result."""
    plain, mean_ranks = [to_plain(result) for result in results], plain_mean_ranks(results)
    tables = list(comparison_tables(plain, metric_keys(results), ranked_groups(results), mean_ranks))
    notes = comparison_notes(results, published)
    content = {"results": plain, "mean_ranks": mean_ranks, "tables": list(map(plain_table, tables)), "notes": notes}
    forms = {
        "comparison.csv": comparison_csv(results),
        "comparison.md": "\n\n".join(map(markdown, tables)).encode() + b"\n",
        "comparison.tex": "\n\n".join(map(latex, tables)).encode() + b"\n",
        "section.json": files.json_bytes(comparison_section(tables, notes)),
        "comparison.json": files.json_bytes(content),
    }
    for file in FORMS:
        files.write_bytes(files.join(output, file), forms[file])


def _read_evaluation(uri: str) -> dict[str, Any]:
    """Return the content of evaluation.json."""
    path = files.join(uri, "evaluation.json")
    try:
        content: dict[str, Any] = files.read_json(path)
        content["metrics"]["categories"], content["models"]
    except FileNotFoundError as error:
        raise DataError(f"no {path}; give the folder jobs/evaluate.py wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); run jobs/evaluate.py again") from error
    return content
