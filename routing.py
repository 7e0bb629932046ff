"""Who sees whom: the sparse causal mask, top-k history routing, and the attention that obeys both.

A pass has rows, its query frames [history | noisy], and columns, its key frames [cached | history | noisy].
Cached and history frames are finished; they are numbered 0, 1, ... in the order of their columns. The one rule:
a frame sees itself, and every history frame with a smaller number.

B videos, H heads, P tokens in a frame, E width of a head.
"""
from functools import cache, lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from einops import einsum
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

def sparse_causal_mask(n_cached, n_history, n_noisy, first, device=None, window=None):
    """Fig. 3c, frame by frame: (past, own), two boolean tables (n_history + n_noisy, n_cached + n_history + n_noisy).
    The noisy frames are numbered first, first + 1, ...; past[r, c]: row r sees column c as history; own[r, c]: c is
    the frame r itself. A noisy frame sees no other noisy frame and never its own finished copy. window: only the last
    so many history frames are seen (None: all)."""
    finished = torch.arange(n_cached + n_history, device=device)
    noisy = first + torch.arange(n_noisy, device=device)
    age = torch.cat([finished[n_cached:], noisy])[:, None] - finished
    past = age > 0 if window is None else (age > 0) & (age <= window)
    own = torch.eye(n_history + n_noisy, dtype=torch.bool, device=device)
    return F.pad(past, (0, n_noisy)), F.pad(own, (n_cached, 0))

@lru_cache(maxsize=256)
def unpack(table, shape, device):
    """A table from its bytes, kept where it was copied to: a copy would make the host wait for the device."""
    return torch.frombuffer(bytearray(table), dtype=torch.bool).view(shape).to(device)

def at_hand(table, device):
    return table if table.device == device else unpack(table.numpy().tobytes(), table.shape, device)

def describe(k):
    """phi(K_j) of Eq. (9): the mean key of each frame, (B, H, columns, P, E) -> (B, H, columns, E), at least fp32."""
    return k.mean(dim=-2, dtype=torch.promote_types(k.dtype, torch.float32))

def pick(q, k, past, top_k, descriptor=None):
    """Eq. (9): each query token of each head picks the up to top_k past frames whose mean key it agrees with most.
    q (B, H, rows, P, E), k (B, H, columns, P, E), past (rows, columns) -> the picked columns (B, H, rows, P, K) and,
    bool and of that shape, which of them are past at all. The scores are at least fp32; no gradient passes.
    descriptor: what `describe` says of k, where it is known."""
    past = at_hand(past, q.device)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        descriptor = describe(k) if descriptor is None else descriptor
        score = einsum(q.to(descriptor.dtype), descriptor, "b h r p e, b h c e -> b h r p c")
        score, picked = score.masked_fill_(~past[:, None], -torch.inf).topk(min(top_k, past.shape[1]), dim=-1)
        return picked, score > -torch.inf

def route(q, k, past, top_k, descriptor=None):
    """`pick` as a table: which past frames each token sees, bool (B, H, rows, P, columns), its own frame not counted."""
    picked, valid = pick(q, k, past, top_k, descriptor)
    return valid.new_zeros(*picked.shape[:-1], past.shape[1]).scatter_(-1, picked, valid)

def visible(q, k, past, own, top_k, descriptor=None):
    """Which frames each token sees: bool, (B, H, rows, P, columns) if routed, else (1, 1, rows, 1, columns)."""
    if top_k is None:
        return at_hand(past | own, q.device)[None, None, :, None]
    return route(q, k, past, top_k, descriptor) | at_hand(own, q.device)[:, None]

def attend_masked(q, k, v, past, own, top_k=None):
    """Eq. (8), the definition: one softmax over all that a token sees. To be read and tested against; see `attend`."""
    seen = visible(q, k, past, own, top_k)
    score = einsum(q, k, "b h r p e, b h c s e -> b h r p c s") / q.shape[-1] ** 0.5
    weight = score.masked_fill(~seen[..., None], -torch.inf).flatten(-2).softmax(-1)
    return einsum(weight, v.flatten(2, 3), "b h r p k, b h k e -> b h r p e")

