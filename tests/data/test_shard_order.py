"""The order of streamed images: each once in an epoch, a few shards at a time, a function of seed and position."""

import numpy as np
import pytest
import torch

from training.data.batches import Batches
from training.data.shard_order import ShardOrder

COUNTS = [7, 3, 12, 5, 9, 1, 8]


def sequence(order, first, last):
    """The images at these positions of the sequence of all epochs."""
    epochs, within = np.divmod(np.arange(first, last), len(order.train_indices))
    return np.concatenate([order.indices(e, within[epochs == e]) for e in np.unique(epochs).tolist()])


def make(window=20, seed=0, counts=COUNTS, held_out=()):
    return ShardOrder(counts, np.setdiff1d(np.arange(sum(counts)), held_out), seed, window)


@pytest.mark.parametrize("window", [1, 20, 1000])
@pytest.mark.parametrize("held_out", [(), (0, 8, 9, 21, 37)])
def test_an_epoch_has_every_image_once_and_is_another_permutation(window, held_out):
    order = make(window, held_out=held_out)
    count = len(order.train_indices)
    orders = sequence(order, 0, 4 * count).reshape(4, count)
    for epoch in orders:
        assert sorted(epoch) == order.train_indices.tolist()
    assert len({tuple(epoch) for epoch in orders}) == 4


def test_the_images_of_a_group_are_those_of_its_shards():
    order = make()
    assert order.group_size == round(20 / (sum(COUNTS) / len(COUNTS)))
    assert make(window=1).group_size == 2
    shard_of = np.repeat(np.arange(len(COUNTS)), COUNTS)
    position = 0
    group = order.groups(0, 0)[0]
    for _ in range(2 * order.num_groups):
        shards = order.shards(group).tolist()
        count = sum(COUNTS[i] for i in shards)
        images = sequence(order, position, position + count)
        assert set(shard_of[images]) == set(shards)
        assert order.groups(position, position + count - 1) == [group]
        position += count
        group = order.after(group)
        assert order.groups(position - 1, position)[1] == group


def test_the_groups_of_epochs_are_others():
    order = make()
    first_groups = {tuple(sorted(order.shards(order.groups(45 * epoch, 45 * epoch)[0]))) for epoch in range(6)}
    assert len(first_groups) > 1


def test_shards_without_training_images_are_never_needed():
    order = make(held_out=range(7))  # all of the first
    assert all(0 not in order.shards(group) for group in order.groups(0, 200))


def test_any_part_of_the_sequence_can_be_asked_for_first():
    whole = sequence(make(), 0, 200)
    for first, last in ((150, 200), (44, 46), (0, 1), (89, 91), (17, 130)):
        assert (sequence(make(), first, last) == whole[first:last]).all()
    assert not (sequence(make(seed=1), 0, 45) == whole[:45]).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_processes_sees_the_same_batches(ranks):
    class Stream:
        order = make()

    def batches():
        return Batches(
            np.empty((45, 1, 1, 1), np.uint8), batch_size=8, seed=0, stream=Stream(), device=torch.device("cpu")
        )

    for step in (12, 3, 4, 5, 6):  # 5 ends in another epoch
        parts = [batches().indices(step, torch.arange(8)[rank::ranks]) for rank in range(ranks)]
        together = np.empty(8, np.int64)
        for rank, part in enumerate(parts):
            together[rank::ranks] = part
        assert (together == sequence(make(), 8 * step, 8 * step + 8)).all()


def test_images_are_shuffled_within_a_group():
    """Of a group of 2,000 images the position says nothing of the index: correlation 0 with standard error 0.022."""
    order = ShardOrder([500] * 4, np.arange(2000), 3)
    images = sequence(order, 0, 2000)
    assert abs(np.corrcoef(images, np.arange(2000))[0, 1]) < 0.1
