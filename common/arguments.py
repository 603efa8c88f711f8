"""The scripts' flags: what a value may be, and the flags that the three training scripts share."""

import argparse
import sys

MIN_CROP = 32  # pixels: one pixel at the deepest level has no variance for batch normalisation
DATA = "data/train_image"
USUAL = ["flip", "rotate", "elastic"]  # augmentations; docs/recipe.md says why not intensity
WIDTH = {"cuda": 64, "cpu": 16}  # base channels where --base_channels is left open

# What a resumed run takes over from its checkpoint. Paths have to be said again where they are not the default: a
# checkpoint may come from a stranger, who should not choose which files are read and written.
RESUMED = ("epochs", "batch_size", "repeat", "lr", "schedule", "base_channels", "crop", "border_weight", "dropout")
RESUMED += ("val_every", "best_by", "seed", "cpu_kernels", "amp", "val_count", "pixel_size")
PATHS = ("data_path", "label_path", "val_path", "val_label_path", "checkpoint_dir", "log_file")


class InputError(ValueError):
    """What the user gave can't be used: scripts print it as one line and exit with 2."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Leaves a docstring's lines as they are, and says each flag's default."""

    def _get_help_string(self, action):
        told = "default" in action.help or action.default in (None, False, argparse.SUPPRESS)
        return action.help if told else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse's, with a script's docstring as its help; raises InputError instead of ending the process."""

    def __init__(self, doc, **options):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False, **options)

    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def number(kind, minimum, maximum=2**31 - 1, besides=None):
    """An argparse type: an int or float from `minimum` to `maximum`, or `besides`."""

    def parse(text):
        value = kind(text)
        if not minimum <= value <= maximum and value != besides:
            nor = ", nor 0" * (besides == 0)
            raise argparse.ArgumentTypeError(f"{text} is not from {minimum:g} to {maximum:g}{nor}")
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
    add("--amp", choices=("auto", "on", "off"), default="auto", help="mixed precision; auto: where a CPU has bfloat16")


def training_parser(doc, augmentations):
    """The training scripts' parser. doc: the script's docstring; augmentations: the kinds that the data set knows."""
    parser, path, count = Parser(doc), given_path, number(int, 1)
    add = parser.add_argument_group("slices").add_argument
    add("--data_path", type=path, default=DATA, help="folder or TIFF stack of training slices")
    add("--label_path", type=path, help="their labels (default: data_path with label for image)")
    add("--pixel_size", type=number(float, 1e-3, 1e6), default=4.0, metavar="NM", help="their nanometres a pixel")
    add("--num_workers", type=number(int, 0, 64), default=0, help="processes that read slices")
    group = parser.add_argument_group("validation")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--val_count", type=number(int, 0), default=0, help="hold out the last N training slices")
    either("--val_path", type=path, help="or validate on this folder or stack of slices")
    add("--val_label_path", type=path, help="their labels (default: val_path with label for image)")
    add("--val_every", type=count, default=5, help="validate each N epochs")
    add("--best_by", choices=("loss", "v_rand"), default="loss", help="what best.safetensors is best in")
    add = parser.add_argument_group("network and device").add_argument
    add("--base_channels", type=number(int, 1, 1024), help="width of the first level (default: 64 on a GPU, else 16)")
    add("--bilinear", action="store_true", help="upsample by interpolation, not by learned weights")
    add("--dropout", type=number(float, 0, 0.99), default=0.5, help="share set to 0 after the two deepest levels")
    add_device(add)
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, default=40, help="train up to this epoch")
    add("--repeat", type=number(int, 1, 10_000), default=8, help="times an epoch sees each slice")
    add("--batch_size", type=count, default=4, help="crops a step and device")
    add("--lr", type=number(float, 1e-30, 1e38), default=1e-3, help="learning rate")
    add("--schedule", choices=("cosine", "constant"), default="cosine", help="whether it falls to 0 or stays")
    add("--crop", type=number(int, MIN_CROP, besides=0), help="side of crops; 0: whole slices (default: 256 at most)")
    add("--augment", nargs="*", choices=augmentations, default=USUAL, help="at random; no value: nothing")
    add("--border_weight", type=number(float, 0, 1e6), default=10.0, help="extra loss on membrane between near cells")
    add("--seed", type=number(int, 0), default=0, help="of all that is random")
    add("--rank_timeout", type=number(float, 0.1), default=1800.0, help="seconds that processes wait for one another")
    group = parser.add_argument_group("what is kept")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--checkpoint_dir", "--checkpoint", type=path, default="checkpoints", help="folder for last and best epoch")
    add("--log_file", type=path, default="Unet_train.txt", help="a loss a line; more is in the .csv")
    either("--resume", type=path, metavar="FILE", help="go on from this checkpoint, with its arguments but for paths")
    either("--init", type=path, metavar="FILE", help="begin with the weights of this checkpoint, and its width")
    return parser


def parse_args(doc, augmentations, argv=None):
    """The training scripts' arguments; those of --resume's checkpoint are the defaults. Raises InputError."""
    from common.images import SUFFIXES  # here, since it needs OpenCV and this file

    parser = training_parser(doc, augmentations)
    given, flags = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(PATHS))), []  # None: a path left open
    if path := given.resume or given.init:  # whose net's width is taken over, and with --resume the arguments
        from common.checkpoint import architecture, read  # here, since they need OneFlow, which others of this don't

        tensors, kept, metadata = read(path)
        saved = metadata.get("arguments") if given.resume else {}
        if not isinstance(saved, dict) or (given.resume and not kept and "optimizer" not in metadata):
            raise InputError(f"{path}: holds weights only, which is too little: --init begins a training with them")
        left = {name: saved.get(name) for name in PATHS if getattr(given, name) is None}
        if other := [f"--{name} {was}" for name, was in left.items() if was not in (None, parser.get_default(name))]:
            raise InputError(f"{path}: was made with {' '.join(other)}, pass these flags with what they should be now")
        *_, bilinear, saved["base_channels"] = architecture(path, tensors)
        saved["val_count"] = None if given.val_path else saved.get("val_count")
        flags = ["--bilinear"] * bilinear
        flags += [f"--{name}={saved[name]}" for name in RESUMED if type(saved.get(name)) in (int, float, str)]  # a word
        if isinstance(saved.get("augment"), list):
            flags += ["--augment", *(kind for kind in saved["augment"] if kind in augmentations)]
    args = parser.parse_args(flags + (sys.argv[1:] if argv is None else argv))  # which checks the saved ones too
    if args.checkpoint_dir.endswith(".safetensors"):
        parser.error(f"--checkpoint_dir {args.checkpoint_dir}: names a folder to write to; --init FILE begins with it")
    if args.log_file.lower().endswith((".csv", *SUFFIXES)):
        parser.error(f"--log_file {args.log_file}: names an image, or the table that is written beside it; name a .txt")
    if args.best_by == "v_rand" and not (args.val_path or args.val_count):
        parser.error("--best_by v_rand needs validation slices, pass --val_count N")
    if args.val_label_path and not args.val_path:
        parser.error("--val_label_path: labels of which slices? pass --val_path")
    return args
