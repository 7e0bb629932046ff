"""Videos in and out: a procedural world of sprites with its metrics, folders of videos, folders of
latents.

A dataset maps any index >= 0 to (video, c): video (T, C, height, width) float32, pixels in [-1, 1],
and c (L, text_dim). The same seed and index give the same item, on any machine and in any process.
Its attributes: channels, size, frames, fps, text_dim, rows (L) and words (None for latents).

B videos, T frames, C channels, S sprites, L words, F pictures to fit.
"""

import argparse
import difflib
import io
import math
import os
import re
import sys
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path

import av  # comes with imageio[pyav]
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from einops import rearrange
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
        self.embedded = {}  # captions recur in every epoch

    def __call__(self, prompt):
        """Embed a prompt: (L, text_dim), L at least `rows`.

        Raises ValueError for a word outside the vocabulary.
        """
        if prompt not in self.embedded:
            if len(self.embedded) >= 4096:
                self.embedded.clear()
            self.embedded[prompt] = self.embed(split_words(prompt), prompt)
        return self.embedded[prompt]

    def embed(self, words, prompt):
        """Embed the words of a prompt, without the cache of `__call__`."""
        self.check(words, prompt)
        c = torch.zeros(max(self.rows, len(words)), self.text_dim)
        position = [self.vocabulary.index(word) for word in words]

        for row, word in enumerate(position):
            c[row, word] = 1
        for row, successor in enumerate(position[1:]):
            c[row, len(self.vocabulary) + successor] = 1
        return c

    def check(self, words, prompt):
        """Raise ValueError for a word outside the vocabulary, with the nearest ones in it."""
        unknown = [word for word in words if word not in self.vocabulary]
        if not unknown:
            return
        near = ", ".join(difflib.get_close_matches(unknown[0], self.vocabulary, 5, 0))
        advice = "this model was trained without captions, so the prompt must be empty"
        if near:
            advice = (
                f"of the {len(self.vocabulary)} words of the training captions "
                f"the nearest are: {near}"
            )
        raise ValueError(f'unknown word "{unknown[0]}" in the prompt "{prompt}"; {advice}')

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
MAX_SIZE = 1024  # pixels a side
MAX_VALUES = 10**9  # numbers in a clip


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


def paint(at, shape, colour, size, wall=False, shown=None):
    """Draw sprites, the first in front: (..., 3, size, size) in [-1, 1].

    at (..., S, 2) in pixels; shape and colour (..., S) or (S,) indices; shown (..., S) in [0, 1] or
    None: opacity of each sprite.
    """
    cover = coverage(at, shape, size, radius_of(size))
    if shown is not None:
        cover = cover * shown[..., None, None]
    return compose(cover, colour, wall)


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

    A clip is a function of (seed, split, index). "train" and "test" are separate streams. withheld:
    share of clips without their caption. Raises ValueError for sizes and numbers out of range.
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
        if size > MAX_SIZE:
            raise ValueError(f"size {size}: the world of the sprites has at most {MAX_SIZE} pixels")
        if frames * 3 * size**2 > MAX_VALUES:
            raise ValueError(
                f"{frames} frames of {size} x {size} pixels are {frames * 3 * size**2:.1e} numbers "
                f"a clip; up to {MAX_VALUES:.0e} work, here {MAX_VALUES // (3 * size**2)} frames"
            )
        self.size = size
        self.frames = frames
        self.objects = objects
        self.wall = wall
        self.withheld = withheld
        self.key = (seed, ("train", "test").index(split))
        self.words = Words([*COLOURS, *SHAPES, "and"], 3 * objects - 1)
        self.text_dim = self.words.text_dim
        self.rows = self.words.rows

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
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """Paint several clips at once; torch's DataLoader asks for a batch in this way."""
        colour, shape, at = (torch.stack(z) for z in zip(*map(self.scene, indices)))
        videos = paint(at, shape[:, None], colour[:, None], self.size, self.wall)

        captions = [
            "" if self.is_withheld(index) else caption_text(colour[b], shape[b])
            for b, index in enumerate(indices)
        ]
        return [(video, self.words(caption)) for video, caption in zip(videos, captions)]


# Folders of videos and of latents.


class Folder:
    """Random clips of T frames from files; every file once in each epoch of len(files) indices.

    A subclass calls `keep` with the lengths of its files and defines load(number, start), the item
    of file `number` from frame `start` on.
    """

    def __getitem__(self, index):
        epoch, place = divmod(index, len(self.files))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.files))

        # a file that turns out to be bad is replaced by the next
        for number in map(int, np.roll(order, -place)):
            if self.broken[number]:
                continue
            rng = np.random.default_rng([self.seed, epoch, place, 1])
            start = int(rng.integers(self.lengths[number] - self.frames + 1))
            try:
                return self.load(number, start)
            except READ_ERRORS as error:
                self.broken[number] = True
                print(skipped(self.files[number], error), file=sys.stderr)
        raise ValueError("none of the files can be read any more")

    def keep(self, folder, lengths, unreadable):
        """Keep the files of {path: length} that are long enough. Raises ValueError if none is."""
        self.files = [path for path, length in lengths.items() if length >= self.frames]
        self.lengths = [lengths[path] for path in self.files]
        self.broken = torch.zeros(len(self.files), dtype=torch.bool)
        self.broken.share_memory_()  # among the loader's worker processes
        if not self.files:
            raise ValueError(
                f"no clip in {folder} has {self.frames} frames: of {len(lengths)} the longest has "
                f"{max(lengths.values(), default=0)}, and {unreadable} cannot be read"
            )

        short = len(lengths) - len(self.files)
        if short:
            warn(f"skipping {short} of {len(lengths)} clips, of fewer than {self.frames} frames")


