"""The cache knows images by their content; a full or read-only disk, and what killed processes leave."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_pipeline.tensor_cache import save_tensors
from tests.arrays import random_images
from tests.data.image_files import cell, write_parquet
from training import cache as command
from training.data import content, disk, sources
from training.data.cache import load_images

ROOT = Path(__file__).parents[2]


def bmp(path, value):
    """A file whose size and times do not depend on its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)
    os.utime(path, (10**9, 10**9))


def test_folders_with_equal_names_sizes_and_times_are_two(tmp_path, load):
    for name, value in (("cats", 100), ("dogs", 200), ("other/cats", 150)):
        bmp(tmp_path / name / "1.bmp", value)
        data = load(train_data_dir=tmp_path / name)
        assert data.images.max() == value and f"folder {name.split('/')[-1]}" in data.source


def test_pixels_changed_in_place_with_their_times_kept(folder, load, monkeypatch):
    monkeypatch.setattr(content, "FINE_TICK", 0)
    monkeypatch.setattr(content, "COARSE_TICK", 0)
    for value in (100, 200):
        bmp(folder / "1.bmp", value)
        time.sleep(0.05)  # longer than the clock's granularity, which is 3 s where it is not known
        assert [load().images.max() for _ in range(2)] == [value, value]


def test_a_change_within_the_granularity_of_the_clock_is_seen(folder, load, monkeypatch):
    """As if ctime and inode said nothing."""
    later = 4 * 10**18
    monkeypatch.setattr("training.data.folder.stat_of", lambda stat: (stat.st_size, later, later, 0, 0))
    for value in (100, 200):
        bmp(folder / "1.bmp", value)
        assert load().images.max() == value


def test_files_with_whole_seconds_are_settled_later():
    now = 2 * 10**18
    assert content._is_settled((1, now - 10**9 + 1, now - 10**9 + 1), now)
    assert not content._is_settled((1, now - 10**9, now - 10**9 + 1), now)
    assert content._is_settled((1, now - 4 * 10**9, now - 4 * 10**9), now)
    assert not content._is_settled((1, 10**18 + 1, now - 1), now)


def test_unchanged_files_are_not_read_again(folder, load, monkeypatch):
    monkeypatch.setattr(content, "FINE_TICK", 0)
    monkeypatch.setattr(content, "COARSE_TICK", 0)
    bmp(folder / "1.bmp", 100)
    time.sleep(0.05)
    load()
    monkeypatch.setattr(content, "hash_file", lambda *_: pytest.fail("read again"))
    assert len(load()) == 1


def test_parquet_files_with_equal_sizes_and_times(folder, load):
    file = folder / "data" / "train-00000-of-00001.parquet"
    for value in (100, 200):
        write_parquet(file, photo=[cell(np.full((8, 8), value, np.uint8))])
        os.utime(file, (10**9, 10**9))
        assert load(dataset_name=str(folder)).images.max() == value


def test_a_large_file_is_known_by_its_ends_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "WHOLE", 1000)
    monkeypatch.setattr(content, "ENDS", 100)
    monkeypatch.setattr(content, "SAMPLE", 20)
    data = bytearray(5000)
    hashes = set()
    for place in (None, 0, 99, 100, 4826, 4900, 4999):
        changed = data.copy()
        if place is not None:
            changed[place] = 1
        (tmp_path / "x").write_bytes(changed)
        hashes.add(content.hash_file(tmp_path / "x", 5000))
    assert len(hashes) == 7


def test_the_key_of_a_hub_data_set_has_its_commit(load, monkeypatch, tmp_path):
    keys = set()
    for commit in ("aaaa", "bbbb", "bbbb"):
        monkeypatch.setattr(sources, "hub_commit", lambda *_, commit=commit: commit)
        source = sources.hub_dataset("user/cats", None, "train", index_dir=tmp_path)
        keys.add(str(source.identity))
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([[1, 2], [1], [1, 2]], [0, 1, 0]),
        ([b"x", b"y", b"x"], [0, 1, 0]),
        ([None, 3, None], [1, 0, 1]),
        ([float("nan"), 2.0, float("nan")], [1, 0, 1]),
        ([10, 9, 10], [1, 0, 1]),
        (["", None, "a"], [1, 1, 0]),
    ],
)
def test_labels_of_any_type(folder, load, values, labels):
    rows = [cell(random_images(8, 8, 3, seed=i)) for i in range(3)]
    write_parquet(folder / "train.parquet", photo=rows, label=values)
    assert load(dataset_name=str(folder)).labels().tolist() == labels


