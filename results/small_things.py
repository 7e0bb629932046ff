"""Are the small moving things of the Atari games still there, and do they move?

  python results/small_things.py runs/games/three games/test

Continues held-out clips of record_games.py from two true frames, and follows the balls of Pong and
Breakout and the cars of Freeway, objects of two to twenty pixels that loss and eye can miss.

An object is seen where a spot of 3 x 3 pixels differs from the background, the game's median frame,
by about as much as in the truth. The table counts the clips in which the ball, or the cars of half
of the lanes, are seen in single frames, and "near" those in which they are within 3 pixels of the
true ones. Between two points a game has no ball. "lost" says at which side of the field a ball was
last seen that is not seen in the last 8 frames. "paddles" is for Pong: of the frames with a ball at
a side, the share in which the paddle there is where it can return it. "apart" says how many rows
the paddles are from the ball, and from each other.

An object is alive if it is seen in at least half of the frames from --from on, its median step is
below 6 pixels, and its median move in 8 frames above 0.5. The cars are alive if those of half of
the lanes are. A field with a quarter more than what the truth's fullest 5 % of frames hold does not
count: it has copies. Beside the rollout the table judges the truth, and the truth spoiled on
purpose.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Videos
from sample import (
    bounded_int,
    continue_video,
    load_run,
    new_parser,
    nonnegative_float,
    positive_float,
    positive_int,
    rollout_window,
    run_main,
    write_comparison,
)

# Rows and columns where nothing but the objects moves, and strips of rows of one object each.
FIELDS = {
    "pong": (slice(0, 80), slice(13, 67), 1),
    "breakout": (slice(33, 75), slice(0, 80), 1),
    "freeway": (slice(0, 80), slice(25, 80), 10),
}
SEEN_IN = (4, 8, 16, 24, 32, 40, 47)  # frames in which the objects are counted, too
NEAR = 3  # pixels; an object is where the truth has it if it is nearer than this
EDGE = 6  # pixels; a ball is at a side of its field, or at a paddle, if it is nearer than this
PADDLES = {"left": slice(7, 12), "right": slice(68, 73)}  # columns of Pong's, beside its field
DIFFERENT = 0.15  # from the background, in [0, 2]; less is the codec's noise


def difference(video, background):
    """How much each pixel differs from the background: (B, T, 3, H, W) -> (B, T, H, W)."""
    away = (video - background).abs().amax(2)
    return torch.where(away > DIFFERENT, away, 0)


def follow(video, background, field):
    """Find the strongest spot of each strip: its mass (B, T, S), and its centre (B, T, S, 2).

    Returns both, and the mass of the whole field (B, T).
    """
    rows, columns, strips = field
    away = difference(video, background)[:, :, rows, columns]
    B, T, H, W = away.shape
    flat = away.reshape(B * T * strips, 1, H // strips, W)
    spot = F.avg_pool2d(flat, 3, 1, 1).flatten(1).argmax(1)

    y, x = torch.arange(H // strips), torch.arange(W)
    near_y = (y - (spot // W)[:, None]).abs() <= 2
    near_x = (x - (spot % W)[:, None]).abs() <= 2
    weight = flat[:, 0] * near_y[:, :, None] * near_x[:, None]
    mass = weight.sum((1, 2))
    centre = torch.stack([(weight * y[:, None]).sum((1, 2)), (weight * x).sum((1, 2))], -1)
    centre = centre / mass.clamp(min=1e-6)[:, None]
    return mass.view(B, T, strips), centre.view(B, T, strips, 2), away.sum((-1, -2))


def is_seen(mass, typical):
    """Whether a spot is about as strong as an object of the truth, one of mass `typical`."""
    return (mass > 0.4 * typical) & (mass < 2.5 * typical)


def has_half(there):
    """Whether half of the objects are there: (..., S) of bool -> (...)."""
    return there.float().mean(-1) >= 0.5


def alive(video, background, field, typical, most, start):
    """Whether the objects of each video (B, T, 3, 80, 80) are there and move from `start` on."""
    mass, centre, whole = follow(video[:, start:], background, field)
    seen = is_seen(mass, typical)
    moves = (median_move(seen, centre, 1) < 6) & (median_move(seen, centre, 8) > 0.5)
    return has_half((seen.float().mean(1) >= 0.5) & moves) & (whole.median(1).values < 1.25 * most)


def seen_in(video, numbers, background, field, typical):
    """In how many videos (B, T, 3, 80, 80) half of the objects are seen, in each of the frames."""
    mass, _, _ = follow(video[:, numbers], background, field)
    return has_half(is_seen(mass, typical)).sum(0).tolist()


def near_truth(video, truth, numbers, background, field, typical):
    """In how many videos half of the objects are seen within NEAR pixels of the true ones.

    video, truth (B, T, 3, 80, 80); counted in each of the frames `numbers`.
    """
    mass, centre, _ = follow(video[:, numbers], background, field)
    true_mass, true_centre, _ = follow(truth[:, numbers], background, field)
    both = is_seen(mass, typical) & is_seen(true_mass, typical)
    near = both & ((centre - true_centre).norm(dim=-1) < NEAR)
    return has_half(near).sum(0).tolist()


def where_lost(video, background, field, typical):
    """Where the balls were last seen that are not seen in the last 8 frames: {place: videos}.

    video (B, T, 3, 80, 80), of a game with one ball. The places are the sides of the field, up to
    EDGE pixels wide, the rest ("inside"), and "never seen".
    """
    mass, centre, _ = follow(video, background, field)
    seen = is_seen(mass, typical)[:, :, 0]
    rows, columns, _ = field
    height, width = rows.stop - rows.start, columns.stop - columns.start
    places = dict.fromkeys(("left", "right", "top", "bottom", "inside", "never seen"), 0)
    for b in range(len(video)):
        frames = seen[b].nonzero().flatten().tolist()
        if not frames:
            places["never seen"] += 1
        elif frames[-1] < video.shape[1] - 8:
            y, x = centre[b, frames[-1], 0].tolist()
            sides = {"left": x, "right": width - 1 - x, "top": y, "bottom": height - 1 - y}
            side = min(sides, key=sides.get)
            places[side if sides[side] < EDGE else "inside"] += 1
    return places


def paddles_there(video, background, field, typical):
    """Of the frames with a ball at a side, the share with Pong's paddle at the ball: {side: share}.

    video (B, T, 3, 80, 80). The middle of the paddle is then less than EDGE rows from the ball; a
    paddle is 8 rows high. nan if no ball comes to the side.
    """
    mass, centre, _ = follow(video, background, field)
    seen = is_seen(mass, typical)[:, :, 0]
    row, column = centre[:, :, 0].unbind(-1)  # (B, T), in the field
    rows, columns, _ = field
    distance = {"left": column, "right": columns.stop - columns.start - 1 - column}
    share = {}
    for side in PADDLES:
        there = (paddle_row(video, background, side) - rows.start - row).abs() < EDGE
        share[side] = there[seen & (distance[side] < EDGE)].float().mean().item()
    return share


def paddle_row(video, background, side):
    """The row of a paddle's middle in each frame, (B, T, 3, 80, 80) -> (B, T); nan: none."""
    away = difference(video, background)[..., PADDLES[side]].sum(-1)  # (B, T, H)
    return (away * torch.arange(video.shape[-2])).sum(-1) / away.sum(-1)


