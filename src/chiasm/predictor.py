"""Images in, typed results out: what predict, evaluate and your own program use. No training code is imported.

predictor = chiasm.load("runs/photos-conformer")
predictor("cat.jpg")                              # [Classification]
for result in predictor.stream(many_paths): ...   # lazily: memory stays flat however many there are
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from chiasm.data.images import read_image, to_rgb
from chiasm.data.machine import cores
from chiasm.data.transforms import eval_transform
from chiasm.errors import ChiasmError, ImageError, ModelFileError
from chiasm.inference import optimize
from chiasm.model_file import ModelInfo, resolve_model
from chiasm.models import set_input_size
from chiasm.results import Classification
from chiasm.tasks.classify import Classify

if TYPE_CHECKING:
    from PIL import Image

    OneImage = str | os.PathLike[str] | Image.Image | Tensor | np.ndarray


def load(
    ref: str | os.PathLike[str], *, device: str = "auto", image_size: int | None = None, branches: str = "both"
) -> Predictor:
    """The predictor of a model.

    Args:
        ref: a model file, a run folder, or an architecture's name; the last has random weights, and says so:
            `predictor.info.trained` is False.
        device: 'auto' (a GPU where there is one), 'cpu', 'cuda', 'cuda:1', 'mps'.
        image_size: side of the square input in pixels; default: what the model was made for.
        branches: of a coupled model, 'conv' or 'tokens' lets that one answer alone: the other is not run.

    Raises:
        ModelFileError, UnknownNameError: when `ref` names no model.
        ChiasmError: for a device that is not here, a size that the model cannot take, or one without such branches.
    """
    model, info = resolve_model(os.fspath(ref))
    return Predictor(model, info, device=device, image_size=image_size, branches=branches)


class Predictor:
    """A model ready to use.

    Args:
        model: any timm model with `len(info.labels)` classes; answers come from `chiasm.optimize` of it.
        info: what a model file says of it.
        device, image_size, branches: as for `load`.

    Attributes:
        info: architecture, labels, preprocessing (with `image_size` applied), and whether it was trained.
        device: where it runs.
    """

    def __init__(
        self,
        model: nn.Module,
        info: ModelInfo,
        *,
        device: str = "auto",
        image_size: int | None = None,
        branches: str = "both",
    ) -> None:
        if image_size is not None:
            if image_size < 1:
                raise ChiasmError(f"image_size is {image_size}: expected 1 or more.")
            size = (image_size, image_size)
            if size != info.preprocess.size:
                set_input_size(model, size)
            info = replace(info, preprocess=replace(info.preprocess, size=size))
        if branches != "both":
            _use_branches(model, info.architecture, branches)
        self.info = info
        self.device = choose_device(device)
        self._transform = eval_transform(info.preprocess)
        self.task = Classify(optimize(model.eval().to(self.device)), info.labels).eval()
        # bfloat16 is exact enough to decide and twice as fast on GPUs that have it; elsewhere it is slow.
        self._half = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def __call__(self, images: OneImage | Sequence[OneImage], *, batch_size: int = 32) -> list[Classification]:
        """Classify one image or several, in order.

        Args:
            images: paths; Pillow images; uint8 tensors (3, H, W); uint8 arrays (H, W, 3) or (H, W). One or a list.
            batch_size: images that go through the model at a time.

        Raises:
            ImageError: for the first image that cannot be read; `stream` goes on instead.
        """
        several: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
        results: list[Classification] = []
        for start in range(0, len(several), batch_size):
            part = several[start : start + batch_size]
            names = [_name(image, start + i) for i, image in enumerate(part)]
            pixels = [self._transform(_pixels(image, name)) for image, name in zip(part, names, strict=True)]
            results += self.classify(torch.stack(pixels), names)
        return results

    def stream(
        self, paths: Iterable[str], *, batch_size: int = 32, workers: int | None = None
    ) -> Iterator[Classification | ImageError]:
        """Classify files one after the other, in the order of `paths`; lazy at both ends.

        At most two batches are in memory, so `paths` may be endless. While the model works on a batch, threads read
        the next. Where a file cannot be read, its `ImageError` comes in the result's place.

        Args:
            paths: files' paths; taken at most `2 * batch_size` ahead of what has been given out.
            batch_size: images that go through the model at a time.
            workers: threads that read; default: one per core.
        """
        if batch_size < 1:
            raise ChiasmError(f"batch_size is {batch_size}: expected 1 or more.")
        if workers is not None and workers < 0:
            raise ChiasmError(f"workers is {workers}: expected 0 or more.")
        source = iter(paths)
        pool = ThreadPoolExecutor(max(1, cores() if workers is None else workers), thread_name_prefix="chiasm-read")

        def start_reading() -> list[tuple[str, Future[Tensor | ImageError]]]:
            return [(path, pool.submit(self._read, path)) for path in islice(source, batch_size)]

        waiting: deque[list[tuple[str, Future[Tensor | ImageError]]]] = deque()
        try:
            waiting.append(start_reading())
            while waiting and (batch := waiting.popleft()):
                waiting.append(start_reading())
                read = [(path, future.result()) for path, future in batch]
                del batch
                good = [(path, pixels) for path, pixels in read if isinstance(pixels, Tensor)]
                results: Iterator[Classification] = iter(())
                if good:
                    results = iter(self.classify(torch.stack([p for _, p in good]), [path for path, _ in good]))
                del good
                outcomes = [item if isinstance(item, ImageError) else next(results) for _, item in read]
                del read
                yield from outcomes
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    @torch.inference_mode()
    def classify(self, batch: Tensor, sources: Sequence[str]) -> list[Classification]:
        """Preprocessed images, float32 (B, C, h, w), to results named after `sources`.

        Raises:
            ModelFileError: when the model answers with numbers that are not finite.
        """
        batch = batch.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast("cuda", dtype=torch.bfloat16) if self._half else nullcontext():
            outputs = self.task(batch)
        for name, logits in outputs.items():
            if not logits.isfinite().all():
                raise ModelFileError(
                    f"{self.info.architecture}: its output ({name}) is not finite; the weights are damaged or training "
                    "diverged. Train again with a lower --lr, or take an earlier checkpoint."
                )
        return self.task.decode(outputs, sources)

    def _read(self, path: str) -> Tensor | ImageError:
        try:
            return self._transform(read_image(path))
        except ImageError as error:
            # A fresh one: the caught one holds on to the frames, and the file's bytes, it was raised in.
            return ImageError(error.path, error.reason)


def _use_branches(model: Any, name: str, branches: str) -> None:
    use = getattr(model, "use_branches", None)
    if use is None:
        raise ChiasmError(
            f"{name} has no branches that answer alone, so --branches {branches} is not for it; models coupled ':mid' "
            "or ':late' have."
        )
    use(branches)


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
