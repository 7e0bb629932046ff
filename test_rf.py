"""The paper's claims, each with the shortest evidence: CPU, no network, deterministic.

Where a test says "the same", it compares in float64. The sections follow the files.
"""

import argparse
import copy
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

import data
import model as model_py
import rf
import routing
import sample
import train
from data import (
    Latents,
    Sprites,
    Videos,
    Words,
    fold,
    measure,
    read_frames,
    read_video,
    to_bytes,
    unfold,
    writer,
)
from model import PRESETS, CausalDiT, Config, load_checkpoint
from results import evidence, health, plot, record_games, rivals, small_things
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


def tiny(chunk=1, top_k=None, layers=2, window=None, patch=2, detail=0, **more):
    """A small float64 network with random weights: at its own initialization it returns 0."""
    torch.manual_seed(0)
    more |= {"top_k": top_k, "window": window, "detail": detail}
    net = CausalDiT(Config(2, 24, 48, 2, layers, patch, chunk, 5, 16, **more)).double()
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
        return torch.equal(a, b)
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


def bytes_kept(run):
    """Bytes that autograd keeps for the backward of what `run` computes, each storage once."""
    kept = {}

    def keep(z):
        storage = z.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return z

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def save_latents(folder, **arrays):
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{len(list(folder.iterdir()))}.npz", **arrays)


# ---- rf.py ----


def test_noise_runs_from_the_frame_to_noise_along_a_line():  # Eq. (3)
    x, eps, t, _ = clip()
    x_t = add_noise(x, eps, t)
    for b in range(2):
        for n in range(6):
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
    normal = torch.distributions.Normal(0, 1)
    for q, stated in ((0.05, 0.10), (0.5, 0.375), (0.95, 0.76)):
        u = torch.sigmoid(normal.icdf(torch.tensor(q, dtype=torch.float64)))
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


def test_the_loss_is_the_distance_of_v_to_eps_minus_x():  # Eq. (4)
    x, other, _, c = clip()
    exact = Exact(x, torch.zeros(6))
    assert flow_matching_loss(exact, x, c, other[:, :-1]) < 1e-20, "x is the target, not history"
    _, t, history, _ = exact.calls[0]
    assert t.shape == (2, 6) and len(t.unique()) == 12, "every frame has its own noise level"
    assert torch.equal(history, other[:, :-1])


def test_every_frame_counts_equally_in_the_loss():
    x, _, _, c = clip()
    for frame in range(6):
        error = torch.zeros(6)
        error[frame] = 0.5
        assert abs(flow_matching_loss(Exact(x, error), x, c, x[:, :-1]) - 0.25 / 6) < 1e-10


def test_the_time_shift_moves_the_noise_levels_of_the_loss():
    x, _, _, c = clip()
    levels = []
    for s in (1.0, 3.0):
        torch.manual_seed(0)
        net = Recorder()
        flow_matching_loss(net, x, c, x[:, :-1], s)
        levels.append(net.calls[0][1])
    assert close(levels[1], shift(levels[0], 3.0), 1e-6)


def test_the_loss_can_weigh_what_moves():
    """A dot goes from column 4 to 7; the weight of a frame depends on the frames before it only."""
    x = torch.zeros(2, 4, 3, 24, 24)
    for frame in range(4):
        x[0, frame, :, 12, 4 + frame] = 1
    weight = rf.motion_weight(x[:, :-1], 4.0)
    assert weight.shape == (2, 4, 1, 24, 24) and abs(weight.mean() - 1) < 1e-5
    assert (weight[:, :2] == 1).all(), "nothing is known to move before the third frame"
    assert (weight[1] == 1).all(), "the other clip stands still"
    assert close(weight[:1], rf.motion_weight(x[:1, :-1], 4.0), 1e-6), "of its own clip alone"
    for frame in (2, 3):
        heavy = weight[0, frame, 0] > 0.2
        rows, columns = heavy.nonzero().unbind(1)
        assert (rows.min(), rows.max()) == (8, 16)
        assert (columns.min(), columns.max()) == (frame - 2, frame + 7)
    assert not torch.equal(weight[0, 2], weight[0, 3])

    c = torch.zeros(2, 1, 5)
    exact = Exact(x, torch.full((4,), 0.5))
    assert abs(flow_matching_loss(exact, x, c, x[:, :-1], motion=4.0) - 0.25) < 1e-5
    exact.error = torch.randn(2, 4, 3, 24, 24)
    loss = flow_matching_loss(exact, x, c, x[:, :-1], motion=4.0)
    assert close(loss, (weight * exact.error**2).mean(), 1e-4)
    noisy = x[:, :-1] + torch.randn(2, 3, 3, 24, 24)
    other = flow_matching_loss(exact, x, c, noisy, motion=4.0)
    assert close(other, (rf.motion_weight(noisy, 4.0) * exact.error**2).mean(), 1e-4)
    assert close(flow_matching_loss(exact, x, c, noisy, motion=4.0, past=x[:, :-1]), loss, 1e-4)

    stops = rf.motion_weight(x[:, [0, 1, 1]], 4.0)  # in frame 2, which frame 2 must not know
    assert torch.equal(stops[:, :3], weight[:, :3]) and (stops[:, 3] == 1).all()
    for frames in (1, 2):  # nothing to see yet
        short = Exact(x[:, :frames], torch.full((frames,), 0.5))
        loss = flow_matching_loss(short, x[:, :frames], c, x[:, : frames - 1], motion=4.0)
        assert abs(loss - 0.25) < 1e-5


def test_a_rollout_from_t_0_returns_its_input():
    x, _, _, c = clip()
    frames = list(rollout(tiny(), x, torch.zeros(2).double(), c, 3))
    assert torch.equal(torch.cat(frames, 1), x)


def test_a_rollout_from_t_1_is_generation():
    """Against Euler written out, with no cache: all frames so far in one pass at every step."""
    net, (_, noise, _, c) = tiny(), clip(N=4)
    times = [shift(torch.tensor(1 - j / 5, dtype=torch.float64), 5.0) for j in range(6)]
    done = noise[:, :0]
    for i in range(4):
        frame = noise[:, [i]]
        for now, after in zip(times, times[1:]):
            x = torch.cat([done, frame], 1)
            v = net(x, now.expand(2, i + 1), c, done)[:, [i]]
            frame = frame + (after - now) * v
        done = torch.cat([done, frame], 1)
    made = torch.cat(list(rollout(net, noise, torch.ones(2).double(), c, 5, 5.0)), 1)
    assert close(made, done, 1e-9) and not made.requires_grad


def test_a_rollout_goes_on_from_given_frames():
    net, (_, noise, _, c) = tiny(), clip()
    t = torch.ones(2).double()
    whole = list(rollout(net, noise, t, c, 2))
    rest = list(rollout(net, noise[:, 2:], t, c, 2, history=torch.cat(whole[:2], 1)))
    assert close(torch.cat(rest, 1), torch.cat(whole[2:], 1))


def test_a_video_is_noised_to_its_own_t_s():  # Algorithm 1, lines 2-3
    x, _, _, _ = clip()
    torch.manual_seed(3)
    x_ts, t_s = rf.noise_to_t_s(x, 0.6)
    torch.manual_seed(3)
    u = torch.randn(2).sigmoid().double()
    eps = torch.randn(x.shape, dtype=torch.float64)
    assert close(t_s, 0.6 * u / (1 - 0.4 * u), 1e-6)
    for b in range(2):
        assert close(x_ts[b], (1 - t_s[b]) * x[b] + t_s[b] * eps[b])


class Half(Recorder):
    """v = x / 2."""

    def __call__(self, x, t, c, history=None, cache=None, first=0):
        super().__call__(x, t, c, history, cache, first)
        return 0.5 * x


def test_one_step_of_resampling_is_x_ts_minus_t_s_v():  # Eq. (5)
    x, _, _, c = clip()
    net = Half()
    torch.manual_seed(3)
    redrawn = self_resample(net, x, c)
    torch.manual_seed(3)
    x_ts, t_s = rf.noise_to_t_s(x, 0.6)
    assert t_s.shape == (2,), "one t_s per video"
    assert close(redrawn, x_ts * (1 - 0.5 * t_s[:, None, None, None, None]))
    assert [first for *_, first in net.calls] == list(range(6)), "one forward per frame"
    for i, (_, _, history, _) in enumerate(net.calls):
        assert history is None if i == 0 else close(history, redrawn[:, [i - 1]])


@pytest.mark.parametrize("name", ["parallel", "resample"])
def test_the_given_frames_of_a_redrawn_history_stay_true_and_the_others_see_them(name):
    net, (x, _, _, c) = tiny(), clip()
    made = HISTORY[name](net, x, c, 0.6, 2, 0.3, FixedLevel(0.7), given=2)
    assert torch.equal(made[:, :2], x[:, :2])
    differ = (made[:, 2:] - x[:, 2:]).abs().amax((2, 3, 4))
    assert (differ > 1e-3).all(), "all others are redrawn"

    other = x.clone()
    other[:, 0] += 1
    of_other = HISTORY[name](net, other, c, 0.6, 2, 0.3, FixedLevel(0.7), given=2)
    assert not close(of_other[:, 2:], made[:, 2:], 1e-3)


def test_given_frames_change_no_other_frame_of_parallel_resampling():
    """Each frame sees the true ones before it, whether these are redrawn or not."""
    net, (x, _, _, c) = tiny(), clip()
    made = {}
    for given in (0, 2):
        made[given] = HISTORY["parallel"](net, x, c, 0.6, 2, 0.3, FixedLevel(0.7), given=given)
    assert close(made[0][:, 2:], made[2][:, 2:])


def test_resampling_with_given_frames_is_a_continuation_from_t_s():
    net, (x, _, _, c) = tiny(), clip()
    made = self_resample(net, x, c, steps=2, rng=FixedLevel(0.7), given=2)
    x_ts, t_s = rf.noise_to_t_s(x, 0.6, FixedLevel(0.7))
    frames = rf.rollout(net, x_ts[:, 2:], t_s, c, steps=2, history=x[:, :2])
    assert torch.equal(made[:, 2:], torch.cat([*frames], dim=1))


def test_resampling_steps_go_from_t_s_to_0_in_equal_parts():
    x, _, _, c = clip()
    net = Half()
    torch.manual_seed(3)
    self_resample(net, x, c, steps=4)
    torch.manual_seed(3)
    _, t_s = rf.noise_to_t_s(x, 0.6)
    for call, part in zip(net.calls, (1, 0.75, 0.5, 0.25)):
        assert close(call[1][:, 0], part * t_s)


def test_resampling_carries_no_gradient_and_training_still_does():
    net, (x, _, _, c) = tiny(), clip()
    x.requires_grad_()
    history = self_resample(net, x[:, :-1], c)
    assert not history.requires_grad and history.shape == x[:, :-1].shape
    flow_matching_loss(net, x.detach(), c, history).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.blocks[0].self_attn.k.weight.grad.abs().sum() > 0


def test_autocast_keeps_the_gradient_after_resampling():
    """The bf16 weights that autocast keeps must not be those made under no_grad."""
    net, (x, _, _, c) = tiny().float(), (z.float() for z in clip())
    with torch.autocast("cpu", torch.bfloat16):
        flow_matching_loss(net, x, c, self_resample(net, x[:, :-1], c)).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in net.parameters())


@pytest.mark.parametrize("name", HISTORY)
def test_every_history_of_table_2_is_shaped_like_the_frames_and_has_no_gradient(name):
    net, (x, _, _, c) = tiny(), clip()
    made = HISTORY[name](net, x, c, 0.6, 2, 0.3)
    assert made.shape == x.shape and not made.requires_grad
    assert torch.equal(made, x) == (name == "teacher")


def test_history_noise_has_a_level_per_frame_up_to_its_limit():
    x = torch.zeros(4, 6, 3, 32, 32)
    level = HISTORY["noise"](None, x, None, None, None, 0.3).std(dim=(2, 3, 4))
    assert level.max() < 0.31 and level.min() < 0.1 < level.max()
    assert (level.std(dim=1) > 0.02).all(), "the frames of one video differ"
    assert (HISTORY["noise"](None, x + 1, None, None, None, 0.0) == 1).all()


def test_histories_obey_s_and_steps():
    x, _, _, c = clip()
    for name in ("parallel", "resample"):
        levels = []
        for s, steps in ((0.6, 1), (3.0, 2)):
            net = Recorder()
            torch.manual_seed(0)
            HISTORY[name](net, x, c, s, steps, 0)
            levels.append([call[1][:, 0] for call in net.calls])
        u = shift(levels[0][0], 1 / 0.6)
        assert close(levels[1][0], shift(u, 3.0), 1e-6), name
        assert len(levels[1]) == 2 * len(levels[0]), name


def test_errors_compound_in_resampling_and_not_in_parallel():
    net, (x, _, _, c) = tiny(), clip()
    made = {}
    for name in ("parallel", "resample"):
        torch.manual_seed(0)
        made[name] = HISTORY[name](net, x, c, 0.6, 1, 0)
    assert close(made["parallel"][:, 0], made["resample"][:, 0])
    assert not close(made["parallel"][:, 2:], made["resample"][:, 2:], 1e-3)

    torch.manual_seed(0)
    x_ts, t_s = rf.noise_to_t_s(x, 0.6)
    v = net(x_ts, t_s[:, None].expand(2, 6), c, x[:, :-1])
    assert close(made["parallel"], x_ts - t_s[:, None, None, None, None] * v)


class Counter:
    """A source of random numbers that counts its draws and returns ones."""

    def __init__(self):
        self.draws = []

    def rand(self, *shape, device=None, dtype=None):
        self.draws.append(("rand", shape))
        return torch.ones(shape, device=device, dtype=dtype)

    def randn(self, *shape, device=None, dtype=None):
        self.draws.append(("randn", shape))
        return torch.ones(shape, device=device, dtype=dtype)


def test_every_draw_comes_from_the_given_source():
    net, (x, _, _, c) = tiny(), clip()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for name, draws in (("teacher", 0), ("noise", 2), ("parallel", 2), ("resample", 2)):
        rng = Counter()
        HISTORY[name](net, x, c, 0.6, 1, 0.3, rng)
        assert len(rng.draws) == draws, name
    rng = Counter()
    flow_matching_loss(net, x, c, x[:, :-1], rng=rng)
    self_resample(net, x, c, rng=rng)
    assert rng.draws == [("randn", (2, 6)), ("randn", x.shape), ("randn", (2,)), ("randn", x.shape)]
    assert torch.equal(torch.get_rng_state(), before)


def test_guidance_of_1_is_none_and_more_is_more():
    net, (x, noise, t, c) = tiny(), clip()
    null = torch.zeros(3, 5).double()
    history = x[:, :-1]
    v, v_null = net(noise, t, c, history), net(noise, t, null.expand_as(c), history)
    assert close(Guided(net, null, 1.0)(noise, t, c, history), v, 1e-12)
    assert close(Guided(net, null, 3.0)(noise, t, c, history), v_null + 3 * (v - v_null))

    guided = Guided(net, null, 3.0)
    guided(noise, t, c, history)
    assert close(guided(noise, t, c + 1, history), Guided(net, null, 3.0)(noise, t, c + 1, history))

    guided = list(rollout(Guided(net, null, 1.0), noise, torch.ones(2).double(), c, 2))
    plain = list(rollout(net, noise, torch.ones(2).double(), c, 2))
    assert close(torch.cat(guided, 1), torch.cat(plain, 1), 1e-9)


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


def test_the_mask_of_a_cached_pass_is_the_last_rows_of_the_whole():
    past, own = sparse_causal_mask(2, 1, 1, 3)  # frames 0, 1 cached, 2 entering, 3 noisy
    assert past.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert own.tolist() == [[False, False, True, False], [False, False, False, True]]


def test_a_frame_sees_smaller_numbers_only_and_all_of_them_without_a_window():
    past, _ = sparse_causal_mask(5, 0, 2, 3)
    assert past.tolist() == [[True] * 3 + [False] * 4, [True] * 4 + [False] * 3]
    past, _ = sparse_causal_mask(2, 0, 1, 7)
    assert past.tolist() == [[True, True, False]]


def test_a_window_is_the_last_frames():
    past, _ = sparse_causal_mask(0, 3, 4, 0, window=1)
    history, noisy = past.int()[:3, :3].tolist(), past.int()[3:, :3].tolist()
    assert history == [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert noisy == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


def random_passes(seed, count, most_tokens):
    """Tables of `sparse_causal_mask` of all kinds: (past, own, tokens a frame)."""
    rng = random.Random(seed)
    for _ in range(count):
        cached, history = rng.choice((0, 0, rng.randint(1, 6))), rng.randint(0, 6)
        noisy = rng.randint(1 if history == 0 else 0, 6)
        first = rng.choice((0, cached, cached + history, rng.randint(0, 14)))
        window = rng.choice((None, None, 1, 2, 5))
        P = rng.choice((1, 2, 3, 5, 8, 16, rng.randint(1, most_tokens)))
        yield *sparse_causal_mask(cached, history, noisy, first, window=window), P


def qkv(past, P, E=4, dtype=torch.float64, gradient=True, B=1, H=2):
    R, S = past.shape
    torch.manual_seed(R + S + P)
    shapes = (B, H, R, P, E), (B, H, S, P, E), (B, H, S, P, E)
    return [torch.randn(shape, dtype=dtype, requires_grad=gradient) for shape in shapes]


def outputs_and_gradients(attention, q, k, v, *args):
    out = attention(q, k, v, *args)
    return [out, *torch.autograd.grad(out.cos().sum(), (q, k, v))]


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-10), (torch.float32, 2e-5)))
@pytest.mark.parametrize("top_k", (None, 1, 3))
def test_attention_is_its_definition_for_every_table(top_k, dtype, tolerance):
    """Outputs with and without gradients, and the gradients."""
    for past, own, P in random_passes(f"{top_k}{dtype}", 50, 24):
        q, k, v = qkv(past, P, dtype=dtype)
        wanted = outputs_and_gradients(attend_masked, q, k, v, past, own, top_k)
        came = outputs_and_gradients(attend, q, k, v, past, own, top_k)
        with torch.no_grad():
            came.append(attend(q, k, v, past, own, top_k))
        for a, b in zip(came, [*wanted, wanted[0]]):
            assert close(a, b, tolerance), (past.shape, P)


@pytest.mark.parametrize("P", (64, 100, 200))
@pytest.mark.parametrize("window", (None, 2))
@pytest.mark.parametrize("cached, history, noisy", ((0, 5, 6), (4, 1, 1), (4, 0, 1), (2, 3, 0)))
def test_attention_is_its_definition_with_many_tokens(cached, history, noisy, window, P):
    past, own = sparse_causal_mask(cached, history, noisy, cached, window=window)
    q, k, v = qkv(past, P, dtype=torch.float32, gradient=False, H=1)
    for top_k in (None, 2):
        assert close(
            attend(q, k, v, past, own, top_k), attend_masked(q, k, v, past, own, top_k), 2e-5
        )


@pytest.mark.parametrize("cached, history", ((0, 0), (3, 1), (4, 0)))
def test_a_pass_of_a_rollout_needs_no_mask_and_copies_no_cache(cached, history):
    past, own = sparse_causal_mask(cached, history, 1, cached + history)
    _, k, _ = qkv(past, 3, gradient=False)
    for _, columns, all_visible in routing.row_groups(past, own):
        tokens = routing.gather_frames(k, k.unbind(2), columns)
        assert all_visible and tokens.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


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


@pytest.mark.parametrize("shape", ((0, 3, 4, 0), (2, 1, 1, 3), (2, 0, 1, 2), (5, 2, 3, 4)))
@pytest.mark.parametrize("top_k", (None, 1, 2, 9))
def test_the_definition_is_equation_8_in_loops(shape, top_k):
    past, own = sparse_causal_mask(*shape)
    q, k, v = qkv(past, 3)
    wanted = outputs_and_gradients(slow_attend, q, k, v, past, own, top_k)
    came = outputs_and_gradients(attend_masked, q, k, v, past, own, top_k)
    assert all(close(a, b) for a, b in zip(came, wanted))


def test_routing_is_equation_9():
    torch.manual_seed(0)
    past, own = sparse_causal_mask(1, 4, 5, 1)
    q, k = torch.randn(2, 3, 9, 4, 6), torch.randn(2, 3, 10, 4, 6)
    for top_k in (1, 3):
        chosen = route(q, k, past, top_k)
        assert torch.equal(chosen, slow_route(q, k, past, top_k))
        wanted = past.sum(1).clamp(max=top_k)[:, None].expand(2, 3, 9, 4)
        assert torch.equal(chosen.sum(-1), wanted), "up to k"
        assert not (chosen & own[:, None]).any(), "the own frame is not counted"
    assert (chosen[:, 0] != chosen[:, 1]).any(), "per head"
    assert (chosen[..., 0, :] != chosen[..., 1, :]).any(), "per token"


def test_routing_to_all_frames_is_dense():
    past, own = sparse_causal_mask(1, 4, 5, 1)
    q, k, v = qkv(past, 4)
    assert close(attend(q, k, v, past, own, 9), attend(q, k, v, past, own))


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
    assert torch.equal(route(q, None, past, 2, k.float().mean(-2)), wanted), "of known mean keys"


def test_tables_made_while_sampling_serve_training():
    with torch.inference_mode():
        past, own = sparse_causal_mask(0, 2, 3, 0, window=97)
        attend(*qkv(past, 2, gradient=False), past, own)
    q, k, v = qkv(past, 2)
    attend(q, k, v, past, own).sum().backward()
    assert q.grad is not None


def test_block_masks_are_the_frame_tables():
    """FlexAttention's full blocks are fully visible, its skipped blocks fully hidden."""
    for past, own, P in random_passes("blocks", 60, 150):
        tokens = (past | own).repeat_interleave(P, 0).repeat_interleave(P, 1)
        for size in (16, 128):
            mask = routing.frame_block_mask(past, own, P, size)
            for i, rows in enumerate(tokens.split(size)):
                blocks = rows.split(size, dim=1)
                partial = listed_blocks(mask.kv_num_blocks, mask.kv_indices, i)
                full = listed_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, i)
                assert partial | full == {j for j, block in enumerate(blocks) if block.any()}
                assert not partial & full
                assert all(blocks[j].all() and blocks[j].shape == (size, size) for j in full)
                whole = {j for j, z in enumerate(blocks) if z.all() and z.shape == (size, size)}
                assert full == whole, "what is fully visible needs no mask"


def listed_blocks(counts, indices, row):
    return {*indices[0, 0, row, : counts[0, 0, row]].tolist()}


@pytest.mark.parametrize("shape, window", (((0, 5, 6, 0), None), ((3, 1, 4, 4), 2)))
def test_flex_attention_with_its_block_mask_is_the_definition(shape, window):
    past, own = sparse_causal_mask(*shape, window=window)
    q, k, v = qkv(past, 33, E=8, dtype=torch.float32, gradient=False)
    mask = routing.frame_block_mask(past, own, 33)
    out = flex_attention(*(z.flatten(2, 3) for z in (q, k, v)), block_mask=mask)
    assert close(out.unflatten(2, (-1, 33)), attend_masked(q, k, v, past, own), 1e-5)


@pytest.mark.parametrize("top_k", (1, 3, 9))
def test_routed_queues_are_the_definition(top_k):
    """Outputs and gradients."""
    for past, own, P in random_passes(f"queues{top_k}", 30, 12):
        q, k, v = qkv(past, P)
        wanted = outputs_and_gradients(attend_masked, q, k, v, past, own, top_k)
        came = outputs_and_gradients(routing.attend_picked, q, k, v, past, own, top_k)
        assert all(close(a, b) for a, b in zip(came, wanted)), (past.shape, P)


def test_routed_queues_keep_no_copy_of_the_queries():
    past, own = sparse_causal_mask(0, 7, 8, 0)
    q, k, v = qkv(past, 8, E=64, dtype=torch.float32)
    kept = {}
    for top_k in (1, 5):
        kept[top_k] = bytes_kept(lambda k_=top_k: routing.attend_picked(q, k, v, past, own, k_))
    assert kept[5] < 1.2 * kept[1] < 5 * 4 * q.numel(), "q, k, v, the output and the picks"


def test_blocks_of_a_queue_hold_every_pair_that_attends():
    torch.manual_seed(0)
    for P, columns in ((7, 9), (50, 4)):
        frame = torch.randint(columns, (2, 3, 5 * P)).sort(-1).values
        mask = routing.queue_block_mask(frame, columns * P, P, size=16)
        seen = frame[..., None] == torch.arange(columns * P) // P
        dense = mask.to_dense().bool().repeat_interleave(16, 2).repeat_interleave(16, 3)
        dense = dense[:, :, : seen.shape[2], : seen.shape[3]]
        assert (dense | ~seen).all() and dense.float().mean() < 0.7, "no pair lost, many skipped"


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_cuda
@pytest.mark.parametrize("top_k", (None, 1, 3))
def test_what_runs_on_cuda_is_the_definition(top_k):
    for past, own, P in random_passes(f"cuda{top_k}", 20, 150):
        q, k, v = (z.detach().cuda().requires_grad_() for z in qkv(past, P, 32, torch.float32))
        past, own = past.cuda(), own.cuda()
        wanted = outputs_and_gradients(attend_masked, q, k, v, past, own, top_k)
        came = outputs_and_gradients(attend, q, k, v, past, own, top_k)
        assert all(close(a, b, 2e-2) for a, b in zip(came, wanted)), (past.shape, P)  # TF32


# ---- model.py ----


@pytest.mark.parametrize("top_k", [None, 2])
def test_nothing_leaks_and_history_reaches_later_frames(top_k):
    net, (x, x_t, t, c) = tiny(top_k=top_k), clip()
    v = net(x_t, t, c, x[:, :-1])
    for frame in range(5):
        changed = x.clone()
        changed[:, frame] += 1.0
        moved = (net(x_t, t, c, changed[:, :-1]) - v).abs().amax((0, 2, 3, 4))
        assert (moved[: frame + 1] == 0).all(), "no frame sees the future or its own clean copy"
        assert moved[frame + 1] > 1e-6 and (top_k or (moved[frame + 1 :] > 1e-6).all())

        changed = x_t.clone()
        changed[:, frame] += 1.0
        moved = (net(changed, t, c, x[:, :-1]) - v).abs().amax((0, 2, 3, 4))
        assert moved[frame] > 1e-6, "a noisy frame sees itself"
        assert (moved[:frame] == 0).all() and (moved[frame + 1 :] == 0).all(), "and no other"


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("top_k, window", [(None, None), (2, None), (None, 2), (1, 3)])
def test_training_in_parallel_is_sampling_frame_by_frame(chunk, top_k, window):
    net, (x, x_t, t, c) = tiny(chunk, top_k, window=window), clip(chunk)
    together = net(x_t, t, c, x[:, :-1])
    for kept in {None, window and window + 1}:  # the cache's newest frame has its own window
        cache, frames = net.cache(2, 6, kept), []
        for i in range(6):
            history = x[:, [i - 1]] if i else None
            frames.append(net(x_t[:, [i]], t[:, [i]], c, history, cache, first=i))
        assert close(torch.cat(frames, 1), together) and together.std() > 0.1


@pytest.mark.parametrize("more", [{}, {"top_k": 2}, {"detail": 6, "detail_frames": 2}])
def test_a_pass_that_fills_the_cache_may_be_fused_with_the_next_step(more):
    net, (x, x_t, t, c) = tiny(**more), clip()
    fused, apart = net.cache(2, 6), net.cache(2, 6)
    for i in range(6):
        history = x[:, [i - 1]] if i else None
        v = net(x_t[:, [i]], t[:, [i]], c, history, fused, first=i)
        net(x[:, :0], t[:, :0], c, history, apart, first=i)
        assert close(v, net(x_t[:, [i]], t[:, [i]], c, None, apart, first=i))


def test_several_given_frames_enter_in_one_pass():
    net, (x, x_t, t, c) = tiny(chunk=3), clip(chunk=3)
    cache = net.cache(2, 6)
    v = net(x_t[:, 4:], t[:, 4:], c, x[:, :4], cache, first=4)
    assert close(v[:, 0], net(x_t, t, c, x[:, :-1])[:, 4]) and cache.length == 4


def test_a_chunk_is_frames_that_see_each_other():
    video = torch.randn(2, 6, 2, 4, 6, dtype=torch.float64)
    assert torch.equal(unfold(fold(video, 3), 3), video)
    net, (x, x_t, t, c) = tiny(chunk=3), clip(chunk=3)
    changed = x_t.clone()
    changed[:, 1, 4:] += 1.0  # the last latent of chunk 1
    moved = net(changed, t, c, x[:, :-1]) - net(x_t, t, c, x[:, :-1])
    moved = moved.abs().amax((0, 3, 4))
    assert (moved[1] > 1e-6).all() and (moved[[0, 2, 3, 4, 5]] == 0).all()


def test_the_history_enters_at_t_0():
    """A noisy frame at t = 0 has the keys of the same frame as history."""
    net, (x, _, t, c) = tiny(layers=1), clip()
    keys = []
    net.blocks[0].self_attn.k.register_forward_hook(lambda module, args, out: keys.append(out))
    net(x, torch.zeros_like(t), c, x[:, :-1])
    net(x, t, c, x[:, :-1])
    assert close(keys[0][:, :5], keys[0][:, 5:-1])
    assert close(keys[1][:, :5], keys[0][:, :5]), "whatever t the noisy frames have"
    assert not close(keys[1][:, :5], keys[1][:, 5:-1], 1e-3)


def test_diffusion_forcing_with_levels_of_0_is_teacher_forcing():
    net, (x, x_t, t, c) = tiny(), clip()
    history = x[:, :-1]
    teacher = net(x_t, t, c, history)
    assert torch.equal(net(x_t, t, c, history, history_t=torch.zeros(2, 5).double()), teacher)
    levels = t[:, :-1].clone()
    moved = (net(x_t, t, c, history, history_t=levels) - teacher).abs().amax((0, 2, 3, 4))
    assert moved[0] == 0 and (moved[1:] > 1e-6).all()

    null = torch.zeros(3, 5).double()
    guided = Guided(net, null, 1.0)(x_t, t, c, history, history_t=levels)
    assert close(guided, net(x_t, t, c, history, history_t=levels))


def test_t_is_seen_in_thousandths():
    """The sinusoid is Wan's: cosines, then sines, of 1000 t at 1e4^(-i / half)."""
    net, (_, x_t, t, c) = tiny(), clip()
    seen = []
    net.time_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(x_t, t, c)
    for b, n in np.ndindex(2, 6):
        angles = np.array([1000 * t[b, n].item() * 1e4 ** (-i / 8) for i in range(8)])
        wanted = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)]))
        assert close(seen[0][b, n], wanted, 1e-9)


def test_rope_turns_by_position_and_turns_add_up():
    def at(frame, row, column):
        return model_py.rope(32, *(torch.tensor([z]) for z in (frame, row, column)))

    q, k = torch.randn(2, 32, dtype=torch.float64)
    here, there, moved = at(3, 1, 2), at(10, 1, 2), at(7, 0, 0)
    assert close(
        model_py.rotate(model_py.rotate(k[None], here), moved), model_py.rotate(k[None], there)
    )
    assert here.shape == (1, 16)
    a = (model_py.rotate(q[None], there) * model_py.rotate(k[None], here)).sum()
    b = (model_py.rotate(q[None], moved) * k[None]).sum()
    assert close(a, b), "only the distance counts"


