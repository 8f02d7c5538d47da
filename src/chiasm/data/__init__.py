"""Images and labels: one description of data for all verbs, and batches of it."""

from __future__ import annotations

from chiasm.data.source import ImageData, Split, open_data

__all__ = ["ImageData", "Split", "open_data"]
