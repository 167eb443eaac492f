"""Writes files of data sets, as others do, and watches what reading them takes."""

import struct
import tracemalloc

import numpy as np


def images(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def labels(n, classes=10):
    return np.arange(n) % classes


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


CIFAR10 = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def write_images(folder, names, side=6, colour=True):
    from PIL import Image

    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = images(1, side, side, 3, seed=number)[0]
        (Image.fromarray(pixels) if colour else Image.fromarray(pixels[..., 0])).save(path)


def most_memory(action):
    """Bytes that were allocated at once while it ran, beyond those before."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