class Videos(Folder):
    """Clips from a folder of videos, with an optional caption in name.txt beside name.mp4.

    `workers` threads open each file once to list the folder. An item decodes only its own frames,
    from the keyframe before them. Resized frames are cached, up to `memory` bytes a process:
    small folders are decoded once; large ones are not cached.
    A file that cannot be read is named once in a warning and skipped; clips too short are counted
    and skipped. Raises ValueError if none is left.
    """

    channels = 3

    def __init__(self, folder, size, frames, fps=0.0, stride=1, seed=0, workers=None, memory=2**30):
        self.size = size
        self.frames = frames
        self.read_at = fps
        self.stride = stride
        self.seed = seed
        self.memory = memory
        self.kept = {}  # per file its pictures (length, height, width, 3) and which are known

        files = list_files(folder, "videos")
        found = read_headers(files, workers)  # {path: (header, caption)}
        lengths = {path: header.length(fps, stride) for path, (header, _) in found.items()}
        self.keep(folder, lengths, unreadable=len(files) - len(found))
        self.headers = [found[path][0] for path in self.files]
        self.captions = [found[path][1] for path in self.files]
        self.fps = float(np.median([(fps or header.rate) / stride for header, _ in found.values()]))

        spoken = [split_words(caption) for caption in self.captions]
        self.words = Words(sorted(set(chain(*spoken))), max([1, *map(len, spoken)]))
        self.text_dim = self.words.text_dim
        self.rows = self.words.rows

    def load(self, number, start):
        """(video (T, 3, height, width), c): T frames of a file from frame `start` on.

        Raises ValueError if they cannot be decoded.
        """
        c = self.words(self.captions[number])
        if not self.has_room(number):
            return to_float(self.decode(number, start)), c

        pictures, known = self.kept[number]
        clip = slice(start, start + self.frames)
        if not known[clip].all():
            pictures[clip] = self.decode(number, start)
            known[clip] = True
        return to_float(pictures[clip]), c

    def has_room(self, number):
        """Whether the frames of a file are cached; reserve their memory at the first call."""
        if number not in self.kept:
            shape = (self.lengths[number], *sides(self.size), 3)
            used = sum(pictures.nbytes for pictures, _ in self.kept.values())
            if used + math.prod(shape) > self.memory:
                return False
            self.kept[number] = np.empty(shape, np.uint8), np.zeros(shape[0], bool)
        return True

    def decode(self, number, start):
        """Decode T frames of a file: (T, height, width, 3) uint8."""
        path, header = self.files[number], self.headers[number]
        reader = read_frames(path, self.size, self.read_at, self.stride, start, header)
        pictures = list(islice(reader, self.frames))
        if len(pictures) < self.frames:
            raise ValueError(
                f"only {start + len(pictures)} of its {self.lengths[number]} frames can be decoded"
            )
        return np.stack(pictures)


class Latents(Folder):
    """Clips from a folder of .npz files, each read when an item asks for it.

    A file holds `latents` (T, C, height, width) and optionally `text` (L, text_dim). One that
    cannot be read or contains NaN or inf is named once in a warning and skipped. Raises ValueError
    if none is left, or if they differ in channels, size or text_dim.
    """

    words = None
    fps = 4

    def __init__(self, folder, frames, seed=0):
        self.frames = frames
        self.seed = seed

        shapes = {}  # {path: (shape of latents, shape of text)}
        errors = []
        for path in list_files(folder, "latents"):
            try:
                shapes[path] = latent_shapes(path)
            except ValueError as error:
                errors.append(error)
        if not shapes:
            raise ValueError(f"no file of {folder} can be used: {errors[0]}")
        for error in errors:
            warn(f"skipped: {error}")

        first = next(iter(shapes))
        latents, text = shapes[first]
        for path, (other, other_text) in shapes.items():
            if other[1:] != latents[1:] or other_text[1] != text[1]:
                raise ValueError(
                    f"{path} holds latents {other} with text {other_text}, but {first} {latents} "
                    f"with {text}; a folder needs the same channels, size and text width"
                )

        lengths = {path: latents[0] for path, (latents, _) in shapes.items()}
        self.keep(folder, lengths, unreadable=len(errors))
        self.channels = latents[1]
        self.size = latents[2:]
        self.text_dim = text[1]
        self.rows = max(text[0] for _, text in shapes.values())

    def load(self, number, start):
        """(latents (T, C, height, width), c): T frames of a file from frame `start` on.

        Raises ValueError if the file contains NaN or inf.
        """
        with np.load(self.files[number]) as file:
            latents = np.float32(file["latents"])
            text = np.float32(file["text"]) if "text" in file else np.zeros((1, 1), np.float32)
        if not (np.isfinite(latents).all() and np.isfinite(text).all()):
            raise ValueError("it contains NaN or inf")

        text = F.pad(torch.from_numpy(text), (0, 0, 0, self.rows - len(text)))
        return torch.from_numpy(latents[start : start + self.frames]), text


def open_data(args, split="train"):
    """Open the dataset that `--data` names: "sprites", a folder of latents, or one of videos."""
    if args.data == "sprites":
        if isinstance(args.size, tuple):
            height, width = args.size
            raise ValueError(
                f"--size {height}x{width}: sprites live in a square; one number would work"
            )
        return Sprites(
            args.size, args.frames, args.seed, split, args.objects, args.wall, args.withheld
        )
    if holds_latents(args.data):
        return Latents(args.data, args.frames, args.seed)
    return Videos(args.data, args.size, args.frames, args.fps, args.stride, args.seed)


# Metrics of the sprites. They invert `paint`: fit sprites to each frame, then follow them.

SEEN = 0.15  # a sprite counts as there if more of it than this is visible
CLEAR = 0.5  # its position is trusted if more of it than this is visible
SHAPE_CLEAR = 0.6  # its shape is judged only if at least this much is visible


