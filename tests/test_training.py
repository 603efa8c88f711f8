"""Training, in this process: python3 -m pytest tests/test_training.py"""

import os
import re
import subprocess
import sys

from common import begin, checkpoint, epoch, scores, start
from common.arguments import InputError
from conftest import BEST, LAST, ROOT, metadata_of, resume, rows_of, tensors_of, train, write_pairs
from dataloader import SelfDataSet
from unet import UNet

import numpy as np
import oneflow as flow
import pytest


def test_a_run_trains_logs_and_saves(slices, tmp_path):
    """Loss falls; the line, the log, the CSV and the checkpoints are as the README says."""
    done = train("--epochs", 6, "--val_count", 2, "--lr", 0.003, "--batch_size", 1, cwd=tmp_path)
    begun = r"device: cpu, 1 process, \w+ precision\n4 training slices, 2 validation slices\nepoch: 1 "
    assert re.match(begun, done.stdout)
    lines = re.findall(r"^epoch: (\d+) avg loss: (\d+\.\d{6}) time: \d+ s", done.stdout, re.M)
    assert [int(number) for number, _ in lines] == [1, 2, 3, 4, 5, 6]
    losses = [float(loss) for _, loss in lines]
    assert losses[-1] < 0.8 * losses[0]

    lines = (tmp_path / "Unet_train.txt").read_text().splitlines()
    assert all(re.fullmatch(r"\d+\.\d{4}", line) for line in lines)
    np.testing.assert_allclose([float(line) for line in lines], losses, atol=5.1e-5)
    rows = rows_of(tmp_path / "Unet_train.csv")
    assert [float(row["train_loss"]) for row in rows] == losses
    assert all(0 < float(row["val_misclassification"]) < 1 for row in rows)
    cosine = [0.0015 * (1 + np.cos(np.pi * i / 6)) for i in range(1, 7)]
    np.testing.assert_allclose([float(row["lr"]) for row in rows], cosine, rtol=1e-4, atol=1e-12)
    assert all(0 < float(row["val_v_rand"]) <= 1 for row in rows)

    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best.safetensors", "last.safetensors"]
    last, best = metadata_of(tmp_path / LAST), metadata_of(tmp_path / BEST)
    assert last["epoch"] == 7 and last["threshold"] == last["best"]["threshold"]
    assert last["model"] == dict(n_channels=1, n_classes=1, bilinear=False, base_channels=4)
    assert (last["optimizer"]["name"], last["optimizer"]["state"]["step"]) == ("Adam", 24)
    assert last["arguments"]["crop"] == 48  # what the user left open was found out
    val_losses = [float(row["val_loss"]) for row in rows]
    assert best["best"]["by"] == "val_loss"
    assert best["best"]["epoch"] == best["epoch"] - 1 == 1 + np.argmin(val_losses)
    assert best["threshold"] == float(rows[np.argmin(val_losses)]["val_threshold"])
    names = tensors_of(tmp_path / LAST)
    assert {"inc.double_conv.0.weight", "optimizer.exp_avg.inc.double_conv.0.weight"} < set(names)


def test_validation_is_the_nets_own_score(slices, tmp_path):
    """val_loss, val_misclassification and val_threshold are those of the saved net in eval mode, from scratch."""
    train("--epochs", 2, "--val_count", 2, "--amp", "off", cwd=tmp_path)
    net, _ = checkpoint.load_net(tmp_path / LAST)
    net.eval()
    losses, errors, pairs = [], [], []
    for image, label in SelfDataSet(slices, keep=slice(-2, None)):
        with flow.no_grad():
            logit = net(flow.tensor(image[None])).numpy()[0].astype(np.float64)
        losses.append(np.mean(np.log1p(np.exp(-np.where(label == 1, logit, -logit)))))
        errors.append(np.mean((logit > 0) != (label == 1)))
        pairs.append((1 / (1 + np.exp(-logit[0])), label[0] == 1))
    thresholds = scores.THRESHOLDS[1:-1]
    found = scores.combine(scores.count(*pair, thresholds) for pair in pairs)
    row = rows_of(tmp_path / "Unet_train.csv")[-1]
    assert float(row["val_loss"]) == pytest.approx(np.mean(losses), abs=2e-6)
    assert float(row["val_misclassification"]) == pytest.approx(np.mean(errors), abs=1e-6)
    v_rand, threshold = scores.best(found, "v_rand", thresholds)  # as evaluate.py chooses it
    assert (float(row["val_v_rand"]), float(row["val_threshold"])) == pytest.approx((v_rand, threshold), abs=1e-6)


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


