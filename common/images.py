"""The one reader of image files: finding slices, reading and normalising them.

A path names a folder of PNG, TIFF, JPEG or BMP files or one (multi-page) TIFF stack; integers or floats; grey or
colour.
"""

import os
import re
import threading
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from common import start
from common.arguments import InputError

import cv2
import numpy as np
import tifffile
from skimage.morphology import remove_small_objects
from skimage.segmentation import clear_border

SUFFIXES = {".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"}
CONVERT = "python3 data/prepare.py labels SOURCE OUT"  # makes labels of ours from others'
LARGE = 2**26  # pixels, beyond which a slice that takes hardly any bytes is no slice
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how a file of each kind begins

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


def list_slices(path):
    """The slices under `path` (str or Path), as a list of (name, file, page), naturally sorted: 2.png before 10.png.

    A multi-page TIFF gives one entry a page, named `volume_0`, `volume_1` …; other files are named by their stem, with
    page 0. Hidden files are left out, files of other kinds too, which is printed. Raises InputError when there is
    nothing to read, two slices would have the same name, or list_pages() does.
    """
    path = Path(path)
    try:
        files = [f for f in path.iterdir() if f.is_file() and f.name[0] != "."] if path.is_dir() else [path]
        if files == [path] and not path.is_file():
            raise InputError(f"{path}: no such file or folder")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    others = sorted(f.name for f in files if f.suffix.lower() not in SUFFIXES and f != path)
    if len(files) == len(others):
        raise InputError(f"{path}: holds no image (looked for {', '.join(sorted(SUFFIXES))})")
    if set(others) - {"cells.csv"}:  # which is ours
        say_once(f"{path}: left out {', '.join(others[:5])}{', …' * (len(others) > 5)}, no images of a kind read here")

    # Digits compare as numbers; re.split alternates text and digits, so like meets like. 01 and 1 need the name too.
    files.sort(key=lambda f: ([int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", f.name)], f.name))
    slices = {}
    for file in (f for f in files if f.name not in others):
        pages = list_pages(file)
        for number, page in enumerate(pages):
            name = f"{file.stem}_{number}" if len(pages) > 1 else file.stem
            if name in slices:
                raise InputError(f"{file}: has the same name as {slices[name][0]}, rename one of them")
            slices[name] = file, page
    return [(name, *where) for name, where in slices.items()]


def list_pages(file):
    """The page numbers of a TIFF's slices, smaller copies of them left out; [0] for any other file.

    Raises InputError for what can't be counted, or has not a page for each slice.
    """
    try:
        with open(file, "rb") as raw:
            if raw.read(4) not in TIFF:
                return [0]
        with quiet_stderr(), tifffile.TiffFile(file, _multifile=False) as tiff:
            slices = [number for number, page in enumerate(tiff.pages) if not page.subfiletype & 1]
            pages, series, mode = len(tiff.pages), tiff.series[0], (tiff.imagej_metadata or {}).get("mode")
            channels = dict(zip(series.axes, series.shape, strict=True)).get("C", 1)
            # An OME-TIFF's slices may be in other files.
            within = not tiff.is_ome and series.size > pages * series.keyframe.size
            # tifffile takes a chain of pages that leads beyond the file's end, or back, for one that ends there.
            tiff.filehandle.seek(tiff.pages.next_page_offset)
            broken = tiff.filehandle.read(tiff.tiff.offsetsize) not in (bytes(4), bytes(8))
    except OSError:
        return [0]  # it fails in read_page(), as other unreadable files do
    except Exception:  # damaged files make tifffile raise a dozen unrelated classes
        broken = True
    if broken:
        trouble = "is damaged or cut off, its pages can't be counted"
    elif within:  # ImageJ's own way past 4 GB
        trouble = "has its slices in one page, save it as a folder of images (Fiji: Save As > Image Sequence)"
    elif channels > 1 and (pages > channels or mode in ("composite", "color")):
        trouble = f"has {channels} channels for a slice, save one alone (Fiji: Image > Color > Split Channels)"
    else:
        if 1 < channels == pages:  # as tifffile writes slices
            say_once(f"{file}: its {channels} channels are taken for slices")
        return slices or [0]
    raise InputError(f"{file}: {trouble}")


def read_slice(file, page=0):
    """One slice as a grey array (H, W) of the file's own type, integers or floats. Raises InputError, see read_page().

    Training, validation and prediction read through this function.
    """
    return read_page(file, page, grey=True)[0]


def read_page(file, page=0, grey=False):
    """A page of an image file as the program that wrote it shows it -> (pixels, whether a palette colours them).

    pixels: (H, W), integers or floats; or, unless `grey`, (H, W, 3) or (H, W, 4): blue, green, red, opacity. Raises
    InputError when the file can't be read as an image, holds values that are not finite or beyond 1e30, or unpacks to
    what no micrograph is. Threads may share it.
    """
    image, kind = None, ""
    try:
        with quiet_stderr(), open(file, "rb") as raw:
            head, size = raw.read(26), raw.seek(0, os.SEEK_END)
            raw.seek(max(0, size - 64))
            if head[:2] == b"\xff\xd8" and b"\xff\xd9" not in raw.read():
                raise InputError(f"{file}: is a JPEG that is cut off")  # of which OpenCV makes up the rest
            most, palette = max(LARGE, 500 * size), head[:4] == b"\x89PNG" and head[25:] == b"\3"
            if head[:4] in TIFF:
                image, palette, kind = read_tiff(file, page, most)
            if image is None:
                data = np.fromfile(file, np.uint8)
                image = cv2.imdecodemulti(data, cv2.IMREAD_UNCHANGED, range=(page, page + 1))[1][0]
            if grey and image.ndim > 2:
                image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file}: can't be read as an image ({error.strerror})") from None
    except Exception:  # tifffile's, OpenCV's, also for more than 2^30 pixels, or there is no such page
        what = f"is it a whole PNG, TIFF{kind}, JPEG or BMP file, of no more than 2^30 pixels"
        raise InputError(
            f"{file}: can't be read as an image, {what}? Fiji's File > Save As > Tiff writes one"
        ) from None
    sound = 0 < image.size <= most and image.dtype.kind != "c"
    if not (sound and image.min() > -1e30 and image.max() < 1e30):  # nor is NaN
        trouble = f"{image.size} pixels of nothing, or values that are not finite, complex or beyond 1e30"
        raise InputError(f"{file}: is no micrograph, it holds {trouble}")
    return image, palette


def read_tiff(file, page, most):
    """A page of a TIFF -> (pixels, whether a palette colours them, how they are packed), see read_page().

    The pixels are None where OpenCV is to read them: more than `most`, colours, and what tifffile can't unpack here.
    Raises InputError for what programs read in several ways.
    """
    with tifffile.TiffFile(file, _multifile=False) as tiff:
        found, image = tiff.pages[page], None
        grey, samples = found.photometric < 2, found.samplesperpixel
        if found.tags.valueof(274, default=1) not in (0, 1, b"\0", b"\1"):
            raise InputError(f"{file}: is stored turned or mirrored, save it upright")
        # OpenCV mixes them up, but for colours and for grey of 8 bit with opacity (1, 2).
        opacity = samples == 2 and found.bitspersample == 8 and set(found.extrasamples) <= {1, 2}
        if samples > 1 and (found.planarconfig == 2 or (grey and not opacity)):
            raise InputError(f"{file}: a page holds {samples} channels, save a grey one a page")
        if grey and samples == 1 and found.size <= most:
            with suppress(Exception):
                image = found.asarray()
        if found.photometric == 0 and 262 in found.tags:
            if image is None:
                raise InputError(f"{file}: has 0 for white, save it with 0 for black (Fiji: Lookup Tables > Grays)")
            if not tiff.is_shaped and "tifffile" not in tiff.pages.first.software:  # which has 0 for black nevertheless
                image = -image if image.dtype.kind == "f" else ~image
        if image is not None and image.dtype == bool:
            image = np.uint8(255) * image
        return image, found.photometric == 3, f" (this one is {found.compression!s})"


def find_border(image):
    """Where a slice (H, W) is padding: True for one value that fills an area at the slice's edge, (H, W), bool.

    Such an area has a thousandth of the slice's pixels at least, and 16 of them in a row at the edge.
    """
    border = np.zeros(image.shape, bool)
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]) if min(image.shape) >= 16 else ():
        runs = np.convolve(edge[1:] == edge[:-1], np.ones(15), "valid") > 14.5
        for value in np.unique(edge[:-15][runs]):
            same = image == value
            border |= remove_small_objects(same & ~clear_border(same), image.size / 1000)
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
