"""What a person is told of a shard set: what it holds, and what was left out or looks wrong."""

from __future__ import annotations

from typing import Any

from pipelines.data.ingest import IngestResult
from pipelines.runtime.cli import console, print_table


def print_summary(result: IngestResult) -> None:
    """Print counts by category and split, and what to know before trusting a figure."""
    manifest = result.shards.manifest
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for entry in manifest["counts"]:
        label = {0: "normal", 1: "anomalous", None: "unlabelled"}[entry["label"]]
        cell = rows.setdefault((entry["dataset"], entry["category"]), {})
        cell[f"{entry['split']} {label}"] = cell.get(f"{entry['split']} {label}", 0) + entry["count"]
    columns = sorted({column for cell in rows.values() for column in cell}, key=_column_order)
    table = [[f"{d}/{c}", *(str(cell.get(column, "–")) for column in columns)] for (d, c), cell in rows.items()]
    print_table("samples", ["data set / category", *columns], table)
    summary = manifest["summary"]
    console.print(
        f"sizes: height {summary['height'][0]}–{summary['height'][1]}, width {summary['width'][0]}–"
        f"{summary['width'][1]}, {summary['distinct_sizes']} distinct"
    )
    for key, text in (
        ("duplicates", "groups of identical files"),
        ("duplicates_across_splits", "groups of identical files on both sides of the split"),
        ("duplicates_with_other_label", "groups of identical files with different labels"),
    ):
        if summary[key]["groups"]:
            console.print(
                f"warning: {summary[key]['groups']} {text}, e.g. {', '.join(summary[key]['examples'][0][:2])}"
            )
    for line in doubts(manifest):
        console.print(line)
    for status, count in manifest["rejected"].items():
        console.print(f"rejected: {count} {status}; see {result.shards.uri}/_rejected.parquet")
    done = "written" if result.fresh else "was complete already"
    console.print(
        f"shard set {done}: {result.shards.uri} ({len(result.shards.parts)} parts, {manifest['bytes']:,} bytes)"
    )


FORMATS_READ = "PNG, JPEG, BMP, TIFF and WebP"

MASK_ADVICE = {
    "nearly_full": (
        "cover nearly all of their image",
        "are they inverted? --invert_masks true takes black for the defect; if their background is a shade, "
        "--mask_threshold takes only what is brighter",
    ),
    "read_at_half": (
        "have shades between black and white, as JPEG and anti-aliasing make them, and were read at half of white",
        "--mask_threshold 0 takes every shade for the defect",
    ),
    "turned": (
        "have the size that their image has before its EXIF data turns it, and were turned with it",
        "--mask_orientation shown leaves them as they are",
    ),
    "maybe_unturned": (
        "belong to an image that its EXIF data turns, and their size does not tell whether they lie as it is shown or "
        "as it is stored; they were taken to lie as it is shown",
        "--mask_orientation stored turns them along",
    ),
    "wrong_size": ("do not have the size of their image and were left out", ""),
}
"""What is said of masks, and the option that helps."""


def doubts(manifest: dict[str, Any]) -> list[str]:
    """Return what was left out or looks wrong, with an example and the option that helps, a line each."""
    summary = manifest["summary"]
    lines = []
    for problem, found in summary["masks"].items():
        if not found["count"]:
            continue
        example = f"e.g. {found['examples'][0]}"
        if problem in MASK_ADVICE:
            what, advice = MASK_ADVICE[problem]
            lines.append(f"note: masks that {what}: {found['count']}, {example}" + (f"; {advice}" if advice else ""))
        else:
            text = problem.replace("_", " ")
            lines.append(f"note: masks {text}: {found['count']} anomalous images, {example}")
    deep = summary.get("sixteen_bits")
    if deep:
        bits = max(9, int(deep["largest"]).bit_length())
        lines.append(
            f"note: images of 16 bits a sample without a value above {deep['largest']:,}: {deep['count']}, "
            f"e.g. {deep['example']}; if they hold {bits} bits, --bits {bits} scales them to the whole range"
        )
    return lines + left_out_lines(summary.get("left_out", {}))


def left_out_lines(left_out: dict[str, Any]) -> list[str]:
    """Return what `LeftOut.summary` tells of files and folders that were seen and not taken, a line each."""
    lines = []
    for ending, found in left_out.get("files", {}).items():
        name = f"files ending in {ending}" if ending else "files without an ending"
        lines.append(
            f"left out: {name}: {found['count']}, e.g. {found['example']}; images are read from {FORMATS_READ} and "
            f"told by their ending, so convert or rename them if they are images"
        )
    if "folders" in left_out:
        found = left_out["folders"]
        lines.append(
            f"left out: images in folders that the layout has no use for: at least {found['images']} in "
            f"{found['count']}, e.g. {found['examples'][0]}"
        )
    if "links" in left_out:
        found = left_out["links"]
        lines.append(f"left out: links to a folder that they lie in: {found['count']}, e.g. {found['examples'][0]}")
    return lines


def _column_order(column: str) -> tuple[int, str]:
    return ("train", "val", "test").index(column.split()[0]), column
