"""A picture is what a viewer shows."""

import io
import zlib
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import DataError
from fedprune_device.data.image_decoding import FORMATS, Pixels, read_mask
from support.fakes.sample_files import image_file

pytestmark = pytest.mark.board

Image = pytest.importorskip("PIL.Image")
ImageCms = pytest.importorskip("PIL.ImageCms")
ImageOps = pytest.importorskip("PIL.ImageOps")

ORIENTATION = 0x0112
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (12, 20, 3)).astype(np.uint8)
GREY = COLOURS[:, :, 0]


def decode_pixels(body: bytes, height: int = 12, width: int = 20, colours: int = 3, **options: Any) -> Any:
    return Pixels(**options).decode(body, FORMATS, (colours, height, width))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_picture_is_turned_as_its_camera_was_held(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    body = image_file(COLOURS, kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body)))
    np.testing.assert_array_equal(decode_pixels(body, upright.height, upright.width), np.asarray(upright))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_photograph_on_its_side_is_decoded_in_no_less_than_its_size(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stripes = np.zeros((64, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # gone if the image is decoded at half of its size
    wide = decode_pixels(
        image_file(stripes, "JPEG", exif=exif, quality=95), *((64, 512) if orientation == 1 else (512, 64))
    )
    assert wide.std() > 100


def test_a_mask_is_turned_as_its_image() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    np.testing.assert_array_equal(read_mask(image_file(GREY, exif=exif), 20, 12), np.rot90(GREY, -1))


@pytest.mark.parametrize("colours", [1, 3])
def test_sixteen_bits_of_grey_are_shades_from_black_to_white(colours: int) -> None:
    numbers = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    shades = decode_pixels(image_file(numbers), colours=colours)
    np.testing.assert_allclose(shades, np.repeat(numbers[:, :, None] / 257, colours, 2), atol=0.5)


def _palette() -> Any:
    image = Image.frombytes("P", (20, 12), (GREY % 4).tobytes())
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    return image


HALF = np.dstack([COLOURS, np.where(GREY % 2, 255, 0)]).astype(np.uint8)


TRANSPARENT = {
    "RGBA": image_file(HALF),
    "WEBP": image_file(HALF, "WEBP", lossless=True),
    "LA": image_file(HALF[:, :, [0, 3]].copy()),
    "one colour": image_file(COLOURS % 2 * 200, transparency=(0, 200, 0)),
    "one grey": image_file(GREY % 2 * 200, transparency=0),
    "one entry": image_file(_palette(), transparency=0),
    "entries": image_file(_palette(), transparency=bytes([0, 90, 255, 255])),
}


@pytest.mark.parametrize("options", [{}, {"background": (10, 20, 30)}])
@pytest.mark.parametrize("body", TRANSPARENT.values(), ids=TRANSPARENT)
def test_what_is_transparent_is_drawn_on_white_or_the_colour_of_the_options(
    body: bytes, options: dict[str, Any]
) -> None:
    numbers = np.asarray(Image.open(io.BytesIO(body)).convert("RGBA")).astype(float)
    share = numbers[:, :, 3:] / 255
    assert (share < 1).any()
    background = np.array(options.get("background", 255))
    expected = numbers[:, :, :3] * share + background * (1 - share)
    np.testing.assert_allclose(decode_pixels(body, **options), expected, atol=1)


def _profile(**tags: str) -> bytes:
    """The profile of sRGB with tags by other names."""
    body = bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    head, table, rest = body[:132], body[132:372], body[372:]
    for old, new in tags.items():
        table = table.replace(old.encode(), new.lower().encode().rjust(4, b"!"))
    for new in tags.values():
        table = table.replace(new.lower().encode().rjust(4, b"!"), new.encode())
    return head + table + rest


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_colours_of_another_profile_become_those_of_srgb(kind: str) -> None:
    swapped = _profile(rXYZ="bXYZ", bXYZ="rXYZ")
    body = image_file(np.full((12, 20, 3), (255, 0, 0), np.uint8), kind, icc_profile=swapped)
    np.testing.assert_allclose(decode_pixels(body), np.full((12, 20, 3), (0, 0, 255)), atol=6)


@pytest.mark.parametrize("profile", [_profile(), b"damaged", b""])
def test_a_profile_that_changes_nothing_changes_nothing(profile: bytes) -> None:
    np.testing.assert_array_equal(decode_pixels(image_file(COLOURS, icc_profile=profile)), COLOURS)
    np.testing.assert_array_equal(decode_pixels(image_file(GREY, icc_profile=profile), colours=1)[:, :, 0], GREY)


def test_inks_of_a_printer_are_shown_as_browsers_show_them() -> None:
    inks = np.zeros((16, 24, 4), np.uint8)
    inks[:, :, 0], inks[:, :, 1], inks[:, :, 3] = np.linspace(0, 255, 24), 128, np.linspace(0, 200, 16)[:, None]
    image = Image.frombytes("CMYK", (24, 16), inks.tobytes())
    shares = 1 - inks.astype(float) / 255
    expected = 255 * shares[:, :, :3] * shares[:, :, 3:]
    for kind in ("JPEG", "TIFF"):
        body = image_file(image, kind, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))
        np.testing.assert_allclose(decode_pixels(body, 16, 24), expected, atol=6)


def _cmyk_profile() -> bytes:
    """A profile of inks by which black is white, and white black: a table (lut8) from C, M, Y, K to Lab."""
    lab = [bytes((255 if inks & 1 else 0, 128, 128)) for inks in range(16)]  # black, the last ink, counts fastest
    identity = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + (np.eye(3) * 65536).astype(">i4").tobytes()
    table += identity * 4 + b"".join(lab) + identity * 3
    white = b"XYZ " + bytes(4) + np.array([63190, 65536, 54061], ">i4").tobytes()
    tags = {b"A2B0": table + bytes(-len(table) % 4), b"wtpt": white}
    offset, entries, data = 132 + 12 * len(tags), b"", b""
    for name, body in tags.items():
        entries += name + np.array([offset + len(data), len(body)], ">u4").tobytes()
        data += body
    size = offset + len(data)
    head = np.array([size], ">u4").tobytes() + b"lcms" + bytes((2, 0x40, 0, 0)) + b"prtrCMYKLab " + bytes(12) + b"acsp"
    head += bytes(28) + np.array([63190, 65536, 54061], ">i4").tobytes() + bytes(48)
    return head + np.array([len(tags)], ">u4").tobytes() + entries + data


def test_a_printers_profile_says_what_its_inks_look_like() -> None:
    inks = np.zeros((12, 20, 4), np.uint8)
    inks[:, 10:, 3] = 255
    body = image_file(Image.frombytes("CMYK", (20, 12), inks.tobytes()), "TIFF", icc_profile=_cmyk_profile())
    pixels = decode_pixels(body)
    assert pixels[:, :9].max() < 10
    assert pixels[:, 11:].min() > 245


def test_an_animation_is_no_mask() -> None:
    frames = {"save_all": True, "append_images": [Image.fromarray(255 - GREY)]}
    with pytest.raises(DataError):
        read_mask(image_file(Image.fromarray(GREY), **frames), 12, 20)


def test_a_grey_mask_of_few_bits_is_refused_because_its_numbers_have_two_meanings() -> None:
    body = bytearray(image_file(GREY))
    body[24] = 2  # bits, in the header, which has a checksum
    body[29:33] = zlib.crc32(body[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError) as error:
        read_mask(bytes(body), 12, 20)
    assert error.value.hint
