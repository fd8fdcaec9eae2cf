"""What the benchmarks compare with: the bare backbone, a loop of Pillow, and what else computes metrics and coresets.

Published code that is no package is re-enacted from its description; packages are imported where they are installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from timm.models import is_model_in_modules

from pipelines.runtime.actors import set_threads
from pipelines.runtime.models import load_model
from unianom.backbones import VIT_MODULES
from unianom.configs.backbone import BackboneConfig
from unianom.errors import DataError
from unianom.model import Model

SWEEP_THRESHOLDS = 200


def bare_network(model: Model) -> torch.nn.Module:
    """The whole timm network of a model's encoder, without a head, with the model's weights.

    Blocks behind the last tap, which the model does not keep, have random weights: they take the same time.
    """
    method: Any = model.method
    config: BackboneConfig = method.config.backbone
    arguments = {**config.options, "num_classes": 0}  # also where the options name a number of classes
    if is_model_in_modules(config.name, VIT_MODULES):
        arguments["img_size"] = method.input.side
    network = timm.create_model(config.name, pretrained=False, **arguments)
    # names in the encoder have its own prefix, and timm's feature lists join the names of stages by "_"
    names = {key.replace(".", "_"): key for key in network.state_dict()}
    state = {key.split(".", 1)[1].replace(".", "_"): value for key, value in method.encoder.state_dict().items()}
    unknown = sorted(set(state) - set(names))
    if unknown:
        raise DataError(
            f"{config.name} of this timm has no weight {unknown[0]}; use the timm that the model was made with"
        )
    network.load_state_dict({names[key]: value for key, value in state.items()}, strict=False)
    return network.eval()


class BareForward:
    """Processes that do nothing but the forward pass of the bare backbone, each on one thread.

    Args:
        model: model folder.
        images: .npy file of N×3×S×S float32.
        batch_size: images in one pass.
        processes: at most so many at the same time.
    """

    def __init__(self, model: str, images: str, batch_size: int, processes: int) -> None:
        arguments = (model, images, batch_size)
        self._pool = ProcessPoolExecutor(processes, get_context("spawn"), _prepare_forward, arguments)
        self._processes = processes

    def __enter__(self) -> BareForward:
        self.run(self._processes)  # every process loads its network
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, processes: int) -> tuple[int, float]:
        """So many processes at the same time pass over the images once each; images passed, and seconds."""
        passes = [future.result() for future in [self._pool.submit(_forward) for _ in range(processes)]]
        start, end = min(p[0] for p in passes), max(p[1] for p in passes)
        return sum(p[2] for p in passes), end - start


_pass: Callable[[], tuple[float, float, int]]
"""One pass over the images, in a process of `BareForward`."""


def _prepare_forward(folder: str, images: str, batch_size: int) -> None:
    global _pass
    set_threads(1)
    model = load_model(folder, "cpu")
    config: BackboneConfig = model.method.config.backbone
    network: Any = bare_network(model)
    batches = list(torch.from_numpy(np.load(images)).split(batch_size))
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
        batches = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    precision = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]

    @torch.inference_mode()
    def forward() -> tuple[float, float, int]:
        start = time.time()
        with torch.autocast("cpu", precision, enabled=precision is not None):
            for batch in batches:
                network.forward_features(batch)
        return start, time.time(), sum(len(batch) for batch in batches)

    with torch.inference_mode():
        network.forward_features(batches[0])
    _pass = forward


def _forward() -> tuple[float, float, int]:
    return _pass()


def open_rgb(path: str) -> None:
    """Open an image file as any loader does, and drop it."""
    with Image.open(path) as image:
        image.convert("RGB")


def swept_aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """AUPRO as evaluation codes of the field loop for it: at each of 200 thresholds between the lowest and highest
    score, the share of each region and of all normal pixels that lies above.

    They find the regions of every mask again at every threshold; here they are found once, so this side is the faster
    for it. The last false-positive rate below `limit` is taken for the limit, as they do.
    """
    regions: list[tuple[Any, ...]] = []  # map, rows, columns
    for number, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [(number, *np.nonzero(labels == region)) for region in range(1, count + 1)]
    normal = ~masks
    low, high = float(maps.min()), float(maps.max())
    rates, overlaps = [], []
    for step in range(SWEEP_THRESHOLDS):
        above = maps > np.float32(low + (high - low) * step / SWEEP_THRESHOLDS)
        rate = np.count_nonzero(above & normal) / np.count_nonzero(normal)
        if rate < limit:
            rates.append(rate)
            overlaps.append(np.mean([above[region].mean() for region in regions]))
    fpr, pro = np.array(rates[::-1]), np.array(overlaps[::-1])
    return float(np.trapezoid(pro, fpr / fpr[-1]))


def plain_aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Exact AUPRO as its definition suggests: all pixels sorted, an anomalous one weighing 1 / (regions × its region's
    pixels), a normal one 1 / normal pixels; both summed up from the highest score down, ties at once."""
    weights = np.zeros(masks.shape)
    count = 0
    for mask, weight in zip(masks, weights, strict=True):
        labels, regions = ndimage.label(mask, np.ones((3, 3)))
        for region in range(1, regions + 1):
            weight[labels == region] = 1 / np.count_nonzero(labels == region)
        count += regions
    order = np.argsort(-maps, axis=None)
    scores, normal = maps.ravel()[order], ~masks.ravel()[order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    rates = np.append(0, np.cumsum(normal)[ends] / np.count_nonzero(normal))
    overlaps = np.append(0, np.cumsum(weights.ravel()[order])[ends] / count)
    inside = rates <= limit
    x = np.append(rates[inside], limit)
    y = np.append(overlaps[inside], np.interp(limit, rates, overlaps))
    return float(np.trapezoid(y, x) / limit)


def scikit_learn_metrics(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """AUROC and AP of all pixels by scikit-learn, AUPRO by `plain_aupro`."""
    truth, scores = masks.ravel(), maps.ravel()
    return {
        "aupro": plain_aupro(maps, masks),
        "auroc": float(roc_auc_score(truth, scores)),
        "ap": float(average_precision_score(truth, scores)),
    }


def anomalib_metrics(maps: np.ndarray, masks: np.ndarray, aupro_only: bool = False) -> Callable[[], dict[str, float]]:
    """anomalib's AUPRO of the same maps, and the AUROC and average precision of torchmetrics that it wraps."""
    from anomalib.metrics.aupro import _AUPRO
    from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

    tensors = torch.from_numpy(maps), torch.from_numpy(masks.astype(np.uint8))
    classes = {"aupro": partial(_AUPRO, fpr_limit=0.3), "auroc": BinaryAUROC, "ap": BinaryAveragePrecision}

    def work() -> dict[str, float]:
        found = {}
        for name, made in classes.items():
            if name == "aupro" or not aupro_only:
                metric = made()
                metric.update(*(tensors if name == "aupro" else (tensors[0].flatten(), tensors[1].flatten())))
                found[name] = float(metric.compute())
        return found

    return work


def adeval_metrics(maps: np.ndarray, masks: np.ndarray) -> Callable[[], dict[str, float]]:
    """ADEval's three metrics of the same maps, on the CPU, from histograms."""
    import adeval

    if not hasattr(np, "trapz"):
        setattr(np, "trapz", np.trapezoid)  # noqa: B010  # ADEval 1.1 calls it by the name it had in NumPy 1
    truth = masks.astype(np.uint8)
    return lambda: dict(zip(("auroc", "ap", "aupro"), map(float, adeval.auroc_aupr_aupro(maps, truth)), strict=True))


def plain_coreset(features: np.ndarray, starts: np.ndarray, count: int) -> list[int]:
    """PatchCore's approximate greedy coreset as its released code goes about it: every pick takes the distances of all
    rows to it by one float32 matrix product, joins them to the nearest distances so far and takes the minimum."""
    rows = torch.from_numpy(features)

    def distances(to: torch.Tensor) -> torch.Tensor:
        squares = rows.pow(2).sum(1, keepdim=True) + to.pow(2).sum(1) - 2 * rows @ to.T
        return squares.clamp(min=0).sqrt()  # N K

    nearest = distances(rows[torch.from_numpy(starts)]).mean(1, keepdim=True)  # N 1
    picks: list[int] = []
    for _ in range(count):
        pick = int(nearest.argmax())
        picks.append(pick)
        nearest = torch.cat([nearest, distances(rows[pick : pick + 1])], dim=1).min(1, keepdim=True).values
    return picks


def anomalib_coreset(features: np.ndarray, count: int, seed: int) -> Callable[[], list[int]]:
    """anomalib's k-centre greedy on features that are projected already."""
    from anomalib.models.components.sampling import KCenterGreedy

    unprojected = torch.from_numpy(features)[:, :, None]  # it projects matrices only

    def work() -> list[int]:
        torch.manual_seed(seed)
        return KCenterGreedy(unprojected, (count + 0.5) / len(features)).select_coreset_idxs()

    return work
