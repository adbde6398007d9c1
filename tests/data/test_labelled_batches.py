"""Labels of batches: dropout for guidance, and classes drawn in balance. All of it functions of (seed, step, index)."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from training.data.batches import Batches, Labels, draws_per_epoch

CPU = torch.device("cpu")
COUNTS = (1, 4, 25, 100)  # images of each class
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))


def make(batch_size=16, seed=0, train_indices=None, **options):
    images = np.zeros((len(LABELS), 1, 2, 2), np.uint8)
    return Batches(
        images, train_indices=train_indices, batch_size=batch_size, seed=seed, random_flip=False,
        labels=Labels(LABELS, 4, **options), device=CPU,
    )  # fmt: skip


def sequence(batches, steps, batch_size):
    return np.concatenate([batches.indices(step, torch.arange(batch_size)) for step in range(steps)])


@pytest.mark.parametrize(
    ("balance", "draws"),
    [("none", COUNTS), ("sqrt", (7, 14, 36, 72)), ("equal", (32, 32, 32, 32))],  # 130 n^p / sum, p = 1, 1/2, 0
)
def test_classes_are_drawn_as_often_as_the_formula_says(balance, draws):
    assert draws_per_epoch(np.array(COUNTS), balance).tolist() == list(draws)
    assert draws_per_epoch(np.array([0, 3, 10**6]), balance)[0] == 0  # all its images are held out
    assert draws_per_epoch(np.array([1, 10**7]), balance).min() >= 1
    length = sum(draws)
    drawn = LABELS[sequence(make(length, balance=balance), 3, length)].reshape(3, length)
    for epoch in drawn:
        assert np.bincount(epoch, minlength=4).tolist() == list(draws)


@pytest.mark.parametrize("balance", ["none", "sqrt", "equal"])
def test_every_image_of_a_class_is_drawn_once_before_any_is_drawn_twice(balance):
    drawn = sequence(make(13, balance=balance), 200, 13)
    for label, count in enumerate(COUNTS):
        of_class = drawn[LABELS[drawn] == label]
        rounds = of_class[: len(of_class) // count * count].reshape(-1, count)
        assert len(rounds) > 5
        assert all(sorted(each) == np.flatnonzero(label == LABELS).tolist() for each in rounds)
        assert count < 10 or len({tuple(each) for each in rounds}) == len(rounds)  # each in another order


def test_balanced_classes_come_mixed():
    """In each half of an epoch of equal classes, a class is drawn 8 times of 16, give or take."""
    drawn = LABELS[sequence(make(128, balance="equal"), 40, 128)].reshape(40, 2, 64)
    halves = np.stack([(drawn == label).sum(axis=2) for label in range(4)])  # hypergeometric: 16 of 64, sd 2.46
    assert abs(halves[:, :, 0].mean(axis=1) - 16).max() < 4.5 * 2.46 / math.sqrt(40)
    assert halves.std() > 1.5


@pytest.mark.parametrize("balance", ["none", "sqrt", "equal"])
def test_labels_are_functions_of_seed_step_and_index(balance):
    """So a resumed run and 1, 2 or 4 processes with micro-batches of any size have the same batches."""
    options = {"balance": balance, "dropout": 0.3}
    whole = make(**options)
    steps = [0, 1, 7, 30, 31]
    expected = {step: (whole.indices(step, torch.arange(16)), whole.batch(step, torch.arange(16))[1]) for step in steps}
    for parts in (2, 4, 16):
        resumed = [make(**options) for _ in range(parts)]  # of processes that begin at step 30, out of order
        for step in (30, 7, 31, 0, 1):
            index = torch.arange(16).chunk(parts)
            labels = torch.cat([each.batch(step, part)[1] for each, part in zip(resumed, index)])
            indices = np.concatenate([each.indices(step, part) for each, part in zip(resumed, index)])
            assert torch.equal(labels, expected[step][1])
            assert indices.tolist() == expected[step][0].tolist()
    other = make(seed=1, **options)
    assert any(not torch.equal(other.batch(step, torch.arange(16))[1], expected[step][1]) for step in steps)


def test_a_label_is_that_of_its_image_or_dropped():
    """One of ten is the null class: of 16,000 labels 1600, with a standard error of 38; independent of the images."""
    batches, index = make(dropout=0.1), torch.arange(16)
    dropped = Counter()
    for step in range(1000):
        labels, expected = batches.batch(step, index)[1].numpy(), LABELS[batches.indices(step, index)]
        is_null = labels == 4
        assert (labels == expected)[~is_null].all()
        dropped.update(expected[is_null].tolist())
    assert abs(dropped.total() - 1600) < 4 * 38
    for label, count in enumerate(COUNTS):
        mean = 1600 * count / sum(COUNTS)
        assert abs(dropped[label] - mean) < 4.5 * math.sqrt(mean)
    assert not (make(dropout=0.0).batch(0, index)[1] == 4).any()
    assert make().batch(0, index)[1].dtype == torch.int64


def test_without_balance_the_order_is_that_of_images_without_labels():
    train_indices = np.arange(0, len(LABELS), 2)
    plain = Batches(np.zeros((len(LABELS), 1, 2, 2), np.uint8), train_indices=train_indices, batch_size=16, seed=0,
                    random_flip=False, device=CPU)  # fmt: skip
    assert plain.batch(0, torch.arange(16))[1] is None
    labelled = make(train_indices=train_indices)
    assert sequence(plain, 20, 16).tolist() == sequence(labelled, 20, 16).tolist()
    assert set(sequence(make(train_indices=train_indices, balance="equal"), 20, 16).tolist()) <= set(train_indices)
