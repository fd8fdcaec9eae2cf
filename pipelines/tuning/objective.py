"""The search over options that act after the network: many settings, one set of kept raw_outputs, no network run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.data.validation_set import Measured, Table, ValidationSet
from pipelines.tuning.space import key_of
from unianom import files
from unianom.errors import DataError
from unianom.methods import MemoryMethod, Method
from unianom.options import with_values

IMAGES_AT_ONCE = 32
"""Maps of the input's size held at a time."""

OBJECTIVE = "objective"
"""What a trial reports: how well it does."""

RAW_OUTPUTS = "_readings.json"
"""Names the arrays of kept raw_outputs, once all are written, and tells the latency."""

TIMED_PREDICTIONS = 9
"""Predictions of one image each whose median time is the latency."""


class Postprocessor(Protocol):
    """What score_settings needs of a method; see `Method`."""

    map_options: ClassVar[tuple[str, ...]]

    def anomaly_maps(self, tensors: Mapping[str, Tensor], config: Any = None) -> tuple[Tensor, Tensor]: ...

    def image_scores(self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: Any = None) -> Tensor: ...


@dataclass(frozen=True)
class ScoredSetting:
    """One setting of the reading options and what came of it.

    Attributes:
        values: of the options, by name.
        measured: how well it does; None if its scores are not finite.
    """

    values: dict[str, Any]
    measured: Measured | None


