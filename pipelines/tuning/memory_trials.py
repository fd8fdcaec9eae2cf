"""Trials of a memory method: a bank on images encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipelines.runtime.models import load_memory_method, memory_method_class
from pipelines.training.memory_bank import build_bank
from pipelines.tuning.encodings import EncodedImages, encode_once
from pipelines.tuning.objective import latency, memory
from pipelines.tuning.space import key_of
from pipelines.tuning.trial import Campaign, FittedTrial, TrialContext
from unianom import files
from unianom.execution import CPU, Execution
from unianom.methods import MaskedPatches, MemoryMethod


@dataclass(frozen=True)
class MemoryCampaign(Campaign):
    """A campaign of a memory method.

    Attributes:
        encodings: encoded images by `encoding_key`.
    """

    encodings: dict[str, EncodedImages] = field(default_factory=dict)

    def encoding_of(self, values: Mapping[str, Any]) -> EncodedImages:
        """Return the encoded images of a trial."""
        return self.encodings[encoding_key(values, self.name)]

    def fit(self, values: Mapping[str, Any], folder: str, context: TrialContext) -> FittedTrial:
        return self._found(values, self.encoding_of(values))

    def tests(self, values: Mapping[str, Any], folder: str) -> EncodedImages:
        method = load_memory_method(self.encoding_of(values).encoder, CPU)
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

    def find_in_tests(self, values: Mapping[str, Any], tests: EncodedImages, execution: Execution) -> FittedTrial:
        return self._found(values, tests)

    def _found(self, values: Mapping[str, Any], encoded: EncodedImages) -> FittedTrial:
        method = fit_bank(self, values)
        raw_outputs = find_distances(self, method, encoded.compared_patches(method, self.config_of(values)))
        return FittedTrial(method, raw_outputs, encoded.validation_set, latency(method), memory(method))


def encoding_key(values: Mapping[str, Any], name: str) -> str:
    """Return a key that trials of a memory method have in common if they share encoded images."""
    method = memory_method_class(name)
    return key_of({option: value for option, value in values.items() if not is_bank_option(method, option)})


def is_bank_option(method: type[MemoryMethod], option: str) -> bool:
    """Return whether an option acts between network and bank."""
    return option in method.bank_options or option.split(".")[0] in method.bank_options


def fit_bank(campaign: MemoryCampaign, values: Mapping[str, Any]) -> MemoryMethod:
    """Return the method of a trial with its bank."""
    config, encoded = campaign.config_of(values), campaign.encoding_of(values)
    method = load_memory_method(encoded.encoder, CPU)
    method.bank, _ = build_bank(encoded.bank_patches(method, config), config.bank)
    return method


@torch.inference_mode()
def find_distances(
    campaign: MemoryCampaign, method: MemoryMethod, embeddings: Iterable[MaskedPatches]
) -> dict[str, torch.Tensor]:
    """Return the raw outputs of embedded images, with as many neighbours as any setting asks for."""
    plain = {"neighbours": campaign.config["neighbours"]}
    neighbours = max(setting.get("neighbours", plain["neighbours"]) for setting in campaign.settings)
    found = [method.search_bank(embedding, neighbours).tensors for embedding in embeddings]
    return {name: torch.cat([tensors[name] for tensors in found]) for name in found[0]}
