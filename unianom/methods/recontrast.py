"""ReContrast: reverse distillation whose encoder learns, too, held in place by a frozen copy of itself (Guo et al.,
"ReContrast: Domain-Specific Anomaly Detection via Contrastive Reconstruction", NeurIPS 2023).

A bottleneck and a decoder see the levels of both encoders. What was grown from the trained one's has to match the
frozen one's and the other way round, and only positions that are still far apart are learned from. Where levels and
their copies point different ways is an anomaly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from unianom.configs.recontrast import ReContrastConfig
from unianom.methods.base import RawOutputs, register_method, with_statistics
from unianom.methods.layers.distillation import (
    OneClassBottleneck,
    ResidualPlan,
    ReverseDecoder,
    TeacherPair,
    convolution,
    distance_map,
    flattened_distance,
    fuse_and_blur,
    initialise_residual,
    residual_plan,
    split_halves,
)
from unianom.methods.layers.postprocess import in_order, numbered, top_mean
from unianom.methods.trained import LOSS, BatchSpec, FeatureMaps, ScheduledOptimizer, TrainedMethod, TrainingBatch
from unianom.options import to_plain


# ------------------------------------------------------------------------------------------------------------ networks
class GuardedBatchNorm(nn.BatchNorm2d):
    """Batch norm that does not blow up channels which are nearly constant in a batch: where a channel's variance is not
    above the floor, the floor takes its place. As batch norm in evaluation mode.

    Args:
        norm: whose weights, statistics and settings it takes over.
        guard: largest floor; that of a channel is its variance in `norm`, if this is smaller.
    """

    # None in batch norms without statistics alone, which this is not
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, norm: nn.BatchNorm2d, guard: float) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.load_state_dict(norm.state_dict())
        self.floor: Tensor
        self.register_buffer("floor", self.running_var.clamp(max=guard))  # C

    def forward(self, x: Tensor) -> Tensor:
        """Normalise B×C×h×w."""
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)  # C
            count = values.numel() // values.shape[1]
            unbiased = variance.detach() * (count / max(count - 1, 1))  # what batch norm keeps
            varied = unbiased > self.floor
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(torch.where(varied, unbiased, self.floor), self.momentum)
                self.num_batches_tracked.add_(1)
            used = torch.where(varied, variance, self.floor)
            # the mean is taken away first, for it may be far larger than what is left
            scale = self.weight * (used + self.eps).rsqrt()
            normed = (values - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return normed.to(x.dtype)


def guard_batch_norm(module: nn.Module, guard: float) -> None:
    """Put `GuardedBatchNorm` in the place of every batch norm of a module."""
    for name, part in module.named_children():
        if isinstance(part, nn.BatchNorm2d):
            guarded: nn.Module = GuardedBatchNorm(part, guard)
            if isinstance(part, BatchNormAct2d):  # timm's, of EfficientNets and MobileNets
                guarded = nn.Sequential(guarded, part.drop, part.act)
            setattr(module, name, guarded)
        else:
            guard_batch_norm(part, guard)


class TwoHeadDecoder(nn.Module):
    """The reverse decoder with two 1×1 convolutions behind each level: one for what was grown from the trained encoder,
    one for what was grown from the frozen one.

    Args:
        plan: of the encoder.
        activation: "relu" or "gelu".
    """

    def __init__(self, plan: ResidualPlan, activation: str) -> None:
        super().__init__()
        self.decoder = ReverseDecoder(plan, activation)
        levels = [*plan.channels[:3], *plan.channels[:3]]
        self.heads = nn.ModuleList(convolution(channels, channels, 1, bias=True) for channels in levels)
        initialise_residual(self.heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map 2B×2048×8×8, of the trained encoder and then of the frozen one, to three levels B×C×h×w of the former and
        three of the latter."""
        of_target, of_source = zip(*(split_halves(level) for level in self.decoder(x)))
        return [head(level) for head, level in zip(self.heads, [*of_target, *of_source])]


# -------------------------------------------------------------------------------------------------------------- losses
def mined_distance(teacher: Tensor, student: Tensor, a: Tensor | float) -> Tensor:
    """Return 1 − cosine of flattened levels, which easy positions add to but do not learn from (sec. 3.4).

    Args:
        teacher, student: B×C×h×w.
        a: a position is easy where its own distance is below the mean plus a standard deviations of the batch's.
    """
    fixed = student.detach()
    distances = distance_map(teacher, fixed)  # B h w
    easy = distances < distances.mean() + a * distances.std()
    # values as they were; the gradient is zero where the student is easy and as it was elsewhere
    return flattened_distance(teacher, torch.where(easy[:, None], fixed, student))


