"""The network: Wan 2.1's DiT at any size, made causal by a mask, with one noise level per frame.

One forward serves training, resampling and sampling: `v = model(x, t, c, history, cache, first)`.
Noisy frames and history frames pass through it side by side, the history at t = 0; routing.py's
table decides who attends to whom. Submodules carry the original Wan names, so that its weights
load as they are.

B videos, N noisy frames and M history frames of this pass, F = M + N, R query frames, S key frames,
P tokens in a frame (chunk · rows · columns of patches), C channels, D width, H heads, E width of a
head, L words.
"""

import os
import shutil
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from routing import attend, sparse_causal_mask


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
    eps: float = 1e-6

    def __post_init__(self):
        if self.predict not in ("v", "x"):
            raise ValueError(f'predict is {self.predict!r}; wanted "v" or "x"')
        for name, value in vars(self).items():
            if name != "predict" and value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; wanted a number above 0")
        pairs = 2 * self.heads
        if self.dim % pairs:
            raise ValueError(
                f"a dim of {self.dim} cannot be split into {self.heads} heads of an even width; "
                f"{-(-self.dim // pairs) * pairs} would work"
            )


PRESETS = {
    "toy": Config(layers=4, patch=8, predict="x"),
    "small": Config(dim=384, ffn_dim=1536, heads=6, layers=8, patch=8, predict="x"),
    "wan-1.3b": Config(
        channels=16, dim=1536, ffn_dim=8960, heads=12, layers=30, patch=2, chunk=3, text_dim=4096
    ),
    "wan-14b": Config(
        channels=16, dim=5120, ffn_dim=13824, heads=40, layers=40, patch=2, chunk=3, text_dim=4096
    ),
}

LEAST_T = 0.05  # x-prediction divides by t, or by this if t is smaller


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
    """(B, ..., D) -> (B, H, ..., E); einops is slow at this size."""
    return z.unflatten(-1, (heads, -1)).movedim(-2, 1)


def join_heads(z):
    """(B, H, ..., E) -> (B, ..., D)."""
    return z.movedim(1, -2).flatten(-2)


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

    def project(self, queries, keys):
        """(B, ..., D) -> q of the queries, k and v of the keys, (B, H, ..., E), before RoPE."""
        dtype = self.norm_q.weight.dtype  # the norms stay as precise as the weights
        q = split_heads(self.norm_q(self.q(queries).to(dtype)), self.heads)
        k = split_heads(self.norm_k(self.k(keys).to(dtype)), self.heads)
        v = split_heads(self.v(keys), self.heads)
        return q.to(v.dtype), k.to(v.dtype), v


class SelfAttention(Attention):
    """Attention of each frame to itself and its history, Eq. (8)."""

    def forward(self, x, angles, past, own, cache):
        """x (B, F, P, D), angles (S, P, E / 2), past and own (R, S) -> (B, R, P, D).

        The last R of the F frames are the queries; all are keys, after those in the cache.
        """
        q, k, v = self.project(x[:, x.shape[1] - len(past) :], x)
        return self.o(join_heads(self.attend(q, k, v, angles, past, own, cache)))

    @torch.compiler.disable  # torch.compile would compile it anew for every number of frames
    def attend(self, q, k, v, angles, past, own, cache):
        if cache is not None:
            k, v = cache.put(self.layer, k, v)
        q, k = rotate(q, angles[len(angles) - len(past) :]), rotate(k, angles)
        return attend(q, k, v, past, own, self.top_k)


