"""Draw the loss of a training run.

    python3 plot.py Unet_train.txt
    python3 plot.py Unet_train.csv --out loss.png

Reads the plain log (a loss a line) or the CSV. Beside a plain log, the CSV of the same run is used
if it is there, since it knows the validation loss too. Writes a PNG, and shows a window where
there is a display.
"""

import argparse
import csv
import os
import signal
import sys
from pathlib import Path

import matplotlib


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


def draw(epochs, train, val, out):
    """Write the picture of the losses to the file `out`; the best epoch is marked."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(epochs, train, ".-", label="training")
    judged, name = zip(train, epochs, strict=True), "training"
    # Not each epoch is validated: a line through those that are. NaN isn't equal to itself.
    validated = [pair for pair in zip(val, epochs, strict=True) if pair[0] == pair[0]]
    if validated:
        losses, when = zip(*validated, strict=True)
        axes.plot(when, losses, ".-", label="validation")
        judged, name = validated, "validation"
    loss, best = min(pair for pair in judged if pair[0] == pair[0])
    label = f"lowest {name} loss: {loss:.4f}, epoch {best}"
    axes.plot(best, loss, "*", color="black", markersize=12, label=label)
    axes.set(xlabel="epoch", ylabel="loss (binary cross-entropy)", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)
    if matplotlib.get_backend().lower() != "agg":
        plt.show()


def fail(message):
    print(f"plot.py: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C without a traceback
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    parser.add_argument("log", type=Path, help="Unet_train.txt or Unet_train.csv")
    parser.add_argument("--out", default="loss.png", help="the picture (default: loss.png)")
    args = parser.parse_args()
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        matplotlib.use("agg")
    log = args.log
    try:
        losses = read_log(log)
        beside = log.with_suffix(".csv")
        if log != beside and beside.exists():
            more = read_log(beside)
            if [f"{loss:.4f}" for loss in more[1]] == log.read_text().split():
                losses, log = more, beside  # else it is another run's
        if not any(loss == loss for loss in losses[1]):
            raise ValueError("no epoch in it yet")
    except (OSError, ValueError, TypeError, KeyError, OverflowError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        fail(f"{log}: not a loss log ({reason})")
    try:
        draw(*losses, args.out)
    except (OSError, ValueError) as error:
        fail(f"{args.out}: can't be written ({error})")
    count = len(losses[0])
    print(f"{args.out}: {count} epoch{'s' * (count != 1)} of {log}")


if __name__ == "__main__":
    main()
