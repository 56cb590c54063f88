"""Triton kernels for attention over a map with relative positions, forward and backward.

A program processes tiles of queries, one after another, and loops over tiles of keys. A tile of
keys is R rows by BW columns of the map, so within a tile each query has R terms for the key rows
and BW terms for the key columns; the latter stay in registers during the loop over rows.

The terms are products of the queries with a table: one number per query and offset. The offset of a
key depends on the query's own row or column, and registers cannot be shifted by that, so the terms
go through ``scratch``, memory that the program reuses for its next tile. They are written by offset
and read by key. The gradients of the terms go the opposite way.

Weights are powers of 2. A logit is SCALE * (q k^T + terms) with SCALE = log2(e) / sqrt(D).

Letters: N heads, H x W map, L = H * W positions; D and E channels per head of queries/keys and of
values, padded to BD and BE; BM queries and R * BW keys per tile, R padded to RP; HP and WP the
padded numbers of row and column offsets. Strides are those of (B, N, L, channels), followed by a
power of two that divides the first three.

Indices outside the map are clamped to its last row, column or query instead of masked, so that
loads stay wide; a term of minus infinity gives such keys zero weight.
"""

import triton
import triton.language as tl


@triton.jit
def _head_offset(image, head, strides):
    """Return the offset of one head's data from the start of the tensor."""
    offset = image * strides[0] + head * strides[1]
    # A hint of 1 would override what the compiler can infer by itself.
    if strides[4] > 1:
        offset = tl.multiple_of(offset, strides[4])
    return offset


@triton.jit
def _offsets(strides, position, channel):
    """Return offsets of (positions, channels) from the start of the head's data."""
    return position.to(tl.int64)[:, None] * strides[2] + channel.to(tl.int64)[None, :] * strides[3]


@triton.jit
def _load(pointer, strides, position, channel, C: tl.constexpr, padding: tl.constexpr):
    """Load (positions, channels) of one head, with ``padding`` in channels C and above."""
    at = pointer + _offsets(strides, position, channel)
    return tl.load(at, mask=(channel < C)[None, :], other=padding)


@triton.jit
def _store(
    pointer,
    strides,
    position,
    channel,
    C: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    value,
):
    """Write ``value`` (positions, channels), but only positions below L and channels below C."""
    mask = (channel < C)[None, :]
    if L % BM != 0:
        mask &= (position < L)[:, None]
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + _offsets(strides, position, channel), value, mask=mask)


@triton.jit
def _queries(tile, L: tl.constexpr, BM: tl.constexpr):
    """Return the positions of a tile of queries, clamped to the last one of the map."""
    position = tile * BM + tl.arange(0, BM)
    if L % BM != 0:
        position = tl.minimum(position, L - 1)
    return position


