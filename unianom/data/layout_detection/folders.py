"""Folders of normal and defective images, of one category or of several, read by usual names."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unianom.data.layout_detection.categories import (
    Category,
    Record,
    check_names,
    counted,
    divided,
    example,
    find_category,
    find_levels,
    inner,
    split_options,
)
from unianom.data.layout_detection.masks import DRAW, DRAWN, MOVED, MaskReading, read_labels_of_masks, read_masks
from unianom.data.layout_detection.reading import Reading, Taken, Unclear, Way
from unianom.data.layout_detection.tree import Node
from unianom.data.layouts.folder_options import EVERY
from unianom.data.layouts.names import listed

MOST_NAMED = 24
"""Folders of defects that options name one by one."""

_NUMBERS = (
    "the names 0 and 1 say nothing by themselves: 0 was taken for normal and 1 for anomalous, as usual; if it is the "
    "other way round, say normal 1 and abnormal 0"
)


def read_folders(tree: Node) -> Reading:
    """Return how the `folder` layout reads a tree.

    Raises:
        Unclear: names do not tell.
    """
    if not any(node.path and node.meaning.role in ("normal", "abnormal") for node in tree.walk()):
        by_mask = read_labels_of_masks(tree)
        if by_mask is not None:
            return by_mask
    category = find_category(tree)
    if category is not None:
        found = _Found(tree, category.base, {"": category}, {"": category.base.path})
        return found.reading([], split_options(category.levels))
    several = _read_several(tree)
    if several is not None:
        return several
    if tree.images and not tree.holders():
        check_names(tree)
        meaning = "normal, since no folder and no table says otherwise"
        return Reading("folder", {"normal": ".", **DRAW}, [Taken("all images", meaning, ("",))], [DRAWN])
    raise _unclear(tree)


def _unclear(tree: Node) -> Unclear:
    """Return the question about folders whose names say nothing."""
    base = inner(tree)
    everything = Way("all are normal", "folder", {"normal": base.path or "."})
    levels = find_levels(base)
    if len(levels) > 1:
        classes = [node.name for node in levels["train"].holders()]
        ways = [Way("they are classes", "class_folders", {"normal_classes": classes[:1]})] if classes else [everything]
        where = " and ".join(level.path for level in levels.values())
        found = counted(levels["train"])
        return Unclear(f"no name of a folder in {where} says what is normal; found in train: {found}", ways)
    nodes = sorted(base.holders(), key=lambda node: -node.total)
    names = [posixpath.relpath(node.path, base.path or ".") for node in nodes]
    options = {**({"images": base.path} if base.path else {}), "normal": "".join(names[:1]), "abnormal": names[1:6]}
    ways = [Way(f"{names[0]} is normal and the others are defects", "folder", options)] if names[1:] else []
    return Unclear(f"no folder name says what is normal; found: {counted(base)}", [*ways, everything])


def _read_several(tree: Node) -> Reading | None:
    """Return how the tree is read as several categories; None if none of its folders is one.

    Raises:
        Unclear: they are laid out in different ways.
    """
    base = inner(tree)
    levels = find_levels(base)
    if len(levels) > 1:
        inside = {split: {node.name: node for node in level.holders()} for split, level in levels.items()}
        names = sorted({name for nodes in inside.values() for name in nodes})
        candidates = {name: {split: nodes[name] for split, nodes in inside.items() if name in nodes} for name in names}
        found = {
            name: category
            for name, each in candidates.items()
            if (category := divided(base, each)) and category.names_normal
        }
        roots: dict[str, str | None] = dict.fromkeys(found)
    else:
        nodes = base.holders()
        names = [node.name for node in nodes]
        found = {node.name: category for node in nodes if (category := find_category(node))}
        roots = {node.name: node.path for node in nodes if node.name in found}
    if not found:
        return None
    for name, category in found.items():
        if category.levels and roots[name] not in (None, category.base.path):
            raise Unclear(f"the folders of splits of {name} lie deeper, in {category.base.path}", [example(base)])
    _check_alike(base, found)
    options = split_options(levels if len(levels) > 1 else next(iter(found.values())).levels)
    options = {"categories": [EVERY] if len(found) == len(names) else list(found), **options}
    return _Found(tree, base, found, roots).reading([f"{len(found)} categories: {listed(found)}"], options)


def _check_alike(base: Node, found: dict[str, Category]) -> None:
    """Refuse categories that are laid out or named in different ways, which one set of options cannot say.

    Raises:
        Unclear: they are; asks for one of them.
    """
    kinds = {}
    for name, category in found.items():
        normal = frozenset(record.name for record in category.records if record.role == "normal")
        split_first = category.base is base
        kinds[name] = ({} if split_first else split_options(category.levels), bool(category.levels), normal)
    (first, kind), *others = kinds.items()
    other = next((name for name, each in others if each != kind), None)
    if other is not None:
        raise Unclear(
            f"{listed(f'{name}/' for name in found)} hold normal and defective images each, but {other} is laid out or "
            f"named otherwise than {first}, so they are no categories of one set; name the folder of one of them, such "
            f"as {first}, or name them alike",
            [],
        )


@dataclass(frozen=True)
class _Found:
    """The categories of a tree.

    Attributes:
        tree: all folders.
        base: folder that everything but masks lies in.
        categories: by name; "" is the only one.
        roots: folder that paths of each start from; None where names in folders of splits are all there is.
    """

    tree: Node
    base: Node
    categories: dict[str, Category]
    roots: dict[str, str | None]

    def records(self) -> Iterator[tuple[str, Record]]:
        """Yield all records, each with the name of its category."""
        for name, category in self.categories.items():
            for record in category.records:
                yield name, record

    def reading(self, decisions: list[str], options: dict[str, Any]) -> Reading:
        """Return how they are read; decisions and options are those so far."""
        if self.base.path:
            options = {"images": self.base.path, **options}
        normal = [record for _, record in self.records() if record.role == "normal"]
        drawn = all(record.split != "test" for record in normal)
        options = {**options, **self._names(by_path=drawn or any(record.name == "." for record in normal))}
        if drawn and None not in self.roots.values():
            options |= DRAW
            decisions = [*decisions, DRAWN]
        if any(
            record.role == "abnormal" and record.split == "train" and self.categories[name].levels
            for name, record in self.records()
        ):
            options["abnormal_train"] = "test"
            decisions = [*decisions, MOVED]
        masks = self._masks()
        numbers = [_NUMBERS] if any(record.node.name == "0" for record in normal) else []
        return Reading(
            "folder",
            {**options, **masks.options},
            self._taken(),
            [*decisions, *masks.decisions],
            [*numbers, *masks.warnings],
        )

    def _names(self, by_path: bool) -> dict[str, Any]:
        """Return the options that name folders, those in folders of splits by their paths or as they lie in them."""
        named: dict[str, dict[str, None]] = {}
        for category, record in self.records():
            levels, root = self.categories[category].levels, self.roots[category]
            name = record.name
            if root is not None and (by_path or not levels or name == "."):
                name = posixpath.relpath(record.node.path or ".", root or ".")
            key: str = record.role
            if record.role == "normal" and not levels and record.split in ("val", "test"):
                key = f"{record.split}_normal"
            named.setdefault(key, {})[name] = None
        order = ("normal", "val_normal", "test_normal", "abnormal", "unknown")
        options: dict[str, Any] = {key: list(named[key]) for key in order if key in named}
        if len(options.get("normal", ())) == 1:
            options["normal"] = options["normal"][0]
        if len(options.get("abnormal", ())) > MOST_NAMED and not by_path:
            options["abnormal"] = [EVERY]
        return options

    def _taken(self) -> list[Taken]:
        """Return what was taken for what, the same of all categories as one."""
        purposes = {"train": "to train on", "val": "to validate on", "test": "to test", None: ""}
        found: dict[tuple[str, str], list[str]] = {}
        for category, record in sorted(self.records(), key=lambda pair: pair[1].role == "abnormal"):
            parts = record.node.path.split("/")
            shown = "/".join("<category>" if category and part == category else part for part in parts)
            meaning = {"normal": "normal", "abnormal": "defective", "unknown": "unlabelled"}[record.role]
            purpose = purposes[record.split] if record.role == "normal" else ""
            said = ", ".join(each for each in (meaning, purpose, record.why) if each)
            shown = f"{shown}/" if record.node.path else "all other images"
            found.setdefault((shown, said), []).append(record.node.path)
        return [Taken(shown, said, tuple(paths)) for (shown, said), paths in found.items()]

    def _masks(self) -> MaskReading:
        images = [
            image for _, record in self.records() if record.role == "abnormal" for image in record.node.all_images()
        ]
        roots = [root for name, root in self.roots.items() if name and root]
        return read_masks(images, list(self.tree.masks()), roots)
