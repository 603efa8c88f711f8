#!/usr/bin/env bash
# Trains on ISBI slices 0 to 19, predicts slices 20 to 24 with and without --tta, and scores them: a row of docs/recipe.md.
#
#     bash benchmarks/recipe.sh SLICES --epochs 50
#     bash benchmarks/recipe.sh SLICES --epochs 50 --seed 1 --dropout 0
#
# SLICES: a folder of training slices 0 to 24 whose labels are beside it. Further flags go to TrainUnetDataSet.py. What is
# made stays in a folder of its own, which the last line names.
set -euo pipefail
slices=${1:?a folder of training slices} && shift
here=$(cd "$(dirname "$0")/.." && pwd)
source "$here/env.sh"
out=$(mktemp -d)
label=$(dirname "$slices")/$(basename "$slices" | sed 's/\(.*\)image/\1label/')
mkdir "$out/held_image" "$out/held_label"
for i in 20 21 22 23 24; do
    ln -s "$(realpath "$slices")"/*"$i".* "$out/held_image/"
    ln -s "$(realpath "$label")"/*"$i".* "$out/held_label/"
done
python3 "$here/TrainUnetDataSet.py" --data_path "$slices" --val_count 5 --val_every 1000 \
    --checkpoint_dir "$out" --log_file "$out/log.txt" "$@"
for flags in "" --tta; do
    # shellcheck disable=SC2086
    python3 "$here/predict_unet_test.py" --checkpoint "$out/last.safetensors" --Test_Data_path "$out/held_image" \
        --save_res_path "$out/predicted$flags" $flags
    python3 "$here/evaluate.py" --prediction "$out/predicted$flags" --label "$out/held_label" --json "$out/scores$flags.json"
done
echo "$out"
