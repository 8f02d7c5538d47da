"""Detectors on a feature pyramid over any backbone: torchvision's heads on our maps.

    image -> backbone -> maps of strides 4 ... 32 -> FPN -> heads
    faster_rcnn   proposals, then a class and a box for each        (Ren et al. 2015, arXiv 1506.01497)
    mask_rcnn     the same, and a mask for each                     (He et al. 2017, arXiv 1703.06870)
    fcos          a class and a box from every place of the maps    (Tian et al. 2019, arXiv 1904.01355)

`forward` gives the pyramid. Which places of it the heads look at depends on the true boxes in training and on the
scores in prediction, so heads run in `losses` and in `detect`. Images come as one canvas of one size, normalised, so
torchvision's own resizing and batching are left out. Coordinates are pixels of the canvas.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from chiasm.errors import ChiasmError
from chiasm.models.maps import Maps, OnMaps

Pyramid = dict[str, Tensor]

IMAGE = "image"  # in the pyramid: the images themselves, for their size
RATIOS = (0.5, 1.0, 2.0)
ROI_SIDE = 7


class Detector(OnMaps):
    """What the detectors share: a feature pyramid whose every level has `channels`. Arguments as for `OnMaps`."""

    heads: tuple[str, ...]
    fpn: nn.Module

    def forward(self, images: Tensor) -> Pyramid:
        """Images (B, C, H, W) -> levels (B, channels, h, w) by name, from fine to coarse, and the images as 'image'."""
        levels = self._levels(self.maps(self.backbone, images))
        pyramid = self.fpn(OrderedDict((str(i), level) for i, level in enumerate(levels)))
        return {IMAGE: images, **pyramid}

    def losses(self, pyramid: Pyramid, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The terms of the loss, in training mode.

        Args:
            pyramid: what `forward` gave.
            targets: per image 'boxes' (N, 4) float, 'labels' (N,) from 0 and, for masks, 'masks' (N, H, W) uint8.
        """
        raise NotImplementedError

    def detect(self, pyramid: Pyramid) -> list[dict[str, Tensor]]:
        """What is found in each image, in evaluation mode.

        Returns:
            Per image 'boxes' (N, 4), 'labels' (N,) from 0, 'scores' (N,), best first, and, for masks, 'masks'
            (N, 28, 28), the probability of the object over its box.
        """
        raise NotImplementedError

    def get_classifier(self) -> list[nn.Module]:
        """All but the backbone."""
        return [getattr(self, name) for name in self.heads]

    def _levels(self, maps: list[Tensor]) -> list[Tensor]:
        return maps

    def _pyramid(self, in_channels: Sequence[int], extra: Any) -> FeaturePyramidNetwork:
        return FeaturePyramidNetwork(list(in_channels), self.channels, extra, norm_layer=_norm)


