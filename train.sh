#!/usr/bin/env bash
# Sets everything up, trains on one device and draws the loss: bash train.sh --epochs 100 --val_count 5
# Flags go to TrainUnetDataSet.py. What it reads and writes is where you stand; where you have no data/train_image and
# name no other slices, it is that of this repository.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/env.sh"

log=Unet_train.txt data=() given=" $* "
for flag in "$@"; do
    [[ $flag != -h && $flag != --help ]] || exec python3 "$here/TrainUnetDataSet.py" --help
    [[ ${before-} != --log_file ]] || log=$flag
    [[ $flag != --log_file=* ]] || log=${flag#*=}
    before=$flag
done
if [[ $given != *" --data_path"* && ! -e data/train_image ]]; then
    [ -e "$here/data/train_image" ] || python3 "$here/data/prepare.py" auto
    [ . -ef "$here" ] || data=(--data_path "$here/data/train_image")
fi
python3 "$here/TrainUnetDataSet.py" "${data[@]}" "$@"
python3 "$here/plot.py" "$log" || echo "train.sh: the training is done, only its loss is not drawn" >&2
