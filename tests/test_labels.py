"""Labels as people have them, and what makes ours of them: python3 -m pytest tests/test_labels.py"""

import shutil

from common.arguments import InputError
from common.labels import read_label
from conftest import one_line, script
from dataloader import SelfDataSet
from inside import run_inside

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image


def rewrite(slices, change, suffix=".png"):
    """Replace the labels beside `slices` by change(i, interior); returns their folder."""
    folder = slices.with_name("train_label")
    for i in range(len(list(slices.iterdir()))):
        interior = cv2.imread(str(folder / f"{i}.png"), -1) > 0
        (folder / f"{i}.png").unlink()
        label = change(i, interior)
        if suffix == ".tif":
            tifffile.imwrite(folder / f"{i}.tif", label)
        else:
            assert cv2.imwrite(str(folder / f"{i}{suffix}"), label)
    return folder


def cells_of(interior):
    return cv2.connectedComponents(interior.astype(np.uint8), connectivity=4)[1]


def touching(i, interior):
    """A number a cell, that of one grown over every second column of the membrane between the two."""
    cells = cells_of(interior).astype(np.uint16) * 300
    ring = ~interior
    ring[:, ::2] = False
    cells[ring] = 300
    return cells


def soft(i, interior):
    return cv2.GaussianBlur(np.uint8(255) * interior, (3, 3), 0)


def coloured(i, interior):
    return np.where(interior[:, :, None], (0, 0, 200), (0, 90, 0)).astype(np.uint8)


