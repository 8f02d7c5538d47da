"""Which kind of annotation a folder or file holds: COCO, VOC, YOLO, or masks; in that order where there are several."""

from __future__ import annotations

from pathlib import Path

from chiasm.data.annotated import AnnotatedData, Finding
from chiasm.data.coco import file_has_masks, find_coco, open_coco, split_of
from chiasm.data.maps import find_maps, open_maps
from chiasm.data.source import ANNOTATION_FILES
from chiasm.data.voc import find_voc, open_voc
from chiasm.data.yolo import find_yolo, has_polygons, open_yolo, read_yaml
from chiasm.errors import DataError


def task_of(spec: str) -> str:
    """What a data set is annotated for, told from its format alone: what `open_data` would open it as.

    Returns:
        'detect', 'instances' or 'segment'; 'classify' for all else, also for what is not there.

    Raises:
        DataError: when an annotation file cannot be understood.
    """
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix.lower() in ANNOTATION_FILES:
        if path.suffix.lower() == ".json":
            return _boxes_or_masks(file_has_masks(path))
        return _boxes_or_masks(has_polygons(read_yaml(path, None, [])[0]))
    if not path.is_dir():
        return "classify"
    if coco := find_coco(path):
        return _boxes_or_masks(any(map(file_has_masks, coco.values())))
    if find_voc(path):
        return "detect"
    if yolo := find_yolo(path, []):
        return _boxes_or_masks(has_polygons(yolo[0]))
    return "segment" if find_maps(path) else "classify"


def _boxes_or_masks(masks: bool) -> str:
    return "instances" if masks else "detect"


def open_annotated(path: Path, task: str | None, ignore_index: int | None) -> AnnotatedData | None:
    """The annotations at `path` as data; None when there are none that `task` can use.

    Args:
        path: a folder, a COCO JSON or a data.yaml of YOLO's.
        task: 'detect', 'instances', 'segment', or None for what is there.
        ignore_index: of masks: the value that no class is known of.

    Raises:
        DataError: when an annotation file cannot be understood.
    """
    findings: list[Finding] = []
    if path.is_file():
        if task == "segment":
            return None
        if path.suffix.lower() == ".json":
            return open_coco({split_of(path): path}, path.parent, task)
        pairs, names = read_yaml(path, None, findings)
        return open_yolo(pairs, names, path.parent, task, findings)
    if task != "segment":
        if coco := find_coco(path):
            return open_coco(coco, path, task)
        if voc := find_voc(path):
            if task == "instances":
                raise DataError(f"{path}: VOC boxes without masks; they are for the task 'detect'.")
            return open_voc(voc, path)
        if yolo := find_yolo(path, findings):
            return open_yolo(*yolo, path, task, findings)
    if task in (None, "segment") and (maps := find_maps(path)):
        return open_maps(maps, path, ignore_index)
    return None
