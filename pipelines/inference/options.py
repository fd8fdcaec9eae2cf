"""Options of jobs/score.py and jobs/decide.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.data.options import ListingOptions
from pipelines.runtime.options import RuntimeOptions, TrackingOptions
from unianom.data.image import ImageLimits
from unianom.data.maps import MapsKept
from unianom.errors import OptionError
from unianom.execution import Search
from unianom.options import AtLeastOne, AtLeastZero, OpenShare, Options, Share
from unianom.thresholds import USUAL_FPR, ScoreKind


@dataclass(frozen=True)
class ScoreOptions(Options):
    """Score a shard set, or images from where they lie, with a model.

    Args:
        model: model folder, or a folder of one model per category; path or URI.
        shards: shard set; path or URI; null where `images` are given.
        output: folder of the score set; path or URI.
        images: folders of images, which are walked, tables of paths or URIs (CSV, JSON lines, Parquet), or image files,
            on any store. They are listed once, in `_listing` below the output, and fetched as they are scored, without
            an ingest; one that cannot be read is a row with its status.
        listing: how these are listed.
        splits: splits of the shards to score; empty for all.
        categories: categories of the shards to score; empty for all.
        maps: which anomaly maps (16-bit) are kept: of "all" images, as pixel metrics need, of those that come to review
            or fail ("flagged"), or of "none", which is the fastest; null is all where there are masks, else none.
        batch_size: images in one forward pass.
        search: how memory banks are searched: "exact" on the CPU, with the same bits whatever the batch or worker;
            "device" where the network runs, with scores that may differ, relatively, by 1e-5 (by more where the encoder
            works in half precision); "auto" is "device" on a GPU (but "exact" for a bank with inverted lists), else
            "exact".
        fold_batch_norm: fold batch norm of trained methods into convolutions: the same scores up to rounding, by fewer
            operations; jobs/benchmark.py inference measures what that saves.
        max_reject_fraction: above this share of samples without a score the job fails, after finishing the rest.
        overwrite: replace what another scoring left in the output.
        limits: what an image may cost.
        runtime: actors and their CPUs and GPUs.
    """

    usual = (
        "model",
        "shards",
        "images",
        "output",
        "listing",
        "splits",
        "categories",
        "maps",
        "batch_size",
        "max_reject_fraction",
        "overwrite",
        "runtime",
    )

    model: str
    shards: str | None = None
    output: str = field(kw_only=True)
    images: tuple[str, ...] = ()
    listing: ListingOptions = field(default_factory=ListingOptions)
    splits: tuple[str, ...] = ("test",)
    categories: tuple[str, ...] = ()
    maps: MapsKept | None = None
    batch_size: AtLeastOne = 8
    search: Search = "auto"
    fold_batch_norm: bool = False
    max_reject_fraction: Share = 0.01
    overwrite: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)

    def check(self) -> None:
        if (self.shards is None) == (not self.images):
            raise OptionError("give either --shards, a shard set, or --images, folders, tables or files of images")
        if self.images and self.splits != ("test",):
            raise OptionError("--splits choose from shards; images that are listed have no splits, so leave it out")
        if self.images and self.categories:
            raise OptionError(
                "--categories choose from shards; name the category of all listed images by --listing.category, or the "
                "column of a table that holds it by --listing.category_column"
            )
        if not self.images and self.listing != ListingOptions():
            raise OptionError("--listing says how --images are listed; leave it out, or give images instead of shards")


@dataclass(frozen=True)
class DecideOptions(Options):
    """Judge stored scores: thresholds from held-out normal images, a decision for every image, and a review queue.

    Args:
        scores: score set to judge; path or URI.
        output: folder to write; path or URI.
        normals: score set of the held-out normal images; by the same models, of the "val" split, or of "train", of
            which only what the training held out is taken; null looks for them among `scores`, and takes for a model
            that has none there the normal scores that its own thresholds were fitted to.
        shards: the shard set of `scores`; for pictures of the queue, and to tell what was held out where only some
            categories were scored; path or URI, null for neither.
        scores_kind: judge "raw" or "calibrated" scores.
        per_category: thresholds for each category instead of one pair for all.
        too_few: with `per_category`, "refuse" if a category has too few normal images for `target_fpr`, or judge it by
            the normal images of all categories ("pooled"), which promises nothing of that category alone.
        target_fpr: highest share of normal images that may fail; null aims at 0.05 and takes, where there are too few
            normal images for that, 0.1 or 0.2, or promises nothing and says so.
        review_fpr: highest share of normal images that may fail or come to review.
        confidence: probability that a promise holds; of each promise by itself.
        held_out_fraction: share of its normal training images that the model held out, for models that do not record
            it; whether the number of images agrees is checked.
        queue: images in each list of the review queue.
        pictures: of those, how many are shown on the list's contact sheet.
        write_back: the models' folder, to store the rule in; scoring and prediction then decide by it; path or URI.
        overwrite: replace what another decision left in the output.
        runtime: actors and their CPUs.
        tracking: where MLflow records the run.
    """

    usual = (
        "scores",
        "output",
        "normals",
        "shards",
        "scores_kind",
        "per_category",
        "target_fpr",
        "review_fpr",
        "confidence",
        "queue",
        "write_back",
        "overwrite",
        "runtime",
        "tracking",
    )

    scores: str
    output: str
    normals: str | None = None
    shards: str | None = None
    scores_kind: ScoreKind = "raw"
    per_category: bool = False
    too_few: Literal["refuse", "pooled"] = "refuse"
    target_fpr: OpenShare | None = None
    review_fpr: OpenShare = 0.2
    confidence: OpenShare = 0.95
    held_out_fraction: OpenShare | None = None
    queue: AtLeastZero = 100
    pictures: AtLeastZero = 24
    write_back: str | None = None
    overwrite: bool = False
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def check(self) -> None:
        target = self.target_fpr or USUAL_FPR
        if self.review_fpr < target:
            raise OptionError(
                f"review_fpr={self.review_fpr:g} is below target_fpr={target:g}; it counts the images that "
                f"fail, too, so give at least as much"
            )
        if self.too_few == "pooled" and not self.per_category:
            raise OptionError("too_few=pooled is for thresholds of each category; add --per_category true")
