"""Fig. 8: which history frames the tokens of the last frame pick, by layer.

  pip install matplotlib && python results/fig_8.py results/fig-8.png runs/picks-{1,3,5}-0

Generates --samples videos with runs of --top-k, and draws the share of the last frame's tokens,
over heads, videos and its Euler steps, that pick each frame before it.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Parser, Words, number, run_main
from model import load_checkpoint, rotate
from results.plot import pyplot, save
from routing import pick
from sample import default_sampler, generate


def record_picks(model, shares, videos):
    """From now on each pass appends its layers' picks to `shares`, one list for each layer.

    An entry (S,) is the share of the last frame's tokens, over heads and the first `videos` rows
    of the batch, that pick each of the S columns. Rows after these are guidance's unconditional
    branch.
    """

    def hook(module, args, output):
        x, angles, past, _, cache = args
        q, _, _ = module.project(x[:, -1:], x[:, -1:])
        k = cache.kv[0, module.layer, :, :, : len(angles)]  # before RoPE
        picked, valid = pick(rotate(q, angles[-1:]), rotate(k, angles), past[-1:], module.top_k)
        picked, valid = picked[:videos, :, 0], valid[:videos, :, 0]  # (B, H, P, top_k)
        counts = torch.bincount(picked[valid], minlength=len(angles))
        shares[module.layer].append(counts / picked[..., 0].numel())

    for block in model.blocks:
        block.self_attn.register_forward_hook(hook)


def picks_of(model, frames, samples, prompt="red circle and blue square"):
    """What the last frame picks: (layers + 1, frames - 1), the last row the mean of the layers."""
    shares = [[] for _ in model.blocks]
    record_picks(model, shares, samples)
    settings = default_sampler(model) | {"window": None}
    run = model.run
    given = torch.zeros(samples, 0, model.config.channels, run["height"], run["width"])
    c = Words(*run["words"]).text([prompt] * samples)
    list(generate(model, [(0, c)], given, frames, **settings))

    # the last passes are the Euler steps of the last frame, the last column the frame itself
    share = [torch.stack(layer[-settings["steps"] :]).mean(0)[:-1] for layer in shares]
    return torch.stack([*share, torch.stack(share).mean(0)])


def draw_picks(plt, shares, path):
    """Draw {name: shares (layers + 1, frames) in [0, 1]} beside one another."""
    figure, axes = plt.subplots(1, len(shares), figsize=(4.4 * len(shares), 2.2), squeeze=False)
    for axis, (name, share) in zip(axes[0], shares.items()):
        axis.imshow(share, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axis.set_title(name, loc="left", fontsize=11)
        axis.set_xticks(range(share.shape[1]))
        axis.set_yticks(range(len(share)), [*(f"layer {i}" for i in range(len(share) - 1)), "mean"])
        for (row, column), value in np.ndenumerate(share):
            ink = "black" if value > 0.65 else "white"
            axis.text(column, row, f"{value:.2f}", color=ink, fontsize=7, ha="center", va="center")
    axes[0, 0].set_xlabel("history frame")
    save(figure, path)


def main(argv):
    parser = Parser(__doc__, "%(prog)s PICTURE RUN [RUN ...] [flags]")
    add = parser.add_argument
    add("picture", type=Path, help="a .png")
    add("runs", type=Path, nargs="+", help="runs of train.py with --top-k")
    add("--frames", type=number(int, 2), default=10, help="default: %(default)s")
    add("--samples", type=number(int, 1), default=16, help="videos (default: %(default)s)")
    args = parser.parse_args(argv)
    plt = pyplot()
    shares = {}
    for run in args.runs:
        model = load_checkpoint(run)
        if model.config.top_k is None or model.config.chunk != 1:
            raise ValueError(f"{run}: wanted a run with --top-k and --chunk 1")
        share = picks_of(model, args.frames, args.samples)
        shares[f"k = {model.config.top_k}"] = share.numpy()
    draw_picks(plt, shares, args.picture)


if __name__ == "__main__":
    run_main(main)
