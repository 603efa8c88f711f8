"""data/prepare.py: python3 -m pytest tests/test_prepare.py (needs no network)."""

import hashlib
import http.server
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

from common.arguments import InputError
from conftest import one_line, tree
from data import prepare as prepare_module

import cv2
import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "prepare.py"
STACKS = {"train-volume.tif": "train_image", "train-labels.tif": "train_label", "test-volume.tif": "test_image"}
# Runs the script after setting constants in it. With "kill" = n the process kills itself, as kill -9 would, at its n-th
# step that changes a file or folder.
DRIVER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from data import prepare
patches = json.loads(sys.argv[2])
steps = patches.pop("kill", None)
for name, value in patches.items():
    setattr(prepare, name, value)
def hook(event, args):
    global steps
    writes = event == "open" and args[1] in ("w", "wb")
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        steps -= 1
        if steps < 0:
            os.kill(os.getpid(), 9)
sys.argv[:3] = ["prepare.py"]
if steps is not None:
    sys.addaudithook(hook)
prepare.start.run(prepare.main)
"""


def command(*args, **patches):
    start = ["-c", DRIVER, SCRIPT.parents[1], json.dumps(patches)] if patches else [SCRIPT]
    return [sys.executable, *map(str, start), *map(str, args)]


def run(*args, preexec_fn=None, **patches):
    return subprocess.run(command(*args, **patches), capture_output=True, text=True, timeout=60, preexec_fn=preexec_fn)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The challenge's archive with small slices, as a folder and as a zip, and its digests."""
    base = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    stacks = {name: rng.integers(0, 256, (2, 48, 64), np.uint8) for name in STACKS}
    (base / "folder").mkdir()
    for name, stack in stacks.items():
        assert cv2.imwritemulti(str(base / "folder" / name), list(stack))
    with zipfile.ZipFile(base / "tiny.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in STACKS:
            archive.write(base / "folder" / name, f"ISBI/{name}")
            archive.writestr(f"__MACOSX/ISBI/{name}", b"not this one")
    digests = {name: (STACKS[name], hashlib.sha256(stack.tobytes()).hexdigest()) for name, stack in stacks.items()}
    return base, stacks, digests


@pytest.fixture(scope="module")
def server(tiny):
    """A web server on 127.0.0.1: /tiny.zip is whole, /short.zip breaks off, /hang never answers."""
    body = (tiny[0] / "tiny.zip").read_bytes()
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/hang":
                over.wait()
            elif self.path in ("/tiny.zip", "/short.zip"):
                self.send_response(200)
                missing = 1000 if self.path == "/short.zip" else 0
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) - missing])
            else:
                self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        over.set()
        httpd.shutdown()


@pytest.fixture
def prepare(tiny, monkeypatch):
    """The script as a module that takes the tiny archive for ISBI 2012."""
    monkeypatch.setattr(prepare_module, "STACKS", tiny[2])
    return prepare_module


@pytest.fixture
def out(tmp_path):
    """A data folder with an old sample, reduced to one slice each, and a file of the user's."""
    out = tmp_path / "data"
    for name in ("train_image", "train_label", "test_image", "test_label"):
        (out / name).mkdir(parents=True)
        (out / name / "0.png").write_bytes(b"old")
    (out / "source.txt").write_text("synthetic sample\n")
    (out / "notes.txt").write_text("mine\n")
    return out


def assert_isbi(out, stacks):
    names = {"train_image", "train_label", "test_image", "source.txt"}
    assert {p.name for p in out.iterdir()} == names | {"notes.txt"}
    assert (out / "source.txt").read_text() == "isbi2012\n"
    for name, folder in STACKS.items():
        assert len(list((out / folder).iterdir())) == len(stacks[name])
        for i, image in enumerate(stacks[name]):
            written = cv2.imread(str(out / folder / f"{i}.png"), cv2.IMREAD_UNCHANGED)
            np.testing.assert_array_equal(written, image)


@pytest.mark.parametrize("kind", ["url", "tiny.zip", "folder"])
def test_isbi_from_any_source(kind, tiny, server, out):
    """`prepare.py isbi` takes a URL, a zip or a folder, and takes the place of the sample."""
    base, stacks, digests = tiny
    source = f"{server}/tiny.zip" if kind == "url" else base / kind
    done = run("isbi", "--source", source, "--out", out, STACKS=digests)
    assert (done.returncode, done.stderr) == (0, "")
    assert "non-commercial" in done.stdout
    assert "10.1371/journal.pbio.1000502" in done.stdout
    assert "10.3389/fnana.2015.00142" in done.stdout
    assert_isbi(out, stacks)


