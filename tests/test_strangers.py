"""Files from strangers: python3 -m pytest tests/test_strangers.py"""

import ctypes
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import engine
from conftest import ROOT, SMALL, one_line, script, train, write_pairs
from dataloader import InputError, list_slices, read_slice
from test_training import metadata_of, tensors_of
from unet import UNet

import cv2
import numpy as np
import pytest
import safetensors.numpy
import tifffile
from oneflow import optim

CHECKPOINTS, IMAGES = 1000, 500


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """last.safetensors of a run of one epoch, of a narrow net."""
    folder = tmp_path_factory.mktemp("run")
    write_pairs(folder / "data", 2)
    train("--epochs", 1, cwd=folder)
    return folder / "checkpoints/last.safetensors"


def mutated(whole, rng, start):
    """A copy of the bytes with one thing wrong, half the time near the start."""
    data = bytearray(whole)
    place, other = (int(rng.integers(n)) for n in (start if rng.integers(2) else len(data), start))
    length = int(rng.integers(1, 50))
    kind = rng.integers(6)
    if kind == 0:
        del data[place:]
    elif kind == 1:
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        data[place : place + length] = rng.bytes(length)
    elif kind == 3:
        del data[place : place + length]
    elif kind == 4:
        data[place:place] = data[other : other + length]
    else:  # where lengths and offsets stand
        data[place : place + 4] = (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff")[rng.integers(3)]
    return bytes(data)


def test_damaged_checkpoints(checkpoint, tmp_path):
    """A thousand damaged checkpoints: each is refused in one line, whatever was hit."""
    whole, path = checkpoint.read_bytes(), tmp_path / "damaged.safetensors"
    header = int.from_bytes(whole[:8], "little")
    engine.load_checkpoint(checkpoint)
    rng = np.random.default_rng(0)
    tried = 0
    while tried < CHECKPOINTS:
        damaged = mutated(whole, rng, header + 8)
        if damaged == whole:
            continue
        tried += 1
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"whole|damaged") as error:
            engine.load_checkpoint(path)
            pytest.fail(f"mutation {tried} was not noticed")
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    # The name of the checksum itself: without one, nothing could be checked.
    path.write_bytes(whole.replace(b'"checksum"', b'"checksun"'))
    with pytest.raises(InputError, match="damaged"):
        engine.load_checkpoint(path)


