"""Reduce a run's checkpoint to its averaged weights in half precision, as results/resample.pt is.

  python results/pack.py runs/box/resample-0 results/resample.pt

The file loads like any run (sample.py --checkpoint, train.py --init; with a preset of Wan it must
be named ckpt.pt). It holds no optimizer state, so that --resume refuses it.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Parser, replacing, run_main
from model import read_checkpoint
from train import OF_THE_CALL


def pack(run, path):
    """Write the packed checkpoint of a run to path. Raises ValueError if there is no such run."""
    state = read_checkpoint(run)
    packed = {
        "config": asdict(state["config"]),
        "model": {},
        "ema": {name: z.half() for name, z in state["ema"].items()},
        "step": state["step"],
        "args": {name: z for name, z in state["args"].items() if name not in OF_THE_CALL},
    }
    with replacing(path) as part:
        torch.save(packed, part)


def main(argv):
    parser = Parser(__doc__, "%(prog)s RUN FILE")
    parser.add_argument("run", type=Path, help="a run's folder, or its ckpt.pt")
    parser.add_argument("path", type=Path, help="the file to write")
    args = parser.parse_args(argv)
    pack(args.run, args.path)
    print(f"{args.path}: {args.path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_main(main)
