"""Generate videos of any length with a trained model, frame after frame.

  python sample.py "red circle and blue square"           the latest run, or results/resample.pt
  python sample.py "red circle and blue square" --checkpoint runs/001
  python sample.py "red circle" --then 16 "white square" --frames 32
  python sample.py --given clip.mp4 --frames 100          continue a video or a picture
  python sample.py --eval --checkpoint runs/001 runs/002  measure on held-out sprites, and compare
  python sample.py --live                                 a page on which two models roll on

Frames are written as they are finished. Only a file that --out names is replaced.

B videos, T frames of a video, M given frames, C channels, L words. A frame of the model may be a
chunk of T frames folded into its channels.
"""

import io
import math
import os
import textwrap
import threading
import time
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, count, pairwise
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw  # comes with imageio
from torch.utils.data import default_collate
from tqdm import tqdm

from data import (
    DEVICES,
    WORLDS,
    Parser,
    Sprites,
    Wan,
    Words,
    enlarge,
    fold,
    measure,
    number,
    read_video,
    round_up,
    run_main,
    share_there,
    split_words,
    to_bytes,
    unfold,
    writer,
)
from model import load_checkpoint
from rf import Guided, rollout

FIRST_STEPS = 16  # Euler steps, at least, of a first frame that has no history to follow
GIVEN = 2  # true frames of the model that held-out clips continue


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
):
    """Continue the given frames to `frames` in all; yield each new one (B, 1, C, height, width).

    texts: [(first frame, c (B, L, text_dim))], in order of time. A new text begins a new rollout,
    whose history is every frame so far. given (B, M, C, height, width): with M = 0, the first frame
    is made alone, in FIRST_STEPS, and the others follow it. steps, time_shift: see `rf.rollout`;
    window, sink: see `model.cache`. null (1, L, text_dim): condition of guidance's unconditional
    branch (None: zeros); guidance is skipped where c is all zero, as its branches would be the
    same. Noise is drawn on the CPU: a seed draws the same on every device.
    """
    rng = torch.Generator().manual_seed(seed)
    ends = [start for start, _ in texts[1:]] + [frames]
    done = given

    for (_, c), end in zip(texts, ends):
        guided = model
        if guidance != 1 and c.any():
            guided = Guided(model, torch.zeros_like(c[:1]) if null is None else null, guidance)

        while done.shape[1] < end:
            there = done.shape[1]
            new, n = end - there, steps
            if there == 0:
                new, n = 1, max(steps, FIRST_STEPS)
            x = torch.randn(len(given), new, *given.shape[2:], generator=rng).to(given.device)
            t = torch.ones(len(given), device=given.device)
            cache = guided.cache(len(given), there + new, window=window, sink=sink)
            made = []
            for frame in rollout(guided, x, t, c, n, time_shift, done, cache):
                made.append(frame)
                yield frame
            done = torch.cat([done, *made], dim=1)


