"""The paper's claims, each with the shortest evidence: CPU, no network, deterministic, float64 where it says "the same"."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import data
import model as model_py
import rf
import routing
import sample
import train
from data import Latents, Sprites, Videos, Words, Writer, fold, measure, read_video, unfold
from model import PRESETS, CausalDiT, Config, load_checkpoint
from rf import HISTORY, Guided, add_noise, flow_matching_loss, logit_normal, rollout, self_resample, shift
from routing import attend, attend_masked, route, sparse_causal_mask

HERE = Path(__file__).parent
TINY = ["--size", "8", "--frames", "4", "--dim", "48", "--heads", "2", "--layers", "1", "--batch", "2", "--sample-steps", "1",
        "--lr-warmup", "2", "--device", "cpu"]


def tiny(chunk=1, top_k=None, layers=2):
    """A small float64 network with every weight random: at its own initialisation it returns 0, and 0 equals 0."""
    torch.manual_seed(0)
    net = CausalDiT(Config(2, 24, 48, 2, layers, 2, chunk, text_dim=5, freq_dim=16, top_k=top_k)).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def clip(chunk=1, N=6, B=2):
    """(clean frames, noisy frames, t, c) for `tiny`."""
    torch.manual_seed(1)
    x, x_t = torch.randn(2, B, N, 2 * chunk, 4, 6, dtype=torch.float64)
    return x, x_t, torch.rand(B, N, dtype=torch.float64), torch.randn(B, 3, 5, dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance


class Recorder:
    """A model of a few lines: v = 0, and a list of how it was called."""

    def __init__(self):
        self.calls = []

    def cache(self, batch, frames, window=None, sink=0):
        return None

    def __call__(self, x, t, c, history=None, cache=None, first=0):
        self.calls.append((x, t, history, first))
        return torch.zeros_like(x)


# -- the equations -------------------------------------------------------------------------------------------------


def test_noise_runs_from_the_frame_to_noise_along_a_line():  # Eq. (3)
    x, eps, t, _ = clip()
    x_t = add_noise(x, eps, t)
    for b in range(2):
        for n in range(6):
            assert close(x_t[b, n], (1 - t[b, n]) * x[b, n] + t[b, n] * eps[b, n])


def test_the_shift_keeps_both_ends_and_is_undone_by_its_inverse():  # Eq. (7)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert shift(t, 0.6)[0] == 0 and shift(t, 0.6)[-1] == 1 and torch.equal(shift(t, 1.0), t)
    assert close(shift(shift(t, 0.6), 1 / 0.6), t) and (shift(t, 0.6)[1:-1] < t[1:-1]).all()


def test_resampling_starts_where_the_paper_says():  # Eqs. (6), (7): s = 0.6 has median 0.375, 5-95 % 0.10-0.76
    torch.manual_seed(0)
    t_s = shift(logit_normal(200_000).double(), 0.6)
    normal = torch.distributions.Normal(0, 1)
    for q in (0.05, 0.5, 0.95):
        u = torch.sigmoid(normal.icdf(torch.tensor(q, dtype=torch.float64)))
        assert abs(t_s.quantile(q) - 0.6 * u / (1 - 0.4 * u)) < 0.005
    assert abs(t_s.quantile(0.5) - 0.375) < 0.005 and abs(t_s.quantile(0.05) - 0.10) < 0.01
    assert abs(t_s.quantile(0.95) - 0.76) < 0.01


def test_the_loss_is_the_distance_of_v_to_eps_minus_x():  # Eq. (4)
    x, _, _, c = clip()

    class Cheat(Recorder):
        def __call__(self, x_t, t, c, history=None, cache=None, first=0):
            super().__call__(x_t, t, c, history)
            t = t[..., None, None, None]
            return (x_t - x) / t + self.off  # (x_t - x) / t = eps - x

    net = Cheat()
    net.off = 0.0
    assert flow_matching_loss(net, x, c, x[:, :-1]) < 1e-20
    net.off = 0.5
    assert abs(flow_matching_loss(net, x, c, x[:, :-1]) - 0.25) < 1e-10
    _, t, history, _ = net.calls[0]
    assert t.shape == (2, 6) and len(t.unique()) == 12, "every frame has a noise level of its own"
    assert torch.equal(history, x[:, :-1])


# -- the mask ------------------------------------------------------------------------------------------------------


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
    assert torch.equal(past | own, torch.tensor(rows)) and not (past & own).any() and (own.sum(1) == 1).all()


def test_the_mask_of_a_cached_pass_is_the_last_rows_of_the_whole():
    past, own = sparse_causal_mask(2, 1, 1, 3)  # frames 0, 1 cached, 2 entering, 3 noisy
    assert past.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert own.tolist() == [[False, False, True, False], [False, False, False, True]]
    past, _ = sparse_causal_mask(5, 0, 2, 3)
    assert past.tolist() == [[True] * 3 + [False] * 4, [True] * 4 + [False] * 3], "a noisy frame sees smaller numbers only"


@pytest.mark.parametrize("top_k", [None, 2])
def test_nothing_leaks_and_history_reaches_later_frames(top_k):
    net, (x, x_t, t, c) = tiny(top_k=top_k), clip()
    v = net(x_t, t, c, x[:, :-1])
    for frame in range(5):
        changed = x.clone()
        changed[:, frame] += 1.0
        moved = (net(x_t, t, c, changed[:, :-1]) - v).abs().amax((0, 2, 3, 4))
        assert (moved[:frame + 1] == 0).all(), "a frame saw the future or its own clean copy"
        assert moved[frame + 1] > 1e-6 and (top_k or (moved[frame + 1:] > 1e-6).all())
        changed = x_t.clone()
        changed[:, frame] += 1.0
        moved = (net(changed, t, c, x[:, :-1]) - v).abs().amax((0, 2, 3, 4))
        assert moved[frame] > 1e-6 and (moved[:frame] == 0).all() and (moved[frame + 1:] == 0).all()


# -- one network, called in many ways ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("top_k", [None, 2])
def test_training_in_parallel_is_sampling_frame_by_frame(chunk, top_k):
    net, (x, x_t, t, c) = tiny(chunk, top_k), clip(chunk)
    together = net(x_t, t, c, x[:, :-1])
    cache, one_by_one = net.cache(2, 6), []
    for i in range(6):
        one_by_one.append(net(x_t[:, [i]], t[:, [i]], c, x[:, [i - 1]] if i else None, cache, first=i))
    assert close(torch.cat(one_by_one, 1), together) and together.std() > 0.1


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_pass_that_fills_the_cache_may_be_fused_with_the_next_step(top_k):
    net, (x, x_t, t, c) = tiny(top_k=top_k), clip()
    fused, apart = net.cache(2, 6), net.cache(2, 6)
    for i in range(6):
        history = x[:, [i - 1]] if i else None
        a = net(x_t[:, [i]], t[:, [i]], c, history, fused, first=i)
        net(x[:, :0], t[:, :0], c, history, apart, first=i)
        assert close(a, net(x_t[:, [i]], t[:, [i]], c, None, apart, first=i))


def test_several_given_frames_enter_in_one_pass():
    net, (x, x_t, t, c) = tiny(chunk=3), clip(chunk=3)
    cache = net.cache(2, 6)
    v = net(x_t[:, 4:], t[:, 4:], c, x[:, :4], cache, first=4)
    assert close(v[:, 0], net(x_t, t, c, x[:, :-1])[:, 4]) and cache.seen == 4


def test_a_chunk_is_frames_that_see_each_other():
    video = torch.randn(2, 6, 2, 4, 6, dtype=torch.float64)
    assert torch.equal(unfold(fold(video, 3), 3), video)
    net, (x, x_t, t, c) = tiny(chunk=3), clip(chunk=3)
    changed = x_t.clone()
    changed[:, 1, 4:] += 1.0  # the last latent of chunk 1
    moved = (net(changed, t, c, x[:, :-1]) - net(x_t, t, c, x[:, :-1])).abs().amax((0, 3, 4))
    assert (moved[1] > 1e-6).all() and (moved[[0, 2, 3, 4, 5]] == 0).all()


def test_the_history_is_shown_at_t_0():
    """A noisy frame at t = 0 next to the history is treated as the history is: their keys are the same."""
    net, (x, _, t, c) = tiny(layers=1), clip()
    seen = []
    put = model_py.SelfAttention.forward
    net.blocks[0].self_attn.k.register_forward_hook(lambda module, args, out: seen.append(out))
    net(x, torch.zeros_like(t), c, x[:, :-1])
    assert close(seen[0][:, :5], seen[0][:, 5:-1]) and put is model_py.SelfAttention.forward
    net(x, t, c, x[:, :-1])
    assert not close(seen[1][:, :5], seen[1][:, 5:-1]) and close(seen[1][:, :5], seen[0][:, :5])


# -- rollout, resampling, guidance ---------------------------------------------------------------------------------


def test_a_rollout_from_t_0_returns_its_input():
    x, _, _, c = clip()
    assert torch.equal(torch.cat(list(rollout(tiny(), x, torch.zeros(2).double(), c, 3)), 1), x)


def test_a_rollout_from_t_1_is_generation():
    """Against Euler written out, with no cache: all frames so far in one pass at every step."""
    net, (_, noise, _, c) = tiny(), clip(N=4)
    times, done = [shift(torch.tensor(1 - j / 5, dtype=torch.float64), 5.0) for j in range(6)], noise[:, :0]
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
    net, (x, noise, _, c) = tiny(), clip()
    whole = list(rollout(net, noise, torch.ones(2).double(), c, 2))
    rest = list(rollout(net, noise[:, 2:], torch.ones(2).double(), c, 2, history=torch.cat(whole[:2], 1)))
    assert close(torch.cat(rest, 1), torch.cat(whole[2:], 1))


def test_one_step_of_resampling_is_x_ts_minus_t_s_v():  # Eq. (5)
    class Half(Recorder):
        def __call__(self, x, t, c, history=None, cache=None, first=0):
            super().__call__(x, t, c, history, cache, first)
            return 0.5 * x
    x, _, _, c = clip()
    net = Half()
    torch.manual_seed(3)
    redrawn = self_resample(net, x, c)
    torch.manual_seed(3)
    x_ts, t_s = rf.noise_to(x, 0.6)
    assert t_s.shape == (2,), "one t_s per video"
    assert close(redrawn, x_ts * (1 - 0.5 * t_s[:, None, None, None, None]))
    assert len(net.calls) == 6 and [call[3] for call in net.calls] == list(range(6)), "one forward per frame"
    for i, (_, _, history, _) in enumerate(net.calls):
        assert history is None if i == 0 else close(history, redrawn[:, [i - 1]]), "on the frames just finished"


def test_resampling_carries_no_gradient_and_training_still_does():
    net, (x, _, _, c) = tiny(), clip()
    x.requires_grad_()
    history = self_resample(net, x[:, :-1], c)
    assert not history.requires_grad and history.shape == x[:, :-1].shape
    flow_matching_loss(net, x.detach(), c, history).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.blocks[0].self_attn.k.weight.grad.abs().sum() > 0


def test_every_history_of_table_2():
    net, (x, _, _, c) = tiny(), clip()
    made = {name: method(net, x, c, 0.6, 2, 0.3) for name, method in HISTORY.items()}
    assert list(HISTORY) == ["teacher", "noise", "parallel", "resample"] and torch.equal(made["teacher"], x)
    assert all(h.shape == x.shape and not h.requires_grad for h in made.values())
    off = (made["noise"] - x).abs().amax((2, 3, 4))
    assert (off > 0).all() and off.max() < 0.3 * 6
    class Zero(Recorder):
        pass
    torch.manual_seed(0)
    a = HISTORY["parallel"](Zero(), x, c, 0.6, 1, 0)
    torch.manual_seed(0)
    b = HISTORY["resample"](Zero(), x, c, 0.6, 1, 0)
    assert torch.equal(a, b), "with nothing learned from history, both only add noise"
    torch.manual_seed(0)
    a = HISTORY["parallel"](net, x, c, 0.6, 1, 0)
    torch.manual_seed(0)
    b = HISTORY["resample"](net, x, c, 0.6, 1, 0)
    assert close(a[:, 0], b[:, 0]) and not close(a[:, 2:], b[:, 2:]), "errors compound in one and not in the other"


def test_the_parallel_history_is_made_on_the_true_one():
    net, (x, _, _, c) = tiny(), clip()
    torch.manual_seed(0)
    made = HISTORY["parallel"](net, x, c, 0.6, 1, 0)
    torch.manual_seed(0)
    x_ts, t_s = rf.noise_to(x, 0.6)
    v = net(x_ts, t_s[:, None].expand(2, 6), c, x[:, :-1])
    assert close(made, x_ts - t_s[:, None, None, None, None] * v)


def test_the_warm_up_ends_at_its_step_and_the_share_is_a_share():
    args = train.parse(["--warmup", "5", "--history", "noise"])
    assert [train.history_at(step, args) is HISTORY["teacher"] for step in range(8)] == [True] * 5 + [False] * 3
    args = train.parse(["--warmup", "0", "--resample-share", "0.25"])
    used = sum(train.history_at(step, args) is HISTORY["resample"] for step in range(2000))
    assert 0.2 < used / 2000 < 0.3


def test_guidance_of_1_is_none_and_more_is_more():
    net, (x, noise, t, c) = tiny(), clip()
    null = torch.zeros(3, 5).double()
    assert close(Guided(net, null, 1.0)(noise, t, c, x[:, :-1]), net(noise, t, c, x[:, :-1]), 1e-12)
    v, v_null = net(noise, t, c, x[:, :-1]), net(noise, t, null.expand_as(c), x[:, :-1])
    assert close(Guided(net, null, 3.0)(noise, t, c, x[:, :-1]), v_null + 3 * (v - v_null))
    by_hand = list(rollout(Guided(net, null, 1.0), noise, torch.ones(2).double(), c, 2))
    assert close(torch.cat(by_hand, 1), torch.cat(list(rollout(net, noise, torch.ones(2).double(), c, 2)), 1), 1e-9)