FIRST, COUNT = "inc.double_conv.0.weight", "inc.double_conv.1.num_batches_tracked"
VARIANCE, MOMENT = "inc.double_conv.1.running_var", f"optimizer.exp_avg.{FIRST}"
# What a stranger can put in a checkpoint whose checksum is right: tensors (None: left out) ...
TENSORS = {
    "extra": ("extra", lambda old: np.zeros(3, np.float32)),
    "missing": ("outc.conv.bias", None),
    "first missing": (FIRST, None),
    "whole numbers": (FIRST, lambda old: old.astype(np.int32)),
    "truth values": (FIRST, lambda old: old > 0),
    "not finite": (FIRST, lambda old: old * np.inf),
    "a number": (FIRST, lambda old: np.array(1, np.float32)),
    "flat": (FIRST, lambda old: old.ravel()),
    "empty": (FIRST, lambda old: np.zeros((4, 0, 3, 3), np.float32)),
    "empty and wide": (FIRST, lambda old: np.zeros((10**6, 0, 3, 3), np.float32)),
    "empty and deep": (FIRST, lambda old: np.zeros((4, 10**12, 0, 0), np.float32)),
    "empty and many": ("outc.conv.weight", lambda old: np.zeros((10**12, 0, 1, 1), np.float32)),
    "beyond float32": (FIRST, lambda old: old.astype(np.float64) + 1e300),
    "far too large": (FIRST, lambda old: old * np.float32(1e37)),
    "wide": (FIRST, lambda old: np.zeros((200_000, 1, 3, 3), np.float32)),
    "count that is none": (COUNT, lambda old: np.array(np.nan, np.float32)),
    "negative variance": (VARIANCE, lambda old: -1 - old),
    "moment of another shape": (MOMENT, lambda old: old[:1]),
    "moment that is none": (MOMENT, lambda old: old * np.nan),
    "moment of whole numbers": (MOMENT, lambda old: old.astype(np.int8)),
    "moment missing": (MOMENT, None),
}
# ... and metadata.
BEST = {"epoch": 1, "loss": 0.5, "by": "val_loss", "threshold": 0.5}
METADATA = {
    "epoch": ["x", -3, 0, 1.5, [1], None, {"a": 1}, float("nan"), True, 10**400],
    "optimizer_step": ["x", -7, 2**40, None, [], 0.5],
    "best": ["x", [1], 7, {"loss": 1}, *({**BEST, key: float("nan")} for key in BEST)],
    "arguments": [[1], None, 7, {"lr": -1}, {"lr": "x\n--y"}, {"base_channels": 10**9}],
}
METADATA["best"].append({**BEST, "loss": 10**400})
METADATA["arguments"] += [
    {"base_channels": 8},
    {"bilinear": True},
    {"epochs": -1},
    {"crop": "../x"},
]
HOSTILE = [*TENSORS, *((key, value) for key, values in METADATA.items() for value in values)]


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_hostile_checkpoints(case, checkpoint, tmp_path):
    """A checkpoint made to harm, its checksum right: refused in one line, by who would use it."""
    tensors, metadata = tensors_of(checkpoint), metadata_of(checkpoint)
    del metadata["checksum"]
    if isinstance(case, str):
        name, change = TENSORS[case]
        if change:
            tensors[name] = change(tensors.get(name))
        else:
            del tensors[name]
    elif isinstance(case[1], dict) and case[0] == "arguments":
        metadata["arguments"] |= case[1]
    else:
        metadata[case[0]] = case[1]
    path = tmp_path / "hostile.safetensors"
    engine.write_checkpoint(path, tensors, metadata)

    def resume():
        data = checkpoint.parents[1] / "data/train_image"
        args = engine.parse_args("", ["--resume", str(path), "--data_path", str(data)])
        args.data_digest, args.processes = "", 1
        net = UNet(1, 1, bilinear=args.bilinear, base_channels=args.base_channels)
        engine.resume(args, net, optim.Adam(net.parameters()))

    users = [resume]
    if isinstance(case, str) and not case.startswith("moment"):
        users.append(lambda: engine.net_of_checkpoint(path))
    for use in users:
        with pytest.raises(InputError) as error:
            use()
        assert "\n" not in str(error.value)


