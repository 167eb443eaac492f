"""Folders of pictures: what cameras, phones and labelling tools write."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from benchmarks.data_folders.kinds import CLASSES, REFUSED, Array, Kind, Truth
from fedprune_device.data.labels import Targets

SIDE = 8
# A format with losses changes a shade by some per cent.
LOSSY = 0.12
SHAPE = (3, SIDE, SIDE)
BOXES = Targets("mse", 1, (4, 5))
MASKS = Targets("cross_entropy", 3, (SIDE, SIDE))

Write = Callable[[Image.Image, Path], Any]


def kinds() -> Iterator[Kind]:
    """All kinds of pictures."""
    yield from _formats()
    yield from _layouts()
    yield from _boxes()
    yield from _masks()


def _picture(label: int) -> Image.Image:
    """A smooth picture whose colours tell its class, and whose left half is brighter."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[..., label], pixels[:, : SIDE // 2, 2] = 200, 80
    pixels[: SIDE // 2, :, 1 - label] = 60
    return Image.fromarray(pixels)


def _inputs(image: Image.Image) -> Array:
    return np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / 255


def _truth(tolerance: float = 1e-6, inputs: Callable[[Image.Image], Array] = _inputs) -> Truth:
    return Truth([(inputs(_picture(label)), label) for label in (0, 1)], tolerance)


def _shades(image: Image.Image) -> Array:
    return np.asarray(image.convert("L"), np.float32)[None]


def _classes(
    name: str, suffix: str, write: Write, truth: Truth | None = None, shape: tuple[int, ...] = SHAPE, **options: Any
) -> Kind:
    """A folder for each class with one picture."""

    def made(folder: Path) -> tuple[Path, Truth]:
        for label in (0, 1):
            (folder / str(label)).mkdir()
            write(_picture(label), folder / str(label) / f"a{suffix}")
        return folder, truth or _truth()

    return Kind("pictures", name, made, shape, options=tuple(options.items()))


def _saved(mode: str = "RGB", form: str | None = None, **options: Any) -> Write:
    return lambda image, path: image.convert(mode).save(path, form, **options)


def _jpeg(**options: Any) -> Write:
    return _saved(form="JPEG", quality=95, subsampling=0, **options)


def _formats() -> Iterator[Kind]:
    yield _classes("PNG", ".png", _saved())
    yield _classes("JPEG", ".jpg", _jpeg(), _truth(LOSSY))
    yield _classes("JPEG, progressive, with the extension .JPEG", ".JPEG", _jpeg(progressive=True), _truth(LOSSY))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = _truth(LOSSY, lambda image: _inputs(image.rotate(-90)))
    yield _classes("PNG that its EXIF turns", ".png", _saved(exif=exif), Truth(turned.samples))
    yield _classes("JPEG of a phone held upright (EXIF turns it)", ".jpg", _jpeg(exif=exif), turned)
    yield _classes("PNG with a palette", ".png", lambda image, path: image.quantize(16).save(path))

    def sixteen_bits(image: Image.Image, path: Path) -> None:
        Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257).save(path)

    def one_bit(image: Image.Image, path: Path) -> None:
        image.convert("L").point(lambda v: 255 * (v > 50), "1").save(path)

    grey = _truth(0.003, lambda image: _shades(image) / 255)
    yield _classes("PNG of 16 bits for a grey model", ".png", sixteen_bits, grey, (1, SIDE, SIDE))
    black = _truth(inputs=lambda image: (_shades(image) > 50) * 1.0)
    yield _classes("PNG of 1 bit for a grey model", ".png", one_bit, black, (1, SIDE, SIDE))
    yield _classes("PNG, transparent, on white", ".png", _transparent, _over(255))
    yield _classes("PNG, transparent, on black", ".png", _transparent, _over(0), image_background=(0, 0, 0))
    yield _classes("WebP without losses", ".webp", _saved(lossless=True))
    yield _classes("BMP", ".bmp", _saved())
    yield _classes("TIFF with LZW", ".tif", _saved(compression="tiff_lzw"))
    yield _classes("GIF", ".gif", _saved())
    yield _classes("PPM", ".ppm", _saved())
    yield _classes("JPEG named .png", ".png", _jpeg(), _truth(LOSSY))
    yield _classes("CMYK in a JPEG", ".jpg", _saved("CMYK", quality=95), _truth(0.2))

    def moving(image: Image.Image, path: Path) -> None:
        image.save(path, save_all=True, append_images=[ImageOps.invert(image)])

    yield _classes("an animated GIF", ".gif", moving, REFUSED)
    yield _classes("HEIC", ".heic", lambda image, path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99)), REFUSED)
    yield _classes("JPEG cut short", ".jpg", lambda image, path: path.write_bytes(_bytes(image)[:400]), REFUSED)
    yield _classes("a page of HTML named .jpg", ".jpg", lambda image, path: path.write_text("<html></html>"), REFUSED)


