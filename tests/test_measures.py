"""Attention distance, effective receptive fields and CKA against slow twins, and measured on real networks."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chiasm.data import open_data
from chiasm.errors import ChiasmError, DataError, ImageError
from chiasm.explaining import measures
from chiasm.explaining.explainer import Explainer, open_explainer
from chiasm.explaining.measures import (
    CKA,
    Field,
    Measures,
    attention_distance,
    cka,
    even_distance,
    field_side,
    gradient_field,
    measure,
    receptive_field,
)
from chiasm.explaining.record import Attention
from chiasm.layers.tokens import map_to_tokens, resize_map
from chiasm.report.explanation_measures import measures_sections


def attention(weights: Tensor, **changes: object) -> Attention:
    """Of a grid of 2 x 3 tokens behind one class token, 16 pixels down and 8 across, unless told otherwise."""
    given = {
        "branch": "tokens",
        "name": "block 1",
        "weights": weights,
        "index": torch.arange(7)[None],
        "prefix": 1,
        "grid": (2, 3),
        "stride": (16.0, 8.0),
        "raw": weights,
    }
    return Attention(**(given | changes))  # type: ignore[arg-type]


def slow_distance(seen: Attention) -> list[float]:
    """Query by query, key by key."""
    groups, heads, slots, _ = seen.weights.shape
    width, (down, across) = seen.grid[1], seen.stride
    found = []
    for head in range(heads):
        means = []
        for group, query in itertools.product(range(groups), range(slots)):
            asking = int(seen.index[group, query]) - seen.prefix
            if asking < 0:
                continue
            far = mass = 0.0
            for key in range(slots):
                answering = int(seen.index[group, key]) - seen.prefix
                if answering >= 0:
                    weight = float(seen.weights[group, head, query, key])
                    rows, columns = asking // width - answering // width, asking % width - answering % width
                    far += weight * np.hypot(rows * down, columns * across)
                    mass += weight
            means.append(far / mass)
        found.append(float(np.mean(means)))
    return found


def test_attention_that_stays_has_no_distance() -> None:
    assert attention_distance(attention(torch.eye(7).expand(1, 2, 7, 7))).tolist() == [0, 0]
    on_class = torch.zeros(1, 1, 7, 7)
    on_class[..., 0] = 1
    assert attention_distance(attention(on_class)).tolist() == [0]  # it looks at no place at all


def test_even_attention_is_as_far_as_places_are_apart() -> None:
    points = [(16 * row, 8 * column) for row in range(2) for column in range(3)]
    mean = np.mean([np.hypot(a[0] - b[0], a[1] - b[1]) for a in points for b in points])
    even = attention(torch.full((1, 3, 7, 7), 1 / 7))
    assert attention_distance(even).numpy() == pytest.approx([mean] * 3, rel=1e-12)
    peaked = attention((50 * torch.eye(7)).softmax(-1).expand(1, 1, 7, 7))
    assert even_distance(peaked) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize(
    ("index", "prefix"),
    [
        (torch.arange(7)[None], 1),  # a plain Transformer
        (torch.tensor([[0, 1, 3, 4], [2, -1, 5, -1]]), 0),  # windows, one at the edge with two empty slots
        (torch.tensor([[0, 1, 2, 7], [0, 1, 3, 6]]), 2),  # two prefix tokens in each group
    ],
)
def test_attention_distance_equals_a_slow_twin(index: Tensor, prefix: int) -> None:
    slots = index.shape[1]
    weights = torch.randn(len(index), 2, slots, slots, generator=torch.Generator().manual_seed(0)).softmax(-1)
    seen = attention(weights, index=index, prefix=prefix)
    assert attention_distance(seen).numpy() == pytest.approx(slow_distance(seen), rel=1e-6)


def test_even_attention_passes_over_what_is_masked() -> None:
    """Of a shifted window that is put together from both ends of the map, each query sees its own end alone."""
    weights = torch.tensor([[0.0, 0, -100, -100], [0, 0, -100, -100], [-100, -100, 0, 0], [-100, -100, 0, 0]])
    ends = attention(weights.softmax(-1).expand(1, 2, 4, 4), index=torch.tensor([[0, 1, 8, 9]]), prefix=0, grid=(1, 10))
    assert even_distance(ends) == pytest.approx(4)  # itself, or its neighbour 8 pixels on
    assert attention_distance(ends).numpy() == pytest.approx([4, 4])


# -------------------------------------------------------------------------------------------- effective receptive field


def field_of(network: nn.Module, side: int = 9) -> np.ndarray:
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return gradient_field(network(image), image)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_field_of_convolutions_is_their_support(depth: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(depth)]
    field, half = field_of(nn.Sequential(*layers)), depth
    inside = np.zeros((9, 9), bool)
    inside[4 - half : 5 + half, 4 - half : 5 + half] = True
    assert (field[inside] > 0).all()
    assert not field[~inside].any()
    assert field.sum() == pytest.approx(1)
    assert field_side(field, 1.0) == 2 * depth + 1
    assert 0 < field_side(field) < 2 * depth + 1


def test_a_field_equals_finite_differences() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 5, 3, padding=1)).double()
    image = torch.randn(1, 3, 7, 6, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        signs = torch.randint(2, (5,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        slopes = np.zeros((7, 6))
        for channel, row, column in itertools.product(range(3), range(7), range(6)):
            nudge = torch.zeros_like(image)
            nudge[0, channel, row, column] = 1e-5
            more, less = (
                (network(image + sign * nudge)[0, :, 3 // 2, 2 // 2] * signs.double()).sum() for sign in (1, -1)
            )
            slopes[row, column] += abs(float(more - less) / 2e-5)
    assert gradient_field(network(image), image) == pytest.approx(slopes / slopes.sum(), abs=1e-8)


def test_a_layer_norm_does_not_hide_the_field() -> None:
    """The plain sum of normalised channels is constant, so its gradient is rounding."""

    class Normed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(conv(x).permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)

    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    field = field_of(Normed())
    assert field_side(field, 1.0) == 3
    assert field[3:6, 3:6].min() > 1e-4


def test_what_nothing_reaches_has_no_field() -> None:
    field = field_of(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Threshold(1e9, 0.0)))
    assert not field.any()
    assert field_side(field) == 0


def test_sides_of_known_fields() -> None:
    assert field_side(np.full((8, 8), 1 / 64)) == pytest.approx(np.sqrt(32))  # half of the pixels hold half
    assert field_side(np.full((8, 8), 1 / 64), 1.0) == 8
    one = np.zeros((5, 5))
    one[0, 3] = 0.6
    one[1:] = 0.4 / 20
    assert field_side(one) == 1
    assert field_side(one, 0.61) == pytest.approx(np.sqrt(2))


# ------------------------------------------------------------------------------------------------------------------ CKA


def hsic_cka(x: np.ndarray, y: np.ndarray) -> float:
    """As the textbook has it: of centred kernel matrices of the examples."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, l = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre  # noqa: E741
    return float(np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l)))


