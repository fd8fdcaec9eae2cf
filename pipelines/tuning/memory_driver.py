"""Runs campaigns of memory methods: images are encoded once for all banks."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.data.validation_set import ValidationSet
from pipelines.runtime.run_record import Run
from pipelines.tuning.dimensions import Dimension, Range
from pipelines.tuning.driver import Driver
from pipelines.tuning.encodings import encode_once
from pipelines.tuning.memory_trials import MemoryCampaign, encoding_key, is_bank_option
from pipelines.tuning.options import TuneOptions
from pipelines.tuning.space import grid, key_of
from unianom import files
from unianom.errors import OptionError
from unianom.methods import MemoryMethod

MOST_ENCODINGS = 64
"""Combinations of options that the network must run for, of a memory method."""


class MemoryDriver(Driver[MemoryCampaign]):
    """Runs the network of a memory method for every combination of the options that it depends on, then the trials.

    Args:
        method: the class of the method.
        campaign, trial_space, options, run: see `Driver`.
    """

    def __init__(
        self,
        method: type[MemoryMethod],
        campaign: MemoryCampaign,
        trial_space: Sequence[Dimension],
        options: TuneOptions,
        run: Run,
    ) -> None:
        super().__init__(campaign, trial_space, options, run)
        self._method = method

    def prepare(self) -> None:
        campaign, method = self.campaign, self._method
        own = [dimension for dimension in self.trial_space if not is_bank_option(method, dimension.name)]
        if any(isinstance(dimension.domain, Range) for dimension in own):
            raise OptionError(f"space: the network runs for every value of {own[0].name}; name single values")
        combinations = list(grid(own))
        default = {dimension.name: self.default()[dimension.name] for dimension in own}
        combinations += [default] if key_of(default) not in map(key_of, combinations) else []
        if len(combinations) > MOST_ENCODINGS:
            names = ", ".join(dimension.name for dimension in own)
            raise OptionError(
                f"space: {names} have {len(combinations)} combinations, for each of which the network would run; name "
                f"fewer values, {MOST_ENCODINGS} combinations at most"
            )
        masks = any(dimension.name == "mask" for dimension in self.trial_space)
        for values in combinations:
            config = campaign.config_of({**values, "mask": "binary"} if masks else values)
            validation_set = campaign.validation_set_of(method(config))
            ValidationSet(validation_set).check(campaign.objective)
            campaign.encodings[encoding_key(values, campaign.name)] = encode_once(
                campaign.name,
                config,
                campaign.options,
                campaign.shards,
                campaign.categories,
                campaign.chosen.learn,
                validation_set,
                files.join(campaign.folder, "encodings"),
            )
