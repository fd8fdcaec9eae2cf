"""What jobs/score.py scores: samples of a shard set, or images listed from where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, Protocol

from pipelines.data.engine import REPAYS
from pipelines.data.first_images import EXAMPLES, FirstImages
from pipelines.data.image_source import ImageSource, SampleSource
from pipelines.data.list_images import LISTING, iter_images, write_listing
from pipelines.data.options import named_images
from pipelines.inference.options import ScoreOptions
from pipelines.runtime.model_set import ModelSet
from unianom import files
from unianom.data.image_listing import ImageListing
from unianom.data.maps import MapsKept
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.options import to_plain


class ScoredImages(Protocol):
    """Images that one job scores.

    Attributes:
        plan: entries of the plan that say which.
        inputs: folders and files that the job reads, by the option that names them.
        selection: which rows of the opened set.
        categories: of the images; all that are possible, where only the listing will tell.
        maps: which maps are kept unless it is said.
    """

    plan: Mapping[str, Any]
    inputs: Mapping[str, str | None]
    selection: Selection
    categories: Sequence[str]
    maps: MapsKept

    def examples(self) -> ImageSource:
        """Return some of the images, on which an encoder is tried."""

    def count(self) -> int:
        """Return how many there are, or `REPAYS` and one more where there are more."""

    def open(self, output: str) -> ShardSet | ImageListing:
        """Return the set whose ranges are scored; listed in the output where it is none yet."""


class SelectedSamples:
    """Selected samples of a shard set.

    Raises:
        DataError: no shard set, or it has no such sample.
    """

    def __init__(self, options: ScoreOptions) -> None:
        assert options.shards is not None
        self._shards = ShardSet.open(options.shards)
        self.selection = Selection(options.splits, options.categories)
        self._shards.check(self.selection)
        self._limits = options.limits
        self.plan: Mapping[str, Any] = {
            "shards": self._shards.digest,
            "splits": list(options.splits),
            "categories": list(options.categories),
        }
        self.inputs: Mapping[str, str | None] = {"shards": options.shards}
        self.categories: Sequence[str] = options.categories or self._shards.categories
        masks_missing = self._shards.manifest["summary"]["masks"]["missing"]["count"]
        anomalous = self._shards.count(Selection(options.splits, options.categories, (1,)))
        # all where an anomalous image has a mask
        self.maps: MapsKept = "all" if anomalous > masks_missing else "none"

    def examples(self) -> ImageSource:
        return SampleSource(self._shards, self.selection, self._limits)

    def count(self) -> int:
        return self._shards.count(self.selection)

    def open(self, output: str) -> ShardSet:
        return self._shards


class ListedImages:
    """Images that lie anywhere.

    Raises:
        DataError: there are none, or what names them cannot be read.
        OptionError: the model has several categories, and nothing says of which these are.
    """

    maps: MapsKept = "none"

    def __init__(self, options: ScoreOptions, models: Sequence[Mapping[str, Any]]) -> None:
        self._options = options
        self._known = sorted({category for model in models for category in model["categories"]})
        listing = options.listing
        if listing.category is not None:
            self._check_known(listing.category, "--listing.category")
        elif listing.category_column is None and len(self._known) > 1:
            raise OptionError(
                f"the model knows the categories {', '.join(self._known)}; say of which the images are by "
                f"--listing.category, or by a column of a table with --listing.category_column"
            )
        self.plan: Mapping[str, Any] = {
            "images": [files.full_uri(uri) for uri in options.images],
            "listing": to_plain(listing),
            "splits": ["test"],
        }
        self.inputs: Mapping[str, str | None] = named_images(options.images)
        self.selection = Selection()
        category = listing.category or (None if listing.category_column else self._known[0])
        self.categories: Sequence[str] = self._known if category is None else [category]
        with closing(iter_images(options.images, listing)) as images:
            self._first = list(islice(images, REPAYS + 1))

    def examples(self) -> ImageSource:
        return FirstImages([image.uri for image in self._first[:EXAMPLES]], self._options.limits)

    def count(self) -> int:
        return len(self._first)

    def open(self, output: str) -> ImageListing:
        return write_listing(
            files.join(output, LISTING), self._options.images, self._options.listing, self._category_of, "test", None
        )

    def _category_of(self, named: str | None) -> str:
        if named is None:
            return self.categories[0]
        return self._check_known(named, f"the column {self._options.listing.category_column}")

    def _check_known(self, category: str, where: str) -> str:
        if category not in self._known:
            raise DataError(
                f"{where} names the category '{category}', which the model does not know; it knows "
                f"{', '.join(self._known)}"
            )
        return category


def scored_images(options: ScoreOptions, model_set: ModelSet, models: Sequence[Mapping[str, Any]]) -> ScoredImages:
    """Return what is scored, of which every category has a model.

    Raises:
        DataError, OptionError: as `SelectedSamples` and `ListedImages`, or a category without a model.
    """
    images = ListedImages(options, models) if options.images else SelectedSamples(options)
    for category in images.categories:
        model_set.folder_of(category)
    return images
