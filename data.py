"""Videos in and out: a procedural world of sprites, folders of clips, folders of latents, and a ruler for the sprites.

A dataset maps any index >= 0 to (video, c): video (T, C, height, width) float32, pixels in [-1, 1], and c (L, text_dim).
The same seed and index give the same clip, on any machine and in any process, so the position in the data is a number.

B videos, T frames, C channels, S sprites, L words.
"""
import argparse
import difflib
import os
import re
import sys
import textwrap
import zipfile
import zlib
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import chain, islice, zip_longest
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw  # comes with imageio
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

class Parser(argparse.ArgumentParser):
    """Teaches in --help, and says what is wrong in one line."""
    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(self, flag, default, help, **options):
        shown = "" if default is None or default is False or "default" in help else f" (default {default})"
        self.add_argument(flag, default=default, help=help + shown, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {one_line(message)}\n")

    def guard(self, main, *args):
        """Run main; what a person can mend ends in one line, without a traceback."""
        try:
            return main(*args)
        except (ValueError, OSError) as error:
            self.error(error)
        except KeyboardInterrupt:
            self.exit(130, f"{self.prog}: interrupted\n")

def number(kind, low, high=1e30, above=False):
    """An argparse type: a number in [low, high], or above low."""
    def read(text):
        with suppress(ValueError):
            if low <= kind(text) <= high and not (above and kind(text) == low):
                return kind(text)
        wanted = f"{'above' if above else 'of at least'} {low}" + f" and at most {high}" * (high < 1e30)
        raise argparse.ArgumentTypeError(f"got {text}, wanted {'a whole' if kind is int else 'a'} number {wanted}")
    return read

natural, positive, share = number(int, 0), number(int, 1), number(float, 0, 1)
seed = number(int, 0, 2 ** 63 - 1)
amount, plus = number(float, 0), number(float, 0, above=True)
DEVICES = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *["cuda"] * torch.cuda.is_available()]

