"""Write a data set's own files as one that simulations read: python to_npz.py FOLDER NAME.npz

FOLDER has MNIST's idx files (or those of its relatives, plain or .gz), or the binary version of CIFAR-10 or CIFAR-100.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.uint8]


def idx(path: Path) -> Array:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    axes = raw[3]  # after two zeros and the type, which is 8: bytes
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(np.frombuffer(raw, ">u4", axes, 4).tolist())


def cifar(files: list[Path], labels: int) -> tuple[Array, npt.NDArray[np.int64]]:
    rows = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, labels + 3 * 32 * 32) for path in files])
    return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1].astype(np.int64)  # the fine label comes last


def main(folder: Path, out: str) -> None:
    if train := sorted(folder.glob("data_batch_*.bin")):
        parts = cifar(train, 1), cifar([folder / "test_batch.bin"], 1)
    elif (folder / "train.bin").exists():
        parts = cifar([folder / "train.bin"], 2), cifar([folder / "test.bin"], 2)
    else:
        train, test = (sorted(folder.glob(f"{part}-*ubyte*")) for part in ("train", "t10k"))  # images, then labels
        parts = (idx(train[0]), idx(train[1]).astype(np.int64)), (idx(test[0]), idx(test[1]).astype(np.int64))
    (x_train, y_train), (x_test, y_test) = parts
    np.savez(out, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