def test_rope_splits_a_head_into_time_row_and_column():
    """Width 32: 6 pairs for time, 5 for the row, 5 for the column; tokens run along rows."""
    angles = model_py.token_angles(32, 2, (4,), 2, 3, torch.device("cpu"), torch.float64)[0]
    for token in range(12):
        latent, row, column = 8 + token // 6, token // 3 % 2, token % 3
        wanted = [latent * 1e4 ** (-i / 6) for i in range(6)]
        wanted += [row * 1e4 ** (-i / 5) for i in range(5)]
        wanted += [column * 1e4 ** (-i / 5) for i in range(5)]
        wanted = torch.tensor(wanted, dtype=torch.float64)
        assert close(angles[token], torch.polar(torch.ones_like(wanted), wanted))


def test_a_new_network_returns_zero_and_patches_come_back_in_place():
    torch.manual_seed(0)
    net = CausalDiT(Config(2, 48, 96, 2, 1, 2, 3, text_dim=5))
    x, t, c = torch.randn(1, 2, 6, 4, 6), torch.rand(1, 2), torch.randn(1, 3, 5)
    assert (net(x, t, c, x[:, :1]) == 0).all()
    torch.nn.init.normal_(net.head.head.weight)
    v = net(x, t, c, x[:, :1])
    assert v.shape == x.shape and v.dtype == torch.float32 and v.std(dim=(0, 1)).min() > 0


def with_x(net):
    """Two networks of the same weights: one of v from a clean frame, and one of that frame."""
    of_x = copy.deepcopy(net)
    of_x.config = replace(net.config, predict="x")
    return of_x, net


def test_x_prediction_is_v_through_eq_3():
    of_x, head = with_x(tiny())
    x, x_t, t, c = clip()
    t[:, :2] = torch.tensor([0.0, 0.05])
    v, clean = of_x(x_t, t, c, x[:, :-1]), head(x_t, t, c, x[:, :-1])
    level = t.clamp(min=0.05)[..., None, None, None]
    assert close(v, (x_t - clean) / level)
    eps = (x_t - (1 - level) * clean) / level  # the noise that clean and x_t imply
    assert close(v, eps - clean)


@pytest.mark.parametrize("detail", (0, 4))
def test_a_new_network_of_x_returns_x_0(detail):
    net = CausalDiT(Config(2, 24, 48, 2, 1, 2, text_dim=5, predict="x", detail=detail))
    x, t, c = torch.randn(1, 2, 2, 4, 6), torch.rand(1, 2), torch.randn(1, 3, 5)
    wanted = x / t.clamp(min=0.05)[..., None, None, None]
    assert torch.equal(net(x, t, c, x[:, :1]), wanted)


@pytest.mark.parametrize(
    "chunk, patch, count", ((1, 2, 0), (3, 2, 0), (1, 1, 0), (1, 2, 2), (3, 2, 1))
)
def test_the_detail_head_is_four_convolutions_of_what_it_sees(chunk, patch, count):
    net = tiny(chunk, patch=patch, detail=6, detail_frames=count)
    _, x_t, t, _ = clip(chunk, N=3)
    e = net.time_embedding(model_py.sinusoid(1000 * t, 16).double())
    out = torch.randn(x_t.shape, dtype=torch.float64)
    before = torch.randn(x_t.repeat(1, 1, count, 1, 1).shape, dtype=torch.float64)
    shift, scale = (z[..., None, None] for z in net.detail.modulation(e).chunk(2, dim=-1))
    fold = patch  # pixels along a side of a convolution's place
    refined = net.detail(x_t, out, before, e)
    for n in range(3):
        z = F.pixel_unshuffle(torch.cat([x_t[:, n], out[:, n], before[:, n]], dim=1), fold)
        for i, layer in enumerate(net.detail.layers):
            assert layer.weight.shape[2:] == (3, 3)
            z = F.conv2d(z, layer.weight, layer.bias, padding=1)
            if i == 0:
                z = z * (1 + scale[:, n]) + shift[:, n]
            if i < 3:
                z = F.gelu(z)
        assert close(refined[:, n], out[:, n] + F.pixel_shuffle(z, fold))
    assert i == 3


def test_the_detail_head_joins_patches_and_no_frames():
    net, (_, x_t, t, _) = tiny(detail=6), clip(N=3)
    e = net.time_embedding(model_py.sinusoid(1000 * t, 16).double())
    out, none = torch.zeros_like(x_t), x_t[:, :, :0]
    plain = net.detail(x_t, out, none, e)
    out[:, 1, :, 1, 1] += 1  # the last pixel of a patch, in the second frame
    changed = (net.detail(x_t, out, none, e) - plain).abs().amax((0, 2))
    assert changed[1, 2, 2] > 0, "in the next patch"
    assert changed[[0, 2]].max() == 0


def test_convolutions_that_multiply_what_they_see_do_not_make_a_rollout_grow():
    net, (x, noise, t, c) = tiny(detail=6, detail_frames=2), clip(N=12)
    for layer in net.detail.layers:
        layer.weight.data *= 20
    made = rollout(net, noise, torch.ones(2).double(), c, 1, history=x[:, :2])
    largest = [z.abs().max().item() for z in made]
    assert largest[0] > 1000, "they multiply"
    assert max(largest) < 10 * largest[0]

    e = net.time_embedding(model_py.sinusoid(1000 * t, 16).double())
    before = 2 * torch.randn(2, 12, 4, 4, 6).double()
    wanted = net.detail(noise, noise, before.clamp(-4, 4), e)
    assert before.abs().max() > 4 and close(net.detail(noise, noise, before, e), wanted)


@pytest.mark.parametrize("strips", (False, True))
def test_strips_carry_what_is_in_a_row_and_a_column_to_all_of_them(strips):
    net = tiny(detail=6, detail_frames=2, detail_strips=strips)
    frames = torch.randn(2, 3, 2, 40, 60).double()  # the convolutions take any size
    before = torch.randn(2, 3, 4, 40, 60).double()
    e = net.time_embedding(model_py.sinusoid(torch.ones(2, 3), 16).double())
    plain = net.detail(frames, frames, before, e)
    before[:, 1, :, 8, 10] = 4
    changed = (net.detail(frames, frames, before, e) - plain).abs().amax((0, 2))
    assert changed[1, 8, 10] > 0
    assert (changed[1, 8, 50] > 0) == (changed[1, 32, 10] > 0) == strips, "far off in its lines"
    assert changed[1, 20:, 24:].max() == 0, "in neither, nor near one"
    assert changed[[0, 2]].max() == 0, "no other frame"

    reached = []
    for column in range(30, 60, 3):  # most are no maximum of their row, for no channel
        other = before.clone()
        other[:, 1, 0, 30, column] += 1e-9
        changed = net.detail(frames, frames, other, e) - net.detail(frames, frames, before, e)
        reached.append(changed[:, 1, :, 30, :15].abs().max() > 0)
    assert not all(reached), "the mean of a row would carry all of them"


@contextmanager
def seen_before(net):
    """Record the frames before that each call of the detail head is given."""
    seen = []
    hook = net.detail.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    yield seen
    hook.remove()


def test_the_detail_head_sees_the_frames_right_before_and_none_that_is_not_finished():
    net, (x, x_t, t, c) = tiny(detail=6, detail_frames=2), clip()
    none = torch.zeros_like(x[:, :1])
    wanted = torch.cat([torch.cat([none, x[:, :-1]], 1), torch.cat([none, none, x[:, :-2]], 1)], 2)
    with seen_before(net) as seen:
        net(x_t, t, c, x[:, :-1])
        assert same(seen[0], wanted)
        for given in range(6):  # the frames that are not given are not finished
            net(x_t, t, c, x[:, :given])
            finished = x.clone()
            finished[:, given:] = 0
            shifted = [F.pad(finished, (0, 0) * 3 + (lag, 0))[:, :6] for lag in (1, 2)]
            assert same(seen[-1], torch.cat(shifted, 2))
        net(x_t[:, :2], t[:, :2], c, x[:, :2], first=3)  # frame 2 is missing
        known, unknown = torch.cat([none, x[:, [1]]], 2), torch.cat([none, none], 2)
        assert same(seen[-1], torch.cat([known, unknown], 1))


@pytest.mark.parametrize("given", [0, 5])
@pytest.mark.parametrize("chunk, window, sink", [(1, None, 0), (1, 3, 0), (3, 3, 1)])
def test_a_rollout_shows_the_detail_head_the_same_frames(chunk, window, sink, given):
    """In each Euler step and both branches of guidance, from a cache whose window moves."""
    net, (x, noise, _, c) = tiny(chunk, detail=6, detail_frames=2), clip(chunk)
    guided = Guided(net, torch.zeros_like(c[0]), 1.5)
    cache = guided.cache(2, given + 6, window=window, sink=sink)
    t = torch.ones(2).double()
    with seen_before(net) as seen:
        made = list(rollout(guided, noise, t, c, 2, history=x[:, :given], cache=cache))
    padded = [torch.zeros_like(made[0])] * 2 + [x[:, [i]] for i in range(given)] + made
    assert len(seen) == 12
    for call, before in enumerate(seen):
        i = given + call // 2
        assert same(before, torch.cat([padded[i + 1], padded[i]], dim=2).repeat(2, 1, 1, 1, 1)), i


@pytest.mark.parametrize("count, strips", [(0, False), (2, False), (2, True)])
def test_a_cached_rollout_with_a_detail_head_is_the_parallel_pass(count, strips):
    net = tiny(detail=6, detail_frames=count, detail_strips=strips)
    x, x_t, t, c = clip(N=4)
    together = net(x_t, t, c, x[:, :-1])
    cache, history = net.cache(2, 4), None
    for i in range(4):
        assert close(net(x_t[:, [i]], t[:, [i]], c, history, cache, i), together[:, [i]])
        history = x[:, [i]]
    cache = net.cache(2, 4)  # all at once, then again from what the cache has kept
    assert close(net(x_t, t, c, x[:, :-1], cache), together)
    assert close(net(x_t, t, c, None, cache), together)


class FixedLevel:
    """Normal numbers for the noise, and the level t_s itself in place of the draw of t_s."""

    def __init__(self, level):
        self.level = level

    def randn(self, *shape, device=None, dtype=None):
        if len(shape) == 1:
            return torch.full(shape, self.level, dtype=torch.float64).logit()
        return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("level", [0.9, 0.3, 0.06, 0.02])
def test_an_euler_step_of_self_resampling_is_the_clean_frame_of_the_network(level):
    """From t_s >= 0.05 on it is exactly the network's x; below, it goes t_s / 0.05 of the way."""
    of_x, head = with_x(tiny())
    x, _, _, c = clip()
    made = self_resample(of_x, x, c, s=1.0, steps=1, rng=FixedLevel(level))
    eps = FixedLevel(level).randn(*x.shape, dtype=x.dtype)
    t = torch.full(x.shape[:2], level, dtype=x.dtype)
    x_ts = add_noise(x, eps, t)
    with torch.no_grad():
        for i in range(x.shape[1]):
            clean = head(x_ts[:, [i]], t[:, [i]], c, made[:, :i], first=i)
            assert close(made[:, [i]], torch.lerp(x_ts[:, [i]], clean, min(1, level / 0.05)))


def test_what_the_network_predicts_is_v_or_x(tmp_path):
    with pytest.raises(ValueError, match='predict is \'eps\'; wanted "v" or "x"'):
        Config(predict="eps")
    predicts = {name: config.predict for name, config in PRESETS.items()}
    assert predicts == {"toy": "x", "small": "x", "wan-1.3b": "v", "wan-14b": "v"}

    run = make_run(tmp_path / "old")
    state = checkpoint_of(run)
    for name in ("predict", "detail", "detail_frames", "detail_strips"):  # from before a choice
        del state["config"][name]
    torch.save(state, run / "ckpt.pt")
    config = load_checkpoint(run).config
    assert (config.predict, config.detail, config.detail_frames) == ("v", 0, 0)
    assert not config.detail_strips


def test_weights_of_half_precision_become_whole(tmp_path):
    run = make_run(tmp_path / "run")
    state = checkpoint_of(run)
    state["ema"] = {name: z.half() for name, z in state["ema"].items()}
    torch.save(state, run / "ckpt.pt")
    net = load_checkpoint(run)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert same(net.state_dict(), {name: z.float() for name, z in state["ema"].items()})


def test_patches_are_ordered_as_wan_orders_them():
    """In: (c p q), a convolution's order. Out: (p q c). Tokens run over time, rows, columns."""
    config = Config(2, 24, 48, 2, 1, patch=2, chunk=3)
    x = torch.randn(1, 2, 6, 4, 6)
    tokens = model_py.patchify(x, config)
    out = torch.randn(1, 2, 18, 8)
    frames = model_py.unpatchify(out, config, rows=2)
    for t, c, row, column in np.ndindex(3, 2, 4, 6):
        token = t * 6 + row // 2 * 3 + column // 2
        p, q = row % 2, column % 2
        assert tokens[0, 1, token, c * 4 + p * 2 + q] == x[0, 1, 2 * t + c, row, column]
        assert frames[0, 1, 2 * t + c, row, column] == out[0, 1, token, p * 4 + q * 2 + c]


def test_a_block_is_wans_written_out():
    """One frame of one token: self-attention is then its own value."""
    torch.manual_seed(0)
    block, E = tiny(layers=1).blocks[0], 12
    x, e6 = torch.randn(24).double(), torch.randn(6, 24).double()
    text = torch.randn(3, 24).double()

    def layer_norm(z):
        return (z - z.mean()) / (z.var(correction=0) + 1e-6).sqrt()

    def rms_norm(z, weight):
        return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation[0] + e6
    attn, cross = block.self_attn, block.cross_attn
    wanted = x + gate1 * attn.o(attn.v(layer_norm(x) * (1 + scale1) + shift1))

    h = layer_norm(wanted) * block.norm3.weight + block.norm3.bias
    q = rms_norm(cross.q(h), cross.norm_q.weight)
    k, v = rms_norm(cross.k(text), cross.norm_k.weight), cross.v(text)
    heads = []
    for head in (slice(0, E), slice(E, 2 * E)):
        weight = torch.softmax(k[:, head] @ q[head] / E**0.5, 0)
        heads.append(weight @ v[:, head])
    wanted = wanted + cross.o(torch.cat(heads))

    h = block.ffn[0](layer_norm(wanted) * (1 + scale2) + shift2)
    h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    wanted = wanted + gate2 * block.ffn[2](h)

    past, own = sparse_causal_mask(0, 0, 1, 0)
    angles = torch.ones(1, 1, E // 2, dtype=torch.complex128)
    out = block(x.view(1, 1, 1, 24), e6[None, None], angles, past, own, text[None], None)
    assert close(out.flatten(), wanted)


def test_autocast_changes_the_velocity_by_its_rounding():
    net, (x, x_t, t, c) = tiny().float(), (z.float() for z in clip())
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x_t, t, c, x[:, :-1])
    high = net(x_t, t, c, x[:, :-1])
    assert low.dtype == torch.float32 and 0 < (low - high).norm() < 0.02 * high.norm()


def test_autocast_reaches_the_convolutions_but_the_last():
    """Three of four run in bf16; the pixels are float32, as those of the head."""
    net, (x, x_t, t, c) = tiny(detail=8, detail_frames=2).float(), (z.float() for z in clip())
    types = []
    for layer in net.detail.layers:
        layer.register_forward_hook(lambda layer, args, out: types.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x_t, t, c, x[:, :-1])
    assert types == 3 * [torch.bfloat16] + [torch.float32]
    high = net(x_t, t, c, x[:, :-1])
    assert low.dtype == torch.float32 and 0 < (low - high).norm() < 0.02 * high.norm()


def test_a_cache_reads_the_new_text_when_the_prompt_changes():
    net, (_, x_t, t, c) = tiny(), clip(N=1)
    cache, other = net.cache(2, 4), c + 1
    net(x_t, t, c, None, cache)
    assert close(net(x_t, t, other, None, cache), net(x_t, t, other))
    assert close(net(x_t, t, c, None, cache), net(x_t, t, c))


def test_a_pass_that_fails_leaves_the_cache_as_it_was():
    net, (x, x_t, t, c) = tiny(), clip()
    cache = net.cache(2, 6)
    wanted = net(x_t[:, [1]], t[:, [1]], c, x[:, [0]], cache, first=1)
    cache = net.cache(2, 6)
    hook = net.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        net(x_t[:, [1]], t[:, [1]], c, x[:, [0]], cache, first=1)
    hook.remove()
    net.blocks[1]._forward_pre_hooks.clear()
    assert cache.length == 0
    assert close(net(x_t[:, [1]], t[:, [1]], c, x[:, [0]], cache, first=1), wanted)


def test_a_cache_is_allocated_once():
    net, (_, noise, _, c) = tiny(), clip()
    cache, places = net.cache(2, 6), set()
    for _ in rollout(net, noise, torch.ones(2).double(), c, 2, cache=cache):
        places.add((cache.k.data_ptr(), cache.k.shape[3]))
    assert len(places) == 1 and cache.k.shape[3] == 6


@pytest.mark.parametrize("sink", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_window_keeps_positions_in_range_and_memory_flat(sink, chunk):
    """A windowed rollout equals one whose cache holds just sink and window, as in a short video."""
    net, (_, _, _, c) = tiny(chunk, layers=1), clip(chunk)
    noise = torch.randn(2, 9, 2 * chunk, 4, 6, dtype=torch.float64)
    t = torch.ones(2).double()
    cache = net.cache(2, 9, window=4, sink=sink)
    made, places = [], set()
    for frame in rollout(net, noise, t, c, 2, cache=cache):
        made.append(frame)
        places.add((cache.k.shape, cache.k.data_ptr()))
        assert cache.length <= 4
    assert len(places) == 1 and cache.k.shape[3] == 5 and cache.first == 4
    assert close(routing.describe(cache.k), cache.descriptor), "mean keys are kept beside the keys"

    kept = torch.cat(made[:sink] + made[8 - (4 - sink) : 8], 1)
    again = list(rollout(net, noise[:, [8]], t, c, 2, history=kept, cache=net.cache(2, 5)))
    assert close(again[0], made[8]), "with one layer, a key does not depend on what its frame saw"


def test_a_window_as_long_as_the_video_allocates_the_video_only():
    net, (_, noise, _, c) = tiny(), clip()
    cache = net.cache(2, 6, window=10**12, sink=1)
    t = torch.ones(2).double()
    made = list(rollout(net, noise, t, c, 1, cache=cache))
    assert close(torch.cat(made, 1), torch.cat(list(rollout(net, noise, t, c)), 1))
    assert cache.k.shape[3] == 6


def test_a_window_evicts_at_once_what_it_would_evict_anyway():
    net, (x, noise, _, c) = tiny(), clip()
    made = []
    for history in (x, x[:, [0, 4, 5]]):
        cache = net.cache(2, 99, window=3, sink=1)
        t = torch.ones(2).double()
        made += rollout(net, noise[:, :1], t, c, 2, history=history, cache=cache)
        assert cache.length == 3
    assert close(*made)


def test_a_cache_says_when_it_is_full_or_foreign():
    net, (x, x_t, t, c) = tiny(), clip()
    with pytest.raises(ValueError, match="6 finished frames in a cache for 3"):
        net(x_t[:, :1], t[:, :1], c, x, net.cache(2, 3), first=6)
    with pytest.raises(ValueError, match="window of 2 frames with a sink of 2"):
        net.cache(2, 3, window=2, sink=2)
    convolved = tiny(detail=6, detail_frames=2)
    assert convolved.cache(2, 9, window=3, sink=1).frames == 3
    with pytest.raises(ValueError, match="3 frames with a sink of 2 keeps 1 .* see 2"):
        convolved.cache(2, 9, window=3, sink=2)
    with pytest.raises(ValueError, match="a pass of 2 videos on a cache for 4"):
        net(x_t[:, :1], t[:, :1], c, x[:, :1], net.cache(4, 3), first=1)


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


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="dim 48 .* 5 heads .*; a dim of 50 would work"):
        Config(dim=48, heads=5)
    for wrong in ({"layers": 0}, {"patch": -1}, {"top_k": 0}, {"dim": None}, {"heads": "two"}):
        with pytest.raises(ValueError, match=f"{[*wrong][0]} is .*; wanted a number above 0"):
            Config(**wrong)
    with pytest.raises(ValueError, match="detail_frames 2 needs convolutions; a detail of 32"):
        Config(detail_frames=2)
    with pytest.raises(ValueError, match="detail_strips needs convolutions; a detail of 32"):
        Config(detail_strips=True)
    with pytest.raises(ValueError, match="detail_frames 2: wanted at most the window, 1"):
        Config(detail=8, detail_frames=2, window=1)


def test_compiled_blocks_change_nothing_and_are_not_compiled_anew_for_every_frame():
    def one_rollout(frames):
        return torch.cat([*rollout(net, x[:, :frames], torch.ones(2), c.float(), 2)], dim=1)

    net, (x, _, _, c) = tiny().float(), clip()
    x = torch.randn(2, 14, *x.shape[2:])
    plain, graphs = one_rollout(14), []
    net.compile_blocks(backend="eager")
    for frames in (3, 5, 14):
        assert close(one_rollout(frames), plain[:, :frames], 1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1] == graphs[2]


