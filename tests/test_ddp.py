"""Data parallel training with real processes: python3 -m pytest tests/test_ddp.py"""

import shutil
import signal
import socket
import subprocess
import time

import engine
from conftest import ROOT, launch, launch_command, one_line, script, train
from test_training import assert_same_checkpoint, metadata_of, rows_of

import numpy as np
import pytest
from oneflow import nn
from oneflow.utils.data import DataLoader
from oneflow.utils.data.distributed import DistributedSampler

# ddp_train.py under watch: every rank writes down its weights after each epoch and what it adds to
# the sums over the ranks; WHAT says what goes wrong on rank WHO in the second epoch.
DRIVER = """
import os, signal, time
import numpy as np
import engine, ddp_train

finish, add = engine.finish_epoch, engine.sum_over_ranks
sums = []

def watched_finish(args, net, optimizer, epoch, *rest):
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    np.savez(f"rank{engine.RANK}-epoch{epoch}.npz", sums=sums, **state)
    if engine.RANK == WHO and epoch == 2 and WHAT not in (None, "stop early"):
        open("failed", "w").write(str(time.time()))
        if WHAT == "raise":
            raise RuntimeError("rank 1 has had enough")
        if WHAT == "exit":
            raise SystemExit(3)
        os.kill(os.getpid(), signal.SIGSTOP if WHAT == "stop" else signal.SIGKILL)
    best = finish(args, net, optimizer, epoch, *rest)
    open(f"rank{engine.RANK}-best", "w").write(str(best))
    return best

def watched_sums(*values):
    sums.append((*values, *(0,) * (20 - len(values))))
    return add(*values)

engine.finish_epoch, engine.sum_over_ranks = watched_finish, watched_sums
if WHAT == "stop early" and engine.RANK == WHO:
    open("failed", "w").write(str(time.time()))
    os.kill(os.getpid(), signal.SIGSTOP)
engine.run(lambda: ddp_train.Train_Unet(engine.parse_args(ddp_train.__doc__)))
"""


def run_driver(tmp_path, what, *flags, who=1, processes=2):
    driver = tmp_path / "driver.py"
    driver.write_text(f"WHAT, WHO = {what!r}, {who}\n{DRIVER}")
    return launch(driver, *flags, cwd=tmp_path, processes=processes)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_one_net(processes, slices, tmp_path):
    """Only rank 0 prints and writes, each slice counts once in the loss, weights are equal."""
    flags = ("--epochs", 2, "--val_count", 1, "--batch_size", 2, "--best_by", "v_rand")
    done = run_driver(tmp_path, None, *flags, processes=processes)
    assert done.returncode == 0, done.stderr
    for said in (
        f"device: cpu, {processes} processes",
        "5 training slices",
        "epoch: 1 ",
        "epoch: 2 ",
    ):
        assert done.stdout.count(said) == 1, done.stdout
    ranks = [np.load(tmp_path / f"rank{rank}-epoch2.npz") for rank in range(processes)]
    for name in ranks[0].files:
        if name != "sums":  # running statistics are compared too
            for rank in ranks:
                np.testing.assert_array_equal(ranks[0][name], rank[name], err_msg=name)
    best = {(tmp_path / f"rank{rank}-best").read_text() for rank in range(processes)}
    assert len(best) == 1 and "val_v_rand" in best.pop()
    # The slices' digest is added up over the ranks first. An epoch adds up (loss, samples), then
    # validation (loss, error, V_Rand at 9 thresholds and V_Info); the one slice is rank 0's.
    assert all(np.array_equal(ranks[0]["sums"][0], rank["sums"][0]) for rank in ranks)
    sums = sum(rank["sums"] for rank in ranks)[1:]
    assert not np.array_equal(ranks[0]["sums"], ranks[1]["sums"])
    rows = rows_of(tmp_path / "Unet_train.csv")
    for epoch, row in enumerate(rows):
        loss, samples = sums[2 * epoch][:2]
        assert samples == 5  # though the sampler fills up, to 6 or 8
        assert float(row["train_loss"]) == pytest.approx(loss / samples, abs=1e-6)
        val_loss, val_error, *v_rand = sums[2 * epoch + 1][:11]
        assert float(row["val_loss"]) == pytest.approx(val_loss, abs=1e-6)
        assert float(row["val_misclassification"]) == pytest.approx(val_error, abs=1e-6)
        assert float(row["val_v_rand"]) == pytest.approx(max(v_rand), abs=1e-6)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "best.safetensors",
        "last.safetensors",
    ]


