"""The model file: everything a model needs, in one file that is either complete or not there."""

from __future__ import annotations

import json
import os
import resource
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from chiasm.config import Preprocess
from chiasm.errors import ChiasmError, ModelFileError, UnknownNameError
from chiasm.model_file import METADATA_KEY, ModelInfo, load_model, preprocess_of, resolve_model, save_model
from chiasm.models import create_model

NAME = "conformer_nano_patch4_32"
WORDS = st.text(st.characters(exclude_categories=["Cs"]))  # all but half characters
LABELS = ("cat", "chien", "猫 with spaces")
INFO = ModelInfo(
    architecture=NAME,
    model_args={"coupling": "map_to_tokens"},
    labels=LABELS,
    preprocess=Preprocess(size=(32, 48), crop=0.9, interpolation="bilinear"),
    data="photos of cats",
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model(NAME, num_classes=len(LABELS), **INFO.model_args).eval()


@pytest.fixture
def saved(model: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(path, model, INFO)
    return path


def _rewrite(path: Path, **changes: object) -> Path:
    """The file with other words in its description; None takes a word out."""
    with safetensors.safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()[METADATA_KEY])
    content = {key: value for key, value in (content | changes).items() if value is not None}
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata={METADATA_KEY: json.dumps(content)})
    return path


def test_what_is_saved_comes_back(model: nn.Module, saved: Path) -> None:
    loaded, info = load_model(saved)
    assert info == INFO
    assert not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    images = torch.rand(2, 3, 32, 48)
    assert torch.equal(loaded(images), model(images))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@given(
    labels=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=4, unique=True
    ),
    data=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    mean=st.floats(-3, 3),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_words_survive(labels: list[str], data: str | None, mean: float, tmp_path: Path) -> None:
    model = create_model(NAME, num_classes=len(labels), depth=3, dim=16, heads=1, stem_chs=8)
    info = replace(
        INFO,
        model_args={"depth": 3, "dim": 16, "heads": 1, "stem_chs": 8},
        labels=tuple(labels),
        data=data,
        preprocess=Preprocess(size=(32, 32), mean=(mean,) * 3),
    )
    save_model(tmp_path / "any.safetensors", model, info)
    assert load_model(tmp_path / "any.safetensors")[1] == info


def test_a_timm_model_with_arguments_and_channels(tmp_path: Path) -> None:
    arguments = {"img_size": [32, 64], "in_chans": 1, "patch_size": 8, "depth": 2}
    model = create_model("vit_tiny_patch16_224", num_classes=2, **arguments).eval()
    info = ModelInfo(
        architecture="vit_tiny_patch16_224", model_args=arguments, labels=("a", "b"), preprocess=preprocess_of(model)
    )
    save_model(tmp_path / "m.safetensors", model, info)
    loaded, seen = load_model(tmp_path / "m.safetensors")
    images = torch.rand(1, 1, 32, 64)
    assert torch.equal(loaded(images), model(images))
    assert seen == info


@pytest.mark.parametrize("form", [{"memory_format": torch.channels_last}, {"dtype": torch.bfloat16}], ids=str)
def test_weights_in_another_form(model: nn.Module, form: dict, tmp_path: Path) -> None:
    shaped = deepcopy(model).to(**form)
    save_model(tmp_path / "m.safetensors", shaped, INFO)
    loaded, _ = load_model(tmp_path / "m.safetensors")
    for key, value in shaped.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.to(loaded.state_dict()[key].dtype)), key


def test_a_compiled_model_is_saved_under_its_own_names(model: nn.Module, tmp_path: Path) -> None:
    save_model(tmp_path / "m.safetensors", torch.compile(model), INFO)
    assert load_model(tmp_path / "m.safetensors")[1] == INFO


