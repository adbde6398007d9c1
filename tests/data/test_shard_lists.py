"""Which shards there are, by their names, on servers of all kinds; other content is noticed, and damage is named."""

import contextlib
import gzip
import json
import os
import shutil
import socket
import tarfile
from email.message import Message

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.data.image_files import cell, write_parquet
from tests.data.shard_files import add, as_arrays, pixels_of, png_of, serving, write_packed, write_tables, write_tars
from training.data import shards, stores
from training.data.classes import find_classes
from training.data.disk import CacheError
from training.data.shards import find_shards, split_of
from training.data.stores import ShardError, StoredFile
from training.data.streaming import load_streamed_split

WRITERS = {"parquet": write_tables, "webdataset": write_tars, "packed": write_packed}


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "FIRST_PAUSE", 0.02)

    def load(place, validation_split="none", **options):
        options = {"cache_dir": tmp_path / "cache"} | options
        return load_streamed_split(validation_split, dataset_name=str(place), log=print, **options)

    return load


def all_images(split):
    return split.data.images[np.arange(len(split.data))]


# ---- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("training.parquet", "train"),
        ("data/validation-0.parquet", "validation"),
        ("dev-0.parquet", "validation"),
        ("eval/0.tar", "test"),
        ("my_evaluation_1.tar", "test"),
        ("testing/train-like.tar", "train"),
        ("000.tar", "train"),
        ("device-0.tar", "train"),
        ("contest.tar", "train"),
    ],
)
def test_the_split_is_that_of_the_name(name, split):
    """As the library datasets has it."""
    assert split_of(name) == split


def test_tar_files_beside_tables_are_named(tmp_path, load):
    write_tables(tmp_path / "set", [4])
    write_tars(tmp_path / "set", [3])
    assert load(tmp_path / "set").data.source.endswith("1 other files left out: 000.tar")


def test_files_that_are_left_out_or_absent_are_named(tmp_path, load):
    write_tables(tmp_path / "set", [4, 3, 2])
    (tmp_path / "set" / "train-00001-of-00003.parquet").unlink()
    for name in ("README.md", "info.json", "more.tar.bz2", ".hidden.tar.bz2"):
        (tmp_path / "set" / name).write_text("")
    source = load(tmp_path / "set").data.source
    assert "only 2 of the 3 files train-...-of-00003.parquet are there; 1 other files left out: more.tar.bz2" in source


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_capitals_and_links_to_folders_are_shards_too(tmp_path, load, kind):
    WRITERS[kind](tmp_path / "elsewhere", [4])
    (path,) = (tmp_path / "elsewhere").iterdir()
    path.rename(path.with_suffix(path.suffix.upper()))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    assert (all_images(load(tmp_path / "set")) == as_arrays(range(4))).all()
    (tmp_path / "set" / "nowhere.tar").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"nowhere.tar is a link that leads nowhere: replace it"):
        load(tmp_path / "set")
    (tmp_path / "set" / "nowhere.tar").unlink()
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match=r"back is a link to a folder that it is in: remove it"):
        load(tmp_path / "set")


def test_the_configurations_of_a_data_set_are_not_mixed(tmp_path, load, monkeypatch):
    for config in ("blue", "red"):
        write_tables(tmp_path / "set" / config, [4])
    write_tables(tmp_path / "set" / "red", [2], split="test")
    listed = stores.list_files(str(tmp_path / "set"))
    monkeypatch.setattr(stores, "list_files", lambda place: listed)
    monkeypatch.setattr(shards, "hub_commit", lambda name, cache_dir: None)
    monkeypatch.setattr(shards, "_read_json", lambda url, is_given: None)
    options = {"index_dir": tmp_path}
    with pytest.raises(ValueError, match=r"dataset_config_name is None: give one, .* has the folders blue, red"):
        find_shards("user/set", **options)
    assert len(find_shards("user/set", config="blue", **options).shards) == 1
    assert len(find_shards("user/set", split="test", **options).shards) == 1  # one has it
    assert len(load(tmp_path / "set").data) == 8  # folders of one's own


