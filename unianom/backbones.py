"""timm encoders: where their weights come from, and their taps.

`VitBackbone` gives the tokens of chosen blocks and the attention of a chosen block in one forward pass;
`CnnBackbone` gives the feature maps of a pyramid by their reductions: their strides with regard to the image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import Attention, Conv2dSame, Format, get_same_padding
from timm.models import is_model_in_modules
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor, nn

from unianom.configs.backbone import BackboneConfig, check_taps
from unianom.errors import OptionError, WeightsError
from unianom.hub import cached_weights, check_hub, find_hub_weights
from unianom.weight_formats import read_state
from unianom.weights import NAMED_WEIGHTS, PACKAGE, PACKAGES, Statistics, find_package, package_of, read_package

VIT_MODULES = ("vision_transformer", "deit")
"""timm's modules of plain vision transformers."""


class FixedSameConv2d(nn.Conv2d):
    """A convolution of "same" padding that was computed for another input, with the weights of a given one.

    Args:
        conv: the convolution.
        padding: zeros left, right, above and below.
    """

    def __init__(self, conv: nn.Conv2d, padding: tuple[int, int, int, int]) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)
        self.fixed = padding

    def forward(self, input: Tensor) -> Tensor:
        padded = nn.functional.pad(input, self.fixed)
        return nn.functional.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def fix_padding(network: nn.Module, side: int, name: str) -> None:
    """Keep, in place, the "same" padding that each convolution of a network has for an input of `side` × `side`.

    Args:
        network: takes B×3×H×W images.
        side: in pixels.
        name: of the network, for messages.

    Raises:
        OptionError: it has no convolution of "same" padding, or other layers of it.
    """
    others = {type(module).__name__ for module in network.modules() if type(module).__name__.endswith("Same")}
    if unknown := sorted(others - {"Conv2dSame"}):
        raise OptionError(
            f"backbone.padding_side is for convolutions; {name} has layers of {unknown[0]}; leave it null"
        )
    paddings: dict[str, tuple[int, int, int, int]] = {}
    probe = copy.deepcopy(network).to("meta").eval()  # shapes only, so nothing is computed

    def record(module: str, conv: Any, inputs: tuple[Tensor, ...]) -> None:
        sizes = zip(inputs[0].shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
        total = [get_same_padding(*size) for size in sizes]
        (top, bottom), (left, right) = [(pad // 2, pad - pad // 2) for pad in total]
        paddings[module] = (left, right, top, bottom)

    for module, conv in probe.named_modules():
        if isinstance(conv, Conv2dSame):
            conv.register_forward_pre_hook(partial(record, module))
    probe(torch.empty(1, 3, side, side, device="meta"))
    if not paddings:
        raise OptionError(
            f"backbone.padding_side={side}: {name} has no layers with 'same' padding; leave it null, or take one of "
            f"timm's tf_ models"
        )
    for module, padding in paddings.items():
        parent, _, last = module.rpartition(".")
        holder = network.get_submodule(parent)
        setattr(holder, last, FixedSameConv2d(getattr(holder, last), padding))


def check_name(config: BackboneConfig) -> None:
    """Refuse a backbone that timm does not know.

    Raises:
        OptionError: no such model, or no such weights of it; names some that are near.
    """
    if not timm.is_model(config.name):
        near = timm.list_models(f"*{config.name.split('.')[0][:6]}*")[:5]
        raise OptionError(f"backbone.name={config.name}: timm has no such model; near: {', '.join(near) or 'none'}")
    try:
        timm.get_pretrained_cfg(config.name)
    except RuntimeError as error:
        known = timm.list_models(f"{config.name.split('.')[0]}.*", pretrained=True)
        raise OptionError(f"backbone.name={config.name}: {error} Known: {', '.join(known) or 'none'}") from error


def weight_statistics(config: BackboneConfig) -> Statistics:
    """Return mean and standard deviation of the images that the weights take: as the package says that carries them,
    else as timm names them for this model's weights.

    Raises:
        OptionError: no such model, or timm names none.
        WeightsError: no package carries weights of it, where they should come from one.
    """
    check_name(config)
    if config.weights == PACKAGE:
        package = package_of(config)
        return package.mean, package.std
    settings = timm.get_pretrained_cfg(config.name)
    if settings is None:
        raise OptionError(f"timm names no mean and std for {config.name}; set input.mean and input.std")
    mean, std = ((red, green, blue) for red, green, blue in (settings.mean, settings.std))
    return mean, std


def state_faults(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Return, in words, where a state dict differs in names and shapes from the network's; empty if nowhere."""
    kinds = {
        "missing": set(wanted) - set(state),
        "unknown": set(state) - set(wanted),
        "of another shape": {key for key in set(wanted) & set(state) if wanted[key].shape != state[key].shape},
    }
    return "; ".join(
        f"{kind}: {', '.join(sorted(keys)[:3])}{' …' if len(keys) > 3 else ''} ({len(keys)})"
        for kind, keys in kinds.items()
        if keys
    )


def _make(config: BackboneConfig, pretrained: bool, arguments: dict[str, Any]) -> Any:
    """Return the timm model, with random weights unless `pretrained`."""
    check_name(config)
    try:
        if pretrained and (cached := cached_weights(config.name)) is not None:
            arguments = {"pretrained_cfg_overlay": {"file": str(cached)}, **arguments}
        elif pretrained:
            check_hub(config.name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.random_seed)
            return timm.create_model(config.name, pretrained=pretrained, **arguments)
    except (TypeError, IndexError, AssertionError, ArithmeticError) as error:  # of arguments that timm cannot use
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise OptionError(f"timm cannot make {config.name} with {given}: {error}") from error
    except Exception as error:  # network, cache and hub errors come in many types
        if not pretrained:
            raise
        raise WeightsError(_hub_failed(config.name, error)) from error


def _hub_failed(name: str, error: Exception) -> str:
    """Say that the hub gave no weights, and which file or package would do."""
    hub = find_hub_weights(name)
    package = find_package(name)
    if package is not None:
        own = f"'package' ({' && '.join(package.commands)})"
    else:
        own = f"'package' with another backbone ({', '.join(one.architecture for one in PACKAGES)})"
    place, file = (hub.address, f"the {hub.files[0]} of that place") if hub else ("timm", "a file")
    return (
        f"cannot get the pretrained weights of {name} from {place}: {error}; set backbone.weights to {file}, fetched "
        f"elsewhere, to {own}, or to 'random'; jobs/weights.py lists what is there"
    )


def _create(config: BackboneConfig, **arguments: Any) -> Any:
    """Make the timm model and give it its weights."""
    arguments = {**config.options, **arguments}
    if config.weights == PACKAGE:
        arguments = {**package_of(config).options, **arguments}
    model = _make(config, config.weights == "pretrained", arguments)
    if config.weights == PACKAGE:
        package = package_of(config)
        _load_state(model, read_package(config), package.distribution, config, arguments, package.antialias)
    elif config.weights not in NAMED_WEIGHTS:
        _load_state(model, read_state(config.weights), config.weights, config, arguments)
    return model


def _load_state(
    model: nn.Module,
    state: dict[str, Tensor],
    origin: str,
    config: BackboneConfig,
    arguments: dict[str, Any],
    antialias: bool = True,
) -> None:
    """Load weights strictly, but for parts of the whole network that its encoder lacks (head, later stages)."""
    model = getattr(model, "model", model)  # some feature extractors of timm wrap the whole network
    if isinstance(model, VisionTransformer):
        state = vit_filter(state, model, antialias=antialias)
    wanted = model.state_dict()
    # timm's feature lists flatten the names of stages: "stages.0.norm" of the whole network is "stages_0.norm" there
    flat = {key.replace(".", "_"): key for key in wanted}
    state = {flat.get(key.replace(".", "_"), key): value for key, value in state.items()}
    with torch.device("meta"):
        whole = {k: v for k, v in arguments.items() if k not in ("features_only", "out_indices", "num_classes")}
        known = set(timm.create_model(config.name, pretrained=False, **whole).state_dict())
    # self-supervised checkpoints carry projection heads, and classifiers may be named "fc" or "head"
    heads = ("head", "fc", "classifier", "norm.", "fc_norm.", "mask_token", "masked_embed")
    state = {k: v for k, v in state.items() if k in wanted or not (k in known or k.startswith(heads))}
    if faults := state_faults(wanted, state):
        raise WeightsError(
            f"the weights in {origin} do not fit {config.name}; {faults}; "
            f"name the model they were saved from, with backbone.options as it was made"
        )
    model.load_state_dict(state)


class Backbone(nn.Module):
    """What both kinds share: frozen or trainable, precision, memory format, and what computes it.

    Attributes:
        compiled: computes in place of PyTorch what `tensors` returns; None lets PyTorch do it.
    """

    compiled: Callable[[Tensor], list[Tensor]] | None = None

    def __init__(self, config: BackboneConfig, trainable: bool) -> None:
        super().__init__()
        self.config = config
        self.trainable = trainable

    @property
    def taps_key(self) -> tuple[Any, ...]:
        """What is tapped: networks of one config and equal weights with the same key compute the same."""
        raise NotImplementedError

    def tensors(self, images: Tensor) -> list[Tensor]:
        """Compute by PyTorch all that `forward` returns of B×3×H×W images, B×… float32, in one list."""
        raise NotImplementedError

    def _computed(self, images: Tensor) -> list[Tensor]:
        return self.tensors(images) if self.compiled is None else self.compiled(images)

    def _finish(self) -> None:
        if not self.trainable:
            self.requires_grad_(False)
        if self.config.channels_last:
            self.to(memory_format=torch.channels_last)
        if self.config.compile:
            self.compile()
        self.train(False)

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode, but keep a frozen backbone in evaluation mode: its batch norm keeps its running statistics."""
        super().train(mode and self.trainable)
        return self

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            # frozen features are the same whether they are computed in a training step under autocast or beforehand
            free = self.trainable or not torch.amp.is_autocast_available(device.type)
            return nullcontext() if free else torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, torch.bfloat16 if self.config.precision == "bf16" else torch.float16)

    def _format(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images


class VitFeatures(NamedTuple):
    """Taps of a vision transformer.

    Attributes:
        tokens: one B×N×D float32 tensor per tapped block, raw block outputs, prefix tokens (CLS, registers) dropped.
        attention: B×h×w float32, post-softmax attention of CLS to the patches, mean over heads; None if not asked
            for. For "rollout" the attention rolled out over all blocks.
    """

    tokens: list[Tensor]
    attention: Tensor | None


class VitBackbone(Backbone):
    """A timm `VisionTransformer` tapped at blocks.

    Args:
        config: encoder and weights.
        image_size: input height and width in pixels; position embeddings are resampled to it.
        blocks: 0-based indices of the blocks whose outputs are wanted.
        attention_block: block whose CLS attention is wanted; negative counts from the last; None for none.
        rollout: give attention rollout over blocks 0…attention_block instead.
        trainable: whether gradients are kept.

    Raises:
        OptionError: not a VisionTransformer, or a block that it does not have.
        WeightsError: weights missing or not fitting.
    """

    def __init__(
        self,
        config: BackboneConfig,
        image_size: int,
        blocks: Sequence[int],
        attention_block: int | None = None,
        rollout: bool = False,
        trainable: bool = False,
    ) -> None:
        super().__init__(config, trainable)
        if not is_model_in_modules(config.name, VIT_MODULES):
            raise OptionError(
                f"backbone.name={config.name}: this method needs a plain vision transformer (vit_…, deit_…)"
            )
        if config.padding_side:
            raise OptionError(
                f"backbone.padding_side={config.padding_side}: {config.name} has no layers with 'same' padding; leave "
                f"it null"
            )
        model = _create(config, num_classes=0, img_size=image_size)
        patch = model.patch_embed.patch_size
        if image_size % patch[0] or image_size % patch[1]:
            raise OptionError(
                f"{config.name} cuts images into patches of {patch[0]}×{patch[1]} pixels, which do not tile an input "
                f"of {image_size}; set input.crop (or input.size, input.pad) to a multiple"
            )
        depth = len(model.blocks)
        if attention_block is not None and attention_block < 0:
            attention_block += depth
        wrong = [b for b in [*blocks, *([] if attention_block is None else [attention_block])] if not 0 <= b < depth]
        if wrong or not blocks:
            raise OptionError(f"{config.name} has blocks 0…{depth - 1}; asked for {list(blocks)}, {attention_block}")
        if attention_block is not None and model.cls_token is None:
            raise OptionError(f"{config.name} has no CLS token, so there is no CLS attention; choose mask=off")
        if attention_block is not None and not all(
            isinstance(block, Block) and isinstance(block.attn, Attention) for block in model.blocks
        ):
            raise OptionError(f"the blocks of {config.name} are not of the plain pre-norm kind; choose mask=off")
        self.vit: Any = model
        self.blocks = tuple(blocks)
        self.attention_block = attention_block
        self.rollout = rollout
        self.grid: tuple[int, int] = tuple(model.patch_embed.grid_size)
        self.dimension: int = model.embed_dim
        last_whole = max(blocks) if attention_block is None else max(max(blocks), attention_block - 1)
        # what is never run is not kept, so that model folders hold no dead weights
        keep = last_whole + 1 if attention_block is None else max(last_whole, attention_block) + 1
        model.blocks = model.blocks[:keep]
        model.norm = nn.Identity()
        self._whole_blocks = last_whole + 1
        self._finish()

    def forward(self, images: Tensor) -> VitFeatures:
        """Compute the taps of B×3×H×W images in one pass."""
        computed = self._computed(images)
        tokens = computed[: len(self.blocks)]
        return VitFeatures(tokens, None if self.attention_block is None else computed[-1])

    @property
    def taps_key(self) -> tuple[Any, ...]:
        return self.blocks, self.attention_block, self.rollout

    def tensors(self, images: Tensor) -> list[Tensor]:
        with self._precision(images.device):
            tokens, attention = self._taps(self._format(images))
        return [tap.float() for tap in (*tokens, *([] if attention is None else [attention]))]

    def _taps(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        vit = self.vit
        x = vit.patch_embed(images)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))  # B T D
        tapped: dict[int, Tensor] = {}
        attention: Tensor | None = None
        rolled: Tensor | None = None
        for index, block in enumerate(vit.blocks):
            if self.rollout and self.attention_block is not None and index <= self.attention_block:
                weights = _attention(block.attn, block.norm1(x), all_queries=True).mean(1)  # B T T
                rolled = _roll_out(rolled, weights)
            elif index == self.attention_block:
                attention = _attention(block.attn, block.norm1(x), all_queries=False).mean(1)[:, 0]  # B T
            if index < self._whole_blocks:
                x = block(x)  # B T D
            if index in self.blocks:
                tapped[index] = x[:, vit.num_prefix_tokens :]  # B N D
        if rolled is not None:
            attention = rolled[:, 0]
        if attention is not None:
            attention = attention[:, vit.num_prefix_tokens :].unflatten(1, self.grid)  # B h w
        return [tapped[index] for index in self.blocks], attention


def _attention(attn: Any, x: Tensor, all_queries: bool) -> Tensor:
    """Return attention weights after softmax, B×heads×Q×T; Q = T, or 1 (CLS only).

    timm's own forward does not give them.
    """
    batch, count, _ = x.shape
    qkv = attn.qkv
    width = attn.num_heads * attn.head_dim
    queries = x if all_queries else x[:, :1]
    bias = (None, None) if qkv.bias is None else (qkv.bias[:width], qkv.bias[width : 2 * width])
    q = nn.functional.linear(queries, qkv.weight[:width], bias[0])
    k = nn.functional.linear(x, qkv.weight[width : 2 * width], bias[1])
    q = attn.q_norm(q.reshape(batch, -1, attn.num_heads, attn.head_dim).transpose(1, 2))
    k = attn.k_norm(k.reshape(batch, count, attn.num_heads, attn.head_dim).transpose(1, 2))
    return (q * attn.scale @ k.transpose(-2, -1)).float().softmax(-1)


def _roll_out(rolled: Tensor | None, weights: Tensor) -> Tensor:
    """Add a step of attention rollout (Abnar and Zuidema 2020), half attention and half identity, to those before."""
    mixed = 0.5 * weights + 0.5 * torch.eye(weights.shape[-1], device=weights.device)
    return mixed if rolled is None else mixed @ rolled


def _feature_indices(config: BackboneConfig, taps: Sequence[int]) -> tuple[int, ...]:
    """Return timm's `features_only` indices of the maps with these reductions.

    Raises:
        OptionError: a reduction that no map has, or a network in which several maps have the same.
    """
    known = [stage["reduction"] for stage in _feature_stages(config)]
    if not set(taps) <= set(known):
        raise OptionError(
            f"{config.name} has feature maps of reduction {_listed(known)}; asked for {_listed(taps)}; "
            f"choose taps among those it has"
        )
    return tuple(known.index(reduction) for reduction in taps)


def pyramid_channels(config: BackboneConfig, reductions: Sequence[int]) -> tuple[int, ...]:
    """Return the channel counts of an encoder's feature maps of these reductions.

    Raises:
        OptionError: a reduction that no map has, or a network in which several maps have the same.
    """
    channels = {stage["reduction"]: stage["num_chs"] for stage in _feature_stages(config)}
    if not set(reductions) <= set(channels):
        raise OptionError(
            f"backbone.name={config.name}: this method takes encoders with feature maps of reduction "
            f"{_listed(reductions)}, as a timm ResNet or EfficientNet; it has {_listed(list(channels))}"
        )
    return tuple(channels[reduction] for reduction in reductions)


def _feature_stages(config: BackboneConfig) -> list[dict[str, Any]]:
    """Return timm's account of each feature map: its "reduction" and its channels, "num_chs".

    Raises:
        OptionError: several maps have the same reduction.
    """
    with torch.device("meta"):  # only the network's structure is asked for, so no weights are drawn or loaded
        network = _make(config, False, {**config.options, "features_only": True})
    stages: list[dict[str, Any]] = network.feature_info.info
    known = [stage["reduction"] for stage in stages]
    repeated = sorted({reduction for reduction in known if known.count(reduction) > 1})
    if repeated:
        raise OptionError(
            f"{config.name} has several feature maps of reduction {_listed(repeated)}; this method needs a pyramid, "
            f"each map coarser than the last, as of a ResNet, EfficientNet, ConvNeXt or Swin"
        )
    return stages


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


class CnnBackbone(Backbone):
    """A timm encoder that gives a pyramid of feature maps, tapped at some of its levels.

    Args:
        config: encoder and weights.
        taps: the levels wanted, by their reduction: the stride of a map with regard to the image, so that a map of
            reduction 8 has a cell for every 8×8 pixels. Ascending, thus fine to coarse; (4, 8, 16) are layer1 to
            layer3 of a ResNet. What lies behind the last of them is not kept where timm can cut the network.
        trainable: whether gradients are kept and batch norm may train.

    Attributes:
        channels: channel count of each tap.

    Raises:
        OptionError: taps that are not ascending or that the encoder does not have, or an encoder that is no pyramid,
            as plain vision transformers, whose maps all have the same reduction.
        WeightsError: weights missing or not fitting.
    """

    def __init__(self, config: BackboneConfig, taps: Sequence[int], trainable: bool = False) -> None:
        super().__init__(config, trainable)
        check_taps(taps)
        self.taps = tuple(taps)
        self.encoder: Any = _create(config, features_only=True, out_indices=_feature_indices(config, taps))
        if config.padding_side:
            fix_padding(self.encoder, config.padding_side, config.name)
        # timm's feature lists keep the layout their network works in; Swin's, for one, has channels last
        self._last = getattr(self.encoder, "output_fmt", Format.NCHW) == Format.NHWC
        self.channels: list[int] = self.encoder.feature_info.channels()
        self._finish()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return feature maps B×C×h×w float32 of B×3×H×W images, fine to coarse."""
        return self._computed(images)

    @property
    def taps_key(self) -> tuple[Any, ...]:
        return self.taps

    def tensors(self, images: Tensor) -> list[Tensor]:
        with self._precision(images.device):
            maps = self.encoder(self._format(images))
        return [m.permute(0, 3, 1, 2).float() if self._last else m.float() for m in maps]
