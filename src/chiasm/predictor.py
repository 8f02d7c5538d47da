"""Images in, typed results out: what predict, evaluate and your own program use. No training code is imported.

predictor = chiasm.load("runs/photos-conformer")
predictor("cat.jpg")                              # [Classification], or [Detections], or [Segmentation]
for result in predictor.stream(many_paths): ...   # lazily: memory stays flat however many there are
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from chiasm.data.images import read_image, to_rgb
from chiasm.data.machine import cores
from chiasm.data.placement import Placement
from chiasm.data.transforms import eval_transform
from chiasm.data.views import Viewer
from chiasm.errors import ChiasmError, ImageError, ModelFileError
from chiasm.inference import optimize
from chiasm.model_file import ModelInfo, resolve_model
from chiasm.models import set_input_size
from chiasm.results import Result
from chiasm.tasks import make_task

if TYPE_CHECKING:
    from PIL import Image

    OneImage = str | os.PathLike[str] | Image.Image | Tensor | np.ndarray

_WINDOWS = 16  # canvases that a segmenter looks at at a time
Seen = tuple[Tensor, list[Placement]]  # an image's canvases (K, C, h, w) and how it lies on them; [] for classification


def load(
    ref: str | os.PathLike[str],
    *,
    device: str = "auto",
    image_size: int | None = None,
    branches: str = "both",
    threshold: float = 0.0,
    zoom: float = 1.0,
) -> Predictor:
    """The predictor of a model.

    Args:
        ref: a model file, a run folder, or an architecture's name; the last has random weights, and says so:
            `predictor.info.trained` is False.
        device: 'auto' (a GPU where there is one), 'cpu', 'cuda', 'cuda:1', 'mps'.
        image_size: side of the square input in pixels; default: what the model was made for.
        branches: of a coupled classifier, 'conv' or 'tokens' lets that one answer alone: the other is not run.
        threshold: least score of the objects that a detector gives, 0..1.
        zoom: 1 shows a segmenter the whole image at once; more, an image so many times as large in overlapping windows.

    Raises:
        ModelFileError, UnknownNameError: when `ref` names no model.
        ChiasmError: for a device that is not here, a size that the model cannot take, one without such branches, or a
            setting out of its range.
    """
    model, info = resolve_model(os.fspath(ref))
    return Predictor(
        model, info, device=device, image_size=image_size, branches=branches, threshold=threshold, zoom=zoom
    )


class Predictor:
    """A model ready to use.

    Args:
        model: any timm model with `len(info.labels)` classes, or one `with_head`; answers come from `chiasm.optimize`
            of it.
        info: what a model file says of it.
        device, image_size, branches, threshold, zoom: as for `load`.

    Attributes:
        info: architecture, labels, preprocessing (with `image_size` applied), and whether it was trained.
        device: where it runs.
        look: from a decoded image, uint8 (3, H, W), to what the network takes; any thread may call it.
    """

    def __init__(
        self,
        model: nn.Module,
        info: ModelInfo,
        *,
        device: str = "auto",
        image_size: int | None = None,
        branches: str = "both",
        threshold: float = 0.0,
        zoom: float = 1.0,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ChiasmError(f"threshold is {threshold}: expected a score from 0 to 1.")
        if not 1 <= zoom <= 16:
            raise ChiasmError(f"zoom is {zoom}: expected 1 (the whole image at once) to 16.")
        if info.task != "classify" and not all(value.isfinite().all() for value in model.state_dict().values()):
            # A head that says 'not a number' of every place would find nothing, and say so calmly.
            raise _damaged(info, "a weight")
        if zoom > 1 and info.task != "segment":
            raise ChiasmError(f"zoom is {zoom}: windows are laid for segmentation; this model's task is '{info.task}'.")
        info = at_size(model, info, image_size)
        if branches != "both":
            _use_branches(model, info.architecture, branches)
        self.info = info
        self.device = choose_device(device)
        self.look = _look(info, zoom)
        self.task = make_task(info.task, optimize(model.eval().to(self.device)), info.labels, threshold).eval()
        # bfloat16 is exact enough to decide and twice as fast on GPUs that have it; elsewhere it is slow.
        self._half = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def __call__(self, images: OneImage | Sequence[OneImage], *, batch_size: int = 32) -> list[Any]:
        """The results of one image or several, in order.

        Args:
            images: paths; Pillow images; uint8 tensors (3, H, W); uint8 arrays (H, W, 3) or (H, W). One or a list.
            batch_size: images that go through the model at a time.

        Raises:
            ImageError: for the first image that cannot be read; `stream` goes on instead.
        """
        several: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
        results: list[Result] = []
        for start in range(0, len(several), batch_size):
            part = several[start : start + batch_size]
            names = [_name(image, start + i) for i, image in enumerate(part)]
            seen = [self.look(_pixels(image, name)) for image, name in zip(part, names, strict=True)]
            results += self.answer_seen(seen, names)
        return results

    def stream(
        self, images: Iterable[str | tuple[str, Tensor]], *, batch_size: int = 32, workers: int | None = None
    ) -> Iterator[Any]:
        """The results of files one after the other, in the order of `images`; lazy at both ends.

        At most two batches are in memory, so `images` may be endless. While the model works on a batch, threads read
        the next. Where a file cannot be read, its `ImageError` comes in the result's place.

        Args:
            images: files' paths, or names with pixels, uint8 (3, H, W), such as a video's frames; taken at most
                `2 * batch_size` ahead of what has been given out.
            batch_size: images that go through the model at a time.
            workers: threads that read; default: one per core.
        """
        if batch_size < 1:
            raise ChiasmError(f"batch_size is {batch_size}: expected 1 or more.")
        if workers is not None and workers < 0:
            raise ChiasmError(f"workers is {workers}: expected 0 or more.")
        source = iter(images)
        pool = ThreadPoolExecutor(max(1, cores() if workers is None else workers), thread_name_prefix="chiasm-read")

        def start_reading() -> list[tuple[str, Future[Seen | ImageError]]]:
            named = (image if isinstance(image, tuple) else (image, image) for image in islice(source, batch_size))
            return [(name, pool.submit(self._read, image)) for name, image in named]

        waiting: deque[list[tuple[str, Future[Seen | ImageError]]]] = deque()
        try:
            waiting.append(start_reading())
            while waiting and (batch := waiting.popleft()):
                waiting.append(start_reading())
                read = [(path, future.result()) for path, future in batch]
                del batch
                good = [(path, seen) for path, seen in read if not isinstance(seen, ImageError)]
                results: Iterator[Result] = iter(())
                if good:
                    results = iter(self.answer_seen([seen for _, seen in good], [path for path, _ in good]))
                del good
                outcomes = [item if isinstance(item, ImageError) else next(results) for _, item in read]
                del read
                yield from outcomes
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    @torch.inference_mode()
    def answer(
        self, batch: Tensor, sources: Sequence[str], placements: Sequence[Sequence[Placement]] = ()
    ) -> list[Any]:
        """Images as the network takes them, float32 (B, C, h, w), to results named after `sources`.

        Args:
            batch: the canvases, of each image one, of a segmenter's one or more.
            sources: the images' names.
            placements: per image how it lies on its canvases; a classifier does without.

        Raises:
            ModelFileError: when the model answers with numbers that are not finite.
        """
        batch = batch.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast("cuda", dtype=torch.bfloat16) if self._half else nullcontext():
            # A large image's windows are many: as much memory as a few need.
            parts = [self.task(part) for part in batch.split(_WINDOWS)] if self.info.task == "segment" else []
            outputs = torch.cat(parts) if parts else self.task(batch)
            named = outputs if isinstance(outputs, dict) else {self.info.task: outputs}
            for name, values in named.items():
                if not values.isfinite().all():
                    raise _damaged(self.info, f"its output ({name})")
            return self.task.decode(outputs, sources, placements)

    def answer_seen(self, seen: Sequence[Seen], sources: Sequence[str]) -> list[Any]:
        """Images that `look` has prepared to results named after `sources`, in one batch.

        Raises:
            ModelFileError: when the model answers with numbers that are not finite.
        """
        if any(len(placements) > 1 for _, placements in seen):  # the windows of one image are a batch of their own
            return [
                result
                for (canvases, placements), source in zip(seen, sources, strict=True)
                for result in self.answer(canvases, [source], [placements])
            ]
        return self.answer(
            torch.cat([canvases for canvases, _ in seen]), sources, [placements for _, placements in seen]
        )

    def _read(self, image: str | Tensor) -> Seen | ImageError:
        try:
            return self.look(read_image(image) if isinstance(image, str) else image)
        except ImageError as error:
            # A fresh one: the caught one holds on to the frames, and the file's bytes, it was raised in.
            return ImageError(error.path, error.reason)


def _look(info: ModelInfo, zoom: float) -> Callable[[Tensor], Seen]:
    """From a decoded image, uint8 (3, H, W), to what the network takes."""
    if info.task == "classify":
        transform = eval_transform(info.preprocess)
        return lambda pixels: (transform(pixels)[None], [])
    return partial(Viewer(info.preprocess).windows, zoom=zoom)


def _damaged(info: ModelInfo, what: str) -> ModelFileError:
    return ModelFileError(
        f"{info.architecture}: {what} is not finite; the weights are damaged or training diverged. Train again with a "
        "lower --lr, or take an earlier checkpoint."
    )


def _use_branches(model: Any, name: str, branches: str) -> None:
    use = getattr(model, "use_branches", None)
    if use is None:
        raise ChiasmError(
            f"{name} has no branches that answer alone, so --branches {branches} is not for it; models coupled ':mid' "
            "or ':late' have."
        )
    use(branches)


def at_size(model: nn.Module, info: ModelInfo, image_size: int | None) -> ModelInfo:
    """Set the model to square images of that side in pixels, None for its own; what is said of it then.

    Raises:
        ChiasmError: for a size that it cannot take.
    """
    if image_size is None:
        return info
    if image_size < 1:
        raise ChiasmError(f"image_size is {image_size}: expected 1 or more.")
    size = (image_size, image_size)
    if size != info.preprocess.size:
        set_input_size(getattr(model, "backbone", model) if info.task != "classify" else model, size)
    return replace(info, preprocess=replace(info.preprocess, size=size))


def choose_device(name: str) -> torch.device:
    """The device of that name; 'auto' takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        ChiasmError: when there is no such device here.
    """
    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(here[0])
    if name not in here:
        raise ChiasmError(f"device '{name}' is not here; there is {', '.join(here)}.")
    return torch.device(name)


def _name(image: OneImage, index: int) -> str:
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    return getattr(image, "filename", "") or f"image {index}"


def _pixels(image: OneImage, name: str) -> Tensor:
    """uint8 (3, H, W) of whatever was given."""
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image, name)
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (1, 3, 4))):
            return to_rgb(Image.fromarray(image.squeeze(-1) if image.shape[2:] == (1,) else image), name)
        raise ImageError(
            name, f"expected a uint8 array (H, W, 3) or (H, W), saw {image.dtype} {image.shape}; several go in a list."
        )
    if isinstance(image, Tensor):
        if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3:
            return image.cpu()
        raise ImageError(
            name, f"expected a uint8 tensor (3, H, W), saw {image.dtype} {tuple(image.shape)}; several go in a list."
        )
    raise ImageError(name, f"expected a path, a Pillow image, a tensor or an array, saw {type(image).__name__}.")
