"""Prediction as a user runs it: python3 -m pytest tests/test_predict.py"""

import signal
import subprocess
import sys

import engine
import predict_unet_test
from conftest import ROOT, one_line, script, train, write_pairs
from dataloader import normalise, read_slice
from unet import UNet

import cv2
import numpy as np
import oneflow as flow
import pytest
import safetensors.numpy
from PIL import Image


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a checkpoint that has learnt the tiny slices, and twelve of them to predict."""
    folder = tmp_path_factory.mktemp("trained")
    write_pairs(folder / "data", 4)
    train("--epochs", 15, "--lr", 0.01, "--batch_size", 2, cwd=folder)
    write_pairs(folder / "new", 12, shape=(50, 70), seed=1)
    return folder


def predict(*args, cwd):
    return script("predict_unet_test.py", "--device", "cpu", *args, cwd=cwd)


def test_files_and_values(trained):
    """One probability, mask and overlay for each slice, and a stack in numeric order."""
    given = ("--Test_Data_path", "new/train_image", "--save_res_path", "a/b", "--threshold", 0.4)
    done = predict(*given, "--stack", "a/stack.tif", cwd=trained)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    kinds = ("prob", "mask", "overlay")
    names = {f"{i}_{kind}.png" for i in range(12) for kind in kinds}
    assert {path.name for path in (trained / "a/b").iterdir()} == names

    net, _ = engine.net_of_checkpoint(trained / "checkpoints/best.safetensors")
    net.eval()
    stack = Image.open(trained / "a/stack.tif")  # not by the library that wrote it
    assert stack.n_frames == 12 and stack.mode == "F"
    errors = []
    for i in range(12):
        slice_file = trained / f"new/train_image/{i}.png"
        image = normalise(read_slice(slice_file))
        with flow.no_grad():
            logits = net(flow.tensor(image[None, None])).numpy()[0, 0].astype(np.float64)
        expected = 1 / (1 + np.exp(-logits))
        stack.seek(i)
        np.testing.assert_allclose(np.asarray(stack), expected, atol=1e-5)
        images = {k: cv2.imread(str(trained / f"a/b/{i}_{k}.png"), -1) for k in kinds}
        np.testing.assert_allclose(images["prob"], expected * 255, atol=0.51)
        assert images["overlay"].shape == (50, 70, 3)
        clear = abs(expected - 0.4) > 1e-5
        np.testing.assert_array_equal(images["mask"][clear], ((expected > 0.4) * 255)[clear])
        label = read_slice(trained / f"new/train_label/{i}.png")
        errors.append(np.mean(images["mask"] != label))
    assert np.mean(errors) < 0.1  # slices that it was not trained on, and of another size


def test_cells(trained):
    """--cells numbers 4-connected cells that lines of a pixel part, and colours them."""
    given = ("--Test_Data_path", "new/train_image", "--save_res_path", "cells")
    done = predict(*given, "--cells", cwd=trained)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for i in range(12):
        kinds = ("mask", "cells", "colours")
        mask, cells, colours = (
            cv2.imread(str(trained / f"cells/{i}_{kind}.png"), -1) for kind in kinds
        )
        assert cells.dtype == np.uint16 and colours.shape == (50, 70, 3)
        interior, count = cv2.connectedComponents((mask > 0).astype(np.uint8), connectivity=4)[::-1]
        assert cells.max() == count - 1  # each of the mask's cells, grown
        for cell in range(1, count):
            assert len(np.unique(cells[interior == cell])) == 1
        for axis in (0, 1):
            one, other = (np.delete(cells, end, axis) for end in (0, -1))
            assert not ((one != other) & (one > 0) & (other > 0)).any()
        grey = colours.max(2).astype(int) - colours.min(2) == 0
        assert grey[mask == 0].all() and not grey[mask > 0].any()
    assert "older" not in done.stdout
    assert "NAME_cells.png and NAME_colours.png are older" in predict(*given, cwd=trained).stdout


def test_no_cell_where_there_is_no_interior(tmp_path):
    """All membrane: no cell has a number, nothing is coloured."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 50)).astype(np.uint8)
    predict_unet_test.write_slice(tmp_path / "a", noise, np.zeros((40, 50)), 0.5, True)
    assert not cv2.imread(str(tmp_path / "a_cells.png"), -1).any()
    colours = cv2.imread(str(tmp_path / "a_colours.png"))
    assert (colours == colours[:, :, :1]).all()


