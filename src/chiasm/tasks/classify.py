"""Classification: what goes in is an image, what comes out is one label.

The loss of the branches and the decoding of logits are here, the metrics in classify_metrics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.results import Classification

if TYPE_CHECKING:
    from chiasm.tasks.classify_metrics import ClassificationMetrics


class Classify(nn.Module):
    """A model with the classes it tells apart.

    Args:
        model: a timm model whose `num_classes` is `len(labels)`; a model of several branches offers
            `forward_branches(x) -> dict[str, Tensor]`.
        labels: the class names in the order of the logits.
        label_smoothing: share of the target given to all classes alike, 0..1.
        class_weights: (classes,) factors on the loss, or None.
    """

    name = "classify"
    class_weights: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        labels: Sequence[str],
        *,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.labels = tuple(labels)
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) -> the logits (B, classes) of each branch by name; one named 'model' for one branch."""
        branches: Callable[[Tensor], dict[str, Tensor]] | None = getattr(self.model, "forward_branches", None)
        return {"model": self.model(images)} if branches is None else branches(images)

    def loss(self, outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """The mean over the branches of their cross-entropies, as 'loss', and each branch's own as 'loss/<branch>'.

        `targets` are class indices (B,) or, after mixup, probabilities (B, classes).
        """
        terms = {
            f"loss/{name}": F.cross_entropy(
                logits.float(), targets, weight=self.class_weights, label_smoothing=self.label_smoothing
            )
            for name, logits in outputs.items()
        }
        return {"loss": torch.stack(list(terms.values())).mean(), **terms}

    def decode(
        self, outputs: dict[str, Tensor], sources: Sequence[str], placements: Sequence[object] = ()
    ) -> list[Classification]:
        """Logits to typed results, one per image; the only place where logits become probabilities.

        `placements`, where the image lies in the network's input, say nothing about its class.
        """
        fused = mean_logits(outputs).float().softmax(-1).cpu().numpy()
        branches = {name: logits.float().softmax(-1).cpu().numpy() for name, logits in outputs.items()}
        if len(branches) == 1:
            branches = {}
        return [
            Classification(
                source=source,
                labels=self.labels,
                probabilities=fused[i],
                branches={name: values[i] for name, values in branches.items()},
            )
            for i, source in enumerate(sources)
        ]

    def validation(self) -> ClassifyValidation:
        """What measures an epoch."""
        return ClassifyValidation(self)

    def metrics(self) -> ClassificationMetrics:
        """What collects results of `decode` with their true classes and scores them."""
        from chiasm.tasks.classify_metrics import ClassificationMetrics  # torchmetrics: predicting does without

        return ClassificationMetrics(self.labels)


class ClassifyValidation:
    """Loss, top-1 and each branch's own top-1, as sums over images (see tasks/validation.py)."""

    score = "top1"

    def __init__(self, task: Classify) -> None:
        self._task = task
        self._sums: dict[str, float] = {}

    def add(self, outputs: dict[str, Tensor], targets: Tensor, real: Tensor) -> None:
        """Logits (B, classes) by branch, labels (B,), and which of them count (B,)."""
        labels = targets[real]
        outputs = {name: logits[real] for name, logits in outputs.items()}
        if not len(labels):
            return
        self._add("images", len(labels))
        self._add("loss", float(self._task.loss(outputs, labels)["loss"]) * len(labels))
        self._add("top1", _hits(mean_logits(outputs), labels))
        if len(outputs) > 1:
            for name, logits in outputs.items():
                self._add(f"top1_{name}", _hits(logits, labels))

    def state(self) -> dict[str, float]:
        return self._sums

    def compute(self, states: Sequence[dict[str, float]]) -> dict[str, float]:
        sums = {name: sum(state.get(name, 0.0) for state in states) for name in dict.fromkeys(chain(*states))}
        images = sums.pop("images", 0.0)
        return {name: value / images for name, value in sums.items()}

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value


def mean_logits(outputs: dict[str, Tensor]) -> Tensor:
    """The model's answer: the mean of the branch logits."""
    return torch.stack(list(outputs.values())).mean(0)


def _hits(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(-1) == labels).sum())
