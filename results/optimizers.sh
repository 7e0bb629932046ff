# AdamW against Muon: three learning rates each, equal minutes of teacher forcing.
#
#   bash results/optimizers.sh
#
# Muon's step takes 7 % longer on two cores, so AdamW gets 7 % more steps.
. "$(dirname "$0")/common.sh"
runs=${1:-runs/optimizers}

run() {  # run NAME STEPS FLAGS...
    row $runs/$1-0 $train --history teacher --ema 0.998 --warmup $2 --steps $2 "${@:3}"
}
for lr in 0.003 0.007 0.015; do run adamw-$lr 1070 --optimizer adamw --lr $lr; done
for lr in 0.01 0.02 0.04; do run muon-$lr 1000 --optimizer muon --muon-lr $lr; done
for predict in v x; do
    row $runs/predict-$predict-0 $train --size 16 --patch 4 --history teacher --warmup 900 --steps 900 --predict $predict
done
python results/evidence.py measure results/optimizers.json --frames 40 $runs/*
