"""Fig. 7's paired control: is the hidden sprite remembered, or guessed?

  python results/memory.py results/hidden.json runs/dense-0 runs/window-5-0
  python results/memory.py results/fig-7-strip.png runs/dense-0 runs/window-5-0

Two clips differ in the colour of their one sprite alone. True frames are given up to the last of
HIDDEN or more in a row in which the wall hides it whole; both are continued with the same noise.
When the sprite is out again, its colour is its own, that of the other clip, a third, or none. Where
nothing of it is left in sight the first two are equally likely. Adds the counts to the runs in the
JSON file; if the file is a picture, draws the first pair.
"""

import sys
from itertools import count, islice
from pathlib import Path

import imageio.v3 as iio
import torch
from einops import rearrange
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from data import Parser, number, run_main
from model import load_checkpoint
from results.evidence import label_of, pairs_table, read_rows, split_name, write_json
from sample import contact_sheet, continue_clips, default_sampler, held_out

HIDDEN = 5  # frames at least in which nothing of the sprite is seen: all that `window-5` sees
OUT = 0.95  # share of the sprite in sight, at which it is judged


def questions(world, length=48):
    """Pairs of clips (2, T, 3, size, size), the number of given frames, and the two colours.

    world: one sprite and a wall. A clip ends with the first frame in which the sprite is out again,
    within `length` frames.
    """
    for i in count():
        colour, shape, at = world.scene(i, length)
        radius = data.radius_of(world.size)
        cover = data.coverage(at, shape, world.size, radius)  # (T, 1, size, size)
        shown = (cover * ~data.wall_columns(world.size)).sum((1, 2, 3)) / cover.sum((1, 2, 3))
        gone = shown == 0
        back = [t for t in range(HIDDEN, length) if gone[t - HIDDEN : t].all() and not gone[t]]
        out = (shown[back[0] :] > OUT).nonzero()[:, 0].tolist() if back else []
        if not out:
            continue

        twin = (colour + 1) % len(data.COLOURS)
        at = at[: back[0] + out[0] + 1]
        clips = [data.paint(at, shape, z, world.size, wall=True) for z in (colour, twin)]
        yield torch.stack(clips), back[0], (colour, twin), shape


def continue_pair(net, clips, given, seed):
    """Continue both clips from their first `given` frames with the same noise: (2, T, ...)."""
    c = held_out(net.run, 1).words("")[None]  # no caption names the colour
    settings = default_sampler(net) | {"seed": seed}
    made = [continue_clips(net, clip[None], c, len(clip), given, **settings) for clip in clips]
    return torch.cat(made)


def answers(net, samples):
    """Count what comes out again in 2 · samples clips: own, other, third, none."""
    counts = dict.fromkeys(("own", "other", "third", "none"), 0)
    asked = islice(questions(held_out(net.run, 1, "final")), samples)
    for seed, pair in enumerate(tqdm(asked, "pairs", samples, leave=False)):
        clips, given, colours, shape = pair
        made = continue_pair(net, clips, given, seed)
        for clip, own, other in zip(made, colours, reversed(colours)):
            caption = data.caption_text(own, shape)
            sprites, _, _ = data.fit_video(clip[None, -1:], [caption], wall=True)
            share, colour = sprites[0, 0, :, 3].max(0)
            named = {own.item(): "own", other.item(): "other"}
            counts[named.get(colour.item(), "third") if share > data.SEEN else "none"] += 1
    return counts


def strip(path, runs):
    """Draw the first pair, its clips side by side, and how each run continues it."""
    nets = {label_of(split_name(run)[0]): load_checkpoint(run) for run in runs}
    first, *_ = nets.values()
    clips, given, *_ = next(questions(held_out(first.run, 1, "final")))
    rows = {"truth": clips}
    rows |= {name: continue_pair(net, clips, given, seed=0) for name, net in nets.items()}
    videos = rearrange(list(rows.values()), "n pair t c h w -> n t c h (pair w)")
    iio.imwrite(path, contact_sheet(videos, list(rows), columns=8))


def main(argv):
    parser = Parser(__doc__, "%(prog)s FILE RUN [RUN ...] [flags]")
    add = parser.add_argument
    add("file", type=Path, help="a .png, or the .json in which evidence.py measured the runs")
    add("runs", type=Path, nargs="+", help="runs of train.py --data hidden --objects 1")
    add("--samples", type=number(int, 1), default=64, help="pairs (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.file.suffix == ".png":
        return strip(args.file, args.runs)
    for run in args.runs:
        name, seed = split_name(run)
        rows = read_rows(args.file)
        if seed not in rows.get(name, {}):
            raise ValueError(f"{args.file} has no {run}; evidence.py measure writes it")
        if sum(rows[name][seed].get("pairs", {}).values()) != 2 * args.samples:
            counts = answers(load_checkpoint(run), args.samples)
            rows = read_rows(args.file)  # another process may have added a run
            rows[name][seed]["pairs"] = counts
            write_json(args.file, rows)
    print(pairs_table({name: rows[name] for name, _ in map(split_name, args.runs)}))


if __name__ == "__main__":
    run_main(main)
