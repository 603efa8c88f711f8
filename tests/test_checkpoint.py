"""Checkpoints: what they keep, and going on from them: python3 -m pytest tests/test_checkpoint.py"""

import os
import subprocess
import sys

from common import checkpoint, epoch, files, log, tiles
from common.arguments import InputError
from conftest import BEST, LAST, ROOT, assert_same_run, metadata_of, python, resume, rows_of, tensors_of, train

import numpy as np
import oneflow as flow
import pytest
import safetensors.numpy
from oneflow import nn, optim


def test_resume_is_exact(slices, tmp_path, monkeypatch):
    """A run that stops between a checkpoint and its log, resumed, ends with the bits and log of one that ran through.

    With everything on: augmentation, border weights, schedule, workers, best by V_Rand.
    """
    flags = ("--crop", 32, "--val_count", 2, "--batch_size", 3, "--seed", 5, "--lr", 0.002)
    flags += ("--data_path", slices, "--epochs", 6, "--val_every", 2, "--best_by", "v_rand", "--pixel_size", 6)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*flags, "--num_workers", 2, cwd=whole)

    def full(path, rows):
        if len(rows) == 4:
            raise OSError(28, "No space left on device", path)
        log.write_log(path, rows)

    monkeypatch.setattr(epoch, "write_log", full)
    with pytest.raises(OSError, match="No space"):
        train(*flags, cwd=parts)
    monkeypatch.undo()
    assert len(rows_of(parts / "Unet_train.csv")) == 3  # of the epoch before, whole
    resume("--data_path", slices, cwd=parts)  # only paths have to be said again
    assert_same_run(whole, parts)
    rows = rows_of(whole / "Unet_train.csv")
    assert [int(row["epoch"]) for row in rows if row["val_v_rand"]] == [1, 2, 4, 6]
    best = metadata_of(whole / BEST)["best"]
    assert metadata_of(parts / LAST)["pixel_size"] == 6  # which predicting goes by
    assert best["by"] == "val_v_rand"
    assert 1 - best["loss"] == pytest.approx(max(float(r["val_v_rand"] or 0) for r in rows), abs=1e-6)


OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.01),
    "momentum": lambda p: optim.SGD(p, lr=0.01, momentum=0.9),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01),
    "two groups": lambda p: optim.Adam([{"params": p[::2], "lr": 0.02}, {"params": p[1::2]}], lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.1),
}


