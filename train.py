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
import copy
import json
import math
import os
import signal
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import count
from pathlib import Path

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
from torch.utils.data import default_collate
from tqdm import tqdm

from data import (
    DEVICES,
    WORLDS,
    Parser,
    fold,
    number,
    one_line,
    open_data,
    picture_size,
    replacing,
    round_up,
    run_main,
    sides,
    warn,
)
from model import PRESETS, CausalDiT, load_checkpoint, load_wan, load_weights, read_checkpoint
from rf import HISTORY, flow_matching_loss
from sample import (
    GIVEN,
    HISTORY_NAMES,
    autocast,
    continue_clips,
    continue_held_out,
    default_sampler,
    held_out,
    latest_run,
    measure_held_out,
    metrics_table,
    write_comparison,
)


def main(argv):
    """Train, with a log, checkpoints and pictures. Raises ValueError for flags that cannot work."""
    args = parse(argv)
    check_run(args)
    rank, world, device = join_processes(args)
    data = open_training_data(args)  # any index is a clip
    config = make_config(args, data)
    check_sizes(args, config, world)
    net, ema, optimizers, start = build(args, config, device)
    args.out = open_folder(args, start, rank)

    # what the loss calls: its backward averages the gradients over the processes
    averaged = net if world == 1 or args.fsdp else DistributedDataParallel(net)
    print_start(args, net, world, device, start)
    stop_requested = catch_signals()
    bar = tqdm(range(start, args.steps), total=args.steps, initial=start, disable=rank > 0)
    done = start

    for step in bar:
        began = time.perf_counter()
        indices, videos, texts = load_batch(data, step, rank, world, args, device)
        make_history = history_at(step, args)  # teacher forcing, or --history
        loss = 0

        # each micro-batch adds to the gradient; only the last one exchanges it between processes
        for part in range(args.accumulate):
            rows = slice(part, None, args.accumulate)
            last = part + 1 == args.accumulate
            rng = ClipNoise(args.seed, indices[rows], device)
            with autocast(args.precision, device), exchange_gradients(averaged, last):
                # Algorithm 1, line 1: sample video and text; drop some texts, for guidance
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
                    )

                # lines 10-12, Eqs. (3), (4): draw t per frame, add noise, compare v with eps - x
                part_loss = flow_matching_loss(averaged, x, c, history, args.time_shift, rng)
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
        entry = {"step": done, "loss": loss, "lr": learning_rate(step, args), "norm": norm}
        entry |= {"history": make_history.__name__, "seconds": time.perf_counter() - began}
        write_log(args.out, entry, rank)
        bar.set_postfix_str(f"loss {loss:.3f}")

        show = done % args.sample_every == 0 or done == args.steps
        if show or stop or done % args.save_every == 0:
            save(net, ema, optimizers, done, args, rank)
        if show and rank == 0:
            log_samples(args, data, done, device)
        if stop:
            break

    bar.close()
    restore_signals()
    if rank == 0:
        report(args, data, done, device)
    del averaged  # it holds the group of processes
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
        if p.dim() != 2:
            others.append(p)
        elif name == "muon" and parameter_name.startswith("blocks."):
            in_muon.append(p)
        else:
            matrices.append(p)

    groups = [
        {"params": matrices, "weight_decay": 0.01},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)]
    if in_muon:
        optimizers.append(Muon(in_muon, lr=0.0, weight_decay=0.01))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made nearly orthogonal (arXiv 2502.16982).

    It is scaled to be as large as one of AdamW. torch.optim.Muon iterates in bfloat16, which is
    slow on a CPU without instructions for it, and makes runs on one process and on two diverge.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]))  # Nesterov's

                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def orthogonalize(matrix, steps=5):
    """Move the singular values of a matrix near 1, by the Newton-Schulz iteration of Muon."""
    a, b, c = 3.4445, -4.775, 2.0315
    wide = matrix.shape[0] <= matrix.shape[1]
    z = matrix if wide else matrix.T  # so that z z.T is the smaller of the two products
    z = z / z.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = z @ z.T
        z = torch.addmm(z, torch.addmm(gram, gram, gram, beta=b, alpha=c), z, beta=a)
    return z if wide else z.T


