# Small moving things, in Atari games: bash results/games.sh
#
# pip install ale-py
# 143 minutes for Pong alone and 73 for one model of three games, with one thread of a CPU that is
# fast in bf16 (AVX512-BF16 or AMX); twice that on others.
. "$(dirname "$0")/common.sh"
games=${1:-games}
runs=${2:-runs/games}
precision=fp32
if grep -qsE "amx_bf16|avx512_bf16" /proc/cpuinfo; then precision=bf16; fi
small="--size 80 --patch 16 --dim 128 --frames 8 --batch 4 --ema 0.998 --precision $precision"
small="$small --motion 4 --detail 48 --detail-frames 2 --time-shift 10 --warmup 0"
noise="--history noise --noise 0.15 --lr 4e-3"
redraw="--history resample --resample-given 2 --shift 1"
slow="--lr 2e-3 --muon-lr 0.01"

if [ ! -e "$games/done" ]; then  # an interrupted recording is refused, not replaced
    python results/record_games.py $games --clips 960
    python results/record_games.py $games/pong --games pong --clips 960 --held-out 48
    touch "$games/done"
fi

pong="$train --data $games/pong/train $small"
row $runs/pong-1 $pong $noise --steps 2000
row $runs/pong-2 $pong $redraw --resample-steps 2 --steps 1200 $slow --init $runs/pong-1 --seed 1
row $runs/pong-3 $pong $redraw --resample-steps 2 --steps 2500 --lr 3e-3 --muon-lr 0.015 \
    --init $runs/pong-2 --seed 2
row $runs/pong-4 $pong $redraw --resample-steps 4 --steps 1500 $slow --init $runs/pong-3 --seed 3
row $runs/pong-5 $pong $noise --time-shift 3 --decay constant --steps 500 --lr 3e-3 \
    --muon-lr 0.015 --init $runs/pong-4 --seed 6
row $runs/pong-6 $pong $redraw --time-shift 3 --shift 0.6 --resample-steps 2 --steps 6000 \
    --lr 3e-3 --muon-lr 0.015 --init $runs/pong-5 --seed 7
row $runs/three $train --data $games/train $small $noise --steps 10000
python results/small_things.py $runs/pong-6 $games/pong/test --steps 8 --time-shift 5
python results/small_things.py $runs/three $games/test
