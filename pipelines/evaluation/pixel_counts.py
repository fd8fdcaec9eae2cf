"""Anomaly maps and masks → pixel accumulators of every group of images, each map decoded once.

    score parts ─▶ workers: decode, split by mask, count ─▶ one file a part ─▶ read, calibrated or not, by the driver

A group is a data set and a category. Parts are read in their order, so nothing depends on who counted which.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.evaluation.labelled_images import CALIBRATED, RAW, Group, LabelledImages
from pipelines.evaluation.map_histograms import Histograms, add_histograms, histogram_arrays, histogram_of
from pipelines.evaluation.options import EvaluateOptions
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.progress import Progress
from pipelines.runtime.tasks import run_tasks
from unianom import files
from unianom.configs.metrics import AuproVariant
from unianom.data.image import InputPolicy, decode_map, decode_mask, prepare_mask
from unianom.data.row_ranges import RowRange
from unianom.data.shards import ScoreSet, ShardSet
from unianom.errors import DataError, OptionError
from unianom.metrics.pixel import PixelAccumulator
from unianom.metrics.region import SplitMap, split_maps
from unianom.metrics.streaming import BinnedPixelAccumulator
from unianom.options import from_plain

Accumulator = PixelAccumulator | BinnedPixelAccumulator

LEFT_OUT = "left_out"
"""Array with the names of the images that are left out."""

RESAMPLED_MAPS = 20_000
"""Above so many maps, intervals of pixel metrics would need their histograms to be kept in gigabytes."""


@dataclass(frozen=True)
class PixelPlan:
    """Plan of counting the pixels of a score set.

    Attributes:
        binned: in bins, not exactly.
        calibrated: also as the calibrator has them.
        resampled: whether every map's histogram is kept for confidence intervals.
        aupro_limit, aupro_variant: see `unianom.metrics.region.aupro`.
    """

    binned: bool
    calibrated: bool
    resampled: bool
    aupro_limit: float
    aupro_variant: AuproVariant

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of score that are counted."""
        return (RAW, CALIBRATED) if self.calibrated else (RAW,)

    def accumulator(self) -> Accumulator:
        """Return an empty accumulator."""
        if self.binned:
            return BinnedPixelAccumulator(self.aupro_limit)
        return PixelAccumulator(self.aupro_limit, self.aupro_variant)


def plan_pixels(options: EvaluateOptions, scores: ScoreSet, images: LabelledImages) -> PixelPlan:
    """Decide how pixels are counted.

    Raises:
        OptionError: a published approximation of AUPRO, of more pixels than are counted exactly.
    """
    sides = [from_plain(InputPolicy, model["config"]["input"]).side for model in scores.manifest["models"]]
    pixels = len(images.labels) * max(sides) ** 2
    binned = pixels > options.exact_pixels
    if binned and options.aupro_variant != "exact" and scores.maps == "all":
        raise OptionError(
            f"aupro_variant={options.aupro_variant} needs every pixel, and {pixels:,} are more than --exact_pixels "
            f"{options.exact_pixels:,}; raise that if there is the memory, or take the exact variant"
        )
    return PixelPlan(
        binned=binned,
        calibrated=CALIBRATED in images.scores,
        resampled=options.bootstrap.resamples > 0 and len(images.labels) <= RESAMPLED_MAPS,
        aupro_limit=options.aupro_limit,
        aupro_variant=options.aupro_variant,
    )


@dataclass(frozen=True, eq=False)
class PixelCounts:
    """Pixels of one kind of score, by group.

    Attributes:
        accumulators: for the metrics.
        histograms: for their intervals; empty where none are wanted.
        left_out: names of the anomalous images whose mask is empty at the model's resolution.
    """

    accumulators: Mapping[Group, Accumulator]
    histograms: Mapping[Group, Histograms]
    left_out: list[str] = field(default_factory=list)


def count_pixels(scores: ScoreSet, shards: ShardSet, plan: PixelPlan, folder: str, runtime: RuntimeOptions) -> None:
    """Write a file for each score part into a folder; files that are there already are kept."""
    present = set(files.list_names(folder))
    entries = scores.manifest["files"]
    tasks = [{"part": entry["name"]} for entry in entries if scored_range(entry, shards) is not None]
    left = [task for task in tasks if part_file(task["part"]) not in present]
    if not left:
        return
    rows = {entry["name"]: entry["rows"] for entry in entries}
    images = sum(rows[task["part"]] for task in left)
    progress = Progress("read maps", images)
    arguments = {"scores": scores, "shards": shards, "plan": plan, "folder": folder}
    for result in run_tasks(MapReader, arguments, left, runtime, images):
        progress.advance(result["rows"])
    progress.close()


