# Table 1, one seed, after table-2.sh: bash results/table-1.sh 0 [FOLDER]
. "$(dirname "$0")/common.sh"

row warm routed --history resample --top-k 2  # of 9 frames in sight: 78 % sparse
train real --history teacher --chunk 10 --warmup 6000 --steps 6000  # its one chunk is the clip

rival() {  # rival METHOD INIT FLAGS...
    out=$runs/$1-$seed
    [ -e $out/ckpt.pt ] && return
    rm -rf $out
    python results/rivals.py $1 --init $runs/$2-$seed --steps $steps --seed $seed --out $out "${@:3}"
}
rival skyreels warm
rival magi warm

# distilled; CausVid's student must know noisy history, so it begins with diffusion forcing
rival causvid skyreels --teacher $runs/real-$seed
rival self-forcing warm --teacher $runs/real-$seed
rival longlive self-forcing --teacher $runs/real-$seed

rows=$(echo $runs/{routed,skyreels,magi,causvid,self-forcing,longlive}-$seed)
python results/evidence.py measure results/sprites.json $rows
python results/evidence.py time results/sprites.json $runs/{teacher,noise,resample}-$seed $rows
