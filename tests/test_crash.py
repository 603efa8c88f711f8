"""Runs that are killed, disks that are full: python3 -m pytest tests/test_crash.py [--long]"""

import csv
import glob
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

from common import checkpoint
from conftest import LAST, ROOT, SMALL, assert_same_run, interruptible, launch_command, one_line, processes_in, python

import numpy as np
import pytest

FOLDER = "checkpoints"
# Augmentation, border weights, schedule and CPU kernels are on by default.
FLAGS = ("--crop", 32, "--val_count", 2, "--batch_size", 2, "--val_every", 3)


def command_of(processes, *flags):
    flags = (*FLAGS, *flags)
    if processes > 1:
        return launch_command("ddp_train.py", *flags, processes=processes)
    return [sys.executable, ROOT / "TrainUnetDataSet.py", *SMALL, *map(str, flags)]


def check_what_is_left(folder):
    """Both checkpoints load, the log and the table hold whole lines, nothing piles up; (epochs, half-written)."""
    kept = {path.name for path in (folder / FOLDER).iterdir()}
    unfinished = {path for path in kept if path.startswith(".")}
    assert kept - unfinished <= {"last.safetensors", "best.safetensors"}
    assert len(unfinished) <= 1
    done = 0
    for name in kept - unfinished:
        epoch = checkpoint.load_net(folder / FOLDER / name)[1]["epoch"]
        done = epoch - 1 if name == "last.safetensors" else done
    if done and (folder / "Unet_train.txt").exists():
        log = (folder / "Unet_train.txt").read_text()
        assert all(len(line) == 6 and float(line) for line in log.splitlines()) and log.endswith("\n")
        with open(folder / "Unet_train.csv") as file:
            assert len({len(row) for row in csv.reader(file)}) == 1
        assert done - log.count("\n") in (0, 1)
    return done, len(unfinished)


def kill_and_resume(folder, kills, processes, *flags):
    """Kill -9 and resume again and again; the times that a file was being written."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(kills):
        # Alternately at any moment from the start on, among the epochs, and in a write.
        again = ("--resume", LAST) if (folder / LAST).exists() else ()
        command = command_of(processes, *flags, *again, "--num_workers", i % 2)
        with open(folder / "output.txt", "w+") as output:
            run = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
            wanted = (None, "epoch: ", "epoch: ")[i % 3]
            while wanted and wanted not in (folder / "output.txt").read_text():
                assert run.poll() is None, (folder / "output.txt").read_text()
                time.sleep(0.01)
            if i % 3 == 2:
                until = time.monotonic() + 30
                while not glob.glob(f"{folder}/{FOLDER}/.*.new") and time.monotonic() < until:
                    time.sleep(0.0005)
                time.sleep(rng.uniform(0, 0.003))
            else:
                time.sleep(rng.uniform(0, 1 if wanted else 4))
            run.kill()
            run.wait()
        until = time.monotonic() + 30
        while processes_in(folder):  # workers and ranks go with it
            assert time.monotonic() < until, "processes are left behind"
            time.sleep(0.05)
        if (folder / FOLDER).exists():
            hits += check_what_is_left(folder)[1]
    return hits


# Replaces a file by another one and kills itself in the midst: at the step of that number.
STEPS_OF_A_WRITE = """
import os, signal, sys
from common.files import write_whole
steps = []
def killing(name, function):
    def step(*arguments):
        steps.append(name)
        if len(steps) == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return step
os.fsync, os.replace = killing("sync", os.fsync), killing("replace", os.replace)
with write_whole("file") as file:
    file.write(b"new" * 1000)
    if sys.argv[1] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
