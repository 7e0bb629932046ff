"""Reduce a run's checkpoint to its averaged weights in half precision, as results/resample.pt is.

  python results/pack.py runs/box/resample results/resample.pt

The file loads like any run (sample.py --checkpoint, train.py --init). It holds no optimizer state,
so that --resume refuses it.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import read_checkpoint

DROPPED = ("out", "init", "resume", "dry_run", "device")  # flags that only concern where it ran


def pack(run, path):
    """Write the packed checkpoint of a run to path. Raises ValueError if there is no such run."""
    state = read_checkpoint(run)
    packed = {
        "config": state["config"],
        "model": {},
        "ema": {name: z.half() for name, z in state["ema"].items()},
        "step": state["step"],
        "args": {name: value for name, value in state["args"].items() if name not in DROPPED},
    }
    part = path.with_name(path.name + ".part")
    torch.save(packed, part)
    os.replace(part, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder, or its ckpt.pt")
    parser.add_argument("path", type=Path, help="the file to write")
    args = parser.parse_args()
    try:
        pack(args.run, args.path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.path}: {args.path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
