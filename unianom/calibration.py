"""CADA, class-agnostic distribution alignment: scores that mean the same whatever the image shows.

A model of many categories gives maps M whose level and spread differ from one category to the next, so no single
threshold serves all. A calibrator brings every map to a common scale by an offset u and a top γ of its own,

    M̂ = (M − u) / (γ − u)                                                                         (eqs. 1 and 5)

with u the level of normal pixels and γ their highest values, as learned from normal training images alone:

    "labels" (variant A)      u and γ of the image's category, which is told
    "classifier" (variant B)  of the category that a classifier finds in the image's embedding
    "cada" (variant C)        as a regressor predicts them from the embedding; no category is ever used
    "none"                    u = 0, γ = 1: for comparison, scores that are reduced alike but not calibrated

Statistics are taken from maps before their final smoothing; since calibration is the same for all pixels of an image,
smoothing before or after it is the same but for borders that are padded with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss

from unianom.configs.calibration import CalibrationConfig, HeadConfig
from unianom.errors import DataError
from unianom.methods.base import Prediction
from unianom.methods.layers.postprocess import top_mean

GUARD = 1e-6
"""Least of the smallest γ − u that is divided by, as a share of the mean over normal training images."""


# ---------------------------------------------------------------------------------------------------------- statistics
class MapStatistics(NamedTuple):
    """What calibration learns from the maps of N images.

    Attributes:
        mean, square, top: N float64 each; mean, mean square and largest value of each map.
    """

    mean: np.ndarray
    square: np.ndarray
    top: np.ndarray

    @staticmethod
    def of(maps: Tensor) -> MapStatistics:
        """Compute the statistics of B×S×S maps."""
        return MapStatistics(*MapStatistics.columns(maps).cpu().numpy().T)

    @staticmethod
    def columns(maps: Tensor) -> Tensor:
        """Compute the statistics of B×S×S maps on their device; B×3 float64, in the order of the attributes."""
        pixels = maps.flatten(1).double()
        return torch.stack([pixels.mean(1), pixels.square().mean(1), pixels.amax(1)], dim=1)

    def targets(self, kind: str) -> np.ndarray:
        """Return what a regressor is to predict for each image (Sec. 3.2): u and γ, N×2 float64."""
        if kind == "mean_max":
            return np.stack([self.mean, self.top], axis=1)
        return np.stack([self.mean, self.mean + 3 * _deviation(self.mean, self.square)], axis=1)

    def of_class(self, kind: str) -> np.ndarray:
        """Compute u and γ of the one category that all these images belong to.

        u is the mean of all their pixels; γ is the mean of their maxima or, over all pixels, the mean plus three
        standard deviations.
        """
        level = self.mean.mean()
        if kind == "mean_max":
            return np.array([level, self.top.mean()])
        return np.array([level, level + 3 * float(_deviation(level, self.square.mean()))])


def _deviation(mean: Any, square: Any) -> Any:
    return np.sqrt(np.maximum(square - mean**2, 0))


# -------------------------------------------------------------------------------------------------------------- network
def make_head(channels: int, grid: tuple[int, int], outputs: int, config: HeadConfig) -> nn.Sequential:
    """Make the head, which maps B×channels×grid to B×outputs."""
    layers: list[nn.Module] = []
    for _ in range(config.convolutions):
        layers += [nn.Conv2d(channels, channels, config.kernel, padding=config.kernel // 2), nn.ReLU()]
    width = channels
    if config.pool == "gap":
        layers.append(nn.AdaptiveAvgPool2d(1))
    else:
        width = channels * grid[0] * grid[1]
    layers.append(nn.Flatten())
    for number in range(config.linears):
        last = number + 1 == config.linears
        layers += [nn.Dropout(config.dropout), nn.Linear(width, outputs if last else config.hidden)]
        if not last:
            layers.append(nn.ReLU())
        width = config.hidden
    return nn.Sequential(*layers)


class Calibration(NamedTuple):
    """What a calibrator says of B images.

    Attributes:
        offset: B float32, u.
        scale: B float32, γ − u; above zero.
        score: B float32, the calibrated image score.
    """

    offset: Tensor
    scale: Tensor
    score: Tensor

    def maps(self, anomaly_map: Tensor) -> Tensor:
        """Calibrate B×S×S maps (eq. 5)."""
        return (anomaly_map - self.offset[:, None, None]) / self.scale[:, None, None]


class Calibrator(nn.Module):
    """Calibrates what a method finds.

    Args:
        config: how.
        categories: of the training images, in the order of the classes.
        channels, grid: of the embedding.

    Attributes:
        class_statistics: K×2, u and γ of each category.
        feature_mean: C, of the embedding.
        feature_deviation: scalar, of all its channels together.
        target_mean, target_deviation: 2 each, of u and γ.
        smallest_scale: scalar, the smallest γ − u that is divided by: that of any normal training image. A head that
            errs on an unknown image could else make any score of it.
        alpha: scalar, of the loss, in the unit of the maps.
    """

    def __init__(
        self, config: CalibrationConfig, categories: Sequence[str], channels: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.config, self.categories = config, list(categories)
        self.channels, self.grid = channels, grid
        self.head = nn.Sequential()  # empty where nothing is trained
        if config.has_head:
            outputs = 2 if config.variant == "cada" else len(self.categories)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.head = make_head(channels, grid, outputs, config.head)
        self.class_statistics: Tensor
        self.feature_mean: Tensor
        self.feature_deviation: Tensor
        self.target_mean: Tensor
        self.target_deviation: Tensor
        self.smallest_scale: Tensor
        self.alpha: Tensor
        self.register_buffer("class_statistics", torch.zeros(len(self.categories), 2))
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_deviation", torch.tensor(1.0))
        self.register_buffer("target_mean", torch.zeros(2))
        self.register_buffer("target_deviation", torch.ones(2))
        self.register_buffer("smallest_scale", torch.tensor(GUARD))
        self.register_buffer("alpha", torch.tensor(1.0))

    def set_statistics(
        self, statistics: MapStatistics, category: np.ndarray, mean: np.ndarray, square: np.ndarray
    ) -> None:
        """Fill in what is computed rather than trained.

        Args:
            statistics: of N normal training images.
            category: N int, the class of each.
            mean, square: C float64 each, mean and mean square of the embedding's channels over images and positions.

        Raises:
            DataError: a category has no image, or maps are constant, so that no scale can be had from them.
        """
        kind = self.config.statistics
        missing = [name for number, name in enumerate(self.categories) if not (category == number).any()]
        if missing:
            raise DataError(f"no normal training image of category {', '.join(missing)} to calibrate with")
        for number in range(len(self.categories)):
            own = MapStatistics(*(values[category == number] for values in statistics))
            self.class_statistics[number] = torch.from_numpy(own.of_class(kind))
        targets = statistics.targets(kind)
        spreads = targets[:, 1] - targets[:, 0]
        spread = float(spreads.mean())
        if not spread > 0:
            raise DataError(
                "the anomaly maps of the normal training images are constant, so nothing can be calibrated; train the "
                "model further, or look at its maps"
            )
        self.smallest_scale.fill_(max(float(spreads.min()), GUARD * spread))
        if self.config.standardise:
            self.feature_mean.copy_(torch.from_numpy(mean))
            self.feature_deviation.fill_(float(np.sqrt((_deviation(mean, square) ** 2).mean())) or 1.0)
            deviation = targets.std(axis=0)
            self.target_mean.copy_(torch.from_numpy(targets.mean(axis=0)))
            self.target_deviation.copy_(torch.from_numpy(np.where(deviation > 0, deviation, 1.0)))
        alpha = self.config.alpha
        if alpha is None:
            variances = np.array([targets[category == number, 1].var() for number in range(len(self.categories))])
            # one image of each category alone has no spread
            alpha = float(np.sqrt(variances[category].mean())) or spread
        self.alpha.fill_(alpha)

    def outputs(self, features: Tensor) -> Tensor:
        """Return the head's outputs for embeddings B×C×h×w.

        For "cada" these are û and γ̂ in standard units, B×2; for "classifier", logits, B×K.
        """
        normed = (features - self.feature_mean[:, None, None]) / self.feature_deviation
        return self.head(normed).float()

    def loss_transitions(self) -> tuple[float, float]:
        """Return where the smooth L1 losses of û and of γ̂ turn from square to linear: α in standard units."""
        of_level, of_top = (self.alpha / self.target_deviation).tolist()
        return of_level, of_top

    def loss(
        self, features: Tensor, targets: Tensor, category: Tensor, transitions: tuple[float, float] | None = None
    ) -> Tensor:
        """Compute the loss of a batch: smooth L1 of û and of γ̂, added (eq. 3), or cross-entropy of the classes (eq. 2).

        Args:
            features: B×C×h×w.
            targets: B×2, u and γ in the unit of the maps.
            category: B int64.
            transitions: of `loss_transitions`, for which the host waits; given, it need not wait at every step.
        """
        made = self.outputs(features)
        if self.config.variant == "classifier":
            return cross_entropy(made, category)
        aims = (targets - self.target_mean) / self.target_deviation
        # with α in standard units, too, each loss is that of the maps' unit divided by the deviation
        transitions = transitions or self.loss_transitions()
        parts = [smooth_l1_loss(made[:, part], aims[:, part], beta=transitions[part]) for part in range(2)]
        return parts[0] + parts[1]

    def statistics_of(self, features: Tensor, categories: Sequence[str] | None = None) -> Tensor:
        """Return u and γ for embeddings B×C×h×w: B×2.

        Args:
            features: of the images.
            categories: of the images; only "labels" needs them.

        Raises:
            DataError: they are needed and not given, or one is not among the training categories.
        """
        if self.config.variant == "none":
            return torch.arange(2.0, device=features.device).expand(features.shape[0], 2)
        if self.config.variant == "labels":
            return self.class_statistics[self._classes(categories, features)]
        if self.config.variant == "classifier":
            return self.class_statistics[self.outputs(features).argmax(1)]
        return self.target_mean + self.outputs(features) * self.target_deviation

    def _classes(self, categories: Sequence[str] | None, features: Tensor) -> Tensor:
        if categories is None:
            raise DataError("this calibrator goes by the category of each image, so give categories, or calibrate anew")
        unknown = sorted(set(categories) - set(self.categories))
        if unknown:
            raise DataError(
                f"this calibrator goes by category and knows {', '.join(self.categories)}, not {', '.join(unknown)}; "
                f"calibrate with --calibration.variant cada, which needs no category"
            )
        classes = torch.tensor([self.categories.index(name) for name in categories])
        return classes.to(features.device, non_blocking=True)

    @torch.inference_mode()
    def calibrate(self, prediction: Prediction, categories: Sequence[str] | None = None) -> Calibration:
        """Calibrate B images; each by itself.

        Args:
            prediction: of the method.
            categories: of the images; only "labels" needs them.

        Raises:
            DataError: see `statistics_of`.
        """
        return self.calibrate_by(self.statistics_of(prediction.embedding.float(), categories), prediction.anomaly_map)

    def calibrate_by(self, statistics: Tensor, anomaly_map: Tensor) -> Calibration:
        """Calibrate B images, B×S×S maps, by their u and γ, B×2."""
        level, top = statistics.unbind(1)
        scale = (top - level).clamp_min(self.smallest_scale) if self.config.variant != "none" else top - level
        return Calibration(level, scale, (top_mean(anomaly_map, self.config.score_share) - level) / scale)

    def plain(self) -> dict[str, Any]:
        """Return what a model folder keeps of the calibrator beside its weights, as plain data."""
        return {"categories": self.categories, "channels": self.channels, "grid": list(self.grid)}


# ------------------------------------------------------------------------------------------------------------- training
class Rows(Protocol):
    """The embeddings of N images, wherever they lie."""

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Return the embeddings of some images, n×C×h×w, in the order asked for."""
        ...


