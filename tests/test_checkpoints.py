"""Weights from elsewhere into a model: the fate of every key, every kind of source, and nothing run from a file."""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import chiasm
from chiasm.config import Preprocess
from chiasm.errors import CheckpointError
from chiasm.model_file import ModelInfo, save_model
from chiasm.models import conformer, create_model, swin
from chiasm.models.checkpoints import OWN_NAMES, WeightsReport, load_weights
from chiasm.models.dialects import Dialect
from chiasm.models.sketch import sketch

NAME = "conformer_nano_patch4_32"
AUTHORS, OPENMMLAB = conformer.DIALECTS


def _build(name: str = NAME, *, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(name, num_classes=options.pop("num_classes", 5), **options)


def _in(dialect: Dialect, model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in dialect.write(model.state_dict()).items()}


def _same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


def _account(report: WeightsReport, content: Mapping[str, Any], model: nn.Module) -> None:
    """Each key of the file and each weight of the model has exactly one fate."""
    of_file = [*report.loaded, *report.renamed, *report.adapted, *report.left_out]
    assert sorted(of_file) == sorted(content)
    adapted = {to.key for to in report.adapted.values()}
    assert sorted([*report.loaded, *report.renamed.values(), *adapted, *report.missing]) == sorted(model.state_dict())


# ------------------------------------------------------------------------------------------------------------ dialects


@pytest.mark.parametrize("wrapper", ["", "module.", "module.model."])
@pytest.mark.parametrize("dialect", conformer.DIALECTS, ids=lambda dialect: dialect.name)
def test_a_published_checkpoint_loads_whole(dialect: Dialect, wrapper: str) -> None:
    origin, model = _build(seed=1), _build(seed=2)
    state = {wrapper + key: value for key, value in _in(dialect, origin).items()}
    report = load_weights(model, state)
    assert _same(model, origin)
    assert report.naming == dialect.name
    assert not report.missing
    assert not report.left_out
    _account(report, state, model)


def test_a_detectors_backbone_without_heads() -> None:
    origin, model = _build(seed=1), _build(seed=2)
    heads = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("heads.")}
    state = {f"backbone.{key}": value for key, value in _in(AUTHORS, origin).items() if "cls_head" not in key}
    state |= {"neck.lateral_convs.0.conv.weight": torch.zeros(256, 128, 1, 1), "rpn_head.rpn_conv.bias": torch.zeros(9)}
    report = load_weights(model, {"meta": {"epoch": 12}, "state_dict": state})
    assert sorted(report.missing) == sorted(heads)
    assert report.left_out == {
        "meta": "beside the weights in 'state_dict'",
        "neck.lateral_convs.0.conv.weight": f"no such weight in {NAME}",
        "rpn_head.rpn_conv.bias": f"no such weight in {NAME}",
    }
    for key, value in model.state_dict().items():
        assert torch.equal(value, heads[key] if key in heads else origin.state_dict()[key]), key


def test_timm_loads_a_published_file_as_pretrained_weights(tmp_path: Path) -> None:
    origin = _build(seed=1)
    torch.save({"meta": {}, "state_dict": _in(OPENMMLAB, origin)}, tmp_path / "published.pth")
    overlay = {"file": str(tmp_path / "published.pth"), "num_classes": 5}
    model = timm.create_model(NAME, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert _same(model, origin)
    fewer = timm.create_model(NAME, pretrained=True, num_classes=2, in_chans=1, pretrained_cfg_overlay=overlay)
    assert torch.equal(fewer.norm.weight, origin.norm.weight)
    assert fewer.heads["conv"].out_features == 2


# ---------------------------------------------------------------------------------------------------------- adaptation


@pytest.mark.parametrize("in_chans", [1, 4, 6])
def test_other_classes_and_channels_are_adapted(in_chans: int) -> None:
    origin, model = _build(seed=1), _build(seed=2, num_classes=7, in_chans=in_chans)
    fresh = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("heads.")}
    state = _in(AUTHORS, origin)
    report = load_weights(model, state)
    _account(report, state, model)
    assert report.adapted["conv1.weight"] == ("stem.conv.weight", f"input channels from 3 to {in_chans}")
    assert report.adapted["conv_cls_head.weight"] == (
        "heads.conv.weight",
        "reset, the file has 5 classes and the model 7",
    )
    assert {to.key for to in report.adapted.values()} == {"stem.conv.weight", *fresh}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in fresh.items())
    # An image whose channels are all alike gives the same response as before, up to the border of four channels in six.
    grey = torch.rand(1, 1, 32, 32)
    seen, expected = (m.stem.conv(grey.expand(-1, m.in_chans, -1, -1)) for m in (model, origin))
    if in_chans != 4:
        torch.testing.assert_close(seen, expected)


