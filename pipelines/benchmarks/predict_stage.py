"""The predict stage of scoring alone, on one device, against the bare forward pass of its backbone.

    python -m pipelines.benchmarks.predict_stage --device cuda --output predict_stage.json

It needs PyTorch, timm (with what they bring) and annotated-types, no Ray, FAISS or Arrow, so that it runs wherever a
GPU is at hand. Networks have random weights, which take the same time as others; their banks hold patches of random
images. Anomaly maps are not blurred: that would need SciPy and take the same time, since upsampling and blur are one
matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import is_model_in_modules
from torch import Tensor

from unianom.backbones import VIT_MODULES
from unianom.configs.backbone import BackboneConfig
from unianom.configs.patchcore import PatchCoreConfig
from unianom.configs.uniformaly import UniFormalyConfig
from unianom.data.image import InputPolicy
from unianom.execution import Execution
from unianom.memory.device_search import DeviceBank
from unianom.methods.memory import MemoryMethod
from unianom.methods.patchcore import PatchCore
from unianom.methods.uniformaly import UniFormaly

ENCODERS = ("vit_base_patch16_224", "wide_resnet50_2", "tf_efficientnet_b4")
"""Encoders that are measured unless others are named: transformers in UniFormaly, all others in PatchCore."""

BANKS = (10_000, 100_000)
"""Vectors of the banks that are measured unless others are named."""

COMPARED = 64
"""Patches whose nearest vectors are also found in float64 on the host."""


@dataclass(frozen=True)
class PlainBank:
    """The vectors of a memory bank without an index; it is only searched on a device.

    Attributes:
        array: N×D float32.
        kind: as of `MemoryBank`.
    """

    array: np.ndarray
    kind: str = "flat"

    @property
    def rows(self) -> int:
        """How many vectors."""
        return len(self.array)

    def vectors(self) -> np.ndarray:
        """Return all vectors, N×D."""
        return self.array


def make_method(encoder: str, precision: str, side: int) -> MemoryMethod:
    """Return a memory method on this encoder, without a bank."""
    transformer = is_model_in_modules(encoder, VIT_MODULES)
    backbone: Any = BackboneConfig(encoder, weights="random", precision=precision, channels_last=not transformer)  # type: ignore[arg-type]
    policy = InputPolicy(resize="stretch", size=side, crop=None)
    method: MemoryMethod
    if transformer:
        method = UniFormaly(UniFormalyConfig(backbone=backbone, input=policy, blur_sigma=0.0))
    else:
        method = PatchCore(PatchCoreConfig(backbone=backbone, input=policy, blur_sigma=0.0))
    method.execution = Execution(search="device")
    return method.eval()


def bare_forward(encoder: str, side: int, device: torch.device) -> Callable[[Tensor], Any]:
    """Return the forward pass of the whole timm network without a head, with weights in bfloat16."""
    transformer = is_model_in_modules(encoder, VIT_MODULES)
    arguments: dict[str, Any] = {"img_size": side} if transformer else {}
    network: Any = timm.create_model(encoder, pretrained=False, num_classes=0, **arguments).eval()
    network.to(device, torch.bfloat16, memory_format=torch.preserve_format if transformer else torch.channels_last)

    @torch.inference_mode()
    def forward(images: Tensor) -> Any:
        return network.forward_features(images.bfloat16())

    return forward


@torch.inference_mode()
def random_vectors(method: MemoryMethod, count: int, batch_size: int) -> np.ndarray:
    """Return so many patches of random images, count×D float32."""
    found: list[np.ndarray] = []
    seed = 0
    while sum(map(len, found)) < count:
        embedding = method.embed(random_images(batch_size, method.input.side, seed).to(method.device))
        found.append(embedding.patches.flatten(0, 1).float().cpu().numpy())
        seed += 1
    return np.concatenate(found)[:count]


def random_images(count: int, side: int, seed: int) -> Tensor:
    """Return count×3×side×side float32 of smooth random blobs with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    blobs = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return blobs + 0.1 * torch.randn(count, 3, side, side, generator=generator)


def seconds_of(run: Callable[[Tensor], Any], batches: Sequence[Tensor], device: torch.device) -> float:
    """Return how long it takes to run all batches, the device's work included."""
    wait_for(device)
    start = time.perf_counter()
    for batch in batches:
        run(batch)
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def stage(method: MemoryMethod, maps: bool) -> Callable[[Tensor], Any]:
    """Return what scoring does with a batch: scores are fetched, and all maps if they are kept."""

    def run(images: Tensor) -> Any:
        if maps:
            prediction = method.predict(images)
            return prediction.score.cpu(), prediction.anomaly_map.cpu()
        return method.score_images(images).score.cpu()

    return run


