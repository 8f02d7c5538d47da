"""Detection, and with masks instance segmentation: what goes in is an image, what comes out are its objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.data.annotated import Objects
from chiasm.data.placement import Placement, letterbox
from chiasm.results import Detections
from chiasm.results.masks import encode_mask

if TYPE_CHECKING:
    from chiasm.data.views import ObjectTarget
    from chiasm.models.detectors import Detector, Pyramid
    from chiasm.tasks.detect_metrics import DetectionMetrics


class Detect(nn.Module):
    """A detector with the classes it tells apart.

    Args:
        model: see `chiasm.models.detectors`.
        labels: the class names.
        masks: whether its objects have masks.
        threshold: least score of an object that `decode` gives, 0..1.
    """

    def __init__(self, model: Detector, labels: Sequence[str], *, masks: bool, threshold: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.labels = tuple(labels)
        self.masks = masks
        self.threshold = threshold
        self.name = "instances" if masks else "detect"

    def forward(self, images: Tensor) -> Pyramid:
        """Images (B, C, H, W) -> the pyramid that the heads look at."""
        return self.model(images)

    def loss(self, outputs: Pyramid, targets: Sequence[ObjectTarget]) -> dict[str, Tensor]:
        """The sum of the detector's own terms, as 'loss', and each as 'loss/<term>'; crowds are not learned from."""
        device = next(iter(outputs.values())).device
        terms = self.model.losses(outputs, [_to_learn(target, device) for target in targets])
        return {"loss": torch.stack([*terms.values()]).sum(), **{f"loss/{name}": v for name, v in terms.items()}}

    def decode(
        self, outputs: Pyramid, sources: Sequence[str], placements: Sequence[Sequence[Placement]]
    ) -> list[Detections]:
        """The objects of each image in its original pixels, best first.

        Args:
            outputs: what `forward` gave for one canvas per image.
            sources: the images' names.
            placements: per image how it lies on its canvas, one each.
        """
        found = self.model.detect(outputs)
        return [
            self._result({name: values.float().cpu() for name, values in one.items()}, source, placement)
            for one, source, (placement,) in zip(found, sources, placements, strict=True)
        ]

    def validation(self) -> DetectValidation:
        """What measures an epoch."""
        return DetectValidation(self)

    def metrics(self) -> DetectionMetrics:
        """What collects results of `decode` with the true objects and scores them."""
        from chiasm.tasks.detect_metrics import DetectionMetrics

        return DetectionMetrics(self.labels, self.masks)

    def _result(self, found: dict[str, Tensor], source: str, placement: Placement) -> Detections:
        boxes = placement.to_original(found["boxes"])
        kept = (found["scores"] >= self.threshold) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        masks = None
        if self.masks:
            # Heads learn masks by torchvision's RoIAlign, which takes a pixel's centre for its corner: what they say of
            # a place is true half a pixel further on.
            whole = placement.to_original(found["boxes"][kept] + 0.5, clip=False)
            masks = paste_masks(found["masks"][kept], whole, placement.original)
        return Detections(
            source=source,
            labels=self.labels,
            size=placement.original,
            boxes=boxes[kept].numpy(),
            classes=found["labels"][kept].long().numpy(),
            scores=found["scores"][kept].clamp(0, 1).numpy(),
            masks=masks,
        )


class DetectValidation:
    """Average precision over the objects of an epoch, in pixels of the canvas.

    Args:
        task: whose results are measured.
    """

    def __init__(self, task: Detect) -> None:
        self.score = "mask_ap" if task.masks else "ap"
        self._task = task
        self._metrics = task.metrics()

    def add(self, outputs: Pyramid, targets: Sequence[ObjectTarget], real: Tensor) -> None:
        """Measure a batch; `real` (B,) bool is False for images that only fill it up."""
        height, width = outputs["image"].shape[-2:]
        asis = letterbox((height, width), (height, width))
        results = self._task.decode(outputs, [""] * len(targets), [[asis]] * len(targets))
        kept = [i for i, is_real in enumerate(real.tolist()) if is_real]
        self._metrics.update([results[i] for i in kept], [_as_objects(targets[i], height, width) for i in kept])

    def state(self) -> Any:
        return self._metrics.state()

    def compute(self, states: Sequence[Any]) -> dict[str, float]:
        metrics = self._task.metrics()
        for state in states:
            metrics.merge(state)
        if not len(metrics):
            return {}
        scores = metrics.compute(sizes=False)
        values = {"ap": scores.boxes.ap, "ap50": scores.boxes.ap50}
        if scores.masks is not None:
            values = {"mask_ap": scores.masks.ap, "mask_ap50": scores.masks.ap50, **values}
        return {name: value or 0.0 for name, value in values.items()}  # without any object nothing can be found


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Masks over their boxes as masks of the image: each pixel's centre is looked up, bilinear, true from 0.5.

    torchvision's own pasting rounds boxes to whole pixels, which costs small objects much of their overlap.

    Args:
        masks: (N, h, w) probabilities over the boxes.
        boxes: (N, 4) left, top, right, bottom in pixels of the image, also beyond its edges.
        size: height and width of the image.

    Returns:
        (N, height, width) bool.
    """
    height, width = size
    pasted = np.zeros((len(masks), height, width), dtype=bool)
    for i, (mask, (left, top, right, bottom)) in enumerate(zip(masks, boxes.tolist(), strict=True)):
        rows = slice(max(0, int(top)), min(height, int(bottom) + 1))
        columns = slice(max(0, int(left)), min(width, int(right) + 1))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        y = (torch.arange(rows.start, rows.stop) + 0.5 - top) / max(bottom - top, 1e-6) * 2 - 1
        x = (torch.arange(columns.start, columns.stop) + 0.5 - left) / max(right - left, 1e-6) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
        inside = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0] >= 0.5
        pasted[i, rows, columns] = inside.numpy()
    return pasted


def _to_learn(target: ObjectTarget, device: torch.device) -> dict[str, Tensor]:
    own = ~target.crowd
    learned = {"boxes": target.boxes[own].to(device), "labels": target.labels[own].to(device)}
    if target.masks is not None:
        learned["masks"] = target.masks[own].to(device, torch.uint8)
    return learned


def _as_objects(target: ObjectTarget, height: int, width: int) -> Objects:
    """What is seen of the true objects on the canvas."""
    target = target.to("cpu")
    boxes = target.boxes
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    outlines: tuple[dict[str, Any], ...] = ()
    if target.masks is not None:
        areas = target.masks.flatten(1).sum(dim=1).float()
        outlines = tuple(encode_mask(mask) for mask in target.masks.numpy())
    return Objects(
        image_id=0, height=height, width=width, boxes=boxes, labels=target.labels, crowd=target.crowd, areas=areas,
        outlines=outlines,
    )  # fmt: skip
