"""Images from shards: the pixels that Pillow and NumPy read, from any store, damaged or not, within a bound of disk."""

import errno
import hashlib
import json
import math
import tarfile
import threading
import time

import fsspec
import numpy as np
import pytest
import torch
from filelock import FileLock

from tests.data.shard_files import add, as_arrays, png_of, serving, write_packed, write_tables, write_tars
from training.data import stores, streaming
from training.data.shard_cache import ShardCache
from training.data.shard_order import ShardOrder
from training.data.shard_stream import ShardStream
from training.data.stores import ShardError
from training.data.streaming import load_streamed_split

COUNTS = [7, 5, 9, 6]
WRITERS = {"parquet": write_tables, "webdataset": write_tars, "packed": write_packed}


@pytest.fixture
def log():
    return []


@pytest.fixture
def load(tmp_path, log, monkeypatch):
    monkeypatch.setattr(stores, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(stores, "PATIENCE", 1.0)

    def load(place, validation_split="none", **options):
        options = {"cache_dir": tmp_path / "cache"} | options
        return load_streamed_split(validation_split, dataset_name=str(place), log=log.append, **options)

    return load


def all_images(split):
    return split.data.images[np.arange(len(split.data))]


def stream_of(split, batch_size=4, seed=0, window=12, **options):
    images = split.data.images
    return ShardStream(images, ShardOrder(images.counts, split.train_indices, seed, window), batch_size, **options)


# ---- What is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_pixels_and_labels_are_those_of_the_files(tmp_path, load, kind):
    WRITERS[kind](tmp_path / "set", COUNTS)
    split = load(tmp_path / "set")
    assert (split.data.found.kind, len(split.data)) == (kind, 27)
    assert (all_images(split) == as_arrays(range(27))).all()
    assert split.data.labels().tolist() == [i % 3 for i in range(27)]
    assert split.data.class_names() == ("0", "1", "2")
    assert split.data.source.startswith("27 images of data set set, split train; 4 shards")
    assert "row 4" in split.data.name(11)


@pytest.mark.parametrize("kind", WRITERS)
def test_images_come_over_http(tmp_path, load, kind):
    WRITERS[kind](tmp_path / "set", COUNTS)
    pattern = {"parquet": "train-{00000..00003}-of-00004.parquet", "webdataset": "{000..003}.tar", "packed": ""}[kind]
    with serving(tmp_path / "set") as server:
        split = load(f"{server.url}/{pattern}")
        assert (all_images(split) == as_arrays(range(27))).all()
        assert split.data.labels().tolist() == [i % 3 for i in range(27)]
        server.requests.clear()
        again = load(f"{server.url}/{pattern}")
        assert (all_images(again) == as_arrays(range(27))).all()
        assert not any(path.endswith((".tar", "-00003.npy")) for path in server.requests)
        assert again.data.digest == split.data.digest
    if kind == "packed":  # all of its content is in the manifest; the others have a time of another file
        assert load(tmp_path / "set").data.digest == split.data.digest


def test_images_come_from_any_store_of_fsspec(tmp_path, load):
    write_tables(tmp_path / "set", COUNTS)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "set"), "/bucket/set", recursive=True)
    split = load("memory://bucket/set")
    assert (all_images(split) == as_arrays(range(27))).all()
    assert split.data.labels().tolist() == [i % 3 for i in range(27)]


def test_an_index_lists_tar_files(tmp_path, load):
    write_tars(tmp_path / "set", [3, 4])
    index = {"shardlist": [{"url": "000.tar", "nsamples": 3}, {"url": "001.tar", "nsamples": 4}]}
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    with serving(tmp_path / "set") as server:
        assert (all_images(load(server.url)) == as_arrays(range(7))).all()
        assert (all_images(load(f"{server.url}/index.json")) == as_arrays(range(7))).all()


