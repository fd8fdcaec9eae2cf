"""What a trained trial is compared on with others while it trains: the objective on the validation images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pipelines.data.validation_set import ValidationSet
from pipelines.tuning.objective import OBJECTIVE, latency, score_settings
from pipelines.tuning.raw_outputs import compute_raw_outputs, save_raw_outputs
from unianom.errors import DataError
from unianom.methods import Method


@dataclass(frozen=True)
class ObjectiveValidation:
    """Configures what a trained trial is compared on with others.

    Attributes:
        validation_set: URI of the validation images.
        stride: see `ValidationOptions.pixel_stride`.
        objective: weights of the metrics.
        raw_outputs: folder for the raw outputs of the trained model.
    """

    validation_set: str
    stride: int
    objective: dict[str, float]
    raw_outputs: str

    def make(self, method: Method, batch_size: int) -> ObjectiveValidator:
        """Return the validator of a method; see `ValidatorConfig`."""
        return ObjectiveValidator(self, method, batch_size)


class ObjectiveValidator:
    """Measures a method on the validation images of a campaign, during its training.

    Args:
        config: what to compare on.
        method: the method.
        batch_size: images in one forward pass.
    """

    def __init__(self, config: ObjectiveValidation, method: Method, batch_size: int) -> None:
        self._config, self._method, self._batch_size = config, method, batch_size
        self._validation_set: ValidationSet | None = None

    def run(self) -> dict[str, float]:
        """Return the objective, by the method's own postprocess options, and the metrics it is made of.

        Raises:
            DataError: scores are not finite.
        """
        validation_set, raw_outputs = self._compute()
        objective = self._config.objective
        method = self._method
        (scored,) = score_settings(method, raw_outputs, method.config, [{}], validation_set, objective)
        if scored.measured is None:
            raise DataError("scores of validation images hold NaN or infinite values; lower the learning rate")
        return {OBJECTIVE: scored.measured.objective, **scored.measured.metrics}

    def cache_outputs(self) -> None:
        """Write the raw outputs, so that the search over them needs no network."""
        _, raw_outputs = self._compute()
        save_raw_outputs(self._config.raw_outputs, raw_outputs, latency(self._method))

    def _compute(self) -> tuple[ValidationSet, dict[str, Tensor]]:
        if self._validation_set is None:
            self._validation_set = ValidationSet(self._config.validation_set, self._config.stride)
        batches = self._validation_set.batches(self._batch_size, self._method.input, self._method.device)
        return self._validation_set, compute_raw_outputs(self._method, batches)
