"""Changing one thing changes one file: python3 -m pytest tests/test_changing.py

Applies each change of docs/changing.md to a copy of the repository, then trains an epoch, resumes and predicts.
"""

import os
import re
import shutil
import subprocess
import sys

from common.arguments import InputError
from conftest import LAST, ROOT, metadata_of, rows_of, tensors_of, train

import pytest

TWINS = ("TrainUnetDataSet", "ddp_train", "graph_train")
EAGER = TWINS[:2]
PAGE = (ROOT / "docs/changing.md").read_text()
# Trains, resumes and predicts in one process: argv holds the script's name.
DRIVER = """
import importlib, os, sys
sys.path.insert(0, os.environ["COPY"])
twin = importlib.import_module(sys.argv[1])
import predict_unet_test
from common.arguments import parse_args
from common import files
flags = sys.argv[2:]
for more in (["--epochs", "1"], ["--epochs", "2", "--resume", "checkpoints/last.safetensors"]):
    twin.main(parse_args("", twin.AUGMENTATIONS, flags + more))
sys.argv[1:] = "--device cpu --checkpoint checkpoints/last.safetensors --Test_Data_path data/train_image".split()
predict_unet_test.main()
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of what is the product."""
    copied = tmp_path / "copy"
    copied.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copied)
    for name in ("common", "cpu_kernels"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copied


def change(copy, title, names):
    """Make the change of the page's section in each of the files: its diff, found by its lines."""
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S).group(1)
    (diff,) = re.findall(r"```diff\n(.*?)```", section, re.S)
    hunks = [hunk.splitlines() for hunk in re.split(r"^\.\.\.\n", diff, flags=re.M)]
    changed = [line for hunk in hunks for line in hunk if line[:1] in ("+", "-")]
    assert 0 < len(changed) <= 6
    for name in names:
        text = (copy / name).read_text()
        for hunk in hunks:
            old = "".join(line[1:] + "\n" for line in hunk if line[:1] != "+")
            new = "".join(line[1:] + "\n" for line in hunk if line[:1] != "-")
            # In a graph the same lines stand in build(), less deep.
            shallow = [re.sub(r"^    ", "", part, flags=re.M) for part in (old, new)]
            old, new = (old, new) if old in text else shallow
            assert text.count(old) == 1, f"{name}: {title}: {old}"
            text = text.replace(old, new)
        (copy / name).write_text(text)


def run(copy, twin, slices, *flags):
    """Train, resume and predict by the changed copy, in a folder of its own, which is returned."""
    folder = copy.parent / twin
    folder.mkdir(exist_ok=True)
    (folder / "data").symlink_to(slices.parent)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, twin, *SMALL, *map(str, flags)],
        cwd=folder,
        env={**os.environ, "COPY": str(copy)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((folder / "predict_image").glob("*_mask.png"))) == 6
    return folder


SMALL = ("--device", "cpu", "--repeat", "1", "--crop", "32", "--dropout", "0")
NARROW = ("--base_channels", 4)
CASES = {
    "Another optimizer: SGD with momentum": ([f"{twin}.py" for twin in TWINS], (TWINS[0], TWINS[2]), NARROW),
    "Another optimizer: AdamW": ([f"{twin}.py" for twin in TWINS], TWINS[1:2], NARROW),
    "Another loss: a Dice term": ([f"{twin}.py" for twin in TWINS], TWINS[2:], NARROW),
    "Another augmentation: negatives": (["dataloader.py"], TWINS[:1], (*NARROW, "--augment", "flip", "negative")),
    "Another column: the norm of the gradient": ([f"{twin}.py" for twin in EAGER], EAGER, NARROW),
    "Another default: 32 channels": (["common/arguments.py"], TWINS[:1], ()),
}


@pytest.mark.parametrize("title", CASES)
def test_a_change_is_a_few_lines_of_one_file(title, copy, slices, tmp_path):
    """The page's diff, at most 6 lines, is all that it takes; the same lines in each of the training scripts."""
    files, twins, flags = CASES[title]
    change(copy, title, files)
    for i, twin in enumerate(twins):  # the first with validation slices
        folder = run(copy, twin, slices, *flags, *("--val_count", 2) * (i == 0))
        rows, metadata = rows_of(folder / "Unet_train.csv"), metadata_of(folder / LAST)
        assert [row["epoch"] for row in rows] == ["1", "2"]
        if "optimizer" in title:
            assert metadata["optimizer"]["name"] == title.split()[2]
            resumed = ("--resume", folder / LAST, "--data_path", slices, "--val_count", 2 * (i == 0), "--epochs", 3)
            with pytest.raises(InputError, match=f"{LAST}: was trained with {title.split()[2]}, not with Adam,"):
                train(*resumed, cwd=tmp_path / f"unchanged{i}", small=("--device", "cpu"))
            kept = {name.split(".")[1] for name in tensors_of(folder / LAST) if name.startswith("optimizer.")}
            assert kept == ({"momentum_buf"} if "SGD" in title else {"exp_avg", "exp_avg_sq"})
        if "loss" in title or "augmentation" in title:  # the same run without the change has another loss
            same = [word for word in flags if word != "negative"]
            unchanged = ("--data_path", slices, "--val_count", 2, "--epochs", 1, *same)
            train(*unchanged, cwd=tmp_path / "plain", small=SMALL)
            plain = rows_of(tmp_path / "plain/Unet_train.csv")[0]["train_loss"]
            assert abs(float(rows[0]["train_loss"]) - float(plain)) > 0.01
        if "column" in title:
            assert all(float(row["gradient_norm"]) > 0 for row in rows)
        if "channels" in title:
            assert metadata["model"]["base_channels"] == 32


def test_the_page_has_an_example_for_each():
    """Every section with a diff is tried here."""
    titles = [title for title, rest in re.findall(r"^## (.*)\n((?:(?!^## ).*\n?)*)", PAGE, re.M) if "```diff" in rest]
    assert titles == list(CASES)
