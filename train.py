"""Train an autoregressive video model from scratch, without a teacher: Algorithm 1.

  python train.py                                       moving sprites, 12 minutes on two cores
  python train.py --data clips --size 64 --frames 16    a folder of your own videos
  torchrun --nproc-per-node 8 train.py --frames 60      many processes, the same batch

Training starts with teacher forcing (--warmup steps), then continues with --history: "resample"
replaces the history by the model's own reconstruction. The run's folder holds ckpt.pt, config.json,
log.jsonl and samples/. Ctrl-C saves and stops; --resume continues bit for bit.

B videos, T latent frames or pictures, N frames (chunks of them), C channels, L words.
"""

import argparse
import atexit
import copy
import ctypes
import errno
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
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from data import fold, one_line, open_data, parse_size, round_up, sides
from model import (
    PRESETS,
    CausalDiT,
    Config,
    load_checkpoint,
    load_wan,
    load_weights,
    read_checkpoint,
)
from rf import HISTORY, flow_matching_loss, shift
from sample import (
    DEVICES,
    WORLD_FLAGS,
    RunFailed,
    bounded_float,
    bounded_int,
    continue_video,
    default_device,
    evaluate,
    fraction,
    latest_run,
    memory_of,
    metrics_table,
    new_parser,
    nonnegative_float,
    nonnegative_int,
    path_type,
    positive_float,
    positive_int,
    rollout_window,
    run_main,
    save_scores,
    seed_int,
    write_comparison,
)

try:
    import fcntl
except ImportError:  # Windows has no fcntl; a run's folder is not locked there
    fcntl = None


def main(argv):
    """Train, with a log, checkpoints and pictures. Raises ValueError for flags that cannot work."""
    args = parse(argv)
    check(args)
    rank, world, device = join_processes(args)
    call_on_rank_0(check_folder, args)
    keep_memory()

    # data: any index is a clip, so the position in the data is the number of the step
    data = call_on_all(open_training_data, args)
    shown = open_data(args, "test") if args.data == "sprites" else data  # a folder holds out none
    config = make_config(args, data)
    record_data(args, data)
    check_sizes(args, data, config)
    cost = plan(args, config, data.rows if data else WAN_WORDS, world)
    if args.dry_run:
        return print_plan(args, config, cost, world)
    check_memory(args, config, cost, world, device)

    # network: net holds the weights; model is net as the loss calls it, perhaps wrapped in
    # DistributedDataParallel, whose backward averages the gradients over the processes
    net, ema, optimizers, start = call_on_all(build, args, config, device)
    model = DistributedDataParallel(net) if world > 1 and not args.fsdp else net
    args.out = call_on_rank_0(open_folder, args, start)
    print_start(args, config, cost, world, device, start)

    stop_requested = StopRequested()
    batches = load_batches(data, start, rank, world, args, device)
    steps = range(start, args.steps)
    bar = tqdm(steps, total=args.steps, initial=start, disable=rank > 0, dynamic_ncols=True)
    done = start

    for step in bar:
        began = clock(device)
        indices, videos, texts = next(batches)
        data_seconds = clock(device) - began
        make_history = history_at(step, args)  # teacher forcing, or --history
        loss = 0
        history_seconds = 0

        # each micro-batch adds to the gradient; only the last one exchanges it between processes
        for part in range(args.accumulate):
            rows = micro_batch(part, len(videos), args)
            last = part + 1 == args.accumulate
            rng = ClipNoise(args.seed, indices[rows], device)
            with autocast(args, device), no_sync_unless_last(model, last):
                # Algorithm 1, line 1: sample video and text; drop some texts, for guidance
                history_began = clock(device)
                x = fold(videos[rows], config.chunk)  # (B, N, chunk · C, height, width)
                kept = rng.rand(len(x), device=device) >= args.drop
                c = texts[rows] * kept[:, None, None]  # (B, L, text_dim)

                # Algorithm 1, lines 2-9, Eqs. (5)-(7): resample the history, no gradient
                with keep_unsharded(net):
                    history = make_history(
                        net,
                        x[:, :-1],
                        c,
                        s=args.shift,
                        steps=args.resample_steps,
                        noise=args.noise,
                        rng=rng,
                        given=args.resample_given,
                    )
                history_seconds += clock(device) - history_began

                # lines 10-12, Eqs. (3), (4): draw t per frame, add noise, compare v with eps - x
                past = x[:, :-1] if args.history == "noise" else history
                part_loss = flow_matching_loss(
                    model, x, c, history, args.time_shift, rng, args.motion, past
                )
                (part_loss / args.accumulate).backward()
            loss += part_loss.detach() / args.accumulate

        # Algorithm 1, last line: clip the gradient, step the weights, then their moving average
        loss, stop = all_reduce_loss_and_stop(loss, stop_requested, world)
        norm = clip_gradient(net, args)
        check_finite(loss, norm, step, args)
        set_learning_rate(optimizers, step, args)
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad(set_to_none=True)
        update_ema(ema, net, args.ema, step)

        done = step + 1
        seconds = clock(device) - began - data_seconds
        if rank == 0:
            entry = {
                "step": done,
                "loss": loss,
                "lr": learning_rate(step, args),
                "norm": norm,
                "history": make_history.__name__,
                "seconds": seconds,
                "history_seconds": history_seconds,
                "data_seconds": data_seconds,
            }
            append_log(args.out, entry)
            share = history_seconds / seconds
            bar.set_postfix_str(f"loss {loss:.3f}, history {share:.0%} of the step")

        show = done % args.sample_every == 0 or done == args.steps
        if show or stop or done % args.save_every == 0:
            save(net, ema, optimizers, done, args)
        if show:
            call_on_rank_0(log_samples, shown, args, done, device)
        if stop:
            break

    bar.close()
    batches.close()
    stop_requested.restore_handlers()
    if done < args.steps:
        print(f"stopped at step {done}; continue with: python train.py --resume --out {args.out}")
    else:
        call_on_rank_0(report, shown, args, cost, world, device)
    del model  # see leave_group
    leave_processes()


class ClipNoise:
    """Random numbers whose row i comes from its own generator, seeded by (seed, indices[i]).

    Takes the place of torch in rf's functions (`rng`). A step then draws the same noise on any
    number of processes, and a checkpoint needs no random state to continue bit for bit.
    """

    def __init__(self, seed, indices, device):
        self.generators = []
        for index in indices:
            key = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
            self.generators.append(torch.Generator(device).manual_seed(int(key)))

    def rand(self, *shape, device=None, dtype=None):
        """Uniform in [0, 1); shape[0] is the number of clips."""
        out = torch.empty(shape, device=device, dtype=dtype)
        for row, generator in zip(out, self.generators, strict=True):
            row.uniform_(generator=generator)
        return out

    def randn(self, *shape, device=None, dtype=None):
        """Standard normal; shape[0] is the number of clips."""
        out = torch.empty(shape, device=device, dtype=dtype)
        for row, generator in zip(out, self.generators, strict=True):
            row.normal_(generator=generator)
        return out


def history_at(step, args):
    """What makes the history in a step, a function of rf.HISTORY.

    Teacher forcing in the warm-up, and in the share of later batches that is not resampled.
    """
    resampled = np.random.default_rng([args.seed, step]).random() < args.resample_share
    name = args.history if step >= args.warmup and resampled else "teacher"
    return HISTORY[name]


