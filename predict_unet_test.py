"""Predict membranes: a folder or stack of slices -> probabilities, masks and overlays.

    python3 predict_unet_test.py
    python3 predict_unet_test.py --Test_Data_path my_slices/ --save_res_path my_membranes/ --tta
    python3 predict_unet_test.py --Test_Data_path volume.tif --stack submission.tif

For each slice NAME it writes NAME_prob.png (P(interior), 0 to 255), NAME_mask.png (255 = interior, 0 = membrane) and
NAME_overlay.png (the membrane drawn over the slice); with --cells also NAME_cells.png (16 bit, a number for each cell,
0 on the lines between them) and NAME_colours.png (the cells coloured). The weights are those of your last training,
else those in this repository.
"""

import math
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
from common.tiles import MARGIN, predict
from cpu_kernels import accelerate
from unet import MIN_SIDE

import tifffile
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
    text = f"cut sides over N pixels, a multiple of 16 above {2 * MARGIN}; 0: none (default: few large ones)"
    add("--tile", type=number(int, 0), metavar="N", help=text)
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
            raise InputError(
                f"{path}: a net of {net.n_channels} channels and {net.n_classes} classes, slices need one of each"
            )
        threshold = metadata.get("threshold", 0.5)
        if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise InputError(f"{path}: its threshold is no number from 0 to 1")
        amp = begin.mixed_precision(args, place, wanted=metadata.get("amp") is True)
        net = net.to(place).eval()
        nets.append(accelerate(net, amp) if args.cpu_kernels == "auto" else net)
        thresholds.append(threshold)
        print(f"weights: {path}{history(metadata)}")
        if metadata.get("synthetic") is True and not begin.is_synthetic(args.Test_Data_path):
            print(f"{path} knows SYNTHETIC slices only, no tissue: --checkpoint {BOXED} was trained on some")
    threshold = sum(thresholds) / len(thresholds) if args.threshold is None else args.threshold
    print(f"interior is P > {threshold:g}")
    return nets, threshold


def history(metadata):
    """What to say of a checkpoint's training; its metadata may be a stranger's."""
    arguments, epoch = metadata.get("arguments"), metadata.get("epoch")
    if not isinstance(arguments, dict) or not isinstance(epoch, int):
        return ""
    return f", after {epoch - 1} epochs on {str(arguments.get('data_path'))!a}"


def find_slices(args):
    """The slices, as list_slices() gives them, and the shape of the first; all are read once, before hours of work.

    Raises InputError, also where the results would replace slices.
    """
    slices, shapes = list_slices(args.Test_Data_path), []
    for _, file, page in slices:
        shapes.append(read_slice(file, page).shape)
        if min(shapes[-1]) < MIN_SIDE:
            raise InputError(f"{file}: a side is under {MIN_SIDE} pixels")
        if args.stack and shapes[-1] != shapes[0]:
            raise InputError(f"{file}: is of another size than the first slice, leave out --stack")
    folder = Path(args.save_res_path)
    if os.path.realpath(folder) in {os.path.realpath(file.parent) for _, file, _ in slices}:
        raise InputError(f"{folder}: holds the slices, choose another --save_res_path")
    if args.stack:
        check_output(args.stack)
        if os.path.realpath(args.stack) in {os.path.realpath(file) for _, file, _ in slices}:
            raise InputError(f"--stack {args.stack}: is one of the slices, choose another name")
    make_folder(folder)
    return slices, shapes[0]


def open_stack(args, opened, slices, shape):
    """A writer of a float32 TIFF stack that is there as a whole, or not at all, when `opened`, an ExitStack, ends."""
    file = opened.enter_context(write_whole(args.stack))
    big = 4 * len(slices) * math.prod(shape) > 2**32 - 2**25  # beyond what a plain TIFF's offsets reach
    return opened.enter_context(tifffile.TiffWriter(file, bigtiff=big))


def main():
    args = parse_args()
    place = begin.pick(args.device)
    nets, threshold = load_nets(args, place)
    slices, shape = find_slices(args)
    folder, odd = Path(args.save_res_path), []
    start.keep(f"the slices finished so far are in {folder}")
    with ExitStack() as opened:
        stack = open_stack(args, opened, slices, shape) if args.stack else None
        for name, file, page in tqdm(slices, desc="predict", leave=False, disable=None):
            image = read_slice(file, page)
            probability = predict(nets, image, place, tile=args.tile, tta=args.tta, mirror=args.mirror)
            odd += write_pictures(folder / name, image, probability, threshold, args.cells)
            if stack:
                stack.write(probability, photometric="minisblack", contiguous=False, metadata=None)
    for text in odd:
        print(text)
    if args.stack:
        print(f"{args.stack}: {len(slices)} slices, float32, 0 = membrane, 1 = interior")
    kinds = ("prob", "mask", "overlay") + ("cells", "colours") * args.cells
    print(f"{len(slices)} slices: {folder}/NAME_" + ".png, NAME_".join(kinds) + ".png")
    if not args.cells and any((folder / f"{name}_cells.png").exists() for name, *_ in slices):
        print(f"{folder}/NAME_cells.png and NAME_colours.png are older; --cells makes them anew")


if __name__ == "__main__":
    start.run(main)
