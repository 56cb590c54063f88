"""The attention-augmented convolution layer.

Bello, Zoph, Vaswani, Shlens, Le: "Attention Augmented Convolutional Networks", ICCV 2019
(arXiv 1904.09925), section 3. The numbers below are those of the paper's equations:

    (1)     O_h = softmax(Q K^T / sqrt(dkh)) V     attention of head h over all positions
    (2)     MHA(X) = Concat(O_1, ..., O_Nh) W^O    a 1x1 convolution mixes the heads
    (3-5)   Q K^T + S_H + S_W instead of Q K^T     relative positions, by row and by column
    (7)     [Conv(X), MHA(X)]                      concatenation over the channels

One 1x1 convolution computes queries, keys and values.

Details that the paper leaves open or that differ here:

- The stride applies to the plain convolution and to the 1x1 convolution for queries, keys and
  values, so attention runs at output resolution. (The paper's pseudo-code has no stride.)
- The relative tables are initialized with mean 0 and standard deviation dkh^-0.5. The paper's
  pseudo-code passes dkh^-0.5 to random_normal_initializer as a positional argument, which would
  make it the mean.
- Queries, keys and values start with torch's variance 1 / (3 Cin), not with the Glorot variance
  2 / (Cin + 2 dk + dv) that tf.layers.conv2d uses in the paper's listing (``init="glorot"``). With
  both, attention is soft on normalized inputs. In a post-activation network the residual stream
  grows with every block, and attention starts sharper with Glorot: docs/layer.md has measurements.
- ``qk_norm`` divides the queries and keys of each head by their root mean square (Dehghani et al.
  2023, arXiv 2302.05442; Wortsman et al. 2023, arXiv 2309.14322), which is not in the paper. It
  keeps attention soft however large the features are: content logits are at most sqrt(dkh), and
  positions with large features no longer stand out.
- Maps of a different size than the tables are made for are accepted, see `fit_table`.
- With pooled attention, which the paper uses on its largest ImageNet maps, the output is
  interpolated so that each pooled position stays at its place in the input, and averages at the
  borders include only pixels inside the map.

Letters: B batch, H x W map, Nh heads, dkh = dk / Nh and dvh = dv / Nh channels per head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aaconv.checks import (
    MAX_SIZE,
    Size,
    check_channels,
    check_convolution,
    check_same_output_size,
    pair,
    whole,
)
from aaconv.encodings import ABSOLUTE
from aaconv.functional import (
    attention_2d,
    check_backend_name,
    check_dropout,
    is_transformed,
)
from aaconv.tables import fit_table

# Initializations of the convolutions for queries, keys and values and for mixing the heads; torch's
# default is already drawn by their constructors.
INITS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "torch": None,
    "glorot": nn.init.xavier_uniform_,
    "kaiming": nn.init.kaiming_normal_,
}
# Added to the mean square of a query or key, so that zeros stay zero.
QK_NORM_EPS = 1e-6


class AugmentedConv(nn.Module):
    """Convolution and self-attention in parallel, ``[Conv(X), MHA(X)]`` over the channels.

    Maps (B, in_channels, H, W) to (B, out_channels, H/stride, W/stride), rounded up, and likewise
    a single image without a batch dimension, (in_channels, H, W). The first ``out_channels - dv``
    output channels come from the convolution, the last ``dv`` from attention (Bello et al. 2019,
    equation 7). ``dv=0`` gives the plain convolution (dk and the other attention arguments then
    have no effect), ``dv=out_channels`` attention alone.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, Fout in the paper.
        kernel_size: kernel of the plain convolution.
        dk: key channels of all heads together, kappa * Fout in the paper.
        dv: value channels of all heads together, upsilon * Fout in the paper.
        Nh: number of heads.
        shape: output size that the relative tables are made for, an int for square maps or (H, W);
            0 leaves it open, which requires ``relative=False``. Other output sizes work too:
            see `fit_table` for the relative positions they get.
        relative: learn relative positions: tables ``key_rel_h`` (2H-1, dk/Nh) and ``key_rel_w``
            (2W-1, dk/Nh), shared by the heads (equations 3 to 5).
        absolute: absolute position encoding of the input of queries, keys and values:
            ``"none"``, ``"sine"`` (`encodings.add_sine`) or ``"coord"``
            (`encodings.append_coordinates`).
        stride: stride of the plain convolution and of the one for q, k and v.
        padding: padding of the plain convolution; by default ``dilation * (kernel_size - 1) // 2``.
            ``"same"`` is as in torch and requires a stride of 1.
        dilation: dilation of the plain convolution.
        groups: groups of the plain convolution.
        bias: whether the three convolutions have a bias.
        qkv_bias: whether the convolution for q, k and v has a bias; by default, same as ``bias``.
        qkv_kernel_size: kernel of the convolution for q, k and v; 1 in the paper.
        pool: factor by which the map that attention runs on is smaller: at every pool-th pixel the
            input is averaged over a window of ``2 * pool - 1`` by ``2 * pool - 1`` pixels, and the
            output is interpolated bilinearly. 2 is the paper's value for its largest ImageNet maps
            (section 4.2), 1 means no pooling. ``shape`` and the tables still refer to the layer's
            output: a pooled map uses the offsets that are multiples of ``pool``.
        init: distribution of the initial weights of ``qkv_conv`` and ``attn_out``: ``"torch"``,
            uniform with variance 1 / (3 fan_in) as in any torch convolution; ``"glorot"``, uniform
            with variance 2 / (fan_in + fan_out), as in the paper's listing; ``"kaiming"``, normal
            with variance 2 / fan_in (He et al. 2015), with which attention starts out saturated in
            post-activation networks. Their biases start at zero, except with ``"torch"``, which
            uses torch's own.
        qk_norm: divide the queries and keys of each head by their root mean square over the dkh
            channels, after the bias and before positions are applied.
        backend: how attention is computed: ``"auto"``, ``"reference"``, ``"sdpa"``, ``"tiled"``,
            ``"native"`` or ``"fused"``, see `attention_2d`.
        dropout: probability of dropping an attention weight in training, see `attention_2d`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Attributes:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in
            ``torch.nn.Conv2d``; all but the channels apply to the plain convolution.
        conv_out: the plain convolution, of ``out_channels - dv`` channels; None if there are none.
        qkv_conv: computes queries, keys and values, in that order; None for ``dv=0``.
        attn_out: the 1x1 convolution that mixes the heads (W^O in equation 2); None for ``dv=0``.
        key_rel_h, key_rel_w: the relative tables, or None.

    Raises:
        ValueError: if the arguments contradict each other; the message names their values. In
            ``forward``: if the input has the wrong dimensions or channels, the two branches differ
            in output size, or the backend is unavailable.

    ``load_state_dict`` converts tables made for another ``shape`` with `fit_table`. torch.fx treats
    the layer as a leaf module, like torch's own layers.
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
        padding: Size | str | None = None,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        qkv_kernel_size: int = 1,
        absolute: str = "none",
        pool: int = 1,
        qkv_bias: bool | None = None,
        init: str = "torch",
        qk_norm: bool = False,
        backend: str = "auto",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = whole("in_channels", in_channels, least=1)
        self.out_channels = whole("out_channels", out_channels, least=1)
        self.dk, self.dv, self.Nh = whole("dk", dk), whole("dv", dv), whole("Nh", Nh, least=1)
        self.kernel_size = pair("kernel_size", kernel_size)
        self.stride = pair("stride", stride)
        self.dilation = pair("dilation", dilation)
        self.groups = whole("groups", groups)
        self.pool = whole("pool", pool, MAX_SIZE)
        self.shape = pair("shape", shape)
        self.absolute = absolute
        self.init, self.qk_norm = init, qk_norm
        self.backend, self.dropout = backend, dropout
        qkv_kernel_size = whole("qkv_kernel_size", qkv_kernel_size)
        if not (dtype or torch.get_default_dtype()).is_floating_point:
            raise ValueError(f"dtype={dtype} must be a floating-point type")
        check_channels(self.out_channels, self.dk, self.dv, self.Nh)
        check_convolution(
            self.in_channels, self.out_channels - self.dv, self.groups, qkv_kernel_size
        )
        self.padding = _padding(padding, self.kernel_size, self.stride, self.dilation)
        self._check_attention(relative)
        self.relative = relative and self.dv > 0

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv_out: nn.Conv2d | None = None
        if self.dv < self.out_channels:
            self.conv_out = nn.Conv2d(
                self.in_channels,
                self.out_channels - self.dv,
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
                bias,
                **factory,
            )
        # A strided 1x1 convolution is computed as an unstrided one of every stride-th pixel:
        # oneDNN's strided version writes past the end of its buffer in the backward pass for
        # channels_last inputs with few channels (uxlfoundation/oneDNN issue 6035, in torch 2.13).
        self.subsample = self.stride if qkv_kernel_size == 1 else (1, 1)
        self.qkv_conv: nn.Conv2d | None = None
        self.attn_out: nn.Conv2d | None = None
        if self.dv > 0:
            self.qkv_conv = nn.Conv2d(
                self.in_channels + ABSOLUTE[absolute][1],
                2 * self.dk + self.dv,
                qkv_kernel_size,
                self.stride if qkv_kernel_size > 1 else 1,
                padding=qkv_kernel_size // 2,
                bias=bias if qkv_bias is None else qkv_bias,
                **factory,
            )
            self.attn_out = nn.Conv2d(self.dv, self.dv, 1, bias=bias, **factory)
        self.key_rel_w: nn.Parameter | None = None
        self.key_rel_h: nn.Parameter | None = None
        if self.relative:
            height, width = self.shape
            channels = self.dk // self.Nh
            self.key_rel_w = nn.Parameter(torch.empty(2 * width - 1, channels, **factory))
            self.key_rel_h = nn.Parameter(torch.empty(2 * height - 1, channels, **factory))
            self.register_load_state_dict_pre_hook(_fit_loaded_tables)
        self._initialize_attention()

    def _check_attention(self, relative: bool) -> None:
        shape = self.shape[0] if self.shape[0] == self.shape[1] else self.shape
        if min(self.shape) < 0 or (min(self.shape) == 0) != (max(self.shape) == 0):
            raise ValueError(f"shape={shape} must be an output size, or 0 to leave it open")
        if relative and self.shape == (0, 0):
            raise ValueError("relative=True needs shape, the output size; got shape=0")
        if self.absolute not in ABSOLUTE:
            raise ValueError(
                f"absolute={self.absolute!r} is unknown; choose one of {', '.join(ABSOLUTE)}"
            )
        if self.absolute == "sine" and self.in_channels < 4:
            raise ValueError(
                f"absolute=sine needs in_channels of at least 4, not {self.in_channels}"
            )
        if self.pool < 1:
            raise ValueError(f"pool={self.pool} must be at least 1 (no pooling)")
        check_init(self.init)
        check_backend_name(self.backend)
        check_dropout(self.dropout, self.backend)

    def reset_parameters(self) -> None:
        """Reinitialize all parameters as in a new layer."""
        for convolution in (self.conv_out, self.qkv_conv, self.attn_out):
            if convolution is not None:
                convolution.reset_parameters()
        self._initialize_attention()

    def _initialize_attention(self) -> None:
        # There is nothing to draw on the meta device, but torch would import its compiler, which
        # takes nearly as long as importing torch itself.
        draw = INITS[self.init]
        for convolution in (self.qkv_conv, self.attn_out):
            if draw is None or convolution is None or convolution.weight.is_meta:
                continue
            draw(convolution.weight)
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
        for table in (self.key_rel_w, self.key_rel_h):
            if table is not None and not table.is_meta:
                nn.init.normal_(table, std=(self.dk // self.Nh) ** -0.5)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay: the relative tables.

        This follows a convention of timm, whose models exclude position embeddings this way. It is
        up to the code that builds an optimizer; nothing here depends on it.
        """
        return {"key_rel_h", "key_rel_w"} if self.relative else set()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x``, (B, in_channels, H, W) or (in_channels, H, W)."""
        if isinstance(x, torch.fx.Proxy):
            return _as_leaf(self, x)
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must be (B, {self.in_channels}, H, W) or ({self.in_channels}, H, W), with "
                f"in_channels={self.in_channels}; got {tuple(x.shape)}"
            )
        branches = []
        if self.conv_out is not None:
            branches.append(self.conv_out(x))
        if self.dv > 0:
            branches.append(self._attend(x))
        if len(branches) == 1:
            return branches[0]
        # Exported programs must work at other sizes, so they get no size-dependent branch.
        if not torch.compiler.is_exporting() and branches[0].shape[2:] != branches[1].shape[2:]:
            raise ValueError(
                f"for the input {tuple(x.shape)} convolution and attention differ in size: "
                f"{tuple(branches[0].shape[2:])} and {tuple(branches[1].shape[2:])}; "
                "use an odd kernel_size with padding = dilation * (kernel_size - 1) / 2"
            )
        return torch.cat(branches, dim=1)

    def queries_keys_values(
        self, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the arguments of `attention_2d` for the input ``x``, (B, in_channels, H, W).

        These are queries, keys and values, (B, Nh, H, W, channels per head), with H and W those of
        the output, divided by ``pool`` and rounded up; and both relative tables, (2H-1, dkh) and
        (2W-1, dkh), or None. With ``qk_norm``, queries and keys are normalized.
        """
        assert self.qkv_conv is not None
        size = self._output_size(x)
        down, right = self.subsample
        x = x[:, :, ::down, ::right]
        if self.pool > 1:
            x = F.avg_pool2d(
                x, 2 * self.pool - 1, self.pool, self.pool - 1, count_include_pad=False
            )
        encode, _ = ABSOLUTE[self.absolute]
        qkv = self.qkv_conv(encode(x))  # (B, 2 dk + dv, H, W)
        q, k, v = (
            t.unflatten(1, (self.Nh, -1)).permute(0, 1, 3, 4, 2)
            for t in qkv.split((self.dk, self.dk, self.dv), dim=1)
        )
        if self.qk_norm:
            q, k = _over_rms(q), _over_rms(k)
        if self.key_rel_h is None or self.key_rel_w is None:
            return q, k, v, None, None
        height, width = q.shape[2:4] if self.pool == 1 else size
        rel_h = fit_table(self.key_rel_h, height, self.pool)
        return q, k, v, rel_h, fit_table(self.key_rel_w, width, self.pool)

    def _attend(self, x: Tensor) -> Tensor:
        assert self.attn_out is not None
        q, k, v, rel_h, rel_w = self.queries_keys_values(x)
        dropout = self.dropout if self.training else 0.0
        out = attention_2d(q, k, v, rel_h, rel_w, backend=self.backend, dropout=dropout)
        out = out.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, dv, H, W), head-major
        # Backends return different memory formats; the output gets that of the input. Not during
        # export: the detected format could depend on the size, and the program must work at others.
        if not torch.compiler.is_exporting():
            out = out.contiguous(memory_format=_memory_format(x))
        out = self.attn_out(out)
        if self.pool == 1:
            return out
        return _spread(out, self.pool, self._output_size(x))

    def positions(self, x: Tensor) -> tuple[int, int]:
        """Return the size (h, w) of the map that attention runs on for the input ``x``."""
        height, width = self._output_size(x)
        return -(-height // self.pool), -(-width // self.pool)

    def _output_size(self, x: Tensor) -> tuple[int, int]:
        # Rounds up without dividing negative numbers, which ONNX rounds differently.
        down, right = self.stride
        return (x.shape[2] + down - 1) // down, (x.shape[3] + right - 1) // right

    def extra_repr(self) -> str:
        text = f"dk={self.dk}, dv={self.dv}, Nh={self.Nh}, shape={self.shape}"
        text = f"{text}, relative={self.relative}, absolute={self.absolute}, pool={self.pool}"
        text = f"{text}, init={self.init}, qk_norm={self.qk_norm}, backend={self.backend}"
        return f"{text}, dropout={self.dropout}" if self.dropout else text


def check_init(init: str) -> None:
    """Raise a one-line ValueError unless ``init`` is one of INITS."""
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; choose one of {', '.join(INITS)}")


def _over_rms(x: Tensor) -> Tensor:
    """Divide ``x`` by its root mean square over the last dimension, in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + QK_NORM_EPS)).to(x.dtype)


