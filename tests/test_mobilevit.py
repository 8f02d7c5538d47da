"""MobileViT, both versions, against timm's: the same logits and the same gradients in float64, at any size.

Then what stands behind that: unfolding against nested loops, and each faster way against the plain one.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chiasm.errors import ChiasmError
from chiasm.inference import optimize
from chiasm.layers import inverted, parts
from chiasm.layers.fused import Fused
from chiasm.layers.inverted import InvertedResidual
from chiasm.layers.unfold import fold, resize, unfold
from chiasm.models import create_model, list_models
from chiasm.models.sketch import sketch

PUBLISHED_PARAMETERS = {
    "mobilevit_xxs_256": 1_272_024,
    "mobilevit_xs_256": 2_317_848,
    "mobilevit_s_256": 5_578_632,
    "mobilevitv2_050_256": 1_370_593,
    "mobilevitv2_075_256": 2_866_009,
    "mobilevitv2_100_256": 4_901_841,
    "mobilevitv2_125_256": 7_478_089,
    "mobilevitv2_150_256": 10_594_753,
    "mobilevitv2_175_256": 14_251_833,
    "mobilevitv2_200_256": 18_449_329,
}


def _timms(name: str) -> str:
    return name.removesuffix("_256")


def _give_statistics(model: nn.Module) -> None:
    """BN as after training: statistics and scales that are not those of a new network."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)


def _twins(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """timm's model and ours with its weights, both in evaluation mode."""
    torch.manual_seed(0)
    theirs = timm.create_model(_timms(name), num_classes=10)
    _give_statistics(theirs)
    ours = create_model(name, num_classes=10)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype).eval(), ours.to(dtype).eval()


def test_every_size_is_here() -> None:
    assert sorted(PUBLISHED_PARAMETERS) == list_models("mobilevit")


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_PARAMETERS.items())
def test_published_parameters(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in sketch(name).parameters()) == parameters


@pytest.mark.parametrize("size", [(64, 96), (100, 140)], ids=str)
@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_logits_are_timms(name: str, size: tuple[int, int]) -> None:
    """Also where a map does not divide by the patch: 100 px have 13 at stride 8, and 7 at stride 16."""
    theirs, ours = _twins(name)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_gradients_are_timms(name: str) -> None:
    theirs, ours = _twins(name)
    _train_both(theirs, ours, torch.randn(2, 3, 50, 70, dtype=torch.float64))


@pytest.mark.parametrize("name", ["mobilevit_s_256", "mobilevitv2_100_256"])
def test_at_the_published_size(name: str) -> None:
    """In float32 as people use it, and a training step in float64, whose wide maps are large enough to go by hand."""
    theirs, ours = _twins(name, torch.float32)
    images = torch.randn(2, 3, 256, 256)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    _train_both(theirs.double(), ours.double(), images.double()[:, :, :, :192])


def _train_both(theirs: nn.Module, ours: nn.Module, images: Tensor) -> None:
    for model in (theirs, ours):
        model.train()(images).square().sum().backward()
    expected = dict(theirs.named_parameters())
    scale = max(p.grad.abs().max().item() for p in expected.values())
    for key, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[key].grad, rtol=0, atol=1e-9 * scale, msg=lambda m, k=key: k + m)
    statistics = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, statistics[key])


# ------------------------------------------------------------------------------ levels, heads, what it states of itself


@pytest.mark.parametrize("name", ["mobilevit_xxs_256", "mobilevitv2_050_256"])
def test_levels_are_timms(name: str) -> None:
    theirs, ours = _twins(name)
    stated = [(info["num_chs"], info["reduction"], info["module"]) for info in theirs.feature_info]
    assert stated == [(info["num_chs"], info["reduction"], info["module"]) for info in ours.feature_info]
    images = torch.randn(1, 3, 64, 128, dtype=torch.float64)
    with torch.no_grad():
        levels = ours.forward_intermediates(images, intermediates_only=True)
        for mine, other in zip(levels, theirs.forward_intermediates(images, intermediates_only=True), strict=True):
            torch.testing.assert_close(mine, other)


def test_a_level_that_the_network_stretched_is_brought_back() -> None:
    """Version 2 goes on with the stretched map, 14 x 10 for 13 x 9; the level is 13 x 9, corners on corners."""
    _, ours = _twins("mobilevitv2_050_256")
    images = torch.randn(1, 3, 100, 70, dtype=torch.float64)
    with torch.no_grad():
        x = ours.stages[:3](ours.stem(images))
        assert x.shape[-2:] == (14, 10)
        level = ours.forward_intermediates(images, indices=[2], intermediates_only=True)[0]
    torch.testing.assert_close(level, resize(x, (13, 9), align_corners=True))
    torch.testing.assert_close(level[..., [0, -1], :][..., [0, -1]], x[..., [0, -1], :][..., [0, -1]])


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_preprocessing_and_published_files_are_timms(name: str) -> None:
    ours, theirs = (timm.models.get_pretrained_cfg(n) for n in (name, _timms(name)))
    for key in ("mean", "std", "input_size", "crop_pct", "interpolation", "first_conv", "classifier", "tag"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.hf_hub_id == f"timm/{_timms(name)}.{theirs.tag}"
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{_timms(name)}.*")]
    assert tags == [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mobilevit_xxs_256", {"dims": (64, 80)}, "expected 3 numbers"),
        ("mobilevitv2_050_256", {"channels": (8, 16, 24, 32, 0)}, "from 1 up"),
        ("mobilevit_xxs_256", {"heads": 3}, "multiples of the heads"),
        ("mobilevitv2_050_256", {"patch": 0}, "such as 2"),
    ],
    ids=str,
)
def test_sizes_that_make_no_sense_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ChiasmError, match=message):
        create_model(name, **options)


