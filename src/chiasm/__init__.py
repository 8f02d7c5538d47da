"""chiasm: vision models that join convolution (local detail) and self-attention (global context).

The public names below are imported when first used, so that `import chiasm` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "create_model": "chiasm.models",
    "list_models": "chiasm.models",
    "couple": "chiasm.models.coupled",
    "load_weights": "chiasm.models.checkpoints",
    "optimize": "chiasm.inference",
    "load": "chiasm.predictor",
    "train": "chiasm.verbs.train",
    "compare": "chiasm.verbs.compare",
    "evaluate": "chiasm.verbs.evaluate",
    "predict": "chiasm.verbs.predict",
    "explain": "chiasm.verbs.explain",
    "serve": "chiasm.verbs.serve",
    "describe": "chiasm.verbs.describe",
    "check_data": "chiasm.verbs.data",
    "weights": "chiasm.verbs.weights",
    "bench": "chiasm.verbs.bench",
    "demo": "chiasm.verbs.demo",
    "ChiasmError": "chiasm.errors",
    "Classification": "chiasm.results",
    "Detections": "chiasm.results",
    "Segmentation": "chiasm.results",
    "Explanation": "chiasm.results",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'chiasm' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
