"""Anomaly maps and masks → pixel accumulators of every group of images, each map decoded once.

    score parts ─▶ workers: decode, split by mask, count ─▶ one file a part ─▶ read, calibrated or not, by the driver

A group is a data set and a category. Parts are read in their order, so nothing depends on who counted which.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.runtime.actors import connect, run_tasks
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.progress import Progress
from unianom import files
from unianom.configs.metrics import AuproVariant
from unianom.data.image import InputPolicy, decode_map, decode_mask, prepare_mask
from unianom.data.shards import ScoreSet, ShardSet
from unianom.errors import DataError
from unianom.metrics.bootstrap import chunks
from unianom.metrics.pixel import PixelAccumulator
from unianom.metrics.region import SplitMap, split_maps
from unianom.metrics.streaming import (
    ANOMALOUS,
    NORMAL_BESIDE,
    NORMAL_ELSEWHERE,
    WEIGHT,
    BinnedPixelAccumulator,
    map_table,
)
from unianom.options import from_plain

Group = tuple[str, str]
"""Data set and category."""

Accumulator = PixelAccumulator | BinnedPixelAccumulator

RAW, CALIBRATED = "raw", "calibrated"
LEFT_OUT = "left_out"

RESAMPLING_BITS = 16
"""Bits of a score that name its bin where images are resampled: 128 bins for every doubling of the score."""


@dataclass(frozen=True)
class PixelPlan:
    """How the pixels of a score set are counted.

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
        """Which scores are counted."""
        return (RAW, CALIBRATED) if self.calibrated else (RAW,)

    def accumulator(self) -> Accumulator:
        """An empty one."""
        if self.binned:
            return BinnedPixelAccumulator(self.aupro_limit)
        return PixelAccumulator(self.aupro_limit, self.aupro_variant)


