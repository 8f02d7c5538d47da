"""Results as pictures in a folder: drawn on their images and videos, or as masks that programs read back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image
from torch import Tensor

from chiasm.data.images import looks_into, read_image
from chiasm.data.video import Frame, VideoWriter
from chiasm.errors import ChiasmError
from chiasm.results import Classification, Detections, Result, Segmentation
from chiasm.results.drawing import colour_of


class Pictures:
    """Images and videos with their results drawn on them: NAME.predicted.jpg and NAME.predicted.mp4; a context manager.

    Args:
        folder: where they go; made if it is not there.
        inputs: files, folders and globs that are predicted: none of these images is written over.
        top: classes shown of a classification.
        every: of each video the frames were taken at this distance.
    """

    def __init__(self, folder: str, inputs: Sequence[str], *, top: int, every: int) -> None:
        self._names = Names(folder, inputs)
        self._top = top
        self._every = every
        self._film: VideoWriter | None = None
        self._last: Frame | None = None  # of `_film`

    def add(self, result: Result, frame: Frame | None, pixels: Tensor | None) -> None:
        """Draw a result on the pixels of a video frame, or where there are none on its image file, read again."""
        if frame is None or pixels is None:
            image, path = read_image(result.source), self._names.new(result.source, ".predicted.jpg")
            with writing(path):
                self._draw(result, image, series=False).save(path, quality=90)
            return
        if self._last and (frame.video != self._last.video or frame.number <= self._last.number):
            self._finish()
        if self._film is None:
            path = self._names.new(frame.video, ".predicted.mp4")
            self._film = VideoWriter(path, frame.rate / self._every)
        self._film.add(self._draw(result, pixels, series=True))
        self._last = frame

    def _draw(self, result: Result, pixels: Tensor, *, series: bool) -> Image.Image:
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        if isinstance(result, Classification):
            return result.draw(image, self._top, series=series)
        return result.draw(image, series=series)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        elif self._film:
            self._film.abandon()

    def _finish(self) -> None:
        film, self._film, self._last = self._film, None, None
        if film:
            film.finish()


class Masks:
    """PNGs, NAME.png, of video frames NAME#NUMBER.png.

    A class map has the index of its class in each pixel (8 bits, with the colours that drawn pictures have as palette);
    objects are numbered from 1 in the order of the rows (16 bits), 0 is background, and where objects overlap, the one
    of the better score is seen.

    Args:
        folder, inputs: as for `Pictures`.
    """

    def __init__(self, folder: str, inputs: Sequence[str]) -> None:
        self._names = Names(folder, inputs)

    def add(self, result: Detections | Segmentation, frame: Frame | None) -> None:
        """Write the masks of a result; `frame` as for `Pictures`."""
        of_video = "" if frame is None else f"#{frame.number}"
        path = self._names.new(result.source if frame is None else frame.video, f"{of_video}.png")
        if isinstance(result, Segmentation):
            picture = Image.fromarray(result.classes, mode="P")
            picture.putpalette([value for label in range(256) for value in colour_of(label)])
        else:
            picture = Image.fromarray(_numbered(result))
        with writing(path):
            picture.save(path)


def _numbered(result: Detections) -> np.ndarray:
    """(H, W) uint16; see `Masks`."""
    numbers = np.zeros(result.size, dtype=np.uint16)
    for index in np.argsort(result.scores, kind="stable"):
        if result.masks is not None:
            numbers[result.masks[index]] = index + 1
    return numbers


class Names:
    """Names of new files in a folder: numbered where they repeat, and none of an image that is predicted.

    Args:
        folder: made if it is not there.
        inputs: files, folders and globs of images.
        is_own: tells the files of an earlier run, which alone are written over then.
    """

    def __init__(self, folder: str, inputs: Sequence[str], is_own: Callable[[Path], bool] | None = None) -> None:
        self.folder = Path(folder)
        self._is_own = is_own
        self._given: set[Path] = set()
        self._numbers: dict[str, int] = {}  # the last of each name, so that no search begins anew
        self._files = {os.path.realpath(path) for path in inputs if os.path.isfile(path)}
        self._holds_inputs = any(looks_into(path, folder) for path in inputs)
        self._listed = "-" in inputs  # paths that come from stdin, known one by one only
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ChiasmError(f"{folder}: cannot be made a folder for pictures ({error.strerror}).") from error

    def new(self, source: str, suffix: str, *more: str) -> Path:
        """A path for what was made of the file `source`; with the suffixes `more` in its place it is free as well."""
        if self._listed and os.path.realpath(os.path.dirname(source) or ".") == os.path.realpath(self.folder):
            self._holds_inputs = True
        stem = Path(source).stem
        while True:
            self._numbers[stem + suffix] = number = self._numbers.get(stem + suffix, 0) + 1
            name = stem if number == 1 else f"{stem}-{number}"
            paths = [self.folder / f"{name}{end}" for end in (suffix, *more)]
            if not any(path in self._given or self._is_taken(path) for path in paths):
                self._given.update(paths)
                return paths[0]

    def _is_taken(self, path: Path) -> bool:
        if not os.path.lexists(path):
            return False
        if os.path.realpath(path) in self._files:
            return True
        return self._holds_inputs if self._is_own is None else not self._is_own(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says where a file cannot be written, as a `ChiasmError` that names the file."""
    try:
        yield
    except OSError as error:
        raise ChiasmError(f"{path}: cannot be written ({error.strerror or error}).") from error
