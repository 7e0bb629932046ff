"""Videos in and out: a procedural world of sprites with its metrics, folders of videos or latents.

A dataset maps any index >= 0 to (video, c): video (T, C, height, width) float32, pixels in [-1, 1],
and c (L, text_dim). The same seed and index give the same item, on any machine and in any process.
Its attributes: channels, size, frames, fps, text_dim and words (None for latents).

  python data.py VIDEOS LATENTS --wan WAN     encode a folder of videos with Wan 2.1's VAE

B videos, T frames, C channels, S sprites, L words, F pictures to fit, K colours.
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import av  # comes with imageio[pyav]
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image  # comes with imageio
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm


def fold(video, chunk):
    """Fold chunks of latent frames into channels, the frame before the channel.

    (B, N * chunk, C, height, width) -> (B, N, chunk * C, height, width).
    """
    return rearrange(video, "b (n t) c h w -> b n (t c) h w", t=chunk)


def unfold(x, chunk):
    """Undo `fold`: (B, N, chunk * C, height, width) -> (B, N * chunk, C, height, width)."""
    return rearrange(x, "b n (t c) h w -> b (n t) c h w", t=chunk)


class Words:
    """Embed text without a text encoder: each row holds the one-hot of a word and of the next word.

    The pair binds "red" to "circle", although attention to the text knows no order. Rows of zeros
    are padding.
    """

    def __init__(self, vocabulary, rows=8):
        self.vocabulary = list(vocabulary)
        self.rows = rows
        self.text_dim = max(1, 2 * len(self.vocabulary))

    def __call__(self, prompt):
        """Embed a prompt: (L, text_dim), L at least `rows`.

        Raises ValueError for a word outside the vocabulary, with the nearest ones in it.
        """
        words = split_words(prompt)
        for word in words:
            if word not in self.vocabulary:
                near = ", ".join(difflib.get_close_matches(word, self.vocabulary, 5, 0))
                near = near or "none: it was trained without captions, and wants an empty prompt"
                raise ValueError(
                    f'unknown word "{word}"; the nearest that this model knows: {near}'
                )

        place = [self.vocabulary.index(word) for word in words]
        c = torch.zeros(max(self.rows, len(words)), self.text_dim)
        for row, word in enumerate(place):
            c[row, word] = 1
        for row, successor in enumerate(place[1:]):
            c[row, len(self.vocabulary) + successor] = 1
        return c

    def text(self, prompts):
        """Embed prompts: c (B, L, text_dim), padded to the longest."""
        return pad_sequence([self(prompt) for prompt in prompts], batch_first=True)


def split_words(text):
    return re.findall(r"[\w'-]+", text.lower())


# The world of the sprites. Positions are (x, y) in pixels; y points down.

# fmt: off
COLOURS = {
    "red":     (0.95, 0.15, 0.15),
    "green":   (0.15, 0.80, 0.20),
    "blue":    (0.20, 0.35, 1.00),
    "yellow":  (1.00, 0.90, 0.10),
    "magenta": (0.90, 0.20, 0.90),
    "white":   (1.00, 1.00, 1.00),
}
# fmt: on
PALETTE = torch.tensor(list(COLOURS.values())) * 2 - 1
BACKGROUND = torch.tensor([0.08, 0.08, 0.12]) * 2 - 1
WALL = torch.tensor([0.45, 0.45, 0.48]) * 2 - 1
WALL_HALF = 0.2  # half the width of the wall, in canvas sizes
SPEED = (0.025, 0.06)  # slowest and fastest, in canvas sizes per frame
TRIES = 16  # scenes drawn per clip; the one whose sprites overlap least is kept
HORIZON = 48  # frames in which overlap is counted


def circle(x, y):
    """Signed distance to the edge of a circle, in radii, at (x, y) radii from its centre."""
    return (x * x + y * y).sqrt() - 1


def square(x, y):
    """Signed distance to the edge of a square, as in `circle`."""
    return torch.maximum(x.abs(), y.abs()) - 0.85


def triangle(x, y):
    """Signed distance to the edge of a triangle that points up, as in `circle`."""
    return torch.maximum(y - 0.75, 0.866 * x.abs() - 0.5 * y - 0.6)


SHAPES = {"circle": circle, "square": square, "triangle": triangle}


def radius_of(size):
    """Radius of the sprites in pixels: they can pass each other, and a wall can hide them whole."""
    return 0.14 * size


def wall_columns(size):
    """Which columns of pixels the wall hides: (size,) bool, two fifths of them."""
    return (torch.arange(size) + 0.5 - size / 2).abs() < WALL_HALF * size


def coverage(at, shape, size, radius):
    """Share of each pixel that a sprite covers, with an edge one pixel soft.

    at (..., 2) in pixels, shape (...) index into SHAPES -> (..., size, size) in [0, 1].
    """
    pixel = torch.arange(size) + 0.5
    x = ((pixel - at[..., :1]) / radius)[..., None, :]  # (..., 1, size)
    y = ((pixel - at[..., 1:]) / radius)[..., :, None]  # (..., size, 1)
    distance = torch.stack([sdf(x, y) for sdf in SHAPES.values()], dim=-3)

    index = shape.long().expand(at.shape[:-1])[..., None, None, None]
    distance = distance.take_along_dim(index, -3).squeeze(-3)  # (..., size, size)
    return (0.5 - radius * distance).clamp(0, 1)


def paint(at, shape, colour, size, wall=False):
    """Draw sprites, the first in front: (..., 3, size, size) in [-1, 1].

    at (..., S, 2) in pixels; shape and colour (..., S) or (S,) indices.
    """
    return compose(coverage(at, shape, size, radius_of(size)), colour, wall)


def compose(cover, colour, wall):
    """Lay colours over the background, the first in front: (..., 3, size, size) in [-1, 1].

    cover (..., S, size, size) in [0, 1]: how much of each pixel a sprite covers. colour (..., S) or
    (S,) indices.
    """
    S, size, _ = cover.shape[-3:]
    colour = colour.expand(cover.shape[:-2])
    picture = BACKGROUND[:, None, None].expand(*cover.shape[:-3], 3, size, size)
    for s in reversed(range(S)):
        alpha = cover[..., s, None, :, :]
        picture = picture + alpha * (PALETTE[colour[..., s]][..., None, None] - picture)
    if wall:
        picture = torch.where(wall_columns(size), WALL[:, None, None], picture)
    return picture


def reflect(at, low, high):
    """Fold positions on a line into [low, high], as elastic bounces do."""
    away = at - low
    period = 2 * (high - low)
    away = away - period * np.floor(away / period)  # several times faster than away % period
    return high - abs(away - (high - low))


def glide(start, step, frames, low, high):
    """Positions of sprites that go straight and bounce: start and step (..., 2) -> (T, ..., 2)."""
    t = np.arange(frames, dtype=step.dtype).reshape(-1, *[1] * step.ndim)
    return reflect(start + step * t, low, high)


def caption_text(colour, shape):
    """Name sprites, for instance "red circle and blue square"; colour and shape (S,) indices."""
    colours = [list(COLOURS)[c] for c in colour.tolist()]
    shapes = [list(SHAPES)[s] for s in shape.tolist()]
    return " and ".join(f"{c} {s}" for c, s in zip(colours, shapes))


class Sprites:
    """Coloured shapes that go straight, bounce off the edges and rarely overlap.

    A clip is a function of (seed, split, index). The splits are separate streams: settings are
    chosen on "test", and results/ measures on "final". wall: one that hides the sprites in the
    middle. withheld: share of clips without their caption.
    """

    channels = 3
    fps = 8

    def __init__(
        self, size=32, frames=12, seed=0, split="train", objects=2, wall=False, withheld=0.0
    ):
        if not 1 <= objects <= len(COLOURS):
            raise ValueError(
                f"{objects} sprites in a clip; 1 to {len(COLOURS)} work, each has its own colour"
            )
        self.size = size
        self.frames = frames
        self.objects = objects
        self.wall = wall
        self.withheld = withheld
        self.key = (seed, ("train", "test", "final").index(split))
        self.words = Words([*COLOURS, *SHAPES, "and"], 3 * objects - 1)
        self.text_dim = self.words.text_dim

    def scene(self, index, frames=None):
        """Ground truth of a clip: colour (S,), shape (S,), at (T, S, 2) in pixels.

        More frames continue the same clip.
        """
        rng = np.random.default_rng([*self.key, index])
        colour = rng.permutation(len(COLOURS))[: self.objects]
        shape = rng.integers(len(SHAPES), size=self.objects)

        # TRIES scenes of S sprites
        low = radius_of(self.size)
        high = self.size - low
        start = rng.uniform(low, high, (TRIES, self.objects, 2))
        speed = rng.uniform(*SPEED, start.shape[:2]) * self.size
        angle = rng.uniform(0, 2 * np.pi, start.shape[:2])
        if self.wall:
            start, angle = self.around_wall(start, angle)
        step = np.stack([speed * np.cos(angle), speed * np.sin(angle)], -1)

        chosen = self.least_overlap(start, step)
        at = glide(start[chosen], step[chosen], frames or self.frames, low, high).astype(np.float32)
        return torch.from_numpy(colour), torch.from_numpy(shape), torch.from_numpy(at)

    def around_wall(self, start, angle):
        """Start visible, otherwise there is nothing to remember; then move mostly sideways."""
        aside = start[..., 0] - self.size / 2
        room = self.size / 2 - radius_of(self.size)
        start[..., 0] += np.sign(aside) * (1 - abs(aside) / room) * WALL_HALF * self.size

        half, tilt = np.divmod(angle, np.pi)
        return start, np.pi * half + 0.4 * (tilt - np.pi / 2)

    def least_overlap(self, start, step):
        """Index of the scene whose sprites overlap least: start and step (TRIES, S, 2)."""
        margin = radius_of(self.size)
        start, step = start.astype(np.float32), step.astype(np.float32)
        at = glide(start, step, HORIZON, margin, self.size - margin)  # (HORIZON, TRIES, S, 2)

        one, other = np.triu_indices(self.objects, 1)
        x, y = (at[:, :, one] - at[:, :, other]).transpose(3, 0, 1, 2)
        overlap = np.maximum(2 * margin - np.sqrt(x * x + y * y), 0)
        return overlap.sum((0, 2)).argmin()

    def caption(self, index):
        """For instance "red circle and blue square", the sprite in front first."""
        colour, shape, _ = self.scene(index, 1)
        return caption_text(colour, shape)

    def is_withheld(self, index):
        """Whether the clip comes without its caption."""
        if self.withheld == 0:
            return False
        return np.random.default_rng([*self.key, index, 1]).random() < self.withheld

    def __getitem__(self, index):
        colour, shape, at = self.scene(index)
        video = paint(at, shape, colour, self.size, self.wall)
        caption = "" if self.is_withheld(index) else caption_text(colour, shape)
        return video, self.words(caption)


WORLDS = {  # of --data, and what makes them
    "sprites": {},
    "hidden": {"wall": True, "withheld": 1.0},
}


# Folders of videos and of latents.


class Videos:
    """Random clips from a folder of videos, or of latents if it holds .npy files.

    Videos are decoded at first use, see `decode_once`; name.txt beside name.mp4 is its caption.
    Latents: name.npy holds (T, C, height, width), and name.text.npy the text (L, text_dim), if
    there is one. An item is then a slice of a file. Every file comes once in each epoch of
    len(files) indices. Hidden folders and runs/ are not searched.

    size: (height, width) of the pictures, or one number for a square. fps: frames per second; 0:
    each video's own. A file that cannot be read, or is too short, is skipped with a warning. Raises
    ValueError if none is left, or if latents differ in shape.
    """

    def __init__(self, folder, size, frames, fps=0.0, seed=0):
        self.frames = frames
        self.seed = seed
        self.bad = set()
        paths = find_files(folder)
        latents = [p for p in paths if p.suffix == ".npy" and not p.name.endswith(".text.npy")]
        if latents:
            self.open_latents(latents)
        else:
            self.open_videos(paths, size, fps)

        long = [file for file in self.files if file["frames"] >= frames]
        short = len(self.files) - len(long)
        if not long:
            longest = max((file["frames"] for file in self.files), default=0)
            raise ValueError(
                f"no clip in {folder} has {frames} frames: of {len(self.files)} that can be read "
                f"the longest has {longest}"
            )
        if short:
            warn(f"skipping {short} of {len(self.files)} clips, of fewer than {frames} frames")
        self.files = long
        self.fps = float(np.median([file["fps"] for file in long]))

    def open_videos(self, paths, size, fps):
        self.channels = 3
        self.size = size
        self.files = decode_once(paths, size, fps)
        spoken = [split_words(file["caption"]) for file in self.files]
        rows = max([1, *map(len, spoken)])
        self.words = Words(sorted({word for words in spoken for word in words}), rows)
        self.text_dim = self.words.text_dim

    def open_latents(self, paths):
        self.files, self.rows = [], 1
        errors, first = [], None
        for path in paths:
            text = path.with_suffix(".text.npy")
            try:
                shape = np.load(path, mmap_mode="r").shape
                text_shape = np.load(text, mmap_mode="r").shape if text.exists() else (1, 1)
            except (OSError, ValueError, EOFError) as error:
                errors.append(f"{path} ({one_line(error)})")
                continue
            kind = (shape[1:], text_shape[1:])
            first = first or kind
            if kind != first or (len(shape), len(text_shape)) != (4, 2):
                raise ValueError(
                    f"{path} holds {shape}, and a text of {text_shape}; wanted (T, C, height, "
                    "width) and (L, text_dim), with one C, size and text_dim in the folder"
                )
            self.channels, *self.size = shape[1:]
            self.text_dim = text_shape[1]
            self.rows = max(self.rows, text_shape[0])
            # Wan's rate: a latent is four frames of 16 a second
            self.files.append({"array": path, "frames": shape[0], "fps": 4.0, "text": text})
        warn_of_skipped(errors, len(paths))
        self.words = None

    def __getitem__(self, index):
        epoch, place = divmod(index, len(self.files))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.files))

        # a file that turns out to be bad is replaced by the next
        for number in np.roll(order, -place):
            file = self.files[number]
            if file["array"] in self.bad:
                continue
            rng = np.random.default_rng([self.seed, epoch, place, 1])
            start = int(rng.integers(file["frames"] - self.frames + 1))
            try:
                return self.load(file, start)
            except (OSError, ValueError, EOFError) as error:
                self.bad.add(file["array"])
                print(f"warning: skipping {file['array']}: {one_line(error)}", file=sys.stderr)
        raise ValueError("none of the files can be read any more")

    def load(self, file, start):
        """(video (T, C, height, width), c): T frames of a file from frame `start` on."""
        # the map is not kept open: thousands of them would exceed the limit of open files
        clip = np.load(file["array"], mmap_mode="r")[start : start + self.frames]
        if self.words:
            return to_float(clip), self.words(file["caption"])

        text = np.load(file["text"]) if file["text"].exists() else np.zeros((1, self.text_dim))
        video, text = (torch.from_numpy(np.array(z, np.float32)) for z in (clip, text))
        if not (video.isfinite().all() and text.isfinite().all()):
            raise ValueError("it contains NaN or inf")
        return video, F.pad(text, (0, 0, 0, self.rows - len(text)))


def open_data(args, split="train"):
    """Open the dataset that `--data` names: the sprites, a folder of videos, or one of latents."""
    if args.data not in WORLDS:
        return Videos(args.data, args.size, args.frames, args.fps, args.seed)
    if isinstance(args.size, tuple):
        height, width = args.size
        raise ValueError(f"--size {height}x{width}: sprites live in a square; wanted one number")
    return Sprites(args.size, args.frames, args.seed, split, args.objects, **WORLDS[args.data])


# Metrics of the sprites: fit a sprite of each colour to each frame, then follow them.

SEEN = 0.3  # a sprite is judged if more of it than this is visible
K = len(COLOURS)
ENERGY = (PALETTE - BACKGROUND).square().sum(-1)  # squared distance of a colour to the background


def measure(video, captions, wall=False):
    """Score videos of sprites: (B, T, 3, size, size) in [-1, 1], B captions -> (B, T, 3) in 0..100.

    Visual: distance to the nearest valid picture, 100 (1 - distance / that of an empty picture).
    Temporal: does each sprite go straight, with valid bounces and speed? 100 exp(-(its distance
    from the prediction / 6 % of the canvas)^2), less for an invalid speed; 0 for a missing sprite;
    a hidden one does not count; nan where nothing is predicted, as in the first two frames.
    Text: share of the named sprites that are there and of those there that are named; half for the
    wrong shape; nan where no sprite is visible or predicted.
    """
    sprites, error, named = fit_video(video, captions, wall)
    visual = (1 - (error / most_named(named)).sqrt()).clamp(min=0)
    temporal, text = judge(sprites, named, video.shape[-1], wall)
    return 100 * torch.stack([visual, temporal, text], dim=-1)


def share_there(video, captions, wall=False):
    """The share (B, T) of the named sprites that are there, by their colour; see `measure`."""
    sprites, _, named = fit_video(video, captions, wall)
    asked = (named >= 0)[:, None]
    return (asked & (sprites[..., 3] > SEEN)).sum(2) / asked.sum(2)


def fit_video(video, captions, wall):
    """`fit_sprites` of each frame (B, T), and what the captions name (B, K)."""
    named = torch.tensor([parse_caption(caption) for caption in captions])
    frames = video.float().flatten(0, 1).cpu()
    S = most_named(named) + 1  # to find one too many
    fits = [fit_sprites(part, S, wall) for part in frames.split(512)]
    return *(torch.cat(z).unflatten(0, video.shape[:2]) for z in zip(*fits)), named


def most_named(named):
    return max(1, int((named >= 0).sum(1).max()))


def parse_caption(caption):
    """For each colour the shape that a caption names with it, by index, or -1: a list of K."""
    pairs = [[f"{colour} {shape}" in caption.lower() for shape in SHAPES] for colour in COLOURS]
    return [pair.index(True) if any(pair) else -1 for pair in pairs]


def match_sprites(picture, S, wall):
    """Find the S best sprites in pictures (F, 3, size, size) to half a pixel, the clearest first.

    Each has another colour. Returns at (F, S, 2), shape and colour (F, S).
    """
    size = picture.shape[-1]
    radius = radius_of(size)

    # a pixel votes for the colour it is nearest to, and against all if it is background
    colours = torch.cat([PALETTE, BACKGROUND[None], WALL[None]])
    distance = (picture[:, None] - colours[..., None, None]).square().sum(2)  # (F, K + 2, ...)
    nearest = distance.argmin(1, keepdim=True)
    votes = (distance[:, [K]] - distance[:, :K]) / ENERGY[:, None, None]
    counts = (nearest == K) | (nearest == torch.arange(K)[:, None, None])
    votes = votes.clamp(-1, 1) * counts  # (F, K, size, size)
    if wall:
        votes = votes * ~wall_columns(size)

    # try each shape at four places in a pixel: the kernel k with the largest sum of
    # votes · k + k - k² has the least squared error
    offset = torch.tensor([[0.01, 0.01], [0.01, 0.51], [0.51, 0.01], [0.51, 0.51]])
    half = int(1.3 * radius) + 1
    centre = (half + 0.5 + offset)[:, None].expand(-1, len(SHAPES), -1)
    kernel = coverage(centre, torch.arange(len(SHAPES)), 2 * half + 1, radius).flatten(0, 1)
    soft = (kernel - kernel.square()).sum((1, 2))
    score = F.conv2d(votes.flatten(0, 1)[:, None], kernel[:, None], soft, padding=half)
    score, best = score.unflatten(0, (-1, K)).flatten(2).max(2)  # (F, K)
    which, row, column = torch.unravel_index(best, (len(kernel), size, size))
    at = torch.stack([column, row], -1) + 0.5 + offset[which // len(SHAPES)]

    visible = (score - soft[which]) / kernel.sum((1, 2))[which]
    colour = visible.topk(min(S, K)).indices
    at = at.take_along_dim(colour[..., None], 1).clamp(radius, size - radius)
    return at, which.gather(1, colour) % len(SHAPES), colour


@torch.inference_mode(False)  # Newton's method needs a gradient, wherever it is called
def fit_sprites(picture, S, wall):
    """Fit up to S sprites of different colours to pictures (F, 3, size, size).

    Returns for each colour x, y, shape and visible share, 0 if it is not there, (F, K, 4); and the
    squared error (F,), 1 for an average sprite that is overlooked.
    """
    size = picture.shape[-1]
    radius = radius_of(size)
    at, shape, colour = match_sprites(picture, S, wall)

    # a sprite is there if its pixels are nearer to its colour than half-way to the background
    cover = coverage(at, shape, size, radius)
    behind = (1 - cover[:, :-1]).cumprod(1)  # what those in front leave free
    visible = cover * F.pad(behind, (0, 0, 0, 0, 1, 0), value=1.0)
    if wall:
        visible = visible * ~wall_columns(size)
    unlike = (picture[:, None] - PALETTE[colour][..., None, None]).square().sum(2)
    there = (visible * unlike).sum((2, 3)) < 0.25 * ENERGY[colour] * visible.sum((2, 3))
    share = there * visible.sum((2, 3)) / cover.sum((2, 3))

    # Newton's method, with the curvature of a sprite that nothing hides
    curvature = 2 * torch.pi * radius * ENERGY[colour][..., None]
    for _ in range(7):
        at.requires_grad_()
        cover = coverage(at, shape, size, radius) * there[..., None, None]
        error = (compose(cover, colour, wall) - picture).square().sum((1, 2, 3))
        (slope,) = torch.autograd.grad(error.sum(), at)
        at = (at - slope.nan_to_num() / curvature).clamp(radius, size - radius).detach()

    error = error.detach() / (ENERGY.mean() * 2.8 * radius**2)  # a sprite covers 2.8 radius^2
    if not wall:  # without a wall an empty picture is never right
        error = error.where(there.any(1), error.clamp(min=S - 1))
    fitted = torch.stack([*at.unbind(2), shape, share], 2)
    by_colour = torch.zeros(len(picture), K, 4)
    return by_colour.scatter(1, colour[..., None].expand(-1, -1, 4), fitted), error


def judge(sprites, named, size, wall):
    """Temporal and Text, each (B, T) in [0, 1], from sprites (B, T, K, 4), see `fit_sprites`.

    named (B, K): see `parse_caption`.
    """
    radius = radius_of(size)
    low, high = radius, size - radius
    asked = named >= 0
    before = last = torch.full_like(sprites[:, 0, :, :2], torch.nan)  # two positions in a row
    gap = torch.ones_like(named)  # frames since the last one

    scores = []
    for t, frame in enumerate(sprites.unbind(1)):
        at, shape, seen = frame[..., :2], frame[..., 2], frame[..., 3] > SEEN

        # each axis: it went straight, or had just bounced off the low or the high edge
        velocity = last - torch.stack([before, 2 * low - before, 2 * high - before])
        ahead = last + velocity * gap[..., None]
        predicted = torch.from_numpy(reflect(ahead.numpy(), low, high))
        off = (at - predicted).abs()
        off = off.masked_fill(velocity.abs() > 1.2 * SPEED[1] * size, torch.inf)
        best = off.argmin(0, keepdim=True)
        distance = off.gather(0, best)[0].norm(dim=-1) / size
        speed = velocity.gather(0, best)[0].norm(dim=-1) / size
        wrong_speed = speed - speed.clamp(*SPEED)
        straight = torch.exp(-((distance / 0.06) ** 2) - (wrong_speed / 0.02) ** 2)

        # the wall or a visible sprite may hide one at its predicted position
        others = at.masked_fill(~seen[..., None], torch.inf)
        hidden = torch.cdist(predicted[0], others).amin(2) < 0.7 * radius
        if wall:
            hidden |= (predicted[0, ..., 0] - size / 2).abs() < WALL_HALF * size + 0.3 * radius
        missing = asked & ~seen & ~hidden

        temporal = straight.masked_fill(~seen, torch.nan).masked_fill(missing & (t > 1), 0)
        right = (asked & seen) * (1 + (shape == named)) / 2
        wanted = torch.maximum((asked & (seen | ~hidden)).sum(1), seen.sum(1))
        scores.append(torch.stack([temporal.nanmean(1), right.sum(1) / wanted]))

        in_a_row = last.masked_fill(gap[..., None] > 1, torch.nan)
        before = torch.where(seen[..., None], in_a_row, before)
        last = torch.where(seen[..., None], at, last)
        gap = torch.where(seen, 1, gap + 1)
    return torch.stack(scores, dim=2)


# ---- machinery: decode once, write, Wan's VAE and text, the command line ----

CACHE = Path("runs/cache")
NO_VIDEO = (".txt", ".npy", ".npz", ".json", ".md")


def find_files(folder):
    """Sorted paths of a folder's files, subfolders included, hidden ones and runs/ left out.

    Raises ValueError if there are none, or if it is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; wanted one of videos or of latents, or for train.py "
            f"one of {', '.join(WORLDS)}"
        )
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part[0] == "." or part == "runs" for part in parts):
            found.append(path)
    if not found:
        raise ValueError(f"{folder} holds no files")
    return found


