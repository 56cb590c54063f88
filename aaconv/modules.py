"""Attention-augmented convolution, the layer.

Bello, Zoph, Vaswani, Shlens, Le: "Attention Augmented Convolutional Networks", ICCV 2019
(arXiv 1904.09925), section 3. Numbers are those of the paper's equations:

    (1)     O_h = softmax(Q K^T / sqrt(dkh)) V     attention of head h over all positions
    (2)     MHA(X) = Concat(O_1, ..., O_Nh) W^O    a 1x1 convolution mixes the heads
    (3-5)   Q K^T + S_H + S_W instead of Q K^T     relative positions, by row and by column
    (7)     [Conv(X), MHA(X)]                      concatenation over the channels

One 1x1 convolution gives queries, keys and values.

What the paper leaves open or we do differently:

- A stride is that of the plain convolution and of the 1x1 one that gives queries, keys and values,
  so attention runs at the resolution of the output. (The paper's pseudo-code has no stride.)
- The relative tables are initialised with mean 0 and standard deviation dkh^-0.5. The paper's
  pseudo-code passes dkh^-0.5 to random_normal_initializer without naming the argument, and by
  position that would be the mean.
- Maps of another size than the tables are made for are accepted, see `fit_table`.

Letters: B batch, H x W map, Nh heads, dkh = dk / Nh and dvh = dv / Nh channels per head.
"""

import torch
from torch import Tensor, nn

from aaconv.checks import (
    Size,
    check_channels,
    check_convolution,
    check_same_output_size,
    pair,
)
from aaconv.encodings import ABSOLUTE
from aaconv.functional import attention_2d, check_backend_name
from aaconv.tables import fit_table


class AugmentedConv(nn.Module):
    """Convolution and self-attention in parallel, ``[Conv(X), MHA(X)]`` over the channels.

    Maps (B, in_channels, H, W) to (B, out_channels, H/stride, W/stride), rounded up. The first
    ``out_channels - dv`` channels are the convolution's, the last ``dv`` the attention's
    (Bello et al. 2019, equation 7). ``dv=0`` is the plain convolution (dk and the other arguments
    of the attention then have no effect), ``dv=out_channels`` attention alone.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, Fout in the paper.
        kernel_size: kernel of the plain convolution.
        dk: key channels of all heads together, kappa * Fout in the paper.
        dv: value channels of all heads together, upsilon * Fout in the paper.
        Nh: number of heads.
        shape: output size that the relative tables are made for, an int for square maps or (H, W);
            0 leaves it open, which only ``relative=False`` allows. Inputs that give another output
            size work too: `fit_table` says which relative positions they get.
        relative: learn relative positions, tables ``key_rel_h`` (2H-1, dk/Nh) and ``key_rel_w``
            (2W-1, dk/Nh) shared by the heads (equations 3 to 5).
        absolute: absolute positions that the input of queries, keys and values contains:
            ``"none"``, ``"sine"`` (`encodings.add_sine`) or ``"coord"``
            (`encodings.append_coordinates`).
        stride: of the plain convolution and of the one that gives q, k and v.
        padding: of the plain convolution; by default ``dilation * (kernel_size - 1) // 2``.
        dilation: of the plain convolution.
        groups: of the plain convolution.
        bias: whether the three convolutions have a bias.
        qkv_kernel_size: kernel of the convolution that gives q, k and v; 1 in the paper.
        backend: how attention is computed: ``"auto"``, ``"reference"``, ``"sdpa"``, ``"tiled"``,
            ``"native"`` or ``"fused"``, see `attention_2d`.

    Raises:
        ValueError: the arguments contradict each other; the message names their values. In
            ``forward``: the two branches differ in output size, or the backend is unavailable.

    ``load_state_dict`` accepts tables made for another ``shape`` and converts them by `fit_table`.
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
        check_backend_name(backend)
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
        # that way because oneDNN's strided one writes past the end of its buffer in the backward
        # pass of channels_last inputs with few channels (uxlfoundation/oneDNN issue 6035, in
        # torch 2.13).
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

    def queries_keys_values(
        self, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """What `attention_2d` is given for the input ``x``, (B, in_channels, H, W).

        Queries, keys and values, (B, Nh, H, W, channels per head) with H and W of the output, and
        the two tables of relative positions, (2H-1, dkh) and (2W-1, dkh), None without any.
        """
        assert self.qkv_conv is not None
        down, right = self.subsample
        encode, _ = ABSOLUTE[self.absolute]
        qkv = self.qkv_conv(encode(x[:, :, ::down, ::right]))  # (B, 2 dk + dv, H, W)
        q, k, v = (
            t.unflatten(1, (self.Nh, -1)).permute(0, 1, 3, 4, 2)
            for t in qkv.split((self.dk, self.dk, self.dv), dim=1)
        )
        if self.key_rel_h is None or self.key_rel_w is None:
            return q, k, v, None, None
        rel_h = fit_table(self.key_rel_h, q.shape[2])
        return q, k, v, rel_h, fit_table(self.key_rel_w, q.shape[3])

    def _attend(self, x: Tensor) -> Tensor:
        assert self.attn_out is not None
        q, k, v, rel_h, rel_w = self.queries_keys_values(x)
        out = attention_2d(q, k, v, rel_h, rel_w, backend=self.backend)
        out = out.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, dv, H, W), head-major
        # Backends differ in the memory format they return; the output has that of the input.
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        memory_format = torch.channels_last if last else torch.contiguous_format
        return self.attn_out(out.contiguous(memory_format=memory_format))

    def extra_repr(self) -> str:
        text = f"dk={self.dk}, dv={self.dv}, Nh={self.Nh}, shape={self.shape}"
        return f"{text}, relative={self.relative}, absolute={self.absolute}, backend={self.backend}"


def _fit_loaded_tables(
    layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    for name in ("key_rel_h", "key_rel_w"):
        own, given = getattr(layer, name), state_dict.get(prefix + name)
        # Anything that cannot be such a table is left for load_state_dict to report.
        if given is not None and given.dim() == 2 and given.shape[0] % 2 == 1:
            state_dict[prefix + name] = fit_table(given, (own.shape[0] + 1) // 2)
