"""A study: several candidates trained with several seeds under one data order, recipe and budget.

Its folder holds a run folder for each candidate and seed with the measurements of its last epoch beside it, so a study
that was interrupted goes on, one whose candidates or seeds are more than before is added to, and what is there is never
trained twice.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console

from chiasm.config import CompareConfig, TrainConfig, read_yaml
from chiasm.data import ImageData, open_data
from chiasm.engine.build import build_model
from chiasm.engine.checks import check_data, check_settings
from chiasm.engine.interrupt import Interrupt
from chiasm.engine.run import run_training
from chiasm.engine.run_folder import FREE_ON_RESUME, RunFolder
from chiasm.engine.state import Stopwatch
from chiasm.errors import ChiasmError, InterruptedRunError, UnknownNameError, first_line, nearest
from chiasm.evaluation.classify import Answers
from chiasm.measure import Cost, Times, count_macs, interleaved, timed
from chiasm.model_file import preprocess_of
from chiasm.models import is_model, list_models
from chiasm.models.coupled import split_name
from chiasm.models.sketch import shapes_only
from chiasm.models.widen import widened
from chiasm.predictor import load
from chiasm.report.comparison import Outcome
from chiasm.report.html import write_text

# Settings of train that belong to the study: no candidate has its own.
OF_THE_STUDY = frozenset(
    {"data", "task", "model", "model_args", "out", "resume", "seed", "epochs", "max_minutes", "keep", "val_fraction",
     "image_size", "precision", "accelerator", "devices", "num_nodes", "strategy", "loggers", "recipe",
     "early_stopping"}
)  # fmt: skip
RESULT, SPEED = "result.json", "speed.json"
LONGEST = 120  # bytes of a folder's name
READING = 2e7  # MACs that take about as long as reading an image
SPEED_BATCH, SPEED_WARM, SPEED_ROUNDS, SPEED_SECONDS = 8, 2, 15, 60.0
UNITS = {"ep": "epochs", "m": "minutes", "h": "hours", "tf": "TFLOP"}
LABELS = {"params": "parameters", "macs": "MACs"}
DEVICES = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "mps": "mps"}  # Lightning's name: PyTorch's


# ------------------------------------------------------------------------------------------------ what is to be trained


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One entry of `--models`: NAME[,key=value ...].

    Attributes:
        label: what it is called in tables: `as=`, or the entry itself with paths made short.
        model: architecture's name.
        model_args: arguments of the architecture.
        settings: settings of `train` that only this candidate has.
    """

    label: str
    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def coupled(self) -> tuple[str, str] | None:
        """The names of the two networks that it joins; None where it joins none."""
        found = split_name(self.model)
        return found and found[:2]

    @classmethod
    def parse(cls, entry: str) -> Candidate:
        """Read an entry of `--models`.

        Raises:
            ChiasmError: for an entry that is no name with key=value pairs, or a setting that is the study's.
            UnknownNameError: for an unknown architecture, with the nearest.
        """
        name, *pairs = _split_outside_brackets(entry)
        for part in (split_name(name) or (name,))[:2]:
            if not is_model(part):
                raise UnknownNameError("model", part, list_models(all=True), "See 'chiasm models --all'.")
        of_train = {f.name for f in fields(TrainConfig)}
        label, model_args, settings, told = "", {}, {}, [name]
        for pair in pairs:
            key, equals, text = (piece.strip() for piece in pair.partition("="))
            if not equals or not key.isidentifier():
                raise ChiasmError(f"'{entry}': expected NAME,key=value,key=value ..., saw '{pair.strip()}'.")
            if key in OF_THE_STUDY:
                raise ChiasmError(f"'{entry}': {key} is the same for all candidates, so none has its own.")
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ChiasmError(f"'{entry}': {key} is not a YAML value.") from error
            if key == "as":
                label = text
            elif key in of_train:
                settings[key] = value
            else:
                model_args[key] = value
            told.append(f"{key}={re.sub(r'[^=,]*/', '', text)}")
        return cls(label=label or ",".join(told), model=name, model_args=model_args, settings=settings)


