"""Public data sets by name, through the libraries that publish them. Only these reach for the network.

torchvision:CIFAR10                          downloaded once, into the folder datasets beside torch's hub
torchvision:Imagenette:size=160px            further arguments of the torchvision class; root= for another folder
hf:uoft-cs/cifar10                           the HF hub, through the `datasets` library (pip install datasets)
hf:uoft-cs/cifar100:label=coarse_label       other columns, or config=NAME
hf:/data/flowers                             a local folder: of save_to_disk, Parquet files or an image folder
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from chiasm.data.images import read_image, to_rgb
from chiasm.data.source import SPLIT_NAMES, ImageData, Split, as_name, read_options
from chiasm.errors import DataError, ImageError, UnknownNameError

_BY_FLAG: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_TWO: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
_WHOLE: dict[str, dict[str, Any]] = {"train": {}}

# torchvision's sets for classification -> split -> the arguments that ask for it
TORCHVISION: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS"), _BY_FLAG),
    "EMNIST": {name: {"split": "balanced", **arguments} for name, arguments in _BY_FLAG.items()},
    **dict.fromkeys(("SVHN", "STL10", "Food101", "GTSRB"), _TWO),
    **dict.fromkeys(("Flowers102", "DTD", "FGVCAircraft", "RenderedSST2"), _THREE),
    "Country211": {**_THREE, "val": {"split": "valid"}},
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "Imagenette": {"train": {"split": "train"}, "val": {"split": "val"}},
    **dict.fromkeys(("EuroSAT", "Caltech101", "Caltech256", "SUN397", "SEMEION", "FakeData"), _WHOLE),
}

# FakeData borrows torch's global generator to make an image, so threads take turns.
_READING = threading.Lock()


class TorchvisionSplit(Split):
    """A torchvision data set of (Pillow image, label)."""

    def __init__(self, dataset: Any, name: str, labels: Iterable[int]) -> None:
        self.dataset = dataset
        self.labels = [int(label) for label in labels]
        self.sources = [f"{name}/{i}" for i in range(len(self.labels))]

    def read(self, index: int) -> Tensor:
        try:
            with _READING:
                image = self.dataset[index][0]
        except Exception as error:  # each of these classes reads files in its own way
            raise ImageError(self.sources[index], f"cannot be read ({' '.join(str(error).split())}).") from error
        return to_rgb(image, self.sources[index])


def open_torchvision(spec: str) -> ImageData:
    """A data set of `torchvision.datasets` for classification.

    Args:
        spec: `NAME` or `NAME:key=value,...`; the options are arguments of the torchvision class.

    Raises:
        UnknownNameError: for a name that is not in `TORCHVISION`.
        DataError: when it cannot be downloaded or built.
    """
    import torch
    from torchvision import datasets

    name, _, text = spec.partition(":")
    if name not in TORCHVISION:
        raise UnknownNameError("torchvision data set", name, TORCHVISION, f"There are {', '.join(TORCHVISION)}.")
    options = read_options(text, what=f"torchvision:{name}")
    if name != "FakeData":
        options = {"root": str(Path(torch.hub.get_dir()).parent / "datasets"), "download": True, **options}
    splits, classes = {}, None
    for split, arguments in TORCHVISION[name].items():
        try:
            dataset = getattr(datasets, name)(**{**arguments, **options})
        except TypeError as error:
            raise DataError(f"torchvision:{spec}: {_one_line(error)}; see torchvision.datasets.{name}.") from error
        except Exception as error:  # from urllib, tarfile, hashlib ...: whatever downloading can meet
            place = f" Its files belong into {options['root']}." if "root" in options else ""
            raise DataError(
                f"torchvision:{spec} cannot be had ({_one_line(error)}); is there a network?{place}"
            ) from error
        splits[split] = TorchvisionSplit(dataset, f"{name}/{split}", _labels(dataset))
        classes = classes or getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    count = 1 + max(max(split.labels) for split in splits.values())
    if classes is None or len(classes) < count:
        classes = [f"class {i}" for i in range(count)]
    return ImageData(name=as_name(name), classes=tuple(map(str, classes)), splits=dict(splits))


def _labels(dataset: Any) -> list[int]:
    """The labels of a torchvision data set: kept under one of several names, or nowhere but in its items."""
    for attribute in ("targets", "labels", "_labels", "y"):
        if hasattr(dataset, attribute):
            return [int(label) for label in getattr(dataset, attribute)]
    for attribute in ("samples", "_samples"):
        if hasattr(dataset, attribute):
            return [int(label) for _, label in getattr(dataset, attribute)]
    return [int(dataset[i][1]) for i in range(len(dataset))]


class HubSplit(Split):
    """Rows of an HF data set whose images are still encoded."""

    def __init__(self, rows: Any, column: str, name: str, labels: Iterable[int]) -> None:
        self.rows = rows
        self.column = column
        self.labels = list(labels)
        self.sources = [f"{name}/{i}" for i in range(len(self.labels))]

    def read(self, index: int) -> Tensor:
        image = self.rows[index][self.column]
        if image is None:
            raise ImageError(self.sources[index], "no image in this row.")
        return read_image(image["bytes"] or image["path"], name=self.sources[index])


def open_hf(spec: str) -> ImageData:
    """A data set of the HF `datasets` library, from its hub or from a local folder.

    Args:
        spec: `NAME` or `NAME:key=value,...` with the keys image, label (columns) and config.

    Raises:
        DataError: when the library is not installed, the data cannot be had, or has no image or label column.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"hf:{spec} needs the library datasets: pip install datasets.") from error
    name, _, text = spec.rpartition(":") if "=" in spec.rpartition(":")[2] else (spec, "", "")
    options = read_options(text, {"image": "", "label": "", "config": ""}, what=f"hf:{name}")
    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path) if path.exists() else name, options["config"] or None)
    except Exception as error:  # from the hub, the network, the builders ...: the library documents no common base
        raise DataError(
            f"hf:{spec} cannot be had ({_one_line(error)}); check the name on the hub and the network."
        ) from error
    found = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    features = next(iter(found.values())).features
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    image = _pick(spec, "image", options["image"], images, features)
    kept = [c for c, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    kept += [c for c in ("label", "labels", "class", "category") if c in features and c not in kept]
    label = _pick(spec, "label", options["label"], kept, features)
    named = features[label].names if isinstance(features[label], datasets.ClassLabel) else None
    # At once: the library reads a column row by row otherwise, a hundred times slower.
    raw = {split: rows.select_columns(label)[:][label] for split, rows in found.items()}
    classes = named or sorted({str(value) for values in raw.values() for value in values if value is not None})
    index = {value: i for i, value in enumerate(classes)}
    splits: dict[str, Split] = {}
    notes = []
    for split, rows in found.items():
        labels = raw[split] if named else [index.get(str(value), -1) for value in raw[split]]
        if split not in SPLIT_NAMES:
            notes.append(f"split '{split}' is left out: expected train, val or test")
        elif any(value is None or value < 0 for value in labels):
            notes.append(f"split '{split}' is left out: it has images without a label")
        else:
            encoded = rows.cast_column(image, datasets.Image(decode=False))
            splits[SPLIT_NAMES[split]] = HubSplit(encoded, image, f"{as_name(name)}/{split}", labels)
    if not splits:
        raise DataError(f"hf:{spec}: no split that can be used; saw {', '.join(found)}.")
    return ImageData(name=as_name(name), classes=tuple(classes), splits=splits, notes=tuple(notes))


def _pick(spec: str, role: str, wanted: str, candidates: list[str], columns: Iterable[str]) -> str:
    if wanted:
        if wanted not in columns:
            raise UnknownNameError(f"column of hf:{spec}", wanted, columns, f"It has {', '.join(columns)}.")
        return wanted
    if not candidates:
        raise DataError(f"hf:{spec}: no column of {role}s; it has {', '.join(columns)}. Name it with :{role}=COLUMN.")
    return candidates[0]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
