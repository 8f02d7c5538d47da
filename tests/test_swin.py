"""Swin against timm and torchvision with the same weights, and its windows against a slow textbook."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.inference import optimize
from chiasm.layers import by_hand, mlp
from chiasm.layers.attention import TransformerBlock
from chiasm.layers.by_hand import Linear
from chiasm.layers.residual import Residual
from chiasm.layers.window import (
    WindowAttention,
    between_windows,
    deal_windows,
    into_windows,
    out_of_windows,
    relative_positions,
)
from chiasm.models import create_model, swin
from chiasm.models.checkpoints import load_weights
from chiasm.models.sketch import shapes_only
from swin_textbook import textbook_attention, textbook_bias, textbook_joined, textbook_mask, textbook_windows

ORDERS = ("pad_then_roll", "roll_then_pad")
PUBLISHED_PARAMETERS = {
    "swin_tiny_window7_224": 28_288_354,
    "swin_small_window7_224": 49_606_258,
    "swin_base_window7_224": 87_768_224,
    "swin_base_window12_384": 87_903_584,
    "swin_large_window7_224": 196_532_476,
    "swin_large_window12_384": 196_735_516,
}
TIMM = {name: name.replace("_window", "_patch4_window") for name in PUBLISHED_PARAMETERS}
NARROW = {"embed_dim": 24, "num_heads": (1, 2, 3, 4)}  # the published structure, thin enough for float64 in a test


def _awake(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights that do something, so that a swapped or forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)
            if name.endswith("relative_position_bias_table"):
                p.copy_(noise)
            elif p.ndim == 1:
                p.copy_(0.2 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
    return model


def _equal(mine: nn.Module, theirs: nn.Module, images: Tensor, names: dict[str, str] | None = None) -> None:
    """Equal logits and equal gradients of every parameter; `names` by ours gives theirs where they differ."""
    with torch.no_grad():
        torch.testing.assert_close(mine.eval()(images), theirs.eval()(images), rtol=0, atol=1e-9)
    mine.train(), theirs.train()
    seen, expected = mine(images), theirs(images)
    direction = torch.randn_like(expected)
    (seen * direction).sum().backward()
    (expected * direction).sum().backward()
    others = dict(theirs.named_parameters())
    for name, p in mine.named_parameters():
        other = others[(names or {}).get(name, name)].grad
        torch.testing.assert_close(p.grad, other, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


# ----------------------------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize("name", sorted(TIMM))
def test_equal_to_timm_for_every_size(name: str) -> None:
    """Every published size at a quarter of its images, float32, blocks and widths as they are."""
    side = swin.SIZES[name].image[0] // 4
    options = {"img_size": side, "num_classes": 10}
    theirs = timm.create_model(TIMM[name], drop_path_rate=0.0, **options)
    with shapes_only():
        mine = create_model(name, order="roll_then_pad", **options)
    mine.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    images = torch.randn(1, 3, side, side)
    logits, expected = mine(images), theirs(images)
    scale = expected.abs().max()
    torch.testing.assert_close(logits / scale, expected / scale, rtol=0, atol=1e-5)
    logits.sum().backward()
    expected.sum().backward()
    for (key, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        error = (p.grad - q.grad).abs().max() / q.grad.abs().max()
        assert error < 1e-4, f"{key}: {error:.1e}"


CASES = [
    ((224, 224), {}, {}),
    ((224, 224), {"order": "roll_then_pad"}, {}),
    ((256, 256), {"order": "roll_then_pad"}, {"dynamic_img_size": True}),
    ((256, 320), {"order": "roll_then_pad"}, {"dynamic_img_size": True}),
    ((100, 160), {"order": "roll_then_pad"}, {"dynamic_img_size": True}),
    ((448, 224), {"order": "roll_then_pad"}, {"dynamic_img_size": True}),  # timm keeps the last stage without a shift
    ((96, 64), {"order": "roll_then_pad", "img_size": (96, 64)}, {"img_size": (96, 64)}),  # smaller, oblong windows
    ((112, 112), {"order": "roll_then_pad", "window_size": 5}, {"window_size": 5, "dynamic_img_size": True}),
]


@pytest.mark.parametrize(("size", "options", "theirs"), CASES, ids=lambda v: str(v).replace(" ", ""))
def test_equal_to_timm_at_any_size(size: tuple[int, int], options: dict, theirs: dict) -> None:
    narrow = {**NARROW, "depths": (2, 2, 2, 2), "num_classes": 10}
    other = _awake(timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0, **narrow, **theirs).double())
    mine = create_model("swin_tiny_window7_224", **narrow, **options).double()
    mine.load_state_dict(other.state_dict(), strict=True)
    _equal(mine, other, torch.randn(2, 3, *size, dtype=torch.float64))


def test_levels_are_timms() -> None:
    theirs = timm.create_model("swin_tiny_patch4_window7_224").eval()
    mine = create_model("swin_tiny_window7_224").eval()
    mine.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for norm in (False, True):
            levels = mine.forward_intermediates(images, norm=norm, intermediates_only=True)
            expected = theirs.forward_intermediates(images, norm=norm, intermediates_only=True)
            for level, other in zip(levels, expected, strict=True):
                torch.testing.assert_close(level, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.forward_features(images), theirs.forward_features(images), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (256, 320), (160, 96)], ids=str)
def test_equal_to_torchvision(size: tuple[int, int]) -> None:
    theirs = torchvision.models.SwinTransformer(
        [4, 4],
        NARROW["embed_dim"],
        [2, 2, 2, 2],
        list(NARROW["num_heads"]),
        [7, 7],
        num_classes=10,
        stochastic_depth_prob=0,
    )
    theirs = _awake(theirs.double())
    mine = create_model("swin_tiny_window7_224", num_classes=10, depths=(2, 2, 2, 2), **NARROW).double()
    report = load_weights(mine, theirs.state_dict())
    assert not report.missing
    _equal(mine, theirs, torch.randn(1, 3, *size, dtype=torch.float64), {to: key for key, to in report.renamed.items()})


def test_equal_to_torchvisions_tiny() -> None:
    theirs = torchvision.models.swin_t().eval()
    mine = create_model("swin_tiny_window7_224").eval()
    load_weights(mine, theirs.state_dict())
    images = torch.randn(1, 3, 256, 320)
    with torch.no_grad():
        torch.testing.assert_close(mine(images), theirs(images), rtol=0, atol=1e-5)


def test_the_two_orders_differ_only_where_something_is_padded() -> None:
    models = [create_model("swin_tiny_window7_224", order=order, **NARROW).double().eval() for order in ORDERS]
    models[1].load_state_dict(_awake(models[0]).state_dict())
    with torch.no_grad():
        images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
        torch.testing.assert_close(models[0](images), models[1](images), rtol=0, atol=1e-9)
        images = torch.randn(1, 3, 256, 256, dtype=torch.float64)
        assert (models[0](images) - models[1](images)).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------------------- windows

sides = st.integers(1, 17)


@given(sides, sides, st.integers(1, 6), st.integers(1, 6), st.booleans(), st.sampled_from(ORDERS))
@settings(max_examples=60, deadline=None)
def test_windows_are_the_textbooks(height: int, width: int, h: int, w: int, shifted: bool, order: str) -> None:
    shift = (h // 2, w // 2) if shifted else (0, 0)
    x = torch.randn(height, width, 2)
    windows = deal_windows(x, (height, width), (h, w), shift, order)
    slots = into_windows(x.flatten(0, 1)[None], windows)
    cut, padded = textbook_windows(x, (h, w), shift, order)
    assert torch.equal(slots[0], torch.cat(cut))
    assert torch.equal(out_of_windows(slots, windows)[0].unflatten(0, (height, width)), x)
    assert torch.equal(textbook_joined(cut, (height, width), (h, w), shift, order), x)
    assert (windows.empty is None) == (padded == (height, width))
    if any(shift):
        assert torch.equal(windows.mask.double(), textbook_mask(padded, (h, w), shift))
    else:
        assert windows.mask is None


@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 4), st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_from_windows_to_other_windows(rows: int, columns: int, h: int, w: int) -> None:
    size, x = (rows * h, columns * w), torch.randn(2, rows * h * columns * w, 3)
    plain = deal_windows(x, size, (h, w), (0, 0))
    shifted = deal_windows(x, size, (h, w), (h // 2, w // 2))
    moved = between_windows(into_windows(x, plain), plain, shifted)
    assert torch.equal(moved, into_windows(x, shifted))


@pytest.mark.parametrize("window", [(2, 2), (3, 5), (7, 7)], ids=str)
def test_the_bias_of_a_pair_is_that_of_its_offset(window: tuple[int, int]) -> None:
    table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), 3)
    assert torch.equal(table[relative_positions(window, table.device)].permute(2, 0, 1), textbook_bias(table, window))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shift", [(0, 0), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("size", [(6, 8), (7, 5), (3, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("trains", [True, False], ids=["training", "inference"])
def test_attention_is_the_textbooks(size: tuple[int, int], shift: tuple[int, int], order: str, trains: bool) -> None:
    """The gradients written by hand, and the fused kernel: values to 1e-9, and all gradients."""
    attention = _awake(WindowAttention(12, heads=3, window=(3, 4)).double())
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    windows = deal_windows(x.detach(), size, (3, 4), shift, order)
    covered = windows.empty is None
    with torch.set_grad_enabled(trains):
        tokens = into_windows(x.flatten(1, 2), windows) if covered else x.flatten(1, 2)
        mixed = attention(tokens, windows)
        mixed = (out_of_windows(mixed, windows) if covered else mixed).unflatten(1, size)
    expected = textbook_attention(attention, x, shift, order)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-9)
    if trains:
        direction = torch.randn_like(expected)
        inputs = x, *attention.parameters()
        found, wanted = (torch.autograd.grad(out, inputs, direction) for out in (mixed, expected))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------------------- gradients by hand


def _double(module: nn.Module) -> nn.Module:
    return _awake(module.double())


def _small_attention(shift: tuple[int, int]) -> tuple[nn.Module, object, Tensor]:
    attention = _double(WindowAttention(4, heads=2, window=(2, 2)))
    x = torch.randn(2, 16, 4, dtype=torch.float64, requires_grad=True)
    return attention, deal_windows(x.detach(), (4, 4), (2, 2), shift), x


@pytest.mark.parametrize("shift", [(0, 0), (1, 1)], ids=str)
def test_gradients_of_attention(shift: tuple[int, int]) -> None:
    """Of values, of first and of second order, against finite differences."""
    attention, windows, x = _small_attention(shift)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return attention(x, windows)

    assert torch.autograd.gradcheck(run, (x, *attention.parameters()))
    assert torch.autograd.gradgradcheck(run, (x, *attention.parameters()))


@pytest.mark.parametrize("tokens", [(3, 2), (2, 2, 2)], ids=str)
def test_gradients_of_the_mlp_in_parts(tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "PART", 2)
    layer = _double(mlp.Mlp(3, 5))
    x = torch.randn(*tokens, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return layer(x)

    torch.testing.assert_close(run(x), layer.fc2(torch.nn.functional.gelu(layer.fc1(x))), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(run(x), layer.fc2(torch.nn.functional.gelu(layer.fc1(x))), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize("layer", [lambda: Linear(24, 40), lambda: mlp.Mlp(24, 40)], ids=["linear", "mlp"])
@pytest.mark.parametrize("large", ["LARGE", "LARGE_MAP", None])
def test_products_of_onednn_are_those_of_pytorch(
    layer: Callable[[], nn.Module], large: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are taken where the weight is large, or the map."""
    asked = []
    monkeypatch.setattr(by_hand, "product", lambda *args, own=by_hand.product: asked.append(args) or own(*args))
    monkeypatch.setattr(mlp, "PART", 5)
    if large is not None:  # of the map's 18 tokens and 40 channels, which its parts have not
        monkeypatch.setattr(by_hand, large, 18 * 40)
    torch.manual_seed(0)
    ours = layer()
    x = torch.randn(2, 9, 24, requires_grad=True)
    out = ours(x)
    assert type(out.grad_fn).__name__ in ("_LinearBackward", "_MlpBackward")
    found = torch.autograd.grad(out.square().sum(), [x, *ours.parameters()])
    assert bool(asked) == (large is not None)
    with by_hand.watched():
        expected = torch.autograd.grad(ours(x).square().sum(), [x, *ours.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def _block_gradients(model: nn.Module, images: Tensor) -> list[Tensor | None]:
    model(images).square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("frozen", ["attn", "mlp.fc1", "fc2", "norm1", "table", "patch_embed|layers.0"])
def test_frozen_weights_get_no_gradient_and_the_others_the_same(frozen: str) -> None:
    model = create_model("swin_nano_window4_128", num_classes=3)
    images = torch.randn(1, 3, 40, 32)
    expected = _block_gradients(deepcopy(model), images)
    for name, p in model.named_parameters():
        p.requires_grad_(not any(part in name for part in frozen.split("|")))
    for p, found, wanted in zip(model.parameters(), _block_gradients(model, images), expected, strict=True):
        if p.requires_grad:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        else:
            assert found is None


def test_hooks_on_every_layer_are_called() -> None:
    model = create_model("swin_nano_window4_128", num_classes=3)
    expected = model(torch.ones(1, 3, 64, 64))
    seen = set()
    for name, module in model.named_modules():
        if name.endswith((".fc1", ".fc2", ".qkv", ".proj", ".reduction", ".norm1")) and "patch_embed" not in name:
            module.register_forward_hook(lambda module, args, output, name=name: seen.add(name))
    torch.testing.assert_close(model(torch.ones(1, 3, 64, 64)), expected, rtol=1e-4, atol=1e-6)
    assert len(seen) == sum(model.config.depths) * 5 + 3


@pytest.mark.parametrize("way", ["autocast", "functional", "vmap"])
def test_other_ways_to_run_see_the_same_network(way: str) -> None:
    model = _awake(create_model("swin_nano_window4_128", num_classes=3)).train()
    images = torch.randn(2, 3, 48, 32)
    expected = _block_gradients(model, images)
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        torch.testing.assert_close(logits.float(), model(images), rtol=0.1, atol=0.1)
        return
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (images,)).square().sum()

    found = torch.func.grad(loss)(weights, images)
    if way == "vmap":  # per-image gradients, summed
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, images[:, None])
        found = {name: value.sum(0) for name, value in each.items()}
    for value, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("size", [(75, 50)], ids=str)