def decode_once(paths, size, fps, cache=CACHE):
    """Decode videos to .npy files of uint8 (T, height, width, 3), all but those decoded before.

    They are named by what decides their content: path, size, rate, and the video's bytes and time.
    Returns [{"array": path, "frames": T, "fps": frames per second, "caption": text}]. Files that
    cannot be read are left out, with one warning for all.
    """
    arrays = {}  # {path of a video: path of its frames}
    for path in paths:
        if path.suffix.lower() not in NO_VIDEO:
            arrays[path] = cache / f"{decoded_name(path, size, fps)}.npy"

    new = [path for path, array in arrays.items() if not array.with_suffix(".json").exists()]
    if new:
        cache.mkdir(parents=True, exist_ok=True)
        values = 3 * math.prod(sides(size)) * sum(expected_frames(path, fps) for path in new)
        print(f"decoding {len(new)} files to {cache}, about {values / 1e9:.2g} GB")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(lambda path: decode_to(arrays[path], path, size, fps), new)
            list(tqdm(results, "decoding", len(new), leave=False, disable=None))

    files, errors = [], []
    for path, array in arrays.items():
        properties = json.loads(array.with_suffix(".json").read_text())
        if "error" in properties:
            errors.append(f"{path} ({properties['error']})")
        else:
            files.append({"array": array, "caption": read_caption(path)} | properties)
    warn_of_skipped(errors, len(arrays))
    return files


