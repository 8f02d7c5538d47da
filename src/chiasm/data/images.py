"""One image file: find it, check its header, decode it to RGB, or say in one line why not.

Pillow decodes everything. torchvision's own decoder is 1.4 times as fast on small JPEGs and gives the same pixels, but
torchvision has announced its removal; with decoded images kept in memory (loader.py) each file is decoded once anyway.

What happens to unusual images:

    palette, 1-bit, grey          converted to RGB
    transparency of any kind      laid on white
    CMYK, YCbCr                   converted to RGB (embedded colour profiles are ignored)
    16 bits per channel           scaled to 8; floating point 0..1 likewise
    animated, several pages       the first frame
    EXIF orientation              applied
    PNG named .jpg and the like   read by content, whatever the name says
    broken, not an image, bombs   ImageError
"""

from __future__ import annotations

import glob
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from chiasm.errors import DataError, ImageError, TooManyPixelsError

MAX_PIXELS = 150_000_000
"""Images of more pixels are refused from their header, before anything is decoded (450 MB as RGB)."""

# .heic and .heif are listed so that such photos are named as unreadable rather than silently passed over.
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "jp2", "avif", "ico", "heic", "heif"),
    )
)

# Pillow can also open formats that start other programs (EPS) or have no reliable signature; those are left out.
_FORMATS = ("JPEG", "PNG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")

# What a file that Pillow does not take for an image starts with, and what to say of it.
_SIGNATURES = (
    (b"\x89PNG", "a PNG with a broken header; replace it"),
    (b"\xff\xd8", "a JPEG with a broken header; replace it"),
    (b"GIF8", "a GIF with a broken header; replace it"),
    (b"version https://git-lfs", "a Git LFS pointer, not the image itself; run 'git lfs pull'"),
    (b"%PDF", "a PDF; export its pages as images"),
    (b"%!PS", "PostScript; export it as an image"),
    (b"PK\x03\x04", "a ZIP archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"SIMPLE  =", "a FITS file; convert it to PNG or TIFF"),
    (b"\x89HDF", "an HDF5 file; convert its images to PNG or TIFF"),
    (b"8BPS", "a Photoshop file; export it as PNG"),
)

_PART = 1 << 18  # pixels that are scaled to 8 bits at a time

# `warnings.catch_warnings` swaps process-wide state, so threads take turns to open images; only headers are read then.
_OPENING = threading.Lock()


def read_image(source: str | os.PathLike[str] | bytes, *, name: str | None = None) -> Tensor:
    """Decode one image.

    Args:
        source: a file's path, or the bytes of a file.
        name: how errors call the image; default: its path.

    Returns:
        (3, H, W) uint8, RGB 0..255, contiguous, EXIF orientation applied.

    Raises:
        ImageError: for whatever is wrong with the file; never anything else.
    """
    image, name = open_image(source, name=name)
    with image:
        return to_rgb(image, name)


def open_image(
    source: str | os.PathLike[str] | bytes, *, name: str | None = None, most: int = MAX_PIXELS
) -> tuple[Image.Image, str]:
    """Read a file and its header; the pixels are not decoded yet.

    Args:
        source, name: as for `read_image`.
        most: pixels that it may have, up to `MAX_PIXELS`.

    Returns:
        the Pillow image (its `format`, `mode` and `size` are known) and the name for `to_rgb`.

    Raises:
        TooManyPixelsError: when it is larger than `most`.
        ImageError: when there is no such file, or it is no image.
    """
    if isinstance(source, bytes):
        data, name = source, name or "<bytes>"
    else:
        name = name or os.fspath(source)
        data = _read_bytes(source, name)
    try:
        with _OPENING, warnings.catch_warnings():
            # Pillow warns from 90 megapixels on; the limit below is checked instead.
            warnings.simplefilter("ignore")
            image = Image.open(BytesIO(data), formats=_formats())
    except UnidentifiedImageError as error:
        raise ImageError(name, f"not a readable image: {_what_it_is(data)}.") from error
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(name, f"more than {most:,} pixels; scale it down or cut it into tiles.") from error
    except Exception as error:  # Pillow's readers raise whatever a damaged header makes them stumble over.
        raise ImageError(name, f"broken header ({_one_line(error)}); replace or remove the file.") from error
    width, height = image.size
    if width * height > most:
        image.close()
        raise TooManyPixelsError(
            name, f"{width} x {height} pixels, at most {most:,} are read; scale it down or cut it into tiles."
        )
    return image, name


def image_size(path: str) -> tuple[int, int]:
    """Width and height as `read_image` gives them, from the header alone.

    Raises:
        ImageError: as `open_image`.
    """
    image: Image.Image
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=_formats())  # reads the header, not the file
        if image.width * image.height > MAX_PIXELS:
            raise ValueError
    except Exception:  # whatever is wrong, this one says it
        image, _ = open_image(path)
    with image:
        try:
            # A PNG is decoded to the end where its EXIF does not stand in front.
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(0x0112) in (5, 6, 7, 8)
        except Exception:  # damaged EXIF is ignored, as in `read_image`
            turned = False
        width, height = image.size
    return (height, width) if turned else (width, height)


