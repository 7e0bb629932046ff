"""Train an autoregressive video model from scratch, without a teacher: Algorithm 1.

  python train.py                                       moving sprites, a quarter of an hour on a laptop
  python train.py --data clips --size 64 --frames 16    a folder of your own videos
  torchrun --nproc-per-node 8 train.py --frames 60      many processes, the same batch

First teacher forcing (--warmup steps), then --history: "resample" redraws the history with the model's own mistakes.
The run's folder holds ckpt.pt, config.json, log.jsonl and samples/. Ctrl-C saves; --resume goes on, bit for bit.
"""
import copy
import ctypes
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

import rf
import sample
from data import DEVICES, Parser, amount, fold, latest_run, multiple, natural, number, open_data, pixels, plus, positive, seed, share
from model import PRESETS, CausalDiT, load_checkpoint, load_wan, read_checkpoint
from rf import HISTORY, flow_matching_loss
from sample import compare, extend, timed

PAPER = dict(  # the other flags' defaults with --preset wan-...
    data="latents", frames=21, size=(480, 832), warmup=10_000, steps=25_000, batch=64, lr=5e-5, decay="constant", ema=0.999,
    time_shift=3.0, sample_steps=32, guidance=5.0, recompute=True)

def parse(argv):
    parser = Parser(__doc__)
    add = parser.add
    add("--data", "sprites", 'what to learn: "sprites", a folder of videos, or one of latents (.npz)')
    add("--out", None, "the run's folder (default: a new numbered one under runs/)", type=Path)
    add("--frames", None, "length of a training clip (default: 10, or more for whole chunks; 21 for Wan)", type=positive)
    add("--size", 16, "height and width in pixels, or HEIGHTxWIDTH", type=pixels)
    add("--fps", 0.0, "read videos at this rate; 0: each at its own", type=amount)
    add("--stride", 1, "take every so manieth frame of a video", type=positive)
    add("--objects", 2, "sprites in a clip", type=positive)
    add("--wall", False, "sprites pass behind a wall", action="store_true")
    add("--withheld", 0.0, "share of the sprite clips without a caption", type=share)
    add("--preset", "toy", "size of the network", choices=PRESETS)
    for flag, what in (("--dim", "width of the network, a quarter of its MLPs'"), ("--heads", "attention heads"),
                       ("--layers", "blocks"), ("--patch", "pixels along a side of a token"),
                       ("--chunk", "latent frames in a frame, the paper: 3")):
        add(flag, None, f"{what} (default: the preset's)", type=positive)
    add("--top-k", None, "history frames that each token may look at, Eq. (9) (default: all)", type=positive)
    add("--window", None, "history frames in sight, also in training (default: all)", type=positive)
    add("--history", "resample", "what the frames see of their past, after the warm-up (Table 2)", choices=HISTORY)
    add("--warmup", 2100, "steps of teacher forcing before that", type=natural)
    add("--steps", 3200, "optimizer steps in all", type=positive)
    add("--shift", 0.6, "s of Eq. (7): below 1, the resampled history stays nearer to the truth", type=plus)
    add("--resample-steps", 1, "Euler steps from t_s to 0, Eq. (5)", type=positive)
    add("--resample-share", 1.0, "share of the batches whose history is redrawn", type=share)
    add("--noise", 0.3, 'largest noise level of --history noise', type=share)
    add("--time-shift", 2.0, "Eq. (7) on the noise levels t of the loss: above 1, more noise (real images: 3 to 5)", type=plus)
    add("--drop", 0.1, "share of the clips whose text is dropped, for guidance", type=share)
    add("--batch", 16, "clips per optimizer step, over all processes", type=positive)
    add("--accumulate", 1, "passes that share an optimizer step", type=positive)
    add("--lr", 1e-2, "peak learning rate", type=plus)
    add("--lr-warmup", 100, "steps in which the learning rate rises", type=natural)
    add("--decay", "linear", "how it falls after that, to 0 at --steps", choices=("constant", "linear", "cosine"))
    add("--clip", 1.0, "largest norm of the gradient", type=plus)
    add("--ema", 0.998, "decay of the averaged weights that sampling uses", type=number(float, 0, 0.999999))
    add("--seed", 0, "of weights, clips and noise", type=seed)
    add("--init", None, "start from the weights of another run (its folder or ckpt.pt)", type=Path)
    add("--resume", False, "go on with --out, or with the latest run under runs/", action="store_true")
    add("--save-every", 500, "steps between checkpoints", type=positive)
    add("--sample-every", 500, "steps between pictures and held-out losses", type=positive)
    add("--sample-steps", 4, "Euler steps per frame in these", type=positive)
    add("--sample-shift", 5.0, "Eq. (7) on these steps: above 1, more of them at high noise", type=plus)
    add("--guidance", 2.0, "how much the text counts in these", type=amount)
    add("--workers", None, "processes that decode videos (default: 2; sprites need none)", type=natural)
    add("--precision", None, "fp32 or bf16 autocast (default: bf16 on CUDA)", choices=("fp32", "bf16"))
    add("--compile", False, "torch.compile each block, a minute at first", action="store_true")
    add("--recompute", False, "run each block again in backward and keep less: saves memory", action="store_true")
    add("--fsdp", False, "with torchrun: weights, gradients and moments spread over the processes", action="store_true")
    add("--device", DEVICES[-1], "where to run", choices=DEVICES)
    add("--dry-run", False, "say what a run would cost, and do nothing", action="store_true")
    add("--gpus", 1, "for --dry-run: how many devices share the batch", type=positive)
    add("--gpu-memory", 141.0, "for --dry-run: GiB on each", type=plus)
    add("--tflops", 989.0, "for --dry-run: what each can do at best, in 1e12 FLOPs per second", type=plus)
    add("--mfu", 0.45, "for --dry-run: the share of that which is expected", type=number(float, 0, 1, above=True))
    args = parser.parse_args(argv)
    if args.resume:  # the run's own flags, unless the command line says otherwise
        out = args.out or latest_run()
        out = out.parent if out.is_file() else out
        saved = read_checkpoint(out)["args"].items()
        parser.set_defaults(**{k: v for k, v in saved if k not in ("resume", "device", "init", "words", "fsdp")} | {"out": out})
    elif args.preset.startswith("wan"):
        parser.set_defaults(**PAPER)
    args = parser.parse_args(argv)
    chunk = args.chunk or PRESETS[args.preset].chunk
    args.frames = args.frames or multiple(max(10, 2 * chunk), chunk)
    args.precision = args.precision or ("bf16" if "cuda" in args.device or args.dry_run else "fp32")
    return args

