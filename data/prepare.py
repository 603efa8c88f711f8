"""Put a data set where training and predicting look for it, or make labels of this repository's kind from others'.

    python3 data/prepare.py isbi                     # download ISBI 2012, check it, unpack it
    python3 data/prepare.py isbi --source FILE.zip   # the same from an archive or a folder of TIFFs
    python3 data/prepare.py sample                   # make a small synthetic stack, no network
    python3 data/prepare.py auto                     # isbi, or sample where it can't be had
    python3 data/prepare.py labels SOURCE OUT --membrane white     # labels with white membranes
    python3 data/prepare.py labels SOURCE OUT --threshold 128      # soft, resized or JPEG labels
    python3 data/prepare.py labels SOURCE OUT --cells              # a number a cell

The first four write train_image/0.png …, train_label/0.png … (white = cell interior, black = membrane), test_image/ and
source.txt (which data set this is) next to this script, or into --out DIR; the sample has a test_label/ for scoring.
Folders that this script made are replaced as a whole or not at all, your own (no source.txt beside them) never touched.
"""

import hashlib
import io
import os
import shutil
import sys
import tempfile
import urllib.request
import zipfile
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks beside it only

from common import start
from common.arguments import InputError, Parser, given_path, number
from common.files import lock
from common.images import quiet_stderr
from data.convert import convert
from data.sample import make_sample

import cv2
import numpy as np
from tqdm import tqdm

ISBI_URL = "https://downloads.imagej.net/ISBI-2012-challenge.zip"
TIMEOUT = 30  # seconds without a byte before a download counts as dead
LARGE = 2**26  # bytes of a stack, which has 8 MB, that are read at most
BY_HAND = f"download {ISBI_URL} in a browser and pass --source FILE"
TERMS = """\
ISBI 2012 is free for generating or testing non-commercial image segmentation software, and not to be redistributed.
Please cite Cardona et al. 2010, PLoS Biology, doi 10.1371/journal.pbio.1000502, and Arganda-Carreras et al. 2015,
Frontiers in Neuroanatomy, doi 10.3389/fnana.2015.00142."""
FALLBACK = "*** ISBI 2012 can't be had from here: this is a SYNTHETIC SAMPLE instead. For real slices see README. ***"
# Each stack of the archive: the folder that it goes to, and the SHA-256 of its decoded pixels (uint8, 30 x 512 x 512, C
# order), the same for any compression.
STACKS = {
    "train-volume.tif": ("train_image", "200da3d452d726e6c9ca1ce04b869d4edb727320d23b516d01cce707dc8c4760"),
    "train-labels.tif": ("train_label", "a7cb64000a1a7e542682927e19c91339f58f9f178e0bcce4e207371116f0ca36"),
    "test-volume.tif": ("test_image", "1b58fa7ec1d0ff9d39a855622db3ff66a97863036339b0d04be51b2f5a99b0e9"),
}
ISBI, SAMPLE = "isbi2012", "synthetic sample"  # what source.txt may say
# What belongs to this script, by source.txt.
OWNED = {ISBI: ("train_image", "train_label", "test_image", "source.txt")}
OWNED[SAMPLE] = (*OWNED[ISBI][:3], "test_label", "source.txt")


def read_source(source):
    """{name: bytes} of the stacks found at a URL, in a zip or in a folder. Raises InputError."""
    try:
        if os.path.isdir(source):
            return {name: Path(source, name).read_bytes() for name in STACKS if Path(source, name).exists()}
        file = source
        if source.lower().startswith(("http://", "https://")):
            file = io.BytesIO()
            with urllib.request.urlopen(source, timeout=TIMEOUT) as response:
                total = int(response.headers.get("Content-Length") or 0) or None
                with tqdm.wrapattr(response, "read", total, leave=False, disable=None) as body:
                    shutil.copyfileobj(body, file)
        with zipfile.ZipFile(file) as archive:
            # By base name, into memory: a path inside an archive never becomes a path on disk.
            members = {PurePosixPath(name).name: name for name in archive.namelist() if "__MACOSX" not in name}
            return {name: archive.open(members[name]).read(LARGE) for name in STACKS if name in members}
    except Exception as error:  # damaged archives make zipfile raise a dozen unrelated classes
        raise InputError(f"cannot read {source} ({error}); {BY_HAND}") from error


