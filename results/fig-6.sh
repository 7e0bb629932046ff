# Fig. 6, one seed, after table-2.sh: s of Eq. (7), whose 0.6 is the row `resampling-forcing`; the steps of
# Eq. (5); a network that is told t_s, and in sampling 0.1: bash results/fig-6.sh 0 [FOLDER]
. "$(dirname "$0")/common.sh"

for s in 0.1 0.3 1 3; do row warm s-$s --shift $s; done
row warm two-steps --resample-steps 2
rival warm told

python results/evidence.py measure results/sprites.json $runs/{s-0.1,s-0.3,s-1,s-3,two-steps}-$seed
python results/evidence.py measure results/sprites.json --history-level 0.1 $runs/told-$seed
