"""The scripts' flags: what a value may be, and the flags that the three training scripts share."""

import argparse
import sys
from pathlib import Path

MIN_CROP = 32  # pixels: one pixel at the deepest level has no variance for batch normalisation
DATA = "data/train_image"
WIDTH = {"cuda": 64, "cpu": 16}  # base channels where --base_channels is left open

# What a resumed run takes over from its checkpoint. Paths have to be said again where they are not the default: a
# checkpoint may come from a stranger, who should not choose which files are read and written.
RESUMED = ("epochs", "batch_size", "repeat", "lr", "schedule", "base_channels", "crop", "border_weight", "dropout")
RESUMED += ("val_every", "best_by", "seed", "cpu_kernels", "amp", "val_count")
PATHS = ("data_path", "label_path", "val_path", "val_label_path", "checkpoint_dir", "log_file")


class InputError(ValueError):
    """What the user gave can't be used: scripts print it as one line and exit with 2."""


class Parser(argparse.ArgumentParser):
    """argparse's, with a script's docstring as its help; raises InputError instead of ending the process."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def number(kind, minimum, above=False, maximum=None):
    """An argparse type: a finite int or float from `minimum` (or above it) to `maximum`."""
    if maximum is None:
        maximum = 2**31 - 1 if kind is int else sys.float_info.max

    def parse(text):
        value = kind(text)
        if not value >= minimum or (above and value == minimum):
            raise argparse.ArgumentTypeError(f"{text} is not {f'above {minimum}' if above else f'{minimum} or more'}")
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


def add_device(add):
    """The flags on where and how a net computes, of training and predicting."""
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add("--cpu_kernels", choices=("auto", "off"), default="auto", help="off: OneFlow's own slow kernels on a CPU")


def training_parser(doc, augmentations):
    """The parser of the training scripts; augmentations: the kinds that the data set knows."""
    parser = Parser(doc)
    add = parser.add_argument_group("slices").add_argument
    path, default = given_path, "(default: %(default)s)"
    add("--data_path", type=path, default=DATA, help=f"folder or TIFF stack of training slices {default}")
    add("--label_path", type=path, help="their labels (default: data_path with label for image)")
    add("--val_path", type=path, help="folder or stack of validation slices")
    add("--val_label_path", type=path, help="their labels (default: val_path with label for image)")
    add("--val_count", type=number(int, 0), default=0, help="hold out the last N training slices for validation")
    add("--num_workers", type=number(int, 0, maximum=64), default=0, help=f"processes that read slices {default}")

    add = parser.add_argument_group("network and device").add_argument
    width = number(int, 1, maximum=1024)
    text = f"channels of the first level (default: {WIDTH['cuda']} on a GPU, {WIDTH['cpu']} on a CPU)"
    add("--base_channels", type=width, help=text)
    add("--bilinear", action="store_true", help="upsample by interpolation, not by learned weights")
    share = number(float, 0, maximum=0.99)
    add("--dropout", type=share, default=0.5, help=f"share set to 0 after the two deepest levels {default}")
    add_device(add)
    add("--amp", choices=("auto", "on", "off"), default="auto", help=f"mixed precision {default}")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), default=40, help=f"train up to this epoch {default}")
    add("--repeat", type=number(int, 1, maximum=1e4), default=8, help=f"times an epoch sees each slice {default}")
    add("--batch_size", type=number(int, 1), default=4, help=f"crops a step and device {default}")
    add("--lr", type=number(float, 0, above=True), default=1e-3, help=f"learning rate {default}")
    shape = "the learning rate falls to 0 along a cosine, or stays"
    add("--schedule", choices=("cosine", "constant"), default="cosine", help=f"{shape} {default}")
    crop = "train on random crops of N pixels a side; 0: whole slices (default: 256, or what the smallest slice holds)"
    add("--crop", type=number(int, 0), metavar="N", help=crop)
    kinds = ("flip", "rotate")
    text = "what is done to slices at random; no value: nothing (default: flip rotate)"
    add("--augment", nargs="*", choices=augmentations, default=list(kinds), help=text)
    weight = number(float, 0, maximum=1e6)
    text = f"how much more the loss counts membrane between two near cells; 0: alike {default}"
    add("--border_weight", type=weight, default=10.0, metavar="W0", help=text)
    add("--seed", type=number(int, 0), default=0, help=f"of all that is random {default}")
    limit = number(float, 0, above=True)
    text = f"of several processes, end one that got no further for S seconds {default}"
    add("--rank_timeout", type=limit, default=1800.0, metavar="S", help=text)

    add = parser.add_argument_group("what is kept").add_argument
    text = f"folder for last.safetensors and best.safetensors {default}"
    add("--checkpoint_dir", "--checkpoint", type=path, default="checkpoints", help=text)
    add("--resume", type=path, metavar="FILE", help="go on from this checkpoint, with its arguments")
    add("--init", type=path, metavar="FILE", help="begin with the weights of this checkpoint, and its width")
    text = f"a loss a line; more goes into the .csv beside it {default}"
    add("--log_file", type=path, default="Unet_train.txt", help=text)
    add("--val_every", type=number(int, 1), default=5, help=f"validate each N epochs {default}")
    text = f"what best.safetensors is best in: validation (else training) loss, or validation V_Rand {default}"
    add("--best_by", choices=("loss", "v_rand"), default="loss", help=text)
    return parser


def parse_args(doc, augmentations, argv=None):
    """The training scripts' arguments. With --resume, the checkpoint's own are the defaults.

    doc: the script's docstring. augmentations: the kinds that the data set knows. Raises InputError.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = training_parser(doc, augmentations)
    args = parser.parse_args(argv)
    if args.resume and args.init:
        raise InputError("--init: --resume has the weights already, leave one of the two out")
    if args.resume or args.init:
        from common.checkpoint import arguments_of  # here, since it needs OneFlow, which other users of this don't

        path = args.resume or args.init
        args = resumed(parser, args, argv, path, arguments_of(path, init=not args.resume), augmentations)
    if args.checkpoint_dir.endswith(".safetensors"):
        raise InputError(
            f"--checkpoint_dir {args.checkpoint_dir}: is the folder to write to; --init FILE begins with weights"
        )
    if args.crop and args.crop < MIN_CROP:
        raise InputError(f"--crop {args.crop} is neither 0 nor {MIN_CROP} or more")
    if args.val_path and args.val_count:
        raise InputError("--val_count: the validation slices are those of --val_path, leave one of the two out")
    if args.best_by == "v_rand" and not (args.val_path or args.val_count):
        raise InputError("--best_by v_rand needs validation slices, pass --val_count N")
    if args.val_label_path and not args.val_path:
        raise InputError("--val_label_path: labels of which slices? pass --val_path")
    return args


