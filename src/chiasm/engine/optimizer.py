"""The optimiser, by timm's factory: decay groups, layer-wise rates and the choice of names are timm's."""

from __future__ import annotations

from typing import Any

from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from chiasm.config import TrainConfig
from chiasm.errors import ChiasmError

BETA2 = {"adamw": 0.999, "adam": 0.999, "lamb": 0.999, "lion": 0.99}


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimiser of `model`'s trainable parameters.

    No weight decay on biases, norms and what `model.no_weight_decay()` lists. With `layer_decay` each group carries an
    `lr_scale` that falls towards the input, by `model.group_matcher()`.

    Raises:
        ChiasmError: for layer decay with a model that does not say how its layers follow each other.
    """
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ChiasmError(f"{config.model} does not order its layers, so --layer-decay cannot be used; leave it out.")
    own: dict[str, Any] = {"momentum": config.momentum}
    if config.optimizer in BETA2:
        own = {"betas": (config.momentum, BETA2[config.optimizer])}
    return create_optimizer_v2(
        model,
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        **own,
    )


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every group `rate` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
