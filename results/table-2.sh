# Table 2, exposure bias and 1,000 frames, one seed: bash results/table-2.sh 0 [FOLDER]
. "$(dirname "$0")/common.sh"

warm_up warm
row warm teacher-forcing --history teacher
row warm resampling-forcing --history resample
row warm history-noise --history noise --noise 0.333
row warm parallel-resampling --history parallel
row warm teacher-forcing-longer --history teacher --steps $((steps * 7 / 5))  # about resampling's minutes

histories=$(echo $runs/{teacher-forcing,history-noise,parallel-resampling,resampling-forcing}-$seed)
python results/evidence.py baselines results/sprites.json
python results/evidence.py measure results/sprites.json --true-history $histories
python results/evidence.py measure results/sprites.json $runs/teacher-forcing-longer-$seed
python results/evidence.py measure results/long.json --frames 1000 --samples 16 $histories