def scored_range(entry: Mapping[str, Any], shards: ShardSet) -> RowRange | None:
    """Return the rows of the shards that a score part is of, by its entry in the manifest; None for that of rejected
    samples, which have no map."""
    if "of" in entry:
        part, first, rows = entry["of"]
        return RowRange(part, first, rows, opens=True)
    # of an earlier version: of a whole part, which its name tells
    name = "-".join(entry["name"].split("-")[:2]) + ".parquet"
    whole = next((part for part in shards.manifest["files"] if part["name"] == name), None)
    return None if whole is None else RowRange(name, 0, whole["rows"], opens=True)


def part_file(score_part: str) -> str:
    """Return the name of the file with the pixels of a score part."""
    return score_part.removesuffix(".parquet") + ".npz"


class MapReader:
    """Reads the maps and masks of one score part. A `PartTask`.

    Args:
        scores, shards: what was scored, and its labels and masks.
        plan: how pixels are counted.
        folder: where the files go.
    """

    def __init__(self, scores: ScoreSet, shards: ShardSet, plan: PixelPlan, folder: str) -> None:
        self._scores, self._shards, self._plan, self._folder = scores, shards, plan, folder
        models = scores.manifest["models"]
        self._entries = {entry["name"]: entry for entry in scores.manifest["files"]}
        self._policies = {m["digest"]: from_plain(InputPolicy, m["config"]["input"]) for m in models}

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write one part's file."""
        part = task["part"]
        arrays = self._binned(part) if self._plan.binned else self._exact(part)
        with files.open_atomic(files.join(self._folder, part_file(part))) as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type]
        return {"rows": self._entries[part]["rows"]}

    def _exact(self, part: str) -> dict[str, np.ndarray]:
        """Return every pixel, and how each map is calibrated."""
        rows, maps = [], []
        left_out: list[str] = []
        for row, scores, mask in self._maps(part, left_out):
            rows.append(row)
            maps += split_maps([scores], [mask])
        arrays = _identities(rows) | {LEFT_OUT: np.array(left_out, np.str_)}
        for kind in self._plan.kinds:
            arrays |= self._histograms(rows, maps, kind)
        arrays["calibration"] = np.array([_calibration(row) for row in rows], np.float32).reshape(-1, 2)
        arrays["sizes"] = np.array([[len(m.normal), len(m.anomalous), len(m.region_sizes)] for m in maps], np.int64)
        for name in ("normal", "anomalous", "region", "region_sizes"):
            arrays[name] = np.concatenate([getattr(m, name) for m in maps]) if maps else np.empty(0)
        return arrays

    def _binned(self, part: str) -> dict[str, np.ndarray]:
        """Return an accumulator of each group, and each kind of score."""
        accumulators: dict[tuple[Group, str], BinnedPixelAccumulator] = {}
        rows = []
        histograms: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {kind: [] for kind in self._plan.kinds}
        left_out: list[str] = []
        for row, scores, mask in self._maps(part, left_out):
            rows.append(row)
            (split,) = split_maps([scores], [mask])
            for kind in self._plan.kinds:
                of_kind = split if kind == RAW else calibrated(split, *_calibration(row))
                group = (row["dataset"], row["category"])
                accumulators.setdefault((group, kind), BinnedPixelAccumulator(self._plan.aupro_limit)).add(of_kind)
                if self._plan.resampled:
                    histograms[kind].append(histogram_of(of_kind))
        arrays = _identities(rows) | {LEFT_OUT: np.array(left_out, np.str_)}
        if self._plan.resampled:
            for kind, of_maps in histograms.items():
                arrays |= histogram_arrays(of_maps, kind)
        groups = sorted({group for group, _ in accumulators})
        arrays["groups"] = np.array(groups, np.str_).reshape(-1, 2)
        for (group, kind), accumulator in accumulators.items():
            prefix = f"{groups.index(group)}/{kind}/"
            arrays |= {prefix + name: array for name, array in accumulator.to_arrays().items()}
        return arrays

    def _histograms(self, rows: list[dict[str, Any]], maps: list[SplitMap], kind: str) -> dict[str, np.ndarray]:
        if not self._plan.resampled:
            return {}
        if kind == CALIBRATED:
            maps = [calibrated(split, *_calibration(row)) for row, split in zip(rows, maps, strict=True)]
        return histogram_arrays([histogram_of(split) for split in maps], kind)

    def _maps(self, part: str, left_out: list[str]) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
        """Yield row, map and mask of the images that count.

        Anomalous images whose mask is unknown take no part; nor do those whose mask is empty at the model's resolution,
        as where a crop leaves the defect out: their names are added to `left_out`.
        """
        masks: dict[str, bytes | None] = {}
        within = scored_range(self._entries[part], self._shards)
        for batch in [] if within is None else self._shards.read_range(within, None, ["sample_id", "mask"]):
            masks.update(zip(batch["sample_id"].to_pylist(), batch["mask"].to_pylist(), strict=True))
        columns = ["sample_id", "dataset", "category", "label", "status", "model", "anomaly_map", "map_offset"]
        columns += ["map_scale", "calibration_offset", "calibration_scale"]
        for batch in self._scores.read(part, None, columns):
            for row in batch.to_pylist():
                mask = masks[row["sample_id"]]
                if row["status"] != "ok" or row["label"] is None or (row["label"] == 1 and mask is None):
                    continue
                marked = None if mask is None else prepare_mask(decode_mask(mask), self._policies[row["model"]])
                if row["label"] == 1 and marked is not None and not marked.any():
                    left_out.append(row["sample_id"])
                    continue
                anomaly_map = decode_map(row.pop("anomaly_map"), row["map_offset"], row["map_scale"])
                yield row, anomaly_map, np.zeros(anomaly_map.shape, bool) if marked is None else marked


