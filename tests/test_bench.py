"""bench and what it measures with: interleaved rounds, ratios, noise, operations, memory; rows that fail; Ctrl-C."""

from __future__ import annotations

import json
import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from chiasm import measure
from chiasm.apart import Apart
from chiasm.cli import main
from chiasm.config import BenchConfig, Preprocess
from chiasm.data.machine import SPARE, can_keep_freed_memory
from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.measure import (
    MatrixProduct,
    Times,
    count_macs,
    filling_batch,
    interleaved,
    noise,
    peak_memory,
    ratio,
    timed,
)
from chiasm.model_file import ModelInfo, save_model
from chiasm.report.benchmark import HEADERS
from chiasm.verbs.bench import bench, show

CPU = torch.device("cpu")
TINY = ["timm:test_vit", "timm:test_resnet"]
# A residual network's last map is a single pixel at 32 px, of which a batch of one has no statistics to train on.
FORMS = ["eager", "kept"] if can_keep_freed_memory() else ["eager"]
FAST: dict[str, Any] = {"batch": ["1", "2"], "image_size": [32], "rounds": 2, "memory": False}


class _Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


# ----------------------------------------------------------------------------------------------------------------- time


def test_rounds_run_every_work_once_in_changing_order() -> None:
    clock, order = _Clock(), []

    def work(name: str, seconds: float) -> None:
        order.append(name)
        clock.spend(seconds)

    works = {name: partial(work, name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    rounds = interleaved({name: timed(one, clock=clock) for name, one in works.items()})
    found = [next(rounds) for _ in range(12)]
    assert all(one == {"a": 1.0, "b": 2.0, "c": 4.0} for one in found)
    orders = {tuple(order[i : i + 3]) for i in range(0, len(order), 3)}
    assert all(sorted(one) == ["a", "b", "c"] for one in orders)
    assert len(orders) > 2


def test_a_work_that_fails_is_left_out_of_later_rounds() -> None:
    calls = iter(range(10))

    def fails_later() -> None:
        if next(calls) == 1:
            raise RuntimeError("no more memory")

    rounds = interleaved({"good": timed(int), "bad": timed(fails_later)})
    first, second, third = (next(rounds) for _ in range(3))
    assert isinstance(first["bad"], float)
    assert str(second["bad"]) == "no more memory"
    assert set(third) == {"good"}
    (only,) = interleaved({"bad": timed(partial(int, "x"))})  # nothing is left: the rounds end
    assert isinstance(only["bad"], ValueError)


def test_a_ratio_is_that_of_medians_with_an_interval() -> None:
    rng = random.Random(0)
    fast = Times(tuple(rng.gauss(1.0, 0.05) for _ in range(40)))
    slow = Times(tuple(rng.gauss(1.3, 0.05) for _ in range(40)))
    value, low, high = ratio(slow, fast)
    assert value == slow.median / fast.median
    assert 1.2 < low < value < high < 1.4
    assert ratio(fast, fast) == (1.0, 1.0, 1.0)
    # What slows a whole round cancels.
    moods = [rng.choice([1, 10]) for _ in range(40)]
    both = [Times(tuple(s * mood for s, mood in zip(t.seconds, moods, strict=True))) for t in (slow, fast)]
    assert ratio(*both)[1] > 1.0
    few = Times((1.0, 1.0, 1.0))
    assert ratio(slow, few)[0] == slow.median


def test_times() -> None:
    times = Times(tuple(float(i) for i in range(11)))
    assert times.median == 5
    assert times.spread == (1, 9)


def test_the_batch_that_fills_a_gpu() -> None:
    tried = []

    def saturating(limit: int, memory: int, batch: int) -> float:
        tried.append(batch)
        if batch > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return float(min(batch, limit))

    assert filling_batch(partial(saturating, 128, 10**6)) == 128
    assert tried == [16, 32, 64, 128, 256]
    assert filling_batch(partial(saturating, 10**6, 100)) == 64
    with pytest.raises(torch.OutOfMemoryError):
        filling_batch(partial(saturating, 10**6, 8))


# -------------------------------------------------------------------------------------------------------------- machine


def test_a_quiet_machine_is_not_called_noisy() -> None:
    assert noise([100, 101, 99, 100, 102], 0.1) == []
    assert noise([], None) == []
    assert noise([100.0], measure.BUSY) == []


def test_noise_is_said_in_a_sentence() -> None:
    (busy,) = noise([100, 100, 100], 1.7)
    assert busy.startswith("Other programs were running: a load of 1.7")
    (unsteady,) = noise([60, 100, 100, 101, 140], 0.0)
    assert "varied by" in unsteady
    assert "GFLOP/s" in unsteady
    assert len(noise([50, 100], 9.0)) == 2


def test_the_machines_own_speed_is_operations_over_seconds() -> None:
    """By a clock that says a product took 2 seconds and the other way of doing it 1: the faster counts."""
    ticks = iter([0.0, 2.0, 10.0, 11.0])
    product = MatrixProduct(CPU, clock=lambda: next(ticks))
    assert product() == pytest.approx(2 * product.side**3 / 1e9)


def test_what_it_ran_on_is_told() -> None:
    told = measure.machine(CPU)
    assert told["threads"] == torch.get_num_threads()
    assert told["torch"] == torch.__version__
    assert told["gpu"] is None
    json.dumps(told)


# ------------------------------------------------------------------------------------------------- operations, memory


def test_operations_are_counted_by_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 5))
    output, macs = count_macs(model, torch.zeros(2, 3, 6, 6))
    assert output.shape == (2, 5)
    conv, linear = 2 * 36 * 8 * 27, 2 * 5 * 8 * 36
    assert (macs["0"], macs["2"], macs[""]) == (conv, linear, conv + linear)
    assert count_macs(nn.Flatten(), torch.zeros(1, 3, 6, 6))[1] == {"": 0}


