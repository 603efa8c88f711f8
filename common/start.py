"""How a script runs and ends, `start.run(main)`: Ctrl-C, errors in one line, exit codes; how several meet."""

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing.queues import Queue
from pathlib import Path

from common.arguments import InputError
from common.files import unfinished

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")  # a launcher sets them, or a pod
LOST = "a process of --num_workers is gone: give it more memory or more of /dev/shm, or pass --num_workers 0"
several = os.environ.get("WORLD_SIZE") not in (None, "", "1")
rank, processes = 0, 1  # of this process, of how many; join() sets them
kept = "nothing was finished, nothing is kept"
main_process, stderr = os.getpid(), 2  # stderr: also while descriptor 2 is silenced
patience, port_names = None, []  # of several processes: the watchdog's seconds; what holds the job's port
libc = ctypes.CDLL(None)


def run(main):
    """Call `main()` and end without OneFlow's shutdown, it can hang: 0 done, 2 bad input, 130 interrupted, else 1."""
    global stderr
    stderr = os.dup(2)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, interrupt)
    if rank:  # what all ranks have to say, rank 0 says
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that aren't UTF-8
    if not os.path.exists("/dev/nvidia0"):  # OneFlow's own thread for operations would spin beside the kernels' threads
        os.environ.setdefault("ONEFLOW_VM_COMPUTE_ON_WORKER_THREAD", "0")
    # A DataLoader's worker that finds no room in /dev/shm would drop its batch, which is then waited for for ever.
    Queue._on_queue_feeder_error = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    sys.unraisablehook = lambda _: None  # a DataLoader that is half made when a worker dies has more to say than we
    try:
        with sys.stdout:  # what is printed can't be lost unnoticed: closing fails on a full disk, and with `| head`
            main()
        if processes > 1:  # leave together: one that is gone fails those that still compute
            sys.modules["oneflow"].comm.barrier()
            # OneFlow aborts when it finds the others gone, which is no fault now: let that thread wait, unheard.
            libc.signal(signal.SIGABRT, ctypes.cast(libc.pause, ctypes.c_void_p))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            time.sleep(1 if rank == 0 else 0.5)  # until the others have got that far; rank 0 answers them all
    except SystemExit as exit:
        if not isinstance(exit.code, int | None):
            complain(exit.code, 1)
        os._exit(exit.code or 0)
    except InputError as error:
        text = str(error).rstrip().rpartition("InputError: ")[2]  # of a DataLoader's worker it has a traceback in front
        complain("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), 2)  # strangers' names in one line
    except OSError as error:
        complain(f"{error.filename or 'output'}: {error.strerror or error}; {kept}", 1)
    except Exception as error:
        complain(f"{LOST}; {kept}" if "DataLoader worker (pid" in str(error) else traceback.format_exc(), 1)
    os._exit(0)


def keep(text):
    """Set what an interrupt, or an error that ends the run, says of what is kept."""
    global kept
    kept = text
    got_further()


def interrupt(signum, _):
    """Answer Ctrl-C (or SIGTERM): say what is kept and end at once, with 130 (143)."""
    if os.getpid() == main_process:  # a KeyboardInterrupt that unwinds through OneFlow now and then crashes or hangs
        for path in list(unfinished):
            path.unlink(missing_ok=True)
        if rank == 0:
            os.write(stderr, os.fsencode(f"\ninterrupted: {kept}\n"))  # not print(), which may be at work already
        os._exit(128 + signum)
    os._exit(0)  # a DataLoader's worker


def complain(message, code=None):
    """Print to stderr under the script's name, and under the rank's if it isn't 0; with a code, end with it."""
    if rank:
        time.sleep(4)  # what is wrong on every rank is said once: rank 0's end ends the job
    print(f"{Path(sys.argv[0]).name}{f' (rank {rank})' * (rank > 0)}: {message}", file=sys.stderr)
    if code:
        os._exit(code)


def join():
    """Become the process that the launcher's environment says; ends it where OneFlow wouldn't find the others."""
    global rank, processes, patience, stderr
    stderr = os.dup(2)
    try:
        *numbers, address = (os.environ[name] for name in VARIABLES)
        processes, rank, local, port = map(int, numbers)
    except (KeyError, ValueError):
        complain("WORLD_SIZE is set, but not all that oneflow.distributed.launch sets: start it with that", 2)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a launcher can be ended without its ranks, they end with it
    after, patience = " ".join(sys.argv).replace("=", " ").rpartition("--rank_timeout ")[2], 1800
    with suppress(ValueError, IndexError):  # not given, or what makes no sense, which parsing the flags will say
        patience = min(1e6, float(after.split()[0]))
    find_master(local == rank, address, port, max(10, patience))
    got_further(max(30, patience))  # it may take OneFlow 10 seconds to look again


def find_master(same_host, address, port, seconds):
    """Take the port of the job (rank 0), or wait until rank 0 of this job, and of no other one, is there."""
    ours = f"unet-{port}-{os.getppid()}"
    if rank == 0:
        try:
            for name in (f"unet-{port}", ours):  # of two jobs that find the port free, one gets the first name
                port_names.append(socket.socket(socket.AF_UNIX))
                port_names[-1].bind(f"\0{name}")
            return socket.create_server(("", port)).close()
        except (OSError, OverflowError) as error:
            complain(f"port {port} ({error}): if another job runs here, give the launcher another --master_port", 1)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(OSError):
            if not same_host or f"@{ours}\n" in Path("/proc/net/unix").read_text():
                return socket.create_connection((address, port), 5).close()
        time.sleep(0.05)
    complain(f"the other processes are not at {address}:{port} after {seconds:g} s", 1)


def got_further(seconds=None):
    """Wind up several processes' watchdog, in C as OneFlow waits without Python; it ends a job that stands still."""
    if patience:
        faulthandler.dump_traceback_later(seconds or patience, exit=True, file=stderr)
