"""Table 1 on the sprites: the training principles of the paper's rivals, on one network.

  python results/rivals.py diffusion-forcing --init runs/warm-0 --out runs/diffusion-forcing-0
  python results/rivals.py DMD-on-rollouts --init runs/warm-0 --teacher runs/bidirectional-0 \
--out runs/DMD-on-rollouts-0

A row follows the principle of one system, and is not that system. Teacher forcing (after NOVA),
history noise (after Pyramid Flow) and resampling are runs of train.py.

  diffusion-forcing            every frame has its own noise level, non-decreasing along time, and
                               sees the noisy earlier frames and their levels (after SkyReels-V2)
  pipelined-diffusion-forcing  the same with the levels of a pipeline; four frames are denoised at
                               once in sampling, each a step ahead of the next (after MAGI-1)
  DMD-on-real-clips            distilled from a bidirectional teacher, on noised real clips (after
                               CausVid)
  DMD-on-rollouts              the same, on the student's own rollouts (after Self Forcing)
  DMD-on-long-rollouts         the same, on long ones with a window and a sink (after LongLive)
  told                         resampling, but the network is told from which level the history was
                               redrawn; a row of Fig. 6, not a rival

Clips, network and sizes are those of the run that --init names. B videos, N frames of a clip, C
channels, L words.
"""

import sys
import time
from argparse import Namespace
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from data import Parser, fold, number, open_data, run_main
from model import LEAST_T, Cache, CausalDiT, load_checkpoint, load_weights, read_checkpoint
from rf import Guided, add_noise, flow_matching_loss, noise_to_t_s, rollout, shift
from sample import GIVEN, SAMPLERS, default_sampler, generate

STEPS = SAMPLERS["sprites"]["steps"]  # of a frame, and noise levels of a distilled student


def solver_times(time_shift, device=None):
    """The noise levels between which a frame is denoised, from 1 to 0: (STEPS + 1,)."""
    return shift(torch.linspace(1, 0, STEPS + 1, device=device), time_shift)


def clean_estimate(x_t, t, v):
    """x̂ = x_t - t v, from Eq. (3) and v = eps - x. x_t, v (B, N, C, height, width), t (B, N)."""
    return x_t - t[..., None, None, None] * v


