"""Slices and labels from files: reading, pairing, normalising, augmenting.

    from dataloader import SelfDataSet
    image, label = SelfDataSet("data/train_image", augment=("flip", "rotate"), crop=256)[0]

A path names a folder of PNG or TIFF files or one (multi-page) TIFF stack; 8 or 16 bit, grey or
colour. In a label white is the interior of a cell (1) and black is membrane (0).
"""

import os
import re
from contextlib import contextmanager
from pathlib import Path

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

cv2.setLogLevel(0)  # what OpenCV would log is in InputError

SUFFIXES = {".png", ".tif", ".tiff"}
AUGMENTATIONS = ("flip", "rotate")


class InputError(ValueError):
    """What the user gave can't be used: scripts print it as one line and exit with 2."""


def list_slices(path):
    """The slices under `path` (str or Path), as a list of (name, file, page), naturally sorted.

    `path` is a folder of images or one image file. A multi-page TIFF gives one entry a page, named
    `volume_0`, `volume_1` …; other files are named by their stem, with page 0. `2.png` comes
    before `10.png`.

    Raises InputError when there is nothing to read or two slices would have the same name.
    """
    path = Path(path)
    if path.is_dir():
        files = [f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file()]
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"{path}: no such file or folder")
    if not files:
        raise InputError(f"{path}: holds no image (looked for {', '.join(sorted(SUFFIXES))})")

    # Digits compare as numbers; re.split alternates text and digits, so like meets like.
    files.sort(key=lambda f: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", f.name)])
    slices = []
    for file in files:
        pages = cv2.imcount(str(file)) if file.suffix.lower() != ".png" else 1
        if pages > 1:
            slices += [(f"{file.stem}_{page}", file, page) for page in range(pages)]
        else:
            slices.append((file.stem, file, 0))  # an unreadable file fails in read_slice
    file_of = {}
    for name, file, _ in slices:
        if name in file_of:
            raise InputError(f"{file}: has the same name as {file_of[name]}, rename one of them")
        file_of[name] = file
    return slices


def read_slice(file, page=0):
    """One slice as a grey array (H, W) of the file's own depth: uint8, uint16 or float32.

    Colour is turned to grey. Raises InputError when the file can't be read as an image or holds
    values that are not finite. Training, validation and prediction read through this function.
    """
    try:
        flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
        with quiet_stderr():
            ok, pages = cv2.imreadmulti(str(file), start=page, count=1, flags=flags)
    except cv2.error:  # among others: more pixels than OpenCV accepts
        ok = False
    if not ok:
        raise InputError(f"{file}: can't be read as an image, is it a whole PNG or TIFF file?")
    if not np.isfinite(pages[0]).all():
        raise InputError(f"{file}: holds values that are not finite")
    return pages[0]


def normalise(image):
    """Slice (H, W) of any depth -> float32 (H, W) with mean 0 and standard deviation 1.

    Each slice by itself: bit depth, brightness and contrast of a microscope session drop out.
    A constant slice becomes zeros.
    """
    image = image.astype(np.float32)
    return (image - image.mean()) / max(float(image.std()), 1e-6)


def augment(image, label, rng, kinds, crop):
    """The same random crop, flips and turns for image and label, both (H, W); `rng` is NumPy's."""
    if crop:
        top = rng.integers(image.shape[0] - crop + 1)
        left = rng.integers(image.shape[1] - crop + 1)
        image, label = (a[top : top + crop, left : left + crop] for a in (image, label))
    if "flip" in kinds:
        for axis in (0, 1):
            if rng.integers(2):
                image, label = np.flip(image, axis), np.flip(label, axis)
    if "rotate" in kinds:
        # A quarter turn would change the shape of an oblong image, and batches need one shape.
        turns = rng.integers(4) if image.shape[0] == image.shape[1] else 2 * rng.integers(2)
        image, label = np.rot90(image, turns), np.rot90(label, turns)
    return image, label


class SelfDataSet(Dataset):
    """Pairs of slice and label.

    data_path: folder or stack of slices.
    label_path: folder or stack of labels with the same file names; by default the sibling of
        data_path whose last component has `label` for `image`.
    augment: any of "flip" (both directions), "rotate" (right angles); none by default.
    crop: side in pixels of a random square cut from each slice; None keeps it whole.
    seed: the augmentation of pair i is drawn from (seed, epoch, i), so it repeats whatever the
        number of workers or processes; set the attribute `epoch` before each epoch.
    keep: which pairs of the sorted list to use, a Python slice.

    `dataset[i]` gives (image, label), float32 arrays of shape (1, H, W): image normalised, label
    0 (membrane) or 1 (interior). `names` and `shapes` hold each pair's name and (H, W).

    All pairs are checked here, once. Raises InputError that lists every missing label, unreadable
    file, label of another size and label without exactly two values, or when a slice is smaller
    than the crop.
    """

    def __init__(
        self, data_path, label_path=None, *, augment=(), crop=None, seed=0, keep=slice(None)
    ):
        data_path = Path(data_path)
        slices = list_slices(data_path)
        if label_path is None:
            if "image" not in data_path.name:
                raise InputError(
                    f"{data_path}: no 'image' in its name for 'label' to replace, pass --label_path"
                )
            label_path = data_path.with_name("label".join(data_path.name.rsplit("image", 1)))
        label_path = Path(label_path)
        self.augment, self.crop, self.seed, self.epoch = tuple(augment), crop, seed, 0
        labels = list_slices(label_path)
        if data_path.is_dir():
            of_name = {(file.name, page): (file, page) for _, file, page in labels}
            pairs = [(s, of_name.get((s[1].name, s[2]))) for s in slices]
        elif len(slices) == len(labels):  # two stacks: page by page, their names don't matter
            pairs = [(s, label[1:]) for s, label in zip(slices, labels, strict=True)]
        else:
            raise InputError(
                f"{data_path}: {len(slices)} slices, but {label_path} has {len(labels)} labels"
            )

        self.names, self.shapes, self.pairs, problems = [], [], [], []
        for (name, file, page), label in pairs[keep]:
            try:
                if label is None:
                    raise InputError(f"{file}: no label of that name in {label_path}")
                shape = read_slice(file, page).shape
                label_shape = read_label(*label).shape
                if label_shape != shape:
                    raise InputError(f"{label[0]}: {label_shape}, but its slice has {shape} pixels")
                self.names.append(name)
                self.shapes.append(shape)
                self.pairs.append(((file, page), label))
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError("; ".join(problems))
        if crop and crop > min(map(min, self.shapes), default=crop):
            small = min(zip(self.shapes, self.names, strict=True), key=lambda item: min(item[0]))
            raise InputError(
                f"a crop of {crop} is larger than slice {small[1]} of {small[0]} pixels"
            )

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        slice_file, label_file = self.pairs[index]
        image, label = normalise(read_slice(*slice_file)), read_label(*label_file)
        rng = np.random.default_rng((self.seed, self.epoch, index))
        image, label = augment(image, label, rng, self.augment, self.crop)
        # Flips and turns are views with negative strides, which OneFlow refuses.
        return np.ascontiguousarray(image[None]), np.ascontiguousarray(label[None])


def read_label(file, page=0):
    """One label as float32 (H, W): 1 where it is lighter (interior), 0 where darker (membrane).

    Raises InputError unless the label has exactly two values, whatever they are.
    """
    label = read_slice(file, page)
    low, high = label.min(), label.max()
    if low == high or not np.isin(label, (low, high)).all():
        values = len(np.unique(label))
        raise InputError(f"{file}: has {values} grey values, a label must have exactly two")
    return (label == high).astype(np.float32)
