# Table 2, exposure bias and 1,000 frames, one seed: bash results/table-2.sh 0 [FOLDER]
. "$(dirname "$0")/common.sh"

warm_up warm
row warm teacher --history teacher
row warm resample --history resample
row warm noise --history noise --noise 0.333
row warm parallel --history parallel
row warm teacher-longer --history teacher --steps $((steps * 7 / 5))  # about resampling's minutes

histories=$(echo $runs/{teacher,noise,parallel,resample}-$seed)
python results/evidence.py baselines results/sprites.json
python results/evidence.py measure results/sprites.json --true-history $histories
python results/evidence.py measure results/sprites.json $runs/teacher-longer-$seed
python results/evidence.py measure results/long.json --frames 1000 --samples 16 $histories
