"""The curves of a run as a picture: losses, and validation top-1 with each branch's own."""

from __future__ import annotations

import os
from pathlib import Path


def draw_curves(history: list[dict[str, float]], path: Path) -> None:
    """Write `path` (PNG) from the lines of metrics.csv; needs at least one."""
    from chiasm.report.plots import curves, png

    part = path.with_name(f".{path.name}.part")
    part.write_bytes(png(curves(history)))
    os.replace(part, path)
