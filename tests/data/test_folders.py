"""Folders of images as people have them: splits, masks, thumbnails, links, runs inside; patterns."""

import os

import numpy as np
import pytest
from PIL import Image

from training.data.split import load_data_split


def make(root, names):
    """Images of one value each, 100 for the first name."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100 + i).save(root / name, "png")


@pytest.mark.parametrize(
    ("names", "options", "used", "labels", "said"),
    [
        ("train/a/1.png train/b/2.png test/a/3.png", {}, "12", "01", "test (1)"),
        ("train/a/1.png train/b/2.png test/a/3.png", {"split": "test"}, "3", None, "train (2)"),
        ("Train/1.png VALID/2.png", {}, "1", None, "valid (1)"),
        ("training/a/1.png testing/a/2.png", {}, "1", None, "test (1)"),
        ("cats/1.png dogs/2.png test/3.png", {}, "12", "01", "--split_folders false"),
        ("cats/1.png dogs/2.png test/3.png", {"split_folders": False}, "123", "012", ""),
        ("bus/1.png car/2.png train/3.png", {}, "123", "012", "taken for a class, not a split: train"),
        ("train/good/1.png test/good/2.png test/crack/3.png ground_truth/crack/4.png", {}, "1", None, "masks left out"),
        ("images/1.png masks/1.png", {}, "1", None, "masks left out (--split_folders false keeps them): masks"),
        (
            "covid/images/1.png covid/masks/1.png ok/images/2.png ok/masks/2.png",
            {},
            "13",
            "01",
            "covid/masks, ok/masks",
        ),
        ("images/1.png masks/2.png", {"split_folders": False}, "12", "01", ""),
        ("images/1.png masks/2.png", {"include": "masks"}, "2", None, ""),
        ("1.png @eaDir/1.png/thumb.jpg a/Thumbnails/2.png", {}, "1", None, "thumbnails left out: @eaDir, a/Thumbnails"),
        ("a/1.png a/x_mask.png b/2.PNG", {"exclude": "*_mask.png"}, "13", "01", "1 left out by include and exclude"),
        (
            "a/1.png a/1_mask.png a/1_mask_2.png b/2_mask.png",
            {},
            "14",
            "01",
            "keeps them): a/1_mask.png, a/1_mask_2.png",
        ),
        ("1.png 1_mask.png", {"split_folders": False}, "12", None, ""),
        ("1.png 1_mask.png", {"include": "*_mask.png"}, "2", None, ""),
        ("1.png masks/1.png", {}, "1", None, "keeps them): masks"),
        ("JPEGImages/1.jpg SegmentationClass/1.png", {}, "1", None, "keeps them): SegmentationClass"),
        ("x/train/a/1.png x/train/b/2.png x/test/a/3.png", {}, "12", "01", "test (1)"),
        ("images/training/1.png images/validation/2.png annotations/training/1.png", {}, "1", None, "validation (1)"),
        ("cup/train/1.png box/train/2.png box/test/3.png cup/ground_truth/4.png", {}, "12", "01", "test (1)"),
        ("a/test/1.png b/2.png", {}, "12", "01", "not a split: a/test"),
        ("train2017/1.png val2017/2.png", {}, "1", None, "val (1)"),
        ("train_images/1.png test_images/2.png", {}, "1", None, "test (1)"),
        ("train/1.png dev/2.png", {}, "1", None, "validation (1)"),
        ("a/1.png b/2.png", {"exclude": "B?"}, "12", "01", "no image matches the pattern b?"),
        ("a/1.png b/2.png c/3.png", {"include": "a,bb"}, "1", None, "no image matches the pattern bb"),
        ("a/1.png b/2.png c/d/3.png", {"include": "a/*,d"}, "13", "01", ""),
        ("a/1.png b/2.png c/3.png", {"include": ["a", "b"], "exclude": ["b"]}, "1", None, ""),
        ("1.jfif 2.JPE 3.pnm 4.j2k", {}, "1234", None, ""),
    ],
)
def test_which_images_are_used(folder, load, names, options, used, labels, said):
    names = names.split()
    make(folder, names)
    data = load(**options)
    values = {100 + int(digit) - 1 for digit in used}
    assert set(data.images[:, 0, 0, 0].tolist()) == values
    assert len(data) == len(used)
    assert said in data.source
    assert (None if labels is None else [int(digit) for digit in labels]) == (
        None if data.labels() is None else data.labels().tolist()
    )


def test_the_test_folder_is_held_out(folder, cache_dir):
    make(folder, ["train/1.png", "train/2.png", "test/3.png"])
    split = load_data_split(train_data_dir=folder, cache_dir=cache_dir)
    assert split.held_out[:, 0, 0, 0].tolist() == [102]
    assert split.data.splits == ("train", "test")
    with pytest.raises(ValueError, match=r"validation_split is 'test': give none"):
        load_data_split("test", train_data_dir=folder, cache_dir=cache_dir, split="test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "split is 'val': give train or test"),
        ({"include": "x*"}, r"include is 'x\*'.*none of the 2 images"),
        ({"exclude": "*"}, r"exclude is '\*'.*none of the 2 images"),
        ({"include": "a,,b"}, "include is 'a,,b'"),
        ({"exclude": 3}, "exclude is 3"),
        ({"train_data_dir": ""}, "train_data_dir is ''"),
        ({"image_column": "photo"}, "image_column is 'photo'"),
        ({"dataset_name": "moons", "include": "x"}, "include is 'x'"),
    ],
)
def test_an_option_that_leaves_nothing_is_named(folder, load, options, message):
    make(folder, ["train/1.png", "test/2.png"])
    with pytest.raises(ValueError, match=message):
        load(**options)


@pytest.mark.parametrize(
    "files",
    ["config.yaml metrics.jsonl", "training.json", "model_index.json", "images.npy names.txt meta.json"],
)
def test_what_a_run_wrote_into_the_folder_is_left_out(folder, load, files):
    make(folder, ["a.png", "runs/mine/samples/step-10.png"])
    for name in files.split():
        (folder / "runs" / "mine" / name).write_text("{}")
    data = load()
    assert data.images[:, 0, 0, 0].tolist() == [100]
    assert "written by a run and left out: runs/mine" in data.source


def test_links_in_the_cache_of_the_hub_are_followed_and_others_on_request(tmp_path, load):
    repository = tmp_path / "hub" / "datasets--user--cats"
    snapshot = repository / "snapshots" / "0123abcd"
    make(repository, ["blobs/aaaa"])
    make(tmp_path, ["secret/x.png", "secret/y.png"])
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "a.png").symlink_to("../../../blobs/aaaa")
    assert len(load(train_data_dir=snapshot)) == 1
    assert len(load(train_data_dir=snapshot / "data")) == 1
    (snapshot / "data" / "b.png").symlink_to(tmp_path / "secret" / "x.png")
    for i in range(8):
        (snapshot / f"c{i}").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"c0, c1, c2, c3, c4, and 4 more: replace them, or give --follow_links"):
        load(train_data_dir=snapshot)
    (tmp_path / "secret" / "back").symlink_to(snapshot)  # a cycle ends
    assert len(load(train_data_dir=snapshot, follow_links=True)) == 4


def test_a_run_is_said_and_left_out_although_the_images_are_in_the_cache(folder, load):
    make(folder, ["a.png"])
    assert "run" not in load().source
    make(folder, ["samples/step-10.png", "mine/samples/step-10.png"])
    for run in (folder, folder / "mine"):  # the folder of the images is that of a run, and has another
        (run / "config.yaml").write_text("{}")
        (run / "metrics.jsonl").write_text("{}")
    data = load()
    assert len(data) == 1
    assert "written by a run and left out: mine, samples" in data.source


def test_a_link_to_a_hidden_folder_in_the_folder_is_a_class(folder, load):
    make(folder, [".store/cats/1.png", "dogs/2.png"])
    (folder / "cats").symlink_to(".store/cats")
    (folder / "again").symlink_to("dogs")
    (folder / "loop").symlink_to(".")
    os.mkfifo(folder / "pipe.png")  # which would never end
    data = load()
    assert data.images[:, 0, 0, 0].tolist() == [100, 101]
    assert data.labels().tolist() == [0, 1]


def test_dark_data_is_said_with_its_range(folder, load):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3).save(folder / "a.png")
    for _ in range(2):
        assert "; no pixel is brighter than 2 of 255," in load().source
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(folder / "a.png")
    assert "; no pixel is brighter than 4095 of 65535," in load().source
    Image.fromarray(np.full((8, 8), 26, np.uint8)).save(folder / "a.png")
    assert "brighter" not in load().source
