"""Which folders of one category hold normal images, which defective ones, and of which split they are."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from unianom.data.layout_detection.reading import Unclear, Way
from unianom.data.layout_detection.tree import Node
from unianom.data.layout_detection.words import condition
from unianom.data.layouts.folder_options import Split
from unianom.data.layouts.names import listed

Role = Literal["normal", "abnormal", "unknown"]


@dataclass(frozen=True)
class Record:
    """A folder of images alike.

    Attributes:
        node: the folder.
        role: what its images are.
        split: of the folder of a split that it lies in or whose name its own holds; None if there is none.
        name: its path from the folder of its split, or from the base of its category; "." is that itself.
        why: what told the role, if it was not the folder's own name.
    """

    node: Node
    role: Role
    split: Split | None
    name: str
    why: str = ""


@dataclass(frozen=True)
class Category:
    """The folders of one category.

    Attributes:
        base: folder that they or those of splits lie in.
        levels: folders of splits.
        records: folders of images.
    """

    base: Node
    levels: dict[Split, Node]
    records: list[Record]

    @property
    def names_normal(self) -> bool:
        """Whether a folder's own name says that its images are normal."""
        return any(record.role == "normal" and not record.why for record in self.records)


def find_category(node: Node) -> Category | None:
    """Return the folders of a category as far as names tell; None if none of them says anything.

    Raises:
        Unclear: names say something and leave something open.
    """
    base = inner(node)
    levels = find_levels(base)
    if not levels:
        records = _by_role(base)
        return Category(base, {}, records) if records else None
    if len(levels) == 1:
        only = next(iter(levels.values()))
        if any(find_category(other) for other in base.holders() if other is not only):
            return None
        records = _by_role(inner(only))
        return Category(inner(only), {}, records) if records else None
    return divided(base, levels)


def divided(base: Node, levels: dict[Split, Node]) -> Category | None:
    """Return a category whose folders lie in those of splits; None if no name in these says anything.

    Raises:
        Unclear: names leave open what is normal.
    """
    records = _by_level(levels) if "train" in levels else []
    return Category(base, levels, records) if records else None


def inner(node: Node, neutral: bool = False) -> Node:
    """Return the folder to look into: where a folder holds nothing but one other, whose name says nothing, that.

    Args:
        node: the folder.
        neutral: go only where the name of that other is one like "images", not where it could be a defect's.
    """
    while not node.images and len(holders := node.holders()) == 1:
        said = holders[0].meaning
        if said.split or said.role or (neutral and not said.neutral):
            break
        node = holders[0]
    return node


def find_levels(base: Node) -> dict[Split, Node]:
    """Return folders of splits by split, in the order of splits; where there is none to test, that to validate is.

    Raises:
        Unclear: two folders are of one split, or there is no training split beside others.
    """
    found: dict[Split, list[Node]] = {}
    for node in base.holders():
        if node.meaning.is_split and node.meaning.split:
            found.setdefault(node.meaning.split, []).append(node)
    for split, nodes in found.items():
        if len(nodes) > 1:
            names = listed(node.name for node in nodes)
            raise Unclear(f"{names} both sound like the split '{split}'", [example(base)])
    if len(found) > 1 and "train" not in found:
        raise Unclear(f"there are {listed(found)} but no folder of training images", [example(base)])
    order: tuple[Split, ...] = ("train", "val", "test")
    levels = {split: found[split][0] for split in order if split in found}
    if "val" in levels and "test" not in levels and len(levels) > 1:
        levels["test"] = levels.pop("val")
    return levels if "train" in levels or "test" in levels else {}


BESIDE = "beside normal images"


def split_options(levels: dict[Split, Node]) -> dict[str, Any]:
    """Return options of folders of splits that do not go by the usual names."""
    options = {f"{split}_folder": level.name for split, level in levels.items() if level.name != split}
    if options.get("test_folder") == "val":
        options["val_folder"] = ""
    return options


def example(base: Node) -> Way:
    """Return what names the folders of a base by their paths."""
    paths = [node.path for node in base.holders()]
    return Way("name them by their paths", "folder", {"normal": paths[:1], "abnormal": paths[1:]})


def _by_role(base: Node) -> list[Record]:
    """Return the folders of images that are not divided, or whose own names say how; none if no name says anything.

    Raises:
        Unclear: there are only defects, or a folder beside them holds normal and defective ones itself.
    """
    nodes = base.holders()
    roles = roles_of(nodes)
    if not set(roles.values()) & {"normal", "abnormal"}:
        return []
    records = [
        Record(node, role, node.meaning.split, _name(node, base)) for node in nodes if (role := roles[node.path])
    ]
    others = [node for node in nodes if roles[node.path] is None]
    if "normal" not in roles.values():
        if others or not base.images:
            raise _no_normal(base, nodes, roles)
        check_names(base)
        records.append(Record(base, "normal", None, ".", "images beside folders of defects"))
        return records
    for node in others:
        _check_plain(node, base)
        records.append(Record(node, "abnormal", node.meaning.split, _name(node, base), BESIDE))
    return records


