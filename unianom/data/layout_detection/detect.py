"""Find out how somebody's own folder is laid out, and say what was taken for what."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from unianom.data.layout_detection.categories import in_words
from unianom.data.layout_detection.cautions import warnings_of_counts, warnings_of_left_out
from unianom.data.layout_detection.commands import command_line, option_arguments
from unianom.data.layout_detection.folders import read_folders
from unianom.data.layout_detection.reading import Reading, Unclear, Way
from unianom.data.layout_detection.tables import read_tables
from unianom.data.layout_detection.tree import Node, read_tree
from unianom.data.layouts import LAYOUTS, LeftOut, Source, make_options
from unianom.data.layouts.entries import IMAGE_SUFFIXES
from unianom.data.layouts.names import listed
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.errors import DataError, OptionError

ROLES = (
    *("train_normal", "train_anomalous", "val_normal", "val_anomalous", "test_normal", "test_anomalous"),
    "unlabelled",
)
"""What images may be, by split and label; those without a label are of any split."""


@dataclass(frozen=True)
class Detected:
    """How a folder is laid out, as far as names tell.

    Attributes:
        layout: name in `LAYOUTS`.
        source: what the layout reads: the folder, or the one folder in it that holds everything.
        options: options of the layout, as plain data; `make_options(LAYOUTS[layout], options)` makes them.
        counts: images by `ROLES`, those there are none of left out.
        masks: images with a mask.
        categories: images by category.
        decisions: what was taken for what, a line each.
        warnings: what may be wrong or was not taken, a line each.
    """

    layout: str
    source: str
    options: dict[str, Any]
    counts: dict[str, int]
    masks: int
    categories: dict[str, int]
    decisions: tuple[str, ...]
    warnings: tuple[str, ...]
    arguments: tuple[str, ...] = field(repr=False)

    def command(self, program: str = "unianom inspect") -> str:
        """Return a command line that names the layout and its options, to be changed where they are wrong."""
        return command_line(program, self.source, self.arguments)


def detect_layout(source: str | os.PathLike[str], program: str = "unianom inspect") -> Detected:
    """Find the layout of a folder, or of a table or manifest, by the names in it.

    Folders are listed once, and no image is opened but masks that alone tell labels. Published data sets are known by
    their own structure; then folders are read by usual names (good, ok, normal … against bad, ng, defect …, also inside
    train, val and test, or inside a folder for each category), and tables beside the images by their columns. Where
    names leave something open, nothing is guessed.

    Where no folder holds normal images to test, a share of those to train on is tested, since nothing else tells how
    often a method is wrong about normal images. Defective images in train are tested with the others: methods that
    learn from normal images alone never see them, so nothing leaks, and every label and mask counts. The decisions name
    the options that say otherwise.

    Args:
        source: local path or URI.
        program: command that the user would say it with, for messages.

    Raises:
        OptionError: names do not tell; says what was found and with which commands to say what it is.
        DataError: there is no such folder, it holds no images, or they are not what their layout wants.
    """
    root = replace(Source.open(source), listings={})
    if root.has_file(""):
        return _detect_file(root, program)
    while True:
        recognised = _recognised(root)
        if recognised is not None and recognised.layout != "mvtec":
            return _checked(root, recognised, None, program)
        tree = read_tree(root)
        if recognised is not None and _is_plain_mvtec(tree):
            return _checked(root, recognised, tree, program)
        if not tree.total:
            raise _no_images(root, tree)
        only = tree.holders()
        inside = only[0] if len(only) == 1 and tree.total == only[0].total else None
        if inside is None or inside.meaning.split or inside.meaning.role:
            break
        readings = _tables(root, tree, program)
        if readings:
            break
        root = replace(root.at(inside.path), dataset=inside.name)
    return _detect_own(root, tree, program)


def _detect_own(root: Source, tree: Node, program: str) -> Detected:
    """Return the reading of folders or of tables; where both are possible, they must say the same."""
    tables = _tables(root, tree, program)
    if len(tables) > 1:
        names = listed(reading.options["table"] for reading in tables)
        ways = [Way(reading.options["table"], reading.layout, reading.options) for reading in tables]
        raise _question(root, Unclear(f"more than one table names the images: {names}", ways), program)
    try:
        folders = read_folders(tree)
    except Unclear as unclear:
        if tables:
            return _checked(root, tables[0], tree, program)
        raise _question(root, unclear, program) from unclear
    if not tables:
        return _checked(root, folders, tree, program)
    table = tables[0]
    if folders.options.get("normal") == ".":  # folders say nothing
        return _checked(root, table, tree, program)
    by_folder = {ref.uri: ref.label for ref in _samples(root, folders)}
    by_table = {ref.uri: ref.label for ref in _samples(root, table)}
    name = table.options["table"]
    if all(by_folder.get(uri, label) == label for uri, label in by_table.items() if label is not None):
        agreed = replace(folders, decisions=[*folders.decisions, f"{name} says the same of the images that it names"])
        return _checked(root, agreed, tree, program)
    ways = [Way("folders", folders.layout, folders.options), Way(name, table.layout, table.options)]
    raise _question(root, Unclear(f"folder names and {name} label images differently", ways), program)


def _detect_file(root: Source, program: str) -> Detected:
    """Return how a file is read: a manifest, a merged layout or a table of labels."""
    if root.name.lower().endswith(IMAGE_SUFFIXES):
        raise DataError(f"{root.uri()} is one image; name the folder that holds the images")
    if root.name.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz")):
        raise DataError(f"{root.uri()} is an archive; unpack it and name its folder")
    recognised = _recognised(root)
    if recognised is not None:
        return _checked(root, recognised, None, program)
    above = replace(root.at(".."), dataset=root.at("..").name)
    tree = read_tree(above)
    try:
        (reading,) = read_tables(above, tree, root.name)
    except Unclear as unclear:
        raise _question(above, unclear, program) from unclear
    return _checked(above, reading, tree, program)


def _recognised(root: Source) -> Reading | None:
    """Return the published layout that takes a source for its own; None if none does.

    Raises:
        OptionError: more than one does.
    """
    found = []
    for layout in LAYOUTS.values():
        if layout.recognise is None:
            continue
        try:
            recognised = layout.recognise(root)
        except DataError:  # a file where a folder is looked into
            continue
        if recognised is not None:
            found.append(Reading(layout.name, recognised.options, (), recognised.decisions, example=recognised.example))
    if len(found) > 1:
        names = " and ".join(reading.layout for reading in found)
        raise OptionError(f"{root.uri()} looks like the layouts {names}; name one of them with --layout")
    return found[0] if found else None


def _is_plain_mvtec(tree: Node) -> bool:
    """Return whether a data set with the folders of MVTec AD has no masks elsewhere than there, nor folders in test
    whose names say that they are no defects; the folder layout reads those that have."""
    for node in tree.walk():
        names, role = node.path.split("/"), node.meaning.role if node.path else None
        strange = role == "mask" or (role in ("unlabelled", "other") and "test" in names[:2])
        if node.total and strange and "ground_truth" not in names:
            return False
    return True


def _tables(root: Source, tree: Node, program: str) -> list[Reading]:
    try:
        return read_tables(root, tree)
    except Unclear as unclear:
        raise _question(root, unclear, program) from unclear


def _no_images(root: Source, tree: Node) -> DataError:
    folders = sum(1 for _ in tree.walk()) - 1
    below = f" nor in the {folders} folders below it" if folders else ""
    return DataError(
        f"no images in {root.uri()}{below}; found: {root.found()}; images are files that end in "
        f"{', '.join(IMAGE_SUFFIXES[:3])} … {IMAGE_SUFFIXES[-1]}"
    )


def _samples(root: Source, reading: Reading, left_out: LeftOut | None = None) -> Iterator[SampleRef]:
    """Return the samples of a reading without listing anything twice."""
    layout = LAYOUTS[reading.layout]
    options = make_options(layout, reading.options)
    source = replace(root, dataset=options.dataset or root.dataset, left_out=left_out or LeftOut())
    return layout.samples(source, options)


def _checked(root: Source, reading: Reading, tree: Node | None, program: str) -> Detected:
    """Return what a reading gives, by letting its layout list the samples.

    Raises:
        OptionError: the layout needs an option that nobody but people know.
        DataError: the layout does not find what it wants.
    """
    arguments = option_arguments(reading.layout, reading.options)
    counts: Counter[str] = Counter()
    categories: Counter[str] = Counter()
    learnt: Counter[str] = Counter()
    below: Counter[str] = Counter()
    masks = 0
    left_out = LeftOut()
    folders = {path for taken in reading.taken for path in taken.paths}
    prefix = root.uri().rstrip("/") + "/"
    try:
        for ref in _samples(root, reading, left_out):
            counts["unlabelled" if ref.label is None else f"{ref.split}_{_label_name(ref.label)}"] += 1
            categories[ref.category] += 1
            learnt[ref.category] += ref.split == "train" and ref.label == NORMAL
            masks += ref.mask_uri is not None
            below[_nearest_folder(ref.uri.removeprefix(prefix), folders)] += 1
    except (OptionError, DataError) as error:
        options = option_arguments(reading.layout, {**reading.options, **reading.example})
        how = "say it, for example" if reading.example else "to say it otherwise"
        raise type(error)(
            f"{root.uri()} was taken for the layout {reading.layout}: {error}; {how}: "
            f"{command_line(program, root.uri(), options)}"
        ) from error
    left_out.links |= root.left_out.links  # seen when the folders were listed
    decisions = [
        f"{taken.shown} → {taken.meaning} ({in_words(sum(below[path] for path in taken.paths))})"
        for taken in reading.taken
    ]
    return Detected(
        layout=reading.layout,
        source=root.uri(),
        options=dict(reading.options),
        counts={role: counts[role] for role in ROLES if counts[role]},
        masks=masks,
        categories=dict(categories),
        decisions=(*decisions, *reading.decisions),
        warnings=(*reading.warnings, *warnings_of_counts(counts, masks, learnt), *warnings_of_left_out(root, left_out)),
        arguments=arguments,
    )


def _label_name(label: int) -> str:
    return {NORMAL: "normal", ANOMALOUS: "anomalous"}[label]


def _nearest_folder(path: str, folders: Iterable[str]) -> str:
    """Return the innermost of some folders that a path lies in; "" if none."""
    folder = path
    while folder:
        folder = folder.rpartition("/")[0]
        if folder in folders:
            return folder
    return ""


def _question(root: Source, unclear: Unclear, program: str) -> OptionError:
    """Return the error that says what was found and how to say what it is."""
    ways = [
        f"{way.words}: {command_line(program, root.uri(), option_arguments(way.layout, way.options))}"
        for way in unclear.ways
    ]
    how = f"; say it, for example {'; or '.join(ways)}" if ways else ""
    return OptionError(f"{root.uri()}: {unclear.reason}{how}")
