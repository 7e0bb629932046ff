"""Attention between frames: the sparse causal mask, top-k history routing, and both applied.

A pass has rows, its query frames [history | noisy], and columns, its key frames
[cached | history | noisy]. Cached and history frames are finished and numbered 0, 1, ... in the
order of their columns. One rule gives Fig. 3c, training and sampling:

    a frame sees itself, and every history frame with a smaller number.

B videos, H heads, R rows, S columns, P tokens in a frame, E width of a head, K picked frames.
"""

from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # a cached inference tensor could not be used in training
def sparse_causal_mask(n_cached, n_history, n_noisy, first, device=None, window=None):
    """Fig. 3c, frame by frame: (past, own), two boolean tables (R, S); do not write to them.

    The noisy frames are numbered first, first + 1, ... past[r, s]: row r sees column s as history.
    own[r, s]: column s is row r itself. A noisy frame sees no other noisy frame and never its own
    finished copy. window: see the last `window` history frames only (None: all).
    The same arguments return the same two tensors.
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
def pick(q, k, past, top_k, descriptor=None):
    """Eq. (9): for each query token and head, at most top_k past frames, of the highest scores.

    q (B, H, R, P, E), k (B, H, S, P, E), past (R, S). The score is q · phi(K_j), at least in fp32,
    without gradient. descriptor: `describe(k)`, precomputed; k may then be None.
    Returns the columns (B, H, R, P, K) and, of that shape, which of them are valid: fewer than
    top_k frames may be past.
    """
    with torch.autocast(q.device.type, enabled=False):
        descriptor = describe(k) if descriptor is None else descriptor
        score = einsum(q.to(descriptor.dtype), descriptor, "b h r p e, b h s e -> b h r p s")

    score = score.masked_fill_(~past.to(q.device)[:, None], -torch.inf)
    score, picked = score.topk(min(top_k, past.shape[1]), dim=-1)
    return picked, score > -torch.inf


def route(q, k, past, top_k, descriptor=None):
    """`pick` as a table: the past frames that each token sees, bool (B, H, R, P, S).

    The token's own frame is not counted.
    """
    picked, valid = pick(q, k, past, top_k, descriptor)
    seen = valid.new_zeros(*picked.shape[:-1], past.shape[1])
    return seen.scatter_(-1, picked, valid)


def visible(q, k, past, own, top_k, descriptor=None):
    """Omega of Eq. (8), the own frame included: bool (B, H, R, P, S); (1, 1, R, 1, S) if dense."""
    if top_k is None:
        return (past | own).to(q.device)[None, None, :, None]
    return route(q, k, past, top_k, descriptor) | own.to(q.device)[:, None]


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


# ---- machinery: the same attention, faster: on a CPU, with FlexAttention, routed on CUDA ----


def attend(q, k, v, past, own, top_k=None, descriptor=None):
    """Eq. (8), optimized: the outputs and gradients of `attend_masked`, without its full table.

    q (B, H, R, P, E); k, v (B, H, S, P, E); past, own from `sparse_causal_mask`; top_k: Eq. (9),
    None for dense history; descriptor: `describe(k)`, precomputed. Returns (B, H, R, P, E).
    """
    if q.shape[2] == 0:  # the last layer of a pass that only fills the cache
        return q
    if q.is_cuda and top_k is not None:
        return attend_picked(q, k, v, past, own, top_k, descriptor)
    if q.is_cuda and q.shape[2] > 2:
        return attend_flex(q, k, v, past, own)
    return attend_groups(q, k, v, past, own, top_k, descriptor)


def attend_groups(q, k, v, past, own, top_k, descriptor=None):
    """`attend` on a CPU, and on CUDA for the one or two rows of a rollout's pass.

    One call of torch's attention per group of rows, on the columns that the group sees. Against
    one call with a dense mask this makes a whole training step 1.5 x faster with 64 tokens a frame
    and 1.07 x with 16 (two-core CPU, 10 frames).
    """
    P = q.shape[3]
    groups = row_groups(past, own)
    if top_k is not None or not all(all_visible for _, _, all_visible in groups):
        seen = visible(q, k, past, own, top_k, descriptor)
    out = [None] * q.shape[2]
    # unbind once: the gradient of a slice is as large as the whole tensor
    q_frames, k_frames, v_frames = q.unbind(2), k.unbind(2), v.unbind(2)

    for rows, columns, all_visible in groups:
        mask = None
        if top_k is not None or not all_visible:
            mask = token_mask(seen[:, :, rows][..., columns], P)
        group = F.scaled_dot_product_attention(
            gather_frames(q, q_frames, rows),
            gather_frames(k, k_frames, columns),
            gather_frames(v, v_frames, columns),
            mask,
        )
        for row, result in zip(rows, group.split(P, dim=2)):
            out[row] = result
    return torch.stack(out, dim=2)


@lru_cache(maxsize=1024)  # by identity: sparse_causal_mask returns the same tables again
def row_groups(past, own):
    """Split the rows into groups with similar visible columns: [(rows, columns, all_visible)].

    columns: those that at least one row sees, in rising order. all_visible: every row of the group
    sees every one of them, so that no mask is needed. One or two rows are groups of their own.
    """
    seen = (past | own).cpu()
    size = 1 if len(seen) <= 2 else 4
    groups = []
    for rows in seen.sum(1).argsort(stable=True).split(size):
        columns = seen[rows].any(0).nonzero()[:, 0]
        all_visible = bool(seen[rows][:, columns].all())
        groups.append((rows.tolist(), columns.tolist(), all_visible))
    return groups


def gather_frames(z, frames, chosen):
    """The tokens of the chosen frames in their order, (B, H, S, P, E) -> (B, H, chosen · P, E).

    frames: z.unbind(2). Consecutive frames are a view, so that a rollout never copies its cache.
    """
    first, last = chosen[0], chosen[-1]
    if chosen == list(range(first, last + 1)):
        return z[:, :, first : last + 1].flatten(2, 3)
    return torch.cat([frames[i] for i in chosen], dim=2)


def token_mask(seen, P):
    """A table of frames (B, H, R, P or 1, S) -> a mask of tokens (B, H, R · P, S · P)."""
    seen = seen.expand(*seen.shape[:3], P, -1).flatten(2, 3)
    return seen[..., None].expand(*seen.shape, P).flatten(3)


def attend_flex(q, k, v, past, own):
    """`attend` with dense history on CUDA: FlexAttention."""
    P = q.shape[3]
    q, k, v = (rearrange(z, "b h n p e -> b h (n p) e") for z in (q, k, v))
    out = compiled_flex()(q, k, v, block_mask=frame_block_mask(past, own, P))
    return rearrange(out, "b h (r p) e -> b h r p e", p=P)


@cache
def compiled_flex():
    """FlexAttention, compiled at first use, once per kind of pass.

    fullgraph=True raises at torch's recompile limit; eager mode would materialize all scores.
    """
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, fullgraph=True)


@lru_cache(maxsize=64)  # by identity, as row_groups
def frame_block_mask(past, own, P, size=128):
    """FlexAttention's block mask of the frame tables, in blocks of `size` x `size` tokens.

    Counts the visible pairs of frames under each block with a summed-area table of frames, so that
    no table has an entry per token. Pairs of tokens inside a block look up the frame table.
    """
    seen = past | own
    area = seen.int().cumsum(0).cumsum(1)  # visible pairs above and to the left
    area = F.pad(area, (1, 0, 1, 0))
    top, bottom, whole_rows = frames_of_blocks(seen.shape[0], P, size, seen.device)
    left, right, whole_columns = frames_of_blocks(seen.shape[1], P, size, seen.device)
    count = area[bottom][:, right] - area[top][:, right]
    count = count - area[bottom][:, left] + area[top][:, left]
    pairs = (bottom - top)[:, None] * (right - left)

    # a block past the end has tokens to leave out
    full = (count == pairs) & whole_rows[:, None] & whole_columns
    partial = (count > 0) & ~full
    partial_counts, partial_indices = block_lists(partial)
    full_counts, full_indices = block_lists(full)
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=size,
        seq_lengths=(seen.shape[0] * P, seen.shape[1] * P),
        mask_mod=lambda b, h, q, s: seen[q // P, s // P],
    )


def frames_of_blocks(n, P, size, device):
    """For each block of `size` tokens of n frames: its first frame, its last frame + 1, and whether
    all its tokens exist."""
    start = torch.arange(0, n * P, size, device=device)
    end = (start + size).clamp(max=n * P)
    return start // P, (end - 1) // P + 1, start + size <= n * P


def block_lists(blocks):
    """The true blocks of each row as BlockMask takes them: counts, and indices, true ones first."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None]