def test_a_log_stays_until_an_epoch_is_done(slices, tmp_path, monkeypatch):
    """A run that is refused, or ends in its first epoch, leaves the log and the checkpoints of the one before."""
    train("--epochs", 2, cwd=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(epoch.Run, "count", interrupted)
    for flags in ((), ("--resume", LAST, "--epochs", "3")):
        with pytest.raises(KeyboardInterrupt):
            train(*flags, cwd=tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"launch ddp_train\.py"):
        train(cwd=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("shared", ["checkpoints", "Unet_train.txt", "Unet_train.csv"])
def test_one_run_a_file(shared, slices, tmp_path):
    """A second run that would write the same checkpoints, log or table is refused while the first one runs."""
    (tmp_path / "checkpoints").mkdir()
    program = f"from common.files import lock\nlock({shared!r})\nprint('locked', flush=True)\ninput()"
    other = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **other
    ) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"^{shared}: another run writes there"):
            train("--epochs", 1, cwd=tmp_path)
        assert not list(tmp_path.glob("checkpoints/*")) and not list(tmp_path.glob("Unet*"))
        process.kill()
    train("--epochs", 1, cwd=tmp_path)  # a lock ends with its process


def test_border_weights_reach_the_loss(slices, tmp_path):
    """The first epoch's loss of one step is the weighted mean of the untrained net's losses."""
    flags = ("--batch_size", 6, "--epochs", 1, "--augment", "--crop", 0, "--seed", 3, "--amp", "off")
    train(*flags, "--border_weight", 30, "--dropout", 0, cwd=tmp_path)
    begin.seed_everything(3)
    net = UNet(1, 1, bilinear=False, base_channels=4)
    image, label, weight = map(np.stack, zip(*SelfDataSet(slices, border_weight=30), strict=True))
    with flow.no_grad():
        logits = net(flow.tensor(image)).numpy().astype(np.float64)
    losses = np.log1p(np.exp(-np.where(label == 1, logits, -logits)))
    (row,) = rows_of(tmp_path / "Unet_train.csv")
    assert float(row["train_loss"]) == pytest.approx((losses * weight).mean(), abs=1e-5)
    assert abs(losses.mean() - (losses * weight).mean()) > 1e-3


def test_dropout_reaches_the_net(slices, tmp_path, monkeypatch):
    """By default, not with 0; ranks draw their own, but the same order of slices; resuming takes it over."""
    losses = {}
    for name, flags in (("default", ()), ("same", ("--dropout", 0.5)), ("none", ("--dropout", 0))):
        train("--data_path", slices, "--epochs", 1, *flags, cwd=tmp_path / name)
        losses[name] = rows_of(tmp_path / name / "Unet_train.csv")[0]["train_loss"]
    assert losses["default"] == losses["same"] != losses["none"]
    again = ("--data_path", slices, "--epochs", 2)
    assert "dropout" not in resume(*again, cwd=tmp_path / "none").stdout
    assert "trained: dropout 0.0 -> 0.5\n" in resume(*again, "--dropout", 0.5, cwd=tmp_path / "none").stdout

    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(start, "rank", rank)
        begin.seed_everything(0, 1)
        drawn.append((flow.rand(9).numpy(), np.random.rand(9)))
    assert not np.array_equal(drawn[0][0], drawn[1][0])
    assert np.array_equal(drawn[0][1], drawn[1][1])


