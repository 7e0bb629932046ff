"""Resampling Forcing (arXiv 2512.15702): train a video model to continue its own, imperfect frames.

Time runs one way: t = 0 is a clean frame, t = 1 is noise, and the network predicts the velocity
v = eps - x. Eq. (7) is used three times: `s` shifts the t_s of the history, `time_shift` the t of
the loss, and another one the times of the solver. All needs one call of the network and one method:

    v = model(x, t, c, history=None, cache=None, first=0)
    cache = model.cache(batch, frames)

The noisy frames x, at levels t, are numbered first, first + 1, ... Each attends to itself and to
the finished frames of smaller numbers, which count as t = 0: those in the cache, numbered from 0,
and then `history`, which the call appends to the cache. Without a cache, the history begins at 0.

Self-resampling and generation are one function, `rollout`, from noise level t_s and from t = 1.
From t = 0 it would return its input, which is teacher forcing.

B videos, N noisy frames, M history frames, C channels, L words. A frame may be a chunk of latent
frames folded into its channels. Frames are (B, N, C, height, width), conditions c (B, L, text_dim).
Functions that draw random numbers take `rng`: the torch module, or an object with the same `rand`
and `randn`.
"""

from itertools import pairwise

import torch


def add_noise(x, eps, t):
    """Eq. (3): x_t = (1 - t) x + t eps. x, eps (B, N, C, height, width); t (B, N) in [0, 1]."""
    t = t[..., None, None, None]
    return (1 - t) * x + t * eps


def shift(t, s):
    """Eq. (7): move t in [0, 1] toward clean frames (s < 1) or noise (s > 1); 0 and 1 stay."""
    return s * t / (1 + (s - 1) * t)


def logit_normal(*shape, device=None, rng=torch):
    """Eq. (6): draw t in (0, 1) with logit(t) ~ N(0, 1); its median is 1/2."""
    return rng.randn(*shape, device=device).sigmoid()


def flow_matching_loss(model, x, c, history, time_shift=1.0, rng=torch):
    """Eq. (4): the mean squared error of v to eps - x, with one noise level per frame.

    x (B, N, C, height, width): clean frames. history (B, N - 1, C, height, width): the frames that
    x attends to, clean or resampled. The target is the clean x, whatever the history is.
    time_shift: s of Eq. (7) on these levels.
    """
    t = shift(logit_normal(*x.shape[:2], device=x.device, rng=rng), time_shift).to(x.dtype)
    eps = rng.randn(*x.shape, device=x.device, dtype=x.dtype)

    v = model(add_noise(x, eps, t), t, c, history)
    return (v - (eps - x)).square().mean()


def solve(model, x, t, c, steps, time_shift, history, cache, first):
    """Integrate Eq. (2) from t to 0 in Euler steps, for all frames of x at once.

    x (B, N, C, height, width) is at noise level t (B,); returns the finished frames, shaped like x.
    The first step's pass writes history (B, M, C, height, width) into the cache; later steps read
    it from there.
    """
    grid = torch.linspace(1, 0, steps + 1, device=t.device, dtype=t.dtype)
    times = t[:, None] * shift(grid, time_shift)  # (B, steps + 1)

    for now, after in pairwise(times.unbind(1)):
        v = model(x, now[:, None].expand(x.shape[:2]), c, history, cache, first)
        x = x + (after - now)[:, None, None, None, None] * v
        history = None
    return x


@torch.no_grad()
def rollout(model, x, t, c, steps=1, time_shift=1.0, history=None, cache=None):
    """Eqs. (2), (5): denoise frame after frame, each conditioned on the frames finished before it.

    x (B, N, C, height, width) is at noise level t (B,). history (B, M, C, height, width): given
    frames before x. cache: an empty one from `model.cache`; None makes one. Integrates from t to 0
    on the times t * shift(linspace(1, 0, steps + 1), time_shift). Yields each finished frame
    (B, 1, C, height, width) at once.
    """
    given = 0 if history is None else history.shape[1]
    if cache is None:
        cache = model.cache(x.shape[0], given + x.shape[1])

    for i in range(x.shape[1]):
        frame = solve(model, x[:, [i]], t, c, steps, time_shift, history, cache, first=given + i)
        yield frame
        history = frame


