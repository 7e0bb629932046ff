# Fig. 6, one seed, after table-2.sh, whose `resampling-forcing` has s = 0.6: s of Eq. (7), Eq. (5)'s
# steps, and a network that is told t_s, in sampling 0.1: bash results/fig-6.sh 0 [FOLDER]
. "$(dirname "$0")/common.sh"

for s in 0.1 1 3; do row warm s-$s --shift $s; done
row warm two-steps --resample-steps 2
rival warm told

python results/evidence.py measure results/sprites.json $runs/{s-0.1,s-1,s-3,two-steps}-$seed
python results/evidence.py measure results/sprites.json --history-level 0.1 $runs/told-$seed
python results/evidence.py measure results/long.json --frames 1000 --samples 16 $runs/two-steps-$seed
