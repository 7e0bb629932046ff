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


# -- attention and routing -----------------------------------------------------------------------------------------


def slow_route(q, k, past, top_k):
    """Eq. (9) in loops."""
    B, H, rows, P, _ = q.shape
    chosen = torch.zeros(B, H, rows, P, k.shape[2], dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for r in range(rows):
                for p in range(P):
                    frames = [j for j in range(k.shape[2]) if past[r, j]]
                    score = {j: float(sum(q[b, h, r, p] * sum(k[b, h, j, s] for s in range(P)) / P)) for j in frames}
                    for j in sorted(frames, key=lambda j: -score[j])[:top_k]:
                        chosen[b, h, r, p, j] = True
    return chosen


def slow_attend(q, k, v, past, own, top_k):
    """Eq. (8) in loops: each token alone with the frames that it sees."""
    chosen = slow_route(q, k, past, top_k or 99)
    B, H, rows, P, E = q.shape
    out = []
    for b, h, r, p in np.ndindex(B, H, rows, P):
        frames = [j for j in range(k.shape[2]) if own[r, j] or chosen[b, h, r, p, j]]
        keys, values = k[b, h, frames].reshape(-1, E), v[b, h, frames].reshape(-1, E)
        out.append(torch.softmax(keys @ q[b, h, r, p] / E ** 0.5, 0) @ values)
    return torch.stack(out).view(B, H, rows, P, E)


PASSES = [(0, 3, 4, 0), (2, 1, 1, 3), (2, 0, 1, 2), (5, 2, 3, 4), (0, 0, 1, 0)]


@pytest.mark.parametrize("shape", PASSES)
@pytest.mark.parametrize("top_k", [None, 1, 2, 9])
def test_attention_is_its_definition_outputs_and_gradients(shape, top_k):
    torch.manual_seed(0)
    (cached, history, noisy, _), (past, own) = shape, sparse_causal_mask(*shape)
    q = torch.randn(2, 2, history + noisy, 3, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, cached + history + noisy, 3, 4, dtype=torch.float64, requires_grad=True) for _ in "kv")
    towards = torch.randn_like(q)
    results = []
    for attention in (attend, attend_masked, slow_attend):
        out = attention(q, k, v, past, own, top_k)
        results.append((out, *torch.autograd.grad((out * towards).sum(), (q, k, v))))
    for a, b, c in zip(*results):
        assert close(a, c) and close(b, c)
    with torch.no_grad():
        assert close(attend(q, k, v, past, own, top_k), results[0][0]), "without gradients, too"


