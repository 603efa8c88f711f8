"""Put a data set where training and predicting look for it, or make labels of this repository's kind from others'.

    python3 data/prepare.py isbi                     # download ISBI 2012, check it, unpack it
    python3 data/prepare.py isbi --source FILE.zip   # the same from an archive or a folder of TIFFs
    python3 data/prepare.py sample                   # make a small synthetic stack, no network
    python3 data/prepare.py auto                     # isbi, or sample where it can't be had
    python3 data/prepare.py labels SOURCE OUT --membrane white     # labels with white membranes
    python3 data/prepare.py labels SOURCE OUT --threshold 128      # soft, resized or JPEG labels
    python3 data/prepare.py labels SOURCE OUT --cells              # a number a cell

The first four write train_image/0.png …, train_label/ (white = cell interior), test_image/ and source.txt (which data
set this is) next to this script, or into --out DIR; the sample has a test_label/. Only its own folders are replaced.
"""

import hashlib
import io
import os
import shutil
import sys
import tempfile
import urllib.request
import zipfile
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks beside it only

from common import start
from common.arguments import InputError, Parser, given_path, number
from common.files import lock
from common.images import CONVERT, list_slices, quiet_stderr, read_page
from common.labels import refuse
from data.sample import make_sample

import cv2
import numpy as np
from tqdm import tqdm

ISBI_URL = "https://downloads.imagej.net/ISBI-2012-challenge.zip"
TERMS = """ISBI 2012: free for generating or testing non-commercial image segmentation software, not for redistribution.
Please cite doi 10.1371/journal.pbio.1000502 (Cardona 2010) and 10.3389/fnana.2015.00142 (Arganda-Carreras 2015)."""
# Where each stack of the archive goes, and the SHA-256 of its decoded pixels (uint8, C order), whatever compressed it.
STACKS = {
    "train-volume.tif": ("train_image", "200da3d452d726e6c9ca1ce04b869d4edb727320d23b516d01cce707dc8c4760"),
    "train-labels.tif": ("train_label", "a7cb64000a1a7e542682927e19c91339f58f9f178e0bcce4e207371116f0ca36"),
    "test-volume.tif": ("test_image", "1b58fa7ec1d0ff9d39a855622db3ff66a97863036339b0d04be51b2f5a99b0e9"),
}
ISBI, SAMPLE = "isbi2012", "synthetic sample"  # what source.txt may say; and what is this script's then:
OWNED = {ISBI: ("train_image", "train_label", "test_image", "source.txt")}
OWNED[SAMPLE] = (*OWNED[ISBI][:3], "test_label", "source.txt")


def load(args):
    """What source.txt will say, and {folder: uint8 (N, H, W)}: ISBI 2012, every digest checked, or the sample."""
    if args.command == "sample":
        return SAMPLE, make_sample()
    print(TERMS, flush=True)
    file = source = getattr(args, "source", ISBI_URL)
    folders, pages = {}, ()
    try:
        if source.lower().startswith(("http://", "https://")):
            file, response = io.BytesIO(), urllib.request.urlopen(source, timeout=30)  # seconds without a byte
            with tqdm.wrapattr(response, "read", response.length, leave=False, disable=None) as body:
                shutil.copyfileobj(body, file)
        if os.path.isdir(source):
            stacks = {name: Path(source, name).read_bytes() for name in STACKS}
        else:
            with zipfile.ZipFile(file) as archive:
                # By base name, into memory: a path inside an archive never becomes a path on disk.
                members = {os.path.basename(name): name for name in archive.namelist() if "__MACOSX" not in name}
                stacks = {name: archive.open(members.get(name, name)).read(2**26) for name in STACKS}  # one has 8 MB
        for name, (folder, digest) in STACKS.items():
            with quiet_stderr(), suppress(cv2.error):  # of damaged files, others have no page
                pages = cv2.imdecodemulti(np.frombuffer(stacks[name], np.uint8), cv2.IMREAD_UNCHANGED)[1]
            if hashlib.sha256(b"".join(page.tobytes() for page in pages)).hexdigest() != digest:
                raise ValueError(f"{name} is not the one of ISBI 2012")
            folders[folder] = np.stack(pages)
        return ISBI, folders
    except Exception as error:  # damaged archives make zipfile raise a dozen unrelated classes
        trouble = f"cannot read {source} ({error}); download {ISBI_URL} in a browser and pass --source FILE"
    if args.command == "isbi":
        raise InputError(trouble)
    start.complain(trouble)
    return SAMPLE, make_sample()


