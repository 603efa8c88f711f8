"""Labels of this repository's kind from others': inverted, soft or coloured ones, or a number a cell.

python3 data/prepare.py labels SOURCE OUT --membrane white
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from common.arguments import InputError
from common.images import CONVERT, list_slices, quiet_stderr, read_slice

import cv2
import numpy as np
import tifffile


def as_numbers(file, page, cells):
    """A label as the program that wrote it shows it, one number a pixel (H, W); with `cells` one for each colour."""
    label = None
    try:
        with quiet_stderr(), tifffile.TiffFile(file, _multifile=False) as tiff:
            found = tiff.pages[page]
            if found.photometric < 3:  # OpenCV doesn't know all types of grey; else a palette's colours
                label = found.asarray()
            if found.photometric == 0 and "tifffile" not in found.software:  # 0 is white, which tifffile ignores
                label = label.max() - label.astype(np.int64)
    except Exception:  # no TIFF, or one that OpenCV may know
        label = None
    label = read_slice(file, page, cv2.IMREAD_UNCHANGED) if label is None else label
    if label.ndim == 2:
        return label.astype(np.uint8) if label.dtype == bool else label
    if label.ndim != 3 or label.shape[2] not in (3, 4):
        raise InputError(f"{file}: a page holds channels {label.shape}, save a grey one a page")
    colours = label[:, :, :3]
    if label.shape[2] == 4 and not np.ptp(colours, axis=(0, 1)).any():
        return label[:, :, 3]  # only the transparency says something
    if cells:
        return colours.astype(np.int64) @ (1 << 32, 1 << 16, 1)
    return cv2.cvtColor(np.ascontiguousarray(colours), cv2.COLOR_BGR2GRAY)


def interior_of(label, args, values):
    """Where a label (H, W) has the interior of cells, bool (H, W); values: the two of the whole set, if it has two."""
    if args.cells:
        interior = label != 0
        # A membrane of a pixel between cells that touch: 4-connected paths don't cross it.
        interior[:, :-1] &= (label[:, :-1] == label[:, 1:]) | (label[:, 1:] == 0)
        interior[:-1] &= (label[:-1] == label[1:]) | (label[1:] == 0)
        return interior
    white = label > args.threshold if args.threshold is not None else label == max(values)
    return white == (args.membrane == "black")


def find_values(slices, args):
    """The two values of all labels together. Raises InputError where there are others, with the flag that they need."""
    values = set()
    for _, file, page in slices:
        label = as_numbers(file, page, args.cells)
        values.update(np.unique(label).tolist())
        if len(values) > 2:
            low, high = min(values), max(values)
            soft = np.isin(label, (low, high)).mean() > 0.5
            flag = f"--threshold {(low + high) / 2:g}" if soft else "--cells"
            raise InputError(f"{file}: has more than two values, from {low:g} to {high:g}, pass {flag}")
    if len(values) < 2:
        raise InputError(f"{slices[0][1]}: all labels have one value only, {values.pop():g}")
    return values


def convert(source, out, args):
    """Write the labels of the folder or stack `source` as OUT/NAME.png and say what was made of what.

    args: membrane ("black" or "white"), threshold (a number or None), cells (bool). Raises InputError and OSError, and
    then leaves no OUT behind.
    """
    slices, shares, cells = list_slices(source, strict=False), [], []
    if out.exists():
        raise InputError(f"{out}: exists already, name a folder to make: {CONVERT}")
    values = None if args.cells or args.threshold is not None else find_values(slices, args)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as stage:
        made = Path(stage, "made")
        made.mkdir()
        for number, (name, file, page) in enumerate(slices):
            name = name if Path(source).is_dir() else number  # as slices of a folder are called most often
            interior = interior_of(as_numbers(file, page, args.cells), args, values).astype(np.uint8)
            shares.append(interior.mean())
            cells.append(cv2.connectedComponents(interior, connectivity=4)[0] - 1)
            (made / f"{name}.png").write_bytes(cv2.imencode(".png", interior * 255)[1])
        made.rename(out)
    share, other = np.mean(shares), {"black": "white", "white": "black"}[args.membrane]
    print(f"{out}: {len(slices)} labels, {share:.1%} interior, {np.mean(cells):.0f} cells a slice, from {source}")
    if share < 0.5:
        print(f"That is little interior. If membrane is {other} in {source}, remove {out}, pass --membrane {other}")