@pytest.mark.parametrize(
    "count, processes, batch", [(30, 4, 4), (30, 4, 3), (3, 8, 2), (10_007, 2, 4)]
)
def test_every_slice_is_seen_and_counts_once(count, processes, batch, monkeypatch):
    """Dealt out to the ranks, each slice is trained on in an epoch, and counts once in the loss."""
    numbers = np.arange(count, dtype=np.float32)
    slices = [(number.reshape(1, 1, 1), np.ones((1, 1, 1), np.float32)) for number in numbers]
    seen, sums = [], []

    def step(image, label, weight):
        seen.extend(image.numpy().ravel())
        return image.reshape(-1)

    monkeypatch.setattr(engine, "WORLD_SIZE", processes)
    monkeypatch.setattr(engine, "sum_over_ranks", lambda *values: sums.append(values) or (1, 1))
    for rank in range(processes):
        monkeypatch.setattr(engine, "RANK", rank)
        sampler = DistributedSampler(slices, processes, rank, seed=0)
        sampler.set_epoch(3)
        loader = DataLoader(slices, batch, sampler=sampler)
        engine.train_one_epoch(nn.Module(), loader, step, "cpu", 3)
    assert set(seen) == set(numbers)
    loss_sum, samples = np.sum(sums, axis=0)
    assert samples == count
    assert loss_sum == pytest.approx(numbers.sum())


# Writes down the gradients of a first step on 4 slices, dealt out to the ranks.
FIRST_STEP = """
import numpy as np
import engine
from cpu_kernels import accelerate
from dataloader import SelfDataSet
from unet import UNet
import oneflow as flow
from oneflow import nn
from oneflow.nn.parallel import DistributedDataParallel as ddp

def main():
    flow.manual_seed(0)
    net = UNet(1, 1, bilinear=False, base_channels=4)
    net = ddp(accelerate(net)).eval()
    pairs = list(SelfDataSet("data/train_image"))[engine.RANK : 4 : engine.WORLD_SIZE]
    image, label = (flow.tensor(np.stack(arrays)) for arrays in zip(*pairs))
    nn.BCEWithLogitsLoss()(net(image), label).backward()
    gradients = {name: x.grad.numpy() for name, x in net.named_parameters()}
    np.savez(f"of{engine.WORLD_SIZE}-rank{engine.RANK}.npz", **gradients)

engine.run(main)
"""


