"""Resampling Forcing (arXiv 2512.15702): teach a video model to continue its own, imperfect frames.

Time runs one way: t = 0 is a clean frame, t = 1 is noise, and the network returns the velocity v = eps - x.
Everything here needs one call, `v = model(x, t, c, history, cache, first)`, and `model.cache(batch, frames)`:
the noisy frames x, numbered from `first`, see their history; a cache remembers the frames that came before.
Teacher forcing, self-resampling and generation are one function, `rollout`, begun at t = 0, at t_s and at t = 1.

B videos, N frames (a frame may be a chunk of latent frames, folded into its channels), C channels, L words.
"""
from itertools import pairwise

import torch
from torch import rand, randn, randn_like  # every draw of this file

def add_noise(x, eps, t):
    """Eq. (3): x_t = (1 - t) x + t eps. x, eps (B, N, C, height, width); t (B, N) or (B, 1) in [0, 1]."""
    t = t[..., None, None, None]
    return (1 - t) * x + t * eps

def shift(t, s):
    """Eq. (7): s < 1 leans toward clean frames, s > 1 toward noise; 0 and 1 stay where they are."""
    return s * t / (1 + (s - 1) * t)

def logit_normal(*shape, device=None):
    """Eq. (6): t in (0, 1) whose logit is a standard normal; its median is 1/2."""
    return randn(*shape, device=device).sigmoid()

def flow_matching_loss(model, x, c, history, time_shift=1.0):
    """Eq. (4): the mean squared error of v to eps - x, every frame at a noise level of its own.
    x (B, N, C, height, width) clean frames; c (B, L, text_dim); history (B, N - 1, C, height, width): what the
    frames see of their past, clean or resampled. The target is the clean x whatever the history is."""
    t = shift(logit_normal(*x.shape[:2], device=x.device), time_shift).to(x.dtype)
    eps = randn_like(x)
    v = model(add_noise(x, eps, t), t, c, history)
    return (v - (eps - x)).square().mean()

def solve(model, x, t, c, steps, time_shift, history, cache, first):
    """Eq. (2)'s integral by Euler steps: the frames x (B, N, ...), all at noise level t (B,), finished together.
    The history enters the cache in the first step's pass; the later steps find it there."""
    times = t[:, None] * shift(torch.linspace(1, 0, steps + 1, device=t.device, dtype=t.dtype), time_shift)
    for now, after in pairwise(times.unbind(1)):
        v = model(x, now[:, None].expand(x.shape[:2]), c, history, cache, first)
        x = x + (after - now)[:, None, None, None, None] * v
        history = None
    return x

@torch.no_grad()
def rollout(model, x, t, c, steps=1, time_shift=1.0, history=None, cache=None):
    """Eqs. (2) and (5): finish the frames of x one after another, each on the frames just finished.
    x (B, N, C, height, width) already at noise level t (B,); c (B, L, text_dim); history (B, M, ...): given
    frames that come before x; cache: an empty one from `model.cache`, made here if None. Euler from t to 0 on
    t · shift(linspace(1, 0, steps + 1), time_shift). Yields each frame (B, 1, C, height, width) when it is done."""
    given = 0 if history is None else history.shape[1]
    if cache is None:
        cache = model.cache(x.shape[0], given + x.shape[1])
    for i in range(x.shape[1]):
        frame = solve(model, x[:, [i]], t, c, steps, time_shift, history, cache, first=given + i)
        yield frame
        history = frame

def noise_to(x, s):
    """Algorithm 1, lines 2-3: one t_s per video, Eqs. (6) and (7), and x noised to it. Returns (x_ts, t_s)."""
    t_s = shift(logit_normal(x.shape[0], device=x.device), s).to(x.dtype)
    return add_noise(x, randn_like(x), t_s[:, None]), t_s

@torch.no_grad()
def self_resample(model, x, c, s=0.6, steps=1):
    """Algorithm 1, lines 2-9, Eq. (5): the history redrawn with the model's own mistakes. No gradient.
    x (B, N, C, height, width) clean frames -> x̃ shaped like x. Training gives it x[:, :-1]: the last frame is
    nobody's history."""
    x_ts, t_s = noise_to(x, s)
    return torch.cat([x[:, :0], *rollout(model, x_ts, t_s, c, steps)], dim=1)

def teacher_history(model, x, c, s, steps, noise):
    """Teacher forcing: the history is the truth."""
    return x

def noise_history(model, x, c, s, steps, noise):
    """Table 2, "noise": Gaussian noise on every history frame, its level uniform in [0, noise]."""
    return add_noise(x, randn_like(x), noise * rand(x.shape[:2], device=x.device).to(x.dtype))

@torch.no_grad()
def parallel_history(model, x, c, s, steps, noise):
    """Table 2, "parallel": every frame resampled at once on the true history, so that errors never compound."""
    x_ts, t_s = noise_to(x, s)
    return solve(model, x_ts, t_s, c, steps, 1.0, x[:, :-1], model.cache(*x.shape[:2]), first=0)

def resample_history(model, x, c, s, steps, noise):
    """Resampling Forcing: errors compound as they will in generation."""
    return self_resample(model, x, c, s, steps)

HISTORY = {"teacher": teacher_history, "noise": noise_history, "parallel": parallel_history, "resample": resample_history}

class Guided:
    """Classifier-free guidance under the model's own contract; both branches ride in one batch.
    null (L, text_dim) or (1, L, text_dim): what the unconditional branch is told (zeros, or a negative prompt).
    scale 1 is the model itself, more follows c more closely: v = v_null + scale (v_c - v_null)."""
    def __init__(self, model, null, scale):
        self.model, self.null, self.scale, self.both = model, null, scale, None

    def cache(self, batch, frames, **options):
        return self.model.cache(2 * batch, frames, **options)

    def __call__(self, x, t, c, history=None, cache=None, first=0):
        if self.both is None or self.both[0] is not c:  # the same tensor for the same c: its keys are then made once
            self.both = c, torch.cat([c, self.null.expand_as(c)])
        x, t, history = (None if z is None else torch.cat([z, z]) for z in (x, t, history))
        v, v_null = self.model(x, t, self.both[1], history, cache, first).chunk(2)
        return torch.lerp(v_null, v, self.scale)
