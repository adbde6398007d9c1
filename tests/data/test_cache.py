"""The cache of decoded images: what its key depends on, and that it is complete or absent."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.arrays import random_images, save_images
from training.data import cache, disk
from training.data.cache import load_images

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "moons", "train_data_dir": "x"}, "give one of them"),
        ({"train_data_dir": None}, "give one of them"),
        ({"on_bad_image": "ignore"}, "on_bad_image is 'ignore'"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"resolution": 0}, "resolution is 0"),
        ({"resolution": True}, "resolution is True"),
        ({"resolution": (8, 8.0)}, "resolution is"),
        ({"resolution": "8x"}, "resolution is '8x'"),
        ({"background": "whitish"}, "background is 'whitish'"),
        ({"background": "#ffffff80"}, "without transparency"),
        ({"background": 3}, "background is 3"),
        ({"dataset_name": "moons", "split": "valid"}, "split is .valid.: give train or test"),
        ({"split": None}, "split is None"),
        ({"dataset_name": "moons", "dataset_config_name": "full"}, "dataset_config_name is 'full'"),
    ],
)
def test_an_invalid_option_is_an_error_that_shows_its_value(load, options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)


def visible(cache_dir):
    """The data sets of a cache; hidden are its lock and its index."""
    return [path for path in cache_dir.iterdir() if not path.name.startswith(".")]


def test_the_key_depends_on_every_setting_and_every_file(folder, load, cache_dir):
    Image.fromarray(random_images(8, 8, 4)).save(folder / "a.png")

    def num_caches():
        return len(visible(cache_dir))

    load()
    variants = [{"resolution": 4}, {"resolution": (4, 8)}, {"center_crop": False}, {"background": "red"}]
    for n, options in enumerate([*variants, {"on_bad_image": "skip"}], start=2):
        load(**options)
        assert num_caches() == n
    load(background="#ffffff")  # white again
    load(num_workers=1)
    assert num_caches() == n
    os.utime(folder / "a.png", ns=(0, 0))  # the content is the same
    load()
    assert num_caches() == n
    (folder / "a.png").rename(folder / "b.png")
    load()
    assert num_caches() == n + 1


def test_keys_are_unchanged_so_that_caches_are_found(folder, load, cache_dir):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.save(folder / "a.npy", pixels * 4)
    load(resolution=(4, 8), center_crop=False, background="red", on_bad_image="skip", min_side=2)
    load(dataset_name="moons", split="test")
    assert {path.name for path in visible(cache_dir)} == {
        "5102b0498e772bc68d2278bcdae65322457a68b27ca2c5aefd5002447cfaac06",
        "e3c961cbb09f9724715a1f671e162f867e6316b3caf35784cb65d34e87784dc6",
    }


def test_a_cache_is_complete_or_absent(folder, load, cache_dir, monkeypatch):
    Image.fromarray(random_images(8, 8)).save(folder / "a.png")
    seen = []
    flush_to_disk = cache.flush_to_disk

    def spy(file):
        flush_to_disk(file)
        seen.extend(visible(cache_dir))
        raise KeyboardInterrupt

    for module in (cache, disk):
        monkeypatch.setattr(module, "flush_to_disk", spy)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert seen == visible(cache_dir) == [] and not list(cache_dir.glob(".????????????????-*"))
    for module in (cache, disk):
        monkeypatch.setattr(module, "flush_to_disk", flush_to_disk)
    load()
    (entry,) = visible(cache_dir)
    assert sorted(path.name for path in entry.iterdir()) == ["images.npy", "meta.json", "names.txt"]
    with open(entry / "images.npy", "r+b") as file:
        file.truncate(150)
    with pytest.raises(ValueError, match=r"damaged.*delete it"):
        load()


def test_two_concurrent_processes_leave_one_cache(folder, cache_dir):
    for i in range(40):
        Image.fromarray(random_images(32, 32, 3, seed=i)).save(folder / f"{i:02}.png")
    code = "import sys; from training.data.cache import load_images as load\n"
    code += "print(load(train_data_dir=sys.argv[1], cache_dir=sys.argv[2]).images.astype(int).sum())"
    line = [sys.executable, "-c", code, str(folder), str(cache_dir)]
    children = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    sums = [int(child.communicate()[0]) for child in children]
    assert sums == [sum(int(random_images(32, 32, 3, seed=i).astype(int).sum()) for i in range(40))] * 2
    assert len(visible(cache_dir)) == 1


def test_the_slower_of_two_processes_uses_the_cache_of_the_faster(folder, load, monkeypatch, cache_dir):
    Image.fromarray(random_images(8, 8)).save(folder / "a.png")
    write_decoded = cache.write_decoded
    faster = []

    def slow(*args):
        monkeypatch.setattr(cache, "write_decoded", write_decoded)
        faster.append(load().names_file.stat().st_ino)  # the other process finishes first
        return write_decoded(*args)

    monkeypatch.setattr(cache, "write_decoded", slow)
    data = load()
    np.testing.assert_array_equal(data.images[0, 0], random_images(8, 8))
    assert [data.names_file.stat().st_ino] == faster
    assert len(visible(cache_dir)) == 1


def test_worker_processes_decode_the_same_pixels(folder, tmp_path):
    for i in range(300):
        Image.fromarray(random_images(8, 9, 3, seed=i)).save(folder / f"{i:03}.png")
    one, two = (load_images(train_data_dir=folder, cache_dir=tmp_path / str(n), num_workers=n) for n in (0, 2))
    np.testing.assert_array_equal(one.images, two.images)
    assert one.source == two.source


# ---- The digest ------------------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_the_pixels_alone(tmp_path):
    """Not of names or folders."""
    first = load_images(train_data_dir=save_images(tmp_path / "a", 3, 8, 8), cache_dir=tmp_path / "cache")
    second = load_images(
        train_data_dir=save_images(tmp_path / "b", 3, 8, 8, name="other {}.png"), cache_dir=tmp_path / "cache"
    )
    assert first.digest == second.digest and len(first.digest) == 64
    save_images(tmp_path / "c", 3, 8, 8)
    Image.fromarray(random_images(8, 8, seed=9)).save(tmp_path / "c" / "1.png")
    assert load_images(train_data_dir=tmp_path / "c", cache_dir=tmp_path / "cache").digest != first.digest
