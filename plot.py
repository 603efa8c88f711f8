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
import sys
from pathlib import Path

import matplotlib


def read_log(path):
    """Log file -> (training losses, validation losses), lists of floats, an epoch an item.

    The second list is empty without validation. Raises OSError or ValueError.
    """
    if path.suffix != ".csv":
        return [float(line) for line in path.read_text().split()], []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "train_loss" not in rows[0]:
        raise ValueError("no column train_loss")
    train = [float(row["train_loss"]) for row in rows]
    return train, [float(row["val_loss"]) for row in rows if row.get("val_loss")]


def draw(train, val, out):
    """Write the picture of the losses to the file `out`; the best epoch is marked."""
    import matplotlib.pyplot as plt

    epochs = range(1, len(train) + 1)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(epochs, train, ".-", label="training")
    judged, name = (val, "validation") if len(val) == len(train) else (train, "training")
    if judged is val:
        axes.plot(epochs, val, ".-", label="validation")
    best = min(epochs, key=lambda epoch: judged[epoch - 1])
    label = f"lowest {name} loss: {judged[best - 1]:.4f}, epoch {best}"
    axes.plot(best, judged[best - 1], "*", color="black", markersize=12, label=label)
    axes.set(xlabel="epoch", ylabel="loss (binary cross-entropy)", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)
    if matplotlib.get_backend().lower() != "agg":
        plt.show()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="Unet_train.txt or Unet_train.csv")
    parser.add_argument("--out", default="loss.png", help="the picture (default: loss.png)")
    args = parser.parse_args()
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        matplotlib.use("agg")
    log = args.log
    try:
        train, val = read_log(log)
        beside = log.with_suffix(".csv")
        if log != beside and beside.exists():
            more = read_log(beside)
            if [round(loss, 4) for loss in more[0]] == train:  # else it is another run's
                (train, val), log = more, beside
        if not train:
            raise ValueError("no epoch in it yet")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        print(f"plot.py: {log}: not a loss log ({reason}), train first", file=sys.stderr)
        return 2
    try:
        draw(train, val, args.out)
    except (OSError, ValueError) as error:
        print(f"plot.py: {args.out}: can't be written ({error})", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(train)} epochs of {log}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
