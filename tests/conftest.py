"""What several tests need: a tiny data set, training in this process, and scripts run as a user does."""

import csv
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from common import files, start
from common.arguments import parse_args
from dataloader import AUGMENTATIONS

import cv2
import numpy as np
import pytest
import safetensors

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--device", "cpu", "--base_channels", "4", "--repeat", "1", "--val_every", "1")
LAST, BEST = "checkpoints/last.safetensors", "checkpoints/best.safetensors"


def write_pairs(folder, count, shape=(48, 64), seed=0):
    """Write train_image/ and train_label/: cells as dark-rimmed discs on noise, easy to learn."""
    rng = np.random.default_rng(seed)
    for name in ("train_image", "train_label"):
        (folder / name).mkdir(parents=True)
    ys, xs = np.mgrid[: shape[0], : shape[1]]
    for i in range(count):
        y, x = rng.uniform(0.3, 0.7, 2) * shape
        radius = rng.uniform(0.2, 0.4) * min(shape)
        membrane = np.abs(np.hypot(ys - y, xs - x) - radius) < 3
        image = np.where(membrane, 60, 170) + rng.normal(0, 15, shape)
        cv2.imwrite(str(folder / f"train_image/{i}.png"), np.clip(image, 0, 255).astype(np.uint8))
        cv2.imwrite(str(folder / f"train_label/{i}.png"), np.where(membrane, 0, 255).astype(np.uint8))
    return folder / "train_image"


@pytest.fixture
def slices(tmp_path):
    """A folder of 6 training slices of 48 x 64 pixels with labels beside it."""
    return write_pairs(tmp_path / "data", 6)


@pytest.fixture(scope="session")
def oracle():
    """Probabilities and labels of the three slices of which tests/metrics_oracle knows the scores."""
    arrays = np.load(ROOT / "tests/metrics_oracle/oracle.npz")
    return (arrays["probability_u8"] + 0.5) / 256, arrays["labels"] > 0


def release():
    """Let go of what a run in this process has locked, as the end of its process would."""
    for name, folder in files.held.values():
        name.close()
        if folder is not None:
            os.close(folder)
    files.held.clear()
    start.kept = "nothing was finished, nothing is kept"


def train(*args, cwd, small=SMALL, name="TrainUnetDataSet"):
    """Train in this process, in the folder `cwd`, with a narrow net; returns what was printed as .stdout.

    Raises what the script would end with.
    """
    before, out = Path.cwd(), io.StringIO()
    Path(cwd).mkdir(exist_ok=True)
    os.chdir(cwd)
    try:
        with redirect_stdout(out):
            importlib.import_module(name).main(parse_args("", AUGMENTATIONS, [*small, *map(str, args)]))
    finally:
        os.chdir(before)
        release()
    return SimpleNamespace(stdout=out.getvalue())


def resume(*args, cwd, name="TrainUnetDataSet"):
    """Go on from the folder's last checkpoint, with its arguments."""
    return train("--resume", LAST, *args, cwd=cwd, small=("--device", "cpu"), name=name)


def script(name, *args, cwd, **options):
    """Run a script of the repository in the folder `cwd`; returns the finished process."""
    options = {"capture_output": True, "text": True, "timeout": 240, **options}
    return subprocess.run([sys.executable, ROOT / name, *map(str, args)], cwd=cwd, **options)


def python(program, *args, cwd, **options):
    """Run a program's text with the repository on its module path; returns the finished process."""
    options = {"capture_output": True, "text": True, "timeout": 240, **options}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", program, *map(str, args)], cwd=cwd, env=env, **options)


def launch_command(path, *args, processes=2):
    """The command that runs a script, of the repository or by its whole path, in several processes."""
    with socket.socket() as probe:  # a port that is free, so that tests don't meet
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "oneflow.distributed.launch", "--master_port", port]
    command += ["--nproc_per_node", processes, ROOT / path, *SMALL, *args]
    return list(map(str, command))


def launch(path, *args, cwd, processes=2):
    """Run a training script in several processes, the repository on their module path."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = launch_command(path, *args, processes=processes)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def interruptible(command, cwd, **options):
    """Start a command as a terminal does: in a session of its own, Ctrl-C not ignored; its output is in pipes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(list(map(str, command)), cwd=cwd, **pipes, **heard, **options)


def tree(folder):
    """Every path below `folder`, hidden ones too, with the bytes of the files."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in paths}


def one_line(text):
    """Whether an error message is what the README promises: one line, no traceback."""
    return text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text


def tensors_of(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def metadata_of(path):
    """A checkpoint's metadata, without the checksum."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return {key: json.loads(text) for key, text in file.metadata().items() if key != "checksum"}


def assert_same_checkpoint(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


def rows_of(path):
    """The CSV without what differs from run to run, the time."""
    with Path(path).open() as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def assert_same_run(one, other):
    """Two runs' folders hold the same bits and the same numbers."""
    for name in (LAST, BEST):
        assert_same_checkpoint(one / name, other / name)
    assert (one / "Unet_train.txt").read_text() == (other / "Unet_train.txt").read_text()
    assert rows_of(one / "Unet_train.csv") == rows_of(other / "Unet_train.csv")


def mutated(whole, rng, start):
    """A copy of the bytes with one thing wrong, half the time near the start."""
    data = bytearray(whole)
    place, other = (int(rng.integers(n)) for n in (start if rng.integers(2) else len(data), start))
    length = int(rng.integers(1, 50))
    kind = rng.integers(6)
    if kind == 0:
        del data[place:]
    elif kind == 1:
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        data[place : place + length] = rng.bytes(length)
    elif kind == 3:
        del data[place : place + length]
    elif kind == 4:
        data[place:place] = data[other : other + length]
    else:  # where lengths and offsets stand
        data[place : place + 4] = (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff")[rng.integers(3)]
    return bytes(data)


def processes_in(folder):
    """The pids of all processes that work in the folder, as /proc has them."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{name}/cwd") == str(folder) and int(name) != os.getpid():
                found.append(int(name))
        except OSError:
            continue
    return found


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="try what is random much more often")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: tried with --long only")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="with --long only"))
