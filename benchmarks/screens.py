"""Screenshots of reports for the documentation."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

MARGIN = 6


def shoot(
    page: Path, to: Path, part: str = "main", *, width: int = 1100, dark: bool = False, most: float = 1600.0
) -> None:
    """Save a part of a page as a PNG of 64 colours.

    Args:
        page: The HTML file.
        to: The picture.
        part: CSS selector of the part.
        width: Of the window, in pixels.
        dark: Whether in dark mode.
        most: Height of the picture, in pixels.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light")
        window.goto(page.resolve().as_uri())
        box = window.locator(part).first.bounding_box()
        if box is None:
            raise LookupError(f"{page} has no {part}")
        height = min(box["height"] + 2 * MARGIN, most)
        clip = {"x": max(0, box["x"] - MARGIN), "y": max(0, box["y"] - MARGIN), "width": box["width"] + 2 * MARGIN}
        raw = window.screenshot(full_page=True, clip={**clip, "height": height})
        browser.close()
    with Image.open(io.BytesIO(raw)) as image:
        image.convert("RGB").quantize(64).save(to, optimize=True)