@torch.no_grad()
def update_ema(ema, net, decay, step):
    """Move the averaged weights toward net's: ema = decay · ema + (1 - decay) · net.

    The decay rises from 0.1 to its final value, so that the first weights are soon forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


# ---- machinery: flags, processes, data, network, the run's folder, pictures ----

count_of = number(int, 1)
fraction = number(float, 0, 1)
positive = number(float, 1e-9)

FLAGS = {  # group: (flag, type or choices, default, help)
    "data": [
        ("--data", str, "sprites",
         '"sprites", "hidden" (a wall hides them, no captions), or a folder of videos or latents'),
        ("--frames", count_of, None,
         "length of a training clip (default: 10, rounded up to whole chunks; Wan: 21)"),
        ("--size", picture_size, 32, "height and width in pixels, or HEIGHTxWIDTH"),
        ("--fps", number(float, 0), 0.0, "read videos at this rate; 0: each at its own"),
        ("--objects", number(int, 1, 6), 2, "sprites in a clip"),
    ],
    "network": [
        ("--preset", tuple(PRESETS), "toy", "size of the network; wan-...: the paper's recipe"),
        ("--dim", count_of, None, "width; the MLPs are four times as wide (default: the preset's)"),
        ("--heads", count_of, None, "attention heads (default: the preset's)"),
        ("--layers", count_of, None, "blocks (default: the preset's)"),
        ("--patch", count_of, None,
         "side of a token in pixels or latents (default: the preset's)"),
        ("--chunk", count_of, None,
         "latent frames in an autoregressive frame; the paper: 3 (default: the preset's)"),
        ("--top-k", count_of, None,
         "history frames that each token attends to, Eq. (9) (default: all)"),
        ("--window", count_of, None,
         "attend to at most this many past frames, in training too (default: all)"),
    ],
    "method": [
        ("--history", tuple(HISTORY), "resample",
         "the history that frames attend to after the warm-up, Table 2"),
        ("--warmup", number(int, 0), 3000, "steps of teacher forcing before that"),
        ("--shift", positive, 0.6, "s of Eq. (7) on t_s; lower: a history nearer to the truth"),
        ("--resample-steps", count_of, 1, "Euler steps from t_s to 0, Eq. (5)"),
        ("--resample-share", fraction, 1.0,
         "fraction of batches with --history; the others have the true one"),
        ("--noise", fraction, 0.3, "highest noise level of --history noise"),
        ("--time-shift", positive, 3.0,
         "Eq. (7) on t of the loss; higher: more noise; real video: 3-5"),
        ("--drop", fraction, 0.1, "fraction of clips whose text is dropped, for guidance"),
    ],
    "optimization": [
        ("--steps", count_of, 4800, "optimizer steps, warm-up included"),
        ("--batch", count_of, 8, "clips per optimizer step, over all processes"),
        ("--accumulate", count_of, 1, "split each process's batch into this many micro-batches"),
        ("--optimizer", ("muon", "adamw"), "muon",
         "muon: Muon for the matrices of the blocks, AdamW for the rest; adamw: AdamW for all"),
        ("--lr", positive, 5e-3, "peak learning rate of AdamW"),
        ("--muon-lr", positive, 0.015, "peak learning rate of Muon"),
        ("--lr-warmup", number(int, 0), 100, "steps in which the learning rates rise"),
        ("--decay", ("constant", "linear", "cosine"), "constant",
         "how the learning rates fall to 0 at --steps, or constant"),
        ("--clip", positive, 1.0, "clip the norm of the gradient to this"),
        ("--ema", number(float, 0, 0.999999), 0.999,
         "decay of the averaged weights, which sampling uses"),
        ("--seed", number(int, 0, 2**63 - 1), 0, "seed of weights, clips and noise"),
    ],
    "run": [
        ("--out", Path, None, "the run's folder (default: a new numbered one under runs/)"),
        ("--init", Path, None,
         "start from the weights of another run (its folder or ckpt.pt), or from Wan's"),
        ("--resume", bool, False, "continue --out, or the latest run under runs/"),
        ("--save-every", count_of, 500, "steps between checkpoints"),
        ("--sample-every", count_of, 500,
         "steps between pictures, and between losses of 16 clips, held-out ones of sprites"),
    ],
    "machine": [
        ("--device", DEVICES, DEVICES[-1], "where to run"),
        ("--precision", ("fp32", "bf16"), None, "fp32, or bf16 autocast (default: bf16 on CUDA)"),
        ("--compile", bool, False, "torch.compile each block; takes a minute at first"),
        ("--recompute", bool, False,
         "recompute each block in backward instead of keeping its activations"),
        ("--fsdp", bool, False,
         "with torchrun: shard weights, gradients and moments over the processes"),
    ],
}  # fmt: skip
PAPER = {  # defaults of --preset wan-...
    "data": "latents",
    "frames": 21,
    "warmup": 10_000,
    "steps": 25_000,
    "batch": 64,
    "optimizer": "adamw",
    "lr": 5e-5,
    "recompute": True,
}
# flags that --resume does not restore
OF_THE_CALL = ("out", "init", "resume", "device", "compile", "fsdp")


def parse(argv):
    """Flags. With --resume the run's own are the defaults, with --preset wan-... the paper's."""
    parser = Parser(__doc__)
    for group, flags in FLAGS.items():
        add = parser.add_argument_group(group).add_argument
        for flag, kind, default, text in flags:
            text += "" if default is None or kind is bool else " (default: %(default)s)"
            if kind is bool:
                add(flag, action="store_true", help=text)
            elif isinstance(kind, tuple):
                add(flag, choices=kind, default=default, help=text)
            else:
                add(flag, type=kind, default=default, help=text)

    args = parser.parse_args(argv)
    saved = {}
    if args.resume:
        out = args.out or latest_run()
        if out is None:
            raise ValueError("--resume: there is no run under runs/; name one with --out")
        state = read_checkpoint(out)
        saved = {name: z for name, z in state["args"].items() if name not in OF_THE_CALL}
        parser.set_defaults(**saved)
    elif args.preset.startswith("wan"):
        parser.set_defaults(**PAPER)
    args = parser.parse_args(argv)
    if args.resume:
        args.out = out.parent if out.is_file() else out

    chunk = args.chunk or PRESETS[args.preset].chunk
    args.frames = args.frames or round_up(max(10, 2 * chunk), chunk)
    args.precision = args.precision or ("bf16" if "cuda" in args.device else "fp32")
    if saved and saved["steps"] != args.steps and args.decay != "constant":
        before = learning_rate(state["step"], argparse.Namespace(**(vars(args) | saved)))
        warn(
            f"with --steps {args.steps} in place of {saved['steps']} the learning rate goes on at "
            f"{learning_rate(state['step'], args):.2g}, not at {before:.2g}; --lr sets its peak"
        )
    return args


def check_run(args):
    """Raise ValueError for a folder that cannot be used, or flags that need others."""
    if args.resume and args.init:
        raise ValueError("--resume goes on with the run's own weights; leave out --init")
    if args.fsdp and "RANK" not in os.environ:
        raise ValueError("--fsdp needs processes: torchrun --nproc-per-node 2 train.py --fsdp")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; wanted a folder")
    for name in ("ckpt.pt", "log.jsonl", "config.json"):
        if args.out and (args.out / name).exists() and not args.resume:
            raise ValueError(
                f"--out {args.out} holds a run; --resume would continue it, or name another folder"
            )


def check_sizes(args, config, world):
    """Raise ValueError for sizes that do not fit together."""
    chunk, unit = config.chunk, world * args.accumulate
    if args.frames % chunk or (args.frames < 2 * chunk and args.history != "teacher"):
        least = max(2 * chunk, round_up(args.frames, chunk))
        raise ValueError(
            f"--frames {args.frames}: wanted whole chunks of {chunk}, and two of them, or there is "
            f"no history to resample; {least} would work"
        )
    for side in (args.height, args.width):
        if side % config.patch:
            raise ValueError(
                f"--size {side}: wanted a multiple of {config.patch}, the patch; "
                f"{round_up(side, config.patch)} would work"
            )
    if args.batch % unit:
        raise ValueError(
            f"--batch {args.batch}: wanted a multiple of {unit}, the processes ({world}) times "
            f"--accumulate; {round_up(args.batch, unit)} would work"
        )


def join_processes(args):
    """Join the group if torchrun started this process. Returns (rank, world size, device)."""
    device = torch.device(args.device)
    if "RANK" not in os.environ:
        return 0, 1, device

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # decoding takes a while
    return dist.get_rank(), dist.get_world_size(), device


def all_reduce_loss_and_stop(loss, stop_requested, world):
    """Average the loss over processes; stop all if one was asked to. Returns (float, bool)."""
    both = torch.stack([loss, torch.full_like(loss, bool(stop_requested))])
    if world > 1:
        dist.all_reduce(both)
    loss, stop = both.tolist()
    return loss / world, stop > 0


def exchange_gradients(model, last):
    """Context of a micro-batch: the last one averages the gradients over the processes."""
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


def catch_signals():
    """A list that SIGINT or SIGTERM puts an entry in, so that the loop can save and stop."""
    caught = []

    def note(sign, frame):
        caught.append(sign)
        if "RANK" not in os.environ:  # torchrun sends it twice
            signal.signal(signal.SIGINT, signal.default_int_handler)
            tqdm.write("stopping after this step; Ctrl-C again stops at once, without saving")

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return caught


def restore_signals():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def open_training_data(args):
    """The dataset of --data; adds its frame size, rate and vocabulary to args, for checkpoints."""
    others_wait = dist.is_initialized() and int(os.environ["LOCAL_RANK"]) > 0
    if others_wait:  # the first process of a machine decodes videos
        dist.barrier()
    data = open_data(args)
    if dist.is_initialized() and not others_wait:
        dist.barrier()
    args.height, args.width = sides(data.size)
    args.rate = data.fps
    args.words = data.words and [data.words.vocabulary, data.words.rows]
    return data


def load_batch(data, step, rank, world, args, device):
    """This process's share of a step's clips: indices, videos (B, T, C, height, width), texts.

    Step i of a run trains on clips i · batch to (i + 1) · batch - 1, for any number of processes.
    """
    share = args.batch // world
    first = step * args.batch + rank * share
    indices = range(first, first + share)
    videos, texts = default_collate([data[i] for i in indices])
    return indices, videos.to(device), texts.to(device)


def make_config(args, data):
    """The preset's Config with the flags that were given, and the data's channels and text."""
    names = ("dim", "heads", "layers", "patch", "chunk", "top_k", "window")
    given = {name: getattr(args, name) for name in names if getattr(args, name)}
    if args.dim:
        given["ffn_dim"] = 4 * args.dim
    return replace(PRESETS[args.preset], **given, channels=data.channels, text_dim=data.text_dim)


def build(args, config, device):
    """Build the network, its EMA and the optimizers. Returns them and the first step.

    The weights are new, or those of --init; with --resume all of it comes from the checkpoint.
    """
    torch.manual_seed(args.seed)
    net = CausalDiT(config).to(device)
    state = load_start(net, args)
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
    if not args.resume:
        return net, ema, optimizers, 0
    try:
        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(net, optimizers, state["optimizer"], options=whole)
    except Exception as error:  # its class depends on what differs
        raise ValueError(
            f"{args.out} cannot be resumed: its optimizer's state is not that of --optimizer "
            f"{args.optimizer} ({one_line(error)[:100]}); --init would work"
        ) from None
    return net, ema, optimizers, state["step"]


def load_start(net, args):
    """Fill net with the weights of --resume or --init. Returns the checkpoint, or None.

    Raises ValueError if it is of another shape, of other words, or beyond --steps.
    """
    path = args.out if args.resume else args.init
    if path is None:
        return None
    if not path.exists():
        raise ValueError(f"there is no {path}; wanted a run's folder, its ckpt.pt or Wan's weights")
    of_wan = args.preset.startswith("wan") and not (path / "ckpt.pt").exists()
    if of_wan and path.name != "ckpt.pt":
        load_wan(net, path)
        return None

    state = read_checkpoint(path)
    theirs, ours = asdict(state["config"]), asdict(net.config)
    names = [k for k in ours if k not in ("top_k", "window") and theirs[k] != ours[k]]
    if names:
        wrong = ", ".join(f"{k} is {theirs[k]} there and {ours[k]} here" for k in names)
        raise ValueError(f"the network of {path} has another shape: {wrong}")
    load_weights(net, state["model" if args.resume else "ema"], path)
    words = state["args"].get("words")
    if words and args.words and list(words[0]) != args.words[0]:
        raise ValueError(f"{path} was trained with other words than the captions of {args.data}")
    if args.resume and state["step"] > args.steps:
        raise ValueError(
            f"--steps {args.steps}: {path} is already at step {state['step']}; more would work"
        )
    return state


def clip_gradient(net, args):
    """Scale the gradient so that its norm is at most --clip. Returns the norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
    if args.fsdp:
        norm = norm.full_tensor()
    return norm.item()


