"""Attention-augmented convolution, the layer.

Bello, Zoph, Vaswani, Shlens, Le: "Attention Augmented Convolutional Networks", ICCV 2019
(arXiv 1904.09925), section 3. One 1x1 convolution gives queries, keys and values, Nh heads
attend over all positions of the map, a 1x1 convolution mixes the heads, and the result is
concatenated behind the channels of a plain convolution: ``[Conv(X), MHA(X)]``.

Two things the paper leaves open. Stride is on both branches' first convolutions, so attention
runs at the output's resolution. The relative tables are drawn with mean 0 and standard
deviation dkh^-0.5, which is how the paper's pseudo-code reads with its argument named.
"""

import torch
from torch import Tensor, nn

from aaconv.attention import BACKENDS, attention_2d
from aaconv.checks import (
    Size,
    check_channels,
    check_convolution,
    check_same_output_size,
    pair,
)
from aaconv.encodings import ABSOLUTE
from aaconv.tables import fit_table


class AugmentedConv(nn.Module):
    """Convolution with self-attention beside it: ``[Conv(X), MHA(X)]`` over the channels.

    Maps (B, in_channels, H, W) to (B, out_channels, H/stride, W/stride), rounded up. The first
    ``out_channels - dv`` channels are the convolution's, the last ``dv`` the attention's
    (Bello et al. 2019, equation 7). ``dv=0`` is the plain convolution (dk and the arguments of
    the attention then have no part in it), ``dv=out_channels`` attention alone.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, Fout in the paper.
        kernel_size: kernel of the plain convolution.
        dk: key channels of all heads together, kappa * Fout in the paper.
        dv: value channels of all heads together, upsilon * Fout in the paper.
        Nh: heads.
        shape: output size that the relative tables are made for, an int for square maps or (H, W);
            0 leaves it open, which only ``relative=False`` allows. Inputs that give another size
            are welcome all the same: `fit_table` says which relative positions they get.
        relative: learn relative positions, tables ``key_rel_h`` (2H-1, dk/Nh) and ``key_rel_w``
            (2W-1, dk/Nh) shared by the heads (equations 3 to 5).
        absolute: positions that queries, keys and values are told by their input: ``"none"``,
            ``"sine"`` (`encodings.add_sine`) or ``"coord"`` (`encodings.append_coordinates`).
        stride: of the plain convolution and of the one that gives q, k and v.
        padding: of the plain convolution; by default ``dilation * (kernel_size - 1) // 2``.
        dilation: of the plain convolution.
        groups: of the plain convolution.
        bias: whether the three convolutions have one.
        qkv_kernel_size: kernel of the convolution that gives q, k and v; the paper's is 1.
        backend: how attention is computed: ``"auto"``, ``"reference"``, ``"fold"``, ``"tiled"``,
            ``"fused"`` or ``"flex"``, see `attention_2d`.

    Raises:
        ValueError: the arguments contradict each other; the message names the values. In
            ``forward``: the two branches differ in size, or the backend cannot be had here.

    ``load_state_dict`` takes tables made for another ``shape`` and fits them by the same rule.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        dk: int,
        dv: int,
        Nh: int,
        shape: Size = 0,
        relative: bool = False,
        stride: Size = 1,
        *,
        padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        qkv_kernel_size: int = 1,
        absolute: str = "none",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        kernel = pair("kernel_size", kernel_size)
        stride = pair("stride", stride)
        dilation = pair("dilation", dilation)
        if padding is None:
            padding = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
        padding = pair("padding", padding)
        self.shape = pair("shape", shape)
        check_channels(in_channels, out_channels, dk, dv, Nh)
        check_convolution(in_channels, out_channels - dv, groups, qkv_kernel_size)
        check_same_output_size(kernel, stride, padding, dilation)
        if min(self.shape) < 0 or (min(self.shape) == 0) != (max(self.shape) == 0):
            raise ValueError(f"shape={shape} must be an output size, or 0 to leave it open")
        if relative and self.shape == (0, 0):
            raise ValueError("relative=True needs shape, the output size; got shape=0")
        if absolute not in ABSOLUTE:
            raise ValueError(
                f"absolute={absolute!r} is unknown; choose one of {', '.join(ABSOLUTE)}"
            )
        if absolute == "sine" and in_channels < 4:
            raise ValueError(f"absolute=sine needs in_channels of at least 4, not {in_channels}")
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        self.dk, self.dv, self.Nh = dk, dv, Nh
        self.relative = relative and dv > 0
        self.absolute = absolute
        self.backend = backend

        self.conv_out: nn.Conv2d | None = None
        if dv < out_channels:
            self.conv_out = nn.Conv2d(
                in_channels, out_channels - dv, kernel, stride, padding, dilation, groups, bias
            )
        # A strided 1x1 convolution is an unstrided one of every stride-th pixel. It is computed
        # so because oneDNN's own writes beyond its buffer in the backward pass of channels_last
        # inputs with few channels (uxlfoundation/oneDNN issue 6035, in torch 2.13).
        self.subsample = stride if qkv_kernel_size == 1 else (1, 1)
        self.qkv_conv: nn.Conv2d | None = None
        self.attn_out: nn.Conv2d | None = None
        if dv > 0:
            self.qkv_conv = nn.Conv2d(
                in_channels + ABSOLUTE[absolute][1],
                2 * dk + dv,
                qkv_kernel_size,
                stride if qkv_kernel_size > 1 else 1,
                padding=qkv_kernel_size // 2,
                bias=bias,
            )
            self.attn_out = nn.Conv2d(dv, dv, 1, bias=bias)
        self.key_rel_w: nn.Parameter | None = None
        self.key_rel_h: nn.Parameter | None = None
        if self.relative:
            height, width = self.shape
            self.key_rel_w = nn.Parameter(torch.empty(2 * width - 1, dk // Nh))
            self.key_rel_h = nn.Parameter(torch.empty(2 * height - 1, dk // Nh))
            nn.init.normal_(self.key_rel_w, std=(dk // Nh) ** -0.5)
            nn.init.normal_(self.key_rel_h, std=(dk // Nh) ** -0.5)
            self.register_load_state_dict_pre_hook(_fit_loaded_tables)

    def forward(self, x: Tensor) -> Tensor:
        """The augmented convolution of ``x``, (B, in_channels, H, W)."""
        branches = []
        if self.conv_out is not None:
            branches.append(self.conv_out(x))
        if self.dv > 0:
            branches.append(self._attend(x))
        for branch in branches:
            if branch.shape[2:] != branches[0].shape[2:]:
                raise ValueError(
                    f"for the input {tuple(x.shape)} convolution and attention differ in size: "
                    f"{tuple(branches[0].shape[2:])} and {tuple(branch.shape[2:])}; "
                    "use an odd kernel_size with padding = dilation * (kernel_size - 1) / 2"
                )
        return branches[0] if len(branches) == 1 else torch.cat(branches, dim=1)

    def _attend(self, x: Tensor) -> Tensor:
        assert self.qkv_conv is not None
        assert self.attn_out is not None
        down, right = self.subsample
        place, _ = ABSOLUTE[self.absolute]
        qkv = self.qkv_conv(place(x[:, :, ::down, ::right]))  # (B, 2 dk + dv, H, W)
        q, k, v = (
            t.unflatten(1, (self.Nh, -1)).permute(0, 1, 3, 4, 2)  # (B, Nh, H, W, per head)
            for t in qkv.split((self.dk, self.dk, self.dv), dim=1)
        )
        rel_h = rel_w = None
        if self.key_rel_h is not None and self.key_rel_w is not None:
            rel_h, rel_w = (
                fit_table(self.key_rel_h, q.shape[2]),
                fit_table(self.key_rel_w, q.shape[3]),
            )
        out = attention_2d(q, k, v, rel_h, rel_w, backend=self.backend)
        out = out.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, dv, H, W), head-major
        # Backends return what layout suits them; the branches are concatenated in the input's.
        last = qkv.is_contiguous(memory_format=torch.channels_last) and not qkv.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        return self.attn_out(out.contiguous(memory_format=layout))

    def extra_repr(self) -> str:
        text = f"dk={self.dk}, dv={self.dv}, Nh={self.Nh}, shape={self.shape}"
        return f"{text}, relative={self.relative}, absolute={self.absolute}, backend={self.backend}"


def _fit_loaded_tables(
    layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    for name in ("key_rel_h", "key_rel_w"):
        own, given = getattr(layer, name), state_dict.get(prefix + name)
        # Anything that is no table of such queries is left for load_state_dict to name.
        if given is not None and given.dim() == 2 and given.shape[0] % 2 == 1:
            state_dict[prefix + name] = fit_table(given, (own.shape[0] + 1) // 2)
