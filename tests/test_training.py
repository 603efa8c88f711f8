"""Training as a user runs it: python3 -m pytest tests/test_training.py"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import engine
import predict_unet_test
from conftest import ROOT, SMALL, one_line, script, train, write_pairs
from dataloader import InputError, SelfDataSet

import numpy as np
import oneflow as flow
import pytest
import safetensors


def tensors_of(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def metadata_of(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return {key: json.loads(text) for key, text in file.metadata().items()}


def assert_same_checkpoint(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


def rows_of(path):
    """The CSV without what differs from run to run, the time."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_a_run_trains_logs_and_saves(slices, tmp_path):
    """Loss falls; the line, the log, the CSV and the checkpoints are as the README says."""
    done = train("--epochs", 6, "--val_count", 2, "--lr", 0.003, "--batch_size", 1, cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.startswith("4 training slices, 2 validation slices\ndevice: cpu\n")
    lines = re.findall(r"^epoch: (\d+) avg loss: (\d+\.\d{6}) time: \d+ s", done.stdout, re.M)
    assert [int(epoch) for epoch, _ in lines] == [1, 2, 3, 4, 5, 6]
    losses = [float(loss) for _, loss in lines]
    assert losses[-1] < 0.8 * losses[0]

    log = (tmp_path / "Unet_train.txt").read_text().splitlines()
    assert all(re.fullmatch(r"\d+\.\d{4}", line) for line in log)
    np.testing.assert_allclose([float(line) for line in log], losses, atol=5.1e-5)
    rows = rows_of(tmp_path / "Unet_train.csv")
    assert [float(row["train_loss"]) for row in rows] == losses
    assert all(0 < float(row["val_misclassification"]) < 1 for row in rows)
    cosine = [0.0015 * (1 + np.cos(np.pi * epoch / 6)) for epoch in range(1, 7)]
    np.testing.assert_allclose([float(row["lr"]) for row in rows], cosine, rtol=1e-4, atol=1e-12)
    assert all(0 < float(row["val_v_rand"]) <= 1 for row in rows)

    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best.safetensors", "last.safetensors"]
    last = metadata_of(folder / "last.safetensors")
    assert last["epoch"] == 7 and last["threshold"] == last["best"]["threshold"]
    assert last["model"] == dict(n_channels=1, n_classes=1, bilinear=False, base_channels=4)
    val_losses = [float(row["val_loss"]) for row in rows]
    best = metadata_of(folder / "best.safetensors")
    assert best["best"]["by"] == "val_loss"
    assert best["best"]["epoch"] == best["epoch"] - 1 == 1 + np.argmin(val_losses)
    assert best["threshold"] == float(rows[np.argmin(val_losses)]["val_threshold"])
    names = tensors_of(folder / "last.safetensors")
    assert "inc.double_conv.0.weight" in names
    assert "optimizer.exp_avg.inc.double_conv.0.weight" in names


def test_validation_is_the_nets_own_score(slices, tmp_path):
    """val_loss and val_misclassification are those of the saved net in eval mode, from scratch."""
    train("--epochs", 2, "--val_count", 2, cwd=tmp_path)
    net, _ = engine.net_of_checkpoint(tmp_path / "checkpoints/last.safetensors")
    net.eval()
    losses, errors = [], []
    for image, label in SelfDataSet(slices, keep=slice(-2, None)):
        with flow.no_grad():
            logit = net(flow.tensor(image[None])).numpy()[0].astype(np.float64)
        losses.append(np.mean(np.log1p(np.exp(-np.where(label == 1, logit, -logit)))))
        errors.append(np.mean((logit > 0) != (label == 1)))
    row = rows_of(tmp_path / "Unet_train.csv")[-1]
    assert float(row["val_loss"]) == pytest.approx(np.mean(losses), abs=2e-6)
    assert float(row["val_misclassification"]) == pytest.approx(np.mean(errors), abs=1e-6)


def test_overfits_two_slices(tmp_path):
    """The whole chain learns: 95 % of the pixels of two training slices come out right."""
    data = write_pairs(tmp_path / "data", 2)
    (tmp_path / "held").symlink_to(data)
    (tmp_path / "truth").symlink_to(data.with_name("train_label"))
    validate = ("--val_path", "held", "--val_label_path", "truth", "--batch_size", 2, "--augment")
    train("--data_path", data, *validate, "--epochs", 15, "--lr", 0.01, cwd=tmp_path)
    errors = [float(row["val_misclassification"]) for row in rows_of(tmp_path / "Unet_train.csv")]
    assert min(errors) < 0.05
    assert errors[0] > 0.05  # or the gate would say nothing


def test_resume_is_exact(slices, tmp_path):
    """A run killed and resumed ends with the same bits, log and CSV as one that ran through.

    With everything on: augmentation, border weights, schedule, workers, best by V_Rand.
    """
    flags = ("--crop", 32, "--val_count", 2, "--batch_size", 3, "--seed", 5, "--lr", 0.002)
    flags += ("--data_path", slices, "--epochs", 6, "--val_every", 2, "--best_by", "v_rand")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    train(*flags, "--num_workers", 2, cwd=whole)
    command = [sys.executable, ROOT / "TrainUnetDataSet.py", *SMALL, *map(str, flags)]
    with subprocess.Popen(command, cwd=parts, stdout=subprocess.PIPE, text=True) as process:
        while not process.stdout.readline().startswith("epoch: 3"):
            assert process.poll() is None
        process.kill()
    # A line whose checkpoint was never written, as a crash would leave it, is cut off.
    for log in ("Unet_train.txt", "Unet_train.csv"):
        with (parts / log).open("a") as file:
            file.write("6,9.9\n")
    # Only paths have to be said again.
    again = ("--data_path", slices, "--resume", "checkpoints/last.safetensors")
    script("TrainUnetDataSet.py", "--device", "cpu", *again, cwd=parts)
    for name in ("last", "best"):
        name = f"checkpoints/{name}.safetensors"
        assert_same_checkpoint(whole / name, parts / name)
    assert (whole / "Unet_train.txt").read_text() == (parts / "Unet_train.txt").read_text()
    rows = rows_of(whole / "Unet_train.csv")
    assert rows == rows_of(parts / "Unet_train.csv")
    validated = [int(row["epoch"]) for row in rows if row["val_v_rand"]]
    assert validated == [1, 2, 4, 6]
    best = metadata_of(whole / "checkpoints/best.safetensors")["best"]
    assert best["by"] == "val_v_rand"
    assert 1 - best["loss"] == pytest.approx(
        max(float(r["val_v_rand"] or 0) for r in rows), abs=1e-6
    )


def test_border_weights_reach_the_loss(slices, tmp_path):
    """The first epoch's loss of one step is the weighted mean of the untrained net's losses."""
    from unet import UNet

    flags = ("--batch_size", 6, "--epochs", 1, "--augment", "--crop", 0, "--seed", 3)
    train(*flags, "--border_weight", 30, "--dropout", 0, cwd=tmp_path)
    engine.seed_epoch(3, 0)
    net = UNet(1, 1, bilinear=False, base_channels=4)
    image, label, weight = map(np.stack, zip(*SelfDataSet(slices, border_weight=30), strict=True))
    with flow.no_grad():
        logits = net(flow.tensor(image)).numpy().astype(np.float64)
    losses = np.log1p(np.exp(-np.where(label == 1, logits, -logits)))
    (row,) = rows_of(tmp_path / "Unet_train.csv")
    assert float(row["train_loss"]) == pytest.approx((losses * weight).mean(), abs=1e-5)
    assert abs(losses.mean() - (losses * weight).mean()) > 1e-3


def test_a_script_ends_without_oneflows_shutdown():
    """What OneFlow registers to be called at the end has hung, after all was written."""
    program = "import atexit, engine; atexit.register(print, 'late'); engine.run(lambda: print(1))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n")


