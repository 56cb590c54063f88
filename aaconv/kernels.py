"""Triton kernels of attention over a map with position terms, forward and backward.

A program holds a tile of queries (or, for the gradients of keys and values, of keys) and walks
over the tiles of the others. A tile of keys is R rows of the map, BW columns each, so that a
query's row terms in it are R numbers and its column terms BW numbers that stay in registers from
tile to tile. Logits are powers of two: q, rows and columns carry the factor log2(e).

Letters: L = H * W positions; D and E channels per head of queries/keys and of values, padded to
BD and BE; BM queries and R * BW keys in a tile. Strides are those of (B, N, H, W, channels), and
behind them a power of two that divides the first four.

Positions beyond the map are read from its last row, column or query instead, without a mask, so
that the loads stay wide; what makes them count for nothing is a logit of minus infinity.
"""

import triton
import triton.language as tl


@triton.jit
def _place(image, head, strides):
    offset = image * strides[0] + head * strides[1]
    # A hint of 1 would replace what the compiler knows by itself.
    if strides[5] > 1:
        offset = tl.multiple_of(offset, strides[5])
    return offset


@triton.jit
def _offsets(strides, y, x):
    offsets = y.to(tl.int64) * strides[2] + x * strides[3]
    if strides[5] > 1:
        offsets = tl.multiple_of(offsets, strides[5])
    return offsets


@triton.jit
def _load(pointer, strides, y, x, channel, C: tl.constexpr):
    """(positions, channels) of one head, zero in the padding."""
    offsets = _offsets(strides, y, x)[:, None] + channel[None, :] * strides[4]
    return tl.load(pointer + offsets, mask=(channel < C)[None, :], other=0.0)


