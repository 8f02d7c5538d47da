"""Heat maps against textbook twins, and against what they must do whatever the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from chiasm.config import Preprocess
from chiasm.data.images import read_image
from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.explaining.explainer import Explainer, open_explainer
from chiasm.explaining.maps import choose, gradcam, gradient_rollout, on_canvas, rollout
from chiasm.explaining.record import Attention, Feature, record
from chiasm.model_file import ModelInfo
from chiasm.models import create_model
from chiasm.models.heads import with_head

PIXELS = torch.randint(0, 256, (3, 90, 140), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
COUPLED = "conformer_nano_patch8_64"


def info(name: str, size: int = 64, **changes: object) -> ModelInfo:
    labels = ("ant", "bee", "cat")
    return ModelInfo(architecture=name, labels=labels, preprocess=Preprocess(size=(size, size)), **changes)  # type: ignore[arg-type]


def explainer(name: str, size: int = 64, **options: object) -> Explainer:
    torch.manual_seed(0)
    model = create_model(name, num_classes=3)
    for part, parameter in model.named_parameters():  # what joins two networks adds nothing when new
        if part == "scale" or (part.startswith("exchanges") and part.endswith(("to_map", "to_tokens"))):
            nn.init.constant_(parameter, 0.5)
    return Explainer(model, info(name, size), device="cpu", **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- twins


def test_gradcam_of_a_pooled_linear_head_is_cam() -> None:
    """Where the head is linear on the mean of the map, Grad-CAM is the class activation map of Zhou et al. 2016."""
    torch.manual_seed(1)
    model = create_model("resnet10t", num_classes=3).eval()
    image = torch.randn(1, 3, 224, 224, requires_grad=True)
    kept = record(model, image)
    deepest = kept.features[-1]
    (gradient,) = torch.autograd.grad(kept.outputs[0, 2], [deepest.raw])
    cam = torch.einsum("c,chw->hw", model.fc.weight[2], deepest.map[0]).relu()  # type: ignore[operator, index]
    ours = gradcam(deepest.map, gradient)
    assert torch.allclose(ours / ours.sum(), cam / cam.sum(), atol=1e-6)
    # Behind that head every place has the same gradient, so weighing each by its own is the same.
    assert torch.allclose(gradcam(deepest.map, gradient, local=True), ours, atol=1e-6)


def attentions(count: int = 3, prefix: int = 1, grid: tuple[int, int] = (3, 4)) -> tuple[list[Attention], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = prefix + grid[0] * grid[1]
    weights = [torch.rand(1, 2, tokens, tokens, generator=generator).softmax(-1) for _ in range(count)]
    gradients = [torch.randn(1, 2, tokens, tokens, generator=generator) for _ in range(count)]
    index = torch.arange(tokens)[None]
    made = [Attention("model", f"block {i}", w, index, prefix, grid, (16, 16), w) for i, w in enumerate(weights)]
    return made, gradients


@pytest.mark.parametrize(("reads", "prefix"), [((0,), 1), ((), 0), ((), 1), ((0, 1), 2)])
def test_rollouts_are_rows_of_the_matrices_product(reads: tuple[int, ...], prefix: int) -> None:
    made, gradients = attentions(prefix=prefix)
    tokens = made[0].weights.shape[-1]
    followed, relevance = torch.eye(tokens), torch.eye(tokens)
    for attention, gradient in zip(made, gradients, strict=True):
        followed = (attention.weights[0].mean(0) + torch.eye(tokens)) / 2 @ followed
        spoke = (attention.weights * gradient).relu()[0].mean(0)
        relevance = relevance + spoke @ relevance
    start = torch.zeros(tokens)
    start[list(reads) if reads else slice(prefix, None)] = 1
    start /= start.sum()
    assert torch.allclose(rollout(made, reads).flatten(), (start @ followed)[prefix:], atol=1e-6)
    expected = (start @ (relevance - torch.eye(tokens)))[prefix:]
    assert torch.allclose(gradient_rollout(made, gradients, reads).flatten(), expected, atol=1e-5)
    known = torch.rand(3, 4)
    start = torch.cat([torch.zeros(prefix), known.flatten() / known.sum()])
    expected = (start @ (relevance - torch.eye(tokens)))[prefix:]
    assert torch.allclose(gradient_rollout(made, gradients, reads, known).flatten(), expected, atol=1e-5)


def test_rollout_stays_within_windows_and_goes_on_to_finer_grids() -> None:
    coarse = torch.ones(1, 1, 4, 4) / 4
    top = Attention("model", "2", coarse, torch.arange(4)[None], 0, (2, 2), (8, 8), coarse)
    one_window = torch.zeros(4, 1, 4, 4)
    one_window[:, :, :, 0] = 1  # each window's tokens look at its first
    corners = torch.tensor([[r * 4 + c for r in (y, y + 1) for c in (x, x + 1)] for y in (0, 2) for x in (0, 2)])
    fine = Attention("model", "1", one_window, corners, 0, (4, 4), (4, 4), one_window)
    found = rollout([fine, top], ())
    assert found.sum() == pytest.approx(1)
    assert torch.allclose(found[::2, ::2], torch.full((2, 2), 0.25 * (0.5 + 0.125)), atol=1e-6)
    assert torch.allclose(found[1::2], torch.full((2, 4), 1 / 32), atol=1e-6)


def test_slots_without_a_token_give_and_get_nothing() -> None:
    weights = torch.full((1, 1, 3, 3), 1 / 3)
    padded = Attention("model", "1", weights, torch.tensor([[0, 1, -1]]), 0, (1, 2), (4, 4), weights)
    assert torch.allclose(rollout([padded], ()), torch.tensor([[0.25 + 1 / 6, 0.25 + 1 / 6]]))


def test_the_level_is_the_deepest_with_seven_places() -> None:
    def feature(side: int) -> Feature:
        values = torch.zeros(1, 2, side, side)
        return Feature("model", str(side), values, (4, 4), values, lambda x: x)

    assert choose([feature(28), feature(14), feature(4)]).name == "14"
    assert choose([feature(4), feature(6), feature(2)]).name == "6"
    assert choose([feature(28), feature(14), feature(4)], level=-1).name == "4"


def test_a_map_that_reaches_over_the_canvas_is_cut() -> None:
    five = torch.zeros(5, 5)
    five[4, 4] = 1
    cut = on_canvas(five, (32, 32), (144, 160))
    assert cut.shape == (144, 160)
    assert cut.argmax() // 160 >= 128  # the last place begins at 128, not at 144 * 4 / 5
    assert on_canvas(five, (32, 32), (160, 160)) is five


# ------------------------------------------------------------------------------------------- where on the image


class Brightness(nn.Module):
    """Answers with the brightness of the image, seen in places of 4 x 4 pixels."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 4, stride=4, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.conv(x).mean((1, 2, 3))
        return torch.stack([seen, -seen], 1)


