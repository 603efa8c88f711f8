"""The loss log and the table beside it, written whole from a checkpoint's rows, so that they can't disagree."""

import csv
import io
from pathlib import Path

from common.files import write_whole

COLUMNS = ("epoch", "train_loss", "val_loss", "val_misclassification", "val_v_rand", "val_v_info", "val_threshold")
COLUMNS += ("lr", "seconds", "images_per_second")


def write_log(path, rows):
    """Write the log, an average loss a line with four decimals, and the table, a .csv beside it.
    rows: {column: text} of each epoch; a column that COLUMNS doesn't have comes after those."""
    table = io.StringIO()
    columns = dict.fromkeys(COLUMNS) | dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    losses = "".join(f"{float(row['train_loss']):.4f}\n" for row in rows)
    for file_path, text in ((path, losses), (Path(path).with_suffix(".csv"), table.getvalue())):
        with write_whole(file_path) as file:
            file.write(text.encode())
