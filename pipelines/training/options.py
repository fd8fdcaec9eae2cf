"""What fitting any method takes besides the method's own options, and what comes of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from pipelines.data.options import ListingOptions, SplitOptions, ThresholdSource, named_images
from pipelines.runtime.options import RuntimeOptions, TrackingOptions
from unianom.configs import all_configs, has_bank, method_of
from unianom.configs.calibration import CalibrationConfig
from unianom.data.image import ImageLimits
from unianom.errors import OptionError
from unianom.options import (
    AS_WRITTEN,
    AtLeastOne,
    AtLeastZero,
    OpenShare,
    Options,
    Share,
    ShareBelowOne,
    ValueRefused,
    documented_arguments,
    hints_of,
)
from unianom.written import plain_options

WORK = "_work"
"""Folder below the model folder where unfinished work lies."""


@dataclass(frozen=True)
class ThresholdOptions(Options):
    """How the decision thresholds are chosen, from scores of normal images.

    Args:
        target_fpr: highest share of normal images that may fail; null aims at 0.05 and takes, where there are too few
            normal images for that, 0.1 or 0.2, or promises nothing and says so.
        confidence: probability that the promise holds.
        source: "held_out" takes normal images that are in no bank and no training batch; "leave_one_out", for methods
            with a memory bank, all that are in the bank, each scored as if the bank did not hold its own vectors;
            "auto" takes those held out where they suffice for target_fpr in every category, or the method has no bank.
        validation_fraction: share of each category's normal training images held out where the shards have no "val"
            split; 0 for none.
        per_category: where there are several categories, also a threshold for each whose normal images support a
            promise; images that are known to be of it are judged by that one.
    """

    usual = ("target_fpr", "validation_fraction")

    target_fpr: OpenShare | None = None
    confidence: OpenShare = 0.95
    source: ThresholdSource = "auto"
    validation_fraction: ShareBelowOne = 0.2
    per_category: bool = True


@dataclass(frozen=True)
class FitOptions(Options):
    """What fitting any method needs besides the method's own options.

    Args:
        shards: shard set; path or URI.
        output: model folder to write; path or URI.
        categories: those to fit on; empty for all.
        per_category: a model for each category; in folders below `output`, instead of one for all.
        category_options: for the model of one category alone, options of the method that differ, by category, such as
            {screw: {temperature: 0.1}}; categories that are not fitted are passed over.
        few_shot: normal images per category; null takes all. They are drawn with `seed`, and where a method learns from
            labels at most as many anomalous ones.
        seed: of the held-out normals and the few-shot draw; coresets and training have their own, among the
            method's options.
        batch_size: images in one forward pass, of what is not a training step.
        overwrite: replace another model in the output.
        threshold: how the decision threshold is chosen.
        limits: what an image may cost.
        runtime: actors and their CPUs and GPUs.
    """

    shards: str | None
    output: str
    categories: tuple[str, ...] = ()
    per_category: bool = False
    category_options: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=AS_WRITTEN)
    few_shot: AtLeastOne | None = None
    seed: int = 0
    batch_size: AtLeastOne = 8
    overwrite: bool = False
    threshold: ThresholdOptions = field(default_factory=ThresholdOptions)
    limits: ImageLimits = field(default_factory=ImageLimits)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)

    @property
    def sources(self) -> dict[str, str | None]:
        """Folders and files that hold the images, by the option that names them."""
        return {"shards": self.shards}

    @property
    def split(self) -> SplitOptions:
        """How normal training images are held out."""
        threshold = self.threshold
        return SplitOptions(
            few_shot=self.few_shot,
            seed=self.seed,
            validation_fraction=threshold.validation_fraction,
            target_fpr=threshold.target_fpr,
            confidence=threshold.confidence,
            source=threshold.source,
            per_category=threshold.per_category,
        )


@dataclass(frozen=True)
class DataOptions(Options):
    """How images reach the network in training.

    Args:
        images: "prepared" decodes every image once and memory-maps the result; "stream" decodes row group after row
            group in every epoch, for corpora that do not fit the disk; null decides by size.
        frozen_features: compute what the frozen encoder makes of the images once and keep it; null does so where
            nothing but the encoder stands between image and features (no augmentation) and they take at most 32 GB,
            as one forward pass of one image tells.
        feature_precision: "half" or "full", of kept features.
        folder: where prepared images and features are kept for all runs; null takes `prepared` beside the output.
        processes: that load batches beside each worker; 0 is a thread; null takes as many as the worker's CPUs but
            one where images are decoded, changed or made.
        window: row groups that are shuffled together when streaming.
    """

    images: Literal["prepared", "stream"] | None = None
    frozen_features: bool | None = None
    feature_precision: Literal["half", "full"] = "half"
    folder: str | None = None
    processes: AtLeastZero | None = None
    window: AtLeastOne = 4


@dataclass(frozen=True)
class Phase(Options):
    """From some step on, other values of options of the method.

    Args:
        start: share of the training at which it begins, in (0, 1).
        method: the options that change, by dotted name, such as {training.learning_rate: 1e-3}; those of earlier phases
            go on.
    """

    start: OpenShare
    method: dict[str, Any]

    def check(self) -> None:
        if not self.method:
            raise ValueRefused("method must name an option that changes")


@dataclass(frozen=True)
class TrainingOptions(FitOptions):
    """What training a method needs besides the method's own options.

    Args:
        precision: of forward and backward pass, "fp32" or "bf16" (autocast).
        compile: run the step through torch.compile.
        accumulate: forward and backward passes that make up a step, to save memory.
        checkpoint_every: steps between checkpoints.
        validate_every: steps between validations; null validates ten times a run, 0 never.
        validation_images: images of a validation, half of them normal, an even share of every category, but at least
            one of each.
        min_workers: let Ray shrink and regrow the run between this many workers and `runtime.workers`.
        max_failures: how often lost workers are replaced before the run fails; preempted nodes do not count.
        phases: options of the method that change while it is trained, in ascending order; what population-based
            training finds.
        data: how images reach the network.
        runtime: workers and their CPUs and GPUs; null workers train on one, and use all for what is computed once.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    accumulate: AtLeastOne = 1
    checkpoint_every: AtLeastOne = 500
    validate_every: AtLeastZero | None = None
    validation_images: Annotated[int, Ge(2)] = 256
    min_workers: AtLeastOne | None = None
    max_failures: AtLeastZero = 3
    phases: tuple[Phase, ...] = ()
    data: DataOptions = field(default_factory=DataOptions)

    def check(self) -> None:
        super().check()
        starts = [phase.start for phase in self.phases]
        if starts != sorted(set(starts)):
            raise OptionError(f"phases begin at {starts}; give them in ascending order")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueRefused(f"min_workers={self.min_workers} must be in 1…{self.workers}, the runtime.workers")

    @property
    def workers(self) -> int:
        """Workers at most."""
        return self.runtime.workers or 1


