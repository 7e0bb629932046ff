# Table 1 on the sprites, one seed: bash results/table-1.sh 0
#
# One thread; start several seeds side by side. A row that is there is skipped, so that a killed
# script goes on. Then: python results/rivals.py table results/table-1
set -e
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
seed=${1:?which seed?}
runs=${2:-runs/table-1}

row() {  # row NAME COMMAND...: run the command if its run is not there
    name=$1-$seed
    shift
    [ -e "$runs/$name/ckpt.pt" ] && [ -e "$runs/$name/done" ] && return
    rm -rf "${runs:?}/$name"
    "$@" --seed "$seed" --out "$runs/$name"
    touch "$runs/$name/done"
}

train="python train.py --sample-every 100000"
row warm $train --history teacher --warmup 3000 --steps 3000 --decay constant --lr 5e-3 --muon-lr 0.015
row real $train --history teacher --chunk 10 --frames 10 --warmup 6000 --steps 6000

# ours, and the rows that are histories of train.py
more="$train --init $runs/warm-$seed --warmup 0 --steps 1800 --lr 5e-3 --muon-lr 0.015"
row nova $more --history teacher
row pyramid-flow $more --history noise --noise 0.333
row ours $more --history resample
row ours-routed $more --history resample --top-k 2  # of 9 frames in sight: 78 % sparse

rival="python results/rivals.py train"
more="--init $runs/warm-$seed --steps 1800"
row skyreels $rival skyreels $more
row magi $rival magi $more --time-shift 10  # the levels of its rollout
row error-bank $rival error-bank $more
row recycle $rival recycle $more
student="--teacher $runs/real-$seed --steps 1800 --lr 5e-4 --fake-lr 5e-4 --ema 0.99"
row causvid $rival causvid --init $runs/warm-$seed $student
row self-forcing $rival self-forcing --init $runs/warm-$seed $student
row longlive $rival longlive --init $runs/self-forcing-$seed $student

for name in nova pyramid-flow ours ours-routed skyreels magi error-bank recycle causvid self-forcing longlive; do
    python results/rivals.py eval $runs/$name-$seed --out results/table-1
done
