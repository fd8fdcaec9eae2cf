"""What the workers of a training report, shown as progress and recorded in MLflow."""

from __future__ import annotations

from typing import Any

from pipelines.runtime.progress import Progress
from pipelines.runtime.run_record import Run
from unianom.methods.trained import LOSS


class TrainingReport:
    """Shows and records losses, rates, validations and notes.

    Args:
        iterations: steps of the training.
        run: where metrics are recorded.
        prefix: of their names.
    """

    def __init__(self, iterations: int, run: Run, prefix: str) -> None:
        self._run, self._prefix = run, prefix
        self._progress = Progress("train", iterations, "steps")

    def put(self, event: dict[str, Any]) -> None:
        """Take one report of `pipelines.training.worker.work`."""
        step = event["step"]
        named = {
            **{f"loss/{name}" if name != LOSS else LOSS: value for name, value in event.get("losses", {}).items()},
            **event.get("rates", {}),
            **{f"validation/{name}": value for name, value in event.get("validation", {}).items()},
        }
        self._run.metrics({self._prefix + name: value for name, value in named.items()}, step)
        if "note" in event:
            self._progress.note(event["note"])
        elif "losses" in event:
            self._progress.set(step, _words(event["losses"], event["rates"]))
        else:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in event["validation"].items())
            self._progress.note(f"step {step}: validation {figures}")

    def close(self) -> None:
        """Show the last line."""
        self._progress.close()


def _words(losses: dict[str, float], rates: dict[str, float]) -> str:
    named = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    return (
        f"{named}, {rates['images_per_second']:.1f} images/s, step {1000 * rates['step_seconds']:.0f} ms "
        f"({100 * rates['data_share']:.0f} % waiting for data)"
    )