def warn_of_skipped(errors, count):
    """Warn in one line of those of `count` files that cannot be read, each "path (reason)"."""
    if errors:
        more = f" and {len(errors) - 3} more" if len(errors) > 3 else ""
        warn(f"skipping {len(errors)} of {count} files: {', '.join(errors[:3])}{more}")


def decoded_name(path, size, fps):
    """A name for what a file is decoded to; another file, size or rate gives another one."""
    state = path.stat()
    key = f"{path.absolute()} {sides(size)} {fps:g} {state.st_size} {state.st_mtime_ns}"
    return hashlib.sha256(os.fsencode(key)).hexdigest()[:16]


def expected_frames(path, fps):
    """How many frames a file will have, by its header; 0 if it cannot be read."""
    try:
        with open_video(path) as container:
            return (container.duration or 0) / av.time_base * (fps or own_rate(path))
    except ValueError:
        return 0


def decode_to(array, path, size, fps):
    """Decode a video to a file; a .json beside it says what it holds, or why it cannot be read."""
    try:
        fps = fps or own_rate(path)
        pixels = bytearray()  # grows without a second copy
        for picture in read_frames(path, size, fps):
            pixels += picture.tobytes()
        pictures = np.frombuffer(pixels, np.uint8).reshape(-1, *sides(size), 3)
        save_array(array, pictures)
        properties = {"frames": len(pictures), "fps": float(fps)}
    except (ValueError, av.FFmpegError) as error:
        properties = {"error": one_line(error)}
    with replacing(array.with_suffix(".json")) as part:  # last: it says that the frames are there
        part.write_text(json.dumps(properties))


