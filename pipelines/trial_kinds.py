"""How the trials of each kind of method are fitted: a memory bank on encoded images, or a training by Ray Train."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, SupportsFloat

import torch

from pipelines.banks import build_bank
from pipelines.encodings import EncodingReader, EncodingSet, encode_once
from pipelines.models import load_model
from pipelines.normals import WORK
from pipelines.proxy import ProxySet
from pipelines.readings import OBJECTIVE, PROGRESS, READINGS, Comparison, find_readings, latency, load_readings, memory
from pipelines.spaces import key_of
from pipelines.tracking import Run
from pipelines.training import Segment, make_method, plan_job, run_job
from pipelines.trials import REPORTS, Campaign, Fitted, Inside, read_reports
from unianom import files
from unianom.errors import DataError
from unianom.methods import METHODS, MemoryMethod
from unianom.methods.base import Embedding
from unianom.model import is_model

KEPT = "readings"
"""Folder of a trial for the readings of its trained model, until its record is written."""


# ------------------------------------------------------------------------------------------------------- memory methods
@dataclass(frozen=True)
class MemoryCampaign(Campaign):
    """A campaign of a memory method.

    Attributes:
        encodings: encoded images by `encoding_key`.
    """

    encodings: dict[str, EncodingSet] = field(default_factory=dict)

    def encoding_of(self, values: Mapping[str, Any]) -> EncodingSet:
        """The encoded images of a trial."""
        return self.encodings[encoding_key(values, self.name)]

    def fit(self, values: Mapping[str, Any], folder: str, inside: Inside) -> Fitted:
        return self._found(values, self.encoding_of(values))

    def tests(self, values: Mapping[str, Any], folder: str) -> EncodingSet:
        method = load_model(self.encoding_of(values).encoder, "cpu").method
        encodings = files.join(folder, "encodings")
        return encode_once(
            self.name,
            method.config,
            self.options,
            self.shards,
            self.categories,
            frozenset(),
            self.tests_for(method, folder),
            encodings,
        )

    def find_in_tests(self, values: Mapping[str, Any], tests: EncodingSet, device: str) -> Fitted:
        return self._found(values, tests)

    def _found(self, values: Mapping[str, Any], seen: EncodingSet) -> Fitted:
        method = fit_bank(self, values)
        readings = find_distances(self, method, EncodingReader(seen).compared(self.config_of(values)))
        return Fitted(method, readings, seen.proxy, latency(method), memory(method))


def encoding_key(values: Mapping[str, Any], name: str) -> str:
    """Trials of a memory method with the same key share encoded images."""
    method = METHODS[name]
    assert issubclass(method, MemoryMethod)
    return key_of({option: value for option, value in values.items() if not is_bank_option(method, option)})


def is_bank_option(method: type[MemoryMethod], option: str) -> bool:
    """Whether an option acts between network and bank."""
    return option in method.bank_options or option.split(".")[0] in method.bank_options


def fit_bank(campaign: MemoryCampaign, values: Mapping[str, Any]) -> MemoryMethod:
    """The method of a trial with its bank."""
    config = campaign.config_of(values)
    reader = EncodingReader(campaign.encoding_of(values))
    reader.method.bank, _ = build_bank(reader.bank_patches(config), config.bank)
    return reader.method


@torch.inference_mode()
def find_distances(
    campaign: MemoryCampaign, method: MemoryMethod, embeddings: Iterable[Embedding]
) -> dict[str, torch.Tensor]:
    """Readings of embedded images, with as many neighbours as any setting asks for."""
    plain = {"neighbours": campaign.config["neighbours"]}
    neighbours = max(setting.get("neighbours", plain["neighbours"]) for setting in campaign.settings)
    found = [method.find_patches(embedding, neighbours).readings for embedding in embeddings]
    return {name: torch.cat([readings[name] for readings in found]) for name in found[0]}


# ------------------------------------------------------------------------------------------------------ trained methods
class TrainedCampaign(Campaign):
    """A campaign of a method that is trained."""

    def fit(self, values: Mapping[str, Any], folder: str, inside: Inside) -> Fitted:
        proxy = self.train(values, folder, inside, None)
        readings, milliseconds = load_readings(files.join(folder, KEPT))
        method = load_model(trained_model(folder), "cpu").method
        return Fitted(method, readings, proxy, milliseconds, memory(method))

    def train(self, values: Mapping[str, Any], folder: str, inside: Inside, segment: Segment | None) -> str:
        """Train a trial, or a segment of it, unless that was done; URI of the validation images."""
        config, options = self.config_of(values), self.fit_options(values)
        work, kept = files.join(folder, WORK), files.join(folder, KEPT)
        with inside.alone():
            proxy = self.proxy_of(make_method(self.name, config))
        ended = is_model(trained_model(folder)) and files.exists(files.join(kept, READINGS))
        if ended or (segment is not None and files.exists(segment.state)):
            return proxy
        with inside.alone():
            job = plan_job(self.name, config, options, self.shards, self.categories, self.chosen, work)
        comparison = Comparison(proxy, self.validation.pixel_stride, self.objective, kept)
        reports = Reports(folder, job.iterations)
        run_job(replace(job, comparison=comparison, segment=segment), options, work, reports, "", inside.callbacks())
        files.remove(files.join(work, "checkpoints"))
        return proxy

    def tests(self, values: Mapping[str, Any], folder: str) -> str:
        model = trained_model(self.trial_folder(values))
        if not is_model(model):
            raise DataError(
                f"the models of the trials in {self.folder} were not kept, so they cannot be diagnosed; run the "
                f"campaign with --diagnose true from its start, in another output"
            )
        return self.tests_for(load_model(model, "cpu").method, folder)

    def find_in_tests(self, values: Mapping[str, Any], tests: str, device: str) -> Fitted:
        method = load_model(trained_model(self.trial_folder(values)), device).method
        batches = ProxySet(tests).batches(self.options.batch_size, method.input, method.device)
        readings = {name: value.cpu() for name, value in find_readings(method, batches).items()}
        return Fitted(method.to("cpu"), readings, tests, 0.0, memory(method))


class Reports(Run):
    """Keeps the validations that a training run records, in the trial's folder, so that they outlive its process.

    Args:
        folder: of the trial.
        iterations: of the run.
    """

    def __init__(self, folder: str, iterations: int) -> None:
        self._folder, self._iterations = folder, iterations
        self._lock = threading.Lock()

    def metrics(self, values: Mapping[str, SupportsFloat | None], step: int | None = None) -> None:
        told = {name.removeprefix("validation/"): value for name, value in values.items() if "validation/" in name}
        if OBJECTIVE not in told or step is None:
            return
        report = {PROGRESS: round(100 * step / self._iterations), **told}
        with self._lock:
            before = [old for old in read_reports(self._folder) if old[PROGRESS] < report[PROGRESS]]
            files.write_json(files.join(self._folder, REPORTS), [*before, report])


def trained_model(folder: str) -> str:
    """Model folder of a trained trial, where it is kept."""
    return files.join(folder, WORK, "trained")
