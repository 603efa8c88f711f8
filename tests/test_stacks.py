"""Folders and stacks of slices: names, order, kinds: python3 -m pytest tests/test_stacks.py"""

import os
from pathlib import Path

from common.arguments import InputError
from common.images import list_slices, read_slice

import cv2
import numpy as np
import pytest
import tifffile


def test_names_of_images(tmp_path):
    """Folders, loops and pipes named as images are passed over; any name that is text works."""
    folder = tmp_path / "slices"
    (folder / "folder.png").mkdir(parents=True)
    os.symlink("loop.png", folder / "loop.png")
    os.symlink("nowhere", folder / "dangling.png")
    os.symlink(folder, folder / "itself")
    os.mkfifo(folder / "pipe.png")
    (folder / "._0.png").write_bytes(b"of a Mac")
    (folder / ".DS_Store").touch()
    with pytest.raises(InputError, match="holds no image"):
        list_slices(folder)
    with pytest.raises(InputError, match="no such file"):
        list_slices(folder / "loop.png")
    image = np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8)
    data = cv2.imencode(".png", image)[1].tobytes()
    latin = os.fsdecode(b"latin-\xe4.png")
    for name in ("Schnitt äöü.png", "切片 1.png", "-x.png", "%d.png", "a;b'c.PNG", "🔬.png", latin):
        (folder / name).write_bytes(data)
        np.testing.assert_array_equal(read_slice(folder / name), image)
    assert len(list_slices(folder)) == 7


def test_the_order_is_one(tmp_path):
    """Numbers count as numbers; names that are one number written differently have an order too."""
    for name in ("10", "01", "1", "2", "001", "a1", "1a"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.eye(8, dtype=np.uint8))
    expected = ["001", "01", "1", "1a", "2", "10", "a1"]
    files = sorted(tmp_path.iterdir())
    for rotation in range(len(files)):
        order = files[rotation:] + files[:rotation]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "iterdir", lambda _, order=order: iter(order))
            assert [name for name, *_ in list_slices(tmp_path)] == expected


def test_files_of_other_kinds_are_named(tmp_path, capsys):
    """JPEG and BMP are read like PNG; what is left out is said; a cut-off JPEG or BMP is refused."""
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (60, 50), dtype=np.uint8), (0, 0), 3)
    for name in ("0.png", "1.jpg", "2.JPEG", "3.bmp"):
        assert cv2.imwrite(str(tmp_path / name), image)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "4.gif").write_bytes(b"GIF89a")
    np.save(tmp_path / "5.npy", image)
    slices = list_slices(tmp_path)
    assert [name for name, *_ in slices] == ["0", "1", "2", "3"]
    for _, file, page in slices:
        assert np.abs(read_slice(file, page).astype(int) - image).max() < 20
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "left out 4.gif, 5.npy, notes.txt" in said
    for name in ("1.jpg", "3.bmp", "0.png"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(InputError, match=name):
            read_slice(tmp_path / name)


def test_stacks_of_microscopes(tmp_path, capsys):
    """Pyramids, hyperstacks, OME-TIFF and rare compressions: read rightly, or refused with the way on."""
    stack = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as writer:  # smaller copies between the pages
        for image in stack:
            writer.write(image, photometric="minisblack")
            writer.write(image[::2, ::2], photometric="minisblack", subfiletype=1)
    tifffile.imwrite(tmp_path / "z.ome.tif", stack, metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "time.tif", stack, imagej=True, metadata={"axes": "TYX"})
    with tifffile.TiffWriter(tmp_path / "sub.tif") as writer:
        for image in stack:
            writer.write(image, photometric="minisblack", subifds=1)
            writer.write(image[::2, ::2], photometric="minisblack", subfiletype=1)
    for name in ("pyramid.tif", "z.ome.tif", "time.tif", "sub.tif"):
        pages = [read_slice(file, page) for _, file, page in list_slices(tmp_path / name)]
        np.testing.assert_array_equal(pages, stack)
    tifffile.imwrite(tmp_path / "plain.ome.tif", stack, metadata={"axes": "CYX"})
    assert capsys.readouterr().out == "" and len(list_slices(tmp_path / "plain.ome.tif")) == 3
    assert "plain.ome.tif: its 3 channels are taken for slices\n" in capsys.readouterr().out
    tifffile.imwrite(tmp_path / "composite.tif", stack[:2], imagej=True, metadata={"axes": "CYX", "mode": "composite"})
    colours = np.stack([stack, stack], 1)
    tifffile.imwrite(tmp_path / "c.ome.tif", colours, metadata={"axes": "ZCYX"})
    tifffile.imwrite(tmp_path / "hyper.tif", colours, imagej=True, metadata={"axes": "ZCYX"})
    for name in ("c.ome.tif", "hyper.tif", "composite.tif"):
        with pytest.raises(InputError, match=r"2 channels for a slice.*Split Channels"):
            list_slices(tmp_path / name)
    tifffile.imwrite(tmp_path / "odd.tif", stack[0], compression="lzma")
    np.testing.assert_array_equal(read_slice(tmp_path / "odd.tif"), stack[0])
    with tifffile.TiffFile(tmp_path / "odd.tif", mode="r+b") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(50000)
    with pytest.raises(InputError, match=r"ZSTD.*Fiji's Save As > Tiff"):
        read_slice(tmp_path / "odd.tif")
