"""What models are for: each task is a model with its loss, the way from its outputs to results, and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from chiasm.tasks.classify import Classify
from chiasm.tasks.detect import Detect
from chiasm.tasks.segment import Segment


def make_task(name: str, model: Any, labels: Sequence[str], threshold: float = 0.0) -> Any:
    """The task of that name, for prediction.

    Args:
        name: 'classify', 'detect', 'instances' or 'segment'.
        model: a network for it.
        labels: the class names.
        threshold: of detectors, the least score of an object that is given.
    """
    task: nn.Module
    if name == "classify":
        task = Classify(model, labels)
    elif name == "segment":
        task = Segment(model, labels)
    else:
        task = Detect(model, labels, masks=name == "instances", threshold=threshold)
    return task