class TwoStage(Detector):
    """Faster R-CNN, with `masks` Mask R-CNN.

    Args:
        backbone, maps, num_classes, channels: as for `Detector`.
        masks: whether each object gets a mask.
        anchors: side of the anchor boxes of each of the five levels, strides 4 to 64, in pixels.
        ratios: their heights over their widths.
        hidden: width of the box head; default: four times `channels`.
        rois: boxes per image that the second stage learns from.
        proposals: boxes per image that go into it, in training and prediction.
        detections: objects per image at most.
        threshold: least score of a detection.
        nms: overlap (IoU) above which the lower of two detections of one class is dropped.
    """

    heads = ("fpn", "rpn", "roi_heads")

    def __init__(
        self,
        backbone: nn.Module,
        maps: Maps,
        num_classes: int,
        *,
        masks: bool,
        channels: int | None = None,
        anchors: Sequence[float] = (32, 64, 128, 256, 512),
        ratios: Sequence[float] = RATIOS,
        hidden: int | None = None,
        rois: int = 512,
        proposals: int = 1000,
        detections: int = 100,
        threshold: float = 0.05,
        nms: float = 0.5,
    ) -> None:
        super().__init__(backbone, maps, num_classes, channels)
        if len(anchors) != 5:
            raise ChiasmError(
                f"anchors are {list(anchors)}: expected five sides in pixels, for strides 4, 8, 16, 32, 64."
            )
        width = self.channels
        hidden = hidden or 4 * width
        self.fpn = self._pyramid(maps.channels, LastLevelMaxPool())
        options: dict[str, Any] = {
            "backbone": _Width(width),
            "rpn_anchor_generator": AnchorGenerator(tuple((side,) for side in anchors), (tuple(ratios),) * 5),
            "rpn_head": _RPNHead(width, len(ratios)),
            "rpn_pre_nms_top_n_train": 2 * proposals,
            "rpn_pre_nms_top_n_test": proposals,
            "rpn_post_nms_top_n_train": proposals,
            "rpn_post_nms_top_n_test": proposals,
            "box_head": TwoMLPHead(width * ROI_SIDE**2, hidden),
            "box_predictor": _BoxPredictor(hidden, num_classes + 1),
            "box_batch_size_per_image": rois,
            "box_detections_per_img": detections,
            "box_score_thresh": threshold,
            "box_nms_thresh": nms,
        }
        if masks:
            options["mask_head"] = MaskRCNNHeads(width, (width,) * 4, 1, norm_layer=_norm)
            options["mask_predictor"] = MaskRCNNPredictor(width, width, num_classes + 1)
        whole = (MaskRCNN if masks else FasterRCNN)(**options)
        self.rpn, self.roi_heads = whole.rpn, whole.roi_heads

    def losses(self, pyramid: Pyramid, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        images, levels = _opened(pyramid)
        counted = [{**target, "labels": target["labels"] + 1} for target in targets]  # 0 is the background
        proposals, first = self.rpn(images, levels, counted)
        _, second = self.roi_heads(levels, proposals, images.image_sizes, counted)
        return {name.removeprefix("loss_"): value for name, value in {**first, **second}.items()}

    def detect(self, pyramid: Pyramid) -> list[dict[str, Tensor]]:
        images, levels = _opened(pyramid)
        proposals, _ = self.rpn(images, levels)
        found, _ = self.roi_heads(levels, proposals, images.image_sizes)
        for one in found:
            one["labels"] = one["labels"] - 1
            if "masks" in one:
                one["masks"] = one["masks"].squeeze(1)
        return found


class OneStage(Detector):
    """FCOS on strides 8 to 128.

    Args:
        backbone, maps, num_classes, channels: as for `Detector`.
        detections, threshold, nms: as for `TwoStage`.
    """

    heads = ("fpn", "fcos")

    def __init__(
        self,
        backbone: nn.Module,
        maps: Maps,
        num_classes: int,
        *,
        channels: int | None = None,
        detections: int = 100,
        threshold: float = 0.05,
        nms: float = 0.6,
    ) -> None:
        super().__init__(backbone, maps, num_classes, channels)
        self.fpn = self._pyramid(maps.channels[1:], _P6P7(self.channels, self.channels))
        self.fcos = FCOS(
            _Width(self.channels), num_classes, score_thresh=threshold, nms_thresh=nms, detections_per_img=detections
        )

    def losses(self, pyramid: Pyramid, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        answers, anchors, sizes, _ = self._answers(pyramid)
        terms = self.fcos.compute_loss(targets, answers, anchors, sizes)
        return {name.removeprefix("bbox_"): value for name, value in terms.items()}

    def detect(self, pyramid: Pyramid) -> list[dict[str, Tensor]]:
        answers, anchors, sizes, shapes = self._answers(pyramid)
        by_level = {name: list(values.split(sizes, dim=1)) for name, values in answers.items()}
        return self.fcos.postprocess_detections(by_level, [list(own.split(sizes)) for own in anchors], shapes)

    def _levels(self, maps: list[Tensor]) -> list[Tensor]:
        return maps[1:]

    def _answers(self, pyramid: Pyramid) -> tuple[dict[str, Tensor], list[Tensor], list[int], list[tuple[int, int]]]:
        """What the head says of every place, the places, how many each level has, and the images' sizes."""
        images, levels = _opened(pyramid)
        maps = list(levels.values())
        answers = {name: values.float() for name, values in self.fcos.head(maps).items()}
        anchors = self.fcos.anchor_generator(images, maps)
        return answers, anchors, [level.shape[-2] * level.shape[-1] for level in maps], images.image_sizes


# Boxes, and the places of masks in their lists, take the type of what moves the anchors. In a half type boxes would lie
# on a grid of two pixels from 256 on, and of 300 masks the wrong one would be learned.


class _RPNHead(RPNHead):
    """What it says of each anchor, in float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, moves = super().forward(x)
        return [score.float() for score in scores], [move.float() for move in moves]


class _BoxPredictor(FastRCNNPredictor):
    """What it says of each proposal, in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, moves = super().forward(x)
        return scores.float(), moves.float()


class _P6P7(LastLevelP6P7):
    """Two levels beyond the backbone's, in float32: on a CPU the half type's gradient of a 3x3 convolution of stride 2
    is wrong for maps of one column (seen in PyTorch 2.15), which these levels are of small images."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        with torch.autocast(p[-1].device.type, enabled=False):
            return super().forward([level.float() for level in p], c, names)


class _Width(nn.Module):
    """What torchvision asks a backbone for before it has run."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels


def _opened(pyramid: Pyramid) -> tuple[ImageList, Pyramid]:
    """The images with their sizes, and the levels. In float32: anchors take the levels' type, and half types cannot
    tell neighbouring pixels apart."""
    images = pyramid[IMAGE]
    height, width = images.shape[-2:]
    levels = {name: level.float() for name, level in pyramid.items() if name != IMAGE}
    return ImageList(images, [(height, width)] * len(images)), levels


# Batches are small, and from random weights heads without any norm hardly learn (He et al. 2019, arXiv 1811.08883).
_norm = partial(nn.GroupNorm, 32)


@torch.no_grad()
def anchors_for(boxes: Tensor, *, strides: Sequence[int] = (4, 8, 16, 32, 64)) -> tuple[list[float], list[float]]:
    """Sides of the anchors per level, and their height-to-width ratios, for boxes like these.

    The sides are the means of five groups of equally many boxes by the root of their areas, none below twice its
    level's stride, since smaller boxes would lie between two places; the ratios are the medians of three such groups.

    Args:
        boxes: (N, 2) widths and heights in pixels of the canvas, N from 1.
        strides: of the levels, from fine to coarse.
    """
    roots = boxes.prod(dim=1).sqrt().sort().values
    shape = (boxes[:, 1] / boxes[:, 0]).log()
    groups = torch.tensor_split(roots, len(strides)) if len(roots) >= len(strides) else [roots] * len(strides)
    sides = [max(float(group.mean()), 2.0 * stride) for group, stride in zip(groups, strides, strict=True)]
    ratios = shape.quantile(torch.tensor([1 / 6, 1 / 2, 5 / 6])).exp()
    return [round(side, 1) for side in sides], [round(float(ratio), 2) for ratio in ratios]
