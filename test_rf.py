"""The paper's claims, each with the shortest evidence: CPU, no network, deterministic, float64 where it says "the same"."""
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

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
from data import Latents, Sprites, Videos, Words, fold, measure, read_video, unfold, writer
from model import PRESETS, CausalDiT, Config, load_checkpoint
from rf import HISTORY, Guided, add_noise, flow_matching_loss, logit_normal, rollout, self_resample, shift
from routing import attend, attend_masked, route, sparse_causal_mask

HERE = Path(__file__).parent
TINY = ["--size", "8", "--frames", "4", "--dim", "48", "--heads", "2", "--layers", "1", "--batch", "2", "--sample-steps", "1",
        "--lr-warmup", "2", "--device", "cpu"]


def tiny(chunk=1, top_k=None, layers=2, window=None):
    """A small float64 network with every weight random: at its own initialisation it returns 0, and 0 equals 0."""
    torch.manual_seed(0)
    net = CausalDiT(Config(2, 24, 48, 2, layers, 2, chunk, text_dim=5, freq_dim=16, top_k=top_k, window=window)).double()
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
    past, _ = sparse_causal_mask(2, 0, 1, 7)
    assert past.tolist() == [[True, True, False]], "however much smaller the numbers are"
    past, _ = sparse_causal_mask(0, 3, 4, 0, window=1)
    assert past.int()[:, :3].tolist() == [[0] * 3, [1, 0, 0], [0, 1, 0], [0] * 3, [1, 0, 0], [0, 1, 0], [0, 0, 1]]
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


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("top_k, window", [(None, None), (2, None), (None, 2), (1, 3)])
def test_training_in_parallel_is_sampling_frame_by_frame(chunk, top_k, window):
    net, (x, x_t, t, c) = tiny(chunk, top_k, window=window), clip(chunk)
    together = net(x_t, t, c, x[:, :-1])
    for kept in {None, window and window + 1}:  # the newest frame in the cache has a window of its own
        cache, one_by_one = net.cache(2, 6, kept), []
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
    assert close(v[:, 0], net(x_t, t, c, x[:, :-1])[:, 4]) and cache.length == 4


def test_a_chunk_is_frames_that_see_each_other():
    video = torch.randn(2, 6, 2, 4, 6, dtype=torch.float64)
    assert torch.equal(unfold(fold(video, 3), 3), video)
    net, (x, x_t, t, c) = tiny(chunk=3), clip(chunk=3)
    changed = x_t.clone()
    changed[:, 1, 4:] += 1.0  # the last latent of chunk 1
    moved = (net(changed, t, c, x[:, :-1]) - net(x_t, t, c, x[:, :-1])).abs().amax((0, 3, 4))
    assert (moved[1] > 1e-6).all() and (moved[[0, 2, 3, 4, 5]] == 0).all()


PASSES = [(0, 5, 6, 0, 7), (3, 1, 1, 4, 5), (0, 0, 1, 0, 3), (4, 0, 1, 4, 3), (0, 2, 3, 0, 130), (2, 3, 4, 2, 33), (2, 0, 3, 2, 9)]


@pytest.mark.parametrize("window", (None, 2))
@pytest.mark.parametrize("cached, history, noisy, first, P", PASSES)
def test_block_masks_are_the_frame_tables(cached, history, noisy, first, P, window):
    past, own = sparse_causal_mask(cached, history, noisy, first, window=window)
    tokens = (past | own).repeat_interleave(P, 0).repeat_interleave(P, 1)
    for size in (16, 128):
        mask = routing.dense_blocks((past | own).numpy().tobytes(), past.shape, P, "cpu", size)
        for i, rows in enumerate(tokens.split(size)):
            parts = [part for part in rows.split(size, dim=1)]
            some, every = ({*indices[0, 0, i, :count[0, 0, i]].tolist()} for count, indices in (
                (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)))
            assert some | every == {j for j, part in enumerate(parts) if part.any()} and not some & every
            assert all(parts[j].all() and parts[j].shape == (size, size) for j in every)
    q, k, v = (torch.randn(1, 2, n, P, 8) for n in (len(past), past.shape[1], past.shape[1]))
    out = flex_attention(*(z.flatten(2, 3) for z in (q, k, v)), block_mask=mask)
    assert close(out.unflatten(2, (-1, P)), attend_masked(q, k, v, past, own), 1e-5)
    odd = past | own
    odd[-2:-1, 0] ^= True
    if len(past) > 3:
        with pytest.raises(ValueError, match="does not make"):
            routing.dense_blocks(odd.numpy().tobytes(), past.shape, P, "cpu")


@pytest.mark.parametrize("cached, history, noisy, first, P", PASSES)
@pytest.mark.parametrize("top_k", (1, 3, 9))
def test_a_queue_sorted_by_frame_is_routed_attention(cached, history, noisy, first, P, top_k):
    torch.manual_seed(0)
    past, own = sparse_causal_mask(cached, history, noisy, first)
    q, k, v = (torch.randn(2, 3, n, P, 8, dtype=torch.float64, requires_grad=True)
               for n in (len(past), past.shape[1], past.shape[1]))
    results = []
    for form in (attend_masked, routing.attend_picked):
        out = form(q, k, v, past, own, top_k)
        results.append([out, *torch.autograd.grad(out.cos().sum(), (q, k, v))])
    assert all(close(a, b) for a, b in zip(*results))


def test_routed_attention_keeps_no_copy_of_its_queries():
    past, own = sparse_causal_mask(0, 7, 8, 0)
    q, k, v = (torch.randn(1, 2, 15, 8, 64, requires_grad=True) for _ in range(3))
    kept = [bytes_kept(lambda: routing.attend_picked(q, k, v, past, own, top_k)) for top_k in (1, 5)]
    assert kept[1] < 1.2 * kept[0] < 5 * 4 * q.numel(), "q, k, v, the output and who was picked"


def test_blocks_of_the_queue_hold_every_pair_that_attends():
    torch.manual_seed(0)
    for P, columns in ((7, 9), (50, 4)):
        frame = torch.randint(columns, (2, 3, 5 * P)).sort(-1).values
        mask = routing.picked_blocks(frame, columns * P, P, size=16)
        seen = frame[..., None] == torch.arange(columns * P) // P
        dense = mask.to_dense().bool().repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :seen.shape[2], :seen.shape[3]]
        assert (dense | ~seen).all() and dense.float().mean() < 0.7, "nothing is lost and much is skipped"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has gradients on CUDA alone, and there is none here")
