"""The plan of the house: sizes, directions of imports, and that importing changes nothing.

python3 -m pytest tests/test_house.py
"""

import ast
import difflib
import os
import signal
import subprocess
import sys

from conftest import ROOT, python

import pytest

SHELL = ("env.sh", "train.sh", "test.sh")
FOLDERS = (".", "common", "cpu_kernels", "data")
PYTHON = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in PYTHON]
SCRIPTS = ("TrainUnetDataSet", "ddp_train", "graph_train", "predict_unet_test", "evaluate", "plot", "data")
WITHOUT_ONEFLOW = [f"common.{name}" for name in ("images", "scores", "pictures", "log", "arguments", "files", "start")]
WITHOUT_ONEFLOW += ["evaluate", "plot", "dataloader"]


def lines_of(name):
    return (ROOT / name).read_text().splitlines()


def test_the_house_stays_small():
    """No file over 300 lines, no function over 50, 3,000 lines of Python in all, scripts of 50 lines."""
    sizes = {name: len(lines_of(name)) for name in (*NAMES, *SHELL)}
    folders = ("tests", "benchmarks")
    others = [str(path.relative_to(ROOT)) for folder in folders for path in ROOT.glob(f"{folder}/*.[ps][yh]")]
    assert [name for name in (*sizes, *others) if len(lines_of(name)) > 300] == []
    assert sum(sizes[name] for name in NAMES) <= 3000, sizes
    assert sizes["TrainUnetDataSet.py"] <= 50 and sizes["ddp_train.py"] <= 50
    long = {}
    for name in NAMES:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 50:
                long[f"{name}: {node.name}"] = node.end_lineno - node.lineno + 1
    assert long == {}


@pytest.mark.parametrize("twin, most", [("ddp_train.py", 24), ("graph_train.py", 45)])
def test_the_twins_differ_little(twin, most):
    """In so many lines, their docstrings included; the loops are there to be read in each."""
    diff = difflib.unified_diff(lines_of("TrainUnetDataSet.py"), lines_of(twin), n=0, lineterm="")
    changed = [line for line in diff if line[0] in "+-" and not line.startswith(("+++", "---"))]
    assert len(changed) <= most, "\n".join(changed)
    text = (ROOT / twin).read_text()
    for loop in ("for epoch in range(", "for image, label, weight in ", "losses.mean().backward()", "def main(args):"):
        assert text.count(loop) == 1, loop


def imports_of(path):
    """The names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_imports_go_one_way():
    """common and cpu_kernels import no script and no data set."""
    for path in PYTHON:
        first = {name.split(".")[0] for name in imports_of(path)}
        place = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if place in ("common", "cpu_kernels"):
            assert first.isdisjoint({*SCRIPTS, "dataloader"}), path
        elif place == "unet":
            assert first.isdisjoint({*SCRIPTS, "dataloader", "cpu_kernels"}), path
        elif place == "dataloader":
            assert first.isdisjoint({*SCRIPTS, "unet", "cpu_kernels"}), path


# Imports the modules in a thread, since notebooks and viewers may, and says what is not as before.
EFFECTS = """
import importlib, os, signal, sys, threading

signals = [signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM]
libc = __import__("ctypes").CDLL(None)
def state():
    handlers = []
    for number in signals:
        action = (__import__("ctypes").c_char * 512)()
        libc.sigaction(number, None, action)
        handlers.append((signal.getsignal(number), bytes(action)[:8]))
    children = [line for line in open("/proc/self/status") if line.startswith(("PPid", "SigBlk"))]
    children += [os.popen(f"pgrep -P {os.getpid()} python").read()]
    ports = [line.split()[1] for line in open("/proc/self/net/tcp") if line.split()[3] == "0A"]
    others = ("LD_LIBRARY_PATH", "ONEFLOW_")  # of cv2 and of OneFlow
    variables = {name: text for name, text in os.environ.items() if not name.startswith(others)}
    return handlers, variables, children, ports, os.getcwd(), os.fstat(2).st_ino, copies()
def copies():  # of descriptor 2
    open_ones = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [one for one in open_ones if os.path.exists(one) and os.path.samefile(one, "/proc/self/fd/2")]
def work():
    for name in sys.argv[1].split():
        importlib.import_module(name)
before = state()
thread = threading.Thread(target=work)
thread.start()
thread.join()
after = state()
for one, two in zip(before, after):
    if one != two:
        one, two = (set(x.items() if isinstance(x, dict) else x) for x in (one, two))
        print("not as before:", one ^ two)
for name in sys.argv[2:]:
    if name in sys.modules:
        print("imported:", name)
try:
    os.kill(os.getpid(), signal.SIGINT)
    import time; time.sleep(1)
except KeyboardInterrupt:
    print("Ctrl-C is the caller's")
"""


@pytest.mark.parametrize("names", ["TrainUnetDataSet ddp_train graph_train", "predict_unet_test", WITHOUT_ONEFLOW])
def test_importing_changes_nothing(names, tmp_path):
    """No signal handler, no process, no variable; Ctrl-C stays the caller's; OneFlow only where it is needed.

    Under a launcher, or in a pod that sets WORLD_SIZE, what isn't ddp_train.py is alone.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if names == "predict_unet_test":
        env |= {"WORLD_SIZE": "2", "RANK": "0"}
    light = isinstance(names, list)
    command = [sys.executable, "-c", EFFECTS, " ".join(names) if light else names, *["oneflow"] * light]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("Ctrl-C is the caller's\n", "", 0)


def test_a_python_without_the_packages(tmp_path):
    """Each script says in one line what to do where its packages are missing."""
    for name in NAMES:
        if not name.startswith("common/") and 'if __name__ == "__main__":' in (ROOT / name).read_text():
            done = subprocess.run(
                [sys.executable, "-S", "-E", ROOT / name], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 1 and done.stderr.count("\n") == 1, (name, done.stderr)
            assert "source env.sh" in done.stderr, name


def test_ctrl_c_while_a_script_begins(tmp_path):
    """Until a script has its own answer, Ctrl-C ends it by the signal and without a traceback."""
    program = "import sys\nsys.modules['__main__'].__file__ = sys.argv[1]\nimport common, os\nos.kill(os.getpid(), 2)"
    done = python(program, ROOT / "plot.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
