"""One worker of a training, wherever it runs: its batches, steps, validations, checkpoints and the trained model."""

from __future__ import annotations

import io
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.runtime.task_worker import set_threads
from pipelines.training.context import TrainContext
from pipelines.training.dataset import TrainingSet, to_input
from pipelines.training.job import Job, synthesiser_of
from pipelines.training.loader import BatchLoader
from pipelines.training.options import TrainingOptions
from pipelines.training.sampler import EpochIndex, StepSampler
from pipelines.training.trainer import Trainer, evaluation_mode
from pipelines.training.validation import PROGRESS, WORKERS, Validation, Validator
from unianom import files
from unianom.errors import DataError
from unianom.methods.trained import TrainedMethod
from unianom.model import Model

Report = Callable[[dict[str, Any]], Any]
"""Takes what is to be shown and recorded: a step, with losses and rates, with a validation, or with a note."""


def work(job: Job, report: Report, context: TrainContext) -> None:
    """Train from the last checkpoint to the end, and write the model.

    Args:
        job: what to train.
        report: used by the first worker.
        context: of this worker.

    Raises:
        UnianomError: for the user.
    """
    options = job.options
    set_threads(options.runtime.cpus_per_worker)
    device = context.device() if options.runtime.gpus_per_worker else torch.device("cpu")
    method = job.make().to(device)
    if options.runtime.gpus_per_worker:
        torch.set_float32_matmul_precision("high" if options.precision == "bf16" else "highest")
    with tempfile.TemporaryDirectory(prefix="unianom-train-") as folder:
        data, images = job.data(method, Path(folder))
        training = method.config.training
        groups = None
        if job.streams(method):
            groups = np.unique(np.stack([images.part, images.group], axis=1), axis=0, return_inverse=True)[1].ravel()
        order = StepSampler(
            len(images),
            training.seed,
            training.batch_size,
            context.rank,
            context.size,
            groups,
            options.data.window,
        )
        processes, repeats = _processes(method, options, job), method.batch_spec.repeats
        batches = BatchLoader(data, order, processes, pin=device.type == "cuda", repeats=repeats)
        trainer = Trainer(
            method,
            batches,
            job.iterations,
            order.share,
            options.precision,
            options.compile,
            options.accumulate,
            job.phases(),
        )
        state = context.checkpoint()
        if state is None and job.segment is not None and job.segment.start is not None:
            state = files.read_bytes(job.segment.start)
        if state is not None:
            trainer.restore(torch.load(io.BytesIO(state), map_location="cpu", weights_only=True))
        first = context.rank == 0
        if first and trainer.step:
            report({"step": trainer.step, "note": f"continuing at step {trainer.step}"})
        fixed = fixed_places(images.category, method.finish_images)
        validation: Validator
        if job.validator is not None:
            validation = job.validator.make(method, options.batch_size)
        else:
            validation = Validation(
                job.shards,
                job.categories,
                job.held_out,
                method,
                synthesiser_of(method),
                options.validation_images,
                options.batch_size,
                options.limits,
                options.seed,
            )
        _loop(trainer, data, fixed, validation, job, report if first else None, context)
        if job.segment is not None and job.end < job.iterations:
            state = _state(trainer)
            if first:
                files.write_bytes(job.segment.state, state)
        elif first:
            method.config = job.make().config  # as asked for, whatever phases made of it
            finish(method, data, fixed, job.categories)
            with evaluation_mode(method):
                validation.cache_outputs()
            Model(method, job.categories).save(job.output)
        context.report({"step": trainer.step})  # nobody leaves before the model is written


def _loop(
    trainer: Trainer,
    data: TrainingSet,
    fixed: list[EpochIndex],
    validation: Validator,
    job: Job,
    report: Report | None,
    context: TrainContext,
) -> None:
    """Run the steps, and what happens between them: reports, validations, checkpoints."""
    options, method = job.options, trainer.method
    every = options.validate_every
    validate_every = max(1, job.iterations // 10) if every is None else every
    log_every = max(1, min(50, job.iterations // 20))
    seconds = {"data": 0.0, "all": 0.0}
    count, warned = 0, False
    for taken in trainer.steps(job.end):
        step = trainer.step
        seconds["data"] += taken["data"]
        seconds["all"] += taken["all"]
        count += 1
        if step % log_every == 0 or step == job.end:
            waited = time.perf_counter()
            losses = {name: float(value) for name, value in taken["losses"].items()}  # waits for the device
            seconds["all"] += time.perf_counter() - waited
            if not all(math.isfinite(value) for value in losses.values()):
                raise DataError(
                    f"the loss is not finite at step {step} ({losses}); lower --method.training.learning_rate, or "
                    f"take --precision fp32"
                )
            if report is not None:
                images = count * method.config.training.batch_size
                rates = {
                    "images_per_second": images / seconds["all"],
                    "step_seconds": seconds["all"] / count,
                    "data_share": seconds["data"] / seconds["all"],
                }
                report({"step": step, "losses": losses, "rates": rates})
            seconds, count = {"data": 0.0, "all": 0.0}, 0
        if validate_every and (step % validate_every == 0 or step == job.end):
            figures: dict[str, float] = {}
            if report is not None:
                finish(method, data, fixed, job.categories)
                with evaluation_mode(method):
                    figures = validation.run()
                if figures:
                    report({"step": step, "validation": figures})
            if job.validator is not None:  # every worker must, or none goes on
                context.report({**figures, PROGRESS: round(100 * step / job.iterations), WORKERS: context.group()})
        preempted = step % 20 == 0 and not warned and context.preempted()
        warned = warned or preempted
        if step % options.checkpoint_every == 0 or step == job.end or preempted:
            state = _state(trainer)
            context.report({"step": step}, state if report is not None else None)


def _state(trainer: Trainer) -> bytes:
    """Return the state of a training as a file's content; every worker must call this."""
    buffer = io.BytesIO()
    torch.save(trainer.state(), buffer)
    return buffer.getvalue()


def fixed_places(category: np.ndarray, count: int) -> list[EpochIndex]:
    """Return the images that `TrainedMethod.finalize` sees: the first of every category in turn, up to `count`."""
    nth = np.zeros(len(category), np.int64)
    for number in np.unique(category):
        mine = category == number
        nth[mine] = np.arange(mine.sum())
    return [(-1, int(index)) for index in np.lexsort((category, nth))[:count]]


def finish(method: TrainedMethod, data: TrainingSet, fixed: list[EpochIndex], categories: list[str]) -> None:
    """Call the method's own `finalize` with its images, if it wants any."""
    if not fixed:
        return
    size = 16
    with evaluation_mode(method), torch.inference_mode():
        batches = (
            to_input(data.batch(fixed[start : start + size], augment=False), method.device, method.input)
            for start in range(0, len(fixed), size)
        )
        method.finalize(batches, categories)


def _processes(method: TrainedMethod, options: TrainingOptions, job: Job) -> int:
    if options.data.processes is not None:
        return options.data.processes
    busy = method.batch_spec.synthetic is not None or method.batch_spec.augmentation.active or job.streams(method)
    return options.runtime.cpus_per_worker - 1 if busy else 0