def test_tables_of_another_window_are_interpolated() -> None:
    origin, model = _build("swin_nano_window4_128", seed=1), _build("swin_nano_window4_128", seed=2, window_size=6)
    report = load_weights(model, origin.state_dict())
    _account(report, origin.state_dict(), model)
    assert len(report.adapted) == 12
    assert report.adapted["layers.0.blocks.0.attn.relative_position_bias_table"].what == (
        "bias table of a 4x4 window interpolated to 6x6"
    )
    assert torch.equal(model.layers[3].blocks[1].mlp.fc2.weight, origin.layers[3].blocks[1].mlp.fc2.weight)
    table = model.layers[0].blocks[0].attn.relative_position_bias_table.view(11, 11)
    assert torch.allclose(table[5, 5], origin.layers[0].blocks[0].attn.relative_position_bias_table.view(7, 7)[3, 3])


def test_a_features_only_backbone_takes_the_same_files() -> None:
    origin = _build("swin_nano_window4_128", seed=1)
    backbone = timm.create_model("swin_nano_window4_128", features_only=True)
    report = load_weights(backbone, swin.DIALECTS[0].write(origin.state_dict()))
    assert not report.missing
    assert torch.equal(
        backbone.model.layers[1].downsample.reduction.weight, origin.layers[1].downsample.reduction.weight
    )


def test_a_part_of_query_key_and_value_is_not_enough() -> None:
    origin, model = _build("swin_nano_window4_128", seed=1), _build("swin_nano_window4_128", seed=2)
    state = swin.DIALECTS[4].write(origin.state_dict())
    gone = "swin.encoder.layers.0.blocks.0.attention.self.key.bias"
    del state[gone]
    report = load_weights(model, state)
    assert report.missing == ("layers.0.blocks.0.attn.qkv.bias",)
    assert {key: why for key, why in report.left_out.items() if "norm" not in key} == {
        gone.replace("key", other): "a part of 'layers.0.blocks.0.attn.qkv.bias', which is not whole in the file"
        for other in ("query", "value")
    }


def test_no_classifier_leaves_the_heads_out() -> None:
    origin, model = _build(seed=1), _build(seed=2, num_classes=0)
    report = load_weights(model, origin.state_dict())
    assert sorted(report.left_out) == [f"heads.{b}.{k}" for b in ("conv", "tokens") for k in ("bias", "weight")]
    assert not report.missing


def test_an_uncoupled_model_takes_what_it_has() -> None:
    origin, model = _build(seed=1), _build(seed=2, coupling="none")
    report = load_weights(model, _in(AUTHORS, origin))
    assert not report.missing
    assert {key.split(".")[1] for key in report.left_out} == {"squeeze_block", "expand_block"}
    back = load_weights(_build(seed=3), model.state_dict())
    assert {key.split(".")[2] for key in back.missing} == {"down", "up"}


def test_timm_models_use_their_own_names_and_conversions() -> None:
    torch.manual_seed(0)
    origin = timm.create_model("vit_tiny_patch16_224", depth=2)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=96, num_classes=3, in_chans=1)
    report = load_weights(model, {"module." + key: value for key, value in origin.state_dict().items()})
    assert report.adapted["module.pos_embed"] == ("pos_embed", "converted by timm from (1, 197, 192) to (1, 37, 192)")
    assert report.adapted["module.patch_embed.proj.weight"].what == "input channels from 3 to 1"
    assert torch.equal(model.blocks[1].mlp.fc2.weight, origin.blocks[1].mlp.fc2.weight)
    _account(report, {"module." + key: None for key in origin.state_dict()}, model)


def test_other_peoples_names_of_a_timm_model() -> None:
    """The authors' ConvNeXt names, which timm's conversion knows."""
    torch.manual_seed(0)
    origin = timm.create_model("convnext_atto")
    stages = {"stem.0": "downsample_layers.0.0", "stem.1": "downsample_layers.0.1", "head.norm": "norm"}
    state = {}
    for key, value in origin.state_dict().items():
        for ours, theirs in stages.items():
            key = theirs + key.removeprefix(ours) if key.startswith(f"{ours}.") else key
        parts = key.split(".")
        if parts[2:3] == ["downsample"]:
            parts = ["downsample_layers", parts[1], *parts[3:]]
        key = ".".join(parts).replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        state[key.replace("head.fc", "head")] = value
    model = timm.create_model("convnext_atto")
    report = load_weights(model, {"model": state})
    assert _same(model, origin)
    assert report.naming == "names that timm converts"
    assert report.renamed["downsample_layers.1.1.weight"] == "stages.1.downsample.1.weight"
    _account(report, {**state}, model)


