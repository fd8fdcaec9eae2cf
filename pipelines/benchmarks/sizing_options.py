"""What `jobs/benchmark.py sizing` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.data.options import ListingOptions
from pipelines.runtime.options import TrackingOptions
from unianom.configs import CONFIGS, all_configs
from unianom.data.image import ImageLimits
from unianom.errors import OptionError
from unianom.execution import Search
from unianom.options import AtLeastOne, AtLeastZero, OpenShare, Options, Positive, named


@dataclass(frozen=True)
class SizingBenchmark(Options):
    """How many machines a scoring needs: what each stage takes for an image, CPU cores that the rate of a GPU needs,
    the resource that bounds a node, and what a million images cost.

    Args:
        output: JSON file to write; path or URI. What is written while measuring lies beside it, and is removed.
        model: model folder of one model; path or URI; null makes one of `method` and `backbone`.
        method: of the model that is made.
        backbone: its encoder, a timm model, with random weights, which take the same time as others.
        bank_rows: vectors of its memory bank, patches of the images that are measured.
        images: folders of images, tables of paths or URIs, or image files, on any store; as of jobs/score.py.
        listing: how these are listed.
        shards: shard set; path or URI. Where neither images nor shards are given, JPEG files of 224 × 224 are drawn.
        sample: images that are measured, spread over the first 10,000; null takes 128, with a GPU 2,048.
        device: "cpu", "cuda", or "auto", a GPU where there is one.
        engine: what computes a frozen encoder; as `runtime.engine` of jobs/score.py.
        search: how memory banks are searched; as of jobs/score.py.
        batch_size: images in one forward pass.
        flagged: share of the images that come to review or fail, whose maps `--maps flagged` keeps.
        gpu_rate: images per second that one GPU computes, such as [1000, 2500] of two kinds, which need not be here;
            empty takes what was measured, where there is a GPU.
        cores: CPU cores of a node; null takes those of this machine.
        gpus: GPUs of a node; null takes those of this machine, or one where `gpu_rate` is given.
        price_per_hour: of a node, in any currency.
        corpus: images to score, for which machines are counted.
        hours: in which they are to be scored.
        workers: workers beside each other, at most, of which the scaling is measured; null takes one a core.
        rounds: turns of each side.
        limits: what an image may cost.
        tracking: where MLflow records the figures.
    """

    usual = (
        *("output", "model", "method", "backbone", "images", "shards", "gpu_rate"),
        *("cores", "gpus", "price_per_hour", "corpus", "hours"),
    )

    output: str
    model: str | None = None
    method: str = field(default="patchcore", metadata=named(all_configs()))
    backbone: str | None = None
    bank_rows: AtLeastOne = 10_000
    images: tuple[str, ...] = ()
    listing: ListingOptions = field(default_factory=ListingOptions)
    shards: str | None = None
    sample: AtLeastOne | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: Literal["auto", "pytorch", "openvino", "openvino_bf16"] = "auto"
    search: Search = "auto"
    batch_size: AtLeastOne = 8
    flagged: OpenShare = 0.05
    gpu_rate: tuple[Positive, ...] = ()
    cores: AtLeastOne | None = None
    gpus: AtLeastZero | None = None
    price_per_hour: Positive | None = None
    corpus: AtLeastOne | None = None
    hours: Positive = 24.0
    workers: AtLeastOne | None = None
    rounds: AtLeastOne = 3
    limits: ImageLimits = field(default_factory=ImageLimits)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def check(self) -> None:
        if (self.model is None) == (self.backbone is None):
            raise OptionError("give either --model, a model folder, or --backbone, the encoder of one to be made")
        if self.method not in CONFIGS:
            raise OptionError(f"no method '{self.method}'; known: {', '.join(sorted(CONFIGS))}")
        if self.images and self.shards is not None:
            raise OptionError("give either --images or --shards, or neither, which draws images")
        if not self.images and self.listing != ListingOptions():
            raise OptionError("--listing says how --images are listed; leave it out, or give images")
        if self.gpu_rate and self.gpus == 0:
            raise OptionError("--gpu_rate is that of a GPU of a node; leave out --gpus 0, or the rate")
