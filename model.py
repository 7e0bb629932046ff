"""The network: Wan 2.1's DiT at any size, made causal by a mask, with one noise level per frame.

One forward serves training, resampling and sampling: `v = model(x, t, c, history, cache, first)`.
Noisy frames and history frames pass through it side by side, the history at t = 0; routing.py's
table decides who attends to whom. Submodules carry the original Wan names, so that its weights
load as they are.

B videos, N noisy frames and M history frames of this pass, F = M + N, R query frames, S key frames,
P tokens in a frame (chunk · rows · columns of patches), C channels, D width, H heads, E width of a
head, L words.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from routing import attend, describe, sparse_causal_mask


@dataclass
class Config:
    """The sizes of the network. Raises ValueError for sizes that do not fit together."""

    channels: int = 3  # of a pixel or a latent frame
    dim: int = 96
    ffn_dim: int = 384
    heads: int = 4
    layers: int = 3
    patch: int = 4  # pixels along a side of a token
    chunk: int = 1  # latent frames in a frame, the autoregressive unit
    text_dim: int = 20
    freq_dim: int = 256  # of the sinusoids of t
    top_k: int | None = None  # history frames that a token picks, Eq. (9); None: all
    window: int | None = None  # history frames that a frame sees, in training too; None: all
    predict: str = "v"  # what the head returns: the velocity v, or "x", the clean frame
    detail: int = 0  # channels of the convolutions behind the head; 0: there are none
    detail_frames: int = 0  # frames right before a noisy one that the convolutions see, too
    detail_strips: bool = False  # whether they also see the maxima of whole rows and columns
    eps: float = 1e-6

    def __post_init__(self):
        if self.predict not in ("v", "x"):
            raise ValueError(f'predict is {self.predict!r}; wanted "v" or "x"')
        unused = {"top_k": None, "window": None}
        unused |= {"detail": 0, "detail_frames": 0, "detail_strips": False}
        for name, value in vars(self).items():
            if name == "predict" or (name in unused and value == unused[name]):
                continue
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} is {value}; wanted a number above 0")
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"dim {self.dim} cannot be split into {self.heads} heads of an even width; "
                f"a dim of {-(-self.dim // (2 * self.heads)) * 2 * self.heads} would work"
            )

        if self.detail_frames and not self.detail:
            raise ValueError(
                f"detail_frames {self.detail_frames} needs convolutions; a detail of 32 would work"
            )
        if self.detail_strips and not self.detail:
            raise ValueError("detail_strips needs convolutions; a detail of 32 would work")
        if self.window and self.detail_frames > self.window:
            raise ValueError(
                f"detail_frames {self.detail_frames}: wanted at most the window, {self.window}"
            )

    @property
    def detail_scale(self):
        """Pixels along a side of what `DetailHead` convolves: 2, or 1 if the patch is odd."""
        return 2 - self.patch % 2

    @property
    def detail_values(self):
        """Values of a frame in each place that `DetailHead` convolves."""
        return self.chunk * self.channels * self.detail_scale**2

    @property
    def detail_inputs(self):
        """Values that it reads there: of x_t, the tokens' estimate and the frames before."""
        return (2 + self.detail_frames) * self.detail_values


PRESETS = {
    "toy": Config(patch=8, predict="x"),
    "small": Config(dim=384, ffn_dim=1536, heads=6, layers=8, patch=8, predict="x"),
    "wan-1.3b": Config(
        channels=16, dim=1536, ffn_dim=8960, heads=12, layers=30, patch=2, chunk=3, text_dim=4096
    ),
    "wan-14b": Config(
        channels=16, dim=5120, ffn_dim=13824, heads=40, layers=40, patch=2, chunk=3, text_dim=4096
    ),
}

LEAST_T = 0.05  # x-prediction divides by t, or by this if t is smaller
MAX_FINISHED = 4.0  # the convolutions see values of finished frames up to this; pixels are up to 1


