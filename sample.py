"""Make videos with a trained model, frame after frame, as long as you like.

  python sample.py "red circle and blue square" --checkpoint runs/001
  python sample.py "red circle and blue square" --given clip.mp4 --frames 100 --window 11
  python sample.py "red circle" --then 24 "white square"
  python sample.py --eval --frames 48                     the ruler's table on held-out sprites
  python sample.py --compare runs/a runs/b                the same for several models, under one another
  python sample.py --table runs/a-0 runs/a-1 runs/b-0     the tables of earlier --eval, mean and error over seeds
  python sample.py "red circle" --routing                 which history frames are looked at (Fig. 8)

Frames are written as they are finished. Without --checkpoint, the latest run under runs/ is used.
"""
import copy
import json
import re
import sys
import time
from contextlib import ExitStack
from itertools import chain, pairwise
from pathlib import Path
from unittest.mock import patch

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.data import default_collate
from tqdm import tqdm

import routing
from data import (DEVICES, Parser, Sprites, Wan, Words, amount, enlarge, film, fold, latest_run, measure, multiple, natural,
                  plus, positive, read_video, ruler_table, seed, split_words, to_bytes, unfold, write, writer)
from model import load_checkpoint
from rf import Guided, rollout
from routing import pick

def parse(argv):
    parser = Parser(__doc__)
    add = parser.add
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to show; none: nothing is said")
    add("--checkpoint", None, "a run's folder, or its ckpt.pt (default: the latest under runs/)", type=Path)
    add("--out", None, "a folder, or one .mp4 or .gif file (default: samples/ in the run's folder)", type=Path)
    add("--frames", None, "length, given frames included (default: twice the training clips)", type=positive)
    add("--steps", None, "Euler steps per frame (default: 4 for pixels, 32 for latents)", type=positive)
    add("--time-shift", 5.0, "Eq. (7) on these steps: above 1, more of them at high noise", type=plus)
    add("--guidance", None, "how much the prompt counts; 1: as it is (default: 2 for pixels, 5 for latents)", type=amount)
    add("--given", None, "a video to continue", type=Path)
    add("--given-frames", None, "how many of its frames to take (default: all)", type=positive)
    add("--wan", None, "for a model of latents: a diffusers folder with Wan's VAE and text encoder", type=Path)
    add("--negative", Wan.NEGATIVE, "with --wan: what guidance leads away from (default: Wan's own negative prompt)")
    add("--then", [], "follow PROMPT from FRAME on; may be repeated", nargs=2, action="append", metavar=("FRAME", "PROMPT"))
    add("--window", None, "history frames in sight, to stay cheap and familiar (default: as in training; 0: all)", type=natural)
    add("--sink", 0, "how many of these are the first frames of all", type=natural)
    add("--samples", 1, "videos per prompt", type=positive)
    add("--seed", 0, "of the noise", type=seed)
    add("--device", DEVICES[-1], "where to run", choices=DEVICES)
    add("--compile", False, "torch.compile each block, a minute at first", action="store_true")
    add("--eval", False, "continue held-out sprites and print the ruler's table per third", action="store_true")
    add("--videos", 64, "how many, for --eval", type=positive)
    add("--true-history", False, "with --eval or --table: each frame continues the truth, no error adds up", action="store_true")
    add("--compare", [], "--eval of several runs on the same clips, with a picture of all", type=Path, nargs="+", metavar="RUN")
    add("--table", [], "print what --eval wrote; NAME-0, NAME-1 ... are seeds of NAME", type=Path, nargs="+", metavar="RUN")
    add("--routing", False, "draw how often each history frame is picked (needs a model with --top-k)", action="store_true")
    return parser.parse_args(argv)

