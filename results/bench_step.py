"""Where a training step's time goes, and how near it comes to the speed of a matrix product.

  python results/bench_step.py

Times a teacher-forcing and a resampling step of a preset on random clips, a teacher-forcing step
with torch.optim.Muon, which iterates in bfloat16, and a product of two 512 x 512 matrices, in turn
in one process: on a shared machine only their ratios can be trusted.
"""

import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import PRESETS, CausalDiT
from rf import HISTORY, flow_matching_loss
from sample import new_parser, positive_int, run_main
from train import flops, keep_memory, make_optimizers

SIZE = 512  # of the matrix product
LONGEST = 12  # rows of the profile


def train_step(net, optimizers, x, c, history):
    """One step of Algorithm 1."""
    past = HISTORY[history](net, x[:, :-1], c, s=0.6, steps=1, noise=0.3)
    flow_matching_loss(net, x, c, past, 3.0).backward()
    for optimizer in optimizers:
        optimizer.step()
    net.zero_grad(set_to_none=True)


def seconds(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main(argv):
    parser = new_parser(__doc__)
    parser.add_argument("--preset", choices=("toy", "small"), default="toy")
    parser.add_argument("--batch", type=positive_int, default=8, help="default: %(default)s")
    parser.add_argument("--frames", type=positive_int, default=10, help="default: %(default)s")
    parser.add_argument("--size", type=positive_int, default=32, help="default: %(default)s")
    parser.add_argument("--repeats", type=positive_int, default=20, help="default: %(default)s")
    args = parser.parse_args(argv)
    keep_memory()
    torch.manual_seed(0)
    config = PRESETS[args.preset]
    if args.size % config.patch:
        raise ValueError(f"--size {args.size} is not divisible by {config.patch}, the patch")
    net = CausalDiT(config)
    adamw, muon = make_optimizers(net, "muon")
    in_bfloat16 = torch.optim.Muon(muon.param_groups[0]["params"], lr=0.0)
    x = torch.randn(args.batch, args.frames, 3, args.size, args.size)
    c = torch.randn(args.batch, 5, config.text_dim)
    a, b = torch.randn(2, SIZE, SIZE)

    runs = {
        "teacher forcing": lambda: train_step(net, [adamw, muon], x, c, "teacher"),
        "resampling": lambda: train_step(net, [adamw, muon], x, c, "resample"),
        "bfloat16": lambda: train_step(net, [adamw, in_bfloat16], x, c, "teacher"),
        "product": lambda: [a @ b for _ in range(100)],
    }
    times = {name: [] for name in runs}
    for repeat in tqdm(range(args.repeats + 2), leave=False):
        for name, run in runs.items():
            spent = seconds(run)
            if repeat >= 2:  # the first ones allocate
                times[name].append(spent)
    median = {name: sorted(z)[len(z) // 2] for name, z in times.items()}

    tokens = (args.size // config.patch) ** 2
    work = 3 * args.batch * flops(config, args.frames, args.frames - 1, tokens, 5)
    speed = work / median["teacher forcing"] / 1e9
    product = 100 * 2 * SIZE**3 / median["product"] / 1e9
    print(
        f"teacher-forcing step {1000 * median['teacher forcing']:.0f} ms, resampling step "
        f"{1000 * median['resampling']:.0f} ms, "
        f"{median['resampling'] / median['teacher forcing']:.2f} x; with torch.optim.Muon "
        f"{median['bfloat16'] / median['teacher forcing']:.2f} x\n{speed:.0f} GFLOP/s, "
        f"{speed / product:.0%} of a {SIZE} x {SIZE} product's {product:.0f}, on "
        f"{torch.get_num_threads()} threads"
    )

    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(5):
            train_step(net, [adamw, muon], x, c, "teacher")
    events = sorted(record.key_averages(), key=lambda e: e.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    print("a teacher-forcing step, share of its time:")
    for event in events[:LONGEST]:
        print(f"{event.self_cpu_time_total / total:6.1%}  {event.key}")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
