"""Training over two hosts: python3 -m pytest tests/test_hosts.py

Two network namespaces joined by a virtual cable stand for the hosts. That takes Linux's user
namespaces and iproute2; where one is missing the tests are skipped.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

from common import checkpoint
from conftest import LAST, ROOT, SMALL, assert_same_checkpoint, launch, metadata_of, python, tensors_of
from test_ddp import DRIVER

import numpy as np
import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Host:
    """A network namespace of its own, with an address, until it is closed."""

    def __init__(self, address, inside=None):
        words = ["unshare", "--net"] if inside else ["unshare", "--user", "--map-root-user", "--net"]
        words += ["sh", "-c", "echo ready; exec sleep 900"]
        enter = inside.enter if inside else []
        self.holder = subprocess.Popen([*enter, *words], stdout=subprocess.PIPE, text=True)
        if self.holder.stdout.readline() != "ready\n":
            pytest.skip("no user and network namespaces here, so no two hosts")
        self.enter = ["nsenter", "--target", str(self.holder.pid), "--user", "--net"]
        self.enter += ["--preserve-credentials", "--"]
        self.address, self.job = address, None

    def run(self, *words):
        subprocess.run([*self.enter, *map(str, words)], check=True)

    def train(self, rank, processes, folder, *flags, path=ROOT / "ddp_train.py"):
        """Start this host's share of a training, as the README says, in the folder."""
        command = [sys.executable, "-m", "oneflow.distributed.launch", "--nnodes", 2]
        command += ["--node_rank", rank, "--nproc_per_node", processes]
        command += ["--master_addr", ADDRESSES[0], "--master_port", 29500]
        command += [path, *SMALL, *flags]
        folder.mkdir(exist_ok=True)
        self.output = folder / "output.txt"
        with self.output.open("w") as output:
            self.job = subprocess.Popen(
                [*self.enter, *map(str, command)],
                cwd=folder,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},  # as the launcher of several sets
                start_new_session=True,
            )

    def kill(self):
        """End all processes of the job at once, without a word."""
        if self.job and self.job.poll() is None:
            os.killpg(self.job.pid, signal.SIGKILL)
            self.job.wait()


@pytest.fixture
def hosts():
    """Two hosts with a cable between them."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("no unshare, nsenter or ip here, so no two hosts")
    made = []
    try:
        made.append(Host(ADDRESSES[0]))
        made.append(Host(ADDRESSES[1], inside=made[0]))
        peer = ("peer", "cable", "netns", made[1].holder.pid)
        made[0].run("ip", "link", "add", "cable", "type", "veth", *peer)
        for host in made:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "cable")
            for device in ("cable", "lo"):
                host.run("ip", "link", "set", device, "up")
        yield made
    finally:
        for host in made:
            host.kill()
            host.holder.kill()
            host.holder.wait()


def wait_for(host, text, seconds=90):
    until = time.monotonic() + seconds
    while text not in host.output.read_text():
        assert host.job.poll() is None and time.monotonic() < until, host.output.read_text()
        time.sleep(0.05)


def end_of(hosts, seconds=120):
    """The exit codes of both hosts' launchers."""
    until = time.monotonic() + seconds
    return [host.job.wait(max(until - time.monotonic(), 0.1)) for host in hosts]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_two_hosts_train_one_net(processes, hosts, slices, tmp_path):
    """2 hosts of 1 or 2 processes end with the bits of one host with as many in all.

    The second host may start first. Only the first one writes.
    """
    flags = ("--epochs", 2, "--data_path", slices, "--val_count", 1, "--batch_size", 1)
    folders = [tmp_path / f"host{rank}" for rank in range(2)]
    driver = tmp_path / "driver.py"  # each rank writes down its weights
    driver.write_text(f"WHAT, WHO = None, None\n{DRIVER}")
    hosts[1].train(1, processes, folders[1], *flags, path=driver)
    time.sleep(3)
    hosts[0].train(0, processes, folders[0], *flags, path=driver)
    assert end_of(hosts) == [0, 0], [host.output.read_text() for host in hosts]
    (tmp_path / "single").mkdir()
    done = launch(ROOT / "ddp_train.py", *flags, cwd=tmp_path / "single", processes=2 * processes)
    assert done.returncode == 0, done.stderr
    expected = tensors_of(tmp_path / "single" / LAST)
    assert_same_checkpoint(folders[0] / LAST, tmp_path / "single" / LAST)
    for rank in range(2 * processes):
        weights = np.load(folders[rank // processes] / f"rank{rank}-epoch2.npz")
        for name in set(weights.files) - {"sums"}:
            np.testing.assert_array_equal(weights[name], expected[name], err_msg=name)
    assert not (folders[1] / "checkpoints").exists()


def test_a_host_that_dies(hosts, slices, tmp_path):
    """The other host ends within a minute, its checkpoint is whole, and the pair resumes from it."""
    flags = ("--data_path", slices, "--batch_size", 1, "--schedule", "constant", "--epochs")
    folders = [tmp_path / f"host{rank}" for rank in range(2)]
    for rank, host in enumerate(hosts):
        host.train(rank, 1, folders[rank], *flags, 10_000)
    wait_for(hosts[0], "epoch: 2 ")
    hosts[1].kill()
    assert hosts[0].job.wait(60) == 1
    epochs = checkpoint.load_net(folders[0] / LAST)[1]["epoch"] - 1
    assert epochs >= 2
    for rank, host in enumerate(hosts):
        host.train(rank, 1, folders[rank], *flags, epochs + 1, "--resume", folders[0] / LAST)
    assert end_of(hosts) == [0, 0], [host.output.read_text() for host in hosts]
    assert metadata_of(folders[0] / LAST)["epoch"] == epochs + 2


def test_a_cable_that_is_cut(hosts, slices, tmp_path):
    """Both hosts end by themselves, after --rank_timeout, and say where they waited; the checkpoint is whole."""
    flags = ("--epochs", 10_000, "--data_path", slices, "--rank_timeout", 4)
    folders = [tmp_path / f"host{rank}" for rank in range(2)]
    for rank, host in enumerate(hosts):
        host.train(rank, 1, folders[rank], *flags)
    wait_for(hosts[0], "epoch: 1 ")
    hosts[0].run("ip", "link", "set", "cable", "down")
    assert end_of(hosts, 60) == [1, 1]
    for host in hosts:
        assert "Timeout (0:00:04)" in host.output.read_text()
    checkpoint.load_net(folders[0] / LAST)


def test_the_watchdog_is_heard_while_oneflow_begins(tmp_path):
    """Who waits for other ranks has descriptor 2 silenced meanwhile: the watchdog's word is seen all the same."""
    program = """
import os, time
os.environ |= {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
from common import start
from common.images import quiet_stderr
start.find_master = lambda *_: None
start.join()
with quiet_stderr():
    start.got_further(0.2)
    time.sleep(20)
"""
    done = python(program, cwd=tmp_path)
    assert done.returncode == 1 and "Timeout" in done.stderr
