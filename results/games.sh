# Small moving things, in Atari games: bash results/games.sh
#
# pip install ale-py
# About 80 minutes with one thread of a CPU with AMX, where bf16 is fast; twice that on others.
. "$(dirname "$0")/common.sh"
games=${1:-games}
runs=${2:-runs/games}
precision=fp32
if grep -qs amx_bf16 /proc/cpuinfo; then precision=bf16; fi
small="--size 80 --patch 16 --dim 128 --frames 8 --batch 4 --ema 0.998 --precision $precision"
small="$small --motion 4 --detail 48 --detail-frames 2 --time-shift 10"
small="$small --history noise --noise 0.15 --warmup 0"

if [ ! -e "$games/done" ]; then  # an interrupted recording is refused, not replaced
    python results/record_games.py $games --clips 960
    touch "$games/done"
fi
row $runs/begun $train --data $games/train $small --steps 4000 --lr 4e-3
row $runs/longer $train --data $games/train $small --steps 5000 --lr 3e-3 --muon-lr 0.015 --init $runs/begun
python results/small_things.py $runs/longer $games/test
