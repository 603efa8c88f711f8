"""Put a data set where training and predicting look for it, or make labels of this repository's kind from others'.

    python3 data/prepare.py isbi                     # download ISBI 2012, check it, unpack it
    python3 data/prepare.py isbi --source FILE.zip   # the same from an archive or a folder of TIFFs
    python3 data/prepare.py sample                   # make a small synthetic stack, no network
    python3 data/prepare.py auto                     # isbi, or sample where it can't be had
    python3 data/prepare.py labels SOURCE OUT --membrane white     # labels with white membranes
    python3 data/prepare.py labels SOURCE OUT --threshold 128      # soft, resized or JPEG labels
    python3 data/prepare.py labels SOURCE OUT --cells              # a number a cell

The first four write 8-bit PNG files next to this script, or into --out DIR:

    train_image/0.png ...   grey slices
    train_label/0.png ...   white 255 = cell interior, black 0 = membrane
    test_image/0.png ...    slices of another stack
    test_label/0.png ...    only with the sample: for scoring, never for training
    source.txt              which of the two data sets this is

Folders that this script made are replaced as a whole or not at all; your own (no source.txt beside them) are never
touched. ISBI 2012: doi 10.1371/journal.pbio.1000502 and doi 10.3389/fnana.2015.00142.
"""

import hashlib
import http.client
import os
import shutil
import sys
import tempfile
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks beside it only

from common import start
from common.arguments import InputError, Parser, given_path, number
from common.images import quiet_stderr
from data.convert import convert
from data.sample import make_sample

import cv2
import numpy as np
from tqdm import tqdm

ISBI_URL = "https://downloads.imagej.net/ISBI-2012-challenge.zip"
TIMEOUT = 30  # seconds without a byte before a download counts as dead
BY_HAND = f"download {ISBI_URL} in a browser and pass --source FILE"
TERMS = """\
ISBI 2012 is free for generating or testing non-commercial image segmentation software.
It may not be redistributed. Please cite:
  Cardona et al. 2010, PLoS Biology, doi 10.1371/journal.pbio.1000502
  Arganda-Carreras et al. 2015, Frontiers in Neuroanatomy, doi 10.3389/fnana.2015.00142"""
FALLBACK = """
***********************************************************************************
* ISBI 2012 can't be had from here: this is a SYNTHETIC SAMPLE instead.           *
* Scores on it mean NOTHING for real tissue. For real slices see README, 'Data'.  *
***********************************************************************************
"""
STACKS = {"train-volume.tif": "train_image", "train-labels.tif": "train_label", "test-volume.tif": "test_image"}
# SHA-256 of the decoded pixels (uint8, 30 x 512 x 512, C order): the same for any compression.
DIGESTS = {
    "train-volume.tif": "200da3d452d726e6c9ca1ce04b869d4edb727320d23b516d01cce707dc8c4760",
    "train-labels.tif": "a7cb64000a1a7e542682927e19c91339f58f9f178e0bcce4e207371116f0ca36",
    "test-volume.tif": "1b58fa7ec1d0ff9d39a855622db3ff66a97863036339b0d04be51b2f5a99b0e9",
}
ISBI, SAMPLE = "isbi2012", "synthetic sample"  # what source.txt may say
# What belongs to this script, by source.txt. The order matters to install().
OWNED = {
    ISBI: ("train_image", "train_label", "test_image", "source.txt"),
    SAMPLE: ("train_image", "train_label", "test_image", "test_label", "source.txt"),
}


# ------------------------------------------------------------------------------------- ISBI 2012: fetch and check