def _by_level(levels: dict[Split, Node]) -> list[Record]:
    """Return the folders of images in those of splits; none if no name inside says anything.

    Raises:
        Unclear: names leave open what is normal.
    """
    bases = {split: inner(level, neutral=True) for split, level in levels.items()}
    inside = {split: base.holders() for split, base in bases.items()}
    every = [node for nodes in inside.values() for node in nodes]
    roles = roles_of(every)
    train = bases["train"]
    records: list[Record] = []
    known = {node.name for node in every if roles[node.path] == "normal"}
    why = ""
    if not any(roles[node.path] == "normal" for node in inside["train"]):
        open_ones = [node for node in inside["train"] if roles[node.path] is None]
        if train.images and not any(find_category(node) for node in open_ones):
            check_names(train)
            records.append(Record(train, "normal", "train", _name(train, levels["train"]), "all there is in train"))
        elif len(open_ones) == 1 and find_category(open_ones[0]) is None and _is_normal(open_ones[0], inside, roles):
            known.add(open_ones[0].name)
            why = "all there is in train"
        else:
            return []
    for split, nodes in inside.items():
        level, base = levels[split], bases[split]
        for node in nodes:
            role = roles[node.path]
            name = _name(node, level)
            if node.name in known:
                records.append(Record(node, "normal", split, name, "" if role == "normal" else why))
            elif role is not None:
                records.append(Record(node, role, split, name))
            else:
                _check_plain(node, base)
                records.append(Record(node, "abnormal", split, name, BESIDE))
        if split != "train" and base.images and not nodes:
            records.append(Record(base, "unknown", split, _name(base, level), "no folder says what they are"))
    return records


def _is_normal(node: Node, inside: dict[Split, list[Node]], roles: dict[str, Role | None]) -> bool:
    """Return whether the only folder in train, whose name says nothing, is normal: what is tested has other folders
    beside it, or calls others normal or defective."""
    tested = [other for split, nodes in inside.items() if split != "train" for other in nodes]
    names = {other.name for other in tested}
    return bool({"normal", "abnormal"} & {roles[other.path] for other in tested}) or (
        node.name in names and len(names) > 1
    )


def roles_of(nodes: Iterable[Node]) -> dict[str, Role | None]:
    """Return by path what the names of folders side by side say. Two named 0 and 1 are normal and anomalous."""
    nodes = list(nodes)
    roles: dict[str, Role | None] = {}
    numbered = {node.name for node in nodes} == {"0", "1"}
    for node in nodes:
        said = node.meaning.role
        if numbered:
            roles[node.path] = "normal" if node.name == "0" else "abnormal"
        else:
            known: dict[str | None, Role] = {"normal": "normal", "abnormal": "abnormal", "unlabelled": "unknown"}
            roles[node.path] = known.get(said)
    return roles


def _name(node: Node, base: Node) -> str:
    return posixpath.relpath(node.path or ".", base.path or ".")


def _check_plain(node: Node, base: Node) -> None:
    """Refuse a folder beside normal images that is divided itself, or whose name is no defect's."""
    if node.meaning.neutral:
        normal = [_name(other, base) for other in base.holders() if other.meaning.role == "normal"][:1]
        where = {"images": base.path} if base.path else {}
        options = {**where, "normal": "".join(normal)}
        raise Unclear(
            f"{node.path} lies beside normal images, and its name does not say whether it holds defects",
            [
                Way("it does", "folder", {**options, "abnormal": [_name(node, base)]}),
                Way("nobody knows", "folder", {**options, "unknown": [_name(node, base)]}),
                Way("leave it out", "folder", options),
            ],
        )
    if inside := find_category(node):
        names = listed(record.node.path for record in inside.records)
        raise Unclear(
            f"{node.path} lies beside normal images in {base.path or 'the root'} and holds {names} itself",
            [example(base)],
        )


def check_names(node: Node) -> None:
    """Refuse images that would be normal for want of a folder that says otherwise, while their own names do."""
    named = [image for image in node.images if condition(image.stem) == "abnormal"]
    if named:
        where = node.path or "the folder"
        raise Unclear(
            f"the names of {len(named)} of {len(node.images)} images in {where} speak of defects ({named[0].name}), so "
            f"they are not taken for normal; sort them into folders of normal and defective ones, or write a table of "
            f"image and label",
            [Way("all are normal nevertheless", "folder", {"normal": node.path or "."})],
        )


def _no_normal(base: Node, nodes: list[Node], roles: dict[str, Role | None]) -> Unclear:
    abnormal = [node.name for node in nodes if roles[node.path] == "abnormal"]
    others = [node.name for node in sorted(nodes, key=lambda node: -node.total) if roles[node.path] is None]
    if not others:
        return Unclear(f"there are only defective images ({listed(abnormal)}) and no normal ones to learn from", [])
    return Unclear(
        f"{listed(abnormal)} sounds defective, but no folder name says what is normal; found: {counted(base)}",
        [Way(f"{others[0]} is normal", "folder", {"normal": others[0], "abnormal": [*abnormal, *others[1:]]})],
    )


def counted(base: Node, most: int = 8) -> str:
    """Return the folders in one with their numbers of images, for messages."""
    named = [f"{node.name}/ ({in_words(node.total)})" for node in base.folders if node.total]
    loose = [f"{in_words(len(base.images))} beside them"] if base.images and named else []
    return listed([*named, *loose], most)


def in_words(count: int) -> str:
    """Return a number of images in words."""
    return f"{count} image" + "s" * (count != 1)