def rope(width, frames, rows, columns):
    """Angles of 3-D RoPE for positions (n,), (h,), (w,): complex128 (n · h · w, width / 2).

    The channel pairs of a head are split among time, row and column, the remainder to time; each
    axis has its own full range of frequencies.
    """
    position = torch.cartesian_prod(frames.double(), rows.double(), columns.double())
    spatial = 2 * (width // 6)
    angles = []
    for axis, part in enumerate((width - 2 * spatial, spatial, spatial)):
        frequency = 1e4 ** -(torch.arange(0, part, 2, dtype=torch.float64) / part)
        angles.append(torch.outer(position[:, axis], frequency))
    angles = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(z, angles):
    """Rotate pairs of neighbouring channels: z (..., E) real, angles (..., E / 2) complex."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles.to(pairs.dtype)).flatten(-2).to(z.dtype)


def sinusoid(t, dim):
    """t (...) -> (..., dim): cosines first, periods from 2 pi to nearly 20000 pi, in float64."""
    if t.device.type == "mps":  # has no float64
        return sinusoid(t.cpu(), dim).float().to(t.device)
    frequency = 1e4 ** (-torch.arange(dim // 2, device=t.device, dtype=torch.float64) / (dim // 2))
    angle = t[..., None].double() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def modulate(x, shift, scale):
    """adaLN: x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def split_heads(z, heads):
    """(B, ..., D) -> (B, H, ..., E); einops takes as long as the attention of a small model."""
    return z.unflatten(-1, (heads, -1)).movedim(-2, 1)


def join_heads(z):
    """(B, H, ..., E) -> (B, ..., D)."""
    return z.movedim(1, -2).flatten(-2)


# torch.compile would compile these two anew for every number of frames.


@torch.compiler.disable
def attend_with_cache(attention, q, k, v, past, own, cache):
    """Append this pass's keys and values to the cache, if there is one, and attend to all."""
    if cache is None:
        return attend(q, k, v, past, own, attention.top_k)
    k, v, descriptor = cache.put(attention.layer, k, v)
    return attend(q, k, v, past, own, attention.top_k, descriptor)


@torch.compiler.disable
def text_with_cache(attention, text, cache):
    """The text's keys and values in a layer; a cache keeps them while c is the same tensor."""
    if cache is None:
        return attention.project_text(text)
    if attention.layer not in cache.text:
        cache.text[attention.layer] = attention.project_text(text)
    return cache.text[attention.layer]


class Attention(nn.Module):
    """Projections, and RMS norms of q and k over the full width."""

    def __init__(self, config, layer):
        super().__init__()
        self.heads, self.top_k, self.layer = config.heads, config.top_k, layer
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)


class SelfAttention(Attention):
    """Attention of each frame to itself and its history, Eq. (8)."""

    def project(self, x, angles, rows):
        """x (B, F, P, D) -> rotated q (B, H, R, P, E) of the last `rows` frames, k and v of all."""
        queries = x[:, x.shape[1] - rows :]
        q = split_heads(self.norm_q(self.q(queries).to(x.dtype)), self.heads)
        k = split_heads(self.norm_k(self.k(x).to(x.dtype)), self.heads)
        v = split_heads(self.v(x), self.heads)

        q = rotate(q, angles[len(angles) - rows :]).to(v.dtype)
        k = rotate(k, angles).to(v.dtype)
        return q, k, v

    def forward(self, x, angles, past, own, cache):
        """x (B, F, P, D), past and own (R, S) -> (B, R, P, D), for the last R frames."""
        q, k, v = self.project(x, angles, len(past))
        out = attend_with_cache(self, q, k, v, past, own, cache)
        return self.o(join_heads(out))