def pixels(text):
    """An argparse type: 64 -> 64, for squares; 480x832 -> (480, 832), height and width."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found or 0 in map(int, filter(None, found.groups())):
        raise argparse.ArgumentTypeError(f"got {text}, wanted pixels: one number for squares, or HEIGHTxWIDTH such as 480x832")
    return (int(found[1]), int(found[2])) if found[2] else int(found[1])

def latest_run():
    found = sorted(Path("runs").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError("there is no checkpoint under runs/; train one, or name a run: train.py --out, sample.py --checkpoint")
    return found[-1].parent

def multiple(n, unit):
    """The least multiple of a unit that is not below n."""
    return -(-n // unit) * unit

def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__

def skip(path, error):
    """Say that a file is left out, and why."""
    reason = one_line(error)
    print(f"warning: skipped: {reason if str(path) in reason else f'{path} ({reason})'}")

class Words:
    """Text without a text encoder: one row per word, the word beside its successor, so that "red circle" binds the
    colour to the shape though attention to the text knows no order. Rows of zeros say nothing."""
    def __init__(self, vocabulary, rows=8):
        self.vocabulary, self.rows = list(vocabulary), rows
        self.text_dim = max(1, 2 * len(self.vocabulary))

    @lru_cache(maxsize=4096)  # a caption is read once
    def __call__(self, prompt):
        """A prompt -> (L, text_dim), L at least `rows`. Raises ValueError for words that the model never met."""
        words = split_words(prompt)
        if unknown := [word for word in words if word not in self.vocabulary]:
            near = ", ".join(difflib.get_close_matches(unknown[0], self.vocabulary, 5, 0))
            raise ValueError(f'unknown word "{unknown[0]}" in the prompt "{prompt}"; ' + (
                f"of the {len(self.vocabulary)} words of the training captions the nearest are: {near}" if near else
                "this model was trained without captions, so the prompt must be empty"))
        c, at = torch.zeros(max(self.rows, len(words)), self.text_dim), [self.vocabulary.index(word) for word in words]
        for place in (*enumerate(at), *enumerate(len(self.vocabulary) + successor for successor in at[1:])):
            c[place] = 1
        return c

    def text(self, prompts):
        """Prompts -> c (B, L, text_dim)."""
        return pad_sequence([self(prompt) for prompt in prompts], batch_first=True)

def split_words(text):
    return re.findall(r"[\w'-]+", text.lower())

BACKGROUND, WALL = torch.tensor([0.08, 0.08, 0.12]) * 2 - 1, torch.tensor([0.45, 0.45, 0.48]) * 2 - 1
COLOURS = {"red": (0.95, 0.15, 0.15), "green": (0.15, 0.8, 0.2), "blue": (0.2, 0.35, 1.0), "yellow": (1.0, 0.9, 0.1),
           "magenta": (0.9, 0.2, 0.9), "white": (1.0, 1.0, 1.0)}
PALETTE = torch.tensor(list(COLOURS.values())) * 2 - 1
SHAPES = {  # signed distance to the edge, in radii, at (x, y) radii from the centre; y points down
    "circle": lambda x, y: (x * x + y * y).sqrt() - 1,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.85,
    "triangle": lambda x, y: torch.maximum(y - 0.75, 0.866 * x.abs() - 0.5 * y - 0.6),
}
SPEED, WALL_HALF = (0.025, 0.06), 0.2  # canvas sizes: per frame, and from the wall's middle to its edges
TRIES, HORIZON = 16, 48  # of so many scenes the one is shown whose sprites overlap least in so many frames

def radius_of(size, wall):
    """Sprites are smaller where there is a wall, so that it can hide them whole."""
    return size * (0.15 if wall else 0.19)

def coverage(at, shape, size, radius):
    """How much of each pixel a sprite covers: centres (..., 2) in pixels, shape (...) index -> (..., size, size) in
    [0, 1], with an edge one pixel soft."""
    grid = torch.arange(size) + 0.5
    x = ((grid - at[..., :1]) / radius)[..., None, :]
    y = ((grid - at[..., 1:]) / radius)[..., :, None]
    distance = torch.stack([sdf(x, y) for sdf in SHAPES.values()], dim=-3)
    index = shape.long().expand(at.shape[:-1])[..., None, None, None]
    return (0.5 - radius * distance.take_along_dim(index, -3).squeeze(-3)).clamp(0, 1)

def wall_columns(size):
    """Which columns of pixels the wall hides, two fifths of them."""
    return (torch.arange(size) + 0.5 - size / 2).abs() < WALL_HALF * size

def paint(at, shape, colour, size, wall=False, shown=None):
    """Sprites at (..., S, 2), shape and colour (..., S) or (S,), the first in front -> (..., 3, size, size) in [-1, 1]."""
    colour = colour.expand(at.shape[:-1])
    cover = coverage(at, shape, size, radius_of(size, wall))
    cover = cover if shown is None else cover * shown[..., None, None]
    picture = BACKGROUND[:, None, None].expand(*at.shape[:-2], 3, size, size)
    for s in reversed(range(at.shape[-2])):
        alpha = cover[..., s, None, :, :]
        picture = picture + alpha * (PALETTE[colour[..., s]][..., None, None] - picture)
    return torch.where(wall_columns(size), WALL[:, None, None], picture) if wall else picture

def reflect(at, low, high):
    """Fold positions on a line into [low, high], as elastic bounces do."""
    away, period = at - low, 2 * (high - low)
    return high - abs(away - period * np.floor(away / period) - (high - low))  # several times faster than %

class Sprites:
    """Coloured shapes that glide in straight lines, bounce off the edges and seldom meet, drawn from (seed, split, index)
    alone. "train" and "test" have each a stream of its own. withheld: share of clips without their caption."""
    channels, fps = 3, 8

    def __init__(self, size=16, frames=12, seed=0, split="train", objects=2, wall=False, withheld=0.0):
        if not 1 <= objects <= len(COLOURS):
            raise ValueError(f"{objects} sprites in a clip; 1 to {len(COLOURS)} work, each has a colour of its own")
        self.size, self.frames, self.objects, self.wall, self.withheld = size, frames, objects, wall, withheld
        self.key, self.pairs = (seed, ("train", "test").index(split)), np.triu_indices(objects, 1)
        self.words = Words([*COLOURS, *SHAPES, "and"], 3 * objects - 1)
        self.text_dim = self.words.text_dim

    def scene(self, index, frames=None):
        """(colour (S,), shape (S,), at (T, S, 2) in pixels): the truth about a clip. A longer one begins with the shorter."""
        rng = np.random.default_rng([*self.key, index])
        colour = rng.permutation(len(COLOURS))[:self.objects]
        shape = rng.integers(len(SHAPES), size=self.objects)
        margin = radius_of(self.size, self.wall)
        start = rng.uniform(margin, self.size - margin, (TRIES, self.objects, 2))
        speed, angle = rng.uniform(*SPEED, start.shape[:2]) * self.size, rng.uniform(0, 2 * np.pi, start.shape[:2])
        if self.wall:  # at first they are in sight, or there were nothing to remember; then they go mostly sideways
            aside, room = start[..., 0] - self.size / 2, self.size / 2 - margin
            start[..., 0] += np.sign(aside) * (1 - abs(aside) / room) * WALL_HALF * self.size
            half, tilt = np.divmod(angle, np.pi)
            angle = np.pi * half + 0.4 * (tilt - np.pi / 2)
        step = np.stack([speed * np.cos(angle), speed * np.sin(angle)], -1)

        def glide(start, step, frames):
            path = start + step * np.arange(frames, dtype=step.dtype).reshape(-1, *[1] * step.ndim)
            return reflect(path, margin, self.size - margin)
        drawn = glide(start.astype(np.float32), step.astype(np.float32), HORIZON)
        x, y = (drawn[:, :, self.pairs[0]] - drawn[:, :, self.pairs[1]]).transpose(3, 0, 1, 2)
        chosen = np.maximum(2 * margin - np.sqrt(x * x + y * y), 0).sum((0, 2)).argmin()
        at = glide(start[chosen], step[chosen], frames or self.frames).astype(np.float32)
        return torch.from_numpy(colour), torch.from_numpy(shape), torch.from_numpy(at)

    def caption(self, index):
        """For instance "red circle and blue square", the sprite in front first."""
        return name(*self.scene(index, 1)[:2])

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """Several clips are painted at once; torch's DataLoader asks for a batch in this way."""
        colour, shape, at = (torch.stack(z) for z in zip(*map(self.scene, indices)))
        texts = [name(*z) if self.withheld == 0 or np.random.default_rng([*self.key, i, 1]).random() >= self.withheld else ""
                 for i, *z in zip(indices, colour, shape)]
        videos = paint(at, shape[:, None], colour[:, None], self.size, self.wall)
        return [(video, self.words(text)) for video, text in zip(videos, texts)]

