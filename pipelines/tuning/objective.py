"""The search over options that act after the network: many settings, one set of kept raw outputs, no network run; and
what a trial costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.data.validation_set import Measured, Table, ValidationSet
from pipelines.tuning.space import key_of
from unianom.errors import DataError
from unianom.methods import MemoryMethod, Method
from unianom.options import with_values

IMAGES_AT_ONCE = 32
"""Maps of the input's size held at a time."""

OBJECTIVE = "objective"
"""Name of what a trial reports: how well it does."""

TIMED_PREDICTIONS = 9
"""Predictions of one image each whose median time is the latency."""


class Postprocessor(Protocol):
    """What score_settings needs of a method; see `Method`."""

    map_options: ClassVar[tuple[str, ...]]

    def anomaly_maps(self, tensors: Mapping[str, Tensor], config: Any = None) -> tuple[Tensor, Tensor]: ...

    def image_scores(self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: Any = None) -> Tensor: ...


@dataclass(frozen=True)
class ScoredSetting:
    """One setting of the postprocess options and what came of it.

    Attributes:
        values: of the options, by name.
        measured: how well it does; None if its scores are not finite.
    """

    values: dict[str, Any]
    measured: Measured | None


@torch.inference_mode()
def score_settings(
    method: Postprocessor,
    raw_outputs: Mapping[str, Tensor],
    config: Any,
    settings: Sequence[Mapping[str, Any]],
    validation_set: ValidationSet,
    objective: Mapping[str, float],
) -> list[ScoredSetting]:
    """Compare settings of the postprocess options.

    Settings that share the options of the map share its making and its pixel metrics.

    Args:
        method: on the CPU, or where the raw outputs lie.
        raw_outputs: N×… each.
        config: the method's options where a setting says nothing.
        settings: postprocess options by name.
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
        scores, maps = postprocess_all(method, raw_outputs, configs, validation_set)
        pixel = _pixels(validation_set, maps, objective)
        for number, own in zip(numbers, scores, strict=True):
            results[number] = ScoredSetting(dict(settings[number]), _measured(validation_set, own, pixel, objective))
    return [results[number] for number in range(len(settings))]


def measure(
    validation_set: ValidationSet, scores: np.ndarray, maps: np.ndarray, objective: Mapping[str, float]
) -> Measured:
    """Return the metrics of N scores and N×s×s thinned maps."""
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
    """Return the interval that holds 95 % of the gains of one setting over another on images drawn anew.

    The same images for both, each time. The interval does not know of how many settings the better one is the best, so
    a gain that is not beyond chance by this is none.

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
    """Return pixel metrics, where the objective has any."""
    if not any("pixel" in name for name in objective):
        return {}
    return validation_set.pixel_table(maps, union=any(name.startswith("union_pixel") for name in objective))


def _measured(
    validation_set: ValidationSet, scores: np.ndarray, pixel: Table, objective: Mapping[str, float]
) -> Measured | None:
    if not np.isfinite(scores).all():
        return None  # this setting is no good; the others may be
    return validation_set.measured(validation_set.image_table(scores), pixel, objective)


def postprocess_all(
    method: Postprocessor, raw_outputs: Mapping[str, Tensor], configs: Sequence[Any], validation_set: ValidationSet
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return scores of all images for each config, and the maps N×s×s that all these configs share, thinned.

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


def best_setting(scored: Sequence[ScoredSetting]) -> tuple[ScoredSetting, Measured]:
    """Return the setting with the largest objective, of equals the first, and its metrics.

    Raises:
        DataError: none has finite scores.
    """
    good = [(one, one.measured) for one in scored if one.measured is not None]
    if not good:
        raise DataError("no setting gives finite scores on the validation images")
    return max(good, key=lambda pair: pair[1].objective)


def latency(method: Method) -> float:
    """Return the milliseconds of a prediction of one image without decoding: a median, on the method's device."""
    image = torch.zeros(1, 3, method.input.side, method.input.side, device=method.device)
    times = []
    for _ in range(TIMED_PREDICTIONS + 1):
        start = time.perf_counter()
        method.predict(image).score.cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def memory(method: Method) -> float:
    """Return the megabytes of weights and, where there is one, of the memory bank."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*method.parameters(), *method.buffers()])
    if isinstance(method, MemoryMethod) and method.bank is not None:
        size += 4 * method.bank.rows * method.bank.shards[0].dimension
    return size / 1e6
