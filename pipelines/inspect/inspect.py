"""jobs/inspect_.py: a folder of images → shards, models, scores, decisions, and one report on them all.

    folder ─▶ layout ─▶ shards ─┬─▶ model ─▶ scores ─▶ evaluation, decisions ─┬─▶ report.html
                                └─▶ the same for every other method ──────────┘

Every step is what its own job does, in a folder of its own below the output, so a run that was broken off continues,
and any step may be taken further by its job.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.options import EvaluateOptions
from pipelines.inference.options import ScoreOptions
from pipelines.inference.score import score
from pipelines.inspect.corpus import Layout, find_layout, ingest_folder
from pipelines.inspect.decisions import write_decisions
from pipelines.inspect.model import Recipe, fit, read_recipes
from pipelines.inspect.options import InspectOptions
from pipelines.reporting.evaluation_report import print_evaluation
from pipelines.reporting.html import write_report
from pipelines.reporting.options import ReportOptions
from pipelines.runtime import outputs
from pipelines.runtime.cli import console
from pipelines.runtime.model_set import ModelSet
from unianom import files
from unianom.data.schema import ANOMALOUS
from unianom.data.shards import Selection, ShardSet


@dataclass(frozen=True)
class Inspected:
    """What one method made of a folder.

    Attributes:
        name: of the method, or of the model that was given.
        model, scores, decisions: model folder, score set and CSV file.
        evaluation: folder; None without labels.
    """

    name: str
    model: str
    scores: str
    decisions: str
    evaluation: str | None


def inspect(options: InspectOptions) -> str:
    """Inspect a folder, or continue; print what comes of it and return the path of the report.

    Raises:
        OptionError: the layout cannot be told, or options are wrong.
        ModelError: no usable model where one was given.
        DataError: there is nothing to learn from, an image too many cannot be read, or the output is another's.
        WeightsError: weights are missing; says what to install.
    """
    start = time.monotonic()
    root = files.full_uri(options.output or f"inspected/{files.safe_name(options.source.rstrip('/').split('/')[-1])}")
    _say(f"images in {options.source}")
    layout = find_layout(options)
    if options.model is not None:
        ModelSet.open(options.model).descriptions()
    recipes = [] if options.model is not None else read_recipes(options)  # wrong ones show before anything is written
    plan = {
        "source": files.full_uri(layout.source),
        "layout": [layout.name, layout.options],
        "methods": list(options.methods),
        "recipes": list(options.recipes),
        "model": None if options.model is None else files.full_uri(options.model),
        "target_fpr": options.target_fpr,
    }
    inputs = {"source": options.source, "model": options.model}
    with outputs.open_output(root, "inspection", plan, inputs=inputs, overwrite=options.overwrite):
        report = _inspect(options, layout, root, recipes)
    console.print(f"time:       {time.monotonic() - start:.0f} s")
    return report


def _inspect(options: InspectOptions, layout: Layout, root: str, recipes: list[Recipe]) -> str:
    shards = ingest_folder(options, layout, files.join(root, "shards"))
    if options.model is not None:
        done = [_apply("model", options.model, shards, root, options)]
    else:
        done = []
        for recipe in recipes:
            _say(f"{recipe.method}: learn what is normal")
            model = fit(recipe, shards, files.join(root, recipe.method, "model"), options)
            done.append(_apply(recipe.method, model, shards, root, options))
    report = write_report(_report_options(done, shards, root, options))
    console.print(f"\nreport:     {report}")
    for each in done:
        console.print(f"decisions:  {each.decisions}")
    if options.model is None:
        console.print(f"new images: unianom inspect NEW_IMAGES --model {done[0].model}")
    return report


def _apply(name: str, model: str, shards: ShardSet, root: str, options: InspectOptions) -> Inspected:
    """Score the images that the model has not learned from, evaluate if there are labels, and write the decisions."""
    splits = ("test",) if options.model is None else ()
    made = Inspected(
        name=name,
        model=model,
        scores=files.join(root, name, "scores"),
        decisions=files.join(root, name, "decisions.csv"),
        evaluation=files.join(root, name, "evaluation") if shards.count(Selection(splits, (), (ANOMALOUS,))) else None,
    )
    _say(f"{name}: score")
    scores = score(
        ScoreOptions(
            model,
            shards.uri,
            output=made.scores,
            splits=splits,
            maps="all",
            max_reject_fraction=options.max_reject_fraction,
            overwrite=options.overwrite,
            limits=options.limits,
            runtime=options.runtime,
        )
    ).scores
    counts = write_decisions(scores, made.decisions)
    console.print("decisions: " + ", ".join(f"{count:,} {decision}" for decision, count in counts.items()))
    if made.evaluation is not None:
        content = evaluate(
            EvaluateOptions(
                made.scores,
                shards.uri,
                made.evaluation,
                overwrite=options.overwrite,
                runtime=options.runtime,
                tracking=options.tracking,
            )
        )
        print_evaluation(content)
    return made


def _report_options(done: list[Inspected], shards: ShardSet, root: str, options: InspectOptions) -> ReportOptions:
    """Return the options of a report on all methods; of the first one's scores where there are no labels."""
    evaluations = tuple(each.evaluation for each in done if each.evaluation is not None)
    return ReportOptions(
        evaluations=evaluations,
        names=tuple(each.name for each in done) if evaluations else (),
        scores=None if evaluations else done[0].scores,
        shards=None if evaluations else shards.uri,
        output=files.join(root, "report.html"),
        gallery=options.gallery,
        overwrite=True,
        tracking=options.tracking,
    )


def _say(title: str) -> None:
    console.print(f"\n{title}", style="bold")