def test_gradients_are_those_of_the_whole_batch(slices, tmp_path):
    """1, 2 and 4 processes with the same slices in all make the same first step, to 1e-6.

    With batch normalisation's running statistics; in training each rank has its own.
    """
    script = tmp_path / "first_step.py"
    script.write_text(FIRST_STEP)
    for processes in (1, 2, 4):
        done = launch(script, cwd=tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr
    whole = np.load(tmp_path / "of1-rank0.npz")
    for processes in (2, 4):
        for rank in range(processes):
            part = np.load(tmp_path / f"of{processes}-rank{rank}.npz")
            difference, gradient = (
                np.concatenate([array.ravel() for array in arrays])
                for arrays in ([part[n] - whole[n] for n in whole.files], whole.values())
            )
            assert np.linalg.norm(difference) <= 1e-6 * np.linalg.norm(gradient)


def test_one_process_equals_one_device(slices, tmp_path):
    """The twins train alike: in one process on one slice, they end with the same bits."""
    flags = ("--epochs", 2, "--data_path", slices, "--val_count", 5)
    for name in ("one", "ddp"):
        (tmp_path / name).mkdir()
    train(*flags, cwd=tmp_path / "one")
    done = launch(ROOT / "ddp_train.py", *flags, cwd=tmp_path / "ddp", processes=1)
    assert done.returncode == 0, done.stderr
    last = "checkpoints/last.safetensors"
    assert_same_checkpoint(tmp_path / "one" / last, tmp_path / "ddp" / last)
    assert rows_of(tmp_path / "one/Unet_train.csv") == rows_of(tmp_path / "ddp/Unet_train.csv")


def test_resume_is_exact(slices, tmp_path):
    """Two processes stopped and resumed end with the same bits as two that ran through."""
    for name, parts in (("whole", (3,)), ("parts", (1, 3))):
        (tmp_path / name).mkdir()
        for i, epochs in enumerate(parts):
            flags = ("--data_path", slices, "--crop", 32, "--epochs", epochs)
            flags += ("--schedule", "constant", "--batch_size", 1)
            flags += ("--resume", "checkpoints/last.safetensors") if i else ()
            done = launch(ROOT / "ddp_train.py", *flags, cwd=tmp_path / name)
            assert done.returncode == 0, done.stderr
    last = "checkpoints/last.safetensors"
    assert_same_checkpoint(tmp_path / "whole" / last, tmp_path / "parts" / last)


@pytest.mark.parametrize(
    "what, who",
    [
        ("raise", 1),
        ("exit", 1),
        ("kill", 0),
        ("kill", 1),
        ("stop", 0),
        ("stop", 1),
        ("stop early", 1),
    ],
)
def test_a_failing_rank_ends_the_job(what, who, slices, tmp_path):
    """A rank that fails or answers no more ends the job within 30 s; nobody is left behind.

    OneFlow waits for a stopped rank for ever: there the time-out, 5 s here, ends the job.
    """
    flags = ("--rank_timeout", 5) if "stop" in what else ()
    done = run_driver(tmp_path, what, "--epochs", 1000, *flags, who=who)
    seconds = time.time() - float((tmp_path / "failed").read_text())
    assert done.returncode != 0
    assert seconds < 30
    if what == "raise":
        assert "driver.py (rank 1)" in done.stderr and "rank 1 has had enough" in done.stderr
    if "stop" in what:
        assert "got no further for 5 s, another process hangs or is out of reach" in done.stderr
    time.sleep(1)
    left = subprocess.run(["pgrep", "-f", tmp_path / "driver.py"], capture_output=True)
    assert left.stdout == b""
    if what == "stop early":
        assert not (tmp_path / "checkpoints").exists()
        return
    assert metadata_of(tmp_path / "checkpoints/last.safetensors")["epoch"] in (2, 3)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ending_the_launcher_ends_the_ranks(end, slices, tmp_path):
    """Nobody goes on training when the launcher is ended, though it doesn't lead its group."""
    script = tmp_path / "ddp_train.py"
    script.symlink_to(ROOT / "ddp_train.py")  # a name of its own, to look for
    command = launch_command(script, "--epochs", 10000)
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as launcher:
        while "epoch: 2 " not in launcher.stdout.readline():
            assert launcher.poll() is None
        launcher.send_signal(end)
        assert launcher.wait(timeout=30) != 0
        time.sleep(1)
        left = subprocess.run(["pgrep", "-f", script], capture_output=True, text=True)
        assert left.stdout == ""


def test_bad_input_ends_the_job(tmp_path):
    """Bad input on all ranks is said once, and the job ends with a non-zero code."""
    done = launch(ROOT / "ddp_train.py", "--data_path", "nowhere_image", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("nowhere_image: no such file") == 1
    plain = script("ddp_train.py", "--device", "cpu", "--data_path", "nowhere_image", cwd=tmp_path)
    assert plain.returncode == 2


def test_only_one_twin_is_for_several_processes(slices, tmp_path):
    """The others, launched in several, would each train on all slices: they say so."""
    done = launch(ROOT / "TrainUnetDataSet.py", "--data_path", slices, cwd=tmp_path)
    assert done.returncode != 0
    assert "TrainUnetDataSet.py: this script trains in one process" in done.stderr
    assert not list(tmp_path.glob("checkpoints/*"))


def test_ranks_with_other_slices_end_the_job(slices, tmp_path):
    """A rank whose folder holds fewer slices, or other pixels, ends the job before it starts."""
    for case in ("fewer", "other"):
        shutil.copytree(tmp_path / "data", tmp_path / case)
        path = tmp_path / case / "train_image/5.png"
        if case == "fewer":
            path.unlink()
        else:
            shutil.copy(tmp_path / "data/train_image/4.png", path)
        driver = tmp_path / "driver.py"
        driver.write_text(
            "import sys, engine, ddp_train\n"
            f"sys.argv += ['--data_path', ('data', {case!r})[engine.RANK] + '/train_image']\n"
            "engine.run(lambda: ddp_train.Train_Unet(engine.parse_args('')))\n"
        )
        done = launch(driver, cwd=tmp_path)
        assert done.returncode != 0
        assert "this process has other slices than another one" in done.stderr
        assert not (tmp_path / "checkpoints").exists()


def test_a_port_in_use_ends_the_job(slices, tmp_path):
    """Another job on the same port: it ends with a message, a non-zero code, in bounded time."""
    command = launch_command(ROOT / "ddp_train.py", "--epochs", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command[command.index("--master_port") + 1] = str(taken.getsockname()[1])
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "another --master_port" in done.stderr, done.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_resuming_otherwise_is_said(slices, tmp_path):
    """Another number of processes or other slices are said; another net is refused."""
    train("--epochs", 1, cwd=tmp_path)
    again = ("--resume", "checkpoints/last.safetensors", "--epochs", 2)
    done = launch(ROOT / "ddp_train.py", *again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "last.safetensors was trained: processes 1 -> 2\n" in done.stdout
    (slices / "5.png").unlink()
    done = script("TrainUnetDataSet.py", "--device", "cpu", *again[:-1], 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "last.safetensors was trained: other slices\n" in done.stdout
    for flags in (("--base_channels", 8), ("--bilinear",)):
        done = script("TrainUnetDataSet.py", "--device", "cpu", *again, *flags, cwd=tmp_path)
        assert done.returncode == 2 and one_line(done.stderr)
        assert "a net of 4 base channels" in done.stderr