def test_interrupting_leaves_whole_files_only(trained):
    """Ctrl-C: exit 130, one line, the pictures so far are whole, nothing half-written is left."""
    command = [sys.executable, ROOT / "predict_unet_test.py", "--device", "cpu", "--tta"]
    command += ["--Test_Data_path", "new/train_image", "--save_res_path", "i", "--stack", "i/s.tif"]
    with subprocess.Popen(command, cwd=trained, stderr=subprocess.PIPE, text=True) as process:
        while not (trained / "i/0_overlay.png").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted: the slices finished so far" in errors
    assert errors.count("\n") == 2
    left = sorted(path.name for path in (trained / "i").iterdir())
    assert not [name for name in left if name.startswith(".") or name == "s.tif"]
    for name in left:
        assert cv2.imread(str(trained / "i" / name)) is not None


def test_tiles_dont_show():
    """Tiles give the whole slice's result to rounding, away from the slice's own edges."""
    net = UNet(1, 1, bilinear=False, base_channels=2).eval()
    for name, parameter in net.named_parameters():
        # Every convolution averages, so that the most distant pixel in reach has a say.
        if parameter.ndim == 4:
            inputs = parameter.shape[0] if ".up." in name else parameter[0].numel()
            flow.nn.init.constant_(parameter, 1 / inputs)
        elif name.endswith("bias"):
            flow.nn.init.constant_(parameter, 0)
    image = np.random.default_rng(0).uniform(0, 4, (500, 340)).astype(np.float32)
    whole = predict_unet_test.predict(net, image, "cpu")
    tiled = predict_unet_test.predict_tiled(net, image, "cpu", 256)
    inner = np.s_[112:-112, 112:-112]
    assert whole.max() < 0.99  # the sigmoid isn't flat there
    np.testing.assert_allclose(tiled[inner], whole[inner], rtol=0, atol=5e-7)
    # Continued by as many mirrored pixels as tiles have margins, the edges are the same too.
    mirrored = predict_unet_test.predict_mirrored(net, image, "cpu", 512, 96)
    np.testing.assert_allclose(tiled, mirrored, rtol=0, atol=5e-7)
    assert abs(whole - mirrored).max() > 0.01


def test_mirrored_slices(trained, monkeypatch):
    """--mirror changes what is near the edges, with --tta too, and shifts nothing."""
    given = ("--Test_Data_path", "new/train_image/0.png", "--save_res_path", "m")
    for tta in ((), ("--tta",)):
        results = []
        for flags in ((), ("--mirror", 96)):
            done = predict(*given, *tta, *flags, cwd=trained)
            assert done.returncode == 0, done.stderr
            results.append(cv2.imread(str(trained / "m/0_prob.png"), -1).astype(int))
        plain, mirrored = results
        change = np.abs(plain - mirrored)
        middle = change[16:-16, 16:-16].mean()
        assert 2 * middle < (change.sum() - middle * 18 * 38) / (50 * 70 - 18 * 38)

    monkeypatch.setattr(predict_unet_test, "predict", lambda net, image, device: image.copy())
    image = np.random.default_rng(0).random((40, 30)).astype(np.float32)
    for run in (predict_unet_test.predict_tiled, predict_unet_test.predict_symmetries):
        back = predict_unet_test.predict_mirrored(None, image, "cpu", 512, 48, run)
        np.testing.assert_allclose(back, image, rtol=1e-6)


def test_symmetries():
    """--tta predicts the same however the slice is turned, and isn't the plain prediction."""
    flow.manual_seed(0)
    net = UNet(1, 1, bilinear=True, base_channels=4).eval()
    image = np.random.default_rng(0).normal(size=(100, 90)).astype(np.float32)
    mean = predict_unet_test.predict_symmetries(net, image, "cpu", 0)
    turned = np.ascontiguousarray(np.rot90(np.flipud(image)))
    turned_mean = predict_unet_test.predict_symmetries(net, turned, "cpu", 0)
    np.testing.assert_allclose(turned_mean, np.rot90(np.flipud(mean)), atol=1e-6)
    assert abs(mean - predict_unet_test.predict(net, image, "cpu")).max() > 1e-4