def learning_rate(step, args):
    """Rise linearly to --lr in --lr-warmup steps; then decay to 0 at --steps, or stay constant."""
    if step < args.lr_warmup:
        return args.lr * (step + 1) / args.lr_warmup

    done = (step - args.lr_warmup) / max(1, args.steps - args.lr_warmup)
    if args.decay == "linear":
        return args.lr * (1 - done)
    if args.decay == "cosine":
        return args.lr * (1 + math.cos(math.pi * done)) / 2
    return args.lr


def set_learning_rate(optimizers, step, args):
    """Set the learning rates of a step: Muon's follows the curve of AdamW's, from another peak."""
    for optimizer in optimizers:
        peak = args.muon_lr if isinstance(optimizer, Muon) else args.lr
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate(step, args) / args.lr


def make_optimizers(net, name):
    """The optimizers of --optimizer, a list; `set_learning_rate` sets their rates.

    "adamw": AdamW for everything. "muon": Muon for the matrices of the blocks, AdamW for the rest.
    Weight decay acts on matrices only: not on biases, norms and modulation.
    """
    in_muon, matrices, others = [], [], []
    for parameter_name, p in net.named_parameters():
        if name == "muon" and takes_muon(parameter_name, p):
            in_muon.append(p)
        elif p.dim() == 2:
            matrices.append(p)
        else:
            others.append(p)

    groups = [
        {"params": matrices, "weight_decay": 0.01},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)]
    if in_muon:
        optimizers.append(Muon(in_muon, lr=0.0, weight_decay=0.01))
    return optimizers


def takes_muon(name, p):
    """Whether --optimizer muon gives a parameter to Muon: the matrices of the blocks."""
    return name.startswith("blocks.") and p.dim() == 2


