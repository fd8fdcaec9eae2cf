"""Scores of normal images, and the decision rule that is fitted to them.

Thresholds are fitted to normal images that no part of the model has learned from and that are not of the test split:
those of the "val" split, or those the training held out of the "train" split, which its seed and their names tell.
Where they were not scored, the scores are taken that the model keeps of its normal images: held-out ones, or those of
its bank, each without its own vectors. Rows of the test split are not even read for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.data.splits import held_out_normals, some
from pipelines.inference.options import DecideOptions
from unianom.data.schema import NORMAL
from unianom.data.shards import ScoreSet, Selection, ShardSet
from unianom.errors import DataError
from unianom.thresholds import DecisionRule, fit_rule


def check_inputs(scores: ScoreSet, normals: ScoreSet, shards: ShardSet | None) -> None:
    """Refuse scores of other shards, and normal images that another model has scored."""
    if shards is not None and shards.digest != scores.manifest["shards"]["digest"]:
        raise DataError(f"{scores.uri} was scored on other shards than {shards.uri}; give the shards it was made from")
    known = {model["digest"] for model in normals.manifest["models"]}
    if any(model["digest"] not in known for model in scores.manifest["models"]):
        raise DataError(
            f"{normals.uri} was not scored by the model of {scores.uri}, so its scores say nothing of those; score "
            f"normal images with that model"
        )


def check_calibration(normals: ScoreSet) -> None:
    """Refuse calibrators that learned from the images thresholds are fitted to."""
    for model in normals.manifest["models"]:
        images = (model["provenance"].get("calibration") or {}).get("images", "train")
        if images != "train":
            raise DataError(
                f"the calibrator of the model for {some(model['categories'])} learned from held-out normal images, "
                f"too (images={images}), so none are left that no part of it has seen; calibrate with --images train"
            )


def held_out_scores(
    normals: ScoreSet, shards: ShardSet | None, fraction: float | None, kept: bool = False
) -> list[dict[str, Any]]:
    """Return the scored normal images that no part of their model has learned from; never any of the test split.

    Args:
        normals: where their scores are.
        shards: the listing of all its images, where `normals` may not hold every category of a model.
        fraction: share of normal training images held out, for models that do not record it.
        kept: whether the raw scores that a model keeps do, too.

    Returns:
        Rows with category, score, calibrated_score, model and source: of each model those of the "val" split where
        there are such, else the held-out ones of "train", else the raw scores that the model keeps.

    Raises:
        DataError: a model has none, or which they are cannot be told.
    """
    columns = ["sample_id", "category", "split", "score", "calibrated_score", "status", "model"]
    rows = normals.table(Selection(("train", "val"), labels=(NORMAL,)), columns).to_pylist()
    held_out: list[dict[str, Any]] = []
    for model in normals.manifest["models"]:
        scored = [row for row in rows if row["model"] == model["digest"]]
        chosen = [row for row in scored if row["split"] == "val"]
        if kept and not chosen and _keeps_scores(model, scored):
            held_out += _kept_scores(model)
            continue
        if not chosen:
            ids = _held_out_ids(model, scored, normals, shards, fraction)
            chosen = [row for row in scored if row["sample_id"] in ids]
        with_score = [row for row in chosen if row["status"] == "ok"]
        if not with_score:
            raise DataError(
                f"{normals.uri} holds no held-out normal image of the model for {some(model['categories'])}; score the "
                f"split they are in with jobs/score.py --splits val (or train, of which the held-out images are taken) "
                f"and give that as --normals"
            )
        held_out += [{**row, "source": "held_out"} for row in with_score]
    return held_out


def _keeps_scores(model: Mapping[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Return whether the scores that a model keeps are taken: it held nothing out, or no image of train was scored."""
    made = model["provenance"]
    return bool(model.get("normal_scores")) and (made["held_out_normals"] == 0 or not rows)


def _kept_scores(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the raw scores of normal images that a model keeps, as rows."""
    common = {
        "calibrated_score": None,
        "model": model["digest"],
        "source": model["threshold"].get("source", "held_out"),
    }
    return [
        {"category": category, "score": score, **common}
        for category, scores in model["normal_scores"].items()
        for score in scores
    ]


def _held_out_ids(
    model: Mapping[str, Any],
    rows: list[dict[str, Any]],
    normals: ScoreSet,
    shards: ShardSet | None,
    fraction: float | None,
) -> frozenset[str]:
    """Return the names of the normal training images that a model's training held out, drawn again as it drew them."""
    made = model["provenance"]
    name = f"the model for {some(model['categories'])}"
    if made["shards"]["digest"] != normals.manifest["shards"]["digest"]:
        raise DataError(
            f"{name} was not trained on the shards of {normals.uri}, so what it held out of them cannot be told; score "
            f'the shards it was trained on, or shards with a "val" split, and give that as --normals'
        )
    if made["held_out_normals"] == 0:
        raise DataError(
            f"{name} held no normal image out, so all of train was learned from; train it with --threshold.source "
            f"held_out and --threshold.validation_fraction above 0, or give scores of a val split as --normals"
        )
    if not any(row["split"] == "train" for row in rows):
        raise DataError(
            f"{normals.uri} holds no normal image of the train or val split; score one of them, by jobs/score.py "
            f"--splits train or --splits val, and give that as --normals: thresholds are never fitted to test images"
        )
    if (made.get("held_out") or {}).get("split") == "val":
        raise DataError(
            f'{name} held out the "val" split, of which {normals.uri} has no normal image; score it with '
            f"jobs/score.py --splits val and give that as --normals"
        )
    listed = rows
    if shards is not None and shards.digest == normals.manifest["shards"]["digest"]:
        selection = Selection(("train",), tuple(model["categories"]), (NORMAL,))
        listed = shards.table(selection, ["sample_id", "category", "split"]).to_pylist()
    of_model = [row for row in listed if row["category"] in model["categories"]]
    return held_out_normals(made, of_model, name, fraction)


def fit_decision_rule(held_out: list[dict[str, Any]], categories: list[str], options: DecideOptions) -> DecisionRule:
    """Fit thresholds to the scores of normal images.

    Raises:
        DataError: calibrated scores are asked for, and there are none.
        OptionError: too few images for the rates asked for.
    """
    key = "score" if options.scores_kind == "raw" else "calibrated_score"
    if any(row[key] is None for row in held_out):
        raise DataError(
            "the scores are not calibrated; fit a calibrator to the model and score again, or leave out --scores_kind "
            "calibrated"
        )
    groups: dict[str, list[float]] = {category: [] for category in categories}
    for row in held_out:
        groups[row["category"]].append(row[key])
    left_out = any(row["source"] == "leave_one_out" for row in held_out)
    return fit_rule(
        groups,
        options.scores_kind,
        options.target_fpr,
        options.review_fpr,
        options.confidence,
        options.per_category,
        options.too_few == "pooled",
        "leave_one_out" if left_out else "held_out",
    )
