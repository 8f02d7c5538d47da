"""The inverted residual in training on a CPU, its gradients written by hand: of its wide maps only one is kept.

Autograd keeps six wide maps a block and goes through each as a whole, in memory that the system hands out anew every
time. Here the depthwise convolution's output is kept; the others are made again, for as many images at a time as the
cache holds: in less than half the memory, and sooner than they are fetched from memory handed out anew. That works
although batch norm needs the whole batch:

* the first norm stands behind a linear map W of the narrow input x, so its statistics follow from those of x:
  mean = W mean(x), variance = diag(W cov(x) W'), and no wide map is needed for them;
* its backward pass is linear in the gradient d that arrives behind it: the sums over the batch of d and of
  d (x - mean(x))' give the gradients of its scale, its shift and W, and what it takes from the gradient of x is a
  narrow product.

Shapes: B batch, C narrow and M wide channels; maps are channels-last, so that a map is a matrix of B * H * W rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.layers.by_hand import by_autograd, product
from chiasm.layers.parts import images_in_cache

_silu_backward = torch.ops.aten.silu_backward.grad_input


def train_wide(
    x: Tensor, conv1: nn.Conv2d, bn1: nn.BatchNorm2d, conv2: nn.Conv2d, bn2: nn.BatchNorm2d, conv3: nn.Conv2d
) -> Tensor:
    """conv3(silu(bn2(conv2(silu(bn1(conv1(x))))))) in training: map (B, C, H, W) -> map (B, C', H', W').

    conv1 and conv3 are 1x1, conv2 is 3x3, depthwise and padded by 1, none has a bias; both norms' running statistics
    are carried on.
    """
    weights = conv1.weight, bn1.weight, bn1.bias, conv2.weight, bn2.weight, bn2.bias, conv3.weight
    out, mean1, var1, mean2, var2 = _Wide.apply(x, *weights, conv2.stride[0], bn1.eps, bn2.eps)
    _carry_on(bn1, mean1, var1, x.numel() // x.shape[1])
    _carry_on(bn2, mean2, var2, out.numel() // out.shape[1])
    return out


@torch.no_grad()
def _carry_on(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """The running statistics as batch norm keeps them, the variance being that of a sample."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.num_batches_tracked is not None
    assert bn.momentum is not None
    bn.num_batches_tracked.add_(1)
    bn.running_mean.lerp_(mean, bn.momentum)
    bn.running_var.lerp_(var * (count / (count - 1)), bn.momentum)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B * H * W, C), a view of a channels-last map."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """(B * H * W, C) -> (B, C, H, W), of the batch, height and width of the map `like`."""
    return rows.unflatten(0, (like.shape[0], *like.shape[2:])).permute(0, 3, 1, 2)


def _new(channels: int, size: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_empty((like.shape[0], *size, channels)).permute(0, 3, 1, 2)


def _plain(
    x: Tensor, w1: Tensor, scale1: Tensor, shift1: Tensor, w2: Tensor, scale2: Tensor, shift2: Tensor, w3: Tensor,
    stride: int, eps1: float, eps2: float,
) -> Tensor:  # fmt: skip
    """What `_Wide` computes, in the words of autograd."""
    x = F.silu(F.batch_norm(F.conv2d(x, w1), None, None, scale1, shift1, True, 0.0, eps1))
    x = F.conv2d(x, w2, None, stride, 1, 1, w2.shape[0])
    return F.conv2d(F.silu(F.batch_norm(x, None, None, scale2, shift2, True, 0.0, eps2)), w3)


class _Wide(torch.autograd.Function):
    """(out (B, C', H', W'), and of both norms mean and variance (M,)); the arguments are those of `_plain`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, scale1: Tensor, shift1: Tensor, w2: Tensor, scale2: Tensor, shift2: Tensor,
        w3: Tensor, stride: int, eps1: float, eps2: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given, x = x, x.contiguous(memory_format=torch.channels_last)
        wide, part, to_wide = w1.shape[0], images_in_cache(x, w1.shape[0]), w1.flatten(1)

        mean = _rows(x).mean(0)
        cov = x.new_zeros(x.shape[1], x.shape[1])
        for images in x.split(part):
            centred = _rows(images) - mean
            cov.addmm_(centred.t(), centred)
        cov /= x.numel() // x.shape[1]
        mean1, var1 = to_wide @ mean, ((to_wide @ cov) * to_wide).sum(1)
        normed_to_wide = (scale1 * (var1 + eps1).rsqrt())[:, None] * to_wide

        inner = _new(wide, tuple((side - 1) // stride + 1 for side in x.shape[2:]), x)
        for images, target in zip(x.split(part), inner.split(part), strict=True):
            z = product(_rows(images) - mean, normed_to_wide, shift1)
            target.copy_(F.conv2d(_map(F.silu(z, inplace=True), images), w2, None, stride, 1, 1, wide))
        mean2, var2 = torch.batch_norm_update_stats(inner, None, None, 0.0)
        out = _new(w3.shape[0], inner.shape[2:], x)
        for images, target in zip(inner.split(part), out.split(part), strict=True):
            z = F.batch_norm(images, mean2, var2, scale2, shift2, False, 0.0, eps2)
            _rows(target).copy_(product(_rows(F.silu(z, inplace=True)), w3.flatten(1)))

        ctx.save_for_backward(given, w1, scale1, shift1, w2, scale2, shift2, w3, mean, cov, var1, inner, mean2, var2)
        ctx.numbers = stride, eps1, eps2
        ctx.mark_non_differentiable(mean1, var1, mean2, var2)
        return out, mean1, var1, mean2, var2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> Any:
        x, w1, scale1, shift1, w2, scale2, shift2, w3, mean, cov, var1, inner, mean2, var2 = ctx.saved_tensors
        stride, eps1, eps2 = ctx.numbers
        if torch.is_grad_enabled():
            return by_autograd(_plain, (x, w1, scale1, shift1, w2, scale2, shift2, w3, *ctx.numbers), gradient)
        x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x, gradient))
        wide, part, to_wide, from_wide = w1.shape[0], images_in_cache(x, w1.shape[0]), w1.flatten(1), w3.flatten(1)

        # Back to the second norm's output: the gradient d there, the sums of d and of d times the norm's input.
        of_w3, sum2, sum2_by_inner = torch.zeros_like(from_wide), torch.zeros_like(mean2), torch.zeros_like(mean2)
        at_inner = torch.empty_like(inner)
        for images, arriving, d in zip(inner.split(part), gradient.split(part), at_inner.split(part), strict=True):
            z = F.batch_norm(images, mean2, var2, scale2, shift2, False, 0.0, eps2)
            y = F.silu(z)
            of_w3.addmm_(_rows(arriving).t(), _rows(y))
            _silu_backward(_map(product(_rows(arriving), from_wide.t()), arriving), z, grad_input=d)
            sum2 += _rows(d).sum(0)
            sum2_by_inner += _rows(torch.mul(d, images, out=y)).sum(0)
        count, rstd2 = inner.numel() // wide, (var2 + eps2).rsqrt()
        of_scale2 = rstd2 * (sum2_by_inner - mean2 * sum2)
        # Through the norm it is a * d + b * input + c.
        a = scale2 * rstd2
        b = -a * rstd2 * of_scale2 / count
        c = -a * sum2 / count - b * mean2
        a, b, c = (t[:, None, None] for t in (a, b, c))

        # Back to the first norm's output, and on to x but for what that norm takes away.
        rstd1 = (var1 + eps1).rsqrt()
        factor = scale1 * rstd1
        normed_to_wide = factor[:, None] * to_wide
        of_w2, sum1, sum1_by_x = torch.zeros_like(w2), torch.zeros_like(var1), torch.zeros_like(to_wide)
        of_x = torch.empty_like(x)
        parts = (t.split(part) for t in (x, inner, at_inner, of_x))
        for images, normed, arriving, target in zip(*parts, strict=True):
            arriving.mul_(a).add_(c).addcmul_(normed, b)
            centred = _rows(images) - mean
            z = _map(product(centred, normed_to_wide, shift1), images)
            at_y, of_this_w2, _ = torch.ops.aten.convolution_backward(
                arriving, F.silu(z), w2, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], wide, [True, True, False]
            )
            of_w2 += of_this_w2
            d = _rows(_silu_backward(at_y, z, grad_input=at_y))
            sum1 += d.sum(0)
            sum1_by_x.addmm_(d.t(), centred)
            _rows(target).copy_(product(d, normed_to_wide.t()))
        count = x.numel() // x.shape[1]
        of_scale1 = rstd1 * (to_wide * sum1_by_x).sum(1)
        of_w1 = factor[:, None] * (sum1_by_x - (of_scale1 * rstd1)[:, None] * (to_wide @ cov))
        taken = to_wide.t() @ ((factor * rstd1 * of_scale1 / count)[:, None] * to_wide)
        _rows(of_x).addmm_(_rows(x), taken, alpha=-1).add_(mean @ taken - (factor * sum1 / count) @ to_wide)
        weights = of_w1.view_as(w1), of_scale1, sum1, of_w2, of_scale2, sum2, of_w3.view_as(w3)
        return of_x, *weights, None, None, None
