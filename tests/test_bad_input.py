"""Bad input is normal input: each row is one clear line on stderr and a non-zero exit, never a traceback.

The odd images themselves have a table of their own in test_bad_images.py; a full disk, a loss that is not a number and
interrupted runs are in test_train.py and test_resume.py, checkpoints and model files of every wrong kind in
test_checkpoints.py and test_model_file.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import chiasm
from chiasm.cli import main
from chiasm.model_file import ModelInfo, preprocess_of, save_model

NANO = "conformer_nano_patch4_32"


def _folder(root: Path, classes: dict[str, int], split: str = "") -> str:
    for name, count in classes.items():
        folder = root / "photos" / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 32), (40 * i % 256, 90, 20)).save(folder / f"image {i} ü.png")
    return str(root / "photos")


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def _weights(root: Path, name: str, num_classes: int = 7) -> str:
    path = root / "weights.pth"
    torch.save({"model": chiasm.create_model(name, num_classes=num_classes).state_dict()}, path)
    return str(path)


def _cut(root: Path, share: float) -> str:
    content = Path(_weights(root, "swin_nano_window4_128")).read_bytes()
    return _write(root / "cut.pth", content[: int(share * len(content))])


def _model_file(root: Path) -> str:
    model = chiasm.create_model(NANO, num_classes=2)
    info = ModelInfo(architecture=NANO, labels=("cat", "dog"), preprocess=preprocess_of(model))
    save_model(root / "pets.safetensors", model, info)
    return str(root / "pets.safetensors")


class _Payload:
    """Unpickling this would leave a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def _hostile(root: Path, protocol: int = 2) -> str:
    with open(root / "hostile.pth", "wb") as file:
        pickle.dump({"model": _Payload(root / "executed")}, file, protocol=protocol)
    return str(root / "hostile.pth")


def _broken(photos: str) -> str:
    for path in Path(photos).rglob("*.png"):
        path.write_bytes(b"")
    return photos


def _broken_val(photos: str) -> str:
    _broken(_folder(Path(photos).parent, {"cat": 2, "dog": 2}, "val") + "/val")
    return photos


def _run(root: Path) -> Path:
    """A folder that looks like a run."""
    (root / "run-1").mkdir()
    _write(root / "run-1" / "config.yaml", b"data: scenes\n")
    return root / "run-1"


TRAIN = ["--model", NANO, "--epochs", "1", "--workers", "0"]
SCENES = "scenes:size=32,count=32,val=16"

