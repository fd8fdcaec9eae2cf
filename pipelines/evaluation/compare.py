"""Many evaluations → one comparison: a table for each data set, mean ranks, and published results where they compare.

Published results come from `published.yaml`. A run is set beside one only if everything that the entry names is as
published; else the comparison says what differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import rankdata

from pipelines.evaluation.evaluate import mean_row
from pipelines.evaluation.options import CompareOptions
from pipelines.reporting.tables import UNDEFINED, percent
from pipelines.runtime import outputs
from pipelines.runtime.cli import console, print_table
from pipelines.runtime.tracking import track
from unianom import __version__, files
from unianom.errors import DataError, OptionError
from unianom.options import flatten, to_plain
from unianom.written import natural, read_yaml, typed

PUBLISHED = Path(__file__).with_name("published.yaml")

ALL = "all"
"""Name of all data sets of an evaluation together."""

METRICS = {
    "image_auroc": "I-AUROC",
    "image_ap": "I-AP",
    "pixel_auroc": "P-AUROC",
    "pixel_ap": "P-AP",
    "dsc": "DSC",
}
"""Compared metrics and their usual short names; AUPRO is added under the name of its variant."""

PROTOCOLS = {"mean": "mean over categories", "union": "union of categories (absolute-unified)"}


@dataclass(frozen=True)
class Result:
    """One line of the comparison: a model on a data set.

    Attributes:
        name: of the evaluation.
        method: of its models.
        dataset: name, or "all".
        protocol: "mean" over categories, or "union" of them.
        scores: "raw" or "calibrated".
        metrics: share by name, with the counts n_images and n_anomalous.
        intervals: lower and upper bound by metric, where the evaluation has them.
        published: source, values in % and differences of the published result nearest to it; None without any.
    """

    name: str
    method: str
    dataset: str
    protocol: str
    scores: str
    metrics: dict[str, Any]
    intervals: dict[str, Any]
    published: dict[str, Any] | None


@dataclass(frozen=True)
class Table:
    """A table as it is shown; `best` holds the row and column numbers of what is printed bold."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()


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
        results += results_of(name, _read(uri), published)
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


FORMS = ("comparison.csv", "comparison.md", "comparison.tex", "section.json", "comparison.json")
"""Files of a comparison, in the order they are written."""


def _write(output: str, results: Sequence[Result], published: Sequence[Mapping[str, Any]]) -> None:
    """Write all forms of the result."""
    content, tables = _content(results, published), list(make_tables(results))
    forms = {
        "comparison.csv": _csv(results),
        "comparison.md": "\n\n".join(map(markdown, tables)).encode() + b"\n",
        "comparison.tex": "\n\n".join(map(latex, tables)).encode() + b"\n",
        "section.json": files.json_bytes(_section(tables, content["notes"])),
        "comparison.json": files.json_bytes(content),
    }
    for file in FORMS:
        files.write_bytes(files.join(output, file), forms[file])


def _read(uri: str) -> dict[str, Any]:
    path = files.join(uri, "evaluation.json")
    try:
        content: dict[str, Any] = files.read_json(path)
        content["metrics"]["categories"], content["models"]
    except FileNotFoundError as error:
        raise DataError(f"no {path}; give the folder jobs/evaluate.py wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); run jobs/evaluate.py again") from error
    return content


def read_published(uri: str) -> list[dict[str, Any]]:
    """Entries of a file of published results, with every optional key filled in.

    Raises:
        DataError: it is missing, no YAML list of such entries, or a key is unknown or missing.
    """
    needed = {"method", "dataset", "protocol", "source", "values"}
    optional: dict[str, Any] = {
        "calibrated": False,
        "trained_on": None,
        "config": {},
        "categories": None,
        "train_images": None,
    }
    try:
        entries = read_yaml(files.read_bytes(uri))
    except FileNotFoundError as error:
        raise DataError(f"no {uri}; give a YAML file of published results") from error
    except yaml.YAMLError as error:
        raise DataError(f"{uri} is no YAML: {' '.join(str(error).split())}; mend it") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{uri} is no list of published results; give one like {PUBLISHED.name} in pipelines")
    for number, entry in enumerate(entries, 1):
        wrong = sorted((needed - set(entry)) | (set(entry) - needed - set(optional)))
        if wrong:
            raise DataError(f"{uri}: entry {number} lacks or does not know {', '.join(wrong)}; mend it")
        for key in _TEXTS.keys() & set(entry):  # a data set may be named 007
            try:
                entry[key] = typed(entry[key], _TEXTS[key])
            except OptionError as error:
                raise DataError(f"{uri}: {key} of entry {number}: {error}; mend it") from error
    entries = natural(entries)
    return [{**optional, **entry, "trained_on": entry.get("trained_on") or [entry["dataset"]]} for entry in entries]