@triton.jit
def _keys(row, column, H: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BW: tl.constexpr):
    """Return the positions of the tile of keys starting at (row, column), clamped to the map."""
    key = tl.arange(0, R * BW)
    if W == BW and H % R == 0:
        return row * W + key
    y = tl.minimum(row + key // BW, H - 1)
    x = tl.minimum(column + key % BW, W - 1)
    return y * W + x


@triton.jit
def _by_offset(scratch, offset, CP: tl.constexpr, BM: tl.constexpr):
    return scratch + (tl.arange(0, BM)[:, None] * CP + offset[None, :])


@triton.jit
def _by_key(scratch, at, key, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr):
    """Return pointers to the terms of queries in rows/columns ``at`` for rows/columns ``key``."""
    start = tl.arange(0, BM) * CP + (C - 1 - at)
    return scratch + (start[:, None] + key[None, :])


@triton.jit
def _embeddings(table, offset, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Load (offsets, channels) of a table (2C-1, D), with offsets clamped to it."""
    dims = tl.arange(0, BD)
    at = table + (tl.minimum(offset, 2 * C - 2)[:, None] * D + dims[None, :])
    return tl.load(at, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def _write_terms(
    scratch,
    query,
    table,
    C: tl.constexpr,
    CP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the terms of all queries for all offsets of the table, (BM, CP)."""
    # Larger blocks would need more registers.
    BLOCK: tl.constexpr = CP if CP < 32 else 32
    for block in range(0, CP, BLOCK):
        offset = block + tl.arange(0, BLOCK)
        embedding = _embeddings(table, offset, C, D, BD)
        terms = tl.dot(query, tl.trans(embedding), input_precision=PRECISION)
        tl.store(_by_offset(scratch, offset, CP, BM), terms * SCALE)


@triton.jit
def _terms(
    scratch,
    at,
    key,
    C: tl.constexpr,
    CP: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    RELATIVE: tl.constexpr,
):
    """Load the terms of queries in rows or columns ``at`` for key rows or columns ``key``.

    They are minus infinity outside the map.
    """
    inside = (key < C)[None, :]
    if RELATIVE:
        place = _by_key(scratch, at, key, C, CP, BM)
        if C % BLOCK == 0:
            return tl.load(place)
        return tl.load(place, mask=inside, other=float("-inf"))
    zeros = tl.zeros((BM, BLOCK), tl.float32)
    return tl.where(inside, zeros, float("-inf"))


@triton.jit
def attend(
    q,
    k,
    v,
    rel_h,
    rel_w,
    scratch,
    out,
    lse,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    N,
    work,
    ALL: tl.constexpr,
    RELATIVE: tl.constexpr,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    R: tl.constexpr,
    BW: tl.constexpr,
    HP: tl.constexpr,
    WP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the output of each query, and log2 of its normalizer.

    The peak over the first keys of the map is subtracted from the logits. It need not be the peak
    over all keys, only close enough that no power overflows. If one does, the normalizer is not
    finite, and a second launch with ALL recomputes those tiles with the peak over all keys.
    """
    L: tl.constexpr = H * W
    FEW: tl.constexpr = 1 if BW >= 16 else 16 // BW
    tiles = tl.cdiv(L, BM)
    by_row = scratch + tl.program_id(0).to(tl.int64) * (BM * (HP + WP))
    by_column = by_row + BM * HP
    dims, channels = tl.arange(0, BD), tl.arange(0, BE)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        # Tiles of the same head run concurrently and share its keys and values in the L2 cache.
        group = (item // tiles).to(tl.int64)
        image, head = group // N, group % N
        position = _queries(item % tiles, L, BM)
        y, x = position // W, position % W
        wanted = True
        if ALL:
            known = tl.load(lse + group * L + position)
            wanted = tl.max(tl.where(known - known == 0, 0, 1), 0) > 0
        if wanted:
            key_start = k + _head_offset(image, head, k_strides)
            value_start = v + _head_offset(image, head, v_strides)
            query_start = q + _head_offset(image, head, q_strides)
            query = _load(query_start, q_strides, position, dims, D, 0.0)
            if RELATIVE:
                tl.debug_barrier()  # all threads have read the terms of the previous tile
                _write_terms(by_row, query, rel_h, H, HP, D, BD, BM, SCALE, PRECISION)
                _write_terms(by_column, query, rel_w, W, WP, D, BD, BM, SCALE, PRECISION)
                tl.debug_barrier()

            if ALL:
                peak = tl.full((BM,), float("-inf"), tl.float32)
                for column in range(0, W, BW):
                    u = column + tl.arange(0, BW)
                    col_terms = _terms(by_column, x, u, W, WP, BM, BW, RELATIVE)
                    for row in range(0, H, R):
                        row_terms = _terms(by_row, y, row + tl.arange(0, R), H, HP, BM, R, RELATIVE)
                        at = _keys(row, column, H, W, R, BW)
                        key = _load(key_start, k_strides, at, dims, D, 0.0)
                        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
                        logits = tl.reshape(logits, (BM, R, BW)) * SCALE + col_terms[:, None, :]
                        peak = tl.maximum(peak, tl.max(tl.max(logits, 2) + row_terms, 1))
            else:
                few = _keys(0, 0, H, W, FEW, BW)
                first = _load(key_start, k_strides, few, dims, D, 0.0)
                some = tl.dot(query, tl.trans(first), input_precision=PRECISION)
                some = tl.reshape(some, (BM, FEW, BW)) * SCALE
                some += _terms(by_row, y, tl.arange(0, FEW), H, HP, BM, FEW, RELATIVE)[:, :, None]
                some += _terms(by_column, x, tl.arange(0, BW), W, WP, BM, BW, RELATIVE)[:, None, :]
                peak = tl.max(tl.max(some, 2), 1)

            result = tl.zeros((BM, BE), tl.float32)
            for column in range(0, W, BW):
                u = column + tl.arange(0, BW)
                col_terms = _terms(by_column, x, u, W, WP, BM, BW, RELATIVE) - peak[:, None]
                for row in range(0, H, R):
                    row_terms = _terms(by_row, y, row + tl.arange(0, R), H, HP, BM, R, RELATIVE)
                    at = _keys(row, column, H, W, R, BW)
                    key = _load(key_start, k_strides, at, dims, D, 0.0)
                    # Ones in the padding: their product with the weights is the total.
                    value = _load(value_start, v_strides, at, channels, E, 1.0)
                    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
                    logits = tl.reshape(logits, (BM, R, BW)) * SCALE + col_terms[:, None, :]
                    weights = tl.exp2(logits + row_terms[:, :, None])
                    weights = tl.reshape(weights, (BM, R * BW)).to(value.dtype)
                    result = tl.dot(weights, value, result, input_precision=PRECISION)

            total = tl.sum(tl.where((channels == E)[None, :], result, 0.0), 1)
            # The last term is zero unless there are infinities or NaN.
            normalizer = peak + tl.log2(total) + tl.sum(result - result, 1)
            last = item % tiles * BM + tl.arange(0, BM)
            out_start = out + _head_offset(image, head, out_strides)
            _store(out_start, out_strides, last, channels, E, L, BM, result / total[:, None])
            tl.store(lse + group * L + last, normalizer, mask=(last < L) | (L % BM == 0))


@triton.jit
def _add(pointer, value, mask, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(pointer, value, mask=mask, sem="relaxed")
    else:
        tl.store(pointer, tl.load(pointer, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def _through_table(
    dterms,
    at,
    query,
    table,
    dtable,
    dquery,
    C: tl.constexpr,
    CP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the terms' gradient to ``dquery``, returned, and the table's gradient to ``dtable``."""
    BLOCK: tl.constexpr = CP if CP < 32 else 32
    for block in range(0, CP, BLOCK):
        offset = block + tl.arange(0, BLOCK)
        key = offset[None, :] + (at - (C - 1))[:, None]
        place = dterms + (tl.arange(0, BM)[:, None] * (CP // 2) + key)
        by_offset = tl.load(place, mask=(key >= 0) & (key < C), other=0.0).to(query.dtype)
        embedding = _embeddings(table, offset, C, D, BD)
        dquery = tl.dot(by_offset, embedding, dquery, input_precision=PRECISION)
        dembedding = tl.dot(tl.trans(by_offset), query, input_precision=PRECISION)
        place = dtable + (offset[:, None] * BD + tl.arange(0, BD)[None, :])
        tl.store(place, tl.load(place) + dembedding)
    return dquery


@triton.jit
def gradients(
    grad,
    q,
    k,
    v,
    rel_h,
    rel_w,
    out,
    lse,
    scratch,
    dq,
    dk,
    dv,
    dtables,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dq_strides,
    N,
    work,
    ATOMIC: tl.constexpr,
    RELATIVE: tl.constexpr,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BW: tl.constexpr,
    HP: tl.constexpr,
    WP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute all gradients; add those of keys, values and tables to ``dk``, ``dv``, ``dtables``.

    ``dk`` and ``dtables`` lack the factor 1 / sqrt(D). If ATOMIC, a work item is a tile of queries;
    otherwise it is all queries of a head, so that only one program adds to the head's ``dk`` and
    ``dv``, always in the same order. ``dtables`` has a separate part for each program.
    """
    LN2: tl.constexpr = 0.6931471805599453
    L: tl.constexpr = H * W
    tiles = tl.cdiv(L, BM)
    by_row = scratch + tl.program_id(0).to(tl.int64) * (BM * (HP + WP) * 3 // 2)
    by_column = by_row + BM * HP
    drow = by_row + BM * (HP + WP)
    dcolumn = drow + BM * (HP // 2)
    dtables += tl.program_id(0).to(tl.int64) * (BD * (HP + WP))
    dims, channels = tl.arange(0, BD), tl.arange(0, BE)
    # Products with is_row are sums over the columns of each key row.
    key_row = tl.arange(0, RP)
    is_row = tl.arange(0, R * BW)[:, None] // BW == key_row[None, :]
    is_row = is_row.to(tl.float32).to(k.dtype.element_ty)
    together = 1 if ATOMIC else tiles
    for item in range(tl.program_id(0) * together, work, tl.num_programs(0) * together):
        for index in range(item, item + together):
            group = (index // tiles).to(tl.int64)
            image, head = group // N, group % N
            position = _queries(index % tiles, L, BM)
            y, x = position // W, position % W
            key_start = k + _head_offset(image, head, k_strides)
            value_start = v + _head_offset(image, head, v_strides)
            query_start = q + _head_offset(image, head, q_strides)
            grad_start = grad + _head_offset(image, head, grad_strides)
            out_start = out + _head_offset(image, head, out_strides)
            query = _load(query_start, q_strides, position, dims, D, 0.0)
            dresult = _load(grad_start, grad_strides, position, channels, E, 0.0).to(tl.float32)
            result = _load(out_start, out_strides, position, channels, E, 0.0)
            # The product of dout and value, with ones in value's padding, subtracts the mean. It is
            # split over two channels, for twice the precision of one.
            mean = -tl.sum(dresult * result, 1)
            dout = dresult.to(query.dtype)
            high = mean.to(tl.bfloat16).to(tl.float32)
            low = (mean - high).to(dout.dtype)
            dout = tl.where((channels == E)[None, :], high.to(dout.dtype)[:, None], dout)
            dout = tl.where((channels == E + 1)[None, :], low[:, None], dout)
            last = index % tiles * BM + tl.arange(0, BM)
            normalizer = tl.load(lse + group * L + position)
            if L % BM != 0:  # queries outside the map attend to nothing
                normalizer = tl.where(last < L, normalizer, float("inf"))
            tl.debug_barrier()  # all threads have read the previous terms and added their gradients
            if RELATIVE:
                _write_terms(by_row, query, rel_h, H, HP, D, BD, BM, SCALE, PRECISION)
                _write_terms(by_column, query, rel_w, W, WP, D, BD, BM, SCALE, PRECISION)
                tl.debug_barrier()

            dquery = tl.zeros((BM, BD), tl.float32)
            for column in range(0, W, BW):
                if W > BW:
                    tl.debug_barrier()  # drow holds the sums over the previous columns
                u = column + tl.arange(0, BW)
                col_terms = _terms(by_column, x, u, W, WP, BM, BW, RELATIVE) - normalizer[:, None]
                dcol_terms = tl.zeros((BM, BW), tl.float32)
                for row in range(0, H, R):
                    row_terms = _terms(by_row, y, row + tl.arange(0, R), H, HP, BM, R, RELATIVE)
                    at = _keys(row, column, H, W, R, BW)
                    key = _load(key_start, k_strides, at, dims, D, 0.0)
                    value = _load(value_start, v_strides, at, channels, E, 1.0)
                    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
                    logits = tl.reshape(logits, (BM, R, BW)) * SCALE + col_terms[:, None, :]
                    weights = tl.exp2(logits + row_terms[:, :, None])
                    weights = tl.reshape(weights, (BM, R * BW))
                    dweights = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
                    dlogits = weights * dweights
                    if RELATIVE:
                        dcol_terms += tl.sum(tl.reshape(dlogits, (BM, R, BW)), 1)
                    weights, dlogits = weights.to(dout.dtype), dlogits.to(key.dtype)
                    dquery = tl.dot(dlogits, key, dquery, input_precision=PRECISION)
                    if RELATIVE:
                        drow_terms = tl.dot(dlogits, is_row, input_precision=PRECISION)
                        where = (
                            drow + row + (tl.arange(0, BM)[:, None] * (HP // 2) + key_row[None, :])
                        )
                        inside = ((key_row < R) & (row + key_row < H))[None, :]
                        if W > BW:
                            before = inside & (column > 0)
                            drow_terms += tl.load(where, mask=before, other=0.0)
                        tl.store(where, drow_terms, mask=inside)
                    dvalue = tl.dot(tl.trans(weights), dout, input_precision=PRECISION)
                    dkey = tl.dot(tl.trans(dlogits), query, input_precision=PRECISION)
                    keep = tl.full((R * BW,), True, tl.int1)
                    if W % BW != 0 or H % R != 0:
                        which = tl.arange(0, R * BW)
                        keep = (row + which // BW < H) & (column + which % BW < W)
                    at = at.to(tl.int64)[:, None]
                    dkey_at = dk + group * (L * D) + (at * D + dims[None, :])
                    dvalue_at = dv + group * (L * E) + (at * E + channels[None, :])
                    _add(dkey_at, dkey, keep[:, None] & (dims < D)[None, :], ATOMIC)
                    _add(dvalue_at, dvalue, keep[:, None] & (channels < E)[None, :], ATOMIC)
                if RELATIVE:
                    where = dcolumn + (tl.arange(0, BM)[:, None] * (WP // 2) + u[None, :])
                    tl.store(where, dcol_terms, mask=(u < W)[None, :])

            if RELATIVE:
                tl.debug_barrier()
                dquery = _through_table(
                    drow, y, query, rel_h, dtables, dquery, H, HP, D, BD, BM, PRECISION
                )
                dtable = dtables + HP * BD
                dquery = _through_table(
                    dcolumn, x, query, rel_w, dtable, dquery, W, WP, D, BD, BM, PRECISION
                )
            dq_start = dq + _head_offset(image, head, dq_strides)
            _store(dq_start, dq_strides, last, dims, D, L, BM, dquery * (SCALE * LN2))
