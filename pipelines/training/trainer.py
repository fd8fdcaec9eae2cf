"""The steps of a training: PyTorch alone, no Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.training.dataset import to_input
from pipelines.training.loader import BatchLoader
from pipelines.training.options import Phase
from unianom.errors import OptionError
from unianom.methods.trained import LOSS, TrainedMethod, TrainingBatch
from unianom.options import with_values

STATE = "state.pt"
"""The one file of a checkpoint."""


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
        batches: BatchLoader,
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
        self._optimisations = method.optimizers(iterations)
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
            losses = self._train_step(to_input(batch, self.method.device, self.method.input))
            self.step += 1
            now = time.perf_counter()
            yield {"losses": losses, "data": ready - started, "all": now - started}
            started = time.perf_counter()

    def _adopt_phases(self) -> None:
        """Give the method the options of this step."""
        while self._phase < len(self._phases) and self._phases[self._phase][0] <= self.step:
            self.method.config = self._phases[self._phase][1]
            self._phase += 1
            for mine, fresh in zip(self._optimisations, self.method.optimizers(self.iterations), strict=True):
                rates = zip(mine.schedule.base_lrs, fresh.schedule.base_lrs, strict=True)
                for group, new, (before, after) in zip(
                    mine.optimiser.param_groups, fresh.optimiser.param_groups, rates, strict=True
                ):
                    # as far down the schedule as it was
                    now = group["lr"] * after / before if before else after
                    group.update({key: value for key, value in new.items() if key != "params"})
                    group["lr"] = now
                mine.schedule.base_lrs = fresh.schedule.base_lrs

    def _train_step(self, batch: TrainingBatch) -> dict[str, Tensor]:
        self._adopt_phases()
        self.method.on_step_start(self.step, self.iterations)
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
        """Return all that the rest of the run depends on; every worker must call it, for each has a random state."""
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
def evaluation_mode(method: TrainedMethod) -> Iterator[None]:
    """Keep a method in evaluation mode in between; neither random state nor mode of training is changed by what happens
    inside."""
    devices = [method.device] if method.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        method.eval()
        try:
            yield
        finally:
            method.train()


def phase_configs(config: Any, phases: Sequence[Phase], method: type, iterations: int) -> list[tuple[int, Any]]:
    """Return steps at which phases begin, and the method's options from there on.

    Raises:
        OptionError: options that cannot change while the method is trained, or that it refuses.
    """
    found = []
    for phase in phases:
        fixed = [name for name in phase.method if name not in method.schedulable_options]  # type: ignore[attr-defined]
        if fixed:
            known = ", ".join(method.schedulable_options)  # type: ignore[attr-defined]
            raise OptionError(f"phases: {fixed[0]} cannot change while the method is trained; these can: {known}")
        config = with_values(config, phase.method)
        found.append((round(phase.start * iterations), config))
    return found
