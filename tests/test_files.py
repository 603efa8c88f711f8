"""Image files from microscopes and strangers: python3 -m pytest tests/test_files.py"""

import ctypes
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.arguments import InputError
from common.images import find_border, list_slices, normalise, read_slice
from conftest import ROOT, mutated

import cv2
import numpy as np
import pytest
import tifffile

IMAGES = 500


# Reads each file named on stdin with the one reader of images; a crash would end it.
READER = """
import sys
from common.arguments import InputError
from common.images import list_slices, read_slice
for line in sys.stdin:
    try:
        pages = [read_slice(file, page) for _, file, page in list_slices(line[:-1])]
        print("read", hash(pages[0].tobytes()), flush=True)
    except InputError as error:
        print("refused", str(error).count(chr(10)), line[:-1] in str(error), flush=True)
"""


def test_damaged_images(tmp_path):
    """Five hundred damaged PNGs and TIFFs: each is read or refused in a line, none crashes.

    A PNG that is read is what it was, by its check sums; a TIFF has none.
    """
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 50), dtype=np.uint8)
    grey16 = image.astype(np.uint16) * 257
    kinds = [
        cv2.imencode(".png", image)[1].tobytes(),
        cv2.imencode(".png", grey16)[1].tobytes(),
        cv2.imencode(".png", np.dstack([image] * 3))[1].tobytes(),
        cv2.imencode(".tif", image)[1].tobytes(),
    ]
    for options in ({}, {"bigtiff": True}, {"compression": "zlib"}, {"tile": (16, 16)}):
        stack = np.stack([image] * 3).astype(np.float32)
        tifffile.imwrite(tmp_path / "made.tif", stack, photometric="minisblack", **options)
        kinds.append((tmp_path / "made.tif").read_bytes())
    suffixes = [".png"] * 3 + [".tif"] * 5
    paths, sound = [], []
    for i, data in enumerate(kinds):
        paths.append(tmp_path / f"whole{i}{suffixes[i]}")
        paths[-1].write_bytes(data)
    for i in range(IMAGES):
        kind = i % len(kinds)
        data = mutated(kinds[kind], rng, min(400, len(kinds[kind])))
        if kind < 3:
            if rng.integers(2):
                data = with_right_sums(data)  # so that it reaches the decoder
            else:
                sound.append((len(paths), kind))
        paths.append(tmp_path / f"{i}{suffixes[kind]}")
        paths[-1].write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input="".join(f"{path}\n" for path in paths),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "", (done.returncode, paths[len(lines)])
    assert len(lines) == len(kinds) + IMAGES
    for i, kind in sound:
        assert lines[i] in ("refused 0 True", lines[kind]), paths[i]
    assert all(line.startswith("read") for line in lines[: len(kinds)])
    refused = [line for line in lines if line.startswith("refused")]
    assert set(refused) == {"refused 0 True"}
    assert 0.3 * IMAGES < len(refused) < 0.95 * IMAGES


def with_right_sums(data):
    """A PNG whose chunks' check sums are right, as far as its lengths are."""
    data, place = bytearray(data), 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(data)