def check_finite(loss, norm, step, args):
    """Raise ValueError if the loss or the gradient is NaN or infinite; no weight has changed."""
    if not math.isfinite(loss + norm):
        path = args.out / "ckpt.pt"
        saved = f"{path} is the last good one" if path.exists() else "none is saved yet"
        raise ValueError(
            f"loss {loss} with gradient norm {norm} at step {step}: the weights were not touched; "
            f"{saved}; a lower --lr and --muon-lr may help"
        )


def save(net, ema, optimizers, step, args, rank):
    """Write ckpt.pt atomically. All processes take part, and any number of them can load it.

    No random state is saved: noise derives from (seed, clip), see `ClipNoise`.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(net, optimizers, options=whole)
    averages = get_model_state_dict(ema, options=whole)
    if rank > 0:
        return
    state = {"config": asdict(net.config), "model": weights, "ema": averages}
    state |= {"optimizer": moments, "step": step, "args": flags_of(args)}
    path = args.out / "ckpt.pt"
    try:
        with replacing(path) as part, open(part, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch has a RuntimeError for a full disk
        raise OSError(f"cannot write {path} ({one_line(error)[:80]}); is the disk full?") from None


def flags_of(args):
    """The flags as a dictionary that a checkpoint and JSON can hold."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def open_folder(args, start, rank):
    """Make the run's folder and cut its log back to step `start`. Returns its path."""
    out = args.out
    if rank == 0:
        out = out or new_folder()
        (out / "samples").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(flags_of(args), indent=1))
        cut_log(out / "log.jsonl", start)
    if dist.is_initialized():
        shared = [out]
        dist.broadcast_object_list(shared)
        (out,) = shared
    return out


