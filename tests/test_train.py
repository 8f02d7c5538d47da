"""Training end to end in this process: the run folder, every option, and what goes wrong."""

from __future__ import annotations

import copy
import csv
import json
import math
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.models import register_model
from torch import Tensor, nn

import chiasm
from chiasm.config import TrainConfig
from chiasm.engine.checkpoints import AtomicCheckpointIO, read_checkpoint
from chiasm.engine.freeze import freeze
from chiasm.engine.mix import Mix
from chiasm.engine.optimizer import make_optimizer, set_rate
from chiasm.engine.run_folder import RunFolder
from chiasm.engine.schedule import WARMUP_AT_MOST, Schedule
from chiasm.engine.shards import own_padded_share, own_share
from chiasm.errors import ChiasmError, DataError, TrainingError, UnknownNameError
from chiasm.model_file import load_model
from chiasm.verbs.train import TrainResult

CLASSES = 3
TINY = {"dim": 32, "heads": 2, "depth": 3, "stem_chs": 8, "channel_ratio": 2}
QUICK = {
    "model": "conformer_nano_patch8_64",
    "model_args": TINY,
    "image_size": 32,
    "recipe": "quick",
    "epochs": 2,
    "batch_size": 8,
    "workers": 0,
    "accelerator": "cpu",
    "loggers": [],
    "crop_scale": 1.0,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of 24 training and 9 validation images of three classes that anything learns: noise of three tints."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for label in range(CLASSES):
        tint = torch.zeros(3, 1, 1)
        tint[label] = 150
        for split, count in (("train", 8), ("val", 3)):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 100, (3, 32, 32), generator=generator)
                save(tint + noise, folder / f"{number}.png")
    return str(root)


@pytest.fixture
def train(images: str, tmp_path: Path) -> Callable[..., TrainResult]:
    """`chiasm.train` on those images with a tiny model, into tmp_path/run."""

    def run(**flags: Any) -> TrainResult:
        return chiasm.train(**({"data": images, "out": str(tmp_path / "run")} | QUICK | flags))

    return run


def save(image: Tensor, path: Path) -> None:
    """Write an image (3, H, W) of values 0..255."""
    Image.fromarray(image.to(torch.uint8).permute(1, 2, 0).numpy()).save(path)


def rows(run: str | Path) -> list[dict[str, float]]:
    with (Path(run) / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------------------------ the run folder


def test_a_run_folder_explains_itself(train: Callable[..., TrainResult], images: str) -> None:
    result = train(epochs=3, ema=0.9, loggers=["tensorboard"])
    run = Path(result.run)
    assert TrainConfig(**yaml.safe_load((run / "config.yaml").read_text())).ema == 0.9
    lines = rows(run)
    assert [row["epoch"] for row in lines] == [1, 2, 3]
    assert [row["step"] for row in lines] == [3, 6, 9]
    assert {"lr", "train_loss", "val_loss", "val_top1", "val_top1_conv", "val_top1_tokens", "seconds"} < set(lines[0])
    assert result.score == max(row["val_top1"] for row in lines)
    assert result.branches == {name: lines[result.best_epoch - 1][f"val_top1_{name}"] for name in ("conv", "tokens")}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best"]["val_top1"] == result.score
    assert summary["data"] == {"name": Path(images).name, "classes": 3, "train_images": 24, "val_images": 9}
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__.startswith(
        summary["versions"]["torch"]
    )
    assert Image.open(run / "curves.png").size[0] > 600
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "curves.png",
        "metrics.csv",
        "model.safetensors",
        "summary.json",
        "tensorboard",
    ]

    # The model file holds the moving average of the best epoch, which is what was validated.
    model, info = load_model(result.model)
    best = read_checkpoint(run / "checkpoints" / "best.ckpt")
    assert best["chiasm"]["best_epoch"] == best["chiasm"]["epoch"] == result.best_epoch
    for name, value in model.state_dict().items():
        assert torch.equal(value, best["state_dict"][f"ema.module.model.{name}"])
    assert info.labels == ("class 0", "class 1", "class 2")
    assert info.preprocess.size == (32, 32)
    assert info.data == images
    assert "drop_path_rate" not in info.model_args


