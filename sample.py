"""Generate videos of any length with a trained model, frame after frame.

  python sample.py "red circle and blue square"           the latest run, or results/resample.pt
  python sample.py "red circle and blue square" --checkpoint runs/001
  python sample.py "red circle and blue square" --given clip.mp4 --frames 100 --window 11
  python sample.py "red circle" --then 16 "white square" --frames 32
  python sample.py --eval --frames 48                     print metrics on held-out sprites
  python sample.py --compare runs/a runs/b                evaluate several runs on the same clips
  python sample.py --table runs/a-0 runs/a-1 runs/b-0     average earlier --eval over seeds
  python sample.py "red circle" --routing --checkpoint runs/fig-8/top-5   which frames are picked

Frames are written as they are finished. Without --checkpoint, the latest run under runs/ is used;
if there is none, results/resample.pt, a trained model of the sprites.
A video made with other settings is never replaced, unless --overwrite is given.

B videos, T frames of a video, N noisy frames, M given frames, C channels, L words. A frame of the
model may be a chunk of T frames folded into its channels.
"""

import argparse
import copy
import json
import math
import os
import re
import sys
import textwrap
import time
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps  # comes with imageio
from torch.utils.data import default_collate
from tqdm import tqdm

import routing
from data import (
    Sprites,
    Wan,
    Words,
    enlarge,
    fold,
    measure,
    one_line,
    read_video,
    replacing,
    round_up,
    split_words,
    to_bytes,
    to_float,
    unfold,
    write_picture,
    writer,
)
from model import load_checkpoint
from rf import Guided, rollout

try:
    import fcntl
except ImportError:  # Windows has no fcntl; a folder is not locked there
    fcntl = None


def generate(
    model,
    texts,
    given,
    frames,
    steps,
    time_shift=1.0,
    guidance=1.0,
    window=None,
    sink=0,
    seed=0,
    null=None,
    first_steps=None,
):
    """Continue the given frames to `frames` in all; yield each new one (B, 1, C, height, width).

    texts: [(first frame, c (B, L, text_dim))], in order of time. A new text begins a new rollout,
    whose history is every frame so far. given (B, M, C, height, width): M may be 0. window, sink:
    as in `model.cache`. null (1, L, text_dim): condition of guidance's unconditional branch (None:
    zeros); guidance is skipped where c is all zero, as its branches would be the same. first_steps:
    Euler steps of the first frame where none is given; without a history to follow it is the
    hardest (None: steps). The noise of a rollout is drawn at once, on the CPU: a seed draws the
    same noise on every device.
    """
    if first_steps and not given.shape[1]:
        texts = [texts[0], (1, texts[0][1]), *texts[1:]]  # a rollout of its own
    noise = torch.Generator().manual_seed(seed)
    ends = [start for start, _ in texts[1:]] + [frames]
    done = [given[:, [i]] for i in range(given.shape[1])]

    for (_, c), end in zip(texts, ends):
        if end <= len(done):  # the given frames cover this text
            continue

        guided = model
        if guidance != 1 and c.any():
            guided = Guided(model, torch.zeros_like(c[:1]) if null is None else null, guidance)

        x = torch.randn(len(given), end - len(done), *given.shape[2:], generator=noise)
        x = x.to(given.device)
        t = torch.ones(len(given), device=given.device)
        history = torch.cat([given[:, :0], *done], dim=1)
        cache = guided.cache(len(given), end, window=window, sink=sink)
        n = steps if done else first_steps or steps
        for frame in rollout(guided, x, t, c, n, time_shift, history, cache):
            done.append(frame)
            yield frame


def write_videos(args, model):
    """Turn prompts into video files: sample a frame, decode it, write it, in one loop."""
    chunk = model.config.chunk
    wan = Wan(args.wan, args.device) if args.wan else None
    null = wan.text([args.negative]).to(args.device) if wan else None
    decode = wan.decoder() if wan else torch.Tensor.cpu
    rate = 16 if wan else model.run["rate"]

    prompts = []
    for prompt in args.prompts or [""]:
        prompts += [prompt] * args.samples
    texts = encode_texts(args, model, prompts, wan)
    given = read_given(args, model, wan).expand(len(prompts), -1, -1, -1, -1).to(args.device)
    settings = video_settings(args)

    length = args.frames // chunk
    frames = generate(model, texts, given, length, null=null, **sampler_settings(args))
    shares = [deque(maxlen=args.steps) for _ in model.blocks]
    thumbnails, sampling, decoding = [], [], []
    new = 0

    with reserve_files(args, video_paths(args, prompts), settings) as paths:
        files, sheet = paths[:-1], paths[-1]
        with ExitStack() as stack:
            outs = [stack.enter_context(writer(path, rate)) for path in files]
            if args.routing:
                stack.enter_context(record_routing(model, shares, len(prompts)))
            if given.shape[1]:
                thumbnails.append(append_frames(outs, decode(unfold(given, chunk))))

            for _ in tqdm(range(length - given.shape[1]), "frames", dynamic_ncols=True):
                begin = time.perf_counter()
                with autocast(model, args.device):
                    frame = unfold(next(frames), chunk).cpu()  # (B, chunk, C, height, width)
                sampled = time.perf_counter()
                video = decode(frame)  # (B, T, 3, height, width)
                decoded = time.perf_counter()

                thumbnails.append(append_frames(outs, video))
                sampling.append(sampled - begin)
                decoding.append(decoded - sampled)
                new += video.shape[1]

        record_settings(files, settings)
        write_picture(sheet, contact_sheet(torch.cat(thumbnails, dim=1), 16, prompts))
        record_settings([sheet], settings)

    print_speed(args, f"{len(files)} x {new} new frames", len(files) * new, sampling, decoding)
    print_files(files, prompts, sheet)
    if args.routing:
        show_routing(args, shares, length, settings)