def measure(video, captions, wall=False):
    """Score videos of sprites: (B, T, 3, size, size) in [-1, 1], B captions -> (B, T, 3) in 0..100.

    Visual: distance to the nearest valid picture, 100 (1 - distance / that of an empty picture).
    Temporal: does each sprite go straight, with valid bounces and speed? 100 exp(-(its distance
    from the prediction / 6 % of the canvas)^2), less for an invalid speed; 0 for a missing sprite;
    a hidden one does not count; nan where nothing is predicted, as in the first two frames.
    Text: share of the named sprites that are there and of those there that are named; half for the
    wrong shape; nan where no sprite is visible or predicted.
    """
    B, T, _, size, _ = video.shape
    named = [parse_caption(caption) for caption in captions]
    S = max([1, *map(len, named)]) + 1  # one more than named, to find a sprite too many

    frames = video.float().flatten(0, 1).cpu()
    fits = [fit_sprites(part, S, wall) for part in frames.split(512)]
    *sprites, error = (torch.cat(z).unflatten(0, (B, T)) for z in zip(*fits))
    visual = 100 * (1 - error.sqrt()).clamp(min=0)

    arrays = [z.numpy() for z in sprites]  # at, shape, colour, clear
    judged = [judge(*fitted, wall, size) for fitted in zip(*arrays, named)]
    judged = torch.tensor(np.array(judged), dtype=torch.float32)  # (B, T, 2)
    return torch.cat([visual[..., None], judged], dim=-1)


def parse_caption(caption):
    """The sprites that a caption names, as {colour: shape} by index."""
    pairs = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", caption.lower())
    return {list(COLOURS).index(colour): list(SHAPES).index(shape) for colour, shape in pairs}


def fit_sprites(picture, S, wall):
    """Fit up to S sprites to each picture (F, 3, size, size): an approximate inverse of `paint`.

    Greedy matching, then a descent on the positions for both orders of the two largest sprites.
    Returns at (F, S, 2); shape and colour (F, S); clear (F, S): visible share of the sprite, 0 if
    it is not there; error (F,): squared distance, 1 for an empty picture where S - 1 sprites are.
    """
    size = picture.shape[-1]
    radius = radius_of(size)
    at, shape, colour, there = match_sprites(picture, S, wall)
    at, shape, error = descend(picture, at, shape, colour, there, wall)

    # where two sprites overlap, the one in front may have been found second
    swap = [1, 0, *range(2, S)]
    close = (at[:, 0] - at[:, 1]).abs().amax(1) < 2.2 * radius
    near = (there[:, :2].all(1) & close).nonzero()[:, 0]
    at2, shape2, error2 = descend(
        picture[near],
        at[near][:, swap],
        shape[near][:, swap],
        colour[near][:, swap],
        there[near][:, swap],
        wall,
    )

    better = error2 < error[near]
    near = near[better]
    at[near] = at2[better]
    shape[near] = shape2[better]
    error[near] = error2[better]
    colour[near] = colour[near][:, swap]
    there[near] = there[near][:, swap]

    clear = visible_share(at, shape, there, size, wall)
    area = templates(size).square().sum((1, 2, 3)).mean()
    full = colour_energy().mean() * area * (S - 1)
    error = error / full
    if not wall:  # without a wall an empty picture is never right
        error = torch.where(there.any(1), error, error.clamp(min=1))
    return at, shape, colour, clear, error


def colour_energy():
    """Squared distance of each colour to the background: (colours,)."""
    return (PALETTE - BACKGROUND).square().sum(-1)


def templates(size):
    """Coverage of each shape in a small window around its centre: (shapes, 1, window, window)."""
    radius = radius_of(size)
    half = int(radius * 1.3) + 2
    centre = torch.full((len(SHAPES), 2), half + 0.5)
    return coverage(centre, torch.arange(len(SHAPES)), 2 * half + 1, radius)[:, None]


def match_sprites(picture, S, wall):
    """Find up to S sprites in each picture (F, 3, size, size) greedily, the clearest first.

    Every colour, shape and pixel is a candidate; a colour is used once. Returns at (F, S, 2), shape
    and colour (F, S), there (F, S) bool.
    """
    count, size = len(picture), picture.shape[-1]
    radius = radius_of(size)
    energy = colour_energy()
    kernel = templates(size)
    inside = (torch.arange(size) + 0.5 - size / 2).abs() <= size / 2 - radius + 0.5
    inside = inside & inside[:, None]

    # squared distance of each pixel to each colour, 1 for the background: (F, colours, size, size)
    unlike = (picture[:, None] - PALETTE[..., None, None]).square().sum(2)
    unlike = unlike / energy[:, None, None]

    # share of each pixel that no sprite found so far and no wall hides: (F, 1, size, size)
    free = ~wall_columns(size) if wall else torch.ones(size)
    free = free.expand(count, 1, size, -1).float()
    taken = torch.zeros(count, len(PALETTE), dtype=torch.bool)

    found = []
    for s in range(S):
        # each pixel votes for a colour by 1, minus its distance to it
        penalty = 3 if s == 0 else 2
        votes = (free * (1 - penalty * unlike)).flatten(0, 1)[:, None]
        votes = F.conv2d(votes, kernel, padding="same").unflatten(0, unlike.shape[:2])
        votes = votes * energy[:, None, None, None]  # (F, colours, shapes, size, size)
        votes = votes.masked_fill(~inside | taken[..., None, None, None], -torch.inf)

        best = votes.flatten(1).argmax(1)
        colour, shape, row, column = torch.unravel_index(best, votes.shape[1:])
        at = torch.stack([column, row], -1) + 0.5

        # it is there if its score exceeds a quarter of its visible area
        alpha = coverage(at, shape, size, radius)[:, None]
        seen = (alpha * free).sum((1, 2, 3))
        score = votes.flatten(1).gather(1, best[:, None])[:, 0] / energy[colour]
        there = (score > 0.25 * seen) & (seen > 0.05 * alpha.sum((1, 2, 3)))

        found.append((at, shape, colour, there))
        taken[torch.arange(count), colour] = True
        free = free * (1 - alpha * there[:, None, None, None])
    return [torch.stack(z, 1) for z in zip(*found)]


