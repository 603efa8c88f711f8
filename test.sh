#!/usr/bin/env bash
# Predicts data/test_image with the best checkpoint. Flags go to predict_unet_test.py:
#
#     bash test.sh
#     bash test.sh --Test_Data_path my_slices --save_res_path my_membranes --tta
set -euo pipefail
cd "$(dirname "$0")"
source ./env.sh
exec python3 predict_unet_test.py "$@"
