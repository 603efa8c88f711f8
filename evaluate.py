"""The ISBI 2012 challenge's scores of a prediction, beside those of two floors.

    python3 evaluate.py --prediction predict_image --label data/test_label --per_slice --picture worst.png
    python3 evaluate.py --prediction submission.tif --label labels.tif --threshold 0.4 --json scores.json

A prediction is P(interior) of each slice: a folder as predict_unet_test.py writes it (its NAME_prob.png count), a
folder of images, or a stack; integers from 0 to the type's largest value, masks of 0 and 255 or 0 and 1, or floats from
0 to 1. Two folders pair by name, else order pairs. Slices without a label are left out. Beside the best scores stand
those of the NAME_mask.png, where all slices have one, else those at --threshold; --per_slice and --picture show the
same. The floors are what a prediction scores that calls everything interior, and the blurred slices, searched beside
the labels under their folder's name with `image` for `label`. common/scores.py says what the scores are.
"""

import ctypes
import json
import os
import signal
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path

from common import start
from common.arguments import InputError, Parser, given_path, number
from common.files import check_output, write_whole
from common.images import SUFFIXES, list_slices, read_slice
from common.labels import beside, judge, look, pair, read_label, read_pair
from common.pictures import ORANGE, paint, stretch
from common.scores import SCORES, SMALLEST, THRESHOLDS, best, combine, count, count_cells, find_faults, thin

import cv2
import numpy as np
from tqdm import tqdm

BLUR = 2  # pixels, the standard deviation
ROW = "{slice:20}{v_rand:8.4f}{v_info:8.4f}{pixel_misclassification:19.4f}{cells_in_label:16}{cells_found:7}"

# What to score: a kind (the prediction, its masks, a floor), a slice and its label, each (name, file, page), the value
# in the slice that stands for P(interior) = 1, and the labels' two values.
Job = namedtuple("Job", "kind slice label scale values")


def find_scale(path, slices):
    """The value that stands for P(interior) = 1 in a prediction's slices, each (name, file, page).

    1 for floats, 1 or 255 for masks, else, and for NAME_prob, their type's largest value. Raises InputError for others.
    """
    highest, masks, full = 0, {1, 255}, 1
    for _, file, page in slices:
        image = read_slice(file, page)
        if np.issubdtype(image.dtype, np.unsignedinteger):
            full = np.iinfo(image.dtype).max
            masks = {value for value in masks if np.isin(image, (0, value)).all()}
        elif image.min() < -1e-6 or image.max() > 1 + 1e-6:  # an average of ones may be rounded up
            raise InputError(f"{file}: holds {image.min():g} to {image.max():g}, not probabilities from 0 to 1")
        highest = max(highest, image.max())
    if full == 1 or highest == 0 or all(file.stem.endswith("_prob") for _, file, _ in slices):
        return full
    if masks and masks != {full}:
        print(f"{path}: taken for masks of 0 and {max(masks)}")
    elif highest < full / 16:  # nowhere interior
        raise InputError(f"{path}: holds no value above {highest}: neither 0 to {full} nor masks of 0 and 255 or 1")
    return max(masks, default=full)


def look_at(slices, labels):
    """look() at each label with its slice. Raises InputError for a slice that isn't as large as its label."""
    return [look(*reversed(read_pair(one[1:], label[1:]))) for one, label in zip(slices, labels, strict=True)]


def find_jobs(args, image):
    """What to score -> {kind: [Job]}, read once before minutes of work; image: the slices. Raises InputError."""
    pairs = pair(args.prediction, args.label, "_prob")
    without = {name for name, *_ in list_slices(args.label)} - {label[0] for _, label in pairs if label}
    if without:
        raise InputError(f"{args.label}: has {min(without)}, but {args.prediction} does not")
    slices, labels = zip(*(both for both in pairs if both[1]), strict=True)
    if len(slices) < len(pairs):
        print(f"{len(pairs) - len(slices)} of {len(pairs)} slices have no label: scoring the other ones")
    kinds, masks = {"prediction": slices}, [(n, file.with_name(f"{n}_mask.png"), 0) for n, file, _ in slices]
    if args.threshold is None and all(file.is_file() for _, file, _ in masks):
        kinds["mask"] = masks
    looks = {kind: look_at(some, labels) for kind, some in kinds.items()}
    scales = {kind: find_scale(args.prediction, some) for kind, some in kinds.items()}
    kinds["all_interior"] = slices
    # What lies beside the labels may be other slices: nobody said that they belong here.
    with suppress(*() if args.image else (InputError,)):
        if image:
            image_of = {label: one for one, label in pair(image, args.label) if label}
            missing = [name for name, *where in labels if (name, *where) not in image_of]
            if missing:
                raise InputError(f"{image}: has no slice for {missing[0]}")
            images = [image_of[label] for label in labels]
            looks["slices"], kinds["blurred_slices"] = look_at(images, labels), images
    values = judge(args.label, looks.get("slices", looks["prediction"]), seen="slices" in looks)
    return {
        kind: [Job(kind, *both, scales.get(kind), values) for both in zip(some, labels, strict=True)]
        for kind, some in kinds.items()
    }


def check_outputs(args, image, jobs):
    """Raises InputError for a file to write that is read, would be among the images, or can't be written."""
    taken = {file.resolve() for some in jobs.values() for job in some for _, file, _ in (job.slice, job.label)}
    folders = {Path(path).resolve() for path in (args.prediction, args.label, image) if path}
    for flag, path in (("--json", args.json), ("--picture", args.picture)):
        if path:
            real = Path(path).resolve()
            if real in taken or (real.parent in folders and real.suffix.lower() in SUFFIXES):
                raise InputError(f"{flag} {path}: is one of the images, or would be: choose another place")
            check_output(path)
            taken.add(real)


