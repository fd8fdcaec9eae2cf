"""jobs/score.py in three stages, each on the processes that suit it; writes what `range_scorer` writes.

any CPU: read, decode, resize ─uint8─▶ a device: normalise, forward, search, decide ─▶ any CPU: encode maps, write
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipelines.inference.range_predictor import RangePredictor
from pipelines.inference.range_reader import RangeReader
from pipelines.inference.range_writer import RangeWriter
from pipelines.runtime.stages import Stages
from unianom.data.image import InputPolicy
from unianom.options import from_plain


def scoring_stages(arguments: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> Stages:
    """Return the stages of a scoring.

    Args:
        arguments: of `RangeScorer`.
        models: contents of `model.json`, in the order of the model set's folders.
    """
    folders = arguments["model_set"].folders
    policies = {
        folder: from_plain(InputPolicy, model["config"]["input"]) for folder, model in zip(folders, models, strict=True)
    }
    read = {name: arguments[name] for name in ("shards", "selection", "model_set", "limits")}
    compute = {name: arguments[name] for name in ("execution", "batch_size", "maps", "fold")}
    write = {name: arguments[name] for name in ("digests", "output", "plan")}
    return Stages(
        read=partial(RangeReader, policies=policies, **read),
        compute=partial(RangePredictor, **compute),
        write=partial(RangeWriter, **write),
    )
