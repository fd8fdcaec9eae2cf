"""The head of a calibrator, trained on cached embeddings: in this process, or in an actor on Ray."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pipelines.data.feature_cache import JoinedRows
from pipelines.runtime.errors import user_error
from pipelines.runtime.progress import Progress
from pipelines.runtime.task_worker import set_threads, torch_threads
from pipelines.runtime.tasks import runs_here
from pipelines.training.calibration_images import CATEGORY, FEATURES, STATISTICS, EmbeddingCache, summed_moments
from pipelines.training.options import CalibrateOptions
from unianom import files
from unianom.calibration import Calibrator, HeadTrainer, MapStatistics
from unianom.configs.calibration import CalibrationConfig
from unianom.errors import OptionError

State = dict[str, np.ndarray]


def train_calibrator(
    kept: EmbeddingCache, checkpoint: str, options: CalibrateOptions
) -> tuple[Calibrator, dict[str, float]]:
    """Fit a calibrator: take statistics from the kept arrays, and train the head.

    Args:
        kept: the arrays.
        checkpoint: file of the last checkpoint, from which it continues.
        options: of the calibrator, and where to train.

    Returns:
        The calibrator, and its metrics on the images that it learned from.
    """
    train = _train_here if runs_here(options.runtime, len(kept.chosen)) else _train_on_ray
    state, metrics = train(kept, checkpoint, options)
    channels, height, width = kept.cache.open().row_shape(FEATURES)
    calibrator = Calibrator(options.calibration, kept.categories, channels, (height, width))
    calibrator.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    return calibrator.eval(), metrics


def _train_here(kept: EmbeddingCache, checkpoint: str, options: CalibrateOptions) -> tuple[State, dict[str, float]]:
    runtime = options.runtime
    with torch_threads():
        head = HeadActor(kept, options.calibration, checkpoint, runtime.device, runtime.cpus_per_worker)
        _run(head.run, options)
        return head.result()


def _train_on_ray(kept: EmbeddingCache, checkpoint: str, options: CalibrateOptions) -> tuple[State, dict[str, float]]:
    import ray

    from pipelines.runtime.actors import connect

    runtime = options.runtime
    connect(runtime)
    head: Any = ray.remote(
        num_cpus=runtime.cpus_per_worker, num_gpus=runtime.gpus_per_worker, max_restarts=3, max_task_retries=3
    )(HeadActor).remote(kept, options.calibration, checkpoint, runtime.device, runtime.cpus_per_worker)
    try:
        _run(lambda end: ray.get(head.run.remote(end)), options)
        result: tuple[State, dict[str, float]] = ray.get(head.result.remote())
        return result
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        raise known from error


def _run(train: Callable[[int], tuple[int, float]], options: CalibrateOptions) -> None:
    """Train from checkpoint to checkpoint; a calibrator without a head has nothing to train."""
    if not options.calibration.has_head:
        return
    steps = options.calibration.iterations
    progress = Progress("calibrate", steps, "steps")
    for end in [*range(options.checkpoint_every, steps, options.checkpoint_every), steps]:
        done, loss = train(end)
        progress.set(done, f"loss {loss:.4g}")
    progress.close()


class HeadActor:
    """Trains a calibrator's head on kept arrays, checkpoint by checkpoint. A Ray actor; may be made anew any time.

    Args:
        kept: the arrays.
        config: of the calibrator.
        checkpoint: file of the last checkpoint; None to keep none.
        device, threads: to train on.
    """

    def __init__(
        self, kept: EmbeddingCache, config: CalibrationConfig, checkpoint: str | None, device: str, threads: int
    ) -> None:
        set_threads(threads)
        self._kept, self._config, self._checkpoint, self._device = kept, config, checkpoint, device
        self._loss = 0.0
        # made by the first call, since what fails in an actor's constructor is told as the actor's death
        self._calibrator: Calibrator | None = None
        self._trainer: HeadTrainer | None = None

    def calibrator(self) -> Calibrator:
        """Return the calibrator with its statistics, at the last checkpoint."""
        if self._calibrator is not None:
            return self._calibrator
        config, features = self._config, self._kept.cache.open()
        statistics = MapStatistics(*np.concatenate(features.arrays(STATISTICS)).T)
        self._category = np.concatenate(features.arrays(CATEGORY))
        self._rows = JoinedRows(features.arrays(FEATURES))
        channels, height, width = features.row_shape(FEATURES)
        moments = summed_moments(features) / (len(self._category) * height * width)
        calibrator = Calibrator(config, self._kept.categories, channels, (height, width))
        calibrator.set_statistics(statistics, self._category, *moments)
        self._calibrator = calibrator.to(self._device).eval()
        self._targets = statistics.targets(config.statistics)
        if config.has_head:
            self._trainer = HeadTrainer(self._calibrator, self._rows, self._targets, self._category)
            if self._checkpoint is not None and files.exists(self._checkpoint):
                content = io.BytesIO(files.read_bytes(self._checkpoint))
                self._trainer.restore(torch.load(content, map_location=self._device, weights_only=True))
        return self._calibrator

    def run(self, end: int) -> tuple[int, float]:
        """Train up to a step and keep a checkpoint; the step reached, and the mean loss of the last steps.

        Raises:
            OptionError: the calibrator has no head.
        """
        self.calibrator()
        if self._trainer is None:
            raise OptionError(f"calibration.variant={self._config.variant} has no head to train; take cada")
        if self._trainer.step < end:
            losses: list[float] = []
            self._trainer.run(end, lambda _, loss: losses.append(loss))
            self._loss = float(np.mean(losses[-100:]))
            if self._checkpoint is not None:
                buffer = io.BytesIO()
                torch.save(self._trainer.state(), buffer)
                files.write_bytes(self._checkpoint, buffer.getvalue())
        return self._trainer.step, self._loss

    def result(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Return the calibrator's state, and its metrics on the images it learned from."""
        calibrator = self.calibrator()
        metrics = {"images": float(len(self._category)), "alpha": float(calibrator.alpha)}
        metrics |= head_metrics(calibrator, self._rows, self._targets, self._category)
        return {name: value.cpu().numpy() for name, value in calibrator.state_dict().items()}, metrics


@torch.inference_mode()
def head_metrics(
    calibrator: Calibrator, rows: JoinedRows, targets: np.ndarray, category: np.ndarray, size: int = 64
) -> dict[str, float]:
    """Measure how well a trained head fits its own training images.

    Returns:
        For "cada" the shares of the variance of u and γ that are explained; for "classifier" its accuracy.
    """
    if not calibrator.config.has_head:
        return {}
    device = calibrator.class_statistics.device
    starts = range(0, len(category), size)
    outputs = [
        calibrator.outputs(
            torch.from_numpy(rows.take(np.arange(start, min(start + size, len(category))))).to(device).float()
        )
        for start in starts
    ]
    made = torch.cat(outputs).cpu()
    if calibrator.config.variant == "classifier":
        return {"classifier_accuracy": float((made.argmax(1).numpy() == category).mean())}
    predicted = calibrator.target_mean.cpu().numpy() + made.numpy() * calibrator.target_deviation.cpu().numpy()
    left = ((predicted - targets) ** 2).mean(0) / np.maximum(targets.var(0), np.finfo(np.float64).tiny)
    return {"explained_level": float(1 - left[0]), "explained_top": float(1 - left[1])}