def name(colour, shape):
    return " and ".join(f"{list(COLOURS)[c]} {list(SHAPES)[s]}" for c, s in zip(colour.tolist(), shape.tolist()))

def measure(video, captions, wall=False):
    """How right are videos of the sprite world? (B, T, 3, size, size) in [-1, 1] and B captions -> (B, T, 3), 0 to 100.
    Visual: how near the picture is to the nearest legal one, 100 (1 - distance / that of an empty picture).
    Temporal: does each sprite go straight on, with legal bounces and speed? 100 exp(-(its distance from where it should
    be / 6 % of the canvas)²), less for a wrong speed; 0 for a missing sprite, none for a hidden one; nan where nothing
    can be said, as in the first two frames.
    Text: the share of the named sprites that are there and of those there that are named; half for the wrong shape."""
    B, T, _, size, _ = video.shape
    named = [parse_caption(caption) for caption in captions]
    S = max([1, *map(len, named)])
    fits = [fit_sprites(frames, S + 1, wall) for frames in video.float().flatten(0, 1).cpu().split(512)]
    at, shape, colour, clear, error = (torch.cat(z).unflatten(0, (B, T)) for z in zip(*fits))
    visual = 100 * (1 - error.sqrt()).clamp(min=0)
    judged = [judge(*z, size, wall) for z in zip(at.numpy(), shape.numpy(), colour.numpy(), clear.numpy(), named)]
    return torch.cat([visual[..., None], torch.tensor(np.array(judged), dtype=torch.float32)], dim=-1)

def parse_caption(caption):
    """{colour: shape} by index, of a caption such as "red circle and blue square"."""
    pairs = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", caption.lower())
    return {list(COLOURS).index(c): list(SHAPES).index(s) for c, s in pairs}

def fit_sprites(picture, S, wall):
    """The legal rendering of up to S sprites that is nearest to each picture (F, 3, size, size).
    Returns at (F, S, 2), shape (F, S), colour (F, S), clear (F, S): how much of the sprite can be seen, 0 if it is not
    there; error (F,): squared distance over that of an empty picture to a full one. Greedy matching of every colour,
    shape and pixel, front to back, then a descent on the positions for both orders of the two largest."""
    size, radius = picture.shape[-1], radius_of(picture.shape[-1], wall)
    half = int(radius * 1.3) + 2
    kernel = coverage(torch.full((len(SHAPES), 2), half + 0.5), torch.arange(len(SHAPES)), 2 * half + 1, radius)[:, None]
    inside = (torch.arange(size) + 0.5 - size / 2).abs() <= size / 2 - radius + 0.5
    energy = (PALETTE - BACKGROUND).square().sum(-1)
    # a pixel speaks for a colour by 1, against it by its distance: what is half another colour is no sprite of this one
    unlike = (picture[:, None] - PALETTE[..., None, None]).square().sum(2) / energy[:, None, None]
    through = (~wall_columns(size) if wall else torch.ones(size)).expand(len(picture), 1, size, -1).float()
    found, taken = [], torch.zeros(len(picture), len(PALETTE), dtype=torch.bool)
    for doubt in (3, *[2] * (S - 1)):
        votes = F.conv2d((through * (1 - doubt * unlike)).flatten(0, 1)[:, None], kernel, padding="same")
        votes = votes.unflatten(0, unlike.shape[:2]) * energy[:, None, None, None]
        votes = votes.masked_fill(~(inside & inside[:, None]) | taken[..., None, None, None], -torch.inf)
        best = votes.flatten(1).argmax(1)
        colour, shape, row, column = torch.unravel_index(best, votes.shape[1:])
        at = torch.stack([column, row], -1) + 0.5
        alpha = coverage(at, shape, size, radius)[:, None]
        seen = (alpha * through).sum((1, 2, 3))
        votes = votes.flatten(1).gather(1, best[:, None])[:, 0] / energy[colour]
        there = (votes > 0.25 * seen) & (seen > 0.05 * alpha.sum((1, 2, 3)))
        taken[torch.arange(len(taken)), colour] = True
        found.append((at, shape, colour, there))
        through = through * (1 - alpha * there[:, None, None, None])
    at, shape, colour, there = (torch.stack(z, 1) for z in zip(*found))
    at, shape, error = descend(picture, at, shape, colour, there, wall)
    swap = [1, 0, *range(2, S)]  # where two sprites overlap, the one in front may have been found second
    near = (there[:, :2].all(1) & ((at[:, 0] - at[:, 1]).abs().amax(1) < 2.2 * radius)).nonzero()[:, 0]
    at2, shape2, error2 = descend(picture[near], *(z[near][:, swap] for z in (at, shape, colour, there)), wall)
    better = error2 < error[near]
    near = near[better]
    at[near], shape[near], error[near] = at2[better], shape2[better], error2[better]
    colour[near], there[near] = colour[near][:, swap], there[near][:, swap]
    clear = visible_share(at, shape, there, size, wall)
    error = error / (energy.mean() * kernel.square().sum((1, 2, 3)).mean() * (S - 1))
    return at, shape, colour, clear, error if wall else torch.where(there.any(1), error, error.clamp(min=1))