@dataclass(frozen=True, eq=False)
class Histograms:
    """Histograms of the maps of a group, for resampling.

    Attributes:
        sample_ids: of the maps, in their order.
        lengths: how many bins each map has.
        bins: (k,) of all maps one after the other.
        counts: (k, 3) normal pixels, anomalous pixels, weight of these.
    """

    sample_ids: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    bins: list[np.ndarray] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)

    def resample(self, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Histograms of resamples of the maps.

        Args:
            drawn: (resamples, n) how often each map is in each.

        Returns:
            The bins that hold a pixel, (k,) ascending, and the three counts in each of them, (3, resamples, k)
            float64. All are sums of whole numbers below 2**53 for the pixels, so no order of adding shows.
        """
        held, place = np.unique(np.concatenate(self.bins), return_inverse=True)
        counts = np.concatenate(self.counts).astype(np.float64)
        counts[:, 2] /= 1 << 16  # keeps sums of weights below 2**53 as well
        counts[:, 2] = np.rint(counts[:, 2])
        ends = np.cumsum(self.lengths)
        sums = np.zeros((3, len(drawn), len(held)))
        for maps in chunks(len(self.lengths), len(held)):
            first = int(ends[maps[0]]) - self.lengths[maps[0]]
            rows = slice(first, int(ends[maps[-1]]))
            own = np.repeat(np.arange(len(maps)), self.lengths[maps[0] : maps[-1] + 1])
            weights = drawn[:, maps[0] : maps[-1] + 1].astype(np.float64)
            for column in range(3):
                dense = np.zeros((len(maps), len(held)))
                dense[own, place[rows]] = counts[rows, column]
                sums[column] += weights @ dense
        return held, sums


@dataclass(frozen=True, eq=False)
class Counted:
    """Pixels of one kind of score, by group.

    Attributes:
        accumulators: for the metrics.
        histograms: for their intervals; empty where none are wanted.
        left_out: names of the anomalous images whose mask is empty at the model's resolution.
    """

    accumulators: dict[Group, Accumulator]
    histograms: dict[Group, Histograms]
    left_out: list[str] = field(default_factory=list)


def count_pixels(scores: ScoreSet, shards: ShardSet, plan: PixelPlan, folder: str, runtime: RuntimeOptions) -> None:
    """Write a file for each score part into a folder; files that are there already are kept."""
    present = set(files.list_names(folder))
    tasks = [{"part": part} for part in scores.parts if shard_part(part) in shards.parts]
    left = [task for task in tasks if part_file(task["part"]) not in present]
    if not left:
        return
    progress = Progress("read maps", sum(_rows(scores, task["part"]) for task in left))
    connect(runtime)
    for result in run_tasks(
        MapReader, {"scores": scores, "shards": shards, "plan": plan, "folder": folder}, left, runtime
    ):
        progress.advance(result["rows"])
    progress.close()


def _rows(scores: ScoreSet, part: str) -> int:
    return next(entry["rows"] for entry in scores.manifest["files"] if entry["name"] == part)


def shard_part(score_part: str) -> str:
    """The shard part that a score part is of; of rejected samples, which have no map, a name that does not exist."""
    return "-".join(score_part.split("-")[:2]) + ".parquet"


def part_file(score_part: str) -> str:
    """Name of the file with the pixels of a score part."""
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
        self._policies = {m["digest"]: from_plain(InputPolicy, m["config"]["input"]) for m in models}

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write one part's file."""
        part = task["part"]
        arrays = self._binned(part) if self._plan.binned else self._exact(part)
        with files.open_atomic(files.join(self._folder, part_file(part))) as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type]
        return {"rows": _rows(self._scores, part)}

    def _exact(self, part: str) -> dict[str, np.ndarray]:
        """Every pixel, and how each map is calibrated."""
        rows, maps = [], []
        left_out: list[str] = []
        for row, scores, mask in self._maps(part, left_out):
            rows.append(row)
            maps += split_maps([scores], [mask])
        arrays = _identities(rows) | {LEFT_OUT: np.array(left_out, np.str_)}
        for kind in self._plan.kinds:
            arrays |= self._tables(rows, maps, kind)
        arrays["calibration"] = np.array([_calibration(row) for row in rows], np.float32).reshape(-1, 2)
        arrays["sizes"] = np.array([[len(m.normal), len(m.anomalous), len(m.region_sizes)] for m in maps], np.int64)
        for name in ("normal", "anomalous", "region", "region_sizes"):
            arrays[name] = np.concatenate([getattr(m, name) for m in maps]) if maps else np.empty(0)
        return arrays

    def _binned(self, part: str) -> dict[str, np.ndarray]:
        """An accumulator of each group, and each kind of score."""
        found: dict[tuple[Group, str], BinnedPixelAccumulator] = {}
        rows = []
        tables: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {kind: [] for kind in self._plan.kinds}
        left_out: list[str] = []
        for row, scores, mask in self._maps(part, left_out):
            rows.append(row)
            (split,) = split_maps([scores], [mask])
            for kind in self._plan.kinds:
                own = split if kind == RAW else calibrated(split, *_calibration(row))
                group = (row["dataset"], row["category"])
                found.setdefault((group, kind), BinnedPixelAccumulator(self._plan.aupro_limit)).add(own)
                if self._plan.resampled:
                    tables[kind].append(map_table(own, RESAMPLING_BITS))
        arrays = _identities(rows) | {LEFT_OUT: np.array(left_out, np.str_)}
        if self._plan.resampled:
            for kind, own_tables in tables.items():
                arrays |= _packed(own_tables, kind)
        groups = sorted({group for group, _ in found})
        arrays["groups"] = np.array(groups, np.str_).reshape(-1, 2)
        for (group, kind), accumulator in found.items():
            prefix = f"{groups.index(group)}/{kind}/"
            arrays |= {prefix + name: array for name, array in accumulator.to_arrays().items()}
        return arrays

    def _tables(self, rows: list[dict[str, Any]], maps: list[SplitMap], kind: str) -> dict[str, np.ndarray]:
        if not self._plan.resampled:
            return {}
        if kind == CALIBRATED:
            maps = [calibrated(split, *_calibration(row)) for row, split in zip(rows, maps, strict=True)]
        return _packed([map_table(split, RESAMPLING_BITS) for split in maps], kind)

    def _maps(self, part: str, left_out: list[str]) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
        """Row, map and mask. Anomalous images whose mask is unknown take no part; nor do those whose mask is empty at
        the model's resolution, as where a crop leaves the defect out: their names are added to `left_out`."""
        masks: dict[str, bytes | None] = {}
        for batch in self._shards.read(shard_part(part), None, ["sample_id", "mask"]):
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
    """The same map, calibrated: (score − offset) / scale."""

    def moved(scores: np.ndarray) -> np.ndarray:
        return (scores - np.float32(offset)) / np.float32(scale)

    return SplitMap(moved(split.normal), moved(split.anomalous), split.region, split.region_sizes)


