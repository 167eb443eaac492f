"""Decodes images and masks into a model's input, and encodes a sample as a picture; needs Pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ConfigError, DataError, MissingExtraError, error_reason, shape_text
from fedprune.model.lengths import Shape
from fedprune_device.data.colours import WHITE, Colour
from fedprune_device.data.viewer_image import check_single_frame, check_size, upright_image, viewer_image

# What Pillow may open, whatever a file's extension: some of its other formats run programs on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
TYPES = {f"image/{kind.lower()}": kind for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")}  # of the local interface
MAX_BYTES = 16 * 2**20  # a photograph of 48 megapixels, as phones take them
_MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's modes of one whole number per pixel
_DEPTH_OFFSET, _COLOUR_OFFSET = 24, 25  # offsets of a PNG's bits per number and of its kind of colours
_GREY = 0  # the kind of colours of a grey PNG


@dataclass(frozen=True)
class Pixels:
    """The conversion of images to a model's input: scaled to its size, from 0 to 1, then (x − mean) / deviation.

    Mean and deviation are one number, or three by colour. Transparent images are drawn on `background`.
    """

    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)
    background: Colour = WHITE

    endings: ClassVar[tuple[str, ...]] = ENDINGS
    max_bytes: ClassVar[int] = MAX_BYTES

    def __post_init__(self) -> None:
        for name, numbers in (("mean", self.mean), ("deviation", self.deviation)):
            if len(numbers) not in (1, 3) or not np.isfinite(numbers).all():
                raise ConfigError(f"{name} of pixels", expected="one number, or three", got=numbers)
        if min(self.deviation) <= 0:
            raise ConfigError("deviation of pixels", expected="above 0", got=min(self.deviation))

    def read(
        self, body: bytes, kinds: tuple[str, ...], shape: Shape, *, as_bytes: bool = False
    ) -> npt.NDArray[np.float32] | npt.NDArray[np.uint8]:
        """An image as a sample; `as_bytes` for a model that takes its pixels."""
        pixels = self.decode(body, kinds, shape)[None]
        samples = self.whole_numbers(pixels, shape) if as_bytes else self.numbers(pixels, shape)
        return samples.reshape(samples.shape[1:])

    def samples(self, body: bytes, shape: Shape) -> npt.NDArray[np.uint8]:
        return self.decode(body, FORMATS, shape)[None]

    def decode(self, body: bytes, kinds: tuple[str, ...], shape: Shape) -> npt.NDArray[np.uint8]:
        """An image as viewers display it (`viewer_image`), in the size that the model takes, [height, width, colours].

        `kinds` are Pillow's names of the accepted formats; `shape` is [1 or 3, height, width], or has the colours last.
        Raises `DataError` if it is another kind of file or too large, `MissingExtraError` without Pillow.
        """
        if not is_picture(shape) or not all(isinstance(s, int) for s in shape):
            raise DataError("an image for this model", expected=f"numbers {shape_text(*shape)}", got="an image")
        sizes = [s for s in shape if isinstance(s, int)]
        colours, height, width = (sizes[2], *sizes[:2]) if has_colours_last(shape) else sizes
        pixels = decode_image(body, "RGB" if colours == 3 else "L", (width, height), self.background, kinds)
        return pixels.reshape(height, width, colours)

    def numbers(self, samples: npt.NDArray[Any], shape: Shape) -> npt.NDArray[np.float32]:
        """Decoded images [n, height, width, colours] as samples of a shape."""
        colours = samples.shape[3]
        x = samples.astype(np.float32).transpose(0, 3, 1, 2) / np.float32(255)
        mean, deviation = (np.array(v, np.float32)[:, None, None] for v in (self.mean, self.deviation))
        x = (x - mean[:colours]) / deviation[:colours]
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1) if has_colours_last(shape) else x, np.float32)

    def whole_numbers(self, samples: npt.NDArray[Any], shape: Shape) -> npt.NDArray[np.uint8]:
        """Decoded images [n, height, width, colours] as samples of their pixels, from 0 to 255."""
        return np.ascontiguousarray(samples if has_colours_last(shape) else samples.transpose(0, 3, 1, 2), np.uint8)

    def png(self, sample: npt.NDArray[Any]) -> bytes:
        """The picture of a sample [1 or 3, height, width], or with its colours last, as a PNG file; raises `DataError`
        for other samples."""
        if not is_picture(sample.shape) or sample.dtype not in (np.float32, np.uint8) or not sample.size:
            raise DataError(
                "the picture of a sample", expected="numbers [1 or 3, height, width]", got=shape_text(*sample.shape)
            )
        if has_colours_last(sample.shape):
            sample = sample.transpose(2, 0, 1)
        if sample.dtype == np.uint8:
            return _png_bytes(sample.transpose(1, 2, 0))
        mean, deviation = (np.array(v, np.float64)[:, None, None] for v in (self.mean, self.deviation))
        colours = len(sample)
        shares = sample * deviation[:colours] + mean[:colours]
        pixels = np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
        return _png_bytes(pixels)


def is_picture(shape: Shape) -> bool:
    """Whether a sample of this shape may be a picture: [colours, height, width] or [height, width, colours]."""
    return len(shape) == 3 and bool({shape[0], shape[2]} & {1, 3})


def has_colours_last(shape: Shape) -> bool:
    """Whether the shape of a picture is [height, width, colours] rather than [colours, height, width]."""
    return shape[0] not in (1, 3) and shape[-1] in (1, 3)


def _png_bytes(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG file of pixels [height, width, 1 or 3]."""
    file = io.BytesIO()
    _pillow().fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()