@torch.no_grad()
def update_ema(ema, net, decay, step):
    """Move the averaged weights toward net's: ema = decay · ema + (1 - decay) · net.

    The decay rises from 0.1 to its final value, so that the first weights are soon forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


# ---- machinery: Muon, flags and checks, processes, data, checkpoints, log, cost, pictures ----


class Muon(torch.optim.Muon):
    """torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), iterating in the gradient's precision.

    It makes the update of each matrix nearly orthogonal, and as large as one of AdamW
    (arXiv 2502.16982). torch's own class iterates in bfloat16. On a CPU without instructions for
    it (AVX2) a default training step then takes 2 to 2.5 times as long (`results/bench_step.py`),
    and the rounding drives runs on one process and on two apart. On a GPU bfloat16 is faster.
    """

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = self.state[p]["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])  # Nesterov's
                update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"])

                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])
        return loss


def orthogonalize(matrix, coefficients, steps):
    """Move the singular values of a matrix near 1, by the Newton-Schulz iteration of Muon."""
    a, b, c = coefficients
    wide = matrix.shape[0] <= matrix.shape[1]
    z = matrix if wide else matrix.T  # so that z z.T is the smaller of the two products
    z = z / z.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = z @ z.T
        z = a * z + (b * gram + c * gram @ gram) @ z
    return z if wide else z.T


PAPER = {  # defaults of --preset wan-...
    "data": "latents",
    "frames": 21,
    "size": (480, 832),
    "warmup": 10_000,
    "steps": 25_000,
    "batch": 64,
    "optimizer": "adamw",
    "lr": 5e-5,
    "decay": "constant",
    "ema": 0.999,
    "time_shift": 3.0,
    "sample_steps": 32,
    "sample_shift": 5.0,
    "guidance": 5.0,
    "recompute": True,
}
WAN_SCALE = 8  # pixels along a side of one of Wan's latents
WAN_WORDS = 512  # text rows of its encoder
GIB = 2**30
MFU = 0.45  # model FLOPs utilization that the plan expects: the fraction of --tflops


def parse(argv):
    """Flags. With --resume the run's own are the defaults, with --preset wan-... the paper's."""
    parser = new_parser(__doc__)
    add_data_flags(parser.add_argument_group("data").add_argument)
    add_network_flags(parser.add_argument_group("network").add_argument)
    add_method_flags(parser.add_argument_group("method").add_argument)
    add_optimizer_flags(parser.add_argument_group("optimization").add_argument)
    add_run_flags(parser.add_argument_group("run").add_argument)
    add_picture_flags(parser.add_argument_group("pictures").add_argument)
    add_machine_flags(parser.add_argument_group("machine").add_argument)
    add_plan_flags(parser.add_argument_group("cost of a run").add_argument)

    args = parser.parse_args(argv)
    if args.resume:
        folder = args.out or latest_run()
        if folder.is_file():
            folder = folder.parent  # --out RUN/ckpt.pt
        parser.set_defaults(**flags_of_run(folder, parser))
    elif args.preset.startswith("wan"):
        parser.set_defaults(**PAPER)

    args = parser.parse_args(argv)
    if args.resume:
        args.out = folder
    chunk = args.chunk or PRESETS[args.preset].chunk
    args.frames = args.frames or round_up(max(10, 2 * chunk), chunk)
    half_precision = "cuda" in args.device or args.dry_run
    args.precision = args.precision or ("bf16" if half_precision else "fp32")
    return args


# fmt: off
def add_data_flags(add):
    add("--data", default="sprites",
        help='"sprites", a folder of videos, or a folder of latents (.npz) (default: %(default)s)')
    add("--frames", type=bounded_int(1, 10**9),
        help="length of a training clip (default: 10, rounded up to whole chunks; Wan: 21)")
    add("--size", type=parse_size, default=32,
        help="height and width in pixels, or HEIGHTxWIDTH (default: %(default)s)")
    add("--fps", type=nonnegative_float, default=0.0,
        help="read videos at this rate; 0: each at its own (default: %(default)s)")
    add("--stride", type=positive_int, default=1,
        help="keep every STRIDE-th frame of a video (default: %(default)s)")
    add("--objects", type=positive_int, default=2,
        help="sprites in a clip (default: %(default)s)")
    add("--wall", action="store_true",
        help="let sprites pass behind a wall")
    add("--withheld", type=fraction, default=0.0,
        help="fraction of sprite clips without a caption (default: %(default)s)")
    add("--workers", type=bounded_int(0, 64),
        help="processes that decode videos (default: 2; none for sprites)")


def add_network_flags(add):
    add("--preset", choices=PRESETS, default="toy",
        help="size of the network (default: %(default)s)")
    add("--dim", type=bounded_int(1, 2**16),
        help="width; the MLPs are four times as wide (default: the preset's)")
    add("--heads", type=bounded_int(1, 2**16),
        help="attention heads (default: the preset's)")
    add("--layers", type=bounded_int(1, 1000),
        help="blocks (default: the preset's)")
    add("--patch", type=bounded_int(1, 1024),
        help="side of a token in pixels or latents (default: the preset's)")
    add("--predict", choices=("v", "x"),
        help="what the network's last layer returns: the velocity v, or the clean frame x, for "
             "patches of more values than --dim (default: the preset's: x; Wan: v)")
    add("--detail", type=bounded_int(0, 2**16),
        help="channels of the convolutions behind the tokens, which sharpen pixels: try 32 "
             "(default: the preset's: 0, none)")
    add("--detail-frames", type=bounded_int(0, 1024),
        help="frames right before each noisy one that these convolutions see, too, for small "
             "things that move: try 2, with --history noise --warmup 0 (default: the preset's: 0)")
    add("--detail-strips", action="store_true",
        help="tell each pixel what these convolutions find anywhere in its row and column, for "
             "things that follow one another from afar, as a paddle follows a ball")
    add("--chunk", type=bounded_int(1, 1024),
        help="latent frames in an autoregressive frame; the paper: 3 (default: the preset's)")
    add("--top-k", type=positive_int,
        help="history frames that each token attends to, Eq. (9) (default: all)")
    add("--window", type=positive_int,
        help="attend to at most this many past frames, in training too (default: all)")


def add_method_flags(add):
    add("--history", choices=HISTORY, default="resample",
        help="the history that frames attend to after the warm-up, Table 2 (default: %(default)s)")
    add("--warmup", type=nonnegative_int, default=3000,
        help="steps of teacher forcing before that (default: %(default)s)")
    add("--shift", type=positive_float, default=0.6,
        help="s of Eq. (7); lower: the history stays nearer to the truth (default: %(default)s)")
    add("--resample-steps", type=bounded_int(1, 1000), default=1,
        help="Euler steps from t_s to 0, Eq. (5) (default: %(default)s)")
    add("--resample-given", type=bounded_int(0, 2**16), default=0,
        help="first frames of a clip that stay true where the history is resampled, for small "
             "things, which noise erases: try 2 (default: %(default)s)")
    add("--resample-share", type=fraction, default=1.0,
        help="fraction of batches with --history; the others have the true one (default: "
             "%(default)s)")
    add("--noise", type=fraction, default=0.3,
        help="highest noise level of --history noise (default: %(default)s)")
    add("--time-shift", type=positive_float, default=3.0,
        help="Eq. (7) on t of the loss; higher: more noise; real video: 3-5 (default: %(default)s)")
    add("--motion", type=nonnegative_float, default=0.0,
        help="weigh pixels near those that just moved more in the loss, so that small moving "
             "things are learned sooner: try 4 (default: %(default)s, Eq. (4))")
    add("--drop", type=fraction, default=0.1,
        help="fraction of clips whose text is dropped, for guidance (default: %(default)s)")


def add_optimizer_flags(add):
    add("--steps", type=bounded_int(1, 10**9), default=4800,
        help="optimizer steps, warm-up included (default: %(default)s)")
    add("--batch", type=bounded_int(1, 10**9), default=8,
        help="clips per optimizer step, over all processes (default: %(default)s)")
    add("--accumulate", type=positive_int, default=1,
        help="split each process's batch into this many micro-batches (default: %(default)s)")
    add("--optimizer", choices=("muon", "adamw"), default="muon",
        help="muon: Muon for the matrices of the blocks, AdamW for the rest; adamw: AdamW for all "
             "(default: %(default)s; Wan: adamw)")
    add("--lr", type=positive_float, default=7e-3,
        help="peak learning rate of AdamW (default: %(default)s)")
    add("--muon-lr", type=positive_float, default=0.02,
        help="peak learning rate of Muon (default: %(default)s)")
    add("--lr-warmup", type=nonnegative_int, default=100,
        help="steps in which the learning rates rise (default: %(default)s)")
    add("--decay", choices=("constant", "linear", "cosine"), default="linear",
        help="how the learning rates fall to 0 at --steps, or constant (default: %(default)s)")
    add("--clip", type=positive_float, default=1.0,
        help="clip the norm of the gradient to this (default: %(default)s)")
    add("--ema", type=bounded_float(0, 0.999999), default=0.999,
        help="decay of the averaged weights, which sampling uses (default: %(default)s)")
    add("--seed", type=seed_int, default=0,
        help="seed of weights, clips and noise (default: %(default)s)")


def add_run_flags(add):
    add("--out", type=path_type,
        help="the run's folder (default: a new numbered one under runs/)")
    add("--init", type=path_type,
        help="start from the weights of another run (its folder or ckpt.pt), or from Wan's")
    add("--resume", action="store_true",
        help="continue --out, or the latest run under runs/")
    add("--save-every", type=positive_int, default=500,
        help="steps between checkpoints (default: %(default)s)")


def add_picture_flags(add):
    add("--sample-every", type=positive_int, default=500,
        help="steps between pictures; the log gets the loss of 16 clips then: held_out_loss of "
             "sprites, clip_loss of a folder, which holds out none (default: %(default)s)")
    add("--sample-steps", type=bounded_int(1, 1000), default=4,
        help="Euler steps per frame in pictures (default: %(default)s)")
    add("--sample-shift", type=positive_float, default=10.0,
        help="Eq. (7) on these steps; higher: more of them at high noise (default: %(default)s)")
    add("--guidance", type=nonnegative_float, default=1.5,
        help="scale of classifier-free guidance in pictures; 1: none (default: %(default)s)")


def add_machine_flags(add):
    add("--device", choices=DEVICES, default=default_device(),
        help="cpu, cuda, cuda:INDEX or mps, where torch has it (default: %(default)s)")
    add("--precision", choices=("fp32", "bf16"),
        help="fp32, or bf16 autocast (default: bf16 on CUDA)")
    add("--compile", action="store_true",
        help="torch.compile each block; takes a minute at first")
    add("--recompute", action="store_true",
        help="recompute each block in backward instead of keeping its activations")
    add("--fsdp", action="store_true",
        help="with torchrun: shard weights, gradients and moments over the processes")


def add_plan_flags(add):
    add("--dry-run", action="store_true",
        help="print what a run would cost, and stop")
    add("--gpus", type=bounded_int(1, 10**6), default=1,
        help="devices that share the batch (default: %(default)s)")
    add("--gpu-memory", type=bounded_float(1e-3, 1e6), default=141.0,
        help="GiB on each (default: %(default)s)")
    add("--tflops", type=bounded_float(1e-3, 1e6), default=989.0,
        help="peak speed of each in 1e12 FLOPs per second (default: %(default)s)")
# fmt: on


def flags_of_run(folder, parser):
    """The flags that a run was started with, for --resume.

    Raises ValueError if the parser would refuse one of them.
    """
    refuse_if_in_use(folder)
    usual = vars(parser.parse_args([]))
    for name in ("resume", "device", "init", "fsdp", "out"):
        del usual[name]
    saved = read_checkpoint(folder)["args"]
    names = [name for name in usual if name in saved]

    argv = []
    for name in names:
        value = saved[name]
        flag = "--" + name.replace("_", "-")
        if isinstance(value, tuple):
            value = "x".join(map(str, value))  # --size 480x832
        if type(value) is not type(usual[name]) or value != usual[name]:
            argv.append(flag if value is True else f"{flag}={value}")
    parser.exit_on_error = False
    try:
        flags = vars(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        raise ValueError(f"{folder} is no run of train.py: {one_line(error)}") from None
    parser.exit_on_error = True
    return {name: flags[name] for name in names}


def check(args):
    """Raise ValueError for flags that cannot work, before any data is opened."""
    if args.resume and args.init:
        raise ValueError(
            f"--init {args.init}: --resume continues with its own weights; leave out one of them"
        )
    if args.init and not args.init.exists():
        raise ValueError(
            f"there is no checkpoint at {args.init}; --init wants a run's folder, its ckpt.pt, "
            "or Wan's weights"
        )
    if args.fsdp and not args.dry_run and "RANK" not in os.environ:
        raise ValueError(
            "--fsdp shards a network over processes: "
            "torchrun --nproc-per-node N train.py --fsdp would work"
        )
    check_network(args)

    parts = world_size(args) * args.accumulate
    unit_name = f"the processes ({world_size(args)}) times --accumulate"
    check_divisible("--batch", args.batch, parts, unit_name)


def check_network(args):
    """Raise ValueError if the network's sizes do not fit together."""
    preset = PRESETS[args.preset]
    dim = args.dim or preset.dim
    heads = args.heads or preset.heads
    chunk = args.chunk or preset.chunk

    if dim % (2 * heads):
        raise ValueError(
            f"--dim {dim} cannot be split into --heads {heads} of an even width; "
            f"--dim {round_up(dim, 2 * heads)} would work"
        )
    if args.frames < 2 * chunk and args.history != "teacher":
        raise ValueError(
            f"--frames {args.frames}: wanted two or more chunks of {chunk}, or there is no history "
            f"to resample; {2 * chunk} would work, or --history teacher"
        )
    check_divisible("--frames", args.frames, chunk, "the chunk")
    check_detail(args, preset, args.frames // chunk)
    check_resample_given(args, args.frames // chunk)


def check_detail(args, preset, frames):
    """Raise ValueError for --detail-frames or --detail-strips without convolutions.

    Also for more --detail-frames than clips can show.
    """
    detail = preset.detail if args.detail is None else args.detail
    wanted = args.detail_frames or 0
    needs = {f"--detail-frames {wanted}": wanted, "--detail-strips": args.detail_strips}
    for flag, given in needs.items():
        if given and not detail:
            raise ValueError(f"{flag} needs convolutions; --detail 32 would work")
    if wanted >= frames:
        raise ValueError(
            f"--detail-frames {wanted}: a clip has {frames} frames, {frames - 1} before the last; "
            f"{frames - 1} or less would work"
        )


def check_resample_given(args, frames):
    """Raise ValueError for --resample-given if no frame of the history is left to resample."""
    if args.resample_given and args.resample_given >= frames - 1:
        raise ValueError(
            f"--resample-given {args.resample_given}: a clip has {frames} frames, and the last is "
            f"nobody's history; {max(0, frames - 2)} or less would work"
        )


def check_divisible(flag, value, unit, unit_name):
    """Raise ValueError, with the next value that would work, if unit does not divide value."""
    if value % unit:
        raise ValueError(
            f"{flag} {value} is not divisible by {unit}, {unit_name}; "
            f"{round_up(value, unit)} would work"
        )


def check_folder(args):
    """Raise ValueError if --out is in use, or holds a run that this one would overwrite."""
    if args.out and not args.dry_run:
        refuse_if_in_use(args.out)
        if not args.resume:
            refuse_other_run(args.out)


def refuse_other_run(out):
    """Raise ValueError if the folder holds a run or a config.json, or is a file."""
    if out.is_file():
        raise ValueError(f"--out {out} is a file; wanted a folder")
    if (out / "ckpt.pt").exists():
        raise ValueError(
            f"--out {out} already holds another run; add --resume to continue it, or name a new "
            "folder"
        )
    if (out / "log.jsonl").exists():
        raise ValueError(
            f"--out {out} already holds another run, which saved no checkpoint; name a new folder"
        )
    if (out / "config.json").exists():
        raise ValueError(f"--out {out} holds config.json already; name a new folder")


def check_sizes(args, data, config):
    """Raise ValueError if patches do not tile the frames, or hold more than v can be read from."""
    unit = config.patch if data else WAN_SCALE * config.patch
    for side in sides(data.size if data else args.size):
        check_divisible("--size", side, unit, "the patch")

    values = config.channels * config.patch**2
    if config.predict == "v" and values > config.dim:
        raise ValueError(
            f"a patch holds {values} values, and with --predict v a token of width {config.dim} "
            "must carry all of their noise; --predict x, a smaller --patch or a larger --dim would "
            "work"
        )


def check_memory(args, config, cost, world, device):
    """Raise ValueError if a step cannot fit into memory, before anything is allocated."""
    clip = 4 * args.frames * config.channels * args.height * args.width  # bytes
    needed = sum(cost.memory.values()) + clip * args.batch // world
    if device.type != "cuda":  # these processes share the machine's memory
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    limit = memory_of(device)
    if needed > limit:
        raise ValueError(
            f"--size {args.height}x{args.width} --frames {args.frames} --batch {args.batch} --dim "
            f"{config.dim} --layers {config.layers}: a step needs {needed / GIB:,.0f} GiB, and the "
            f"limit is this machine's {limit / GIB:,.0f}; less of one, or more --accumulate, would "
            "work"
        )


def world_size(args):
    """Processes that share the batch."""
    return args.gpus if args.dry_run else int(os.environ.get("WORLD_SIZE", 1))


def join_processes(args):
    """Join the group if torchrun started this process. Returns (rank, world size, device)."""
    device = torch.device(args.device)
    if args.dry_run or "RANK" not in os.environ:
        return 0, world_size(args), device

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # pictures take a while
        atexit.register(leave_group)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # only rank 0 prints
    return dist.get_rank(), dist.get_world_size(), device


def leave_processes():
    """Wait for all processes, then destroy the process group."""
    if dist.is_initialized():
        dist.barrier()
        leave_group()


def leave_group():
    """Destroy the process group. Delete all other references to the group first.

    Gloo's threads need the GIL to free their last tensors, and its destructor waits for them. If
    DistributedDataParallel held the group last, it would wait with the GIL, that is for ever.
    """
    if dist.is_initialized():
        time.sleep(0.1)  # without the GIL
        dist.destroy_process_group()


def call_on_all(function, *args):
    """Call function in every process; if it fails in one, all raise that error.

    Otherwise the rest would wait for a process that is gone.
    """
    if not dist.is_initialized():
        return function(*args)

    result = error = None
    try:
        result = function(*args)
    except RunFailed as problem:
        error = problem
    except (ValueError, OSError) as problem:
        error = ValueError(one_line(problem))
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise error
    return result


def call_on_rank_0(function, *args):
    """Call function in process 0 only; all processes return its result or raise its error."""
    if not dist.is_initialized():
        return function(*args)

    if dist.get_rank() == 0:
        answer = [call_on_all(function, *args)]
    else:
        answer = [call_on_all(lambda: None)]  # only takes part in the exchange of errors
    dist.broadcast_object_list(answer)
    return answer[0]


def all_reduce_loss_and_stop(loss, stop_requested, world):
    """Average the loss over processes; stop all if one was asked to. Returns (float, bool)."""
    both = torch.stack([loss, torch.full_like(loss, float(stop_requested.value))])
    if world > 1:
        dist.all_reduce(both)
    loss, stop = both.tolist()
    return loss / world, stop > 0


def no_sync_unless_last(model, last):
    """Context: `no_sync()` on all but the last micro-batch, so gradients are exchanged once."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


@contextmanager
def keep_unsharded(net):
    """Gather the weights of an FSDP network once for a whole rollout, not once per forward."""
    if isinstance(net, FSDPModule):
        net.set_reshard_after_forward(False)
    yield
    if isinstance(net, FSDPModule):
        net.set_reshard_after_forward(True)
        for module in (*net.blocks, net):
            module.reshard()


class StopRequested:
    """Record SIGINT and SIGTERM, so that the loop can finish its step and save."""

    def __init__(self):
        self.value = False
        self.handlers = {}
        for sign in (signal.SIGINT, signal.SIGTERM):
            self.handlers[sign] = signal.signal(sign, self.note)

    def note(self, sign, frame):
        self.value = True
        if sign == signal.SIGINT and "RANK" not in os.environ:  # torchrun sends it a second time
            signal.signal(sign, self.handlers[sign])
            tqdm.write("stopping after this step; Ctrl-C again stops at once, without saving")

    def restore_handlers(self):
        for sign, handler in self.handlers.items():
            signal.signal(sign, handler)


def keep_memory():
    """Stop glibc from returning freed memory to the system.

    The next step would page it in again: 25,000 page faults, 5 to 10 % of a default step on a CPU.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 2**30)


def clock(device):
    """Seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def autocast(args, device):
    """Context: the --precision of the network's passes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def open_training_data(args):
    """The dataset of --data; None for the plan of a Wan run, which needs none."""
    if args.dry_run and args.preset.startswith("wan"):
        return None
    return open_data(args)


def record_data(args, data):
    """Add to args the frame size, rate and vocabulary, so that checkpoints record them."""
    scale = 1 if data else WAN_SCALE
    args.height, args.width = (side // scale for side in sides(data.size if data else args.size))
    if data:
        args.rate = data.fps
        args.words = data.words and [data.words.vocabulary, data.words.rows]


class BatchSampler:
    """This process's share of the clip numbers of each step's batch.

    Step i of a run trains on clips i · batch to (i + 1) · batch - 1, for any number of processes.
    """

    def __init__(self, start, steps, batch, rank, world):
        self.start = start
        self.steps = steps
        self.batch = batch
        self.rank = rank
        self.world = world

    def __len__(self):
        return self.steps - self.start

    def __iter__(self):
        share = self.batch // self.world
        for step in range(self.start, self.steps):
            first = step * self.batch + self.rank * share
            yield range(first, first + share)


def load_batches(data, start, rank, world, args, device):
    """Yield (indices, videos (B, T, C, height, width), texts (B, L, text_dim)) of each step."""
    workers = args.workers
    if workers is None:
        workers = 0 if args.data == "sprites" else 2

    sampler = BatchSampler(start, args.steps, args.batch, rank, world)
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=workers,
        generator=torch.Generator(),  # the loader draws a seed; not from the global generator
        pin_memory=device.type == "cuda",
        multiprocessing_context=start_method(workers, world),
        worker_init_fn=leave_signals_to_parent,
    )
    try:
        for indices, (videos, texts) in zip(sampler, loader):
            videos = videos.to(device, non_blocking=True)
            texts = texts.to(device, non_blocking=True)
            yield indices, videos, texts
    except (ValueError, OSError) as error:
        if world == 1:
            raise
        raise RuntimeError(one_line(error)) from error  # so that torchrun ends the others, too


def start_method(workers, world):
    """How the loader starts its workers; None: as the platform does.

    A process group has threads, and a process forked beside them may wait for ever for a lock that
    one of them held.
    """
    threads = world > 1
    return "forkserver" if workers and threads and hasattr(os, "fork") else None


def leave_signals_to_parent(worker):
    """Ignore Ctrl-C in a loader's worker: its parent ends it when the last step is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def micro_batch(part, clips, args):
    """The slice of a process's clips that is micro-batch number `part`."""
    return slice(part * clips // args.accumulate, (part + 1) * clips // args.accumulate)


def make_config(args, data):
    """The preset's Config with the flags that were given, and the data's channels and text."""
    changes = {
        "dim": args.dim,
        "ffn_dim": args.dim and 4 * args.dim,
        "heads": args.heads,
        "layers": args.layers,
        "patch": args.patch,
        "chunk": args.chunk,
        "predict": args.predict,
        "detail": args.detail,
        "detail_frames": args.detail_frames,
        "detail_strips": args.detail_strips or None,
        "top_k": args.top_k,
        "window": args.window,
        "channels": data.channels if data else None,
        "text_dim": data.text_dim if data else None,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(PRESETS[args.preset], **given)


def build(args, config, device):
    """Build the network, its EMA and the optimizers. Returns them and the first step.

    The weights are new, or those of --init; with --resume all of it comes from the checkpoint.
    """
    torch.manual_seed(args.seed)
    net = CausalDiT(config).to(device)
    state = fill_weights(net, args)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    if args.resume:
        load_weights(ema, state["ema"], args.out)
    net.recompute = args.recompute

    if args.fsdp:
        for module in (*net.blocks, net, *ema.blocks, ema):
            fully_shard(module)  # each process holds its part of a block and gathers it to run it
    if args.compile:
        net.compile_blocks()
    optimizers = make_optimizers(net, args.optimizer)
    if args.resume:
        load_moments(net, optimizers, state, args.out)
        return net, ema, optimizers, state["step"]
    return net, ema, optimizers, 0


def fill_weights(net, args):
    """Fill net with the weights of --resume or --init. Returns the checkpoint, or None.

    Raises ValueError if it is of another shape, of other words, or beyond --steps.
    """
    path = args.out if args.resume else args.init
    if path is None:
        return None
    is_run = args.resume or path.name == "ckpt.pt" or (path / "ckpt.pt").is_file()
    if not is_run and args.preset.startswith("wan"):
        if net.config.predict != "v":
            raise ValueError(f"--predict {net.config.predict}: the weights of Wan predict v")
        load_wan(net, path)
        return None

    state = read_checkpoint(path)
    check_same_shape(state["config"], asdict(net.config), path)
    check_same_words(state, args, path)
    if args.resume:
        check_same_run(state, net, args)
    load_weights(net, state["model" if args.resume else "ema"], path)
    return state


def check_same_shape(theirs, ours, path):
    """Raise ValueError that names the sizes in which a checkpoint differs from the network."""
    theirs = asdict(Config(**theirs))  # older checkpoints lack later fields
    wrong = []
    for name, value in ours.items():
        if name not in ("top_k", "window") and theirs[name] != value:
            wrong.append(f"{name} is {theirs[name]} there and {value} here")
    if wrong:
        raise ValueError(f"the model of {path} has another shape: {'; '.join(wrong)}")


def check_same_words(state, args, path):
    """Raise ValueError if the captions' vocabulary is not the one the weights were trained on.

    --init may add captions to a run without, or leave them out.
    """
    theirs = state["args"].get("words")
    same = theirs == args.words
    if args.init:
        both = isinstance(theirs, list) and args.words
        same = not both or theirs[:1] == args.words[:1]  # the vocabulary
    if not same:
        raise ValueError(
            f"--data {args.data}: the captions differ from those {path} was trained on"
        )


def check_same_run(state, net, args):
    """Raise ValueError if training cannot continue from the checkpoint; warn of other clips."""
    step = state["step"]
    if "optimizer" not in state:
        raise ValueError(f"{args.out} holds no optimizer state to resume; --init would work")
    was = state["args"]
    optimizer = was.get("optimizer", "adamw")  # older runs had no choice
    if optimizer != args.optimizer:
        raise ValueError(
            f"--optimizer {args.optimizer}: the run in {args.out} was trained with {optimizer}; "
            f"--optimizer {optimizer} would work, or --init"
        )
    if step < 0 or (step > 0 and not has_moments(state["optimizer"], net, args.optimizer)):
        raise ValueError(
            f"{args.out} holds step {step} and no optimizer state that fits its weights; --init "
            "would work"
        )
    if step > args.steps:
        raise ValueError(
            f"--steps {args.steps}: the run in {args.out} is already at step {step}; a larger "
            "--steps would work"
        )

    changed = [name for name in WORLD_FLAGS if name in was and was[name] != vars(args)[name]]
    if changed:
        texts = [f"--{name} {was[name]} -> {vars(args)[name]}" for name in changed]
        print(f"warning: the clips differ from those of the steps so far: {', '.join(texts)}")


def has_moments(state, net, optimizer):
    """Whether an optimizer's state holds the moments of each of the network's parameters."""
    try:
        for name, p in net.named_parameters():
            moments = state["state"][name]
            if optimizer == "muon" and takes_muon(name, p):
                found = [moments["momentum_buffer"]]
            else:
                found = [moments["exp_avg"], moments["exp_avg_sq"]]
                if moments["step"].numel() != 1:
                    return False
            if any((z.shape, z.dtype) != (p.shape, p.dtype) for z in found):
                return False
    except (KeyError, TypeError, AttributeError):
        return False
    return True


def load_moments(net, optimizers, state, path):
    """Load a checkpoint's optimizer state. Raises ValueError if torch cannot."""
    whole = StateDictOptions(full_state_dict=True)
    try:
        set_optimizer_state_dict(net, optimizers, state["optimizer"], options=whole)
    except Exception as error:  # the exception class depends on the damage
        raise ValueError(
            f"the optimizer state of {path} is damaged ({one_line(error)}); --init would work"
        ) from None


def clip_gradient(net, args):
    """Scale the gradient so that its norm is at most --clip. Returns the norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
    if args.fsdp:
        norm = norm.full_tensor()
    return norm.item()


def check_finite(loss, norm, step, args):
    """Raise RunFailed if the loss or the gradient is NaN or infinite; no weight has changed."""
    if math.isfinite(loss + norm):
        return
    path = args.out / "ckpt.pt"
    if path.exists():
        way_out = f"the last good checkpoint is {path}"
    else:
        way_out = "there is no checkpoint yet; try a lower --lr"
    raise RunFailed(
        f"loss {loss} with gradient norm {norm} at step {step}: the weights were not touched; "
        f"{way_out}"
    )


def save(net, ema, optimizers, step, args):
    """Write ckpt.pt. All processes take part, and any number of them can load it.

    No random state is saved: noise derives from (seed, clip), see `ClipNoise`.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(net, optimizers, options=whole)
    state = {
        "config": asdict(net.config),
        "model": weights,
        "ema": get_model_state_dict(ema, options=whole),
        "optimizer": moments,
        "step": step,
        "args": jsonable(args),
    }
    call_on_rank_0(write_checkpoint, args.out / "ckpt.pt", state)


def write_checkpoint(path, state):
    """Save atomically: a kill at any moment leaves the last good checkpoint.

    Raises RunFailed if the disk is full or not writable.
    """
    part = path.with_name("ckpt.pt.part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        # torch's own writer turns an OSError into a RuntimeError about inline_container.cc
        reason = getattr(error, "strerror", None) or "disk full or not writable"
        full = getattr(error, "errno", errno.ENOSPC) == errno.ENOSPC
        way_out = f"{path} is unchanged" if path.exists() else "nothing is saved yet"
        if full and path.exists():
            way_out += ": free disk space, then --resume"
        raise RunFailed(
            f"could not save step {state['step']} to {path} ({reason}); {way_out}"
        ) from None


def jsonable(args):
    """The flags as a dictionary that JSON can hold."""
    flags = dict(vars(args))
    for name, value in flags.items():
        if isinstance(value, Path):
            flags[name] = str(value)
    return flags


def open_folder(args, start):
    """Make the run's folder, lock it, cut its log back to step `start`. Returns its path."""
    with name_in_errors(args.out or "runs/"):
        out = args.out or new_folder()
        out.mkdir(parents=True, exist_ok=True)
        hold_folder(out)
    if args.resume:
        delete_parts(out)
    else:
        refuse_other_run(out)  # another run may have used the folder meanwhile
    with name_in_errors(out / "log.jsonl"):
        cut_log(out / "log.jsonl", start)
    with name_in_errors(out / "config.json"):
        (out / "config.json").write_text(json.dumps(jsonable(args) | {"out": str(out)}, indent=1))
    return out


def delete_parts(out):
    """Delete the half-written files of a killed run."""
    for pattern in ("ckpt.pt.part", "log.part", "samples/.step_*", "samples/.final*"):
        for path in out.glob(pattern):
            with suppress(OSError):
                path.unlink()


def new_folder():
    """Make the first of runs/001, runs/002, ... that does not exist."""
    for number in count(1):
        path = Path(f"runs/{number:03d}")
        with suppress(FileExistsError):  # another run may take the name first
            path.mkdir(parents=True)
            return path


@contextmanager
def name_in_errors(path):
    """Turn an OSError, which may name no file, into a ValueError that names path."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or one_line(error)}") from None


def hold_folder(out):
    """Lock the run's folder until this process ends. Raises ValueError if another holds it.

    The file stays, and names the process that locked it last.
    """
    if fcntl is None:
        return
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # closed by the end of the process
    if not try_lock(lock, fcntl.LOCK_EX):
        raise in_use(out)
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())


def refuse_if_in_use(out):
    """Raise ValueError if a live process holds the lock of the run's folder."""
    if fcntl is None or not (out / ".lock").is_file():
        return
    with open(out / ".lock") as lock:
        if not try_lock(lock, fcntl.LOCK_SH):
            raise in_use(out)


def try_lock(lock, kind):
    """Take a POSIX record lock on an open file. Returns False if another process holds one.

    It dies with its process however that ends, and the loader's workers do not inherit it.
    """
    try:
        fcntl.lockf(lock, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        print(
            "warning: this file system does not support locks; do not start two runs in one folder"
        )
    return True


def in_use(out):
    """The ValueError for a folder whose lock another process holds."""
    process = (out / ".lock").read_text(errors="replace")
    return ValueError(f"{out} is in use by process {process}; wait for it, or name another --out")


def cut_log(path, step):
    """Delete log entries after `step`; warn of damaged lines."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    entries = [(line, read_entry(line)) for line in lines]
    kept = [line for line, entry in entries if entry and entry["step"] <= step]

    damaged = sum(entry is None for _, entry in entries)
    if damaged:
        print(f"warning: skipped {damaged} damaged lines of {path}")
    part = path.with_suffix(".part")
    part.write_text("".join(line + "\n" for line in kept))
    part.replace(path)


def read_entry(line):
    """A line of log.jsonl as a dictionary, or None if it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return None
    return entry


def append_log(out, entry):
    """Add a line to log.jsonl. If the disk is full, warn and continue."""
    path = out / "log.jsonl"
    try:
        with open(path, "a") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        tqdm.write(f"warning: cannot write {path}: {error.strerror}")


def flops(config, N, M, P, words, first=0):
    """FLOPs of one clip's forward pass: N noisy and M history frames of P tokens.

    The noisy frames are numbered first, first + 1, ..., the history from 0. Each frame attends to
    what the mask, --window and --top-k leave.
    """
    D = config.dim
    values = config.channels * config.patch**2
    pairs = P * P * (attended_frames(config, first + N) - attended_frames(config, first))
    history_pairs = P * P * attended_frames(config, M)

    token = 12 * D * D + 4 * D * config.ffn_dim + 4 * D * words
    block = 4 * D * D * words + token * N * P + 4 * D * pairs
    history = token * M * P + 4 * D * history_pairs
    last_history = 4 * D * D * M * P  # only keys and values are computed of it in the last block
    ends = values * (2 * N + M) * P
    ends += (config.text_dim + D) * words + (config.freq_dim + 7 * D) * (N + M)
    blocks = config.layers * block + (config.layers - 1) * history + last_history
    return blocks + 2 * D * ends + N * detail_flops(config, P)


def detail_flops(config, P):
    """FLOPs of `model.DetailHead` on a frame of P tokens, without strips: under 1 % of them."""
    W = config.detail
    places = P // config.chunk * config.patch**2 // config.detail_scale**2
    weights = 9 * W * (config.detail_inputs + config.detail_values + 2 * W)
    return 2 * (places * weights + config.dim * 2 * W)


def attended_frames(config, n):
    """How many frames n frames attend to in all, themselves included: Fig. 3c."""
    k = min(config.top_k or n, config.window or n, n)
    return n + k * (k - 1) // 2 + (n - k) * k


class Cost(NamedTuple):
    parameters: int
    teacher: int  # FLOPs of a teacher-forcing step, over all processes
    resample: int  # FLOPs of a resampling step; without --history parallel or resample, teacher's
    ratio: float  # time of a resampling step over teacher's at one speed; --recompute counts
    memory: dict  # {part: bytes in each process}


def plan(args, config, words, world):
    """Estimate the FLOPs and memory of a step, from the sizes alone.

    words: text rows L of a clip; world: processes. Returns a `Cost`.
    """
    N = args.frames // config.chunk
    P = config.chunk * args.height * args.width // config.patch**2
    forward = args.batch * flops(config, N, N - 1, P, words)
    teacher = 3 * forward  # backward costs two forwards
    resample = teacher
    resamples = redraws_history(args)
    redrawn = N - 1 - args.resample_given
    if N > 1 and resamples:
        first_step = flops(config, redrawn, N - 2, P, words, args.resample_given)
        later_step = flops(config, redrawn, 0, P, words, args.resample_given)
        resample += args.batch * (first_step + (args.resample_steps - 1) * later_step)

    with torch.device("meta"):
        net = CausalDiT(config)
    weights = 4 * sum(p.numel() for p in net.parameters())
    in_muon = [p for name, p in net.named_parameters() if takes_muon(name, p)]
    moments = 2 * weights  # AdamW keeps two, Muon one
    if args.optimizer == "muon":
        moments -= 4 * sum(p.numel() for p in in_muon)
    block = 4 * sum(p.numel() for p in net.blocks[0].parameters())
    clips = args.batch // world // args.accumulate
    size = 2 if args.precision == "bf16" else 4  # bytes of what autocast computes
    token = (61 + 7.5 * size) * config.dim + 2 * size * config.ffn_dim  # kept by a block, fitted
    blocks = config.layers - 0.25  # the last one keeps less of the history
    kept = 4 * config.dim * config.layers + token if args.recompute else token * blocks
    place = 0
    if config.detail:  # the last convolution is outside of autocast
        place = size * (config.detail_inputs + 6 * config.detail) + 4 * config.detail
        place += size * config.detail * config.detail_strips
    places = N * args.height * args.width // config.detail_scale**2  # of the convolutions

    shards = world if args.fsdp else 1
    gathered = 0
    if args.fsdp:
        gathered = weights if resamples else 2 * block
    memory = {
        "weights": weights / shards,
        "gradients": weights / shards,
        "moments": moments / shards,
        "average": weights / shards,
        "gathered weights": gathered,
        "activations": clips * ((2 * N - 1) * P * kept + places * place),
        "cache": 2 * size * clips * config.layers * N * P * config.dim,
    }
    if config.detail_frames:
        pixels = config.chunk * config.channels * args.height * args.width
        memory["cache"] += 4 * clips * N * pixels
    computed = 4 * forward if args.recompute else teacher
    ratio = 1 + (resample - teacher) / computed
    return Cost(weights // 4, teacher, resample, ratio, memory)


def print_cost(args, config, cost, world, device_type):
    """Print the size of a step."""
    frames = args.batch * (2 * args.frames - config.chunk)
    tokens = frames * args.height * args.width // config.patch**2
    text = (
        f"{args.data}: clips of {args.frames} frames, {args.height} x {args.width}, {args.batch} "
        f"per step\n{cost.parameters:,} parameters on {world} x {device_type}, {args.precision}; "
        f"{tokens:,} tokens and {cost.teacher:.2e} FLOPs per teacher-forcing step"
    )
    if cost.resample > cost.teacher:
        text += f", {cost.resample:.2e} per resampling step"
    print(text)


def print_start(args, config, cost, world, device, start):
    """Print what the run will do."""
    print_cost(args, config, cost, world, device.type)
    never = "" if args.warmup < args.steps else " (never: the warm-up is as long as the run)"
    print(
        f"steps {start} to {args.steps}: teacher forcing until {min(args.warmup, args.steps)}, "
        f"then --history {args.history}{never}\nin {args.out}/: ckpt.pt every {args.save_every} "
        f"steps, samples/ every {args.sample_every}, log.jsonl"
    )
    warn_of_untrained_redraw(args, config)
    warn_of_clean_history(args, config, start)


def warn_of_untrained_redraw(args, config):
    """Warn if the history is redrawn from levels that the loss does not train.

    Only with detail_frames: these convolutions of finished frames are not normalized, so that the
    error of a redrawn frame may grow from frame to frame, up to a loss that is not finite.
    """
    if not config.detail_frames or not redraws_history(args) or args.warmup >= args.steps:
        return
    level, share = least_redraw_level(args)
    if share < 1e-3:
        print(
            f"warning: the history is redrawn from levels down to t = {level:.2g}, and only "
            f"{share:.0e} of the loss is below; frames may grow without bound; "
            "a lower --time-shift helps"
        )


def warn_of_clean_history(args, config, start=0):
    """Warn if the convolutions of `detail_frames` are trained with teacher forcing from now on."""
    always = args.history == "teacher" or args.resample_share < 1
    end = args.steps if always else min(args.warmup, args.steps)
    if config.detail_frames and start < end:
        print(
            f"warning: teacher forcing until step {end} with --detail-frames: the convolutions "
            "learn to copy a clean history, and rollouts fall apart; begin with a run of --history "
            "noise --warmup 0"
        )


def redraws_history(args):
    """Whether --history calls the network."""
    return args.history in ("parallel", "resample")


def least_redraw_level(args):
    """The level at which the last Euler step of a typical redraw begins, and what trains it.

    Returns (t, share): t is that of the median t_s = s / (1 + s), Eqs. (6) and (7), and share the
    probability that the loss draws a smaller one: its levels are logit-normal, at --time-shift.
    """
    s, steps = args.shift, args.resample_steps
    t = shift(0.5, s) / steps
    logit = math.log(s) - math.log(steps + (steps - 1) * s)  # of t; 1 - t may round to 0
    share = NormalDist().cdf(logit - math.log(args.time_shift))
    return t, share


def print_plan(args, config, cost, world):
    """Print whether a run fits, what would make it fit, and how long it takes."""
    print_cost(args, config, cost, world, "cuda")
    total = sum(cost.memory.values()) / GIB
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in cost.memory.items())
    print(f"GiB on each: {parts}; {total:.1f} of {args.gpu_memory:g}")
    if total < args.gpu_memory:
        print("this fits")
    else:
        print(f"this does not fit; what would help: {', '.join(savings(args, world))}")

    speed = world * args.tflops * 1e12 * MFU
    first = cost.teacher / speed
    second = first * cost.ratio
    later = args.resample_share * max(0, args.steps - args.warmup)
    hours = (first * (args.steps - later) + second * later) / 3600
    text = (
        f"at {args.tflops:g} TFLOPS and an MFU of {MFU:g}: {first:.1f} s per teacher-forcing step"
    )
    if second > first:
        text += f", {second:.1f} s per resampling step ({cost.ratio:.2f} x)"
    print(f"{text}, {hours:,.0f} hours for {args.steps:,} steps")


def savings(args, world):
    """The flags that would save memory."""
    flags = []
    if not args.recompute:
        flags.append("--recompute")
    flags.append("more --gpus" if args.fsdp else "--fsdp with more --gpus")
    if args.batch > world * args.accumulate:
        flags.append("more --accumulate")
    return [*flags, "fewer --frames"]


def continue_clips(net, clips, frames, args):
    """Continue the first two frames of four clips, or the first one where clips have but two.

    Returns {"truth": (4, T, C, height, width), "rollout": (4, frames, C, height, width)}.
    """
    device = net.patch_embedding.weight.device
    truth, c = default_collate([clips[i] for i in range(4)])
    made = continue_video(
        net,
        truth.to(device),
        c.to(device),
        frames,
        given=min(2, args.frames // net.config.chunk - 1),
        steps=args.sample_steps,
        time_shift=args.sample_shift,
        guidance=args.guidance,
        window=rollout_window(net.config, args.frames),
    )
    return {"truth": truth, "rollout": made}


def log_samples(clips, args, step, device):
    """Draw continued clips, truth above rollout, and log the loss under teacher forcing."""
    net = load_checkpoint(args.out).to(device)
    with autocast(args, device):
        videos = continue_clips(net, clips, args.frames, args)
        write_comparison(args.out / "samples" / f"step_{step:06d}", videos, clips.fps)
        loss = loss_of_clips(net, clips, args, device)
    name = "held_out_loss" if args.data == "sprites" else "clip_loss"
    append_log(args.out, {"step": step, name: loss})


@torch.no_grad()
def loss_of_clips(net, clips, args, device):
    """The mean loss of 16 clips under teacher forcing, with the same noise at every step."""
    losses = []
    for i in range(16):
        video, c = (z[None].to(device) for z in clips[i])
        x = fold(video, net.config.chunk)
        rng = ClipNoise(0, [i], device)
        losses.append(flow_matching_loss(net, x, c, x[:, :-1], args.time_shift, rng).item())
    return np.mean(losses)


def report(clips, args, cost, world, device):
    """Continue clips to four times the training length, measure sprites, print the speed."""
    net = load_checkpoint(args.out).to(device)
    path = args.out / "samples" / "final"
    several = args.frames > net.config.chunk  # a clip of one frame has nothing to continue
    frames = 4 * args.frames if several else args.frames

    with autocast(args, device):
        if args.data == "sprites" and several:
            videos = measure_rollouts(net, frames, args)
        else:
            videos = continue_clips(net, clips, frames, args)
    write_comparison(path, videos, clips.fps)

    print_speed(args, cost, world, device)
    prompt = f' "{clips.caption(0)}"' if args.data == "sprites" else ""
    print(
        f"look at {path}.gif and {path}.png (truth above, rollout below), then try\n"
        f"  python sample.py{prompt} --checkpoint {args.out}"
    )


def is_step(entry):
    """Whether a log entry is a step's, with all that `print_speed` reads."""
    times = [entry.get(name) for name in ("seconds", "history_seconds", "data_seconds")]
    return isinstance(entry.get("history"), str) and all(isinstance(z, float) for z in times)


def measure_rollouts(net, frames, args):
    """Print and save the metrics of 16 held-out clips continued to `frames` frames.

    Returns the first four of them, {"truth": (4, frames, ...), the run's name: the same}.
    """
    settings = {
        "frames": frames,
        "videos": 16,
        "steps": args.sample_steps,
        "time_shift": args.sample_shift,
        "guidance": args.guidance,
        "window": rollout_window(net.config, args.frames),
    }
    print(
        "held-out clips continued to four times the training length, 0 to 100 (truth itself is "
        f"near 100):\n16 videos, {frames} frames, the first {2 * net.config.chunk} given, window "
        f"{settings['window']}, {args.sample_steps} steps"
    )
    truth, made, scores = evaluate(net, **settings)
    print(metrics_table(scores))
    save_scores(args.out / "samples" / "eval.json", settings, scores)
    return {"truth": truth[:4], args.out.name: made[:4]}


def print_speed(args, cost, world, device):
    """Print the median time of a step by its history, from the log, beside the plan.

    Resampling overhead = step time / (step time - history time): the same steps without their
    history are teacher-forcing steps, taken in the same minutes.
    """
    entries = map(read_entry, (args.out / "log.jsonl").read_text(errors="replace").splitlines())
    steps = [entry for entry in entries if entry and is_step(entry)]
    if not steps:
        return
    names = np.array([step["history"] for step in steps])
    seconds = np.array([step["seconds"] for step in steps])
    bare = seconds - np.array([step["history_seconds"] for step in steps])
    waits = np.array([step["data_seconds"] for step in steps])

    texts = []
    for name in sorted(set(names), reverse=True):
        of_name = names == name
        text = f"{name.removesuffix('_history')} {1000 * np.median(seconds[of_name]):.0f} ms"
        if name != "teacher_history":
            text += f" ({np.median((seconds / bare)[of_name]):.2f} x one without it"
            if name == "resample_history":
                text += f", planned {cost.ratio:.2f} x"
            text += ")"
        texts.append(text)
    waiting = waits.sum() / (seconds + waits).sum()
    print(f"median step: {', '.join(texts)}; waiting for data {waiting:.1%} of the time")

    tflops = cost.teacher / np.median(bare) / world / 1e12
    text = f"without its history a step runs at {tflops:.3f} TFLOPS on each device"
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / GIB
        text += f", {tflops / args.tflops:.0%} of --tflops {args.tflops:g}; memory at its peak "
        text += f"{peak:.1f} GiB, planned {sum(cost.memory.values()) / GIB:.1f}"
    print(text)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
