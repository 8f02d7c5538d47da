"""Training for boxes, masks and class maps: the task from the data, the run folder, and going on after a signal."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import chiasm
from chiasm.cli import main
from chiasm.config import TrainConfig
from chiasm.engine.checkpoints import read_checkpoint
from chiasm.errors import ChiasmError, DataError
from chiasm.model_file import load_model
from chiasm.tasks.validation import SCORES
from chiasm.verbs.train import show
from test_resume import finish, start, wait_for_progress

QUICK: dict[str, Any] = {
    "model": "test_convnext", "image_size": 64, "epochs": 1, "batch_size": 4, "workers": 0, "accelerator": "cpu",
    "loggers": [], "precision": "32",
}  # fmt: skip


def paint(root: Path, kind: str) -> str:
    """Ten images of bright rectangles on black, with boxes (YOLO), masks (COCO) or class maps."""
    images, annotations = [], []
    for number in range(10):
        split = "train" if number < 6 else "val"
        left, top = 4 * number, 2 * number
        pixels = np.zeros((48, 64, 3), dtype=np.uint8)
        pixels[top : top + 20, left : left + 24] = 255
        folder = root / (f"{split}/images" if kind == "segment" else f"images/{split}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        if kind == "segment":
            (root / split / "masks").mkdir(exist_ok=True)
            Image.fromarray(pixels[:, :, 0] // 255).save(root / split / "masks" / f"{number}.png")
        elif kind == "detect":
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            line = f"0 {(left + 12) / 64} {(top + 10) / 48} {24 / 64} {20 / 48}"
            (root / "labels" / split / f"{number}.txt").write_text(line)
        else:
            corners = [left, top, left + 24, top, left + 24, top + 20, left, top + 20]
            images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
            annotations.append(
                {"id": number, "image_id": number, "category_id": 1, "bbox": [left, top, 24, 20], "area": 480}
                | {"iscrowd": 0, "segmentation": [corners]}
            )
    (root / "classes.txt").write_text("background\nbox\n" if kind == "segment" else "box\n")
    for split, part in (("train", slice(6)), ("val", slice(6, 10))) if images else ():
        content = {"images": images[part], "annotations": annotations[part], "categories": [{"id": 1, "name": "box"}]}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return str(root)


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("detect", {"val_ap", "val_ap50"}),
        ("instances", {"val_mask_ap", "val_mask_ap50", "val_ap", "val_ap50"}),
        ("segment", {"val_loss", "val_miou", "val_pixel_accuracy"}),
    ],
)
def test_the_data_tells_the_task(
    task: str, columns: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = paint(tmp_path / "data", task)
    result = chiasm.train(data=data, out=str(tmp_path / "run"), **QUICK)
    run = Path(result.run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["task"], settings["lr"], settings["mixup"], settings["image_size"]) == (task, 3e-4, 0.0, 64)
    with (run / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {name for name in row if name.startswith("val_")} == columns
    assert result.metric == {"detect": "ap", "instances": "mask_ap", "segment": "miou"}[task]
    last = read_checkpoint(run / "checkpoints" / "last.ckpt")["chiasm"]
    assert result.score == float(row[f"val_{result.metric}"]) == last["best_score"]
    assert result.branches == {}
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["data"]["train_images"], summary["data"]["val_images"]) == (6, 4)
    assert summary["best"][f"val_{result.metric}"] == result.score
    assert Image.open(run / "curves.png").size[0] > 600
    assert load_model(result.model)[1].task == task
    said = capsys.readouterr().err
    assert f"val {SCORES[result.metric]} {result.score:.1%} (" in said
    assert show(result, TrainConfig(data=data)) == 0
    assert f"best val {SCORES[result.metric]} {result.score:.1%} (epoch 1 of 1)" in capsys.readouterr().out


def test_masks_may_train_a_detector_of_boxes(tmp_path: Path) -> None:
    data = paint(tmp_path / "data", "instances")
    result = chiasm.train(data=data, task="detect", out=str(tmp_path / "run"), **QUICK)
    assert result.metric == "ap"
    with pytest.raises(DataError, match="not annotated for --task segment; expected folders images and masks"):
        chiasm.train(data=data, task="segment", out=str(tmp_path / "other"), **QUICK)
    assert not (tmp_path / "other").exists()


def test_nothing_to_measure_is_told_before_training(tmp_path: Path) -> None:
    data = Path(paint(tmp_path / "data", "instances"))
    file = data / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(DataError, match="no val image has an object to be measured"):
        chiasm.train(data=str(data), out=str(tmp_path / "run"), **QUICK)
    file.write_text(json.dumps(content))
    with pytest.raises(ChiasmError, match="for the tasks segment alone, and this one is 'instances'"):
        chiasm.train(data=str(data), dice=3, out=str(tmp_path / "run"), **QUICK)
    assert not (tmp_path / "run").exists()


def test_a_broken_mask_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Path(paint(tmp_path / "data", "segment"))
    for broken in (data / "train" / "masks" / "2.png", data / "val" / "masks" / "7.png"):
        broken.write_bytes(broken.read_bytes()[:40])
    chiasm.train(data=str(data), out=str(tmp_path / "run"), **QUICK)
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "2.png: " in line and line.endswith("It is left out.")]) == 1
    assert len([line for line in said if "7.png: " in line and line.endswith("It is left out.")]) == 1


def test_stopped_and_resumed_a_segmenter_ends_in_the_same_weights(tmp_path: Path) -> None:
    words = ["scenes:size=32,count=24,val=4,textures=2,arrangements=2", "--task", "segment", "--model", "test_convnext"]
    words += ["--image-size", "64", "--epochs", "2", "--batch-size", "4", "--ema", "0.9", "--accelerator", "cpu"]
    assert main(["train", *words, "--workers", "0", "--out", str(tmp_path / "whole")]) == 0
    run = tmp_path / "run"
    process = start(*words, "--workers", "1", "--no-cache", "--checkpoint-minutes", "0", "--out", str(run))
    wait_for_progress(process, run, 3)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    assert status == 128 + signal.SIGTERM, said
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["chiasm"]["updates"] < 12
    chiasm.train(resume=str(run))
    ours, theirs = (read_checkpoint(path / "checkpoints" / "last.ckpt") for path in (run, tmp_path / "whole"))
    assert all(torch.equal(value, theirs["state_dict"][name]) for name, value in ours["state_dict"].items())
    assert ours["chiasm"]["best_score"] == theirs["chiasm"]["best_score"]
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
