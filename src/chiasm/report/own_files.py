"""What tells the files of `chiasm explain` from a person's own, so that a second run writes over the former alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL.PngImagePlugin import PngInfo

from chiasm.data.images import open_image

MARK = "chiasm explain"


def signed() -> PngInfo:
    """What is to be saved with a PNG."""
    info = PngInfo()
    info.add_text("Software", MARK)
    return info


def is_own(path: Path) -> bool:
    """Whether a file (.png, .npz, .html, .json) was written by `chiasm explain`; what cannot be read was not."""
    try:
        return _TESTS[path.suffix](path)
    except Exception:  # a file of any content: its readers raise whatever it makes them stumble over
        return False


def _is_own_png(path: Path) -> bool:
    image, _ = open_image(path)
    with image:
        return image.info.get("Software") == MARK


def _is_own_npz(path: Path) -> bool:
    with np.load(path) as arrays:
        about = json.loads(str(arrays["about"]))
    return isinstance(about, list) and all("prefix" in one for one in about)


def _is_own_html(path: Path) -> bool:
    with open(path, encoding="utf-8") as file:
        return f'<meta name="generator" content="{MARK}">' in file.read(1000)


def _is_own_json(path: Path) -> bool:
    return json.loads(path.read_text(encoding="utf-8"))["generator"] == MARK


_TESTS = {".png": _is_own_png, ".npz": _is_own_npz, ".html": _is_own_html, ".json": _is_own_json}
