# The weights of this folder, teacher.pt and resample.pt: bash results/box.sh
# About 70 minutes on two cores: the two histories are trained side by side.
. "$(dirname "$0")/common.sh"
runs=${1:-runs/box}

row $runs/images python train.py --layers 4 --frames 1 --batch 64 --steps 1500 --history teacher
row $runs/warm python train.py --layers 4 --init $runs/images --warmup 6000 --steps 6000 --decay constant --lr 5e-3 --muon-lr 0.015
for history in teacher resample; do
    row $runs/$history-0 python train.py --layers 4 --init $runs/warm --warmup 0 --steps 7000 --lr 5e-3 --muon-lr 0.015 --history $history &
done
wait

for history in teacher resample; do python results/pack.py $runs/$history-0 results/$history.pt; done
python results/evidence.py measure results/box.json results/{teacher,resample}.pt
python results/evidence.py baselines results/long.json --frames 1000 --samples 16
python results/evidence.py measure results/long.json --frames 1000 --samples 16 results/{teacher,resample}.pt
python sample.py --eval --checkpoint results/{teacher,resample}.pt --frames 150 --samples 4 --out $runs/compare.gif
