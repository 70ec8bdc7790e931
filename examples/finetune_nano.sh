#!/bin/sh
# keye-nano learns something new: a shape and a verb that it has never met, from 500 forged rows, on two CPU cores.
#
#     PYTHON=.venv/bin/python examples/finetune_nano.sh [FOLDER]
#
# FOLDER (default: runs/finetune_nano) gets the data, the adapter and the figures. Ends with 1 when the held-out rows are not answered as
# well as they should be, or when nano forgets what it knew.
set -eu
here=$(dirname "$0")/finetune_nano
out=${1:-runs/finetune_nano}
python=${PYTHON:-python}
keye="$python -m keyecli"
began=$(date +%s)

# New things to learn, with a part of what nano knows, so that it is not forgotten; other seeds for what is held out.
$python "$here/make_data.py" "$out/train" --seed 1 --rows 500 --old 300 --contrast 0.25
$python "$here/make_data.py" "$out/held_out" --seed 2 --rows 150 --contrast 0.12
$keye data check "$out/train/data.jsonl"

$python "$here/evaluate.py" "$out/held_out/data.jsonl" --old --clips 18 --json "$out/before.json"

# The head is adapted too: nano's has never had to write "heart" or "grows", and holds their tokens down.
$keye finetune --data "$out/train/data.jsonl" --train lora --targets attention,experts,head --rank 16 --alpha 32 \
    --lr 1e-3 --epochs 4 --batch-tokens 2048 --max-length 512 --no-checkpointing --seed 0 -o "$out/adapter"

$python "$here/evaluate.py" "$out/held_out/data.jsonl" --old --clips 18 --adapter "$out/adapter" --json "$out/after.json"

echo "$(($(date +%s) - began)) s in all"
exec $python "$here/compare.py" "$out/before.json" "$out/after.json" --least 0.9 --loss 0.02