def rows_apart(video, background, field, typical, start):
    """How far Pong's paddles are from the ball and from each other: {pair: median of rows}.

    video (B, T, 3, 80, 80); of its frames from `start` on those with a ball count, and with both
    of the pair. nan: there is none.
    """
    mass, centre, _ = follow(video[:, start:], background, field)
    rows = {"ball": field[0].start + centre[:, :, 0, 0]}
    rows |= {side: paddle_row(video[:, start:], background, side) for side in PADDLES}
    seen = is_seen(mass, typical)[:, :, 0]
    pairs = [("left", "ball"), ("right", "ball"), ("left", "right")]
    return {f"{a} and {b}": (rows[a] - rows[b])[seen].abs().nanmedian().item() for a, b in pairs}


def median_move(seen, centre, frames):
    """The median distance (B, S) that an object moves in so many frames; nan: never seen."""
    move = (centre[:, frames:] - centre[:, :-frames]).norm(dim=-1)
    both = seen[:, frames:] & seen[:, :-frames]
    return torch.where(both, move, torch.nan).nanmedian(1).values


def spoil(truth, background, start):
    """Videos in which the objects are not alive, by name."""
    frozen = truth.clone()
    frozen[:, start:] = truth[:, [start]]
    blurred = F.avg_pool2d(truth.flatten(0, 1), 7, 1, 3, count_include_pad=False).view_as(truth)
    cluttered = truth.clone()
    for rows in (8, 16, 24):
        for columns in (8, 16, 24):
            cluttered += (truth - background).roll((rows, columns), (-2, -1))
    return {
        "truth, frozen": frozen,
        "truth, cluttered": cluttered.clamp(-1, 1),
        "truth, blurred": blurred,
        "background": background.expand_as(truth),
    }


