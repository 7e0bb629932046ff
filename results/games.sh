# Small moving things, in Atari games: bash results/games.sh
#
# pip install ale-py
# About 80 minutes for Pong, 75 for Breakout and 75 for one model of three games, with one thread of
# a CPU that is fast in bf16 (AVX512-BF16 or AMX); twice that on others.
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

alone() {  # alone GAME STEPS STEPS: a model of one game, first with noise, then with resampling
    one="$train --data $games/$1/train $small --detail-strips"
    row $runs/$1-noise $one $noise --steps $2
    row $runs/$1 $one $redraw --steps $3 --init $runs/$1-noise --seed 1
    python results/small_things.py $runs/$1 $games/$1/test
}
alone pong 2000 6000
alone breakout 2600 4000
row $runs/three $train --data $games/train $small $noise --steps 10000
python results/small_things.py $runs/three $games/test
