"""One reader: training, pipeline and command line get the same pixels of every file, and refuse the same files.

Expected pixels are set by hand or follow from the format's definition.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from ddpm_pipeline import DDPMPipeline
from ddpm_pipeline.__main__ import main
from ddpm_pipeline.decode import Size
from ddpm_pipeline.images import record_center_crop, size_of, to_mask, to_tensor
from ddpm_pipeline.pixels import from_pixels
from tests.arrays import random_images
from tests.data.image_files import chw, png, png_chunk, smooth, tiff
from tests.models import quiet, tiny_pipe
from training.data.cache import load_images

BACKGROUND, BEHIND = "#204060", np.array([0x20, 0x40, 0x60])
LUMINANCE = round(0.299 * 0x20 + 0.587 * 0x40 + 0.114 * 0x60)
GRAY, WIDE, COLOUR = random_images(6, 5), random_images(6, 5, dtype=np.uint16), random_images(6, 5, 3)
ALPHA = random_images(6, 5, 4, seed=1)
TEN_BITS, TWELVE_BITS = WIDE >> 6, WIDE >> 4


def saved(pixels, kind, **options):
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, kind, **options)
    return stream.getvalue()


def over(colour, alpha, behind):
    alpha = alpha / 255
    return np.rint(colour * alpha + behind * (1 - alpha))


def packed_12_bits(values):
    """Two values in three bytes; a row ends at a byte."""
    rows = np.pad(values, ((0, 0), (0, values.shape[1] % 2))).astype(np.uint16)
    first, second = rows[:, ::2], rows[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2).astype(np.uint8)
    return packed.reshape(len(rows), -1)[:, : (12 * values.shape[1] + 7) // 8].tobytes()


def packed(values, bits):
    """Rows of 1, 2 or 4 bits for each value; a row ends at a byte."""
    places = bits * np.arange(8 // bits)[::-1]
    rows = np.pad(values, ((0, 0), (0, -values.shape[1] % len(places)))).reshape(len(values), -1, len(places))
    return list((rows.astype(int) << places).sum(2).astype(np.uint8))


def high_bytes(values):
    """16 bits that are reduced to these 8."""
    return (values * np.uint16(256) + np.uint16(7)).astype(">u2")


def pgm(values, max_value, magic="P5"):
    header = f"{magic}\n{values.shape[1]} {values.shape[0]}\n{max_value}\n".encode()
    return header + (" ".join(map(str, values.ravel())).encode() if magic == "P2" else values.astype(">u2").tobytes())


def premultiplied():
    alpha = ALPHA[..., 3:].astype(int)
    return np.concatenate([(ALPHA[..., :3] * alpha + 127) // 255, alpha], axis=2).astype(np.uint8)


TRANSPARENT_GIF = Image.fromarray(GRAY % 2, "P")
TRANSPARENT_GIF.putpalette([0, 0, 255, 0, 255, 0])

# name: (file, expected pixels, largest error)
FILES = {
    "gray.png": (saved(GRAY, "png"), GRAY, 0),
    "gray.webp": (saved(GRAY, "webp", lossless=True), np.repeat(GRAY[..., None], 3, 2), 0),
    "16.png": (saved(WIDE, "png"), WIDE, 0),
    "16.tif": (tiff(5, 6, 16, 1, WIDE.astype("<u2").tobytes()), WIDE, 0),
    "16 of the other byte order.tif": (tiff(5, 6, 16, 1, WIDE.astype(">u2").tobytes(), order=">"), WIDE, 0),
    "16, 0 is white.tif": (tiff(5, 6, 16, 0, WIDE.astype("<u2").tobytes()), 65535 - WIDE, 0),
    "16, 0 is white, LZW.tif": (saved(WIDE, "tiff", compression="tiff_lzw", tiffinfo={262: 0}), 65535 - WIDE, 0),
    "16, 0 is white, deflate.tif": (saved(WIDE, "tiff", compression="tiff_adobe_deflate", tiffinfo={262: 0}), ~WIDE, 0),
    "8, 0 is white.tif": (tiff(5, 6, 8, 0, GRAY.tobytes()), 255 - GRAY, 0),
    "12.tif": (tiff(5, 6, 12, 1, packed_12_bits(TWELVE_BITS)), np.rint(TWELVE_BITS * (65535 / 4095)), 0),
    "16.pgm": (pgm(WIDE, 65535), WIDE, 0),
    "10.pgm": (pgm(TEN_BITS, 1023), np.rint(TEN_BITS * (65535 / 1023)), 0),
    "12, in figures.pgm": (pgm(TWELVE_BITS, 4095, "P2"), np.rint(TWELVE_BITS * (65535 / 4095)), 0),
    "16 bits of colour.ppm": (
        b"P6 5 6 65535\n" + (COLOUR * np.uint16(257)).astype(">u2").tobytes(), COLOUR, 0,
    ),
    "16, one value transparent.png": (
        png(5, 6, 16, 0, WIDE.astype(">u2"), (b"tRNS", int(WIDE[2, 3]).to_bytes(2, "big"))),
        np.where(WIDE[2, 3] == WIDE, LUMINANCE * 257, WIDE), 0,
    ),
    "8, one value transparent.png": (
        saved(GRAY, "png", transparency=int(GRAY[2, 3])), np.where(GRAY[2, 3] == GRAY, LUMINANCE, GRAY), 0,
    ),
    **{
        f"{bits} bits, one value transparent.png": (
            png(5, 6, bits, 0, packed(GRAY % 2**bits, bits), (b"tRNS", b"\0\1")),
            np.where(GRAY % 2**bits == 1, LUMINANCE, GRAY % 2**bits * (255 // (2**bits - 1))), 0,
        )
        for bits in (1, 2, 4)
    },
    "16 bits of colour, one transparent.png": (
        png(5, 6, 16, 2, high_bytes(COLOUR), (b"tRNS", high_bytes(COLOUR[1, 2]).tobytes())),
        np.where((COLOUR[1, 2] == COLOUR).all(2, keepdims=True), BEHIND, COLOUR), 0,
    ),
    "gray and alpha.png": (saved(Image.fromarray(ALPHA[..., 2:], "LA"), "png"),
                           over(ALPHA[..., 2], ALPHA[..., 3], LUMINANCE), 0),
    "16 bits of gray and alpha.png": (
        png(5, 6, 16, 4, (ALPHA[..., 2:] * np.uint16(257)).astype(">u2")),
        over(ALPHA[..., 2], ALPHA[..., 3], LUMINANCE), 0,
    ),
    "alpha.png": (saved(ALPHA, "png"), over(ALPHA[..., :3], ALPHA[..., 3:], BEHIND), 0),
    "alpha.webp": (saved(ALPHA, "webp", lossless=True, exact=True), over(ALPHA[..., :3], ALPHA[..., 3:], BEHIND), 0),
    "alpha.tif": (saved(ALPHA, "tiff"), over(ALPHA[..., :3], ALPHA[..., 3:], BEHIND), 0),
    "multiplied by alpha.tif": (
        tiff(5, 6, 8, 2, premultiplied().tobytes(), samples=4, extra=1),
        over(ALPHA[..., :3], ALPHA[..., 3:], BEHIND), 2,
    ),
    "one colour transparent.png": (
        saved(COLOUR, "png", transparency=tuple(int(v) for v in COLOUR[1, 2])),
        np.where((COLOUR[1, 2] == COLOUR).all(2, keepdims=True), BEHIND, COLOUR), 0,
    ),
    "palette.gif": (
        saved(TRANSPARENT_GIF, "gif", transparency=0), np.where(GRAY[..., None] % 2, [0, 255, 0], BEHIND), 0,
    ),
    "one bit.png": (saved(Image.fromarray(GRAY > 99), "png"), (GRAY > 99) * 255, 0),
}  # fmt: skip


def load(folder, **options):
    return load_images(train_data_dir=folder, cache_dir=folder.parent / "cache", background=BACKGROUND, **options)


@pytest.mark.parametrize("name", FILES)
def test_training_and_pipeline_read_the_same_pixels(name, tmp_path):
    content, expected, largest_error = FILES[name]
    path = tmp_path / "images" / name
    path.parent.mkdir()
    path.write_bytes(content)
    trained_on = load(path.parent)
    assert np.abs(trained_on.images[0].astype(float) - chw(np.asarray(expected, float))).max() <= largest_error
    assert trained_on.images.dtype == (np.uint16 if np.max(expected) > 255 else np.uint8)
    expected = from_pixels(np.array(trained_on.images))
    unscaled = name.startswith(("2 bits", "4 bits"))  # what Pillow knows only of a file that it has not decoded yet
    for image in (path, str(path), Image.open(path), path if unscaled else loaded(path), [path]):
        assert torch.equal(to_tensor(image, "images", trained_on.channels, BACKGROUND), expected)


def loaded(path):
    with Image.open(path) as image:
        image.load()
    return image


def test_16_bits_of_colour_are_reported(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("16 bits of colour.ppm", "16 bits of gray and alpha.png"):
        (tmp_path / "images" / name).write_bytes(FILES[name][0])
    assert "2 reduced from 16 to 8 bits per colour channel" in load(tmp_path / "images", resolution=(6, 5)).source


# ---- Orientation -----------------------------------------------------------------------------------------------------

UPRIGHT = smooth(16, 24)
STORED = {1: UPRIGHT, 3: UPRIGHT[::-1, ::-1], 6: np.rot90(UPRIGHT), 7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
          8: np.rot90(UPRIGHT, -1)}  # fmt: skip


def xmp(orientation, as_element=False):
    name = b"tiff:Orientation"
    value = b"%d" % orientation
    text = b"<%s>%s</%s>" % (name, value, name) if as_element else b'<rdf:Description %s="%s"/>' % (name, value)
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF>%s</rdf:RDF></x:xmpmeta>' % text


def itxt(text):
    return png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text)


def before_pixels(content, chunk):
    return content[:33] + chunk + content[33:]


def after_pixels(content, chunk):
    return content[:-12] + chunk + content[-12:]


def exif(orientation):
    values = Image.Exif()
    values[0x0112] = orientation
    return values


METADATA = {
    "exif.png": lambda image, o: saved(image, "png", exif=exif(o)),
    "exif.jpg": lambda image, o: saved(image, "jpeg", exif=exif(o), quality=100, subsampling=0),
    "exif.webp": lambda image, o: saved(image, "webp", exif=exif(o), lossless=True),
    "exif.tif": lambda image, o: saved(image, "tiff", exif=exif(o)),
    "exif, LZW.tif": lambda image, o: saved(image, "tiff", exif=exif(o), compression="tiff_lzw"),
    "exif after pixels.png": lambda image, o: after_pixels(
        saved(image, "png"), png_chunk(b"eXIf", exif(o).tobytes().removeprefix(b"Exif\0\0"))
    ),
    "xmp.png": lambda image, o: before_pixels(saved(image, "png"), itxt(xmp(o))),
    "xmp after pixels.png": lambda image, o: after_pixels(saved(image, "png"), itxt(xmp(o))),
    "xmp as an element.png": lambda image, o: before_pixels(saved(image, "png"), itxt(xmp(o, True))),
    "xmp.jpg": lambda image, o: saved(image, "jpeg", xmp=xmp(o), quality=100, subsampling=0),
    "xmp.webp": lambda image, o: saved(image, "webp", xmp=xmp(o), lossless=True),
    "xmp.tif": lambda image, o: saved(image, "tiff", tiffinfo={700: xmp(o)}),
    "exif against xmp.jpg": lambda image, o: saved(image, "jpeg", exif=exif(o), xmp=xmp(6), quality=100, subsampling=0),
    "exif against xmp.tif": lambda image, o: saved(image, "tiff", tiffinfo={274: o, 700: xmp(6)}),
}


@pytest.mark.parametrize("kind", METADATA)
def test_orientation_in_exif_or_xmp_is_one_rule_for_headers_and_pixels(kind, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for orientation, pixels in STORED.items():
        image = Image.fromarray(np.ascontiguousarray(pixels))
        (folder / f"{orientation} {kind}").write_bytes(METADATA[kind](image, orientation))
    data = load(folder)
    assert data.images.shape == (len(STORED), 3, 16, 24)
    assert "resized" not in data.source  # the headers have the upright size
    assert np.abs(data.images.astype(int) - chw(UPRIGHT)).max() <= (3 if kind.endswith("jpg") else 0)
    paths = sorted(folder.iterdir())
    for images in (paths, [Image.open(path) for path in paths], [loaded(path) for path in paths]):
        assert torch.equal(to_tensor(images, "images", 3), from_pixels(np.array(data.images)))


def test_a_pil_image_is_not_modified():
    for orientation in (1, 6):
        image = Image.open(io.BytesIO(METADATA["exif.png"](Image.fromarray(UPRIGHT), orientation)))
        before = np.asarray(image).copy()
        first = to_tensor(image, "images", 3)
        assert torch.equal(to_tensor(image, "images", 3), first)
        np.testing.assert_array_equal(np.asarray(image), before)
        assert image.getexif()[0x0112] == orientation


# ---- Refused files ---------------------------------------------------------------------------------------------------


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


REFUSED = {
    "float.tif": (saved(np.full((6, 5), 0.5, np.float32), "tiff"), "floating point"),
    "int.tif": (saved(np.full((6, 5), 300, np.int32), "tiff"), "32-bit or signed"),
    "signed 16.tif": (tiff(5, 6, 16, 1, GRAY.astype("<i2").tobytes(), sample_format=2), "signed"),
    "signed 8.tif": (tiff(5, 6, 8, 1, GRAY.tobytes(), sample_format=2), "signed"),
    "float.pfm.ppm": (b"Pf 5 6 -1.0\n" + np.zeros((6, 5), "<f4").tobytes(), "floating point"),
    "cut.png": (saved(random_images(64, 64), "png")[:2000], ""),
    "cut.jpg": (saved(random_images(64, 64), "jpeg")[:2000], "truncated"),
    "empty.png": (b"", "empty"),
    "text.png": (b"I am not an image", "not an image"),
    "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "bomb.png": (png(20000, 20000, 8, 0, []), "decompression bomb"),
    "float.npy": (npy(np.zeros((6, 5))), "float64"),
    "signed.npy": (npy(np.zeros((6, 5), np.int64)), "int64"),
    "flat.npy": (npy(np.zeros(9, np.uint8)), "(9,)"),
    **{
        f"{shape}.npy": (npy(np.zeros(shape, np.uint8)), "channels last")
        for shape in (
            (12, 64, 64),
            (3, 64, 64),
            (1, 28, 28),
            (12, 48, 64),
            (3, 12, 16),
            (4, 16, 12),
            (200, 64, 64),
            (4, 32, 32),
            (3, 8, 8),
        )
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_and_pipeline_refuse_the_same_files(name, tmp_path):
    content, reason = REFUSED[name]
    path = tmp_path / "images" / name
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read") as in_training:
        load(path.parent)
    for image in (path, str(path), [path]):
        with pytest.raises(ValueError, match="images: ") as in_pipeline:
            to_tensor(image, "images", 1)
        assert str(path) in str(in_pipeline.value)
        for error in (in_training, in_pipeline):
            assert reason.lower() in str(error.value).lower()
        with pytest.raises(ValueError, match=r"mask: |mask is "):  # its size is read first
            to_mask(image if image != [path] else path, (1, 1, 6, 5))


@pytest.mark.parametrize("name", ["float.tif", "int.tif", "signed 16.tif", "signed 8.tif", "cut.jpg"])
def test_the_pipeline_refuses_them_as_pil_images_too(name, tmp_path):
    content, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        to_tensor(Image.open(io.BytesIO(content)), "images", 1)


@pytest.mark.parametrize("shape", [(64, 64, 12), (64, 48, 3), (48, 64, 3), (64, 64, 200), (200, 64, 3), (4, 6, 5),
                                   (64, 3, 3), (8, 8, 8), (16, 12)])  # fmt: skip
def test_arrays_with_channels_last_are_read(shape, tmp_path):
    array = random_images(*shape)
    np.save(tmp_path / "a.npy", array)
    channels = shape[2] if len(shape) == 3 else 1
    read = to_tensor(tmp_path / "a.npy", "images", channels)
    assert torch.equal(read, to_tensor(array, "images", channels))
    assert torch.equal(read[0], from_pixels(chw(array)))


@pytest.mark.parametrize(
    ("image", "channels", "message"),
    [
        ("nowhere.png", 3, "images: nowhere.png: No such file"),
        (".", 3, r"images: \.: Is a directory"),
        (Image.new("RGB", (5, 6)), 5, "the model has 5 channels, and PIL images have 1, 3 or 4"),
        (np.zeros((6, 5), np.int32), 1, "images is torch.int32"),
        (np.zeros((6, 5), "M8[s]"), 1, r"images is an array of datetime64\[s\]"),
        (np.zeros((6, 5), object), 1, "images is an array of object"),
        (b"bytes", 1, "images is a bytes: give files"),
    ],
)
def test_other_inputs_are_refused(image, channels, message):
    with pytest.raises(ValueError, match=message):
        to_tensor(image, "images", channels)


def test_an_array_file_with_other_channels_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", random_images(6, 5, 3))
    with pytest.raises(ValueError, match=r"a\.npy: it has 3 channels: give 1"):
        to_tensor(tmp_path / "a.npy", "images", 1)
    np.save(tmp_path / "b.npy", GRAY)  # gray among colours, as in training
    np.testing.assert_array_equal(to_tensor(tmp_path / "b.npy", "images", 3)[0], from_pixels(np.stack([GRAY] * 3)))


# ---- Arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_memory_layout_gives_the_same_tensor(dtype):
    pixels = random_images(2, 6, 5, 3, dtype=dtype)
    expected = from_pixels(pixels.transpose(0, 3, 1, 2).copy())
    read_only = pixels.copy()
    read_only.flags.writeable = False
    layouts = [pixels[::-1][::-1], np.asfortranarray(pixels), pixels[:, ::-1].copy()[:, ::-1], read_only]
    layouts += [pixels.astype(pixels.dtype.newbyteorder(order)) for order in "<>"]
    for layout in layouts:
        assert torch.equal(to_tensor(layout, "images", 3), expected)
        assert torch.equal(from_pixels(layout.transpose(0, 3, 1, 2)), expected)
        floats = (layout / np.iinfo(dtype).max * 2 - 1).astype(">f8")
        torch.testing.assert_close(to_tensor(floats, "images", 3), expected.double(), atol=1e-6, rtol=0)
    assert torch.equal(to_tensor(torch.from_numpy(pixels).movedim(-1, 1), "images", 3), expected)


# ---- PIL images ------------------------------------------------------------------------------------------------------


def test_every_mode_of_pil_images():
    upright = Image.fromarray(ALPHA)
    opaque = Image.fromarray(ALPHA[..., :3])
    expected = from_pixels(chw(over(ALPHA[..., :3], ALPHA[..., 3:], BEHIND).astype(np.uint8)))
    assert torch.equal(to_tensor(upright, "images", 3, BACKGROUND)[0], expected)
    several = to_tensor(upright.convert("RGBa"), "images", 3, BACKGROUND)[0]
    assert (several - expected).abs().max() <= 3 * 2 / 255  # colours rounded once more
    for mode in ("RGBX", "HSV", "YCbCr", "CMYK"):
        image = opaque.convert(mode)
        expected = from_pixels(chw(np.asarray(image.convert("RGB"))))
        assert torch.equal(to_tensor(image, "images", 3)[0], expected)
    assert torch.equal(to_tensor(upright, "images", 4)[0], from_pixels(chw(ALPHA)))
    whole = to_tensor(Image.fromarray(WIDE), "images", 4)[0]
    assert torch.equal(whole, from_pixels(np.stack([WIDE] * 3 + [np.full_like(WIDE, 65535)])))
    for mode in ("I", "F", "LAB"):
        with pytest.raises(ValueError, match=f"mode {mode}"):
            to_tensor(Image.new(mode, (5, 6)), "images", 3)
    erased = Image.new("LA", (5, 6), (200, 0)).convert("La")
    assert torch.equal(to_tensor(erased, "images", 1, "black"), -torch.ones(1, 1, 6, 5))


# ---- Masks -----------------------------------------------------------------------------------------------------------

WHERE = np.zeros((8, 8), bool)
WHERE[1:3, 5:] = True


def drawn(inside, outside, dtype=np.uint8):
    """An image with one value where to paint and another one elsewhere."""
    values = np.where(WHERE[..., None], np.array(inside, dtype), np.array(outside, dtype))
    return values[..., 0] if values.shape[2] == 1 else values


MASKS = {
    "opaque strokes on transparent white": Image.fromarray(drawn([255] * 4, [255, 255, 255, 0])),
    "opaque strokes on transparent black": Image.fromarray(drawn([255] * 4, [0, 0, 0, 0])),
    "white on opaque black": Image.fromarray(drawn([255] * 4, [0, 0, 0, 255])),
    "faint strokes": Image.fromarray(drawn([255, 255, 255, 200], [255, 255, 255, 127])),
    "gray and alpha": Image.fromarray(drawn([255, 255], [255, 0]), "LA"),
    "gray times alpha": Image.fromarray(drawn([200, 200], [170, 170]), "LA"),  # 0.62 and 0.44
    "16 bits": Image.fromarray(drawn([65535], [300], np.uint16)),
    "16 bits, just above the middle": Image.fromarray(drawn([32768], [32767], np.uint16)),
    "8 bits, just above the middle": Image.fromarray(drawn([128], [127])),
    "one bit": Image.fromarray(WHERE),
    "bright colours": Image.fromarray(drawn([255, 255, 0], [0, 0, 255])),
    "bool": WHERE,
    "uint16": drawn([32768], [32767], np.uint16),
    "uint16 of the other byte order": drawn([65535], [300], np.uint16).astype(">u2"),
    "uint16 tensor": torch.from_numpy(drawn([65535], [300], np.uint16)),
    "negative strides": WHERE[::-1].copy()[::-1],
    "integers 0 and 1": WHERE.astype(np.int64),
    "floats": WHERE.astype(">f4"),
    "rows, columns, one channel": WHERE[..., None],
    "rows, columns, three channels": np.repeat(WHERE[..., None], 3, axis=2),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("number", [1, 2])
def test_a_mask_is_luminance_times_alpha_at_full_depth(kind, number, tmp_path):
    mask, shape = MASKS[kind], (number, 3, 8, 8)
    expected = torch.from_numpy(WHERE).expand(shape)
    assert torch.equal(to_mask(mask, shape), expected)
    if isinstance(mask, Image.Image):
        for suffix in ("png", "tif", "webp")[: 1 if mask.mode in ("I;16", "LA", "1") else 3]:
            mask.save(tmp_path / f"mask.{suffix}", lossless=True, exact=True)
            for file in (tmp_path / f"mask.{suffix}", str(tmp_path / f"mask.{suffix}")):
                assert torch.equal(to_mask(file, shape), expected)


def test_the_channels_of_a_mask_are_not_taken_for_its_images():
    """An array (H, W, 3) for three images."""
    mask = np.zeros((8, 8, 3), bool)
    for channel in range(3):
        mask[channel, 0, channel] = True
    assert torch.equal(to_mask(mask, (3, 3, 8, 8)), torch.from_numpy(mask).movedim(-1, 0).expand(3, 3, 8, 8))


@pytest.mark.parametrize("array", [np.array, torch.from_numpy])
def test_a_mask_for_images_or_for_channels_is_refused_where_it_could_be_both(array):
    masks = np.stack([WHERE, ~WHERE, WHERE])
    assert torch.equal(to_mask(array(masks), (3, 1, 8, 8)), torch.from_numpy(masks)[:, None])
    with pytest.raises(ValueError, match=r"mask has shape .*, for images or for channels: give \(3, 1, H, W\)"):
        to_mask(array(masks), (3, 3, 8, 8))


def test_masks_in_other_files(tmp_path):
    shape, expected = (1, 1, 8, 8), torch.from_numpy(WHERE)[None, None]
    np.save(tmp_path / "a.npy", drawn([200], [100]))
    (tmp_path / "a.pgm").write_bytes(pgm(drawn([1023], [300], np.uint16), 1023))
    (tmp_path / "a.tif").write_bytes(tiff(8, 8, 16, 0, drawn([300], [65535], np.uint16).astype("<u2").tobytes()))
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(drawn([255], [0]))))
    (tmp_path / "a.png").write_bytes(METADATA["exif.png"](turned, 6))
    for file in tmp_path.iterdir():
        assert torch.equal(to_mask(file, shape), expected), file


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (drawn([255], [0]).astype(np.int64), "mask is torch.int64, 0 to 255"),
        (drawn([255], [0]).astype(np.float32), "mask is torch.float32, 0 to 255"),
        (drawn([1], [-1], np.float32), "mask is torch.float32, -1 to 1"),
        (np.full((8, 8), np.nan), "mask is torch.float64, nan"),
        (drawn([1], [0]), "mask is black"),  # labels in uint8
        (Image.fromarray(drawn([255, 255, 255, 0], [0, 0, 0, 255])), "mask is black"),  # white, but transparent
        (Image.fromarray(drawn([1], [0], np.float32)), "floating point"),
        (Image.new("L", (9, 8), 255), "mask is 8 x 9 pixels"),
        (Image.new("L", (8, 1), 255), "mask is 1 x 8 pixels"),  # which an array of this shape would be broadcast from
        ("nowhere.png", "mask: nowhere.png: No such file"),
    ],
)
def test_other_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        to_mask(mask, (1, 3, 8, 8))


# ---- The pipeline and the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("center_crop", [True, False])
def test_images_of_another_size_are_resized_as_in_training(tmp_path, center_crop):
    pipe = tiny_pipe(3)
    record_center_crop(pipe.unet, center_crop)
    (tmp_path / "images").mkdir()
    Image.fromarray(random_images(20, 13, 3)).save(tmp_path / "images" / "a.png")
    trained_on = load(tmp_path / "images", resolution=8, center_crop=center_crop)
    expected = from_pixels(np.array(trained_on.images))
    file = tmp_path / "images" / "a.png"
    for image in (file, Image.open(file), [file]):
        with pytest.warns(UserWarning, match="images of 20 x 13 pixels are resized to 8 x 8, as in training"):
            varied = pipe.vary(image, 0.0, num_inference_steps=3, output_type="latent").images
        assert torch.equal(varied, expected)
    with pytest.raises(ValueError, match="images is 20 x 13 pixels: this network generates 8 x 8"):
        pipe.vary(np.asarray(Image.open(file)), 0.0)
    pipe.save_pretrained(tmp_path / "model")
    assert size_of(type(pipe).from_pretrained(tmp_path / "model").unet) == (8, 8, center_crop)


def test_a_mask_is_resized_like_its_image(tmp_path):
    """The left half of an image of twice the size is the left half."""
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :8] = 255
    resized = (1, 3, 8, 8), Size(8, 8, True), [Image.new("RGB", (16, 16))]
    white = to_mask(Image.fromarray(mask), *resized)
    assert torch.equal(white, torch.tensor([True] * 4 + [False] * 4).expand(1, 3, 8, 8))
    np.save(tmp_path / "mask.npy", mask)
    assert torch.equal(to_mask(tmp_path / "mask.npy", *resized), white)
    pipe, options = tiny_pipe(3), {"num_inference_steps": 3, "seeds": 0, "resamples": 1, "output_type": "latent"}
    record_center_crop(pipe.unet, True)
    image = random_images(16, 16, 3)
    with pytest.warns(UserWarning, match="resized"):
        painted = pipe.inpaint(Image.fromarray(image), Image.fromarray(mask), **options).images
    with pytest.warns(UserWarning, match="resized"):
        known = pipe.vary(Image.fromarray(image), 0.0, output_type="latent").images
    assert torch.equal(painted[..., 4:], known[..., 4:]) and not torch.equal(painted, known)


@pytest.mark.parametrize("mask", [(16, 40), (30, 30), (20, 8)])
def test_a_mask_of_another_size_than_its_image_is_refused(mask):
    """Cropped and resized by itself, it would cover another part of the image."""
    pipe, options = tiny_pipe(3), {"num_inference_steps": 3, "seeds": 0, "resamples": 1}
    record_center_crop(pipe.unet, True)
    image = Image.new("RGB", (40, 16))
    height, width = mask[::-1]
    message = rf"mask is {height} x {width} pixels \(height x width\): give 8 x 8 or 16 x 40"
    with pytest.warns(UserWarning, match="resized"), pytest.raises(ValueError, match=message):
        pipe.inpaint(image, Image.new("L", mask, 255), **options)
    for size in ((40, 16), (8, 8)):
        with pytest.warns(UserWarning, match="resized"):
            pipe.inpaint(image, Image.new("L", size, 255), **options)


def test_methods_take_files_and_composite_on_the_saved_background(tmp_path):
    pipe = tiny_pipe(3)
    pipe.unet.register_to_config(_background=BACKGROUND)
    layers = random_images(8, 8, 4)
    Image.fromarray(layers).save(tmp_path / "a.png")
    expected = from_pixels(chw(over(layers[..., :3], layers[..., 3:], BEHIND).astype(np.uint8)))[None]
    options = {"num_inference_steps": 3, "output_type": "latent"}
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(layers)):
        assert torch.equal(pipe.vary(image, 0.0, **options).images, expected)
        assert torch.equal(next(iter(pipe.trajectory(image=image, seeds=0, num_inference_steps=3))).x_0_pred, expected)
        torch.testing.assert_close(pipe.invert(image, 3), pipe.invert(expected, 3))
    fused = pipe.fuse([str(tmp_path / "a.png"), tmp_path / "a.png"], weight=[0.5, 0.5], **options).images
    torch.testing.assert_close(fused, pipe.fuse(expected, expected, **options).images)
    Image.fromarray(drawn([255] * 4, [255, 255, 255, 0])).save(tmp_path / "mask.png")
    painted = pipe.inpaint(tmp_path / "a.png", tmp_path / "mask.png", seeds=0, **options).images
    assert torch.equal((painted != expected).any(1)[0], torch.from_numpy(WHERE))


def test_a_16_bit_half_moon_stays_what_it_is(tmp_path):
    """Pillow's own conversion to 8 bits makes it white."""
    tiny_pipe().save_pretrained(tmp_path / "model")
    moon = np.zeros((8, 8), np.uint16)
    moon[:, 4:] = 144 * 257
    Image.fromarray(moon).save(tmp_path / "moon.png")
    command = ["vary", str(tmp_path / "model"), str(tmp_path / "moon.png"), "--strength", "0", "--device", "cpu"]
    assert main([*command, "-o", str(tmp_path / "same.png")]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "same.png")), moon // 257)
    assert quiet(DDPMPipeline.from_pretrained(tmp_path / "model")).vary(
        tmp_path / "moon.png", 0.0, output_type="np"
    ).images.mean() == pytest.approx(72 / 255, abs=1e-4)


def test_png_info_helpers_are_what_pillow_writes():
    """The chunk made by hand above is read as Pillow's own."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp(6).decode())
    ours = before_pixels(saved(Image.fromarray(UPRIGHT), "png"), itxt(xmp(6)))
    theirs = saved(Image.fromarray(UPRIGHT), "png", pnginfo=info)
    assert Image.open(io.BytesIO(ours)).info == Image.open(io.BytesIO(theirs)).info