def test_bare_weights_and_old_checkpoints(trained):
    """Weights without our metadata, as PyTorch writes them, work; flow.save needs a flag."""
    tensors, _, _ = engine.load_checkpoint(trained / "checkpoints/best.safetensors")
    # PyTorch's own metadata, which aren't JSON
    safetensors.numpy.save_file(tensors, trained / "bare.safetensors", {"format": "pt"})
    half = {n: t.astype(np.float16) if t.dtype == np.float32 else t for n, t in tensors.items()}
    safetensors.numpy.save_file(half, trained / "half.safetensors")
    flow.save({name: flow.tensor(t) for name, t in tensors.items()}, str(trained / "old"))
    outputs = []
    for name in (None, "bare.safetensors", "old", "half.safetensors"):
        flags = ("--checkpoint", name) if name else ()
        trust = ("--trust_pickle",) if "old" in flags else ()
        given = ("--Test_Data_path", "new/train_image/0.png", "--save_res_path", "c")
        done = predict(*given, *flags, *trust, cwd=trained)
        assert done.returncode == 0, done.stderr
        outputs.append((trained / "c/0_prob.png").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]
    exact, half = (cv2.imdecode(np.frombuffer(outputs[i], np.uint8), -1) for i in (0, 3))
    assert np.abs(exact.astype(int) - half).max() <= 4  # half precision, for files to send around


def test_weights_in_the_box(tmp_path):
    """checkpoints/isbi2012.safetensors: small, whole, nothing but a net, no path of its maker."""
    boxed = predict_unet_test.BOXED
    assert boxed.stat().st_size < 16e6
    _, moments, metadata = engine.load_checkpoint(boxed)
    assert not moments
    net, _ = engine.net_of_checkpoint(boxed)
    assert net.base_channels == metadata["model"]["base_channels"]
    assert metadata["threshold"] == 0.5  # as README says
    assert metadata["arguments"]["data_path"] == "data/train_image"
    # It finds the synthetic sample's membranes, which look like those that it has seen.
    script("data/prepare.py", "sample", "--out", tmp_path, cwd=tmp_path)
    image = normalise(read_slice(tmp_path / "test_image/0.png"))
    interior = read_slice(tmp_path / "test_label/0.png") > 0
    found = predict_unet_test.predict(net.eval(), image, "cpu") > 0.5
    assert (found != interior).mean() < 0.1 < 0.15 < (~interior).mean()


def test_bad_input_is_one_line(trained):
    """Bad input: exit 2 with one line that names it, and no output folder."""
    (trained / "empty").mkdir()
    (trained / "broken").mkdir()
    (trained / "broken/0.png").write_bytes(b"\x89PNG\r\n")
    small = trained / "small.png"
    cv2.imwrite(str(small), np.zeros((15, 40), np.uint8))
    (trained / "sizes").mkdir()
    for name, size in (("0", 40), ("1", 41)):
        cv2.imwrite(str(trained / f"sizes/{name}.png"), np.zeros((size, 40), np.uint8))
    (trained / "file").write_text("in the way")
    state = UNet(3, 1, bilinear=False, base_channels=2).state_dict()
    colour = {name: tensor.numpy() for name, tensor in state.items()}
    safetensors.numpy.save_file(colour, trained / "colour.safetensors")
    cases = (
        (("--Test_Data_path", "nowhere"), "nowhere"),
        (("--Test_Data_path", "empty"), "empty"),
        (("--Test_Data_path", "broken"), "0.png"),
        (("--Test_Data_path", small), "small.png"),
        (("--checkpoint", "nothing.safetensors"), "train"),
        (("--checkpoint", "checkpoints"), "--trust_pickle"),
        (("--checkpoint", "file"), "file"),
        (("--checkpoint", "colour.safetensors"), "3 channels"),
        (("--stack", "new"), "new"),
        (("--Test_Data_path", "sizes", "--stack", "s.tif"), "sizes/1.png: is of another size"),
        (("--threshold", 1.5), "--threshold"),
        (("--tile", 100), "--tile"),
        (("--device", "cuda"), "--device"),
        (("--save_res_path", "new/train_image"), "--save_res_path"),
        (("--save_res_path", "file"), "file"),
    )
    for flags, said in cases:
        given = {"--Test_Data_path": "new/train_image", "--save_res_path": "d"}
        given.update(zip(flags[::2], flags[1::2], strict=True))
        done = predict(*(part for pair in given.items() for part in pair), cwd=trained)
        assert done.returncode == 2, flags
        assert one_line(done.stderr) and said in done.stderr, done.stderr
    assert not (trained / "d").exists()
