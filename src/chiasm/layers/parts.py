"""A batch in parts, for inference on a processor: what a layer makes on its way stays in cache and in memory it has.

Blocks that are wide inside and narrow outside read and write their inner maps several times. One image's fit the
processor's cache where a batch's do not, and large maps are memory that the system hands out anew, page by page, every
time. Maps of very large images are cut into strips of rows for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from chiasm.layers.fused import traced

CACHE = 3 * 2**20  # bytes of the widest inner map for each thread; an image that needs more is cut into strips
THREADS = 4  # that are reckoned with: what all of them have in cache together is no longer at hand for each


def images_in_cache(x: Tensor, widest: int) -> int:
    """How many images of x (B, C, H, W) to take at a time, when the widest map made of them has `widest` channels.

    At least one, and parts of about equal size.
    """
    limit = max(1, _budget() // _image_bytes(x, widest))
    parts = -(-x.shape[0] // limit)
    return -(-x.shape[0] // max(1, parts))


def in_parts(
    layer: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, widest: int, *, stride: int | None = None
) -> Tensor:
    """function(x), where `function` computes each image of the batch alone: the same, faster on large maps.

    Args:
        layer: whose layers `function` calls; where one of them has a hook, that sees the whole batch.
        function: map (B, C, H, W) -> map (B, C', H', W').
        x: its input.
        widest: channels of the widest map that it makes at the input's height and width.
        stride: given where `function` is local, one 3x3 convolution of this stride and padding 1 between pointwise
            layers; very large images are then cut into strips too.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or traced():
        return function(x)
    part, strips = images_in_cache(x, widest), []
    if stride is not None and _image_bytes(x, widest) > _budget():
        strips = list(_strips(x.shape[2], stride, max(1, _budget() // _image_bytes(x[:, :, :stride], widest) - 2)))
    if (x.shape[0] <= part and not strips) or _is_watched(layer):
        return function(x)
    if not strips:
        return torch.cat([function(images) for images in x.split(part)])
    whole = [torch.cat([function(image[:, :, rows])[:, :, kept] for rows, kept in strips], 2) for image in x.split(1)]
    return whole[0] if len(whole) == 1 else torch.cat(whole)


def _is_watched(layer: nn.Module) -> bool:
    inner = (module for module in layer.modules() if module is not layer)
    return any(module._forward_hooks or module._forward_pre_hooks for module in inner)


def _budget() -> int:
    return CACHE * min(THREADS, torch.get_num_threads())


def _image_bytes(x: Tensor, channels: int) -> int:
    return channels * x.shape[-2] * x.shape[-1] * x.element_size()


def _strips(height: int, stride: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Strips of a map for a 3x3 convolution: the input's rows, and which of the output's rows to keep.

    An output row of the strip beside its border has seen zeros where the map goes on: one on each side is dropped.
    All strips are of one height, but for a row where `height` does not divide by the stride, and as many as it takes
    for each to give at most `rows` rows.
    """
    total = -(-height // stride)
    rows = -(-total // -(-total // rows))
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        low = max(0, min(start - 1, height // stride - rows - 2))
        high = low + rows + 2 if stop < total else total
        yield slice(low * stride, high * stride), slice(start - low, stop - low)