def descend(picture, at, shape, colour, there, wall):
    """Move each sprite to the best of its neighbour positions, by ever smaller steps.

    The first step tries every shape too. Returns new (at, shape) and the squared error (F,).
    """
    size = picture.shape[-1]
    radius = radius_of(size)
    moves = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))  # (9, 2)
    every = torch.arange(len(at))
    at, shape = at.clone(), shape.clone()

    for step in (0.5, 0.25, 0.125, 0.0625, 0.03125):
        turns = len(SHAPES) if step == 0.5 else 1
        for s in there.any(0).nonzero()[:, 0].tolist():
            # candidates (F, turns · 9, ...), which differ in sprite s alone
            tried_at = at[:, None, s] + step * moves.repeat(turns, 1)
            turn = torch.arange(turns).repeat_interleave(len(moves))
            tried_shape = (shape[:, None, s] + turn) % len(SHAPES)

            first, second = error_of_cover(picture, at, shape, colour, there, s, wall)
            cover = coverage(tried_at, tried_shape, size, radius)
            error = (cover * (first[:, None] + cover * second[:, None])).sum((2, 3))
            best = error.argmin(1)
            at[:, s] = tried_at[every, best]
            shape[:, s] = tried_shape[every, best]

    drawn = paint(at, shape, colour, size, wall, there.float())
    return at, shape, (drawn - picture).square().sum((1, 2, 3))


def error_of_cover(picture, at, shape, colour, there, s, wall):
    """How the squared error of a pixel depends on how much of it sprite s covers, alpha.

    Returns (first, second), each (F, size, size): the error is a constant + first · alpha
    + second · alpha^2, as the drawn colour is linear in alpha. Both are 0 where s is not there.
    """
    cover = coverage(at, shape, picture.shape[-1], radius_of(picture.shape[-1]))
    cover = cover * there[..., None, None]
    cover[:, s] = 0
    without = compose(cover, colour, wall)
    cover[:, s] = 1
    change = compose(cover, colour, wall) - without

    change = change * there[:, s, None, None, None]
    first = 2 * ((without - picture) * change).sum(1)
    return first, change.square().sum(1)


def visible_share(at, shape, there, size, wall):
    """Share of each sprite that neither the wall nor the sprites in front hide: (F, S).

    0 for those that are not there.
    """
    cover = coverage(at, shape, size, radius_of(size)) * there[..., None, None]
    left = (1 - cover).cumprod(1)  # behind sprite s
    free = torch.cat([torch.ones_like(left[:, :1]), left[:, :-1]], dim=1)
    if wall:
        free = free * ~wall_columns(size)
    return (cover * free).sum((2, 3)) / cover.sum((2, 3)).clamp(min=1e-6)


def judge(at, shape, colour, clear, named, wall, size):
    """Temporal and Text of one video, T pairs, from its fitted sprites.

    at (T, S, 2), shape, colour and clear (T, S); named {colour: shape}.
    """
    scores = []
    tracks = {}  # per colour its last two detections, (frame, position) each
    for t in range(len(at)):
        # sprites in this frame, {colour: s}; of two of one colour the front one
        there = {int(colour[t, s]): s for s in reversed(range(len(at[t]))) if clear[t, s] > SEEN}
        sharp = {c: s for c, s in there.items() if clear[t, s] > CLEAR}
        predicted = {c: forecast(track, t, size, wall) for c, track in tracks.items()}
        visible = at[t, list(there.values())]

        hidden = set()
        for c in named:
            if c in predicted and c not in there:
                if may_be_hidden(predicted[c], visible, size, wall):
                    hidden.add(c)
        missing = len(set(named) - hidden - set(there))

        temporal = judge_temporal(at[t], sharp, predicted, missing if t > 1 else 0, size)
        text = np.nan
        if there or missing:
            text = judge_text(shape[t], clear[t], there, named, hidden)
        scores.append((100 * temporal, 100 * text))

        for c, s in sharp.items():
            tracks[c] = (*tracks.get(c, ())[-1:], (t, at[t, s]))
    return scores


def judge_temporal(at, sharp, predicted, missing, size):
    """Mean straightness of the clear sprites {colour: s}, and 0 for each missing one; maybe nan."""
    straight = [
        straightness(at[s], *predicted[c], size) for c, s in sharp.items() if c in predicted
    ]
    straight += [0.0] * missing
    return torch.tensor(straight, dtype=torch.float64).nanmean().item()


def judge_text(shape, clear, there, named, hidden):
    """Share of the named sprites that are detected, and of those detected that are named."""
    right = 0.0
    for c, named_shape in named.items():
        if c in there:
            s = there[c]
            is_right = shape[s] == named_shape or clear[s] < SHAPE_CLEAR
            right += 1.0 if is_right else 0.5
    return right / max(1, len(named) - len(hidden), len(there))


def forecast(track, t, size, wall):
    """Predict position and velocity at frame t from two detections: (3, 2) each, per axis.

    Three cases: it went straight, or just bounced off the low or the high edge. inf where no valid
    sprite is that fast; nan without two detections in a row.
    """
    if len(track) < 2 or track[1][0] - track[0][0] != 1:
        return np.full((2, 3, 2), np.nan)
    (_, p0), (t1, p1) = track
    low = radius_of(size)
    high = size - low

    # a bounce mirrors the earlier position at the edge
    velocity = np.stack([p1 - p0, p1 + p0 - 2 * low, p1 + p0 - 2 * high])
    at = reflect(p1 + velocity * (t - t1), low, high)
    return np.where(np.abs(velocity) > 1.2 * SPEED[1] * size, np.inf, at), velocity


def straightness(at, predicted, velocity, size):
    """1 for a sprite at its predicted position and at a valid speed, 0 far off; nan without one."""
    off = np.abs(at - predicted)
    best = off.argmin(0)
    speed = np.linalg.norm(velocity[best, [0, 1]])

    wrong_place = np.linalg.norm(off.min(0)) / (0.06 * size)
    wrong_speed = max(0, SPEED[0] * size - speed, speed - SPEED[1] * size) / (0.02 * size)
    return np.exp(-(wrong_place**2) - wrong_speed**2)