def _calibration(row: dict[str, Any]) -> tuple[float, float]:
    offset, scale = row["calibration_offset"], row["calibration_scale"]
    return (0.0, 1.0) if offset is None else (offset, scale)


def calibrated(split: SplitMap, offset: float, scale: float) -> SplitMap:
    """Return the same map, calibrated: (score − offset) / scale."""

    def scaled(scores: np.ndarray) -> np.ndarray:
        return (scores - np.float32(offset)) / np.float32(scale)

    return SplitMap(scaled(split.normal), scaled(split.anomalous), split.region, split.region_sizes)


def _identities(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = ("sample_id", "dataset", "category")
    return {"identities": np.array([[row[name] for name in names] for row in rows], np.str_).reshape(-1, 3)}


def read_pixel_counts(scores: ScoreSet, shards: ShardSet, plan: PixelPlan, folder: str, kind: str) -> PixelCounts:
    """Read what `count_pixels` wrote, of one kind of score.

    Raises:
        DataError: a file is missing or damaged.
    """
    exact: dict[Group, PixelAccumulator] = {}
    binned: dict[Group, BinnedPixelAccumulator] = {}
    histograms: dict[Group, Histograms] = {}
    left_out: list[str] = []
    for entry in scores.manifest["files"]:
        if scored_range(entry, shards) is None:
            continue
        path = files.join(folder, part_file(entry["name"]))
        try:
            with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
                left_out.extend(arrays[LEFT_OUT].tolist())
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"cannot read {path}: {error}; remove {folder} and run the same command again") from error
        identities = [
            (sample_id, (dataset, category)) for sample_id, dataset, category in arrays["identities"].tolist()
        ]
        if plan.resampled:
            add_histograms(histograms, arrays, kind, identities)
        if plan.binned:
            _add_binned(binned, arrays, plan, kind)
        else:
            _add_exact(exact, arrays, plan, kind, [group for _, group in identities])
    return PixelCounts(binned if plan.binned else exact, histograms, left_out)


def _add_binned(
    accumulators: dict[Group, BinnedPixelAccumulator], arrays: dict[str, np.ndarray], plan: PixelPlan, kind: str
) -> None:
    for number, group in enumerate(map(tuple, arrays["groups"].tolist())):
        prefix = f"{number}/{kind}/"
        of_group = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        accumulator = accumulators.setdefault(group, BinnedPixelAccumulator(plan.aupro_limit))
        accumulator.merge(BinnedPixelAccumulator.from_arrays(of_group))


def _add_exact(
    accumulators: dict[Group, PixelAccumulator],
    arrays: dict[str, np.ndarray],
    plan: PixelPlan,
    kind: str,
    groups: list[Group],
) -> None:
    sizes, ends = arrays["sizes"], np.cumsum(arrays["sizes"], axis=0)
    for number, group in enumerate(groups):
        normal, anomalous, regions = (
            slice(end - size, end) for end, size in zip(ends[number].tolist(), sizes[number].tolist(), strict=True)
        )
        split = SplitMap(
            arrays["normal"][normal],
            arrays["anomalous"][anomalous],
            arrays["region"][anomalous],
            arrays["region_sizes"][regions],
        )
        if kind == CALIBRATED:
            split = calibrated(split, *arrays["calibration"][number].tolist())
        accumulators.setdefault(group, PixelAccumulator(plan.aupro_limit, plan.aupro_variant)).add(split)