def test_more_epochs_go_on_along_the_longer_cosine(slices, tmp_path):
    """Resumed with a larger --epochs, the learning rate jumps to the new cosine; that is said."""
    train("--epochs", 2, cwd=tmp_path)
    done = resume("--epochs", 4, cwd=tmp_path)
    assert f"not as {LAST} was trained: epochs 2 -> 4\n" in done.stdout
    assert done.stdout.count("not as") == 1
    cosine = [0.0005 * (1 + np.cos(np.pi * share)) for share in (1 / 2, 2 / 2, 3 / 4, 4 / 4)]
    rates = [float(row["lr"]) for row in rows_of(tmp_path / "Unet_train.csv")]
    np.testing.assert_allclose(rates, cosine, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("count, lr", [(6, "1e30"), (1, "1e38"), (1, "1e20")])
def test_what_is_not_finite_stops(count, lr, tmp_path):
    """NaN or infinity ends the run with a message before it reaches a checkpoint.

    With one slice an epoch it shows only in the weights or in the validation after the step.
    """
    data = write_pairs(tmp_path / "data", count)
    with pytest.raises(FloatingPointError, match="smaller --lr"):
        train("--lr", lr, "--epochs", 4, "--val_path", data, cwd=tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        assert all(np.isfinite(tensor).all() for tensor in tensors_of(path).values())


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
    with pytest.raises(InputError, match="--crop"):
        train("--batch_size", 2, "--crop", 0, cwd=tmp_path)
<<<<<<< HEAD
=======


# ------------------------------------------------------------------------------- checkpoints

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
    net, optimizer = new()
    checkpoint.contents(net, optimizer)  # before any step, too
    steps(net, optimizer, 2)
    tensors, state = checkpoint.contents(net, optimizer)
    metadata = {"model": {}, "epoch": 2, "best": None, "rows": rows, "optimizer": state}
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
    paths = {"--val_path": slices, "--checkpoint_dir": "mine", "--log_file": "mine.txt"}
    train("--epochs", 1, *(word for pair in paths.items() for word in pair), cwd=tmp_path)
    last = tmp_path / "mine/last.safetensors"
    for left_out in paths:  # or it would go on with other data, or into another run's files
        rest = (word for pair in paths.items() if pair[0] != left_out for word in pair)
        with pytest.raises(InputError, match=left_out):
            train("--resume", last, "--epochs", 2, *rest, cwd=tmp_path, small=())

    tensors, metadata = tensors_of(last), metadata_of(last)
    hostile = {"augment": ["--log_file=stolen.txt", "flip"], "seed": "1 --checkpoint_dir=stolen"}
    for name, value in hostile.items():
        saved = {**metadata["arguments"], "val_path": None, name: value}
        saved |= {"checkpoint_dir": "stolen", "log_file": "stolen.txt"}
        checkpoint.write(tmp_path / "evil.safetensors", tensors, {**metadata, "arguments": saved})
        flags = ("--resume", "evil.safetensors", "--epochs", 2, "--device", "cpu")
        flags += ("--checkpoint_dir", "mine", "--log_file", "mine.txt")
        if name == "augment":
            train(*flags, cwd=tmp_path, small=())
        else:
            with pytest.raises(InputError, match="--seed"):
                train(*flags, cwd=tmp_path, small=())
    assert not list(tmp_path.glob("stolen*"))


def test_older_checkpoints_resume(slices, tmp_path):
    """One of before rows were kept, as the kernels in NumPy made them, goes on; without its optimizer it can't."""
    train("--data_path", slices, "--epochs", 1, cwd=tmp_path)
    path = tmp_path / "checkpoints/last.safetensors"
    net, optimizer, metadata = checkpoint.read(path)
    step = metadata.pop("optimizer")["state"]["step"]
    del metadata["rows"], metadata["arguments"]["slices"]
    metadata["arguments"]["amp"] = False  # of graph_train.py, a flag without a value
    checkpoint.write(path, net | optimizer, metadata | {"optimizer_step": step})
    checkpoint.write(tmp_path / "bare.safetensors", net, metadata | {"optimizer_step": step})
    train("--data_path", slices, "--epochs", 2, "--resume", path, cwd=tmp_path)
    assert checkpoint.read(path)[2]["optimizer"]["state"]["step"] == 2 * step
    train("--data_path", slices, "--epochs", 3, "--resume", path, cwd=tmp_path)
    assert [row["epoch"] for row in checkpoint.read(path)[2]["rows"]] == ["2", "3"]
    with pytest.raises(InputError, match="holds weights only"):
        train("--data_path", slices, "--epochs", 2, "--resume", "bare.safetensors", cwd=tmp_path)


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


# ------------------------------------------------------------------------------------- flags

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
    "--log_file": ("",),
}
PREDICTING = {"--threshold": (-0.1, 1.1, "nan"), "--tile": (-1, 16, 192, 300, 511), "--mirror": (-1, 8, 33, 112)}
PREDICTING |= {name: OUT_OF_RANGE[name] for name in ("--device", "--cpu_kernels")}


@pytest.mark.parametrize("parse, flags", [("train", OUT_OF_RANGE), ("predict", PREDICTING)])
def test_every_flag_has_its_range(parse, flags, monkeypatch):
    """Every value that makes no sense is refused by the name of its flag, before any work."""
    for flag, values in flags.items():
        for value in values:
            monkeypatch.setattr(sys, "argv", ["x", f"{flag}={value}"])
            with pytest.raises(InputError, match=flag) as error:
                arguments.parse_args("", AUGMENTATIONS) if parse == "train" else predict_unet_test.parse_args()
                pytest.fail(f"{flag} {value} was taken")
            assert "\n" not in str(error.value)


# -------------------------------------------------------------------------- how a script ends


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
        ("raise FloatingPointError('infinite')", 1, "-c: infinite\n"),
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
    command = [sys.executable, ROOT / "TrainUnetDataSet.py", *SMALL, "--epochs", "10000", "--num_workers", "2"]
    process = subprocess.Popen(
        command,
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
    assert f"--resume {LAST}" in errors
    done = metadata_of(tmp_path / LAST)["epoch"] - 1
    assert done >= 2 and f"epoch {done} " in errors
    assert done - len((tmp_path / "Unet_train.txt").read_text().splitlines()) in (0, 1)


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
>>>>>>> house
