"""Which images a step sees: each once in an epoch, as a function of (seed, step, index in the global batch) alone."""

import math

import numpy as np
import pytest
import torch

from training.config import Config
from training.data.batches import Batches

CPU = torch.device("cpu")
ALL = {"random_flip": True, "random_vertical_flip": True, "random_rotate90": True}
SQUARE = np.arange(9, dtype=np.uint8).reshape(3, 3)  # all its symmetries differ


def numbered(count, height=2, width=4, dtype=np.uint8):
    """Images that show their own index: every pixel of image i is i."""
    return np.broadcast_to(np.arange(count, dtype=dtype)[:, None, None, None], (count, 1, height, width)).copy()


def make(images, batch_size=4, seed=0, **augmentations):
    return Batches(images, batch_size=batch_size, seed=seed, device=CPU, **augmentations)


def indices_of(batches, steps, batch_size):
    return np.concatenate([batches.indices(step, torch.arange(batch_size)) for step in range(steps)])


@pytest.mark.parametrize(
    ("count", "batch_size"),
    [(12, 4), (10, 4), (7, 3), (5, 12), (1, 2), (64, 64)],  # fitting, straddling, larger than an epoch, ...
)
def test_every_epoch_is_another_permutation(count, batch_size):
    epochs = 6
    sequence = indices_of(make(numbered(count), batch_size), -(-epochs * count // batch_size), batch_size)
    orders = sequence[: epochs * count].reshape(epochs, count)
    for order in orders:
        assert sorted(order) == list(range(count))
    if count >= 10:  # of 10! orders none comes twice by accident
        assert len({tuple(order) for order in orders}) == epochs


def test_only_the_train_indices_are_seen():
    train_indices = np.array([1, 4, 5, 9, 11])
    batches = Batches(numbered(12), train_indices=train_indices, batch_size=5, seed=0, device=CPU)
    for step in range(3):
        assert sorted(batches.indices(step, torch.arange(5))) == train_indices.tolist()
    values = (batches.batch(0, torch.arange(5))[0][:, 0, 0, 0] + 1) * 127.5
    assert values.round().long().tolist() == batches.indices(0, torch.arange(5)).tolist()


def test_the_order_is_random():
    """In shuffled epochs of 200 images the position of an image is independent of its index and of the next epoch."""
    batches = make(numbered(200), 200)
    epochs = np.array([batches.indices(step, torch.arange(200)) for step in range(50)])
    limit = 4.5 / math.sqrt(200)  # for 50 correlations of 200 pairs each
    for first, second in zip(epochs, epochs[1:]):
        assert abs(np.corrcoef(first, np.arange(200))[0, 1]) < limit
        assert abs(np.corrcoef(first.argsort(), second.argsort())[0, 1]) < limit
    # Mean position of each image: 99.5, with standard error 57.7 / sqrt(50).
    assert abs(epochs.argsort(axis=1).mean(axis=0) - 99.5).max() < 4.5 * 57.7 / math.sqrt(50)


def test_a_batch_is_a_pure_function_of_seed_step_and_index():
    images = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 4), dtype=np.uint8)
    options = {"batch_size": 4, "seed": 5, **ALL}
    expected = [make(images, **options).batch(step, torch.arange(4))[0] for step in range(20)]
    batches = make(images, **options)
    for step in (19, 3, 0, 7, 7, 12, 2):  # in any order, as after an interruption
        assert torch.equal(batches.batch(step, torch.arange(4))[0], expected[step])
        backwards = batches.batch(step, torch.tensor([3, 2, 1, 0]))[0]
        assert torch.equal(backwards.flip(0), expected[step])
    other = make(images, **options | {"seed": 6})
    assert not all(torch.equal(other.batch(step, torch.arange(4))[0], expected[step]) for step in range(20))


def test_ranks_and_forward_passes_partition_the_global_batch():
    images = np.random.default_rng(0).integers(0, 256, (11, 1, 4, 4), dtype=np.uint8)
    for step in range(8):  # a batch of 12 spans two epochs or three
        batch = make(images, 12, **ALL).batch(step, torch.arange(12))[0]
        for size in (1, 3, 6):
            ranks = [make(images, 12, **ALL) for _ in range(12 // size)]
            slices = [rank.batch(step, index)[0] for rank, index in zip(ranks, torch.arange(12).split(size))]
            assert torch.equal(torch.cat(slices), batch)


def test_half_of_the_images_are_mirrored_exactly():
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 5, 7), dtype=np.uint8)
    batch_size, steps = 100, 40
    without, with_flips = make(images, batch_size), make(images, batch_size, random_flip=True)
    mirrored = []
    for step in range(steps):
        plain, flipped = (batches.batch(step, torch.arange(batch_size))[0] for batches in (without, with_flips))
        is_plain, is_mirrored = (
            torch.tensor([torch.equal(a, b) for a, b in zip(flipped, other)]) for other in (plain, plain.flip(-1))
        )
        assert (is_plain ^ is_mirrored).all()
        mirrored.append(is_mirrored)
    mirrored = torch.stack(mirrored).double()
    # Ratio over 4000 flips: standard error 0.5 / sqrt(4000). That of one index or one step is larger.
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / math.sqrt(batch_size * steps)
    assert abs(mirrored.mean(0) - 0.5).max() < 4.5 * 0.5 / math.sqrt(steps)
    assert abs(mirrored.mean(1) - 0.5).max() < 4.5 * 0.5 / math.sqrt(batch_size)


