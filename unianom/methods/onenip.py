"""OneNIP: reconstruction guided by one normal image as a prompt (Gao, ECCV 2024).

A frozen encoder's features of an image are reconstructed from those of a normal image of the same category (the
prompt). Pseudo-anomalous copies teach the transformer to restore what is normal, and a refiner to find at higher
resolution where it had to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from unianom import host
from unianom.configs.onenip import OneNIPConfig
from unianom.configs.transformer import TransformerConfig
from unianom.errors import DataError, ModelError, OptionError
from unianom.memory.coreset import greedy_coreset
from unianom.methods.base import Prediction, RawOutputs, nan_where_not_finite, register_method, with_statistics
from unianom.methods.layers.postprocess import pooled_maximum, upsample
from unianom.methods.layers.reconstruction import (
    AttentionBlock,
    FeatureNeck,
    FeedForward,
    QueryDecoder,
    ReconstructionTransformer,
    grid_mask,
    initialise_transformer,
)
from unianom.methods.trained import LOSS, BatchSpec, FeatureMaps, TrainedMethod, TrainingBatch


class BidirectionalLayer(nn.Module):
    """Prompt and image tokens learn from each other (eq. 3).

    Args:
        config: sizes.
        mask: N×N additive mask of both attentions.
    """

    def __init__(self, config: TransformerConfig, mask: Tensor | None) -> None:
        super().__init__()
        self.mask: Tensor | None
        self.register_buffer("mask", mask, persistent=False)
        self.prompt_from_image = AttentionBlock(config.dim, config.heads, config.dropout)
        self.feed_forward = FeedForward(config.dim, config.hidden, config.dropout, inner_dropout=0.0)
        self.image_from_prompt = AttentionBlock(config.dim, config.heads, config.dropout)

    def forward(self, prompt: Tensor, image: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Update both, B×N×D each."""
        prompt = self.feed_forward(self.prompt_from_image(prompt, image, position, position, self.mask))
        image = self.image_from_prompt(image, prompt, position, position, self.mask)
        return prompt, image


class BidirectionalDecoder(nn.Module):
    """Two-way layers, then one attention of the prompt to the whole image; the prompt's tokens become the
    reconstruction (sec. 3.1).

    Args:
        config: sizes.
        mask: as `BidirectionalLayer`; the last attention has none.
    """

    def __init__(self, config: TransformerConfig, mask: Tensor | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BidirectionalLayer(config, mask) for _ in range(config.decoder_layers))
        self.last = AttentionBlock(config.dim, config.heads, config.dropout)

    def forward(self, memory: Tensor, position: Tensor, prompt: Tensor) -> Tensor:
        """Map B×N×D tokens of the encoder, and of a prompt, to B×N×D."""
        image = memory
        for layer in self.layers:
            prompt, image = layer(prompt, image, position)
        return self.last(prompt, image, position, position)


