"""Writing files whole, in folders that can be written to, by one run at a time."""

import errno
import fcntl
import hashlib
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

from common.arguments import InputError

HOST = socket.gethostname().replace(".", "_")
unfinished = set()  # files that are being written: who ends the process in the midst removes them
held = {}  # what this process has locked: real path -> what holds the lock


@contextmanager
def write_whole(path, sync=True):
    """A binary file to write to; `path` holds what it held until all is written, then all of it; with `sync` even after
    a power cut. Of two processes that write one file, the later one's is there."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.new")
    unfinished.add(aside)
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(aside, path)
        if sync:
            folder = os.open(path.parent, os.O_RDONLY)
            with suppress(OSError):  # some file systems, of networks mostly, can't sync a folder
                os.fsync(folder)  # the rename itself
            os.close(folder)
    except OSError as error:
        error.filename = str(path)  # a full disk doesn't say whose
        raise
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        unfinished.discard(aside)


def make_folder(path):
    """Make a folder to write to, before the work, and tidy up what killed processes left there. Raises InputError."""
    with suppress(OSError):
        os.makedirs(path, exist_ok=True)
    if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: can't be written to as a folder, choose another one")
    for left in Path(path).glob(f".*.{HOST}.[0-9]*.new"):  # other hosts may be at work in the folder too
        if not Path("/proc", left.name.split(".")[-2]).exists():
            left.unlink(missing_ok=True)


def check_output(path):
    """Make the folder of a file to write, and lock that. Raises InputError where it can't be written."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is in the way, it is not a file")
    make_folder(Path(path).parent)
    lock(path)


def lock(path):
    """Hold a file or folder to write until the process ends. Raises InputError if another one holds it. Held is a name
    in the kernel, so nothing is left behind, and a folder, which other hosts may write to, itself."""
    real = os.path.realpath(path)
    if real in held:
        return
    name, folder = socket.socket(socket.AF_UNIX), os.open(real, os.O_RDONLY) if os.path.isdir(real) else None
    try:
        name.bind("\0" + hashlib.sha256(os.fsencode(real)).hexdigest())
        if folder is not None:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EWOULDBLOCK):  # else a file system without locks
            raise InputError(f"{path}: another run writes there, choose another place for this one's") from None
    held[real] = name, folder