def read_video(path, size, fps=0.0, frames=None):
    """Read a video or a picture as it is shown: (T, 3, height, width) float32 in [-1, 1].

    size: (height, width), or one number for a square. fps: frames per second, 0 for its own.
    frames: the first ones only. Raises ValueError if nothing can be read.
    """
    return to_float(np.stack(list(islice(read_frames(path, size, fps), frames))))


def read_frames(path, size, fps=0.0):
    """Yield a file's frames (height, width, 3) uint8 at a constant rate, as a player shows them.

    A frame is turned as the file says, scaled to cover `size` and cropped to its centre, over
    black where it is transparent. Raises ValueError if nothing can be read; what comes before a
    damaged part is returned.
    """
    rate = own_rate(path)
    with open_video(path) as container:
        graph = None
        for frame in chain(timed_frames(container, rate), [None]):  # None ends the stream
            if graph is None:
                stream = container.streams.best("video")
                graph, turn = player(stream, frame, sides(size), fps or rate)
            graph.push(frame)
            for picture in pulled(graph):
                yield np.ascontiguousarray(turn(picture))


def timed_frames(container, rate):
    """Decode the frames of an open file up to a damaged part, with times that begin at 0.

    rate: frames per second, where the file has no times. Raises ValueError if it has no frames.
    """
    stream = container.streams.best("video")
    step = round(1 / (rate * stream.time_base))
    start, following = None, 0
    error = "it has no frames"
    try:
        for frame in container.decode(stream):
            if container.format.name == "avi":  # its times are those of decoding
                frame.pts = frame.dts
            if frame.pts is None:  # all of a raw stream, the last ones of an AVI
                frame.pts = following
            start = frame.pts if start is None else start
            following = frame.pts + step
            frame.pts -= start
            frame.duration = max(frame.duration, step)  # the last one decides where it ends
            yield frame
    except av.FFmpegError as damage:
        error = damage.strerror
    if start is None:
        raise ValueError(f"ffmpeg cannot read it: {error}")


