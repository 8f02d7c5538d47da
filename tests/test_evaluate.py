"""`chiasm evaluate` on a model whose answers are known: numbers, classes by name, splits, report, bad images."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import chiasm
from chiasm.cli import main
from chiasm.data import open_data
from chiasm.data.images import read_image
from chiasm.data.transforms import eval_transform
from chiasm.errors import ChiasmError, DataError
from chiasm.model_file import ModelInfo, load_model, preprocess_of, save_model

NANO = "conformer_nano_patch4_32"
LABELS = ("red", "green", "blue")
HUES = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 230)}


def _paint(path: Path, hue: str, seed: int) -> None:
    """A noisy image of one colour."""
    noise = np.random.default_rng(seed).integers(-25, 26, (32, 32, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(HUES[hue]) + noise, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Conformer that tells three colours apart: its heads are solved for by least squares, with no training loop."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = chiasm.create_model(NANO, num_classes=0).eval()
    preprocess = preprocess_of(model)
    transform, images, targets = eval_transform(preprocess), [], []
    for i in range(45):
        _paint(folder / "one.png", LABELS[i % 3], 1000 + i)
        images.append(transform(read_image(folder / "one.png")))
        targets.append(i % 3)
    whole = chiasm.create_model(NANO, num_classes=len(LABELS)).eval()
    whole.load_state_dict({**whole.state_dict(), **model.state_dict()})
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        head.register_forward_hook(lambda module, args, output, name=name: inputs.__setitem__(name, args[0].detach()))
        for name, head in whole.heads.items()
    ]
    with torch.no_grad():
        whole.forward_branches(torch.stack(images))
        for hook in hooks:
            hook.remove()
        wanted = 6.0 * torch.nn.functional.one_hot(torch.tensor(targets), 3).double()
        for name, head in whole.heads.items():
            design = torch.cat([inputs[name].double(), torch.ones(len(images), 1, dtype=torch.float64)], 1)
            solution = torch.linalg.pinv(design, rtol=1e-6) @ wanted
            head.weight.copy_(solution[:-1].T)
            head.bias.copy_(solution[-1])
    path = folder / "colours.safetensors"
    save_model(path, whole, ModelInfo(architecture=NANO, labels=LABELS, preprocess=preprocess, data=None))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Val images in folders that sort otherwise than the model's labels; two of the twelve lie in the wrong folder."""
    root = tmp_path / "photos"
    for hue in LABELS:
        _paint(root / "train" / hue / "t.png", hue, 7)
        for i in range(4):
            _paint(root / "val" / hue / f"{i}.png", hue, i)
    _paint(root / "val" / "green" / "0.png", "red", 50)
    _paint(root / "val" / "blue" / "3.png", "red", 51)
    return root


def _evaluate(model: Path | str, data: Path | str | None, out: Path, **flags: object):
    return chiasm.evaluate(model=str(model), data=data and str(data), out=str(out), device="cpu", workers=0, **flags)


def test_known_answers(model_file: Path, photos: Path, tmp_path: Path) -> None:
    result = _evaluate(model_file, photos, tmp_path / "out")
    scores = result.scores
    assert (scores.top1.right, scores.top1.count, scores.k) == (10, 12, 2)
    assert scores.labels == LABELS
    assert scores.confusion == ((4, 0, 0), (1, 3, 0), (1, 0, 3)), "classes are matched by name, in the model's order"
    assert {Path(case.source).parent.name + Path(case.source).name for case in result.measured.mistakes} == {
        "green0.png",
        "blue3.png",
    }
    assert all((case.predicted, case.true != "red") == ("red", True) for case in result.measured.mistakes)
    confident = [case.probability for case in result.measured.mistakes]
    assert confident == sorted(confident, reverse=True)
    assert [branch.name for branch in scores.branches] == ["conv", "tokens"]
    assert scores.agreement is not None
    assert scores.agreement.share.count == 12
    assert len(result.measured.disagreements) == scores.agreement.when_not.count


