"""Predict membranes: a folder or stack of slices -> probabilities, masks and overlays.

    python3 predict_unet_test.py
    python3 predict_unet_test.py --Test_Data_path my_slices/ --save_res_path my_membranes/ --tta
    python3 predict_unet_test.py --Test_Data_path volume.tif --stack submission.tif

For each slice NAME it writes NAME_prob.png (P(interior), 0 to 255), NAME_mask.png (255 = interior), NAME_overlay.png;
with --cells also NAME_cells.png (a number a cell, for Fiji or napari), NAME_colours.png and cells.csv (docs/cells.md).
"""

import codecs
import csv
import os
from contextlib import ExitStack
from pathlib import Path

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
from common import ROOT, begin, checkpoint, files, images, scores, start
from common.arguments import InputError, Parser, add_device, given_path, number
from common.cells import MOST, PIECE, find_cells, find_mask, measure
from common.pictures import write_pictures
from common.tiles import MARGIN, TILE, predict
from cpu_kernels import accelerate
from unet import MIN_SIDE

import numpy as np
from tifffile import TiffWriter
from tqdm import tqdm

OWN, BOXED = Path("checkpoints/best.safetensors"), ROOT / "checkpoints/isbi2012.safetensors"


def parse_args():
    parser, path, share = Parser(__doc__), given_path, number(float, 0, 1)
    add = parser.add_argument_group("slices and weights").add_argument
    add("--Test_Data_path", type=path, default="data/test_image", help="folder or stack of slices")
    add("--checkpoint", type=path, nargs="+", help=f"weights, of several the mean (default: {OWN}, else {BOXED.name})")
    add("--trust_pickle", action="store_true", help="allow a flow.save folder, which runs code")
    add("--pixel_size", type=number(float, 1e-3, 1e6), metavar="NM", help="nanometres a pixel (default: the weights')")
    add = parser.add_argument_group("what is written").add_argument
    add("--save_res_path", type=path, default="predict_image", help="output folder")
    add("--stack", type=path, metavar="FILE.tif", help="write P(interior) as a float32 stack as well")
    add("--overlay", choices=("outline", "fill"), default="fill", help="a line where the mask ends, or all membrane")
    add("--cells", action="store_true", help="number, colour, count the cells; with --stack in FILE_cells.tif as well")
    add("--min_cell", type=number(int, 0), help=f"least pixels of a cell (default: {scores.SMALLEST} of the weights')")
    add("--threshold", type=share, metavar="T", help="interior is P > T, without growing (default: the checkpoint's)")
    add("--grow", type=share, metavar="G", help="grow into P > G (G < T) until cells meet (default: the checkpoint's)")
    add = parser.add_argument_group("how it is computed").add_argument
    add("--tta", action="store_true", help="average 8 flips and rotations: fewer wrong pixels, 8 times slower")
    add("--tile", type=number(int, 2 * MARGIN + 16, besides=0), default=TILE, help="cut longer sides; 0: none")
    add("--mirror", type=int, choices=range(0, MARGIN + 1, 16), default=0, help="mirrored pixels: better at the edges")
    add_device(add)
    return parser.parse_args()


def load_nets(args, place):
    """The checkpoints' nets, (threshold, grow), a slice's pixel over theirs. Raises InputError."""
    nets, known = [], []
    for path in args.checkpoint or [OWN if OWN.exists() else BOXED]:
        found, metadata = checkpoint.load_net(path, trust_pickle=args.trust_pickle)
        amp = begin.mixed_precision(args, place, wanted=metadata.get("amp") is True)
        for net in found if isinstance(found, list) else [found]:
            if (net.n_channels, net.n_classes) != (1, 1):
                raise InputError(f"{path}: has {net.n_channels} channels and {net.n_classes} classes, not one of each")
            nets.append(accelerate(net.to(place), amp) if args.cpu_kernels == "auto" else net.to(place))
        threshold, size = metadata.get("threshold", 0.5), metadata.get("pixel_size", 4.0)  # nm, of ISBI 2012
        grow = metadata.get("grow", threshold)
        limits = ((threshold, 0, 1), (grow, 0, 1), (size, 1e-3, 1e6))
        if not all(isinstance(value, int | float) and low <= value <= high for value, low, high in limits):
            raise InputError(f"{path}: its threshold or grow is no number from 0 to 1, or its pixel_size none above 0")
        known.append((threshold, min(threshold, grow), size))
        arguments, epoch = metadata.get("arguments"), metadata.get("epoch")
        ours = isinstance(arguments, dict) and isinstance(epoch, int)  # a stranger may have written them
        print(f"weights: {path}" + (f", after epoch {epoch - 1} on {arguments.get('data_path')!a}" if ours else ""))
        if metadata.get("synthetic") is True and not begin.is_synthetic(args.Test_Data_path):
            print(f"{path} knows SYNTHETIC slices only, no tissue: --checkpoint {BOXED} was trained on some")
    threshold, grow = np.mean(known, axis=0)[:2] if args.threshold is None else [args.threshold] * 2
    grow = grow if args.grow is None else args.grow
    print(f"interior is P > {threshold:g}" + f", grown into P > {grow:g}" * bool(grow < threshold))
    if len({each for *_, each in known}) > 1:
        raise InputError("--checkpoint: these know pixels of several sizes, predict with those of one")
    scale = (args.pixel_size or size) / size
    if not 1 / 8 <= scale <= 8:
        raise InputError(f"--pixel_size {args.pixel_size:g}: is over 8 times off the {size:g} nm that the weights know")
    if scale != 1:
        print(f"slices are resampled by {scale:g} to the weights' {size:g} nm")
    return nets, (threshold, grow), scale


