"""UniNet: a student learns from a frozen teacher and from one that adapts, what is alike is drawn together and what is
anomalous pushed apart (Wei et al., CVPR 2025).

Two teachers see the image, one frozen (source), one trained (target). A bottleneck fuses either one's three levels, and
a student grows them again; what was grown from one teacher has to match the other. Where it does not is an anomaly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    binary_cross_entropy_with_logits,
    cosine_similarity,
    interpolate,
    normalize,
    relu,
)

from unianom import host
from unianom.configs.uninet import UniNetConfig
from unianom.methods.base import RawOutputs, register_method, with_statistics
from unianom.methods.layers.distillation import (
    OneClassBottleneck,
    PyramidFusion,
    ResidualPlan,
    ReverseDecoder,
    TeacherPair,
    convolution,
    distance_map,
    initialise_residual,
    norm_act,
    residual_plan,
    split_halves,
)
from unianom.methods.layers.postprocess import gaussian_blur, in_order, numbered, top_mean, upsample, upsample_levels
from unianom.methods.trained import LOSS, BatchSpec, FeatureMaps, ScheduledOptimizer, TrainedMethod, TrainingBatch
from unianom.options import to_plain


# ------------------------------------------------------------------------------------------------------------ networks
class MultiScaleEmbedding(nn.Module):
    """The multi-scale embedding module, MEM (sec. 4.2): half of the channels pass two 3×3 convolutions, the other half
    two larger ones; both together, a 1×1 convolution.

    Args:
        inputs, width, outputs: channels before, inside and after.
        kernel: side of the larger kernels; those of 3 have a bias.
        half: whether the grid is halved.
    """

    def __init__(self, inputs: int, width: int, outputs: int, kernel: int, half: bool) -> None:
        super().__init__()
        stride = 2 if half else 1

        def branch(size: int, bias: bool) -> nn.Sequential:
            first = convolution(inputs // 2, width // 2, size, stride, bias=bias)
            second = convolution(width // 2, width // 2, size, bias=bias)
            return nn.Sequential(first, *norm_act(width // 2, nn.ReLU), second, nn.BatchNorm2d(width // 2))

        self.small, self.large = branch(3, bias=False), branch(kernel, bias=kernel == 3)
        self.join = nn.Sequential(convolution(width, outputs, 1), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if half:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, 2), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map B×inputs×h×w to B×outputs×h'×w'."""
        first, second = x.chunk(2, dim=1)
        joined = self.join(torch.cat([self.small(first), self.large(second)], dim=1))
        return relu(joined + self.shortcut(x))


class MemBottleneck(nn.Module):
    """Fusion of three levels, then MEMs in place of the encoder's fourth stage.

    Args:
        plan: of the encoder.
        kernel: see `MultiScaleEmbedding`.
    """

    def __init__(self, plan: ResidualPlan, kernel: int) -> None:
        super().__init__()
        self.fusion = PyramidFusion(plan, nn.ReLU)
        fused, width, outputs = 3 * plan.channels[2], plan.widths[3], plan.channels[3]
        blocks = [MultiScaleEmbedding(fused, width, outputs, kernel, half=True)]
        blocks += [MultiScaleEmbedding(outputs, width, outputs, kernel, half=False) for _ in range(plan.depths[3] - 1)]
        self.stage = nn.Sequential(*blocks)
        initialise_residual(self)
        for part in self.modules():
            if isinstance(part, nn.Conv2d) and part.bias is not None:
                nn.init.zeros_(part.bias)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Map 256@64², 512@32², 1024@16² to 2048@8²."""
        return self.stage(self.fusion(levels))


class FeatureSelection(nn.Module):
    """Domain-related feature selection, DFS (sec. 4.3).

    Args:
        channels: of each level.
        learned: whether θ is, or one.
        by_position: whether positions are weighed too, or channels alone.
    """

    def __init__(self, channels: tuple[int, ...], learned: bool, by_position: bool) -> None:
        super().__init__()
        self.by_position = by_position
        self.raw = nn.ParameterList(nn.Parameter(torch.zeros(count)) for count in channels) if learned else None

    def forward(self, student: Tensor, teacher: Tensor, level: int) -> Tensor:
        """Weigh the student's B×C×h×w by what is representative in the teacher's (eqs. 4 to 6).

        θ = min(1, sigmoid(raw) + ½), as released; the shift by ϱ in eq. 4 is the softmax's own.
        """
        mean = teacher.mean((2, 3), keepdim=True)  # B C 1 1
        theta: Tensor | float = 1.0
        if self.raw is not None:
            theta = (self.raw[level].sigmoid() + 0.5).clamp(max=1).view(1, -1, 1, 1)
        weight = theta + mean
        if self.by_position:
            weight = teacher.flatten(2).softmax(dim=2).view_as(teacher) * weight
        return student * weight


class FrameHead(nn.Module):
    """From the finest level to a frame of four times its grid, with values about −1 to 1 (Ped2).

    Args:
        channels: of the level.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()

        def pair(inputs: int, outputs: int) -> list[nn.Module]:
            both = [convolution(inputs, outputs, 3), *norm_act(outputs, nn.ReLU)]
            return [*both, convolution(outputs, outputs, 3), *norm_act(outputs, nn.ReLU)]

        def double(inputs: int, outputs: int) -> nn.Module:
            return nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)

        layers = [*pair(channels, 128), double(128, 64), *pair(64, 64), double(64, 32), *pair(32, 32)]
        layers += [convolution(32, 32, 3, bias=True), nn.ReLU(), convolution(32, 32, 3, bias=True), nn.ReLU()]
        self.layers = nn.Sequential(*layers, convolution(32, 3, 3, bias=True))
        initialise_residual(self)

    def forward(self, level: Tensor) -> Tensor:
        """Map B×C×h×w to B×3×4h×4w."""
        return self.layers(level)


