"""Every format of images that programs write is read alike by boards and simulations, or refused with a way out."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import DataError
from fedprune_device.data.image_decoding import FORMATS, Pixels, decode_image
from fedprune_device.data.sample_folder import SampleFolder
from fedprune_device.data.splits import SplitShares
from support.fakes.sample_files import image_file

pytestmark = pytest.mark.board

Image = pytest.importorskip("PIL.Image")

PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 20, 3)).astype(np.uint8)
GREY = COLOURS[:, :, 0]

EXACT = {
    ".bmp": image_file(COLOURS, "BMP"),
    ".tif": image_file(COLOURS, "TIFF"),
    ".tiff": image_file(COLOURS, "TIFF", compression="tiff_lzw"),
    ".ppm": image_file(COLOURS, "PPM"),
    ".webp": image_file(COLOURS, "WEBP", lossless=True),
    ".gif": image_file(Image.fromarray(COLOURS).quantize(16), "GIF"),
}


@pytest.mark.parametrize("ending", EXACT)
def test_a_file_of_each_format_is_a_sample_of_a_folder(ending: str, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / f"a{ending}").write_bytes(EXACT[ending])
    data = SampleFolder(tmp_path, (Pixels(),), SplitShares(0.0), 10).snapshot((3, 12, 20))
    pixels = np.asarray(Image.open(io.BytesIO(EXACT[ending])).convert("RGB"))
    np.testing.assert_allclose(data.x_train[0], pixels.transpose(2, 0, 1) / 255, atol=1e-6)


def test_a_negative_of_sixteen_bits_is_turned() -> None:
    numbers = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    negative = decode_image(image_file(numbers, "TIFF", tiffinfo={PHOTOMETRIC: WHITE_IS_ZERO}), "L")
    np.testing.assert_allclose(negative, 255 - numbers / 257, atol=0.5)
    np.testing.assert_allclose(decode_image(image_file(numbers, "TIFF"), "L"), numbers / 257, atol=0.5)


def test_one_transparent_shade_of_sixteen_bits_is_drawn_on_the_background() -> None:
    body = image_file(np.full((12, 20), 700, np.uint16), transparency=700)
    pixels = Pixels(background=(10, 20, 30)).decode(body, FORMATS, (3, 12, 20))
    np.testing.assert_array_equal(pixels, np.broadcast_to([10, 20, 30], (12, 20, 3)))


PAGES: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(255 - COLOURS)]}
REFUSED = {
    "pages": image_file(Image.fromarray(COLOURS), "TIFF", **PAGES),
    "animation": image_file(Image.fromarray(COLOURS), **PAGES),
    "frames": image_file(Image.fromarray(COLOURS), "WEBP", **PAGES),
    "floats": image_file(GREY.astype(np.float32), "TIFF"),
    "whole numbers of 32 bits": image_file(GREY.astype(np.int32), "TIFF"),
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_files_without_one_picture_of_colours_are_refused_with_a_way_out(body: bytes) -> None:
    with pytest.raises(DataError) as error:
        decode_image(body, "RGB", (20, 12))
    assert error.value.hint


def test_a_large_photograph_is_decoded_at_a_fraction_of_its_size() -> None:
    pixels = decode_image(image_file(Image.new("RGB", (6000, 4000), (200, 100, 50)), "JPEG"), "RGB", (20, 12))
    np.testing.assert_allclose(pixels, np.broadcast_to([200, 100, 50], (12, 20, 3)), atol=3)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"progressive": True}), ("PNG", {})])
def test_a_large_image_that_must_be_in_memory_at_once_is_refused(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="pixels"):
        decode_image(image_file(Image.new("L", (6000, 4000)), kind, **options), "RGB", (20, 12))


def test_a_large_photograph_for_a_model_of_large_images_is_refused() -> None:
    with pytest.raises(DataError, match="pixels"):
        decode_image(image_file(Image.new("L", (6000, 4000)), "JPEG"), "RGB", (5000, 4000))


@pytest.mark.parametrize("colours_last", [True, False])
def test_a_picture_is_read_as_its_pixels_for_a_model_of_bytes(colours_last: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    expected, shape = (pixels, (4, 5, 3)) if colours_last else (pixels.transpose(2, 0, 1), (3, 4, 5))
    sample = Pixels((0.5,), (0.5,)).read(file.getvalue(), ("PNG",), shape, as_bytes=True)
    assert sample.dtype == np.uint8
    np.testing.assert_array_equal(sample, expected)
    shares = Pixels((0.5,), (0.5,)).read(file.getvalue(), ("PNG",), shape)
    np.testing.assert_allclose(shares, (expected / 255 - 0.5) / 0.5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(Pixels().png(sample)))), pixels)
