"""Storing a decision rule in the models that made the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.runtime import outputs
from pipelines.runtime.locks import exclusive
from pipelines.runtime.model_set import ModelSet
from unianom import files
from unianom.data.shards import ScoreSet
from unianom.errors import ModelError
from unianom.model import store_rule, without_rule
from unianom.thresholds import DecisionRule


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
        """Return whether the model holds this very rule already."""
        description = self._description()
        return bool(description.get("decision_rule") == rule.restricted(description["categories"]).to_dict())

    def store(self, rule: DecisionRule) -> str:
        """Write the rule into `model.json`; return the folder."""
        description = self._description()
        made = {"fitted_to_scores_of": self.digest, "model_without_rule": _digest_without_rule(description)}
        with exclusive(files.join(self.folder, outputs.LOCK), self.folder):
            store_rule(self.folder, rule.restricted(description["categories"]), made)
        return self.folder

    def _description(self) -> dict[str, Any]:
        return dict(files.read_json(files.join(self.folder, "model.json")))


def _digest_without_rule(description: dict[str, Any]) -> str:
    """Return the digest that a model has, or would have, without a rule."""
    return files.sha256_of(files.json_bytes(without_rule(description)))


def find_models(uri: str, scores: ScoreSet) -> list[RuleTarget]:
    """Return the folder of each model that made the scores.

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
