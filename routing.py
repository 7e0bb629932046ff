"""Who sees whom: the sparse causal mask, top-k history routing, and the attention that obeys both.

A pass has rows, its query frames [history | noisy], and columns, its key frames [cached | history | noisy].
Cached and history frames are finished; they are numbered 0, 1, ... in the order of their columns. The one rule:
a frame sees itself, and every history frame with a smaller number.

B videos, H heads, P tokens in a frame, E width of a head.
"""
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from einops import einsum
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention


def sparse_causal_mask(n_cached, n_history, n_noisy, first, device=None, window=None):
    """Fig. 3c, frame by frame: (past, own), two boolean tables (n_history + n_noisy, n_cached + n_history + n_noisy).

    The noisy frames are numbered first, first + 1, ...; past[r, c]: row r sees column c as history; own[r, c]: c is
    the frame r itself. A noisy frame sees no other noisy frame and never its own finished copy. window: only the last
    so many history frames are seen (None: all).
    """
    finished = torch.arange(n_cached + n_history, device=device)
    noisy = first + torch.arange(n_noisy, device=device)
    age = torch.cat([finished[n_cached:], noisy])[:, None] - finished
    past = age > 0 if window is None else (age > 0) & (age <= window)
    past = F.pad(past, (0, n_noisy))
    own = torch.eye(n_history + n_noisy, dtype=torch.bool, device=device)
    return past, F.pad(own, (n_cached, 0))


def pick(q, k, past, top_k):
    """Eq. (9): each query token of each head picks the up to top_k past frames whose mean key it agrees with most.

    q (B, H, rows, P, E), k (B, H, columns, P, E), past (rows, columns) -> the picked columns (B, H, rows, P, K) and,
    bool and of that shape, which of them are past at all. The scores are at least fp32; no gradient passes.
    """
    past, wide = past.to(q.device), torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        descriptor = k.mean(dim=-2, dtype=wide)  # phi(K_j)
        score = einsum(q.to(wide), descriptor, "b h r p e, b h c e -> b h r p c")
        score, picked = score.masked_fill_(~past[:, None], -torch.inf).topk(min(top_k, past.shape[1]), dim=-1)
        return picked, score > -torch.inf


def route(q, k, past, top_k):
    """`pick` as a table: which past frames each token sees, bool (B, H, rows, P, columns). A frame itself is always seen
    and is not counted here."""
    picked, valid = pick(q, k, past, top_k)
    return valid.new_zeros(*picked.shape[:-1], past.shape[1]).scatter_(-1, picked, valid)


def visible(q, k, past, own, top_k):
    """Which frames each token sees: bool, (B, H, rows, P, columns) if routed, else (1, 1, rows, 1, columns)."""
    if top_k is None:
        return (past | own).to(q.device)[None, None, :, None]
    return route(q, k, past, top_k) | own.to(q.device)[:, None]


def attend_masked(q, k, v, past, own, top_k=None):
    """Eq. (8), the definition: one softmax over all that a token sees. To be read and tested against; see `attend`."""
    seen = visible(q, k, past, own, top_k)
    score = einsum(q, k, "b h r p e, b h c s e -> b h r p c s") / q.shape[-1] ** 0.5
    weight = score.masked_fill(~seen[..., None], -torch.inf).flatten(-2).softmax(-1)
    return einsum(weight, v.flatten(2, 3), "b h r p k, b h k e -> b h r p e")


def attend(q, k, v, past, own, top_k=None):
    """Eq. (8), the form that runs: `attend_masked`'s numbers and gradients, without its work on what is masked out.

    q (B, H, rows, P, E); k, v (B, H, columns, P, E); past, own from `sparse_causal_mask`, best left on the CPU;
    top_k: Eq. (9), None for dense history -> (B, H, rows, P, E). The softmax and its sums are at least fp32.
    """
    if len(past) == 0:  # a pass that only fills the cache
        return q
    if q.is_cuda and top_k is not None:
        return attend_picked(q, k, v, past, own, top_k)
    if q.is_cuda and len(past) > 2:
        return attend_flex(q, k, v, past, own)
    return attend_groups(q, k, v, past, own, top_k)


