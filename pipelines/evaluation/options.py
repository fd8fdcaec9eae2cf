"""Options of the jobs of evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from annotated_types import Ge

from pipelines.runtime.options import RuntimeOptions, TrackingOptions
from unianom.configs import all_configs, has_bank, method_of
from unianom.configs.backbone import BackboneConfig
from unianom.configs.bank import BankConfig
from unianom.configs.metrics import AuproVariant
from unianom.data.image import ImageLimits, InputPolicy
from unianom.errors import OptionError
from unianom.options import (
    AtLeastOne,
    AtLeastZero,
    OpenShare,
    Options,
    PositiveShare,
    documented_arguments,
)


@dataclass(frozen=True)
class BootstrapOptions(Options):
    """Confidence intervals by resampling images.

    Args:
        resamples: how often images are drawn anew; 0 gives no intervals.
        seed: of the draws.
        confidence: share of the resamples inside an interval.
    """

    usual = ("resamples",)

    resamples: AtLeastZero = 1000
    seed: AtLeastZero = 0
    confidence: OpenShare = 0.95


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """Evaluate a score set against the labels and masks of its shards.

    Args:
        scores: score set; path or URI.
        shards: the shard set that was scored; path or URI.
        output: folder for evaluation.json and categories.csv; path or URI.
        aupro_limit: highest false-positive rate of AUPRO.
        aupro_variant: "exact", or a published approximation: "legacy_global_200", "legacy_per_image".
        soft_dice: also give Dice and IoU without a threshold of maps scaled by their own extremes, image by image, as
            polyp segmentation is measured.
        exact_pixels: up to so many labelled pixels, pixel metrics are exact and take some 12 bytes of memory a pixel,
            3 GB by default; beyond, they come from bins, in bounded memory, each with the most it can be off.
        curve_points: points kept of each curve.
        overwrite: replace what another evaluation left in the output.
        bootstrap: confidence intervals.
        runtime: actors and their CPUs.
        tracking: where MLflow records the run.
    """

    usual = ("scores", "shards", "output", "aupro_limit", "overwrite", "bootstrap", "runtime", "tracking")

    scores: str
    shards: str
    output: str
    aupro_limit: PositiveShare = 0.3
    aupro_variant: AuproVariant = "exact"
    soft_dice: bool = False
    exact_pixels: AtLeastZero = 250_000_000
    curve_points: Annotated[int, Ge(2)] = 400
    overwrite: bool = False
    bootstrap: BootstrapOptions = field(default_factory=BootstrapOptions)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)


@dataclass(frozen=True)
class CompareOptions(Options):
    """Put many evaluations into one table, with ranks, and published results where they compare.

    Args:
        evaluations: folders that jobs/evaluate.py wrote; paths or URIs.
        output: folder for comparison.json, .csv, .md and .tex; path or URI.
        names: what the evaluations are called, in the same order; empty takes the last part of each path.
        published: YAML file of published results in place of the one that comes along; path or URI.
        overwrite: replace another comparison in the output.
        tracking: where MLflow records the run.
    """

    evaluations: tuple[str, ...]
    output: str
    names: tuple[str, ...] = ()
    published: str | None = None
    overwrite: bool = False
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def check(self) -> None:
        if not self.evaluations:
            raise OptionError("evaluations is empty; give at least one folder that jobs/evaluate.py wrote")
        if self.names and len(self.names) != len(self.evaluations):
            raise OptionError(
                f"names has {len(self.names)} entries for {len(self.evaluations)} evaluations; give one each"
            )
        named = self.labels
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise OptionError(f"two evaluations are called {', '.join(twice)}; tell them apart with --names")

    @property
    def labels(self) -> list[str]:
        """Return the evaluations' names."""
        return list(self.names) or [uri.rstrip("/").rsplit("/", 1)[-1] for uri in self.evaluations]