def test_recomputing_blocks_keeps_less_and_changes_no_gradient():
    net, (x, history, t, c) = tiny(), clip()
    grads, kept = [], []
    for net.recompute in (False, True):
        net.zero_grad()
        net(x, t, c, history).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
        kept.append(bytes_kept(lambda: net(x, t, c, history)))
    assert same(*grads) and grads[0][0].abs().sum() > 0
    assert kept[1] < kept[0] / 2


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of `tiny` whose EMA differs from its weights: (path, state)."""
    net = tiny().float()
    ema = {key: value + 1 for key, value in net.state_dict().items()}
    state = {"config": vars(net.config), "model": net.state_dict(), "ema": ema}
    state |= {"step": 3, "args": {"frames": 4}}
    torch.save(state, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt", state


def test_a_checkpoint_is_loaded_with_its_ema_weights(checkpoint):
    path, state = checkpoint
    for place in (path, path.parent):
        net = load_checkpoint(place)
        assert same(dict(net.state_dict()), state["ema"]) and net.run == {"frames": 4}
        assert not net.training and not any(p.requires_grad for p in net.parameters())


class Harm:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"ema": None}, "its ema is a NoneType"),
        ({"config": {"magic": 1}}, "magic"),
        ({"ema": {"head.bias": torch.zeros(1)}}, "are not those of this network: Missing"),
        ({"ema": {1: 2}}, "are not those of this network"),
        ({"config": {"dim": 10**6, "ffn_dim": 10**6}}, "are not those of this network"),
        ({"args": Harm()}, "is not a whole checkpoint"),
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


@pytest.mark.parametrize(
    "content, message", ((b"", "the file is empty"), (b"junk", "not a whole checkpoint"))
)
def test_a_broken_checkpoint_is_refused_in_one_line(content, message, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there is no checkpoint at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_list_is_no_checkpoint(tmp_path):
    torch.save([1], tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="it lacks config"):
        load_checkpoint(tmp_path)


def test_the_network_is_wan():
    with torch.device("meta"):
        net = CausalDiT(PRESETS["wan-1.3b"])
    assert sum(p.numel() for p in net.parameters()) == 1_418_996_800
    names = {
        "patch_embedding.weight",
        "text_embedding.2.bias",
        "time_embedding.0.weight",
        "time_projection.1.weight",
        "blocks.29.modulation",
        "blocks.0.self_attn.norm_q.weight",
        "blocks.0.cross_attn.o.bias",
        "blocks.0.norm3.weight",
        "blocks.0.ffn.2.weight",
        "head.head.weight",
        "head.modulation",
    }
    assert len(net.state_dict()) == 825 and names <= set(net.state_dict())


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
    model_py.load_wan(net, tmp_path / "wan.pth")
    assert same(dict(net.state_dict()), weights)


def test_wrong_wan_weights_are_named(wan_weights, tmp_path):
    net, _, state = wan_weights
    del state["head.head.bias"]
    state |= {"img_emb": torch.ones(1), "blocks.0.modulation": torch.ones(1, 6, 7)}
    torch.save(state, tmp_path / "wan.pth")
    message = "Missing.*head.head.bias.*Unexpected.*img_emb.*mismatch for blocks.0.modulation"
    with pytest.raises(ValueError, match=message):
        model_py.load_wan(net, tmp_path / "wan.pth")

    (tmp_path / "wan.pth").write_text("junk")
    torch.save({"generator": [1]}, tmp_path / "list.pth")
    for name in ("wan.pth", "list.pth", "none.pth"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
            model_py.load_wan(net, tmp_path / name)
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model"):
        model_py.load_wan(net, tmp_path)


@pytest.mark.extras
def test_the_network_is_that_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs pip install diffusers")
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=256,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
    ).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "transformer")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_text("not to be read")
    ours = CausalDiT(Config(4, 32, 64, 2, 2, 2, 3, text_dim=24))
    model_py.load_wan(ours, tmp_path)

    x, c, t = torch.randn(2, 3, 4, 6, 8), torch.randn(2, 7, 24), torch.rand(2, 1)
    with torch.no_grad():  # one frame of three latents: nothing is masked, as in theirs
        v = unfold(ours(fold(x, 3), t, c), 3)
        wanted = theirs(x.transpose(1, 2), 1000 * t[:, 0], c).sample.transpose(1, 2)
    assert wanted.std() > 0.1
    assert (v - wanted).abs().max() < 5e-5 * wanted.abs().max().clamp(min=1)


# ---- data.py ----


GOP = 8


def noise_pictures(frames, size):
    """Pictures (T, size, size, 3), each unlike all others."""
    return np.random.default_rng(frames).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)


def write_mp4(path, pictures=None, times=None, pix_fmt="yuv420p", **options):
    """A video of pictures (T, height, width, 3), 40 if left out: B-frames, and several GOPs."""
    pictures = noise_pictures(40, 16) if pictures is None else pictures
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt, stream.gop_size = pix_fmt, GOP
        stream.options = {"bf": "3", **options}
        stream.codec_context.time_base = Fraction(1, 100)
        for t, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.time_base = Fraction(1, 100)
            frame.pts = times[t] if times else 10 * t
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def args_for(folder, **changes):
    wanted = {"size": 16, "frames": 4, "fps": 0.0, "stride": 1, "seed": 0}
    wanted |= {"objects": 2, "wall": False, "withheld": 0.0}
    return argparse.Namespace(data=str(folder), **(wanted | changes))


# ---- tensors, words, sprites


def test_fold_puts_the_frame_of_a_chunk_before_the_channel():
    video = torch.arange(2 * 6 * 4 * 1 * 1).view(2, 6, 4, 1, 1)
    folded = fold(video, 3)
    assert folded.shape == (2, 2, 12, 1, 1) and torch.equal(unfold(folded, 3), video)
    for n in range(2):
        for t in range(3):
            for c in range(4):
                assert torch.equal(folded[:, n, t * 4 + c], video[:, n * 3 + t, c])


def test_words_bind_and_nothing_is_zero():
    words = Sprites().words
    a, b = words("red circle and blue square"), words("blue circle and red square")
    assert a.shape == (5, words.text_dim)
    assert not torch.equal(a.sum(0), b.sum(0)), "even a sum of rows tells them apart"
    assert (words("") == 0).all() and torch.equal(words("Red  circle!"), words("red circle"))


def test_a_word_is_a_row_beside_its_successor():
    c = Words(["a", "b", "c"], rows=4)("c a")
    assert c.nonzero().tolist() == [[0, 2], [0, 3 + 0], [1, 0]] and c.shape == (4, 6)
    assert Words(["a"], rows=1).text(["a", "a a a"]).shape == (2, 3, 2)
    with pytest.raises(ValueError, match='unknown word "dog".*nearest are: a'):
        Words(["a"])("a dog")
    with pytest.raises(ValueError, match="must be empty"):
        Words([])("dog")


def test_sprites_are_a_function_of_seed_split_and_index():
    a, b = Sprites(seed=1), Sprites(seed=1)
    assert same(a[5], b[5])
    for other in (Sprites(seed=2)[5], Sprites(seed=1, split="test")[5], a[6]):
        assert not torch.equal(a[5][0], other[0])
    assert torch.equal(Sprites(frames=40, seed=1)[5][0][:12], a[5][0])
    assert a[5][0].min() >= -1 and a[5][0].max() <= 1
    assert len({a.caption(i) for i in range(200)} - {""}) > 50


def test_a_batch_of_sprites_is_its_items():
    world = Sprites(withheld=0.5)
    assert all(same(z, world[i]) for i, z in zip((3, 4), world.__getitems__([3, 4])))
    assert same(pickle.loads(pickle.dumps(world))[3], world[3]), "in a worker process"


def test_the_first_bits_of_the_default_sprites_stay_what_they_are():
    video, c = Sprites()[0]
    assert Sprites().caption(0) == "yellow circle and blue circle"
    means = video.mean((1, 2, 3))[:4].tolist()
    assert means == pytest.approx([-0.6902, -0.6903, -0.6900, -0.6900], abs=1e-4)
    assert c.sum() == 9 and video.shape == (12, 3, 32, 32)


def test_a_share_of_the_captions_is_withheld():
    silent = [bool((Sprites(8, 2, withheld=0.25)[i][1] == 0).all()) for i in range(200)]
    assert 30 < sum(silent) < 70
    assert (Sprites(8, 2, withheld=1.0)[0][1] == 0).all()
    assert (data.open_data(args_for("sprites", withheld=1.0))[0][1] == 0).all()


def test_open_data_gives_the_sprites_every_flag():
    flags = {"size": 20, "frames": 5, "seed": 3, "objects": 3, "wall": True}
    world = data.open_data(args_for("sprites", **flags), split="test")
    assert same(world[2], Sprites(20, 5, 3, "test", 3, True)[2]) and world.rows == 8
    with pytest.raises(ValueError, match="8x16.*square"):
        data.open_data(args_for("sprites", size=(8, 16)))


def test_sprites_move_straight_and_bounce():
    world = Sprites(16)
    for i in range(20):
        _, _, at = world.scene(i, 40)
        step = at[1:] - at[:-1]
        margin = data.radius_of(16)
        assert at.min() >= margin - 1e-4 and at.max() <= 16 - margin + 1e-4
        turned = (step[1:] - step[:-1]).abs() > 1e-3
        assert not (turned & ((at[1:-1] - 8).abs() < 8 - margin - 1.3)).any(), "far from the edges"
        assert (step.norm(dim=-1) <= data.SPEED[1] * 16 + 1e-3).all()


def test_the_first_sprite_is_painted_in_front():
    at = torch.tensor([[8.0, 8.0], [8.0, 8.0]])
    picture = data.paint(at, torch.tensor([0, 1]), torch.tensor([0, 2]), 16)
    assert torch.allclose(picture[:, 8, 8], data.PALETTE[0])
    corner = data.paint(torch.tensor([[3.0, 12.0]]), torch.tensor([0]), torch.tensor([0]), 16)
    assert torch.allclose(corner[:, 12, 3], data.PALETTE[0]), "x is the column"


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"objects": 7}, "7 sprites in a clip; 1 to 6"),
        ({"size": 1025}, "size 1025.*1024"),
        ({"size": 100_000}, "size 100000.*1024"),
        ({"frames": 10**8}, "100000000 frames.*325520 frames"),
    ],
)
def test_absurd_sprites_are_refused_before_they_are_allocated(flags, message):
    with pytest.raises(ValueError, match=message):
        Sprites(**flags)


# ---- metrics


@pytest.fixture(scope="module")
def truth():
    """(videos, captions, scores) of four held-out clips."""
    world = Sprites(frames=12, split="test")
    video = torch.stack([world[i][0] for i in range(4)])
    captions = [world.caption(i) for i in range(4)]
    return video, captions, measure(video, captions)


def blurred(video, sigma):
    g = torch.exp(-(torch.arange(-8, 9.0) ** 2) / (2 * sigma**2))
    pad = torch.nn.functional.pad(video.flatten(0, 2)[:, None], (8,) * 4, mode="replicate")
    kernel = (g[:, None] * g / g.sum() ** 2)[None, None]
    return torch.nn.functional.conv2d(pad, kernel).view_as(video)


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


@pytest.mark.parametrize("wall", [False, True])
def test_the_error_of_a_sprites_cover_is_that_of_its_drawing(wall):
    """`measure` moves one sprite at a time, by a quadratic of its cover, and draws it nowhere."""
    torch.manual_seed(0)
    at = 4 + 16 * torch.rand(8, 3, 2)
    shape, colour = torch.randint(3, (8, 3)), torch.rand(8, 6).argsort(1)[:, :3]
    there = torch.rand(8, 3) < 0.8
    picture = torch.rand(8, 3, 24, 24) * 2 - 1
    for s in range(3):
        first, second = data.error_of_cover(picture, at, shape, colour, there, s, wall)
        moved, gone, shown = at.clone(), there.float(), there.float()
        moved[:, s] += torch.tensor([1.3, -0.4])
        gone[:, s] = 0
        opacity = torch.rand(8)
        shown[:, s] *= opacity
        without = data.paint(at, shape, colour, 24, wall, gone)
        drawn = data.paint(moved, shape, colour, 24, wall, shown)
        wanted = (drawn - picture).square().sum(1) - (without - picture).square().sum(1)
        assert wanted.abs().max() > 0.5, "one at least is in sight"
        cover = data.coverage(moved[:, s], shape[:, s], 24, data.radius_of(24))
        alpha = cover * opacity[:, None, None]
        assert close(first * alpha + second * alpha**2, wanted, 1e-5)


def test_metrics_tell_pixels_motion_and_names_apart(truth):
    video, captions, scores = truth
    scores = mean(scores)
    slight, strong = (mean(measure(blurred(video, sigma), captions)) for sigma in (0.8, 4))
    assert (scores >= slight - 1).all() and (slight > strong + 30).all()
    assert slight[0] < scores[0] - 10 and (slight > scores - 10)[1:].all(), "blur costs Visual"
    swapped = mean(measure(video[:, :, [2, 0, 1]], captions))
    assert swapped[2] < scores[2] - 40, "other colours cost Text"
    jumping = torch.cat([video[:, :4], video[:, 9:], video[:, 4:9]], dim=1)
    jump = mean(measure(jumping, captions))
    assert jump[1] < scores[1] - 15 and (jump - scores)[[0, 2]].abs().max() < 2, "Temporal"


def moving(positions, colour=0, shape=0, size=16):
    """A video of one sprite at (T, 2) positions."""
    at = torch.tensor(positions)[:, None].float()
    return data.paint(at, torch.tensor([shape]), torch.tensor([colour]), size)[None]


STRAIGHT = [(4 + 0.8 * t, 8.0) for t in range(8)]


def test_a_vanished_sprite_costs_temporal_and_text():
    video = moving(STRAIGHT)
    video[:, 5:] = data.BACKGROUND[:, None, None]
    scores = measure(video, ["red circle"])[0]
    assert (scores[2:5, 1] > 95).all() and (scores[5:, 1] == 0).all()
    assert (scores[:5, 2] == 100).all() and (scores[5:, 2] == 0).all()
    video[:, :5] = data.BACKGROUND[:, None, None]
    assert measure(video, ["red circle"])[0, :2, 1].isnan().all(), "nothing is due yet"


def test_a_wrong_shape_costs_half_of_text_and_a_sprite_too_many_too():
    assert (measure(moving(STRAIGHT), ["red square"])[0, :, 2] == 50).all()
    assert (measure(moving(STRAIGHT), ["red circle and blue square"])[0, :, 2] == 50).all()
    two = Sprites(frames=3, split="test")
    (colour, shape, _), video = two.scene(0), two[0][0][None]
    first = data.caption_text(colour[:1], shape[:1])
    assert (measure(video, [first])[0, :, 2] == 50).all()
    assert (measure(moving(STRAIGHT), [""])[0, :, 2] == 0).all(), "nothing was asked for"


def test_an_invalid_speed_costs_temporal():
    fast = [(3.2 + 1.15 * t, 8.0) for t in range(8)]
    slow = [(5 + 0.1 * t, 8.0) for t in range(8)]
    for positions in (fast, slow):
        assert measure(moving(positions), ["red circle"])[0, 2:, 1].mean() < 90
    assert measure(moving(STRAIGHT), ["red circle"])[0, 2:, 1].min() > 95


def test_metrics_forgive_what_the_wall_hides():
    for objects, size in ((1, 20), (2, 32)):
        world = Sprites(size, 24, split="test", objects=objects, wall=True)
        video = torch.stack([world[i][0] for i in range(3)])
        captions = [world.caption(i) for i in range(3)]
        assert (mean(measure(video, captions, wall=True)) > 95).all()


def test_behind_the_wall_there_is_something_to_remember():
    world = Sprites(20, split="test", objects=1, wall=True)
    hidden = []
    for i in range(32):
        _, shape, at = world.scene(i, 24)
        there = torch.ones(24, 1)
        hidden.append(data.visible_share(at, shape.expand(24, 1), there, 20, True)[:, 0] < 0.02)
    assert not torch.stack(hidden)[:, 0].any(), "all begin in sight"
    gone = [z for z in hidden if z[3:-1].any() and not z[-1]]
    assert len(gone) > 16 and np.mean([z.sum().item() for z in gone]) > 2, "most go and return"


# ---- reading videos


@pytest.fixture(scope="module")
def long_files(tmp_path_factory):
    """Videos of several groups of pictures: with B-frames, open groups, uneven times, as a GIF."""
    folder = tmp_path_factory.mktemp("long")
    write_mp4(folder / "closed.mp4")
    write_mp4(folder / "open.mp4", x264opts="open-gop=1:bframes=3")
    write_mp4(folder / "uneven.mp4", times=[10 * t + 4 * (t % 3) for t in range(40)])
    write_mp4(folder / "stream.ts")
    write_mp4(folder / "matroska.mkv")
    frames = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    iio.imwrite(folder / "even.gif", frames, plugin="pillow", duration=120, loop=0)
    iio.imwrite(folder / "uneven.gif", frames, plugin="pillow", duration=[50, 130] * 10, loop=0)
    return folder


NAMES = ("closed.mp4", "open.mp4", "uneven.mp4", "stream.ts", "matroska.mkv", "even.gif")
NAMES = (*NAMES, "uneven.gif")


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_found_by_seeking_is_cut_from_the_whole_video(name, long_files):
    header = data.read_header(long_files / name)
    for fps, stride in ((0.0, 1), (0.0, 3), (7.0, 1), (25.0, 2)):
        whole = list(read_frames(long_files / name, 8, fps, stride))
        assert header.length(fps, stride) == len(whole)
        for k in range(0, len(whole) - 3, 2):
            clip = read_frames(long_files / name, 8, fps, stride, k, header)
            assert np.array_equal(list(islice(clip, 4)), whole[k : k + 4]), (fps, stride, k)


def test_a_seek_in_a_video_of_an_old_x264_decodes_as_its_beginning_does(tmp_path):
    """ffmpeg reads 4:4:4 of x264 before build 151 in another way; the first packet says the build.

    In cockatoo.mp4 every clip behind the first keyframe was grey and green.
    """
    pictures = noise_pictures(24, 64)
    pictures[:, :, :32] = np.kron(pictures[:, :8, :4], np.ones((8, 8, 1), np.uint8))
    write_mp4(tmp_path / "new.mp4", pictures, pix_fmt="yuv444p", crf="40")
    content = (tmp_path / "new.mp4").read_bytes()
    (tmp_path / "old.mp4").write_bytes(re.sub(rb"x264 - core \d{3}", b"x264 - core 142", content))
    new, old = (list(read_frames(tmp_path / f"{age}.mp4", 64)) for age in ("new", "old"))
    differ = np.flatnonzero(np.not_equal(new, old).any((1, 2, 3)))
    assert max(differ) > GOP, "what is decoded depends on the build, behind the first keyframe, too"

    header = data.read_header(tmp_path / "old.mp4")
    for k in differ:  # not equal to old[k]: ffmpeg conceals what is invalid, from frames before it
        frame = next(read_frames(tmp_path / "old.mp4", 64, start=int(k), header=header))
        assert not np.array_equal(frame, new[k]), k


def test_the_whole_video_is_what_ffmpeg_decodes_and_its_fps_filter_returns(long_files):
    for name in ("closed.mp4", "stream.ts", "uneven.gif"):
        path = long_files / name
        for fps, stride in ((0.0, 2), (7.0, 1)):
            steps = [("fps", str(fps))] if fps else []
            steps += [("scale", "12:8:force_original_aspect_ratio=increase:flags=bilinear")]
            steps += [("format", "rgb24"), ("crop", "12:8")]
            ours = np.stack(list(read_frames(path, (8, 12), fps, stride)))
            theirs = iio.imread(path, plugin="pyav", filter_sequence=steps)[::stride]
            assert np.array_equal(ours, theirs), (name, fps, stride)


def test_a_seek_decodes_at_most_a_group_of_pictures_more(long_files):
    for name in ("closed.mp4", "open.mp4", "uneven.mp4", "matroska.mkv"):
        header = data.read_header(long_files / name)
        for k in range(36):
            with data.open_video(long_files / name) as container:
                numbers = []
                for number, _ in data.numbered_frames(container, 0.0, k, header):
                    numbers.append(number)
                    if number == k + 3:
                        break
            wanted = [number for number in numbers if number >= k]
            assert wanted == [k, k + 1, k + 2, k + 3] and len(numbers) <= 4 + GOP


def test_odd_sizes_are_exact(long_files):
    assert read_video(long_files / "closed.mp4", (7, 9), frames=2).shape == (2, 3, 7, 9)
    assert read_video(long_files / "even.gif", 7, frames=2).shape == (2, 3, 7, 7)


def test_a_video_is_scaled_to_cover_and_cut_to_its_centre(tmp_path):
    wide = np.zeros((4, 16, 48, 3), np.uint8)
    wide[:, :, 16:32] = 255
    iio.imwrite(tmp_path / "wide.gif", wide, plugin="pillow", duration=100)
    assert (read_video(tmp_path / "wide.gif", 16)[:, :, :, 2:-2] > 0.99).all()
    assert read_video(tmp_path / "wide.gif", (16, 48)).mean() < 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
def test_reading_and_writing_leave_no_thread_behind(long_files, tmp_path):
    """The loader forks: a worker would wait for ever for a thread that it has not inherited."""
    before = len(os.listdir("/proc/self/task"))
    data.read_header(long_files / "closed.mp4")
    with data.open_video(long_files / "closed.mp4") as container:
        assert container.streams.video[0].codec_context.thread_count == 1
    video = read_video(long_files / "closed.mp4", 16)
    with writer(tmp_path / "a.mp4") as write:
        write(video)
        assert len(os.listdir("/proc/self/task")) == before


@pytest.fixture(scope="module")
def clips_made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate(("a.mp4", "b.gif", "c.mp4")):
        with writer(folder / name, 10) as write:
            write(Sprites(size=16, frames=14)[i][0])
    with writer(folder / "short.gif", 10) as write:
        write(Sprites(size=16, frames=3)[7][0])
    (folder / "a.txt").write_text("A red Circle, moving")
    (folder / "broken.mp4").write_bytes(b"not a video at all")
    return folder


@pytest.fixture
def clips(clips_made_once, tmp_path):
    """A folder of small videos, one with a caption, one short and one broken."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for path in clips_made_once.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_folder_of_videos_is_read_and_its_bad_files_named(clips, capsys):
    videos = Videos(clips, 16, 8)
    out = capsys.readouterr().out
    assert out.count("broken.mp4") == 1
    assert "skipping 1 of 4 clips, of fewer than 8 frames" in out
    assert [p.name for p in videos.files] == ["a.mp4", "b.gif", "c.mp4"] and videos.fps == 10
    assert videos.words.vocabulary == ["a", "circle", "moving", "red"] and videos.rows == 4
    video, c = videos[0]
    assert video.shape == (8, 3, 16, 16) and c.shape == (4, videos.text_dim)
    assert torch.equal(video, Videos(clips, 16, 8, workers=1)[0][0])
    assert (videos.load(0, 0)[1] != 0).any() and (videos.load(1, 0)[1] == 0).all()


def test_every_file_comes_once_a_round_at_the_start_that_the_seed_draws(clips):
    videos = Videos(clips, 16, 8)
    whole = [read_video(path, 16) for path in videos.files]
    for index in range(6):
        round_, place = divmod(index, 3)
        number = np.random.default_rng([0, round_]).permutation(3)[place]
        start = np.random.default_rng([0, round_, place, 1]).integers(14 - 8 + 1)
        assert torch.equal(videos[index][0], whole[number][start : start + 8])
    other = Videos(clips, 16, 8, seed=1)
    assert any(not torch.equal(videos[i][0], other[i][0]) for i in range(3))


def test_fps_and_stride_reach_the_frames_of_a_folder(clips):
    args = args_for(clips, frames=3, fps=5.0, stride=2, seed=2)
    videos = data.open_data(args)
    assert videos.fps == 2.5 and videos.lengths == [4, 4, 4]
    whole = [read_video(path, 16, fps=5.0, stride=2) for path in videos.files]
    number = np.random.default_rng([2, 0]).permutation(3)[0]
    start = np.random.default_rng([2, 0, 0, 1]).integers(2)
    assert torch.equal(videos[0][0], whole[number][start : start + 3])
    assert len(read_video(clips / "a.mp4", 16, fps=5)) == 7
    assert len(read_video(clips / "a.mp4", 16, stride=3)) == 5


def test_kept_frames_are_decoded_once_and_change_nothing(clips):
    kept, never = Videos(clips, 16, 4), Videos(clips, 16, 4, memory=0)
    for index in range(30):
        assert same(kept[index], never[index])
    assert never.kept == {} and len(kept.kept) == 3
    for path in kept.files:
        path.unlink()
    assert len(kept.load(0, kept.kept[0][1].argmax())[0]) == 4, "from memory"


def test_memory_limits_what_is_kept(clips):
    videos = Videos(clips, 16, 4, memory=2 * 14 * 16 * 16 * 3)
    for index in range(6):
        videos[index]
    assert len(videos.kept) == 2


def test_a_file_that_breaks_later_is_named_once_and_replaced(clips, capsys):
    videos = Videos(clips, 16, 8)
    (clips / "a.mp4").write_bytes(b"gone")
    capsys.readouterr()
    assert all(videos[i][0].shape == (8, 3, 16, 16) for i in range(9))
    assert capsys.readouterr().err.count("a.mp4") == 1, "on stderr, where every rank's is seen"


def test_a_file_shorter_than_its_header_is_named_once_and_replaced(tmp_path, capsys):
    write_mp4(tmp_path / "a.mp4", movflags="faststart")
    write_mp4(tmp_path / "b.mp4", noise_pictures(39, 16))
    with av.open(str(tmp_path / "cut.mp4"), "w", options={"movflags": "faststart"}) as container:
        with av.open(str(tmp_path / "a.mp4")) as source:
            stream = container.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.size:
                    packet.stream = stream
                    container.mux(packet)
    (tmp_path / "a.mp4").unlink()
    whole = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    videos = Videos(tmp_path, 16, 30, memory=0)
    assert videos.lengths == [39, 40], "as the headers say"
    assert all(len(videos[i][0]) == 30 for i in range(8))
    assert capsys.readouterr().err.count("cut.mp4") == 1


def test_a_still_picture_is_named_as_one(clips, capsys):
    iio.imwrite(clips / "still.png", np.zeros((16, 16, 3), np.uint8))
    Videos(clips, 16, 8)
    assert "still.png cannot be read as a video (it is a still picture" in capsys.readouterr().out


def test_a_caption_that_is_no_utf8_is_named(clips, capsys):
    (clips / "b.txt").write_bytes(b"caf\xe9 noir")
    assert [path.name for path in Videos(clips, 16, 8).files] == ["a.mp4", "c.mp4"]
    assert capsys.readouterr().out.count("b.txt is not a text in UTF-8") == 1


def test_only_the_first_process_warns_of_what_all_find(clips, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    Videos(clips, 16, 8)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "frames, message", [(99, "no clip in .* has 99 frames: of 4 the longest has 14, and 1 cannot")]
)
def test_a_folder_without_a_long_clip_is_refused(clips, frames, message):
    with pytest.raises(ValueError, match=message):
        Videos(clips, 16, frames)


# ---- listing


def test_hidden_files_and_folders_are_skipped_and_links_followed_once(tmp_path):
    (tmp_path / "a/.git").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    for name in ("a/1.mp4", "a/.2.mp4", "a/.git/HEAD", "b/3.GIF", "b/notes.txt", "b/4.npz"):
        (tmp_path / name).touch()
    (tmp_path / "a/self").symlink_to(".")
    (tmp_path / "a/up").symlink_to("..")
    (tmp_path / "b/up").symlink_to("..")
    (tmp_path / "b/same.mp4").symlink_to("../a/1.mp4")
    listed = [str(path.relative_to(tmp_path)) for path in data.list_files(tmp_path, "videos")]
    assert listed == ["a/1.mp4", "b/3.GIF"]
    assert [path.name for path in data.list_files(tmp_path, "latents")] == ["4.npz"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c/linked").symlink_to(tmp_path / "a")
    assert [path.name for path in data.list_files(tmp_path / "c", "videos")] == ["1.mp4", "3.GIF"]
    with pytest.raises(ValueError, match="nowhere is not a folder.*sprites"):
        data.list_files(tmp_path / "nowhere", "videos")
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="d holds no videos"):
        data.list_files(tmp_path / "d", "videos")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes in folders")
def test_a_named_pipe_is_not_listed_and_a_dangling_link_is(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    assert [path.name for path in data.list_files(tmp_path, "videos")] == ["gone.mp4"]


def test_a_stray_npz_does_not_turn_videos_into_latents(clips, capsys):
    np.savez(clips / "stats.npz", mean=np.zeros(3))
    (clips / "bad.npz").write_text("no zip")
    assert isinstance(data.open_data(args_for(clips)), Videos)
    assert (
        "reading the videos, as none of the 2 .npz files holds latents" in capsys.readouterr().out
    )
    np.savez(clips / "z.npz", latents=np.zeros((4, 4, 2, 2)))
    assert isinstance(data.open_data(args_for(clips)), Latents)
    assert "reading the latents" in capsys.readouterr().out


def test_open_data_names_what_is_wrong_with_npz_files(tmp_path):
    save_latents(tmp_path / "keys", pictures=np.zeros((4, 3, 8, 8)))
    with pytest.raises(ValueError, match="keys/0.npz holds .*wanted `latents`"):
        data.open_data(args_for(tmp_path / "keys"))
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/0.npz").write_text("no zip")
    with pytest.raises(ValueError, match="fake/0.npz is not a readable .npz"):
        data.open_data(args_for(tmp_path / "fake"))
    save_latents(tmp_path / "mixed", latents=np.zeros((4, 3, 8, 8)))
    save_latents(tmp_path / "mixed", latents=np.zeros((4, 5, 8, 8)))
    with pytest.raises(ValueError, match="mixed/1.npz holds latents .*same channels"):
        data.open_data(args_for(tmp_path / "mixed"))


# ---- latents


def test_latents_come_as_random_clips_with_padded_text(tmp_path):
    for i in range(3):
        values = np.random.default_rng(i).normal(size=(6 + i, 4, 4, 8)).astype(np.float16)
        save_latents(tmp_path, latents=values, text=np.full((2 + i, 7), i + 1, np.float16))
    latents = data.open_data(args_for(tmp_path, frames=6, seed=5))
    assert (latents.channels, latents.size, latents.text_dim, latents.rows) == (4, (4, 8), 7, 4)
    assert latents.words is None and latents.fps == 4
    for index in range(6):
        round_, place = divmod(index, 3)
        number = np.random.default_rng([5, round_]).permutation(3)[place]
        start = np.random.default_rng([5, round_, place, 1]).integers(number + 1)
        video, c = latents[index]
        whole = np.load(tmp_path / f"{number}.npz")["latents"].astype(np.float32)
        assert torch.equal(video, torch.from_numpy(whole[start : start + 6]))
        assert (c[: 2 + number] == number + 1).all() and (c[2 + number :] == 0).all()
        assert c.shape == (4, 7) and video.dtype == torch.float32


def test_latents_that_cannot_be_read_are_named_once_and_replaced(tmp_path, capsys):
    ones = np.ones((6, 4, 8, 8))
    for values in (
        ones,
        np.full_like(ones, np.nan),
        np.full(ones.shape, "word"),
        ones.astype(">f4"),
    ):
        save_latents(tmp_path, latents=values)
    save_latents(tmp_path, latents=np.random.default_rng(0).normal(size=ones.shape))
    path = tmp_path / "4.npz"
    path.write_bytes(path.read_bytes()[:3000] + bytes(100) + path.read_bytes()[3100:])
    (tmp_path / "5.npz").write_bytes((tmp_path / "0.npz").read_bytes()[:-100])
    latents = Latents(tmp_path, 6)
    assert all((latents[i][0] == 1).all() for i in range(15))
    captured = capsys.readouterr()
    out = captured.out + captured.err
    assert [out.count(f"{i}.npz") for i in range(6)] == [0, 1, 1, 0, 1, 1]
    assert "contains NaN or inf" in out and "5.npz is not a readable .npz" in out


def test_latents_whose_header_promises_too_much_are_named_and_skipped(tmp_path, capsys):
    save_latents(tmp_path, latents=np.ones((6, 4, 8, 8)))
    with (
        zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive,
        archive.open("latents.npy", "w") as file,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 4, 8, 8)}
        np.lib.format.write_array_header_1_0(file, header)
    latents = Latents(tmp_path, 6)
    assert len(latents.files) == 1 and latents[0][0].shape == (6, 4, 8, 8)
    assert "lie.npz is not a readable .npz file" in capsys.readouterr().out


# ---- writing


@pytest.mark.parametrize("name", ("a.mp4", "a.MP4", "a.gif", "a.GIF"))
def test_a_video_comes_back_as_written(name, tmp_path):
    video = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 16, 24)
    with writer(tmp_path / "new" / name, 5) as write:
        write(video[:2])
        (part,) = (tmp_path / "new").iterdir()
        assert part.name == f".a.{os.getpid()}.{name[2:]}", "no other process has this one"
        write(video[2:])
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    read = read_video(tmp_path / "new" / name, (16, 24))
    assert read.shape == video.shape and (read - video).abs().max() < 0.05
    assert data.read_header(tmp_path / "new" / name).rate == 5


def test_a_video_that_fails_leaves_the_one_before(tmp_path):
    for name in ("a.mp4", "a.gif"):
        (tmp_path / name).write_text("before")
        with pytest.raises(KeyError), writer(tmp_path / name) as write:
            write(torch.zeros(1, 3, 16, 16))
            raise KeyError
        assert (tmp_path / name).read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ("a.mp4", "a.gif"))
def test_a_write_that_fails_leaves_no_file(name, tmp_path):
    with pytest.raises(ZeroDivisionError), writer(tmp_path / name) as write:
        write(torch.zeros(2, 3, 8, 8))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_hidden_file_of_the_user_survives_a_video_of_its_name(tmp_path):
    for name in (".a.mp4", ".a.gif", ".a.npz", ".a.png"):
        (tmp_path / name).write_text("mine")
    for name in ("a.mp4", "a.gif"):
        with writer(tmp_path / name) as write:
            write(torch.zeros(2, 3, 16, 16))
    data.save_arrays(tmp_path / "a.npz", x=np.zeros(3))
    data.write_picture(tmp_path / "a.png", np.zeros((4, 5, 3), np.uint8))
    assert iio.imread(tmp_path / "a.png").shape == (4, 5, 3)
    assert [path.read_text() for path in tmp_path.glob(".a.*")] == ["mine"] * 4


@pytest.mark.parametrize("name", ("a.mp4", "a.gif", "a.npz", "a.png", "a.jpg"))
def test_a_full_disk_is_one_line_and_leaves_nothing(name, tmp_path):
    resource = pytest.importorskip("resource", reason="Windows limits no file's size")
    pictures = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(ValueError, match=f"^cannot write .*/{name}: File too large$"):
            if name == "a.npz":
                data.save_arrays(tmp_path / name, x=pictures)
            elif name in ("a.png", "a.jpg"):
                data.write_picture(tmp_path / name, pictures[0])
            else:
                with writer(tmp_path / name) as write:
                    write(pictures)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_video_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "b.mp4").mkdir()
    for path, message in (
        (tmp_path / "file/a.mp4", "cannot write .*a.mp4: (Not a directory|File exists)"),
        (tmp_path / "b.mp4", "cannot write .*b.mp4: it is a folder"),
        (tmp_path / "new/a.avi", "a.avi: videos are written as .mp4 or .gif"),
    ):
        with pytest.raises(ValueError, match=message), writer(path):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.mp4", "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot write .*: Permission denied"):
        with writer(tmp_path / "a.mp4"):
            pass


def test_pixels_and_small_helpers():
    video = torch.tensor([-2.0, -1, 0, 1]).view(1, 1, 1, 4).expand(2, 3, 1, 4)
    assert data.to_bytes(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255]
    clip = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    assert np.array_equal(data.to_bytes(data.to_float(clip)), clip)
    assert data.enlarge(np.zeros((2, 16, 8, 3), np.uint8)).shape == (2, 128, 64, 3)
    assert [data.round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_sizes_are_parsed():
    assert data.parse_size("64") == 64 and data.parse_size("480x832") == (480, 832)
    assert data.parse_size("8192x8192") == (8192, 8192)
    for text in ("0", "0x8", "8x", "x8", "1.5", "-3", "8193", "16x100000", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=f"got {text}, wanted"):
            data.parse_size(text)


# ---- Wan and encode


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size", "40x64"], "--size 40x64.*48x64 would work"),
        (["--size", "100000"], "got 100000, wanted at most 8192"),
        (["--frames", "80"], "--frames 80.*81 would work"),
        (["--frames", "-3"], "--frames -3.*1 would work"),
        (["--fps", "0"], "--fps 0.0"),
        (["--fps", "nan"], "--fps nan"),
        (["--device", "nope"], "--device: invalid choice: 'nope' .*cpu"),
        (["--frames", "many"], "--frames: invalid int value: 'many'"),
    ],
)
def test_bad_flags_of_encode_are_one_line(flags, message, tmp_path, capsys, monkeypatch):
    argv = ["encode", str(tmp_path), str(tmp_path / "out"), "--wan", "wan", *flags]
    with pytest.raises(ValueError, match=message):
        data.parse(argv)
    assert data.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert data.main(argv) == 0, "torchrun answers any other status with a traceback"
        assert capsys.readouterr().err.count("\n") == lines


