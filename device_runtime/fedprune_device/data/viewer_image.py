"""Renders images as viewers and labelling tools display them: upright, opaque, in sRGB. Needs Pillow."""

from __future__ import annotations

import io
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np

from fedprune.core.errors import DataError
from fedprune_device.data.colours import WHITE, Colour

_ORIENTATION = 0x0112  # the EXIF tag
# Pillow's `Image.Transpose` that puts an image upright, by its EXIF orientation.
_TRANSPOSE_OF_ORIENTATION = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height

# Most pixels that are decoded at once, 64 MB in colours with transparency. A small file may unpack to a huge image, so
# its header is checked first.
MAX_PIXELS = 2**24
# JPEG is decoded at a fraction of its size, row by row, so that larger photographs take no more memory.
MAX_JPEG_PIXELS = 2**26

_SHORT_MODES = ("I", "I;16", "I;16B", "I;16L")  # Pillow's modes of grey images with 16 bits
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # a tag of TIFF, and its value for a negative
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", *_SHORT_MODES)
_SHORT_WHITE = 2**16 - 1  # the number of white

_BILINEAR = 2  # Pillow's number

# Levels by which sRGB profiles of different makers differ: these are not worth a conversion.
_COLOUR_TOLERANCE = 2


def viewer_image(image: Any, mode: str, size: tuple[int, int] | None = None, background: Colour = WHITE) -> Any:
    """An opened image of Pillow's as a viewer displays it, in `mode` (`RGB` or `L`).

    It is turned by its EXIF orientation, drawn on `background` where it is transparent, 16 bits become 8, and colours
    of an embedded profile become those of sRGB. Then it is scaled to `size` (width, height), if that is given. Raises
    `DataError` for too many pixels, several frames, and for colours that viewers disagree on.
    """
    check_single_frame(image)
    _check_colours(image)
    # A progressive JPEG is in memory as a whole before the first row is decoded.
    decodes_row_by_row = image.format in ("JPEG", "MPO") and not image.info.get("progressive")
    check_size(image, MAX_JPEG_PIXELS if decodes_row_by_row else MAX_PIXELS)
    if size is not None:
        # A JPEG is decoded at a fraction of its size where that suffices; its sides are those before it is turned.
        image.draft(None, size[::-1] if exif_orientation(image) in _SIDEWAYS else size)
    check_size(image)
    profile = image.info.get("icc_profile")
    is_negative = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    image = upright_image(image)
    # Pillow itself turns the negatives of at most 8 bits.
    image = _short_image(image, is_negative) if image.mode in _SHORT_MODES else image
    image = _opaque_image(image, background)
    convert = _srgb_transform(profile, image.mode) if profile else None
    if convert is None:
        # Inks without a profile become (255 - ink) · (255 - black) / 255, as browsers show them.
        image = _in_mode(_in_mode(image, "RGB") if image.mode == "CMYK" else image, mode)
    image = image.resize(image.size if size is None else size, _BILINEAR)  # a copy where that is its size already
    # Scaled first: a profile's conversion takes longer per pixel than anything else here.
    return image if convert is None else _in_mode(convert.apply(image), mode)


def _in_mode(image: Any, mode: str) -> Any:
    return image if image.mode == mode else image.convert(mode)  # which would copy an image that may be large


def _check_colours(image: Any) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise DataError(
            "colours of an image",
            expected="up to 16 bits for each",
            got="measurements of 32 bits",
            hint="Give them as an array (.npz), or write the image with 8 or 16 bits, scaled alike in all files.",
        )
    if image.mode not in _MODES:
        raise DataError(
            "colours of an image",
            expected="grey, RGB, CMYK or a palette",
            got=image.mode,
            hint="Convert it to RGB, such as: magick FILE -colorspace sRGB OUT.png",
        )


def check_size(image: Any, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse images of too many pixels; raises `DataError`."""
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        raise DataError("size of an image", expected=f"at most {max_pixels} pixels", got=size)


def upright_image(image: Any) -> Any:
    """The image, turned as its EXIF orientation says."""
    image.load()  # which turns a TIFF itself, and then drops the tag
    turn = _TRANSPOSE_OF_ORIENTATION.get(exif_orientation(image))
    return image if turn is None else image.transpose(turn)


def exif_orientation(image: Any) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none, or none that can be read: viewers show such an image, too."""
    with suppress(Exception):  # a damaged file makes Pillow's reader of EXIF raise anything
        value = image.getexif().get(_ORIENTATION, 1)
        return int(value) if value in _TRANSPOSE_OF_ORIENTATION else 1
    return 1


def check_single_frame(image: Any) -> None:
    """Refuse animations and files of several pages; raises `DataError`."""
    # The further pictures of an MPO, which phones write, are depth and gain maps, or the view of the other eye.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        got = "several pages" if image.format == "TIFF" else "an animation"
        raise DataError("an image", expected="a single frame", got=got, hint="Save each frame or page as a file.")


def _short_image(image: Any, is_negative: bool) -> Any:
    """A grey image of 16 bits with 8 bits: L, or LA where one of its shades is transparent."""
    from PIL import Image

    key = image.info.get("transparency")
    numbers = np.clip(np.asarray(image), 0, _SHORT_WHITE)
    shades = ((np.arange(_SHORT_WHITE + 1) * 255 + _SHORT_WHITE // 2) // _SHORT_WHITE).astype(np.uint8)
    grey = (shades[::-1] if is_negative else shades)[numbers]
    if not isinstance(key, int):
        return Image.fromarray(grey)
    return Image.fromarray(np.dstack([grey, np.where(numbers == key, 0, 255).astype(np.uint8)]))


def _opaque_image(image: Any, background: Colour) -> Any:
    """The image in mode L, RGB or CMYK, drawn on a colour."""
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = _in_mode(image, "RGBA")
        paper = Image.new("RGB", image.size, background)
        paper.paste(image, mask=image.getchannel("A"))
        return paper
    if image.mode == "CMYK":  # for its profile, which RGB wouldn't fit
        return image
    return _in_mode(image, "L" if image.mode in ("1", "L") else "RGB")


@lru_cache(maxsize=4)
def _srgb_transform(profile: bytes, mode: str) -> Any:
    """The conversion of colours of a profile to sRGB; None if they are the same, or the profile is for other images or
    damaged, which viewers ignore."""
    from PIL import Image, ImageCms

    try:
        convert = ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")
    except ImageCms.PyCMSError:
        return None
    except ImportError as error:
        raise DataError(
            "an image with a colour profile",
            expected="one without, as this Pillow lacks LittleCMS",
            hint="Install Pillow's own wheel (pip install pillow), or convert the image to sRGB.",
        ) from error
    if mode == "CMYK":
        return convert
    levels = np.linspace(0, 255, 6).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    probe = Image.fromarray(colours if mode == "RGB" else levels[None])
    change = np.asarray(convert.apply(probe), int) - np.asarray(probe.convert("RGB"), int)
    return None if np.abs(change).max() <= _COLOUR_TOLERANCE else convert
