"""Options of the `folder` layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unianom.data.layouts.base import LayoutOptions, MaskThreshold
from unianom.errors import OptionError
from unianom.options import PositiveShare

EVERY = "*"
"""In place of names: every folder that is there."""

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class FolderOptions(LayoutOptions):
    """Options of the `folder` layout.

    A folder is named as it lies in train, val and test; one that lies in none of them, or where there are no such
    folders, by its path from the root. All images in and below it are taken, but for those of another named folder
    inside it. "." is the root itself.

    Args:
        dataset: name of the data set; empty takes the root's name.
        category: category of all samples; empty takes the data set's name or, unlabelled, the first folder level.
        categories: folders of the root that are a category each, laid out alike as the other options say; names below
            are then those inside of each. ["*"] takes every folder. They may as well lie in train, val and test. Empty:
            the whole set is one category.
        images: folder that everything but the masks lies in, relative to the root, such as "images".
        normal: name of the folder of normal images, e.g. "good", or of several. It lies in train, test and val, or in
            the root. By a path that begins with val or test it is of that split, by any other it is to train on.
        abnormal: names of the folders of defective images, which become the defect types; "*" is every folder beside
            that has no other meaning.
        val_normal: folders of normal images to validate on, where they lie elsewhere than those to train on.
        test_normal: folders of normal images to test.
        unknown: folders of images to test whose labels nobody knows.
        train_folder: name of the folder "train".
        val_folder: name of the folder "val".
        test_folder: name of the folder "test".
        masks: folder of mask files, relative to the root or to each category, or several.
        mask_beside: masks lie beside their images, told by mask_prefix and mask_suffix; without those a PNG is the mask
            of the image of the same stem.
        label_by_mask: the masks alone tell labels: what has an empty mask or none is normal. Listing then opens them.
        mask_prefix: what a mask's name has before the stem of its image.
        mask_suffix: what a mask's name has after the stem of its image, e.g. "_mask". Instead of the stem it may hold
            the image's whole name ("a.jpg.png" of "a.jpg"), which tells two images of one stem apart.
        mask_threshold: mask values above this are anomalous; null takes what each mask shows to be right.
        abnormal_train: what becomes of defective images in train: "keep" them there, for supervised training, or
            move them to "test".
        train_fraction: where no folder holds normal images to test, the share of normal images to train on; the others
            and all defective ones are tested. It does not divide what `normal` names as it lies in train.
        seed: of that draw.
        unlabelled: take every image below the root, without labels.
        split: split of unlabelled images.
    """

    category: str = ""
    categories: tuple[str, ...] = ()
    images: str = ""
    normal: str | tuple[str, ...] = ""
    abnormal: tuple[str, ...] = ()
    val_normal: tuple[str, ...] = ()
    test_normal: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    train_folder: str = "train"
    val_folder: str = "val"
    test_folder: str = "test"
    masks: str | tuple[str, ...] = ""
    mask_beside: bool = False
    label_by_mask: bool = False
    mask_prefix: str = ""
    mask_suffix: str = ""
    mask_threshold: MaskThreshold | None = None
    abnormal_train: Literal["keep", "test"] = "keep"
    train_fraction: PositiveShare = 0.8
    seed: int = 0
    unlabelled: bool = False
    split: Literal["train", "val", "test"] = "test"

    @property
    def normals(self) -> tuple[str, ...]:
        """Names of the folders of normal images."""
        return tuple(name for name in _several(self.normal) if name)

    @property
    def mask_folders(self) -> tuple[str, ...]:
        """Folders of masks."""
        return tuple(name for name in _several(self.masks) if name)

    @property
    def split_folders(self) -> dict[Split, str]:
        """Names of the folders of splits, in the order of splits."""
        return {"train": self.train_folder, "val": self.val_folder, "test": self.test_folder}

    def check(self) -> None:
        super().check()
        others = (*self.val_normal, *self.test_normal, *self.unknown)
        if self.unlabelled and (self.normals or self.abnormal or self.mask_folders or others or self.categories):
            raise OptionError("unlabelled=true takes every image; it excludes normal, abnormal and masks")
        if self.label_by_mask and (self.normals or self.abnormal or others):
            raise OptionError("label_by_mask=true takes every image; it excludes normal, abnormal and unknown")
        if self.label_by_mask and not (self.mask_folders or self.mask_beside):
            raise OptionError("label_by_mask=true needs masks, their folder, or mask_beside=true")
        if self.mask_folders and self.mask_beside:
            raise OptionError("masks and mask_beside exclude each other: masks lie in folders of their own or beside")
        if (self.mask_folders or self.mask_beside) and not (self.abnormal or self.label_by_mask):
            name = f"masks='{self.mask_folders[0]}'" if self.mask_folders else "mask_beside=true"
            raise OptionError(f"{name} needs abnormal, the folders of the images that the masks belong to")
        if self.category and self.categories:
            raise OptionError("category and categories exclude each other; name the one or the others")
        names = (*self.normals, *self.abnormal, *others)
        if len(set(names)) < len(names):
            raise OptionError(f"normal and abnormal name a folder twice: {', '.join(names)}")


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names
