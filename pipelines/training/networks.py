"""Training a method on one or many workers: prepared data → Ray Train → last checkpoint → threshold → model folder.

    shards ─▶ pixels or frozen features, once ─▶ workers: batches, steps, checkpoints ─▶ trained model ─▶ scores of
    held-out normals ─▶ threshold ─▶ model folder

A run is a pure function of its options on one CPU worker: killed anywhere and started again with the same command, it
ends with the same weights. Ray Train keeps the checkpoints and restarts workers from the last one.
"""

from __future__ import annotations

import io
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.data.feature_cache import MASKS, PIXELS, Arrays, PreparedSet, learnable, prepare
from pipelines.data.reader import missing_masks
from pipelines.data.splits import TrainValSplit, choose_samples, held_out_record
from pipelines.runtime.actors import UNEXPECTED, RuntimeOptions, connect, raised_error, set_threads, told_error
from pipelines.runtime.cli import own_signals
from pipelines.runtime.errors import reason
from pipelines.runtime.models import load_model
from pipelines.runtime.progress import Progress
from pipelines.runtime.tracking import Run, scope
from pipelines.training.batches import (
    Batches,
    Companions,
    Order,
    Place,
    PreparedImages,
    ShardImages,
    TrainingImages,
    TrainingSet,
    descriptors,
    to_input,
)
from pipelines.training.options import WORK, FitOptions, FitResult
from pipelines.training.per_category import FitTask, fit_all, open_models, plan_fits, weights_digest
from pipelines.training.threshold import held_out_threshold
from pipelines.training.validation import PROGRESS, WORKERS, Validation, Validator, ValidatorConfig
from unianom import files
from unianom.data.schema import ANOMALOUS
from unianom.data.shards import Selection, ShardSet
from unianom.data.synthesis import Synthesiser, TextureSource
from unianom.errors import DataError, OptionError
from unianom.memory_limit import memory_limit
from unianom.methods import METHODS
from unianom.methods.trained import LOSS, BatchNeeds, TrainedMethod, TrainingBatch
from unianom.model import Model, is_model, versions
from unianom.serialise import from_plain, to_plain, with_values

STATE = "state.pt"
"""The one file of a checkpoint."""

ALL_PREPARED_BYTES = 32 << 30
"""Up to this size prepared images are kept, and frozen features; beyond it they are made anew in every epoch."""


@dataclass(frozen=True)
class DataOptions:
    """How images reach the network in training.

    Args:
        images: "prepared" decodes every image once and memory-maps the result; "stream" decodes row group after row
            group in every epoch, for corpora that do not fit the disk; null decides by size.
        frozen_features: compute what the frozen encoder makes of the images once and keep it; null does so where
            nothing but the encoder stands between image and features (no augmentation) and they take at most 32 GB,
            as one forward pass of one image tells.
        feature_precision: "half" or "full", of kept features.
        folder: where prepared images and features are kept for all runs; null takes `prepared` beside the output.
        processes: that load batches beside each worker; 0 is a thread; null takes as many as the worker's CPUs but
            one where images are decoded, changed or made.
        window: row groups that are shuffled together when streaming.
    """

    images: Literal["prepared", "stream"] | None = None
    frozen_features: bool | None = None
    feature_precision: Literal["half", "full"] = "half"
    folder: str | None = None
    processes: int | None = None
    window: int = 4

    def __post_init__(self) -> None:
        if self.window < 1 or (self.processes is not None and self.processes < 0):
            raise OptionError("data.window must be >= 1, data.processes >= 0")


@dataclass(frozen=True)
class Phase:
    """From some step on, other values of options of the method.

    Args:
        start: share of the training at which it begins, in (0, 1).
        method: the options that change, by dotted name, such as {training.learning_rate: 1e-3}; those of earlier phases
            go on.
    """

    start: float
    method: dict[str, Any]

    def __post_init__(self) -> None:
        if not 0 < self.start < 1 or not self.method:
            raise OptionError(f"phases: start={self.start} must be in (0, 1), and method name an option that changes")