def attend_groups(q, k, v, past, own, top_k):
    """`attend` on a CPU, and for the one or two frames of a rollout's pass: a call for each group of frames that see
    nearly the same, on no more than what they see."""
    table, P, seen, out = (past | own).cpu(), q.shape[3], None, []
    groups, back = plan_groups(table.numpy().tobytes(), table.shape, P, q.device)
    for rows, columns, alike in groups:
        mask = None
        if top_k is not None or not alike:
            seen = visible(q, k, past, own, top_k) if seen is None else seen
            mask = seen[:, :, rows][..., columns]
            mask = mask[..., None].expand(*mask.shape[:3], P, -1, P).flatten(2, 3).flatten(3)
        part = F.scaled_dot_product_attention(take(q, rows), take(k, columns), take(v, columns), mask)
        out.append(part.unflatten(2, (-1, P)))
    return torch.cat(out, dim=2)[:, :, back]


@lru_cache(maxsize=1024)
def plan_groups(table, shape, tokens, device, target=32):
    """How to go through a table (its bytes) of which row sees which column: ([(rows, columns, alike)], order).

    rows: frames that see nearly as many others, about `target` tokens of each of the two sequences, or one frame where
    there are but two; columns: those that some of them see; alike: all see all of these; order: puts the rows back.
    """
    seen, groups = torch.frombuffer(bytearray(table), dtype=torch.bool).view(shape), []
    by_reach = seen.sum(1).argsort(stable=True).split(1 if len(seen) <= 2 else 2 * max(1, target // tokens))
    for rows in by_reach:
        columns = seen[rows].any(0).nonzero()[:, 0]
        groups.append((span(rows, device), span(columns, device), seen[rows][:, columns].all().item()))
    return groups, span(torch.cat(by_reach).argsort(), device)


def span(index, device):
    """Consecutive indices as a slice: what it takes is then a view, not a copy."""
    first, last = index[0].item(), index[-1].item()
    consecutive = torch.equal(index, torch.arange(first, last + 1))
    return slice(first, last + 1) if consecutive else index.to(device)


def take(z, index):
    """The tokens of the chosen frames: (B, H, frames, P, E) -> (B, H, chosen · P, E)."""
    return z[:, :, index].flatten(2, 3)


def attend_flex(q, k, v, past, own):
    """`attend` where history is dense, on CUDA: FlexAttention."""
    table, P = (past | own).cpu(), q.shape[3]
    mask = dense_blocks(table.numpy().tobytes(), table.shape, P, q.device)
    return flex()(*(z.flatten(2, 3) for z in (q, k, v)), block_mask=mask).unflatten(2, (-1, P))


def closed_form(n_cached, n_history, first, window):
    """`sparse_causal_mask` without a table: a function that tells whether a row sees a column."""
    def sees(row, column):
        itself = n_cached + row
        end = torch.where(row < n_history, itself, first + row - n_history)
        return (column == itself) | (column < end) & (column >= end - window)
    return sees


def read_table(table):
    """The numbers of `closed_form` that make a table of who sees whom (itself included). Raises ValueError if none do."""
    (rows, columns), row, column = table.shape, torch.arange(len(table))[:, None], torch.arange(table.shape[1])
    past = table & (column != columns - rows + row)
    end = (past * (column + 1)).amax(1)
    n_history = (end == columns - rows + row[:, 0]).long().cumprod(0).sum()
    first = end[n_history] if n_history < rows else torch.tensor(0)
    numbers = torch.stack([torch.tensor(columns - rows), n_history, first, past.sum(1).amax()])
    if not torch.equal(closed_form(*numbers)(row, column), table):
        raise ValueError("FlexAttention was given a table of frames that `sparse_causal_mask` does not make")
    return numbers


@cache
def flex():
    """FlexAttention, compiled when first used."""
    return torch.compile(flex_attention)


@lru_cache(maxsize=64)
def dense_blocks(table, shape, P, device, size=128):
    """FlexAttention's block mask for a table (its bytes) of which row sees which column, made from the counts of frame
    pairs in each block: nothing here has more entries than there are blocks, and each pair of tokens is judged by
    `closed_form`."""
    seen = torch.frombuffer(bytearray(table), dtype=torch.bool).view(shape)
    sees = closed_form(*read_table(seen).to(device))
    below = F.pad(seen.int().cumsum(0).cumsum(1), (1, 0, 1, 0))  # how many pairs are seen above and left of a corner
    (r0, r1, whole_rows), (c0, c1, whole_columns) = (frames_of_blocks(n, P, size) for n in seen.shape)
    count = below[r1][:, c1] - below[r0][:, c1] - below[r1][:, c0] + below[r0][:, c0]
    full = (count == (r1 - r0)[:, None] * (c1 - c0)) & whole_rows[:, None] & whole_columns
    kinds = [z.to(device)[None, None] for blocks in ((count > 0) & ~full, full)
             for z in (blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int())]
    return BlockMask.from_kv_blocks(*kinds, BLOCK_SIZE=size, seq_lengths=(shape[0] * P, shape[1] * P),
                                    mask_mod=lambda b, h, q, s: sees(q // P, s // P))


def frames_of_blocks(frames, P, size):
    """Of each block of `size` tokens: its first frame, the one after its last, and whether it is a whole block."""
    start = torch.arange(0, frames * P, size)
    end = start + size
    return start // P, (end.clamp(max=frames * P) - 1) // P + 1, end <= frames * P


def attend_picked(q, k, v, past, own, top_k):
    """`attend` where history is routed, on CUDA, at the cost of the picked frames alone.

    Each token goes, once for its own frame and once for every frame it picked, into a queue sorted by frame; the queue
    attends, each entry to its one frame; a token's parts are merged by their log-sum-exp, which carries gradient.
    """
    picked, valid = pick(q, k, past, top_k)
    itself = own.int().argmax(1).to(q.device)[:, None, None].expand(*picked.shape[:-1], 1)
    picked, valid = torch.cat([itself, picked], dim=-1).flatten(2), F.pad(valid, (1, 0), value=True)
    frame, order = picked.sort(dim=-1, stable=True)
    token = order // valid.shape[-1]
    entries = token[..., None].expand(*token.shape, q.shape[-1])
    out, lse = attend_one_frame(q.flatten(2, 3).gather(2, entries), k.flatten(2, 3), v.flatten(2, 3), frame, q.shape[3])
    lse = lse.masked_fill(~valid.flatten(2).gather(-1, order), -torch.inf)  # fewer past frames than top_k
    total = torch.empty_like(lse).scatter(-1, order, lse).unflatten(-1, (-1, valid.shape[-1])).logsumexp(-1)
    part = out * (lse - total.gather(-1, token)).exp()[..., None]
    return part.new_zeros(q.flatten(2, 3).shape).scatter_add(2, entries, part).to(q.dtype).view_as(q)


def attend_one_frame(q, k, v, frame, P):
    """Queries (B, H, Q, E), each to the P keys of its frame (B, H, Q), in rising order -> (out, log-sum-exp (B, H, Q))."""
    if not q.is_cuda:  # to be tested where FlexAttention has no backward
        score = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(frame[..., None] != torch.arange(k.shape[2]) // P, -torch.inf)
        return score.softmax(-1) @ v, score.logsumexp(-1)
    out, aux = flex()(q, k, v, block_mask=picked_blocks(frame, k.shape[2], P), return_aux=AuxRequest(lse=True))
    return out, aux.lse


def picked_blocks(frame, S, P, size=512):
    """The block mask of `attend_one_frame`: each block of the queue spans the keys from its first frame to its last."""
    Q, blocks = frame.shape[-1], -(-S // size)
    start = torch.arange(0, Q, size, device=frame.device)
    low, high = frame[..., start] * P // size, (frame[..., (start + size - 1).clamp(max=Q - 1)] * P + P - 1) // size
    index = (low[..., None] + torch.arange(blocks, device=frame.device)).clamp(max=blocks - 1)
    return BlockMask.from_kv_blocks((high - low + 1).int(), index.int(), BLOCK_SIZE=size, seq_lengths=(Q, S),
                                    mask_mod=lambda b, h, q, s: frame[b, h, q] == s // P)