def test_half_precision_is_fine(checkpoint, tmp_path):
    """Weights and moments of another type of float are taken over, and training goes on."""
    tensors, metadata = tensors_of(checkpoint), metadata_of(checkpoint)
    del metadata["checksum"]
    halved = {n: t.astype(np.float16) if t.dtype == np.float32 else t for n, t in tensors.items()}
    engine.write_checkpoint(tmp_path / "half.safetensors", halved, metadata)
    data = checkpoint.parents[1] / "data/train_image"
    flags = ("--resume", "half.safetensors", "--data_path", data, "--epochs", 2)
    done = script("TrainUnetDataSet.py", "--device", "cpu", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_message_is_one_line_whatever_the_file_says(checkpoint, tmp_path):
    """Line ends and what colours a terminal, in a checkpoint or a name, are written out."""
    tensors, metadata = tensors_of(checkpoint), metadata_of(checkpoint)
    del metadata["checksum"]
    evil = "a\nb\x1b[2J"
    metadata["arguments"]["data_path"] = evil
    engine.write_checkpoint(tmp_path / "evil.safetensors", tensors, metadata)
    flags = ("--resume", "evil.safetensors", "--device", "cpu")
    done = script("TrainUnetDataSet.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and one_line(done.stderr)
    assert r"a\nb\x1b[2J" in done.stderr
    (tmp_path / evil).mkdir()
    done = script("predict_unet_test.py", "--Test_Data_path", evil, cwd=tmp_path)
    assert done.returncode == 2 and one_line(done.stderr) and r"a\nb\x1b[2J" in done.stderr


def test_weights_that_lead_to_no_number(checkpoint, tmp_path):
    """Finite weights that overflow: predicting says so, exit 2, and writes no picture."""
    tensors = {
        n: t * np.float32(1e29) if t.ndim == 4 else t for n, t in tensors_of(checkpoint).items()
    }
    tensors = {n: t for n, t in tensors.items() if not n.startswith("optimizer")}
    safetensors.numpy.save_file(tensors, tmp_path / "large.safetensors")
    data = checkpoint.parents[1] / "data/train_image"
    flags = ("--checkpoint", "large.safetensors", "--Test_Data_path", data, "--device", "cpu")
    done = script("predict_unet_test.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and one_line(done.stderr) and "no number" in done.stderr
    assert not list((tmp_path / "predict_image").iterdir())


def test_a_slice_that_vanishes_is_one_line(slices, tmp_path):
    """A slice that a loading worker can't read any more ends training in one line, exit 2."""
    command = [sys.executable, ROOT / "TrainUnetDataSet.py", *SMALL, "--epochs", "10000"]
    command += ["--num_workers", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        while "epoch: 1 " not in process.stdout.readline():
            assert process.poll() is None
        (slices / "3.png").write_bytes(b"")
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and one_line(errors) and "3.png: can't be read" in errors


def test_hostile_headers(tmp_path):
    """Lengths that no file has, metadata nested without end, weights that aren't numbers."""
    path = tmp_path / "hostile.safetensors"
    for length in (2**63, 2**64 - 1, 90_000_000, 0):
        path.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
        with pytest.raises(InputError, match="whole"):
            engine.load_checkpoint(path)
    deep = {"nested": "[" * 100_000}
    path.write_bytes(safetensors.numpy.save({"a": np.zeros(3, np.float32)}, deep))
    with pytest.raises(InputError, match="doesn't hold a U-Net's weights"):
        engine.net_of_checkpoint(path)
    whole_numbers = {
        n: t.numpy().astype(np.int8) for n, t in UNet(1, 1, base_channels=2).state_dict().items()
    }
    path.write_bytes(safetensors.numpy.save(whole_numbers))
    with pytest.raises(InputError, match="another shape or type"):
        engine.net_of_checkpoint(path)


# Reads each file named on stdin with the one reader of images; a crash would end it.
READER = """
import sys
from dataloader import InputError, list_slices, read_slice
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
    for dtype in (np.uint8, np.int8, np.uint16, np.int16, np.int32, np.float32, np.float64):
        values = (grey - 128 * np.issubdtype(dtype, np.signedinteger)).astype(dtype)
        for order in "<>":
            np.testing.assert_array_equal(write("grey.tif", values, byteorder=order), values)
    np.testing.assert_array_equal(write("z.tif", image, compression="zlib"), image)
    np.testing.assert_array_equal(write("tiles.tif", image, tile=(16, 16)), image)
    # One bit, a palette, white as 0, colour with and without transparency, CMYK.
    for kind, expected in (("minisblack", light), ("miniswhite", ~light)):
        np.testing.assert_array_equal(write("bit.tif", light, photometric=kind), expected * 255)
    for dtype, big, order in ((np.uint16, False, ">"), (np.float32, True, "<")):
        options = {"photometric": "miniswhite", "bigtiff": big, "byteorder": order}
        with pytest.raises(InputError, match="0 for white"):
            write("white.tif", grey.astype(dtype), **options)
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
    options = {
        "photometric": "minisblack",
        "planarconfig": "contig",
        "extrasamples": ["unassalpha"],
    }
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
    tifffile.imwrite(tmp_path / "ij.tif", five, imagej=True)
    assert len(list_slices(tmp_path / "ij.tif")) == 5
    tifffile.imwrite(tmp_path / "ij.tif", five, imagej=True, truncate=True)
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


def test_names_of_images(tmp_path):
    """Folders, loops and pipes named as images are passed over; any name that is text works."""
    folder = tmp_path / "slices"
    (folder / "folder.png").mkdir(parents=True)
    os.symlink("loop.png", folder / "loop.png")
    os.symlink("nowhere", folder / "dangling.png")
    os.symlink(folder, folder / "itself")
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(InputError, match="holds no image"):
        list_slices(folder)
    with pytest.raises(InputError, match="no such file"):
        list_slices(folder / "loop.png")
    image = np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8)
    data = cv2.imencode(".png", image)[1].tobytes()
    for name in ("Schnitt äöü.png", "切片 1.png", "-x.png", "%d.png", "a;b'c.PNG", "🔬.png"):
        (folder / name).write_bytes(data)
        np.testing.assert_array_equal(read_slice(folder / name), image)
    assert len(list_slices(folder)) == 6
    with open(os.path.join(os.fsencode(folder), b"latin-\xe4.png"), "wb") as file:
        file.write(data)
    with pytest.raises(InputError, match="UTF-8"):
        list_slices(folder)


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