class HeadTrainer:
    """Trains a calibrator's head on kept embeddings: SGD with momentum, the order a new permutation every epoch.

    Args:
        calibrator: with its statistics, on its device.
        rows: embeddings of N images.
        targets: N×2.
        category: N int.

    Attributes:
        step: how many steps have been taken.
    """

    def __init__(self, calibrator: Calibrator, rows: Rows, targets: np.ndarray, category: np.ndarray) -> None:
        config = calibrator.config
        self.calibrator, self.step = calibrator, 0
        self._rows, self._targets, self._category = rows, targets.astype(np.float32), category.astype(np.int64)
        self._parameters = list(calibrator.head.parameters())
        self._optimiser = torch.optim.SGD(
            self._parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self._orders: dict[int, np.ndarray] = {}

    def run(self, steps: int, tell: Callable[[int, float], None] | None = None) -> None:
        """Take steps up to `steps` in all; `tell` gets each step's number and loss.

        Raises:
            DataError: the loss is not finite.
        """
        calibrator, config = self.calibrator, self.calibrator.config
        device, transitions = calibrator.class_statistics.device, calibrator.loss_transitions()
        calibrator.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            while self.step < steps:
                torch.manual_seed(config.seed + self.step)  # dropout is that of the step, wherever it was begun
                chosen = self._batch(self.step)
                features = torch.from_numpy(self._rows.take(chosen)).to(device).float()
                targets = torch.from_numpy(self._targets[chosen]).to(device)
                category = torch.from_numpy(self._category[chosen]).to(device)
                loss = calibrator.loss(features, targets, category, transitions)
                self._optimiser.zero_grad(set_to_none=True)
                loss.backward()
                if config.clip_norm is not None:
                    nn.utils.clip_grad_norm_(self._parameters, config.clip_norm)
                if config.schedule == "cosine":
                    self._optimiser.param_groups[0]["lr"] = config.learning_rate * _cosine(self.step, config.iterations)
                self._optimiser.step()
                self.step += 1
                if tell is not None:
                    tell(self.step, float(loss.detach()))
                if not torch.isfinite(loss):
                    raise DataError(
                        f"the loss of the calibrator is not finite at step {self.step}; lower "
                        f"--calibration.learning_rate, or take --calibration.standardise true"
                    )
        calibrator.eval()

    def _batch(self, step: int) -> np.ndarray:
        """Return the indices of a step's images: batches run over the ends of epochs, each with an order of its own."""
        size, count = self.calibrator.config.batch_size, len(self._targets)
        places = range(step * size, (step + 1) * size)
        epochs = {place // count for place in places}
        seed = self.calibrator.config.seed
        kept = {epoch: order for epoch, order in self._orders.items() if epoch in epochs}
        new = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs - kept.keys()}
        self._orders = kept | new
        return np.array([self._orders[place // count][place % count] for place in places])

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the training depends on."""
        return {
            "step": self.step,
            "head": self.calibrator.head.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.step = state["step"]
        self.calibrator.head.load_state_dict(state["head"])
        self._optimiser.load_state_dict(state["optimiser"])


def _cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate, from 1 towards 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class ArrayRows:
    """Embeddings that are all at hand.

    Attributes:
        array: N×C×h×w.
    """

    array: np.ndarray

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Return the embeddings of some images, n×C×h×w."""
        return self.array[indices]


def fit_calibrator(
    config: CalibrationConfig,
    categories: Sequence[str],
    features: np.ndarray,
    statistics: MapStatistics,
    category: np.ndarray,
) -> Calibrator:
    """Fit a calibrator to what a method finds in normal training images.

    Args:
        config: how.
        categories: names of the K classes.
        features: N×C×h×w float32, `Prediction.embedding`.
        statistics: of N images, from `Prediction.raw_map`.
        category: N int, the class of each.

    Raises:
        DataError: a category without images, constant maps, or a loss that is not finite.
    """
    channels, *grid = features.shape[1:]
    calibrator = Calibrator(config, categories, channels, (grid[0], grid[1]))
    values = features.astype(np.float64)
    calibrator.set_statistics(statistics, category, values.mean((0, 2, 3)), (values**2).mean((0, 2, 3)))
    if config.has_head:
        targets = statistics.targets(config.statistics)
        HeadTrainer(calibrator, ArrayRows(features), targets, category).run(config.iterations)
    return calibrator.eval()
