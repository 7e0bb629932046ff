# The weights of this folder, the pictures of seed 0, and what a cache of recent frames changes,
# after table-2.sh: bash results/box.sh 0 [FOLDER]
. "$(dirname "$0")/common.sh"

python results/evidence.py pack results/teacher.pt $runs/teacher-forcing-$seed
python results/evidence.py pack results/resample.pt $runs/resampling-forcing-$seed
for name in teacher-forcing resampling-forcing; do
    [ -e $runs/$name-recent-$seed ] || ln -s $name-$seed $runs/$name-recent-$seed
done
python results/evidence.py measure results/long.json --frames 1000 --samples 16 --write-window 3 $runs/{teacher-forcing,resampling-forcing}-recent-$seed

# what a run that is not healthy looks like
train dissolved --history teacher --warmup 1500 --steps 1500 --time-shift 0.3
train too-early --history teacher --warmup 500 --steps 500
python results/evidence.py measure results/sprites.json $runs/{dissolved,too-early}-$seed

python sample.py --eval --checkpoint results/{teacher,resample}.pt --frames 120 --samples 4 --out results/teacher-resample.gif
rm -f results/teacher-resample.png
python results/evidence.py strip results/histories.png $runs/{teacher-forcing,history-noise,parallel-resampling,resampling-forcing}-$seed
python results/evidence.py strip results/health.png $runs/{resampling-forcing,teacher-forcing,dissolved,too-early}-$seed
