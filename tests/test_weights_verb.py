"""chiasm weights: a checkpoint identified without being told, every key accounted for, and converted faithfully."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import chiasm
from chiasm.cli import main
from chiasm.errors import CheckpointError, ChiasmError, UnknownNameError
from chiasm.model_file import ModelInfo, load_model, preprocess_of, save_model
from chiasm.models import ARCHITECTURES, create_model, mobilevit, swin
from chiasm.models.sketch import sketch
from chiasm.verbs.weights import weights

SWIN, MOBILEVIT = "swin_nano_window4_128", "mobilevit_xxs_256"
SMALL = {"conformer_nano_patch16_128", SWIN, MOBILEVIT, "mobilevitv2_050_256"}  # one of each architecture
# The classes of Imagenette by their place in ImageNet.
IMAGENETTE = {
    "tench": 0, "english_springer": 217, "cassette_player": 482, "chain_saw": 491, "church": 497,
    "french_horn": 566, "garbage_truck": 569, "gas_pump": 571, "golf_ball": 574, "parachute": 701,
}  # fmt: skip


def _build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return create_model(name, **{"num_classes": 5, **options}).eval()


def _answers_alike(file: Path, model: nn.Module, channels: int = 3) -> None:
    images = torch.rand(2, channels, 64, 96)
    with torch.no_grad():
        assert torch.equal(load_model(file)[0](images), model(images))


# -------------------------------------------------------------------------------------------------------- real weights


def test_real_weights_are_identified_converted_and_recognise_images(shared_data: Path, tmp_path: Path) -> None:
    published = shared_data / "weights" / "tf_efficientnet_lite0_fp16.safetensors"
    if not published.is_file():
        pytest.skip("the published checkpoint is not here")
    found = weights(file=str(published), out=str(tmp_path / "lite.safetensors"))
    assert (found.architecture, found.classes, found.in_chans) == ("tf_efficientnet_lite0", 1000, 3)
    assert found.known_by == "a name and its weights"
    assert found.alternatives == ("efficientnet_lite0",)  # the same weights, padded in another way
    assert {entry.fate for entry in found.entries} == {"loaded"}
    assert not found.missing

    strict = timm.create_model("tf_efficientnet_lite0").eval()
    strict.load_state_dict(safetensors.torch.load_file(published))
    _answers_alike(tmp_path / "lite.safetensors", strict)

    predictor = chiasm.load(tmp_path / "lite.safetensors")
    assert predictor.info.preprocess.mean == (0.5, 0.5, 0.5)
    right = total = 0
    for folder, index in IMAGENETTE.items():
        files = sorted((shared_data / "imagenette128" / "val" / folder).iterdir())[:3]
        for result in predictor([str(file) for file in files]):
            total += 1
            right += result.label == f"class {index}"
    assert total == 30
    assert right >= 15  # of 1000 classes, on 128 px images enlarged; chance is 0.03 of the 30


def test_a_renamed_file_is_told_by_what_lies_beside_it(shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "weights" / "tf_efficientnet_lite0_fp16.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"296 weights.*fit no architecture.*Name it: --model NAME"):
        weights(file=str(tmp_path / "model.safetensors"))
    assert weights(file=str(tmp_path / "model.safetensors"), model="tf_efficientnet_lite0").known_by == "--model"
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "efficientnet_lite0", "num_classes": 1000}))
    assert weights(file=str(tmp_path)).architecture == "efficientnet_lite0"


# ------------------------------------------------------------------------------------------------------------- dialects


def test_there_is_one_of_each_architecture() -> None:
    assert [len(SMALL & set(module.SIZES)) for module in ARCHITECTURES] == [1] * len(ARCHITECTURES)


@pytest.mark.parametrize(
    ("name", "dialect"),
    [(name, dialect) for module in ARCHITECTURES for name in SMALL & set(module.SIZES) for dialect in module.DIALECTS],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_dialect_is_identified(name: str, dialect: Any, tmp_path: Path) -> None:
    shapes = sketch(name, num_classes=7).state_dict()
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in dialect.write(shapes).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "some name.pth")
    found = weights(file=str(tmp_path / "some name.pth"))
    # The names of OpenMMLab's classifiers and detectors differ in Swin's last norm alone, which this file has.
    assert found.naming == dialect.name.removesuffix(" in detectors")
    assert (found.architecture, found.classes) == (name, 7)
    assert found.known_by == "its weights"
    assert [entry.key for entry in found.entries] == [*state, "epoch"]
    assert found.entries[-1].fate == "left out"
    assert found.missing == (("norm.weight", "norm.bias") if "detectors" in dialect.name else ())


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_a_published_file_becomes_a_model_file(in_chans: int, tmp_path: Path) -> None:
    origin = _build(SWIN, in_chans=in_chans)
    safetensors.torch.save_file(swin.DIALECTS[4].write(origin.state_dict()), tmp_path / "theirs.safetensors")
    (tmp_path / "names.txt").write_text("ant\nbee\ncrab\n\ndeer\nélan\n", encoding="utf-8")
    out = tmp_path / "ours.safetensors"
    found = weights(file=str(tmp_path / "theirs.safetensors"), out=str(out), labels=str(tmp_path / "names.txt"))
    assert found.out == str(out)
    assert found.in_chans == in_chans
    assert load_model(out)[1].labels == ("ant", "bee", "crab", "deer", "élan")
    _answers_alike(out, origin, in_chans)


def test_bgr_weights_become_a_model_that_reads_rgb(tmp_path: Path) -> None:
    origin = _build(MOBILEVIT)
    torch.save(mobilevit.DIALECTS[0].write(origin.state_dict()), tmp_path / "mobilevit_xxs.pt")
    out = tmp_path / "ours.safetensors"
    found = weights(file=str(tmp_path / "mobilevit_xxs.pt"), out=str(out))
    adapted = [entry for entry in found.entries if entry.fate == "adapted"]
    assert [(entry.key, entry.what) for entry in adapted] == [
        ("conv_1.block.conv.weight", "input channels from BGR to RGB")
    ]
    assert load_model(out)[1].preprocess == preprocess_of(create_model(MOBILEVIT))
    assert load_model(out)[1].labels == tuple(f"class {i}" for i in range(5))
    _answers_alike(out, origin)


def test_a_model_file_and_a_run_folder_say_what_they_are(tmp_path: Path) -> None:
    model = _build("conformer_nano_patch4_32", num_classes=2, coupling="none")
    info = ModelInfo(
        architecture="conformer_nano_patch4_32",
        model_args={"coupling": "none"},
        labels=("cat", "dog"),
        preprocess=preprocess_of(model),
        data="pets",
    )
    save_model(tmp_path / "model.safetensors", model, info)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        found = weights(file=str(source), out=str(tmp_path / "again.safetensors"))
        assert (found.architecture, found.known_by) == ("conformer_nano_patch4_32", "its own description")
        assert not found.missing
        assert load_model(tmp_path / "again.safetensors")[1] == info


def test_timms_architecture_is_known_by_an_entry_or_the_files_name(tmp_path: Path) -> None:
    model = _build("test_vit")
    torch.save({"arch": "test_vit", "state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    assert weights(file=str(tmp_path / "last.pth.tar")).architecture == "test_vit"
    torch.save(model.state_dict(), tmp_path / "test_vit-best.pth")
    assert weights(file=str(tmp_path / "test_vit-best.pth")).architecture == "test_vit"


def test_architectures_with_the_same_weights_are_told_apart_by_name_or_said(tmp_path: Path) -> None:
    state = _build("conformer_nano_patch4_32").state_dict()  # the 64 px one differs in a stride alone
    found = weights(file=_saved(tmp_path, state))
    both = {"conformer_nano_patch4_32", "conformer_nano_patch8_64"}
    assert {found.architecture, *found.alternatives} == both
    torch.save(state, tmp_path / "my-Conformer-nano-patch4-32.pth")
    named = weights(file=str(tmp_path / "my-Conformer-nano-patch4-32.pth"))
    assert named.architecture == "conformer_nano_patch4_32"
    assert named.alternatives == ("conformer_nano_patch8_64",)


def test_another_window_is_said(tmp_path: Path) -> None:
    torch.save(_build(SWIN, window_size=6).state_dict(), tmp_path / "x.pth")
    found = weights(file=str(tmp_path / "x.pth"))
    assert found.architecture == SWIN
    assert sum(entry.what == "bias table of a 6x6 window interpolated to 4x4" for entry in found.entries) == 12
    told = weights(file=str(tmp_path / "x.pth"), model=SWIN, model_args={"window_size": 6})
    assert {entry.fate for entry in told.entries} == {"loaded"}


# ------------------------------------------------------------------------------------------------------------ printing


def test_the_table_shows_every_key_and_json_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = swin.DIALECTS[2].write(_build(SWIN).state_dict())
    del state["backbone.norm3.bias"]
    torch.save({**state, "surplus": torch.zeros(2, 3)}, tmp_path / "w.pth")
    assert main(["weights", str(tmp_path / "w.pth")]) == 0
    printed = capsys.readouterr().out
    words = printed.split()
    assert not [key for key in state if key not in words]
    assert f"{SWIN}, 5 classes, in OpenMMLab's names; known by its weights" in printed
    assert "patch merging from the order of nn.Unfold" in " ".join(words)
    assert "1 left out; 1 weights missing" in printed
    assert main(["weights", str(tmp_path / "w.pth"), "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["entries"][-1] == {
        "key": "surplus", "shape": [2, 3], "fate": "left out", "weight": "", "what": f"no such weight in {SWIN}",
    }  # fmt: skip
    assert told["missing"] == ["norm.bias"]


# ----------------------------------------------------------------------------------------------------------- bad input


def _saved(tmp_path: Path, state: dict[str, Tensor]) -> str:
    torch.save(state, tmp_path / "w.pth")
    return str(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"labels": "x.txt"}, ChiasmError, "give --out as well"),
        ({"out": "x.pth"}, ChiasmError, r"such as x\.safetensors"),
        ({"out": "x.safetensors", "labels": "none.txt"}, ChiasmError, r"none\.txt: cannot be read \(No such file"),
        ({"out": "x.safetensors", "labels": "four.txt"}, ChiasmError, "4 names, expected 5"),
        ({"model_args": {"window_size": 6}}, ChiasmError, "name it with --model"),
        ({"model": SWIN, "model_args": {"windowsize": 6}}, ChiasmError, r"cannot be built with .*windowsize"),
        ({"model": SWIN, "model_args": {"num_classes": 5}}, ChiasmError, r"cannot be built with .*num_classes"),
        ({"model": "swin_nano_window4_182"}, UnknownNameError, "did you mean swin_nano_window4_128"),
        ({"model": MOBILEVIT}, CheckpointError, rf"weights for another model.*It fits {SWIN}"),
        ({"out": "none/x.safetensors"}, ChiasmError, "cannot write the model file"),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together(
    flags: dict[str, str], error: type[ChiasmError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "four.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(error, match=message) as caught:
        weights(file=_saved(tmp_path, _build(SWIN).state_dict()), **flags)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_would_be_half_a_model_is_not_written(tmp_path: Path) -> None:
    state = _build(SWIN).state_dict()
    out = tmp_path / "x.safetensors"
    bare = {key: value for key, value in state.items() if not key.startswith("head.")}
    assert weights(file=_saved(tmp_path, bare)).classes == 0
    with pytest.raises(CheckpointError, match=rf"lacks a classifier.*chiasm train DATA --model {SWIN} --weights"):
        weights(file=_saved(tmp_path, bare), out=str(out))
    del state["layers.0.blocks.0.norm1.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, such as 'layers\.0\.blocks\.0\.norm1\.weight'"):
        weights(file=_saved(tmp_path, state), out=str(out))
    assert not out.exists()


def test_the_file_itself_is_not_overwritten(tmp_path: Path) -> None:
    safetensors.torch.save_file(_build(SWIN).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ChiasmError, match="that is the file itself"):
        weights(file=str(tmp_path / "w.safetensors"), out=str(tmp_path / "w.safetensors"))


def test_another_size_of_a_known_architecture_names_the_nearest(tmp_path: Path) -> None:
    state = _build(SWIN, depths=(1, 1, 1, 1)).state_dict()
    with pytest.raises(CheckpointError, match=rf"fit no architecture of chiasm.*nearest is {SWIN}, \d\d%"):
        weights(file=_saved(tmp_path, state))
    told = weights(file=_saved(tmp_path, state), model=SWIN, model_args={"depths": [1, 1, 1, 1]})
    assert not told.missing