def test_images_of_other_sizes_get_that_of_most(tmp_path, load):
    write_tables(tmp_path / "set", [4, 4], side=8)
    write_tables(tmp_path / "other", [4], side=20)
    (tmp_path / "other" / "train-00000-of-00001.parquet").rename(tmp_path / "set" / "train-00009.parquet")
    split = load(tmp_path / "set")
    assert split.data.images.shape == (12, 3, 8, 8)
    assert load(tmp_path / "set", resolution=16).data.images.shape == (12, 3, 16, 16)


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [
        ("nowhere", {}, "no shards in"),
        ("empty", {}, "there are no shards in"),
        ("set/a-{3..1}.tar", {}, r"\{3..1\} counts down"),
        ("set/a-{1..3}.tar", {}, "a-1.tar cannot be read: No such file"),
        ("set", {"split": "test"}, "split is 'test': give train"),
        ("set", {"validation_split": "test"}, "validation_split is 'test'"),
        ("set", {"resolution": 16}, "resolution is 16x16 and the images are packed at 8x8"),
        ("set", {"size_rule": 32}, "pack them with --resolution 32x32"),
        ("ftp2://host/set", {}, "cannot be read"),
        ("http://127.0.0.1:9/set", {}, "cannot be read, tried for"),
    ],
)
def test_mistakes_are_named(tmp_path, load, monkeypatch, place, options, message):
    monkeypatch.chdir(tmp_path)
    write_packed(tmp_path / "set", [5])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=message):
        load(place, **options)


# ---- Held-out images -------------------------------------------------------------------------------------------------


def test_a_split_is_held_out(tmp_path, load):
    write_tables(tmp_path / "set", COUNTS)
    write_tables(tmp_path / "set", [3, 2], split="test")
    split = load(tmp_path / "set", None)
    assert len(split.train_indices) == 27 and split.data.splits == ("test", "train")
    assert (np.asarray(split.held_out) == as_arrays(range(5))).all()
    assert split.held_out_set.label_names() == [str(i % 3) for i in range(5)]