def one_ahead(model, truth, c, settings):
    """Predict single frames from the true ones before them, as many as in training.

    Returns the last true frame, the true next one and the prediction, each (3 B, 1, 3, 80, 80): of
    three moments of each of B clips.
    """
    known = model.run["frames"] - 1
    last, wanted, predicted = [], [], []
    for start in torch.linspace(0, truth.shape[1] - known - 1, 3).long().tolist():
        past = truth[:, start : start + known]
        made = continue_video(model, past, c, known + 1, known, **settings)
        last.append(past[:, -1:])
        wanted.append(truth[:, [start + known]])
        predicted.append(made[:, -1:])
    return torch.cat(last), torch.cat(wanted), torch.cat(predicted)


def found(wanted, other, background, field, typical):
    """How many objects of the true frames are within a pixel in the other ones, and of how many."""
    mass, centre, _ = follow(wanted, background, field)
    other_mass, other_centre, _ = follow(other, background, field)
    there = mass > 0.4 * typical
    near = (centre - other_centre).norm(dim=-1) < 1
    return int((there & near & (other_mass > 0.4 * typical)).sum()), int(there.sum())


def read_clips(folder, run, frames):
    """(clips (B, frames, 3, height, width), c, the game of each, frames a second)."""
    data = Videos(folder, run["size"], frames)
    data.words.vocabulary, data.words.rows = run["words"]
    numbers = sorted(range(len(data.files)), key=lambda n: data.files[n])
    truth, c = default_collate([data.load(n, 0) for n in numbers])
    games = [data.captions[n] for n in numbers]
    if not set(games) <= set(FIELDS):
        raise ValueError(f"{folder}: wanted clips of {', '.join(FIELDS)}, by record_games.py")
    return truth, c, games, data.fps


# fmt: off
def parse(argv):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run of train.py")
    add("clips", type=Path, help="OUT/test of record_games.py")
    add("--frames", type=bounded_int(3), default=48, help="default: %(default)s")
    add("--from", type=bounded_int(0), default=32, dest="start", help="default: %(default)s")
    add("--given", type=positive_int, default=2, help="true frames (default: %(default)s)")
    add("--steps", type=positive_int, default=4, help="Euler steps (default: %(default)s)")
    add("--time-shift", type=positive_float, default=10.0,
        help="Eq. (7) on their times (default: %(default)s)")
    add("--guidance", type=nonnegative_float, default=1.0, help="default: %(default)s")
    add("--out", type=Path, help="picture, .gif and .png (default: in the run)")
    args = parser.parse_args(argv)
    if args.given >= args.start or args.start + 8 >= args.frames:
        raise ValueError(
            f"--given {args.given} --from {args.start} --frames {args.frames}: wanted --given "
            "below --from, and more than 8 frames after it"
        )
    return args
