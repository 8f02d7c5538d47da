"""MobileViT, both versions, against timm's: the same logits and the same gradients in float64, at any size."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from chiasm.models import create_model, list_models

PUBLISHED_PARAMETERS = {
    "mobilevit_xxs_256": 1_272_024,
    "mobilevit_xs_256": 2_317_848,
    "mobilevit_s_256": 5_578_632,
    "mobilevitv2_050_256": 1_370_593,
    "mobilevitv2_075_256": 2_866_009,
    "mobilevitv2_100_256": 4_901_841,
    "mobilevitv2_125_256": 7_478_089,
    "mobilevitv2_150_256": 10_594_753,
    "mobilevitv2_175_256": 14_251_833,
    "mobilevitv2_200_256": 18_449_329,
}


def _timms(name: str) -> str:
    return name.removesuffix("_256")


def _give_statistics(model: nn.Module) -> None:
    """BN as after training: statistics and scales that are not those of a new network."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)


def _twins(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """timm's model and ours with its weights, both in evaluation mode."""
    torch.manual_seed(0)
    theirs = timm.create_model(_timms(name), num_classes=10)
    _give_statistics(theirs)
    ours = create_model(name, num_classes=10)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype).eval(), ours.to(dtype).eval()


def test_every_size_is_here() -> None:
    assert sorted(PUBLISHED_PARAMETERS) == list_models("mobilevit")


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_PARAMETERS.items())
def test_published_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == parameters


@pytest.mark.parametrize("size", [(64, 96), (100, 140), (50, 77)], ids=str)
@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_logits_are_timms(name: str, size: tuple[int, int]) -> None:
    """Also where a map does not divide by the patch: 100 px have 13 at stride 8, and 7 at stride 16."""
    theirs, ours = _twins(name)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_gradients_are_timms(name: str) -> None:
    theirs, ours = _twins(name)
    images = torch.randn(2, 3, 50, 70, dtype=torch.float64)
    for model in (theirs, ours):
        model.train()(images).square().sum().backward()
    expected = dict(theirs.named_parameters())
    scale = max(p.grad.abs().max().item() for p in expected.values())
    for key, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[key].grad, rtol=0, atol=1e-9 * scale, msg=lambda m, k=key: k + m)
    statistics = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, statistics[key])
