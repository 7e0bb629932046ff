# AdamW against Muon: three learning rates each, equal minutes of teacher forcing, one thread.
#
#   bash results/optimizers.sh
#
# Muon's step takes 7 % longer on two cores, so AdamW gets 7 % more steps. Each run ends with its
# table. A run that is there is skipped.
set -e
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
runs=${1:-runs/optimizers}
train="python train.py --history teacher --sample-every 100000 --ema 0.998"

for lr in 0.003 0.007 0.015; do
    out=$runs/adamw-$lr
    [ -e $out/samples/eval.json ] && continue
    rm -rf "$out"
    $train --optimizer adamw --lr $lr --warmup 1070 --steps 1070 --out $out
done
for lr in 0.01 0.02 0.04; do
    out=$runs/muon-$lr
    [ -e $out/samples/eval.json ] && continue
    rm -rf "$out"
    $train --optimizer muon --muon-lr $lr --warmup 1000 --steps 1000 --out $out
done
python sample.py --table $runs/*
