# Table 1, one seed, after table-2.sh: bash results/table-1.sh 0 [FOLDER]
. "$(dirname "$0")/common.sh"

row warm routed-resampling --history resample --top-k 2  # of 9 frames in sight: 78 % sparse
train bidirectional --history teacher --chunk 10 --frames 10 --warmup 6000 --steps 6000

rival warm diffusion-forcing
rival warm pipelined-diffusion-forcing

# distilled; a student of real clips must know noisy history: it begins with diffusion forcing
teacher="--teacher $runs/bidirectional-$seed"
rival diffusion-forcing DMD-on-real-clips $teacher
rival warm DMD-on-rollouts $teacher
rival DMD-on-rollouts DMD-on-long-rollouts $teacher

rows=$(echo $runs/{routed-resampling,{,pipelined-}diffusion-forcing,DMD-on-{real-clips,rollouts,long-rollouts}}-$seed)
python results/evidence.py measure results/sprites.json $rows
python results/evidence.py time results/sprites.json $runs/{teacher,resampling}-forcing-$seed $rows
python results/evidence.py strip results/table-1.png $runs/{teacher-forcing,DMD-on-real-clips,DMD-on-long-rollouts,resampling-forcing}-$seed
