"""Who sees whom: the sparse causal mask, top-k history routing, and the attention that obeys both.

A pass has rows, its query frames [history | noisy], and columns, its key frames [cached | history | noisy].
Cached and history frames are finished; they are numbered 0, 1, ... in the order of their columns. The one rule:
a frame sees itself, and every history frame with a smaller number.

B videos, H heads, P tokens in a frame, E width of a head.
"""
from functools import lru_cache
from itertools import zip_longest

import torch
import torch.nn.functional as F
from einops import einsum


def sparse_causal_mask(n_cached, n_history, n_noisy, first, device=None):
    """Fig. 3c, frame by frame: (past, own), two boolean tables (n_history + n_noisy, n_cached + n_history + n_noisy).

    The noisy frames are numbered first, first + 1, ...; past[r, c]: row r sees column c as history; own[r, c]: c is
    the frame r itself. A noisy frame sees no other noisy frame and never its own finished copy.
    """
    finished = torch.arange(n_cached + n_history, device=device)
    noisy = first + torch.arange(n_noisy, device=device)
    past = torch.cat([finished[n_cached:], noisy])[:, None] > finished
    past = F.pad(past, (0, n_noisy))
    own = torch.eye(n_history + n_noisy, dtype=torch.bool, device=device)
    return past, F.pad(own, (n_cached, 0))


def route(q, k, past, top_k):
    """Eq. (9): each query token of each head picks the up to top_k past frames whose mean key it agrees with most.

    q (B, H, rows, P, E), k (B, H, columns, P, E), past (rows, columns) -> bool (B, H, rows, P, columns). The scores
    are at least fp32 and the choice carries no gradient. A frame itself is always seen and is not counted here.
    """
    past, wide = past.to(q.device), torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        descriptor = k.mean(dim=-2, dtype=wide)  # phi(K_j)
        score = einsum(q.to(wide), descriptor, "b h r p e, b h c e -> b h r p c")
        score.masked_fill_(~past[:, None], -torch.inf)
        picked = score.topk(min(top_k, past.shape[1]), dim=-1).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, picked, True) & past[:, None]


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


@torch.compiler.disable  # the plan is made in python, from tables
def attend(q, k, v, past, own, top_k=None):
    """Eq. (8), the form that runs: `attend_masked`'s numbers and gradients, without its work on what is masked out.

    q (B, H, rows, P, E); k, v (B, H, columns, P, E); past, own from `sparse_causal_mask`, best left on the CPU;
    top_k: Eq. (9), None for dense history -> (B, H, rows, P, E). The softmax and its sums are at least fp32.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        seen = visible(q, k, past, own, top_k).flatten(0, 1)
        table = (past | own).cpu()
        plan = plan_groups(table.numpy().tobytes(), table.shape, q.shape[3], q.device)
        out = GroupedAttention.apply(*(z.to(wide).flatten(0, 1) for z in (q, k, v)), seen, plan)
    return out.unflatten(0, q.shape[:2]).to(q.dtype)


@lru_cache(maxsize=1024)
def plan_groups(table, shape, tokens, device, target=64):
    """How to go through a table (its bytes) of which row sees which column: [(rows, columns, ragged)].

    rows: frames that see nearly as many others, about `target` tokens of each of the two sequences; columns: those
    that some of them see; ragged: how many of these come before the first that not all of them see.
    """
    seen, groups = torch.frombuffer(bytearray(table), dtype=torch.bool).view(shape) if table else torch.zeros(shape), []
    for rows in seen.sum(1).argsort(stable=True).split(2 * max(1, target // tokens)):
        if len(rows):
            columns = seen[rows].any(0).nonzero()[:, 0]
            ragged = seen[rows][:, columns].all(0).long().cumprod(0).sum().item()
            groups.append((span(rows.sort().values, device), span(columns, device), ragged))
    return groups


def span(index, device):
    """Rising indices as a slice if they are consecutive: what it takes is then a view, not a copy."""
    first, last = index[0].item(), index[-1].item()
    return slice(first, last + 1) if last - first + 1 == len(index) else index.to(device)


class GroupedAttention(torch.autograd.Function):
    """Softmax attention by groups of rows, each over the columns that it sees and no others.

    All groups add into one gradient. The first KEPT weights are kept for backward, further ones are made anew there:
    time where it is cheap, and memory linear in the frames where it is not. q, k, v (B H, frames, P, E); seen (B H or
    1, rows, P or 1, columns).
    """
    KEPT = 2 ** 26

    @staticmethod
    def forward(ctx, q, k, v, seen, plan):
        out, kept, room = torch.empty_like(q), [], GroupedAttention.KEPT
        for group in plan:
            rows, columns, _ = group
            weight = weights(q, k, seen, *group)
            out[:, rows] = (weight @ take(v, columns)).unflatten(1, (-1, q.shape[2]))
            room -= weight.numel()
            if room >= 0 and any(ctx.needs_input_grad):
                kept.append(weight)
        ctx.save_for_backward(q, k, v, seen, out, *kept)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, seen, out, *kept = ctx.saved_tensors
        dq, dk, dv, scale = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), q.shape[-1] ** -0.5
        mean = (grad * out).sum(-1, keepdim=True)
        for group, weight in zip_longest(ctx.plan, kept):
            rows, columns, _ = group
            weight, g = weights(q, k, seen, *group) if weight is None else weight, take(grad, rows)
            dscore = torch.baddbmm(take(mean, rows), g, take(v, columns).mT, beta=-1).mul_(weight)
            dq[:, rows] = (dscore @ take(k, columns)).mul_(scale).unflatten(1, (-1, q.shape[2]))
            add(dk, columns, (dscore.mT @ (take(q, rows) * scale)).unflatten(1, (-1, q.shape[2])))
            add(dv, columns, (weight.mT @ g).unflatten(1, (-1, q.shape[2])))
        return dq, dk, dv, None, None


def weights(q, k, seen, rows, columns, ragged):
    """The softmax of a group, (B H, queries, keys)."""
    score = (take(q, rows) * q.shape[-1] ** -0.5) @ take(k, columns).mT
    seen, P = seen[:, rows][..., columns], q.shape[2]
    ragged = ragged if seen.shape[2] == 1 else 0  # routed, every token has a choice of its own
    if ragged < seen.shape[-1]:
        B, n_rows, _, n_columns = seen.shape
        by_token = seen[..., None].expand(B, n_rows, P, n_columns, P).reshape(B, n_rows * P, n_columns * P)
        score[..., ragged * P:].masked_fill_(~by_token[..., ragged * P:], -torch.inf)
    return score.softmax(-1)


def take(z, index):
    """The tokens of the chosen frames: (B H, frames, P, E) -> (B H, chosen · P, E)."""
    return (z[:, index] if isinstance(index, slice) else z.index_select(1, index)).flatten(1, 2)


def add(total, index, part):
    """total[:, index] += part, for indices that do not repeat."""
    if isinstance(index, slice):
        total[:, index] += part
    else:
        total.index_add_(1, index, part)