@dataclass(frozen=True)
class TrainingOptions(FitOptions):
    """What training a method needs besides the method's own options.

    Args:
        precision: of forward and backward pass, "fp32" or "bf16" (autocast).
        compile: run the step through torch.compile.
        accumulate: forward and backward passes that make up a step, to save memory.
        checkpoint_every: steps between checkpoints.
        validate_every: steps between validations; null validates ten times a run, 0 never.
        validation_images: images of a validation, half of them normal, an even share of every category, but at least
            one of each.
        min_workers: let Ray shrink and regrow the run between this many workers and `runtime.workers`.
        max_failures: how often lost workers are replaced before the run fails; preempted nodes do not count.
        phases: options of the method that change while it is trained, in ascending order; what population-based
            training finds.
        data: how images reach the network.
        runtime: workers and their CPUs and GPUs; null workers train on one, and use all for what is computed once.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    accumulate: int = 1
    checkpoint_every: int = 500
    validate_every: int | None = None
    validation_images: int = 256
    min_workers: int | None = None
    max_failures: int = 3
    phases: tuple[Phase, ...] = ()
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate < 1 or self.checkpoint_every < 1 or self.validation_images < 2:
            raise OptionError("accumulate and checkpoint_every must be >= 1, validation_images >= 2")
        if (self.validate_every is not None and self.validate_every < 0) or self.max_failures < 0:
            raise OptionError("validate_every and max_failures must be >= 0")
        starts = [phase.start for phase in self.phases]
        if starts != sorted(set(starts)):
            raise OptionError(f"phases begin at {starts}; give them in ascending order")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise OptionError(f"min_workers={self.min_workers} must be in 1…{self.workers}, the runtime.workers")

    @property
    def workers(self) -> int:
        """Workers at most."""
        return self.runtime.workers or 1


class WorkersLostError(DataError):
    """Workers died more often than they may, or never came; not for what they were told to do."""


# ------------------------------------------------------------------------------------------------- a worker's loop
class _Step(nn.Module):
    """A method as what DDP and torch.compile wrap: batch in, losses out."""

    def __init__(self, method: TrainedMethod) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        return self.method.training_loss(batch)


class Trainer:
    """Takes the steps of one worker. Knows torch.distributed, not Ray.

    Args:
        method: on its device; the same on all workers.
        batches: this worker's.
        iterations: of the whole run.
        share: this worker's images of a step.
        precision, compile, accumulate: see `TrainingOptions`.
        phases: steps at which the method gets other options, ascending, and these options.

    Attributes:
        step: how many have been taken.
    """

    def __init__(
        self,
        method: TrainedMethod,
        batches: Batches,
        iterations: int,
        share: int,
        precision: str = "fp32",
        compile: bool = False,
        accumulate: int = 1,
        phases: Sequence[tuple[int, Any]] = (),
    ) -> None:
        self.method, self.iterations, self.step = method, iterations, 0
        self._phases, self._phase = phases, 0
        self._batches = batches
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        # DDP averages over workers, each of which has the mean over its own share; so uneven shares weigh as images
        self._weight = self._world / method.config.training.batch_size
        if share < accumulate:
            raise OptionError(
                f"method.training.batch_size={method.config.training.batch_size} on {self._world} workers leaves one "
                f"only {share} images; it must be at least {self._world * accumulate} (workers × accumulate)"
            )
        self._accumulate = accumulate
        self._autocast = precision == "bf16"
        self._optimisations = method.optimisers(iterations)
        self._parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
        module: nn.Module = _Step(method)
        if self._world > 1:
            devices = [method.device] if method.device.type == "cuda" else None
            # `finish` gives buffers another size on the first worker alone, so they are not kept equal; the model that
            # is saved is the first worker's
            module = DistributedDataParallel(module, device_ids=devices, forward_sync_buffers=False)
        self._module = module
        self._run = torch.compile(module) if compile else module
        torch.manual_seed(method.config.training.seed + rank)  # dropout and noise differ between workers

    def steps(self, end: int) -> Iterator[dict[str, Any]]:
        """Take steps up to `end`; after each, its losses as tensors, and the seconds spent on data and in all."""
        self.method.train()
        started = time.perf_counter()
        for batch in self._batches(self.step, end):
            ready = time.perf_counter()
            losses = self._take(to_input(batch, self.method.device, self.method.input))
            self.step += 1
            now = time.perf_counter()
            yield {"losses": losses, "data": ready - started, "all": now - started}
            started = time.perf_counter()

    def _adopt_phases(self) -> None:
        """Give the method the options of this step."""
        while self._phase < len(self._phases) and self._phases[self._phase][0] <= self.step:
            self.method.config = self._phases[self._phase][1]
            self._phase += 1
            for mine, fresh in zip(self._optimisations, self.method.optimisers(self.iterations), strict=True):
                rates = zip(mine.schedule.base_lrs, fresh.schedule.base_lrs, strict=True)
                for group, new, (before, after) in zip(
                    mine.optimiser.param_groups, fresh.optimiser.param_groups, rates, strict=True
                ):
                    # as far down the schedule as it was
                    now = group["lr"] * after / before if before else after
                    group.update({key: value for key, value in new.items() if key != "params"})
                    group["lr"] = now
                mine.schedule.base_lrs = fresh.schedule.base_lrs

    def _take(self, batch: TrainingBatch) -> dict[str, Tensor]:
        self._adopt_phases()
        self.method.begin_step(self.step, self.iterations)
        for optimisation in self._optimisations:
            optimisation.optimiser.zero_grad(set_to_none=True)
        total: dict[str, Tensor] = {}
        parts = batch.split(self._accumulate)
        for number, part in enumerate(parts):
            with self._no_sync() if number + 1 < len(parts) else nullcontext():
                with self._precision():
                    losses = self._run(part)
                (losses[LOSS] * (len(part) * self._weight)).backward()
            for name, value in losses.items():
                total[name] = total.get(name, torch.zeros_like(value)) + value.detach() * (len(part) / len(batch))
        clip = self.method.config.training.clip_norm
        if clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, clip)
        for optimisation in self._optimisations:
            optimisation.step(self.step)
        return total

    def _no_sync(self) -> AbstractContextManager[Any]:
        return self._module.no_sync() if isinstance(self._module, DistributedDataParallel) else nullcontext()

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.method.device.type, torch.bfloat16) if self._autocast else nullcontext()

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on; every worker must call it, for each has a random state."""
        mine = {"cpu": torch.get_rng_state()}
        if self.method.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(self.method.device)
        random: list[Any] = [mine]
        if self._world > 1:
            random = [None] * self._world
            dist.all_gather_object(random, mine)
        return {
            "step": self.step,
            "phase": self._phase,
            "method": self.method.state_dict(),
            "optimisers": [optimisation.optimiser.state_dict() for optimisation in self._optimisations],
            "schedules": [optimisation.schedule.state_dict() for optimisation in self._optimisations],
            "random": random,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; on another number of workers, those without a random state of their own get a new one."""
        self.step, self._phase = state["step"], state.get("phase", 0)
        if self._phase:
            self.method.config = self._phases[self._phase - 1][1]
        self.method.size_buffers(state["method"])
        self.method.load_state_dict(state["method"])
        for optimisation, optimiser, schedule in zip(
            self._optimisations, state["optimisers"], state["schedules"], strict=True
        ):
            optimisation.optimiser.load_state_dict(optimiser)
            optimisation.schedule.load_state_dict(schedule)
        rank = dist.get_rank() if dist.is_initialized() else 0
        if len(state["random"]) != self._world:
            torch.manual_seed(self.method.config.training.seed + rank + self._world * (self.step + 1))
            return
        torch.set_rng_state(state["random"][rank]["cpu"])
        if self.method.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"][rank]["cuda"], self.method.device)


@contextmanager
def undisturbed(method: TrainedMethod) -> Iterator[None]:
    """Evaluation mode in between; neither random state nor mode of training is changed by what happens inside."""
    devices = [method.device] if method.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        method.eval()
        try:
            yield
        finally:
            method.train()


def phase_configs(config: Any, phases: Sequence[Phase], method: type, iterations: int) -> list[tuple[int, Any]]:
    """Steps at which phases begin, and the method's options from there on.

    Raises:
        OptionError: options that cannot change while the method is trained, or that it refuses.
    """
    found = []
    for phase in phases:
        fixed = [name for name in phase.method if name not in method.changing_options]  # type: ignore[attr-defined]
        if fixed:
            known = ", ".join(method.changing_options)  # type: ignore[attr-defined]
            raise OptionError(f"phases: {fixed[0]} cannot change while the method is trained; these can: {known}")
        config = with_values(config, phase.method)
        found.append((round(phase.start * iterations), config))
    return found


# --------------------------------------------------------------------------------------------------- a worker's job
@dataclass(frozen=True)
class Segment:
    """A part of a training run.

    Attributes:
        start: file of the state that it goes on from; None for the beginning.
        end: step that it ends at.
        state: file for the state there.
    """

    start: str | None
    end: int
    state: str


@dataclass(frozen=True)
class Job:
    """Everything a worker is told; plain data, but for the shard set.

    Attributes:
        name, config: the method, and its options as plain data.
        shards, categories: the corpus.
        images: URI of the `TrainingImages`.
        held_out: sample_ids for validation.
        pixels, features: URIs of prepared sets, or None.
        feature_names: arrays of the latter.
        iterations: of the run.
        output: where the trained model goes.
        options: the rest.
        validator: in a trial of a campaign, what it is compared on with others; None in other runs.
        segment: of population-based training, the part of the run to do; None for all.
    """

    name: str
    config: dict[str, Any]
    shards: ShardSet
    categories: list[str]
    images: str
    held_out: frozenset[str]
    pixels: str | None
    features: str | None
    feature_names: tuple[str, ...]
    iterations: int
    output: str
    options: TrainingOptions
    validator: ValidatorConfig | None = None
    segment: Segment | None = None

    @property
    def end(self) -> int:
        """The step to train up to."""
        return self.iterations if self.segment is None else self.segment.end

    def phases(self) -> list[tuple[int, Any]]:
        """Steps at which the method gets other options, and these.

        Raises:
            OptionError: they cannot change while it is trained, or the method refuses them.
        """
        return phase_configs(self.make().config, self.options.phases, METHODS[self.name], self.iterations)

    def make(self) -> TrainedMethod:
        """The method with its initial weights, the same in every process."""
        return make_method(self.name, from_plain(METHODS[self.name].Config, self.config))

    def streams(self, method: TrainedMethod) -> bool:
        """Whether images are decoded anew in every epoch."""
        return self.pixels is None and wants_pixels(method.needs, self.features is not None)

    def data(self, method: TrainedMethod, copies: Path) -> tuple[TrainingSet, TrainingImages]:
        """What makes the batches."""
        images = TrainingImages.load(self.images)
        needs, options, parts = method.needs, self.options, self.shards.parts
        pixels: ShardImages | PreparedImages | None = None
        if self.pixels is not None:
            names = (PIXELS, MASKS) if needs.masks else (PIXELS,)
            pixels = PreparedImages(Arrays(self.pixels, parts, names, copies), images)
        elif self.streams(method):
            pixels = ShardImages(
                self.shards,
                self.categories,
                images,
                method.input,
                options.limits,
                2 * options.data.window,
                needs.labels,
                needs.masks,
            )
        features = None if self.features is None else Arrays(self.features, parts, self.feature_names, copies)
        companions = None
        if needs.prompts or needs.synthetic:
            near = None
            if needs.prompts == "nearest":
                assert self.features is not None
                near = descriptors(self.features, parts, images, copies)
            companions = Companions(images, isinstance(pixels, ShardImages), near)
        synthesiser = synthesiser_of(method)
        seed = method.config.training.seed
        return (
            TrainingSet(images, self.categories, needs, pixels, features, companions, synthesiser, seed),
            images,
        )


def make_method(name: str, config: Any) -> TrainedMethod:
    """A trained method with its initial weights, the same in every process."""
    method_class = METHODS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        with memory_limit(f"--method: {name}"):
            method = method_class(config)
    assert isinstance(method, TrainedMethod)
    return method


def wants_pixels(needs: BatchNeeds, features: bool) -> bool:
    """Whether batches take more than frozen features, if these are kept, to make."""
    return not features or needs.images or needs.masks or needs.synthetic is not None


def synthesiser_of(method: TrainedMethod) -> Synthesiser | None:
    """What makes a method's synthetic anomalies; None if it needs none.

    Raises:
        DataError: the folder of textures is missing or holds no image.
    """
    config = method.needs.synthetic
    if config is None or config.textures is None:
        return None if config is None else Synthesiser(config)
    try:
        return Synthesiser(config, TextureSource(config.textures, method.input.side))
    except DataError as error:
        raise DataError(f"--method.synthesis.textures: {error}") from error


class Events:
    """Passes what the workers tell to the driver. A Ray actor."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._failure: list[str] | None = None
        self._first: list[str] | None = None

    def put(self, event: dict[str, Any]) -> None:
        """Tell something."""
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """What was told since the last call."""
        taken, self._events = self._events, []
        return taken

    def fail(self, told: list[str], final: bool) -> None:
        """Tell a failure as `told_error` gives it; a `final` one only the user can mend: the run is not tried again.

        Of others the first is kept: those of other workers come of it.
        """
        if final:
            self._failure = self._failure or told
        else:
            self._first = self._first or told

    def failure(self) -> list[str] | None:
        """The final failure."""
        return self._failure

    def first(self) -> list[str] | None:
        """The first failure that was not final."""
        return self._first


def train_worker(given: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    events = given["events"]
    if ray.get(events.failure.remote()) is not None:
        return  # a restart would fail again
    try:
        _work(given["job"], lambda event: events.put.remote(event))
    except Exception as error:
        told = told_error(error)
        ray.get(events.fail.remote(told, told[0] != UNEXPECTED))
        raise


def _work(job: Job, tell: Callable[[dict[str, Any]], Any]) -> None:
    context = ray.train.get_context()
    options = job.options
    set_threads(options.runtime.cpus_per_worker)
    device = ray.train.torch.get_device() if options.runtime.gpus_per_worker else torch.device("cpu")
    method = job.make().to(device)
    if options.runtime.gpus_per_worker:
        torch.set_float32_matmul_precision("high" if options.precision == "bf16" else "highest")
    with tempfile.TemporaryDirectory(prefix="unianom-train-") as folder:
        data, images = job.data(method, Path(folder))
        training = method.config.training
        groups = None
        if job.streams(method):
            groups = np.unique(np.stack([images.part, images.group], axis=1), axis=0, return_inverse=True)[1].ravel()
        order = Order(
            len(images),
            training.seed,
            training.batch_size,
            context.get_world_rank(),
            context.get_world_size(),
            groups,
            options.data.window,
        )
        processes, repeats = _processes(method, options, job), method.needs.repeats
        batches = Batches(data, order, processes, pin=device.type == "cuda", repeats=repeats)
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
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as directory:
                trainer.restore(torch.load(Path(directory) / STATE, map_location="cpu", weights_only=True))
        elif job.segment is not None and job.segment.start is not None:
            content = io.BytesIO(files.read_bytes(job.segment.start))
            trainer.restore(torch.load(content, map_location="cpu", weights_only=True))
        first = context.get_world_rank() == 0
        if first and trainer.step:
            tell({"step": trainer.step, "note": f"continuing at step {trainer.step}"})
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
        _loop(trainer, data, fixed, validation, job, tell if first else None)
        if job.end < job.iterations:
            state = trainer.state()  # of every worker
            if first:
                assert job.segment is not None
                buffer = io.BytesIO()
                torch.save(state, buffer)
                files.write_bytes(job.segment.state, buffer.getvalue())
        elif first:
            method.config = job.make().config  # as asked for, whatever phases made of it
            finish(method, data, fixed, job.categories)
            with undisturbed(method):
                validation.cache_outputs()
            Model(method, job.categories).save(job.output)
        ray.train.report({"step": trainer.step})  # nobody leaves before the model is written


def _loop(
    trainer: Trainer,
    data: TrainingSet,
    fixed: list[Place],
    validation: Validator,
    job: Job,
    tell: Callable[[dict[str, Any]], Any] | None,
) -> None:
    """Steps with what happens between them: telling, validating, checkpoints."""
    options, method = job.options, trainer.method
    every = options.validate_every
    validate_every = max(1, job.iterations // 10) if every is None else every
    log_every = max(1, min(50, job.iterations // 20))
    seconds = {"data": 0.0, "all": 0.0}
    count, warned = 0, False
    for told in trainer.steps(job.end):
        step = trainer.step
        seconds["data"] += told["data"]
        seconds["all"] += told["all"]
        count += 1
        if step % log_every == 0 or step == job.end:
            waited = time.perf_counter()
            losses = {name: float(value) for name, value in told["losses"].items()}  # waits for the device
            seconds["all"] += time.perf_counter() - waited
            if not all(math.isfinite(value) for value in losses.values()):
                raise DataError(
                    f"the loss is not finite at step {step} ({losses}); lower --method.training.learning_rate, or "
                    f"take --precision fp32"
                )
            if tell is not None:
                images = count * method.config.training.batch_size
                rates = {
                    "images_per_second": images / seconds["all"],
                    "step_seconds": seconds["all"] / count,
                    "data_share": seconds["data"] / seconds["all"],
                }
                tell({"step": step, "losses": losses, "rates": rates})
            seconds, count = {"data": 0.0, "all": 0.0}, 0
        if validate_every and (step % validate_every == 0 or step == job.end):
            figures: dict[str, float] = {}
            if tell is not None:
                finish(method, data, fixed, job.categories)
                with undisturbed(method):
                    figures = validation.run()
                if figures:
                    tell({"step": step, "validation": figures})
            if job.validator is not None:  # every worker must, or none goes on
                ray.train.report({**figures, PROGRESS: round(100 * step / job.iterations), WORKERS: _workers()})
        preempted = step % 20 == 0 and not warned and ray.train.get_preemption_info() is not None
        warned = warned or preempted
        if step % options.checkpoint_every == 0 or step == job.end or preempted:
            save_checkpoint(trainer, first=tell is not None)


def _workers() -> str:
    """Placement group of the workers of this training, as text; empty outside of Ray."""
    group = ray.util.get_current_placement_group() if ray.is_initialized() else None
    return "" if group is None else group.id.hex()


def save_checkpoint(trainer: Trainer, first: bool) -> None:
    """Report the state to Ray Train; every worker must."""
    state = trainer.state()
    with tempfile.TemporaryDirectory(prefix="unianom-checkpoint-") as folder:
        if first:
            torch.save(state, Path(folder) / STATE)
        checkpoint = Checkpoint.from_directory(folder) if first else None
        ray.train.report({"step": trainer.step}, checkpoint=checkpoint)


def fixed_places(category: np.ndarray, count: int) -> list[Place]:
    """The images that `TrainedMethod.finish` sees: the first of every category in turn, up to `count`."""
    nth = np.zeros(len(category), np.int64)
    for number in np.unique(category):
        mine = category == number
        nth[mine] = np.arange(mine.sum())
    return [(-1, int(index)) for index in np.lexsort((category, nth))[:count]]


def finish(method: TrainedMethod, data: TrainingSet, fixed: list[Place], categories: list[str]) -> None:
    """Call the method's own `finish` with its images, if it wants any."""
    if not fixed:
        return
    size = 16
    with undisturbed(method), torch.inference_mode():
        batches = (
            to_input(data.batch(fixed[start : start + size], augment=False), method.device, method.input)
            for start in range(0, len(fixed), size)
        )
        method.finish(batches, categories)


def _processes(method: TrainedMethod, options: TrainingOptions, job: Job) -> int:
    if options.data.processes is not None:
        return options.data.processes
    busy = method.needs.synthetic is not None or method.needs.augmentation.active or job.streams(method)
    return options.runtime.cpus_per_worker - 1 if busy else 0


# -------------------------------------------------------------------------------------------------------- the driver
def train_networks(name: str, config: Any, options: TrainingOptions, run: Run) -> list[FitResult]:
    """Train one model for all categories, or one each.

    Args:
        name: a trained method.
        config: its options.
        options: data, output and the rest.
        run: where losses and validations are recorded.

    Raises:
        DataError, OptionError, WeightsError: wrong inputs; nothing is lost, the same command continues.
    """
    tasks = plan_trainings(name, config, options)
    with open_models(tasks, options):
        return train_planned(name, tasks, options, run)


def plan_trainings(name: str, config: Any, options: TrainingOptions) -> list[FitTask]:
    """Plan what `train_networks` trains; arguments and errors are the same."""
    needs = make_method(name, config).needs
    weights = cache(weights_digest)

    def describe(own: Any, shards: ShardSet, categories: list[str]) -> tuple[TrainValSplit, str, dict[str, Any]]:
        own_needs = needs if own == config else make_method(name, own).needs
        chosen, notice = choose_samples(shards, categories, options.split, validate=True, labels=own_needs.labels)
        if own_needs.masks:
            check_masks(shards, categories)
        plan = {
            "method": name,
            "config": to_plain(own),
            "shards": shards.digest,
            "categories": categories,
            "few_shot": options.few_shot,
            "seed": options.seed,
            "threshold": to_plain(options.threshold),
            "limits": to_plain(options.limits),
            "precision": options.precision,
            "accumulate": options.accumulate,
            "frozen_features": options.data.frozen_features,
            "feature_precision": options.data.feature_precision,
            "images": options.data.images,
            "window": options.data.window,
            "device": options.runtime.device,
            "weights": weights(own.backbone.weights),
            **({"phases": to_plain(options.phases)} if options.phases else {}),
        }
        return chosen, notice, plan

    return plan_fits(config, options, describe, needs.labels)


def train_planned(name: str, tasks: Sequence[FitTask], options: TrainingOptions, run: Run) -> list[FitResult]:
    """Train what `plan_trainings` planned, in folders that are claimed."""
    return fit_all(tasks, options, partial(_train, name, options, run))


def _train(name: str, options: TrainingOptions, run: Run, task: FitTask, digest: str) -> FitResult:
    config, shards, categories, output = task.config, task.shards, task.categories, task.output
    chosen, notice = task.chosen, task.notice
    if is_model(output):
        return _result(load_model(output, "cpu"), output, fresh=False)
    needs = make_method(name, config).needs
    prefix = f"{scope(categories[0])}/" if options.per_category else ""
    connect(options.runtime)
    work = files.join(output, WORK)
    trained = files.join(work, "trained")
    if not is_model(trained):
        job = plan_job(name, config, options, shards, categories, chosen, work)
        run_job(job, options, work, run, prefix)
    model = load_model(trained, "cpu")
    scored = frozenset() if notice else chosen.held_out
    threshold = held_out_threshold(model, files.join(work, "fitted"), shards, scored, options)
    provenance = {
        "plan_digest": digest,
        "shards": {"uri": shards.uri, "digest": shards.digest},
        "training": {
            "images": len(chosen.learn),
            "anomalous": len(chosen.anomalous),
            "iterations": config.training.steps(len(chosen.learn), needs.repeats),
            "workers": options.workers,
            "precision": options.precision,
            "phases": to_plain(options.phases),
        },
        "held_out_normals": len(chosen.held_out),
        "held_out": held_out_record(shards, categories, options.split),
        "notice": notice,
        "seeds": {"split": options.seed, "training": config.training.seed},
        "few_shot": options.few_shot,
        "device": options.runtime.device,
        "versions": versions(),
    }
    final = Model(model.method, categories, threshold, provenance)
    final.save(output)
    files.remove(work)
    return _result(final, output, fresh=True)


def _result(model: Model, output: str, fresh: bool) -> FitResult:
    made = model.provenance["training"]
    anomalous = made.get("anomalous", 0)  # models of before have none
    kinds = f"{made['images'] - anomalous} normal" + (f" and {anomalous} anomalous" if anomalous else "")
    return FitResult(
        folder=output,
        categories=model.categories,
        fresh=fresh,
        summary=f"{made['iterations']} steps on {kinds} images",
        metrics={"images": made["images"], "iterations": made["iterations"]},
        threshold=model.threshold,
        notice=model.provenance["notice"],
    )


def plan_job(
    name: str,
    config: Any,
    options: TrainingOptions,
    shards: ShardSet,
    categories: list[str],
    chosen: TrainValSplit,
    work: str,
) -> Job:
    """Prepare what is computed once, and write down which images are learned from."""
    method = make_method(name, config)
    needs = method.needs
    images = TrainingImages.choose(shards, categories, chosen.learn, needs.labels)
    places = files.join(work, "images.parquet")
    images.save(places)
    job = Job(
        name=name,
        config=to_plain(config),
        shards=shards,
        categories=categories,
        images=places,
        held_out=chosen.held_out,
        pixels=None,
        features=None,
        feature_names=(),
        iterations=config.training.steps(len(images), needs.repeats),
        output=files.join(work, "trained"),
        options=options,
    )
    job.phases()  # wrong options, and
    synthesiser_of(method)  # a wrong folder of textures shows now, before hours of work
    folder = files.full_uri(options.data.folder or files.beside(options.output, "prepared"))
    rows = shards.count(learnable(categories, needs.labels))
    features = keeps_features(method, options.data, rows)

    def prepared(runtime: RuntimeOptions, encoder: TrainedMethod | None) -> PreparedSet:
        return prepare(
            shards,
            categories,
            method.input,
            folder,
            options.limits,
            runtime,
            encoder,
            None if encoder is None else {**encoder.feature_key(), "weights": weights_digest(config.backbone.weights)},
            options.data.feature_precision == "half",
            options.batch_size,
            needs.labels,
            needs.masks and encoder is None,
        )

    if features:
        made = prepared(options.runtime, method)
        job = replace(job, features=made.uri, feature_names=made.names)
    size = rows * (4 if needs.masks else 3) * method.input.side**2
    keep_pixels = options.data.images == "prepared" or (options.data.images is None and size <= ALL_PREPARED_BYTES)
    if keep_pixels and wants_pixels(needs, features):
        job = replace(job, pixels=prepared(replace(options.runtime, gpus_per_worker=0), None).uri)
    return job


def check_masks(shards: ShardSet, categories: list[str]) -> None:
    """Refuse anomalous training images without a mask, before any work.

    Raises:
        DataError: there are some; names the first.
    """
    without: list[str] = []
    for part in shards.parts:
        for batch in shards.read(part, Selection(("train",), tuple(categories), (ANOMALOUS,)), ["sample_id", "mask"]):
            without += batch.filter(batch["mask"].is_null())["sample_id"].to_pylist()
    if without:
        raise DataError(missing_masks(without))


def keeps_features(method: TrainedMethod, data: DataOptions, images: int) -> bool:
    """Whether frozen features are computed once.

    Args:
        method: whose features.
        data: what is asked for.
        images: how many there are to keep features of.

    Raises:
        OptionError: they are asked for where augmentation makes that impossible, or not, where prompts need them.
    """
    augmented = method.needs.augmentation.active
    if data.frozen_features and augmented:
        raise OptionError(
            "data.frozen_features needs images that do not change; empty method.augmentation, or leave it out"
        )
    features = data.frozen_features
    if features is None:
        features = not augmented and images * feature_bytes(method, data) <= ALL_PREPARED_BYTES
    if method.needs.prompts == "nearest" and not features:
        raise OptionError("prompts by nearest features need --data.frozen_features true")
    return features


def feature_bytes(method: TrainedMethod, data: DataOptions) -> int:
    """What the frozen features of an image take, from a forward pass of one."""
    side = method.input.side
    with undisturbed(method), torch.inference_mode():
        features = method.frozen_features(torch.zeros(1, 3, side, side, device=method.device))
    return sum(value.numel() for value in features.values()) * (2 if data.feature_precision == "half" else 4)


def run_job(
    job: Job, options: TrainingOptions, work: str, run: Run, prefix: str, callbacks: Sequence[Any] = ()
) -> None:
    """Ray Train from start, or from the last checkpoint, to end."""
    resources: dict[str, float] = {"CPU": options.runtime.cpus_per_worker}
    if options.runtime.gpus_per_worker:
        resources["GPU"] = options.runtime.gpus_per_worker
    _check_resources(options)
    workers = options.workers
    events: Any = ray.remote(num_cpus=0)(Events).remote()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "events": events},
        scaling_config=ScalingConfig(
            num_workers=workers if options.min_workers is None else (options.min_workers, workers),  # type: ignore[arg-type]
            use_gpu=bool(options.runtime.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=work,
            failure_config=FailureConfig(max_failures=options.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[*callbacks],
        ),
    )
    report = _Report(events, job.iterations, run, prefix)
    try:
        with own_signals():
            trainer.fit()
    except KeyboardInterrupt:
        report.stop()
        raise
    except Exception as error:  # Ray wraps what a worker raised, in ways that differ by what else went wrong
        report.close()
        failure, first = ray.get([events.failure.remote(), events.first.remote()])
        if failure is not None:
            raise raised_error(failure) from error
        if first is not None:
            worker = raised_error(first)
            raise WorkersLostError(f"training failed: {reason(worker)}; the same command continues it") from worker
        raise WorkersLostError(f"training failed: {reason(error)}; the same command continues it") from error
    report.close()
    failure = ray.get(events.failure.remote())
    if failure is not None:
        raise raised_error(failure)


def _check_resources(options: TrainingOptions) -> None:
    """Ray Train would wait for ever for workers that the cluster cannot hold."""
    need = options.min_workers or options.workers
    if options.runtime.pool_size(need) < need:
        raise OptionError(
            f"{need} workers of {options.runtime.cpus_per_worker} CPUs and {options.runtime.gpus_per_worker:g} GPUs "
            f"do not fit this Ray; lower --runtime.workers, or --min_workers"
        )


class _Report:
    """Shows and records what the workers tell, while training runs."""

    def __init__(self, events: Any, iterations: int, run: Run, prefix: str) -> None:
        self._events, self._run, self._prefix = events, run, prefix
        self._progress = Progress("train", iterations, "steps")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._ended.wait(1.0):
            self._pass_on()

    def _pass_on(self) -> None:
        for event in ray.get(self._events.take.remote()):
            step = event["step"]
            named = {
                **{f"loss/{name}" if name != LOSS else LOSS: value for name, value in event.get("losses", {}).items()},
                **event.get("rates", {}),
                **{f"validation/{name}": value for name, value in event.get("validation", {}).items()},
            }
            self._run.metrics({self._prefix + name: value for name, value in named.items()}, step)
            if "note" in event:
                self._progress.note(event["note"])
            elif "losses" in event:
                self._progress.set(step, _words(event["losses"], event["rates"]))
            else:
                figures = ", ".join(f"{name} {value:.4g}" for name, value in event["validation"].items())
                self._progress.note(f"step {step}: validation {figures}")

    def stop(self) -> None:
        """Ask the workers no more."""
        self._ended.set()
        self._thread.join()

    def close(self) -> None:
        """The last words."""
        self.stop()
        self._pass_on()
        self._progress.close()


def _words(losses: dict[str, float], rates: dict[str, float]) -> str:
    named = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    return (
        f"{named}, {rates['images_per_second']:.1f} images/s, step {1000 * rates['step_seconds']:.0f} ms "
        f"({100 * rates['data_share']:.0f} % waiting for data)"
    )
