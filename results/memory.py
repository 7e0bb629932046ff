"""Fig. 7's paired control: is the hidden sprite remembered, or guessed?

  python results/memory.py results/hidden.json runs/dense-0 runs/window-5-0

Two clips differ in the colour of their one sprite alone. True frames are given up to the last of
HIDDEN or more in a row in which the wall hides it whole; both are continued with the same noise.
When the sprite is out again, its colour is its own, that of the other clip, a third, or none. Where
nothing of it is left in sight the first two are equally likely. A window sees further back than
its length: the keys of its frames were computed from those before them. Adds the counts to the runs
in the JSON file.
"""

import sys
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from data import Parser, number, run_main
from model import load_checkpoint
from results.evidence import pairs_table, read_rows, split_name, write_json
from sample import continue_clips, default_sampler, held_out

HIDDEN = 4  # frames at least in which nothing of the sprite is seen
OUT = 0.95  # share of the sprite in sight, at which it is judged


def questions(world, length):
    """Pairs of clips (2, T, 3, size, size), the number of given frames, and the two colours.

    world: one sprite and a wall. A clip ends with the first frame in which the sprite is out again,
    within `length` frames.
    """
    for i in count():
        colour, shape, at = world.scene(i, length)
        cover = data.coverage(
            at, shape, world.size, data.radius_of(world.size)
        )  # (T, 1, size, size)
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


def answers(net, samples, length=48):
    """Count what comes out again in 2 · samples clips: own, other, third, none."""
    counts = dict.fromkeys(("own", "other", "third", "none"), 0)
    world = held_out(net.run, net.run["frames"], "final")
    c = torch.zeros(1, world.words.rows, world.text_dim)
    asked = questions(world, length)
    for seed in tqdm(range(samples), "pairs", leave=False):
        clips, given, colours, shape = next(asked)
        for clip, own, other in zip(clips, colours, reversed(colours)):
            made = continue_clips(
                net, clip[None], c, len(clip), given, **default_sampler(net), seed=seed
            )
            sprites, _, _ = data.fit_video(made[:, -1:], [data.caption_text(own, shape)], wall=True)
            share, colour = sprites[0, 0, :, 3].max(0)
            named = {own.item(): "own", other.item(): "other"}
            counts[named.get(colour.item(), "third") if share > data.SEEN else "none"] += 1
    return counts


def main(argv):
    parser = Parser(__doc__, "%(prog)s FILE RUN [RUN ...] [flags]")
    add = parser.add_argument
    add("file", type=Path, help="results/NAME.json, in which evidence.py measured the runs")
    add("runs", type=Path, nargs="+", help="runs of train.py --data hidden --objects 1")
    add("--samples", type=number(int, 1), default=64, help="pairs (default: %(default)s)")
    args = parser.parse_args(argv)
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
