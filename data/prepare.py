"""Put a data set where training and predicting look for it.

    python3 data/prepare.py isbi                     # download ISBI 2012, check it, unpack it
    python3 data/prepare.py isbi --source FILE.zip   # the same from an archive or a folder of TIFFs
    python3 data/prepare.py sample                   # make a small synthetic stack, no network
    python3 data/prepare.py auto                     # isbi, or sample where it can't be had

All write 8-bit PNG files next to this script, or into --out DIR:

    train_image/0.png ...   grey slices
    train_label/0.png ...   white 255 = cell interior, black 0 = membrane
    test_image/0.png ...    slices of another stack
    test_label/0.png ...    only with the sample: for scoring, never for training
    source.txt              which of the two data sets this is

Folders that this script made are replaced as a whole or not at all. Your own folders (no
source.txt beside them) are never touched.

ISBI 2012: Cardona et al. 2010, doi 10.1371/journal.pbio.1000502, and Arganda-Carreras et al.
2015, doi 10.3389/fnana.2015.00142.
"""

import argparse
import contextlib
import hashlib
import http.client
import os
import shutil
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath

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

STACKS = {
    "train-volume.tif": "train_image",
    "train-labels.tif": "train_label",
    "test-volume.tif": "test_image",
}
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
SAMPLE_SIZE = 256


class PrepareError(Exception):
    """Something the user can put right; its message is the one line they see."""


# ---------------------------------------------------------------- ISBI 2012: fetch and check