def descend(picture, at, shape, colour, there, wall):
    """Try every shape for each sprite, then move it to the best of its neighbours by ever smaller steps.
    Returns (at, shape, squared error), made anew."""
    size, moves = picture.shape[-1], torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))
    for step, forms in ((0.5, len(SHAPES)), (0.25, 1), (0.125, 1), (0.0625, 1), (0.03125, 1)):
        for s in there.any(0).nonzero()[:, 0].tolist():
            tried = at[:, None].repeat(1, forms * len(moves), 1, 1)
            tried[:, :, s] += step * moves.repeat(forms, 1)
            form = shape[:, None].repeat(1, forms * len(moves), 1)
            form[:, :, s] += torch.arange(forms).repeat_interleave(len(moves))
            form %= len(SHAPES)
            drawn = paint(tried, form, colour[:, None].expand_as(form), size, wall, there[:, None].float())
            best = (drawn - picture[:, None]).square().sum((2, 3, 4)).argmin(1)
            every = torch.arange(len(at))
            at, shape = tried[every, best], form[every, best]
    error = (paint(at, shape, colour, size, wall, there.float()) - picture).square().sum((1, 2, 3))
    return at, shape, error

def visible_share(at, shape, there, size, wall):
    """The share of each sprite (F, S) that neither the wall nor those before it hide; 0 for those not there."""
    cover = coverage(at, shape, size, radius_of(size, wall)) * there[..., None, None]
    through = F.pad((1 - cover).cumprod(1), (0, 0, 0, 0, 1, -1), value=1.0) * (~wall_columns(size) if wall else 1)
    return (cover * through).sum((2, 3)) / cover.sum((2, 3)).clamp(min=1e-6)

def judge(at, shape, colour, clear, named, size, wall):
    """Temporal and Text of one video, (T, 2), from its fitted sprites: at (T, S, 2), shape, colour, clear (T, S)."""
    radius, scores, tracks = radius_of(size, wall), [], {}
    for t in range(len(at)):
        there = {int(colour[t, s]): s for s in reversed(range(len(at[t]))) if clear[t, s] > 0.15}
        right = sum(1.0 if shape[t, there[c]] == named[c] or clear[t, there[c]] < 0.6 else 0.5 for c in named if c in there)
        steps = {c: forecast(track, t, size, radius) for c, track in tracks.items()}
        hidden = {c for c in named if c not in there and c in steps
                  and hides(steps[c][0][0], at[t, list(there.values())], size, radius, wall)}
        sharp = {c: s for c, s in there.items() if clear[t, s] > 0.5}
        missing = len(set(named) - hidden - set(there))
        temporal = [straightness(at[t, s], *steps[c], size) for c, s in sharp.items() if c in steps] + [0.0] * missing * (t > 1)
        text = right / max(1, len(named) - len(hidden), len(there)) if there or missing else np.nan
        scores.append((100 * torch.tensor(temporal, dtype=torch.float64).nanmean().item(), 100 * text))
        for c, s in sharp.items():
            tracks[c] = (*tracks.get(c, ())[-1:], (t, at[t, s]))
    return scores

def forecast(track, t, size, radius):
    """Where a sprite seen at (t0, p0), (t1, p1) is due at t, per axis: it went straight, or just bounced off the low or
    the high edge. Returns (positions, velocities), (3, 2) each, inf where no legal sprite is that fast."""
    if len(track) < 2 or track[1][0] - track[0][0] != 1:
        return np.full((2, 3, 2), np.nan)
    (_, p0), (t1, p1) = track
    low, high = radius, size - radius
    v = np.stack([p1 - p0, p1 + p0 - 2 * low, p1 + p0 - 2 * high])
    due = np.where(np.abs(v) > 1.2 * SPEED[1] * size, np.inf, reflect(p1 + v * (t - t1), low, high))
    return due, v

