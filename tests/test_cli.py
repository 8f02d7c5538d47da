"""The command line: every field is a flag, YAML goes in and out, flags win over files and files over recipes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from chiasm.cli import VERBS, main
from chiasm.config import RECIPES, TASK_DEFAULTS, TrainConfig
from chiasm.errors import ChiasmError, UnknownNameError


def _settings(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main([*words, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_setting(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    for item in fields(VERBS[verb][0]):
        shown = item.name.upper() if item.metadata.get("positional") else f"--{item.name.replace('_', '-')}"
        assert shown in text
        assert " ".join(item.metadata["help"].split()[:2]) in " ".join(text.split())


@pytest.mark.parametrize("verb", VERBS)
def test_printed_settings_read_back_the_same(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = _settings(capsys, verb)
    assert set(printed) == {f.name for f in fields(VERBS[verb][0])}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(printed))
    assert _settings(capsys, verb, "--config", str(tmp_path / "settings.yaml")) == printed


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_set_what_their_table_says_and_flags_win(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = _settings(capsys, "train", "photos", "--recipe", recipe, "--lr", "0.123")
    for name, value in (RECIPES[recipe] | {"lr": 0.123}).items():
        assert printed[name] == value


@pytest.mark.parametrize("task", TASK_DEFAULTS)
def test_tasks_set_what_their_table_says_over_the_recipe_and_flags_win(
    task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = _settings(capsys, "train", "photos", "--task", task, "--recipe", "finetune", "--lr", "0.123")
    for name, value in (RECIPES["finetune"] | TASK_DEFAULTS[task]["finetune"] | {"lr": 0.123}).items():
        assert printed[name] == value
    assert TrainConfig.from_flags(data="photos", task=task, image_size=None).image_size == 512
    assert TrainConfig.from_flags(data="photos", task=task, image_size=320).image_size == 320


@pytest.mark.parametrize("recipe", RECIPES)
def test_classification_has_the_recipe_alone(recipe: str) -> None:
    auto, classify = (TrainConfig.from_flags(data="x", recipe=recipe, task=task) for task in ("auto", "classify"))
    assert auto.to_dict() | {"task": "classify"} == classify.to_dict()
    assert classify == TrainConfig(data="x", recipe=recipe, task="classify", **RECIPES[recipe])


def test_flags_win_over_the_file_and_the_file_over_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("recipe: quick\nepochs: 7\nlr: 0.5\ncache: false\nfreeze: [stem]\n")
    printed = _settings(capsys, "train", "photos", "--config", str(path), "--lr", "0.25")
    assert (printed["epochs"], printed["lr"], printed["mixup"]) == (7, 0.25, RECIPES["quick"]["mixup"])
    assert printed["cache"] is False
    assert printed["freeze"] == ["stem"]


def test_switches_lists_and_mappings(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "photos",
        "--no-cache",
        "--compile",
        "--loggers",
        "tensorboard",
        "wandb",
        "--freeze",
        "stem",
        "blocks.0",
    ]
    printed = _settings(capsys, *words, "--model-args", "{coupling: none, depth: 9}", "--ema", "0.99")
    assert (printed["cache"], printed["compile"], printed["ema"]) == (False, True, 0.99)
    assert printed["loggers"] == ["tensorboard", "wandb"]
    assert printed["freeze"] == ["stem", "blocks.0"]
    assert printed["model_args"] == {"coupling": "none", "depth": 9}


def test_positionals_take_many_values(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _settings(capsys, "predict", "model.safetensors", "a.png", "b c.png", "--top", "2")
    assert (printed["model"], printed["images"], printed["top"]) == ("model.safetensors", ["a.png", "b c.png"], 2)


def test_python_keywords_are_the_flags() -> None:
    assert TrainConfig.from_flags(data="photos", recipe="quick", epochs=3).epochs == 3
    with pytest.raises(UnknownNameError, match="did you mean epochs"):
        TrainConfig.from_flags(data="photos", epoch=3)
    with pytest.raises(UnknownNameError, match="did you mean quick"):
        TrainConfig.from_flags(data="photos", recipe="quik")
    with pytest.raises(ChiasmError, match="what to train on"):
        TrainConfig.from_flags()


def test_version_and_help_without_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb}" in text for verb in VERBS)


FAULTS = """
import resource, sys
from chiasm.data.machine import ALL, SPARE, keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for spare in (None, 2**25, SPARE, ALL):
    if spare and not keep_freed_memory(spare):
        sys.exit("no glibc")
    for round in range(12):
        if round == 4:
            before = faults()
        written = b"." * 2**26
        del written
    print(faults() - before)
"""


def test_freed_memory_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=False)
    if "no glibc" in done.stderr:
        pytest.skip("the system's C library is not glibc")
    plain, little, spare, everything = map(int, done.stdout.split())
    # A block has 16,384 pages of 4 kB.
    assert max(everything, spare) < 100 < min(plain, little)  # more than may be kept
