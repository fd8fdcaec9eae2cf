"""Leave-one-out scores: of every image of a memory bank by a bank without its own vectors. None is built anew.

coreset ─▶ what takes the place of each image's vectors ─┐
cached patches ─▶ actors: image by image, search among these and the vectors of the others ─▶ scores
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipelines.data.feature_cache import FeatureCache
from pipelines.data.patch_matrix import KEEP, PATCHES, PatchMatrix
from pipelines.runtime.models import load_memory_method
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.progress import Progress
from pipelines.runtime.tasks import run_tasks
from pipelines.training.threshold import NormalScores
from unianom import files
from unianom.errors import OptionError
from unianom.execution import CPU
from unianom.methods.memory import MaskedPatches


class LeaveOneOutScorer:
    """Scores the images of one part of a bank's images. A `PartTask`.

    Args:
        model: folder of the memory method with its bank, which knows the origins of its vectors.
        cache: the patches of the bank's images, masked as those of images to be scored.
        bank_cache: the patches that the bank was chosen from.
        added: file with what takes the place of an image's vectors: A×2 int64, numbers of images, ascending, and rows
            among the latter patches.
    """

    def __init__(self, model: str, cache: FeatureCache, bank_cache: FeatureCache, added: str) -> None:
        self._method = load_memory_method(model, CPU)
        self._cached = cache.open()
        self._patches = PatchMatrix(bank_cache.open().arrays(PATCHES))
        self._added = files.read_array(added)

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Return the scores of the images of a part, whose first image has the number `first` among those of the bank;
        None for an image without which the bank has too few vectors."""
        scores: list[float | None] = []
        if not self._cached.has(task["part"], KEEP):
            return {**task, "scores": scores}
        keep = self._cached.array(task["part"], KEEP)
        rows = self._cached.array(task["part"], PATCHES)
        ends = np.cumsum(keep.sum(1))
        for number, (kept, end) in enumerate(zip(keep, ends, strict=True)):
            patches = np.zeros((1, len(kept), rows.shape[1]), np.float32)
            patches[0, kept] = rows[end - kept.sum() : end]
            embedding = MaskedPatches(torch.from_numpy(patches), torch.from_numpy(kept.copy())[None])
            image = int(task["first"]) + number
            first, last = np.searchsorted(self._added[:, 0], [image, image + 1])
            added = self._patches.take(self._added[first:last, 1]) if last > first else None
            try:
                scores.append(self._method.score_without_image(embedding, image, added))
            except OptionError:
                scores.append(None)
        return {**task, "scores": scores}


def score_left_out(
    model: str,
    cache: FeatureCache,
    bank_cache: FeatureCache,
    added: str,
    categories: Sequence[str],
    runtime: RuntimeOptions,
) -> NormalScores | None:
    """Return the leave-one-out scores of a bank's images.

    Args:
        model, cache, bank_cache, added: see `LeaveOneOutScorer`.
        categories: of the images, in the order of the cache, which is that of their numbers in the bank.
        runtime: actors.

    Returns:
        The scores; None if the bank has too few vectors without those of one of the images.
    """
    cached, first, tasks = cache.open(), 0, []
    for part in cached.parts:
        tasks.append({"part": part, "first": first})
        first += cached.rows(part)
    progress = Progress("score images without their own vectors", len(categories))
    scored: list[tuple[str, float | None]] = []
    arguments = {"model": model, "cache": cache, "bank_cache": bank_cache, "added": added}
    for result in run_tasks(LeaveOneOutScorer, arguments, tasks, runtime, len(categories)):
        own = categories[result["first"] : result["first"] + len(result["scores"])]
        scored += zip(own, result["scores"], strict=True)
        progress.advance(len(own))
    progress.close()
    known = [(category, score) for category, score in scored if score is not None]
    return NormalScores.of("leave_one_out", known) if len(known) == len(scored) else None
