"""Inference with batch norm folded into convolutions, against the network as it was trained."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.benchmarks.harness import clocked, fixed_threads, interleave
from pipelines.benchmarks.options import InferenceBenchmark
from pipelines.benchmarks.report import write_report
from pipelines.runtime.models import load_model
from unianom.errors import OptionError
from unianom.execution import Execution
from unianom.methods.trained import TrainedMethod
from unianom.model import Model


def measure_inference(options: InferenceBenchmark) -> dict[str, Any]:
    """Predict by both networks in turns, and compare their scores and maps."""
    trained, folded = (load_model(options.model, Execution(options.device)) for _ in range(2))
    if not isinstance(trained.method, TrainedMethod):
        raise OptionError(f"{options.model} holds a {trained.method.name}; give a model of a trained method")
    folded.fold()
    side, count = trained.method.input.side, options.images
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, side, side, generator=generator).to(options.device)

    def predict(model: Model) -> list[tuple[torch.Tensor, torch.Tensor]]:
        predictions = map(model.method.predict, images.split(options.batch_size))
        return [(prediction.anomaly_map.cpu(), prediction.score.cpu()) for prediction in predictions]

    with fixed_threads(options.threads):
        sides = {
            "folded": clocked(count, lambda: predict(folded)),
            "as trained": clocked(count, lambda: predict(trained)),
        }
        measured = interleave(sides, options.rounds, warm_up=True)
    apart: dict[str, Any] = {}
    for place, name in enumerate(("map", "score")):
        one, other = (torch.cat([batch[place] for batch in measured.result(s)]) for s in ("folded", "as trained"))
        apart[f"largest difference, {name}"] = float((one - other).abs().max() / other.abs().max())
    ratios = {"folded ÷ as trained": measured.ratio("folded", "as trained")}
    tables = {f"{trained.method.name}, relative": {"folded": apart}}
    return write_report(options, "images", measured, ratios, tables=tables)
