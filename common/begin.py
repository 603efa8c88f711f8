"""What a training begins with: the device, the seeds, the data sets."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
from common import start
from common.arguments import DATA, MIN_CROP, InputError
from cpu_kernels import has_bfloat16
from unet import MIN_SIDE

import numpy as np
import oneflow as flow


def pick_device(args, graph=False):
    """ "cpu" or "cuda", as the arguments ask and the machine allows, which is said. Raises InputError."""
    if start.processes == 1 and os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        raise InputError("this script trains in one process: launch ddp_train.py in several")
    device = pick(args.device)
    precision = "mixed" if mixed_precision(args, device, graph=graph) else "single"
    print(f"device: {device}, {start.processes} process{'es' * (start.processes > 1)}, {precision} precision")
    return device


def pick(name):
    """ "auto", "cpu" or "cuda" -> "cpu" or "cuda", or InputError: OneFlow also finds GPUs that it has no code for."""
    device, major, trouble = ctypes.c_int(), ctypes.c_int(), "OneFlow finds no GPU here"
    if name != "cpu" and flow.cuda.is_available():
        with suppress(OSError):
            driver = ctypes.CDLL("libcuda.so.1")
            driver.cuInit(0)
            driver.cuDeviceGet(ctypes.byref(device), int(os.environ.get("LOCAL_RANK") or 0))
            driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        if major.value in (0, 6, 7, 8):  # 0: the driver doesn't say
            return "cuda"
        trouble = f"OneFlow 0.9 has no code for this GPU (compute capability {major.value}, not 6 to 8)"
        if name == "auto":
            print(f"{trouble}: using the CPU")
    if name == "cuda":
        raise InputError(f"--device cuda: {trouble}, use --device cpu")
    return "cpu"


def mixed_precision(args, device, wanted=True, graph=False):
    """Whether to compute in mixed precision, as args.amp says; wanted: what "auto" is where the CPU is fast at it.
    Raises InputError for "on" where it can't be: the kernels have it on a CPU with bfloat16, graphs on a GPU."""
    able = device == "cuda" if graph else device == "cpu" and args.cpu_kernels == "auto" and has_bfloat16()
    if args.amp == "on" and not able:
        needs = "a GPU and graph_train.py" if graph or device == "cuda" else "cpu_kernels and a CPU with bfloat16"
        raise InputError(f"--amp on: mixed precision needs {needs}; pass --amp off")
    return able and (args.amp == "on" or (args.amp == "auto" and wanted and not graph))


def seed_everything(seed, epoch=0):
    """Seed all that is random from (seed, epoch), so that an epoch repeats whatever ran before it."""
    number = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    flow.manual_seed(number + start.rank)  # dropout; a rank's own, since each has other slices
    np.random.seed(number)  # OneFlow's RandomSampler draws from NumPy


def data_sets(SelfDataSet, args):
    """(training set, validation set or None) as the arguments ask, the same in all processes. Raises InputError."""
    if args.data_path == DATA and not Path(DATA).exists():
        raise InputError(f"no {DATA} here: python3 data/prepare.py isbi (or sample) makes it")
    options = {name: getattr(args, name) for name in ("augment", "crop", "repeat", "border_weight", "seed")}
    train_set = SelfDataSet(args.data_path, args.label_path, keep=slice(None, -args.val_count or None), **options)
    val_set = SelfDataSet(args.val_path, args.val_label_path) if args.val_path else None
    if args.val_count:
        val_set = SelfDataSet(args.data_path, args.label_path, keep=slice(-args.val_count, None))
    for data_set, side in ((train_set, MIN_CROP), (val_set, MIN_SIDE)):
        for name, shape in zip(data_set.names, data_set.shapes, strict=True) if data_set else ():
            if min(shape) < side:
                raise InputError(f"slice {name}: {shape} pixels are too few for the net, a side needs {side}")
    if args.crop is None:
        train_set.crop = min(256, *map(min, train_set.shapes)) // 16 * 16
    if args.batch_size > 1 and not train_set.crop and len(set(train_set.shapes)) > 1:
        raise InputError(f"{args.data_path}: slices of several sizes share no batch, pass --crop or --batch_size 1")
    start.got_further()
    mine = sum(int(data_set.digest[:8], 16) for data_set in (train_set, val_set) if data_set)  # exact in float64
    if sum_over_ranks(mine) != [start.processes * mine]:
        raise InputError(f"{args.data_path}: this process has other slices than another one")
    if is_synthetic(args.data_path):
        print("The slices are a SYNTHETIC SAMPLE: scores on it mean NOTHING for real tissue.")
    print(f"{len(train_set.pairs)} training slices, {len(val_set.pairs) if val_set else 0} validation slices")
    return train_set, val_set


def is_synthetic(path):
    """Whether slices are those of data/sample.py: data/prepare.py writes their source beside them."""
    source = Path(path).parent / "source.txt"
    return source.is_file() and "synthetic" in source.read_text(errors="replace")


def sum_over_ranks(*values):
    """The sums of numbers over all processes, as floats."""
    total = flow.tensor(values, dtype=flow.float64)
    if start.processes > 1:
        flow.comm.all_reduce(total)
    return total.numpy().tolist()
