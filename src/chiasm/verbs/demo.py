"""chiasm demo: the whole of chiasm in two minutes, on images that it makes itself.

The one verb that is made of others: check the data, train, evaluate, and a picture to look at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.config import DemoConfig
from chiasm.errors import ChiasmError

if TYPE_CHECKING:
    from chiasm.results import Classification
    from chiasm.tasks.classify_metrics import Share
    from chiasm.verbs.evaluate import EvaluationResult

MODEL = "conformer_nano_patch8_64"
DATA = "scenes:size=64,count=4000,val=400,seed={seed}"
# Measured on scenes of another seed: those of the val split have chosen the best epoch.
FRESH = "scenes:size=64,count=9,val=400,seed={seed}"
BRANCHES = {"conv": "convolution", "tokens": "Transformer"}
PICTURE_ROWS, PICTURE_COLUMNS = 3, 6


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demonstration came to: the run folder, the picture, the report, and all that was measured."""

    run: Path
    picture: Path
    report: Path
    classes: int
    evaluation: EvaluationResult


def demo(**flags: Any) -> DemoResult:
    """Train a small Conformer on the built-in images, measure it, and draw some of its answers.

    The keyword arguments are the fields of `DemoConfig`. An interrupted demonstration goes on where it was.

    Raises:
        ChiasmError: when `out` holds something else, or a demonstration of another seed.
    """
    from chiasm.data import open_data
    from chiasm.engine.run_folder import RunFolder
    from chiasm.predictor import load
    from chiasm.verbs.evaluate import evaluate
    from chiasm.verbs.train import train

    config = DemoConfig.from_flags(**flags)
    out = Path(config.out)
    run = out / "run"
    if run.exists():
        trained = RunFolder.open(str(run))[1]
        if flags.get("seed") is not None and config.seed != trained.seed:
            raise ChiasmError(f"{out}: was made with --seed {trained.seed}; name another folder with --out.")
        config = replace(config, seed=trained.seed)  # or the images measured could be those that chose the epoch
        train(resume=str(run))
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ChiasmError(f"{out}: holds something else; name another folder with --out.")
    else:
        train(
            data=DATA.format(seed=config.seed), model=MODEL, recipe="quick", max_minutes=config.minutes,
            crop_scale=0.8,  # a smaller crop would cut arrangements apart
            seed=config.seed, out=str(run),
        )  # fmt: skip
    fresh = FRESH.format(seed=config.seed + 1)
    evaluation = evaluate(model=str(run), data=fresh, out=str(out))
    data = open_data(fresh)
    split = data.splits["val"]
    shown = range(0, len(split), max(1, len(split) // (PICTURE_ROWS * PICTURE_COLUMNS)))
    indices = list(shown)[: PICTURE_ROWS * PICTURE_COLUMNS]
    images = [split.read(i) for i in indices]
    picture = out / "demo.png"
    _draw(images, [data.classes[split.labels[i]] for i in indices], load(str(run))(images), picture)
    return DemoResult(
        run=run, picture=picture, report=out / "report.html", classes=len(data.classes), evaluation=evaluation
    )


def show(result: DemoResult, config: DemoConfig) -> int:
    """Print the table; returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    scores = result.evaluation.scores
    table = Table(title=f"What came out, on {scores.top1.count} images it has not seen")
    table.add_column("who answers")
    table.add_column("right", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_row("guessing", f"{1 / result.classes:.0%}")
    for branch in scores.branches:
        table.add_row(f"the {BRANCHES[branch.name]} branch's head", *_percent(branch.top1))
    table.add_row("the model (mean of both)", *_percent(scores.top1), style="bold")
    if scores.agreement is not None:
        table.add_row("  where both branches agree", *_percent(scores.agreement.when_agreed))
        table.add_row("  where they do not", *_percent(scores.agreement.when_not))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"picture  {result.picture}\nreport   {result.report}\nrun      {result.run}")
    console.print("next     chiasm train YOUR-PHOTOS/    (one sub-folder per class)")
    return 0


def _percent(share: Share) -> tuple[str, str]:
    if share.value is None or share.interval is None:
        return "no image", ""
    return f"{share.value:.0%}", f"{share.interval[0]:.0%} to {share.interval[1]:.0%}"


def _draw(images: list[Any], truths: list[str], answers: list[Classification], path: Path) -> None:
    """A grid of images, each with the answer and the branches' votes; a wrong answer is red and marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * PICTURE_COLUMNS, 2.9 * PICTURE_ROWS), layout="constrained", facecolor="white")
    for axes, image, truth, answer in zip(
        figure.subplots(PICTURE_ROWS, PICTURE_COLUMNS).flat, images, truths, answers, strict=True
    ):
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_axis_off()
        right = answer.label == truth
        verdict = f"{answer.label} {answer.score:.0%}" if right else f"✗ {answer.label} {answer.score:.0%}\nis {truth}"
        axes.set_title(verdict, fontsize=9, color="#00603c" if right else "#b00020", fontweight="bold")
        votes = "\n".join(f"{name}: {vote}" for name, vote in answer.votes.items())
        axes.text(0.5, -0.04, votes, transform=axes.transAxes, ha="center", va="top", fontsize=7.5, color="#333333")
    figure.suptitle("Each image: the model's answer, and what each branch said alone")
    figure.savefig(path, dpi=110)
