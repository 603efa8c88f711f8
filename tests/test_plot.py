"""The picture of the loss: python3 -m pytest tests/test_plot.py"""

import os

import plot
from conftest import one_line, script
from inside import run_inside

import cv2

CSV = """epoch,train_loss,val_loss,val_misclassification,lr,seconds,images_per_second
1,0.700000,0.650000,0.2,0.001,1,1
2,0.500000,0.420000,0.1,0.001,1,1
3,0.400000,0.480000,0.1,0.001,1,1
"""


def run(*args, cwd):
    return run_inside("plot.py", *args, cwd=cwd)


def test_reads_log_and_csv(tmp_path):
    """The plain log is enough; the CSV of the same run beside it adds the validation loss."""
    log, table = tmp_path / "Unet_train.txt", tmp_path / "Unet_train.csv"
    log.write_text("0.7000\n0.5000\n0.4000\n")
    assert plot.read_log(log) == {"training": [(1, 0.7), (2, 0.5), (3, 0.4)], "validation": []}
    for out in ("alone.png", "both.png", "other.png", "table.png"):
        done = run("Unet_train.csv" if out == "table.png" else log, "--out", out, cwd=tmp_path)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert done.stdout.startswith(f"{out}: 3 epochs of ")
        assert cv2.imread(str(tmp_path / out)).std() > 10
        # alone.png came without a CSV, both.png with one, other.png with another run's
        table.write_text(CSV if out == "alone.png" else CSV.replace("0.7", "0.6"))
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("alone", "both", "other")]
    assert pictures[0] == pictures[2] != pictures[1]
    validation = [(1, 0.65), (2, 0.42), (3, 0.48)]
    assert plot.read_log(table) == {"training": [(1, 0.6), (2, 0.5), (3, 0.4)], "validation": validation}
    # Resumed elsewhere, and validated only in part: the epochs are those of the CSV.
    table.write_text(CSV.replace("1,0.700000,0.650000,0.2,0.001,1,1\n", "").replace("0.420000", ""))
    assert plot.read_log(table) == {"training": [(2, 0.5), (3, 0.4)], "validation": [(3, 0.48)]}


def test_bad_input_is_one_line(tmp_path):
    """A missing, empty or other file, an unwritable picture or one of another format: exit 2 and one line."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "prose.txt").write_text("not a number\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "torn.csv").write_text(CSV + "4,")
    (tmp_path / "good.txt").write_text("0.5\n")
    cases = [(name,) for name in ("nothing.txt", "empty.txt", "prose.txt", "other.csv", "torn.csv")]
    (tmp_path / "folder.png").mkdir()
    for args in (*cases, ("good.txt", "--out", "folder.png"), ("good.txt", "--out", "new/loss.pdf")):
        done = (script if args == cases[0] else run_inside)("plot.py", *args, cwd=tmp_path)
        assert done.returncode == 2 and one_line(done.stderr), done.stderr
        assert args[-1] in done.stderr
    assert not (tmp_path / "new").exists()
    done = run(cwd=tmp_path)
    assert done.returncode == 2 and one_line(done.stderr)


def test_a_notebooks_environment(tmp_path):
    """A backend that isn't there, no home, a display that can't be reached: the picture is drawn."""
    (tmp_path / "log.txt").write_text("0.7\n0.6\n")
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "DISPLAY": ":97"}
    env = {k: v for k, v in os.environ.items() if k != "HOME"} | notebook
    done = script("plot.py", "log.txt", cwd=tmp_path, env=env)
    assert done.returncode == 0 and (tmp_path / "loss.png").stat().st_size > 10_000, done.stderr


def test_no_slice_is_replaced(tmp_path):
    """--out replaces an older picture of its own and nothing else."""
    (tmp_path / "log.txt").write_text("0.7\n0.6\n")
    for _ in range(2):
        assert run("log.txt", "--out", "own.png", cwd=tmp_path).returncode == 0
    cv2.imwrite(str(tmp_path / "0.png"), cv2.imread(str(tmp_path / "own.png")))
    before = (tmp_path / "0.png").read_bytes()
    done = run("log.txt", "--out", "0.png", cwd=tmp_path)
    assert done.returncode == 2 and "0.png: is no picture of plot.py's" in done.stderr
    assert (tmp_path / "0.png").read_bytes() == before
