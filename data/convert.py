"""Labels of this repository's kind from others': inverted, soft or coloured ones, or a number a cell.

python3 data/prepare.py labels SOURCE OUT --membrane white
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from common.arguments import InputError
from common.images import CONVERT, list_slices, read_page
from common.labels import refuse

import cv2
import numpy as np


def as_numbers(file, page, cells):
    """A label as one number a pixel (H, W): a grey value, with `cells` a number for each colour."""
    label, _ = read_page(file, page)
    if label.ndim == 2:
        return label
    colours = label[:, :, :3]
    if label.shape[2] == 4 and not np.ptp(colours, axis=(0, 1)).any():
        return label[:, :, 3]  # only the transparency says something
    if cells:
        return colours.astype(np.int64) @ (1 << 32, 1 << 16, 1)
    return cv2.cvtColor(label, cv2.COLOR_BGR2GRAY)


def interior_of(label, args, white):
    """Where a label (H, W) has the interior of cells, bool (H, W); white: the value that is, without a threshold."""
    if args.cells:
        interior = label != 0
        # A membrane of a pixel between cells that touch: 4-connected paths don't cross it.
        interior[:, :-1] &= (label[:, :-1] == label[:, 1:]) | (label[:, 1:] == 0)
        interior[:-1] &= (label[:-1] == label[1:]) | (label[1:] == 0)
        return interior
    white = label == white if args.threshold is None else label > args.threshold
    return white == (args.membrane == "black")


def convert(source, out, args):
    """Write the labels of the folder or stack `source` as OUT/NAME.png and say what was made of what.

    args: membrane ("black" or "white"), threshold (a number or None), cells (bool). Raises InputError and OSError, and
    then leaves no OUT behind.
    """
    slices, found, values = list_slices(source), [], set()
    if args.cells and (args.threshold is not None or args.membrane == "white"):
        raise InputError("--cells goes with neither --threshold nor --membrane white: in such labels 0 is membrane")
    if out.exists():
        raise InputError(f"{out}: exists already, name a folder to make: {CONVERT}")
    for _, file, page in slices if not args.cells and args.threshold is None else ():
        label = as_numbers(file, page, False)
        values.update(np.unique(label).tolist())
        if len(values) > 2:
            refuse(file, values, label)
    if len(values) == 1:
        refuse(source, values)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as stage:
        made = Path(stage, "made")
        made.mkdir()
        for number, (name, file, page) in enumerate(slices):
            name = name if Path(source).is_dir() else number  # as slices of a folder are called most often
            interior = interior_of(as_numbers(file, page, args.cells), args, max(values, default=0)).astype(np.uint8)
            found.append((interior.mean(), cv2.connectedComponents(interior, connectivity=4)[0] - 1))
            (made / f"{name}.png").write_bytes(cv2.imencode(".png", interior * 255)[1])
        made.rename(out)
    share, cells = np.mean(found, axis=0)
    print(f"{out}: {len(slices)} labels, {share:.1%} interior, {cells:.0f} cells a slice, from {source}")
    if share < 0.5 and not args.cells:
        other = "white" if args.membrane == "black" else "black"
        print(f"That is little interior. If membrane is {other} in {source}, remove {out}, pass --membrane {other}")
