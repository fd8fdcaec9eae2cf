"""The gate of an export: what the file computes has to agree with the model, or nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.serving.export_graph import CALIBRATED_MAP, CALIBRATED_SCORE, CATEGORY, IMAGES, MAP, SCORE
from pipelines.serving.gate_images import LABELLED, GateImages
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.tensors import normalise
from unianom.errors import ModelError
from unianom.metrics.curves import auroc, operating_points
from unianom.model import Model

Outputs = dict[str, np.ndarray]
"""Scores B and maps B×S×S by the names of the graph's outputs."""


def model_outputs(model: Model, images: GateImages, batch_size: int) -> list[Outputs]:
    """Return what a model says of images, batch by batch."""
    found = []
    for batch in images.batches(batch_size):
        prepared = normalise(list(images.pixels[batch]), model.method.input).to(model.method.device)
        prediction, calibration = model.examine(prepared, images.category[batch])
        tensors = {SCORE: prediction.score, MAP: prediction.anomaly_map}
        if calibration is not None:
            tensors[CALIBRATED_SCORE] = calibration.score
            tensors[CALIBRATED_MAP] = calibration.maps(prediction.anomaly_map)
        found.append({name: tensor.float().cpu().numpy() for name, tensor in tensors.items()})
    return found


def graph_inputs(pixels: np.ndarray, category: Sequence[str], categories: Sequence[str] | None) -> Outputs:
    """Return the inputs of a graph; `categories` are the calibrator's, where the graph asks for their numbers."""
    inputs: Outputs = {IMAGES: pixels}
    if categories is not None:
        inputs[CATEGORY] = np.array([categories.index(name) for name in category], np.int64)
    return inputs