def download(url, file):
    """Copy what `url` serves into the open binary `file`. Raises PrepareError."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            total = response.headers.get("Content-Length")
            total = int(total) if total else None
            # disable=None: no bar unless stderr is a terminal, so that logs stay clean.
            with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise PrepareError(f"cannot download {url} ({error}); {BY_HAND}") from error
    if total is not None and file.tell() != total:
        raise PrepareError(f"{url} broke off at {file.tell()} of {total} bytes; {BY_HAND}")


def read_zip(file, source):
    """Return {name: bytes} of the three stacks in the zip `file`. Raises PrepareError."""
    try:
        with zipfile.ZipFile(file) as archive:
            # By base name, into memory: a path inside an archive never becomes a path on disk.
            members = {
                PurePosixPath(member).name: member
                for member in archive.namelist()
                if "__MACOSX" not in member
            }
            found = {name: members[name] for name in STACKS if name in members}
            if any(archive.getinfo(member).file_size > 2**26 for member in found.values()):
                raise ValueError("a stack of 8 MB unpacks to more than 64")
            return {name: archive.read(member) for name, member in found.items()}
    except Exception as error:  # damaged archives make zipfile raise a dozen unrelated classes
        raise PrepareError(f"{source} is not a whole zip archive ({error}); {BY_HAND}") from error


def read_source(source):
    """Return {name: bytes} of the stacks found at a URL, in a zip or in a folder."""
    if source.lower().startswith(("http://", "https://")):
        with tempfile.TemporaryFile() as file:  # has no name, so even kill -9 leaves nothing
            download(source, file)
            return read_zip(file, source)
    path = Path(source)
    try:
        if path.is_dir():
            return {n: (path / n).read_bytes() for n in STACKS if (path / n).exists()}
        with path.open("rb") as file:
            return read_zip(file, source)
    except OSError as error:
        raise PrepareError(f"cannot read {source} ({error.strerror}); {BY_HAND}") from error


def decode(data, where):
    """Return the TIFF stack in the bytes `data` as uint8 (N, H, W). Raises PrepareError."""
    try:
        _, pages = cv2.imdecodemulti(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        stack = np.stack(pages)
    except (cv2.error, ValueError) as error:  # ValueError: no page, or pages of unequal size
        raise PrepareError(f"{where} is not a readable TIFF stack; {BY_HAND}") from error
    if stack.dtype != np.uint8 or stack.ndim != 3:
        raise PrepareError(f"{where} is not 8-bit grey; {BY_HAND}")
    return stack


def load_isbi(source):
    """Return {folder: uint8 (30, 512, 512)}, every digest checked. Raises PrepareError."""
    files = read_source(source)
    folders = {}
    for name, folder in STACKS.items():
        if name not in files:
            raise PrepareError(f"{source} holds no {name}; {BY_HAND}")
        folders[folder] = decode(files[name], f"{name} in {source}")
        if hashlib.sha256(folders[folder].tobytes()).hexdigest() != DIGESTS[name]:
            raise PrepareError(f"{name} in {source} is not the one of ISBI 2012; {BY_HAND}")
    return folders


# ---------------------------------------------------------------- the synthetic sample


def smooth_noise(rng, shape, sigmas):
    """Return Gaussian-blurred white noise, float32 of `shape`, mean 0 and deviation 1.

    Blurring in Fourier space makes wide blurs in three dimensions cheap.
    """
    spectrum = np.fft.rfftn(rng.standard_normal(shape))
    for axis, (n, sigma) in enumerate(zip(shape, sigmas, strict=True)):
        last = axis == len(shape) - 1
        frequency = np.fft.rfftfreq(n) if last else np.fft.fftfreq(n)
        along_axis = [1] * len(shape)
        along_axis[axis] = -1
        spectrum *= np.exp(-2 * (np.pi * sigma * frequency) ** 2).reshape(along_axis)
    noise = np.fft.irfftn(spectrum, shape)
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def noise2d(rng, sigma):
    """Return smooth_noise for one slice."""
    return smooth_noise(rng, (SAMPLE_SIZE, SAMPLE_SIZE), (sigma, sigma))


def pack_cells(rng):
    """Return rows of (x, y, radius), float32 (N, 3): few large cells, small ones between them."""
    cells = []
    for radius in np.sort(np.clip(rng.lognormal(2.6, 0.75, 260), 8, 52))[::-1]:
        for _ in range(20):
            x, y = rng.uniform(-30, SAMPLE_SIZE + 30, 2)
            if all(np.hypot(x - a, y - b) > 0.95 * (radius + r) for a, b, r in cells):
                cells.append((x, y, radius))
                break
    return np.array(cells, np.float32)


def divide(xs, ys, centres, radii):
    """Give each pixel to the cell whose rim is nearest.

    Returns owner, int32 (H, W), and the distance to the nearest border, float32 (H, W).
    Subtracting the radius makes large cells bulge into small ones; straight borders, as between
    equal cells, bend because the coordinates `xs`, `ys` are warped.
    """
    owner = np.zeros(xs.shape, np.int32)
    nearest = np.full(xs.shape, np.inf, np.float32)
    for k, ((x, y), radius) in enumerate(zip(centres, radii, strict=True)):
        rim = np.sqrt((xs - x) ** 2 + (ys - y) ** 2) - radius
        owner[rim < nearest] = k
        nearest = np.minimum(nearest, rim)
    off_border = np.ones(xs.shape, np.uint8)
    off_border[:, 1:] &= owner[:, 1:] == owner[:, :-1]
    off_border[1:] &= owner[1:] == owner[:-1]
    return owner, cv2.distanceTransform(off_border, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def draw_cytoplasm(rng, owner, border, tone, grain):
    """Return one slice without membranes: grey by cell, texture, dark specks, vesicles."""
    clump = noise2d(rng, 16)
    image = cv2.GaussianBlur(tone[owner], (0, 0), 2) + 7 * noise2d(rng, 6)
    image += cv2.GaussianBlur(grain[owner], (0, 0), 2) * noise2d(rng, 1.6)
    image -= 20 * np.maximum(noise2d(rng, 1.3) - 0.6, 0) * np.exp(0.5 * clump)
    vesicles = np.zeros_like(image)
    for x, y in rng.integers(0, SAMPLE_SIZE, (420, 2)).tolist():
        if clump[y, x] + rng.normal(0, 0.7) > 0.5 and border[y, x] > 5:
            radius, dark = rng.uniform(1, 4.5), rng.uniform(20, 75)
            line = 2 if radius > 2 else -1  # the large ones are hollow
            cv2.circle(vesicles, (16 * x, 16 * y), int(16 * radius), dark, line, cv2.LINE_AA, 4)
    return image - cv2.GaussianBlur(vesicles, (0, 0), 0.9)


def draw_mitochondrion(rng, image, x, y, radius, stretch, angle, room):
    """Darken `image` inside an ellipse around x = y = 0, no further than `room` (pixels) allows."""
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    depth = np.minimum(radius - np.hypot(u / stretch, v * stretch), room)
    folds = np.sin(0.9 * u + 2.2 * noise2d(rng, 5))
    rim = np.exp(-(((depth - 1.5) / 1.5) ** 2))
    inner = 92 + 20 * folds + 12 * noise2d(rng, 2) - 30 * rim
    image += np.clip(depth / 2 + 0.5, 0, 1) * (inner - image)


def make_stack(seed, count):
    """Return synthetic serial sections and their labels, each uint8 (count, 256, 256).

    The tissue is modelled in planes half a section apart, and a section shows the mean of three
    of them: a membrane that runs at a slant through the section comes out wide and faint, as it
    does under the microscope. Mitochondria and vesicles look like membrane to a threshold and are
    interior in the label. The numbers were chosen so that grey levels, cell sizes and the share
    of membrane come out like those of ISBI 2012.
    """
    rng = np.random.default_rng(seed)
    planes = 2 * count + 1
    shape = (planes, SAMPLE_SIZE, SAMPLE_SIZE)
    ys, xs = np.mgrid[:SAMPLE_SIZE, :SAMPLE_SIZE].astype(np.float32)
    # Noise that is smooth across planes too, so that cells bend, and bend on from slice to slice.
    xs, ys = (
        axis + 9 * smooth_noise(rng, shape, (6, 20, 20)) + 1.5 * smooth_noise(rng, shape, (3, 5, 5))
        for axis in (xs, ys)
    )
    cells = pack_cells(rng)
    time = np.arange(planes, dtype=np.float32)[:, None, None] - count
    centres = cells[:, :2] + time * rng.normal(0, 0.3, (len(cells), 2)).astype(np.float32)
    radii = cells[:, 2] * (1 + 0.1 * smooth_noise(rng, (planes, len(cells)), (6, 0)))
    divided = [divide(*plane) for plane in zip(xs, ys, centres, radii, strict=True)]
    owner, border = (np.stack(part) for part in zip(*divided, strict=True))

    # Membrane varies along its course: in width, and down to where it can hardly be seen.
    width = 2.9 * np.exp(0.22 * smooth_noise(rng, shape, (2, 10, 10)))
    strength = 1 / (1 + np.exp(-1.7 - 1.3 * smooth_noise(rng, shape, (1, 12, 12))))
    membrane = strength * np.exp(-((border / width) ** 2))
    tone = rng.normal(162, 9, len(cells)).astype(np.float32)
    grain = rng.uniform(4, 15, len(cells)).astype(np.float32)
    mitochondria = [
        (k, rng.uniform(-0.5, 0.5, 2), rng.uniform(13, 22), rng.uniform(1, 1.5), rng.uniform(0, 3))
        for k in np.flatnonzero(cells[:, 2] > 20)
        if rng.random() < 0.7
    ]
    swelling = 1 + 0.3 * smooth_noise(rng, (len(cells), planes), (0, 5))

    images, labels = [], []
    for z in range(1, planes, 2):
        image = draw_cytoplasm(rng, owner[z], border[z], tone, grain)
        for k, offset, radius, stretch, angle in mitochondria:
            x, y = centres[z, k] + cells[k, 2] * offset
            room = np.where(owner[z] == k, border[z] - 5, -9)
            size = radius * swelling[k, z]
            draw_mitochondrion(rng, image, xs[z] - x, ys[z] - y, size, stretch, angle, room)
        image -= membrane[z - 1 : z + 2].mean(axis=0) * (image - 38)
        image += 1.4 * np.sqrt(np.maximum(image, 0)) * noise2d(rng, 0.65)  # shot noise
        image = 128 + rng.uniform(0.95, 1.3) * (image - 133)  # each section is stained anew
        image += 9 * noise2d(rng, 70) + rng.normal(0, 6)  # uneven light
        images.append(np.clip(image, 0, 255).astype(np.uint8))
        label = np.where(border[z] > 1.05 * width[z], 255, 0).astype(np.uint8)
        # Like an annotator, paint over slivers that are too thin to be told from membrane.
        brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
        labels.append(cv2.morphologyEx(label, cv2.MORPH_OPEN, brush))
    return np.stack(images), np.stack(labels)


def make_sample():
    """Return {folder: uint8 (N, 256, 256)}: 20 training pairs, 5 test pairs of other tissue."""
    (image, label), (test_image, test_label) = make_stack(0, 20), make_stack(1, 5)
    names = ("train_image", "train_label", "test_image", "test_label")
    return dict(zip(names, (image, label, test_image, test_label), strict=True))


# ---------------------------------------------------------------- writing


def list_own(out):
    """Return the names in the folder `out` that this script may replace."""
    file = out / "source.txt"
    return OWNED.get(file.read_text(errors="replace").strip(), ()) if file.is_file() else ()


def refuse_foreign(out, marker):
    """Raise PrepareError if something in the way of data set `marker` is the user's own."""
    for name in OWNED[marker]:
        if os.path.lexists(out / name) and name not in list_own(out):
            message = f"{out / name} was not made by this script; move it away or pass --out DIR"
            raise PrepareError(message)


