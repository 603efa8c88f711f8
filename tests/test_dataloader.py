"""Reading, pairing and augmenting slices: python3 -m pytest tests/test_dataloader.py"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import dataloader
from common.arguments import InputError
from common.images import list_slices, normalise, read_slice
from conftest import ROOT, SMALL, one_line, write_pairs
from dataloader import AUGMENTATIONS, SelfDataSet, augment, border_weights

import cv2
import numpy as np
import pytest


def test_pairs_shapes_and_values(slices):
    """An item is (image, label), float32 (1, H, W): image normalised, label 0 or 1, white = 1."""
    data = SelfDataSet(slices)
    assert len(data) == 6 and data.shapes == [(48, 64)] * 6
    image, label = data[2]
    assert image.dtype == label.dtype == np.float32
    assert image.shape == label.shape == (1, 48, 64)
    assert abs(image.mean()) < 1e-5 and abs(image.std() - 1) < 1e-4
    assert set(np.unique(label)) == {0, 1}
    assert image[label == 1].mean() > image[label == 0].mean()  # membranes are dark


def test_natural_order(tmp_path):
    """2.png comes before 10.png, in training, predicting and the challenge's stack."""
    write_pairs(tmp_path, 12)
    for kind in ("image", "label"):  # no digit to int()
        (tmp_path / f"train_{kind}/11.png").rename(tmp_path / f"train_{kind}/11²0.png")
    assert SelfDataSet(tmp_path / "train_image").names == [*map(str, range(11)), "11²0"]
    held_out = SelfDataSet(tmp_path / "train_image", keep=slice(-2, None))
    assert held_out.names == ["10", "11²0"]


