"""Data parallel training with real processes: python3 -m pytest tests/test_ddp.py"""

import shutil
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

from common import epoch, start
from conftest import LAST, assert_same_run, launch, launch_command, metadata_of, processes_in, python, rows_of, train

import numpy as np
import pytest
from oneflow import nn
from oneflow.utils.data import DataLoader
from oneflow.utils.data.distributed import DistributedSampler

# ddp_train.py under watch: every rank writes down its weights after each epoch and what it adds to
# the sums over the ranks; WHAT says what goes wrong on rank WHO in the second epoch.
DRIVER = """
import atexit, os, signal, time
import ddp_train
import numpy as np
from common import begin, epoch, start
from common.arguments import parse_args

finish, add, sums = epoch.Run.finish, epoch.sum_over_ranks, []
atexit.register(print, "OneFlow's own shutdown")

def watched_finish(run, scores):
    state = {name: tensor.numpy() for name, tensor in run.net.state_dict().items()}
    np.savez(f"rank{start.rank}-epoch{run.epoch}.npz", sums=sums, **state)
    if start.rank == WHO and run.epoch == 2 and WHAT not in (None, "stop early"):
        open("failed", "w").write(str(time.time()))
        if WHAT == "raise":
            raise RuntimeError("rank 1 has had enough")
        if WHAT == "exit":
            raise SystemExit(3)
        os.kill(os.getpid(), signal.SIGSTOP if WHAT == "stop" else signal.SIGKILL)
    finish(run, scores)
    open(f"rank{start.rank}-best", "w").write(str(run.best))

def watched_sums(*values):
    sums.append((*values, *(0,) * (100 - len(values))))
    return add(*values)

epoch.Run.finish = watched_finish
begin.sum_over_ranks = epoch.sum_over_ranks = watched_sums
if WHAT == "stop early" and start.rank == WHO:
    open("failed", "w").write(str(time.time()))
    os.kill(os.getpid(), signal.SIGSTOP)
start.run(lambda: ddp_train.main(parse_args("", ddp_train.AUGMENTATIONS)))
"""


# Ends well, but rank 0 so late that OneFlow has looked for rank 1 in vain.
LATE = """
import time
from common import ranks, start
sleep = time.sleep
time.sleep = lambda seconds: sleep(15 if start.rank == 0 and seconds == 1 else seconds)
start.run(lambda: None)
"""


def run_driver(tmp_path, what, *flags, who=1, processes=2):
    driver = tmp_path / "driver.py"
    driver.write_text(f"WHAT, WHO = {what!r}, {who}\n{DRIVER}")
    return launch(driver, *flags, cwd=tmp_path, processes=processes)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_train_one_net(processes, slices, tmp_path):
    """Only rank 0 prints and writes, each slice counts once in the loss, weights are equal."""
    flags = ("--epochs", 2, "--val_count", 1, "--batch_size", 2, "--best_by", "v_rand")
    done = run_driver(tmp_path, None, *flags, processes=processes)
    assert done.returncode == 0, done.stderr
    assert "shutdown" not in done.stdout
    for said in (f"device: cpu, {processes} processes", "5 training slices", "epoch: 1 ", "epoch: 2 "):
        assert done.stdout.count(said) == 1, done.stdout
    ranks = [np.load(tmp_path / f"rank{rank}-epoch2.npz") for rank in range(processes)]
    for name in ranks[0].files:
        if name != "sums":  # running statistics are compared too
            for rank in ranks:
                np.testing.assert_array_equal(ranks[0][name], rank[name], err_msg=name)
    best = {(tmp_path / f"rank{rank}-best").read_text() for rank in range(processes)}
    assert len(best) == 1 and "val_v_rand" in best.pop()
    # The slices' digest is added up over the ranks first. An epoch adds up (loss, samples, steps), then validation
    # loss and counts, nine at each of nine thresholds; the one slice is rank 0's.
    assert all(np.array_equal(ranks[0]["sums"][0], rank["sums"][0]) for rank in ranks)
    sums = sum(rank["sums"] for rank in ranks)[1:]
    assert not np.array_equal(ranks[0]["sums"], ranks[1]["sums"])
    rows = rows_of(tmp_path / "Unet_train.csv")
    for i, row in enumerate(rows):
        loss, samples = sums[2 * i][:2]
        assert samples == 5  # though the sampler fills up, to 6 or 8
        assert float(row["train_loss"]) == pytest.approx(loss / samples, abs=1e-6)
        val_loss, counts = sums[2 * i + 1][0], sums[2 * i + 1][1:82].reshape(9, 9)
        assert float(row["val_loss"]) == pytest.approx(val_loss, abs=1e-6)
        assert float(row["val_v_rand"]) == pytest.approx(counts[:, 0].max(), abs=1e-6)
        error = (counts[4, 6] + counts[4, 7]) / counts[4, 5:].sum()
        assert float(row["val_misclassification"]) == pytest.approx(error, abs=1e-6)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best.safetensors", "last.safetensors"]


