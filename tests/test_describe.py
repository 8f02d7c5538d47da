"""describe and models: the numbers are those of the model, and mistakes are told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

import chiasm
from chiasm.cli import main
from chiasm.config import DescribeConfig, Preprocess
from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.model_file import ModelInfo, save_model
from chiasm.models import conformer, create_model, list_models
from chiasm.verbs.describe import describe, show
from chiasm.verbs.models import models

NANO = "conformer_nano_patch4_32"


def _saved_macs(name: str) -> float:
    """What pooling before the projection saves over projecting first, from the sizes alone."""
    sizes = conformer.SIZES[name]
    saved = 0
    for block in range(1, sizes.depth):
        cells = (sizes.patch // sizes.stride(block)) ** 2
        tokens = (224 // sizes.patch) ** 2
        saved += sizes.channels(block) // 4 * sizes.dim * tokens * (cells - 1)
    return saved


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("conformer_tiny_patch16_224", 4.90e9),
        ("conformer_small_patch16_224", 10.31e9),
        ("conformer_small_patch32_224", 7.09e9),
        ("conformer_base_patch16_224", 22.89e9),
    ],
)
def test_macs_are_the_published_ones(name: str, published: float) -> None:
    """Published counts leave out attention's two products and project before pooling: so counted, within 1 %."""
    found = describe(model=name)
    sizes = conformer.SIZES[name]
    tokens = 1 + (224 // sizes.patch) ** 2
    attention = 2 * sizes.depth * tokens**2 * sizes.dim
    assert found.macs - attention + _saved_macs(name) == pytest.approx(published, rel=0.01)
    assert found.macs == pytest.approx(published, rel=0.07)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (NANO, [32]),
        ("conformer_nano_patch16_128", [75, 118]),
        ("resnet18", [96, 64]),
        ("vit_tiny_patch16_224", [64, 96]),
        ("swin_tiny_patch4_window7_224", [64, 96]),
        ("convnext_atto", []),
        ("mobilevit_xxs", [64]),
        ("efficientnet_b0", [64]),
        ("mixer_s32_224", []),
    ],
    ids=str,
)
def test_rows_add_up_and_levels_are_real(name: str, size: list[int]) -> None:
    found = describe(model=name, image_size=size)
    assert sum(stage.parameters for stage in found.stages) == found.parameters
    if not size or ("vit" not in name and "swin" not in name):  # their position weights depend on the size
        assert found.parameters == sum(p.numel() for p in timm.create_model(name).parameters())
    assert sum(stage.macs for stage in found.stages) == found.macs > 0
    assert all(stage.parameters >= 0 and stage.macs >= 0 for stage in found.stages)
    assert found.outputs["output"] == (1000,)
    maps = [stage.map for stage in found.stages]
    for level in found.levels:
        row = next((stage for stage in found.stages if stage.name == level.name and stage.map), None)
        if row is not None and name != "conformer_nano_patch16_128":  # whose rows show the padded map
            assert row.map == level.shape, maps


def test_map_and_tokens_of_a_conformer() -> None:
    found = describe(model=NANO, image_size=[32, 48], num_classes=7)
    sizes = conformer.SIZES[NANO]
    stages = {stage.name: stage for stage in found.stages}
    assert stages["stem"].map == (sizes.stem_chs, 32, 48)
    assert stages["stem"].tokens is None
    assert stages["blocks.0"].tokens == (1 + 8 * 12, sizes.dim)
    last = sizes.depth - 1
    assert stages[f"blocks.{last}"].map == (sizes.channels(last), 4, 6)
    assert stages["heads.conv"].vector == 7
    assert found.outputs == {"output": (7,), "conv": (7,), "tokens": (7,)}
    assert found.stages[-1].parameters == sizes.dim  # the class token belongs to no module
    model = create_model(NANO, num_classes=7)
    expected = [tuple(level.shape[1:]) for level in model.forward_intermediates(torch.zeros(1, 3, 32, 48))[1]]
    assert [level.shape for level in found.levels] == expected


def test_input_is_said_in_full() -> None:
    given = describe(model=NANO, in_chans=1, model_args={"coupling": "none"}).input
    assert given.shape == (1, 32, 32)
    assert (given.dtype, given.order) == ("float32", "RGB")
    assert given.range == pytest.approx((-given.mean[0] / given.std[0], (1 - given.mean[0]) / given.std[0]))
    assert describe(model="vit_tiny_patch16_224").input.range == pytest.approx((-1, 1))