def test_it_says_what_predict_says(model_file: Path, photos: Path, tmp_path: Path) -> None:
    result = _evaluate(model_file, photos, tmp_path / "out", batch_size=5)
    paths = sorted(str(path) for path in (photos / "val").rglob("*.png"))
    right = sum(r.label == Path(r.source).parent.name for r in chiasm.load(model_file, device="cpu")(paths))
    assert result.scores.top1.right == right


def test_the_files_that_are_written(model_file: Path, photos: Path, tmp_path: Path) -> None:
    result = _evaluate(model_file, photos, tmp_path / "out")
    numbers = json.loads(result.metrics.read_text(encoding="utf-8"))
    assert numbers == json.loads(json.dumps(result.to_dict()))
    assert numbers["top1"]["value"] == pytest.approx(10 / 12)
    assert numbers["top2"]["count"] == 12
    assert set(numbers["agreement"]["right_where_they_disagree"]) == {"conv", "tokens", "none"}
    page = result.report.read_text(encoding="utf-8")
    for said in ("83.3%", "10 of 12 images", "conv alone", "The most confident mistakes", "green/0.png"):
        assert said in page, said
    assert page.count("data:image/jpeg;base64,") == len(result.measured.mistakes) + len(result.measured.disagreements)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "the page asks for something from outside"
    assert "How it was trained" not in page


