"""A campaign that calibrates one model: heads trained on kept embeddings, no network run.

model ─▶ what it finds in normal training images, and in validation images, once ─▶ trials: heads ─▶ calibrated scores
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pipelines.data.validation_set import ValidationSet
from pipelines.runtime import outputs
from pipelines.runtime.actors import run_unfinished
from pipelines.runtime.models import load_model
from pipelines.runtime.progress import Progress
from pipelines.training.calibrate import EmbeddingCache, HeadActor
from pipelines.training.options import CalibrateOptions
from pipelines.tuning.raw_outputs import RAW_OUTPUTS, load_raw_outputs, save_raw_outputs
from pipelines.tuning.trial import Campaign, FittedTrial, TrialContext
from unianom import files
from unianom.calibration import Calibrator
from unianom.configs.calibration import CalibrationConfig
from unianom.errors import DataError
from unianom.methods import Inspection, Maps
from unianom.methods.layers.distillation import top_mean

IMAGES_PER_UNIT = 64
"""Validation images that one task looks at."""


@dataclass(frozen=True)
class CadaCampaign(Campaign):
    """A campaign of calibrating a model.

    Attributes:
        model: its folder.
        kept: what it finds in the normal images that heads learn from.
        seen: folder of what it finds in the validation images; empty until `see`.
        validation_set: URI of these.
    """

    model: str = ""
    kept: EmbeddingCache | None = None
    seen: str = ""
    validation_set: str = ""

    @property
    def config_class(self) -> type:
        return CalibrationConfig

    def fit(self, values: Mapping[str, Any], folder: str, context: TrialContext) -> FittedTrial:
        return self._found(values, self.seen, self.validation_set)

    def tests(self, values: Mapping[str, Any], folder: str) -> tuple[str, str]:
        uri = self.tests_for(load_model(self.model, "cpu").method, folder)
        seen = files.join(folder, "seen")
        see(self, uri, seen)
        return seen, uri

    def find_in_tests(self, values: Mapping[str, Any], tests: tuple[str, str], device: str) -> FittedTrial:
        return self._found(values, *tests)

    def _found(self, values: Mapping[str, Any], seen: str, validation_set: str) -> FittedTrial:
        calibrator = train_head(self, self.config_of(values))
        size = sum(tensor.numel() * tensor.element_size() for tensor in calibrator.state_dict().values())
        return FittedTrial(CalibratedPostprocessor(calibrator), load_seen(seen), validation_set, 0.0, size / 1e6)


class CalibratedPostprocessor:
    """Reads maps as a calibrator leaves them; see `Method`.

    Args:
        calibrator: with its trained head.
    """

    postprocess_options: ClassVar[tuple[str, ...]] = ("score_share",)
    map_options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, calibrator: Calibrator) -> None:
        self._calibrator = calibrator

    def anomaly_maps(self, raw_outputs: Mapping[str, Tensor], config: Any = None) -> Maps:
        """Calibrated maps, B×S×S."""
        raw = raw_outputs["anomaly_map"]
        found = Inspection(raw, raw.new_zeros(len(raw)), raw, raw_outputs["features"])
        calibrated = self._calibrator.calibrate(found).maps(raw)
        return Maps(calibrated, calibrated)

    def image_scores(self, raw_outputs: Mapping[str, Tensor], anomaly_map: Tensor, config: Any = None) -> Tensor:
        """Calibrated scores, B: an affine map of an image leaves the order of its pixels as it is."""
        config = self._calibrator.config if config is None else config
        return top_mean(anomaly_map, config.score_share)


def train_head(campaign: CadaCampaign, config: CalibrationConfig) -> Calibrator:
    """The calibrator of a trial, on the CPU, as jobs/calibrate.py would train it."""
    assert campaign.kept is not None
    runtime = campaign.options.runtime
    actor = HeadActor(campaign.kept, config, None, runtime.device, runtime.cpus_per_worker)
    actor.run(config.iterations)
    return actor.calibrator().to("cpu")


# ------------------------------------------------------------------------------------------------- what the model finds
def see(campaign: CadaCampaign, validation_set: str, folder: str) -> None:
    """Keep what the model finds in the images of a validation set, by tasks over actors, or find it kept."""
    if files.exists(files.join(folder, RAW_OUTPUTS)):
        return
    options = campaign.options
    arguments = {
        "model": campaign.model,
        "validation_set": validation_set,
        "folder": folder,
        "batch_size": options.batch_size,
        "device": options.runtime.device,
    }
    count = len(ValidationSet(validation_set))
    tasks = {f"seen-{start}": {"start": start} for start in range(0, count, IMAGES_PER_UNIT)}
    records, _ = run_unfinished(
        ValidationInspector, arguments, tasks, folder, options.runtime, Progress("inspect", count), "images"
    )
    found: dict[str, list[np.ndarray]] = {}
    for name in records:
        for key in ("anomaly_map", "features"):
            found.setdefault(key, []).append(files.read_array(files.join(folder, f"{name}-{key}.npy")))
    save_raw_outputs(folder, {key: torch.from_numpy(np.concatenate(parts)) for key, parts in found.items()}, 0.0)


def load_seen(folder: str) -> dict[str, Tensor]:
    """What `see` kept: anomaly maps N×S×S and embeddings N×C×h×w."""
    return load_raw_outputs(folder)[0]


class ValidationInspector:
    """Keeps what a model finds in some images of a validation set. A `PartTask`."""

    def __init__(self, model: str, validation_set: str, folder: str, batch_size: int, device: str) -> None:
        self._method = load_model(model, device).method
        self._validation_set, self._folder, self._batch_size = ValidationSet(validation_set), folder, batch_size

    @torch.inference_mode()
    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write maps and embeddings of one task, and commit it."""
        start, method = int(task["start"]), self._method
        maps, features = [], []
        for images in self._validation_set.batches(
            self._batch_size, method.input, method.device, start, start + IMAGES_PER_UNIT
        ):
            found = method.inspect(images)
            maps.append(found.anomaly_map.float().cpu().numpy())
            features.append(found.features.float().cpu().numpy())
        name = f"seen-{start}"
        arrays = {"anomaly_map": np.concatenate(maps), "features": np.concatenate(features)}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise DataError("maps or embeddings of validation images hold NaN or infinite values; check the model")
        for key, array in arrays.items():
            files.write_array(files.join(self._folder, f"{name}-{key}.npy"), array)
        record = {"name": name, "images": len(arrays["features"])}
        outputs.commit_part(self._folder, name, record)
        return record


def recipe_options(options: CalibrateOptions) -> CalibrateOptions:
    """The options of jobs/calibrate.py among those of a campaign."""
    return CalibrateOptions(**{f.name: getattr(options, f.name) for f in dataclasses.fields(CalibrateOptions)})
