"""Runs campaigns of population-based training, segment by segment."""

from __future__ import annotations

from typing import Any

from pipelines.runtime.actors import connect
from pipelines.training.options import WORK
from pipelines.tuning.campaign_run import CampaignRun
from pipelines.tuning.driver import AGAIN, Driver
from pipelines.tuning.population import STATE, PopulationCampaign, first_segments, next_segments
from pipelines.tuning.records import read_record
from pipelines.tuning.space import draw, key_of
from unianom import files
from unianom.methods import METHODS


class PopulationDriver(Driver[PopulationCampaign]):
    """Trains a population segment by segment."""

    def run(self) -> CampaignRun:
        options, campaign = self.options, self.campaign
        default = self.default()
        drawn = draw(self.trial_space, self.count(), options.seed)
        others = [values for values in drawn if key_of(values) != key_of(default)]
        members = first_segments([default, *others][: self.count()], options.population.segments)
        fresh = False
        before: list[dict[str, Any]] = []
        for done in range(1, options.population.segments + 1):
            missing = [values for values in members if read_record(campaign.trial_folder(values)) is None]
            budget = self.budget()
            if missing and not budget.stop_all():
                connect(options.runtime, dashboard=True)
                self.prepare()
                for _ in range(1 + AGAIN):
                    self.run_trials(missing, before, budget)
                    if not self.crashed() or budget.stop_all():
                        break
                fresh = True
            records = [read_record(campaign.trial_folder(values)) for values in members]
            if not all(records):
                break  # out of budget, or crashed: the same command goes on
            for record in before:  # no segment goes on from them any more
                for name in (STATE, WORK):
                    files.remove(files.join(campaign.folder, "trials", record["trial"], name))
            before = [record for record in records if record is not None]
            if all(record["objective"] is None for record in before):
                break  # there is none to go on from
            if done < options.population.segments:
                objectives = [record["objective"] for record in before]
                changing = METHODS[campaign.name].schedulable_options  # type: ignore[attr-defined]
                members = next_segments(
                    members, objectives, done, self.trial_space, changing, options.population, options.seed
                )
        self.sweep()
        return self.collect(len(members), fresh)
