"""chiasm.optimize: the same numbers for every architecture at any size, the original untouched, and nothing fused that
is not proven; the fused layers against PyTorch's own."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import chiasm
from architectures import ALL, PARAMETERS
from chiasm.config import Preprocess
from chiasm.inference import ACTIVATIONS, optimize
from chiasm.layers.attention import FusedTransformerBlock, TransformerBlock
from chiasm.layers.fused import Fused, FusedConv2d, FusedLinear, plainly
from chiasm.model_file import ModelInfo
from chiasm.models import create_model
from chiasm.predictor import Predictor

NANO = "conformer_nano_patch16_128"


# Those that a laptop builds quickly, and the smallest of published size; larger ones are the same classes.
QUICK = [name for name in ALL if PARAMETERS[name] < 8e6 or "_tiny_" in name]


def _lived_in(model: nn.Module) -> nn.Module:
    """In evaluation mode, with norms that do something, so that a forgotten one shows."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def _images(height: int, width: int, count: int = 1, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


def _assert_same(seen: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the largest value, tensor by tensor."""
    if isinstance(expected, Tensor):
        assert seen.shape == expected.shape
        assert (seen - expected).abs().max() <= tolerance * expected.abs().max()
        return
    if isinstance(expected, dict):
        assert list(seen) == list(expected)
        seen, expected = seen.values(), expected.values()
    for one, other in zip(seen, expected, strict=True):
        _assert_same(one, other, tolerance)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------------------- every model


@pytest.mark.parametrize("name", QUICK)
def test_every_architecture_gives_the_same_at_any_size(name: str) -> None:
    model = _lived_in(create_model(name, num_classes=7))
    faster = optimize(model)
    assert any(isinstance(module, Fused) for module in faster.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in faster.modules())
    for size in ((64, 96), (83, 70)):
        images = _images(*size, count=2)
        expected = model(images)
        for _ in range(3):  # what is kept of a size is kept from its second time on
            _assert_same(faster(images), expected)
    _assert_same(faster(_images(64, 64)), model(_images(64, 64)))


OPTIONS = [
    {},
    {"coupling": "map_to_tokens"},
    {"coupling": "none"},
    {"supervision": "conv"},
    {"supervision": "tokens"},
    {"head_fusion": "features"},
    {"branches": "conv"},
    {"branches": "tokens"},
    {"pool": "max", "upsample": "bilinear"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_conformers_branches_features_and_levels(options: dict) -> None:
    model = _lived_in(create_model(NANO, num_classes=5, depth=6, **options))
    faster, images = optimize(model), _images(75, 118, count=2)
    _assert_same(faster.forward_branches(images), model.forward_branches(images))
    _assert_same(faster.forward_features(images), model.forward_features(images))
    # A level that a later block had written over would not be the same.
    _assert_same(faster.forward_intermediates(images), model.forward_intermediates(images))


@pytest.mark.parametrize(
    "name", [NANO, "swin_nano_window4_128", "mobilevit_xxs_256", "test_resnet", "test_efficientnet", "test_convnext"]
)
def test_backbones_give_the_same_levels(name: str) -> None:
    backbone = _lived_in(timm.create_model(name, features_only=True))
    _assert_same(optimize(backbone)(_images(96, 64)), backbone(_images(96, 64)))


@pytest.mark.parametrize(
    "name",
    ["resnet18", "efficientnet_b0", "mobilenetv3_small_050", "repvgg_a0", "test_convnext", "test_vit", "test_byobnet"],
)
def test_timms_networks(name: str) -> None:
    model = _lived_in(timm.create_model(name, num_classes=5))
    faster, size = optimize(model), model.pretrained_cfg["input_size"][1:]
    images = _images(*size)
    expected = model(images)
    for _ in range(3):
        _assert_same(faster(images), expected)
    assert any(isinstance(module, FusedConv2d) for module in faster.modules())
    fused = [module.act for module in faster.modules() if isinstance(module, Fused)]
    if name in ("resnet18", "efficientnet_b0", "mobilenetv3_small_050"):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in faster.modules())
        assert set(fused) > {"none"}


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(channels: int) -> None:
    model = _lived_in(create_model(NANO, in_chans=channels))
    _assert_same(optimize(model)(_images(64, 64, channels=channels)), model(_images(64, 64, channels=channels)))


def test_in_half_and_in_double_precision() -> None:
    model, images = _lived_in(create_model(NANO)), _images(64, 96, count=2)
    expected = model(images)
    faster = optimize(deepcopy(model).to(torch.bfloat16))
    for _ in range(3):
        _assert_same(faster(images.to(torch.bfloat16)).float(), expected, tolerance=5e-2)
    _assert_same(optimize(deepcopy(model).double())(images.double()), model.double()(images.double()), tolerance=1e-12)


# ------------------------------------------------------------------------------------------------ original and copies


def test_the_original_stays_as_it_is() -> None:
    model = create_model(NANO).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    faster = optimize(model)
    assert model.training
    assert not faster.training
    assert type(faster) is type(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in faster.parameters())
    images = _images(64, 64)
    answer = faster(images)
    for parameter in model.parameters():
        parameter.zero_()
    _assert_same(faster(images), answer)  # nothing is shared


def test_randomness_and_other_modes_are_left_alone() -> None:
    model = create_model(NANO)
    torch.manual_seed(3)
    optimize(model)
    seen = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), seen)
    with torch.enable_grad():
        optimize(model)
        assert torch.is_grad_enabled()


def test_copies_pickles_and_a_second_time() -> None:
    faster, images = optimize(_lived_in(create_model(NANO))), _images(64, 64)
    for _ in range(3):
        answer = faster(images)
    for copy in (deepcopy(faster), pickle.loads(pickle.dumps(faster)), optimize(faster)):
        for _ in range(3):
            _assert_same(copy(images), answer)
    double = deepcopy(faster).double()
    _assert_same(double(images.double()).float(), answer)
    _assert_same(double.float()(images), answer)


def test_threads_with_images_of_different_sizes() -> None:
    model = _lived_in(create_model("conformer_nano_patch4_32"))
    faster = optimize(model)
    sizes = [(32, 32), (32, 48), (20, 24), (36, 36)]
    expected = {size: model(_images(*size)) for size in sizes}

    @torch.inference_mode()
    def often(size: tuple[int, int]) -> list[Tensor]:
        return [faster(_images(*size)) for _ in range(6)]

    with ThreadPoolExecutor(4) as pool:
        for size, answers in zip(sizes, pool.map(often, sizes), strict=True):
            for answer in answers:
                _assert_same(answer, expected[size])


def test_the_verbs_use_it() -> None:
    model = create_model(NANO, num_classes=2)
    predictor = Predictor(model, ModelInfo(architecture=NANO, labels=("a", "b"), preprocess=Preprocess(size=(64, 64))))
    assert any(isinstance(module, Fused) for module in predictor.task.modules())
    assert not any(isinstance(module, Fused) for module in model.modules())
    assert callable(chiasm.optimize)


# ------------------------------------------------------------------------------------ what is fused and what is not


class _ReadTwice(nn.Module):
    """A convolution whose result goes into a norm and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) + x


