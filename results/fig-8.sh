# Fig. 8 on the sprites: which history frames are picked with k = 1, 3, 5: bash results/fig-8.sh
# Begins with the resampling run of `bash results/table-1.sh 1`. Writes results/fig-8-K.png.
. "$(dirname "$0")/common.sh"
runs=${1:-runs/fig-8}
init=${2:-runs/table-1/ours-1}

for k in 1 3 5; do
    row $runs/top-$k $train --init $init --warmup 0 --steps 300 --lr 2e-3 --muon-lr 5e-3 --top-k $k
    python results/fig_8.py $runs/top-$k results/fig-8-$k.png
done
