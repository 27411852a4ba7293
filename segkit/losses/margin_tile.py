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

import torch
from torch import Tensor

from segkit.losses.elementary import LOG2_E, log1p, softplus
from segkit.losses.tiles import Workspace

BIG = 1e30
PRODUCT_LIMIT = 10.0
"""Up to this x a product of eight 1 + exp(x) cannot overflow in float32."""


def margin_tile(
    s: Tensor, y: Tensor, work: Workspace, rho_k0: Tensor, rho_0k: Tensor, c: float, w_pos: float
) -> tuple[Tensor, Tensor]:
    """Loss (P,) and gradient (K,P): the head of this file.

    Written for few passes over (K,P): every class is first treated as if it were neither label nor maximum; these two
    are then put right pixel by pixel.
    """
    if torch.compiler.is_compiling() or s.device.type != "cpu":  # asking for a value is impossible or slow
        return tied_margin_tile(s, y, work, rho_k0, rho_0k, c, w_pos)
    original, s = s, torch.sub(s, s.amax(0), out=work.buffer("below the maximum", s))
    is_top = torch.eq(s, 0, out=work.buffer("is top", s))
    one_and_place = [torch.ones_like(rho_0k), torch.arange(len(s), dtype=s.dtype)]
    top_rho, ties, top = torch.stack([rho_0k, *one_and_place]) @ is_top
    if float(ties.amax()) > 1:
        return tied_margin_tile(original, y, work, rho_k0, rho_0k, c, w_pos)
    others = torch.sub(s, is_top, alpha=torch.finfo(s.dtype).max, out=is_top)
    second = others.amax(0)
    pixels = torch.arange(len(y))  # in a flat (K,P) the scores of class k are len(y) k + pixels
    at_label, at_top = (torch.add(pixels, k, alpha=len(y)) for k in (y, top.long()))
    label_s = s.view(-1).index_select(0, at_label)
    is_second = torch.eq(others, second, out=s)
    hit = (label_s == 0).to(s.dtype)  # the label is the maximum; lambda there is -second
    label_x = torch.addcmul(rho_k0.index_select(0, y), label_s - hit * second, hit.new_tensor(-c))
    top_x = torch.sub(top_rho, second, alpha=c)
    label_g, top_g = -w_pos * torch.sigmoid(label_x), torch.sigmoid(top_x)

    x = torch.add(LOG2_E * rho_0k[:, None], others, alpha=LOG2_E * c, out=others)  # the maximum is out of it
    x.view(-1).index_fill_(0, at_label, -BIG)
    loss, g = softplus_sum(x, work, limit=float(rho_0k.amax()))
    loss.add_(softplus(label_x), alpha=w_pos).addcmul_(softplus(top_x), 1 - hit)
    elsewhere = g.sum(0).addcmul_(label_g, 1 - hit)
    top_g = torch.lerp(top_g, label_g, hit)
    g.view(-1).index_copy_(0, at_label, label_g).index_copy_(0, at_top, top_g - elsewhere)
    g.addcmul_(is_second, top_g / is_second.sum(0), value=-1)
    return loss / c, g


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
    """(P,) sum over classes of softplus(z), and (K,P) sigmoid(z); z is at most ``limit``, x = z log2(e) is overwritten.

    exp2 takes any x at one price; exp is many times slower where the result is none of float32's normal numbers.
    A logarithm costs as much as eight products: up to PRODUCT_LIMIT there is one for eight classes, with
    sum log(1 + e) = log1p(prod(1 + e) - 1) and q = prod(1 + e) - 1 built up as q + e + q e, so that nothing cancels.
    """
    g = work.buffer("gradient", x)
    if limit > PRODUCT_LIMIT:
        z = x.div_(LOG2_E)
        return softplus(z).sum(0), torch.sigmoid(z, out=g)
    q = torch.exp2(x, out=work.buffer("exponentials", x))
    factor = torch.add(q, 1, out=x)
    torch.div(q, factor, out=g)
    factor = factor[len(q) // 2 :]
    for _ in range(3):
        half = len(q) // 2
        lower, upper, odd = q[:half], q[half : 2 * half], q[2 * half :]
        if half:
            q = torch.addcmul(upper, lower, factor[:half], out=lower)
            if len(odd):
                q[:1].addcmul_(q[:1], odd).add_(odd)
            factor = torch.add(q[half // 2 :], 1, out=factor[: half - half // 2])
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
