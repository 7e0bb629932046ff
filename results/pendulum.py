"""Clips of one's own: a pendulum that swings freely, its held-out clips continued by trained runs.

  pip install "gymnasium[classic-control]" && python results/pendulum.py runs/pendulum
  python results/pendulum.py runs/pendulum runs/real-teacher runs/real

Without runs, record 300 clips of 36 frames to FOLDER/train and 16 to FOLDER/held-out. With runs,
continue the 16 from two frames; print by quarters of a clip the rod's speed in degrees a frame, and
then how much red there is; draw the eighth clip in results/pendulum.png.
"""

import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Parser, Words, read_video, run_main, writer
from model import load_checkpoint
from sample import GIVEN, HISTORY_NAMES, contact_sheet, continue_clips, default_sampler


def record(folder):
    import gymnasium

    env = gymnasium.make("Pendulum-v1", render_mode="rgb_array").unwrapped
    env.screen_dim = 160
    for i in range(316):
        env.reset()
        env.state = np.random.default_rng(i).uniform((-np.pi, -4), (np.pi, 4))
        with writer(folder / ("train" if i < 300 else "held-out") / f"{i}.mp4", fps=20) as write:
            for _ in range(36):
                write(env.render()[None, 37:123, 37:123])
                env.step(np.zeros(1))


def motion(video):
    """Speed of the rod (B, T) in degrees since the frame before, and its red (B, T)."""
    red = (video[:, :, 0] - video[:, :, 1]).clamp(min=0)  # all but the rod is grey
    place = torch.linspace(-1, 1, red.shape[-1])
    angle = torch.atan2((red.sum(-1) * place).sum(-1), (red.sum(-2) * place).sum(-1)).rad2deg()
    step = angle.diff(dim=1, prepend=angle[:, :1])
    return ((step + 180) % 360 - 180).abs(), red.sum((2, 3))


def main(argv):
    parser = Parser(__doc__, "%(prog)s FOLDER [RUN ...]")
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", type=Path, nargs="*")
    args = parser.parse_args(argv)
    if not args.runs:
        return record(args.folder)
    truth = torch.stack([read_video(path, 64) for path in sorted(args.folder.glob("held-out/*"))])
    clips = {"truth": truth}
    for run in args.runs:
        net = load_checkpoint(run)
        c = Words(*net.run["words"]).text([""] * len(truth))
        name = HISTORY_NAMES[net.run["history"]]
        if name in clips:
            raise ValueError(f"{run}: wanted one run of {name}")
        clips[name] = continue_clips(net, truth, c, 36, GIVEN, **default_sampler(net))
    for name, video in clips.items():
        quarters = [z.unflatten(1, (4, 9)).mean((0, 2)) for z in motion(video)]
        print(f"{name:>18}", *(f"{z:6.1f}" for z in torch.cat(quarters)))
    videos = torch.stack([video[7] for video in clips.values()])
    iio.imwrite("results/pendulum.png", contact_sheet(videos, list(clips), columns=12))


if __name__ == "__main__":
    run_main(main)
