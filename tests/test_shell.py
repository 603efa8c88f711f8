"""The shell scripts in a copy of the repository: python3 -m pytest tests/test_shell.py"""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, SMALL, interruptible, one_line, write_pairs

import pytest

# What a clone has: everything but data, environments and what running leaves behind.
PLACES = (".", "common", "cpu_kernels", "data", "checkpoints")
KEPT = ("*.py", "*.sh", "requirements.txt", "isbi2012.safetensors")
FILES = [file.relative_to(ROOT) for place in PLACES for kind in KEPT for file in (ROOT / place).glob(kind)]


@pytest.fixture
def copy(tmp_path):
    """A clone in a folder with a space in its name, sharing this environment."""
    folder = tmp_path / "my clone"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    for part in (Path(sys.prefix)).iterdir():
        (folder / ".venv" / part.name).symlink_to(part)
    ready = folder / ".venv/ready"  # whatever requirements.txt says today
    ready.unlink(missing_ok=True)
    ready.write_text(f"{hashlib.sha256((folder / 'requirements.txt').read_bytes()).hexdigest()}  -\n")
    return folder


def bash(*args, cwd, **options):
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    return subprocess.run(["bash", *map(str, args)], cwd=cwd, **options)


def test_train_then_test(copy):
    """train.sh makes the sample where ISBI can't be had, trains and draws; test.sh predicts."""
    # A proxy that refuses stands in for a machine without network.
    offline = {**os.environ, "https_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    done = bash(copy / "test.sh", "--cells", cwd=copy, env=offline)  # untrained: our weights
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC SAMPLE" in done.stdout and "isbi2012.safetensors" in done.stdout
    assert len(list((copy / "predict_image").glob("*_cells.png"))) == 5
    shutil.rmtree(copy / "predict_image")

    shutil.rmtree(copy / "data/train_image")  # now train.sh's turn
    flags = (*SMALL, "--epochs", "2", "--crop", "64", "--val_count", "2", "--log_file", "my log.txt")
    done = bash(copy / "train.sh", *flags, cwd=copy, env=offline)
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC SAMPLE" in done.stdout and "mean NOTHING for real tissue" in done.stdout
    assert "18 training slices, 2 validation slices" in done.stdout
    assert (copy / "my log.txt").read_text().count("\n") == 2
    assert (copy / "loss.png").stat().st_size > 10_000
    assert (copy / "data/source.txt").read_text() == "synthetic sample\n"

    done = bash(copy / "test.sh", "--threshold", "0.6", cwd=copy)
    assert done.returncode == 0, done.stderr
    assert "predict_image" in done.stdout and "checkpoints/best.safetensors" in done.stdout
    names = {f"{i}_{kind}.png" for i in range(5) for kind in ("prob", "mask", "overlay")}
    assert {path.name for path in (copy / "predict_image").iterdir()} == names


def test_interrupting_the_download_ends_it(copy):
    """Ctrl-C during the download of ISBI ends train.sh instead of training on the sample."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        proxy = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        env = {**os.environ, "https_proxy": proxy, "no_proxy": ""}
        process = interruptible(["bash", "train.sh", *SMALL], copy, env=env)
        with deaf.accept()[0]:  # it is downloading
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)
    assert "SYNTHETIC" not in output
    assert not (copy / "data/train_image").exists()


def test_paths_are_those_where_the_user_stands(copy, tmp_path):
    """From another folder: relative paths mean what they mean there, results land there, nothing is fetched or made.

    --help only helps; a plot that can't be drawn doesn't cost the training.
    """
    write_pairs(tmp_path / "data", 2)
    write_pairs(copy / "data", 3)  # not these
    (tmp_path / "loss.png").write_bytes(b"mine")
    before = set(copy.rglob("*.*"))
    flags = (*SMALL, "--epochs", "1", "--data_path", "data/train_image", "--log_file", "my log.txt")
    done = bash(copy / "train.sh", *flags, cwd=tmp_path)
    assert done.returncode == 0 and "2 training slices" in done.stdout, done.stderr
    assert "the training is done, only its loss is not drawn" in done.stderr
    assert (tmp_path / "my log.txt").read_text().count("\n") == 1
    done = bash(copy / "test.sh", "--Test_Data_path", "data/train_image", "--save_res_path", "out", cwd=tmp_path)
    assert done.returncode == 0 and "weights: checkpoints/best.safetensors" in done.stdout, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 6
    done = bash(copy / "train.sh", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--epochs" in done.stdout and "epoch: " not in done.stdout
    done = bash(copy / "train.sh", "--epochs", "0", "--data_path", "data/train_image", cwd=tmp_path)
    assert done.returncode == 2 and one_line(done.stderr)
    assert {path for path in copy.rglob("*.*") if path.suffix != ".pyc"} == before


def test_an_odd_machine(copy, tmp_path):
    """A read-only repository, no HOME, a notebook's backend, a number of threads that is none: train.sh works."""
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    if subprocess.run([*private, mount, copy, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    write_pairs(tmp_path / "data", 2)
    env = {name: text for name, text in os.environ.items() if name != "HOME"}
    env |= {"OMP_NUM_THREADS": "abc", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [*private, mount, copy, "bash", copy / "train.sh", *SMALL, "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "epoch: 1 " in done.stdout, done.stderr
    assert (tmp_path / "loss.png").exists() and "Traceback" not in done.stderr
    done = subprocess.run([*private, mount, copy, "bash", copy / "train.sh"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 2 and one_line(done.stderr) and "Read-only" in done.stderr


def test_a_ready_environment_is_quick(copy):
    """Sourcing env.sh again says nothing, makes nothing and leaves the shell's options alone."""
    done = bash("-c", 'source env.sh && echo "$- $(command -v python3)"', cwd=copy)
    assert done.stdout == f"hBc {copy}/.venv/bin/python3\n" and done.stderr == ""


def fake(folder, name, body):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bare(copy, tmp_path):
    """A copy without environment, on a machine whose only programs are coreutils and `bin`."""
    shutil.rmtree(copy / ".venv")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "flock", "grep", "ls", "mkdir", "mktemp", "rm", "sha256sum", "uname"):
        (tools / tool).symlink_to(shutil.which(tool))
    return {"cwd": copy, "env": {"PATH": str(tools), "HOME": str(tmp_path)}}, tools


def test_no_interpreter_is_one_clear_line(bare):
    """Without CPython 3.10, and with uv unable to fetch one, env.sh says what to install."""
    options, tools = bare
    fake(tools, "python3.10", "echo 'pyenv: python3.10: command not found' >&2; exit 127")  # a shim
    fake(tools, "python3", f'exec {sys.executable} -c "raise SystemExit(1)"')
    done = bash("-c", "source env.sh; echo $?", **options)
    assert done.stdout == "1\n"
    said = done.stderr.splitlines()
    assert said[-1].startswith("env.sh: can't find or fetch CPython 3.10: install it")
    assert not (options["cwd"] / ".venv").exists()


@pytest.mark.parametrize("place", ["pyenv", "uv python", "uv installs"])
def test_interpreters_are_found_off_the_path(place, bare, tmp_path):
    """pyenv's versions and uv's pythons are found, and uv installs one where there is none.

    The interpreter found records how it is called; a half-made environment is made anew.
    """
    options, tools = bare
    python = tmp_path / ".pyenv/versions/3.10.99/bin/python3.10"
    if place != "pyenv":
        python = tmp_path / "uv's/python3.10"
        installed = tmp_path / "installed"
        if place == "uv python":
            installed.touch()
        uv = f"""
            [ "$2" = install ] && : >"{installed}"
            [ -e "{installed}" ] && echo "{python}"
        """
        fake(tools, "uv", uv)
    python.parent.mkdir(parents=True)
    # It starts like a CPython 3.10, and says what it would have made.
    fake(python.parent, python.name, 'case $1 in -c) ;; --version) echo 3.10 ;; *) echo "$@" ;; esac')
    (options["cwd"] / ".venv").mkdir()
    (options["cwd"] / ".venv/half").touch()
    (options["cwd"] / ".venv/ready").touch()
    done = bash("-c", "source env.sh; echo $?", **options)
    assert f"making .venv with {python}" in done.stderr
    assert done.stdout == "-m venv .venv\n1\n"  # and as nothing was made, it fails
    assert "failed" in done.stderr.splitlines()[-1]
    assert ("asking uv for one" in done.stderr) == (place != "pyenv")
    assert (tmp_path / "installed").exists() == (place != "pyenv")
    assert not Path(options["cwd"] / ".venv/half").exists()


def test_a_notebooks_backend_is_no_matter(bare):
    """The environment is made in a notebook's cell too, whose MPLBACKEND matplotlib doesn't find there."""
    options, tools = bare
    for tool in ("chmod", "env"):
        (tools / tool).symlink_to(shutil.which(tool))
    made = r"""printf '#!/bin/bash\n[ "$1$MPLBACKEND" != -cmodule://x ]\n'"""
    make = f"mkdir -p .venv/bin && {made} >.venv/bin/python && chmod +x .venv/bin/python"
    fake(tools, "python3.10", f"case $1 in -c) ;; --version) echo 3.10 ;; *) {make} ;; esac")
    options["env"]["MPLBACKEND"] = "module://x"
    done = bash("-c", "source env.sh; echo $?", **options)
    assert done.stdout == "0\n" and (options["cwd"] / ".venv/ready").exists(), done.stderr


def test_an_environment_of_the_users_is_kept(bare):
    """A .venv that env.sh didn't make is left alone, in one line that says so; the shell goes on."""
    options, _ = bare
    (options["cwd"] / ".venv").mkdir()
    (options["cwd"] / ".venv/mine").touch()
    done = bash("-c", "set -u; unset HOME; source env.sh; echo $?", **options)
    assert done.stdout == "1\n" and one_line(done.stderr) and "was not made by this file" in done.stderr
    assert (options["cwd"] / ".venv/mine").exists()


def test_line_ends_survive_a_clone(tmp_path):
    """.gitattributes: a clone on Windows, where line ends are changed on the way out, keeps bash's."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in (".gitattributes", "train.sh"):
        shutil.copy(ROOT / name, repository / name)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    subprocess.run([*git, "-c", "core.autocrlf=true", "clone", "-q", repository, tmp_path / "clone"], check=True)
    assert (tmp_path / "clone/train.sh").read_bytes() == (ROOT / "train.sh").read_bytes()
