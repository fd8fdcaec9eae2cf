"""What jobs/ingest.py takes, and how images are split and chosen to validate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge

from pipelines.runtime.options import RuntimeOptions
from unianom.data.image import Bits, ImageLimits
from unianom.data.layouts import LAYOUTS
from unianom.data.layouts.base import MaskThreshold
from unianom.errors import OptionError
from unianom.options import (
    AS_WRITTEN,
    AtLeastOne,
    OpenShare,
    Options,
    Share,
    ShareBelowOne,
    ValueRefused,
    named,
)
from unianom.written import plain_options

MaskOrientation = Literal["auto", "shown", "stored"]

AnomalyKind = Literal["cutpaste_patch", "cutpaste_scar", "texture", "shade"]
"""Synthetic anomalies that validation images are made with."""

METRICS = (
    *("image_auroc", "image_ap", "pixel_auroc", "pixel_ap"),
    *("union_image_auroc", "union_image_ap", "union_pixel_auroc", "union_pixel_ap"),
)
"""What an objective may be made of."""


def check_objective(objective: Mapping[str, float]) -> None:
    """Refuse an objective that is none.

    Raises:
        OptionError: a metric that is not known, or weights that are not positive.
    """
    unknown = sorted(set(objective) - set(METRICS))
    if unknown:
        raise OptionError(f"objective: unknown metric '{unknown[0]}'; known: {', '.join(METRICS)}")
    if not objective or not all(weight > 0 for weight in objective.values()):
        raise OptionError("objective: name one metric at least, with a weight above 0, such as {image_auroc: 1}")


@dataclass(frozen=True)
class IngestOptions(Options):
    """Read a source in some layout into a shard set.

    Args:
        layout: name of the source's layout.
        source: root folder, or the file of a manifest or merged layout; path or URI.
        output: folder of the shard set; path or URI.
        layout_options: options of the layout, by name.
        contaminate: share of the anomalous test images of each category that is moved to the normal training images, as
            if nobody had noticed them: label 0, no mask, their defect still named. Shows what methods and calibrators
            make of training sets that are not clean.
        contaminate_seed: of that draw.
        mask_threshold: mask values above this are anomalous, whatever the layout says. Null leaves it to the layout,
            and that mostly to the mask: above 0, or above half of white where it is anti-aliased or was saved as JPEG.
        invert_masks: what is black in a mask is anomalous.
        mask_orientation: how masks without EXIF data lie over images that theirs turns: as the image is "shown", as its
            pixels are "stored", or "auto": as the size tells, else as it is shown.
        bits: how many of its 16 bits a sample uses, such as 12 of many cameras; images are stored scaled up to all 16.
            Null takes what each file states, else 16.
        resize: store images reduced to this shorter side; null stores the original bytes, or a layout's crops whole.
        part_bytes: aimed size of a part.
        min_parts: parts at least, where there are so many samples; a part is the task of later jobs.
        max_reject_fraction: above this share of rejected samples the job fails, after finishing the rest.
        overwrite: replace what another ingest left in the output.
        limits: what an image may cost.
        runtime: actors and their CPUs.
    """

    usual = (
        "layout",
        "source",
        "output",
        "layout_options",
        "resize",
        "mask_threshold",
        "max_reject_fraction",
        "overwrite",
        "runtime",
    )

    layout: str = field(metadata=named(LAYOUTS))
    source: str
    output: str
    layout_options: dict[str, Any] = field(default_factory=dict, metadata=AS_WRITTEN)
    contaminate: ShareBelowOne = 0.0
    contaminate_seed: int = 0
    mask_threshold: MaskThreshold | None = None
    invert_masks: bool = False
    mask_orientation: MaskOrientation = "auto"
    bits: Bits | None = None
    resize: Annotated[int, Ge(16)] | None = None
    part_bytes: AtLeastOne = 256 << 20
    min_parts: AtLeastOne = 16
    max_reject_fraction: Share = 0.01
    overwrite: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)

    @classmethod
    def resolve(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the values given, the layout's own options as plain data of their types."""
        layout, written = given.get("layout"), given.get("layout_options")
        if layout in LAYOUTS and isinstance(written, dict):
            given = {**given, "layout_options": plain_options(written, LAYOUTS[layout].options)}
        return super().resolve(given)

    @property
    def reading(self) -> dict[str, Any]:
        """Options of how files are read that are not at their defaults: only these enter plans and manifests, so that
        shard sets from before there were such options stay the same plan."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        names = ("mask_threshold", "invert_masks", "mask_orientation", "bits")
        return {name: value for name in names if (value := getattr(self, name)) != defaults[name]}


@dataclass(frozen=True)
class ListingOptions(Options):
    """How images that lie anywhere are listed.

    Args:
        column: column of a table that holds paths, relative to the table's folder or absolute, or URIs.
        category: category of all images; null is the only one that the model knows, or in training "all".
        category_column: column of a table that holds the category of each image.
    """

    column: str = "uri"
    category: str | None = None
    category_column: str | None = None

    def check(self) -> None:
        if self.category is not None and self.category_column is not None:
            raise ValueRefused("category and category_column both name categories; give one of them")


def named_images(uris: Sequence[str]) -> dict[str, str | None]:
    """Return what `--images` name, by the names under which errors speak of it."""
    return {f"images[{number}]" if number else "images": uri for number, uri in enumerate(uris)}


ThresholdSource = Literal["auto", "held_out", "leave_one_out"]
"""Which normal images a threshold is chosen from."""


@dataclass(frozen=True)
class SplitOptions(Options):
    """How normal training images are held out.

    Attributes:
        few_shot: normal images per category to learn from; None takes all.
        seed: of the held-out images and the few-shot draw.
        validation_fraction: share of each category held out where the shards have no "val" split.
        target_fpr, confidence: of the threshold that normal images are to support.
        source: which normal images these are; see `ThresholdOptions` of the training.
        per_category: whether those of each category are to support one.
    """

    few_shot: AtLeastOne | None
    seed: int
    validation_fraction: ShareBelowOne
    target_fpr: OpenShare | None
    confidence: OpenShare
    source: ThresholdSource = "auto"
    per_category: bool = True


@dataclass(frozen=True)
class ValidationOptions(Options):
    """The images that settings are compared on.

    Args:
        normals: normal images, an even share of every category, of those that training holds out.
        recipes: synthetic anomalies; each makes one copy of every normal image: "cutpaste_patch", "cutpaste_scar",
            "texture" (DRAEM, blobs of `textures`), "shade" (blobs darker or brighter). Metrics are means over recipes.
        labelled: true takes the anomalous images of the "val" split instead, false never does; null does where there
            are some.
        textures: folder or URI of texture images; null takes pieces of the normal images themselves.
        pixel_stride: every how many rows and columns of maps and masks pixel metrics see.
        seed: of the choice of images and of the anomalies.
    """

    normals: AtLeastOne = 128
    recipes: tuple[AnomalyKind, ...] = ("cutpaste_patch", "cutpaste_scar", "texture", "shade")
    labelled: bool | None = None
    textures: str | None = None
    pixel_stride: AtLeastOne = 4
    seed: int = 0

    def check(self) -> None:
        if not self.recipes or len(set(self.recipes)) < len(self.recipes):
            raise ValueRefused("recipes: name at least one, and none twice")
