"""Predict membranes: a folder or stack of slices -> probabilities, masks and overlays.

    python3 predict_unet_test.py
    python3 predict_unet_test.py --Test_Data_path my_slices/ --save_res_path my_membranes/ --tta
    python3 predict_unet_test.py --Test_Data_path volume.tif --stack submission.tif

For each slice NAME it writes NAME_prob.png (P(interior), 0 to 255), NAME_mask.png (255 = interior, 0 = membrane or
padding) and NAME_overlay.png (the membrane over the slice). --cells adds NAME_cells.png (a number a cell, 16 bit: open
it in Fiji or napari, elsewhere it looks black), NAME_colours.png and cells.csv, the table of the cells (docs/cells.md).
The weights are those of your last training, else this repository's.
"""

import os
from contextlib import ExitStack
from pathlib import Path

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
from common import ROOT, begin, start
from common.arguments import InputError, Parser, add_device, given_path, number
from common.cells import MOST, find_cells, find_mask, measure, write_table
from common.checkpoint import load_net
from common.files import check_output, lock, make_folder, write_whole
from common.images import list_slices, read_slice
from common.pictures import write_pictures
from common.scores import SMALLEST
from common.tiles import MARGIN, TILE, predict
from cpu_kernels import accelerate
from unet import MIN_SIDE

import numpy as np
from tifffile import TiffWriter
from tqdm import tqdm

OWN = Path("checkpoints/best.safetensors")
BOXED = ROOT / "checkpoints/isbi2012.safetensors"
PIXEL_SIZE = 4.0  # nm, of ISBI 2012: the weights' where they don't say


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument_group("slices and weights").add_argument
    add("--Test_Data_path", type=given_path, default="data/test_image", help="folder or stack of slices")
    text = f"weights; several: the mean of their probabilities (default: {OWN}, else {BOXED.name}, of this repository)"
    add("--checkpoint", type=given_path, nargs="+", metavar="FILE", help=text)
    add("--trust_pickle", action="store_true", help="allow a flow.save folder, which runs code")
    add("--pixel_size", type=number(float, 1e-3, 1e6), metavar="NM", help="nanometres a pixel (default: the weights')")

    add = parser.add_argument_group("what is written").add_argument
    add("--save_res_path", type=given_path, default="predict_image", help="output folder")
    add("--stack", type=given_path, metavar="FILE.tif", help="write P(interior) as a float32 stack as well")
    add("--overlay", choices=("outline", "fill"), default="fill", help="a line where the mask ends, or all membrane")
    add("--cells", action="store_true", help="number, colour, count the cells; with --stack in FILE_cells.tif as well")
    text = f"leave out cells under N pixels of the mask (default: {SMALLEST} of the weights' pixels)"
    add("--min_cell", type=number(int, 0), metavar="N", help=text)
    text = "interior is P > T, without growing (default: the checkpoint's)"
    add("--threshold", type=number(float, 0, 1), metavar="T", help=text)
    text = "interior grows into P > G where cells don't meet; G of T or more: not at all (default: the checkpoint's)"
    add("--grow", type=number(float, 0, 1), metavar="G", help=text)

    add = parser.add_argument_group("how it is computed").add_argument
    add("--tta", action="store_true", help="average 8 flips and rotations: better, 8 times slower")
    text = f"cut sides over N pixels, a multiple of 16 above {2 * MARGIN}; 0: none"
    add("--tile", type=number(int, 0), default=TILE, metavar="N", help=text)
    text = f"continue slices by N mirrored pixels, a multiple of 16 up to {MARGIN}: better at their edges"
    add("--mirror", type=int, choices=range(0, MARGIN + 1, 16), default=0, metavar="N", help=text)
    add_device(add)
    add("--amp", choices=("auto", "on", "off"), default="auto", help="bfloat16 on a CPU (auto: as the net was trained)")
    args = parser.parse_args()
    if args.tile and (args.tile <= 2 * MARGIN or args.tile % 16):
        raise InputError(f"--tile {args.tile} is not 0 or a multiple of 16 above {2 * MARGIN}")
    return args


