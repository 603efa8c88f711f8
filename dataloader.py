"""Pairs of slice and label for training: read, normalised, augmented and weighted.
image, label = SelfDataSet("data/train_image", augment=("flip", "elastic"), crop=256)[0]"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

from common import start
from common.arguments import InputError
from common.images import normalise, read_slice
from common.labels import beside, judge, pair, read_label, read_pair

import cv2
import numpy as np
from tqdm import tqdm

KEPT_WEIGHTS = 2**28  # bytes of border weights in memory, 256 slices of 512 x 512 pixels
AUGMENTATIONS = ("flip", "rotate", "elastic", "intensity")


def augment(maps, rng, kinds, crop=None):
    """The same random crop, flips, rotations, deformation for maps [image, label, ...], float32 (H, W); see vary() too.
    rng: NumPy's. kinds: of AUGMENTATIONS. crop: how many pixels a side are left."""
    height, width = (crop, crop) if crop else maps[0].shape
    top, left = rng.integers(maps[0].shape[0] - height + 1), rng.integers(maps[0].shape[1] - width + 1)
    window = np.s_[top : top + height, left : left + width]
    maps = deform(maps, rng, window) if "elastic" in kinds else [m[window] for m in maps]
    if "intensity" in kinds:
        maps = [vary(maps[0], rng), *maps[1:]]
    if "flip" in kinds:
        axes = tuple(axis for axis in (0, 1) if rng.integers(2))
        maps = [np.flip(m, axes) for m in maps]
    if "rotate" in kinds:
        # A quarter turn would change the shape of an oblong image, and batches need one shape.
        turns = rng.integers(4) if height == width else 2 * rng.integers(2)
        maps = [np.rot90(m, turns) for m in maps]
    return maps


def deform(maps, rng, window):
    """A window of maps [image, label, ...], float32 (H, W), smoothly deformed, as in the U-Net paper, section 3.1.
    A grid of 3 x 3 random shifts, with a standard deviation of 10 pixels (fewer below 250 pixels a side, which would
    fold), spans the maps, bicubic interpolation gives each pixel its own, and maps continue mirrored."""
    # Interpolation is linear in the shifts: a row of `down` holds the grid's weights for a row.
    grid = np.eye(3, dtype=np.float32)
    down = cv2.resize(grid, (3, maps[0].shape[0]), interpolation=cv2.INTER_CUBIC)[window[0]]
    across = cv2.resize(grid, (3, maps[0].shape[1]), interpolation=cv2.INTER_CUBIC)[window[1]]
    shifts = rng.normal(0, min(10, min(maps[0].shape) / 25), (2, 3, 3)).astype(np.float32)
    y, x = np.mgrid[window].astype(np.float32) + down @ shifts @ across.T
    # Sampled linearly, the image would lose a quarter of the contrast of its finest grain.
    image = cv2.remap(maps[0], x, y, cv2.INTER_CUBIC, None, cv2.BORDER_REFLECT_101)
    label, *others = (cv2.remap(m, x, y, cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT_101) for m in maps[1:])
    return [image, (label > 0.5).astype(np.float32), *others]


def vary(image, rng):
    """A normalised image (H, W), float32, as another microscope may show it: its contrast times 0.75 to 1.33, up to 0.2
    brighter or darker, in half of the cases each blurred by up to a pixel and with noise of up to 0.25, both sigmas."""
    seen = image * np.float32(np.exp(rng.uniform(-0.29, 0.29))) + np.float32(rng.uniform(-0.2, 0.2))
    if rng.integers(2):
        seen = cv2.GaussianBlur(seen, (0, 0), rng.uniform(0.2, 1))
    if rng.integers(2):
        seen = seen + rng.normal(0, rng.uniform(0, 0.25), image.shape).astype(np.float32)
    return np.where(image, seen, np.float32(0))  # padding is 0, in prediction too


