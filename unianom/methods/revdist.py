"""RevDist, known as RD4AD: from a narrow embedding of a frozen encoder's levels a decoder grows them again (Deng and
Li, "Anomaly Detection via Reverse Distillation from One-Class Embedding", CVPR 2022).

It has learned to do so for normal images only; where a level and its copy point different ways is an anomaly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unianom.backbones import CnnBackbone
from unianom.configs.revdist import RevDistConfig
from unianom.methods.base import RawOutputs, register_method, with_statistics
from unianom.methods.layers.distillation import (
    TAPS,
    OneClassBottleneck,
    ReverseDecoder,
    distance_map,
    flattened_distance,
    fuse_and_blur,
    residual_plan,
)
from unianom.methods.layers.postprocess import in_order, numbered, top_mean
from unianom.methods.trained import LOSS, FeatureMaps, TrainedMethod, TrainingBatch
from unianom.options import to_plain


@register_method("revdist")
class RevDist(TrainedMethod[RevDistConfig]):
    """RevDist: frozen encoder, and a bottleneck and a decoder that learn.

    Levels are listed fine to coarse.

    Args:
        config: options.

    Attributes:
        bottleneck: from three levels to the one-class embedding, B×2048×8×8 as published.

    Raises:
        OptionError: the backbone is no pyramid of feature maps of reduction 4 to 32.
    """

    Config = RevDistConfig
    postprocess_options = ("map.fuse", "map.blur", "map.score_share")
    map_options = ("map.fuse", "map.blur")

    def __init__(self, config: RevDistConfig) -> None:
        super().__init__()
        self.config = with_statistics(config)
        plan = residual_plan(config.backbone)
        self.encoder = CnnBackbone(config.backbone, TAPS)
        self.bottleneck = OneClassBottleneck(plan)
        self.decoder = ReverseDecoder(plan, config.activation)

    @torch.no_grad()
    def frozen_features(self, images: Tensor) -> FeatureMaps:
        """Return the encoder's maps B×C_l×h_l×w_l, "level_0" the finest; 256@64², 512@32², 1024@16² as published."""
        return {f"level_{index}": level for index, level in enumerate(self.encoder(images))}

    def feature_key(self) -> dict[str, Any]:
        """Return the key, the same for all methods whose frozen encoder gives this pyramid."""
        return {"method": "pyramid", "backbone": to_plain(self.config.backbone)}

    def training_loss(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the distance of every level and its copy, and their sum (eq. 2)."""
        teacher = list(self.features_of(batch).values())
        student = self.decoder(self.bottleneck(teacher))
        parts = {f"level_{index}": self._distance(*pair) for index, pair in enumerate(zip(teacher, student))}
        return {LOSS: torch.stack(list(parts.values())).sum(), **parts}

    def _distance(self, teacher: Tensor, student: Tensor) -> Tensor:
        if self.config.loss == "flattened":
            return flattened_distance(teacher, student)
        return distance_map(teacher, student).mean()

    def forward(self, images: Tensor) -> RawOutputs:
        """Return "distance_0" to "distance_2", B×h×w, of the three levels and their copies; as embedding the output of
        the bottleneck, 2048×8×8 as published."""
        teacher = self.encoder(images)
        embedding = self.bottleneck(teacher)
        student = self.decoder(embedding)
        return RawOutputs(numbered(distance_map(*pair) for pair in zip(teacher, student)), embedding)

    def anomaly_maps(self, tensors: Mapping[str, Tensor], config: RevDistConfig | None = None) -> tuple[Tensor, Tensor]:
        """Fuse the distances and blur them."""
        return fuse_and_blur(in_order(tensors), (config or self.config).map, self.input.side)

    def image_scores(
        self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: RevDistConfig | None = None
    ) -> Tensor:
        """Average the map's largest pixels; B."""
        return top_mean(anomaly_map, (config or self.config).map.score_share)
