"""The paper's claims, each with the shortest evidence: CPU, no network, deterministic.

Where a test says "the same", it compares in float64. The sections follow the files.
"""

import argparse
import cmath
import contextlib
import gc
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from argparse import Namespace
from fractions import Fraction
from functools import partial
from itertools import permutations, product
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch._dynamo.testing import CompileCounter

import data
import model as model_py
import rf
import routing
import sample
import train
from data import Sprites, Videos, Words, fold, measure, read_video, to_bytes, unfold, writer
from model import PRESETS, CausalDiT, Config, load_checkpoint, load_wan
from rf import (
    HISTORY,
    Guided,
    add_noise,
    flow_matching_loss,
    logit_normal,
    rollout,
    self_resample,
    shift,
)
from routing import attend, attend_masked, route, sparse_causal_mask

HERE = Path(__file__).parent


def tiny(chunk=1, top_k=None, layers=2, window=None, **more):
    """A small float64 network with random weights: at its own initialization it returns 0."""
    torch.manual_seed(0)
    net = CausalDiT(Config(2, 24, 48, 2, layers, 2, chunk, 5, 16, top_k, window, **more)).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def clip(chunk=1, N=6, B=2):
    """(clean frames, noisy frames, t, c) for `tiny`."""
    torch.manual_seed(1)
    x, x_t = torch.randn(2, B, N, 2 * chunk, 4, 6, dtype=torch.float64)
    return x, x_t, torch.rand(B, N, dtype=torch.float64), torch.randn(B, 3, 5, dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


def same(a, b):
    """Nested dictionaries and lists of tensors, equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Recorder:
    """A model with v = 0 that records its calls."""

    def __init__(self):
        self.calls = []

    def cache(self, batch, frames, window=None, sink=0):
        return None

    def __call__(self, x, t, c, history=None, cache=None, first=0):
        self.calls.append((x, t, history, first))
        return torch.zeros_like(x)


# ---- rf.py ----


def test_noise_runs_from_the_frame_to_noise_along_a_line():  # Eq. (3)
    x, eps, t, _ = clip()
    x_t = add_noise(x, eps, t)
    for b, n in np.ndindex(2, 6):
        assert close(x_t[b, n], (1 - t[b, n]) * x[b, n] + t[b, n] * eps[b, n])


def test_the_shift_keeps_both_ends_and_is_undone_by_its_inverse():  # Eq. (7)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    low = shift(t, 0.6)
    assert low[0] == 0 and low[-1] == 1 and (low[1:-1] < t[1:-1]).all()
    assert torch.equal(shift(t, 1.0), t)
    assert close(shift(low, 1 / 0.6), t)


def test_resampling_starts_where_the_paper_says():
    """Eqs. (6), (7): with s = 0.6, t_s has the median 0.375 and 5-95 % of 0.10-0.76."""
    torch.manual_seed(0)
    t_s = shift(logit_normal(200_000).double(), 0.6)
    for q, z, stated in ((0.05, -1.6449, 0.10), (0.5, 0, 0.375), (0.95, 1.6449, 0.76)):
        u = 1 / (1 + math.exp(-z))
        assert abs(t_s.quantile(q) - 0.6 * u / (1 - 0.4 * u)) < 0.005
        assert abs(t_s.quantile(q) - stated) < 0.01


class Exact(Recorder):
    """Predicts eps - x for known clean frames x, plus an error (N,) per frame."""

    def __init__(self, x, error):
        super().__init__()
        self.x, self.error = x, error[:, None, None, None]

    def __call__(self, x_t, t, c, history=None, cache=None, first=0):
        super().__call__(x_t, t, c, history)
        return (x_t - self.x) / t[..., None, None, None] + self.error


class Ones:
    """A source of random numbers that counts its draws and returns ones."""

    draws = 0

    def randn(self, *shape, device=None, dtype=None):
        self.draws += 1
        return torch.ones(shape, device=device, dtype=dtype)

    rand = randn


def test_the_loss_is_the_distance_of_v_to_eps_minus_x():  # Eq. (4)
    x, other, _, c = clip()
    exact = Exact(x, torch.arange(6).double())
    loss = flow_matching_loss(exact, x, c, other[:, :-1])
    assert abs(loss - (0 + 1 + 4 + 9 + 16 + 25) / 6) < 1e-10, "x is the target, not the history"
    _, t, history, _ = exact.calls[0]
    assert t.shape == (2, 6) and len(t.unique()) == 12, "every frame has its own noise level"
    assert torch.equal(history, other[:, :-1])

    flow_matching_loss(exact, x, c, other[:, :-1], 3.0, Ones())
    u = 1 / (1 + math.exp(-1))
    assert (exact.calls[1][1] - 3 * u / (1 + 2 * u)).abs().max() < 1e-6, "Eq. (7) on its levels"


def test_a_rollout_from_t_0_returns_its_input():
    x, _, _, c = clip()
    frames = list(rollout(tiny(), x, torch.zeros(2).double(), c, 3))
    assert torch.equal(torch.cat(frames, 1), x)


@pytest.mark.parametrize("scale", (None, 3.0))
def test_a_rollout_is_euler_written_out_and_goes_on_from_given_frames(scale):
    """Without a cache: at every step all frames so far in one pass. From t = 1 and from t = 0.4."""
    net, (_, noise, _, c) = tiny(), clip(N=4)
    if scale:
        net = Guided(net, torch.zeros(3, 5).double(), scale)
    t = torch.tensor([1.0, 0.4]).double()
    times = [shift(1 - j / 5, 5.0) * t for j in range(6)]
    done = noise[:, :0]
    for i in range(4):
        frame = noise[:, [i]]
        for now, after in zip(times, times[1:]):
            x = torch.cat([done, frame], 1)
            v = net(x, now[:, None].expand(2, i + 1), c, done)[:, [i]]
            frame = frame + (after - now)[:, None, None, None, None] * v
        done = torch.cat([done, frame], 1)
    made = torch.cat(list(rollout(net, noise, t, c, 5, 5.0)), 1)
    assert close(made, done, 1e-9) and not made.requires_grad
    rest = torch.cat(list(rollout(net, noise[:, 2:], t, c, 5, 5.0, history=made[:, :2])), 1)
    assert close(rest, made[:, 2:])


def test_resampling_is_a_rollout_of_videos_that_are_noised_each_to_its_own_t_s():
    """Algorithm 1, lines 2-9, Eqs. (5) to (7)."""
    net, (x, _, _, c) = tiny(), clip()
    torch.manual_seed(3)
    redrawn = self_resample(net, x, c, 0.6, 2)

    torch.manual_seed(3)
    u = torch.randn(2).sigmoid()
    t_s = (0.6 * u / (1 - 0.4 * u)).double()
    eps = torch.randn(x.shape, dtype=torch.float64)
    x_ts = torch.stack([(1 - t_s[b]) * x[b] + t_s[b] * eps[b] for b in range(2)])
    assert close(redrawn, torch.cat(list(rollout(net, x_ts, t_s, c, 2)), 1), 1e-5)


@pytest.mark.parametrize("autocast", (False, True))
def test_resampling_carries_no_gradient_and_training_still_does(autocast):
    """The bf16 weights that autocast keeps must not be those made under no_grad."""
    net, (x, _, _, c) = tiny().float(), (z.float() for z in clip())
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        history = self_resample(net, x[:, :-1], c)
        flow_matching_loss(net, x.detach(), c, history).backward()
    assert not history.requires_grad and history.shape == x[:, :-1].shape
    assert all(p.grad is not None and p.grad.norm() > 0 for p in net.parameters())


def test_the_loss_of_the_last_frame_teaches_how_the_history_is_written():
    """The redrawn frames carry no gradient, but their keys and values do: cut these off, and the
    gradient of the loss of the last frame alone is another (compare arXiv 2607.20368)."""
    net, (x, x_t, t, c) = tiny(), clip()
    history = self_resample(net, x[:, :-1], c)
    assert not history.requires_grad

    def gradient():
        v = net(x_t, t, c, history)[:, -1]
        net.zero_grad()
        v.square().sum().backward()
        return v.detach(), [
            z.grad.clone()
            for block in net.blocks
            for z in (block.self_attn.k.weight, block.self_attn.v.weight)
        ]

    v, whole = gradient()
    for block in net.blocks:
        for module in (block.self_attn.norm_k, block.self_attn.v):
            module.register_forward_hook(cut_history)
    same_v, cut = gradient()
    assert close(v, same_v)
    for a, b in zip(whole, cut):
        assert (a - b).norm() > 0.1 * a.norm(), "much of it comes through the history"


def cut_history(module, args, out):
    """Detach the rows of the 5 history frames of `clip`: out (B, 5 + 6, P, D)."""
    return torch.cat([out[:, :5].detach(), out[:, 5:]], dim=1)


@pytest.mark.parametrize("name", HISTORY)
def test_every_history_of_table_2_is_shaped_like_the_frames_and_has_no_gradient(name):
    net, (x, _, _, c) = tiny(), clip()
    made = HISTORY[name](net, x, c, 0.6, 2, 0.3)
    assert made.shape == x.shape and not made.requires_grad
    assert torch.equal(made, x) == (name == "teacher")


def test_history_noise_has_a_level_per_frame_up_to_its_limit():
    torch.manual_seed(0)
    x = torch.zeros(4, 6, 3, 32, 32)
    level = HISTORY["noise"](None, x, None, None, None, 0.3).std(dim=(2, 3, 4))
    assert level.max() < 0.31 and level.min() < 0.1 < level.max()
    assert (level.std(dim=1) > 0.02).all(), "the frames of one video differ"
    assert (HISTORY["noise"](None, x + 1, None, None, None, 0.0) == 1).all()


@pytest.mark.parametrize("name, passes", (("parallel", 1), ("resample", 6)))
def test_histories_obey_s_and_steps(name, passes):
    x, _, _, c = clip()
    net, u = Recorder(), 1 / (1 + math.exp(-1))
    HISTORY[name](net, x, c, 3.0, 2, 0, Ones())
    assert [first for *_, first in net.calls] == [i for i in range(passes) for _ in range(2)]
    for call, (_, t, _, _) in enumerate(net.calls):
        wanted = 3 * u / (1 + 2 * u) / (1 + call % 2)  # t_s, then half of it
        assert (t - wanted).abs().max() < 1e-6


def test_errors_compound_in_resampling_and_not_in_parallel():
    net, (x, _, _, c) = tiny(), clip()
    made = {}
    for name in ("parallel", "resample"):
        torch.manual_seed(0)
        made[name] = HISTORY[name](net, x, c, 0.6, 2, 0)
    assert close(made["parallel"][:, 0], made["resample"][:, 0])
    assert not close(made["parallel"][:, 2:], made["resample"][:, 2:], 1e-3)

    torch.manual_seed(0)
    wanted, t_s = rf.noise_to_t_s(x, 0.6)
    for t in (t_s, t_s / 2):
        v = net(wanted, t[:, None].expand(2, 6), c, x[:, :-1])
        wanted = wanted - t_s[:, None, None, None, None] / 2 * v
    assert close(made["parallel"], wanted)


def test_every_draw_comes_from_the_given_source():
    net, (x, _, _, c) = tiny(), clip()
    before, rng = torch.get_rng_state(), Ones()
    for history in HISTORY.values():
        history(net, x, c, 0.6, 1, 0.3, rng)
    flow_matching_loss(net, x, c, x[:, :-1], rng=rng)
    self_resample(net, x, c, rng=rng)
    assert rng.draws == 10, "one of levels and one of noise in all but teacher forcing"
    assert torch.equal(torch.get_rng_state(), before)


def test_guidance_of_1_is_none_and_more_is_more():
    net, (x, noise, t, c) = tiny(), clip()
    null = torch.ones(3, 5).double()
    history = x[:, :-1]
    v, v_null = net(noise, t, c, history), net(noise, t, null.expand_as(c), history)
    assert close(Guided(net, null, 1.0)(noise, t, c, history), v)
    assert close(Guided(net, null[None], 3.0)(noise, t, c, history), v_null + 3 * (v - v_null))


# ---- routing.py ----


def test_the_mask_is_figure_3c():
    picture = """
        history     noisy
        # . .       . . . .
        # # .       . . . .
        # # #       . . . .
        . . .       # . . .
        # . .       . # . .
        # # .       . . # .
        # # #       . . . #"""
    rows = [[mark == "#" for mark in line.split()] for line in picture.strip().splitlines()[1:]]
    past, own = sparse_causal_mask(0, 3, 4, 0)
    assert torch.equal(past | own, torch.tensor(rows))
    assert not (past & own).any() and (own.sum(1) == 1).all()


@pytest.mark.parametrize("window", (None, 1, 3))
@pytest.mark.parametrize("shape", ((0, 3, 4, 0), (2, 1, 1, 3), (5, 0, 2, 3), (2, 0, 1, 7)))
def test_a_frame_sees_itself_and_the_history_frames_of_smaller_numbers(shape, window):
    cached, history, _, first = shape
    past, own = sparse_causal_mask(*shape, window=window)
    for row, column in np.ndindex(past.shape):
        number = cached + row if row < history else first + row - history
        finished = column < cached + history
        assert past[row, column] == (finished and 0 < number - column <= (window or 99))
        assert own[row, column] == (column == cached + row)


def random_passes(seed, count, most_tokens):
    """Tables of all kinds, every third with random gaps: (past, own, tokens a frame)."""
    rng = random.Random(seed)
    for i in range(count):
        cached, history = rng.randint(0, 5), rng.randint(0, 5)
        noisy = rng.randint(0 if history else 1, 5)
        first = rng.choice((cached, cached + history, rng.randint(0, 12)))
        window = rng.choice((None, None, 1, 2, 5))
        past, own = sparse_causal_mask(cached, history, noisy, first, window=window)
        if i % 3 == 0:
            past &= torch.tensor([[rng.random() < 0.6 for _ in row] for row in past])
        yield past, own, rng.choice((1, 2, 3, rng.randint(1, most_tokens)))


def qkv(past, P, E=4, dtype=torch.float64, gradient=True, B=2, H=2):
    R, S = past.shape
    torch.manual_seed(R + S + P)
    shapes = (B, H, R, P, E), (B, H, S, P, E), (B, H, S, P, E)
    return [torch.randn(shape, dtype=dtype, requires_grad=gradient) for shape in shapes]


def outputs_and_gradients(attention, q, k, v, *args):
    out = attention(q, k, v, *args)
    return [out, *torch.autograd.grad(out.cos().sum(), (q, k, v))]


def slow_route(q, k, past, top_k):
    """Eq. (9) in loops."""
    B, H, R, P, _ = q.shape
    chosen = torch.zeros(B, H, R, P, k.shape[2], dtype=torch.bool)
    for b, h, r, p in np.ndindex(B, H, R, P):
        score = {}
        for j in range(k.shape[2]):
            if past[r, j]:
                mean = sum(k[b, h, j, s] for s in range(P)) / P
                score[j] = (q[b, h, r, p] * mean).sum().item()
        for j in sorted(score, key=lambda j: -score[j])[:top_k]:
            chosen[b, h, r, p, j] = True
    return chosen


def slow_attend(q, k, v, past, own, top_k):
    """Eq. (8) in loops: each token alone with the frames that it sees."""
    chosen = slow_route(q, k, past, top_k or 99)
    B, H, R, P, E = q.shape
    out = []
    for b, h, r, p in np.ndindex(B, H, R, P):
        frames = [j for j in range(k.shape[2]) if own[r, j] or chosen[b, h, r, p, j]]
        keys, values = k[b, h, frames].reshape(-1, E), v[b, h, frames].reshape(-1, E)
        out.append(torch.softmax(keys @ q[b, h, r, p] / E**0.5, 0) @ values)
    return torch.stack(out).view(B, H, R, P, E)


@pytest.mark.parametrize("shape", ((0, 2, 3, 0), (2, 1, 1, 3), (5, 1, 2, 4)))
@pytest.mark.parametrize("top_k", (None, 1, 2, 9))
def test_the_definition_is_equations_8_and_9_in_loops(shape, top_k):
    past, own = sparse_causal_mask(*shape)
    q, k, v = qkv(past, 3)
    wanted = outputs_and_gradients(slow_attend, q, k, v, past, own, top_k)
    came = outputs_and_gradients(attend_masked, q, k, v, past, own, top_k)
    assert all(close(a, b) for a, b in zip(came, wanted))
    if top_k:
        assert torch.equal(route(q, k, past, top_k), slow_route(q, k, past, top_k))


def test_routing_scores_are_fp32_and_carry_no_gradient():
    torch.manual_seed(0)
    past, _ = sparse_causal_mask(0, 5, 6, 0)
    q, k = torch.randn(2, 4, 8, 11, 16, 32).bfloat16()
    score = q.double() @ k.double().mean(-2)[:, :, None].mT  # (B, H, R, P, S)
    score = score.masked_fill(~past[:, None], -torch.inf)
    wanted = (score >= score.topk(2).values[..., -1:]) & past[:, None]
    assert torch.equal(route(q, k, past, 2), wanted), "of bf16 queries and keys"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(route(q.float(), k.float(), past, 2), wanted), "under autocast"
    assert not route(q.float().requires_grad_(), k.float(), past, 2).requires_grad


FORMS = (attend, routing.attend_by_row, routing.attend_at_once)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-10), (torch.float32, 2e-5)))
@pytest.mark.parametrize("top_k", (None, 1, 3))
def test_attention_is_its_definition_for_every_table(top_k, dtype, tolerance):
    """Outputs with and without gradients, and the gradients."""
    for past, own, P in random_passes(f"{top_k}{dtype}", 30, 100):
        q, k, v = qkv(past, P, dtype=dtype)
        wanted = outputs_and_gradients(attend_masked, q, k, v, past, own, top_k)
        for form in FORMS:
            came = outputs_and_gradients(form, q, k, v, past, own, top_k)
            with torch.no_grad():
                came.append(form(q, k, v, past, own, top_k))
            for a, b in zip(came, [*wanted, wanted[0]]):
                assert close(a, b, tolerance), (form.__name__, past.shape, P)


