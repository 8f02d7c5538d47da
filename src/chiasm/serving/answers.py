"""Results and explanations as the JSON and the pictures of the API."""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Any

import numpy as np

from chiasm.results import Classification, Detections, Explanation, Result, Segmentation
from chiasm.results.drawing import colour_of
from chiasm.results.explanation import FUSED
from chiasm.serving.layers import found_layer, grey, heat_layers, png, shrunk

if TYPE_CHECKING:
    from PIL import Image


def result_json(result: Result, size: tuple[int, int], *, top: int, overlay: bool) -> dict[str, Any]:
    """One image's result as plain values.

    Args:
        result: of the image.
        size: the image's height and width.
        top: of a classifier, how many classes are listed.
        overlay: of others, whether the layer with what was found is added.
    """
    answer = result.to_dict(top) if isinstance(result, Classification) else result.to_dict()
    answer |= {"height": size[0], "width": size[1]}
    if isinstance(result, Classification):
        answer["branches"] = {name: _best(result.labels, values, top) for name, values in result.branches.items()}
        return answer
    answer["legend"] = _legend(result)
    if overlay:
        answer["overlay"] = data_url(found_layer(result))
    return answer


def _best(labels: tuple[str, ...], values: np.ndarray, top: int) -> list[dict[str, Any]]:
    order = np.argsort(-values, kind="stable")[:top]
    return [{"label": labels[i], "probability": float(values[i])} for i in order]


def _legend(result: Detections | Segmentation) -> list[dict[str, Any]]:
    """What the colours mean, the most frequent first."""
    if isinstance(result, Segmentation):
        return [{**_coloured(result, label), "share": share} for label, share in result.shares.items()]
    return [{**_coloured(result, label), "count": count} for label, count, _ in result.counts()]


def _coloured(result: Detections | Segmentation, label: str) -> dict[str, str]:
    red, green, blue = colour_of(result.labels.index(label))
    return {"label": label, "colour": f"#{red:02x}{green:02x}{blue:02x}"}


def result_picture(result: Result, image: Image.Image, top: int) -> bytes:
    """The image with its result drawn on it, as PNG."""
    return png(result.draw(image, top) if isinstance(result, Classification) else result.draw(image))


def explanation_json(explanation: Explanation, labels: tuple[str, ...]) -> dict[str, Any]:
    """What spoke for one answer as plain values; maps and layers as pictures."""
    from chiasm.report.heat_panels import overlap_seen

    box = explanation.box
    return {
        "subject": explanation.subject,
        "label": labels[explanation.label],
        "scores": explanation.scores,
        "overlap": overlap_seen(explanation),
        "region": list(explanation.region),
        "box": None if box is None else list(box),
        "maps": {name: data_url(grey(explanation.map_of(name))) for name in (*explanation.branches, FUSED)},
        "layers": {name: data_url(layer) for name, layer in heat_layers(explanation)},
    }


def explanation_picture(explanation: Explanation, image: Image.Image, branch: str) -> bytes:
    """The image with one map laid on it, as PNG."""
    fitted = shrunk(explanation)
    return png(fitted.draw(image.convert("RGB").resize(fitted.size[::-1]), branch))


def data_url(image: Image.Image) -> str:
    """The picture within a text."""
    return "data:image/png;base64," + b64encode(png(image)).decode("ascii")
