"""Model folders as jobs use them: one model for all categories, or one for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unianom import files
from unianom.errors import DataError, ModelError

INDEX = "models.json"


@dataclass(frozen=True)
class ModelSet:
    """Which model scores which category.

    Attributes:
        uri: a model folder, or a folder of them with its `models.json`.
        by_category: category to model folder; empty where one model takes all.
    """

    uri: str
    by_category: dict[str, str]

    @staticmethod
    def open(uri: str) -> ModelSet:
        """Find out what lies there.

        Raises:
            ModelError: neither a model folder nor a folder of models, or its `models.json` is damaged.
        """
        folder = files.full_uri(uri)
        if files.exists(files.join(folder, "model.json")):
            return ModelSet(folder, {})
        index = files.join(folder, INDEX)
        if files.exists(index):
            try:
                names: dict[str, str] = files.read_json(index)
            except ValueError as error:
                raise ModelError(f"{index} is damaged: {error}; copy it again") from error
            if not isinstance(names, dict) or not names:
                raise ModelError(f"{index} is damaged: it names no folder for a category; copy it again")
            if strange := [repr(name) for name in names.values() if not files.is_plain_name(name)]:
                raise ModelError(
                    f"{index} names {strange[0]}, which is no folder beside it; a model is read from nowhere else, so "
                    f"copy the whole folder again"
                )
            return ModelSet(folder, {category: files.join(folder, name) for category, name in names.items()})
        found = ", ".join(files.list_names(folder)[:5]) or "nothing"
        raise ModelError(f"no model in {folder} (found: {found}); give a folder that jobs/train.py wrote")

    @property
    def folders(self) -> list[str]:
        """Every model folder, in the order of the categories."""
        return [self.by_category[c] for c in sorted(self.by_category)] if self.by_category else [self.uri]

    def folder_of(self, category: str) -> str:
        """Return the model folder that scores a category.

        Raises:
            DataError: no model was fitted for it.
        """
        if not self.by_category:
            return self.uri
        if category not in self.by_category:
            known = ", ".join(sorted(self.by_category))
            raise DataError(f"no model for category '{category}' in {self.uri}; it has models for {known}")
        return self.by_category[category]

    def descriptions(self) -> list[dict[str, Any]]:
        """Return `model.json` of every model with its digest, without what only loading needs.

        Raises:
            ModelError: one is missing or damaged.
        """
        found = []
        for folder in self.folders:
            path = files.join(folder, "model.json")
            try:
                content = files.read_json(path)
                kept = {key: content[key] for key in ("method", "config", "categories", "threshold", "provenance")}
                kept["calibrator"] = content.get("calibrator")
                kept["decision_rule"] = content.get("decision_rule")
                kept |= {key: content[key] for key in ("category_thresholds", "normal_scores") if key in content}
            except FileNotFoundError as error:
                raise ModelError(f"{path} is missing; copy the whole folder again or fit the model again") from error
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{path} is damaged ({error!r}); copy it again or fit the model again") from error
            found.append({"digest": files.sha256_file(path), **kept})
        return found


def write_index(uri: str, names: dict[str, str]) -> None:
    """Write `models.json`: category to folder name below `uri`."""
    files.write_json(files.join(uri, INDEX), dict(sorted(names.items())))