class Slices(list):
    """A list that takes the attribute `epoch`."""


@pytest.mark.parametrize("count, processes, batch", [(30, 4, 4), (30, 4, 3), (3, 8, 2), (10_007, 2, 4)])
def test_every_slice_is_seen_and_counts_once(count, processes, batch, monkeypatch):
    """Dealt out to the ranks, each slice is trained on in an epoch, and counts once in the loss."""
    numbers = np.arange(count, dtype=np.float32)
    slices = [(number.reshape(1, 1, 1), np.ones((1, 1, 1), np.float32)) for number in numbers]
    seen, sums = [], []
    monkeypatch.setattr(start, "processes", processes)

    def add(*values):  # as if another rank had a slice of no loss
        sums.append(values)
        return values[0], values[1] + 1, *values[2:]

    monkeypatch.setattr(epoch, "sum_over_ranks", add)
    for rank in range(processes):
        monkeypatch.setattr(start, "rank", rank)
        sampler = DistributedSampler(slices, processes, rank, seed=0)
        sampler.set_epoch(3)
        run = object.__new__(epoch.Run)
        run.net, run.device, run.args, run.train_set = nn.Module(), "cpu", SimpleNamespace(seed=0), Slices(slices)
        for image, _, _ in run.batches(DataLoader(slices, batch, sampler=sampler), 3):
            seen.extend(image.numpy().ravel())
            run.count(image.reshape(-1), further=1)
        assert run.further == {"further": 1}
    assert set(seen) == set(numbers)
    loss_sum, samples, *_ = np.sum(sums, axis=0)
    assert samples == count
    assert loss_sum == pytest.approx(numbers.sum())


