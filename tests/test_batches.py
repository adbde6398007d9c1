"""Which pictures a step sees: each once in a pass, as a function of (seed, step, place) and of nothing else."""

import math

import numpy as np
import pytest
import torch

from training.data.batches import Batches

CPU = torch.device("cpu")


def numbered(number, height=2, width=4, dtype=np.uint8):
    """Pictures of which picture i has the value i everywhere."""
    return np.broadcast_to(np.arange(number, dtype=dtype)[:, None, None, None], (number, 1, height, width)).copy()


def make(images, batch_size=4, seed=0, random_flip=False):
    return Batches(images, batch_size=batch_size, seed=seed, random_flip=random_flip, device=CPU)


def seen(batches, steps, batch_size):
    return np.concatenate([batches.indices(step, torch.arange(batch_size)) for step in range(steps)])


@pytest.mark.parametrize(
    ("number", "batch_size"),
    [(12, 4), (10, 4), (7, 3), (5, 12), (1, 2), (64, 64)],  # fitting, straddling, larger than a pass, ...
)
def test_every_pass_is_a_permutation_of_its_own(number, batch_size):
    passes = 6
    row = seen(make(numbered(number), batch_size), -(-passes * number // batch_size), batch_size)
    orders = row[: passes * number].reshape(passes, number)
    for order in orders:
        assert sorted(order) == list(range(number))
    if number >= 10:  # of 10! orders none comes twice by chance
        assert len({tuple(order) for order in orders}) == passes


def test_only_the_rows_that_are_given_are_seen():
    rows = np.array([1, 4, 5, 9, 11])
    batches = Batches(numbered(12), train_indices=rows, batch_size=5, seed=0, random_flip=False, device=CPU)
    for step in range(3):
        assert sorted(batches.indices(step, torch.arange(5))) == rows.tolist()
    values = (batches.images(0, torch.arange(5))[:, 0, 0, 0] + 1) * 127.5
    assert values.round().long().tolist() == batches.indices(0, torch.arange(5)).tolist()


def test_order_is_random():
    """In shuffled passes of 200 pictures the place of a picture says nothing about its number, nor the next pass."""
    batches = make(numbered(200), 200)
    passes = np.array([batches.indices(step, torch.arange(200)) for step in range(50)])
    limit = 4.5 / math.sqrt(200)  # of 50 correlations of 200 pairs each
    for first, second in zip(passes, passes[1:]):
        assert abs(np.corrcoef(first, np.arange(200))[0, 1]) < limit
        assert abs(np.corrcoef(first.argsort(), second.argsort())[0, 1]) < limit
    # Mean place of each picture: 99.5, with standard error 57.7 / sqrt(50).
    assert abs(passes.argsort(axis=1).mean(axis=0) - 99.5).max() < 4.5 * 57.7 / math.sqrt(50)


def test_it_is_a_pure_function_of_seed_step_and_place():
    images = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 4), dtype=np.uint8)
    options = {"batch_size": 4, "seed": 5, "random_flip": True}
    whole = [make(images, **options).images(step, torch.arange(4)) for step in range(20)]
    batches = make(images, **options)
    for step in (19, 3, 0, 7, 7, 12, 2):  # in any order, as after an interruption
        assert torch.equal(batches.images(step, torch.arange(4)), whole[step])
        backwards = batches.images(step, torch.tensor([3, 2, 1, 0]))
        assert torch.equal(backwards.flip(0), whole[step])
    other = make(images, **options | {"seed": 6})
    assert not all(torch.equal(other.images(step, torch.arange(4)), whole[step]) for step in range(20))


def test_processes_and_forward_passes_share_a_batch_without_rest():
    images = np.random.default_rng(0).integers(0, 256, (11, 1, 4, 4), dtype=np.uint8)
    for step in range(8):  # the batch of 12 has parts of two passes or three
        whole = make(images, 12, random_flip=True).images(step, torch.arange(12))
        for size in (1, 3, 6):
            processes = [make(images, 12, random_flip=True) for _ in range(12 // size)]
            parts = [process.images(step, place) for process, place in zip(processes, torch.arange(12).split(size))]
            assert torch.equal(torch.cat(parts), whole)


def test_half_of_the_pictures_are_mirrored_and_exactly():
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 5, 7), dtype=np.uint8)
    number, steps = 100, 40
    plain, flipping = make(images, number), make(images, number, random_flip=True)
    mirrored = []
    for step in range(steps):
        asis, flipped = (batches.images(step, torch.arange(number)) for batches in (plain, flipping))
        same, turned = (
            torch.tensor([torch.equal(a, b) for a, b in zip(flipped, other)]) for other in (asis, asis.flip(-1))
        )
        assert (same ^ turned).all()
        mirrored.append(turned)
    mirrored = torch.stack(mirrored).double()
    # 4000 of them: the share has standard error 0.5 / sqrt(4000), that of one place or one step a larger one.
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / math.sqrt(number * steps)
    assert abs(mirrored.mean(0) - 0.5).max() < 4.5 * 0.5 / math.sqrt(steps)
    assert abs(mirrored.mean(1) - 0.5).max() < 4.5 * 0.5 / math.sqrt(number)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pixels_are_scaled_to_minus_one_and_one(dtype):
    most = np.iinfo(dtype).max
    values = np.linspace(0, most, 256).round().astype(dtype)
    images = np.stack([values, values[::-1]]).reshape(2, 1, 16, 16)
    batches = make(images, 2)
    found = batches.images(0, torch.arange(2))
    assert (found.dtype, found.shape) == (torch.float32, (2, 1, 16, 16))
    expected = images[batches.indices(0, torch.arange(2))] / most * 2 - 1
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-7, rtol=0)
    assert (found.min().item(), found.max().item()) == (-1, 1)


def test_a_memory_mapped_file_is_read_and_not_written(tmp_path):
    images = numbered(6, dtype=np.uint16)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    batches = make(mapped, 6)
    batches.images(0, torch.arange(6)).zero_()
    np.testing.assert_array_equal(mapped, images)
    assert torch.equal(batches.images(0, torch.arange(6)), make(images, 6).images(0, torch.arange(6)))
