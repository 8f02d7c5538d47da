"""Boxes, masks and maps move with their image, and come back to where they were in original pixels."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors

from chiasm.config import Preprocess
from chiasm.data.annotated import IGNORE, Objects
from chiasm.data.placement import Placement, jitter, letterbox
from chiasm.data.views import Viewer
from chiasm.errors import ChiasmError

side = st.integers(2, 60)
sizes = st.tuples(side, side)
few = settings(max_examples=60, deadline=None)


@st.composite
def placements(draw: st.DrawFn, whole: bool = False) -> Placement:
    """Any placement, or one with the whole image on the canvas."""
    original, canvas = draw(sizes), draw(sizes)
    if whole:
        resized = draw(st.tuples(st.integers(1, canvas[0]), st.integers(1, canvas[1])))
        offset = tuple(draw(st.integers(0, canvas[i] - resized[i])) for i in (0, 1))
    else:
        resized, offset = draw(sizes), (draw(st.integers(-20, 20)), draw(st.integers(-20, 20)))
    mirrored = draw(st.booleans())
    return Placement(original=original, resized=resized, offset=offset, canvas=canvas, mirrored=mirrored)


@st.composite
def boxes_in(draw: st.DrawFn, size: tuple[int, int]) -> Tensor:
    count = draw(st.integers(0, 4))
    share = st.floats(0, 1, width=32)
    corners = torch.tensor([[draw(share) for _ in range(4)] for _ in range(count)]).reshape(-1, 2, 2)
    corners = corners.sort(dim=1).values * torch.tensor([size[1], size[0]])
    return corners.reshape(-1, 4)


def of_objects(boxes: Tensor, size: tuple[int, int]) -> Objects:
    """Objects whose masks are their boxes, which have whole numbers for corners."""
    left, top, right, bottom = boxes.T
    polygons = [[[a, b, c, b, c, d, a, d]] for a, b, c, d in zip(*(v.tolist() for v in boxes.T), strict=True)]
    return Objects(
        image_id=1,
        height=size[0],
        width=size[1],
        boxes=boxes,
        labels=torch.arange(len(boxes)),
        crowd=torch.zeros(len(boxes), dtype=torch.bool),
        areas=(right - left) * (bottom - top),
        outlines=tuple(polygons),
    )


@few
@given(st.data())
def test_boxes_come_back(data: st.DataObject) -> None:
    placement = data.draw(placements())
    boxes = data.draw(boxes_in(placement.original))
    there = placement.to_canvas(boxes)
    assert (there[:, 2:] >= there[:, :2] - 1e-4).all()
    assert torch.allclose(placement.to_original(there), boxes, atol=1e-2)


@few
@given(st.data())
def test_torchvision_moves_boxes_as_the_formula_says(data: st.DataObject) -> None:
    placement = data.draw(placements(whole=True))
    boxes = data.draw(boxes_in(placement.original))
    moved = placement.place(tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=placement.original))
    assert tuple(moved.canvas_size) == placement.canvas
    assert torch.allclose(moved.as_subclass(Tensor), placement.to_canvas(boxes), atol=1e-3)


@few
@given(placements())
def test_pixels_go_where_boxes_go(placement: Placement) -> None:
    """Every class of a map that is still on the canvas lies within the box it was moved to, but for rounding."""
    height, width = placement.original
    classes = torch.zeros(1, height, width, dtype=torch.uint8)
    classes[0, height // 2 :, : max(width // 3, 1)] = 1
    box = placement.to_canvas(torch.tensor([[0.0, height // 2, max(width // 3, 1), height]]))[0]
    placed = placement.place(tv_tensors.Mask(classes), IGNORE)[0]
    assert placed.shape == placement.canvas
    assert set(placed.unique().tolist()) <= {0, 1, IGNORE}
    rows, columns = (placed == 1).nonzero(as_tuple=True)
    if len(rows):
        assert box[0] - 1 <= columns.min()
        assert columns.max() + 1 <= box[2] + 1
        assert box[1] - 1 <= rows.min()
        assert rows.max() + 1 <= box[3] + 1


@few
@given(sizes, st.integers(1, 3), st.booleans(), st.integers(0, 5), st.integers(0, 5))
def test_maps_come_back_exactly_when_enlarged_by_whole_numbers(
    size: tuple[int, int], factor: int, mirrored: bool, top: int, left: int
) -> None:
    classes = torch.randint(0, 7, (1, *size), dtype=torch.uint8)
    resized = (factor * size[0], factor * size[1])
    placement = Placement(
        original=size,
        resized=resized,
        offset=(top, left),
        canvas=(resized[0] + 5, resized[1] + 5),
        mirrored=mirrored,
    )
    there = placement.place(tv_tensors.Mask(classes), IGNORE).as_subclass(Tensor)
    assert torch.equal(placement.map_to_original(there), classes)
    assert int((there == IGNORE).sum()) == there.numel() - resized[0] * resized[1]


@few
@given(sizes, sizes)
def test_letterbox_shows_the_whole_image_as_large_as_it_goes(
    original: tuple[int, int], canvas: tuple[int, int]
) -> None:
    placement = letterbox(original, canvas)
    for i in (0, 1):
        assert placement.offset[i] >= 0
        assert placement.offset[i] + placement.resized[i] <= canvas[i]
    assert any(placement.resized[i] == canvas[i] for i in (0, 1))
    corner = torch.tensor([[0.0, 0.0, original[1], original[0]]])
    assert torch.allclose(placement.to_original(placement.to_canvas(corner)), corner, atol=1e-3)


@few
@given(sizes, sizes, st.integers(0, 2**31))
def test_jitter_keeps_a_part_of_the_image_on_the_canvas(
    original: tuple[int, int], canvas: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    placement = jitter(original, canvas, scale=(0.5, 2.0), flip=0.5)
    for i in (0, 1):
        spare = canvas[i] - placement.resized[i]
        assert min(spare, 0) <= placement.offset[i] <= max(spare, 0)


@pytest.mark.parametrize("scale", [None, (0.5, 2.0)])
def test_views_hold_what_is_left(scale: tuple[float, float] | None) -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[2.0, 3, 20, 30], [30.0, 5, 55, 35], [58.0, 38, 60, 40]])
    objects = of_objects(boxes, (40, 60))
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    viewer = Viewer(Preprocess(size=(32, 48)), scale=scale)
    kept = []
    for _ in range(20):
        canvas, view = viewer.objects(image, objects, masks=True)
        assert canvas.shape == (3, 32, 48)
        assert canvas.dtype == torch.float32
        assert view.masks is not None
        assert len(view.boxes) == len(view.labels) == len(view.masks) == len(view.crowd)
        kept.append(len(view.boxes))
        for box, label, mask in zip(view.boxes, view.labels, view.masks, strict=True):
            assert ((box >= 0) & (box <= torch.tensor([48, 32, 48, 32]))).all()
            rows, columns = mask.nonzero(as_tuple=True)
            edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (edges - box).abs().max() <= 1.5
            back = view.placement.to_original(box[None])[0]
            whole = boxes[label]
            assert (back[:2] >= whole[:2] - 0.1).all()
            assert (back[2:] <= whole[2:] + 0.1).all()
    assert max(kept) == 3
    assert (min(kept) == 3) == (scale is None)


def test_a_view_without_objects_or_image_edges() -> None:
    viewer = Viewer(Preprocess(size=(16, 16), mean=(0.5,), std=(0.5,)))
    image = torch.full((3, 10, 20), 200, dtype=torch.uint8)
    canvas, view = viewer.objects(image, of_objects(torch.zeros(0, 4), (10, 20)), masks=True)
    assert view.boxes.shape == (0, 4)
    assert view.masks is not None
    assert view.masks.shape == (0, 16, 16)
    assert canvas.shape == (1, 16, 16)
    assert canvas[0, 0].abs().max() < 0.01  # the mean
    classes = viewer.map(image, torch.ones(10, 20, dtype=torch.uint8))[1].classes
    assert classes.unique().tolist() == [1, IGNORE]
    assert int((classes == 1).sum()) == 8 * 16


def test_colours_change_in_training_alone_and_what_is_in_the_image_stays() -> None:
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    before = image.clone()
    objects = of_objects(torch.tensor([[2.0, 3, 20, 30]]), (40, 60))
    canvas = Preprocess(size=(32, 48), mean=(0.0,) * 3, std=(1.0,) * 3)
    plain = Viewer(canvas, scale=(1, 1), flip=0)
    colourful = Viewer(canvas, scale=(1, 1), flip=0, color_jitter=0.4)
    views = []
    for viewer in (plain, colourful, colourful):
        torch.manual_seed(len(views) // 2)
        views.append(viewer.objects(image, objects, masks=True))
    assert torch.equal(image, before)
    for picture, target in views[1:]:
        assert (picture - views[0][0]).abs().mean() > 0.01
        assert 0 <= picture.min() <= picture.max() <= 1
        assert torch.equal(target.boxes, views[0][1].boxes)
        assert torch.equal(target.masks, views[0][1].masks)
    assert not torch.equal(views[1][0], views[2][0])
    shown = [Viewer(canvas, color_jitter=share).map(image, image[0])[0] for share in (0.0, 0.4)]
    assert torch.equal(*shown)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("count", [0, 2])
def test_a_target_survives_the_way_between_processes(masks: bool, count: int) -> None:
    boxes = torch.tensor([[2.0, 3, 20, 30], [30.0, 5, 55, 35]])[:count]
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    target = Viewer(Preprocess(size=(31, 45))).objects(image, of_objects(boxes, (40, 60)), masks=masks)[1]
    received = pickle.loads(pickle.dumps(target))
    assert received.placement == target.placement
    for name in ("boxes", "labels", "crowd", "masks"):
        ours, theirs = getattr(received, name), getattr(target, name)
        assert (ours is theirs is None) or (ours.dtype == theirs.dtype and torch.equal(ours, theirs)), name
    assert target.to("meta").boxes.is_meta


@pytest.mark.parametrize("options", [{"scale": (0, 1)}, {"scale": (2, 1)}, {"flip": 1.5}, {"color_jitter": -0.1}])
def test_views_that_make_no_sense(options: dict) -> None:
    with pytest.raises(ChiasmError, match="expected"):
        Viewer(Preprocess(size=(8, 8)), **options)


@pytest.mark.parametrize("zoom", [0.3, 0.45, 0.7, 1.0, 1.4, 2.0])
def test_masks_stay_in_the_middle_of_their_boxes(zoom: float) -> None:
    """A disc's centre of mass is its box's centre at any size but one half, where centres lie between two pixels."""
    y, x = torch.meshgrid(torch.arange(200) + 0.5, torch.arange(200) + 0.5, indexing="ij")
    disc = (x - 90.0) ** 2 + (y - 110.0) ** 2 <= 40.0**2
    side = round(200 * zoom)
    placement = letterbox((200, 200), (side, side))
    placed = placement.place(tv_tensors.Mask(disc[None]))[0]
    rows, columns = placed.nonzero(as_tuple=True)
    centre = torch.stack((columns.float().mean(), rows.float().mean())) + 0.5
    torch.testing.assert_close(centre, torch.tensor([90.0, 110.0]) * side / 200, rtol=0, atol=0.12)


def test_the_region_is_the_canvas_in_the_images_pixels() -> None:
    """Of an image of 100 x 200 at half its size, cut off by 10 px on top and with 6 px of nothing at its left."""
    placement = Placement(original=(100, 200), resized=(50, 100), offset=(-10, 6), canvas=(30, 120))
    assert placement.region == pytest.approx((-12, 20, 228, 80))
