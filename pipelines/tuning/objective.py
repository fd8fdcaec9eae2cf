"""The search over options that act after the network: many settings, one set of kept readings, no network run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.data.validation_set import Measured, ProxySet, Table
from pipelines.tuning.space import key_of
from unianom import files
from unianom.errors import DataError
from unianom.methods import Maps, MemoryMethod, Method
from unianom.serialise import with_values

IMAGES_AT_ONCE = 32
"""Maps of the input's size held at a time."""

OBJECTIVE = "objective"
"""What a trial reports: how well it does."""

READINGS = "_readings.json"
"""Names the arrays of kept readings, once all are written, and tells the latency."""

TIMED_PREDICTIONS = 9
"""Predictions of one image each whose median time is the latency."""


class Reader(Protocol):
    """What search_readings needs of a method; see `Method`."""

    map_options: ClassVar[tuple[str, ...]]

    def read_maps(self, readings: Mapping[str, Tensor], config: Any = None) -> Maps: ...

    def read_scores(self, readings: Mapping[str, Tensor], anomaly_map: Tensor, config: Any = None) -> Tensor: ...


@dataclass(frozen=True)
class Reading:
    """One setting of the reading options and what came of it.

    Attributes:
        values: of the options, by name.
        measured: how well it does; None if its scores are not finite.
    """

    values: dict[str, Any]
    measured: Measured | None


