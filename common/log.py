"""The loss log and the table beside it, written whole from a checkpoint's rows, so that they can't disagree."""

import csv
import io
from pathlib import Path

from common.files import write_whole

COLUMNS = ("epoch", "train_loss", "val_loss", "val_misclassification", "val_v_rand", "val_v_info", "val_threshold")
COLUMNS += ("lr", "seconds", "images_per_second")


def table_path(path):
    """The table's file beside the log's."""
    return Path(path).with_suffix(".csv")


def row_of(epoch, train_loss, samples, seconds, lr, further):
    """An epoch as a row, {column: text}; further: {name: number}, the validation scores and what else a script counts.

    lr: the learning rate after the epoch. A name that COLUMNS doesn't have is a column of its own, after those.
    """
    row = {"epoch": str(epoch), "train_loss": f"{train_loss:.6f}", "lr": f"{lr:.6g}", "seconds": f"{seconds:.2f}"}
    row["images_per_second"] = f"{samples / seconds:.3f}"
    return row | {name: f"{value:.6f}" for name, value in further.items()}


def are_rows(rows, count):
    """Whether that is the rows of so many epochs: a checkpoint may come from a stranger."""
    try:
        texts = all(isinstance(text, str) for row in rows for item in row.items() for text in item)
        return texts and [int(row["epoch"]) for row in rows if float(row["train_loss"]) >= 0] == [*range(1, count + 1)]
    except (TypeError, KeyError, ValueError, AttributeError):
        return False


def write_log(path, rows):
    """Write the log, an average loss a line with four decimals, and the table, a .csv beside it."""
    table = io.StringIO()
    columns = dict.fromkeys(COLUMNS) | dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    losses = "".join(f"{float(row['train_loss']):.4f}\n" for row in rows)
    for file_path, text in ((path, losses), (table_path(path), table.getvalue())):
        with write_whole(file_path) as file:
            file.write(text.encode())