def check_files(args):
    """What can be known of --init and --out before any data is opened, in every process alike."""
    if args.init and (args.resume or not args.init.exists()):
        raise ValueError(f"--init {args.init}: --resume goes on with its own weights; leave out one of them" if args.resume else
                         f"there is no checkpoint at {args.init}; --init wants a run's folder, its ckpt.pt, or Wan's weights")
    held = [args.out / name for name in ("", "ckpt.pt", "config.json", "log.jsonl")] if args.out else []
    if not args.resume and not args.dry_run and any(path.is_file() for path in held):
        way = "add --resume to go on with it" if held[1].is_file() else "it saved no checkpoint: delete it"
        raise ValueError(f"--out {args.out} already holds another run; {way}, or name a new folder")

def streams(seed, indices, device):
    """A context in which every clip of a batch draws its noise from a stream of its own, named by (seed, its index).
    So a step is the same on any number of processes, and the position in the data is all the random state there is."""
    keys = [np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] for index in indices]
    generators = [torch.Generator(device).manual_seed(int(key)) for key in keys]

    def by_row(draw, fill):
        def drawn(*args, **kwargs):
            out = draw(*args, **kwargs)
            for row, generator in zip(out, generators, strict=True):
                fill(row, generator=generator)
            return out
        return drawn
    normal = torch.Tensor.normal_
    return patch.multiple(rf, rand=by_row(torch.rand, torch.Tensor.uniform_), randn=by_row(torch.randn, normal),
                          randn_like=by_row(torch.randn_like, normal))