def _holding(megabytes: int) -> Any:
    kept = torch.ones(megabytes, 250_000)
    return lambda: (kept + 1).sum()


def _failing() -> Any:
    raise RuntimeError("cannot be built\nand here is why")


def test_peak_memory_is_that_of_the_work() -> None:
    small, large = (peak_memory(partial(_holding, size), CPU, threads=1) / 1e6 for size in (10, 110))
    assert large - small == pytest.approx(200, abs=20)  # what is kept and what is made of it
    with pytest.raises(ChiasmError, match=r"^cannot be built$"):
        peak_memory(_failing, CPU, threads=1)


class _Failing:
    """A work that fails at its fifth run, in words that tell what process it is in."""

    def __init__(self) -> None:
        self.left = 5

    def __call__(self) -> None:
        self.left -= 1
        if not self.left:
            raise RuntimeError(f"process {os.getpid()}, {torch.get_num_threads()} threads\nand more")


class _Ending:
    """A work whose process ends at its fifth run, as when the system ends it."""

    def __init__(self, number: signal.Signals) -> None:
        self.left, self.number = 5, number

    def __call__(self) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), self.number)


def test_a_work_in_a_process_of_its_own() -> None:
    with Apart(partial(_holding, 10), threads=1, spare=SPARE) as work:
        assert 0 < work() < 60
        assert work.peak() == pytest.approx(20e6, abs=10e6)
        assert 0 < work() < 60
    with pytest.raises(ChiasmError, match="ended"):
        work()
    with Apart(_Failing, threads=3) as work:  # two runs made it warm, of the next two one is timed
        assert work() < 60
        with pytest.raises(ChiasmError, match=r"^process (\d+), 3 threads$") as error:
            work()
        assert int(str(error.value).split()[1].rstrip(",")) != os.getpid()
    with pytest.raises(ChiasmError, match="not done within 0 s"):
        Apart(partial(_holding, 10), threads=1, timeout=0.01)


@pytest.mark.parametrize(("number", "why"), [(signal.SIGKILL, "for want of memory"), (signal.SIGTERM, "ended")])
def test_a_process_that_ends_is_an_error_of_its_work(number: signal.Signals, why: str) -> None:
    with Apart(partial(_Ending, number), threads=1) as work:
        assert work() < 60
        for ask in (work, work, work.peak):
            with pytest.raises(ChiasmError, match=why):
                ask()


# ------------------------------------------------------------------------------------------------------------ benchmark


