"""Stored scores → thresholds from held-out normal images → pass, review or fail for every image. No network runs.

    scores of held-out normals ─▶ decision rule ─┐
                     scores to judge ──────────┴▶ actors: one decision part per score part ─▶ summary, review queue

Thresholds are fitted to normal images that no part of the model has learned from and that are not of the test split:
those of the "val" split, or those the training held out of the "train" split, which its seed and their names tell.
Rows of the test split are not even read for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
from scipy.stats import binom

from pipelines.data.splits import held_out_normals, some
from pipelines.inference.options import DecideOptions
from pipelines.inference.score import IDENTITY
from pipelines.reporting.contact_sheet import draw_queue
from pipelines.reporting.gallery import SCALE_MAPS
from pipelines.reporting.tables import UNDEFINED, percent
from pipelines.runtime import outputs
from pipelines.runtime.actors import run_unfinished
from pipelines.runtime.cli import console, print_table
from pipelines.runtime.locks import exclusive
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.progress import Progress
from pipelines.runtime.tracking import scope, track
from unianom import __version__, files
from unianom.data.schema import ANOMALOUS, NORMAL, SCORE_SCHEMA
from unianom.data.shards import PartSet, PartWriter, ScoreSet, Selection, ShardSet
from unianom.data.splits import hash_order
from unianom.errors import DataError, ModelError
from unianom.model import store_rule, without_rule
from unianom.options import to_plain
from unianom.thresholds import FAIL, PASS, REVIEW, DecisionRule, fit_rule

DECISION_SCHEMA = pa.schema(
    [
        *(SCORE_SCHEMA.field(name) for name in IDENTITY),
        pa.field("score", pa.float32()),
        pa.field("fail_above", pa.float64()),
        pa.field("review_above", pa.float64()),
        pa.field("decision", SCORE_SCHEMA.field("defect").type),
        pa.field("margin", pa.float32()),
        *(SCORE_SCHEMA.field(name) for name in ("status", "error", "model")),
    ]
)
"""One judged sample. `score` is the one that was judged, raw or calibrated; `decision` is pass, review or fail, null
where there is no score; `margin` is the distance above `fail_above` in standard deviations of normal scores."""

DECISION_VERSION = 1

QUEUES = {"uncertain": "nearest to the threshold to fail", "anomalous": "highest above it"}
"""The lists of the review queue, and what comes first in each."""

ALL = "all"
"""Name of the row of all categories together."""


@dataclass(frozen=True)
class DecisionSet(PartSet):
    """Decisions, as jobs/decide.py writes them."""

    schema: ClassVar[pa.Schema] = DECISION_SCHEMA
    version: ClassVar[int] = DECISION_VERSION
    kind: ClassVar[str] = "decision set"
    job: ClassVar[str] = "jobs/decide.py"


@dataclass(frozen=True)
class DecideResult:
    """What a decision job did.

    Attributes:
        decisions: the finished decision set.
        fresh: whether this run wrote anything of it.
        rule: the thresholds.
        summary: content of summary.json.
        written: model folders that this run stored the rule in.
    """

    decisions: DecisionSet
    fresh: bool
    rule: DecisionRule
    summary: dict[str, Any]
    written: list[str]


def decide(options: DecideOptions) -> DecideResult:
    """Fit the rule, judge all scores, and write decisions, summary and review queue; or find that done.

    Raises:
        DataError: wrong inputs, no held-out normal images, or an output that is another's.
        OptionError: too few of them for the rates asked for.
        ModelError: the rule cannot be stored in the model.
    """
    scores = ScoreSet.open(options.scores)
    normals = scores if options.normals is None else ScoreSet.open(options.normals)
    shards = None if options.shards is None else ShardSet.open(options.shards)
    _check_inputs(scores, normals, shards)
    targets = [] if options.write_back is None else _find_models(options.write_back, scores)
    judged = sorted({row["category"] for row in scores.manifest["counts"]})
    if options.scores_kind == "calibrated":
        _check_calibration(normals)
    held_out = [row for row in held_out_scores(normals, shards, options.held_out_fraction) if row["category"] in judged]
    rule = _fit(held_out, judged, options)
    plan = {
        "scores": scores.digest,
        "normals": normals.digest,
        "shards": None if shards is None else shards.digest,
        "rule": rule.to_dict(),
        "target_fpr": options.target_fpr,
        "review_fpr": options.review_fpr,
        "confidence": options.confidence,
        "queue": options.queue,
        "pictures": options.pictures,
    }
    output = files.full_uri(options.output)
    inputs = {
        "scores": options.scores,
        "normals": options.normals,
        "shards": options.shards,
        "write_back": options.write_back,
    }
    with (
        outputs.open_output(output, "decision set", plan, inputs=inputs, overwrite=options.overwrite) as digest,
        track(options.tracking, "decide", output, to_plain(options), plan=digest) as run,
    ):
        fresh = not outputs.is_complete(output)
        if fresh:
            records = _write_parts(scores, rule, output, digest, options)
            _finish(records, scores, shards, held_out, rule, output, digest, options)
        summary = files.read_json(files.join(output, "summary.json"))
        for row in summary["categories"]:
            run.metrics({f"{scope(row['category'])}/{key}": row[key] for key in RATES})
        names = [name for name in files.list_names(output) if name in KEPT or re.fullmatch(r"queue_\w+\.png", name)]
        run.artifacts({name: files.read_bytes(files.join(output, name)) for name in names})
    written = [target.store(rule) for target in targets if not target.has(rule)]
    return DecideResult(DecisionSet.open(output), fresh, rule, summary, written)


KEPT = ("thresholds.json", "summary.json", "queue.csv")
"""Files of the output that MLflow gets, beside the pictures."""


# -- held-out normal images --------------------------------------------------------------------------------------------


def _check_inputs(scores: ScoreSet, normals: ScoreSet, shards: ShardSet | None) -> None:
    if shards is not None and shards.digest != scores.manifest["shards"]["digest"]:
        raise DataError(f"{scores.uri} was scored on other shards than {shards.uri}; give the shards it was made from")
    known = {model["digest"] for model in normals.manifest["models"]}
    if any(model["digest"] not in known for model in scores.manifest["models"]):
        raise DataError(
            f"{normals.uri} was not scored by the model of {scores.uri}, so its scores say nothing of those; score "
            f"normal images with that model"
        )


def _check_calibration(normals: ScoreSet) -> None:
    """Refuse calibrators that learned from the images thresholds are fitted to."""
    for model in normals.manifest["models"]:
        images = (model["provenance"].get("calibration") or {}).get("images", "train")
        if images != "train":
            raise DataError(
                f"the calibrator of the model for {some(model['categories'])} learned from held-out normal images, "
                f"too (images={images}), so none are left that no part of it has seen; calibrate with --images train"
            )


def held_out_scores(normals: ScoreSet, shards: ShardSet | None, fraction: float | None) -> list[dict[str, Any]]:
    """Scored normal images that no part of their model has learned from; never any of the test split.

    Args:
        normals: where their scores are.
        shards: the listing of all its images, where `normals` may not hold every category of a model.
        fraction: share of normal training images held out, for models that do not record it.

    Returns:
        Rows with sample_id, category, score, calibrated_score and model: of each model those of the "val" split where
        there are such, else the held-out ones of "train".

    Raises:
        DataError: a model has none, or which they are cannot be told.
    """
    columns = ["sample_id", "category", "split", "score", "calibrated_score", "status", "model"]
    rows = normals.table(Selection(("train", "val"), labels=(NORMAL,)), columns).to_pylist()
    found: list[dict[str, Any]] = []
    for model in normals.manifest["models"]:
        own = [row for row in rows if row["model"] == model["digest"]]
        chosen = [row for row in own if row["split"] == "val"]
        if not chosen:
            held_out = _held_out_ids(model, own, normals, shards, fraction)
            chosen = [row for row in own if row["sample_id"] in held_out]
        scored = [row for row in chosen if row["status"] == "ok"]
        if not scored:
            raise DataError(
                f"{normals.uri} holds no held-out normal image of the model for {some(model['categories'])}; score the "
                f"split they are in with jobs/score.py --splits val (or train, of which the held-out images are taken) "
                f"and give that as --normals"
            )
        found += scored
    return found


def _held_out_ids(
    model: Mapping[str, Any],
    rows: list[dict[str, Any]],
    normals: ScoreSet,
    shards: ShardSet | None,
    fraction: float | None,
) -> frozenset[str]:
    """Names of the normal training images that a model's training held out, drawn again as it drew them."""
    made = model["provenance"]
    name = f"the model for {some(model['categories'])}"
    if made["shards"]["digest"] != normals.manifest["shards"]["digest"]:
        raise DataError(
            f"{name} was not trained on the shards of {normals.uri}, so what it held out of them cannot be told; score "
            f'the shards it was trained on, or shards with a "val" split, and give that as --normals'
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
    if made["held_out_normals"] == 0:
        raise DataError(
            f"{name} held no normal image out, so all of train was learned from; train it with "
            f"--threshold.validation_fraction above 0, or give scores of a val split as --normals"
        )
    listed = rows
    if shards is not None and shards.digest == normals.manifest["shards"]["digest"]:
        selection = Selection(("train",), tuple(model["categories"]), (NORMAL,))
        listed = shards.table(selection, ["sample_id", "category", "split"]).to_pylist()
    own = [row for row in listed if row["category"] in model["categories"]]
    return held_out_normals(made, own, name, fraction)


def _fit(held_out: list[dict[str, Any]], categories: list[str], options: DecideOptions) -> DecisionRule:
    key = "score" if options.scores_kind == "raw" else "calibrated_score"
    if any(row[key] is None for row in held_out):
        raise DataError(
            "the scores are not calibrated; fit a calibrator to the model and score again, or leave out --scores_kind "
            "calibrated"
        )
    groups: dict[str, list[float]] = {category: [] for category in categories}
    for row in held_out:
        groups[row["category"]].append(row[key])
    return fit_rule(
        groups,
        options.scores_kind,
        options.target_fpr,
        options.review_fpr,
        options.confidence,
        options.per_category,
        options.too_few == "pooled",
    )


# -- decisions ---------------------------------------------------------------------------------------------------------


def _write_parts(
    scores: ScoreSet, rule: DecisionRule, output: str, plan: str, options: DecideOptions
) -> list[dict[str, Any]]:
    """Write the decision parts that are not there yet; the records of all, in the order of the parts."""
    tasks = {decision_part(part, plan): {"part": part} for part in scores.parts}
    arguments = {"scores": scores, "rule": rule, "output": output, "plan": plan, "queue": options.queue}
    progress = Progress("decide", sum(entry["rows"] for entry in scores.manifest["files"]))
    return list(run_unfinished(PartDecider, arguments, tasks, output, options.runtime, progress, "rows")[0].values())


def decision_part(part: str, plan: str) -> str:
    """Name of the decision part of a score part: it tells the plan, so parts of two plans never mix."""
    return f"{part.rsplit('-', 1)[0]}-{plan[:12]}.parquet"


class PartDecider:
    """Judges the samples of one score part. A `PartTask`.

    Args:
        scores: the score set.
        rule: how.
        output: folder of the decision set.
        plan: digest of the decision plan.
        queue: images in each list of the review queue.
    """

    def __init__(self, scores: ScoreSet, rule: DecisionRule, output: str, plan: str, queue: int) -> None:
        self._scores, self._rule, self._output, self._plan, self._queue = scores, rule, output, plan, queue

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write one decision part and its record, which sums up its images of the test split."""
        name = decision_part(task["part"], self._plan)
        path = files.join(self._output, name)
        rows = list(self._judged(task["part"]))
        with files.open_atomic(path) as handle:
            writer = PartWriter(handle, DECISION_SCHEMA)
            for row in rows:
                writer.write(row)
            writer.close()
        test = [row for row in rows if row["split"] == "test"]
        counts = Counter((row["category"], row["label"], row.get("decision")) for row in test)
        record = {
            "plan": self._plan,
            "name": name,
            "rows": len(rows),
            "sha256": files.sha256_file(path),
            "counts": [[*key, count] for key, count in sorted(counts.items(), key=str)],
            "queues": review_queues([row for row in test if "decision" in row], self._queue),
            "ordinary": hash_order((row["sample_id"] for row in test if row.get("decision") == PASS), 0)[:SCALE_MAPS],
        }
        outputs.commit_part(self._output, name, record)
        return {"rows": len(rows)}

    def _judged(self, part: str) -> Iterator[dict[str, Any]]:
        """Rows of DECISION_SCHEMA in the order of the part; those without a score have no decision."""
        columns = [*IDENTITY, "score", "calibrated_score", "status", "error", "model"]
        for batch in self._scores.read(part, None, columns, rows=4096):
            for row in batch.to_pylist():
                calibrated = row.pop("calibrated_score")
                if row["status"] != "ok":
                    yield row
                    continue
                bands = self._rule.bands(row["category"])
                row["score"] = self._rule.value(row["score"], calibrated)
                yield {
                    **row,
                    "fail_above": bands.fail.value,
                    "review_above": bands.review.value,
                    "decision": str(bands.decide(row["score"])),
                    "margin": float(bands.margin(row["score"])),
                }


def _finish(
    records: list[dict[str, Any]],
    scores: ScoreSet,
    shards: ShardSet | None,
    held_out: list[dict[str, Any]],
    rule: DecisionRule,
    output: str,
    plan: str,
    options: DecideOptions,
) -> None:
    """Write what sums the decisions up, then the manifest."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for record in records:
        counts.update({tuple(key): count for *key, count in record["counts"]})
    summary = summarise(counts, Counter(row["category"] for row in held_out), rule, options)
    merged = [row for record in records for queue in record["queues"].values() for row in queue]
    queues = review_queues(list({row["sample_id"]: row for row in merged}.values()), options.queue)
    files.write_json(files.join(output, "thresholds.json"), rule.to_dict())
    files.write_json(files.join(output, "summary.json"), summary)
    files.write_bytes(files.join(output, "queue.csv"), _queue_csv(queues))
    pictures = {}
    if shards is not None and options.pictures:
        shown = {name: queue[: options.pictures] for name, queue in queues.items() if queue}
        ordinary = hash_order((name for record in records for name in record["ordinary"]), 0)[:SCALE_MAPS]
        for name, content in draw_queue(shown, ordinary, scores, shards, rule.kind).items():
            files.write_bytes(files.join(output, f"queue_{name}.png"), content)
            pictures[f"queue_{name}.png"] = f"Review queue: {QUEUES[name]}"
    files.write_json(files.join(output, "section.json"), _section(summary, pictures))
    manifest = {
        "kind": DecisionSet.kind,
        "schema_version": DECISION_VERSION,
        "tool_version": __version__,
        "plan_digest": plan,
        "scores": {"uri": scores.uri, "digest": scores.digest},
        "counts": scores.manifest["counts"],
        "files": [{key: record[key] for key in ("name", "rows", "sha256")} for record in records],
    }
    outputs.finish(output, manifest)


# -- summary and queue -------------------------------------------------------------------------------------------------


RATES = ("false_positive_rate", "normal_review_rate", "detection_rate", "anomalous_review_rate", "review_rate")
"""Shares in a row of the summary; None where there is no such image."""


def summarise(
    counts: Mapping[tuple[Any, ...], int], held_out: Mapping[str, int], rule: DecisionRule, options: DecideOptions
) -> dict[str, Any]:
    """What the rule does to the images of the test split, by category and over all.

    Args:
        counts: test images by category, label and decision.
        held_out: by category, how many normal images the thresholds were fitted to.
        rule, options: how it was decided.
    """
    rows = []
    for name in sorted({category for category, _, _ in counts}):
        own = {key: count for key, count in counts.items() if key[0] == name}
        rows.append(_summary_row(name, own, held_out.get(name, 0), rule, own_bands=name in rule.categories))
    if len(rows) > 1:
        rows.append(_summary_row(ALL, counts, sum(held_out.values()), rule, own_bands=False))
    return {
        "scores_kind": rule.kind,
        "target_fpr": options.target_fpr,
        "review_fpr": options.review_fpr,
        "confidence": options.confidence,
        "categories": rows,
        "notes": [note for row in rows if row["category"] != ALL for note in _surprise(row, options.target_fpr)],
    }


def _summary_row(
    name: str, counts: Mapping[tuple[Any, ...], int], held_out: int, rule: DecisionRule, own_bands: bool
) -> dict[str, Any]:
    """Counts of images, and shares of those with a score."""

    def number(label: int | None = None, decision: str | None = None) -> int:
        return sum(
            count
            for (_, its_label, its_decision), count in counts.items()
            if its_decision is not None and label in (None, its_label) and decision in (None, its_decision)
        )

    def share(decision: str, label: int | None = None) -> float | None:
        return number(label, decision) / number(label) if number(label) else None

    bands = rule.categories[name] if own_bands else rule.common
    differing = bands is None or (name == ALL and bool(rule.categories))
    return {
        "category": name,
        "thresholds": UNDEFINED if differing else "own" if own_bands else "common",
        "unseen_normals": held_out,
        "review_above": None if differing or bands is None else bands.review.value,
        "fail_above": None if differing or bands is None else bands.fail.value,
        "images": sum(counts.values()),
        "not_scored": sum(counts.values()) - number(),
        "normal": number(NORMAL),
        "anomalous": number(ANOMALOUS),
        **{decision: number(decision=decision) for decision in (PASS, REVIEW, FAIL)},
        "normal_failed": number(NORMAL, FAIL),
        "false_positive_rate": share(FAIL, NORMAL),
        "normal_review_rate": share(REVIEW, NORMAL),
        "detection_rate": share(FAIL, ANOMALOUS),
        "anomalous_review_rate": share(REVIEW, ANOMALOUS),
        "review_rate": share(REVIEW),
    }


def _surprise(row: Mapping[str, Any], target: float) -> list[str]:
    """A sentence if more normal test images fail than chance explains at the rate that was aimed at."""
    failed, count = row["normal_failed"], row["normal"]
    chance = float(binom.sf(failed - 1, count, target))
    if not count or chance > 0.05:
        return []
    told = "" if row["thresholds"] == "own" else " by thresholds that are not its own"
    return [
        f"{row['category']}: {failed} of {count} normal test images fail{told}; at a true rate of {100 * target:g} % "
        f"so many or more would with probability {chance:.2g}, so these images differ from the normals the threshold "
        f"was fitted to"
    ]


def review_queues(rows: list[dict[str, Any]], count: int) -> dict[str, list[dict[str, Any]]]:
    """The first of each list of `QUEUES`, in order; equal ones by sample_id."""
    uncertain = sorted(rows, key=lambda row: (abs(row["margin"]), row["sample_id"]))
    anomalous = sorted(rows, key=lambda row: (-row["margin"], row["sample_id"]))
    return {"uncertain": uncertain[:count], "anomalous": anomalous[:count]}


def _queue_csv(queues: Mapping[str, list[dict[str, Any]]]) -> bytes:
    columns = (
        "sample_id",
        "dataset",
        "category",
        "decision",
        "score",
        "fail_above",
        "margin",
        "label",
        "defect",
        "uri",
    )
    rows = [
        {"list": name, "rank": rank, **{key: row[key] for key in columns}}
        for name, queue in queues.items()
        for rank, row in enumerate(queue, 1)
    ]
    return files.csv_bytes(rows, ["list", "rank", *columns])


COLUMNS = {
    "category": "category",
    "thresholds": "thresholds",
    "unseen_normals": "held-out normals",
    "review_above": "review above",
    "fail_above": "fail above",
    "normal": "normal",
    "false_positive_rate": "fail %",
    "normal_review_rate": "review %",
    "anomalous": "anomalous",
    "detection_rate": "fail %",
    "anomalous_review_rate": "review %",
    "images": "images",
    "review_rate": "review %",
}
"""Columns of the summary and their headings; shares are of the count to their left."""


def _table(summary: Mapping[str, Any]) -> list[list[str]]:
    def cell(row: Mapping[str, Any], key: str) -> str:
        value = row[key]
        if key in RATES:
            return percent(value)
        if value is None:
            return UNDEFINED
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return [[cell(row, key) for key in COLUMNS] for row in summary["categories"]]


def _promise(summary: Mapping[str, Any]) -> str:
    return (
        f"at most {100 * summary['target_fpr']:g} % of normal images fail and at most "
        f"{100 * summary['review_fpr']:g} % fail or come to review, each at {100 * summary['confidence']:g} % "
        f"confidence"
    )


def _section(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> dict[str, Any]:
    """What the report shows of it."""
    text = [
        f"Thresholds on {summary['scores_kind']} scores, fitted to normal images that the model has not learned from "
        f"and that are not of the test split: {_promise(summary)}. The shares are of test images.",
        *(f"{note}." for note in summary["notes"]),
    ]
    table = {"title": "Decisions", "columns": list(COLUMNS.values()), "rows": _table(summary)}
    figures = [{"title": title, "file": name} for name, title in pictures.items()]
    return {"title": "Decisions", "text": text, "tables": [table], "figures": figures}


def print_decisions(result: DecideResult) -> None:
    """Print the summary and where everything is."""
    summary = result.summary
    rows = _table(summary)
    print_table(
        f"decisions on test images by {summary['scores_kind']} scores",
        list(COLUMNS.values()),
        rows,
        footer=int(len(rows) > 1),
    )
    console.print(f"promised for normal images: {_promise(summary)}")
    for note in summary["notes"]:
        console.print(f"note: {note}")
    unscored = summary["categories"][-1]["not_scored"]
    if unscored:
        console.print(f"note: {unscored} images without a score have no decision")
    names = files.list_names(result.decisions.uri)
    if not any(name.endswith(".png") for name in names):
        console.print("no contact sheets: they are drawn with --shards and --pictures above 0")
    done = "written" if result.fresh else "were complete already"
    console.print(f"decisions {done}: {result.decisions.uri} (review queue: queue.csv, thresholds: thresholds.json)")
    for folder in result.written:
        console.print(f"rule stored in {folder}; scores made before are of the model without it")


# -- storing the rule in the model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RuleTarget:
    """A model folder that a rule is to be stored in.

    Attributes:
        folder: its path or URI.
        digest: of the model that made the scores.
    """

    folder: str
    digest: str

    def has(self, rule: DecisionRule) -> bool:
        """Whether the model holds this very rule already."""
        description = self._description()
        return bool(description.get("decision_rule") == rule.restricted(description["categories"]).to_dict())

    def store(self, rule: DecisionRule) -> str:
        """Write the rule into `model.json`; returns the folder."""
        description = self._description()
        made = {"fitted_to_scores_of": self.digest, "model_without_rule": _digest_without_rule(description)}
        with exclusive(files.join(self.folder, outputs.LOCK), self.folder):
            store_rule(self.folder, rule.restricted(description["categories"]), made)
        return self.folder

    def _description(self) -> dict[str, Any]:
        return dict(files.read_json(files.join(self.folder, "model.json")))


def _digest_without_rule(description: dict[str, Any]) -> str:
    """The digest that a model has, or would have, without a rule."""
    return files.sha256_of(files.json_bytes(without_rule(description)))


def _find_models(uri: str, scores: ScoreSet) -> list[RuleTarget]:
    """The folder of each model that made the scores.

    Storing a rule changes a model's digest and nothing of its scores, so a model is also known by the digest it has
    without its rule, and by that of the model whose scores its rule was fitted to, if all else is as it was then.

    Raises:
        ModelError: no model there, or not the ones that made the scores.
    """
    known: dict[str, str] = {}
    for folder in ModelSet.open(uri).folders:
        path = files.join(folder, "model.json")
        description = files.read_json(path)
        bare, entry = _digest_without_rule(description), description["provenance"].get("decision_rule")
        known |= {files.sha256_file(path): folder, bare: folder}
        if entry is not None and entry["model_without_rule"] == bare:
            known[entry["fitted_to_scores_of"]] = folder
    targets = []
    for model in scores.manifest["models"]:
        if model["digest"] not in known:
            raise ModelError(
                f"{uri} is not the model that made {scores.uri} (that one has the digest {model['digest'][:12]}), so "
                f"its scores need other thresholds; give the model that was scored with, or score again with this one"
            )
        targets.append(RuleTarget(known[model["digest"]], model["digest"]))
    return targets
