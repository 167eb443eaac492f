"""Screenshots of reports for the documentation."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


def shoot(page: Path, to: Path, part: str = "main", *, width: int = 1100, dark: bool = False) -> None:
    """Save a part of a page as a PNG of 64 colours.

    Args:
        page: The HTML file.
        to: The picture.
        part: CSS selector of the part.
        width: Of the window, in pixels.
        dark: Whether in dark mode.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light")
        window.goto(page.resolve().as_uri())
        raw = window.locator(part).first.screenshot()
        browser.close()
    with Image.open(io.BytesIO(raw)) as image:
        image.convert("RGB").quantize(64).save(to, optimize=True)
