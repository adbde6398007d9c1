"""An empty folder for images, an empty cache, and `load_images` between the two."""

import pytest

from training.data.cache import load_images


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def load(cache_dir, folder):
    def load(**options):
        if "dataset_name" not in options:
            options.setdefault("train_data_dir", folder)
        return load_images(cache_dir=cache_dir, **options)

    return load