@dataclass(frozen=True)
class ClusterOptions(Options):
    """Cluster the test images of each category by their anomalous patches, and compare with the defect types.

    Args:
        model: model folder of a memory method, or a folder of one per category; path or URI.
        shards: shard set; path or URI.
        output: folder for clusters.parquet, clustering.json and the contact sheets; path or URI.
        splits: splits to cluster; empty for all.
        categories: categories to cluster; empty for all.
        variant: patches that describe an image: its "top" ones by distance to the bank, the single one of largest
            distance ("max"), or "all" of them.
        pooling: "mean" of these patches, or "concat": one after another, the most anomalous first.
        scaling: "none" clusters the patches as they are, as published; "standard" brings every value to mean 0 and
            deviation 1 over the images of a category first, for encoders in which few values outweigh all others.
        k_ratio: share of the patches that "top" takes; null takes the model's own, or 0.05 where it has none.
        keep_ratio: share of the patches that is kept for later runs; bounds `k_ratio`.
        anomalous_only: leave normal images out.
        clusters: number of clusters; null takes the number of types among the images, "good" included.
        n_init: starts of K-means, of which the best counts.
        seed: of K-means.
        shown: images of each cluster on the contact sheets, those nearest to its centre; 0 draws no sheets.
        features: folder below which features are kept, to serve later runs; null takes `cluster_features` beside the
            output.
        batch_size: images in one forward pass.
        overwrite: replace what another run left in the output.
        limits: what an image may cost.
        runtime: actors and their CPUs and GPUs.
        tracking: where MLflow records the run.
    """

    usual = (
        "model",
        "shards",
        "output",
        "splits",
        "categories",
        "clusters",
        "anomalous_only",
        "shown",
        "overwrite",
        "runtime",
        "tracking",
    )

    model: str
    shards: str
    output: str
    splits: tuple[str, ...] = ("test",)
    categories: tuple[str, ...] = ()
    variant: Literal["top", "max", "all"] = "top"
    pooling: Literal["mean", "concat"] = "mean"
    scaling: Literal["none", "standard"] = "none"
    k_ratio: PositiveShare | None = None
    keep_ratio: PositiveShare = 0.1
    anomalous_only: bool = False
    clusters: AtLeastOne | None = None
    n_init: AtLeastOne = 10
    seed: AtLeastZero = 42
    shown: AtLeastZero = 8
    features: str | None = None
    batch_size: AtLeastOne = 8
    overwrite: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def check(self) -> None:
        if self.k_ratio is not None and self.k_ratio > self.keep_ratio:
            raise OptionError(f"k_ratio={self.k_ratio} exceeds keep_ratio={self.keep_ratio}; raise --keep_ratio")
        if self.variant == "all" and self.pooling == "concat":
            raise OptionError("pooling=concat takes the most anomalous patches; with variant=all give --pooling mean")


class MemoryConfig(Protocol):
    """Options of a method with a memory bank."""

    @property
    def backbone(self) -> BackboneConfig: ...

    @property
    def input(self) -> InputPolicy: ...

    @property
    def bank(self) -> BankConfig: ...


@dataclass(frozen=True)
class EmbeddingOptions(Options):
    """Options of every protocol on embedded images. `protocol_options` adds the method's own options as `method`.

    Args:
        shards: shard set; path or URI.
        output: folder for the results; path or URI.
        embeddings: folder below which embedded images are kept, to serve later runs; null takes `embeddings` beside the
            output. It grows by the patches of all images: 4 bytes × patches × width each.
        batch_size: images in one forward pass. With 1 all scores are, to the last bit, those of jobs/train.py and
            jobs/score.py; with more they agree up to the rounding of the forward pass.
        overwrite: replace what another run left in the output.
        limits: what an image may cost.
        runtime: actors and their CPUs and GPUs; GPUs embed, banks are built and searched on CPUs.
        tracking: where MLflow records the run.
    """

    shards: str
    output: str
    embeddings: str | None = None
    batch_size: AtLeastOne = 8
    overwrite: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    otherwise: ClassVar[str]
    """What to do where a method has no memory bank."""

    if TYPE_CHECKING:

        @property
        def method(self) -> MemoryConfig:
            """Return the method's own options."""


