"""Polyps in colonoscopy with masks: Kvasir-SEG (Jha et al., MMM 2020), CVC-ClinicDB (Bernal et al., CMIG 2015) and
CVC-ColonDB (Tajbakhsh et al., IEEE TMI 2015)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unianom.data.layouts.base import Layout, LayoutOptions, MaskThreshold, Recognised
from unianom.data.layouts.entries import Entry
from unianom.data.layouts.mask_files import mask_of, masks_by_stem
from unianom.data.layouts.names import choose, listed
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, SPLITS, SampleRef
from unianom.data.splits import hash_order
from unianom.errors import DataError, OptionError

EXPECTED = (
    "the polyps layout: <set>/{train,test}/{images,masks}, or undivided: <set>/{images,masks} or "
    "<set>/{Original,Ground Truth}, directly or in PNG or TIF"
)
UNDIVIDED = (
    ("images", "masks"),
    ("Original", "Ground Truth"),
    ("PNG/Original", "PNG/Ground Truth"),
    ("TIF/Original", "TIF/Ground Truth"),
)

USUAL_SPLITS = {"kvasir": (900, 100), "clinicdb": (550, 62)}
OTHER_SPLIT = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class PolypOptions(LayoutOptions):
    """Options of the `polyps` layout.

    Args:
        dataset: name of the data set.
        categories: sets to read, by the names of their folders; empty reads all.
        split: how an undivided set is split: images, or shares that add up to 1, for training and testing, or for
            training, validation and testing. Empty takes 900 and 100 for Kvasir, 550 and 62 for CVC-ClinicDB, which
            are the sizes of the split that most publications use, and 0.8, 0.1 and 0.1 for others.
        seed: of that draw.
        mask_threshold: mask values above this are anomalous; some editions hold the masks as JPEG files, whose edges
            take every value.
    """

    dataset: str = "polyps"
    categories: tuple[str, ...] = ()
    split: tuple[float, ...] = ()
    seed: int = 0
    mask_threshold: MaskThreshold = 127

    def check(self) -> None:
        super().check()
        if not self.split:
            return
        if len(self.split) not in (2, 3) or min(self.split) < 0 or not self.split[0] or not self.split[-1]:
            raise OptionError(
                f"split={list(self.split)} must be two or three numbers, for training, validation and testing; only "
                f"that of validation may be 0"
            )
        if not _are_shares(self.split) and any(number % 1 for number in self.split):
            raise OptionError(f"split={list(self.split)} must be whole numbers of images, or shares that add up to 1")


def samples(source: Source, options: PolypOptions) -> Iterator[SampleRef]:
    """Yield samples of several sets of polyps, or of the one that is the root; each is a category.

    Every image shows a polyp, so all are anomalous, those of the training split too: the sets are for supervised
    segmentation. An undivided set is split by a seeded draw. Frames of one video lie on both sides of it, as they do
    in the published splits, so figures made from it say little about new patients.
    """
    if any(source.has_folder(folder) for folder in ("train", *(images for images, _ in UNDIVIDED))):
        source, categories = source.at(".."), [source.name]
    else:
        categories = source.folders()
    if not categories:
        raise DataError(f"no sets under {source.uri()}; found: {source.found()}; expected {EXPECTED}")
    for category in choose(options.categories, categories, source.uri()):
        yield from _set_samples(source, category, options)


def _set_samples(source: Source, category: str, options: PolypOptions) -> Iterator[SampleRef]:
    if source.has_folder(f"{category}/train"):
        for split in SPLITS:
            if split != "val" or source.has_folder(f"{category}/val"):
                images = source.require(category, f"{split}/images", EXPECTED)
                masks = source.require(category, f"{split}/masks", EXPECTED)
                for image, mask in _pairs(source, images, masks):
                    yield _sample(source, category, split, image, mask, options)
        return
    for images, masks in UNDIVIDED:
        if source.has_folder(f"{category}/{images}"):
            source.require(category, masks, EXPECTED)
            pairs = _pairs(source, f"{category}/{images}", f"{category}/{masks}")
            splits = _draw(category, [image.name for image, _ in pairs], options, source.uri(category))
            for image, mask in pairs:
                yield _sample(source, category, splits[image.name], image, mask, options)
            return
    raise DataError(f"no images of {source.uri(category)}; found: {source.found(category)}; expected {EXPECTED}")


def _sample(source: Source, category: str, split: str, image: Entry, mask: str, options: PolypOptions) -> SampleRef:
    return source.sample(
        image,
        category=category,
        split=split,
        label=ANOMALOUS,
        defect="polyp",
        mask=mask,
        mask_threshold=options.mask_threshold,
    )


def _pairs(source: Source, images: str, masks: str) -> list[tuple[Entry, str]]:
    """Return images of a folder, each with its mask."""
    by_stem = masks_by_stem(source, masks)
    return [(image, mask_of(source, image, by_stem, masks)) for image in source.images(images)]


def _are_shares(split: tuple[float, ...]) -> bool:
    return abs(sum(split) - 1) < 1e-9


def _draw(category: str, names: list[str], options: PolypOptions, where: str) -> dict[str, str]:
    """Split of each image of an undivided set.

    Raises:
        DataError: the split is of another number of images, or there are too few for its shares.
    """
    usual = next((split for part, split in USUAL_SPLITS.items() if part in _plain(category)), OTHER_SPLIT)
    split = options.split or usual
    train, val, test = (split[0], 0, split[1]) if len(split) == 2 else split
    if _are_shares(split):
        # Of a share that is not 0 at least one image.
        val, test = (max(round(share * len(names)), 1) if share else 0 for share in (val, test))
        train = len(names) - val - test
        if train < 1:
            raise DataError(f"{where} has only {len(names)} images, too few to split; add images")
    elif train + val + test != len(names):
        raise DataError(
            f"{where} has {len(names)} images, which is not {' + '.join(map(str, split))}; name how to split them with "
            f"the layout's option split, e.g. [0.9, 0.1]"
        )
    order = hash_order(names, options.seed)
    sides = ["test"] * int(test) + ["val"] * int(val) + ["train"] * int(train)
    return dict(zip(order, sides, strict=True))


def _plain(name: str) -> str:
    """Return a name in small letters and digits only: "CVC-ClinicDB" → "cvcclinicdb"."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


KNOWN = ("kvasir", "clinicdb", "colondb", "etislarib")


def recognise(source: Source) -> Recognised | None:
    """Take folders of images and masks for this layout if they go by the names of these sets."""
    alone = any(source.has_folder(folder) for folder in ("train/images", *(images for images, _ in UNDIVIDED)))
    names = [source.name] if alone else source.folders()
    if not names or not all(any(known in _plain(name) for known in KNOWN) for name in names):
        return None
    return Recognised({}, (f"{listed(names)}: every image shows a polyp, which its mask outlines; none is normal",))


LAYOUT = Layout("polyps", PolypOptions, samples, "Kvasir, CVC-ClinicDB, CVC-ColonDB: polyps with masks", recognise)
