# Fig. 8, one seed, after table-2.sh: which history frames are picked with k = 1, 3, 5; writes
# results/fig-8.png: bash results/fig-8.sh 1 [FOLDER]
. "$(dirname "$0")/common.sh"

for k in 1 3 5; do
    row resampling-forcing picks-$k --steps 300 --lr 2e-3 --muon-lr 5e-3 --top-k $k
done
python results/fig_8.py results/fig-8.png $runs/picks-{1,3,5}-$seed
