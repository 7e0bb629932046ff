# Small moving things, in Atari games: bash results/games.sh
#
# pip install ale-py
# An hour on one thread. Noise on the history goes from 0.3 to 0.1, see results/README.md.
. "$(dirname "$0")/common.sh"
games=${1:-games}
runs=${2:-runs/games}
small="--size 80 --patch 16 --dim 128 --frames 8 --batch 4 --ema 0.998"
small="$small --motion 4 --detail 32 --detail-frames 2 --history noise --warmup 0"

if [ ! -e "$games/done" ]; then  # an interrupted recording is refused, not replaced
    python results/record_games.py $games --clips 960
    touch "$games/done"
fi
row $runs/noise-0.3 $train --data $games/train $small --noise 0.3 --steps 2500
row $runs/noise-0.1 $train --data $games/train $small --noise 0.1 --steps 4000 --lr 4e-3 --muon-lr 0.01 --init $runs/noise-0.3
python results/small_things.py $runs/noise-0.1 $games/test
