"""What any job takes: workers, and where MLflow records it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from unianom.execution import Execution
from unianom.options import AtLeastOne, NotNegative, Options, ValueRefused


@dataclass(frozen=True)
class RuntimeOptions(Options):
    """How much of the cluster a job takes.

    Args:
        local: true works on threads of this process, without Ray, false on Ray; null works in this process where no
            cluster is given and there are no more than 1,000 images. Results are the same.
        workers: threads or worker processes; null takes as many as the CPUs, or GPUs, allow. A cluster with an
            autoscaler grows to the number given; null takes those that are there, or one.
        cpus_per_worker: CPUs, and so threads, of each. Results depend on it in their last bits, on `workers` never.
        gpus_per_worker: GPUs of each; 0 runs on CPUs. Fractions share a GPU.
        stages: where a network runs over images, "fused" reads, computes and writes in each worker; "separate" has CPUs
            anywhere in the cluster read and write for the workers that compute, as GPUs need; "auto" is "separate" with
            GPUs on Ray, else "fused". Results are the same.
        local_cpus: CPUs to use of this machine where no cluster is given; null takes all.
        engine: what computes frozen encoders: "pytorch", or on CPUs "openvino" (in float32: features differ by 1e-5 of
            the largest at most) or "openvino_bf16" (in bfloat16, which changes scores); "auto" takes what the job
            chooses, of those that compute in float32.
    """

    usual = ("local", "workers", "gpus_per_worker")

    local: bool | None = None
    workers: AtLeastOne | None = None
    cpus_per_worker: AtLeastOne = 1
    gpus_per_worker: NotNegative = 0
    stages: Literal["auto", "fused", "separate"] = "auto"
    local_cpus: AtLeastOne | None = None
    engine: Literal["auto", "pytorch", "openvino", "openvino_bf16"] = "auto"

    def check(self) -> None:
        if self.gpus_per_worker and self.engine not in ("auto", "pytorch"):
            raise ValueRefused(f"engine={self.engine} runs on CPUs; leave out gpus_per_worker, or take pytorch")
        if self.stages == "separate" and self.local:
            raise ValueRefused("stages=separate needs Ray; leave out local, or take fused")

    @property
    def device(self) -> str:
        """Device that networks run on."""
        return "cuda" if self.gpus_per_worker else "cpu"

    @property
    def execution(self) -> Execution:
        """How models are run; by PyTorch where the job has chosen no engine."""
        return Execution(self.device, "pytorch" if self.engine == "auto" else self.engine)


@dataclass(frozen=True)
class TrackingOptions(Options):
    """Where a job's parameters, metrics and figures are recorded.

    Args:
        mlflow_uri: MLflow tracking URI; null takes MLFLOW_TRACKING_URI, else the SQLite file `mlflow.db` in the
            folder that holds the job's output. Artifacts of an SQLite store lie in `mlartifacts` beside it.
        experiment: MLflow experiment that the job's run belongs to.
        enabled: record the job in MLflow; false records nothing.
    """

    usual = ("enabled",)

    mlflow_uri: str | None = None
    experiment: str = "unianom"
    enabled: bool = True

    def check(self) -> None:
        if not self.experiment.strip():
            raise ValueRefused("experiment is empty; give it a name")


@dataclass(frozen=True)
class DemoOptions(Options):
    """Draw a corpus, inspect it with PatchCore and UniFormaly, and report on both side by side.

    Args:
        output: folder for everything; a second run continues there.
        seed: of the corpus.
        overwrite: replace what another demo, such as an earlier version's, left in the output.
        runtime: workers and their CPUs.
        tracking: where MLflow records training, evaluation and report.
    """

    output: str = "demo"
    seed: int = 0
    overwrite: bool = False
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    tracking: TrackingOptions = field(default_factory=lambda: TrackingOptions(enabled=False))
