# Table 1, one seed, after table-2.sh: bash results/table-1.sh 0 [FOLDER]
. "$(dirname "$0")/common.sh"

row warm routed --history resample --top-k 2  # of 9 frames in sight: 78 % sparse
train real --history teacher --chunk 10 --warmup 6000 --steps 6000  # its one chunk is the clip

rival warm skyreels
rival warm magi

# distilled; CausVid's student must know noisy history, so it begins with diffusion forcing
rival skyreels causvid --teacher $runs/real-$seed
rival warm self-forcing --teacher $runs/real-$seed
rival self-forcing longlive --teacher $runs/real-$seed

rows=$(echo $runs/{routed,skyreels,magi,causvid,self-forcing,longlive}-$seed)
python results/evidence.py measure results/sprites.json $rows
python results/evidence.py time results/sprites.json $runs/{teacher,noise,resample}-$seed $rows