@torch.inference_mode()
def find_readings(method: Method, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Readings of all images, N×… by name, where the method lies."""
    found = []
    for images in batches:
        method.check_images(images)
        found.append(method.find(images).readings)
    return {name: torch.cat([readings[name] for readings in found]) for name in found[0]}


@torch.inference_mode()
def search_readings(
    method: Reader,
    readings: Mapping[str, Tensor],
    config: Any,
    settings: Sequence[Mapping[str, Any]],
    proxy: ProxySet,
    objective: Mapping[str, float],
) -> list[Reading]:
    """Compare settings of the reading options.

    Settings that share the options of the map share its making and its pixel metrics.

    Args:
        method: on the CPU, or where the readings lie.
        readings: N×… each.
        config: the method's options where a setting says nothing.
        settings: reading options by name.
        proxy: the N images.
        objective: weights of the metrics.

    Returns:
        One for each setting, in their order.
    """
    groups: dict[str, list[int]] = {}
    for number, values in enumerate(settings):
        shared = {name: value for name, value in values.items() if name in method.map_options}
        groups.setdefault(key_of(shared), []).append(number)
    results: dict[int, Reading] = {}
    for numbers in groups.values():
        configs = [with_values(config, settings[number]) for number in numbers]
        scores, maps = read(method, readings, configs, proxy)
        pixel = _pixels(proxy, maps, objective)
        for number, own in zip(numbers, scores, strict=True):
            results[number] = Reading(dict(settings[number]), _measured(proxy, own, pixel, objective))
    return [results[number] for number in range(len(settings))]


def measure(proxy: ProxySet, scores: np.ndarray, maps: np.ndarray, objective: Mapping[str, float]) -> Measured:
    """The verdict on N scores and N×s×s thinned maps."""
    return proxy.measured(proxy.image_table(scores), _pixels(proxy, maps, objective), objective)


def gain_interval(
    proxy: ProxySet,
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
        proxy: the N images.
        better, worse: scores N and thinned maps N×s×s of either setting.
        objective: weights of the metrics.
        resamples, seed: of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    gains = []
    for _ in range(resamples):
        drawn = proxy.resampled(rng)
        first, second = (measure(drawn, *setting, objective).objective for setting in (better, worse))
        gains.append(first - second)
    low, high = np.quantile(gains, [0.025, 0.975])
    return float(low), float(high)


def _pixels(proxy: ProxySet, maps: np.ndarray, objective: Mapping[str, float]) -> Table:
    """Pixel metrics, where the objective has any."""
    if not any("pixel" in name for name in objective):
        return {}
    return proxy.pixel_table(maps, union=any(name.startswith("union_pixel") for name in objective))


def _measured(proxy: ProxySet, scores: np.ndarray, pixel: Table, objective: Mapping[str, float]) -> Measured | None:
    if not np.isfinite(scores).all():
        return None  # this setting is no good; the others may be
    return proxy.measured(proxy.image_table(scores), pixel, objective)


def read(
    method: Reader, readings: Mapping[str, Tensor], configs: Sequence[Any], proxy: ProxySet
) -> tuple[list[np.ndarray], np.ndarray]:
    """Scores of all images for each config, and the maps N×s×s that all these configs share, thinned.

    Args:
        method, readings, proxy: as of `search_readings`.
        configs: options that differ in others than those of the map.

    Raises:
        DataError: maps are not finite.
    """
    scores: list[list[Tensor]] = [[] for _ in configs]
    maps = []
    for start in range(0, len(proxy), IMAGES_AT_ONCE):
        part = {name: value[start : start + IMAGES_AT_ONCE] for name, value in readings.items()}
        anomaly_map = method.read_maps(part, configs[0]).anomaly_map
        maps.append(proxy.thinned(anomaly_map.cpu().numpy()))
        for own, config in zip(scores, configs, strict=True):
            own.append(method.read_scores(part, anomaly_map, config).float().cpu())
    thinned = np.concatenate(maps)
    if not np.isfinite(thinned).all():
        raise DataError("anomaly maps of validation images hold NaN or infinite values")
    return [torch.cat(own).numpy() for own in scores], thinned


def best_of(readings: Sequence[Reading]) -> Reading:
    """The one with the largest objective; of equals the first.

    Raises:
        DataError: none has finite scores.
    """
    good = [(one.measured.objective, one) for one in readings if one.measured is not None]
    if not good:
        raise DataError("no setting gives finite scores on the validation images")
    return max(good, key=lambda pair: pair[0])[1]


# --------------------------------------------------------------------------------------------- in a trial that trains
@dataclass(frozen=True)
class ObjectiveValidation:
    """What a trained trial is compared on with others.

    Attributes:
        proxy: URI of the validation images.
        stride: see `ProxyOptions.pixel_stride`.
        objective: weights of the metrics.
        readings: folder for the readings of the trained model.
    """

    proxy: str
    stride: int
    objective: dict[str, float]
    readings: str

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
        self._proxy: ProxySet | None = None

    def run(self) -> dict[str, float]:
        """The objective, by the method's own reading options, and the metrics it is made of.

        Raises:
            DataError: scores are not finite.
        """
        proxy, readings = self._find()
        objective = self._config.objective
        measured = search_readings(self._method, readings, self._method.config, [{}], proxy, objective)[0].measured
        if measured is None:
            raise DataError("scores of validation images hold NaN or infinite values; lower the learning rate")
        return {OBJECTIVE: measured.objective, **measured.metrics}

    def cache_outputs(self) -> None:
        """Write down the readings, so that the search over them needs no network."""
        _, readings = self._find()
        save_readings(self._config.readings, readings, latency(self._method))

    def _find(self) -> tuple[ProxySet, dict[str, Tensor]]:
        if self._proxy is None:
            self._proxy = ProxySet(self._config.proxy, self._config.stride)
        batches = self._proxy.batches(self._batch_size, self._method.input, self._method.device)
        return self._proxy, find_readings(self._method, batches)


def save_readings(folder: str, readings: Mapping[str, Tensor], milliseconds: float) -> None:
    """Write readings, N×… by name, and the latency of whom they are from."""
    for name, value in readings.items():
        files.write_array(files.join(folder, f"{name}.npy"), value.cpu().numpy())
    files.write_json(files.join(folder, READINGS), {"names": list(readings), "latency_ms": milliseconds})


def load_readings(folder: str) -> tuple[dict[str, Tensor], float]:
    """What `save_readings` wrote."""
    told = files.read_json(files.join(folder, READINGS))
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
