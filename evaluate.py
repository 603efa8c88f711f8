"""The ISBI 2012 challenge's scores of a prediction, beside those of two floors.

    python3 evaluate.py --prediction predict_image --label data/test_label
    python3 evaluate.py --prediction submission.tif --label labels.tif --json scores.json

A prediction is P(interior) of each slice: a folder as predict_unet_test.py writes it (its NAME_prob.png count), a
folder of images, or a stack; integers from 0 to the type's largest value, masks of 0 and 255 or 0 and 1, or floats from
0 to 1. Two folders pair by name, else order pairs. Slices without a label are left out. The floors are what a
prediction scores that calls everything interior, and the blurred slices, searched beside the labels under their
folder's name with `image` for `label`. common/scores.py says what the scores are.
"""

import ctypes
import json
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

from common import start
from common.arguments import InputError, Parser, given_path
from common.files import check_output, write_whole
from common.images import list_slices, read_slice
from common.labels import beside, judge, look, pair, read_label, read_pair
from common.pictures import stretch
from common.scores import SCORES, THRESHOLDS, best, combine, count

import cv2
import numpy as np
from tqdm import tqdm

BLUR = 2  # pixels, the standard deviation


def find_scale(path, files):
    """The value that stands for P(interior) = 1 in a prediction's files, each (file, page).

    1 for floats, 1 or 255 for masks, else the largest value of their type. Raises InputError for other values.
    """
    highest, masks, full = 0, {1, 255}, 1
    for file, page in files:
        image = read_slice(file, page)
        if np.issubdtype(image.dtype, np.unsignedinteger):
            full = np.iinfo(image.dtype).max
            masks = {value for value in masks if np.isin(image, (0, value)).all()}
        elif image.min() < -1e-6 or image.max() > 1 + 1e-6:  # an average of ones may be rounded up
            raise InputError(f"{file}: holds {image.min():g} to {image.max():g}, not probabilities from 0 to 1")
        highest = max(highest, image.max())
    if full == 1 or highest == 0:
        return 1
    if masks and masks != {full}:
        print(f"{path}: taken for masks of 0 and {max(masks)}")
    elif highest < full / 16:  # nowhere interior
        raise InputError(f"{path}: holds no value above {highest}: neither 0 to {full} nor masks of 0 and 255 or 1")
    return max(masks, default=full)


def blurred(file, page, _):
    """The brightness of a slice, blurred, from 0 to 1: what a prediction has to be better than."""
    return stretch(cv2.GaussianBlur(read_slice(file, page).astype(np.float32), (0, 0), BLUR))


def predicted(file, page, scale):
    """P(interior) of a slice, (H, W), float32; scale: the value that stands for 1."""
    return read_slice(file, page).astype(np.float32) / np.float32(scale)


def look_at(files, labels):
    """look() at each label with its image. Raises InputError for an image that isn't as large as its label."""
    return [look(*reversed(read_pair(*each))) for each in zip(files, labels, strict=True)]


def score(job):
    """count() of one slice; job: (what reads it or None, its file, its page, scale, the label's file, its values)."""
    reader, *file, label_file, values = job
    interior = read_label(*label_file, values) > 0
    return count(reader(*file) if reader else np.ones(interior.shape, bool), interior)


def find_jobs(args):
    """What to score -> {name: a list of jobs for score()}, of the prediction and its floors.

    All files are read once, before minutes of work. Raises InputError.
    """
    predictions = pair(args.prediction, args.label, "_prob")
    without = {name for name, *_ in list_slices(args.label)} - {label[0] for _, label in predictions if label}
    if without:
        raise InputError(f"{args.label}: has {min(without)}, but {args.prediction} does not")
    files, labels = zip(*((one[1:], label[1:]) for one, label in predictions if label), strict=True)
    if len(files) < len(predictions):
        print(f"{len(predictions) - len(files)} of {len(predictions)} slices have no label: scoring the other ones")
    scale, looks, where = find_scale(args.prediction, files), look_at(files, labels), "prediction"
    readers = {"prediction": (predicted, files), "all_interior": (None, files)}
    given = args.image or beside(Path(args.label).resolve(), "label", "image")
    # What lies beside the labels may be other slices: nobody said that they belong here.
    with suppress(*() if args.image else (InputError,)):
        if given:
            slice_of = {label[1:]: one[1:] for one, label in pair(given, args.label) if label}
            missing = [file for file in labels if file not in slice_of]
            if missing:
                raise InputError(f"{given}: has no slice for {missing[0][0]}")
            slices = [slice_of[file] for file in labels]
            looks, where = look_at(slices, labels), "slices"
            readers["blurred_slices"] = blurred, slices
    values = judge(args.label, looks, where)
    return {
        name: [(reader, *file, scale, label, values) for file, label in zip(files, labels, strict=True)]
        for name, (reader, files) in readers.items()
    }


def table(results, slices):
    """The lines to print of {"prediction": scores, and the floors}."""
    floors, middle = [name for name in results if name != "prediction"], list(THRESHOLDS).index(0.5)
    titles = "".join(f"{name.replace('_', ' '):>16}" for name in floors)
    yield f"{f'{slices} slices':20}    best    P>  at 0.5{titles}"
    for name, (title, _) in SCORES.items():
        value, threshold = best(results["prediction"], name)
        line = f"{title:20}{value:8.4f}{threshold:6.1f}{results['prediction'][name][middle]:8.4f}"
        yield line + "".join(f"{best(results[floor], name)[0]:16.4f}" for floor in floors)


def as_json(results):
    """What --json writes: all scores at all thresholds, the best ones, the floors."""
    written = {what: {name: values.tolist() for name, values in found.items()} for what, found in results.items()}
    for what, found in results.items():
        bests = {name: best(found, name) for name in SCORES}
        for i, key in enumerate(("best", "best_threshold")):
            written[what][key] = {name: pair[i] for name, pair in bests.items()}
    return {"thresholds": THRESHOLDS.tolist(), **written.pop("prediction"), "floors": written}


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prediction", type=given_path, required=True, help="folder or stack of P(interior)")
    add("--label", type=given_path, required=True, help="folder or stack of labels, white = interior")
    add("--image", type=given_path, help="slices, for the floor (default: those beside the labels)")
    add("--json", type=given_path, metavar="FILE", help="write all scores at all thresholds")
    return parser.parse_args()


def end_with_parent():
    """A worker of ours would wait for ever for a script that Ctrl-C has ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main():
    args = parse_args()
    jobs = find_jobs(args)
    everything = [job for some in jobs.values() for job in some]
    if args.json:
        check_output(args.json)
        images = {
            os.path.realpath(file) for _, slice_file, *_, label, _ in everything for file in (slice_file, label[0])
        }
        if os.path.realpath(args.json) in images:
            raise InputError(f"--json {args.json}: is one of the images, choose another name")
    start.keep("nothing was written")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=end_with_parent) as pool:
        counts = list(tqdm(pool.map(score, everything), "scoring", len(everything), leave=False, disable=None))
    results = {name: combine(some) for name, some in zip(jobs, np.split(np.array(counts), len(jobs)), strict=True)}
    print("\n".join(table(results, len(jobs["prediction"]))))
    if "blurred_slices" not in jobs:
        print("no floor of blurred slices: --image says where the slices are")
    if args.json:
        with write_whole(args.json) as file:
            file.write(json.dumps(as_json(results), indent=1).encode())


if __name__ == "__main__":
    start.run(main)