def test_every_problem_is_listed(slices, tmp_path):
    """Missing, unreadable, mismatched and grey labels are all named at once, when constructing."""
    write_pairs(tmp_path / "many", 25)
    for i in range(1, 25):
        (tmp_path / f"many/train_label/{i}.png").unlink()
    with pytest.raises(InputError, match=r"/20\.png: no label .*; … and 4 more$"):
        SelfDataSet(tmp_path / "many/train_image")
    labels = slices.with_name("train_label")
    (labels / "0.png").unlink()
    whole = (labels / "1.png").read_bytes()
    (labels / "1.png").write_bytes(whole[: len(whole) // 2])
    cv2.imwrite(str(labels / "2.png"), np.eye(40, 64) * 255)
    cv2.imwrite(str(labels / "3.png"), np.eye(48, 64) * 255 + np.eye(48, 64, 3) * 100)
    (slices / "4.png").write_bytes(b"not an image")
    cv2.imwrite(str(labels / "5.png"), cv2.merge([np.eye(48, 64, dtype=np.uint8) * k for k in (80, 90, 99)]))
    with pytest.raises(InputError) as caught:
        SelfDataSet(slices)
    problems = sorted(str(caught.value).split("; "), key=lambda problem: problem.partition(".png")[0][-1])
    said = ("no label", "can't be read", "(40, 64)", "3 values", "can't be read", "has colours")
    for i, (problem, phrase) in enumerate(zip(problems, said, strict=True)):
        assert f"/{i}.png: " in problem and phrase in problem


def test_bit_depth_colour_and_stacks(slices, tmp_path, capfd):
    """8 or 16 bit, grey or colour, files or a multi-page TIFF: the pairs come out the same."""
    pairs = [SelfDataSet(slices)[i] for i in range(-6, 0)]
    images = [read_slice(slices / f"{i}.png") for i in range(6)]
    labels = [read_slice(slices.with_name("train_label") / f"{i}.png") for i in range(6)]
    other = tmp_path / "other"
    for name in ("image", "label", "stack"):
        (other / name).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        cv2.imwrite(str(other / f"image/{i}.tif"), image.astype(np.uint16) * 257)
        # two values, but not 0 and 255, and in colour
        cv2.imwrite(str(other / f"label/{i}.tif"), cv2.merge([label // 255 * 40 + 7] * 3))
    cv2.imwritemulti(str(other / "stack/volume.tif"), images)
    cv2.imwritemulti(str(other / "stack/labels.tif"), labels)
    stack = SelfDataSet(other / "stack/volume.tif", other / "stack/labels.tif")
    assert stack.names == [f"volume_{i}" for i in range(6)]
    both = SelfDataSet(slices, other / "stack/labels.tif"), SelfDataSet(slices, other / "label")
    for data in (SelfDataSet(other / "image"), stack, *both):
        for (image, label), (expected_image, expected_label) in zip(data, pairs, strict=True):
            np.testing.assert_allclose(image, expected_image, atol=1e-4)
            np.testing.assert_array_equal(label, expected_label)
    assert capfd.readouterr().err == ""


def test_augmentation_is_joint_and_moves_pixels():
    """Flips, turns and crops act on (H, W), alike on image and label; all 8 symmetries come."""
    image = np.arange(36, dtype=np.float32).reshape(6, 6)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        a, b = augment([image, image + 100], rng, ("flip", "rotate"))
        np.testing.assert_array_equal(a + 100, b)
        seen.add(a.tobytes())
    symmetries = [np.rot90(f, k).tobytes() for f in (image, image.T) for k in range(4)]
    assert seen == set(symmetries)
    for kinds, count in ((("flip",), 4), (("rotate",), 4), ((), 1)):
        views = {augment([image], rng, kinds)[0].tobytes() for _ in range(100)}
        assert len(views) == count
    corners = {augment([image], rng, (), 4)[0][0, 0] for _ in range(200)}
    assert corners == {0, 1, 2, 6, 7, 8, 12, 13, 14}
    (oblong,) = augment([image[:4]], rng, ("rotate",))
    assert oblong.shape == (4, 6)  # batches need one shape


def test_elastic_deformation_is_joint_and_smooth():
    """Image, label and weight bend alike, by some 10 pixels, without a fold; others stay."""
    y, x = np.mgrid[:200, :300].astype(np.float32)
    stripes = (np.sin(x / 8) + np.sin(y / 8) > 0).astype(np.float32)
    shifts = []
    for seed in range(20):
        for crop in (None, 96):
            rng = np.random.default_rng(seed)
            image, label, weight = augment([x, stripes, stripes * 3 + 1], rng, ("elastic",), crop)
            assert image.dtype == np.float32 and image.shape == ((96, 96) if crop else (200, 300))
            assert set(np.unique(label)) == {0, 1}
            # x where the pixel came from; the label there, but for its edges, is the label here
            rng = np.random.default_rng(seed)
            from_y = augment([y, stripes], rng, ("elastic",), crop)[0]
            there = (np.sin(image / 8) + np.sin(from_y / 8) > 0).astype(np.float32)
            assert np.mean(there != label) < 0.03
            assert np.abs(weight - 3 * label - 1).mean() < 0.15
        inner = np.s_[50:-50, 50:-50]  # the borders are mirrored
        rng = np.random.default_rng(seed)
        moved = augment([x, stripes], rng, ("elastic",))[0] - x
        shifts.append(moved[inner].ravel())
        assert np.abs(np.diff(moved[inner], axis=1)).max() < 0.9
    assert 4 < np.std(shifts) < 12


def test_elastic_deformation_keeps_the_grain():
    """The finest contrast of noise stays within a tenth, or training would blur what is seen."""
    noise = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), 0.8)  # as fine as that of an electron micrograph
    (bent,) = augment([noise, noise], np.random.default_rng(1), ("elastic",))[:1]
    grain = [np.std(image - cv2.GaussianBlur(image, (0, 0), 1)) for image in (noise, bent)]
    assert grain[1] > 0.9 * grain[0]


def test_intensity_changes_the_image_alone():
    """Contrast, brightness, focus and grain vary within their bounds, and the label and weights not at all."""
    rng = np.random.default_rng(0)
    image, label = rng.normal(size=(2, 128, 128)).astype(np.float32)
    smooth = cv2.GaussianBlur(image, (0, 0), 4) * 14  # which a blur of a pixel leaves as it is
    means, slopes, grains = [], [], []
    padded = np.where(np.arange(128)[:, None] < 20, np.float32(0), smooth)
    for _ in range(200):
        framed = augment([padded], rng, ("intensity",))[0]
        assert not framed[:20].any() and framed[20:].all()  # padding is 0, as in prediction
        seen, same = augment([smooth, label], rng, ("intensity",))
        assert seen.dtype == np.float32 and np.array_equal(same, label)
        slope, mean = np.polyfit(smooth.ravel(), seen.ravel(), 1)
        means, slopes = [*means, mean], [*slopes, slope]
        grains.append(np.std(seen - slope * smooth - mean))
    assert -0.21 < min(means) < -0.15 and 0.15 < max(means) < 0.21
    assert 0.7 < min(slopes) < 0.8 and 1.25 < max(slopes) < 1.4
    assert min(grains) < 0.02 and 0.2 < max(grains) < 0.27
    fine = [np.std(augment([image], rng, ("intensity",))[0]) for _ in range(200)]
    assert min(fine) < 0.35 and max(fine) > 1.25  # a blur takes most of the finest grain


def test_border_weights_are_the_papers(slices):
    """1 + w0 exp(-(d1 + d2)^2 / 50) on membrane, 1 in cells, over their mean; computed by hand."""
    label = np.ones((40, 90), np.float32)
    label[:, 30] = 0  # a membrane of a pixel: 1 from either cell
    label[:, 50:60] = 0  # a thick one: d1 + d2 = 11
    label[10:20, 70:80] = 0  # a hole: one cell around it, no border between two
    weights = border_weights(label, 10)
    assert weights.dtype == np.float32 and weights.mean() == pytest.approx(1, abs=1e-5)
    weights = weights / weights[0, 0]
    assert weights[label == 1] == pytest.approx(1)
    assert weights[20, 30] == pytest.approx(1 + 10 * np.exp(-(2**2) / 50), rel=1e-4)
    assert weights[20, 50:60] == pytest.approx(1 + 10 * np.exp(-(11**2) / 50), rel=1e-4)
    assert weights[15, 75] < 1.2
    data = SelfDataSet(slices, border_weight=10, crop=32, augment=AUGMENTATIONS, repeat=3)
    assert len(data) == 18
    image, label, weight = data[17]
    assert image.shape == label.shape == weight.shape == (1, 32, 32)
    assert weight.dtype == np.float32 and (weight > 0).all()
    assert not np.array_equal(data[17][0], data[11][0])  # the same slice, cut anew


def test_augmentation_repeats_by_seed_epoch_and_index(slices):
    """None by default; with it, an item depends on (seed, epoch, index) and on nothing else."""
    plain = SelfDataSet(slices)
    np.testing.assert_array_equal(plain[0][0][0], normalise(read_slice(slices / "0.png")))
    data = SelfDataSet(slices, augment=AUGMENTATIONS, crop=32)
    first = data[1]
    data[0]
    np.testing.assert_array_equal(data[1][0], first[0])
    assert first[0].shape == first[1].shape == (1, 32, 32)
    data.epoch = 1
    assert not np.array_equal(data[1][0], first[0])
    other = SelfDataSet(slices, augment=AUGMENTATIONS, crop=32, seed=1)
    assert not np.array_equal(other[1][0], first[0])


def test_unusable_folders(tmp_path, slices):
    """A missing or empty folder, a twin name, a large crop: an InputError says what is wrong."""
    (tmp_path / "empty_image").mkdir()
    for path, said in ((tmp_path / "nowhere", "no such"), (tmp_path / "empty_image", "no image")):
        with pytest.raises(InputError, match=said):
            list_slices(path)
    with pytest.raises(InputError, match="crop 49"):
        SelfDataSet(slices, crop=49)
    with pytest.raises(InputError, match="--label_path"):
        SelfDataSet(slices / "0.png")
    (slices / "0.tif").write_bytes((slices / "0.png").read_bytes())
    with pytest.raises(InputError, match="same name"):
        list_slices(slices)


def test_border_weights_take_bounded_memory(slices, monkeypatch):
    """Those that are not kept are computed anew, and are the same."""
    kept = SelfDataSet(slices, border_weight=10)
    monkeypatch.setattr(dataloader, "KEPT_WEIGHTS", 2 * kept[0][2].nbytes)
    bounded = SelfDataSet(slices, border_weight=10)
    assert len(kept.weights) == 6
    assert 2 <= len(bounded.weights) < 6  # each of up to 4 threads may keep one at the bound
    for i in range(6):
        np.testing.assert_array_equal(kept[i][2], bounded[i][2])


@pytest.mark.parametrize("how", ["no room", "killed"])
def test_a_lost_worker_ends_the_run(how, slices, tmp_path):
    """Batches that don't fit into /dev/shm, or a worker that is killed: one line, no waiting for ever."""
    private = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*private, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    size = "size=64k" if how == "no room" else "size=64m"
    mount = ["sh", "-c", f'mount -t tmpfs -o {size} tmpfs /dev/shm && exec "$@"', "sh"]
    command = [sys.executable, ROOT / "TrainUnetDataSet.py", *SMALL, "--epochs", "100000", "--num_workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*private, *mount, *command], cwd=tmp_path, **pipes) as process:
        if how == "killed":
            while "epoch: 1 " not in process.stdout.readline():
                assert process.poll() is None
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while not (workers := children.read_text().split()):
                pass
            os.kill(int(workers[0]), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and one_line(errors) and "pass --num_workers 0" in errors, errors