def test_broken_images_are_listed_and_change_the_exit_code(
    model_file: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "val" / "red" / "1.png").write_bytes(b"")
    out = tmp_path / "out"
    assert (
        main(["evaluate", str(model_file), str(photos), "--out", str(out), "--format", "json", "--workers", "0"]) == 1
    )
    told = capsys.readouterr()
    assert "1 of 12 images could not be read" in told.err
    numbers = json.loads(told.out)
    assert numbers["images"] == 11
    assert numbers["unreadable"][0]["path"].endswith("1.png")
    assert "0 bytes" in numbers["unreadable"][0]["reason"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Images left out" in page
    assert numbers["unreadable"][0]["path"] in page


def test_no_readable_image_is_an_error(model_file: Path, photos: Path, tmp_path: Path) -> None:
    for path in (photos / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the 12 images can be read; the first: .*text starting with"):
        _evaluate(model_file, photos, tmp_path / "out")


def test_the_table(model_file: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["evaluate", str(model_file), str(photos), "--out", str(out), "--workers", "0"]) == 0
    told = capsys.readouterr().out
    for said in (
        "83.3%",
        "conv branch alone",
        "tokens branch alone",
        "branches agree on",
        "red",
        str(out / "report.html"),
    ):
        assert said in told, said


# -------------------------------------------------------------------------------------------------------------- classes


def test_a_class_that_the_model_has_not(model_file: Path, photos: Path, tmp_path: Path) -> None:
    _paint(photos / "val" / "gren" / "1.png", "green", 1)
    with pytest.raises(DataError, match=r"class 'gren' is unknown to the model \(nearest: green.*red, green, blue"):
        _evaluate(model_file, photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_without_images_is_noted(model_file: Path, photos: Path, tmp_path: Path) -> None:
    for path in (photos / "val" / "blue").iterdir():
        path.unlink()
    result = _evaluate(model_file, photos, tmp_path / "out")
    assert [note for note in result.notes if "1 of the model's 3 classes: blue" in note]
    blue = result.scores.classes[LABELS.index("blue")]
    assert (blue.count, blue.recall) == (0, None)
    assert result.scores.balanced_accuracy == pytest.approx((1 + 3 / 4) / 2)


def test_random_weights_work_and_say_so(tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = _evaluate("test_resnet", photos, tmp_path / "out", image_size=32)
    assert result.trained is False
    assert set(result.scores.labels) == set(LABELS)
    assert (result.scores.branches, result.measured.disagreements) == ((), ())
    assert [record for record in caplog.records if "random" in record.message]
    assert "The weights are random" in result.report.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------- data


def _run(tmp_path: Path, model_file: Path, data: str, **settings: object) -> Path:
    """A run folder as training leaves it."""
    run = tmp_path / "run"
    run.mkdir()
    model, info = load_model(model_file)
    kept = open_data(data, **settings).fingerprint()
    save_model(run / "model.safetensors", model, replace(info, data=data, fingerprint=kept, **settings))
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data, **settings}))
    lines = ["epoch,train_loss,val_loss,val_top1,val_top1_conv", "1,1.5,1.4,0.5,0.4", "2,1.0,1.1,0.7,0.6"]
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    return run


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """One folder per class, ten images each, no val split."""
    for hue in LABELS:
        for i in range(10):
            _paint(tmp_path / "flat" / hue / f"{i}.png", hue, i)
    return tmp_path / "flat"


def _measured(result: object) -> int:
    return result.scores.top1.count  # type: ignore[attr-defined]


def test_a_run_is_measured_on_its_own_split(tmp_path: Path, model_file: Path, flat: Path) -> None:
    run = _run(tmp_path, model_file, str(flat), seed=5, val_fraction=0.4)
    out = tmp_path / "out"
    assert _measured(_evaluate(run, None, out)) == 12
    assert _measured(_evaluate(run, flat, out)) == 12, "the same data, so the same split"
    assert _measured(_evaluate(run / "model.safetensors", None, out)) == 12
    assert _measured(_evaluate(run, None, out, val_fraction=0.1)) == 3, "what is given wins"
    assert "seed 5" in _evaluate(run, None, out).notes[-1]
    assert "not with these" in _evaluate(run, None, out, seed=6).notes[-1]
    assert _measured(_evaluate(run, None, out, split="all")) == 30
    assert _measured(_evaluate(run, None, out, split="train")) == 18
    assert "how well it remembers" in _evaluate(run, None, out, split="train").notes[-1]


def test_model_and_images_that_have_moved_are_measured_on_the_same_split(
    tmp_path: Path, model_file: Path, flat: Path
) -> None:
    run = _run(tmp_path, model_file, str(flat), seed=5, val_fraction=0.4)
    expected = _evaluate(run, None, tmp_path / "out")
    moved = (run / "model.safetensors").rename(tmp_path / "moved.safetensors")
    result = _evaluate(moved, flat.rename(tmp_path / "elsewhere"), tmp_path / "out")
    names = [Path(case.source).name for case in result.measured.mistakes]
    assert names == [Path(case.source).name for case in expected.measured.mistakes]
    assert _measured(result) == 12
    assert len(result.notes) == 1
    assert "seed 5" in result.notes[0]


def test_it_is_said_when_training_images_may_be_measured(tmp_path: Path, model_file: Path, flat: Path) -> None:
    run = _run(tmp_path, model_file, str(flat), seed=5, val_fraction=0.4)
    (flat / LABELS[0] / "0.png").rename(flat / LABELS[0] / "another.png")
    assert "renamed since training" in _evaluate(run, None, tmp_path / "out").notes[-1]
    model, info = load_model(run / "model.safetensors")
    save_model(run / "model.safetensors", model, replace(info, seed=None, val_fraction=None, fingerprint=None))
    assert "does not say which images" in _evaluate(run, None, tmp_path / "out").notes[-1]


def test_a_run_keeps_its_evaluation_and_shows_its_curves(tmp_path: Path, model_file: Path, flat: Path) -> None:
    run = _run(tmp_path, model_file, str(flat))
    result = chiasm.evaluate(model=str(run), workers=0, device="cpu")
    assert result.report == run / "evaluation" / "report.html"
    page = result.report.read_text(encoding="utf-8")
    assert "How it was trained" in page
    assert "best 70.0%, epoch 2" in page
    (run / "metrics.csv").write_text("epoch,train_loss\n1,oops\n")
    assert "How it was trained" not in chiasm.evaluate(model=str(run), workers=0).report.read_text(encoding="utf-8")


def test_data_must_be_known(tmp_path: Path, model_file: Path) -> None:
    with pytest.raises(ChiasmError, match="does not say what it was trained on"):
        _evaluate(model_file, None, tmp_path / "out")


def test_an_unknown_split_is_told(tmp_path: Path, model_file: Path, photos: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'vall'.*val"):
        _evaluate(model_file, photos, tmp_path / "out", split="vall")


def test_a_report_that_cannot_be_written(model_file: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ChiasmError, match=r"metrics\.json: cannot be written"):
        _evaluate(model_file, photos, tmp_path / "out")