def test_one_of_several_images_of_a_sample_is_chosen(tmp_path, load):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "000.tar", "w") as archive:
        for i in range(3):
            add(archive, f"{i}.mask.png", png_of(10 + i))
            add(archive, f"{i}.Photo.png", png_of(i))
            add(archive, f"{i}.cls", str(i).encode())
        add(archive, "3.mask.png", png_of(13))
    split = load(tmp_path / "set")
    note = "3 images left out (image_column chooses, now the first of a sample): photo.png"
    assert split.data.source.endswith(note) and (all_images(split) == as_arrays([10, 11, 12, 13])).all()
    split = load(tmp_path / "set", image_column="Photo.png")
    assert split.data.source.endswith("4 images left out (image_column is Photo.png): mask.png")
    assert (all_images(split) == as_arrays([0, 1, 2])).all() and split.data.label_names() == ["0", "1", "2"]
    with pytest.raises(
        ValueError, match=r"image_column is 'png', which no image of .* ends with: give mask.png or photo.png"
    ):
        load(tmp_path / "set", image_column="png")


def test_labels_that_only_their_types_tell_apart_are_no_classes(tmp_path, load):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "000.tar", "w") as archive:
        for i, label in enumerate([1, "1", "b"]):
            add(archive, f"{i}.png", png_of(i))
            add(archive, f"{i}.json", json.dumps({"label": label}).encode())
    with pytest.raises(ValueError, match=r"different labels are called 1, such as a number and a text"):
        find_classes(load(tmp_path / "set"))


def test_the_columns_of_a_table_have_a_cache_and_a_digest_each(tmp_path, load):
    (tmp_path / "set").mkdir()
    columns = {"a": [cell(pixels_of(i)) for i in range(3)], "b": [cell(pixels_of(9 - i)) for i in range(3)]}
    write_parquet(tmp_path / "set" / "0.parquet", **columns)
    a, b = (load(tmp_path / "set", image_column=column) for column in "ab")
    assert (all_images(a) == as_arrays([0, 1, 2])).all() and (all_images(b) == as_arrays([9, 8, 7])).all()
    assert a.data.digest != b.data.digest


def test_of_images_of_one_name_the_first_is_used_and_arrays_are_no_images(tmp_path, load):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "000.tar", "w") as archive:
        for name, content in (("0.depth.npy", b"x"), ("0.png", png_of(0)), ("0.PNG", png_of(1)), ("0.png", png_of(2))):
            add(archive, name, content)
        for i in (3, 4):
            add(archive, "1.png", png_of(i))
            add(archive, "1.cls", str(i).encode())
    split = load(tmp_path / "set")
    assert (all_images(split) == as_arrays([0, 3])).all() and split.data.label_names() == [None, "3"]
    assert "3 images left out (image_column chooses, now the first of a sample): again.png" in split.data.source


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_files_that_were_joined_or_cut_between_members_are_damaged(tmp_path, load, suffix):
    packed = gzip.compress if suffix == ".tar.gz" else bytes
    write_tars(tmp_path / "parts", [2, 3], labels=False)
    first, second = (path.read_bytes() for path in sorted((tmp_path / "parts").iterdir()))
    for name, content in (("joined", [first, second]), ("cut", [second[:2048]]), ("whole", [first])):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"0{suffix}").write_bytes(b"".join(map(packed, content)))
        split = load(tmp_path / name)
        note = f"1 tar files are damaged or have more after their end, what can be read of them is used: 0{suffix}"
        assert (note in split.data.source) == (name != "whole")
        assert len(split.data) == 2


