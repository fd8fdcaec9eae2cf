"""What each job writes: the kinds of outputs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from unianom import files
from unianom.data.shards import MANIFEST

PLAN, LOCK = "_plan.json", "_lock.json"

_MODEL = (
    r"model\.json",
    r"weights\.safetensors",
    r"calibrator\.safetensors",
    r"bank/manifest\.json",
    r"bank/origins\.parquet",
    r"bank/shard-\d{5}-of-\d{5}\.faiss",
)
_SCORED = r"part-(\d{5}(-\d{9})?|rejected)-[0-9a-f]{12}\.parquet"
_LISTED = r"_listing/(_manifest\.json|_rejected\.parquet|_part-\d{5}\.json|part-\d{5}\.parquet)"
_PARTS = (r"_manifest\.json", r"_part-[\w.-]+\.json")


@dataclass(frozen=True)
class OutputKind:
    """What one job writes.

    Attributes:
        words: what it is, in words.
        job: the command that makes it.
        owns: patterns of the files that the job writes, by their path below the output.
        done: the file that comes last; None where an output can always be made longer.
        keys: entries that only this job's plans have, by which plans are told that do not name their job yet.
        unplanned: patterns of the files of an output from before this job wrote a plan; the first must be there.
    """

    words: str
    job: str
    owns: tuple[str, ...]
    done: str | None = MANIFEST
    keys: frozenset[str] = frozenset()
    unplanned: tuple[str, ...] = ()

    def wrote(self, path: str) -> bool:
        """Return whether a file below the output has a name that this job gives, or is a half-written one of these."""
        own = path if not files.is_half_written(path) else path.rsplit(".", 2)[0]
        return own not in (PLAN, LOCK) and any(re.fullmatch(pattern, own) for pattern in self.owns)


KINDS: dict[str, OutputKind] = {
    "shard set": OutputKind(
        "a shard set",
        "ingest",
        (*_PARTS, r"part-\d{5}\.parquet", r"_rejected\.parquet"),
        keys=frozenset({"layout", "source"}),
    ),
    "score set": OutputKind(
        "scores",
        "score",
        (*_PARTS, _SCORED, _LISTED),
        keys=frozenset({"models", "maps", "fold_batch_norm"}),
    ),
    "model": OutputKind(
        "a model",
        "train",
        (*_MODEL, _LISTED, r"_work/.*"),
        done="model.json",
        keys=frozenset({"method", "few_shot", "weights", "threshold"}),
    ),
    "models": OutputKind("models of single categories", "train", (r"models\.json", _LISTED), done=None),
    "calibrated model": OutputKind(
        "a calibrated model", "calibrate", _MODEL, done="model.json", keys=frozenset({"found_by", "calibration"})
    ),
    "calibrated models": OutputKind(
        "calibrated models of single categories", "calibrate", (r"models\.json",), done=None
    ),
    "evaluation": OutputKind(
        "an evaluation",
        "evaluate",
        (r"evaluation\.json", r"categories\.csv", r"_pixel_counts/.*", r"_work/[0-9a-f]{12}/.*"),
        done="evaluation.json",
        unplanned=(r"evaluation\.json", r"categories\.csv", r"_work"),
    ),
    "comparison": OutputKind(
        "a comparison",
        "compare",
        (r"comparison\.(json|csv|md|tex)", r"section\.json"),
        done="comparison.json",
        unplanned=(r"comparison\.json", r"comparison\.(csv|md|tex)", r"section\.json"),
    ),
    "decision set": OutputKind(
        "decisions",
        "decide",
        (
            *_PARTS,
            _SCORED,
            r"thresholds\.json",
            r"summary\.json",
            r"queue\.csv",
            r"queue_(anomalous|uncertain)\.png",
            r"section\.json",
        ),
        keys=frozenset({"rule", "normals", "queue"}),
    ),
    "clustering": OutputKind(
        "a clustering",
        "cluster_anomalies",
        (
            *_PARTS,
            r"clusters\.parquet",
            r"clusters_.+\.png",
            r"categories\.csv",
            r"clustering\.json",
            r"section\.json",
        ),
        keys=frozenset({"clusters", "n_init", "pooling"}),
    ),
    "semantic protocol": OutputKind(
        "results of the semantic protocol",
        "semantic",
        (
            *_PARTS,
            r"_?scores-\d{5}\.(parquet|json)",
            r"semantic\.(json|png)",
            r"tasks\.csv",
            r"section\.json",
        ),
        keys=frozenset({"protocol", "tasks"}),
    ),
    "low-shot protocol": OutputKind(
        "results of the low-shot protocol",
        "low_shot",
        (
            *_PARTS,
            r"_?scores-\d{5}\.(parquet|json)",
            r"low_shot\.(json|png)",
            r"(draws|summary)\.csv",
            r"section\.json",
        ),
        keys=frozenset({"protocol", "shots", "draws"}),
    ),
    "campaign": OutputKind(
        "a campaign",
        "tune",
        (
            r"(trials|encodings|validation|categories|diagnosis|seen|_tune)/.*",
            r"(campaign|section|spent)\.json",
            r"settings\.parquet",
            r"best\.yaml",
            r"trials\.csv",
            r"(parallel|importance|slices|trials|pareto)\.png",
        ),
        done=None,
        keys=frozenset({"space", "search", "objective"}),
    ),
    "export": OutputKind(
        "an exported model",
        "export",
        (r"model\.onnx(\.data)?", r"predict\.py", r"README\.md", r"export\.json"),
        done="export.json",
        keys=frozenset({"precision", "opset", "gate"}),
    ),
    "demo": OutputKind("a demo", "demo", (), done=None),
    "inspection": OutputKind("an inspection", "inspect", (), done=None),
    # what jobs keep for each other, under a name that is the digest of its plan
    "features": OutputKind("frozen features", "train", (r".*",)),
    "patches": OutputKind("patches of a bank", "train", (r".*",)),
    "held-out scores": OutputKind("scores of held-out images", "train", (r".*",)),
    "calibration images": OutputKind("embeddings for calibration", "calibrate", (r".*",)),
    "cluster features": OutputKind("features for clustering", "cluster_anomalies", (r".*",)),
    "embeddings": OutputKind("embedded images", "semantic", (r".*",)),
    "encodings": OutputKind("encoded images", "tune", (r".*",)),
    "validation outputs": OutputKind("outputs of validation images", "tune", (r".*",)),
    "validation set": OutputKind("validation images", "tune", (r".*",)),
    "test set": OutputKind("test images", "tune", (r".*",)),
}
