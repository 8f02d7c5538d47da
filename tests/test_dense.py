"""Detectors and segmenters over any backbone: their maps, their losses, and the way back to original pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

import chiasm
from chiasm.config import Preprocess, TrainConfig
from chiasm.data import open_data
from chiasm.data.annotated import IGNORE, AnnotatedData
from chiasm.data.placement import letterbox, windows
from chiasm.data.views import ObjectTarget
from chiasm.engine.build import build_task
from chiasm.engine.dense import pixel_weights
from chiasm.engine.freeze import frozen_norms
from chiasm.errors import ChiasmError, ModelFileError, UnknownNameError
from chiasm.model_file import ModelInfo, load_model, save_model
from chiasm.models import create_model
from chiasm.models.detectors import anchors_for
from chiasm.models.heads import HEADS, with_head
from chiasm.models.maps import STRIDES, Maps
from chiasm.tasks.detect import Detect, paste_masks
from chiasm.tasks.segment import Segment, _classes

NANO = "conformer_nano_patch16_128"
COUPLED = "resnet18+vit_tiny_patch16_224:mid"
BACKBONES = [NANO, COUPLED, "swin_tiny_window7_224", "mobilevit_xxs", "resnet18", "tf_efficientnet_lite0"]
EVERY_HEAD = [(task, name) for task, heads in HEADS.items() for name in heads]
SIDE = 64


def _backbone(name: str) -> nn.Module:
    """The coupled one with a Transformer of two blocks, for speed."""
    torch.manual_seed(0)
    return create_model(name, num_classes=0, **({"tokens_args": {"depth": 2}} if name == COUPLED else {}))


def _model(task: str, head: str = "auto", *, backbone: str = NANO, classes: int = 3, **own: object) -> nn.Module:
    net = _backbone(backbone)
    return with_head(net, classes, task=task, architecture=backbone, name=head, **({"channels": 64} | own))


def _target(boxes: list[list[float]], labels: list[int], size: tuple[int, int] = (SIDE, SIDE)) -> ObjectTarget:
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[int(top) : int(bottom), int(left) : int(right)] = True
    return ObjectTarget(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        crowd=torch.zeros(len(boxes), dtype=torch.bool),
        masks=masks,
        placement=letterbox(size, size),
    )


# ---------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("size", [(64, 96), (75, 50)], ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_map_for_each_stride(backbone: str, size: tuple[int, int]) -> None:
    net = _backbone(backbone).eval()
    branched = hasattr(net, "branch_info")
    for choice in ("auto", "conv", "tokens", "both") if branched else ("auto",):
        maps = Maps(net, choice, name=backbone)
        with torch.no_grad():
            seen = maps(net, torch.randn(1, 3, *size))
        expected = [(c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(maps.channels, STRIDES, strict=True)]
        assert [tuple(level.shape[1:]) for level in seen] == expected


def test_both_maps_are_the_two_side_by_side() -> None:
    net = create_model(NANO, num_classes=0).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        conv, tokens, both = (Maps(net, choice, name=NANO)(net, images) for choice in ("conv", "tokens", "both"))
        # The finest and the coarsest level come from different blocks of one branch, and from the same tokens.
        assert torch.equal(conv[0], net.forward_intermediates(images, intermediates_only=True)[0])
        features = net.forward_features(images)
    assert torch.equal(tokens[2], features[1][:, 1:].transpose(1, 2).unflatten(2, (4, 6)))
    for one, other, joined in zip(conv, tokens, both, strict=True):
        assert torch.equal(torch.cat((one, other), dim=1), joined)


def test_a_backbone_of_one_branch_has_no_tokens_to_choose() -> None:
    with pytest.raises(ChiasmError, match="resnet18 has one branch"):
        Maps(create_model("resnet18"), "tokens", name="resnet18")


# --------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("task", "head", "backbone"),
    [
        *((task, head, NANO) for task, head in EVERY_HEAD),
        ("instances", "mask_rcnn", COUPLED),
        ("segment", "fpn", COUPLED),
    ],
)
def test_every_head_learns_from_both_branches(task: str, head: str, backbone: str) -> None:
    """A step on one batch lowers its loss, and reaches the Transformer, the convolution and the head."""
    model = _model(task, head, backbone=backbone, maps="both").train()
    images = torch.randn(2, 3, SIDE, SIDE)
    built: Detect | Segment
    if task == "segment":
        built, targets = Segment(model, "abc"), torch.randint(3, (2, SIDE, SIDE))
    else:
        targets = [_target([[4.0, 6, 30, 40], [20.0, 20, 60, 50]], [0, 2]), _target([], [])]
        built = Detect(model, "abc", masks=task == "instances")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(1)
        terms = built.loss(built(images), targets)
        assert {name.split("/")[0] for name in terms} == {"loss"}
        optimiser.zero_grad()
        terms["loss"].backward()
        losses.append(float(terms["loss"].detach()))
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimiser.step()
    assert losses[-1] < losses[0]
    parts = {"blocks.0.", "transformer"} if backbone == NANO else {"backbone.conv.", "backbone.tokens."}
    assert all(any(part in name for name in reached) for part in parts)
    assert any(not name.startswith("backbone.") for name in reached)


@pytest.mark.parametrize(("task", "head"), EVERY_HEAD)
def test_model_files_and_optimised_answers(task: str, head: str, tmp_path: Path) -> None:
    model = _model(task, head, maps="both").eval()
    info = ModelInfo(
        architecture=NANO,
        task=task,
        head={"name": head, "maps": "both", "channels": 64},
        labels=("a", "b", "c"),
        preprocess=Preprocess(size=(SIDE, 96)),
    )
    save_model(tmp_path / "model.safetensors", model, info)
    again, told = load_model(tmp_path / "model.safetensors")
    assert told == info
    predictor = chiasm.load(tmp_path / "model.safetensors", device="cpu")
    images = torch.randn(2, 3, SIDE, 96)
    with torch.no_grad():
        outputs = [net(images) for net in (model, again, predictor.task)]
    outputs = [list(o.values()) if isinstance(o, dict) else [o] for o in outputs]
    for first, second, third in zip(*outputs, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, third, rtol=0, atol=1e-4 * float(first.abs().max()))
    pixels = torch.randint(256, (3, 50, 120), dtype=torch.uint8)
    (result,) = predictor(pixels)
    assert type(result).__name__ == ("Segmentation" if task == "segment" else "Detections")
    assert (result.classes.shape if task == "segment" else result.size) == (50, 120)


def test_gradient_of_the_whole_loss_in_float64() -> None:
    """By finite differences, along a random direction of all weights of a segmenter."""
    model = _model("segment", "fpn", maps="both").double().eval()
    task = Segment(model, "abc", class_weights=torch.tensor([0.5, 1.0, 1.5]).double())
    images, targets = torch.randn(1, 3, 64, 64).double(), torch.randint(3, (1, 64, 64))
    targets[:, :5] = IGNORE
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss() -> Tensor:
        logits = task(images)
        entropy = F.cross_entropy(logits, targets, task.class_weights, ignore_index=IGNORE)
        assert torch.isclose(task.loss(logits, targets)["loss/entropy"].double(), entropy, rtol=1e-5)
        return entropy

    grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True) if g is not None)
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            for p, d in zip(parameters, direction, strict=True):
                p += sign * 1e-9 * d
            ends.append(float(loss()))
    assert (ends[0] - ends[1]) / 2e-9 == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize(
    ("task", "name", "own", "said"),
    [
        (
            "detect",
            "mask_rcnn",
            {},
            "for --task instances; for 'detect' there is faster_rcnn, fcos",
        ),
        ("segment", "upernett", {}, "upernet"),
        ("detect", "fcos", {"rois": 3}, "argument of fcos 'rois'"),
        ("detect", "faster_rcnn", {"channels": 33}, "multiple of 32"),
        ("instances", "mask_rcnn", {"anchors": [1, 2]}, "five sides"),
        ("instances", "mask_rcnn", {"anchors": 5}, "expected a list of numbers above 0"),
        ("detect", "fcos", {"threshold": "abc"}, "threshold of fcos is 'abc': expected a number from 0 to 1"),
        ("detect", "faster_rcnn", {"detections": 0}, "expected a whole number from 1"),
        ("detect", "faster_rcnn", {"hidden": 0.5}, "expected a whole number from 1"),
    ],
)
def test_a_head_that_cannot_be_is_one_line(task: str, name: str, own: dict[str, object], said: str) -> None:
    with pytest.raises(ChiasmError) as caught:
        _model(task, name, **own)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_file_of_an_unknown_task_is_refused(tmp_path: Path) -> None:
    info = ModelInfo(architecture=NANO, task="dream", labels=("a",), preprocess=Preprocess(size=(SIDE, SIDE)))
    save_model(tmp_path / "m.safetensors", nn.Linear(1, 1), info)
    with pytest.raises(ModelFileError, match="task 'dream'"):
        load_model(tmp_path / "m.safetensors")
    info = ModelInfo(
        architecture=NANO, task="detect", head={"name": "fcos", "evil": 1}, labels=("a",), preprocess=info.preprocess
    )
    save_model(tmp_path / "m.safetensors", nn.Linear(1, 1), info)
    with pytest.raises(ModelFileError, match="evil"):
        load_model(tmp_path / "m.safetensors")


def test_half_types_leave_the_coarsest_levels_gradients_right() -> None:
    """On maps of one column, which the levels of strides 64 and 128 are of a small image."""
    extra = _model("detect", "fcos").fpn.extra_blocks
    level = torch.randn(2, 64, 2, 2)
    grads = []
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            maps, _ = extra([level], [level], ["2"])
            grads.append(torch.autograd.grad(sum(m.square().mean() for m in maps), list(extra.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_half_types_leave_boxes_and_masks_where_they_are() -> None:
    """Of more than 256 objects each learns its own mask, and boxes lie between pixels."""
    model = _model("instances", classes=1, proposals=400, rois=512).train()
    corners = torch.cartesian_prod(torch.arange(20), torch.arange(16)).float() * 3
    boxes = torch.cat((corners, corners + 3), dim=1)
    target = {"boxes": boxes, "labels": torch.zeros(320, dtype=torch.int64)}
    masks = torch.zeros(320, SIDE, SIDE, dtype=torch.uint8)
    for mask, (left, top) in zip(masks, corners.int().tolist(), strict=True):
        mask[top : top + 3, left : left + 3] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model.losses(model(torch.randn(1, 3, SIDE, SIDE)), [{**target, "masks": masks}])
        assert all(term.isfinite() for term in terms.values())
        with torch.no_grad():
            (found,) = model.eval().detect(model(torch.randn(1, 3, SIDE, SIDE)))
    assert found["boxes"].dtype == torch.float32
    assert not torch.equal(found["boxes"], found["boxes"].bfloat16().float())


def test_anchors_are_of_the_objects_sizes() -> None:
    sides = torch.tensor([10.0, 20.0, 40.0, 80.0, 160.0]).repeat_interleave(10)
    anchors, ratios = anchors_for(torch.stack((sides, 2 * sides), dim=1))
    assert anchors == [round(side * 2**0.5, 1) for side in (10, 20, 40, 80, 160)]
    assert ratios == [2.0, 2.0, 2.0]
    assert anchors_for(torch.tensor([[1.0, 1.0]]))[0] == [8.0, 16.0, 32.0, 64.0, 128.0]


# ---------------------------------------------------------------------------------------------------------- way back


def test_pasting_equals_torchvisions_on_whole_boxes() -> None:
    """On boxes of whole pixels much larger than the mask both agree but at the borders, where torchvision's is shifted
    by up to half a pixel."""
    torch.manual_seed(0)
    masks = F.interpolate(torch.rand(5, 1, 4, 4), size=28, mode="bilinear", align_corners=False)[:, 0]
    boxes = torch.tensor([[3.0, 5, 60, 90], [10, 10, 100, 60], [0, 0, 120, 100], [50, 40, 90, 99], [-20, -10, 40, 50]])
    ours = paste_masks(masks, boxes, (100, 120))
    theirs = paste_masks_in_image(masks[:, None], boxes, (100, 120))[:, 0].numpy() >= 0.5
    assert (ours != theirs).mean() < 0.02
    assert ((ours & theirs).sum((1, 2)) / (ours | theirs).sum((1, 2))).min() > 0.9


def test_what_a_mask_head_learns_is_pasted_where_it_was() -> None:
    """Perfect answers to torchvision's own targets, through the whole of `decode`, give the discs back."""
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    discs, boxes = [], []
    for radius, column, row in ((8, 20.3, 31.7), (12, 40.1, 22.4), (20, 30.6, 33.2)):
        discs.append((x - column) ** 2 + (y - row) ** 2 <= radius**2)
        boxes.append([column - radius, row - radius, column + radius, row + radius])
    masks, corners = torch.stack(discs), torch.tensor(boxes)
    learned = project_masks_on_boxes(masks.float(), corners, torch.arange(3), 28)

    class Perfect(nn.Module):
        def detect(self, pyramid: dict[str, Tensor]) -> list[dict[str, Tensor]]:
            return [{"boxes": corners, "labels": torch.zeros(3), "scores": torch.ones(3), "masks": learned}]

    task = Detect(Perfect(), "a", masks=True)  # type: ignore[arg-type]
    (result,) = task.decode({}, ["discs"], [windows((64, 64), (64, 64))])
    assert result.masks is not None
    both, either = ((op(torch.tensor(result.masks), masks)).sum((1, 2)) for op in (torch.bitwise_and, torch.bitwise_or))
    assert float((both / either).min()) > 0.96