def test_a_link_to_a_folder_in_a_tar_file_is_no_image(tmp_path, load, capsys):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "000.tar", "w") as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        add(archive, "000.png", png_of(0))
        for name in ("000.cls", "001.png"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "folder"
            archive.addfile(link)
        add(archive, "002.png", png_of(2))
    split = load(tmp_path / "set")
    assert (split.data.images[np.array([0, 2])] == as_arrays([0, 2])).all()
    all_images(split)
    assert "001.png: it is a link to folder, which is no file of this archive" in capsys.readouterr().out


def test_held_out_images_have_the_labels_of_the_column(tmp_path, load):
    """Also if the same cache has those of another column."""
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "000.tar", "w") as archive:
        for i in range(60):
            add(archive, f"{i:02}.png", png_of(i))
            add(archive, f"{i:02}.json", json.dumps({"male": i % 2, "smiling": 1 - i % 2}).encode())
    columns = {"image": [cell(pixels_of(i)) for i in range(60)], "male": [i % 2 for i in range(60)]}
    (tmp_path / "table").mkdir()
    write_parquet(tmp_path / "table" / "0.parquet", **columns, smiling=[1 - i % 2 for i in range(60)])
    for folder in ("set", "table"):
        for column, of_even, of_first in ((None, None, None), ("male", "0", "1"), ("smiling", "1", "0")):
            split = load(tmp_path / folder, None, label_column=column)
            assert split.held_out_set.label_names() == [of_even] * 3
            assert split.in_memory().data.label_names()[0] == of_first  # image 1: image 0 is held out


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_a_tar_file_are_followed_and_samples_without_an_image_are_counted(tmp_path, load, capsys, kind):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "000.tar", "w") as archive:
        add(archive, "first.png", png_of(0))
        for name, target in (("second.png", "first.png"), ("third.png", "nowhere.png"), ("self.png", "self.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
        add(archive, "fourth.png", png_of(4))
        add(archive, "first.cls", b"1")  # not beside its image
    split = load(tmp_path / "set")
    assert split.data.source.endswith("1 samples without an image left out") and len(split.data) == 5
    assert (split.data.images[np.array([0, 1, 4])] == as_arrays([0, 0, 4])).all()
    all_images(split)
    output = capsys.readouterr().out
    for name, target in (("third.png", "nowhere.png"), ("self.png", "self.png")):
        assert f"{name}: it is a link to {target}, which is no file of this archive" in output


def test_a_folder_may_be_named_as_a_pattern(tmp_path, load):
    for kind, writer in WRITERS.items():
        writer(tmp_path / f"{kind}-{{0..1}}", [3])
        assert len(load(tmp_path / f"{kind}-{{0..1}}").data) == 3


# ---- Servers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_shard_or_a_pattern_has_a_signature(tmp_path, load, kind):
    WRITERS[kind](tmp_path / "set", [5, 4])
    first = sorted(path.name for path in (tmp_path / "set").iterdir())[0]
    pattern = first.replace("00000-", "{00000..00001}-").replace("000.tar", "{000..001}.tar")
    with serving(tmp_path / "set") as server:
        one = load(f"{server.url}/{first}")
        signed = load(f"{server.url}/{first}?signature=a/b.c&x=1")
        assert (all_images(signed) == as_arrays(range(5))).all()
        assert one.data.digest == signed.data.digest == load(tmp_path / "set" / first).data.digest
        both = load(f"{server.url}/{pattern}?signature=1")
        assert (all_images(both) == as_arrays(range(9))).all()
        (tmp_path / "set" / "index.json").write_text(json.dumps({"shardlist": [{"url": f"{first}?signature=1"}]}))
        assert len(load(server.url).data) == 5


@pytest.mark.parametrize("head", ["405", "403", "no length"])
def test_servers_that_do_not_answer_head(tmp_path, load, head, monkeypatch):
    write_tables(tmp_path / "set", [5])
    write_tars(tmp_path / "set", [5])
    with serving(tmp_path / "set") as server:
        server.head = head
        for name in ("train-00000-of-00001.parquet", "000.tar"):
            assert (all_images(load(f"{server.url}/{name}")) == as_arrays(range(5))).all()


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        ({"Content-Length": "12"}, 12),
        ({"Content-Range": "bytes 0-0/34", "Content-Length": "1"}, 34),
        ({"Content-Range": "bytes 0-0/*", "Content-Length": "1"}, None),
        ({"Content-Length": "abc"}, None),
        ({}, None),
    ],
)
def test_lengths_by_headers(headers, length):
    message = Message()
    for name, value in headers.items():
        message[name] = value
    if length is None:
        with pytest.raises(ShardError, match=r"http://host/a.tar cannot be read: the server does not say how long"):
            stores._length("http://host/a.tar", message)
    else:
        assert stores._length("http://host/a.tar", message) == length


