"""Confidence intervals of metrics, by resampling images."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.evaluation.labelled_images import LabelledImages
from pipelines.evaluation.metric_tables import UNION, scope_key
from pipelines.evaluation.options import BootstrapOptions
from pipelines.evaluation.pixel_counts import PixelCounts
from unianom.data.schema import ANOMALOUS
from unianom.metrics.bootstrap import (
    chunks,
    draw_resamples,
    histogram_aupro,
    histogram_auroc_ap,
    image_resamples,
    interval,
)


class Resampling:
    """Confidence intervals of one kind of score; both kinds are resampled by the same draws.

    Args:
        images: all of them.
        counted: pixels; pixel metrics get intervals where it has histograms.
        kind: which scores.
        aupro_limit: see `unianom.metrics.region.aupro`; other variants than the exact one get no interval.
        options: how often, and the seed.
    """

    def __init__(
        self, images: LabelledImages, counted: PixelCounts, kind: str, aupro_limit: float, options: BootstrapOptions
    ) -> None:
        self._images, self._counted, self._scores = images, counted, images.scores[kind]
        self._limit, self._options = aupro_limit, options
        self._aupro = "aupro" if aupro_limit == 0.3 else f"aupro_{aupro_limit:g}"

    def intervals(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the lowest and highest value by metric: of the mean, of the union and of each category.

        Histograms tie what lies in one bin. That shifts a metric a little, in all resamples alike; so their distances
        from the histograms' own value are laid around the value in the tables.
        """
        scopes = {scope_key(name): groups for name, groups in self._images.categories.items()}
        values = self._values({**scopes, UNION: self._images.everything})
        rows = {row["category"]: row for row in metrics["categories"]}
        categories = {name: self._around(values[scope_key(name)], row) for name, row in rows.items()}
        mean = {
            key: _mean_of_defined([values[scope_key(name)][key] for name in rows if _has(rows[name], key)])
            for key in values[UNION]
            if any(_has(row, key) for row in rows.values())
        }
        return {
            "mean": self._around(mean, metrics["mean"]),
            UNION: self._around(values[UNION], metrics["union"]),
            "categories": categories,
        }

    def _around(self, values: Mapping[str, np.ndarray], row: Mapping[str, Any]) -> dict[str, list[float] | None]:
        """Return the interval of each metric that the row has; the first of the values is of the images as they are."""
        intervals = {}
        for key, resampled in values.items():
            if _has(row, key):
                moved = np.clip(resampled[1:] - resampled[0] + row[key], 0, 1)
                intervals[key] = interval(moved, self._options.confidence)
        return intervals

    def _values(self, scopes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, np.ndarray]]:
        """Return, by scope and metric, the value of the images as they are, then of each resample."""
        chunked: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in scopes}
        names = ["/".join(group) for group in self._images.groups]
        rngs = [np.random.default_rng([self._options.seed, zlib.crc32(name.encode())]) for name in names]
        members = [np.flatnonzero(self._images.group == number) for number in range(len(names))]
        for rows in chunks(self._options.resamples, len(self._scores)):
            drawn = [
                draw_resamples(self._images.labels[images], len(rows), rng)
                for images, rng in zip(members, rngs, strict=True)
            ]
            if rows[0] == 0:
                drawn = [np.concatenate([np.ones((1, d.shape[1]), np.int32), d]) for d in drawn]
            pixels = [self._pixels(number, members[number], drawn[number]) for number in range(len(names))]
            for name, groups in scopes.items():
                for key, values in self._scope_values(groups, drawn, pixels).items():
                    chunked[name].setdefault(key, []).append(values)
        return {name: {key: np.concatenate(v) for key, v in metrics.items()} for name, metrics in chunked.items()}

    def _pixels(self, group: int, members: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return histograms of the resampled maps of a group, see `Histograms.resample`; None if it has none."""
        histograms = self._counted.histograms.get(self._images.groups[group])
        if histograms is None:
            return None
        place = {self._images.sample_ids[image]: column for column, image in enumerate(members.tolist())}
        return histograms.resample(drawn[:, [place[sample_id] for sample_id in histograms.sample_ids]])

    def _scope_values(
        self,
        groups: Sequence[int],
        drawn: Sequence[np.ndarray],
        pixels: Sequence[tuple[np.ndarray, np.ndarray] | None],
    ) -> dict[str, np.ndarray]:
        """Return the metrics of some groups together, (r,) each."""
        images = self._images.within(groups)
        together = np.concatenate([drawn[group] for group in groups], axis=1)
        labels = self._images.labels[images]
        metrics: dict[str, np.ndarray] = {}
        if 0 < np.count_nonzero(labels == ANOMALOUS) < len(labels):
            metrics |= image_resamples(self._scores[images], labels, together)
        parts = [part for part in (pixels[group] for group in groups) if part is not None]
        if parts:
            bins = np.unique(np.concatenate([held for held, _ in parts]))
            sums = np.zeros((3, len(together), len(bins)))
            for held, counts in parts:
                sums[:, :, np.searchsorted(bins, held)] += counts
            auroc, ap = histogram_auroc_ap(sums[0], sums[1])
            metrics |= {"pixel_auroc": auroc, "pixel_ap": ap}
            metrics[self._aupro] = histogram_aupro(sums[0], sums[2], self._limit)
        return metrics


def _has(row: Mapping[str, Any], key: str) -> bool:
    """Return whether a metric is defined in a row."""
    return row.get(key) is not None


def _mean_of_defined(values: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean over categories, (r,), of those where a resample is defined."""
    stacked = np.stack(values)
    defined = np.isfinite(stacked)
    total = np.where(defined, stacked, 0).sum(axis=0)
    return np.divide(total, defined.sum(axis=0), out=np.full(total.shape, np.nan), where=defined.any(axis=0))