class SeededNoise:
    """`randn` of one seed, on the CPU, in place of the torch module."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape, device=None):
        return torch.randn(shape, generator=self.generator).to(device)


# ---- diffusion forcing ----


def non_decreasing_levels(B, N, rng):
    """Noise levels (B, N) of SkyReels-V2: one frame's is logit-normal, as that of the other rows.

    Those of the earlier frames are of the same distribution below it, those of the later frames
    above it, both in order.
    """
    frame = (N * rng.rand(B, 1)).long()
    t = rng.rand(B, 1)
    u = rng.rand(B, N)
    place = torch.arange(N, device=t.device)
    levels = torch.where(place < frame, u * t, t + (1 - t) * u)
    levels = torch.where(place == frame, t, levels).sort(1).values
    return torch.special.ndtri(levels).sigmoid()  # of uniform levels: the normal quantile


def pipeline_levels(B, N, rng):
    """Noise levels (B, N) of MAGI-1: finished frames, then a ramp over STEPS frames, then noise.

    The number of finished frames, and how far the ramp has come, are uniform. In four clips of ten
    the rollout has just begun: the first unfinished frame is not the lowest of the ramp, up to a
    frame of pure noise right behind the finished ones.
    """
    finished = 1 + ((N - STEPS) * rng.rand(B, 1)).long()
    missing = ((STEPS + 1) * (2 * rng.rand(B, 1) - 1)).long().clamp(min=0)  # 0 to STEPS
    phase = rng.rand(B, 1)
    place = torch.arange(N, device=phase.device)
    ramp = ((place - finished + missing + phase) / STEPS).clamp(0, 1)
    return torch.where(place < finished, 0, ramp)


def diffusion_forcing_loss(model, x, c, t, rng):
    """Eq. (4) where every frame sees the noisy frames before it, and their noise levels.

    x (B, N, C, height, width), t (B, N). Two kinds of frames are left out. Below LEAST_T a network
    that predicts x̂ cannot give v, and its error would be most of the loss. In a pipeline no frame
    is begun behind one of pure noise.
    """
    eps = rng.randn(*x.shape, device=x.device)
    x_t = add_noise(x, eps, t)
    v = model(x_t, t, c, x_t[:, :-1], history_t=t[:, :-1])
    learned = t >= LEAST_T
    learned[:, 1:] &= t[:, :-1] < 1
    learned = learned.to(x.dtype)[..., None, None, None]
    error = ((v - (eps - x)).square() * learned).mean()
    return error / learned.mean().clamp(min=1e-6)


class DiffusionForcing:
    """Train with noise levels of `draw`; sample frame after frame, or as a pipeline."""

    def __init__(self, draw, run):
        self.draw = draw
        self.time_shift = run.time_shift

    def loss(self, net, x, c, step, rng):
        t = shift(self.draw(*x.shape[:2], rng), self.time_shift)
        return diffusion_forcing_loss(net, x, c, t, rng)


class Told:
    """A network that is told a noise level of its history, instead of 0.

    level: a number, or (B, 1).
    """

    def __init__(self, net, level):
        self.net, self.config, self.run, self.cache = net, net.config, net.run, net.cache
        self.level = torch.as_tensor(level)

    def __call__(self, x, t, c, history=None, cache=None, first=0):
        history_t = None if history is None else self.levels(history)
        return self.net(x, t, c, history, cache, first, history_t)

    def levels(self, history):
        """The noise level of each frame of history, (B, M)."""
        return self.level.to(history.device).expand(history.shape[:2])


class NoisyHistory(Told):
    """A network whose history is noised to a small level, which it is told, as in SkyReels-V2.

    All videos of a batch get the same noise, so that both branches of guidance see one history.
    """

    def __init__(self, net, seed, level=0.02):
        super().__init__(net, level)
        self.rng = SeededNoise(~seed)  # not the noise from which a frame starts

    def __call__(self, x, t, c, history=None, cache=None, first=0):
        if history is not None:
            eps = self.rng.randn(1, *history.shape[1:], device=x.device)
            history = add_noise(history, eps, self.levels(history))
        return super().__call__(x, t, c, history, cache, first)


class ToldResampling:
    """Resampling Forcing, but the history enters at t_s, from which it was redrawn, not at 0."""

    def __init__(self, run):
        self.s, self.time_shift = run.shift, run.time_shift

    def loss(self, net, x, c, step, rng):
        x_ts, t_s = noise_to_t_s(x[:, :-1], self.s, rng)
        told = Told(net, t_s[:, None])
        history = torch.cat(list(rollout(told, x_ts, t_s, c)), dim=1)
        return flow_matching_loss(told, x, c, history, self.time_shift, rng)


def diffusion_forcing_rollout(net, given, c, frames, seed):
    """Frame after frame, each on slightly noised finished frames; yields (B, 1, C, ...)."""
    return plain_rollout(NoisyHistory(net, seed), given, c, frames, seed)


@torch.no_grad()
def pipelined_rollout(net, given, c, frames, seed):
    """STEPS frames in flight at once, each one solver step ahead of the next.

    A pass moves all of them by a step, so that it finishes one frame. A frame sees the finished
    ones and the noisy ones before it, at the levels of the training. Yields each finished frame
    (B, 1, C, height, width).
    """
    rng = SeededNoise(seed)
    times = solver_times(net.run["time_shift"], given.device)
    sampler = default_sampler(net)
    model = Guided(net, torch.zeros_like(c[:1]), sampler["guidance"])
    seen = max(1, sampler["window"] + 1 - STEPS)  # finished frames in sight
    known = given
    x = given[:, :0]  # the frames in flight, the first to finish first
    taken = []  # solver steps that each of them has taken
    started = given.shape[1]

    while known.shape[1] < frames:
        if started < frames:
            new = rng.randn(len(given), 1, *given.shape[2:], device=given.device)
            x = torch.cat([x, new], dim=1)
            taken.append(0)
            started += 1

        step = torch.tensor(taken, device=given.device)
        t = times[step].expand(len(x), -1)
        past = known[:, -seen:]
        history = torch.cat([past, x[:, :-1]], dim=1)
        history_t = torch.cat([torch.zeros_like(past[:, :, 0, 0, 0]), t[:, :-1]], dim=1)
        v = model(x, t, c, history, None, past.shape[1], history_t)
        x = x + (times[step + 1] - times[step])[None, :, None, None, None] * v

        taken = [n + 1 for n in taken]
        if taken[0] == STEPS:
            known = torch.cat([known, x[:, :1]], dim=1)
            yield x[:, :1]
            x, taken = x[:, 1:], taken[1:]


# ---- distillation ----


class FrozenCache(Cache):
    """A cache that a pass with gradient reads but does not write: its frames have no gradient."""

    def put(self, layer, k, v):
        if not torch.is_grad_enabled():
            return super().put(layer, k, v)
        past_k, past_v = self.kv[:, layer, :, :, : self.length]
        return torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)


def student_frames(net, times, noise, c, history, cache, first, last_step, rng):
    """Denoise frame after frame in few steps: x̂, then fresh noise of the next level, and so on.

    times: the noise levels, from `solver_times`. noise (B, N, C, height, width). history: finished
    frames to write into the cache. Every frame stops after step `last_step`: STEPS - 1 in sampling,
    random in training (the exit step of Self Forcing). Only that step's pass has a gradient, where
    gradients are enabled; the cache has none. Yields x̂ (B, 1, C, height, width), which is the next
    history.
    """
    times = times.to(noise.device)
    gradient = torch.is_grad_enabled()
    for i in range(noise.shape[1]):
        x = noise[:, [i]]
        for step in range(last_step + 1):
            t = times[step].expand(len(x), 1)
            last = step == last_step
            if step == 0 or not (last and gradient):  # the first pass writes the history
                with torch.no_grad():
                    v = net(x, t, c, history, cache, first + i)
                history = None
            if last and gradient:
                v = net(x, t, c, None, cache, first + i)

            clean = clean_estimate(x, t, v)
            if not last:
                t = times[step + 1].expand(len(x), 1)
                x = add_noise(clean, rng.randn(*x.shape, device=x.device), t)
        yield clean
        history = clean.detach()


def dmd_loss(clean, t, eps, real, fake):
    """Distribution matching: its gradient moves clips from the fake model's estimate to the real's.

    clean (B, 1, C, height, width): the student's clips, with gradient. t (B, 1), eps: noise for
    both judges. real, fake: v = model(x, t), of the data and of the student's clips. The gradient
    of the loss is (x̂_fake - x̂_real) / mean|x̂ - x̂_real| over the number of values (arXiv
    2405.14867, as in CausVid and Self Forcing).
    """
    with torch.no_grad():
        x_t = add_noise(clean, eps, t)
        of_fake = clean_estimate(x_t, t, fake(x_t, t))
        of_real = clean_estimate(x_t, t, real(x_t, t))
        scale = (clean - of_real).abs().mean((1, 2, 3, 4), keepdim=True)
        gradient = ((of_fake - of_real) / scale).nan_to_num()
    return (clean - (clean - gradient).detach()).square().mean() / 2


class Distillation:
    """DMD from a bidirectional teacher, whose one chunk is the whole clip.

    The teacher judges with guidance. The fake model begins as the teacher and learns the student's
    clips at every step; the student learns at every `every`-th.
    """

    level_shift = 10.0  # Eq. (7) on the student's noise levels
    momentum = 0.0  # of both optimizers
    guidance = 1.5
    every = 5
    sink = 0  # frames from the start of a video that the student keeps in sight

    def __init__(self, run):
        self.real = load_checkpoint(run.teacher)
        self.length = self.real.config.chunk  # frames of a clip
        if (self.length, self.real.run["frames"]) != (run.frames, run.frames):
            raise ValueError(
                f"--teacher {run.teacher}: wanted a run whose one chunk is the whole clip, --chunk "
                f"{run.frames} --frames {run.frames}; it has --chunk {self.length} --frames "
                f"{self.real.run['frames']}"
            )
        self.fake = deepcopy(self.real).requires_grad_(True)
        self.optimizer = adam(self.fake, run.lr, self.momentum)
        self.times = solver_times(self.level_shift)
        self.time_shift = run.time_shift

    def loss(self, net, x, c, step, rng):
        """Train the fake model; return the student's loss, or None in a step that has none."""
        trains = step % self.every == 0
        with torch.set_grad_enabled(trains):
            clips, c = self.student_clips(net, x, c, rng)
        clips = fold(clips, self.length)
        self.train_fake(clips.detach(), c, rng)
        if not trains:
            return None

        t = shift(0.02 + 0.96 * rng.rand(len(x), 1, device=x.device), self.time_shift)
        eps = rng.randn(*clips.shape, device=x.device)
        real = Guided(self.real, torch.zeros_like(c[:1]), self.guidance)
        return dmd_loss(clips, t, eps, lambda x, t: real(x, t, c), lambda x, t: self.fake(x, t, c))

    def train_fake(self, clips, c, rng):
        """One step of flow matching on the student's clips, at the noise levels of its teacher.

        Self Forcing draws the uniform levels of DMD; here students then kept less motion.
        """
        with torch.enable_grad():
            flow_matching_loss(self.fake, clips, c, None, self.time_shift, rng).backward()
        torch.nn.utils.clip_grad_norm_(self.fake.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class RealClips(Distillation):
    """The student denoises real clips, each frame from one of its own noise levels, or none."""

    level_shift = 1.0
    momentum = 0.9

    def student_clips(self, net, x, c, rng):
        level = ((STEPS + 1) * rng.rand(*x.shape[:2])).long()
        t = self.times.to(x.device)[level]
        x_t = add_noise(x, rng.randn(*x.shape, device=x.device), t)
        v = net(x_t, t, c, x_t[:, :-1], history_t=t[:, :-1])
        return clean_estimate(x_t, t, v), c


class Rollouts(Distillation):
    """The student continues GIVEN true frames on its own output, to the length of a clip."""

    longest = 10**6  # frames of a rollout

    def new_cache(self, net, batch):
        window = default_sampler(net)["window"]
        return FrozenCache(net.config.layers, batch, self.longest, window, self.sink)

    def student_clips(self, net, x, c, rng):
        cache = self.new_cache(net, len(x))
        context = x[:, :GIVEN]
        return self.roll_on(net, context, c, context, cache, GIVEN, rng), c

    def roll_on(self, net, context, c, history, cache, first, rng):
        """The frames of `context`, and the student's frames number `first` and on: a whole clip."""
        new = self.length - GIVEN
        noise = rng.randn(len(context), new, *context.shape[2:], device=context.device)
        last_step = int(STEPS * rng.rand(len(context))[0])  # the same for all frames
        times = self.times
        frames = student_frames(net, times, noise, c, history, cache, first, last_step, rng)
        return torch.cat([context, *frames], dim=1)


class LongRollouts(Rollouts):
    """The student rolls on from step to step, up to `longest` frames; judge the newest clip."""

    sink = 3
    longest = 58

    def __init__(self, run):
        super().__init__(run)
        self.stream = None  # the newest clip, its text, the cache, the number of frames so far

    def student_clips(self, net, x, c, rng):
        new = self.length - GIVEN
        if self.stream is None or self.stream[3] + new > self.longest:
            cache = self.new_cache(net, len(x))
            self.stream = x[:, :GIVEN], c, cache, GIVEN
            history = x[:, :GIVEN]
        else:
            history = self.stream[0][:, -1:]

        newest, c, cache, first = self.stream
        clip = self.roll_on(net, newest[:, -GIVEN:], c, history, cache, first, rng)
        self.stream = clip.detach(), c, cache, first + new
        return clip, c


# ---- sampling and training a row ----


def plain_rollout(net, given, c, frames, seed):
    """The rollout of sample.py: yields each new frame (B, 1, C, height, width)."""
    return generate(net, [(0, c)], given, frames, **default_sampler(net), seed=seed)


@torch.no_grad()
def student_rollout(net, given, c, frames, seed):
    """A distilled student: STEPS passes a frame, without guidance, which its teacher had."""
    rng = SeededNoise(seed)
    method = METHODS[net.run["method"]]
    window = default_sampler(net)["window"]
    cache = net.cache(len(given), frames, window, method.sink)
    x = rng.randn(len(given), frames - given.shape[1], *given.shape[2:], device=given.device)
    first, times = given.shape[1], solver_times(method.level_shift)
    yield from student_frames(net, times, x, c, given, cache, first, STEPS - 1, rng)


METHODS = {
    "diffusion-forcing": partial(DiffusionForcing, non_decreasing_levels),
    "pipelined-diffusion-forcing": partial(DiffusionForcing, pipeline_levels),
    "DMD-on-real-clips": RealClips,
    "DMD-on-rollouts": Rollouts,
    "DMD-on-long-rollouts": LongRollouts,
    "told": ToldResampling,
}
DISTILLED = tuple(name for name in METHODS if name.startswith("DMD"))
ROLLOUTS = {
    "diffusion-forcing": diffusion_forcing_rollout,
    "pipelined-diffusion-forcing": pipelined_rollout,
} | dict.fromkeys(DISTILLED, student_rollout)


def adam(net, lr, momentum):
    """The optimizer of DMD."""
    return torch.optim.Adam(net.parameters(), lr, betas=(momentum, 0.999), fused=True)


def train_row(args):
    """Train a row, from the averaged weights of another run, and write a run like train.py's."""
    source = read_checkpoint(args.init)
    config, flags = source["config"], source["args"]
    if flags["data"] != "sprites" or config.chunk != 1:
        raise ValueError(f"--init {args.init}: wanted a run on sprites with --chunk 1")
    distilled = args.method in DISTILLED
    own = vars(args) | {"warmup": 0, "fsdp": False, "ema": 0.99 if distilled else flags["ema"]}
    own["lr"] = args.lr or (2e-4 if distilled else flags["lr"])
    run = Namespace(**(flags | own))
    torch.manual_seed(run.seed)
    device = torch.device("cpu")

    net = CausalDiT(config)
    load_weights(net, source["ema"], args.init)
    net.run = vars(run)
    ema = deepcopy(net).eval().requires_grad_(False)
    method = METHODS[args.method](run)
    if distilled:
        optimizers = [adam(net, run.lr, method.momentum)]
    else:
        optimizers = train.make_optimizers(net, run.optimizer)

    clips = open_data(run)
    args.out.mkdir(parents=True)
    began = time.perf_counter()
    bar = tqdm(range(run.steps), args.method)
    for step in bar:
        indices, x, c = train.load_batch(clips, step, 0, 1, run, device)
        rng = train.ClipNoise(run.seed, indices, device)
        kept = rng.rand(len(x)) >= run.drop
        loss = method.loss(net, x, c * kept[:, None, None], step, rng)
        if loss is None:
            continue
        loss.backward()
        norm = train.clip_gradient(net, run)
        train.check_finite(loss.item(), norm, step, run)
        train.set_learning_rate(optimizers, step, run)
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad(set_to_none=True)
        train.update_ema(ema, net, run.ema, step)
        bar.set_postfix_str(f"loss {loss.item():.4f}")

    run.minutes = (time.perf_counter() - began) / 60
    train.save(net, ema, optimizers, run.steps, run, rank=0)


def parse(argv):
    parser = Parser(__doc__, "%(prog)s METHOD --init RUN --out RUN [flags]")
    add = parser.add_argument
    # fmt: off
    add("method", choices=METHODS)
    add("--init", type=Path, required=True, help="the run of train.py to begin with")
    add("--teacher", type=Path, help="bidirectional: a run with --chunk equal to --frames")
    add("--out", type=Path, required=True, help="a new folder")
    add("--steps", type=number(int, 1), default=2400, help="default: %(default)s")
    add("--lr", type=number(float, 1e-9),
        help="default: that of --init; of the student and the fake model of DMD 2e-4")
    add("--seed", type=number(int, 0), default=0, help="default: %(default)s")
    # fmt: on
    args = parser.parse_args(argv)
    if (args.method in DISTILLED) != (args.teacher is not None):
        raise ValueError("--teacher goes with the rows of DMD, and only them")
    return args


def main(argv):
    train_row(parse(argv))


if __name__ == "__main__":
    run_main(main)
