"""What a model says of an image, typed: validated, printable as JSON, drawable."""

from __future__ import annotations

from chiasm.results.classification import Classification
from chiasm.results.drawing import DRAWN_SIDE

__all__ = ["DRAWN_SIDE", "Classification"]