def new_folder():
    """Make the first of runs/001, runs/002, ... that does not exist."""
    for n in count(1):
        path = Path(f"runs/{n:03d}")
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def cut_log(path, step):
    """Delete what a log holds of later steps, and a line that a kill cut short."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line[-1] == "\n" and json.loads(line)["step"] <= step]
        with replacing(path) as part:
            part.write_text("".join(kept))


def write_log(out, entry, rank=0):
    """Add a line to log.jsonl."""
    if rank == 0:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")


def print_start(args, net, world, device, start):
    """Print what the run will do."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    parameters = sum(p.numel() for p in net.parameters())
    print(
        f"{args.data}: clips of {args.frames} frames, {args.height} x {args.width}, {args.batch} a "
        f"step; {parameters:,} parameters on {world} x {device.type}, {args.precision}\n"
        f"steps {start} to {args.steps}: teacher forcing until {min(args.warmup, args.steps)}, "
        f"then --history {args.history}; in {args.out}/: ckpt.pt, log.jsonl and samples/"
    )


def continue_some(net, clips, frames, args):
    """Continue four clips, or one of latents. Returns {"truth": (B, T, ...), "continued": ...}."""
    count = 1 if args.words is None else 4  # the cache of latents is large
    truth, c = default_collate([clips[i] for i in range(count)])
    device = net.head.modulation.device
    given = min(GIVEN, args.frames // net.config.chunk - 1)
    settings = default_sampler(net)
    made = continue_clips(net, truth.to(device), c.to(device), frames, given, **settings)
    return {"truth": truth, "continued": made}


@torch.no_grad()
def log_samples(args, data, step, device):
    """Draw continued clips, truth above them, and log the loss of 16 under teacher forcing."""
    net = load_checkpoint(args.out).to(device)
    clips, name = data, "clip_loss"  # a folder holds out none
    if args.data in WORLDS:
        clips, name = held_out(net.run, args.frames), "held_out_loss"

    losses = []
    with autocast(args.precision, device):
        videos = continue_some(net, clips, args.frames, args)
        for i in range(16):
            video, c = (z[None].to(device) for z in clips[i])
            x, rng = fold(video, net.config.chunk), ClipNoise(0, [i], device)
            losses.append(flow_matching_loss(net, x, c, x[:, :-1], args.time_shift, rng).item())
    write_comparison(args.out / "samples" / f"step_{step:06d}.gif", videos, data.fps)
    write_log(args.out, {"step": step, name: float(np.mean(losses))})


def report(args, data, step, device):
    """Continue clips to four times the training length, measure sprites, print the last lines."""
    if step < args.steps:
        print(f"stopped at step {step}; to go on: python train.py --resume --out {args.out}")
        return
    net = load_checkpoint(args.out).to(device)
    several = args.frames > net.config.chunk  # a clip of one frame has nothing to continue
    frames = 4 * args.frames if several else args.frames
    if args.data in WORLDS and several:
        with autocast(args.precision, device):
            truth, made = continue_held_out(net, frames, 16, **default_sampler(net))
        print("16 held-out clips continued from two frames; 100 is perfect:")
        print(metrics_table(measure_held_out(net, made)))
        videos = {"truth": truth[:4], HISTORY_NAMES[args.history]: made[:4]}
    else:
        with autocast(args.precision, device):
            videos = continue_some(net, data, frames, args)
    path = args.out / "samples" / "final.gif"
    write_comparison(path, videos, data.fps)

    prompt = f' "{data.caption(0)}"' if args.data == "sprites" else ""
    print(f"median step: {median_steps(args.out)}; look at {path}, then try")
    print(f"  python sample.py{prompt} --checkpoint {args.out}")


def median_steps(out):
    """The median time of a step with each history, from the log, as a text."""
    seconds = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "history" in entry:
            name = entry["history"].removesuffix("_history")
            seconds.setdefault(name, []).append(entry["seconds"])
    return ", ".join(f"{name} {1000 * np.median(z):.0f} ms" for name, z in seconds.items())


def leave_processes():
    """Wait for all processes, then destroy the group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