def attend(q, k, v, past, own, top_k=None, descriptor=None):
    """Eq. (8), the form that runs: `attend_masked`'s numbers and gradients, without its work on what is masked out.
    q (B, H, rows, P, E); k, v (B, H, columns, P, E); past, own from `sparse_causal_mask`, best left on the CPU;
    top_k: Eq. (9), None for dense history; descriptor: a cache's `describe(k)` -> (B, H, rows, P, E). The softmax and its
    sums are at least fp32."""
    if len(past) == 0:  # a pass that only fills the cache
        return q
    if q.is_cuda and top_k is not None:
        return attend_picked(q, k, v, past, own, top_k, descriptor)
    if q.is_cuda and len(past) > 2:
        return attend_flex(q, k, v, past, own)
    return attend_groups(q, k, v, past, own, top_k, descriptor)

def attend_groups(q, k, v, past, own, top_k, descriptor):
    """`attend` on a CPU, and for the one or two frames of a rollout's pass: a call for each group of frames that see
    nearly the same, on no more than what they see."""
    table, P, seen, out = (past | own).cpu(), q.shape[3], None, [None] * len(past)
    apart = [z.unbind(2) if z.requires_grad else z for z in (q, k, v)]  # the gradient of a slice would be as large as z
    for rows, columns, alike in plan_groups(table.numpy().tobytes(), table.shape, P):
        mask = None
        if top_k is not None or not alike:
            seen = visible(q, k, past, own, top_k, descriptor) if seen is None else seen
            mask = seen[:, :, rows][..., columns]
            mask = mask[..., None].expand(*mask.shape[:3], P, -1, P).flatten(2, 3).flatten(3)
        parts = map(tokens_of, apart, (rows, columns, columns))
        for row, part in zip(rows, F.scaled_dot_product_attention(*parts, mask).split(P, dim=2)):
            out[row] = part
    return torch.stack(out, dim=2)

def tokens_of(z, chosen):
    """The tokens (B, H, chosen · P, E) of some of the frames z, one tensor (B, H, frames, P, E) or a tuple. Neighbours in a
    tensor are a view: a rollout never copies its cache."""
    if isinstance(z, tuple):
        return torch.cat([z[i] for i in chosen], dim=2)
    neighbours = chosen[-1] - chosen[0] < len(chosen)
    return z[:, :, slice(chosen[0], chosen[-1] + 1) if neighbours else chosen].flatten(2, 3)