def may_be_hidden(predicted, visible, size, wall):
    """Whether the wall or a visible sprite may hide one at its predicted position.

    predicted: a `forecast`, whose straight case counts; visible (n, 2). False where it is nan.
    """
    at = predicted[0][0]
    radius = radius_of(size)
    if wall and abs(at[0] - size / 2) < WALL_HALF * size + 0.3 * radius:
        return True
    return bool((np.linalg.norm(visible - at, axis=-1) < 0.7 * radius).any())


# ---- machinery: reading and writing files, listing folders, Wan's VAE and text, encode ----

READ_ERRORS = (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)
MAX_SIDE = 8192  # pixels


def read_video(path, size, fps=0.0, stride=1, frames=None):
    """Read the first `frames` frames of a file, or all: (T, 3, height, width) in [-1, 1].

    The other arguments are those of `read_frames`. Raises ValueError if nothing can be read.
    """
    return to_float(np.stack(list(islice(read_frames(path, size, fps, stride), frames))))


def read_frames(path, size, fps=0.0, stride=1, start=0, header=None):
    """Decode a file lazily: frames (height, width, 3) uint8, scaled to cover `size` and cropped.

    size: (height, width), or one number for a square. fps: resample to this rate, 0 keeps the
    file's own. stride: keep every stride-th frame. start: number of output frames to skip;
    by seeking if the file's `header` is given.
    Raises ValueError if nothing can be read. What comes before a damaged part is returned.
    """
    wanted = start * stride
    shown = None
    error = ValueError(f"it has no frame {wanted}" if wanted else "it has no frames")
    try:
        with open_video(path) as container:
            for number, frame in numbered_frames(container, fps, wanted, header):
                # the frame before is shown until the time of this one
                while shown is not None and wanted < number:
                    error = None
                    yield resize(shown, size)
                    wanted += stride
                shown = frame
    except (av.FFmpegError, ValueError) as failure:
        if error is not None:  # nothing was read so far
            error = failure
    if error is not None:
        raise unreadable(path, error)


def open_video(path):
    """Open a file to decode its first video stream. Raises ValueError if it has none to decode."""
    container = av.open(str(path), metadata_errors="replace")
    try:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        if container.format.name.endswith("_pipe") or container.format.name == "image2":
            raise ValueError("it is a still picture, not a video")
        stream = container.streams.video[0]
        if not stream.guessed_rate:
            raise ValueError("it has no frame rate")

        # a loader has a process per core already; and threads would not survive its fork
        stream.codec_context.thread_count = 1
    except ValueError:
        container.close()
        raise
    return container


def numbered_frames(container, fps, wanted, header):
    """Decode (number, frame) pairs; with a header, from the keyframe before number `wanted` on.

    Numbers count from the first frame of the file: at `fps` frames per second, or its own frames if
    fps is 0. The last pair is (the number at which the last frame ends, None).
    """
    stream = container.streams.video[0]
    first = None
    packets = container.demux(stream)
    seek = wanted > 0 and header is not None and header.seekable
    if seek:
        if needs_first_packet(stream.codec_context):
            next(packets).decode()
        first = header.first
        packets = packets_before(container, header.latest_pts(wanted, fps))

    duration = 1 / (stream.guessed_rate * stream.time_base)  # of a frame, in units of pts
    rate = frames_per_pts(fps, stream.time_base)
    frames = (frame for packet in packets for frame in packet.decode())
    end = 0
    for count, frame in enumerate(frames):
        pts = frame.pts if has_times(container, frame) else count * duration
        first = pts if first is None else first
        if fps:
            # rounded one by one, as ffmpeg's filter "fps" does
            origin = number_at(first, rate)
            number = number_at(pts, rate) - origin
            end = number_at(pts + (frame.duration or duration), rate) - origin
        else:
            number = header.number(pts) if seek else count
            end = number + 1
        yield number, frame
    yield end, None


def needs_first_packet(decoder):
    """Whether frames after a seek are right only if the decoder has read the file's first packet.

    It alone says which x264 wrote a file. ffmpeg decodes H.264 of full chroma in another way if the
    build was below 151, and wrongly, in grey and green, if it does not know.
    """
    return decoder.name == "h264" and (decoder.pix_fmt or "").startswith(
        ("yuv444", "yuvj444", "gbr")
    )


def has_times(container, frame):
    """Whether the pts of a frame can be trusted: raw streams have none, AVI that of decoding."""
    return frame.pts is not None and container.format.name != "avi"


def packets_before(container, pts):
    """Demux from the last keyframe on that is shown at `pts` or before.

    Raises ValueError if there is none.
    """
    stream = container.streams.video[0]
    at = pts
    while True:
        container.seek(at, stream=stream)
        packets = container.demux(stream)
        packet = next(packets)
        if packet.is_keyframe and packet.pts is not None and packet.pts <= pts:
            return chain([packet], packets)
        if packet.dts is None or packet.dts > at:
            raise ValueError("it has no keyframe where it should begin")

        # too late: files are sorted by the time of decoding, and some formats seek to any frame
        at = packet.dts - 1


def number_at(pts, rate):
    """Number of the frame nearest to `pts`, at `rate` frames per unit of pts; half rounds up."""
    return (2 * pts * rate.numerator + rate.denominator) // (2 * rate.denominator)


def frames_per_pts(fps, time_base):
    """Frames per second to frames per unit of pts, as a Fraction."""
    return Fraction(fps).limit_denominator(10_000) * time_base