def test_the_map_unpooled_and_the_classifier_exchanged() -> None:
    model = create_model("mobilevit_xxs_256", num_classes=3, global_pool="").eval()
    images = torch.randn(2, 3, 70, 100)
    with torch.no_grad():
        assert model.forward_features(images).shape == (2, 320, 3, 4)
        model.reset_classifier(0, "")
        assert model(images).shape == (2, 320, 3, 4)
        model.reset_classifier(7, "avg")
        assert model(images).shape == (2, 7)


# ------------------------------------------------------------------------------------------------------------ unfolding


def _textbook_unfold(x: Tensor, patch: int) -> Tensor:
    batch, channels, height, width = x.shape
    columns = width // patch
    tokens = x.new_empty(batch * patch * patch, height // patch * columns, channels)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                pixel = i % patch * patch + j % patch
                number = i // patch * columns + j // patch
                tokens[b * patch * patch + pixel, number] = x[b, :, i, j]
    return tokens


SIDES = st.integers(1, 4)


@given(batch=st.integers(1, 3), channels=st.integers(1, 3), rows=SIDES, columns=SIDES, patch=SIDES, last=st.booleans())
@settings(max_examples=40, deadline=None)
def test_unfolding_and_back(batch: int, channels: int, rows: int, columns: int, patch: int, last: bool) -> None:
    x = torch.randn(batch, channels, rows * patch, columns * patch)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    tokens = unfold(x, patch)
    assert torch.equal(tokens, _textbook_unfold(x, patch))
    assert torch.equal(fold(tokens, patch, x.shape[-2:]), x)


# ------------------------------------------------------------------------------------------------------------- in parts


@given(
    height=st.integers(1, 40), width=st.integers(1, 9), count=st.integers(0, 5),
    stride=st.sampled_from([1, 2]), cache=st.integers(1, 40_000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_parts_and_strips_give_the_whole(height: int, width: int, count: int, stride: int, cache: int) -> None:
    torch.manual_seed(0)
    block = InvertedResidual(8, 8, stride=stride, expand=2).double().eval()
    _give_statistics(block)
    images = torch.randn(count, 8, height, width, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        whole = block(images)
        patch.setattr(parts, "CACHE", cache)
        torch.testing.assert_close(block(images), whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(optimize(block)(images), whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_hook_sees_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "CACHE", 1)
    model = create_model("mobilevit_xxs_256", num_classes=3).eval()
    seen = []
    for layer in (model.stages[1][1].conv2_kxk.bn, model.stages[2][1].transformer[0].attn):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(torch.randn(3, 3, 64, 64))
    assert seen == [(3, 48, 16, 16), (3 * 4, 16, 64)]


# ----------------------------------------------------------------------------------------------------- training by hand


@pytest.fixture
def always_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps too, and two images at a time."""
    monkeypatch.setattr(inverted, "LARGE", 0)
    monkeypatch.setattr(parts, "CACHE", 2 * 24 * 9 * 7 * 8)


def _block(stride: int = 1) -> InvertedResidual:
    torch.manual_seed(0)
    block = InvertedResidual(6, 6, stride=stride, expand=4).double()
    _give_statistics(block)
    return block.train()


@pytest.mark.usefixtures("always_by_hand")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_by_hand_are_autograds(stride: int, last: bool) -> None:
    found = []
    for by_hand in (True, False):
        block = _block(stride)
        if not by_hand:
            block._trains_by_hand = lambda x: False
        torch.manual_seed(1)
        x = torch.randn(5, 6, 9, 7, dtype=torch.float64)
        x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
        out = block(x)
        out.backward(torch.randn(out.shape, dtype=out.dtype))
        found.append([out, x.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("always_by_hand")
def test_gradients_by_hand_can_be_differentiated() -> None:
    block = _block(2)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(block, (x,), nondet_tol=1e-12)


def _watched(block: InvertedResidual) -> None:
    block.conv2_kxk.register_forward_hook(lambda *_: None)


def _norm_kept(block: InvertedResidual) -> None:
    block.conv1_1x1.bn.eval()


def _another_layer(block: InvertedResidual) -> None:
    block.conv3_1x1.conv = nn.Sequential(block.conv3_1x1.conv)


@pytest.mark.usefixtures("always_by_hand")
@pytest.mark.parametrize("changed", [_watched, _norm_kept, _another_layer])
def test_layers_that_were_changed_are_called(changed) -> None:
    block, x = _block(), torch.randn(2, 6, 9, 7, dtype=torch.float64)
    assert block._trains_by_hand(x)
    changed(block)
    assert not block._trains_by_hand(x)
    assert block(x).isfinite().all()


@pytest.mark.usefixtures("always_by_hand")
def test_recomputing_by_hand() -> None:
    torch.manual_seed(0)
    model = create_model("mobilevit_xxs_256", num_classes=3).double().train()
    other = deepcopy(model)
    other.set_grad_checkpointing(True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for twin in (model, other):
        twin(images).square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


# ------------------------------------------------------------------------------------------------------------ inference


@pytest.mark.parametrize("name", ["mobilevit_xxs_256", "mobilevit_s_256", "mobilevitv2_050_256"])
def test_optimized(name: str) -> None:
    theirs, ours = _twins(name, torch.float32)
    faster = optimize(ours)
    plain = [
        key for key, module in faster.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))
    ]
    assert not plain
    assert sum(isinstance(module, Fused) for module in faster.modules()) > 30
    with torch.no_grad():
        for size in ((64, 64), (128, 96), (100, 140), (33, 50)):
            images = torch.randn(3, 3, *size)
            expected = theirs(images)
            torch.testing.assert_close(faster(images), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
