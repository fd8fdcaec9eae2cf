"""The choice of a report's pictures, from hand-made scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.reporting.gallery import Judged, choose, choose_unlabelled, judged, margins
from pipelines.reporting.inputs import ReportInput
from unianom.data.shards import ScoreSet


def scored(rows: list[dict[str, Any]], models: list[dict[str, Any]], name: str = "m") -> ReportInput:
    """An input of rows of sample_id, model, label, score and, where they matter, category and decision."""
    whole = [{"category": "c", "defect": None, "decision": None, **row} for row in rows]
    columns = {key: [row[key] for row in whole] for key in whole[0]}
    table = pa.table(
        {
            **{key: pa.array(columns[key], pa.string()) for key in ("sample_id", "category", "defect", "decision")},
            "model": pa.array(columns["model"]).dictionary_encode(),
            "label": pa.array(columns["label"], pa.int8()),
            "score": pa.array(columns["score"], pa.float32()),
        }
    )
    return ReportInput(name, None, "", ScoreSet("", {"models": models}, ""), table)


def _row(sample_id: str, label: int | None, score: float, threshold: float, model: str = "a") -> dict[str, Any]:
    decision = "fail" if score > threshold else "pass"
    return {"sample_id": sample_id, "model": model, "label": label, "score": score, "decision": decision}


def test_margins_are_distances_from_the_threshold_in_deviations_of_normal_scores():
    rows = [
        {"sample_id": str(n), "model": model, "label": label, "score": score, "category": category}
        for n, (model, label, score, category) in enumerate(
            [
                ("a", 0, 1.0, "x"),
                ("a", 0, 3.0, "x"),
                ("a", 1, 9.0, "x"),
                ("a", 1, 9.0, "y"),
                ("b", 0, 10.0, "x"),
                ("b", 0, 30.0, "x"),
                ("b", 1, 90.0, "x"),
                ("c", 1, 4.0, "x"),
            ]
        )
    ]
    models: list[dict[str, Any]] = [
        {"digest": "a", "threshold": {"value": 5.0}, "category_thresholds": {"y": {"value": 7.0}}},
        {"digest": "b", "threshold": None},
        {"digest": "c", "threshold": {"value": 3.0}},
    ]
    # a: deviation 1 around threshold 5, or 7 of category y; b: deviation 10 around the median 20; c: one score
    assert margins(scored(rows, models)).tolist() == [-4, -2, 4, 2, -1, 1, 7, 1]


@pytest.fixture
def two_models() -> Judged:
    """Six images; model a (threshold 10) misses d1 and d2, model b (threshold 100) misses d2 and flags n1; image n3 has
    been scored by one of them only. Deviations of normal scores are 1 and 10."""
    first = {"n1": 4, "n2": 6, "n3": 5, "d1": 8, "d2": 9, "d3": 20}
    second = {"n1": 110, "n2": 90, "d1": 130, "d2": 60, "d3": 140}
    models = [
        scored(
            [_row(i, int(i[0] == "d"), score, limit) for i, score in sorted(scores.items(), reverse=backwards)],
            [{"digest": "a", "threshold": {"value": limit}}],
            name,
        )
        for name, scores, limit, backwards in (("a", first, 10.0, False), ("b", second, 100.0, False))
    ]
    return judged(models)


def test_several_models_are_judged_on_the_images_they_share(two_models: Judged):
    assert two_models.sample_id.tolist() == ["d1", "d2", "d3", "n1", "n2"]
    assert two_models.missed.tolist() == [1, 2, 0, 0, 0]
    assert two_models.false_alarms.tolist() == [0, 0, 0, 1, 0]
    deviation = np.std([4, 5, 6])
    np.testing.assert_allclose(two_models.margin[1], [-1 / deviation, -4], rtol=1e-6)


def test_what_most_models_get_wrong_comes_first(two_models: Judged):
    (pictures,) = choose(two_models, ["c"], 4)
    names = [(role, two_models.sample_id[row]) for role, row in pictures.large]
    assert names == [
        ("faintest defect", "d2"),  # missed by both
        ("faintest defect", "d1"),  # by one; two of a single category
        ("highest normal", "n1"),
        ("clearest defect", "d3"),
    ]
    assert [two_models.sample_id[row] for group in pictures.more for row in group.rows] == ["n2"]
    assert choose(two_models, ["c"], 0) == []


def test_choice_does_not_depend_on_the_order_of_categories_or_shown_twice(two_models: Judged):
    (pictures,) = choose(two_models, ["c"], 8)
    rows = [row for _, row in pictures.large] + [row for group in pictures.more for row in group.rows]
    assert len(rows) == len(set(rows)) == 5


def test_unlabelled_images_are_shown_by_score_then_next_to_the_threshold_then_the_least():
    rows = [_row(f"i{score:02d}", None, float(score), 10.0) for score in range(20)]
    samples = judged([scored(rows, [{"digest": "a", "threshold": {"value": 10.0}}])])
    groups = choose_unlabelled(samples, 2)
    shown = [(group.title, [samples.sample_id[row] for row in group.rows]) for group in groups]
    assert shown == [
        ("Most anomalous", ["i19", "i18", "i17", "i16", "i15", "i14"]),
        ("Next to the threshold", ["i10"]),
        ("Least anomalous", ["i00"]),
    ]