def _padding(
    given: Size | str | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int] | str:
    """Return the padding of the plain convolution, checked.

    Raises:
        ValueError: if it is invalid, or the convolution's output size never matches attention's.
    """
    down, right = (d * (k - 1) // 2 for d, k in zip(dilation, kernel_size, strict=True))
    around = (down, right)
    if given == "same" and stride != (1, 1):
        raise ValueError(f"padding='same' needs stride=1, not {stride}; use padding={around}")
    # This works for even kernels too: torch then pads one side more.
    if given == "same" and min(*kernel_size, *dilation) >= 1:
        return "same"
    if isinstance(given, str) and given != "same":
        raise ValueError(f"padding={given!r} must be an int, a pair of ints, or 'same'")
    padding = around if given is None or isinstance(given, str) else pair("padding", given)
    check_same_output_size(kernel_size, stride, padding, dilation)
    return padding


def _memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of ``x``; contiguous inside torch.func transforms."""
    if is_transformed(x) or x.is_contiguous():
        return torch.contiguous_format
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _spread(out: Tensor, pool: int, size: tuple[int, int]) -> Tensor:
    """Interpolate ``out`` to ``size``, moving its position i to position ``pool * i``.

    Positions beyond the last one repeat its value.
    """
    height, width = ((length - 1) * pool + 1 for length in out.shape[2:])
    out = F.interpolate(out, (height, width), mode="bilinear", align_corners=True)
    return F.pad(out, (0, size[1] - width, 0, size[0] - height), mode="replicate")


def _as_leaf(layer: AugmentedConv, x: torch.fx.Proxy) -> torch.fx.Proxy:
    """Record the call of ``layer`` as a single node of the torch.fx graph.

    Raises:
        ValueError: if the layer itself is traced instead of a network containing it.
    """
    name = x.tracer.path_of_module(layer)  # type: ignore[attr-defined]
    if not name:
        raise ValueError("torch.fx takes AugmentedConv as a leaf: trace a network that has it")
    return x.tracer.create_proxy("call_module", name, (x,), {})


def _fit_loaded_tables(
    layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    for name in ("key_rel_h", "key_rel_w"):
        own, given = getattr(layer, name), state_dict.get(prefix + name)
        # Anything that cannot be a relative table is left for load_state_dict to report.
        if isinstance(given, Tensor) and given.dim() == 2 and given.shape[0] % 2 == 1:
            state_dict[prefix + name] = fit_table(given, (own.shape[0] + 1) // 2)
