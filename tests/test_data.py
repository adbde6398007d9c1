"""Pictures against outside truths: pixels set by hand, formulas, Pillow's own transforms, and the real data sets."""

import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm_pipeline.moons import MoonDataset
from training.data import cache as data_cache
from training.data import split as data_split
from training.data.cache import BadImagesError, load_images

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


def needs(folder):
    return pytest.mark.skipif(not (SHARED / folder).is_dir(), reason=f"{folder} is not there: ../shared/data/{folder}")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def load(cache, folder):
    def load(**options):
        if "dataset_name" not in options:
            options.setdefault("train_data_dir", folder)
        return load_images(cache_dir=cache, **options)

    return load


def noise(*shape, high=256, seed=0):
    values = np.random.default_rng(seed).integers(0, high, shape)
    return values.astype(np.uint8 if high <= 256 else np.uint16)


def smooth(height, width, channels=3):
    """Slow waves, so that a resized picture can be told from a formula."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 60 * np.sin(x / width * (c + 1)) + 40 * np.cos(y / height * 3) for c in range(channels)]
    return np.stack(waves, axis=2).round().astype(np.uint8)


def chw(pixels):
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


# ---- Pixels ----------------------------------------------------------------------------------------------------------


def test_lossless_pixels_are_kept_in_the_order_of_the_names(folder, load):
    pictures = [noise(6, 9, 3, seed=i) for i in range(12)]
    for i, pixels in enumerate(pictures):
        path = folder / "test" / f"class{i % 3}" / f"{i:02}.{('png', 'bmp', 'TIFF', 'webp')[i % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, lossless=True)
    images = load()
    assert images.images.shape == (12, 3, 6, 9)
    assert (len(images), images.channels, images.height, images.width, images.max_value) == (12, 3, 6, 9, 255)
    assert isinstance(images.images, np.memmap)
    assert not images.images.flags.writeable
    by_name = sorted(range(12), key=lambda i: (i % 3, i))
    np.testing.assert_array_equal(images.images, [chw(pictures[i]) for i in by_name])


def test_gray_gives_one_channel_and_colour_among_gray_gives_three(folder, load):
    gray, colour = noise(5, 4), noise(5, 4, 3)
    Image.fromarray(gray).save(folder / "a.png")
    assert load().images.tolist() == [[gray.tolist()]]
    Image.fromarray(colour).save(folder / "b.png")
    np.testing.assert_array_equal(load().images, [[gray] * 3, chw(colour)])


def test_one_bit_palette_and_cmyk(folder, load):
    bits = noise(5, 7, high=2)
    Image.fromarray(bits.astype(bool)).save(folder / "1.png")
    np.testing.assert_array_equal(load().images[0, 0], bits * 255)

    index, table = noise(5, 7, high=16), noise(16, 3, seed=1)
    palette = Image.fromarray(index, "L").convert("P")
    palette.putpalette(table.tobytes())
    palette.putdata(index.ravel().tolist())
    palette.save(folder / "p.png")

    cmyk = noise(5, 7, 4, seed=2)
    Image.fromarray(cmyk, "CMYK").save(folder / "cmyk.tif")

    one, from_cmyk, from_palette = load().images.astype(float)
    np.testing.assert_array_equal(one, [bits * 255] * 3)
    np.testing.assert_array_equal(from_palette, chw(table[index]))
    ink = cmyk / 255  # what each ink leaves of white: (1 - c) (1 - k)
    np.testing.assert_allclose(from_cmyk, chw(255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])), atol=1)


@pytest.mark.parametrize("background", ["white", "black", "#ff8000"])
def test_alpha_is_composited_on_the_background(folder, load, background):
    behind = {"white": [255] * 3, "black": [0] * 3, "#ff8000": [255, 128, 0]}[background]
    layers = noise(16, 16, 4)
    layers[0] = [255, 0, 0, 0]  # red that nobody can see
    Image.fromarray(layers).save(folder / "a.png")

    clear = Image.new("P", (16, 16), 1)
    clear.putpalette([0, 0, 255, 0, 255, 0])
    clear.putpixel((0, 0), 0)
    clear.save(folder / "p.gif", transparency=0)

    Image.fromarray(layers[..., :3]).save(folder / "t.png", transparency=(255, 0, 0))

    blend, palette, keyed = load(background=background).images
    alpha = layers[..., 3:].astype(float)
    expected = (layers[..., :3] * alpha + np.array(behind) * (255 - alpha)) / 255
    np.testing.assert_array_equal(blend, chw(np.rint(expected)))
    assert palette[:, 0, 0].tolist() == behind
    assert palette[:, 5, 5].tolist() == [0, 255, 0]
    assert keyed[:, 0, 0].tolist() == behind
    np.testing.assert_array_equal(keyed[:, 1:], chw(layers[1:, :, :3]))


def test_gray_alpha_is_composited_on_the_luminance(folder, load):
    layers = noise(8, 8, 2)
    Image.fromarray(layers, "LA").save(folder / "a.png")
    for background, luminance in (("white", 255), ("#ff8000", 0.299 * 255 + 0.587 * 128)):
        images = load(background=background)
        alpha = layers[..., 1] / 255
        expected = layers[..., 0] * alpha + luminance * (1 - alpha)
        assert images.channels == 1
        np.testing.assert_allclose(images.images[0, 0], expected, atol=1)
    Image.new("RGB", (8, 8)).save(folder / "b.png")  # beside a colour picture the background has its colour
    layers[0, 0] = 0
    Image.fromarray(layers, "LA").save(folder / "a.png")
    assert load(background="#ff8000").images[0, :, 0, 0].tolist() == [255, 128, 0]


def test_sixteen_bits_are_kept_and_eight_are_scaled_to_them(folder, load):
    wide = noise(6, 5, high=65536)
    wide[0, :3] = 0, 256, 65535
    Image.fromarray(wide).save(folder / "a.png")
    Image.fromarray(wide).save(folder / "b.tif")
    Image.fromarray(wide.astype(">u2")).save(folder / "c.tif")  # the other byte order
    gray = noise(6, 5)
    gray[0, :2] = 0, 255
    Image.fromarray(gray).save(folder / "d.png")
    images = load()
    assert images.images.dtype == np.uint16
    assert images.max_value == 65535
    np.testing.assert_array_equal(images.images[:3, 0], [wide] * 3)
    np.testing.assert_array_equal(images.images[3, 0], gray * 257.0)
    assert images.images[3, 0, 0, 1] == 65535

    colour = noise(6, 5, 3)
    Image.fromarray(colour).save(folder / "e.png")
    images = load()
    np.testing.assert_array_equal(images.images[0], [wide] * 3)
    np.testing.assert_array_equal(images.images[4], chw(colour * 257.0))


def png(width, height, depth, kind, rows, *chunks):
    """A PNG made by hand, for what Pillow cannot write. Every row begins with its filter, 0."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", packed)
        + chunk(b"IEND", b"")
    )