def test_others_may_read_the_file(saved: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert saved.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_disk_that_takes_no_more_leaves_the_earlier_file(model: nn.Module, saved: Path) -> None:
    """A limit on the size of files stands for the full disk: the write breaks off half-way."""
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(ModelFileError, match=r"cannot write .*\(File too large\); .* is intact"):
            save_model(saved, model, INFO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_folder_that_is_missing_is_said(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot write"):
        save_model(tmp_path / "nowhere" / "m.safetensors", model, INFO)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.01, 0.5, 0.999])
def test_a_truncated_file(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelFileError, match=r"not a complete \.safetensors file") as error:
        load_model(saved)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_model(tmp_path: Path) -> None:
    page = tmp_path / "model.safetensors"
    page.write_text("<!DOCTYPE html><html><body>404</body></html>" * 100)
    with pytest.raises(ModelFileError, match="another kind of file"):
        load_model(page)


def test_weights_without_a_description(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ModelFileError, match=r"without chiasm's description.*chiasm train DATA --model NAME --weights"):
        load_model(tmp_path / "bare.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2, this chiasm reads up to 1"),
        ({"format": "x"}, "damaged"),
        ({"labels": None}, r"damaged \(KeyError: 'labels'\)"),
        ({"labels": 5}, "damaged"),
        ({"labels": ["one"]}, r"has shape \(3, .* and 3 more"),
        ({"preprocess": {"size": [1]}}, "damaged"),
        ({"preprocess": {"size": [32, 32], "interpolation": "magic"}}, "damaged"),
        ({"model_args": [1]}, "damaged"),
        ({"architecture": "conformer_nano_patch4_33"}, "not known to this chiasm .* conformer_nano_patch4_32"),
        ({"architecture": "conformer_nano_patch16_128"}, "not those of conformer_nano_patch16_128: "),
        ({"model_args": {"coupling": "sideways"}}, r"cannot be built with .*sideways"),
        ({"model_args": {"no_such_option": 1}}, "cannot be built with .*no_such_option"),
        ({"model_args": {"coupling": "none"}}, "not those of .* is not a weight of it"),
        ({"model_args": {"coupling": "both"}}, "not those of .* is missing"),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "asks for checkpoint_path"),
    ],
    ids=str,
)
def test_descriptions_that_cannot_be_right(saved: Path, changes: dict, message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as error:
        load_model(_rewrite(saved, **changes))
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


def test_description_that_is_not_json(saved: Path) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(saved), saved, metadata={METADATA_KEY: "{"})
    with pytest.raises(ModelFileError, match="damaged"):
        load_model(saved)


def test_unused_words_of_later_versions_are_passed_over(saved: Path) -> None:
    assert load_model(_rewrite(saved, note="added later"))[1] == INFO


# ------------------------------------------------------------------------------------------------------------- resolve


def test_resolve_a_file_and_a_run_folder(saved: Path) -> None:
    for ref in (saved, str(saved), saved.parent, f"{saved.parent}/"):
        assert resolve_model(ref)[1] == INFO


def test_resolve_an_architecture() -> None:
    model, info = resolve_model(NAME, num_classes=4, in_chans=None, coupling="none")
    assert not info.trained
    assert info.labels == ("class 0", "class 1", "class 2", "class 3")
    assert info.model_args == {"coupling": "none"}
    assert info.preprocess == preprocess_of(model)
    assert not model.training


def test_resolve_an_architecture_with_a_tag_in_its_name() -> None:
    assert resolve_model("resnet18.a1_in1k")[1].labels[999] == "class 999"


def test_a_folder_called_like_an_architecture_is_the_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model(NAME)[1].architecture == NAME


@pytest.mark.parametrize(
    ("make", "ref", "message"),
    [
        (None, "runs/none", "no such file or folder"),
        (None, "missing.safetensors", "no such file or folder"),
        (None, "missing.ckpt", "no such file or folder"),
        ("photos/a.txt", "photos", "expected a run folder"),
        ("runs/1/config.yaml", "runs/1", "chiasm train --resume runs/1"),
        ("weights.pth", "weights.pth", "--weights weights.pth"),
        ("runs/1/checkpoints/last.ckpt", "runs/1/checkpoints/last.ckpt", "a checkpoint of weights alone"),
        ("model.onnx", "model.onnx", "not a complete .safetensors file"),
    ],
)
def test_paths_that_are_no_model(
    make: str | None, ref: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if make:
        Path(make).parent.mkdir(parents=True, exist_ok=True)
        Path(make).write_text("x")
    with pytest.raises(ModelFileError, match=message) as error:
        resolve_model(ref)
    assert ref in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_a_run_points_to_its_model_file(saved: Path) -> None:
    checkpoint = saved.parent / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_text("x")
    with pytest.raises(ModelFileError, match=f"give its run folder instead: {saved.parent}$"):
        resolve_model(checkpoint)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=NAME):
        resolve_model("conformer_nano_patch4_31")


def test_arguments_beside_a_file_are_refused(saved: Path) -> None:
    with pytest.raises(ChiasmError, match="carries its own in_chans"):
        resolve_model(saved, in_chans=1)


def test_arguments_that_an_architecture_does_not_take() -> None:
    with pytest.raises(ChiasmError, match=r"cannot be built with .*no_such"):
        resolve_model("resnet18", no_such=1)


# ---------------------------------------------------------------------------------------------------------- preprocess


def test_preprocess_is_the_models_own() -> None:
    assert preprocess_of(create_model("mobilevit_xxs")) == Preprocess(
        size=(256, 256), crop=0.9, interpolation="bicubic", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    assert preprocess_of(create_model(NAME), 40).size == (40, 40)
    assert preprocess_of(create_model(NAME), (40, 56)).size == (40, 56)
    assert preprocess_of(nn.Conv2d(3, 3, 1)) == Preprocess(size=(224, 224))


@pytest.mark.parametrize("channels", [1, 4])
def test_preprocess_has_a_mean_per_channel(channels: int) -> None:
    preprocess = preprocess_of(create_model(NAME, in_chans=channels))
    assert preprocess.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3] * channels)
    assert len(preprocess.std) == channels
