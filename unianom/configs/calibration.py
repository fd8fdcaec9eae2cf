"""How scores are made comparable between categories (CADA)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from unianom.options import AtLeastOne, AtLeastZero, NotNegative, Odd, Options, Positive, Share, ShareBelowOne

Variant = Literal["cada", "classifier", "labels", "none"]


@dataclass(frozen=True)
class HeadConfig(Options):
    """The head on the embedding: convolutions that keep its channels, a pool, linear layers (Sec. 3.3, Table 3).

    Args:
        convolutions: how many, each followed by a ReLU; 0 for none.
        kernel: their odd side.
        pool: "gap" averages over positions, "flatten" keeps them.
        linears: how many; with a ReLU between them and dropout before each.
        hidden: width between them.
        dropout: probability.
    """

    convolutions: AtLeastZero = 1
    kernel: Odd = 3
    pool: Literal["gap", "flatten"] = "gap"
    linears: AtLeastOne = 2
    hidden: AtLeastOne = 256
    dropout: ShareBelowOne = 0.25


@dataclass(frozen=True)
class CalibrationConfig(Options):
    """How scores are calibrated; the defaults are the published ones where they do not depend on the method.

    Args:
        variant: "cada" (C), "classifier" (B), "labels" (A) or "none".
        statistics: "mean_max" takes the largest pixel as the top; "mean_std" the mean plus three standard deviations,
            for training images that may hold anomalies.
        alpha: of the smooth L1 loss (eq. 4), in the unit of the maps; published: 0.1 for RevDist and ReContrast, 10 for
            UniAD; null takes the standard deviation of the tops of the training images within their categories, about
            what no head can foretell.
        score_share: share of the largest pixels of the calibrated map whose mean is the image score; 0 takes the
            largest.
        standardise: bring embeddings and statistics to mean 0 and deviation 1 over the training images before the head
            sees them, so that the learning rate suits any method; false feeds both as they are. All channels of the
            embedding are divided by one deviation, so that none that hardly varied in training is blown up.
        head: of classifier or regressor.
        iterations: training steps of the head; published: 5000 for RevDist and ReContrast, 20000 for UniAD.
        batch_size: images in a step.
        learning_rate, momentum, weight_decay: of SGD.
        schedule: of the learning rate, "constant" or "cosine" down to zero.
        clip_norm: largest gradient norm; null for no clipping.
        seed: of initial weights, order of images and dropout.
    """

    usual = ("variant", "iterations", "learning_rate")

    variant: Variant = "cada"
    statistics: Literal["mean_max", "mean_std"] = "mean_max"
    alpha: Positive | None = None
    score_share: Share = 0.01
    standardise: bool = True
    head: HeadConfig = field(default_factory=HeadConfig)
    iterations: AtLeastOne = 5000
    batch_size: AtLeastOne = 16
    learning_rate: Positive = 5e-2
    momentum: ShareBelowOne = 0.9
    weight_decay: NotNegative = 1e-4
    schedule: Literal["constant", "cosine"] = "cosine"
    clip_norm: Positive | None = 1.0
    seed: int = 0

    @property
    def has_head(self) -> bool:
        """Whether a network is trained."""
        return self.variant in ("cada", "classifier")