class ZeroWan:
    """Encode every clip to zeros, as data.Wan does it to latents."""

    def __init__(self, path, device):
        pass

    def encode(self, video):
        return torch.zeros(1, (video.shape[1] + 3) // 4, 16, 2, 2)

    def text(self, prompts):
        return torch.zeros(len(prompts), 512, 4)


def test_under_torchrun_the_videos_are_divided(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "Wan", ZeroWan)
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["encode", str(clips), str(tmp_path / "out"), "--wan", "wan", "--device", "cpu"]
    written = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        before = set((tmp_path / "out").glob("*"))
        data.main([*argv, "--size", "16", "--frames", "13"])
        written.append(sorted(path.name for path in set((tmp_path / "out").glob("*")) - before))
    assert written == [["a.mp4-0000.npz"], ["b.gif-0000.npz", "c.mp4-0000.npz"]]
    assert Latents(tmp_path / "out", 4).rows == 512


def encode_argv(clips, out):
    argv = ["encode", str(clips), str(out), "--wan", "wan", "--device", "cpu"]
    return [*argv, "--size", "16", "--frames", "13"]


def test_damaged_latents_are_encoded_anew(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "Wan", ZeroWan)
    argv = encode_argv(clips, tmp_path / "out")
    assert data.main(argv) == 0
    files = sorted((tmp_path / "out").iterdir())
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-100])
    files[1].write_bytes(whole[:2000] + b"changed" + whole[2007:])
    before = files[2].stat().st_mtime_ns
    assert data.main(argv) == 0
    assert [len(Latents(tmp_path / "out", 4)[i][0]) for i in range(3)] == [4, 4, 4]
    assert files[0].stat().st_size == len(whole) and files[2].stat().st_mtime_ns == before
    assert "is there already" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused_before_wan_is_loaded(clips, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert data.main(encode_argv(clips, tmp_path / "file")) == 2
    assert f"data.py: cannot write to {tmp_path}/file: File exists" in capsys.readouterr().err


@pytest.mark.parametrize("rank", (None, "0"))
def test_encode_ends_with_the_status_of_its_docstring(rank, clips, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(data, "Wan", interrupted)
    assert data.main(encode_argv(clips, tmp_path / "out")) == (130 if rank is None else 0)
    monkeypatch.setattr(data, "Wan", ZeroWan)
    assert data.main([*encode_argv(clips, tmp_path / "out")[:-1], "97"]) == 2
    assert "none of 5 videos" in capsys.readouterr().err


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
def test_videos_become_latents_and_finished_ones_are_kept(wan_folder, tmp_path, capsys):
    for name, frames in (("long", 20), ("short", 5)):
        with writer(tmp_path / "clips" / f"{name}.mp4", 16) as write:
            write(torch.rand(frames, 3, 48, 72) * 2 - 1)
    (tmp_path / "clips/long.txt").write_text("a red boat")
    (tmp_path / "clips/bad.mp4").write_text("no video")
    flags = ["encode", str(tmp_path / "clips"), str(tmp_path / "latents"), "--wan", str(wan_folder)]
    flags += ["--device", "cpu", "--size", "32x48", "--frames", "9"]
    assert data.main(flags) == 0
    out = capsys.readouterr().out
    assert "bad.mp4 cannot be read" in out
    assert "short.mp4 has 5 frames; wanted at least --frames 9" in out
    files = sorted((tmp_path / "latents").iterdir())
    assert [file.name for file in files] == ["long.mp4-0000.npz", "long.mp4-0001.npz"]

    files[0].unlink()
    before = files[1].stat().st_mtime_ns
    data.encode_folder(data.parse(flags))
    assert files[0].exists() and files[1].stat().st_mtime_ns == before
    assert data.main([*flags[:-1], "13"]) == 2, "none can be encoded"
    assert "long.mp4-0000.npz is there already, of another --frames" in capsys.readouterr().out

    with np.load(files[0]) as file:
        assert file["latents"].shape == (3, 16, 4, 6) and file["text"].shape == (512, 32)
        assert abs(file["text"][:4]).sum() > 0 and not file["text"][4:].any()
    wan = data.Wan(wan_folder)
    clip = read_video(tmp_path / "clips/long.mp4", (32, 48), fps=16, frames=18)[9:]
    expected = wan.encode(clip[None])[0].half().float()
    assert torch.equal(torch.from_numpy(np.float32(np.load(files[1])["latents"])), expected)


@pytest.mark.extras
def test_latents_train_a_model_that_makes_videos(wan_folder, tmp_path, capsys):
    with writer(tmp_path / "clips/long.mp4", 16) as write:
        write(torch.rand(20, 3, 48, 72) * 2 - 1)
    (tmp_path / "clips/long.txt").write_text("a red boat")
    flags = ["encode", str(tmp_path / "clips"), str(tmp_path / "latents"), "--wan", str(wan_folder)]
    data.main([*flags, "--device", "cpu", "--size", "32x48", "--frames", "9"])

    run, out = str(tmp_path / "run"), tmp_path / "out.mp4"
    flags = ["--data", str(tmp_path / "latents"), "--out", run, "--device", "cpu", "--batch", "2"]
    flags += ["--frames", "3", "--patch", "2", "--dim", "64", "--layers", "1", "--steps", "2"]
    train.main([*flags, "--warmup", "1", "--sample-steps", "1", "--guidance", "1"])

    flags = ["a red boat", "--checkpoint", run, "--frames", "4", "--steps", "1", "--device", "cpu"]
    given = ["--given", str(tmp_path / "clips/long.mp4"), "--given-frames", "5"]
    sample.main([*flags, "--wan", str(wan_folder), *given, "--out", str(out)])
    assert "with the VAE's decoding" in capsys.readouterr().out
    assert len(read_video(out, 16)) == 13, "two latents given and two made: 4 n - 3 frames"
    with pytest.raises(ValueError, match="--wan PATH"):
        sample.main(flags)


@pytest.mark.extras
def test_decoding_latents_one_by_one_is_decoding_all_at_once(wan_folder):
    wan = data.Wan(wan_folder)
    torch.manual_seed(0)
    video = torch.rand(1, 9, 3, 32, 48) * 2 - 1
    latents = wan.encode(video)
    one, several = wan.decoder(), wan.decoder()
    assert latents.shape == (1, 3, 16, 4, 6) and one(latents).shape == video.shape
    parts = [several(latents[:, :1]), several(latents[:, 1:])]
    whole = wan.pipe.vae.decode(latents.transpose(1, 2) * wan.std + wan.mean).sample
    assert [part.shape[1] for part in parts] == [1, 8]
    assert (torch.cat(parts, 1) - whole.transpose(1, 2).clamp(-1, 1)).abs().max() < 1e-5


@pytest.mark.extras
def test_a_folder_that_is_no_wan_is_named(wan_folder, tmp_path):
    with pytest.raises(ValueError, match="holds no model_index.json"):
        data.Wan(tmp_path)


# ---- train.py ----


TINY = "--size 8 --frames 4 --patch 4 --dim 48 --heads 2 --layers 1 --batch 2 --sample-steps 1"
TINY = [*TINY.split(), "--lr-warmup", "2", "--device", "cpu"]
TINY_CONFIG = Config(dim=48, ffn_dim=192, heads=2, layers=1, predict="x")


def checkpoint_of(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def logged(folder, name="loss"):
    return [entry[name] for entry in log_of(folder) if name in entry]


def run_train(folder, *flags):
    train.main([*TINY, "--out", str(folder), *map(str, flags)])
    return checkpoint_of(folder)


def start(*command, cwd):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    command = [sys.executable, *map(str, command)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=cwd, env=env, text=True, stdout=pipe, stderr=subprocess.STDOUT
    )


def torchrun(*flags, cwd):
    """Run train.py in two processes. Returns (exit status, output)."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(*launcher, HERE / "train.py", *flags, cwd=cwd)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


@pytest.fixture
def quick(monkeypatch):
    """Leave out pictures and the final report, which most tests of training do not need."""
    monkeypatch.setattr(train, "log_samples", lambda *_: None)
    monkeypatch.setattr(train, "report", lambda *_: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps, the first one teacher forcing, and the lines it printed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with open(folder.with_name("out.txt"), "w") as out, redirect_stdout(out):
        run_train(folder, "--steps", 3, "--warmup", 1, "--sample-every", 2)
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of `trained` that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


# the loop


def by_hand(config, muon, steps, warmup, batch, shift, euler, time_shift, drop, clip, decay, lr):
    """Algorithm 1 for a network, clip by clip and without a cache. Returns (net, average,
    losses, norms)."""
    torch.manual_seed(0)
    net = CausalDiT(config)
    average = {name: p.detach().clone() for name, p in net.named_parameters()}
    matrices = {name: p for name, p in net.named_parameters() if p.dim() == 2}
    rest = [p for name, p in net.named_parameters() if p.dim() != 2]
    of_blocks = {name: matrices.pop(name) for name in list(matrices) if muon and "blocks" in name}
    momentum = dict.fromkeys(of_blocks, 0)
    optimizers = [
        torch.optim.AdamW(matrices.values(), betas=(0.9, 0.95), weight_decay=0.01),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0),
    ]
    data, losses, norms = Sprites(8, 4), [], []

    for step in range(steps):
        loss = 0
        for index in range(step * batch, (step + 1) * batch):
            key = np.random.SeedSequence([0, index]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(key))
            x, c = (z[None] for z in data[index])
            if torch.rand((), generator=generator) < drop:
                c = torch.zeros_like(c)

            history = x[:, :-1]
            if step >= warmup:
                history = resampled(net, history, c, shift, euler, generator)

            t = torch.sigmoid(torch.randn(1, 4, generator=generator))
            t = time_shift * t / (1 + (time_shift - 1) * t)
            eps = torch.randn(x.shape, generator=generator)
            level = t[:, :, None, None, None]
            v = net((1 - level) * x + level * eps, t, c, history)
            loss = loss + ((eps - x - v) ** 2).mean() / batch

        net.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in net.parameters()]).sum().sqrt()
        for p in net.parameters():
            p.grad *= min(1, clip / norm.item())
        rising = min(1, (step + 1) / 2)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * rising
            optimizer.step()
        for name, p in of_blocks.items():
            momentum[name] = 0.95 * momentum[name] + 0.05 * p.grad
            update = newton_schulz(0.95 * momentum[name] + 0.05 * p.grad)
            p.data *= 1 - muon * rising * 0.01
            p.data -= muon * rising * 0.2 * max(p.shape) ** 0.5 * update
        share = min(decay, (1 + step) / (10 + step))
        for name, p in net.named_parameters():
            average[name] = share * average[name] + (1 - share) * p.detach()
        losses.append(loss.item())
        norms.append(norm.item())
    return net, average, losses, norms


def newton_schulz(matrix):
    """Muon's five iterations, of a polynomial that acts on the singular values alone."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm().clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u * s @ v


@torch.no_grad()
def resampled(net, x, c, shift, euler, generator):
    """Algorithm 1, lines 2-9, each frame on all those before it, computed anew."""
    t_s = torch.sigmoid(torch.randn((), generator=generator))
    t_s = shift * t_s / (1 + (shift - 1) * t_s)
    frames = (1 - t_s) * x + t_s * torch.randn(x.shape, generator=generator)
    for i in range(x.shape[1]):
        for k in range(euler):
            t = t_s * (euler - k) / euler
            v = net(frames[:, [i]], t.expand(1, 1), c, frames[:, :i], first=i)
            frames[:, [i]] = frames[:, [i]] - t_s / euler * v
    return frames


@pytest.mark.parametrize(
    "predict, detail, muon, clip",
    [("v", {}, None, 0.62), ("x", {"detail": 8, "detail_frames": 2}, 0.002, 1.9)],
)
def test_the_loop_is_algorithm_1(predict, detail, muon, clip, tmp_path, quick):
    flags = "--steps 4 --warmup 2 --batch 4 --accumulate 2 --shift 0.3 --resample-steps 2"
    flags += f" --time-shift 3 --drop 0.5 --clip {clip} --ema 0.2 --lr 0.003 --decay constant"
    flags += f" --predict {predict}"
    for name, size in detail.items():
        flags += f" --{name.replace('_', '-')} {size}"
    flags += " --optimizer " + (f"muon --muon-lr {muon}" if muon else "adamw")
    state = run_train(tmp_path / "run", *flags.split())
    settings = (4, 2, 4, 0.3, 2, 3, 0.5, clip, 0.2, 0.003)
    config = replace(TINY_CONFIG, predict=predict, **detail)
    net, average, losses, norms = by_hand(config, muon, *settings)

    assert np.allclose(logged(tmp_path / "run"), losses, atol=1e-5)
    assert np.allclose(logged(tmp_path / "run", "norm"), norms, atol=1e-4)
    assert min(norms) < clip < max(norms), "clipping acts on some of the steps"
    for name, p in net.named_parameters():
        assert close(state["model"][name], p.detach(), 1e-5), name
        assert close(state["ema"][name], average[name], 1e-5), name


def test_a_clip_draws_the_same_noise_in_any_batch():
    alone, both = train.ClipNoise(3, [9], "cpu"), train.ClipNoise(3, range(8, 10), "cpu")
    for draw in ("rand", "randn", "randn"):
        a, b = getattr(alone, draw)(1, 5, 4), getattr(both, draw)(2, 5, 4)
        assert torch.equal(a[0], b[1]) and not torch.equal(b[0], b[1])
        assert draw == "randn" or 0 <= b.min() < b.max() < 1
    one, other = (train.ClipNoise(seed, [9], "cpu").rand(1, 3) for seed in (3, 4))
    assert not torch.equal(one, other)


def test_the_warm_up_ends_at_its_step_and_the_share_is_a_share():
    args = train.parse(["--warmup", "5", "--history", "noise"])
    teacher = [train.history_at(step, args) is HISTORY["teacher"] for step in range(8)]
    assert teacher == [True] * 5 + [False] * 3

    args = train.parse(["--warmup", "0", "--resample-share", "0.25"])
    used = sum(train.history_at(step, args) is HISTORY["resample"] for step in range(2000))
    assert 0.2 < used / 2000 < 0.3


def test_the_learning_rate_rises_then_falls_to_0():
    rates = {}
    for decay in ("constant", "linear", "cosine"):
        flags = ["--lr", "8", "--lr-warmup", "4", "--steps", "12", "--decay", decay]
        args = train.parse(flags)
        rates[decay] = [train.learning_rate(step, args) for step in (0, 1, 3, 4, 6, 8, 10, 12)]
    assert rates["constant"] == [2, 4, 8, 8, 8, 8, 8, 8]
    assert rates["linear"] == [2, 4, 8, 8, 6, 4, 2, 0]
    half = 4 * 2**0.5 / 2
    assert np.allclose(rates["cosine"], [2, 4, 8, 8, 4 + half, 4, 4 - half, 0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_on_matrices_only(optimizer):
    net = CausalDiT(Config(dim=24, ffn_dim=48, heads=2, layers=1))
    for p in net.parameters():
        torch.nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    args = train.parse(["--lr", "1", "--muon-lr", "1", "--lr-warmup", "0"])
    optimizers = train.make_optimizers(net, optimizer)
    train.set_learning_rate(optimizers, 0, args)
    for part in optimizers:
        part.step()
    for name, p in net.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        assert torch.equal(p, torch.full_like(p, 0.99 if matrix else 1)), name


def test_muon_gets_the_matrices_of_the_blocks_and_no_others():
    net = CausalDiT(Config(dim=24, ffn_dim=48, heads=2, layers=2))
    names = {p: name for name, p in net.named_parameters()}
    adamw, muon = train.make_optimizers(net, "muon")
    given = [names[p] for group in muon.param_groups for p in group["params"]]
    others = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert len(given) == 2 * 10 and sorted(given + others) == sorted(names.values())
    assert all(name.startswith("blocks.") and name.endswith("weight") for name in given)
    assert not any(
        name.startswith("blocks.") and net.get_parameter(name).dim() == 2 for name in others
    )
    (only,) = train.make_optimizers(net, "adamw")
    assert sum(len(group["params"]) for group in only.param_groups) == len(names)


@pytest.mark.parametrize("rows, columns", [(24, 24), (12, 30), (30, 12)])
def test_muon_is_torch_s_in_float32(rows, columns):
    """torch's iterates in bfloat16, which has three digits."""
    torch.manual_seed(0)
    ours, torch_s = (torch.nn.Parameter(torch.ones(rows, columns)) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.3}
    optimizers = (
        train.Muon([ours], **settings),
        torch.optim.Muon([torch_s], **settings, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        ours.grad = torch.randn(rows, columns)
        torch_s.grad = ours.grad.clone()
        before = ours.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
        moved = (ours - before).norm()
        assert 1e-5 * moved < (ours - torch_s).norm() < 0.02 * moved


def test_muon_orthogonalizes_exactly_in_the_precision_of_the_gradient():
    torch.manual_seed(0)
    muon = train.Muon([torch.nn.Parameter(torch.ones(1, 1))], lr=1, weight_decay=0)
    for shape in ((20, 20), (8, 30), (30, 8)):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            matrix = torch.randn(shape, dtype=dtype)
            z = train.orthogonalize(matrix, muon.defaults["ns_coefficients"], 5)
            assert z.dtype == dtype and close(z, newton_schulz(matrix), tolerance)
            assert ((torch.linalg.svdvals(z) - 0.95).abs() < 0.3).all()


def test_both_optimizers_follow_one_curve():
    flags = ["--lr", "8", "--muon-lr", "2", "--lr-warmup", "4", "--steps", "12"]
    args = train.parse(flags)
    net = CausalDiT(Config(dim=24, ffn_dim=48, heads=2, layers=1))
    adamw, muon = train.make_optimizers(net, "muon")
    for step, rate in ((0, 2), (3, 8), (8, 4)):
        train.set_learning_rate([adamw, muon], step, args)
        assert [group["lr"] for group in adamw.param_groups] == [rate, rate]
        assert [group["lr"] for group in muon.param_groups] == [rate / 4]


def test_the_average_keeps_its_decay_and_forgets_the_first_weights():
    ema, net = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    for step, decay, kept in ((10**6, 0.9, 0.9), (0, 0.9, 0.1), (8, 0.9, 0.5)):
        torch.nn.init.ones_(ema.weight)
        torch.nn.init.zeros_(net.weight)
        train.update_ema(ema, net, decay, step)
        assert abs(ema.weight.item() - kept) < 1e-6 and net.weight.item() == 0


def test_clipping_bounds_the_gradient(tmp_path, quick):
    """Adam hides the scale of a gradient, but not one far below its epsilon, 1e-8."""
    torch.manual_seed(0)
    net = CausalDiT(TINY_CONFIG)
    for clip, moved in ((1e-12, False), (1, True)):
        flags = ["--steps", 2, "--lr", 1e-3, "--clip", clip]
        state = run_train(tmp_path / str(clip), *flags)["model"]
        bias = state["head.head.bias"] - net.head.head.bias
        assert (bias.abs().max().item() > 1e-5) == moved
    assert logged(tmp_path / "1e-12", "norm")[0] == logged(tmp_path / "1", "norm")[0] > 0.1


def test_the_history_is_redrawn_under_the_text_of_the_loss(tmp_path, monkeypatch, quick):
    texts = []

    def record(model, x, c, **_):
        texts.append(c)
        return x

    def loss(model, x, c, *_):
        texts.append(c)
        return flow_matching_loss(model, x, c, x[:, :-1])

    monkeypatch.setitem(train.HISTORY, "resample", record)
    monkeypatch.setattr(train, "flow_matching_loss", loss)
    run_train(tmp_path / "run", "--steps", 1, "--warmup", 0, "--batch", 16, "--drop", 0.5)
    assert torch.equal(*texts) and 0 < (texts[0] != 0).any(2).any(1).sum() < 16


def test_dropping_every_text_is_training_without_captions(tmp_path, quick):
    for name, flags in {
        "dropped": ["--drop", 1],
        "withheld": ["--drop", 0, "--withheld", 1],
        "told": ["--drop", 0],
    }.items():
        run_train(tmp_path / name, "--steps", 3, *flags)
    dropped, withheld, told = (logged(tmp_path / name) for name in ("dropped", "withheld", "told"))
    assert dropped == withheld and dropped[2] != told[2]


@pytest.mark.parametrize("history", ["noise", "resample"])
def test_noise_on_the_history_does_not_count_as_motion(history, tmp_path, quick, monkeypatch):
    calls = []

    def loss(model, x, c, seen, time_shift, rng, motion, past):
        calls.append((x[:, :-1], seen, past))
        return flow_matching_loss(model, x, c, seen, time_shift, rng, motion, past)

    monkeypatch.setattr(train, "flow_matching_loss", loss)
    run_train(tmp_path / "run", "--motion", 4, "--history", history, "--steps", 1, "--warmup", 0)
    (clean, seen, past), *_ = calls
    assert not torch.equal(seen, clean)
    assert torch.equal(past, clean if history == "noise" else seen)


def test_motion_weighs_the_training_loss_alone(tmp_path, quick):
    flags = {"plain": [], "none": ["--motion", 0], "motion": ["--motion", 4]}
    for name, given in flags.items():
        run_train(tmp_path / name, "--steps", 3, *given)
    plain, none, motion = (logged(tmp_path / name) for name in flags)
    assert plain == none and plain[0] != motion[0]


def trained_alike(one, other):
    """Whether two runs logged the same to 1e-4, and each weight of one is where that of the other
    is, to a thousandth of how far it has moved: a norm would not notice what hardly moves."""
    for name in ("loss", "norm"):
        assert np.allclose(logged(one, name), logged(other, name), atol=1e-4), name
    one, other = checkpoint_of(one), checkpoint_of(other)
    torch.manual_seed(0)
    start = CausalDiT(Config(**one["config"])).state_dict()
    for part in ("model", "ema"):
        for key, value in one[part].items():
            apart, moved = (value - other[part][key]).norm(), (value - start[key]).norm()
            assert moved > 0 and apart <= 1e-3 * moved, (part, key)
    return True


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_are_one_batch(optimizer, tmp_path, quick):
    """Adam hides the scale of a gradient, so compare its norm too."""
    for parts in (1, 2, 4):
        flags = ["--steps", 3, "--warmup", 1, "--batch", 4, "--accumulate", parts, "--lr", 1e-3]
        run_train(tmp_path / str(parts), *flags, "--muon-lr", 1e-3, "--optimizer", optimizer)
    for parts in "24":
        assert trained_alike(tmp_path / "1", tmp_path / parts)


@pytest.mark.parametrize(
    "flags",
    [
        ["--time-shift", 5],
        ["--shift", 3],
        ["--resample-steps", 3],
        ["--resample-given", 1],
        ["--resample-share", 0],
        ["--clip", 0.01],
        ["--lr", 1e-3],
        ["--muon-lr", 1e-3],
        ["--optimizer", "adamw"],
        ["--predict", "v"],
        ["--history", "noise"],
        ["--history", "noise", "--noise", 0],
        ["--history", "parallel"],
        ["--history", "parallel", "--resample-steps", 2],
        ["--history", "parallel", "--resample-given", 1],
        ["--history", "teacher"],
        ["--top-k", 1],
        ["--window", 1],
        ["--seed", 1],
        ["--precision", "bf16"],
    ],
)
def test_every_flag_of_the_method_changes_the_losses(flags, trained, tmp_path, quick):
    run_train(tmp_path / "run", "--steps", 3, "--warmup", 1, *flags)
    losses, usual = logged(tmp_path / "run"), logged(trained)
    if flags[0] not in ("--seed", "--precision", "--predict", "--time-shift"):
        assert losses[0] == usual[0], "a new network returns x = 0 under the same noise"
    assert np.isfinite(losses).all() and losses[2] != usual[2]
    assert losses[2] < 1.2 * losses[0]


@pytest.mark.parametrize(
    "flags", [["--recompute"], ["--resample-share", 1, "--save-every", 1], ["--guidance", 1]]
)
def test_what_only_saves_memory_or_looks_changes_no_loss(flags, trained, tmp_path, quick):
    run_train(tmp_path / "run", "--steps", 3, "--warmup", 1, *flags)
    assert logged(tmp_path / "run") == logged(trained)


def test_recompute_reaches_the_network():
    config = Config(dim=24, ffn_dim=48, heads=2, layers=1)
    for flags in ([], ["--recompute"]):
        net = train.build(train.parse(flags), config, "cpu")[0]
        assert net.recompute == bool(flags)


def test_the_noise_of_the_history_has_its_level(tmp_path, quick):
    for noise in (0, 1):
        flags = ["--steps", 3, "--warmup", 1, "--history", "noise", "--noise", noise]
        run_train(tmp_path / str(noise), *flags)
    assert logged(tmp_path / "0")[2] != logged(tmp_path / "1")[2]


def test_one_batch_of_every_data_shape_trains(tmp_path, quick):
    """A chunk is folded into channels; the wall and other sizes make other clips."""
    usual = run_train(tmp_path / "usual", "--steps", 2)["config"]
    for name, flags, changed in (
        ("chunk", ["--frames", 12, "--chunk", 3], {"chunk": 3}),
        ("small", ["--patch", 2, "--wall", "--objects", 1], {"patch": 2}),
        ("wide", ["--dim", 72], {"dim": 72, "ffn_dim": 288}),
    ):
        assert run_train(tmp_path / name, "--steps", 2, *flags)["config"] == usual | changed
        assert logged(tmp_path / name)[0] > 1, "an empty network's loss is the variance of eps - x"


def test_one_frame_trains_a_bidirectional_teacher(tmp_path):
    """--chunk as long as the clip: one frame, no history."""
    flags = ["--steps", 2, "--chunk", 4, "--frames", 4]
    with pytest.raises(ValueError, match="--frames 4: wanted two or more chunks of 4.*teacher"):
        run_train(tmp_path / "run", *flags)
    state = run_train(tmp_path / "run", *flags, "--history", "teacher")
    assert state["config"]["chunk"] == 4 and len(logged(tmp_path / "run")) == 2
    assert len(iio.imread(tmp_path / "run/samples/final.gif")) == 4


# what a run leaves


def test_a_run_leaves_what_design_says(trained):
    assert checkpoint_of(trained)["step"] == 3
    assert json.loads((trained / "config.json").read_text())["history"] == "resample"
    assert logged(trained, "history") == ["teacher_history"] + 2 * ["resample_history"]
    assert len(logged(trained)) == 3 and [e["step"] for e in log_of(trained) if "loss" in e] == [
        1,
        2,
        3,
    ]
    assert [e["step"] for e in log_of(trained) if "held_out_loss" in e] == [2, 3]
    assert np.allclose(logged(trained, "lr"), [0.0035, 0.007, 0.007])
    for name in ("step_000002.gif", "step_000002.png", "final.gif", "final.png"):
        assert (trained / "samples" / name).stat().st_size > 100
    assert iio.imread(trained / "samples/final.gif").shape[0] == 16

    out = trained.with_name("out.txt").read_text()
    assert "FLOPs per teacher-forcing step" in out and "Temporal" in out and "0-15" in out
    assert "median step: teacher" in out and ", resample " in out


def test_a_checkpoint_knows_the_run(trained):
    run = checkpoint_of(trained)["args"]
    assert (run["data"], run["size"], run["height"], run["width"]) == ("sprites", 8, 8, 8)
    assert (run["frames"], run["rate"], run["stride"], run["fps"]) == (4, 8, 1, 0)
    assert run["words"] == [Sprites().words.vocabulary, Sprites().words.rows]
    assert {"objects", "wall", "withheld", "seed"} < run.keys()


def test_the_report_is_what_eval_measures(copied):
    measured = json.loads((copied / "samples/eval.json").read_text())["frames"]
    assert np.shape(measured) == (16, 3)
    flags = "--eval --videos 16 --frames 16 --steps 1 --guidance 1.5 --device cpu"
    sample.main([*flags.split(), "--checkpoint", str(copied), "--out", str(copied / "again.gif")])
    again = json.loads((copied / "samples/eval.json").read_text())["frames"]
    assert np.array_equal(measured, again, equal_nan=True)


@pytest.mark.parametrize(
    "window, chunk, frames, wanted",
    [(None, 1, 10, 9), (None, 3, 12, 3), (3, 1, 10, 4), (20, 1, 10, 9), (1, 1, 2, 1)],
)
def test_pictures_have_the_window_of_training(window, chunk, frames, wanted, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "continue_video", lambda *_, **options: calls.append(options))
    net = CausalDiT(Config(dim=24, ffn_dim=48, heads=2, layers=1, window=window, chunk=chunk))
    args = train.parse(["--frames", str(frames), "--chunk", str(chunk), "--guidance", "3"])
    train.continue_clips(net, Sprites(8, frames), frames, args)
    assert calls[0]["window"] == wanted and calls[0]["given"] == min(2, frames // chunk - 1)
    assert (calls[0]["steps"], calls[0]["time_shift"], calls[0]["guidance"]) == (4, 10, 3)


def test_held_out_clips_are_not_trained_on(trained, monkeypatch, tmp_path):
    clips = []
    monkeypatch.setattr(train, "report", lambda *_: None)
    monkeypatch.setattr(train, "log_samples", lambda held_out, *_: clips.append(held_out[0][0]))
    run_train(tmp_path / "run", "--steps", 1)
    assert torch.equal(clips[0], Sprites(8, 4, 0, "test")[0][0])


# stopping and resuming


class Killed(Exception):
    pass


@pytest.mark.parametrize("stopped", [2, 3])
def test_resume_is_exact_across_the_warm_up(tmp_path, stopped, monkeypatch, quick):
    flags = ["--steps", 6, "--warmup", 3, "--ema", 0.9, "--batch", 4, "--accumulate", 2]
    whole = run_train(tmp_path / "whole", *flags)
    save = train.save

    def save_and_die(*args):
        save(*args)
        raise Killed

    monkeypatch.setattr(train, "save", save_and_die)
    with pytest.raises(Killed):
        run_train(tmp_path / "halves", *flags, "--save-every", stopped)
    monkeypatch.setattr(train, "save", save)
    train.main(["--resume", "--out", str(tmp_path / "halves")])

    halves = checkpoint_of(tmp_path / "halves")
    assert whole["args"]["optimizer"] == "muon"
    for key in ("model", "ema", "optimizer", "step", "config"):
        assert same(whole[key], halves[key]), key
    assert logged(tmp_path / "whole") == logged(tmp_path / "halves")


def test_three_steps_and_three_more_are_six(tmp_path, quick):
    """With the learning rate still rising, --steps is only where to stop."""
    flags = ["--warmup", 2, "--lr-warmup", 10]
    whole = run_train(tmp_path / "whole", "--steps", 6, *flags)
    run_train(tmp_path / "part", "--steps", 3, *flags)
    train.main(["--resume", "--out", str(tmp_path / "part/ckpt.pt"), "--steps", "6"])
    assert same(whole["model"], checkpoint_of(tmp_path / "part")["model"])


def test_a_log_is_cut_back_to_the_checkpoint_and_its_damage_reported(copied, capsys, quick):
    log = copied / "log.jsonl"
    whole = log.read_text().splitlines()
    junk = [whole[1][:20], "\udcff\x00junk", "7", '{"step": 4, "lo']
    beyond = '{"step": 9, "loss": 1}'  # of steps that were not saved
    lines = [whole[0], *junk[:3], *whole[2:], beyond, junk[3]]
    log.write_text("\n".join(lines), errors="surrogateescape")

    with pytest.raises(ValueError, match="--steps 2: the run in .* is already at step 3"):
        train.main(["--resume", "--out", str(copied), "--steps", "2"])
    train.main(["--resume", "--out", str(copied), "--steps", "4"])
    assert "skipped 4 damaged lines" in capsys.readouterr().out
    entries = log.read_text().splitlines()
    assert entries[:-1] == [whole[0], *whole[2:]] and json.loads(entries[-1])["step"] == 4


def test_resuming_a_finished_run_only_reports(copied, capsys):
    before = checkpoint_of(copied)
    with open(copied / "log.jsonl", "a") as log:
        log.write('{"step": 3, "data_seconds": 1.0}\n')  # a line that lacks the rest
    train.main(["--resume", "--out", str(copied)])
    assert same(before, checkpoint_of(copied)) and "median step" in capsys.readouterr().out


def break_shape(state):
    state["optimizer"]["state"]["head.head.bias"]["exp_avg"] = torch.zeros(3)


def break_momentum(state):
    state["optimizer"]["state"]["blocks.0.ffn.0.weight"] = {"momentum_buffer": torch.zeros(3)}


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_shape, "run holds step 3 and no optimizer state that fits its weights"),
        (break_momentum, "run holds step 3 and no optimizer state that fits its weights"),
        (lambda state: state.update(optimizer={"state": {}, "param_groups": []}), "no optimizer"),
        (lambda state: state.update(optimizer="AdamW"), "no optimizer state that fits"),
        (lambda state: state["optimizer"].pop("param_groups"), "run is damaged"),
        (lambda state: state.update(step=-5), "run holds step -5"),
        (lambda state: state["args"].update(data=None), "None is not a folder"),
        (lambda state: state["args"].update(size=-8), "run is no run of train.py: .*: got -8"),
        (lambda state: state["args"].update(wall=1), "run is no run of train.py: .*--wall"),
    ],
)
def test_resuming_refuses_a_checkpoint_made_by_hand_in_one_line(damage, message, copied):
    state = checkpoint_of(copied)
    damage(state)
    torch.save(state, copied / "ckpt.pt")
    with pytest.raises(ValueError, match=message) as error:
        train.main(["--resume", "--out", str(copied), "--steps", "4", "--device", "cpu"])
    assert "\n" not in str(error.value)


def test_resuming_on_other_clips_warns(copied, capsys, quick):
    train.main(["--resume", "--out", str(copied), "--steps", "4"])
    assert "warning" not in capsys.readouterr().out
    train.main(["--resume", "--out", str(copied), "--steps", "5", "--wall", "--size", "16"])
    out = capsys.readouterr().out
    assert "differ from those of the steps so far: --size 8 -> 16, --wall False -> True\n" in out


def test_resuming_deletes_the_half_written_files_of_a_killed_run(copied, quick):
    parts = [copied / name for name in ("ckpt.pt.part", "samples/.step_000002.gif")]
    others = [copied / "samples/.clip.mp4", copied / "samples/final.gif"]
    for path in (*parts, *others):
        path.write_text("half of it")
    train.main(["--resume", "--out", str(copied)])
    assert not any(path.exists() for path in parts) and all(path.exists() for path in others)


@pytest.mark.parametrize("was, other", [("muon", "adamw"), ("adamw", "muon"), (None, "muon")])
def test_a_run_keeps_its_optimizer(was, other, copied):
    """Runs from before there was a choice were trained with AdamW."""
    state = checkpoint_of(copied)
    state["args"]["optimizer"] = was
    if was is None:
        del state["args"]["optimizer"]
    torch.save(state, copied / "ckpt.pt")
    message = f"--optimizer {other}: the run in .* trained with {was or 'adamw'}; .* would work"
    with pytest.raises(ValueError, match=message) as error:
        train.main(["--resume", "--out", str(copied), "--steps", "4", "--optimizer", other])
    assert "\n" not in str(error.value)


def test_init_refuses_weights_that_predict_another_thing(trained, tmp_path, quick):
    message = "has another shape: predict is x there and v here"
    with pytest.raises(ValueError, match=message):
        run_train(tmp_path / "two", "--init", trained, "--predict", "v", "--steps", 1)
    net = CausalDiT(replace(PRESETS["toy"], predict="x"))
    args = train.parse(["--preset", "wan-1.3b", "--predict", "x", "--init", str(tmp_path)])
    with pytest.raises(ValueError, match="--predict x: the weights of Wan predict v"):
        train.fill_weights(net, args)


def test_a_patch_wider_than_the_network_trains_with_x(tmp_path, quick):
    state = run_train(tmp_path / "run", "--steps", 40, "--patch", 8, "--lr", 3e-3, "--batch", 4)
    assert state["config"]["channels"] * state["config"]["patch"] ** 2 > state["config"]["dim"]
    losses = logged(tmp_path / "run")
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_init_starts_a_new_stage(trained, tmp_path, quick):
    first = checkpoint_of(trained)
    second = run_train(
        *(tmp_path / "two", "--init", trained, "--top-k", 1),
        *("--steps", 1, "--lr", 1e-12, "--muon-lr", 1e-12),
    )
    assert second["step"] == 1 and second["config"]["top_k"] == 1
    assert not same(first["ema"], first["model"])
    assert all(close(first["ema"][key], second["model"][key], 1e-6) for key in first["ema"])


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(
    copied, tmp_path, monkeypatch
):
    before = checkpoint_of(copied)

    def not_a_number(model, *_):
        return model.head.head.bias.sum() * float("nan")

    monkeypatch.setattr(train, "flow_matching_loss", not_a_number)
    message = "at step 3: the weights were not touched; the last good checkpoint is .*ckpt.pt"
    with pytest.raises(sample.RunFailed, match=message):
        train.main(["--resume", "--out", str(copied), "--steps", "5"])
    assert same(before, checkpoint_of(copied))
    with pytest.raises(
        sample.RunFailed, match="at step 0: .*there is no checkpoint yet; try a lower --lr"
    ):
        run_train(tmp_path / "new")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(copied, tmp_path, monkeypatch, error, quick):
    before = checkpoint_of(copied)

    def full(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", full)
    message = r"step 4 to .*run/ckpt.pt \((No space|disk full).*\); .*is unchanged: free.*--resume$"
    with pytest.raises(sample.RunFailed, match=message):
        train.main(["--resume", "--out", str(copied), "--steps", "4"])
    assert same(before, checkpoint_of(copied)) and not list(copied.glob("*.part"))
    with pytest.raises(
        sample.RunFailed, match=r"step 1 to .*new/ckpt.pt .*; nothing is saved yet$"
    ):
        run_train(tmp_path / "new", "--steps", 1)


def test_only_a_full_disk_is_told_to_be_freed(copied, quick):
    (copied / "ckpt.pt.part").mkdir()
    with pytest.raises(sample.RunFailed, match=r"\(Is a directory\); .*ckpt.pt is unchanged$"):
        train.main(["--resume", "--out", str(copied), "--steps", "4"])


def test_errors_of_the_disk_name_the_file(copied, capsys):
    (copied / "log.part").mkdir()
    with pytest.raises(ValueError, match="cannot write .*log.jsonl: Is a directory$"):
        train.main(["--resume", "--out", str(copied), "--steps", "4"])
    (copied / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write .*file/run: Not a directory$"):
        run_train(copied / "file/run")

    (copied / "full").mkdir()
    (copied / "full/log.jsonl").symlink_to("/dev/full")
    train.append_log(copied / "full", {"step": 1})
    assert "warning: cannot write" in capsys.readouterr().out


def test_a_kill_while_saving_leaves_the_last_checkpoint(copied, monkeypatch, quick):
    before = checkpoint_of(copied)

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(os, "fsync", die)
        train.main(["--resume", "--out", str(copied), "--steps", "4"])
    assert same(before, checkpoint_of(copied)) and (copied / "ckpt.pt.part").exists()
    train.main(["--resume", "--out", str(copied), "--steps", "4"])
    assert checkpoint_of(copied)["step"] == 4 and not (copied / "ckpt.pt.part").exists()


# one process to a folder


def test_a_folder_in_use_is_refused_and_a_dead_process_holds_none(copied):
    holder = start(
        "-c",
        "import fcntl, os, time\n"
        "lock = open('.lock', 'w')\n"
        "fcntl.lockf(lock, fcntl.LOCK_EX)\n"
        "print(os.getpid(), file=lock, end='', flush=True)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)",
        cwd=copied,
    )
    holder.stdout.readline()
    for flags in ([], ["--resume"]):
        with pytest.raises(ValueError, match=f"run is in use by process {holder.pid};"):
            run_train(copied, *flags)
    (copied / "ckpt.pt").unlink()
    for flags in ([], ["--resume"]):
        with pytest.raises(ValueError, match=f"run is in use by process {holder.pid};"):
            run_train(copied, *flags)

    holder.kill()
    holder.communicate()
    with pytest.raises(ValueError, match="already holds another run, which saved no checkpoint"):
        run_train(copied)


def test_a_live_run_holds_its_folder_and_sigterm_saves_it(tmp_path, monkeypatch, quick):
    process = start(HERE / "train.py", *TINY, "--steps", "100000", cwd=tmp_path)
    log = tmp_path / "runs/001/log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.1)
        assert process.poll() is None, process.stdout.read()
    with pytest.raises(ValueError, match=f"in use by process {process.pid}; wait for it"):
        run_train(tmp_path / "runs/001")
    assert not (tmp_path / "runs/001/ckpt.pt").exists(), "the run has saved nothing yet"

    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "continue with: python train.py --resume" in out
    step = checkpoint_of(tmp_path / "runs/001")["step"]
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "--steps", str(step + 2)])
    assert checkpoint_of(tmp_path / "runs/001")["step"] == step + 2


def test_a_second_ctrl_c_stops_at_once_but_not_under_torchrun(monkeypatch, capsys):
    for rank, stops in ((None, True), ("0", False)):
        monkeypatch.delenv("RANK", raising=False)
        if rank:
            monkeypatch.setenv("RANK", rank)
        usual = signal.getsignal(signal.SIGINT)
        requested = train.StopRequested()
        signal.raise_signal(signal.SIGINT)
        assert requested.value
        assert (signal.getsignal(signal.SIGINT) is usual) == stops
        requested.restore_handlers()
        assert signal.getsignal(signal.SIGINT) is usual
    assert "Ctrl-C again stops at once" in "".join(capsys.readouterr())


def test_new_runs_are_numbered(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main([*TINY, "--steps", "1"])
    assert sorted(os.listdir("runs")) == ["001", "002"]


# several processes


def test_the_workers_of_a_group_are_not_forked_beside_its_threads(monkeypatch):
    """They would inherit the locks that a thread holds, and wait for ever for it to open them."""
    options = {}

    def record(data, **given):
        options.update(given)
        return []

    monkeypatch.setattr(train, "DataLoader", record)
    for workers, world, wanted in ((2, 2, "forkserver"), (2, 1, None), (0, 2, None)):
        args = argparse.Namespace(workers=workers, steps=0, batch=2, data="clips")
        assert not list(train.load_batches(None, 0, 0, world, args, torch.device("cpu")))
        assert options["multiprocessing_context"] == wanted, "the platform's own if None"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_are_one_and_resume_as_one(tmp_path, sharded, optimizer, quick):
    flags = [*TINY, "--batch", 4, "--warmup", 1, "--layers", 2, "--decay", "constant"]
    flags = [*map(str, flags), "--accumulate", "2", "--lr", "1e-3", "--muon-lr", "1e-3"]
    flags += ["--optimizer", optimizer]
    flags += ["--detail", "8", "--detail-frames", "2", "--detail-strips"]
    train.main([*flags, "--steps", "4", "--out", str(tmp_path / "one")])
    assert load_checkpoint(tmp_path / "one").config.detail_strips

    more = ["--fsdp", "--recompute", "--workers", "1"] if sharded else []
    two = tmp_path / "two"
    status, out = torchrun(*flags, *more, "--steps", 3, "--out", two, cwd=tmp_path)
    assert status == 0 and out.count("look at") == 1, out
    train.main(["--resume", "--steps", "4", "--out", str(two)])

    assert trained_alike(tmp_path / "one", two)


def test_several_processes_refuse_in_one_line(copied):
    """After they have met: the folder is looked at by process 0 alone."""
    status, out = torchrun(*TINY, "--out", copied, cwd=copied)
    lines = [
        line for line in out.splitlines() if "OMP_NUM_THREADS" not in line and "***" not in line
    ]
    assert status == 0 and len(lines) == 1, out
    assert lines[0].startswith(f"train.py: --out {copied} already holds another run")


def fail(error):
    raise error


def test_an_error_of_one_process_keeps_its_kind(tmp_path):
    """A run that failed ends with another exit status than input that is refused."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        for error in (sample.RunFailed("disk full"), ValueError("bad flag")):
            with pytest.raises(ValueError, match=str(error)) as raised:
                train.call_on_all(fail, error)
            assert type(raised.value) is type(error)
    finally:
        torch.distributed.destroy_process_group()


def test_the_processes_share_out_the_clips_of_a_step_lazily():
    whole = train.BatchSampler(2, 10**12, 6, 0, 1)
    assert len(whole) == 10**12 - 2
    parts = [train.BatchSampler(2, 4, 6, rank, 3) for rank in range(3)]
    for step, shares in enumerate(zip(*parts), 2):
        clips = [clip for share in shares for clip in share]
        assert clips == list(range(6 * step, 6 * step + 6))
    assert next(iter(whole)) == range(12, 18)


# the plan


@pytest.mark.parametrize("window", (None, 1, 3))
@pytest.mark.parametrize("N", (1, 2, 7))
def test_the_plan_counts_the_frames_of_figure_3c(N, window):
    past, own = sparse_causal_mask(0, N - 1, N, 0, window=window)
    seen = (past | own)[N - 1 :].sum().item()
    assert train.attended_frames(Config(window=window), N) == seen
    assert train.attended_frames(Config(top_k=window), N) == seen, (
        "as many frames, chosen otherwise"
    )


def one_call_per_frame(q, k, v, past, own, *_):
    """`attend`, slowly, with no work on what is masked out: its matrix products are the mask's."""
    rows = []
    for r in range(q.shape[2]):
        seen = (past | own)[r]
        rows.append(
            F.scaled_dot_product_attention(
                q[:, :, r], k[:, :, seen].flatten(2, 3), v[:, :, seen].flatten(2, 3)
            )
        )
    return torch.stack(rows, dim=2)


def planned(config, words, *flags):
    args = train.parse([*map(str, flags)])
    args.height, args.width = 4, 6
    return train.plan(args, config, words, 1)


@pytest.mark.parametrize(
    "chunk, steps, given, window, detail",
    (
        (1, 1, 0, None, {}),
        (3, 1, 0, None, {}),
        (1, 3, 0, None, {}),
        (1, 3, 1, None, {}),
        (1, 1, 0, 2, {}),
        (1, 1, 1, 1, {}),
        (1, 1, 0, None, {"detail": 8}),
        (3, 1, 0, 2, {"detail": 8, "detail_frames": 2}),
    ),
)
def test_the_plan_counts_the_flops_that_run(chunk, steps, given, window, detail, monkeypatch):
    monkeypatch.setattr(model_py, "attend", one_call_per_frame)
    config = Config(4, 48, 100, 2, 3, 2, chunk, text_dim=10, window=window, **detail)
    flags = ["--batch", 2, "--resample-steps", steps, "--resample-given", given]
    cost = planned(config, 7, "--frames", 4 * chunk, *flags)

    net, x, c = CausalDiT(config), torch.randn(2, 4, 4 * chunk, 4, 6), torch.randn(2, 7, 10)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        flow_matching_loss(net, x, c, x[:, :-1])
    with FlopCounterMode(display=False) as rollout, sdpa_kernel(SDPBackend.MATH):
        self_resample(net, x[:, :-1], c, steps=steps, given=given)
    assert abs(cost.teacher / forward.get_total_flops() / 3 - 1) < 1e-9
    extra = (cost.resample - cost.teacher) / rollout.get_total_flops()
    assert abs(extra - 1) < 0.05, "but for the text, read once by the cache"
    parameters = sum(p.numel() for p in net.parameters())
    assert cost.memory["weights"] == 4 * cost.parameters == 4 * parameters


@pytest.mark.parametrize("flags", ["", "--shift 1 --resample-steps 2 --time-shift 10"])
def test_the_share_of_the_loss_below_the_redraw_is_that_of_the_levels_drawn(flags):
    args = train.parse(flags.split())
    level, share = train.least_redraw_level(args)
    torch.manual_seed(0)
    draws = logit_normal(1_000_000)
    wanted = shift(draws, args.shift).median() / args.resample_steps
    assert level == pytest.approx(wanted.item(), rel=0.01)
    drawn = (shift(draws, args.time_shift) < level).double().mean().item()
    assert share == pytest.approx(drawn, rel=0.02, abs=1e-4)


@pytest.mark.parametrize(
    "flags, warned",
    [
        ("--detail 8 --detail-frames 2 --time-shift 10 --shift 1 --resample-steps 2", True),
        ("--detail 8 --detail-frames 2 --time-shift 3 --shift 1 --resample-steps 2", False),
        ("--detail 8 --detail-frames 2 --time-shift 10 --history noise", False),
        ("--detail 8 --time-shift 10 --shift 1 --resample-steps 2", False),
        ("--detail-frames 2 --detail 8 --time-shift 10 --shift 0.1 --warmup 4800", False),
        ("", False),
    ],
)
def test_a_redraw_at_levels_that_nothing_trains_is_warned_of(flags, warned, capsys):
    args = train.parse(flags.split())
    config = replace(PRESETS["toy"], detail=args.detail or 0, detail_frames=args.detail_frames or 0)
    train.warn_of_untrained_redraw(args, config)
    out = capsys.readouterr().out
    assert ("down to t = 0.25, and only 3e-04 of the loss is below" in out) == warned
    assert warned or not out


@pytest.mark.parametrize(
    "flags, steps",
    [
        ("--detail 8 --detail-frames 2 --history noise", 3000),
        ("--detail 8 --detail-frames 2 --history noise --warmup 9 --steps 5", 5),
        ("--detail 8 --detail-frames 2 --history teacher --warmup 0 --steps 7", 7),
        ("--detail 8 --detail-frames 2 --history noise --warmup 0 --resample-share 0.5", 4800),
        ("--detail 8 --detail-frames 2 --history noise --warmup 0", None),
        ("--detail 8", None),
    ],
)
def test_convolutions_that_learn_to_copy_are_warned_of(flags, steps, capsys):
    args = train.parse(flags.split())
    config = replace(PRESETS["toy"], detail=args.detail, detail_frames=args.detail_frames or 0)
    train.warn_of_clean_history(args, config)
    out = capsys.readouterr().out
    assert out.startswith(f"warning: teacher forcing until step {steps} with") if steps else not out
    train.warn_of_clean_history(args, config, start=steps or 0)
    assert not capsys.readouterr().out, "these steps are in the past"


def test_a_run_prints_these_warnings_when_it_starts(tmp_path, capsys, quick):
    flags = "--detail 4 --detail-frames 1 --time-shift 10 --shift 1 --resample-steps 2"
    run_train(tmp_path / "run", *flags.split(), "--steps", 1, "--warmup", 0)
    assert "warning: the history is redrawn from levels down to t = 0.25" in capsys.readouterr().out
    run_train(tmp_path / "two", *flags.split(), "--steps", 1, "--warmup", 1)
    assert "warning: teacher forcing until step 1 with --detail-frames" in capsys.readouterr().out


def test_one_frame_of_the_history_is_left_to_resample():
    train.check_network(train.parse("--frames 4 --resample-given 2".split()))
    with pytest.raises(ValueError, match="2 or less would work"):
        train.check_network(train.parse("--frames 4 --resample-given 3".split()))


def test_the_plan_counts_the_histories_that_call_the_network():
    plans = {name: planned(Config(), 7, "--history", name, "--fsdp") for name in HISTORY}
    for name, cost in plans.items():
        calls = name in ("parallel", "resample")
        assert (cost.resample > cost.teacher) == calls
        assert (cost.memory["gathered weights"] == cost.memory["weights"]) == calls


def test_the_cost_of_resampling_is_printed_only_where_there_is_some(capsys):
    for history, printed in (("teacher", 0), ("noise", 0), ("parallel", 2), ("resample", 2)):
        train.main(["--preset", "wan-1.3b", "--dry-run", "--history", history])
        assert capsys.readouterr().out.count("per resampling step") == printed


def test_the_hours_of_a_plan_count_the_batches_that_are_resampled(capsys):
    hours = []
    for share in ("0", "0.5", "1"):
        flags = ["--warmup", "0", "--steps", "100000", "--resample-share", share]
        train.main(["--preset", "wan-1.3b", "--dry-run", *flags])
        hours.append(
            float(re.search(r"([\d,]+) hours", capsys.readouterr().out)[1].replace(",", ""))
        )
    assert hours[0] < hours[1] and abs(hours[0] + hours[2] - 2 * hours[1]) <= 2


def test_the_plan_follows_the_flags():
    usual = planned(Config(), 7, "--frames", 10)
    assert planned(Config(top_k=2), 7, "--frames", 10).teacher < usual.teacher
    assert planned(Config(window=2), 7, "--frames", 10).teacher < usual.teacher
    assert planned(Config(), 7, "--frames", 10, "--batch", 16).teacher == 2 * usual.teacher
    halves = planned(Config(), 7, "--frames", 10, "--accumulate", 2)
    assert 2 * halves.memory["activations"] == usual.memory["activations"]
    less = planned(Config(), 7, "--frames", 10, "--recompute")
    assert less.memory["activations"] < usual.memory["activations"]
    assert abs(usual.ratio - usual.resample / usual.teacher) < 1e-9
    assert abs(4 * (less.ratio - 1) - 3 * (usual.ratio - 1)) < 1e-9, "a teacher step is longer"
    bf16 = planned(Config(), 7, "--frames", 10, "--precision", "bf16")
    assert 2 * bf16.memory["cache"] == usual.memory["cache"]
    convolved = planned(Config(detail=8), 7, "--frames", 10)
    seeing = planned(Config(detail=8, detail_frames=2), 7, "--frames", 10)
    kept = seeing.memory["cache"] - convolved.memory["cache"]
    assert kept == 4 * 8 * 10 * 3 * 4 * 6, "the pixels of 8 clips of 10 frames of 4 x 6"
    adamw = planned(Config(), 7, "--frames", 10, "--optimizer", "adamw")
    of_blocks = CausalDiT(Config()).blocks.state_dict().values()
    saved = adamw.memory["moments"] - usual.memory["moments"]
    assert saved == 4 * sum(p.numel() for p in of_blocks if p.dim() == 2)


def one_call(q, k, v, past, own, *_):
    """Attention that keeps for backward what FlexAttention keeps."""
    q, k, v = (z.flatten(2, 3) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).view(*q.shape[:2], len(past), -1, q.shape[-1])


@pytest.mark.parametrize("layers, detail", ((2, (0, 0)), (5, (0, 0)), (2, (64, 0)), (2, (64, 2))))
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_the_plan_counts_the_activations_that_backward_keeps(
    layers, detail, precision, monkeypatch
):
    monkeypatch.setattr(model_py, "attend", one_call)
    sizes = {"dim": 32, "ffn_dim": 160, "heads": 2, "layers": layers, "patch": 2, "text_dim": 10}
    config = Config(channels=4, detail=detail[0], detail_frames=detail[1], **sizes)
    args = train.parse(["--frames", "6", "--batch", "2", "--precision", precision])
    args.height, args.width = 24, 32
    net, x, c = CausalDiT(config), torch.randn(2, 6, 4, 24, 32), torch.randn(2, 7, 10)
    with train.autocast(args, torch.device("cpu")):
        kept = bytes_kept(lambda: net(x, torch.rand(2, 6), c, x[:, :-1]))
    assert 0.9 < train.plan(args, config, 7, 1).memory["activations"] / kept < 1.1


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--gpus", "64", "--fsdp"], "this fits\n"),
        (["--frames", "63", "--gpus", "8"], "this does not fit; what would help: --fsdp"),
    ],
)
def test_a_dry_run_says_what_fits_and_what_would_help(flags, wanted, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--preset", "wan-1.3b", "--dry-run", *flags])
    out = capsys.readouterr().out
    assert "1,418,996,800 parameters" in out and wanted in out and not any(tmp_path.iterdir())


# flags and bad input


def test_a_chunk_makes_the_default_clip_whole():
    clips = [[], ["--chunk", "3"], ["--chunk", "3", "--frames", "60"]]
    assert [train.parse(flags).frames for flags in clips] == [10, 12, 60]


def test_help_opens_with_the_docstring_and_names_the_defaults(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert train.__doc__.split("\n")[0] in out and "Eq. (7)" in out
    assert "(default: 0.6)" in out and "None" not in out


def test_a_run_begins_with_wans_weights_and_the_papers_numbers(tmp_path, monkeypatch, quick):
    monkeypatch.setitem(train.PRESETS, "wan-1.3b", Config(4, 48, 96, 2, 1, 2, 3, text_dim=7))
    save_latents(tmp_path / "latents", latents=np.ones((6, 4, 4, 8)), text=np.ones((2, 7)))
    wan = CausalDiT(train.PRESETS["wan-1.3b"])
    torch.nn.init.normal_(wan.head.head.weight)
    torch.save(wan.state_dict(), tmp_path / "wan.pth")

    flags = f"--preset wan-1.3b --data {tmp_path}/latents --init {tmp_path}/wan.pth".split()
    args = train.parse(flags)
    paper = (args.batch, args.optimizer, args.lr, args.frames, args.decay, args.recompute)
    assert paper == (64, "adamw", 5e-5, 21, "constant", True)
    flags += f"--frames 6 --batch 1 --steps 1 --lr 1e-9 --device cpu --out {tmp_path}/run".split()
    train.main(flags)
    state = checkpoint_of(tmp_path / "run")["model"]
    assert all(close(value, state[key], 1e-6) for key, value in wan.state_dict().items())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, trained):
    """A folder of good and bad things to train on, made once; no refused input may change it."""
    folder = tmp_path_factory.mktemp("inputs")
    for i, name in enumerate(("a.mp4", "b.gif")):
        with writer(folder / "clips" / name, 10) as out:
            out(Sprites(size=16, frames=14)[i][0])
    for name in ("empty", "foreign", "fake", "cut", "died"):
        (folder / name).mkdir()
    (folder / "foreign/notes.mp4").write_text("hello")
    (folder / "foreign/config.json").write_text("{}")
    (folder / "fake/0.npz").write_text("no zip")
    (folder / "junk.pt").write_text("junk")
    (folder / "died/log.jsonl").write_text("")
    save_latents(folder / "keys", pictures=np.zeros((4, 3, 8, 8)))
    save_latents(folder / "texts", latents=np.zeros((4, 3, 8, 8)), text=np.zeros((2, 9)))
    alien = dict.fromkeys(("model", "ema", "args"), {}) | {"step": 0, "config": {"magic": 1}}
    torch.save(alien, folder / "alien.pt")
    shutil.copytree(trained, folder / "full")
    (folder / "cut/ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes()[:2000])
    return folder


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data nowhere", "nowhere is not a folder.*sprites"),
        ("--data empty", "empty holds no videos"),
        ("--data foreign", "foreign"),
        ("--data clips --frames 99", "no clip in clips has 99 frames.*the longest has 14"),
        ("--data keys", "keys"),
        ("--data fake", "fake"),
        ("--size 18", "--size 18 is not divisible by 4, the patch; 20 would work"),
        ("--dim 48 --heads 5", "--dim 48 cannot be split into --heads 5 .*; --dim 50 would work"),
        ("--frames 7 --chunk 3", "--frames 7 is not divisible by 3, the chunk; 9 would work"),
        ("--frames 3 --chunk 3", "--frames 3: wanted two or more chunks of 3.*; 6 would work"),
        (
            "--resample-given 3",
            "a clip has 4 frames, and the last is nobody's history; 2 or less would work",
        ),
        ("--detail-frames 2", "--detail-frames 2 needs convolutions; --detail 32 would work"),
        ("--detail-strips", "--detail-strips needs convolutions; --detail 32 would work"),
        (
            "--detail 8 --detail-frames 4 --frames 4",
            "a clip has 4 frames, .*; 3 or less would work",
        ),
        ("--batch 3 --accumulate 2", r"--batch 3 is not divisible by 2, .*\(1\).*; 4 would work"),
        (
            "--patch 8 --size 16 --predict v",
            "a patch holds 192 values, and with --predict v a token of width 48 must carry .*"
            "--predict x, a smaller --patch or a larger --dim would work",
        ),
        ("--fsdp", "torchrun --nproc-per-node N train.py --fsdp would work"),
        ("--out full", "full already holds another run; add --resume"),
        ("--out died", "died already holds another run, which saved no checkpoint; name a new"),
        ("--out junk.pt", "--out junk.pt is a file; wanted a folder$"),
        ("--out foreign", "--out foreign holds config.json already; name a new folder$"),
        ("--resume --out full --init full", "--resume continues with its own weights"),
        ("--resume --out full --data clips", "another shape: text_dim is|the captions differ"),
        ("--chunk 1024", "--frames 4: wanted two or more chunks of 1024, .*; 2048 would work"),
        ("--resume --out died", "no checkpoint at died"),
        ("--init alien.pt", "alien.pt is not a whole checkpoint.*magic"),
        ("--init nowhere", "no checkpoint at nowhere"),
        ("--init junk.pt", "junk.pt is not a whole checkpoint"),
        ("--init cut", "cut/ckpt.pt is not a whole checkpoint"),
        (
            "--init full --dim 96",
            "the model of full has another shape: dim is 48 there and 96 here",
        ),
        ("--init full --data texts --patch 2", "another shape.*text_dim is 20 there and 9 here"),
        ("--objects 9", "9 sprites"),
    ],
)
def test_bad_input_to_training(flags, message, inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    before = sorted(inputs.rglob("*"))
    with pytest.raises(ValueError, match=message) as error:
        train.main([*TINY, *flags.split()])
    assert "\n" not in str(error.value) and sorted(inputs.rglob("*")) == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--size 1024 --frames 256",
            r"--size 1024x1024 .*needs [\d,]+ GiB, and the limit .* [\d,]+;",
        ),
        ("--frames 1000000", "--frames 1000000 .*a step needs .*more --accumulate, would work"),
        ("--frames 100000000", "100000000 frames"),
        ("--batch 100000000", "--batch 100000000 .*a step needs"),
        ("--batch 1000000000 --accumulate 1000000000", "--batch 1000000000 .*a step needs"),
        ("--dim 65536 --heads 2 --layers 50", "--dim 65536 --layers 50: a step needs"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(flags, message, monkeypatch):
    monkeypatch.setattr(train, "build", lambda *_: pytest.fail("a network was made"))
    with pytest.raises(ValueError, match=message) as error:
        train.main([*TINY, *flags.split()])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--top-k", "0"),
        ("--lr", "nan"),
        ("--lr", "-1"),
        ("--steps", "-3"),
        ("--steps", "100000000000"),
        ("--size", "100000"),
        ("--frames", "10000000000"),
        ("--layers", "1001"),
        ("--workers", "65"),
        ("--sample-steps", "1001"),
        ("--tflops", "1e9"),
        ("--gpu-memory", "1e-9"),
        ("--out", ""),
        ("--shift", "0"),
        ("--batch", "2.5"),
        ("--resample-share", "1.5"),
        ("--ema", "inf"),
        ("--history", "magic"),
        ("--frames", "ten"),
        ("--device", "cuda:99"),
        ("--device", "tpu"),
        ("--seed", str(2**64)),
    ],
)
def test_bad_flags_of_training_are_one_line(flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse([flag, value])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and flag in err and value in err


def test_training_on_a_folder_keeps_to_its_words(inputs, tmp_path, quick):
    folder = Path(shutil.copytree(inputs / "clips", tmp_path / "clips"))
    (folder / "a.txt").write_text("A red Circle, moving")
    flags = ["--data", folder, "--size", 16, "--steps", 2, "--workers", 1]
    state = run_train(tmp_path / "run", *flags)
    assert state["args"]["words"] == [["a", "circle", "moving", "red"], 4]
    (folder / "a.txt").write_text("A blue Circle, moving")
    message = "the captions differ from those .*run was trained on"
    with pytest.raises(ValueError, match=message):
        train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "3"])
    with pytest.raises(ValueError, match=message):
        run_train(tmp_path / "two", *flags, "--init", tmp_path / "run")


def test_only_sprites_have_a_held_out_loss(inputs, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "report", lambda *_: None)
    run_train(tmp_path / "run", "--data", inputs / "clips", "--size", 16, "--steps", 1)
    assert logged(tmp_path / "run", "clip_loss") and not logged(tmp_path / "run", "held_out_loss")
    assert logged(trained, "held_out_loss") and not logged(trained, "clip_loss")


def test_training_on_latents_ends_in_pictures(tmp_path):
    for i in range(2):
        latents = np.random.default_rng(i).normal(size=(6 + i, 4, 4, 8))
        save_latents(tmp_path / "latents", latents=latents, text=np.ones((2 + i, 7)))
    flags = ["--data", tmp_path / "latents", "--frames", 6, "--chunk", 3, "--patch", 2]
    flags += ["--predict", "v"]  # a new network's x = 0 would make equal frames, one in a GIF
    state = run_train(tmp_path / "run", *flags, "--steps", 1)
    assert (state["config"]["channels"], state["config"]["text_dim"]) == (4, 7)
    assert state["args"]["words"] is None and state["args"]["width"] == 8
    assert len(iio.imread(tmp_path / "run/samples/final.gif")) == 24


def test_a_refused_input_is_one_line_and_no_traceback(tmp_path):
    process = start(HERE / "train.py", "--resume", cwd=tmp_path)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and out.count("\n") == 1, out
    assert out.startswith("train.py: there is no checkpoint under runs/")


# ---- sample.py ----


FLAGS = ["--steps", "1", "--device", "cpu"]


def make_run(folder, config=None, **changes):
    """Save a checkpoint with random weights, as train.py does; `changes` are to the run's flags."""
    torch.manual_seed(0)
    config = Config(dim=48, ffn_dim=96, heads=2, layers=2, top_k=2, **(config or {}))
    net = CausalDiT(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    args = {"data": "sprites", "frames": 4, "size": 8, "height": 8, "width": 8, "rate": 8}
    args |= {"fps": 0.0, "stride": 1, "objects": 2, "wall": False, "withheld": 0.0}
    words = Sprites().words
    args |= {"words": [words.vocabulary, words.rows]} | changes
    state = {"config": asdict(config), "model": net.state_dict(), "ema": net.state_dict()}
    folder.mkdir(parents=True)
    torch.save(state | {"optimizer": {}, "step": 1, "args": args}, folder / "ckpt.pt")
    return folder


@pytest.fixture(scope="module")
def random_run(tmp_path_factory):
    """A run of 8 x 8 sprites that routes. Tests must not write into it."""
    return make_run(tmp_path_factory.mktemp("random") / "run")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with clip.gif, 5 frames of sprites."""
    monkeypatch.chdir(tmp_path)
    with writer("clip.gif") as out:
        out(Sprites(size=8, frames=5)[0][0])
    return tmp_path


def call(run, *flags):
    sample.main([*flags, "--checkpoint", str(run), *FLAGS])


def filled(run, *flags):
    """The flags as `main` has them, and the model."""
    model = sample.load_run(run)
    return sample.fill_unset(sample.parse([*flags, "--device", "cpu"]), run, model), model


class NoiseModel(torch.nn.Module):
    """v = 0, so that a rollout returns its own noise; keeps what each call was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = Config()
        self.run = {"data": "sprites", "size": 8, "objects": 2, "wall": False, "withheld": 0.0}
        self.histories, self.noise = [], []

    def cache(self, batch, frames, window=None, sink=0):
        return None

    def forward(self, x, t, c, history=None, cache=None, first=0):
        self.histories.append(history)
        self.noise.append(x)
        return torch.zeros_like(x)


def evaluate(model, frames=6, videos=1, window=None, **options):
    return sample.evaluate(model, frames, videos, 1, 1.0, 1.0, window, **options)


# from a prompt to a file


def test_guidance_is_the_rollout_of_a_guided_model(random_run):
    net = load_checkpoint(random_run)
    c = Words(*net.run["words"])("red circle")[None]
    given = torch.zeros(1, 0, 3, 8, 8)
    noise = torch.randn(1, 3, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    for scale, null in ((2.0, None), (2.0, torch.ones_like(c)), (1.0, None), (0.0, None)):
        guided = Guided(net, torch.zeros_like(c) if null is None else null, scale)
        wanted = rollout(net if scale == 1 else guided, noise, torch.ones(1), c, 2, 3.0)
        made = sample.generate(net, [(0, c)], given, 3, 2, 3.0, scale, seed=7, null=null)
        assert torch.equal(torch.cat(list(made), 1), torch.cat(list(wanted), 1))


def test_without_a_prompt_there_is_no_guidance():
    model = NoiseModel()
    nothing = torch.zeros(1, 5, 20)
    list(sample.generate(model, [(0, nothing)], torch.zeros(1, 0, 3, 8, 8), 2, 1, guidance=2.0))
    assert [len(x) for x in model.noise] == [1, 1], "one branch: the second would be the same"


def test_a_switched_prompt_is_a_new_rollout_on_all_there_is(random_run):
    net = load_checkpoint(random_run)
    words = Words(*net.run["words"])
    a, b = words("red circle")[None], words("blue square")[None]
    noise = torch.Generator().manual_seed(0)

    def wanted(n, c, history):
        x = torch.randn(1, n, 3, 8, 8, generator=noise)
        frames = rollout(net, x, torch.ones(1), c, 2, history=history)
        return torch.cat([history, *frames], 1)

    given = torch.rand(1, 2, 3, 8, 8)
    first = wanted(2, a, given)
    whole = wanted(2, b, first)
    made = list(sample.generate(net, [(0, b), (2, a), (4, b)], given, 6, 2))
    assert torch.equal(torch.cat([given, *made], 1), whole), "the given frames cover the first text"


def test_window_and_sink_bound_the_cache(random_run):
    net = load_checkpoint(random_run)
    c = Words(*net.run["words"])("red circle")[None]
    given = torch.zeros(1, 0, 3, 8, 8)
    noise = torch.randn(1, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = []
    for window, sink in ((3, 0), (3, 1), (None, 0)):
        cache = net.cache(1, 6, window=window, sink=sink)
        wanted = torch.cat(list(rollout(net, noise, torch.ones(1), c, 1, cache=cache)), 1)
        made = list(sample.generate(net, [(0, c)], given, 6, 1, window=window, sink=sink))
        assert torch.equal(torch.cat(made, 1), wanted)
        rows.append(wanted)
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_prompts_switch_in_the_order_of_their_frames_counted_in_chunks(tmp_path):
    run = make_run(tmp_path / "run", {"chunk": 2})
    args, model = filled(run, "--then", "10", "blue square", "--then", "4", "white circle")
    texts = sample.encode_texts(args, model, ["red circle", "green circle"], None)
    words = Words(*model.run["words"])
    for (at, c), number, prompts in zip(
        texts,
        (0, 2, 5),
        (["red circle", "green circle"], ["white circle"] * 2, ["blue square"] * 2),
    ):
        assert at == number and torch.equal(c, words.text(prompts))


def test_prompts_become_videos_of_any_length_and_the_seed_decides(random_run, tmp_path, capsys):
    flags = ["red circle", "blue square", "--frames", "9", "--steps", "2", "--window", "3"]
    flags += ["--sink", "1", "--samples", "2", "--device", "cpu", "--checkpoint", str(random_run)]
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        sample.main([*flags, "--out", str(tmp_path / folder), "--seed", seed])
    assert re.search(r"[\d.]+ frames per second: 4 x 9 new frames", capsys.readouterr().out)

    videos = sorted((tmp_path / "a").glob("*.mp4"))
    assert [path.name for path in videos] == [
        *("blue-square-0-2.mp4", "blue-square-0-3.mp4", "red-circle-0-0.mp4", "red-circle-0-1.mp4")
    ]
    assert all(len(read_video(path, 8)) == 9 for path in videos)
    assert (tmp_path / "a/sheet.png").exists()
    assert len({path.read_bytes() for path in videos}) == 4, "each video has noise of its own"
    for path in videos:
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
        other = path.name.replace("-0-", "-1-")
        assert (tmp_path / "c" / other).read_bytes() != path.read_bytes()


def test_a_clip_is_continued_and_its_frames_come_first(random_run, here):
    call(random_run, "red circle", "--given", "clip.gif", "--frames", "8", "--out", "on.gif")
    made, given = read_video("on.gif", 8), read_video("clip.gif", 8)
    assert len(made) == 8
    assert (made[:5] - given).abs().mean() < 0.1 < (made[5:] - given[4]).abs().mean()


def test_given_frames_takes_some_and_says_so_where_there_are_fewer(random_run, here, capsys):
    for wanted, taken in (("3", 3), ("9", 5)):
        args, model = filled(random_run, "--given", "clip.gif", "--given-frames", wanted)
        assert torch.equal(
            sample.read_given(args, model, None)[0], read_video("clip.gif", 8)[:taken]
        )
    assert capsys.readouterr().out == "--given-frames 9: clip.gif has 5, so all are given\n"


def test_given_frames_beyond_whole_chunks_are_left_out_and_counted(tmp_path, here, capsys):
    run = make_run(tmp_path / "chunks", {"chunk": 2})
    args, model = filled(run, "--given", "clip.gif", "--frames", "8")
    given = sample.read_given(args, model, None)
    assert torch.equal(unfold(given, 2)[0], read_video("clip.gif", 8)[:4])
    assert capsys.readouterr().out == "the first 4 of 5 frames of clip.gif are used: whole chunks\n"


def test_a_clip_is_read_and_a_video_written_at_the_pace_of_training(here):
    run = make_run(here / "run", rate=5, fps=4.0, stride=2)
    args, model = filled(run, "--given", "clip.gif")
    given = sample.read_given(args, model, None)
    assert torch.equal(given[0], read_video("clip.gif", 8, fps=4.0, stride=2))
    call(run, "--given", "clip.gif", "--out", "x.mp4")
    with av.open("x.mp4") as file:
        assert file.streams.video[0].average_rate == 5


def test_a_picture_is_continued_too(random_run, here):
    picture = Sprites(size=8, frames=1)[0][0]
    pixels = to_bytes(picture)[0]
    iio.imwrite("still.png", np.pad(pixels, ((0, 0), (3, 3), (0, 0))))
    args, model = filled(random_run, "--given", "still.png")
    given = sample.read_given(args, model, None)
    assert np.array_equal(to_bytes(given[0])[0], pixels), "cropped to the centre"
    Path("cut.png").write_bytes(Path("still.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="cut.png cannot be read"):
        call(random_run, "--given", "cut.png")


def test_continue_video_counts_given_frames_in_chunks():
    model = NoiseModel()
    model.config = Config(chunk=2)
    video = torch.rand(1, 8, 3, 8, 8)
    made = sample.continue_video(model, video, torch.zeros(1, 5, 20), 10, given=2, steps=1)
    assert made.shape == (1, 10, 3, 8, 8) and torch.equal(made[:, :4], video[:, :4])
    assert model.histories[0].shape == (1, 2, 6, 8, 8)


# flags and their checks


def test_the_default_window_never_meets_a_relative_position_that_training_did_not_have(tmp_path):
    for name, config, frames, window in (
        ("dense", {}, 10, 9),  # the last of 10 frames sees 9
        ("chunks", {"chunk": 2}, 12, 5),
        ("window", {"window": 3}, 10, 4),  # as many as are seen in training, and the frame evicted
        ("short", {"window": 30}, 10, 9),
    ):
        run = make_run(tmp_path / name, config, frames=frames)
        args, _ = filled(run)
        assert args.window == window, name
        assert (args.frames, args.steps, args.guidance) == (2 * frames, 4, 1.5)


def test_flags_that_are_set_are_kept_and_latents_have_defaults_of_their_own(random_run, tmp_path):
    args, _ = filled(
        random_run, "--frames", "9", "--steps", "3", "--guidance", "0", "--window", "0"
    )
    assert (args.frames, args.steps, args.guidance, args.window) == (9, 3, 0.0, 0)
    assert sample.sampler_settings(args)["window"] is None, "0 is all of the history"
    args, _ = filled(make_run(tmp_path / "latents", data="latents", words=None))
    assert (args.steps, args.guidance) == (32, 5.0)


def test_a_window_shorter_than_what_the_convolutions_see_is_refused(tmp_path, here):
    run = make_run(tmp_path / "run", {"detail": 4, "detail_frames": 2})
    call(run, "red circle", "--window", "3", "--sink", "1", "--frames", "6")
    with pytest.raises(ValueError, match="--window 1: .* the last 2 frames; --window 2 or more"):
        call(run, "red circle", "--window", "1", "--frames", "6")
    with pytest.raises(ValueError, match="--sink 2 leaves 1 .* see 2; --sink 1 would work"):
        call(run, "red circle", "--window", "3", "--sink", "2", "--frames", "6")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["purple circle"], 'unknown word "purple".*red'),
        (["--frames", "9", "--given", "missing.mp4"], "missing.mp4 cannot be read"),
        (["--frames", "9", "--given", "notes.txt"], "notes.txt cannot be read as a video"),
        (["--frames", "2", "--given", "clip.gif"], "clip.gif makes 5 frames; wanted .* --frames 2"),
        (["--given-frames", "2"], "--given-frames 2 needs --given"),
        (["--then", "99", "red circle", "--frames", "8"], "--then 99: wanted .* below --frames 8"),
        (["--then", "0", "red circle"], "--then 0"),
        (["--then", "soon", "red circle"], "--then soon"),
        (["--window", "2", "--sink", "2"], "--sink 2 leaves no room in --window 2; --sink 1"),
        (["--eval", "--frames", "2"], "2: the first two frames of 1 are given; 3 or more would"),
        (["--eval", "red circle"], "leave out prompts"),
        (["--compare", "run", "--given", "clip.gif"], "leave out prompts, --given"),
        (["--true-history"], "--true-history works with --eval"),
        (["--out", "video.avi"], "video.avi: wanted a folder, or a file that ends in .mp4 or .gif"),
        (["--out", "video.AVI"], "video.AVI: wanted a folder, or a file that ends in .mp4"),
        (["--out", "notes.txt"], "notes.txt: wanted a folder"),
        (["--eval", "--out", "table.txt"], "table.txt: wanted a folder"),
        (["--given", "clip.gif", "--out", "clip.gif", "--frames", "6"], "would overwrite --given"),
        (["--then", "9" * 5000, "red circle"], "--then 9{20}: wanted the number of a frame"),
        (["--then", "4", "red circle", "--then", "04", ""], "--then 4 is given twice"),
        (["--sink", "1", "--window", "0"], "--sink 1 has no effect without a window"),
        (["--sink", "1", "--eval", "--true-history"], "--sink 1 has no effect with --true-history"),
        (["--table", "run"], "--table prints what --eval saved; leave out checkpoint, steps"),
        (["--videos", "3"], "--videos 3 works with --eval or --compare"),
        (["--parts", "4"], "--parts 4 works with --eval, --compare or --table"),
        (["--eval", "--samples", "2"], "leave out --samples"),
        (["--eval", "--first-steps", "2"], "--first-steps is of a video from nothing"),
        (["--given", "clip.gif", "--first-steps", "2"], "--first-steps is of a video from nothing"),
        (["--eval", "--parts", "9", "--frames", "8"], "--parts 9: wanted at most one for"),
        (["--negative", "blurry"], "--negative works with --wan"),
        (["--overwrite"], "--overwrite works with --out FILE"),
        (["--overwrite", "--out", "folder"], "--overwrite works with --out FILE"),
        (["--compare", "nowhere"], "no checkpoint at nowhere"),
        (["--wan", "nowhere"], "--wan: this model makes pixels itself"),
        (["--samples", "3000"], "--samples 3000: 3000 videos in all, but at most 256"),
        (["red circle", "blue square", "--samples", "200"], "400 videos in all"),
        (["--frames", "100000000000"], r"--frames 100000000000, 1 at once: .* need [\d,.]+ GiB, .*limit is this machine's [\d,.]+ GiB"),  # noqa: E501
        (["--eval", "--videos", "100000000000"], r"--videos 100000000000: .*limit is this"),
    ],
)  # fmt: skip
def test_bad_input_to_sampling_is_one_line_and_leaves_no_file(flags, message, random_run, here):
    Path("notes.txt").write_text("no video")
    with pytest.raises(ValueError, match=message) as error:
        call(random_run, *flags)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir()) == ["clip.gif", "notes.txt"]


def test_flags_are_refused_where_the_model_cannot_follow(tmp_path):
    plain = make_run(tmp_path / "plain", {"chunk": 2})
    other = torch.load(plain / "ckpt.pt")
    other["config"]["top_k"] = None
    torch.save(other, plain / "ckpt.pt")
    latents = make_run(tmp_path / "latents", data="latents", words=None)
    windowed = make_run(tmp_path / "windowed", {"window": 2})
    for run, flags, message in (
        (plain, ["--routing"], "train one with --top-k"),
        (plain, ["--frames", "7"], "--frames 7 is not divisible by 2, the chunk; 8 would work"),
        (plain, ["--then", "3", "red circle"], "--then 3: wanted .* divisible by 2"),
        (latents, [], "this model makes latents; pass --wan PATH"),
        (latents, ["--eval"], "--eval needs a model trained on sprites; .*trained on latents"),
        (windowed, ["--sink", "1"], "--sink 1: trained with --window 2, .*; --window 2 or less"),
    ):
        with pytest.raises(ValueError, match=message):
            call(run, *flags)


def test_the_memory_that_is_refused_is_the_memory_that_is_used(random_run):
    net = load_checkpoint(random_run)
    c = Words(*net.run["words"])("red circle")[None]
    cost = {}
    for flags in (*(["--window", "3"], ["--window", "0"], ["--window", "0", "--guidance", "1"]),):
        args, model = filled(random_run, "--frames", "20", *flags)
        cache = net.cache(1 if args.guidance == 1 else 2, 20, args.window or None)
        net(torch.zeros(cache.batch, 1, 3, 8, 8), torch.ones(cache.batch, 1), c, cache=cache)
        used = cache.k.nbytes + cache.v.nbytes + 3 * 4 * 20 * 3 * 8 * 8
        cost[tuple(flags)] = sample.memory_needed(args, model, 1)
        assert 0.8 * used < cost[tuple(flags)] <= used
        assert sample.memory_needed(args, model, 5) == 5 * cost[tuple(flags)]
    assert len(set(cost.values())) == 3


@pytest.mark.parametrize("flags", [["--window", "3"], ["--window", "0"], ["--guidance", "1"]])
def test_the_memory_that_is_refused_counts_the_pixels_that_the_convolutions_see(flags, tmp_path):
    costs = []
    for count in (0, 2):
        run = make_run(tmp_path / str(count), {"detail": 4, "detail_frames": count})
        args, model = filled(run, "--frames", "20", *flags)
        costs.append(sample.memory_needed(args, model, 1))
    net = load_checkpoint(run)
    c = Words(*net.run["words"])("red circle")[None]
    cache = net.cache(1 if args.guidance == 1 else 2, 20, args.window or None)
    net(torch.zeros(cache.batch, 1, 3, 8, 8), torch.ones(cache.batch, 1), c, cache=cache)
    assert costs[1] - costs[0] == cache.finished.nbytes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frames": None}, "its flag frames is None"),
        ({"frames": "ten"}, "its flag frames is 'ten'"),
        ({"frames": 0}, "its flag frames is 0"),
        ({"rate": float("nan")}, "its flag rate is nan"),
        ({"rate": 1e300}, r"its flag rate is 1e\+300"),
        ({"fps": float("inf")}, "its flag fps is inf"),
        ({"rate": "fast"}, "its flag rate is 'fast'"),
        ({"objects": None}, "its flag objects is None"),
        ({"data": 3}, "its flag data is 3"),
        ({"words": "red"}, "its vocabulary is 'red'"),
        ({"words": [["red"], "2"]}, "its vocabulary"),
        ({"words": [[1, 2], 2]}, "its vocabulary"),
    ],
)
def test_a_checkpoint_made_by_hand_is_refused_in_one_line(changes, message, tmp_path):
    run = make_run(tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=f"run was not saved by train.py: .*{message}") as error:
        call(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        *(["--steps", "0"], ["--steps", "100000000"], ["--time-shift", "0"], ["--guidance", "nan"]),
        *(["--guidance", "-1"], ["--seed", str(2**63)], ["--samples", "2.5"], ["--window", "-1"]),
        *(["--frames", "ten"], ["--frames", str(10**13)], ["--device", "tpu"], ["--sink"]),
        ["--out", ""],
    ],
)
def test_bad_flags_of_sampling_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.parse(flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1 and flags[0] in err


def test_number_types_accept_their_bounds_and_nothing_beyond():
    for read, good, bad in (
        (sample.positive_int, ("1", "12"), ("0", "1.0", "")),
        (sample.nonnegative_int, ("0",), ("-1",)),
        (sample.positive_float, ("1e-9", "2"), ("0", "inf", "nan")),
        (sample.nonnegative_float, ("0", "0.5"), ("-0.1", "x")),
        (sample.fraction, ("0", "1"), ("1.01", "-1")),
        (sample.seed_int, ("0", str(2**63 - 1)), ("-1", str(2**63))),
        (sample.bounded_float(0, 1, open_low=True), ("1",), ("0",)),
    ):
        for text in good:
            assert read(text) == type(read(text))(text)
        for text in bad:
            with pytest.raises(sample.argparse.ArgumentTypeError, match=f"got {text}, wanted a"):
                read(text)


def test_help_opens_with_the_usage_page_and_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        sample.parse(["-h"])
    out = capsys.readouterr().out
    assert 'python sample.py "red circle" --then 16 "white square" --frames 32' in out
    flags = re.findall(r'"(--[a-z-]+)"', Path(sample.__file__).read_text().split("def check")[0])
    assert len(flags) > 20
    for flag in flags:
        assert re.search(rf"^  {flag}\b.*(\n {{20,}}|  )\S", out, re.M), f"{flag} has no help"


def test_scripts_end_in_one_line_and_only_rank_0_speaks(monkeypatch, capsys):
    def refuse(argv):
        raise ValueError("two\nlines")

    def fail(argv):
        raise sample.RunFailed("disk full")

    def interrupt(argv):
        raise KeyboardInterrupt

    def fill(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0 has")

    monkeypatch.setattr(sys, "argv", ["path/to/sample.py"])
    for rank, main, status, line in (
        (None, refuse, 2, "sample.py: two lines\n"),
        (None, interrupt, 130, "sample.py: interrupted\n"),
        ("0", refuse, 0, "sample.py: two lines\n"),
        ("1", refuse, 0, ""),
        (None, fail, 2, "sample.py: disk full\n"),
        ("0", fail, 2, "sample.py: disk full\n"),
        ("1", lambda argv: sample.parse(["--frames", "0"]), 0, ""),
        (
            None,
            fill,
            2,
            "sample.py: CUDA out of memory. Tried to allocate 9 GiB; what would help: "
            "a smaller batch, fewer frames, --accumulate, --recompute or --fsdp\n",
        ),
    ):
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            sample.run_main(main, [])
        assert (stop.value.code, capsys.readouterr().err) == (status, line)


def test_devices_are_what_torch_offers_and_the_fastest_is_the_default(monkeypatch):
    for cuda, mps, names in (
        (0, False, ["cpu"]),
        (0, True, ["cpu", "mps"]),
        (2, False, ["cpu", "cuda:0", "cuda:1", "cuda"]),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=cuda: n)
        monkeypatch.setattr(torch.cuda, "is_available", lambda n=cuda: n > 0)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda offered=mps: offered)
        assert sample.list_devices() == names
    assert sample.default_device() == sample.DEVICES[-1]


def test_the_latest_run_is_the_one_written_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no checkpoint under runs/"):
        sample.latest_run()
    for name, written in (("a", 2), ("b", 3), ("c", 1)):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "ckpt.pt").touch()
        os.utime(Path("runs", name, "ckpt.pt"), (written, written))
    assert sample.latest_run() == Path("runs/b")