def test_attention_makes_again_what_it_could_not_keep(monkeypatch):
    past, own = sparse_causal_mask(0, 5, 6, 0)
    q, k, v = (torch.randn(1, 2, 11, 40, 4, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    kept = torch.autograd.grad(attend(q, k, v, past, own).square().sum(), (q, k, v))
    monkeypatch.setattr(routing.GroupedAttention, "KEPT", 30_000)
    for a, b in zip(kept, torch.autograd.grad(attend(q, k, v, past, own).square().sum(), (q, k, v))):
        assert close(a, b)


def test_routing_is_equation_9():
    torch.manual_seed(0)
    past, own = sparse_causal_mask(1, 4, 5, 1)
    q, k = torch.randn(2, 3, 9, 4, 6), torch.randn(2, 3, 10, 4, 6)
    for top_k in (1, 3):
        chosen = route(q, k, past, top_k)
        assert torch.equal(chosen, slow_route(q, k, past, top_k))
        assert torch.equal(chosen.sum(-1), past.sum(1).clamp(max=top_k)[:, None].expand(2, 3, 9, 4)), "up to k"
    assert not (chosen & own[:, None]).any(), "the own frame is not counted"
    assert (chosen[:, 0] != chosen[:, 1]).any() and (chosen[..., 0, :] != chosen[..., 1, :]).any(), "per head and token"
    v = torch.randn_like(k)
    assert close(attend(q, k, v, past, own, 9), attend(q, k, v, past, own), 1e-6), "k >= all is dense"


def test_routing_scores_are_fp32_and_carry_no_gradient():
    past, _ = sparse_causal_mask(0, 5, 6, 0)
    q, k = torch.randn(1, 2, 11, 8, 16).bfloat16(), torch.randn(1, 2, 11, 8, 16).bfloat16()
    assert torch.equal(route(q, k, past, 2), route(q.float(), k.float(), past, 2))
    assert not route(q.float().requires_grad_(), k.float(), past, 2).requires_grad


# -- the network ---------------------------------------------------------------------------------------------------


def test_the_network_is_wan():
    with torch.device("meta"):
        net = CausalDiT(PRESETS["wan-1.3b"])
    assert sum(p.numel() for p in net.parameters()) == 1_418_996_800 and len(net.state_dict()) == 825
    names = set(net.state_dict())
    assert {"patch_embedding.weight", "text_embedding.2.bias", "time_embedding.0.weight", "time_projection.1.weight",
            "blocks.29.modulation", "blocks.0.self_attn.norm_q.weight", "blocks.0.cross_attn.o.bias",
            "blocks.0.norm3.weight", "blocks.0.ffn.2.weight", "head.head.weight", "head.modulation"} <= names


def test_a_new_network_returns_zero_and_patches_come_back_in_place():
    torch.manual_seed(0)
    net = CausalDiT(Config(2, 48, 96, 2, 1, 2, 3, text_dim=5))
    x = torch.randn(1, 2, 6, 4, 6)
    assert (net(x, torch.rand(1, 2), torch.randn(1, 3, 5), x[:, :1]) == 0).all()
    torch.nn.init.normal_(net.head.head.weight)
    v = net(x, torch.rand(1, 2), torch.randn(1, 3, 5), x[:, :1])
    assert v.shape == x.shape and v.dtype == torch.float32 and v.std(dim=(0, 1)).min() > 0
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x, torch.full((1, 2), 0.5), torch.zeros(1, 3, 5), x[:, :1])
    high = net(x, torch.full((1, 2), 0.5), torch.zeros(1, 3, 5), x[:, :1])
    assert low.dtype == torch.float32 and (low - high).norm() < 0.02 * high.norm()


def test_rope_turns_by_position_and_turns_add_up():
    here, there = (model_py.rope(32, torch.tensor([n]), torch.tensor([1]), torch.tensor([2])) for n in (3, 10))
    q, k = torch.randn(2, 32, dtype=torch.float64)
    moved = model_py.rope(32, torch.tensor([7]), torch.tensor([0]), torch.tensor([0]))
    assert close(model_py.rotate(model_py.rotate(k[None], here), moved), model_py.rotate(k[None], there))
    assert here.shape == (1, 16) and abs(here[0, 0].angle() - 3) < 1e-12, "the first pair turns by a radian per frame"
    a = (model_py.rotate(q[None], there) * model_py.rotate(k[None], here)).sum()
    b = (model_py.rotate(q[None], moved) * model_py.rotate(k[None], moved.conj() * moved)).sum()
    assert close(a, b), "only the distance counts"


@pytest.mark.parametrize("sink", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_window_keeps_positions_in_range_and_memory_flat(sink, chunk):
    """A windowed rollout equals one whose cache holds just sink and window, placed as in a short video."""
    net, (_, _, _, c) = tiny(chunk, layers=1), clip(chunk)
    noise = torch.randn(2, 9, 2 * chunk, 4, 6, dtype=torch.float64)
    cache = net.cache(2, 9, window=4, sink=sink)
    made, sizes = [], set()
    for frame in rollout(net, noise, torch.ones(2).double(), c, 2, cache=cache):
        made.append(frame)
        if len(made) > 1:
            sizes.add((cache.k.shape, cache.k.data_ptr()))
        assert cache.length <= 4
    assert len(sizes) == 1 and cache.k.shape[3] == 5 and cache.first == 4
    keep = made[:sink] + made[8 - (4 - sink):8]
    short = net.cache(2, 5)
    again = list(rollout(net, noise[:, [8]], torch.ones(2).double(), c, 2, history=torch.cat(keep, 1), cache=short))
    assert close(again[0], made[8]), "with one layer, a key does not depend on what its frame saw"


def test_a_window_drops_at_once_what_it_would_drop_anyway():
    net, (x, noise, _, c) = tiny(), clip()
    cache = net.cache(2, 99, window=3, sink=1)
    list(rollout(net, noise[:, :1], torch.ones(2).double(), c, history=x, cache=cache))
    short = net.cache(2, 99)
    v = list(rollout(net, noise[:, :1], torch.ones(2).double(), c, history=x[:, [0, 4, 5]], cache=short))
    assert cache.length == 3 and cache.seen == 6
    both = [list(rollout(net, noise[:, :1], torch.ones(2).double(), c, 2, history=h, cache=net.cache(2, 99, window=3, sink=1)))[0]
            for h in (x, x[:, [0, 4, 5]])]
    assert close(*both) and v[0].shape == noise[:, :1].shape


def test_a_cache_says_when_it_is_full_or_foreign():
    net, (x, x_t, t, c) = tiny(), clip()
    with pytest.raises(ValueError, match="6 finished frames in a cache for 3"):
        net(x_t[:, :1], t[:, :1], c, x, net.cache(2, 3), first=6)
    with pytest.raises(ValueError, match="sink"):
        net.cache(2, 3, window=2, sink=2)
    with pytest.raises(ValueError, match="a pass of 2 videos on a cache for 4"):
        net(x_t[:, :1], t[:, :1], c, x[:, :1], net.cache(4, 3), first=1)


def test_flops_are_those_that_run():
    from torch.utils.flop_counter import FlopCounterMode
    config = Config(3, 64, 128, 2, 3, 4, 1, text_dim=20)
    net, x = CausalDiT(config), torch.randn(1, 3, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        net(x, torch.rand(1, 3), torch.randn(1, 5, 20), x[:, :-1])
    counted, stated = counter.get_total_flops(), model_py.forward_flops(config, 2, 3, 32, 32, 5)
    assert stated <= counted <= 1.15 * stated, "the rest is what groups of rows with unlike pasts spend on masked frames"


# -- the world of sprites and its ruler ----------------------------------------------------------------------------


def test_sprites_are_a_function_of_seed_split_and_index():
    a, b = Sprites(seed=1), Sprites(seed=1)
    assert torch.equal(a[5][0], b[5][0]) and torch.equal(a[5][1], b[5][1])
    others = [Sprites(seed=2)[5], Sprites(seed=1, split="test")[5], a[6]]
    assert all(not torch.equal(a[5][0], other[0]) for other in others)
    assert torch.equal(a.video(5, 40)[:12], a.video(5)) and a[5][0].abs().max() <= 1
    assert {a.caption(i) for i in range(200)}.isdisjoint({""}) and len({a.caption(i) for i in range(200)}) > 50


def test_sprites_move_straight_and_bounce():
    world = Sprites()
    for i in range(20):
        _, _, at = world.scene(i, 40)
        step = at[1:] - at[:-1]
        margin = data.radius_of(16, False)
        assert at.min() >= margin - 1e-4 and at.max() <= 16 - margin + 1e-4
        turned = (step[1:] - step[:-1]).abs() > 1e-3
        assert not (turned & ((at[1:-1] - 8).abs() < 8 - margin - 1.3)).any(), "a turn far from the edges"
        assert (step.norm(dim=-1) <= data.SPEED[1] * 16 + 1e-3).all()


def test_words_bind_and_nothing_is_zero():
    words = Sprites().words
    a, b = words("red circle and blue square"), words("blue circle and red square")
    assert a.shape == (5, words.text_dim) and not torch.equal(a.sum(0), b.sum(0)), "even a sum of rows tells them apart"
    assert (words("") == 0).all() and torch.equal(words("Red  circle!"), words("red circle"))
    assert (Sprites(withheld=1.0)[0][1] == 0).all()


def test_the_ruler_gives_truth_100_and_noise_0():
    world = Sprites(split="test")
    video, captions = torch.stack([world.video(i, 18) for i in range(6)]), [world.caption(i) for i in range(6)]
    truth = measure(video, captions).nanmean((0, 1))
    assert (truth > 95).all(), truth
    torch.manual_seed(0)
    noise = measure(torch.rand_like(video) * 2 - 1, captions).nanmean((0, 1))
    assert (noise < 8).all(), noise
    assert (measure(video[:, :1].expand_as(video), captions)[:, 2:, 1].nanmean() < 25), "standing still is not moving"


def test_the_ruler_tells_pixels_motion_and_names_apart():
    world = Sprites(split="test")
    video, captions = torch.stack([world.video(i, 18) for i in range(6)]), [world.caption(i) for i in range(6)]
    truth = measure(video, captions).nanmean((0, 1))
    wrong = measure(video, captions[1:] + captions[:1]).nanmean((0, 1))
    assert wrong[2] < 60 and wrong[0] > truth[0] - 3
    shuffled = measure(video[:, torch.randperm(18)], captions).nanmean((0, 1))
    assert shuffled[1] < 20 and shuffled[0] > truth[0] - 3 and shuffled[2] > truth[2] - 5
    soft = torch.nn.functional.avg_pool2d(video.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(video)
    soft = measure(soft, captions).nanmean((0, 1))
    assert soft[0] < truth[0] - 20 and soft[2] > truth[2] - 15
