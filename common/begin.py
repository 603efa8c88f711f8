"""What a training begins with: the device, the seeds, the data sets."""

import os
from pathlib import Path

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
import cpu_kernels
from common import start
from common.arguments import DATA, MIN_CROP, InputError
from common.device import pick
from unet import MIN_SIDE

import numpy as np
import oneflow as flow


def pick_device(args, graph=False):
    """ "cpu" or "cuda", as the arguments ask and the machine allows, which is said. Raises InputError.

    graph: whether the script trains by a static graph.
    """
    if start.processes == 1 and os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        raise InputError("this script trains in one process: launch ddp_train.py in several")
    device = pick(args.device)
    amp = mixed_precision(args, device, graph)
    if args.amp == "on" and not amp:
        needs = "a GPU in graph_train.py" if graph or device == "cuda" else "cpu_kernels and a CPU with bfloat16"
        raise InputError(f"--amp on: mixed precision needs {needs}, leave it out")
    if start.rank == 0:
        several = f", {start.processes} processes" if start.processes > 1 else ""
        print(f"device: {device}{several}, {'mixed' if amp else 'single'} precision")
    return device


def mixed_precision(args, device, graph=False):
    """Whether a run computes in mixed precision: on a GPU a graph that is asked to, on a CPU where it has bfloat16."""
    if graph or device == "cuda":
        return graph and device == "cuda" and args.amp == "on"
    has_bfloat16 = getattr(cpu_kernels, "has_bfloat16", lambda: False)
    return args.amp != "off" and args.cpu_kernels == "auto" and has_bfloat16()


def seed_everything(seed, epoch=0):
    """Seed all that is random from (seed, epoch), so that an epoch repeats whatever ran before it."""
    number = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    flow.manual_seed(number + start.rank)  # dropout; a rank's own, since each has other slices
    np.random.seed(number)  # OneFlow's RandomSampler draws from NumPy


def data_sets(SelfDataSet, args):
    """(training set, validation set or None) as the arguments ask.

    Raises InputError, also where the processes don't have the same slices.
    """
    if args.data_path == DATA and not Path(DATA).exists():
        raise InputError(f"no {DATA} here: python3 data/prepare.py isbi (or sample) makes it")
    options = {name: getattr(args, name) for name in ("augment", "crop", "repeat", "border_weight", "seed")}
    kept, held_out = slice(None, -args.val_count or None), slice(-args.val_count, None)
    train_set, val_set = SelfDataSet(args.data_path, args.label_path, keep=kept, **options), None
    if not train_set.pairs:
        raise InputError(f"--val_count {args.val_count}: leaves no slice to train on")
    if args.val_path:
        val_set = SelfDataSet(args.val_path, args.val_label_path)
    elif args.val_count:
        val_set = SelfDataSet(args.data_path, args.label_path, keep=held_out)
    for data_set, side in ((train_set, MIN_CROP), (val_set, MIN_SIDE)):
        for name, shape in zip(data_set.names, data_set.shapes, strict=True) if data_set else ():
            if min(shape) < MIN_SIDE or max(shape) < side:
                raise InputError(f"slice {name}: {shape} pixels are too few for the net")
    if args.crop is None:
        side = min(256, *(min(shape) for shape in train_set.shapes)) // 16 * 16
        train_set.crop = side if side >= MIN_CROP else 0
    if args.batch_size > 1 and not train_set.crop and len(set(train_set.shapes)) > 1:
        raise InputError(
            f"{args.data_path}: slices of several sizes can't share a batch, pass --crop or --batch_size 1"
        )
    start.got_further()
    mine = int(digest_of(train_set, val_set), 16) % 0x7FFFFFFF  # small enough for exact sums in float64
    if sum_over_ranks(mine) != [start.processes * mine]:
        raise InputError(f"{args.data_path}: this process has other slices than another one")
    if start.rank == 0:
        if is_synthetic(args):
            print("The slices are a SYNTHETIC SAMPLE: scores on it mean NOTHING for real tissue.")
        counts = (len(data_set.pairs) if data_set else 0 for data_set in (train_set, val_set))
        print("{} training slices, {} validation slices".format(*counts))
    return train_set, val_set


def digest_of(*sets):
    """16 hexadecimal digits that tell one choice of slices from another."""
    return "".join(data_set.digest[:8] for data_set in sets if data_set)


def is_synthetic(args):
    """Whether the slices are those of data/sample.py: data/prepare.py writes their source beside them."""
    source = Path(args.data_path).parent / "source.txt"
    return source.is_file() and "synthetic" in source.read_text(errors="replace")


def sum_over_ranks(*values):
    """The sums of the numbers over all processes, as floats."""
    total = flow.tensor(values, dtype=flow.float64)
    if start.processes > 1:
        flow.comm.all_reduce(total)
    return [float(value) for value in total.numpy()]
