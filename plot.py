"""Draw the loss of a training run.

    python3 plot.py Unet_train.txt
    python3 plot.py Unet_train.csv --out loss.png

A plain log is a loss a line. Where the CSV of the same run is beside it, that is drawn: it has the validation loss too.
"""

import csv
import os
from contextlib import suppress
from pathlib import Path

from common import start
from common.arguments import InputError, Parser, given_path
from common.files import check_output, write_whole


def read_log(path):
    """Log -> {"training": [(epoch, loss)], "validation": [(epoch, loss)]}. Raises InputError."""
    try:
        log = path.read_text().splitlines()
        rows = list(csv.DictReader(log)) if path.suffix == ".csv" else [{"train_loss": loss} for loss in log if loss]
        if not rows:
            raise ValueError("no epoch in it yet")
        training = [(int(row.get("epoch", number)), float(row["train_loss"])) for number, row in enumerate(rows, 1)]
        validation = [(int(row["epoch"]), float(row["val_loss"])) for row in rows if row.get("val_loss")]
        return {"training": training, "validation": validation}
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise InputError(f"{path}: not a loss log ({getattr(error, 'strerror', error)})") from None


def main():
    parser = Parser(__doc__)
    parser.add_argument("log", type=given_path, help="Unet_train.txt or Unet_train.csv")
    parser.add_argument("--out", type=given_path, default="loss.png", help="the picture")
    args = parser.parse_args()
    log, out = Path(args.log), Path(args.out)
    losses, table = read_log(log), log.parent / f"{log.stem}.csv"
    with suppress(InputError):  # no such file, or no log
        more = read_log(table)
        if [f"{loss:.4f}" for _, loss in more["training"]] == [f"{loss:.4f}" for _, loss in losses["training"]]:
            losses, log = more, table  # else it is another run's
    losses = {name: points for name, points in losses.items() if points}
    if out.suffix.lower() != ".png" or (out.is_file() and b"Matplotlib" not in out.read_bytes()[:200]):  # as in ours
        raise InputError(f"--out {out}: is no picture of plot.py's, or no .png: choose another name")
    check_output(out)
    os.environ.pop("MPLBACKEND", None)  # a notebook's isn't there for us, and matplotlib refuses to be imported then
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in losses.items():
        axes.plot(*zip(*points, strict=True), ".-", label=name)
        epoch, loss = min(points, key=lambda point: point[1])
    text = f"lowest {name} loss: {loss:.4f}, epoch {epoch}"  # of validation, where that was done
    axes.plot(epoch, loss, "*", color="black", markersize=12, label=text)
    axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.legend()
    with write_whole(out, sync=False) as file:
        figure.savefig(file, format="png", dpi=150)
    count = len(losses["training"])
    print(f"{out}: {count} epoch{'s' * (count != 1)} of {log}")


if __name__ == "__main__":
    start.run(main)
