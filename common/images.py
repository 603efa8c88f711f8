"""The one reader of slices: folders of PNG, TIFF, JPEG or BMP files or one TIFF stack; any depth; grey or colour."""

import os
import re
import threading
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from common.arguments import InputError

import cv2
import numpy as np
import tifffile
from skimage import morphology, segmentation

SUFFIXES = {".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"}
CONVERT = "python3 data/prepare.py labels SOURCE OUT"  # makes labels of ours from others'
WHOLE = "is it a whole PNG, TIFF, JPEG or BMP file, of up to 2^30 pixels? Fiji's Save As > Tiff writes one"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how a file of each kind begins

lock = threading.Lock()
print_once = cache(print)


@contextmanager
def quiet_stderr():
    """Silence what libpng, libtiff and OpenCV print to descriptor 2, past Python; one thread at a time."""
    with lock, open(os.devnull, "w") as devnull, os.fdopen(os.dup(2), "w") as kept, ExitStack() as undo:
        undo.callback(os.dup2, kept.fileno(), 2)
        os.dup2(devnull.fileno(), 2)
        yield


@contextmanager
def reading(path):
    """quiet_stderr(), and what is raised becomes an InputError that begins with `path`."""
    try:
        with quiet_stderr():
            yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # damaged files make tifffile and OpenCV raise a dozen unrelated classes
        why = getattr(error, "strerror", None) or WHOLE
        raise InputError(f"{path}: can't be read ({why})") from None


