"""Writes files of data sets, as others do, and watches what reading them takes."""

import gzip
import struct
import tracemalloc

import numpy as np


def images(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def labels(n, classes=10):
    return np.arange(n) % classes


def idx_bytes(array):
    codes = {"uint8": 8, "int8": 9, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
    head = bytes([0, 0, codes[array.dtype.name], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder, *, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    x, y = images(30, 28, 28), labels(30)
    for prefix, rows in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        for name, array in (("images-idx3-ubyte", x[rows]), ("labels-idx1-ubyte", y[rows].astype(np.uint8))):
            raw = idx_bytes(array)
            path = folder / f"{prefix}-{name}{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(raw) if packed else raw)
    return x, y


def python2_pickle(entries):
    """What Python 2's cPickle makes of a dict of lists, strings and one array (checked by pickletools below)."""
    out, memo = [b"\x80\x02}q\x01("], [1]

    def put():
        memo[0] += 1
        return b"q" + bytes([memo[0]]) if memo[0] < 256 else b"r" + struct.pack("<I", memo[0])

    def text(value):
        head = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        return head + value + put()

    for key, value in entries.items():
        out.append(text(key))
        if isinstance(value, bytes):
            out.append(text(value))
        elif isinstance(value, list):
            items = [
                text(v) if isinstance(v, bytes) else (b"K" + bytes([v]) if v < 256 else b"M" + struct.pack("<H", v))
                for v in value
            ]
            out.append(b"]" + put() + b"(" + b"".join(items) + b"e")
        else:
            out += [
                b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put(),
                b"K\x00\x85" + put() + b"U\x01b\x87" + put() + b"R" + put() + b"(K\x01",
                b"".join(b"M" + struct.pack("<H", n) for n in value.shape) + b"\x86" + put(),
                b"cnumpy\ndtype\n" + put() + b"U\x02u1K\x00K\x01\x87" + put() + b"R" + put(),
                b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
                b"T" + struct.pack("<i", value.nbytes) + value.tobytes() + put() + b"t" + put() + b"b",
            ]
    out.append(b"u.")
    return b"".join(out)


def batch(n, label=b"labels", seed=0):
    return {
        b"batch_label": b"training batch 1 of 5",
        label: labels(n).tolist(),
        b"data": images(n, 3072, seed=seed),
        b"filenames": [b"leptodactylus_%d.png" % i for i in range(n)],
    }


def write_cifar10(folder, *, python):
    folder.mkdir(parents=True, exist_ok=True)
    whole = []
    for seed, name in enumerate(
        ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    ):
        content = batch(7, seed=seed)
        whole.append(content)
        if python:
            (folder / name).write_bytes(python2_pickle(content))
        else:
            rows = np.concatenate([np.array(content[b"labels"], np.uint8)[:, None], content[b"data"]], 1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
    if python:
        meta = {b"label_names": [b"airplane", b"automobile", *(b"class %d" % i for i in range(2, 10))]}
        (folder / "batches.meta").write_bytes(python2_pickle(meta))
    return whole


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