def test_dates_as_labels(folder, load):
    import datetime

    rows = [cell(random_images(8, 8, 3, seed=i)) for i in range(2)]
    write_parquet(folder / "train.parquet", photo=rows, label=[datetime.date(2022, 1, 2), datetime.date(2021, 1, 1)])
    assert load(dataset_name=str(folder)).labels().tolist() == [1, 0]


def test_the_column_of_the_images_is_chosen(folder, load):
    a, b = ([cell(np.full((8, 8), value, np.uint8))] for value in (100, 200))
    write_parquet(folder / "train.parquet", a=a, b=b, text=["x"])
    assert load(dataset_name=str(folder), image_column="b").images.max() == 200
    assert load(dataset_name=str(folder), image_column="a").images.max() == 100
    with pytest.raises(ValueError, match="image_column is 'text': give a, b"):
        load(dataset_name=str(folder), image_column="text")


def test_a_parquet_link_that_leads_nowhere_is_one_error(folder, load):
    (folder / "a.parquet").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"links that lead nowhere: a\.parquet"):
        load(dataset_name=str(folder))


def test_a_loading_script_beside_parquet_is_one_error(folder, load):
    write_parquet(folder / "train.parquet", photo=[cell(random_images(8, 8, 3))])
    (folder / f"{folder.name}.py").write_text("raise SystemExit(3)")
    with pytest.raises(ValueError, match="remove the loading script"):
        load(dataset_name=str(folder))


# ---- The disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_named(folder, load, cache_dir, monkeypatch, number):
    bmp(folder / "1.bmp", 100)

    def refuse(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk, "flush_to_disk", refuse)
    with pytest.raises(disk.CacheError, match=f"cache_dir is '{cache_dir}'.*give another --cache_dir"):
        load()


def test_too_little_room_is_said_before_decoding(folder, load, monkeypatch):
    bmp(folder / "1.bmp", 100)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 63)
    with pytest.raises(disk.CacheError, match=r"need 64 bytes, 63 are free.*--cache_dir"):
        load()


def test_a_cache_dir_that_is_a_file(folder, load, cache_dir):
    bmp(folder / "1.bmp", 100)
    cache_dir.write_text("x")
    with pytest.raises(ValueError, match=r"cache_dir is .*--cache_dir"):
        load()


def test_a_cache_dir_that_cannot_be_made(folder):
    bmp(folder / "1.bmp", 100)
    with pytest.raises(disk.CacheError, match=r"cache_dir is '/proc/nowhere/x'.*--cache_dir"):
        load_images(train_data_dir=folder, cache_dir="/proc/nowhere/x")


def test_features_that_cannot_be_kept_are_not_lost(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.warns(UserWarning, match=r"cannot be written.*needs 24 bytes.*--cache_dir"):
        save_tensors(tmp_path / "file" / "features-1.safetensors", {"features": torch.zeros(2, 3)})


KILLED = """
import os, sys
from training.data import cache
cache.needs_space = lambda *_: os.kill(os.getpid(), 9) if sys.argv[3] == "kill" else input()
cache.load_images(train_data_dir=sys.argv[1], cache_dir=sys.argv[2])
"""


def test_what_a_killed_process_leaves_is_removed_and_a_living_one_is_spared(folder, load, cache_dir):
    bmp(folder / "1.bmp", 100)
    line = [sys.executable, "-c", KILLED, str(folder), str(cache_dir)]
    subprocess.run([*line, "kill"], cwd=ROOT, stderr=subprocess.DEVNULL)
    assert len(list(cache_dir.glob(".*-*"))) == 1
    load()
    assert not list(cache_dir.glob(".*-*"))
    for path in disk.list_caches(cache_dir):
        disk.delete_cache(cache_dir, path[0])
    living = subprocess.Popen([*line, "wait"], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not list(cache_dir.glob(".*-*/new/..")) and living.poll() is None:
        time.sleep(0.05)
    time.sleep(0.2)
    load()
    assert len(list(cache_dir.glob(".*-*"))) == 1
    living.communicate(b"\n")
    assert living.returncode == 0


def test_the_command_lists_and_deletes(folder, load, cache_dir, capsys):
    bmp(folder / "1.bmp", 100)
    load()
    load(resolution=4)
    assert command.main(["--cache_dir", str(cache_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("1 images of folder photos" in line for line in lines)
    assert command.main(["--cache_dir", str(cache_dir), "--delete", "nothing"]) == 2
    assert "delete is 'nothing'" in capsys.readouterr().err
    assert command.main(["--cache_dir", str(cache_dir), "--delete", lines[0].split()[0]]) == 0
    assert len(disk.list_caches(cache_dir)) == 1
    assert command.main(["--cache_dir", str(cache_dir), "--delete", "all"]) == 0
    assert not disk.list_caches(cache_dir)