@dataclass(frozen=True)
class CalibrateOptions(Options):
    """Calibrate a model's scores, so that one threshold serves images of any category.

    Args:
        model: model folder, or a folder of one model per category; path or URI.
        shards: shard set whose normal training images are learned from; path or URI.
        output: model folder to write; null puts the calibrator into the model's own folder.
        images: learn from the "train" images but those that the model held out; thresholds may be chosen on these.
            Or from these alone ("held_out"), which memory banks do not know by heart, or from "all".
        held_out_fraction: share of its normal training images that the model held out, for models that do not record
            it.
        calibration: variant, statistics and head.
        batch_size: images in one forward pass.
        folder: where embeddings are kept for all runs; null takes `prepared` beside the model.
        precision: of kept embeddings, "half" or "full".
        checkpoint_every: steps of the head between checkpoints.
        overwrite: replace another calibrator, or what else lies in the output.
        limits: what an image may cost.
        runtime: actors and their CPUs and GPUs.
        tracking: where MLflow records the run.
    """

    usual: ClassVar[tuple[str, ...] | None] = (
        "model",
        "shards",
        "output",
        "images",
        "batch_size",
        "overwrite",
        "calibration",
        "runtime",
        "tracking",
    )

    model: str
    shards: str
    output: str | None = None
    images: Literal["train", "held_out", "all"] = "train"
    held_out_fraction: OpenShare | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    batch_size: AtLeastOne = 8
    folder: str | None = None
    precision: Literal["half", "full"] = "half"
    checkpoint_every: AtLeastOne = 1000
    overwrite: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)


CalibratorVariant = Literal["cada", "classifier", "labels"]
"""Variants of calibrators that jobs/train.py can add."""


