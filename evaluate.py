"""The ISBI 2012 challenge's scores of a prediction, beside those of two floors.

    python3 evaluate.py --prediction predict_image --label data/test_label
    python3 evaluate.py --prediction submission.tif --label labels.tif --json scores.json

A prediction is P(interior) of each slice: a folder as predict_unet_test.py writes it (its
NAME_prob.png count), a folder of images, or a stack; integers from 0 to the type's largest value or
floats from 0 to 1. The files of two folders are paired by name, the pages of a stack with the
labels by order.

V_Rand and V_Info say how well cells are told apart (see scores.py); pixel error is 1 - F1 of the
interior, misclassification the share of wrong pixels. The floors are what a prediction scores that
calls everything interior, and the blurred slices themselves. The slices are searched beside the
labels, under the label folder's name with `image` for `label`.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

import engine
from dataloader import InputError, list_slices, read_label, read_slice
from scores import SCORES, THRESHOLDS, best, evaluate

import cv2
import numpy as np
from tqdm import tqdm

BLUR = 2  # pixels, the standard deviation


def pair(path, label_path, suffix=""):
    """The file of a prediction, or of the slices, for each label -> [(file, page), ...].

    Names may end in `suffix`; those that don't are then left out. Raises InputError where a name is
    on one side only, or two stacks differ in length.
    """
    slices, labels = list_slices(path), list_slices(label_path)
    if any(name.endswith(suffix) for name, _, _ in slices):
        slices = [s for s in slices if s[0].endswith(suffix)]
        slices = [(name.removesuffix(suffix), file, page) for name, file, page in slices]
    if Path(path).is_dir() and Path(label_path).is_dir():
        found, wanted = {s[0] for s in slices}, {s[0] for s in labels}
        if found != wanted:
            name = min(found ^ wanted)
            where, other = (path, label_path) if name in found else (label_path, path)
            raise InputError(f"{where}: has {name}, but {other} does not")
        file_of = {name: (file, page) for name, file, page in slices}
        return [file_of[name] for name, _, _ in labels]
    if len(slices) != len(labels):
        raise InputError(f"{path}: {len(slices)} slices, but {label_path} has {len(labels)} labels")
    return [(file, page) for _, file, page in slices]


def read_probability(file, page):
    """P(interior) of a slice, (H, W), float32. Raises InputError for values outside [0, 1].

    Unsigned integers are shares of their largest value.
    """
    image = read_slice(file, page)
    if np.issubdtype(image.dtype, np.unsignedinteger):
        return image.astype(np.float32) / np.iinfo(image.dtype).max
    if image.min() < -1e-6 or image.max() > 1 + 1e-6:  # an average of ones may be rounded up
        raise InputError(f"{file}: holds {image.min():g} to {image.max():g}, not probabilities")
    return image


def read_blurred(file, page):
    """The brightness of a slice, blurred, from 0 to 1: what a prediction has to be better than."""
    image = cv2.GaussianBlur(read_slice(file, page).astype(np.float32), (0, 0), BLUR)
    low, high = np.percentile(image, (0.5, 99.5))
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)


def check_shapes(read, files, label_files):
    """Raises InputError for an image that can't be read or isn't as large as its label."""
    for (file, page), label_file in zip(files, label_files, strict=True):
        shape, label_shape = read(file, page).shape, read_label(*label_file).shape
        if shape != label_shape:
            raise InputError(f"{file}: {shape}, but its label has {label_shape} pixels")


def parse_args():
    parser = engine.Parser(__doc__)
    add = parser.add_argument
    path = engine.given_path
    add("--prediction", type=path, required=True, help="folder or stack of P(interior)")
    add("--label", type=path, required=True, help="folder or stack of labels, white = interior")
    add("--image", type=path, help="slices, for the floor (default: those beside the labels)")
    add("--json", type=path, metavar="FILE", help="write all scores at all thresholds")
    return parser.parse_args()


def main():
    args = parse_args()
    label_files = [(file, page) for _, file, page in list_slices(args.label)]
    files = {"prediction": pair(args.prediction, args.label, "_prob")}
    label_path = Path(args.label).resolve()
    beside = label_path.with_name("image".join(label_path.name.rsplit("label", 1)))
    if args.image:
        files["blurred_slices"] = pair(args.image, args.label)
    elif beside != label_path and beside.exists():
        with suppress(InputError):  # they may be other slices: nobody said that they belong here
            found = pair(beside, args.label)
            check_shapes(read_slice, found, label_files)
            files["blurred_slices"] = found
    readers = {"prediction": read_probability, "blurred_slices": read_blurred}
    for name, of_name in files.items():  # all of them, before minutes of work
        check_shapes(readers[name], of_name, label_files)
    if args.json:
        engine.check_output(args.json)
        images = {os.path.realpath(file) for file, _ in sum(files.values(), label_files)}
        if os.path.realpath(args.json) in images:
            raise InputError(f"--json {args.json}: is one of the images, choose another name")
    engine.kept = "nothing was written"

    results = {}
    for name in ("prediction", "all_interior", "blurred_slices"):
        if name in files:
            proposal = (readers[name](*file) for file in files[name])
        elif name == "all_interior":
            proposal = (np.ones(read_label(*file).shape, bool) for file in label_files)
        else:
            continue
        bar = tqdm(proposal, name.replace("_", " "), len(label_files), leave=False, disable=None)
        results[name] = evaluate(bar, (read_label(*file) > 0 for file in label_files))
    print(f"{f'{len(label_files)} slices':20}    best    P>  at 0.5", end="")
    floors = [name for name in results if name != "prediction"]
    print("".join(f"{name.replace('_', ' '):>16}" for name in floors))
    middle = list(THRESHOLDS).index(0.5)
    for score, (title, _) in SCORES.items():
        value, threshold = best(results["prediction"], score)
        line = f"{title:20}{value:8.4f}{threshold:6.1f}{results['prediction'][score][middle]:8.4f}"
        print(line + "".join(f"{best(results[name], score)[0]:16.4f}" for name in floors))
    if "blurred_slices" not in files:
        print("no floor of blurred slices: --image says where the slices are")
    if args.json:
        written = {
            name: {score: values.tolist() for score, values in found.items()}
            | {"best": {score: best(found, score)[0] for score in SCORES}}
            | {"best_threshold": {score: best(found, score)[1] for score in SCORES}}
            for name, found in results.items()
        }
        answer = {"thresholds": THRESHOLDS.tolist(), **written.pop("prediction"), "floors": written}
        with engine.write_whole(args.json) as file:
            file.write(json.dumps(answer, indent=1).encode())


if __name__ == "__main__":
    engine.run(main)
