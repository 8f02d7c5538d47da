"""Published weights: where an architecture's are to be found, and one line where they cannot be had.

Each model file states the addresses (`default_cfgs`) and timm fetches them, into torch.hub's folder or the Hugging Face
hub's. Here the file is asked for first, once: timm's own way repeats a request for most of a minute without a network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from timm.models._hub import hf_split

from chiasm.errors import CheckpointError, UnknownNameError
from chiasm.models.checkpoint_file import HASH_IN_NAME, download

FILES_IN_HUB = ("model.safetensors", "pytorch_model.bin")  # the first is today's
SECONDS = 10.0  # for the hub to answer


class Source(NamedTuple):
    """Where weights are published: their address, and in the hub their repository and its revision."""

    address: str
    repository: str = ""
    revision: str | None = None


@contextmanager
def published_weights(name: str, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Around `timm.create_model(name, pretrained=True, **kwargs)`: what can go wrong with the weights is one line.

    Raises:
        CheckpointError: when no weights are published for `name`, or they cannot be fetched, are damaged or do not go
            into the model as it is built.
        UnknownNameError: for a tag (behind the dot) that is none of the architecture's, with the nearest.
    """
    source = Source("the source given")
    if not {"pretrained_cfg", "pretrained_cfg_overlay"} & set(kwargs):
        source = published_at(name)
        _ask_for(name, source)
    try:
        yield
    except (OSError, RuntimeError) as error:
        if "state_dict" not in str(error):
            raise _unreachable(name, source, error) from error
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"the published weights of {name} do not go into it as it is built here ({reason}). Build it without them "
            f"and take what fits: chiasm.load_weights(model, '{source.address}')"
        ) from error


def published_at(name: str) -> Source:
    """Where the weights of an architecture ('name' or 'name.tag') are published.

    Raises:
        CheckpointError: when none are.
        UnknownNameError: for a tag that is none of the architecture's.
    """
    try:
        stated = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UnknownNameError("weights", name, get_arch_pretrained_cfgs(name)) from error
    if stated and stated.hf_hub_id:
        repository, revision = hf_split(stated.hf_hub_id)
        file = stated.hf_hub_filename or FILES_IN_HUB[0]
        return Source(hf_hub_url(repository, file, revision=revision), repository, revision)
    if stated and stated.url:
        return Source(stated.url if isinstance(stated.url, str) else stated.url[0])
    raise CheckpointError(
        f"no weights are published for {name}: train it from scratch, give --weights FILE, or choose an architecture "
        "that has them ('chiasm models' says which)."
    )


def _ask_for(name: str, source: Source) -> None:
    """Fetch the file, or make sure that its server has it; once and without waiting."""
    try:
        if HASH_IN_NAME.search(source.address):
            download(source.address)  # its sha256 is checked, which timm leaves out, and timm finds it where it looks
        elif source.repository and not _is_cached(source):
            get_hf_file_metadata(source.address, timeout=SECONDS)
    except EntryNotFoundError:
        pass  # it has another name there: timm knows them all
    except Exception as error:  # every HTTP library that the hub's client has used fails in its own way
        raise _unreachable(name, source, error.__cause__ or error) from error


def _is_cached(source: Source) -> bool:
    files = (source.address.rpartition("/")[2], *FILES_IN_HUB)
    return any(isinstance(try_to_load_from_cache(source.repository, f, revision=source.revision), str) for f in files)


def _unreachable(name: str, source: Source, error: BaseException) -> CheckpointError:
    said = (str(error) or type(error).__name__).splitlines()[0].strip("<>").split(". ")[0].removesuffix(".")
    reason = said.removeprefix(f"Cannot reach {source.address}: ")[:160]
    return CheckpointError(
        f"the published weights of {name} cannot be fetched from {source.address} ({reason}). Download that file where "
        "there is a network, then give it as --weights FILE, or in Python to chiasm.load_weights(model, FILE)."
    )
