"""Videos, frame by frame: read with PyAV (FFmpeg's decoders), and written. PyAV is the extra 'video'.

A video is read as far as it can be, then what is wrong with it is told: damaged frames are left out, and a file that
ends before its header says so is cut off. Frames are turned upright as the camera noted, like photographs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from chiasm.data.images import MAX_PIXELS
from chiasm.errors import ChiasmError, ImageError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset(
    f".{name}"
    for name in ("mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "wmv", "flv", "3gp", "mts", "m2ts", "ogv")
)

# Containers only, by FFmpeg's names, and files only: what is named .mp4 may also be a playlist, which would open other
# files and addresses.
_SAFE = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegvideo,mpegts,asf,flv,ogg,h264,hevc",
    "protocol_whitelist": "file",
}
_RATE = Fraction(25)  # where a file does not tell its own


def is_video(path: str) -> bool:
    """Whether it is one by its name."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where a frame comes from.

    Attributes:
        video: the file's path.
        number: of the frame in the file, from 0.
        rate: frames a second of the file.
    """

    video: str
    number: int
    rate: Fraction

    @property
    def name(self) -> str:
        return f"{self.video}#{self.number}"


def read_frames(path: str, every: int = 1) -> Iterator[tuple[Frame, Tensor]]:
    """The frames 0, `every`, 2 `every` ... of a video, one at a time, with their pixels (3, H, W) uint8 RGB, upright.

    Raises:
        ImageError: where PyAV is missing, the file is no video, or, after all that could be read, parts are not there.
    """
    with _opened(path) as container:
        yield from _decode(container, path, every)


def count_frames(path: str) -> int | None:
    """How many frames its header tells of; None where it does not, or cannot be read."""
    try:
        with _opened(path) as container:
            return container.streams.video[0].frames or None
    except (ImageError, IndexError):
        return None


class VideoWriter:
    """A video in the making: H.264 in MP4, at FILE.part until `finish`.

    Args:
        path: where it goes.
        rate: frames a second.

    Raises:
        ChiasmError: when it cannot be written.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        import av

        self.path = path
        self._part = path.with_name(f"{path.name}.part")
        self._rate = max(Fraction(1, 100), min(rate, Fraction(240))).limit_denominator(1001)
        self._stream: Any = None
        with self._named():
            self._file = open(self._part, "wb")  # noqa: SIM115
            self._container = av.open(self._file, "w", format="mp4")

    def add(self, picture: Image.Image) -> None:
        """The next frame, RGB. The first sets the size; later ones are cut off or filled up with white."""
        import av
        from PIL import Image

        with self._named():
            if self._stream is None:
                codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
                self._stream = self._container.add_stream(codec, rate=self._rate)
                self._stream.width, self._stream.height = (side + side % 2 for side in picture.size)  # H.264 needs even
                self._stream.pix_fmt = "yuv420p"
            canvas = Image.new("RGB", (self._stream.width, self._stream.height), "white")
            canvas.paste(picture)
            self._container.mux(self._stream.encode(av.VideoFrame.from_image(canvas)))

    def finish(self) -> None:
        """Give the complete file its name."""
        with self._named():
            self._close()
            self._part.replace(self.path)

    def abandon(self) -> None:
        """Stop; what there is stays in FILE.part."""
        with suppress(OSError):
            self._close()

    def _close(self) -> None:
        with self._file:
            if self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ChiasmError(f"{self.path}: cannot be written ({error.strerror or error}).") from error


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """PyAV's container of the file, whatever goes wrong with it an `ImageError`."""
    try:
        import av
    except ImportError as error:
        raise ImageError(path, "a video; to read it, install PyAV: pip install 'chiasm[video]'.") from error
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ImageError(path, "the file is empty (0 bytes); copy or export it again.")
            with av.open(file, options=_SAFE) as container:
                yield container
    except av.error.FFmpegError as error:
        reason = "cut off or not a video" if isinstance(error, ValueError) else error.strerror
        raise ImageError(path, f"cannot be read ({reason}); copy or export it again.") from error
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror or error}).") from error


def _decode(container: Any, path: str, every: int) -> Iterator[tuple[Frame, Tensor]]:
    if not container.streams.video:
        raise ImageError(path, "no pictures in it, expected a video.")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None:
        raise ImageError(path, "coded in a way that this FFmpeg does not know; export it as H.264.")
    if context.width * context.height > MAX_PIXELS:
        raise ImageError(
            path, f"{context.width} x {context.height} pixels, at most {MAX_PIXELS:,} are read; scale it down."
        )
    stream.thread_type = "AUTO"
    rate = stream.average_rate or stream.guessed_rate or _RATE
    number = damaged = 0
    end = 0.0
    for frame in _frames(container, stream):
        if frame is None or frame.is_corrupt:
            damaged += 1
        elif number % every == 0:
            yield Frame(video=path, number=number, rate=rate), _upright(frame)
        if frame is not None and frame.time is not None:
            end = max(end, frame.time + float((frame.duration or 0) * frame.time_base))
        number += 1
    wrong = [] if number else ["no frame in it"]
    if damaged:
        wrong.append(f"damaged frames left out: {damaged}")
    length = _length(stream)
    end -= float((stream.start_time or 0) * stream.time_base)
    if length is not None and end < length - max(0.25, 3 / rate):
        wrong.append(f"cut off after {max(0.0, end):.1f} of {length:.1f} seconds")
    if wrong:
        raise ImageError(path, f"{', '.join(wrong)}; copy or export it again.")


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """The decoded frames; None for what could not be decoded."""
    from av.error import FFmpegError

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except FFmpegError:
            yield None
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except FFmpegError:
            frames = [None]
        yield from frames


def _length(stream: Any) -> float | None:
    """Seconds that the header promises; None where it does not. (Matroska tells it in words: 00:01:02.500.)"""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    told = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return int(told[1]) * 3600 + int(told[2]) * 60 + float(told[3]) if told else None


def _upright(frame: Any) -> Tensor:
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))
