"""Imports OneFlow, in any thread, without its noise, and leaves Ctrl-C and the environment as they were."""

import faulthandler
import os
import signal
import sys

from common import start

if "common.ranks" in sys.modules and start.several:
    start.join()
variables = (*start.VARIABLES, "CUDA_MODULE_LOADING")  # OneFlow sets them
environment = {name: os.environ[name] for name in variables if name in os.environ}
# OneFlow's own C handler makes Ctrl-C a segmentation fault: it waits until that is gone, for threads begun here too.
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
faulthandler.register(signal.SIGINT, file=2, chain=True)  # keeps the handler, which unregister() puts back
try:
    for name in start.VARIABLES if start.processes == 1 else ():  # alone, whatever WORLD_SIZE says
        os.environ.pop(name, None)
    from common.images import quiet_stderr  # here, since it brings NumPy's threads

    with quiet_stderr():
        import oneflow  # noqa: F401
except ImportError as error:
    sys.exit(f"OneFlow can't be imported ({error}): run `source env.sh` first")
finally:
    for name in variables:
        os.environ.pop(name, None)
    os.environ.update(environment)
    faulthandler.unregister(signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if start.patience:
        faulthandler.cancel_dump_traceback_later()  # until start.got_further(), this waits for no other rank
