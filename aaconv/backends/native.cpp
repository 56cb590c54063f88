// Exact attention over a map on the CPU, forward and backward, for the backend `native`.
//
// One thread computes one head of one image. Each vector holds consecutive queries, so softmax over
// the keys needs no sums within a vector; a tile of logits, QUERIES x KEYS, stays in the cache.
// Weights are powers of 2 because 2^x is cheaper than e^x. The backward pass recomputes the tile,
// uses it for the gradient of the queries, transposes it so that vectors hold consecutive keys, and
// uses it for the gradients of keys and values.
//
// Letters as in Python: H x W map, L = H W positions, D and E channels of keys and of values.
// The end of a name is its layout: kT is (D, L), kR is (L, D).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX512F__
constexpr int LANES = 16, COLUMNS = 6;  // per vector; columns of a product that fit in registers
#else
constexpr int LANES = 8, COLUMNS = 3;
#endif
constexpr int WIDE = 4;  // vectors side by side in a tile
constexpr int QUERIES = WIDE * LANES, KEYS = WIDE * LANES;
constexpr float LOG2E = 1.44269504f;

typedef float V __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));

namespace {

inline V load(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline V all(float x) { return x - V{}; }
inline V larger(V a, V b) { return a > b ? a : b; }
inline long ceil_to(long n, long unit) { return (n + unit - 1) / unit * unit; }

// 2^x for x <= 0, at least 2^-80, which is too small to change a sum: avoids slow denormals.
inline V exp2(V x) {
  x = x < -80.f ? all(-80.f) : x;  // NaN stays NaN
  const float shift = 12582912.f + 127.f;  // 1.5 * 2^23: the exponent is in the lowest bits
  V power = x + shift;
  const V f = x - (power - shift);
  V p = f * 1.327647187e-3f + 9.675541334e-3f;
  for (float c : {5.550713274e-2f, 2.402211972e-1f, 6.931469671e-1f, 1.000000072f}) p = p * f + c;
  U bits;
  std::memcpy(&bits, &power, sizeof bits);
  bits <<= 23;
  std::memcpy(&power, &bits, sizeof bits);
  return p * power;
}

// B^T A for A (depth, X vectors) and B (depth, count): sums start at start(c, x) and are passed to
// finish(c, x, sum).
template <int X, int COUNT, class Start, class Finish>
inline void block(long c, long depth, const float* A, long lda, const float* B, long ldb,
                  const Start& start, const Finish& finish) {
  V sum[COUNT][X];
  for (int i = 0; i < COUNT; i++)
    for (int x = 0; x < X; x++) sum[i][x] = start(c + i, x);
  for (long y = 0; y < depth; y++) {
    V a[X];
    for (int x = 0; x < X; x++) a[x] = load(A + y * lda + x * LANES);
    for (int i = 0; i < COUNT; i++) {
      const V b = all(B[y * ldb + c + i]);
      for (int x = 0; x < X; x++) sum[i][x] += a[x] * b;
    }
  }
  for (int i = 0; i < COUNT; i++)
    for (int x = 0; x < X; x++) finish(c + i, x, sum[i][x]);
}

template <int X, int COUNT = COLUMNS, class... Rest>
inline void blocks(int count, const Rest&... rest) {
  if constexpr (COUNT > 1)
    if (count < COUNT) return blocks<X, COUNT - 1>(count, rest...);
  block<X, COUNT>(rest...);
}

template <int X, class... Rest>
inline void product(long count, const Rest&... rest) {
  const long pieces = (count + COLUMNS - 1) / COLUMNS;
  for (long i = 0; i < pieces; i++) {
    const long from = i * count / pieces;
    blocks<X>((i + 1) * count / pieces - from, from, rest...);
  }
}

template <int X>
inline void add_product(float* C, long ldc, long count, long depth, const float* A, long lda,
                        const float* B, long ldb) {
  product<X>(count, depth, A, lda, B, ldb,
             [=](long c, int x) { return load(C + c * ldc + x * LANES); },
             [=](long c, int x, V sum) { store(C + c * ldc + x * LANES, sum); });
}

// Transposes a LANES x LANES square by log2(LANES) perfect shuffles of its rows.
inline void turn(float* to, long ldt, const float* from, long ldf) {
  V rows[LANES], next[LANES];
  for (int i = 0; i < LANES; i++) rows[i] = load(from + i * ldf);
  for (int round = LANES; round > 1; round /= 2) {
    for (int i = 0; i < LANES / 2; i++)
      for (int half = 0; half < 2; half++) {
        const V a = rows[i], b = rows[i + LANES / 2];
#ifdef __clang__
        for (int j = 0; j < LANES; j++) next[2 * i + half][j] = (j % 2 ? b : a)[(j + half * LANES) / 2];
#else
        U order;
        for (int j = 0; j < LANES; j++) order[j] = j / 2 + j % 2 * LANES + half * LANES / 2;
        next[2 * i + half] = __builtin_shuffle(a, b, order);
#endif
      }
    std::copy(next, next + LANES, rows);
  }
  for (int i = 0; i < LANES; i++) store(to + i * ldt, rows[i]);
}

// A tensor (B, N, H, W, channels) with any strides; type 0 is float32, 1 bfloat16, 2 float16.
struct Maps {
  const void* data;
  long type;
  const long* stride;
};

struct Shape {
  long B, N, H, W, D, E, L = H * W;
};

struct Buffer : std::vector<float> {
  explicit Buffer(long n) : std::vector<float>(n + 2 * LANES) {}
  float* at(long i) { return data() + i; }
  const float* at(long i) const { return data() + i; }
};

inline float as_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline float widened(const float* p) { return *p; }
struct BFloat16 { uint16_t bits; };
inline float widened(const BFloat16* p) { return as_float(uint32_t(p->bits) << 16); }
struct Float16 { uint16_t bits; };
inline float widened(const Float16* p) {
  const uint32_t sign = (p->bits & 0x8000u) << 16, rest = (p->bits & 0x7fffu) << 13;
  if (rest >= 0x0f800000) return as_float(sign | rest | 0x7f800000);  // infinity or NaN
  return as_float(sign | rest) * 0x1p112f;
}

// Copies the channels of one head, times `scale`, to T (channels, ld).
template <class Number>
void gather(const Number* from, const long* stride, const Shape& s, long channels, float scale,
            float* T, long ld) {
  for (long c = 0; c < channels; c++)
    for (long y = 0; y < s.H; y++) {
      const Number* row = from + y * stride[2] + c * stride[4];
      float* to = T + c * ld + y * s.W;
      if (stride[3] == 1)
        for (long x = 0; x < s.W; x++) to[x] = scale * widened(row + x);
      else
        for (long x = 0; x < s.W; x++) to[x] = scale * widened(row + x * stride[3]);
    }
}

void gather(const Maps& m, const Shape& s, long head, long channels, float scale, float* T,
            long ld, float* R = nullptr) {
  const long from = head / s.N * m.stride[0] + head % s.N * m.stride[1];
  if (m.type == 0)
    gather(static_cast<const float*>(m.data) + from, m.stride, s, channels, scale, T, ld);
  else if (m.type == 1)
    gather(static_cast<const BFloat16*>(m.data) + from, m.stride, s, channels, scale, T, ld);
  else
    gather(static_cast<const Float16*>(m.data) + from, m.stride, s, channels, scale, T, ld);
  for (long i = 0; R && i < s.L; i++)
    for (long c = 0; c < channels; c++) R[i * channels + c] = T[c * ld + i];
}

// One axis: its embeddings by offset, and `bias` (size, QUERIES), its part of the logits of a tile.
// `shifted` is `bias`, or `dbias` with zeros where there is no key, by query and offset.
struct Axis {
  long size, offsets, ld;
  bool rows;
  Buffer R, T, bias, dbias, shifted, turned, dT;

  Axis(const float* table, long size, bool rows, const Shape& s)
      : size(size), offsets(2 * size - 1), ld(ceil_to(offsets, 2 * LANES) + LANES), rows(rows),
        R(offsets * s.D), T(ld * s.D), bias(ceil_to(size, LANES) * QUERIES), dbias(bias.size()),
        shifted(QUERIES * ld), turned(ld * QUERIES), dT(s.D * ld) {
    for (long o = 0; table && o < offsets; o++)
      for (long d = 0; d < s.D; d++) T[d * ld + o] = R[o * s.D + d] = table[o * s.D + d];
  }

  // The table row for the offset from query `i` to the first key.
  long first_offset(long i, const Shape& s) const { return size - 1 - (rows ? i / s.W : i % s.W); }

  void begin(const Shape& s, const float* qT, long ldq, long first, long queries) {
    product<WIDE>(offsets, s.D, qT + first, ldq, T.at(0), ld, [](long, int) { return V{}; },
                  [&](long o, int x, V sum) { store(turned.at(o * QUERIES + x * LANES), sum); });
    for (long i = 0; i < queries; i += LANES) {
      for (long o = 0; o < offsets; o += LANES)
        turn(shifted.at(i * ld + o), ld, turned.at(o * QUERIES + i), QUERIES);
      for (long t = 0; t < size; t += LANES) {
        alignas(64) float square[LANES * LANES] = {};
        for (long lane = 0; lane < LANES && i + lane < queries; lane++)
          store(square + lane * LANES,
                load(shifted.at((i + lane) * ld + first_offset(first + i + lane, s) + t)));
        turn(bias.at(t * QUERIES + i), QUERIES, square, LANES);
      }
    }
  }

  // Adds the contribution of `dbias` to the gradients of the queries, (D, QUERIES), and embeddings.
  void end(const Shape& s, const float* qR, long first, long queries, float* dqT) {
    std::fill(shifted.begin(), shifted.end(), 0.f);
    for (long i = 0; i < queries; i += LANES)
      for (long t = 0; t < size; t += LANES) {
        alignas(64) float square[LANES * LANES];
        turn(square, LANES, dbias.at(t * QUERIES + i), QUERIES);
        for (long lane = 0; lane < LANES && i + lane < queries; lane++)
          store(shifted.at((i + lane) * ld + first_offset(first + i + lane, s) + t),
                load(square + lane * LANES));
      }
    for (long o = 0; o < offsets; o += 2 * LANES)
      add_product<2>(dT.at(o), ld, s.D, queries, shifted.at(o), ld, qR + first * s.D, s.D);
    for (long o = 0; o < offsets; o += LANES)
      for (long i = 0; i < queries; i += LANES)
        turn(turned.at(o * QUERIES + i), QUERIES, shifted.at(i * ld + o), ld);
    add_product<WIDE>(dqT, QUERIES, s.D, offsets, turned.at(0), QUERIES, R.at(0), s.D);
  }
};

// Calls `act` with the number of vectors, 1 to WIDE, as a constant.
template <int X = WIDE, class Act>
void with_width(long lanes, Act act) {
  if constexpr (X > 1)
    if (lanes <= (X - 1) * LANES) return with_width<X - 1>(lanes, act);
  act(std::integral_constant<int, X>());
}

// The memory of one thread for a head, including one tile of logits.
struct Head {
  const Shape s;
  const bool relative;
  const long Lp = ceil_to(s.L, QUERIES);
  Axis by_row, by_column;
  std::vector<long> row, column;  // where the bias of each key is
  Buffer qT, qR, kT, kR, vT, vR, gT, gR, delta, tile, dtile, turned, dturned, sums, dkT, dvT;

  Head(const Shape& s, const float* rel_h, const float* rel_w)
      : s(s), relative(rel_h), by_row(rel_h, s.H, true, s), by_column(rel_w, s.W, false, s),
        row(s.L), column(s.L), qT(s.D * Lp), qR(s.D * Lp), kT(s.D * Lp), kR(s.D * Lp),
        vT(s.E * Lp), vR(s.E * Lp), gT(s.E * Lp), gR(s.E * Lp), delta(Lp), tile(KEYS * QUERIES),
        dtile(KEYS * QUERIES), turned(KEYS * QUERIES), dturned(KEYS * QUERIES),
        sums(std::max(s.D, s.E) * QUERIES), dkT(s.D * Lp), dvT(s.E * Lp) {
    for (long i = 0; i < s.L; i++) row[i] = i / s.W * QUERIES, column[i] = i % s.W * QUERIES;
  }

  // Calls `act` for each tile of queries: its width as a constant, its first query, and its size.
  template <class Act>
  void for_queries(Act act) {
    for (long first = 0; first < s.L; first += QUERIES) {
      const long queries = std::min<long>(QUERIES, s.L - first);
      if (relative) by_row.begin(s, qT.at(0), Lp, first, queries);
      if (relative) by_column.begin(s, qT.at(0), Lp, first, queries);
      with_width(queries, [&](auto X) { act(X, first, queries); });
    }
  }

  // Computes the logits of the queries from `first` on, for `count` keys from `key` on.
  template <int X, class Finish>
  void logits(long first, long key, long count, Finish finish) {
    const float *by_row_at = by_row.bias.at(0), *by_column_at = by_column.bias.at(0);
    const long *row_at = row.data() + key, *column_at = column.data() + key;
    product<X>(count, s.D, qT.at(first), Lp, kT.at(key), Lp,
               [=](long j, int x) {
                 return load(by_row_at + row_at[j] + x * LANES) +
                        load(by_column_at + column_at[j] + x * LANES);
               },
               finish);
  }

  template <int X>
  void attend(long first, long queries, float* out, float* lse) {
    V peak[X], total[X];
    std::fill(peak, peak + X, all(-INFINITY));
    std::fill(total, total + X, V{});
    std::fill(sums.begin(), sums.end(), 0.f);
    float* const at = tile.at(0);
    for (long key = 0; key < s.L; key += KEYS) {
      const long count = std::min<long>(KEYS, s.L - key);
      V most[X];
      std::copy(peak, peak + X, most);
      logits<X>(first, key, count, [&](long j, int x, V sum) {
        most[x] = larger(sum, most[x]);
        store(at + j * QUERIES + x * LANES, sum);
      });
      for (int x = 0; x < X; x++) {
        const V shrink = exp2(peak[x] - most[x]);
        V sum = total[x] * shrink;
        for (long j = 0; j < count; j++) {
          float* const weight = at + j * QUERIES + x * LANES;
          const V value = exp2(load(weight) - most[x]);
          store(weight, value);
          sum += value;
        }
        for (long e = 0; e < s.E; e++)
          store(sums.at(e * QUERIES + x * LANES), load(sums.at(e * QUERIES + x * LANES)) * shrink);
        total[x] = sum, peak[x] = most[x];
      }
      add_product<X>(sums.at(0), QUERIES, s.E, count, at, QUERIES, vR.at(key * s.E), s.E);
    }
    for (long i = 0; i < queries; i++) {
      const float sum = total[i / LANES][i % LANES];
      lse[first + i] = peak[i / LANES][i % LANES] + std::log2(sum);
      for (long e = 0; e < s.E; e++) out[e * s.L + first + i] = sums[e * QUERIES + i] / sum;
    }
  }

  // Sums the gradients of the logits over the keys of each row and of each column.
  template <int X>
  void add_position_gradients(long key, long count) {
    for (int x = 0; x < X; x++)
      for (long j = 0; j < count;) {
        float* const to_row = by_row.dbias.at(row[key + j] + x * LANES);
        V sum = load(to_row);
        do {
          const V value = load(dtile.at(j * QUERIES + x * LANES));
          float* const to_column = by_column.dbias.at(column[key + j] + x * LANES);
          store(to_column, load(to_column) + value);
          sum += value;
        } while (++j < count && column[key + j]);
        store(to_row, sum);
      }
  }

  template <int X>
  void differentiate(long first, long queries, const float* lse, float* dq) {
    V normalizer[X], minus_delta[X];
    alignas(64) float own[QUERIES] = {};
    std::copy(lse + first, lse + first + queries, own);
    for (int x = 0; x < X; x++) normalizer[x] = load(own + x * LANES);
    for (int x = 0; x < X; x++) minus_delta[x] = -load(delta.at(first + x * LANES));
    std::fill(sums.begin(), sums.end(), 0.f);
    std::fill(by_row.dbias.begin(), by_row.dbias.end(), 0.f);
    std::fill(by_column.dbias.begin(), by_column.dbias.end(), 0.f);
    for (long key = 0; key < s.L; key += KEYS) {
      const long count = std::min<long>(KEYS, s.L - key), padded = ceil_to(count, LANES);
      float *const weights = tile.at(0), *const dlogits = dtile.at(0);
      logits<X>(first, key, count, [&](long j, int x, V sum) {
        store(weights + j * QUERIES + x * LANES, exp2(sum - normalizer[x]));
      });
      product<X>(count, s.E, gT.at(first), Lp, vT.at(key), Lp,
                 [&](long, int x) { return minus_delta[x]; },
                 [&](long j, int x, V sum) {
                   store(dlogits + j * QUERIES + x * LANES,
                         sum * load(weights + j * QUERIES + x * LANES));
                 });
      std::fill(weights + count * QUERIES, weights + padded * QUERIES, 0.f);
      std::fill(dlogits + count * QUERIES, dlogits + padded * QUERIES, 0.f);
      if (relative) add_position_gradients<X>(key, count);
      add_product<X>(sums.at(0), QUERIES, s.D, count, dlogits, QUERIES, kR.at(key * s.D), s.D);
      for (long j = 0; j < padded; j += LANES)
        for (long i = 0; i < X * LANES; i += LANES) {
          turn(turned.at(i * KEYS + j), KEYS, weights + j * QUERIES + i, QUERIES);
          turn(dturned.at(i * KEYS + j), KEYS, dlogits + j * QUERIES + i, QUERIES);
        }
      with_width(count, [&](auto width) {
        add_product<width>(dvT.at(key), Lp, s.E, queries, turned.at(0), KEYS, gR.at(first * s.E),
                           s.E);
        add_product<width>(dkT.at(key), Lp, s.D, queries, dturned.at(0), KEYS, qR.at(first * s.D),
                           s.D);
      });
    }
    if (relative) by_row.end(s, qR.at(0), first, queries, sums.at(0));
    if (relative) by_column.end(s, qR.at(0), first, queries, sums.at(0));
    const float scale = 1 / std::sqrt(float(s.D));
    for (long d = 0; d < s.D; d++)
      for (long i = 0; i < queries; i++) dq[d * s.L + first + i] = scale * sums[d * QUERIES + i];
  }
};

// Writes a gradient times `scale`: the queries contain log2(e), which only the logits need.
void write(float* to, const Buffer& from, long ld, long channels, long length, float scale) {
  for (long c = 0; c < channels; c++)
    for (long i = 0; i < length; i++) to[c * length + i] = scale * from[c * ld + i];
}

// data: q, k, v, grad, rel_h, rel_w, out, lse, dq, dk, dv, drel_h, drel_w; numbers: B, N, H, W, D,
// E, the number of threads, then for each of q, k, v and grad its type and five strides.
template <class Act>
void for_heads(void** data, const long* numbers, Act act) {
  const Shape s{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
  const float *rel_h = static_cast<float*>(data[4]), *rel_w = static_cast<float*>(data[5]);
#pragma omp parallel num_threads(numbers[6])
  {
    Head h(s, rel_h, rel_w);
#pragma omp for schedule(dynamic)
    for (long head = 0; head < s.B * s.N; head++) {
      auto take = [&](int i, long channels, float scale, Buffer& T, Buffer& R) {
        const long* const about = numbers + 7 + 6 * i;
        gather({data[i], about[0], about + 1}, s, head, channels, scale, T.at(0), h.Lp, R.at(0));
      };
      take(0, s.D, LOG2E / std::sqrt(float(s.D)), h.qT, h.qR);
      take(1, s.D, 1, h.kT, h.kR);
      take(2, s.E, 1, h.vT, h.vR);
      if (data[3]) take(3, s.E, 1, h.gT, h.gR);
      act(h, head, [&](int i, long size) { return static_cast<float*>(data[i]) + head * size; });
    }
  }
}

}  // namespace

// Sets out (B, N, E, H, W) and lse (B, N, H, W).
extern "C" void aaconv_attend(void** data, const long* numbers) {
  for_heads(data, numbers, [](Head& h, long, auto part) {
    const Shape& s = h.s;
    h.for_queries([&](auto X, long first, long queries) {
      h.attend<X>(first, queries, part(6, s.E * s.L), part(7, s.L));
    });
  });
}

// Sets dq, dk and dv, (B, N, channels, H, W), and drel_h and drel_w, (B, N, D, offsets), separately
// for each head so that their sum over heads does not depend on the number of threads.
extern "C" void aaconv_attend_backward(void** data, const long* numbers) {
  for_heads(data, numbers, [](Head& h, long, auto part) {
    const Shape& s = h.s;
    for (Buffer* zero : {&h.dkT, &h.dvT, &h.by_row.dT, &h.by_column.dT})
      std::fill(zero->begin(), zero->end(), 0.f);
    const float* const out = part(6, s.E * s.L);
    for (long i = 0; i < s.L; i++) {
      h.delta[i] = 0;
      for (long e = 0; e < s.E; e++) h.delta[i] += h.gT[e * h.Lp + i] * out[e * s.L + i];
    }
    h.for_queries([&](auto X, long first, long queries) {
      h.differentiate<X>(first, queries, part(7, s.L), part(8, s.D * s.L));
    });
    write(part(9, s.D * s.L), h.dkT, h.Lp, s.D, s.L, 1 / LOG2E);
    write(part(10, s.E * s.L), h.dvT, h.Lp, s.E, s.L, 1);
    for (auto [i, axis] : {std::pair(11, &h.by_row), std::pair(12, &h.by_column)})
      if (h.relative) write(part(i, s.D * axis->offsets), axis->dT, axis->ld, s.D, axis->offsets,
                            1 / LOG2E);
  });
}