@pytest.mark.parametrize("corner", [(8, 44), (44, 44), (30, 60), (40, 70)])
@pytest.mark.parametrize(("crop", "wide"), [(1.0, True), (0.75, True), (1.0, False)])
def test_the_heat_lies_where_the_light_is(corner: tuple[int, int], crop: float, wide: bool) -> None:
    """From the canvas to the pixels of a photo of which the network saw the middle."""
    about = ModelInfo(
        architecture="brightness",
        labels=("bright", "dark"),
        preprocess=Preprocess(size=(64, 64), crop=crop, mean=(0.0,) * 3, std=(1.0,) * 3),
    )
    pixels = torch.zeros(3, 60, 120, dtype=torch.uint8)
    row, column = corner
    pixels[:, row : row + 8, column : column + 8] = 255
    if not wide:
        pixels, row, column = pixels.transpose(1, 2).contiguous(), column, row
    (found,) = Explainer(Brightness(), about, device="cpu").explain(pixels, "a.png", label="bright")
    heat = found.over_image(found.map_of("model"))
    peak = np.unravel_index(heat.argmax(), heat.shape)
    assert row - 1 <= peak[0] <= row + 8
    assert column - 1 <= peak[1] <= column + 8
    around = heat[max(0, row - 6) : row + 14, max(0, column - 6) : column + 14]
    assert around.sum() > 0.9 * heat.sum()


