"""Objects of many images as one COCO JSON, written as a stream: memory stays flat however many there are.

    categories   id (from 1, in the order of the labels), name
    images       id (from 1, in the order of the results), file_name (the result's source), width, height
    annotations  id, image_id, category_id, bbox (left, top, width, height), area, iscrowd 0, score, and where there are
                 masks segmentation (compressed run lengths)

`pycocotools.coco.COCO(file)` reads the file, and its list of annotations is what `loadRes` takes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from tempfile import TemporaryFile
from typing import Any, TextIO

from chiasm.results.detections import Detections
from chiasm.results.masks import encode_mask


def write_coco(results: Iterable[Detections], labels: Sequence[str], file: TextIO) -> None:
    """Write the results as they come; the file is JSON once this returns.

    Args:
        results: of each image; images without objects are listed too.
        labels: the class names of all results.
        file: a text file to write to, such as standard output; it need not seek.
    """
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(labels)]
    file.write(f'{{"info": {{"description": "predictions of chiasm"}},\n"categories": {_json(categories)},\n')
    file.write('"annotations": [')
    written = 0
    with TemporaryFile("w+", encoding="utf-8") as images:  # told after the annotations, which come at the same time
        for image_id, result in enumerate(results, start=1):
            height, width = result.size
            image = {"id": image_id, "file_name": result.source, "width": width, "height": height}
            images.write(f"{',' if image_id > 1 else ''}\n{_json(image)}")
            for annotation in _annotations(result):
                written += 1
                line = _json({"id": written, "image_id": image_id, **annotation})
                file.write(f"{',' if written > 1 else ''}\n{line}")
        file.write('\n],\n"images": [')
        images.seek(0)
        shutil.copyfileobj(images, file)
    file.write("\n]}\n")


def _annotations(result: Detections) -> Iterator[dict[str, Any]]:
    for index, (left, top, right, bottom) in enumerate(result.boxes.tolist()):
        mask = None if result.masks is None else result.masks[index]
        yield {
            "category_id": int(result.classes[index]) + 1,
            "bbox": [round(side, 3) for side in (left, top, right - left, bottom - top)],
            "area": round((right - left) * (bottom - top), 3) if mask is None else int(mask.sum()),
            "iscrowd": 0,
            "score": round(float(result.scores[index]), 6),
            **({} if mask is None else {"segmentation": encode_mask(mask)}),
        }


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False)