def open_video(path):
    """Open a file that has pictures. Raises ValueError for others."""
    try:
        container = av.open(f"file:{path}", metadata_errors="replace")
    except (OSError, av.FFmpegError) as error:
        raise ValueError(f"ffmpeg cannot read it: {error.strerror}") from None
    stream = container.streams.best("video")
    if stream is None or not stream.guessed_rate:
        container.close()
        raise ValueError("it has no video")
    stream.codec_context.thread_count = 1  # decode_once has a thread for each core
    return container


def own_rate(path):
    """The frames per second of a file, a Fraction: what ffmpeg guesses, or else the median step's.

    ffmpeg guesses the rate of uneven frames by their shortest step, which may be ten times as high.
    A GIF whose equal frames are merged has long steps, and is guessed right.
    """
    with open_video(path) as container:
        stream = container.streams.best("video")
        packets = islice(container.demux(stream), 200)
        times = sorted(packet.pts for packet in packets if packet.pts is not None)
        guessed, unit = stream.guessed_rate, stream.time_base
    step = int(np.median(np.diff(times))) if len(times) > 1 else 0
    usual = 1 / (step * unit) if step else guessed
    return guessed if usual / 1.1 < guessed < usual * 1.6 else usual


def player(stream, frame, size, fps):
    """Build ffmpeg's filters for a stream's frames, and the function that turns their pictures."""
    quarters = round(frame.rotation / 90)
    step = -1 if is_mirrored(frame, stream.container.name.removeprefix("file:")) else 1
    height, width = reversed(size) if quarters % 2 else size

    # scale to cover height x width; pixels need not be squares
    shown = frame.width * (stream.sample_aspect_ratio or 1)
    scale = max(height / frame.height, width / shown)
    scaled = f"{math.ceil(scale * shown - 1e-6)}:{math.ceil(scale * frame.height - 1e-6)}"
    rate = Fraction(fps).limit_denominator(1001)
    filters = [
        ("fps", f"{rate}"),
        ("scale", f"{scaled}:flags=bilinear"),
        ("format", "rgb24"),
    ]
    filters += [("crop", f"{width}:{height}"), ("buffersink", None)]
    transparent = any(component.is_alpha for component in frame.format.components)
    if transparent or frame.format.name == "pal8":
        filters[1:1] = [("format", "gbrap16"), ("premultiply", "inplace=1")]

    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format.name,
        time_base=stream.time_base,
    )
    graph.link_nodes(source, *(graph.add(name, options) for name, options in filters))
    graph.configure()
    return graph, lambda picture: np.rot90(picture[::step], quarters)