def test_models_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One network trains with one image and one cannot: that row says so, the rest goes on, and the exit code is 1."""
    words = [
        "bench",
        *TINY,
        "--batch",
        "1",
        "2",
        "--image-size",
        "32",
        "--rounds",
        "2",
        "--no-memory",
        "--peer",
        TINY[1],
    ]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().out
    assert "inference, batch 1" in shown
    assert "training step, batch 2" in shown

    plain = json.loads((tmp_path / "out" / "bench.json").read_text())
    rows = {(row["mode"], row["batch"], row["model"], row["form"]): row for row in plain["rows"]}
    forms = {"inference": [*FORMS, "optimized"], "training": FORMS}
    assert list(rows) == [
        (mode, batch, name, form) for mode in forms for batch in (1, 2) for name in TINY for form in forms[mode]
    ]
    for form in FORMS:
        failed = rows.pop(("training", 1, TINY[1], form))
        assert "more than 1 value per channel" in failed["error"]
        assert failed["times"] is None
    assert "Expected more than 1 value per channel" in shown

    for (mode, batch, name, form), row in rows.items():
        assert row["error"] is None
        assert len(row["times"]["rounds"]) == 2
        assert row["times"]["p10"] <= row["times"]["median"] <= row["times"]["p90"]
        assert row["images_per_second"] == pytest.approx(batch / row["times"]["median"])
        assert row["gflops"] == pytest.approx(row["flops"] / row["times"]["median"] / 1e9)
        assert row["memory_format"] in ("contiguous", "channels_last")
        assert row["image_size"] == [32, 32]
        peer = rows.get((mode, batch, TINY[1], "eager"))
        if peer is None:
            assert row["speedup"] is None
        else:
            value, low, high = row["speedup"]
            assert value == pytest.approx(peer["times"]["median"] / row["times"]["median"])
            assert low <= high
        if (name, form) == (TINY[1], "eager"):
            assert row["speedup"] == [1, 1, 1]
    one, training = rows["inference", 2, TINY[0], "eager"], rows["training", 2, TINY[0], "eager"]
    model = timm.create_model("test_vit", img_size=32)
    assert one["flops"] == 2 * 2 * count_macs(model, torch.zeros(1, 3, 32, 32))[1][""]
    assert training["flops"] == 3 * one["flops"]
    assert one["parameters"] == sum(p.numel() for p in model.parameters())

    flags = ["--peer", TINY[1], "--batch", "1", "2", "--image-size", "32", "--rounds", "2", "--no-memory"]
    assert plain["command"] == " ".join(["chiasm", "bench", *TINY, *flags])
    assert plain["limit"] > 0
    assert len(plain["rates"]) >= 4
    page = (tmp_path / "out" / "bench.md").read_text()
    assert page.count(f"| {' | '.join(HEADERS)} |") == 4
    assert page.count("| timm:test_resnet @32 | eager |") == 4
    assert "Each in a process of its own" in page
    assert f"`{plain['command']}`" in page
    assert (tmp_path / "out" / "bench.svg").read_text().rstrip().endswith("</svg>")


def test_files_and_names_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    info = ModelInfo(
        architecture="test_vit", model_args={"img_size": 32}, labels=("a", "b"), preprocess=Preprocess(size=(32, 32))
    )
    save_model(path, timm.create_model("test_vit", img_size=32, num_classes=2), info)
    names = [str(path), "test_resnet", "torchvision:squeezenet1_1"]
    result = bench(
        models=names, apart=False, batch=["1"], rounds=1, train=False, memory=False, image_size=[32], out=None
    )
    assert [row.model for row in result.rows] == [name for name in names for _ in ("eager", "optimized")]
    assert "--no-apart" in result.where
    assert all(row.error is None for row in result.rows)
    assert show(result, BenchConfig(models=names)) == 0


def test_half_precision_and_own_sizes() -> None:
    result = bench(models=["test_vit"], batch=["1"], rounds=1, precision="bf16", out=None)
    modes = {"inference": [*FORMS, "optimized"], "training": FORMS}
    assert [(row.mode, row.form) for row in result.rows] == [
        (mode, form) for mode, forms in modes.items() for form in forms
    ]
    assert all(row.error is None and row.image_size == (160, 160) for row in result.rows)
    assert all(row.memory is None if row.form == "kept" else row.memory and row.memory > 1e6 for row in result.rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"models": ["test_vitt"]}, "unknown model 'test_vitt'; did you mean test_vit"),
        ({"models": ["test_vit", "timm:resnett18"]}, "unknown timm model 'resnett18'; did you mean resnet18"),
        ({"models": ["torchvision:swin_tt"]}, "unknown torchvision model 'swin_tt'; did you mean swin_t"),
        ({"models": ["timm:"]}, "unknown model 'timm:'"),
        ({"models": ["runs/none"]}, "no such file or folder"),
        ({"models": ["test_vit", "test_vit"]}, "named twice"),
        ({"models": []}, "which models"),
        ({"models": ["test_vit"], "peer": "test_vitt"}, "unknown peer 'test_vitt'; did you mean test_vit"),
        ({"models": ["test_vit"], "batch": ["many"]}, "--batch many: expected whole numbers"),
        ({"models": ["test_vit"], "batch": ["0"]}, "--batch 0"),
        ({"models": ["test_vit"], "batch": ["max"], "device": "cpu"}, "there is none here"),
        ({"models": ["test_vit"], "image_size": [1, 2, 3]}, "expected a side"),
        ({"models": ["test_vit"], "seconds": 0}, "seconds is 0"),
        ({"models": ["test_vit"], "drop_path": 1.0}, "drop_path is 1: expected a rate"),
        ({"models": ["test_vit"], "device": "cuda:99"}, "is not here"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_one_line_before_anything_is_measured(flags: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ChiasmError, match=message) as error:
        bench(**flags, out=str(tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_name_is_its_own_kind_of_error() -> None:
    with pytest.raises(UnknownNameError):
        bench(models=["torchvision:nothing_like_it"])


class _Stopped(nn.Module):
    """At whose first training step somebody presses Ctrl-C."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            raise KeyboardInterrupt
        return self.conv(images).mean((2, 3))


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def a_network_that_is_stopped(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _Stopped()

    timm.models.register_model(a_network_that_is_stopped)
    name = "timm:a_network_that_is_stopped"
    result = bench(models=["timm:test_vit", name], **FAST, out=str(tmp_path))
    assert result.interrupted
    assert "All in one process" in result.where  # another one would not know the network
    assert "unknown timm model 'a_network_that_is_stopped'" in result.where
    assert {(row.mode, row.batch) for row in result.rows} == {("inference", 1), ("inference", 2)}
    assert all(row.times for row in result.rows)
    assert show(result, BenchConfig(models=[name], format="json")) == 130
    assert json.loads(capsys.readouterr().out)["interrupted"] is True
    assert "Stopped before its end" in (tmp_path / "bench.md").read_text()