def test_validation_takes_targets_from_the_device() -> None:
    """Lightning moves targets with the images; metrics are counted on the CPU."""
    task = Detect(_model("instances", classes=1).eval(), "a", masks=True)
    target = _target([[4.0, 6, 30, 40]], [0])
    moved: list[str] = []

    class Moved(ObjectTarget):
        def to(self, device: torch.device | str) -> ObjectTarget:
            moved.append(str(device))
            return target

    validation = task.validation()
    with torch.no_grad():
        seen = Moved(**{name: getattr(target, name) for name in target.__dataclass_fields__})
        validation.add(task(torch.randn(1, 3, SIDE, SIDE)), [seen], torch.tensor([True]))
    assert moved == ["cpu"]
    assert set(validation.compute([validation.state()])) == {"ap", "ap50", "mask_ap", "mask_ap50"}


@given(
    box=st.tuples(st.floats(-5, 20), st.floats(-5, 20), st.floats(3, 30), st.floats(3, 30)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_a_full_mask_fills_the_pixels_whose_centres_lie_well_within(
    box: tuple[float, ...], size: tuple[int, int]
) -> None:
    left, top, width, height = box
    pasted = paste_masks(torch.ones(1, 28, 28), torch.tensor([[left, top, left + width, top + height]]), size)[0]
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    edge = np.maximum(np.abs(x - left - width / 2) - width / 2, np.abs(y - top - height / 2) - height / 2)
    assert pasted[edge < -0.02 * max(width, height)].all()
    assert not pasted[edge > 0.02 * max(width, height)].any()


@settings(max_examples=30)
@given(
    original=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    canvas=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    zoom=st.floats(1, 4),
)
def test_windows_cover_the_image_and_give_it_back(
    original: tuple[int, int], canvas: tuple[int, int], zoom: float
) -> None:
    """Logits that name each pixel's place come back as that place, whatever the windows."""
    views = windows(original, canvas, zoom=zoom)
    height, width = views[0].resized
    half = torch.arange(width) >= width // 2
    logits = []
    for view in views:
        columns = torch.arange(canvas[1]) - view.offset[1]
        right = half[columns.clamp(0, width - 1)].expand(canvas)
        logits.append(torch.stack((~right, right)).float() * 9)
    classes = _classes(torch.stack(logits), views)
    assert classes.shape == original
    shown = F.interpolate(half.float().expand(1, 1, height, width), size=original, mode="bilinear")[0, 0]
    sure = (shown - 0.5).abs() > 0.49
    assert torch.equal(classes[sure].bool(), shown[sure] > 0.5)


def test_unknown_pixels_teach_nothing() -> None:
    task = Segment(nn.Identity(), "abc", class_weights=torch.tensor([1.0, 2.0, 3.0]))
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    targets = torch.full((2, 8, 8), IGNORE)
    targets[0, 0, 0] = 1
    task.loss(logits, targets)["loss"].backward()
    assert logits.grad is not None
    assert logits.grad[0, :, 0, 0].any()
    assert not logits.grad[1].any()
    assert not logits.grad[0, :, 1:].any()
    with torch.no_grad():
        nothing = task.loss(logits, torch.full((2, 8, 8), IGNORE))["loss"]
        weightless = Segment(nn.Identity(), "ab", label_smoothing=0.1, class_weights=torch.tensor([1.0, 0.0]), dice=0.0)
        only = weightless.loss(torch.randn(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.int64))["loss"]
    assert float(nothing) == float(only) == 0.0


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="fcos"):
        _model("detect", "fcoss")


# ------------------------------------------------------------------------------------------------- made for the data


def _config(task: str, **own: object) -> TrainConfig:
    return TrainConfig.from_flags(
        data="scenes:size=64,count=16,val=4", task=task, model=NANO, image_size=64, head_args={"channels": 64}, **own
    )


def test_a_detectors_checkpoint_starts_the_backbone_and_its_norms_stay(tmp_path: Path) -> None:
    """Names as detectors built on the authors' code have them; with weights, batch norms keep their statistics."""
    published = create_model(NANO, num_classes=0)
    weights = {f"backbone.{name}": torch.rand_like(value.float()) for name, value in published.state_dict().items()}
    weights["neck.fpn_convs.0.conv.weight"] = torch.zeros(8, 8, 3, 3)
    save_file(weights, tmp_path / "mask_rcnn.safetensors")
    config = _config("detect", weights=str(tmp_path / "mask_rcnn.safetensors"))
    task, info, loaded = build_task(config, open_data(str(config.data), task="detect"))
    assert "360" in loaded
    state = task.model.backbone.state_dict()
    assert all(torch.equal(value, weights[f"backbone.{name}"].to(value.dtype)) for name, value in state.items())
    assert frozen_norms(task.model)
    assert info.head == {"name": "faster_rcnn", "maps": "auto", "detections": 100, "channels": 64}
    kept = build_task(replace(config, frozen_bn="no"), open_data(str(config.data), task="detect"))[0]
    assert not frozen_norms(kept.model)


def test_anchors_and_detections_come_from_the_data() -> None:
    config = _config("instances", anchors="data", maps="both")
    data = open_data(str(config.data), task="instances")
    assert isinstance(data, AnnotatedData)
    task, info, _ = build_task(config, data)
    objects = [data.objects("train").objects(i) for i in range(len(data.splits["train"]))]
    sides = torch.cat([one.boxes[:, 2:] - one.boxes[:, :2] for one in objects])
    assert (info.head["anchors"], info.head["ratios"]) == anchors_for(sides)
    assert task.model.rpn.anchor_generator.sizes == tuple((side,) for side in info.head["anchors"])
    for head, said in (("fcos", "fcos has no anchor boxes"), ("upernet", "a segmenter has no anchor boxes")):
        other = "segment" if head == "upernet" else "detect"
        with pytest.raises(ChiasmError, match=said):
            build_task(_config(other, head=head, anchors="data"), open_data(str(config.data), task=other))


def test_rare_classes_weigh_more() -> None:
    data = open_data("scenes:size=64,count=16,val=4", task="segment")
    assert isinstance(data, AnnotatedData)
    weights = pixel_weights(data)
    maps = torch.stack([data.maps("train").sample(i)[1] for i in range(len(data.splits["train"]))])
    counts = torch.bincount(maps[maps != IGNORE].long(), minlength=len(data.classes))
    assert torch.equal(weights.argsort(), counts.argsort(descending=True))
    assert float(weights.mean()) == pytest.approx(1)


def test_a_damaged_head_is_told_rather_than_nothing_found(tmp_path: Path) -> None:
    model = _model("detect", "fcos", classes=1)
    model.fcos.head.classification_head.cls_logits.bias.data.fill_(float("nan"))
    info = ModelInfo(
        architecture=NANO, task="detect", head={"name": "fcos", "channels": 64}, labels=("a",),
        preprocess=Preprocess(size=(SIDE, SIDE)),
    )  # fmt: skip
    save_model(tmp_path / "m.safetensors", model, info)
    with pytest.raises(ModelFileError, match="a weight is not finite"):
        chiasm.load(tmp_path / "m.safetensors", device="cpu")


def test_norms_over_one_image_are_refused_before_training() -> None:
    config = _config("segment", batch_size=1)
    with pytest.raises(ChiasmError, match="--batch-size 2, or --head fpn"):
        build_task(config, open_data(str(config.data), task="segment"))
