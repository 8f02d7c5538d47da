"""An image's bytes as pixels, or why not: sizes are looked at in the header, before anything is decoded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from chiasm.data.images import open_image, to_rgb
from chiasm.errors import ImageError, TooManyPixelsError
from chiasm.serving.refusals import Refusal

BYTES = 16  # that a pixel takes at most while it is decoded: transparent ones exist as several pictures at a time
_SCANS = 100  # of a JPEG; each is a pass over all its pixels, and encoders make about ten


class Turns:
    """Lets so many pixels be decoded at a time, in the order in which they come; an image of more goes alone.

    Args:
        most: so many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._turn = threading.Lock()
        self._freed = threading.Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """The time in which these are decoded, once it has come."""
        with self._turn, self._freed:
            self._freed.wait_for(lambda: not self._taken or self._taken + pixels <= self._most)
            self._taken += pixels
        try:
            yield
        finally:
            with self._freed:
                self._taken -= pixels
                self._freed.notify()


def decode(data: bytes, name: str, pixels: int, turns: Turns) -> Tensor:
    """One image as (3, H, W) uint8, RGB, EXIF orientation applied, as `chiasm.data.images.read_image` gives it.

    Args:
        data: the bytes of a file.
        name: how its sender calls it.
        pixels: how many it may have.
        turns: where it waits until there is memory for it.

    Raises:
        Refusal: 422 for bytes that are no sound image, or one of more pixels.
    """
    try:
        image, name = open_image(data, name=name, most=pixels)
        with image:
            if image.format == "ICO":  # its header does not bind the sizes of the pictures in it
                raise ImageError(name, "an icon; send it as PNG.")
            if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _SCANS:
                raise ImageError(name, f"a JPEG of more than {_SCANS} scans; save it anew, not progressive.")
            with turns.of(image.width * image.height):
                return to_rgb(image, name)
    except ImageError as error:
        code = "too_many_pixels" if isinstance(error, TooManyPixelsError) else "image_unreadable"
        reason = str(error)
    # Not from within: the caught one holds on to the frames, and the file's bytes, it was raised in.
    raise Refusal(422, code, reason)
