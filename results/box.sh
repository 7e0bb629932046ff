# The weights of this folder, the pictures of seed 0, and what a cache of recent frames changes,
# after table-2.sh: bash results/box.sh 0 [FOLDER]
. "$(dirname "$0")/common.sh"

for name in teacher resample; do
    python results/pack.py $runs/$name-$seed results/$name.pt
    [ -e $runs/$name-recent-$seed ] || ln -s $name-$seed $runs/$name-recent-$seed
done
python results/evidence.py measure results/long.json --frames 1000 --samples 16 --write-window 3 $runs/{teacher,resample}-recent-$seed

# what a run that is not healthy looks like
train dissolved --history teacher --warmup 1500 --steps 1500 --time-shift 0.3
train early --history teacher --warmup 500 --steps 500
python results/evidence.py measure results/sprites.json $runs/{dissolved,early}-$seed

python sample.py --eval --checkpoint results/{teacher,resample}.pt --frames 120 --samples 4 --out results/teacher-resample.gif
rm -f results/teacher-resample.png
strip="python results/evidence.py strip"
$strip results/histories.png $runs/{teacher,noise,parallel,resample}-$seed --labels "teacher forcing" "history noise" "parallel" "resampling"
$strip results/health.png $runs/{resample,teacher,dissolved,early}-$seed --labels healthy frozen dissolved "too early"
