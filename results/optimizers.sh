# AdamW against Muon: three learning rates each, equal minutes of teacher forcing, one thread.
#
#   bash results/optimizers.sh
#
# Muon's step takes 7 % longer on two cores, so AdamW gets 7 % more steps. Each run ends with its
# table. A run that is there is skipped.
set -e
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
runs=${1:-runs/optimizers}

row() {  # row NAME STEPS FLAGS...: train it if it is not there
    out=$runs/$1
    steps=$2
    shift 2
    [ -e "$out/samples/eval.json" ] && return
    rm -rf "$out"
    python train.py --history teacher --sample-every 100000 --ema 0.998 --warmup "$steps" --steps "$steps" "$@" --out "$out"
}

for lr in 0.003 0.007 0.015; do row adamw-$lr 1070 --optimizer adamw --lr $lr; done
for lr in 0.01 0.02 0.04; do row muon-$lr 1000 --optimizer muon --muon-lr $lr; done
python sample.py --table $runs/*
