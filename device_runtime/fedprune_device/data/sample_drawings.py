"""Draws samples as a model takes them, as HTML: images with their masks or boxes, and numbers as curves."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

from fedprune.model.lengths import padding_value
from fedprune.output.chart import lay_out_chart
from fedprune.output.chart_html import chart_html, html_text
from fedprune_device.data.box_layouts import takes_boxes
from fedprune_device.data.dataset import Channels, LocalData
from fedprune_device.data.image_decoding import Pixels, has_colours_last, is_picture
from fedprune_device.data.labels import Targets
from fedprune_device.data.stored_array import Array
from fedprune_device.data.summary import channel_axis

DRAWN_SAMPLES = 3
_MAX_CURVES = 8
_MAX_STEPS = 250  # a longer signal is drawn as its highest and lowest numbers: else a curve would skip peaks
_MAX_NUMBERS = 24  # token ids of a sample that are shown

_SIDE = 240  # of a drawn image, in pixels of the page
_LETTER_SIZE = 12  # of a box's class, in pixels of the page


def draw_samples(data: LocalData, targets: Targets, class_names: Sequence[str], pixels: Pixels) -> list[str]:
    """Some training samples, of different classes where labels are classes, each with its label.

    Raises `MissingExtraError` for images without Pillow.
    """
    drawings = []
    for number in _chosen_samples(data):
        x, y = np.asarray(data.x_train[number : number + 1])[0], np.asarray(data.y_train[number : number + 1])[0]
        label = "" if data.is_unlabelled else _label_text(y, class_names)
        title = f"<h3>{html_text(f'sample {number}' + (f': {label}' if label else ''))}</h3>"
        drawing = _drawing(
            x, y, None if data.is_unlabelled else targets, pixels, number, class_names, data.channels or Channels(())
        )
        drawings.append(title + drawing)
    return drawings


def _chosen_samples(data: LocalData) -> list[int]:
    y = data.y_train
    if isinstance(y, np.ndarray) and y.ndim == 1 and y.dtype.kind in "iu":
        classes, first, counts = np.unique(y, return_index=True, return_counts=True)
        if len(classes) >= DRAWN_SAMPLES:
            return sorted(first[np.argsort(-counts, kind="stable")[:DRAWN_SAMPLES]].tolist())
    return sorted(set(np.linspace(0, len(y) - 1, DRAWN_SAMPLES).astype(int).tolist()))


def _label_text(y: Array, class_names: Sequence[str]) -> str:
    if y.ndim == 0 and y.dtype.kind in "iu":
        return class_names[int(y)] if int(y) < len(class_names) else str(int(y))
    return ", ".join(f"{v:.4g}" for v in y.reshape(-1).tolist()) if y.size <= _MAX_CURVES else ""


def _drawing(
    x: Array,
    y: Array,
    targets: Targets | None,
    pixels: Pixels,
    number: int,
    class_names: Sequence[str],
    channels: Channels,
) -> str:
    if is_picture(x.shape) and (x.dtype.kind == "f" or x.dtype == np.uint8):
        x = x.transpose(2, 0, 1) if has_colours_last(x.shape) else x
        layers = _boxes_svg(y, x.shape, class_names) if targets is not None and takes_boxes(targets) else ""
        html = _image_svg(pixels.png(x), x.shape[2], x.shape[1], layers)
        if targets is not None and targets.takes_whole_numbers and y.shape == x.shape[1:]:
            shades = (np.clip(y, 0, targets.classes - 1) / max(1, targets.classes - 1)).astype(np.float32)
            html += _image_svg(Pixels().png(shades[None]), y.shape[1], y.shape[0], "")
        return html
    if x.dtype.kind != "f":
        ids = ", ".join(map(str, x.reshape(-1)[:_MAX_NUMBERS].tolist()))
        return f"<p>{html_text(ids + (' ...' if x.size > _MAX_NUMBERS else ''))}</p>"
    names = channels.inputs
    axis = channel_axis(x.shape, names, channels.input_axis)
    if (x.ndim == 1 and not names) or axis is None:
        return _curves({names[0] if names else "": x.reshape(-1)}, number)
    rows = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    names = names or tuple(f"channel {i}" for i in range(len(rows)))
    return _curves(dict(zip(names, rows[:_MAX_CURVES], strict=False)), number)


def _curves(signals: dict[str, Array], number: int) -> str:
    series: dict[str, list[float | None]] = {}
    steps = len(next(iter(signals.values())))
    width = -(-steps // _MAX_STEPS)
    for name, signal in signals.items():
        signal = np.where(signal == padding_value(signal.dtype), np.nan, signal)
        if width == 1:
            series[name or "numbers"] = _values(signal)
            continue
        bins = np.pad(signal, (0, -steps % width), constant_values=np.nan).reshape(-1, width)
        is_empty = np.isnan(bins).all(1)
        for kind, fill, reduce in (("highest", -np.inf, np.max), ("lowest", np.inf, np.min)):
            edge = reduce(np.where(np.isnan(bins), fill, bins), 1)
            series[f"{name} {kind}".strip()] = _values(np.where(is_empty, np.nan, edge))
    positions = [float(i) for i in range(0, steps, width)]
    chart = lay_out_chart(f"sample-{number}", f"Sample {number}", positions, series, "{:.4g}".format, x_title="steps")
    return "<p>no numbers</p>" if chart is None else chart_html(chart)


def _values(signal: Array) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in signal]


def _image_svg(png: bytes, width: int, height: int, layers: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{_SIDE}" height="{_SIDE * height / width:.0f}" role="img" '
        f'aria-label="the image as the model takes it"><image href="data:image/png;base64,{data}" width="{width}" '
        f'height="{height}" style="image-rendering:pixelated"/>{layers}</svg> '
    )


def _boxes_svg(y: Array, shape: Sequence[int], class_names: Sequence[str]) -> str:
    """The boxes of an image of this shape, each with the name of its class."""
    height, width = shape[1:]
    letter_size = _LETTER_SIZE * width / _SIDE
    rects = texts = ""
    for kind, cx, cy, w, h in y.tolist():
        if kind < 0:
            continue
        name = html_text(class_names[int(kind)] if kind < len(class_names) else f"class {kind:.0f}")
        left, top = (cx - w / 2) * width, (cy - h / 2) * height
        # Dark on light, so that it is seen on any colour.
        for stroke in ('stroke="white" stroke-width="5"', 'stroke="black" stroke-width="2"'):
            rects += (
                f'<rect x="{left:.2f}" y="{top:.2f}" width="{w * width:.2f}" height="{h * height:.2f}" fill="none" '
                f'{stroke} vector-effect="non-scaling-stroke"/>'
            )
        texts += (
            f'<text x="{max(0, left) + letter_size / 3:.2f}" y="{max(0, top) + 1.2 * letter_size:.2f}" '
            f'font-size="{letter_size:.2f}" font-weight="bold" stroke="white" stroke-width="{letter_size / 3:.2f}" '
            f'paint-order="stroke">{name}</text>'
        )
    return rects + texts