def resumed(parser, args, argv, path, saved, augmentations):
    """The arguments with those saved in a checkpoint as defaults, passed through the parser, which checks them."""
    said = {word.split("=")[0] for word in argv}
    for name in PATHS:
        unsaid = not {f"--{name}", f"--{name}".removesuffix("_dir")} & said
        if unsaid and saved.get(name) not in (None, getattr(args, name)):
            raise InputError(f"{path}: was made with --{name} {saved[name]}, pass --{name}")
    flags = ["--bilinear"] if saved.get("bilinear") is True else []
    for name in RESUMED:
        if isinstance(saved.get(name), int | float | str) and not (name == "val_count" and args.val_path):
            flags.append(f"--{name}={saved[name]}")  # one word, whatever the value holds
    if isinstance(saved.get("augment"), list):
        flags += ["--augment", *(kind for kind in augmentations if kind in saved["augment"])]
    args = parser.parse_args(flags + argv)
    if (args.bilinear, args.base_channels) != (saved["bilinear"], saved["base_channels"]):
        net = f"{saved['base_channels']} base channels{', bilinear' * saved['bilinear']}"
        raise InputError(f"{path}: a net of {net}; leave --base_channels and --bilinear as they were")
    return args


def default_label_path(path):
    """The folder or stack of labels beside one of slices: its name with `label` for the last `image`; None if none."""
    path = Path(path)
    return path.with_name("label".join(path.name.rsplit("image", 1))) if "image" in path.name else None
