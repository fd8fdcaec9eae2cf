"""Runs campaigns that calibrate a model: it is run once for all heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pipelines.data.validation_set import ValidationSet
from pipelines.runtime.models import load_model
from pipelines.runtime.run_record import Run
from pipelines.training.calibration_images import EmbeddingCache
from pipelines.tuning.calibration_trials import CadaCampaign, cache_outputs
from pipelines.tuning.dimensions import Dimension
from pipelines.tuning.driver import Driver
from pipelines.tuning.options import TuneOptions
from unianom import files
from unianom.execution import CPU


class CadaDriver(Driver[CadaCampaign]):
    """Runs the model once on the images that heads learn from and on those they are compared on, then the trials.

    Args:
        cache: of embeddings of the images that heads learn from.
        campaign, trial_space, options, run: see `Driver`.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        campaign: CadaCampaign,
        trial_space: Sequence[Dimension],
        options: TuneOptions,
        run: Run,
    ) -> None:
        super().__init__(campaign, trial_space, options, run)
        self._cache = cache

    def prepare(self) -> None:
        campaign = self.campaign
        self._cache.fill(campaign.options)
        validation_set = campaign.validation_set_of(load_model(campaign.model, CPU).method)
        ValidationSet(validation_set).check(campaign.objective)
        cached = cache_outputs(campaign, validation_set, files.join(campaign.folder, "seen"))
        self.campaign = dataclasses.replace(campaign, validation_set=validation_set, outputs=cached)

    def trial_gpus(self) -> float:
        return self.options.runtime.gpus_per_worker