def straightness(at, due, v, size):
    """1 where a sprite is where it was due and legally fast, 0 far from it; nan if nothing was due."""
    off = np.abs(at - due)
    best = off.argmin(0)
    speed = np.linalg.norm(v[best, [0, 1]])
    wrong_speed = max(0, SPEED[0] * size - speed, speed - SPEED[1] * size)
    return np.exp(-(np.linalg.norm(off.min(0)) / (0.06 * size)) ** 2 - (wrong_speed / (0.02 * size)) ** 2)

def hides(where, others, size, radius, wall):
    """Might a sprite be overlooked there, half behind the wall or behind one in sight? At an unknown place it might not."""
    behind_wall = wall and abs(where[0] - size / 2) < WALL_HALF * size + 0.3 * radius
    return bool(behind_wall or (np.linalg.norm(others - where, axis=-1) < 0.7 * radius).any())

def ruler_table(scores):
    """A table of `measure`'s scores (B, T, 3) as text, per third of the video as the paper's Table 1: the mean over its
    frames of the mean over videos ± standard error over the videos."""
    lines = [f"{'frames':>12}" + "".join(f"{name:>16}" for name in ("Temporal", "Visual", "Text"))]
    edges = [round(third * scores.shape[1] / 3) for third in range(4)]
    for start, end in [*zip(edges, edges[1:]), (0, edges[-1])]:
        mean, z = scores[:, start:end].nanmean(dim=0).nanmean(dim=0), scores[:, start:end].nanmean(dim=1)
        n = (~z.isnan()).sum(0).clamp(min=1)
        spread = ((z - z.nanmean(0)).square().nansum(0) / (n - 1) / n).sqrt()
        lines.append(f"{f'{start}-{end - 1}':>12}" + "".join(f"{mean[i]:8.2f} ± {spread[i]:5.2f}" for i in (1, 0, 2)))
    return "\n".join(lines)

def read_frames(path, size, fps=0.0, stride=1):
    """Decode a file lazily: frames (height, width, 3) uint8, resized and cut to the centre, every `stride`-th of them at
    `fps` frames per second (0: the file's own rate). size: (height, width), or one number for a square. Raises
    ValueError if nothing can be read."""
    steps, (height, width) = [("fps", str(fps))] if fps else [], size if isinstance(size, tuple) else (size, size)
    steps += [("scale", f"{width}:{height}:force_original_aspect_ratio=increase"), ("crop", f"{width}:{height}")]
    wrong = "it has no frames"
    try:
        for frame in islice(iio.imiter(path, plugin="pyav", filter_sequence=steps, format="rgb24"), 0, None, stride):
            wrong = None
            yield frame
    except Exception as error:  # ffmpeg's errors share no class; what could be decoded before is kept
        wrong = wrong and one_line(error)
    if wrong:
        raise ValueError(f"{path} cannot be read as a video ({wrong}); what ffmpeg reads would work: mp4, gif, avi, webm")

def read_video(path, size, fps=0.0, stride=1, frames=None):
    """The first `frames` frames of a file (all if None): (T, 3, size, size) float32 in [-1, 1]."""
    return to_float(np.stack(list(islice(read_frames(path, size, fps, stride), frames))))

def to_float(clip):
    return rearrange(torch.from_numpy(clip), "t h w c -> t c h w").float() / 127.5 - 1

def to_bytes(video):
    """(T, 3, height, width) in [-1, 1] -> (T, height, width, 3) uint8."""
    return rearrange((video.float().clamp(-1, 1) + 1) * 127.5, "t c h w -> t h w c").round().byte().cpu().numpy()

def walk(folder):
    """All files of a folder, its subfolders and what they link to, but hidden ones. Raises ValueError if it is no folder."""
    if not Path(folder).is_dir():
        raise ValueError(f'{folder} is not a folder; wanted one of videos or of latents (.npz), or for train.py "sprites"')
    return [Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names if name[0] != "."]

def files_in(folder, kind):
    """Its "videos" or "latents" (.npz), sorted. Raises ValueError if there are none."""
    files = sorted(path for path in walk(folder) if (path.suffix == ".npz" if kind == "latents" else
                                                     path.suffix.lower() not in {".txt", ".npz", ".json", ".md"}))
    if not files:
        raise ValueError(f"{folder} holds no {kind}")
    return files

def caption_of(path):
    """What name.txt beside name.mp4 says, "" if there is none. Raises ValueError if it is not UTF-8."""
    path = path.with_suffix(".txt")
    try:
        return path.read_text("utf-8").strip() if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error})") from None

