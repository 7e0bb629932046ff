# The weights of this folder, the pictures of seed 0, and what a cache of recent frames changes,
# after table-2.sh: bash results/box.sh 0 [FOLDER]
. "$(dirname "$0")/common.sh"

for name in teacher resample; do
    python results/pack.py $runs/$name-$seed results/$name.pt
    [ -e $runs/$name-recent-$seed ] || ln -s $name-$seed $runs/$name-recent-$seed
done
python results/evidence.py measure results/long.json --frames 1000 --samples 16 --write-window 3 $runs/{teacher,resample}-recent-$seed
python sample.py --eval --checkpoint results/{teacher,resample}.pt --frames 150 --samples 4 --out results/compare.gif