class _Returned(_ReadTwice):
    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return self.bn(x), x


class _CalledTwice(_ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(self.conv(x.flip(3)))


class _OtherWayRound(_ReadTwice):
    """Declared as convolution and norm, run as norm and convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x))


class _SlicedBefore(_ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)[..., 1:])


class _OnTokens(nn.Module):
    """BatchNorm1d over the second dimension of three: not the linear layer's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.bn = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).mean(2).transpose(1, 2)[:, :8]
        return self.bn(self.fc(tokens))


class _OwnStatistics(_ReadTwice):
    """A norm that takes its statistics from the batch, also in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@pytest.mark.parametrize(
    "kind", [_ReadTwice, _Returned, _CalledTwice, _OtherWayRound, _SlicedBefore, _OnTokens, _OwnStatistics]
)
def test_a_norm_stays_where_folding_would_be_wrong(kind: type[nn.Module]) -> None:
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    faster = optimize(model)
    _assert_same(faster(_images(40, 33)), model(_images(40, 33)))
    assert any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in faster.modules())


class _Guarded(_ReadTwice):
    """Looks at its own parts, so that it does not run with others."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.bn, nn.BatchNorm2d)
        return self.bn(self.conv(x))


class _Changing(_ReadTwice):
    """Reads its own weight, as it was before anything was folded into it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv.weight.mean()


@pytest.mark.parametrize("kind", [_Guarded, _Changing])
def test_a_network_that_would_answer_differently_is_left_as_it_is(kind: type[nn.Module]) -> None:
    model = _lived_in(kind())
    faster = optimize(model)
    _assert_same(faster(_images(40, 33)), model(_images(40, 33)))
    assert not any(isinstance(module, Fused) for module in faster.modules())


class _Doubling(nn.Linear):
    """As a low-rank adapter does: another product with the same weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Backwards(TransformerBlock):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.flip(1)).sin()