class Small(nn.Module):
    """A net that takes no time, with a parameter that never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)
        self.unused = nn.Parameter(flow.zeros(2))

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_is_saved(name, tmp_path):
    """Two steps, saved and loaded into a new net and optimizer, go on with the bits of a run that was not stopped."""
    x = flow.tensor(np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32))

    def new():
        flow.manual_seed(0)
        net = Small()
        return net, OPTIMIZERS[name](list(net.parameters()))

    def steps(net, optimizer, count):
        for _ in range(count):
            (net(x) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    path, rows = tmp_path / "some.safetensors", [{"epoch": "1", "train_loss": "0.5"}]
    best = {"epoch": 1, "loss": 0.5, "by": "train_loss", "threshold": 0.5, "grow": 0.5}
    net, optimizer = new()
    checkpoint.contents(net, optimizer)  # before any step, too
    steps(net, optimizer, 2)
    tensors, state = checkpoint.contents(net, optimizer)
    metadata = {"model": {}, "epoch": 2, "best": best, "rows": rows, "optimizer": state}
    checkpoint.write(path, tensors, metadata)
    steps(net, optimizer, 2)
    other = new()
    checkpoint.resume(path, *other)
    steps(*other, 2)
    for one, two in zip(net.state_dict().values(), other[0].state_dict().values(), strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())

    net = Small()
    with pytest.raises(InputError, match=f"trained with {type(optimizer).__name__}, not with Adagrad"):
        checkpoint.resume(path, net, optim.Adagrad(net.parameters()))


def test_what_cannot_be_saved_is_found_first(slices, tmp_path, monkeypatch):
    """An optimizer whose state no checkpoint can hold ends the run before the first step, with its name."""

    class Odd(optim.Adam):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._state["history"] = [1, 2]

    monkeypatch.setattr(optim, "Adam", Odd)
    monkeypatch.setattr(epoch.Run, "batches", lambda *_: pytest.fail("it trained"))
    with pytest.raises(InputError, match="Odd: its state history"):
        train("--epochs", 1, cwd=tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_decides_little(slices, tmp_path):
    """Resuming takes hyperparameters from the file, never paths or other flags."""
    with pytest.raises(InputError, match=r"--log_file .*3\.PNG: names an image"):
        train("--log_file", slices / "3.PNG", cwd=tmp_path)
    paths = {"--val_path": slices, "--checkpoint_dir": "mine", "--log_file": "mine.txt"}
    train("--epochs", 1, *(word for pair in paths.items() for word in pair), cwd=tmp_path)
    last = tmp_path / "mine/last.safetensors"
    for left_out in paths:  # or it would go on with other data, or into another run's files
        rest = (word for pair in paths.items() if pair[0] != left_out for word in pair)
        with pytest.raises(InputError, match=left_out):
            train("--resume", last, "--epochs", 2, *rest, cwd=tmp_path, small=())
    with pytest.raises(InputError, match=r"with --val_path .* --checkpoint_dir mine --log_file mine\.txt, pass"):
        train("--resume", last, "--epochs", 2, cwd=tmp_path, small=())

    tensors, metadata = tensors_of(last), metadata_of(last)
    hostile = {"augment": ["rotate", "--log_file=stolen.txt", "flip"], "seed": "1 --checkpoint_dir=stolen"}
    for name, value in hostile.items():
        saved = {**metadata["arguments"], "val_path": None, name: value}
        saved |= {"checkpoint_dir": "stolen", "log_file": "stolen.txt"}
        checkpoint.write(tmp_path / "evil.safetensors", tensors, {**metadata, "arguments": saved})
        flags = ("--resume", "evil.safetensors", "--epochs", 2, "--device", "cpu")
        flags += ("--checkpoint_dir", "mine", "--log_file", "mine.txt")
        if name == "augment":
            train(*flags, cwd=tmp_path, small=())
            assert metadata_of(last)["arguments"]["augment"] == ["rotate", "flip"]  # in its order
        else:
            with pytest.raises(InputError, match="--seed"):
                train(*flags, cwd=tmp_path, small=())
    assert not list(tmp_path.glob("stolen*"))


def test_older_checkpoints_lend_weights(slices, tmp_path):
    """One of before rows were kept can't go on: a line says that --init can, and it does. So it is for bare weights."""
    train("--data_path", slices, "--epochs", 1, cwd=tmp_path)
    path = tmp_path / "checkpoints/last.safetensors"
    net, optimizer, metadata = checkpoint.read(path)
    step = metadata.pop("optimizer")["state"]["step"]
    del metadata["rows"], metadata["arguments"]["slices"]
    metadata["arguments"]["amp"] = False  # of graph_train.py, a flag without a value
    checkpoint.write(path, net | optimizer, metadata | {"optimizer_step": step})
    checkpoint.write(tmp_path / "bare.safetensors", net, metadata | {"optimizer_step": step})
    for name, trouble in (
        (path, "rows .* make no sense.* --init"),
        ("bare.safetensors", "holds weights only.* --init"),
    ):
        with pytest.raises(InputError, match=trouble):
            train("--data_path", slices, "--epochs", 2, "--resume", name, cwd=tmp_path)
        train("--data_path", slices, "--epochs", 1, "--init", tmp_path / name, cwd=tmp_path / "begun")


def test_resuming_otherwise_is_said(slices, tmp_path):
    """Other slices and another number of processes are said; another net is refused."""
    train("--epochs", 1, cwd=tmp_path)
    metadata = metadata_of(tmp_path / LAST)
    metadata["arguments"]["processes"] = 2
    checkpoint.write(tmp_path / LAST, tensors_of(tmp_path / LAST), metadata)
    (slices / "5.png").unlink()
    done = resume("--epochs", 2, cwd=tmp_path)
    assert f"{LAST} was trained: slices " in done.stdout
    assert f"{LAST} was trained: processes 2 -> 1\n" in done.stdout
    for flags in (("--base_channels", 8), ("--bilinear",)):
        with pytest.raises(InputError, match=r"U-Net of \d base channels"):
            resume("--epochs", 3, *flags, cwd=tmp_path)