def fold(video, chunk):
    """Latent frames to frames: (B, N · chunk, C, height, width) -> (B, N, chunk · C, height, width)."""
    return rearrange(video, "b (n t) c h w -> b n (t c) h w", t=chunk)

def unfold(x, chunk):
    """`fold` undone."""
    return rearrange(x, "b n (t c) h w -> b (n t) c h w", t=chunk)

class Folder:
    """Random clips of T frames from files in a folder; every file once in each round of len(files) indices."""
    def __getitem__(self, index):
        round_, place = divmod(index, len(self.files))
        order = np.random.default_rng([self.seed, round_]).permutation(len(self.files))
        for number in map(int, np.roll(order, -place)):  # a file that turns out bad is replaced by the next
            if self.broken[number]:
                continue
            try:
                video, c = self.load(number)
                start = np.random.default_rng([self.seed, round_, place, 1]).integers(len(video) - self.frames + 1)
                return self.tensor(video[start:start + self.frames]), c
            except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                self.broken[number] = True
                skip(self.files[number], error)
        raise ValueError("none of the files can be read any more")

    def keep(self, folder, lengths, bad=0):
        """Of the files {path: frames} those that are long enough. Raises ValueError if none is."""
        self.files = [path for path, length in lengths.items() if length >= self.frames]
        self.broken = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()  # known to all worker processes
        if not self.files:
            raise ValueError(f"no clip in {folder} has {self.frames} frames: of {len(lengths)} the longest has "
                             f"{max(lengths.values(), default=0)}, and {bad} cannot be read")
        if len(self.files) < len(lengths):
            short = len(lengths) - len(self.files)
            print(f"warning: skipping {short} of {len(lengths)} clips, of fewer than {self.frames} frames")