def _exchanged(how: str) -> nn.Module:
    kind = _Backwards if how == "derived" else TransformerBlock
    block = kind(16, heads=2, act=nn.ReLU if how == "relu" else nn.GELU)
    if how == "linear":
        block.attn.proj = _Doubling(16, 16)
    if how == "attention":
        block.attn = nn.Identity()
    if how == "mlp":
        block.mlp = nn.Sequential(nn.Linear(16, 16))
    if how == "hook":
        block.attn.register_forward_hook(lambda module, inputs, output: 3 * output)
    return block


@pytest.mark.parametrize("how", ["as built", "derived", "relu", "linear", "attention", "mlp", "hook"])
def test_a_block_whose_parts_were_exchanged_answers_as_before(how: str) -> None:
    torch.manual_seed(0)
    block = _exchanged(how).eval()
    net = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), _Tokens(), block).eval()
    faster, images = optimize(net), _images(16, 24)
    for _ in range(3):
        _assert_same(faster(images), net(images))
    assert isinstance(faster[3], FusedTransformerBlock) == (how == "as built")


class _Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_what_is_fused() -> None:
    layers = [nn.Conv2d(3, 8, 3, bias=False), BatchNormAct2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)]
    layers += [nn.SiLU(inplace=True), nn.Conv2d(8, 4, 1), nn.GELU(approximate="tanh"), nn.AdaptiveAvgPool2d(1)]
    model = _lived_in(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU6()))
    faster = optimize(model)
    _assert_same(faster(_images(40, 33)), model(_images(40, 33)))
    fused = [(type(module), module.act) for module in faster if isinstance(module, Fused)]
    assert fused == [(FusedConv2d, "relu"), (FusedConv2d, "silu"), (FusedConv2d, "none"), (FusedLinear, "relu6")]
    kept = [type(module) for module in faster if not isinstance(module, Fused | nn.Identity)]
    assert kept == [nn.GELU, nn.AdaptiveAvgPool2d, nn.Flatten]


def test_a_network_of_another_kind_of_input_is_only_copied() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    words = torch.tensor([[1, 2]])
    assert torch.equal(optimize(model)(words), model(words))


# --------------------------------------------------------------------------------------------------------- fused layers


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = _lived_in(nn.BatchNorm2d(channels))
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


PLAIN = {
    "none": nn.Identity(),
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}


@pytest.mark.parametrize("act", PLAIN)
@pytest.mark.parametrize(
    "sizes",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4},
        {"kernel_size": 5, "padding": (2, 1), "groups": 8},
    ],
    ids=str,
)
def test_a_fused_convolution(sizes: dict, act: Any) -> None:
    torch.manual_seed(0)
    conv, bn, x = nn.Conv2d(8, 16, **sizes), _norm(16), 3 * torch.randn(2, 8, 13, 17)
    layer, map_ = FusedConv2d(conv, bn, act), bn(conv(x))
    addend = torch.randn_like(map_)
    for _ in range(3):
        _assert_same(layer(x), PLAIN[act](map_))
        _assert_same(layer(x, addend), PLAIN[act](map_ + addend))
        _assert_same(layer(x, addend.clone(), overwrite=True), PLAIN[act](map_ + addend))
    with plainly():
        _assert_same(layer(x, addend), PLAIN[act](map_ + addend))
    _assert_same(layer(x[:, :, :9, :11]), PLAIN[act](bn(conv(x[:, :, :9, :11]))))
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    _assert_same(layer.weight, conv.weight * scale[:, None, None, None])