# fmt: on


def main(argv):
    args = parse(argv)
    model = load_run(args.run)
    if model.run["data"] == "sprites" or not model.run["words"]:
        raise ValueError(f"{args.run} was not trained on captioned videos, as record_games.py's")
    truth, c, games, fps = read_clips(args.clips, model.run, args.frames)
    settings = {"steps": args.steps, "time_shift": args.time_shift, "guidance": args.guidance}
    settings["window"] = rollout_window(model.config, model.run["frames"])
    made = continue_video(model, truth, c, args.frames, args.given, **settings)
    last, wanted, predicted = one_ahead(model, truth, c, settings)

    numbers = [n for n in SEEN_IN if n < args.frames]
    print(
        f"held-out clips: alive in frames {args.start} to {args.frames - 1}; seen in frames "
        f"{', '.join(map(str, numbers))}; and objects one frame ahead of the truth, within a pixel:"
    )
    total = {}
    fields = {name: field for name, field in FIELDS.items() if name in games}
    for game, field in fields.items():
        of_game = torch.tensor([name == game for name in games])
        true = truth[of_game]
        background = true.flatten(0, 1).median(0).values
        mass, _, whole = follow(true, background, field)
        typical = mass[mass > 0].median()
        most = whole.flatten().quantile(0.95)
        videos = {"truth": true} | spoil(true, background, args.start) | {"rollout": made[of_game]}
        for name, video in videos.items():
            result = alive(video, background, field, typical, most, args.start)
            total[name] = total.get(name, 0) + int(result.sum())
            print(f"{game:10s} {name:16s} {int(result.sum()):3d} of {len(true)}")
        for name in ("truth", "rollout"):
            counts = seen_in(videos[name], numbers, background, field, typical)
            print(f"{game:10s} {name + ', seen':16s} {' '.join(f'{n:3d}' for n in counts)}")
            if name == "rollout":
                counts = near_truth(videos[name], true, numbers, background, field, typical)
                print(f"{game:10s} {name + ', near':16s} {' '.join(f'{n:3d}' for n in counts)}")
            if field[2] == 1:
                lost = where_lost(videos[name], background, field, typical)
                text = ", ".join(f"{place} {n}" for place, n in lost.items() if n) or "none"
                print(f"{game:10s} {name + ', lost':16s} {text}")
            if game == "pong":
                there = paddles_there(videos[name], background, field, typical)
                text = ", ".join(f"{side} {100 * share:.0f} %" for side, share in there.items())
                print(f"{game:10s} {name + ', paddles':16s} {text}")
                apart = rows_apart(videos[name], background, field, typical, args.start)
                text = ", ".join(f"{pair} {rows:.1f}" for pair, rows in apart.items())
                print(f"{game:10s} {name + ', apart':16s} {text} rows")

        thrice = of_game.repeat(3)
        for name, other in {"one ahead": predicted, "copied frame": last}.items():
            n, count = found(wanted[thrice], other[thrice], background, field, typical)
            print(f"{game:10s} {name:16s} {n:3d} of {count}")
    for name, count in total.items():
        print(f"{'all':10s} {name:16s} {count:3d} of {len(games)}")

    shown = []  # up to three clips, as many of each game
    for name in fields:
        clips = [n for n, game in enumerate(games) if game == name]
        shown += clips[: 3 // len(fields)]
    videos = {"truth": truth[shown], "rollout": made[shown]}
    path = args.out or args.run / "samples" / "held_out"
    names = [games[n] for n in shown]
    write_comparison(path, videos, fps, names, columns=7, height=160)  # a ball is 1 x 2 pixels


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