def test_dropout_reaches_the_net(slices, tmp_path, monkeypatch):
    """By default, not with 0; ranks draw their own; runs older than the flag go on without it."""
    losses = {}
    for name, flags in (("default", ()), ("same", ("--dropout", 0.5)), ("none", ("--dropout", 0))):
        (tmp_path / name).mkdir()
        train("--data_path", slices, "--epochs", 1, *flags, cwd=tmp_path / name)
        losses[name] = rows_of(tmp_path / name / "Unet_train.csv")[0]["train_loss"]
    assert losses["default"] == losses["same"] != losses["none"]

    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(engine, "RANK", rank)
        engine.seed_epoch(0, 1)
        drawn.append((flow.rand(9).numpy(), np.random.rand(9)))
    assert not np.array_equal(drawn[0][0], drawn[1][0])
    assert np.array_equal(drawn[0][1], drawn[1][1])  # the order of slices

    last = tmp_path / "none/checkpoints/last.safetensors"
    tensors, metadata = tensors_of(last), metadata_of(last)
    del metadata["checksum"], metadata["arguments"]["dropout"]
    engine.write_checkpoint(last, tensors, metadata)
    again = ("--data_path", slices, "--resume", last, "--epochs", 2, "--device", "cpu")
    done = script("TrainUnetDataSet.py", *again, "--dropout", 0.5, cwd=tmp_path / "none")
    assert "was trained: dropout 0.0 -> 0.5\n" in done.stdout
    engine.write_checkpoint(last, tensors, metadata)
    done = script("TrainUnetDataSet.py", *again, cwd=tmp_path / "none")
    assert done.returncode == 0 and "trained: dropout" not in done.stdout