def test_frames_in_a_row_are_read_from_the_cache_without_a_copy():
    k = torch.randn(2, 2, 5, 3, 4)
    seen = routing.tokens_of(k, k.unbind(2), [1, 2, 3])
    assert torch.equal(seen, k[:, :, 1:4].flatten(2, 3))
    assert seen.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


@pytest.mark.parametrize("top_k", (None, 2))
def test_flex_attention_is_the_definition_and_not_compiled_anew_as_keys_grow(top_k, monkeypatch):
    counter, counts = CompileCounter(), []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    compiled = routing.compiled_flex.__wrapped__()
    monkeypatch.undo()
    for cached in (4, 5, 9, 14):
        past, own = sparse_causal_mask(cached, 1, 2, cached + 1, window=7)
        q, k, v = qkv(past, 50, E=8, gradient=False)
        wanted = attend_masked(q, k, v, past, own, top_k)
        assert close(routing.attend_flex(q, k, v, past, own, top_k, compiled), wanted)
        counts.append(counter.frame_count)
    assert 0 < counts[1] == counts[-1]
    assert close(routing.attend_flex(q, k, v, past, own, top_k), wanted), "uncompiled"


def test_block_masks_list_what_is_needed_and_in_full_what_is_fully_visible():
    for past, own, P in random_passes("blocks", 15, 100):
        q, k, _ = qkv(past, P, gradient=False)
        for top_k in (None, 1):
            seen = routing.visible(q, k, past, own, top_k)
            pairs = seen.expand(*seen.shape[:3], P, -1).repeat_interleave(P, -1).flatten(2, 3)
            for size in (16, 128):
                mask = routing.block_mask(seen, P, size)
                for b, h, i in np.ndindex(mask.kv_num_blocks.shape):
                    blocks = pairs[b, h].split(size)[i].split(size, dim=1)
                    part = listed(mask.kv_num_blocks, mask.kv_indices, b, h, i)
                    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, b, h, i)
                    some = [j for j, block in enumerate(blocks) if block.any()]
                    whole = [j for j in some if blocks[j].sum() == size**2]
                    assert sorted(part + full) == some and full == whole


def listed(counts, indices, *row):
    return indices[row][: counts[row]].tolist()


# ---- model.py ----


@pytest.mark.parametrize("top_k", [None, 2])
def test_nothing_leaks_and_history_reaches_later_frames(top_k):
    net, (x, x_t, t, c) = tiny(top_k=top_k), clip()
    v = net(x_t, t, c, x[:, :-1])
    for frame in range(6):
        step = torch.zeros_like(x)
        step[:, frame] = 1
        by_history = (net(x_t, t, c, (x + step)[:, :-1]) - v).abs().amax((0, 2, 3, 4))
        by_noise = (net(x_t + step, t, c, x[:, :-1]) - v).abs().amax((0, 2, 3, 4))
        later, reached = torch.arange(6) > frame, by_history > 1e-6
        assert (by_history[~later] == 0).all(), "no frame sees the future or its own clean copy"
        assert torch.equal(reached, later) or top_k and reached[frame + 1 : frame + 2].all()
        assert torch.equal(by_noise > 0, torch.arange(6) == frame), "itself, and no other noise"


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("top_k, window", [(None, None), (2, None), (None, 2), (1, 3)])
def test_training_in_parallel_is_sampling_frame_by_frame(chunk, top_k, window):
    net, (x, x_t, t, c) = tiny(chunk, top_k, window=window), clip(chunk)
    together = net(x_t, t, c, x[:, :-1])
    for kept in {None, window and window + 1}:  # the cache's newest frame has its own window
        fused, apart = net.cache(2, 6, kept), net.cache(2, 6, kept)
        for i in range(6):
            history = x[:, i - 1 : i] if i else None
            v = net(x_t[:, [i]], t[:, [i]], c, history, fused, first=i)
            assert close(v, together[:, [i]])
            net(x[:, :0], t[:, :0], c, history, apart, first=i)  # no noisy frame: fills the cache
            assert close(v, net(x_t[:, [i]], t[:, [i]], c, None, apart, first=i))


def test_the_history_enters_at_t_0_or_at_its_own_levels():
    """Its keys are those of noisy frames at these levels, whatever t the noisy frames have."""
    net, (x, _, t, c) = tiny(layers=1), clip()
    history, levels, keys = x[:, :-1], torch.rand(2, 5).double(), []
    net.blocks[0].self_attn.k.register_forward_hook(lambda module, args, out: keys.append(out))
    for given, wanted in ((None, 0 * levels), (levels, levels)):
        v = net(x, t, c, history, history_t=given)
        net(history, wanted, c)
        assert close(keys[-2][:, :5], keys[-1])
        assert not close(keys[-2][:, :5], keys[-2][:, 5:-1], 1e-3)
    assert close(Guided(net, 0 * c[0], 1.0)(x, t, c, history, history_t=levels), v)


def test_t_is_seen_in_thousandths():
    """The sinusoid is Wan's: cosines, then sines, of 1000 t at 1e4^(-i / half)."""
    net, (_, x_t, t, c) = tiny(), clip()
    seen = []
    net.time_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(x_t, t, c)
    for b, n in np.ndindex(2, 6):
        angles = [1000 * t[b, n].item() * 1e4 ** (-i / 8) for i in range(8)]
        wanted = [*map(math.cos, angles), *map(math.sin, angles)]
        assert close(seen[0][b, n], torch.tensor(wanted).double(), 1e-6)


def test_rope_turns_pairs_of_channels_by_time_row_and_column():
    """Width 32: 6 pairs for time, 5 for the row, 5 for the column; tokens run along rows."""
    numbers, z = (4, 9), torch.randn(2, 12, 32).double()
    cpu = torch.device("cpu")
    turned = model_py.rotate(z, model_py.token_angles(32, 2, numbers, 2, 3, cpu, z.dtype))
    for frame, token in np.ndindex(2, 12):
        latent, row, column = 2 * numbers[frame] + token // 6, token // 3 % 2, token % 3
        angles = [latent * 1e4 ** (-i / 6) for i in range(6)]
        angles += [row * 1e4 ** (-i / 5) for i in range(5)]
        angles += [column * 1e4 ** (-i / 5) for i in range(5)]
        for pair, angle in enumerate(angles):
            pair = slice(2 * pair, 2 * pair + 2)
            wanted = complex(*z[frame, token, pair]) * cmath.rect(1, angle)
            assert abs(complex(*turned[frame, token, pair]) - wanted) < 1e-10


def test_a_new_network_returns_0():
    net = CausalDiT(Config(2, 48, 96, 2, 1, 2, 3, text_dim=5))
    x, t, c = torch.randn(1, 2, 6, 4, 6), torch.rand(1, 2), torch.randn(1, 3, 5)
    v = net(x, t, c, x[:, :1])
    assert torch.equal(v, 0 * x) and v.dtype == torch.float32


def test_x_prediction_is_v_through_eq_3():
    x, x_t, t, c = clip()
    t[:, :2] = torch.tensor([0.0, 0.05])
    v = tiny(predict="x")(x_t, t, c, x[:, :-1])
    clean = tiny()(x_t, t, c, x[:, :-1])
    level = t.clamp(min=0.05)[..., None, None, None]
    eps = (x_t - (1 - level) * clean) / level  # the noise that clean and x_t imply
    assert close(v, eps - clean)


def test_patches_are_ordered_as_wan_orders_them():
    """In: (c p q), a convolution's order. Out: (p q c). Tokens run over time, rows, columns."""
    config = Config(2, 24, 48, 2, 1, patch=2, chunk=3)
    x = torch.randn(1, 2, 6, 4, 6)
    tokens = model_py.patchify(x, config)
    out = torch.randn(1, 2, 18, 8)
    frames = model_py.unpatchify(out, config, rows=2)
    for token, (t, row, column) in enumerate(np.ndindex(3, 2, 3)):
        place = (0, 1, *(slice(2 * i, 2 * i + 2) for i in (t, row, column)))  # (c, p, q)
        assert torch.equal(tokens[0, 1, token], x[place].flatten())
        assert torch.equal(frames[place], out[0, 1, token].view(2, 2, 2).movedim(-1, 0))