def measure(encoder: str, banks: Sequence[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let the bare network and the stage with each bank, with and without maps, take turns; return a row for each."""
    device = torch.device(options.device)
    method = make_method(encoder, "bf16", options.side).to(device)
    vectors = random_vectors(method, max(banks), options.batch_size)
    distinct = random_images(4 * options.batch_size, options.side, -1).to(device).split(options.batch_size)
    batches = [batch for _, batch in zip(range(options.batches), cycle(distinct))]
    bare = bare_forward(encoder, options.side, device)
    rows = []
    for bank in banks:
        method.bank = PlainBank(vectors[:bank])  # type: ignore[assignment]
        for maps in (False, True):
            sides = {"bare": bare, "stage": stage(method, maps)}
            for run in sides.values():
                seconds_of(run, batches[:2], device)  # warm up
            turns = [
                {name: seconds_of(run, batches, device) for name, run in sides.items()} for _ in range(options.rounds)
            ]
            images = len(batches) * options.batch_size
            rows.append(
                {
                    "encoder": encoder,
                    "method": method.name,
                    "bank": bank,
                    "dimension": vectors.shape[1],
                    "maps": maps,
                    "images_per_second": images / statistics.median(turn["stage"] for turn in turns),
                    "bare_images_per_second": images / statistics.median(turn["bare"] for turn in turns),
                    "ratios": [turn["bare"] / turn["stage"] for turn in turns],
                    "ratio": statistics.median(turn["bare"] / turn["stage"] for turn in turns),
                }
            )
            print_row(rows[-1])
    return rows


def print_row(row: dict[str, Any] | None = None) -> None:
    """Print a row of the table, or its head."""
    columns = ("encoder", "method", "bank", "maps", "images_per_second", "bare_images_per_second", "ratio")
    titles = ("encoder", "method", "bank", "maps", "images/s", "bare images/s", "ratio")
    values = titles if row is None else [f"{row[c]:.4g}" if isinstance(row[c], float) else row[c] for c in columns]
    print(" ".join(f"{value!s:>{width}}" for value, width in zip(values, (24, 11, 8, 6, 9, 14, 7), strict=True)))


def agreement(encoder: str, bank: int, options: argparse.Namespace) -> dict[str, Any]:
    """Compare scores of a few images on the device, in float32 and in bfloat16, with those of the CPU in float32, and
    the nearest vectors that the device finds with those in float64."""
    device = torch.device(options.device)
    reference = make_method(encoder, "fp32", options.side)
    vectors = random_vectors(reference, bank, options.batch_size)
    images = random_images(4, options.side, -1)
    reference.bank = PlainBank(vectors)  # type: ignore[assignment]
    expected = reference.predict(images)
    row: dict[str, Any] = {"encoder": encoder, "bank": bank}
    for precision in ("fp32", "bf16"):
        method = make_method(encoder, precision, options.side).to(device)
        method.load_state_dict(reference.state_dict())
        method.bank = PlainBank(vectors)  # type: ignore[assignment]
        found = method.predict(images.to(device))
        row[f"score apart, {precision}"] = _apart(found.score, expected.score)
        row[f"map apart, {precision}"] = _apart(found.anomaly_map, expected.anomaly_map)
        method.bank = None
    with torch.inference_mode():
        queries = reference.embed(images).patches.flatten(0, 1)[:: max(1, 4 * 196 // COMPARED)][:COMPARED].clone()
    distances, rows = _nearest_in_double(queries.numpy(), vectors)
    for products in ("fp32", "bf16"):
        on_device = DeviceBank(vectors, device, products)  # type: ignore[arg-type]
        squared, places = (part.cpu().numpy()[:, 0] for part in on_device.search(queries.to(device), 1))
        row[f"search apart, {products}"] = float((np.abs(squared - distances) / distances).max())
        row[f"other rows, {products}"] = float((places != rows).mean())
    return row


def _apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((found.cpu() - expected).abs().max() / expected.abs().max())


def _nearest_in_double(queries: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return squared distances to the nearest vectors and their rows, by their definition in float64."""
    each = [((vectors.astype(np.float64) - query) ** 2).sum(1) for query in queries]
    rows = np.array([one.argmin() for one in each])
    return np.array([one[row] for one, row in zip(each, rows, strict=True)]), rows


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "timm": timm.__version__, "threads": torch.get_num_threads()}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="as PyTorch names it")
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS), help="timm models")
    parser.add_argument("--banks", nargs="+", type=int, default=list(BANKS), help="vectors of the memory banks")
    parser.add_argument("--batch_size", type=int, default=32, help="images in one forward pass")
    parser.add_argument("--batches", type=int, default=20, help="batches of a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--side", type=int, default=224, help="height and width of the images in pixels")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = parse(arguments)
    output = Path(options.output)
    if output.exists():
        raise SystemExit(f"{output} is there already; choose another output, or remove it first")
    device = torch.device(options.device)
    content: dict[str, Any] = {
        "options": vars(options),
        "machine": machine_facts(device),
        "stages": [],
        "agreement": [],
    }
    print(", ".join(f"{name} {value}" for name, value in content["machine"].items()))
    print_row()
    for encoder in options.encoders:
        content["stages"] += measure(encoder, options.banks, options)
        output.write_text(json.dumps(content, indent=2))  # what is measured is kept, whatever happens to the rest
    for encoder in options.encoders:
        content["agreement"].append(agreement(encoder, min(options.banks), options))
        print(
            ", ".join(
                f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in content["agreement"][-1].items()
            )
        )
        output.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