@triton.jit
def _store(pointer, strides, y, x, channel, C: tl.constexpr, keep, value):
    offsets = _offsets(strides, y, x)[:, None] + channel[None, :] * strides[4]
    mask = keep[:, None] & (channel < C)[None, :]
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_terms(pointer, strides, y, x, place, C: tl.constexpr):
    """(queries, rows or columns) of one head, minus infinity beyond the map."""
    offsets = _offsets(strides, y, x)[:, None] + place[None, :] * strides[4]
    inside = (place < C)[None, :]
    return tl.load(pointer + offsets, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _query_places(position, L: tl.constexpr, W: tl.constexpr, BM: tl.constexpr):
    """Row and column of the queries; those beyond the map get the last one's."""
    if L % BM != 0:
        position = tl.minimum(position, L - 1)
    return position // W, position % W


@triton.jit
def _key_places(row, column, H: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BW: tl.constexpr):
    """Row and column of the R * BW keys from (row, column) on, inside the map."""
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
    rows,
    columns,
    out,
    lse,
    q_strides,
    k_strides,
    v_strides,
    rows_strides,
    columns_strides,
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
    """The output of a tile of queries, and log2 of each one's normaliser."""
    L: tl.constexpr = H * W
    tiles = tl.cdiv(L, BM)
    # The tiles of one head run side by side and share its keys and values in the L2 cache.
    group = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = group // N, group % N
    position = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    y, x = _query_places(position, L, W, BM)
    dims, channels = tl.arange(0, BD), tl.arange(0, BE)
    k += _place(image, head, k_strides)
    v += _place(image, head, v_strides)
    rows += _place(image, head, rows_strides)
    columns += _place(image, head, columns_strides)
    query = _load(q + _place(image, head, q_strides), q_strides, y, x, dims, D)

    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    result = tl.zeros((BM, BE), tl.float32)
    for column in range(0, W, BW):
        column_terms = _load_terms(columns, columns_strides, y, x, column + tl.arange(0, BW), W)
        for row in range(0, H, R):
            row_terms = _load_terms(rows, rows_strides, y, x, row + tl.arange(0, R), H)
            ky, kx = _key_places(row, column, H, W, R, BW)
            key = _load(k, k_strides, ky, kx, dims, D)
            value = _load(v, v_strides, ky, kx, channels, E)
            logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            logits = tl.reshape(logits, (BM, R, BW)) + column_terms[:, None, :]
            # The row terms are added to the peaks of the rows, not to every logit.
            new_peak = tl.maximum(peak, tl.max(tl.max(logits, 2) + row_terms, 1))
            weights = tl.exp2(logits + (row_terms - new_peak[:, None])[:, :, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(tl.sum(weights, 2), 1)
            weights = tl.reshape(weights, (BM, R * BW)).to(value.dtype)
            result = tl.dot(weights, value, result * shrink[:, None], input_precision=PRECISION)
            peak = new_peak

    keep = position < L
    out += _place(image, head, out_strides)
    _store(out, out_strides, y, x, channels, E, keep, result / total[:, None])
    tl.store(lse + group * L + position, peak + tl.log2(total), mask=keep)


@triton.jit
def query_gradients(
    grad,
    q,
    k,
    v,
    rows,
    columns,
    out,
    lse,
    delta,
    dq,
    drows,
    dcolumns,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    rows_strides,
    columns_strides,
    out_strides,
    dq_strides,
    drows_strides,
    dcolumns_strides,
    drows_part,
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
    """Gradients of a tile of queries and of their row and column terms.

    Also ``delta``, the inner product of each output with its gradient, for `key_gradients`.
    Every key tile gives all of the row terms' gradient for its rows, unless the map is wider than
    BW: then part by part, ``drows_part`` apart, to be added up outside.
    """
    LN2: tl.constexpr = 0.6931471805599453
    L: tl.constexpr = H * W
    tiles = tl.cdiv(L, BM)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = group // N, group % N
    position = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    y, x = _query_places(position, L, W, BM)
    keep = position < L
    dims, channels = tl.arange(0, BD), tl.arange(0, BE)
    k += _place(image, head, k_strides)
    v += _place(image, head, v_strides)
    rows += _place(image, head, rows_strides)
    columns += _place(image, head, columns_strides)
    grad += _place(image, head, grad_strides)
    out += _place(image, head, out_strides)
    query = _load(q + _place(image, head, q_strides), q_strides, y, x, dims, D)
    dout = _load(grad, grad_strides, y, x, channels, E)
    result = _load(out, out_strides, y, x, channels, E)
    mean = tl.sum(dout.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + group * L + position, mean, mask=keep)
    normaliser = tl.load(lse + group * L + y * W + x)

    dquery = tl.zeros((BM, BD), tl.float32)
    for column in range(0, W, BW):
        u = column + tl.arange(0, BW)
        column_terms = _load_terms(columns, columns_strides, y, x, u, W)
        dcolumn_terms = tl.zeros((BM, BW), tl.float32)
        for row in range(0, H, R):
            g = row + tl.arange(0, R)
            row_terms = _load_terms(rows, rows_strides, y, x, g, H) - normaliser[:, None]
            ky, kx = _key_places(row, column, H, W, R, BW)
            key = _load(k, k_strides, ky, kx, dims, D)
            value = _load(v, v_strides, ky, kx, channels, E)
            terms = tl.reshape(row_terms[:, :, None] + column_terms[:, None, :], (BM, R * BW))
            weights = tl.exp2(tl.dot(query, tl.trans(key), terms, input_precision=PRECISION))
            dweights = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
            dlogits = weights * (dweights - mean[:, None])
            dquery = tl.dot(dlogits.to(key.dtype), key, dquery, input_precision=PRECISION)
            if RELATIVE:
                on_map = tl.reshape(dlogits, (BM, R, BW))
                dcolumn_terms += tl.sum(on_map, 1)
                part = drows + _place(image, head, drows_strides) + column // BW * drows_part
                _store(part, drows_strides, y, x, g, H, keep, tl.sum(on_map, 2) * LN2)
        if RELATIVE:
            part = dcolumns + _place(image, head, dcolumns_strides)
            _store(part, dcolumns_strides, y, x, u, W, keep, dcolumn_terms * LN2)
    dq += _place(image, head, dq_strides)
    _store(dq, dq_strides, y, x, dims, D, keep, dquery * LN2)


@triton.jit
def _query_side(
    rows,
    columns,
    lse,
    rows_strides,
    columns_strides,
    start,
    g,
    u,
    L: tl.constexpr,
    W: tl.constexpr,
    BM: tl.constexpr,
):
    """Row terms (R, BM), column terms (BW, BM) and normalisers (BM) of the queries from start."""
    position = start + tl.arange(0, BM)
    query = tl.minimum(position, L - 1)
    y, x = query // W, query % W
    row_at = g[:, None] * rows_strides[4] + _offsets(rows_strides, y, x)[None, :]
    column_at = u[:, None] * columns_strides[4] + _offsets(columns_strides, y, x)[None, :]
    # Queries beyond the map attend to nothing.
    normaliser = tl.load(lse + position, mask=position < L, other=float("inf"))
    return tl.load(rows + row_at), tl.load(columns + column_at), normaliser


@triton.jit
def key_gradients(
    grad,
    q,
    k,
    v,
    rows,
    columns,
    lse,
    delta,
    dk,
    dv,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    rows_strides,
    columns_strides,
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
    """Gradients of a tile of keys and their values. Logits lie here with the keys down."""
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
    ky, kx = _key_places(row, column, H, W, R, BW)
    dims, channels = tl.arange(0, BD), tl.arange(0, BE)
    q += _place(image, head, q_strides)
    grad += _place(image, head, grad_strides)
    rows += _place(image, head, rows_strides)
    columns += _place(image, head, columns_strides)
    lse += group * L
    delta += group * L
    key = _load(k + _place(image, head, k_strides), k_strides, ky, kx, dims, D)
    value = _load(v + _place(image, head, v_strides), v_strides, ky, kx, channels, E)

    dkey = tl.zeros((R * BW, BD), tl.float32)
    dvalue = tl.zeros((R * BW, BE), tl.float32)
    # The compiler fetches ahead what goes into products; these it would fetch when needed.
    row_terms, column_terms, normaliser = _query_side(
        rows, columns, lse, rows_strides, columns_strides, 0, g, u, L, W, BM
    )
    for start in range(0, L, BM):
        terms = (row_terms.to(tl.float32) - normaliser[None, :])[:, None, :]
        terms = tl.reshape(terms + column_terms.to(tl.float32)[None, :, :], (R * BW, BM))
        row_terms, column_terms, normaliser = _query_side(
            rows, columns, lse, rows_strides, columns_strides, start + BM, g, u, L, W, BM
        )
        y, x = _query_places(start + tl.arange(0, BM), L, W, BM)
        query = _load(q, q_strides, y, x, dims, D)
        dout = _load(grad, grad_strides, y, x, channels, E)
        mean = tl.load(delta + y * W + x)
        weights = tl.exp2(tl.dot(key, tl.trans(query), terms, input_precision=PRECISION))
        dvalue = tl.dot(weights.to(dout.dtype), dout, dvalue, input_precision=PRECISION)
        dweights = tl.dot(value, tl.trans(dout), input_precision=PRECISION)
        dlogits = weights * (dweights - mean[None, :])
        dkey = tl.dot(dlogits.to(query.dtype), query, dkey, input_precision=PRECISION)
    dk += _place(image, head, dk_strides)
    dv += _place(image, head, dv_strides)
    _store(dk, dk_strides, ky, kx, dims, D, keep, dkey * LN2)
    _store(dv, dv_strides, ky, kx, channels, E, keep, dvalue)
