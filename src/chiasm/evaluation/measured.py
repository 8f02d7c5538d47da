"""What every evaluation comes to, whatever the task: numbers, a page, a table, and the images left out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from chiasm.errors import ImageError

if TYPE_CHECKING:
    from rich.console import Console

    from chiasm.report.evaluation import Setting
    from chiasm.report.html import Page

T = TypeVar("T")

LISTED = 24  # images of one kind (mistakes, the worst, the best) that are named at most


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How images are measured.

    Attributes:
        batch_size: images at a time.
        workers: processes or threads that read; None decides by the machine.
        gallery: pictures that are kept of each kind.
        watch: wraps the images as they come, with how many there will be: a bar on the terminal.
    """

    batch_size: int
    workers: int | None = None
    gallery: int = 0
    watch: Callable[[Iterable[Any], int], Iterable[Any]] = lambda images, total: images

    def watched(self, images: Iterable[T], total: int) -> Iterator[T]:
        yield from self.watch(images, total)


class Measured(ABC):
    """The measurements of one task.

    Attributes:
        failures: the images that could not be read; they are left out of the scores.
        scores: the numbers; their kind is the task's.
    """

    failures: tuple[ImageError, ...]
    scores: Any

    @property
    @abstractmethod
    def images(self) -> int:
        """How many images were measured."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, 'images' first; shares are 0..1, what cannot be said is null."""

    @abstractmethod
    def page(self, setting: Setting) -> Page:
        """The report, with its pictures."""

    @abstractmethod
    def print(self, console: Console) -> None:
        """The numbers as tables."""

    def files(self) -> dict[str, str]:
        """What else is to be written: content by the file's name."""
        return {}