def download(url, file):
    """Copy what `url` serves into the open binary `file`. Raises InputError."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            total = int(response.headers.get("Content-Length") or 0)
            # disable=None: no bar unless stderr is a terminal, so that logs stay clean.
            with tqdm(total=total or None, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"cannot download {url} ({error}); {BY_HAND}") from error
    if total and file.tell() != total:
        raise InputError(f"{url} broke off at {file.tell()} of {total} bytes; {BY_HAND}")


def read_zip(file, source):
    """{name: bytes} of the three stacks in the zip `file`. Raises InputError."""
    try:
        with zipfile.ZipFile(file) as archive:
            # By base name, into memory: a path inside an archive never becomes a path on disk.
            members = {PurePosixPath(name).name: name for name in archive.namelist() if "__MACOSX" not in name}
            found = {name: members[name] for name in STACKS if name in members}
            if any(archive.getinfo(member).file_size > 2**26 for member in found.values()):
                raise ValueError("a stack of 8 MB unpacks to more than 64")
            return {name: archive.read(member) for name, member in found.items()}
    except Exception as error:  # damaged archives make zipfile raise a dozen unrelated classes
        raise InputError(f"{source} is not a whole zip archive ({error}); {BY_HAND}") from error


def read_source(source):
    """{name: bytes} of the stacks found at a URL, in a zip or in a folder. Raises InputError."""
    if source.lower().startswith(("http://", "https://")):
        with tempfile.TemporaryFile() as file:  # has no name, so even kill -9 leaves nothing
            download(source, file)
            return read_zip(file, source)
    path = Path(source)
    try:
        if path.is_dir():
            return {name: (path / name).read_bytes() for name in STACKS if (path / name).exists()}
        with path.open("rb") as file:
            return read_zip(file, source)
    except OSError as error:
        raise InputError(f"cannot read {source} ({error.strerror}); {BY_HAND}") from error


def load_isbi(source):
    """{folder: uint8 (30, 512, 512)}, every digest checked. Raises InputError."""
    files, folders = read_source(source), {}
    for name, folder in STACKS.items():
        if name not in files:
            raise InputError(f"{source} holds no {name}; {BY_HAND}")
        try:
            with quiet_stderr():
                _, pages = cv2.imdecodemulti(np.frombuffer(files[name], np.uint8), cv2.IMREAD_UNCHANGED)
            folders[folder] = np.stack(pages)
        except (cv2.error, ValueError) as error:  # ValueError: no page, or pages of unequal size
            raise InputError(f"{name} in {source} is not a readable TIFF stack; {BY_HAND}") from error
        if hashlib.sha256(folders[folder].tobytes()).hexdigest() != DIGESTS[name]:
            raise InputError(f"{name} in {source} is not the one of ISBI 2012; {BY_HAND}")
    return folders


# --------------------------------------------------------------------------------------------------------- writing


def list_own(out):
    """The names in the folder `out` that this script may replace."""
    file = out / "source.txt"
    return OWNED.get(file.read_text(errors="replace").strip(), ()) if file.is_file() else ()


def refuse_foreign(out, marker):
    """Raise InputError if something in the way of data set `marker` is the user's own."""
    for name in OWNED[marker]:
        if os.path.lexists(out / name) and name not in list_own(out):
            raise InputError(f"{out / name} was not made by this script; move it away or pass --out DIR")


@contextmanager
def staging(out):
    """A folder to write in, inside OUT, since renaming works only within one file system; gone afterwards."""
    made_out, stage = not out.exists(), out / f".preparing-{os.getpid()}"
    try:
        out.mkdir(exist_ok=True)
        for left in out.glob(".preparing-*"):  # of runs that were killed; those of runs that go on stay
            if left.name[11:].isdigit() and (left == stage or not Path("/proc", left.name[11:]).exists()):
                shutil.rmtree(left)
        stage.mkdir()
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if made_out and out.exists() and not any(out.iterdir()):
            out.rmdir()


