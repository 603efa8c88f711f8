"""The one reader of image files: finding slices, reading and normalising them.

A path names a folder of PNG, TIFF, JPEG or BMP files or one (multi-page) TIFF stack; 8 or 16 bit, integers or floats;
grey or colour.
"""

import os
import re
import threading
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from common import start
from common.arguments import InputError

import cv2
import numpy as np
import tifffile

SUFFIXES = {".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"}
CONVERT = "python3 data/prepare.py labels SOURCE OUT"  # makes labels of ours from others'
LARGE = 2**26  # pixels, beyond which a slice that takes hardly any bytes is no slice
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how a file of each kind begins
COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32773, 32946}  # of TIFF, that OpenCV reads: none, fax, LZW, JPEG, ZIP, PackBits

lock = threading.Lock()


@contextmanager
def quiet_stderr():
    """Silence what libpng, libtiff and OpenCV print to descriptor 2, past Python; one thread at a time."""
    with lock:
        kept, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(devnull)


@cache
def say_once(text):
    if start.rank == 0:
        print(text)


def list_slices(path, strict=True):
    """The slices under `path` (str or Path), as a list of (name, file, page), naturally sorted.

    `path` is a folder of images or one image file. A multi-page TIFF gives one entry a page, named `volume_0`,
    `volume_1` …; other files are named by their stem, with page 0. `2.png` comes before `10.png`. Hidden files are
    left out, files of other kinds too, which is printed.

    Raises InputError when there is nothing to read, two slices would have the same name, a TIFF is cut off or, if
    `strict`, one that OpenCV would misread.
    """
    path, others = Path(path), []
    try:
        files = [f for f in path.iterdir() if f.is_file() and f.name[0] != "."] if path.is_dir() else [path]
        if files == [path] and not path.is_file():
            raise InputError(f"{path}: no such file or folder")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    if path not in files:
        others = sorted(f.name for f in files if f.suffix.lower() not in SUFFIXES)
    files = [f for f in files if f.name not in others]
    if not files:
        raise InputError(f"{path}: holds no image (looked for {', '.join(sorted(SUFFIXES))})")
    if others:
        say_once(f"{path}: left out {', '.join(others[:5])}{', …' * (len(others) > 5)}, no images of a kind read here")

    # Digits compare as numbers; re.split alternates text and digits, so like meets like. 01 and 1 need the name too.
    files.sort(key=lambda f: ([int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", f.name)], f.name))
    slices = {}
    for file in files:
        pages = list_pages(file, strict)
        for number, page in enumerate(pages):
            name = f"{file.stem}_{number}" if len(pages) > 1 else file.stem
            if name in slices:
                raise InputError(f"{file}: has the same name as {slices[name][0]}, rename one of them")
            slices[name] = file, page
    return [(name, *where) for name, where in slices.items()]


def list_pages(file, strict):
    """The page numbers of a TIFF's slices, smaller copies of them left out; [0] for any other file.

    Raises InputError for what can't be counted or would be misread.
    """
    try:
        str(file).encode()
        with open(file, "rb") as start:
            if start.read(4) not in TIFF:
                return [0]
        with quiet_stderr(), tifffile.TiffFile(file, _multifile=False) as tiff:
            pages = list(tiff.pages)
            # tifffile takes a chain of pages that leads beyond the file's end, or back, for one that ends there.
            kind, end = tiff.tiff, tiff.filehandle
            end.seek(pages[-1].offset)
            tags = int.from_bytes(end.read(kind.tagnosize), "little" if kind.byteorder == "<" else "big")
            end.seek(tags * kind.tagsize, 1)
            after = end.read(kind.offsetsize)
            trouble = misread(tiff, pages)
            slices = [number for number, page in enumerate(pages) if not page.subfiletype & 1]
    except UnicodeEncodeError:  # OpenCV would crash on it
        raise InputError(f"{file}: is no UTF-8 name, rename the file or its folder") from None
    except OSError:
        return [0]  # it fails in read_slice, as other unreadable files do
    except Exception:  # damaged files make tifffile raise a dozen unrelated classes
        after = b""
    if after.strip(b"\0") or not after:
        raise InputError(f"{file}: is damaged or cut off, its pages can't be counted")
    if trouble and strict:
        raise InputError(f"{file}: {trouble}")
    return slices or [0]


def misread(tiff, pages):
    """What OpenCV would get wrong in a TIFF (a tifffile.TiffFile), and the way on; None where it reads it rightly."""
    ij = tiff.imagej_metadata or {}
    ome = re.search(r'SizeC="(\d+)"', tiff.ome_metadata or "")
    channels = ij.get("channels", 1) if tiff.is_imagej else int(ome[1]) if ome else 1
    if ij.get("images", 1) > len(pages):  # ImageJ's own way past 4 GB
        return "has its slices in one page, save it as a folder of images (Fiji: Save As > Image Sequence)"
    if len(pages) > channels > pages[0].samplesperpixel:  # as many channels as pages are slices of tifffile's
        return f"has {channels} channels for a slice, save one of them alone (Fiji: Image > Color > Split Channels)"
    for page in pages:
        samples, grey = page.samplesperpixel, page.photometric in (0, 1)
        if page.photometric == 0 and samples == 1:  # programs disagree about it, and OpenCV with itself
            return f"has 0 for white, save it with 0 for black (Fiji: Lookup Tables > Grays), a label by {CONVERT}"
        if page.tags.valueof(274, default=1) not in (0, 1, b"\0", b"\1"):
            return "is stored turned or mirrored, save it upright"
        if page.compression not in COMPRESSIONS:
            name = getattr(page.compression, "name", page.compression)
            return f"is compressed as {name}, which can't be read, save it uncompressed (Fiji: Save As > Tiff)"
        # Of several it leaves some out or mixes them up, but for grey of 8 bit with transparency (1, 2).
        transparent = samples == 2 and page.bitspersample == 8 and set(page.extrasamples) <= {1, 2}
        if samples > 1 and (page.planarconfig == 2 or (grey and not transparent)):
            return f"a page holds {samples} channels (slices, colours, transparency), save a grey one a page"
    return None


def read_slice(file, page=0, flags=cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH):
    """One slice as a grey array (H, W) of the file's own type: integers to 32 bit, or floats.

    Colour is turned to grey, but for OpenCV's flag IMREAD_UNCHANGED: (H, W, 3) or (H, W, 4). Raises InputError when the
    file can't be read as an image, holds values that are not finite or beyond 1e30, or unpacks to what no micrograph
    is. Training, validation and prediction read through this function; threads may share it.
    """
    pages = ()
    try:
        with open(file, "rb") as raw:
            start, size = raw.read(2), raw.seek(0, os.SEEK_END)
            raw.seek(max(0, size - 64))
            whole = start != b"\xff\xd8" or b"\xff\xd9" in raw.read()  # the end of a JPEG, which OpenCV doesn't miss
        with quiet_stderr():
            if whole:
                _, pages = cv2.imreadmulti(str(file), start=page, count=1, flags=flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except OSError as error:
        raise InputError(f"{file}: can't be read as an image ({error.strerror})") from None
    except cv2.error:  # among others: more pixels than OpenCV accepts
        pass
    if not pages:
        raise InputError(
            f"{file}: can't be read as an image, is it a whole PNG, TIFF, JPEG or BMP file, one of 8 or 16 bit or of "
            "32 bit floats, and of no more than 2^30 pixels? Fiji's File > Save As > Tiff writes one"
        )
    image = pages[0]
    if image.size > max(LARGE, 500 * size):
        raise InputError(f"{file}: unpacks to {image.size} pixels of nothing, it is no micrograph")
    if not (image.min() > -1e30 and image.max() < 1e30):  # nor is NaN
        raise InputError(f"{file}: holds values that are not finite, or beyond 1e30")
    return image


def find_border(image):
    """Where a slice (H, W) is padding: True for one value that fills an area at the slice's edge, (H, W), bool.

    Such an area has a thousandth of the slice's pixels at least, and 16 of them in a row at the edge.
    """

    def edges(array):
        return array[0], array[-1], array[:, 0], array[:, -1]

    border = np.zeros(image.shape, bool)
    for edge in edges(image) if min(image.shape) >= 16 else ():
        runs = np.convolve(edge[1:] == edge[:-1], np.ones(15), "valid") > 14.5
        for value in np.unique(edge[:-15][runs]):
            _, areas, boxes, _ = cv2.connectedComponentsWithStats((image == value).astype(np.uint8), connectivity=4)
            large = 1000 * boxes[:, cv2.CC_STAT_AREA] >= image.size
            large[0] = False  # the other values
            border |= np.isin(areas, [area for area in np.unique(np.concatenate(edges(areas))) if large[area]])
    return border


def normalise(image, border=None):
    """Slice (H, W) of any depth -> float32 (H, W) with mean 0 and standard deviation 1.

    Each slice by itself: bit depth, brightness and contrast of a microscope session drop out. Padding at its edges
    (see find_border, which is asked where `border` is not given) doesn't count and becomes 0, as does a constant slice.
    """
    border = find_border(image) if border is None else border
    image = image.astype(np.float64)
    inside = image[~border] if border.any() else image
    if inside.size == 0 or inside.min() == inside.max():
        return np.zeros(image.shape, np.float32)
    normal = ((image - inside.mean()) / inside.std()).astype(np.float32)
    normal[border] = 0
    return normal