def test_sixteen_bit_gray_with_one_transparent_value(folder, load):
    wide = np.array([[7, 8], [9, 65535]], ">u2")
    (folder / "a.png").write_bytes(png(2, 2, 16, 0, wide, (b"tRNS", b"\0\x08")))
    assert load(background="#808080").images.tolist() == [[[[7, 128 * 257], [9, 65535]]]]


def test_sixteen_bits_of_colour_are_narrowed_and_it_is_said(folder, load):
    wide = noise(2, 3, 3, high=65536)
    (folder / "a.png").write_bytes(png(3, 2, 16, 2, wide.astype(">u2")))
    images = load()
    np.testing.assert_array_equal(images.images[0], chw(wide >> 8))
    assert "1 of 16 bits per colour channel, of which 8 are kept" in images.source
    gray_alpha = np.array([[[40000, 65535], [1000, 0]]], ">u2")
    (folder / "a.png").write_bytes(png(2, 1, 16, 4, gray_alpha))
    assert load().images.tolist() == [[[[40000 >> 8, 255]]]]  # and gray with alpha is gray


def test_arrays_give_any_number_of_channels(folder, load):
    five, more = noise(4, 6, 5), noise(4, 6, 5, seed=1)
    np.save(folder / "a.npy", five)
    np.save(folder / "b.npy", np.asfortranarray(more))
    np.testing.assert_array_equal(load().images, [chw(five), chw(more)])
    wide = noise(4, 6, 5, high=65536)
    np.save(folder / "b.npy", wide.astype(">u2"))
    images = load()
    np.testing.assert_array_equal(images.images, [chw(five * 257.0), chw(wide)])
    assert load(resolution=(2, 3)).images.shape == (2, 5, 2, 3)
    Image.fromarray(noise(4, 6)).save(folder / "c.png")
    with pytest.raises(ValueError, match=r"a\.npy has 5 channels and c\.png has 1"):
        load()


