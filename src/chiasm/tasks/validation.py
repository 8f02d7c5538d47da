"""What training measures after every epoch, on the validation images as the network takes them.

The numbers become the columns `val_<name>` of metrics.csv; one of them, the score, chooses the best epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

# Name of a score -> what people call it. Where several are measured, the first of these is the one that chooses.
SCORES = {
    "top1": "top-1",
    "mask_ap": "mask AP",
    "mask_ap50": "mask AP50",
    "ap": "AP",
    "ap50": "AP50",
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
}


class Validation(Protocol):
    """One validation: batches are added in each process, and what all of them kept gives the numbers.

    Attributes:
        score: the number, 0..1, by which the best epoch is chosen; the more the better.
    """

    score: str

    def add(self, outputs: Any, targets: Any, real: Tensor) -> None:
        """Take in the outputs of a batch of B images.

        Args:
            outputs: what the task's `forward` gave.
            targets: as the loader gave them.
            real: (B,) bool; False for an image that only fills a process's share up and must not count.
        """

    def state(self) -> Any:
        """What this process has to tell, as plain values that can be pickled."""

    def compute(self, states: Sequence[Any]) -> dict[str, float]:
        """The numbers over the states of all processes: the score, finite, and others, with 'loss' where there is one;
        {} when no image was added."""


def score_of(names: Iterable[str]) -> str:
    """The score that chose among epochs, by the columns `val_<name>` of metrics.csv; '' where there is none."""
    columns = set(names)
    return next((name for name in SCORES if f"val_{name}" in columns), "")


def other_scores(names: Iterable[str]) -> dict[str, str]:
    """The other columns `val_<name>` of metrics.csv but the loss, with what people call each: a branch by its name."""
    columns = [name for name in names if name.startswith("val_")]
    passed = {"val_loss", f"val_{score_of(columns)}"}
    others = [column.removeprefix("val_") for column in columns if column not in passed]
    return {f"val_{name}": SCORES.get(name, name.removeprefix("top1_")) for name in others}