def load_nets(args, place):
    """The checkpoints' nets, (threshold, grow), a slice's pixel over theirs. Raises InputError."""
    paths = args.checkpoint or [OWN if OWN.exists() or not BOXED.exists() else BOXED]
    nets, masks, sizes = [], [], set()
    for path in paths:
        found, metadata = load_net(path, trust_pickle=args.trust_pickle)
        threshold, size = metadata.get("threshold", 0.5), metadata.get("pixel_size", PIXEL_SIZE)
        grow = metadata.get("grow", threshold)
        numbers = all(isinstance(n, int | float) for n in (threshold, grow, size))
        if not (numbers and 0 <= threshold <= 1 and 0 <= grow <= 1 and 1e-3 <= size <= 1e6):
            raise InputError(f"{path}: its threshold or grow is no number from 0 to 1, or its pixel_size none above 0")
        amp = begin.mixed_precision(args, place, wanted=metadata.get("amp") is True)
        for net in found if isinstance(found, list) else [found]:
            if (net.n_channels, net.n_classes) != (1, 1):
                raise InputError(f"{path}: has {net.n_channels} channels and {net.n_classes} classes, not one of each")
            net.to(place)
            nets.append(accelerate(net, amp) if args.cpu_kernels == "auto" else net)
        masks.append((threshold, min(threshold, grow)))
        sizes.add(size)
        arguments, epoch = metadata.get("arguments"), metadata.get("epoch")
        ours = isinstance(arguments, dict) and isinstance(epoch, int)  # a stranger may have written them
        print(f"weights: {path}" + (f", after {epoch - 1} epochs on {arguments.get('data_path')!a}" if ours else ""))
        if metadata.get("synthetic") is True and not begin.is_synthetic(args.Test_Data_path):
            print(f"{path} knows SYNTHETIC slices only, no tissue: --checkpoint {BOXED} was trained on some")
    threshold, grow = np.mean(masks, axis=0) if args.threshold is None else [args.threshold] * 2
    grow = grow if args.grow is None else args.grow
    print(f"interior is P > {threshold:g}" + f", grown into P > {grow:g}" * bool(grow < threshold))
    if len(sizes) > 1:
        raise InputError(f"--checkpoint: these know pixels of {sorted(sizes)} nm, predict with those of one size")
    scale = (args.pixel_size or size) / size
    if not 1 / 8 <= scale <= 8:
        raise InputError(f"--pixel_size {args.pixel_size:g}: is over 8 times off the {size:g} nm that the weights know")
    if scale != 1:
        print(f"slices are resampled by {scale:g} to the weights' {size:g} nm")
    return nets, (threshold, grow), scale


def find_slices(args, scale, stacks):
    """The slices, all read once before hours of work. Raises InputError, also where the results would replace them."""
    slices, shapes = list_slices(args.Test_Data_path), set()
    for _, file, page in slices:
        shape = read_slice(file, page).shape
        shapes.add(shape)
        if min(shape) * min(scale, 1) < MIN_SIDE:
            raise InputError(f"{file}: a side is under {MIN_SIDE} pixels, its own or the weights'")
        if stacks and len(shapes) > 1:
            raise InputError(f"{file}: is of another size than the first slice, leave out --stack")
    inputs = {os.path.realpath(path) for _, file, _ in slices for path in (file, file.parent)}
    for flag, path in (("save_res_path", args.save_res_path), *(("stack", path) for path in stacks)):
        inside = flag == "stack" and os.path.realpath(path.parent) == os.path.realpath(args.Test_Data_path)
        if inside or os.path.realpath(path) in inputs:
            raise InputError(f"--{flag} {path}: there are the slices, choose another one")
    for path in stacks:
        check_output(path)
    make_folder(args.save_res_path)
    lock(args.save_res_path)
    return slices


def main():
    if start.launched():
        raise InputError("predicts in one process: start it without the launcher")
    args = parse_args()
    place = begin.pick(args.device)
    nets, (threshold, grow), scale = load_nets(args, place)
    smallest = round(SMALLEST / scale**2) if args.min_cell is None else args.min_cell
    stacks = [Path(args.stack)] if args.stack else []
    stacks += [path.with_stem(f"{path.stem}_cells") for path in stacks if args.cells]
    slices, folder = find_slices(args, scale, stacks), Path(args.save_res_path)
    tags = {"photometric": "minisblack", "contiguous": False, "metadata": None}
    if args.pixel_size:
        tags |= {"resolution": (1e7 / args.pixel_size, 1e7 / args.pixel_size), "resolutionunit": "CENTIMETER"}
    said, tables, cells = [], [], None
    start.keep(f"the slices finished so far are in {folder}")
    with ExitStack() as opened:  # stacks are written whole or not at all
        big = 4 * len(slices) * read_slice(*slices[0][1:]).size > 2**32 - 2**25  # a plain TIFF's offsets end at 4 GB
        enter = opened.enter_context
        writers = [enter(TiffWriter(enter(write_whole(path)), bigtiff=big)) for path in stacks]
        for name, file, page in tqdm(slices, desc="predict", leave=False, disable=None):
            image = read_slice(file, page)
            probability = predict(nets, image, place, tile=args.tile, tta=args.tta, mirror=args.mirror, scale=scale)
            mask = find_mask(probability, threshold, grow)
            if mask.all() or not mask.any():
                said.append(f"{folder}/{name}_mask.png is all {'interior' if mask.all() else 'membrane'}")
            if args.cells:
                cells = find_cells(image, mask, smallest)
                tables.append(measure(name, image, cells, args.pixel_size))
                if cells.max() == MOST:
                    said.append(f"{folder}/{name}_cells.png: only the first {MOST} of the cells have a number")
            write_pictures(folder / name, image, probability, mask, cells, args.overlay == "outline", args.pixel_size)
            for writer, values in zip(writers, (probability, cells), strict=False):
                writer.write(values, **tags)
    said += [f"{len(slices)} slices: {folder}/NAME_prob.png, NAME_mask.png, NAME_overlay.png", *map(str, stacks)]
    if args.cells:
        write_table(folder / "cells.csv", tables)
        count = sum(len(columns["cell"]) for columns in tables)
        said += [f"{count} cells of {smallest} pixels or more, {count / len(slices):.1f} a slice: {folder}/cells.csv"]
    elif any((folder / f"{name}_cells.png").exists() for name, *_ in slices):
        said.append(f"{folder}/NAME_cells.png, NAME_colours.png and cells.csv are older; --cells makes them anew")
    print("\n".join(said))


if __name__ == "__main__":
    start.run(main)