def test_channels_that_do_not_go_together_are_named_when_gray_and_colour_come_first(folder, load):
    for name, shape in (("a", (4, 4)), ("b", (4, 4, 3)), ("c", (4, 4, 2))):
        np.save(folder / f"{name}.npy", noise(*shape))
    with pytest.raises(ValueError, match=r"a\.npy has 1 channels and c\.npy has 2"):
        load()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_all_orientations_come_upright(folder, load, suffix):
    upright = smooth(16, 24)
    stored = {  # EXIF: where row 0 and column 0 of the stored picture are to be shown
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),  # shown turned clockwise, so stored turned the other way
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = folder / f"{orientation}.{suffix}"
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, lossless=True, quality=100, subsampling=0)
    images = load()
    assert images.images.shape == (8, 3, 16, 24)  # by the headers: no picture was resized
    assert "resized" not in images.source
    for orientation in stored:
        with Image.open(folder / f"{orientation}.{suffix}") as image:
            np.testing.assert_array_equal(
                images.images[orientation - 1], chw(np.asarray(ImageOps.exif_transpose(image)))
            )
        difference = np.abs(images.images[orientation - 1].astype(int) - chw(upright))
        assert difference.max() <= (0 if suffix != "jpg" else 3)


def test_the_first_frame_of_an_animation(folder, load):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "png", "webp"):
        frames[0].save(folder / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True, duration=50)
    frames[0].save(folder / "b.tif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "one.png")
    data = load()
    assert data.images[:, :, 2, 2].tolist() == [[255, 0, 0]] * 5
    assert "4 of several frames, of which the first is kept" in data.source


# ---- Size ------------------------------------------------------------------------------------------------------------


def test_the_most_common_size_is_taken(folder, load):
    for i, (height, width) in enumerate([(8, 8), (6, 10), (6, 10), (12, 20)]):
        Image.fromarray(smooth(height, width)).save(folder / f"{i}.png")
    images = load()
    assert images.images.shape == (4, 3, 6, 10)
    assert "2 resized to 6 x 10" in images.source
    assert load(resolution=4).images.shape[2:] == (4, 4)
    assert load(resolution=[5, 4]).images.shape[2:] == (5, 4)


@pytest.mark.parametrize("high", [256, 65536])
@pytest.mark.parametrize(("resolution", "rows", "columns"), [(16, (0, 32), (16, 48)), ((8, 32), (8, 24), (0, 64))])
def test_the_middle_is_kept_or_all_is_squeezed(folder, load, high, resolution, rows, columns):
    """A linear ramp stays one when it is resized, away from the edges."""
    y, x = np.mgrid[0:32, 0:64] + 0.5
    unit = high / 256
    ramp = ((2 * y + 3 * x) * unit * 0.9).round()
    pixels = ramp.astype(np.uint8 if high == 256 else np.uint16)
    Image.fromarray(pixels).save(folder / "a.png")
    height, width = cache._height_width(resolution)

    def expected(top, bottom, left, right):
        y, x = np.mgrid[0:height, 0:width] + 0.5
        y, x = top + y * (bottom - top) / height, left + x * (right - left) / width
        return (2 * y + 3 * x) * unit * 0.9

    cropped = load(resolution=resolution).images[0, 0]
    squeezed = load(resolution=resolution, center_crop=False).images[0, 0]
    inner = np.s_[2:-2, 3:-3]
    atol = 1.5 if high == 256 else 40  # one pixel beside would be 1.8 or 460 more
    np.testing.assert_allclose(cropped[inner], expected(*rows, *columns)[inner], atol=atol)
    np.testing.assert_allclose(squeezed[inner], expected(0, 32, 0, 64)[inner], atol=atol)


def test_sixteen_bit_edges_do_not_wrap_around(folder, load):
    pixels = np.zeros((16, 16), np.uint16)
    pixels[:, 8:] = 65535  # Lanczos goes beyond both ends here
    Image.fromarray(pixels).save(folder / "a.png")
    image = load(resolution=24).images[0, 0].astype(int)
    assert (image[:, :11] < 10000).all()
    assert (image[:, 13:] > 55000).all()
    assert {0, 65535} <= set(image.ravel().tolist())


# ---- Bad pictures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(folder):
    """Two good pictures and every kind of bad one: {name: a word of the reason}."""
    good = Image.fromarray(smooth(64, 64))
    good.save(folder / "good1.png")
    good.save(folder / "good2.jpg")
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        stream = io.BytesIO()
        good.save(stream, name.split(".")[1].replace("jpg", "jpeg"))
        (folder / name).write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    good.save(folder / "flipped.png", compress_level=0)
    flipped = bytearray((folder / "flipped.png").read_bytes())
    flipped[len(flipped) // 2] ^= 4  # one bit of one pixel
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("I am not a picture")
    (folder / "text.npy").write_text("I am not an array, either")
    (folder / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "bomb.png").write_bytes(png(20000, 20000, 8, 0, []))
    (folder / "smallbomb.png").write_bytes(png(10000, 10000, 8, 0, []))  # Pillow only warns of this one
    Image.fromarray(np.full((9, 9), 300, np.int32)).save(folder / "int.tif")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(folder / "float.tif")
    np.save(folder / "float.npy", np.zeros((9, 9)))
    np.save(folder / "flat.npy", np.zeros(9, np.uint8))
    np.save(folder / "object.npy", np.array([[None]]), allow_pickle=True)
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    return {
        **{"cut.png": "", "cut.jpg": "truncated", "cut.webp": "", "flipped.png": "", "empty.png": "empty"},
        **{"text.png": "not an image", "text.npy": "magic", "program.png": "not an image"},
        **{"bomb.png": "decompression bomb", "smallbomb.png": "decompression bomb", "int.tif": "32-bit"},
        **{"float.tif": "floating point", "float.npy": "float64", "flat.npy": "(9,)", "object.npy": "object"},
        **{"nowhere.png": "No such file"},
    }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_bad_pictures_are_named_at_once(load, broken, num_workers, tmp_path):
    with pytest.raises(BadImagesError) as caught:
        load(num_workers=num_workers)
    first, *lines = str(caught.value).split("\n  ")
    assert first.startswith("16 of 18 images cannot be read")
    reasons = dict(line.split(": ", 1) for line in lines)
    assert list(reasons) == sorted(broken)
    for name, word in broken.items():
        assert reasons[name]
        assert word.lower() in reasons[name].lower()
    assert str(tmp_path) not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert not list((tmp_path / "cache").iterdir())  # nothing half made is left


def test_bad_pictures_are_left_out_on_request_and_remembered(load, broken, monkeypatch):
    images = load(on_bad_image="skip")
    assert images.images.shape == (2, 3, 64, 64)
    np.testing.assert_array_equal(images.images[0], chw(smooth(64, 64)))
    assert [line.split(": ")[0] for line in images.skipped] == sorted(broken)
    assert "2 images of folder pictures; 16 unreadable and left out" in images.source
    monkeypatch.setattr(data_cache, "_decode_all", lambda *_, **__: pytest.fail("decoded again"))
    again = load(on_bad_image="skip")
    assert (again.skipped, again.source) == (images.skipped, images.source)
    np.testing.assert_array_equal(again.images, images.images)


def test_pictures_that_are_too_small_are_named(folder, load):
    for height, width in ((64, 64), (1, 1), (2000, 3), (3, 2000), (8, 9)):
        Image.fromarray(smooth(height, width)).save(folder / f"{height}x{width}.png")
    with pytest.raises(BadImagesError) as error:
        load(min_side=8)
    for name in ("1x1", "2000x3", "3x2000"):
        assert f"{name}.png: {name.replace('x', ' x ')} pixels: min_side is 8" in str(error.value)
    assert "3 of 5 images" in str(error.value)
    assert len(load(min_side=8, on_bad_image="skip")) == 2
    assert len(load(min_side=9, on_bad_image="skip")) == 1
    assert len(load()) == 5
    assert load(min_side=8, on_bad_image="skip").name(1) == "8x9.png"
    with pytest.raises(ValueError, match="min_side is 0"):
        load(min_side=0)


def test_only_bad_pictures_is_an_error_also_with_skip(folder, load):
    (folder / "a.png").touch()
    with pytest.raises(BadImagesError, match=r"(?s)1 of 1 images.*a\.png: empty"):
        load(on_bad_image="skip")


def test_warnings_are_left_as_they_were(folder, load):
    Image.new("L", (4, 4)).save(folder / "a.png")
    before = list(warnings.filters)
    load()
    assert warnings.filters == before


# ---- The folder ------------------------------------------------------------------------------------------------------


def test_other_files_are_ignored_and_counted(folder, load):
    Image.new("L", (4, 4)).save(folder / "a.PNG")
    for name in (".hidden.png", "notes.txt", "drawing.svg", "metadata.csv"):
        (folder / name).write_text("x")
    images = load()
    assert images.source == "1 images of folder pictures (4 other files ignored)"
    assert images.channels == 1


def test_the_cache_inside_the_folder_is_no_picture(folder):
    np.save(folder / "a.npy", noise(4, 4))
    for resolution in (4, 2, 3):
        assert len(load_images(train_data_dir=folder, cache_dir=folder / "cache", resolution=resolution)) == 1


def test_links_out_of_the_folder_are_refused_by_name(folder, load, tmp_path):
    (tmp_path / "secret").mkdir()
    Image.new("L", (4, 4), 7).save(tmp_path / "secret" / "a.png")
    Image.new("L", (4, 4), 5).save(folder / "a.png")
    (folder / "inside.png").symlink_to("a.png")
    (folder / "around").symlink_to(".")  # a circle: what it holds is listed where it is
    assert load().images[:, 0, 0, 0].tolist() == [5, 5]
    (folder / "file.png").symlink_to(tmp_path / "secret" / "a.png")
    (folder / "folder").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"links lead out of .*: file\.png, folder$"):
        load()


def test_empty_and_missing_folders(folder, load, tmp_path):
    with pytest.raises(ValueError, match=r"pictures.*no image in it"):
        load()
    with pytest.raises(ValueError, match=r"gone.*no such folder"):
        load(train_data_dir=tmp_path / "gone")
    with pytest.raises(ValueError, match=r"pictures.*no \.parquet in it.*train_data_dir"):
        load(dataset_name=str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "moons", "train_data_dir": "x"}, "give exactly one"),
        ({"train_data_dir": None}, "give exactly one"),
        ({"on_bad_image": "ignore"}, "on_bad_image is 'ignore'"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"resolution": 0}, "resolution is 0"),
        ({"resolution": True}, "resolution is True"),
        ({"resolution": (8, 8.0)}, "resolution is"),
        ({"resolution": "8x8"}, "resolution is '8x8'"),
        ({"background": "whitish"}, "background is 'whitish'"),
        ({"background": "#ffffff80"}, "without transparency"),
        ({"background": 3}, "background is 3"),
        ({"split": "test"}, "only the splits \\['train'\\]"),
        ({"split": None}, "split is None"),
        ({"dataset_name": "moons", "dataset_config_name": "full"}, "dataset_config_name is 'full'"),
    ],
)
def test_wrong_options_are_named(load, options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)


