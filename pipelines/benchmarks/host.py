"""What an image costs the host while it is scored, by part: a scoring whose network costs nothing."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from pipelines.benchmarks.harness import Timing, fixed_threads, interleave
from pipelines.benchmarks.options import HostBenchmark
from pipelines.benchmarks.report import write_report
from pipelines.inference.range_scorer import STAGES, RangeScorer
from pipelines.runtime.model_set import ModelSet
from unianom.data.image import IMAGENET_MEAN, IMAGENET_STD, ImageLimits, InputPolicy
from unianom.data.maps import MapsKept
from unianom.data.shards import Selection, ShardSet
from unianom.execution import CPU
from unianom.methods.base import Method, Prediction, ScoredImages
from unianom.methods.layers.postprocess import upsample_and_blur
from unianom.model import Model
from unianom.options import to_plain
from unianom.thresholds import Threshold

ONE_FLAGGED_OF = 20
"""Every so many images, one comes to fail: about what a threshold of 5 % does to normal images."""

OWN = "the worker's own thread"
TOTAL = "all threads"
REST = "rest"


class FreeMethod(Method[Any]):
    """A method that looks at no pixel: the same map for all images, and a high score for one of `ONE_FLAGGED_OF`.

    Args:
        policy: how images become its input.
    """

    name = "free"

    def __init__(self, policy: InputPolicy) -> None:
        super().__init__()
        self.config = SimpleNamespace(input=policy)
        self.unused = nn.Parameter(torch.zeros(1))  # tells the device
        cells = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0)) ** 4
        self.map = upsample_and_blur(cells, policy.side, 4.0)
        self.seen = 0

    def predict(self, images: Tensor) -> Prediction:
        """Return the map for each of B images, and their scores: 1 for one of `ONE_FLAGGED_OF`, else 0."""
        numbers = torch.arange(self.seen, self.seen + len(images))
        self.seen += len(images)
        maps = self.map.expand(len(images), -1, -1)
        return Prediction(maps, (numbers % ONE_FLAGGED_OF == 0).float(), maps, maps[:, None, :1, :1])

    def score_images(self, images: Tensor) -> ScoredImages:
        return ScoredImages.of(self.predict(images))


class FreeScorer(RangeScorer):
    """A `RangeScorer` whose network costs nothing.

    Args:
        policy: how images become its input.
        arguments: of `RangeScorer`.
    """

    def __init__(self, policy: InputPolicy, **arguments: Any) -> None:
        self._free = Model(FreeMethod(policy), threshold=Threshold(0.5, 0.05, 0.95, 100, 95, 0.05))
        super().__init__(**arguments)

    def _model(self, folder: str) -> Model:
        return self._free


def measure_host(options: HostBenchmark) -> dict[str, Any]:
    """Score a shard set by a network that costs nothing, with all, some and no maps; CPU time by stage."""
    shards = ShardSet.open(options.shards)
    policy = InputPolicy(
        resize=options.resize, size=options.size, crop=options.crop, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    kinds: tuple[MapsKept, ...] = get_args(MapsKept)
    with TemporaryDirectory(prefix="unianom-benchmark-") as folder, fixed_threads(1):
        sides = {f"maps {kind}": partial(_score, options, shards, policy, kind, folder) for kind in kinds}
        measured = interleave(sides, options.rounds, warm_up=True)
    images = measured.turns[f"maps {kinds[0]}"][0].amount
    table: dict[str, dict[str, float]] = {}
    for side, turns in measured.turns.items():
        fastest = min(turns, key=lambda turn: turn.seconds)  # what else the machine does only adds to it
        for stage, spent in fastest.result.items():
            table.setdefault(stage, {})[side] = round(1000 * spent / images, 3)
    totals = {name: table.pop(name) for name in (REST, TOTAL, OWN)}
    return write_report(
        options,
        "images",
        measured,
        {"maps all ÷ maps none": measured.ratio("maps all", "maps none")},
        tables={f"CPU milliseconds an image, {options.threads} threads, fastest round": {**table, **totals}},
    )


def _score(options: HostBenchmark, shards: ShardSet, policy: InputPolicy, maps: MapsKept, folder: str) -> Timing:
    """Score all images once; CPU seconds of the process, and by stage as the result."""
    with TemporaryDirectory(dir=folder) as output:
        scorer = FreeScorer(
            policy,
            shards=shards,
            selection=Selection(),
            model_set=ModelSet("", {}),
            digests={"": "free"},
            output=str(Path(output)),
            plan="0" * 64,
            maps=maps,
            batch_size=options.batch_size,
            limits=ImageLimits(),
            execution=CPU,
            threads=options.threads,
        )
        start, own = time.process_time(), time.thread_time()
        stages: dict[str, float] = {}
        images = 0
        for within in shards.ranges(Selection()):
            result = scorer.run(to_plain(within))
            images += result["rows"]
            for stage, seconds in result[STAGES].items():
                stages[stage] = stages.get(stage, 0.0) + seconds
        total, own = time.process_time() - start, time.thread_time() - own
    stages |= {REST: total - sum(stages.values()), TOTAL: total, OWN: own}
    return Timing(images, total, stages)
