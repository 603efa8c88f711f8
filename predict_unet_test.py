"""Predict membranes: a folder or stack of slices -> probabilities, masks and overlays.

    python3 predict_unet_test.py
    python3 predict_unet_test.py --Test_Data_path my_slices/ --save_res_path my_membranes/ --tta
    python3 predict_unet_test.py --Test_Data_path volume.tif --stack submission.tif

For each slice NAME it writes NAME_prob.png (P(interior), 0 to 255), NAME_mask.png (255 = interior, 0 = membrane) and
NAME_overlay.png (the membrane over the slice); with --cells also NAME_cells.png (16 bit, a number for each cell, 0 on
the lines between them) and NAME_colours.png. The weights are those of your last training, else this repository's.
"""

import os
from contextlib import ExitStack
from pathlib import Path

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
from common import ROOT, begin, start
from common.arguments import InputError, Parser, add_device, given_path, number
from common.checkpoint import load_net
from common.files import check_output, make_folder, write_whole
from common.images import list_slices, read_slice
from common.pictures import write_pictures
from common.tiles import MARGIN, TILE, predict
from cpu_kernels import accelerate
from unet import MIN_SIDE

from tifffile import TiffWriter
from tqdm import tqdm

OWN = Path("checkpoints/best.safetensors")
BOXED = ROOT / "checkpoints/isbi2012.safetensors"


def parse_args():
    parser = Parser(__doc__)
    default = "(default: %(default)s)"
    add = parser.add_argument_group("slices and weights").add_argument
    add("--Test_Data_path", type=given_path, default="data/test_image", help=f"folder or stack of slices {default}")
    text = f"weights; several: the mean of their probabilities (default: {OWN}, else {BOXED.name}, of this repository)"
    add("--checkpoint", type=given_path, nargs="+", metavar="FILE", help=text)
    add("--trust_pickle", action="store_true", help="allow a flow.save folder, which runs code")

    add = parser.add_argument_group("what is written").add_argument
    add("--save_res_path", type=given_path, default="predict_image", help=f"output folder {default}")
    add("--stack", type=given_path, metavar="FILE.tif", help="write P(interior) as a float32 stack as well")
    add("--cells", action="store_true", help="number and colour the cells as well")
    text = "interior is P > T (default: the checkpoint's, else 0.5)"
    add("--threshold", type=number(float, 0, maximum=1), metavar="T", help=text)

    add = parser.add_argument_group("how it is computed").add_argument
    add("--tta", action="store_true", help="average 8 flips and rotations: better, 8 times slower")
    text = f"cut sides over N pixels, a multiple of 16 above {2 * MARGIN}; 0: none {default}"
    add("--tile", type=number(int, 0), default=TILE, metavar="N", help=text)
    text = f"continue slices by N mirrored pixels, a multiple of 16 up to {MARGIN}: better at their edges {default}"
    add("--mirror", type=number(int, 0), default=0, metavar="N", help=text)
    add_device(add)
    add("--amp", choices=("auto", "on", "off"), default="auto", help="bfloat16 on a CPU (auto: as the net was trained)")
    args = parser.parse_args()
    if args.tile and (args.tile <= 2 * MARGIN or args.tile % 16):
        raise InputError(f"--tile {args.tile} is not 0 or a multiple of 16 above {2 * MARGIN}")
    if args.mirror % 16 or args.mirror > MARGIN:
        raise InputError(f"--mirror {args.mirror} is not a multiple of 16 up to {MARGIN}")
    return args


def load_nets(args, place):
    """The nets of the checkpoints, ready to predict, and the threshold of their masks. Raises InputError."""
    paths = args.checkpoint or [OWN if OWN.exists() or not BOXED.exists() else BOXED]
    nets, thresholds = [], []
    for path in paths:
        net, metadata = load_net(path, trust_pickle=args.trust_pickle)
        if (net.n_channels, net.n_classes) != (1, 1):
            raise InputError(f"{path}: a net of {net.n_channels} channels, {net.n_classes} classes: not one of each")
        threshold = metadata.get("threshold", 0.5)
        if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise InputError(f"{path}: its threshold is no number from 0 to 1")
        amp = begin.mixed_precision(args, place, wanted=metadata.get("amp") is True)
        net = net.to(place).eval()
        nets.append(accelerate(net, amp) if args.cpu_kernels == "auto" else net)
        thresholds.append(threshold)
        arguments, epoch = metadata.get("arguments"), metadata.get("epoch")
        ours = isinstance(arguments, dict) and isinstance(epoch, int)  # a stranger may have written them
        print(f"weights: {path}" + (f", after {epoch - 1} epochs on {arguments.get('data_path')!a}" if ours else ""))
        if metadata.get("synthetic") is True and not begin.is_synthetic(args.Test_Data_path):
            print(f"{path} knows SYNTHETIC slices only, no tissue: --checkpoint {BOXED} was trained on some")
    threshold = sum(thresholds) / len(thresholds) if args.threshold is None else args.threshold
    print(f"interior is P > {threshold:g}")
    return nets, threshold


def find_slices(args):
    """The slices, as list_slices() gives them; all are read once, before hours of work.

    Raises InputError, also where the results would replace slices.
    """
    slices, shapes = list_slices(args.Test_Data_path), set()
    for _, file, page in slices:
        shape = read_slice(file, page).shape
        shapes.add(shape)
        if min(shape) < MIN_SIDE:
            raise InputError(f"{file}: a side is under {MIN_SIDE} pixels")
        if args.stack and len(shapes) > 1:
            raise InputError(f"{file}: is of another size than the first slice, leave out --stack")
    inputs = {os.path.realpath(path) for _, file, _ in slices for path in (file, file.parent)}
    for flag, path in (("save_res_path", args.save_res_path), ("stack", args.stack)):
        if path and os.path.realpath(path) in inputs:
            raise InputError(f"--{flag} {path}: there are the slices, choose another one")
    if args.stack:
        check_output(args.stack)
    make_folder(args.save_res_path)
    return slices


def main():
    args = parse_args()
    place = begin.pick(args.device)
    nets, threshold = load_nets(args, place)
    slices = find_slices(args)
    folder, odd = Path(args.save_res_path), []
    start.keep(f"the slices finished so far are in {folder}")
    with ExitStack() as opened:
        if args.stack:  # whole or not at all; big: beyond 4 GB a plain TIFF's offsets don't reach
            big = 4 * len(slices) * read_slice(*slices[0][1:]).size > 2**32 - 2**25
            stack = opened.enter_context(TiffWriter(opened.enter_context(write_whole(args.stack)), bigtiff=big))
        for name, file, page in tqdm(slices, desc="predict", leave=False, disable=None):
            image = read_slice(file, page)
            probability = predict(nets, image, place, tile=args.tile, tta=args.tta, mirror=args.mirror)
            odd += write_pictures(folder / name, image, probability, threshold, args.cells)
            if args.stack:
                stack.write(probability, photometric="minisblack", contiguous=False, metadata=None)
    if args.stack:
        odd.append(f"{args.stack}: {len(slices)} slices, float32, 0 = membrane, 1 = interior")
    kinds = ("prob", "mask", "overlay") + ("cells", "colours") * args.cells
    odd.append(f"{len(slices)} slices: {folder}/NAME_" + ".png, NAME_".join(kinds) + ".png")
    if not args.cells and any((folder / f"{name}_cells.png").exists() for name, *_ in slices):
        odd.append(f"{folder}/NAME_cells.png and NAME_colours.png are older; --cells makes them anew")
    print("\n".join(odd))


if __name__ == "__main__":
    start.run(main)