# ----------------------------------------------------------------------------------------------------------- similarity
# How alike every position of a student's map is to the same position of its teacher's, against all others: the diagonal
# of a row-wise softmax (eqs. 8 and 9), without ever holding the HW×HW matrix.
EPSILON = 1e-8
"""Of eqs. 9 and 10."""

BLOCK_BYTES = 64 << 20
"""Of a block of rows of the similarity matrices of a batch, unless `rows` says how many."""


def log_similarity(student: Tensor, teacher: Tensor, temperature: float, rows: int | None = None) -> Tensor:
    """Return log diag(m̂) of m = ŝ · t̂ᵀ / T and m̂ = exp(m) / (Σ_k exp(m(:, k)) + ε), in float32 or better.

    Args:
        student, teacher: B×C×h×w; every position is scaled to unit length.
        temperature: T.
        rows: student positions whose similarities are held at once; null takes as many as fit 64 MiB.

    Returns:
        B×N, N = h·w.
    """
    with torch.autocast(student.device.type, enabled=False):
        unit = [normalize(maps if maps.dtype == torch.float64 else maps.float(), dim=1) for maps in (student, teacher)]
        s, t = (maps.flatten(2).mT.contiguous() for maps in unit)  # each B N C
        if rows is None:
            rows = max(1, BLOCK_BYTES // (s.element_size() * s.shape[0] * s.shape[1]))
        return _LogDiagonal.apply(s, t, temperature, rows)


class _LogDiagonal(torch.autograd.Function):
    """Forward and backward pass both walk over blocks of rows; the latter computes the similarities anew.

    With p_ik = exp(m_ik) / (Σ_k exp(m_ik) + ε), the derivative of output i by m_ik is δ_ik − p_ik.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, temperature: float, rows: int) -> Tensor:
        """Map B×N×C each to B×N."""
        totals = [torch.logsumexp(block @ t.mT / temperature, dim=2) for block in s.split(rows, dim=1)]
        total = torch.cat(totals, dim=1)
        total = torch.logaddexp(total, torch.full_like(total, math.log(EPSILON)))  # B N
        ctx.save_for_backward(s, t, total)
        ctx.temperature, ctx.rows = temperature, rows
        return (s * t).sum(2) / temperature - total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of s and t."""
        s, t, total = ctx.saved_tensors
        gradient = gradients[0][:, :, None]  # B N 1
        of_s = gradient * t if ctx.needs_input_grad[0] else None
        of_t = gradient * s if ctx.needs_input_grad[1] else None
        for start in range(0, s.shape[1], ctx.rows):
            block = slice(start, start + ctx.rows)
            share = s[:, block] @ t.mT  # B r N
            share.div_(ctx.temperature).sub_(total[:, block, None]).exp_().mul_(gradient[:, block])
            if of_s is not None:
                of_s[:, block] -= share @ t
            if of_t is not None:
                of_t -= share.mT @ s[:, block]
        scaled = [None if g is None else g / ctx.temperature for g in (of_s, of_t)]
        return scaled[0], scaled[1], None, None


# --------------------------------------------------------------------------------------------------------------- losses
def masked_mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Average B×N values where the equally shaped `chosen` is true; 0 where nothing is."""
    weight = chosen.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp_min(1)


def similarity_losses(log_diagonal: Tensor, normal: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Return similarity-contrastive loss (eq. 10) and margin loss (eq. 11), as means.

    Args:
        log_diagonal: B×N, log of diag(m̂).
        normal: B×N bool.
        margin: τ.
    """
    diagonal = log_diagonal.exp()
    similarity = -masked_mean((diagonal + EPSILON).log(), normal)
    low = masked_mean(relu(margin - diagonal), normal)
    return similarity, low + masked_mean(relu(diagonal - margin / 2), ~normal)


def structure_loss(logits: Tensor, mask: Tensor, weighted_bce: bool) -> Tensor:
    """Return cross-entropy plus soft IoU loss, both weighted by 1 + 5·|mean of the mask around − mask|, high at edges.

    Args:
        logits: B×1×S×S.
        mask: B×1×S×S of 0 and 1.
        weighted_bce: whether the weights count in the cross-entropy, too.
    """
    weight = 1 + 5 * (avg_pool2d(mask, 31, stride=1, padding=15) - mask).abs()
    if weighted_bce:
        entropy = binary_cross_entropy_with_logits(logits, mask, reduction="none")
        entropy = (weight * entropy).sum((2, 3)) / weight.sum((2, 3))
    else:
        entropy = binary_cross_entropy_with_logits(logits, mask)
    probability = logits.sigmoid()
    overlap = (weight * probability * mask).sum((2, 3))
    total = (weight * (probability + mask)).sum((2, 3))
    return (entropy + 1 - (overlap + 1) / (total - overlap + 1)).mean()


def decision_weights(maxima: Tensor, alpha: float, beta: float, literal: bool) -> Tensor:
    """Return the share of pixels that an image's score is the mean of (eq. 14), of each image by itself; B.

    Args:
        maxima: B×2n, the largest value of every map.
        alpha, beta: as in eq. 14.
        literal: average the probabilities above their mean, as printed, and not the maxima that have them.
    """
    probability = maxima.softmax(dim=1)
    above = probability > probability.mean(dim=1, keepdim=True)  # nowhere, if all are equal
    values = probability if literal else maxima
    mean = (values * above).sum(1) / above.sum(1).clamp_min(1)
    return (alpha * mean).clamp_min(beta)


def largest_mean(maps: Tensor, share: Tensor) -> Tensor:
    """Average the ⌊share · H · W⌋ largest pixels of each map, at least one; B×S×S and B to B."""
    pixels = maps.flatten(1)
    counts = (share.double() * pixels.shape[1]).long().clamp(1, pixels.shape[1])
    # which K are largest differs by image, the sorted values up to the largest K serve all; on the whole few hundred,
    # but on other devices than the CPU the host would have to wait to know how many
    most = int(counts.max()) if host.reads_at_once(pixels) else pixels.shape[1]
    values = pixels.topk(most, dim=1).values.double()
    return (values.cumsum(1).gather(1, counts[:, None] - 1)[:, 0] / counts).to(maps.dtype)


# -------------------------------------------------------------------------------------------------------------- method
@register_method("uninet")
class UniNet(TrainedMethod[UniNetConfig]):
    """UniNet.

    Args:
        config: options.

    Raises:
        OptionError: the backbone is no pyramid of feature maps of reduction 4 to 32.
        WeightsError: see `TeacherPair`.
    """

    Config = UniNetConfig
    schedulable_options = (
        "training.learning_rate",
        "training.encoder_learning_rate",
        "training.weight_decay",
        "temperature",
        "margin",
        "balance",
        "supervision",
    )
    postprocess_options = ("decision", "alpha", "beta", "decision_share", "score_blur")

    def __init__(self, config: UniNetConfig) -> None:
        super().__init__()
        self.config = with_statistics(config)
        plan = residual_plan(config.backbone)
        self.teachers = TeacherPair(config.backbone, config.encoder_norm)
        self.bottleneck: nn.Module = OneClassBottleneck(plan)
        if config.bottleneck == "mem":
            self.bottleneck = MemBottleneck(plan, config.mem_kernel)
        self.student = ReverseDecoder(plan)
        self.selection: FeatureSelection | None = None
        if config.selection != "none":
            by_position = config.selection == "representative"
            self.selection = FeatureSelection(plan.channels[:3], config.dfs_theta == "learned", by_position)
        self.head: nn.Module | None = None
        if config.task == "classification":
            self.head = nn.Linear(plan.channels[0], 1)
        elif config.task == "segmentation":
            self.head = convolution(plan.channels[0], 1, 1)
        elif config.task == "video":
            self.head = FrameHead(plan.channels[0])
        self._side = config.input.side

    # ------------------------------------------------------------------------------------------------------- training
    @property
    def batch_spec(self) -> BatchSpec:
        """Images besides the frozen features, and labels and masks where the task has them."""
        task = self.config.task
        return BatchSpec(
            augmentation=self.config.augmentation,
            images=True,
            labels=task in ("classification", "segmentation"),
            masks=task == "segmentation",
            repeats=max(1, len(self.config.training_sizes)),
        )

    @torch.no_grad()
    def frozen_features(self, images: Tensor) -> FeatureMaps:
        """Return the source teacher's maps B×C_l×h_l×w_l, "level_0" the finest."""
        return {f"level_{index}": level for index, level in enumerate(self.teachers.source(images))}

    def feature_key(self) -> dict[str, Any]:
        """Return the key, the same for all methods whose frozen encoder gives this pyramid."""
        return {"method": "pyramid", "backbone": to_plain(self.config.backbone)}

    def optimizers(self, iterations: int) -> list[ScheduledOptimizer]:
        """Return one optimiser for the target teacher, one for all else that learns."""
        encoder = [p for p in self.teachers.parameters() if p.requires_grad]
        known = {id(p) for p in encoder}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        rate = self.config.training.encoder_learning_rate
        return [
            self.optimisation(others, iterations),
            self.optimisation([{"params": encoder, "lr": rate}], iterations),
        ]

    def on_step_start(self, step: int, iterations: int) -> None:
        """Choose the size of this step's images."""
        sizes = self.config.training_sizes
        self._side = sizes[step % len(sizes)] if sizes else self.input.side

    def training_loss(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the total (eqs. 12 and 13) with its parts "distillation", "similarity", "margin" and, where there is a
        task besides, "supervised", each summed over the six pairs of maps or the two teachers."""
        config = self.config
        if self._side != self.input.side:
            batch = self._resized(batch)
        source = list(self.features_of(batch).values())
        target = self.teachers.target(batch.required("images"))
        students, _ = self._students(source, target)

        distillation = similarity = margin = torch.zeros((), device=batch.category.device)
        for level, (teacher, student) in enumerate(_pairs(source, target, students)):
            of_target, level = divmod(level, 3)
            compared = student.float() if self.selection is None else self.selection(student, teacher.float(), level)
            aim = teacher.float()
            if of_target and config.stop_gradient:
                aim = aim.detach()
            normal = self._normal(batch, config.contrast, student.shape[2:])  # B N
            distance = 1 - cosine_similarity(aim, compared.float(), dim=1).flatten(1)  # B N
            kind = ("label" if config.contrast == "none" else config.contrast) if config.kd_normal_only else "none"
            learned_from = self._normal(batch, kind, student.shape[2:])  # B N
            distillation = distillation + masked_mean(distance, learned_from)
            if config.similarity_loss or config.margin_loss:
                logs = log_similarity(compared, aim, config.temperature, config.similarity_rows or None)
                parts = similarity_losses(logs, normal, config.margin)
                similarity, margin = similarity + parts[0], margin + parts[1]
        total = config.balance * distillation
        losses = {"distillation": distillation}
        if config.similarity_loss:
            losses["similarity"] = similarity
            total = total + (1 - config.balance) * similarity
        if config.margin_loss:
            losses["margin"] = margin
            total = total + margin
        if self.head is not None:
            losses["supervised"] = self._supervised(self.head, students, batch)
            total = total + config.supervision * losses["supervised"]
        return {LOSS: total, **losses}

    def _resized(self, batch: TrainingBatch) -> TrainingBatch:
        """Return the batch at the size of this step, without kept features, which are of the input's size."""
        side, mask = self._side, batch.mask
        images = interpolate(batch.required("images"), size=side, mode="bilinear", align_corners=False)
        if mask is not None:
            mask = interpolate(mask, size=side, mode="nearest")
        return TrainingBatch(batch.category, images, label=batch.label, mask=mask)

    def _students(self, source: list[Tensor], target: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return the student's three levels, 2B×C×h×w, and the bottleneck's output, 2B×2048×8×8: B grown from the
        target teacher, then B from the source teacher."""
        levels = [torch.cat(pair) for pair in zip(target, source)]
        skips = [levels[2], levels[1]] if self.config.task == "segmentation" else []
        embedded = self.bottleneck(levels)
        return self.student(embedded, skips), embedded

    def _normal(self, batch: TrainingBatch, contrast: str, grid: torch.Size) -> Tensor:
        """Tell which positions count as normal, by mask or label, or all; B×N bool."""
        if contrast == "mask":
            return interpolate(batch.required("mask"), size=tuple(grid), mode="nearest").flatten(1) == 0
        if contrast == "label":
            return (batch.required("label") == 0)[:, None].expand(-1, grid.numel())
        return torch.ones(len(batch), grid.numel(), dtype=torch.bool, device=batch.category.device)

    def _supervised(self, head: nn.Module, students: list[Tensor], batch: TrainingBatch) -> Tensor:
        """Return the task's own loss, of the student's finest level; summed over the two teachers."""
        halves = split_halves(students[0])
        if self.config.task == "classification":
            truth = batch.required("label")[:, None].float()
            means = [half.mean((2, 3)) for half in halves]
            return torch.stack([binary_cross_entropy_with_logits(head(m).float(), truth) for m in means]).sum()
        if self.config.task == "segmentation":
            weighted = self.config.structure_bce == "weighted"
            mask = batch.required("mask")
            logits = [upsample(head(h).float()[:, 0], self._side, align_corners=False)[:, None] for h in halves]
            return torch.stack([structure_loss(each, mask, weighted) for each in logits]).sum()
        images = batch.required("images")
        return torch.stack([(head(half).float() - images).square().mean() for half in halves]).sum()

    # ----------------------------------------------------------------------------------------------------- prediction
    def forward(self, images: Tensor) -> RawOutputs:
        """Return "distance_0" to "distance_5", B×h×w, of the six pairs of maps, and for "video" "frame_error" B×2, of
        the frame from either teacher; for "segmentation" "logits" B×h×w alone. The embedding is the bottleneck's output
        for the target teacher's levels, 2048×8×8 as published."""
        source, target = self.teachers.source(images), self.teachers.target(images)
        students, embedded = self._students(source, target)
        embedding, head, task = embedded[: images.shape[0]], self.head, self.config.task
        if head is not None and task == "segmentation":
            logits = torch.stack(split_halves(head(students[0]))).sum(0).float()  # B 1 h w
            return RawOutputs({"logits": logits[:, 0]}, embedding)
        tensors = numbered(distance_map(*pair) for pair in _pairs(source, target, students))
        if head is not None and task == "video":
            errors = [(head(half).float() - images).square().mean((1, 2, 3)) for half in split_halves(students[0])]
            tensors["frame_error"] = torch.stack(errors, dim=1)
        return RawOutputs(tensors, embedding)

    def anomaly_maps(self, tensors: Mapping[str, Tensor], config: UniNetConfig | None = None) -> tuple[Tensor, Tensor]:
        """Sum the six upsampled distances, or return the masks' probability. The map is never smoothed, only what the
        score is taken from, so no option changes it."""
        if self.config.task == "segmentation":
            anomaly_map = self._logits(tensors).sigmoid()
        else:
            anomaly_map = upsample_levels(in_order(tensors), self.input.side).sum(0)
        return anomaly_map, anomaly_map

    def image_scores(
        self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: UniNetConfig | None = None
    ) -> Tensor:
        """Score images as Algorithm 1 does; a segmentation by its largest logit, whatever the options; B."""
        config = config or self.config
        if self.config.task == "segmentation":
            return self._logits(tensors).amax((1, 2))
        blurred = gaussian_blur(anomaly_map, config.score_blur) if config.score_blur else anomaly_map
        if config.decision in ("max", "share"):
            score = top_mean(blurred, config.decision_share if config.decision == "share" else 0.0)
        else:
            maxima = torch.stack([m.amax((1, 2)) for m in in_order(tensors)], dim=1)  # B 6
            share = decision_weights(maxima, config.alpha, config.beta, literal=config.decision == "literal")
            score = largest_mean(blurred, share)
        if self.config.task == "video":
            for error in tensors["frame_error"].unbind(1):
                score = score + error
        return score

    def _logits(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Upsample the logits of a segmentation to B×S×S."""
        return upsample(tensors["logits"], self.input.side, align_corners=False)


def _pairs(source: list[Tensor], target: list[Tensor], students: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pair teacher's and student's maps to compare: what was grown from the target teacher with the source teacher's,
    then the other way round, each fine to coarse."""
    from_target, from_source = zip(*(split_halves(level) for level in students))
    return [*zip(source, from_target), *zip(target, from_source)]