# ---- Other content ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_a_copy_in_another_place_is_the_same_data_set(tmp_path, load, kind):
    WRITERS[kind](tmp_path / "set", [5, 4])
    shutil.copytree(tmp_path / "set", tmp_path / "copy", copy_function=shutil.copyfile)
    assert load(tmp_path / "set").data.digest == load(tmp_path / "copy", cache_dir=tmp_path / "b").data.digest


def with_a_changed_byte(path, old):
    content = path.read_bytes()
    at = content.rindex(old)
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


@pytest.mark.parametrize("old", [b"IDAT", b"IEND", b"2" + bytes(511)])
def test_a_tar_file_with_another_byte_is_another_data_set(tmp_path, load, old):
    """In the pixels or in a label: no name and no size differs."""
    write_tars(tmp_path / "set", [5, 4])
    before = load(tmp_path / "set").data.digest
    with_a_changed_byte(tmp_path / "set" / "001.tar", old)
    assert load(tmp_path / "set").data.digest != before


def test_labels_of_packed_shards_are_part_of_the_data_set(tmp_path, load):
    write_packed(tmp_path / "set", [5, 4])
    before = load(tmp_path / "set").data.digest
    change_labels(tmp_path / "set", np.zeros(9, np.int32))
    assert load(tmp_path / "set").data.digest != before
    np.save(tmp_path / "set" / "train-labels.npy", np.ones(9, np.int32))
    with pytest.raises(ShardError, match=r"train-labels.npy is damaged: its sha256 is not that of the manifest"):
        load(tmp_path / "set").data.labels()


def change_labels(folder, labels):
    """The labels of packed shards, and their hash."""
    np.save(folder / "train-labels.npy", labels)
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = shards.hashlib.sha256((folder / "train-labels.npy").read_bytes()).hexdigest()
    manifest["splits"]["train"]["labels_sha256"] = digest
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("labels", [[-2] * 9, [3] * 9, [0] * 8, [0.0] * 9, ["a"] * 9])
def test_labels_without_a_class_are_refused(tmp_path, load, labels):
    write_packed(tmp_path / "set", [5, 4])
    change_labels(tmp_path / "set", np.array(labels, np.int32 if isinstance(labels[0], int) else None))
    with pytest.raises(ShardError, match=r"does not have 9 labels from -1 to 2: pack the data set again"):
        load(tmp_path / "set").data.labels()


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("is_remote", [False, True])
def test_a_shard_that_is_replaced_in_between_is_refused(tmp_path, load, kind, is_remote):
    WRITERS[kind](tmp_path / "set", [5, 4])
    WRITERS[kind](tmp_path / "other", [4, 5])
    last = sorted(path.name for path in (tmp_path / "set").iterdir())[1]
    pattern = last.replace("00001-", "{00000..00001}-").replace("001.tar", "{000..001}.tar")
    with serving(tmp_path / "set") as server:
        split = load(f"{server.url}/{pattern}" if is_remote else tmp_path / "set")
        shutil.copyfile(tmp_path / "other" / last, tmp_path / "set" / last)
        assert (split.data.images[np.arange(5)] == as_arrays(range(5))).all()
        with pytest.raises(ShardError, match=f"{last} is another file than when the run began: put the former"):
            split.data.images[np.arange(5, 9)]


def test_a_packed_shard_of_this_machine_stays_where_it_is(tmp_path, load):
    """Also if its manifest is wrong about its size, so that it is copied."""
    write_packed(tmp_path / "set", [5, 4])
    file = tmp_path / "set" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["splits"]["train"]["shards"][0]["bytes"] -= 1
    file.write_text(json.dumps(manifest))
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    assert (all_images(load(tmp_path / "set")) == as_arrays(range(9))).all()
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before


def test_a_packed_shard_of_this_machine_is_compared_and_again_when_it_is_replaced(tmp_path, load):
    write_packed(tmp_path / "set", [5, 4])
    content = bytearray((tmp_path / "set" / "train-00001.npy").read_bytes())
    content[-1] ^= 1
    split = load(tmp_path / "set")
    assert (all_images(split) == as_arrays(range(9))).all()
    (tmp_path / "new.npy").write_bytes(content)
    (tmp_path / "new.npy").rename(tmp_path / "set" / "train-00001.npy")
    split.data.images.close_all_but([])  # as between two groups
    for again in (split, load(tmp_path / "set")):
        with pytest.raises(ShardError, match=r"train-00001.npy is damaged: its sha256 is not that of the manifest"):
            all_images(again)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("sent", [b"<html>sorry</html>", None])
