"""Record clips of three Atari games with small moving things, to train on.

  pip install ale-py
  python results/record_games.py games --clips 240 --held-out 48
  python train.py --data games/train --size 80 ...

Writes OUT/train and OUT/test: clips of 80 x 80 pixels, 64 frames at 30 a second, each with its
caption, "pong", "breakout" or "freeway", in name.txt beside name.mp4. The playing field is cut out
and halved: a ball is one or two pixels wide and two or three high, a car four wide. Held-out clips
are other episodes.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import to_float, writer
from sample import new_parser, path_type, positive_int, run_main

SIZE = 80  # pixels along a side
FRAMES = 64  # of a clip
SKIP = 2  # frames of the game, 60 a second, for each frame of a clip
TOP = {"pong": 34, "breakout": 34, "freeway": 24}  # row of the screen where the field begins
NOOP, FIRE, UP, RIGHT, LEFT = 0, 1, 2, 3, 4
PONG_UP, PONG_DOWN = RIGHT, LEFT  # Pong's paddle is turned by a knob


def play(game, ram, rng):
    """The next action: follow the ball, or cross the road; sometimes wait."""
    if game == "freeway":
        return UP if rng.random() < 0.7 else NOOP
    if game == "pong":
        ball, paddle = int(ram[54]), int(ram[51]) + 4
        if abs(ball - paddle) < 4:
            return NOOP
        return PONG_UP if ball < paddle else PONG_DOWN

    ball, paddle = int(ram[99]), int(ram[72]) + 8
    if ram[101] == 0:  # no ball in play
        return FIRE
    if abs(ball - paddle) < 4:
        return NOOP
    return LEFT if ball < paddle else RIGHT


def record(game, seed):
    """A clip (FRAMES, SIZE, SIZE, 3) of bytes from a random moment of an episode."""
    from ale_py import ALEInterface, LoggerMode, roms

    ALEInterface.setLoggerMode(LoggerMode.Error)
    ale = ALEInterface()
    ale.setInt("random_seed", seed)
    ale.setFloat("repeat_action_probability", 0.25)
    ale.loadROM(roms.get_rom_path(game))
    rng = np.random.default_rng(seed)

    start = rng.integers(120, 600)  # of the game's frames, after its first screens
    pictures = []
    for frame in range(start + FRAMES * SKIP):
        if ale.game_over():
            ale.reset_game()
        ale.act(play(game, ale.getRAM(), rng))
        if frame >= start and (frame - start) % SKIP == 0:
            field = ale.getScreenRGB()[TOP[game] :][: 2 * SIZE]  # (160, 160, 3)
            pictures.append(halve(field, game))
    return np.stack(pictures)


def halve(field, game):
    """Halve a picture (160, 160, 3) of bytes: the mean of 2 x 2 pixels, in Breakout the maximum.

    Breakout's ball is seldom on whole pixels. Its mean is half as bright in every other frame, and
    a model hardly learns to see it. Freeway has cars that are darker than the road.
    """
    if game == "breakout":
        return field.reshape(SIZE, 2, SIZE, 2, 3).max((1, 3))
    return np.asarray(Image.fromarray(field).reduce(2))


def write_clips(folder, games, count, first_seed):
    """Write `count` clips, the games in turn."""
    folder.mkdir(parents=True)
    for i in tqdm(range(count), folder.name):
        game = games[i % len(games)]
        path = folder / f"{game}-{i:04d}.mp4"
        with writer(path, 60 // SKIP) as out:
            out(to_float(record(game, first_seed + i)))
        path.with_suffix(".txt").write_text(game)


def main(argv):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("out", type=path_type, help="a new folder")
    add("--games", nargs="+", choices=TOP, default=[*TOP], help="in turn (default: all three)")
    add("--clips", type=positive_int, default=240, help="default: %(default)s")
    add("--held-out", type=positive_int, default=48, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise ValueError(f"{args.out} exists; wanted a new folder")
    try:
        import ale_py  # noqa: F401
    except ImportError:
        raise ValueError("the games need ale-py: pip install ale-py") from None
    write_clips(args.out / "train", args.games, args.clips, first_seed=1)
    write_clips(args.out / "test", args.games, args.held_out, first_seed=1_000_001)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
