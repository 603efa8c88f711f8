"""Slices and labels from files: reading, pairing, normalising, augmenting.

    from dataloader import SelfDataSet
    image, label = SelfDataSet("data/train_image", augment=("flip", "elastic"), crop=256)[0]

A path names a folder of PNG or TIFF files or one (multi-page) TIFF stack; 8 or 16 bit, grey or
colour. In a label white is the interior of a cell (1) and black is membrane (0).
"""

import hashlib
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

# Importing OneFlow installs a C handler with which Ctrl-C ends in a segmentation fault: keep Ctrl-C
# waiting until that is over, in NumPy's threads too, which begin here and inherit what is blocked.
handler = signal.getsignal(signal.SIGINT)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

import cv2
import numpy as np


@contextmanager
def quiet_stderr():
    """Silence what C code prints to descriptor 2, past Python: libpng, libtiff, OneFlow."""
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


# All scripts import this module before oneflow, so that none of them starts with its warnings
# about CUDA and InfiniBand, which a machine without them doesn't need.
with quiet_stderr():
    from oneflow.utils.data import Dataset
signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

from tqdm import tqdm

cv2.setLogLevel(0)  # what OpenCV would log is in InputError

SUFFIXES = {".png", ".tif", ".tiff"}
LARGE = 2**26  # pixels, beyond which a slice that takes hardly any bytes is no slice
# TIFF tags that say how OpenCV misreads a page, and the bytes of their types BYTE, SHORT and LONG
BITS, PHOTOMETRIC, ORIENTATION, SAMPLES, PLANAR, EXTRA = TAGS = (258, 262, 274, 277, 284, 338)
TYPE_BYTES = {1: 1, 3: 2, 4: 4}
KEPT_WEIGHTS = 2**28  # bytes of border weights in memory, 256 slices of 512 x 512 pixels
AUGMENTATIONS = ("flip", "rotate", "elastic")


class InputError(ValueError):
    """What the user gave can't be used: scripts print it as one line and exit with 2."""