def test_what_a_server_sent_in_an_hour_of_trouble_is_fetched_again(tmp_path, load, kind, sent):
    WRITERS[kind](tmp_path / "set", [5, 4])
    last, pattern = {
        "parquet": ("train-00001-of-00002.parquet", "train-{00000..00001}-of-00002.parquet"),
        "webdataset": ("001.tar", "{000..001}.tar"),
        "packed": ("train-00001.npy", ""),
    }[kind]
    path = tmp_path / "set" / last
    whole, time = path.read_bytes(), path.stat().st_mtime_ns
    with serving(tmp_path / "set") as server:
        split = load(f"{server.url}/{pattern}")
        path.write_bytes(whole[: len(whole) // 2] if sent is None else sent)
        with contextlib.suppress(ShardError):  # else some are black
            all_images(split)
        path.write_bytes(whole)
        os.utime(path, ns=(time, time))  # so that nothing else differs
        again = load(f"{server.url}/{pattern}")
        assert (all_images(again) == as_arrays(range(9))).all()


def test_a_tar_file_that_was_damaged_when_it_was_counted_is_counted_again(tmp_path, load):
    write_tars(tmp_path / "set", [5, 4])
    path = tmp_path / "set" / "001.tar"
    whole, time = path.read_bytes(), path.stat()
    path.write_bytes(whole[:2048] + b"x" * (len(whole) - 2048))
    os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns))
    assert len(load(tmp_path / "set").data) == 6
    path.write_bytes(whole)
    os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns))
    assert len(load(tmp_path / "set").data) == 9


# ---- Damage ----------------------------------------------------------------------------------------------------------


def write_table(folder, name, features=None, **columns):
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    columns = {"image": [cell(pixels_of(i)) for i in range(3)]} | columns
    if features is None:
        parquet.write_table(pa.table(columns), folder / name)
    else:
        datasets.Dataset.from_dict(columns, features).to_parquet(str(folder / name))


def test_columns_of_labels_differ(tmp_path, load):
    write_table(tmp_path / "missing", "a.parquet", label=[0, 1, 2])
    write_table(tmp_path / "missing", "b.parquet", other=[0, 1, 2])
    with pytest.raises(ShardError, match=r"b.parquet has no column 'label': image, other"):
        load(tmp_path / "missing")
    write_table(tmp_path / "texts", "a.parquet", label=[0, 1, 2])
    write_table(tmp_path / "texts", "b.parquet", label=list("abc"))
    with pytest.raises(ShardError, match=r"b.parquet has a column 'label' of .*string.*, a.parquet one of .*int64"):
        load(tmp_path / "texts")