# -------------------------------------------------------------------------------------------------------- any network


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        (COUPLED, 64, {"conv/gradcam", "tokens/gradcam", "tokens/rollout", "tokens/gradient_rollout"}),
        ("resnet10t+vit_tiny_patch16_224:mid", 64, {"conv/gradcam", "tokens/gradcam", "tokens/rollout"}),
        ("resnet10t+vit_tiny_patch16_224:early", 64, {"conv/gradcam", "tokens/gradient_rollout"}),
        ("resnet10t+vit_tiny_patch16_224:sandwich", 64, {"conv/gradcam", "tokens/gradient_rollout"}),
        ("vit_tiny_patch16_224", 224, {"model/gradcam", "model/gradient_rollout"}),
        ("swin_tiny_window7_224", 96, {"model/gradcam", "model/gradient_rollout"}),
        ("mobilevit_xxs_256", 96, {"model/gradcam", "model/gradient_rollout"}),
        ("mobilevitv2_050", 96, {"model/gradcam", "model/gradient_rollout"}),
        ("resnet10t", 96, {"model/gradcam"}),
        ("efficientnet_lite0", 96, {"model/gradcam"}),
        ("swin_tiny_window7_224", 136, {"model/gradcam", "model/gradient_rollout"}),
        ("swin_tiny_patch4_window7_224", 224, {"model/gradcam", "model/gradient_rollout"}),
        ("deit_tiny_distilled_patch16_224", 224, {"model/gradcam", "model/gradient_rollout"}),
        ("vit_tiny_r_s16_p8_224", 224, {"model/gradcam", "model/gradient_rollout"}),
        ("cait_xxs24_224", 224, {"model/gradcam"}),
        ("xcit_nano_12_p16_224", 224, {"model/gradcam"}),
        ("convit_tiny", 224, {"model/gradcam"}),
        ("hrnet_w18_small+vit_tiny_patch16_224:late", 64, {"conv/gradcam", "tokens/gradient_rollout"}),
    ],
)
def test_every_network_explains_itself(name: str, size: int, expected: set[str]) -> None:
    one = explainer(name, size)
    (found,) = one.explain(PIXELS, "a.jpg", label="bee")
    assert expected <= set(found.maps)
    assert found.branches == one.branches
    assert (found.label, found.subject, found.size) == (1, "bee", (90, 140))
    for feature in one.record(PIXELS).features:  # none is what attention makes of itself
        assert "att" not in feature.name
    assert found.scores["model"] == pytest.approx(
        one.probabilities(one.canvas(PIXELS)[0])["model"][0, 1].item(), abs=1e-4
    )
    every = [one.explain(PIXELS, "a.jpg", label=label)[0] for label in (0, 1, 2)]
    for method in found.maps:  # Grad-CAM of a class may find nothing that speaks for it, of all classes not
        sums = [explanation.maps[method].sum() for explanation in every]
        assert max(sums) == pytest.approx(1, abs=1e-3)
        assert all(total == pytest.approx(1, abs=1e-3) or total == 0 for total in sums)
    (predicted,) = one.explain(PIXELS, "a.jpg")
    best = one.probabilities(one.canvas(PIXELS)[0])["model"].argmax().item()
    assert predicted.label == best
    left, top, right, bottom = found.region  # the middle of a picture that is wider than high
    assert (right - left, bottom - top) == (pytest.approx(90, abs=2), pytest.approx(90, abs=2))
    assert left == pytest.approx(25, abs=2)


def test_uncoupled_branches_explain_themselves_alone() -> None:
    one = explainer(COUPLED)
    assert one.exchanges
    (together,), (alone,) = (one.explain(PIXELS, "a.jpg", coupled=coupled) for coupled in (True, False))
    assert not np.allclose(together.map_of("conv"), alone.map_of("conv"), atol=1e-4)
    silent = one.probabilities(one.canvas(PIXELS)[0], coupled=False)
    assert alone.scores["conv"] == pytest.approx(silent["conv"][0, alone.label].item(), abs=1e-4)
    with pytest.raises(ChiasmError, match="no exchanges"):
        explainer("resnet10t").explain(PIXELS, "a.jpg", coupled=False)


def test_bad_requests_are_told() -> None:
    with pytest.raises(UnknownNameError, match="did you mean cat"):
        explainer(COUPLED).explain(PIXELS, "a.jpg", label="catt")
    with pytest.raises(ChiasmError, match="0 to 2"):
        explainer(COUPLED).explain(PIXELS, "a.jpg", label=3)
    with pytest.raises(ChiasmError, match="level is 40"):
        explainer(COUPLED, level=40).explain(PIXELS, "a.jpg")


# -------------------------------------------------------------------------------------------- objects and regions


