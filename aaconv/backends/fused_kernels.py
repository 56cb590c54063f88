"""Triton kernels of attention over a map with position bias, forward and backward.

Each program holds a tile of queries (or, for the gradients of keys and values, of keys) and loops
over the tiles of the others. A tile of keys is R rows by BW columns of the map, so that a query's
row bias in it is R numbers, and its column bias BW numbers that stay in registers while the loop
runs over the rows. Logits are powers of two: q, row_bias and col_bias carry the factor log2(e).

Letters: N heads, H x W map, L = H * W positions; D and E channels per head of queries/keys and of
values, padded to BD and BE; BM queries and R * BW keys per tile. Strides are those of
(B, N, H, W, channels), followed by a power of two that divides the first four.

Indices outside the map are clamped to its last row, column or query instead of masked, so that the
loads stay wide; a logit of minus infinity gives such keys the weight zero.
"""

import triton
import triton.language as tl


@triton.jit
def _head_offset(image, head, strides):
    """Offset of one head's data from the start of the tensor."""
    offset = image * strides[0] + head * strides[1]
    # A hint of 1 would replace what the compiler finds out by itself.
    if strides[5] > 1:
        offset = tl.multiple_of(offset, strides[5])
    return offset


@triton.jit
def _offsets(strides, y, x):
    """Offsets of the positions (y, x) from the start of the head's data."""
    offsets = y.to(tl.int64) * strides[2] + x * strides[3]
    if strides[5] > 1:
        offsets = tl.multiple_of(offsets, strides[5])
    return offsets


@triton.jit
def _load(pointer, strides, y, x, channel, C: tl.constexpr):
    """(positions, channels) of one head, with zeros in the padding."""
    offsets = _offsets(strides, y, x)[:, None] + channel[None, :] * strides[4]
    return tl.load(pointer + offsets, mask=(channel < C)[None, :], other=0.0)


