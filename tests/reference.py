"""A naive reference for the layer and the networks, sharing no code with `aaconv` or `models`."""

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


def augmented_conv(
    x, weights, *, dk, dv, Nh, stride=1, padding=1, dilation=1, groups=1, qk_norm=False
):
    """Compute [Conv(X), MHA(X)] from a dict of the layer's parameters (1x1 qkv convolution)."""
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
        if "qkv_conv.bias" in weights:
            qkv = qkv + weights["qkv_conv.bias"]
        dkh, dvh = dk // Nh, dv // Nh
        q, k, v = [], [], []
        for n in range(Nh):
            q.append(qkv[..., n * dkh : (n + 1) * dkh])
            k.append(qkv[..., dk + n * dkh : dk + (n + 1) * dkh])
            v.append(qkv[..., 2 * dk + n * dvh : 2 * dk + (n + 1) * dvh])
        q, k, v = (torch.stack(t, dim=1) for t in (q, k, v))
        if qk_norm:
            q, k = (
                t * dkh**0.5 / ((t * t).sum(-1, keepdim=True) + dkh * 1e-6) ** 0.5 for t in (q, k)
            )
        attended = attention(q, k, v, weights.get("key_rel_h"), weights.get("key_rel_w"))
        together = torch.cat([attended[:, n] for n in range(Nh)], dim=-1)  # (B, H, W, dv)
        mixed = torch.einsum("bhwi,oi->bohw", together, weights["attn_out.weight"][:, :, 0, 0])
        out.append(mixed + weights["attn_out.bias"][:, None, None])
    return torch.cat(out, dim=1)


def resnet(x, state, *, block, shortcut, attention):
    """Run a ResNet in evaluation mode, given its state dict.

    ``attention`` is "none", "ge", "se", "removed", "pointwise", "mean", or a dict of dk, dv and Nh
    for augmented blocks.
    """
    residual = {"basic": _basic, "bottleneck": _bottleneck, "preact": _preact}[block]
    blocks = sorted({name[: len("stages.0.0")] for name in state if name.startswith("stages.")})
    x = F.conv2d(x, state["conv.weight"], padding=1)
    if block != "preact":
        x = _normalized(x, state, "bn_in").clamp(min=0)
    for name in blocks:
        weights = {n[len(name) + 1 :]: t for n, t in state.items() if n.startswith(name)}
        stride = 2 if name.endswith(".0") and name != "stages.0.0" else 1
        y, x = residual(x, weights, stride, shortcut, attention)
        x = _gated(y, weights, attention) + x
        if block != "preact":
            x = x.clamp(min=0)
    if block == "preact":
        x = _normalized(x, state, "bn_out").clamp(min=0)
    return x.flatten(2).mean(2) @ state["head.weight"].T + state["head.bias"]


def _basic(x, weights, stride, shortcut, attention):
    y = _normalized(_first(x, weights, "conv1", stride, attention), weights, "bn1").clamp(min=0)
    y = _normalized(F.conv2d(y, weights["conv2.weight"], padding=1), weights, "bn2")
    return y, _shortcut(x, y, weights, stride, shortcut, normalize=True)


def _bottleneck(x, weights, stride, shortcut, attention):
    y = _normalized(F.conv2d(x, weights["conv1.weight"]), weights, "bn1").clamp(min=0)
    y = _normalized(_first(y, weights, "conv2", stride, attention), weights, "bn2").clamp(min=0)
    y = _normalized(F.conv2d(y, weights["conv3.weight"]), weights, "bn3")
    return y, _shortcut(x, y, weights, stride, shortcut, normalize=True)


def _preact(x, weights, stride, shortcut, attention):
    active = _normalized(x, weights, "bn1").clamp(min=0)
    y = _first(active, weights, "conv1", stride, attention)
    y = F.conv2d(_normalized(y, weights, "bn2").clamp(min=0), weights["conv2.weight"], padding=1)
    if x.shape == y.shape:
        return y, x
    return y, _shortcut(active, y, weights, stride, shortcut, normalize=False)


def _shortcut(x, y, weights, stride, kind, normalize):
    if x.shape == y.shape:
        return x
    if kind == "projection":
        name = "shortcut.0.conv.weight" if normalize else "shortcut.conv.weight"
        x = F.conv2d(x, weights[name], stride=stride)
        return _normalized(x, weights, "shortcut.1") if normalize else x
    out = torch.zeros_like(y)
    for h in range(y.shape[2]):
        for w in range(y.shape[3]):
            window = x[:, :, h * stride : (h + 1) * stride, w * stride : (w + 1) * stride]
            pixel = window.mean((2, 3)) if kind == "pad" else window[:, :, 0, 0]
            out[:, : x.shape[1], h, w] = pixel
    return out


def _first(x, weights, name, stride, attention):
    if attention in ("pointwise", "mean"):
        out = F.conv2d(x, weights[name + ".conv_out.weight"], stride=stride, padding=1)
        side = F.conv2d(x, weights[name + ".side_conv.weight"], stride=stride)
        if attention == "mean":
            flat = side.flatten(2)
            side = flat.mean(2, keepdim=True).repeat(1, 1, flat.shape[2]).view(side.shape)
        return torch.cat([out, side], dim=1)
    if not isinstance(attention, dict):
        return F.conv2d(x, weights[name + ".weight"], stride=stride, padding=1)
    own = {n.removeprefix(name + "."): t for n, t in weights.items() if n.startswith(name)}
    own["attn_out.bias"] = torch.zeros(1, dtype=x.dtype)
    return augmented_conv(x, own, stride=stride, **attention)


def _gated(y, weights, attention):
    mean = y.flatten(2).mean(2)
    if attention == "se":
        hidden = (mean @ weights["recalibrate.squeeze.weight"][:, :, 0, 0].T).clamp(min=0)
        mean = hidden @ weights["recalibrate.excite.weight"][:, :, 0, 0].T
    elif attention != "ge":
        return y
    return y / (1 + torch.exp(-mean))[:, :, None, None]


def _normalized(x, weights, name):
    mean, variance, scale, shift = (
        weights[f"{name}.{what}"][:, None, None]
        for what in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5) ** 0.5 * scale + shift
