"""Figures of a campaign and its section of a report, written beside its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.tuning.agreement import Agreement
from pipelines.tuning.figures.agreement import agreement_figure
from pipelines.tuning.figures.history import history_figure
from pipelines.tuning.figures.importance import importance_figure
from pipelines.tuning.figures.parallel import parallel_coordinates
from pipelines.tuning.figures.pareto import pareto_figure
from pipelines.tuning.figures.slices import slices_figure
from pipelines.tuning.summary import section
from unianom import files, visual


def write_report(
    folder: str,
    content: Mapping[str, Any],
    settings: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
) -> None:
    """Draw a campaign and write its section.

    Args:
        folder: of the campaign.
        content: of its JSON file.
        settings: all that were measured.
        records: of all trials, with the values that they had at their end.
    """
    figures = {
        "parallel.png": ("Settings: options from left to right", parallel_coordinates(settings, content["best"])),
        "importance.png": ("Importance of the options", importance_figure(content["importance"])),
        "slices.png": ("Objective against each option", slices_figure(settings)),
        "trials.png": ("Trials", history_figure(records)),
        "pareto.png": ("Accuracy, latency and memory", pareto_figure(records, content["front"])),
    }
    for name, (_, figure) in figures.items():
        files.write_bytes(files.join(folder, name), visual.png(figure))
    title = f"Campaign: {content['method']} on {', '.join(content['categories'])}"
    part = section(title, content, {name: words for name, (words, _) in figures.items()})
    files.write_json(files.join(folder, "section.json"), part)


def write_agreement(folder: str, agreement: Agreement) -> bytes:
    """Draw how validation and test images agree; write and return the PNG."""
    figure = agreement_figure(
        agreement.validation, agreement.test, agreement.default, agreement.chosen, agreement.names
    )
    picture = visual.png(figure)
    files.write_bytes(files.join(folder, "proxy.png"), picture)
    return picture
