"""Coupled models: any pair, every fusion, beginning exactly where their parts are."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.layers.exchange import Exchange
from chiasm.model_file import ModelInfo, load_model, preprocess_of, save_model
from chiasm.models import create_model, is_model
from chiasm.models.coupled import Point, couple, exchange_points
from chiasm.models.steps import ConvSteps, MapSize, TokenSteps, conv_steps, token_steps
from chiasm.predictor import load

CLASSES = 5

# One network of each family, the smallest timm has.
CONV = {
    "ResNet": "resnet18",
    "ResNeXt": "resnext26ts",
    "ResNet-v2": "resnetv2_50",
    "SE-ResNet": "seresnet18",
    "Res2Net": "res2net50_14w_8s",
    "ConvNeXt": "convnext_atto",
    "ConvNeXt-V2": "convnextv2_atto",
    "EfficientNet": "efficientnet_b0",
    "EfficientNet of TensorFlow, 'same' padding": "tf_efficientnet_b0",
    "EfficientNet-Lite": "efficientnet_lite0",
    "MobileNetV3": "mobilenetv3_small_050",
    "MobileNetV4": "mobilenetv4_conv_small_035",
    "RegNet": "regnety_002",
    "DenseNet": "densenet121",
    "HRNet": "hrnet_w18_small",
    "VGG": "vgg11_bn",
    "DLA": "dla46_c",
    "GhostNet": "ghostnet_050",
    "RepVGG": "repvgg_a0",
    "CSPNet": "cspresnet50",
    "Conformer": "conformer_nano_patch8_64",
    "MobileViT": "mobilevit_xxs",
}
CONV_ARGS = {"VGG": {"mlp_ratio": 0.01}}  # its head is 120 M weights otherwise
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", SMALL),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "DeiT-3": ("deit3_small_patch16_224", SMALL),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", SMALL),
    "DINOv3": ("vit_small_patch16_dinov3", SMALL),
    "EVA-02": ("eva02_tiny_patch14_224", SMALL),
    "BEiT": ("beit_base_patch16_224", {**SMALL, "img_size": 64}),
    "CLIP": ("vit_base_patch32_clip_224", SMALL),
    "SigLIP": ("vit_base_patch16_siglip_224", SMALL),
}
VIT, VIT_ARGS = TRANSFORMERS["ViT"]
WAYS: list[dict[str, Any]] = [
    {"fusion": "early"},
    {"fusion": "early", "keep_patches": True},
    {"fusion": "mid"},
    {"fusion": "mid", "exchange": "gated", "points": "every block"},
    {"fusion": "mid", "exchange": "attention", "direction": "tokens_to_map"},
    {"fusion": "mid", "direction": "map_to_tokens"},
    {"fusion": "late"},
    {"fusion": "late", "join": "concat"},
    {"fusion": "late", "join": "gated"},
    {"fusion": "sandwich"},
]


def _images(height: int = 64, width: int = 64, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))


@cache
def _conv(name: str) -> tuple[nn.Module, ConvSteps]:
    net = create_model(name, num_classes=CLASSES, **next((CONV_ARGS[f] for f in CONV_ARGS if CONV[f] == name), {}))
    return net, conv_steps(net, name)


def _couple(conv: str = "resnet18", tokens: str = "ViT", **options: Any) -> Any:
    name, args = TRANSFORMERS[tokens]
    torch.manual_seed(0)
    return couple(conv, name, num_classes=CLASSES, tokens_args=args, **options).eval()


def _own(model: Any, name: str, images: Tensor) -> Tensor:
    """What a part says by itself."""
    return model.conv(images) if name == "conv" else model.tokens(model.token_image(images))


def _opened(model: nn.Module) -> nn.Module:
    """As training leaves it: exchanges that say something, norms that have seen images."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("scale", "to_tokens", "to_map"):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


# --------------------------------------------------------------------------------------------------------- every pair


@pytest.mark.parametrize("family", CONV)
def test_convolutional_families_are_stepped(family: str) -> None:
    net, steps = _conv(CONV[family])
    net.eval()
    image, state = _images(96, 64), None
    with torch.no_grad():
        state = steps.enter(net, image)
        for i in range(len(steps)):
            state = steps.step(net, i, state)
            assert state.x.shape[1] == steps.sizes[i].channels
        left, whole = steps.leave(net, state), net.forward_features(image)
        assert torch.equal(net.forward_head(left), net.forward_head(whole))
    assert len(steps.levels) >= 4, steps
    reductions = [steps.sizes[i].reduction for i in steps.levels]
    assert reductions == sorted(reductions)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformer_families_are_stepped(family: str) -> None:
    name, args = TRANSFORMERS[family]
    net = create_model(name, **args)
    steps = token_steps(net, name)
    assert len(steps) == 2
    assert steps.dim == 48
    assert steps.prefix == net.num_prefix_tokens