def decode_image(
    file: bytes | Path,
    mode: str,
    size: tuple[int, int] | None = None,
    background: Colour = WHITE,
    kinds: tuple[str, ...] = FORMATS,
) -> npt.NDArray[np.uint8]:
    """A file's image as viewers display it (`viewer_image`): [height, width, 3], or [height, width] in mode `L`.

    `size` is (width, height); without it the image keeps its own. Raises `DataError` if the file is none of `kinds`,
    Pillow's names of formats, is damaged, too large or no single image, `MissingExtraError` without Pillow.
    """
    with _open_image(file, kinds) as image:
        return np.asarray(viewer_image(image, mode, size, background), np.uint8)


def read_mask(body: bytes, height: int, width: int) -> npt.NDArray[np.int64]:
    """A PNG's numbers [height, width], each that of the nearest pixel; of a palette's image they are its entries.

    Raises `DataError` if it is another kind of file, too large, animated or of more than one number per pixel.
    """
    with _open_image(body, ("PNG",)) as image:
        check_single_frame(image)
        check_size(image)
        if image.mode not in _MASK_MODES:
            raise DataError(
                "a mask",
                expected="one number per pixel (grey, or with a palette)",
                got=image.mode,
                hint=_colour_hint(np.asarray(image.convert("RGB"))),
            )
        if body[_COLOUR_OFFSET] == _GREY and body[_DEPTH_OFFSET] in (2, 4):
            # Some programs write classes as they are, others pack shades of grey: 3 of 2 bits is class 3, or 255.
            hint = "Save it with 8 bits."
            raise DataError("a grey mask", expected="1, 8 or 16 bits", got=body[_DEPTH_OFFSET], hint=hint)
        pixels = np.asarray(upright_image(image))
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip((height, width), pixels.shape, strict=True)
    )
    return np.asarray(pixels[rows][:, columns], np.int64)


def _colour_hint(pixels: npt.NDArray[np.uint8]) -> str:
    """How to turn a mask of colours [height, width, 3] into one of classes."""
    if (pixels == pixels[:, :, :1]).all():
        return "All of its colours are grey: Image.open(PATH).convert('L').save(PATH) of Pillow keeps their numbers."
    return (
        "Give each colour the number of its class, and save that: Image.fromarray((rgb[:, :, None] == "
        "COLOURS).all(-1).argmax(-1).astype('uint8')).save(PATH), where COLOURS [classes, 3] has the classes' colours."
    )


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingExtraError("images need Pillow", extra="board") from error
    return Image


@contextmanager
def _open_image(file: bytes | Path, kinds: tuple[str, ...]) -> Iterator[Any]:
    pillow = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images, which are refused, and of damaged metadata
            with pillow.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=kinds) as image:
                yield image
    except DataError:
        raise
    except pillow.UnidentifiedImageError as error:  # its message is only the address of a BytesIO object
        raise DataError("the image can't be read", expected=" or ".join(kinds), got="something else") from error
    except Exception as error:  # a damaged file makes a decoder raise anything
        raise DataError("the image can't be read", expected=" or ".join(kinds), got=error_reason(error)) from error
