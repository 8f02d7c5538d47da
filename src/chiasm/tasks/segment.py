"""Semantic segmentation: what goes in is an image, what comes out is a class for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.data.annotated import IGNORE
from chiasm.data.placement import Placement
from chiasm.results import Segmentation

if TYPE_CHECKING:
    from chiasm.tasks.segment_metrics import SegmentationMetrics

# Classes times pixels of an image whose probabilities are enlarged to its size; beyond, its classes are.
_MOST = 1 << 28


class Segment(nn.Module):
    """A segmenter with the classes it tells apart.

    Args:
        model: images (B, C, H, W) -> logits (B, classes, H, W).
        labels: the class names in the order of the logits.
        label_smoothing: share of the target given to all classes alike, 0..1.
        class_weights: (classes,) factors on the cross-entropy, or None.
        dice: weight of the Dice loss beside cross-entropy; 0 leaves it out.
    """

    name = "segment"
    class_weights: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        labels: Sequence[str],
        *,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        dice: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.labels = tuple(labels)
        self.label_smoothing = label_smoothing
        self.dice = dice
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, classes, H, W)."""
        return self.model(images)

    def loss(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy and Dice over the pixels whose class is known, as 'loss' and each of them as 'loss/<term>'.

        `targets` (B, H, W) are class indices, or `IGNORE`.
        """
        known = targets != IGNORE
        logits = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        entropy = F.cross_entropy(
            logits, targets, weight=self.class_weights, ignore_index=IGNORE, reduction="sum",
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        # Not 'mean': of a batch without any known pixel that is no number.
        whole = known.sum() if self.class_weights is None else self.class_weights[targets[known]].sum()
        terms = {"loss/entropy": torch.where(whole > 0, entropy / whole.clamp(min=1e-6), entropy * 0)}
        if self.dice:
            from segmentation_models_pytorch.losses import DiceLoss

            terms["loss/dice"] = self.dice * DiceLoss("multiclass", ignore_index=IGNORE)(logits, targets)
        return {"loss": torch.stack([*terms.values()]).sum(), **terms}

    def decode(
        self, outputs: Tensor, sources: Sequence[str], placements: Sequence[Sequence[Placement]]
    ) -> list[Segmentation]:
        """The class map of each image at its original size.

        Args:
            outputs: the logits of all canvases, image after image.
            sources: the images' names.
            placements: per image how it lies on each of its canvases; where those overlap, probabilities are averaged,
                by how far a pixel is from a canvas's edge.
        """
        parts = outputs.split([len(views) for views in placements])
        return [
            Segmentation(source=source, labels=self.labels, classes=_classes(logits, views).cpu().numpy())
            for logits, source, views in zip(parts, sources, placements, strict=True)
        ]

    def validation(self) -> SegmentValidation:
        """What measures an epoch."""
        return SegmentValidation(self)

    def metrics(self) -> SegmentationMetrics:
        """What collects results of `decode` with the true class maps and scores them."""
        from chiasm.tasks.segment_metrics import SegmentationMetrics

        return SegmentationMetrics(self.labels)


class SegmentValidation:
    """mIoU, pixel accuracy and loss over the pixels of an epoch, on the canvas.

    Args:
        task: whose logits are measured.
    """

    score = "miou"

    def __init__(self, task: Segment) -> None:
        self._task = task
        self._confusion = torch.zeros(len(task.labels), len(task.labels), dtype=torch.int64)
        self._loss, self._images = 0.0, 0

    def add(self, outputs: Tensor, targets: Tensor, real: Tensor) -> None:
        """Measure a batch; `real` (B,) bool is False for images that only fill it up."""
        outputs, targets = outputs[real], targets[real]
        if not len(targets):
            return
        self._loss += float(self._task.loss(outputs, targets)["loss"]) * len(targets)
        self._images += len(targets)
        known, count = targets != IGNORE, len(self._task.labels)
        pairs = targets[known] * count + outputs.argmax(dim=1)[known]
        self._confusion += torch.bincount(pairs, minlength=count * count).reshape(count, count).cpu()

    def state(self) -> Any:
        return self._confusion.numpy(), self._loss, self._images

    def compute(self, states: Sequence[Any]) -> dict[str, float]:
        images = sum(state[2] for state in states)
        if not images:
            return {}
        confusion = torch.as_tensor(sum(state[0] for state in states)).double()
        right, either = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        present = either > 0
        return {
            "loss": sum(state[1] for state in states) / images,
            "miou": float((right[present] / either[present]).mean()) if present.any() else 0.0,
            "pixel_accuracy": float(right.sum() / confusion.sum().clamp(min=1)),
        }


def _classes(logits: Tensor, views: Sequence[Placement]) -> Tensor:
    """Logits (K, classes, h, w) of one image's canvases -> its class map (H, W) uint8."""
    height, width = views[0].resized
    total = logits.new_zeros(logits.shape[1], height, width, dtype=torch.float32)
    weights = logits.new_zeros(height, width, dtype=torch.float32)
    for one, view in zip(logits.float().softmax(dim=1), views, strict=True):
        trust = _trust(view, one.device) if len(views) > 1 else torch.ones(view.canvas, device=one.device)
        (top, left), (rows, columns) = view.offset, view.canvas
        there = (slice(max(0, -top), rows - top), slice(max(0, -left), columns - left))
        here = (slice(max(0, top), height + top), slice(max(0, left), width + left))
        total[:, *there] += (one * trust)[:, *here]
        weights[there] += trust[here]
    total /= weights
    original = list(views[0].original)
    if total.shape[0] * original[0] * original[1] <= _MOST:
        larger = F.interpolate(total[None], size=original, mode="bilinear", align_corners=False)
        return larger[0].argmax(dim=0).to(torch.uint8)
    small = total.argmax(dim=0).float()
    return F.interpolate(small[None, None], size=original, mode="nearest-exact")[0, 0].to(torch.uint8)


def _trust(view: Placement, device: torch.device) -> Tensor:
    """(h, w): how far each pixel of a canvas is from its edge, since near it half of the surroundings is not seen."""
    rows, columns = (torch.arange(1, side + 1, device=device, dtype=torch.float32) for side in view.canvas)
    return torch.minimum(rows, rows.flip(0))[:, None] * torch.minimum(columns, columns.flip(0))