def test_sampling_follows_the_precision_of_training(tmp_path):
    for precision, enabled in (("bf16", True), ("fp32", False), (None, False)):
        run = make_run(tmp_path / str(precision), precision=precision)
        with sample.autocast(sample.load_run(run), "cpu"):
            assert torch.is_autocast_enabled("cpu") == enabled


def test_packed_weights_are_a_run_without_a_folder(trained, here, capsys, monkeypatch):
    box = here / "results" / "resample.pt"
    box.parent.mkdir()
    command = [sys.executable, HERE / "results/pack.py", trained, box]
    subprocess.run(command, check=True, capture_output=True)
    whole, packed = load_checkpoint(trained), load_checkpoint(box)
    weights = sum(p.numel() for p in whole.parameters())
    assert box.stat().st_size < 2 * weights + 40_000
    for a, b in zip(whole.parameters(), packed.parameters()):
        assert torch.equal(a.half().float(), b)
    assert not {"out", "init", "resume", "device"} & packed.run.keys()
    assert packed.run.items() < whole.run.items()

    c = Sprites().words.text(["red circle"])
    nothing = torch.zeros(1, 0, 3, 8, 8)
    long, short = (
        torch.cat(list(sample.generate(net, [(0, c)], nothing, 6, 2)), 1) for net in (whole, packed)
    )
    assert 0 < (long - short).abs().max() < 0.01 * long.abs().max(), "half precision: 0.0005"

    monkeypatch.setattr(sample, "BOX", box)
    sample.main(["red circle", "--frames", "4", "--device", "cpu"])
    assert "using resample.pt, which comes with the repository" in capsys.readouterr().out
    assert list(Path("runs/resample/samples").glob("red-circle*.mp4"))
    Path("runs/a").mkdir()
    shutil.copy(trained / "ckpt.pt", "runs/a")
    assert sample.default_checkpoint() == Path("runs/a"), "a run of one's own comes first"

    still = ["--lr", "1e-12", "--muon-lr", "1e-12"]
    train.main([*TINY, "--init", str(box), "--steps", "1", "--out", "runs/b", *still])
    begun = checkpoint_of(Path("runs/b"))["model"]
    assert all(close(begun[name], p, 1e-6) for name, p in packed.named_parameters())
    shutil.copy(box, "runs/a/ckpt.pt")
    with pytest.raises(ValueError, match="no optimizer state to resume"):
        train.main(["--resume", "--out", "runs/a", "--steps", "9"])