@lru_cache(maxsize=1024)
def plan_groups(table, shape, P):
    """How to go through a table (its bytes) of which row sees which column: [(rows, columns, alike)]. rows: a few frames that
    see nearly as many others, or one where there are but two; columns: those that some of them see; alike: all see all."""
    seen, groups = unpack(table, shape, "cpu"), []
    few = 1 if len(seen) <= 2 else 2 if P > 128 else max(4, 48 // P)  # as measured on a CPU
    for rows in seen.sum(1).argsort(stable=True).split(few):
        columns = seen[rows].any(0).nonzero()[:, 0]
        groups.append((rows.tolist(), columns.tolist(), seen[rows][:, columns].all().item()))
    return groups

def attend_flex(q, k, v, past, own):
    """`attend` where history is dense, on CUDA: FlexAttention."""
    table, P = (past | own).cpu(), q.shape[3]
    mask = dense_blocks(table.numpy().tobytes(), table.shape, P, q.device)
    return flex()(*(z.flatten(2, 3) for z in (q, k, v)), block_mask=mask).unflatten(2, (-1, P))

def sees(row, column, n_cached, n_history, first, window):
    """`sparse_causal_mask` in closed form: does a row see a column?"""
    number = torch.where(row < n_history, n_cached + row, first + row - n_history)
    past = (column < number) & (column < n_cached + n_history) & (column >= number - window)
    return past | (column == n_cached + row)

def read_table(table):
    """The numbers with which `sees` makes a table of who sees whom (itself included). Raises ValueError if none do."""
    (rows, columns), row, column = table.shape, torch.arange(len(table))[:, None], torch.arange(table.shape[1])
    past = table & (column != columns - rows + row)
    end, count = (past * (column + 1)).amax(1), past.sum(1)
    for window, n_history in product((rows + columns, count.max().item(), *range(1, rows + columns)), range(rows)):
        for first in (end[n_history].item(), (end - count)[n_history].item() + window, columns + window):
            numbers = columns - rows, n_history, first, window
            if torch.equal(sees(row, column, *numbers), table):
                return numbers
    raise ValueError("FlexAttention was given a table of frames that `sparse_causal_mask` does not make")

@cache
def flex():
    """FlexAttention, compiled when first used, once for each kind of pass; past torch's limit it fails, since uncompiled it
    would make every score."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, fullgraph=True)

@lru_cache(maxsize=64)
def dense_blocks(table, shape, P, device, size=128):
    """FlexAttention's block mask for a table (its bytes) of which row sees which column, made from the frames that
    each block touches: nothing here has more entries than there are blocks, and `sees` judges each pair of tokens."""
    seen = unpack(table, shape, "cpu")
    numbers = torch.tensor(read_table(seen), device=device).unbind()  # tensors: another table is then no other kernel
    seen = F.pad(seen, (0, 1, 0, 1))  # nothing is seen past the end, which a last block may reach
    rows, columns = ((start < frame + P) & (start + size > frame) for start, frame in (
        (torch.arange(0, n * P, size)[:, None], torch.arange(n + 1) * P) for n in shape))  # which frames a block touches
    some, others = (rows.float() @ pairs.float() @ columns.float().T > 0 for pairs in (seen, ~seen))
    kinds = [z.to(device)[None, None] for blocks in (some & others, some & ~others)
             for z in (blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int())]
    return BlockMask.from_kv_blocks(*kinds, BLOCK_SIZE=size, seq_lengths=(shape[0] * P, shape[1] * P),
                                    mask_mod=lambda b, h, q, s: sees(q // P, s // P, *numbers))

def attend_picked(q, k, v, past, own, top_k, descriptor=None):
    """`attend` where history is routed, on CUDA, at the cost of the picked frames alone.
    Each token stands in one queue for its own frame, and in one for each frame it picked (`Queues`)."""
    picked, valid = pick(q, k, past, top_k, descriptor)
    itself = at_hand(own, q.device).int().argmax(1)[:, None, None].expand(*picked.shape[:-1], 1)
    frames, valid = torch.cat([itself, picked], dim=-1), F.pad(valid, (1, 0), value=True)
    return Queues.apply(*(z.flatten(2, 3) for z in (q, k, v, frames, valid)), q.shape[3]).view_as(q)

class Queues(torch.autograd.Function):
    """One softmax over several frames, a frame at a time: queries (B, H, Q, E), keys and values (B, H, S, E), the frames
    (B, H, Q, K) that each query sees, and which of them count.
    The parts are merged by their log-sum-exp. Backward makes each part again, so that no copy of the queries is kept,
    and knows the merged softmax: of a part with weight w, its own output's gradient is w g, its log-sum-exp's
    w g · (its output - the merged output)."""
    @staticmethod
    def forward(ctx, q, k, v, frames, valid, P):
        lse = torch.full(q.shape[:-1], -torch.inf, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
        out = lse.new_zeros(q.shape)
        for frame, counts in zip(frames.unbind(-1), valid.unbind(-1)):
            part, part_lse = queue(q, k, v, frame, counts, P)
            total = torch.logaddexp(lse, part_lse)
            out = torch.lerp(out, part.to(out.dtype), (part_lse - total).exp()[..., None])
            lse = total
        out, ctx.P = out.to(q.dtype), P
        ctx.save_for_backward(q, k, v, frames, valid, out, lse)
        return out

    @staticmethod
    def backward(ctx, g):
        *inputs, frames, valid, out, lse = ctx.saved_tensors
        g, grads = g.to(lse.dtype), [torch.zeros_like(z, dtype=lse.dtype) for z in inputs]
        for frame, counts in zip(frames.unbind(-1), valid.unbind(-1)):
            leaves = [z.detach().requires_grad_() for z in inputs]
            with torch.enable_grad():
                part, part_lse = queue(*leaves, frame, counts, ctx.P)
            g_part = g * (part_lse.detach() - lse).exp()[..., None]
            g_lse = (g_part * (part.detach() - out)).sum(-1)
            for total, grad in zip(grads, torch.autograd.grad((part, part_lse), leaves, (g_part.to(part.dtype), g_lse))):
                total += grad
        return *(grad.to(z.dtype) for grad, z in zip(grads, inputs)), None, None, None

def queue(q, k, v, frame, counts, P):
    """Each query's attention to the frame it waits for: (out (B, H, Q, E), log-sum-exp (B, H, Q), -inf where it does not
    count). The queries are sorted by frame, and back."""
    frame, order = frame.sort(dim=-1, stable=True)
    out, lse = attend_one_frame(q.gather(2, order[..., None].expand_as(q)), k, v, frame, P)
    back = order.argsort(dim=-1)
    return out.gather(2, back[..., None].expand_as(q)), lse.gather(-1, back).masked_fill(~counts, -torch.inf)

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
