# Sourced by the scripts of this folder. One thread; start several scripts side by side.
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
train="python train.py --sample-every 100000"

row() {  # row OUT COMMAND...: run the command, unless it has finished before
    out=$1
    shift
    [ -e "$out/done" ] && return
    rm -rf "${out:?}"
    "$@" --out "$out"
    touch "$out/done"
}
