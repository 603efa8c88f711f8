"""The synthetic sample, and what data/prepare.py refuses: python3 -m pytest tests/test_sample.py"""

from conftest import one_line, script, tree

import cv2
import numpy as np
import pytest


@pytest.mark.parametrize(
    "args, name, marker",
    [
        (["sample"], "train_image", None),
        (["isbi", "--source", "http://127.0.0.1:1/x"], "train_label", None),
        (["isbi", "--source", "http://127.0.0.1:1/x"], "test_image", "my microscope\n"),
        (["sample"], "test_label", "isbi2012\n"),  # ISBI has none, so somebody put it there
    ],
)
def test_own_folders_are_refused(args, name, marker, tmp_path):
    """Folders that the script did not make are refused and not touched."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.png").write_bytes(b"mine")
    if marker:
        (tmp_path / "source.txt").write_text(marker)
    before = tree(tmp_path)
    done = script("data/prepare.py", *args, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert one_line(done.stderr) and name in done.stderr and "--out DIR" in done.stderr
    assert tree(tmp_path) == before


def test_bad_arguments_are_one_line(tmp_path):
    """Exit codes: 2 for bad arguments, with one line on stderr."""
    for args in ([], ["nonsense"], ["isbi", "--nonsense"]):
        done = script("data/prepare.py", *args, cwd=tmp_path)
        assert done.returncode == 2 and one_line(done.stderr)


def read(folder, count):
    names = [folder / f"{i}.png" for i in range(count)]
    assert sorted(folder.iterdir()) == sorted(names)
    return np.stack([cv2.imread(str(name), cv2.IMREAD_UNCHANGED) for name in names])


def test_sample(tmp_path):
    """`prepare.py sample` makes the same labelled slices each time and says they are synthetic."""
    outs = tmp_path / "one", tmp_path / "other"
    for out in outs:
        done = script("data/prepare.py", "sample", "--out", out, cwd=tmp_path)
        assert done.returncode == 0 and "SYNTHETIC" in done.stdout
    assert tree(outs[0]) == tree(outs[1])
    assert (outs[0] / "source.txt").read_text() == "synthetic sample\n"
    for part, count in (("train", 20), ("test", 5)):
        images = read(outs[0] / f"{part}_image", count)
        labels = read(outs[0] / f"{part}_label", count)
        assert images.shape == labels.shape == (count, 256, 256)
        assert images.dtype == labels.dtype == np.uint8
        assert set(np.unique(labels)) == {0, 255}
        assert 0.18 < (labels == 0).mean() < 0.26
        # Membrane is dark, so the polarity is right; and as in real tissue there is no grey level
        # that parts the two (all interior alone scores 0.22).
        assert images[labels == 255].mean() - images[labels == 0].mean() > 30
        errors = []
        for image, label in zip(images, labels, strict=True):
            blurred = cv2.GaussianBlur(image, (0, 0), 2)
            errors.append(min(((blurred > t) != (label > 0)).mean() for t in range(256)))
        assert np.mean(errors) > 0.12
