# Teacher forcing: AdamW against Muon, three learning rates each, in equal minutes; v against x, in
# equal steps.
#
#   bash results/optimizers.sh 0
#
# Muon's step takes 7 % longer on two cores, so AdamW gets 7 % more steps.
. "$(dirname "$0")/common.sh"
seed=${1:?which seed?}
runs=${2:-runs/optimizers}

run() {  # run NAME STEPS FLAGS...
    steps=$2
    row $runs/$1-$seed $train --seed $seed --history teacher --warmup $steps --steps $steps "${@:3}"
}
for lr in 0.003 0.007 0.015; do run adamw-$lr 1070 --ema 0.998 --optimizer adamw --lr $lr; done
for lr in 0.01 0.02 0.04; do run muon-$lr 1000 --ema 0.998 --optimizer muon --muon-lr $lr; done
for predict in v x; do run predict-$predict 900 --size 16 --patch 4 --predict $predict; done

python results/evidence.py measure results/optimizers.json --frames 40 $runs/*-$seed