@dataclass
class Header:
    """Properties of a video file, enough to find its frames without decoding the others."""

    frames: int
    seconds: Fraction
    rate: Fraction  # frames per second
    time_base: Fraction  # seconds per unit of pts, the time at which a frame is shown
    first: int | None  # pts of the first frame; None if frames have no reliable pts
    times: np.ndarray | None  # sorted pts of all frames; None: frame n is shown at n / rate
    seekable: bool  # whether frames can be found by their pts

    @cached_property
    def per_pts(self):
        """Frames per unit of pts."""
        return self.rate * self.time_base

    def length(self, fps, stride):
        """Number of frames that `read_frames` returns."""
        frames = self.frames
        if fps:
            rate = frames_per_pts(fps, self.time_base)
            first = self.first or 0
            end = first + self.seconds / self.time_base
            frames = number_at(end, rate) - number_at(first, rate)
        return -(-frames // stride)

    def number(self, pts):
        """Number of the frame that is shown at `pts`, in the file's own frames."""
        if self.times is not None:
            return int(np.searchsorted(self.times, pts))
        return number_at(pts - self.first, self.per_pts)

    def latest_pts(self, number, fps):
        """The latest pts that has this number, as `numbered_frames` counts."""
        if self.times is not None and not fps:
            return int(self.times[number])
        end = number + Fraction(1, 2)
        if not fps:
            return self.first + math.ceil(end / self.per_pts) - 1
        rate = frames_per_pts(fps, self.time_base)
        return math.ceil((number_at(self.first, rate) + end) / rate) - 1


def read_header(path):
    """Read a file's `Header` and decode its first frame. Raises ValueError or av.FFmpegError.

    Where the header gives no number of frames or no constant rate, all packets are read too, but
    not decoded.
    """
    with open_video(path) as container:
        stream = container.streams.video[0]
        rate, unit = stream.guessed_rate, stream.time_base
        first = None
        times = []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                times.append((packet.pts, packet.duration or 0))
            if first is None:
                first = next(iter(packet.decode()), None)
            if first is not None and has_constant_rate(stream):
                seconds = stream.duration * unit
                seekable = has_times(container, first) and first.pts == stream.start_time
                start = first.pts if seekable else None
                return Header(stream.frames, seconds, rate, unit, start, None, seekable)
        if first is None:
            raise ValueError("it has no frames")
        if not has_times(container, first) or any(pts is None for pts, _ in times):
            return Header(len(times), len(times) / rate, rate, unit, None, None, False)

    times.sort()
    seconds = (sum(times[-1]) - times[0][0]) * unit
    pts = np.array([pts for pts, _ in times])
    return Header(len(times), seconds, rate, unit, first.pts, pts, bool(first.pts == pts[0]))


def has_constant_rate(stream):
    """Whether the header gives the number of frames, and they are evenly spaced."""
    if not (stream.frames and stream.duration and stream.average_rate == stream.base_rate):
        return False
    return stream.frames == number_at(stream.duration, stream.average_rate * stream.time_base)


def read_headers(files, workers=None):
    """Read headers and captions in threads: {path: (Header, caption)} of the readable files.

    The others are named in a warning.
    """

    def look(path):
        try:
            header = read_header(path)
        except (av.FFmpegError, ValueError, OSError) as error:
            return unreadable(path, error)
        try:
            return header, read_caption(path)
        except (ValueError, OSError) as error:
            return error

    found = {}
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        results = tqdm(
            pool.map(look, files), "reading headers", len(files), leave=False, disable=None
        )
        for path, result in zip(files, results):
            if isinstance(result, Exception):
                warn(skipped(path, result))
            else:
                found[path] = result
    return found


def unreadable(path, error):
    """A ValueError that says why a file cannot be read as a video."""
    reason = getattr(error, "strerror", None) or one_line(error)
    return ValueError(
        f"{path} cannot be read as a video ({reason}); what ffmpeg reads would work: "
        "mp4, gif, avi, webm"
    )


def resize(frame, size):
    """Scale a decoded frame to cover `size`, crop it, convert to RGB: (height, width, 3) uint8."""
    colours = frame.format.name, frame.colorspace, frame.color_range
    graph = resize_graph(frame.width, frame.height, colours, *sides(size), threading.get_ident())
    graph.push(frame)
    return graph.pull().to_ndarray()


@lru_cache(maxsize=16)  # to build one takes longer than to resize a small clip
def resize_graph(frame_width, frame_height, colours, height, width, thread):
    """Build the filter of `resize` for frames of this kind, used by this thread alone."""
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame_width, height=frame_height, format=colours[0], time_base=Fraction(1)
    )
    scale = graph.add(
        "scale", f"{width}:{height}:force_original_aspect_ratio=increase:flags=bilinear"
    )
    rgb = graph.add("format", "rgb24")  # makes scale convert, too, in one pass
    crop = graph.add("crop", f"{width}:{height}")
    sink = graph.add("buffersink")
    graph.link_nodes(source, scale, rgb, crop, sink)
    graph.configure()
    return graph


def sides(size):
    """(height, width) of a size, which is that already or one number for a square."""
    return size if isinstance(size, tuple) else (size, size)


def to_float(clip):
    """(T, height, width, 3) uint8 -> (T, 3, height, width) in [-1, 1]."""
    clip = rearrange(torch.from_numpy(clip), "t h w c -> t c h w").contiguous()
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
def replacing(path):
    """Yield a hidden file to write, which is renamed to `path` when complete.

    Its name holds the process id, so that two processes do not share it. Raises ValueError for an
    OSError, for instance on a full disk; then the hidden file is removed.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or one_line(error)}") from None


def write_picture(path, picture):
    """Write a picture (height, width, 3) uint8 as .png or .jpg.

    Raises ValueError if the file cannot be written.
    """
    encoded = encode_picture(picture, Path(path).suffix)
    with replacing(path) as part:
        part.write_bytes(encoded)


def encode_picture(picture, ending, **options):
    """Encode a picture, or several as a .gif, in memory: a full disk breaks imageio's writer."""
    buffer = io.BytesIO()
    iio.imwrite(buffer, picture, extension=ending.lower(), plugin="pillow", **options)
    return buffer.getvalue()


