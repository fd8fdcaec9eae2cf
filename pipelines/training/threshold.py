"""The decision threshold of a fitted model, from the scores of held-out normal images."""

from __future__ import annotations

from typing import Any

from pipelines.data.reader import SampleReader
from pipelines.data.splits import USUAL_FPR
from pipelines.runtime.models import load_model
from pipelines.runtime.progress import Progress
from pipelines.runtime.tasks import run_tasks
from pipelines.training.options import FitOptions
from unianom.data.image import ImageLimits
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.model import Model
from unianom.thresholds import Threshold, fit_threshold


class HeldOutScorer:
    """Scores the held-out normals of one part. A `PartTask`."""

    def __init__(
        self,
        model: str,
        shards: ShardSet,
        selection: Selection,
        chosen: frozenset[str],
        batch_size: int,
        limits: ImageLimits,
        device: str,
        threads: int,
    ) -> None:
        self._model = load_model(model, device)
        self._reader = SampleReader(shards, selection, chosen, batch_size, limits, threads)

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Return scores of one part's held-out images."""
        scores: list[float] = []
        for batch in self._reader.batches(task["part"], self._model.method):
            scores += self._model.method.predict(batch).score.float().cpu().tolist()
        return {"scores": scores}


def score_held_out(
    model: str, shards: ShardSet, held_out: frozenset[str], categories: list[str], options: FitOptions
) -> list[float]:
    """Return the image scores of held-out normals by a model folder."""
    arguments = {
        "model": model,
        "shards": shards,
        "selection": Selection(("train", "val"), tuple(categories), (NORMAL,)),
        "chosen": held_out,
        "batch_size": options.batch_size,
        "limits": options.limits,
        "device": options.runtime.device,
        "threads": options.runtime.cpus_per_worker,
    }
    progress = Progress("score held-out normals", len(held_out))
    scores: list[float] = []
    tasks = [{"part": part} for part in shards.parts]
    for result in run_tasks(HeldOutScorer, arguments, tasks, options.runtime, len(held_out)):
        scores += result["scores"]
        progress.advance(len(result["scores"]))
    progress.close()
    return scores


def held_out_threshold(
    model: Model, folder: str, shards: ShardSet, held_out: frozenset[str], options: FitOptions
) -> Threshold | None:
    """Return the decision threshold of a model, from the scores of held-out normals; None if there are none.

    Args:
        model: fitted, without a threshold.
        folder: where its actors may load it from; written here.
        shards, held_out: the images.
        options: target rate and confidence, and the actors.
    """
    if not held_out:
        return None
    model.save(folder)
    scores = score_held_out(folder, shards, held_out, model.categories, options)
    return fit_threshold(scores, options.threshold.target_fpr or USUAL_FPR, options.threshold.confidence)
