"""A campaign that calibrates one model: heads trained on cached embeddings, no network run.

model ─▶ cached outputs of normal training images, and of validation images ─▶ trials: heads ─▶ calibrated scores
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pipelines.data.extractors import Arrays, BatchFunction, ImageBatch, finite
from pipelines.data.feature_cache import CachedFeatures, FeatureCache
from pipelines.data.image_source import ValidationSource
from pipelines.runtime.models import input_policy, load_model
from pipelines.training.calibration_head import HeadActor
from pipelines.training.calibration_images import EmbeddingCache, network_key
from pipelines.training.options import CalibrateOptions
from pipelines.tuning.trial import Campaign, FittedTrial, TrialContext
from unianom import files
from unianom.calibration import Calibrator
from unianom.configs.calibration import CalibrationConfig
from unianom.data.image import InputPolicy
from unianom.errors import ModelError
from unianom.execution import CPU, Execution
from unianom.methods import Method, Prediction
from unianom.methods.layers.postprocess import top_mean

MAPS, EMBEDDINGS = "anomaly_map", "features"
"""Names of the cached arrays."""


@dataclass(frozen=True)
class CadaCampaign(Campaign):
    """A campaign of calibrating a model.

    Attributes:
        model: its folder.
        kept: the normal images that heads learn from, and the cache of what it makes of them.
        outputs: URI of the cache of what it makes of the validation images; empty until `cache_outputs`.
        validation_set: URI of these.
    """

    model: str = ""
    kept: EmbeddingCache | None = None
    outputs: str = ""
    validation_set: str = ""

    @property
    def config_class(self) -> type:
        return CalibrationConfig

    def fit(self, values: Mapping[str, Any], folder: str, context: TrialContext) -> FittedTrial:
        return self._found(values, self.outputs, self.validation_set)

    def tests(self, values: Mapping[str, Any], folder: str) -> tuple[str, str]:
        uri = self.tests_for(load_model(self.model, CPU).method, folder)
        return cache_outputs(self, uri, files.join(folder, "seen")), uri

    def find_in_tests(self, values: Mapping[str, Any], tests: tuple[str, str], execution: Execution) -> FittedTrial:
        return self._found(values, *tests)

    def _found(self, values: Mapping[str, Any], outputs: str, validation_set: str) -> FittedTrial:
        calibrator = train_head(self, self.config_of(values))
        size = sum(tensor.numel() * tensor.element_size() for tensor in calibrator.state_dict().values())
        raw_outputs = cached_outputs(outputs)
        return FittedTrial(CalibratedPostprocessor(calibrator), raw_outputs, validation_set, 0.0, size / 1e6)


class CalibratedPostprocessor:
    """Reads maps as a calibrator leaves them; see `Method`.

    Args:
        calibrator: with its trained head.
    """

    postprocess_options: ClassVar[tuple[str, ...]] = ("score_share",)
    map_options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, calibrator: Calibrator) -> None:
        self._calibrator = calibrator

    def anomaly_maps(self, tensors: Mapping[str, Tensor], config: Any = None) -> tuple[Tensor, Tensor]:
        """Return calibrated maps, B×S×S, as `anomaly_map` and as `raw_map`."""
        raw = tensors[MAPS]
        prediction = Prediction(raw, raw.new_zeros(len(raw)), raw, tensors[EMBEDDINGS])
        calibrated = self._calibrator.calibrate(prediction).maps(raw)
        return calibrated, calibrated

    def image_scores(self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: Any = None) -> Tensor:
        """Return calibrated scores, B: an affine map of an image leaves the order of its pixels as it is."""
        config = self._calibrator.config if config is None else config
        return top_mean(anomaly_map, config.score_share)


def train_head(campaign: CadaCampaign, config: CalibrationConfig) -> Calibrator:
    """Return the calibrator of a trial, on the CPU, as jobs/calibrate.py would train it.

    Raises:
        ModelError: the campaign has no cached embeddings.
    """
    if campaign.kept is None:
        raise ModelError("this campaign has no embeddings to train heads on; start it by jobs/tune.py cada")
    runtime = campaign.options.runtime
    actor = HeadActor(campaign.kept, config, None, runtime.device, runtime.cpus_per_worker)
    actor.run(config.iterations)
    return actor.calibrator().to("cpu")


# ------------------------------------------------------------------------------------------------- what the model finds
@dataclass(frozen=True)
class MapsAndEmbeddings:
    """Anomaly maps N×S×S and embeddings N×C×h×w of images, float32. An `Extractor`.

    Attributes:
        model: folder of the model.
    """

    model: str

    def policy(self) -> InputPolicy:
        return input_policy(self.model)

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        method = load(self.model)

        def network(images: Tensor) -> dict[str, Tensor]:
            prediction = method.predict(images)
            return {MAPS: prediction.anomaly_map.float(), EMBEDDINGS: prediction.embedding.float()}

        def arrays(_: ImageBatch, found: Arrays) -> Arrays:
            for values in found.values():
                finite(values, "maps or embeddings of validation images hold NaN or infinite values; check the model")
            return found

        return BatchFunction(method.input, arrays, network, method.device)


def cache_outputs(campaign: CadaCampaign, validation_set: str, folder: str) -> str:
    """Compute what the model makes of the images of a validation set, or find it computed.

    Args:
        campaign: of the model.
        validation_set: URI of the images.
        folder: below which caches lie.

    Returns:
        URI of the cache, for `cached_outputs`.
    """
    options = campaign.options
    cache = FeatureCache.below(
        folder,
        "validation outputs",
        {"": ValidationSource(validation_set)},
        network_key(files.read_json(files.join(campaign.model, "model.json"))),
        options.runtime,
        options.batch_size,
    )
    cache.fill({"": MapsAndEmbeddings(campaign.model)}, options.batch_size, options.runtime, "inspect")
    return cache.uri


def cached_outputs(uri: str) -> dict[str, Tensor]:
    """Return what `cache_outputs` computed: anomaly maps N×S×S and embeddings N×C×h×w, by name."""
    features = CachedFeatures(uri)
    return {name: torch.from_numpy(np.concatenate(features.arrays(name))) for name in (MAPS, EMBEDDINGS)}


def recipe_options(options: CalibrateOptions) -> CalibrateOptions:
    """Return the options of jobs/calibrate.py among those of a campaign."""
    return CalibrateOptions(**{f.name: getattr(options, f.name) for f in dataclasses.fields(CalibrateOptions)})
