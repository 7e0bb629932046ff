"""The network: Wan 2.1's DiT at any size, causal by its mask, with one noise level per frame and a cache.

One forward serves training, resampling and sampling: `v = model(x, t, c, history, cache, first)`. Noisy frames and
history frames pass through it side by side, the history at t = 0; who sees whom is routing.py's table and nothing else.
Submodules carry the original Wan names, so that real weights load as they are.

B videos, N noisy frames in this pass, M frames (rows: [history | noisy] of this pass; columns: what they may see),
P tokens in a frame (chunk · rows · columns of patches), C channels, D width, H heads, E width of a head, L words.
"""
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from routing import attend, describe, sparse_causal_mask

@dataclass
class Config:
    """What a checkpoint needs to know of the network. Raises ValueError for sizes that do not fit together."""
    channels: int = 3       # of one latent frame (or of pixels)
    dim: int = 96
    ffn_dim: int = 384
    heads: int = 4
    layers: int = 3
    patch: int = 4          # pixels along a side of a token
    chunk: int = 1          # latent frames in a frame, the autoregressive unit
    text_dim: int = 20
    freq_dim: int = 256     # of the sinusoids of t
    top_k: int | None = None  # history frames that a token may pick, Eq. (9); None: all
    window: int | None = None  # history frames in sight, in training too; None: all
    eps: float = 1e-6

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive (top_k and window may be left out, for all history)")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} cannot be split into {self.heads} heads of an even width; "
                             f"{2 * self.heads} would work")

PRESETS = {
    "toy": Config(),
    "small": Config(dim=384, ffn_dim=1536, heads=6, layers=8),
    "wan-1.3b": Config(16, 1536, 8960, 12, 30, patch=2, chunk=3, text_dim=4096),
    "wan-14b": Config(16, 5120, 13824, 40, 40, patch=2, chunk=3, text_dim=4096),
}

