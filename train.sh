#!/usr/bin/env bash
# Sets everything up, trains on one device and draws the loss. Flags go to TrainUnetDataSet.py:
#
#     bash train.sh
#     bash train.sh --epochs 100 --val_count 5
set -euo pipefail
cd "$(dirname "$0")"
source ./env.sh

log=Unet_train.txt own_data=
args=("$@")
for i in "${!args[@]}"; do
    case ${args[i]} in
        -h | --help) exec python3 TrainUnetDataSet.py --help ;;
        --data_path | --data_path=*) own_data=1 ;;
        --log_file) log=${args[i + 1]-} ;;
        --log_file=*) log=${args[i]#*=} ;;
    esac
done

if [ -z "$own_data" ] && [ ! -e data/train_image ]; then
    python3 data/prepare.py auto
fi

python3 TrainUnetDataSet.py "$@"
python3 plot.py "$log"
