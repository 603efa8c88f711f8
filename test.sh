#!/usr/bin/env bash
# Predicts data/test_image, with the weights of your last training or else those of this repository.
# Flags go to predict_unet_test.py:
#
#     bash test.sh
#     bash test.sh --Test_Data_path my_slices --save_res_path my_membranes --tta
set -euo pipefail
cd "$(dirname "$0")"
source ./env.sh
case " $* " in
    *" --Test_Data_path"* | *" --help "* | *" -h "*) ;;
    *) [ -e data/test_image ] || [ -e data/train_image ] || python3 data/prepare.py auto ;;
esac
exec python3 predict_unet_test.py "$@"
