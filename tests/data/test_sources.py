"""Folders of images, parquet files and the moons: what is listed and what is refused; the real data sets."""

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_pipeline.moons import MoonDataset
from tests.arrays import random_images
from tests.data.image_files import cell, chw, write_parquet
from tests.data.shard_files import pixels_of
from training.data import cache, sources
from training.data.cache import UnreadableImagesError, load_images

ROOT = Path(__file__).parents[2]


# ---- A folder of images ----------------------------------------------------------------------------------------------


def test_other_files_are_ignored_and_counted(folder, load):
    Image.new("L", (4, 4)).save(folder / "a.PNG")
    for name in (".hidden.png", "notes.txt", "drawing.svg", "metadata.csv"):
        (folder / name).write_text("x")
    data = load()
    assert data.source.startswith("1 images of folder photos (4 other files ignored)")
    assert data.channels == 1


def test_a_cache_inside_the_folder_is_not_read_as_images(folder):
    np.save(folder / "a.npy", random_images(4, 4))
    for resolution in (4, 2, 3):
        assert len(load_images(train_data_dir=folder, cache_dir=folder / "cache", resolution=resolution)) == 1


def test_links_that_lead_out_of_the_folder_are_refused_and_named(folder, load, tmp_path):
    (tmp_path / "secret").mkdir()
    Image.new("L", (4, 4), 70).save(tmp_path / "secret" / "a.png")
    Image.new("L", (4, 4), 50).save(folder / "a.png")
    (folder / "inside.png").symlink_to("a.png")
    (folder / "around").symlink_to(".")  # a cycle: its images are listed where they are
    assert load().images[:, 0, 0, 0].tolist() == [50, 50]
    (folder / "file.png").symlink_to(tmp_path / "secret" / "a.png")
    (folder / "folder").symlink_to(tmp_path / "secret")
    with pytest.raises(
        ValueError, match=r"links lead out of it: file\.png, folder: replace them, or give --follow_links$"
    ):
        load()


def test_empty_and_missing_folders_are_errors(folder, load, tmp_path):
    with pytest.raises(ValueError, match=r"photos.*give a folder with images"):
        load()
    with pytest.raises(ValueError, match=r"gone.*no such folder"):
        load(train_data_dir=tmp_path / "gone")
    with pytest.raises(ValueError, match=r"photos.*no parquet file.*train_data_dir"):
        load(dataset_name=str(folder))
    (folder / "data").mkdir()
    (folder / "data" / "train.parquet").touch()
    with pytest.raises(ValueError, match=r"photos.*has parquet files: give it as dataset_name"):
        load()


# ---- Parquet files and the Hub ---------------------------------------------------------------------------------------


def test_labels_come_from_the_table_or_from_the_folders(folder, load):
    rows = [cell(random_images(5, 6, 3, seed=i)) for i in range(5)]
    rows[1] = {"bytes": b"nonsense", "path": "b.png"}
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", photo=rows, label=[7, 1, 3, 7, 3])
    data = load(dataset_name=str(folder), on_bad_image="skip")
    assert data.labels().tolist() == [1, 0, 1, 0]  # 7, 3, 7, 3: without the unreadable one

    for name in ("cats/tabby/a.png", "dogs/b.png", "cats/c.png"):
        (folder / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_images(8, 8, 3)).save(folder / "pets" / name)
    data = load(train_data_dir=folder / "pets")
    labelled = [(data.name(i), label) for i, label in enumerate(data.labels().tolist())]
    assert labelled == [("cats/c.png", 0), ("cats/tabby/a.png", 0), ("dogs/b.png", 1)]
    assert load(train_data_dir=folder / "pets" / "dogs").labels() is None
    assert load(dataset_name="moons", resolution=8).labels() is None


