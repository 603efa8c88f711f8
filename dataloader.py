"""Pairs of slice and label for training: reading, normalising, augmenting and weighting.

from dataloader import SelfDataSet
image, label = SelfDataSet("data/train_image", augment=("flip", "elastic"), crop=256)[0]
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

from common.arguments import InputError
from common.images import normalise, read_slice
from common.labels import beside, judge, look, pair, read_grey, read_label

import cv2
import numpy as np
from tqdm import tqdm

KEPT_WEIGHTS = 2**28  # bytes of border weights in memory, 256 slices of 512 x 512 pixels
AUGMENTATIONS = ("flip", "rotate", "elastic")


def augment(maps, rng, kinds, crop=None):
    """The same random crop, flips, rotations and deformation for all maps; `rng` is NumPy's.

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
    return [cv2.remap(m, x, y, kind, None, cv2.BORDER_REFLECT_101) for m, kind in zip(maps, kinds, strict=True)]


def border_weights(label, w0):
    """Loss weights that dwell on thin membranes, as in the U-Net paper, equation 2.

    label: float32 (H, W), 1 inside cells. Returns float32 (H, W) with mean 1, proportional to
    1 + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) on membrane and to 1 inside cells, where d1 and d2 are
    the distances to the nearest and the second nearest cell (4-connected) and sigma is 5 pixels.
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

    data_path: folder or stack of slices.
    label_path: folder or stack of labels; by default the sibling of data_path whose last component has `label` for
        `image`. Two folders pair by file name (`0.png` and `0.tif` do too), else order pairs them.
    augment: any of "flip" (both directions), "rotate" (right angles), "elastic" (smooth deformation); none by default.
    crop: side in pixels of a random square cut from each slice; None keeps it whole.
    repeat: how often an epoch sees each slice, each time with an augmentation of its own.
    border_weight: w0 of border_weights(); 0 for none.
    seed: the augmentation of item i is drawn from (seed, epoch, i), so it repeats whatever the number of workers or
        processes; set the attribute `epoch` before each epoch.
    keep: which pairs of the sorted list to use, a Python slice.

    `dataset[i]` gives (image, label), float32 arrays of shape (1, H, W): image normalised, label 0 (membrane) or 1
    (interior); with border_weight (image, label, weight). `names` and `shapes` hold each pair's name and (H, W),
    `digest` is a SHA-256 of all their pixels.

    All pairs are checked here, once. Raises InputError that lists every missing label, unreadable file, label of
    another size or of more than two values (20 of them at most), when all labels together don't have two values or
    have white membranes, or when a slice is smaller than the crop.
    """

    def __init__(
        self, data_path, label_path=None, *, augment=(), crop=None, repeat=1, border_weight=0, seed=0, keep=slice(None)
    ):
        label_path = label_path or beside(data_path)
        if label_path is None:
            raise InputError(
                f"{data_path}: no 'image' in its name for 'label' to replace, say where its labels are (--label_path, "
                "for validation --val_label_path)"
            )
        self.augment, self.crop, self.repeat = tuple(augment), crop, repeat
        self.border_weight, self.seed, self.epoch = border_weight, seed, 0
        self.weights, self.kept = {}, 0  # of some slices: forked workers have them too
        self.names, self.shapes, self.pairs, looks, digests, problems = [], [], [], [], [], []
        everything = pair(data_path, label_path)
        pairs = everything[keep]
        for ((name, *image), label), checked in zip(pairs, self.check_all(pairs, label_path), strict=True):
            if isinstance(checked, InputError):
                problems.append(str(checked))
                continue
            shape, digest, seen = checked
            self.names.append(name)
            self.shapes.append(shape)
            self.pairs.append((tuple(image), label[1:]))
            looks.append(seen)
            digests.append(digest)
        if problems:
            more = f"; … and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise InputError("; ".join(problems[:20]) + more)
        self.digest = hashlib.sha256(b"".join(digests)).hexdigest()
        self.values = judge(label_path, looks, part=len(pairs) < len(everything)) if looks else None
        if crop and crop > min(map(min, self.shapes), default=crop):
            small = min(zip(self.shapes, self.names, strict=True), key=lambda item: min(item[0]))
            raise InputError(f"--crop {crop} is larger than slice {small[1]} of {small[0]} pixels")

    def check_all(self, pairs, label_path):
        """check() each pair -> an iterator of what it returns, or of the InputError that it raises."""

        def result(pair):
            try:
                return self.check(*pair, label_path)
            except InputError as error:
                return error

        # disable=None: no bar where stderr is a file
        hidden = None if os.environ.get("RANK", "0") in ("", "0") else True
        bar = tqdm(total=len(pairs), desc="checking slices", leave=False, delay=2, disable=hidden)
        with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool, bar:
            for one in pool.map(result, pairs):
                bar.update()
                yield one

    def check(self, slice_file, label_file, label_path):
        """Read a pair, each (name, file, page) -> (shape, SHA-256 of its pixels, look() of it). Raises InputError."""
        if label_file is None:
            raise InputError(f"{slice_file[1]}: no label of that name in {label_path}")
        image, label = read_slice(*slice_file[1:]), read_grey(*label_file[1:])
        if label.shape != image.shape:
            raise InputError(f"{label_file[1]}: {label.shape}, but its slice has {image.shape} pixels")
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
        slice_file, label_file = self.pairs[index % len(self.pairs)]
        maps = [normalise(read_slice(*slice_file)), read_label(*label_file, self.values)]
        if self.border_weight:
            weights = self.weights.get(label_file)
            maps.append(border_weights(maps[1], self.border_weight) if weights is None else weights)
        rng = np.random.default_rng((self.seed, self.epoch, index))
        maps = augment(maps, rng, self.augment, self.crop)
        # Flips and rotations are views with negative strides, which OneFlow refuses.
        return tuple(np.ascontiguousarray(m[None]) for m in maps)
