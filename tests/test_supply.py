"""What is installed and fetched: python3 -m pytest tests/test_supply.py"""

import re
import subprocess
import sys
from importlib.metadata import distributions

from conftest import ROOT, SMALL

import pytest
from packaging.requirements import Requirement


def in_one_line(name):
    """A file's text with the lines joined that a backslash parts."""
    return (ROOT / name).read_text().replace("\\\n", " ")


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def locked():
    """The lock's packages -> (version, number of hashes)."""
    found = {}
    for entry in in_one_line("requirements.txt").splitlines():
        if entry.strip() and not entry.lstrip().startswith("#"):
            name, number = re.match(r"([\w.-]+)==(\S+)", entry).groups()
            found[name] = number, len(re.findall(r"--hash=sha256:[0-9a-f]{64}", entry))
    return found


def test_the_lock_is_what_is_asked_for_and_installed():
    """requirements.txt fits requirements.in, pins all by hash, and pip is told to check them."""
    lock = locked()
    for line in (ROOT / "requirements.in").read_text().splitlines():
        if line and not line.startswith("#"):
            wanted = Requirement(line.split("#")[0].strip())
            assert wanted.specifier.contains(lock[wanted.name][0]), line
    assert all(hashes for _, hashes in lock.values())
    installed = {canonical(d.metadata["Name"]): d.version for d in distributions()}
    for name in ("pip", "setuptools"):  # of every environment
        installed.pop(name, None)
    assert installed == {canonical(name): number for name, (number, _) in lock.items()}
    assert re.search(r"^[^#]*pip install[^#]*--require-hashes", in_one_line("env.sh"), re.M)


def test_nothing_is_fetched_at_run_time(slices, tmp_path):
    """Training and predicting work where there is no network at all."""
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    for name, flags in (
        ("TrainUnetDataSet.py", (*SMALL, "--epochs", "1")),
        ("predict_unet_test.py", ("--Test_Data_path", slices)),
    ):
        command = [*alone, sys.executable, ROOT / name, *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "predict_image").iterdir())) == 18