@dataclass(frozen=True)
class LowShotOptions(EmbeddingOptions):
    """Low-shot anomaly detection: k normal images of each category, drawn several times; all test images are scored.

    Args:
        categories: those to fit and score; empty for all.
        shots: numbers of normal images per category. A category with fewer is left out at that number, and named.
        draws: how often each number is drawn.
        seed: of the first draw; the following have the seeds after it. A draw is that of jobs/train.py with --few_shot,
            this --seed and --threshold.validation_fraction 0.
        per_category: one bank for each category instead of one for all of them.
    """

    usual = (
        "shards",
        "output",
        "categories",
        "shots",
        "draws",
        "seed",
        "per_category",
        "overwrite",
        "method",
        "runtime",
        "tracking",
    )

    categories: tuple[str, ...] = ()
    shots: tuple[AtLeastOne, ...] = (1, 2, 4, 8, 16, 50)
    draws: AtLeastOne = 5
    seed: int = 0
    per_category: bool = True

    otherwise: ClassVar[str] = "use jobs/train.py with --few_shot, once for each draw, or take a memory method"

    def check(self) -> None:
        if not self.shots or len(set(self.shots)) < len(self.shots):
            raise OptionError(f"shots={list(self.shots)} must be different numbers of at least 1")


@dataclass(frozen=True)
class SemanticOptions(EmbeddingOptions):
    """Semantic anomaly detection: some classes are normal, all others anomalous; a bank for every choice of classes.

    Args:
        tasks: choices of normal classes. "one_vs_rest" makes each class normal in turn (CIFAR-10, the superclasses of
            CIFAR-100 as its layout reads them, ImageNet-30); "cifar10_splits" are classes 0 to 4, 5 to 9, the even and
            the odd ones; "cifar100_superclasses" joins the 100 fine classes to 20; "species60_splits" are the five
            published choices of 30 classes.
        normal_classes: choices of one's own in place of `tasks`; a name and its classes, by name or by index in
            alphabetical order, such as {pets: [cat, dog], first: [0, 1, 2]}; a number that is the name of a class
            means that class.
    """

    usual = ("shards", "output", "tasks", "normal_classes", "overwrite", "method", "runtime", "tracking")

    tasks: Literal["one_vs_rest", "cifar10_splits", "cifar100_superclasses", "species60_splits"] = "one_vs_rest"
    normal_classes: dict[str, list[int | str]] = field(default_factory=dict)

    otherwise: ClassVar[str] = (
        "ingest with --layout_options.normal_classes and use jobs/train.py for each choice, or take a memory method"
    )


def protocol_options(base: type[EmbeddingOptions]) -> dict[str, type]:
    """Return the options class of a protocol for every method: those of `base`, and the method's own as `method`."""
    classes: dict[str, type] = {}
    for name, config in all_configs().items():
        fields: list[Any] = [("method", config, field(default_factory=config))]
        cls = dataclasses.make_dataclass(
            f"{base.__name__}_{name}", fields, bases=(base,), frozen=True, namespace={"check": _method_check(base)}
        )
        summary = (base.__doc__ or "").split("\n\n    Args:\n", 1)[0]
        arguments = documented_arguments(EmbeddingOptions, base)
        cls.__doc__ = f"{summary}\n\nArgs:\n{arguments}\n    method: the method's own options."
        classes[name] = cls
    return classes


def _method_check(base: type[EmbeddingOptions]) -> Callable[[EmbeddingOptions], None]:
    """Return a `check` that also refuses methods without a memory bank."""

    def check(options: EmbeddingOptions) -> None:
        base.check(options)
        name = method_of(options.method)
        if not has_bank(name):
            memory = ", ".join(sorted(filter(has_bank, all_configs())))
            raise OptionError(
                f"{name} is trained, so it cannot be fitted to embedded images; {options.otherwise} ({memory})"
            )

    return check