# ---- The cache -------------------------------------------------------------------------------------------------------


def test_every_setting_and_every_file_counts(folder, load, tmp_path):
    Image.fromarray(noise(8, 8, 4)).save(folder / "a.png")

    def number():
        return len(list((tmp_path / "cache").iterdir()))

    load()
    variants = [{"resolution": 4}, {"resolution": (4, 8)}, {"center_crop": False}, {"background": "red"}]
    for n, options in enumerate([*variants, {"on_bad_image": "skip"}], start=2):
        load(**options)
        assert number() == n
    load(background="#ffffff")  # is white
    load(num_workers=1)
    assert number() == n
    stat = (folder / "a.png").stat()
    os.utime(folder / "a.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    load()
    (folder / "a.png").rename(folder / "b.png")
    load()
    assert number() == n + 2


def test_a_cache_is_whole_or_not_there(folder, load, tmp_path, monkeypatch):
    Image.fromarray(noise(8, 8)).save(folder / "a.png")
    seen = []
    to_disk = cache._to_disk

    def spy(file):
        to_disk(file)
        seen.extend(path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
        raise KeyboardInterrupt

    monkeypatch.setattr(data_cache, "_to_disk", spy)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert seen == list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(data_cache, "_to_disk", to_disk)
    load()
    (made,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in made.iterdir()) == ["images.npy", "meta.json", "names.txt"]
    with open(made / "images.npy", "r+b") as file:
        file.truncate(150)
    with pytest.raises(ValueError, match=r"damaged.*delete it"):
        load()


def test_two_processes_at_once_make_the_same_cache(folder, tmp_path):
    for i in range(40):
        Image.fromarray(noise(32, 32, 3, seed=i)).save(folder / f"{i:02}.png")
    code = "import sys; from training.data.cache import load_images as load\n"
    code += "print(load(train_data_dir=sys.argv[1], cache_dir=sys.argv[2]).images.astype(int).sum())"
    line = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
    racers = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    sums = [int(racer.communicate()[0]) for racer in racers]
    assert sums == [sum(int(noise(32, 32, 3, seed=i).astype(int).sum()) for i in range(40))] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_losing_the_race_is_harmless(folder, load, monkeypatch, tmp_path):
    Image.fromarray(noise(8, 8)).save(folder / "a.png")
    decode_all = cache._decode_all

    def slow(new, **options):
        monkeypatch.setattr(data_cache, "_decode_all", decode_all)
        load()  # the other process finishes first
        return decode_all(new, **options)

    monkeypatch.setattr(data_cache, "_decode_all", slow)
    np.testing.assert_array_equal(load().images[0, 0], noise(8, 8))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_workers_change_nothing(folder, tmp_path):
    for i in range(300):
        Image.fromarray(noise(8, 9, 3, seed=i)).save(folder / f"{i:03}.png")
    one, two = (load_images(train_data_dir=folder, cache_dir=tmp_path / str(n), num_workers=n) for n in (0, 2))
    np.testing.assert_array_equal(one.images, two.images)
    assert one.source == two.source


# ---- The moons, parquet and the real data sets -----------------------------------------------------------------------


def test_moons(load, monkeypatch):
    monkeypatch.setattr(data_cache, "NUM_MOONS", {"train": 300, "test": 20})
    images = load(dataset_name="moons")
    np.testing.assert_array_equal(images.images, MoonDataset(300, 32, seed=0).images().numpy())
    assert images.source == "300 moons, drawn with seed 0, 32 x 32"
    assert load(dataset_name="moons", resolution=(16, 24)).images.shape == (300, 1, 16, 24)
    monkeypatch.setattr(data_cache, "_draw_moons", lambda *_, **__: pytest.fail("drawn again"))
    assert len(load(dataset_name="moons")) == 300


def write_parquet(path, **columns):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def cell(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return {"bytes": stream.getvalue(), "path": "a.png"}


def test_labels_of_a_table_and_of_folders(folder, load):
    rows = [cell(noise(5, 6, 3, seed=i)) for i in range(5)]
    rows[1] = {"bytes": b"nonsense", "path": "b.png"}
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", photo=rows, label=[7, 1, 3, 7, 3])
    images = load(dataset_name=str(folder), on_bad_image="skip")
    assert images.labels().tolist() == [1, 0, 1, 0]  # 7, 3, 7, 3: the unreadable one has none

    for name in ("cats/tabby/a.png", "dogs/b.png", "cats/c.png"):
        (folder / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(8, 8, 3)).save(folder / "pets" / name)
    images = load(train_data_dir=folder / "pets")
    named = [(images.name(i), label) for i, label in enumerate(images.labels().tolist())]
    assert named == [("cats/c.png", 0), ("cats/tabby/a.png", 0), ("dogs/b.png", 1)]
    assert load(train_data_dir=folder / "pets" / "dogs").labels() is None
    assert load(dataset_name="moons", resolution=8).labels() is None


def test_a_split_is_held_out_if_there_is_one(folder, cache):
    first, second = ([cell(noise(5, 6, 3, seed=10 * i + j)) for j in range(4)] for i in range(2))
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", photo=first)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", photo=second[:3])
    options = {"dataset_name": str(folder), "cache_dir": cache}
    for _ in range(2):  # from the files, from the cache
        parts = data_split.load_data_split(**options)
        assert parts.train_indices.tolist() == [0, 1, 2, 3] and parts.held_out.shape == (3, 3, 5, 6)
        assert parts.source.endswith("split test")
        np.testing.assert_array_equal(parts.held_out, data_cache.load_images(split="test", **options).images)
        np.testing.assert_array_equal(parts.training, data_cache.load_images(**options).images)
    assert data_split.load_data_split("none", **options).held_out.shape == (0, 3, 5, 6)
    assert len(data_split.load_data_split("test", **options).held_out) == 3
    for split in ("validation", "train"):
        with pytest.raises(ValueError, match=f"validation_split is '{split}': the data set has \\['test'\\]"):
            data_split.load_data_split(split, **options)

    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", photo=second)
    assert len(data_split.load_data_split(**options).held_out) == 4  # the test split is for the end


def test_a_split_of_another_size_is_made_to_fit(folder, cache):
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", photo=[cell(noise(8, 8, 3))])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", photo=[cell(noise(16, 16, 3))])
    assert data_split.load_data_split(dataset_name=str(folder), cache_dir=cache).held_out.shape == (1, 3, 8, 8)


def test_a_split_of_other_channels_is_refused(folder, cache):
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", photo=[cell(noise(8, 8, 3))])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", photo=[cell(noise(8, 8))])
    with pytest.raises(ValueError, match=r"split 'test' has pictures \(1, 8, 8\)"):
        data_split.load_data_split(dataset_name=str(folder), cache_dir=cache)


