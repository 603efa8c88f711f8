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
    assert last["epoch"] == 7 and all(last[key] == last["best"][key] for key in ("threshold", "grow"))
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
    _, grow = scores.best(found, "pixel_misclassification", thresholds)
    assert metadata_of(tmp_path / LAST)["best"]["grow"] == pytest.approx(grow)


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
    """The first epoch's loss of one step is the weighted mean of the untrained net's losses; masks are as for those."""
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
    masks = [metadata_of(tmp_path / BEST)]
    train("--epochs", 1, "--border_weight", 0, cwd=tmp_path)
    masks.append(metadata_of(tmp_path / BEST))
    assert [(mask["threshold"], mask["grow"]) for mask in masks] == [(0.6, 0.2), (0.5, 0.5)]


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
    with pytest.raises(SystemExit, match="smaller --lr"):
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
