"""What was measured of a network, and of its heat maps, for people: figures, tables, and what they say in words.

for title, pieces in [*measures_sections(measures), *faithfulness_sections(faithfulness)]:
    page.section(title, *pieces)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib.figure import Figure

from chiasm.errors import ImageError
from chiasm.explaining.faithfulness import Estimate, Faithfulness, Score
from chiasm.explaining.ground_truth import MATCH
from chiasm.explaining.measures import HALF, Distance, Field, Measures
from chiasm.report.evaluation import share
from chiasm.report.html import Html, columns, figure, note, table, text
from chiasm.report.plots import BLUE, GREEN, INK, LINE, MUTED, VERMILION, dress
from chiasm.results.explanation import FUSED

SHOWN = 6  # fields that are drawn of each branch
TICKS = 14  # names along an axis that can be read
COLOURS = {"conv": VERMILION, "tokens": GREEN}
# Of a branch's methods, in the order they come.
STYLES = ("-", "--", ":", "-.")
SWITCHED = {True: "exchanges on", False: "exchanges off"}

Sections = list[tuple[str, list[Html]]]
Looked = TypeVar("Looked", Distance, Field)
Item = TypeVar("Item")


def measures_sections(measures: Measures) -> Sections:
    """Titles and pieces of a page: attention, fields, similarity; those that the network has."""
    found: Sections = []
    if measures.distances:
        caption = (
            "Distance between query and key, weighted by attention: a dot for each head, a line for their mean. "
            "Dotted: attention spread evenly over the tokens that a head sees."
        )
        pieces = [*map(text, _distance_words(measures)), figure(attention_figure(measures), caption)]
        found.append(("How far attention looks", pieces))
    if measures.fields:
        height, width = measures.canvas
        caption = (
            "Side of the square as large as the pixels that hold half of the gradient of a map's centre. Dotted: a "
            f"gradient spread evenly over all {height} x {width} pixels."
        )
        drawn = "The fields themselves, from early to late; each is as bright as it can be."
        pieces = [
            *map(text, _field_words(measures)),
            columns(figure(field_figure(measures), caption), figure(field_pictures(measures), drawn)),
        ]
        found.append(("What of the image a place depends on", pieces))
    if measures.similarities:
        caption = "Similarity (linear CKA) of the two branches, place by place: before each exchange and after it."
        pieces = [*map(text, _similarity_words(measures)), figure(similarity_figure(measures), caption)]
        found.append(("How alike the branches are", pieces))
    return [*found, *_left_out(measures.failures)]


def faithfulness_sections(result: Faithfulness) -> Sections:
    """Titles and pieces of a page: what the maps are worth."""
    pieces = [*map(note, result.notes), *map(text, _verdict(result))]
    if any(scores.curves for scores in result.maps):
        caption = (
            "The predicted class's probability while pixels go (left: the faster it falls, the better) and come "
            "(right: the faster it rises), those first that the map names. Grey: random maps."
        )
        pieces.append(figure(curves_figure(result), caption))
    if any(scores.localisation for scores in result.maps):
        caption = "Share of each map on the objects' pixels, with its 95 % interval. Dotted: a uniform map."
        pieces.append(figure(localisation_figure(result), caption))
    found: Sections = [
        ("How far the maps can be believed", pieces),
        ("The maps in numbers", [*map(text, _method(result)), table(*scores_table(result), words=2)]),
    ]
    if result.differences:
        said = (
            "How much more a map gains over chance with the exchanges on than with them off, image by image, in points "
            "of percent: above 0 the exchanges make it better. A network trained with its exchanges answers worse "
            "without them, so that there is less to gain."
        )
        found.append(("What the exchanges change", [text(said), table(*differences_table(result))]))
    return [*found, *_left_out(result.failures)]


def _left_out(failures: Sequence[ImageError]) -> Sections:
    if not failures:
        return []
    rows = [[error.path, error.reason] for error in failures]
    return [("Images left out", [text(f"{len(rows)} could not be read."), table(["image", "why"], rows, words=2)])]


# -------------------------------------------------------------------------------------------------------------- tables

# The columns of a measure: itself, and what chance is.
MEASURES = {
    "localisation": ("on the objects", "of a uniform map"),
    "deletion": ("deletion", "of random maps"),
    "insertion": ("insertion", "of random maps"),
}
SHORT = {
    "localisation": ("on objects", "even"),
    "deletion": ("deletion", "random"),
    "insertion": ("insertion", "random"),
}


def scores_table(result: Faithfulness) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row for each kind of map: those measures that there are."""
    measures = known_measures(result)
    rows = []
    for scores in result.maps:
        row = [scores.name, "on" if scores.coupled else "off"]
        for score in (getattr(scores, measure) for measure in measures):
            row += [told(score.value if score else None), share(score.chance.mean if score else None)]
        rows.append(row)
    return ["map", "exchanges", *(header for measure in measures for header in MEASURES[measure])], rows


