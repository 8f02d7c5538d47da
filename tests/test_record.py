"""What a watched pass keeps: the attention of every family in one form, features as maps, exchanges silenced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import chiasm
from chiasm.errors import ChiasmError
from chiasm.explaining.record import Attention, Recording, record, uncoupled
from chiasm.models import create_model
from chiasm.models.taps import taps_of

NETWORKS = {  # name -> image side, heads' width is small where it can be
    "conformer_nano_patch8_64": (48, 64),
    "resnet10t+vit_tiny_patch16_224:mid": (64, 96),
    "resnet10t+vit_tiny_patch16_224:late": (64, 64),
    "resnet10t+vit_tiny_patch16_224:early": (64, 64),
    "resnet10t+vit_tiny_patch16_224:sandwich": (64, 64),
    "vit_tiny_patch16_224": (224, 224),
    "eva02_tiny_patch14_224": (224, 224),
    "beit_base_patch16_224": (224, 224),
    "swin_tiny_window7_224": (200, 232),
    "swin_tiny_patch4_window7_224": (224, 224),
    "mobilevit_xxs_256": (72, 104),
    "mobilevit_xxs": (72, 104),
    "mobilevitv2_050_256": (64, 96),
    "mobilevitv2_050": (64, 96),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"depth": 2} if "base" in name or name.startswith("vit") else {}
    return create_model(name, num_classes=4, **options).eval()


def seen(name: str, size: tuple[int, int] | None = None) -> tuple[nn.Module, Tensor, Recording]:
    model = build(name)
    image = torch.randn(1, 3, *(size or NETWORKS[name]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, image, record(model, image)


@pytest.mark.parametrize("name", NETWORKS)
def test_watching_changes_nothing_and_keeps_all(name: str) -> None:
    model, image, kept = seen(name)
    with torch.no_grad():
        assert torch.allclose(kept.outputs, model(image), atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert kept.attentions
    assert kept.features
    for attention in kept.attentions:
        rows = attention.weights.sum(-1)
        assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)
        assert attention.weights.shape[0] == attention.index.shape[0]
        assert attention.weights.shape[-1] == attention.index.shape[1]
        tokens = attention.index[attention.index >= 0]  # every token stands in one slot
        assert tokens.sort().values.tolist() == list(range(attention.prefix + attention.grid[0] * attention.grid[1]))
    for feature in kept.features:
        assert feature.map.ndim == 4
        height, width = feature.map.shape[-2:]
        assert height / width == pytest.approx(image.shape[-2] / image.shape[-1], rel=0.35)


def dense(attention: Attention) -> Tensor:
    """(heads, T, T): attention between all pairs of tokens, 0 between those that do not meet."""
    tokens = attention.prefix + attention.grid[0] * attention.grid[1]
    whole = torch.zeros(attention.weights.shape[1], tokens, tokens)
    for group, index in zip(attention.weights, attention.index, strict=True):
        there = index >= 0
        rows, columns = torch.meshgrid(index[there], index[there], indexing="ij")
        whole[:, rows, columns] = group[:, there][:, :, there]
    return whole


@pytest.mark.parametrize(
    ("ours", "theirs", "size"),
    [
        ("swin_tiny_window7_224", "swin_tiny_patch4_window7_224", (224, 224)),
        ("mobilevit_xxs_256", "mobilevit_xxs", (72, 104)),
        ("mobilevitv2_050_256", "mobilevitv2_050", (64, 96)),
    ],
)
def test_tokens_are_where_timms_are(ours: str, theirs: str, size: tuple[int, int]) -> None:
    """Two implementations that deal tokens differently give one attention matrix, so both tell the places right."""
    model, image, kept = seen(ours, size)
    other = build(theirs)
    chiasm.load_weights(other, {name: value.clone() for name, value in model.state_dict().items()})
    with torch.no_grad():
        again = record(other, image)
    assert len(kept.attentions) == len(again.attentions)
    for one, two in zip(kept.attentions, again.attentions, strict=True):
        assert one.grid == two.grid
        assert torch.allclose(dense(one), dense(two), atol=1e-4), one.name


def test_padded_windows_leave_their_slots_empty() -> None:
    _, _, kept = seen("swin_tiny_window7_224", (200, 232))
    assert any((attention.index < 0).any() for attention in kept.attentions)
    assert [attention.stride[0] for attention in kept.attentions][:: len(kept.attentions) - 1] == [4, 32]


def test_weights_take_gradients_of_the_answer() -> None:
    """The gradient with respect to what is kept is that of the answer: moving a weight moves the answer by it."""
    model, image, _ = seen("vit_tiny_patch16_224")
    model.requires_grad_(False)
    kept = record(model, image.requires_grad_())
    (gradient,) = torch.autograd.grad(kept.outputs[0, 1], [kept.attentions[-1].raw])
    attn = model.blocks[-1].attn  # type: ignore[index, union-attr]
    tokens = model.blocks[-1].norm1(kept.features[-2].raw)  # type: ignore[index, union-attr, operator]
    value = attn.qkv(tokens).unflatten(2, (3, attn.num_heads, -1))[:, :, 2].transpose(1, 2)
    step = 1e-2 * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2))

    def answer(weights: Tensor) -> Tensor:
        x = kept.features[-2].raw + attn.proj((weights @ value).transpose(1, 2).flatten(2))
        block = model.blocks[-1]  # type: ignore[index]
        x = x + block.mlp(block.norm2(x))  # type: ignore[union-attr, operator]
        return model.forward_head(model.norm(x))[0, 1]  # type: ignore[operator]

    weights = kept.attentions[-1].raw
    moved = (answer(weights + step) - answer(weights - step)) / 2
    assert moved.item() == pytest.approx((gradient * step).sum().item(), rel=2e-2, abs=1e-5)


@pytest.mark.parametrize("name", ["conformer_nano_patch8_64", "resnet10t+vit_tiny_patch16_224:mid"])
def test_silent_branches_do_not_hear_each_other(name: str) -> None:
    model = build(name)
    for parameter in model.parameters():  # new exchanges add nothing
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    taps = taps_of(model)
    branches = model.forward_branches  # type: ignore[operator]
    with uncoupled(model, taps):
        alone = branches(image)
    together = branches(image)
    assert not torch.allclose(alone["conv"], together["conv"], atol=1e-4)
    blocks = model.tokens.blocks if hasattr(model, "tokens") else model.blocks  # type: ignore[union-attr]
    of_tokens = [p for n, p in blocks.named_parameters() if "conv" not in n and "down" not in n and "up" not in n]
    for coupled, answers in ((False, alone), (True, together)):
        gradients = torch.autograd.grad(answers["conv"].sum(), of_tokens, allow_unused=True, retain_graph=True)
        assert any(gradient is not None for gradient in gradients) is coupled
    with torch.no_grad():
        kept = record(model, image, coupled=False, run=branches)
    assert torch.allclose(kept.outputs["conv"], alone["conv"], atol=1e-5)
    assert len(kept.crossings) == len(taps.exchanges) > 0


def test_crossings_are_before_and_after() -> None:
    _, _, kept = seen("conformer_nano_patch8_64", (48, 64))
    assert [crossing.name for crossing in kept.crossings][:2] == ["block 2 down", "block 2 up"]
    for crossing in kept.crossings:
        down = crossing.name.endswith("down")
        assert torch.equal(crossing.conv, crossing.conv_after) is down
        assert torch.equal(crossing.tokens, crossing.tokens_after) is not down
        assert crossing.tokens.shape[-2:] == (6, 8)


def test_without_exchanges_nothing_can_be_silenced() -> None:
    with pytest.raises(ChiasmError, match="no exchanges"):
        record(build("mobilevit_xxs_256"), torch.zeros(1, 3, 64, 64), coupled=False)


UNKNOWN = (
    "resnet10t mobilenetv3_small_050 convnext_atto pvt_v2_b0 hrnet_w18_small xcit_nano_12_p16_224 mixer_s32_224 "
    "efficientformer_l1 edgenext_xx_small poolformer_s12"
)


@pytest.mark.parametrize("name", UNKNOWN.split())
def test_networks_that_nobody_knows_have_the_maps_that_they_name(name: str) -> None:
    model, image, kept = seen(name, (224, 224))
    given = model.forward_intermediates(image, intermediates_only=True)  # type: ignore[operator]
    maps = [feature.map for feature in kept.features]
    assert any(torch.equal(maps[-1], other) for other in given if isinstance(other, Tensor)) or "hrnet" in name
    assert 4 <= maps[-1].shape[-1] <= 28
    assert maps[-1].shape[1] >= 32
    stride = kept.features[-1].stride[0]
    assert maps[-1].shape[-1] * stride == pytest.approx(224, abs=stride)
