"""Write a COCO file's boxes as YOLO's text files, which boards read: python coco_to_yolo.py ANNOTATIONS.json FOLDER

FOLDER is that of the data set: it has `images`, and gets `labels` and `classes.txt`. Crowds are left out.
"""

import json
import sys
from pathlib import Path


def main(annotations: Path, folder: Path) -> None:
    body = json.loads(annotations.read_text())
    names = {category["id"]: category["name"] for category in sorted(body["categories"], key=lambda c: c["id"])}
    boxes: dict[int, list[str]] = {image["id"]: [] for image in body["images"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in body["images"]}
    for one in body["annotations"]:
        if one.get("iscrowd"):
            continue
        (width, height), (x, y, w, h) = sizes[one["image_id"]], one["bbox"]
        left, top = max(x, 0) / width, max(y, 0) / height
        right, bottom = min(x + w, width) / width, min(y + h, height) / height
        if right > left and bottom > top:
            kind = list(names).index(one["category_id"])
            sides = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
            boxes[one["image_id"]].append(" ".join([str(kind), *(f"{side:.6f}" for side in sides)]))
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names.values()))
    for image in body["images"]:
        lines = "".join(f"{line}\n" for line in boxes[image["id"]])
        (folder / "labels" / Path(image["file_name"]).with_suffix(".txt").name).write_text(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