class CrossAttention(Attention):
    """Attention of each token to the text."""

    def forward(self, x, text):
        """x (B, R, P, D), text (B, L, D) -> (B, R, P, D). Padding is attended to, as in Wan."""
        q, k, v = self.project(x.flatten(1, 2), text)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, H, R · P, E)
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
        h = self.self_attn(h, angles, past, own, cache).to(x.dtype)

        first = x.shape[1] - len(past)
        x, gate1, shift2, scale2, gate2 = (z[:, first:] for z in (x, gate1, shift2, scale2, gate2))
        x = torch.addcmul(x, gate1, h)
        x = x + self.cross_attn(self.norm3(x), text)
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

    def forward(self, x, t, c, history=None, cache=None, first=0, history_t=None):
        """Predict v = eps - x of noisy frames; each attends to itself and to the history before it.

        x (B, N, chunk · C, height, width): frames numbered first, first + 1, ...
        t (B, N): their noise levels in [0, 1]. c (B, L, text_dim): the condition.
        history (B, M, chunk · C, height, width) or None: finished frames that follow those in
        the cache.
        cache: `Cache` or None; the history's keys and values are appended to it.
        history_t (B, M) or None: noise levels of the history, for diffusion forcing; None: all 0.
        Returns v shaped like x, in float32 (float64 if the weights are). Raises ValueError where
        shapes do not fit the configuration.
        """
        config, dtype, device = self.config, self.patch_embedding.weight.dtype, x.device
        self.check(x, c)
        if history is None:
            history = x[:, :0]
        if history_t is None:
            history_t = t.new_zeros(history.shape[:2])
        n_cached = 0
        if cache is not None:  # a window evicts old frames, and frames are numbered anew
            kept = cache.make_room(history.shape[1])
            history, history_t = history[:, kept], history_t[:, kept]
            n_cached, first = cache.length, first - cache.evicted

        M, N = history.shape[1], x.shape[1]
        past, own = sparse_causal_mask(n_cached, M, N, first, window=config.window)
        numbers = (*range(n_cached + M), *range(first, first + N))  # of the columns
        rows, columns = x.shape[3] // config.patch, x.shape[4] // config.patch
        angles = token_angles(
            config.dim // config.heads, config.chunk, numbers, rows, columns, device, dtype
        )

        with torch.autocast(device.type, enabled=False):
            levels = torch.cat([history_t, t], dim=1)  # (B, F)
            e = self.time_embedding(sinusoid(1000 * levels, config.freq_dim).to(dtype))  # (B, F, D)
            e6 = self.time_projection(e).unflatten(-1, (6, -1))  # (B, F, 6, D)
        text = self.text_embedding(c.to(dtype))  # (B, L, D)
        patches = patchify(torch.cat([history, x], dim=1), config)  # (B, F, P, C · patch · patch)
        tokens = self.patch_embedding(patches.to(dtype)).to(dtype)  # (B, F, P, D)

        for layer, block in enumerate(self.blocks):
            if layer == config.layers - 1:  # nobody reads the history's last output
                past, own = past[M:], own[M:]
            if self.recompute and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            tokens = block(tokens, e6, angles, past, own, text, cache)

        if cache is not None:
            cache.length += M
        with torch.autocast(device.type, enabled=False):
            out = self.head(tokens, e[:, M:]).to(torch.promote_types(dtype, torch.float32))
            out = unpatchify(out, config, rows)  # (B, N, chunk · C, height, width)
        return out if config.predict == "v" else velocity(x, t, out)

    def cache(self, batch, frames, window=None, sink=0):
        """Make an empty cache for `batch` videos of up to `frames` frames.

        window: of any number of frames, keep the first `sink` and the last window - sink. Without
        one, or with one as long as `frames`, nothing is evicted.
        """
        return Cache(self.config.layers, batch, frames, window, sink)

    def compile_blocks(self):
        """torch.compile each block; all share what is compiled for one."""
        compiler = os.environ.get("CXX", "g++")
        if not any(map(shutil.which, (compiler, "c++", "clang++"))):
            raise ValueError(f"--compile needs a C++ compiler, and there is no {compiler}")
        for block in self.blocks:
            block.compile()

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


