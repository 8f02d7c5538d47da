"""An image's bytes as pixels, or why not: sizes are looked at in the header, before anything is decoded."""

from __future__ import annotations

from torch import Tensor

from chiasm.data.images import open_image, to_rgb
from chiasm.errors import ImageError, TooManyPixelsError
from chiasm.serving.refusals import Refusal


def decode(data: bytes, name: str, pixels: int) -> Tensor:
    """One image as (3, H, W) uint8, RGB, EXIF orientation applied, as `chiasm.data.images.read_image` gives it.

    Args:
        data: the bytes of a file.
        name: how its sender calls it.
        pixels: how many it may have.

    Raises:
        Refusal: 422 for bytes that are no sound image, or one of more pixels.
    """
    try:
        image, name = open_image(data, name=name, most=pixels)
        with image:
            if image.format == "ICO":  # its header does not bind the sizes of the pictures in it
                raise ImageError(name, "an icon; send it as PNG.")
            return to_rgb(image, name)
    except ImageError as error:
        code = "too_many_pixels" if isinstance(error, TooManyPixelsError) else "image_unreadable"
        reason = str(error)
    # Not from within: the caught one holds on to the frames, and the file's bytes, it was raised in.
    raise Refusal(422, code, reason)
