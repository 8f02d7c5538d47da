"""chiasm compare: real studies of very small networks; what is written, resuming, adding, failing, bad input."""

from __future__ import annotations

import csv
import html
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm import create_model

import chiasm
from chiasm.cli import main
from chiasm.config import CompareConfig
from chiasm.engine import study as study_file
from chiasm.engine.study import Budget, Candidate, Study
from chiasm.errors import ChiasmError, InterruptedRunError
from chiasm.measure import Cost, count_macs
from chiasm.models.sketch import shapes_only
from chiasm.models.widen import widened
from chiasm.report.comparison import Comparison, Entry, Outcome, cells, comparison_page, markdown, method, verdict
from chiasm.verbs.compare import CompareResult

DATA = "scenes:size=32,count=64,val=45,seed=3"
CONV, TOKENS = "{channels: [8, 8, 16, 16]}", "{patch_size: 8, depth: 2, embed_dim: 24, num_heads: 2}"
PAIR = "resnet10t+vit_tiny_patch16_224"
MODELS = [
    "resnet10t,channels=[8, 8, 16, 16],as=conv alone",
    "vit_tiny_patch16_224,patch_size=8,depth=2,embed_dim=24,num_heads=2,as=tokens alone",
    f"{PAIR}:early,conv_args={CONV},tokens_args={TOKENS},as=early",
    f"{PAIR}:mid,conv_args={CONV},tokens_args={TOKENS},as=mid",
    f"{PAIR}:late,conv_args={CONV},tokens_args={TOKENS},as=late",
]
SETTINGS: dict[str, Any] = {
    "data": DATA, "seeds": 2, "budget": "2ep", "image_size": 32, "precision": "32",
    "train_args": {"batch_size": 16, "workers": 0},
}  # fmt: skip


def _config(out: Path, **changes: Any) -> CompareConfig:
    return CompareConfig.from_flags(**SETTINGS | {"models": MODELS, "out": str(out)} | changes)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> CompareResult:
    return chiasm.compare(models=MODELS, out=str(tmp_path_factory.mktemp("study") / "own"), **SETTINGS)


def test_every_run_is_measured_after_its_last_epoch(study: CompareResult) -> None:
    comparison = study.comparison
    assert [entry.label for entry in comparison.entries] == ["conv alone", "tokens alone", "early", "mid", "late"]
    for entry in comparison.entries:
        assert [outcome.seed for outcome in entry.outcomes] == [0, 1]
        for outcome in entry.outcomes:
            folder = study.folder / f"{entry.label.replace(' ', '-')}-{outcome.seed}"
            rows = list(csv.DictReader((folder / "metrics.csv").open()))
            assert len(rows) == outcome.epochs == 2
            # What training saw after its last epoch, counted anew from the model file; one image may fall otherwise.
            assert outcome.top1 == pytest.approx(float(rows[-1]["val_top1"]), abs=1.01 / comparison.val_images)
            for name, value in outcome.branches.items():
                assert value == pytest.approx(float(rows[-1][f"val_top1_{name}"]), abs=1.01 / comparison.val_images)
            assert outcome.top1 == pytest.approx(outcome.right.count("1") / comparison.val_images)


def test_branches_and_costs(study: CompareResult) -> None:
    entries = {entry.label: entry for entry in study.comparison.entries}
    assert set(entries["mid"].branches) == set(entries["late"].branches) == {"conv", "tokens"}
    assert entries["early"].branches == entries["conv alone"].branches == {}
    assert entries["mid"].joins == ("resnet10t", "vit_tiny_patch16_224")
    assert entries["late"].cost.macs < entries["mid"].cost.macs
    assert entries["conv alone"].cost.macs + entries["tokens alone"].cost.macs == entries["late"].cost.macs
    assert all(entry.images_per_second > 0 for entry in entries.values())
    assert study.comparison.reference in ("conv alone", "tokens alone")


def test_all_that_is_written(study: CompareResult) -> None:
    content = json.loads((study.folder / "comparison.json").read_text())
    assert len(content["candidates"]) == 5
    assert content["verdict"] == list(verdict(study.comparison))
    rows = list(csv.DictReader((study.folder / "runs.csv").open()))
    assert len(rows) == 10
    page = study.report.read_text()
    assert not re.findall(r"(?:src|href)=\"https?:", page)
    for sentence in verdict(study.comparison):
        assert html.escape(sentence) in page
    written = (study.folder / "comparison.md").read_text()
    for picture in re.findall(r"\]\((\w+\.svg)\)", written):
        assert "<svg" in (study.folder / picture).read_text()