def differences_table(result: Faithfulness) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row for each kind of map, in points of percent."""
    measures = known_measures(result)
    rows = [[d.name, *(told(getattr(d, measure), signed=True) for measure in measures)] for d in result.differences]
    return ["map", *(MEASURES[measure][0] for measure in measures)], rows


def known_measures(result: Faithfulness) -> list[str]:
    """Those of `MEASURES` that are there of some map."""
    return [measure for measure in MEASURES if any(getattr(scores, measure) for scores in result.maps)]


def told(estimate: Estimate | None, *, signed: bool = False) -> str:
    """In percent with the interval; a dash where there is none."""
    if estimate is None:
        return "–"
    sign = "+" if signed else ""
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.mean:{sign}.1f}"
    return f"{100 * estimate.mean:{sign}.1f} ({100 * estimate.low:{sign}.1f} to {100 * estimate.high:{sign}.1f})"


# ------------------------------------------------------------------------------------------------------------- in words


def _distance_words(measures: Measures) -> Iterator[str]:
    coupled = [distance for distance in measures.distances if distance.coupled]
    first, last = coupled[0], coupled[-1]
    yield (
        f"In {first.name} a query looks {first.mean:.0f} pixels far on average, its heads from {min(first.heads):.0f} "
        f"to {max(first.heads):.0f}; in {last.name} {last.mean:.0f}, from {min(last.heads):.0f} to "
        f"{max(last.heads):.0f}. Spread evenly over all tokens that it sees there, it would be {last.even:.0f}."
    )


def _field_words(measures: Measures) -> Iterator[str]:
    for (branch, coupled), fields in _series(measures.fields):
        if coupled:
            first, last = fields[0], fields[-1]
            alone = [f for f in measures.fields if f.branch == branch and f.name == last.name and not f.coupled]
            without = f" ({alone[0].side:.0f} with the exchanges off)" if alone else ""
            who = "A place" if branch == "model" else f"A place of the {branch} branch"
            yield (
                f"{who} depends on {first.side:.0f} x {first.side:.0f} pixels after {first.name} and on "
                f"{last.side:.0f} x {last.side:.0f} after {last.name}{without}."
            )


def _similarity_words(measures: Measures) -> Iterator[str]:
    count = len(measures.similarities)
    closer = sum(1 for s in measures.similarities if s.after > s.before)
    before, after = (float(np.mean([getattr(s, n) for s in measures.similarities])) for n in ("before", "after"))
    yield (
        f"{closer} of {count} exchanges make the branches more alike: {before:.2f} before and {after:.2f} after, "
        "on average."
    )
    few = [s for s in measures.similarities if s.places < s.channels]
    if few:
        least = max(few, key=lambda s: s.channels / s.places)
        yield (
            f"Do not rely on it: {len(few)} of {count} were compared at fewer places than there are channels "
            f"({least.name}: {least.places:,} places, {least.channels:,} channels), where any two branches look alike. "
            "More images give more places."
        )


def _verdict(result: Faithfulness) -> Iterator[str]:
    """What the coupled maps know, and what they do not."""
    if not result.maps:
        yield "Nothing could be measured: the model found nothing in these images, or nothing that they show."
    for kind, what in (
        ("localisation", "lie on the objects more than a uniform map does"),
        ("deletion", "name places whose loss costs the answer more than that of random ones"),
        ("insertion", "name places that bring the answer back sooner than random ones do"),
    ):
        scored = [(scores.name, getattr(scores, kind)) for scores in result.maps if scores.coupled]
        known = [(name, score) for name, score in scored if score is not None]
        if known:
            sure = [name for name, score in known if score.gain.low is not None and score.gain.low > 0]
            yield (
                f"{', '.join(sure)}: {what} (95 % sure)."
                if sure
                else f"It cannot be said of any of the {len(known)} kinds of map that they {what}."
            )


def _method(result: Faithfulness) -> Iterator[str]:
    known = known_measures(result)
    yield (
        f"{result.images:,} images of {result.data} ({result.split}). Numbers are percent with the 95 % interval of a "
        "bootstrap over the images."
    )
    if "deletion" in known:
        yield (
            "The predicted class is explained, right or wrong. Deletion and insertion are areas under the curves: "
            "small is good for the one, large for the other. What is watched is the map's own branch where it has a "
            "head."
        )
    if "localisation" in known:
        yield (
            "A class's map should lie on the image's objects, a found box's on the object that it overlaps most (IoU "
            f"{MATCH:.0%} or more), a region's on the pixels of its class."
        )
    if result.unplaced:
        yield f"{result.unplaced:,} explanations had no object to lie on and count in neither column of localisation."


# -------------------------------------------------------------------------------------------------------------- figures


def attention_figure(measures: Measures) -> Figure:
    """Attention distance by block: a dot for each head, lines for their means."""
    drawing = Figure(figsize=(7, 3.4), layout="constrained")
    axes = drawing.subplots()
    switched = not all(distance.coupled for distance in measures.distances)
    for (branch, coupled), distances in _series(measures.distances):
        x, colour = range(1, len(distances) + 1), COLOURS.get(branch, BLUE)
        style: dict[str, Any] = {"color": colour, "linestyle": "-" if coupled else "--"}
        label = SWITCHED[coupled] if switched else "mean of the heads"
        axes.plot(x, [d.mean for d in distances], linewidth=1.8 if coupled else 1.2, label=label, **style)
        if coupled:
            for i, distance in zip(x, distances, strict=True):
                axes.plot([i] * len(distance.heads), distance.heads, "o", color=colour, alpha=0.5, markersize=4)
            axes.plot(x, [d.even for d in distances], color=MUTED, linewidth=1, linestyle=":", label="spread evenly")
            _name(axes, [d.name for d in distances])
    dress(axes, y="mean distance, pixels")
    axes.set_ylim(0, 1.1 * max(max(*d.heads, d.even) for d in measures.distances))
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return drawing


def field_figure(measures: Measures) -> Figure:
    """Side of the effective receptive field by stage, a line for each branch; dashed with the exchanges off."""
    drawing = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes = drawing.subplots()
    places, names = _axis(measures.fields)
    for (branch, coupled), fields in _series(measures.fields):
        label = f"{branch}{'' if coupled else ', exchanges off'}"
        x, sides = [places[branch, field.name] for field in fields], [field.side for field in fields]
        style: dict[str, Any] = {"color": COLOURS.get(branch, BLUE), "linestyle": "-" if coupled else "--"}
        axes.plot(x, sides, marker="o", markersize=3, linewidth=1.8 if coupled else 1.2, label=label, **style)
    _name(axes, names)
    height, width = measures.canvas
    axes.axhline((HALF * height * width) ** 0.5, color=MUTED, linewidth=1, linestyle=":")
    dress(axes, y="side of the field, pixels")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    if len(axes.lines) > 2:  # more than one branch, and the dotted line
        drawing.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=2, loc="outside upper center")
    return drawing


def field_pictures(measures: Measures) -> Figure:
    """The fields as small images, a row for each branch, from the first feature map to the last."""
    rows = list(_series(measures.fields))
    count = min(SHOWN, max(len(fields) for _, fields in rows))
    drawing = Figure(figsize=(0.6 + 0.95 * count, 0.3 + 1.15 * len(rows)), layout="constrained")
    grid = drawing.subplots(len(rows), count, squeeze=False)
    for line, ((branch, coupled), fields) in zip(grid, rows, strict=True):
        for axes in line:
            axes.axis("off")
        for axes, field in zip(line, evenly(fields, count), strict=False):
            # The root: a field falls off by orders of magnitude, and its rim is what is looked for.
            axes.imshow(np.sqrt(field.map / (field.map.max() or 1.0)), cmap="inferno", vmin=0, vmax=1)
            axes.set_title(field.name, fontsize=6.5, color=INK, pad=2)
        label = "" if branch == "model" else f"{branch}{'' if coupled else ', off'}"
        line[0].text(
            -0.08,
            0.5,
            label,
            transform=line[0].transAxes,
            rotation=90,
            ha="right",
            va="center",
            fontsize=7.5,
            color=MUTED,
        )
    return drawing


def similarity_figure(measures: Measures) -> Figure:
    """CKA before and after each exchange, joined by a line."""
    drawing = Figure(figsize=(7, 3.2), layout="constrained")
    axes = drawing.subplots()
    x = range(1, len(measures.similarities) + 1)
    before, after = ([getattr(s, name) for s in measures.similarities] for name in ("before", "after"))
    axes.vlines(x, before, after, color=LINE, linewidth=3, zorder=1)
    axes.scatter(x, before, color=VERMILION, marker="s", s=34, label="before", zorder=2)
    axes.scatter(x, after, color=BLUE, marker="o", s=34, label="after", zorder=2)
    _name(axes, [s.name for s in measures.similarities])
    dress(axes, y="similarity (CKA)")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    drawing.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=2, loc="outside upper right")
    return drawing


def curves_figure(result: Faithfulness) -> Figure:
    """Deletion and insertion of the coupled maps beside random ones."""
    drawing = Figure(figsize=(9, 3.8), layout="constrained")
    shown = [scores for scores in result.maps if scores.coupled and scores.curves]
    lines: dict[str, Any] = {}
    for axes, kind, title in zip(
        drawing.subplots(1, 2, sharey=True), ("deletion", "insertion"), ("Taken away", "Given back"), strict=True
    ):
        for scores in shown:
            curve, random = scores.curves[kind], scores.curves[f"random {kind}"]
            x = np.linspace(0, 1, len(curve))
            (lines["random"],) = axes.plot(x, random, color=MUTED, linewidth=1, alpha=0.6, zorder=1)
            colour, style = _look(scores.name, [s.name for s in shown])
            (lines[scores.name],) = axes.plot(x, curve, color=colour, linestyle=style, linewidth=1.8)
        dress(axes, title=title, x="share of the pixels", y="probability" if kind == "deletion" else "")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.grid(color=LINE, linewidth=0.6)
    named = {name: lines[name] for name in sorted(lines, key=lambda name: name == "random")}
    drawing.legend(
        named.values(), named.keys(), frameon=False, labelcolor=INK, fontsize=8.5, ncols=4, loc="outside lower center"
    )
    return drawing


def localisation_figure(result: Faithfulness) -> Figure:
    """Localisation of each kind of map with its interval, exchanges on and off, beside a uniform map's."""
    scored = [(scores, scores.localisation) for scores in result.maps if scores.localisation is not None]
    names = list(dict.fromkeys(scores.name for scores, _ in scored))
    both = {scores.coupled for scores, _ in scored}
    drawing = Figure(figsize=(7, 1.1 + 0.5 * len(names)), layout="constrained")
    axes = drawing.subplots()
    thick = 0.76 / len(both)
    for coupled in sorted(both, reverse=True):
        chosen = [(scores, score) for scores, score in scored if scores.coupled == coupled]
        shift = 0.0 if len(both) == 1 else -thick / 2 if coupled else thick / 2
        places = [names.index(scores.name) + shift for scores, _ in chosen]
        colour = BLUE if coupled else VERMILION
        axes.barh(
            places, [s.value.mean for _, s in chosen], 0.9 * thick, color=colour, alpha=0.75, label=SWITCHED[coupled]
        )
        for place, (_, score) in zip(places, chosen, strict=True):
            _whisker(axes, place, score)
        for i, (_, score) in zip(places, chosen, strict=True):
            axes.plot([score.chance.mean] * 2, [i - thick / 2, i + thick / 2], color=INK, linewidth=1.2, linestyle=":")
    dress(axes, x="share of the map on the objects")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    if len(both) > 1:
        drawing.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=2, loc="outside upper right")
    return drawing


