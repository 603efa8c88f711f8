"""What several tests need: a tiny data set and a way to run the scripts as a user does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


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
        cv2.imwrite(str(folder / f"train_label/{i}.png"), np.where(membrane, 0, 255))
    return folder / "train_image"


@pytest.fixture
def slices(tmp_path):
    """A folder of 6 training slices of 48 x 64 pixels with labels beside it."""
    return write_pairs(tmp_path / "data", 6)


def script(name, *args, cwd, **options):
    """Run a script of the repository in the folder `cwd`; returns the finished process."""
    options = {"capture_output": True, "text": True, "timeout": 240, **options}
    return subprocess.run([sys.executable, ROOT / name, *map(str, args)], cwd=cwd, **options)


SMALL = ("--device", "cpu", "--base_channels", "4", "--repeat", "1", "--val_every", "1")


def train(*args, cwd, **options):
    """Run TrainUnetDataSet.py with a narrow net and check that it ends well."""
    done = script("TrainUnetDataSet.py", *SMALL, *args, cwd=cwd, **options)
    assert done.returncode == 0, done.stderr
    return done


def launch_command(path, *args, processes=2):
    """The command that runs a training script in several processes."""
    with socket.socket() as probe:  # a port that is free, so that tests don't meet
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "oneflow.distributed.launch", "--master_port", port]
    command += ["--nproc_per_node", processes, path, *SMALL, *args]
    return list(map(str, command))


def launch(path, *args, cwd, processes=2):
    """Run a training script in several processes, the repository on their module path."""
    return subprocess.run(
        launch_command(path, *args, processes=processes),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def one_line(text):
    """Whether an error message is what the README promises: one line, no traceback."""
    return text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="try what is random much more often")
