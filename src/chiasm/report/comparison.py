"""A comparison for people to read: what each candidate reached and cost, whether that can be luck, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chiasm import __version__
from chiasm.measure import Cost
from chiasm.paired import Difference, compare_paired, holm, over_seeds
from chiasm.report.html import Card, Html, Page, cards, details, figure, note, table, text
from chiasm.report.plots import BLUE, GREEN, INK, LINE, MUTED, PURPLE, VERMILION, as_written, dress

SIGNIFICANT = 0.05
JOINED, ALONE = VERMILION, BLUE


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run, measured after its last epoch.

    Attributes:
        seed: of weights, order and augmentation.
        top1: share of the validation images that it classifies rightly, 0..1.
        branches: each branch's own, by name; empty for one answer.
        agreement: share on which the branches vote for one class; None for one answer.
        ece: expected calibration error, 0..1.
        epochs, minutes: of training, validation included.
        images: training images seen.
        right: a letter for each validation image: '1' right, '0' wrong, '-' not readable.
        curve: validation top-1 after each epoch.
    """

    seed: int
    top1: float
    branches: dict[str, float]
    agreement: float | None
    ece: float
    epochs: int
    minutes: float
    images: int
    right: str
    curve: list[float]

    @property
    def correct(self) -> list[float]:
        """`right` as numbers, NaN where an image could not be read."""
        return [{"1": 1.0, "0": 0.0}.get(letter, float("nan")) for letter in self.right]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A candidate with all that came of it.

    Attributes:
        label: what it is called.
        model, model_args: what it is.
        settings: settings of `train` that only it had.
        joins: the names of the networks that it joins, or of its branches; empty for a network alone.
        cost: weights and multiply-accumulates of an image.
        outcomes: one for each seed that came to its end.
        failures: by seed, why a run did not.
        images_per_second: of inference; None where none came to its end.
    """

    label: str
    model: str
    model_args: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    joins: tuple[str, ...]
    cost: Cost
    outcomes: tuple[Outcome, ...]
    failures: dict[int, str] = field(default_factory=dict)
    images_per_second: float | None = None

    @property
    def top1(self) -> float:
        """The mean over the seeds, 0..1; NaN where none came to its end."""
        return self.mean(lambda outcome: outcome.top1)

    def mean(self, value: Callable[[Outcome], float]) -> float:
        return mean(map(value, self.outcomes)) if self.outcomes else float("nan")

    @property
    def branches(self) -> dict[str, float]:
        """Each branch's own accuracy, averaged over the seeds."""
        names = self.outcomes[0].branches if self.outcomes else {}
        return {name: mean(outcome.branches[name] for outcome in self.outcomes) for name in names}

    @property
    def parts(self) -> tuple[dict[str, Any], ...]:
        """Of a coupled model the arguments of its two networks."""
        return tuple(self.model_args.get(name, {}) for name in ("conv_args", "tokens_args"))

    def beside(self, other: Entry) -> Entry:
        """It with the seeds that both have."""
        seeds = {outcome.seed for outcome in other.outcomes}
        return replace(self, outcomes=tuple(outcome for outcome in self.outcomes if outcome.seed in seeds))

    def above(self, other: Entry) -> Difference | None:
        """How far it is above another, over the seeds that both have; None where they have none."""
        ours, theirs = ([outcome.correct for outcome in e.outcomes] for e in (self.beside(other), other.beside(self)))
        return compare_paired(ours, theirs) if ours else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that was found, and how.

    Attributes:
        entries: the candidates, in the order they were named.
        reference: the label of the one that all others are compared with.
        data: what it was trained and measured on.
        train_images, val_images: how many.
        budget, recipe: of each run, in words.
        seeds: how many were asked for.
        machine, command, date: where, how and when the last of it was done.
        notes: what a reader must know besides.
    """

    entries: tuple[Entry, ...]
    reference: str
    data: str
    train_images: int
    val_images: int
    budget: str
    recipe: str
    seeds: int
    machine: dict[str, Any]
    command: str
    date: str
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> list[Entry]:
        """The candidates that came to an end with one seed or more."""
        return [entry for entry in self.entries if entry.outcomes]

    def entry(self, label: str) -> Entry:
        return next(entry for entry in self.entries if entry.label == label)

    def tests(self) -> dict[str, tuple[Difference, float]]:
        """By label how far each candidate is above the reference, with its p-value after Holm's correction."""
        reference = self.entry(self.reference)
        found = {e.label: d for e in self.measured if e is not reference and (d := e.above(reference)) is not None}
        corrected = holm([difference.p for difference in found.values()])
        return {label: (found[label], p) for label, p in zip(found, corrected, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; accuracies are 0..1, differences likewise."""
        tests = self.tests()
        return {
            "verdict": list(verdict(self)),
            **{name: value for name, value in asdict(self).items() if name != "entries"},
            "candidates": [_plain(entry, tests.get(entry.label)) for entry in self.entries],
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each run, for a spreadsheet."""
        return [
            {
                "candidate": entry.label, "seed": outcome.seed, "top1": outcome.top1,
                **{f"top1_{name}": outcome.branches.get(name) for name in self.branch_names()},
                "agreement": outcome.agreement, "ece": outcome.ece, "epochs": outcome.epochs,
                "minutes": outcome.minutes, "training_tflop": entry.cost.training_tflop(outcome.images),
                "parameters": entry.cost.parameters, "macs": entry.cost.macs,
                "images_per_second": entry.images_per_second,
            }
            for entry in self.entries
            for outcome in entry.outcomes
        ]  # fmt: skip

    def branch_names(self) -> list[str]:
        return list(dict.fromkeys(name for entry in self.measured for name in entry.branches))


def _plain(entry: Entry, test: tuple[Difference, float] | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        "label": entry.label,
        "model": entry.model,
        "model_args": entry.model_args,
        "settings": entry.settings,
        "joins": list(entry.joins),
        **asdict(entry.cost),
        "images_per_second": entry.images_per_second,
        "failures": {str(seed): reason for seed, reason in entry.failures.items()},
        "runs": [{k: v for k, v in asdict(outcome).items() if k != "right"} for outcome in entry.outcomes],
    }
    if entry.outcomes:
        values["top1"] = asdict(over_seeds([outcome.top1 for outcome in entry.outcomes]))
    if test is not None:
        values["above_reference"] = {**asdict(test[0]), "p_holm": test[1]}
    return values


# ---------------------------------------------------------------------------------------------------- in plain language


def verdict(result: Comparison) -> Iterator[str]:
    """What was found, a sentence or two each, the answer first."""
    tests = result.tests()
    if not tests:
        yield "Fewer than two candidates came to their end with a seed in common, so there is nothing to compare."
        return
    reference = result.entry(result.reference)
    compared = sorted((e for e in result.measured if e.label in tests), key=lambda entry: -entry.top1)
    joined = [entry for entry in compared if entry.joins]
    if joined and not reference.joins:
        best, *others = joined
        yield f"{_answer(*tests[best.label])} {_against(best, reference, tests)}"
        yield from (
            f"More than chance: {_against(other, reference, tests)}"
            for other in others
            if tests[other.label][1] < SIGNIFICANT <= tests[best.label][1] and tests[other.label][0].mean > 0
        )
    else:
        yield _against(compared[0], reference, tests)
    for one in joined:
        yield from _exchange(one, joined)
    for one in joined:
        yield from _branch_inside(one, result.measured)
    if result.seeds == 1:
        yield (
            "One seed: the intervals are about other images of the same kind. Another seed may move each accuracy by a "
            "point or more, so run three before you rely on a small difference."
        )


def _answer(difference: Difference, p: float) -> str:
    if p >= SIGNIFICANT:
        return "Fusing makes no difference here that could be told from chance. The best coupled network:"
    if difference.mean > 0:
        return "Fusing helps here. The best coupled network:"
    return "Fusing does not pay here. Even the best coupled network:"


def _against(entry: Entry, reference: Entry, tests: dict[str, tuple[Difference, float]]) -> str:
    """One beside the reference: accuracies over the seeds that both have, the difference, the price."""
    difference, p = tests[entry.label]
    own, their = entry.beside(reference), reference.beside(entry)
    correction = f" after Holm's correction for {len(tests)} comparisons" if len(tests) > 1 else ""
    side = "above" if difference.mean >= 0 else "below"
    gap = f"{100 * abs(difference.mean):.1f} ± {100 * difference.half:.1f} points (p {_p(p)}{correction}) {side}"
    who = "" if reference.joins else "the best network alone, "
    return f"{entry.label} ({own.top1:.1%}) is {gap} {who}{reference.label} ({their.top1:.1%}), {_price(own, their)}."


def _exchange(mid: Entry, joined: Sequence[Entry]) -> Iterator[str]:
    """What exchanging is worth: mid beside late, of the same two networks."""
    if not mid.model.endswith(":mid"):
        return
    same = (e for e in joined if e.model == f"{mid.model.removesuffix('mid')}late" and e.parts == mid.parts)
    late = next(same, None)
    if late is not None and (difference := mid.above(late)) is not None:
        yield (
            f"The exchange itself, {mid.label} against {late.label}, where both networks run side by side without any: "
            f"{_points(difference)} points."
        )


def _branch_inside(joined: Entry, measured: Sequence[Entry]) -> Iterator[str]:
    """What a branch gains by exchanging: its own head beside the same network trained by itself."""
    if not joined.model.endswith(":mid"):
        return
    for branch, name, args in zip(("conv", "tokens"), joined.joins, joined.parts, strict=False):
        alone = next((e for e in measured if e.model == name and e.model_args == args), None)
        if branch in joined.branches and alone is not None:
            own, their = joined.beside(alone), alone.beside(joined)
            if not own.outcomes:
                continue
            gain = 100 * (own.branches[branch] - their.top1)
            yield (
                f"In {joined.label} the {branch} branch's own head reaches {own.branches[branch]:.1%}, "
                f"{abs(gain):.1f} points {'more' if gain >= 0 else 'less'} than {alone.label} trained by itself."
            )


def _price(entry: Entry, reference: Entry) -> str:
    """What it costs in proportion to the reference."""
    parts = [_times(entry.cost.macs / max(1, reference.cost.macs), "MACs")]
    if entry.images_per_second and reference.images_per_second:
        parts.append(_times(reference.images_per_second / entry.images_per_second, "time an image"))
    minutes = entry.mean(lambda o: o.minutes) / max(1e-9, reference.mean(lambda o: o.minutes))
    return f"for {', '.join(parts)} and {_times(minutes, 'training time')}"


def _times(ratio: float, what: str) -> str:
    if not 0.5 < ratio < 2:
        return f"{ratio:.1f} times the {what}"
    share = round(100 * abs(ratio - 1))
    return f"{share} % {'more' if ratio > 1 else 'less'} {what}" if share else f"the same {what}"


def _points(difference: Difference) -> str:
    return f"{100 * difference.mean:+.1f} ± {100 * difference.half:.1f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"


# --------------------------------------------------------------------------------------------------------------- tables

HEADERS = (
    "candidate", "top-1", "each seed", "against the reference", "p", "params, M", "MACs, M", "images/s", "train, min",
    "train, TFLOP", "epochs",
)  # fmt: skip
IN_SHORT = (0, 1, 3, 4, 6, 7, 8)  # of these, what fits into a terminal


def cells(result: Comparison) -> Iterator[list[str]]:
    """The rows of the table, a text for each of `HEADERS`."""
    tests = result.tests() if len(result.measured) > 1 else {}
    for entry in result.entries:
        cost = [f"{entry.cost.parameters / 1e6:.2f}", f"{entry.cost.macs / 1e6:,.0f}"]
        if not entry.outcomes:
            yield [entry.label, "failed", "", "", "", *cost, "", "", "", ""]
            continue
        over = over_seeds([outcome.top1 for outcome in entry.outcomes])
        top1 = f"{over.mean:.1%}" + ("" if over.half is None else f" ± {100 * over.half:.1f}")
        difference = "reference" if entry.label == result.reference else ""
        p = ""
        if entry.label in tests:
            found, corrected = tests[entry.label]
            few = f" ({found.seeds} of {result.seeds} seeds)" if found.seeds < result.seeds else ""
            difference, p = _points(found) + few, _p(corrected).removeprefix("= ")
        epochs = sorted({outcome.epochs for outcome in entry.outcomes})
        yield [
            entry.label,
            top1,
            " ".join(f"{100 * outcome.top1:.1f}" for outcome in entry.outcomes),
            difference,
            p,
            *cost,
            "" if entry.images_per_second is None else f"{entry.images_per_second:,.0f}",
            f"{entry.mean(lambda o: o.minutes):.1f}",
            f"{entry.cost.training_tflop(1) * entry.mean(lambda o: o.images):,.0f}",
            " to ".join(map(str, dict.fromkeys((epochs[0], epochs[-1])))),
        ]


BRANCH_HEADERS = ("candidate", "branches' own top-1", "they agree on", "calibration error")


def branch_cells(result: Comparison) -> Iterator[list[str]]:
    """How the answers come about: each branch's own, agreement, calibration; a text for each of `BRANCH_HEADERS`."""
    for entry in result.measured:
        agreements = [outcome.agreement for outcome in entry.outcomes if outcome.agreement is not None]
        yield [
            entry.label,
            ", ".join(f"{name} {value:.1%}" for name, value in entry.branches.items()) or "one answer",
            f"{mean(agreements):.1%}" if agreements else "",
            f"{entry.mean(lambda outcome: outcome.ece):.1%}",
        ]


def method(result: Comparison) -> Iterator[str]:
    """How it was measured, in sentences."""
    yield (
        f"Every candidate was trained on the same {result.train_images:,} images of {result.data} in the same order, "
        f"with the recipe '{result.recipe}' and a budget of {result.budget}, once with each seed, and measured on "
        f"{result.val_images:,} validation images after its last epoch: no epoch was chosen by its accuracy."
    )
    for entry in result.entries:
        if entry.settings:
            own = ", ".join(f"{name} {value}" for name, value in entry.settings.items())
            yield f"{entry.label} had settings of its own: {own}."
    yield (
        "'top-1' is the mean over the seeds with Student's 95 % interval. Differences are paired by seed and image; "
        "their 95 % intervals cover other seeds and other images of the same kind (of one seed, other images "
        "alone). p, unlike the intervals, is corrected after Holm for the number of candidates that are compared."
    )
    if not result.entry(result.reference).joins:
        yield "The reference is the best network alone, chosen on these same images, which favours it a little."
    yield (
        "MACs are multiply-accumulates of one image; training is counted as three times as many for each image seen. "
        "images/s is inference as `chiasm predict` does it, in batches of 8, measured in interleaved rounds."
    )
    yield from result.notes


def failures(result: Comparison) -> list[str]:
    """What did not come to its end, a sentence each."""
    return [
        f"{entry.label}, seed {seed}: {reason}" for entry in result.entries for seed, reason in entry.failures.items()
    ]


# -------------------------------------------------------------------------------------------------------------- figures


def _colour(entry: Entry) -> str:
    return JOINED if entry.joins else ALONE


def accuracy_figure(result: Comparison) -> Figure:
    """A dot for each seed, a bar for the mean: the spread is seen beside the differences."""
    entries = result.measured
    drawing = Figure(figsize=(8, 0.9 + 0.36 * len(entries)), layout="constrained")
    axes = drawing.subplots()
    for place, entry in enumerate(entries):
        values = [100 * outcome.top1 for outcome in entry.outcomes]
        axes.plot([100 * entry.top1] * 2, [place - 0.28, place + 0.28], color=_colour(entry), linewidth=2.5)
        axes.plot(values, [place] * len(values), "o", color=_colour(entry), alpha=0.6, markersize=5)
        for (name, value), mark in zip(entry.branches.items(), "^vs", strict=False):
            axes.plot([100 * value], [place], mark, color=MUTED, markersize=5, fillstyle="none", label=f"{name} head")
    axes.set_yticks(range(len(entries)), [as_written(entry.label) for entry in entries], fontsize=8)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.axvline(100 * result.entry(result.reference).top1, color=MUTED, linewidth=0.8, linestyle=":")
    dress(axes, x="val top-1, %: a dot for each seed, a bar for their mean")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        unique = dict(zip(labels, handles, strict=True))
        drawing.legend(
            unique.values(), unique.keys(), frameon=False, fontsize=8, labelcolor=MUTED, ncols=len(unique),
            loc="outside upper right",
        )  # fmt: skip
    return drawing


# title, unit: what an entry costs, None where it is not known
PRICES: dict[tuple[str, str], Callable[[Entry], float | None]] = {
    ("Compute", "MACs of an image, millions"): lambda e: e.cost.macs / 1e6,
    ("Size", "parameters, millions"): lambda e: e.cost.parameters / 1e6,
    ("Speed", "ms an image"): lambda e: 1e3 / e.images_per_second if e.images_per_second else None,
    ("Training", "minutes a run"): lambda e: e.mean(lambda o: o.minutes),
}


def pareto_figure(result: Comparison) -> Figure:
    """Accuracy against each kind of cost; on the line, the candidates that none is better and cheaper than."""
    entries = result.measured
    drawing = Figure(figsize=(9, 5.8 + 0.16 * len(entries)), layout="constrained")
    for axes, ((title, unit), price) in zip(drawing.subplots(2, 2).flat, PRICES.items(), strict=True):
        points = [(cost, 100 * e.top1, str(i + 1), _colour(e)) for i, e in enumerate(entries) if (cost := price(e))]
        front = _front([(x, y) for x, y, *_ in points])
        axes.step([x for x, _ in front], [y for _, y in front], where="post", color=MUTED, linewidth=1, linestyle=":")
        for x, y, number, colour in points:
            axes.plot([x], [y], "o", color=colour, markersize=6)
            axes.annotate(number, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, color=INK)
        dress(axes, title=title, x=unit, y="val top-1, %")
        axes.grid(color=LINE, linewidth=0.6)
        axes.margins(0.12)
    key = "\n".join(f"{i + 1}  {as_written(entry.label)}" for i, entry in enumerate(entries))
    drawing.legend(
        handles=[drawing.axes[0].plot([], [], " ", label=key)[0]], loc="outside lower left", frameon=False, fontsize=8,
        labelcolor=INK, handlelength=0, handletextpad=0,
    )  # fmt: skip
    return drawing


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, value), those that no other has at less cost, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def curves_figure(result: Comparison) -> Figure:
    """Validation accuracy over the epochs, the mean over the seeds, with the range between them."""
    drawing = Figure(figsize=(8, 4), layout="constrained")
    axes = drawing.subplots()
    styles = [(line, colour) for line in ("-", "--", ":") for colour in (BLUE, VERMILION, GREEN, PURPLE, INK)]
    for entry, (line, colour) in zip(result.measured, styles * len(result.measured), strict=False):
        length = min(len(outcome.curve) for outcome in entry.outcomes)
        by_epoch = [[100 * outcome.curve[i] for outcome in entry.outcomes] for i in range(length)]
        epochs = range(1, length + 1)
        axes.plot(
            epochs,
            [mean(v) for v in by_epoch],
            line,
            color=colour,
            linewidth=1.6,
            marker="o",
            markersize=3,
            label=as_written(entry.label),
        )
        axes.fill_between(
            epochs, [min(v) for v in by_epoch], [max(v) for v in by_epoch], color=colour, alpha=0.12, lw=0
        )
    dress(axes, x="epoch", y="val top-1, %")
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return drawing


FIGURES: dict[str, tuple[Callable[[Comparison], Figure], str]] = {
    "accuracy": (accuracy_figure, "Accuracy of every run: coupled networks vermilion, networks alone blue."),
    "pareto": (pareto_figure, "Accuracy against cost: on the dotted line nothing is both better and cheaper."),
    "curves": (curves_figure, "Learning curves: the mean over the seeds and the range between them."),
}


# ---------------------------------------------------------------------------------------------------------------- pages


def markdown(result: Comparison) -> str:
    """The study as a Markdown page, beside accuracy.svg, pareto.svg and curves.svg."""
    said = [f"* {sentence}" for sentence in verdict(result)]
    lines = ["# Which is worth its cost?", "", f"`{result.command}`", "", *said, ""]
    lines += [*_markdown_table(HEADERS, cells(result)), "", *_markdown_table(BRANCH_HEADERS, branch_cells(result))]
    for name, (_, caption) in FIGURES.items():
        lines += ["", f"![{caption}]({name}.svg)"]
    lines += [
        "",
        *(f"* Failed: {sentence}" for sentence in failures(result)),
        *(f"* {line}" for line in method(result)),
    ]
    where = result.machine
    lines += [f"* {result.date}, {where['processor']}, {where['threads']} threads, torch {where['torch']}."]
    return "\n".join([*lines, ""])


def _markdown_table(headers: Sequence[str], rows: Iterator[list[str]]) -> list[str]:
    ruler = f"|---|{'---:|' * (len(headers) - 1)}"
    return [f"| {' | '.join(headers)} |", ruler, *(_markdown_row(row) for row in rows)]


def _markdown_row(row: Sequence[str]) -> str:
    cells = [cell.replace("|", r"\|") for cell in row]
    return f"| {' | '.join(cells)} |"


def comparison_page(result: Comparison) -> Page:
    """The study as a self-contained page."""
    page = Page("Which is worth its cost?", subtitle=f"{len(result.entries)} candidates on {result.data}")
    answer, *more = verdict(result)
    found = [note(f"Failed: {sentence}") for sentence in failures(result)]
    ranking = sorted(result.measured, key=lambda entry: -entry.top1)[:4]
    headline = [Card(f"{entry.top1:.1%}", entry.label, "coupled" if entry.joins else "alone") for entry in ranking]
    page.section("", text(answer), cards(headline), *(text(sentence) for sentence in more), *found)
    pieces: list[Html] = []
    if result.measured:
        pieces = [figure(draw(result), caption) for draw, caption in FIGURES.values()]
        page.section("Accuracy", pieces[0], table(HEADERS, cells(result)))
        page.section("Accuracy and cost", pieces[1])
        page.section("The branches", table(BRANCH_HEADERS, branch_cells(result), words=2))
        page.section("Learning curves", pieces[2])
    where = ", ".join(f"{name} {value}" for name, value in result.machine.items() if value is not None)
    made = f"{result.date}, by chiasm {__version__}"
    about = [("command", result.command), ("machine", where), ("made", made)]
    page.section(
        "How this was measured",
        *(text(sentence) for sentence in method(result)),
        details("Command and machine", table(["", ""], about, words=2)),
    )
    return page