def prepare(args):
    """Write a data set: OUT/folder/0.png …, OUT/source.txt. Raises InputError or OSError, OUT then being as before.
    train.sh takes data as present when it sees train_image and source.txt, so train_image leaves first and comes last.
    source.txt leaves last and comes first: killed anywhere in between, a rerun knows what it may replace."""
    out, source, stage = args.out, args.out / "source.txt", args.out / ".preparing"
    with ExitStack() as undo:
        if not out.exists():
            out.mkdir()
            undo.callback(out.rmdir)
        lock(out)  # what can't be written is said before the download, not after it
        tempfile.TemporaryFile(dir=out).close()
        ours = OWNED.get(source.read_text(errors="replace").strip(), ()) if source.is_file() else ()
        for name in OWNED[SAMPLE if args.command == "sample" else ISBI]:
            if os.path.lexists(out / name) and name not in ours:
                raise InputError(f"{out / name} was not made by this script; move it away or pass --out DIR")
        marker, folders = load(args)
        shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
        undo.callback(shutil.rmtree, stage, ignore_errors=True)
        (stage / "old").mkdir(parents=True)
        (stage / "source.txt").write_text(marker + "\n")
        for folder, stack in folders.items():
            (stage / folder).mkdir()
            for i, image in enumerate(stack):  # not cv2.imwrite, which does not say why it failed
                (stage / folder / f"{i}.png").write_bytes(cv2.imencode(".png", image)[1])
        moves = [(out / name, stage / "old" / name) for name in ours if os.path.lexists(out / name)]
        moves += [(stage / name, out / name) for name in reversed(OWNED[marker])]
        for here, there in moves:
            os.rename(here, there)
            undo.callback(os.rename, there, here)
        undo.pop_all()  # all have moved
    shutil.rmtree(stage, ignore_errors=True)
    print(f"{out}: " + ", ".join(f"{name} {stack.shape}" for name, stack in folders.items()))
    if marker == SAMPLE:
        print("*** SYNTHETIC SAMPLE: scores on it mean NOTHING for real tissue. For real slices see README. ***")


def as_numbers(file, page, cells):
    """A label as one number a pixel (H, W): a grey value, with `cells` a number for each colour."""
    label, _ = read_page(file, page)
    if label.ndim == 2:
        return label
    if label.shape[2] == 4 and not np.ptp(label[:, :, :3], axis=(0, 1)).any():
        return label[:, :, 3]  # only the transparency says something
    label = label[:, :, :3]
    return label.astype(np.int64) @ (1 << 32, 1 << 16, 1) if cells else cv2.cvtColor(label, cv2.COLOR_BGR2GRAY)


def convert(args):
    """Write labels as OUT/NAME.png and say what was made. Raises InputError and OSError, and then leaves no OUT."""
    slices, values, found = list_slices(args.source), set(), []
    if args.cells and (args.threshold is not None or args.membrane == "white"):
        raise InputError("--cells goes with neither --threshold nor --membrane white: in such labels 0 is membrane")
    if args.out.exists():
        raise InputError(f"{args.out}: exists already, name a folder to make: {CONVERT}")
    for _, file, page in slices if args.threshold is None and not args.cells else ():
        label = as_numbers(file, page, args.cells)
        values.update(np.unique(label).tolist())
        if len(values) > 2:
            refuse(file, values, label)
    if len(values) == 1:
        refuse(args.source, values)
    threshold = min(values, default=args.threshold)  # what is above it is white
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.name}.", dir=args.out.parent) as stage:
        made = Path(stage, "made")
        made.mkdir()
        for number, (name, file, page) in enumerate(slices):
            label = as_numbers(file, page, args.cells)
            if args.cells:
                interior = label != 0
                # A membrane of a pixel between cells that touch: 4-connected paths don't cross it.
                interior[:, :-1] &= (label[:, :-1] == label[:, 1:]) | (label[:, 1:] == 0)
                interior[:-1] &= (label[:-1] == label[1:]) | (label[1:] == 0)
            else:
                interior = (label > threshold) == (args.membrane == "black")
            found.append((interior.mean(), cv2.connectedComponents(np.uint8(interior), connectivity=4)[0] - 1))
            name = name if Path(args.source).is_dir() else number  # as slices of a folder are called most often
            (made / f"{name}.png").write_bytes(cv2.imencode(".png", np.uint8(255) * interior)[1])
        made.rename(args.out)
    share, count = np.mean(found, axis=0)
    print(f"{args.out}: {len(slices)} labels, {share:.1%} interior, {count:.0f} cells a slice, from {args.source}")
    if share < 0.5 and not args.cells:
        print(f"That is little interior: if membrane is the other colour, remove {args.out}, pass the other --membrane")


def main(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("isbi", "sample", "auto"):
        add = commands.add_parser(name, doc=__doc__).add_argument
        add("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write to")
        if name == "isbi":
            add("--source", default=ISBI_URL, help="URL, zip file or folder of TIFF stacks")
    add = commands.add_parser("labels", doc=__doc__).add_argument
    add("source", type=given_path, help="folder or stack of labels of any integer type, grey or colour")
    add("out", type=Path, help="folder to make")
    add("--membrane", choices=("black", "white"), default="black", help="which of the two it is")
    add("--threshold", type=number(float, -1e30), metavar="N", help="white is above N: soft labels")
    add("--cells", action="store_true", help="each cell has a number or a colour, 0 is membrane")
    args = parser.parse_args(argv)
    start.keep("run it again to prepare the data")
    try:
        convert(args) if args.command == "labels" else prepare(args)
    except OSError as error:  # all reading turns its errors into InputError, so this is writing
        raise InputError(f"cannot write {args.out} ({error}); make room or name another place") from None


if __name__ == "__main__":
    start.run(main)