@contextmanager
def writer(path, fps=8.0):
    """Write a video: `with writer("out.mp4", 8) as write: write(frames)`.

    `write` appends frames (T, 3, height, width) in [-1, 1], enlarged if they are small, or pictures
    (T, height, width, 3) uint8. An .mp4 grows frame by frame; a .gif is encoded at the end, since
    its frames share their colours. The file is renamed into place when complete. Raises ValueError
    for other endings and if the file cannot be written.
    """
    ending = Path(path).suffix.lower()
    if ending not in (".mp4", ".gif"):
        raise ValueError(f"{path}: videos are written as .mp4 or .gif")

    with replacing(path) as part:
        if ending == ".gif":
            pictures = []

            def write(video):
                pictures.extend(as_pictures(video))

            yield write
            duration = 1000 / fps  # of a frame, in ms
            part.write_bytes(encode_picture(np.stack(pictures), ending, duration=duration, loop=0))
        else:
            with av.open(str(part), "w", format="mp4") as container:
                encoder = Encoder(container, fps)

                def write(video):
                    encoder.write(as_pictures(video))

                yield write
                encoder.finish()


def as_pictures(video):
    """Frames (T, 3, height, width) in [-1, 1] as enlarged pictures; pictures as they are."""
    return enlarge(to_bytes(video)) if torch.is_tensor(video) else video


class Encoder:
    """Append pictures (height, width, 3) uint8 to an open .mp4 file."""

    def __init__(self, container, fps):
        self.container = container
        self.stream = container.add_stream("libx264", Fraction(fps).limit_denominator(65535))
        self.stream.codec_context.thread_count = 1  # threads would not survive a loader's fork
        self.rgb_to_yuv = VideoReformatter()
        self.count = 0

    def write(self, pictures):
        for picture in pictures:
            height, width = (side // 2 * 2 for side in picture.shape[:2])  # even, for yuv420p
            picture = np.ascontiguousarray(picture[:height, :width])
            if self.count == 0:
                self.stream.height, self.stream.width = height, width
                self.stream.pix_fmt = "yuv420p"

            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame = self.rgb_to_yuv.reformat(frame, format="yuv420p", threads=1)
            frame.time_base = 1 / self.stream.codec_context.framerate
            frame.pts = self.count
            self.container.mux(self.stream.encode(frame))
            self.count += 1

    def finish(self):
        if self.count:
            self.container.mux(self.stream.encode(None))


def holds_latents(folder):
    """Whether to read a folder as latents; if it holds videos too, warn which are read.

    True if a .npz file holds `latents`, or if it has .npz files and no videos.
    """
    videos = find_files(folder, "videos")
    arrays = find_files(folder, "latents")
    if not arrays:
        return False
    if not videos:
        return True

    latents = any(map(has_latents, arrays))
    if latents:
        reason = f"the latents, as .npz files hold some; the {len(videos)} other files are ignored"
    else:
        reason = f"the videos, as none of the {len(arrays)} .npz files holds latents"
    warn(f"{folder} holds videos and .npz files: reading {reason}")
    return latents


def has_latents(path):
    """Whether a .npz file can be opened and holds `latents`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "latents.npy" in archive.namelist()
    except READ_ERRORS:
        return False


def latent_shapes(path):
    """Shapes of `latents` and of `text`, (1, 1) without one, from the headers in a .npz file.

    Raises ValueError if it cannot be read or holds something else.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for key in archive.namelist():
                name = key.removesuffix(".npy")
                with archive.open(key) as file:
                    np.lib.format.read_magic(file)
                    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                    end = file.tell() + math.prod(shape) * dtype.itemsize
                if name in ("latents", "text") and end != archive.getinfo(key).file_size:
                    raise ValueError(f"`{name}` is not as long as its header gives")
                found[name] = shape
    except READ_ERRORS as error:
        raise ValueError(f"{path} is not a readable .npz file ({one_line(error)})") from None

    latents = found.get("latents", ())
    text = found.get("text", (1, 1))
    if len(latents) != 4 or len(text) != 2:
        raise ValueError(
            f"{path} holds {found}; wanted `latents` (T, C, height, width) and optionally "
            "`text` (L, text_dim)"
        )
    return latents, text


def list_files(folder, kind):
    """Sorted paths of a folder's "videos" or "latents" (.npz), subfolders and links included.

    Hidden files and folders are left out. A file or folder that links reach again is listed once.
    Raises ValueError if there are none, or if it is no folder.
    """
    files = find_files(folder, kind)
    if not files:
        raise ValueError(f"{folder} holds no {kind}")
    return files


def find_files(folder, kind):
    """Like `list_files`, but returns [] if there are none."""
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is not a folder; wanted one of videos or of latents (.npz), "
            'or for train.py "sprites"'
        )
    found = []
    visited = set()  # real paths
    for root, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(root))
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(root, name))
            if name[0] != "." and real not in visited:
                visited.add(real)
                kept.append(name)
        folders[:] = kept  # where os.walk goes next

        for name in sorted(names):
            real = os.path.realpath(os.path.join(root, name))
            if name[0] == "." or real in visited or not is_kind(name, kind):
                continue
            # a pipe would block; a dangling link is kept, to be named when it is read
            if os.path.isfile(real) or not os.path.exists(real):
                visited.add(real)
                found.append(Path(root, name))
    return sorted(found)


def is_kind(name, kind):
    ending = Path(name).suffix.lower()
    if kind == "latents":
        return ending == ".npz"
    return ending not in {".txt", ".npz", ".json", ".md"}


def read_caption(path):
    """The text of name.txt beside name.mp4, "" without one. Raises ValueError if not UTF-8."""
    path = path.with_suffix(".txt")
    try:
        return path.read_text("utf-8").strip() if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error})") from None


