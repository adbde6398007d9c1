"""Labels and their names: of metadata files, as `datasets` reads them, of columns, of folders."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.data.image_files import cell, write_parquet
from training.data.classes import find_classes
from training.data.split import load_data_split


def make(root, names, **files):
    for i, name in enumerate(names.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100 + i).save(root / name)
    for name, text in files.items():
        name = name.replace("__", "/").replace("_csv", ".csv").replace("_jsonl", ".jsonl")
        (root / name).write_text(text, encoding="utf-8")


CSV = "file_name,label,species\na.png,pet,cat\nb.png,wild,owl\nc/d.png,pet,dog\n"
JSONL = "".join(
    json.dumps(dict(zip(("file_name", "label", "species"), line.split(",")))) + "\n" for line in CSV.split()[1:]
)


@pytest.mark.parametrize("files", [{"metadata_csv": CSV}, {"metadata_jsonl": JSONL}])
@pytest.mark.parametrize(("column", "names"), [(None, ["pet", "wild", "pet"]), ("species", ["cat", "owl", "dog"])])
def test_labels_of_a_metadata_file_are_those_of_datasets(folder, load, tmp_path, files, column, names):
    make(folder, "a.png b.png c/d.png", **files)
    data = load(label_column=column)
    assert data.label_names() == names
    table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "d"))
    theirs = {np.asarray(row["image"])[0, 0].item(): row[column or "label"] for row in table}
    assert {int(data.images[i, 0, 0, 0]): name for i, name in enumerate(data.label_names())} == theirs
    assert data.class_names() == tuple(sorted(set(names)))
    assert [data.class_names()[label] for label in data.labels()] == names
    assert f"labels: {column or 'label'} of metadata." in data.source


def test_labels_below_splits_and_the_deeper_file_counts(folder, cache_dir):
    make(
        folder,
        "train/a.png train/b.png test/c.png",
        metadata_csv="file_name,label\ntrain/a.png,x\ntrain/b.png,x\ntest/c.png,2\n",
        train__metadata_csv="\ufefffile_name,label\na.png,1\n./b.png,2\n",
    )
    split = load_data_split(train_data_dir=folder, cache_dir=cache_dir)
    classes = find_classes(split)
    assert (classes.names, classes.data.tolist(), classes.held_out.tolist()) == (("1", "2"), [0, 1], [1])


def test_other_labels_are_another_cache(folder, load):
    for text, names in (("a.png,x\nb.png,y\n", ["x", "y"]), ("a.png,y\nb.png,x\n", ["y", "x"])):
        make(folder, "a.png b.png", metadata_csv=f"file_name,label\n{text}")
        assert load().label_names() == names


def test_numbers_are_sorted_as_numbers(folder, load):
    make(folder, "a.png b.png c.png", metadata_csv="file_name,label\na.png,10\nb.png,9\nc.png,-1\n")
    data = load()
    assert (data.class_names(), data.labels().tolist()) == (("-1", "9", "10"), [2, 1, 0])


def test_what_is_missing_is_said(folder, load, cache_dir):
    make(
        folder,
        "a.png b.png c.png d.png",
        metadata_csv="file_name,label\na.png,x\nb.png,y\nc.png,\ngone.png,x\n../up.png,x\n",
    )
    data = load()
    assert data.label_names() == ["x", "y", None, None]
    assert data.labels().tolist() == [0, 1, 2, 2]
    assert "2 rows there name no image: gone.png, ../up.png; 2 images without a label: c.png, d.png" in data.source
    with pytest.raises(ValueError, match=r"2 images have no label, the first is c\.png"):
        find_classes(load_data_split(train_data_dir=folder, cache_dir=cache_dir))


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"metadata_csv": "file_name,label\na.png,x\na.png,y\n"}, {}, "line 3: a.png is 'x' before and 'y' here"),
        ({"metadata_csv": CSV, "metadata_jsonl": JSONL}, {}, "metadata.csv and metadata.jsonl: keep one"),
        ({"metadata_jsonl": "{"}, {}, "metadata.jsonl cannot be read"),
        ({"metadata_jsonl": "3\n"}, {}, "line 1: give an object"),
        ({"metadata_csv": CSV}, {"label_column": "kind"}, "label_column is 'kind'.*has file_name, label, species"),
        ({}, {"label_column": "kind"}, "label_column is 'kind': there is no metadata.csv or metadata.jsonl"),
        ({}, {"dataset_name": "moons", "label_column": "x"}, "label_column is 'x': the moons have no labels"),
    ],
)
def test_wrong_metadata_is_named(folder, load, files, options, message):
    make(folder, "a.png c/b.png", **files)
    with pytest.raises(ValueError, match=message):
        load(**options)


@pytest.mark.parametrize("text", ["file_name,caption\na.png,a cat\n", "image,label\na.png,cat\n"])
def test_metadata_without_labels_leaves_the_folders(folder, load, text):
    make(folder, "x/a.png y/b.png", metadata_csv=text)
    data = load()
    assert data.class_names() == ("x", "y") and "labels" not in data.source
    assert "metadata.csv is not used: it needs the columns file_name and label" in data.source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,Label\na.png,x\nb.png,y\n", r"needs the columns file_name and label .* and has file_name, Label"),
        ("file_name;label\na.png;x\nb.png;y,z\n", r"and has file_name;label"),
        ("a.png,x\nb.png,y\n", r"and has a\.png, x"),
        ("file_name,label\n", r"and has no row"),
        ("file_name,label\nimages/a.png,x\nimages/b.png,y\n", r"2 rows there name no image: images/a\.png, images/b"),
    ],
)
def test_why_a_metadata_file_gives_no_labels_is_said(folder, cache_dir, text, message):
    make(folder, "a.png b.png", metadata_csv=text)
    with pytest.raises(ValueError, match=f"have 0 different labels.*{message}"):
        find_classes(load_data_split(train_data_dir=folder, cache_dir=cache_dir))


def test_folders_below_a_common_one_are_classes(folder, load):
    make(folder, "all/x/1.png all/x/deep/2.png all/y/3.png all/4.png")
    data = load()
    assert (data.class_names(), data.labels().tolist()) == (("x", "y"), [2, 0, 0, 1])


def test_the_order_of_a_column_of_classes_is_kept(folder, load, cache_dir):
    rows = [cell(np.full((8, 8), 100 + i, np.uint8)) for i in range(4)]
    columns = {"image": datasets.Image(), "fine": datasets.ClassLabel(names=["owl", "unused", "ant"])}
    columns["coarse"] = datasets.ClassLabel(names=["b", "a"])
    values = {"image": rows, "fine": [2, 0, -1, 2], "coarse": [0, 1, 0, 1]}
    (folder / "data").mkdir()
    datasets.Dataset.from_dict(values, datasets.Features(columns)).to_parquet(folder / "data" / "train.parquet")
    data = load(dataset_name=str(folder), label_column="fine")
    assert (data.class_names(), data.labels().tolist()) == (("owl", "ant"), [1, 0, 2, 1])
    assert load(dataset_name=str(folder), label_column="coarse").class_names() == ("b", "a")
    assert load(dataset_name=str(folder)).class_names() == ()  # two columns, and none is chosen
    with pytest.raises(ValueError, match="label_column is 'x': the data set has no such column: give fine, coarse"):
        load(dataset_name=str(folder), label_column="x")


@pytest.mark.parametrize(
    ("test_labels", "message"), [(["cat", "fox"], "no training image has: fox"), (["cat", None], "has: None")]
)
def test_held_out_images_of_other_classes_are_refused(folder, cache_dir, test_labels, message):
    rows = [cell(np.full((8, 8), 100 + i, np.uint8)) for i in range(2)]
    write_parquet(folder / "train.parquet", image=rows, label=["dog", "cat"])
    write_parquet(folder / "test.parquet", image=rows, label=test_labels)
    split = load_data_split(dataset_name=str(folder), cache_dir=cache_dir)
    with pytest.raises(ValueError, match=message):
        find_classes(split)
    assert find_classes(load_data_split("none", dataset_name=str(folder), cache_dir=cache_dir)).names == ("cat", "dog")


def test_fewer_than_two_classes_are_refused(folder, cache_dir):
    make(folder, "x/1.png x/2.png")
    with pytest.raises(ValueError, match=r"have 0 different labels.*metadata.csv"):
        find_classes(load_data_split(train_data_dir=folder, cache_dir=cache_dir))