def test_more_epochs_go_on_along_the_longer_cosine(slices, tmp_path):
    """Resumed with a larger --epochs, the step size jumps to the new cosine; that is said."""
    train("--epochs", 2, cwd=tmp_path)
    again = ("--resume", "checkpoints/last.safetensors", "--epochs", 4, "--device", "cpu")
    done = script("TrainUnetDataSet.py", *again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not as checkpoints/last.safetensors was trained: epochs 2 -> 4\n" in done.stdout
    assert done.stdout.count("not as") == 1
    cosine = [0.0005 * (1 + np.cos(np.pi * share)) for share in (1 / 2, 2 / 2, 3 / 4, 4 / 4)]
    rates = [float(row["lr"]) for row in rows_of(tmp_path / "Unet_train.csv")]
    np.testing.assert_allclose(rates, cosine, rtol=1e-4, atol=1e-12)


def test_a_log_that_lost_power_is_mended(slices, tmp_path):
    """Zeros at the end of log and table, as a power cut leaves them, go when a run is resumed."""
    train("--epochs", 2, cwd=tmp_path)
    for name in ("Unet_train.txt", "Unet_train.csv"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"3,0.5\xff" + bytes(20))
    again = ("--resume", "checkpoints/last.safetensors", "--epochs", 3, "--device", "cpu")
    done = script("TrainUnetDataSet.py", *again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["epoch"] for row in rows_of(tmp_path / "Unet_train.csv")] == ["1", "2", "3"]
    assert re.fullmatch(r"(\d\.\d{4}\n){3}", (tmp_path / "Unet_train.txt").read_text())


def test_one_training_a_folder(slices, tmp_path):
    """A second run that would write the same checkpoints is refused while the first one runs."""
    command = [sys.executable, ROOT / "TrainUnetDataSet.py", *SMALL, "--epochs", "10000"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        while "epoch: 1 " not in process.stdout.readline():
            assert process.poll() is None
        done = script("TrainUnetDataSet.py", *SMALL, "--log_file", "other.txt", cwd=tmp_path)
        process.kill()
    assert done.returncode == 2 and one_line(done.stderr)
    assert "checkpoints: another training writes there" in done.stderr


def test_output_that_cannot_be_written(slices, tmp_path):
    """A full disk behind stdout: exit 1 and a line on stderr, no traceback."""
    with open("/dev/full", "w") as full:
        done = script(
            "TrainUnetDataSet.py",
            "--help",
            cwd=tmp_path,
            capture_output=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 1 and one_line(done.stderr) and "No space left" in done.stderr


def test_interrupt_keeps_the_last_epoch(slices, tmp_path):
    """Ctrl-C: exit 130, one line says what is kept, the checkpoint loads, workers go quietly."""
    command = [sys.executable, ROOT / "TrainUnetDataSet.py", *SMALL, "--epochs", "10000"]
    process = subprocess.Popen(
        [*command, "--num_workers", "2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = ""
    while "epoch: 2 " not in seen:
        seen = process.stdout.readline()
        assert seen, process.stderr.read()
    time.sleep(0.3)  # into the next epochs, when the workers are at it
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.startswith("\ninterrupted: epoch") and errors.count("\n") == 2
    assert "--resume checkpoints/last.safetensors" in errors
    done = metadata_of(tmp_path / "checkpoints/last.safetensors")["epoch"] - 1
    assert done >= 2 and f"epoch {done} " in errors
    log = (tmp_path / "Unet_train.txt").read_text().splitlines()
    assert len(log) - done in (0, 1)


@pytest.mark.parametrize("count, lr", [(6, "1e30"), (1, "1e38"), (1, "1e20")])
def test_what_is_not_finite_stops(count, lr, tmp_path):
    """NaN or infinity ends the run with a message, exit 1, before it reaches a checkpoint.

    With one slice an epoch it shows only in the weights or in the validation after the step.
    """
    data = write_pairs(tmp_path / "data", count)
    flags = ("--lr", lr, "--epochs", 4, "--val_path", data)
    done = script("TrainUnetDataSet.py", *SMALL, *flags, cwd=tmp_path)
    assert done.returncode == 1 and one_line(done.stderr)
    assert "smaller --lr" in done.stderr
    for path in (tmp_path / "checkpoints").iterdir():
        assert all(np.isfinite(tensor).all() for tensor in tensors_of(path).values())


BAD = {
    "no such folder": (("--data_path", "nowhere_image"), "nowhere_image"),
    "no data yet": (("--data_path", "data/train_image"), "data/prepare.py"),
    "no epochs": (("--epochs", 0), "--epochs"),
    "no learning rate": (("--lr", 0), "--lr"),
    "not a number": (("--lr", "nan"), "--lr"),
    "large crop": (("--crop", 64), "--crop 64"),
    "small crop": (("--crop", 31), "--crop"),
    "nothing left to train on": (("--val_count", 6), "--val_count"),
    "no GPU": (("--device", "cuda"), "--device"),
    "unknown flag": (("--epoch_count", 3), "--epoch_count"),
    "checkpoint missing": (("--resume", "nothing.safetensors"), "nothing.safetensors"),
    "checkpoint damaged": (("--resume", "damaged.safetensors"), "damaged.safetensors"),
    "folder as checkpoint": (("--resume", "data"), "data"),
    "abbreviated flag": (("--epoch", 3), "--epoch"),
    "log is a folder": (("--log_file", "data"), "data"),
    "log without a name": (("--log_file", "."), "."),
    "log in the way": (("--log_file", "loss.csv"), "--log_file"),
    "folder in the way": (("--checkpoint_dir", "damaged.safetensors"), "damaged.safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, slices, tmp_path):
    """Bad input: exit 2, one line that names the file or flag, and nothing written."""
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    flags, said = BAD[case]
    if case == "no data yet":
        slices.rename(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    done = script("TrainUnetDataSet.py", "--device", "cpu", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert one_line(done.stderr) and said in done.stderr, done.stderr
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
    "--cpu_kernels": ("on",),
    "--resume": ("",),
    "--val_path": ("",),
    "--val_label_path": ("", "labels"),  # of no slices
    "--log_file": ("",),
}
PREDICTING = {
    "--threshold": (-0.1, 1.1, "nan"),
    "--tile": (-1, 16, 192, 300, 511),
    "--mirror": (-1, 8, 33, 112),
}
PREDICTING |= {name: OUT_OF_RANGE[name] for name in ("--device", "--cpu_kernels")}


@pytest.mark.parametrize("parse, flags", [("train", OUT_OF_RANGE), ("predict", PREDICTING)])
def test_every_flag_has_its_range(parse, flags, monkeypatch):
    """Every value that makes no sense is refused by the name of its flag, before any work."""
    for flag, values in flags.items():
        for value in values:
            monkeypatch.setattr(sys, "argv", ["x", f"{flag}={value}"])
            with pytest.raises(InputError, match=flag) as error:
                engine.parse_args("") if parse == "train" else predict_unet_test.parse_args()
                pytest.fail(f"{flag} {value} was taken")
            assert "\n" not in str(error.value)


def test_a_checkpoint_decides_little(slices, tmp_path):
    """Resuming takes hyperparameters from the file, never paths or other flags."""
    paths = {"--val_path": slices, "--checkpoint_dir": "mine", "--log_file": "mine.txt"}
    train("--epochs", 1, *(word for pair in paths.items() for word in pair), cwd=tmp_path)
    last = tmp_path / "mine/last.safetensors"
    for left_out in paths:  # or it would go on with other data, or into another run's files
        rest = (word for pair in paths.items() if pair[0] != left_out for word in pair)
        flags = ("--device", "cpu", "--resume", last, "--epochs", 2, *rest)
        done = script("TrainUnetDataSet.py", *flags, cwd=tmp_path)
        assert done.returncode == 2 and one_line(done.stderr) and left_out in done.stderr

    tensors, metadata = tensors_of(last), metadata_of(last)
    del metadata["checksum"]
    hostile = {"augment": ["--log_file=stolen.txt", "flip"], "seed": "1 --checkpoint_dir=stolen"}
    for name, value in hostile.items():
        arguments = {**metadata["arguments"], "val_path": None, name: value}
        arguments |= {"checkpoint_dir": "stolen", "log_file": "stolen.txt"}
        evil = {**metadata, "arguments": arguments}
        engine.write_checkpoint(tmp_path / "evil.safetensors", tensors, evil)
        flags = ("--resume", "evil.safetensors", "--epochs", 2, "--device", "cpu")
        flags += ("--checkpoint_dir", "mine", "--log_file", "mine.txt")
        done = script("TrainUnetDataSet.py", *flags, cwd=tmp_path)
        assert done.returncode == (0 if name == "augment" else 2), done.stderr
    assert not list(tmp_path.glob("stolen*"))


def test_slices_of_different_sizes(tmp_path):
    """They train one by one or cropped; in a batch they are refused with advice."""
    write_pairs(tmp_path / "data", 2)
    write_pairs(tmp_path / "more", 2, shape=(64, 80), seed=1)
    for kind in ("image", "label"):
        for i in range(2):
            path = tmp_path / f"more/train_{kind}/{i}.png"
            path.rename(tmp_path / f"data/train_{kind}/{i + 2}.png")
    train("--epochs", 1, cwd=tmp_path)
    train("--epochs", 1, "--batch_size", 1, "--crop", 0, cwd=tmp_path)
    done = script("TrainUnetDataSet.py", *SMALL, "--batch_size", 2, "--crop", 0, cwd=tmp_path)
    assert done.returncode == 2 and one_line(done.stderr) and "--crop" in done.stderr