_TEXTS: dict[str, Any] = {"method": str, "dataset": str, "protocol": str, "trained_on": list[str] | None}


# -- results of one evaluation -----------------------------------------------------------------------------------------


def results_of(name: str, evaluation: Mapping[str, Any], published: Sequence[Mapping[str, Any]]) -> Iterator[Result]:
    """Its lines: by data set, and of several data sets together; raw, and calibrated where it has that."""
    for scores in ("raw", "calibrated"):
        block = evaluation if scores == "raw" else evaluation.get("calibrated")
        if block is None:
            continue
        intervals = (evaluation.get("intervals") or {}).get(scores) or {}
        for dataset, rows, metrics, bounds in _data_sets(block, intervals):
            models = _models_of(evaluation, rows)
            for protocol in PROTOCOLS if len(rows) > 1 else ("mean",):
                if metrics.get(protocol) is None:
                    continue
                yield Result(
                    name=name,
                    method=", ".join(sorted({model["method"] for model in models})),
                    dataset=dataset,
                    protocol=protocol,
                    scores=scores,
                    metrics=metrics[protocol],
                    intervals=bounds.get(protocol) or {},
                    published=_nearest(published, evaluation, models, dataset, rows, protocol, scores),
                )


def _data_sets(
    block: Mapping[str, Any], intervals: Mapping[str, Any]
) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any], dict[str, Any]]]:
    """Name, rows of categories, results and intervals by protocol of each data set, then of all of them."""
    metrics = block["metrics"]
    names = list(dict.fromkeys(row["dataset"] for row in metrics["categories"]))
    given = {entry["dataset"]: entry for entry in block.get("datasets") or []}
    whole = {"mean": metrics["mean"], "union": metrics["union"]}
    for name in names:
        rows = [row for row in metrics["categories"] if row["dataset"] == name]
        if len(names) == 1:
            yield name, rows, whole, dict(intervals)
            continue
        found = given.get(name) or {"mean": mean_row(rows), "union": None}  # a union needs the scores, not their means
        alone = rows[0]["category"] if len(rows) == 1 else None
        yield name, rows, found, {"mean": (intervals.get("categories") or {}).get(alone)}
    if len(names) > 1:
        yield ALL, metrics["categories"], whole, dict(intervals)


