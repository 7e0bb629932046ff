"""Fig. 8: which history frames the tokens of the last frame pick, by layer.

  python results/fig_8.py runs/fig-8/top-3 results/fig-8-3.png

Generates --samples videos with a run of --top-k, and draws the share of the last frame's tokens,
over heads, videos and its Euler steps, that pick each frame before it.
"""

import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Parser, Words, number, run_main
from model import load_checkpoint, rotate
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


def picks_of(model, prompt, frames, samples):
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


def draw_picks(share):
    """Draw shares (layers + 1, frames) in [0, 1], black for 0 and yellow for 1: an image."""
    cell, line, left, top = 36, 24, 64, 44
    rows, columns = share.shape
    page = Image.new("RGB", (left + cell * columns + 8, top + line * rows + 8), "white")
    draw = ImageDraw.Draw(page)
    draw.text((4, 4), "share of the last frame's tokens that pick a history frame", "black")
    draw.text((left - 6, top - 10), "frame", "black", anchor="rm")
    for column in range(columns):
        draw.text((left + cell * (column + 0.5), top - 10), str(column), "black", anchor="mm")

    names = [*(f"layer {i}" for i in range(rows - 1)), "mean"]
    for row, (name, values) in enumerate(zip(names, share.tolist())):
        y = top + line * row
        draw.text((left - 6, y + line / 2), name, "black", anchor="rm")
        for column, value in enumerate(values):
            x = left + cell * column
            colour = (round(255 * value), round(217 * value), round(51 * value))
            draw.rectangle((x, y, x + cell - 2, y + line - 2), colour)
            ink = "black" if value > 0.65 else "white"
            draw.text((x + cell / 2 - 1, y + line / 2 - 1), f"{value:.2f}", ink, anchor="mm")
    return np.asarray(page)


def main(argv):
    parser = Parser(__doc__, "%(prog)s RUN PICTURE [flags]")
    add = parser.add_argument
    add("run", type=Path, help="a run of train.py with --top-k")
    add("picture", type=Path, help="a .png")
    add("--prompt", default="red circle and blue square", help="default: %(default)s")
    add("--frames", type=number(int, 2), default=10, help="default: %(default)s")
    add("--samples", type=number(int, 1), default=16, help="videos (default: %(default)s)")
    args = parser.parse_args(argv)
    model = load_checkpoint(args.run)
    if model.config.top_k is None or model.config.chunk != 1:
        raise ValueError(f"{args.run}: wanted a run with --top-k and --chunk 1")
    share = picks_of(model, args.prompt, args.frames, args.samples)
    iio.imwrite(args.picture, draw_picks(share))
    print("\n".join(" ".join(f"{value:.2f}" for value in row) for row in share.tolist()))


if __name__ == "__main__":
    run_main(main)
