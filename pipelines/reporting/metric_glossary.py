"""The metrics of a report: their columns, and their meaning in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.reporting.metric_text import aupro_keys, short_name


@dataclass(frozen=True)
class Metric:
    """A column of the results table: its key in the evaluation, its heading, and its meaning in a line."""

    key: str
    title: str
    meaning: str


IMAGE_METRICS = (
    Metric(
        "image_auroc",
        "AUROC",
        "how often an anomalous image scores higher than a normal one, over all such pairs; 50 % is guessing",
    ),
    Metric(
        "image_ap",
        "AP",
        "average precision: the share of true alarms among all alarms, averaged over the alarms that find each "
        "anomalous image; guessing gives the share of anomalous images",
    ),
    Metric(
        "image_f1_max",
        "F1-max",
        "harmonic mean of precision and recall at the threshold where it is highest; that threshold is chosen on "
        "these very labels, so this is an upper bound",
    ),
    Metric("image_accuracy_at_f1_max", "Acc.", "share of images judged rightly at the threshold of F1-max"),
)
PIXEL_METRICS = (
    Metric(
        "pixel_auroc",
        "AUROC",
        "as for images, over all pixels; high even for coarse maps, since most pixels are normal and easy",
    ),
    Metric("pixel_ap", "AP", "as for images, over all pixels; guessing gives the share of anomalous pixels"),
    Metric("pixel_f1_max", "F1-max", "as for images, over all pixels; the same as the best pooled Dice coefficient"),
    Metric(
        "pixel_iou_max",
        "IoU-max",
        "overlap of flagged and anomalous pixels over their union, at the threshold where it is highest",
    ),
    Metric(
        "dsc",
        "DSC",
        "Dice coefficient of each image, averaged, at the one threshold with the largest sum of precision and recall",
    ),
    Metric("iou", "IoU", "overlap over union of each image, averaged, at the threshold of DSC"),
    Metric(
        "soft_dice",
        "soft DSC",
        "Dice coefficient of each anomalous image with its map scaled to 0 to 1 in place of a threshold, averaged",
    ),
    Metric("soft_iou", "soft IoU", "overlap over union of the same maps, averaged"),
)
AUPRO_MEANING = (
    "mean share of each anomalous region that is covered, averaged over false-positive rates of pixels from 0 to 30 % "
    "(to another rate, or by a published approximation, where its name says so); small regions count as much as large"
)
DISTANCE = (
    "σ",
    "distance of a score from the threshold (from the median of normal images, or of all, if there is none), in "
    "standard deviations of the scores of normal images (of all, if none is known)",
)
OTHER_MEANINGS = (
    ("mean", "average over categories, each judged by itself; categories where the metric is undefined are left out"),
    ("union", "all categories in one pool: scores must also be comparable between categories"),
    ("false-positive rate", "share of normal images above the threshold"),
    ("detection rate", "share of anomalous images above the threshold"),
    DISTANCE,
)


def metric_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Metric], list[Metric]]:
    """Return image-level and pixel-level columns; pixel metrics only where an evaluation has any."""
    keys = {key: None for row in rows for key in row}
    pixel = [metric for metric in PIXEL_METRICS if metric.key in keys]
    pixel += [Metric(key, short_name(key).replace("_", " "), AUPRO_MEANING) for key in aupro_keys(keys)]
    return list(IMAGE_METRICS), pixel


def term_meanings(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every term of the tables and what it says."""
    image, pixel = metric_columns(metrics["categories"])
    terms = [(f"image {metric.title}", metric.meaning) for metric in image]
    terms += [
        (f"pixel {metric.title}" if metric in PIXEL_METRICS else metric.title, metric.meaning) for metric in pixel
    ]
    return [*terms, *OTHER_MEANINGS]