def test_a_block_and_the_head_are_wans_written_out():
    """One frame of two tokens, unturned."""
    net, E = tiny(layers=1), 12
    block = net.blocks[0]
    x, e6, text = torch.randn(11, 24).double().split([2, 6, 3])

    def rms_norm(z):
        return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def layer_norm(z):
        return rms_norm(z - z.mean(-1, keepdim=True))

    def attention(attn, queries, keys):
        q = rms_norm(attn.q(queries)) * attn.norm_q.weight
        k = rms_norm(attn.k(keys)) * attn.norm_k.weight
        heads = []
        for head in (slice(0, E), slice(E, 2 * E)):
            weight = torch.softmax(q[:, head] @ k[:, head].T / E**0.5, -1)
            heads.append(weight @ attn.v(keys)[:, head])
        return attn.o(torch.cat(heads, -1))

    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation[0] + e6
    h = layer_norm(x) * (1 + scale1) + shift1
    wanted = x + gate1 * attention(block.self_attn, h, h)
    h = layer_norm(wanted) * block.norm3.weight + block.norm3.bias
    wanted = wanted + attention(block.cross_attn, h, text)
    h = block.ffn[0](layer_norm(wanted) * (1 + scale2) + shift2)
    h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    wanted = wanted + gate2 * block.ffn[2](h)

    angles = torch.ones(1, 2, E // 2, dtype=torch.complex128)
    tables = sparse_causal_mask(0, 0, 1, 0)
    out = block(x[None, None], e6[None, None], angles, *tables, text[None], None)
    assert close(out[0, 0], wanted)

    shift, scale = net.head.modulation[0] + e6[0]
    wanted = net.head.head(layer_norm(x) * (1 + scale) + shift)
    assert close(net.head(x[None, None], e6[None, :1])[0, 0], wanted)


def test_autocast_changes_the_velocity_by_its_rounding_and_spares_the_levels_and_the_head():
    net, (x, x_t, t, c) = tiny().float(), (z.float() for z in clip())
    high, types = net(x_t, t, c, x[:, :-1]), []
    for module in (net.time_embedding, net.time_projection, net.blocks[0].ffn, net.head):
        module.register_forward_hook(lambda module, args, out: types.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x_t, t, c, x[:, :-1])
    assert types == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    assert low.dtype == torch.float32 and 0 < (low - high).norm() < 0.02 * high.norm()


@pytest.mark.parametrize("sink", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_window_keeps_positions_in_range_and_memory_flat(sink, chunk):
    """Each frame equals one whose whole history is the sink and the last frames.

    With one layer, for then a key does not depend on what its frame saw.
    """
    net, (_, _, _, c) = tiny(chunk, layers=1), clip(chunk)
    noise = torch.randn(2, 9, 2 * chunk, 4, 6, dtype=torch.float64)
    t = torch.ones(2).double()
    cache = net.cache(2, 9, window=4, sink=sink)
    made, places = [], set()
    for i, frame in enumerate(rollout(net, noise, t, c, 2, cache=cache)):
        kept = made[:sink] + made[max(sink, i - 4 + sink) :]
        history = torch.cat([noise[:, :0], *kept], 1)
        assert close(frame, next(rollout(net, noise[:, [i]], t, c, 2, history=history)))
        made.append(frame)
        places.add((cache.kv.shape, cache.kv.data_ptr()))
    assert len(places) == 1 and cache.kv.shape[4] == 5 and cache.length == 4


@pytest.mark.parametrize("before", (0, 1, 3, 5))
def test_a_window_evicts_at_once_however_many_frames_come(before):
    net, (x, x_t, t, c) = tiny(layers=1), clip()
    cache = net.cache(2, 99, window=4, sink=1)
    net(x[:, :0], t[:, :0], c, x[:, :before], cache)
    v = net(x_t[:, :2], t[:, :2], c, x[:, before:], cache, first=6)
    assert close(v, net(x_t[:, :2], t[:, :2], c, x[:, [0, 3, 4, 5]], first=4))
    assert cache.length == 4


def test_a_cache_says_when_it_is_full_or_foreign():
    net, (x, x_t, t, c) = tiny(), clip()
    with pytest.raises(ValueError, match="6 finished frames in a cache for 3"):
        net(x_t[:, :1], t[:, :1], c, x, net.cache(2, 3), first=6)
    with pytest.raises(ValueError, match="window of 2 frames with a sink of 2"):
        net.cache(2, 3, window=2, sink=2)
    with pytest.raises(ValueError, match="a pass of 2 videos on a cache for 1"):
        net(x_t[:, :1], t[:, :1], c, x[:, :1], net.cache(1, 3), first=1)
    assert net.cache(2, 3, window=10**12).frames == 3, "a long window allocates the video only"


@pytest.mark.parametrize(
    "x, c, message",
    (
        ((1, 2, 3, 4, 4), (1, 3, 5), "frames of 3 channels"),
        ((1, 2, 2, 4, 5), (1, 3, 5), "frames of 4 x 5; both must be multiples of the patch, 2"),
        ((1, 2, 2, 4, 4), (1, 3, 7), "text of width 7; this model reads width 5"),
    ),
)
def test_frames_and_text_of_another_shape_are_refused(x, c, message):
    with pytest.raises(ValueError, match=message):
        tiny().float()(torch.zeros(x), torch.zeros(1, 2), torch.zeros(c))


@pytest.mark.parametrize(
    "sizes, message",
    (
        ({"dim": 20, "heads": 4}, "dim of 20 .* 4 heads of an even width; 24 would work"),
        ({"patch": -1}, "patch is -1; wanted a number above 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"predict": "eps"}, 'predict is \'eps\'; wanted "v" or "x"'),
    ),
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Config(**sizes)


def test_compiled_blocks_change_nothing_and_are_not_compiled_anew_for_every_frame():
    def one_rollout():
        return rollout(net, noise, torch.ones(2).double(), c, history=x[:, :1])

    net, (x, noise, _, c) = tiny(layers=1), clip(N=4)
    plain, counter, counts = list(one_rollout()), CompileCounter(), []
    for block in net.blocks:
        block.compile(backend=counter)
    for frame, wanted in zip(one_rollout(), plain):
        assert close(frame, wanted)
        counts.append(counter.frame_count)
    assert 0 < counts[1] == counts[-1]


def test_compiling_needs_a_compiler(monkeypatch, tmp_path):
    net = tiny()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and there is no no-such-comp"):
        net.compile_blocks()
    monkeypatch.setenv("CXX", sys.executable)  # nothing is compiled before the first call
    net.compile_blocks()
    assert all(block._compiled_call_impl for block in net.blocks)


def test_a_network_trains_after_a_pass_in_inference_mode():
    net, (x, noise, t, c) = tiny(layers=1), clip(N=5)
    with torch.inference_mode():
        net(noise, t, c, x[:, :-1])
    net(noise, t, c, x[:, :-1]).sum().backward()
    assert net.blocks[0].self_attn.k.weight.grad.abs().max() > 0


def test_recomputing_blocks_keeps_less_and_changes_no_gradient():
    net, (x, history, t, c) = tiny(), clip()
    grads, kept = [], []
    for net.recompute in (False, True):
        net.zero_grad()
        net(x, t, c, history).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(kept[-1].append, id):
            net(x, t, c, history)
    assert same(*grads) and grads[0][0].abs().sum() > 0
    plain, recomputed = (sum(z.nbytes for z in tensors) for tensors in kept)
    assert recomputed < plain / 2


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of `tiny` whose EMA differs from its weights: (path, state)."""
    net = tiny().float()
    ema = {key: value + 1 for key, value in net.state_dict().items()}
    state = {"config": vars(net.config), "model": net.state_dict(), "ema": ema}
    state |= {"step": 3, "args": {"frames": 4}}
    torch.save(state, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt", state


def test_a_checkpoint_is_loaded_with_its_ema_weights_in_float32(checkpoint):
    path, state = checkpoint
    half = {name: z.half() for name, z in state["ema"].items()}
    for place, ema in ((path, state["ema"]), (path.parent, half)):
        torch.save(state | {"ema": ema}, path)
        net = load_checkpoint(place)
        assert same(dict(net.state_dict()), {name: z.float() for name, z in ema.items()})
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        assert net.run == {"frames": 4}


def test_an_old_checkpoint_loads_if_what_has_left_was_off(checkpoint):
    path, state = checkpoint
    config = state["config"] | {"detail": 0, "detail_strips": False, "error_bank": None}
    del config["predict"]  # from before this choice
    torch.save(state | {"config": config}, path)
    assert vars(load_checkpoint(path).config) == state["config"] | {"predict": "v"}
    torch.save(state | {"config": config | {"detail": 8}}, path)
    with pytest.raises(ValueError, match="this network has no detail"):
        load_checkpoint(path)


class Harm:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"ema": None}, "are not those of this network"),
        ({"ema": {"head.bias": torch.zeros(1)}}, "network: unknown head.bias, missing patch_emb"),
        ({"ema": {1: 2}}, "are not those of this network"),
        ({"config": {"layers": 2, "dim": 10**6}}, "are not those of this network: .*size mismatch"),
        ({"config": None}, "is not a checkpoint of train.py"),
        ({"args": Harm()}, "is not a checkpoint of train.py"),
    ),
)
def test_a_foreign_checkpoint_is_refused_in_one_line_and_runs_no_code(
    change, message, checkpoint, monkeypatch
):
    path, state = checkpoint
    monkeypatch.chdir(path.parent)
    torch.save(state | change, path)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and not Path("harm").exists()


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "junk.pt").write_text("junk")
    for name in ("list.pt", "empty.pt", "junk.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint of train.py") as error:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"there is no checkpoint at {place}"):
            load_checkpoint(place)


def test_the_network_is_wan():
    with torch.device("meta"):
        net = CausalDiT(PRESETS["wan-1.3b"])
    assert sum(p.numel() for p in net.parameters()) == 1_418_996_800
    names = """patch_embedding.weight text_embedding.2.bias time_embedding.0.weight
    time_projection.1.weight blocks.29.modulation blocks.0.self_attn.norm_q.weight
    blocks.0.cross_attn.o.bias blocks.0.norm3.weight blocks.0.ffn.2.weight head.head.weight
    head.modulation""".split()
    assert len(net.state_dict()) == 825 and set(names) <= set(net.state_dict())
    kinds = {name: (config.predict, config.chunk) for name, config in PRESETS.items()}
    assert kinds == {"toy": ("x", 1), "small": ("x", 1), "wan-1.3b": ("v", 3), "wan-14b": ("v", 3)}


# fmt: off
TO_DIFFUSERS = (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"), ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
    ("head.modulation", "scale_shift_table"), ("modulation", "scale_shift_table"),
    ("self_attn", "attn1"), ("cross_attn", "attn2"),
    (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".o.", ".to_out.0."),
)
# fmt: on


@pytest.fixture
def wan_weights():
    """Random weights of `tiny` under the names and shapes of Wan's original files."""
    net = tiny()
    weights = {key: torch.randn_like(value) for key, value in net.state_dict().items()}
    original = dict(weights)
    original["patch_embedding.weight"] = weights["patch_embedding.weight"].view(24, 2, 1, 2, 2)
    return net, weights, original


@pytest.mark.parametrize("form", ("original", "diffusers", "self-forcing"))
def test_wan_weights_load_under_each_name(form, wan_weights, tmp_path):
    net, weights, state = wan_weights
    if form == "diffusers":
        for ours, theirs in TO_DIFFUSERS:
            state = {key.replace(ours, theirs): value for key, value in state.items()}
    if form == "self-forcing":
        state = {"generator": {}, "generator_ema": {f"model.{k}": v for k, v in state.items()}}
    torch.save(state, tmp_path / "wan.pth")
    load_wan(net, tmp_path / "wan.pth")
    assert same(dict(net.state_dict()), weights)


def test_wrong_wan_weights_are_named(wan_weights, tmp_path, monkeypatch):
    net, _, state = wan_weights
    monkeypatch.chdir(tmp_path)
    for weights, message in (
        ({"img_emb": torch.ones(1)}, "network: unknown img_emb, missing "),  # and much else
        (state | {"blocks.0.modulation": torch.ones(1, 6, 7)}, "mismatch for blocks.0.modulation"),
        ({"generator": [1]}, "cannot be read as weights"),
        ({"harm": Harm()}, "cannot be read as weights"),
    ):
        torch.save(weights, "wan.pth")
        with pytest.raises(ValueError, match=message) as error:
            load_wan(net, "wan.pth")
        assert "\n" not in str(error.value) and not Path("harm").exists()
    with pytest.raises(ValueError, match="none.pth cannot be read as weights"):
        load_wan(net, "none.pth")
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model"):
        load_wan(net, tmp_path)


@pytest.mark.extras
def test_the_network_is_that_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs pip install diffusers")
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        ffn_dim=64,
        num_layers=2,
    ).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="50KB")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_text("not to be read")
    ours = CausalDiT(Config(4, 32, 64, 2, 2, 2, 3, text_dim=24))
    load_wan(ours, tmp_path)

    x, c, t = torch.randn(2, 3, 4, 6, 8), torch.randn(2, 7, 24), torch.rand(2, 1)
    with torch.no_grad():  # one frame of three latents: nothing is masked, as in theirs
        v = unfold(ours(fold(x, 3), t, c), 3)
        wanted = theirs(x.transpose(1, 2), 1000 * t[:, 0], c).sample.transpose(1, 2)
    assert wanted.std() > 0.1
    assert (v - wanted).abs().max() < 5e-5 * wanted.abs().max().clamp(min=1)


# ---- data.py ----


def test_fold_puts_the_frame_of_a_chunk_before_the_channel():
    video = torch.arange(2 * 6 * 4).view(2, 6, 4, 1, 1)
    folded = fold(video, 3)
    assert folded.shape == (2, 2, 12, 1, 1) and torch.equal(unfold(folded, 3), video)
    assert folded[1, 1, 1 * 4 + 2] == video[1, 3 + 1, 2]


def test_a_word_is_a_row_beside_its_successor():
    c = Words(["a", "b", "c"], rows=4)("C, a")
    assert c.nonzero().tolist() == [[0, 2], [0, 3 + 0], [1, 0]] and c.shape == (4, 6)
    assert Words(["a"], rows=1).text(["a", "a a a"]).shape == (2, 3, 2)


def test_an_unknown_word_is_refused_with_the_nearest_ones():
    with pytest.raises(ValueError, match='unknown word "cirle".*: circle,'):
        Sprites().words("red cirle")
    with pytest.raises(ValueError, match="without captions.*empty prompt"):
        Words([])("dog")
    assert not Words([])("").any()


# ---- the world of the sprites


def data_args(name, **changes):
    flags = {"size": 16, "frames": 4, "fps": 0.0, "seed": 0, "objects": 2}
    return argparse.Namespace(data=str(name), **(flags | changes))


def test_sprites_are_a_function_of_seed_split_and_index():
    a = Sprites(seed=1)
    assert same(a[5], Sprites(seed=1)[5])
    for other in (Sprites(seed=2)[5], Sprites(seed=1, split="test")[5], a[6]):
        assert not torch.equal(a[5][0], other[0])
    assert torch.equal(Sprites(frames=40, seed=1)[5][0][:12], a[5][0]), "more frames continue it"


def test_the_first_bits_of_the_sprites_stay_what_they_are():
    video, c = Sprites()[0]
    assert Sprites().caption(0) == "yellow circle and blue circle"
    means = video.mean((1, 2, 3))[:4].tolist()
    assert means == pytest.approx([-0.6902, -0.6903, -0.6900, -0.6900], abs=1e-4)
    assert c.sum() == 9 and video.shape == (12, 3, 32, 32)


def test_open_data_gives_the_sprites_every_flag():
    world = data.open_data(data_args("sprites", size=20, frames=5, seed=3, objects=3), "test")
    assert same(world[2], Sprites(20, 5, 3, "test", 3)[2]) and world[2][1].any()


def test_hidden_has_a_wall_and_no_captions():
    video, c = data.open_data(data_args("hidden"))[0]
    assert torch.equal(video, Sprites(16, 4, wall=True)[0][0]) and not c.any()
    silent = [not Sprites(8, 2, withheld=0.25)[i][1].any() for i in range(200)]
    assert 30 < sum(silent) < 70, "a share of the captions can be withheld"


def test_sprites_move_straight_and_bounce():
    low, high = 0.14 * 16, 0.86 * 16
    for i in range(20):
        _, _, at = Sprites(16).scene(i, 40)
        step = at.diff(dim=0)
        turned = (step.diff(dim=0).abs() > 1e-3).any(-1)
        inside = ((at[1:-1] > low + 1) & (at[1:-1] < high - 1)).all(-1)
        assert turned.any() and not (turned & inside).any(), "they turn at the edges alone"
        assert at.min() > low - 1e-4 and at.max() < high + 1e-4
        speed = step[1:][~turned].norm(dim=-1) / 16
        assert speed.min() > 0.024 and speed.max() < 0.061


def test_the_scene_whose_sprites_overlap_least_is_taken():
    start = np.array([[[6, 6], [16, 16], [26, 26.0]]] * 2)
    step = np.zeros_like(start)
    step[0, 1] = 0.25  # the second meets the third after 40 frames
    assert Sprites(32, objects=3).least_overlap(start, step) == 1


def test_the_first_sprite_is_painted_in_front():
    at = torch.tensor([[5.0, 11.0], [5.0, 11.0]])
    picture = data.paint(at, torch.tensor([0, 1]), torch.tensor([0, 2]), 16)
    assert torch.allclose(picture[:, 11, 5], data.PALETTE[0]), "x is the column"


def test_behind_the_wall_there_is_something_to_remember():
    world = Sprites(20, 24, split="test", objects=1, wall=True)
    brightest = torch.stack([world[i][0].amax((1, 2, 3)) for i in range(32)])
    hidden = brightest < 0  # the wall is grey
    assert not hidden[:, 0].any(), "all begin in sight"
    returned = hidden.any(1) & ~hidden[:, -1]
    assert returned.sum() > 16 and hidden[returned].sum() > 2 * returned.sum()


# ---- metrics


@pytest.fixture(scope="module")
def truth():
    """(videos, captions, scores) of four held-out clips."""
    world = Sprites(frames=12, split="test")
    video = torch.stack([world[i][0] for i in range(4)])
    captions = [world.caption(i) for i in range(4)]
    return video, captions, measure(video, captions)


def mean(scores):
    return scores.nanmean((0, 1))


def test_metrics_give_truth_100_and_noise_0(truth):
    video, captions, scores = truth
    assert (mean(scores) > 98).all() and scores.shape == (4, 12, 3)
    assert scores[:, :2, 1].isnan().all() and not scores[:, 2:, 1].isnan().any()
    torch.manual_seed(0)
    assert (mean(measure(torch.rand_like(video) * 2 - 1, captions)) < 5).all()
    still = measure(video[:, :1].expand_as(video), captions)
    assert mean(still)[1] < 25, "standing still is not moving"


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_metrics_need_no_gradients_around_them(truth, mode):
    video, captions, scores = truth
    with mode():
        again = measure(video.clone(), captions)
    assert torch.equal(again.nan_to_num(), scores.nan_to_num())


def test_metrics_tell_pixels_motion_and_names_apart(truth):
    video, captions, scores = truth
    scores = mean(scores)
    blur = mean(measure(F.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1)), captions))
    assert blur[0] < scores[0] - 10 and (blur > scores - 10)[1:].all(), "blur costs Visual"
    faded = mean(measure(0.7 * video + 0.3 * data.BACKGROUND[:, None, None], captions))
    assert 45 < faded[0] < 65, "Visual is a distance, not its square"
    swapped = mean(measure(video[:, :, [2, 0, 1]], captions))
    assert swapped[2] < scores[2] - 40, "colours cost Text"
    jumping = torch.cat([video[:, :4], video[:, 9:], video[:, 4:9]], dim=1)
    jump = mean(measure(jumping, captions))
    assert jump[1] < scores[1] - 15 and (jump - scores)[[0, 2]].abs().max() < 2, "Temporal"


def scores_of(positions, caption="red circle", gone=None):
    """Scores (T, 3) of a red and a green circle at (T, 2) or (T, 2, 2), that vanish at `gone`."""
    at = torch.tensor(positions).view(len(positions), -1, 2)
    colour = torch.arange(at.shape[1])
    video = data.paint(at, 0 * colour, colour, 16)
    video[gone or len(video) :] = data.BACKGROUND[:, None, None]
    return measure(video[None], [caption])[0]


STRAIGHT = [(4 + 0.8 * t, 8.0) for t in range(8)]


def test_a_vanished_sprite_costs_everything():
    scores = scores_of(STRAIGHT, gone=5)
    assert (scores[2:5] > 95).all() and (scores[5:] == 0).all()
    assert scores_of(STRAIGHT, "blue square")[:2, 1].isnan().all(), "nothing is due yet"


def test_a_wrong_shape_costs_half_of_text_and_a_sprite_too_many_too():
    for caption in ("red square", "red circle and blue square"):
        assert (scores_of(STRAIGHT, caption)[:, 2] == 50).all()
    assert (scores_of(STRAIGHT, "")[:, 2] == 0).all(), "nothing was asked for"
    two = Sprites(frames=3, split="test")
    first, _ = two.caption(0).split(" and ")
    assert (measure(two[0][0][None], [first])[0, :, 2] == 50).all()


