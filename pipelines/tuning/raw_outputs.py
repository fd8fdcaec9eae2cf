"""Raw outputs of many images: computed once, kept on disk, read by every setting of the postprocess options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from unianom import files, host
from unianom.methods import Method

RAW_OUTPUTS = "_readings.json"
"""Names the arrays of kept raw outputs, once all are written, and the latency."""

RAW_OUTPUTS_FOLDER = "readings"
"""Folder of a trial for the raw outputs of its trained model, until its record is written."""


@torch.inference_mode()
def compute_raw_outputs(method: Method, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return raw outputs of all images, N×… by name, on the method's device."""
    found = []
    for images in batches:
        method.check_images(images)
        if not host.reads_at_once(images):  # `predict` would mark the scores, which are made later
            method.check_finite(images)
        found.append(method.forward(images).tensors)
    return {name: torch.cat([tensors[name] for tensors in found]) for name in found[0]}


def save_raw_outputs(folder: str, raw_outputs: Mapping[str, Tensor], milliseconds: float) -> None:
    """Write raw outputs, N×… by name, and the latency of the method that they are from."""
    for name, value in raw_outputs.items():
        files.write_array(files.join(folder, f"{name}.npy"), value.cpu().numpy())
    files.write_json(files.join(folder, RAW_OUTPUTS), {"names": list(raw_outputs), "latency_ms": milliseconds})


def load_raw_outputs(folder: str) -> tuple[dict[str, Tensor], float]:
    """Return the raw outputs and the latency that `save_raw_outputs` wrote."""
    index = files.read_json(files.join(folder, RAW_OUTPUTS))
    arrays = {name: files.read_array(files.join(folder, f"{name}.npy")) for name in index["names"]}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, index["latency_ms"]
