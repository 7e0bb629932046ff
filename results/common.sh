# Sourced by the scripts of this folder: the one recipe of all their runs. One thread each; start
# scripts of several seeds side by side. Runs are $runs/NAME-$seed. Start a killed script again, and
# it continues; after a change of the recipe, begin with an empty folder.
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000
seed=${1:?which seed?}
runs=${2:-runs}  # a path from the repository's folder
steps=2400

train() {  # train NAME FLAGS...
    out=$runs/$1-$seed
    if [ -e $out/ckpt.pt ]; then
        [ -e $out/samples/final.gif ] || python train.py --resume --out $out
    else
        rm -rf $out
        python train.py --seed $seed --sample-every 100000 --out $out "${@:2}"
    fi
    [ -e $out/samples/final.gif ] || exit 1  # Ctrl-C stops a run, and then the script
}

warm_up() {  # warm_up NAME FLAGS...: the teacher forcing with which rows begin
    train $1 --history teacher --warmup 12000 --steps 12000 "${@:2}"
}

row() {  # row WARM-UP NAME FLAGS...
    train $2 --init $runs/$1-$seed --warmup 0 --steps $steps "${@:3}"
}

rival() {  # rival INIT METHOD FLAGS...: a run of rivals.py, which saves at its end
    out=$runs/$2-$seed
    [ -e $out/ckpt.pt ] && return
    rm -rf $out
    python results/rivals.py $2 --init $runs/$1-$seed --steps $steps --seed $seed --out $out "${@:3}"
}