@pytest.mark.parametrize("head", ["faster_rcnn", "mask_rcnn", "fcos"])
def test_what_supported_a_box_is_about_the_box(head: str) -> None:
    torch.manual_seed(2)
    backbone = create_model(COUPLED, num_classes=0)
    task = "instances" if head == "mask_rcnn" else "detect"
    model = with_head(backbone, 3, task=task, architecture=COUPLED, name=head, channels=64, threshold=0.0)
    one = Explainer(model, info(COUPLED, 128, task=task), device="cpu")
    found = one.explain(PIXELS, "a.jpg", top=2)
    assert 1 <= len(found) <= 2
    for explanation in found:
        assert explanation.box is not None
        assert explanation.branches == ("conv", "tokens")
        assert explanation.map_of("conv").shape == (16, 16)
        heat = explanation.over_image(explanation.map_of("conv"))
        left, top, right, bottom = explanation.box
        box = np.zeros(heat.shape, bool)
        box[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = True
        # More than even heat has there, mirrored heat less.
        assert heat[box].sum() / heat.sum() > 1.2 * box.mean()
        if abs(left + right - 140) > 60:
            assert heat[box].sum() > heat[:, ::-1][box].sum()
        (again,) = one.explain(PIXELS, "a.jpg", box=explanation.box)
        assert again.box == explanation.box
        assert np.allclose(again.map_of("conv"), explanation.map_of("conv"), atol=1e-6)
    assert one.explain(PIXELS, "a.jpg", box=(0, 0, 1, 1)) == []
    assert one.explain(PIXELS, "a.jpg", label=found[0].label, top=1)[0].label == found[0].label


def test_the_regions_of_a_segmenter() -> None:
    torch.manual_seed(3)
    backbone = create_model(COUPLED, num_classes=0)
    model = with_head(backbone, 3, task="segment", architecture=COUPLED, name="fpn", channels=64, maps="both")
    one = Explainer(model, info(COUPLED, 64, task="segment"), device="cpu")
    found = one.explain(PIXELS, "a.jpg")
    assert found
    for explanation in found:
        assert explanation.map_of("tokens").sum() == pytest.approx(1, abs=1e-3)
        assert explanation.map_of("tokens") is explanation.maps["tokens/gradcam"]
        led = explanation.map_of("tokens", "gradient_rollout")
        assert np.minimum(led, resize(explanation.map_of("tokens"), led.shape)).sum() < 0.99
    # The canvas is higher than the image: what lies beside it is nobody's region.
    covered = one.canvas(PIXELS)[1].covered
    assert covered.sum() == 64 * round(64 * 90 / 140)
    assert not covered[0].any()
    with pytest.raises(ChiasmError, match="classifier"):
        one.probabilities(torch.zeros(1, 3, 64, 64))


# --------------------------------------------------------------------------------------------------------- sanity


def test_random_weights_destroy_the_map(shared_data: Path) -> None:
    """The check of Adebayo et al. 2018 (arXiv 1810.03292) on a network that knows ImageNet: with its weights redrawn
    from the head down, its map of the same class has little to do with what it was."""
    from safetensors.torch import load_file

    name = "tf_efficientnet_lite0"
    trained = create_model(name)
    state = load_file(shared_data / "weights" / f"{name}_fp16.safetensors")
    trained.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    )
    labels = tuple(str(i) for i in range(1000))
    preprocess = Preprocess(size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    about = ModelInfo(architecture=name, labels=labels, preprocess=preprocess)
    correlations = []
    for path in sorted((shared_data / "coco_mini" / "images").rglob("*.jpg"))[:4]:
        pixels = read_image(str(path))
        known = Explainer(trained, about, device="cpu").explain(pixels, path.name)[0]
        again = Explainer(trained, about, device="cpu").explain(pixels, path.name, label=known.label)[0]
        assert np.array_equal(known.map_of("model"), again.map_of("model"))
        torch.manual_seed(0)
        redrawn = create_model(name)
        redrawn.load_state_dict(trained.state_dict())
        for part in (redrawn.classifier, redrawn.conv_head, redrawn.blocks[-1], redrawn.blocks[-2]):  # type: ignore[index]
            part.apply(_redraw)  # type: ignore[union-attr, operator]
        other = Explainer(redrawn, about, device="cpu").explain(pixels, path.name, label=known.label)[0]
        correlations.append(spearmanr(known.map_of("model").ravel(), other.map_of("model").ravel()).statistic)
    assert np.mean(np.abs(correlations)) < 0.4


def _redraw(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.05)


def resize(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A map that sums to 1 at another resolution."""
    resized = nn.functional.interpolate(torch.from_numpy(values)[None, None], size=shape, mode="bilinear")[0, 0].numpy()
    return resized / resized.sum()


def test_by_name() -> None:
    one = open_explainer(COUPLED, image_size=96, device="cpu")
    assert one.canvas(PIXELS)[0].shape == (1, 3, 96, 96)
    assert one.explain(PIXELS, "a.jpg")[0].map_of("tokens").shape == (12, 12)
    with pytest.raises(ChiasmError, match="image_size is 0"):
        open_explainer(COUPLED, image_size=0)