class CrossAttention(Attention):
    """Attention of each token to the text."""

    def project_text(self, text):
        """text (B, L, D) -> k, v (B, H, L, E)."""
        k = self.norm_k(self.k(text).to(self.norm_k.weight.dtype))
        v = self.v(text)
        return split_heads(k, self.heads).to(v.dtype), split_heads(v, self.heads)

    def forward(self, x, text, cache):
        """x (B, R, P, D), text (B, L, D) -> (B, R, P, D). Padding is attended to, as in Wan."""
        k, v = text_with_cache(self, text, cache)
        q = split_heads(self.norm_q(self.q(x).to(x.dtype)), self.heads).to(v.dtype)
        out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v)  # (B, H, R · P, E)
        return self.o(join_heads(out)).unflatten(1, x.shape[1:3])


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, with adaLN modulation per frame."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = SelfAttention(config, layer)
        self.cross_attn = CrossAttention(config, layer)
        self.norm1 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU("tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(self, x, e6, angles, past, own, text, cache):
        """x (B, F, P, D), e6 (B, F, 6, D) -> (B, R, P, D): the last R frames, the rows of `past`.

        The other frames only provide keys and values.
        """
        e6 = (self.modulation + e6).unsqueeze(-2)  # (B, F, 6, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = e6.unbind(2)
        h = modulate(self.norm1(x), shift1, scale1)

        first_row = x.shape[1] - len(past)
        x, gate1 = x[:, first_row:], gate1[:, first_row:]
        shift2, scale2, gate2 = shift2[:, first_row:], scale2[:, first_row:], gate2[:, first_row:]

        h = self.self_attn(h, angles, past, own, cache).to(x.dtype)
        x = torch.addcmul(x, gate1, h)
        x = x + self.cross_attn(self.norm3(x), text, cache)
        h = self.ffn(modulate(self.norm2(x), shift2, scale2)).to(x.dtype)
        return torch.addcmul(x, gate2, h)


class Head(nn.Module):
    """Modulated norm and projection of tokens to patches."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.channels * config.patch**2)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x, e):
        """x (B, N, P, D), e (B, N, D) -> (B, N, P, patch · patch · C)."""
        shift, scale = (self.modulation + e[:, :, None]).unsqueeze(-2).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


class DetailHead(nn.Module):
    """Four 3 x 3 convolutions that refine the tokens' estimate of each noisy frame.

    A token draws its patch alone, from D numbers. The convolutions see the estimate and x_t across
    the borders of patches, as in DiP (arXiv 2511.18822). With `detail_frames` they also see the
    pixels of that many frames right before it, and learn how a thing of a few pixels moves. They
    run at half the resolution, or at the whole one where the patch is odd.

    With `detail_frames`, begin with noise on the history (`--history noise --warmup 0`). On a clean
    history the convolutions learn to copy, errors too, and rollouts fall apart.

    Values of those frames beyond MAX_FINISHED are cut off. What convolutions return grows with what
    they are given, so that without a limit a bad frame would make the next one worse, and so on.

    With `detail_strips`, each place also gets the maximum over its row and the maximum over its
    column of what the first convolution returns, each through a linear layer. Convolutions see no
    farther than nine pixels, and a paddle must know the row of a ball at the other side of the
    field. It is strip pooling (arXiv 2003.13328), with the maximum in place of the mean, in which a
    ball would vanish.
    """

    def __init__(self, config):
        super().__init__()
        self.scale = config.detail_scale
        width = config.detail
        self.modulation = nn.Linear(config.dim, 2 * width)
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(config.detail_inputs, width, 3, padding=1),
                nn.Conv2d(width, width, 3, padding=1),
                nn.Conv2d(width, width, 3, padding=1),
                nn.Conv2d(width, config.detail_values, 3, padding=1),
            ]
        )
        self.row, self.column = None, None
        if config.detail_strips:
            self.row = nn.Conv2d(width, width, 1)
            self.column = nn.Conv2d(width, width, 1)

    def forward(self, x_t, out, before, e):
        """Refine what the tokens return for the noisy frames x_t: v, or the clean frames.

        x_t, out (B, N, C, height, width), e (B, N, D), and before (B, N, detail_frames · C,
        height, width) from `frames_before`. Returns the refined out.
        """
        shift, scale = self.modulation(e).flatten(0, 1)[..., None, None].chunk(2, dim=1)
        first, *inner, last = self.layers

        before = before.clamp(-MAX_FINISHED, MAX_FINISHED)
        z = torch.cat([x_t, out, before], dim=2).flatten(0, 1).to(first.weight.dtype)
        z = F.pixel_unshuffle(z, self.scale)  # (B · N, channels, rows, columns)
        z = first(z.to(memory_format=torch.channels_last))  # convolutions are faster in this order
        z = F.gelu(modulate(z, shift.to(z.dtype), scale.to(z.dtype)))
        if self.row:
            z = z + self.row(z.amax(3, keepdim=True)) + self.column(z.amax(2, keepdim=True))
        for layer in inner:
            z = F.gelu(layer(z))
        with torch.autocast(z.device.type, enabled=False):  # the pixels are float32, as the head's
            z = last(z.to(last.weight.dtype))
        return out + F.pixel_shuffle(z, self.scale).unflatten(0, out.shape[:2])


def frames_before(finished, first, N, count):
    """The `count` frames before each of N noisy ones, the last one first; 0 where there is none.

    finished (B, S, C, height, width), numbered from 0; the noisy frames are first, first + 1, ...
    Returns (B, N, count · C, height, width).
    """
    B, S, *shape = finished.shape
    none = finished.new_zeros(B, *shape)
    stacks = []
    for number in range(first, first + N):
        before = range(number - 1, number - 1 - count, -1)
        frames = [finished[:, i] if 0 <= i < S else none for i in before]
        stacks.append(torch.cat([none[:, :0], *frames], dim=1))  # the first, for a count of 0
    return torch.stack(stacks, dim=1)


def patchify(x, config):
    """Frames (B, F, chunk · C, height, width) -> tokens (B, F, P, C · patch · patch)."""
    sizes = {"t": config.chunk, "p": config.patch, "q": config.patch}
    return rearrange(x, "b f (t c) (h p) (w q) -> b f (t h w) (c p q)", **sizes)


def unpatchify(x, config, rows):
    """Tokens (B, N, P, patch · patch · C) -> frames (B, N, chunk · C, height, width).

    Wan's head orders the values of a token differently from its patch embedding.
    """
    sizes = {"t": config.chunk, "h": rows, "p": config.patch, "q": config.patch}
    return rearrange(x, "b n (t h w) (p q c) -> b n (t c) (h p) (w q)", **sizes)


def velocity(x_t, t, clean):
    """v = (x_t - x) / t, from a noisy frame and the network's estimate x of the clean one.

    x_t, clean (B, N, C, height, width), t (B, N). It follows from Eq. (3), x_t = (1 - t) x + t eps,
    and v = eps - x. t is raised to LEAST_T: otherwise an error of x at small t would dominate the
    loss of v (arXiv 2511.13720).
    """
    return (x_t - clean) / t.clamp(min=LEAST_T)[..., None, None, None]


class CausalDiT(nn.Module):
    """Wan 2.1's text-to-video DiT with a noise level per frame.

    The last layer returns v, or with `predict="x"` the clean frame, from which v follows. A new
    network's last layer returns 0.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False  # run each block again in backward, to save memory
        dim = config.dim
        self.patch_embedding = nn.Linear(config.channels * config.patch**2, dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.head = Head(config)
        if config.detail:
            self.detail = DetailHead(config)
        self.initialize()

    def initialize(self):
        """Initialize as Wan does; the last layer of a new network returns 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
        if self.config.detail:
            nn.init.zeros_(self.detail.layers[-1].weight)
            nn.init.zeros_(self.detail.layers[-1].bias)

    def forward(self, x, t, c, history=None, cache=None, first=0, history_t=None):
        """Predict v = eps - x of noisy frames; each attends to itself and to the history before it.

        x (B, N, chunk · C, height, width): frames numbered first, first + 1, ...
        t (B, N): their noise levels in [0, 1]. c (B, L, text_dim): the condition.
        history (B, M, chunk · C, height, width) or None: finished frames that follow those in
        the cache.
        cache: `Cache` or None; the history's keys and values are appended to it, with
        detail_frames its pixels, too.
        history_t (B, M) or None: noise levels of the history, for diffusion forcing; None: all 0.
        Returns v shaped like x, in float32 (float64 if the weights are). Raises ValueError where
        shapes do not fit the configuration.
        """
        config, dtype = self.config, self.patch_embedding.weight.dtype
        self.check(x, c)
        if history is None:
            history = x[:, :0]
        if history_t is None:
            history_t = t.new_zeros(history.shape[:2])
        n_cached, cache_first = 0, 0
        if cache is not None:
            kept = cache.admit(history.shape[1], c)  # a window may evict some of them at once
            history, history_t = history[:, kept], history_t[:, kept]
            n_cached, cache_first = cache.length, cache.first

        M, N, device = history.shape[1], x.shape[1], x.device
        height, width = x.shape[3] // config.patch, x.shape[4] // config.patch
        position = first - cache_first  # of the first noisy frame, where column 0 has 0
        past, own = sparse_causal_mask(n_cached, M, N, position, device, config.window)
        next_number = cache_first + n_cached
        numbers = (*range(next_number, next_number + M), *range(first, first + N))
        angles = token_angles(
            config.dim // config.heads, config.chunk, numbers, height, width, device, dtype
        )  # (F, P, E / 2)

        with torch.autocast(device.type, enabled=False):
            levels = torch.cat([history_t, t], dim=1)  # (B, F)
            e = self.time_embedding(sinusoid(1000 * levels, config.freq_dim).to(dtype))  # (B, F, D)
            e6 = self.time_projection(e).unflatten(-1, (6, -1))  # (B, F, 6, D)
        text = self.text_embedding(c.to(dtype))  # (B, L, D)
        patches = patchify(torch.cat([history, x], dim=1), config)  # (B, F, P, C · patch · patch)
        tokens = self.patch_embedding(patches.to(dtype)).to(dtype)  # (B, F, P, D)

        for layer, block in enumerate(self.blocks):
            if layer == config.layers - 1:  # the history's last output is not used
                past, own = sparse_causal_mask(n_cached + M, 0, N, position, device, config.window)
            if self.recompute and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            # (B, F, P, D); after the last block (B, N, P, D)
            tokens = block(tokens, e6, angles, past, own, text, cache)

        finished = history
        if cache is not None:
            if config.detail_frames:
                finished = cache.put_frames(history)
            cache.length += M
        with torch.autocast(device.type, enabled=False):
            out = self.head(tokens, e[:, M:]).to(torch.promote_types(dtype, torch.float32))
            out = unpatchify(out, config, height)  # (B, N, chunk · C, height, width)
        if config.detail and N:  # N = 0: the pass only fills the cache
            before = frames_before(finished, position, N, config.detail_frames)
            out = self.detail(x, out, before, e[:, M:])
        return out if config.predict == "v" else velocity(x, t, out)

    def cache(self, batch, frames, window=None, sink=0):
        """Make an empty cache for `batch` videos of up to `frames` frames.

        window: keep only the first `sink` and the last window - sink frames, of any number;
        `frames` is then ignored. Without a window, or with one as long as `frames`, every frame
        is kept and `sink` has no effect.
        """
        if window is None or window >= frames:  # nothing will be evicted
            return Cache(self.config, batch, frames)
        return WindowCache(self.config, batch, window, sink)

    def check(self, x, c):
        """Raise ValueError for frames or text that do not fit the configuration."""
        config = self.config
        _, _, channels, height, width = x.shape
        if channels != config.chunk * config.channels:
            raise ValueError(
                f"frames of {channels} channels; this model's have {config.chunk} (the chunk) "
                f"x {config.channels}"
            )
        if height % config.patch or width % config.patch:
            raise ValueError(
                f"frames of {height} x {width}; both must be multiples of the patch, {config.patch}"
            )
        if c.shape[-1] != config.text_dim:
            raise ValueError(
                f"text of width {c.shape[-1]}; this model reads width {config.text_dim}"
            )

    def compile_blocks(self, **options):
        """torch.compile each block; all share what is compiled for one."""
        for block in self.blocks:
            block.compile(**options)


class Cache:
    """Keys and values of up to `frames` finished frames, preallocated and written in place.

    Slots 0 to length - 1 hold the finished frames, in order. A pass writes its history and its
    noisy frames behind them, so that attention reads [cached | history | noisy] as one view; then
    `length` grows by the history, and the next pass overwrites the noisy frames.
    """

    def __init__(self, config, batch, frames):
        self.config = config
        self.batch = batch
        self.frames = frames
        self.slots = frames  # to allocate
        self.first = 0  # number of the frame in slot 0
        self.length = 0
        self.k = None  # (layers, B, H, slots, P, E)
        self.v = None
        self.descriptor = None  # mean keys, (layers, B, H, slots, E)
        self.finished = None  # with detail_frames: their pixels, (B, frames, C, height, width)
        self.c = None  # the condition
        self.text = {}  # its keys and values in each layer

    def admit(self, n, c):
        """Begin a pass with n history frames and condition c. Returns the indices to compute."""
        if self.length + n > self.frames:
            raise ValueError(
                f"{self.length + n} finished frames in a cache for {self.frames}: "
                "ask model.cache for more frames or for a window"
            )
        if self.c is not c:
            self.c, self.text = c, {}
        return list(range(n))

    def put(self, layer, k, v):
        """Write k, v (B, H, F, P, E) of this pass. Returns k, v and mean keys of all S columns."""
        end = self.length + k.shape[2]
        self.reserve(k, end)
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        self.descriptor[layer][:, :, self.length : end] = describe(k)
        return tuple(z[layer][:, :, :end] for z in (self.k, self.v, self.descriptor))

    def put_frames(self, history):
        """Write this pass's history (B, M, C, height, width). Returns all finished frames."""
        end = self.length + history.shape[1]
        if self.finished is None:
            B, _, C, height, width = history.shape
            self.finished = history.new_zeros(B, self.frames, C, height, width)
        self.finished[:, self.length : end] = history
        return self.finished[:, :end]

    def reserve(self, k, slots):
        """Allocate at first use; grow only for a pass with more noisy frames than there is room."""
        if self.k is None:
            B, H, _, P, E = k.shape
            if B != self.batch:
                raise ValueError(f"a pass of {B} videos on a cache for {self.batch}")
            shape = (self.config.layers, B, H, max(self.slots, slots))
            self.k, self.v = k.new_zeros(*shape, P, E), k.new_zeros(*shape, P, E)
            self.descriptor = describe(k[:, :, :0]).new_zeros(*shape, E)
        elif slots > self.k.shape[3]:
            more = slots - self.k.shape[3]
            self.k, self.v = (F.pad(z, (0, 0, 0, 0, 0, more)) for z in (self.k, self.v))
            self.descriptor = F.pad(self.descriptor, (0, 0, 0, more))


# ---- machinery: the cache with a window, angles of tokens, checkpoints, Wan's weights ----


class WindowCache(Cache):
    """The first `sink` frames and the last ones, `window` in all: flat memory and time per frame.

    Evicting a frame moves those behind it to lower slots; slot i keeps the position first + i.
    So the sink's keys are rotated forward with the window and always stand right before it, and
    no relative position is larger than in a video of `window` + 1 frames.
    """

    def __init__(self, config, batch, window, sink):
        if not 0 <= sink < window:
            raise ValueError(
                f"a window of {window} frames with a sink of {sink}: wanted 0 <= sink < window"
            )
        if window - sink < config.detail_frames:
            raise ValueError(
                f"a window of {window} frames with a sink of {sink} keeps {window - sink} recent "
                f"ones; the convolutions of this model see {config.detail_frames}"
            )
        super().__init__(config, batch, window)
        self.slots = window + 1  # the noisy frame of a rollout
        self.sink = sink
        self.sink_k = None  # keys of the sink at positions 0 to sink - 1

    def admit(self, n, c):
        """Evict frames to make room for n; return the indices of the new frames to compute."""
        total = self.length + n
        evicted = max(0, total - self.frames)
        if evicted == 0:
            return super().admit(n, c)

        kept = [i for i in range(total) if not self.sink <= i < self.sink + evicted]
        old = [i for i in kept if i < self.length]
        new = [i - self.length for i in kept if i >= self.length]
        self.first += evicted
        if old:
            self.move(old)
        self.length = len(old)
        super().admit(len(new), c)
        return new

    def move(self, old):
        """Move the frames in the slots `old` to the first slots; rotate the sink's keys forward."""
        if self.finished is not None:
            self.finished[:, : len(old)] = self.finished[:, old]
        sink = min(self.sink, len(old))
        for layer in range(self.config.layers):
            for z in (self.k, self.v, self.descriptor):
                z[layer][:, :, : len(old)] = z[layer][:, :, old]
            k = rotate(self.sink_k[layer][:, :, :sink], self.rotation_by(self.first))
            self.k[layer][:, :, :sink] = k
            self.descriptor[layer][:, :, :sink] = describe(k)

    def put(self, layer, k, v):
        columns = super().put(layer, k, v)
        if self.sink_k is None:
            B, H, _, P, E = k.shape
            self.sink_k = k.new_zeros(self.config.layers, B, H, self.sink, P, E)
        if self.length < self.sink:
            fresh = columns[0][:, :, self.length : self.sink]
            end = self.length + fresh.shape[2]
            self.sink_k[layer][:, :, self.length : end] = rotate(
                fresh, self.rotation_by(-self.first)
            )
        return columns

    def rotation_by(self, frames):
        """The rotation that moves a key by a number of frames."""
        offset, zero = torch.tensor([frames * self.config.chunk]), torch.tensor([0])
        angles = rope(self.config.dim // self.config.heads, offset, zero, zero)
        return angles_like(angles, self.k.device, self.k.dtype)


@lru_cache(maxsize=64)
def token_angles(width, chunk, numbers, rows, columns, device, dtype):
    """`rope` for the tokens of frames with these numbers (a tuple): complex (F, P, E / 2)."""
    latents = (torch.tensor(numbers)[:, None] * chunk + torch.arange(chunk)).flatten()
    angles = rope(width, latents, torch.arange(rows), torch.arange(columns))
    angles = angles.unflatten(0, (len(numbers), chunk * rows * columns))
    return angles_like(angles, device, dtype)


def angles_like(angles, device, dtype):
    """Angles on a device, as precise as dtype, at least complex64."""
    return angles.to(torch.complex128 if dtype == torch.float64 else torch.complex64).to(device)


CHECKPOINT = {"config": dict, "model": dict, "ema": dict, "step": int, "args": dict}


def read_checkpoint(path):
    """The dictionary in a run's ckpt.pt, on the CPU. path: the file or the run's folder.

    Raises ValueError if there is none, or it is not a whole checkpoint of this project.
    """
    path = Path(path, "ckpt.pt") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}; give a run's folder or its ckpt.pt")
    try:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key, kind in CHECKPOINT.items():
            if not isinstance(state, dict) or key not in state:
                raise ValueError(f"it lacks {key}")
            if not isinstance(state[key], kind):
                raise ValueError(f"its {key} is a {type(state[key]).__name__}")
        Config(**state["config"])
    except Exception as error:  # the exception class depends on the damage
        reason = str(error).split(". ")[0].split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} is not a whole checkpoint of this project ({reason}); "
            "train.py writes one to --out"
        ) from None
    return state


