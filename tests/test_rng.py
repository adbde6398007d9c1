"""Random numbers against the published SplitMix64, their distributions, and each other."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ddpm_pipeline import rng

N = 200_000
LEAST_P = 1e-3  # seeds are fixed: a correct generator fails for one key in a thousand, and does not for these

# First outputs, as printed by the reference program of S. Vigna (prng.di.unimi.it/splitmix64.c).
PUBLISHED = {
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
}


def unsigned(numbers):
    return [number % 2**64 for number in numbers.tolist()]


def splitmix64(key, index):
    """SplitMix64 in Python integers, which do not overflow."""
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


@pytest.mark.parametrize("seed", PUBLISHED)
def test_bits_match_the_published_outputs(seed):
    expected = PUBLISHED[seed]
    assert unsigned(rng.bits(seed, torch.arange(len(expected)))) == expected


def test_bits_wrap_around_like_unsigned_64_bit_integers():
    indices = [0, 1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 2]
    for key in (0, 1, 2**63 - 1, 2**63, 2**64 - 1, rng.key(3, 1, 4)):
        assert unsigned(rng.bits(key, torch.tensor(indices))) == [splitmix64(key, i) for i in indices]


def test_a_key_depends_on_each_number_and_on_their_order():
    tuples = [(a, b, c) for a in (-1, 0, 1, 2) for b in range(10) for c in range(100)]
    tuples += [(2**63, 0, 0), (2**64 - 2, 0, 0), (0, 2**63, 0)]
    keys = [rng.key(*numbers) for numbers in tuples]
    assert all(0 <= key < 2**64 for key in keys)
    assert len(set(keys)) == len(keys)
    assert rng.key(-2, 5) == rng.key(2**64 - 2, 5)  # any int is allowed, and these two are equal in 64 bits


def test_stream_ids_differ_and_are_those_of_old_runs():
    """Never change these: an old run resumes with the same numbers."""
    ids = {stream.name: int(stream) for stream in rng.Stream}
    assert ids == {
        "MOON_PHASE": 0,
        "TIMESTEP": 1,
        "NOISE": 2,
        "SAMPLE_ORDER": 3,
        "FLIP": 4,
        "DROPOUT": 5,
        "INITIAL_WEIGHTS": 6,
        "BOUND_NOISE": 7,
        "BOUND_TIMESTEP": 8,
        "DEQUANTISATION": 9,
        "DIVERGENCE_PROBE": 10,
        "VALIDATION_NOISE": 11,
        "VALIDATION_TIMESTEP": 12,
        "MOON_TILT": 13,
        "LABEL_DROPOUT": 14,
        "VERTICAL_FLIP": 15,
        "QUARTER_TURN": 16,
        "TIMESTEP_SHIFT": 17,
        "TIMESTEP_LOG_SNR": 18,
        "NOISE_CANDIDATE": 19,
        "INPUT_PERTURBATION": 20,
        "SHARD_ORDER": 21,
        "TIMESTEP_KIND": 22,
    }
    assert len(set(ids.values())) == len(rng.Stream.__members__)  # an alias would be a member, but not in the iteration
    for stream in rng.Stream:
        assert rng.key(3, stream, 5) == rng.key(3, int(stream), 5)


def test_keys_are_those_of_old_runs():
    assert rng.key(0, 1, 0) == 0x7AB40E090F363A7D
    assert rng.key(7, 2, 500) == 0x6CAAF50F92491DB3


def test_each_bit_is_set_half_of_the_time():
    bits = rng.bits(rng.key(0, 1), torch.arange(N))
    for position in range(64):
        mean = (bits >> position & 1).double().mean().item()
        assert abs(mean - 0.5) < 4.5 * 0.5 / math.sqrt(N)  # 64 means within 4.5 standard errors


# ---- Distributions: Kolmogorov-Smirnov with n = 200,000 detects a gap of 0.0044 in the distribution function ---------


def test_uniform_is_uniform():
    values = rng.uniform(rng.key(0, 2), torch.arange(N))
    assert values.dtype == torch.float64
    assert values.min() >= 0 and values.max() < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > LEAST_P


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_integers_are_uniform(high):
    values = rng.integers(rng.key(0, 3), torch.arange(N), high)
    assert values.dtype == torch.int64
    counts = torch.bincount(values, minlength=high)
    assert len(counts) == high
    assert high == 1 or stats.chisquare(counts.numpy()).pvalue > LEAST_P


@pytest.mark.parametrize("shape", [(1,), (4,), (3, 5, 7)])
def test_normal_is_normal(shape):
    values = rng.normal(rng.key(0, 4, *shape), torch.arange(N // math.prod(shape)), shape)
    assert values.dtype == torch.float32
    assert values.shape[1:] == shape
    flat = values.double().flatten().numpy()
    assert stats.kstest(flat, "norm").pvalue > LEAST_P
    # The mean of x^4 of n normal numbers is 3 within sqrt(96 / n); n is 200,000.
    assert abs(np.mean(flat**4) - 3) < 4 * math.sqrt(96 / len(flat))


def test_both_halves_of_a_pair_are_normal_and_independent():
    first, second = rng.normal(rng.key(7), torch.arange(N), (2,)).double().T.numpy()
    for half in (first, second, (first + second) / math.sqrt(2), (first - second) / math.sqrt(2)):
        assert stats.kstest(half, "norm").pvalue > LEAST_P
    assert abs(correlation(first**2, second**2)) < 4 / math.sqrt(N)


def test_extreme_bits_give_finite_numbers_in_range(monkeypatch):
    extreme = torch.tensor([0, -1, 2**63 - 1, -(2**63), 2**32 - 1, -(2**32), 1, 2**32])
    monkeypatch.setattr(rng, "bits", lambda key, index: extreme.expand_as(index))
    index = torch.arange(8)
    uniform = rng.uniform(0, index)
    assert uniform.min() >= 0 and uniform.max() < 1
    for high in (1, 1000, 1023, 1024, 1025, 2**31, 2**40 + 1):
        integers = rng.integers(0, index, high)
        assert integers.min() >= 0 and integers.max() <= high - 1
    normal = rng.normal(0, index[:1], (16,))
    assert normal.isfinite().all()
    assert 6 < normal.abs().max() < 7  # sqrt(-2 log 2^-33) = 6.76 is the largest possible


# ---- Independence: correlations of n = 200,000 pairs are within 4.5 / sqrt(n), 4.5 standard errors -------------------


@pytest.mark.parametrize(
    ("name", "other_key", "other_index"),
    [
        ("next index", (5, 1, 10), 1),
        ("index + 32", (5, 1, 10), 32),
        ("next step", (5, 1, 11), 0),
        ("next stream id", (5, 2, 10), 0),
        ("next seed", (6, 1, 10), 0),
        ("stream id and step swapped", (5, 10, 1), 0),
        ("next step, previous index", (5, 1, 11), -1),
    ],
)
def test_streams_are_independent(name, other_key, other_index):
    index = torch.arange(1, N + 1)
    first = rng.uniform(rng.key(5, 1, 10), index).numpy()
    second = rng.uniform(rng.key(*other_key), index + other_index).numpy()
    assert stats.kstest((first + second) % 1, "uniform").pvalue > LEAST_P
    assert stats.kstest((first - second) % 1, "uniform").pvalue > LEAST_P
    for a, b in ((first, second), (np.cos(2 * np.pi * first), np.cos(2 * np.pi * second))):
        assert abs(correlation(a, b)) < 4.5 / math.sqrt(N)


def test_images_have_independent_noise():
    noise = rng.normal(rng.key(0, 2, 0), torch.arange(64), (1, 32, 32)).flatten(1).double()
    next_step = rng.normal(rng.key(0, 2, 1), torch.arange(64), (1, 32, 32)).flatten(1).double()
    vectors = torch.cat([noise, next_step])
    correlations = vectors @ vectors.T / 1024 - torch.eye(128)
    assert correlations.fill_diagonal_(0).abs().max() < 5.5 / math.sqrt(1024)  # 8128 of them, standard error 1 / 32


# ---- Pure functions of key and index ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5)])
def test_numbers_do_not_depend_on_the_batch(shape):
    key, index = rng.key(1, 2, 3), torch.arange(70)
    functions = {
        "bits": lambda i: rng.bits(key, i),
        "uniform": lambda i: rng.uniform(key, i),
        "integers": lambda i: rng.integers(key, i, 1000),
        "normal": lambda i: rng.normal(key, i, shape),
    }
    for name, function in functions.items():
        expected = function(index)
        for size in (1, 3, 32):
            assert torch.equal(torch.cat([function(part) for part in index.split(size)]), expected), name
        order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
        assert torch.equal(function(order), expected[order]), name
        assert torch.equal(function(index), expected), name


def test_indices_keep_their_shape():
    index = torch.arange(12).view(3, 4)
    for function in (rng.bits, rng.uniform):
        assert torch.equal(function(9, index), function(9, index.flatten()).view(3, 4))


def test_torchs_generator_and_autocast_have_no_effect():
    before = torch.get_rng_state()
    rng.normal(1, torch.arange(4), (3, 3))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rng.normal(1, torch.arange(4), (3, 3))
    assert torch.equal(inside, rng.normal(1, torch.arange(4), (3, 3)))
