"""The folder that is inspected: how it is laid out, found out or as told, and its images as shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.data.ingest import ingest
from pipelines.data.ingest_summary import print_summary
from pipelines.data.options import IngestOptions
from pipelines.inspect.options import InspectOptions
from pipelines.runtime.cli import console
from unianom.data.layout_detection import Detected, command_line, detect_layout
from unianom.data.shards import ShardSet
from unianom.errors import DataError, OptionError


@dataclass(frozen=True)
class Layout:
    """How a folder is read.

    Attributes:
        name: of the layout.
        source: what it reads, the folder or one inside it.
        options: of the layout.
    """

    name: str
    source: str
    options: dict[str, Any]


UNLABELLED = {"unlabelled": True}
"""Options of the layout `folder` that take every image, whatever its folder is called."""


def find_layout(options: InspectOptions) -> Layout:
    """Return how the folder is laid out, and say what was taken for what.

    Raises:
        OptionError, DataError: see `detect_layout`; also if there is nothing normal to learn from.
    """
    if options.layout is not None:
        return Layout(options.layout, options.source, options.layout_options)
    if options.model is not None:
        return _layout_of_new_images(options)
    detected = detect_layout(options.source)
    _say(detected)
    if not detected.counts.get("train_normal"):
        raise DataError(
            f"{options.source} has no normal images to learn from; name the folder that holds some, or score with a "
            f"model by --model FOLDER. What was understood: {detected.command()}"
        )
    return Layout(detected.layout, detected.source, detected.options)


def _layout_of_new_images(options: InspectOptions) -> Layout:
    """Return the layout of images that are only scored: labelled if names tell both normal and anomalous ones."""
    try:
        detected = detect_layout(options.source)
    except OptionError:
        detected = None  # names that leave labels open are no matter where none are needed
    if detected is not None and any(role.endswith("_anomalous") for role in detected.counts):
        _say(detected)
        return Layout(detected.layout, detected.source, detected.options)
    console.print("  all images are scored, as images whose labels nobody knows")
    say = command_line("unianom inspect", options.source, ("--model", str(options.model), "--layout", "folder"))
    console.print(f"  to say it otherwise: {say} --layout_options.normal … --layout_options.abnormal '[…]'")
    return Layout("folder", options.source, dict(UNLABELLED))


def _say(detected: Detected) -> None:
    console.print(f"  layout: {detected.layout}")
    for line in detected.decisions:
        console.print(f"  {line}")
    for line in detected.warnings:
        console.print(f"  note: {line}")
    console.print(f"  to say it otherwise, change: {detected.command()}")


def ingest_folder(options: InspectOptions, layout: Layout, output: str) -> ShardSet:
    """Return the folder's images as shards, ingested now or before.

    Raises:
        DataError: see `pipelines.data.ingest.ingest`.
    """
    given = IngestOptions(
        layout=layout.name,
        source=layout.source,
        output=output,
        layout_options=layout.options,
        max_reject_fraction=options.max_reject_fraction,
        overwrite=options.overwrite,
        limits=options.limits,
        runtime=options.runtime,
    )
    result = ingest(given)
    print_summary(result)
    return result.shards