class Cache:
    """Keys and values of finished frames in each layer.

    Keys are kept before RoPE, and a frame's position is its index in the cache.
    A pass writes its history and its noisy frames behind the finished ones, so that attention
    reads [cached | history | noisy] as a view; then `length` grows by the history, and the next
    pass overwrites the noisy frames. With a window the first `sink` frames and the last ones are
    kept, `window` in all: those behind an evicted frame move up, so that no position leaves the
    range of training, and memory and time per frame stay flat.
    """

    def __init__(self, layers, batch, frames, window=None, sink=0):
        if window is not None and not 0 <= sink < window:
            raise ValueError(
                f"a window of {window} frames with a sink of {sink}: wanted 0 <= sink < window"
            )
        self.evicts = window is not None and window < frames
        self.layers = layers
        self.batch = batch
        self.frames = window if self.evicts else frames  # that it holds at most
        self.sink = sink
        self.length = 0  # frames that it holds
        self.evicted = 0
        self.kv = None  # (2, layers, B, H, places, P, E)

    def make_room(self, n):
        """Evict frames to fit n more; return the indices of those of the n that stay at all."""
        total = self.length + n
        excess = max(0, total - self.frames)
        if excess and not self.evicts:
            raise ValueError(
                f"{total} finished frames in a cache for {self.frames}: "
                "ask model.cache for more frames or for a window"
            )
        kept = [i for i in range(total) if not self.sink <= i < self.sink + excess]
        old = [i for i in kept if i < self.length]
        new = [i - self.length for i in kept if i >= self.length]
        if len(old) < self.length:
            for layer in range(self.layers):  # one at a time, to copy little at once
                kv = self.kv[:, layer]
                kv[:, :, :, : len(old)] = kv[:, :, :, old]
        self.length = len(old)
        self.evicted += excess
        return new

    def put(self, layer, k, v):
        """Write k, v (B, H, F, P, E) of this pass; return those of all S columns."""
        B, H, n, P, E = k.shape
        end = self.length + n
        if B != self.batch:
            raise ValueError(f"a pass of {B} videos on a cache for {self.batch}")
        if self.kv is None or end > self.kv.shape[4]:  # at first, or for many noisy frames
            places = max(end, self.frames + 1)
            kv = k.new_empty(2, self.layers, B, H, places, P, E)
            if self.kv is not None:
                kv[:, :, :, :, : self.length] = self.kv[:, :, :, :, : self.length]
            self.kv = kv

        self.kv[0, layer][:, :, self.length : end] = k
        self.kv[1, layer][:, :, self.length : end] = v
        return self.kv[:, layer, :, :, :end]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached inference tensor could not be used in training
def token_angles(width, chunk, numbers, rows, columns, device, dtype):
    """`rope` for the tokens of frames with these numbers, a tuple: complex (S, P, E / 2)."""
    latents = (torch.tensor(numbers)[:, None] * chunk + torch.arange(chunk)).flatten()
    angles = rope(width, latents, torch.arange(rows), torch.arange(columns))
    angles = angles.unflatten(0, (len(numbers), chunk * rows * columns))
    return angles.to(torch.complex128 if dtype == torch.float64 else torch.complex64).to(device)


# ---- machinery: checkpoints, Wan's weights ----


def read_checkpoint(path):
    """The dictionary in a run's ckpt.pt, on the CPU. path: the file or the run's folder.

    Raises ValueError if there is none, or it is not a checkpoint of train.py.
    """
    path = Path(path, "ckpt.pt") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}; give a run's folder or its ckpt.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"config", "model", "ema", "step", "args"} - set(state)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        state["config"] = read_config(state["config"])
    except Exception as error:  # the exception class depends on the damage
        reason = shorten(f"{type(error).__name__}: {error}", 150, placeholder=" ...")
        raise ValueError(f"{path} is not a checkpoint of train.py ({reason})") from None
    return state


def read_config(saved):
    """A Config from a dictionary. Unknown fields are ignored if falsy, else a ValueError."""
    known = {field.name for field in fields(Config)}
    unknown = [name for name, value in saved.items() if name not in known and value]
    if unknown:
        raise ValueError(f"this network has no {', '.join(unknown)}")
    return Config(**{name: value for name, value in saved.items() if name in known})


def load_checkpoint(path):
    """A run's model with its EMA weights, ready to sample; `model.run` holds the run's flags.

    Raises ValueError if the checkpoint is missing, broken, or its weights do not fit its sizes.
    """
    state = read_checkpoint(path)
    with torch.device("meta"):  # allocates nothing: the checkpoint's tensors become the weights
        model = CausalDiT(state["config"])
    load_weights(model, state["ema"], path, assign=True)
    model.run = state["args"]
    return model.float().eval().requires_grad_(False)  # results/*.pt are in half precision


def load_weights(model, weights, path, assign=False):
    """load_state_dict; a ValueError names what is unknown, missing or of another shape."""
    try:
        ours = model.state_dict()
        wrong = [f"unknown {name}" for name in weights if name not in ours]
        wrong += [f"missing {name}" for name in ours if name not in weights]
        if wrong:
            raise ValueError(", ".join(wrong))
        model.load_state_dict(weights, assign=assign)
    except Exception as error:  # torch raises RuntimeError for other shapes
        wrong = shorten(str(error), 400, placeholder=" ...")
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
    pattern = "diffusion_pytorch_model*.safetensors"
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        files = sorted(folder.glob(pattern))
    else:
        files = [path]
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
        return dict(state.get("generator_ema", state.get("generator", state)))
    except Exception as error:  # the exception class depends on the library
        reason = shorten(f"{type(error).__name__}: {error}", 150, placeholder=" ...")
        raise ValueError(f"{file} cannot be read as weights ({reason})") from None
