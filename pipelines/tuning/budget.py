"""What a campaign may spend: hours, and hours times GPUs."""

from __future__ import annotations

import time
from typing import Any

from ray.tune.stopper import Stopper

SPENT = "spent.json"
"""File of a campaign: seconds that it and its trials took so far."""


class Budget(Stopper):
    """Stops all trials once they took too long.

    Args:
        hours: of the campaign; None for no limit.
        gpu_hours: the sum over trials of their hours times `gpus`; None for no limit.
        gpus: of a trial.
        seconds, trial_seconds: spent before, by the campaign and by all its trials.
    """

    def __init__(
        self, hours: float | None, gpu_hours: float | None, gpus: float, seconds: float, trial_seconds: float
    ) -> None:
        self._hours, self._gpu_hours, self._gpus = hours, gpu_hours, gpus
        self._before, self._trials_before = seconds, trial_seconds
        self._start = time.monotonic()
        self._seconds: dict[str, float] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self._seconds[trial_id] = result.get("time_total_s", 0.0)  # a trial may end without a report
        return False

    def stop_all(self) -> bool:
        spent = self.spent()
        if self._hours is not None and spent["seconds"] >= 3600 * self._hours:
            return True
        return self._gpu_hours is not None and spent["trial_seconds"] * self._gpus >= 3600 * self._gpu_hours

    def spent(self) -> dict[str, float]:
        """Return the seconds of the campaign and of all its trials."""
        return {
            "seconds": self._before + time.monotonic() - self._start,
            "trial_seconds": self._trials_before + sum(self._seconds.values()),
        }
