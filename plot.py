"""Draw the loss of a training run.

    python3 plot.py Unet_train.txt
    python3 plot.py Unet_train.csv --out loss.png

Reads the plain log (a loss a line) or the CSV. Beside a plain log, the CSV of the same run is used if it is there,
since it knows the validation loss too. Writes a PNG.
"""

import csv
import os
from pathlib import Path

from common import start
from common.arguments import InputError, Parser, given_path
from common.files import write_whole

MADE_BY = b"Matplotlib"  # what is in the first bytes of a PNG of ours


def read_log(path):
    """Log file -> {"training": [(epoch, loss)], "validation": [(epoch, loss)]}, of epochs that have one.

    Raises OSError or ValueError.
    """
    text = path.read_text()
    rows = csv.DictReader(text.splitlines())
    if path.suffix != ".csv":
        rows = ({"epoch": epoch, "train_loss": line} for epoch, line in enumerate(text.split(), 1))
    rows = [(int(row["epoch"]), row["train_loss"], row.get("val_loss")) for row in rows]
    losses = {"training": [(epoch, float(loss)) for epoch, loss, _ in rows]}
    losses["validation"] = [(epoch, float(loss)) for epoch, _, loss in rows if loss]
    if not losses["training"]:
        raise ValueError("no epoch in it yet")
    return losses


def find_losses(log):
    """(what read_log gives, the file that it was read from), the CSV of the same run rather than the plain log."""
    try:
        losses, table = read_log(log), log.with_suffix(".csv")
        if log != table and table.exists():
            more = read_log(table)
            if [f"{loss:.4f}" for _, loss in more["training"]] == log.read_text().split():  # else it is another run's
                return more, table
        return losses, log
    except (OSError, ValueError, TypeError, KeyError, OverflowError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{log}: not a loss log ({reason})") from None


def draw(axes, losses):
    """Draw the losses, and mark the lowest one of validation, or of training where nothing was validated."""
    for name, points in losses.items():
        if points:
            axes.plot(*zip(*points, strict=True), ".-", label=name)
            epoch, loss = min(points, key=lambda point: point[1])
    text = f"lowest {name if points else 'training'} loss: {loss:.4f}, epoch {epoch}"
    axes.plot(epoch, loss, "*", color="black", markersize=12, label=text)
    axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()


def main():
    parser = Parser(__doc__)
    parser.add_argument("log", type=given_path, help="Unet_train.txt or Unet_train.csv")
    parser.add_argument("--out", type=given_path, default="loss.png", help="the picture (default: loss.png)")
    args = parser.parse_args()
    losses, log = find_losses(Path(args.log))
    os.environ.pop("MPLBACKEND", None)  # a notebook's isn't there for us, and matplotlib refuses to be imported then
    from matplotlib.figure import Figure

    figure, out = Figure(figsize=(7, 4.5), layout="constrained"), Path(args.out)
    draw(figure.subplots(), losses)
    try:
        if out.exists() and MADE_BY not in out.read_bytes()[:200]:
            raise InputError(f"--out {out}: is no picture of plot.py's, choose another name")
        with write_whole(out, sync=False) as file:
            figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise InputError(f"{out}: can't be written ({error.strerror})") from None
    count = len(losses["training"])
    print(f"{out}: {count} epoch{'s' * (count != 1)} of {log}")


if __name__ == "__main__":
    start.run(main)