def _split_outside_brackets(text: str) -> list[str]:
    """At commas that are not within brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter in "'\"" and quote in ("", letter):
            quote = "" if quote else letter
        depth += not quote and (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


@dataclass(frozen=True)
class Budget:
    """What each candidate may spend on training: epochs, minutes of wall time, or TFLOP."""

    amount: float
    kind: Literal["epochs", "minutes", "TFLOP"]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """'20ep', '10m', '1.5h' or '300tf'.

        Raises:
            ChiasmError: for anything else.
        """
        units = r"(ep)(?:ochs?)?|(m)(?:in(?:utes?)?)?|(h)(?:ours?)?|(tf)(?:lop)?"
        found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*(?:{units})\s*", text.lower())
        unit = found and next(filter(None, found.groups()[1:]))
        if not found or not unit or not float(found[1]) or (unit == "ep" and float(found[1]) % 1):
            raise ChiasmError(f"--budget '{text}': expected such as 20ep (epochs), 10m, 1.5h, or 300tf (TFLOP).")
        amount, kind = float(found[1]), UNITS[unit]
        return cls(amount * 60, "minutes") if kind == "hours" else cls(amount, kind)  # type: ignore[arg-type]

    def settings(self, cost: Cost, images: int, label: str) -> dict[str, Any]:
        """The settings of `train` that spend it on a network of that cost and as many training images.

        Raises:
            ChiasmError: where it is less than one epoch.
        """
        if self.kind == "minutes":
            return {"max_minutes": self.amount}
        if self.kind == "epochs":
            return {"epochs": int(self.amount)}
        epoch = cost.training_tflop(images)
        if self.amount < epoch:
            raise ChiasmError(
                f"--budget {self.amount:g}tf is less than one epoch of {label}, which takes {epoch:.1f} TFLOP."
            )
        return {"epochs": int(self.amount / epoch)}

    def __str__(self) -> str:
        return f"{self.amount:g} {self.kind.removesuffix('s') if self.amount == 1 else self.kind}"


# ------------------------------------------------------------------------------------------------------------ the study


class Study:
    """The candidates with their costs, the folder, and what has been measured so far.

    Args:
        config: the settings.

    Raises:
        ChiasmError: for candidates, a budget or settings that cannot be, or a folder of another study.
        DataError: for data that cannot be trained on.
    """

    def __init__(self, config: CompareConfig) -> None:
        if config.seeds < 1:
            raise ChiasmError(f"--seeds {config.seeds}: expected 1 or more.")
        if taken := sorted((OF_THE_STUDY - {"val_fraction"}) & set(config.train_args)):
            raise ChiasmError(f"--train-args: {taken[0]} is not set there; see 'chiasm compare --help'.")
        self.notes: list[str] = []
        self.config = config
        self.budget = Budget.parse(config.budget)
        self.candidates = [Candidate.parse(entry) for entry in config.models]
        _refuse_twice([candidate.label for candidate in self.candidates])
        if len(self.candidates) < 2:
            raise ChiasmError("--models: there is nothing to compare; name two candidates or more.")
        self.data = self._open(0)
        self.data.need("classify")
        check_data(self.data)
        self.train_images, self.val_images = len(self.data.splits["train"]), len(self.data.splits["val"])
        self.folder = Path(config.out or f"runs/compare-{_slug(self.data.name)}")
        self.costs = {candidate.label: self._cost(candidate) for candidate in self.candidates}
        if config.match != "none":
            self._add_widened(config.match)
        for candidate in self.candidates:
            self.plan(candidate, 0)  # what cannot be is told before anything is written
        self.outcomes: dict[str, list[Outcome]] = {candidate.label: [] for candidate in self.candidates}
        self.failures: dict[tuple[str, int], str] = {}
        self._claim_folder()
        self._check_begun()

    @property
    def reference(self) -> Candidate:
        """Whom the others are compared with: the best network alone, or where there is none the first candidate."""
        found = self.outcomes
        measured = [c for c in self.candidates if found[c.label]]
        alone = [c for c in measured if not self.joins(c)]
        if not alone:
            return max(measured or self.candidates, key=lambda c: len(found[c.label]))
        most = max(len(found[c.label]) for c in alone)
        whole = [c for c in alone if len(found[c.label]) == most]  # one lucky seed is no reference
        return max(whole, key=lambda c: sum(o.top1 for o in found[c.label]))

    def joins(self, candidate: Candidate) -> bool:
        """Whether it joins two branches: a coupled model, or one that has been seen to answer with more than one."""
        return candidate.coupled is not None or any(o.branches for o in self.outcomes[candidate.label])

    # ---------------------------------------------------------------------------------------------------------- running

    def runs(self) -> Iterator[tuple[Candidate, int]]:
        """All runs, seeds outermost: stopped early, what is there still compares like with like."""
        for seed in range(self.config.seeds):
            for candidate in self.candidates:
                yield candidate, seed

    def _check_begun(self) -> None:
        """Raise `ChiasmError` where a run that is there was begun with other settings than its candidate has now."""
        for candidate, seed in self.runs():
            folder = self._folder(candidate, seed)
            if (folder / "config.yaml").is_file():
                begun, now = RunFolder.open(str(folder))[1].to_dict(), self.plan(candidate, seed).to_dict()
                changed = (n for n in now if n not in FREE_ON_RESUME | {"out"} and begun[n] != now[n])
                if name := next(changed, None):
                    raise ChiasmError(
                        f"{folder} was trained with another {name}; give the candidate another name with as=."
                    )

    def is_done(self, candidate: Candidate, seed: int) -> bool:
        """Whether that run has been measured."""
        return (self._folder(candidate, seed) / RESULT).is_file()

    def weight(self, candidate: Candidate) -> float:
        """What a run takes in proportion to the others, for the time left."""
        if self.budget.kind == "minutes":
            return self.budget.amount
        return self.plan(candidate, 0).epochs * (self.costs[candidate.label].macs + READING)

    def run(
        self, candidate: Candidate, seed: int, interrupt: Interrupt, report: Callable[[float, str], None]
    ) -> Outcome | None:
        """Train and measure one candidate with one seed, or take what is there; None and an entry in `failures` where
        it fails.

        Raises:
            InterruptedRunError: after Ctrl-C or SIGTERM, with everything saved.
        """
        folder = self._folder(candidate, seed)
        plan = self.plan(candidate, seed)
        try:
            if not self.is_done(candidate, seed):
                self._train(folder, plan, interrupt, report)
                self._measure(folder, plan)
            outcome = Outcome(**json.loads((folder / RESULT).read_text(encoding="utf-8")))
        except InterruptedRunError:
            raise
        except Exception as error:  # one candidate's failure is a line of the report, not the end of the others
            known = isinstance(error, ChiasmError)
            self.failures[candidate.label, seed] = f"{'' if known else type(error).__name__ + ': '}{first_line(error)}"
            if not known and folder.is_dir():
                (folder / "failure.txt").write_text(traceback.format_exc(), encoding="utf-8")
            return None
        self.outcomes[candidate.label].append(outcome)
        return outcome

    def _train(
        self, folder: Path, plan: TrainConfig, interrupt: Interrupt, report: Callable[[float, str], None]
    ) -> None:
        begun = (folder / "config.yaml").is_file()
        run = RunFolder.open(str(folder))[0] if begun else None
        quiet = Console(quiet=True)
        run_training(
            replace(plan, out=str(folder)), run, watch=Stopwatch(), interrupt=interrupt, console=quiet, report=report
        )

    def _measure(self, folder: Path, plan: TrainConfig) -> None:
        """Classify the validation images and write down which are right."""
        predictor, seed = load(folder, device=self.device), plan.seed
        split = self._open(seed).split("val")
        metrics, right = predictor.task.metrics(), ["-"] * len(split)
        for index, result in Answers(predictor, split, batch_size=plan.batch_size, workers=plan.workers):
            metrics.update([result], [split.labels[index]])
            right[index] = str(int(result.label == result.labels[split.labels[index]]))
        scores = metrics.compute()
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        outcome = Outcome(
            seed=seed,
            top1=scores.top1.value or 0.0,
            branches={branch.name: branch.top1.value or 0.0 for branch in scores.branches},
            agreement=scores.agreement.share.value if scores.agreement else None,
            ece=scores.calibration.ece,
            epochs=len(rows),
            minutes=sum(float(row["seconds"]) for row in rows) / 60,
            images=summary["images"],
            right="".join(right),
            curve=[float(row["val_top1"]) for row in rows],
        )
        write_text(folder / RESULT, json.dumps(asdict(outcome)))

    def images_per_second(self) -> dict[str, float]:
        """How many images each trained network classifies a second, in the form that `predict` uses: batches of
        `SPEED_BATCH` in interleaved rounds. Measured once, and again where candidates were added."""
        trained = {c.label: self._folder(c, o[0].seed) for c in self.candidates if (o := self.outcomes[c.label])}
        file = self.folder / SPEED
        if file.is_file() and (found := json.loads(file.read_text(encoding="utf-8"))).keys() >= trained.keys():
            return found
        works: dict[str, Callable[[], float]] = {}
        for label, folder in trained.items():
            try:
                predictor = load(folder, device=self.device)
            except ChiasmError as error:
                self.notes.append(f"The speed of {label} was not measured: {error}")
                continue
            preprocess = predictor.info.preprocess
            images = torch.zeros(SPEED_BATCH, len(preprocess.mean), *preprocess.size)

            works[label] = timed(partial(predictor.answer, images, [""] * SPEED_BATCH))
        seconds: dict[str, list[float]] = {label: [] for label in works}
        watch = Stopwatch()
        for number, found in enumerate(islice(interleaved(works), SPEED_WARM + SPEED_ROUNDS)):
            for label, outcome in found.items():
                if isinstance(outcome, InterruptedRunError):
                    raise outcome
                if isinstance(outcome, Exception):
                    self.notes.append(f"The speed of {label} was not measured: {first_line(outcome)}")
                    seconds.pop(label)
                elif number >= SPEED_WARM:
                    seconds[label].append(outcome)
            if watch.seconds > SPEED_SECONDS and number >= SPEED_WARM:
                break
        speeds = {label: SPEED_BATCH / Times(tuple(values)).median for label, values in seconds.items()}
        write_text(file, json.dumps(speeds))
        return speeds

    # -------------------------------------------------------------------------------------------------------- preparing

    def _folder(self, candidate: Candidate, seed: int) -> Path:
        return self.folder / f"{_slug(candidate.label)}-{seed}"

    def _open(self, seed: int) -> ImageData:
        return open_data(self.config.data, val_fraction=self.config.train_args.get("val_fraction", 0.2), seed=seed)

    @property
    def device(self) -> str:
        """Where trained networks are measured: as PyTorch calls what they are trained on."""
        return DEVICES.get(self.config.accelerator, "auto")

    def plan(self, candidate: Candidate, seed: int) -> TrainConfig:
        """The settings of one run."""
        cost = self.costs[candidate.label]
        return self._plan(candidate, seed, **self.budget.settings(cost, self.train_images, candidate.label))

    def _plan(self, candidate: Candidate, seed: int, **budget: Any) -> TrainConfig:
        config = self.config
        given = {
            **config.train_args, **candidate.settings, **budget,
            "data": config.data, "model": candidate.model, "model_args": candidate.model_args,
            "recipe": config.recipe, "image_size": config.image_size, "precision": config.precision, "seed": seed,
            "task": "classify", "keep": "last", "accelerator": config.accelerator, "devices": "1", "loggers": [],
        }  # fmt: skip
        plan = TrainConfig.from_flags(**given)
        check_settings(plan)
        return plan

    def _cost(self, candidate: Candidate) -> Cost:
        """What one image costs; the network is built once, so what cannot be is refused before anything is trained."""
        try:
            plan = self._plan(candidate, 0)
            model = build_model(plan, len(self.data.classes), load=False)[0].eval()
            return _cost_of(model, plan)
        except ChiasmError as error:
            hint = "".join(
                f" Of train there is '{near[0]}'; did you mean that in place of '{name}'?"
                for name in candidate.model_args
                if (near := nearest(name, (f.name for f in fields(TrainConfig))))
            )
            raise ChiasmError(f"{candidate.label}: {error}{hint}") from error
        except Exception as error:  # whatever a network says to arguments that do not go together
            what = f"{type(error).__name__}: {first_line(error)}"
            raise ChiasmError(f"{candidate.label} cannot be built or run ({what}).") from error

    def _add_widened(self, measure: Literal["params", "macs"]) -> None:
        """Beside each network that is part of a coupled candidate, itself as wide as the dearest of them costs."""
        joined = [candidate for candidate in self.candidates if candidate.coupled]
        for candidate in [c for c in self.candidates if not c.coupled]:
            targets = [self.costs[c.label] for c in joined if c.coupled and candidate.model in c.coupled]
            if not targets:
                continue
            target = max((cost.macs if measure == "macs" else cost.parameters) for cost in targets)
            plan = self._plan(candidate, 0)
            if plan.weights or plan.pretrained:
                self.notes.append(f"{candidate.label} is not widened: it starts from weights, which no wider one has.")
                continue

            def build(arguments: dict[str, Any], plan: TrainConfig = plan) -> torch.nn.Module:
                wider = replace(plan, model_args=plan.model_args | arguments)
                with shapes_only():
                    return build_model(wider, len(self.data.classes), load=False)[0].eval()

            def cost(model: torch.nn.Module, plan: TrainConfig = plan) -> float:
                with shapes_only():
                    found = _cost_of(model, plan)
                return found.macs if measure == "macs" else found.parameters

            try:
                arguments = widened(candidate.model, build, cost, target)
            except ChiasmError as error:
                self.notes.append(str(error))
                continue
            wide = replace(
                candidate,
                label=f"{candidate.label}, widened to {target / 1e6:.0f} M {LABELS[measure]}",
                model_args=candidate.model_args | arguments,
            )
            self.candidates.append(wide)
            self.costs[wide.label] = self._cost(wide)
        _refuse_twice([candidate.label for candidate in self.candidates])

    def _claim_folder(self) -> None:
        """Make the study's folder, or make sure that the one there is of the same study.

        Raises:
            ChiasmError: where it holds something else, or a study of other settings.
        """
        file = self.folder / "study.yaml"
        fixed = ("recipe", "image_size", "precision", "train_args")
        own = {name: value for name, value in self.config.to_dict().items() if name in fixed}
        own |= {"budget": str(self.budget), "fingerprint": self.data.fingerprint()}
        if any(self.folder.glob("*/checkpoints/last.ckpt")) and file.is_file():
            before = read_yaml(file)
            for name, value in own.items():
                if before.get(name) != value:
                    saw = f"{name} {before.get(name)}, not {value}" if name != "fingerprint" else "other images"
                    raise ChiasmError(f"{self.folder}: a study with {saw}; name another folder with --out.")
            return
        try:
            if self.folder.is_dir() and any(self.folder.iterdir()) and not file.is_file():
                raise ChiasmError(f"{self.folder}: holds something else; name another folder with --out.")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(file, yaml.safe_dump(own, sort_keys=False))
        except OSError as error:
            raise ChiasmError(f"{self.folder}: cannot be written ({error.strerror}); choose --out.") from error


def _cost_of(model: torch.nn.Module, plan: TrainConfig) -> Cost:
    preprocess = preprocess_of(model, plan.image_size)
    _, macs = count_macs(model, torch.zeros(1, len(preprocess.mean), *preprocess.size))
    return Cost(parameters=sum(p.numel() for p in model.parameters()), macs=macs[""])


def _refuse_twice(labels: list[str]) -> None:
    slugs = [_slug(label) for label in labels]
    twice = next((label for label, slug in zip(labels, slugs, strict=True) if slugs.count(slug) > 1), None)
    if twice is not None:
        raise ChiasmError(f"--models: '{twice}' is there twice; tell them apart with as=NAME.")


def _slug(label: str) -> str:
    """As a folder's name; a long one is cut and told apart by a digest."""
    slug = re.sub(r"[^\w.+-]+", "-", label).strip("-")
    if len(slug.encode()) <= LONGEST:
        return slug
    return f"{slug[: LONGEST // 4]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
