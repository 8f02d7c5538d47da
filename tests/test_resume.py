"""A run that was killed ends in the weights of the run that was not, bit for bit; with real processes and signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import chiasm
from chiasm.engine.checkpoints import read_checkpoint
from chiasm.errors import ChiasmError, DataError

# All that has a state or draws random numbers is on: average, mixing, drop path, accumulation, momentum, clipping.
FLAGS = [
    "scenes:size=32,count=48,val=16,textures=2,arrangements=2",
    *("--model", "conformer_nano_patch8_64", "--image-size", "32"),
    *("--model-args", "{dim: 32, heads: 2, depth: 3, stem_chs: 8, channel_ratio: 2}"),
    *("--epochs", "3", "--batch-size", "4", "--accumulate", "2", "--ema", "0.9", "--drop-path", "0.2"),
    *("--accelerator", "cpu", "--rand-augment", "5"),
]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "chiasm", "train", *words]


def start(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, process_group=0
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out + err


def wait_for_progress(process: subprocess.Popen[str], run: Path, updates: int) -> None:
    """Until the newest checkpoint holds `updates` or more optimiser steps."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        path = run / "checkpoints" / "last.ckpt"
        if path.exists() and read_checkpoint(path)["chiasm"]["updates"] >= updates:
            return
        time.sleep(0.1)  # to look is work that the other process waits for
    raise AssertionError(f"no progress: {finish(process)}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run that nothing interrupted, and what it said."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, said = finish(start(*FLAGS, "--workers", "0", "--out", str(run)))
    assert code == 0, said
    return run, said


def assert_same_run(run: Path, reference: Path) -> None:
    """The same weights, average, optimiser state and rows of metrics.csv; only times differ."""
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (read_checkpoint(path / "checkpoints" / name) for path in (run, reference))
        for key in ("state_dict", "optimizer_states"):
            assert _differences(ours[key], theirs[key], key) == []
        for key in ("epoch", "batch", "updates", "images", "best_score", "best_epoch", "stale", "finished"):
            assert ours["chiasm"][key] == theirs["chiasm"][key], key
    assert (run / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    rows = [
        [line.rsplit(",", 1)[0] for line in (path / "metrics.csv").read_text().splitlines()]
        for path in (run, reference)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 1 + 3


def _differences(ours: Any, theirs: Any, where: str) -> list[str]:
    if isinstance(ours, torch.Tensor):
        return [] if torch.equal(ours, theirs) else [where]
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return [found for key in ours for found in _differences(ours[key], theirs[key], f"{where}.{key}")]
    if isinstance(ours, (list, tuple)):
        pairs = zip(ours, theirs, strict=True)
        return [found for i, pair in enumerate(pairs) for found in _differences(*pair, f"{where}.{i}")]
    return [] if ours == theirs else [where]


@pytest.mark.parametrize(
    ("workers", "signals"),
    [(0, [(2, signal.SIGKILL), (8, signal.SIGTERM)]), (1, [(9, signal.SIGINT)])],
    ids=["kill -9, then SIGTERM", "Ctrl-C, with a worker"],
)
def test_stopped_and_resumed(
    whole: tuple[Path, str], tmp_path: Path, workers: int, signals: list[tuple[int, signal.Signals]]
) -> None:
    """The signals go to the whole group of processes, as a terminal sends them, at no particular moment of a step."""
    run = tmp_path / "run"
    words = [*FLAGS, "--workers", str(workers), "--checkpoint-minutes", "0", "--out", str(run)]
    for updates, number in signals:
        process = start(*words)
        wait_for_progress(process, run, updates)
        os.killpg(process.pid, number)
        status, said = finish(process)
        if number is signal.SIGKILL:
            assert status == -number
            (run / "checkpoints" / ".last.ckpt.part").write_bytes(b"half a checkpoint")  # killed while writing
        else:
            assert status == 128 + number, said
            assert "Traceback" not in said
            assert f"chiasm train --resume {run}" in said.splitlines()[-1]
        assert not (run / "summary.json").exists()
        words = ["--resume", str(run)]
    chiasm.train(resume=str(run))
    assert_same_run(run, whole[0])
    assert not list(run.rglob(".*.part"))


def test_killed_before_the_first_checkpoint(whole: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*FLAGS, "--workers", "0", "--out", str(run))
    while not (run / "config.yaml").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    finish(process)
    assert not (run / "checkpoints" / "last.ckpt").exists()
    chiasm.train(resume=str(run))
    assert_same_run(run, whole[0])


def test_what_is_said_off_a_terminal(whole: tuple[Path, str]) -> None:
    """One line to begin with, one per epoch, no control characters, no advertisement, no advice from below."""
    said = whole[1]
    lines = said.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == ["1/3", "2/3", "3/3"]
    assert re.search(
        r"^conformer_nano_patch8_64 \(0\.\dM parameters, 32x32 px\) on scenes: 48 training", said, re.MULTILINE
    )
    assert re.search(r"^best val top-1 \d+\.\d% \(epoch \d of 3\)$", said, re.MULTILINE)
    assert len(lines) <= 9, said
    assert "\x1b" not in said
    assert not re.search(r"warn|tip:|lightning|GPU available", said, re.IGNORECASE), said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr": 0.5}, "lr is 0.001 in this run and cannot become 0.5"),
        ({"epochs": 9}, "epochs is 3 .* laid out over the whole run"),
        ({"batch_size": 8}, "batch_size is 4"),
        ({"model": "test_vit"}, "model is conformer_nano"),
        ({"seed": 1}, "seed is 0"),
        ({"epoch": 9}, "did you mean epochs"),
    ],
)
def test_resume_refuses_what_would_change_the_result(
    whole: tuple[Path, str], flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ChiasmError, match=message):
        chiasm.train(resume=str(whole[0]), **flags)


def test_a_finished_run_is_left_as_it_is(whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """With settings that change nothing, or are the same, which resume accepts."""
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}
    result = chiasm.train(resume=str(whole[0]), workers=3, loggers=[], checkpoint_minutes=1, lr=1e-3)
    assert result.epochs == 3
    assert "is finished: 3 epochs, nothing left to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")} == before


