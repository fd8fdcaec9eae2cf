"""The columns of a score part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def score_table(
    rows: pa.Table,
    model: str,
    places: np.ndarray,
    scored: ScoreColumns | None,
    maps: Mapping[int, PackedMap],
    errors: Mapping[int, ImageError],
) -> pa.Table:
    """Return rows of SCORE_SCHEMA.

    Args:
        rows: B rows with the `IDENTITY` columns.
        model: digest of the model.
        places: K numbers of the rows that are scored.
        scored: what the model says of them; None where K is 0.
        maps: their maps that are kept, by the number of their row.
        errors: why the other rows have no score, by their number.
    """
    count = len(rows)
    packed = [maps.get(row, (None, None, None)) for row in range(count)]
    statuses = ["ok"] * count
    for row, error in errors.items():
        statuses[row] = error.status
    values: dict[str, Any] = {
        "anomaly_map": [png for png, _, _ in packed],
        "map_offset": [offset for _, offset, _ in packed],
        "map_scale": [scale for _, _, scale in packed],
        "status": statuses,
        "error": [str(errors[row]) if row in errors else None for row in range(count)],
        "model": [model] * count,
    }
    if scored is not None:
        values["score"] = _spread(scored.score, places, count)
        decisions = np.full(count, None, object)
        decisions[places] = scored.decision
        values["decision"] = decisions.tolist()
        if scored.calibration is not None:
            names = ("calibration_offset", "calibration_scale", "calibrated_score")
            values |= {name: _spread(part, places, count) for name, part in zip(names, scored.calibration, strict=True)}
    columns = []
    for field in SCORE_SCHEMA:
        if field.name in IDENTITY:
            columns.append(rows[field.name])
        else:
            content = values.get(field.name)
            columns.append(pa.nulls(count, field.type) if content is None else pa.array(content, field.type))
    return pa.Table.from_arrays(columns, schema=SCORE_SCHEMA)


def _spread(values: np.ndarray, places: np.ndarray, count: int) -> pa.Array:
    """Return values in their places of a column, null elsewhere."""
    column, missing = np.zeros(count, np.float32), np.ones(count, bool)
    column[places], missing[places] = values, False
    return pa.array(column, mask=missing)