def noise_to_t_s(x, s, rng=torch):
    """Algorithm 1, lines 2-3: draw one t_s per video, Eqs. (6), (7), and noise x to it, Eq. (3).

    Returns x_ts shaped like x, and t_s (B,).
    """
    t_s = shift(logit_normal(x.shape[0], device=x.device, rng=rng), s).to(x.dtype)
    eps = rng.randn(*x.shape, device=x.device, dtype=x.dtype)
    return add_noise(x, eps, t_s[:, None]), t_s


@torch.no_grad()
def self_resample(model, x, c, s=0.6, steps=1, rng=torch):
    """Algorithm 1, lines 2-9, Eq. (5): replace frames by the model's reconstruction, no gradient.

    x (B, N, C, height, width): clean frames. Returns x̃ shaped like x, after one forward per frame
    and Euler step. Training passes x[:, :-1], since no frame attends to the last one.
    """
    x_ts, t_s = noise_to_t_s(x, s, rng)
    return torch.cat([x[:, :0], *rollout(model, x_ts, t_s, c, steps)], dim=1)


# Teacher forcing and the rows of Table 2: functions of one signature that return a history shaped
# like x.


def teacher_history(model, x, c, s, steps, noise, rng=torch):
    """Teacher forcing: the history is the ground truth, x itself."""
    return x


def noise_history(model, x, c, s, steps, noise, rng=torch):
    """Table 2, "history noise": add noise to each frame, at a level uniform in [0, noise]."""
    eps = rng.randn(*x.shape, device=x.device, dtype=x.dtype)
    t = noise * rng.rand(*x.shape[:2], device=x.device).to(x.dtype)
    return add_noise(x, eps, t)


@torch.no_grad()
def parallel_history(model, x, c, s, steps, noise, rng=torch):
    """Table 2, "parallel resampling": all frames at once on the true history; no errors add up."""
    x_ts, t_s = noise_to_t_s(x, s, rng)
    cache = model.cache(*x.shape[:2])  # for the second Euler step and later ones
    return solve(model, x_ts, t_s, c, steps, 1.0, x[:, :-1], cache, first=0)


def resample_history(model, x, c, s, steps, noise, rng=torch):
    """Table 2, "autoregressive resampling": frame after frame; errors compound as in generation."""
    return self_resample(model, x, c, s, steps, rng)


HISTORY = {
    "teacher": teacher_history,
    "noise": noise_history,
    "parallel": parallel_history,
    "resample": resample_history,
}


class Guided:
    """Classifier-free guidance with the model's call signature, both branches in one batch.

    v = v_c + (scale - 1) (v_c - v_null): scale 1 returns v_c, larger values follow c more closely.
    null (L, text_dim) or (1, L, text_dim): condition of the unconditional branch, for instance
    zeros or a negative prompt.
    """

    def __init__(self, model, null, scale):
        self.model = model
        self.null = null
        self.scale = scale

    def cache(self, batch, frames, **options):
        return self.model.cache(2 * batch, frames, **options)

    def __call__(self, x, t, c, history=None, cache=None, first=0, history_t=None):
        x, t, history, history_t = map(twice, (x, t, history, history_t))
        c = torch.cat([c, self.null.expand_as(c)])
        levels = [] if history_t is None else [history_t]  # many models take none

        v_c, v_null = self.model(x, t, c, history, cache, first, *levels).chunk(2)
        return v_c + (self.scale - 1) * (v_c - v_null)


def twice(z):
    """A batch two times over, (2 B, ...); None stays None."""
    return None if z is None else torch.cat([z, z])