def border_weights(label, w0):
    """Loss weights that dwell on thin membranes, as in the U-Net paper, equation 2. label: float32 (H, W), 1 inside
    cells. Returns float32 (H, W) with mean 1, proportional to 1 inside cells, on membrane to 1 + w0 exp(-(d1 + d2)^2 /
    (2 sigma^2)): distances to the two nearest cells (4-connected), sigma 5 pixels."""
    sigma, far = 5, 20  # pixels; beyond `far` the weight is 1 up to 3e-4 w0
    _, cells, boxes, _ = cv2.connectedComponentsWithStats(label.astype(np.uint8), connectivity=4)
    first, second = np.full((2, *label.shape), far, np.float32)
    for cell, (left, top, width, height, _) in enumerate(boxes[1:], 1):
        window = np.s_[max(top - far, 0) : top + height + far, max(left - far, 0) : left + width + far]
        distance = cv2.distanceTransform(np.uint8(cells[window] != cell), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        distance = np.sqrt(np.rint(distance**2))  # its last bits vary from run to run
        second[window] = np.minimum(second[window], np.maximum(first[window], distance))
        first[window] = np.minimum(first[window], distance)
    weights = 1 + w0 * (1 - label) * np.exp(-((first + second) ** 2) / (2 * sigma**2))
    return weights / weights.mean(dtype=np.float64).astype(np.float32)


class SelfDataSet:
    """Pairs of slice and label, for a DataLoader. `dataset[i]` gives (image, label), float32 arrays of shape (1, H, W):
    image normalised, label 0 (membrane) or 1 (interior); with border_weight (image, label, weight).
    data_path, label_path: folders, which pair by name, or stacks; by default data_path's sibling, `label` for `image`.
    augment: any of AUGMENTATIONS: flips, rotations by right angles, smooth deformation, contrast to noise of vary().
    crop: side of a random square cut from each slice, None: whole. repeat: how often an epoch sees each slice.
    border_weight: w0 of border_weights(), 0: none. keep: a Python slice of the sorted pairs, those to use.
    seed: an item is drawn from (seed, epoch, index), however many workers; set `epoch` before each epoch.
    `names` and `shapes` hold each pair's name and (H, W), `digest` is a SHA-256 of all their pixels. Raises InputError
    that lists what is wrong with any of the pairs (20 at most), or with the labels together, see judge()."""

    def __init__(
        self, data_path, label_path=None, *, augment=(), crop=None, repeat=1, border_weight=0, seed=0, keep=slice(None)
    ):
        self.label_path = label_path or beside(data_path)
        if self.label_path is None:
            raise InputError(f"{data_path}: no 'image' in its name to replace, pass --label_path (or --val_label_path)")
        self.augment, self.crop, self.repeat = augment, crop, repeat
        self.border_weight, self.seed, self.epoch = border_weight, seed, 0
        self.weights = {}  # of some slices: forked workers have them too
        everything = pair(data_path, self.label_path)
        self.pairs = everything[keep]
        if not self.pairs:
            raise InputError(f"{data_path}: none of its {len(everything)} slices is left to train on, see --val_count")
        with ThreadPoolExecutor(4) as pool:
            bar = {"total": len(self.pairs), "leave": False, "delay": 2, "disable": True if start.rank else None}
            checks = list(tqdm(pool.map(self.check, self.pairs), "checking slices", **bar))
        if problems := [check for check in checks if isinstance(check, str)]:
            raise InputError("; ".join(problems[:20]) + f"; … and {len(problems) - 20} more" * (len(problems) > 20))
        self.names = [image[0] for image, _ in self.pairs]
        self.shapes, digests, looks = map(list, zip(*checks, strict=True))
        self.digest = hashlib.sha256(b"".join(digests)).hexdigest()
        self.values = judge(self.label_path, looks, part=len(self.pairs) < len(everything))
        side, name = min(zip(map(min, self.shapes), self.names, strict=True))
        if crop and crop > side:
            raise InputError(f"--crop {crop} is larger than slice {name}, a side of which has {side} pixels")

    def check(self, pair):
        """Read a pair, each (name, file, page) -> (shape, SHA-256, what judge() needs), or what is wrong, a string."""
        image_file, label_file = pair
        if label_file is None:
            return f"{image_file[1]}: no label of that name in {self.label_path}"
        try:
            image, label, seen = read_pair(image_file[1:], label_file[1:])
        except InputError as error:
            return str(error)
        interior = label == label.max()
        if self.border_weight and len(self.weights) * 4 * label.size < KEPT_WEIGHTS:
            self.weights[label_file] = border_weights(interior.astype(np.float32), self.border_weight)
        digest = hashlib.sha256(f"{image.dtype} {image.shape} ".encode() + image.tobytes())
        digest.update(label.tobytes() if interior.all() else interior)
        return image.shape, digest.digest(), seen

    def __len__(self):
        return len(self.pairs) * self.repeat

    def __getitem__(self, index):
        index = range(len(self))[index]  # raises IndexError, which ends `for pair in data_set`
        image_file, label_file = self.pairs[index % len(self.pairs)]
        maps = [normalise(read_slice(*image_file[1:])), read_label(*label_file[1:], self.values)]
        if self.border_weight:
            kept = label_file in self.weights
            maps.append(self.weights[label_file] if kept else border_weights(maps[1], self.border_weight))
        rng = np.random.default_rng((self.seed, self.epoch, index))
        # Flips and rotations are views with negative strides, which OneFlow refuses.
        return tuple(np.ascontiguousarray(m[None]) for m in augment(maps, rng, self.augment, self.crop))