def png(depth, colour_type, rows, size, palette=None):
    """A PNG by hand; rows: the bytes of each row."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"".join(rows), 9))]
    if palette is not None:
        parts.insert(1, chunk(b"PLTE", palette.tobytes()))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def test_kinds_of_images(tmp_path):
    """Every kind of PNG and TIFF that a microscope or a stranger comes with has its result."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 48), dtype=np.uint8)
    light = image > 127
    grey = image.astype(np.float64)

    def read(name):
        ((_, file, page),) = list_slices(tmp_path / name)
        return read_slice(file, page).astype(np.float64)

    def write(name, array, **options):
        tifffile.imwrite(tmp_path / name, array, **options)
        return read(name)

    # Grey of any depth: the values themselves.
    for dtype in map(np.dtype, ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")):
        values = (grey - 128 * np.issubdtype(dtype, np.signedinteger)).astype(dtype)
        for order in "<>":
            np.testing.assert_array_equal(write("grey.tif", values, byteorder=order), values)
    np.testing.assert_array_equal(write("z.tif", image, compression="zlib"), image)
    np.testing.assert_array_equal(write("tiles.tif", image, tile=(16, 16)), image)
    # One bit, 0 for white (which tifffile writes for bits and means 0 for black), a palette, colours, CMYK.
    np.testing.assert_array_equal(write("bit.tif", light, photometric="minisblack"), light * 255)
    for software in (None, "Microscope 1"):
        np.testing.assert_array_equal(write("bool.tif", light, software=software), light * 255)
    for dtype, big, order in ((bool, False, "<"), (np.uint8, True, "<"), (np.uint16, False, ">"), (float, True, "<")):
        options = {"photometric": "miniswhite", "bigtiff": big, "byteorder": order, "metadata": None, "software": "me"}
        values = grey.astype(dtype)
        full = {bool: 255, float: 0}.get(dtype) if dtype in (bool, float) else np.iinfo(dtype).max
        np.testing.assert_array_equal(
            write("white.tif", values, **options), full - values * (255.0 if dtype is bool else 1)
        )
    falling = np.arange(255, -1, -1)
    table = np.stack([falling * 257] * 3).astype(np.uint16)
    inverted = write("palette.tif", image, photometric="palette", colormap=table)
    np.testing.assert_allclose(inverted, 255 - grey, atol=1)
    colour = np.dstack([image, image // 2, 255 - image])
    luma = colour @ (0.299, 0.587, 0.114)
    np.testing.assert_allclose(write("rgb.tif", colour, photometric="rgb"), luma, atol=1)
    deep = write("deep.tif", colour.astype(np.uint16) * 257, photometric="rgb")
    np.testing.assert_allclose(deep / 257, luma, atol=1)
    # What OpenCV would turn, mix up or leave out.
    for orientation in range(2, 9):
        with pytest.raises(InputError, match="upright"):
            kind = "BHI"[orientation % 3]  # BYTE, SHORT or LONG
            tags = [(274, kind, 1, orientation, True)]
            write("turned.tif", image, extratags=tags, byteorder="<>"[orientation % 2])
    for dtype in (np.uint8, np.uint16):
        planes, pair = (np.stack([image] * n, axis).astype(dtype) for n, axis in ((3, 0), (2, -1)))
        for kind in ("rgb", "minisblack"):
            with pytest.raises(InputError, match="3 channels"):
                write("planes.tif", planes, photometric=kind, planarconfig="separate")
        with pytest.raises(InputError, match="2 channels"):
            write("pair.tif", pair, photometric="minisblack", planarconfig="contig")
    opaque = np.dstack([image, image * 0 + 255])
    options = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}
    np.testing.assert_array_equal(write("alpha.tif", opaque, **options), image)
    ink = np.dstack([image * 0] * 3 + [255 - image])
    np.testing.assert_allclose(write("cmyk.tif", ink, photometric="separated"), grey, atol=1)
    pixels = [b"\0" + row.tobytes() for row in image]
    bits = [b"\0" + np.packbits(row).tobytes() for row in light]
    opaque = [b"\0" + np.dstack([row, row * 0 + 9]).tobytes() for row in image]
    palette = np.repeat(falling.astype(np.uint8), 3)
    for data, expected in (
        (png(1, 0, bits, (48, 40)), light * 255),
        (png(8, 3, pixels, (48, 40), palette), 255 - grey),
        (png(8, 4, opaque, (48, 40)), grey),
    ):
        (tmp_path / "kind.png").write_bytes(data)
        np.testing.assert_allclose(read("kind.png"), expected, atol=1)
    # What can't be read is refused: bombs, other numbers, nothing, text.
    # What no memory could hold isn't unpacked; what it just can isn't taken for a slice.
    for name, side in (("bomb.png", 60_000), ("small bomb.png", 20_000)):
        row = bytes(1 + (side + 7) // 8)
        (tmp_path / name).write_bytes(png(1, 0, [row] * side, (side, side)))
        assert (tmp_path / name).stat().st_size < 500_000
    tifffile.imwrite(tmp_path / "complex.tif", grey.astype(np.complex64))
    tifffile.imwrite(tmp_path / "nan.tif", np.full((40, 48), np.nan, np.float32))
    tifffile.imwrite(tmp_path / "huge.tif", np.full((40, 48), 1e39))
    (tmp_path / "text.tif").write_text("no image")
    for name in ("empty.png", "empty.tif"):
        (tmp_path / name).touch()
    refused = ("complex.tif", "nan.tif", "huge.tif", "text.tif", "empty.png", "empty.tif")
    for name in ("bomb.png", "small bomb.png", *refused):
        with pytest.raises(InputError, match=name):
            read(name)
    # A stack that lost its end is refused, not read in part.
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([image] * 5), photometric="minisblack")
    assert len(list_slices(tmp_path / "stack.tif")) == 5
    five = np.stack([image] * 5)
    for options in ({"imagej": True}, {"photometric": "minisblack"}):
        tifffile.imwrite(tmp_path / "ij.tif", five, **options)
        assert len(list_slices(tmp_path / "ij.tif")) == 5
        tifffile.imwrite(tmp_path / "ij.tif", five, truncate=True, **options)
        with pytest.raises(InputError, match="slices in one page"):
            list_slices(tmp_path / "ij.tif")
    (tmp_path / "stack.png").write_bytes((tmp_path / "stack.tif").read_bytes())
    assert len(list_slices(tmp_path / "stack.png")) == 5
    whole = (tmp_path / "stack.tif").read_bytes()
    for share in (0.3, 0.6, 0.9):
        (tmp_path / "stack.tif").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match=r"stack\.tif"):
            for _, file, page in list_slices(tmp_path / "stack.tif"):
                read_slice(file, page)


def test_borders_of_aligned_stacks():
    """Padding of one value at the edges doesn't count; what is saturated here and there in tissue does."""
    rng = np.random.default_rng(0)
    tissue = np.clip(rng.normal(128, 60, (200, 180)), 0, 255).astype(np.uint8)  # 2 % are 0 or 255
    assert not find_border(tissue).any()
    plain = normalise(tissue)
    for value in (0, 255, 90):
        framed = np.full((260, 300), value, np.uint8)
        framed[40:240, 60:240] = tissue
        framed[:60, :80][np.add.outer(np.arange(60), np.arange(80)) < 110] = value  # a corner, as of a rotation
        inside = ~find_border(framed)
        assert not inside[:40].any() and inside[40:240, 60:240].mean() > 0.95
        normal = normalise(framed)
        assert not normal[0].any() and not normal[:, :60].any()
        np.testing.assert_allclose(normal[inside], plain[inside[40:240, 60:240]], atol=0.03)
        two_sides = np.pad(tissue, ((40, 0), (0, 70)), constant_values=value)
        np.testing.assert_allclose(
            normalise(two_sides)[40:, :180][~find_border(two_sides)[40:, :180]].std(), 1, atol=1e-3
        )
    assert not normalise(np.full((40, 40), 7.0)).any()
    flat = normalise(np.float32(1e-9) * tissue)  # not flat: in other units
    np.testing.assert_allclose(flat, plain, atol=1e-4)


def test_overlapping_threads_leave_stderr_alone(tmp_path, capfd):
    """What OpenCV prints of a damaged file is silenced, in threads too, and descriptor 2 is back afterwards."""
    (tmp_path / "a.tif").write_bytes(b"II*\0" + b"\xff" * 90)

    def attempt(_):
        with pytest.raises(InputError):
            read_slice(tmp_path / "a.tif")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attempt, range(200)))
    os.write(2, b"still there\n")
    assert capfd.readouterr().err == "still there\n"


def test_unreadable_files():
    """What may not be read, a file, a folder or the folder above, is named, by any user."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        closed = Path(folder) / "closed"
        closed.mkdir()
        for name in ("a.png", "b.tif", "closed/c.png"):
            (Path(folder) / name).write_bytes(b"x")
            (Path(folder) / name).chmod(0)
        closed.chmod(0)
        os.chmod(folder, 0o755)
        me = ctypes.CDLL(None).setfsuid(65534)  # root may read everything: be nobody for a while
        try:
            for name in ("a.png", "b.tif", "closed", "closed/c.png"):
                with pytest.raises(InputError, match=f"{name}: can't be read"):
                    for _, file, page in list_slices(Path(folder) / name):
                        read_slice(file, page)
        finally:
            ctypes.CDLL(None).setfsuid(me)
