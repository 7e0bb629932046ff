"""Attention between frames: the sparse causal mask, top-k history routing, and both applied.

A pass has rows, its query frames [history | noisy], and columns, its key frames
[cached | history | noisy]. Cached and history frames are finished and numbered 0, 1, ... in the
order of their columns. One rule gives Fig. 3c, training and sampling:

    a frame sees itself, and every history frame with a smaller number.

B videos, H heads, R rows, S columns, P tokens in a frame, E width of a head, K picked frames.
"""

from functools import cache

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def sparse_causal_mask(n_cached, n_history, n_noisy, first, device=None, window=None):
    """Fig. 3c, frame by frame: (past, own), two boolean tables (R, S).

    The noisy frames are numbered first, first + 1, ... past[r, s]: row r sees column s as history.
    own[r, s]: column s is row r itself. A noisy frame sees no other noisy frame and never its own
    finished copy. window: see the last `window` history frames only (None: all).
    """
    finished = torch.arange(n_cached + n_history, device=device)
    noisy = first + torch.arange(n_noisy, device=device)
    age = torch.cat([finished[n_cached:], noisy])[:, None] - finished  # (R, cached + history)
    past = age > 0
    if window is not None:
        past &= age <= window

    own = torch.eye(n_history + n_noisy, dtype=torch.bool, device=device)
    return F.pad(past, (0, n_noisy)), F.pad(own, (n_cached, 0))


def describe(k):
    """phi(K_j) of Eq. (9): the mean key of each frame, (B, H, S, P, E) -> (B, H, S, E).

    In float32, or in float64 if k is.
    """
    return k.mean(dim=-2, dtype=torch.promote_types(k.dtype, torch.float32))


@torch.no_grad()
def pick(q, k, past, top_k):
    """Eq. (9): for each query token and head, at most top_k past frames, of the highest scores.

    q (B, H, R, P, E), k (B, H, S, P, E), past (R, S). The score is q · phi(K_j), at least in fp32,
    without gradient. Returns the columns (B, H, R, P, K) and, of that shape, which of them are
    valid: fewer than top_k frames may be past.
    """
    with torch.autocast(q.device.type, enabled=False):
        descriptor = describe(k)
        score = einsum(q.to(descriptor.dtype), descriptor, "b h r p e, b h s e -> b h r p s")

    score = score.masked_fill_(~past.to(q.device)[:, None], -torch.inf)
    score, picked = score.topk(min(top_k, past.shape[1]), dim=-1)
    return picked, score > -torch.inf


def route(q, k, past, top_k):
    """`pick` as a table: the past frames that each token sees, bool (B, H, R, P, S).

    The token's own frame is not counted.
    """
    picked, valid = pick(q, k, past, top_k)
    seen = valid.new_zeros(*picked.shape[:-1], past.shape[1])
    return seen.scatter_(-1, picked, valid)


def visible(q, k, past, own, top_k):
    """Omega of Eq. (8), the own frame included: bool (B, H, R, P, S); (1, 1, R, 1, S) if dense."""
    if top_k is None:
        return (past | own).to(q.device)[None, None, :, None]
    return route(q, k, past, top_k) | own.to(q.device)[:, None]


def attend_masked(q, k, v, past, own, top_k=None):
    """Eq. (8), the definition: one softmax over all tokens of all frames that a token sees.

    q (B, H, R, P, E); k, v (B, H, S, P, E); past, own (R, S) -> (B, H, R, P, E). The
    reference implementation; the model calls `attend`.
    """
    seen = visible(q, k, past, own, top_k)
    score = einsum(q, k, "b h r p e, b h s j e -> b h r p s j") / q.shape[-1] ** 0.5
    score = score.masked_fill(~seen[..., None], -torch.inf)

    weight = rearrange(score, "b h r p s j -> b h r p (s j)").softmax(-1)
    return einsum(weight, v.flatten(2, 3), "b h r p n, b h n e -> b h r p e")


# ---- machinery: the same attention, faster ----

MANY = 4096  # key tokens from which FlexAttention pays for its compilation


def attend(q, k, v, past, own, top_k=None):
    """Eq. (8), fast: the outputs and gradients of `attend_masked`, without its table of scores.

    q (B, H, R, P, E); k, v (B, H, S, P, E); past, own from `sparse_causal_mask`, best on the CPU;
    top_k: Eq. (9), None for dense history. Returns (B, H, R, P, E).
    """
    rows, columns = q.shape[2], k.shape[2]
    if rows == 0:  # the last layer of a pass that only fills the cache
        return q
    if q.device.type == "cpu" or (top_k is None and rows <= 2):
        return attend_by_row(q, k, v, past, own, top_k)
    if q.is_cuda and columns * k.shape[3] >= MANY:
        return attend_flex(q, k, v, past, own, top_k, compiled_flex())
    return attend_at_once(q, k, v, past, own, top_k)


