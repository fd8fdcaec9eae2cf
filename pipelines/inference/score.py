"""jobs/score.py: shards, or images from where they lie, and a model → scores.

    shards or a listing ─▶ ranges of rows ─▶ actors (`range_scorer`) ─▶ score parts ─▶ manifest

A score part is of one range; its bytes depend on the plan alone, so whoever writes it, and however often, the folder
ends up the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.data.engine import choose_engine, say_precision
from pipelines.inference.options import ScoreOptions
from pipelines.inference.range_scorer import PASSED, STAGES, RangeScorer
from pipelines.inference.score_manifest import check_unscored, commit_scores, score_part
from pipelines.inference.scored_images import scored_images
from pipelines.inference.staged_scorer import scoring_stages
from pipelines.runtime import outputs
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.models import load_model
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.progress import Progress
from pipelines.runtime.stage_times import StageTimes, fused_sentence
from pipelines.runtime.stages import run_staged
from pipelines.runtime.tasks import has_separate_stages, run_tasks
from unianom import files
from unianom.data.row_ranges import RowRange
from unianom.data.shards import ScoreSet
from unianom.errors import ModelError
from unianom.execution import CPU
from unianom.options import to_plain
from unianom.thresholds import DecisionRule, threshold_of


@dataclass(frozen=True)
class ScoreResult:
    """Result of a scoring.

    Attributes:
        scores: the finished score set.
        fresh: whether this run wrote anything.
        images_per_second: of this run; 0 if it had nothing to do.
        stages: what the stages of this run took, and which of them took most or was waited for, in words.
    """

    scores: ScoreSet
    fresh: bool
    images_per_second: float
    stages: str


def score(options: ScoreOptions) -> ScoreResult:
    """Score, continue an interrupted scoring, or find it done.

    Raises:
        DataError: wrong inputs, nothing to score, an output that is another's, or too many samples without a score.
        ModelError: no usable model, or maps of flagged images of a model that decides nothing.
    """
    model_set = ModelSet.open(options.model)
    models = model_set.descriptions()
    images = scored_images(options, model_set, models)
    maps = options.maps or images.maps
    if maps == "flagged":
        _check_decisions(model_set, models, images.categories)
    runtime = choose_engine(
        options.runtime,
        images.examples(),
        images.count() // len(models),
        lambda: load_model(model_set.folders[0], CPU).method,
    )
    execution = replace(runtime.execution, search=options.search)
    say_precision(models, execution)
    plan = {
        **images.plan,
        "models": [model["digest"] for model in models],
        "maps": maps,
        "batch_size": options.batch_size,
        "fold_batch_norm": options.fold_batch_norm,
        "limits": to_plain(options.limits),
        **execution.plan,
        **({"search": "device"} if execution.searches_on_device else {}),  # left out before there was a choice
        "threads": runtime.cpus_per_worker,
    }
    output = files.full_uri(options.output)
    inputs = {"model": options.model, **images.inputs}
    with outputs.open_output(output, "score set", plan, inputs=inputs, overwrite=options.overwrite) as digest:
        fresh = not outputs.is_complete(output)
        rate, taken = 0.0, ""
        if fresh:
            shards = images.open(output)
            arguments = {
                "shards": shards,
                "selection": images.selection,
                "model_set": model_set,
                "digests": dict(zip(model_set.folders, plan["models"], strict=True)),
                "output": output,
                "plan": digest,
                "maps": maps,
                "batch_size": options.batch_size,
                "limits": options.limits,
                "execution": execution,
                "threads": runtime.cpus_per_worker,
                "fold": options.fold_batch_norm,
            }
            ranges = shards.ranges(images.selection)
            rate, taken = _write_parts(arguments, models, ranges, runtime)
            commit_scores(output, digest, shards, images.selection, ranges, models, plan)
    scores = ScoreSet.open(output)
    check_unscored(scores, options.max_reject_fraction)
    return ScoreResult(scores, fresh, rate, taken)


def _check_decisions(model_set: ModelSet, models: Sequence[Mapping[str, Any]], categories: Sequence[str]) -> None:
    """Refuse models that decide nothing of a category: which of its images are flagged, nobody can tell."""
    described = dict(zip(model_set.folders, models, strict=True))
    for category in categories:
        folder = model_set.folder_of(category)
        model = described[folder]
        rule = model["decision_rule"]
        known = (
            threshold_of(model, category) is not None if rule is None else DecisionRule.from_dict(rule).knows(category)
        )
        if not known:
            raise ModelError(
                f"{folder} has no threshold for category '{category}', so none of its images comes to review or fails "
                f"and --maps flagged would keep no map; give --maps all, or store thresholds in the model by "
                f"jobs/decide.py --write_back"
            )


def _write_parts(
    arguments: dict[str, Any],
    models: Sequence[Mapping[str, Any]],
    ranges: Sequence[RowRange],
    runtime: RuntimeOptions,
) -> tuple[float, str]:
    """Write the score parts that are not there yet; return the images per second, and what the stages took."""
    names = {score_part(within.part, arguments["plan"], within.first): within for within in ranges}
    records = outputs.part_records(arguments["output"], names)
    done = sum(record["rows"] for record in records.values())
    if done:
        print(f"continuing: {done} samples are scored already")
    tasks = [to_plain(within) for name, within in names.items() if name not in records]
    images = arguments["shards"].count(arguments["selection"]) - done
    progress = Progress("score", images)
    taken = StageTimes()
    separate = has_separate_stages(runtime, images)
    results = (
        run_staged(scoring_stages(arguments, models), tasks, runtime)
        if separate
        else run_tasks(RangeScorer, arguments, tasks, runtime, images)
    )
    fused: Counter[str] = Counter()
    for record in results:
        progress.advance(record["rows"])
        if separate:
            taken.add(record)
        else:
            fused.update(record[STAGES])
    rate = progress.close()
    if separate and tasks:
        return rate, taken.sentence(images)
    return rate, fused_sentence({part: fused[part] for part in PASSED if part in fused}, images)
