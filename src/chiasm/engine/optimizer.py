"""The optimiser, by timm's factory: decay groups, layer-wise rates and the choice of names are timm's."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from chiasm.config import TrainConfig
from chiasm.engine.freeze import prefixes
from chiasm.errors import ChiasmError, UnknownNameError

BETA2 = {"adamw": 0.999, "adam": 0.999, "lamb": 0.999, "lion": 0.99}
FUSED = ("adamw", "adam", "sgd")  # PyTorch's own, in one pass over each weight


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimiser of `model`'s trainable parameters.

    No weight decay on biases, norms and what `model.no_weight_decay()` lists. With `layer_decay` each group carries an
    `lr_scale` that falls towards the input, by `model.group_matcher()`. The parts named in `config.lr_scale` have
    theirs multiplied by it.

    Raises:
        ChiasmError: for layer decay with a model that does not say how its layers follow each other, or a scale that is
            no number from 0.
        UnknownNameError: for a scale of a part that the model has not.
    """
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ChiasmError(f"{config.model} does not order its layers, so --layer-decay cannot be used; leave it out.")
    own: dict[str, Any] = {"momentum": config.momentum}
    if config.optimizer in BETA2:
        own = {"betas": (config.momentum, BETA2[config.optimizer])}
    if config.optimizer in FUSED:
        own["fused"] = True
    optimizer: Any = create_optimizer_v2(
        model,
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        **own,
    )
    if config.optimizer in FUSED:
        # It could undo a loss scale by itself, in which case Lightning clips no gradients; Lightning is to undo it.
        optimizer._step_supports_amp_scaling = False
        optimizer.register_load_state_dict_post_hook(_fit_for_fused)
    _scale_parts(optimizer, model, config.lr_scale)
    return optimizer


def _fit_for_fused(optimizer: Optimizer) -> None:
    """After loading a state: it may be of a step that was not fused, or of weights in another memory format, which the
    fused step on a CPU would read as if it were in theirs."""
    for group in optimizer.param_groups:
        group["fused"] = True
        for parameter in group["params"]:
            kept = optimizer.state.get(parameter, {})
            for name, value in kept.items():
                if not isinstance(value, Tensor):
                    continue
                if value.shape == parameter.shape:
                    kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                elif name == "step":
                    kept[name] = value.to(parameter.device, torch.float32)


def _scale_parts(optimizer: Optimizer, model: nn.Module, scales: dict[str, Any]) -> None:
    """Divide the groups so that each part has a rate of its own; of prefixes within each other the longest counts."""
    known = prefixes(name for name, _ in model.named_parameters())
    for prefix, scale in scales.items():
        if prefix not in known:
            raise UnknownNameError("part in lr_scale", prefix, known, "See 'chiasm describe MODEL'.")
        if not isinstance(scale, (int, float)) or not 0 <= scale < float("inf"):
            raise ChiasmError(f"lr_scale of {prefix} is {scale!r}: expected a number from 0, such as 0.1.")
    factors = {id(parameter): 1.0 for parameter in model.parameters()}
    for prefix in sorted(scales, key=len):
        for name, parameter in model.named_parameters():
            if f"{name}.".startswith(f"{prefix}."):
                factors[id(parameter)] = float(scales[prefix])
    groups, optimizer.param_groups = optimizer.param_groups, []
    for group in groups:
        for factor in dict.fromkeys(factors[id(parameter)] for parameter in group["params"]):
            own = [parameter for parameter in group["params"] if factors[id(parameter)] == factor]
            optimizer.add_param_group({**group, "params": own, "lr_scale": group.get("lr_scale", 1.0) * factor})


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every group `rate` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