def list_slices(path):
    """The slices under `path` (str or Path), as a list of (name, file, page), naturally sorted.

    `path` is a folder of images or one image file. A multi-page TIFF gives one entry a page, named
    `volume_0`, `volume_1` …; other files are named by their stem, with page 0. `2.png` comes
    before `10.png`.

    Raises InputError when there is nothing to read, two slices would have the same name, or a TIFF
    is cut off.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = [f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file()]
        elif path.is_file():
            files = [path]
        else:
            raise InputError(f"{path}: no such file or folder")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    if not files:
        raise InputError(f"{path}: holds no image (looked for {', '.join(sorted(SUFFIXES))})")

    # Digits compare as numbers; re.split alternates text and digits, so like meets like.
    files.sort(key=lambda f: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", f.name)])
    slices = []
    for file in files:
        try:
            str(file).encode()
            pages = count_pages(file)
        except UnicodeEncodeError:  # OpenCV would crash on it
            raise InputError(f"{file}: is no UTF-8 name, rename the file or its folder") from None
        except OSError:
            pages = 1  # it fails in read_slice, as other unreadable files do
        if pages > 1:
            slices += [(f"{file.stem}_{page}", file, page) for page in range(pages)]
        else:
            slices.append((file.stem, file, 0))
    file_of = {}
    for name, file, _ in slices:
        if name in file_of:
            raise InputError(f"{file}: has the same name as {file_of[name]}, rename one of them")
        file_of[name] = file
    return slices


def count_pages(file):
    """The number of pages of a TIFF, 1 for any other file: what its chain of directories says.

    Counted here, since libtiff counts a chain that leads beyond the end of the file as one that
    ends there, and slices would be missing in silence. Raises InputError for such a file, for an
    ImageJ stack whose slices lie behind its only page, and for pages that OpenCV would misread.
    """
    damaged = InputError(f"{file}: is damaged or cut off, its pages can't be counted")
    with open(file, "rb") as tiff:
        magic = tiff.read(4)
        if magic in (b"II*\0", b"MM\0*"):
            offset_bytes, count_bytes, entry_bytes = 4, 2, 12
        elif magic in (b"II+\0", b"MM\0+"):  # BigTIFF
            offset_bytes, count_bytes, entry_bytes = 8, 8, 20
        else:
            return 1
        size = tiff.seek(0, os.SEEK_END)

        def number(place, width):
            if place + width > size:
                raise damaged
            tiff.seek(place)
            return int.from_bytes(tiff.read(width), "little" if magic[:1] == b"I" else "big")

        seen = set()
        directory = number(offset_bytes, offset_bytes)
        while directory:
            if directory in seen:
                raise damaged
            seen.add(directory)
            entries, start = number(directory, count_bytes), directory + count_bytes
            tags = dict.fromkeys(TAGS, 1) | {EXTRA: 0}
            for entry in range(start, start + min(entries, 99) * entry_bytes, entry_bytes):
                tag, kind = number(entry, 2), number(entry + 2, 2)
                if tag in tags and kind in TYPE_BYTES:
                    tags[tag] = number(entry + 4 + offset_bytes, TYPE_BYTES[kind])
            grey, samples = tags[PHOTOMETRIC] < 2, tags[SAMPLES]
            if tags[PHOTOMETRIC] == 0 and samples == 1 and tags[BITS] > 8:  # taken for black
                raise InputError(f"{file}: has 0 for white, save it with 0 for black")
            if 2 <= tags[ORIENTATION] <= 8:  # turned by OpenCV, but not by other programs
                raise InputError(f"{file}: is stored turned or mirrored, save it upright")
            # Of these OpenCV leaves some out or mixes them up; three slices that tifffile took for
            # colours it would make one. Grey of 8 bit with transparency (1, 2) it reads.
            transparent = samples == 2 and tags[BITS] == 8 and tags[EXTRA] in (1, 2)
            if samples > 1 and (tags[PLANAR] == 2 or (grey and not transparent)):
                raise InputError(
                    f"{file}: a page holds {samples} channels (slices, colours, transparency), "
                    "save a grey one a page"
                )
            directory = number(start + entries * entry_bytes, offset_bytes)
        tiff.seek(0)
        said = re.search(rb"ImageJ=[^\0]*\nimages=(\d+)", tiff.read(2**16))
        if said and int(said[1]) > len(seen):  # ImageJ's own way past 4 GB
            raise InputError(f"{file}: has its slices in one page, save it as a folder of images")
    return len(seen)


def read_slice(file, page=0):
    """One slice as a grey array (H, W) of the file's own type: integers to 32 bit, or floats.

    Colour is turned to grey. Raises InputError when the file can't be read as an image, holds
    values that are not finite or beyond 1e30, or unpacks to what no micrograph is. Training,
    validation and prediction read through this function.
    """
    with quiet_stderr():
        return decode(file, page)


def decode(file, page=0):
    """read_slice, while stderr is quiet already: for threads, which share it."""
    try:
        flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
        ok, pages = cv2.imreadmulti(str(file), start=page, count=1, flags=flags)
    except cv2.error:  # among others: more pixels than OpenCV accepts
        ok = False
    if not ok:
        raise InputError(
            f"{file}: can't be read as an image, is it a whole PNG or TIFF file, one of 8 or 16 "
            "bit or of 32 bit floats, and of no more than 2^30 pixels?"
        )
    image = pages[0]
    if image.size > max(LARGE, 500 * Path(file).stat().st_size):
        raise InputError(f"{file}: unpacks to {image.size} pixels of nothing, it is no micrograph")
    if not (image.min() > -1e30 and image.max() < 1e30):  # nor is NaN
        raise InputError(f"{file}: holds values that are not finite, or beyond 1e30")
    return image


def normalise(image):
    """Slice (H, W) of any depth -> float32 (H, W) with mean 0 and standard deviation 1.

    Each slice by itself: bit depth, brightness and contrast of a microscope session drop out.
    A constant slice becomes zeros.
    """
    image = image.astype(np.float32)
    mean, deviation = image.mean(dtype=np.float64), image.std(dtype=np.float64)
    return (image - np.float32(mean)) / np.float32(max(deviation, 1e-6))


def augment(maps, rng, kinds, crop=None):
    """The same random crop, flips, turns and deformation for all maps; `rng` is NumPy's.

    maps: [image, label, ...], each float32 (H, W); returns as many, of another shape where `crop`
    (pixels a side) asks for it. kinds: any of AUGMENTATIONS.
    """
    height, width = maps[0].shape
    side_y, side_x = (crop, crop) if crop else (height, width)
    top, left = rng.integers(height - side_y + 1), rng.integers(width - side_x + 1)
    if "elastic" in kinds:
        image, label, *others = deform(maps, rng, top, left, side_y, side_x)
        maps = [image, (label > 0.5).astype(np.float32), *others]
    else:
        maps = [m[top : top + side_y, left : left + side_x] for m in maps]
    if "flip" in kinds:
        for axis in (0, 1):
            if rng.integers(2):
                maps = [np.flip(m, axis) for m in maps]
    if "rotate" in kinds:
        # A quarter turn would change the shape of an oblong image, and batches need one shape.
        turns = rng.integers(4) if side_y == side_x else 2 * rng.integers(2)
        maps = [np.rot90(m, turns) for m in maps]
    return maps


def deform(maps, rng, top, left, height, width):
    """A window of the maps (H, W), float32, smoothly deformed, as in the U-Net paper, section 3.1.

    A grid of 3 x 3 random shifts, with a standard deviation of 10 pixels, spans the whole maps;
    bicubic interpolation gives each pixel its own. Maps under 250 pixels a side would fold: they
    get smaller shifts. Beyond their edges the maps continue mirrored. The first map, the image, is
    sampled bicubically: linear sampling takes a quarter of the contrast of an electron
    micrograph's finest grain, and the net would meet the grain only when it predicts.
    """
    deviation = min(10, min(maps[0].shape) / 25)
    # Interpolation is linear in the shifts: a row of `down` holds the grid's weights for a row.
    grid = np.eye(3, dtype=np.float32)
    down = cv2.resize(grid, (3, maps[0].shape[0]), interpolation=cv2.INTER_CUBIC)
    across = cv2.resize(grid, (3, maps[0].shape[1]), interpolation=cv2.INTER_CUBIC)
    down, across = down[top : top + height], across[left : left + width]
    y, x = np.mgrid[top : top + height, left : left + width].astype(np.float32)
    y += down @ rng.normal(0, deviation, (3, 3)).astype(np.float32) @ across.T
    x += down @ rng.normal(0, deviation, (3, 3)).astype(np.float32) @ across.T
    kinds = (cv2.INTER_CUBIC, *(cv2.INTER_LINEAR for _ in maps[1:]))
    return [
        cv2.remap(m, x, y, kind, None, cv2.BORDER_REFLECT_101)
        for m, kind in zip(maps, kinds, strict=True)
    ]


def border_weights(label, w0):
    """Loss weights that dwell on thin membranes, as in the U-Net paper, equation 2.

    label: float32 (H, W), 1 inside cells. Returns float32 (H, W) with mean 1, proportional to
    1 + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) on membrane and to 1 inside cells, where d1 and d2 are
    the distances to the nearest and the second nearest cell (4-connected) and sigma is 5 pixels.
    """
    sigma = 5
    far = 4 * sigma  # beyond it, the weight is 1 up to 3e-4 w0
    count, cells, boxes, _ = cv2.connectedComponentsWithStats(
        label.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S
    )
    first = np.full(label.shape, far, np.float32)
    second = first.copy()
    for cell in range(1, count):
        left, top, width, height, _ = boxes[cell]
        window = np.s_[
            max(top - far, 0) : top + height + far, max(left - far, 0) : left + width + far
        ]
        outside = (cells[window] != cell).astype(np.uint8)
        distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        distance = np.sqrt(np.rint(distance**2))  # its last bits vary from run to run
        second[window] = np.minimum(second[window], np.maximum(first[window], distance))
        first[window] = np.minimum(first[window], distance)
    weights = 1 + w0 * (1 - label) * np.exp(-((first + second) ** 2) / (2 * sigma**2))
    return weights / weights.mean(dtype=np.float64).astype(np.float32)


class SelfDataSet(Dataset):
    """Pairs of slice and label.

    data_path: folder or stack of slices.
    label_path: folder or stack of labels; by default the sibling of data_path whose last component
        has `label` for `image`. Two folders pair by file name (`0.png` and `0.tif` do too), else
        order pairs them.
    augment: any of "flip" (both directions), "rotate" (right angles), "elastic" (smooth
        deformation); none by default.
    crop: side in pixels of a random square cut from each slice; None keeps it whole.
    repeat: how often an epoch sees each slice, each time with an augmentation of its own.
    border_weight: w0 of border_weights(); 0 for none.
    seed: the augmentation of item i is drawn from (seed, epoch, i), so it repeats whatever the
        number of workers or processes; set the attribute `epoch` before each epoch.
    keep: which pairs of the sorted list to use, a Python slice.

    `dataset[i]` gives (image, label), float32 arrays of shape (1, H, W): image normalised, label
    0 (membrane) or 1 (interior); with border_weight (image, label, weight). `names` and `shapes`
    hold each pair's name and (H, W), `digest` is a SHA-256 of all their pixels.

    All pairs are checked here, once. Raises InputError that lists every missing label, unreadable
    file, label of another size and label without exactly two values (20 of them at most), or when a
    slice is smaller than the crop.
    """

    def __init__(
        self,
        data_path,
        label_path=None,
        *,
        augment=(),
        crop=None,
        repeat=1,
        border_weight=0,
        seed=0,
        keep=slice(None),
    ):
        data_path = Path(data_path)
        slices = list_slices(data_path)
        if label_path is None:
            if "image" not in data_path.name:
                raise InputError(
                    f"{data_path}: no 'image' in its name for 'label' to replace, say where its "
                    "labels are (--label_path, for validation --val_label_path)"
                )
            label_path = data_path.with_name("label".join(data_path.name.rsplit("image", 1)))
        label_path = Path(label_path)
        self.augment, self.crop, self.repeat = tuple(augment), crop, repeat
        self.border_weight, self.seed, self.epoch = border_weight, seed, 0
        labels = list_slices(label_path)
        if data_path.is_dir() and label_path.is_dir():
            of_name = {name: (file, page) for name, file, page in labels}
            pairs = [(s, of_name.get(s[0])) for s in slices]
        elif len(slices) == len(labels):  # of a stack, page by page, names don't matter
            pairs = [(s, label[1:]) for s, label in zip(slices, labels, strict=True)]
        else:
            raise InputError(
                f"{data_path}: {len(slices)} slices, but {label_path} has {len(labels)} labels"
            )

        self.names, self.shapes, self.pairs = [], [], []
        self.weights, self.kept = {}, 0  # of some slices: forked workers have them too
        problems = [
            f"{file}: no label of that name in {label_path}"
            for (_, file, _), label in pairs[keep]
            if label is None
        ]
        pairs = [pair for pair in pairs[keep] if pair[1] is not None]
        digest = hashlib.sha256()
        with (
            ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool,
            tqdm(
                total=len(pairs),
                desc="checking slices",
                leave=False,
                delay=2,
                disable=None if os.environ.get("RANK", "0") == "0" else True,
            ) as bar,
        ):
            for start in range(0, len(pairs), 64):
                some = pairs[start : start + 64]
                with quiet_stderr():
                    checked = list(pool.map(self.check, some))
                for ((name, *image), label), (shape, pixels, problem) in zip(
                    some, checked, strict=True
                ):
                    if problem:
                        problems.append(problem)
                        continue
                    digest.update(pixels)
                    self.names.append(name)
                    self.shapes.append(shape)
                    self.pairs.append((tuple(image), label))
                bar.update(len(some))
        self.digest = digest.hexdigest()
        if problems:
            more = f"; … and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise InputError("; ".join(problems[:20]) + more)
        if crop and crop > min(map(min, self.shapes), default=crop):
            small = min(zip(self.shapes, self.names, strict=True), key=lambda item: min(item[0]))
            raise InputError(f"--crop {crop} is larger than slice {small[1]} of {small[0]} pixels")

    def check(self, pair):
        """Read a pair ((name, file, page), label) -> (shape, SHA-256 of its pixels, problem)."""
        (_, *image), label = pair
        try:
            image, label_map = decode(*image), two_values(label[0], decode(*label))
            if label_map.shape != image.shape:
                raise InputError(
                    f"{label[0]}: {label_map.shape}, but its slice has {image.shape} pixels"
                )
            if self.border_weight and self.kept < KEPT_WEIGHTS:
                self.kept += label_map.nbytes
                self.weights[label] = border_weights(label_map, self.border_weight)
        except InputError as error:
            return None, None, str(error)
        digest = hashlib.sha256(f"{image.dtype} {image.shape} ".encode())
        digest.update(np.ascontiguousarray(image))
        digest.update(label_map.astype(bool))
        return image.shape, digest.digest(), None

    def __len__(self):
        return len(self.pairs) * self.repeat

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # what ends `for pair in data_set`
        index %= len(self)
        slice_file, label_file = self.pairs[index % len(self.pairs)]
        maps = [normalise(read_slice(*slice_file)), read_label(*label_file)]
        if self.border_weight:
            weights = self.weights.get(label_file)
            maps.append(border_weights(maps[1], self.border_weight) if weights is None else weights)
        rng = np.random.default_rng((self.seed, self.epoch, index))
        maps = augment(maps, rng, self.augment, self.crop)
        # Flips and turns are views with negative strides, which OneFlow refuses.
        return tuple(np.ascontiguousarray(m[None]) for m in maps)


def read_label(file, page=0):
    """One label as float32 (H, W): 1 where it is lighter (interior), 0 where darker (membrane).

    Raises InputError unless the label has exactly two values, whatever they are.
    """
    return two_values(file, read_slice(file, page))


def two_values(file, label):
    """read_label, of an array that has been read."""
    low, high = label.min(), label.max()
    interior = label == high
    if low == high or not (interior | (label == low)).all():
        values = len(np.unique(label))
        raise InputError(f"{file}: has {values} grey values, a label must have exactly two")
    return interior.astype(np.float32)