def test_flips_are_those_of_old_runs():
    """Written down when there was no other augmentation: old runs resume with them. Others do not change them."""
    image = np.tile(np.array([[0, 1], [2, 3]], np.uint8), (12, 1, 1, 1))
    for options in ({}, {"random_vertical_flip": True}):
        batches = make(image, 12, seed=5, random_flip=True, **options)
        for step, mirrored in ((0, "011101010111"), (1, "010001000001"), (70, "111011100000")):
            x_0 = batches.batch(step, torch.arange(12))[0][:, 0]
            assert [str(int(is_mirrored)) for is_mirrored in x_0[:, 0, 0] > x_0[:, 0, 1]] == list(mirrored)


@pytest.mark.parametrize(
    ("augmentations", "number"),
    [
        (("random_vertical_flip",), 2),
        (("random_flip", "random_vertical_flip"), 4),
        (("random_rotate90",), 4),
        (("random_flip", "random_rotate90"), 8),
        (("random_vertical_flip", "random_rotate90"), 8),
        (tuple(ALL), 8),
    ],
)
def test_each_symmetry_of_a_square_is_as_frequent_as_it_should(augmentations, number):
    """The symmetries as numpy makes them: (mirrored, quarter turns). With turns one flip gives all eight, uniformly."""
    symmetries = {
        (m, turns): np.rot90(np.flip(SQUARE, 1) if m else SQUARE, turns) for m in (0, 1) for turns in range(4)
    }
    expected = {
        ("random_vertical_flip",): {(0, 0), (1, 2)},
        ("random_flip", "random_vertical_flip"): {(0, 0), (1, 0), (1, 2), (0, 2)},
        ("random_rotate90",): {(0, turns) for turns in range(4)},
    }.get(augmentations, set(symmetries))
    n, steps = 100, 40
    batches = make(np.tile(SQUARE, (n, 1, 1, 1)), n, **dict.fromkeys(augmentations, True))
    x_0 = torch.stack([batches.batch(step, torch.arange(n))[0] for step in range(steps)])
    pixels = ((x_0 + 1) * 127.5).round().numpy()[:, :, 0]
    found = {key: (pixels == image).all((2, 3)) for key, image in symmetries.items()}
    assert {key for key, where in found.items() if where.any()} == expected and len(expected) == number
    assert sum(where.sum() for where in found.values()) == n * steps
    p = 1 / number  # the ratios of all images, of a step and of an index are within 4.5 standard errors
    for where in (found[key] for key in expected):
        for axes, size in ((None, n * steps), (0, steps), (1, n)):
            assert abs(where.mean(axes) - p).max() < 4.5 * math.sqrt(p * (1 - p) / size)


def test_turned_images_give_the_turned_batches():
    """Quarter turns commute with one another, so turning the data set turns each batch, and nothing else changes."""
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 6, 6), dtype=np.uint8)
    turned = np.ascontiguousarray(np.rot90(images, axes=(2, 3)))
    for step in range(5):
        x_0, x_0_turned = (
            make(data, 12, random_rotate90=True).batch(step, torch.arange(12))[0].numpy() for data in (images, turned)
        )
        np.testing.assert_array_equal(x_0_turned, np.rot90(x_0, axes=(2, 3)))


def test_quarter_turns_need_square_images():
    for size in ((4, 6), (6, 4)):
        with pytest.raises(ValueError, match=f"images are {size[0]}x{size[1]} .*: give a square --resolution"):
            make(numbered(4, *size), random_rotate90=True)
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):  # before anything is decoded
            Config(dataset_name="moons", resolution=f"{size[0]}x{size[1]}", random_rotate90=True)
        make(numbered(4, *size), random_flip=True, random_vertical_flip=True).batch(0, torch.arange(4))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pixels_are_scaled_to_minus_one_and_one(dtype):
    white = np.iinfo(dtype).max
    values = np.linspace(0, white, 256).round().astype(dtype)
    images = np.stack([values, values[::-1]]).reshape(2, 1, 16, 16)
    batches = make(images, 2)
    x_0 = batches.batch(0, torch.arange(2))[0]
    assert (x_0.dtype, x_0.shape) == (torch.float32, (2, 1, 16, 16))
    expected = images[batches.indices(0, torch.arange(2))] / white * 2 - 1
    np.testing.assert_allclose(x_0.numpy(), expected, atol=2e-7, rtol=0)
    assert (x_0.min().item(), x_0.max().item()) == (-1, 1)


def test_a_memory_mapped_file_is_read_and_not_written(tmp_path):
    images = numbered(6, dtype=np.uint16)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    batches = make(mapped, 6)
    batches.batch(0, torch.arange(6))[0].zero_()
    np.testing.assert_array_equal(mapped, images)
    assert torch.equal(batches.batch(0, torch.arange(6))[0], make(images, 6).batch(0, torch.arange(6))[0])