def test_an_invalid_speed_costs_temporal_and_a_bounce_does_not():
    fast = [(3.2 + 1.15 * t, 8.0) for t in range(8)]
    slow = [(5 + 0.1 * t, 8.0) for t in range(8)]
    bounce = [(16 - 2.24 - abs(0.8 * t - 3), 8.0) for t in range(8)]
    assert max(scores_of(path)[2:, 1].mean() for path in (fast, slow)) < 90
    assert min(scores_of(path)[2:, 1].min() for path in (STRAIGHT, bounce)) > 95
    aside = [*STRAIGHT[:3], (6.4, 8 + 0.06 * 16)]
    assert scores_of(aside)[3, 1].item() == pytest.approx(100 / np.e, abs=2)


def test_metrics_forgive_what_the_wall_or_another_sprite_hides():
    for objects, size in ((1, 20), (2, 32)):
        world = Sprites(size, 24, split="test", objects=objects, wall=True)
        video = torch.stack([world[i][0] for i in range(3)])
        captions = [world.caption(i) for i in range(3)]
        assert (mean(measure(video, captions, wall=True)) > 95).all()
    meet = [[(3.5 + 0.9 * t, 8.0), (12.5 - 0.9 * t, 8.0)] for t in range(9)]
    scores = scores_of(meet, "red circle and green circle")
    assert (scores[2:] > 90).all(), "the fifth frame shows one"


# ---- what a player shows is what is read


GRID = 16 + 20 * np.arange(12).reshape(3, 4)


def cells(levels):
    """A picture (height, width, 3) uint8 with a grey cell of 8 x 8 pixels for each level."""
    return np.kron(levels, np.ones((8, 8)))[..., None].repeat(3, -1).astype(np.uint8)


def shown(path, levels):
    """Whether a file's first frame, read at the size of these cells, shows them."""
    picture = to_bytes(read_video(path, [8 * side for side in levels.shape]))[0]
    return abs(picture[4::8, 4::8].mean(-1) - levels).max() < 4


def counted(frames):
    """Pictures (T, 16, 16, 3) of which each tells its number."""
    return np.arange(0, 10 * frames, 10, np.uint8).repeat(768).reshape(-1, 16, 16, 3)


def numbers(path, fps=0.0):
    """Which of `counted` the frames of a video are."""
    return [round((float(frame.mean()) + 1) * 12.75) for frame in read_video(path, 16, fps)]