def open_session(path: Path, threads: int = 0) -> Any:
    """Open an ONNX file in ONNX Runtime on the CPU; 0 threads are all.

    Raises:
        ModelError: it cannot run the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # each fault is of a class of its own
        raise ModelError(f"ONNX Runtime cannot run the exported file: {str(error).splitlines()[0]}") from error


def graph_outputs(
    path: Path, images: GateImages, batch_size: int, categories: Sequence[str] | None
) -> Iterator[Outputs]:
    """Yield what an ONNX file says of images, in the batches of `model_outputs`."""
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    for batch in images.batches(batch_size):
        values = session.run(names, graph_inputs(images.pixels[batch], images.category[batch], categories))
        yield dict(zip(names, values, strict=True))


@dataclass(frozen=True)
class Agreement:
    """How well a file agrees with its model.

    Attributes:
        images: that were compared on.
        score_error: largest difference of an image score; see `GateOptions.score_bound`.
        map_error: largest difference of a pixel; see `GateOptions.map_bound`.
        mean_map_error: mean difference of a pixel, as a share of the same.
        decisions_changed: images that another decision is made of; None where the model decides nothing.
        auroc: of the model's scores and of the file's, of these images; None of synthetic anomalies.
    """

    images: GateImages
    score_error: float
    map_error: float
    mean_map_error: float
    decisions_changed: int | None
    auroc: tuple[float, float] | None

    def __str__(self) -> str:
        normal = int((self.images.label == NORMAL).sum())
        text = (
            f"on {normal} {self.images.normals} normal and {len(self.images.label) - normal} {self.images.anomalies} "
            f"anomalous images scores differ by {self.score_error:.1e} at most, maps by {self.map_error:.1e}"
        )
        if self.decisions_changed is not None:
            text += f"; decisions that change: {self.decisions_changed}"
        if self.auroc is not None:
            text += f"; image AUROC {100 * self.auroc[0]:.2f} % by the model, {100 * self.auroc[1]:.2f} % by the file"
        return text

    def plain(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        normal = int((self.images.label == NORMAL).sum())
        return {
            "normal_images": normal,
            "normal_images_are": self.images.normals,
            "anomalous_images": len(self.images.label) - normal,
            "anomalous_images_are": self.images.anomalies,
            "score_error": self.score_error,
            "map_error": self.map_error,
            "mean_map_error": self.mean_map_error,
            "decisions_changed": self.decisions_changed,
            "auroc": None if self.auroc is None else {"model": self.auroc[0], "file": self.auroc[1]},
        }


def compare(model: Model, images: GateImages, wanted: Sequence[Outputs], found: Iterator[Outputs]) -> Agreement:
    """Compare outputs of a file with those of its model, calibrated ones, too.

    A value that is not finite where the model's is counts as infinitely far off.
    """
    pairs = list(zip(wanted, found, strict=True))
    scores, maps = [SCORE], [MAP]
    if CALIBRATED_SCORE in wanted[0]:
        scores, maps = [SCORE, CALIBRATED_SCORE], [MAP, CALIBRATED_MAP]
    score_errors = [_relative(*_joined(pairs, name)) for name in scores]
    map_errors = [_map_errors(pairs, name) for name in maps]
    ours, theirs = _joined(pairs, SCORE)
    calibrated = _joined(pairs, CALIBRATED_SCORE) if len(scores) > 1 else (None, None)
    changed = None
    if np.isfinite(theirs).all() and np.isfinite(ours).all():
        before = model.decide_each(ours, calibrated[0], images.category)
        after = model.decide_each(theirs, calibrated[1], images.category)
        changed = int((before != after).sum()) if any(decision is not None for decision in before) else None
    areas = None
    if images.anomalies == LABELLED and np.isfinite(theirs).all():
        areas = (_auroc(ours, images.label), _auroc(theirs, images.label))
    return Agreement(
        images,
        max(score_errors),
        max(largest for largest, _ in map_errors),
        max(mean for _, mean in map_errors),
        changed,
        areas,
    )


def check(agreement: Agreement, bounds: tuple[float, float], precision: str, encoder_precision: str) -> None:
    """Refuse a file that does not agree with its model.

    Raises:
        ModelError: an error is above its bound; says by how much.
    """
    if agreement.score_error <= bounds[0] and agreement.map_error <= bounds[1]:
        return
    why = "take --precision fp32, or allow" if precision != "fp32" else "allow"
    if precision == "fp32" and encoder_precision != "fp32":
        why = f"the model's encoder works in {encoder_precision} and the file's in fp32: fit the model so, or allow"
    raise ModelError(
        f"the {precision} file does not agree with the model, so nothing was written: {agreement} (allowed: scores "
        f"{bounds[0]:g}, maps {bounds[1]:g}); {why} more by --gate.score_bound and --gate.map_bound"
    )


def _joined(pairs: Sequence[tuple[Outputs, Outputs]], name: str) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([one[name] for one, _ in pairs]), np.concatenate([other[name] for _, other in pairs])


def _relative(wanted: np.ndarray, found: np.ndarray) -> float:
    """Return the largest difference of N values, relative to the value or, if that is larger, to the median of all."""
    size = np.maximum(np.abs(wanted), np.median(np.abs(wanted)))
    return _largest(np.abs(found - wanted), size)


def _map_errors(pairs: Sequence[tuple[Outputs, Outputs]], name: str) -> tuple[float, float]:
    """Return the largest and the mean difference of pixels, relative as `GateOptions.map_bound` says."""
    peaks = [np.abs(one[name]).max((1, 2)) for one, _ in pairs]
    median = np.median(np.concatenate(peaks))
    largest, means = 0.0, []
    for (one, other), peak in zip(pairs, peaks, strict=True):
        difference, size = np.abs(other[name] - one[name]), np.maximum(peak, median)
        largest = max(largest, _largest(difference.max((1, 2)), size))
        means.append(difference.mean((1, 2)) / np.where(size > 0, size, 1))
    return largest, float(np.concatenate(means).mean())


def _largest(difference: np.ndarray, size: np.ndarray) -> float:
    shares = np.divide(difference, size, out=np.where(difference > 0, np.inf, 0.0), where=size > 0)
    return float(np.nan_to_num(shares, nan=np.inf).max())


def _auroc(scores: np.ndarray, label: np.ndarray) -> float:
    return auroc(operating_points(scores[label == ANOMALOUS], np.sort(scores[label == NORMAL])))
