"""What training a network takes besides the method's own options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.training.options import FitOptions
from unianom.errors import OptionError

ALL_PREPARED_BYTES = 32 << 30
"""Up to this size prepared images are kept, and frozen features; beyond it they are made anew in every epoch."""


@dataclass(frozen=True)
class DataOptions:
    """How images reach the network in training.

    Args:
        images: "prepared" decodes every image once and memory-maps the result; "stream" decodes row group after row
            group in every epoch, for corpora that do not fit the disk; null decides by size.
        frozen_features: compute what the frozen encoder makes of the images once and keep it; null does so where
            nothing but the encoder stands between image and features (no augmentation) and they take at most 32 GB,
            as one forward pass of one image tells.
        feature_precision: "half" or "full", of kept features.
        folder: where prepared images and features are kept for all runs; null takes `prepared` beside the output.
        processes: that load batches beside each worker; 0 is a thread; null takes as many as the worker's CPUs but
            one where images are decoded, changed or made.
        window: row groups that are shuffled together when streaming.
    """

    images: Literal["prepared", "stream"] | None = None
    frozen_features: bool | None = None
    feature_precision: Literal["half", "full"] = "half"
    folder: str | None = None
    processes: int | None = None
    window: int = 4

    def __post_init__(self) -> None:
        if self.window < 1 or (self.processes is not None and self.processes < 0):
            raise OptionError("data.window must be >= 1, data.processes >= 0")


@dataclass(frozen=True)
class Phase:
    """From some step on, other values of options of the method.

    Args:
        start: share of the training at which it begins, in (0, 1).
        method: the options that change, by dotted name, such as {training.learning_rate: 1e-3}; those of earlier phases
            go on.
    """

    start: float
    method: dict[str, Any]

    def __post_init__(self) -> None:
        if not 0 < self.start < 1 or not self.method:
            raise OptionError(f"phases: start={self.start} must be in (0, 1), and method name an option that changes")


@dataclass(frozen=True)
class TrainingOptions(FitOptions):
    """What training a method needs besides the method's own options.

    Args:
        precision: of forward and backward pass, "fp32" or "bf16" (autocast).
        compile: run the step through torch.compile.
        accumulate: forward and backward passes that make up a step, to save memory.
        checkpoint_every: steps between checkpoints.
        validate_every: steps between validations; null validates ten times a run, 0 never.
        validation_images: images of a validation, half of them normal, an even share of every category, but at least
            one of each.
        min_workers: let Ray shrink and regrow the run between this many workers and `runtime.workers`.
        max_failures: how often lost workers are replaced before the run fails; preempted nodes do not count.
        phases: options of the method that change while it is trained, in ascending order; what population-based
            training finds.
        data: how images reach the network.
        runtime: workers and their CPUs and GPUs; null workers train on one, and use all for what is computed once.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    accumulate: int = 1
    checkpoint_every: int = 500
    validate_every: int | None = None
    validation_images: int = 256
    min_workers: int | None = None
    max_failures: int = 3
    phases: tuple[Phase, ...] = ()
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate < 1 or self.checkpoint_every < 1 or self.validation_images < 2:
            raise OptionError("accumulate and checkpoint_every must be >= 1, validation_images >= 2")
        if (self.validate_every is not None and self.validate_every < 0) or self.max_failures < 0:
            raise OptionError("validate_every and max_failures must be >= 0")
        starts = [phase.start for phase in self.phases]
        if starts != sorted(set(starts)):
            raise OptionError(f"phases begin at {starts}; give them in ascending order")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise OptionError(f"min_workers={self.min_workers} must be in 1…{self.workers}, the runtime.workers")

    @property
    def workers(self) -> int:
        """Workers at most."""
        return self.runtime.workers or 1