@pytest.mark.parametrize("cached, history, noisy, first, P", PASSES)
@pytest.mark.parametrize("top_k", (None, 1, 3))
def test_what_runs_on_cuda_is_the_definition(cached, history, noisy, first, P, top_k):
    torch.manual_seed(0)
    past, own = sparse_causal_mask(cached, history, noisy, first)
    q, k, v = (torch.randn(2, 3, n, P, 32, device="cuda", requires_grad=True) for n in (len(past), past.shape[1], past.shape[1]))
    results = []
    for form in (attend_masked, attend):
        out = form(q, k, v, past, own, top_k)
        results.append([out, *torch.autograd.grad(out.cos().sum(), (q, k, v))])
    assert all(close(a, b, 2e-2) for a, b in zip(*results))  # TF32


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
    net, (_, noise, _, c) = tiny(), clip()
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


def test_autocast_keeps_the_gradient_after_resampling():  # the bf16 weights it keeps must not be those of no_grad
    net, (x, _, _, c) = tiny().float(), (z.float() for z in clip())
    with torch.autocast("cpu", torch.bfloat16):
        flow_matching_loss(net, x, c, self_resample(net, x[:, :-1], c)).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in net.parameters())


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


def slow_route(q, k, past, top_k):
    """Eq. (9) in loops."""
    B, H, rows, P, _ = q.shape
    chosen = torch.zeros(B, H, rows, P, k.shape[2], dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for r in range(rows):
                for p in range(P):
                    frames = [j for j in range(k.shape[2]) if past[r, j]]
                    score = {j: (q[b, h, r, p] * sum(k[b, h, j, s] for s in range(P)) / P).sum().item() for j in frames}
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


def test_the_network_is_wan():
    with torch.device("meta"):
        net = CausalDiT(PRESETS["wan-1.3b"])
    assert sum(p.numel() for p in net.parameters()) == 1_418_996_800 and len(net.state_dict()) == 825
    names = set(net.state_dict())
    assert {"patch_embedding.weight", "text_embedding.2.bias", "time_embedding.0.weight", "time_projection.1.weight",
            "blocks.29.modulation", "blocks.0.self_attn.norm_q.weight", "blocks.0.cross_attn.o.bias",
            "blocks.0.norm3.weight", "blocks.0.ffn.2.weight", "head.head.weight", "head.modulation"} <= names


def test_wan_weights_load_by_either_name_and_wrong_ones_are_named(tmp_path):
    net, other = tiny(), tiny()
    for p in other.parameters():
        torch.nn.init.normal_(p)
    original = {k: v.reshape(24, 2, 1, 2, 2) if k == "patch_embedding.weight" else v for k, v in other.state_dict().items()}
    diffusers = {}
    for key, value in original.items():
        for a, b in (("text_embedding.0", "condition_embedder.text_embedder.linear_1"), ("head.head", "proj_out"),
                     ("text_embedding.2", "condition_embedder.text_embedder.linear_2"), ("norm3", "norm2"),
                     ("time_embedding.0", "condition_embedder.time_embedder.linear_1"), ("ffn.0", "ffn.net.0.proj"),
                     ("time_embedding.2", "condition_embedder.time_embedder.linear_2"), ("ffn.2", "ffn.net.2"),
                     ("time_projection.1", "condition_embedder.time_proj"), ("head.modulation", "scale_shift_table"),
                     ("modulation", "scale_shift_table"), ("self_attn", "attn1"), ("cross_attn", "attn2"), (".q.", ".to_q."),
                     (".k.", ".to_k."), (".v.", ".to_v."), (".o.", ".to_out.0.")):
            key = key.replace(a, b)
        diffusers[key] = value
    forcing = {"generator": {}, "generator_ema": {f"model.{k}": v for k, v in original.items()}}
    for state in (original, diffusers, forcing):
        torch.save(state, tmp_path / "wan.pth")
        model_py.load_wan(net, tmp_path / "wan.pth")
        assert same(dict(net.state_dict()), dict(other.state_dict()))
    lacking = {k: v for k, v in original.items() if k != "head.head.bias"} | {"img_emb": torch.ones(1)}
    torch.save(lacking | {"blocks.0.modulation": torch.ones(1, 6, 7)}, tmp_path / "wan.pth")
    with pytest.raises(ValueError, match="Missing.*head.head.bias.*Unexpected.*img_emb.*mismatch for blocks.0.modulation"):
        model_py.load_wan(net, tmp_path / "wan.pth")
    (tmp_path / "wan.pth").write_text("junk")
    torch.save({"generator": [1]}, tmp_path / "list.pth")
    for path in (tmp_path / "wan.pth", tmp_path / "list.pth", tmp_path / "none.pth"):
        with pytest.raises(ValueError, match=f"{path.name} cannot be read as weights"):
            model_py.load_wan(net, path)


def test_the_network_is_that_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers to compare with its WanTransformer3DModel")
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24,
        freq_dim=256, ffn_dim=64, num_layers=2, cross_attn_norm=True).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "transformer")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_text("of the network alone is read what it needs")
    ours = CausalDiT(Config(4, 32, 64, 2, 2, 2, 3, text_dim=24))
    model_py.load_wan(ours, tmp_path)
    x, c, t = torch.randn(2, 3, 4, 6, 8), torch.randn(2, 7, 24), torch.rand(2, 1)
    with torch.no_grad():  # one frame of three latents: nothing is masked, as in theirs
        v = ours(data.fold(x, 3), t, c)
        expected = theirs(x.transpose(1, 2), 1000 * t[:, 0], c).sample.transpose(1, 2)
    assert expected.std() > 0.1 and (data.unfold(v, 3) - expected).abs().max() < 5e-5 * expected.abs().max().clamp(min=1)


