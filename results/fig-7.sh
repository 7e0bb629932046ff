# Fig. 7, one seed: what is remembered behind a wall that hides a sprite whole, when no caption
# names it: bash results/fig-7.sh 0 [FOLDER]
. "$(dirname "$0")/common.sh"

world="--data hidden --objects 1 --frames 12"
warm_up hidden $world
row hidden dense $world
row hidden top-5 $world --top-k 5
row hidden window-5 $world --window 5
row hidden window-1 $world --window 1

rows=$(echo $runs/{dense,top-5,window-5,window-1}-$seed)
python results/evidence.py measure results/hidden.json --frames 48 $rows
python results/memory.py results/hidden.json $rows
python results/memory.py results/fig-7-strip.png $rows