def _bytes(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.resize((64, 64)).save(file, "JPEG")
    return file.getvalue()


def _with_alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 3, 3))
    image.putalpha(alpha)
    return image


def _transparent(image: Image.Image, path: Path) -> None:
    _with_alpha(image).save(path)


def _over(shade: int) -> Truth:
    def flat(image: Image.Image) -> Array:
        background = Image.new("RGBA", image.size, (shade, shade, shade, 255))
        return _inputs(Image.alpha_composite(background, _with_alpha(image)))

    return _truth(inputs=flat)


def _folder(name: str, write: Callable[[Path], Any], truth: Truth, targets: Targets = CLASSES, **options: Any) -> Kind:
    def made(folder: Path) -> tuple[Path, Truth]:
        write(folder)
        return folder, truth

    group = "pictures" if targets is CLASSES else "boxes and masks"
    return Kind(group, name, made, SHAPE, targets, tuple(options.items()))


def _put(path: Path, label: int, size: int = SIDE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _picture(label).resize((size, size), Image.Resampling.NEAREST).save(path)


def _layouts() -> Iterator[Kind]:
    def split(folder: Path) -> None:
        for label in (0, 1):
            _put(folder / "train" / str(label) / "a.png", label)
            _put(folder / "test" / str(label) / "b.png", label, 16)

    both = Truth([sample for sample in _truth().samples or () for _ in range(2)])
    yield _folder("train/CLASS and test/CLASS", split, Truth(both.samples, 0.2))

    def named(folder: Path) -> None:
        for label, name in enumerate(("cat", "Dog")):
            _put(folder / name / "2024" / "a.png", label)
        (folder / "cat" / ".DS_Store").write_bytes(b"x")
        (folder / "Thumbs.db").write_bytes(b"x")
        (folder / "__MACOSX" / "cat").mkdir(parents=True)

    yield _folder(
        "classes by name, with folders in them, from a Mac and Windows", named, _truth(), class_names=("cat", "Dog")
    )

    def flat(folder: Path) -> None:
        for label in (0, 1):
            _put(folder / f"{label}.png", label)

    rows = "".join(json.dumps({"file_name": f"{label}.png", "label": label}) + "\n" for label in (0, 1))
    for file, text in {"csv": "file_name,label\n0.png,0\n1.png,1\n", "jsonl": rows}.items():

        def described(folder: Path, name: str = f"metadata.{file}", text: str = text) -> None:
            flat(folder)
            (folder / name).write_text(text)

        yield _folder(f"imagefolder of Hugging Face: metadata.{file}, which simulations read", described, REFUSED)
    yield _folder("pictures without classes", flat, REFUSED)
    yield _folder("an empty folder", lambda folder: None, REFUSED)

    def large(folder: Path) -> None:
        for label in (0, 1):
            _put(folder / str(label) / "a.png", label, 8 * (2 + label))

    yield _folder("sizes of their own", large, _truth(0.2))


def _box_truth() -> Truth:
    rows = np.zeros((4, 5), np.float32)
    rows[:, 0] = -1
    first = rows.copy()
    first[0] = [1, 0.5, 0.25, 0.5, 0.25]
    return Truth([(_inputs(_picture(0)), first), (_inputs(_picture(1)), rows)])


LINE = "1 0.5 0.25 0.5 0.25\n"


def _boxes() -> Iterator[Kind]:
    def yolo(folder: Path, images: str = "images", labels: str = "labels", line: str = LINE) -> None:
        for label in (0, 1):
            _put(folder / images / f"{label}.png", label)
        (folder / labels).mkdir(parents=True, exist_ok=True)
        (folder / labels / "0.txt").write_text(line)
        (folder / labels / "1.txt").write_text("")

    def box_kind(name: str, write: Callable[[Path], Any], truth: Truth | None = None, **options: Any) -> Kind:
        return _folder(name, write, truth or _box_truth(), BOXES, **options)

    names = ("cat", "dog")
    yield box_kind("YOLO: images/ and labels/", yolo)
    yield box_kind("YOLO beside: NAME.png and NAME.txt", lambda folder: yolo(folder, ".", "."))

    for kind, text in {
        "images/train, data.yaml with a list": "nc: 2\nnames: ['cat', 'dog']\n",
        "data.yaml with numbered names": "names:\n  0: cat\n  1: dog\n",
    }.items():

        def ultralytics(folder: Path, text: str = text) -> None:
            yolo(folder, "images/train", "labels/train")
            (folder / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/train\n{text}")

        yield box_kind(f"Ultralytics: {kind}", ultralytics, class_names=names)

    def roboflow(folder: Path) -> None:
        yolo(folder, "train/images", "train/labels")
        (folder / "data.yaml").write_text("names: ['cat', 'dog']\nnc: 2\ntrain: ../train/images\n")

    yield box_kind("Roboflow: train/images, train/labels", roboflow, class_names=names)

    def label_studio(folder: Path) -> None:
        yolo(folder)
        (folder / "classes.txt").write_text("cat\ndog\n")
        categories = [{"id": number, "name": name} for number, name in enumerate(names)]
        (folder / "notes.json").write_text(json.dumps({"categories": categories}))

    yield box_kind("Label Studio: YOLO with classes.txt and notes.json", label_studio, class_names=names)
    outline = "1 0.25 0.125 0.75 0.125 0.75 0.375 0.25 0.375\n"
    yield box_kind("YOLO segments become boxes", lambda folder: yolo(folder, line=outline))
    yield box_kind("a box outside of the picture", lambda folder: yolo(folder, line="1 1.5 0.5 0.2 0.2\n"))

    def voc(folder: Path) -> None:
        for label in (0, 1):
            _put(folder / "JPEGImages" / f"{label}.png", label)
        corners = "<xmin>3</xmin><ymin>2</ymin><xmax>6</xmax><ymax>3</ymax>"
        box = f"<object><name>dog</name><bndbox>{corners}</bndbox></object>"
        (folder / "Annotations").mkdir()
        for label, objects in enumerate((box, "")):
            (folder / "Annotations" / f"{label}.xml").write_text(
                f"<annotation><filename>{label}.png</filename><size><width>8</width><height>8</height></size>"
                f"{objects}</annotation>"
            )

    yield box_kind("Pascal VOC: JPEGImages/ and Annotations/", voc, class_names=names)

    def coco(folder: Path) -> None:
        for label in (0, 1):
            _put(folder / "images" / f"{label}.png", label)
        (folder / "annotations.json").write_text('{"images": [], "annotations": [], "categories": []}')

    yield box_kind("COCO: annotations.json", coco, REFUSED)


def _masks() -> Iterator[Kind]:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[2:5, 1:6] = 2
    truth = Truth([(_inputs(_picture(y)), mask) for y in (0, 1)])

    def write(image: Image.Image, folder: Path) -> None:
        for label in (0, 1):
            _put(folder / "images" / f"{label}.png", label)
            (folder / "masks").mkdir(exist_ok=True)
            image.save(folder / "masks" / f"{label}.png")

    palette = Image.fromarray(mask).convert("P")
    palette.putdata(mask.ravel().tolist())
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    colours = Image.fromarray(np.asarray(palette.convert("RGB")))
    wide = Image.fromarray(mask).resize((16, 16), Image.Resampling.NEAREST)
    high = Image.fromarray(np.where(mask == 2, 7, 0).astype(np.uint8))
    for name, image, found in (
        ("masks, grey", Image.fromarray(mask), truth),
        ("masks with a palette", palette, truth),
        ("masks in colours", colours, REFUSED),
        ("masks larger than the pictures", wide, truth),
        ("masks with a class that the model lacks", high, REFUSED),
    ):
        yield _folder(name, partial(write, image), found, MASKS)