def test_the_model_file_scores_what_the_summary_says(train: Callable[..., TrainResult], images: str) -> None:
    from chiasm.data import open_data
    from chiasm.data.transforms import eval_transform

    result = train(epochs=4, lr=5e-3)
    model, info = load_model(result.model)
    split, transform = open_data(images).splits["val"], eval_transform(info.preprocess)
    batch = torch.stack([transform(split.read(i)) for i in range(len(split))])
    with torch.inference_mode():
        predicted = model(batch.contiguous(memory_format=torch.channels_last)).argmax(-1)
    assert (predicted == torch.tensor(split.labels)).double().mean().item() == pytest.approx(result.score)
    assert result.score > 0.6


def test_default_names_count_up_and_nothing_is_overwritten(
    train: Callable[..., TrainResult], images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = train(out=None, epochs=1), train(out=None, epochs=1)
    name = f"runs/{Path(images).name}-conformer_nano_patch8_64"
    assert [Path(run.run).as_posix() for run in (first, second)] == [f"{name}-1", f"{name}-2"]
    before = (Path(first.run) / "metrics.csv").read_bytes()
    with pytest.raises(ChiasmError, match="holds something already; give --resume"):
        train(out=first.run)
    assert (Path(first.run) / "metrics.csv").read_bytes() == before


def test_same_seed_same_weights_and_another_seed_others(train: Callable[..., TrainResult], tmp_path: Path) -> None:
    mixed = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2, "random_erasing": 0.5, "rand_augment": 5, "crop_scale": 0.4}
    files = [
        Path(train(out=str(tmp_path / name), epochs=1, seed=seed, **mixed).model).read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert files[0] == files[1]
    assert files[0] != files[2]


# ------------------------------------------------------------------------------------------------------------- options

RATES = {"adamw": 3e-3, "adam": 3e-3, "lamb": 1e-2, "lion": 5e-4, "sgd": 5e-2, "rmsprop": 1e-3}


@pytest.mark.parametrize("optimizer", RATES)
def test_the_loss_falls_with_every_optimizer(train: Callable[..., TrainResult], optimizer: str) -> None:
    losses = [row["train_loss"] for row in rows(train(optimizer=optimizer, lr=RATES[optimizer], epochs=5).run)]
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_state_of_other_weights_in_memory_goes_on_alike(name: str) -> None:
    """That of an optimiser that was not fused, over weights in another memory format."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(4, 6, 3)
    images = torch.randn(2, 4, 8, 8)

    def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()

    config = TrainConfig(optimizer=name, lr=0.05)
    before = make_optimizer(model, config)
    for group in before.param_groups:
        group["fused"] = None
    step(model, before)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    after = make_optimizer(other, config)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert all(group["fused"] for group in after.param_groups)
    for _ in range(3):
        step(model, before)
        step(other, after)
    torch.testing.assert_close(other.weight, model.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        {"accumulate": 2},
        {"mixup": 0.8, "cutmix": 1.0},
        {"precision": "bf16"},
        {"grad_checkpointing": True},
        {"class_weights": "balanced", "label_smoothing": 0.2},
        {"clip_grad": None, "layer_decay": 0.8, "warmup_epochs": 50},
        {"model": "test_vit", "model_args": {}, "drop_path": 0.1},
        {"model": "test_convnext", "model_args": {}, "drop_path": 0.1},  # takes no img_size
        {"model": "test_byobnet", "model_args": {}, "ema": 0.9},
        {"batch_size": 7, "cache": False, "workers": 1},
    ],
    ids=lambda flags: " ".join(f"{name}={value}" for name, value in flags.items()),
)
def test_options_train(train: Callable[..., TrainResult], flags: dict[str, Any]) -> None:
    result = train(**flags)
    assert result.epochs == 2
    assert all(math.isfinite(row["val_loss"]) for row in rows(result.run))
    model, _ = load_model(result.model)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_accumulation_makes_fewer_larger_steps(train: Callable[..., TrainResult]) -> None:
    assert [row["step"] for row in rows(train(accumulate=2).run)] == [2, 4]  # three batches: two and one


def test_every_parameter_gets_a_gradient() -> None:
    """An unused parameter would stop training on several devices."""
    model = chiasm.create_model("conformer_nano_patch8_64", num_classes=CLASSES, **TINY)
    sum(value.square().mean() for value in model.forward_branches(torch.randn(2, 3, 32, 32)).values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_frozen_stays_and_the_rest_moves(train: Callable[..., TrainResult], tmp_path: Path) -> None:
    """All but the head of a net with batch norms: neither its weights nor its running statistics move."""
    flags = {"model": "test_byobnet", "model_args": {}, "seed": 5}
    after, _ = load_model(train(freeze=["backbone"], **flags).model)
    torch.manual_seed(5)
    before = chiasm.create_model("test_byobnet", num_classes=CLASSES).state_dict()
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.fc.weight", "head.fc.bias"}


def test_freezing_by_prefix() -> None:
    model = chiasm.create_model("conformer_nano_patch8_64", num_classes=CLASSES, **TINY)
    frozen = freeze(model, ["stem", "blocks.1"])
    assert {name.split(".")[0] for name in frozen} == {"stem", "blocks"}
    assert all(not name.startswith("blocks.") or name.startswith("blocks.1.") for name in frozen)
    with pytest.raises(UnknownNameError, match="did you mean blocks"):
        freeze(model, ["block"])
    with pytest.raises(ChiasmError, match="freezes all"):
        freeze(model, ["backbone", "heads"])


def test_layer_decay_and_decay_groups() -> None:
    model = chiasm.create_model("conformer_nano_patch8_64", num_classes=CLASSES, **TINY)
    optimizer = make_optimizer(model, TrainConfig(layer_decay=0.5, weight_decay=0.1))
    set_rate(optimizer, 1.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rate, decay = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rate[names[id(parameter)]] = group["lr"]
            decay[names[id(parameter)]] = group["weight_decay"]
    by_layer = [
        max(value for name, value in rate.items() if name.startswith(layer))
        for layer in ("stem", "blocks.0", "blocks.2", "heads")
    ]
    assert by_layer == sorted(by_layer)
    assert by_layer[0] < by_layer[1] < by_layer[2]
    assert by_layer[-1] == 1.0
    assert all(value == 0 for name, value in decay.items() if name.endswith("bias") or name == "cls_token")
    assert decay["heads.conv.weight"] == 0.1


def test_weights_of_one_part(train: Callable[..., TrainResult], tmp_path: Path) -> None:
    torch.manual_seed(7)
    conv = chiasm.create_model("test_resnet", num_classes=CLASSES)
    torch.save(conv.state_dict(), tmp_path / "conv,a=b.pth")
    flags: dict[str, Any] = {
        "model": "test_resnet+test_vit:mid", "model_args": {}, "lr": 1e-12, "min_lr": 0, "weight_decay": 0,
    }  # fmt: skip
    model, _ = load_model(train(weights=f"conv={tmp_path / 'conv,a=b.pth'}", **flags).model)
    torch.testing.assert_close(model.conv.layer1[0].conv1.weight, conv.layer1[0].conv1.weight)
    with pytest.raises(UnknownNameError, match="did you mean conv"):
        train(weights="cnv=x.pth", out=str(tmp_path / "other"), **flags)


def test_parts_with_rates_of_their_own() -> None:
    model = chiasm.create_model("conformer_nano_patch8_64", num_classes=CLASSES, **TINY)
    scales = {"blocks": 0.5, "blocks.0.transformer": 0.1, "heads.conv": 0}
    optimizer = make_optimizer(model, TrainConfig(layer_decay=None, lr_scale=scales))
    set_rate(optimizer, 2.0)
    rate = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    rates = {name: rate[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert rates["stem.conv.weight"] == rates["heads.tokens.weight"] == 2.0
    assert rates["blocks.0.conv_in.conv1.weight"] == 1.0
    assert rates["blocks.0.transformer.attn.qkv.weight"] == pytest.approx(0.2)
    assert rates["heads.conv.weight"] == 0
    with pytest.raises(UnknownNameError, match="did you mean blocks"):
        make_optimizer(model, TrainConfig(lr_scale={"block": 0.5}))
    with pytest.raises(ChiasmError, match="lr_scale of stem is 'slow': expected a number"):
        make_optimizer(model, TrainConfig(lr_scale={"stem": "slow"}))


def test_balanced_weights_count_each_class_alike(tmp_path: Path) -> None:
    from chiasm.data import open_data
    from chiasm.engine.build import balanced_weights

    for label, count in (("a", 6), ("b", 2)):
        for split in ("train", "val"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(count):
                save(torch.full((3, 8, 8), number), tmp_path / split / label / f"{number}.png")
    weights = balanced_weights(open_data(str(tmp_path)))
    assert weights.tolist() == pytest.approx([8 / 12, 8 / 4])


def test_early_stopping(train: Callable[..., TrainResult]) -> None:
    """With nothing to learn from (the rate is next to zero) the score stands still."""
    result = train(epochs=50, lr=1e-9, min_lr=0, early_stopping=2)
    stale = result.epochs - result.best_epoch
    assert stale == 2
    assert result.epochs < 50


def test_the_last_epoch_is_kept_where_asked(train: Callable[..., TrainResult]) -> None:
    """At a rate that throws the weights about, the best epoch is seldom the last."""
    result = train(epochs=4, lr=0.5, warmup_epochs=0, keep="last", clip_grad=None, optimizer="sgd")
    last = read_checkpoint(Path(result.run) / "checkpoints" / "last.ckpt")["state_dict"]
    best = read_checkpoint(Path(result.run) / "checkpoints" / "best.ckpt")["state_dict"]
    kept = load_model(result.model)[0].state_dict()
    assert all(torch.equal(value, last[f"task.model.{name}"]) for name, value in kept.items())
    assert result.best_epoch == 4 or not all(torch.equal(v, best[f"task.model.{name}"]) for name, v in kept.items())


def test_max_minutes_ends_in_time_at_the_final_rate(train: Callable[..., TrainResult]) -> None:
    result = train(max_minutes=0.05, min_lr=1e-5, epochs=1)
    lines = rows(result.run)
    assert 2.0 < result.seconds < 6.0
    assert len(lines) > 1  # epochs do not count
    assert lines[-1]["lr"] < 2e-4 < max(row["lr"] for row in lines)


def test_warm_start(train: Callable[..., TrainResult], tmp_path: Path) -> None:
    first = train(epochs=3)
    second = train(out=str(tmp_path / "second"), weights=first.model, epochs=1, lr=1e-9, min_lr=0)
    before, after = load_model(first.model)[0].state_dict(), load_model(second.model)[0].state_dict()
    for name, value in before.items():
        if value.is_floating_point() and "running" not in name:
            assert torch.allclose(value, after[name], atol=1e-6), name


def test_the_moving_average_is_what_is_validated(train: Callable[..., TrainResult]) -> None:
    """Its decay is warmed up, so after a few steps it is near the weights but not them; batch norms' buffers too."""
    result = train(model="test_byobnet", model_args={}, ema=0.999, epochs=3)
    state = read_checkpoint(Path(result.run) / "checkpoints" / "last.ckpt")["state_dict"]
    raw = {name.removeprefix("task."): value for name, value in state.items() if name.startswith("task.")}
    for name in ("model.stem.conv.weight", "model.stem.bn.running_mean"):
        average = state[f"ema.module.{name}"]
        assert not torch.equal(average, raw[name])
        assert (average - raw[name]).abs().mean() < 0.5 * raw[name].abs().mean()


# --------------------------------------------------------------------------------------------------- parts on their own


@settings(max_examples=50, deadline=None)
@given(
    warmup=st.floats(0, 100),
    total=st.integers(1, 60),
    peak=st.floats(1e-5, 1),
    share=st.floats(0, 1),
)
def test_schedule_over_steps(warmup: float, total: int, peak: float, share: float) -> None:
    schedule = Schedule(peak=peak, final=peak * share, warmup=warmup, total=total)
    rates = [schedule.rate(step) for step in range(total)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    top = rates.index(max(rates))
    assert top <= WARMUP_AT_MOST * total + 1
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    if total > 10:
        assert rates[-1] == pytest.approx(schedule.final)


@settings(max_examples=50, deadline=None)
@given(updates=st.integers(0, 10_000), share=st.floats(0, 1), warmup=st.floats(0, 1e6))
def test_schedule_over_time(updates: int, share: float, warmup: float) -> None:
    schedule = Schedule(peak=1.0, final=0.01, warmup=warmup, total=None)
    rate = schedule.rate(updates, share)
    assert 0 < rate <= 1
    assert schedule.rate(updates, 1.0) == pytest.approx(0.01)
    if share >= WARMUP_AT_MOST:  # warm by then, however long the warm-up in epochs
        assert rate >= 0.01


def test_mixing() -> None:
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    mix = Mix(TrainConfig(mixup=0.8, cutmix=1.0, mix_probability=1.0), CLASSES)
    torch.manual_seed(3)
    mixed, targets = mix(images, labels)
    assert targets.shape == (6, CLASSES)
    assert torch.allclose(targets.sum(-1), torch.ones(6))
    assert not torch.equal(mixed, images)
    torch.manual_seed(3)
    again, _ = mix(images, labels)
    assert torch.equal(mixed, again)
    for off in (TrainConfig(mixup=0.0, cutmix=0.0), TrainConfig(mix_probability=0.0)):
        assert Mix(off, CLASSES)(images, labels) == (images, labels)
    single = (images[:1], labels[:1])
    assert mix(*single) == single


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 30), world_size=st.integers(1, 7))
def test_shares_cover_the_split_in_equal_parts(count: int, world_size: int) -> None:
    from chiasm.data import Split

    split = Split()
    split.labels, split.sources = list(range(count)), [str(i) for i in range(count)]
    padded = [own_padded_share(split, rank, world_size) for rank in range(world_size)]
    counted = [label for part, real in padded for label in part.labels[:real]]
    assert sorted(counted) == split.labels
    assert len({len(part) for part, _ in padded}) == 1
    shares = [own_share(split, rank, world_size).labels for rank in range(world_size)]
    assert {len(share) for share in shares} == {count // world_size}
    assert len({label for share in shares for label in share}) == world_size * (count // world_size)


def test_a_run_from_before_there_were_tasks_goes_on(train: Callable[..., TrainResult], tmp_path: Path) -> None:
    """Its settings have no task and its checkpoint a best top-1; here it was stopped after one epoch of two."""
    first = train(epochs=1)
    run = RunFolder(Path(first.run))
    known = yaml.safe_load(run.config.read_text())
    assert known["task"] == "classify"
    new = ("task", "head", "head_args", "maps", "anchors", "frozen_bn", "scale_jitter", "color_jitter", "dice")
    old = {name: value for name, value in known.items() if name not in (*new, "ignore_index")}
    run.config.write_text(yaml.safe_dump(old | {"epochs": 2}))
    checkpoint = read_checkpoint(run.last)
    state = checkpoint["chiasm"]
    state["best_top1"], state["finished"] = state.pop("best_score"), False
    torch.save(checkpoint, run.last)
    run.summary.unlink()
    result = chiasm.train(resume=first.run, task="auto")
    assert result.epochs == 2
    assert result.score == max(row["val_top1"] for row in rows(first.run))
    assert result.metric == "top1"
    assert read_checkpoint(run.last)["chiasm"]["best_score"] == result.score
    assert chiasm.train(resume=first.run).score == result.score


# ------------------------------------------------------------------------------------------------------ what goes wrong


@register_model
def poisoned(pretrained: bool = False, num_classes: int = 3, after: int = 0, **kwargs: Any) -> nn.Module:
    """A net whose training output is not a number from call `after` on."""

    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, num_classes)
            self.num_classes, self.calls = num_classes, 0

        def get_classifier(self) -> nn.Module:
            return self.fc

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return self.fc(x.mean((2, 3))) * (float("nan") if self.calls > after else 1.0)

    return Poisoned()


def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_the_last_good_checkpoint(
    train: Callable[..., TrainResult], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"loss is nan at batch 2 of epoch 2 \(learning rate .*--lr") as caught:
        train(model="poisoned", model_args={"after": 4}, epochs=5)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert checkpoint["chiasm"]["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


@register_model
def greedy(pretrained: bool = False, num_classes: int = 3, **kwargs: Any) -> nn.Module:
    """A net that asks for more memory than any machine has."""

    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, num_classes)
            self.num_classes = num_classes

        def get_classifier(self) -> nn.Module:
            return self.fc

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mean((2, 3))) + (torch.empty(2**50).sum() if self.training else 0)

    return Greedy()