# -------------------------------------------------------------------------------------------------------------- method
@register_method("recontrast")
class ReContrast(TrainedMethod[ReContrastConfig]):
    """ReContrast: a frozen and a trained encoder, bottleneck and decoder.

    Levels are listed fine to coarse.

    Args:
        config: options.

    Attributes:
        bottleneck: from three levels of either encoder to an embedding, B×2048×8×8 as published.

    Raises:
        OptionError: the backbone is no pyramid of feature maps of reduction 4 to 32.
        WeightsError: see `TeacherPair`.
    """

    Config = ReContrastConfig
    schedulable_options = ("training.learning_rate", "training.encoder_learning_rate", "training.weight_decay")
    postprocess_options = ("map.fuse", "map.blur", "map.score_share")
    map_options = ("map.fuse", "map.blur")

    def __init__(self, config: ReContrastConfig) -> None:
        super().__init__()
        self.config = with_statistics(config)
        plan = residual_plan(config.backbone)
        self.encoders = TeacherPair(config.backbone, config.encoder_norm)
        if config.norm_guard:
            guard_batch_norm(self.encoders.target, config.norm_guard)
        for part in self.encoders.target.modules():
            if isinstance(part, nn.BatchNorm2d) and config.norm_eps:
                part.eps = config.norm_eps
        self.bottleneck = OneClassBottleneck(plan)
        self.decoder = TwoHeadDecoder(plan, config.activation)
        # a tensor and no number, of which torch.compile would make a constant and compile anew at every step
        self.a: Tensor
        self.register_buffer("a", torch.tensor(config.mining[0]), persistent=False)

    # ------------------------------------------------------------------------------------------------------- training
    @property
    def batch_spec(self) -> BatchSpec:
        """Images besides the frozen features."""
        return BatchSpec(images=True)  # for the trained encoder, also where the frozen one's levels are kept

    @torch.no_grad()
    def frozen_features(self, images: Tensor) -> FeatureMaps:
        """Return the frozen encoder's maps B×C_l×h_l×w_l, "level_0" the finest; 256@64², 512@32², 1024@16² as
        published."""
        return {f"level_{index}": level for index, level in enumerate(self.encoders.source(images))}

    def feature_key(self) -> dict[str, Any]:
        """Return the key, the same for all methods whose frozen encoder gives this pyramid."""
        return {"method": "pyramid", "backbone": to_plain(self.config.backbone)}

    def optimizers(self, iterations: int) -> list[ScheduledOptimizer]:
        """Return one optimiser for bottleneck and decoder, one for the trained encoder."""
        training = self.config.training
        period = training.reset_every or None
        others = [*self.bottleneck.parameters(), *self.decoder.parameters()]
        encoder = {"params": list(self.encoders.target.parameters()), "lr": training.encoder_learning_rate}
        return [
            self.optimisation(others, iterations, period=period, forget=period is not None),
            self.optimisation([encoder], iterations, period=period, rest=training.encoder_rest),
        ]

    def on_step_start(self, step: int, iterations: int) -> None:
        """Set how hard positions are mined in this step."""
        start, end = self.config.mining
        ramp = self.config.mining_ramp * iterations
        self.a.fill_(start + (end - start) * (min(step / ramp, 1.0) if ramp else 1.0))

    def training_loss(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return distances to the frozen and to the trained encoder's levels, each summed over the three, and their
        mean."""
        source = list(self.features_of(batch).values())
        target = self.encoders.target(batch.required("images"))
        # the trained encoder learns by what is grown from its levels, not by being compared with
        aims = [*source, *(level.detach() for level in target)]
        distances = [mined_distance(*pair, self.a) for pair in zip(aims, self.grow(target, source))]
        to_source, to_target = torch.stack(distances).view(2, 3).sum(1)
        return {LOSS: (to_source + to_target) / 2, "to_source": to_source, "to_target": to_target}

    def grow(self, target: Sequence[Tensor], source: Sequence[Tensor]) -> list[Tensor]:
        """Grow three levels from those of the trained encoder, then three from those of the frozen one; either are to
        match the other encoder's (sec. 3.3). One pass, so that batch norm sees both."""
        return self.decoder(self._embed(target, source))

    def _embed(self, target: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
        """Embed the trained encoder's levels, then the frozen one's; 2B×2048×8×8."""
        return self.bottleneck([torch.cat(pair) for pair in zip(target, source)])

    # ----------------------------------------------------------------------------------------------------- prediction
    def forward(self, images: Tensor) -> RawOutputs:
        """Return "distance_0" to "distance_5", B×h×w, of the frozen and the trained encoder's levels and what was grown
        for them; as embedding that of the trained encoder's levels, 2048×8×8 as published."""
        source, target = self.encoders.source(images), self.encoders.target(images)
        embedded = self._embed(target, source)
        pairs = zip([*source, *target], self.decoder(embedded))
        return RawOutputs(numbered(distance_map(*pair) for pair in pairs), embedded[: images.shape[0]])

    def anomaly_maps(
        self, tensors: Mapping[str, Tensor], config: ReContrastConfig | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fuse the distances and blur them."""
        return fuse_and_blur(in_order(tensors), (config or self.config).map, self.input.side)

    def image_scores(
        self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: ReContrastConfig | None = None
    ) -> Tensor:
        """Average the map's largest pixels; B."""
        return top_mean(anomaly_map, (config or self.config).map.score_share)
