"""What the scripts refuse, and how they end: python3 -m pytest tests/test_scripts.py"""

import os
import signal
import subprocess
import sys
import time

import evaluate
import predict_unet_test
from common import arguments
from common.arguments import InputError
from conftest import LAST, ROOT, SMALL, interruptible, metadata_of, one_line, python, script, train
from dataloader import AUGMENTATIONS

import pytest

BAD = {
    "no such folder": (("--data_path", "nowhere_image"), "nowhere_image"),
    "no data yet": (("--data_path", "data/train_image"), "data/prepare.py"),
    "large crop": (("--crop", 64), "--crop 64"),
    "nothing left to train on": (("--val_count", 6), "--val_count"),
    "no GPU": (("--device", "cuda", "--data_path", "nowhere_image"), "--device"),
    "no bfloat16": (("--amp", "on", "--cpu_kernels", "off", "--data_path", "nowhere_image"), "--amp"),
    "unknown flag": (("--epoch_count", 3), "--epoch_count"),
    "abbreviated flag": (("--epoch", 3), "--epoch"),
    "two validation sets": (("--val_count", 2, "--val_path", "data/train_image"), "--val_count"),
    "checkpoint missing": (("--resume", "nothing.safetensors"), "nothing.safetensors"),
    "checkpoint damaged": (("--resume", "damaged.safetensors"), "damaged.safetensors"),
    "folder as checkpoint": (("--resume", "data"), "data"),
    "log is a folder": (("--log_file", "data"), "data"),
    "log without a name": (("--log_file", "."), r"\."),
    "log in the way": (("--log_file", "loss.csv"), "--log_file"),
    "two beginnings": (("--init", "a.safetensors", "--resume", "b.safetensors"), "--init"),
    "weights for a folder": (("--checkpoint", "b.safetensors"), "--init"),
    "folder in the way": (("--checkpoint_dir", "data/train_image/0.png"), "0.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, slices, tmp_path):
    """Bad input: one line that names the file or flag, and nothing written."""
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    flags, said = BAD[case]
    if case == "no data yet":
        slices.rename(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=said) as error:
        train(*flags, cwd=tmp_path)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


OUT_OF_RANGE = {
    "--epochs": (0, -1, 1.5, "nan", "many", 10**400),
    "--repeat": (0, -1, 10**5),
    "--batch_size": (0, -4, 0.5),
    "--lr": (0, -0.1, "nan", "inf"),
    "--base_channels": (0, -16, 2000, 1.5),
    "--crop": (-1, 1, 31, 2.5),
    "--val_count": (-1, "all"),
    "--val_every": (0, -1),
    "--border_weight": (-1, "nan", "inf", 10**7),
    "--dropout": (-0.1, 1, "nan"),
    "--seed": (-1, 0.5),
    "--num_workers": (-1, 1000),
    "--rank_timeout": (0, -1, "nan", "inf"),
    "--schedule": ("linear",),
    "--best_by": ("dice", "v_rand"),  # v_rand without validation slices
    "--augment": ("blur",),
    "--device": ("tpu",),
    "--amp": ("yes",),
    "--cpu_kernels": ("on",),
    "--resume": ("",),
    "--val_path": ("",),
    "--val_label_path": ("", "labels"),  # of no slices
    "--log_file": ("", "slices/20.png"),
}
PREDICTING = {"--threshold": (-0.1, 1.1, "nan"), "--tile": (-1, 16, 192, 207), "--mirror": (-1, 8, 33, 112)}
PREDICTING |= {name: OUT_OF_RANGE[name] for name in ("--device", "--cpu_kernels")}
RANGES = {
    "train": (lambda: arguments.parse_args("", AUGMENTATIONS), OUT_OF_RANGE),
    "predict": (predict_unet_test.parse_args, PREDICTING),
    "evaluate": (evaluate.parse_args, {"--threshold": PREDICTING["--threshold"], "--picture": ("",), "--json": ("",)}),
}


@pytest.mark.parametrize("name", RANGES)
def test_every_flag_has_its_range(name, monkeypatch):
    """Every value that makes no sense is refused by the name of its flag, before any work."""
    parse, flags = RANGES[name]
    for flag, values in flags.items():
        for value in values:
            monkeypatch.setattr(sys, "argv", ["x", f"{flag}={value}"])
            with pytest.raises(InputError, match=flag) as error:
                parse()
                pytest.fail(f"{flag} {value} was taken")
            assert "\n" not in str(error.value)


def test_how_a_script_ends(tmp_path):
    """Exit codes and what is said, without OneFlow and without its shutdown, which has hung after all was written."""
    begin = "import atexit, sys\nfrom common import start\nfrom common.arguments import InputError\n"
    begin += "atexit.register(print, 'late')\ndef main():\n    print('begun')\n    "
    for last, code, said in (
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('that is all')", 1, "-c: that is all\n"),
        (r"raise InputError('a\nb\x1b[2J')", 2, "-c: a\\nb\\x1b[2J\n"),
        (
            "raise OSError(28, 'No space left', 'file')",
            1,
            "-c: file: No space left; nothing was finished, nothing is kept\n",
        ),
    ):
        done = python(f"{begin}{last}\nstart.run(main)", cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (code, "begun\n", said), last
    done = python(f"{begin}1 / 0\nstart.run(main)", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr
    with open("/dev/full", "w") as full:
        options = {"capture_output": False, "stdout": full, "stderr": subprocess.PIPE}
        done = script("TrainUnetDataSet.py", "--help", cwd=tmp_path, **options)
    assert done.returncode == 1 and one_line(done.stderr) and "No space left" in done.stderr


def test_interrupt_keeps_the_last_epoch(slices, tmp_path):
    """Ctrl-C: exit 130, one line says what is kept, the checkpoint loads, workers go quietly."""
    command = [sys.executable, ROOT / "TrainUnetDataSet.py", *SMALL, "--epochs", 10_000, "--num_workers", 2]
    process = interruptible(command, tmp_path)
    seen = ""
    while "epoch: 2 " not in seen:
        seen = process.stdout.readline()
        assert seen, process.stderr.read()
    time.sleep(0.3)  # into the next epochs, when the workers are at it
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.startswith("\ninterrupted: epoch") and errors.count("\n") == 2
    assert f"--resume {LAST}" in errors
    done = metadata_of(tmp_path / LAST)["epoch"] - 1
    assert done >= 2 and f"epoch {done} " in errors
    assert done - len((tmp_path / "Unet_train.txt").read_text().splitlines()) in (0, 1)


# A process that waits for others, in C and with descriptor 2 silenced, as it is where files are read.
WAITING = """
import ctypes
from common import images, start
start.patience, start.stderr = 1, __import__("os").dup(2)
start.keep("what was kept")
with images.quiet_stderr():
    ctypes.PyDLL(None).sleep(60)  # holds Python's lock
"""


def test_the_watchdog_is_heard(tmp_path):
    """It ends a process whatever that hangs in, and says so where its messages go, silenced or not."""
    done = python(WAITING, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("Timeout (0:00:01)!\n")