def load_isbi(source):
    """{folder: uint8 (30, 512, 512)}, every digest checked. Raises InputError."""
    files, folders = read_source(source), {}
    for name, (folder, digest) in STACKS.items():
        try:
            with quiet_stderr():
                pages = cv2.imdecodemulti(np.frombuffer(files[name], np.uint8), cv2.IMREAD_UNCHANGED)[1]
            folders[folder] = np.stack(pages)
            right = hashlib.sha256(folders[folder].tobytes()).hexdigest() == digest
        except (KeyError, ValueError, cv2.error):  # no such file, no page, pages of unequal size, damage
            right = False
        if not right:
            raise InputError(f"{source} holds no {name}, or not the one of ISBI 2012; {BY_HAND}")
    return folders


def list_own(out, marker):
    """What may be replaced in `out`. Raises InputError where the user's own is in the way of data set `marker`."""
    source = out / "source.txt"
    own = OWNED.get(source.read_text(errors="replace").strip(), ()) if source.is_file() else ()
    for name in OWNED[marker]:
        if os.path.lexists(out / name) and name not in own:
            raise InputError(f"{out / name} was not made by this script; move it away or pass --out DIR")
    return [name for name in own if os.path.lexists(out / name)]


def write(out, marker, folders):
    """Write {folder: uint8 (N, H, W)} as OUT/folder/0.png ... and OUT/source.txt, or nothing.

    train.sh takes data as present when it sees train_image and source.txt, so train_image leaves first and comes last.
    source.txt leaves last and comes first, so that this script's folders are never without it: killed anywhere in
    between, a rerun knows what it may replace.
    """
    stage, made = out / ".preparing", not out.exists()
    out.mkdir(exist_ok=True)
    lock(out)
    try:
        shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
        (stage / "old").mkdir(parents=True)
        for folder, stack in folders.items():
            (stage / folder).mkdir()
            for i, image in enumerate(stack):  # not cv2.imwrite, which does not say why it failed
                (stage / folder / f"{i}.png").write_bytes(cv2.imencode(".png", image)[1])
        (stage / "source.txt").write_text(marker + "\n")
        moves = [(out / name, stage / "old" / name) for name in list_own(out, marker)]
        moves += [(stage / name, out / name) for name in reversed(OWNED[marker])]
        with ExitStack() as undo:
            for here, there in moves:
                os.rename(here, there)
                undo.callback(os.rename, there, here)
            undo.pop_all()  # all have moved
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if made and not any(out.iterdir()):
            out.rmdir()


def parse_args(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, doc in (
        ("isbi", "Download, check and unpack ISBI 2012."),
        ("sample", "Make a small synthetic data set."),
        ("auto", "Download ISBI 2012, or where it can't be had make the synthetic sample."),
    ):
        add = commands.add_parser(name, doc=doc).add_argument
        folder = Path(__file__).resolve().parent
        add("--out", type=Path, default=folder, help="folder to write to (default: %(default)s)")
        if name == "isbi":
            add("--source", default=ISBI_URL, help="URL, zip file or folder of TIFF stacks (default: %(default)s)")
    add = commands.add_parser("labels", doc="Make labels of this repository's kind from others'.").add_argument
    add("source", type=given_path, help="folder or stack of labels of any integer type, grey or colour")
    add("out", type=Path, help="folder to make")
    kinds = ("black", "white")
    add("--membrane", choices=kinds, default="black", help="which of the two it is (default: black)")
    add("--threshold", type=number(float, -1e30), metavar="N", help="white is above N: soft labels")
    add("--cells", action="store_true", help="each cell has a number or a colour, 0 is membrane")
    return parser.parse_args(argv)


def prepare(args):
    """Write a data set. Raises InputError or OSError, the data folder then being as before."""
    marker = SAMPLE if args.command == "sample" else ISBI
    # What can't be written where is said before the download, not after it.
    list_own(args.out, marker)
    tempfile.TemporaryFile(dir=args.out if args.out.exists() else args.out.parent).close()
    if marker == ISBI:
        print(TERMS, flush=True)
        try:
            folders = load_isbi(getattr(args, "source", ISBI_URL))
        except InputError as error:
            if args.command == "isbi":
                raise
            start.complain(error)
            marker = SAMPLE
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