def is_mirrored(frame, path):
    """Whether a frame is to be mirrored, and then turned: by its matrix, or by a photo's EXIF."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX") or bytes(36)
    except ValueError:  # PyAV does not know all that a photo says
        with suppress(OSError):
            return Image.open(path).getexif().get(274) in (2, 4, 5, 7)
        return False
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32) / 2**16
    return a * d < b * c


def pulled(graph):
    """The pictures (height, width, 3) that a graph has ready."""
    while True:
        try:
            yield graph.pull().to_ndarray()
        except (av.BlockingIOError, av.EOFError):
            return


def sides(size):
    """(height, width) of a size, which is that already or one number for a square."""
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def to_float(clip):
    """(T, height, width, 3) uint8 -> (T, 3, height, width) in [-1, 1]."""
    clip = rearrange(torch.from_numpy(np.array(clip)), "t h w c -> t c h w").contiguous()
    return clip.float().div_(127.5).sub_(1)


def to_bytes(video):
    """(T, 3, height, width) in [-1, 1] -> (T, height, width, 3) uint8."""
    video = (video.float().clamp(-1, 1) + 1) * 127.5
    return rearrange(video, "t c h w -> t h w c").round().byte().cpu().numpy()


def enlarge(frames, height=128):
    """Repeat pixels so that small frames can be seen: (..., height, width, 3) uint8."""
    times = max(1, round(height / frames.shape[-3]))
    return frames.repeat(times, -3).repeat(times, -2)


@contextmanager
def writer(path, fps=8.0, colours=256):
    """Write a video: `with writer("out.mp4", 8) as write: write(frames)`.

    `write` appends frames (T, 3, height, width) in [-1, 1], enlarged if they are small, or pictures
    (T, height, width, 3) uint8. An .mp4 grows frame by frame. A .gif is written at the end; its
    frames share their `colours`, or noise would make it several times as large.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".gif":
        images = []
        yield lambda video: images.extend(map(Image.fromarray, as_pictures(video)))
        some = np.concatenate([np.asarray(image) for image in images[:: len(images) // 16 + 1]])
        palette = Image.fromarray(some).quantize(colours, Image.Quantize.FASTOCTREE)
        images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
        images[0].save(path, save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)
        return

    with iio.imopen(path, "w", plugin="pyav", extension=".mp4") as file:
        file.init_video_stream("libx264", fps=fps)

        def write(video):
            for picture in as_pictures(video):
                height, width, _ = picture.shape  # x264 wants even ones
                file.write_frame(picture[: height // 2 * 2, : width // 2 * 2])

        yield write


def as_pictures(video):
    """Frames (T, 3, height, width) in [-1, 1] as enlarged pictures; pictures as they are."""
    return enlarge(to_bytes(video)) if torch.is_tensor(video) else video


@contextmanager
def replacing(path):
    """Yield a hidden file to write, which is renamed to `path` when it is complete."""
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_array(path, array):
    """Write a .npy file, as a whole or not at all."""
    with replacing(path) as part, open(part, "wb") as file:
        np.save(file, array)


def read_caption(path):
    """The text of name.txt beside name.mp4, "" without one."""
    path = path.with_suffix(".txt")
    return path.read_text("utf-8", "replace").strip() if path.is_file() else ""


def warn(message):
    """Print a warning of what all processes see, in the first alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


class Wan:
    """Wan 2.1's VAE and text encoder, from a diffusers folder: an optional extra.

    Raises ValueError if a package or the folder is missing.
    """

    NEGATIVE = (
        "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
        "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
        "三条腿，背景人很多，倒着走"
    )

    def __init__(self, path, device="cpu"):
        try:
            import ftfy  # noqa: F401, the pipeline cleans prompts with it
            from diffusers import WanPipeline
        except ImportError as error:
            raise ValueError(
                f"--wan needs `pip install diffusers transformers ftfy` ({one_line(error)})"
            ) from None
        if not Path(path, "model_index.json").is_file():
            raise ValueError(
                f"--wan {path} holds no model_index.json; give a diffusers folder of Wan 2.1, "
                "for instance Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
            )

        dtype = {"text_encoder": torch.bfloat16, "default": torch.float32}
        self.pipe = WanPipeline.from_pretrained(path, transformer=None, dtype=dtype).to(device)
        self.device = device
        config = self.pipe.vae.config
        self.mean = torch.tensor(config.latents_mean, device=device).view(-1, 1, 1, 1)
        self.std = torch.tensor(config.latents_std, device=device).view(-1, 1, 1, 1)

    @torch.no_grad()
    def text(self, prompts):
        """Encode prompts: c (B, 512, text_dim); rows past the end of a prompt are zero."""
        embeds, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=512
        )
        return embeds.float()

    @torch.no_grad()
    def encode(self, video):
        """Encode pixels to normalised latents.

        (B, 4 n - 3, 3, height, width) in [-1, 1] -> (B, n, 16, height / 8, width / 8).
        """
        video = video.transpose(1, 2).to(self.device)
        latents = self.pipe.vae.encode(video).latent_dist.mode()
        return ((latents - self.mean) / self.std).transpose(1, 2)

    def decoder(self):
        """A function that decodes a stream of latents, call by call.

        It maps latents (B, n, 16, h, w) to the frames they add to those of earlier calls: one for
        the first latent, four for each later one. It holds the VAE's causal cache and no video.
        """
        vae = self.pipe.vae
        layers = [m for m in vae.decoder.modules() if type(m).__name__ == "WanCausalConv3d"]
        cache = [None] * len(layers)

        @torch.no_grad()
        @torch.autocast(torch.device(self.device).type, enabled=False)
        def decode(latents):
            latents = latents.to(self.device).transpose(1, 2) * self.std + self.mean
            frames = []
            for latent in vae.post_quant_conv(latents).split(1, dim=2):
                is_first = cache[0] is None
                frames.append(vae.decoder(latent, cache, [0], first_chunk=is_first))
            return torch.cat(frames, dim=2).clamp(-1, 1).transpose(1, 2).cpu()

        return decode


def encode_video(wan, path, out, size, frames, fps):
    """Encode each clip of `frames` frames to out-NUMBER.npy, its caption to out-NUMBER.text.npy.

    Finished files are kept. Raises ValueError if the video cannot be read or is too short.
    """
    text = wan.text([read_caption(path)])[0].half().cpu().numpy()
    reader = read_frames(path, size, fps)
    number = 0
    while len(clip := list(islice(reader, frames))) == frames:
        target = out.with_name(f"{out.name}-{number:04d}.npy")
        if not target.exists():
            latents = wan.encode(to_float(np.stack(clip))[None])[0].half().cpu().numpy()
            save_array(target.with_suffix(".text.npy"), text)
            save_array(target, latents)  # last: a file of latents has its text
        number += 1
    if number == 0:
        raise ValueError(f"it has {len(clip)} frames; wanted at least --frames {frames}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose -h opens with a docstring, and whose errors are ValueErrors."""

    def __init__(self, doc, usage="%(prog)s [flags]"):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(usage=usage, description=doc, formatter_class=layout)

    def error(self, message):
        raise ValueError(message)


def number(kind, least, most=10**9):
    """Make an argparse type: an int or a float from least to most."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"got {text}, wanted {wanted} from {least:g} to {most:g}"
            )
        return value

    return read


def picture_size(text):
    """An argparse type: 64 -> 64, for squares; 480x832 -> (480, 832), height and width."""
    found = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"got {text}, wanted pixels, such as 64 or 480x832")
    height, width = found.groups()
    return (int(height), int(width)) if width else int(height)


def list_devices():
    """The devices that torch has here, the preferred one last."""
    names = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    names += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return tuple(names + ["cuda"] * torch.cuda.is_available())


DEVICES = list_devices()


def round_up(n, unit):
    """The smallest multiple of `unit` that is at least n."""
    return -(-n // unit) * unit


def one_line(error):
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def run_main(main):
    """Run a script's main(argv); wrong input, a full disk or Ctrl-C ends in one line on stderr."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main(argv):
    """Encode a folder of videos; run again, it goes on. Under torchrun the files are divided."""
    parser = Parser(__doc__, "%(prog)s VIDEOS LATENTS --wan WAN [flags]")
    add = parser.add_argument
    # fmt: off
    add("videos", type=Path, help="a folder of videos; name.txt beside name.mp4 is its caption")
    add("out", type=Path, help="a folder for the latents")
    add("--wan", type=Path, required=True, help="a diffusers folder of Wan 2.1")
    add("--size", type=picture_size, default=(480, 832),
        help="height and width in pixels, multiples of 16 (default: 480x832)")
    add("--frames", type=number(int, 1), default=81,
        help="frames of a clip, 4 n - 3 for n latents (default: %(default)s)")
    add("--fps", type=number(float, 0.01), default=16.0,
        help="read videos at this rate (default: %(default)s)")
    add("--device", choices=DEVICES, default=DEVICES[-1],
        help="where to run (default: %(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if any(side % 16 for side in sides(args.size)) or args.frames % 4 != 1:
        raise ValueError("wanted a --size of multiples of 16, and --frames 4 n - 3, such as 81")

    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    paths = [p for p in find_files(args.videos) if p.suffix.lower() not in NO_VIDEO]
    wan = Wan(args.wan, f"cuda:{local_rank}" if args.device == "cuda" else args.device)
    for path in tqdm(paths[rank :: int(os.environ.get("WORLD_SIZE", 1))], "videos"):
        out = args.out / path.relative_to(args.videos)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            encode_video(wan, path, out, args.size, args.frames, args.fps)
        except (ValueError, av.FFmpegError) as error:
            print(f"warning: skipping {path}: {one_line(error)}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