@dataclass(frozen=True)
class TrainJobOptions(FitOptions):
    """What jobs/train.py takes besides what fitting needs.

    Args:
        shards: shard set; path or URI; null where `images` are given.
        images: for memory banks: folders of normal images, tables of their paths or URIs, or image files. Folders are
            walked; tables are CSV, JSON lines or Parquet; all may lie on any store. The images are listed and checked
            once, in `_listing` below the output, and fetched when they are needed, without an ingest; one that cannot
            be read is left out, and told.
        listing: how these are listed.
        max_reject_fraction: above this share of listed images that cannot be read the job fails, after checking all.
        calibrate: also calibrate its scores; by "cada", as jobs/calibrate.py does by default, "classifier" or "labels",
            null for not at all.
        register_as: name under which MLflow registers it; with the alias "candidate", null for not at all.
        tracking: where MLflow records the run.
        method: the method's own options.
    """

    usual: ClassVar[tuple[str, ...] | None] = (
        "shards",
        "images",
        "output",
        "categories",
        "per_category",
        "few_shot",
        "calibrate",
        "register_as",
        "overwrite",
        "method",
        "threshold",
        "runtime",
        "tracking",
    )

    shards: str | None = None
    output: str = field(kw_only=True)
    images: tuple[str, ...] = ()
    listing: ListingOptions = field(default_factory=ListingOptions)
    max_reject_fraction: Share = 0.01
    calibrate: CalibratorVariant | None = None
    register_as: str | None = None
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    method: Options = field(kw_only=True)

    @classmethod
    def resolve(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the values given, those of single categories as plain data of the method's types."""
        written, config = given.get("category_options"), hints_of(cls)["method"]
        if isinstance(written, dict):
            own = {name: plain_options(values, config) for name, values in written.items()}
            given = {**given, "category_options": own}
        return super().resolve(given)

    @property
    def sources(self) -> dict[str, str | None]:
        """Folders and files that hold the images, by the option that names them."""
        return {"shards": self.shards, **named_images(self.images)}

    @property
    def split(self) -> SplitOptions:
        """How normal training images are held out: for thresholds on calibrated scores, too, which no image has without
        its own vectors."""
        split = super().split
        held_out = self.calibrate is not None and split.source == "auto"
        return dataclasses.replace(split, source="held_out") if held_out else split

    def check(self) -> None:
        super().check()
        self._check_images()
        name = self.register_as
        if name is not None and not self.tracking.enabled:
            raise OptionError("register_as needs tracking; leave out --tracking.enabled false")
        if name is not None and (set("/:") & set(name) or not name.strip(". ")):
            raise OptionError(f"register_as={name}: MLflow takes no '/' or ':' in a model's name, and more than dots")

    def _check_images(self) -> None:
        if (self.shards is None) == (not self.images):
            raise OptionError("give either --shards, a shard set, or --images, folders, tables or files of images")
        if not self.images:
            if self.listing != ListingOptions():
                raise OptionError("--listing says how --images are listed; leave it out, or give images, not shards")
            return
        name = method_of(self.method)
        if not has_bank(name):
            banks = ", ".join(filter(has_bank, all_configs()))
            raise OptionError(
                f"--images are for methods with a memory bank ({banks}); {name} goes over its images many times, so "
                f"make shards of them with jobs/ingest.py and give these by --shards"
            )
        if self.calibrate is not None:
            raise OptionError(
                "--calibrate learns from shards; leave it out, or make shards of the images with jobs/ingest.py and "
                "give these by --shards"
            )


def train_options() -> dict[str, type[TrainJobOptions]]:
    """Return the options class of every method: what fitting needs, and the method's own options as `method`."""
    classes: dict[str, type[TrainJobOptions]] = {}
    for name, config in all_configs().items():
        bases = (TrainJobOptions,) if has_bank(name) else (TrainJobOptions, TrainingOptions)
        method = ("method", config, field(default_factory=config))
        usual = tuple(each for each in TrainJobOptions.usual or () if has_bank(name) or each != "images")
        namespace = {"usual": usual}
        cls = dataclasses.make_dataclass(f"Train_{name}", [method], bases=bases, frozen=True, namespace=namespace)
        described = (config.__doc__ or "").split("\n\n")[0]
        summary = f"Fit {name}: {described}"
        arguments = documented_arguments(FitOptions, *bases[1:], TrainJobOptions)
        cls.__doc__ = "\n".join([summary, "", "Args:", arguments])
        classes[name] = cls
    return classes


@dataclass(frozen=True)
class RecipeWeightsOptions(Options):
    """Say which weights recipes take, where they come from and whether they are there. Nothing is downloaded.

    Args:
        recipes: recipe files whose names begin with that of their method, or folders of them; paths or URIs. Empty
            takes those of this project.
        json: print JSON in place of a table.
    """

    recipes: tuple[str, ...] = ()
    json: bool = False


def weights_options() -> dict[str, type[Options]]:
    """Return the options classes of jobs/weights.py: for every method those of jobs/train.py, none of them required,
    and one for recipes."""
    classes: dict[str, type[Options]] = {"recipes": RecipeWeightsOptions}
    for name, cls in train_options().items():
        added = [("shards", str, ""), ("output", str, ""), ("json", bool, False)]
        made = dataclasses.make_dataclass(f"Weights_{name}", added, bases=(cls,), frozen=True)
        made.__doc__ = (
            f"Say which weights jobs/train.py {name} takes with these options, where they come from and whether they "
            f"are there. Nothing is downloaded.\n\nArgs:\n    json: print JSON in place of a table."
        )
        classes[name] = made
    return classes