# ------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "ckpt", "pth.tar", "bin"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_files_of_every_kind(suffix: str, zipped: bool, tmp_path: Path) -> None:
    origin, model, path = _build(seed=1), _build(seed=2), tmp_path / f"with spaces.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(origin.state_dict(), path)
    else:
        content = {"state_dict": origin.state_dict(), "epoch": 3, "arch": NAME}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    report = load_weights(model, path)
    assert _same(model, origin)
    assert report.naming == OWN_NAMES
    assert report.source == str(path)


def test_the_kind_is_seen_from_the_content_not_the_name(tmp_path: Path) -> None:
    origin, model = _build(seed=1), _build(seed=2)
    safetensors.torch.save_file(origin.state_dict(), tmp_path / "really-safetensors.pth")
    load_weights(model, tmp_path / "really-safetensors.pth")
    assert _same(model, origin)


def test_our_model_file_and_a_compiled_model(tmp_path: Path) -> None:
    origin, model = _build(seed=1), _build(seed=2)
    info = ModelInfo(architecture=NAME, labels=tuple("abcde"), preprocess=Preprocess(size=(32, 32)))
    save_model(tmp_path / "model.safetensors", origin, info)
    load_weights(torch.compile(model), str(tmp_path / "model.safetensors"))
    assert _same(model, origin)


def test_our_training_checkpoint_gives_the_averaged_weights() -> None:
    plain, averaged, model = _build(seed=1), _build(seed=2), _build(seed=3)
    state = {f"task.model.{key}": value for key, value in plain.state_dict().items()}
    state |= {f"ema.module.model.{key}": value for key, value in averaged.state_dict().items()}
    report = load_weights(model, {"epoch": 1, "state_dict": state, "optimizer_states": []})
    assert _same(model, averaged)
    assert len(report.left_out) == len(plain.state_dict()) + 2
    load_weights(model, {"state_dict": {key: value for key, value in state.items() if key.startswith("task.")}})
    assert _same(model, plain)


def test_plain_weights_come_before_averaged_ones_of_other_trainers() -> None:
    plain, averaged, model = _build(seed=1), _build(seed=2), _build(seed=3)
    both = {"model_ema": averaged.state_dict(), "model": plain.state_dict(), "args": {"lr": 0.1}}
    report = load_weights(model, both)
    assert _same(model, plain)
    assert report.left_out["model_ema"] == "beside the weights in 'model'"
    load_weights(model, {"model_ema": averaged.state_dict()})
    assert _same(model, averaged)


def test_entries_that_are_no_tensors_are_named() -> None:
    report = load_weights(_build(), {**_build().state_dict(), "epoch": 3})
    assert report.left_out == {"epoch": "not a tensor but int"}


def test_a_url_is_fetched_once_and_its_hash_checked(server: tuple[str, Path]) -> None:
    address, folder = server
    origin, model = _build(seed=1), _build(seed=2)
    torch.save(_in(OPENMMLAB, origin), folder / "weights.pth")
    content = (folder / "weights.pth").read_bytes()
    name = f"conformer-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    assert load_weights(model, f"{address}/{name}").naming == OPENMMLAB.name
    assert _same(model, origin)
    (folder / name).unlink()
    load_weights(_build(), f"{address}/{name}")  # now from the cache

    (folder / "conformer-00000000.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or another file") as error:
        load_weights(model, f"{address}/conformer-00000000.pth")
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded .*404.*give its path"):
        load_weights(model, f"{address}/gone.pth")


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="Without a network, copy the file here"):
        load_weights(_build(), "http://127.0.0.1:9/weights.pth")


# ------------------------------------------------------------------------------------------------------------ bad input