def settle(args, checkpoint, model):
    """The flags for one of the runs, filled in with what it knows better than the command line; `settings`: those that
    `generate` is told. Says what cannot be."""
    args, run, chunk, pixels = copy.copy(args), model.run, model.config.chunk, model.run["words"] is not None
    args.checkpoint = checkpoint
    for name, value in (("frames", 2 * run["frames"]), ("steps", 4 if pixels else 32), ("guidance", 2.0 if pixels else 5.0),
                        ("window", min(run["frames"] // chunk - 1, (model.config.window or run["frames"]) + 1))):
        if getattr(args, name) is None:
            setattr(args, name, value)
    measured, at = args.eval or args.compare, [at for at, _ in args.then]
    for wrong, why in (
            (args.frames % chunk, f"--frames {args.frames} is not divisible by {chunk}, the chunk; "
                                  f"{multiple(args.frames, chunk)} would work"),
            (measured and args.frames < 3 * chunk,
             f"--frames {args.frames}: two of {chunk} are given; {3 * chunk} can be measured"),
            (measured and (args.prompts or args.given or args.then or args.routing),
             "--eval and --compare continue held-out clips by caption; leave out prompts, --given, --then and --routing"),
            (args.window and args.sink >= args.window, f"--sink {args.sink} leaves no room in --window {args.window}"),
            (args.routing and not model.config.top_k, "--routing needs a model that routes: train one with --top-k 5"),
            (not (pixels or args.wan or measured), "this model makes latents: --wan PATH names their VAE and text encoder"),
            (pixels and args.wan, "--wan: this model makes pixels itself, and needs no VAE"),
            (not set(at) <= set(map(str, range(chunk, args.frames, chunk))),
             f"--then {' '.join(at)}: wanted the number of a frame, below --frames {args.frames} and divisible by {chunk}")):
        if wrong:
            raise ValueError(why)
    args.settings = dict(steps=args.steps, time_shift=args.time_shift, guidance=args.guidance, window=args.window or None,
                         sink=args.sink, seed=args.seed)
    return args

def generate(model, texts, given, frames, steps, time_shift=1.0, guidance=1.0, window=None, sink=0, seed=0, null=None):
    """Yields frames (B, 1, C, height, width) until there are `frames`; a change of text begins a new rollout on all there is.
    texts: [(the frame at which it begins, c (B, L, text_dim))]; given (B, M, C, height, width): the frames to continue,
    perhaps none; window, sink: as in `model.cache`; null (1, L, text_dim): what guidance leads away from (None: zeros)."""
    noise, done = torch.Generator().manual_seed(seed), [given[:, [i]] for i in range(given.shape[1])]
    for (_, c), end in zip(texts, [start for start, _ in texts[1:]] + [frames]):
        if end <= len(done):
            continue
        nothing = torch.zeros_like(c[:1]) if null is None else null
        guided = model if guidance == 1 or not c.any() else Guided(model, nothing, guidance)
        x = torch.randn(len(given), end - len(done), *given.shape[2:], generator=noise).to(given.device)
        cache, t = guided.cache(len(given), end, window=window, sink=sink), torch.ones(len(given), device=given.device)
        for frame in rollout(guided, x, t, c, steps, time_shift, torch.cat([given[:, :0], *done], dim=1), cache):
            done.append(frame)
            yield frame

def extend(model, video, c, frames, given=2, **settings):
    """The first `given` frames of video (B, T, C, height, width) and what the model makes of them: (B, frames, ...)."""
    chunk = model.config.chunk
    x = fold(video, chunk)[:, :given]
    new = frames // chunk - given
    made = tqdm(generate(model, [(0, c)], x, frames // chunk, **settings), "rollout", new, leave=False, disable=new < 20)
    return unfold(torch.cat([x, *made], dim=1), chunk).cpu()

def samples_of(run):
    return (run if run.is_dir() else run.parent) / "samples"

def scores_of(run, args):
    return samples_of(run) / ("true-history.json" if args.true_history else "eval.json")

def targets(args, names):
    """One file per video."""
    out = args.out or samples_of(args.checkpoint)
    files = [out / f"{name}.mp4" for name in names]
    if out.suffix in (".mp4", ".gif"):
        files = [out] if len(names) == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(len(names))]
    elif out.is_file() or not out.is_dir() and re.fullmatch(r"\.[a-z]+\d?", out.suffix):
        raise ValueError(f"--out {out}: wanted a folder, or a file that ends in .mp4 or .gif")
    if args.given and args.given.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"--out {out} would overwrite --given; wanted another name")
    return files

def first_frames(args, model, wan):
    """The frames of --given (1, M, ...), or none."""
    run, chunk = model.run, model.config.chunk
    size, shape = (run["height"], run["width"]), (1, 0, chunk * model.config.channels, run["height"], run["width"])
    if args.given is None:
        return torch.zeros(shape)
    if wan:
        clip = read_video(args.given, (8 * size[0], 8 * size[1]), 16, 1, args.given_frames)[None]
        clip = wan.encode(clip[:, :(clip.shape[1] + 3) // 4 * 4 - 3]).cpu()
    else:
        clip = read_video(args.given, size, run["fps"], run["stride"], args.given_frames)[None]
    if clip.shape[1] < chunk or clip.shape[1] >= args.frames:
        raise ValueError(f"--given {args.given} makes {clip.shape[1]} frames; wanted {chunk} or more, and fewer than --frames "
                         f"{args.frames}; --given-frames takes some of them")
    return fold(clip[:, :clip.shape[1] // chunk * chunk], chunk)

def make(args, model):
    """Prompts to files."""
    wan, chunk = args.wan and Wan(args.wan, args.device), model.config.chunk
    prompts = [prompt for prompt in args.prompts or [""] for _ in range(args.samples)]
    texts = [(0, prompts)] + sorted((int(at), [prompt] * len(prompts)) for at, prompt in args.then)
    cs = [(at // chunk, (wan or Words(*model.run["words"])).text(several).to(args.device)) for at, several in texts]
    given = first_frames(args, model, wan).expand(len(prompts), -1, -1, -1, -1).to(args.device)
    files = targets(args, [f"{'-'.join(split_words(prompt))[:60] or 'video'}-{args.seed}-{i}" for i, prompt in enumerate(prompts)])
    show, shares, sampling, showing, small = wan.decoder() if wan else torch.Tensor.cpu, [], [], [], []
    null = wan and wan.text([args.negative]).to(args.device)
    frames = generate(model, cs, given, args.frames // chunk, null=null, **args.settings)
    videos = timed(map(show, timed((unfold(frame, chunk).cpu() for frame in frames), sampling)), showing)
    before = [show(unfold(given, chunk))] if given.shape[1] else []
    with ExitStack() as stack:
        outs = [stack.enter_context(writer(path, 16 if wan else model.run["rate"])) for path in files]
        if args.routing:
            stack.enter_context(recorded_picks(shares))
        passes = len(before) + args.frames // chunk - given.shape[1]
        for video in tqdm(chain(before, videos), "frames", passes, dynamic_ncols=True):
            for out, clip in zip(outs, video):
                out(clip)
            tiles = max(1, video.shape[-2] // 64)  # small pictures are all that is kept of a long video
            small.append(F.avg_pool2d(video.flatten(0, 1), tiles).unflatten(0, video.shape[:2]))
    sheet = files[0].with_suffix(".png") if len(files) == 1 else files[0].with_name("sheet.png")
    iio.imwrite(sheet, film(torch.cat(small, dim=1), 16, prompts))
    count = sum(video.shape[1] for video in small[len(before):])
    print_speed(args, f"{len(files)} x {count} new frames", len(files) * count, sampling, showing)
    print("\n".join(f"{path}: {prompt or 'no prompt'}" for path, prompt in zip(files, prompts)) + f"\nall of them: {sheet}")
    if args.routing:
        show_routing(shares[-args.steps * model.config.layers:], model.config.layers, files[0].with_name("routing.png"))

def timed(items, seconds):
    """The items; how long each took to come is appended to `seconds`."""
    begin = time.perf_counter()
    for item in items:
        seconds.append(time.perf_counter() - begin)
        yield item
        begin = time.perf_counter()

def print_speed(args, what, count, sampling, showing):
    """Frames per second; sampling and showing: seconds per frame, without and with the VAE's decoding."""
    print(f"{count / sum(sampling):.1f} frames per second: {what} in {sum(sampling):.1f} s, {args.steps} steps each" +
          (", guidance counted" if args.guidance != 1 else "") + ", writing files not counted" +
          (f"; {count / sum(showing):.1f} with the VAE's decoding" if args.wan else ""))
    if len(sampling) >= 40:
        edges = np.linspace(20, len(sampling), 5).round().astype(int)
        print("median time of a frame: " + ", ".join(f"{1000 * np.median(sampling[start:end]):.1f} ms ({start + 1} to {end})"
                                                     for start, end in pairwise(edges)))
    if "cuda" in args.device:
        print(f"memory at its peak: {torch.cuda.max_memory_allocated() / 2 ** 20:,.0f} MiB")

def recorded_picks(shares):
    """A context in which `routing.pick` also appends to a list: how often its last frame picked each column, of all tokens."""
    def record(*args):
        picked, valid = found = pick(*args)
        last = picked[:, :, -1]
        shares.append(torch.bincount(last[valid[:, :, -1]], minlength=args[2].shape[1]) / last[..., 0].numel())
        return found
    return patch.object(routing, "pick", record)

def show_routing(shares, layers, path):
    """Fig. 8: how often the last frame picked each history frame, by layer, over steps, heads and tokens."""
    share = torch.stack([torch.stack(shares[i::layers]).mean(0)[:-1] for i in range(layers)]).cpu()
    share = torch.cat([share, share.mean(0, keepdim=True)])
    print(f"how often the last frame picks each history frame (columns: frame 0 to {share.shape[1] - 1}):")
    for i, row in enumerate(share):
        print(f"{f'layer {i}' if i < layers else 'mean':>8} " + " ".join(f"{z:4.2f}" for z in row.tolist()))
    heat = (share[..., None] * torch.tensor([255, 217, 51])).round().byte().numpy()  # black for 0, yellow for 1
    iio.imwrite(path, np.pad(enlarge(heat, 24 * len(heat)), ((1, 1), (1, 1), (0, 0)), constant_values=255))
    print(f"as a picture, the mean last: {path}")

def evaluate(args, model):
    """Continue held-out sprites from two true frames and measure them. Returns (truth, made), (videos, T, ...).
    With --true-history every frame is the first that a rollout adds to the truth before it."""
    run, chunk = model.run, model.config.chunk
    if run["data"] != "sprites":
        raise ValueError(f"--eval needs a model of sprites, whose world is exactly known; this one learned {run['data']}")
    test = Sprites(run["size"], args.frames, 0, "test", run["objects"], run["wall"], run["withheld"])
    N, given, clips = args.frames // chunk, 2, []
    parts = [(n, n + 1) for n in range(given, N)] if args.true_history else [(given, N)]
    for i in tqdm(range(0, args.videos, 16), "batches", dynamic_ncols=True):
        truth, c = (z.to(args.device) for z in default_collate([test[j] for j in range(i, min(i + 16, args.videos))]))
        made = [truth[:, :given * chunk].cpu()]
        for start, end in parts:
            known = min(start, args.window or start)
            settings = args.settings | {"seed": args.seed + i + start}
            video = extend(model, truth[:, (start - known) * chunk:], c, (end - start + known) * chunk, known, **settings)
            made.append(video[:, known * chunk:])
        clips.append((truth.cpu(), torch.cat(made, dim=1)))
    truth, made = map(torch.cat, zip(*clips))
    scores = measure(made, [test.caption(j) for j in range(len(made))], run["wall"])
    print(f"{len(scores)} held-out videos, {args.frames} frames, the first {given * chunk} given, window "
          f"{args.window or 'none'}, {args.steps} steps" + ", on true history" * args.true_history + "\n" + ruler_table(scores))
    path = scores_of(args.checkpoint, args)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"args": vars(args), "frames": scores.nanmean(0).tolist()}, default=str))
    return truth, made

def compare(path, videos, fps):
    """path.png, time from left to right, and path.gif: clips {name: (B, T, C, height, width)}, a row for each name."""
    longest = max(video.shape[1] for video in videos.values())
    rows = torch.stack([F.pad(video, (0, 0) * 3 + (0, longest - video.shape[1]), value=1.0) for video in videos.values()])
    rows = rows if rows.shape[3] == 3 else rows[:, :, :, [i % rows.shape[3] for i in range(3)]] / 3  # latents are no colours
    page = rearrange(F.pad(rows, (1, 1, 1, 1), value=1.0), "r b t c h w -> t c (r h) (b w)")
    frames = enlarge(to_bytes(page), 72 * len(rows))
    if rows.shape[-1] <= 32:  # sprites are flat: their noise would be most of the file
        frames = np.minimum((frames.astype(int) + 16) // 32 * 32, 255).astype(np.uint8)
    names = np.concatenate([write(name, frames.shape[1] // len(rows)) for name in videos])
    with writer(path.with_suffix(".gif"), fps) as out:
        out(np.concatenate([np.broadcast_to(names, (len(frames), *names.shape)), frames], axis=2))
    iio.imwrite(path.with_suffix(".png"), film(rearrange(rows, "r b t c h w -> (b r) t c h w"), 16, [*videos] * rows.shape[1]))

def print_tables(args):
    """What --eval wrote, per third: mean ± standard error over the seeds of a name."""
    groups = {}
    for run in args.table:
        path = scores_of(run, args)
        if not path.is_file():
            mode = "--eval --true-history" if args.true_history else "--eval"
            raise ValueError(f"no {path}; python sample.py {mode} --checkpoint {run} writes it")
        try:
            frames = json.loads(path.read_text())["frames"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is not what --eval writes ({error!r}); sample.py --eval writes it anew") from None
        groups.setdefault(re.sub(r"-\d+$", "", str(samples_of(run).parent)), []).append(frames)
    for name, frames in ((Path(folder).name, frames) for folder, frames in groups.items()):
        if len({len(video) for video in frames}) > 1:
            raise ValueError(f"the seeds of {name} have {', '.join(map(str, map(len, frames)))} frames; wanted the same")
        print(f"{name}, {len(frames)} seed{'s' * (len(frames) > 1)}\n{ruler_table(torch.tensor(frames))}")

def main(argv):
    args = parse(argv)
    if args.table:
        return print_tables(args)
    runs, rows = args.compare or [args.checkpoint or latest_run()], {}
    models = [load_checkpoint(run).to(args.device) for run in runs]
    settled = [settle(args, run, model) for run, model in zip(runs, models)]
    if len({str([model.run[key] for key in ("data", "size", "objects", "wall")]) for model in models}) > 1:
        raise ValueError("--compare: these runs learned different worlds; wanted one --data, --size, --objects and --wall")
    path, folders = targets(settled[-1], ["eval"])[0], [samples_of(run).parent for run in runs]
    names = [str(folder) if len({folder.name for folder in folders}) < len(runs) else folder.name for folder in folders]
    for own, model, name in zip(settled, models, names):
        if args.compile:
            model.compile_blocks()
        if "cuda" in args.device:
            model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)
        if args.eval or args.compare:
            print(f"{own.checkpoint}:")
            rows["truth"], rows[name] = (video[:4] for video in evaluate(own, model))
        else:
            make(own, model)
    if rows:
        compare(path, rows, model.run["rate"])
        print(f"the first {len(rows['truth'])} of them: {path.with_suffix('.gif')} and {path.with_suffix('.png')}")

if __name__ == "__main__":
    Parser(__doc__).guard(main, sys.argv[1:])