def load_checkpoint(path):
    """A run's model with its EMA weights, ready to sample; `model.run` holds the run's flags.

    Raises ValueError if the checkpoint is missing, broken, or its weights do not fit its sizes.
    """
    state = read_checkpoint(path)
    with torch.device("meta"):  # allocates nothing: the checkpoint's tensors become the weights
        model = CausalDiT(Config(**state["config"]))
    weights = {name: full_precision(z) for name, z in state["ema"].items()}
    load_weights(model, weights, path, assign=True)
    model.run = state["args"]
    return model.eval().requires_grad_(False)


def full_precision(z):
    """Weights of half precision, as results/pack.py writes them, in float32; others as they are."""
    return z.float() if torch.is_tensor(z) and z.dtype in (torch.float16, torch.bfloat16) else z


def load_weights(model, weights, path, assign=False):
    """load_state_dict with a one-line ValueError that names the keys that do not fit."""
    try:
        model.load_state_dict(weights, assign=assign)
    except Exception as error:  # names all keys that are missing, unknown or of another shape
        wrong = " ".join(str(error).split())
        wrong = shorten(wrong[wrong.find(":") + 2 :], 600, placeholder=" ...")
        raise ValueError(f"the weights of {path} are not those of this network: {wrong}") from None


# fmt: off
DIFFUSERS_NAMES = [  # (theirs, ours), replaced in this order; ours are the original's
    ("condition_embedder.", ""),
    ("text_embedder.", "text_embedding."), ("time_embedder.", "time_embedding."),
    (".linear_1.", ".0."), (".linear_2.", ".2."), ("time_proj.", "time_projection.1."),
    ("attn1.", "self_attn."), ("attn2.", "cross_attn."),
    (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".o."),
    (".norm2.", ".norm3."), ("ffn.net.0.proj.", "ffn.0."), ("ffn.net.2.", "ffn.2."),
    ("proj_out.", "head.head."),
    (".scale_shift_table", ".modulation"), ("scale_shift_table", "head.modulation"),
]
# fmt: on


