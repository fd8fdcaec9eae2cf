"""A campaign: the options of a method searched with Ray Tune, without test data.

shards ─▶ held-out normals + synthetic anomalies ─▶ trials on Ray Tune: fit, then thousands of postprocess options
on kept raw outputs ─▶ best setting as a recipe ─▶ tables, figures, MLflow ─▶ all chosen: a diagnosis on test images
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.runtime import outputs
from pipelines.runtime.run_record import Run
from pipelines.runtime.tracking import scope, track
from pipelines.training.per_category import inputs_of
from pipelines.tuning.agreement import ABOUT, DIAGNOSIS, diagnose
from pipelines.tuning.campaign_run import CampaignRun, read_settings
from pipelines.tuning.options import TuneCada, TuneOptions, method_name, output_of, per_category, searched
from pipelines.tuning.planning import campaign_plan, category_groups, check_method, chosen_runtime, make_driver
from pipelines.tuning.recipes import RECIPE
from pipelines.tuning.report import write_agreement, write_report
from pipelines.tuning.results import campaign_content, final_records, record_campaign, write_campaign, write_common
from pipelines.tuning.space import space_of
from unianom import files
from unianom.data.shards import ShardSet
from unianom.errors import DataError
from unianom.options import to_plain


@dataclass(frozen=True)
class TuneResult:
    """What a job found.

    Attributes:
        folder: where it lies.
        fresh: whether a trial ran.
        contents: what the JSON file of each campaign says, by its categories joined with "+".
        recipe: URI of the recipe of the best setting.
        diagnosis: what its JSON file says; None if it was not asked for.
    """

    folder: str
    fresh: bool
    contents: dict[str, dict[str, Any]]
    recipe: str
    diagnosis: dict[str, Any] | None


def tune(options: TuneOptions) -> TuneResult:
    """Run a campaign, continue an interrupted one, or find it done.

    Args:
        options: one of `tune_options()`.

    Raises:
        DataError: no data to compare settings on, no campaign to resume, or every trial failed.
        ModelError: no model to calibrate.
        OptionError: a space that the method refuses, or a cluster that holds no trial.
    """
    name = method_name(options)
    shards = ShardSet.open(options.shards)
    groups = category_groups(options, shards)  # a missing model shows first
    space = space_of(name, searched(options), options.space)
    needs = check_method(options, shards)
    options = replace(options, runtime=chosen_runtime(options, shards))
    output = files.full_uri(output_of(options))
    if options.resume and not files.exists(files.join(output, outputs.PLAN)):
        raise DataError(f"{output} holds no campaign to resume; mend --output, or leave out --resume")
    plan, params = campaign_plan(options, space, shards), {"method_name": name, **to_plain(options)}
    if isinstance(options, TuneCada):
        inputs: dict[str, str | None] = {"model": options.model}
    else:
        inputs = inputs_of(options.method)
    with (
        outputs.open_output(
            output, "campaign", plan, inputs={**inputs, "shards": options.shards}, overwrite=options.overwrite
        ) as digest,
        track(options.tracking, "tune", output, params, plan=digest) as run,
    ):
        ran = {}
        for group in groups:
            folder = files.join(output, "categories", files.safe_name(group[0])) if per_category(options) else output
            ran["+".join(group)] = make_driver(options, shards, group, folder, space, needs, run).run()
        return _write(options, output, ran, run)


def _write(options: TuneOptions, output: str, ran: Mapping[str, CampaignRun], run: Run) -> TuneResult:
    """Choose the best settings; write, draw and record what was found."""
    contents, settings = {}, {}
    for name, one in ran.items():
        settings[name] = read_settings(one)
        contents[name] = campaign_content(one, settings[name], options)
        write_campaign(one, contents[name], settings[name], options)
        write_report(one.campaign.folder, contents[name], settings[name], final_records(one))
        prefix = f"{scope(name)}/" if per_category(options) else ""
        record_campaign(run, one.campaign.folder, contents[name], prefix)
    if per_category(options):
        write_common(output, ran, contents, settings, run)
    diagnosis = _diagnose(options, output, ran, contents, settings, run) if options.diagnose else None
    outputs.finish(output, {"campaigns": {name: content["counts"] for name, content in contents.items()}})
    fresh = any(one.fresh for one in ran.values())
    return TuneResult(output, fresh, contents, files.join(output, RECIPE), diagnosis)


def _diagnose(
    options: TuneOptions,
    output: str,
    ran: Mapping[str, CampaignRun],
    contents: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Sequence[Mapping[str, Any]]],
    run: Run,
) -> dict[str, Any]:
    """Measure all settings on the test split, in the folder `diagnosis`; return what its JSON file says."""
    folder = files.join(output, "diagnosis")
    found = {}
    for name, one in ran.items():
        own = files.join(folder, files.safe_name(name)) if len(ran) > 1 else folder
        found[name], agreement = diagnose(one.campaign, contents[name], settings[name], own, options.runtime)
        picture = write_agreement(own, agreement)
        prefix = f"diagnosis/{name}" if len(ran) > 1 else "diagnosis"
        run.metrics({f"{prefix}/spearman": found[name]["settings"]["spearman"]})
        run.figures({f"{prefix}.png": picture})
    diagnosis = {"about": ABOUT, "campaigns": found}
    files.write_json(files.join(folder, DIAGNOSIS), diagnosis)
    run.json(DIAGNOSIS, diagnosis)
    return diagnosis
