"""Decoded pixels against pixels set by hand, formulas, and Pillow's own transforms."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm_pipeline.pixels import height_width
from tests.arrays import random_images
from tests.data.image_files import chw, png, smooth
from training.data import cache
from training.data.cache import UnreadableImagesError

# ---- Pixels ----------------------------------------------------------------------------------------------------------


def test_lossless_pixels_are_unchanged_and_sorted_by_name(folder, load):
    images = [random_images(6, 9, 3, seed=i) for i in range(12)]
    for i, pixels in enumerate(images):
        path = folder / "test" / f"class{i % 3}" / f"{i:02}.{('png', 'bmp', 'TIFF', 'webp')[i % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, lossless=True)
    data = load()
    assert data.images.shape == (12, 3, 6, 9)
    assert (len(data), data.channels, data.height, data.width, data.max_value) == (12, 3, 6, 9, 255)
    assert isinstance(data.images, np.memmap)
    assert not data.images.flags.writeable
    by_name = sorted(range(12), key=lambda i: (i % 3, i))
    np.testing.assert_array_equal(data.images, [chw(images[i]) for i in by_name])


def test_grey_has_one_channel_and_grey_with_colour_has_three(folder, load):
    grey, colour = random_images(5, 4), random_images(5, 4, 3)
    Image.fromarray(grey).save(folder / "a.png")
    assert load().images.tolist() == [[grey.tolist()]]
    Image.fromarray(colour).save(folder / "b.png")
    np.testing.assert_array_equal(load().images, [[grey] * 3, chw(colour)])


def test_one_bit_palette_and_cmyk(folder, load):
    bits = random_images(5, 7, high=2)
    Image.fromarray(bits.astype(bool)).save(folder / "1.png")
    np.testing.assert_array_equal(load().images[0, 0], bits * 255)

    index, table = random_images(5, 7, high=16), random_images(16, 3, seed=1)
    palette = Image.fromarray(index, "L").convert("P")
    palette.putpalette(table.tobytes())
    palette.putdata(index.ravel().tolist())
    palette.save(folder / "p.png")

    cmyk = random_images(5, 7, 4, seed=2)
    Image.fromarray(cmyk, "CMYK").save(folder / "cmyk.tif")

    one, from_cmyk, from_palette = load().images.astype(float)
    np.testing.assert_array_equal(one, [bits * 255] * 3)
    np.testing.assert_array_equal(from_palette, chw(table[index]))
    ink = cmyk / 255  # what the inks leave of white: (1 - c) (1 - k)
    np.testing.assert_allclose(from_cmyk, chw(255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])), atol=1)


@pytest.mark.parametrize("background", ["white", "black", "#ff8000"])
def test_alpha_is_composited_on_the_background(folder, load, background):
    behind = {"white": [255] * 3, "black": [0] * 3, "#ff8000": [255, 128, 0]}[background]
    layers = random_images(16, 16, 4)
    layers[0] = [255, 0, 0, 0]  # red, but invisible
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


def test_grey_with_alpha_is_composited_on_the_luminance_of_the_background(folder, load):
    layers = random_images(8, 8, 2)
    Image.fromarray(layers, "LA").save(folder / "a.png")
    for background, luminance in (("white", 255), ("#ff8000", 0.299 * 255 + 0.587 * 128)):
        data = load(background=background)
        alpha = layers[..., 1] / 255
        expected = layers[..., 0] * alpha + luminance * (1 - alpha)
        assert data.channels == 1
        np.testing.assert_allclose(data.images[0, 0], expected, atol=1)
    Image.new("RGB", (8, 8)).save(folder / "b.png")  # with a colour image in the set the background keeps its colour
    layers[0, 0] = 0
    Image.fromarray(layers, "LA").save(folder / "a.png")
    assert load(background="#ff8000").images[0, :, 0, 0].tolist() == [255, 128, 0]


def test_16_bit_grey_is_kept_and_8_bit_images_are_scaled_to_it(folder, load):
    wide = random_images(6, 5, dtype=np.uint16)
    wide[0, :3] = 0, 256, 65535
    Image.fromarray(wide).save(folder / "a.png")
    Image.fromarray(wide).save(folder / "b.tif")
    Image.fromarray(wide.astype(">u2")).save(folder / "c.tif")  # the other byte order
    grey = random_images(6, 5)
    grey[0, :2] = 0, 255
    Image.fromarray(grey).save(folder / "d.png")
    data = load()
    assert data.images.dtype == np.uint16
    assert data.max_value == 65535
    np.testing.assert_array_equal(data.images[:3, 0], [wide] * 3)
    np.testing.assert_array_equal(data.images[3, 0], grey * 257.0)
    assert data.images[3, 0, 0, 1] == 65535

    colour = random_images(6, 5, 3)
    Image.fromarray(colour).save(folder / "e.png")
    data = load()
    np.testing.assert_array_equal(data.images[0], [wide] * 3)
    np.testing.assert_array_equal(data.images[4], chw(colour * 257.0))


def test_16_bit_grey_with_one_transparent_value(folder, load):
    wide = np.array([[7, 8], [9, 65535]], ">u2")
    (folder / "a.png").write_bytes(png(2, 2, 16, 0, wide, (b"tRNS", b"\0\x08")))
    assert load(background="#808080").images.tolist() == [[[[7, 128 * 257], [9, 65535]]]]


def test_16_bit_colour_is_reduced_to_8_bits_and_reported(folder, load):
    wide = random_images(2, 3, 3, dtype=np.uint16)
    (folder / "a.png").write_bytes(png(3, 2, 16, 2, wide.astype(">u2")))
    data = load()
    np.testing.assert_array_equal(data.images[0], chw(wide >> 8))
    assert "1 reduced from 16 to 8 bits per colour channel" in data.source
    grey_alpha = np.array([[[40000, 65535], [1000, 0]]], ">u2")
    (folder / "a.png").write_bytes(png(2, 1, 16, 4, grey_alpha))
    assert load().images.tolist() == [[[[40000 >> 8, 255]]]]  # and grey with alpha is grey


def test_npy_arrays_have_any_number_of_channels(folder, load):
    five, more = random_images(4, 6, 5), random_images(4, 6, 5, seed=1)
    np.save(folder / "a.npy", five)
    np.save(folder / "b.npy", np.asfortranarray(more))
    np.testing.assert_array_equal(load().images, [chw(five), chw(more)])
    wide = random_images(4, 6, 5, dtype=np.uint16)
    np.save(folder / "b.npy", wide.astype(">u2"))
    data = load()
    np.testing.assert_array_equal(data.images, [chw(five * 257.0), chw(wide)])
    assert load(resolution=(2, 3)).images.shape == (2, 5, 2, 3)
    Image.fromarray(random_images(4, 6)).save(folder / "c.png")
    with pytest.raises(ValueError, match=r"a\.npy has 5 channels and c\.png has 1"):
        load()


def test_a_third_number_of_channels_is_reported_when_grey_and_colour_come_first(folder, load):
    for name, shape in (("a", (4, 4)), ("b", (4, 4, 3)), ("c", (4, 4, 2))):
        np.save(folder / f"{name}.npy", random_images(*shape))
    with pytest.raises(ValueError, match=r"a\.npy has 1 channels and c\.npy has 2"):
        load()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_every_exif_orientation_is_turned_upright(folder, load, suffix):
    upright = smooth(16, 24)
    stored = {  # EXIF: where row 0 and column 0 of the stored image are displayed
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),  # displayed turned clockwise, so stored turned the other way
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = folder / f"{orientation}.{suffix}"
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, lossless=True, quality=100, subsampling=0)
    data = load()
    assert data.images.shape == (8, 3, 16, 24)  # read from the headers: no image was resized
    assert "resized" not in data.source
    for orientation in stored:
        with Image.open(folder / f"{orientation}.{suffix}") as image:
            np.testing.assert_array_equal(data.images[orientation - 1], chw(np.asarray(ImageOps.exif_transpose(image))))
        difference = np.abs(data.images[orientation - 1].astype(int) - chw(upright))
        assert difference.max() <= (0 if suffix != "jpg" else 3)


def test_only_the_first_frame_of_an_animation_is_used(folder, load):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "png", "webp"):
        frames[0].save(folder / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True, duration=50)
    frames[0].save(folder / "b.tif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "one.png")
    data = load()
    assert data.images[:, :, 2, 2].tolist() == [[255, 0, 0]] * 5
    assert "4 with several frames, only the first is used" in data.source


# ---- Size ------------------------------------------------------------------------------------------------------------


def test_the_most_common_size_is_the_default(folder, load):
    for i, (height, width) in enumerate([(8, 8), (6, 10), (6, 10), (12, 20)]):
        Image.fromarray(smooth(height, width)).save(folder / f"{i}.png")
    data = load()
    assert data.images.shape == (4, 3, 6, 10)
    assert "2 resized to 6 x 10" in data.source
    assert load(resolution=4).images.shape[2:] == (4, 4)
    assert load(resolution=[5, 4]).images.shape[2:] == (5, 4)
    assert load(resolution="5x4").images.shape[2:] == (5, 4)


@pytest.mark.parametrize("high", [256, 65536])
@pytest.mark.parametrize(("resolution", "rows", "columns"), [(16, (0, 32), (16, 48)), ((8, 32), (8, 24), (0, 64))])
def test_another_size_is_cropped_at_the_centre_or_squeezed(folder, load, high, resolution, rows, columns):
    """Away from the edges a linear ramp stays linear when it is resized."""
    y, x = np.mgrid[0:32, 0:64] + 0.5
    unit = high / 256
    ramp = ((2 * y + 3 * x) * unit * 0.9).round()
    pixels = ramp.astype(np.uint8 if high == 256 else np.uint16)
    Image.fromarray(pixels).save(folder / "a.png")
    height, width = height_width(resolution)

    def expected(top, bottom, left, right):
        y, x = np.mgrid[0:height, 0:width] + 0.5
        y, x = top + y * (bottom - top) / height, left + x * (right - left) / width
        return (2 * y + 3 * x) * unit * 0.9

    cropped = load(resolution=resolution).images[0, 0]
    squeezed = load(resolution=resolution, center_crop=False).images[0, 0]
    inner = np.s_[2:-2, 3:-3]
    atol = 1.5 if high == 256 else 40  # an offset of one pixel is 1.8 or 460
    np.testing.assert_allclose(cropped[inner], expected(*rows, *columns)[inner], atol=atol)
    np.testing.assert_allclose(squeezed[inner], expected(0, 32, 0, 64)[inner], atol=atol)


def test_16_bit_edges_do_not_overflow(folder, load):
    pixels = np.zeros((16, 16), np.uint16)
    pixels[:, 8:] = 65535  # Lanczos overshoots on both sides
    Image.fromarray(pixels).save(folder / "a.png")
    image = load(resolution=24).images[0, 0].astype(int)
    assert (image[:, :11] < 10000).all()
    assert (image[:, 13:] > 55000).all()
    assert {0, 65535} <= set(image.ravel().tolist())


# ---- Unreadable images -----------------------------------------------------------------------------------------------


@pytest.fixture
def broken(folder):
    """Two readable images and every kind of unreadable one: {name: a word of the reason}."""
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
    (folder / "text.png").write_text("I am not an image")
    (folder / "text.npy").write_text("I am not an array either")
    (folder / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "bomb.png").write_bytes(png(20000, 20000, 8, 0, []))
    (folder / "smallbomb.png").write_bytes(png(10000, 10000, 8, 0, []))  # Pillow only warns about this one
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
def test_unreadable_images_are_counted_and_five_are_named(load, broken, num_workers, tmp_path):
    with pytest.raises(UnreadableImagesError) as caught:
        load(num_workers=num_workers)
    first, *lines, last = str(caught.value).split("\n  ")
    assert last == "and 11 more"
    assert first.startswith("16 of 18 images cannot be read")
    reasons = dict(line.split(": ", 1) for line in lines)
    assert list(reasons) == sorted(broken)[:5]
    assert all(broken[name].lower() in reason.lower() for name, reason in reasons.items())
    assert str(tmp_path) not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert not list((tmp_path / "cache").glob(".*-*"))  # nothing incomplete is left


def test_unreadable_images_are_skipped_on_request_and_listed_in_the_cache(load, broken, monkeypatch):
    data = load(on_bad_image="skip")
    assert data.images.shape == (2, 3, 64, 64)
    np.testing.assert_array_equal(data.images[0], chw(smooth(64, 64)))
    reasons = dict(line.split(": ", 1) for line in data.skipped)
    assert list(reasons) == sorted(broken)
    for name, word in broken.items():
        assert reasons[name]
        assert word.lower() in reasons[name].lower()
    assert "2 images of folder photos; 16 unreadable and left out" in data.source
    monkeypatch.setattr(cache, "write_decoded", lambda *_, **__: pytest.fail("decoded again"))
    again = load(on_bad_image="skip")
    assert (again.skipped, again.source) == (data.skipped, data.source)
    np.testing.assert_array_equal(again.images, data.images)


def test_images_smaller_than_min_side_are_named(folder, load):
    for height, width in ((64, 64), (1, 1), (2000, 3), (3, 2000), (8, 9)):
        Image.fromarray(smooth(height, width)).save(folder / f"{height}x{width}.png")
    with pytest.raises(UnreadableImagesError) as error:
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


def test_a_folder_of_unreadable_images_is_an_error_even_with_skip(folder, load):
    (folder / "a.png").touch()
    with pytest.raises(UnreadableImagesError, match=r"(?s)1 of 1 images.*a\.png: empty"):
        load(on_bad_image="skip")


def test_warning_filters_are_restored(folder, load):
    Image.new("L", (4, 4)).save(folder / "a.png")
    before = list(warnings.filters)
    load()
    assert warnings.filters == before
