"""Writing files whole, in folders that can be written to, by one run at a time."""

import errno
import fcntl
import hashlib
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

from common.arguments import InputError

unfinished = set()  # files that write_whole is writing: who ends the process in the midst removes them
held = {}  # what this process has locked: real path -> what holds the lock


@contextmanager
def write_whole(path, sync=True):
    """A binary file to write to; `path` holds what it held until all is written, then all of it.

    With `sync` that is so even after a power cut. If the block raises, `path` stays as it was. Two processes that
    write one file don't disturb each other: the later one's is there in the end.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
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
    """Make a folder to write to, without what killed processes left unfinished. Raises InputError if it can't be used.

    Call it before the work, so that hours of it aren't lost.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: can't be made ({error.strerror}), choose another folder") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: can't be written to, choose another folder")
    for left in path.glob(".*.new"):
        process = left.name.split(".")[-2]
        if process.isdecimal() and not Path("/proc", process).exists():
            left.unlink(missing_ok=True)


def check_output(path):
    """Make the folder of a file to write. Raises InputError if the file can't be written there."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is in the way, it is not a file")
    make_folder(path.parent)


def lock(path):
    """Hold a file or folder that this run writes until the process ends, however it ends.

    The lock is a name in the kernel, made of the path, so no file is left behind; and on a folder, which other hosts
    may write too, one of the file system where it has such. Raises InputError where another process holds it.
    """
    real = os.path.realpath(path)
    if real in held:
        return
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind("\0" + hashlib.sha256(os.fsencode(real)).hexdigest())
        folder = os.open(real, os.O_RDONLY) if os.path.isdir(real) else None
        if folder is not None:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno == errno.EWOULDBLOCK:  # else a file system without locks
                    raise
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EWOULDBLOCK):
            raise
        raise InputError(
            f"{path}: another training writes there, choose another place for what this one writes"
        ) from None
    held[real] = name, folder