def test_without_a_split_every_20th_picture_is_held_out(folder, cache):
    for i in range(45):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / f"{i:02}.png")
    parts = data_split.load_data_split(train_data_dir=folder, cache_dir=cache)
    assert parts.held_out[:, 0, 0, 0].tolist() == [19, 39]
    assert parts.train_indices.tolist() == [i for i in range(45) if i not in (19, 39)]
    assert parts.training[:, 0, 0, 0].tolist() == parts.train_indices.tolist()
    assert parts.source.startswith("every 20th picture of 45 images")
    assert len(data_split.load_data_split("none", train_data_dir=folder, cache_dir=cache).rows) == 45
    with pytest.raises(ValueError, match="the data set has no split but its own"):
        data_split.load_data_split("test", train_data_dir=folder, cache_dir=cache)


def test_moons_hold_out_moons_of_another_seed(cache, monkeypatch):
    monkeypatch.setattr(data_cache, "NUM_MOONS", {"train": 30, "test": 20})
    parts = data_split.load_data_split(dataset_name="moons", cache_dir=cache)
    np.testing.assert_array_equal(parts.held_out, MoonDataset(20, 32, seed=1).images().numpy())
    assert len(parts.train_indices) == 30


def test_parquet_without_feature_types_and_with_bad_rows(folder, load):
    pictures = [noise(5, 6, 3, seed=i) for i in range(3)]
    rows = [cell(pixels) for pixels in pictures]
    Image.fromarray(pictures[2]).save(folder / "c.png")
    rows[2] = {"bytes": None, "path": str(folder / "c.png")}  # as for a folder of images on the Hub
    rows[1:1] = [{"bytes": b"nonsense", "path": "b.png"}, {"bytes": b"", "path": str(folder / "c.png")}, None]
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", photo=rows, label=[0] * 6)
    with pytest.raises(
        BadImagesError, match=r"(?s)3 of 6.*row 1 \(b\.png\): not an image.*row 2 \(c\.png\): empty.*row 3: empty"
    ):
        load(dataset_name=str(folder))
    images = load(dataset_name=str(folder), on_bad_image="skip")
    np.testing.assert_array_equal(images.images, [chw(pixels) for pixels in pictures])
    assert len(images.skipped) == 3

    with pytest.raises(ValueError, match=r"split is 'trian'.*(Unknown split|train)"):
        load(dataset_name=str(folder), split="trian")
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", a=rows[:1], b=rows[:1], label=[0])
    with pytest.raises(ValueError, match=r"image columns are \['a', 'b'\] among \['a', 'b', 'label'\]"):
        load(dataset_name=str(folder))
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", label=[0])
    with pytest.raises(ValueError, match=r"image columns are \[\] among \['label'\]"):
        load(dataset_name=str(folder))
    (folder / "data" / "train-00000-of-00001.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="dataset_name is"):
        load(dataset_name=str(folder))


def test_a_missing_data_set_is_named(load, monkeypatch):
    import datasets

    def missing(name, *_, **__):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(ValueError, match=r"dataset_name is 'nobody/nothing'.*no local folder, and on the Hub: Dataset"):
        load(dataset_name="nobody/nothing")


def first_of(file, column):
    from pyarrow import parquet

    batch = next(parquet.ParquetFile(file).iter_batches(1))
    return np.asarray(Image.open(io.BytesIO(batch[column][0].as_py()["bytes"])))


@needs("mnist")
def test_mnist(load):
    images = load(dataset_name=str(SHARED / "mnist"))
    assert images.images.shape == (60000, 1, 28, 28)
    assert images.images.dtype == np.uint8
    first = first_of(SHARED / "mnist/mnist/train-00000-of-00001.parquet", "image")
    np.testing.assert_array_equal(images.images[0, 0], first)
    assert images.images.mean() == pytest.approx(33.3184, abs=1e-4)  # the mean that is known for these 60,000
    assert images.source == "60000 images of data set mnist, split train"


@needs("cifar10")
def test_cifar10(load):
    images = load(dataset_name=str(SHARED / "cifar10"), split="test")
    assert images.images.shape == (1000, 3, 32, 32)
    first = first_of(SHARED / "cifar10/plain_text/test-00000-of-00001.parquet", "img")
    np.testing.assert_array_equal(images.images[0], chw(first))


WARM = """
import json, sys, time
from training.data import load_images
seconds = []
for _ in range(3):
    start = time.perf_counter()
    images = load_images(train_data_dir=sys.argv[1], cache_dir=sys.argv[2])
    seconds.append(time.perf_counter() - start)
print(json.dumps([min(seconds), len(images), "datasets" in sys.modules, "torch" in sys.modules]))
"""


@needs("crawl-tiles")
def test_crawl_tiles_cold_and_warm(tmp_path):
    tiles = SHARED / "crawl-tiles"
    images = load_images(train_data_dir=tiles, cache_dir=tmp_path)
    paths = sorted(tiles.rglob("*.png"), key=lambda path: path.relative_to(tiles).as_posix())
    sizes = Counter()
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            sizes[image.size] += 1
            if i % 40 == 0 and image.size == (32, 32):
                layer = Image.new("RGBA", image.size, "white")
                layer.alpha_composite(image.convert("RGBA"))  # Pillow's own, which rounds in another way
                difference = images.images[i].astype(int) - chw(np.asarray(layer)[..., :3])
                assert np.abs(difference).max() <= 1
    assert images.images.shape == (len(paths), 3, 32, 32) == (4357, 3, 32, 32)
    resized = 4357 - sizes[32, 32]
    assert images.source == f"4357 images of folder crawl-tiles (2 other files ignored); {resized} resized to 32 x 32"

    line = [sys.executable, "-c", WARM, str(tiles), str(tmp_path)]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, number, *imported = json.loads(result.stdout)
    assert (number, imported) == (4357, [False, False])
    assert not result.stderr  # no progress bar: nothing was decoded
    assert seconds < 0.5
