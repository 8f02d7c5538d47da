"""The architectures as backbones of other people's libraries, forward and backward, on small images."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import chiasm.models  # noqa: F401 - registers the architectures with timm

NAME = "conformer_small_patch16_224"
NARROW = {"stem_chs": 16, "dim": 48, "heads": 3}  # the published structure, thin enough for a quick test


def _reached(model: nn.Module, loss: Tensor) -> set[str]:
    """The parameters that the loss has a gradient for, after its backward pass."""
    loss.backward()
    return {key for key, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}


def test_timms_features_of_the_published_size() -> None:
    backbone = timm.create_model(NAME, features_only=True)
    assert backbone.feature_info.channels() == [256, 512, 1024, 1024]
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in maps] == [(256, 16, 24), (512, 8, 12), (1024, 4, 6), (1024, 2, 3)]
    reached = _reached(backbone, sum(level.square().mean() for level in maps))
    assert reached == {key for key, _ in backbone.named_parameters()}  # what nothing reads is not built in


@pytest.mark.parametrize("decoder", [smp.Unet, smp.FPN, smp.UPerNet], ids=lambda decoder: decoder.__name__)
@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=str)
def test_segmentation_models_pytorch(decoder: type[nn.Module], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = decoder(f"tu-{NAME}", encoder_weights=None, classes=4, **NARROW)
    masks = model(torch.randn(2, 3, *size))
    assert masks.shape == (2, 4, *size)
    reached = _reached(model, masks.square().mean())
    assert {key.split(".")[0] for key in reached} == {"encoder", "decoder", "segmentation_head"}
    assert any("transformer" in key for key in reached)  # through the coupling


class _Pyramid(nn.Module):
    """timm's features under torchvision's pyramid: what a torchvision detector takes as its backbone."""

    def __init__(self, out_channels: int = 32) -> None:
        super().__init__()
        self.body = timm.create_model(NAME, features_only=True, **NARROW)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(images))))


def _targets() -> list[dict[str, Tensor]]:
    return [
        {"boxes": torch.tensor([[8.0, 8.0, 40.0, 56.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[4.0, 10.0, 60.0, 50.0], [20.0, 20.0, 44.0, 44.0]]), "labels": torch.tensor([2, 1])},
    ]


@pytest.mark.parametrize("detector", [FasterRCNN, RetinaNet], ids=lambda detector: detector.__name__)
def test_torchvision_detection(detector: type[nn.Module]) -> None:
    torch.manual_seed(0)
    anchors = AnchorGenerator(sizes=((16,), (32,), (48,), (64,)), aspect_ratios=((0.5, 1.0, 2.0),) * 4)
    own = {"rpn_anchor_generator": anchors} if detector is FasterRCNN else {"anchor_generator": anchors}
    model = detector(_Pyramid(), num_classes=3, min_size=64, max_size=96, **own)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 80)]
    losses = model(images, _targets())
    assert all(loss.isfinite() for loss in losses.values())
    reached = _reached(model, sum(losses.values()))
    assert any(key.startswith("backbone.body.") and "transformer" in key for key in reached)
    assert "backbone.body.model.stem.conv.weight" in reached

    model.eval()
    with torch.no_grad():
        found = model(images)
    assert len(found) == 2
    assert all(set(one) >= {"boxes", "labels", "scores"} and one["boxes"].shape[1] == 4 for one in found)