def find_slices(args, scale, stacks):
    """The slices, all read once before hours of work. Raises InputError, also where the results would replace them."""
    slices, shapes = images.list_slices(args.Test_Data_path), []
    for _, file, page in slices:
        shapes.append(images.read_slice(file, page).shape)
        if min(shapes[-1]) * min(scale, 1) < MIN_SIDE:
            raise InputError(f"{file}: a side is under {MIN_SIDE} pixels, its own or the weights'")
        if stacks and shapes[-1] != shapes[0]:
            raise InputError(f"{file}: is of another size than the first slice, leave out --stack")
    inputs, given = {path.resolve() for _, file, _ in slices for path in (file, file.parent)}, Path(args.Test_Data_path)
    for path in (Path(args.save_res_path), *stacks):
        if path.resolve() in inputs or (path in stacks and path.parent.resolve() == given.resolve()):
            raise InputError(f"{path}: there are the slices, choose another --save_res_path or --stack")
    for path in (*stacks, Path(args.save_res_path, "cells.csv")):
        files.check_output(path)
    files.lock(args.save_res_path)
    return slices


def main():
    if start.several and "local_rank_" in os.environ.get("GLOG_log_dir", ""):  # noqa: SIM112  its ranks' alone
        raise InputError("predicts in one process: start it without the launcher")
    args = parse_args()
    place = begin.pick(args.device)
    nets, (threshold, grow), scale = load_nets(args, place)
    least = round(scores.SMALLEST / scale**2) if args.min_cell is None else args.min_cell
    stacks = [Path(args.stack)] if args.stack else []
    stacks += [path.with_stem(f"{path.stem}_cells") for path in stacks if args.cells]
    slices, folder = find_slices(args, scale, stacks), Path(args.save_res_path)
    size = {"resolution": (1e7 / args.pixel_size,) * 2, "resolutionunit": "CENTIMETER"} if args.pixel_size else {}
    tables, cells = [], None
    start.keep(f"the slices finished so far are in {folder}")
    with ExitStack() as opened:  # stacks are written whole or not at all
        big = 4 * len(slices) * images.read_slice(*slices[0][1:]).size > 2**32 - 2**25  # a plain TIFF ends at 4 GB
        enter = opened.enter_context
        writers = [enter(TiffWriter(enter(files.write_whole(path)), bigtiff=big)) for path in stacks]
        for name, file, page in tqdm(slices, desc="predict", leave=False, disable=None):
            image = images.read_slice(file, page)
            probability = predict(nets, image, place, tile=args.tile, tta=args.tta, mirror=args.mirror, scale=scale)
            mask = find_mask(probability, threshold, grow, PIECE / scale**2)
            if mask.min() == mask.max():
                tqdm.write(f"{folder}/{name}_mask.png is all {'interior' if mask.all() else 'membrane'}")
            if args.cells:
                cells = find_cells(image, mask, least)
                tables.append(measure(name, image, cells, args.pixel_size))
                if cells.max() == MOST:
                    tqdm.write(f"{folder}/{name}_cells.png: only the first {MOST} of the cells have a number")
            write_pictures(folder / name, image, probability, mask, cells, args.overlay == "outline", args.pixel_size)
            for writer, values in zip(writers, (probability, cells), strict=False):
                writer.write(values, photometric="minisblack", metadata=None, **size)
    print(f"{len(slices)} slice{'s' * (len(slices) > 1)}: {folder}/NAME_{{prob,mask,overlay}}.png", *stacks, sep="\n")
    if args.cells:
        with files.write_whole(folder / "cells.csv") as file:
            table = csv.writer(codecs.getwriter("utf-8")(file, "surrogateescape"), lineterminator="\n")
            table.writerows([tables[0], *(row for columns in tables for row in zip(*columns.values(), strict=True))])
        n = sum(len(columns["cell"]) for columns in tables)
        print(f"{n} cell{'s' * (n != 1)} of {least} pixels or more, {n / len(slices):.1f} a slice: {folder}/cells.csv")
    elif any((folder / f"{name}_cells.png").exists() for name, *_ in slices):
        print(f"{folder}/NAME_cells.png, NAME_colours.png and cells.csv are older; --cells makes them anew")


if __name__ == "__main__":
    start.run(main)
