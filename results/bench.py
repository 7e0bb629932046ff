"""Speed of a training step, of attention and of sampling.

  python results/bench.py step
  python results/bench.py step --preset wan-1.3b --size 60x104 --frames 63 --batch 1
  python results/bench.py attention --top-k 5
  python results/bench.py attention --frames 60 --tokens 4680 --heads 12 --width 128 --batch 1 \
--top-k 5
  python results/bench.py sample --frames 500
  python results/bench.py sample --preset wan-1.3b --size 60x104 --frames 63 --steps 4 --guidance 1

step       a teacher-forcing step and one of --history, on random clips; takes train.py's flags
attention  dense and routed attention under the mask of training, forward and backward
sample     time by the number of the frame, and frames a second; takes sample.py's flags

What is compared runs in turn in one process, and medians are printed: on a shared machine only
their ratios can be trusted. Work is counted as the mask leaves it, backward as two forwards,
nothing for recomputation; the floor is that work at the speed of a product of two matrices.
COMMAND -h shows its flags. N noisy and M history frames, P tokens in a frame.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
import train
from data import DEVICES, Parser, number, picture_size, run_main, sides
from model import PRESETS, CausalDiT, Config, load_checkpoint
from rf import HISTORY, flow_matching_loss
from routing import attend, block_mask, sparse_causal_mask, visible

PEAK = 989e12  # FLOP/s of an H100 or H200 in bf16, for the MFU


def attended_frames(config, n):
    """How many frames n frames attend to in all, themselves included: Fig. 3c."""
    k = min(config.top_k or n, config.window or n, n)
    return n + k * (k - 1) // 2 + (n - k) * k


def flops(config, N, M, P, words, first=0, cached=0):
    """FLOPs of one clip's forward pass: N noisy frames, numbered from `first`, and M of history.

    The history frames are numbered from `cached`. Choosing the top k is not counted.
    """
    D = config.dim
    pairs = attended_frames(config, first + N) - attended_frames(config, first)
    history_pairs = attended_frames(config, cached + M) - attended_frames(config, cached)

    token = 12 * D * D + 4 * D * config.ffn_dim + 4 * D * words
    noisy = token * N * P + 4 * D * P * P * pairs
    history = token * M * P + 4 * D * P * P * history_pairs
    last_history = 4 * D * D * M * P  # only keys and values are computed of it in the last block
    blocks = config.layers * (4 * D * D * words + noisy + history) - history + last_history

    ends = config.channels * config.patch**2 * (2 * N + M) * P
    ends += (config.text_dim + D) * words + (config.freq_dim + 7 * D) * (N + M)
    return blocks + 2 * D * ends


def rollout_flops(config, N, P, words, steps):
    """FLOPs of redrawing a clip's N frames one after another, a frame in `steps` passes."""
    total = 0
    for i in range(N):
        entering = min(i, 1)  # the frame before enters the cache in the first pass
        total += flops(config, 1, entering, P, words, first=i, cached=i - entering)
        total += (steps - 1) * flops(config, 1, 0, P, words, first=i)
    return total


