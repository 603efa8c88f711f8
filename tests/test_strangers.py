"""Checkpoints and weights from strangers: python3 -m pytest tests/test_strangers.py"""

import struct
import subprocess
import sys

from common import checkpoint
from common.arguments import InputError
from conftest import LAST, ROOT, SMALL, metadata_of, mutated, one_line, script, tensors_of, train, write_pairs
from unet import UNet

import numpy as np
import oneflow as flow
import pytest
import safetensors.numpy

CHECKPOINTS = 1000


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """last.safetensors of a run of one epoch, of a narrow net."""
    folder = tmp_path_factory.mktemp("run")
    write_pairs(folder / "data", 2)
    train("--epochs", 1, cwd=folder)
    return folder / LAST


def test_damaged_checkpoints(trained, tmp_path):
    """A thousand damaged checkpoints: each is refused in one line, whatever was hit."""
    whole, path = trained.read_bytes(), tmp_path / "damaged.safetensors"
    header = int.from_bytes(whole[:8], "little")
    checkpoint.read(trained)
    rng = np.random.default_rng(0)
    tried = 0
    while tried < CHECKPOINTS:
        damaged = mutated(whole, rng, header + 8)
        if damaged == whole:
            continue
        tried += 1
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"whole|damaged") as error:
            checkpoint.read(path)
            pytest.fail(f"mutation {tried} was not noticed")
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    # The name of the checksum itself: without one, nothing could be checked.
    path.write_bytes(whole.replace(b'"checksum"', b'"checksun"'))
    with pytest.raises(InputError, match="damaged"):
        checkpoint.read(path)


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
BEST = {"epoch": 1, "loss": 0.5, "by": "val_loss", "threshold": 0.5, "grow": 0.5}
METADATA = {
    "epoch": ["x", -3, 0, 1.5, [1], None, {"a": 1}, float("nan"), True, 10**400, 7],
    "optimizer": ["x", -7, None, [], {}, {"name": "Adam"}, {"name": ["Adam"], "state": {}}],
    "best": ["x", [1], 7, {"loss": 1}, {**BEST, "loss": float("nan")}, {**BEST, "threshold": float("nan")}],
    "arguments": [[1], None, 7, {"lr": -1}, {"lr": "x\n--y"}, {"seed": "../x"}, {"crop": "../x"}, {"dropout": 7}],
    "rows": ["x", None, 7, [], [1], [{}], [{"epoch": "1"}], [{"epoch": 1, "train_loss": 0.5}]],
}
METADATA["best"] += [{**BEST, "loss": 10**400}, {**BEST, "grow": 2}, {**BEST, "grow": "much"}]
METADATA["optimizer"] += [{"name": "Adam", "state": {"step": step}} for step in ("x", -7, 2**40, None, [], 0.5)]
METADATA["rows"] += [[{"epoch": "1", "train_loss": loss}] for loss in ("nan", "much", 0.5)]
HOSTILE = [*TENSORS, *((key, value) for key, values in METADATA.items() for value in values)]


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_hostile_checkpoints(case, trained, tmp_path):
    """A checkpoint made to harm, its checksum right: refused in one line, by who would use it."""
    tensors, metadata = tensors_of(trained), metadata_of(trained)
    if isinstance(case, str):
        name, change = TENSORS[case]
        if change:
            tensors[name] = change(tensors.get(name))
        else:
            del tensors[name]
    elif isinstance(case[1], dict) and case[0] == "arguments":
        metadata[case[0]] |= case[1]
    else:
        metadata[case[0]] = case[1]
    path = tmp_path / "hostile.safetensors"
    checkpoint.write(path, tensors, metadata)

    def go_on():
        data = trained.parents[1] / "data/train_image"
        train("--resume", path, "--data_path", data, "--epochs", 1, cwd=tmp_path, small=("--device", "cpu"))

    users = [go_on]
    if isinstance(case, str) and not case.startswith("moment"):
        users.append(lambda: checkpoint.load_net(path))
    for use in users:
        with pytest.raises(InputError) as error:
            use()
        assert "\n" not in str(error.value)


def test_half_precision_is_fine(trained, tmp_path):
    """Weights and moments of another type of float are taken over, and training goes on."""
    tensors, metadata = tensors_of(trained), metadata_of(trained)
    halved = {n: t.astype(np.float16) if t.dtype == np.float32 else t for n, t in tensors.items()}
    checkpoint.write(tmp_path / "half.safetensors", halved, metadata)
    data = trained.parents[1] / "data/train_image"
    flags = ("--resume", "half.safetensors", "--data_path", data, "--epochs", 2)
    train(*flags, cwd=tmp_path, small=("--device", "cpu"))