def append_frames(outs, video):
    """Append frames (B, T, 3, height, width) to B files. Return their thumbnails for the sheet."""
    for out, clip in zip(outs, video):
        out(clip)
    scale = max(1, video.shape[-2] // 64)
    return F.avg_pool2d(video.flatten(0, 1), scale).unflatten(0, video.shape[:2])


def encode_texts(args, model, prompts, wan):
    """Encode the prompts and those of --then: [(first frame, c (B, L, text_dim))]."""
    encoder = wan or Words(*model.run["words"])
    texts = [(0, prompts)]
    for at, prompt in sorted((int(at), prompt) for at, prompt in args.then):
        texts.append((at, [prompt] * len(prompts)))
    chunk = model.config.chunk
    return [(at // chunk, encoder.text(several).to(args.device)) for at, several in texts]


def read_given(args, model, wan):
    """Read the frames of --given (1, M, chunk * C, height, width); without it, M is 0."""
    run = model.run
    chunk = model.config.chunk
    height, width = run["height"], run["width"]
    if args.given is None:
        return torch.zeros(1, 0, chunk * model.config.channels, height, width)

    if wan:
        clip = read_clip(args.given, (8 * height, 8 * width), 16, 1, args.given_frames)
    else:
        size = (height, width)
        clip = read_clip(args.given, size, run["fps"], run["stride"], args.given_frames)
    if args.given_frames and len(clip) < args.given_frames:
        print(f"--given-frames {args.given_frames}: {args.given} has {len(clip)}, so all are given")

    clip = clip[None]  # (1, T, 3, height, width)
    read = clip.shape[1]
    if wan:  # 4 n - 3 frames make n latents
        clip = wan.encode(clip[:, : round_up(read, 4) - 3]).cpu()

    T = clip.shape[1]
    if not chunk <= T < args.frames:
        raise ValueError(
            f"--given {args.given} makes {T} frames; wanted {chunk} or more, and fewer than "
            f"--frames {args.frames}; --given-frames takes some of them"
        )
    whole = T // chunk * chunk
    used = 4 * whole - 3 if wan else whole
    if used < read:
        print(f"the first {used} of {read} frames of {args.given} are used: whole chunks")
    return fold(clip[:, :whole], chunk)


def continue_video(model, video, c, frames, given=2, **settings):
    """Continue the first `given` frames of the model, that is chunks, of a video.

    video (B, T, C, height, width), c (B, L, text_dim). settings: `generate`'s, such as steps and
    window. Returns `frames` single frames (B, frames, C, height, width), given ones included, on
    the CPU.
    """
    chunk = model.config.chunk
    x = fold(video, chunk)[:, :given]
    length = frames // chunk
    new = length - given
    made = generate(model, [(0, c)], x, length, **settings)
    made = tqdm(made, "rollout", new, leave=False, disable=new < 20)
    return unfold(torch.cat([x, *made], dim=1), chunk).cpu()


def main(argv):
    """Generate videos, evaluate runs or print tables. Raises ValueError for flags that fail."""
    args = parse(argv)
    check_flags(args)
    if args.table:
        print_tables(args)
        return

    runs = args.compare or [args.checkpoint or default_checkpoint()]
    models = [load_run(run).to(args.device) for run in runs]
    filled = [fill_unset(args, run, model) for run, model in zip(runs, models)]
    for own, model in zip(filled, models):
        check(own, model)
        if args.compile:
            model.compile_blocks()

    if args.eval or args.compare:
        evaluate_runs(filled, models)
    else:
        write_videos(filled[0], models[0])


# ---- machinery: flags and their checks, metrics, tables, file names, pictures, speed ----


RUN_FLAGS = {  # those of a run that sampling reads, and their types
    "data": str,
    "frames": int,
    "height": int,
    "width": int,
    "stride": int,
    "rate": (int, float),
    "fps": (int, float),
}
SPRITE_FLAGS = {"size": int, "objects": int, "wall": bool, "withheld": (int, float)}
WORLD_FLAGS = ("data", "size", "objects", "wall")
POSITIVE_FLAGS = ("frames", "height", "width", "stride", "rate", "size", "objects")

BOX = Path(__file__).parent / "results" / "resample.pt"
LARGEST = 10**12
MAX_RATE = 1000  # frames per second
MAX_VIDEOS = 256  # files that are written at once: each holds an encoder
TABLE_FLAGS = ("table", "true_history", "from_nothing", "parts")
EVAL_BATCH = 16  # videos of --eval that are continued at once
GIVEN = 2  # true frames of the model that --eval continues


def bounded_int(low, high=LARGEST):
    """Make an argparse type: a whole number from low to high."""

    def read(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            wanted = f"wanted a whole number from {low} to {high}"
            raise argparse.ArgumentTypeError(f"got {text}, {wanted}")
        return value

    return read


def bounded_float(low, high=LARGEST, open_low=False):
    """Make an argparse type: a number from low to high; with open_low, low itself is refused."""

    def read(text):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (open_low and value == low):
            start = f"above {low:g} and at most" if open_low else f"from {low:g} to"
            raise argparse.ArgumentTypeError(f"got {text}, wanted a number {start} {high:g}")
        return value

    return read


positive_int = bounded_int(1)
nonnegative_int = bounded_int(0)
positive_float = bounded_float(0, open_low=True)
nonnegative_float = bounded_float(0)
fraction = bounded_float(0, 1)
seed_int = bounded_int(0, 2**63 - 1)


def list_devices():
    """Name the devices that torch offers here, the preferred one last."""
    names = ["cpu"]
    if torch.backends.mps.is_available():
        names.append("mps")
    names += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.cuda.is_available():
        names.append("cuda")
    return names


DEVICES = list_devices()


def default_device():
    """Name the device that is used without --device: cuda before mps before cpu."""
    return DEVICES[-1]


class RunFailed(ValueError):
    """A run under way failed, for instance on a full disk; its input was not refused."""


def stop(message, status, refused=True):
    """Print one line on stderr and exit.

    Under torchrun only rank 0 prints, and the status of refused input is 0: torchrun answers any
    other status with a traceback of its own. A run that failed keeps its status all the same.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    if refused and "RANK" in os.environ:
        status = 0
    sys.exit(status)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, see `stop`."""

    def error(self, message):
        stop(one_line(message), 2)


def new_parser(doc, usage="%(prog)s [flags]"):
    """Make a parser whose -h opens with `doc` as it is, and whose errors are one line."""
    return OneLineParser(
        usage=usage, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_main(main, argv):
    """Run main(argv); a refused input or Ctrl-C ends in one line without a traceback, see `stop`.

    The exit status is 2 after ValueError and OSError, and 130 after Ctrl-C. Under torchrun it is 0
    in every process, except after `RunFailed`.
    """
    try:
        return main(argv)
    except RunFailed as error:
        stop(one_line(error), 2, refused=False)
    except torch.OutOfMemoryError as error:
        wanted = one_line(error).split(". GPU")[0]
        advice = "a smaller batch, fewer frames, --accumulate, --recompute or --fsdp"
        stop(f"{wanted}; what would help: {advice}", 2, refused=False)
    except (ValueError, OSError) as error:
        stop(one_line(error), 2)
    except KeyboardInterrupt:
        stop("interrupted", 130)


def path_type(text):
    """An argparse type: a path; an empty one is refused."""
    if not text:
        raise argparse.ArgumentTypeError("got an empty name, wanted a file or a folder")
    return Path(text)


# fmt: off
def parse(argv):
    """Parse the command line. Flags that depend on the run stay None, see `fill_unset`."""
    parser = new_parser(__doc__, "%(prog)s [PROMPT ...] [flags]")
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT",
        help="text to show; without one, generate unconditionally")
    add("--checkpoint", type=path_type,
        help="a run's folder, or its ckpt.pt (default: the latest under runs/; if there is none, "
        "results/resample.pt)")
    add("--out", type=path_type,
        help="a folder, or one .mp4 or .gif file (default: samples/ in the run's folder)")
    add("--overwrite", action="store_true",
        help="let --out FILE replace a video made with other settings")
    add("--frames", type=positive_int,
        help="length, given frames included (default: twice the training clips)")
    add("--steps", type=bounded_int(1, 10_000),
        help="Euler steps per frame, Eq. (2) (default: 4 for pixels, 32 for latents)")
    add("--first-steps", type=bounded_int(1, 10_000),
        help="Euler steps of the first frame of a video from nothing, the hardest: it has no "
        "history (default: 16 for pixels, or --steps if that is more; --steps for latents)")
    add("--time-shift", type=positive_float,
        help="s of Eq. (7) for these steps: above 1, more of them at high noise "
        "(default: 10 for pixels, 5 for latents)")
    add("--guidance", type=nonnegative_float,
        help="classifier-free guidance: above 1, follow the prompt more closely; 1: off "
        "(default: 1.5 for pixels, 5 for latents)")
    add("--given", type=path_type,
        help="a video, or a picture, to continue")
    add("--given-frames", type=positive_int,
        help="take at most this many of its frames (default: all)")
    add("--wan", type=path_type,
        help="for a model of latents: a diffusers folder with Wan's VAE and text encoder")
    add("--negative", default=Wan.NEGATIVE,
        help="with --wan: negative prompt of the guidance (default: Wan's own)")
    add("--then", nargs=2, action="append", default=[], metavar=("FRAME", "PROMPT"),
        help="switch to PROMPT at FRAME; may be repeated")
    add("--window", type=nonnegative_int,
        help="attend to at most this many past frames, so that time and memory per frame stay "
        "flat (default: as in training; 0: all)")
    add("--sink", type=nonnegative_int, default=0,
        help="of the window's frames, keep this many from the start of the video "
        "(default: %(default)s)")
    add("--samples", type=positive_int, default=1,
        help="videos per prompt (default: %(default)s)")
    add("--seed", type=seed_int, default=0,
        help="seed of the noise (default: %(default)s)")
    add("--device", choices=DEVICES, default=default_device(),
        help="where to run (default: %(default)s)")
    add("--compile", action="store_true",
        help="torch.compile each block: faster after a minute of compiling")
    add("--eval", action="store_true",
        help="continue held-out sprites and print their metrics, by thirds of the video")
    add("--videos", type=positive_int, default=64,
        help="number of held-out videos for --eval (default: %(default)s)")
    add("--true-history", action="store_true",
        help="with --eval or --table: predict each frame from the true past, so that errors do "
        "not compound")
    add("--from-nothing", action="store_true",
        help="with --eval or --table: generate from the captions alone; no true frame is given")
    add("--compare", type=path_type, nargs="+", default=[], metavar="RUN",
        help="--eval of several runs on the same clips, with one picture of all")
    add("--parts", type=bounded_int(1, 1000), default=3,
        help="with --eval, --compare or --table: cut the videos into this many parts, one row each "
        "(default: %(default)s)")
    add("--table", type=path_type, nargs="+", default=[], metavar="RUN",
        help="print what --eval saved; NAME-0, NAME-1 ... are seeds of NAME")
    add("--routing", action="store_true",
        help="draw how often each history frame is picked, Fig. 8 (needs a model trained with "
        "--top-k)")
    return parser.parse_args(argv)
# fmt: on


def check_flags(args):
    """Validate the flags against one another. Raises ValueError."""
    measured = args.eval or args.compare
    if measured and (args.prompts or args.given or args.then or args.routing):
        raise ValueError(
            "--eval and --compare continue held-out clips by caption; "
            "leave out prompts, --given, --then and --routing"
        )
    refuse_ignored(args)
    for flag in ("true_history", "from_nothing"):
        if vars(args)[flag] and not (measured or args.table):
            name = "--" + flag.replace("_", "-")
            raise ValueError(f"{name} works with --eval, --compare or --table; add one of them")
    if args.true_history and args.from_nothing:
        raise ValueError("--from-nothing has no --true-history; leave out one of them")
    if args.given_frames and not args.given:
        raise ValueError(f"--given-frames {args.given_frames} needs --given and a video")
    count = max(1, len(args.prompts)) * args.samples
    if count > MAX_VIDEOS:
        raise ValueError(
            f"--samples {args.samples}: {count} videos in all, but at most {MAX_VIDEOS} are "
            "written at once; several calls with another --seed each would work"
        )


def refuse_ignored(args):
    """Refuse flags that would have no effect. Raises ValueError."""
    defaults = vars(parse([]))
    changed = [name for name, value in vars(args).items() if value != defaults[name]]
    if args.table:
        others = [name for name in changed if name not in TABLE_FLAGS]
        if others:
            raise ValueError(f"--table prints what --eval saved; leave out {', '.join(others)}")
    measured = args.eval or args.compare
    if "samples" in changed and measured:
        raise ValueError("--eval and --compare make one video of each clip; leave out --samples")
    if "first_steps" in changed and (args.given or (measured and not args.from_nothing)):
        raise ValueError(
            "--first-steps is of a video from nothing, and here frames are given; leave it out"
        )
    if "videos" in changed and not measured:
        raise ValueError(f"--videos {args.videos} works with --eval or --compare; add one of them")
    if "parts" in changed and not (measured or args.table):
        raise ValueError(
            f"--parts {args.parts} works with --eval, --compare or --table; add one of them"
        )
    if "negative" in changed and not args.wan:
        raise ValueError("--negative works with --wan; add --wan PATH")
    if args.overwrite and not (args.out and names_a_file(args.out)):
        raise ValueError("--overwrite works with --out FILE, a .mp4 or .gif file; add one")


def load_run(path):
    """Load a run's model and validate the flags that train.py saved with it. Raises ValueError."""
    model = load_checkpoint(path)
    run = model.run
    wanted = RUN_FLAGS | (SPRITE_FLAGS if run.get("data") == "sprites" else {})
    for flag, kind in wanted.items():
        value = run.get(flag)
        valid = isinstance(value, kind) and (flag not in POSITIVE_FLAGS or value > 0)
        if flag in ("rate", "fps"):
            valid = valid and math.isfinite(value) and value <= MAX_RATE
        if not valid:
            shown = textwrap.shorten(repr(value), 60)
            raise ValueError(f"{path} was not saved by train.py: its flag {flag} is {shown}")
    if not valid_words(run.get("words")):
        shown = textwrap.shorten(repr(run.get("words")), 60)
        raise ValueError(f"{path} was not saved by train.py: its vocabulary is {shown}")
    return model


def valid_words(words):
    """Whether a run's vocabulary is None, or [a list of words, a number of rows]."""
    if words is None:
        return True
    if not isinstance(words, (list, tuple)) or len(words) != 2:
        return False
    vocabulary, rows = words
    return (
        isinstance(vocabulary, list)
        and all(isinstance(word, str) for word in vocabulary)
        and isinstance(rows, int)
    )


def fill_unset(args, run, model):
    """Return a copy of the flags in which those left unset have the defaults of this run."""
    args = copy.copy(args)
    args.checkpoint = run
    of_pixels = model.run["words"] is not None
    trained = model.run["frames"]
    if args.frames is None:
        args.frames = 2 * trained
    if args.steps is None:
        args.steps = 4 if of_pixels else 32
    if args.first_steps is None:
        args.first_steps = max(16, args.steps) if of_pixels else args.steps
    if args.time_shift is None:
        args.time_shift = 10.0 if of_pixels else 5.0
    if args.guidance is None:
        args.guidance = 1.5 if of_pixels else 5.0
    if args.window is None:
        args.window = rollout_window(model.config, trained) or 0
    return args


def check(args, model):
    """Validate the flags, filled by `fill_unset`, against the model. Raises ValueError."""
    chunk = model.config.chunk
    measured = args.eval or args.compare
    of_pixels = model.run["words"] is not None
    if args.frames % chunk:
        raise ValueError(
            f"--frames {args.frames} is not divisible by {chunk}, the chunk; "
            f"{round_up(args.frames, chunk)} would work"
        )
    if measured and not args.from_nothing and args.frames < (GIVEN + 1) * chunk:
        raise ValueError(
            f"--frames {args.frames}: the first two frames of {chunk} are given; "
            f"{(GIVEN + 1) * chunk} or more would work"
        )
    if measured:
        check_parts(args.parts, args.frames)
    check_sink(args, model)
    check_detail_frames(args, model.config.detail_frames)
    if args.routing and not model.config.top_k:
        raise ValueError("--routing needs a model that routes: train one with --top-k 5")
    if not of_pixels and not args.wan and not measured:
        raise ValueError(
            "this model makes latents; pass --wan PATH, a folder with the VAE and text encoder"
        )
    if of_pixels and args.wan:
        raise ValueError("--wan: this model makes pixels itself, and needs no VAE")
    check_switches(args, chunk)
    check_memory(args, model)


def check_parts(parts, frames):
    """Raise ValueError if a table would have parts without a frame."""
    if parts > frames:
        raise ValueError(f"--parts {parts}: wanted at most one for each of {frames} frames")


def check_sink(args, model):
    """Refuse a sink that would not be seen or fills the window. Raises ValueError."""
    sink, window, trained = args.sink, args.window, model.config.window
    if not sink:
        return
    if args.true_history:
        raise ValueError(f"--sink {sink} has no effect with --true-history; leave out one of them")
    if not window:
        raise ValueError(f"--sink {sink} has no effect without a window; add --window {sink + 1}")
    if sink >= window:
        raise ValueError(
            f"--sink {sink} leaves no room in --window {window}; "
            f"--sink {window - 1} or less would work"
        )
    if trained and window > trained:
        raise ValueError(
            f"--sink {sink}: trained with --window {trained}, this model does not see the start of "
            f"--window {window}; --window {trained} or less would work"
        )


def check_detail_frames(args, seen):
    """Refuse a window that does not hold what the convolutions see. Raises ValueError."""
    if not args.window:
        return
    if args.window < seen:
        raise ValueError(
            f"--window {args.window}: the convolutions of this model see the last {seen} frames; "
            f"--window {args.sink + seen} or more would work"
        )
    if args.window - args.sink < seen:
        raise ValueError(
            f"--sink {args.sink} leaves {args.window - args.sink} recent frames in --window "
            f"{args.window}, and the convolutions of this model see {seen}; "
            f"--sink {args.window - seen} would work"
        )


def check_switches(args, chunk):
    """Validate the frames of --then. Raises ValueError."""
    seen = set()
    for at, _ in args.then:
        frame = int(at) if re.fullmatch(r"[0-9]{1,12}", at) else 0
        if frame % chunk or not chunk <= frame < args.frames:
            raise ValueError(
                f"--then {at[:20]}: wanted the number of a frame, from {chunk} up, below --frames "
                f"{args.frames} and divisible by {chunk}"
            )
        if frame in seen:
            raise ValueError(f"--then {frame} is given twice; wanted one prompt for each frame")
        seen.add(frame)


def check_memory(args, model):
    """Refuse what the device's memory cannot hold, before allocating it. Raises ValueError."""
    measured = args.eval or args.compare
    videos = args.videos if measured else max(1, len(args.prompts)) * args.samples
    needed, limit = memory_needed(args, model, videos), memory_of(args.device)
    if needed > limit:
        flag = f"--videos {videos}" if measured else f"{videos} at once"
        raise ValueError(
            f"--frames {args.frames}, {flag}: the videos and the cache alone need "
            f"{needed / 2**30:,.1f} GiB, and the limit is this machine's {limit / 2**30:,.1f} GiB; "
            "fewer frames, fewer videos or a smaller --window would work"
        )


def memory_needed(args, model, videos):
    """Estimate the bytes of a rollout: noise, finished frames, and what the cache holds."""
    config = model.config
    height, width = model.run["height"], model.run["width"]
    frames = 4 * args.frames * config.channels * height * width  # float32, of one video
    tokens = config.chunk * height * width // config.patch**2  # of one frame of the model

    length = args.frames // config.chunk
    slots = min(args.window or length, length)
    branches = 1 if args.guidance == 1 else 2
    batch = min(videos, EVAL_BATCH) if args.eval or args.compare else videos
    cache = 2 * 4 * config.layers * config.dim * tokens * slots * branches * batch
    if config.detail_frames:
        cache += 4 * config.chunk * config.channels * height * width * slots * branches * batch
    kept = 3 * videos * frames  # noise, finished frames and thumbnails; or truth and rollouts
    return kept + cache


def memory_of(device):
    """Return the bytes of physical memory of a device, infinite where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def sampler_settings(args):
    """The keyword arguments of `generate` that the flags decide."""
    return {
        "steps": args.steps,
        "first_steps": args.first_steps,
        "time_shift": args.time_shift,
        "guidance": args.guidance,
        "window": args.window or None,
        "sink": args.sink,
        "seed": args.seed,
    }


def autocast(model, device):
    """bf16 autocast if the run was trained with --precision bf16, else a context without effect."""
    enabled = model.run.get("precision") == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def latest_run():
    """Return the folder of the checkpoint under runs/ that was written last. Raises ValueError."""
    found = sorted(Path("runs").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(
            "there is no checkpoint under runs/; train one, or name a run: "
            "train.py --out, sample.py --checkpoint"
        )
    return found[-1].parent


def default_checkpoint():
    """Return the latest run, or the weights that come with the repository if there is none."""
    try:
        return latest_run()
    except ValueError:
        if not BOX.is_file():
            raise
        print(f"there is no run under runs/; using {BOX.name}, which comes with the repository")
        return BOX


def run_folder(path):
    """Return the folder of a run, named by this folder or by its ckpt.pt.

    A checkpoint of another name, as results/NAME.pt, has none; its files go to runs/NAME.
    """
    if not path.is_file():
        return path
    return path.parent if path.name == "ckpt.pt" else Path("runs", path.stem)


def samples_folder(run):
    """Return the samples/ of a run, see `run_folder`."""
    return run_folder(run) / "samples"


def rollout_window(config, frames):
    """The default window of rollouts of a network trained on clips of `frames` single frames.

    That of training, so that no relative position is new to the network. None for clips of one
    frame of the model.
    """
    longest = frames // config.chunk - 1
    if config.window:  # a frame's keys are computed one pass later, with `window` frames in sight
        longest = min(longest, config.window + 1)
    return longest or None


def evaluate(
    model,
    frames,
    videos,
    steps,
    time_shift,
    guidance,
    window,
    sink=0,
    seed=0,
    true_history=False,
    given=GIVEN,
    first_steps=None,
):
    """Continue held-out sprites from `given` true frames of the model, and measure the result.

    frames: length of each video, the given ones included, in single frames. true_history: predict
    each frame from the true past; otherwise from the model's own. given: 0 generates from the
    captions alone, the first frame in `first_steps` Euler steps. Returns (truth, made), both
    (videos, frames, 3, size, size) on the CPU, and `data.measure`'s scores (videos, frames, 3).
    Raises ValueError for a model that was not trained on sprites, or whose frames are not finite.
    """
    settings = {"steps": steps, "time_shift": time_shift, "guidance": guidance}
    settings |= {"window": window, "sink": sink, "true_history": true_history}
    settings |= {"first_steps": first_steps}

    def roll_out(truth, c, seed):
        return continue_truth(model, truth, c, given, seed=seed, **settings)

    return measure_sampler(model, frames, videos, roll_out, seed)


def measure_sampler(model, frames, videos, roll_out, seed=0):
    """`evaluate` for any sampler: made = roll_out(truth, c, seed), on the device of the model.

    truth, made: (B, frames, 3, size, size). made may be on another device.
    """
    run = model.run
    if run["data"] != "sprites":
        raise ValueError(
            f"--eval needs a model trained on sprites; this one was trained on {run['data']}"
        )
    test = Sprites(run["size"], frames, 0, "test", run["objects"], run["wall"], run["withheld"])
    device = next(model.parameters()).device

    truths, rollouts = [], []
    for i in tqdm(range(0, videos, EVAL_BATCH), "batches", dynamic_ncols=True):
        clips = [test[j] for j in range(i, min(i + EVAL_BATCH, videos))]
        truth, c = default_collate(clips)
        made = roll_out(truth.to(device), c.to(device), seed + i).cpu()
        if not made.isfinite().all():
            raise ValueError("the model's frames are not finite; its weights may be nan")
        truths.append(truth)
        rollouts.append(made)

    truth, made = torch.cat(truths), torch.cat(rollouts)
    scores = measure(made, [test.caption(j) for j in range(videos)], run["wall"])
    return truth, made, scores


def continue_truth(model, truth, c, given, window, seed, true_history, **settings):
    """Continue clips (B, T, C, height, width) from `given` frames of the model to their own length.

    With true_history, each frame is the first one of a rollout on the true frames before it.
    """
    chunk = model.config.chunk
    length = truth.shape[1] // chunk
    spans = [(given, length)]  # the frames of each rollout
    if true_history:
        spans = [(n, n + 1) for n in range(given, length)]

    parts = [truth[:, : given * chunk].cpu()]
    for start, end in spans:
        known = min(start, window or start)  # true frames that the window keeps
        past = truth[:, (start - known) * chunk :]
        total = (known + end - start) * chunk
        options = settings | {"window": window, "seed": seed + start}  # noise differs by frame
        made = continue_video(model, past, c, total, known, **options)
        parts.append(made[:, known * chunk :])
    return torch.cat(parts, dim=1)


def evaluate_runs(filled, models):
    """--eval and --compare: print each run's metrics, and draw the first clips of all.

    filled: the flags of each run, from `fill_unset`.
    """
    check_same_world(models)
    settings = comparison_settings(filled)
    rows = {}
    with reserve_files(filled[-1], comparison_paths(filled[-1]), settings) as (gif, png):
        for args, model, name in zip(filled, models, row_names(filled)):
            options = sampler_settings(args) | {"true_history": args.true_history}
            options["given"] = given = 0 if args.from_nothing else GIVEN
            with autocast(model, args.device):
                truth, made, scores = evaluate(model, args.frames, args.videos, **options)
            rows["truth"] = truth[:4]
            rows[name] = made[:4]
            print_metrics(args, given * model.config.chunk, scores)
            try:
                path = scores_file(args.checkpoint, args)
                save_scores(path, vars(args), scores)
            except ValueError as error:  # the other runs are still evaluated
                print(f"warning: {error}")

        write_comparison(gif, rows, models[-1].run["rate"])
        record_settings([gif, png], settings)
    print(f"pictures of the first {len(rows['truth'])} videos: {gif} and {png}")


def check_same_world(models):
    """Refuse to compare models of different sprites. Raises ValueError."""
    worlds = {str([model.run.get(flag) for flag in WORLD_FLAGS]) for model in models}
    if len(worlds) > 1:
        raise ValueError(
            "--compare: these runs were trained on different sprites; "
            "wanted one --data, --size, --objects and --wall"
        )


def comparison_settings(filled):
    """Settings that determine the output of --eval and --compare, as JSON values."""
    args = filled[0]
    settings = {
        "runs": [file_identity(checkpoint_file(own.checkpoint)) for own in filled],
        "samplers": [sampler_settings(own) for own in filled],
        "frames": [own.frames for own in filled],
        "videos": args.videos,
        "true_history": args.true_history,
        "from_nothing": args.from_nothing,
        "device": torch.device(args.device).type,
    }
    return json.loads(json.dumps(settings))


def print_metrics(args, given, scores):
    """Print what was measured, and the table of its scores (B, T, 3)."""
    print(
        f"{args.checkpoint}:\n{len(scores)} held-out videos, {args.frames} frames, the first "
        f"{given} given, window {args.window or 'none'}, {args.steps} steps"
        + (", on true history" if args.true_history else "")
    )
    print(metrics_table(scores, args.parts))


def row_names(filled):
    """Name each run of a comparison by its folder, by the whole path where two have one name."""
    folders = [run_folder(args.checkpoint) for args in filled]
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def metrics_table(scores, parts=3):
    """Format `data.measure`'s scores (B, T, 3) as a table, by thirds of the video as in Table 1.

    The mean over the frames of a part of the mean over videos ± standard error over the videos, "-"
    for a single one. parts: how many equal parts the video is cut into. Raises ValueError if there
    are more parts than frames.
    """
    T = scores.shape[1]
    check_parts(parts, T)
    columns = {"Temporal": 1, "Visual": 0, "Text": 2}
    lines = [f"{'frames':>12}" + "".join(f"{name:>16}" for name in columns)]
    edges = [round(i * T / parts) for i in range(parts + 1)]
    for start, end in [*pairwise(edges), (0, T)]:
        part = scores[:, start:end]
        mean = part.nanmean(dim=0).nanmean(dim=0)
        error = standard_error(part.nanmean(dim=1))
        line = f"{f'{start}-{end - 1}':>12}"
        for i in columns.values():
            spread = "-" if error[i].isnan() else f"{error[i]:.2f}"
            line += f"{mean[i]:8.2f} ± {spread:>5}"
        lines.append(line)
    return "\n".join(lines)


def standard_error(z):
    """Standard error over the rows of z (n, ...), nan left out; nan for a single row."""
    n = (~z.isnan()).sum(0).clamp(min=1)
    return ((z - z.nanmean(0)).square().nansum(0) / (n - 1) / n).sqrt()


def scores_file(run, args):
    """The file in which --eval saves a run's scores for --table: one for each kind of history."""
    if args.true_history:
        name = "true-history.json"
    else:
        name = "from-nothing.json" if args.from_nothing else "eval.json"
    return samples_folder(run) / name


def save_scores(path, settings, scores):
    """Save the mean over videos of scores (B, T, 3), and the settings that made them, as JSON."""
    write_json(path, {"args": settings, "frames": scores.nanmean(0).tolist()})


def write_json(path, content):
    """Write a file as a whole or not at all; what JSON does not know becomes a string.

    Raises ValueError if it cannot be written.
    """
    text = json.dumps(content, default=str, ensure_ascii=False)
    with replacing(path) as part:
        part.write_text(text, "utf-8")


def print_tables(args):
    """--table: print what --eval saved, mean ± standard error over the seeds of a name."""
    groups = {}
    for run in args.table:
        folder = run_folder(run)
        name = re.sub(r"-\d+$", "", str(folder))
        groups.setdefault(name, []).append(read_scores(run, args))

    for name, seeds in groups.items():
        lengths = [len(frames) for frames in seeds]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the seeds of {Path(name).name} have {', '.join(map(str, lengths))} frames; "
                "wanted the same"
            )
        plural = "s" if len(seeds) > 1 else ""
        print(f"{Path(name).name}, {len(seeds)} seed{plural}")
        print(metrics_table(torch.stack(seeds), args.parts))


def read_scores(run, args):
    """Read the scores that --eval saved for a run: (T, 3). Raises ValueError."""
    path = scores_file(run, args)
    if not path.is_file():
        mode = "" if path.stem == "eval" else f" --{path.stem}"
        raise ValueError(f"no {path}; python sample.py --eval{mode} --checkpoint {run} writes it")
    try:
        scores = torch.tensor(json.loads(path.read_text("utf-8"))["frames"], dtype=torch.float32)
        if scores.dim() != 2 or scores.shape[1] != 3:
            raise ValueError(f"scores of shape {tuple(scores.shape)}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = textwrap.shorten(repr(error), 200)
        raise ValueError(
            f"{path} is not a score file ({reason}); sample.py --eval rewrites it"
        ) from None
    return scores


def read_clip(path, size, fps, stride, frames):
    """Like `data.read_video`; a still picture is a clip of one frame, cropped to the centre."""
    height, width = size
    try:
        with Image.open(path) as picture:
            if not getattr(picture, "is_animated", False):
                pixels = ImageOps.fit(picture.convert("RGB"), (width, height))
                return to_float(np.array(pixels)[None])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # no picture, or bad
        pass
    return read_video(path, size, fps, stride, frames)


def video_paths(args, prompts):
    """Name a file for each prompt, and one for the contact sheet of all."""
    out = args.out or samples_folder(args.checkpoint)
    if names_a_file(out):
        files = [out]
        if len(prompts) > 1:
            files = [out.with_stem(f"{out.stem}-{i}") for i in range(len(prompts))]
        paths = [*files, out.with_suffix(".png")]
    else:
        stems = ["-".join(split_words(prompt))[:60] or "video" for prompt in prompts]
        files = [out / f"{stem}-{args.seed}-{i}.mp4" for i, stem in enumerate(stems)]
        paths = [*files, files[0].with_suffix(".png") if len(files) == 1 else out / "sheet.png"]

    if args.given and args.given.resolve() in [path.resolve() for path in paths]:
        raise ValueError(f"--out {out} would overwrite --given; wanted another name")
    return paths


def comparison_paths(args):
    """Name the moving picture of a comparison and the still one."""
    out = args.out or samples_folder(args.checkpoint)
    path = out if names_a_file(out) else out / "eval.gif"
    return [path.with_suffix(".gif"), path.with_suffix(".png")]


def names_a_file(out):
    """Whether --out names a video file, not a folder. Raises ValueError for other files."""
    if out.is_dir():
        return False
    ending = out.suffix.lower()
    if ending in (".mp4", ".gif"):
        return True
    if out.is_file() or re.fullmatch(r"\.[a-z]+\d?", ending):
        raise ValueError(f"--out {out}: wanted a folder, or a file that ends in .mp4 or .gif")
    return False


def video_settings(args):
    """Settings that determine the output of a call, as JSON values."""
    settings = sampler_settings(args) | {
        "prompts": args.prompts,
        "then": args.then,
        "samples": args.samples,
        "frames": args.frames,
        "checkpoint": file_identity(checkpoint_file(args.checkpoint)),
        "given": args.given and file_identity(args.given),
        "given_frames": args.given_frames,
        "wan": args.wan and str(args.wan.resolve()),
        "negative": args.negative if args.wan else None,
        "device": torch.device(args.device).type,
    }
    return json.loads(json.dumps(settings))


def checkpoint_file(run):
    """Return the ckpt.pt of a run, named by its folder or by this file."""
    return run / "ckpt.pt" if run.is_dir() else run


def file_identity(path):
    """Tell one version of a file from another: [absolute path, time of the last change in ns]."""
    return [str(path.resolve()), path.stat().st_mtime_ns]


@contextmanager
def reserve_files(args, paths, settings):
    """Choose names in one folder with `choose_files`, and hold them until the context ends.

    An empty file holds a name, so that another process takes the next one. Those that are still
    empty at the end are removed. Raises ValueError if a file cannot be written.
    """
    folder = paths[0].parent
    new = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder):
            chosen = choose_files(args, paths, settings)
            for path in chosen:
                if not path.exists():
                    path.touch()
                    new.append(path)
    except OSError as error:
        raise ValueError(f"cannot write in {folder}: {error.strerror}") from None

    try:
        record_settings(new, settings)
        yield chosen
    finally:
        for path in new:
            if path.exists() and path.stat().st_size == 0:
                path.unlink()


@contextmanager
def lock_folder(folder):
    """Let one process at a time choose names and change settings.json in a folder."""
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def choose_files(args, paths, settings):
    """Return the paths, changed where a file exists and was made with other settings.

    In a folder the new file's name gets a number, as in red-circle-0-0-2.mp4. A name that the user
    gave with --out is kept: it raises ValueError, unless --overwrite is given.
    """
    chosen = []
    for path in paths:
        if args.out and names_a_file(args.out):
            if not (args.overwrite or is_free(path, settings)):
                raise ValueError(
                    f"--out {args.out}: {path} exists and was made with other settings; "
                    "another name, or --overwrite, would work"
                )
        else:
            path = numbered(path, settings, chosen)
        chosen.append(path)
    return chosen


def numbered(path, settings, taken):
    """Return the path, or the first of NAME-2, NAME-3 ... that is free and not taken."""
    candidate, number = path, 1
    while candidate in taken or not is_free(candidate, settings):
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def is_free(path, settings):
    """Whether there is no such file, or only one that the same settings made."""
    return not path.exists() or read_settings(path.parent).get(path.name) == settings


def read_settings(folder):
    """Read settings.json of a folder: {file name: the settings that made it}."""
    try:
        recorded = json.loads((folder / "settings.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):  # every file then counts as another's
        return {}
    return recorded if isinstance(recorded, dict) else {}


def record_settings(paths, settings):
    """Add the settings that made some files of one folder to its settings.json."""
    if not paths:
        return
    folder = paths[0].parent
    with lock_folder(folder):
        recorded = read_settings(folder)
        for path in paths:
            recorded[path.name] = settings
        write_json(folder / "settings.json", recorded)


def write_comparison(path, videos, fps, clips=(), columns=16, height=64):
    """Write path.gif with a frame counter, and path.png with time from left to right.

    A row for each name. videos: {name: (B, T, C, height, width)} in [-1, 1]; shorter ones are
    padded with white. clips: names of the B clips, for the .png; columns and height: of the frames
    that it shows.
    """
    longest = max(video.shape[1] for video in videos.values())
    rows = torch.stack([pad_time(video, longest) for video in videos.values()])  # (rows, B, T, ...)
    channels = rows.shape[3]
    if channels != 3:  # latents are not RGB: show three of their channels
        rows = rows[:, :, :, [i % channels for i in range(3)]] / 3

    page = rearrange(F.pad(rows, (1, 1, 1, 1), value=1.0), "r b t c h w -> t c (r h) (b w)")
    frames = enlarge(to_bytes(page), 72 * len(rows))  # (T, height, width, 3)
    if rows.shape[-1] <= 32:  # sprites are flat: their noise would be most of the file
        frames = reduce_colours(frames, 32)
    names = [draw_text(name, frames.shape[1] // len(rows)) for name in videos]
    names = np.concatenate(names)
    names = np.broadcast_to(names, (len(frames), *names.shape))
    page = np.concatenate([names, frames], axis=2)
    counter = np.stack([draw_text(f"frame {n}", 20, page.shape[2]) for n in range(len(page))])

    with writer(path.with_suffix(".gif"), fps) as out:
        out(np.concatenate([counter, page], axis=1))
    strips = rearrange(rows, "r b t c h w -> (b r) t c h w")
    labels = [*videos] * rows.shape[1]
    if clips:
        labels = [f"{clip}: {name}" for clip in clips for name in videos]
    write_picture(path.with_suffix(".png"), contact_sheet(strips, columns, labels, height))


def reduce_colours(pictures, count):
    """Draw pictures (T, height, width, 3) uint8 in `count` colours, which all of them share."""
    some = np.concatenate(pictures[:: max(1, len(pictures) // 16)])
    palette = Image.fromarray(some).quantize(count, Image.Quantize.FASTOCTREE)
    plain = Image.Dither.NONE
    images = [Image.fromarray(z).quantize(palette=palette, dither=plain) for z in pictures]
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


def pad_time(video, length):
    """Append white frames to videos (B, T, C, height, width) until T is `length`."""
    return F.pad(video, (0, 0, 0, 0, 0, 0, 0, length - video.shape[1]), value=1.0)


def contact_sheet(rows, columns, labels=(), height=64):
    """Draw videos below one another, time from left to right: (height, width, 3) uint8.

    rows: videos (T, 3, height, width) in [-1, 1], of which `columns` frames are drawn, `height`
    pixels high or a little more. labels: texts on their left; then the frames' numbers stand above,
    if all videos are of one length.
    """
    strips = []
    for video, label in zip_longest(rows, labels, fillvalue=""):
        chosen = torch.linspace(0, len(video) - 1, min(columns, len(video))).round().long()
        frames = enlarge(to_bytes(video[chosen]), height)
        frames = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        strip = rearrange(frames, "t h w c -> h (t w) c")
        if any(labels):
            if not strips and len({len(row) for row in rows}) == 1:
                numbers = [draw_text(str(n), 16, frames.shape[2]) for n in chosen.tolist()]
                strips.append(np.concatenate([draw_text("frame", 16), *numbers], axis=1))
            strip = np.concatenate([draw_text(label, len(strip)), strip], axis=1)
        strips.append(strip)
    return np.concatenate(strips)


def draw_text(text, height, width=96):
    """Draw black text on white, wrapped: (height, width, 3) uint8."""
    page = Image.new("RGB", (width, height), "white")
    lines = "\n".join(textwrap.wrap(text, width // 7))
    ImageDraw.Draw(page).multiline_text((4, height / 2), lines, "black", anchor="lm")
    return np.asarray(page)


@contextmanager
def record_routing(model, shares, videos):
    """Within it, every pass appends its layers' picks to `shares`, one list for each layer.

    An entry (columns,) is the share of the last frame's tokens, over heads and the first `videos`
    rows of the batch, that pick each column of Eq. (9). Rows after these are guidance's
    unconditional branch, which is not counted.
    """

    @torch.compiler.disable
    def hook(module, args, output):
        x, angles, past, own, cache = args
        columns = past.shape[1]
        q, _, _ = module.project(x, angles, len(past))
        descriptor = cache.descriptor[module.layer][:, :, :columns]
        picked, valid = routing.pick(q, None, past, module.top_k, descriptor)

        picked, valid = picked[:videos, :, -1], valid[:videos, :, -1]  # (B, H, P, top_k)
        counts = torch.bincount(picked[valid], minlength=columns)
        shares[module.layer].append(counts / picked[..., 0].numel())

    handles = [block.self_attn.register_forward_hook(hook) for block in model.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def show_routing(args, shares, length, settings):
    """Fig. 8: print and draw how often the last frame picks each history frame, by layer.

    shares: for each layer the entries of `record_routing` in the Euler steps of the last frame,
    over which the mean is taken. length: frames of the video.
    """
    rows, names = [], []
    for i, layer in enumerate(shares):
        steps = torch.stack(list(layer))  # (steps, columns), the last column the frame itself
        rows.append(steps.mean(0)[:-1].cpu())
        names.append(f"layer {i}")
    share = torch.stack([*rows, torch.stack(rows).mean(0)])  # (layers + 1, columns)
    names.append("mean")
    frames = history_frames(length, share.shape[1], args.sink)

    print("how often the last frame picks each history frame, by its number:")
    print(f"{'frame':>8} " + " ".join(f"{n:4}" for n in frames))
    for name, row in zip(names, share.tolist()):
        print(f"{name:>8} " + " ".join(f"{value:4.2f}" for value in row))

    out = args.out or samples_folder(args.checkpoint)
    folder = out.parent if names_a_file(out) else out
    unnamed = argparse.Namespace(out=None)  # its name gets a number, beside --out FILE too
    with reserve_files(unnamed, [folder / "routing.png"], settings) as [path]:
        write_picture(path, draw_routing(share.tolist(), names, frames))
    print(f"picture (last row: mean): {path}")


def history_frames(length, columns, sink):
    """Number the history frames in the cache of the last frame: the sink's, then the latest."""
    dropped = length - 1 - columns
    sink = min(sink, columns)
    return [*range(sink), *range(sink + dropped, columns + dropped)]


def draw_routing(share, names, frames):
    """Draw shares in [0, 1] as a table with labelled axes, black for 0 and yellow for 1: an image.

    share: a list of rows, one for each name; a row holds one value for each number in frames.
    """
    cell, line, left, top = 36, 24, 64, 44
    page = Image.new("RGB", (left + cell * len(frames) + 8, top + line * len(share) + 8), "white")
    draw = ImageDraw.Draw(page)
    draw.text((4, 4), "share of the last frame's tokens that pick a history frame", "black")
    draw.text((left - 6, top - 10), "frame", "black", anchor="rm")
    for column, number in enumerate(frames):
        draw.text((left + cell * (column + 0.5), top - 10), str(number), "black", anchor="mm")

    for row, (name, values) in enumerate(zip(names, share)):
        y = top + line * row
        draw.text((left - 6, y + line / 2), name, "black", anchor="rm")
        for column, value in enumerate(values):
            x = left + cell * column
            colour = (round(255 * value), round(217 * value), round(51 * value))
            draw.rectangle((x, y, x + cell - 2, y + line - 2), colour)
            ink = "black" if value > 0.65 else "white"
            draw.text((x + cell / 2 - 1, y + line / 2 - 1), f"{value:.2f}", ink, anchor="mm")
    return np.asarray(page)


def print_files(files, prompts, sheet):
    """Print the videos' files with their prompts, and the contact sheet's."""
    for path, prompt in zip(files, prompts):
        print(f"{path}: {prompt or 'no prompt'}")
    print(f"contact sheet: {sheet}")


def print_speed(args, what, count, sampling, decoding):
    """Print frames per second: `count` frames in all.

    sampling, decoding: seconds for each frame of the model, writing files not counted.
    """
    line = f"{count / sum(sampling):.1f} frames per second: {what} in {sum(sampling):.1f} s, "
    line += f"{args.steps} steps each"
    if not args.given and args.first_steps != args.steps:
        line += f" and {args.first_steps} the first"
    if args.guidance != 1:
        line += ", guidance counted"
    line += ", writing files not counted"
    if args.wan:
        both = sum(sampling) + sum(decoding)
        line += f"; {count / both:.1f} with the VAE's decoding"
    print(line)

    if len(sampling) >= 40:  # quarters, without the first frames, whose history still grows
        edges = np.linspace(20, len(sampling), 5).round().astype(int)
        parts = []
        for start, end in pairwise(edges):
            median = 1000 * np.median(sampling[start:end])
            parts.append(f"{median:.1f} ms ({start + 1} to {end})")
        print("median time of a frame: " + ", ".join(parts))

    if torch.device(args.device).type == "cuda":
        print(f"memory at its peak: {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