class Videos(Folder):
    """Any files that ffmpeg reads, with an optional caption in name.txt beside name.mp4.
    Decoded where the item is asked for, that is in the loader's processes; each keeps up to `memory` bytes of decoded
    clips. A file that cannot be read is named once in a warning and skipped; clips too short are counted and skipped."""
    channels, tensor = 3, staticmethod(to_float)

    def __init__(self, folder, size, frames, fps=0.0, stride=1, seed=0, memory=2 ** 30):
        self.size, self.frames, self.rate, self.stride, self.seed, self.memory = size, frames, fps, stride, seed, memory
        lengths, rates, captions, bad = {}, {}, {}, 0
        for path in tqdm(files_in(folder, "videos"), "looking at videos", leave=False, disable=None):
            try:
                captions[path] = caption_of(path)
                next(read_frames(path, size))
                meta, shape = iio.immeta(path, plugin="pyav"), iio.improps(path, plugin="pyav").shape
                length = int(meta["duration"] * fps + 1e-3) if fps else shape[0] or round(meta["duration"] * meta["fps"])
                lengths[path], rates[path] = -(-length // stride), (fps or meta["fps"]) / stride
            except Exception as error:
                skip(path, error)
                bad += 1
        self.keep(folder, lengths, bad)
        self.fps = float(np.median([*rates.values()]))
        self.captions = [captions[path] for path in self.files]
        said = [split_words(caption) for caption in self.captions]
        self.words = Words(sorted(set(chain(*said))), max([1, *map(len, said)]))
        self.text_dim, self.decoded = self.words.text_dim, {}

    def load(self, number):
        """(all frames (T, size, size, 3) uint8, c) of a file. Raises ValueError if it cannot be decoded."""
        if number not in self.decoded:
            clip = np.stack(list(read_frames(self.files[number], self.size, self.rate, self.stride)))
            if len(clip) < self.frames:
                raise ValueError(f"only {len(clip)} frames can be decoded")
            if sum(z.nbytes for z in self.decoded.values()) + clip.nbytes > self.memory:
                self.decoded.clear()
            self.decoded[number] = clip
        return self.decoded[number], self.words(self.captions[number])

class Latents(Folder):
    """One .npz per video: `latents` (T, C, height, width) and perhaps `text` (L, text_dim), read when asked for. One that
    cannot be read is named once in a warning and skipped; so is one that holds what is no number."""
    words, fps, tensor = None, 4, staticmethod(torch.from_numpy)

    def __init__(self, folder, frames, seed=0):
        self.frames, self.seed = frames, seed
        shapes = {path: self.shapes(path) for path in files_in(folder, "latents")}
        first, (latents, text) = next(iter(shapes.items()))
        for path, (others, words) in shapes.items():
            if (others[1:], words[1]) != (latents[1:], text[1]):
                raise ValueError(f"{path} holds latents {others} with text {words}, but {first} {latents} with {text}; "
                                 "all files of a folder need the same channels, size and text width")
        self.keep(folder, {path: others[0] for path, (others, _) in shapes.items()})
        self.channels, self.size, self.text_dim = latents[1], latents[2:], text[1]
        self.rows = max(words[0] for _, words in shapes.values())

    @staticmethod
    def shapes(path):
        """The shapes of latents and text (1, 1 if there is none), from the headers alone."""
        found = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for key in archive.namelist():
                    with archive.open(key) as file:
                        np.lib.format.read_magic(file)
                        found[key.removesuffix(".npy")] = np.lib.format.read_array_header_1_0(file)[0]
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise ValueError(f"{path} is not a readable .npz file ({one_line(error)})") from None
        shapes = found.get("latents", ()), found.get("text", (1, 1))
        if list(map(len, shapes)) != [4, 2]:
            raise ValueError(f"{path} holds {found}; wanted `latents` (T, C, height, width) and perhaps `text` (L, text_dim)")
        return shapes

    def load(self, number):
        """(latents (T, C, height, width), c) of a file. Raises ValueError if they are no finite numbers."""
        with np.load(self.files[number]) as file:
            latents, text = (np.float32(file[key] if key in file else np.zeros((1, 1))) for key in ("latents", "text"))
        if not (np.isfinite(latents).all() and np.isfinite(text).all()):
            raise ValueError("it holds values that are no finite numbers")
        return latents, F.pad(torch.from_numpy(text), (0, 0, 0, self.rows - len(text)))

class Wan:
    """Wan 2.1's VAE and text encoder from a diffusers folder, an optional extra: videos and prompts to what the network
    reads, and back. Raises ValueError where a part is missing."""
    NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
                "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
                "三条腿，背景人很多，倒着走")

    def __init__(self, path, device="cpu"):
        try:
            import ftfy  # noqa: F401, the pipeline cleans prompts with it
            from diffusers import WanPipeline
        except ImportError as error:
            raise ValueError(f"--wan needs `pip install diffusers transformers ftfy` ({one_line(error)})") from None
        if not Path(path, "model_index.json").is_file():
            raise ValueError(f"--wan {path} holds no model_index.json; give a diffusers folder of Wan 2.1, for instance "
                             "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        types = {"text_encoder": torch.bfloat16, "default": torch.float32}
        self.pipe, self.device = WanPipeline.from_pretrained(path, transformer=None, torch_dtype=types).to(device), device
        self.mean, self.std = (torch.tensor(z, device=device).view(-1, 1, 1, 1)
                               for z in (self.pipe.vae.config.latents_mean, self.pipe.vae.config.latents_std))

    @torch.no_grad()
    def text(self, prompts):
        """Prompts -> c (B, 512, text_dim); rows past a prompt's end are zero."""
        return self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)[0].float()

    @torch.no_grad()
    def encode(self, video):
        """(B, 4 n - 3, 3, height, width) in [-1, 1] -> normalised latents (B, n, 16, height / 8, width / 8)."""
        latents = self.pipe.vae.encode(video.transpose(1, 2).to(self.device)).latent_dist.mode()
        return ((latents - self.mean) / self.std).transpose(1, 2)

    def decoder(self):
        """A function from latents (B, n, 16, h, w) to the pixels that they add to those of its earlier calls: one frame
        for the very first latent, four for each later one. It holds the VAE's causal cache and no video."""
        held = [None] * sum(type(module).__name__ == "WanCausalConv3d" for module in self.pipe.vae.decoder.modules())

        @torch.no_grad()
        def decode(latents):
            z = self.pipe.vae.post_quant_conv(latents.to(self.device).transpose(1, 2) * self.std + self.mean)
            made = (self.pipe.vae.decoder(frame, held, [0], first_chunk=held[0] is None) for frame in z.split(1, 2))
            return torch.cat([*made], dim=2).clamp(-1, 1).transpose(1, 2).cpu()
        return decode

def encode_video(wan, path, out, size, frames, fps):
    """Every clip of `frames` frames to out-NUMBER.npz, its latents and its caption's text; finished ones are kept."""
    caption, reader, number = caption_of(path), read_frames(path, size, fps), 0
    while len(clip := list(islice(reader, frames))) == frames:
        target = out.with_name(f"{out.name}-{number:04d}.npz")
        if target.exists():
            T, _, *sides = Latents.shapes(target)[0]
            if [4 * T - 3, *(8 * side for side in sides)] != [frames, *np.broadcast_to(size, 2)]:
                raise ValueError(f"{target} is there already, of another --frames or --size; wanted another folder for these")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            latents, text = wan.encode(to_float(np.stack(clip))[None]), wan.text([caption])
            with open(target.with_suffix(".part"), "wb") as file:
                np.savez(file, latents=latents[0].half().cpu(), text=text[0].half().cpu())
            target.with_suffix(".part").replace(target)
        number += 1
    if number == 0:
        raise ValueError(f"{path} has {len(clip)} frames; wanted at least --frames {frames}")