def rope(width, frames, rows, columns):
    """Angles of 3-D RoPE: positions (n,), (h,), (w,) -> complex (n · h · w, width / 2), float64.
    The pairs of a head are split among time, row and column, the remainder to time; each axis has a full spectrum."""
    at = torch.cartesian_prod(frames.double(), rows.double(), columns.double())
    parts = (width - 4 * (width // 6), 2 * (width // 6), 2 * (width // 6))
    angles = torch.cat([torch.outer(at[:, axis], 1e4 ** -(torch.arange(0, part, 2).to(at) / part))
                        for axis, part in enumerate(parts)], dim=-1)
    return torch.polar(torch.ones_like(angles), angles)

@lru_cache(maxsize=64)
def token_angles(width, chunk, frames, rows, columns, device, dtype):
    """`rope` of the tokens of frames (a tuple of numbers): complex (M, P, E / 2), as precise as dtype (at least fp32)."""
    latents = (torch.tensor(frames)[:, None] * chunk + torch.arange(chunk)).flatten()
    angles = rope(width, latents, torch.arange(rows), torch.arange(columns))
    angles = angles.unflatten(0, (len(frames), chunk * rows * columns))
    return angles.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)

def rotate(z, angles):
    """Rotate neighbouring channels: z (..., E) real, angles (..., E / 2) complex. A second rotation adds to the first."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles.to(pairs.dtype)).flatten(-2).to(z.dtype)

def sinusoid(t, dim):
    """t (...) -> (..., dim): cosines first, periods from 2 pi to 20000 pi, float64."""
    w = 1e4 ** (-torch.arange(dim // 2, device=t.device, dtype=torch.float64) / (dim // 2))
    angle = t[..., None].double() * w
    return torch.cat([angle.cos(), angle.sin()], dim=-1)

class Cache:
    """Keys and values of the finished frames, written in place; made by `model.cache(batch, frames, window, sink)`.
    Without a window it holds up to `frames` frames. With one it holds the first `sink` and the last ones, `window` in
    all; the sink's keys are rotated onward as the window moves, so that they always seem to stand right before it:
    positions, memory and time per frame are those of a video of `window` frames, however long it runs.
    Slots 0 to length - 1 hold frames in the order of time, the slots behind them the noisy frames of the pass. `first`
    is slot 0's position: how many frames were dropped. A pass calls `admit` once and `put` in every layer."""
    def __init__(self, config, batch, frames, window=None, sink=0):
        if window is not None and not 0 <= sink < window:
            raise ValueError(f"a window of {window} frames with a sink of {sink}: wanted 0 <= sink < window")
        self.config, self.batch, self.frames, self.window, self.sink = config, batch, frames, window, sink
        self.first = self.length = self.kept = 0
        self.k = self.v = self.descriptor = self.sink_k = self.c = None

    def admit(self, n, c):
        """Make room for n frames, told c. Returns which to compute, an index: all but those that a window drops at once."""
        if self.c is not c:
            self.c, self.words = c, {}
        total, limit = self.length + n, self.window or self.frames
        if self.window is None and total > limit:
            raise ValueError(f"{total} finished frames in a cache for {limit}: ask model.cache for more, or for a window")
        self.gap = max(0, total - limit)
        stay = [i for i in range(total) if i < self.sink or i >= self.sink + self.gap]
        new = [i - self.length for i in stay if i >= self.length]
        self.first, self.length, self.kept = self.first + total - len(stay), len(stay), len(stay) - len(new)
        return new if len(new) < n else slice(None)

    def put(self, layer, k, v, n_noisy):
        """Write a layer's keys and values (B, H, new + noisy, P, E). Returns all columns' and `describe(k)`, as views."""
        self.reserve(k, v, self.length + n_noisy)
        sink = min(self.sink, self.kept)
        keys, _, descriptor = of_layer = [z[layer] for z in (self.k, self.v, self.descriptor)]
        if self.gap:
            for z in of_layer:
                z[:, :, sink:self.kept] = z[:, :, sink + self.gap:self.kept + self.gap].clone()
            keys[:, :, :sink] = rotate(self.sink_k[layer][:, :, :sink], self.onward(self.first, k.device))
            descriptor[:, :, :sink] = describe(keys[:, :, :sink])
        for z, new in zip(of_layer, (k, v, describe(k))):
            z[:, :, self.kept:self.length + n_noisy] = new
        if sink < self.sink:
            fresh = keys[:, :, sink:min(self.sink, self.length)]
            self.sink_k[layer][:, :, sink:sink + fresh.shape[2]] = rotate(fresh, self.onward(-self.first, k.device))
        return (z[:, :, :self.length + n_noisy] for z in of_layer)

    def onward(self, frames, device):
        """The rotation that moves a key by so many frames."""
        here = torch.zeros(1, device=device)
        return rope(self.config.dim // self.config.heads, here + frames * self.config.chunk, here, here)

    def reserve(self, k, v, slots):
        """Room for so many slots: made at first use for all frames to come, again only if a later pass has more noisy ones."""
        if self.k is None:
            B, H, _, P, E = k.shape
            if B != self.batch:
                raise ValueError(f"a pass of {B} videos on a cache for {self.batch}")
            kinds = (k, 0), (v, 0), (describe(k), 0), (k, self.sink)
            self.k, self.v, self.descriptor, self.sink_k = (
                z.new_zeros(self.config.layers, B, H, n, *z.shape[3:]) for z, n in kinds)
        if slots > self.k.shape[3]:
            more = max(self.length, min(self.frames, self.window or self.frames)) + slots - self.length - self.k.shape[3]
            kept = self.k, self.v, self.descriptor
            self.k, self.v, self.descriptor = (F.pad(z, (0, 0) * (z.dim() - 4) + (0, more)) for z in kept)

class Sight:
    """What a layer's attentions look at in one pass: its row of frames, and the text. torch.compile leaves both calls
    alone: it would compile anew for every number of frames."""
    def __init__(self, layer, past, own, n_noisy, cache, text):
        self.layer, self.past, self.own, self.rows = layer, past, own, len(past)
        self.n_noisy, self.cache, self.text = n_noisy, cache, text

    @torch.compiler.disable
    def attend(self, q, k, v, top_k):
        """`routing.attend`, on the frames in the cache too, to which those of this pass are added."""
        k, v, descriptor = (k, v, None) if self.cache is None else self.cache.put(self.layer, k, v, self.n_noisy)
        return attend(q, k, v, self.past, self.own, top_k, descriptor)

    @torch.compiler.disable
    def words(self, attention):
        """A cross-attention's keys and values; a cache keeps them for as long as it is shown the same tensor c."""
        kept = {} if self.cache is None else self.cache.words
        if attention not in kept:
            kept[attention] = attention.words(self.text)
        return kept[attention]

class Attention(nn.Module):
    """What both attentions have: projections, and norms of q and k over the full width."""
    def __init__(self, config):
        super().__init__()
        self.heads, self.top_k = config.heads, config.top_k
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(config.dim, eps=config.eps) for _ in range(2))

class SelfAttention(Attention):
    def forward(self, x, angles, sight):
        """x (B, M, P, D) -> the last of its frames, those in `sight` (B, rows, P, D)."""
        rows = x[:, x.shape[1] - sight.rows:]
        q, k, v = self.norm_q(self.q(rows).to(x.dtype)), self.norm_k(self.k(x).to(x.dtype)), self.v(x)
        q, k, v = (split(z, self.heads) for z in (q, k, v))
        q, k = (rotate(z, angles[len(angles) - z.shape[2]:]).to(v.dtype) for z in (q, k))
        return self.o(join(sight.attend(q, k, v, self.top_k)))

class CrossAttention(Attention):
    def words(self, text):
        """Keys and values (B, H, L, E) of text (B, L, D). Every word is seen, the empty ones too."""
        k, v = self.norm_k(self.k(text).to(self.norm_k.weight.dtype)), self.v(text)
        return [split(z, self.heads).to(v.dtype) for z in (k, v)]

    def forward(self, x, k, v):
        """x (B, M, P, D) -> (B, M, P, D)."""
        q = split(self.norm_q(self.q(x).to(x.dtype)).flatten(1, 2), self.heads).to(v.dtype)
        return self.o(join(F.scaled_dot_product_attention(q, k, v))).unflatten(1, x.shape[1:3])

def split(z, heads):
    """(B, ..., D) -> (B, H, ..., E): einops would say it better, but takes as long as the attention of a small model."""
    return z.unflatten(-1, (heads, -1)).movedim(-2, 1)

def join(z):
    """`split` undone."""
    return z.movedim(1, -2).flatten(-2)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.cross_attn = SelfAttention(config), CrossAttention(config)
        self.norm1, self.norm2 = (nn.LayerNorm(config.dim, config.eps, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = nn.Sequential(nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim ** 0.5)

    def forward(self, x, e6, angles, sight):
        """x (B, M, P, D), e6 (B, M, 6, D) -> the last frames, those in `sight`; the others give keys and values alone."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e6).unsqueeze(-2).unbind(2)
        h = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        x, gate1, shift2, scale2, gate2 = (z[:, z.shape[1] - sight.rows:] for z in (x, gate1, shift2, scale2, gate2))
        x = torch.addcmul(x, gate1, self.self_attn(h, angles, sight).to(x.dtype))
        x = x + self.cross_attn(self.norm3(x), *sight.words(self.cross_attn))
        h = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        return torch.addcmul(x, gate2, self.ffn(h).to(x.dtype))

class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.channels * config.patch ** 2)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim ** 0.5)

    def forward(self, x, e):
        """x (B, N, P, D), e (B, N, D) -> (B, N, P, patch · patch · C)."""
        shift, scale = (self.modulation + e[:, :, None]).unsqueeze(-2).unbind(2)
        return self.head(torch.addcmul(shift, self.norm(x), 1 + scale))

class CausalDiT(nn.Module):
    """Wan 2.1's text-to-video DiT with a noise level per frame. At initialisation it returns exactly 0."""
    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False  # recompute: blocks are run again in backward, to save memory
        dim = config.dim
        self.patch_embedding = nn.Linear(config.channels * config.patch ** 2, dim)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def cache(self, batch, frames, window=None, sink=0):
        """An empty `Cache` for `batch` videos of up to `frames` frames (or for any number, with a window)."""
        return Cache(self.config, batch, frames, window, sink)

    def compile_blocks(self, **options):
        """torch.compile, block by block: all share what is compiled for one, and attention picks its own kernels."""
        for block in self.blocks:
            block.compile(**options)

    def forward(self, x, t, c, history=None, cache=None, first=0):
        """The velocity v = eps - x of noisy frames, each seeing itself and the history frames before it.
        x (B, N, chunk · C, height, width), frames numbered first, first + 1, ...; t (B, N) in [0, 1]; c (B, L,
        text_dim); history (B, M, chunk · C, height, width), the finished frames that come right after the cache's, or
        None; cache: `Cache` or None; the history's keys and values are added to it. Returns v, shaped like x, in
        float32 (float64 if the weights are). Raises ValueError where shapes do not fit the configuration."""
        config, dtype = self.config, self.patch_embedding.weight.dtype
        self.check(x, c)
        history = x[:, :0] if history is None else history
        n_cached = start = 0
        if cache is not None:
            history = history[:, cache.admit(history.shape[1], c)]
            n_cached, start = cache.kept, cache.first
        M, N, height, width = history.shape[1], x.shape[1], x.shape[3] // config.patch, x.shape[4] // config.patch
        past, own = sparse_causal_mask(n_cached, M, N, first - start, window=config.window)
        frames = (*range(start + n_cached, start + n_cached + M), *range(first, first + N))
        angles = token_angles(config.dim // config.heads, config.chunk, frames, height, width, x.device, dtype)
        with torch.autocast(x.device.type, enabled=False):
            e = self.time_embedding(sinusoid(1000 * F.pad(t, (M, 0)), config.freq_dim).to(dtype))
            e6 = self.time_projection(e).unflatten(-1, (6, -1))
        text = self.text_embedding(c.to(dtype))
        of = dict(t=config.chunk, p=config.patch, q=config.patch)
        patches = rearrange(torch.cat([history, x], dim=1), "b m (t c) (h p) (w q) -> b m (t h w) (c p q)", **of)
        x = self.patch_embedding(patches.to(dtype)).to(dtype)
        for layer, block in enumerate(self.blocks):
            if layer + 1 == len(self.blocks):  # nobody reads the history's own output
                past, own = past[M:], own[M:]
            run = partial(checkpoint, block, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else block
            x = run(x, e6, angles, Sight(layer, past, own, N, cache, text))
        with torch.autocast(x.device.type, enabled=False):
            v = self.head(x, e[:, M:]).to(torch.promote_types(dtype, torch.float32))
        return rearrange(v, "b n (t h w) (p q c) -> b n (t c) (h p) (w q)", h=height, **of)

    def check(self, x, c):
        config, (_, _, channels, height, width) = self.config, x.shape
        if channels != config.chunk * config.channels:
            raise ValueError(f"frames of {channels} channels; this model's have {config.chunk} (the chunk) x {config.channels}")
        if height % config.patch or width % config.patch:
            raise ValueError(f"frames of {height} x {width}; both must be multiples of the patch, {config.patch}")
        if c.shape[-1] != config.text_dim:
            raise ValueError(f"text of width {c.shape[-1]}; this model reads width {config.text_dim}")

def read_checkpoint(path):
    """The dictionary in a run's ckpt.pt (path: the file or the run's folder), on the CPU. Raises ValueError."""
    path = Path(path, "ckpt.pt") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}; give a run's folder or its ckpt.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if lacking := {"config", "model", "ema", "step", "args"} - set(state):
            raise ValueError("it lacks " + ", ".join(sorted(lacking)))
        Config(**state["config"])
    except Exception as error:  # torch raises a different class for each way in which a file can be broken
        reason = str(error).split(". ")[0].split("\n")[0]
        raise ValueError(f"{path} is not a whole checkpoint of this project ({reason}); train.py writes one to --out") from None
    return state

def load_checkpoint(path):
    """A run's model with its averaged weights, ready to sample; `model.run`: its flags, and what it knows of its data."""
    state = read_checkpoint(path)
    model = CausalDiT(Config(**state["config"]))
    model.load_state_dict(state["ema"])
    model.run = state["args"]
    return model.eval().requires_grad_(False)

DIFFUSERS_NAMES = [  # (theirs, ours), in this order; ours are the original's
    ("condition_embedder.", ""), ("text_embedder.", "text_embedding."), ("time_embedder.", "time_embedding."),
    (".linear_1.", ".0."), (".linear_2.", ".2."), ("time_proj.", "time_projection.1."), ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."), (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".o."),
    (".norm2.", ".norm3."), ("ffn.net.0.proj.", "ffn.0."), ("ffn.net.2.", "ffn.2."), ("proj_out.", "head.head."),
    (".scale_shift_table", ".modulation"), ("scale_shift_table", "head.modulation")]

def load_wan(model, path):
    """Fill a CausalDiT with Wan 2.1's weights: an original .pth or .safetensors, a folder of them or of diffusers'
    (sharded or not), or a Self-Forcing checkpoint. Raises ValueError that names what is unknown, missing or misshapen."""
    path, state = Path(path), {}
    path = path / "transformer" if (path / "transformer").is_dir() else path
    files = sorted(path.rglob("diffusion_pytorch_model*.safetensors")) if path.is_dir() else [path]
    for file in files:
        try:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file  # comes with diffusers
                state |= load_file(file)
            else:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
                state |= loaded.get("generator_ema", loaded.get("generator", loaded))
        except Exception as error:  # each library has classes of its own
            raise ValueError(f"{file} cannot be read as weights ({type(error).__name__}: {str(error)[:100]})") from None
    theirs = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.").removeprefix("diffusion_model.")
        for a, b in DIFFUSERS_NAMES:
            name = name.replace(a, b)
        theirs[name] = tensor.flatten(1) if name == "patch_embedding.weight" else tensor
    try:
        model.load_state_dict(theirs)
    except RuntimeError as error:  # names all keys that are missing, unknown or misshapen
        wrong = " ".join(str(error).split())
        raise ValueError(f"the weights of {path} are not those of this network: {wrong[wrong.find(':') + 2:]}") from None
