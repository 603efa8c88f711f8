"""The ISBI 2012 challenge's scores of a prediction, beside those of two floors.

    python3 evaluate.py --prediction predict_image --label data/test_label --per_slice --picture worst.png
    python3 evaluate.py --prediction submission.tif --label labels.tif --threshold 0.4 --json scores.json

A prediction is P(interior) of each slice: a folder, where NAME_prob.png count if there are any, or a stack; integers up
to the type's largest value, masks of 0 and 255 or 1, or floats from 0 to 1. Two folders pair by name, else order pairs;
slices without a label are left out. The column beside the best, --per_slice and --picture show NAME_mask.png where all
slices have one, else P > --threshold. Floors: all interior; the blurred slices, those beside the labels by default."""

import ctypes
import json
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

from common import files, pictures, scores, start
from common.arguments import InputError, Parser, given_path, number
from common.images import SUFFIXES, list_slices, read_slice
from common.labels import beside, judge, pair, read_label, read_pair

import cv2
import numpy as np
from tqdm import tqdm

HEAD = f"  V_Rand  V_Info  misclassification  cells in label  found (of {scores.SMALLEST} pixels or more)"
ROW = "{slice:20}{v_rand:8.4f}{v_info:8.4f}{pixel_misclassification:19.4f}{cells_in_label:16}{cells_found:7}"

# What to score; slice, label: each (name, file, page); scale: what stands for P(interior) = 1; values: the labels' two.
Job = namedtuple("Job", "kind slice label scale values threshold")


def find_scale(path, slices):
    """The value that stands for P(interior) = 1 in a prediction's slices, each (name, file, page): 1 for floats, 1 or
    255 for masks, else, and for NAME_prob, their type's largest one. Raises InputError for values of other kinds."""
    highest, full, masks = 0, None, {1, 255}
    for _, file, page in slices:
        image = read_slice(file, page)
        most = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
        if full not in (None, most):
            raise InputError(f"{file}: holds {image.dtype} values, those before it others: save all slices alike")
        if most == 1 and not -1e-6 <= image.min() <= image.max() <= 1 + 1e-6:  # averages of ones are rounded
            raise InputError(f"{file}: holds {image.min():g} to {image.max():g}, not probabilities from 0 to 1")
        masks = {value for value in masks if np.isin(image, (0, value)).all()}
        highest, full = max(highest, image.max()), most
    if full == 1 or highest == 0 or all(file.stem.endswith("_prob") for _, file, _ in slices):
        return full
    if masks and masks != {full}:
        print(f"{path}: taken for masks of 0 and {max(masks)}")
    elif highest < full / 16:  # nowhere interior
        raise InputError(f"{path}: holds no value above {highest}: neither 0 to {full} nor masks of 0 and 255 or 1")
    return max(masks, default=full)


def look_at(slices, labels):
    """What judge() needs of each label. Raises InputError for a slice that isn't as large as its label."""
    return [read_pair(one[1:], label[1:])[2] for one, label in zip(slices, labels, strict=True)]


def find_jobs(args):
    """What to score -> [Job], first the kind of --per_slice. InputError, for where to write too, before the work."""
    pairs = pair(args.prediction, args.label, "_prob")
    if without := set(list_slices(args.label)) - {label for _, label in pairs}:
        raise InputError(f"{args.label}: has {min(without)[0]}, but {args.prediction} does not")
    slices, labels = zip(*(both for both in pairs if both[1]), strict=True)
    if len(slices) < len(pairs):
        print(f"{len(pairs) - len(slices)} of {len(pairs)} slices have no label: scoring the other ones")
    masks = [(name, file.with_name(f"{name}_mask.png"), 0) for name, file, _ in slices]
    kinds = {"mask": masks} if args.threshold is None and all(file.is_file() for _, file, _ in masks) else {}
    kinds["prediction"] = slices
    looks = [look_at(some, labels) for some in kinds.values()]
    scales = {kind: find_scale(args.prediction, some) for kind, some in kinds.items()}
    kinds["all_interior"] = slices
    image = args.image or beside(Path(args.label).resolve(), "label", "image")
    # What lies beside the labels may be other slices: nobody said that they belong here.
    with suppress(*() if args.image else (InputError,)):
        if image:
            image_of = {label: one for one, label in pair(image, args.label)}
            if missing := [label[0] for label in labels if label not in image_of]:
                raise InputError(f"{image}: has no slice for {missing[0]}")
            images = [image_of[label] for label in labels]
            looks, kinds["blurred_slices"] = [look_at(images, labels)], images
    values = judge(args.label, looks[0], seen="blurred_slices" in kinds)
    taken = {file.resolve() for some in (labels, *kinds.values()) for _, file, _ in some}
    folders = {Path(path).resolve() for path in (args.prediction, args.label, image) if path}
    for path in filter(None, (args.json, args.picture)):
        real = Path(path).resolve()
        if real in taken or (real.parent in folders and real.suffix.lower() in SUFFIXES):
            raise InputError(f"{path}: is one of the images, or would be: choose another place for --json or --picture")
        if path == args.picture and real.suffix.lower() != ".png":
            raise InputError(f"--picture {path}: would be a PNG by another name, call it .png")
        files.check_output(path)
        taken.add(real)
    how = values, 0.5 if args.threshold is None else args.threshold
    return [Job(kind, *two, scales.get(kind), *how) for kind in kinds for two in zip(kinds[kind], labels, strict=True)]


