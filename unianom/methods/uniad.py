"""UniAD: one transformer reconstructs the features of all categories (You et al., NeurIPS 2022).

Three things keep it from copying anomalies through: attention that is blind to a token's own neighbourhood, learned
queries in every decoder layer, and noise on the input features while training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unianom.configs.uniad import UniADConfig
from unianom.methods.base import RawOutputs, register_method, with_statistics
from unianom.methods.layers.postprocess import pooled_maximum, standard_deviation, upsample
from unianom.methods.layers.reconstruction import (
    FeatureNeck,
    QueryDecoder,
    ReconstructionTransformer,
    grid_mask,
    initialise_transformer,
)
from unianom.methods.trained import LOSS, FeatureMaps, TrainedMethod, TrainingBatch


@register_method("uniad")
class UniAD(TrainedMethod[UniADConfig]):
    """UniAD.

    Args:
        config: options.
    """

    Config = UniADConfig
    postprocess_options = ("map_form", "reduce", "score_pool")
    map_options = ("map_form",)

    def __init__(self, config: UniADConfig) -> None:
        super().__init__()
        self.config = with_statistics(config)
        self.neck = FeatureNeck(config.backbone, config.taps, config.grid_reduction, config.input.side)
        mask = grid_mask(self.neck.grid, config.neighbours)
        masks = {name: mask if name in config.masked else None for name in ("encoder", "decoder_1", "decoder_2")}
        tokens = self.neck.grid[0] * self.neck.grid[1]
        decoder = QueryDecoder(config.transformer, tokens, masks["decoder_1"], masks["decoder_2"])
        self.transformer = ReconstructionTransformer(
            self.neck.channels, self.neck.grid, config.transformer, masks["encoder"], decoder
        )
        initialise_transformer(self.transformer)

    def frozen_features(self, images: Tensor) -> FeatureMaps:
        """Return {"neck": B×C×h×w} of B×3×S×S normalised images; 272×14×14 as published."""
        return {"neck": self.neck(images)}

    def feature_key(self) -> dict[str, Any]:
        """Return the key, the same for UniAD and OneNIP on the same encoder, taps and grid."""
        return {**super().feature_key(), "method": "neck", "grid": list(self.neck.grid)}

    def training_loss(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the mean squared error to the features as they were before the jitter."""
        neck = self.features_of(batch)["neck"]
        reconstruction = self.transformer.decode(self.transformer.encode(neck))
        return {LOSS: (reconstruction.float() - neck).square().mean()}

    def forward(self, images: Tensor) -> RawOutputs:
        """Return the reconstruction's error B×h×w in both forms, "norm" and "squared", and as embedding the output of
        the transformer's encoder, 256×14×14 as published."""
        neck = self.neck(images)
        tokens = self.transformer.encode(neck)  # B N D
        difference = self.transformer.decode(tokens) - neck  # B C h w
        tensors = {"norm": difference.norm(dim=1), "squared": difference.square().mean(1)}
        return RawOutputs(tensors, tokens.transpose(1, 2).unflatten(2, self.neck.grid))

    def anomaly_maps(self, tensors: Mapping[str, Tensor], config: UniADConfig | None = None) -> tuple[Tensor, Tensor]:
        """Upsample the error in the form that is asked for; nothing smooths it."""
        form = (config or self.config).map_form
        anomaly_map = upsample(tensors[form], self.input.side, align_corners=form == "norm")
        return anomaly_map, anomaly_map

    def image_scores(
        self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: UniADConfig | None = None
    ) -> Tensor:
        """Take the maximum, mean or standard deviation of the map; B."""
        config = config or self.config
        if config.reduce == "max":
            return pooled_maximum(anomaly_map, config.score_pool)
        if config.reduce == "mean":
            return anomaly_map.mean((1, 2))
        return standard_deviation(anomaly_map)