@pytest.mark.parametrize("name", ["teacher", "resample"])
def test_the_weights_in_the_box_continue_sprites(name):
    path = HERE / "results" / f"{name}.pt"
    assert path.stat().st_size < 2.5e6
    model = sample.load_run(path)
    _, _, scores = sample.evaluate(model, 12, 8, 4, 10.0, 1.5, window=9)
    assert (mean(scores[:, 2:]) > 80).all(), "Visual, Temporal and Text"


def test_a_run_is_named_by_its_folder_or_its_checkpoint(random_run):
    assert sample.run_folder(random_run / "ckpt.pt") == sample.run_folder(random_run) == random_run
    assert sample.run_folder(Path("nowhere")) == Path("nowhere")


# no video is replaced silently


def test_a_video_made_with_other_settings_is_never_replaced(random_run, tmp_path):
    def made(*flags):
        call(random_run, "red circle", "--out", str(tmp_path), "--frames", "4", *flags)
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    first = made()
    assert sorted(first) == ["red-circle-0-0.mp4", "red-circle-0-0.png", "settings.json"]
    assert made() == first, "the same settings replace their own video by the same bytes"

    second = made("--window", "2")
    assert sorted(set(second) - set(first)) == ["red-circle-0-0-2.mp4", "red-circle-0-0-2.png"]
    assert second["red-circle-0-0.mp4"] == first["red-circle-0-0.mp4"]
    assert "red-circle-0-0-3.mp4" in made("--guidance", "1")
    assert len(made("--window", "2")) == 7, "each has found its own again"

    (tmp_path / "settings.json").write_text("{")
    assert "red-circle-0-0-4.mp4" in made(), "without a record, a file is somebody else's"


def test_everything_that_decides_a_video_is_part_of_its_settings(random_run, here):
    with writer("other.gif") as out:
        out(Sprites(size=8, frames=5)[1][0])

    def settings(*flags, run=random_run):
        return sample.video_settings(filled(run, "--given", "clip.gif", *flags)[0])

    different = [
        *(["red circle"], ["--steps", "7"], ["--time-shift", "2"], ["--guidance", "3"]),
        *(["--window", "2"], ["--sink", "1"], ["--seed", "1"], ["--frames", "11"]),
        *(["--samples", "2"], ["--then", "6", "red circle"], ["--given-frames", "2"]),
        *(["--given", "other.gif"], ["--wan", "wan"], ["--wan", "wan", "--negative", "blurry"]),
    ]
    found = [settings(*flags) for flags in [[], *different]]
    copied = here / "run"
    shutil.copytree(random_run, copied)
    found.append(settings(run=copied))
    os.utime(copied / "ckpt.pt", (1, 1))
    found.append(settings(run=copied))
    os.utime("clip.gif", (1, 1))
    found.append(settings())
    assert len({json.dumps(one, sort_keys=True) for one in found}) == len(found)

    for same in (["--out", "x.mp4"], ["--compile"], ["--routing"], ["--overwrite"]):
        assert settings(*same) == settings()
    assert json.loads(json.dumps(settings())) == settings(), "a record reads back as it was"


def test_a_name_given_by_the_user_is_replaced_only_by_the_same_settings(random_run, here):
    call(random_run, "--out", "x.mp4", "--frames", "3")
    before = Path("x.mp4").read_bytes()
    call(random_run, "--out", "x.mp4", "--frames", "3")
    for flags in (["--frames", "4"], ["--frames", "3", "--seed", "1"], ["--eval", "--videos", "1"]):
        with pytest.raises(ValueError, match="x.* exists and .*or --overwrite, would work"):
            call(random_run, "--out", "x.mp4", *flags)
        assert Path("x.mp4").read_bytes() == before
    call(random_run, "--out", "x.mp4", "--frames", "4", "--overwrite")
    assert len(read_video("x.mp4", 8)) == 4
    call(random_run, "--out", "x.mp4", "--frames", "4")


def test_everything_that_decides_a_comparison_is_part_of_its_settings(random_run, tmp_path):
    def settings(*flags, runs=(random_run,)):
        own = [filled(run, "--eval", *flags)[0] for run in runs]
        return sample.comparison_settings(own)

    different = (["--steps", "7"], ["--window", "2"], ["--guidance", "3"], ["--seed", "1"])
    different += (["--frames", "11"], ["--videos", "3"], ["--true-history"])
    found = [settings(*flags) for flags in ([], *different)]
    copied = shutil.copytree(random_run, tmp_path / "run")
    found += [settings(runs=[copied]), settings(runs=[random_run, copied])]
    assert len({json.dumps(one, sort_keys=True) for one in found}) == len(found)
    assert settings("--out", "x.gif") == settings()


def test_another_kind_of_device_makes_another_video(random_run):
    args, _ = filled(random_run)
    cpu = sample.video_settings(args)
    args.device = "cuda:1"
    cuda = sample.video_settings(args)
    args.device = "cuda"
    assert sample.video_settings(args) == cuda != cpu


