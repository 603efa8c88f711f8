"""What the training scripts share word for word: arguments, seeding, one epoch over a loader,
validation, checkpoints, the log, and how a script ends.

Plain functions. Those that print, write or count know that the process may be one rank of several.
"""

import argparse
import ctypes
import os
import signal
import socket
import sys
import time
from contextlib import contextmanager, suppress

# Before the long imports: until run() has its answer to Ctrl-C, that ends a script without one, and
# without a traceback. A launcher can be ended without its ranks, so have the kernel end them with
# it, even one that is stopped (1 is PR_SET_PDEATHSIG). And say what OneFlow would only abort at.
signal.signal(signal.SIGINT, signal.SIG_DFL)
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.environ.get("RANK") == "0":
        try:
            socket.create_server(("", int(os.environ["MASTER_PORT"]))).close()
        except OSError as error:
            sys.exit(
                f"port {os.environ['MASTER_PORT']}: {error.strerror}; if another job runs here, "
                "give the launcher another --master_port"
            )
    # OneFlow's start waits for the other ranks, for ever, and no thread of ours runs meanwhile. It
    # may take it 10 seconds to look again, so give it half a minute at least.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--rank_timeout", nargs="?", default="1800")
    seconds = early.parse_known_args()[0].rank_timeout
    parent, watcher = os.getpid(), os.fork()
    if watcher == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        with suppress(TypeError, ValueError, OverflowError):  # what is no number is refused later
            time.sleep(max(float(seconds), 30))
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            with suppress(OSError):
                os.write(2, f"the other processes are not at {where} after {seconds} s\n".encode())
            if os.getppid() == parent:
                os.kill(parent, signal.SIGKILL)
        signal.pause()

import csv
import fcntl
import hashlib
import json
import math
import threading
import traceback
from pathlib import Path

from dataloader import AUGMENTATIONS, InputError, SelfDataSet
from scores import THRESHOLDS, evaluate
from unet import MIN_SIDE, UNet

import numpy as np
import oneflow as flow
import safetensors
import safetensors.numpy
from oneflow.optim.lr_scheduler import ConstantLR, CosineAnnealingLR
from oneflow.utils.data.distributed import DistributedSampler
from tqdm import tqdm

if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    os.kill(watcher, signal.SIGKILL)
    os.waitpid(watcher, 0)
MAIN_PROCESS = os.getpid()
STDERR = os.dup(2)  # for interrupt(), which may come while quiet_stderr() is at work
last_sign = time.monotonic()  # when this rank last got further: watch() looks at it
locked = None  # the descriptor that locks the folder of checkpoints
RANK = flow.env.get_rank()
WORLD_SIZE = flow.env.get_world_size()

# What a resumed run takes over from its checkpoint, besides --bilinear, --augment and --val_count
# (see as_flags). Paths have to be said again where they are not the default: a checkpoint may come
# from a stranger, who should not choose which files are written.
RESUMED = ("epochs", "batch_size", "repeat", "lr", "schedule", "base_channels", "crop")
RESUMED += ("border_weight", "dropout", "val_every", "best_by", "seed", "cpu_kernels")
PATHS = ("data_path", "label_path", "val_path", "val_label_path", "checkpoint_dir", "log_file")

# What an interrupt leaves behind: interrupt() says it.
kept = "nothing was finished, nothing is kept"
unfinished = set()  # files that write_whole is writing: interrupt() removes them


# ---------------------------------------------------------------- how a script starts and ends


def run(main):
    """Call `main()` and end the process: 0 done, 2 bad input (one line), 130 interrupted, 1 else.

    By `os._exit`, without OneFlow's own shutdown: now and then it hangs, for ever, in a thread that
    waits for work; and a rank that failed would wait there for the other ranks, which wait for it.
    Only ranks that all went well need it, so that the first to end doesn't disturb the others.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that aren't UTF-8
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code or 0
    except FloatingPointError as error:
        code = 1
        complain(error)
    except OSError as error:  # a full disk, for example
        code = 1
        complain(f"{error.filename or 'a file'}: {error.strerror or error}; {kept}")
    except InputError as error:
        code = 2
        text = str(error)
        if "\nOriginal Traceback" in text:  # one of a DataLoader's workers raised it
            text = text.rstrip().rpartition("\n")[2].removeprefix("dataloader.InputError: ")
        # Files from strangers must not break the line, or colour the terminal.
        complain("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
    except Exception:
        code = 1
        complain(traceback.format_exc())
    try:
        sys.stdout.flush()
    except OSError as error:  # a full disk, or `| head`: what is left to print would raise again
        complain(f"output: {error.strerror}")
        os._exit(code or 1)
    if WORLD_SIZE == 1 or code:
        os._exit(code)
    sys.exit(code)


def interrupt(signum, _):
    """Answer Ctrl-C (or SIGTERM): say what is kept and end at once, with 130 (143).

    Nothing is lost by that, since files are replaced as a whole. A KeyboardInterrupt that finds its
    way out through OneFlow and its DataLoader now and then ends in a crash or hangs.
    """
    if os.getpid() == MAIN_PROCESS:
        for path in unfinished:
            path.unlink(missing_ok=True)
        if RANK == 0:
            # Not print(), which may be at work already.
            os.write(STDERR, os.fsencode(f"\ninterrupted: {kept}\n"))
        os._exit(128 + signum)
    if signum == signal.SIGTERM:  # a DataLoader's worker, which ends with us after Ctrl-C
        os._exit(0)


def got_further():
    """Tell watch() that this rank isn't waiting for another one."""
    global last_sign
    last_sign = time.monotonic()


