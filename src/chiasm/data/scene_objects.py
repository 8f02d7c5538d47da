"""The built-in images with their objects: scenes for the tasks 'detect', 'instances' and 'segment'.

The class of an object is its texture. Class maps have the background as their first class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from chiasm.data.annotated import AnnotatedData, MapSplit, Objects, ObjectSplit
from chiasm.data.scenes import TEXTURES, SceneSplit, open_scenes
from chiasm.data.source import Split
from chiasm.results.masks import encode_mask


class SceneObjects(ObjectSplit):
    """Scenes with their objects, made on demand."""

    def __init__(self, scenes: SceneSplit, indices: Sequence[int], *, masks: bool) -> None:
        self._scenes, self._indices, self._masks = scenes, list(indices), masks
        self.sources = [scenes.sources[i] for i in indices]
        self.labels = [scenes.labels[i] // scenes.arrangements for i in indices]

    def objects(self, index: int) -> Objects:
        scene = self._scenes.scene(self._indices[index])
        count = len(scene.boxes)
        return Objects(
            image_id=self._indices[index] + 1,
            height=self._scenes.size,
            width=self._scenes.size,
            boxes=scene.boxes,
            labels=torch.full((count,), scene.texture, dtype=torch.int64),
            crowd=torch.zeros(count, dtype=torch.bool),
            areas=scene.masks.flatten(1).sum(1).float(),
            outlines=tuple(encode_mask(mask.numpy()) for mask in scene.masks) if self._masks else (),
        )

    def read(self, index: int) -> Tensor:
        return self._scenes.read(self._indices[index])

    def subset(self, indices: Sequence[int]) -> SceneObjects:
        return SceneObjects(self._scenes, [self._indices[i] for i in indices], masks=self._masks)


class SceneMaps(MapSplit):
    """Scenes with their class maps, made on demand; a scene's source is also the name of its mask."""

    def __init__(self, scenes: SceneSplit, indices: Sequence[int]) -> None:
        self._scenes, self._indices = scenes, list(indices)
        sources = [scenes.sources[i] for i in indices]
        super().__init__(sources, sources, _SceneReader(scenes, dict(zip(sources, indices, strict=True))))

    def read(self, index: int) -> Tensor:
        return self._scenes.read(self._indices[index])

    def subset(self, indices: Sequence[int]) -> SceneMaps:
        return SceneMaps(self._scenes, [self._indices[i] for i in indices])


class _SceneReader:
    """A scene's class map by its source."""

    def __init__(self, scenes: SceneSplit, of_source: dict[str, int]) -> None:
        self._scenes, self._of_source = scenes, of_source

    def read(self, path: str) -> tuple[np.ndarray, dict[str, int]]:
        return self._scenes.scene(self._of_source[path]).semantic.numpy(), {}


def open_scene_objects(options: str, task: str) -> AnnotatedData:
    """The built-in data set for 'detect', 'instances' or 'segment'.

    Raises:
        DataError, UnknownNameError: as `open_scenes`.
    """
    splits: dict[str, Split] = {}
    classes: list[str] = []
    for name, split in open_scenes(options).splits.items():
        if isinstance(split, SceneSplit):
            everything = range(len(split))
            maps = task == "segment"
            splits[name] = (
                SceneMaps(split, everything) if maps else SceneObjects(split, everything, masks=task == "instances")
            )
            classes = (["background"] if maps else []) + list(TEXTURES)[: split.textures]
    return AnnotatedData(name="scenes", classes=tuple(classes), splits=splits, task=task)