class _Hostile:
    """Unpickling this would create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("nested", [False, True], ids=["bare", "in a namespace"])
def test_code_in_a_file_is_never_run(zipped: bool, nested: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "was-here", tmp_path / "hostile.pth"
    payload: Any = _Hostile(marker)
    content = {"model": _build().state_dict(), "args": argparse.Namespace(x=payload) if nested else payload}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"holds '\w+\.system' besides weights; code from files is never run"
    ) as error:
        load_weights(_build(), path)
    assert not marker.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_newer_pickle_is_named_as_such(zipped: bool, tmp_path: Path) -> None:
    torch.save(_build().state_dict(), tmp_path / "x.pth", pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    _refused(tmp_path / "x.pth", "holds a pickle of a newer protocol.*convert it once")


def test_a_training_checkpoint_with_its_command_line() -> None:
    """A Namespace alone is an empty shell around values: the weights are read and it is left out, by name."""
    origin, model = _build(seed=1), _build(seed=2)
    report = load_weights(model, {"model": origin.state_dict(), "args": argparse.Namespace(lr=0.1)})
    assert report.left_out == {"args": "beside the weights in 'model'"}


def test_the_way_out_that_the_message_names_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    origin, model = _build(seed=1), _build(seed=2)
    torch.save({"model": origin.state_dict(), "args": argparse.Namespace(lr=0.1)}, "plain.pth")
    assert load_weights(model, "plain.pth").left_out == {"args": "beside the weights in 'model'"}
    assert _same(model, origin)

    torch.save({"model": _in(AUTHORS, origin), "args": argparse.Namespace(out=pathlib.PurePosixPath("x"))}, "run.pth")
    with pytest.raises(CheckpointError, match=r"holds 'pathlib\.PurePosixPath'.*convert it once: python -c") as error:
        load_weights(_build(), "run.pth")
    code = str(error.value).split('python -c "')[1].removesuffix('"')
    exec(code, {})
    model = _build(seed=3)
    load_weights(model, "weights.pth")
    assert _same(model, origin)


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"holds 'torch\.nn\.modules\.container\.Sequential' besides weights"):
        load_weights(_build(), tmp_path / "whole.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.00001, 0.001, 0.3, 0.999])
def test_truncated_files(share: float, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save(_build().state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share) + 1])
    _refused(path, "not a complete checkpoint")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n<!doctype html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        (b"hello, this is text", "not a complete checkpoint"),
        (bytes(range(256)) * 8, "not a complete checkpoint"),
        (b"PK\x03\x04" + bytes(100), "not a complete checkpoint"),
        ((1000).to_bytes(8, "little") + b'{"a":', "incomplete or damaged .safetensors"),
    ],
    ids=["empty", "html", "lfs", "text", "bytes", "zip", "safetensors"],
)
def test_files_that_are_no_checkpoints(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    _refused(tmp_path / "x.pth", message)


def test_paths_that_hold_no_checkpoint(tmp_path: Path) -> None:
    _refused(tmp_path / "none.pth", "no such file")
    _refused(tmp_path, "a folder")


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [1, 2], torch.zeros(3), {"state_dict": {}}], ids=str)
def test_plain_data_without_weights(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    _refused(tmp_path / "x.pth", "holds no weights")


def _refused(path: Path, message: str) -> None:
    model, before = _build(seed=2), _build(seed=2)
    with pytest.raises(CheckpointError, match=message) as error:
        load_weights(model, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert _same(model, before)


def test_weights_for_another_model_name_the_right_one() -> None:
    origin = sketch("conformer_small_patch32_224")
    state = _in(AUTHORS, origin)
    model, before = _build(seed=2), _build(seed=2)
    with pytest.raises(CheckpointError, match=r"'cls_token' has shape \(1, 1, 384\), expected \(1, 1, 128\)") as error:
        load_weights(model, state)
    assert str(error.value).endswith("chiasm.create_model('conformer_small_patch32_224').")
    assert "\n" not in str(error.value)
    assert _same(model, before)  # also what would have fitted


def test_one_branch_does_not_take_the_weights_of_both() -> None:
    model, before = _build(seed=2, branches="tokens"), _build(seed=2, branches="tokens")
    with pytest.raises(CheckpointError, match="for another model") as error:
        load_weights(model, _build(seed=1).state_dict())
    assert "\n" not in str(error.value)
    assert _same(model, before)


def test_one_wrong_shape_stops_all() -> None:
    model, before, state = _build(seed=2), _build(seed=2), _build(seed=1).state_dict()
    state["norm.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"363 of 364 fit .*; 'norm\.weight' has shape \(3,\), expected \(128,\)"):
        load_weights(model, state)
    assert _same(model, before)


def test_channels_that_cannot_be_adapted() -> None:
    state = _build(seed=1, in_chans=4).state_dict()
    for in_chans in (2, 3):
        with pytest.raises(CheckpointError, match=rf"'stem\.conv\.weight' has shape \(16, 4, .*\(16, {in_chans}, "):
            load_weights(_build(in_chans=in_chans), state)


def test_weights_of_quite_another_network() -> None:
    with pytest.raises(CheckpointError, match=r"weights for another model, \d of 364 fit"):
        load_weights(_build(), timm.create_model("resnet18").state_dict())


# --------------------------------------------------------------------------------------------------------------- report


def test_the_report_is_readable_and_plain() -> None:
    model = _build(num_classes=2)
    state = {**_in(AUTHORS, _build()), "surplus": torch.zeros(1)}
    report = chiasm.load_weights(model, {"model": state})
    lines = str(report).splitlines()
    assert lines[0] == "weights of state dict, in the authors' names"
    assert [line.split("  ")[1].strip() for line in lines[1:]] == [
        "loaded",
        "renamed",
        "adapted",
        "left out",
        "missing",
    ]
    assert "surplus: no such weight" in str(report)
    plain = report.to_dict()
    assert plain["adapted"]["conv_cls_head.bias"]["key"] == "heads.conv.bias"
    assert len(plain["renamed"]) == len(report.renamed)