@pytest.mark.parametrize("act", PLAIN)
def test_a_fused_linear_layer(act: Any) -> None:
    torch.manual_seed(0)
    linear, tokens, addend = nn.Linear(24, 40), 3 * torch.randn(2, 9, 24), torch.randn(2, 9, 40)
    layer = FusedLinear(linear, act)
    expected, added = PLAIN[act](linear(tokens)), PLAIN[act](linear(tokens) + addend)
    for _ in range(3):
        _assert_same(layer(tokens), expected)
        _assert_same(layer(tokens, addend), added)
        _assert_same(layer(tokens, addend.clone(), overwrite=True), added)
    _assert_same(layer(tokens[:, 1:]), expected[:, 1:])  # a view, as patch tokens are of tokens
    with plainly():
        _assert_same(layer(tokens), expected)
    assert torch.equal(layer.weight, linear.weight)
    assert layer(tokens[:, :0]).shape == (2, 0, 40)


@pytest.mark.parametrize("how", [plainly, nullcontext], ids=["plainly", "by oneDNN"])
def test_a_sum_takes_the_memory_of_what_it_is_added_to(how: Callable[[], AbstractContextManager[None]]) -> None:
    linear, tokens = FusedLinear(nn.Linear(24, 40)), torch.randn(2, 9, 24)
    addend = torch.randn(2, 9, 40)
    with how():
        expected = linear(tokens) + addend
        linear(tokens, addend, overwrite=True)
    _assert_same(addend, expected)


def test_gradients_of_inputs_and_autocast_go_the_plain_way() -> None:
    conv, bn, x = nn.Conv2d(3, 8, 3), _norm(8), torch.randn(1, 3, 9, 9)
    layer = FusedConv2d(conv, bn, "relu")
    with torch.inference_mode():  # what was ordered and released there must serve here
        for part in (x, x, x[..., 1:]):
            layer(part)
    with torch.enable_grad():
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer(mine).sum().backward()
        F.relu(bn(conv(theirs))).sum().backward()
    _assert_same(mine.grad, theirs.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
        assert FusedLinear(nn.Linear(9, 4))(x).dtype is torch.bfloat16


def test_a_weight_is_ordered_for_sizes_that_repeat() -> None:
    layer = FusedLinear(nn.Linear(64, 32))
    many, few = torch.randn(8, 64), torch.randn(3, 64)
    expected = F.linear(many, layer.weight, layer.bias)

    def told(x: Tensor) -> str:
        layer(x)
        return "plain" if layer._ordered is None else f"ordered for {layer._ordered[0][-1]}"

    if told(torch.zeros(4, 64)) == "plain":
        pytest.skip("this PyTorch has no operators of oneDNN")
    with torch.no_grad():
        assert [told(x) for x in (few, many, many)] == ["ordered for 4", "plain", "ordered for 8"]
        assert [told(x) for x in (few, many, many)] == ["ordered for 8"] * 3  # a last, smaller batch
        assert [told(x) for x in (few, many, few, many)] == ["plain"] * 4  # by turns
        assert [told(x) for x in (many, few, few)] == ["ordered for 8", "ordered for 8", "ordered for 3"]
        torch.testing.assert_close(layer(many), expected, rtol=1e-4, atol=1e-5)


def test_odd_convolutions_are_refused() -> None:
    for conv in (nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")):
        assert not FusedConv2d.can_fuse(conv)
        with pytest.raises(ValueError, match="zero padding"):
            FusedConv2d(conv)


def test_every_activation_named_is_known_to_the_layers() -> None:
    x = torch.linspace(-5, 5, 64).reshape(4, 16)
    eye = nn.Linear(16, 16, bias=False)
    nn.init.eye_(eye.weight)
    for kind, act in ACTIVATIONS.items():
        torch.testing.assert_close(FusedLinear(eye, act)(x), kind()(x), rtol=1e-5, atol=1e-6)