def read(job):
    """A job's P(interior), (H, W), float32 or bool, and what is interior in its label, (H, W), bool."""
    interior = read_label(*job.label[1:], job.values) > 0
    if job.kind == "all_interior":
        return np.ones_like(interior), interior
    image = read_slice(*job.slice[1:]).astype(np.float32)
    if job.kind == "blurred_slices":  # what a prediction has to be better than
        return stretch(cv2.GaussianBlur(image, (0, 0), BLUR)), interior
    return image / np.float32(job.scale), interior


def score(job, thresholds):
    return count(*read(job), thresholds)


def summary(counts):
    """The scores from the counts of slices, as --json writes them: at all thresholds, and the best ones."""
    scores = combine(counts)
    bests = {name: best(scores, name) for name in SCORES}
    bests = {what: {name: both[i] for name, both in bests.items()} for i, what in enumerate(("best", "best_threshold"))}
    return {name: values.tolist() for name, values in scores.items()} | bests


def table(results, column, title, slices):
    """The lines to print of {kind: its summary()}, the prediction first, and of a column of scores under its title."""
    own, *floors = results.values()
    titles = "".join(f"{kind.replace('_', ' '):>16}" for kind in list(results)[1:])
    yield f"{f'{slices} slices':20}    best    P>{title:>10}{titles}"
    for name, (title, _) in SCORES.items():
        line = f"{title:20}{own['best'][name]:8.4f}{own['best_threshold'][name]:6.1f}{column[name].item():10.4f}"
        yield line + "".join(f"{floor['best'][name]:16.4f}" for floor in floors)


def score_slice(job, counts, threshold):
    """The scores of one slice at a threshold, from its count() there, and its cells -> {what: its value}."""
    probability, interior = read(job)
    scores = {name: values.item() for name, values in combine([counts]).items()}
    cells = {"cells_in_label": count_cells(interior), "cells_found": count_cells(probability > threshold)}
    return {"slice": job.slice[0], **scores, **cells}


def draw(job, image_job, threshold):
    """A slice, or its label where no image is known, with wrong pixels, merged and split cells, uint8 (H, W, 3)."""
    probability, interior = read(job)
    found = probability > threshold
    faults = [found != interior, *find_faults(interior, thin(found))]
    colours = np.array((ORANGE, (255, 0, 255), (255, 255, 0)))  # orange, magenta, cyan
    colours = np.select([where[:, :, None] for where in faults], colours)
    image = read_slice(*image_job.slice[1:]) if image_job else np.float32(interior)
    return paint(image, colours, np.any(faults, axis=0))


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prediction", type=given_path, required=True, help="folder or stack of P(interior)")
    add("--label", type=given_path, required=True, help="folder or stack of labels, white = interior")
    add("--image", type=given_path, help="slices, for the floor and --picture (default: those beside the labels)")
    add("--threshold", type=number(float, 0, 1), metavar="T", help="score P > T as well (default: the masks, else 0.5)")
    add("--per_slice", action="store_true", help="print, and write with --json, the scores of each slice")
    add("--json", type=given_path, metavar="FILE", help="write all scores at all thresholds")
    add("--picture", type=given_path, metavar="FILE.png", help="draw what is wrong in the slice of the lowest V_Rand")
    return parser.parse_args()


def main():
    args = parse_args()
    image = args.image or beside(Path(args.label).resolve(), "label", "image")
    jobs, threshold = find_jobs(args, image), 0.5 if args.threshold is None else args.threshold
    check_outputs(args, image, jobs)
    kind, everything = "mask" if "mask" in jobs else "prediction", [job for some in jobs.values() for job in some]
    start.keep("nothing was written")
    end_with_us = ctypes.CDLL(None).prctl, (1, signal.SIGKILL)  # workers would wait for a script that Ctrl-C ended
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), None, *end_with_us) as pool:
        counts = pool.map(score, everything, repeat([*THRESHOLDS, threshold]))
        counts = np.array(list(tqdm(counts, "scoring", len(everything), leave=False, disable=None)))
        counts = dict(zip(jobs, np.split(counts, len(jobs)), strict=True))
        own = counts[kind][:, -1:]
        rows = list(pool.map(score_slice, jobs[kind], own, repeat(threshold))) if args.per_slice else []
    column, title = combine(own), kind if kind == "mask" else f"at {threshold:g}"
    results = {name: summary(numbers[:, :-1]) for name, numbers in counts.items() if name != "mask"}
    print("\n".join(table(results, column, title, len(own))))
    images = jobs.get("blurred_slices")
    if not images:
        print("no floor of blurred slices: --image says where the slices are")
    if rows:
        cells = f"cells in label  found (of {SMALLEST} pixels or more)"
        print(f"\n{f'each slice, {title}':20}  V_Rand  V_Info  misclassification  {cells}")
        print(*(ROW.format(**row) for row in rows), sep="\n")
    if args.json:
        written = {"thresholds": THRESHOLDS.tolist(), **results.pop("prediction"), "floors": results}
        written |= {"threshold": kind if kind == "mask" else threshold, "slices": rows}
        written["at_threshold"] = {name: values.item() for name, values in column.items()}
        with write_whole(args.json) as file:
            file.write(json.dumps(written, indent=1).encode())
    if args.picture:
        worst = own[:, 0, 0].argmin()
        picture = draw(jobs[kind][worst], images and images[worst], threshold)
        with write_whole(args.picture, sync=False) as file:
            file.write(cv2.imencode(".png", picture)[1])
        print(f"{args.picture}: slice {jobs[kind][worst].slice[0]}, of the lowest V_Rand, {own[worst, 0, 0]:.4f}")
        print("wrong pixels are orange, merged cells magenta, split cells cyan")


if __name__ == "__main__":
    start.run(main)