def _whisker(axes: Any, place: float, score: Score) -> None:
    if score.value.low is not None:
        axes.plot([score.value.low, score.value.high], [place] * 2, color=INK, linewidth=1.4)


def _look(name: str, names: Sequence[str]) -> tuple[str, str]:
    """Colour and line of a kind of map: its branch's, and by its place among the branch's methods."""
    if name == FUSED:
        return BLUE, "-"
    branch = name.partition("/")[0]
    of_branch = [other for other in names if other.partition("/")[0] == branch]
    return COLOURS.get(branch, INK), STYLES[of_branch.index(name) % len(STYLES)]


def _name(axes: Any, names: Sequence[str]) -> None:
    """The names of what stands at 1, 2 ... along the axis, as many as can be read."""
    step = -(-len(names) // TICKS)
    long = max(map(len, names)) * len(names[::step]) > 70
    axes.set_xticks(range(1, len(names) + 1, step), names[::step], rotation=40 if long else 0)
    if long:
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")


def _series(found: Iterable[Looked]) -> list[tuple[tuple[str, bool], list[Looked]]]:
    """By branch and whether the exchanges were on, in the order they come."""
    series: dict[tuple[str, bool], list[Looked]] = {}
    for one in found:
        series.setdefault((one.branch, one.coupled), []).append(one)
    return list(series.items())


def _axis(fields: Sequence[Field]) -> tuple[dict[tuple[str, str], int], list[str]]:
    """Where the fields stand, from 1 on, and the names along the axis: side by side in branches that are alike, else in
    the order of the computation."""
    coupled = [field for field in fields if field.coupled]
    by_branch = [[field.name for field in of_branch] for _, of_branch in _series(coupled)]
    if all(names == by_branch[0] for names in by_branch):
        return {(field.branch, field.name): 1 + by_branch[0].index(field.name) for field in coupled}, by_branch[0]
    return {(field.branch, field.name): i for i, field in enumerate(coupled, 1)}, [field.name for field in coupled]


def evenly(found: Sequence[Item], count: int) -> list[Item]:
    """So many of them at most, evenly spaced, with both ends."""
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int))]