# How labels come: what is written, as which kind of file, what the refusal says, the flags that convert (None: none).
KINDS = {
    "white membranes": (lambda i, a: np.uint8(255) * ~a, ".png", "--membrane white", "--membrane white"),
    "white as 1": (lambda i, a: (~a).astype(np.uint16), ".tif", "--membrane white", "--membrane white"),
    "bool and white": (lambda i, a: ~a, ".tif", "--membrane white", "--membrane white"),
    "soft": (soft, ".png", "--threshold 127.5", "--threshold 127.5"),
    "soft, 16 bit": (lambda i, a: soft(i, a) * np.uint16(257), ".png", "--threshold 32767.5", "--threshold 32767.5"),
    "much blurred": (lambda i, a: cv2.GaussianBlur(np.uint8(255) * a, (0, 0), 5), ".png", "--threshold 1", None),
    "few cells": (lambda i, a: cells_of(cv2.erode(np.uint8(a), np.ones((9, 9)))), ".tif", "--cells", None),
    "jpeg": (lambda i, a: np.uint8(255) * a, ".jpg", "--threshold 1", "--threshold 127"),
    "soft and white": (
        lambda i, a: 255 - soft(i, a),
        ".png",
        "--threshold 127.5",
        "--threshold 127.5 --membrane white",
    ),
    "cells": (lambda i, a: cells_of(a).astype(np.uint16) * 7, ".png", "--cells", "--cells"),
    "cells that touch": (touching, ".png", "--cells", "--cells"),
    "three classes": (lambda i, a: np.uint8(255 if i < 3 else 128) * a, ".png", "has 3 values", None),
    "int64 cells": (lambda i, a: cells_of(a).astype(np.int64) + (1 << 40) * a, ".tif", "--cells", "--cells"),
    "soft floats": (lambda i, a: soft(i, a).astype(np.float32) / 255, ".tif", "--threshold 0.5", "--threshold 0.5"),
    "two ids a tile": (lambda i, a: np.where(a, 1000 + i, 2000 + i).astype(np.uint16), ".png", "has 12 values", None),
    "colours": (coloured, ".png", "has colours", None),
    "one value": (lambda i, a: np.full(a.shape, 255, np.uint8), ".png", "1 values (255)", None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_refused_and_can_be_converted(kind, slices):
    """Nobody's labels are read the wrong way round in silence: the refusal names the command, and that makes ours."""
    expected = [read_label(slices.with_name("train_label") / f"{i}.png") > 0 for i in range(6)]
    change, suffix, said, flags = KINDS[kind]
    labels = rewrite(slices, change, suffix)
    before = {file: file.read_bytes() for file in labels.iterdir()}
    with pytest.raises(InputError) as error:
        SelfDataSet(slices)
    assert said in str(error.value) and ("prepare.py labels" in str(error.value) or kind == "one value")
    if flags is None:
        return
    done = run_inside("data/prepare.py", "labels", labels, slices.with_name("made"), *flags.split(), cwd=slices)
    assert done.returncode == 0, done.stderr
    assert "made: 6 labels, " in done.stdout and "interior, " in done.stdout and "cells a slice" in done.stdout
    made = SelfDataSet(slices, slices.with_name("made"))
    for i, interior in enumerate(expected):
        found = made[i][1][0] > 0.5
        if kind == "cells that touch":
            assert found[:, ::2][interior[:, ::2]].mean() > 0.8
            assert cells_of(found).max() >= cells_of(interior).max()
        else:
            assert (found == interior).mean() > (0.96 if "soft" in kind or kind == "jpeg" else 0.999)
    assert {file: file.read_bytes() for file in labels.iterdir()} == before


RIGHT = {
    "bool": (lambda a: a, {}),  # which tifffile stores as 0 for white
    "0 for white": (lambda a: np.uint8(255) * ~a, {"photometric": "miniswhite", "software": "Fiji", "metadata": None}),
    "uint32": (lambda a: a.astype(np.uint32), {}),
    "int64, 1 and 2": (lambda a: a + np.int64(1), {}),
    "floats": (lambda a: a.astype(np.float64), {}),
    "colours that are grey": (lambda a: np.repeat(np.uint8(200) * a[..., None], 3, -1), {"photometric": "rgb"}),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_right_labels_of_any_type_are_read(kind, slices):
    """As the program that wrote them reads them, in a folder or as a stack."""
    labels = slices.with_name("train_label")
    expected = [read_label(labels / f"{i}.png") for i in range(6)]
    change, options = RIGHT[kind]
    written = [change(label > 0) for label in expected]
    tifffile.imwrite(slices.with_name("stack.tif"), np.stack(written), **options)
    for i, label in enumerate(written):
        (labels / f"{i}.png").unlink()
        tifffile.imwrite(labels / f"{i}.tif", label, **options)
    for path in (labels, slices.with_name("stack.tif")):
        np.testing.assert_array_equal([label[0] for _, label in SelfDataSet(slices, path)], expected)


def test_white_membranes_of_a_stack(slices):
    """A stack of labels is judged as a folder is, and its command converts it."""
    labels = slices.with_name("train_label")
    expected = [read_label(labels / f"{i}.png") for i in range(6)]
    tifffile.imwrite(slices.with_name("white.tif"), np.uint8(1) - np.array(expected, np.uint8))
    with pytest.raises(InputError, match=r"labels .*white\.tif OUT --membrane white"):
        SelfDataSet(slices, slices.with_name("white.tif"))
    done = run_inside("data/prepare.py", "labels", "white.tif", "made", "--membrane", "white", cwd=slices.parent)
    assert done.returncode == 0, done.stderr
    made = SelfDataSet(slices, slices.with_name("made"))
    np.testing.assert_array_equal([label[0] for _, label in made], expected)


def test_labels_of_one_value_are_labels(slices):
    """A slice that is all interior or all membrane counts with the others' values; so does a part of the set."""
    rewrite(slices, lambda i, a: np.full(a.shape, 255, np.uint8) if i == 5 else a * np.uint8(255))
    whole = SelfDataSet(slices, border_weight=10)
    assert whole[5][1].all() and not whole[0][1].all() and whole.values == (0, 255)
    np.testing.assert_allclose(whole[5][2], 1)
    assert SelfDataSet(slices, keep=slice(-1, None))[0][1].all()
    rewrite(slices, lambda i, a: np.zeros(a.shape, np.uint8) if i == 5 else a * np.uint8(255))
    assert not SelfDataSet(slices)[5][1].any() and not SelfDataSet(slices, keep=slice(-1, None))[0][1].any()


def test_what_hides_the_polarity_is_refused(slices, tmp_path):
    """Palettes whose order is not that of their colours, and labels that are in the transparency only."""
    label = slices.with_name("train_label") / "0.png"
    interior = read_label(label) > 0
    indices = Image.fromarray(interior.astype(np.uint8), "P")
    indices.putpalette([255, 255, 255, 0, 0, 0])
    shown = np.dstack([np.full(interior.shape, 255, np.uint8), np.uint8(255) * interior])
    for picture, kind in ((indices, "a palette"), (Image.fromarray(shown, "LA"), "transparency")):
        picture.save(label)
        with pytest.raises(InputError, match=rf"has {kind}.*prepare\.py labels.*--threshold 127"):
            SelfDataSet(slices)
    done = run_inside("data/prepare.py", "labels", label, "alpha", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(read_label(tmp_path / "alpha/0.png") > 0, interior)


def test_converting_writes_over_nothing(slices, tmp_path):
    """A folder that is there is refused, as are labels that need a flag: one line, and nothing is left behind."""
    labels = rewrite(slices, soft)
    (tmp_path / "file").touch()
    for out, flags, said in (
        (labels, ("--threshold", "127"), "exists already"),
        (tmp_path / "new", (), "--threshold 127.5"),
        (tmp_path / "new", ("--cells", "--membrane", "white"), "--cells goes with"),
        (tmp_path / "file/new", ("--threshold", "127"), "cannot write"),
    ):
        names = sorted(str(path) for path in tmp_path.rglob("*"))
        done = run_inside("data/prepare.py", "labels", labels, out, *flags, cwd=tmp_path)
        assert done.returncode == 2 and one_line(done.stderr) and said in done.stderr, done.stderr
        assert sorted(str(path) for path in tmp_path.rglob("*")) == names
    stack = tmp_path / "labels.tif"
    tifffile.imwrite(stack, np.stack([cv2.imread(str(labels / f"{i}.png"), -1) for i in range(6)]))
    done = script("data/prepare.py", "labels", stack, "made", "--threshold", "127", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert len(SelfDataSet(slices, tmp_path / "made")) == 6
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == [f"{i}.png" for i in range(6)]
    shutil.rmtree(tmp_path / "made")
    done = run_inside("data/prepare.py", "labels", stack, "made", "--threshold=127", "--membrane=white", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with pytest.raises(InputError, match="--membrane white"):  # the wrong way round
        SelfDataSet(slices, tmp_path / "made")
