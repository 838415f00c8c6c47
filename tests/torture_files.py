"""Files for torture.py: changed checkpoints, pickles that run what they say, images with known pixels."""

import io
import os
import pickle
import random
import struct
import time
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

# ------------------------------------------------------------------------------------------------------ checkpoints


def rewritten(content: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    """An archive with other records and right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in records.items():
            archive.writestr(name, value)
    return file.getvalue()


def changed_checkpoint(whole: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was changed, content): each has another meaning than the whole one, detectably."""
    checkpoint = torch.load(io.BytesIO(whole), weights_only=True)
    key = rng.choice(["format", "name", "config", "model", "classes", "mean", "std", "args", "state", "optimizer"])
    how = rng.randrange(6)
    if how == 0:
        del checkpoint[key]
    elif how == 1:
        checkpoint[key] = rng.choice([None, 7, "seven", [], torch.zeros(2), {1: 2}, (0.5,)])
        key = f"{key}: {checkpoint[key]!r}"
    elif how == 2:  # two weights of different shapes change places
        weights = checkpoint["model"]
        a, b = rng.sample(sorted(weights), 2)
        while weights[a].shape == weights[b].shape:
            a, b = rng.sample(sorted(weights), 2)
        weights[a], weights[b], key = weights[b], weights[a], f"{a} and {b}"
    elif how == 3:  # one weight: gone, of another shape or kind, not finite, under another name
        weights = checkpoint["model"]
        name = rng.choice([name for name in sorted(weights) if weights[name].ndim])
        value = weights.pop(name)
        weights |= rng.choice([
            {}, {name: value[None]}, {name: value.half()}, {name: value * torch.nan}, {name: value.tolist()},
            {name: value.to_sparse()}, {name + "x": value}, {name: value.to("meta")},
        ])  # fmt: skip
        key = f"weight {name}"
    elif how == 4:  # the optimizer's, or the run's, numbers
        state, optimizer = checkpoint["state"], checkpoint["optimizer"]
        change = rng.randrange(6)
        if change == 0:
            state["step"] += 100
        elif change == 1:
            state["history"] = state["history"][:-1]
        elif change == 2:
            state["sums"] = [[0.0, 1.0]]
        elif change == 3:
            optimizer["state"][0]["momentum_buffer"] = torch.full((3, 5), 1.0)
        elif change == 4:
            optimizer["param_groups"][0]["params"] = optimizer["param_groups"][0]["params"][:-1]
        else:
            optimizer["state"][1]["momentum_buffer"] *= torch.inf
        key = f"state {change}"
    else:  # the network's numbers
        name = rng.choice(sorted(checkpoint["config"]))
        checkpoint["config"][name] = rng.choice([None, "many", 10**9, (10**9,) * 4, -1, [1.5], {}])
        key = f"config {name}: {checkpoint['config'][name]!r}"
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return f"{how} {key}", file.getvalue()


# --------------------------------------------------------------------------------------------------------- pickles


def string(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def value(item: object) -> bytes:
    """As a part of a pickle of protocol 2."""
    return pickle.dumps(item, 2)[2:-1]


class Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def hostile_calls(canary: str, other: str) -> list[tuple[str, str, tuple]]:
    """(module, name, arguments) that leave a file at `canary`; `other` is a file that exists."""
    script = f"open({canary!r}, 'w').close()"
    return [
        ("os", "system", (f"touch {canary}",)), ("posix", "system", (f"touch {canary}",)),
        ("subprocess", "call", (["touch", canary],)), ("subprocess", "check_output", (["touch", canary],)),
        ("subprocess", "Popen", (["touch", canary],)), ("os", "popen", (f"touch {canary}",)),
        ("builtins", "exec", (script,)), ("builtins", "eval", (script,)), ("builtins", "open", (canary, "w")),
        ("io", "open", (canary, "w")), ("codecs", "open", (canary, "w")), ("os", "mkdir", (canary,)),
        ("os", "open", (canary, os.O_CREAT | os.O_WRONLY)), ("os", "mknod", (canary,)), ("os", "link", (other, canary)),
        ("os", "symlink", (other, canary)), ("shutil", "copy", (other, canary)),
        ("shutil", "copyfile", (other, canary)),
        ("timeit", "timeit", (script, "pass", time.perf_counter, 1)), ("cProfile", "run", (script,)),
        ("logging", "FileHandler", (canary,)), ("zipfile", "ZipFile", (canary, "w")), ("gzip", "open", (canary, "wb")),
        ("tarfile", "open", (canary, "w")), ("bz2", "open", (canary, "wb")), ("lzma", "open", (canary, "wb")),
        ("runpy", "run_path", (other,)), ("numpy", "save", (canary, 1)), ("numpy", "savetxt", (canary, [1])),
        ("numpy", "savez", (canary, 1)), ("numpy", "memmap", (canary, "u1", "w+", 0, (4,))),
        ("numpy", "load", (other + ".npy", None, True)), ("torch", "save", ([1], canary)),
        ("torch.serialization", "save", ({}, canary)), ("dbm.dumb", "open", (canary, "c")),
    ]  # fmt: skip


def hostile_forms(module: str, name: str, arguments: tuple) -> dict[str, bytes]:
    """The call written in many ways, without the opcodes of beginning and end."""
    args, thing = value(arguments), f"c{module}\n{name}\n".encode()
    spread = b"".join(value(argument) for argument in arguments)
    command = value((f"touch {arguments[0]}",))
    return {
        "REDUCE": thing + args + b"R",
        "STACK_GLOBAL": string(module) + string(name) + b"\x93" + args + b"R",
        "INST": b"(" + spread + f"i{module}\n{name}\n".encode(),
        "OBJ": b"(" + thing + spread + b"o",
        "NEWOBJ": thing + args + b"\x81",
        "NEWOBJ_EX": thing + args + b"}\x92",
        "BUILD": b"cfunctools\npartial\n" + b"cbuiltins\nlen\n\x85R(" + thing + args + b"}Ntb)R",
        "EXT1": b"\x82\xf0" + command + b"R",
        "getattr": b"cbuiltins\ngetattr\ncimportlib\nimport_module\n" + string(module) + b"\x85R" + string(name)
        + b"\x86R" + args + b"R",
        "partial": b"cfunctools\npartial\n(" + thing + spread + b"tR)R",
        "map": b"cbuiltins\nlist\ncbuiltins\nmap\n(" + thing
        + b"".join(b"(" + value(argument) + b"l" for argument in arguments) + b"tR\x85R",
    }


# ---------------------------------------------------------------------------------------------------------- images

PNG = b"\x89PNG\r\n\x1a\n"
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(samples: np.ndarray, depth: int, colour: int, *chunks: bytes, interlaced: bool = False) -> bytes:
    """A PNG by the letter of its specification, without Pillow: samples (H, W, channels) of `depth` bits."""
    height, width, _ = samples.shape

    def lines(part: np.ndarray) -> bytes:
        if not part.size:
            return b""
        bits = (part.reshape(len(part), -1, 1).astype(int) >> np.arange(depth)[::-1]) & 1
        return b"".join(b"\0" + np.packbits(row.ravel()).tobytes() for row in bits)

    parts = [samples[y::dy, x::dx] for y, x, dy, dx in ADAM7] if interlaced else [samples]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    body = zlib.compress(b"".join(map(lines, parts)))
    return PNG + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def written(array: np.ndarray, form: str, mode: str | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)).save(file, form, **options)
    return file.getvalue()


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(H, W, 3) and (H, W, 1) of [0, 1] -> 0 to 255."""
    return (colour * alpha + 1 - alpha) * 255


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What EXIF's orientation asks for, by its own table: where row 0 and column 0 of the file are seen."""
    return {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2), 7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels[:, ::-1].transpose(1, 0, 2),
    }[orientation]  # fmt: skip


