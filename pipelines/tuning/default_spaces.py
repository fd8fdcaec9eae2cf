"""The space that each method's campaign searches where nothing else is said."""

from __future__ import annotations

from pipelines.tuning.dimensions import Choice, Dimension, Halves, Range

CADA = "cada"
"""Name of calibrating on the command line of jobs/tune.py."""


def _rate(low: float, high: float, why: str = "step size of the optimiser") -> Dimension:
    return Dimension("training.learning_rate", Range(low, high, log=True), why)


DISTANCE_MAPS = (
    Dimension("map.fuse", Choice(("sum", "mean")), "how the levels' maps are joined"),
    Dimension("map.blur", Choice(("gaussian", "box", "none")), "smoothing of the map"),
    Dimension("map.score_share", Choice((0.0, 0.001, 0.003, 0.01, 0.03, 0.1)), "pixels whose mean is the score"),
)

SPACES: dict[str, tuple[Dimension, ...]] = {
    "uninet": (
        _rate(1e-3, 1e-2, "of student and bottleneck"),
        Dimension("training.encoder_learning_rate", Range(1e-7, 1e-5, log=True), "of the target teacher"),
        Dimension("temperature", Choice((0.1, 0.3, 1.0, 2.0)), "T, of the similarities"),
        Dimension("margin", Choice((0.5, 1.0, 2.0)), "τ, of the margin loss"),
        Dimension("balance", Range(0.5, 0.9), "λ, of distillation against similarity loss"),
        Dimension("alpha", Choice((0.001, 0.003, 0.01, 0.03, 0.1)), "upper limit of the decision's share of pixels"),
        Dimension("beta", Choice((3e-5, 3e-4, 3e-3, 3e-2)), "lower limit of that share"),
        Dimension("score_blur", Choice((0.0, 2.0, 4.0, 6.0)), "smoothing before the score"),
    ),
    "onenip": (
        _rate(3e-5, 1e-3),
        Dimension("segmentation_weight", Range(0.1, 2.0, log=True), "λ, of the Dice loss"),
        Dimension("taps", Choice(((2, 4, 8, 16), (4, 8, 16), (8, 16))), "layers of the encoder"),
        Dimension("alpha", Choice(tuple(n / 10 for n in range(11))), "α, the refiner's share in the map"),
        Dimension("score_pool", Choice((1, 4, 8, 16, 32)), "mean filter before the maximum"),
    ),
    "unias": (
        _rate(3e-5, 1e-3),
        Dimension("loss_weight", Range(0.3, 3.0, log=True), "of the sum of all losses"),
        Dimension("levels", Choice(((), (4,), (3, 4), (2, 3, 4), (1, 2, 3))), "levels whose maps are multiplied"),
        Dimension("fuse_at", Choice(("input", "finest")), "size at which they are"),
        Dimension("level_blur", Choice((False, True)), "smoothing of each before"),
        Dimension("reduce", Choice(("max", "std")), "from map to score"),
    ),
    "uniad": (
        _rate(3e-5, 1e-3),
        Dimension("neighbours", Choice((0, 3, 5, 7)), "square that attention does not see"),
        Dimension("map_form", Choice(("norm", "squared")), "from errors to map"),
        Dimension("reduce", Choice(("max", "mean", "std")), "from map to score"),
        Dimension("score_pool", Choice((1, 4, 8, 16, 32)), "mean filter before the maximum"),
    ),
    "revdist": (_rate(1e-3, 1e-2), *DISTANCE_MAPS),
    "recontrast": (_rate(5e-4, 5e-3), *DISTANCE_MAPS),
    "uniformaly": (
        Dimension("blocks", Halves(), "layers of the encoder"),
        Dimension("mask_threshold", Choice((0.0, 0.05, 0.1, 0.2)), "attention above which back-patch masking keeps"),
        Dimension("mask_kernel", Choice((1, 5, 7)), "smoothing of the attention before"),
        Dimension("bank.coreset_ratio", Choice((0.01, 0.05, 0.1)), "share of the patches in the bank"),
        Dimension("k_ratio", Choice((0.005, 0.01, 0.02, 0.05, 0.1, 0.2)), "patches whose mean is the score"),
        Dimension("neighbours", Choice((1, 3, 5)), "bank vectors averaged in a distance"),
        Dimension("blur_sigma", Choice((2.0, 4.0, 6.0, 8.0)), "smoothing of the map"),
    ),
    "patchcore": (
        Dimension("taps", Halves(), "layers of the encoder"),
        Dimension("bank.coreset_ratio", Choice((0.01, 0.05, 0.1)), "share of the patches in the bank"),
        Dimension("patch_size", Choice((1, 3, 5)), "cells that a patch is averaged over"),
        Dimension("neighbours", Choice((1, 3, 5, 9)), "bank vectors averaged in a distance"),
        Dimension("reweight", Choice((False, True)), "score weighed by the neighbourhood of the nearest vector"),
        Dimension("reweight_neighbours", Choice((3, 5, 9)), "how large that is"),
        Dimension("blur_sigma", Choice((2.0, 4.0, 6.0, 8.0)), "smoothing of the map"),
    ),
    "cada": (
        Dimension("alpha", Choice((None, 0.01, 0.1, 1.0, 10.0)), "α, of the smooth L1 loss; null from the data"),
        Dimension("statistics", Choice(("mean_max", "mean_std")), "what counts as the top of a map"),
        Dimension("head.dropout", Choice((0.0, 0.1, 0.25, 0.5)), "in the head"),
        Dimension("learning_rate", Range(5e-3, 1e-1, log=True), "of the head"),
        Dimension("score_share", Choice((0.0, 0.001, 0.003, 0.01, 0.03, 0.1)), "pixels whose mean is the score"),
    ),
}
"""The default space of methods, and of calibrating a model ("cada"); a method without one is searched as asked for."""