def test_too_little_memory_is_told(train: Callable[..., TrainResult]) -> None:
    with pytest.raises(
        TrainingError, match=r"batches of \d+ do not fit into the memory of cpu; give a smaller --batch"
    ):
        train(model="greedy", model_args={})


def test_a_rate_far_too_high_is_told(train: Callable[..., TrainResult], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="lower --lr"):
        train(optimizer="sgd", lr=1e6, clip_grad=None, epochs=8, warmup_epochs=0)
    for path in (tmp_path / "run").rglob("*.ckpt"):
        assert all(value.isfinite().all() for value in read_checkpoint(path)["state_dict"].values())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk with room for files of `size` bytes only: longer writes fail as on a full one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    AtomicCheckpointIO().save_checkpoint({"chiasm": {}, "weights": torch.ones(4)}, path)
    with files_of_at_most(100_000), pytest.raises(TrainingError, match=r"last\.ckpt: cannot write .* intact.*--resume"):
        AtomicCheckpointIO().save_checkpoint({"chiasm": {}, "weights": torch.ones(100_000)}, path)
    assert read_checkpoint(path)["weights"].tolist() == [1, 1, 1, 1]
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_while_training_is_one_line(train: Callable[..., TrainResult], tmp_path: Path) -> None:
    with files_of_at_most(200_000), pytest.raises(TrainingError) as caught:
        train()
    assert re.match(r"\S+: cannot write .* Make room, then: chiasm train --resume \S+$", str(caught.value))
    assert chiasm.train(data=None, resume=str(tmp_path / "run")).epochs == 2  # with room again, from the start