# what is wrong -> (the command's words, made in a fresh folder; what its one line must say)
TABLE: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "unknown verb": (lambda tmp: ["trian"], ["trian", "did you mean train"]),
    "unknown option": (lambda tmp: ["train", "scenes", "--epoch", "3"], ["--epoch", "--epochs"]),
    "option of the wrong type": (lambda tmp: ["train", "scenes", "--epochs", "many"], ["--epochs", "int", "many"]),
    "unknown choice": (lambda tmp: ["train", "scenes", "--recipe", "fintune"], ["fintune", "finetune"]),
    "nothing to train on": (lambda tmp: ["train"], ["what to train on"]),
    "settings are missing": (lambda tmp: ["train", "--config", str(tmp / "no.yaml")], ["no.yaml", "No such file"]),
    "settings are not YAML": (
        lambda tmp: ["train", "--config", _write(tmp / "a.yaml", b"a: [1\nb: {")],
        ["a.yaml", "not YAML"],
    ),
    "settings have an unknown key": (
        lambda tmp: ["train", "scenes", "--config", _write(tmp / "a.yaml", b"epoch: 3")],
        ["a.yaml", "epoch", "epochs"],
    ),
    "settings have a wrong type": (
        lambda tmp: ["train", "scenes", "--config", _write(tmp / "a.yaml", b"epochs: many")],
        ["a.yaml", "epochs", "many"],
    ),
    "data path is missing": (lambda tmp: ["train", str(tmp / "nowhere"), *TRAIN], ["nowhere"]),
    "data name is misspelt": (lambda tmp: ["train", "scense", *TRAIN], ["scense", "scenes"]),
    "folder without images": (
        lambda tmp: ["train", str(tmp), *TRAIN],
        ["ordner mit ümlaut: saw nothing", "one sub-folder of images per class"],
    ),
    "data behind an option that takes it": (
        lambda tmp: ["train", "--freeze", "stem", "x/"],
        ["--freeze", "put it last"],
    ),
    "an image behind an option": (
        lambda tmp: ["predict", NANO, "a.png", "--top", "2", "b.png"],
        ["'b.png' is out of place", "before the options"],
    ),
    "no training image can be read": (
        lambda tmp: ["train", _broken(_folder(tmp, {"cat": 64, "dog": 64})), *TRAIN[:-1], "1", "--no-cache"],
        ["none of the 102 training images can be read", "0 bytes"],
    ),
    "no val image can be read": (
        lambda tmp: ["train", _broken_val(_folder(tmp, {"cat": 8, "dog": 8}, "train")), *TRAIN, "--batch-size", "8"],
        ["none of the val images can be read"],
    ),
    "one class": (lambda tmp: ["train", _folder(tmp, {"cat": 4}), *TRAIN], ["class", "cat"]),
    "empty class folder": (lambda tmp: ["train", _folder(tmp, {"cat": 4, "dog": 0}), *TRAIN], ["dog"]),
    "unknown model": (
        lambda tmp: ["train", "scenes:size=32,count=32,val=16", "--model", "conformer_nano_patch4_23"],
        ["conformer_nano_patch4_23", NANO],
    ),
    "unknown model argument": (
        lambda tmp: ["train", "scenes:size=32,count=32,val=16", *TRAIN, "--model-args", "{couplng: none}"],
        ["couplng"],
    ),
    "unknown model option": (
        lambda tmp: ["train", "scenes:size=32,count=32,val=16", *TRAIN, "--model-args", "{coupling: non}"],
        ["non", "none"],
    ),
    "image smaller than a patch": (
        lambda tmp: ["train", "scenes:size=32,count=32,val=16", *TRAIN, "--image-size", "2"],
        ["2", "4 px"],
    ),
    "weights of another model": (
        lambda tmp: ["train", "scenes:size=32,count=32,val=16", *TRAIN, "--weights", _weights(tmp, "test_resnet")],
        ["weights.pth"],
    ),
    "weights that run code": (
        lambda tmp: ["train", "scenes:size=32,count=32,val=16", *TRAIN, "--weights", _hostile(tmp)],
        ["hostile.pth"],
    ),
    "weights are missing": (
        lambda tmp: ["train", "scenes:size=32,count=32,val=16", *TRAIN, "--weights", str(tmp / "no.pth")],
        ["no.pth"],
    ),
    "weights of another size name the right one": (
        lambda tmp: ["train", SCENES, *TRAIN, "--weights", _weights(tmp, "conformer_nano_patch16_128")],
        ["weights.pth", "has shape", "It fits conformer_nano_patch16_128"],
    ),
    "weights of another family name the right one": (
        lambda tmp: ["train", SCENES, *TRAIN, "--weights", _weights(tmp, "swin_nano_window4_128")],
        ["weights.pth", "It fits swin_nano_window4_128"],
    ),
    "window that is none": (
        lambda tmp: ["describe", "swin_nano_window4_128", "--model-args", "{window_size: 1}"],
        ["window_size 1", "such as 7"],
    ),
    "published weights without a network": (
        lambda tmp: ["train", SCENES, "--model", "swin_tiny_window7_224", "--pretrained", "--image-size", "64"],
        ["swin_tiny_window7_224", "cannot be fetched from https://", "--weights FILE"],
    ),
    "nothing published": (
        lambda tmp: ["train", SCENES, *TRAIN, "--pretrained"],
        ["no weights are published for " + NANO],
    ),
    "identify what is missing": (lambda tmp: ["weights", str(tmp / "no.pth")], ["no.pth", "no such file"]),
    "identify what is cut": (lambda tmp: ["weights", _cut(tmp, 0.5)], ["cut.pth", "not a complete checkpoint"]),
    "identify what runs code": (
        lambda tmp: ["weights", _hostile(tmp)],
        ["hostile.pth", "code from files is never run"],
    ),
    "identify what runs code, newer": (
        lambda tmp: ["weights", _hostile(tmp, protocol=5)],
        ["hostile.pth", "a pickle of a newer protocol", "code from files is never run"],
    ),
    "identify a page": (
        lambda tmp: ["weights", _write(tmp / "w.pth", b"<!doctype html>" * 9)],
        ["w.pth", "a web page"],
    ),
    "identify an unknown network": (
        lambda tmp: ["weights", _weights(tmp, "test_resnet")],
        ["weights.pth", "fit no architecture", "--model NAME"],
    ),
    "convert without a classifier": (
        lambda tmp: ["weights", _weights(tmp, NANO, num_classes=0), "--out", "x.safetensors"],
        ["lacks a classifier", "chiasm train DATA --model conformer_nano_patch"],
    ),
    "resume what is no run": (lambda tmp: ["train", "--resume", str(tmp)], ["ordner mit ümlaut", "not a run folder"]),
    "out is a file": (
        lambda tmp: ["train", "scenes:size=32,count=32,val=16", *TRAIN, "--out", _write(tmp / "taken", b"")],
        ["taken"],
    ),
    "out holds another run": (
        lambda tmp: ["train", "scenes:size=32,count=32,val=16", *TRAIN, "--out", str(_run(tmp))],
        ["run-1", "holds something already", "--resume"],
    ),
    "model file is missing": (lambda tmp: ["predict", str(tmp / "no.safetensors"), "x.png"], ["no.safetensors"]),
    "model file is cut": (
        lambda tmp: ["predict", _write(tmp / "cut.safetensors", b"\x80\x00\x00"), "x.png"],
        ["cut.safetensors"],
    ),
    "model file is a text": (
        lambda tmp: ["predict", _write(tmp / "page.safetensors", b"<!doctype html>" * 99), "x.png"],
        ["page.safetensors"],
    ),
    "model file is a checkpoint": (lambda tmp: ["predict", _weights(tmp, NANO), "x.png"], ["weights.pth"]),
    "unknown architecture": (lambda tmp: ["describe", "conformer_tiny_patch16_242"], ["conformer_tiny_patch16_224"]),
    "no image there": (lambda tmp: ["predict", NANO, str(tmp / "none" / "*.png")], ["none"]),
    "folder of no images": (lambda tmp: ["predict", NANO, str(tmp)], ["ordner mit ümlaut", "no image files"]),
    "evaluate on other classes": (
        lambda tmp: [
            "evaluate",
            _model_file(tmp),
            _folder(tmp, {"cat": 2, "dgo": 2}, "val"),
            "--out",
            str(tmp / "out"),
        ],
        ["class 'dgo'", "nearest: dog"],
    ),
    "unknown split": (
        lambda tmp: ["evaluate", NANO, "scenes:size=32,count=9,val=9", "--split", "vall", "--out", str(tmp / "out")],
        ["vall", "val"],
    ),
    "check of a missing path": (lambda tmp: ["data", str(tmp / "nowhere")], ["nowhere"]),
    "describe too small an image": (lambda tmp: ["describe", NANO, "--image-size", "2"], ["4 px"]),
}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_is_one_clear_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = TABLE[case]
    home = tmp_path / "ordner mit ümlaut"
    home.mkdir()
    argv = words(home)
    monkeypatch.chdir(home)
    code = main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("chiasm: ")]
    assert code == 2, (code, lines)
    assert len(lines) == 1, lines
    assert not [text for text in expected if text not in lines[0]], lines[0]
    assert not (home / "executed").exists(), "code from the file was run"
