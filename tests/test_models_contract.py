"""timm's contract, for every architecture that chiasm registers.

What can be seen from shapes is checked on all of them, without memory; what needs numbers on those that a laptop builds
quickly, and what builds or trains several copies on the smallest: they are the same classes with other sizes.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from architectures import ALL, below
from chiasm.errors import ChiasmError
from chiasm.model_file import ModelInfo, load_model, preprocess_of, save_model
from chiasm.models import create_model
from chiasm.models.sketch import shapes_only, sketch

CLASSES = 5


BUILT = below(50e6)
SMALL = below(5e6)


@cache
def _built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, num_classes=CLASSES).eval()


def _fresh(name: str) -> nn.Module:
    return deepcopy(_built(name))


def _images(model: nn.Module, count: int = 2, seed: int = 0, channels: int = 3) -> Tensor:
    """Non-square images of about a quarter of the model's own side."""
    side = model.pretrained_cfg["input_size"][-1] // 4
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, side, side + side // 2, generator=generator)


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    stated = model.pretrained_cfg["classifier"]
    return (stated,) if isinstance(stated, str) else tuple(stated)


@pytest.fixture(params=ALL)
def drawn(request: pytest.FixtureRequest) -> nn.Module:
    """A model on the meta device: shapes without numbers."""
    with shapes_only():  # and not `sketch`: ours need no numbers to be built
        return create_model(request.param, num_classes=CLASSES).eval()