def write_tiny_wan(folder):
    """A diffusers folder with a random VAE, text encoder and tokenizer, each as small as it can be."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers transformers ftfy for Wan's VAE and text")
    transformers = pytest.importorskip("transformers", reason="pip install transformers for Wan's text encoder")
    pytest.importorskip("ftfy", reason="pip install ftfy, which cleans Wan's prompts")
    import tokenizers
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    config = transformers.UMT5Config(vocab_size=16, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu")
    words = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "a", "red", "boat"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    diffusers.WanPipeline(tokenizer, transformers.UMT5EncoderModel(config), vae,
                          diffusers.FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return folder


def test_from_mp4_to_latents_to_a_model_and_back(tmp_path, capsys):
    wan = write_tiny_wan(tmp_path / "wan")
    for name, frames in (("long", 20), ("short", 5)):
        with writer(tmp_path / "clips" / f"{name}.mp4", 16) as out:
            out(torch.rand(frames, 3, 48, 72) * 2 - 1)
    (tmp_path / "clips/long.txt").write_text("a red boat")
    (tmp_path / "clips/bad.mp4").write_text("no video")
    flags = ["encode", str(tmp_path / "clips"), str(tmp_path / "latents"), "--wan", str(wan), "--size", "32x48", "--frames", "9"]
    data.encode_folder(data.parse(flags))
    out = capsys.readouterr().out
    assert "bad.mp4 cannot be read" in out and "short.mp4 has 5 frames; wanted at least --frames 9" in out
    files = sorted((tmp_path / "latents").iterdir())
    assert [file.name for file in files] == ["long.mp4-0000.npz", "long.mp4-0001.npz"]
    files[0].unlink()
    before = files[1].stat().st_mtime_ns
    data.encode_folder(data.parse(flags))
    assert files[0].exists() and files[1].stat().st_mtime_ns == before, "what is finished is kept"
    with pytest.raises(ValueError, match="none of the"):
        data.encode_folder(data.parse([*flags[:-1], "13"]))
    assert "long.mp4-0000.npz is there already, of another --frames" in capsys.readouterr().out
    with np.load(files[0]) as file:
        assert file["latents"].shape == (3, 16, 4, 6) and file["text"].shape == (512, 32)
        assert abs(file["text"][:4]).sum() > 0 and not file["text"][4:].any(), "a red boat and its end, then zeros"
    train.main(["--data", str(tmp_path / "latents"), "--frames", "3", "--patch", "2", "--dim", "64", "--layers", "1", "--batch", "2",
                "--steps", "2", "--warmup", "1", "--sample-steps", "1", "--guidance", "1", "--out", str(tmp_path / "run")])
    sample.main(["a red boat", "--checkpoint", str(tmp_path / "run"), "--wan", str(wan), "--frames", "4", "--steps", "1",
                 "--given", str(tmp_path / "clips/long.mp4"), "--given-frames", "5", "--out", str(tmp_path / "out.mp4")])
    assert "with the VAE's decoding" in capsys.readouterr().out
    assert len(iio.imread(tmp_path / "out.mp4", plugin="pyav")) == 13, "two latents given and two made: 4 n - 3 frames"
    for flags, wanted in ((["--wan", str(tmp_path / "clips")], "holds no model_index.json"), ([], "--wan PATH names their VAE")):
        with pytest.raises(ValueError, match=wanted):
            sample.main(["a red boat", "--checkpoint", str(tmp_path / "run"), *flags])


def test_decoding_as_latents_come_is_decoding_all_at_once(tmp_path):
    wan = data.Wan(write_tiny_wan(tmp_path))
    video = torch.rand(1, 9, 3, 32, 48) * 2 - 1
    latents = wan.encode(video)
    one, several = wan.decoder(), wan.decoder()
    assert latents.shape == (1, 3, 16, 4, 6) and one(latents).shape == video.shape
    parts = [several(latents[:, :1]), several(latents[:, 1:])]
    whole = wan.pipe.vae.decode((latents.transpose(1, 2) * wan.std + wan.mean)).sample.transpose(1, 2).clamp(-1, 1)
    assert [part.shape[1] for part in parts] == [1, 8] and close(torch.cat(parts, 1), whole, 1e-5)


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
    assert close(routing.describe(cache.k), cache.descriptor), "what routing asks is kept beside the keys"
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
    assert cache.length == 3 and cache.first == 3
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


def test_sprites_are_a_function_of_seed_split_and_index():
    a, b = Sprites(seed=1), Sprites(seed=1)
    assert torch.equal(a[5][0], b[5][0]) and torch.equal(a[5][1], b[5][1])
    others = [Sprites(seed=2)[5], Sprites(seed=1, split="test")[5], a[6]]
    assert all(not torch.equal(a[5][0], other[0]) for other in others)
    assert torch.equal(Sprites(frames=40, seed=1)[5][0][:12], a[5][0]) and a[5][0].abs().max() <= 1
    assert {a.caption(i) for i in range(200)}.isdisjoint({""}) and len({a.caption(i) for i in range(200)}) > 50


def test_sprites_go_to_worker_processes_as_they_are():
    world = Sprites(8, 4)
    here, there = world[3], pickle.loads(pickle.dumps(world))[3]
    assert all(torch.equal(a, b) for a, b in zip(here, there))


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
    world = Sprites(frames=18, split="test")
    video, captions = torch.stack([world[i][0] for i in range(6)]), [world.caption(i) for i in range(6)]
    truth = measure(video, captions).nanmean((0, 1))
    assert (truth > 95).all(), truth
    torch.manual_seed(0)
    noise = measure(torch.rand_like(video) * 2 - 1, captions).nanmean((0, 1))
    assert (noise < 8).all(), noise
    assert (measure(video[:, :1].expand_as(video), captions)[:, 2:, 1].nanmean() < 25), "standing still is not moving"


def blurred(video, sigma):
    g = torch.exp(-torch.arange(-4, 5.0) ** 2 / (2 * sigma ** 2))
    pad = torch.nn.functional.pad(video.flatten(0, 2)[:, None], (4,) * 4, mode="replicate")
    return torch.nn.functional.conv2d(pad, (g[:, None] * g / g.sum() ** 2)[None, None]).view_as(video)


def test_the_ruler_tells_pixels_motion_and_names_apart():
    world = Sprites(frames=18, split="test")
    video, captions = torch.stack([world[i][0] for i in range(6)]), [world.caption(i) for i in range(6)]
    truth, slight, strong = (measure(z, captions).nanmean((0, 1)) for z in (video, blurred(video, 0.6), blurred(video, 2)))
    noise = measure(torch.rand_like(video) * 2 - 1, captions).nanmean((0, 1))
    assert (truth >= slight - 1).all() and (slight > strong + 30).all() and (strong > noise + 10).all()
    assert slight[0] < truth[0] - 10 and slight[1] > truth[1] - 10 and slight[2] > truth[2] - 2, "blur costs Visual"
    wrong = measure(video[:, :, [2, 0, 1]], captions).nanmean((0, 1))
    assert wrong[2] < truth[2] - 40, "other colours cost Text"
    jump = measure(torch.cat([video[:, :5], video[:, 12:], video[:, 5:12]], dim=1), captions).nanmean((0, 1))
    assert jump[1] < truth[1] - 15 and (jump - truth)[[0, 2]].abs().max() < 2, "a jump costs Temporal"


def test_the_ruler_forgives_what_the_wall_hides():
    for objects, size in ((1, 20), (2, 32)):
        world = Sprites(size, 24, split="test", objects=objects, wall=True)
        video, captions = torch.stack([world[i][0] for i in range(8)]), [world.caption(i) for i in range(8)]
        assert (measure(video, captions, wall=True).nanmean((0, 1)) > 95).all()


def test_behind_the_wall_there_is_something_to_remember():
    world = Sprites(20, split="test", objects=1, wall=True)
    hidden = [data.visible_share(at, shape.expand(24, 1), torch.ones(24, 1), 20, True)[:, 0] < 0.02
              for _, shape, at in (world.scene(i, 24) for i in range(32))]
    assert not torch.stack(hidden)[:, 0].any(), "all begin in sight"
    gone = [z for z in hidden if z[3:-1].any() and not z[-1]]
    assert len(gone) > 16 and np.mean([z.sum().item() for z in gone]) > 2, "most go out of sight for frames, and return"


def run_train(folder, *flags):
    train.main([*TINY, "--out", str(folder), *flags])
    return torch.load(folder / "ckpt.pt", weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def test_the_loss_falls_on_one_clip():
    torch.manual_seed(0)
    net = CausalDiT(Config(dim=64, ffn_dim=128, heads=2, layers=2))
    x, c = (z[None].expand(4, *z.shape) for z in Sprites(frames=3)[0])
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=3e-3), []
    for _ in range(120):
        loss = flow_matching_loss(net, x, c, x[:, :-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.2 and np.mean(losses[-10:]) < 0.25 * losses[0]


def test_a_run_leaves_what_design_says(tmp_path, capsys):
    state = run_train(tmp_path / "run", "--steps", "3", "--warmup", "1", "--sample-every", "2")
    assert state["step"] == 3 and json.loads((tmp_path / "run/config.json").read_text())["history"] == "resample"
    entries = log_of(tmp_path / "run")
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3] and any("held_out_loss" in e for e in entries)
    seconds = [e["history_seconds"] for e in entries if "loss" in e]
    assert seconds[0] < min(seconds[1:]) / 2, "the warm-up step took its history as it was"
    for name in ("step_000002.gif", "step_000002.png", "final.gif", "final.png"):
        assert (tmp_path / "run/samples" / name).stat().st_size > 100
    assert iio.imread(tmp_path / "run/samples/final.gif").shape[0] == 16
    out = capsys.readouterr().out
    assert "parameters" in out and "FLOPs per teacher-forcing step" in out and "Temporal" in out and "0-15" in out


@pytest.mark.parametrize("stopped", [2, 3])
def test_resume_is_exact_across_the_warm_up(tmp_path, stopped, monkeypatch):
    flags = ["--warmup", "3", "--history", "resample", "--ema", "0.9", "--accumulate", "2"]
    whole = run_train(tmp_path / "whole", "--steps", "6", *flags)
    saved = train.save

    class Killed(Exception):
        pass

    def save_and_die(*args):
        saved(*args)
        raise Killed
    monkeypatch.setattr(train, "save", save_and_die)
    with pytest.raises(Killed):
        run_train(tmp_path / "halves", "--steps", "6", "--save-every", str(stopped), *flags)
    monkeypatch.setattr(train, "save", saved)
    train.main(["--resume", "--out", str(tmp_path / "halves")])
    halves = torch.load(tmp_path / "halves/ckpt.pt", weights_only=True)
    for key in ("model", "ema", "optimizer", "step", "config"):
        assert same(whole[key], halves[key]), key
    losses = [[e["loss"] for e in log_of(tmp_path / name) if "loss" in e] for name in ("whole", "halves")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_three_steps_and_three_more_are_six(tmp_path):
    """With the learning rate still rising, --steps is only where to stop."""
    whole = run_train(tmp_path / "whole", "--steps", "6", "--warmup", "2", "--lr-warmup", "10")
    run_train(tmp_path / "part", "--steps", "3", "--warmup", "2", "--lr-warmup", "10")
    train.main(["--resume", "--out", str(tmp_path / "part"), "--steps", "6"])
    assert same(whole["model"], torch.load(tmp_path / "part/ckpt.pt", weights_only=True)["model"])


def test_a_run_goes_on_though_a_full_disk_cut_its_log_and_never_backwards(tmp_path):
    run_train(tmp_path, "--steps", "2", "--warmup", "1")
    whole = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(whole + '{"step": 3, "lo')
    with pytest.raises(ValueError, match="--steps 1: the run in .* is already at step 2"):
        train.main(["--resume", "--out", str(tmp_path), "--steps", "1"])
    train.main(["--resume", "--out", str(tmp_path), "--steps", "3"])
    log = (tmp_path / "log.jsonl").read_text()
    assert log.startswith(whole) and [json.loads(line)["step"] for line in log.splitlines()][-2:] == [3, 3]


def test_a_chunk_makes_the_default_clip_whole():
    assert [train.parse(flags).frames for flags in ([], ["--chunk", "3"], ["--chunk", "3", "--frames", "60"])] == [10, 12, 60]


def start(*command, cwd):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def test_sigterm_saves_and_resume_finds_the_latest(tmp_path):
    process = start(HERE / "train.py", *TINY, "--steps", "100000", cwd=tmp_path)
    log = tmp_path / "runs/001/log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.1)
        assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "go on with: python train.py --resume" in out
    step = torch.load(tmp_path / "runs/001/ckpt.pt", weights_only=True)["step"]
    process = start(HERE / "train.py", "--resume", "--steps", step + 2, cwd=tmp_path)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and torch.load(tmp_path / "runs/001/ckpt.pt", weights_only=True)["step"] == step + 2, out


def test_sharded_weights_make_the_same_steps_and_load_anywhere(tmp_path):
    flags = [*TINY, "--batch", "4", "--warmup", "1", "--layers", "2", "--decay", "constant", "--accumulate", "2", "--lr", "1e-3"]
    train.main([*flags, "--steps", "4", "--out", str(tmp_path / "one")])
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "train.py", "--fsdp",
                    *flags, "--steps", "3", "--recompute", "--out", tmp_path / "sharded", cwd=tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    train.main(["--resume", "--steps", "4", "--out", str(tmp_path / "sharded")])
    one, sharded = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("one", "sharded"))
    for part in ("model", "ema"):
        for key, value in one[part].items():
            assert close(value, sharded[part][key], 2e-4), (part, key)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node N train.py --fsdp would work"):
        train.main([*flags, "--fsdp", "--out", str(tmp_path / "alone")])


def one_call_per_frame(q, k, v, past, own, top_k=None, descriptor=None):
    """`attend`, slowly, with no work on what is masked out: its matrix products are those of the mask."""
    rows = [F.scaled_dot_product_attention(q[:, :, r], *(z[:, :, (past | own)[r]].flatten(2, 3) for z in (k, v)))
            for r in range(q.shape[2])]
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("chunk, steps", ((1, 1), (3, 1), (1, 3)))
def test_the_plan_counts_the_flops_that_run(chunk, steps, monkeypatch, tmp_path):
    monkeypatch.setattr(model_py, "attend", one_call_per_frame)
    config = Config(channels=4, dim=48, ffn_dim=100, heads=2, layers=3, patch=2, chunk=chunk, text_dim=10)
    args = train.parse(["--frames", str(4 * chunk), "--batch", "2", "--resample-steps", str(steps)])
    args.height, args.width = 4, 6
    net, x, c = CausalDiT(config), torch.randn(2, 4, 4 * chunk, 4, 6), torch.randn(2, 7, 10)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        flow_matching_loss(net, x, c, x[:, :-1])
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        self_resample(net, x[:, :-1], c, steps=steps)
    parameters, teacher, resample, parts = train.plan(args, config, 7, 1)
    assert abs(teacher / forward / 3 - 1) < 1e-9
    assert abs((resample - teacher) / counter.get_total_flops() - 1) < 0.05, "but for the text, read once by the cache"
    assert parts["weights"] == 4 * parameters == 4 * sum(p.numel() for p in net.parameters())


def one_call(q, k, v, past, own, top_k=None, descriptor=None):
    return F.scaled_dot_product_attention(*(z.flatten(2, 3) for z in (q, k, v))).view_as(q)


def bytes_kept(run):
    """What autograd keeps for backward of what `run` computes, every storage once."""
    kept = {}

    def keep(z):
        storage = z.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return z
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
        run()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("layers", (2, 5))
def test_the_plan_counts_the_activations_that_backward_keeps(layers, monkeypatch):
    monkeypatch.setattr(model_py, "attend", one_call)  # keeps what FlexAttention keeps
    config = Config(channels=4, dim=32, ffn_dim=160, heads=2, layers=layers, patch=2, text_dim=10)
    args = train.parse(["--frames", "6", "--batch", "2"])
    args.height, args.width = 24, 32
    net, x, c = CausalDiT(config), torch.randn(2, 6, 4, 24, 32), torch.randn(2, 7, 10)
    with torch.autocast("cpu", torch.bfloat16):
        kept = bytes_kept(lambda: net(x, torch.rand(2, 6), c, x[:, :-1]))
    assert 0.9 < train.plan(args, config, 7, 1)[3]["activations"] / kept < 1.1


def test_a_dry_run_says_what_fits_and_what_would_help(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, wanted in ((["--gpus", "64", "--fsdp"], "this fits"), (["--frames", "63", "--gpus", "8"], "this does not fit; what would help: --fsdp")):
        train.main(["--preset", "wan-1.3b", "--dry-run", *flags])
        out = capsys.readouterr().out
        assert "1,418,996,800 parameters" in out and wanted in out and not any(tmp_path.iterdir())


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


def test_recomputing_blocks_changes_no_gradient():
    net, (x, history, t, c) = tiny(), clip()
    grads = []
    for net.recompute in (False, True):
        net.zero_grad()
        net(x, t, c, history).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and grads[0][0].abs().sum() > 0


def test_two_processes_are_one(tmp_path):
    flags = [*TINY, "--batch", "4", "--steps", "3", "--warmup", "1", "--accumulate", "1", "--lr", "1e-3"]
    train.main([*flags, "--out", str(tmp_path / "one")])
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "train.py",
                    *flags, "--out", tmp_path / "two", cwd=tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    one, two = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("one", "two"))
    assert one["model"].keys() == two["model"].keys()
    for key in one["model"]:
        assert close(one["model"][key], two["model"][key], 2e-4), key
    for a, b in zip(log_of(tmp_path / "one")[:3], log_of(tmp_path / "two")[:3]):
        assert abs(a["loss"] - b["loss"]) < 1e-4


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path, monkeypatch):
    before = run_train(tmp_path / "run", "--steps", "2")
    monkeypatch.setattr(train, "flow_matching_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(ValueError, match=r"at step 2: the weights were not touched; the last good checkpoint is .*ckpt.pt"):
        train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "4"])
    assert same(before, torch.load(tmp_path / "run/ckpt.pt", weights_only=True))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    before = run_train(tmp_path / "run", "--steps", "2")

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="could not save step 3.*No space left.*--resume"):
        train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "3"])
    assert same(before, torch.load(tmp_path / "run/ckpt.pt", weights_only=True))
    assert not list((tmp_path / "run").glob("*.part"))


def test_init_starts_a_new_stage(tmp_path):
    first = run_train(tmp_path / "one", "--steps", "2")
    train.main([*TINY, "--out", str(tmp_path / "two"), "--init", str(tmp_path / "one"), "--steps", "1", "--lr", "1e-12",
                "--top-k", "1"])
    second = torch.load(tmp_path / "two/ckpt.pt", weights_only=True)
    assert second["step"] == 1 and second["config"]["top_k"] == 1
    assert all(close(first["ema"][k], second["model"][k], 1e-6) for k in first["ema"])


@pytest.mark.parametrize("flags", [["--history", "noise"], ["--history", "parallel", "--resample-steps", "2"],
                                   ["--history", "teacher"], ["--chunk", "2", "--top-k", "1"], ["--wall"],
                                   ["--frames", "12", "--chunk", "3"], ["--precision", "bf16"]])
def test_every_way_to_train(tmp_path, flags):
    run_train(tmp_path / "run", "--steps", "2", "--warmup", "1", *flags)
    assert all(np.isfinite(e["loss"]) for e in log_of(tmp_path / "run") if "loss" in e)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was trained a little, and routes."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.main([*TINY, "--out", str(folder), "--steps", "2", "--warmup", "1", "--top-k", "2"])
    return folder


def test_the_time_of_a_frame_is_printed_by_its_number(capsys):
    seconds = [0.9] * 20 + [0.01] * 40 + [0.02] * 40
    sample.print_speed(sample.parse(["--steps", "4", "--guidance", "1", "--device", "cpu"]), "100 frames", 100, seconds, seconds)
    assert "10.0 ms (21 to 40), 10.0 ms (41 to 60), 20.0 ms (61 to 80), 20.0 ms (81 to 100)" in capsys.readouterr().out


def test_prompts_become_videos_of_any_length(trained, tmp_path, capsys):
    sample.main(["red circle", "blue square", "--checkpoint", str(trained), "--out", str(tmp_path), "--frames", "9",
                 "--steps", "2", "--window", "3", "--sink", "1", "--samples", "2"])
    videos = sorted(tmp_path.glob("*.mp4"))
    assert len(videos) == 4 and all(len(iio.imread(path)) == 9 for path in videos) and (tmp_path / "sheet.png").exists()
    assert re.search(r"[\d.]+ frames per second: 4 x 9 new frames", capsys.readouterr().out)
    again = tmp_path / "again"
    sample.main(["red circle", "blue square", "--checkpoint", str(trained), "--out", str(again), "--frames", "9",
                 "--steps", "2", "--window", "3", "--sink", "1", "--samples", "2"])
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in videos), "the seed decides"


def test_a_clip_is_continued_and_the_prompt_switched(trained, tmp_path):
    clip_path = tmp_path / "clip.gif"
    with writer(clip_path, 8) as out:
        out(Sprites(size=8, frames=6)[3][0])
    sample.main(["red circle", "--then", "8", "blue square", "--given", str(clip_path), "--checkpoint", str(trained), "--out",
                 str(tmp_path / "on.gif"), "--frames", "10", "--steps", "2"])
    made, given = read_video(tmp_path / "on.gif", 8), read_video(clip_path, 8)
    assert len(made) == 10 and (made[:6] - given).abs().mean() < 0.1 and (made[6:] - made[5]).abs().mean() > 0.1


def test_a_switched_prompt_is_a_new_rollout_on_all_there_is(trained):
    net = load_checkpoint(trained)
    words = Words(*net.run["words"])
    a, b = words("red circle")[None], words("blue square")[None]
    given = torch.zeros(1, 0, 3, 8, 8)
    made = torch.cat(list(sample.generate(net, [(0, a), (4, b)], given, 6, 2)), 1)
    noise = torch.Generator().manual_seed(0)
    first = torch.cat(list(rollout(net, torch.randn(1, 4, 3, 8, 8, generator=noise), torch.ones(1), a, 2)), 1)
    then = list(rollout(net, torch.randn(1, 2, 3, 8, 8, generator=noise), torch.ones(1), b, 2, history=first))
    assert close(made, torch.cat([first, *then], 1), 1e-5)


def test_evaluations_are_written_compared_and_gathered(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "toy-0")
    shutil.copytree(trained, tmp_path / "toy-1")
    runs = [str(tmp_path / name) for name in ("toy-0", "toy-1")]
    flags = ["--videos", "2", "--frames", "9", "--steps", "1"]
    sample.main(["--compare", *runs, *flags, "--out", str(tmp_path / "both.gif")])
    out = capsys.readouterr().out
    assert out.count("2 held-out videos") == 2 and re.search(r"0-2 .*±.*±.*±", out)
    assert iio.imread(tmp_path / "both.gif").shape[0] == 9 and (tmp_path / "both.png").exists()
    assert np.array(json.loads((tmp_path / "toy-1/samples/eval.json").read_text())["frames"]).shape == (9, 3)
    sample.main(["--table", *runs])
    table = capsys.readouterr().out
    assert re.search(r"toy, 2 seeds\n.*\n +0-2 .*± +0.00", table), "the same weights, so no spread"
    assert re.findall(r"(\S+) ±", table) == re.findall(r"(\S+) ±", out)[:12], "and the numbers that --eval printed"
    sample.main(["--eval", "--true-history", "--checkpoint", runs[0], *flags])
    assert "on true history" in capsys.readouterr().out
    sample.main(["--true-history", "--table", runs[0]])
    assert "toy, 1 seed\n" in capsys.readouterr().out
    path = tmp_path / "toy-0/samples/eval.json"
    path.write_text(json.dumps({"frames": json.loads(path.read_text())["frames"] * 2}))
    with pytest.raises(ValueError, match="the seeds of toy have 18, 9 frames"):
        sample.main(["--table", *runs])
    path.write_text('{"frames')
    with pytest.raises(ValueError, match="toy-0/samples/eval.json is not what --eval writes"):
        sample.main(["--table", *runs])
    shutil.copytree(trained, tmp_path / "again/toy-0")
    sample.main(["--compare", runs[0], str(tmp_path / "again/toy-0"), *flags, "--out", str(tmp_path / "same-name.gif")])
    assert iio.imread(tmp_path / "same-name.gif").shape[1] == iio.imread(tmp_path / "both.gif").shape[1], "a row for each"
    other = torch.load(tmp_path / "toy-1/ckpt.pt")
    other["args"]["wall"] = True
    torch.save(other, tmp_path / "toy-1/ckpt.pt")
    with pytest.raises(ValueError, match="these runs learned different worlds"):
        sample.main(["--compare", *runs, *flags])


def test_on_true_history_each_frame_continues_the_truth(trained, monkeypatch):
    net = load_checkpoint(trained)
    asked = []
    monkeypatch.setattr(sample, "extend", lambda model, video, c, frames, given, **_: asked.append(video[0, :given]) or
                        torch.zeros(len(video), frames, 3, 8, 8))
    flags = ["--eval", "--true-history", "--videos", "1", "--frames", "6", "--window", "3"]
    args = sample.settle(sample.parse(flags), trained, net)
    truth, made = sample.evaluate(args, net)
    assert made.shape == truth.shape and (made[:, 2:] == 0).all()
    for n, history in enumerate(asked, 2):
        assert torch.equal(history, truth[0, max(0, n - 3):n])


def test_routing_is_counted_and_drawn(trained, tmp_path, capsys):
    sample.main(["--routing", "--frames", "6", "--window", "0", "--steps", "2", "--checkpoint", str(trained), "--out",
                 str(tmp_path)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(("layer", "mean"))]
    shares = [float(z) for z in rows[0].split()[2:]]
    assert len(rows) == 2 and len(shares) == 5 and abs(sum(shares) - 2) < 0.03, "each token picks top_k frames"
    assert iio.imread(tmp_path / "routing.png").ndim == 3


@pytest.fixture
def clips(tmp_path):
    """A folder of small videos in four formats, one caption, one short and one broken file."""
    folder = tmp_path / "clips"
    for i, name in enumerate(("a.mp4", "b.gif", "c.mp4")):
        with writer(folder / name, 10) as out:
            out(Sprites(size=16, frames=14)[i][0])
    (folder / "a.txt").write_text("A red Circle, moving")
    with writer(folder / "short.gif", 10) as out:
        out(Sprites(size=16, frames=3)[7][0])
    (folder / "broken.mp4").write_bytes(b"not a video at all")
    return folder


def test_a_folder_of_videos_is_read_and_its_bad_files_named(clips, capsys):
    videos = Videos(clips, 16, 8)
    out = capsys.readouterr().out
    assert out.count("broken.mp4") == 1 and "skipping 1 of 4 clips, of fewer than 8 frames" in out
    assert [p.name for p in videos.files] == ["a.mp4", "b.gif", "c.mp4"] and videos.fps == 10
    video, c = videos[0]
    assert video.shape == (8, 3, 16, 16) and torch.equal(video, Videos(clips, 16, 8)[0][0])
    seen, videos.load = [], lambda number: seen.append(number) or Videos.load(videos, number)
    assert all(len(videos[i][0]) == 8 for i in range(6))
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2], "no file twice in a round"
    assert videos.words.vocabulary == ["a", "circle", "moving", "red"]
    assert (videos.load(0)[1] != 0).any() and (videos.load(1)[1] == 0).all()
    assert len(read_video(clips / "a.mp4", 16, fps=5)) == 7 and len(read_video(clips / "a.mp4", 16, stride=3)) == 5
    assert len(Videos(clips, 16, 5, stride=2)[1][0]) == 5


def test_a_file_that_breaks_later_is_named_once_and_replaced(clips, capsys):
    videos = Videos(clips, 16, 8)
    (clips / "a.mp4").write_bytes(b"gone")
    capsys.readouterr()
    assert all(videos[i][0].shape == (8, 3, 16, 16) for i in range(9))
    assert capsys.readouterr().out.count("a.mp4") == 1


def test_what_is_skipped_is_named_and_links_are_followed(clips, tmp_path, capsys):
    (clips / "b.txt").write_bytes(b"caf\xe9 noir")
    iio.imwrite(clips / "still.png", np.zeros((16, 16, 3), np.uint8))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/here").symlink_to(clips)
    assert [path.name for path in Videos(tmp_path / "linked", 16, 8).files] == ["a.mp4", "c.mp4"]
    out = capsys.readouterr().out
    assert out.count("b.txt is not a text in UTF-8") == out.count("still.png") == 1


def test_training_on_a_folder_and_continuing_from_its_words(clips, tmp_path, capsys):
    run_train(tmp_path / "run", "--data", str(clips), "--size", "16", "--steps", "2", "--workers", "1")
    (clips / "a.txt").write_text("A blue Circle, moving")
    with pytest.raises(ValueError, match="other captions than when"):
        train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "3"])
    sample.main(["a red circle", "--checkpoint", str(tmp_path / "run"), "--given", str(clips / "b.gif"), "--given-frames", "3",
                 "--frames", "6", "--steps", "1", "--out", str(tmp_path / "o.mp4")])
    assert len(iio.imread(tmp_path / "o.mp4")) == 6
    with pytest.raises(ValueError, match='unknown word "dog".*circle'):
        sample.main(["a dog", "--checkpoint", str(tmp_path / "run")])


def test_training_on_latents(tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    for i in range(3):
        np.savez(folder / f"{i}.npz", latents=np.random.default_rng(i).normal(size=(6 + i, 4, 4, 8)).astype(np.float16),
                 text=np.ones((2 + i, 7), np.float16))
    latents = Latents(folder, 6)
    video, c = latents[0]
    assert video.shape == (6, 4, 4, 8) and c.shape == (4, 7) and video.dtype == torch.float32
    assert torch.equal(latents[5][0], Latents(folder, 6)[5][0])
    state = run_train(tmp_path / "run", "--data", str(folder), "--frames", "6", "--chunk", "3", "--patch", "2", "--steps", "2")
    assert state["config"]["channels"] == 4 and state["config"]["text_dim"] == 7


@pytest.mark.parametrize("channels", (1, 3))
def test_few_channels_are_latents_all_the_same(channels, tmp_path):
    bad_latents(tmp_path / "latents", latents=np.ones((6, channels, 4, 4)))
    run_train(tmp_path / "run", "--data", str(tmp_path / "latents"), "--steps", "1", "--patch", "2")
    with pytest.raises(ValueError, match="this model makes latents"):
        sample.main(["--checkpoint", str(tmp_path / "run")])


def test_latents_that_cannot_be_read_are_named_once_and_replaced(tmp_path, capsys):
    for z in (np.ones((6, 4, 8, 8)), np.full((6, 4, 8, 8), np.nan), np.full((6, 4, 8, 8), "word"), np.ones((6, 4, 8, 8), ">f4")):
        bad_latents(tmp_path, latents=z)
    bad_latents(tmp_path, latents=np.random.default_rng(0).normal(size=(6, 4, 8, 8)))
    path = tmp_path / "4.npz"
    path.write_bytes(path.read_bytes()[:3000] + bytes(100) + path.read_bytes()[3100:])
    latents = Latents(tmp_path, 6)
    assert all((latents[i][0] == 1).all() for i in range(15))
    out = capsys.readouterr().out
    assert [out.count(f"{i}.npz") for i in range(5)] == [0, 1, 1, 0, 1] and "no finite numbers" in out


def test_a_run_begins_with_wans_weights_and_the_papers_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(train.PRESETS, "wan-1.3b", Config(4, 48, 96, 2, 1, 2, 3, text_dim=7))
    bad_latents(tmp_path / "latents", latents=np.ones((6, 4, 4, 8)), text=np.ones((2, 7)))
    wan = CausalDiT(train.PRESETS["wan-1.3b"])
    torch.nn.init.normal_(wan.head.head.weight)
    torch.save(wan.state_dict(), tmp_path / "wan.pth")
    flags = ["--preset", "wan-1.3b", "--data", str(tmp_path / "latents"), "--init", str(tmp_path / "wan.pth")]
    args = train.parse(flags)
    assert (args.batch, args.lr, args.frames, args.decay, args.recompute) == (64, 5e-5, 21, "constant", True)
    train.main([*flags, "--frames", "6", "--batch", "1", "--steps", "1", "--lr", "1e-9", "--sample-steps", "1", "--out",
                str(tmp_path / "run")])
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["model"]
    assert all(close(value, state[key], 1e-6) for key, value in wan.state_dict().items())


def bad_latents(folder, **arrays):
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{len(list(folder.iterdir()))}.npz", **arrays)


@pytest.mark.parametrize("flags, message", [
    (["--data", "nowhere"], "nowhere is not a folder.*sprites"),
    (["--data", "empty"], "empty holds no videos"),
    (["--data", "foreign"], "no clip in foreign has 4 frames.*1 cannot be read"),
    (["--data", "clips", "--frames", "99"], "no clip in clips has 99 frames.*the longest has 14"),
    (["--data", "keys"], "keys/0.npz holds .*wanted `latents`"),
    (["--data", "mixed"], "mixed/1.npz holds latents .*same channels"),
    (["--data", "fake"], "fake/0.npz is not a readable .npz"),
    (["--size", "18"], "--size 18 is not divisible by 4, the patch; 20 would work"),
    (["--dim", "50", "--heads", "4"], "dim 50 cannot be split into 4 heads"),
    (["--frames", "7", "--chunk", "3"], "--frames 7 is not divisible by 3, the chunk; 9 would work"),
    (["--batch", "3", "--accumulate", "2"], r"--batch 3 is not divisible by 2, the processes \(1\) times --accumulate; 4 would work"),
    (["--patch", "8", "--size", "16"], "a patch holds 192 values, more than the width 48"),
    (["--out", "full"], "full already holds another run.*--resume"),
    (["--out", "died"], "died already holds another run; it saved no checkpoint: delete it"),
    (["--out", "junk.pt"], "junk.pt already holds"),
    (["--resume", "--out", "full", "--init", "full"], "--resume goes on with its own weights"),
    (["--init", "alien.pt"], "alien.pt is not a whole checkpoint.*magic"),
    (["--init", "nowhere"], "no checkpoint at nowhere"),
    (["--init", "junk.pt"], "junk.pt is not a whole checkpoint"),
    (["--init", "cut"], "cut/ckpt.pt is not a whole checkpoint"),
    (["--init", "full", "--dim", "96"], "the model of full has another shape: dim is 48 there and 96 here"),
    (["--init", "full", "--data", "texts", "--patch", "2", "--frames", "4"], "another shape.*text_dim is 20 there and 9 here"),
    (["--objects", "9"], "9 sprites"),
])
def test_bad_input_to_training(flags, message, clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "foreign", "fake", "cut", "full", "died"):
        Path(name).mkdir()
    Path("foreign/notes.mp4").write_text("hello")
    bad_latents(Path("keys"), pictures=np.zeros((4, 3, 8, 8)))
    bad_latents(Path("mixed"), latents=np.zeros((4, 3, 8, 8)))
    bad_latents(Path("mixed"), latents=np.zeros((4, 5, 8, 8)))
    bad_latents(Path("texts"), latents=np.zeros((4, 3, 8, 8)), text=np.zeros((2, 9)))
    Path("fake/0.npz").write_text("no zip")
    Path("junk.pt").write_text("junk")
    Path("died/log.jsonl").write_text("")
    torch.save(dict.fromkeys(("model", "ema", "step", "args"), {}) | {"config": {"magic": 1}}, "alien.pt")
    if "full" in flags or "cut" in flags:
        run_train(Path("full"), "--steps", "1", "--frames", "2")
        Path("cut/ckpt.pt").write_bytes(Path("full/ckpt.pt").read_bytes()[:2000])
    before = sorted(path for path in Path(".").rglob("*"))
    with pytest.raises(ValueError, match=message) as error:
        train.main([*TINY, *flags])
    assert "\n" not in str(error.value) and sorted(path for path in Path(".").rglob("*")) == before


@pytest.mark.parametrize("flags", [["--top-k", "0"], ["--lr", "nan"], ["--lr", "-1"], ["--steps", "-3"], ["--shift", "0"],
                                   ["--batch", "2.5"], ["--resample-share", "1.5"], ["--ema", "inf"], ["--history", "magic"],
                                   ["--frames", "ten"], ["--device", "cuda:99"], ["--device", "tpu"], ["--seed", str(2 ** 64)]])
def test_bad_flags_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(flags)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and flags[0] in err


@pytest.mark.parametrize("flags, message", [
    (["purple circle"], 'unknown word "purple".*red'),
    (["--frames", "9", "--given", "missing.mp4"], "missing.mp4 cannot be read"),
    (["--frames", "2", "--given", "clip.gif"], "clip.gif makes 5 frames; wanted .* fewer than --frames 2"),
    (["--then", "99", "red circle", "--frames", "8"], "--then 99"),
    (["--window", "2", "--sink", "2"], "--sink 2 leaves no room"),
    (["--eval", "--frames", "2"], "--frames 2: two of 1 are given; 3 can be measured"),
    (["--eval", "red circle"], "leave out prompts"),
    (["--out", "video.avi"], "video.avi"),
    (["--eval", "--out", "table.txt"], "table.txt: wanted a folder"),
    (["--given", "clip.gif", "--out", "clip.gif", "--frames", "6"], "--out clip.gif would overwrite --given"),
    (["--table", "nowhere"], "no .*eval.json; python sample.py --eval --checkpoint nowhere writes it"),
    (["--compare", "nowhere"], "no checkpoint at nowhere"),
])
def test_bad_input_to_sampling(flags, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with writer("clip.gif") as out:
        out(Sprites(size=8, frames=5)[0][0])
    with pytest.raises(ValueError, match=message):
        sample.main([*flags, "--checkpoint", str(trained), "--steps", "1"])
    assert sorted(os.listdir()) == ["clip.gif"]


def test_scripts_end_in_one_line_without_a_traceback(tmp_path):
    for command in (["train.py", "--data", "nowhere"], ["sample.py", "--checkpoint", "nowhere"], ["train.py", "--resume"]):
        process = start(HERE / command[0], *command[1:], cwd=tmp_path)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 2 and out.count("\n") == 1 and "Traceback" not in out, out


def test_the_readme_points_at_things_that_exist():
    text = (HERE / "README.md").read_text()
    modules = {"rf": rf, "routing": routing, "model": model_py, "data": data, "train": train, "sample": sample}
    rows = re.findall(r"^\|.*?`(\w+)\.(\w+)`", text, re.M)
    assert len(rows) >= 9 and all(hasattr(modules[file], name) for file, name in rows), rows
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        assert (HERE / path).exists(), path
    for number in range(2, 10):
        assert any(f"Eq. ({number})" in (HERE / f"{file}.py").read_text() or f"Eqs. (2) and ({number})" in
                   (HERE / f"{file}.py").read_text() or f"Eqs. ({number})" in (HERE / f"{file}.py").read_text()
                   for file in ("rf", "routing")), number


def test_the_code_stays_small():
    lines = {name: (HERE / f"{name}.py").read_text().splitlines() for name in ("rf", "routing", "model", "data", "train", "sample")}
    assert sum(len(lines[name]) for name in ("rf", "routing", "model")) < 700
    assert sum(bool(line.strip()) for file in lines.values() for line in file) < 2000  # docstrings and comments included


def test_the_readme_commands_parse():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    loops = {name: first for block in blocks for name, first in re.findall(r"for (\w+) in (\S+)", block)}
    commands = [re.sub(r"\$(\w+)", lambda name: loops[name[1]], line.split(" #")[0].split("&&")[-1].strip())
                for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parsed = 0
    for command in commands:
        words = shlex.split(command)
        for script, parse in (("train.py", train.parse), ("sample.py", sample.parse), ("data.py", data.parse)):
            if script in words:
                flags = words[words.index(script) + 1:]
                parse([flag for flag in flags if flag != "--resume"])
                parsed += 1
    assert parsed >= 6 and "pip install -r requirements.txt && pytest" in "\n".join(
        line.strip() for block in blocks for line in block.splitlines())
    assert "pip install -r requirements.txt && pytest" in (HERE / ".ci/run").read_text()
