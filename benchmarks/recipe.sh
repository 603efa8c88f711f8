#!/usr/bin/env bash
# Holds out five of ISBI's slices 0 to 24, trains on the others, predicts the five with and without --tta, and scores
# them: a row of docs/recipe.md, or a fold of one.
#
#     bash benchmarks/recipe.sh SLICES 20 --epochs 50
#     bash benchmarks/recipe.sh SLICES 20 --epochs 50 --seed 1 --dropout 0
#
# SLICES: a folder of training slices 0 to 24 whose labels are beside it. 20: the first of the five. Further flags go to
# TrainUnetDataSet.py. What is made stays in a folder of its own, which the last line names.
set -euo pipefail
if [[ ! -d ${1-} || ! ${2-} =~ ^(1?[0-9]|20)$ ]]; then
    echo "recipe.sh: a folder of 25 training slices, then 0 to 20, the first of the five to hold out" >&2
    exit 2
fi
slices=$(realpath "$1") first=$2 && shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
source "$here/env.sh"
out=$(mktemp -d)
for part in image label; do
    mkdir "$out/train_$part" "$out/held_$part"
    folder=$(dirname "$slices")/$(basename "$slices" | sed "s/\(.*\)image/\1$part/")
    i=0
    while read -r name; do
        ln -s "$folder/$name" "$out/$( ((i < first || i > first + 4)) && echo train || echo held)_$part/"
        i=$((i + 1))
    done < <(find "$folder" -maxdepth 1 -iregex '.*\.\(png\|tiff?\|jpe?g\|bmp\)' -printf '%f\n' | sort -V)
    if ((i != 25)); then
        echo "$folder: holds $i slices, not ISBI's 25" >&2
        exit 2
    fi
done
python3 "$here/TrainUnetDataSet.py" --data_path "$out/train_image" --checkpoint_dir "$out" --log_file "$out/log.txt" "$@"
for flags in "" --tta; do
    # shellcheck disable=SC2086
    python3 "$here/predict_unet_test.py" --checkpoint "$out/last.safetensors" --Test_Data_path "$out/held_image" \
        --save_res_path "$out/predicted$flags" $flags
    python3 "$here/evaluate.py" --prediction "$out/predicted$flags" --label "$out/held_label" --json "$out/scores$flags.json"
done
echo "$out"