def launch(args):
    """(rank, number of processes, device); joins the group if torchrun started this process."""
    device = torch.device(args.device)
    if args.dry_run:
        return 0, args.gpus, torch.device("cuda")
    if "RANK" not in os.environ:
        if args.fsdp:
            raise ValueError("--fsdp spreads a network over processes: torchrun --nproc-per-node N train.py --fsdp would work")
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # the others wait while the first process makes pictures
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size(), device

def configure(args, data, world):
    """The network's Config, after all that can be known to be wrong has been looked for."""
    own = {key: getattr(args, key) for key in ("dim", "heads", "layers", "patch", "chunk", "top_k", "window")}
    own["ffn_dim"] = args.dim and 4 * args.dim
    config = replace(PRESETS[args.preset], **{key: value for key, value in own.items() if value is not None})
    scale = 1 if data else 8  # Wan's VAE
    height, width = np.broadcast_to(data.size if data else args.size, 2).tolist()
    args.height, args.width = height // scale, width // scale
    if data:
        config = replace(config, channels=data.channels, text_dim=data.text_dim)
        args.rate, args.words = data.fps, data.words and [data.words.vocabulary, data.words.rows]
    parts = f"the processes ({world}) times --accumulate"
    for what, value, unit, of in (
            ("--size", height, scale * config.patch, "the patch"), ("--size", width, scale * config.patch, "the patch"),
            ("--frames", args.frames, config.chunk, "the chunk"), ("--batch", args.batch, world * args.accumulate, parts)):
        if value % unit:
            raise ValueError(f"{what} {value} is not divisible by {unit}, {of}; {multiple(value, unit)} would work")
    if args.frames < 2 * config.chunk:
        raise ValueError(f"--frames {args.frames}: wanted two or more chunks of {config.chunk}; {2 * config.chunk} would work")
    if (values := config.channels * config.patch ** 2) > config.dim:
        raise ValueError(f"a patch holds {values} values, more than the width {config.dim} can carry; give a smaller --patch "
                         "or a larger --dim")
    return config