@pytest.mark.parametrize("cut", [0, 1000, -10])
def test_a_damaged_checkpoint_is_told(train: Callable[..., TrainResult], tmp_path: Path, cut: int) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"chiasm": {}, "weights": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ChiasmError, match=r"last\.ckpt: not a readable checkpoint") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


MISTAKES: list[tuple[dict[str, Any], type[ChiasmError], str]] = [
    ({"batch_size": 25}, DataError, "24 training images do not fill one batch of 25; give --batch-size 24"),
    ({"epochs": 0}, ChiasmError, "epochs is 0: expected 1 to"),
    ({"label_smoothing": 1.5}, ChiasmError, "label_smoothing is 1.5: expected 0 to"),
    ({"optimizer": "adamx"}, UnknownNameError, "adamx.*did you mean adam"),
    ({"recipe": "fintune"}, UnknownNameError, "did you mean finetune"),
    ({"epoch": 3}, UnknownNameError, "did you mean epochs"),
    ({"lr": "fast"}, ChiasmError, "lr is 'fast': expected a number"),
    ({"model": "conformer_nano_patch8_46"}, UnknownNameError, "did you mean conformer_nano_patch8_64"),
    ({"model_args": {"dims": 8}}, ChiasmError, "cannot be built with {'dims': 8}"),
    ({"devices": "none"}, ChiasmError, "this machine cannot train so"),
    ({"accelerator": "tpuu"}, ChiasmError, "this machine cannot train so"),
    ({"strategy": "dpp"}, ChiasmError, "expected one of auto, ddp"),
    ({"precision": "16"}, ChiasmError, "precision 16 needs a GPU"),
    ({"loggers": ["wandb"]}, ChiasmError, "pip install wandb"),
    ({"pretrained": True, "weights": "x.pth"}, ChiasmError, "give one of them"),
    ({"freeze": ["block"]}, UnknownNameError, "did you mean blocks"),
    ({"image_size": 4}, ChiasmError, "4 ?(x4)? ?px"),
    ({"scale_jitter": [2, 1], "task": "detect"}, ChiasmError, r"scale_jitter is \[2.0, 1.0\]: expected two numbers"),
    ({"scale_jitter": [1]}, ChiasmError, r"scale_jitter is \[1.0\]: expected two numbers"),
    ({"color_jitter": 1.5}, ChiasmError, "color_jitter is 1.5: expected 0 to 1"),
    ({"task": "dettect"}, UnknownNameError, "did you mean detect"),
    ({"task": "segment"}, DataError, "not annotated for --task segment; expected folders images and masks"),
    ({"head": "unet"}, ChiasmError, "head is unet: for the tasks detect, instances, segment alone"),
    ({"ignore_index": 300}, ChiasmError, "ignore_index is 300: expected 0 to 255"),
    ({"resume": "nowhere"}, ChiasmError, "nowhere: not a run folder"),
]


@pytest.mark.parametrize(("flags", "kind", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_told_in_one_line_and_leave_nothing(
    train: Callable[..., TrainResult], tmp_path: Path, flags: dict[str, Any], kind: type[ChiasmError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        train(**flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_in_it_is_left_alone(train: Callable[..., TrainResult], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("all my work")
    with pytest.raises(ChiasmError, match="holds something already"):
        train()
    assert (tmp_path / "run" / "thesis.tex").read_text() == "all my work"


def test_an_unused_folder_goes_but_not_what_others_put_there(tmp_path: Path) -> None:
    run = RunFolder.create(TrainConfig(data="x", out=str(tmp_path / "run")), "x")
    (run.path / "notes.txt").write_text("mine")
    run.discard_unused()
    assert [path.name for path in run.path.iterdir()] == ["notes.txt"]


def test_poisoned_is_a_timm_model() -> None:
    """The stand-in above is reached the way any model is."""
    assert timm.is_model("poisoned")