def attend_by_row(q, k, v, past, own, top_k=None):
    """`attend`, a row at a time on the frames that it sees: on a CPU, and in dense rollouts.

    Dense rows need no mask. On a CPU one call with a mask makes a training step take 1.6 x the time
    at 64 tokens a frame; at 16 there is no difference.
    """
    P = k.shape[3]
    routed = None if top_k is None else visible(q, k, past, own, top_k)
    # unbound once: the backward of each z[:, :, i] would allocate a gradient as large as z
    q_frames, k_frames, v_frames = q.unbind(2), k.unbind(2), v.unbind(2)

    out = []
    for row, sees in enumerate((past | own).tolist()):
        columns = [s for s, seen in enumerate(sees) if seen]
        keys, values = tokens_of(k, k_frames, columns), tokens_of(v, v_frames, columns)
        mask = None
        if routed is not None:
            mask = routed[:, :, row][..., columns].repeat_interleave(P, dim=-1)
        out.append(F.scaled_dot_product_attention(q_frames[row], keys, values, mask))
    return torch.stack(out, dim=2)


def tokens_of(z, frames, columns):
    """The tokens of some columns, (B, H, S, P, E) -> (B, H, columns · P, E); frames: z.unbind(2).

    Consecutive columns are a view: a rollout's rows copy nothing.
    """
    first, last = columns[0], columns[-1]
    if last - first + 1 == len(columns):
        return z[:, :, first : last + 1].flatten(2, 3)
    return torch.cat([frames[s] for s in columns], dim=2)


def attend_at_once(q, k, v, past, own, top_k=None):
    """`attend` in one call with a mask of tokens: on a GPU where there are few."""
    P = q.shape[3]
    seen = visible(q, k, past, own, top_k)
    mask = seen.expand(*seen.shape[:3], P, -1).flatten(2, 3).repeat_interleave(P, dim=-1)
    q, k, v = (z.flatten(2, 3) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).unflatten(2, (-1, P))


def attend_flex(q, k, v, past, own, top_k=None, flex=flex_attention):
    """`attend` by FlexAttention: on CUDA, where the tokens are many."""
    P = q.shape[3]
    mask = block_mask(visible(q, k, past, own, top_k), P)
    q, k, v = (z.flatten(2, 3) for z in (q, k, v))
    return flex(q, k, v, block_mask=mask).unflatten(2, (-1, P))


@cache
def compiled_flex():
    """FlexAttention, compiled at first use; a growing number of keys compiles nothing anew.

    fullgraph=True raises where torch could not compile: without it, all scores would be stored.
    """
    return torch.compile(flex_attention, fullgraph=True, dynamic=True)


def block_mask(seen, P, size=128):
    """FlexAttention's mask of R · P queries and S · P keys, from the frames that each token sees.

    seen (B or 1, H or 1, R, P or 1, S) bool. A block of `size` x `size` tokens is skipped if no
    query in it sees a frame in it, and needs no mask if all see all.
    """
    B, H, R, _, S = seen.shape
    table = seen.expand(B, H, R, P, S).flatten(2, 3)  # (B, H, queries, S)

    # the queries of each block, padded with some that see nothing
    blocks = F.pad(table, (0, 0, 0, -R * P % size)).unflatten(2, (-1, size))
    some, every = blocks.any(3), blocks.all(3)  # (B, H, blocks of queries, S)

    # the frames that each block of keys touches: (S, blocks of keys)
    start = torch.arange(0, S * P, size, device=seen.device)
    end = (start + size).clamp(max=S * P) - 1
    frame = torch.arange(S, device=seen.device)[:, None]
    touches = ((frame >= start // P) & (frame <= end // P)).float()

    needed = some.float() @ touches > 0
    full = (~every).float() @ touches == 0
    full &= start + size <= S * P  # the last block may have too few keys
    return BlockMask.from_kv_blocks(
        *block_lists(needed & ~full),
        *block_lists(full),
        BLOCK_SIZE=size,
        seq_lengths=(R * P, S * P),
        mask_mod=lambda b, h, i, j: table[b * (B > 1), h * (H > 1), i, j // P],
    )


def block_lists(blocks):
    """How many blocks each row has, and which, as BlockMask takes them: the true ones first."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts, indices
