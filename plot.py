"""Draw the loss of a training run.

    python3 plot.py Unet_train.txt
    python3 plot.py Unet_train.csv --out loss.png

Reads the plain log (a loss a line) or the CSV. Beside a plain log, the CSV of the same run is used if it is there,
since it knows the validation loss too. Writes a PNG, and shows a window where there is a display.
"""

import csv
import os
from contextlib import suppress
from pathlib import Path

from common import start
from common.arguments import InputError, Parser, given_path
from common.files import write_whole

MADE_BY = b"Matplotlib"  # what is in the first bytes of a PNG of ours


def read_log(path):
    """Log file -> (epochs, training losses, validation losses), lists with an item an epoch.

    Where there was no validation, its loss is NaN. Raises OSError or ValueError.
    """
    if path.suffix != ".csv":
        train = [float(line) for line in path.read_text().split()]
        return list(range(1, len(train) + 1)), train, [float("nan")] * len(train)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "train_loss" not in rows[0]:
        raise ValueError("no column train_loss")
    epochs = [int(row["epoch"]) for row in rows]
    train = [float(row["train_loss"]) for row in rows]
    return epochs, train, [float(row.get("val_loss") or "nan") for row in rows]


def find_losses(log):
    """(what read_log gives, the file that it was read from), the CSV of the same run rather than the plain log.

    Raises InputError.
    """
    try:
        losses, beside = read_log(log), log.with_suffix(".csv")
        if log != beside and beside.exists():
            more = read_log(beside)
            if [f"{loss:.4f}" for loss in more[1]] == log.read_text().split():
                losses, log = more, beside  # else it is another run's
        if not any(loss == loss for loss in losses[1]):
            raise ValueError("no epoch in it yet")
    except (OSError, ValueError, TypeError, KeyError, OverflowError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{log}: not a loss log ({reason})") from None
    return losses, log


def draw(figure, epochs, train, val):
    """Draw the losses into a matplotlib Figure; the best epoch is marked."""
    axes = figure.subplots()
    axes.plot(epochs, train, ".-", label="training")
    judged, name = [pair for pair in zip(train, epochs, strict=True) if pair[0] == pair[0]], "training"
    # Not each epoch is validated: a line through those that are. NaN isn't equal to itself.
    validated = [pair for pair in zip(val, epochs, strict=True) if pair[0] == pair[0]]
    if validated:
        axes.plot([epoch for _, epoch in validated], [loss for loss, _ in validated], ".-", label="validation")
        judged, name = validated, "validation"
    loss, best = min(judged)
    axes.plot(best, loss, "*", color="black", markersize=12, label=f"lowest {name} loss: {loss:.4f}, epoch {best}")
    axes.set(xlabel="epoch", ylabel="loss (binary cross-entropy)", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()


def show(losses, options):
    """A window with the picture, where there is a display and a toolkit for one."""
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    from matplotlib import pyplot

    with suppress(ImportError, RuntimeError):  # no toolkit, or the display can't be reached
        draw(pyplot.figure(**options), *losses)
        if pyplot.get_backend().lower() != "agg":
            pyplot.show()


def main():
    parser = Parser(__doc__)
    parser.add_argument("log", type=given_path, help="Unet_train.txt or Unet_train.csv")
    parser.add_argument("--out", type=given_path, default="loss.png", help="the picture (default: loss.png)")
    args = parser.parse_args()
    losses, log = find_losses(Path(args.log))
    os.environ.pop("MPLBACKEND", None)  # a notebook's isn't there for us, and matplotlib refuses to be imported then
    from matplotlib.figure import Figure

    options = {"figsize": (7, 4.5), "layout": "constrained"}
    figure = Figure(**options)
    draw(figure, *losses)
    try:
        out = Path(args.out)
        if out.exists() and MADE_BY not in out.read_bytes()[:200]:
            raise InputError(f"--out {out}: is no picture of plot.py's, choose another name")
        with write_whole(out, sync=False) as file:
            figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise InputError(f"{args.out}: can't be written ({error.strerror})") from None
    count = len(losses[0])
    print(f"{args.out}: {count} epoch{'s' * (count != 1)} of {log}", flush=True)
    show(losses, options)


if __name__ == "__main__":
    start.run(main)
