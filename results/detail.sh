# The default world with and without convolutions behind the tokens (model.DetailHead), one seed:
#
#   bash results/detail.sh 0
#
# A step with them takes 1.3 times as long, so it takes fewer of them.
. "$(dirname "$0")/common.sh"
seed=${1:?which seed?}
runs=${2:-runs/detail}

run() {  # run NAME FLAGS...
    row $runs/$1-$seed $train --seed $seed "${@:2}"
}
run teacher-plain --history teacher --warmup 1300 --steps 1300
run teacher-detail --history teacher --warmup 1000 --steps 1000 --detail 32
run plain --warmup 1500 --steps 4800
run detail --warmup 1500 --steps 3700 --detail 32

python results/evidence.py measure results/detail.json $runs/*-$seed
