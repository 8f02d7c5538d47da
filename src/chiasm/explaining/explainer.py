"""Explanations of one image by any model: what each branch saw that spoke for the answer.

explainer = open_explainer("runs/photos-1")
explainer.explain(pixels, "cat.jpg")     # [Explanation]: the class; the best objects; the largest regions
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from chiasm.data.placement import Placement, cover
from chiasm.data.transforms import eval_transform
from chiasm.data.views import Viewer
from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.explaining.maps import choose, gradcam, gradient_rollout, on_canvas, rollout
from chiasm.explaining.record import Feature, Recording, record, uncoupled
from chiasm.inference import optimize
from chiasm.model_file import ModelInfo, resolve_model
from chiasm.models.taps import taps_of
from chiasm.predictor import at_size, choose_device
from chiasm.results import Explanation, Segmentation
from chiasm.results.explanation import FUSED
from chiasm.tasks import make_task
from chiasm.tasks.classify import mean_logits

FINEST = 8  # px: maps of an object or a region have places of this side
SAME_PLACE = 0.5  # IoU of two boxes that are of one object


def open_explainer(
    ref: str | os.PathLike[str], *, device: str = "auto", image_size: int | None = None, level: int | None = None
) -> Explainer:
    """The explainer of a model file, a run folder or an architecture's name; arguments as for `Explainer`.

    Raises:
        ModelFileError, UnknownNameError: when `ref` names no model.
    """
    model, info = resolve_model(os.fspath(ref))
    return Explainer(model, info, device=device, image_size=image_size, level=level)


class Explainer:
    """Heat maps of a model's answers; for one thread at a time.

    Args:
        model: any timm model with `len(info.labels)` classes, or one `with_head`. It is put into evaluation mode, and
            its weights no longer ask for gradients.
        info: what a model file says of it.
        device: 'auto', 'cpu', 'cuda' ...
        image_size: side of the square input in pixels; default: what the model was made for. Larger gives finer maps
            from networks that take any size.
        level: which of a branch's features Grad-CAM is made of: -1 the deepest, -2 the one before; default: the deepest
            with at least 7 places a side.

    Attributes:
        info, device: as given, with `image_size` applied.
        network: what is watched: the classifier, or the backbone of a detector or segmenter.
        branches: ('conv', 'tokens'), or ('model',).
        exchanges: whether its coupling can be turned off.

    Raises:
        ChiasmError: for a device that is not here, a size that the model cannot take, a network without a head.
    """

    def __init__(
        self,
        model: nn.Module,
        info: ModelInfo,
        *,
        device: str = "auto",
        image_size: int | None = None,
        level: int | None = None,
    ) -> None:
        self._dense = info.task != "classify"
        info = at_size(model, info, image_size)
        if not self._dense and getattr(model, "num_classes", 1) == 0:
            raise ChiasmError(f"{info.architecture} has no head, so it names no class that could be explained.")
        self.info = info
        self.device = choose_device(device)
        model = model.eval().requires_grad_(False).to(self.device)
        self._task = make_task(info.task, model, info.labels).eval()
        self._fast: Any = None  # for many images without gradients
        self.network: nn.Module = model.backbone if self._dense else model  # type: ignore[assignment]
        self._taps = taps_of(self.network)
        self.branches = self._taps.branches
        self.exchanges = bool(self._taps.exchanges)
        self._transform = Viewer(info.preprocess) if self._dense else eval_transform(info.preprocess)
        self._level = level

    def canvas(self, pixels: Tensor) -> tuple[Tensor, Placement]:
        """A decoded image, uint8 (3, H, W), as the network takes it, (1, C, h, w), and how it lies there."""
        if isinstance(self._transform, Viewer):
            canvases, (placement,) = self._transform.windows(pixels)
            return canvases.to(self.device), placement
        size, crop = self.info.preprocess.size, self.info.preprocess.crop
        placement = cover((pixels.shape[-2], pixels.shape[-1]), size, crop)
        return self._transform(pixels)[None].to(self.device), placement

    def record(self, pixels: Tensor, *, coupled: bool = True) -> Recording:
        """The features, attention and exchanges of an image, uint8 (3, H, W), without gradients."""
        with torch.no_grad():
            return self._record(self.canvas(pixels)[0], coupled)

    def probabilities(self, canvases: Tensor, *, coupled: bool = True) -> dict[str, Tensor]:
        """Of a classifier: canvases (B, C, h, w) -> (B, classes) of each branch with a head, and of the 'model'."""
        if self._dense:
            raise ChiasmError(f"probabilities are a classifier's; this model's task is '{self.info.task}'.")
        if coupled and self._fast is None:
            self._fast = make_task("classify", optimize(self._task.model), self.info.labels).eval()
        with torch.inference_mode(), nullcontext() if coupled else uncoupled(self.network, self._taps):
            outputs = (self._fast if coupled else self._task)(canvases.to(self.device))
        return _probabilities(outputs)

    def explain(
        self,
        pixels: Tensor,
        source: str,
        *,
        label: str | int | None = None,
        coupled: bool = True,
        top: int = 3,
        box: Sequence[float] | None = None,
    ) -> list[Explanation]:
        """What spoke for the answers to an image.

        Args:
            pixels: uint8 (3, H, W).
            source: the image's name.
            label: the class to explain, by name or index; default: the predicted one.
            coupled: False turns the exchanges between the branches off.
            top: of a detector the objects, of a segmenter the regions that are explained at most.
            box: of a detector, left, top, right, bottom in pixels of the image: only the object is explained whose box
                overlaps this one most, by half of what both cover at least (IoU).

        Returns:
            Of a classifier one explanation; of a detector one for each of the best objects, of a segmenter for each of
            the largest regions, of the class if one is given. Empty where nothing was found.

        Raises:
            UnknownNameError, ChiasmError: for a class that the model has not, or exchanges that it has not.
        """
        wanted = self._index(label)
        canvas, placement = self.canvas(pixels)
        with torch.enable_grad():
            seen = self._record(canvas.requires_grad_(), coupled)
            if self.info.task == "classify":
                answers = self._classes(seen.outputs, wanted)
            elif self.info.task == "segment":
                answers = self._regions(seen.outputs, source, placement, wanted, top)
            else:
                answers = self._objects(seen.outputs, placement, wanted, top, box)
            return [self._explanation(seen, answer, placement, source) for answer in answers]

    def _record(self, canvas: Tensor, coupled: bool) -> Recording:
        return record(self.network, canvas, coupled=coupled, run=self._task, taps=self._taps)

    def _index(self, label: str | int | None) -> int | None:
        if label is None:
            return None
        if isinstance(label, str):
            if label not in self.info.labels:
                raise UnknownNameError("class", label, self.info.labels)
            return self.info.labels.index(label)
        if not 0 <= label < len(self.info.labels):
            raise ChiasmError(f"class {label}: this model has 0 to {len(self.info.labels) - 1}.")
        return label

    # -------------------------------------------------------------------------------------------------------- answers

    def _classes(self, outputs: dict[str, Tensor], wanted: int | None) -> Iterator[_Answer]:
        chances = {name: values[0] for name, values in _probabilities(outputs).items()}
        label = int(chances["model"].argmax()) if wanted is None else wanted
        scores = {name: float(values[label].detach()) for name, values in chances.items()}
        whole = mean_logits(outputs)[0, label]
        values = {branch: outputs[branch][0, label] if branch in outputs else whole for branch in self.branches}
        yield _Answer(label, self.info.labels[label], values, scores)

    def _objects(
        self, outputs: Any, placement: Placement, wanted: int | None, top: int, box: Sequence[float] | None
    ) -> Iterator[_Answer]:
        (raw,) = self._task.model.detect(outputs)
        boxes = placement.to_original(raw["boxes"].detach().cpu())
        there = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        if wanted is not None:
            there &= raw["labels"].cpu() == wanted
        if box is not None:
            shared = box_iou(boxes, torch.tensor([list(box)], dtype=boxes.dtype)).squeeze(1) * there
            there &= (shared == shared.max() if len(shared) else there) & (shared >= SAME_PLACE)
        for i in there.nonzero().squeeze(1).tolist()[:top]:
            label, score = int(raw["labels"][i]), float(raw["scores"][i].detach())
            subject = f"{self.info.labels[label]} {score:.0%}"
            values = dict.fromkeys(self.branches, raw["scores"][i])
            yield _Answer(label, subject, values, {"model": score}, tuple(boxes[i].tolist()))

    def _regions(
        self, outputs: Tensor, source: str, placement: Placement, wanted: int | None, top: int
    ) -> Iterator[_Answer]:
        with torch.no_grad():
            (found,) = self._task.decode(outputs, [source], [[placement]])
        assert isinstance(found, Segmentation)
        predicted, chances = outputs[0].argmax(0), outputs[0].detach().softmax(0)
        covered = placement.covered.to(predicted.device)
        names = list(found.shares) if wanted is None else [self.info.labels[wanted]]
        for name in names[:top]:
            label = self.info.labels.index(name)
            here = (predicted == label) & covered
            if not here.any():
                continue
            values = dict.fromkeys(self.branches, outputs[0, label][here].mean())
            yield _Answer(
                label,
                f"{name} ({found.shares.get(name, 0):.0%})",
                values,
                {"model": float(chances[label][here].mean())},
            )

    # ----------------------------------------------------------------------------------------------------------- maps

    def _explanation(self, seen: Recording, answer: _Answer, placement: Placement, source: str) -> Explanation:
        maps: dict[str, np.ndarray] = {}
        for branch in self.branches:
            for method, values in self._maps_of(seen, branch, answer.values[branch]).items():
                maps[f"{branch}/{method}"] = _normalised(values)
        explanation = Explanation(
            source=source,
            size=placement.original,
            subject=answer.subject,
            label=answer.label,
            scores=answer.scores,
            maps=maps,
            region=placement.region,
            box=answer.box,
            whole=not self._dense,
        )
        return replace(explanation, maps=maps | {FUSED: _mean([explanation.map_of(b) for b in explanation.branches])})

    def _maps_of(self, seen: Recording, branch: str, value: Tensor) -> dict[str, Tensor]:
        """The maps of a branch, by method; each of the canvas and no more."""
        features = [f for f in seen.features if f.branch == branch and f.raw.requires_grad]
        attentions = [a for a in seen.attentions if a.branch == branch and a.raw.requires_grad]
        roots = [*(feature.raw for feature in features), *(attention.raw for attention in attentions)]
        if not roots:
            raise ChiasmError(
                f"{self.info.architecture}: nothing in it has the form of a map, so nothing can be shown."
            )
        gradients = torch.autograd.grad(value, roots, retain_graph=True, allow_unused=True)
        of_features, of_attentions = gradients[: len(features)], gradients[len(features) :]
        maps: dict[str, Tensor] = {}
        with torch.no_grad():
            spoke = _with_gradients(features, of_features)
            if features:
                maps["gradcam"] = (
                    self._cam_of_part(spoke, seen.canvas) if self._dense else self._cam(spoke, seen.canvas)
                )
            if attentions:
                full = [
                    torch.zeros_like(attention.weights) if gradient is None else gradient.expand_as(attention.weights)
                    for attention, gradient in zip(attentions, of_attentions, strict=True)
                ]
                reads, start = self._taps.reads, None
                if self._dense:  # the head reads all tokens: each is worth what it said for the answer
                    start = gradcam(*spoke[-1][1:], local=True) if spoke else None
                else:  # plain rollout is the same whatever the object
                    maps["rollout"] = rollout(attentions, reads)
                maps["gradient_rollout"] = gradient_rollout(attentions, full, reads, start)
                for name in {"rollout", "gradient_rollout"} & set(maps):
                    maps[name] = on_canvas(maps[name], attentions[0].stride, seen.canvas)
        return {name: values.float().cpu() for name, values in maps.items()}

    def _cam(self, spoke: list[_Spoke], canvas: tuple[int, int]) -> Tensor:
        if not spoke:
            return torch.zeros(1, 1)
        feature, values, gradient = self._chosen(spoke)
        return on_canvas(gradcam(values, gradient), feature.stride, canvas)

    def _chosen(self, spoke: list[_Spoke]) -> _Spoke:
        if self._level is not None and not -len(spoke) <= self._level < len(spoke):
            raise ChiasmError(f"level is {self._level}: this model has {-len(spoke)} (the finest) to -1 (the deepest).")
        chosen = choose([feature for feature, *_ in spoke], self._level)
        return next(one for one in spoke if one[0] is chosen)

    def _cam_of_part(self, spoke: list[_Spoke], canvas: tuple[int, int]) -> Tensor:
        """For a part of the image: the features of every stage, since a small object speaks through finer ones than a
        large one; each place by its own gradient."""
        size = max(1, canvas[0] // FINEST), max(1, canvas[1] // FINEST)
        whole = torch.zeros(size)
        for feature, values, gradient in _last_of_stages(spoke):
            cam = on_canvas(gradcam(values, gradient, local=True), feature.stride, canvas)
            spread = F.interpolate(cam[None, None], size=size, mode="bilinear", align_corners=False, antialias=True)[
                0, 0
            ]
            # Per place a coarse map says more, for its places are larger: all count by what they say of the image.
            whole = whole.to(spread) + spread * (gradient.shape[-2] * gradient.shape[-1] / (size[0] * size[1]))
        return whole


class _Answer(NamedTuple):
    """One thing to explain: the scalar of each branch that its maps are gradients of."""

    label: int
    subject: str
    values: dict[str, Tensor]
    scores: dict[str, float]
    box: Any = None


_Spoke = tuple[Feature, Tensor, Tensor]  # features with their map and the gradient of it


def _with_gradients(features: Sequence[Feature], gradients: Sequence[Tensor | None]) -> list[_Spoke]:
    """Those that the answer depends on; behind the last attention nobody reads the tokens beside the class token."""
    spoke = []
    for feature, gradient in zip(features, gradients, strict=True):
        laid = None if gradient is None else feature.lay(gradient)
        if laid is not None and laid.count_nonzero():
            spoke.append((feature, feature.map, laid))
    return spoke


def _last_of_stages(spoke: list[_Spoke]) -> list[_Spoke]:
    return list({one[1].shape: one for one in spoke}.values())


def _probabilities(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    chances = {name: values.float().softmax(-1) for name, values in outputs.items() if len(outputs) > 1}
    return {**chances, "model": mean_logits(outputs).float().softmax(-1)}


def _normalised(values: Tensor) -> np.ndarray:
    total = values.sum()
    return (values / total if total > 0 else values).numpy().astype(np.float32)


def _mean(maps: list[np.ndarray]) -> np.ndarray:
    """The mean of maps at the finest of their resolutions, sums to 1."""
    size = max(values.shape for values in maps)
    resized = [
        F.interpolate(torch.from_numpy(values)[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        for values in maps
    ]
    shares = [values / values.sum() if values.sum() > 0 else values for values in resized]
    return _normalised(torch.stack(shares).mean(0))