def test_resume_refuses_other_images(tmp_path: Path) -> None:
    """The folder has one image more than when the run began."""
    from PIL import Image

    for label in "ab":
        for split, count in (("train", 4), ("val", 2)):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (number * 9, 0, 0)).save(tmp_path / "data" / split / label / f"{number}.png")
    flags: dict[str, Any] = {"model": "test_vit", "image_size": 32, "batch_size": 4, "workers": 0, "loggers": []}
    run = tmp_path / "run"
    chiasm.train(data=str(tmp_path / "data"), out=str(run), recipe="quick", epochs=1, **flags)
    (run / "summary.json").unlink()  # as after a kill just before the end
    assert chiasm.train(resume=str(run)).epochs == 1
    (run / "summary.json").unlink()
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "train" / "a" / "9.png")
    with pytest.raises(DataError, match="not the images this run was started on"):
        chiasm.train(resume=str(run))


def test_two_processes_train_together(tmp_path: Path) -> None:
    """Gloo on the CPU: the same steps as one process with twice the batch, every image validated once."""
    run = tmp_path / "run"
    flags = [*FLAGS, "--workers", "0", "--devices", "2", "--out", str(run)]
    flags[flags.index("--epochs") + 1] = "1"
    status, said = finish(start(*flags))
    assert status == 0, said
    assert [line.split()[1] for line in said.splitlines() if line.startswith("epoch ")] == ["1/1"]
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")["chiasm"]
    assert (state["world_size"], state["updates"], state["images"]) == (2, 3, 24)
    assert (state["history"][0]["val_top1"] * 16) % 1 == 0
    assert (run / "summary.json").exists()
