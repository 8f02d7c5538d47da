"""The Conformer against its textbook twin: the same logits and the same gradients in float64."""

from __future__ import annotations

import pytest
import torch

from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.models import conformer, create_model, list_models
from chiasm.models.checkpoints import load_weights
from chiasm.models.sketch import sketch
from conformer_textbook import TextbookConformer

PUBLISHED_PARAMETERS = {
    "conformer_tiny_patch16_224": 23_524_704,
    "conformer_small_patch16_224": 37_673_424,
    "conformer_small_patch32_224": 38_853_072,
    "conformer_base_patch16_224": 83_289_136,
}
NARROW = {"stem_chs": 16, "dim": 48, "heads": 3}  # the published structure, thin enough for float64 in a test


def _twins(name: str, seed: int = 0, **options) -> tuple[torch.nn.Module, TextbookConformer]:
    sizes = conformer.SIZES[name]
    base = options.get("stem_chs", sizes.stem_chs)
    torch.manual_seed(seed)
    twin = TextbookConformer(
        patch=sizes.patch, ratio=int(sizes.channel_ratio), dim=options.get("dim", sizes.dim),
        heads=options.get("heads", sizes.heads), depth=sizes.depth, base=base, classes=10,
        **{key: options[key] for key in ("pool", "upsample", "coupling") if key in options},
    ).double()  # fmt: skip
    for module in twin.modules():  # norms that do something, so that a swapped or forgotten one shows
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    model = create_model(name, num_classes=10, **options).double()
    report = load_weights(model, twin.state_dict())
    if options.get("coupling", "both") == "both":
        assert not report.missing
        assert not report.left_out
    return model, twin


CASES = [
    ("conformer_tiny_patch16_224", (112, 112), {}),
    ("conformer_small_patch16_224", (160, 224), NARROW),
    ("conformer_small_patch32_224", (224, 224), NARROW),
    ("conformer_small_patch32_224", (96, 160), NARROW),
    ("conformer_small_patch16_224", (75, 118), NARROW),  # padded: neither side divides
    ("conformer_small_patch16_224", (16, 16), NARROW),  # a single token
    ("conformer_nano_patch16_128", (128, 96), {}),
    ("conformer_small_patch16_224", (64, 96), NARROW | {"pool": "max"}),
    ("conformer_small_patch16_224", (64, 96), NARROW | {"upsample": "bilinear"}),
    ("conformer_small_patch16_224", (64, 96), NARROW | {"coupling": "map_to_tokens"}),
    ("conformer_small_patch16_224", (64, 96), NARROW | {"coupling": "tokens_to_map"}),
    ("conformer_small_patch16_224", (64, 96), NARROW | {"coupling": "none"}),
]


@pytest.mark.parametrize(("name", "size", "options"), CASES, ids=lambda v: str(v).replace(" ", ""))
def test_logits_and_gradients_equal_the_textbook(name: str, size: tuple[int, int], options: dict) -> None:
    model, twin = _twins(name, **options)
    images = torch.randn(2, 3, *size, dtype=torch.float64)

    model.eval(), twin.eval()
    with torch.no_grad():
        for branch, expected in twin(images).items():
            torch.testing.assert_close(model.forward_branches(images)[branch], expected, rtol=1e-9, atol=1e-9)

    if min(size) > 32:  # batch norm has no statistics over a single pixel, in either
        model.train(), twin.train()
    seen, expected = (torch.cat(list(m.values()), 1) for m in (model.forward_branches(images), twin(images)))
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(expected)
    (seen * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    # The key map carries gradients as well as weights: read them as a state dict of the model.
    as_weights = create_model(name, num_classes=10, **options).double()
    load_weights(as_weights, {**twin.state_dict(), **gradients})
    for key, value in as_weights.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(key).grad, value.data, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", sorted(PUBLISHED_PARAMETERS))
def test_published_parameter_counts(name: str) -> None:
    model = sketch(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_PARAMETERS[name]
    assert len(model.state_dict()) == 718


def test_a_branch_alone_is_the_uncoupled_models_branch() -> None:
    """With coupling off, the branches share nothing but the stem: each equals the network built with it alone."""
    name, images = "conformer_nano_patch16_128", torch.randn(2, 3, 64, 64)
    both = create_model(name, num_classes=5, coupling="none").eval()
    for branch in ("conv", "tokens"):
        alone = create_model(name, num_classes=5, branches=branch).eval()
        state = both.state_dict()
        if branch == "tokens":
            state = {key.replace(".transformer.", "."): value for key, value in state.items()}
        alone.load_state_dict({key: state[key] for key in alone.state_dict()})
        torch.testing.assert_close(alone(images), both.forward_branches(images)[branch])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"coupling": "map_to_tokens"},
        {"coupling": "tokens_to_map"},
        {"coupling": "none"},
        {"supervision": "conv"},
        {"supervision": "tokens"},
        {"supervision": "tokens", "coupling": "map_to_tokens"},
        {"supervision": "conv", "coupling": "tokens_to_map"},
        {"head_fusion": "features"},
        {"branches": "conv"},
        {"branches": "tokens"},
        {"pool": "max", "upsample": "bilinear"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", list_models("conformer_nano"))
def test_every_option_trains_every_parameter(name: str, options: dict) -> None:
    model = create_model(name, num_classes=3, **options)
    side = max(2 * model.config.patch, 32)
    images = torch.randn(2, 3, side, 2 * side)
    model(images).square().sum().backward()
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert sum(not p.requires_grad for p in model.parameters()) <= 3  # what makes a map that no head reads
    model.eval()
    outputs = model.forward_branches(images)
    torch.testing.assert_close(model(images), torch.stack(list(outputs.values())).mean(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "map_to_token"}, "did you mean map_to_tokens"),
        ({"depth": 7}, "multiple of 3"),
        ({"patch": 24}, "multiple of 4"),
        ({"supervision": "conv", "coupling": "none"}, "branches='conv'"),
        ({"branches": "conv", "head_fusion": "features"}, "one head"),
        ({"supervision": "tokens", "head_fusion": "features"}, "supervision='both'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ChiasmError, match=message.replace("(", r"\(")):
        create_model("conformer_nano_patch16_128", **options)


def test_an_image_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(ChiasmError, match="at least 16 px"):
        create_model("conformer_nano_patch16_128")(torch.zeros(1, 3, 15, 64))


def test_unknown_model_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="conformer_small_patch16_224"):
        create_model("conformer_smal_patch16_224")