def test_without_a_split_some_images_of_some_shards_are_held_out(tmp_path, load, monkeypatch):
    monkeypatch.setattr(streaming, "HELD_OUT_SHARDS", 2)
    write_packed(tmp_path / "set", [20] * 6)
    split = load(tmp_path / "set", None)
    held_out = np.setdiff1d(np.arange(120), split.train_indices)
    assert len(held_out) == 6 and set(held_out // 20) == {0, 3}
    assert (np.asarray(split.held_out) == as_arrays(held_out)).all()
    assert split.held_out_set.label_names() == [str(i % 3) for i in held_out]
    order = ShardOrder([20] * 6, split.train_indices, 0)
    assert sorted(order.indices(0, np.arange(114))) == split.train_indices.tolist()


def test_a_sample_stands_for_all(tmp_path, load, monkeypatch):
    monkeypatch.setattr(streaming, "SAMPLE", 30)
    monkeypatch.setattr(streaming, "SAMPLE_SHARDS", 2)
    write_packed(tmp_path / "set", [20] * 6)
    split = load(tmp_path / "set", None)
    sample = split.in_memory()
    assert len(sample.train_images) == 30 and sample.num_train_images == 114
    numbers = {as_arrays([i]).tobytes(): i for i in range(120)}
    chosen = [numbers[image.tobytes()] for image in sample.train_images]
    assert set(chosen) <= set(split.train_indices.tolist())
    assert sample.train_labels().tolist() == [i % 3 for i in chosen]


# ---- Damaged shards and unreadable images ----------------------------------------------------------------------------


def test_the_next_good_image_of_its_shard_takes_the_place_of_a_bad_one(tmp_path, load, log):
    write_tars(tmp_path / "set", [4])
    with open(tmp_path / "set" / "001.tar", "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
        for i, content in enumerate([b"no image", png_of(4), png_of(5)[:60], b"", png_of(6)]):
            add(archive, f"b{i}.png", content)
            add(archive, f"b{i}.cls", b"1")
    split = load(tmp_path / "set")
    stream = stream_of(split)
    assert stream.readable(np.arange(9)).tolist() == [0, 1, 2, 3, 5, 5, 8, 8, 8]
    (line,) = log
    assert "3 of 5 images of 001.tar" in line and "b0.png: not an image in a known format" in line
    assert "b2.png" in line and "b3.png: empty" in line
    stream.close()
    trained_on = np.array([0, 1, 2, 3, 4, 6, 7, 8])  # 5 is held out
    stream = ShardStream(split.data.images, ShardOrder([4, 5], trained_on, 0), 4)
    assert stream.readable(trained_on).tolist() == [0, 1, 2, 3, 8, 8, 8, 8]
    stream.close()


def test_a_shard_without_a_good_image_is_an_error(tmp_path, load):
    write_tars(tmp_path / "set", [4])
    with tarfile.open(tmp_path / "set" / "001.tar", "w") as archive:
        add(archive, "b.png", b"no image")
    stream = stream_of(load(tmp_path / "set"))
    with pytest.raises(ShardError, match=r"no image of 001.tar can be read \(b.png: not an image"):
        [stream.wait(step) for step in range(2)]
    stream.close()


def cut_off(path, size=None):
    content = path.read_bytes()
    path.write_bytes(content[: size or len(content) * 2 // 3])


def test_what_can_be_read_of_a_truncated_shard_is_used(tmp_path, load, log):
    write_tars(tmp_path / "tars", [4, 6])
    cut_off(tmp_path / "tars" / "001.tar", 3 * 2048 + 600)  # in the fourth image, of six
    split = load(tmp_path / "tars")
    assert len(split.data) == 8
    assert (
        "1 tar files are damaged or have more after their end, what can be read of them is used: 001.tar"
        in split.data.source
    )
    stream = stream_of(split)
    assert stream.readable(np.arange(8)).tolist() == [0, 1, 2, 3, 4, 5, 6, 4]
    assert (split.data.images[np.arange(7)] == as_arrays(range(7))).all()
    assert "1 of 4 images of 001.tar" in log[-1] and "000007.png: unexpected end of data" in log[-1]
    stream.close()

    write_packed(tmp_path / "packed", [4, 6])
    path = tmp_path / "packed" / "train-00001.npy"
    cut_off(path, path.stat().st_size - 2 * 3 * 64 - 1)  # three images
    split = load(tmp_path / "packed")
    stream = stream_of(split)
    assert stream.readable(np.arange(10)).tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 4, 4]
    assert (split.data.images[np.arange(7)] == as_arrays(range(7))).all()
    assert "3 of 6 images of train-00001.npy" in log[-1]
    stream.close()

    write_tables(tmp_path / "tables", [4, 6, 5])
    cut_off(next((tmp_path / "tables").glob("*-00001-*")))
    split = load(tmp_path / "tables")  # its table of contents is lost
    assert len(split.data) == 9 and "1 damaged shards left out: train-00001-of-00003.parquet" in split.data.source


def test_images_that_are_lost_after_the_shards_were_counted_are_unreadable(tmp_path, load, log):
    write_tars(tmp_path / "tars", [4, 6])
    split = load(tmp_path / "tars")
    cut_off(tmp_path / "tars" / "001.tar", 3 * 2048 + 600)  # in the fourth image, of six
    stream = stream_of(split)
    assert stream.readable(np.arange(10)).tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 4, 4]
    assert (split.data.images[np.arange(7)] == as_arrays(range(7))).all()
    stream.close()
    assert "3 of 6 images of 001.tar" in log[0] and "row 4: unexpected end of data" in log[0]


@pytest.mark.parametrize("blocks", range(13))
def test_a_tar_file_that_is_cut_anywhere_is_named(tmp_path, load, blocks):
    """Three images and labels of one block and its header each, and two blocks of zeros at the end."""
    write_tars(tmp_path / "set", [2, 3])
    path = tmp_path / "set" / "001.tar"
    assert path.read_bytes()[12 * 512 :] == bytes(path.stat().st_size - 12 * 512)
    assert "damaged" not in load(tmp_path / "set").data.source
    path.write_bytes(path.read_bytes()[: 512 * blocks])
    assert "1 tar files are damaged" in load(tmp_path / "set").data.source
    path.write_bytes(path.read_bytes() + bytes(100))
    assert "1 tar files are damaged" in load(tmp_path / "set").data.source


def test_a_packed_shard_with_other_pixels_is_refused(tmp_path, load):
    write_packed(tmp_path / "set", [4, 6])
    path = tmp_path / "set" / "train-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with (
        serving(tmp_path / "set") as server,
        pytest.raises(ShardError, match=r"train-00001.npy is damaged: its sha256"),
    ):
        load(server.url).data.images[np.arange(10)]


@pytest.mark.parametrize("change", ["longer", "of another kind"])
def test_a_packed_shard_that_is_another_file_is_refused(tmp_path, load, change):
    write_packed(tmp_path / "set", [4, 6])
    path, manifest = tmp_path / "set" / "train-00001.npy", tmp_path / "set" / "manifest.json"
    if change == "longer":
        path.write_bytes(bytes(path.stat().st_size) + b"x")
    else:
        np.save(path, np.ones((6, 3, 8, 8), np.uint16))
        entries = json.loads(manifest.read_text())
        entries["splits"]["train"]["shards"][1] |= {
            "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
        }  # fmt: skip
        manifest.write_text(json.dumps(entries))
    with (
        serving(tmp_path / "set") as server,
        pytest.raises(ShardError, match=r"train-00001.npy is damaged: it(s sha256| has .* uint16)"),
    ):
        load(server.url).data.images[np.arange(10)]


def test_names_of_any_letters_are_read(tmp_path, load):
    write_tars(tmp_path / "set", [4, 6])
    for name in ("a b", "#", "\u6708"):
        folder = tmp_path / "web" / name
        folder.mkdir(parents=True)
        for path in (tmp_path / "set").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    with serving(tmp_path / "web") as server:
        for name in ("a b", "a%20b", "#", "\u6708"):
            assert (all_images(load(f"{server.url}/{name}/{{000..001}}.tar")) == as_arrays(range(10))).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "<html>", r"manifest.json is damaged: Expecting value"),
        ("manifest.json", "[1]", r"manifest.json is damaged"),
        ("index.json", "{}", r"index.json has no \{\"shardlist\""),
    ],
)
def test_lists_that_are_damaged_are_named(tmp_path, load, name, content, message):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text(content)
    with serving(tmp_path / "set") as server, pytest.raises(ShardError, match=message):
        load(f"{server.url}/{name}")


