"""The static graph against eager training: python3 -m pytest tests/test_graph.py"""

import shutil
import subprocess

from common.arguments import InputError
from conftest import LAST, ROOT, assert_same_checkpoint, metadata_of, resume, rows_of, tensors_of, train

import numpy as np
import pytest

EAGER, GRAPH = "TrainUnetDataSet", "graph_train"
# 5 slices, 3 times each, in batches of 4: the last one is short.
FLAGS = ("--crop", 32, "--val_count", 1, "--repeat", 3)
# A graph has these anyway.
LIKE_A_GRAPH = ("--cpu_kernels", "off", "--dropout", 0)


def run(name, slices, folder, *flags):
    """Train in the folder, which is made, on OneFlow's own kernels; returns it."""
    more = LIKE_A_GRAPH if name == EAGER else ()
    train(*FLAGS, *more, "--data_path", slices, *flags, cwd=folder, name=name)
    return folder


def column(folder, name):
    return [float(row[name]) for row in rows_of(folder / "Unet_train.csv")]


def assert_close(one, other):
    """Losses, step sizes and counters agree; weights too, but for what no gradient holds."""
    for name, tolerance in (("train_loss", 1e-4), ("val_loss", 5e-3), ("lr", 0)):
        assert column(one, name) == pytest.approx(column(other, name), rel=0, abs=tolerance), name
    a, b = (tensors_of(folder / LAST) for folder in (one, other))
    assert a.keys() == b.keys()
    for optimizer, tolerance in ((False, 0.01), (True, 0.2)):
        names = [name for name in a if name.startswith("optimizer.") == optimizer]
        # A bias before a BatchNorm has a gradient of rounding errors, which Adam blows up.
        names = [name for name in names if not name.endswith(("0.bias", "3.bias", "running_mean"))]
        x, y = (np.concatenate([tensors[n].ravel() for n in names]) for tensors in (a, b))
        assert np.linalg.norm(x - y) < tolerance * np.linalg.norm(y), names[0]
    steps = [metadata_of(folder / LAST)["optimizer"]["state"]["step"] for folder in (one, other)]
    assert steps[0] == steps[1] == a["inc.double_conv.1.num_batches_tracked"]


def test_a_graph_trains_as_eager_does(slices, tmp_path):
    """The same losses to 1e-4, over three epochs along a cosine, with short last batches."""
    eager = run(EAGER, slices, tmp_path / "eager", "--epochs", 3)
    graph = run(GRAPH, slices, tmp_path / "graph", "--epochs", 3, "--num_workers", 1)
    assert_close(graph, eager)


def test_checkpoints_go_both_ways(slices, tmp_path):
    """A run begun by either script goes on with the other; with the graph alone, to the bit."""
    flags = ("--schedule", "constant", "--epochs")
    whole = run(GRAPH, slices, tmp_path / "whole", *flags, 3)
    ends = {}
    for first in (EAGER, GRAPH):
        begun = run(first, slices, tmp_path / first, *flags, 1)
        for second in (EAGER, GRAPH):
            folder = tmp_path / f"{first}-{second}"
            shutil.copytree(begun, folder)
            ends[first, second] = run(second, slices, folder, *flags, 3, "--resume", LAST)
    assert_same_checkpoint(ends[GRAPH, GRAPH] / LAST, whole / LAST)
    for end in ends.values():
        assert_close(end, ends[EAGER, EAGER])


@pytest.mark.long
def test_the_check_of_gpus_is_rehearsed():
    """benchmarks/gpu_check.sh without a GPU: each way trains."""
    done = subprocess.run(["bash", ROOT / "benchmarks/gpu_check.sh", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["| one device", "| 2 processes", "| graph"]
    losses = [float(row[2]) for row in rows]
    assert losses[2] == pytest.approx(losses[0], abs=1e-4)


def test_mixed_precision_is_for_gpus(slices, tmp_path):
    """--amp on with a graph on a CPU is refused in one line, before slices are read."""
    with pytest.raises(InputError, match="--amp on: mixed precision needs a GPU"):
        train("--amp", "on", "--data_path", "nowhere_image", cwd=tmp_path, name=GRAPH)


def test_no_dropout_is_said(slices, tmp_path):
    """A graph trains without dropout, which it says; a run that it began goes on without, by either script."""
    done = train("--epochs", 1, "--crop", 32, cwd=tmp_path, name=GRAPH)
    assert "no dropout" in done.stdout
    assert metadata_of(tmp_path / LAST)["arguments"]["dropout"] == 0
    assert "dropout" not in resume("--epochs", 2, cwd=tmp_path).stdout