def load_wan(model, path):
    """Load Wan 2.1's weights into a CausalDiT.

    path: an original .pth or .safetensors file, a folder of .safetensors, the original's or
    diffusers' (sharded or not), or a Self-Forcing checkpoint. Raises ValueError that names what is
    unknown, missing or of another shape.
    """
    path = Path(path)
    if (path / "transformer").is_dir():
        path = path / "transformer"
    pattern = "diffusion_pytorch_model*.safetensors"
    files = sorted(path.rglob(pattern)) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no {pattern}; give a folder that has, or a .pth file")

    weights = {}
    for file in files:
        for name, tensor in read_weights(file).items():
            name = name.removeprefix("model.").removeprefix("diffusion_model.")
            for theirs, ours in DIFFUSERS_NAMES:
                name = name.replace(theirs, ours)
            if name == "patch_embedding.weight":  # a convolution there
                tensor = tensor.flatten(1)
            weights[name] = tensor
    load_weights(model, weights, path)


def read_weights(file):
    """{name: tensor} of a .safetensors file, a .pth, or a Self-Forcing checkpoint (its EMA)."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with diffusers

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("generator_ema", state.get("generator", state))
        return dict(state.items())
    except Exception as error:  # the exception class depends on the library
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise ValueError(f"{file} cannot be read as weights ({reason})") from None
