"""The layer written out pair by pair, to compare with. Shares no code with `aaconv`."""

import torch
import torch.nn.functional as F


def attention(q, k, v, rel_h=None, rel_w=None):
    """Equations 1 to 5 of Bello et al., one pair of positions at a time.

    q, k: (B, N, H, W, D); v: (B, N, H, W, E); tables (2H-1, D), (2W-1, D) or None.
    """
    B, N, H, W, D = q.shape
    positions = [(y, x) for y in range(H) for x in range(W)]
    heads = []
    for b in range(B):
        for n in range(N):
            for iy, ix in positions:
                logits = []
                for jy, jx in positions:
                    logit = q[b, n, iy, ix] @ k[b, n, jy, jx]
                    if rel_h is not None:
                        logit = logit + q[b, n, iy, ix] @ rel_h[jy - iy + H - 1]
                        logit = logit + q[b, n, iy, ix] @ rel_w[jx - ix + W - 1]
                    logits.append(logit / D**0.5)
                weights = torch.stack(logits).softmax(0)
                values = torch.stack([v[b, n, jy, jx] for jy, jx in positions])
                heads.append((weights[:, None] * values).sum(0))
    return torch.stack(heads).reshape(B, N, H, W, v.shape[-1])


def augmented_conv(x, weights, *, dk, dv, Nh, stride=1, padding=1, dilation=1, groups=1):
    """[Conv(X), MHA(X)] from a dict of the layer's parameters, for a 1x1 qkv convolution."""
    out = []
    if "conv_out.weight" in weights:
        out.append(
            F.conv2d(
                x,
                weights["conv_out.weight"],
                weights.get("conv_out.bias"),
                stride,
                padding,
                dilation,
                groups,
            )
        )
    if dv:
        kept = x[:, :, ::stride, ::stride]
        qkv = torch.einsum("bihw,oi->bhwo", kept, weights["qkv_conv.weight"][:, :, 0, 0])
        qkv = qkv + weights["qkv_conv.bias"]
        dkh, dvh = dk // Nh, dv // Nh
        q, k, v = [], [], []
        for n in range(Nh):
            q.append(qkv[..., n * dkh : (n + 1) * dkh])
            k.append(qkv[..., dk + n * dkh : dk + (n + 1) * dkh])
            v.append(qkv[..., 2 * dk + n * dvh : 2 * dk + (n + 1) * dvh])
        q, k, v = (torch.stack(t, dim=1) for t in (q, k, v))
        attended = attention(q, k, v, weights.get("key_rel_h"), weights.get("key_rel_w"))
        together = torch.cat([attended[:, n] for n in range(Nh)], dim=-1)  # (B, H, W, dv)
        mixed = torch.einsum("bhwi,oi->bohw", together, weights["attn_out.weight"][:, :, 0, 0])
        out.append(mixed + weights["attn_out.bias"][:, None, None])
    return torch.cat(out, dim=1)