def main(argv):
    """Turn prompts into video files. Raises ValueError for flags that cannot work."""
    args = parse(argv)
    if args.eval:
        return compare(args)
    if args.live:
        return show_live(args)
    if len(args.checkpoint) > 1:
        raise ValueError("one --checkpoint makes a video; put prompts before --checkpoint")
    model = open_model(args, *args.checkpoint)
    settings, chunk = sampler(args, model), model.config.chunk
    wan = Wan(args.wan, args.device) if args.wan else None
    decode = wan.decoder() if wan else torch.Tensor.cpu
    null = wan.text([Wan.NEGATIVE]).to(args.device) if wan else None
    rate = 16 if wan else model.run["rate"]

    prompts = [prompt for prompt in args.prompts or [""] for _ in range(args.samples)]
    given = read_given(args, model, wan).expand(len(prompts), -1, -1, -1, -1).to(args.device)
    length = args.frames or given.shape[1] * chunk + 2 * model.run["frames"]
    check_length(args, length, given.shape[1], chunk)
    texts = read_texts(args, model, prompts, wan or Words(*model.run["words"]))
    paths = name_files(args, prompts)

    began, written = time.perf_counter(), 0
    with ExitStack() as stack, autocast(model.run["precision"], args.device):
        files = [stack.enter_context(writer(path, rate)) for path in paths]
        known = (given[:, [i]] for i in range(given.shape[1]))
        made = generate(model, texts, given, length // chunk, null=null, **settings)
        for frame in tqdm(chain(known, made), "frames", length // chunk):
            video = decode(unfold(frame, chunk))  # (B, T, 3, height, width), on the CPU
            for write, clip in zip(files, video):
                write(clip)
                written += len(clip)

    seconds = time.perf_counter() - began
    print(f"{written} frames in {seconds:.1f} s, {written / seconds:.1f} a second")
    for path, prompt in zip(paths, prompts):
        print(f"{path}: {prompt or 'no prompt'}")


def read_texts(args, model, prompts, encoder):
    """Embed the prompts and those of --then: [(first frame, c (B, L, text_dim))]."""
    switches = [(int(at), prompt) for at, prompt in args.then]
    chunk = model.config.chunk
    try:
        texts = [(0, encoder.text(prompts))]
        for at, prompt in sorted(switches):
            texts.append((at // chunk, encoder.text([prompt] * len(prompts))))
    except ValueError as error:
        words = set(split_words(" ".join([*prompts, *(prompt for _, prompt in switches)])))
        if words <= set(Sprites().words.vocabulary):
            raise ValueError(
                f"{error}; --checkpoint {os.path.relpath(BOX)} knows these words"
            ) from None
        raise
    return [(at, c.to(args.device)) for at, c in texts]


def read_given(args, model, wan):
    """Read the frames of --given (1, M, chunk * C, height, width); without it, M is 0."""
    run, chunk = model.run, model.config.chunk
    height, width = run["height"], run["width"]
    if args.given is None:
        return torch.zeros(1, 0, chunk * model.config.channels, height, width)

    size, fps = ((8 * height, 8 * width), 16) if wan else ((height, width), run["fps"])
    try:
        clip = read_video(args.given, size, fps, args.given_frames)[None]  # (1, T, 3, ...)
    except ValueError as error:
        raise ValueError(f"--given {args.given}: {error}") from None
    if wan:  # 4 n - 3 frames make n latents
        clip = wan.encode(clip[:, : round_up(clip.shape[1], 4) - 3]).cpu()

    whole = clip.shape[1] // chunk * chunk
    if whole == 0:
        raise ValueError(f"--given {args.given}: wanted at least {chunk} frames, a chunk")
    return fold(clip[:, :whole], chunk)


def compare(args):
    """--eval: print the metrics of each checkpoint, and draw the first clips of all."""
    rows = {}
    for path in args.checkpoint:
        model = open_model(args, path)
        args.frames = args.frames or 4 * model.run["frames"]
        check_length(args, args.frames, GIVEN, model.config.chunk)
        settings = sampler(args, model)
        with autocast(model.run["precision"], args.device):
            truth, made = continue_held_out(model, args.frames, args.samples, **settings)
        if not torch.equal(rows.setdefault("truth", truth[:4]), truth[:4]):
            raise ValueError(f"{path} was trained on other sprites than {args.checkpoint[0]}")
        name = HISTORY_NAMES[model.run["history"]]
        rows[str(path) if name in rows else name] = made[:4]

        sampled = ", ".join(f"{key} {value}" for key, value in settings.items())
        print(f"{path}: {args.samples} clips of {args.frames} frames, {GIVEN} given; {sampled}")
        print(metrics_table(measure_held_out(model, made)))

    out = args.out or run_folder(args.checkpoint[0]) / "samples" / "eval.gif"
    write_comparison(out, rows, model.run["rate"])
    print(f"the first clips: {out} and {out.with_suffix('.png')}")


# ---- machinery: the sampler, held-out clips, flags, file names, pictures ----

BATCH = 16  # held-out clips that are continued at once
BOX = Path(__file__).parent / "results" / "resample.pt"
HISTORY_NAMES = {
    "teacher": "teacher forcing",
    "noise": "history noise",
    "parallel": "parallel resampling",
    "resample": "resampling forcing",
}
SAMPLERS = {  # by what a run was trained on
    "sprites": {"steps": 4, "time_shift": 20.0, "guidance": 2.0},
    "videos": {"steps": 16, "time_shift": 3.0, "guidance": 1.5},
    "latents": {"steps": 32, "time_shift": 5.0, "guidance": 5.0},
}


def default_sampler(model):
    """The sampler of a run: keyword arguments of `generate`.

    The window is that of training, so that no relative position is new to the network.
    """
    run, config = model.run, model.config
    kind = "sprites" if run["data"] in WORLDS else "videos" if run["words"] else "latents"
    window = run["frames"] // config.chunk - 1
    if config.window:  # one more: a frame's keys, made a pass later, come from as many before it
        window = min(window, config.window + 1)
    return SAMPLERS[kind] | {"window": window or None}


def sampler(args, model):
    """`default_sampler` with the flags that are given. Raises ValueError for a useless sink."""
    given = {name: getattr(args, name) for name in ("steps", "time_shift", "guidance", "window")}
    given = {name: value for name, value in given.items() if value is not None}
    settings = default_sampler(model) | given | {"sink": args.sink, "seed": args.seed}
    settings["window"] = settings["window"] or None  # --window 0
    if args.sink and args.sink >= (settings["window"] or 0):
        raise ValueError(
            f"--sink {args.sink} must be smaller than the window, {settings['window']}; "
            f"--window {args.sink + 1} or more would work"
        )
    return settings


def continue_clips(model, truth, c, frames, given=GIVEN, **settings):
    """Continue clips from their first `given` frames of the model, that is chunks.

    truth (B, T, C, height, width), c (B, L, text_dim). settings: `generate`'s. Returns `frames`
    single frames (B, frames, C, height, width), given ones included, on the CPU.
    """
    chunk = model.config.chunk
    x = fold(truth, chunk)[:, :given]
    made = generate(model, [(0, c)], x, frames // chunk, **settings)
    return unfold(torch.cat([x, *made], dim=1), chunk).cpu()


def held_out(run, frames, split="test"):
    """The held-out sprites of a run. Raises ValueError if it was not trained on sprites."""
    if run["data"] not in WORLDS:
        raise ValueError(f"--eval measures sprites; this run was trained on {run['data']}")
    return Sprites(run["size"], frames, 0, split, run["objects"], **WORLDS[run["data"]])


def continue_held_out(
    model, frames, samples, seed=0, split="test", roll_out=continue_clips, **settings
):
    """Continue held-out sprites. Returns (truth, made), (samples, frames, 3, size, size) each.

    made = roll_out(model, truth, c, frames, seed=seed, ...). Raises ValueError if it is not finite.
    """
    clips = held_out(model.run, frames, split)
    device = next(model.parameters()).device
    truths, rollouts = [], []
    for i in tqdm(range(0, samples, BATCH), "held-out clips", leave=False):
        items = [clips[j] for j in range(i, min(i + BATCH, samples))]
        truth, c = (z.to(device) for z in default_collate(items))
        made = roll_out(model, truth, c, frames, seed=seed + i, **settings)
        if not made.isfinite().all():
            raise ValueError("the model's frames are not finite")
        truths.append(truth.cpu())
        rollouts.append(made.cpu())
    return torch.cat(truths), torch.cat(rollouts)


def measure_held_out(model, made, split="test"):
    """`data.measure` of what `continue_held_out` made: (samples, frames, 3)."""
    clips = held_out(model.run, made.shape[1], split)
    return measure(made, [clips.caption(i) for i in range(len(made))], clips.wall)


def metrics_table(scores):
    """Format `data.measure`'s scores (B, T, 3) as a table, by thirds of the video as in Table 1.

    The mean over the frames of a part of the mean over videos ± standard error over the videos.
    """
    T = scores.shape[1]
    columns = {"Temporal": 1, "Visual": 0, "Text": 2}
    lines = [f"{'frames':>12}" + "".join(f"{name:>16}" for name in columns)]
    edges = [round(i * T / 3) for i in range(4)]
    for start, end in [*pairwise(edges), (0, T)]:
        part = scores[:, start:end]
        mean = part.nanmean(dim=0).nanmean(dim=0)
        error = standard_error(part.nanmean(dim=1))
        line = f"{f'{start}-{end - 1}':>12}"
        for i in columns.values():
            line += f"{mean[i]:8.2f} ± {error[i]:5.2f}"
        lines.append(line)
    return "\n".join(lines)


def standard_error(z):
    """Standard error over the rows of z (n, ...), nan left out; nan for a single row."""
    n = (~z.isnan()).sum(0).clamp(min=1)
    return ((z - z.nanmean(0)).square().nansum(0) / (n - 1) / n).sqrt()


def parse(argv):
    """Parse the command line. Flags that depend on the run stay None, see `sampler`."""
    parser = Parser(__doc__, "%(prog)s [PROMPT ...] [flags]")
    add = parser.add_argument
    # fmt: off
    add("prompts", nargs="*", metavar="PROMPT",
        help="text to show; without one, generate unconditionally")
    add("--checkpoint", type=Path, nargs="+",
        help="a run's folder, or its ckpt.pt; several with --eval (default: the latest under "
             "runs/; if there is none, results/resample.pt)")
    add("--out", type=Path,
        help="a folder, or a .mp4 or .gif file, which is replaced (default: samples/ of the run)")
    add("--frames", type=number(int, 1),
        help="length, given frames included, of a model of latents in latents (default: twice the "
             "training clips more than is given; --eval: four times)")
    add("--steps", type=number(int, 1),
        help="Euler steps per frame, Eq. (2) (default: 4 for sprites, 16 for videos, 32 for "
             "latents)")
    add("--time-shift", type=number(float, 0.01),
        help="Eq. (7) on the steps of the sampler: above 1, more of them at high noise (default: "
             "20 for sprites, 3 for videos, 5 for latents)")
    add("--guidance", type=number(float, 0),
        help="classifier-free guidance: above 1, follow the prompt more closely; 1: off (default: "
             "2 for sprites, 1.5 for videos, 5 for latents)")
    add("--given", type=Path,
        help="a video, or a picture, to continue")
    add("--given-frames", type=number(int, 1),
        help="take at most this many of its frames (default: all)")
    add("--then", nargs=2, action="append", default=[], metavar=("FRAME", "PROMPT"),
        help="switch to PROMPT at FRAME; may be repeated")
    add("--window", type=number(int, 0),
        help="attend to at most this many past frames (or chunks), so that time and memory per "
             "frame stay flat (default: as in training; 0: all)")
    add("--sink", type=number(int, 0), default=0,
        help="of the window's frames, keep this many from the start of the video (default: 0)")
    add("--samples", type=number(int, 1),
        help="videos per prompt (default: 1), or clips of --eval (default: 64)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="seed of the noise (default: 0)")
    add("--device", choices=DEVICES, default=DEVICES[-1],
        help="where to run (default: %(default)s)")
    add("--compile", action="store_true",
        help="torch.compile each block: faster after a minute of compiling")
    add("--eval", action="store_true",
        help="continue held-out sprites, print their metrics by thirds and draw them")
    add("--live", action="store_true",
        help="serve a page on which each --checkpoint rolls on (default: results/teacher.pt beside "
             "results/resample.pt)")
    add("--port", type=number(int, 0, 65535), default=8000,
        help="of this page on 127.0.0.1 (default: %(default)s)")
    add("--wan", type=Path,
        help="for a model of latents: a diffusers folder with Wan's VAE and text encoder")
    # fmt: on
    args = parser.parse_args(argv)
    if args.eval and (args.prompts or args.given or args.then):
        raise ValueError("--eval continues held-out clips; leave out prompts, --given and --then")
    if args.given_frames and not args.given:
        raise ValueError("--given-frames needs --given")
    for at, _ in args.then:
        if not at.isdecimal():
            raise ValueError(f"--then {at}: wanted the number of a frame, and then a prompt")
    args.samples = args.samples or (64 if args.eval else 1)
    check_out(args)
    if args.live and not args.checkpoint:
        args.checkpoint = [BOX.with_name("teacher.pt"), BOX]
    args.checkpoint = args.checkpoint or [default_checkpoint()]
    return args


def check_out(args):
    """Raise ValueError if --out is neither a folder nor a video file, or one file for several."""
    if args.out is None:
        return
    ending = "" if args.out.is_dir() else args.out.suffix.lower()
    several = not args.eval and max(1, len(args.prompts)) * args.samples > 1
    if ending and (ending not in (".mp4", ".gif") or several):
        wanted = "a folder for several videos" if several else "a folder, or a .mp4 or .gif file"
        raise ValueError(f"--out {args.out}: wanted {wanted}")
    if args.eval and not ending:
        args.out = args.out / "eval.gif"


def check_length(args, frames, given, chunk):
    """Raise ValueError if a video's length or its switches of prompts do not fit."""
    if frames % chunk or frames <= given * chunk:
        least = max((given + 1) * chunk, round_up(frames, chunk))
        raise ValueError(
            f"--frames {frames}: wanted whole chunks of {chunk}, and more than the {given * chunk} "
            f"given frames; {least} would work, or fewer --given-frames"
        )
    for at, _ in args.then:
        if int(at) % chunk or not 0 < int(at) < frames:
            raise ValueError(
                f"--then {at}: wanted the first frame of a chunk of {chunk}, above 0 and below "
                f"--frames {frames}"
            )


def open_model(args, path):
    """Load a run's model to sample. Raises ValueError if it does not go with the flags."""
    model = load_checkpoint(path).to(args.device)
    of_latents = model.run["words"] is None
    if of_latents and not args.wan and not args.eval:
        raise ValueError("this model makes latents; add --wan PATH, a folder with Wan's VAE")
    if args.wan and not of_latents:
        raise ValueError("--wan: this model makes pixels itself, and needs no VAE")
    if args.compile:
        model.compile_blocks()
    return model


def autocast(precision, device):
    """The context of the network's passes at a --precision: bf16 autocast, or none."""
    enabled = {"fp32": False, "bf16": True}[precision]
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def latest_run():
    """The folder of the checkpoint under runs/ that was written last, or None."""
    found = sorted(Path("runs").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def default_checkpoint():
    run = latest_run()
    if run is None:
        print(f"there is no run under runs/; using {BOX.name}, which comes with the repository")
    return run or BOX


def run_folder(path):
    """The folder of a run, named by itself or by its ckpt.pt; of results/NAME.pt, runs/NAME."""
    if path.is_dir():
        return path
    return path.parent if path.name == "ckpt.pt" else Path("runs", path.stem)


def name_files(args, prompts):
    """A file for each prompt: --out itself, or PROMPT-NUMBER.mp4 with the first free number."""
    out = args.out or run_folder(args.checkpoint[0]) / "samples"
    if out.suffix and not out.is_dir():
        return [out]
    paths = []
    for prompt in prompts:
        stem = "-".join(split_words(prompt))[:60] or "video"
        names = (out / f"{stem}-{n}.mp4" for n in count())
        paths.append(next(path for path in names if not path.exists() and path not in paths))
    return paths


def write_comparison(path, videos, fps):
    """Write a moving picture, and beside it a .png with time from left to right.

    A row for each name. videos: {name: (B, T, C, height, width)} in [-1, 1]; shorter ones are
    padded with white.
    """
    longest = max(video.shape[1] for video in videos.values())
    rows = [F.pad(z, (0,) * 7 + (longest - z.shape[1],), value=1.0) for z in videos.values()]
    rows = torch.stack(rows)  # (rows, B, T, C, height, width)
    channels = rows.shape[3]
    if channels != 3:  # latents are not RGB: show three of their channels
        rows = rows[:, :, :, [i % channels for i in range(3)]] / 3

    page = rearrange(F.pad(rows, (1, 1, 1, 1), value=1.0), "r b t c h w -> t c (r h) (b w)")
    frames = enlarge(to_bytes(page), 72 * len(rows))  # (T, height, width, 3)
    names = np.concatenate([draw_text(name, frames.shape[1] // len(rows)) for name in videos])
    with writer(path, fps, 32 if rows.shape[-1] <= 32 else 256) as write:  # sprites are flat
        for n, frame in enumerate(frames):
            frame = np.concatenate([names, frame], axis=1)
            counter = draw_text(f"frame {n}", 20, frame.shape[1])
            write(np.concatenate([counter, frame])[None])

    strips = rearrange(rows, "r b t c h w -> (b r) t c h w")
    sheet = contact_sheet(strips, [*videos] * rows.shape[1])
    iio.imwrite(path.with_suffix(".png"), sheet)


def contact_sheet(rows, labels, columns=16, height=64):
    """Draw videos below one another, time from left to right: (height, width, 3) uint8.

    rows (n, T, 3, height, width) in [-1, 1], of which `columns` frames are drawn, with a label on
    the left of each and their numbers above.
    """
    T = rows.shape[1]
    chosen = torch.linspace(0, T - 1, min(columns, T)).round().long()
    strips = []
    for video, label in zip(rows, labels, strict=True):
        frames = enlarge(to_bytes(video[chosen]), height)
        frames = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        strip = rearrange(frames, "t h w c -> h (t w) c")
        strips.append(np.concatenate([draw_text(label, len(strip)), strip], axis=1))
    numbers = [draw_text(str(n), 16, frames.shape[2]) for n in chosen.tolist()]
    return np.concatenate([np.concatenate([draw_text("frame", 16), *numbers], axis=1), *strips])


def draw_text(text, height, width=96):
    """Draw black text on white, wrapped between words: (height, width, 3) uint8."""
    page = Image.new("RGB", (width, height), "white")
    lines = "\n".join(textwrap.wrap(text, width // 7))
    ImageDraw.Draw(page).multiline_text((4, height / 2), lines, "black", anchor="lm")
    return np.asarray(page)


# ---- --live: a page on which rollouts go on side by side ----

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Watch it drift</title>
<style>body { font: 16px sans-serif; margin: 2em } input, button { font: inherit }</style>
<img src="/stream" alt="Rollouts of each model, side by side">
<form><input name="prompt" size="40" placeholder="a prompt"> <button>Go on with it</button></form>
<p><button id="clip">New clip</button> <button id="pause">Pause</button>
<label>Speed <input id="speed" type="range" min="1" max="60" value="20"></label></p>
<p id="answer"></p>
<script>
async function ask(name, value) {
  const answer = await fetch("/" + name, { method: "POST", body: value })
  document.getElementById("answer").textContent = await answer.text()
}
document.forms[0].onsubmit = event => {
  event.preventDefault()
  ask("prompt", event.target.prompt.value)
}
document.getElementById("clip").onclick = () => ask("clip", "")
document.getElementById("pause").onclick = () => ask("pause", "")
document.getElementById("speed").oninput = event => ask("speed", event.target.value)
</script>
"""


class Live:
    """Rollouts of several models that go on for ever, and a picture of their latest frames.

    All continue the same frames, with the same noise. `roll_out` makes the pictures in one thread;
    the threads of the page wait for them in `next_picture`, and say what comes next by `ask`.
    """

    def __init__(self, args, models, wan=None, turn=500):
        self.args, self.models, self.wan = args, models, wan
        self.turn = turn  # frames of a rollout; the next one continues its last frames
        self.words = wan or Words(*models[0].run["words"])
        self.null = wan.text([Wan.NEGATIVE]).to(args.device) if wan else None
        self.world = WORLDS.get(models[0].run["data"])  # None: these are no sprites
        self.changed = threading.Condition()
        self.number, self.jpeg = 0, b""  # pictures so far, and the latest
        self.clip, self.speed, self.paused = 0, 20, False
        self.prompt = ""
        self.asked = self.new = True  # whether the prompt or the clip changed; whether the clip did
        self.due = 0.0  # when the next picture is shown

    def ask(self, name, value):
        """Do what the page asks for. Returns the answer, or None if there is no such request."""
        with self.changed:
            self.changed.notify_all()
            if name == "prompt":
                self.words.text([value])  # raises ValueError for an unknown word
                self.prompt, self.asked = value, True
                return f"Now: {value}"
            if name == "clip":
                self.clip, self.prompt, self.asked, self.new = self.clip + 1, "", True, True
                return "Another clip"
            if name == "pause":
                self.paused = not self.paused
                return "Paused" if self.paused else "It goes on"
            if name == "speed":
                self.speed = min(60, max(1, int(value)))
                return f"At most {self.speed} frames a second"

    def begin(self):
        """The first frames of a clip, and its prompt: held-out sprites, or what the flags give."""
        model, prompt = self.models[0], " ".join(self.args.prompts)
        if self.world is None or self.args.given:
            return read_given(self.args, model, self.wan), prompt
        clips = held_out(model.run, GIVEN * model.config.chunk)
        given = fold(clips[self.clip][0][None], model.config.chunk)
        return given, prompt or clips.caption(self.clip)

    def roll_out(self, pictures=math.inf):
        """Make pictures, for ever or until there are so many."""
        while self.number < pictures:
            with self.changed:
                if self.new:
                    given, caption = self.begin()
                    self.prompt = self.prompt or caption
                    self.last = [given.to(self.args.device) for _ in self.models]
                    self.frame, self.shares = 0, []
                self.asked = self.new = False
                prompt = self.prompt
            rollouts = [self.frames(i, prompt) for i in range(len(self.models))]
            for videos in zip(*rollouts):
                for frames in zip(*(video.unbind(1) for video in videos)):
                    self.show(torch.cat(frames), prompt)
                if self.asked or self.number >= pictures:
                    break

    def frames(self, i, prompt):
        """Continue the last frames of model i, for ever; yield frames (1, T, 3, height, width)."""
        model = self.models[i]
        c = self.words.text([prompt]).to(self.args.device)
        decode = self.wan.decoder() if self.wan else torch.Tensor.cpu
        settings = sampler(self.args, model)
        kept = settings["window"] or model.run["frames"]
        while True:
            settings["seed"] = self.args.seed + self.number
            length = self.last[i].shape[1] + self.turn
            made = generate(model, [(0, c)], self.last[i], length, null=self.null, **settings)
            for frame in made:
                self.last[i] = torch.cat([self.last[i], frame], dim=1)[:, -kept:]
                yield decode(unfold(frame, model.config.chunk))

    def show(self, frames, prompt):
        """Draw a frame of each model (models, 3, height, width), and wait until it is time."""
        if self.world is not None:
            wall = self.world.get("wall", False)
            there = share_there(frames[:, None], [prompt] * len(frames), wall)
            self.shares.append(there[:, 0].nan_to_num(1.0).tolist())
        if len(self.shares) > 500:  # a curve needs no more points
            self.shares = self.shares[::2]

        panels = []
        for i, picture in enumerate(enlarge(to_bytes(frames), 256)):
            name = HISTORY_NAMES[self.models[i].run["history"]]
            label = draw_text(f"{name}, frame {self.frame}", 24, picture.shape[1])
            curve = draw_curve([z[i] for z in self.shares], picture.shape[1])
            panel = np.concatenate([picture, label, curve])
            panels.append(np.pad(panel, ((0, 0), (0, 8), (0, 0)), constant_values=255))
        file = io.BytesIO()
        Image.fromarray(np.concatenate(panels, axis=1)).save(file, "jpeg", quality=90)

        time.sleep(max(0, self.due - time.perf_counter()))
        self.due = time.perf_counter() + 1 / self.speed
        with self.changed:
            self.number, self.frame = self.number + 1, self.frame + 1
            self.jpeg = file.getvalue()
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.asked or not self.paused)

    def next_picture(self, number):
        """Wait for another picture than this number; return its number and itself, a JPEG.

        After a second the same one again: a browser shows a picture when the next one begins.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.number != number, timeout=1)
            return self.number, self.jpeg


def draw_curve(shares, width, height=64):
    """Draw the share of the named sprites that are there over time: (height, width, 3) uint8."""
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    step = (width - 8) / max(100, len(shares))
    points = [(4 + step * i, height - 18 - (height - 22) * z) for i, z in enumerate(shares)]
    if len(points) > 1:
        draw.line(points, "black", 2)
        draw.text((4, height - 14), f"named sprites still there: {shares[-1]:.0%}", "black")
    return np.asarray(page)


def serve(live, port):
    """Serve the page of a `Live` on the loopback address, in threads. Returns the server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/stream":
                return self.stream()
            self.answer("text/html", PAGE if self.path == "/" else None)

        def do_POST(self):
            length = min(10_000, int(self.headers.get("Content-Length", 0)))
            value = self.rfile.read(length).decode("utf-8", "replace")
            try:
                answer = live.ask(self.path[1:], value)
            except ValueError as error:
                answer = str(error)
            self.answer("text/plain", answer)

        def answer(self, kind, text):
            if text is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("X-Content-Type-Options", "nosniff")  # a prompt stays text
            self.end_headers()
            self.wfile.write(text.encode())

        def stream(self):
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            number = 0
            with suppress(OSError):  # the tab was closed
                while True:
                    number, jpeg = live.next_picture(number)
                    head = b"--frame\r\nContent-Type: image/jpeg\r\n\r\n"
                    self.wfile.write(head + jpeg + b"\r\n")

        def log_message(self, *args):
            """Print no line for each request."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError:
        raise ValueError(f"--port {port} is in use; --port {port + 1} may be free") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def show_live(args):
    """--live: serve the page until Ctrl-C."""
    models = [open_model(args, path) for path in args.checkpoint]
    live = Live(args, models, Wan(args.wan, args.device) if args.wan else None)
    print(f"open http://127.0.0.1:{serve(live, args.port).server_port}; Ctrl-C ends it", flush=True)
    with autocast(models[0].run["precision"], args.device):
        live.roll_out()


if __name__ == "__main__":
    run_main(main)
