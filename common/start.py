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
from itertools import pairwise
from multiprocessing.queues import Queue
from pathlib import Path

from common.arguments import InputError
from common.files import unfinished

LOST = "a process of --num_workers is gone: give it more memory or more of /dev/shm, or pass --num_workers 0"

rank, processes = 0, 1  # of this process, of how many; join() sets them
kept = "nothing was finished, nothing is kept"
main_process, stderr = os.getpid(), 2  # stderr: also while descriptor 2 is silenced
patience, port_names = None, []  # of several processes: the watchdog's seconds; what holds the job's port


def run(main):
    """Call `main()` and end the process: 0 done, 2 bad input (one line), 130 interrupted, 1 anything else.

    By `os._exit`: OneFlow's own shutdown hangs now and then, and where another process waits for this one, always.
    """
    global stderr
    stderr = os.dup(2)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that aren't UTF-8
    if not os.path.exists("/dev/nvidia0"):
        # OneFlow's thread of its own for operations would spin beside the kernels' threads. It reads this once.
        os.environ.setdefault("ONEFLOW_VM_COMPUTE_ON_WORKER_THREAD", "0")
    # A worker of a DataLoader that finds no room in /dev/shm would drop its batch, which is then waited for for ever.
    Queue._on_queue_feeder_error = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    sys.unraisablehook = lambda _: None  # a DataLoader that is half made when a worker dies has more to say than we
    code, said = 1, ""
    try:
        try:
            main()
            leave_together()
        finally:
            sys.stdout.flush()  # a full disk fails here, and `| head`
        code = 0
    except SystemExit as exit:
        code, said = (exit.code or 0, "") if isinstance(exit.code, int | None) else (1, exit.code)
    except InputError as error:
        text = str(error).rstrip().rpartition("InputError: ")[2]  # of a DataLoader's worker it has a traceback in front
        # Files from strangers must not break the line, or colour the terminal.
        code, said = 2, "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    except OSError as error:
        said = f"{error.filename or 'output'}: {error.strerror or error}; {kept}"
    except Exception as error:
        lost = "DataLoader worker (pid" in str(error)
        said = f"{LOST}; {kept}" if lost else error if isinstance(error, FloatingPointError) else traceback.format_exc()
    if said:
        complain(said)
    os._exit(code)


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
    if signum == signal.SIGTERM:  # a DataLoader's worker, which ends with us after Ctrl-C
        os._exit(0)


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
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        return
    stderr = os.dup(2)
    try:
        names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
        processes, rank, local, port = (int(os.environ[name]) for name in names)
        address = os.environ["MASTER_ADDR"]
    except (KeyError, ValueError):
        complain("WORLD_SIZE is set, but not all that oneflow.distributed.launch sets: start it with that", 2)
    # A launcher can be ended without its ranks: have the kernel end them with it (1 is PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    words, patience = " ".join(sys.argv).replace("=", " ").split(), 1e6
    with suppress(ValueError):  # the flags aren't parsed yet, which says what makes no sense
        patience = min(max(0.1, float(dict(pairwise(words)).get("--rank_timeout", 1800))), 1e6)
    find_master(local == rank, address, port, max(patience, 10))
    got_further(max(patience, 30))  # it may take OneFlow 10 seconds to look again


def launched():
    """Whether oneflow.distributed.launch started this as one of several. Its variables may be those of a whole pod."""
    with suppress(OSError):  # a parent may be hidden
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
        several = (os.environ.get("WORLD_SIZE") or "1") != "1"
        return several and any(word.endswith((b"distributed.launch", b"distributed/launch.py")) for word in words)


def find_master(same_host, address, port, seconds):
    """Take the port of the job (rank 0), or wait until rank 0 of this job, and of no other one, is there.

    Of two jobs that start at once both find the port free; only one gets its name in the kernel. A second name is of
    this launcher: its ranks look for that.
    """
    names = [f"unet-{port}", f"unet-{port}-{os.getppid()}"]
    if rank == 0:
        try:
            for name in names:
                port_names.append(socket.socket(socket.AF_UNIX))
                port_names[-1].bind(f"\0{name}")
            return socket.create_server(("", port)).close()
        except (OSError, OverflowError) as error:
            complain(f"port {port} ({error}): if another job runs here, give the launcher another --master_port", 1)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(OSError):
            if not same_host or f"@{names[1]}\n" in Path("/proc/net/unix").read_text():
                return socket.create_connection((address, port), 5).close()
        time.sleep(0.05)
    complain(f"the other processes are not at {address}:{port} after {seconds:g} s", 1)


def got_further(seconds=None):
    """Of several processes, wind up the watchdog: if that isn't done again for --rank_timeout, it ends the job.

    OneFlow never gives up waiting for other ranks, and lets no Python run meanwhile; the watchdog is a thread in C.
    """
    if patience:
        faulthandler.dump_traceback_later(seconds or patience, exit=True, file=stderr)


def leave_together():
    """Of several processes that ended well, wait for the others: one that is gone fails those that still compute."""
    if processes == 1:
        return
    import oneflow

    oneflow.comm.barrier()
    # OneFlow looks every ten seconds whether the others are there and aborts if not. From here on that is no fault:
    # let the thread that aborts wait for the end, and what it has to say be lost.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.pause, ctypes.c_void_p))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    time.sleep(1 if rank == 0 else 0.5)  # until the others have got that far; rank 0 answers them all
