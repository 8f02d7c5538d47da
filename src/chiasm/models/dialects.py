"""Dialects: how other code bases name and lay out the weights of an architecture, as tables read in both directions.

A table stands beside its model (`DIALECTS` in the model's file). Its keys are patterns: '{i}' and '{j}' stand for a
number, '{i+1}' or '{2i+1}' for what follows from it, and what stands in square brackets may be missing from a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Conversion(NamedTuple):
    """Another layout of the same weight.

    Attributes:
        what: in words, for the report.
        to_ours: their tensor to ours.
        to_theirs: the inverse.
    """

    what: str
    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def _flipped(weight: Tensor) -> Tensor:
    """(O, 3, H, W) with its input channels in the opposite order; other numbers of channels are no colours."""
    return weight.flip(1) if weight.shape[1] == 3 else weight


BGR_TO_RGB = Conversion("input channels from BGR to RGB", _flipped, _flipped)


class Place(NamedTuple):
    """Where an entry of theirs belongs: it is part `part` of the `parts`, along the first axis, of our weight `key`."""

    key: str
    part: int = 0
    parts: int = 1


class Weight(NamedTuple):
    """One of our weights as read from their entries.

    Attributes:
        value: in our layout.
        keys: the entries that it was made from.
        what: how, in words; '' where it was one entry, taken as it is.
    """

    value: Tensor
    keys: tuple[str, ...]
    what: str


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How another code base names the weights of an architecture, and how it lays them out.

    Attributes:
        name: whose names, in words.
        starts: pairs of patterns (ours, theirs) of a key's beginning; the first that fits counts.
        parts: pairs (ours, theirs) of whole parts (between dots) of what follows the beginning, exchanged in this
            order towards ours and in reverse towards theirs. Where theirs is a tuple, they keep our weight as several
            entries, joined along the first axis.
        layouts: pairs (pattern of our key, conversion) of weights that they lay out in another way.
    """

    name: str
    starts: tuple[tuple[str, str], ...]
    parts: tuple[tuple[str, str | tuple[str, ...]], ...] = ()
    layouts: tuple[tuple[str, Conversion], ...] = ()

    def to_ours(self, key: str) -> Place | None:
        """Where their entry `key` belongs; None when it is none of theirs."""
        for ours, theirs in self.starts:
            if (found := _match(theirs, key)) and (begin := _fill(ours, found[0])) is not None:
                rest, part, parts = f"{found[1]}.", 0, 1
                for mine, other in self.parts:
                    for n, name in enumerate(_names(other)):
                        if f".{name}." in rest:
                            rest = rest.replace(f".{name}.", f".{mine}.")
                            if not isinstance(other, str):
                                part, parts = n, len(other)
                return Place(begin + rest[:-1], part, parts)
        return None

    def to_theirs(self, key: str) -> tuple[str, ...]:
        """Their names of our weight `key`, several where they split it; none when they have no such weight."""
        for ours, theirs in self.starts:
            if (found := _match(ours, key)) and (begin := _fill(theirs, found[0])) is not None:
                rests = [f"{found[1]}."]
                for mine, other in reversed(self.parts):
                    if f".{mine}." in rests[0]:
                        rests = [rest.replace(f".{mine}.", f".{name}.") for rest in rests for name in _names(other)]
                return tuple(begin + rest[:-1] for rest in rests)
        return ()

    def read(self, state: Mapping[str, Tensor]) -> dict[str, Weight]:
        """Our weights by name, from a state dict of theirs; tensors on the meta device give shapes alone.

        A weight of which they keep several entries is there when all of them are.
        """
        found: dict[str, dict[int, str]] = {}
        parts: dict[str, int] = {}
        for key in state:
            if place := self.to_ours(key):
                found.setdefault(place.key, {}).setdefault(place.part, key)
                parts[place.key] = place.parts
        return {
            ours: self._weight(ours, state, tuple(keys[n] for n in range(parts[ours])))
            for ours, keys in found.items()
            if len(keys) == parts[ours]
        }

    def write(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse: a state dict of ours as they would publish it, less what they have no name for."""
        theirs: dict[str, Tensor] = {}
        for key, value in state.items():
            names = self.to_theirs(key)
            conversion = self._layout(key)
            laid_out = conversion.to_theirs(value) if conversion else value
            if names:
                theirs |= zip(names, laid_out.chunk(len(names)) if len(names) > 1 else [laid_out], strict=True)
        return theirs

    def _layout(self, key: str) -> Conversion | None:
        for pattern, conversion in self.layouts:
            if (found := _match(pattern, key)) and not found[1]:
                return conversion
        return None

    def _weight(self, ours: str, state: Mapping[str, Tensor], keys: tuple[str, ...]) -> Weight:
        values = [state[key] for key in keys]
        value, what = values[0], []
        if len(values) > 1:
            if len({part.shape[1:] for part in values}) > 1 or not value.ndim:
                return Weight(value, keys, "")  # of no shape that would fit: told as such by who compares them
            value = torch.cat(values)
            what.append(f"joined from {', '.join(_differing(keys))}")
        conversion = self._layout(ours)
        if conversion and value.ndim > 0:
            try:
                converted = conversion.to_ours(value)
            except (RuntimeError, IndexError):  # as above
                return Weight(value, keys, "")
            what += [conversion.what] * (converted is not value)
            value = converted
        return Weight(value, keys, "; ".join(what))


def _names(theirs: str | tuple[str, ...]) -> tuple[str, ...]:
    return (theirs,) if isinstance(theirs, str) else theirs


def _differing(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The part by which keys of one form differ: query, key, value."""
    return next(column for column in zip(*(key.split(".") for key in keys), strict=False) if len(set(column)) > 1)


# ------------------------------------------------------------------------------------------------------------- patterns

_NUMBER = re.compile(r"\{(\d*)([ij])([+-]\d+)?\}")  # {i}, {i+1}, {2i+1}


@cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], tuple[tuple[int, str, int], ...]]:
    """A regular expression for a key's beginning, and for each of its numbers (a, name, b) of a * name + b."""
    numbers = tuple((int(a or 1), name, int(b or 0)) for a, name, b in _NUMBER.findall(pattern))
    text = re.escape(_NUMBER.sub("\0", pattern)).replace(re.escape("\0"), r"(\d+)")
    text = text.replace(r"\[", "(?:").replace(r"\]", ")?")
    return re.compile(text + r"(?=\.|$)"), numbers


def _match(pattern: str, key: str) -> tuple[dict[str, int], str] | None:
    """The numbers in `key`, which begins as `pattern` says, and the rest of it; None when it begins otherwise."""
    expression, numbers = _compiled(pattern)
    if not (found := expression.match(key)):
        return None
    values: dict[str, int] = {}
    for text, (a, name, b) in zip(found.groups(), numbers, strict=True):
        value, remainder = divmod(int(text) - b, a)
        if remainder or value < 0 or values.setdefault(name, value) != value:
            return None
    return values, key[found.end() :]


def _fill(pattern: str, values: Mapping[str, int]) -> str | None:
    """`pattern` with its numbers; None where one of them would be negative."""
    numbers = [int(a or 1) * values[name] + int(b or 0) for a, name, b in _NUMBER.findall(pattern)]
    if any(number < 0 for number in numbers):
        return None
    filled = iter(numbers)
    return _NUMBER.sub(lambda _: str(next(filled)), pattern).replace("[", "").replace("]", "")
