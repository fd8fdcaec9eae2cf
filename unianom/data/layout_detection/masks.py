"""How the masks of a source are read: folders of masks, masks beside their images, masks that tell labels."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unianom.data.layout_detection.categories import counted, find_levels, in_words, inner, split_options
from unianom.data.layout_detection.reading import Reading, Taken, Unclear
from unianom.data.layout_detection.tree import Affixes, Node, find_affixes, find_beside
from unianom.data.layouts.entries import Entry
from unianom.data.layouts.folder_options import EVERY, FolderOptions, Split
from unianom.data.layouts.names import listed

LEAST_BESIDE = 0.5
"""Share of defective images and masks that lie beside each other, from which such masks are taken for some."""

LEAST_LABELLED = 0.9
"""The same share where no folder says anything, from which masks are taken to tell labels."""


@dataclass(frozen=True)
class MaskReading:
    """Options of masks, what was decided, and what may be wrong with it."""

    options: Mapping[str, Any] = field(default_factory=dict)
    decisions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def name_mask_folders(nodes: list[Node], roots: list[str]) -> tuple[list[str], str]:
    """Return the names of folders of masks as the option takes them, and what to call them.

    Args:
        nodes: the folders.
        roots: folders of categories; names of what lies in one are those inside it.
    """
    names: dict[str, None] = {}
    shown: dict[str, None] = {}
    for node in nodes:
        root = next((root for root in roots if node.path.startswith(f"{root}/")), None)
        name = node.path if root is None else node.path[len(root) + 1 :]
        names[name] = None
        shown[f"{name}/" if root is None else f"<category>/{name}/"] = None
    return list(names), listed(shown)


def read_masks(images: list[Entry], nodes: list[Node], roots: list[str]) -> MaskReading:
    """Return how the masks of defective images are read.

    Args:
        images: the defective ones.
        nodes: folders of masks.
        roots: folders of categories, where there are several.
    """
    if not nodes:
        beside = find_beside(images) if images else None
        if beside is None or beside.share < LEAST_BESIDE:
            return MaskReading()
        return MaskReading({"mask_beside": True, **_affix_options(beside)}, (_beside_in_words(beside),))
    names, shown = name_mask_folders(nodes, roots)
    total = sum(node.total for node in nodes)
    affixes = find_affixes(_files(nodes), images)
    if affixes is None:
        reason = "no file in it is named like a defective image" if images else "there are no defective images"
        return MaskReading(warnings=(f"{shown} ({in_words(total)}) was not taken for masks: {reason}",))
    options = {"masks": names[0] if len(names) == 1 else names, **_affix_options(affixes)}
    return MaskReading(options, (f"{shown} → masks ({total}){_named(affixes)}",))


def read_labels_of_masks(tree: Node) -> Reading | None:
    """Return how a source is read where no folder says what is normal but most images have a mask; None if not."""
    base = inner(tree)
    levels = find_levels(base)
    if len(levels) == 1:
        base, levels = inner(next(iter(levels.values()))), {}
    divided = {} if levels else {node.name: each for node in base.holders() if len(each := find_levels(node)) > 1}
    images, nodes = list(base.all_images()), list(tree.masks())
    if not images:
        return None
    affixes = find_affixes(_files(nodes), images) if nodes else find_beside(images)
    if affixes is None or affixes.share < (LEAST_BESIDE if nodes else LEAST_LABELLED):
        return None
    options: dict[str, Any] = {"images": base.path} if base.path else {}
    decisions = []
    if divided:
        levels = next(iter(divided.values()))
        if len(divided) < len(base.holders()) or any(names(each) != names(levels) for each in divided.values()):
            raise Unclear(
                f"some folders in {base.path or 'the root'} are divided and others are not, or otherwise: "
                f"{counted(base)}; name the folder of one of them",
                [],
            )
        options["categories"] = [EVERY]
        decisions.append(f"{len(divided)} categories: {listed(divided)}")
    options |= split_options(levels)
    options["label_by_mask"] = True
    if nodes:
        paths, shown = name_mask_folders(nodes, [posixpath.join(base.path, name) for name in divided])
        options["masks"] = paths[0] if len(paths) == 1 else paths
        decisions.append(f"{shown} → masks ({sum(node.total for node in nodes)}){_named(affixes)}")
    else:
        options["mask_beside"] = True
        decisions.append(_beside_in_words(affixes))
    options |= _affix_options(affixes)
    decisions.append("an image whose mask is empty, or that has none → normal; any other → anomalous")
    if levels:
        options["abnormal_train"] = "test"
        below = "<category>/" if divided else ""
        decisions += [f"{below}{level.name}/ → split '{split}'" for split, level in levels.items()]
        decisions.append(MOVED)
    else:
        options |= DRAW
        decisions.append(DRAWN)
    return Reading("folder", options, [Taken("images", "labelled by their masks", (base.path,))], decisions)


DRAW = {"train_fraction": FolderOptions.train_fraction}
DRAWN = (
    f"no folder holds normal images to test, so {1 - FolderOptions.train_fraction:.0%} of the normal ones are tested, "
    f"drawn by seed and name (train_fraction, seed)"
)
MOVED = (
    "defective images in train are tested with the others, since methods that learn from normal images alone have no "
    "other use for them (abnormal_train keep leaves them in train for supervised methods)"
)


def names(levels: Mapping[Split, Node]) -> dict[Split, str]:
    """Return the names of folders of splits."""
    return {split: level.name for split, level in levels.items()}


def _files(nodes: list[Node]) -> list[Entry]:
    return [image for node in nodes for each in node.walk() for image in each.images]


def _affix_options(affixes: Affixes) -> dict[str, str]:
    options = {"mask_prefix": affixes.prefix, "mask_suffix": affixes.suffix}
    return {name: value for name, value in options.items() if value}


def _named(affixes: Affixes) -> str:
    if not (affixes.prefix or affixes.suffix):
        return ", named like their images"
    return f", named {affixes.prefix}<image>{affixes.suffix}"


def _beside_in_words(affixes: Affixes) -> str:
    if affixes.prefix or affixes.suffix:
        return f"{affixes.prefix}<image>{affixes.suffix} beside an image → its mask"
    return "a PNG beside an image of the same name and another ending → its mask"
