"""Packing: the pixels, labels and splits of the files, whole or continued, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tests.data.shard_files import as_arrays, pixels_of, write_tables
from training.data import pack
from training.data.cache import load_images
from training.data.pack import PackConfig
from training.data.streaming import load_streamed_split


class InThisProcess:
    """In place of a pool of processes, each of which takes seconds to start."""

    def __init__(self, *args, initializer):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, work, *args):
        result = work(*args)
        return type("Done", (), {"result": lambda self: result})()

    def map(self, work, items, chunksize=1):
        return map(work, items)

    def shutdown(self, **options):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "ProcessPoolExecutor", InThisProcess)

    def run(source, **options):
        options = {"min_side": 1, "images_per_shard": 4, "cache_dir": str(tmp_path / "cache")} | options
        return pack.pack(PackConfig(str(source), str(tmp_path / "packed"), **options))

    return run


def write_folder(folder, count=10):
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_of(i)).save(path)


def packed(tmp_path, split="train"):
    """The images and labels by NumPy alone."""
    manifest = json.loads((tmp_path / "packed" / "manifest.json").read_text())
    of_split = manifest["splits"][split]
    images = np.concatenate([np.load(tmp_path / "packed" / shard["name"]) for shard in of_split["shards"]])
    labels = of_split["labels"] and np.load(tmp_path / "packed" / of_split["labels"])
    return images, labels, manifest


def sort(images, labels, count=10):
    """The numbers of the images in ascending order, and their labels; each has to be one of images 0, 1, ..."""
    all_of_them = as_arrays(range(count))
    numbers = [(image == all_of_them).all(axis=(1, 2, 3)).nonzero()[0].item() for image in images]
    order = np.argsort(numbers)
    return np.array(numbers)[order].tolist(), labels[order].tolist()


def test_a_folder_is_packed_with_its_labels(tmp_path, run):
    write_folder(tmp_path / "set")
    assert "3 x 8 x 8 uint8; train: 10 images in 3 shards" in run(tmp_path / "set", resolution=8)
    images, labels, manifest = packed(tmp_path)
    assert sort(images, labels) == (list(range(10)), [0, 1] * 5) and manifest["class_names"] == ["a", "b"]
    assert not list((tmp_path / "packed").glob(".*"))


def test_shards_are_mixed(tmp_path, run):
    """Although the folder is sorted by class."""
    write_folder(tmp_path / "set", 40)
    run(tmp_path / "set", resolution=8, images_per_shard=10)
    for labels in packed(tmp_path)[1].reshape(4, 10):
        assert 1 <= labels.sum() <= 9


def test_tables_are_packed_with_all_splits(tmp_path, run):
    write_tables(tmp_path / "set", [5, 4])
    write_tables(tmp_path / "set", [3], split="test")
    assert "train: 9 images in 3 shards, test: 3 images in 1 shards" in run(tmp_path / "set", resolution=8)
    for split, count in (("train", 9), ("test", 3)):
        images, labels, manifest = packed(tmp_path, split)
        assert sort(images, labels) == (list(range(count)), [i % 3 for i in range(count)])
        assert manifest["class_names"] == ["0", "1", "2"]


def test_pixels_are_those_that_training_without_shards_has(tmp_path, run):
    write_folder(tmp_path / "set")
    run(tmp_path / "set", resolution="12x16", center_crop=False)
    data = load_images(
        train_data_dir=tmp_path / "set", resolution="12x16", center_crop=False, cache_dir=tmp_path / "cache"
    )
    assert sorted(image.tobytes() for image in packed(tmp_path)[0]) == sorted(image.tobytes() for image in data.images)


def test_the_size_is_one_that_a_network_can_halve(tmp_path, run):
    write_tables(tmp_path / "set", [3], side=28)
    assert "3 x 32 x 32" in run(tmp_path / "set")


def test_unreadable_images_are_named_or_left_out(tmp_path, run):
    write_folder(tmp_path / "set")
    (tmp_path / "set" / "a" / "02.png").write_bytes(b"no image")
    content = (tmp_path / "set" / "b" / "07.png").read_bytes()
    (tmp_path / "set" / "b" / "07.png").write_bytes(content[:80])  # its header can be read
    with pytest.raises(ValueError, match=r"1 of 10 images cannot be read(.|\n)*a/02.png: not an image"):
        run(tmp_path / "set", resolution=8)
    assert "8 images in 3 shards" in run(tmp_path / "set", resolution=8, on_bad_image="skip")
    images, labels, manifest = packed(tmp_path)
    assert sort(images, labels) == ([0, 1, 3, 4, 5, 6, 8, 9], [0, 1, 1, 0, 1, 0, 0, 1])
    assert {line.partition(":")[0] for line in manifest["splits"]["train"]["skipped"]} == {"a/02.png", "b/07.png"}


def test_an_interrupted_packing_continues_with_the_same_bytes(tmp_path, run, monkeypatch):
    write_folder(tmp_path / "set")
    run(tmp_path / "set", resolution=8)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    (tmp_path / "packed").rename(tmp_path / "whole")
    written, write_shard = [], pack.write_shard

    def write_two(path, items, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write_shard(path, items, **options)

    monkeypatch.setattr(pack, "write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "set", resolution=8)
    (tmp_path / "packed" / ".packing-of-a-killed-process").mkdir()
    assert not (tmp_path / "packed" / "manifest.json").exists()
    monkeypatch.setattr(pack, "write_shard", write_shard)
    with pytest.raises(ValueError, match="another packing was interrupted, of other images or with other settings"):
        run(tmp_path / "set", resolution=16)
    decoded = []
    monkeypatch.setattr(
        pack, "decode_checked", lambda *args, **options: decoded.append(1) or pack_decode(*args, **options)
    )
    (tmp_path / "packed" / "train-00001.npy").write_bytes(b"cut off by a power cut")
    run(tmp_path / "set", resolution=8)
    assert {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()} == expected
    assert len(decoded) == 4 + 2  # the first shard is kept


pack_decode = pack.decode_checked


def test_what_is_refused(tmp_path, run, monkeypatch):
    with pytest.raises(ValueError, match="moons"):
        run("moons")
    with pytest.raises(ValueError, match="images_per_shard is 0"):
        PackConfig("a", "b", images_per_shard=0)
    write_folder(tmp_path / "set")
    monkeypatch.setattr(pack, "free_bytes", lambda folder: 1000)
    with pytest.raises(ValueError, match="its shards need 1,920 bytes, 1,000 are free"):
        run(tmp_path / "set", resolution=8)
    monkeypatch.undo()
    monkeypatch.setattr(pack, "ProcessPoolExecutor", InThisProcess)
    with pytest.raises(ValueError, match=r"packed', which is in the source: give a folder outside"):
        run(tmp_path)
    run(tmp_path / "set", resolution=8)
    with pytest.raises(ValueError, match="has packed shards already, all of them"):
        run("nowhere")
    (tmp_path / "packed").rename(tmp_path / "source")
    with pytest.raises(ValueError, match=r"source', which has packed shards already: train.py reads them with --str"):
        run(tmp_path / "source")
    (tmp_path / "source").rename(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"train_data_dir is .*: this folder has packed shards: add --streaming"):
        load_images(train_data_dir=tmp_path / "packed", cache_dir=tmp_path / "cache")


def interrupted(run, tmp_path, monkeypatch):
    """A packing that has written all shards, and neither labels nor the manifest."""

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pack, "in_order", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "set", resolution=8)
    assert (tmp_path / "packed" / pack.STATE).exists() and not (tmp_path / "packed" / "manifest.json").exists()


def test_damaged_notes_of_an_interrupted_packing(tmp_path, run, monkeypatch):
    write_folder(tmp_path / "set")
    run(tmp_path / "set", resolution=8)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    shutil.rmtree(tmp_path / "packed")
    interrupted(run, tmp_path, monkeypatch)
    for i, content in enumerate(["", "[]", "{}"]):
        (tmp_path / "packed" / f".train-0000{i}.json").write_text(content)
    run(tmp_path / "set", resolution=8)
    assert {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()} == expected
    shutil.rmtree(tmp_path / "packed")
    interrupted(run, tmp_path, monkeypatch)
    for content in ("", "[1]", '{"train": 1}'):
        (tmp_path / "packed" / pack.STATE).write_text(content)
        with pytest.raises(ValueError, match=r".packing.json is damaged: delete the folder, and pack again"):
            run(tmp_path / "set", resolution=8)


def test_labels_are_those_that_the_manifest_has_the_hash_of(tmp_path, run):
    write_folder(tmp_path / "set")
    run(tmp_path / "set", resolution=8)
    labels = packed(tmp_path)[1]
    split = load_streamed_split(
        "none", train_data_dir=tmp_path / "packed", cache_dir=tmp_path / "cache", log=lambda line: None
    )
    assert split.data.labels().tolist() == labels.tolist()
    np.save(tmp_path / "packed" / "train-labels.npy", 1 - labels)
    again = load_streamed_split(
        "none", train_data_dir=tmp_path / "packed", cache_dir=tmp_path / "cache", log=lambda line: None
    )
    with pytest.raises(ValueError, match=r"train-labels.npy is damaged"):
        again.data.labels()


def test_a_folder_with_other_files_is_not_written_to(tmp_path, run):
    write_folder(tmp_path / "set")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train-00000.npy").write_text("mine")
    with pytest.raises(ValueError, match=r"packed', which has other files: train-00000.npy: give a new folder"):
        run(tmp_path / "set", resolution=8)
    assert (tmp_path / "packed" / "train-00000.npy").read_text() == "mine"


def test_all_unreadable_images_are_named_and_what_is_packed_is_kept(tmp_path, run, monkeypatch):
    write_folder(tmp_path / "set")
    for name in ("a/02.png", "b/07.png"):
        content = (tmp_path / "set" / name).read_bytes()
        (tmp_path / "set" / name).write_bytes(content[:80])  # its header can be read
    with pytest.raises(ValueError, match=r"2 of 10 images cannot be read"):
        run(tmp_path / "set", resolution=8)
    monkeypatch.setattr(pack, "decode_checked", None)
    assert "8 images in 3 shards" in run(tmp_path / "set", resolution=8, on_bad_image="skip")


def test_a_shard_without_an_image_that_can_be_read_is_not_kept(tmp_path, run):
    write_folder(tmp_path / "set")
    path = tmp_path / "set" / "a" / "02.png"
    path.write_bytes(path.read_bytes()[:80])  # its header can be read
    assert "9 images in 9 shards" in run(tmp_path / "set", resolution=8, on_bad_image="skip", images_per_shard=1)
    names = {entry["name"] for entry in packed(tmp_path)[2]["splits"]["train"]["shards"]}
    assert {path.name for path in (tmp_path / "packed").glob("train-0*.npy")} == names


def test_splits_of_other_channels_are_refused(tmp_path, run):
    for split, mode in (("train", "L"), ("test", "RGB")):
        (tmp_path / "set" / split).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(pixels_of(i)).convert(mode).save(tmp_path / "set" / split / f"{i}.png")
    with pytest.raises(
        ValueError, match=r"split test has images with 3 channels of uint8, split train with 1 of uint8"
    ):
        run(tmp_path / "set", resolution=8)


def test_one_packing_at_a_time(tmp_path, run):
    write_folder(tmp_path / "set")
    (tmp_path / "packed").mkdir()
    with (
        FileLock(tmp_path / "packed" / ".packing.lock"),
        pytest.raises(ValueError, match="another packing is running"),
    ):
        run(tmp_path / "set", resolution=8)
    assert "10 images" in run(tmp_path / "set", resolution=8)
    assert not list((tmp_path / "packed").glob(".*"))


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_mistake_leaves_no_folder(tmp_path, run, make):
    make(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"^source is "):
        run(tmp_path / "empty")
    assert not (tmp_path / "packed").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "ProcessPoolExecutor", InThisProcess)
    write_folder(tmp_path / "set")
    arguments = [str(tmp_path / "set"), str(tmp_path / "packed"), "--resolution=8", f"--cache_dir={tmp_path / 'cache'}"]
    assert pack.main(arguments) == 0
    assert "10 images in 1 shards" in capsys.readouterr().out
    assert pack.main(arguments) == 2
    assert "packed shards already" in capsys.readouterr().err

    def interrupt(path, items, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "write_shard", interrupt)
    assert pack.main([arguments[0], str(tmp_path / "other"), *arguments[2:]]) == 130
    assert "Complete shards are kept: run the same command again" in capsys.readouterr().err