def test_started_again_nothing_is_trained_twice(study: CompareResult) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.folder.glob("*/model.safetensors")}
    again = chiasm.compare(models=MODELS, out=str(study.folder), **SETTINGS)
    assert again.comparison == study.comparison
    more = chiasm.compare(
        models=[*MODELS, f"{MODELS[0].split(',as')[0]},lr=0.001,as=slower"], out=str(study.folder), **SETTINGS
    )
    assert len(more.comparison.entry("slower").outcomes) == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_of_another_study_is_refused(study: CompareResult, tmp_path: Path) -> None:
    with pytest.raises(ChiasmError, match="a study with budget 2 epochs, not 3 epochs; name another folder with --out"):
        chiasm.compare(models=MODELS, out=str(study.folder), **SETTINGS | {"budget": "3ep"})
    with pytest.raises(ChiasmError, match="a study with other images"):
        chiasm.compare(models=MODELS, out=str(study.folder), **SETTINGS | {"data": "scenes:size=32,count=18"})
    with pytest.raises(ChiasmError, match="mid-0 was trained with another model_args; give the candidate another name"):
        Study(_config(study.folder, models=[*MODELS[:3], MODELS[3] + ",exchange=gated"]))
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(ChiasmError, match="holds something else"):
        chiasm.compare(models=MODELS, out=str(tmp_path), **SETTINGS)


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Study._measure
    calls = []

    def interrupted(self: Study, folder: Path, seed: int) -> None:
        calls.append(folder.name)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        measure(self, folder, seed)

    monkeypatch.setattr(Study, "_measure", interrupted)
    settings = SETTINGS | {"models": MODELS[:2], "seeds": 1, "budget": "1ep", "out": str(tmp_path / "s")}
    with pytest.raises(InterruptedRunError, match="To go on, give the same command again") as stopped:
        chiasm.compare(**settings)
    assert stopped.value.exit_code == 143
    assert (tmp_path / "s" / "conv-alone-0" / study_file.RESULT).is_file()
    result = chiasm.compare(**settings)
    assert [len(entry.outcomes) for entry in result.comparison.entries] == [1, 1]
    assert calls == ["conv-alone-0", "tokens-alone-0", "tokens-alone-0"]
    assert any("One seed" in sentence for sentence in verdict(result.comparison))


def test_one_failing_candidate_does_not_end_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [*MODELS[:2], f"{MODELS[0].split(',as')[0]},weights=nowhere.safetensors,as=lost"]
    words = ["--seeds", "1", "--budget", "1ep", "--image-size", "32", "--precision", "32"]
    words += ["--train-args", "{batch_size: 16, workers: 0}", "--out", str(tmp_path / "s")]
    assert main(["compare", "--data", DATA, *words, "--models", *models]) == 1
    said = capsys.readouterr()
    assert "failed: lost, seed 0: nowhere.safetensors" in said.err
    assert "conv alone" in said.out
    page = (tmp_path / "s" / "report.html").read_text()
    assert "Failed: lost, seed 0: nowhere.safetensors" in page


def test_widened_beside_the_networks_alone(tmp_path: Path) -> None:
    study = Study(_config(tmp_path / "s", match="macs"))
    assert [c.label for c in study.candidates[5:]] == [
        f"{name}, widened to 7 M MACs" for name in ("conv alone", "tokens alone")
    ]
    target = study.costs["mid"].macs
    assert study.costs["mid"].macs == max(cost.macs for label, cost in study.costs.items() if "wide" not in label)
    for candidate in study.candidates[5:]:
        assert study.costs[candidate.label].macs == pytest.approx(target, rel=0.25)  # so small a width has coarse steps


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnext50_32x4d",
        "convnext_atto",
        "densenet121",
        "vit_tiny_patch16_224",
        "eva02_tiny_patch14_224",
        "beit_base_patch16_224",
    ],
)
def test_widened_to_what_another_costs(name: str) -> None:
    def build(arguments: dict[str, Any]) -> torch.nn.Module:
        with shapes_only():
            return create_model(name, **arguments).eval()

    def macs(model: torch.nn.Module) -> float:
        with shapes_only():
            return count_macs(model, torch.zeros(1, 3, *model.pretrained_cfg["input_size"][1:]))[1][""]

    own = macs(build({}))
    assert macs(build(widened(name, build, macs, 1.7 * own))) == pytest.approx(1.7 * own, rel=0.12)