def make_optimizer(net, lr):
    """AdamW, with weight decay on matrices only: not on biases, norms and modulation."""
    groups = [{"params": [p for p in net.parameters() if (p.dim() == 2) == (decay > 0)], "weight_decay": decay}
              for decay in (0.01, 0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

def keep_memory():
    """Keep what is freed: glibc would hand it back to the system, and the next step would have to page it in again."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 2 ** 30)

def learning_rate(step, args):
    if step < args.lr_warmup:
        return args.lr * (step + 1) / args.lr_warmup
    done = (step - args.lr_warmup) / max(1, args.steps - args.lr_warmup)
    return args.lr * {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[args.decay]

def fit_weights(net, state, name, path):
    """Load a checkpoint's weights, or say in which sizes it differs from this network."""
    theirs, ours = state["config"], asdict(net.config)
    wrong = [f"{key} is {theirs.get(key)} there and {ours[key]} here" for key in ours
             if theirs.get(key) != ours[key] and key not in ("top_k", "window")]
    if wrong:
        raise ValueError(f"the model of {path} has another shape: {'; '.join(wrong)}")
    net.load_state_dict(state[name])

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)

def build(args, config, device):
    """(network, its average, optimizer, first step): new ones, with the weights of --init, or all of --resume."""
    torch.manual_seed(args.seed)
    net, path, state = CausalDiT(config).to(device), args.out if args.resume else args.init, None
    ours = path and (args.resume or path.name == "ckpt.pt" or (path / "ckpt.pt").is_file())
    if path and not ours and args.preset.startswith("wan"):
        load_wan(net, path)
    elif path:
        state = read_checkpoint(path)
        fit_weights(net, state, "model" if args.resume else "ema", path)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    if args.resume:
        if state["step"] > args.steps:
            raise ValueError(f"--steps {args.steps}: the run in {path} is already at step {state['step']}; more would go on")
        if state["args"]["words"] != args.words:
            raise ValueError(f"--data {args.data} has other captions than when {path} began: its words would change their meaning")
        ema.load_state_dict(state["ema"])
    net.recompute = args.recompute
    for module in (*net.blocks, net, *ema.blocks, ema) if args.fsdp else ():
        fully_shard(module)  # FSDP2: every process holds its part of each block, and gathers a block when it runs
    optimizer = make_optimizer(net, args.lr)
    if args.resume:
        set_optimizer_state_dict(net, optimizer, state["optimizer"], options=StateDictOptions(full_state_dict=True))
    return net, ema, optimizer, state["step"] if args.resume else 0

def save(net, ema, optimizer, step, args, rank):
    """Write ckpt.pt whole or not at all: a kill at any moment leaves the last good one. Every process takes part, and any
    number of them can load it. Random states need no place in it: all draws follow from seed, step and clip (`streams`)."""
    weights, moments = get_state_dict(net, optimizer, options=WHOLE)
    averages = get_model_state_dict(ema, options=WHOLE)
    if rank > 0:
        return
    path, part = args.out / "ckpt.pt", args.out / "ckpt.pt.part"
    try:
        with open(part, "wb") as file:
            torch.save({"config": asdict(net.config), "model": weights, "ema": averages, "optimizer": moments, "step": step,
                        "args": plain(args)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"could not save step {step} ({error}); {path} is as it was: make room, then --resume") from None

def plain(args):
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}

def batches(data, start, rank, world, args, device):
    """Yields (indices, videos, c): this process's clips of every step from `start` on."""
    local = args.batch // world
    mine = [range(i, i + local) for i in range(start * args.batch + rank * local, args.steps * args.batch, args.batch)]
    workers = args.workers if args.workers is not None else 0 if args.data == "sprites" else 2
    loader = DataLoader(data, batch_sampler=mine, num_workers=workers, generator=torch.Generator(),
                        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)
    for indices, (video, c) in zip(mine, loader):
        yield indices, video.to(device, non_blocking=True), c.to(device, non_blocking=True)

def ignore_signals(worker):
    """Workers leave Ctrl-C to their parent, which ends them when the last step is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

@contextmanager
def gathered(net):
    """Within it a sharded network's weights are gathered once, not once for every forward: for a rollout."""
    if isinstance(net, FSDPModule):
        net.set_reshard_after_forward(False)
    yield
    if isinstance(net, FSDPModule):
        net.set_reshard_after_forward(True)
        for module in (*net.blocks, net):
            module.reshard()

def alone(model, more):
    """A context for a pass whose gradients wait, if more of them are to come, before processes exchange them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not more)
    return model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext()

def learn(model, net, video, c, method, args):
    """Algorithm 1 on one batch: (loss, seconds that the history took). model is net as the loss calls it, perhaps
    spread over processes; the history is redrawn by the bare net, with the weights being trained."""
    begin = clock(video.device)
    x = fold(video, net.config.chunk)
    c = c * (rf.rand(len(c), device=c.device) >= args.drop)[:, None, None]
    with gathered(net):
        history = method(net, x[:, :-1], c, args.shift, args.resample_steps, args.noise)
    seconds = clock(video.device) - begin
    return flow_matching_loss(model, x, c, history, args.time_shift), seconds

def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

def history_at(step, args):
    """Which row of Table 2 a step trains with: teacher forcing in the warm-up and in the share not resampled."""
    resampled = np.random.default_rng([args.seed, step]).random() < args.resample_share
    return HISTORY[args.history if step >= args.warmup and resampled else "teacher"]

def agree(loss, stop, device, world):
    """(mean loss, whether any process was told to stop): the same answer in every process."""
    both = torch.stack([loss, torch.tensor(float(stop), device=device)])
    if world > 1:
        dist.all_reduce(both)
    return both[0].item() / world, both[1].item() > 0

def average(ema, net, decay, step):
    """Exponential moving average; its decay rises from 0.1, so that the first weights are soon forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)