@pytest.mark.parametrize("family", CONV)
def test_every_family_is_coupled(family: str) -> None:
    """Each with a Transformer and a way by its place in the table, which together go through all of both."""
    place = list(CONV).index(family)
    transformer, way = list(TRANSFORMERS)[place % len(TRANSFORMERS)], WAYS[place % len(WAYS)]
    model, images = _couple(CONV[family], transformer, **way, conv_args=CONV_ARGS.get(family)), _images()
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, CLASSES)
        torch.testing.assert_close(model.forward_head(model.forward_features(images)), logits)
        if hasattr(model, "forward_branches"):
            torch.testing.assert_close(torch.stack(list(model.forward_branches(images).values())).mean(0), logits)
    _opened(model).train()(images).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@given(st.sampled_from(sorted(set(CONV) - {"VGG"})), st.sampled_from(sorted(TRANSFORMERS)), st.sampled_from(WAYS))
@settings(max_examples=12, deadline=None)
def test_any_pair_in_any_way(family: str, transformer: str, way: dict[str, Any]) -> None:
    model = _opened(_couple(CONV[family], transformer, **way))
    with torch.no_grad():
        assert model(_images(64, 96)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("xception41", "'blocks.0.stack.conv1' does not take"),
        ("swin_tiny_patch4_window7_224", "does not take images of any size"),
        ("vit_tiny_patch16_224", "does not take images of any size"),
    ],
)
def test_networks_that_cannot_be_stepped_are_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(ChiasmError, match=rf"^{name} cannot be coupled: .*({why})"):
        conv_steps(timm.create_model(name), name)


@pytest.mark.parametrize("name", ["cait_xxs24_224", "mixer_s32_224", "resnet18", "mobilevit_xxs"])
def test_what_is_no_plain_transformer_is_refused_by_name(name: str) -> None:
    with pytest.raises(ChiasmError, match=rf"^{name} cannot be coupled: .* no plain Transformer such as ViT"):
        token_steps(timm.create_model(name), name)


# ------------------------------------------------------------------------------------------ they begin where they are


@pytest.mark.parametrize("unit", ["fcu", "gated", "attention"])
@pytest.mark.parametrize("points", ["every stage", "every block", [[2, 0], [4, 1]]])
def test_mid_begins_where_its_parts_are(unit: str, points: Any) -> None:
    model = _couple(fusion="mid", exchange=unit, points=points)
    images = _images(80, 64)
    with torch.no_grad():
        branches = model.forward_branches(images)
        assert torch.equal(branches["conv"], model.conv(images))
        assert torch.equal(branches["tokens"], model.tokens(model.token_image(images)))
        assert torch.equal(model(images), (branches["conv"] + branches["tokens"]) / 2)
        _opened(model)
        moved = model.forward_branches(images)
    assert all(not torch.allclose(moved[name], branches[name]) for name in branches)


def test_late_begins_where_its_parts_are() -> None:
    model, images = _couple(fusion="late"), _images()
    with torch.no_grad():
        branches = model.forward_branches(images)
        assert torch.equal(branches["conv"], model.conv(images))
        assert torch.equal(branches["tokens"], model.tokens(model.token_image(images)))


def test_sandwich_begins_where_the_convolutional_part_is() -> None:
    model, images = _couple(fusion="sandwich"), _images()
    with torch.no_grad():
        before = model(images)
        assert torch.equal(before, model.conv(images))
        assert not torch.allclose(_opened(model)(images), before)


def test_early_with_its_patches_begins_where_the_transformer_is() -> None:
    model, images = _couple(fusion="early", keep_patches=True), _images()
    with torch.no_grad():
        before = model(images)
        assert torch.equal(before, model.tokens(model.token_image(images)))
        assert not torch.allclose(_opened(model)(images), before)