def test_begin_with_given_weights(slices, tmp_path):
    """--init takes weights and width, and nothing else: a new optimizer, epoch 1; of other programs' weights too."""
    train("--epochs", 1, cwd=tmp_path)
    tensors = {f"module.{n}": t for n, t in tensors_of(tmp_path / LAST).items() if not n.startswith("optimizer.")}
    checkpoint.write(tmp_path / "bare.safetensors", tensors, {})
    with pytest.raises(InputError, match=r"bare\.safetensors: holds weights only.* --init"):
        train("--resume", "bare.safetensors", cwd=tmp_path, small=())
    with pytest.raises(InputError, match=r"bare\.safetensors: .* U-Net of 8 base channels"):
        train("--init", "bare.safetensors", "--base_channels", 8, cwd=tmp_path, small=())
    flags = ("--device", "cpu", "--data_path", slices, "--epochs", 1, "--lr", 1e-30, "--dropout", 0)
    train(*flags, "--init", tmp_path / "bare.safetensors", cwd=tmp_path / "begun", small=())
    one, other = tensors_of(tmp_path / LAST), tensors_of(tmp_path / "begun" / LAST)
    np.testing.assert_array_equal(one["outc.conv.weight"], other["outc.conv.weight"])
    metadata = metadata_of(tmp_path / "begun" / LAST)
    assert metadata["epoch"] == 2 and metadata["model"]["base_channels"] == 4
    assert metadata["optimizer"]["state"]["step"] == 12  # 6 slices, 8 times, 4 at once


def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch):
    """Some file systems of networks refuse to sync a folder: the file is written all the same."""
    sync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with files.write_whole(tmp_path / "file") as file:
        file.write(b"all")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_processes_write_one_file(tmp_path):
    """Each has a temporary file of its own; what a killed one left is removed by the next run."""
    with files.write_whole(tmp_path / "file") as file:
        file.write(b"first")
        program = "from common.files import write_whole\nwith write_whole('file') as file: file.write(b'second')"
        assert python(program, cwd=tmp_path).returncode == 0
    assert (tmp_path / "file").read_bytes() == b"first"
    (tmp_path / f".file.{files.HOST}.999999999.new").write_bytes(b"left behind")
    files.make_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_several_nets_in_a_file(slices, tmp_path):
    """A file of two nets predicts as both checkpoints do together; --init takes its first; halves are close enough."""
    for seed in (0, 1):
        train("--epochs", 1, "--seed", seed, "--checkpoint_dir", f"s{seed}", cwd=tmp_path)
    files = [str(tmp_path / f"s{seed}/last.safetensors") for seed in (0, 1)]
    box = str(tmp_path / "box.safetensors")
    command = [sys.executable, ROOT / "benchmarks/box.py", box, *files, "--threshold", "0.4", "--grow", "0.2"]
    subprocess.run(command, check=True, timeout=120)
    nets, metadata = checkpoint.load_net(box)
    assert len(nets) == 2 and (metadata["threshold"], metadata["grow"]) == (0.4, 0.2) and metadata["pixel_size"] == 4
    other = tmp_path / "other.safetensors"
    checkpoint.write(other, tensors_of(files[0]), metadata_of(files[0]) | {"pixel_size": 5.0})
    safetensors.numpy.save_file(tensors_of(files[0]), tmp_path / "bare.safetensors")
    for some in ([files[0], other], [tmp_path / "bare.safetensors", other]):
        done = subprocess.run([*command[:2], "no", *some, *command[5:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "other.safetensors: knows pixels of another size" in done.stderr
    subprocess.run([*command[:2], "again.safetensors", box, *command[4:]], cwd=tmp_path, check=True, timeout=120)
    assert len(checkpoint.load_net(tmp_path / "again.safetensors")[0]) == 3
    image = np.random.default_rng(0).normal(size=(32, 32))
    apart = [tiles.predict(checkpoint.load_net(file)[0], image) for file in files]
    np.testing.assert_allclose(tiles.predict(nets, image), sum(apart) / 2, atol=2e-3)
    assert np.abs(apart[0] - apart[1]).max() > 0.01
    small = ("--device", "cpu", "--repeat", "1")
    done = train("--epochs", 1, "--init", box, "--lr", 1e-30, cwd=tmp_path, small=small)
    assert "has 2 nets, training begins with the first" in done.stdout
    one, other = tensors_of(tmp_path / LAST), tensors_of(files[0])
    np.testing.assert_allclose(one["outc.conv.weight"], other["outc.conv.weight"], atol=1e-3)
