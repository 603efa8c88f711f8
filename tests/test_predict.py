"""Prediction as a user runs it: python3 -m pytest tests/test_predict.py"""

import ctypes
import os
import signal
import subprocess
import sys

import predict_unet_test
from common import checkpoint, tiles
from common.arguments import InputError
from common.begin import pick
from common.cells import find_mask
from common.images import normalise, read_slice
from conftest import ROOT, launch, one_line, release, script, train, write_pairs
from inside import run_inside
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
    train("--epochs", 15, "--lr", 0.01, "--batch_size", 2, "--amp", "off", cwd=folder)
    write_pairs(folder / "new", 12, shape=(50, 70), seed=1)
    return folder


def predict(*args, cwd):
    return run_inside("predict_unet_test.py", "--device", "cpu", *args, cwd=cwd)


def test_files_and_values(trained):
    """One probability, mask and overlay for each slice, and a stack in numeric order."""
    given = ("--Test_Data_path", "new/train_image", "--save_res_path", "a/b", "--threshold", 0.4)
    done = script("predict_unet_test.py", "--device", "cpu", *given, "--stack", "a/stack.tif", cwd=trained)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    kinds = ("prob", "mask", "overlay")
    names = {f"{i}_{kind}.png" for i in range(12) for kind in kinds}
    assert {path.name for path in (trained / "a/b").iterdir()} == names

    net, _ = checkpoint.load_net(trained / "checkpoints/best.safetensors")
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

    monkeypatch.setattr(tiles, "predict_whole", lambda net, image, device: image.copy())
    image = np.random.default_rng(0).random((40, 30)).astype(np.float32)
    for tta in (False, True):
        back = tiles.predict(None, image, mirror=48, tta=tta)
        np.testing.assert_allclose(back, normalise(image), rtol=1e-5, atol=1e-6)


class Driver:
    """A stand-in for NVIDIA's driver library, of a GPU of some compute capability."""

    def __init__(self, major, minor):
        self.attributes = {75: major, 76: minor}

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, device, ordinal):
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.attributes[attribute]
        return 0


def test_a_gpu_without_code_is_left_alone(monkeypatch, capsys):
    """OneFlow has code for Pascal to Ada: on a newer GPU auto takes the CPU and says so, cuda is refused."""
    monkeypatch.setattr(flow.cuda, "is_available", lambda: True)
    for capability, usable in (((6, 0), True), ((8, 9), True), ((9, 0), False), ((12, 0), False), ((5, 2), False)):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, of=capability: Driver(*of))
        assert pick("auto") == ("cuda" if usable else "cpu")
        assert ("no code for this GPU" in capsys.readouterr().out) != usable
        if not usable:
            with pytest.raises(InputError, match=r"no code for this GPU.*--device cpu"):
                pick("cuda")
        assert pick("cpu") == "cpu"


def test_bare_weights_and_old_checkpoints(trained):
    """Weights without our metadata, as PyTorch writes them, work; flow.save needs a flag."""
    tensors, _, _ = checkpoint.read(trained / "checkpoints/best.safetensors")
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
    _, moments, metadata = checkpoint.read(boxed)
    assert not moments
    nets, _ = checkpoint.load_net(boxed)
    assert [net.base_channels for net in nets] == [metadata["model"]["base_channels"]] * 2
    assert (metadata["threshold"], metadata["grow"]) == (0.6, 0.2)  # as README says
    assert metadata["arguments"]["data_path"] == "data/train_image"
    # It finds the synthetic sample's membranes, which look like those that it has seen.
    script("data/prepare.py", "sample", "--out", tmp_path, cwd=tmp_path)
    image = read_slice(tmp_path / "test_image/0.png")
    interior = read_slice(tmp_path / "test_label/0.png") > 0
    found = find_mask(tiles.predict(nets, image), 0.6, 0.2)
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
        (("--amp", "on", "--cpu_kernels", "off"), "--amp"),
        (("--save_res_path", "new/train_image"), "--save_res_path"),
        (("--save_res_path", "file"), "file"),
        (("--Test_Data_path", "new/train_image/0.png", "--save_res_path", "new/train_image"), "there are the slices"),
        (("--pixel_size", "0"), "--pixel_size"),
        (("--pixel_size", "0.4"), "the 4 nm that the weights know"),
        (("--pixel_size", "0.7"), "0.png: a side is under 16 pixels"),
        (("--min_cell", "-1"), "--min_cell"),
    )
    for flags, said in cases:
        given = {"--Test_Data_path": "new/train_image", "--save_res_path": "d"}
        given.update(zip(flags[::2], flags[1::2], strict=True))
        words = [part for pair in given.items() for part in pair]
        if said in ("nowhere", "--tile"):  # as a process, once before and once after OneFlow has started
            done = script("predict_unet_test.py", *words, cwd=trained)
        else:
            done = predict(*words, cwd=trained)
        assert done.returncode == 2, flags
        assert one_line(done.stderr) and said in done.stderr, done.stderr
    assert not (trained / "d").exists()


def test_what_weights_are_used_is_said(trained, tmp_path):
    """Weights, their slices, epochs and threshold; a warning where they know the synthetic sample only."""
    tensors, _, metadata = checkpoint.read(trained / "checkpoints/best.safetensors")
    given = ("--Test_Data_path", trained / "new/train_image/0.png")
    for synthetic in (False, True):
        checkpoint.write(tmp_path / "w.safetensors", tensors, metadata | {"synthetic": synthetic})
        done = predict(*given, "--checkpoint", "w.safetensors", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "w.safetensors, after " in done.stdout and "'data/train_image'" in done.stdout
        assert "interior is P > 0." in done.stdout
        assert ("SYNTHETIC" in done.stdout and "isbi2012" in done.stdout) == synthetic


def test_a_launchers_variables_are_no_matter(trained):
    """In a pod or a shell that sets WORLD_SIZE, prediction is one process as ever."""
    pod = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for size in ("2", ""):
        env = {**os.environ, **pod, "WORLD_SIZE": size, "OMP_NUM_THREADS": "1"}
        given = ("--Test_Data_path", "new/train_image/0.png", "--save_res_path", "w")
        done = script("predict_unet_test.py", "--device", "cpu", *given, cwd=trained, env=env, timeout=60)
        assert done.returncode == 0 and done.stderr == "", done.stderr


def test_under_a_launcher_it_is_refused(trained):
    """Two processes would predict everything twice: each says in one line what to do instead, and ends."""
    done = launch(ROOT / "predict_unet_test.py", "--save_res_path", "l", cwd=trained)
    ours = [line for line in done.stderr.splitlines() if line.startswith("predict_unet_test.py")]
    assert done.returncode and len(set(ours)) == 1 and "without the launcher" in ours[0], done.stderr
    assert not (trained / "l").exists()


def test_two_predictions_into_one_folder(trained):
    """The second one is refused, while the first one is at work."""
    given = ("--Test_Data_path", "new/train_image/0.png", "--save_res_path", "t")
    assert predict(*given, cwd=trained).returncode == 0
    done = script("predict_unet_test.py", "--device", "cpu", *given, cwd=trained)
    assert done.returncode == 2 and one_line(done.stderr) and "another run writes there" in done.stderr
    release()
