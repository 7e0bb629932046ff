"""Time attention under the sparse causal mask, forward and backward.

  python results/bench_attention.py                                 what runs on a CPU
  python results/bench_attention.py --device cuda --frames 60 --tokens 4680 --heads 12 \\
    --width 128 --batch 1 --top-k 5                                 dense against routed, real size

On a CPU `routing.attend` is compared with one plain call that has as many visible pairs of frames
(N noisy frames with their history see N² of them, as many as N frames see among themselves) and
with one call under a dense mask. Medians; the ratios of one run are what counts.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))
from routing import attend, sparse_causal_mask, token_mask
from sample import list_devices, new_parser, positive_int, run_main
from train import keep_memory


def parse(argv):
    parser = new_parser(__doc__)
    parser.add_argument("--frames", type=positive_int, default=16, help="noisy frames N")
    parser.add_argument("--tokens", type=positive_int, default=64, help="tokens in a frame")
    parser.add_argument("--batch", type=positive_int, default=4)
    parser.add_argument("--heads", type=positive_int, default=4)
    parser.add_argument("--width", type=positive_int, default=32, help="width of a head")
    parser.add_argument("--top-k", type=positive_int, help="also time routed history, Eq. (9)")
    parser.add_argument(
        "--repeats", type=positive_int, default=21, help="timed steps for each median"
    )
    parser.add_argument("--device", choices=list_devices(), default="cpu")
    return parser.parse_args(argv)


def median_ms(args, frames, attention):
    """Median milliseconds of forward and backward on random frames."""
    shape = (args.batch, args.heads, frames, args.tokens, args.width)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True) for _ in "qkv"
    )
    times = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        attention(q, k, v).sum().backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def plain_attention(q, k, v, mask=None):
    q, k, v = (z.flatten(2, 3) for z in (q, k, v))
    return scaled_dot_product_attention(q, k, v, mask)


def main(argv):
    args = parse(argv)
    keep_memory()
    N = args.frames
    past, own = sparse_causal_mask(0, N - 1, N, 0, args.device)

    ours = median_ms(args, 2 * N - 1, lambda q, k, v: attend(q, k, v, past, own))
    print(f"attend: {ours:.1f} ms, {N} frames of {args.tokens} tokens and their history")
    if args.device == "cpu":
        plain = median_ms(args, N, plain_attention)
        mask = token_mask((past | own)[None, None, :, None], args.tokens)
        dense = median_ms(args, 2 * N - 1, lambda q, k, v: plain_attention(q, k, v, mask))
        print(f"one plain call of as many pairs: {plain:.1f} ms; attend takes {ours / plain:.2f} x")
        print(f"one call with a dense mask: {dense:.1f} ms, {dense / plain:.2f} x the plain call")
    if args.top_k:
        routed = median_ms(args, 2 * N - 1, lambda q, k, v: attend(q, k, v, past, own, args.top_k))
        print(f"top-{args.top_k}: {routed:.1f} ms, {ours / routed:.2f} x as fast as dense history")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