def read(job):
    """A job's P(interior), (H, W), float32 or bool, and what is interior in its label, (H, W), bool."""
    interior = read_label(*job.label[1:], job.values) > 0
    if job.kind == "all_interior":
        return np.ones_like(interior), interior
    image = read_slice(*job.slice[1:]).astype(np.float32)
    if job.kind == "blurred_slices":  # by 2 pixels: what a prediction has to be better than
        return pictures.stretch(cv2.GaussianBlur(image, (0, 0), 2)), interior
    return image / np.float32(job.scale), interior


def score(job):
    """count() of a job at THRESHOLDS and at its own one, and what --json says of the slice at that, a dict."""
    probability, interior = read(job)
    counts = scores.count(probability, interior, [*scores.THRESHOLDS, job.threshold])
    own = {name: value.item() for name, value in scores.combine([counts[-1:]]).items()}
    in_label, found = (scores.count_cells(where) for where in (interior, probability > job.threshold))
    return counts, {"slice": job.slice[0], **own, "cells_in_label": in_label, "cells_found": found}


def summary(counts):
    """The scores from the counts of slices, as --json writes them: at all thresholds, and the best ones."""
    found = scores.combine(counts)
    bests = zip(*(scores.best(found, name) for name in scores.SCORES), strict=True)
    values, thresholds = (dict(zip(scores.SCORES, some, strict=True)) for some in bests)
    return {name: some.tolist() for name, some in found.items()} | {"best": values, "best_threshold": thresholds}


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
    jobs = find_jobs(args)
    # 1 is PR_SET_PDEATHSIG, 9 SIGKILL: workers would wait for a script that Ctrl-C ended.
    with ProcessPoolExecutor(cv2.getNumberOfCPUs(), None, ctypes.CDLL(None).prctl, (1, 9)) as pool:
        counts, rows = zip(*tqdm(pool.map(score, jobs), "scoring", len(jobs), leave=False, disable=None), strict=True)
    kinds = list(dict.fromkeys(job.kind for job in jobs))
    counts = dict(zip(kinds, np.split(np.array(counts), len(kinds)), strict=True))
    own, rows = counts[kinds[0]][:, -1:], rows[: len(jobs) // len(kinds)]
    at = {name: value.item() for name, value in scores.combine(own).items()}
    threshold, title = ("mask",) * 2 if kinds[0] == "mask" else (jobs[0].threshold, f"at {jobs[0].threshold:g}")
    floors = {kind: summary(some[:, :-1]) for kind, some in counts.items() if kind != "mask"}
    result = {"thresholds": scores.THRESHOLDS.tolist(), **floors.pop("prediction"), "threshold": threshold}
    result |= {"at_threshold": at, "floors": floors, "slices": rows if args.per_slice else []}
    print(f"{f'{len(rows)} slices':20}    best    P>{title:>10}", *(f"{kind.replace('_', ' '):>15}" for kind in floors))
    for name, (called, _) in scores.SCORES.items():
        line = f"{called:20}{result['best'][name]:8.4f}{result['best_threshold'][name]:6.1f}{at[name]:10.4f}"
        print(line, *(f"{floor['best'][name]:15.4f}" for floor in floors.values()))
    if "blurred_slices" not in kinds:
        print("no floor of blurred slices: --image says where the slices are")
    if args.per_slice:
        print(f"\n{f'each slice, {title}':20}{HEAD}", *(ROW.format(**row) for row in rows), sep="\n")
    if args.json:
        with files.write_whole(args.json) as file:
            file.write(json.dumps(result, indent=1).encode())
    if args.picture:
        worst, images = own[:, 0, 0].argmin(), [job for job in jobs if job.kind == "blurred_slices"]
        probability, interior = read(jobs[worst])
        found = probability > jobs[worst].threshold
        faults = [found != interior, *scores.find_faults(interior, scores.thin(found))]
        colours = np.array((pictures.ORANGE, (255, 0, 255), (255, 255, 0)))[np.argmax(faults, axis=0)]
        image = read_slice(*images[worst].slice[1:]) if images else np.float32(interior)
        with files.write_whole(args.picture, sync=False) as file:
            file.write(cv2.imencode(".png", pictures.paint(image, colours, np.any(faults, axis=0)))[1])
        print(f"{args.picture}: slice {rows[worst]['slice']}, orange: wrong pixels, magenta: merged cells, cyan: split")


if __name__ == "__main__":
    start.run(main)
