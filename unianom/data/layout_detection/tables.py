"""A table of labels beside the images: which column holds what, by usual names and by what stands in it."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from unianom.data.layout_detection.masks import DRAW, DRAWN, MOVED
from unianom.data.layout_detection.reading import Reading, Taken, Unclear, Way
from unianom.data.layout_detection.tree import Node
from unianom.data.layout_detection.words import condition, tokens
from unianom.data.layouts.labels import SPLIT_VALUES
from unianom.data.layouts.names import listed, same_name
from unianom.data.layouts.source import Source
from unianom.data.layouts.tables import TABLE_ENDINGS, Table
from unianom.errors import DataError

LEAST_FOUND = 0.5
"""Share of rows whose image is there, from which a column is taken for that of the images."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_IMAGE_WORDS = _words("image images img imgs file files filename filenames path paths filepath name id picture")
_MASK_WORDS = _words("mask masks maskname segmentation seg gt groundtruth")
_SPLIT_COLUMNS = _words("split subset set phase partition fold")
_CATEGORY_COLUMNS = _words("category object product part item clsname classname")
_DEFECT_COLUMNS = _words("defect defecttype anomalytype type kind labelname")
_LABEL_COLUMNS = _words(
    "label labels class target y anomaly isanomaly anomalous isanomalous abnormal isabnormal ok isok good isgood "
    "normal isnormal defect isdefect defective isdefective bad isbad ng isng nok isnok status quality result verdict "
    "judgement judgment state condition pass passed isfaulty faulty grade"
)
_TRUE = frozenset({"1", "1.0", "true", "yes", "y", "t"})
_FALSE = frozenset({"0", "0.0", "false", "no", "n", "f"})


def read_tables(source: Source, tree: Node, only: str = "") -> list[Reading]:
    """Return how each table in the root is read that names images of the tree.

    Args:
        source: of the tree.
        tree: all folders.
        only: the one table to look at; a file of another kind is then an error, as one that names no images is.

    Raises:
        DataError: `only` is no table of images.
        Unclear: a table names images, and its columns leave something open.
    """
    tables = [only] if only else _table_names(source)
    readings = []
    for name in tables:
        try:
            rows = [row for _, row in Table(source, name)]
        except DataError:
            if only:
                raise
            continue
        columns = list(dict.fromkeys(column for row in rows for column in row))
        files = _find_images(rows, columns, tree)
        if files is not None:
            readings.append(_read_table(name, rows, columns, files, tree))
        elif only:
            raise DataError(
                f"no column of {source.uri(name)} names images in or below {source.uri()}; columns: {listed(columns)}"
            )
    return readings


def _table_names(source: Source) -> list[str]:
    entries = source.entries()
    return [entry.name for entry in entries if not entry.is_folder and entry.name.lower().endswith(TABLE_ENDINGS)]


@dataclass(frozen=True)
class _Files:
    """The column of files: where they lie, what their names lack, and how many of the rows' are there."""

    column: str
    images: str
    ending: str
    found: int


def _find_images(rows: list[dict[str, str]], columns: list[str], tree: Node) -> _Files | None:
    """Return the column that names images of the tree; None if there is none."""
    paths = [image.path for node in tree.walk() for image in node.images]
    whole, bare = _by_name(paths), _by_name(posixpath.splitext(path)[0] for path in paths)
    endings = Counter(posixpath.splitext(path)[1] for path in paths) or Counter([""])
    candidates = []
    for column in columns:
        values = [row.get(column, "").replace("\\", "/") for row in rows if row.get(column)]
        without_ending = [(bare, endings.most_common(1)[0][0])] if set(tokens(column)) & _IMAGE_WORDS else []
        for known, ending in ((whole, ""), *without_ending):
            folder, found = _find_folder(values, known)
            if found >= LEAST_FOUND * len(rows) and found:
                candidates.append(_Files(column, folder, ending, found))
                break
    named = [files for files in candidates if set(tokens(files.column)) & _IMAGE_WORDS]
    named = named or [files for files in candidates if not set(tokens(files.column)) & _MASK_WORDS]
    return max(named, key=lambda files: files.found, default=None)