def test_the_names_of_classes_differ(tmp_path, load):
    from datasets import ClassLabel, Features, Image

    for name, names in (("a.parquet", ["cat", "dog"]), ("b.parquet", ["dog", "cat"])):
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        write_table(tmp_path / "set", name, features, label=[0, 1, 0])
    with pytest.raises(ShardError, match=r"b.parquet has a column 'label' of .*'dog', 'cat'.*, a.parquet one of"):
        load(tmp_path / "set")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.pop("splits"), "KeyError 'splits'"),
        (lambda manifest: manifest.pop("shape"), "KeyError 'shape'"),
        (lambda manifest: manifest["splits"]["train"]["shards"][0].pop("sha256"), "KeyError 'sha256'"),
        (lambda manifest: manifest["splits"].update(train=[]), "TypeError"),
        (lambda manifest: manifest.update(splits=["train"]), "it has no valid splits"),
        (lambda manifest: manifest.update(shape=["3", 8, 8]), "it has no valid shape"),
        (lambda manifest: manifest.update(shape=[3, 0, 8]), "it has no valid shape"),
        (lambda manifest: manifest.update(dtype="nonsense"), "it has no valid dtype"),
        (lambda manifest: manifest.update(class_names=[["a"]]), "it has no valid classes"),
        (lambda manifest: manifest.update(class_names="cats"), "it has no valid classes"),
        *(
            (lambda manifest, change=change: manifest["splits"]["train"]["shards"][0].update(change), message)
            for change, message in (
                ({"count": None}, "it has no valid size of a shard"),
                ({"count": -1}, "it has no valid size of a shard"),
                ({"count": 10**30}, "it has no valid size of a shard"),
                ({"bytes": 1}, "it has no valid size of a shard"),
                ({"name": "../train-00000.npy"}, "it has no valid name of a shard"),
                ({"name": ""}, "it has no valid name of a shard"),
                ({"name": "train-00001.npy"}, "it has no valid shard that is there once"),
            )
        ),
    ],
)
def test_a_manifest_that_lacks_something_is_named(tmp_path, load, change, message):
    write_packed(tmp_path / "set", [5, 4])
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=f"manifest.json is damaged: {message}"):
        load(tmp_path / "set")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_cache_that_is_a_file_is_named(tmp_path, load, kind):
    WRITERS[kind](tmp_path / "set", [5, 4])
    (tmp_path / "file").write_text("x")
    if kind == "packed":  # needs none
        assert len(load(tmp_path / "set", cache_dir=tmp_path / "file").data) == 9
        return
    with pytest.raises(CacheError, match=r"cache_dir is '.*file': it is not a folder"):
        load(tmp_path / "set", cache_dir=tmp_path / "file")


@pytest.mark.parametrize("content", ["", '{"labels": [0', "[]", '{"labels": [0, 1]}'])
def test_a_damaged_note_is_read_again(tmp_path, load, content):
    write_tars(tmp_path / "set", [5, 4])
    before = load(tmp_path / "set").data.digest
    notes = list((tmp_path / "cache" / ".index").glob("*.json"))
    assert len(notes) == 3  # of each tar file, and of what the first images are decoded to
    for note in notes:
        note.write_text(content)
    again = load(tmp_path / "set")
    assert again.data.digest == before and again.data.labels().tolist() == [i % 3 for i in range(9)]


def test_a_full_disk_is_not_waited_for(tmp_path, load, monkeypatch):
    write_tars(tmp_path / "set", [5])

    def fill(file, to, stopped=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores, "download", fill)
    with serving(tmp_path / "set") as server, pytest.raises(CacheError, match="the disk is full"):
        load(f"{server.url}/000.tar")


def test_a_tar_file_that_may_not_be_read_is_named(tmp_path, load, monkeypatch):
    write_tars(tmp_path / "set", [5])

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tarfile, "open", refuse)
    with pytest.raises(ShardError, match=r"000.tar cannot be read: Permission denied"):
        load(tmp_path / "set")


def test_the_column_of_labels_that_was_asked_for_is_taken(tmp_path, load):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "000.tar", "w") as archive:
        for i in range(3):
            add(archive, f"{i}.png", png_of(i))
            add(archive, f"{i}.cls", b"1")
            add(archive, f"{i}.json", json.dumps({"label": 2, "species": "cat"}).encode())
    assert load(tmp_path / "set").data.label_names() == ["1"] * 3
    assert load(tmp_path / "set", label_column="species").data.label_names() == ["cat"] * 3
    with pytest.raises(ValueError, match=r"label_column is 'nope': no sample of .* has it"):
        load(tmp_path / "set", label_column="nope")


def test_names_that_are_not_utf_8_are_shown(tmp_path, load, capsys):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "000.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        add(archive, "a.png", png_of(0))
        add(archive, "caf\u00e9.png", b"no image")
    split = load(tmp_path / "set")
    all_images(split)
    assert "caf\\udce9.png: not an image" in capsys.readouterr().out


def test_tar_files_none_of_which_can_be_read_are_named(tmp_path, load):
    (tmp_path / "set").mkdir()
    for i in range(2):
        (tmp_path / "set" / f"{i}.tar").write_bytes(b"<html>" * 100 * i)
    with pytest.raises(ShardError, match=r"no shard of data set set.* can be read: 0.tar, 1.tar are no complete tar"):
        load(tmp_path / "set")