def attend_picked(q, k, v, past, own, top_k, descriptor=None):
    """`attend` with routed history on CUDA, computing the picked frames only.

    Each token attends to its own frame and to each frame that it picked, one after another, and
    the parts are merged by their log-sum-exp (`MergedAttention`).
    """
    P = q.shape[3]
    picked, valid = pick(q, k, past, top_k, descriptor)
    itself = own.to(q.device).int().argmax(1)  # (R,)
    itself = itself[:, None, None].expand(*picked.shape[:-1], 1)
    frames = torch.cat([itself, picked], dim=-1)  # (B, H, R, P, 1 + K)
    valid = F.pad(valid, (1, 0), value=True)

    flat = (z.flatten(2, 3) for z in (q, k, v, frames, valid))
    return MergedAttention.apply(*flat, P).view_as(q)


class MergedAttention(torch.autograd.Function):
    """One softmax over several frames, computed a frame at a time.

    Queries (B, H, Q, E), keys and values (B, H, S · P, E), frames (B, H, Q, K) seen by each query,
    valid of that shape. Backward computes each part again, so that no copy of the queries is kept.
    With w_i = exp(lse_i - lse), the gradient of the one softmax is w_i g for out_i and
    w_i g · (out_i - out) for lse_i.
    """

    @staticmethod
    def forward(ctx, q, k, v, frames, valid, P):
        dtype = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(q.shape[:-1], -torch.inf, device=q.device, dtype=dtype)
        out = lse.new_zeros(q.shape)

        for frame, counts in zip(frames.unbind(-1), valid.unbind(-1)):
            part, part_lse = attend_one_frame(q, k, v, frame, counts, P)
            total = torch.logaddexp(lse, part_lse)
            out = torch.lerp(out, part.to(dtype), (part_lse - total).exp()[..., None])
            lse = total

        out = out.to(q.dtype)
        ctx.P = P
        ctx.save_for_backward(q, k, v, frames, valid, out, lse)
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, frames, valid, out, lse = ctx.saved_tensors
        g = g.to(lse.dtype)
        grads = [torch.zeros_like(z, dtype=lse.dtype) for z in (q, k, v)]

        for frame, counts in zip(frames.unbind(-1), valid.unbind(-1)):
            leaves = [z.detach().requires_grad_() for z in (q, k, v)]
            with torch.enable_grad():
                part, part_lse = attend_one_frame(*leaves, frame, counts, ctx.P)
            weight = (part_lse.detach() - lse).exp()[..., None]
            g_part = weight * g
            g_lse = (g_part * (part.detach() - out)).sum(-1)
            of_part = torch.autograd.grad((part, part_lse), leaves, (g_part.to(part.dtype), g_lse))
            for grad, more in zip(grads, of_part):
                grad += more

        grads = (grad.to(z.dtype) for grad, z in zip(grads, (q, k, v)))
        return *grads, None, None, None