@torch.inference_mode()
def compute_raw_outputs(method: Method, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Raw outputs of all images, N×… by name, where the method lies."""
    found = []
    for images in batches:
        method.check_images(images)
        found.append(method.forward(images).tensors)
    return {name: torch.cat([tensors[name] for tensors in found]) for name in found[0]}


@torch.inference_mode()
def score_settings(
    method: Postprocessor,
    raw_outputs: Mapping[str, Tensor],
    config: Any,
    settings: Sequence[Mapping[str, Any]],
    validation_set: ValidationSet,
    objective: Mapping[str, float],
) -> list[ScoredSetting]:
    """Compare settings of the reading options.

    Settings that share the options of the map share its making and its pixel metrics.

    Args:
        method: on the CPU, or where the raw outputs lie.
        raw_outputs: N×… each.
        config: the method's options where a setting says nothing.
        settings: reading options by name.
        validation_set: the N images.
        objective: weights of the metrics.

    Returns:
        One for each setting, in their order.
    """
    groups: dict[str, list[int]] = {}
    for number, values in enumerate(settings):
        shared = {name: value for name, value in values.items() if name in method.map_options}
        groups.setdefault(key_of(shared), []).append(number)
    results: dict[int, ScoredSetting] = {}
    for numbers in groups.values():
        configs = [with_values(config, settings[number]) for number in numbers]
        scores, maps = read(method, raw_outputs, configs, validation_set)
        pixel = _pixels(validation_set, maps, objective)
        for number, own in zip(numbers, scores, strict=True):
            results[number] = ScoredSetting(dict(settings[number]), _measured(validation_set, own, pixel, objective))
    return [results[number] for number in range(len(settings))]


def measure(
    validation_set: ValidationSet, scores: np.ndarray, maps: np.ndarray, objective: Mapping[str, float]
) -> Measured:
    """The verdict on N scores and N×s×s thinned maps."""
    return validation_set.measured(
        validation_set.image_table(scores), _pixels(validation_set, maps, objective), objective
    )


def gain_interval(
    validation_set: ValidationSet,
    better: tuple[np.ndarray, np.ndarray],
    worse: tuple[np.ndarray, np.ndarray],
    objective: Mapping[str, float],
    resamples: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """Between what 95 % of the gains lie that one setting has over another on images drawn anew.

    The same images for both, each time. It does not know of how many settings the better one is the best, so a gain
    that is not beyond chance by this is none.

    Args:
        validation_set: the N images.
        better, worse: scores N and thinned maps N×s×s of either setting.
        objective: weights of the metrics.
        resamples, seed: of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    gains = []
    for _ in range(resamples):
        drawn = validation_set.resampled(rng)
        first, second = (measure(drawn, *setting, objective).objective for setting in (better, worse))
        gains.append(first - second)
    low, high = np.quantile(gains, [0.025, 0.975])
    return float(low), float(high)


def _pixels(validation_set: ValidationSet, maps: np.ndarray, objective: Mapping[str, float]) -> Table:
    """Pixel metrics, where the objective has any."""
    if not any("pixel" in name for name in objective):
        return {}
    return validation_set.pixel_table(maps, union=any(name.startswith("union_pixel") for name in objective))


def _measured(
    validation_set: ValidationSet, scores: np.ndarray, pixel: Table, objective: Mapping[str, float]
) -> Measured | None:
    if not np.isfinite(scores).all():
        return None  # this setting is no good; the others may be
    return validation_set.measured(validation_set.image_table(scores), pixel, objective)


def read(
    method: Postprocessor, raw_outputs: Mapping[str, Tensor], configs: Sequence[Any], validation_set: ValidationSet
) -> tuple[list[np.ndarray], np.ndarray]:
    """Scores of all images for each config, and the maps N×s×s that all these configs share, thinned.

    Args:
        method, raw_outputs, validation_set: as of `score_settings`.
        configs: options that differ in others than those of the map.

    Raises:
        DataError: maps are not finite.
    """
    scores: list[list[Tensor]] = [[] for _ in configs]
    maps = []
    for start in range(0, len(validation_set), IMAGES_AT_ONCE):
        part = {name: value[start : start + IMAGES_AT_ONCE] for name, value in raw_outputs.items()}
        anomaly_map, _ = method.anomaly_maps(part, configs[0])
        maps.append(validation_set.thinned(anomaly_map.cpu().numpy()))
        for own, config in zip(scores, configs, strict=True):
            own.append(method.image_scores(part, anomaly_map, config).float().cpu())
    thinned = np.concatenate(maps)
    if not np.isfinite(thinned).all():
        raise DataError("anomaly maps of validation images hold NaN or infinite values")
    return [torch.cat(own).numpy() for own in scores], thinned


def best_of(raw_outputs: Sequence[ScoredSetting]) -> ScoredSetting:
    """The one with the largest objective; of equals the first.

    Raises:
        DataError: none has finite scores.
    """
    good = [(one.measured.objective, one) for one in raw_outputs if one.measured is not None]
    if not good:
        raise DataError("no setting gives finite scores on the validation images")
    return max(good, key=lambda pair: pair[0])[1]


# --------------------------------------------------------------------------------------------- in a trial that trains
@dataclass(frozen=True)
class ObjectiveValidation:
    """What a trained trial is compared on with others.

    Attributes:
        validation_set: URI of the validation images.
        stride: see `ValidationOptions.pixel_stride`.
        objective: weights of the metrics.
        raw_outputs: folder for the raw outputs of the trained model.
    """

    validation_set: str
    stride: int
    objective: dict[str, float]
    raw_outputs: str

    def make(self, method: Method, batch_size: int) -> ObjectiveValidator:
        """Return the validator of a method; see `ValidatorConfig`."""
        return ObjectiveValidator(self, method, batch_size)


class ObjectiveValidator:
    """Measures a method on the validation images of a campaign, during its training.

    Args:
        config: what to compare on.
        method: the method.
        batch_size: images in one forward pass.
    """

    def __init__(self, config: ObjectiveValidation, method: Method, batch_size: int) -> None:
        self._config, self._method, self._batch_size = config, method, batch_size
        self._validation_set: ValidationSet | None = None

    def run(self) -> dict[str, float]:
        """The objective, by the method's own reading options, and the metrics it is made of.

        Raises:
            DataError: scores are not finite.
        """
        validation_set, raw_outputs = self._find()
        objective = self._config.objective
        measured = score_settings(self._method, raw_outputs, self._method.config, [{}], validation_set, objective)[
            0
        ].measured
        if measured is None:
            raise DataError("scores of validation images hold NaN or infinite values; lower the learning rate")
        return {OBJECTIVE: measured.objective, **measured.metrics}

    def cache_outputs(self) -> None:
        """Write down the raw_outputs, so that the search over them needs no network."""
        _, raw_outputs = self._find()
        save_readings(self._config.raw_outputs, raw_outputs, latency(self._method))

    def _find(self) -> tuple[ValidationSet, dict[str, Tensor]]:
        if self._validation_set is None:
            self._validation_set = ValidationSet(self._config.validation_set, self._config.stride)
        batches = self._validation_set.batches(self._batch_size, self._method.input, self._method.device)
        return self._validation_set, compute_raw_outputs(self._method, batches)


def save_readings(folder: str, raw_outputs: Mapping[str, Tensor], milliseconds: float) -> None:
    """Write raw_outputs, N×… by name, and the latency of whom they are from."""
    for name, value in raw_outputs.items():
        files.write_array(files.join(folder, f"{name}.npy"), value.cpu().numpy())
    files.write_json(files.join(folder, RAW_OUTPUTS), {"names": list(raw_outputs), "latency_ms": milliseconds})


def load_readings(folder: str) -> tuple[dict[str, Tensor], float]:
    """What `save_readings` wrote."""
    told = files.read_json(files.join(folder, RAW_OUTPUTS))
    arrays = {name: files.read_array(files.join(folder, f"{name}.npy")) for name in told["names"]}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, told["latency_ms"]


def latency(method: Method) -> float:
    """Milliseconds of a prediction of one image, decoding apart: the median of some, on the method's device."""
    image = torch.zeros(1, 3, method.input.side, method.input.side, device=method.device)
    times = []
    for _ in range(TIMED_PREDICTIONS + 1):
        start = time.perf_counter()
        method.predict(image).score.cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def memory(method: Method) -> float:
    """Megabytes of weights and, where there is one, of the memory bank."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*method.parameters(), *method.buffers()])
    if isinstance(method, MemoryMethod) and method.bank is not None:
        size += 4 * method.bank.rows * method.bank.shards[0].dimension
    return size / 1e6
