#!/bin/sh
# Two specialists into one student: examples/rl_nano.sh has made one that times events, here rewards make one that counts, from the
# same start, and distillation brings what both know into one adapter. A judge looks at how it counts: a right number of the wrong
# things is worth a tenth. On two CPU cores.
#
#     PYTHON=.venv/bin/python examples/rl_nano.sh && PYTHON=.venv/bin/python examples/distill_nano.sh [FOLDER]
#
# FOLDER (default: runs/rl_nano) is that of rl_nano.sh. Ends with 1 when the student is not within 0.02 of each specialist at its task, or
# right counts have the wrong reasons no less often than before.
set -eu
here=$(dirname "$0")/rl_nano
out=${1:-runs/rl_nano}
python=${PYTHON:-python}
keye="$python -m keyecli"
began=$(date +%s)

$python "$here/make_data.py" "$out/count" --tasks count --count 200 --seed 3
$python "$here/make_data.py" "$out/count_held_out" --tasks count --count 60 --seed 4
$python "$here/make_data.py" "$out/both" --tasks both --count 200 --seed 5

few="--max-length 2048 --no-checkpointing --seed 0 --no-progress --max-tokens 96"
port=${JUDGE_PORT:-8765}
$python "$here/judge.py" --port "$port" &
judge=$!
trap 'kill $judge' EXIT
$keye rl --data "$out/count/data.jsonl" --eval-data "$out/count_held_out/data.jsonl" --eval-steps 20 \
    --reward context:outcome=count,format=false --judge "http://127.0.0.1:$port/v1" --judge-model forged \
    --lr 1e-3 --decay --steps 60 --refills 3 $few -o "$out/counting"
cat > "$out/routes.toml" << END
[[teacher]]
adapter = "grounding"
tasks = ["ground*"]

[[teacher]]
adapter = "counting"
tasks = ["count*"]
END
$keye distill --data "$out/both/data.jsonl" --teachers "$out/routes.toml" --lr 1e-3 --steps 60 --prompts 12 $few -o "$out/student"

$python "$here/evaluate.py" --data ground="$out/held_out/data.jsonl" --data count="$out/count_held_out/data.jsonl" --old \
    --json "$out/figures.json" --adapter grounding="$out/grounding" --adapter counting="$out/counting" --adapter student="$out/student"
echo "$(($(date +%s) - began)) s in all"
missed=0
$python "$here/rejected.py" --data "$out/count_held_out/data.jsonl" --judge "http://127.0.0.1:$port/v1" --adapter counting="$out/counting" || missed=1
$python "$here/aims.py" "$out/figures.json" student:ground:grounding student:count:counting || missed=1
exit $missed
