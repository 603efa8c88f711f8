#!/usr/bin/env bash
# Predicts slices, with the weights of your last training or else ours: bash test.sh --Test_Data_path my_slices --tta
# Flags go to predict_unet_test.py. What it reads and writes is where you stand; where you have no data/test_image and
# name no other slices, it is that of this repository.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/env.sh"

data=() given=" $* "
if [[ $given != *" --Test_Data_path"* && $given != *" --help "* && $given != *" -h "* && ! -e data/test_image ]]; then
    [ -e "$here/data/test_image" ] || [ -e "$here/data/train_image" ] || python3 "$here/data/prepare.py" auto
    [ . -ef "$here" ] || data=(--Test_Data_path "$here/data/test_image")
fi
exec python3 "$here/predict_unet_test.py" "${data[@]}" "$@"
