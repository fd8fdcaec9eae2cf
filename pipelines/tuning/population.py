"""Population-based training (Jaderberg et al., arXiv 1711.09846): options that change while a method is trained.

A population is trained in segments of equal length. After each, the worst members go on from the state of one of the
best, with its options changed a little; the others go on as they are. What a member was is a list of phases, so its
recipe trains the same again with jobs/train.py, from the beginning.

Segments are trials of their own with a record, so an interrupted population goes on where it was; and which member
follows which depends on seed and objectives alone, not on who ended first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.training.job import Segment
from pipelines.training.options import WORK, Phase, TrainingOptions
from pipelines.tuning.dimensions import Choice, Dimension
from pipelines.tuning.objective import OBJECTIVE
from pipelines.tuning.options import PopulationOptions
from pipelines.tuning.records import LATENCY, MEMORY, RECORD, read_reports, seconds_since, trial_id
from pipelines.tuning.statuses import CARRIED
from pipelines.tuning.trained_trials import TrainedCampaign
from pipelines.tuning.trial import TrialContext
from unianom import files
from unianom.options import to_plain

PHASES, UNTIL, PARENT = "_phases", "_until", "_parent"
"""What the values of a segment hold beside options: its phases, the share of the training that it ends at, and the
trial that it goes on from."""

STATE = "state.pt"


@dataclass(frozen=True)
class PopulationCampaign(TrainedCampaign):
    """A campaign of population-based training.

    Attributes:
        repeats: steps that take the same batch, see `BatchSpec`.
    """

    repeats: int = field(default=1, kw_only=True)

    def config_of(self, values: Mapping[str, Any]) -> Any:
        return super().config_of({name: value for name, value in values.items() if not name.startswith("_")})

    def fit_options(self, values: Mapping[str, Any]) -> TrainingOptions:
        phases = tuple(Phase(phase["start"], phase["method"]) for phase in values.get(PHASES, ()))
        return dataclasses.replace(self.options, phases=phases)

    def final_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return current_options(values)

    def run(self, values: Mapping[str, Any], folder: str, context: TrialContext) -> dict[str, Any]:
        parent = None
        if values[PARENT] is not None:
            parent = files.join(self.folder, "trials", values[PARENT])
        steps = self.config_of(values).training.steps(len(self.chosen.learn), self.repeats)
        start = None if parent is None else files.join(parent, STATE)
        end = steps if values[UNTIL] == 1 else round(values[UNTIL] * steps)
        segment = Segment(start, end, files.join(folder, STATE))
        self.train(values, folder, context, segment)
        if values[UNTIL] < 1 and not read_reports(folder):
            # its driver died when the segment had ended and before its objective was recorded
            files.remove(files.join(folder, WORK))
            files.remove(segment.state)
            self.train(values, folder, context, segment)
        reports = [*([] if parent is None else files.read_json(files.join(parent, RECORD))["reports"])]
        reports += [report for report in read_reports(folder) if report not in reports]
        if values[UNTIL] == 1:
            record = {**super().run(values, folder, context), "reports": reports}
            files.write_json(files.join(folder, RECORD), record)
            return record
        record = {
            "trial": trial_id(values),
            "status": CARRIED,
            "error": None,
            "values": to_plain(dict(values)),
            "reports": reports,
            "objective": reports[-1][OBJECTIVE],
            "seconds": seconds_since(folder),
            LATENCY: None,
            MEMORY: None,
        }
        files.write_json(files.join(folder, RECORD), record)
        return record


def current_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a segment at its end."""
    options = {name: value for name, value in values.items() if not name.startswith("_")}
    for phase in values.get(PHASES, ()):
        options |= phase["method"]
    return options


def first_segments(members: Sequence[Mapping[str, Any]], segments: int) -> list[dict[str, Any]]:
    """Return the first segments of a population, from the options of its members."""
    return [{**member, PHASES: [], UNTIL: 1 / segments, PARENT: None} for member in members]


def next_segments(
    members: Sequence[Mapping[str, Any]],
    objectives: Sequence[float | None],
    done: int,
    space: Sequence[Dimension],
    changing: Sequence[str],
    options: PopulationOptions,
    seed: int,
) -> list[dict[str, Any]]:
    """Return the segments that follow.

    Args:
        members: values of the last segments.
        objectives: of the members; None for one that failed, which counts as the worst.
        done: how many segments each member has had.
        space: of the options.
        changing: names of those that can change.
        options: how.
        seed: decides, with `done`, all that is random.
    """
    rng = np.random.default_rng([seed, done])
    order = sorted(range(len(members)), key=lambda n: (objectives[n] is not None, objectives[n] or 0.0, -n))
    count = max(1, round(options.share * len(members))) if len(members) > 1 else 0
    failed = [n for n in order if objectives[n] is None]
    worst = {*order[:count], *failed}
    best = [n for n in order[len(order) - max(1, count) :] if n not in worst]
    until = 1.0 if done + 1 == options.segments else (done + 1) / options.segments
    following = []
    for number, values in enumerate(members):
        parent, phases = values, list(values[PHASES])
        if number in worst and best:
            parent = members[best[int(rng.integers(len(best)))]]
            mutable = [dimension for dimension in space if dimension.name in changing]
            changed = explore(mutable, current_options(parent), options, rng)
            phases = [*parent[PHASES], {"start": done / options.segments, "method": changed}]
        following.append({**parent, PHASES: phases, UNTIL: until, PARENT: trial_id(parent)})
    return following


def explore(
    space: Sequence[Dimension], values: Mapping[str, Any], options: PopulationOptions, rng: np.random.Generator
) -> dict[str, Any]:
    """Draw values anew, or near those given; all of the space, so that a phase holds them all."""
    changed = {}
    for dimension in space:
        domain, value = dimension.domain, values[dimension.name]
        up = bool(rng.random() < 0.5)
        if rng.random() < options.resample or (isinstance(domain, Choice) and value not in domain.values):
            changed[dimension.name] = domain.sample(rng)
        elif isinstance(domain, Choice):
            place = domain.values.index(value) + (1 if up else -1)
            changed[dimension.name] = domain.values[min(max(place, 0), len(domain.values) - 1)]
        else:
            moved = value * options.factor if up else value / options.factor
            changed[dimension.name] = domain.rounded(min(max(moved, domain.low), domain.high))
    return changed