def _models_of(evaluation: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The models that judged these categories."""
    categories = {row["category"] for row in rows}
    return [model for model in evaluation["models"] if categories & set(model["categories"])] or evaluation["models"]


def _nearest(
    published: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    dataset: str,
    rows: Sequence[Mapping[str, Any]],
    protocol: str,
    scores: str,
) -> dict[str, Any] | None:
    """The published result of the same method, data set and protocol that differs in the fewest ways."""
    of = {row["category"]: row["dataset"] for row in evaluation["metrics"]["categories"]}
    learned = sorted({of.get(category, UNDEFINED) for model in models for category in model["categories"]})
    if all(len(model["categories"]) == 1 for model in models):
        kind, learned = ("one_class" if protocol == "mean" else ""), [dataset]
    else:
        kind = "" if len(models) > 1 else "multi_class" if protocol == "mean" else "absolute_unified"
    candidates = [
        {"source": entry["source"], "values": entry["values"], "differences": _differences(entry, models, rows)}
        for entry in published
        if entry["method"] == models[0]["method"]
        and (entry["dataset"], entry["protocol"]) == (dataset, kind)
        and entry["calibrated"] == (scores == "calibrated")
        and sorted(entry["trained_on"]) == learned
    ]
    return min(candidates, key=lambda found: len(found["differences"]), default=None)


def _differences(
    entry: Mapping[str, Any], models: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """In what a run is not as published."""
    found = []
    for key, wanted in entry["config"].items():
        have = sorted({str(flatten(model["config"]).get(key)) for model in models})
        if have != [str(wanted)]:
            found.append(f"{key} {', '.join(have)} instead of {wanted}")
    variants = {(model.get("calibrator") or {}).get("config", {}).get("variant") for model in models}
    if entry["calibrated"] and variants != {"cada"}:
        found.append(f"calibrated by {', '.join(sorted(map(str, variants)))} instead of cada")
    if any(model["config"]["backbone"]["weights"] == "random" for model in models):
        found.append("random weights")
    if entry["categories"] not in (None, len(rows)):
        found.append(f"{len(rows)} categories instead of {entry['categories']}")
    made = [model["provenance"] for model in models]
    learned = sum((one.get("training") or one.get("bank") or {}).get("images", 0) for one in made)
    if entry["train_images"] not in (None, learned):
        found.append(f"learned from {learned} images instead of {entry['train_images']}")
    if any(one.get("held_out_normals") for one in made):
        found.append(f"{sum(one.get('held_out_normals') or 0 for one in made)} normal images held out")
    if any(one.get("few_shot") for one in made):
        found.append("few-shot")
    return found


# -- ranks and tables --------------------------------------------------------------------------------------------------


def metric_names(results: Sequence[Result]) -> dict[str, str]:
    """Compared metrics that any result has, with their short names."""
    keys = [key for result in results for key, value in result.metrics.items() if value is not None]
    aupro = {key: key.replace("aupro", "AUPRO") for key in keys if key.startswith("aupro")}
    return {key: name for key, name in {**METRICS, **aupro}.items() if key in keys}


def groups(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by data set and protocol; all data sets together come last."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault((result.dataset, result.protocol), []).append(result)
    order = {"mean": 0, "union": 1}
    return dict(sorted(found.items(), key=lambda item: (item[0][0] == ALL, item[0][0], order[item[0][1]])))


def same_images(group: Sequence[Result]) -> bool:
    """Whether all results count as many images and anomalous ones; else they are of different images."""
    return len({(result.metrics.get("n_images"), result.metrics.get("n_anomalous")) for result in group}) == 1


def ranks(group: Sequence[Result], metric: str) -> list[float | None]:
    """Rank of each result, 1 the best, ties sharing their mean; None where undefined or not of the same images."""
    defined = [n for n, result in enumerate(group) if result.metrics.get(metric) is not None]
    found: list[float | None] = [None] * len(group)
    if len(group) < 2 or not same_images(group):
        return found
    for n, rank in zip(defined, rankdata([-group[n].metrics[metric] for n in defined]), strict=True):
        found[n] = float(rank)
    return found


def mean_ranks(results: Sequence[Result], protocol: str) -> tuple[list[str], dict[tuple[str, str], dict[str, float]]]:
    """Mean rank over those data sets in which every model has a rank.

    Returns:
        The data sets, and by name and scores the mean rank of each metric; models without a single such data set are
        left out, so all means are over the same data sets.
    """
    lines = {(result.name, result.scores) for result in results}
    used, collected = [], {line: {} for line in sorted(lines)}  # type: ignore[var-annotated]
    for (dataset, its_protocol), group in groups(results).items():
        if dataset == ALL or its_protocol != protocol or {(r.name, r.scores) for r in group} != lines:
            continue
        if len(group) < 2 or not same_images(group):
            continue
        used.append(dataset)
        for metric in metric_names(group):
            for result, rank in zip(group, ranks(group, metric), strict=True):
                if rank is not None:
                    collected[result.name, result.scores].setdefault(metric, []).append(rank)
    means = {
        line: {metric: float(np.mean(values)) for metric, values in own.items() if len(values) == len(used)}
        for line, own in collected.items()
    }
    return used, means if used else {}


def make_tables(results: Sequence[Result]) -> Iterator[Table]:
    """One table for each data set and protocol, one of mean ranks, and those of published results."""
    for (dataset, protocol), group in groups(results).items():
        shown = metric_names(group)
        rows = [[r.name, r.method, r.scores, *(_cell(r, key) for key in shown)] for r in group]
        best = set()
        for column, key in enumerate(shown, 3):
            best |= {(n, column) for n, rank in enumerate(ranks(group, key)) if rank == min(_known(ranks(group, key)))}
        title = f"{dataset}, {PROTOCOLS[protocol]}, in %"
        yield Table(title, ["model", "method", "scores", *shown.values()], rows, frozenset(best))
    for protocol, words in PROTOCOLS.items():
        used, means = mean_ranks(results, protocol)
        if len(used) > 1:
            shown = {key: name for key, name in metric_names(results).items() if any(key in m for m in means.values())}
            rows = [
                [*line, *(f"{own[k]:.2f}" if k in own else UNDEFINED for k in shown)] for line, own in means.items()
            ]
            yield Table(
                f"mean rank over {', '.join(used)} ({words}); 1 is best", ["model", "scores", *shown.values()], rows
            )
    yield from _published_tables(results)


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None] or [float("nan")]


def _cell(result: Result, metric: str) -> str:
    bounds = result.intervals.get(metric)
    if bounds is None or None in bounds:
        return percent(result.metrics.get(metric))
    return f"{percent(result.metrics.get(metric))} [{percent(bounds[0])}, {percent(bounds[1])}]"


def _published_tables(results: Sequence[Result]) -> Iterator[Table]:
    names = metric_names(results)
    beside, apart = [], []
    for result in results:
        found = result.published
        if found is None:
            continue
        head = [result.name, result.dataset, result.protocol, result.scores]
        if found["differences"]:
            apart.append([*head, found["source"], "; ".join(found["differences"])])
            continue
        for key, value in found["values"].items():
            own = result.metrics.get(key)
            gap = UNDEFINED if own is None else f"{100 * own - value:+.1f}"
            beside.append([*head, names.get(key, key), percent(own), f"{value:g}", gap, found["source"]])
    line = ["model", "data set", "over categories", "scores"]
    if beside:
        columns = [*line, "metric", "here", "published", "difference", "source"]
        yield Table("published results of the same method, protocol and settings, in %", columns, beside)
    if apart:
        yield Table("published results that these runs are not comparable with", [*line, "source", "because"], apart)


def _notes(results: Sequence[Result], published: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before comparing."""
    notes = [
        f"{dataset}: the evaluations are of different images, so they are not ranked"
        for (dataset, protocol), group in groups(results).items()
        if protocol == "mean" and not same_images(group)
    ]
    compared = {(entry["method"], entry["dataset"]) for entry in published}
    without = sorted({r.dataset for r in results if r.published is None and (r.method, r.dataset) not in compared})
    if without:
        notes.append(f"no published results at hand for these methods on {', '.join(without)}")
    return notes


def _content(results: Sequence[Result], published: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "results": [to_plain(result) for result in results],
        "mean_ranks": {
            protocol: {
                "datasets": mean_ranks(results, protocol)[0],
                "models": [
                    {"name": name, "scores": scores, **own}
                    for (name, scores), own in mean_ranks(results, protocol)[1].items()
                ],
            }
            for protocol in PROTOCOLS
        },
        "tables": [
            {"title": t.title, "columns": t.columns, "rows": t.rows, "best": sorted(map(list, t.best))}
            for t in make_tables(results)
        ],
        "notes": _notes(results, published),
    }


# -- forms -------------------------------------------------------------------------------------------------------------


def _csv(results: Sequence[Result]) -> bytes:
    """One line a result, shares from 0 to 1; published values are left empty where they do not compare."""
    shown = metric_names(results)
    lines = []
    placed = {id(r): {k: ranks(g, k)[n] for k in shown} for g in groups(results).values() for n, r in enumerate(g)}
    for result in results:
        found = result.published or {"values": {}, "differences": [], "source": ""}
        line: dict[str, Any] = {
            key: getattr(result, key) for key in ("name", "method", "dataset", "protocol", "scores")
        }
        line |= {key: result.metrics.get(key) for key in ("n_images", "n_anomalous")}
        for key in shown:
            low, high = result.intervals.get(key) or (None, None)
            value = None if found["differences"] else found["values"].get(key)
            line |= {key: result.metrics.get(key), f"{key}_low": low, f"{key}_high": high}
            line |= {
                f"{key}_rank": placed[id(result)][key],
                f"{key}_published": None if value is None else round(value / 100, 6),
            }
        lines.append(line | {"source": found["source"], "not_comparable": "; ".join(found["differences"])})
    return files.csv_bytes(lines)


def markdown(table: Table) -> str:
    """A table in Markdown, with what is best in bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |"

    rows = [
        line([f"**{cell}**" if (n, m) in table.best else cell for m, cell in enumerate(row)])
        for n, row in enumerate(table.rows)
    ]
    return "\n".join([f"**{table.title}**", "", line(table.columns), line(["---"] * len(table.columns)), *rows])


LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
}
"""What LaTeX would not print as it is."""


def latex_text(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def latex(table: Table) -> str:
    """A table in LaTeX, for the package booktabs, with what is best in bold."""

    def line(cells: Sequence[str]) -> str:
        return "    " + " & ".join(cells) + r" \\"

    rows = [
        line([f"\\textbf{{{latex_text(c)}}}" if (n, m) in table.best else latex_text(c) for m, c in enumerate(row)])
        for n, row in enumerate(table.rows)
    ]
    numbers = [all(row[m][:1] in "0123456789+-–" for row in table.rows) for m in range(len(table.columns))]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{latex_text(table.title)}}}",
            f"  \\begin{{tabular}}{{{''.join('r' if number else 'l' for number in numbers)}}}",
            r"    \toprule",
            line([latex_text(column) for column in table.columns]),
            r"    \midrule",
            *rows,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )


def _section(tables: Sequence[Table], notes: Sequence[str]) -> dict[str, Any]:
    """What the report shows of it."""
    shown = [{"title": table.title, "columns": table.columns, "rows": table.rows} for table in tables]
    return {"title": "Comparison", "text": [f"{note}." for note in notes], "tables": shown, "figures": []}


def print_comparison(content: Mapping[str, Any]) -> None:
    """Print all tables."""
    for table in content["tables"]:
        print_table(table["title"], table["columns"], table["rows"])
        console.print()
    for note in content["notes"]:
        console.print(f"note: {note}")