@triton.jit
def _store(pointer, strides, y, x, channel, C: tl.constexpr, keep, value):
    """Write ``value`` (positions, channels) where ``keep`` (positions) is true."""
    offsets = _offsets(strides, y, x)[:, None] + channel[None, :] * strides[4]
    mask = keep[:, None] & (channel < C)[None, :]
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_bias(pointer, strides, y, x, index, C: tl.constexpr):
    """(queries, key rows or columns) of one head, with minus infinity outside the map."""
    offsets = _offsets(strides, y, x)[:, None] + index[None, :] * strides[4]
    inside = (index < C)[None, :]
    return tl.load(pointer + offsets, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _query_coordinates(position, L: tl.constexpr, W: tl.constexpr, BM: tl.constexpr):
    """Row and column of each query, clamped to the last query of the map."""
    if L % BM != 0:
        position = tl.minimum(position, L - 1)
    return position // W, position % W


@triton.jit
def _key_coordinates(
    row, column, H: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BW: tl.constexpr
):
    """Row and column of each key of the tile that starts at (row, column), clamped to the map."""
    key = tl.arange(0, R * BW)
    y = row + key // BW
    x = column + key % BW
    if H % R != 0:
        y = tl.minimum(y, H - 1)
    if W % BW != 0:
        x = tl.minimum(x, W - 1)
    return y, x


@triton.jit
def attend(
    q,
    k,
    v,
    row_bias,
    col_bias,
    out,
    lse,
    q_strides,
    k_strides,
    v_strides,
    row_bias_strides,
    col_bias_strides,
    out_strides,
    N,
    H: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    R: tl.constexpr,
    BW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The output of a tile of queries, and log2 of the normaliser of each query."""
    L: tl.constexpr = H * W
    tiles = tl.cdiv(L, BM)
    # The tiles of one head run at the same time and share its keys and values in the L2 cache.
    group = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = group // N, group % N
    position = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    y, x = _query_coordinates(position, L, W, BM)
    dims, channels = tl.arange(0, BD), tl.arange(0, BE)
    k += _head_offset(image, head, k_strides)
    v += _head_offset(image, head, v_strides)
    row_bias += _head_offset(image, head, row_bias_strides)
    col_bias += _head_offset(image, head, col_bias_strides)
    query = _load(q + _head_offset(image, head, q_strides), q_strides, y, x, dims, D)

    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    result = tl.zeros((BM, BE), tl.float32)
    for column in range(0, W, BW):
        col_bias_tile = _load_bias(col_bias, col_bias_strides, y, x, column + tl.arange(0, BW), W)
        for row in range(0, H, R):
            row_bias_tile = _load_bias(row_bias, row_bias_strides, y, x, row + tl.arange(0, R), H)
            ky, kx = _key_coordinates(row, column, H, W, R, BW)
            key = _load(k, k_strides, ky, kx, dims, D)
            value = _load(v, v_strides, ky, kx, channels, E)
            logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            logits = tl.reshape(logits, (BM, R, BW)) + col_bias_tile[:, None, :]
            # The row bias is added to the maxima of the rows, not to every logit.
            new_peak = tl.maximum(peak, tl.max(tl.max(logits, 2) + row_bias_tile, 1))
            weights = tl.exp2(logits + (row_bias_tile - new_peak[:, None])[:, :, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(tl.sum(weights, 2), 1)
            weights = tl.reshape(weights, (BM, R * BW)).to(value.dtype)
            result = tl.dot(weights, value, result * shrink[:, None], input_precision=PRECISION)
            peak = new_peak

    keep = position < L
    out += _head_offset(image, head, out_strides)
    _store(out, out_strides, y, x, channels, E, keep, result / total[:, None])
    tl.store(lse + group * L + position, peak + tl.log2(total), mask=keep)


@triton.jit
def query_gradients(
    grad,
    q,
    k,
    v,
    row_bias,
    col_bias,
    out,
    lse,
    delta,
    dq,
    drow_bias,
    dcol_bias,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    row_bias_strides,
    col_bias_strides,
    out_strides,
    dq_strides,
    drow_bias_strides,
    dcol_bias_strides,
    partial_stride,
    N,
    RELATIVE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    R: tl.constexpr,
    BW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of queries and of their row and column bias.

    Also ``delta``, the inner product of each output with its gradient, for `key_gradients`.
    A key tile contains the whole gradient of the row bias for its rows unless the map is wider
    than BW; then ``drow_bias`` gets one partial sum for every BW columns, ``partial_stride`` apart,
    for the caller to add up.
    """
    LN2: tl.constexpr = 0.6931471805599453
    L: tl.constexpr = H * W
    tiles = tl.cdiv(L, BM)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = group // N, group % N
    position = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    y, x = _query_coordinates(position, L, W, BM)
    keep = position < L
    dims, channels = tl.arange(0, BD), tl.arange(0, BE)
    k += _head_offset(image, head, k_strides)
    v += _head_offset(image, head, v_strides)
    row_bias += _head_offset(image, head, row_bias_strides)
    col_bias += _head_offset(image, head, col_bias_strides)
    grad += _head_offset(image, head, grad_strides)
    out += _head_offset(image, head, out_strides)
    query = _load(q + _head_offset(image, head, q_strides), q_strides, y, x, dims, D)
    dout = _load(grad, grad_strides, y, x, channels, E)
    result = _load(out, out_strides, y, x, channels, E)
    mean = tl.sum(dout.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + group * L + position, mean, mask=keep)
    normaliser = tl.load(lse + group * L + y * W + x)

    dquery = tl.zeros((BM, BD), tl.float32)
    for column in range(0, W, BW):
        u = column + tl.arange(0, BW)
        col_bias_tile = _load_bias(col_bias, col_bias_strides, y, x, u, W)
        dcol_bias_tile = tl.zeros((BM, BW), tl.float32)
        for row in range(0, H, R):
            g = row + tl.arange(0, R)
            row_bias_tile = _load_bias(row_bias, row_bias_strides, y, x, g, H) - normaliser[:, None]
            ky, kx = _key_coordinates(row, column, H, W, R, BW)
            key = _load(k, k_strides, ky, kx, dims, D)
            value = _load(v, v_strides, ky, kx, channels, E)
            bias = tl.reshape(row_bias_tile[:, :, None] + col_bias_tile[:, None, :], (BM, R * BW))
            weights = tl.exp2(tl.dot(query, tl.trans(key), bias, input_precision=PRECISION))
            dweights = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
            dlogits = weights * (dweights - mean[:, None])
            dquery = tl.dot(dlogits.to(key.dtype), key, dquery, input_precision=PRECISION)
            if RELATIVE:
                on_map = tl.reshape(dlogits, (BM, R, BW))
                dcol_bias_tile += tl.sum(on_map, 1)
                part = (
                    drow_bias
                    + _head_offset(image, head, drow_bias_strides)
                    + column // BW * partial_stride
                )
                _store(part, drow_bias_strides, y, x, g, H, keep, tl.sum(on_map, 2) * LN2)
        if RELATIVE:
            part = dcol_bias + _head_offset(image, head, dcol_bias_strides)
            _store(part, dcol_bias_strides, y, x, u, W, keep, dcol_bias_tile * LN2)
    dq += _head_offset(image, head, dq_strides)
    _store(dq, dq_strides, y, x, dims, D, keep, dquery * LN2)


@triton.jit
def _query_side(
    row_bias,
    col_bias,
    lse,
    row_bias_strides,
    col_bias_strides,
    start,
    g,
    u,
    L: tl.constexpr,
    W: tl.constexpr,
    BM: tl.constexpr,
):
    """Row bias (R, BM), column bias (BW, BM) and normalisers (BM) of BM queries from ``start``."""
    position = start + tl.arange(0, BM)
    query = tl.minimum(position, L - 1)
    y, x = query // W, query % W
    row_offsets = g[:, None] * row_bias_strides[4] + _offsets(row_bias_strides, y, x)[None, :]
    col_offsets = u[:, None] * col_bias_strides[4] + _offsets(col_bias_strides, y, x)[None, :]
    # Queries outside the map attend to nothing.
    normaliser = tl.load(lse + position, mask=position < L, other=float("inf"))
    return tl.load(row_bias + row_offsets), tl.load(col_bias + col_offsets), normaliser


@triton.jit
def key_gradients(
    grad,
    q,
    k,
    v,
    row_bias,
    col_bias,
    lse,
    delta,
    dk,
    dv,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    row_bias_strides,
    col_bias_strides,
    dk_strides,
    dv_strides,
    N,
    H: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    R: tl.constexpr,
    BW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of keys and their values. Logits are (keys, queries) here."""
    LN2: tl.constexpr = 0.6931471805599453
    L: tl.constexpr = H * W
    across = tl.cdiv(W, BW)
    tiles = across * tl.cdiv(H, R)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = group // N, group % N
    tile = tl.program_id(0) % tiles
    row, column = tile // across * R, tile % across * BW
    g, u = row + tl.arange(0, R), column + tl.arange(0, BW)
    keys = tl.arange(0, R * BW)
    keep = (row + keys // BW < H) & (column + keys % BW < W)
    if H % R != 0:
        g = tl.minimum(g, H - 1)
    if W % BW != 0:
        u = tl.minimum(u, W - 1)
    ky, kx = _key_coordinates(row, column, H, W, R, BW)
    dims, channels = tl.arange(0, BD), tl.arange(0, BE)
    q += _head_offset(image, head, q_strides)
    grad += _head_offset(image, head, grad_strides)
    row_bias += _head_offset(image, head, row_bias_strides)
    col_bias += _head_offset(image, head, col_bias_strides)
    lse += group * L
    delta += group * L
    key = _load(k + _head_offset(image, head, k_strides), k_strides, ky, kx, dims, D)
    value = _load(v + _head_offset(image, head, v_strides), v_strides, ky, kx, channels, E)

    dkey = tl.zeros((R * BW, BD), tl.float32)
    dvalue = tl.zeros((R * BW, BE), tl.float32)
    # The compiler prefetches the operands of products but not these, so they are loaded one
    # iteration early.
    row_bias_tile, col_bias_tile, normaliser = _query_side(
        row_bias, col_bias, lse, row_bias_strides, col_bias_strides, 0, g, u, L, W, BM
    )
    for start in range(0, L, BM):
        bias = (row_bias_tile.to(tl.float32) - normaliser[None, :])[:, None, :]
        bias = tl.reshape(bias + col_bias_tile.to(tl.float32)[None, :, :], (R * BW, BM))
        row_bias_tile, col_bias_tile, normaliser = _query_side(
            row_bias, col_bias, lse, row_bias_strides, col_bias_strides, start + BM, g, u, L, W, BM
        )
        y, x = _query_coordinates(start + tl.arange(0, BM), L, W, BM)
        query = _load(q, q_strides, y, x, dims, D)
        dout = _load(grad, grad_strides, y, x, channels, E)
        mean = tl.load(delta + y * W + x)
        weights = tl.exp2(tl.dot(key, tl.trans(query), bias, input_precision=PRECISION))
        dvalue = tl.dot(weights.to(dout.dtype), dout, dvalue, input_precision=PRECISION)
        dweights = tl.dot(value, tl.trans(dout), input_precision=PRECISION)
        dlogits = weights * (dweights - mean[None, :])
        dkey = tl.dot(dlogits.to(query.dtype), query, dkey, input_precision=PRECISION)
    dk += _head_offset(image, head, dk_strides)
    dv += _head_offset(image, head, dv_strides)
    _store(dk, dk_strides, ky, kx, dims, D, keep, dkey * LN2)
    _store(dv, dv_strides, ky, kx, channels, E, keep, dvalue)
