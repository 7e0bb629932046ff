# Tables 1 and 2 on the sprites, one seed: bash results/table-1.sh 0 [FOLDER]
. "$(dirname "$0")/common.sh"
seed=${1:?which seed?}
runs=${2:-runs/table-1}

# the warm-up of every row, and the bidirectional teacher: its one chunk is the whole clip
row $runs/warm-$seed $train --seed $seed --history teacher --warmup 3000 --steps 3000 --decay constant --lr 5e-3 --muon-lr 0.015
row $runs/real-$seed $train --seed $seed --history teacher --chunk 10 --frames 10 --warmup 6000 --steps 6000

# the histories of train.py
more="$train --seed $seed --init $runs/warm-$seed --warmup 0 --steps 1800 --lr 5e-3 --muon-lr 0.015"
row $runs/ours-$seed $more --history resample
row $runs/nova-$seed $more --history teacher
row $runs/pyramid-flow-$seed $more --history noise --noise 0.333
row $runs/parallel-$seed $more --history parallel
row $runs/ours-routed-$seed $more --history resample --top-k 2  # of 9 frames in sight: 78 % sparse

# diffusion forcing
rival() {  # rival METHOD INIT FLAGS...
    row $runs/$1-$seed python results/rivals.py $1 --seed $seed --init $runs/$2-$seed --steps 1800 "${@:3}"
}
rival skyreels warm
rival magi warm

# distilled from the teacher; CausVid's student must know noisy history, so it begins with
# diffusion forcing
rival causvid skyreels --teacher $runs/real-$seed
rival self-forcing warm --teacher $runs/real-$seed
rival longlive self-forcing --teacher $runs/real-$seed

python results/evidence.py baselines results/table-1.json
python results/evidence.py measure results/table-1.json --true-history $runs/{nova,pyramid-flow,parallel,ours}-$seed
others=$(echo $runs/{ours-routed,skyreels,magi,causvid,self-forcing,longlive}-$seed)
python results/evidence.py measure results/table-1.json $others
python results/evidence.py time results/table-1.json $runs/{nova,pyramid-flow,parallel,ours}-$seed $others