def _identities(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = ("sample_id", "dataset", "category")
    return {"identities": np.array([[row[name] for name in names] for row in rows], np.str_).reshape(-1, 3)}


def _packed(tables: list[tuple[np.ndarray, np.ndarray]], kind: str) -> dict[str, np.ndarray]:
    """Histograms of maps one after the other."""
    bins = np.concatenate([bins for bins, _ in tables]) if tables else np.empty(0)
    counts = np.concatenate([counts for _, counts in tables]) if tables else np.empty((0, 4), np.int64)
    return {
        f"{kind}/lengths": np.array([len(bins) for bins, _ in tables], np.int64),
        f"{kind}/bins": bins.astype(np.uint32),
        f"{kind}/pixels": np.stack(
            [counts[:, NORMAL_BESIDE] + counts[:, NORMAL_ELSEWHERE], counts[:, ANOMALOUS]], axis=1
        ).astype(np.uint32),
        f"{kind}/weight": counts[:, WEIGHT],
    }


def read_counted(scores: ScoreSet, shards: ShardSet, plan: PixelPlan, folder: str, kind: str) -> Counted:
    """What `count_pixels` wrote, of one kind of score.

    Raises:
        DataError: a file is missing or damaged.
    """
    counted = Counted({}, {})
    for part in scores.parts:
        if shard_part(part) not in shards.parts:
            continue
        path = files.join(folder, part_file(part))
        try:
            with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
                counted.left_out.extend(arrays[LEFT_OUT].tolist())
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"cannot read {path}: {error}; remove {folder} and run the same command again") from error
        _add_part(counted, arrays, plan, kind)
    return counted


def _add_part(counted: Counted, arrays: dict[str, np.ndarray], plan: PixelPlan, kind: str) -> None:
    identities = [(i[0], (i[1], i[2])) for i in arrays["identities"].tolist()]
    if plan.resampled:
        _add_histograms(counted, arrays, kind, identities)
    if plan.binned:
        for number, group in enumerate(map(tuple, arrays["groups"].tolist())):
            prefix = f"{number}/{kind}/"
            own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            into = counted.accumulators.setdefault(group, plan.accumulator())
            assert isinstance(into, BinnedPixelAccumulator)
            into.merge(BinnedPixelAccumulator.from_arrays(own))
        return
    sizes, ends = arrays["sizes"], np.cumsum(arrays["sizes"], axis=0)
    for number, (_, group) in enumerate(identities):
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
        counted.accumulators.setdefault(group, plan.accumulator()).add(split)


def _add_histograms(
    counted: Counted, arrays: dict[str, np.ndarray], kind: str, identities: list[tuple[str, Group]]
) -> None:
    lengths = arrays[f"{kind}/lengths"]
    counts = np.column_stack([arrays[f"{kind}/pixels"].astype(np.int64), arrays[f"{kind}/weight"]])
    ends = np.cumsum(lengths)
    for (sample_id, group), length, end in zip(identities, lengths.tolist(), ends.tolist(), strict=True):
        own = counted.histograms.setdefault(group, Histograms())
        own.sample_ids.append(sample_id)
        own.lengths.append(length)
        own.bins.append(arrays[f"{kind}/bins"][end - length : end])
        own.counts.append(counts[end - length : end])