def watch(seconds):
    """End this rank, and by that the job, when it got no further for so long.

    Ranks wait for each other at each step, in OneFlow, which never gives up: when one is stopped
    or out of reach, the others would wait for ever.
    """
    while time.monotonic() - last_sign < seconds:
        time.sleep(min(1, seconds / 4))
    complain(f"got no further for {seconds:g} s, another process hangs or is out of reach; {kept}")
    os._exit(1)


def complain(message):
    """Print to stderr under the script's name, and under the rank's if it isn't 0."""
    if RANK > 0:
        time.sleep(4)  # what is wrong on every rank is said once: rank 0's end ends the job
    who = Path(sys.argv[0]).name + (f" (rank {RANK})" if RANK else "")
    print(f"{who}: {message}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    def __init__(self, doc):
        text = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=text, allow_abbrev=False)

    def error(self, message):
        """One line instead of the usage of twenty flags."""
        raise InputError(f"{message} (--help lists the flags)")


def number(kind, minimum, above=False, maximum=None):
    """An argparse type: a finite int or float from `minimum` (or above it) to `maximum`."""
    if maximum is None:
        maximum = 2**31 - 1 if kind is int else sys.float_info.max

    def parse(text):
        value = kind(text)
        if not value >= minimum or (above and value == minimum):
            bound = f"above {minimum}" if above else f"{minimum} or more"
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{text} is more than {maximum:g}")
        return value

    parse.__name__ = "number"  # argparse says "invalid number value" where kind(text) fails
    return parse


