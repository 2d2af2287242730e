#!/usr/bin/env bash
# Half an hour or more on one CUDA GPU, in calls of at most ten minutes. From the project's root:
#
#     bash results/gpu/run.sh STAGE
#
# STAGE: measure, bench, mnist, mnist-bptt, mnist-gru, tasks [NAME ..], text or sketchy. "measure"
# comes first: step times, kernels and peak memory of every script; it stops where a guess was
# wrong. Each stage fits half an hour; "tasks" takes 13 minutes a task, so give it two at a time.
#
# A stage that was cut off goes on where it stopped when it is called again, and prints its tables
# at the end. Weights that may be kept are written in half precision. From the environment:
#
#     RUNS=runs/gpu          where everything goes; must still be there in the next call
#     CALL=9                 minutes after which a run stops itself and can be resumed
#     SCALE=1                factor on all minutes
#     FLAGS=""               added to new runs of smt.py and bptt.py
#     BENCH="--preset gpu"   flags of bench.py
#     N=                     test sequences, instead of each stage's own number
#     MEASURE="--device cuda"    flags of count.py
#
# A stage in a minute, on a CPU:
#
#     export SCALE=0.005 N=5 FLAGS="--preset laptop --d_model 16 --n_val 5 --eval_every 0"
#     export MEASURE="--device cpu --preset laptop --size 8 --guess 0"
set -eu -o pipefail
# shapes change from step to step
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
RUNS=${RUNS:-runs/gpu} CALL=${CALL:-9} SCALE=${SCALE:-1} FLAGS=${FLAGS:-}
began=$SECONDS

minutes() { awk "BEGIN { print $1 * $SCALE }"; }

# train NAME SCRIPT MINUTES FLAGS..: start the run, or resume it; gives up for now when the call's
# time is over
train() {
    local name=$1 script=$2 budget extra=$FLAGS; budget=$(minutes "$3"); shift 3
    [ "$script" != dmt ] || extra=  # has its networks and preset from the checkpoint
    local left=$(awk "BEGIN { l = $CALL - ($SECONDS - $began) / 60; print (l > 0.1) ? l : 0 }")
    [ "$left" != 0 ] || {
        echo "the call's $CALL minutes are over before $name; call the stage again"; exit 0; }
    if [ -e "$RUNS/$name/finished" ]; then return; fi
    if [ -e "$RUNS/$name/ckpt.pt" ]; then
        python "$script.py" --out_dir "$RUNS/$name" --resume --stop_after "$left"
    else
        python "$script.py" "$@" --minutes "$budget" --out_dir "$RUNS/$name" $extra \
            --stop_after "$left"
    fi | tee -a "$RUNS/$name.log"
    grep -q "^done:" "$RUNS/$name.log" || {
        echo "$name is not done; call the stage again"; exit 0; }
    touch "$RUNS/$name/finished"
}

# table NAME SEQUENCES: what a run came to, evaluated once; 10,000 pictures take some five minutes
table() {
    if [ ! -e "$RUNS/$1.txt" ]; then
        [ $((SECONDS - began)) -lt 240 ] || {
            echo "too late in this call for $1's table; call the stage again"; exit 0; }
        python evaluate.py --ckpt "$RUNS/$1/ckpt.pt" --n_test "${N:-$2}" > "$RUNS/$1.part"
        mv "$RUNS/$1.part" "$RUNS/$1.txt"
    fi
    echo "--- $1"; cat "$RUNS/$1.txt"
}

# small NAME: the RNN alone in half precision, without the paths of this machine
small() {
    python - "$RUNS/$1" <<'EOF'
import sys, torch
c = torch.load(sys.argv[1] + "/ckpt.pt", weights_only=True)
keep = {k: c[k] for k in ("format", "script", "step", "config", "model", "image", "metrics")}
keep["config"] |= dict.fromkeys(("data_dir", "out_dir", "ckpt", "data_file"), "")
torch.save(keep | dict(rnn={k: v.half() for k, v in c["rnn"].items()}), sys.argv[1] + "/rnn.pt")
EOF
}

mkdir -p "$RUNS"
case ${1:-} in
measure)
    python results/gpu/count.py ${MEASURE:---device cuda} | tee "$RUNS/measure.txt" ;;
bench)
    python bench.py --seconds 20 ${BENCH:---preset gpu} | tee "$RUNS/bench.txt"
    python bench.py --seconds 20 ${BENCH:---preset gpu} --compile | tee "$RUNS/bench-compile.txt" ;;
mnist)  # 28x28, one fixed Bernoulli draw
    train mnist-smt smt 12 --dataset mnist --image_size 28
    train mnist-dmt dmt 5 --ckpt "$RUNS/mnist-smt/ckpt.pt"
    table mnist-dmt 10000; small mnist-dmt
    python sample.py --ckpt "$RUNS/mnist-dmt/ckpt.pt" --n 100 --out "$RUNS/mnist-dmt/100.png" ;;
mnist-bptt)
    train mnist-bptt bptt 17 --dataset mnist --image_size 28
    table mnist-bptt 10000 ;;
mnist-gru)
    train mnist-bptt-gru bptt 17 --dataset mnist --image_size 28 --rnn gru
    table mnist-bptt-gru 10000 ;;
tasks)  # the hardest settings
    shift; wanted=" ${*:-retrieval stack copy recall modular} "
    while read -r name flags; do
        case $wanted in *" $name "*) ;; *) continue ;; esac
        train "$name-smt" smt 4 --dataset "$name" $flags
        train "$name-dmt" dmt 2 --ckpt "$RUNS/$name-smt/ckpt.pt"
        train "$name-bptt" bptt 6 --dataset "$name" $flags
        table "$name-dmt" 1000; table "$name-bptt" 1000
    done <<'EOF'
retrieval --length 512 --noise 0.3
stack --length 64 --depth 5
copy --length 65
recall --keys 8 --key_len 2
modular --examples 16
EOF
    ;;
text)
    train text-smt smt 12 --dataset tinystories --length 256
    train text-dmt dmt 6 --ckpt "$RUNS/text-smt/ckpt.pt"
    table text-dmt 1000
    python sample.py --ckpt "$RUNS/text-dmt/ckpt.pt" --prompt "Once upon a time" --chars 500 \
        --temperature 0.7 | tee "$RUNS/text-dmt/story.txt" ;;
sketchy)
    train sketchy-smt smt 12 --dataset sketchy --image_size 64
    train sketchy-dmt dmt 6 --ckpt "$RUNS/sketchy-smt/ckpt.pt"
    table sketchy-dmt 300 ;;
*)
    sed -n '2,24p' "$0"; exit 2 ;;
esac
