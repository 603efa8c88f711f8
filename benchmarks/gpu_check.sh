#!/usr/bin/env bash
# For a machine with GPUs: trains in each way, and prints the table that the README lacks.
#
#     bash benchmarks/gpu_check.sh
#     bash benchmarks/gpu_check.sh cpu    # a rehearsal without a GPU, on two cores
#
# A row is a run of a training script on the generated sample: by one GPU, by all, as a static
# graph, and that in mixed precision; then come the benchmarks of graphs and of scaling. Nothing in
# the repository is changed but docs/scaling_gpu.png.
set -euo pipefail
cd "$(dirname "$0")/.."
source ./env.sh
device=${1:-cuda}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

width=64 batch=16 epochs=5
if [ "$device" = cuda ]; then
    # Ends the script, and says why, where there is no GPU.
    python3 benchmarks/graph_step.py --device cuda --base_channels $width --batch_size 4
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    count=$(python3 -c 'import dataloader, oneflow; print(oneflow.cuda.device_count())')
    repeat=$((64 * count)) # so that an epoch has 64 steps on all GPUs together
else
    width=4 batch=2 epochs=2 count=2 repeat=1
    python3 benchmarks/graph_step.py --device cpu --base_channels $width --crop 64 --rounds 2
fi
python3 data/prepare.py sample --out "$folder" >/dev/null

# run NAME COMMAND...: trains, and prints the last epoch's line of its CSV. Without dropout, which
# graphs don't have, so that the losses compare.
run() {
    if "${@:2}" --device "$device" --data_path "$folder/train_image" --val_count 4 \
        --base_channels $width --batch_size $batch --epochs $epochs --repeat $repeat --dropout 0 --num_workers 2 \
        --checkpoint_dir "$folder/checkpoints" --log_file "$folder/log.txt" \
        >"$folder/output.txt" 2>&1; then
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
run "$count processes" python3 -m oneflow.distributed.launch --nproc_per_node "$count" ddp_train.py
run "graph" python3 graph_train.py
run "graph, --amp" python3 graph_train.py --amp

if [ "$device" = cuda ]; then
    all=$(seq 0 10 | awk -v n="$count" '2 ^ $1 <= n { print 2 ^ $1 }')
    # shellcheck disable=SC2086
    python3 benchmarks/scaling.py --device cuda --processes $all --threads 4 --batch_size 4 16 \
        --num_workers 2 --base_channels $width --plot docs/scaling_gpu.png
fi