def test_no_classifier() -> None:
    found = describe(model=NANO, num_classes=0)
    assert found.outputs == {"output": (create_model(NANO).head_hidden_size,)}
    assert found.labels == ()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    info = ModelInfo(
        architecture=NANO, labels=("cat", "dog"), preprocess=Preprocess(size=(48, 32), crop=0.9, mean=(0.5,) * 3)
    )
    save_model(tmp_path / "model.safetensors", create_model(NANO, num_classes=2), info)
    return tmp_path


def test_a_model_file_shows_its_own_words(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ref in (saved, saved / "model.safetensors"):
        assert main(["describe", str(ref)]) == 0
        shown = capsys.readouterr().out
        assert "random weights" not in shown
        assert "(B, 3, 48, 32)" in shown
        assert "classes: cat, dog" in shown
        assert "mean (0.5, 0.5, 0.5)" in shown
        assert "resize to cover 53x35" in shown


def test_json_is_the_same_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    found = chiasm.describe(model=NANO)
    assert show(found, DescribeConfig(model=NANO, format="json")) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain == json.loads(json.dumps(found.to_dict()))
    assert plain["macs"] == found.macs


def test_the_table_says_that_weights_are_random(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", NANO, "--image-size", "32", "64"]) == 0
    shown = capsys.readouterr().out
    assert "random weights" in shown
    assert "forward_branches(x)['tokens']: (B, 1000) logits" in shown
    assert f"{describe(model=NANO).parameters:,}" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "conformer_nano_patch4_31"}, NANO),
        ({"model": "runs/none"}, "no such file or folder"),
        ({"model": NANO, "image_size": [2]}, "does not take images of 2x2 px|at least 4 px"),
        ({"model": NANO, "image_size": [0]}, "expected a side"),
        ({"model": NANO, "image_size": [32, 32, 3]}, "expected a side"),
        ({"model": NANO, "model_args": {"coupling": "sideways"}}, "unknown coupling"),
        ({"model": NANO, "modle_args": {}}, "did you mean model_args"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_one_line(flags: dict, message: str) -> None:
    with pytest.raises(ChiasmError, match=message) as error:
        describe(**flags)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------------- models


def test_our_architectures_with_their_sizes() -> None:
    found = {item.name: item for item in models()}
    assert list(found) == list_models()
    for name, item in found.items():
        assert item.note.endswith(".")
        assert item.size == timm.models.get_pretrained_cfg(name).input_size[1:]
    assert found["conformer_tiny_patch16_224"].parameters == 23_524_704
    assert found["conformer_tiny_patch16_224"].pretrained
    assert not found[NANO].pretrained


def test_patterns_and_timms_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert [item.name for item in models(pattern="nano_patch4")] == [NANO]
    assert {"resnet18", "resnet50"} <= {item.name for item in models(pattern="resnet*", all=True)}
    assert main(["models", "nano*", "--format", "json"]) == 2
    assert main(["models", "*nano*", "--format", "json"]) == 0
    assert [item["name"] for item in json.loads(capsys.readouterr().out)] == list_models("nano")
    assert main(["models"]) == 0
    assert "37.7 M" in capsys.readouterr().out


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ChiasmError, match=r"no architecture of chiasm .* add --all"):
        models(pattern="resnet18")
    with pytest.raises(UnknownNameError, match="conformer_tiny_patch16_224"):
        models(pattern="conformer_tinny_patch16_224")


def test_a_coupled_model_is_shown_in_the_order_in_which_it_runs() -> None:
    result = chiasm.describe(
        model="resnet18+vit_tiny_patch16_224:mid", model_args={"tokens_args": {"depth": 4}}, num_classes=3
    )
    rows = [stage.name for stage in result.stages]
    steps = ["conv.layer1.1", "exchanges.0", "conv.layer2.0", "exchanges.1", "conv.layer4.1", "tokens.blocks.2"]
    assert [name for name in rows if name in steps] == steps
    assert rows.index("exchanges.3") < rows.index("tokens.blocks.3") < rows.index("tokens.head")
    exchange = next(stage for stage in result.stages if stage.name == "exchanges.1")
    assert exchange.map == (128, 28, 28)
    assert exchange.tokens == (196, 192)
    assert set(result.outputs) == {"output", "conv", "tokens"}