def exif(orientation: int) -> bytes:
    """A TIFF header with one entry, its orientation."""
    return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + b"\0\0\0\0"


def odd_images() -> list[tuple[str, bytes | None, np.ndarray | None, float]]:
    """(name, content, expected pixels (H, W, 3) of 0 to 255 or None for a refusal, tolerance)."""
    rng = np.random.default_rng(5)
    grey = rng.integers(0, 256, (6, 9, 1), dtype=np.uint8)
    rgb = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (6, 9, 1), dtype=np.uint8)
    deep = rng.integers(0, 65536, (6, 9, 4))
    white = np.full((6, 9, 3), 255)
    cases = []

    def add(name: str, content: bytes | None, expected: np.ndarray | None, tolerance: float = 0.5) -> None:
        cases.append((name, content, expected, tolerance))

    # PNG: every depth and colour type, whole and interlaced, by an encoder of our own.
    for interlaced in (False, True):
        tail = "-interlaced.png" if interlaced else ".png"
        for depth in (1, 2, 4, 8, 16):
            top = 2**depth - 1
            samples = deep[..., :1] % (top + 1)
            shades = np.broadcast_to(samples / top * 255, (6, 9, 3))
            add(f"grey{depth}{tail}", png(samples, depth, 0, interlaced=interlaced), shades)
            key = struct.pack(">H", samples[2, 3, 0])
            clear = np.where(samples == samples[2, 3], white, shades)
            add(f"grey{depth}-key{tail}", png(samples, depth, 0, chunk(b"tRNS", key), interlaced=interlaced), clear)
        for depth in (1, 2, 4, 8):
            palette = rng.integers(0, 256, (2**depth, 3), dtype=np.uint8)
            index = deep[..., :1] % 2**depth
            chunks = [chunk(b"PLTE", palette.tobytes())]
            add(f"palette{depth}{tail}", png(index, depth, 3, *chunks, interlaced=interlaced), palette[index[..., 0]])
            opacity = rng.integers(0, 256, 2**depth, dtype=np.uint8)
            chunks.append(chunk(b"tRNS", opacity.tobytes()))
            seen = on_white(palette[index[..., 0]] / 255, opacity[index] / 255)
            add(f"palette{depth}-alpha{tail}", png(index, depth, 3, *chunks, interlaced=interlaced), seen, 1)
        for depth in (8, 16):
            samples, top = deep >> (16 - depth), 2**depth - 1
            one = 0.5 if depth == 8 else 1  # Pillow keeps the upper 8 of 16 bits
            add(f"rgb{depth}{tail}", png(samples[..., :3], depth, 2, interlaced=interlaced),
                samples[..., :3] / top * 255, one)
            seen = on_white(samples[..., :3] / top, samples[..., 3:] / top)
            add(f"rgba{depth}{tail}", png(samples, depth, 6, interlaced=interlaced), seen, 2)
            seen = on_white(np.repeat(samples[..., :1] / top, 3, 2), samples[..., 3:] / top)
            add(f"la{depth}{tail}", png(samples[..., [0, 3]], depth, 4, interlaced=interlaced), seen, 2)
        key = struct.pack(">HHH", *rgb[2, 3].tolist())
        seen = np.where((rgb == rgb[2, 3]).all(2, keepdims=True), white, rgb)
        add(f"rgb8-key{tail}", png(rgb, 8, 2, chunk(b"tRNS", key), interlaced=interlaced), seen)

    # Other formats, written by Pillow from known pixels.
    bits = (grey > 127)[..., 0]
    for form in ("BMP", "PNG", "TIFF", "PPM", "GIF", "WEBP"):
        lossless = {"lossless": True} if form == "WEBP" else {}
        add(f"rgb.{form}", written(rgb, form, **lossless) if form != "GIF" else written(rgb[:, :1], form),
            rgb if form != "GIF" else rgb[:, :1], 0.5)
        add(f"grey.{form}", written(grey[..., 0], form, **lossless), np.repeat(grey, 3, 2))
    for form in ("BMP", "PNG", "TIFF", "PPM", "GIF"):
        add(f"bits.{form}", written(bits, form), np.repeat(bits[..., None] * 255, 3, 2))
    rgba = np.concatenate([rgb, alpha], 2)
    seen = on_white(rgb / 255, alpha / 255)
    for form in ("PNG", "TIFF"):
        add(f"rgba.{form}", written(rgba, form), seen, 1)
    add("rgba.WEBP", written(rgba, "WEBP", lossless=True, exact=True), seen, 1)
    for suffix, image in (("I;16", deep[..., 0].astype(np.uint16)), ("I;16B", deep[..., 0].astype(">u2"))):
        add(f"{suffix}.tif", written(image, "TIFF"), np.repeat(deep[..., :1] / 257, 3, 2), 0.51)
    add("16.pgm", b"P5 9 6 65535\n" + deep[..., 0].astype(">u2").tobytes(), np.repeat(deep[..., :1] / 257, 3, 2), 0.51)
    add("plain.ppm", b"P3 2 1 255\n1 2 3 4 5 6\n", np.array([[[1, 2, 3], [4, 5, 6]]]))
    add("ten.pgm", b"P2 2 1 10\n0 5\n", np.array([[[0] * 3, [127.5] * 3]]), 0.51)
    add("int.tif", written(deep[..., 0].astype(np.int32), "TIFF"), None)
    add("float.tif", written(deep[..., 0].astype(np.float32), "TIFF"), None)
    add("lab.tif", lab_tiff(), np.array([[[0] * 3, [255] * 3]]), 1)
    flat = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    for quality in (75, 100):
        for subsampling in (0, 2):
            content = written(flat, "JPEG", quality=quality, subsampling=subsampling)
            add(f"flat{quality}{subsampling}.jpg", content, flat, 4)
    add("progressive.jpg", written(flat, "JPEG", progressive=True), flat, 4)
    add("grey.jpg", written(flat[..., 0], "JPEG"), np.repeat(flat[..., :1], 3, 2), 3)
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    file = io.BytesIO()
    cmyk.save(file, "JPEG", quality=100)
    add("cmyk.jpg", file.getvalue(), np.broadcast_to([255, 0, 0], (16, 16, 3)), 6)
    ycc = io.BytesIO()
    Image.fromarray(flat).convert("YCbCr").save(ycc, "TIFF")
    add("ycbcr.tif", ycc.getvalue(), flat, 3)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "tiff_adobe_deflate"):
        add(f"{compression}.tif", written(rgb, "TIFF", compression=compression), rgb)

    # Orientation, animation, sizes.
    for orientation in range(1, 9):
        add(f"exif{orientation}.png", png(rgb, 8, 2, chunk(b"eXIf", exif(orientation))), turned(rgb, orientation))
    add("exif0.png", png(rgb, 8, 2, chunk(b"eXIf", exif(0))), rgb)
    add("exif99.png", png(rgb, 8, 2, chunk(b"eXIf", exif(99))), rgb)
    add("exif-broken.png", png(rgb, 8, 2, chunk(b"eXIf", exif(6)[:15])), rgb)
    add("exif-noise.png", png(rgb, 8, 2, chunk(b"eXIf", b"MM\0*" + bytes(range(200)))), rgb)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        file = io.BytesIO()
        frames[0].save(file, form, save_all=True, append_images=frames[1:], lossless=True)
        add(f"animation.{form}", file.getvalue(), np.broadcast_to([255, 0, 0], (8, 8, 3)))
    for height, width in ((1, 1), (1, 2000), (2000, 1)):
        shape = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        add(f"{height}x{width}.png", png(shape, 8, 2), shape)
    huge = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    add("huge.png", PNG + chunk(b"IHDR", huge) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b""), None)
    add("none.png", PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 9, 8, 2, 0, 0, 0)) + chunk(b"IEND", b""), None)
    add("huge.gif", b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\0;", None)
    bmp = struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)
    add("huge.bmp", b"BM" + bmp, None)
    add("huge.ppm", b"P6 1000000 1000000 255\n", None)
    add("text-bomb.png", png(rgb, 8, 2, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20), 9))), None)
    add("profile-bomb.png", png(rgb, 8, 2, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200 << 20), 9))), None)
    whole = png(rgb, 8, 2)
    add("wrong-suffix.jpg", whole, rgb)
    add("truncated.png", whole[: len(whole) // 2], None)
    add("crc.png", whole[:29] + b"\0\0\0\0" + whole[33:], None)
    add("truncated.jpg", written(np.tile(rgb, (20, 20, 1)), "JPEG")[:2000], None)
    add("empty.png", b"", None)
    add("text.png", b"no image at all\n" * 9, None)
    add("zeros.png", bytes(1000), None)
    add("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", None)
    add("vector.svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>", None)
    add("zip.png", rewritten_empty_zip(), None)
    add("a-folder.png", None, None)
    return cases


def lab_tiff() -> bytes:
    """A black pixel and a white one."""
    file, image = io.BytesIO(), Image.new("LAB", (2, 1), (0, 128, 128))
    image.putpixel((1, 0), (255, 128, 128))
    image.save(file, "TIFF")
    return file.getvalue()


def rewritten_empty_zip() -> bytes:
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").close()
    return file.getvalue()


def with_right_sums(content: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what is in them."""
    out, at = bytearray(content[:8]), 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        out += content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out)