def given_path(text):
    """An argparse type: a path, which an unset variable of a shell isn't."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def parse_args(doc, argv=None, amp=False):
    """The training scripts' flags; `doc` is the script's docstring, amp: whether it has --amp.

    Raises InputError.

    With --resume, the checkpoint's own training arguments are the defaults.
    """
    parser = Parser(doc)
    add = parser.add_argument
    default = "data/train_image"
    add(
        "--data_path",
        type=given_path,
        default=default,
        help="folder or TIFF stack of training slices",
    )
    add(
        "--label_path",
        type=given_path,
        help="their labels (default: data_path with label for image)",
    )
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--val_path", type=given_path, help="folder or stack of validation slices"
    )
    held_out.add_argument(
        "--val_count", type=number(int, 0), default=0, help="hold out the last N training slices"
    )
    add(
        "--val_label_path",
        type=given_path,
        help="labels of val_path (default: val_path with label for image)",
    )
    add("--val_every", type=number(int, 1), default=5, help="validate each N epochs (5)")
    add(
        "--best_by",
        choices=("loss", "v_rand"),
        default="loss",
        help="what best.safetensors is best in: validation (else training) loss, or validation "
        "V_Rand (default: loss)",
    )
    add("--epochs", type=number(int, 1), default=40, help="train up to this epoch (default: 40)")
    add(
        "--repeat",
        type=number(int, 1, maximum=1e4),
        default=8,
        help="times an epoch sees each slice (8)",
    )
    add("--batch_size", type=number(int, 1), default=4, help="crops a step and device (4)")
    add("--lr", type=number(float, 0, above=True), default=1e-3, help="Adam's step size (0.001)")
    add(
        "--schedule",
        choices=("cosine", "constant"),
        default="cosine",
        help="the step size falls to 0 along a cosine, or stays (default: cosine)",
    )
    add(
        "--base_channels",
        type=number(int, 1, maximum=1024),
        help="channels of the first level (default: 64 on a GPU, 16 on a CPU)",
    )
    add("--bilinear", action="store_true", help="upsample by interpolation, not by learned weights")
    add(
        "--crop",
        type=number(int, 0),
        help="train on random squares of N pixels; 0: whole slices (default: 256, or what the "
        "smallest slice has room for)",
    )
    add(
        "--augment",
        nargs="*",
        choices=AUGMENTATIONS,
        default=["flip", "rotate"],
        help="flips, right-angle rotations, elastic deformation; no value: none "
        "(default: flip rotate)",
    )
    add(
        "--border_weight",
        type=number(float, 0, maximum=1e6),
        default=10.0,
        metavar="W0",
        help="how much more the loss counts membrane between two near cells; 0: alike (10)",
    )
    add(
        "--dropout",
        type=number(float, 0, maximum=0.99),
        default=0.5,
        help="share of numbers set to 0 after the two deepest levels (0.5)",
    )
    add("--seed", type=number(int, 0), default=0, help="of all that is random (0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--num_workers",
        type=number(int, 0, maximum=64),
        default=0,
        help="processes that read slices (0)",
    )
    add(
        "--checkpoint_dir",
        "--checkpoint",
        type=given_path,
        default="checkpoints",
        help="folder for last.safetensors and best.safetensors (checkpoints)",
    )
    add(
        "--resume",
        type=given_path,
        metavar="FILE",
        help="go on from this checkpoint, with its arguments",
    )
    add(
        "--log_file",
        type=given_path,
        default="Unet_train.txt",
        help="a loss a line; more goes into the .csv beside it (Unet_train.txt)",
    )
    add_cpu_kernels(parser)
    if amp:
        add("--amp", action="store_true", help="mixed precision, on a GPU")
    add(
        "--rank_timeout",
        type=number(float, 0, above=True),
        default=1800.0,
        metavar="S",
        help="of several processes, end one that got no further for S seconds (1800)",
    )
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.resume:
        if Path(args.resume).is_dir():
            raise InputError(f"{args.resume}: a folder can't be resumed, only predicted with")
        tensors, _, metadata = load_checkpoint(args.resume)
        saved = metadata.get("arguments")
        if not isinstance(saved, dict):
            raise InputError(f"{args.resume}: holds weights only, too little to go on from")
        said = {word.split("=")[0] for word in argv}
        for name in PATHS:
            unsaid = not {f"--{name}", f"--{name}".removesuffix("_dir")} & said
            if unsaid and saved.get(name) not in (None, getattr(args, name)):
                raise InputError(
                    f"{args.resume}: was made with --{name} {saved[name]}, pass --{name}"
                )
        args = parser.parse_args(as_flags(saved, args) + argv)
        *_, bilinear, base_channels = architecture(args.resume, tensors)
        args.base_channels = args.base_channels or base_channels
        if (bilinear, base_channels) != (args.bilinear, args.base_channels):
            raise InputError(
                f"{args.resume}: a net of {base_channels} base channels"
                f"{', bilinear' * bilinear}; leave --base_channels and --bilinear as they were"
            )
    if args.crop and args.crop < 2 * MIN_SIDE:
        raise InputError(f"--crop {args.crop} is neither 0 nor {2 * MIN_SIDE} or more")
    if args.best_by == "v_rand" and not (args.val_path or args.val_count):
        raise InputError("--best_by v_rand needs validation slices, pass --val_count N")
    if args.val_label_path and not args.val_path:
        raise InputError("--val_label_path: labels of which slices? pass --val_path")
    return args


def add_cpu_kernels(parser):
    parser.add_argument(
        "--cpu_kernels",
        choices=("auto", "off"),
        default="auto",
        help="cpu_kernels.py instead of OneFlow's own slow kernels on a CPU (default: auto)",
    )


def as_flags(saved, given):
    """A checkpoint's training arguments as command-line flags, so that argparse checks them."""
    names = RESUMED if given.val_path else (*RESUMED, "val_count")
    flags = [f"--{name}" for name in ("bilinear", "amp") if saved.get(name) is True]
    if not hasattr(given, "amp"):
        flags = [flag for flag in flags if flag != "--amp"]
    for name in names:
        if isinstance(saved.get(name), int | float | str):
            flags.append(f"--{name}={saved[name]}")  # one word, whatever the value holds
    if isinstance(saved.get("augment"), list):
        flags += ["--augment", *(kind for kind in AUGMENTATIONS if kind in saved["augment"])]
    return flags


def pick_device(name):
    """ "auto", "cpu" or "cuda" -> "cpu" or "cuda". Raises InputError where there is no GPU."""
    if name == "cuda" and not flow.cuda.is_available():
        raise InputError("--device cuda: OneFlow finds no GPU here, use --device cpu")
    return "cuda" if flow.cuda.is_available() and name != "cpu" else "cpu"