def precision(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

def gradients(model, net, batch, method, args):
    """`learn` and its gradients, in --accumulate parts of this process's batch: (mean loss, seconds for histories)."""
    (indices, video, c), loss, seconds, parts = batch, 0, 0, args.accumulate
    for part in range(parts):
        rows = slice(part * len(video) // parts, (part + 1) * len(video) // parts)
        with streams(args.seed, indices[rows], video.device), precision(args, video.device), alone(model, part + 1 < parts):
            part_loss, part_seconds = learn(model, net, video[rows], c[rows], method, args)
            (part_loss / parts).backward()
        loss, seconds = loss + part_loss.detach() / parts, seconds + part_seconds
    return loss, seconds

def update(net, ema, optimizer, loss, step, args):
    """Clip, step, average: returns the norm of the gradient. Raises ValueError, the weights untouched, where it or the
    loss is no number."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
    norm = (norm.full_tensor() if args.fsdp else norm).item()
    if not math.isfinite(loss + norm):
        path = args.out / "ckpt.pt"
        raise ValueError(f"loss {loss} with gradient norm {norm} at step {step}: the weights were not touched; " + (
            f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet; try a lower --lr"))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    average(ema, net, args.ema, step)
    return norm

def main(argv):
    args = parse(argv)
    check_files(args)
    keep_memory()
    rank, world, device = launch(args)
    data = None if args.dry_run and args.preset.startswith("wan") else open_data(args)
    config = configure(args, data, world)
    cost = plan(args, config, data[0][1].shape[0] if data else 512, world)
    if args.dry_run:
        announce(args, config, cost, world, device)
        return print_plan(args, cost, world)
    test = open_data(args, "test") if args.data == "sprites" else data  # to look at: of a folder, its first clips
    net, ema, optimizer, start = build(args, config, device)
    if args.compile:
        net.compile_blocks()
    model = DistributedDataParallel(net) if world > 1 and not args.fsdp else net
    args.out, log = open_out(args, start, rank, world)
    if rank == 0:
        announce(args, config, cost, world, device)
        print(f"steps {start} to {args.steps}: teacher forcing until {min(args.warmup, args.steps)}, then --history "
              f"{args.history}" + ("" if args.warmup < args.steps else " (never: the warm-up is as long as the run)") +
              f"\nin {args.out}/: ckpt.pt every {args.save_every} steps, samples/ every {args.sample_every}, log.jsonl")

    told, waits, step = [], [], start
    before = {sign: signal.signal(sign, lambda *_: told.append(1)) for sign in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(timed(batches(data, start, rank, world, args, device), waits), total=args.steps, initial=start,
               disable=rank > 0, dynamic_ncols=True)
    for step, batch in enumerate(bar, start):
        begin, method = clock(device), history_at(step, args)
        loss, seconds = gradients(model, net, batch, method, args)
        loss, stop = agree(loss, bool(told), device, world)
        norm = update(net, ema, optimizer, loss, step, args)
        step, taken = step + 1, clock(device) - begin
        if rank == 0:
            log({"step": step, "loss": loss, "lr": learning_rate(step - 1, args), "norm": norm, "history": method.__name__,
                 "seconds": taken, "history_seconds": seconds, "data_seconds": waits.pop()})
            bar.set_postfix_str(f"loss {loss:.3f}, history {seconds / taken:.0%} of the time")
        show = step % args.sample_every == 0 or step == args.steps
        if show or step % args.save_every == 0 or stop:
            save(net, ema, optimizer, step, args, rank)
        if show and rank == 0:
            with precision(args, device):
                log({"step": step} | look(load_checkpoint(args.out).to(device), test, args, step))
        if stop:
            break
    bar.close()
    for sign, handler in before.items():
        signal.signal(sign, handler)
    if rank == 0 and step < args.steps:
        print(f"stopped at step {step}; go on with: python train.py --resume --out {args.out}")
    elif rank == 0:
        with precision(args, device):
            finish(test, args, cost, world, device)
    if world > 1:
        dist.barrier()  # not only for order: a process that leaves while gloo's threads still hold tensors can hang
        dist.destroy_process_group()

def open_out(args, start, rank, world):
    """The run's folder, made; and a function that appends to its log."""
    if rank == 0:
        if args.out is None:
            for args.out in (Path(f"runs/{i:03d}") for i in count(1)):
                with suppress(FileExistsError):  # another run may take the name first
                    args.out.mkdir(parents=True)
                    break
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]  # a full disk cuts the last
        path.with_suffix(".part").write_text("".join(line + "\n" for line in kept))
        path.with_suffix(".part").replace(path)
        (args.out / "config.json").write_text(json.dumps(plain(args), indent=1) + "\n")
    out = [args.out]
    if world > 1:
        dist.broadcast_object_list(out)

    def log(entry):
        with open(out[0] / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
    return out[0], log

def flops(config, N, M, P, words):
    """Of one clip's forward pass: N noisy and M history frames of P tokens, each seeing what the mask and --top-k leave."""
    D, k = config.dim, min(config.top_k or N, config.window or N)
    pairs = [sum(1 + min(i, k) for i in range(n)) * P * P for n in (N, M)]
    token, values = 12 * D * D + 4 * D * config.ffn_dim + 4 * D * words, config.channels * config.patch ** 2
    block = 4 * D * D * words + token * N * P + 4 * D * pairs[0]
    history = token * M * P + 4 * D * pairs[1]  # in the last block only its keys and values are asked for
    ends = values * (2 * N + M) * P + (config.text_dim + D) * words + (config.freq_dim + 7 * D) * (N + M)
    return config.layers * block + (config.layers - 1) * history + 4 * D * D * M * P + 2 * D * ends

def plan(args, config, words, world):
    """What a step costs: (parameters, FLOPs of a teacher-forcing step, of a resampling step, {part: bytes on each device})."""
    N, P = args.frames // config.chunk, config.chunk * args.height * args.width // config.patch ** 2
    with torch.device("meta"):
        net = CausalDiT(config)
    n, block = (sum(p.numel() for p in part.parameters()) for part in (net, net.blocks[0]))
    teacher = 3 * args.batch * flops(config, N, N - 1, P, words)
    later = (args.resample_steps - 1) * flops(config, N - 1, 0, P, words)
    resample = teacher + args.batch * (flops(config, N - 1, N - 2, P, words) + later)
    clips, held = args.batch // world // args.accumulate, 60 * config.dim + 6 * config.ffn_dim  # bytes a block keeps of a token
    keep = config.layers * 4 * config.dim + held if args.recompute else config.layers * held
    parts = {"weights": 4 * n, "gradients": 4 * n, "moments": 8 * n, "average": 4 * n}
    parts = {key: value / (world if args.fsdp else 1) for key, value in parts.items()}
    parts |= {"gathered weights": 4 * n if args.fsdp and args.history == "resample" else 8 * block if args.fsdp else 0,
              "activations": clips * (2 * N - 1) * P * keep, "cache": clips * 4 * config.layers * N * P * config.dim}
    return n, teacher, resample, parts

def announce(args, config, cost, world, device):
    """What a step takes, said before the first one."""
    n, teacher, resample, _ = cost
    tokens = (2 * args.frames - config.chunk) * args.height * args.width // config.patch ** 2 * args.batch
    print(f"{args.data}: clips of {args.frames} frames, {args.height} x {args.width}, {args.batch} per step\n"
          f"{n:,} parameters on {world} x {device.type}, {args.precision}; {tokens:,} tokens and {teacher:.2e} FLOPs per "
          f"teacher-forcing step, {resample:.2e} per resampling step")

def print_plan(args, cost, world):
    """Does it fit, what would make it fit, and how long will it take?"""
    _, teacher, resample, parts = cost
    total, later = sum(parts.values()) / 2 ** 30, max(0, args.steps - args.warmup)
    print("GiB on each: " + ", ".join(f"{key} {value / 2 ** 30:.1f}" for key, value in parts.items()) +
          f"; {total:.1f} of {args.gpu_memory:g}")
    cures = {"--recompute": not args.recompute, "--fsdp with more --gpus": not args.fsdp, "more --gpus": args.fsdp,
             "more --accumulate": args.batch > world * args.accumulate, "fewer --frames": True}
    print("this fits" if total < args.gpu_memory else
          f"this does not fit; what would help: {', '.join(cure for cure, helps in cures.items() if helps)}")
    first, second = (z / world / args.tflops / 1e12 / args.mfu for z in (teacher, resample))
    print(f"at {args.tflops:g} TFLOPS and an MFU of {args.mfu:g}: {first:.1f} s per teacher-forcing step, {second:.1f} s per "
          f"resampling step ({second / first:.2f} x), {(first * (args.steps - later) + second * later) / 3600:,.0f} hours for "
          f"{args.steps:,} steps")

def continue_clips(net, test, frames, args):
    """Four clips (4, T, ...) and what the model makes of their first frames (4, frames, ...).
    The window is that of training, so that no relative position is new however long the rollout."""
    truth, c = (z.to(net.patch_embedding.weight.device) for z in default_collate([test[i] for i in range(4)]))
    length = args.frames // net.config.chunk
    made = extend(net, truth, c, frames, 2 if length > 2 else 1, steps=args.sample_steps, time_shift=args.sample_shift,
                  guidance=args.guidance, window=length - 1)
    return {"truth": truth.cpu(), "rollout": made}

def look(net, test, args, step):
    """Pictures of continued clips, truth above and rollout below. Returns the loss under teacher forcing on them."""
    compare(args.out / "samples" / f"step_{step:06d}", continue_clips(net, test, args.frames, args), test.fps)
    losses, device = [], net.patch_embedding.weight.device
    for i in range(16):
        x, c = (z[None].to(device) for z in test[i])
        x = fold(x, net.config.chunk)
        with torch.no_grad(), streams(0, [i], device):
            losses.append(flow_matching_loss(net, x, c, x[:, :-1], args.time_shift).item())
    return {"held_out_loss": np.mean(losses)}

def finish(test, args, cost, world, device):
    """The end of a run: clips continued to four times the training length, and measured where there is a ruler."""
    path, frames, prompt = args.out / "samples" / "final", 4 * args.frames, ""
    if args.data == "sprites":
        print("held-out clips continued to four times the training length, 0 to 100 (truth itself is near 100):")
        sample.main(["--eval", "--videos=16", f"--checkpoint={args.out}", f"--out={path}.gif", f"--device={args.device}",
                     f"--frames={frames}", f"--steps={args.sample_steps}", f"--time-shift={args.sample_shift}",
                     f"--guidance={args.guidance}"])
        prompt = f' "{test.caption(0)}"'
    else:
        compare(path, continue_clips(load_checkpoint(args.out).to(device), test, frames, args), test.fps)
    print(f"{speeds(args, cost, world, device)}\nlook at {path}.gif and {path}.png (truth above, rollout below), then try\n"
          f"  python sample.py{prompt} --checkpoint {args.out}")

def speeds(args, cost, world, device):
    """Median times of the run's steps, by kind, from its log, and how far off `plan` was. What a redrawn history costs is
    told from the same steps without it: they are then teacher-forcing steps, taken in the same minutes."""
    _, teacher, resample, parts = cost
    steps = [step for step in map(json.loads, (args.out / "log.jsonl").read_text().splitlines()) if "loss" in step]
    kind, seconds, history, waits = (np.array([step[key] for step in steps])
                                     for key in ("history", "seconds", "history_seconds", "data_seconds"))
    bare, kinds = seconds - history, []
    for name in sorted({*kind}, reverse=True):
        mine, planned = kind == name, f", planned {resample / teacher:.2f} x" * (name == "resample_history")
        extra = f" ({np.median((seconds / bare)[mine]):.2f} x one without it{planned})" * (name != "teacher_history")
        kinds.append(f"{name} {1000 * np.median(seconds[mine]):.0f} ms{extra}")
    tflops = teacher / np.median(bare) / world / 1e12
    rate = f"without its history a step runs at {tflops:.3f} TFLOPS on each device"
    if device.type == "cuda":
        rate += (f", {tflops / args.tflops:.0%} of --tflops {args.tflops:g}; memory at its peak "
                 f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB, planned {sum(parts.values()) / 2 ** 30:.1f}")
    return f"median step: {', '.join(kinds)}; waiting for data {waits.sum() / (seconds + waits).sum():.1%} of the time\n{rate}"

if __name__ == "__main__":
    Parser(__doc__).guard(main, sys.argv[1:])