def medians(functions, repeats, device="cpu"):
    """Median seconds of each of {name: function}, all in turn, after two rounds to warm up."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            wait_for(device)
            if repeat >= 2:
                times[name].append(time.perf_counter() - began)
    return {name: float(np.median(z)) for name, z in times.items()}


def wait_for(device):
    if "cuda" in str(device):
        torch.cuda.synchronize(device)


def product(device, dtype):
    """A function that multiplies two matrices twenty times, and its FLOPs."""
    size = 8192 if "cuda" in str(device) else 512
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return lambda: [a @ b for _ in range(20)], 40 * size**3


def print_memory(device):
    if "cuda" in str(device):
        gib = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"{torch.cuda.get_device_name(device)}: {gib:.1f} GiB at the peak")


def text_rows(config):
    return 512 if config.text_dim == PRESETS["wan-1.3b"].text_dim else 5


def make_steps(argv):
    """The steps of train.py with these flags, on random clips.

    Returns {history: (function, FLOPs)} and the flags.
    """
    args = train.parse(argv)
    args.height, args.width = sides(args.size)
    args.words = None
    config = train.make_config(args, PRESETS[args.preset])
    train.check_sizes(args, config, 1)
    device = torch.device(args.device)
    net, ema, optimizers, _ = train.build(args, config, device)

    N, B, words = args.frames // config.chunk, args.batch, text_rows(config)
    P = config.chunk * args.height * args.width // config.patch**2
    shape = (N, config.chunk * config.channels, args.height, args.width)
    x = torch.randn(B, *shape, device=device)
    c = torch.randn(B, words, config.text_dim, device=device)

    def step(name):
        for part in range(args.accumulate):
            rows = slice(part, None, args.accumulate)
            rng = train.ClipNoise(args.seed, range(B)[rows], device)
            flags = (args.shift, args.resample_steps, args.noise, rng)
            with train.autocast(args.precision, device):
                history = HISTORY[name](net, x[rows, :-1], c[rows], *flags)
                loss = flow_matching_loss(net, x[rows], c[rows], history, args.time_shift, rng)
            (loss / args.accumulate).backward()
        train.clip_gradient(net, args)
        train.set_learning_rate(optimizers, 0, args)
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad(set_to_none=True)
        train.update_ema(ema, net, args.ema, 0)

    work = 3 * flops(config, N, N - 1, P, words)
    extra = {"resample": rollout_flops(config, N - 1, P, words, args.resample_steps)}
    later = (args.resample_steps - 1) * flops(config, N - 1, 0, P, words)
    extra["parallel"] = flops(config, N - 1, N - 2, P, words) + later
    steps = {}
    for name in dict.fromkeys(["teacher", args.history]):
        steps[name] = lambda name=name: step(name), B * (work + extra.get(name, 0))
    return steps, args


def time_steps(argv):
    """Time a teacher-forcing step, and one of --history, of train.py with all other flags."""
    parser = Parser(time_steps.__doc__, "%(prog)s step [--repeats N] [flags of train.py]")
    parser.add_argument("--repeats", type=number(int, 1), default=20, help="default: %(default)s")
    own, rest = parser.parse_known_args(argv)
    steps, args = make_steps(rest)
    multiply, work = product(args.device, torch.bfloat16 if args.precision == "bf16" else None)
    functions = {name: function for name, (function, _) in steps.items()} | {"product": multiply}
    seconds = medians(functions, own.repeats, args.device)

    rate = work / seconds["product"]
    print(f"product of two matrices, {args.precision}: {rate / 1e9:.0f} GFLOP/s, the floor")
    for name, (_, work) in steps.items():
        speed = work / seconds[name]
        print(
            f"{name}: {1000 * seconds[name]:.0f} ms for {work / 1e9:.1f} GFLOP, "
            f"{rate / speed:.2f} x the floor, {seconds[name] / seconds['teacher']:.2f} x a "
            f"teacher-forcing step{f', MFU {speed / PEAK:.1%}' if 'cuda' in args.device else ''}"
        )
    print_memory(args.device)


def time_attention(argv):
    """Time attention of --frames noisy frames and their history, forward and backward.

    Beside it one call without a mask of as many pairs of frames, and how many pairs of tokens
    FlexAttention's blocks hold for one that the mask leaves. Random queries pick random frames,
    the worst case for blocks.
    """
    parser = Parser(time_attention.__doc__, "%(prog)s attention [flags]")
    sizes = {"frames": 16, "tokens": 64, "batch": 4, "heads": 4, "width": 32, "top-k": 5}
    for name, size in (sizes | {"repeats": 20}).items():
        parser.add_argument(
            f"--{name}", type=number(int, 1), default=size, help="default: %(default)s"
        )
    parser.add_argument("--device", choices=DEVICES, default=DEVICES[-1])
    args = parser.parse_args(argv)
    N, P, device = args.frames, args.tokens, args.device
    dtype = torch.bfloat16 if "cuda" in device else torch.float32
    past, own = sparse_causal_mask(0, N - 1, N, 0)
    shape = (args.batch, args.heads, 2 * N - 1, P, args.width)
    like = {"device": device, "dtype": dtype, "requires_grad": True}
    q, k, v = (torch.randn(shape, **like) for _ in "qkv")

    def plain():  # N^2 pairs of frames, as many as the mask of dense history leaves
        tokens = (z[:, :, :N].flatten(2, 3) for z in (q, k, v))
        F.scaled_dot_product_attention(*tokens).sum().backward()

    multiply, work = product(device, dtype)
    functions = {"plain call": plain, "product": multiply}
    choices = {"dense": None, f"top-{args.top_k}": args.top_k}
    for name, top_k in choices.items():
        functions[name] = lambda top_k=top_k: attend(q, k, v, past, own, top_k).sum().backward()
    seconds = medians(functions, args.repeats, device)

    print(f"one plain call of {N} frames: {1000 * seconds['plain call']:.1f} ms")
    for name, top_k in choices.items():
        pairs = sum(attended_frames(Config(top_k=top_k), n) for n in (N, N - 1))
        pairs *= args.batch * args.heads * P * P  # of tokens
        floor = 12 * args.width * pairs * seconds["product"] / work
        seen = visible(q, k, past, own, top_k)
        mask = block_mask(seen, P)
        blocks = (mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()).item()
        blocks *= args.batch * args.heads / seen.shape[0] / seen.shape[1]
        print(
            f"{name}: {1000 * seconds[name]:.1f} ms, {seconds[name] / floor:.2f} x the floor, "
            f"{seconds[name] / seconds['plain call']:.2f} x the plain call; blocks hold "
            f"{128**2 * blocks / pairs:.2f} x the pairs"
        )
    print_memory(device)


def time_sampling(argv):
    """Time the frames of a video by their number, with the flags of sample.py, but no prompt.

    --preset samples with random weights of that size instead of those of --checkpoint.
    """
    usage = "%(prog)s sample [--preset NAME --size HxW] [flags of sample.py]"
    parser = Parser(time_sampling.__doc__, usage)
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--size", type=picture_size, default=(60, 104), help="default: 60x104")
    own, rest = parser.parse_known_args(argv)
    args = sample.parse([*rest, "--checkpoint", own.preset] if own.preset else rest)
    if own.preset:
        model = CausalDiT(PRESETS[own.preset]).eval().requires_grad_(False)
        height, width = sides(own.size)
        model.run = {"data": "latents", "words": None, "frames": 7 * model.config.chunk}
        model.run |= {"precision": "bf16", "height": height, "width": width}
    else:
        model = load_checkpoint(*args.checkpoint)
    model.to(args.device)
    if args.compile:
        model.compile_blocks()

    config, run, settings = model.config, model.run, sample.sampler(args, model)
    frames = (args.frames or 200) // config.chunk
    shape = (0, config.chunk * config.channels, run["height"], run["width"])
    given = torch.zeros(args.samples, *shape, device=args.device)
    c = torch.randn(args.samples, text_rows(config), config.text_dim, device=args.device)
    times, last = [], time.perf_counter()
    with sample.autocast(run["precision"], args.device):
        for _ in sample.generate(model, [(0, c)], given, frames, **settings):
            wait_for(args.device)
            times.append(time.perf_counter() - last)
            last += times[-1]

    start = min(settings["window"] or 1, frames - 1)  # before, the history still grows
    edges = np.linspace(start, frames, min(4, frames - start) + 1).round().astype(int)
    for a, b in zip(edges, edges[1:]):
        print(f"frames {a} to {b - 1}: {1000 * np.median(times[a:b]):.1f} ms each")
    shown = args.samples * config.chunk * frames * (1 if run["words"] else 4)
    print(f"{shown / sum(times):.1f} frames of video a second; {settings}")
    print_memory(args.device)


COMMANDS = {"step": time_steps, "attention": time_attention, "sample": time_sampling}


def main(argv):
    parser = Parser(__doc__, "%(prog)s COMMAND [flags]")
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(argv[:1]).command
    COMMANDS[command](argv[1:])


if __name__ == "__main__":
    run_main(main)