def _by_name(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return paths by their last part."""
    known: dict[str, list[str]] = {}
    for path in paths:
        known.setdefault(same_name(posixpath.basename(path)), []).append(path)
    return known


def _find_folder(values: list[str], known: Mapping[str, list[str]]) -> tuple[str, int]:
    """Return the folder that most values are relative to, and of how many values there is a file then."""
    counts: Counter[str] = Counter()
    for value in values:
        plain = posixpath.normpath(value)
        for path in known.get(same_name(posixpath.basename(plain)), ()):
            if path == plain or path.endswith(f"/{plain}"):
                counts[path[: len(path) - len(plain)].rstrip("/")] += 1
    return max(counts.items(), key=lambda pair: (pair[1], -len(pair[0])), default=("", 0))


def _read_table(name: str, rows: list[dict[str, str]], columns: list[str], files: _Files, tree: Node) -> Reading:
    given = {"table": name, "image": files.column}
    if files.images:
        given["images"] = files.images
    if files.ending:
        given["ending"] = files.ending
    others = [column for column in columns if column != files.column]
    options: dict[str, Any] = dict(given)
    split = _only(others, _SPLIT_COLUMNS, lambda values: values <= set(SPLIT_VALUES), rows)
    if split:
        options["split"] = split
    category = _only(others, _CATEGORY_COLUMNS, lambda values: not values & (_TRUE | _FALSE), rows)
    others = [column for column in others if column not in (split, category)]
    label, normal, why = _find_label(name, rows, others, given)
    options |= {"label": label, "normal": normal}
    others = [column for column in others if column != label]
    if category:
        options["category"] = category
    defect = _only(others, _DEFECT_COLUMNS, lambda values: not values & (_TRUE | _FALSE), rows)
    if defect:
        options["defect"] = defect
    paths = {image.path for node in tree.walk() for image in node.images}
    masks = [c for c in others if set(tokens(c)) & _MASK_WORDS and any(row.get(c, "") in paths for row in rows)]
    if masks:
        options["mask"] = masks[0]
    shown = ", ".join(
        f"{key} {value}" for key, value in options.items() if key in ("split", "category", "defect", "mask")
    )
    decisions = [
        f"{name}: column {files.column} → images{f', in {files.images}/' if files.images else ''} ({files.found} of "
        f"{len(rows)} rows have one); column {label} → {listed(normal)} is normal, everything else anomalous"
        + (f"; further columns: {shown}" if shown else "")
    ]
    warnings = [why] if why else []
    if len(rows) > files.found:
        warnings.append(f"{len(rows) - files.found} rows of {name} name images that are not there")
    if not split:
        options |= DRAW
        decisions.append(DRAWN)
    elif any(_is_train(row[split]) and row.get(label) and row[label] not in normal for row in rows):
        options["abnormal_train"] = "test"
        decisions.append(MOVED)
    return Reading("labels", options, [Taken("images", f"labelled by {name}", (files.images,))], decisions, warnings)


def _is_train(value: str) -> bool:
    return SPLIT_VALUES.get(value.lower()) == "train"


def _only(columns: list[str], names: frozenset[str], fits: Any, rows: list[dict[str, str]]) -> str:
    """Return the first column of such a name whose values fit; "" if there is none."""
    for column in columns:
        values = {row.get(column, "").lower() for row in rows} - {""}
        if "".join(tokens(column)) in names and values and fits(values):
            return column
    return ""


def _find_label(
    name: str, rows: list[dict[str, str]], columns: list[str], given: dict[str, str]
) -> tuple[str, list[str], str]:
    """Return the column of labels, its values that mean normal, and a warning if only usage says so.

    Raises:
        Unclear: no column is named like one, its values say nothing, or several do.
    """
    found: list[tuple[str, list[str], str]] = []
    unclear: list[str] = []
    for column in columns:
        if "".join(tokens(column)) not in _LABEL_COLUMNS:
            continue
        values = sorted({row.get(column, "") for row in rows} - {""})
        normal, why = _normal_values(column, values)
        if normal:
            found.append((column, normal, why))
        elif values:
            unclear.append(f"{column} ({listed(values, 6)})")
    binary = [each for each in found if len({row.get(each[0]) for row in rows} - {""}) <= 2]
    chosen = found if len(found) == 1 else binary
    if len(chosen) == 1:
        return chosen[0]
    example = {**given, "label": columns[0] if columns else "label", "normal": ["ok"]}
    way = Way("name the column and its values that mean normal", "labels", example)
    if found:
        names = listed(column for column, _, _ in found)
        raise Unclear(f"several columns of {name} could be the labels: {names}", [way])
    if unclear:
        raise Unclear(f"the values of {name} do not say what is normal: {listed(unclear)}", [way])
    raise Unclear(f"no column of {name} is named like one of labels; its columns: {listed(columns)}", [way])


def _normal_values(column: str, values: list[str]) -> tuple[list[str], str]:
    """Return which values of a column mean normal, none if that is unclear, and a warning if only usage says so."""
    lowered = {value.lower() for value in values}
    if lowered <= _TRUE | _FALSE:
        said = condition(column)
        if said is None:
            if not lowered <= {"0", "1", "0.0", "1.0"}:
                return [], ""
            why = (
                f"in column {column} 0 was taken for normal and 1 for anomalous, as usual; if it is the other way "
                f"round, say normal [1]"
            )
            return [value for value in values if value.lower() in _FALSE], why
        wanted = _TRUE if said == "normal" else _FALSE
        return [value for value in values if value.lower() in wanted], ""
    return [value for value in values if condition(value) == "normal"], ""