def encode_folder(args):
    """`encode_video` for a folder. A second call goes on after a kill; under torchrun the files are shared out."""
    rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    files = files_in(args.videos, "videos")[int(os.environ.get("RANK", 0))::world]
    wan, bad = Wan(args.wan, f"cuda:{rank}" if args.device == "cuda" else args.device), 0
    for path in tqdm(files, "videos"):
        try:
            encode_video(wan, path, args.out / path.relative_to(args.videos), args.size, args.frames, args.fps)
        except ValueError as error:
            bad += 1
            skip(path, error)
    if files and bad == len(files):
        raise ValueError(f"none of the {bad} videos of {args.videos} could be encoded")

def open_data(args, split="train"):
    """The dataset that `--data` names: "sprites", a folder of latents (it holds .npz files) or a folder of videos."""
    if args.data == "sprites":
        if isinstance(args.size, tuple):
            raise ValueError(f"--size {args.size[0]}x{args.size[1]}: the world of the sprites is square; one number would work")
        return Sprites(args.size, args.frames, args.seed, split, args.objects, args.wall, args.withheld)
    if any(path.suffix == ".npz" for path in walk(args.data)):
        return Latents(args.data, args.frames, args.seed)
    return Videos(args.data, args.size, args.frames, args.fps, args.stride, args.seed)

def enlarge(frames, height=128):
    """(..., height, width, 3) uint8, each pixel a square of them, so that a person can see what 16 x 16 holds."""
    times = max(1, round(height / frames.shape[-3]))
    return frames.repeat(times, -3).repeat(times, -2)

@contextmanager
def writer(path, fps=8.0):
    """A function that appends frames (T, 3, height, width) in [-1, 1], or pictures of them (T, height, width, 3) uint8, to
    a video: `with writer("out.mp4", 8) as out: out(frames)`. An .mp4 grows frame by frame; a .gif is put together at the
    end, since its frames share their colours. Either takes its name when it is whole. Raises ValueError for other endings."""
    path, pictures = Path(path), []
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"{path}: videos are written as .mp4 or .gif")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name("." + path.name)
    try:
        if path.suffix == ".gif":
            yield lambda video: pictures.extend(as_pictures(video))
            iio.imwrite(part, np.stack(pictures), plugin="pillow", duration=1000 / fps, loop=0)
        else:
            with iio.imopen(part, "w", plugin="pyav", extension=".mp4") as file:
                file.init_video_stream("libx264", fps=fps)
                yield lambda video: [file.write_frame(z[:len(z) // 2 * 2, :z.shape[1] // 2 * 2]) for z in as_pictures(video)]
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

def as_pictures(video):
    return enlarge(to_bytes(video)) if torch.is_tensor(video) else video

def film(rows, columns=12, labels=(), height=64):
    """Labelled videos (T, 3, height, width) under one another, time from left to right, as a picture (H, W, 3) uint8."""
    strips = []
    for video, label in zip_longest(rows, labels, fillvalue=""):
        chosen = torch.linspace(0, len(video) - 1, min(columns, len(video))).round().long()
        frames = enlarge(to_bytes(video[chosen]), height)
        strip = rearrange(np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255), "t h w c -> h (t w) c")
        strips.append(np.concatenate([write(label, len(strip)), strip], axis=1) if any(labels) else strip)
    return np.concatenate(strips)

def write(text, height, width=96):
    """Black words on white, one under another, as a picture (height, width, 3) uint8."""
    page = Image.new("RGB", (width, height), "white")
    lines = "\n".join(textwrap.wrap(text, width // 7))
    ImageDraw.Draw(page).multiline_text((4, height / 2), lines, "black", anchor="lm")
    return np.asarray(page)

def parse(argv):
    parser = Parser("Turn a folder of videos into latents for train.py --data, with Wan 2.1's VAE and text encoder.")
    parser.add_argument("command", choices=["encode"])
    parser.add_argument("videos", type=Path, help="a folder of videos; name.txt beside name.mp4 is its caption")
    parser.add_argument("out", type=Path, help="a folder for the .npz files")
    parser.add("--wan", None, "a diffusers folder of Wan 2.1: its VAE and text encoder", type=Path, required=True)
    parser.add("--size", (480, 832), "height and width in pixels, multiples of 16 (default 480x832)", type=pixels)
    parser.add("--frames", 81, "length of a clip in frames, 4 n - 3 for n latents", type=positive)
    parser.add("--fps", 16.0, "read videos at this rate", type=plus)
    parser.add("--device", DEVICES[-1], "where to run", choices=DEVICES)
    args = parser.parse_args(argv)
    if any(side % 16 for side in np.atleast_1d(args.size)):
        raise ValueError(f"--size {args.size}: Wan's height and width are multiples of 16, for instance 480x832")
    if args.frames % 4 != 1:
        raise ValueError(f"--frames {args.frames}: 4 n - 3 frames make n latents; {args.frames // 4 * 4 + 1} would work")
    return args

if __name__ == "__main__":
    Parser(__doc__).guard(lambda: encode_folder(parse(sys.argv[1:])))