def test_two_calls_at_once_take_different_names_until_they_end(tmp_path):
    paths = [tmp_path / "x.mp4", tmp_path / "x.png"]
    args = sample.parse([])
    with sample.reserve_files(args, paths, {"seed": 0}) as first:
        with sample.reserve_files(args, paths, {"seed": 1}) as second:
            assert (first, [path.name for path in second]) == (paths, ["x-2.mp4", "x-2.png"])
            second[0].write_bytes(b"video")
        first[0].write_bytes(b"video")
        with sample.reserve_files(args, paths, {"seed": 0}) as again:
            assert again == first, "the same settings make the same files"
    with pytest.raises(ValueError, match="failed"):
        with sample.reserve_files(args, paths, {"seed": 2}):
            raise ValueError("failed")
    names = ["settings.json", "x-2.mp4", "x.mp4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names, "unused names are given up"
    recorded = sample.read_settings(tmp_path)
    assert [recorded[name]["seed"] for name in names[1:]] == [1, 0]


def test_records_that_are_written_at_once_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for n in range(100):
            pool.submit(sample.record_settings, [tmp_path / str(n)], n)
    assert len(sample.read_settings(tmp_path)) == 100


def test_a_sheet_that_cannot_be_written_leaves_the_videos_recorded(random_run, here, monkeypatch):
    def fail(path, picture):
        raise ValueError(f"cannot write {path}: disk full")

    monkeypatch.setattr(sample, "write_picture", fail)
    Path("x.mp4").write_bytes(b"of other settings")
    with pytest.raises(ValueError, match="x.png: disk full"):
        call(random_run, "--out", "x.mp4", "--frames", "3", "--overwrite")
    assert sorted(os.listdir()) == ["clip.gif", "settings.json", "x.mp4"]
    assert sample.read_settings(Path())["x.mp4"]["frames"] == 3


def test_what_cannot_be_written_is_refused_before_it_is_computed(here, monkeypatch):
    run = make_run(here / "run")
    Path("run/samples").touch()
    monkeypatch.setattr(sample, "rollout", None)
    for flags in ([], ["--eval"]):
        with pytest.raises(ValueError, match="samples/new: Not a directory"):
            call(run, "--out", "run/samples/new", *flags)
    Path("out/settings.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot write out/settings.json: "):
        call(run, "--out", "out")
    assert os.listdir("out") == ["settings.json"], "and nothing is left behind"


def test_a_score_file_that_cannot_be_written_costs_no_result(here, capsys):
    run = make_run(here / "run")
    Path("run/samples").touch()
    call(run, "--eval", "--videos", "1", "--out", "x.gif")
    out = capsys.readouterr().out
    assert "Temporal" in out and "warning: cannot write" in out and "eval.json" in out
    assert Path("x.gif").stat().st_size and Path("x.png").stat().st_size


def test_a_number_is_added_until_the_name_is_neither_there_nor_taken(tmp_path):
    path = tmp_path / "x.mp4"
    (tmp_path / "x-2.mp4").touch()
    assert sample.numbered(path, {}, []) == path
    assert sample.numbered(path, {}, [path]) == tmp_path / "x-3.mp4"


def test_frames_go_to_their_own_file_and_small_ones_to_the_sheet():
    video = torch.rand(2, 3, 3, 200, 300)
    files = [[], []]
    small = sample.append_frames([files[0].append, files[1].append], video)
    assert small.shape == (2, 3, 3, 66, 100)
    assert torch.equal(torch.stack([files[0][0], files[1][0]]), video)


def test_compile_reaches_every_run(random_run, here, monkeypatch):
    compiled = []
    monkeypatch.setattr(CausalDiT, "compile_blocks", lambda self: compiled.append(self))
    call(random_run, "--frames", "2", "--out", "a.gif")
    assert not compiled
    call(random_run, "--frames", "2", "--out", "b.gif", "--compile")
    assert len(compiled) == 1


def test_capitals_in_an_ending_make_a_file_and_no_folder(random_run, here):
    call(random_run, "--out", "x.MP4", "--frames", "3")
    assert Path("x.MP4").is_file() and len(read_video("x.MP4", 8)) == 3


def test_several_videos_in_one_named_file_are_numbered(random_run, here):
    call(random_run, "red circle", "", "--out", "x.gif", "--frames", "3")
    assert sorted(path.name for path in here.glob("x*")) == ["x-0.gif", "x-1.gif", "x.png"]


# metrics


def test_eval_continues_two_frames_of_held_out_clips():
    truth, made, scores = evaluate(NoiseModel(), frames=5, videos=3)
    test = Sprites(8, 5, 0, "test", 2)
    assert all(torch.equal(truth[i], test[i][0]) for i in range(3)), "not those of training"
    assert torch.equal(made[:, :2], truth[:, :2])
    assert made.shape == truth.shape and scores.shape == (3, 5, 3)


def test_eval_draws_new_noise_for_every_batch_and_every_frame():
    batch = sample.EVAL_BATCH

    def noise(seed, *shape):
        return torch.randn(*shape, 3, 8, 8, generator=torch.Generator().manual_seed(seed))

    _, made, _ = evaluate(NoiseModel(), 5, batch + 1, seed=9)
    assert torch.equal(made[:batch, 2:], noise(9 + 2, batch, 3))
    assert torch.equal(made[batch:, 2:], noise(9 + batch + 2, 1, 3))

    _, made, _ = evaluate(NoiseModel(), 5, batch + 1, seed=9, true_history=True)
    for n in (2, 3, 4):
        assert torch.equal(made[:batch, [n]], noise(9 + n, batch, 1))
        assert torch.equal(made[batch:, [n]], noise(9 + batch + n, 1, 1))


def test_the_first_frame_from_nothing_has_steps_of_its_own():
    """And a rollout of its own, whose frame becomes the history of the rest."""
    c = torch.zeros(1, 5, 20)
    for given, first_steps, passes in ((0, 5, 5 + 2 * 2), (0, None, 3 * 2), (1, 5, 2 * 2)):
        model = NoiseModel()
        start = torch.zeros(1, given, 3, 8, 8)
        made = list(sample.generate(model, [(0, c)], start, 3, 2, first_steps=first_steps))
        assert len(made) == 3 - given and len(model.histories) == passes
    model = NoiseModel()
    other = c + 1
    texts = [(0, c), (1, other)]
    made = list(sample.generate(model, texts, torch.zeros(1, 0, 3, 8, 8), 3, 2, first_steps=5))
    assert len(made) == 3 and torch.equal(model.histories[5], made[0])


def test_eval_from_nothing_gives_no_frame():
    truth, made, scores = evaluate(NoiseModel(), frames=5, videos=3, given=0)
    assert made.shape == truth.shape and not torch.equal(made[:, 0], truth[:, 0])
    assert not (made == truth).flatten(1).all(1).any() and scores[:, 0, 2].isfinite().all()


def test_a_bidirectional_model_is_evaluated_from_nothing(tmp_path, capsys):
    """Its one chunk is the whole clip, so that none of it can be given."""
    run = make_run(tmp_path / "run", {"chunk": 4})
    flags = ["--eval", "--checkpoint", str(run), "--frames", "4", "--videos", "2"]
    with pytest.raises(ValueError, match="the first two frames of 4 are given; 12 or more"):
        sample.main(flags)
    sample.main([*flags, "--from-nothing"])
    assert "4 frames, the first 0 given" in capsys.readouterr().out


def test_each_kind_of_history_has_its_own_scores(random_run):
    names = []
    for flags in ([], ["--true-history"], ["--from-nothing"]):
        args = sample.parse(["--eval", *flags])
        sample.check_flags(args)
        names.append(sample.scores_file(random_run, args).name)
    assert names == ["eval.json", "true-history.json", "from-nothing.json"]


def test_frames_that_are_not_finite_are_refused():
    model = NoiseModel()
    model.forward = lambda x, *rest: x * torch.nan
    with pytest.raises(ValueError, match="the model's frames are not finite"):
        evaluate(model)


def test_on_true_history_each_frame_continues_the_truth():
    for window in (3, None):
        model = NoiseModel()
        truth, made, _ = evaluate(model, frames=6, window=window, true_history=True)
        for n, history in enumerate(model.histories, 2):
            assert torch.equal(history, truth[:, max(0, n - (window or n)) : n])
        assert len(model.histories) == 4 and made.shape == truth.shape


def test_the_table_has_means_and_standard_errors_by_thirds():
    scores = torch.zeros(4, 6, 3)  # (B, T, [visual, temporal, text])
    scores[:, :2, 0] = 10.0
    scores[:, 2:4, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    scores[:, 4:, 2] = torch.tensor([[8.0, torch.nan]] * 4)
    lines = sample.metrics_table(scores).splitlines()
    assert lines[0].split() == ["frames", "Temporal", "Visual", "Text"]
    assert lines[1].split() == "0-1 0.00 ± 0.00 10.00 ± 0.00 0.00 ± 0.00".split()
    assert lines[2].split() == "2-3 2.50 ± 0.65 0.00 ± 0.00 0.00 ± 0.00".split()
    assert lines[3].split() == "4-5 0.00 ± 0.00 0.00 ± 0.00 8.00 ± 0.00".split()
    assert lines[4].split() == "0-5 0.83 ± 0.22 3.33 ± 0.00 1.60 ± 0.00".split()
    rows = sample.metrics_table(scores, parts=2).splitlines()
    assert [row.split()[0] for row in rows] == ["frames", "0-2", "3-5", "0-5"]
    with pytest.raises(ValueError, match="--parts 7: wanted at most one for each of 6 frames"):
        sample.metrics_table(scores, parts=7)


def test_a_single_row_has_no_standard_error():
    line = sample.metrics_table(torch.ones(1, 3, 3)).splitlines()[1]
    assert line.split() == "0-0 1.00 ± - 1.00 ± - 1.00 ± -".split()


def test_scores_that_were_not_saved_are_missed_by_their_path():
    for flags, name in (([], "eval.json"), (["--true-history"], "true-history.json")):
        with pytest.raises(ValueError, match=f"no nowhere/samples/{name}; python sample.py --eval"):
            sample.main(["--table", "nowhere", *flags])


def test_evaluations_are_written_compared_and_gathered(random_run, tmp_path, capsys):
    runs = [str(shutil.copytree(random_run, tmp_path / name)) for name in ("toy-0", "toy-1")]
    flags = ["--videos", "2", "--frames", "9", *FLAGS]
    sample.main(["--compare", *runs, *flags, "--out", str(tmp_path / "both.gif")])
    out = capsys.readouterr().out
    assert out.count("2 held-out videos, 9 frames, the first 2 given, window 3, 1 steps\n") == 2
    assert iio.imread(tmp_path / "both.gif").shape[0] == 9 and (tmp_path / "both.png").exists()
    sheet = iio.imread(tmp_path / "both.png")[16:, 96:]  # below the numbers, right of the labels
    truth, one, other = np.split(sheet, 6)[:3]
    assert (one == other).all() and (truth != one).any(), "two runs of one model, below the truth"
    saved = json.loads((tmp_path / "toy-1/samples/eval.json").read_text())
    assert np.array(saved["frames"]).shape == (9, 3) and saved["args"]["videos"] == 2

    sample.main(["--table", *runs])
    table = capsys.readouterr().out
    assert re.search(r"toy, 2 seeds\n.*\n +0-2 .*± +0.00", table), "the same weights, so no spread"
    assert re.findall(r"(\S+) ±", table) == re.findall(r"(\S+) ±", out)[:12], "as --eval printed"

    sample.main(["--eval", "--true-history", "--checkpoint", runs[0], *flags])
    assert "on true history" in capsys.readouterr().out
    assert (tmp_path / "toy-0/samples/eval.gif").exists()
    sample.main(["--true-history", "--table", runs[0]])
    assert "toy, 1 seed\n" in capsys.readouterr().out


def test_eval_passes_its_flags_on_and_replaces_its_own_picture(here, monkeypatch):
    run = make_run(here / "run")
    calls = []

    def spy(model, frames, videos, **options):
        calls.append((frames, videos, options))
        return torch.zeros(1, 5, 3, 8, 8), torch.ones(1, 5, 3, 8, 8), torch.zeros(1, 5, 3)

    monkeypatch.setattr(sample, "evaluate", spy)
    flags = ["--eval", "--frames", "5", "--videos", "7", "--window", "2"]
    flags += ["--seed", "3", "--guidance", "4", "--time-shift", "6", "--out", "x.gif"]
    for _ in range(2):
        call(run, *flags, "--true-history")
    options = {
        "steps": 1,
        "first_steps": 16,
        "time_shift": 6.0,
        "guidance": 4.0,
        "window": 2,
        "sink": 0,
        "seed": 3,
    }
    assert calls == [(5, 7, options | {"true_history": True, "given": 2})] * 2
    with pytest.raises(ValueError, match="x.gif exists and was made with other settings"):
        call(run, *flags)


def test_tables_of_other_lengths_or_other_files_are_refused(tmp_path):
    paths = [tmp_path / f"toy-{seed}/samples/eval.json" for seed in (0, 1)]
    for path, frames in zip(paths, (9, 18)):
        sample.save_scores(path, {"seed": 1}, torch.ones(2, frames, 3))
    runs = [str(path.parent.parent) for path in paths]
    with pytest.raises(ValueError, match="the seeds of toy have 9, 18 frames; wanted the same"):
        sample.main(["--table", *runs])
    deep = "[" * 10**5
    for content in ('{"frames', "{}", '{"frames": 3}', "[]", '{"frames": [[1, 2]]}', deep):
        paths[0].write_text(content)
        with pytest.raises(ValueError, match="toy-0/samples/eval.json is not a score file"):
            sample.main(["--table", *runs])


def test_runs_are_compared_in_one_world_and_named_apart(random_run, tmp_path):
    wall = make_run(tmp_path / "wall", wall=True)
    with pytest.raises(ValueError, match="these runs were trained on different sprites"):
        sample.main(["--compare", str(random_run), str(wall), *FLAGS])
    assert not (wall / "samples").exists()
    for folders, names in (
        (("a/x", "a/y"), ["x", "y"]),
        (("a/x", "b/x"), [str(tmp_path / "a/x"), str(tmp_path / "b/x")]),
    ):
        runs = [tmp_path / folder for folder in folders]
        for run in runs:
            run.mkdir(parents=True, exist_ok=True)
        args = [sample.argparse.Namespace(checkpoint=run) for run in runs]
        assert sample.row_names(args) == names


# pictures


def test_a_comparison_has_a_row_for_each_name_and_pads_with_white(tmp_path):
    long = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(2, 3, 3, 8, 8)
    videos = {"long": long, "short": -torch.ones(2, 1, 3, 8, 8)}
    sample.write_comparison(tmp_path / "two", videos, 8)
    gif = iio.imread(tmp_path / "two.gif")[..., :3]  # (T, height, width, 3)
    assert (gif[0, :20] != gif[1, :20]).any(), "a frame counter is above"
    gif = gif[:, 20:]
    half = gif.shape[1] // 2
    inside = np.s_[10 : half - 10, 106:150]  # of the first video, right of its label
    assert len(gif) == 3
    for t, (upper, lower) in enumerate(((0, 0), (128, 255), (255, 255))):
        assert (gif[t, :half][inside] == upper).all()
        assert (gif[t, half:][inside] == lower).all()
    assert (tmp_path / "two.png").exists()
    small = iio.imread(tmp_path / "two.png")
    sample.write_comparison(tmp_path / "large", videos, 8, ["a", "b"], columns=2, height=128)
    large = iio.imread(tmp_path / "large.png")
    assert large.shape[0] > 1.8 * small.shape[0], "four rows of 130 pixels, not of 66"
    assert (large[:130, :96] != large[260:390, :96]).any(), "a: long, b: long"
    sample.write_comparison(tmp_path / "latents", {"one": torch.randn(1, 2, 4, 40, 40)}, 8)


def test_few_colours_shared_by_all_frames_are_near_the_true_ones():
    clip, _ = Sprites(32, 20)[0]
    frames = to_bytes(clip + 0.02 * torch.randn_like(clip))
    few = sample.reduce_colours(frames, 32)
    assert few.shape == frames.shape and len(np.unique(few.reshape(-1, 3), axis=0)) <= 32
    assert np.abs(few.astype(int) - to_bytes(clip)).mean() < 3, "rounding to steps of 32: 8"


def test_a_contact_sheet_shows_time_from_left_to_right():
    video = torch.linspace(-1, 1, 9)[:, None, None, None].expand(9, 3, 8, 8)
    sheet = sample.contact_sheet([video, video], columns=3, height=16)
    assert sheet.shape == (36, 54, 3), "two rows of three frames of 16 pixels, framed by one"
    assert [int(sheet[8, x, 0]) for x in (8, 26, 44)] == [0, 128, 255]
    assert sample.contact_sheet([video], 3, ["red"], 16).shape == (16 + 18, 54 + 96, 3), "numbers"
    shorter = sample.contact_sheet([video, video[:2]], 2, ["red", "blue"], 16)
    assert shorter.shape == (36, 36 + 96, 3), "none where the frames differ"


# routing


def test_recorded_routing_is_what_attention_picks(random_run, monkeypatch):
    net = load_checkpoint(random_run)
    pick, calls = routing.pick, []

    def spy(*args):
        calls.append(pick(*args))
        return calls[-1]

    monkeypatch.setattr(routing, "pick", spy)
    shares = [[], []]
    given = torch.rand(1, 1, 3, 8, 8)
    c = torch.zeros(1, 5, 20)
    with sample.record_routing(net, shares, 1):
        list(sample.generate(net, [(0, c)], given, 7, 1, window=4, sink=1))
    passes = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(passes) == 6 * 2, "six frames, two layers; attention, then the recorder"
    assert not passes[0][0][1].all(), "the first has but one frame to pick"
    for (picked, valid), again in passes:
        assert torch.equal(picked, again[0]) and torch.equal(valid, again[1])

    for i, (picked, valid) in enumerate(first for first, _ in passes):
        share = shares[i % 2][i // 2]
        last = picked[:, :, -1][valid[:, :, -1]]
        tokens = picked[:, :, -1, :, 0].numel()
        for column in range(len(share)):
            assert share[column] == (last == column).sum() / tokens

    calls.clear()
    list(sample.generate(net, [(0, c)], given, 2, 1))
    assert len(calls) == 2, "outside, nothing is recorded"


def test_routing_leaves_out_the_unconditional_branch(random_run):
    """It is the second half of the batch."""
    net = load_checkpoint(random_run)
    torch.manual_seed(0)
    x, history = torch.randn(2, 1, 3, 8, 8), torch.randn(2, 5, 3, 8, 8)
    t, c = torch.rand(2, 1), torch.randn(2, 5, net.config.text_dim)
    recorded = []
    for batch in (1, 2):
        shares = [[], []]
        with sample.record_routing(net, shares, 1):
            net(x[:batch], t[:batch], c[:batch], history[:batch], net.cache(batch, 6), first=5)
        recorded.append([layer[0].tolist() for layer in shares])
    assert recorded[0] == recorded[1] and sum(recorded[0][1]) > 1


def test_routing_is_printed_and_drawn(random_run, tmp_path, capsys):
    flags = ["--routing", "--frames", "6", "--window", "0", "--out", str(tmp_path)]
    call(random_run, *flags, "--steps", "2")
    out = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in out if line.strip().startswith(("layer", "mean"))]
    assert [row[:-5] for row in rows] == [["layer", "0"], ["layer", "1"], ["mean"]]
    layers = np.array([[float(z) for z in row[-5:]] for row in rows])
    assert (abs(layers.sum(1) - 2) < 0.03).all(), "each token picks top_k frames"
    assert abs(layers[:2].mean(0) - layers[2]).max() < 0.02
    assert "   frame    0    1    2    3    4" in out
    assert iio.imread(tmp_path / "routing.png").ndim == 3


def test_history_frames_have_their_own_numbers_under_a_window():
    assert sample.history_frames(6, 5, 0) == [0, 1, 2, 3, 4]
    assert sample.history_frames(11, 4, 0) == [6, 7, 8, 9]
    assert sample.history_frames(11, 4, 1) == [0, 7, 8, 9]


def test_the_routing_picture_is_yellow_where_all_pick_and_black_where_none_do():
    page = sample.draw_routing([[0.0, 1.0], [1.0, 0.0]], ["layer 0", "mean"], [0, 1])
    corners = [
        [tuple(page[47 + 24 * row, 67 + 36 * column]) for column in (0, 1)] for row in (0, 1)
    ]
    yellow, black = (255, 217, 51), (0, 0, 0)
    assert corners == [[black, yellow], [yellow, black]]
    wider = sample.draw_routing([[0.0] * 5] * 2, ["layer 0", "mean"], range(5))
    assert wider.shape[1] - page.shape[1] == 3 * 36, "a column for each frame"
    assert (page[:44] < 100).any() and (page[44:, :60] < 100).any(), "both axes are labelled"


# speed


def test_the_time_of_a_frame_is_printed_by_its_number(capsys):
    seconds = [0.9] * 20 + [0.01] * 40 + [0.02] * 40
    flags = ["--steps", "4", "--first-steps", "16", "--guidance", "1", "--device", "cpu"]
    args = sample.parse(flags)
    sample.print_speed(args, "100 frames", 100, seconds, [0.0] * 100)
    out = capsys.readouterr().out
    assert out.startswith(
        "5.2 frames per second: 100 frames in 19.2 s, 4 steps each and 16 the first"
    )
    args.given = "clip.mp4"
    sample.print_speed(args, "100 frames", 100, seconds, [0.0] * 100)
    given = capsys.readouterr().out
    assert given.startswith("5.2 frames per second: 100 frames in 19.2 s, 4 steps each, writing")
    quarters = "10.0 ms (21 to 40), 10.0 ms (41 to 60), 20.0 ms (61 to 80), 20.0 ms (81 to 100)"
    assert f"median time of a frame: {quarters}\n" in out
    args = sample.parse(["--steps", "4", "--first-steps", "4", "--guidance", "5", "--wan", "WAN"])
    sample.print_speed(args, "3 frames", 3, [0.5] * 3, [1.0] * 3)
    out = capsys.readouterr().out
    assert "2.0 frames per second" in out and "guidance counted" in out
    assert "; 0.7 with the VAE's decoding" in out


# ---- results/rivals.py: the principles of Table 1's other rows ----


class Gauss:
    """The exact v of clips whose every value is N(mean, std^2)."""

    def __init__(self, mean, std=0.5):
        self.mean = mean
        self.std = std

    def __call__(self, x_t, t):
        t = t[..., None, None, None]
        gain = (1 - t) * self.std**2 / ((1 - t) ** 2 * self.std**2 + t**2)
        clean = self.mean + gain * (x_t - (1 - t) * self.mean)
        return (x_t - clean) / t


def dmd_gradient(student, real, fake):
    """The mean gradient of DMD's loss to clips of a Gaussian student, times their number."""
    torch.manual_seed(0)
    clips = student.mean + student.std * torch.randn(256, 1, 3, 4, 4)
    clips.requires_grad_()
    t = 0.02 + 0.96 * torch.rand(256, 1)
    rivals.dmd_loss(clips, t, torch.randn_like(clips), real, fake).backward()
    return clips.grad * clips.numel()


def test_dmd_moves_the_student_to_the_data():
    data, student = Gauss(1.0), Gauss(-0.5)
    ahead = dmd_gradient(student, data, student)
    assert ahead.mean() < -0.3, "descent raises -0.5 to 1"
    assert dmd_gradient(data, student, data).mean() > 0.3
    near = dmd_gradient(Gauss(0.9), data, Gauss(0.9))
    assert abs(near.mean()) < abs(ahead.mean()) / 3, "the nearer, the smaller"
    assert (dmd_gradient(data, data, data) == 0).all()

    wide, narrow = Gauss(1.0, 0.8), Gauss(1.0, 0.3)
    torch.manual_seed(0)
    outward = narrow.mean + narrow.std * torch.randn(256, 1, 3, 4, 4) - 1
    gradient = dmd_gradient(narrow, wide, narrow)
    assert (gradient * outward).mean() < 0, "it also spreads a student that is too narrow"


class Noise:
    """`rand` and `randn` of one seed, whatever the default generator does."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def rand(self, *shape, device=None, dtype=None):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def randn(self, *shape, device=None, dtype=None):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


@pytest.mark.parametrize("last_step", [0, 1, 3])
@pytest.mark.parametrize("window, sink", [(9, 0), (3, 1)])
def test_a_students_gradient_comes_from_its_last_pass_alone(last_step, window, sink):
    """The same frames as without a gradient, and the same gradient if another network, of equal
    weights, makes all the passes before."""
    net, (x, noise, _, c) = tiny(), clip()
    twin = copy.deepcopy(net)
    times = rivals.solver_times(5.0)
    graded = []

    def frames(model):
        cache = rivals.FrozenCache(net.config, 2, window, sink)
        x_1 = noise[:, 2:]
        made = rivals.student_frames(model, times, x_1, c, x[:, :2], cache, 2, last_step, Noise())
        return torch.cat(list(made), 1)

    def split(x, t, c, history, cache, first):
        if not torch.is_grad_enabled():
            return twin(x, t, c, history, cache, first)
        assert history is None
        graded.append((first, t[0, 0].item()))
        return net(x, t, c, history, cache, first)

    with torch.no_grad():
        wanted = frames(net)
    gradients = []
    for model in (net, split):
        made = frames(model)
        assert close(made, wanted)
        net.zero_grad()
        made.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})
    level = times[last_step].item()
    assert graded == [(first, level) for first in range(2, 6)], "one pass a frame"
    assert all(close(z, gradients[1][name], 1e-9) for name, z in gradients[0].items())
    assert all(z.abs().max() > 0 for z in gradients[0].values())
    assert all(p.grad is None for p in twin.parameters())


def test_levels_of_diffusion_forcing():
    """SkyReels-V2's never fall along time, reach from 0 to 1 in every frame, and are seldom so low
    that a network which predicts the clean frame has nothing to learn."""
    torch.manual_seed(0)
    levels = rivals.non_decreasing_levels(4000, 5, torch)
    assert (levels.diff(dim=1) >= 0).all() and (levels.min() >= 0) and (levels.max() <= 1)
    assert (levels.min(0).values < 0.05).all() and (levels.max(0).values > 0.95).all()
    assert (levels < model_py.LEAST_T).float().mean() < 0.02
    assert levels.std(1).min() < 0.1 < levels.std(1).max()


def test_the_pipeline_is_trained_on_the_levels_of_its_rollout():
    """A frame that is learned has the level that its place gives it, and sees what a rollout shows
    it: a ramp as steep as the rollout's, at first with clean frames right before a noisy one."""
    S = rivals.STEPS
    torch.manual_seed(0)
    levels = rivals.pipeline_levels(4000, 10, torch)
    assert (levels.diff(dim=1) >= 0).all() and (levels[:, 0] == 0).all()
    inside = (levels[:, 1:] < 1) & (levels[:, :-1] > 0)
    rise = levels.diff(dim=1)[inside]
    assert close(rise, torch.full_like(rise, 1 / S), 1e-5)
    assert ((levels[:, :2] == 0).all(1) & (levels[:, 2] == 1)).any(), "a rollout's first pass"

    noisy = (levels > 0).sum(1)
    first = levels.gather(1, 10 - noisy[:, None])[:, 0]  # the level of the first noisy frame
    begun = first > 1 / S
    assert 0.3 < begun.float().mean() < 0.45, "four in ten have just begun"
    assert ((noisy[first < 1 / S]) >= S).all(), "a steady pipeline is in the clip as a whole"


def test_a_frame_behind_pure_noise_is_not_learned():
    net, (x, _, t, c) = tiny(), clip()
    t[:] = torch.tensor([0, 0.03, 0.5, 1, 1, 1])  # nor one below LEAST_T
    loss = rivals.diffusion_forcing_loss(net, x, c, t, Noise())
    eps = Noise().randn(*x.shape)
    x_t = add_noise(x, eps, t)
    v = net(x_t, t, c, x_t[:, :-1], history_t=t[:, :-1])
    assert close(loss, (v - (eps - x))[:, 2:4].square().mean())


def test_diffusion_forcing_without_noise_in_the_history_is_teacher_forcing():
    """Only the last frame is noisy: its loss is that of Eq. (4) on the true history."""
    net, (x, _, t, c) = tiny(), clip()
    t[:, :-1] = 0
    loss = rivals.diffusion_forcing_loss(net, x, c, t, Noise())
    eps = Noise().randn(*x.shape)
    v = net(add_noise(x, eps, t), t, c, x[:, :-1])
    assert close(loss, (v - (eps - x))[:, -1].square().mean())
    noisier = t.clone()
    noisier[:, 2] = 0.5
    changed = rivals.diffusion_forcing_loss(net, x, c, noisier, Noise())
    assert not close(changed, loss, 1e-3)


def test_the_pipeline_finishes_a_frame_a_pass():
    """Four frames are in flight, each one solver step ahead of the next; no frame sees more of
    the past than in training, and each starts from its own noise."""
    net = Recorder()
    given, c = torch.zeros(2, 2, 3, 4, 4), torch.zeros(2, 1, 5)

    def called(x, t, c, history, cache, first, history_t):
        net.calls.append((x, t, history, history_t, first))
        return torch.zeros_like(x)

    called.run = {"time_shift": 3.0, "frames": 10}
    called.config = tiny().config
    frames = list(rivals.magi_rollout(called, given, c, frames=16, seed=0))
    assert len(frames) == 14 and len(net.calls) == 14 + rivals.STEPS - 1
    times = rivals.solver_times(3.0)
    x, t, history, history_t, first = net.calls[8]
    assert x.shape[1] == rivals.STEPS and torch.equal(t[0], times[:-1].flip(0))
    assert history.shape[1] == first + rivals.STEPS - 1 == 9
    assert torch.equal(history[:2, first:], x[:2, :-1])
    assert torch.equal(history_t[0, first:], t[0, :-1]) and (history_t[:, :first] == 0).all()
    assert not close(frames[0], frames[1], 0.1)


def test_the_pipelines_frames_are_a_rollouts_where_history_does_not_matter():
    """With v that depends on a frame alone, order of work cannot change the result."""
    c = torch.zeros(2, 1, 5)

    def alone(x, t, c, history=None, cache=None, first=0, history_t=None):
        return x.tanh() * t[..., None, None, None]

    alone.run = {"time_shift": 3.0, "frames": 10}
    alone.config = tiny().config
    made = torch.cat(list(rivals.magi_rollout(alone, torch.zeros(2, 2, 3, 4, 4), c, 9, 0)), 1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.cat([torch.randn(2, 1, 3, 4, 4, generator=generator) for _ in range(7)], 1)
    x = noise
    times = rivals.solver_times(3.0)
    for now, after in pairwise(times):
        x = x + (after - now) * x.tanh() * now
    assert close(made, x, 1e-6)


def test_both_branches_of_guidance_see_one_noisy_history():
    """SkyReels-V2's, at the level that the network is told; its noise is not a new frame's."""
    seen = []

    def called(x, t, c, history=None, cache=None, first=0, history_t=None):
        if history is not None:
            seen.append((x, history, history_t))
        return torch.zeros_like(x)

    called.cache = Recorder().cache
    called.run = {"frames": 10}
    called.config = tiny().config
    given = torch.zeros(2, 2, 3, 4, 4)
    list(rivals.skyreels_rollout(called, given, torch.ones(2, 1, 5), 6, seed=0))
    assert len(seen) == 4, "each frame's history is read once"
    for _, history, history_t in seen:
        assert len(history) == 4 and torch.equal(history[:2], history[2:])
        assert (history_t == 0.02).all()
    x, history, _ = seen[0]
    assert close(history.std(), torch.tensor(0.02), 0.005)
    assert not close(history[0, 0] / 0.02, x[0, 0], 0.1)


@pytest.mark.parametrize("method", rivals.DISTILLED)
def test_a_student_is_sampled_at_the_levels_of_its_training(method, table_1):
    flags = f"{method} --init x --teacher {table_1}/real-0 --out x --student-shift 2"
    run = rivals.parse(flags.split())
    run.frames, run.time_shift = 6, 3.0
    net = load_checkpoint(table_1 / "warm-0").requires_grad_(True)
    net.run = {"frames": 6, "student_shift": 2.0}
    x, c = (torch.stack(z) for z in zip(*(Sprites(8, 6)[i] for i in range(2))))
    levels = set()

    class Watched:
        config = net.config
        run = net.run

        def __call__(self, x, t, *args, **options):
            levels.update(t.flatten().tolist())
            return net(x, t, *args, **options)

    with torch.no_grad():
        list(rivals.ROLLOUTS[method](Watched(), x[:, :2], c, 8, seed=0))
    assert levels == set(rivals.solver_times(2.0)[:-1].tolist())
    sampled, levels = levels, set()
    method = rivals.METHODS[method](run)
    for seed in range(20):
        method.student_clips(Watched(), x, c, train.ClipNoise(seed, [0, 1], "cpu"))
    assert levels - {0.0} == sampled


def test_an_error_bank_adds_residuals_to_nine_clips_of_ten():
    bank = rivals.ErrorBank(time_shift=1.0)
    x = torch.randn(200, 3, 2, 4, 4)
    assert torch.equal(bank.history(x, torch), x), "at first it is empty"
    bank.errors = 1.0 + torch.arange(8.0)[:, None, None, None].expand(8, 2, 4, 4)
    added = (bank.history(x, torch) - x)[:, :, 0, 0, 0].round()
    spoiled = (added > 0).all(1)
    assert ((added == 0).all(1) | spoiled).all() and 0.83 < spoiled.float().mean() < 0.96
    assert len(added[spoiled].unique()) == 8

    net, (x, _, _, c) = tiny(), clip()
    bank = rivals.ErrorBank(time_shift=1.0, size=15)
    for _ in range(2):
        bank.loss(net, x, c, 0, Noise()).backward()
    assert bank.errors.shape == (15, 2, 4, 6) and not bank.errors.requires_grad
    model = rivals.Remember(net)
    flow_matching_loss(model, x, c, x[:, :-1], 1.0, Noise(5))
    eps_t = Noise(5)
    t = shift(eps_t.randn(2, 6).sigmoid(), 1.0)
    x_t = add_noise(x, eps_t.randn(*x.shape), t)
    v = net(x_t, t, c, x[:, :-1])
    assert close(model.clean, x_t - t[..., None, None, None] * v)


def test_recycling_reuses_the_clean_estimate_of_the_step_before():
    net, (x, _, _, c) = tiny(), clip()
    seen = []

    def watched(x, t, c, history):
        seen.append(history)
        return net(x, t, c, history)

    method = rivals.Recycle(time_shift=1.0, times=3)
    cleans = []
    for step in range(4):
        method.loss(watched, x + step, c, step, Noise(step))
        cleans.append(method.clean)
    assert torch.equal(seen[0], x[:, :-1]), "new clips begin with the truth"
    assert torch.equal(seen[1], cleans[0][:, :-1]) and torch.equal(seen[2], cleans[1][:, :-1])
    assert torch.equal(seen[3], (x + 3)[:, :-1])


@pytest.fixture(scope="module")
def table_1(tmp_path_factory):
    """A warm-up and a bidirectional teacher, both of a few steps."""
    folder = tmp_path_factory.mktemp("table-1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "report", lambda *args: None)
        patch.setattr(train, "log_samples", lambda *args: None)
        flags = ["--history", "teacher", "--steps", "3", "--warmup", "3", "--frames", "6"]
        train.main([*TINY, *flags, "--out", str(folder / "warm-0")])
        train.main([*TINY, *flags, "--chunk", "6", "--out", str(folder / "real-0")])
    return folder


@pytest.mark.parametrize("method", rivals.METHODS)
def test_a_rival_is_trained_and_measured(method, table_1, capsys):
    command = f"{method} --init {table_1}/warm-0 --out {table_1}/{method}-0 --steps 6"
    if method in rivals.DISTILLED:
        command += f" --teacher {table_1}/real-0 --lr 1e-3"
    rivals.main(command.split())
    before, after = checkpoint_of(table_1 / "warm-0"), checkpoint_of(table_1 / f"{method}-0")
    moved = [not torch.equal(before["ema"][name], z) for name, z in after["model"].items()]
    assert all(moved) and after["config"] == before["config"]

    path = table_1 / f"{method}.json"
    command = f"measure {path} {table_1}/{method}-0 --frames 8 --videos 2".split()
    evidence.main(command)
    row = json.loads(path.read_text())[method]["0"]
    assert np.array(row["frames"]).shape == (8, 3) and np.array(row["errors"]).shape == (4, 3)
    assert (row["teacher_minutes"] > 0) == (method in rivals.DISTILLED)
    assert re.search(rf"^{method} ", capsys.readouterr().out, re.M)
    written = path.stat().st_mtime_ns
    evidence.main(command)
    assert path.stat().st_mtime_ns == written, "a killed one goes on"

    picture = f"strip {table_1}/strip.png {table_1}/{method}-0 --clip"
    evidence.main(f"{picture} 1 --labels made".split())
    assert (table_1 / "strip.png").exists()
    with pytest.raises(ValueError, match="holds clips 0 to 1"):
        evidence.main(f"{picture} 2".split())
    with pytest.raises(ValueError, match="2 --labels for 1 runs"):
        evidence.main(f"{picture} 1 --labels a b".split())

    evidence.main(f"time {path} {table_1}/{method}-0".split())
    row = json.loads(path.read_text())[method]["0"]
    passes = {"magi": 2 * 33 / 30} | dict.fromkeys(rivals.DISTILLED, 4)  # guidance doubles
    assert row["passes"] == pytest.approx(passes.get(method, 8), abs=0.01)
    assert row["milliseconds"] > 0


def test_the_defaults_of_a_rival_are_those_of_the_table(table_1):
    """table-1.sh gives no flags: a rate, EMA, levels and momentum for each kind of row."""
    wanted = {"causvid": (2e-4, 0.99, 1.0), "longlive": (2e-4, 0.99, 10.0)}
    for method in rivals.METHODS:
        run = rivals.parse(f"{method} --init x --out x --teacher {table_1}/real-0".split())
        known = wanted["causvid" if method == "causvid" else "longlive"]
        assert run.fake_lr == 2e-4 and run.steps == 1800
        if method not in rivals.DISTILLED:
            assert (run.lr, run.muon_lr, run.ema) == (5e-3, 0.015, None)
            continue
        assert (run.lr, run.ema, run.student_shift) == known
        run.frames, run.time_shift = 6, 3.0
        [group] = rivals.METHODS[method](run).optimizer.param_groups
        assert group["betas"] == (0.9 if method == "causvid" else 0.0, 0.999)


def test_the_fake_model_learns_at_every_step_and_the_student_at_every_fifth(table_1):
    """A fake model that stays the teacher gives a gradient of zero without guidance."""
    flags = f"self-forcing --init {table_1}/warm-0 --out x --fake-lr 1e-3 --teacher-guidance 1"
    run = rivals.parse(flags.split())
    run.frames, run.time_shift = 6, 3.0
    method = rivals.SelfForcing(table_1 / "real-0", run)
    net = load_checkpoint(table_1 / "warm-0").requires_grad_(True)
    x, c = (torch.stack(z) for z in zip(*(Sprites(8, 6)[i] for i in range(2))))
    real = copy.deepcopy(method.real.state_dict())
    for step in range(6):
        before = copy.deepcopy(method.fake.state_dict())
        loss = method.loss(net, x, c, step, train.ClipNoise(0, [2 * step, 2 * step + 1], "cpu"))
        assert (loss is not None) == (step in (0, 5))
        assert not same(before, method.fake.state_dict()), "it learns at every step"
        assert loss is None or loss > 0
    assert same(real, method.real.state_dict())


def test_rivals_refuse_in_one_line(table_1):
    init = f"--init {table_1}/warm-0"
    shutil.copytree(table_1 / "warm-0", table_1 / "short-0")
    short = checkpoint_of(table_1 / "short-0")
    short["args"]["frames"] = 4
    torch.save(short, table_1 / "short-0" / "ckpt.pt")
    for command, message in [
        (f"magi {init} --out {table_1}", "exists; name a new folder"),
        (f"causvid {init} --out {table_1}/x", "--teacher goes with"),
        (f"magi {init} --out {table_1}/x --teacher {table_1}/real-0", "only them"),
        (f"causvid {init} --out {table_1}/x --teacher {table_1}/warm-0", "one chunk"),
        (f"magi --init {table_1}/nothing --out {table_1}/x", "nothing"),
        (f"magi --init {table_1}/short-0 --out {table_1}/x", "clips of 4 frames; wanted more than"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            rivals.main(command.split())
        assert "\n" not in str(error.value)
    assert not (table_1 / "x").exists()


# ---- results/evidence.py ----


def measured_rows():
    """Two rows of 12 frames, one of them with two seeds."""
    frames = [[float(T), 50.0, 100.0] for T in range(12)]
    higher = [[z + 2 for z in row] for row in frames]
    errors = [[1.0, 2.0, 3.0]] * 4
    cost = {"minutes": 5.0, "teacher_minutes": 0, "passes": 8.0, "milliseconds": 20.0}
    one = {"frames": frames, "errors": errors} | cost
    return {"a": {"0": one, "1": one | {"frames": higher, "minutes": 7.0}}, "b": {"0": one}}


def test_the_tables_are_means_and_errors_over_the_seeds():
    means, errors = evidence.means_and_errors(measured_rows()["a"])
    assert torch.allclose(means[:, 0], torch.tensor([2.5, 6.5, 10.5, 6.5]))
    assert torch.allclose(errors[:3], torch.ones(3, 3)), "of 2 seeds that differ by 2"
    _, errors = evidence.means_and_errors(measured_rows()["b"])
    assert torch.equal(errors[0], torch.tensor([1.0, 2.0, 3.0])), "one seed: over its videos"

    thirds = evidence.thirds_table(measured_rows()).splitlines()
    assert thirds[2].split() == ["frames"] + ["0-3", "4-7", "8-11"] * 3
    temporal, visual = ["51.0", "±", "1.0"] * 3, ["2.5", "±", "1.0", "6.5", "±", "1.0"]
    assert thirds[3].replace("±", " ± ").split()[:16] == ["a", *temporal, *visual]
    assert (
        evidence.costs_table(measured_rows()).splitlines()[2] == "| a | 2 | 6.0 | - | 8.00 | 20.0 |"
    )
    assert "| b | 50.0 ± 2.0 | 5.5 ± 1.0 | 100.0 ± 3.0 | 50 / 10 / 100 |" in (
        evidence.overall_table(measured_rows())
    )

    rows = measured_rows()
    rows["b"]["0"]["true_history"] = [[2.0 * z for z in row] for row in rows["b"]["0"]["frames"]]
    wanted = "| b | 100 / 3 / 200 | 50 / 2 / 100 | 100 / 19 / 200 | 50 / 10 / 100 | 50 / 10 / 100 |"
    assert evidence.bias_table({"b": rows["b"]}).splitlines()[2] == wanted

    rows["b"]["1"] = rows["a"]["1"] | {
        "frames": [[z - 2 for z in f] for f in rows["a"]["1"]["frames"]]
    }
    wanted = "| b | +1.0 ± 1.0 | +1.0 ± 1.0 | +1.0 ± 1.0 |"
    assert evidence.lead_table({"b": rows["b"], "a": rows["a"]}).splitlines()[2] == wanted


def test_a_table_shows_the_named_rows_under_their_labels(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text(json.dumps(measured_rows()))
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    page = evidence.redraw("<!-- overall x: b=second a -->\nold\n<!-- end -->\nrest")
    names = [line.split("|")[1].strip() for line in page.splitlines()[3:5]]
    assert names == ["second", "a"]
    assert page.endswith("<!-- end -->\nrest") and "old" not in page


def test_a_run_is_measured_again_if_its_weights_are_others(random_run, tmp_path):
    run = tmp_path / "a-0"
    shutil.copytree(random_run, run)
    measure = f"measure {tmp_path}/x.json {run} --frames 4 --videos 2".split()
    evidence.main(measure)
    [first] = evidence.read_rows(tmp_path / "x.json")["a"].values()
    shutil.rmtree(run / "samples")
    evidence.main(measure)
    assert not (run / "samples").exists(), "measured before"
    evidence.main([*measure, "--again"])
    assert (run / "samples").exists()

    for flags in (["--videos", "3"], ["--videos", "3", "--true-history"]):
        evidence.main([*measure, *flags])
    [more] = evidence.read_rows(tmp_path / "x.json")["a"].values()
    assert more["videos"] == 3 and more["true_history"] and more["weights"] == first["weights"]
    table = evidence.costs_table({"a": {"0": more, "1": more | {"milliseconds": 2.0}}})
    assert table.endswith("| a | 1 | - | - | - | 2.0 |"), "one of them was timed"

    shutil.rmtree(run / "samples")
    state = torch.load(run / "ckpt.pt", weights_only=True)
    state["ema"] = {name: 1.1 * weight for name, weight in state["ema"].items()}
    torch.save(state, run / "ckpt.pt")
    evidence.main(measure)
    [second] = evidence.read_rows(tmp_path / "x.json")["a"].values()
    assert first["weights"] != second["weights"] and (run / "samples").exists()
    for command in (measure, ["baselines", f"{tmp_path}/x.json", "--videos", "2"]):
        with pytest.raises(ValueError, match="holds runs of 4 frames; --frames 5 needs another"):
            evidence.main([*command, "--frames", "5"])


def test_the_tables_of_the_pages_are_drawn_from_the_numbers():
    """`python results/evidence.py tables` would change nothing."""
    for page in evidence.PAGES:
        text = page.read_text("utf-8")
        assert evidence.redraw(text) == text, f"{page} is not what results/*.json says"


def test_the_evidence_names_a_bad_file_or_run(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"a": {"0": {}}}')
    for command, message in [
        (f"measure {path} {tmp_path}/a-0", "not a file of measured runs"),
        (f"measure {tmp_path}/new.json {tmp_path}/a", "name ends with its seed"),
        (f"measure {tmp_path}/new.json {tmp_path}/a-0", "a-0"),
        (f"strip {tmp_path}/a.png {tmp_path}/a-0", "evidence.py measure writes it"),
    ]:
        with pytest.raises(ValueError, match=message):
            evidence.main(command.split())


def test_the_loss_by_noise_level_is_equation_4_at_that_level():
    x = torch.randn(2, 3, 3, 4, 4)
    seen = []

    def model(x_t, t, c, history):
        """v of a network that always predicts x = 0."""
        seen.append(t.unique().item())
        return x_t / t[..., None, None, None]

    losses = health.losses_by_level(model, x, None, x[:, :-1])
    assert seen == pytest.approx(health.LEVELS)
    wanted = [(x / t).square().mean().item() for t in health.LEVELS]  # v - (eps - x) = x / t
    assert losses == pytest.approx(wanted, rel=1e-4)


@pytest.mark.extras
def test_the_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot.main(["--out", str(tmp_path)])
    for name in ("drift", "rivals", "long", "fig-6", "fig-7"):
        picture = iio.imread(tmp_path / f"{name}.png")
        assert picture.std() > 10, name
    with pytest.raises(ValueError, match="a.png needs the rows nova, .*; run their script first"):
        plot.draw_curves(None, {}, plot.HISTORIES, tmp_path / "a.png", 5)


FAKE_PYTHON = """#!/bin/sh
line=$(printf '%s\\037' "$@")
echo "$line" >> "$COMMANDS"  # in one write: box.sh runs two side by side
while [ $# -gt 0 ]; do
    if [ "$1" = --out ]; then mkdir -p "$2" && touch "$2/routing.png"; fi
    shift
done
"""


def commands_of(script, *arguments, folder):
    """Run results/SCRIPT.sh with a python that only makes --out. Returns [[word, ...], ...]."""
    (folder / "bin").mkdir()
    (folder / "results").mkdir()
    for name in (script, "common"):
        shutil.copy(HERE / f"results/{name}.sh", folder / "results")
    (folder / "bin/python").write_text(FAKE_PYTHON)
    (folder / "bin/python").chmod(0o755)
    paths = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "COMMANDS": str(folder / "commands")}
    command = ["bash", str(folder / f"results/{script}.sh"), *arguments]
    subprocess.run(command, check=True, env=os.environ | paths, cwd=folder)
    return [line.split("\037")[:-1] for line in (folder / "commands").read_text().splitlines()]


SEEDED = ["table-1", "fig-6", "fig-7", "optimizers", "detail"]


@pytest.mark.parametrize("script", [*SEEDED, "fig-8", "box", "games"])
def test_the_scripts_give_flags_that_exist_and_their_seed(script, tmp_path):
    """A script without a SEED trains with the default one, or with new clips where it goes on."""
    takes_seed = script in SEEDED
    (tmp_path / "runs/table-1/ours-5").mkdir(parents=True)  # fig-6.sh links it
    (tmp_path / "games").mkdir()  # games.sh marks it as whole
    commands = commands_of(script, *(["5"] if takes_seed else []), folder=tmp_path)
    parsers = {"train.py": train.parse, "results/rivals.py": rivals.parse}
    parsers |= {"results/evidence.py": evidence.parse, "sample.py": sample.parse}
    made = {"runs/fig-6/s-0.6-5"}  # the link
    for program, *words in commands:
        if program in parsers:
            args = parsers[program](words)
        if program in ("train.py", "results/rivals.py"):
            assert args.seed == (5 if takes_seed else 0) or script == "games" and args.init, words
            assert str(args.out).endswith("-5") or not takes_seed, words
            made.add(str(args.out))
        if program == "results/evidence.py" and takes_seed and words[0] != "baselines":
            assert {str(run) for run in args.runs} <= made, "measures what it made"
    runs = sum(words[0] in ("train.py", "results/rivals.py") for words in commands)
    assert runs >= (2 if script == "games" else 3)


# ---- results/small_things.py ----


def test_a_ball_of_breakout_is_as_bright_between_pixels():
    ball = np.zeros((160, 160, 3), np.uint8)
    ball[51:55, 21:23] = (200, 72, 72)
    halved = record_games.halve(ball, "breakout")
    assert halved.shape == (80, 80, 3) and halved.dtype == np.uint8
    assert (halved[25:28, 10:12] == (200, 72, 72)).all() and halved.astype(int).sum() == 6 * 344
    for game in ("pong", "freeway"):
        halved = record_games.halve(ball, game)
        assert halved[25, 10].tolist() == [50, 18, 18] and halved[26, 10].tolist() == [100, 36, 36]


def game_of_a_dot(kind):
    """Four videos (4, 48, 3, 80, 80) of a dot on a plain field; `kind` says what becomes of it."""
    video = torch.full((4, 48, 3, 80, 80), -0.5)
    for b in range(4):
        for frame in range(48):
            gone = kind == "gone" and frame > 20
            t = min(frame, 30) if kind == "frozen" else frame
            if not gone:
                y, x = 8 + t, 12 + 4 * b + t // 2
                video[b, frame, :, y : y + 2, x : x + 2] = 0.8
                if kind == "copied":  # a fainter dot beside it
                    video[b, frame, :, y : y + 2, x - 8 : x - 6] = 0.3
                if kind == "everywhere":
                    video[b, frame, :, y % 16 :: 16, x % 16 :: 16] = 0.8
    return video


def test_small_things_are_judged_alive_if_they_are_there_and_move():
    truth = game_of_a_dot("moves")
    background = truth.flatten(0, 1).median(0).values
    field = small_things.FIELDS["pong"]
    mass, _, whole = small_things.follow(truth, background, field)
    typical, most = mass[mass > 0].median(), whole.flatten().quantile(0.95)
    for kind in ("moves", "gone", "frozen", "copied", "everywhere"):
        video = game_of_a_dot(kind)
        alive = small_things.alive(video, background, field, typical, most, start=32)
        assert alive.tolist() == [kind == "moves"] * 4, kind
        seen = small_things.seen_in(video, [4, 40], background, field, typical)
        assert seen == ([4, 0] if kind == "gone" else [4, 4]), kind
        near = small_things.near_truth(video, truth, [4, 40], background, field, typical)
        assert near == ([4, 0] if kind in ("gone", "frozen") else [4, 4]), kind
    for ahead, wanted in ((2, 4), (3, 0)):  # by 2.2 and 3.4 pixels
        near = small_things.near_truth(truth[:, ahead:], truth, [4], background, field, typical)
        assert near == [wanted], "within 3 pixels"
    a, b = truth[:, 5:6], truth[:, 6:7]
    assert small_things.found(b, b, background, field, typical) == (4, 4)
    assert small_things.found(b, a, background, field, typical) == (0, 4), "it moves by more"
    gone = background.expand_as(b)
    assert small_things.found(b, gone, background, field, typical) == (0, 4)


def test_a_ball_is_lost_where_it_was_last_seen():
    """In frame 20 the dots are in row 28, in columns 22, 26, 30 and 34."""
    background = torch.full((3, 80, 80), -0.5)
    field = (slice(0, 80), slice(18, 67), 1)
    moves, gone = game_of_a_dot("moves"), game_of_a_dot("gone")
    typical = small_things.follow(moves, background, field)[0].median()
    for video, part, wanted in [
        (moves, field, {}),
        (gone, field, {"left": 1, "inside": 3}),
        (gone.flip(-1), (slice(0, 80), slice(13, 62), 1), {"right": 1, "inside": 3}),
        (gone, (slice(0, 33), slice(18, 67), 1), {"bottom": 4}),
        (gone, (slice(26, 80), slice(18, 67), 1), {"top": 4}),
        (background.expand_as(moves), field, {"never seen": 4}),
    ]:
        lost = small_things.where_lost(video, background, part, typical)
        assert {place: n for place, n in lost.items() if n} == wanted


def test_paddles_are_there_if_they_are_in_the_row_of_a_ball_at_their_side():
    """The ball leaves the left side; that paddle is 2 rows below it, the right one in row 43.5."""
    video = torch.full((1, 40, 3, 80, 80), -0.5)
    background = video[0, 0].clone()
    for frame in range(40):
        video[0, frame, :, 10 + frame : 12 + frame, 14 + frame] = 0.8
        video[0, frame, :, 9 + frame : 17 + frame, 9] = 0.8
        video[0, frame, :, 40:48, 70] = 0.8
    field = small_things.FIELDS["pong"]
    typical = small_things.follow(video, background, field)[0].median()
    there = small_things.paddles_there(video, background, field, typical)
    assert there["left"] == 1
    assert there["right"] != there["right"], "nan: no ball has come so far"

    video[:, 36:, :, 18:, 14:66] = -0.5  # four frames with the ball at the other side
    video[:, 36:39, :, 60:62, 64] = 0.8
    video[:, 39:, :, 39:41, 64] = 0.8
    there = small_things.paddles_there(video, background, field, typical)
    assert there == {"left": 1, "right": 0.25}
    there = small_things.paddles_there(video.flip(-1), background, field, typical)
    assert there == {"left": 0.25, "right": 1}
    video[:, :, :, :, 8:12] = -0.5
    there = small_things.paddles_there(video, background, field, typical)
    assert there == {"left": 0, "right": 0.25}, "a paddle that is gone is not there"


def test_rows_apart_tells_a_paddle_at_the_ball_from_one_at_the_other_paddle():
    """The left paddle is in the ball's rows, the right one 20 rows below it, or with the left."""
    video = torch.full((2, 20, 3, 80, 80), -0.5)
    background = video[0, 0].clone()
    for frame in range(20):
        video[:, frame, :, 13 + frame : 15 + frame, 20 + frame] = 0.8
        video[:, frame, :, 10 + frame : 18 + frame, 8:10] = 0.8
        video[:, frame, :, 30 + frame : 38 + frame, 70:72] = 0.3
    field = small_things.FIELDS["pong"]
    typical = small_things.follow(video, background, field)[0].median()
    apart = small_things.rows_apart(video, background, field, typical, start=8)
    wanted = {"left and ball": 0, "right and ball": 20, "left and right": 20}
    assert apart == pytest.approx(wanted, abs=1e-4)
    video[:, 8:, :, :, 70:72] = video[:, 8:, :, :, 8:10]
    apart = small_things.rows_apart(video, background, field, typical, start=8)
    assert apart["left and right"] == 0, "frames before `start` do not count"
    video[:, :, :, :, 20:60] = -0.5
    apart = small_things.rows_apart(video, background, field, typical, start=8)
    assert apart["left and right"] != apart["left and right"], "nan: there is no ball"


def test_small_things_are_not_looked_for_in_sprites(random_run):
    with pytest.raises(ValueError, match="was not trained on captioned videos"):
        small_things.main([str(random_run), "nowhere"])


@pytest.mark.extras
def test_recorded_games_have_moving_things(tmp_path):
    pytest.importorskip("ale_py")
    command = [sys.executable, HERE / "results/record_games.py", tmp_path / "games"]
    subprocess.run([*command, "--clips", "3", "--held-out", "3"], check=True, capture_output=True)
    folder = tmp_path / "games/test"
    names = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    assert sorted(names) == sorted(small_things.FIELDS)
    for path in folder.glob("*.mp4"):
        video = read_video(path, 80)
        assert video.shape == (64, 3, 80, 80)
        assert (video[1:] - video[:-1]).abs().amax((1, 2, 3)).median() > 0.15, path
    trained_on = {path.read_bytes() for path in (tmp_path / "games/train").glob("*.mp4")}
    assert trained_on.isdisjoint(path.read_bytes() for path in folder.glob("*.mp4"))
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "wanted a new folder" in again.stderr

    command[-1] = tmp_path / "one"
    flags = ["--games", "pong", "--clips", "1", "--held-out", "2"]
    subprocess.run([*command, *flags], check=True, capture_output=True)
    assert {path.read_text() for path in (tmp_path / "one").rglob("*.txt")} == {"pong"}


def test_small_things_are_followed_in_a_runs_own_clips(tmp_path, capsys, quick):
    for i, game in enumerate(small_things.FIELDS):
        with writer(tmp_path / f"clips/{i}.mp4", 30) as out:
            out(game_of_a_dot("moves")[i, :14])
        (tmp_path / f"clips/{i}.txt").write_text(game)
    flags = ["--data", tmp_path / "clips", "--size", 80, "--patch", 16, "--steps", 1]
    run_train(tmp_path / "run", *flags)
    command = f"{tmp_path}/run {tmp_path}/clips --frames 14 --from 4 --steps 1"
    small_things.main(command.split())
    out = capsys.readouterr().out
    for line in ("pong       truth              1 of 1", "all        rollout            0 of 3"):
        assert line in out
    assert re.search("pong       one ahead          0 of 3", out)
    assert "pong       rollout, near      0" in out and "truth, near" not in out
    assert "pong       truth, lost      none" in out and "freeway    truth, lost" not in out
    assert "pong       truth, paddles   left 0 %, right nan %" in out
    assert (tmp_path / "run/samples/held_out.png").stat().st_size > 1000

    for command, message in [
        (f"{tmp_path}/run {tmp_path}/clips --frames 14 --from 8", "more than 8 frames"),
        (f"{tmp_path}/run {tmp_path}/none", "none"),
        (f"{tmp_path}/none {tmp_path}/clips", "none"),
    ]:
        with pytest.raises(ValueError, match=message):
            small_things.main(command.split())
    (tmp_path / "clips/0.txt").unlink()
    with pytest.raises(ValueError, match="wanted clips of pong, breakout, freeway"):
        small_things.main(f"{tmp_path}/run {tmp_path}/clips --frames 14 --from 4".split())


# ---- README.md and the repository ----


README = (HERE / "README.md").read_text()
EVIDENCE = (HERE / "results/README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README + EVIDENCE, re.S)
GAMES = "games.sh"  # in a block that needs a package of its own
RUNNABLE = [block for block in BLOCKS if GAMES not in block]
MODULES = {
    "rf": rf,
    "routing": routing,
    "model": model_py,
    "data": data,
    "train": train,
    "sample": sample,
}


def test_the_readme_names_what_exists():
    rows = re.findall(r"`(\w+)\.(\w+)`", README)
    rows = [(file, name) for file, name in rows if file in MODULES and name != "py"]
    assert len(rows) >= 9
    for file, name in rows:
        assert hasattr(MODULES[file], name), f"{file}.{name}"
    for page in ("README.md", "results/README.md", "results/games.md"):
        text = (HERE / page).read_text()
        links = re.findall(r"\]\(((?!http)[^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
        for link in links:
            path, _, heading = link.partition("#")
            target = (HERE / page).parent / path if path else HERE / page
            assert target.exists(), path
            if heading:
                headings = [line.lstrip("# ").lower() for line in target.read_text().splitlines()]
                anchors = {re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in headings}
                assert heading in anchors, link


def test_the_readme_is_short():
    assert len(README.encode()) <= 12_000
    prose = re.sub(
        r"```.*?```|<!--.*?-->|^\|.*?$|^<img.*?$|^!\[.*?$", "", README, flags=re.S | re.M
    )
    prose = re.sub(r"`[^`]*`", "code", prose)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    for sentence in re.split(r"[.:;?!][)*\"]*\s|\n\n", prose):
        assert len(sentence.split()) <= 25, sentence


def test_algorithm_1_in_the_readme_is_the_code():
    block = re.search(r"^Algorithm 1.*?```\n(.*?)```", README, re.S | re.M)[1]
    code = (HERE / "rf.py").read_text() + (HERE / "train.py").read_text()
    lines = [re.match(r"[\d-]+ +(.*?)(\.\.\.|  |$)", line)[1] for line in block.splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert line in code, line


@pytest.mark.parametrize("number", range(2, 10))
def test_each_equation_is_found_by_its_number(number):
    lines = [line for file in MODULES for line in (HERE / f"{file}.py").read_text().splitlines()]
    found = [line for line in lines if re.search(rf"Eqs?\. .*\({number}\)", line)]
    assert any(line.lstrip().startswith('"""') for line in found), "leads a docstring"


def readme_commands():
    """Every command of the blocks of both pages, loop variables set to their first value."""
    for block in BLOCKS:
        first = dict(re.findall(r"for (\w+) in (\S+)", block))
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$(\w+)", lambda name, first=first: first[name[1]], line)
            for command in line.split(" #")[0].split("&&"):
                yield command.strip()


def test_the_commands_of_the_readme_parse():
    parsers = {"train.py": train.parse, "sample.py": sample.parse, "data.py": data.parse}
    parsed = 0
    for command in readme_commands():
        words = shlex.split(command)
        for script in set(parsers) & set(words):
            flags = words[words.index(script) + 1 :]
            parsers[script]([flag for flag in flags if flag != "--resume"])
            parsed += 1
    assert parsed > 20


def test_ci_runs_the_test_command_of_the_readme():
    command = "pip install -r requirements.txt && pytest"
    assert any(command in block for block in BLOCKS)
    assert command in (HERE / ".ci/run").read_text()


# What makes a command of the README take seconds. A flag that stands twice counts the last time.
CUTS = {
    "train.py": "--size 8 --frames 6 --dim 48 --heads 2 --layers 1 --batch 2 --accumulate 1 "
    "--steps 2 --warmup 1 --lr-warmup 1 --sample-steps 1 --sample-every 2 --device cpu",
    "sample.py": "--frames 18 --steps 1 --samples 1 --device cpu",
    "encode": "--size 32x48 --frames 21 --device cpu",
    "results/bench_attention.py": "--frames 3 --tokens 4 --batch 1 --repeats 1 --device cpu",
    "results/bench_video.py": "--files 2 --batch 2 --repeats 1",
    "results/rivals.py": "--steps 2",
    "results/evidence.py": "--frames 12 --videos 3",
    "results/plot.py": "",
}

SHIM = """#!{python}
import os, shlex, sys

name, argv = os.path.basename(sys.argv[0]), sys.argv[1:]
if name in ("pip", "pytest", "ruff"):
    sys.exit(0)
scripts = [i for i, word in enumerate(argv) if word.endswith(".py")]
flags = argv[scripts[0] + 1 :]
script = argv[scripts[0]]
key = "encode" if "encode" in flags else script
short = ["--dry-run", "--table", "time", "strip", "tables"]  # as they are
if not set(short) & set(flags):
    flags += shlex.split({cuts!r}[key])
if "--eval" in flags or "--compare" in flags:
    flags += ["--videos", "2"]
if "--chunk" in flags:  # one chunk is the whole clip
    flags += ["--chunk", "6"]
if "--resume" in flags:  # one more step
    flags += ["--steps", "3"]
if "wan-1.3b" in flags and "--dry-run" not in flags:
    flags += ["--patch", "2", "--dim", "64"]  # a patch of its latents holds 64 values
if "--patch 16" in " ".join(flags):
    flags += ["--size", "16"]
run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
run = run if name == "torchrun" else []
os.execv({python!r}, [{python!r}, *run, script, *flags])
"""


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory, wan_folder):
    """A folder as the README assumes it: the files, a shortened `python`, VIDEOS, FOLDER, WAN."""
    folder = tmp_path_factory.mktemp("newcomer")
    for path in HERE.glob("*.py"):
        (folder / path.name).symlink_to(path)
    shutil.copytree(HERE / "results", folder / "results")  # a command writes into it
    for name in ("table-1", "health"):  # of other lengths than the shortened commands measure
        (folder / f"results/{name}.json").unlink()
    (folder / "bin").mkdir()
    pytest.importorskip("matplotlib")
    shim = SHIM.format(python=sys.executable, cuts=CUTS)
    for name in ("python", "torchrun", "pip", "pytest", "ruff"):
        (folder / "bin" / name).write_text(shim)
        (folder / "bin" / name).chmod(0o755)
    for name in ("VIDEOS/a.mp4", "VIDEOS/b.mp4", "FOLDER/a.mp4", "FOLDER/b.mp4", "clip.mp4"):
        with writer(folder / name, 16) as out:
            out(Sprites(64, 24)[len(name)][0])

    import diffusers

    shutil.copytree(wan_folder, folder / "WAN")
    network = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=256,
        num_layers=1,
        cross_attn_norm=True,
    )
    network.save_pretrained(folder / "WAN/transformer")
    return folder


@pytest.mark.readme
@pytest.mark.parametrize("number", range(len(RUNNABLE)))
def test_the_commands_of_the_readme_run(number, newcomer):
    """Of both pages, in their order: later blocks use the runs of earlier ones."""
    env = dict(os.environ, PATH=f"{newcomer / 'bin'}:{os.environ['PATH']}", OMP_NUM_THREADS="1")
    done = subprocess.run(
        ["bash", "-ec", RUNNABLE[number]],
        cwd=newcomer,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{RUNNABLE[number]}\n{done.stdout[-3000:]}"
    assert "Traceback" not in done.stdout, done.stdout[-3000:]
