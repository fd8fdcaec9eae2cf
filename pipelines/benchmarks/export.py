"""Every method as an ONNX file: how far its scores and maps are from PyTorch's, and how fast ONNX Runtime and PyTorch
are on one CPU core.

    python -m pipelines.benchmarks.export --output export.json

Methods have their own defaults but a ResNet-18 (UniFormaly a ViT-Tiny) with random weights, which take the same time as
others, and memory banks of patches of drawn images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from pipelines.serving.export_graph import IMAGES, MAP, SCORE, ModelGraph, write_onnx
from pipelines.serving.gate import open_session
from unianom.configs import all_configs
from unianom.configs.backbone import BackboneConfig
from unianom.data.drawing.corpus import draw_sample
from unianom.data.image import prepare_image
from unianom.data.tensors import normalise
from unianom.memory.index import MemoryBank
from unianom.methods import METHODS, MemoryMethod, Method
from unianom.methods.trained import TrainedMethod, TrainingBatch
from unianom.model import Model

ENCODERS = {"uniformaly": "vit_tiny_patch16_224"}
ENCODER = "resnet18"

OPSET = 20

CATEGORIES = ("weave", "cap")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a row for each method and write all to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--methods", nargs="*", default=sorted(METHODS), help="by name")
    parser.add_argument("--bank", type=int, default=10_000, help="vectors of memory banks")
    parser.add_argument("--images", type=int, default=4, help="images of the one batch that is run")
    parser.add_argument("--rounds", type=int, default=3, help="turns that both take; the median counts")
    parser.add_argument("--output", help="JSON file")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("method       encoder               opset  score    map      ONNX Runtime, img/s  PyTorch, img/s  ratio")
    rows = [measure(name, given) for name in given.methods]
    if given.output:
        Path(given.output).write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Export one method and let PyTorch and ONNX Runtime take turns on one batch."""
    method = make_method(name, given.bank)
    images = drawn_images(method, given.images, first=100)
    prepared = normalise(list(images), method.input)
    prediction = method.predict(prepared)
    expected = (prediction.score.numpy(), prediction.anomaly_map.numpy())
    pytorch = [seconds_of(lambda: method.predict(prepared)) for _ in range(given.rounds)]
    with tempfile.TemporaryDirectory() as folder:
        made = write_onnx(ModelGraph(Model(method)), Path(folder) / "model.onnx", OPSET)
        session = open_session(made.path, threads=1)
        found = session.run([SCORE, MAP], {IMAGES: images})
        runtime = [seconds_of(lambda: session.run([SCORE, MAP], {IMAGES: images})) for _ in range(given.rounds)]
    score, anomaly_map = (
        float(np.abs(one - other).max() / np.abs(other).max()) for one, other in zip(found, expected, strict=True)
    )
    row = {
        "method": name,
        "encoder": method.config.backbone.name,
        "opset": OPSET,
        "score_error": score,
        "map_error": anomaly_map,
        "onnxruntime_images_per_second": len(images) / median(runtime),
        "pytorch_images_per_second": len(images) / median(pytorch),
        "ratio": median(pytorch) / median(runtime),
    }
    print(
        f"{name:<12} {row['encoder']:<21} {OPSET:<6} {score:.1e}  {anomaly_map:.1e}  "
        f"{row['onnxruntime_images_per_second']:<20.3g} {row['pytorch_images_per_second']:<15.3g} {row['ratio']:.2f}",
        flush=True,
    )
    return row


def seconds_of(run: Callable[[], Any]) -> float:
    """Return CPU seconds, of all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def make_method(name: str, rows: int) -> Method[Any]:
    """Return a method with random weights and, where it has one, a bank of so many vectors."""
    backbone = BackboneConfig(ENCODERS.get(name, ENCODER), weights="random")
    method = METHODS[name](all_configs()[name](backbone=backbone)).eval()
    if isinstance(method, MemoryMethod):
        vectors: list[np.ndarray] = []
        with torch.inference_mode():
            while sum(map(len, vectors)) < rows:
                images = drawn_images(method, 8, first=8 * len(vectors))
                embedding = method.embed_for_bank(normalise(list(images), method.input))
                vectors.append(embedding.patches[embedding.keep].numpy())
        method.bank = MemoryBank.build(np.concatenate(vectors)[:rows], proposals=True)
    elif isinstance(method, TrainedMethod):
        batch = normalise(list(drawn_images(method, 4)), method.input)
        mask = torch.zeros(4, 1, *batch.shape[2:])
        mask[:, :, 20:60, 30:90] = 1
        copies = torch.where(mask > 0, batch.flip(2), batch)
        category = torch.arange(4) % len(CATEGORIES)
        batches = [TrainingBatch(category, images=batch, synthetic_images=copies, synthetic_mask=mask)]
        method.finalize(batches, list(CATEGORIES))
    return method


def drawn_images(method: Method[Any], count: int, first: int = 0) -> np.ndarray:
    """Return drawn pictures as the method's input, count×S×S×3 uint8, of both categories in turn."""
    pictures = (draw_sample(CATEGORIES[number % 2], first + number)[0] for number in range(count))
    return np.stack([prepare_image(picture, method.input) for picture in pictures])


if __name__ == "__main__":
    main()