print(*steps)
"""


def test_every_step_of_a_write(tmp_path):
    """Killed before or after any step, the file is the old one or the new one, as a whole.

    What is written is on the disk before it takes the file's name, and then the name is.
    """
    for step, expected in enumerate((b"old", b"old", b"old", b"new" * 1000)):
        (tmp_path / "file").write_bytes(b"old")
        assert python(STEPS_OF_A_WRITE, step, cwd=tmp_path).returncode == -signal.SIGKILL
        assert (tmp_path / "file").read_bytes() == expected
        (left,) = [path for path in tmp_path.iterdir() if path.name != "file"] if step < 3 else [None]
        if left:
            left.unlink()
    assert python(STEPS_OF_A_WRITE, 9, cwd=tmp_path).stdout == "sync replace sync\n"
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_and_resumed_is_the_same_run(processes, slices, tmp_path, request):
    """kill -9 at random moments: nothing is lost but the current epoch, the end is the same bits.

    3 kills, 100 with --long, and then 20 of two data parallel processes.
    """
    kills = 20 if processes == 2 else 100 if request.config.getoption("--long") else 3
    epochs = (12 if processes == 1 else 8) * kills
    flags = ("--data_path", slices, "--epochs", epochs, "--best_by", "v_rand")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    done = subprocess.run(command_of(processes, *flags), cwd=whole, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hits = kill_and_resume(parts, kills, processes, *flags)
    reached = check_what_is_left(parts)[0]
    print(f"{kills} kills, {hits} files found half-written, {reached} epochs reached")
    again = ("--resume", LAST) if (parts / LAST).exists() else ()
    done = subprocess.run(command_of(processes, *flags, *again), cwd=parts, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, parts)
    assert {path.name for path in (parts / FOLDER).iterdir()} == {"last.safetensors", "best.safetensors"}


def test_an_interrupt_at_any_moment(slices, tmp_path, request):
    """Ctrl-C from half a second after the start on: 130, one line or none, nobody left behind.

    3 times, 60 with --long; the scripts take turns. The first fraction of a second is Python's.
    """
    rng = np.random.default_rng(0)
    said = 0
    for i in range(60 if request.config.getoption("--long") else 3):
        command = command_of(1, "--data_path", slices, "--epochs", 10_000, "--num_workers", i % 2)
        if i % 3 == 2:
            command = [sys.executable, ROOT / "predict_unet_test.py", "--tta", "--device", "cpu"]
            command += ["--Test_Data_path", slices, "--cells"]
        process = interruptible(command, tmp_path)
        time.sleep(rng.uniform(0.5, 5))
        ended = process.poll() is not None  # predicting may be done
        if not ended:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=30)
        # -2: ended by the signal itself, which a shell calls 130 too
        assert process.returncode in ((0,) if ended else (130, -2)), errors
        assert re.fullmatch(r"(\ninterrupted: .*\n)?", errors)
        said += errors != ""
        until = time.monotonic() + 10
        while processes_in(tmp_path):
            assert time.monotonic() < until, "processes are left behind"
            time.sleep(0.05)
    assert said or i < 10  # some came late enough


def test_an_interrupt_is_answered_while_slices_are_checked(slices, tmp_path):
    """Ctrl-C says what is kept then too, though what OpenCV would print is silenced."""
    script = """
import os, time
from common import start, images

def slow(*where):
    with images.quiet_stderr():
        os.write(1, b"reading\\n")
        time.sleep(60)

start.run(slow)
"""
    process = interruptible([sys.executable, "-c", script], tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "\ninterrupted: nothing was finished, nothing is kept\n"


# A bare loop with OneFlow's own Adam; prints the memory in use, kB, after each 30 steps.
BARE = """
import sys
import numpy as np
from unet import UNet
import oneflow as flow
from oneflow import nn, optim

net = UNet(1, 1, bilinear=False, base_channels=4)
optimizer = optim.Adam(net.parameters(), lr=1e-3)
criterion = nn.BCEWithLogitsLoss()
image = flow.tensor(np.random.default_rng(0).normal(size=(2, 1, 32, 32)).astype(np.float32))
label = (image > 0).to(flow.float32)
for i in range(int(sys.argv[1])):
    loss = criterion(net(image), label)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()  # waits: operations that queue up take memory, too
    if i % 30 == 29:
        print("epoch", flush=True)
