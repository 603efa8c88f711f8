#!/usr/bin/env bash
# Predicts slices, with the weights of your last training or else those of this repository. Flags go to
# predict_unet_test.py:
#
#     bash test.sh
#     bash test.sh --Test_Data_path my_slices --save_res_path my_membranes --tta
#
# What it reads and writes is where you stand; data/ of this repository where you have none and name none.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/env.sh"
data=()
case " $* " in
    *" --Test_Data_path"* | *" --help "* | *" -h "*) ;;
    *)
        if [ ! -e data/test_image ]; then
            [ -e "$here/data/test_image" ] || [ -e "$here/data/train_image" ] || python3 "$here/data/prepare.py" auto
            [ . -ef "$here" ] || data=(--Test_Data_path "$here/data/test_image")
        fi
        ;;
esac
exec python3 "$here/predict_unet_test.py" "${data[@]}" "$@"
