#!/bin/sh
# keye-nano gets better at what it is weak at by rewards for its own answers, on two CPU cores: times of events in clips of which it
# sees one frame in two seconds.
#
#     PYTHON=.venv/bin/python examples/rl_nano.sh [FOLDER]
#
# FOLDER (default: runs/rl_nano) gets the clips, the adapters and the figures. Beside the adapter that is rewarded another one is shown
# the right answers of the same rows, for about as long. Ends with 1 when held-out times do not get better by 0.15, or when what nano
# knew is lost.
set -eu
here=$(dirname "$0")/rl_nano
out=${1:-runs/rl_nano}
python=${PYTHON:-python}
keye="$python -m keyecli"
began=$(date +%s)

$python "$here/make_data.py" "$out/train" --count 200 --seed 1
$python "$here/make_data.py" "$out/held_out" --count 60 --seed 2

few="--max-length 2048 --no-checkpointing --seed 0 --no-progress"
$keye rl --data "$out/train/data.jsonl" --eval-data "$out/held_out/data.jsonl" --eval-steps 20 --reward iou \
    --lr 1e-3 --decay --steps 60 --max-tokens 48 $few -o "$out/grounding"
$keye finetune --data "$out/train/data.jsonl" --lr 1e-3 --epochs 5 --batch-tokens 2048 $few -o "$out/supervised"

$python "$here/evaluate.py" --data ground="$out/held_out/data.jsonl" --old --json "$out/figures.json" \
    --adapter grounding="$out/grounding" --adapter supervised="$out/supervised"
echo "$(($(date +%s) - began)) s in all"
exec $python "$here/aims.py" "$out/figures.json" grounding:ground:+0.15 "grounding:old table:-0.02"
