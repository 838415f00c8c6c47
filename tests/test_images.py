"""Test read_image: it shows what a viewer shows, or names the file. Expected pixels are numpy's."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision.transforms.v2.functional import resized_crop

from data import UserError, draw_box, read_crop, read_image

def random_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)

def read_array(path):
    return read_image(path).permute(1, 2, 0).numpy()

def test_rgb_in_lossless_formats(tmp_path):
    rgb = random_pixels(5, 7, 3)
    for suffix in ("png", "bmp", "ppm", "tif"):
        Image.fromarray(rgb).save(tmp_path / f"image.{suffix}")
        found = read_array(tmp_path / f"image.{suffix}")
        assert found.dtype == np.uint8 and np.array_equal(found, rgb)

def test_grey_and_one_bit_become_rgb(tmp_path):
    grey = random_pixels(4, 6)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.stack([grey] * 3))
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    assert np.array_equal(read_image(tmp_path / "bits.png"), np.stack([(grey > 127) * 255] * 3))

@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_lie_on_white(tmp_path, mode):
    values = random_pixels(4, 6, len(mode))
    values[0, 0, -1], values[0, 1, -1] = 0, 255
    Image.fromarray(values, mode).save(tmp_path / "image.png")
    colour, alpha = values[..., :-1].astype(float), values[..., -1:] / 255
    expected = np.broadcast_to(colour * alpha + 255 * (1 - alpha), (4, 6, 3))
    np.testing.assert_allclose(found := read_array(tmp_path / "image.png"), expected, atol=1)
    assert found[0, 0].tolist() == [255, 255, 255]

def test_a_transparent_palette_entry_lies_on_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([9, 9, 9, 10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "image.png", transparency=0)
    assert read_array(tmp_path / "image.png").tolist() == [[[255] * 3, [10, 20, 30], [40, 50, 60]]]

def test_cmyk(tmp_path):
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 0] = 255  # cyan ink alone leaves no red
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "image.jpg", quality=100)
    red, green, blue = read_image(tmp_path / "image.jpg").float().mean((1, 2))
    assert red < 5 and green > 250 and blue > 250

@pytest.mark.parametrize("orientation, turn", [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation(tmp_path, orientation, turn):
    rgb, exif = random_pixels(4, 6, 3), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(read_array(tmp_path / "image.png"), np.rot90(rgb, turn))

@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "CMYK", "RGB"])
def test_a_turned_tiff_is_turned_pixels(tmp_path, mode):
    """The files are not compressed. Pillow would map such a file into memory."""
    exif, image = Image.Exif(), Image.fromarray(random_pixels(4, 6, 3))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "as-it-is.tif")
    exif[0x0112] = 6
    image.save(tmp_path / "turned.tif", exif=exif)
    expected = np.rot90(read_array(tmp_path / "as-it-is.tif"), 3)
    np.testing.assert_array_equal(read_array(tmp_path / "turned.tif"), expected)
    box, whole = draw_box(6, 4, (0, 1, 5)), read_image(tmp_path / "turned.tif")
    crop = read_crop(tmp_path / "turned.tif", 8, seeds=(0, 1, 5))
    assert torch.equal(crop, resized_crop(whole, *box, [8, 8]))

@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(tmp_path, form):
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime"))
    first.save(tmp_path / "image", form, save_all=True, append_images=others, lossless=True)
    assert read_image(tmp_path / "image")[:, 4, 4].tolist() == [255, 0, 0]

def test_16_bit_grey_is_scaled(tmp_path):
    grey = np.array([[0, 128, 129, 257], [32768, 65278, 65279, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    expected = [[0, 0, 1, 1], [128, 254, 254, 255]]  # white is 65535 = 257 * 255
    assert read_image(tmp_path / "grey.png").tolist() == [expected] * 3
    (tmp_path / "grey.pgm").write_bytes(b"P5 2 1 65535\n\x80\x80\xff\xff")
    assert read_image(tmp_path / "grey.pgm").tolist() == [[[128, 255]]] * 3

@pytest.mark.parametrize("bits, black, pixels", [(12, 1, b"\0\x08\1"), (16, 0, b"\0\0\x80\x80")])
def test_grey_tiffs_with_another_white_are_refused(tmp_path, bits, black, pixels):
    """White is 4095 in 12 bits, and 0 if the tag 262 is 0."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: black, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels
    (tmp_path / "grey.tif").write_bytes(head + struct.pack("<H", len(tags)) + directory + bytes(4))
    with pytest.raises(UserError, match="mode I;16"):
        read_image(tmp_path / "grey.tif")

def test_a_text_of_two_megabytes_does_not_matter(tmp_path):
    text, rgb = PngImagePlugin.PngInfo(), random_pixels(2, 3, 3)
    text.add_text("key", "a" * 2**21, zip=True)
    Image.fromarray(rgb).save(tmp_path / "image.png", pnginfo=text)
    np.testing.assert_array_equal(read_array(tmp_path / "image.png"), rgb)

def encode(form, **options):
    file = io.BytesIO()
    Image.fromarray(random_pixels(40, 40, 3)).save(file, form, **options)
    return file.getvalue()

def overwrite(content):
    """Spoil the compressed pixels from the middle on, and keep the length."""
    return content[:2000] + b"\xff" * 400 + content[2400:]

@pytest.mark.parametrize("content, reason", [
    (b"", "cannot identify"), (b"no image", "cannot identify"),
    (encode("PNG")[:1000], "truncated"), (overwrite(encode("PNG")), "data stream"),
    (encode("JPEG", quality=98)[:1000], "truncated"),
    (overwrite(encode("TIFF", compression="tiff_lzw")), "decoder error"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "cannot identify"),  # runs Ghostscript
])  # fmt: skip
def test_a_file_that_is_no_image_is_named(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.png: cannot be read as an image \(.*{reason}.*\)$"):
        read_image(tmp_path / "a.png")

def test_values_without_a_white_and_too_many_pixels_are_refused(tmp_path, monkeypatch):
    Image.fromarray(random_pixels(4, 4).astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif: cannot be read .*mode F"):
        read_image(tmp_path / "float.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)  # Pillow allows twice as many
    with pytest.raises(UserError, match=r"float\.tif: cannot be read .*exceeds limit"):
        read_image(tmp_path / "float.tif")
