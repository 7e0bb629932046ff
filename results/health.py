"""Held-out loss of a run by noise level, to compare with the table of a healthy one.

  python results/health.py runs/001

Prints Eq. (4)'s loss on held-out sprites, all frames at one noise level t, on the true history and
on the history that self-resampling makes. t near 1 asks where things are going, and t near 0 asks
for their edges. Then *Visual* of the redrawn frames and of those that the run makes in sampling,
which the redrawn ones should resemble.
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Parser, fold, number, run_main, unfold
from model import load_checkpoint
from rf import add_noise, self_resample
from sample import GIVEN, continue_held_out, default_sampler, held_out, measure_held_out

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


@torch.no_grad()
def losses_by_level(model, x, c, history, seed=0):
    """Eq. (4) with every frame at level t, for each t of LEVELS. x (B, N, C, height, width)."""
    noise = torch.Generator().manual_seed(seed)
    eps = torch.randn(x.shape, generator=noise)
    losses = []
    for level in LEVELS:
        t = torch.full(x.shape[:2], level)
        v = model(add_noise(x, eps, t), t, c, history)
        losses.append((v - (eps - x)).square().mean().item())
    return losses


def main(argv):
    parser = Parser(__doc__, "%(prog)s RUN [flags]")
    parser.add_argument("run", type=Path, help="a run of train.py on sprites")
    parser.add_argument("--samples", type=number(int, 1), default=64, help="default: %(default)s")
    args = parser.parse_args(argv)
    model = load_checkpoint(args.run)
    frames, s, steps = (model.run[name] for name in ("frames", "shift", "resample_steps"))

    clips = held_out(model.run, frames)
    videos, c = default_collate([clips[i] for i in range(args.samples)])
    x = fold(videos, model.config.chunk)
    torch.manual_seed(0)
    redrawn = self_resample(model, x[:, :-1], c, s, steps)
    histories = {"true": x[:, :-1], "resampled": redrawn}
    print(f"{'history':>12}" + "".join(f"{f't = {t:g}':>10}" for t in LEVELS))
    for name, history in histories.items():
        losses = losses_by_level(model, x, c, history)
        print(f"{name:>12}" + "".join(f"{loss:10.4f}" for loss in losses))

    _, made = continue_held_out(model, frames, args.samples, **default_sampler(model))
    shown = {"redrawn": unfold(redrawn, model.config.chunk), "its own": made[:, GIVEN:]}
    for name, video in shown.items():
        print(f"Visual, {name}: {measure_held_out(model, video)[..., 0].nanmean():.1f}")


if __name__ == "__main__":
    run_main(main)