def make_folder(path):
    """Make a folder to write to, where it doesn't exist. Raises InputError if it can't be used."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: can't be made ({error.strerror})") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: can't be written to, choose another folder")


def check_output(path):
    """Make the folder of a file to write. Raises InputError if the file can't be written there."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is in the way, it is not a file")
    make_folder(path.parent)


def start(args):
    """Check the arguments against the machine, seed, say what will run; returns the device.

    Sets args.processes, and args.base_channels where it was left open. Raises InputError.
    """
    device = pick_device(args.device)
    if device == "cpu" and getattr(args, "amp", False):
        raise InputError("--amp: mixed precision needs a GPU, leave it out")
    args.processes = WORLD_SIZE
    if args.base_channels is None:
        args.base_channels = 64 if device == "cuda" else 16
        if device == "cpu" and RANK == 0:
            print("no GPU in use: 16 base channels; --base_channels 64 is the paper's net")
    if RANK == 0:
        print(f"device: {device}" + (f", {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""))
    seed_epoch(args.seed, 0)  # for the initial weights
    return device


def seed_epoch(seed, epoch):
    """Seed everything from (seed, epoch), so that an epoch repeats whatever ran before it."""
    number = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    flow.manual_seed(number + RANK)  # dropout; a rank's own, since each has other slices
    np.random.seed(number)  # OneFlow's RandomSampler draws from NumPy


# -------------------------------------------------------------------- data, training, validation


def data_sets(args):
    """(training set, validation set or None) as the arguments ask; sets args.data_digest.

    Raises InputError, also where the ranks don't have the same slices.
    """
    if args.data_path == "data/train_image" and not Path(args.data_path).exists():
        raise InputError(
            f"no {args.data_path} here: python3 data/prepare.py isbi (or sample) makes it"
        )
    train_set = SelfDataSet(
        args.data_path,
        args.label_path,
        augment=args.augment,
        crop=args.crop,
        repeat=args.repeat,
        border_weight=args.border_weight,
        seed=args.seed,
        keep=slice(None, -args.val_count or None),
    )
    val_set = None
    if args.val_path:
        val_set = SelfDataSet(args.val_path, args.val_label_path)
    elif args.val_count:
        if not train_set.pairs:
            raise InputError(f"--val_count {args.val_count}: leaves no slice to train on")
        held_out = slice(-args.val_count, None)
        val_set = SelfDataSet(args.data_path, args.label_path, keep=held_out)

    for data_set in (train_set, val_set) if val_set else (train_set,):
        for name, shape in zip(data_set.names, data_set.shapes, strict=True):
            if min(shape) < MIN_SIDE:
                raise InputError(f"slice {name}: {shape} pixels, the net needs {MIN_SIDE} a side")
            if data_set is train_set and max(shape) < 2 * MIN_SIDE:
                # One pixel is left at the deepest level: no variance for batch normalisation.
                raise InputError(f"slice {name}: {shape} pixels are too few to train on")
    shapes = set(train_set.shapes)
    if args.crop is None:
        side = min(256, *map(min, shapes)) // 16 * 16
        args.crop = train_set.crop = side if side >= 2 * MIN_SIDE else 0
    if args.batch_size > 1 and not args.crop and len(shapes) > 1:
        raise InputError(
            f"{args.data_path}: whole slices of {len(shapes)} sizes can't share a batch, "
            "pass --batch_size 1 or --crop N"
        )
    if WORLD_SIZE > 1:
        got_further()
        threading.Thread(target=watch, args=(args.rank_timeout,), daemon=True).start()
    args.data_digest = train_set.digest[:8] + (val_set.digest[:8] if val_set else "")
    mine = int(args.data_digest, 16) % 0x7FFFFFFF  # small enough for exact sums in float64
    if sum_over_ranks(mine) != [WORLD_SIZE * mine]:
        raise InputError(f"{args.data_path}: this process has other slices than another one")
    if RANK == 0:
        source = Path(args.data_path).parent / "source.txt"  # of data/prepare.py
        if source.is_file() and "synthetic" in source.read_text(errors="replace"):
            print("The slices are a SYNTHETIC SAMPLE: scores on it mean NOTHING for real tissue.")
        counts = (len(data_set.pairs) if data_set else 0 for data_set in (train_set, val_set))
        print("{} training slices, {} validation slices".format(*counts))
    return train_set, val_set


def sum_over_ranks(*values):
    """The sums of the numbers over all ranks, as floats."""
    total = flow.tensor(values, dtype=flow.float64)
    if WORLD_SIZE > 1:
        flow.comm.all_reduce(total)
    return [float(value) for value in total.numpy()]


def learning_rate_schedule(args, optimizer, steps, first_epoch):
    """The schedule of the step size, to be stepped after each step of the optimizer.

    steps: of an epoch. A cosine ends at the last of args.epochs, so a run that is resumed with
    more of them than it was started with jumps to the longer cosine.
    """
    if args.schedule == "cosine":
        schedule = CosineAnnealingLR(optimizer, args.epochs * steps)
    else:
        schedule = ConstantLR(optimizer, factor=1, total_iters=0)
    schedule.last_step = (first_epoch - 1) * steps - 1  # all its state: nothing to save
    schedule.step()
    return schedule


def train_one_epoch(net, loader, step, device, epoch):
    """One pass over the loader; returns (mean loss of all ranks' slices, their number, seconds).

    The loader gives image and label, (N, 1, H, W), and where border weights are used a weight for
    each pixel. step(image, label, weight) makes a step and returns the loss of each slice before
    it, a tensor (N,). Raises FloatingPointError when one is not finite: the net is spoilt then,
    what is on the disk is not.
    """
    if WORLD_SIZE > 1 and not isinstance(loader.sampler, DistributedSampler):
        raise InputError("this script trains in one process: launch ddp_train.py in several")
    began = time.monotonic()
    net.train()
    loss_sum, samples, place = 0.0, 0, RANK
    # disable=None: no bar where stderr is a file
    hidden = True if RANK else None
    with tqdm(total=len(loader), desc=f"epoch {epoch}", leave=False, disable=hidden) as bar:
        for image, label, *weight in loader:
            weight = weight[0] if weight else flow.ones_like(label)
            losses = step(image.to(device), label.to(device), weight.to(device)).numpy()
            got_further()
            if not np.isfinite(losses).all():
                raise FloatingPointError(
                    f"the loss became {losses.mean()} in epoch {epoch}: try a smaller --lr; {kept}"
                )
            for loss in losses.tolist():
                # DistributedSampler deals the slices out like cards, and fills the last round up
                # with slices that were dealt already: they don't count again.
                if place < len(loader.dataset):
                    loss_sum += loss
                    samples += 1
                place += WORLD_SIZE
            bar.set_postfix(loss=f"{losses.mean():.4f}", refresh=False)
            bar.update()
    for parameter in net.parameters():
        parameter.numpy()  # waits for the last step, which OneFlow may not have finished
    if WORLD_SIZE > 1:
        # Running statistics are each rank's own until the next forward fetches rank 0's. Fetch
        # them now: validation and checkpoint then see one net.
        for buffer in net.buffers():
            flow.comm.broadcast(buffer, 0)
    loss_sum, samples = sum_over_ranks(loss_sum, samples)
    return loss_sum / samples, int(samples), time.monotonic() - began


def validate(args, net, val_set, criterion, device, epoch):
    """Scores of the validation slices; None in an epoch that leaves it out, {} without slices.

    Means over the slices: "val_loss", without weights; "val_misclassification", the share of
    pixels on the wrong side of P(interior) = 0.5; "val_v_rand" and "val_v_info" (see scores.py),
    each at its best threshold; "val_threshold", that of V_Rand. The ranks share the slices out
    between them.
    """
    if val_set is None:
        return {}
    if epoch % args.val_every and epoch not in (1, args.epochs):
        return None
    net.eval()
    thresholds = THRESHOLDS[1:-1]
    pixels, cells = np.zeros(2), np.zeros((2, len(thresholds)))
    with flow.no_grad():
        for index in range(RANK, len(val_set), WORLD_SIZE):
            image, label = (flow.tensor(a[None]).to(device) for a in val_set[index])
            logits = net.forward(image)  # net(image) would wait for ranks that have no slice left
            probability, interior = flow.sigmoid(logits).numpy()[0, 0], label.numpy()[0, 0] > 0.5
            wrong = np.mean((logits.numpy()[0, 0] > 0) != interior)
            pixels += criterion(logits, label).mean().item(), wrong
            found = evaluate([probability], [interior], thresholds)
            got_further()
            cells += found["v_rand"], found["v_info"]
    sums = np.array(sum_over_ranks(*pixels, *cells.ravel())) / len(val_set)
    v_rand, v_info = sums[2:].reshape(cells.shape)
    best = np.flatnonzero(v_rand == v_rand.max())
    return {
        "val_loss": float(sums[0]),
        "val_misclassification": float(sums[1]),
        "val_v_rand": float(v_rand.max()),
        "val_v_info": float(v_info.max()),
        "val_threshold": float(thresholds[best[len(best) // 2]]),  # the middle one of the best
    }


# ------------------------------------------------------------------------- checkpoints and log


def unfinished_file(path):
    """Where write_whole writes to: always the same, so that killed runs leave one file at most."""
    return Path(path).with_name(f".{Path(path).name}.new")


@contextmanager
def write_whole(path):
    """A binary file to write to; `path` holds what it held until all is written, then all of it.

    That is so even after a crash. If the block raises, `path` stays as it was.
    """
    path, aside = Path(path), unfinished_file(path)
    unfinished.add(aside)
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)
    except OSError as error:
        error.filename = str(path)  # a full disk doesn't say whose
        raise
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        unfinished.discard(aside)


def save_checkpoint(path, net, optimizer, args, epoch, best):
    """Write net, optimizer and what rebuilds them to one safetensors file.

    epoch is the next one to run, best the metadata of the best epoch so far, None before one.
    """
    tensors = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    names = [name for name, _ in net.named_parameters()]
    state = optimizer.state_dict()["state"]
    for index, name in enumerate(names):
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"optimizer.{moment}.{name}"] = state[index][moment].numpy()
    metadata = {
        "epoch": epoch,
        "best": best,
        "model": {
            name: getattr(net, name)
            for name in ("n_channels", "n_classes", "bilinear", "base_channels")
        },
        "normalisation": "each slice to mean 0 and standard deviation 1",
        "threshold": (best or {}).get("threshold", 0.5),
        "optimizer_step": state["step"],
        "arguments": vars(args),
        "versions": {"oneflow": flow.__version__, "numpy": np.__version__},
    }
    write_checkpoint(path, tensors, metadata)


def write_checkpoint(path, tensors, metadata):
    """Write a safetensors file whole, with a checksum. tensors: {name: array}; metadata: JSON."""
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    texts["checksum"] = json.dumps(checksum(tensors, texts))
    with write_whole(path) as file:
        file.write(safetensors.numpy.save(tensors, texts))


def checksum(tensors, texts):
    """SHA-256, in hex, of all that a checkpoint holds; texts: its metadata, {key: string}."""
    digest = hashlib.sha256()
    for key in sorted(texts):
        digest.update(f"{key}={texts[key]}\n".encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(tensors[name]))
    return digest.hexdigest()


def load_checkpoint(path, trust_pickle=False):
    """Read a checkpoint -> (net tensors, optimizer tensors, metadata); runs no code from it.

    The tensors are dicts of NumPy arrays under their state-dict names, the metadata is a dict,
    empty for a file of bare weights. A checksum, where there is one, is checked. A folder written
    by `flow.save` is unpickled, which runs whatever code it holds, so that needs `trust_pickle`.
    Raises InputError.
    """
    path = Path(path)
    if path.is_dir():
        if not trust_pickle:
            raise InputError(
                f"{path}: a folder of flow.save runs code when it is loaded; "
                "if you trust where it comes from, pass --trust_pickle"
            )
        try:
            state = flow.load(str(path))
            return {name: tensor.numpy() for name, tensor in state.items()}, {}, {}
        except Exception as error:  # whatever unpickling brings up
            raise InputError(f"{path}: not a state dict of flow.save ({error!r})") from None
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; train one first, with bash train.sh")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            texts = file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None
    expected = texts.pop("checksum", None)
    ours = not {"model", "arguments", "threshold"}.isdisjoint(texts)
    if (ours or expected) and expected != json.dumps(checksum(tensors, texts)):
        raise InputError(f"{path}: is damaged, what it holds doesn't match its checksum")
    metadata = {}
    for key, text in texts.items():
        # Others' metadata, such as PyTorch's format: pt, aren't JSON.
        with suppress(ValueError, RecursionError):
            metadata[key] = json.loads(text)
    if isinstance(metadata.get("arguments"), dict):
        metadata["arguments"].setdefault("dropout", 0.0)  # older runs had none
    optimizer = {name: tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")}
    return tensors, optimizer, metadata


def fill(path, net, tensors):
    """Load a checkpoint's net tensors into the net. Raises InputError where they don't fit."""
    own = net.state_dict()
    odd = set(own) ^ set(tensors) or {n for n in own if not alike(own[n], tensors[n])}
    odd = odd or {n for n in own if n.endswith("running_var") and tensors[n].min() < 0}
    if odd:
        raise InputError(
            f"{path}: doesn't hold this U-Net: {len(odd)} tensors missing, unknown, of another "
            f"shape or type, or not finite, among them {min(odd)}"
        )
    # tensor(), not from_numpy(): the array's memory is not ours to keep
    net.load_state_dict({n: flow.tensor(tensors[n], dtype=own[n].dtype) for n in own})


def alike(own, tensor):
    """Whether an array can take the place of a net's tensor: shape, kind of number, finite."""
    if tuple(own.shape) != tensor.shape:
        return False
    if not own.dtype.is_floating_point:
        return np.issubdtype(tensor.dtype, np.integer)
    # From beyond 1e30 nothing finite would come.
    return np.issubdtype(tensor.dtype, np.floating) and bool((np.abs(tensor) < 1e30).all())


def architecture(path, tensors):
    """What UNet() is to be called with for a net's tensors, told by their names and shapes.

    Raises InputError where that is no net, or one so much larger than the file that it can't be
    its: who asks for terabytes should have sent some.
    """
    try:
        base_channels, n_channels = tensors["inc.double_conv.0.weight"].shape[:2]
        n_classes = tensors["outc.conv.weight"].shape[0]
        sizes = {
            "inc.double_conv.0.weight": 9 * base_channels * n_channels,
            "outc.conv.weight": base_channels * n_classes,
            "down4.maxpool_conv.1.double_conv.3.weight": 9 * (8 * base_channels) ** 2,
        }
        whole = all(tensors[name].size >= max(size, 1) for name, size in sizes.items())
    except (KeyError, IndexError, ValueError):
        whole = False
    if not whole:
        raise InputError(f"{path}: doesn't hold a U-Net's weights")
    return n_channels, n_classes, "up1.up.weight" not in tensors, base_channels


def net_of_checkpoint(path, trust_pickle=False):
    """Rebuild the net that a checkpoint, or bare weights, hold -> (net, metadata).

    Raises InputError.
    """
    tensors, _, metadata = load_checkpoint(path, trust_pickle)
    net = UNet(*architecture(path, tensors))
    fill(path, net, tensors)
    return net, metadata


def resume(args, net, optimizer):
    """Load args.resume, where given, into net and optimizer; returns (first epoch, best).

    Raises InputError where the checkpoint holds another net or only weights.
    """
    if not args.resume:
        return 1, None
    tensors, moments, metadata = load_checkpoint(args.resume)
    if not moments or "optimizer_step" not in metadata:
        raise InputError(f"{args.resume}: holds weights only, too little to go on from")
    fill(args.resume, net, tensors)
    step, epoch, best = (metadata.get(key) for key in ("optimizer_step", "epoch", "best"))
    state = optimizer.state_dict()
    for index, (name, parameter) in enumerate(net.named_parameters()):
        for moment in ("exp_avg", "exp_avg_sq"):
            values = moments.get(f"optimizer.{moment}.{name}")
            if values is None or not alike(parameter, values):
                raise InputError(f"{args.resume}: its {moment} of {name} is missing or damaged")
            state["state"][index][moment] = flow.tensor(values, dtype=parameter.dtype)
    try:  # whatever a stranger wrote there
        sound = type(step) is type(epoch) is int and 0 <= step < 2**31 and 0 < epoch < 2**31
        if best is not None:
            sound &= isinstance(best["by"], str) and isinstance(best["epoch"], int)
            sound &= math.isfinite(best["loss"]) and 0 <= best.get("threshold", 0.5) <= 1
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        sound = False
    if not sound:
        raise InputError(f"{args.resume}: its optimizer_step, epoch or best make no sense")
    state["state"]["step"] = step
    optimizer.load_state_dict(state)
    saved = metadata.get("arguments") or {}
    for name in ("data_digest", "processes", *RESUMED, "val_count", "augment", "amp"):
        mine = getattr(args, name, False)
        if RANK == 0 and name in saved and saved[name] != mine:
            change = "other slices" if name == "data_digest" else f"{name} {saved[name]} -> {mine}"
            print(f"not as {args.resume} was trained: {change}")
    global kept
    kept = f"nothing new was finished, {args.resume} is as it was"
    if RANK == 0:
        if epoch > args.epochs:
            print(f"nothing to do: {args.resume} has {epoch - 1} epochs, a larger --epochs goes on")
        else:
            print(f"resuming {args.resume} at epoch {epoch}")
    return epoch, best


COLUMNS = ("epoch", "train_loss", "val_loss", "val_misclassification", "val_v_rand", "val_v_info")
COLUMNS += ("val_threshold", "lr", "seconds", "images_per_second")


def start_log(args, first_epoch):
    """Empty the log and its CSV, or cut them to the epochs before the first one to run.

    Makes the folders that the run writes to. Raises InputError where it can't write.
    """
    if RANK:
        return
    check_output(args.log_file)
    log, table = Path(args.log_file), Path(args.log_file).with_suffix(".csv")
    if log == table:
        raise InputError(f"--log_file {log}: the .csv is written beside it, name a .txt")
    check_output(table)
    last = Path(args.checkpoint_dir) / "last.safetensors"
    make_folder(last.parent)
    global locked
    if locked is not None:
        os.close(locked)
    locked = os.open(last.parent, os.O_RDONLY)
    try:
        fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however
    except BlockingIOError:
        raise InputError(
            f"{last.parent}: another training writes there, choose another --checkpoint_dir"
        ) from None
    except OSError:
        pass  # a file system without locks, as some that are shared
    if last.exists() and not args.resume:
        print(
            f"begins anew: replaces {log} now, {last} and best.safetensors after the first epoch "
            f"(--resume {last} would go on)"
        )
    lines, rows = [], []
    for path in (log, table, last, last.with_name("best.safetensors")):
        unfinished_file(path).unlink(missing_ok=True)  # of a run that was killed
    if first_epoch > 1 and log.exists() and table.exists():
        # A power cut can leave zeros where a line was not yet on the disk.
        lines, table_lines = (
            path.read_text(errors="replace").replace("\0", "").splitlines() for path in (log, table)
        )
        rows = [row for row in csv.DictReader(table_lines) if (row["epoch"] or "").isdecimal()]
        rows = [row for row in rows if int(row["epoch"]) < first_epoch]
        rows = [",".join(row.get(column) or "" for column in COLUMNS) for row in rows]
        lines = lines[: len(rows)]
    for path, text in ((log, lines), (table, [",".join(COLUMNS), *rows])):
        with write_whole(path) as file:
            file.writelines(f"{line}\n".encode() for line in text)


def append(path, line):
    """Add one line to a file, on the disk when this returns. On a full disk it adds nothing."""
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            data = f"{line}\n".encode()
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(size)
            error.filename = str(path)
            raise


def finish_epoch(args, net, optimizer, epoch, best, trained, scores):
    """Log an epoch and write its checkpoints; returns the new best.

    trained: what train_one_epoch returned; scores: what validate returned; best: {"epoch",
    "loss", "by", "threshold"} of the best epoch, None before the first. "loss" is what --best_by
    asks for, 1 - V_Rand for v_rand; "threshold" parts cells best there, 0.5 without validation.
    Raises FloatingPointError where the epoch has spoilt the net, before anything is written.
    """
    global kept
    train_loss, samples, seconds = trained
    left_out, scores = scores is None, scores or {}
    values = (*scores.values(), *(tensor.numpy() for tensor in net.state_dict().values()))
    if not all(np.isfinite(value).all() for value in values):
        raise FloatingPointError(
            f"weights or validation are no longer finite after epoch {epoch}: try a smaller --lr; "
            f"{kept}"
        )
    by, loss = "train_loss", train_loss
    if scores and args.best_by == "v_rand":
        by, loss = "val_v_rand", 1 - scores["val_v_rand"]
    elif scores:
        by, loss = "val_loss", scores["val_loss"]
    improved = not left_out and (best is None or best["by"] != by or loss < best["loss"])
    if improved:
        threshold = scores.get("val_threshold", 0.5)
        best = {"epoch": epoch, "loss": loss, "by": by, "threshold": threshold}
    if RANK:
        return best

    line = f"epoch: {epoch} avg loss: {train_loss:.6f} time: {seconds:.0f} s"
    line += "".join(f" {name.replace('_', ' ')}: {value:.4f}" for name, value in scores.items())
    row = {
        "epoch": epoch,
        "train_loss": f"{train_loss:.6f}",
        "lr": f"{optimizer.param_groups[0]['lr']:.6g}",  # after the epoch
        "seconds": f"{seconds:.2f}",
        "images_per_second": f"{samples / seconds:.3f}",
        **{name: f"{value:.6f}" for name, value in scores.items()},
    }
    # The log goes first: resuming cuts it to the checkpoint's epoch, but can't make up a line.
    append(args.log_file, f"{train_loss:.4f}")
    append(Path(args.log_file).with_suffix(".csv"), ",".join(str(row.get(c, "")) for c in COLUMNS))
    folder = Path(args.checkpoint_dir)
    if improved:
        save_checkpoint(folder / "best.safetensors", net, optimizer, args, epoch + 1, best)
    last = folder / "last.safetensors"
    save_checkpoint(last, net, optimizer, args, epoch + 1, best)
    kept = f"epoch {epoch} is in {last}, go on with --resume {last}"
    print(line + (f" (best {by.replace('_', ' ')})" if improved else ""), flush=True)
    return best