def write_video(
    path, pictures, pix_fmt="yuv444p", codec="libx264", times=None, turn=(0,), aspect=1
):
    """Write pictures (T, height, width, 3 or 4), ten a second or at times in 1/100 s."""
    unit = Fraction(1, 100 if times else 10)
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, channels = pictures.shape[1:]
        stream.pix_fmt = pix_fmt
        stream.options = {"x264-params": "bframes=3:b-adapt=0:scenecut=0"}
        stream.codec_context.time_base = unit
        stream.codec_context.sample_aspect_ratio = aspect
        stream.set_display_rotation(*turn)
        for t, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24" if channels == 3 else "rgba")
            frame.pts = times[t] if times else t
            frame.time_base = unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_a_video_is_turned_as_its_display_matrix_says(tmp_path):
    for degrees, mirrored in product((0, 90, 180, 270), (False, True)):
        write_video(tmp_path / "a.mp4", cells(GRID)[None], turn=(degrees, mirrored))
        levels = np.rot90(GRID, degrees // 90)  # counterclockwise, and then mirrored
        assert shown(tmp_path / "a.mp4", levels[:, ::-1] if mirrored else levels), degrees


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    photo = tmp_path / "a.jpg"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.fromarray(cells(GRID)).save(photo, exif=exif, quality=95)
        levels = np.asarray(ImageOps.exif_transpose(Image.open(photo)))[4::8, 4::8, 0].astype(int)
        assert shown(photo, levels), orientation

    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 24, 32, "yuvj420p"
        packet = av.Packet(photo.read_bytes())
        packet.stream, packet.pts, packet.dts = stream, 0, 0
        container.mux(packet)
    assert shown(tmp_path / "a.mov", levels), "a video of photos"


def test_pixels_need_not_be_squares(tmp_path):
    for turns in (0, 1):
        write_video(tmp_path / "a.mp4", cells(GRID)[None], turn=(90 * turns,), aspect=2)
        assert shown(tmp_path / "a.mp4", np.rot90(GRID.repeat(2, 1), turns))


def test_what_is_transparent_is_over_black(tmp_path):
    alpha = np.array([[255, 0, 128, 255]] * 3)
    picture = np.concatenate([cells(GRID), cells(alpha)[..., :1]], -1)
    image = Image.fromarray(picture)
    image.save(tmp_path / "a.png")
    image.quantize().save(tmp_path / "palette.png")
    for name in ("a.png", "palette.png"):
        assert shown(tmp_path / name, GRID * (alpha / 255)), name
    Image.new("RGBA", (16, 16), "white").save(tmp_path / "white.png")
    assert (read_video(tmp_path / "white.png", 16) == 1).all()


def test_depth_and_name_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for pix_fmt, codec in (("yuv420p10le", "libx264"), ("gray12le", "ffv1"), ("gray", "ffv1")):
        write_video("a: é.mkv", cells(GRID)[None], pix_fmt, codec)
        assert shown("a: é.mkv", GRID), pix_fmt


def test_a_video_is_scaled_to_cover_and_cropped_to_its_centre(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, cells(GRID)[None])
    whole = read_video(path, (24, 32))
    assert torch.equal(read_video(path, (24, 15)), whole[..., 8:23])
    assert torch.equal(read_video(path, (16, 32)), whole[..., 4:20, :])
    assert abs(to_bytes(read_video(path, (3, 4)))[0, ..., 0] - 1.0 * GRID).max() < 16


def at_a_rate(times, fps):
    """Which frame is shown at each tick: the last one whose time rounds to it or to an earlier."""
    *ticks, end = (int((t - times[0]) * fps / 100 + 0.5) for t in [*times, times[-1] + 10])
    return [max(i for i, tick in enumerate(ticks) if tick <= now) for now in range(end)]


def test_a_video_is_read_at_a_constant_rate(tmp_path):
    uneven = [0, 10, 24, 30, 42, 50, 58, 70, 110, 120]
    for times, kind in product((list(range(7, 200, 10)), uneven), ("mkv", "mp4")):
        path = tmp_path / f"a.{kind}"
        write_video(path, counted(len(times)), times=times)
        for fps in (0, 4, 7.5, 25):
            assert numbers(path, fps) == at_a_rate(times, fps or 10), (kind, fps)
    assert len(read_video(path, 16, 25, frames=3)) == 3


def test_equal_frames_that_a_gif_merges_come_back(tmp_path):
    for order in ([0, 1, 2, 3, 4], [0, 0, 0, 1, 2, 3, 4, 4], [0, 0, 0, 1, 2, 2, 3, 4, 4, 4]):
        frames = counted(5)[order]
        iio.imwrite(tmp_path / "a.gif", frames, plugin="pillow", duration=100)
        assert numbers(tmp_path / "a.gif") == order


def test_frames_without_times_come_in_order(tmp_path):
    for name in ("a.avi", "a.h264"):
        write_video(tmp_path / name, counted(20))
        assert numbers(tmp_path / name) == list(range(20))
        assert numbers(tmp_path / name, 5) == list(range(0, 20, 2))
    write_video(tmp_path / "a.avi", counted(5), "yuv420p", "mpeg4", [0, 10, 40, 50, 60])
    assert numbers(tmp_path / "a.avi") == [0, 1, 1, 1, 2, 3, 4], "frames that a recorder dropped"


def test_what_comes_before_the_damage_is_read(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, counted(20), "yuv420p", "mpeg4")
    with av.open(str(path)) as container:
        packet = list(container.demux(video=0))[12]
    content = bytearray(path.read_bytes())
    content[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(content)
    assert numbers(path) == list(range(12))


def test_a_file_that_ffmpeg_cannot_read_is_one_line(tmp_path):
    iio.imwrite(tmp_path / "a.webp", counted(4), plugin="pillow", duration=100)
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "a.mp4").touch()
    for name in ("a.webp", "a.txt", "a.mp4", "nowhere.mp4"):
        with pytest.raises(ValueError, match="ffmpeg cannot read it: [A-Z]"):
            read_video(tmp_path / name, 16)


# ---- folders of videos


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    """A folder as people have it: ten videos of 20 frames, pictures, and files that are none."""
    folder = tmp_path_factory.mktemp("odd")
    film = np.stack([np.roll(cells(GRID), t, 1) for t in range(20)])
    write_video(folder / "turned.mp4", film, turn=(90,))
    write_video(folder / "uneven.mp4", film, times=[10 * t + t % 3 for t in range(20)])
    write_video(folder / "ten.mp4", film, "yuv420p10le")
    write_video(folder / "grey.mp4", film, "gray")
    write_video(folder / "clear.mov", np.concatenate([film, film[..., :1]], -1), "rgba", "png")
    write_video(folder / "tall.mp4", film.transpose(0, 2, 1, 3))
    write_video(folder / "odd.mp4", film[:, :19, :23])
    write_video(folder / "Été à Paris: 1.mp4", film)
    write_video(folder / "cut.mkv", film, "yuv444p", "ffv1")
    (folder / "cut.mkv").write_bytes((folder / "cut.mkv").read_bytes()[:-500])
    iio.imwrite(folder / "film.gif", film, plugin="pillow", duration=100)
    (folder / "turned.txt").write_text("A red boat, moving")
    for name in ("1.mp4", "2.mkv", "3.gif", "4.jpg", "notes.log", ".hidden", "runs/a.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no video")
    (folder / "frames").mkdir()
    for number in range(60):
        Image.fromarray(film[0]).save(folder / f"frames/{number:04d}.png")
    return folder


def test_a_folder_of_odd_files_is_read(odd_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    videos = Videos(odd_folder, (24, 40), 15)
    assert len(videos.files) == 10 and videos.fps == 10, "pictures do not decide the rate"
    items = [videos[i] for i in range(10)]
    assert all(z.shape == (15, 3, 24, 40) and z.std() > 0.2 for z, _ in items)
    assert videos.words.vocabulary == ["a", "boat", "moving", "red"], "of turned.txt"
    assert [c.shape for _, c in items] == [(4, 8)] * 10 and sum(c.any() for _, c in items) == 1
    bad, short = capsys.readouterr().err.splitlines()
    assert "skipping 5 of 75 files: " in bad and bad.count("(") == 3 and bad.endswith(" and 2 more")
    assert "skipping 60 of 70 clips, of fewer than 15 frames" in short

    monkeypatch.setenv("RANK", "1")
    Videos(odd_folder, (24, 40), 15)
    assert capsys.readouterr().err == "", "the first process alone warns"


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """A folder of three small videos, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    folder = Path("clips")
    folder.mkdir()
    for number, name in enumerate(("a.mp4", "b.mkv", "c.mp4")):
        write_video(folder / name, counted(20)[5 * number :])
    return folder


def test_a_folder_is_decoded_once(clips, capsys):
    first = Videos(clips, 16, 8)
    assert "decoding 3 files to runs/cache, about 3.5e-05 GB" in capsys.readouterr().out
    for path in clips.iterdir():
        state = path.stat()
        path.write_bytes(bytes(state.st_size))
        os.utime(path, ns=(0, state.st_mtime_ns))
    again = Videos(clips, 16, 8)
    assert all(same(again[i], first[i]) for i in range(3)) and again.fps == 10
    assert capsys.readouterr() == ("", ""), "no video is opened"


def test_another_video_size_or_rate_is_decoded_anew(clips, capsys):
    def decoded(size, fps=0.0):
        Videos(clips, size, 4, fps)
        return capsys.readouterr().out[:10]

    assert [decoded(16), decoded((16, 16)), decoded(8)] == ["decoding 3", "", "decoding 3"]
    os.utime(clips / "a.mp4", (0, 1))
    assert [decoded(16, 5.0), decoded(16)] == ["decoding 3", "decoding 1"]
    write_video(clips / "a.mp4", counted(9))
    os.utime(clips / "a.mp4", (0, 1))
    assert [decoded(16), decoded(16)] == ["decoding 1", ""]


def test_frames_that_were_not_written_to_the_end_are_decoded_anew(clips):
    whole = Videos(clips, 16, 8)
    for path in Path("runs/cache").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:500])
        path.with_suffix(".json").unlink()
    assert all(same(Videos(clips, 16, 8)[i], whole[i]) for i in range(3))


def test_a_name_that_is_no_text_and_two_names_of_one_file_are_read(clips):
    os.symlink("a.mp4", clips / "d.mp4")  # a thread each: they must not write to one file
    shutil.copy(clips / "a.mp4", os.fsencode(clips) + b"/caf\xe9.mp4")
    assert len({file["array"] for file in Videos(clips, 16, 8).files}) == 5


def test_open_data_gives_a_folder_every_flag(clips):
    videos = data.open_data(data_args(clips, size=(8, 16), frames=10, fps=5.0, seed=3))
    assert (videos.fps, videos.seed, len(videos.files)) == (5, 3, 1)
    assert videos[0][0].shape == (10, 3, 8, 16)


def test_a_file_that_turns_bad_later_is_named_once_and_replaced(clips, capsys):
    videos = Videos(clips, 16, 8)
    first, second, third = (file["array"] for file in videos.files)
    first.write_bytes(b"")
    second.unlink()
    assert all(len(videos[i][0]) == 8 for i in range(9))
    assert capsys.readouterr().err.count("skipping runs") == 2
    third.unlink()
    with pytest.raises(ValueError, match="none of the files"):
        videos[0]


# ---- folders of latents


@pytest.fixture
def latents(tmp_path):
    """A folder of latents: 6, 7, 8 frames (4, 4, 8) of 100 file + frame, with 2, 3, 4 rows."""
    folder = tmp_path / "latents"
    folder.mkdir()
    for number in range(3):
        values = 100 * number + np.arange(6 + number, dtype=np.float32)
        np.save(folder / f"{number}.npy", np.tile(values[:, None, None, None], (1, 4, 4, 8)))
        np.save(folder / f"{number}.text.npy", np.full((2 + number, 7), number + 1, np.float16))
    return folder


def test_every_file_comes_once_an_epoch_and_the_seed_draws_its_start(latents):
    def drawn(seed):
        videos = Videos(latents, 16, 4, seed=seed)
        clips = [videos[i][0][:, 0, 0, 0].tolist() for i in range(90)]
        assert all(clip == [clip[0] + t for t in range(4)] for clip in clips)
        return [divmod(clip[0], 100) for clip in clips]

    clips, other = drawn(5), drawn(6)
    assert clips == drawn(5) and set(clips) == {(f, s) for f in range(3) for s in range(3 + f)}
    files = [f for f, _ in clips]
    assert {tuple(files[i : i + 3]) for i in range(0, 90, 3)} == set(permutations(range(3)))
    assert files != [f for f, _ in other], "the seed draws the order"
    assert any(a[0] == b[0] and a != b for a, b in zip(clips, other)), "and the start"


def test_latents_come_with_their_text_padded(latents):
    videos = Videos(latents, 16, 6)
    assert (videos.channels, list(videos.size), videos.text_dim) == (4, [4, 8], 7)
    for video, c in (videos[i] for i in range(3)):
        rows = 2 + int(video[0, 0, 0, 0]) // 100
        assert c.shape == (4, 7) and (c[:rows] == rows - 1).all() and not c[rows:].any()
    for path in latents.glob("*.text.npy"):
        path.unlink()
    assert not Videos(latents, 16, 6)[0][1].any(), "without a text"


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts files as Linux does")
def test_clips_hold_no_file_open(clips, latents):
    before = len(os.listdir("/proc/self/fd"))
    videos = [Videos(folder, 16, 4) for folder in (clips, latents)]
    items = [folder[i] for folder in videos for i in range(9)]
    assert len(items) == 18 and len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name, shape", [("2", (6, 4, 4, 9)), ("0", (6,)), ("2.text", (2, 9))])
def test_latents_of_another_shape_are_refused_with_their_name(name, shape, latents):
    np.save(latents / f"{name}.npy", np.zeros(shape))
    with pytest.raises(ValueError, match=rf"latents/{name[0]}.npy .*\(T, C, height, width\)"):
        Videos(latents, 16, 6)


def test_latents_that_cannot_be_read_are_named_and_skipped(latents, capsys):
    np.save(latents / "1.npy", np.full((7, 4, 4, 8), np.nan))
    np.save(latents / "2.text.npy", np.full((4, 7), np.inf))
    (latents / "3.npy").write_text("no array")
    videos = Videos(latents, 16, 6)
    assert all(videos[i][0].max() < 100 for i in range(9))
    err = capsys.readouterr().err
    assert err.count("3.npy") == 1 and err.count("NaN or inf") == err.count("\n") - 1 == 2


# ---- writing


@pytest.mark.parametrize("name, height", [("a.mp4", 134), ("a.GIF", 135)])
def test_a_video_comes_back_as_written(name, height, tmp_path):
    path = tmp_path / "new" / name
    colour = torch.tensor([1, 0.5, -1])[:, None, None].expand(3, 15, 25)
    video = torch.linspace(-1, 1, 5)[:, None, None, None] * colour
    with writer(path, 5) as write:
        write(video[:2])
        write(video[2:])
    read = read_video(path, (15, 25))
    assert read.shape == video.shape and (read - video).abs().max() < 0.05
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert (stream.average_rate, stream.height) == (5, height), "enlarged; even in .mp4"


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("before", "after"):
        with data.replacing(path) as part:
            part.write_text(text)
        with pytest.raises(KeyError), data.replacing(path) as part:
            part.write_text("half")
            assert path.read_text() == text and part.name[0] == "."
            raise KeyError
        assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_pixels_are_rounded_and_clamped():
    video = torch.tensor([-2.0, -1, 0, 1]).expand(1, 3, 1, 4)
    assert to_bytes(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255]


# ---- Wan and the command line


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    """A diffusers folder with a random VAE, text encoder and tokenizer, each as small as it can."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers transformers ftfy")
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    pytest.importorskip("ftfy", reason="pip install ftfy, which cleans Wan's prompts")
    import tokenizers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    config = transformers.UMT5Config(
        vocab_size=16,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    words = ("<pad>", "</s>", "<unk>", "a", "red", "boat")
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    folder = tmp_path_factory.mktemp("wan")
    diffusers.WanPipeline(
        tokenizer,
        transformers.UMT5EncoderModel(config),
        vae,
        diffusers.FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)
    return folder


@pytest.mark.extras
def test_videos_become_latents_and_finished_ones_are_kept(
    wan_folder, tmp_path, monkeypatch, capsys
):
    videos, out = tmp_path / "videos", tmp_path / "out"
    for name, frames in (("long", 20), ("more/long", 9), ("short", 5)):
        with writer(videos / f"{name}.mp4", 16) as write:
            write(torch.rand(frames, 3, 48, 72) * 2 - 1)
    (videos / "long.txt").write_text("a red boat")
    (videos / "bad.mp4").write_text("no video")
    flags = "--device cpu --size 32x48 --frames 9"
    argv = f"{videos} {out} --wan {wan_folder} {flags}".split()
    data.main(argv)
    err = capsys.readouterr().err
    assert "bad.mp4: ffmpeg cannot read it" in err and "short.mp4: it has 5 frames" in err

    latents, wan = Videos(out, 16, 3), data.Wan(wan_folder)
    first, second, other = (file["array"] for file in latents.files)
    assert second == out / "long.mp4-0001.npy" and other == out / "more/long.mp4-0000.npy"
    clip = read_video(videos / "long.mp4", (32, 48), fps=16)[9:18]
    expected = wan.encode(clip[None])[0], wan.text(["a red boat"])[0]
    item = latents.load(latents.files[1], 0)
    assert same(item, tuple(z.half().float() for z in expected))

    first.unlink()
    other.unlink()
    before = second.stat().st_mtime_ns
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, there in (("0", [False, True]), ("1", [True, True])):
        monkeypatch.setenv("RANK", rank)
        data.main(argv)
        assert [first.exists(), other.exists()] == there, "torchrun divides the videos"
    assert second.stat().st_mtime_ns == before


@pytest.mark.extras
def test_latents_are_normalised_and_decoded_one_by_one_as_at_once(wan_folder):
    wan = data.Wan(wan_folder)
    vae = wan.pipe.vae
    torch.manual_seed(0)
    video = torch.rand(1, 9, 3, 32, 48) * 2 - 1
    raw = vae.encode(video.transpose(1, 2)).latent_dist.mode()
    whole = vae.decode(raw).sample.clamp(-1, 1).transpose(1, 2)

    latents = wan.encode(video)
    expected = (raw[:, 3] - vae.config.latents_mean[3]) / vae.config.latents_std[3]
    assert torch.allclose(latents[:, :, 3], expected, atol=1e-5)
    decode = wan.decoder()
    parts = [decode(latents[:, :1]), decode(latents[:, 1:])]
    assert [part.shape[1] for part in parts] == [1, 8]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5


@pytest.mark.extras
def test_the_text_of_wan_is_512_rows_and_zero_behind_the_prompt(wan_folder, tmp_path):
    c = data.Wan(wan_folder).text(["a red boat", "a"])
    assert c.shape == (2, 512, 32) and not c[0, 4:].any() and not c[1, 2:].any()
    assert c[0, :4].any(-1).all()
    with pytest.raises(ValueError, match="holds no model_index.json"):
        data.Wan(tmp_path)


def test_encode_refuses_before_it_writes(clips):
    for flags in ("--size 40x64", "--frames 80"):
        with pytest.raises(ValueError, match="--size of multiples of 16, and --frames 4 n - 3"):
            data.main(["clips", "out", "--wan", "clips", *flags.split()])
    assert not Path("out").exists()


def test_numbers_and_sizes_are_parsed():
    whole, real, size = (data.number(int, 1, 9), data.number(float, 0.5), data.picture_size)
    assert [whole("1"), whole("9"), real("0.5")] == [1, 9, 0.5]
    assert [size("64"), size("480x832")] == [64, (480, 832)]
    for read, wanted, texts in (
        (whole, "a whole number from 1 to 9", "0 10 1.5 many"),
        (real, "a number from 0.5 to", "0.4 nan inf"),
        (size, "pixels, such as 64 or 480x832", "0 0x8 8x -3 100000"),
    ):
        for text in texts.split():
            with pytest.raises(argparse.ArgumentTypeError, match=f"got {text}, wanted {wanted}"):
                read(text)


def test_a_script_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["some/train.py", "--nope"])

    def full_disk(argv):
        raise OSError(28, "No\n  space", "a.pt")

    def interrupt(argv):
        raise KeyboardInterrupt

    parse = data.Parser("What it does.").parse_args
    for main, status, line in (
        (parse, 2, "train.py: unrecognized arguments: --nope\n"),
        (full_disk, 2, "train.py: [Errno 28] No space: 'a.pt'\n"),
        (interrupt, 130, ""),
    ):
        with pytest.raises(SystemExit) as end:
            data.run_main(main)
        assert (end.value.code, *capsys.readouterr()) == (status, "", line)


gc.freeze()  # imageio collects garbage twice for each file


# ---- train.py ----


BOX = HERE / "results/resample.pt"
TINY = "--size 8 --frames 4 --patch 4 --dim 24 --heads 2 --layers 1 --batch 2 --lr-warmup 2"
TINY = [*TINY.split(), "--device", "cpu"]


def checkpoint_of(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def run_train(folder, flags, *more):
    train.main([*TINY, "--out", str(folder), *flags.split(), *map(str, more)])
    return checkpoint_of(folder)


def logged(folder, *names):
    """What log.jsonl holds under these names, of the lines that have the first."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [[entry[name] for name in names] for entry in entries if names[0] in entry]


@pytest.fixture(autouse=True)
def usual_signals():
    """train.main catches them."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def quick(monkeypatch):
    """Leave out pictures and the final report, which most tests of training do not need."""
    monkeypatch.setattr(train, "log_samples", lambda *_: None)
    monkeypatch.setattr(train, "report", lambda *_: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps, the first one teacher forcing; out.txt holds what it printed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with open(folder.with_name("out.txt"), "w") as out, contextlib.redirect_stdout(out):
        run_train(folder, "--steps 3 --warmup 1 --sample-every 2")
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of `trained` that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


# Algorithm 1, slowly: clip by clip, without a cache, and with torch's own AdamW


def generator_of(index):
    key = np.random.SeedSequence([0, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key))


def loss_by_hand(net, x, c, history, generator):
    t = torch.sigmoid(torch.randn(1, x.shape[1], generator=generator))
    t = 3 * t / (1 + 2 * t)
    eps = torch.randn(x.shape, generator=generator)
    level = t[:, :, None, None, None]
    v = net((1 - level) * x + level * eps, t, c, history)
    return ((eps - x - v) ** 2).mean()


@torch.no_grad()
def resample_by_hand(net, x, c, generator):
    t_s = torch.sigmoid(torch.randn((), generator=generator))
    t_s = 0.3 * t_s / (1 - 0.7 * t_s)
    frames = (1 - t_s) * x + t_s * torch.randn(x.shape, generator=generator)
    for i in range(x.shape[1]):
        for t in (t_s, t_s / 2):
            v = net(frames[:, [i]], t.expand(1, 1), c, frames[:, :i], first=i)
            frames[:, [i]] = frames[:, [i]] - t_s / 2 * v
    return frames


def newton_schulz(matrix):
    """Muon's five iterations, of a polynomial that acts on the singular values alone."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm().clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u * s @ v


def by_hand(muon, clip):
    """Three steps: (net, average, losses and norms). muon: its learning rate, or 0 for AdamW."""
    torch.manual_seed(0)
    net = CausalDiT(Config(dim=24, ffn_dim=96, heads=2, layers=1, predict="x"))
    weights = dict(net.named_parameters())
    average = {name: p.detach().clone() for name, p in weights.items()}
    momentum = {n: 0 for n, p in weights.items() if muon and p.dim() == 2 and "blocks" in n}
    optimizers = []
    for decay, matrix in ((0.01, True), (0, False)):
        chosen = [p for n, p in weights.items() if (p.dim() == 2) == matrix and n not in momentum]
        optimizers.append(torch.optim.AdamW(chosen, betas=(0.9, 0.95), weight_decay=decay))
    log = []

    for step in range(3):
        loss = 0
        for index in range(4 * step, 4 * step + 4):
            generator = generator_of(index)
            x, c = (z[None] for z in Sprites(8, 4)[index])
            if torch.rand((), generator=generator) < 0.4:
                c = torch.zeros_like(c)
            history = x[:, :-1]
            if step >= 1:
                history = resample_by_hand(net, history, c, generator)
            loss = loss + loss_by_hand(net, x, c, history, generator) / 4

        net.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in weights.values()).sqrt().item()
        for p in weights.values():
            p.grad *= min(1, clip / norm)
        rising = min(1, (step + 1) / 2)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.003 * rising
            optimizer.step()
        for name in momentum:
            p = weights[name]
            momentum[name] = 0.95 * momentum[name] + 0.05 * p.grad
            update = newton_schulz(0.95 * momentum[name] + 0.05 * p.grad)
            p.data *= 1 - 0.01 * muon * rising
            p.data -= 0.2 * max(p.shape) ** 0.5 * muon * rising * update

        decay = min(0.2, (1 + step) / (10 + step))
        for name, p in weights.items():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
        log.append([loss.item(), norm])
    return weights, average, log


@pytest.mark.parametrize("optimizer, muon", [("adamw", 0), ("muon", 0.002)])
def test_the_loop_is_algorithm_1(optimizer, muon, tmp_path, quick):
    flags = "--steps 3 --warmup 1 --batch 4 --accumulate 2 --shift 0.3 --resample-steps 2"
    flags += " --drop 0.4 --clip 1.4 --ema 0.2 --lr 0.003 --decay constant"
    state = run_train(tmp_path, f"{flags} --optimizer {optimizer} --muon-lr {muon or 1}")
    weights, average, log = by_hand(muon, 1.4)

    norms = [norm for _, norm in log]
    assert min(norms) < 1.4 < max(norms), "clipping acts on some of the steps"
    assert np.allclose(logged(tmp_path, "loss", "norm"), log, atol=1e-4)
    for name, p in weights.items():
        assert close(state["model"][name], p.detach(), 1e-5), name
        assert close(state["ema"][name], average[name], 1e-5), name


def test_a_clip_draws_the_same_noise_in_any_batch():
    keys = (3, [9]), (3, [8, 9]), (4, [9])
    alone, both, other = (train.ClipNoise(*key, "cpu") for key in keys)
    for draw in ("rand", "randn", "randn"):
        a, b, z = (getattr(x, draw)(len(x.generators), 50) for x in (alone, both, other))
        assert torch.equal(a[0], b[1]) and not torch.equal(b[0], b[1]) and not torch.equal(a, z)
        assert (0 <= b.min() and b.max() < 1) == (draw == "rand")


def test_the_warm_up_ends_at_its_step_and_the_share_is_a_share():
    args = train.parse(["--warmup", "5", "--history", "noise"])
    names = [train.history_at(step, args).__name__ for step in range(7)]
    assert names == 5 * ["teacher_history"] + 2 * ["noise_history"]
    args = train.parse(["--warmup", "0", "--resample-share", "0.25"])
    used = sum(train.history_at(step, args) is rf.HISTORY["resample"] for step in range(2000))
    assert 0.2 < used / 2000 < 0.3


def test_the_learning_rates_rise_and_then_fall_to_0():
    half = 4 * 2**0.5 / 2
    for decay, rates in {
        "constant": [2, 4, 8, 8, 8, 8, 8, 8],
        "linear": [2, 4, 8, 8, 6, 4, 2, 0],
        "cosine": [2, 4, 8, 8, 4 + half, 4, 4 - half, 0],
    }.items():
        args = train.parse(f"--lr 8 --muon-lr 2 --lr-warmup 4 --steps 12 --decay {decay}".split())
        found = [train.learning_rate(step, args) for step in (0, 1, 3, 4, 6, 8, 10, 12)]
        assert np.allclose(found, rates), decay

    adamw, muon = train.make_optimizers(CausalDiT(Config()), "muon")
    train.set_learning_rate([adamw, muon], 1, args)
    assert [group["lr"] for group in adamw.param_groups + muon.param_groups] == [4, 4, 1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_on_matrices_only(optimizer):
    net = CausalDiT(Config())
    for p in net.parameters():
        torch.nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    for part in train.make_optimizers(net, optimizer):
        for group in part.param_groups:
            group["lr"] = 1
        part.step()
    for name, p in net.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        assert torch.equal(p, torch.full_like(p, 0.99 if matrix else 1)), name


@pytest.mark.parametrize("shape", [(24, 24), (12, 30), (30, 12)])
def test_muon_is_torch_s_in_the_precision_of_the_gradient(shape):
    """torch's iterates in bfloat16, which has three digits."""
    torch.manual_seed(0)
    start, *gradients = torch.randn(4, *shape, dtype=torch.float64)
    assert close(train.orthogonalize(start), newton_schulz(start), 1e-12)

    moved = []
    for kind, options in (
        (train.Muon, {}),
        (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}),
    ):
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([p], lr=0.1, weight_decay=0.3, **options)
        for p.grad in gradients:
            optimizer.step()
        moved.append(p - start)
    assert (moved[0] - moved[1]).norm() < 0.02 * moved[0].norm()


def test_every_flag_of_the_method_reaches_the_losses(tmp_path, quick):
    """Flags of one line train alike, and unlike those of all other lines."""
    lines = """
        --recompute ; --save-every 1
        --warmup 3 ; --history teacher ; --resample-share 0
        --history noise ; --history noise --noise 0.3
        --data hidden ; --data hidden --drop 1
        --history noise --noise 0.9
        --history parallel
        --history parallel --resample-steps 2
        --resample-steps 3
        --shift 3
        --time-shift 5
        --drop 1
        --clip 0.01
        --lr 1e-3
        --muon-lr 1e-3
        --optimizer adamw
        --objects 1
        --seed 1
        --top-k 1
        --window 1
        --heads 3
        --precision bf16
    """
    found = set()
    lines = lines.split("\n")[1:-1]
    for number, line in enumerate(lines):
        losses = set()
        for part, flags in enumerate(line.split(";")):
            folder = tmp_path / f"{number}-{part}"
            run_train(folder, f"--steps 3 --warmup 1 {flags}")
            losses.add(str(logged(folder, "loss")))
        assert len(losses) == 1, line
        found |= losses
    assert len(found) == len(lines) and "nan" not in str(found)


def trained_alike(one, other):
    """Adam hides the scale of a gradient, so compare its norm too; weights by how far they move."""
    assert np.allclose(logged(one, "loss", "norm"), logged(other, "loss", "norm"), atol=1e-4)
    one, other = checkpoint_of(one), checkpoint_of(other)
    torch.manual_seed(0)
    start = CausalDiT(Config(**one["config"])).state_dict()
    for part in ("model", "ema"):
        for name, value in one[part].items():
            moved = (value - start[name]).norm()
            assert (value - other[part][name]).norm() <= 1e-3 * moved != 0, (part, name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_are_one_batch(optimizer, tmp_path, quick):
    for parts in "124":
        flags = f"--steps 3 --warmup 1 --batch 4 --lr 1e-3 --muon-lr 1e-3 --optimizer {optimizer}"
        run_train(tmp_path / parts, flags, "--accumulate", parts)
        trained_alike(tmp_path / "1", tmp_path / parts)


DRIVER = """
import os, sys, torch, train
train.log_samples = train.report = lambda *_: None
train.main(sys.argv[1].split())
meet = {"rank": int(os.environ["RANK"]), "world_size": 2, "init_method": sys.argv[3]}
torch.distributed.init_process_group("gloo", **meet)
train.main(sys.argv[2].split())
"""


def test_two_processes_are_one_sharded_or_not_and_resume_as_one(tmp_path, quick):
    flags = "--batch 4 --accumulate 2 --warmup 1 --decay constant --lr 1e-3 --muon-lr 1e-3"
    run_train(tmp_path / "one", flags, "--steps", 4)
    (tmp_path / "driver.py").write_text(DRIVER)
    parts = [
        f"{' '.join(TINY)} {flags} --steps 2 --out two",
        "--resume --fsdp --recompute --steps 3 --out two",
        f"file://{tmp_path}/meet",
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "driver.py", *parts]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and done.stdout.count("2 x cpu") == 2, done.stderr
    train.main(["--resume", "--steps", "4", "--out", str(tmp_path / "two")])
    trained_alike(tmp_path / "one", tmp_path / "two")


# what a run leaves


def test_a_run_leaves_what_design_says(trained):
    state = checkpoint_of(trained)
    assert state.keys() == {"config", "model", "ema", "optimizer", "step", "args"}
    assert state["step"] == 3 and not same(state["model"], state["ema"])
    words = [Sprites().words.vocabulary, 5]
    run = {"data": "sprites", "height": 8, "width": 8, "rate": 8, "words": words}
    assert state["args"].items() >= run.items()
    assert json.loads((trained / "config.json").read_text())["history"] == "resample"

    assert logged(trained, "history", "lr", "step") == [
        ["teacher_history", 0.0025, 1],
        ["resample_history", 0.005, 2],
        ["resample_history", 0.005, 3],
    ]
    assert all(min(z) > 0 for z in logged(trained, "loss", "norm", "seconds"))
    assert [step for _, step in logged(trained, "held_out_loss", "step")] == [2, 3]
    for name in ("step_000002.gif", "step_000003.png", "final.gif", "final.png"):
        assert (trained / "samples" / name).stat().st_size > 100
    assert len(iio.imread(trained / "samples/final.gif")) == 16
    out = trained.with_name("out.txt").read_text()
    assert re.search(r"median step: teacher \d+ ms, resample \d+ ms; look at .*final.gif", out)


def test_the_held_out_loss_is_of_clips_that_are_not_trained_on_and_of_the_averaged_weights(trained):
    net = load_checkpoint(trained)
    losses = []
    for i in range(16):
        x, c = (z[None] for z in Sprites(8, 4, split="test")[i])
        losses.append(loss_by_hand(net, x, c, x[:, :-1], generator_of(i)).item())
    assert np.allclose(logged(trained, "held_out_loss")[-1], np.mean(losses), rtol=1e-5)


def test_the_last_table_is_that_of_eval(trained, tmp_path, capsys):
    flags = f"--eval --samples 16 --checkpoint {trained} --out {tmp_path}/eval.gif"
    sample.main(flags.split())
    assert sorted(os.listdir(tmp_path)) == ["eval.gif", "eval.png"]
    table = "\n".join(capsys.readouterr().out.splitlines()[1:-1])
    assert len(table) > 250 and table in trained.with_name("out.txt").read_text()


def test_pictures_continue_two_frames_with_the_sampler_and_window_of_the_run(trained):
    net, clips = load_checkpoint(trained), Sprites(8, 9, split="test")
    videos = train.continue_some(net, clips, 9, Namespace(frames=4, words=["a"]))
    truth, c = (torch.stack(z) for z in zip(*(clips[i] for i in range(4))))
    wanted = sample.generate(net, [(0, c)], truth[:, :2], 9, 4, 20.0, 2.0, window=3)
    assert torch.equal(videos["truth"], truth)
    assert torch.equal(videos["continued"], torch.cat([truth[:, :2], *wanted], 1))


# stopping and resuming


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stop, saved", [("", 2), ("save", 2), ("SIGINT", 5), ("SIGTERM", 5)])
def test_a_resumed_run_is_an_uninterrupted_one(stop, saved, tmp_path, monkeypatch, quick):
    """Bit for bit, across the warm-up, after a kill between two saves or amid one, and signals."""
    flags = "--steps 6 --warmup 3 --save-every 2 --batch 4 --accumulate 2 --ema 0.9"
    whole = run_train(tmp_path / "whole", flags)
    load, save = train.load_batch, torch.save

    def interrupted_load(data, step, *rest):
        if step == 4 and stop.startswith("SIG"):
            signal.raise_signal(signal.Signals[stop])
        if step == 3 and not stop:
            raise Killed
        return load(data, step, *rest)

    def interrupted_save(state, file):
        if stop == "save" and state["step"] == 4:
            file.write(b"half of it")
            raise Killed
        save(state, file)

    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        patched.setattr(train, "load_batch", interrupted_load)
        patched.setattr(torch, "save", interrupted_save)
        run_train(tmp_path / "part", flags)
    assert checkpoint_of(tmp_path / "part")["step"] == saved
    with open(tmp_path / "part/log.jsonl", "a") as log:
        log.write('{"step": 9, "loss": 1}\n{"step": 1, "lo')
    train.main(["--resume", "--out", str(tmp_path / "part")])

    part = checkpoint_of(tmp_path / "part")
    assert all(same(whole[key], part[key]) for key in ("model", "ema", "optimizer", "step"))
    names = ("step", "loss", "norm", "lr", "history")
    assert logged(tmp_path / "whole", *names) == logged(tmp_path / "part", *names)


def test_a_second_ctrl_c_stops_at_once_but_not_under_torchrun(monkeypatch, capsys):
    for rank in (None, "0"):
        if rank:
            monkeypatch.setenv("RANK", rank)
        caught = train.catch_signals()
        signal.raise_signal(signal.SIGINT)
        assert caught
        with contextlib.nullcontext() if rank else pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C again stops at once" in "".join(capsys.readouterr())


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("[enforce fail")])
def test_a_full_disk_leaves_the_last_checkpoint(error, copied, monkeypatch, quick):
    before = checkpoint_of(copied)

    def full(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"run/ckpt.pt \(.*(No space|enforce).*is the disk full"):
        train.main(["--resume", "--out", str(copied), "--steps", "4"])
    assert same(before, checkpoint_of(copied)) and not list(copied.glob(".*"))


@pytest.mark.parametrize("bad", [lambda p: p * torch.nan, lambda p: (p - p.detach()).sqrt()])
def test_what_is_not_finite_stops_before_the_weights_are_touched(bad, copied, monkeypatch, quick):
    """A loss of NaN, and a loss of 0 whose gradient is infinite."""
    nets = []

    def loss(net, *_):
        nets.append(net)
        return bad(net.head.head.bias).sum()

    monkeypatch.setattr(train, "flow_matching_loss", loss)
    with pytest.raises(ValueError, match="at step 3: the weights were not touched; .*ckpt.pt is"):
        train.main(["--resume", "--out", str(copied), "--steps", "5"])
    assert same(dict(nets[0].named_parameters()), checkpoint_of(copied)["model"])


def test_a_run_that_goes_on_beyond_its_end_says_what_the_learning_rate_does(copied, capsys, quick):
    resume = ["--resume", "--out", str(copied / "ckpt.pt")]
    train.main(resume)
    train.parse([*resume, "--steps", "6"])
    assert "warning" not in capsys.readouterr().err
    train.main([*resume, "--steps", "4", "--decay", "linear"])
    line = "with --steps 4 in place of 3 the learning rate goes on at 0.0025, not at 0.005;"
    assert line in capsys.readouterr().err and logged(copied, "lr")[-1] == [0.0025]


@pytest.mark.parametrize("source", ["run", "box", "wan"])
def test_init_starts_a_new_run_from_averaged_weights(source, trained, tmp_path, monkeypatch, quick):
    path, flags = {
        "run": (trained, "--top-k 1"),
        "box": (BOX, "--dim 96 --heads 4 --layers 4 --patch 8"),
        "wan": (tmp_path / "wan.pth", "--preset wan-1.3b --data sprites --optimizer adamw"),
    }[source]
    if source == "wan":
        monkeypatch.setitem(train.PRESETS, "wan-1.3b", Config(ffn_dim=96, chunk=2))
        wanted = CausalDiT(Config(dim=24, ffn_dim=96, heads=2, layers=1))
        torch.nn.init.normal_(wanted.head.head.weight)
        torch.save(wanted.state_dict(), path)
    else:
        wanted = load_checkpoint(path)
    flags += " --steps 1 --lr 1e-9 --muon-lr 1e-9 --batch 1"
    state = run_train(tmp_path / "new", flags, "--init", path)
    assert state["step"] == 1 and state["config"]["top_k"] == (1 if source == "run" else None)
    assert all(close(state["model"][name], p, 1e-6) for name, p in wanted.state_dict().items())


def test_new_runs_are_numbered_and_the_latest_is_resumed(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main([*TINY, "--steps", "1"])
    os.utime("runs/001/ckpt.pt", (2**31, 2**31))
    train.main(["--resume", "--steps", "2"])
    steps = [checkpoint_of(folder)["step"] for folder in sorted(Path("runs").iterdir())]
    assert steps == [2, 1]


# data


def test_a_folder_of_odd_videos_trains_a_model_that_continues_one(
    odd_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = "--size 16 --frames 2 --steps 2 --warmup 1 --data"
    run_train(Path("runs/odd"), flags, odd_folder)
    assert logged(Path("runs/odd"), "clip_loss") and not logged(Path("runs/odd"), "held_out_loss")
    assert len(iio.imread("runs/odd/samples/final.gif")) == 8
    given = odd_folder / "film.gif"
    sample.main(["--given", str(given), "--given-frames", "2", "--frames", "4", "--out", "x.mp4"])
    assert len(read_video("x.mp4", 16)) == 4


@pytest.fixture(scope="module")
def latent_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    for i in range(2):
        np.save(folder / f"{i}.npy", np.random.default_rng(i).normal(size=(6 + i, 4, 4, 8)))
        np.save(folder / f"{i}.text.npy", np.ones((2 + i, 7)))
    return folder


def test_latents_train_in_chunks_and_end_in_pictures(latent_folder, tmp_path):
    flags = "--frames 6 --chunk 3 --patch 2 --steps 2 --warmup 1 --data"
    state = run_train(tmp_path, flags, latent_folder)
    sizes = {"channels": 4, "text_dim": 7, "height": 4, "width": 8, "words": None}
    assert (state["config"] | state["args"]).items() >= sizes.items()
    assert len(iio.imread(tmp_path / "samples/final.gif")) == 24


def test_one_frame_trains_a_bidirectional_teacher(tmp_path):
    """--chunk as long as the clip: one frame, and no history."""
    state = run_train(tmp_path, "--steps 1 --chunk 4 --history teacher")
    assert state["config"]["chunk"] == 4 and len(iio.imread(tmp_path / "samples/final.gif")) == 4


# flags


TRAIN_FLAGS = """
--data --frames --size --fps --objects
--preset --dim --heads --layers --patch --chunk --top-k --window
--history --warmup --shift --resample-steps --resample-share --noise --time-shift --drop
--steps --batch --accumulate --optimizer --lr --muon-lr --lr-warmup --decay --clip --ema --seed
--out --init --resume --save-every --sample-every
--device --precision --compile --recompute --fsdp
"""
SAMPLE_FLAGS = """
--checkpoint --out --frames --steps --time-shift --guidance --given --given-frames --then
--window --sink --samples --seed --device --compile --eval --live --port --wan
"""


@pytest.mark.parametrize("script, flags", [(train, TRAIN_FLAGS), (sample, SAMPLE_FLAGS)])
def test_help_opens_with_the_docstring_and_explains_each_flag(script, flags, capsys):
    with pytest.raises(SystemExit):
        script.parse(["-h"])
    out = capsys.readouterr().out
    assert script.__doc__ in out and "None" not in out
    explained = re.findall(r"^  (--[a-z-]+).*?(?:\n {20,}|  )[\w\"]", out, re.M)
    assert sorted(explained) == sorted(flags.split())


def test_wan_s_preset_is_the_paper_s_recipe_and_flags_come_first():
    args = train.parse("--preset wan-1.3b --batch 8".split())
    paper = {"data": "latents", "frames": 21, "warmup": 10_000, "steps": 25_000, "lr": 5e-5}
    paper |= {"batch": 8, "optimizer": "adamw", "decay": "constant", "recompute": True}
    assert vars(args).items() >= paper.items()
    assert train.build(args, Config(), torch.device("cpu"))[0].recompute
    assert train.parse(["--chunk", "3"]).frames == 12, "whole chunks"


def test_compile_reaches_the_network_and_needs_a_compiler(trained, tmp_path, monkeypatch, quick):
    compiled = []
    with monkeypatch.context() as patched:
        patched.setattr(CausalDiT, "compile_blocks", lambda net: compiled.append(net))
        run_train(tmp_path / "run", "--steps 1 --compile")
        sample.open_model(sample.parse(["--compile"]), trained)
    assert len(compiled) == 2
    monkeypatch.setenv("PATH", "")
    for main, flags in ((train.main, TINY), (sample.main, ["--checkpoint", str(trained)])):
        with pytest.raises(ValueError, match="--compile needs a C.. compiler"):
            main([*flags, "--compile", "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, trained, latent_folder):
    """A folder of good and bad things to train on; no refused input may change it."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, caption in (("clips", "A red Circle"), ("others", "A blue Circle")):
        with writer(folder / name / "a.mp4", 10) as write:
            write(Sprites(16, 14)[0][0])
        (folder / name / "a.txt").write_text(caption)
    for name in ("empty", "foreign", "cut", "died"):
        (folder / name).mkdir()
    (folder / "foreign/notes.mp4").write_text("hello")
    (folder / "junk.pt").write_text("junk")
    (folder / "died/log.jsonl").write_text("")
    (folder / "cut/ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes()[:2000])
    shutil.copytree(latent_folder, folder / "latents")
    shutil.copytree(trained, folder / "full")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "log_samples", lambda *_: None)
        patched.setattr(train, "report", lambda *_: None)
        run_train(Path("video"), "--data clips --size 16 --steps 1")
        run_train(Path("chunks"), "--chunk 2 --steps 1")
        run_train(Path("of-latents"), "--data latents --patch 2 --frames 6 --steps 1")
    return folder


def refuse(main, argv, words, folder):
    """`main` raises one line that has these words, in their order, and no file changes."""

    def files():
        paths = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts]
        return {path: path.read_bytes() for path in paths}

    before = files()
    with contextlib.chdir(folder), pytest.raises((ValueError, OSError)) as error:
        main(argv)
    line = data.one_line(error.value)
    assert re.search(".*".join(map(re.escape, words.split(" ... "))), line), line
    assert files() == before


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--data nowhere", "nowhere is not a folder; wanted one of videos ... sprites"),
        ("--data empty", "empty holds no files"),
        ("--data foreign", "no clip in foreign has 4 frames"),
        ("--data clips --size 16 --frames 99", "no clip in clips has 99 frames ... longest has 14"),
        ("--data latents --frames 99", "no clip in latents has 99 ... longest has 7"),
        ("--data latents --patch 3", "--size 4: wanted a multiple of 3, the patch; 6 would work"),
        ("--size 18", "--size 18: wanted a multiple of 4, the patch; 20 would work"),
        ("--size 16x32", "sprites live in a square"),
        ("--size big", "--size: got big, wanted pixels, such as 64 or 480x832"),
        ("--dim 48 --heads 5", "a dim of 48 cannot be split into 5 heads ... 50 would work"),
        ("--frames 7 --chunk 3", "--frames 7: wanted whole chunks of 3 ... 9 would work"),
        ("--frames 3 --chunk 3", "--frames 3 ... two of them ... no history ... 6 would work"),
        ("--batch 3 --accumulate 2", "--batch 3: wanted a multiple of 2 ... 4 would work"),
        ("--top-k 0", "--top-k: got 0, wanted a whole number from 1"),
        ("--window 0", "--window: got 0, wanted a whole number from 1"),
        ("--steps -3", "--steps: got -3, wanted a whole number from 1"),
        ("--batch 2.5", "--batch: got 2.5, wanted a whole number from 1"),
        ("--frames 0", "--frames: got 0, wanted a whole number from 1"),
        ("--lr 0", "--lr: got 0, wanted a number from"),
        ("--muon-lr nan", "--muon-lr: got nan, wanted a number from"),
        ("--shift 0", "--shift: got 0, wanted a number from"),
        ("--ema 1", "--ema: got 1, wanted a number from 0 to 0.999999"),
        ("--resample-share 1.5", "--resample-share: got 1.5, wanted a number from 0 to 1"),
        ("--objects 7", "--objects: got 7, wanted a whole number from 1 to 6"),
        ("--seed -1", "--seed: got -1, wanted a whole number from 0"),
        ("--history magic", "--history: invalid choice: 'magic' ... teacher"),
        ("--device tpu", "--device: invalid choice: 'tpu' ... cpu"),
        ("--stepz 5", "unrecognized arguments: --stepz 5"),
        ("--fsdp", "torchrun --nproc-per-node 2 train.py --fsdp"),
        ("--out full", "--out full holds a run; --resume would continue it"),
        ("--out died", "--out died holds a run"),
        ("--out junk.pt", "--out junk.pt is a file; wanted a folder"),
        ("--resume", "there is no run under runs/; name one with --out"),
        ("--resume --out nowhere", "there is no checkpoint at nowhere"),
        ("--resume --out died", "there is no checkpoint at died"),
        ("--resume --out cut", "cut/ckpt.pt is not a checkpoint of train.py"),
        ("--resume --out full --steps 2", "--steps 2: full is already at step 3; more would work"),
        ("--resume --out full --init full", "the run's own weights; leave out --init"),
        ("--resume --out full --steps 9 --optimizer adamw", "is not that of --optimizer adamw"),
        ("--init nowhere", "there is no nowhere; wanted a run's folder"),
        ("--init empty", "there is no checkpoint at empty"),
        ("--init junk.pt", "junk.pt is not a checkpoint of train.py"),
        ("--init full --dim 48", "network of full has another shape: dim is 24 there and 48 here"),
        ("--init full --data latents --patch 2", "another shape: channels is 3 there and 4 here"),
        ("--init video --data others --size 16", "video was trained with other words ... others"),
        ("--preset wan-1.3b --chunk 1 --data latents --patch 2 --init empty", "empty has no diff"),
    ],
)
def test_bad_input_to_training_is_refused_in_one_line(flags, words, inputs):
    argv = flags.split() if "--resume" in flags else [*TINY, "--steps", "9", *flags.split()]
    refuse(train.main, argv, words, inputs)


# ---- sample.py ----


@pytest.fixture(scope="module")
def box():
    return load_checkpoint(BOX)


def embed(prompt):
    return Sprites().words(prompt)[None]


def noise(n, seed=0, batch=1, size=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, 3, size, size, generator=generator)


def generated(*arguments, **options):
    return torch.cat(list(sample.generate(*arguments, **options)), 1)


def rolled_out(*arguments, **options):
    return torch.cat(list(rollout(*arguments, **options)), 1)


TRUTH = Sprites()[0][0][None]


@pytest.mark.parametrize("scale, null", [(2.0, None), (2.0, 0.5), (0.0, None), (1.0, None)])
def test_generation_is_the_rollout_of_a_guided_model(scale, null, box):
    c, given = embed("red circle"), TRUTH[:, :2]
    blank = torch.full_like(c, null or 0)
    guided = box if scale == 1 else Guided(box, blank, scale)
    wanted = rolled_out(guided, noise(2, 7), torch.ones(1), c, 2, 3.0, given)
    options = {"seed": 7, "null": None if null is None else blank}
    assert torch.equal(generated(box, [(0, c)], given, 4, 2, 3.0, scale, **options), wanted)


def test_without_a_prompt_there_is_no_guidance():
    model = Recorder()
    generated(model, [(0, embed(""))], torch.zeros(1, 1, 3, 8, 8), 3, 1, guidance=2.0)
    assert [len(x) for x, *_ in model.calls] == [1, 1], "the second branch would be the same"


def test_a_switched_prompt_is_a_new_rollout_on_all_there_is(box):
    a, b = embed("red circle"), embed("blue square")
    done = TRUTH[:, :2]
    for x, c in zip(noise(4).split(2, 1), (a, b)):
        frames = rolled_out(box, x, torch.ones(1), c, 2, history=done)
        done = torch.cat([done, frames], 1)
    new = generated(box, [(0, b), (2, a), (4, b)], TRUTH[:, :2], 6, 2)
    assert torch.equal(new, done[:, 2:]), "the given frames cover the first text"


@pytest.mark.parametrize("steps", [2, 20])
def test_from_nothing_the_first_frame_is_made_alone_in_more_steps(steps):
    model = Recorder()
    new = generated(model, [(0, embed("red circle"))], torch.zeros(1, 0, 3, 8, 8), 3, steps)
    firsts = [first for *_, first in model.calls]
    assert firsts == [0] * max(16, steps) + [1] * steps + [2] * steps
    assert torch.equal(model.calls[max(16, steps)][2], new[:, :1]), "a history of the others"


def test_window_and_sink_reach_the_cache(box):
    c, given = embed("red circle"), TRUTH[:, :1]
    videos = []
    for options in ({"window": 2}, {"window": 2, "sink": 1}, {}):
        cache = box.cache(1, 6, **options)
        videos.append(rolled_out(box, noise(5), torch.ones(1), c, 1, 1.0, given, cache))
        assert torch.equal(generated(box, [(0, c)], given, 6, 1, **options), videos[-1])
    assert not torch.equal(videos[0], videos[1]) and not torch.equal(videos[0], videos[2])


@pytest.mark.parametrize(
    "name, words, config, settings",
    [
        ("sprites", ["red"], {}, [4, 20.0, 2.0, 9]),  # the last of 10 frames sees 9
        ("hidden", ["red"], {"chunk": 2}, [4, 20.0, 2.0, 4]),
        ("clips", ["red"], {"window": 3}, [16, 3.0, 1.5, 4]),  # and the frame that is evicted
        ("latents", None, {"window": 30}, [32, 5.0, 5.0, 9]),
        ("latents", None, {"chunk": 10}, [32, 5.0, 5.0, None]),
    ],
)
def test_the_sampler_follows_the_data_and_meets_no_new_position(name, words, config, settings):
    run = {"data": name, "words": words, "frames": 10}
    model = Namespace(config=Config(**config), run=run)
    assert list(sample.default_sampler(model).values()) == settings
    flags = "--steps 3 --time-shift 2 --guidance 0 --window 7 --sink 1 --seed 5".split()
    assert list(sample.sampler(sample.parse(flags), model).values()) == [3, 2.0, 0.0, 7, 1, 5]
    assert sample.sampler(sample.parse(["--window", "0"]), model)["window"] is None


# from a prompt to a file


def test_prompts_become_files_of_free_numbers_and_the_seed_decides(tmp_path, trained):
    flags = ["red circle", "Blue  square!", "--frames", "3", "--samples", "2"]
    for folder, seed in (("a", "0"), ("b", "0"), ("b", "1")):
        run = ["--checkpoint", str(trained), "--out", str(tmp_path / folder)]
        sample.main([*flags, *run, "--seed", seed])
    first, files = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in "ab")
    names = ["blue-square-0.mp4", "blue-square-1.mp4", "red-circle-0.mp4", "red-circle-1.mp4"]
    assert sorted(first) == names and len(read_video(tmp_path / "b/red-circle-3.mp4", 32)) == 3
    assert len(files) == len(set(files.values())) == 8, "each video has noise of its own"
    assert files.items() > first.items(), "the same seed makes the same, and nothing is replaced"


def test_a_file_that_out_names_is_replaced_and_written_at_the_run_s_rate(inputs, tmp_path):
    out = str(tmp_path / "x.MP4")
    for frames in ("3", "4"):
        sample.main(["--frames", frames, "--checkpoint", str(inputs / "video"), "--out", out])
    assert os.listdir(tmp_path) == ["x.MP4"] and len(read_video(out, 16)) == 4
    with av.open(out) as file:
        assert file.streams.video[0].average_rate == 10


@pytest.fixture
def clip_here(tmp_path, monkeypatch):
    """An empty working folder with clip.gif, 5 frames of sprites at 10 frames per second."""
    monkeypatch.chdir(tmp_path)
    with writer("clip.gif", 10) as write:
        write(Sprites(8, 5)[0][0])


def test_a_clip_is_continued_and_its_frames_come_first(clip_here, trained):
    flags = "--given clip.gif --frames 8 --out on.gif --checkpoint"
    sample.main(["red circle", *flags.split(), str(trained)])
    video, given = read_video("on.gif", 8), read_video("clip.gif", 8)
    assert len(video) == 8
    assert (video[:5] - given).abs().mean() < 0.1 < (video[5:] - given[4]).abs().mean()


def test_the_given_frames_are_whole_chunks_at_the_run_s_rate_or_a_picture(clip_here, box):
    def given(*flags, chunk=1, fps=0.0):
        model = Namespace(config=Config(chunk=chunk))
        model.run = {"height": 8, "width": 8, "fps": fps}
        return unfold(sample.read_given(sample.parse(["--given", *flags]), model, None), chunk)[0]

    clip = read_video("clip.gif", 8)
    assert torch.equal(given("clip.gif"), clip)
    assert torch.equal(given("clip.gif", "--given-frames", "3"), clip[:3])
    assert torch.equal(given("clip.gif", chunk=2), clip[:4])
    assert torch.equal(given("clip.gif", fps=5.0), read_video("clip.gif", 8, 5.0))
    pixels = to_bytes(clip[:1])[0]
    iio.imwrite("still.png", np.pad(pixels, ((0, 0), (3, 3), (0, 0))))
    assert np.array_equal(to_bytes(given("still.png"))[0], pixels), "its centre"


def test_prompts_switch_in_the_order_of_their_frames_counted_in_chunks():
    args = sample.parse(["--then", "10", "blue square", "--then", "4", "white circle"])
    words = Sprites().words
    model = Namespace(config=Config(chunk=2))
    texts = sample.read_texts(args, model, ["red circle", "green circle"], words)
    a, b = (words.text([prompt] * 2) for prompt in ("white circle", "blue square"))
    assert same(texts, [(0, words.text(["red circle", "green circle"])), (2, a), (5, b)])


def test_the_default_model_is_the_latest_run_or_the_one_in_the_box(
    tmp_path, monkeypatch, trained, capsys
):
    monkeypatch.chdir(tmp_path)
    sample.main(["--frames", "2", "--steps", "1"])
    assert os.listdir("runs/resample/samples") == ["video-0.mp4"]
    assert "using resample.pt, which comes with the repository" in capsys.readouterr().out
    for name, written in (("a", 2), ("b", 3), ("c", 1)):
        shutil.copytree(trained, Path("runs", name))
        os.utime(Path("runs", name, "ckpt.pt"), (written, written))
    sample.main(["red circle"])
    assert len(read_video("runs/b/samples/red-circle-0.mp4", 8)) == 8, "twice the training clips"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_sampling_follows_the_precision_of_training(precision):
    with sample.autocast(precision, "cpu"):
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")


@pytest.mark.parametrize(
    "flags, words",
    [
        ('"purple circle"', 'unknown word "purple"; the nearest that this model knows: ... red'),
        ('"red circle" --then 4 "cat"', 'unknown word "cat"; the nearest'),
        ('"green square" --checkpoint video', 'unknown word "green" ... resample.pt knows these'),
        ("--checkpoint nowhere", "there is no checkpoint at nowhere"),
        ("--checkpoint junk.pt", "junk.pt is not a checkpoint of train.py"),
        ("--checkpoint cut", "cut/ckpt.pt is not a checkpoint of train.py"),
        ('--checkpoint full "red circle"', "one --checkpoint ... put prompts before --checkpoint"),
        ("--given missing.mp4", "--given missing.mp4: ffmpeg cannot read it: No such file"),
        ("--given foreign/notes.mp4", "--given foreign/notes.mp4: ffmpeg cannot read it"),
        ("--given clips/a.mp4 --given-frames 1 --checkpoint chunks", "wanted at least 2 frames"),
        ("--given clips/a.mp4 --frames 14", "--frames 14 ... more than the 14 ... 15 would work"),
        ("--given-frames 2", "--given-frames needs --given"),
        ('--then 99 "red circle" --frames 8', "--then 99: wanted ... below --frames 8"),
        ('--then 0 "red circle"', "--then 0: wanted"),
        ('--then soon "red circle"', "--then soon: wanted the number of a frame"),
        ("--then 4", "--then: expected 2 arguments"),
        ('--then 3 "red circle" --checkpoint chunks', "--then 3: wanted ... chunk of 2"),
        ("--frames 7 --checkpoint chunks", "--frames 7: wanted whole chunks of 2 ... 8 would work"),
        ("--window 2 --sink 2", "--sink 2 must be smaller than the window, 2; --window 3 or more"),
        ("--sink 9", "--sink 9 must be smaller than the window, 9"),
        ("--window 0 --sink 1", "--sink 1 ... --window 2 or more would work"),
        ("--eval --window 3 --sink 3", "--sink 3 must be smaller"),
        ("--steps 0", "--steps: got 0, wanted a whole number from 1"),
        ("--samples 2.5", "--samples: got 2.5, wanted a whole number"),
        ("--guidance nan", "--guidance: got nan, wanted a number"),
        ("--device tpu", "--device: invalid choice: 'tpu' ... cpu"),
        ("--out video.avi", "--out video.avi: wanted a folder, or a .mp4 or .gif file"),
        ("--out junk.pt", "--out junk.pt: wanted a folder, or a .mp4"),
        ("--eval --out table.txt", "--out table.txt: wanted a folder, or a .mp4 or .gif file"),
        ('"red circle" "" --out x.mp4', "--out x.mp4: wanted a folder for several videos"),
        ("--samples 2 --out x.gif", "--out x.gif: wanted a folder for several videos"),
        ("--eval --frames 2", "--frames 2: wanted ... more than the 2 ... 3 would work"),
        ('"red circle" --eval', "leave out prompts, --given and --then"),
        ("--eval --given clips/a.mp4", "leave out prompts, --given and --then"),
        ("--eval --checkpoint video", "--eval measures sprites; this run was trained on clips"),
        ("--eval --checkpoint of-latents", "--eval measures sprites; ... trained on latents"),
        (f"--eval --samples 1 --checkpoint full {BOX}", "trained on other sprites than full"),
        ("--checkpoint of-latents", "makes latents; add --wan PATH"),
        ("--checkpoint full --wan nowhere", "--wan: this model makes pixels itself"),
    ],
)
def test_bad_input_to_sampling_is_refused_in_one_line(flags, words, inputs):
    refuse(sample.main, shlex.split(flags), words, inputs)


@pytest.mark.extras
def test_latents_train_a_model_that_makes_videos(wan_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with writer("clips/long.mp4", 16) as write:
        write(torch.rand(20, 3, 48, 72) * 2 - 1)
    Path("clips/long.txt").write_text("a red boat")
    wan = ["--wan", str(wan_folder), "--device", "cpu"]
    data.main(["clips", "latents", *wan, "--size", "32x48", "--frames", "9"])
    run_train(Path("run"), "--data latents --frames 3 --patch 2 --steps 2 --warmup 1")
    flags = "--given clips/long.mp4 --given-frames 5 --frames 4 --steps 1 --checkpoint run"
    sample.main(["a red boat", *flags.split(), "--out", "x.mp4", *wan])
    assert len(read_video("x.mp4", (32, 48))) == 13, "two latents given and two made: 4 n - 3"
    with pytest.raises(ValueError, match="--wan nowhere holds no model_index.json"):
        sample.main(["--checkpoint", "run", "--wan", "nowhere"])


# metrics and pictures


@pytest.mark.parametrize("name", ("teacher", "resample"))
def test_the_weights_in_the_box_continue_sprites(name):
    model = load_checkpoint(BOX.with_stem(name))
    _, video = sample.continue_held_out(model, 10, 4, **sample.default_sampler(model))
    scores = sample.measure_held_out(model, video)
    assert (scores[:, 2:].nanmean((0, 1)) > 80).all(), "Visual, Temporal and Text"


def test_eval_continues_two_frames_of_held_out_clips_with_new_noise_for_each_batch():
    model = Recorder()
    model.config = Config()
    model.run = {"data": "hidden", "size": 8, "objects": 1}
    model.parameters = lambda: iter(TRUTH)
    truth, video = sample.continue_held_out(model, 5, 17, seed=9, steps=1)
    clips = Sprites(8, 5, split="test", objects=1, wall=True)
    assert torch.equal(truth, torch.stack([clips[i][0] for i in range(17)]))
    drawn = torch.cat([noise(3, 9, 16, 8), noise(3, 9 + 16, 1, 8)])
    assert torch.equal(video, torch.cat([truth[:, :2], drawn], 1))

    wanted = measure(video, [clips.caption(i) for i in range(17)], wall=True)
    assert torch.equal(sample.measure_held_out(model, video).nan_to_num(), wanted.nan_to_num())
    with pytest.raises(ValueError, match="the model's frames are not finite"):
        sample.continue_held_out(model, 5, 1, roll_out=lambda _, truth, *z, **more: truth / 0)


def test_eval_prints_a_table_for_each_checkpoint_and_draws_one_picture(
    tmp_path, capsys, monkeypatch
):
    drawn = []
    monkeypatch.setattr(sample, "write_comparison", lambda *z: drawn.append(z))
    teacher, box = str(BOX.with_stem("teacher")), str(BOX)
    flags = ["--samples", "2", "--frames", "6", "--steps", "1", "--seed", "3", "--window", "2"]
    sample.main(["--eval", *flags, "--out", str(tmp_path), "--checkpoint", teacher, box, teacher])

    out = capsys.readouterr().out
    settings = {"steps": 1, "time_shift": 20.0, "guidance": 2.0, "window": 2, "seed": 3}
    videos = {}
    for name, path in (("teacher forcing", teacher), ("resampling forcing", box)):
        model = load_checkpoint(path)
        truth, videos[name] = sample.continue_held_out(model, 6, 2, **settings)
        table = sample.metrics_table(sample.measure_held_out(model, videos[name]))
        assert f"{path}: 2 clips of 6 frames, 2 given" in out and table in out
    videos |= {"truth": truth, teacher: videos["teacher forcing"]}
    assert same(drawn, [(tmp_path / "eval.gif", videos, 8)]), "the rows are named in words"


def test_the_table_has_means_and_standard_errors_by_thirds():
    scores = torch.zeros(4, 6, 3)  # (B, T, [visual, temporal, text])
    scores[:, :2, 0] = 10.0
    scores[:, 2:4, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    scores[0, 2, 1] = torch.nan
    scores[:, 4:, 2] = torch.tensor([[8.0, torch.nan]] * 4)
    table = """
        frames  Temporal     Visual         Text
           0-1  0.00 ± 0.00  10.00 ± 0.00   0.00 ± 0.00
           2-3  2.75 ± 0.65   0.00 ± 0.00   0.00 ± 0.00
           4-5  0.00 ± 0.00   0.00 ± 0.00   8.00 ± 0.00
           0-5  0.92 ± 0.24   3.33 ± 0.00   1.60 ± 0.00"""
    assert sample.metrics_table(scores).split() == table.split()
    assert "1.00 ±   nan" in sample.metrics_table(torch.ones(1, 3, 3)), "of a single video"


def test_a_comparison_has_a_row_for_each_name_and_pads_with_white(tmp_path):
    long = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(2, 3, 3, 8, 8)
    sample.write_comparison(tmp_path / "two.gif", {"long": long, "short": long[:, :1]}, 8)
    gif = iio.imread(tmp_path / "two.gif")[..., 0].astype(int)  # (T, height, width)
    assert len(gif) == 3 and (gif[0, :20] != gif[1, :20]).any(), "a frame counter is above"
    height = gif.shape[1] - 20
    middle = gif[:, [20 + height // 4, 20 + 3 * height // 4], 120]
    assert abs(middle - [[0, 0], [128, 255], [255, 255]]).max() <= 1

    sheet = iio.imread(tmp_path / "two.png")[16:, 96:]  # below the numbers, right of the labels
    assert sheet[33::66, 33::66, 0].tolist() == 2 * [[0, 128, 255], [0, 255, 255]]
    sample.write_comparison(tmp_path / "latents.gif", {"one": torch.randn(1, 2, 4, 40, 40)}, 8)


# --live


@pytest.fixture
def live(trained):
    """A page with two models of the same weights, as fast as they are."""
    args = sample.parse(["--live", "--steps", "1", "--checkpoint", str(trained), str(trained)])
    page = sample.Live(args, [sample.open_model(args, path) for path in args.checkpoint])
    page.speed = float("inf")
    return page


def post(server, name, value):
    address = f"http://127.0.0.1:{server.server_port}/{name}"
    with urllib.request.urlopen(address, value.encode()) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return answer.read().decode()


def first_picture(stream):
    assert stream.readline() == b"--frame\r\n" and b"image/jpeg" in stream.readline()
    content = stream.readline()
    while b"\xff\xd9\r\n" not in content:  # the end of a JPEG
        content += stream.readline()
    return iio.imread(content.lstrip())


def test_live_frames_arrive_in_every_browser_and_differ(live):
    server = sample.serve(live, 0)
    address = f"http://127.0.0.1:{server.server_port}"
    page = urllib.request.urlopen(address).read().decode()
    assert '<img src="/stream"' in page and "http" not in page.replace("<!doctype html>", "")
    streams = [urllib.request.urlopen(f"{address}/stream") for _ in range(2)]
    rolling = threading.Thread(target=live.roll_out, args=(6,))
    rolling.start()
    seen = [first_picture(stream) for stream in streams]
    streams[0].close()
    rolling.join()
    latest = iio.imread(live.jpeg)
    assert latest.shape == (256 + 24 + 64, 2 * 264, 3) and live.number == 6
    assert live.next_picture(6) == (6, live.jpeg), "shown in a browser when the next one begins"
    assert all((picture != latest).any() for picture in seen)
    left, right = latest[:256, :240].astype(int), latest[:256, 264:504]
    assert abs(left - right).max() < 16, "the same frames and noise, but for the JPEG"
    for wanted in ("/nothing", "/stream/x", "/../sample.py"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + wanted)
    with pytest.raises(ValueError, match=f"--port {server.server_port} is in use; --port"):
        sample.serve(live, server.server_port)
    assert server.server_address[0] == "127.0.0.1"
    server.shutdown()


def test_a_live_prompt_switches_and_an_unknown_word_is_answered_as_text(live, trained):
    server = sample.serve(live, 0)
    assert "unknown word" in post(server, "prompt", "a zebra")
    assert "script" in post(server, "prompt", "<script>alert(1)</script>")
    live.roll_out(3)
    first, clip = live.jpeg, live.prompt
    assert post(server, "prompt", "white circle and blue square") == (
        "Now: white circle and blue square"
    )
    live.roll_out(6)
    args = live.args
    other = sample.Live(args, live.models)
    other.speed = float("inf")
    other.roll_out(3)
    assert other.jpeg == first and other.prompt == clip != live.prompt
    other.roll_out(6)
    assert (other.last[0] != live.last[0]).any()
    post(server, "clip", "")
    live.roll_out(7)
    assert live.clip == 1 and live.prompt == sample.held_out(live.models[0].run, 2).caption(1)
    assert post(server, "pause", "") == "Paused" and post(server, "speed", "7").startswith(
        "At most 7"
    )
    server.shutdown()


def test_live_shows_one_model_of_ones_own_videos_from_nothing_or_from_a_clip(live, tmp_path):
    (model, _), args = live.models, live.args
    model.run = model.run | {"data": "clips"}
    with writer(tmp_path / "a.mp4", 8) as write:
        write(Sprites(8, 6)[0][0])
    for args.given in (None, tmp_path / "a.mp4"):
        page = sample.Live(args, [model])
        page.roll_out(2)
        assert iio.imread(page.jpeg).shape == (344, 264, 3) and page.shares == []
        assert (page.begin()[0].shape[1] > 0) == bool(args.given)


def test_live_guides_away_from_wans_negative_prompt(live):
    class Text(sample.Words):
        """Words in the place of Wan's text encoder; its negative prompt is a red circle."""

        def text(self, prompts):
            return super().text([z if z != sample.Wan.NEGATIVE else "red circle" for z in prompts])

        def decoder(self):
            return torch.Tensor.cpu

    wan = Text(*live.models[0].run["words"])
    pages = [sample.Live(live.args, live.models, z) for z in (None, wan)]
    for page in pages:
        page.roll_out(3)
    assert pages[0].prompt == pages[1].prompt and (pages[0].last[0] != pages[1].last[0]).any()


def test_live_memory_does_not_grow(live):
    """Rollouts of 50 frames in place of 500: the bytes after four are those after two."""
    page = sample.Live(live.args, live.models, turn=50)
    page.speed = float("inf")
    kept = []
    for pictures in (120, 240):
        page.roll_out(pictures)
        gc.collect()
        kept.append(sum(z.nbytes for z in gc.get_objects() if type(z) is torch.Tensor))
    assert kept[0] == kept[1]


# ---- README.md and the repository ----


README = (HERE / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
MODULES = {module.__name__: module for module in (rf, routing, model_py, data, train, sample)}


def test_the_readme_names_what_exists_and_is_short():
    assert len(README.encode()) < 12_500
    names = re.findall(rf"`({'|'.join(MODULES)})\.(?!py)(\w+)`", README)
    assert len(names) >= 9
    for file, name in names:
        assert hasattr(MODULES[file], name), f"{file}.{name}"
    for link in re.findall(r"(?:\]\(|src=\")((?!http)[^)\"]+)", README):
        path, _, heading = link.partition("#")
        assert (HERE / path).exists(), link
        if heading:
            lines = (HERE / (path or "README.md")).read_text().lower().splitlines()
            titles = [re.sub(r"[^\w -]", "", line).strip().replace(" ", "-") for line in lines]
            assert heading in titles, link


def test_algorithm_1_in_the_readme_is_the_code():
    block = re.search(r"^Algorithm 1.*?```\n(.*?)```", README, re.S | re.M)[1]
    code = (HERE / "rf.py").read_text() + (HERE / "train.py").read_text()
    lines = [re.match(r"[\d-]+ +(.*?)(\.\.\.|  |$)", line)[1] for line in block.splitlines()]
    assert len(lines) >= 8
    for line in lines:
        assert line in code, line


@pytest.mark.parametrize("number", range(2, 10))
def test_each_equation_is_found_by_its_number(number):
    code = "\n".join((HERE / f"{file}.py").read_text() for file in MODULES)
    assert re.search(rf'^ +""".*Eqs?\. .*\({number}\)', code, re.M), "it leads a docstring"


def test_the_commands_of_the_readme_parse():
    parsed = 0
    for command in re.split(r"(?<!\\)\n|&&", "".join(BLOCKS)):
        words = shlex.split(command, comments=True)
        for module in (train, sample):
            if f"{module.__name__}.py" in words:
                flags = words[words.index(f"{module.__name__}.py") + 1 :]
                module.parse([flag for flag in flags if flag != "--resume"])
                parsed += 1
    assert parsed > 9


# What makes a command that has these words take seconds; a flag that stands twice counts the last
# time.
CUTS = {
    "train.py": "--size 8 --frames 6 --dim 24 --heads 2 --layers 1 --batch 2 --accumulate 1 "
    "--steps 2 --warmup 1 --device cpu",
    "--patch 16": "--size 16",
    "--chunk": "--chunk 6",  # one chunk is the whole clip
    "--resume": "--steps 3",
    "sample.py": "--frames 18 --steps 1 --samples 1 --device cpu",
    "data.py": "--size 32x48 --frames 21 --device cpu",
    "rivals.py": "--steps 2",
    "evidence.py": "--frames 12 --samples 3",
}
SHIM = """#!{python}
import os, sys

name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
if name in ("pip", "pytest", "ruff"):
    sys.exit()
for found, more in {cuts}.items():
    if found in " ".join(words):
        words += more.split()
if name == "torchrun":
    words[:2] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
if "--live" in words:  # it goes on until Ctrl-C
    script = 'timeout -s INT 20 "$@"; test $? = 124'
    os.execvp("bash", ["bash", "-c", script, "live", {python!r}, *words])
os.execv({python!r}, [{python!r}, *words])
"""


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory, wan_folder):
    """A folder as the README assumes it: the files, a shortened `python`, VIDEOS, FOLDER, WAN."""
    import diffusers

    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("newcomer")
    for path in HERE.glob("*.py"):
        (folder / path.name).symlink_to(path)
    shutil.copytree(HERE / "results", folder / "results")  # a command writes into it
    for name in ("sprites", "long"):  # they hold longer videos
        (folder / f"results/{name}.json").unlink(missing_ok=True)
    (folder / "bin").mkdir()
    for name in ("python", "torchrun", "pip", "pytest", "ruff"):
        (folder / "bin" / name).write_text(SHIM.format(python=sys.executable, cuts=CUTS))
        (folder / "bin" / name).chmod(0o755)
    for name in ("VIDEOS/a.mp4", "VIDEOS/b.mp4", "FOLDER/a.mp4", "FOLDER/b.mp4", "clip.mp4"):
        with writer(folder / name, 16) as write:
            write(Sprites(64, 24)[len(name)][0])

    shutil.copytree(wan_folder, folder / "WAN")
    sizes = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12}
    sizes |= {"text_dim": 32, "ffn_dim": 96, "num_layers": 1}
    diffusers.WanTransformer3DModel(**sizes).save_pretrained(folder / "WAN/transformer")
    return folder


@pytest.mark.readme
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_commands_of_the_readme_run(number, newcomer):
    """In their order: later blocks use the runs of earlier ones."""
    env = dict(os.environ, PATH=f"{newcomer / 'bin'}:{os.environ['PATH']}", OMP_NUM_THREADS="1")
    command = ["bash", "-ec", BLOCKS[number]]
    done = subprocess.run(command, cwd=newcomer, env=env, text=True, capture_output=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
