"""Where a served model comes from: a folder, or MLflow's registry."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import yaml

from pipelines.runtime.mlflow_environment import IMPATIENT, QUIET, environment, explained
from pipelines.runtime.mlflow_text import mask_credentials
from pipelines.serving.serve_options import REGISTRY, registered
from unianom import files
from unianom.errors import ModelError, OptionError


class ModelSource(ABC):
    """Where a model lies, which may come to be another one there.

    Attributes:
        uri: as it was given.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @abstractmethod
    def version(self) -> str:
        """Return what tells the model that lies there now from any other one that lay or will lie there.

        Raises:
            UnianomError: there is none, or the store cannot be asked.
        """

    @abstractmethod
    def fetch(self, version: str, folder: Path) -> str:
        """Return path or URI of the model folder of a version.

        Args:
            version: what `version` gave.
            folder: an empty folder of this machine to copy it to, where that is needed.

        Raises:
            UnianomError: it cannot be had.
        """


class FolderSource(ModelSource):
    """A model folder; its version is the digest of the model, so a model or rule that is written there is another."""

    def version(self) -> str:
        path = files.join(files.full_uri(self.uri), "model.json")
        try:
            return files.sha256_file(path)
        except FileNotFoundError as error:
            if files.exists(files.join(files.full_uri(self.uri), "models.json")):
                raise ModelError(
                    f"{self.uri} holds one model for each category; serve one of its folders, or fit one model for all"
                ) from error
            raise ModelError(f"no model.json in {self.uri}; give the folder that jobs/train.py wrote") from error

    def fetch(self, version: str, folder: Path) -> str:
        return files.full_uri(self.uri)


class RegistrySource(ModelSource):
    """A model that a job registered with `--register_as`. Its folder is copied; of the code that MLflow keeps with it,
    none is run.

    Args:
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        tracking_uri: of the MLflow whose registry it is in.
    """

    def __init__(self, uri: str, tracking_uri: str) -> None:
        super().__init__(uri)
        self._name, self._alias, self._version = registered(uri)
        self._tracking_uri = tracking_uri
        self._where = f"MLflow at {mask_credentials(tracking_uri)}"

    def version(self) -> str:
        if self._version:
            return self._version
        with (
            environment({**QUIET, **IMPATIENT}),
            explained(
                f"no model {self.uri} in {self._where}", "give the alias to a version, or mend name and --mlflow_uri"
            ),
        ):
            return str(self._client().get_model_version_by_alias(self._name, self._alias).version)

    def fetch(self, version: str, folder: Path) -> str:
        uri = f"{REGISTRY}{self._name}/{version}"
        with (
            environment(QUIET),
            explained(f"cannot fetch {uri} from {self._where}", "see that its artifacts can be reached from here"),
        ):
            from mlflow.artifacts import download_artifacts

            # not by the name, which MLflow would look up in the registry that it has as its global one
            place = self._client().get_model_version_download_uri(self._name, version)
            root = Path(download_artifacts(artifact_uri=place, dst_path=str(folder), tracking_uri=self._tracking_uri))
        try:
            logged: Any = yaml.safe_load((root / "MLmodel").read_text())
            model = root / logged["flavors"]["python_function"]["artifacts"]["model"]["path"]
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ModelError(f"{uri} is no model of this project; register one with jobs/train.py") from error
        if not model.resolve().is_relative_to(root.resolve()):
            raise ModelError(f"{uri} names a model folder outside of itself; register the model again")
        return str(model)

    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self._tracking_uri, self._tracking_uri)


def model_source(uri: str, mlflow_uri: str | None) -> ModelSource:
    """Return the source that a URI names.

    Args:
        uri: model folder, or models:/NAME@ALIAS or models:/NAME/VERSION.
        mlflow_uri: of the registry; None takes MLFLOW_TRACKING_URI.

    Raises:
        OptionError: a registered model, and no registry is known.
    """
    if not uri.startswith(REGISTRY):
        return FolderSource(uri)
    tracking_uri = mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not tracking_uri:
        raise OptionError(f"{uri} is in a registry; say in which one by --mlflow_uri or MLFLOW_TRACKING_URI")
    return RegistrySource(uri, tracking_uri)


def fetch_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a new folder to fetch a model to; removed when nobody has it any more."""
    return tempfile.TemporaryDirectory(prefix="unianom-model-", ignore_cleanup_errors=True)