def test_a_family_without_a_width_is_refused() -> None:
    with pytest.raises(ChiasmError, match=r"EfficientNet.*have no width to set.*Name a larger network"):
        widened("efficientnet_lite0", lambda a: create_model("efficientnet_lite0", **a), lambda m: 1.0, 2.0)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": ["resnet18"]}, "nothing to compare; name two"),
        ({"models": ["resnet81", "resnet18"]}, "unknown model 'resnet81'; did you mean"),
        ({"models": ["resnet18+vit_tini_patch16_224:mid", "resnet18"]}, "unknown model 'vit_tini_patch16_224'; did"),
        ({"models": ["resnet18", "resnet18"]}, "'resnet18' is there twice; tell them apart with as=NAME"),
        ({"models": ["resnet18,lr", "resnet34"]}, "expected NAME,key=value"),
        ({"models": ["resnet18,epochs=3", "resnet34"]}, "epochs is the same for all candidates, so none has its own"),
        ({"models": ["resnet18,width=3", "resnet34"]}, "resnet18,width=3: resnet18 cannot be built"),
        ({"models": ["resnet18,as=a b", "resnet34,as=a-b"]}, "is there twice"),
        ({"models": [MODELS[0], f"{PAIR}:middle"]}, "unknown fusion 'middle'; did you mean"),
        ({"models": [MODELS[0], f"{PAIR}:mid,points={[[i, i] for i in range(13)]}"]}, "13 exchange points for a Tr"),
        ({"models": [MODELS[0], f"{PAIR}:mid,conv_args={{in_chans: 1}}"]}, "in_chans"),
        ({"models": [MODELS[0], "resnet10t+swin_tiny_patch4_window7_224:mid"]}, "swin_tiny_patch4_window7_224"),
        ({"budget": "10"}, "--budget '10': expected such as 20ep"),
        ({"budget": "1.5ep"}, "--budget '1.5ep': expected"),
        ({"budget": "1h30m"}, "--budget '1h30m': expected"),
        ({"budget": "10ms"}, "--budget '10ms': expected"),
        ({"models": ["resnet18,epoch=3", "resnet34"]}, "Of train there is 'epochs'; did you mean that"),
        ({"models": ["resnet18,precision=32", "resnet34"]}, "precision is the same for all candidates"),
        ({"models": ["resnet18,channels=[8]", "resnet34"]}, "resnet18,channels=[8] cannot be built or run"),
        ({"models": ["resnet18,lr=", "resnet34"]}, "resnet18,lr=: lr is None: expected a number"),
        ({"budget": "0.00001tf"}, "is less than one epoch of conv alone"),
        ({"seeds": 0}, "--seeds 0: expected 1 or more"),
        ({"data": "nowhere"}, "nowhere: no such folder or file"),
        ({"train_args": {"batch_sise": 3}}, "unknown option 'batch_sise'; did you mean batch_size"),
        ({"train_args": {"lr": -1}}, "lr is -1"),
        ({"train_args": {"epochs": 3}}, "--train-args: epochs is not set there"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    flags = SETTINGS | {"models": MODELS[:2], "out": str(tmp_path / "s")} | change
    with pytest.raises(ChiasmError, match=re.escape(said)) as error:
        chiasm.compare(**flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "s").exists()


def test_budgets() -> None:
    cost = Cost(parameters=1, macs=10**9)
    assert Budget.parse("20ep").settings(cost, 100, "x") == {"epochs": 20}
    assert Budget.parse("10m").settings(cost, 100, "x") == {"max_minutes": 10.0}
    assert Budget.parse("1.5h").settings(cost, 100, "x") == {"max_minutes": 90.0}
    # One epoch of 1,000 images at 1 GMAC: 3 passes x 2 x 1e9 x 1e3 = 6 TFLOP.
    assert Budget.parse("20tf").settings(cost, 1000, "x") == {"epochs": 3}


def test_candidates() -> None:
    two = Candidate.parse("resnet18+vit_tiny_patch16_224:mid,weights='conv=a.pth,tokens=b.pth',clip_grad=null")
    assert two.settings == {"weights": "conv=a.pth,tokens=b.pth", "clip_grad": None}
    found = Candidate.parse(
        "resnet18+vit_tiny_patch16_224:mid,exchange=gated,points=[[1, 2], [3, 4]],lr=1e-4,weights=conv=a/b.pth"
    )
    assert found.model_args == {"exchange": "gated", "points": [[1, 2], [3, 4]]}
    assert found.settings == {"lr": "1e-4", "weights": "conv=a/b.pth"}
    assert (
        found.label
        == "resnet18+vit_tiny_patch16_224:mid,exchange=gated,points=[[1, 2], [3, 4]],lr=1e-4,weights=conv=b.pth"
    )
    assert found.coupled == ("resnet18", "vit_tiny_patch16_224")


# ---------------------------------------------------------------------------------------------------------- the verdict


def _entry(label: str, model: str, share: float, *, joins: tuple[str, ...] = (), images: int = 1000) -> Entry:
    """Three seeds that are right on `share` of the images, on the first of them."""
    outcomes = []
    for seed in range(3):
        right = round(images * share) + seed
        outcomes.append(
            Outcome(
                seed=seed,
                top1=right / images,
                branches=dict.fromkeys(("conv", "tokens")[: len(joins)], share),
                agreement=0.9 if joins else None,
                ece=0.05,
                epochs=3,
                minutes=2.0,
                images=3000,
                right="1" * right + "0" * (images - right),
                curve=[0.1, 0.2, right / images],
            )
        )
    cost = Cost(parameters=10**6, macs=(2 if joins else 1) * 10**8)
    return Entry(
        label=label,
        model=model,
        model_args={},
        joins=joins,
        cost=cost,
        outcomes=tuple(outcomes),
        images_per_second=50.0,
    )


def _comparison(*entries: Entry) -> Comparison:
    alone = [entry for entry in entries if not entry.joins]
    return Comparison(
        entries=entries, reference=max(alone or entries[:1], key=lambda e: e.top1).label, data="d",
        train_images=1, val_images=1000, budget="3 epochs", recipe="quick", seeds=3,
        machine={"processor": "p", "threads": 1, "torch": "t"}, command="chiasm compare", date="2026-01-01",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mid", "said"),
    [
        (0.80, "Fusing helps here. The best coupled network: m (80.1%) is 10.0 ±"),
        (0.60, "Fusing does not pay here. Even the best coupled network: m (60.1%) is 10.0 ±"),
        (
            0.70,
            "Fusing makes no difference here that could be told from chance. The best coupled network: m (70.1%) is",
        ),
    ],
)
def test_the_verdict_says_what_was_found(mid: float, said: str) -> None:
    coupled = _entry("m", "a+b:mid", mid, joins=("a", "b")), _entry("l", "a+b:late", 0.5, joins=("a", "b"))
    result = _comparison(_entry("a", "a", 0.70), _entry("b", "b", 0.5), *coupled)
    sentences = list(verdict(result))
    assert sentences[0].startswith(said)
    assert "the best network alone, a (70.1%), for 2.0 times the MACs, the same time an image and" in sentences[0]
    assert "after Holm's correction for 3 comparisons" in sentences[0]
    assert sentences[1].startswith("The exchange itself, m against l, ")
    assert f"without any: {100 * (mid - 0.5):+.1f} ±" in sentences[1]
    assert any(f"the tokens branch's own head reaches {mid:.1%}" in sentence for sentence in sentences)


def test_without_a_network_alone_nothing_is_said_of_fusing() -> None:
    coupled = _entry("m", "a+b:mid", 0.8, joins=("a", "b")), _entry("l", "a+b:late", 0.5, joins=("a", "b"))
    sentences = list(verdict(_comparison(*coupled)))
    assert not any("Fusing" in sentence for sentence in sentences)
    assert sentences[0].startswith("l (50.1%) is 30.0 ±")
    assert not any("network alone" in sentence for sentence in method(_comparison(*coupled)))


def test_accuracies_and_difference_are_of_the_same_seeds() -> None:
    alone, mid = _entry("a", "a", 0.70), _entry("m", "a+b:mid", 0.80, joins=("a", "b"))
    lucky = replace(mid, outcomes=mid.outcomes[2:])
    assert "m (80.2%) is 10.0 ±" in next(iter(verdict(_comparison(alone, lucky))))
    assert "a (70.2%)" in next(iter(verdict(_comparison(alone, lucky))))
    assert any("(1 of 3 seeds)" in cell for row in cells(_comparison(alone, lucky)) for cell in row)


def test_with_no_seed_in_common_nothing_is_compared() -> None:
    alone, mid = _entry("a", "a", 0.70), _entry("m", "a+b:mid", 0.80, joins=("a", "b"))
    parted = replace(alone, outcomes=alone.outcomes[:1]), replace(mid, outcomes=mid.outcomes[1:])
    for entries in (parted, (alone, replace(mid, outcomes=()))):
        assert "nothing to compare" in next(iter(verdict(_comparison(*entries))))
        assert "nothing to compare" in str(comparison_page(_comparison(*entries)))


def test_awkward_labels_reach_the_page() -> None:
    names = ("x|y", "$x_$", "<b>")
    result = _comparison(*(_entry(name, name, 0.7 + i / 10) for i, name in enumerate(names)))
    assert "&lt;b&gt;" in str(comparison_page(result))
    assert r"| x\|y |" in markdown(result)