def remove_stale(out):
    """Remove what killed runs left behind; folders of runs that still go on stay."""
    for folder in out.glob(".preparing-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not Path("/proc", pid).exists()):
            shutil.rmtree(folder)


def install(out, stage, marker):
    """Swap the data set in `stage` for the one in `out`; if that fails, swap back and re-raise.

    train.sh takes data as present when it sees train_image and source.txt, so train_image leaves
    first and comes last. source.txt leaves last and comes first, so that this script's folders
    are never without it. Killed anywhere in between, a rerun knows what it may replace.
    """
    refuse_foreign(out, marker)
    (stage / "old").mkdir()
    moves = [(out / n, stage / "old" / n) for n in list_own(out) if os.path.lexists(out / n)]
    moves += [(stage / n, out / n) for n in reversed(OWNED[marker])]
    try:
        for here, there in moves:
            os.rename(here, there)
    except BaseException:  # Ctrl-C too
        for here, there in reversed(moves):
            if not os.path.lexists(here):  # it has moved
                os.rename(there, here)
        raise


def write(out, marker, folders):
    """Write {folder: uint8 (N, H, W)} as OUT/folder/0.png ... and OUT/source.txt, or nothing."""
    made_out = not out.exists()
    stage = out / f".preparing-{os.getpid()}"
    try:
        out.mkdir(exist_ok=True)
        stage.mkdir()  # inside OUT: renaming works only within one file system
        for folder, stack in folders.items():
            (stage / folder).mkdir()
            for i, image in enumerate(stack):
                # Not cv2.imwrite, which does not say why it failed.
                (stage / folder / f"{i}.png").write_bytes(cv2.imencode(".png", image)[1])
        (stage / "source.txt").write_text(marker + "\n")
        install(out, stage, marker)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        if made_out:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    shutil.rmtree(stage, ignore_errors=True)


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line like all others."""

    def error(self, message):
        raise PrepareError(f"{message}; see --help")


def parse(argv):
    parser = Parser(description="Fetch ISBI 2012, or make a synthetic sample.")
    commands = parser.add_subparsers(dest="command", required=True)
    isbi = commands.add_parser("isbi", help="download, check and unpack ISBI 2012")
    isbi.add_argument("--source", default=ISBI_URL, help="URL, zip file or folder of TIFF stacks")
    sample = commands.add_parser("sample", help="make a small synthetic data set")
    auto = commands.add_parser("auto", help="isbi, or where it can't be had sample")
    auto.set_defaults(source=ISBI_URL)
    for command in (isbi, sample, auto):
        command.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    return parser.parse_args(argv)


def say(error):
    print(f"prepare.py: {' '.join(str(error).split())}", file=sys.stderr)


def prepare(args):
    """Run one command. Raises PrepareError or OSError, the data folder then being as before."""
    marker = SAMPLE if args.command == "sample" else ISBI
    # What can't be written where is said before the download, not after it.
    refuse_foreign(args.out, marker)
    tempfile.TemporaryFile(dir=args.out if args.out.exists() else args.out.parent).close()
    remove_stale(args.out)
    if marker == ISBI:
        print(TERMS, flush=True)
        try:
            folders = load_isbi(args.source)
        except PrepareError as error:
            if args.command == "isbi":
                raise
            say(error)
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
    """Return the exit code: 0 done, 2 bad input or arguments, 130 interrupted."""
    # OpenCV would add its own lines about a damaged TIFF to the one that we print.
    cv2.setLogLevel(0)
    try:
        args = parse(argv)
        prepare(args)
    except PrepareError as error:
        say(error)
        return 2
    except OSError as error:  # all reading turns its errors into PrepareError, so this is writing
        hint = "make room or pass another --out DIR"
        print(f"prepare.py: cannot write {args.out} ({error}); {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare.py: interrupted; run it again to prepare the data", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
