"""What fitting any method takes besides the method's own options, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipelines.data.splits import SplitOptions
from pipelines.runtime.actors import RuntimeOptions
from pipelines.runtime.cli import AS_WRITTEN
from unianom.data.image import ImageLimits
from unianom.errors import OptionError
from unianom.options import from_plain, merged, to_plain
from unianom.thresholds import Threshold
from unianom.written import plain_options

WORK = "_work"
"""Folder below the model folder where unfinished work lies."""


@dataclass(frozen=True)
class ThresholdOptions:
    """How the decision threshold is chosen, from normal images that are in no bank and no training batch.

    Args:
        target_fpr: highest share of normal images that may fail; null aims at 0.05 and leaves the model without a
            threshold, saying so, where the held-out normals cannot support that.
        confidence: probability that the promise holds.
        validation_fraction: share of each category's normal training images held out where the shards have no "val"
            split; 0 for none, and then no threshold.
    """

    target_fpr: float | None = None
    confidence: float = 0.95
    validation_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.target_fpr is not None and not 0 < self.target_fpr < 1:
            raise OptionError(f"threshold.target_fpr={self.target_fpr} must be in (0, 1)")
        if not 0 < self.confidence < 1:
            raise OptionError(f"threshold.confidence={self.confidence} must be in (0, 1)")
        if not 0 <= self.validation_fraction < 1:
            raise OptionError(f"threshold.validation_fraction={self.validation_fraction} must be in [0, 1)")


@dataclass(frozen=True)
class FitOptions:
    """What fitting any method needs besides the method's own options.

    Args:
        shards: shard set; path or URI.
        output: model folder to write; path or URI.
        categories: those to fit on; empty for all.
        per_category: one model for each category, in folders below `output`, instead of one for all.
        category_options: for the model of one category alone, options of the method that differ, by category, such as
            {screw: {temperature: 0.1}}; categories that are not fitted are passed over.
        few_shot: normal images per category, drawn with `seed`, and where a method learns from labels at most as many
            anomalous ones; null takes all.
        seed: of the held-out normals and the few-shot draw; coresets and training have their own, among the
            method's options.
        batch_size: images in one forward pass, of what is not a training step.
        overwrite: replace another model in the output.
        threshold: how the decision threshold is chosen.
        limits: what an image may cost.
        runtime: actors and their CPUs and GPUs.
    """

    shards: str
    output: str
    categories: tuple[str, ...] = ()
    per_category: bool = False
    category_options: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=AS_WRITTEN)
    few_shot: int | None = None
    seed: int = 0
    batch_size: int = 8
    overwrite: bool = False
    threshold: ThresholdOptions = field(default_factory=ThresholdOptions)
    limits: ImageLimits = field(default_factory=ImageLimits)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)

    @property
    def split(self) -> SplitOptions:
        """How normal training images are held out."""
        threshold = self.threshold
        return SplitOptions(
            few_shot=self.few_shot,
            seed=self.seed,
            validation_fraction=threshold.validation_fraction,
            target_fpr=threshold.target_fpr,
            confidence=threshold.confidence,
        )

    def __post_init__(self) -> None:
        method = getattr(self, "method", None)  # of the classes made for each method
        if method is not None:
            own = {name: plain_options(values, type(method)) for name, values in self.category_options.items()}
            object.__setattr__(self, "category_options", own)
        if self.batch_size < 1 or (self.few_shot is not None and self.few_shot < 1):
            raise OptionError("batch_size and few_shot must be positive")


@dataclass(frozen=True)
class FitResult:
    """One fitted model.

    Attributes:
        folder: its model folder.
        categories: those it was fitted on.
        fresh: whether this run wrote it.
        summary: what it was made of, in words.
        metrics: what it was made of, in numbers.
        threshold: the stored threshold, or None.
        notice: why there is no threshold, else "".
    """

    folder: str
    categories: list[str]
    fresh: bool
    summary: str
    metrics: dict[str, float]
    threshold: Threshold | None
    notice: str


def own_config(config: Any, categories: list[str], options: FitOptions) -> Any:
    """A method's options for the model of these categories.

    Raises:
        OptionError: one category's options are not the method's, or for a model of several categories.
    """
    if len(categories) > 1:
        if named := sorted(set(options.category_options) & set(categories)):
            raise OptionError(
                f"category_options of {', '.join(named)} are for models of one category; give --per_category true, or "
                f"leave them out"
            )
        return config
    changes = options.category_options.get(categories[0], {})
    if "preset" in changes:
        raise OptionError(f"category_options.{categories[0]}.preset: a preset is chosen for all categories")
    try:
        return from_plain(type(config), merged(to_plain(config), changes))
    except OptionError as error:
        raise OptionError(f"category_options.{categories[0]}: {error}") from error
