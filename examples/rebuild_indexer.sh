#!/bin/sh
# keye-nano's sparse attention from nothing: new indexers, a dense warm-up in which they learn what attention looks at, then sparse
# adaptation of the whole network to what they select.
#
#     PYTHON=.venv/bin/python examples/rebuild_indexer.sh [FOLDER]
#
# FOLDER (default: runs/rebuild_indexer) gets the clips, the models of each stage and the figures. Ends with 1 when a layer's indexer
# selects less than 0.95 of what the best selection would, or when nano's table does not come back.
set -eu
here=$(dirname "$0")
out=${1:-runs/rebuild_indexer}
python=${PYTHON:-python}
keye="$python -m keyecli"

# Clips of five seconds and more have more tokens than the 256 that are selected; shorter ones teach nothing here.
forge="$keye forge --min-duration 5 --max-duration 12 --size 160x120 --rate 4 --questions 2"
$forge "$out/train" --count 250 --seed 3
$forge "$out/held_out" --count 20 --seed 4
rows="--data $out/train/data.jsonl --eval-data $out/held_out/data.jsonl --max-length 1024 --no-checkpointing"

$python "$here/rebuild_indexer/blank.py" "$out/blank"
$keye finetune -m "$out/blank" --train indexer --lr 3e-3 --epochs 2 --batch-tokens 2048 $rows -o "$out/warm"
$keye finetune -m "$out/warm" --train sparse --lr 3e-4 --epochs 1 --batch-tokens 2048 $rows -o "$out/sparse"

for stage in nano warm sparse; do
    case $stage in nano) model="" ;; *) model="-m $out/$stage" ;; esac
    $python "$here/finetune_nano/evaluate.py" $model --old --clips 16 --json "$out/$stage.json"
done
status=0
$python "$here/rebuild_indexer/recall.py" "$out/warm/metrics.jsonl" "$out/sparse/metrics.jsonl" --least 0.95 || status=1
for stage in warm sparse; do
    echo "nano (before) and $stage (after)"
    $python "$here/finetune_nano/compare.py" "$out/nano.json" "$out/$stage.json" --loss 0.02 && last=0 || last=1
done
exit $((status + last > 0))
