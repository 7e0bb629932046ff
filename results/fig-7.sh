# Fig. 7 on the sprites, one seed: what is remembered behind a wall that hides a sprite whole, when
# no caption names it: bash results/fig-7.sh 0
. "$(dirname "$0")/common.sh"
seed=${1:?which seed?}
runs=${2:-runs/fig-7}

world="--data hidden --objects 1 --frames 12"
row $runs/warm-$seed $train --seed $seed $world --history teacher --warmup 4000 --steps 4000 --decay constant --lr 5e-3 --muon-lr 0.015
more="$train --seed $seed $world --init $runs/warm-$seed --warmup 0 --steps 1800 --lr 5e-3 --muon-lr 0.015"
row $runs/dense-$seed $more
for k in 1 5; do
    row $runs/top-$k-$seed $more --top-k $k
    row $runs/window-$k-$seed $more --window $k
done
python results/evidence.py measure results/fig-7.json --frames 48 $runs/{dense,top-5,window-5,top-1,window-1}-$seed
