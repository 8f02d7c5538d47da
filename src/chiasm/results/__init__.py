"""What a model says of an image, typed: validated, printable as JSON, drawable."""

from __future__ import annotations

from chiasm.results.classification import Classification
from chiasm.results.detections import Detections
from chiasm.results.drawing import DRAWN_SIDE
from chiasm.results.explanation import Explanation
from chiasm.results.segmentation import Segmentation

Result = Classification | Detections | Segmentation

__all__ = ["DRAWN_SIDE", "Classification", "Detections", "Explanation", "Result", "Segmentation"]