def test_training_opens_the_exchange() -> None:
    model = _couple(fusion="mid").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = _images(), torch.tensor([0, 1])
    for _ in range(3):
        loss = sum(nn.functional.cross_entropy(logits, labels) for logits in model.forward_branches(images).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for exchange in model.exchanges:
        assert exchange.to_map.abs().max() > 0
        assert exchange.to_tokens.abs().max() > 0
    down = model.exchanges[0].down.project.weight
    assert down.grad is not None
    assert down.grad.abs().max() > 0, "once the scale is not zero, what stands before it learns too"


@pytest.mark.parametrize("direction", ["map_to_tokens", "tokens_to_map"])
def test_one_direction_leaves_the_other_branch_alone(direction: str) -> None:
    model, images = _opened(_couple(fusion="mid", direction=direction)), _images()
    alone = "conv" if direction == "map_to_tokens" else "tokens"
    with torch.no_grad():
        branches = model.forward_branches(images)
        assert torch.equal(branches[alone], _own(model, alone, images))
        (other,) = set(branches) - {alone}
        assert not torch.allclose(branches[other], _own(model, other, images))


# -------------------------------------------------------------------------------------------------- inputs and outputs


@given(height=st.integers(33, 90), width=st.integers(33, 90), way=st.integers(0, len(WAYS) - 1))
@settings(max_examples=20, deadline=None)
def test_any_size(height: int, width: int, way: int) -> None:
    model = _at_any_size(way)
    with torch.no_grad():
        assert model(_images(height, width)).isfinite().all()


@cache
def _at_any_size(way: int) -> nn.Module:
    return _opened(_couple("mobilenetv3_small_050", "DINOv2 with registers", **WAYS[way]))


def test_each_part_sees_its_own_normalisation() -> None:
    model = _couple("resnet18", "SigLIP", fusion="late")
    image = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    torch.testing.assert_close(model.token_image((image - mean) / std), (image - 0.5) / 0.5)
    assert preprocess_of(model) == preprocess_of(model.conv)
    assert torch.equal(_couple("resnet18", "DeiT-3", fusion="late").token_image(image), image)


def test_a_transformer_of_one_size_gets_that_size() -> None:
    model = _couple("resnet18", "BEiT", fusion="mid")
    assert model.token_image(_images(100, 80)).shape == (2, 3, 64, 64)
    assert model(_images(100, 80)).shape == (2, CLASSES)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels(in_chans: int) -> None:
    model = _couple("resnet18", "SigLIP", fusion="mid", in_chans=in_chans)
    assert model(_images(channels=in_chans)).shape == (2, CLASSES)


@pytest.mark.parametrize("way", WAYS)
def test_levels_are_as_stated(way: dict[str, Any]) -> None:
    model = _couple("convnext_atto", **way, token_level=True)
    final, maps = model.forward_intermediates(_images(96, 64))
    assert len(maps) == len(model.feature_info)
    for level, info in zip(maps, model.feature_info, strict=True):
        assert level.shape == (2, info["num_chs"], 96 // info["reduction"], 64 // info["reduction"])
    torch.testing.assert_close(model.forward_head(final), model(_images(96, 64)))


def test_features_only() -> None:
    backbone = create_model(f"resnet18+{VIT}:mid", features_only=True, out_indices=(1, 4), tokens_args=VIT_ARGS)
    maps = backbone(_images())
    assert [tuple(level.shape) for level in maps] == [(2, 64, 16, 16), (2, 512, 2, 2)]
    assert backbone.feature_info.reduction() == [4, 32]
    sum(level.mean() for level in maps).backward()
    with_tokens = create_model(f"resnet18+{VIT}:mid", features_only=True, token_level=True, tokens_args=VIT_ARGS)
    assert with_tokens.feature_info.channels() == [64, 64, 128, 256, 48, 512]
    assert [level.shape[1] for level in with_tokens(_images())] == [64, 64, 128, 256, 48, 512]


@pytest.mark.parametrize("way", WAYS)
def test_heads_can_be_exchanged(way: dict[str, Any]) -> None:
    model, images = _couple(**way), _images()
    with torch.no_grad():
        inputs = model.forward_head(model.forward_features(images), pre_logits=True)
        assert inputs.shape == (2, model.head_hidden_size)
        model.reset_classifier(9)
        assert model(images).shape == (2, 9)
        model.reset_classifier(0)
        torch.testing.assert_close(model(images), inputs)


def test_one_branch_answers_alone() -> None:
    model, images = _opened(_couple(fusion="mid")), _images()
    with torch.no_grad():
        for name in ("conv", "tokens"):
            model.use_branches(name)
            assert torch.equal(model(images), _own(model, name, images))
            assert list(model.forward_branches(images)) == [name]
        model.use_branches("both")
        assert len(model.forward_branches(images)) == 2
    alone = _couple(fusion="mid", branches="conv")
    assert torch.equal(alone(images), alone.conv(images))


def test_one_branch_predicts_alone(tmp_path: Path) -> None:
    name = f"resnet10t+{VIT}:late"
    photo = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    for join, said in (("logits", ""), ("concat", "one head for both branches")):
        model = _couple("resnet10t", fusion="late", join=join)
        args: dict[str, Any] = {"tokens_args": VIT_ARGS, "join": join}
        info = ModelInfo(architecture=name, model_args=args, labels=tuple("abcde"), preprocess=preprocess_of(model, 64))
        save_model(tmp_path / "m.safetensors", model, info)
        if said:
            with pytest.raises(ChiasmError, match=said):
                load(tmp_path / "m.safetensors", branches="conv")
            continue
        both, alone = load(tmp_path / "m.safetensors"), load(tmp_path / "m.safetensors", branches="conv")
        (whole,), (part,) = both(photo), alone(photo)
        assert part.branches == {}
        np.testing.assert_allclose(part.probabilities, whole.branches["conv"], atol=1e-5)
    with pytest.raises(ChiasmError, match="resnet10t has no branches that answer alone"):
        load("resnet10t", branches="conv")


def test_the_size_of_training_is_the_embeddings() -> None:
    """Made for the size, the position embedding is not interpolated; other sizes are taken as before."""
    model = _couple(fusion="mid", img_size=(64, 96))
    assert model.tokens.pos_embed.shape[1] == 4 * 6 + 1
    assert model(_images(64, 96)).shape == model(_images(80, 50)).shape == (2, CLASSES)


def test_recomputing_gives_the_same_gradients() -> None:
    model = _opened(_couple(fusion="mid", exchange="attention"))
    other = deepcopy(model)
    other.set_grad_checkpointing(True)
    for twin in (model, other):
        twin.train()(_images()).square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, key=key: f"{key}: {text}")


def test_layers_are_ordered_for_layer_decay() -> None:
    model = _couple(fusion="mid")
    place = model.group_matcher()
    assert place("conv.conv1.weight") == place("tokens.patch_embed.proj.weight") == 0
    assert place("conv.layer1.0.conv1.weight") < place("conv.layer4.0.conv1.weight") < place("conv.fc.weight")
    assert place("tokens.blocks.0.attn.qkv.weight") < place("tokens.blocks.1.attn.qkv.weight")
    assert place("exchanges.0.to_map") == place("conv.fc.weight")
    assert (
        {"tokens.cls_token", "tokens.pos_embed"} <= model.no_weight_decay() <= {n for n, _ in model.named_parameters()}
    )


# ---------------------------------------------------------------------------------------------------- names and points


@pytest.mark.parametrize("fusion", ["early", "mid", "late", "sandwich"])
def test_a_model_file_of_a_coupled_model(fusion: str, tmp_path: Path) -> None:
    name, args = f"mobilenetv3_small_050+{VIT}:{fusion}", {"tokens_args": VIT_ARGS}
    assert is_model(name)
    model = _opened(create_model(name, num_classes=3, **args)).eval()
    info = ModelInfo(architecture=name, model_args=args, labels=("a", "b", "c"), preprocess=preprocess_of(model))
    save_model(tmp_path / "model.safetensors", model, info)
    loaded, seen = load_model(tmp_path / "model.safetensors")
    assert seen == info
    with torch.no_grad():
        assert torch.equal(loaded(_images()), model(_images()))


STEPS = ConvSteps(
    tuple("abcdef"),
    (MapSize(8, 2), MapSize(8, 4), MapSize(8, 4), MapSize(16, 8), MapSize(16, 8), MapSize(32, 16)),
    (0, 2, 4, 5),
)
TWELVE = TokenSteps(depth=12, dim=8, prefix=1, patch=(16, 16), side=None)


def test_exchange_points() -> None:
    assert exchange_points(STEPS, TWELVE, "every stage") == [Point(3, 3), Point(5, 7), Point(6, 11)]
    assert exchange_points(STEPS, TWELVE, "every block") == [Point(2 + i, b) for i, b in enumerate((1, 4, 6, 9, 11))]
    assert exchange_points(STEPS, TWELVE, [[1, 3], [3, 9]]) == [Point(3, 3), Point(6, 9)]
    two = TokenSteps(depth=2, dim=8, prefix=1, patch=(16, 16), side=None)
    assert exchange_points(STEPS, two, "every stage") == [Point(5, 0), Point(6, 1)]
    assert exchange_points(STEPS, two, "every block") == [Point(3, 0), Point(6, 1)]


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    (f"resnet81+{VIT}:mid", {}, r"'resnet81'.*did you mean resnet18"),
    ("resnet18+vit_tiny_patch16_242:mid", {}, "vit_tiny_patch16_224"),
    (f"resnet18+{VIT}:midd", {}, "midd.*mid"),
    (f"resnet18+{VIT}+{VIT}:mid", {}, r"expected CONV\+TRANSFORMER:FUSION"),
    (f"resnet18+{VIT}:mid", {"exchange": "gate"}, "gated"),
    (f"resnet18+{VIT}:mid", {"direction": "tokens_to_maps"}, "tokens_to_map"),
    (f"resnet18+{VIT}:mid", {"points": "every stages"}, "every stage"),
    (f"resnet18+{VIT}:mid", {"points": [[0, 1], [1, 1], [2, 2]]}, "3 exchange points for a Transformer of 2 blocks"),
    (f"resnet18+{VIT}:mid", {"points": [[4, 2]]}, r"\[4, 2\] is not there; expected a level 0 to 4 and 0 to 1"),
    (f"resnet18+{VIT}:mid", {"points": [[2, 1], [1, 1]]}, "expected in order"),
    (f"resnet18+{VIT}:mid", {"points": [1, 2]}, "expected pairs"),
    (f"resnet18+{VIT}:late", {"join": "sum"}, "logits"),
    (f"resnet18+{VIT}:early", {"level": 7}, "levels 0 to 4"),
    (f"resnet18+{VIT}:early", {"branches": "conv"}, "has branches that can answer alone"),
    ("resnet18+resnet18:mid", {}, "no plain Transformer"),
    (f"{VIT}+{VIT}:mid", {}, f"{VIT} cannot be coupled"),
]


