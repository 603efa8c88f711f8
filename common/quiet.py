"""Imports OneFlow without its noise, and leaves Ctrl-C and the environment as they were."""

import ctypes
import faulthandler
import os
import signal
import sys

from common import start

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_MODULE_LOADING")


def import_oneflow(ranks):
    """Import OneFlow, in any thread; ranks: as one of a launcher's processes, else alone, whatever WORLD_SIZE says."""
    if ranks:
        start.join()
    libc, handler = ctypes.CDLL(None), ctypes.create_string_buffer(512)  # more than a struct sigaction
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    # OneFlow gives SIGINT a C handler with which Ctrl-C is a segmentation fault. Keep Ctrl-C waiting until it is gone,
    # in the threads of NumPy and OneFlow too, which begin here and inherit what is blocked.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    libc.sigaction(signal.SIGINT, None, handler)
    try:
        for name in () if ranks else VARIABLES[:-1]:
            os.environ.pop(name, None)
        from common.images import quiet_stderr  # here, since it brings NumPy's threads

        with quiet_stderr():
            import oneflow  # noqa: F401
    except ImportError as error:
        sys.exit(f"OneFlow can't be imported ({error}): run `source env.sh` first")
    finally:
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(environment)
        libc.sigaction(signal.SIGINT, handler, None)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


if "oneflow" not in sys.modules:
    import_oneflow(ranks="common.ranks" in sys.modules)
    faulthandler.cancel_dump_traceback_later()  # from here on, until start.got_further(), it waits for no other rank