def install(out, stage, marker):
    """Swap the data set in `stage` for the one in `out`; if that fails, swap back and re-raise.

    train.sh takes data as present when it sees train_image and source.txt, so train_image leaves first and comes last.
    source.txt leaves last and comes first, so that this script's folders are never without it. Killed anywhere in
    between, a rerun knows what it may replace.
    """
    refuse_foreign(out, marker)
    (stage / "old").mkdir()
    moves = [(out / n, stage / "old" / n) for n in list_own(out) if os.path.lexists(out / n)]
    moves += [(stage / n, out / n) for n in reversed(OWNED[marker])]
    try:
        for here, there in moves:
            os.rename(here, there)
    except BaseException:
        for here, there in reversed(moves):
            if not os.path.lexists(here):  # it has moved
                os.rename(there, here)
        raise


def write(out, marker, folders):
    """Write {folder: uint8 (N, H, W)} as OUT/folder/0.png ... and OUT/source.txt, or nothing."""
    with staging(out) as stage:
        for folder, stack in folders.items():
            (stage / folder).mkdir()
            for i, image in enumerate(stack):
                # Not cv2.imwrite, which does not say why it failed.
                (stage / folder / f"{i}.png").write_bytes(cv2.imencode(".png", image)[1])
        (stage / "source.txt").write_text(marker + "\n")
        install(out, stage, marker)


# ---------------------------------------------------------------------------------------------------- command line


def command_parser(doc, prog):
    parser = Parser(doc)
    parser.prog = prog
    return parser


def parse_args(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=command_parser)
    isbi = commands.add_parser("isbi", doc="Download, check and unpack ISBI 2012.")
    isbi.add_argument(
        "--source", default=ISBI_URL, help="URL, zip file or folder of TIFF stacks (default: %(default)s)"
    )
    sample = commands.add_parser("sample", doc="Make a small synthetic data set.")
    auto = commands.add_parser("auto", doc="Download ISBI 2012, or where it can't be had make the synthetic sample.")
    auto.set_defaults(source=ISBI_URL)
    for command in (isbi, sample, auto):
        folder = Path(__file__).resolve().parent
        command.add_argument("--out", type=Path, default=folder, help="folder to write to (default: %(default)s)")
    labels = commands.add_parser("labels", doc="Make labels of this repository's kind from others'.")
    labels.add_argument("source", type=given_path, help="folder or stack of labels of any integer type, grey or colour")
    labels.add_argument("out", type=Path, help="folder to make")
    kinds = ("black", "white")
    labels.add_argument("--membrane", choices=kinds, default="black", help="which of the two it is (default: black)")
    labels.add_argument("--threshold", type=number(float, -1e30), metavar="N", help="white is above N: soft labels")
    labels.add_argument("--cells", action="store_true", help="each cell has a number or a colour, 0 is membrane")
    return parser.parse_args(argv)


def prepare(args):
    """Write a data set. Raises InputError or OSError, the data folder then being as before."""
    marker = SAMPLE if args.command == "sample" else ISBI
    # What can't be written where is said before the download, not after it.
    refuse_foreign(args.out, marker)
    tempfile.TemporaryFile(dir=args.out if args.out.exists() else args.out.parent).close()
    if marker == ISBI:
        print(TERMS, flush=True)
        try:
            folders = load_isbi(args.source)
        except InputError as error:
            if args.command == "isbi":
                raise
            start.complain(error)
            marker = SAMPLE
            refuse_foreign(args.out, marker)
            print(FALLBACK, flush=True)
    if marker == SAMPLE:
        folders = make_sample()
    write(args.out, marker, folders)
    for name, stack in folders.items():
        print(f"{args.out / name}: {len(stack)} slices of {stack.shape[1]} x {stack.shape[2]}")
    if marker == SAMPLE:
        print("THIS SAMPLE IS SYNTHETIC: scores on it mean NOTHING for real tissue.")


def main(argv=None):
    args = parse_args(argv)
    start.keep("run it again to prepare the data")
    try:
        convert(args.source, args.out, args) if args.command == "labels" else prepare(args)
    except OSError as error:  # all reading turns its errors into InputError, so this is writing
        where = "OUT" if args.command == "labels" else "--out DIR"
        raise InputError(f"cannot write {args.out} ({error}); make room or pass another {where}") from None


if __name__ == "__main__":
    start.run(main)
