# Fig. 6 on the sprites, one seed: s of Eq. (7), and Eq. (5)'s steps and share: bash results/fig-6.sh 0
# Begins with the warm-up of table-1.sh. s = 0.6 with one step on every batch is its row "ours".
. "$(dirname "$0")/common.sh"
seed=${1:?which seed?}
runs=${2:-runs/fig-6}
table_1=${3:-runs/table-1}

mkdir -p $runs
more="$train --seed $seed --init $table_1/warm-$seed --warmup 0 --steps 1800 --lr 5e-3 --muon-lr 0.015"
[ -e $runs/s-0.6-$seed ] || ln -s "$(cd $table_1/ours-$seed && pwd)" $runs/s-0.6-$seed
for s in 0.1 0.3 1 3; do row $runs/s-$s-$seed $more --shift $s; done
row $runs/steps-2-$seed $more --resample-steps 2
row $runs/share-0.5-$seed $more --resample-share 0.5

python results/evidence.py measure results/fig-6.json $runs/*-$seed