@pytest.mark.parametrize(("name", "options", "message"), MISTAKES)
def test_mistakes_are_told(name: str, options: dict[str, Any], message: str) -> None:
    args = {} if "resnet18:mid" in name or "242" in name else {"tokens_args": VIT_ARGS}
    with pytest.raises((ChiasmError, UnknownNameError), match=message) as told:
        create_model(name, **args, **options)
    assert "\n" not in str(told.value)


# ------------------------------------------------------------------------------------------------------ exchange units


@given(
    height=st.integers(1, 12), width=st.integers(1, 12), grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    unit=st.sampled_from(["fcu", "gated", "attention"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_units_take_any_two_grids_and_begin_with_nothing(
    height: int, width: int, grid: tuple[int, int], unit: Any
) -> None:
    exchange = Exchange(12, 20, unit=unit).eval()
    x, tokens = torch.randn(2, 12, height, width), torch.randn(2, grid[0] * grid[1], 20)
    same_map, same_tokens = exchange(x, tokens, grid)
    assert torch.equal(same_map, x)
    assert torch.equal(same_tokens, tokens)
    other_map, other_tokens = _opened(exchange)(x, tokens, grid)
    assert other_map.shape == x.shape
    assert other_tokens.shape == tokens.shape
    assert not torch.allclose(other_tokens, tokens)


def test_the_attention_unit_against_a_slow_twin() -> None:
    exchange = _opened(Exchange(12, 128, unit="attention")).double().eval()
    x, tokens = torch.randn(1, 12, 3, 2, dtype=torch.float64), torch.randn(1, 4, 128, dtype=torch.float64)
    attn, keys = exchange.down.attn, exchange.down.attn.norm_key(x.flatten(2).transpose(1, 2))
    query = attn.query(attn.norm_query(tokens))
    key, value = attn.key_value(keys).chunk(2, dim=2)
    heads = []
    for head in range(2):
        part = slice(64 * head, 64 * head + 64)
        weights = (query[..., part] @ key[..., part].transpose(1, 2) / 8).softmax(-1)
        heads.append(weights @ value[..., part])
    expected = tokens + exchange.to_tokens * attn.proj(torch.cat(heads, 2))
    torch.testing.assert_close(exchange(x, tokens, (2, 2))[1], expected)