def attend_one_frame(q, k, v, frame, counts, P):
    """Attention of each query to the P tokens of one frame, `frame` (B, H, Q).

    Returns (B, H, Q, E) and the log-sum-exp (B, H, Q), -inf where `counts` is false. Sorts the
    queries by frame, so that a block of queries needs few blocks of keys, and back.
    """
    frame, order = frame.sort(dim=-1, stable=True)
    q = q.gather(2, order[..., None].expand_as(q))
    if q.is_cuda:
        mask = queue_block_mask(frame, k.shape[2], P)
        out, aux = compiled_flex()(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))
        lse = aux.lse
    else:  # for the tests: FlexAttention has no backward on a CPU
        score = q @ k.mT / q.shape[-1] ** 0.5
        other = frame[..., None] != torch.arange(k.shape[2], device=k.device) // P
        score = score.masked_fill(other, -torch.inf)
        out, lse = score.softmax(-1) @ v, score.logsumexp(-1)

    back = order.argsort(dim=-1)
    out = out.gather(2, back[..., None].expand_as(out))
    lse = lse.gather(-1, back).masked_fill(~counts, -torch.inf)
    return out, lse


def queue_block_mask(frame, n_keys, P, size=512):
    """The block mask of queries sorted by the frame (B, H, Q) that each attends to.

    A block of queries takes the blocks of keys from its first frame to its last.
    """
    Q, blocks = frame.shape[-1], -(-n_keys // size)
    start = torch.arange(0, Q, size, device=frame.device)
    end = (start + size).clamp(max=Q) - 1
    low = frame[..., start] * P // size
    high = (frame[..., end] * P + P - 1) // size

    counts = (high - low + 1).int()
    indices = (low[..., None] + torch.arange(blocks, device=frame.device)).clamp(max=blocks - 1)
    return BlockMask.from_kv_blocks(
        counts,
        indices.int(),
        BLOCK_SIZE=size,
        seq_lengths=(Q, n_keys),
        mask_mod=lambda b, h, q, s: frame[b, h, q] == s // P,
    )