def test_a_table_names_no_files_of_this_machine(tmp_path, load):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.png"
    path.write_bytes(png_of(1))
    (tmp_path / "set").mkdir()
    images = pa.array(
        [{"bytes": str(path), "path": "a.png"}], pa.struct([("bytes", pa.string()), ("path", pa.string())])
    )
    parquet.write_table(pa.table({"image": images}), tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match="none of"):
        all_images(load(tmp_path / "set"))


def test_an_answer_that_ends_early_is_asked_for_again(tmp_path, load):
    write_tars(tmp_path / "set", [4, 6])
    with serving(tmp_path / "set") as server:
        server.unannounced = {"/000.tar": 1, "/001.tar": 1}
        split = load(f"{server.url}/{{000..001}}.tar")  # which counts them
        server.unannounced = {"/000.tar": 1, "/001.tar": 1}
        assert (all_images(split) == as_arrays(range(10))).all()
        assert set(server.unannounced.values()) == {0}


# ---- The cache -------------------------------------------------------------------------------------------------------


def decoded(tmp_path):
    return sum(path.stat().st_size for path in tmp_path.glob("cache/*/*.npy") if path.name != "images.npy")


@pytest.mark.parametrize("batch_size", [4, 5, 9])
def test_the_cache_is_bounded(tmp_path, load, batch_size):
    """By two groups of two shards, also where a batch spans two of them."""
    write_tables(tmp_path / "set", [6] * 12)
    image = 3 * 8 * 8
    limit = 4 * (6 * image + 128)
    split = load(tmp_path / "set")
    object.__setattr__(split.data.images.cache, "limit", limit)
    stream = stream_of(split, batch_size)
    largest = 0
    for step in range(2 * 72 // batch_size):
        assert stream.wait(step)
        epochs, within = np.divmod(np.arange(batch_size * step, batch_size * (step + 1)), 72)
        indices = np.concatenate([stream.order.indices(i, within[epochs == i]) for i in np.unique(epochs).tolist()])
        assert (split.data.images[indices] == as_arrays(indices)).all()
        largest = max(largest, decoded(tmp_path))
    stream.close()
    assert 3 * 6 * image < largest <= limit


def test_what_was_not_used_for_longest_goes(tmp_path, load):
    write_tables(tmp_path / "set", [6] * 5)
    cache = load(tmp_path / "set").data.images.cache
    object.__setattr__(cache, "limit", 4 * (6 * 3 * 8 * 8 + 128))
    for shard in (3, 1, 2, 3, 0):
        cache.open(shard)
    cache.make_room([4])
    assert [shard for shard in range(5) if cache.path(shard).exists()] == [0, 2, 3]


def test_the_next_group_is_fetched_meanwhile(tmp_path, load):
    write_tables(tmp_path / "set", [6] * 12)
    stream = stream_of(load(tmp_path / "set"))
    assert stream.wait(0)
    following = stream.order.shards(stream.order.after(stream.order.groups(0, 0)[0]))
    started = time.monotonic()
    while not all(stream.images.cache.path(shard).exists() for shard in following):
        assert time.monotonic() - started < 60
        time.sleep(0.01)
    stream.close()


def test_a_bound_that_is_too_small_is_refused_with_the_bytes(tmp_path, load, monkeypatch):
    monkeypatch.setattr(ShardOrder.__init__, "__defaults__", (12,))
    write_tables(tmp_path / "set", [6] * 12)
    with pytest.raises(ValueError, match=r"_gb is 1e-06: two groups of 2 of the 12 shards need 4,608 bytes"):
        load(tmp_path / "set", cache_gb=1e-6)
    monkeypatch.setattr(streaming, "free_bytes", lambda folder: 100)
    with pytest.raises(ValueError, match=r"need up to 13,824 bytes, 100 are free"):
        load(tmp_path / "set")


def test_processes_of_a_machine_fetch_each_shard_once(tmp_path, load):
    """Two streams with caches of their own in the same folder, as two processes have them."""
    write_tables(tmp_path / "set", [6] * 8)
    with serving(tmp_path / "set") as server:
        place = f"{server.url}/train-{{00000..00007}}-of-00008.parquet"
        streams = [stream_of(load(place), window=24, turn=(rank, 2)) for rank in range(2)]
        server.requests.clear()
        server.slow = {f"/train-0000{i}-of-00008.parquet": 0.05 for i in range(8)}
        threads = [
            threading.Thread(target=lambda stream=stream: [stream.wait(step) for step in range(12)])
            for stream in streams
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(stream.wait(11) for stream in streams)
        for stream in streams:
            stream.close()
        assert sorted(server.requests) == sorted(server.slow)


def test_a_damaged_file_of_the_cache_is_fetched_again(tmp_path, load):
    write_tables(tmp_path / "set", COUNTS)
    all_images(load(tmp_path / "set"))
    for path in tmp_path.glob("cache/*/*.npy"):
        cut_off(path)
    assert (all_images(load(tmp_path / "set")) == as_arrays(range(27))).all()


def test_a_fault_of_the_disk_is_not_remembered(tmp_path, load):
    write_tables(tmp_path / "set", COUNTS)
    split = load(tmp_path / "set")
    (away,) = (tmp_path / "set").glob("*-00002-*")
    away.rename(tmp_path / "away")
    with pytest.raises(ShardError, match=r"train-00002-of-00004.parquet cannot be read: .*No such file"):
        all_images(split)
    (tmp_path / "away").rename(away)
    assert (all_images(load(tmp_path / "set")) == as_arrays(range(27))).all()


def test_a_full_disk_is_an_error_of_the_shard(tmp_path, load, monkeypatch):
    write_tables(tmp_path / "set", COUNTS)
    stream = stream_of(load(tmp_path / "set"))

    def fill(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardCache, "_write", fill)
    with pytest.raises(ShardError, match="the disk is full"):
        stream.wait(0)
    stream.close()


def test_held_out_images_follow_shards_that_are_replaced(tmp_path, load):
    write_tars(tmp_path / "set", [40])
    load(tmp_path / "set", None)
    path = tmp_path / "set" / "000.tar"
    with tarfile.open(path) as archive:
        labels = [member for member in archive if member.name.endswith(".cls")]
    changed = bytearray(path.read_bytes())
    for member in labels:
        changed[member.offset_data] = ord("7")
    path.write_bytes(changed)
    split = load(tmp_path / "set", None)
    assert set(split.held_out_set.label_names()) == set(split.data.label_names()) == {"7"}


def test_waiting_for_the_lock_of_another_run_ends_with_the_run(tmp_path, load):
    write_tables(tmp_path / "set", COUNTS)
    cache = load(tmp_path / "set").data.images.cache
    path = cache.path(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.stem}.lock")):
        threading.Timer(0.1, cache.stopped.set).start()
        with pytest.raises(ShardError, match="the run ends"):
            cache.fetch(0)


# ---- The network -----------------------------------------------------------------------------------------------------


def test_a_thousand_shards_one_truncated_one_slow_and_the_server_dies_in_between(tmp_path, load, log, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE", 60.0)  # of a machine that is busy
    write_packed(tmp_path / "set", [2] * 1000)
    path = tmp_path / "set" / "train-00500.npy"
    cut_off(path, path.stat().st_size - 100)  # in the second of its images
    with serving(tmp_path / "set") as server:
        split = load(server.url)
        expected = as_arrays(range(2000))
        server.slow["/train-00123.npy"] = 1.0
        server.cut["/train-00124.npy"] = 2
        stream = stream_of(split, batch_size=16, window=400)
        revival = threading.Timer(0.3, server.dead.clear)
        seen = []
        for step in range(2000 // 16):
            if step == 50:
                server.dead.set()
                revival.start()
            assert stream.wait(step)
            indices = stream.order.indices(0, np.arange(16 * step, 16 * step + 16))
            seen.append(indices)
            readable = stream.readable(indices)
            assert (readable == np.where(indices == 1001, 1000, indices)).all()
            assert (split.data.images[readable] == expected[readable]).all()
        stream.close()
    assert sorted(np.concatenate(seen)) == list(range(2000))
    (line,) = log
    assert "1 of 2 images of train-00500.npy cannot be read" in line and "row 1: the file is cut off" in line


def test_a_dead_server_is_an_error_with_the_name_of_the_shard(tmp_path, load):
    write_tables(tmp_path / "set", [6] * 4)
    with serving(tmp_path / "set") as server:
        split = load(f"{server.url}/train-{{00000..00003}}-of-00004.parquet")
        server.dead.set()
        stream = stream_of(split)
        with pytest.raises(ShardError, match=r"train-0000\d-of-00004.parquet cannot be read, tried for [01] seconds"):
            stream.wait(0)
        server.dead.clear()
        stream.close()


def test_what_could_not_be_fetched_is_not_tried_again(tmp_path, load, monkeypatch):
    write_tables(tmp_path / "set", [6] * 4)
    stream = stream_of(load(tmp_path / "set"))
    tried = []

    def fail(cache, shard):
        tried.append(shard)
        raise ShardError("gone")

    monkeypatch.setattr(ShardCache, "fetch", fail)
    with pytest.raises(ShardError, match="gone"):
        stream.wait(0)
    stream.close()
    assert len(tried) == len(set(tried))


def test_waiting_ends_when_the_run_is_to_end(tmp_path, load, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE", 100.0)
    write_tables(tmp_path / "set", [6] * 4)
    with serving(tmp_path / "set") as server:
        split = load(f"{server.url}/train-{{00000..00003}}-of-00004.parquet")
        server.dead.set()
        stream = stream_of(split)
        assert not stream.wait(0, lambda: True)
        started = time.monotonic()
        stream.close()
        assert time.monotonic() - started < 5


def test_a_file_that_is_gone_is_not_waited_for(tmp_path, load, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE", 100.0)
    write_tables(tmp_path / "set", [6] * 2)
    with (
        serving(tmp_path / "set") as server,
        pytest.raises(ValueError, match=r"00002-of.* cannot be read.*no such file") as caught,
    ):
        load(f"{server.url}/train-{{00000..00002}}-of-00002.parquet")
    assert not isinstance(caught.value, ShardError)  # a mistake in the command


def test_waiting_is_announced_once(tmp_path, load, monkeypatch, capsys):
    monkeypatch.setattr(stores, "_warned_at", -math.inf)
    with serving(tmp_path) as server:
        server.dead.set()
        for name in "ab":
            with pytest.raises(ShardError):
                stores.patiently(f"{name}.tar", lambda: stores.read(f"{server.url}/a.tar"))
    assert capsys.readouterr().err.splitlines() == [
        "WARNING: a.tar cannot be read: HTTP Error 503: Service Unavailable; it is tried again for 1 seconds"
    ]


def test_a_signal_ends_waiting_in_threads(monkeypatch):
    """SIGTERM raises SystemExit in the main thread, here a thread that is ahead of the others does."""
    monkeypatch.setattr(stores, "_warned_at", math.inf)

    def refuse():
        raise ConnectionRefusedError("refused")

    def waits(item, stopped):
        if item:
            raise SystemExit(143)
        stores.patiently("a.tar", refuse, stopped)

    started = time.monotonic()
    with pytest.raises(SystemExit):
        stores.in_parallel(waits, [True, False])
    assert time.monotonic() - started < 60  # patience is 300 seconds


@pytest.mark.usefixtures("load")  # with little patience
def test_a_server_that_refuses_is_not_asked_again(tmp_path):
    with serving(tmp_path) as server:
        server.code = 403
        server.dead.set()
        with pytest.raises(ShardError, match=r"a.tar cannot be read: HTTP Error 403"):
            stores.patiently("a.tar", lambda: stores.read(f"{server.url}/a.tar"))
        assert server.requests == ["/a.tar"]


def test_batches_are_the_images_of_their_indices(tmp_path, load):
    from training.data.batches import Batches, Labels

    write_packed(tmp_path / "set", COUNTS)
    split = load(tmp_path / "set")
    labels = Labels(split.data.labels(), 3)
    batches = Batches(
        split.data.images, batch_size=5, seed=1, labels=labels, stream=stream_of(split, 5), device=torch.device("cpu")
    )
    for step in (7, 0, 1):
        index = torch.arange(5)
        images, of_images = batches.batch(step, index)
        chosen = batches.indices(step, index)
        assert torch.equal(((images + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(as_arrays(chosen)))
        assert of_images.tolist() == [i % 3 for i in chosen]
    batches.close()