class Refiner(nn.Module):
    """Refines feature errors to logits on four times their grid (sec. 3.3).

    Args:
        channels: C of the features.
        width: of the convolutions.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (channels, width):
            layers += [
                nn.Conv2d(inputs, width, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.ConvTranspose2d(width, width, kernel_size=2, stride=2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, kernel_size=1))

    def forward(self, difference: Tensor) -> Tensor:
        """Map reconstruction minus features, B×C×h×w, to logits B×4h×4w in float32."""
        return self.layers(difference.abs())[:, 0].float()


def dice_loss(probability: Tensor, mask: Tensor, factor: float, smoothing: float) -> Tensor:
    """Return 1 − (factor · Σpm + smoothing) / (Σp² + Σm² + smoothing) of each image; B (eq. 7).

    Without smoothing an image without mask costs 1 whatever its probabilities, so nothing is learned from it.

    Args:
        probability: B×S×S, p.
        mask: B×S×S of 0 and 1, m.
        factor, smoothing: as in the formula.
    """
    overlap = (probability * mask).sum((1, 2))
    total = probability.square().sum((1, 2)) + mask.square().sum((1, 2))
    tiny = torch.finfo(total.dtype).tiny  # both may be zero
    return 1 - (factor * overlap + smoothing) / (total + smoothing).clamp_min(tiny)


@register_method("onenip")
class OneNIP(TrainedMethod[OneNIPConfig]):
    """OneNIP with its prompt pool, once finished.

    Args:
        config: options.

    Attributes:
        prompt_pool: P×C×h×w neck features of normal training images: one of each category, in the order of the
            categories, or `pool_size` of them where prompts are sampled by "nearest".
        prompt_means: P×C, their means over positions, by which a prompt is chosen.
        prompt_category: P int64, the category of each.
        fusion_scale: scalar, half of the sum of largest and smallest reconstruction error in maps of training images;
            brings the refiner's probabilities to the scale of these errors. 0 until finished.
    """

    Config = OneNIPConfig
    schedulable_options = ("training.learning_rate", "training.weight_decay", "segmentation_weight")
    postprocess_options = ("alpha", "score_pool")
    map_options = ("alpha",)
    finish_images: ClassVar[int] = 256
    _finished = False

    def __init__(self, config: OneNIPConfig) -> None:
        super().__init__()
        self.neck = FeatureNeck(config.backbone, config.taps, config.grid_reduction, config.input.side)
        channels, grid = self.neck.channels, self.neck.grid
        neighbours = min(grid) // 2 if config.neighbours == "half" else config.neighbours
        self.config = with_statistics(replace(config, neighbours=neighbours))
        mask = grid_mask(grid, neighbours)
        decoder: nn.Module
        if config.prompt == "dynamic":
            decoder = BidirectionalDecoder(config.transformer, mask)
        else:
            queries = grid[0] * grid[1] if config.prompt == "none" else 0
            decoder = QueryDecoder(config.transformer, queries, mask, mask)
        self.transformer = ReconstructionTransformer(channels, grid, config.transformer, mask, decoder)
        self.refiner = Refiner(channels, config.refiner_width) if config.refiner else None
        initialise_transformer(self.transformer)
        if self.refiner is not None:
            initialise_transformer(self.refiner)
        self.prompt_pool: Tensor
        self.prompt_means: Tensor
        self.prompt_category: Tensor
        self.fusion_scale: Tensor
        self.register_buffer("prompt_pool", torch.empty(0, channels, *grid))
        self.register_buffer("prompt_means", torch.empty(0, channels))
        self.register_buffer("prompt_category", torch.empty(0, dtype=torch.int64))
        self.register_buffer("fusion_scale", torch.zeros(()))

    @property
    def batch_spec(self) -> BatchSpec:
        """Pseudo-anomalous copies and prompts, where they are used."""
        config = self.config
        return BatchSpec(
            synthetic=config.synthesis if config.restoration or config.refiner else None,
            prompts=None if config.prompt == "none" else config.prompt_sampling,
        )

    def frozen_features(self, images: Tensor) -> FeatureMaps:
        """Return {"neck": B×C×h×w} of B×3×S×S normalised images; 272×14×14 as published."""
        return {"neck": self.neck(images)}

    def feature_key(self) -> dict[str, Any]:
        """Return the key, the same for UniAD and OneNIP on the same encoder, taps and grid."""
        return {**super().feature_key(), "method": "neck", "grid": list(self.neck.grid)}

    # ------------------------------------------------------------------------------------------------- training
    def training_loss(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the total (eq. 8), "reconstruction" (eq. 4), "restoration" (eq. 5) and "segmentation" (eq. 7).

        Copies are encoded here; both they and their originals are to give the originals' features.
        """
        config = self.config
        normal = self.features_of(batch)["neck"]  # B C h w
        features = normal
        if self.batch_spec.synthetic is not None:
            features = torch.cat([normal, self.neck(batch.required("synthetic_images"))])  # 2B C h w
        reconstruction = self._reconstruct_with_prompts(features, batch)
        losses = {"reconstruction": (reconstruction[: len(normal)] - normal).square().mean()}
        total = losses["reconstruction"]
        if config.restoration:
            losses["restoration"] = (reconstruction[len(normal) :] - normal).square().mean()
            total = total + losses["restoration"]
            if config.feature_loss == "mean":
                total = total / 2
        if self.refiner is not None:
            mask = batch.required("synthetic_mask")
            masks = torch.cat([torch.zeros_like(mask), mask])[:, 0]  # 2B S S
            probability = self._probability(self.refiner(reconstruction - features))
            losses["segmentation"] = dice_loss(probability, masks, config.dice_factor, config.dice_smoothing).mean()
            total = total + config.segmentation_weight * losses["segmentation"]
        return {LOSS: total, **losses}

    def _reconstruct_with_prompts(self, features: Tensor, batch: TrainingBatch) -> Tensor:
        """Reconstruct features of originals (and copies), 2B×C×h×w, each with its original's prompt; float32."""
        if self.config.prompt == "none":
            return self.transformer.decode(self.transformer.encode(features)).float()
        prompts = self.prompt_features_of(batch)["neck"]  # B C h w
        tokens = self.transformer.encode(torch.cat([features, prompts]))  # one draw of jitter for all
        image, prompt = tokens[: len(features)], tokens[len(features) :]
        return self.transformer.decode(image, prompt.repeat(len(image) // len(prompt), 1, 1)).float()

    def _probability(self, logits: Tensor) -> Tensor:
        """Return the probability of an anomaly, B×S×S, from logits of the refiner."""
        return upsample(logits, self.input.side, align_corners=True).sigmoid()

    # ------------------------------------------------------------------------------------------------ finishing
    @torch.inference_mode(False)  # what it keeps must be ordinary tensors, also if the caller is in inference mode
    @torch.no_grad()
    def finalize(self, batches: Iterable[TrainingBatch], categories: Sequence[str]) -> None:
        """Choose the prompt pool, and measure the fusion scale on these images and on their copies if they come along.

        Raises:
            DataError: a category has no image among them.
        """
        features, copies, labels = [], [], []
        for batch in batches:
            features.append(self.features_of(batch)["neck"])
            labels.append(batch.category)
            if batch.synthetic_images is not None:
                copies.append(self.neck(batch.synthetic_images))
        if self.config.prompt != "none":
            self._fill_pool(torch.cat(features), torch.cat(labels), categories)
        if self.refiner is not None:
            extremes = [torch.stack(self._error_map(neck, self._entries(neck)).aminmax()) for neck in features + copies]
            smallest, largest = torch.stack(extremes).unbind(1)
            self.fusion_scale = (smallest.amin() + largest.amax()) / 2

    def _fill_pool(self, features: Tensor, labels: Tensor, categories: Sequence[str]) -> None:
        means = features.mean((2, 3))  # M C
        seed = self.config.training.seed
        if self.config.prompt_sampling == "nearest":
            count = min(self.config.pool_size, len(means))
            chosen = torch.from_numpy(greedy_coreset(means.cpu().numpy(), count, seed).indices)
        else:
            generator = torch.Generator().manual_seed(seed)
            picks = []
            for number, name in enumerate(categories):
                own = (labels.cpu() == number).nonzero()[:, 0]
                if len(own) == 0:
                    raise DataError(
                        f"onenip needs a prompt of every category, but there is no training image of '{name}' among "
                        f"the {len(labels)} to choose from; add one, or set prompt_sampling=nearest"
                    )
                picks.append(own[torch.randint(len(own), (), generator=generator)])
            chosen = torch.stack(picks)
        chosen = chosen.to(features.device)
        self.prompt_pool, self.prompt_means, self.prompt_category = features[chosen], means[chosen], labels[chosen]

    def size_buffers(self, state: Mapping[str, Tensor]) -> None:
        """Give the prompt pool its size."""
        for name in ("prompt_pool", "prompt_means", "prompt_category"):
            if name in state:
                buffer: Tensor = getattr(self, name)
                setattr(self, name, buffer.new_empty(len(state[name]), *buffer.shape[1:]))

    # ----------------------------------------------------------------------------------------------- prediction
    def choose_prompts(self, neck: Tensor) -> Tensor:
        """Choose entries of the pool for neck features B×C×h×w, by the largest cosine similarity of means; B int64.

        `prompt_category` of the result against true categories is the accuracy of the choice.
        """
        similarity = cosine_similarity(neck.mean((2, 3))[:, None], self.prompt_means, dim=2)  # B P
        return similarity.argmax(1)

    def forward(self, images: Tensor) -> RawOutputs:
        """Return "error", B×h×w, of the reconstruction with the prompt that is nearest to an image, and, where there is
        a refiner, its "logits" B×4h×4w; as embedding the output of the transformer's encoder, 256×14×14 as published.

        Raises:
            ModelError: the method is not finished.
        """
        self._check_finished()
        neck = self.neck(images)
        return self._raw_outputs(neck, self._entries(neck))

    def anomaly_maps(self, tensors: Mapping[str, Tensor], config: OneNIPConfig | None = None) -> tuple[Tensor, Tensor]:
        """Mix the reconstruction error and the refiner's probability (eq. 10); without a refiner, take the error alone.
        Nothing smooths the map."""
        alpha = (config or self.config).alpha
        anomaly_map = upsample(tensors["error"], self.input.side, align_corners=True)  # B S S
        if self.refiner is not None:
            scale = self.fusion_scale.to(anomaly_map.device)
            anomaly_map = (1 - alpha) * anomaly_map + alpha * scale * self._probability(tensors["logits"])
        return anomaly_map, anomaly_map

    def image_scores(
        self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: OneNIPConfig | None = None
    ) -> Tensor:
        """Take the maximum after a mean filter; B."""
        return pooled_maximum(anomaly_map, (config or self.config).score_pool)

    @torch.inference_mode()
    def predict_with_prompts(self, images: Tensor, entries: Tensor) -> Prediction:
        """Predict with given entries of the pool. Given those of the true categories it shows what a wrong choice of
        prompts costs, and is no fair evaluation.

        Args:
            images: B×3×S×S normalised.
            entries: B int64.

        Raises:
            OptionError: also if the pool has no such entries, or prompts are not used.
        """
        self.check_images(images)
        self._check_finished()
        if self.config.prompt == "none":
            raise OptionError("onenip with prompt=none takes no prompts; use predict")
        size = len(self.prompt_pool)
        if entries.shape != images.shape[:1] or not ((entries >= 0) & (entries < size)).all():
            raise OptionError(f"onenip takes one prompt for each image, an entry 0…{size - 1} of its pool of {size}")
        prediction = self.postprocess(self._raw_outputs(self.neck(images), entries))
        return prediction._replace(score=nan_where_not_finite(prediction.score, images))

    def _check_finished(self) -> None:
        if self._finished:
            return
        if (self.config.prompt != "none" and len(self.prompt_pool) == 0) or (
            self.refiner is not None and self.fusion_scale == 0
        ):
            raise ModelError(
                "onenip has no prompts and no fusion scale yet; train it with jobs/train.py onenip, or call finalize() "
                "with training images"
            )
        self._finished = True  # remembered, since the host may have to wait to read the scale

    def _entries(self, neck: Tensor) -> Tensor | None:
        """Choose entries; None for a decoder that takes no prompt."""
        return None if self.config.prompt == "none" else self.choose_prompts(neck)

    def _difference(self, neck: Tensor, image: Tensor, entries: Tensor | None) -> Tensor:
        """Return reconstruction minus features, B×C×h×w, from the features and their tokens."""
        if entries is None:
            return self.transformer.decode(image) - neck
        if not host.reads_at_once(entries):  # how many are distinct the host would have to wait to know
            return self.transformer.decode(image, self.transformer.encode(self.prompt_pool[entries])) - neck
        distinct, which = entries.unique(return_inverse=True)  # images of one category share the work
        prompts = self.transformer.encode(self.prompt_pool[distinct])
        return self.transformer.decode(image, prompts[which]) - neck

    def _error_map(self, neck: Tensor, entries: Tensor | None) -> Tensor:
        """Return S_rec (eq. 9), B×S×S."""
        difference = self._difference(neck, self.transformer.encode(neck), entries)
        return upsample(difference.norm(dim=1), self.input.side, align_corners=True)

    def _raw_outputs(self, neck: Tensor, entries: Tensor | None) -> RawOutputs:
        """Reconstruct neck features B×C×h×w with these entries as prompts."""
        tokens = self.transformer.encode(neck)  # B N D
        difference = self._difference(neck, tokens, entries)
        tensors = {"error": difference.norm(dim=1)}
        if self.refiner is not None:
            tensors["logits"] = self.refiner(difference)
        return RawOutputs(tensors, tokens.transpose(1, 2).unflatten(2, self.neck.grid))
