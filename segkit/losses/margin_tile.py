"""Margin calibration of one tile of pixels: loss and gradient, in three ways that give the same numbers.

``margin_tile`` is the plain path, ``tied_margin_tile`` its form where scores tie for a maximum, ``margin_dense`` the
one for a compiler. All take logits s (K,P), labels y (P,) and margins (K,) times c, and return loss (P,) and gradient
(K,P). With lambda, x and w as in ``segkit.losses.margin_calibration``, g_k = sigmoid(x_k) for k != y,
g_y = -w_pos sigmoid(x_y), m1 and m2 the classes of the largest score and the runner-up, and G the sum of all g, the
gradient is g_k, except 2 g_m1 - G at m1 and, at m2, g_m2 - g_m1.

Tied scores share equally what one of them would get: of t > 1 tied maxima each pays (G - G_M) / t for the classes
outside the tie (G_M: sum of g inside) and (G_M - g_k) / (t - 1) for the others inside, whose runner-up it is; of r tied
runner-ups each pays g_m1 / r. That is a sub-gradient, sums to zero and does not depend on the order of the classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from segkit.losses.elementary import LOG2_E, log1p, softplus
from segkit.losses.tiles import Workspace

BIG = 1e30
SATURATED = {torch.float32: 20.0, torch.float64: 40.0}
"""From this z on softplus(z) is z, and sigmoid(z) is 1, to the last bit."""


def margin_tile(
    s: Tensor, y: Tensor, work: Workspace, rho_k0: Tensor, rho_0k: Tensor, c: float, w_pos: float
) -> tuple[Tensor, Tensor]:
    """Loss (P,) and gradient (K,P): the head of this file.

    Written for few passes over (K,P) and few calls: lambda and x are put right at maximum and label, pixel by pixel;
    the pixels whose maximum is tied are computed apart.
    """
    if torch.compiler.is_compiling() or s.device.type != "cpu":  # asking for a value is impossible or slow
        return tied_margin_tile(s, y, work, rho_k0, rho_0k, c, w_pos)
    given, num = s, len(s)
    s = torch.sub(s, s.amax(0), out=work.buffer("below the maximum", s))
    is_top = torch.eq(s, 0, out=work.buffer("is top", s))
    found = (torch.arange(num, 2 * num, dtype=s.dtype)[None] @ is_top)[0]  # K + k: class k alone; above 2 K: several
    tied = (found > 2 * num).nonzero()[:, 0] if float(found.amax()) > 2 * num else y[:0]
    if 4 * len(tied) > len(y):
        return tied_margin_tile(given, y, work, rho_k0, rho_0k, c, w_pos)
    top = found.sub_(num).clamp_(0, num - 1).long()
    pixels = torch.arange(len(y))  # in a flat (K,P) the scores of class k are len(y) k + pixels
    at_label, at_top = (torch.add(pixels, k, alpha=len(y)) for k in (y, top))

    flat = s.view(-1).index_fill_(0, at_top, torch.finfo(s.dtype).min)
    second = s.amax(0)
    is_second = torch.eq(s, second, out=is_top)
    flat.index_copy_(0, at_top, -second)  # s is lambda now
    label_x = torch.add(rho_k0.index_select(0, y), flat.index_select(0, at_label), alpha=-c)
    x = torch.add(LOG2_E * rho_0k[:, None], s, alpha=LOG2_E * c, out=s)
    flat.index_copy_(0, at_label, LOG2_E * label_x)
    limit = float(rho_0k.amax())
    beyond = None
    if max(float(label_x.amax()), limit - c * float(second.amin())) > SATURATED[s.dtype] >= limit:
        beyond = sum(_cut_off(flat, place, LOG2_E * SATURATED[s.dtype]) for place in (at_top, at_label))
    loss, g = softplus_sum(x, work, limit=limit)
    if beyond is not None:
        loss.add_(beyond, alpha=1 / LOG2_E)
    if w_pos != 1:
        loss.add_(softplus(label_x), alpha=w_pos - 1)

    flat = g.view(-1).index_copy_(0, at_label, torch.sigmoid(label_x).mul_(-w_pos))
    top_g = flat.index_select(0, at_top)
    flat.index_copy_(0, at_top, torch.sub(2 * top_g, g.sum(0)))
    g.addcmul_(is_second, top_g / is_second.sum(0), value=-1)
    loss /= c
    if len(tied):
        apart = tied_margin_tile(given.index_select(1, tied), y[tied], Workspace(), rho_k0, rho_0k, c, w_pos)
        loss.index_copy_(0, tied, apart[0])
        g.index_copy_(1, tied, apart[1])
    return loss, g


def _cut_off(flat: Tensor, place: Tensor, most: float) -> Tensor:
    """Lower what is above ``most`` at the indices ``place`` (P,) of ``flat`` to it, and return by how much, (P,)."""
    value = flat.index_select(0, place)
    kept = value.clamp(max=most)
    flat.index_copy_(0, place, kept)
    return value - kept


def tied_margin_tile(
    s: Tensor, y: Tensor, work: Workspace, rho_k0: Tensor, rho_0k: Tensor, c: float, w_pos: float
) -> tuple[Tensor, Tensor]:
    """``margin_tile`` for pixels where any number of scores may tie for the maximum.

    Not rare in half precision: 480 of 3,600 tiles (13 %) in 200 steps of a second phase on CamVid (240 x 320, K = 11,
    batch 3, logits of a quarter of the size, rounded to bfloat16).
    """
    s = torch.sub(s, s.amax(0), out=work.buffer("below the maximum", s))
    is_top = torch.eq(s, 0, out=work.buffer("is top", s))
    ties = is_top.sum(0)
    alone = (ties == 1).to(s.dtype)  # the maximum is unique
    spare = work.buffer("gradient", s)
    second = torch.sub(s, is_top, alpha=torch.finfo(s.dtype).max, out=spare).amax(0)
    is_second = torch.eq(s, second, out=work.buffer("is second", s))
    gap = -second * alone  # lambda at the maximum
    label_s = s.gather(0, y.unsqueeze(0))[0]
    hit = (label_s == 0) * alone  # the label is the unique maximum
    label_x = rho_k0[y] - c * (label_s + hit * gap)
    top_x = torch.addcmul(rho_0k @ is_top, gap, alone, value=c)
    x = torch.add(rho_0k[:, None], s, alpha=c, out=s).addcmul_(is_top, gap, value=c)
    g = torch.sigmoid(x, out=spare)

    # The sum over all classes but a unique maximum, then put right, pixel by pixel, at maximum and label.
    loss = softplus(x.addcmul_(is_top, alone, value=-BIG)).sum(0)
    loss -= (1 - hit) * softplus(torch.addcmul(rho_0k[y], label_s, 1 - hit, value=c))
    loss += w_pos * softplus(label_x) + (alone - hit) * softplus(top_x)

    label_g = -w_pos * torch.sigmoid(label_x)
    g.scatter_(0, y.unsqueeze(0), label_g[None])
    at_top = torch.mul(g, is_top, out=x)
    inside = at_top.sum(0)
    share = (1 - alone) / (ties - 1).clamp(min=1)
    outside = g.sum(0) + ties * share * inside - inside
    g.addcmul_(at_top, share)
    g.addcmul_(is_top, outside / ties, value=-1)
    g.addcmul_(is_second, inside * alone / is_second.sum(0).clamp(min=1), value=-1)
    return loss / c, g


def softplus_sum(x: Tensor, work: Workspace, *, limit: float) -> tuple[Tensor, Tensor]:
    """(P,) sum over classes of softplus(z), and (K,P) sigmoid(z), of x = z log2(e), which is overwritten.

    z is at most ``limit``, but for two classes of each pixel, where it is at most SATURATED (if ``limit`` is). exp2
    takes any x at one price; exp is many times slower where the result is none of float32's normal numbers.
    A logarithm costs as much as eight products, so there is one for as many classes as cannot overflow, with
    sum log(1 + e) = log1p(prod(1 + e) - 1) and q = prod(1 + e) - 1 built up as q + e + q e, so that nothing cancels.
    """
    g = work.buffer("gradient", x)
    if limit > SATURATED[x.dtype]:
        z = x.div_(LOG2_E)
        return softplus(z).sum(0), torch.sigmoid(z, out=g)
    q = x.exp2_()
    torch.div(q, torch.add(q, 1, out=g), out=g)
    room = math.log(torch.finfo(x.dtype).max) - 1 - 2 * SATURATED[x.dtype]
    count, most = len(q), 2  # rows, and classes of a row once the halves are multiplied
    while count > 2 and most * math.log1p(math.exp(limit)) < room:
        lower, q = q.split([count // 2, count - count // 2])
        pairs = q if count % 2 == 0 else q[:-1]
        pairs.addcmul_(pairs, lower).add_(lower)
        count, most = len(q), 2 * most
    return log1p(q).sum(0), g


def margin_dense(s: Tensor, y: Tensor, rho_k0: Tensor, rho_0k: Tensor, c: float, w_pos: float) -> tuple[Tensor, Tensor]:
    """``margin_tile`` of s (..,K,P) and y (..,P), without indices and buffers: a compiler fuses it into four loops."""
    is_label = torch.arange(s.shape[-2], device=s.device, dtype=y.dtype)[:, None] == y.unsqueeze(-2)
    top = s.amax(-2, keepdim=True)
    is_top = s == top
    ties = is_top.to(s.dtype).sum(-2, keepdim=True)
    alone = ties == 1
    second = torch.where(is_top, torch.finfo(s.dtype).min, s).amax(-2, keepdim=True)
    is_second = (s == second) & alone
    gap = torch.where(alone, top - second, 0.0)
    scaled = c * torch.where(is_top, gap, s - top)
    x = torch.where(is_label, rho_k0[:, None] - scaled, rho_0k[:, None] + scaled)
    e = torch.exp2(-LOG2_E * x.abs())
    g = torch.where(x >= 0, 1, e) / (1 + e)
    weight = torch.where(is_label, w_pos, 1.0)
    loss = (weight * (x.relu() + log1p(e))).sum(-2)

    g = torch.where(is_label, -w_pos, 1.0) * g
    at_top = torch.where(is_top, g, 0.0)
    inside = at_top.sum(-2, keepdim=True)
    share = torch.where(alone, 0.0, 1 / (ties - 1).clamp(min=1))
    outside = g.sum(-2, keepdim=True) + ties * share * inside - inside
    runners_up = is_second.to(s.dtype).sum(-2, keepdim=True).clamp(min=1)
    gradient = g + at_top * share - torch.where(is_top, outside / ties, 0.0)
    return loss / c, gradient - torch.where(is_second, inside / runners_up, 0.0)
