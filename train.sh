#!/usr/bin/env bash
# Sets everything up, trains on one device and draws the loss. Flags go to TrainUnetDataSet.py:
#
#     bash train.sh
#     bash train.sh --epochs 100 --val_count 5
#
# What it reads and writes is where you stand; data/ of this repository where you have none and name none.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/env.sh"

log=Unet_train.txt data=() args=("$@") own_data=
for i in "${!args[@]}"; do
    case ${args[i]} in
        -h | --help) exec python3 "$here/TrainUnetDataSet.py" --help ;;
        --data_path | --data_path=*) own_data=1 ;;
        --log_file) log=${args[i + 1]-} ;;
        --log_file=*) log=${args[i]#*=} ;;
    esac
done
if [ -z "$own_data" ] && [ ! -e data/train_image ]; then
    [ -e "$here/data/train_image" ] || python3 "$here/data/prepare.py" auto
    [ . -ef "$here" ] || data=(--data_path "$here/data/train_image")
fi

python3 "$here/TrainUnetDataSet.py" "${data[@]}" "$@"
python3 "$here/plot.py" "$log" || echo "train.sh: the training is done, only its loss is not drawn" >&2
