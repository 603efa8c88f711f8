"""Labels, white where a cell's interior is, black on membrane: pairing, reading, judging the values of a whole set."""

from pathlib import Path

from common.arguments import InputError
from common.images import CONVERT, list_slices, normalise, read_page, read_slice

import numpy as np


def beside(path, given="image", wanted="label"):
    """Where the labels of slices are, unless said: `path` with its name's last `image` replaced; None without one."""
    path = Path(path)
    return path.with_name(wanted.join(path.name.rsplit(given, 1))) if given in path.name else None


def pair(path, label_path, suffix=""):
    """Slices and labels, each (name, file, page), as [(slice, label or None)]: folders by name, whatever the kinds,
    else by order, of one length or InputError. If names of slices end in `suffix`, only those count, without it."""
    slices, labels = list_slices(path), list_slices(label_path)
    slices = [(name.removesuffix(suffix), *where) for name, *where in slices if name.endswith(suffix)] or slices
    if Path(path).is_dir() and Path(label_path).is_dir():
        of_name = {label[0]: label for label in labels}
        return [(one, of_name.get(one[0])) for one in slices]
    if len(slices) != len(labels):  # of a stack, page by page, names don't matter
        raise InputError(f"{path}: {len(slices)} slices, but {label_path} has {len(labels)} labels")
    return list(zip(slices, labels, strict=True))


def read_label(file, page=0, values=None):
    """A label as float32 (H, W), 1 is interior. values: judge()'s, by default its own two. Raises as read_grey()."""
    label = read_grey(file, page)
    return (label == (values[1] if values else label.max())).astype(np.float32)


def read_grey(file, page=0):
    """A label (H, W) of at most two values as it is in the file. Raises InputError for any other, saying what it is."""
    label, palette = read_page(file, page)
    colours = np.atleast_3d(label)
    transparent = colours.shape[2] == 4 and np.ptp(colours[:, :, 3])
    if palette or transparent or np.ptp(colours[:, :, :3], axis=2).any():
        kind = "a palette" if palette else "transparency" if transparent else "colours"
        flags = "--threshold 127, or --cells where each cell has a colour"
        raise InputError(f"{file}: has {kind}, a label is black and white: {CONVERT} {flags}")
    label = colours[:, :, 0]
    if not ((label == label.min()) | (label == label.max())).all():
        refuse(file, np.unique(label).tolist(), label)
    return label


def refuse(path, values, label=None):
    """Raise InputError for labels that haven't two values, with the flags that convert such as `label`, (H, W)."""
    flags = "--threshold N (interior is above N), or --cells (each number is a cell)"
    if label is not None and len(values) >= 10:  # what fewer mean is not ours to guess
        # Between its lowest and highest value a label of numbered cells is flat, soft edges are not.
        low, high, here = min(values), max(values), label[1:, 1:]
        between, flat = (here != low) & (here != high), (here == label[:-1, 1:]) & (here == label[1:, :-1])
        flags = "--cells" if 2 * flat[between].sum() > between.sum() else f"--threshold {(low + high) / 2:.6g}"
    some = ", ".join(f"{value:g}" for value in sorted(values)[:6]) + ", …" * (len(values) > 6)
    text = f"{path}: has {len(values)} values ({some}), labels have two, membrane and interior"
    raise InputError(text + f": {CONVERT} {flags}" * (len(values) > 2))


def read_pair(file, label_file):
    """A slice and its label, each (file, page) -> two arrays (H, W), and what judge() needs of them: {value of the
    label: (pixels, their brightness)}. Raises InputError, also for other sizes."""
    image, label = read_slice(*file), read_grey(*label_file)
    if label.shape != image.shape:
        raise InputError(f"{label_file[0]}: {label.shape}, but {file[0]} has {image.shape} pixels")
    light, values = normalise(image), {label.min(), label.max()}
    return image, label, {v.item(): ((label == v).sum(), light[label == v].sum()) for v in values}


def judge(label_path, looks, seen=True, part=False):
    """(membrane, interior), the two values of a set of labels, by read_pair(). seen: whether with their slices. part:
    whether they are some of the labels, which may have one value. Raises InputError for other numbers of values, or
    for an interior like membrane: less than half of all pixels and, where slices are seen, darker than the rest."""
    values = sorted(set().union(*looks))
    if part and values in ([0], [1], [255]):
        return 0, max(*values, 1)
    if len(values) != 2:
        refuse(label_path, values)
    (dark_pixels, dark), (pixels, light) = (np.sum([one[v] for one in looks if v in one], axis=0) for v in values)
    if pixels < dark_pixels and not (seen and light / pixels >= dark / dark_pixels):
        text = f"{label_path}: its white parts are {pixels / (pixels + dark_pixels):.0%} of the pixels"
        why = " and dark in the slices, so membrane" if seen else ": if interior, pass --image, if membrane"
        raise InputError(f"{text}{why}: {CONVERT.replace('SOURCE', str(label_path))} --membrane white")
    return tuple(values)
