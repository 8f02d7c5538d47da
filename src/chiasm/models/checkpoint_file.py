"""Reading what a checkpoint file or URL holds, without running code from it."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
import sys
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from chiasm.errors import CheckpointError

HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # as torch.hub and OpenMMLab write it


def read_checkpoint(source: str | Path) -> Any:
    """What a path (.safetensors, .pth, .pt, .ckpt ...) or an http(s) URL holds: tensors and plain values.

    Raises:
        CheckpointError: for what cannot be fetched, is no complete checkpoint, or holds more than plain data.
    """
    if re.match(r"https?://", str(source)):
        return _read_file(download(str(source)), str(source))
    return _read_file(Path(source).expanduser(), str(source))


def download(url: str) -> Path:
    """Fetch `url` into torch.hub's cache, once; a sha256 prefix in its name is checked.

    Raises:
        CheckpointError: when it cannot be reached, or is not the file that its name says.
    """
    name = Path(unquote(urlsplit(url).path)).name or "weights"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    # Two addresses may end in one file name: only names that carry a hash are the same file wherever they come from.
    stated = HASH_IN_NAME.search(name)
    target = folder / (name if stated else f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}")
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), stated[1] if stated else None, progress=sys.stderr.isatty())
    except RuntimeError as error:
        raise CheckpointError(f"{url}: what was downloaded is damaged or another file ({error}); try again.") from error
    except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
        reason = str(error).strip("<>")
        raise CheckpointError(
            f"{url}: cannot be downloaded ({reason}). Without a network, copy the file here and give its path."
        ) from error
    return target


def _read_file(path: Path, label: str) -> Any:
    if not path.exists():
        raise CheckpointError(
            f"{label}: no such file; expected a checkpoint (.safetensors, .pth, .pt, .ckpt) or a URL."
        )
    if path.is_dir():
        raise CheckpointError(f"{label}: a folder; expected a checkpoint file, such as {path / 'model.safetensors'}.")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read ({error.strerror}).") from error
    size = os.path.getsize(path)
    if size == 0:
        raise CheckpointError(f"{label}: empty (0 bytes); download or copy it again.")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{label}: a web page, not weights; download the file itself (the 'raw' link).")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{label}: a git-lfs pointer, not the weights; fetch them: git lfs pull")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1e8:  # the length of the JSON that starts there
        return _read_safetensors(path, label, size)
    return _read_torch(path, label, size, head)


def _read_safetensors(path: Path, label: str, size: int) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{label}: incomplete or damaged .safetensors file ({size} bytes, {reason}).") from error


def _read_torch(path: Path, label: str, size: int, head: bytes) -> Any:
    """torch.load of plain data. Of Python's own classes, only the empty shell argparse.Namespace is let through."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of newer pickles, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)|(?:class|function|type) ([\w.]+\.[\w.]+)", str(error))
        what = f"'{named[1] or named[2]}'" if named else ""
        if not what and (head.startswith(b"PK") or (head[:1] == b"\x80" and head[1:2] > b"\x02")):
            what = "a pickle of a newer protocol than torch.save's"
        if what:
            raise CheckpointError(
                f"{label}: holds {what} besides weights; code from files is never run. If you trust its origin, "
                f'convert it once: python -c "import torch; c = torch.load({str(path)!r}, weights_only=False); '
                "torch.save(c.get('model', c.get('state_dict', c)), 'weights.pth')\""
            ) from error
        reason = " ".join(str(error).split())[-120:]
    except Exception as error:  # damaged bytes, read as a pickle, fail in every way there is
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
    raise CheckpointError(f"{label}: not a complete checkpoint ({size} bytes, {reason}); download or copy it again.")
