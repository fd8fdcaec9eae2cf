"""Training in the job's own process, by one worker and without Ray."""

from __future__ import annotations

from pipelines.runtime.run_record import Run
from pipelines.runtime.task_worker import torch_threads
from pipelines.runtime.tasks import runs_here
from pipelines.training.context import LocalContext
from pipelines.training.job import Job
from pipelines.training.options import TrainingOptions
from pipelines.training.report import TrainingReport
from pipelines.training.trainer import STATE
from pipelines.training.worker import work
from unianom import files
from unianom.errors import OptionError


def trains_here(options: TrainingOptions, images: int) -> bool:
    """Return whether a training on so many images runs in this process.

    Raises:
        OptionError: it is to, and on several workers.
    """
    if options.workers > 1:
        if options.runtime.local:
            raise OptionError(
                f"--runtime.local true trains by one worker; give --runtime.workers 1, or leave it out to train by "
                f"{options.workers} on Ray"
            )
        return False
    return runs_here(options.runtime, images)


def run_job_here(job: Job, options: TrainingOptions, work_folder: str, run: Run, prefix: str) -> None:
    """Train from the start, or from the last checkpoint, to the end, with the same weights as on Ray.

    Args:
        job: what to train.
        options: of the training.
        work_folder: folder of unfinished work, where the checkpoint lies.
        run, prefix: where losses and validations are recorded.

    Raises:
        UnianomError: for the user.
    """
    report = TrainingReport(job.iterations, run, prefix)
    with torch_threads():
        work(job, report.put, LocalContext(files.join(work_folder, STATE)))
    report.close()
