"""How a script runs and ends: Ctrl-C, errors in one line, exit codes; and of several processes, their watchdog.

Each script ends with `start.run(main)`.
"""

import ctypes
import os
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from common.arguments import InputError
from common.files import unfinished

rank, processes = 0, 1  # of this process, of how many; join() sets them
kept = "nothing was finished, nothing is kept"
main_process, stderr = os.getpid(), 2  # stderr: for interrupt(), which may come while descriptor 2 is silenced
signs, port_names = None, []  # of several processes: a pipe to the watchdog; what holds the job's port


def run(main):
    """Call `main()` and end the process: 0 done, 2 bad input (one line), 130 interrupted, 1 anything else.

    By `os._exit`, without OneFlow's own shutdown: now and then it hangs, for ever, in a thread that waits for work; and
    a process that failed would wait there for the others, which wait for it.
    """
    global main_process, stderr
    main_process, stderr = os.getpid(), os.dup(2)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that aren't UTF-8
    code = 0
    try:
        main()
        leave_together()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if exit.code and not isinstance(exit.code, int):
            complain(exit.code)
    except InputError as error:
        code = 2
        text = str(error)
        if "\nOriginal Traceback" in text:  # one of a DataLoader's workers raised it
            text = text.rstrip().rpartition("\n")[2].partition("InputError: ")[2]
        # Files from strangers must not break the line, or colour the terminal.
        complain("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
    except (FloatingPointError, OSError) as error:  # a full disk, for example
        code = 1
        named = isinstance(error, OSError)
        complain(f"{error.filename or 'a file'}: {error.strerror or error}; {kept}" if named else error)
    except Exception:
        code = 1
        complain(traceback.format_exc())
    try:
        sys.stdout.flush()
    except OSError as error:  # a full disk, or `| head`
        complain(f"output: {error.strerror}")
        code = code or 1
    os._exit(code)


def keep(text):
    """Set what an interrupt, or an error that ends the run, says of what is kept."""
    global kept
    kept = text
    got_further()


def interrupt(signum, _):
    """Answer Ctrl-C (or SIGTERM): say what is kept and end at once, with 130 (143).

    Nothing is lost by that, since files are replaced as a whole. A KeyboardInterrupt that finds its way out through
    OneFlow and its DataLoader now and then ends in a crash or hangs.
    """
    if os.getpid() == main_process:
        for path in list(unfinished):
            path.unlink(missing_ok=True)
        if rank == 0:
            os.write(stderr, os.fsencode(f"\ninterrupted: {kept}\n"))  # not print(), which may be at work already
        os._exit(128 + signum)
    if signum == signal.SIGTERM:  # a DataLoader's worker, which ends with us after Ctrl-C
        os._exit(0)


def complain(message):
    """Print to stderr under the script's name, and under the rank's if it isn't 0."""
    if rank:
        time.sleep(4)  # what is wrong on every rank is said once: rank 0's end ends the job
    print(f"{Path(sys.argv[0]).name}{f' (rank {rank})' * (rank > 0)}: {message}", file=sys.stderr)


# ---------------------------------------------------------------- one of several processes


def join():
    """Become the process that the launcher's environment says; called before OneFlow looks for the other ones.

    Ends the process where they can't be found, which OneFlow would wait for for ever or abort at.
    """
    global rank, processes
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        return
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    try:
        *numbers, address = (os.environ[name] for name in names)
        processes, rank, local, port = map(int, numbers)
    except (KeyError, ValueError):
        give_up("WORLD_SIZE is set, but not all of the launcher's variables: python3 -m oneflow.distributed.launch", 2)
    # A launcher can be ended without its ranks: have the kernel end them with it (1 is PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    words = " ".join(sys.argv).replace("=", " ").split()
    try:  # before the flags are parsed, which says what makes no sense
        seconds = min(max(0.1, float(dict(pairwise(words)).get("--rank_timeout", 1800))), 1e6)
    except ValueError:
        seconds = 1e6
    find_master(local == rank, address, port, max(seconds, 10))
    watch(seconds, f"the other processes are not at {address}:{port} after {seconds:g} s")


def find_master(same_host, address, port, seconds):
    """Take the port of the job (rank 0), or wait until rank 0 of this job, and of no other one, is there.

    A port that is only tried out can be taken before OneFlow takes it, by a job that starts at the same moment. A name
    in the kernel can't: rank 0 holds one of the port until it ends, and one more that its launcher's ranks look for.
    """
    names = [f"\0unet-{port}", f"\0unet-{port}-{os.getppid()}"]
    if rank == 0:
        try:
            for name in names:
                port_names.append(socket.socket(socket.AF_UNIX))
                port_names[-1].bind(name)
                port_names[-1].listen()
            socket.create_server(("", port)).close()
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", error)
            give_up(f"port {port}: {why}; if another job runs here, give the launcher another --master_port", 1)
        return
    until = time.monotonic() + seconds
    for family, where in [(socket.AF_UNIX, names[1])] * same_host + [(socket.AF_INET, (address, port))]:
        while True:
            with socket.socket(family) as probe:
                probe.settimeout(5)
                with suppress(OSError):
                    probe.connect(where)
                    break
            if time.monotonic() > until:
                give_up(f"the other processes are not at {address}:{port} after {seconds:g} s", 1)
            time.sleep(0.05)


def give_up(message, code):
    complain(message)
    os._exit(code)


def watch(seconds, message):
    """Start a process that ends this one, and by that the job, when it got no further for so many seconds.

    Ranks wait for each other at each step, in OneFlow, which never gives up, and at its start without letting a thread
    of ours run: when one is stopped or out of reach, the others would wait for ever.
    """
    global signs
    waiting, signs = os.pipe()
    os.set_blocking(signs, False)
    parent = os.getpid()
    if os.fork():
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    os.close(signs)
    limit = max(seconds, 30)  # it may take OneFlow 10 seconds to look again
    while select.select([waiting], [], [], limit)[0]:
        *said, _ = os.read(waiting, 2**16).decode(errors="replace").split("\0")
        if not said:
            os._exit(0)  # this process is gone
        limit = seconds if said[-1] else None
        message = f"got no further for {seconds:g} s, another process hangs or is out of reach; {said[-1]}"
    with suppress(OSError):
        complain(message)
    if os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)
    os._exit(0)


def got_further(alone=False):
    """Tell the watchdog that this process isn't waiting for another one; alone: nor will it, until the next sign."""
    if signs is not None and os.getpid() == main_process:
        with suppress(BlockingIOError):
            os.write(signs, b"\0" if alone else os.fsencode(kept) + b"\0")


def leave_together():
    """Of several processes that ended well, wait for the others: one that is gone fails those that still compute."""
    if processes == 1:
        return
    import oneflow

    sys.stdout.flush()
    oneflow.comm.barrier()
    # OneFlow looks every ten seconds whether the others are there and aborts if not. From here on that is no fault:
    # let the thread that aborts wait for the end, and what it has to say be lost.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.pause, ctypes.c_void_p))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    time.sleep(1 if rank == 0 else 0.5)  # until the others have got that far; rank 0 answers them all