def test_cka_equals_its_textbook_form() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)) + 3
    y = x[:, :4] @ rng.normal(size=(4, 9)) + rng.normal(size=(40, 9))
    assert cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(hsic_cka(x, y), rel=1e-10)


def test_cka_sees_past_rotation_and_scale_and_not_where_nothing_is() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(500, 8)))
    turned = torch.from_numpy(np.linalg.qr(rng.normal(size=(8, 8)))[0])
    assert cka(x, 7 * x @ turned + 100) == pytest.approx(1, abs=1e-9)
    assert cka(x, torch.from_numpy(rng.normal(size=(500, 8)))) < 0.05
    assert cka(x, torch.ones(500, 3)) == 0


def test_cka_does_not_depend_on_the_parts() -> None:
    """Also far from zero, where sums of squares would lose their digits."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(60, 5)) + 1e5)
    y = x.square().sqrt() @ torch.from_numpy(rng.normal(size=(5, 4))) + torch.from_numpy(rng.normal(size=(60, 4)))
    sums = CKA()
    for part in (slice(0, 1), slice(1, 20), slice(20, 60)):
        sums.add(x[part], y[part])
    assert sums.count == 60
    assert sums.value == pytest.approx(cka(x, y), rel=1e-8)
    assert cka(x, y) == pytest.approx(hsic_cka((x - 1e5).numpy(), (y - y.mean(0)).numpy()), rel=1e-6)


# ------------------------------------------------------------------------------------------------------- real networks


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    torch.manual_seed(0)
    return open_explainer("conformer_nano_patch8_64", device="cpu")


@pytest.fixture(scope="module")
def scenes() -> list[tuple[str, Tensor]]:
    split = open_data("scenes:val=3,count=9").split("val")
    return [(split.sources[i], split.read(i)) for i in range(len(split))]


@pytest.fixture(scope="module")
def measured(explainer: Explainer, scenes: list[tuple[str, Tensor]]) -> Measures:
    return measure(explainer, scenes)


def test_measures_are_means_over_the_images(
    explainer: Explainer, scenes: list[tuple[str, Tensor]], measured: Measures
) -> None:
    assert measured.images == 3
    assert measured.canvas == (64, 64)
    recordings = [explainer.record(pixels) for _, pixels in scenes]
    coupled = [distance for distance in measured.distances if distance.coupled]
    assert [d.name for d in coupled] == [a.name for a in recordings[0].attentions]
    for i, distance in enumerate(coupled):
        by_image = torch.stack([attention_distance(recording.attentions[i]) for recording in recordings])
        assert distance.heads == pytest.approx(by_image.mean(0).tolist(), rel=1e-9)
        assert distance.even == pytest.approx(even_distance(recordings[0].attentions[i]))
    for i, similarity in enumerate(measured.similarities):
        crossings = [recording.crossings[i] for recording in recordings]
        for value, conv, tokens in (
            (similarity.before, "conv", "tokens"),
            (similarity.after, "conv_after", "tokens_after"),
        ):
            maps = [getattr(crossing, tokens) for crossing in crossings]
            convs = [resize_map(getattr(c, conv), t.shape[-2:]) for c, t in zip(crossings, maps, strict=True)]
            x, y = (torch.cat([map_to_tokens(m)[0] for m in side]) for side in (convs, maps))
            assert value == pytest.approx(cka(x, y), rel=1e-6)
            assert similarity.places == len(x)
            assert similarity.channels == max(x.shape[1], y.shape[1])
    fields = [receptive_field(explainer.network, explainer.canvas(pixels)[0]) for _, pixels in scenes]
    for i, field in enumerate(field for field in measured.fields if field.coupled):
        assert field.map == pytest.approx(np.mean([of_image[i].map for of_image in fields], axis=0), abs=1e-7)
        assert field.map.sum() == pytest.approx(1)


def test_exchanges_carry_what_is_far_into_a_branch(measured: Measures) -> None:
    """Random tokens attend evenly and barely; what their places know of the image comes through the other branch."""
    last = {(f.branch, f.coupled): f.side for f in measured.fields}
    assert last["tokens", True] > last["tokens", False]
    assert last["conv", True] > 1.2 * next(f.side for f in measured.fields if f.branch == "conv")
    assert {d.coupled for d in measured.distances} == {True, False}


def test_measures_are_plain_values_and_pages(measured: Measures) -> None:
    told = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert told["images"] == told["receptive_field_images"] == 3
    assert told["canvas"] == [64, 64]
    assert len(told["attention_distance"]) == len(measured.distances)
    assert told["receptive_field"][0]["side"] == measured.fields[0].side
    assert 0 <= told["similarity"][0]["before"] <= 1
    sections = dict(measures_sections(measured))
    assert list(sections) == [
        "How far attention looks",
        "What of the image a place depends on",
        "How alike the branches are",
    ]
    for pieces in sections.values():
        page = "".join(pieces).replace("http://www.w3.org", "")  # names of SVG's parts, not addresses
        assert "<svg" in page
        assert "http" not in page


def test_images_that_cannot_be_read_are_named(
    explainer: Explainer, scenes: list[tuple[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "FIELD_IMAGES", 0)  # fields are tested above
    ticks: list[tuple[int, int]] = []
    broken = ("no.jpg", ImageError("no.jpg", "no such file."))
    found = measure(explainer, [broken, scenes[0]], lambda done, total: ticks.append((done, total)))
    assert found.images == 1
    assert [error.path for error in found.failures] == ["no.jpg"]
    assert ticks == [(1, 2), (2, 2)]
    assert found.to_dict()["unreadable"] == [{"path": "no.jpg", "reason": "no such file."}]
    assert "no.jpg" in "".join(piece for _, pieces in measures_sections(found) for piece in pieces)
    with pytest.raises(DataError, match=r"none of the 1 images can be read; the first: no\.jpg"):
        measure(explainer, [broken])
    with pytest.raises(DataError, match="no images"):
        measure(explainer, [])


def test_a_network_without_attention_or_branches() -> None:
    torch.manual_seed(0)
    explainer = open_explainer("resnet10t", device="cpu", image_size=64)
    pixels = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = measure(explainer, iter([("noise", pixels)]))
    assert not found.distances
    assert not found.similarities
    sides = [field.side for field in found.fields]
    assert sides == sorted(sides)
    assert sides[-1] > 2 * sides[0]
    assert [title for title, _ in measures_sections(found)] == ["What of the image a place depends on"]
    with pytest.raises(ChiasmError, match="exchanges"):
        receptive_field(explainer.network, explainer.canvas(pixels)[0], coupled=False)


def test_fields_are_of_the_first_images(
    explainer: Explainer, scenes: list[tuple[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later ones count for attention and similarity alone, so that many images take no many backward passes."""
    monkeypatch.setattr(measures, "FIELD_IMAGES", 1)
    found = measure(explainer, scenes[:2])
    alone: list[Field] = receptive_field(explainer.network, explainer.canvas(scenes[0][1])[0])
    for field, expected in zip(found.fields, alone, strict=False):
        assert field.map == pytest.approx(expected.map, abs=1e-9)
    assert found.images == 2 == found.similarities[0].places / 64
    assert found.to_dict()["receptive_field_images"] == 1