"""


def growth(command, cwd):
    """kB a step by which a process grows that prints a line with "epoch" after each 30 steps.

    The median of its epochs: what is kept grows in each, while malloc's heap grows by leaps.
    """
    memory = []
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stdout:
            if line.startswith("epoch"):
                with suppress(OSError), open(f"/proc/{process.pid}/status") as file:
                    memory += [int(line.split()[1]) for line in file if line.startswith("VmRSS")]
    assert process.returncode == 0
    begin = len(memory) // 3  # when all that is kept has been made
    return np.median(np.diff(memory[begin:-1])) / 30


@pytest.mark.long
def test_a_long_run_needs_no_more_memory(slices, tmp_path):
    """2010 steps: what grows is OneFlow's own Adam, as in a bare loop.

    An epoch of 30 steps trains, validates, logs and saves, with a loading worker.
    """
    epochs = 67
    flags = ("--data_path", slices, "--crop", 32, "--repeat", 10, "--batch_size", 2)
    flags += ("--val_path", slices, "--epochs", epochs, "--num_workers", 1)
    ours = [sys.executable, ROOT / "TrainUnetDataSet.py", *SMALL, *map(str, flags)]
    bare = [sys.executable, "-c", BARE, str(30 * epochs)]
    grown = {name: growth(command, tmp_path) for name, command in (("ours", ours), ("bare", bare))}
    print("; ".join(f"{name}: {kb:.1f} kB a step" for name, kb in grown.items()))
    assert grown["ours"] < grown["bare"] + 8


def on_small_disk(folder, megabytes, command):
    """Run a shell command in the folder, with a disk of its own under it, `small`."""
    (folder / "small").mkdir()
    mount = f"mount -t tmpfs -o size={megabytes}m none small"
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*words, mount], cwd=folder, capture_output=True).returncode:
        pytest.skip("no user namespaces here, so no small disk")
    command = [*words, f"{mount} && {command}", "sh"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def train_on(disk, *flags):
    words = (*command_of(1, *flags), "--checkpoint_dir", disk, "--log_file", f"{disk}/log.txt")
    return " ".join(f"'{word}'" for word in words)


def test_a_full_disk_keeps_the_checkpoint_before(slices, tmp_path):
    """No room for the next checkpoint: exit 1, a line that names it, those before are whole."""
    training = train_on("small", "--epochs", 50)
    done = on_small_disk(tmp_path, 4, f"{{ {training}; code=$?; cp -r small kept; exit $code; }}")
    assert done.returncode == 1, done.stderr
    assert one_line(done.stderr) and "small/" in done.stderr and "No space left" in done.stderr
    assert "go on with --resume small/last.safetensors" in done.stderr
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {"last.safetensors", "best.safetensors", "log.txt", "log.csv"}
    done = checkpoint.load_net(tmp_path / "kept/last.safetensors")[1]["epoch"] - 1
    checkpoint.load_net(tmp_path / "kept/best.safetensors")
    assert done - (tmp_path / "kept/log.txt").read_text().count("\n") in (0, 1)


def test_a_read_only_folder_is_said_before_the_work(slices, tmp_path):
    """Where nothing can be written: exit 2 at once, one line that names the folder."""
    predicting = f"'{sys.executable}' '{ROOT}/predict_unet_test.py' --Test_Data_path data/train_image"
    for i, command in enumerate((train_on("small"), f"{predicting} --save_res_path small")):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "data").symlink_to(tmp_path / "data")
        done = on_small_disk(folder, 1, f"mount -o remount,ro small && {command}")
        assert done.returncode == 2 and one_line(done.stderr), done.stderr
        assert "small: can't be written to" in done.stderr