def list_slices(path):
    """The slices under `path` (str or Path) as [(name, file, page)], naturally sorted: 2.png before 10.png. A stack's
    pages are named `volume_0`, `volume_1` …, other slices as their files. Hidden files are left out; those of other
    kinds too, which is printed. Raises InputError for nothing to read, two slices of one name, or as list_pages()."""
    path = Path(path)
    with reading(path):
        files = [f for f in (path.iterdir() if path.is_dir() else [path]) if f.is_file()]
    images = [f for f in files if f == path or (f.suffix.lower() in SUFFIXES and f.name[0] != ".")]
    if not images:
        trouble = "holds no image" if path.exists() else "no such file or folder"
        raise InputError(f"{path}: {trouble} (looked for {', '.join(sorted(SUFFIXES))})")
    others = sorted(f.name for f in set(files) - set(images) if f.name[0] != "." and f.name != "cells.csv")  # ours
    if others:
        print_once(f"{path}: left out {', '.join(others[:5])}{', …' * (len(others) > 5)}, files of kinds not read here")
    # Digits compare as numbers; re.split alternates text and digits, so like meets like. 01 and 1 need the name too.
    images.sort(key=lambda f: ([int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", f.name)], f.name))
    slices = {}
    for file in images:
        pages = list_pages(file)
        for number, page in enumerate(pages):
            name = f"{file.stem}_{number}" if len(pages) > 1 else file.stem
            if name in slices:
                raise InputError(f"{file}: has the same name as {slices[name][1]}, rename one of them")
            slices[name] = name, file, page
    return list(slices.values())


def list_pages(file):
    """The page numbers of a file's slices, without a TIFF's smaller copies. Raises InputError where pages aren't."""
    with reading(file), open(file, "rb") as raw:
        if raw.peek(4)[:4] not in TIFF:
            return [0]
        tiff = tifffile.TiffFile(raw, _multifile=False)
        slices = [number for number, page in enumerate(tiff.pages) if not page.subfiletype & 1]
        pages, series, channels = len(tiff.pages), tiff.series[0], tiff.series[0].sizes.get("channel", 1)
        # tifffile takes a chain of pages that leads beyond the file's end, or back, for one that ends there.
        tiff.filehandle.seek(tiff.pages.next_page_offset)
        if tiff.filehandle.read(tiff.tiff.offsetsize) not in (bytes(4), bytes(8)):
            raise InputError("is damaged or cut off, its pages can't be counted")
        if series.size > pages * series.keyframe.size and not tiff.is_ome:  # ImageJ's; OME's may be in other files
            raise InputError("has its slices in one page, save them as files (Fiji: Save As > Image Sequence)")
        if channels > 1 and (pages > channels or (tiff.imagej_metadata or {}).get("mode") in ("composite", "color")):
            raise InputError(f"has {channels} channels for a slice, save one (Fiji: Image > Color > Split Channels)")
    if 1 < channels == pages:  # as tifffile writes slices
        print_once(f"{file}: its {channels} channels are taken for slices")
    return slices or [0]


def read_slice(file, page=0):
    """One slice as a grey array (H, W) of the file's own type, for training and prediction alike; see read_page()."""
    return read_page(file, page, grey=True)[0]


def read_page(file, page=0, grey=False):
    """A page of an image file as the program that wrote it shows it -> (pixels, whether a palette colours them). Pixels
    are (H, W), integers or floats, or unless `grey` (H, W, 3 or 4): blue, green, red, opacity. Raises InputError for
    what can't be read, isn't finite or beyond 1e30, or unpacks to what no micrograph is. Threads may share it."""
    with reading(file):
        head = np.fromfile(file, np.uint8, 26).tobytes()
        palette = head[:4] == b"\x89PNG" and head[25:] == b"\3"
        most = max(2**26, 500 * os.path.getsize(file))  # more pixels in hardly any bytes are no slice
        image, palette, kind = read_tiff(file, page, most) if head[:4] in TIFF else (None, palette, "")
        if image is None:
            data = np.fromfile(file, np.uint8)
            found = cv2.imdecodemulti(data, cv2.IMREAD_UNCHANGED, range=(page, page + 1))[1]
            cut_off = head[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-64:].tobytes()  # OpenCV fills up JPEGs
            if cut_off or not found:
                raise InputError(f"can't be read as an image{kind}, {WHOLE}")
            image = found[0]
        if grey and image.ndim > 2:
            image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        if not (0 < image.size <= most and image.dtype.kind != "c" and image.min() > -1e30 and image.max() < 1e30):
            raise InputError(f"is no micrograph: {image.size} pixels of nothing, or complex, not finite or beyond 1e30")
    return image, palette


def read_tiff(file, page, most):
    """read_page() of a TIFF -> (pixels, None where OpenCV is to read them; whether a palette colours them; how they are
    packed, to be said). Raises what tifffile does, and InputError for what programs read in several ways."""
    with tifffile.TiffFile(file, _multifile=False) as tiff:
        found, image = tiff.pages[page], None
        grey, samples = found.photometric < 2, found.samplesperpixel
        if found.tags.valueof(274, default=1) not in (0, 1, b"\0", b"\1"):
            raise InputError("is stored turned or mirrored, save it upright")
        opacity = samples == 2 and found.bitspersample == 8 and set(found.extrasamples) <= {1, 2}  # OpenCV reads it
        if samples > 1 and (found.planarconfig == 2 or (grey and not opacity)):
            raise InputError(f"a page holds {samples} channels, save a grey one a page")
        if grey and samples == 1 and found.size <= most:
            with suppress(Exception):
                image = found.asarray()
                image = np.uint8(255) * image if image.dtype == bool else image
        if found.photometric == 0 and 262 in found.tags:
            if image is None:
                raise InputError("has 0 for white, save it with 0 for black (Fiji: Lookup Tables > Grays)")
            if not tiff.is_shaped and "tifffile" not in tiff.pages.first.software:  # which has 0 for black nevertheless
                image = -image if image.dtype.kind == "f" else ~image
        return image, found.photometric == 3, f" (this one is {found.compression!s})"


def find_border(image):
    """Where a slice (H, W) is padding, bool (H, W): one value that fills an area at its edge, of a thousandth of its
    pixels at least, 16 of them in a row at the edge."""
    border = np.zeros(image.shape, bool)
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]) if min(image.shape) >= 16 else ():
        runs = np.convolve(edge[1:] == edge[:-1], np.ones(15), "valid") > 14.5
        for value in np.unique(edge[:-15][runs]):
            same = image == value
            border |= morphology.remove_small_objects(same & ~segmentation.clear_border(same), image.size / 1000)
    return border


def normalise(image, border=None):
    """Slice (H, W) of any depth -> float32 (H, W), by itself of mean 0 and standard deviation 1, so that brightness and
    contrast drop out. Padding, find_border()'s by default, doesn't count and becomes 0, as does a constant slice."""
    border = find_border(image) if border is None else border
    image = image.astype(np.float64)
    inside = image[~border] if border.any() else image
    if inside.size == 0 or inside.min() == inside.max():
        return np.zeros(image.shape, np.float32)
    return np.where(border, 0, (image - inside.mean()) / inside.std()).astype(np.float32)