@pytest.mark.parametrize("address", ["host:port/a.tar", "127.0.0.1:99999/a.tar", "/a.tar", "[::1/a.tar", "host:0/a"])
def test_an_address_that_is_none_is_not_waited_for(load, address):
    with pytest.raises(ValueError, match=r"is no web address: give https://host/path, or https://host:port/path"):
        load(f"http://{address}")


@pytest.mark.parametrize(("number", "attempts"), [(socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 3)])
def test_a_host_that_does_not_exist_is_not_waited_for_but_a_name_server_is(load, monkeypatch, number, attempts):
    asked = []

    def resolve(*args, **options):
        asked.append(args)
        raise socket.gaierror(number if len(asked) < 3 else socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(ShardError, match="cannot be read: no such name"):
        load("HTTP://host/a.tar")
    assert len(asked) == attempts


def test_what_follows_the_address_of_a_folder_is_for_all_files_in_it(tmp_path, load):
    write_packed(tmp_path / "packed", [4, 3])
    write_tables(tmp_path / "tables", [4, 3])
    names = sorted(path.name for path in (tmp_path / "tables").iterdir())
    (tmp_path / "tables" / "index.json").write_text(json.dumps({"shardlist": [{"url": name} for name in names]}))
    with serving(tmp_path) as server:
        for folder in ("packed", "packed/manifest.json", "packed/", "tables", "tables/index.json"):
            split = load(f"{server.url}/{folder}?sig=SECRET/abc", cache_dir=tmp_path / folder.replace("/", "-"))
            assert (all_images(split) == as_arrays(range(7))).all() and split.data.label_names() == list("0120120")
            assert "SECRET" not in split.data.source
        assert server.requests and all(request.endswith("?sig=SECRET/abc") for request in server.requests)


def test_the_index_of_a_folder_is_taken_where_it_is_given(tmp_path, load):
    write_tables(tmp_path / "set" / "a b", [4, 3])
    (tmp_path / "set" / "index.json").write_text('{"shardlist": [{"url": "a b/train-00001-of-00002.parquet"}]}')
    split = load(tmp_path / "set" / "index.json")
    assert (all_images(split) == as_arrays([4, 5, 6])).all()
    with serving(tmp_path) as server:
        quoted = f"{server.url}/set/a%20b/train-00001-of-00002.parquet"
        for name in (
            "/set/a%20b/train-00001-of-00002.parquet?x=1",
            quoted,
            "../set/a%20b/train-00001-of-00002.parquet",
        ):
            (tmp_path / "set" / "index.json").write_text(json.dumps({"shardlist": [{"url": name}]}))
            for url in (server.url, server.url.replace("http", "Http")):
                remote = load(f"{url}/set/index.json?sig=a/b", cache_dir=tmp_path / "other")
                assert remote.data.digest == split.data.digest
        assert not any("?x=1?" in request or "?x=1&" in request for request in server.requests)
        (tmp_path / "set" / "index.json").write_text(
            json.dumps({"shardlist": [{"url": quoted}, {"url": quoted + "?2"}]})
        )
        with pytest.raises(ValueError, match=r"several shards of .* have one name: a b/train-00001-of-00002.parquet"):
            load(f"{server.url}/set")


def test_a_user_and_a_password_are_sent_and_are_in_no_message(tmp_path, load):
    write_tars(tmp_path, [4])
    write_packed(tmp_path / "packed", [4])
    with serving(tmp_path) as server:
        server.user = "me:p@ss word"
        with pytest.raises(ShardError, match="cannot be read: HTTP Error 401"):
            load(f"{server.url}/000.tar")
        place = f"{server.url}/".replace("://", "://me:p%40ss%20word@")
        assert len(load(f"{place}000.tar").data) == 4
        for name, options, message in (
            ("001.tar", {}, "no such file"),
            ("000.tar", {"split": "test"}, "split is 'test'"),
            ("", {}, "cannot be listed"),
            ("packed", {"split": "test"}, "split is 'test'"),
        ):
            with pytest.raises(ValueError, match=message) as error:
                load(f"{place}{name}?sig=SECRET", **options)
            assert "p%40ss" not in str(error.value) and "SECRET" not in str(error.value)


def test_files_behind_one_address_with_other_questions(tmp_path, load, monkeypatch):
    """Of equal size and time, from a server that has no tags."""
    write_tars(tmp_path / "0", [3])
    write_tars(tmp_path / "1", [3])
    monkeypatch.setattr("tests.data.shard_files.png_of", lambda i: png_of(i + 10))
    write_tars(tmp_path / "1", [3])
    for number in "01":
        os.utime(tmp_path / number / "000.tar", (1, 1))
    with serving(tmp_path) as server:
        server.by_number = True
        for number, first in ((0, 0), (1, 10)):
            split = load(f"{server.url}/get.tar?id={number}")
            assert (all_images(split) == as_arrays(range(first, first + 3))).all()


def test_a_held_out_split_of_other_channels_is_refused(tmp_path, load):
    (tmp_path / "set").mkdir()
    for split, channels in (("train", 1), ("test", 3)):
        write_parquet(
            tmp_path / "set" / f"{split}.parquet",
            image=[cell(pixels_of(i)[..., :channels].squeeze()) for i in range(3)],
        )
    with pytest.raises(
        ValueError, match=r"split 'test' has images \(3, 8, 8\) of uint8, the training split \(1, 8, 8\)"
    ):
        load(tmp_path / "set", "test")


def test_files_of_one_relative_path(tmp_path, load, monkeypatch):
    """Of equal size and time."""
    write_tars(tmp_path / "a" / "shards", [3])
    monkeypatch.setattr("tests.data.shard_files.png_of", lambda i: png_of(i + 10))
    write_tars(tmp_path / "b" / "shards", [3])
    for project, first in (("a", 0), ("b", 10)):
        os.utime(tmp_path / project / "shards" / "000.tar", (1, 1))
        monkeypatch.chdir(tmp_path / project)
        assert (all_images(load("shards")) == as_arrays(range(first, first + 3))).all()


@pytest.mark.parametrize("name", ["image_column", "label_column", "dataset_config_name"])
def test_packed_shards_have_no_columns(tmp_path, load, name):
    write_packed(tmp_path / "set", [4])
    with pytest.raises(ValueError, match=f"{name} is 'x': packed shards have none"):
        load(tmp_path / "set", **{name: "x"})


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_shard_that_is_replaced_by_a_shorter_one_ends_the_run(tmp_path, load, kind):
    WRITERS[kind](tmp_path / "set", [8])
    split = load(tmp_path / "set")
    WRITERS[kind](tmp_path / "set", [4], **({"labels": False} if kind == "webdataset" else {}))
    with pytest.raises(ShardError, match="is another file than when the run began"):
        all_images(split)


def test_a_signature_and_a_password_are_no_part_of_a_description(tmp_path, load):
    write_tars(tmp_path / "set", [5])
    with serving(tmp_path / "set") as server:
        assert "data set 000.tar, split" in load(f"{server.url}/000.tar?sig=SECRET/abc").data.source
    assert stores.path_of("https://me:secret@host/a.tar?x=1") == "https://host/a.tar"
    assert stores.user_of("https://me:secret@host/a@b.tar") == "me:secret" and stores.user_of("https://host/a@b") == ""


def test_held_out_images_that_cannot_be_read_are_counted(tmp_path, load, capsys):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "000.tar", "w") as archive:
        for i in range(60):
            add(archive, f"{i:02}.png", b"no image" if i == 20 else png_of(i))
    split = load(tmp_path / "set", None)
    assert np.setdiff1d(np.arange(60), split.train_indices).tolist() == [0, 20, 40]
    assert (np.asarray(split.held_out) == as_arrays([0, 40])).all()
    assert split.held_out_source == "2 of 60 images, not trained on"
    assert "WARNING: 1 of the 3 images that are held out cannot be read" in capsys.readouterr().out


def test_places_of_other_stores_keep_their_question_marks():
    assert stores.path_of("https://host/a.tar?x=1") == "https://host/a.tar"
    assert stores.path_of("/data/what?.tar") == "/data/what?.tar"
    assert stores.path_of("memory://b/what?.tar") == "memory://b/what?.tar"
    assert StoredFile("a", "a", 1).version == ""
