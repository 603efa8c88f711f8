"""Imports OneFlow without its noise, and leaves Ctrl-C and the environment as they were."""

import ctypes
import os
import signal
import sys
from contextlib import contextmanager

from common import start

RANKS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def quiet_stderr():
    """Silence what C code prints to descriptor 2, past Python: OneFlow, libpng, libtiff."""
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def import_oneflow(ranks=False):
    """Import OneFlow, in any thread, with nothing changed afterwards but the modules that are there.

    ranks: as one of several processes, where a launcher started several; otherwise this process is alone, whatever a
    pod or a shell says in WORLD_SIZE.
    """
    if "oneflow" in sys.modules:
        return
    if ranks:
        start.join()
    libc, handler = ctypes.CDLL(None), ctypes.create_string_buffer(512)  # more than a struct sigaction
    environment = {name: os.environ.get(name) for name in (*RANKS, "CUDA_MODULE_LOADING")}
    # OneFlow gives SIGINT a C handler with which Ctrl-C is a segmentation fault. Keep Ctrl-C waiting until it is gone,
    # in the threads of NumPy and OneFlow too, which begin here and inherit what is blocked.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    libc.sigaction(signal.SIGINT, None, handler)
    try:
        for name in () if ranks else RANKS:
            os.environ.pop(name, None)
        with quiet_stderr():
            import oneflow  # noqa: F401
        start.got_further(alone=True)
    except ImportError as error:
        sys.exit(f"OneFlow can't be imported ({error}): run `source env.sh` first")
    finally:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        libc.sigaction(signal.SIGINT, handler, None)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


import_oneflow(ranks="common.ranks" in sys.modules)