# Writes down the gradients of a first step on 4 slices, dealt out to the ranks.
FIRST_STEP = """
from common import ranks, start
import numpy as np
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
    pairs = list(SelfDataSet("data/train_image"))[start.rank : 4 : start.processes]
    image, label = (flow.tensor(np.stack(arrays)) for arrays in zip(*pairs))
    nn.BCEWithLogitsLoss()(net(image), label).backward()
    gradients = {name: x.grad.numpy() for name, x in net.named_parameters()}
    np.savez(f"of{start.processes}-rank{start.rank}.npz", **gradients)

start.run(main)
"""


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_gradients_are_those_of_the_whole_batch(processes, slices, tmp_path):
    """With the same slices in all, several processes make the same first step as one, on the CPU kernels, to 3e-6.

    With batch normalisation's running statistics; in training each rank has its own.
    """
    program = tmp_path / "first_step.py"
    program.write_text(FIRST_STEP)
    done = python(FIRST_STEP, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = np.load(tmp_path / "of1-rank0.npz")
    done = launch(program, cwd=tmp_path, processes=processes)
    assert done.returncode == 0, done.stderr
    for rank in range(processes):
        part = np.load(tmp_path / f"of{processes}-rank{rank}.npz")
        difference = np.concatenate([(part[name] - whole[name]).ravel() for name in whole.files])
        gradient = np.concatenate([whole[name].ravel() for name in whole.files])
        assert np.linalg.norm(difference) <= 3e-6 * np.linalg.norm(gradient)


def test_one_process_equals_one_device(slices, tmp_path):
    """The twins train alike: in one process on one slice, they end with the same bits."""
    flags = ("--epochs", 2, "--data_path", slices, "--val_count", 5)
    train(*flags, cwd=tmp_path / "one")
    train(*flags, cwd=tmp_path / "ddp", name="ddp_train")
    assert_same_run(tmp_path / "one", tmp_path / "ddp")


FAULTS = [("raise", 1), ("kill", 0), ("stop", 1)]
FAULTS += [pytest.param(*fault, marks=pytest.mark.long) for fault in (("exit", 1), ("kill", 1), ("stop", 0))]
FAULTS += [pytest.param("stop early", 1, marks=pytest.mark.long)]


@pytest.mark.parametrize("what, who", FAULTS)
def test_a_failing_rank_ends_the_job(what, who, slices, tmp_path):
    """A rank that fails or answers no more ends the job by itself; nobody is left behind.

    OneFlow waits for a stopped rank for ever: there the time-out, 10 s here, ends the job.
    """
    flags = ("--rank_timeout", 10) if "stop" in what else ()
    done = run_driver(tmp_path, what, "--epochs", 1000, *flags, who=who)
    assert (tmp_path / "failed").exists() and done.returncode != 0
    if what == "raise":
        assert "driver.py (rank 1)" in done.stderr and "rank 1 has had enough" in done.stderr
    if "stop" in what:
        assert "Timeout (0:00:10)" in done.stderr and 'ddp_train.py", line ' in done.stderr  # where
    time.sleep(1)
    assert not processes_in(tmp_path)
    if what == "stop early":
        assert not (tmp_path / "checkpoints").exists()
        return
    assert metadata_of(tmp_path / LAST)["epoch"] in (2, 3)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_ending_the_launcher_ends_the_ranks(end, slices, tmp_path):
    """Nobody goes on training when the launcher is ended, though it doesn't lead its group."""
    command = launch_command("ddp_train.py", "--epochs", 10000)
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as launcher:
        while "epoch: 2 " not in launcher.stdout.readline():
            assert launcher.poll() is None
        launcher.send_signal(end)
        assert launcher.wait(timeout=30) != 0
        time.sleep(1)
        assert not processes_in(tmp_path)


def test_bad_input_ends_the_job(tmp_path):
    """Bad input on all ranks is said once, and the job ends with a non-zero code."""
    done = launch("ddp_train.py", "--data_path", "nowhere_image", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("nowhere_image: no such file") == 1


@pytest.mark.parametrize("case", ["other", pytest.param("fewer", marks=pytest.mark.long)])
def test_ranks_with_other_slices_end_the_job(case, slices, tmp_path):
    """A rank whose folder holds fewer slices, or other pixels, ends the job before it starts."""
    shutil.copytree(tmp_path / "data", tmp_path / case)
    path = tmp_path / case / "train_image/5.png"
    path.unlink()
    if case == "other":
        shutil.copy(tmp_path / "data/train_image/4.png", path)
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys, ddp_train\nfrom common import start\nfrom common.arguments import parse_args\n"
        f"sys.argv += ['--data_path', ('data', {case!r})[start.rank] + '/train_image']\n"
        "start.run(lambda: ddp_train.main(parse_args('', ddp_train.AUGMENTATIONS)))\n"
    )
    done = launch(driver, cwd=tmp_path)
    assert done.returncode != 0
    assert "this process has other slices than another one" in done.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_a_port_in_use_and_a_rank_that_is_alone(monkeypatch):
    """Rank 0 whose port another program has says so; a rank whose rank 0 never comes says for whom it waited."""
    said = []
    monkeypatch.setattr(start, "complain", lambda *message: said.append(message))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        start.find_master(True, "127.0.0.1", taken.getsockname()[1], 0.2)
    ((text, code),) = said
    assert "another --master_port" in text and code == 1
    monkeypatch.setattr(start, "rank", 1)
    for same_host in (False, True):
        start.find_master(same_host, "127.0.0.1", 9, 0.2)
    assert said[1:] == [("the other processes are not at 127.0.0.1:9 after 0.2 s", 1)] * 2


def test_two_jobs_at_once_on_one_port(slices, tmp_path):
    """Two launches at the same moment with the same port: one trains, the other one says what to do and ends."""
    command = launch_command("ddp_train.py", "--epochs", 2, "--data_path", slices)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    jobs = [subprocess.Popen(command, cwd=folder, **pipes) for folder in folders]
    errors = [job.communicate(timeout=120)[1] for job in jobs]
    codes = [job.returncode for job in jobs]
    lost = int(codes[1] != 0)
    assert codes[1 - lost] == 0 and codes[lost] != 0, errors
    assert "another --master_port" in errors[lost]
    assert [(folder / LAST).exists() for folder in folders] == [lost == 1, lost == 0]


@pytest.mark.long  # OneFlow looks every ten seconds
def test_ranks_may_end_one_after_the_other(tmp_path):
    """When all is done, one that is gone is no fault."""
    (tmp_path / "late.py").write_text(LATE)
    done = launch(tmp_path / "late.py", cwd=tmp_path)
    assert done.returncode == 0 and "lost" not in done.stderr, done.stderr
