# Small moving things, in Atari games: bash results/games.sh
#
# pip install ale-py
# 95 minutes for Pong, 52 for Breakout and 75 for one model of three games, with one thread of a CPU
# that is fast in bf16 (AVX512-BF16 or AMX); twice that on others.
. "$(dirname "$0")/common.sh"
games=${1:-games}
runs=${2:-runs/games}
precision=fp32
if grep -qsE "amx_bf16|avx512_bf16" /proc/cpuinfo; then precision=bf16; fi
small="--size 80 --patch 16 --dim 128 --frames 8 --batch 4 --ema 0.998 --precision $precision"
small="$small --motion 4 --detail 48 --detail-frames 2 --warmup 0"
noise="--history noise --noise 0.15 --time-shift 10 --lr 4e-3"
redraw="--history resample --resample-given 2 --resample-steps 2 --shift 0.6 --time-shift 3"
redraw="$redraw --lr 3e-3 --muon-lr 0.015"

if [ ! -e "$games/done" ]; then  # an interrupted recording is refused, not replaced
    python results/record_games.py $games --clips 960
    for game in pong breakout; do
        python results/record_games.py $games/$game --games $game --clips 960 --held-out 48
    done
    touch "$games/done"
fi

pong="$train --data $games/pong/train $small --detail-strips"
row $runs/pong-1 $pong $noise --steps 2000
row $runs/pong-2 $pong $redraw --steps 6000 --init $runs/pong-1 --seed 1
python results/small_things.py $runs/pong-2 $games/pong/test

breakout="$train --data $games/breakout/train $small --detail-strips"
row $runs/breakout-1 $breakout $noise --steps 2600
row $runs/breakout-2 $breakout $noise --steps 3000 --init $runs/breakout-1 --seed 1
python results/small_things.py $runs/breakout-2 $games/breakout/test

row $runs/three $train --data $games/train $small $noise --steps 10000
python results/small_things.py $runs/three $games/test