FAILURES = {
    "not found": ("{server}/nothing.zip", "404"),
    "connection refused": ("http://127.0.0.1:1/x.zip", "refused"),
    "body breaks off": ("{server}/short.zip", "zip file"),
    "server never answers": ("{server}/hang", "timed out"),
    "zip breaks off": ("{tmp}/half.zip", "zip file"),
    "zip damaged inside": ("{tmp}/damaged.zip", "decompressing"),
    "other pixels": ("{tmp}/other.zip", "train-labels.tif"),
    "stack missing": ("{tmp}/missing", "test-volume.tif"),
    "not a TIFF": ("{tmp}/html", "train-volume.tif"),
    "TIFF damaged": ("{tmp}/damaged", "train-volume.tif"),
    "no such file": ("{tmp}/nowhere.zip", "No such file"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_isbi_failure_is_one_line_and_changes_nothing(failure, tiny, server, out, tmp_path):
    """Any failed `prepare.py isbi` says in one line what to do and leaves the data as it was."""
    base, _, digests = tiny
    body = (base / "tiny.zip").read_bytes()
    (tmp_path / "half.zip").write_bytes(body[: len(body) // 2])
    data = 30 + len("ISBI/train-volume.tif")  # where the first member's compressed data begin
    (tmp_path / "damaged.zip").write_bytes(body[:data] + b"\xff" + body[data + 1 :])
    (tmp_path / "other.zip").write_bytes(body)
    if failure == "other pixels":
        digests = {**digests, "train-labels.tif": ("train_label", "0" * 64)}
    for name in ("missing", "html", "damaged"):
        shutil.copytree(base / "folder", tmp_path / name)
    (tmp_path / "missing" / "test-volume.tif").unlink()
    (tmp_path / "html" / "train-volume.tif").write_text("<html>Please log in</html>")
    tiff = bytearray((base / "folder" / "train-volume.tif").read_bytes())
    tiff[int.from_bytes(tiff[4:8], "little") + 42] = 255  # bits per pixel; OpenCV logs an error
    (tmp_path / "damaged" / "train-volume.tif").write_bytes(tiff)

    source, said = FAILURES[failure]
    source = source.format(server=server, tmp=tmp_path)
    before = tree(tmp_path)
    done = run("isbi", "--source", source, "--out", out, STACKS=digests, TIMEOUT=1)
    assert done.returncode == 2
    assert one_line(done.stderr), done.stderr
    assert source in done.stderr and said in done.stderr and "--source FILE" in done.stderr
    assert tree(tmp_path) == before


def test_full_disk_changes_nothing(tiny, out, tmp_path):
    """When the disk is full, one line says so, and neither data nor temporary files are left."""
    base, _, digests = tiny
    before = tree(tmp_path)
    for source, target in (
        (base / "tiny.zip", out),
        (base / "tiny.zip", tmp_path / "new"),
        # where nothing can be written, nothing is downloaded
        ("http://127.0.0.1:1/x", tmp_path / "data" / "notes.txt" / "below a file"),
        ("http://127.0.0.1:1/x", tmp_path / "no" / "folder"),
    ):
        done = run(
            *("isbi", "--source", source, "--out", target),
            STACKS=digests,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
        )
        assert done.returncode == 2
        assert one_line(done.stderr) and f"cannot write {target}" in done.stderr, done.stderr
        assert tree(tmp_path) == before


@pytest.mark.parametrize("error, raised", [(OSError("no"), InputError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_failed_swap_is_swapped_back(error, raised, prepare, tiny, out, monkeypatch):
    """The old data come back when any rename fails or is interrupted."""
    rename = os.rename
    before = tree(out)
    for fail_at in range(9):  # five old names leave, four new ones come
        calls = iter(range(100))

        def failing(here, there, calls=calls, fail_at=fail_at):
            if next(calls) == fail_at:
                raise error
            rename(here, there)

        monkeypatch.setattr(prepare.os, "rename", failing)
        with pytest.raises(raised):
            prepare.main(["isbi", "--source", str(tiny[0] / "folder"), "--out", str(out)])
        assert tree(out) == before
    assert next(calls) > 9  # the last one was reached


def test_killed_anywhere_a_rerun_repairs(prepare, tiny, out, tmp_path):
    """After kill -9 at any step the data are whole or missing, and a rerun repairs them."""
    base, stacks, digests = tiny
    old = tree(out)
    for step in range(100):
        data = tmp_path / f"data{step}"
        shutil.copytree(out, data)
        args = ["isbi", "--source", str(base / "folder"), "--out", str(data)]
        killed = run(*args, STACKS=digests, kill=step)
        if (data / "train_image").exists():  # what train.sh looks at
            assert (data / "source.txt").exists()
            left = {k: v for k, v in tree(data).items() if not k.startswith(".preparing")}
            if left != old:
                assert (data / "source.txt").read_text() == "isbi2012\n"
                assert len(left) == 3 * 3 + 2
        prepare.main(args)
        assert_isbi(data, stacks)
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL
    assert step > 20


def test_interrupt(server, out):
    """Ctrl-C during the download: one line, exit code 130, the data as they were."""
    before = tree(out)
    args = command("isbi", "--source", f"{server}/hang", "--out", out)
    # A shell that runs pytest in the background makes it, and so its children, ignore SIGINT.
    process = subprocess.Popen(
        args,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdout.readline()  # the terms are printed before the download begins
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "\ninterrupted: run it again to prepare the data\n"
    assert process.returncode == 130
    assert tree(out) == before


def test_one_run_at_a_time(prepare, tiny, out):
    """What a killed run left is removed; while another one writes there, nothing is touched."""
    (out / ".preparing").mkdir()
    (out / ".preparing/left").touch()
    prepare.main(["isbi", "--source", str(tiny[0] / "folder"), "--out", str(out)])
    assert not list(out.glob(".*"))
    before = tree(out)
    done = run("isbi", "--source", tiny[0] / "folder", "--out", out, STACKS=tiny[2])  # this process holds the lock
    assert done.returncode == 2 and one_line(done.stderr) and str(out) in done.stderr
    assert tree(out) == before