@pytest.fixture(params=BUILT)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Shared and in evaluation mode: not to be changed."""
    return _built(request.param)


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest) -> nn.Module:
    return _fresh(request.param)


# ---------------------------------------------------------------------------------------------------------- every model


@pytest.mark.parametrize("name", ALL)
def test_registered_by_us(name: str) -> None:
    assert timm.is_model(name)
    entrypoint = timm.models.model_entrypoint(name)
    assert entrypoint.__module__.startswith("chiasm.models.")
    assert entrypoint.__name__ == name
    assert timm.models.get_pretrained_cfg(name).input_size[0] == 3


def test_stated_names_exist(drawn: nn.Module) -> None:
    stated = drawn.pretrained_cfg
    modules = dict(drawn.named_modules())
    assert modules[stated["first_conv"]].weight.shape[1] == 3
    assert all(modules[name].weight.shape[0] == CLASSES for name in _classifiers(drawn))
    parameters = dict(drawn.named_parameters())
    assert set(drawn.no_weight_decay()) <= set(parameters)
    assert all(level["module"] in modules for level in drawn.feature_info)


def test_levels_are_as_stated(drawn: nn.Module) -> None:
    images = _images(drawn).to("meta")
    with torch.no_grad():
        maps = drawn.forward_intermediates(images, intermediates_only=True)
    assert len(maps) == len(drawn.feature_info)
    for level, info in zip(maps, drawn.feature_info, strict=True):
        height, width = (-(-side // info["reduction"]) for side in images.shape[-2:])
        assert level.shape == (2, info["num_chs"], height, width)


def test_output_is_the_mean_of_the_branches(model: nn.Module) -> None:
    images = _images(model)
    with torch.no_grad():
        logits = model(images)
        branches = model.forward_branches(images) if hasattr(model, "forward_branches") else {"model": logits}
        in_steps = model.forward_head(model.forward_features(images))
    assert logits.shape == (2, CLASSES)
    assert all(values.shape == (2, CLASSES) for values in branches.values())
    torch.testing.assert_close(logits, torch.stack(list(branches.values())).mean(0))
    torch.testing.assert_close(logits, in_steps)


def test_evaluation_is_deterministic_and_per_image(model: nn.Module) -> None:
    images = _images(model, count=3)
    with torch.no_grad():
        together = model(images)
        assert torch.equal(together, model(images))
        alone = torch.cat([model(image[None]) for image in images])
    scale = together.abs().max().item()  # untrained networks answer in any magnitude
    torch.testing.assert_close(together / scale, alone / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BUILT)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = _fresh(name).train()
    model(_images(model)).square().sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_groups_cover_every_parameter(drawn: nn.Module) -> None:
    for coarse in (False, True):
        groups = group_parameters(drawn, drawn.group_matcher(coarse=coarse))
        assert sorted(key for keys in groups.values() for key in keys) == sorted(dict(drawn.named_parameters()))
    groups = param_groups_layer_decay(drawn, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    first = drawn.get_submodule(drawn.pretrained_cfg["first_conv"]).weight
    assert len(scales) == len(list(drawn.parameters()))
    assert scales[id(first)] == min(scales.values()) < 0.2
    heads = list(drawn.get_classifier().parameters())
    assert all(scales[id(p)] == 1 for p in heads)


# -------------------------------------------------------------------------------------------------------- intermediates


def test_intermediates_in_all_forms(small: nn.Module) -> None:
    images = _images(small)
    with torch.no_grad():
        features, maps = small.forward_intermediates(images)
        for mine, direct in zip(features, small.forward_features(images), strict=True):
            torch.testing.assert_close(mine, direct)
        for indices, expected in (([0, 2], [maps[0], maps[2]]), (2, maps[-2:]), ([-1], maps[-1:])):
            _, some = small.forward_intermediates(images, indices=indices)
            assert all(torch.equal(a, b) for a, b in zip(some, expected, strict=True))
        early = small.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0], maps[0])
        normed = small.forward_intermediates(images, norm=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(normed[:-1], maps[:-1], strict=True))
        assert normed[-1].shape == maps[-1].shape  # a network's last norm belongs to its last map, if to any
    with pytest.raises(ValueError, match="NCHW"):
        small.forward_intermediates(images, output_fmt="NLC")


def test_stopping_early_runs_no_more_blocks(small: nn.Module) -> None:
    ran = []
    blocks, _, last = small.feature_info[0]["module"].rpartition(".")
    for i, block in enumerate(small.get_submodule(blocks)):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    small.forward_intermediates(_images(small), indices=[0], stop_early=True, intermediates_only=True)
    assert ran == list(range(int(last) + 1))


def test_pruned_models_give_the_same_maps(small: nn.Module) -> None:
    images, before = _images(small), sum(p.numel() for p in small.parameters())
    with torch.no_grad():
        expected = small.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
        assert small.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
        pruned = small.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, expected, strict=True))
    assert sum(p.numel() for p in small.parameters()) < before


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (2,), 2])
@pytest.mark.parametrize("name", SMALL)
def test_features_only(name: str, out_indices: tuple[int, ...] | int) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model(name, features_only=True, out_indices=out_indices)
    images = _images(_built(name))
    maps = backbone(images)
    assert len(maps) == (out_indices if isinstance(out_indices, int) else len(out_indices))
    for level, channels, stride in zip(
        maps, backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
    ):
        assert level.shape[1:] == (channels, *(-(-side // stride) for side in images.shape[-2:]))
    sum(level.mean() for level in maps).backward()


# -------------------------------------------------------------------------------------------------- heads and arguments


def test_heads_can_be_exchanged(small: nn.Module) -> None:
    images = _images(small)
    with torch.no_grad():
        features = small.forward_features(images)
        inputs = small.forward_head(features, pre_logits=True)
        assert inputs.shape == (2, small.head_hidden_size)
        small.reset_classifier(9)
        assert small(images).shape == (2, 9)
        assert small.num_classes == 9
        small.reset_classifier(0)
        assert torch.equal(small(images), inputs)
        assert torch.equal(small.forward_head(features), inputs)


@pytest.mark.parametrize("name", SMALL)
def test_features_that_are_not_pooled(name: str) -> None:
    model = create_model(name, num_classes=0, global_pool="").eval()
    images = _images(model)
    with torch.no_grad():
        features = model(images)
        assert features.ndim > 2
        assert features.shape[0] == 2
        model.reset_classifier(0, "avg")
        assert model(images).shape == (2, model.head_hidden_size)
        model.reset_classifier(0, "")
        assert torch.equal(model(images), features)
    with pytest.raises((ChiasmError, ValueError, AssertionError)):
        model.reset_classifier(0, "no such pooling")


@pytest.mark.parametrize("name", SMALL)
def test_built_without_classes(name: str) -> None:
    model = create_model(name, num_classes=0).eval()
    assert model(_images(model)).shape == (2, model.head_hidden_size)
    assert not [key for key in model.state_dict() if key.startswith(_classifiers(model))]


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("name", SMALL)
def test_other_numbers_of_channels(name: str, in_chans: int) -> None:
    model = create_model(name, in_chans=in_chans, num_classes=CLASSES)
    assert model(_images(model, channels=in_chans)).shape == (2, CLASSES)


@given(height=st.integers(0, 40), width=st.integers(0, 40), index=st.integers(0, len(SMALL) - 1))
@settings(max_examples=25, deadline=None)
def test_any_size_from_a_quarter_up(height: int, width: int, index: int) -> None:
    model = _built(SMALL[index])
    side = model.pretrained_cfg["input_size"][-1] // 4
    images = torch.randn(1, 3, side + height, side + width)
    with torch.no_grad():
        assert model(images).isfinite().all()
        for level, info in zip(model.forward_intermediates(images)[1], model.feature_info, strict=True):
            assert level.shape[-2:] == tuple(-(-s // info["reduction"]) for s in images.shape[-2:])


# ------------------------------------------------------------------------------------------------------------- training


def test_recomputing_gives_the_same_gradients(small: nn.Module) -> None:
    other = deepcopy(small)
    other.set_grad_checkpointing(True)
    for twin in (small.train(), other.train()):
        twin(_images(twin)).square().sum().backward()
    for (key, p), q in zip(small.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_training_and_evaluation_give_one_type(small: nn.Module) -> None:
    images = _images(small)
    for mode in (True, False):
        small.train(mode)
        assert isinstance(small(images), Tensor)
        branches = small.forward_branches(images) if hasattr(small, "forward_branches") else {}
        assert all(isinstance(value, Tensor) for value in branches.values())


@pytest.mark.parametrize("name", SMALL)
def test_drop_path_and_dropout_are_off_in_evaluation(name: str) -> None:
    rates = {"drop_rate": 0.5, "drop_path_rate": 0.5, "attn_drop_rate": 0.5}
    model = create_model(name, num_classes=CLASSES, **rates).train()
    images = _images(model)
    assert not torch.equal(model(images), model(images))
    model.eval().load_state_dict(_built(name).state_dict())
    assert torch.equal(model(images), _built(name)(images))


# --------------------------------------------------------------------------------------------------- copies and formats


def test_copies_are_independent(small: nn.Module) -> None:
    images = _images(small)
    copy = deepcopy(small)
    assert torch.equal(copy(images), small(images))
    with torch.no_grad():
        next(copy.parameters()).zero_()
    assert not torch.equal(copy(images), small(images))


@pytest.mark.parametrize("name", SMALL)
def test_weights_survive_the_model_file(name: str, tmp_path: Path) -> None:
    model = _built(name)
    info = ModelInfo(architecture=name, labels=tuple("abcde"), preprocess=preprocess_of(model))
    save_model(tmp_path / "model.safetensors", model, info)
    loaded, seen = load_model(tmp_path / "model.safetensors")
    assert seen == info
    assert torch.equal(loaded(_images(model)), model(_images(model)))


def test_bfloat16_and_memory_formats(small: nn.Module) -> None:
    images = _images(small)
    with torch.no_grad():
        expected = small(images)
        laid_out = small.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(laid_out, expected, rtol=1e-4, atol=1e-5)
        half = small.to(torch.bfloat16)(images.to(torch.bfloat16))
    assert half.dtype is torch.bfloat16
    assert half.isfinite().all()


@pytest.mark.parametrize("name", SMALL[:1])
def test_exports_with_a_dynamic_batch(name: str) -> None:
    model = _built(name)
    images = _images(model, count=2)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for count in (1, 5):
        more = _images(model, count=count, seed=count)
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(more), model(more), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- sketch


def test_a_sketch_has_the_shapes_of_the_model(model: nn.Module) -> None:
    """Of every weight and buffer, and nothing in it has numbers."""
    drawn = sketch(model.pretrained_cfg["architecture"], num_classes=CLASSES)
    assert all(value.is_meta for value in (*drawn.parameters(), *drawn.buffers()))
    shapes = [{key: (value.shape, value.dtype) for key, value in m.state_dict().items()} for m in (drawn, model)]
    assert shapes[0] == shapes[1]


def test_a_network_that_looks_at_numbers_is_drawn_with_them() -> None:
    drawn = sketch("test_resnet+test_vit:mid", img_size=32).eval()
    assert not any(value.is_meta for value in drawn.parameters())
    assert drawn(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
