#!/bin/sh
# keye-nano's sparse attention from nothing: new indexers, a dense warm-up in which they learn what attention looks at, then sparse
# adaptation of the whole network to what they select.
#
#     PYTHON=.venv/bin/python examples/rebuild_indexer.sh [FOLDER]
#
# FOLDER (default: runs/rebuild_indexer) gets the clips, the models of each stage and the figures. Ends with 1 when a layer's indexer
# selects less than 0.95 of what the best selection would, or when nano's table does not come back. DEVICE=cpu keeps a GPU out of it.
set -eu
here=$(dirname "$0")
out=${1:-runs/rebuild_indexer}
python=${PYTHON:-python}
keye="$python -m keyecli"
began=$(date +%s)

# As long as what nano is asked about, a minute at most: an indexer that has only seen short clips selects badly in long ones. And in
# nano's own picture sizes: others make grids of tokens that it has never seen.
forge="$keye forge --min-duration 10 --rate 4"
$forge "$out/train" --count 320 --questions 2 --seed 3
$forge "$out/held_out" --count 20 --questions 1 --seed 4
finetune="$keye finetune --data $out/train/data.jsonl --eval-data $out/held_out/data.jsonl --max-length 4096 --no-checkpointing"
finetune="$finetune --device ${DEVICE:-auto} --dtype fp32"

$python "$here/rebuild_indexer/blank.py" "$out/blank"
$finetune -m "$out/blank" --train indexer --lr 3e-3 --batch-tokens 2048 -o "$out/warm"
# At the default rate, 1e-5: nano's own training ended at 2e-5 with ten times the tokens in a step; at 1e-4 answers grow worse.
$finetune -m "$out/warm" --train sparse --steps 60 --batch-tokens 4096 -o "$out/sparse"

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
echo "$(($(date +%s) - began)) s in all"
exit $((status + last > 0))
