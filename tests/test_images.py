"""read_image: what a viewer would show, or one line that names the file. Expected pixels are numpy's, not Pillow's."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import read_image


def pixels(*shape, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape)


def test_rgb_in_lossless_formats(tmp_path):
    rgb = pixels(5, 7, 3).astype(np.uint8)
    for suffix in ("png", "bmp", "ppm", "tif"):
        Image.fromarray(rgb).save(tmp_path / f"image.{suffix}")
        image = read_image(tmp_path / f"image.{suffix}")
        assert image.dtype == torch.uint8
        np.testing.assert_array_equal(image.permute(1, 2, 0), rgb)


def test_16_bit_grey_is_scaled(tmp_path):
    grey = np.array([[0, 128, 129, 257], [32768, 65278, 65279, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    expected = [[0, 0, 1, 1], [128, 254, 254, 255]]  # 65535 is white: 257 steps of 16 bits are one of 8
    assert read_image(tmp_path / "grey.png").tolist() == [expected] * 3


def test_grey_and_one_bit_become_rgb(tmp_path):
    grey = pixels(4, 6).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.stack([grey] * 3))
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png"), np.stack([(grey > 127) * 255] * 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_lie_on_white(tmp_path, mode):
    values = pixels(4, 6, len(mode)).astype(np.uint8)
    values[0, 0, -1], values[0, 1, -1] = 0, 255
    Image.fromarray(values, mode).save(tmp_path / "image.png")
    colour, alpha = values[..., :-1].astype(float), values[..., -1:] / 255
    expected = np.broadcast_to(colour * alpha + 255 * (1 - alpha), (4, 6, 3))
    np.testing.assert_allclose(read_image(tmp_path / "image.png").permute(1, 2, 0), expected, atol=1)
    assert read_image(tmp_path / "image.png")[:, 0, 0].tolist() == [255, 255, 255]


def test_a_transparent_palette_entry_lies_on_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([9, 9, 9, 10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "image.png", transparency=0)
    assert read_image(tmp_path / "image.png")[:, 0].T.tolist() == [[255] * 3, [10, 20, 30], [40, 50, 60]]


def test_cmyk(tmp_path):
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 0] = 255  # cyan ink alone: no red
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "image.jpg", quality=100)
    red, green, blue = read_image(tmp_path / "image.jpg").float().mean((1, 2))
    assert red < 5 and green > 250 and blue > 250


@pytest.mark.parametrize("orientation, turn", [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation(tmp_path, orientation, turn):
    rgb = pixels(4, 6, 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png").permute(1, 2, 0), np.rot90(rgb, turn))


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "CMYK", "RGB"])
def test_a_turned_tiff_is_turned_pixels(tmp_path, mode):
    """Without compression, which Pillow would map into memory."""
    exif, image = Image.Exif(), Image.fromarray(pixels(4, 6, 3).astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image = image if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "as-it-is.tif")
    exif[0x0112] = 6
    image.save(tmp_path / "turned.tif", exif=exif)
    plain = read_image(tmp_path / "as-it-is.tif").permute(1, 2, 0)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.tif").permute(1, 2, 0), np.rot90(plain, 3))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(tmp_path, form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "image", form, save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(tmp_path / "image")[:, 4, 4].tolist() == [255, 0, 0]


def one_row_png(width: int, depth: int, colour: int, transparent: bytes, row: bytes) -> bytes:
    """A file of one row."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)), (b"tRNS", transparent),
              (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks)


@pytest.mark.parametrize("depth, top", [(2, 3), (4, 15), (16, 65535)])
def test_a_transparent_grey_of_any_depth_lies_on_white(tmp_path, depth, top):
    row = {2: b"\x1b", 4: b"\x01\x2f", 16: struct.pack(">4H", 0, 1, 2, 65535)}[depth]  # 0, 1, 2 and white
    (tmp_path / "grey.png").write_bytes(one_row_png(4, depth, 0, b"\0\1", row))
    expected = [0, 255, round(2 / top * 255), 255]
    assert read_image(tmp_path / "grey.png").tolist() == [[expected]] * 3


def test_a_transparent_colour_of_16_bits_lies_on_white(tmp_path):
    key = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    (tmp_path / "rgb.png").write_bytes(one_row_png(2, 16, 2, key, key + struct.pack(">3H", 0x3400, 0x7800, 0xBC00)))
    assert read_image(tmp_path / "rgb.png")[:, 0].T.tolist() == [[255] * 3, [0x34, 0x78, 0xBC]]


def test_16_bit_pgm(tmp_path):
    (tmp_path / "grey.pgm").write_bytes(b"P5 2 1 65535\n\x80\x80\xff\xff")
    assert read_image(tmp_path / "grey.pgm").tolist() == [[[128, 255]]] * 3


@pytest.mark.parametrize(
    "bits, black, content, expected",
    [
        (12, 1, "000801 fff00f", [0, 128, 255, 1]),  # two values in three bytes
        (16, 1, "0000 8080 ffff 0101", [0, 128, 255, 1]),
        (16, 0, "0000 8080 ffff 0101", [255, 127, 0, 254]),
    ],
)
def test_deep_grey_tiff(tmp_path, bits, black, content, expected):
    """black: the tag by which 0 is black, or white."""
    content = bytes.fromhex(content)
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: black, 273: 8, 277: 1, 278: 1, 279: len(content)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(content)) + content
    (tmp_path / "grey.tif").write_bytes(head + struct.pack("<H", len(tags)) + directory + bytes(4))
    assert read_image(tmp_path / "grey.tif").tolist() == [[expected]] * 3


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(40, 40, 3).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def broken_lines(form: str, **options: object) -> bytes:
    """An image whose compressed lines are overwritten from the middle on, while the file has its length."""
    file = io.BytesIO()
    Image.fromarray(pixels(40, 40, 3).astype(np.uint8)).save(file, form, **options)
    content = bytearray(file.getvalue())
    content[2000:2400] = b"\xff" * 400
    return bytes(content)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "cannot identify"),
        (b"no image", "cannot identify"),
        (png()[:1000], "truncated"),
        (broken_lines("PNG"), "data stream"),
        (broken_lines("TIFF", compression="tiff_lzw"), "decoder error"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "cannot identify"),  # Pillow would run Ghostscript
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, reason):
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"image.png: cannot be read as an image \(.*{reason}.*\)$"):
        read_image(tmp_path / "image.png")


def test_too_many_pixels_and_values_without_a_white_are_refused(tmp_path, monkeypatch):
    Image.fromarray(pixels(4, 4).astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="mode F"):
        read_image(tmp_path / "float.tif")
    (tmp_path / "image.png").write_bytes(png())
    monkeypatch.setattr(data, "MAX_PIXELS", 40 * 40 - 1)
    with pytest.raises(ValueError, match="40 x 40 pixels, expected at most 1599"):
        read_image(tmp_path / "image.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("nothing", "pipe"):
        with pytest.raises(ValueError, match=rf"{name}\.png: cannot be read"):
            read_image(tmp_path / f"{name}.png")