def round_up(n, unit):
    """The smallest multiple of `unit` that is at least n."""
    return -(-n // unit) * unit


def one_line(error):
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def skipped(path, error):
    """Format why a file is skipped, with its path once."""
    reason = one_line(error)
    return f"skipped: {reason if str(path) in reason else f'{path} ({reason})'}"


def warn(message):
    """Print a warning on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}")


def parse_size(text):
    """An argparse type: 64 -> 64, for squares; 480x832 -> (480, 832), height and width."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    pixels = [int(side) for side in found.groups() if side] if found else [0]
    if min(pixels) == 0:
        raise argparse.ArgumentTypeError(
            f"got {text}, wanted pixels: one number for squares, or HEIGHTxWIDTH such as 480x832"
        )
    if max(pixels) > MAX_SIDE:
        raise argparse.ArgumentTypeError(f"got {text}, wanted at most {MAX_SIDE} pixels a side")
    return pixels[0] if len(pixels) == 1 else tuple(pixels)


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
            import diffusers
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

        types = {"text_encoder": torch.bfloat16, "default": torch.float32}
        version = [int(part) for part in diffusers.__version__.split(".")[:2]]
        key = "dtype" if version >= [0, 42] else "torch_dtype"
        pipe = WanPipeline.from_pretrained(path, transformer=None, **{key: types})
        self.pipe = pipe.to(device)
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
        def decode(latents):
            latents = latents.to(self.device).transpose(1, 2) * self.std + self.mean
            z = vae.post_quant_conv(latents)

            frames = []
            for latent in z.split(1, dim=2):
                is_first = cache[0] is None
                frames.append(vae.decoder(latent, cache, [0], first_chunk=is_first))
            return torch.cat(frames, dim=2).clamp(-1, 1).transpose(1, 2).cpu()

        return decode


def encode_video(wan, path, out, size, frames, fps):
    """Encode each clip of `frames` frames to out-NUMBER.npz: latents, and its caption's text.

    Finished files are kept, damaged ones are encoded anew. Raises ValueError if the video is too
    short, or if a finished file is of another size.
    """
    caption = read_caption(path)
    reader = read_frames(path, size, fps)
    number = 0
    while True:
        clip = list(islice(reader, frames))
        if len(clip) < frames:
            break
        target = out.with_name(f"{out.name}-{number:04d}.npz")
        if not is_finished(target, size, frames):
            latents = wan.encode(to_float(np.stack(clip))[None])
            text = wan.text([caption])
            save_arrays(target, latents=latents[0].half().cpu(), text=text[0].half().cpu())
        number += 1
    if number == 0:
        raise ValueError(f"{path} has {len(clip)} frames; wanted at least --frames {frames}")


def is_finished(path, size, frames):
    """Whether a file holds latents that can be read.

    Raises ValueError if they are of other frames or of another size.
    """
    if not path.exists():
        return False
    try:
        (T, _, height, width), _ = latent_shapes(path)
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
    except READ_ERRORS:
        return False
    if (4 * T - 3, (8 * height, 8 * width)) != (frames, sides(size)):
        raise ValueError(
            f"{path} is there already, of another --frames or --size; "
            "wanted another folder for these"
        )
    return True


def save_arrays(path, **arrays):
    """Write a .npz file that is renamed into place when complete.

    Raises ValueError if it cannot be written.
    """
    with replacing(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)


def encode_folder(args):
    """Encode a folder of videos with `encode_video`. Returns the exit status.

    Run it again to continue after an interruption. Under torchrun the files are divided among the
    processes.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    files = list_files(args.videos, "videos")[rank::world_size]
    check_out(args.out)
    wan = Wan(args.wan, f"cuda:{local_rank}" if args.device == "cuda" else args.device)

    bad = 0
    for path in tqdm(files, "videos"):
        out = args.out / path.relative_to(args.videos)
        try:
            encode_video(wan, path, out, args.size, args.frames, args.fps)
        except ValueError as error:
            bad += 1
            print(f"warning: {skipped(path, error)}")
    if bad == 0 or bad < len(files):
        return 0
    print(f"data.py: none of {bad} videos of {args.videos} could be encoded", file=sys.stderr)
    return 2 if world_size == 1 else 0  # torchrun would end the other processes


def check_out(folder):
    """Create the folder of the latents. Raises ValueError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to {folder}: permission denied")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError, which `main` prints on one line."""

    def error(self, message):
        raise ValueError(message)


def parse(argv):
    parser = OneLineParser(
        description="Turn a folder of videos into latents for train.py --data, "
        "with Wan 2.1's VAE and text encoder."
    )
    add = parser.add_argument
    add("command", choices=["encode"])
    add("videos", type=Path, help="a folder of videos; name.txt beside name.mp4 is its caption")
    add("out", type=Path, help="a folder for the .npz files")
    add("--wan", type=Path, required=True, help="a diffusers folder of Wan 2.1")
    add(
        "--size",
        type=parse_size,
        default=(480, 832),
        help="height and width in pixels, multiples of 16 (default 480x832)",
    )
    add(
        "--frames",
        type=int,
        default=81,
        help="frames of a clip, 4 n - 3 for n latents (default 81)",
    )
    add("--fps", type=float, default=16.0, help="read videos at this rate (default 16)")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cuda"]
    add(
        "--device",
        choices=devices,
        default=devices[-1],
        help="where to run (default: cuda where there is one)",
    )
    return check(parser.parse_args(argv))


def check(args):
    """Raise ValueError if the flags cannot work."""
    height, width = sides(args.size)
    if height % 16 or width % 16:
        raise ValueError(
            f"--size {height}x{width}: Wan's height and width are multiples of 16; "
            f"{round_up(height, 16)}x{round_up(width, 16)} would work"
        )
    if args.frames < 1 or args.frames % 4 != 1:
        raise ValueError(
            f"--frames {args.frames}: 4 n - 3 frames make n latents; "
            f"{max(1, args.frames // 4 * 4 + 1)} would work"
        )
    if not 0 < args.fps <= 1000:
        raise ValueError(f"--fps {args.fps}: wanted a rate above 0 and at most 1000")
    return args


def main(argv):
    """Run a command. Returns the exit status; a wrong input is one line on stderr.

    Under torchrun only the first process prints that line, and the status after a wrong input or
    Ctrl-C is 0: torchrun answers any other with a traceback.
    """
    try:
        return encode_folder(parse(argv))
    except (ValueError, OSError) as error:
        message = one_line(error)
        status = 2
    except KeyboardInterrupt:
        message = "interrupted"
        status = 130
    if os.environ.get("RANK", "0") == "0":
        print(f"data.py: {message}", file=sys.stderr)
    return 0 if "RANK" in os.environ else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
