"""Encoders against timm's own: same weights, same features; weights files that fit and that do not."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from unianom.backbones import CnnBackbone, VitBackbone, weight_statistics
from unianom.configs.backbone import BackboneConfig, with_padding_of_old
from unianom.errors import OptionError, WeightsError
from unianom.methods import METHODS
from unianom.options import from_plain, to_plain
from unianom.weight_formats import read_state

VIT = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ALL_WAYS = r"'pretrained'.*'package'.*file or URI.*'random'"


def images(side: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def block_outputs(vit: torch.nn.Module, batch: Tensor) -> list[Tensor]:
    """Patch tokens that leave each block of a timm transformer."""
    found: list[Tensor] = []
    skip = vit.num_prefix_tokens
    handles = [block.register_forward_hook(lambda _m, _i, out: found.append(out[:, skip:])) for block in vit.blocks]
    with torch.inference_mode():
        vit.eval().forward_features(batch)
    for handle in handles:
        handle.remove()
    return found


def same_taps(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.fixture(scope="module")
def whole_vit() -> torch.nn.Module:
    """A classifier as timm saves it, at its published image size."""
    torch.manual_seed(5)
    return timm.create_model(VIT, num_classes=10, **SMALL)


def save(state: dict[str, Tensor], path: Path) -> str:
    safetensors.torch.save_file(state, path)
    return str(path)


# ------------------------------------------------------------------------------------------------- random weights
def test_random_weights_follow_their_seed_and_leave_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = VitBackbone(BackboneConfig(VIT, "random", SMALL), 64, (1,))
    assert torch.equal(torch.rand(1), expected)
    same = VitBackbone(BackboneConfig(VIT, "random", SMALL), 64, (1,))
    other = VitBackbone(BackboneConfig(VIT, "random", SMALL, random_seed=1), 64, (1,))
    taps = [backbone(images(64)).tokens[0] for backbone in (one, same, other)]
    assert torch.equal(taps[0], taps[1])
    assert not torch.allclose(taps[0], taps[2])


def test_arguments_that_timm_divides_by_are_refused():
    with pytest.raises(OptionError, match=rf"timm cannot make {VIT} with .*num_heads=0.*: .*zero"):
        VitBackbone(BackboneConfig(VIT, weights="random", options={"num_heads": 0}), 64, (0,))


def test_random_weights_are_those_of_timm():
    torch.manual_seed(4)
    plain = timm.create_model(VIT, img_size=64, num_classes=0, **SMALL)
    mine = VitBackbone(BackboneConfig(VIT, "random", SMALL, random_seed=4), 64, (0, 2))
    expected = block_outputs(plain, images(64))
    same_taps(mine(images(64)).tokens, [expected[0], expected[2]])

    torch.manual_seed(4)
    plain = timm.create_model("resnet10t", features_only=True, out_indices=(1, 2)).eval()
    encoder = CnnBackbone(BackboneConfig("resnet10t", "random", random_seed=4), (4, 8))
    with torch.inference_mode():
        same_taps(encoder(images(64)), plain(images(64)))


# -------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("head", [True, False], ids=["with head", "without head"])
def test_transformer_from_safetensors_equals_timm(head, whole_vit, tmp_path):
    state = {key: value for key, value in whole_vit.state_dict().items() if head or not key.startswith("head")}
    path = save(state, tmp_path / "vit.safetensors")
    mine = VitBackbone(BackboneConfig(VIT, path, SMALL), 224, (0, 2))
    expected = block_outputs(whole_vit, images(224, 1))
    same_taps(mine(images(224, 1)).tokens, [expected[0], expected[2]])


@pytest.mark.parametrize("side", [64, 128])
def test_position_embeddings_are_resampled_as_timm_does(side, whole_vit, tmp_path):
    path = save(whole_vit.state_dict(), tmp_path / "vit.safetensors")
    mine = VitBackbone(BackboneConfig(VIT, path, SMALL), side, (0, 2))
    assert mine.grid == (side // 8, side // 8)
    plain = timm.create_model(VIT, num_classes=10, **SMALL)
    plain.load_state_dict(whole_vit.state_dict())
    plain.set_input_size(img_size=side)
    expected = block_outputs(plain, images(side))
    same_taps(mine(images(side)).tokens, [expected[0], expected[2]])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"student": {}, "teacher": {f"module.backbone.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {
            "teacher": {**{f"backbone.{k}": v for k, v in state.items()}, "head.mlp.0.weight": torch.ones(2)}
        },
    ],
    ids=["plain", "state_dict", "model", "teacher", "module.", "projection head"],
)
def test_torch_files_of_training_scripts_are_unwrapped(wrap, whole_vit, tmp_path):
    state = {key: value for key, value in whole_vit.state_dict().items() if not key.startswith("head")}
    path = tmp_path / "checkpoint.pth"
    torch.save(wrap(state), path)
    mine = VitBackbone(BackboneConfig(VIT, str(path), SMALL), 224, (2,))
    same_taps(mine(images(224, 1)).tokens, block_outputs(whole_vit, images(224, 1))[2:])


@pytest.mark.parametrize(
    ("name", "options", "indices"),
    [
        ("resnet10t", {}, (2, 3)),
        ("mobilenetv2_050", {"pad_type": "same"}, (2, 3)),
        ("convnext_atto", {}, (1, 2)),  # timm's feature list renames its stages
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24}, (1, 2)),  # NHWC
        ("twins_svt_small", {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}, (1, 2)),  # timm's getter wraps it
    ],
)
def test_feature_maps_from_a_file_of_the_whole_network_equal_timm(name, options, indices, tmp_path):
    """Maps of reductions 8 and 16, which have other numbers among those of networks that begin at 2 or at 4."""
    torch.manual_seed(6)
    whole = timm.create_model(name, num_classes=10, **options).eval()
    path = save(whole.state_dict(), tmp_path / "whole.safetensors")
    encoder = CnnBackbone(BackboneConfig(name, path, options), (8, 16))
    with torch.inference_mode():
        mine = encoder(images(64))
        theirs = whole.forward_intermediates(
            images(64), indices=list(indices), norm=False, output_fmt="NCHW", intermediates_only=True
        )
    same_taps(mine, theirs)
    assert [found.shape for found in mine] == [(2, encoder.channels[0], 8, 8), (2, encoder.channels[1], 4, 4)]


def test_faults_of_a_weights_file_are_named(whole_vit, tmp_path):
    state = whole_vit.state_dict()

    def load(changed: dict[str, Tensor]) -> None:
        VitBackbone(BackboneConfig(VIT, save(changed, tmp_path / "faulty.safetensors"), SMALL), 224, (1,))

    load(state)
    with pytest.raises(WeightsError, match=r"faulty.*do not fit.*missing: blocks.1.mlp.fc1.weight \(1\)"):
        load({key: value for key, value in state.items() if key != "blocks.1.mlp.fc1.weight"})
    with pytest.raises(WeightsError, match=r"unknown: adapter.weight \(1\)"):
        load({**state, "adapter.weight": torch.ones(3)})
    with pytest.raises(WeightsError, match=r"of another shape: blocks.0.mlp.fc1.bias \(1\)"):
        load({**state, "blocks.0.mlp.fc1.bias": torch.ones(7)})
    with pytest.raises(WeightsError, match=r"missing: .*, .*, .* … \(\d+\).*backbone.options"):
        load(timm.create_model("resnet10t").state_dict())


def test_missing_weights_name_all_ways(tmp_path):
    for weights in ("pretraned", str(tmp_path / "none.pth"), str(tmp_path)):
        with pytest.raises(WeightsError, match=rf"{re.escape(weights)}; .*{ALL_WAYS}"):
            CnnBackbone(BackboneConfig("resnet10t", weights), (4,))


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_torch_file_runs_no_code(tmp_path):
    marker, path = tmp_path / "was here", tmp_path / "malicious.pth"
    torch.save({"state_dict": RunsCode(marker)}, path)
    with pytest.raises(WeightsError, match="cannot read weights"):
        read_state(str(path))
    path.write_bytes(pickle.dumps(RunsCode(marker), protocol=2))
    with pytest.raises(WeightsError, match="cannot read weights"):
        read_state(str(path))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth"])
def test_damaged_files_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    with pytest.raises(WeightsError, match=rf"cannot read weights from .*{name}"):
        read_state(str(tmp_path / name))


def test_a_torch_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "log.pth")
    with pytest.raises(WeightsError, match="no state dict"):
        read_state(str(tmp_path / "log.pth"))


# ------------------------------------------------------------------------------------------------- published shapes
def test_wide_resnet_taps():
    """Stages 1 to 3 at 256 pixels: 256@64², 512@32², 1024@16²; 24,862,528 parameters."""
    with torch.device("meta"):
        encoder = CnnBackbone(BackboneConfig("wide_resnet50_2.tv_in1k", "random"), (4, 8, 16))
        shapes = [tuple(found.shape) for found in encoder(torch.empty(1, 3, 256, 256))]
    assert shapes == [(1, 256, 64, 64), (1, 512, 32, 32), (1, 1024, 16, 16)]
    assert encoder.channels == [256, 512, 1024]
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 24_862_528


def test_efficientnet_taps():
    """The last blocks of stages 0, 1, 2 and 4 at 224 pixels, 272 channels together."""
    with torch.device("meta"):
        encoder = CnnBackbone(BackboneConfig("tf_efficientnet_b4.aa_in1k", "random"), (2, 4, 8, 16))
        shapes = [tuple(found.shape) for found in encoder(torch.empty(1, 3, 224, 224))]
        whole = timm.create_model("tf_efficientnet_b4.aa_in1k")
    assert shapes == [(1, 24, 112, 112), (1, 32, 56, 56), (1, 56, 28, 28), (1, 160, 14, 14)]
    assert encoder.channels == [24, 32, 56, 160]
    assert sum(parameter.numel() for parameter in whole.parameters()) == 19_341_616


@pytest.mark.parametrize(
    ("name", "grid", "parameters"),
    [("vit_base_patch8_224.dino", 28, 85_807_872), ("vit_base_patch16_224.dino", 14, 85_798_656)],
)
def test_base_transformers(name, grid, parameters):
    """ViT-B/8 and ViT-B/16: 784 and 196 patches of width 768; all parameters but the final norm (2·768) are kept."""
    with torch.device("meta"):
        encoder = VitBackbone(BackboneConfig(name, "random"), 224, range(2, 10), attention_block=-1)
        features = encoder(torch.empty(1, 3, 224, 224))
    assert encoder.grid == (grid, grid)
    assert [tuple(tokens.shape) for tokens in features.tokens] == [(1, grid * grid, 768)] * 8
    assert features.attention is not None
    assert features.attention.shape == (1, grid, grid)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters - 2 * 768


def test_input_statistics_are_those_of_the_weights():
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for name in ("wide_resnet50_2.tv_in1k", "vit_base_patch8_224.dino", "tf_efficientnet_b4.aa_in1k"):
        assert weight_statistics(BackboneConfig(name)) == imagenet
    assert weight_statistics(BackboneConfig(VIT)) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# --------------------------------------------------------------------------------------------------- other settings
def test_prefix_tokens_are_dropped_and_attention_is_that_of_cls():
    """Register tokens stand between CLS and the patches."""
    options = {**SMALL, "reg_tokens": 4}
    mine = VitBackbone(BackboneConfig(VIT, "random", options), 64, (2,), attention_block=1)
    torch.manual_seed(0)
    plain = timm.create_model(VIT, img_size=64, num_classes=0, **options).eval()
    weights: list[Tensor] = []
    plain.blocks[1].attn.fused_attn = False
    plain.blocks[1].attn.attn_drop.register_forward_hook(lambda _m, i, _o: weights.append(i[0]))
    same_taps(mine(images(64)).tokens, block_outputs(plain, images(64))[2:])
    expected = weights[0].mean(1)[:, 0, 5:].reshape(2, 8, 8)
    torch.testing.assert_close(mine(images(64)).attention, expected, rtol=1e-4, atol=1e-7)


def test_deit_is_a_plain_transformer_too():
    features = VitBackbone(BackboneConfig("deit_tiny_patch16_224", "random", {"depth": 2}), 64, (1,))(images(64))
    assert features.tokens[0].shape == (2, 16, 192)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_near_and_returned_as_float32(precision):
    full = VitBackbone(BackboneConfig(VIT, "random", SMALL), 64, (2,), attention_block=2)(images(64))
    half = VitBackbone(BackboneConfig(VIT, "random", SMALL, precision=precision), 64, (2,), attention_block=2)(
        images(64)
    )
    assert half.attention is not None
    assert half.tokens[0].dtype == half.attention.dtype == torch.float32
    assert not torch.equal(half.tokens[0], full.tokens[0])
    torch.testing.assert_close(half.tokens[0], full.tokens[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(half.attention, full.attention, rtol=0.05, atol=1e-4)


def test_channels_last_changes_nothing():
    plain = CnnBackbone(BackboneConfig("resnet10t", "random"), (4, 8))(images(64))
    last = CnnBackbone(BackboneConfig("resnet10t", "random", channels_last=True), (4, 8))(images(64))
    same_taps(last, plain)


def test_a_frozen_encoder_stays_frozen_and_a_trainable_one_trains():
    frozen = CnnBackbone(BackboneConfig("resnet10t", "random"), (4,)).train()
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trainable = CnnBackbone(BackboneConfig("resnet10t", "random"), (4,), trainable=True).train()
    assert all(module.training for module in trainable.modules())
    assert all(parameter.requires_grad for parameter in trainable.parameters())


# ---------------------------------------------------------------------------------------------------- wrong options
def test_wrong_names_are_refused():
    with pytest.raises(OptionError, match=r"no such model; near: .*resnet"):
        CnnBackbone(BackboneConfig("resnet18x", "random"), (4,))
    with pytest.raises(OptionError, match=r"nonsense.*resnet18\.tv_in1k"):
        CnnBackbone(BackboneConfig("resnet18.nonsense", "random"), (4,))
    with pytest.raises(OptionError, match="bogus"):
        CnnBackbone(BackboneConfig("resnet10t", "random", {"bogus": 1}), (4,))


@pytest.mark.parametrize("taps", [(), (-4,), (0, 2), (16, 4), (8, 8)])
def test_wrong_taps_are_refused(taps):
    with pytest.raises(OptionError, match=rf"taps={re.escape(str(taps))} must be reductions"):
        CnnBackbone(BackboneConfig("resnet10t", "random"), taps)


@pytest.mark.parametrize(
    ("name", "taps", "said"),
    [
        ("resnet18", (1, 2, 3), "resnet18 has feature maps of reduction 2, 4, 8, 16, 32; asked for 1, 2, 3;"),
        ("convnext_atto", (2, 4), "convnext_atto has feature maps of reduction 4, 8, 16, 32; asked for 2, 4;"),
        ("resnet18", (8, 64), "asked for 8, 64;"),
        (VIT, (16,), f"{VIT} has several feature maps of reduction 16; this method needs a pyramid"),
        (VIT, (4, 8), f"{VIT} has several feature maps of reduction 16; this method needs a pyramid"),
    ],
)
def test_reductions_that_an_encoder_lacks_are_named_before_weights_are_read(name, taps, said):
    with pytest.raises(OptionError, match=re.escape(said)):
        CnnBackbone(BackboneConfig(name, "nowhere.pth"), taps)


def test_a_dilated_network_with_two_maps_of_one_reduction_is_refused():
    """With an output stride of 16, layer3 and layer4 share a reduction, and neither is *the* map of reduction 16."""
    with pytest.raises(OptionError, match="several feature maps of reduction 16"):
        CnnBackbone(BackboneConfig("resnet10t", "random", {"output_stride": 16}), (8, 16))


def test_wrong_transformers_are_refused():
    config = BackboneConfig(VIT, "random", SMALL)
    with pytest.raises(OptionError, match="plain vision transformer"):
        VitBackbone(BackboneConfig("resnet10t", "random"), 64, (1,))
    with pytest.raises(OptionError, match=r"blocks 0…2; asked for \[3\]"):
        VitBackbone(config, 64, (3,))
    with pytest.raises(OptionError, match="blocks 0…2"):
        VitBackbone(config, 64, ())
    with pytest.raises(OptionError, match="blocks 0…2"):
        VitBackbone(config, 64, (1,), attention_block=-4)
    with pytest.raises(OptionError, match=r"8×8 pixels.*60"):
        VitBackbone(config, 60, (1,))
    no_cls = BackboneConfig(VIT, "random", {**SMALL, "class_token": False, "global_pool": "avg"})
    with pytest.raises(OptionError, match="no CLS token"):
        VitBackbone(no_cls, 64, (1,), attention_block=1)
    assert VitBackbone(no_cls, 64, (1,))(images(64)).tokens[0].shape == (2, 64, 48)
    post_norm = timm.models.vision_transformer.ResPostBlock
    with pytest.raises(OptionError, match="pre-norm"):
        VitBackbone(BackboneConfig(VIT, "random", {**SMALL, "block_fn": post_norm}), 64, (1,), attention_block=1)


# -------------------------------------------------------------------------------------------------------- real weights
@pytest.mark.real
def test_real_transformer_equals_timm(real_data):
    """The file holds a head of 200 classes, which an encoder has no use for."""
    path = real_data / "weights" / "vit_tiny_patch16_224.safetensors"
    plain = timm.create_model(VIT, num_classes=200)
    plain.load_state_dict(safetensors.torch.load_file(path))
    mine = VitBackbone(BackboneConfig(VIT, str(path)), 224, (2, 11), attention_block=-1)
    expected = block_outputs(plain, images(224, 1))
    same_taps(mine(images(224, 1)).tokens, [expected[2], expected[11]])


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "options", "whole"),
    [
        ("mobilenetv2_100", {"pad_type": "same"}, {"num_classes": 1001}),
        ("resnet18", {}, {"features_only": True, "out_indices": (1, 2, 3)}),
    ],
)
def test_real_convolutional_encoders_equal_timm(name, options, whole, real_data):
    """A classifier of 1001 classes, and a network that ends at its third stage."""
    path = next((real_data / "weights").glob(f"{name}*.safetensors"))
    encoder = CnnBackbone(BackboneConfig(name, str(path), options), (4, 8, 16))
    plain = timm.create_model(name, **options, **whole).eval()
    plain.load_state_dict(safetensors.torch.load_file(path))
    with torch.inference_mode():
        if "features_only" in whole:
            theirs = plain(images(96))
        else:
            theirs = plain.forward_intermediates(images(96), indices=[1, 2, 3], intermediates_only=True)
        same_taps(encoder(images(96)), theirs)


# ---- padding computed for another input -----------------------------------------------------------------------------

B4 = "tf_efficientnet_b4.aa_in1k"
AT_380 = {
    "conv_stem": (0, 1),
    "blocks.1.0.conv_dw": (0, 1),
    "blocks.2.0.conv_dw": (2, 2),
    "blocks.3.0.conv_dw": (0, 1),
    "blocks.5.0.conv_dw": (1, 2),
}
"""Zeros before and after, of the layers of stride 2. By hand: sides 380, 190, 95, 48, 24 → 12; kernels 3, 3, 5, 3, 5;
zeros = (side out - 1) · 2 + kernel - side in, the smaller half first."""
AT_224 = {**AT_380, "blocks.2.0.conv_dw": (1, 2)}
"""Sides 224, 112, 56, 28, 14 → 7."""


def strided(encoder: CnnBackbone) -> dict[str, nn.Conv2d]:
    return {
        name: module
        for name, module in encoder.encoder.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2)
    }


@pytest.mark.parametrize(("side", "expected"), [(380, AT_380), (224, AT_224)])
def test_padding_of_every_strided_layer(side, expected):
    encoder = CnnBackbone(BackboneConfig(B4, "random", padding_side=side), (2, 4, 8, 16))
    found = {name: layer.fixed for name, layer in strided(encoder).items()}
    assert found == {name: (*pair, *pair) for name, pair in expected.items()}


def test_maps_beyond_stride_4_differ_by_the_padding_alone():
    """Against timm's own network in which that one layer is replaced by an explicit padding and a plain convolution."""
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    taps = (2, 4, 8, 16)
    plain = CnnBackbone(BackboneConfig(B4, "random"), taps)
    fixed = CnnBackbone(BackboneConfig(B4, "random", padding_side=380), taps)
    own = CnnBackbone(BackboneConfig(B4, "random", padding_side=96), taps)
    by_hand = CnnBackbone(BackboneConfig(B4, "random"), taps)
    layer = by_hand.encoder.get_submodule("blocks.2.0.conv_dw")
    conv = nn.Conv2d(layer.in_channels, layer.out_channels, 5, 2, 0, groups=layer.groups, bias=False)
    conv.load_state_dict(layer.state_dict())
    by_hand.encoder.get_submodule("blocks.2.0").conv_dw = nn.Sequential(nn.ZeroPad2d(2), conv)
    with torch.no_grad():
        ours, theirs, expected, same = fixed(images), plain(images), by_hand(images), own(images)
    for number in range(4):
        assert torch.equal(ours[number], expected[number])
        assert torch.equal(same[number], theirs[number])
        assert torch.equal(ours[number], theirs[number]) == (number < 2)
    assert {key: value.shape for key, value in fixed.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }


