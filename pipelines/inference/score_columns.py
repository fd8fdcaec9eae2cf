"""The columns of a score part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from unianom.data.schema import SCORE_SCHEMA
from unianom.errors import DataError, ImageError

IDENTITY = ("sample_id", "dataset", "category", "split", "label", "defect", "uri", "sha256", "height", "width")
"""Columns of a sample that its score has, too."""

PackedMap = tuple[bytes, float, float]
"""What `encode_map` makes of a map: PNG, offset and scale."""


@dataclass(frozen=True, eq=False)
class ScoreColumns:
    """What a model says of K images.

    Attributes:
        score: K float32.
        decision: K objects: "pass", "review", "fail" or None.
        calibration: offset, scale and calibrated score, K float32 each; None where the model has no calibrator.
    """

    score: np.ndarray
    decision: np.ndarray
    calibration: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


def check_finite(score: np.ndarray, calibrated: np.ndarray | None, sample_ids: Sequence[str]) -> None:
    """Raise DataError if a score is NaN or infinite; names the first such image."""
    broken = ~np.isfinite(score)
    if calibrated is not None:
        broken |= ~np.isfinite(calibrated)
    if broken.any():
        row = int(broken.argmax())
        common = None if calibrated is None else float(calibrated[row])
        raise DataError(
            f"{sample_ids[row]} got the score {float(score[row])} (calibrated: {common}); check the model's weights "
            f"and precision"
        )


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """What became of B rows that one model has scored.

    Attributes:
        rows: the `IDENTITY` columns.
        model: digest of the model.
        places: K numbers of the rows that are scored, ascending.
        scored: what the model says of them; None where K is 0.
        maps: their maps that are kept, by the number of their row, which may still be being encoded.
        map_pixels: pixels of all these maps.
        errors: why the other rows have no score, by their number.
    """

    rows: pa.Table
    model: str
    places: np.ndarray
    scored: ScoreColumns | None
    maps: Mapping[int, Future[PackedMap]]
    map_pixels: int
    errors: Mapping[int, ImageError]


def score_table(batches: Sequence[ScoredBatch]) -> pa.Table:
    """Return the rows of SCORE_SCHEMA of some batches; waits for their maps."""
    rows = pa.concat_tables([batch.rows for batch in batches])
    count = len(rows)
    floats = {
        name: (np.zeros(count, np.float32), np.ones(count, bool)) for name in _FLOATS
    }  # values, and where none is
    objects = {name: np.full(count, None, object) for name in ("decision", "anomaly_map", "error")}
    statuses, models = np.full(count, "ok", object), np.full(count, "", object)

    def fill(name: str, places: Any, values: Any) -> None:
        column, missing = floats[name]
        column[places], missing[places] = values, False

    start = 0
    for batch in batches:
        models[start : start + len(batch.rows)] = batch.model
        places = batch.places + start
        if batch.scored is not None:
            fill("score", places, batch.scored.score)
            objects["decision"][places] = batch.scored.decision
            if batch.scored.calibration is not None:
                for name, values in zip(_CALIBRATION, batch.scored.calibration, strict=True):
                    fill(name, places, values)
        for row, packed in batch.maps.items():
            objects["anomaly_map"][start + row], offset, scale = packed.result()
            fill("map_offset", start + row, offset)
            fill("map_scale", start + row, scale)
        for row, error in batch.errors.items():
            statuses[start + row], objects["error"][start + row] = error.status, str(error)
        start += len(batch.rows)
    columns: dict[str, Any] = {name: rows[name] for name in IDENTITY}
    columns |= {name: pa.array(column, mask=missing) for name, (column, missing) in floats.items()}
    for name, values in {**objects, "status": statuses, "model": models}.items():
        columns[name] = pa.array(values, SCORE_SCHEMA.field(name).type)
    return pa.Table.from_arrays([columns[name] for name in SCORE_SCHEMA.names], schema=SCORE_SCHEMA)


_CALIBRATION = ("calibration_offset", "calibration_scale", "calibrated_score")

_FLOATS = ("score", *_CALIBRATION, "map_offset", "map_scale")
