"""Pairs of slice and label for training: reading, normalising, augmenting and weighting.

from dataloader import SelfDataSet
image, label = SelfDataSet("data/train_image", augment=("flip", "elastic"), crop=256)[0]
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

from common import start
from common.arguments import InputError
from common.images import normalise, read_slice
from common.labels import beside, judge, look, pair, read_label, read_pair

import cv2
import numpy as np
from tqdm import tqdm

KEPT_WEIGHTS = 2**28  # bytes of border weights in memory, 256 slices of 512 x 512 pixels
AUGMENTATIONS = ("flip", "rotate", "elastic")


def augment(maps, rng, kinds, crop=None):
    """The same random crop, flips, rotations and deformation for all maps; `rng` is NumPy's.

    maps: [image, label, ...], each float32 (H, W), of which `crop` pixels a side are left. kinds: of AUGMENTATIONS.
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
        axes = tuple(axis for axis in (0, 1) if rng.integers(2))
        maps = [np.flip(m, axes) for m in maps]
    if "rotate" in kinds:
        # A quarter turn would change the shape of an oblong image, and batches need one shape.
        turns = rng.integers(4) if side_y == side_x else 2 * rng.integers(2)
        maps = [np.rot90(m, turns) for m in maps]
    return maps


def deform(maps, rng, top, left, height, width):
    """A window of the maps (H, W), float32, smoothly deformed, as in the U-Net paper, section 3.1.

    A grid of 3 x 3 random shifts, with a standard deviation of 10 pixels (fewer below 250 pixels a side, which would
    fold), spans the maps, bicubic interpolation gives each pixel its own, and maps continue mirrored. The image, first,
    is sampled bicubically: linearly it would lose a quarter of the contrast of its finest grain.
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
    return [cv2.remap(m, x, y, kind, None, cv2.BORDER_REFLECT_101) for m, kind in zip(maps, kinds, strict=True)]


def border_weights(label, w0):
    """Loss weights that dwell on thin membranes, as in the U-Net paper, equation 2.

    label: float32 (H, W), 1 inside cells. Returns float32 (H, W) with mean 1, proportional to 1 inside cells and to 1 +
    w0 exp(-(d1 + d2)^2 / (2 sigma^2)) on membrane: distances to the two nearest cells (4-connected), sigma 5 pixels.
    """
    sigma = 5
    far = 4 * sigma  # beyond it, the weight is 1 up to 3e-4 w0
    count, cells, boxes, _ = cv2.connectedComponentsWithStats(label.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S)
    first = np.full(label.shape, far, np.float32)
    second = first.copy()
    for cell in range(1, count):
        left, top, width, height, _ = boxes[cell]
        window = np.s_[max(top - far, 0) : top + height + far, max(left - far, 0) : left + width + far]
        outside = (cells[window] != cell).astype(np.uint8)
        distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        distance = np.sqrt(np.rint(distance**2))  # its last bits vary from run to run
        second[window] = np.minimum(second[window], np.maximum(first[window], distance))
        first[window] = np.minimum(first[window], distance)
    weights = 1 + w0 * (1 - label) * np.exp(-((first + second) ** 2) / (2 * sigma**2))
    return weights / weights.mean(dtype=np.float64).astype(np.float32)


class SelfDataSet:
    """Pairs of slice and label, for a DataLoader.

    data_path, label_path: folders or stacks of slices and of their labels; by default the labels are the sibling of
        data_path whose last component has `label` for `image`. Two folders pair by name, else order pairs.
    augment: any of AUGMENTATIONS: flips in both directions, rotations by right angles, smooth deformation.
    crop: side in pixels of a random square cut from each slice; None keeps it whole.
    repeat: how often an epoch sees each slice, each time with an augmentation of its own.
    border_weight: w0 of border_weights(); 0 for none.
    seed: an item is drawn from (seed, epoch, index), however many workers; set `epoch` before each epoch.
    keep: which pairs of the sorted list to use, a Python slice.

    `dataset[i]` gives (image, label), float32 arrays of shape (1, H, W): image normalised, label 0 (membrane) or 1
    (interior); with border_weight (image, label, weight). `names` and `shapes` hold each pair's name and (H, W),
    `digest` is a SHA-256 of all their pixels. All pairs are checked here, once: raises InputError that lists what is
    wrong with any of them (20 at most), or with the labels together, see judge().
    """

    def __init__(
        self, data_path, label_path=None, *, augment=(), crop=None, repeat=1, border_weight=0, seed=0, keep=slice(None)
    ):
        self.label_path = label_path or beside(data_path)
        if self.label_path is None:
            way = "say where its labels are (--label_path, for validation --val_label_path)"
            raise InputError(f"{data_path}: no 'image' in its name for 'label' to replace, {way}")
        self.augment, self.crop, self.repeat = tuple(augment), crop, repeat
        self.border_weight, self.seed, self.epoch = border_weight, seed, 0
        self.weights, self.kept = {}, 0  # of some slices: forked workers have them too
        everything = pair(data_path, self.label_path)
        pairs = everything[keep]
        hidden = True if start.rank else None  # None: no bar where stderr is a file
        with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
            checks = pool.map(self.check, pairs)
            checks = list(tqdm(checks, "checking slices", len(pairs), leave=False, delay=2, disable=hidden))
        if problems := [check for check in checks if isinstance(check, str)]:
            raise InputError("; ".join(problems[:20]) + f"; … and {len(problems) - 20} more" * (len(problems) > 20))
        self.names = [name for (name, *_), _ in pairs]
        self.pairs = [(image[1:], label[1:]) for image, label in pairs]
        self.shapes, digests, looks = map(list, zip(*checks, strict=True)) if checks else ([], [], [])
        self.digest = hashlib.sha256(b"".join(digests)).hexdigest()
        self.values = judge(self.label_path, looks, part=len(pairs) < len(everything)) if looks else None
        side, name = min(zip(map(min, self.shapes), self.names, strict=True), default=(crop, ""))
        if crop and crop > side:
            raise InputError(f"--crop {crop} is larger than slice {name}, a side of which has {side} pixels")

    def check(self, pair):
        """Read a pair, each (name, file, page) -> (shape, SHA-256 of its pixels, look() of it), or what is wrong."""
        (_, *image_file), label_file = pair
        if label_file is None:
            return f"{image_file[0]}: no label of that name in {self.label_path}"
        try:
            image, label = read_pair(image_file, label_file[1:])
        except InputError as error:
            return str(error)
        interior = label == label.max()
        if self.border_weight and self.kept < KEPT_WEIGHTS:
            self.kept += 4 * label.size
            self.weights[label_file[1:]] = border_weights(interior.astype(np.float32), self.border_weight)
        digest = hashlib.sha256(f"{image.dtype} {image.shape} ".encode())
        digest.update(np.ascontiguousarray(image))
        digest.update(interior if not interior.all() else label.tobytes())
        return image.shape, digest.digest(), look(label, image)

    def __len__(self):
        return len(self.pairs) * self.repeat

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # what ends `for pair in data_set`
        index %= len(self)
        image_file, label_file = self.pairs[index % len(self.pairs)]
        maps = [normalise(read_slice(*image_file)), read_label(*label_file, self.values)]
        if self.border_weight:
            weights = self.weights.get(label_file)
            maps.append(border_weights(maps[1], self.border_weight) if weights is None else weights)
        rng = np.random.default_rng((self.seed, self.epoch, index))
        maps = augment(maps, rng, self.augment, self.crop)
        # Flips and rotations are views with negative strides, which OneFlow refuses.
        return tuple(np.ascontiguousarray(m[None]) for m in maps)
