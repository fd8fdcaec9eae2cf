"""Notes of an evaluation: what a reader must know of how the figures came about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.evaluation.labelled_images import LabelledImages
from pipelines.evaluation.options import EvaluateOptions
from pipelines.evaluation.pixel_counts import RESAMPLED_MAPS, PixelPlan
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import ScoreSet


def evaluation_notes(
    options: EvaluateOptions,
    scores: ScoreSet,
    plan: PixelPlan,
    images: LabelledImages,
    with_maps: bool,
    left_out: Sequence[str],
) -> list[str]:
    """Return a sentence for each thing that limits the figures."""
    notes = _one_sided(images)
    if scores.maps == "all" and not with_maps and (images.labels == ANOMALOUS).any():
        notes.append("no anomalous image has a mask that shows a defect, so there are no pixel metrics")
    if scores.maps == "flagged":
        notes.append(
            "only images that come to review or fail have an anomaly map, and pixel metrics of these alone would say "
            "nothing of the others, so there are none; score with --maps all to have them"
        )
    if any(model.get("decision_rule") is not None for model in scores.manifest["models"]):
        notes.append(
            "the model decides by a rule of jobs/decide.py, which tells what that rule does; the rates here are those "
            "of the model's single threshold"
        )
    if images.partly_calibrated:
        notes.append("some images have a calibrated score and some have none, so calibrated scores are not evaluated")
    if left_out:
        notes.append(
            f"{len(left_out)} anomalous images, e.g. {min(left_out)}, have a mask that is empty at the model's "
            f"resolution, as where its crop leaves the defect out; they count for images and are left out of pixel "
            f"metrics"
        )
    if with_maps and plan.binned:
        notes.append(
            f"more than {options.exact_pixels:,} labelled pixels: pixel metrics come from bins, each with the most it "
            f"can be off; mean Dice and IoU of images are left out"
        )
    if with_maps and options.bootstrap.resamples and not plan.resampled:
        notes.append(f"more than {RESAMPLED_MAPS:,} maps: intervals are given for image-level metrics only")
    return notes


def _one_sided(images: LabelledImages) -> list[str]:
    """Say why metrics are missing that need normal and anomalous images."""
    kinds = np.unique(images.labels)
    if len(kinds) == 1:
        have, lack = ("normal", "anomalous") if kinds[0] == NORMAL else ("anomalous", "normal")
        return [
            f"all {len(images.labels)} images that are labelled and scored are {have}: AUROC, AP, F1 and accuracy of "
            f"images need {lack} ones, too, so there are none; ingest and score a test split that holds both"
        ]
    notes = []
    for label, word in ((NORMAL, "normal"), (ANOMALOUS, "anomalous")):
        names = [
            category
            for category, groups in images.categories.items()
            if (images.labels[np.isin(images.group, groups)] == label).all()
        ]
        if names:
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            notes.append(
                f"{listed}: all images of {'this category' if len(names) == 1 else 'these categories'} are {word}, so "
                f"metrics that need both kinds are empty there and the mean is over the others"
            )
    return notes