def test_a_message_is_one_line_whatever_the_file_says(trained, tmp_path):
    """Line ends and what colours a terminal, in a checkpoint or a name, are written out."""
    tensors, metadata = tensors_of(trained), metadata_of(trained)
    evil = "a\nb\x1b[2J"
    metadata["arguments"]["data_path"] = evil
    checkpoint.write(tmp_path / "evil.safetensors", tensors, metadata)
    flags = ("--resume", "evil.safetensors", "--device", "cpu")
    done = script("TrainUnetDataSet.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and one_line(done.stderr)
    assert r"a\nb\x1b[2J" in done.stderr
    (tmp_path / evil).mkdir()
    done = script("predict_unet_test.py", "--Test_Data_path", evil, cwd=tmp_path)
    assert done.returncode == 2 and one_line(done.stderr) and r"a\nb\x1b[2J" in done.stderr


def test_weights_that_lead_to_no_number(trained, tmp_path):
    """Finite weights that overflow: predicting says so, exit 2, and writes no picture."""
    tensors = {n: t * np.float32(1e29) if t.ndim == 4 else t for n, t in tensors_of(trained).items()}
    tensors = {n: t for n, t in tensors.items() if not n.startswith("optimizer")}
    safetensors.numpy.save_file(tensors, tmp_path / "large.safetensors")
    data = trained.parents[1] / "data/train_image"
    flags = ("--checkpoint", "large.safetensors", "--Test_Data_path", data, "--device", "cpu", "--cpu_kernels", "off")
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
            checkpoint.read(path)
    deep = {"nested": "[" * 100_000}
    path.write_bytes(safetensors.numpy.save({"a": np.zeros(3, np.float32)}, deep))
    with pytest.raises(InputError, match="doesn't hold a U-Net's weights"):
        checkpoint.load_net(path)
    whole_numbers = {n: t.numpy().astype(np.int8) for n, t in UNet(1, 1, base_channels=2).state_dict().items()}
    path.write_bytes(safetensors.numpy.save(whole_numbers))
    with pytest.raises(InputError, match="another shape or type"):
        checkpoint.load_net(path)


OTHERS = {
    "data parallel": (lambda t: {f"module.{name}": array for name, array in t.items()}, "names without module."),
    "lightning": (lambda t: {f"model.net.{n}": a for n, a in t.items()}, "names without model.net."),
    "further keys": (lambda t: t | {"mask_values": np.array([0, 255])}, "left out mask_values"),
    "no biases": (
        lambda t: {n: a for n, a in t.items() if not n.endswith(("double_conv.0.bias", "double_conv.3.bias"))},
        "3x3 convolutions have no biases",
    ),
    "no counts": (lambda t: {n: a for n, a in t.items() if not n.endswith("num_batches_tracked")}, ""),
    "the same": (dict, ""),
}


@pytest.mark.parametrize("case", OTHERS)
def test_weights_of_other_programs(case, tmp_path, capsys):
    """PyTorch's well-known U-Nets differ in names and biases: loaded, said, and the net computes the same."""
    net = UNet(1, 1, bilinear=False, base_channels=4).eval()
    for name, parameter in net.named_parameters():
        if "biases" in case and name.endswith(("double_conv.0.bias", "double_conv.3.bias")):
            flow.nn.init.zeros_(parameter)
    change, said = OTHERS[case]
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    path = tmp_path / "others.safetensors"
    safetensors.numpy.save_file(change(state), path)
    loaded, metadata = checkpoint.load_net(path)
    assert metadata == {} and said in capsys.readouterr().out
    image = flow.randn(1, 1, 32, 32)
    np.testing.assert_array_equal(loaded.eval()(image).numpy(), net(image).numpy())


def test_weights_with_half_of_the_biases(tmp_path):
    """What lacks some of its tensors is refused, however they are named."""
    state = {f"module.{n}": t.numpy() for n, t in UNet(1, 1, base_channels=4).state_dict().items()}
    del state["module.down1.maxpool_conv.1.double_conv.0.bias"]
    safetensors.numpy.save_file(state, tmp_path / "others.safetensors")
    with pytest.raises(InputError, match=r"down1\.maxpool_conv\.1\.double_conv\.0\.bias"):
        checkpoint.load_net(tmp_path / "others.safetensors")


def test_a_file_of_pytorch_is_named(tmp_path):
    """It is called by its format, with what says how to convert it, and never unpickled; Keras's too."""
    for name, whose in (("net.pth", "PyTorch's"), ("net.CKPT", "PyTorch's"), ("net.h5", "Keras/HDF5")):
        with pytest.raises(InputError, match="no such checkpoint"):
            checkpoint.load_net(tmp_path / name)
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        with pytest.raises(InputError, match=f"is {whose}, convert it .*docs/weights.md"):
            checkpoint.load_net(tmp_path / name)


def test_further_nets_that_are_none(trained, tmp_path):
    """Tensors and metadata that only look like those of further nets are left out, or refused in one line."""
    tensors, metadata = tensors_of(trained), metadata_of(trained)
    path, odd = tmp_path / "odd.safetensors", {"further.x": np.zeros(3), "further.a.b": np.zeros(3)}
    bare = {name: array for name, array in tensors.items() if not name.startswith("optimizer.")}
    safetensors.numpy.save_file(bare | odd, path, {"further": '["x"]'})
    assert isinstance(checkpoint.load_net(path)[0], UNet)
    for more in (odd, {"further.1.a": np.zeros(3)}):
        checkpoint.write(path, tensors | more, metadata | {"further": 7})
        with pytest.raises(InputError, match="U-Net"):
            checkpoint.load_net(path)