def test_a_network_without_same_padding_is_refused():
    for name, kind, place in (("resnet10t", CnnBackbone, ((4, 8),)), (VIT, VitBackbone, (64, (0,)))):
        with pytest.raises(OptionError, match=f"padding_side=380: {name} has no layers with 'same' padding"):
            kind(BackboneConfig(name, "random", padding_side=380), *place)
    with pytest.raises(OptionError, match="padding_side=-1"):
        BackboneConfig(B4, padding_side=-1)


@pytest.mark.parametrize("method", ["uniad", "unias", "onenip"])
def test_the_released_code_pads_for_380_pixels(method):
    config = METHODS[method].Config
    assert config(preset="reference").backbone.padding_side == 380
    assert config(preset="paper").backbone.padding_side is None
    off = BackboneConfig(B4, padding_side=0)
    assert config(preset="reference", backbone=off).backbone.padding_side == 0
    other = BackboneConfig("wide_resnet50_2.tv_in1k")
    assert config(preset="reference", backbone=other).backbone == other


def test_old_options_are_the_same_plain_data():
    """Plans and model folders from before there was the option name it nowhere."""
    assert "padding_side" not in to_plain(BackboneConfig(B4))
    assert from_plain(BackboneConfig, to_plain(BackboneConfig(B4))) == BackboneConfig(B4)
    fixed = BackboneConfig(B4, padding_side=380)
    assert from_plain(BackboneConfig, to_plain(fixed)) == fixed
    config = METHODS["uniad"].Config
    old = {**to_plain(config()), "preset": "reference"}
    assert from_plain(config, old).backbone.padding_side == 380
    assert from_plain(config, with_padding_of_old(old)).backbone.padding_side == 0
    for plain in (to_plain(config()), to_plain(config(preset="reference"))):
        assert with_padding_of_old(plain) == plain