def test_compiles_in_one_graph(size: tuple[int, int]) -> None:
    model = _awake(create_model("swin_nano_window4_128", num_classes=3, depths=(2, 2), num_heads=(1, 2)))
    images = torch.randn(2, 3, *size)
    expected = _block_gradients(deepcopy(model), images)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)
    compiled(images).square().sum().backward()
    for p, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_traces_for_torchscript() -> None:
    model = _awake(create_model("swin_nano_window4_128", num_classes=3)).eval()
    images = torch.randn(2, 3, 75, 50)
    with torch.no_grad():
        for network in (model, optimize(model)):
            traced = torch.jit.trace(network, images, check_trace=False)
            torch.testing.assert_close(traced(-images), model(-images), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- stochastic depth


def test_a_dropped_branch_is_not_computed_and_the_others_weigh_more() -> None:
    torch.manual_seed(0)
    residual = Residual(0.25).train()
    x, computed, kept = torch.randn(4000, 2, 3), [], 0

    def branch(images: Tensor) -> Tensor:
        computed.append(len(images))
        return torch.ones_like(images)

    added = residual(x, branch) - x
    kept = (added != 0).flatten(1).all(1)
    assert computed == [int(kept.sum())]
    assert 0.72 < kept.float().mean() < 0.78
    torch.testing.assert_close(added[kept], torch.full_like(added[kept], 4 / 3), rtol=0, atol=1e-5)
    assert not added[~kept].any()
    assert torch.equal(residual.eval()(x, branch), x + 1)


@pytest.mark.parametrize("name", ["swin_nano_window4_128", "mobilevit_xxs_256", "conformer_nano_patch8_64"])
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("dropout", [{}, {"attn_drop_rate": 0.5}], ids=["", "dropout"])
def test_a_network_all_of_whose_branches_are_dropped_has_gradients(name: str, double: bool, dropout: dict) -> None:
    """Of zeros in what was left out, which was given a batch of none."""
    torch.manual_seed(0)
    model = create_model(name, drop_path_rate=0.1, **dropout).train()
    left_out = [module for module in model.modules() if isinstance(module, Residual)]
    for residual in left_out:
        residual.rate = 1.0
    images = torch.randn(2, 3, 70, 64)
    if double:
        model, images = model.double(), images.double()
    answers = model(images)
    assert answers.isfinite().all()
    with torch.no_grad():
        assert model(images).shape == answers.shape
    with torch.autocast("cpu", torch.bfloat16, enabled=not double):
        model(images).float().square().sum().backward()
    model.zero_grad()
    answers.square().sum().backward()
    assert left_out
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    blocks = [module for module in model.modules() if isinstance(module, swin.SwinBlock | TransformerBlock)]
    assert not any(p.grad.any() for block in blocks for p in block.parameters())


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_every_parameter_has_a_gradient_however_few_images_take_the_branch(rate: float) -> None:
    torch.manual_seed(0)
    layer, residual = nn.Linear(3, 3), Residual(rate).train()
    for _ in range(8):
        layer.zero_grad()
        x = torch.randn(1, 2, 3, requires_grad=True)
        out = residual(x, layer)
        (slope,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        out.sum().backward()
        assert layer.weight.grad is not None
        dropped = torch.equal(out, x)
        assert torch.equal(slope, torch.ones_like(x)) == dropped
        assert layer.weight.grad.any() != dropped


# ------------------------------------------------------------------------------------------------------------ inference


@pytest.mark.parametrize(("name", "options"), [
    ("swin_nano_window4_128", {}),
    ("swin_nano_window4_128", {"window_size": 7, "order": "roll_then_pad"}),
    ("swin_tiny_window7_224", {"depths": (2, 2, 2, 2)}),
], ids=str)  # fmt: skip
def test_optimized_gives_the_same(name: str, options: dict) -> None:
    model = _awake(create_model(name, num_classes=5, **options)).eval()
    before = deepcopy(model.state_dict())
    faster = optimize(model)
    assert not [module for module in faster.modules() if isinstance(module, WindowAttention | mlp.Mlp)]
    with torch.no_grad():
        for count, size in [(1, (64, 64)), (3, (64, 64)), (2, (56, 112)), (1, (75, 118)), (2, (33, 7)), (1, (64, 64))]:
            images = torch.randn(count, 3, *size)
            kept = images.clone()
            expected = model(images)
            torch.testing.assert_close(faster(images), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
            assert torch.equal(images, kept)
        maps = faster.forward_intermediates(images, intermediates_only=True)
        for level, wanted in zip(maps, model.forward_intermediates(images, intermediates_only=True), strict=True):
            torch.testing.assert_close(level, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_optimized_in_other_types_and_copies() -> None:
    model = _awake(create_model("swin_nano_window4_128", num_classes=5)).eval()
    faster, images = optimize(model), torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        expected = faster(images)
        # Not bit for bit: two copies may add in another order.
        torch.testing.assert_close(deepcopy(faster)(images), expected, rtol=1e-5, atol=1e-5)
        double = faster.double()
        torch.testing.assert_close(double(images.double()).float(), expected, rtol=1e-4, atol=1e-4)
    slopes = []
    for network in (model, optimize(model)):  # a gradient of the image passes through
        image = images.clone().requires_grad_()
        slopes += torch.autograd.grad(network(image).square().sum(), image)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-3)


def test_what_is_kept_serves_training_after_inference() -> None:
    model = create_model("swin_nano_window4_128", num_classes=3)
    images = torch.randn(1, 3, 72, 56)  # a size that no other test has
    with torch.inference_mode():
        model.eval()(images)
    model.train()(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("name", sorted(PUBLISHED_PARAMETERS))
def test_published_parameter_counts(name: str) -> None:
    with shapes_only():
        mine, theirs = create_model(name), timm.create_model(TIMM[name])
    assert sum(p.numel() for p in mine.parameters()) == PUBLISHED_PARAMETERS[name]
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (mine, theirs)]
    assert shapes[0] == shapes[1]
    stated = timm.get_pretrained_cfg(name)
    published = timm.get_pretrained_cfg(stated.hf_hub_id.removeprefix("timm/"))
    assert published.hf_hub_id == stated.hf_hub_id
    for field in ("input_size", "crop_pct", "mean", "std", "interpolation", "num_classes"):
        assert getattr(stated, field) == getattr(published, field), field


def test_small_enough_to_train_on_a_laptop() -> None:
    assert sum(p.numel() for p in create_model("swin_nano_window4_128").parameters()) < 5e6


def test_levels_with_a_norm_each() -> None:
    backbone = timm.create_model(
        "swin_nano_window4_128", features_only=True, out_norms=True, out_indices=(0, 2, 3), in_chans=1
    )
    images = torch.randn(1, 1, 75, 118)
    levels = backbone(images)
    assert [level.shape[1:] for level in levels] == [(32, 19, 30), (128, 5, 8), (256, 3, 4)]
    for level in levels:  # untrained norms: each pixel has mean 0 and variance 1 over its channels
        torch.testing.assert_close(level.mean(1), torch.zeros_like(level[:, 0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(level.var(1, correction=0), torch.ones_like(level[:, 0]), rtol=0, atol=2e-2)
    sum((level * torch.randn_like(level)).sum() for level in levels).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert {name for name, _ in backbone.named_parameters() if "out_norms" in name} == {
        f"model.out_norms.{i}.{part}" for i in (0, 2, 3) for part in ("weight", "bias")
    }


@pytest.mark.parametrize("size", [(37, 64), (224, 224), (1, 1)], ids=str)
def test_another_window(size: tuple[int, int]) -> None:
    model = create_model("swin_nano_window4_128", num_classes=3, window_size=5)
    assert model.layers[0].blocks[0].attn.relative_position_bias_table.shape == (81, 1)
    assert model(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize(("wide", "narrow"), [(12, 7), (7, 12), (4, 5)])
def test_weights_of_another_window_are_interpolated(wide: int, narrow: int) -> None:
    """As timm does it: the same table as its own model has after loading the same weights."""
    options = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32, "num_classes": 3, "img_size": 224}
    theirs = _awake(timm.create_model("swin_tiny_patch4_window7_224", window_size=wide, **options))
    mine = create_model("swin_tiny_window7_224", window_size=narrow, **options)
    report = load_weights(mine, theirs.state_dict())
    assert len(report.adapted) == 4
    assert f"{wide}x{wide} window interpolated to {narrow}x{narrow}" in next(iter(report.adapted.values())).what
    theirs.set_input_size(window_size=narrow)
    for key, value in mine.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, "window_size 0: expected a side in tokens from 2 to 32"),
        ({"window_size": 64}, "window_size 64"),
        ({"window_size": 7.5}, "window_size 7.5"),
        ({"order": "roll_then_pads"}, "did you mean roll_then_pad"),
        ({"num_heads": (1, 2, 4)}, "one of each per stage"),
        ({"num_heads": (1, 2, 4, 7)}, "stage 4 has 256 channels, which do not divide by 7"),
        ({"depths": (2, 2, 0, 2)}, "1 or more"),
        ({"img_size": 0}, "img_size 0"),
        ({"global_pool": "max"}, "global_pool='max'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ChiasmError, match=message):
        create_model("swin_nano_window4_128", **options)


def test_unknown_order_is_named() -> None:
    with pytest.raises(UnknownNameError, match="One of pad_then_roll, roll_then_pad"):
        create_model("swin_nano_window4_128", order="roll")
