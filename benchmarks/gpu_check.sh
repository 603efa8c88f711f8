#!/usr/bin/env bash
# For a machine with GPUs: trains in each way on the synthetic sample, and prints a table.
#
#     bash benchmarks/gpu_check.sh
#     bash benchmarks/gpu_check.sh cpu    # a rehearsal without a GPU, on two cores
set -euo pipefail
cd "$(dirname "$0")/.."
source ./env.sh
device=${1:-cuda}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

width=64 batch=16 epochs=5 repeat=64 count=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
[ "$device" = cpu ] || [ "$count" -gt 0 ] || { echo "gpu_check.sh: no GPU here" >&2 && exit 2; }
[ "$device" = cuda ] || { width=4 batch=2 epochs=2 repeat=1 count=2; }
python3 data/prepare.py sample --out "$folder" >/dev/null

# run NAME COMMAND...: trains, and prints the last epoch's line of its CSV. Without dropout, which graphs don't have.
run() {
    if "${@:2}" --device "$device" --data_path "$folder/train_image" --val_count 4 --base_channels $width \
        --batch_size $batch --epochs $epochs --repeat $((repeat * count)) --dropout 0 --num_workers 2 \
        --checkpoint_dir "$folder/checkpoints" --log_file "$folder/log.txt" >"$folder/output.txt" 2>&1; then
        tail -n 1 "$folder/log.csv" |
            awk -F, -v name="$1" '{ print "| " name " | " $NF " | " $2 " | " $3 " | " $5 " |" }'
    else
        echo "| $1 | failed, see above | | | |"
        cat "$folder/output.txt" >&2
    fi
}
echo "| $device, $width channels, batch $batch | images/s | train loss | validation loss | V_Rand |"
echo "| --- | --- | --- | --- | --- |"
run "one device" python3 TrainUnetDataSet.py
run "$count processes" python3 -m oneflow.distributed.launch --nproc_per_node "$count" ./ddp_train.py
run "graph" python3 graph_train.py
[ "$device" = cpu ] || run "graph, mixed precision" python3 graph_train.py --amp on
