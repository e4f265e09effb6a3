"""IDX files, the format of MNIST and of the sets made in its image (Fashion-MNIST, Kuzushiji-MNIST, EMNIST).

A file is two zero bytes, one byte for the type, one for the rank, the sizes as big-endian 32-bit integers, and the
elements, big-endian, the last index fastest. Reference: LeCun, Cortes, Burges, "The MNIST database", 1998.
"""

import gzip
import math
import struct
import zlib
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
PARTS = {"train": "train", "test": "t10k"}
FILES = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}


def read_idx(path: str | PathLike[str]) -> Tensor:
    """Read an IDX file, compressed by gzip or not.

    Args:
        path: the file.

    Returns:
        Tensor of the shape and type that the file declares.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a whole IDX file.
    """
    raw = Path(path).read_bytes()
    try:
        data = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}; copy or download it again") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in TYPES or not data[3]:
        raise ValueError(f"{path}: no IDX file: it starts with {data[:4].hex(' ') or 'nothing'}, not with 00 00 08 ..")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise ValueError(f"{path}: truncated: {len(data)} bytes, its header alone needs {start}")
    shape, dtype = struct.unpack(f">{data[3]}I", data[4:start]), np.dtype(TYPES[data[2]])
    if (size := start + math.prod(shape) * dtype.itemsize) != len(data):
        what = "truncated" if len(data) < size else "too long"
        raise ValueError(
            f"{path}: {what}: {len(data)} bytes, its shape {shape} needs {size}; copy or download it again"
        )
    array = np.frombuffer(data, dtype, offset=start).reshape(shape)
    return torch.from_numpy(array.astype(dtype.newbyteorder("=")))


def find(folder: str | PathLike[str], stem: str) -> Path | None:
    """The file of that name, as it is, compressed, or as some unpackers call it: ``train-images.idx3-ubyte``."""
    names = (name + suffix for name in (stem, stem.replace("-idx", ".idx")) for suffix in ("", ".gz"))
    return next((path for name in names if (path := Path(folder) / name).is_file()), None)


def read_mnist(folder: str | PathLike[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the four files of MNIST, or of a set with its names.

    Args:
        folder: where ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, and the same of ``t10k`` lie, or .gz.

    Returns:
        ``{"train": (images, labels), "test": (images, labels)}``; images ``(N, H, W)`` uint8, labels ``(N,)`` int64.

    Raises:
        ValueError: a file is missing, damaged, or does not fit its companion.
    """
    stems = {(part, what): f"{PARTS[part]}-{FILES[what]}" for part in PARTS for what in FILES}
    paths = {key: find(folder, stem) for key, stem in stems.items()}
    if missing := [stems[key] for key, path in paths.items() if path is None]:
        here = "in" if Path(folder).is_dir() else "there is no folder"
        raise ValueError(f"folder: {here} {str(folder)!r}{' are no' if here == 'in' else ', for'} {', '.join(missing)}")
    read = {key: read_idx(path) for key, path in paths.items() if path}
    for part in PARTS:
        images, labels = (read[part, what] for what in FILES)
        if images.dtype != torch.uint8 or images.dim() != 3 or labels.dim() != 1 or not 0 < len(images) == len(labels):
            shapes = f"{images.dtype} {tuple(images.shape)} images, {tuple(labels.shape)} labels"
            raise ValueError(f"{paths[part, 'images']}: needs as many labels as uint8 images (N, H, W), got {shapes}")
    return {part: (read[part, "images"], read[part, "labels"].long()) for part in PARTS}