def to_rgb(image: Image.Image, name: str) -> Tensor:
    """A Pillow image of any mode as (3, H, W) uint8 RGB; see the table on top of this file.

    Raises:
        ImageError: when the pixels cannot be decoded or their meaning is unknown (floats outside 0..1, for one).
    """
    try:
        image.load()
    except Exception as error:  # As above: a damaged file can fail anywhere inside a decoder.
        raise ImageError(
            name, f"broken or cut off {image.format or 'image'} ({_one_line(error)}); replace or remove the file."
        ) from error
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image, name)
    if image.mode != "RGB" or image.has_transparency_data:
        try:
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
        except ValueError as error:
            raise ImageError(name, f"colour mode {image.mode} cannot be turned into RGB; convert the file.") from error
    # Turned round by numpy: torch would share out each image among its threads, which costs more than it saves.
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def find_images(
    patterns: list[str], suffixes: frozenset[str] = SUFFIXES, *, without: Iterable[str] = ()
) -> Iterator[str]:
    """The image files that `patterns` name, in order, one at a time (100,000 files cost no memory).

    A file is taken as it is, whatever its suffix; so is a path that does not exist, for reading it will name it. A
    folder gives the files in it and below with one of the `suffixes`, sorted, hidden ones left out. Anything else with
    `*`, `?` or `[` is a glob, where `**` spans folders.

    Args:
        patterns: files, folders and globs.
        suffixes: of the files that folders and globs give.
        without: folders of pictures that are written: where they lie somewhere below a pattern, it does not give them.

    Raises:
        DataError: on coming to a folder or glob without any image.
    """
    for pattern in patterns:
        own = {os.path.realpath(folder) for folder in without if not looks_into(pattern, folder)}
        if os.path.isdir(pattern):
            found = walk_images(pattern, suffixes)
        elif not os.path.exists(pattern) and glob.has_magic(pattern):
            paths = glob.iglob(pattern, recursive=True)
            found = (path for path in paths if _is_named(path, suffixes) and os.path.isfile(path))
        else:
            found = iter([pattern])
        count = 0
        for path in found:
            if path == pattern or os.path.realpath(os.path.dirname(path)) not in own:
                count += 1
                yield path
        if not count:
            raise DataError(f"{pattern}: no image files here (looked for {', '.join(sorted(suffixes))}).")


def looks_into(pattern: str, folder: str | os.PathLike[str]) -> bool:
    """Whether a pattern of `find_images` is about the files right in that folder, not just in some folder above it."""
    real = os.path.realpath(folder)
    if os.path.isdir(pattern):
        return os.path.realpath(pattern) == real
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        return False
    above = os.path.realpath(os.path.dirname(re.split(r"[*?[]", pattern)[0]) or ".")
    return real == above or ("**" not in pattern and real.startswith(os.path.join(above, "")))


def walk_images(folder: str | os.PathLike[str], suffixes: frozenset[str] = SUFFIXES) -> Iterator[str]:
    """The image files in a folder and below, by suffix, sorted; hidden files and folders are left out.

    Links to folders are followed, each real folder once, so a link that points upwards does no harm.
    """
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if _is_named(name, suffixes):
                yield os.path.join(root, name)


def _is_named(path: str, suffixes: frozenset[str]) -> bool:
    name = os.path.basename(path)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes


def _read_bytes(path: str | os.PathLike[str], name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ImageError(name, "no such file.") from error
    except IsADirectoryError as error:
        raise ImageError(name, "a folder, expected an image file.") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ImageError(name, f"cannot be read ({_one_line(error)}).") from error


@cache
def _formats() -> list[str]:
    """Those of `_FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _what_it_is(data: bytes) -> str:
    if not data:
        return "the file is empty (0 bytes)"
    for signature, meaning in _SIGNATURES:
        if data.startswith(signature):
            return meaning
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "HEIC, which cannot be read; convert it to JPEG or PNG"
    start = data[:400].lstrip().lower()
    if b"<svg" in start:
        return "SVG, a drawing without pixels; export it as PNG"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, probably saved in the image's place; download it again"
    if not any(data[:512]):
        return "nothing but zero bytes, probably a failed download or copy"
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in data[:400]):
        return f"text starting with {data[:30].decode('ascii').split(chr(10))[0].strip()!r}"
    return f"unknown content starting with {data[:4].hex(' ')}"


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(0x0112) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image  # which it would copy
    except Exception:  # Damaged EXIF beside sound pixels is common: use the pixels as they lie.
        return image


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits (0..65535, also when stored as 32-bit integers) or floats (0..1), scaled to 0..255."""
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535.0
    least, most = values.min(), values.max()
    if not (least >= 0 and most <= top):  # so also where one is not a number
        raise ImageError(name, f"values {least:g}..{most:g}, expected 0..{top:g}; convert it to 8 or 16 bits.")
    # Part by part: floats of a whole large image would take many times its memory.
    flat, scaled = values.reshape(-1), np.empty(values.size, dtype=np.uint8)
    for start in range(0, flat.size, _PART):
        part = slice(start, start + _PART)
        scaled[part] = np.rint(flat[part].astype(np.float64) * (255.0 / top))
    return Image.fromarray(scaled.reshape(values.shape))


def _one_line(error: BaseException) -> str:
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text.rstrip(".") or type(error).__name__