def test_parquet_without_feature_types_and_with_unreadable_rows(folder, load):
    images = [random_images(5, 6, 3, seed=i) for i in range(3)]
    rows = [cell(pixels) for pixels in images]
    Image.fromarray(images[2]).save(folder / "c.png")
    rows[2] = {"bytes": None, "path": str(folder / "c.png")}  # as for a folder of images on the Hub
    rows[1:1] = [{"bytes": b"nonsense", "path": "b.png"}, {"bytes": b"", "path": str(folder / "c.png")}, None]
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", photo=rows, label=[0] * 6)
    with pytest.raises(
        UnreadableImagesError,
        match=r"(?s)3 of 6.*row 1 \(b\.png\): not an image.*row 2 \(c\.png\): empty.*row 3: empty",
    ):
        load(dataset_name=str(folder))
    data = load(dataset_name=str(folder), on_bad_image="skip")
    np.testing.assert_array_equal(data.images, [chw(pixels) for pixels in images])
    assert len(data.skipped) == 3

    with pytest.raises(ValueError, match=r"split is 'trian'.*(Unknown split|train)"):
        load(dataset_name=str(folder), split="trian")
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", a=rows[:1], b=rows[:1], label=[0])
    with pytest.raises(ValueError, match=r"image columns are a, b: choose one by image_column"):
        load(dataset_name=str(folder))
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", label=[0])
    with pytest.raises(ValueError, match=r"none of its columns has images: label"):
        load(dataset_name=str(folder))
    (folder / "data" / "train-00000-of-00001.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="dataset_name is"):
        load(dataset_name=str(folder))


@pytest.mark.parametrize("name", ["set[1]", "set*", "set?"])
def test_a_folder_of_tables_may_be_named_as_a_pattern(tmp_path, load, name):
    write_parquet(tmp_path / "set1" / "train.parquet", photo=[cell(pixels_of(0))])
    write_parquet(tmp_path / name / "train.parquet", photo=[cell(pixels_of(1)), cell(pixels_of(2))])
    assert len(load(dataset_name=str(tmp_path / name))) == 2
    with pytest.raises(ValueError, match=r"image_column is 'x': give photo"):
        load(dataset_name=str(tmp_path / name), image_column="x")


def test_a_data_set_that_does_not_exist_is_named(load, monkeypatch):
    import datasets

    def missing(name, *_, **__):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    monkeypatch.setattr(sources, "hub_commit", lambda *_: None)
    with pytest.raises(ValueError, match=r"dataset_name is 'nobody/nothing'.*does not load from the Hub: Dataset"):
        load(dataset_name="nobody/nothing")


# ---- The moons -------------------------------------------------------------------------------------------------------


def test_the_moons_are_drawn_once(load, monkeypatch):
    monkeypatch.setitem(sources.NUM_MOONS, "train", 300)
    data = load(dataset_name="moons")
    np.testing.assert_array_equal(data.images, MoonDataset(300, 32, seed=0).images().numpy())
    assert data.source == "300 moons, drawn with seed 0, 32 x 32"
    assert load(dataset_name="moons", resolution=(16, 24)).images.shape == (300, 1, 16, 24)
    monkeypatch.setattr(cache, "write_moons", lambda *_, **__: pytest.fail("drawn again"))
    assert len(load(dataset_name="moons")) == 300


# ---- The real data sets ----------------------------------------------------------------------------------------------


def first_of(file, column):
    from pyarrow import parquet

    batch = next(parquet.ParquetFile(file).iter_batches(1))
    return np.asarray(Image.open(io.BytesIO(batch[column][0].as_py()["bytes"])))


def test_mnist(load, shared_data):
    data = load(dataset_name=str(shared_data / "mnist"))
    assert data.images.shape == (60000, 1, 28, 28)
    assert data.images.dtype == np.uint8
    first = first_of(shared_data / "mnist/mnist/train-00000-of-00001.parquet", "image")
    np.testing.assert_array_equal(data.images[0, 0], first)
    assert data.images.mean() == pytest.approx(33.3184, abs=1e-4)  # the known mean of these 60,000
    assert data.source == "60000 images of data set mnist, split train"


def test_cifar10(load, shared_data):
    data = load(dataset_name=str(shared_data / "cifar10"), split="test")
    assert data.images.shape == (1000, 3, 32, 32)
    first = first_of(shared_data / "cifar10/plain_text/test-00000-of-00001.parquet", "img")
    np.testing.assert_array_equal(data.images[0], chw(first))


READ_CACHE = """
import json, sys, time
from training.data.cache import load_images
seconds = []
for _ in range(3):
    start = time.perf_counter()
    data = load_images(train_data_dir=sys.argv[1], cache_dir=sys.argv[2])
    seconds.append(time.perf_counter() - start)
print(json.dumps([min(seconds), len(data), "datasets" in sys.modules, "torch" in sys.modules]))
"""


def test_crawl_tiles_without_and_with_a_cache(tmp_path, shared_data):
    tiles = shared_data / "crawl-tiles"
    data = load_images(train_data_dir=tiles, cache_dir=tmp_path)
    paths = sorted(tiles.rglob("*.png"), key=lambda path: path.relative_to(tiles).as_posix())
    sizes = Counter()
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            sizes[image.size] += 1
            if i % 40 == 0 and image.size == (32, 32):
                layer = Image.new("RGBA", image.size, "white")
                layer.alpha_composite(image.convert("RGBA"))  # Pillow's own, which rounds differently
                difference = data.images[i].astype(int) - chw(np.asarray(layer)[..., :3])
                assert np.abs(difference).max() <= 1
    assert data.images.shape == (len(paths), 3, 32, 32) == (4357, 3, 32, 32)
    resized = 4357 - sizes[32, 32]
    assert data.source == f"4357 images of folder crawl-tiles (2 other files ignored); {resized} resized to 32 x 32"

    line = [sys.executable, "-c", READ_CACHE, str(tiles), str(tmp_path)]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, number, *imported = json.loads(result.stdout)
    assert (number, imported) == (4357, [False, False])
    assert not result.stderr  # no progress bar: nothing was decoded
    assert seconds < 0.5
