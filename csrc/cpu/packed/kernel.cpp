// The kernels of the family `packed` on the vectors of cpu/simd.h; compiled once per instruction set.
#include "cpu/lanes_along_k.h"
#include "cpu/packed/schedule.h"
#include "cpu/packed/kernel.h"

namespace lowbit {
namespace packed {
namespace {

// scale[g - g0], zero[g - g0] of row n for groups [g0, g1)
inline void load_groups(const Weight& w, int64_t n, int64_t g0, int64_t g1, float* scale, float* zero) {
  const int64_t row = w.per_tensor ? 0 : n, count = g1 - g0;
  to_floats(w.scales, w.scales_dtype, row * w.scales_row + g0 * w.scales_group, w.scales_group, count, scale);
  if (w.zeros) {
    to_floats(w.zeros, w.zeros_dtype, row * w.zeros_row + g0 * w.zeros_group, w.zeros_group, count, zero);
  } else {
    for (int64_t g = 0; g < count; ++g) zero[g] = float(1 << (w.bits - 1));
  }
}

// =========================================================================================================
// Float activations

// out[i] = (codes[i] - zero) * scale. The subtraction and the product round once each, in every variant.
inline void dequantize_run(const uint8_t* codes, int64_t n, int bits, float zero, float scale, float* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const Float z = splat(zero), s = splat(scale);
  if (bits <= 4) {  // all the values a code can take fit one register
    const Float iota = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const Float table = _mm512_mul_ps(_mm512_sub_ps(iota, z), s);
    for (; i < n; i += 16) {
      Int c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
      Float v = _mm512_permutexvar_ps(c, table);
      if (i + 16 <= n)
        store(out + i, v);
      else
        _mm512_mask_storeu_ps(out + i, __mmask16((1u << (n - i)) - 1), v);
    }
    return;
  }
  for (; i < n; i += 16) {
    Int c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    Float v = _mm512_mul_ps(_mm512_sub_ps(to_float(c), z), s);
    if (i + 16 <= n)
      store(out + i, v);
    else
      _mm512_mask_storeu_ps(out + i, __mmask16((1u << (n - i)) - 1), v);
  }
#elif defined(__AVX2__)
  const Float z = splat(zero), s = splat(scale);
  const Float table = _mm256_mul_ps(_mm256_sub_ps(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), z), s);
  for (; i + 8 <= n; i += 8) {
    Int c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    store(out + i, bits <= 3 ? _mm256_permutevar8x32_ps(table, c)
                             : _mm256_mul_ps(_mm256_sub_ps(to_float(c), z), s));
  }
  for (; i < n; ++i) out[i] = (float(codes[i]) - zero) * scale;
#else
  (void)bits;
  for (; i < n; ++i) out[i] = (float(codes[i]) - zero) * scale;
#endif
}

// The codes of a row as bytes, wherever they stand. k0 is a multiple of 32; up to kUnpackSlack codes behind k1 are
// written too.
inline void row_codes(const Weight& w, int64_t n, int64_t k0, int64_t k1, uint8_t* out) {
  in_block(w, n) ? block_row_codes(w, n, k0, k1, out) : unpack_row(w, n, k0, k1, out);
}

#if defined(__AVX512VBMI__)
// The same as below from canonical codes, where groups are whole vectors of them: no code goes by way of memory.
inline void dequantize_vectors(const Weight& w, int64_t n, int64_t k0, int64_t k1, float* out) {
  const Unpack64 unpack(w.bits);
  const __mmask8 whole = __mmask8((1 << w.bits) - 1);
  const uint8_t* src = w.packed + n * w.row_bytes + k0 / 8 * w.bits;
  const Float iota = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  Float scales = splat(0.0f), zeros = scales;  // of 16 groups
  for (int64_t k = k0, g = k0 / w.group_size, i = 0; k < k1; ++g, i = (i + 1) % kLanes) {
    if (i == 0) {
      const int64_t row = w.per_tensor ? 0 : n, some = min64(kLanes, w.G - g);
      scales = some_floats(w.scales, w.scales_dtype, row * w.scales_row + g * w.scales_group, w.scales_group, some);
      zeros = w.zeros ? some_floats(w.zeros, w.zeros_dtype, row * w.zeros_row + g * w.zeros_group, w.zeros_group, some)
                      : splat(float(1 << (w.bits - 1)));
    }
    const Int lane = splat(int32_t(i));
    const Float z = _mm512_permutexvar_ps(lane, zeros), s = _mm512_permutexvar_ps(lane, scales);
    const Float table = (iota - z) * s;
    for (const int64_t end = min64((g + 1) * w.group_size, k1); k < end; k += 64, src += 8 * w.bits, out += 64) {
      const Int codes = unpack(end - k > 32 ? _mm512_maskz_loadu_epi64(whole, src)
                                            : _mm512_maskz_loadu_epi32(__mmask16(whole), src));
      const __m128i part[4] = {_mm512_castsi512_si128(codes), _mm512_extracti32x4_epi32(codes, 1),
                               _mm512_extracti32x4_epi32(codes, 2), _mm512_extracti32x4_epi32(codes, 3)};
      LOWBIT_UNROLL for (int v = 0; v < 4; ++v) {
        const Int c = _mm512_cvtepu8_epi32(part[v]);
        const Float value = w.bits <= 4 ? _mm512_permutexvar_ps(c, table) : (to_float(c) - z) * s;
        const int64_t left = end - k - v * kLanes;
        if (left >= kLanes)
          store(out + v * kLanes, value);
        else if (left > 0)
          _mm512_mask_storeu_ps(out + v * kLanes, __mmask16((1u << left) - 1), value);
      }
    }
  }
}
#endif

// out[k - k0] = w[n, k] without its outliers, k0 <= k < k1; k0 is a multiple of 32, k1 - k0 at most kChunk
inline void dequantize_codes(const Weight& w, int64_t n, int64_t k0, int64_t k1, float* out) {
#if defined(__AVX512VBMI__)
  if (!in_block(w, n) && (w.G == 1 || w.group_size % 64 == 0)) return dequantize_vectors(w, n, k0, k1, out);
#endif
  uint8_t codes[kChunk + kUnpackSlack];
  row_codes(w, n, k0, k1, codes);
  constexpr int64_t kGroups = 16;  // whose scales are read together
  float scale[kGroups], zero[kGroups];
  const int64_t g0 = k0 / w.group_size;
  for (int64_t k = k0, g = g0; k < k1; ++g) {
    const int64_t end = min64((g + 1) * w.group_size, k1), i = (g - g0) % kGroups;
    if (i == 0) load_groups(w, n, g, min64(g + kGroups, w.G), scale, zero);
    dequantize_run(codes + (k - k0), end - k, w.bits, zero[i], scale[i], out + (k - k0));
    k = end;
  }
}

void dequantize(const Weight& w, int64_t n, DType dtype, void* out) {
  const Outliers& o = w.outliers;
  int64_t next = o ? o.rows[n] : 0;
  const int64_t end = o ? o.rows[n + 1] : 0;
  float values[kChunk];
  for (int64_t k0 = 0; k0 < w.K; k0 += kChunk) {
    const int64_t k1 = min64(k0 + kChunk, w.K);
    float* to = dtype == DType::f32 ? static_cast<float*>(out) + k0 : values;
    dequantize_codes(w, n, k0, k1, to);
    for (; next < end && outlier_column(o, next) < k1; ++next)
      to[outlier_column(o, next) - k0] += outlier_value(o, next);
    if (to == values) from_float(values, dtype, k0, k1 - k0, out);
  }
}

// =========================================================================================================
// y = x @ w.T, kPanelN output rows at a time (register_tiles.h, schedule.h)

inline bool integer_zeros(const Weight& w) { return !w.zeros || w.zeros_dtype == DType::u8; }
inline Plan plan_of(const Linear& a) { return Plan(a, integer_zeros(a.weight)); }

template <class Dot>
class Multiplier {
 public:
  Multiplier(Arena& arena, const Linear& a, const void* prepared)
      : a_(a),
        w_(a.weight),
        p_(plan_of(a)),
        x_(prepared, a, p_),
        segments_(arena.take<Segment>(p_.segments)),
        scale_lanes_(arena.take<float>((p_.chunk + kGroups) * kPanelN)),
        zero_lanes_(arena.take<float>((p_.chunk + kGroups) * kPanelN)),
        middle_(arena.take<float>(kPanelN)),
        values_(arena.take<float>(kBlockRows * kGroups)),
        acc_(arena.take<float>(round_up(min64(a.M, kPassRows), p_.tile) * kPanelN)),
        bias_(arena.take<float>(kPanelN)),
        panel_(arena.take<uint8_t>(
            fused(kPanelN) && w_.N % kPanelN == 0 ? 0 : chunk_positions() / 4 * Dot::kSteps * kStepBytes)),
        quads_(arena.take<uint8_t>(chunk_positions() / 4 * 64)),
        codes_(arena.take<uint8_t>(chunk_positions() + 2 * kUnitColumns + kUnpackSlack)),
        sums_(arena.take<float>(a.weight.outliers ? kPassRows : 0)),
        dense_(arena.take<float>(kChunk)),
        special_(arena.take<float>(kChunk)) {
    if (arena.counting()) return;
    for (int64_t s = 0; s < p_.segments; ++s)
      segments_[s] = {int32_t(p_.begin(s) / 4 * Dot::kSteps), int32_t(p_.end(s) / 4 * Dot::kSteps),
                      int32_t(p_.group(s))};
    for (int64_t i = 0; i < kPanelN; ++i) middle_[i] = float(1 << (w_.bits - 1));
  }

  // y[:, n0:n1], at most kPanelN columns
  void operator()(int64_t n0, int64_t n1) {
    n0_ = n0;
    n1_ = n1;
    if (a_.bias) to_float(a_.bias, a_.bias_dtype, n0, n1 - n0, bias_);
    for (int64_t m0 = 0; m0 < a_.M; m0 += kPassRows) {
      const int64_t m1 = min64(m0 + kPassRows, a_.M);
      std::memset(acc_, 0, size_t((m1 - m0) * kPanelN) * sizeof(float));
      for (int64_t s0 = 0; s0 < p_.segments; s0 += p_.chunk) {
        const int64_t s1 = min64(s0 + p_.chunk, p_.segments);
        if (!p_.exact) load_groups(s0, s1);
        if (!fused(n1 - n0) && !is_panel()) expand(s0, s1);
        for (int64_t m = m0; m < m1; m += p_.tile) multiply(m, acc_ + (m - m0) * kPanelN, s0, s1);
      }
      finish(m0, m1);
      write_result(a_, m0, m1, n0, n1, bias_, acc_, kPanelN);
    }
  }

 private:
  static constexpr int64_t kGroups = 16;  // whose scales are read together
  int64_t chunk_positions() const { return min64(p_.chunk * p_.segment, p_.padded) + kUnitColumns; }

  // Whether `rows` rows of w are multiplied straight from their blocks.
  bool fused(int64_t rows) const { return p_.fused && rows == kPanelN; }

  // Whether the blocks of this panel are what it would be expanded to.
  bool is_panel() const {
    return Dot::kCodes && w_.bits == 8 && p_.whole_units && n1_ - n0_ == kPanelN && in_block(w_, n1_ - 1);
  }

  // The scales and zeros of this panel for the groups of segments [s0, s1).
  void load_groups(int64_t s0, int64_t s1) {
    const int64_t g0 = p_.group(s0), g1 = p_.group(s1 - 1) + 1;
    scale_ = lanes_of(w_.scales, w_.scales_dtype, w_.scales_row, w_.scales_group, g0, g1, scale_lanes_);
    zero_ = w_.zeros ? lanes_of(w_.zeros, w_.zeros_dtype, w_.zeros_row, w_.zeros_group, g0, g1, zero_lanes_)
                     : Lanes{middle_, DType::f32, 0};
  }

  // Where they stand, or where whole panels of them do not, `lanes`: [g1 - g0, kPanelN].
  Lanes lanes_of(const void* values, DType dtype, int64_t row, int64_t group, int64_t g0, int64_t g1, float* lanes) {
    const int64_t rows = n1_ - n0_, size = element_size(dtype);
    const bool by_group = group > 1 || w_.G == 1;  // in memory
    if (w_.per_tensor) {
      to_float(values, dtype, 0, 1, lanes);
      for (int64_t i = 1; i < kPanelN; ++i) lanes[i] = lanes[0];
      return {lanes, DType::f32, 0};
    }
    if (by_group && rows == kPanelN) {
      const Lanes stored{static_cast<const uint8_t*>(values) + n0_ * size, dtype, group};
      if (fused(rows)) return stored;
      for (int64_t g = g0; g < g1; ++g) {
        stored.prefetch(g, kPanelN, kPanelN);  // of the next panel
        for (int64_t i = 0; i < kPanelN; i += kLanes) store(lanes + (g - g0) * kPanelN + i, stored.at(g, i));
      }
      return {lanes - g0 * kPanelN, DType::f32, kPanelN};
    }
    for (int64_t g = g0; g < g1; g += kGroups) {
      const int64_t count = min64(kGroups, g1 - g);
      for (int64_t r = 0; r < rows; r += kBlockRows) {
        const int64_t some = min64(kBlockRows, rows - r);
        for (int64_t i = 0; i < some; ++i)
          to_floats(values, dtype, (n0_ + r + i) * row + g * group, group, count, values_ + i * kGroups);
        transpose16(values_, some, lanes + (g - g0) * kPanelN + r, kPanelN);
      }
    }
    return {lanes - g0 * kPanelN, DType::f32, kPanelN};
  }

  // panel_ = the weights of segments [s0, s1)
  void expand(int64_t s0, int64_t s1) {
    const int64_t p0 = p_.begin(s0);
    const bool many = n1_ - n0_ == kPanelN && in_block(w_, n1_ - 1) && p_.whole_units;
    const int64_t blocks = many ? kTileBlocks : 1;  // at a time
    for (int64_t n = n0_; n < n1_; n += blocks * kBlockRows) {
      const bool units = in_block(w_, n) && p_.whole_units;
      const BlockPlace block = place_of_block(w_, n);
      for (int64_t i = 0; !units && i < min64(kBlockRows, n1_ - n); ++i) write_quads(n + i, s0, s1, quads_ + 4 * i);
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t p = p_.begin(s), count = p_.end(s) - p;
        Float zero[kTileBlocks * kParts];
        for (int64_t part = 0; part < blocks * kParts; ++part)
          zero[part] = Dot::kCentred ? zero_.at(p_.group(s), n - n0_ + part * kLanes) : splat(0.0f);
        uint8_t* to = panel_ + (p - p0) / 4 * Dot::kSteps * kStepBytes + (n - n0_) / kBlockRows * 64;
        if (units)
          (many ? expansion<Dot, kTileBlocks> : expansion<Dot, 1>)(w_.bits)(
              block.vector + p / kUnitColumns * w_.bits * block.step, block.step, count / kUnitColumns, zero, to);
        else
          expand_quads<Dot>(quads_ + (p - p0) / 4 * 64, count / 4, w_.bits, zero, to);
      }
    }
  }

  // The codes of row n at the positions of segments [s0, s1), four codes every 64 bytes; zeros between groups.
  void write_quads(int64_t n, int64_t s0, int64_t s1, uint8_t* out) {
    for (int64_t s = s0, next; s < s1; s = next) {  // a run of segments without padding in it
      next = p_.in_place ? s1 : min64(s1, (p_.group(s) + 1) * p_.per_group);
      const int64_t g = p_.group(s), begin = p_.begin(s), length = p_.end(next - 1) - begin;
      const int64_t k = p_.in_place ? begin : g * w_.group_size + (begin - g * p_.stride);
      const int64_t k_end = p_.in_place ? min64(w_.K, begin + length)
                                        : min64(min64(w_.K, (g + 1) * w_.group_size), k + length);
      const int64_t first = k / kUnitColumns * kUnitColumns;  // rows are unpacked from whole units on
      uint8_t* codes = codes_ + (k - first);
      if (k < k_end) row_codes(w_, n, first, k_end, codes_);
      for (int64_t i = max64(k_end - k, 0); i < length; ++i) codes[i] = 0;
      for (int64_t i = 0; i < length; i += 4, out += 64) std::memcpy(out, codes + i, 4);
    }
  }

  // acc = rows m.. of x, a tile, times this panel
  void multiply(int64_t m, float* acc, int64_t s0, int64_t s1) {
    const int64_t t = m / p_.tile, before = t * p_.tile * p_.pieces, rows = p_.rows(a_.M, t);
    const int64_t blocks = ceil_div(n1_ - n0_, kBlockRows);
    TileArguments args{};
    args.x = x_.words + before * p_.row_steps();
    args.x_sum = x_.sums + before * p_.segments + s0 * rows;
    args.x_scale = x_.scale + t * p_.tile * p_.segments + s0 * (rows / p_.pieces);
    args.segments = segments_ + s0;
    args.segment_count = s1 - s0;
    args.first_step = segments_[s0].begin;
    args.scale = scale_;
    args.zero = zero_;
    args.exact = p_.exact;
    args.moved = Dot::moved(w_.bits);
    const bool straight = fused(n1_ - n0_);
    const uint8_t* panel = is_panel() ? place_of_block(w_, n0_).vector + p_.begin(s0) / 4 * kStepBytes : panel_;
    if (!straight && in_block(w_, n0_)) prefetch_next(m, s0, s1);
    const int64_t most = p_.tall ? 1 : straight ? kPanelBlocks : kTileBlocks;  // at a time
    for (int64_t b = 0, next; b < blocks; b = next) {
      const bool many = b + most <= blocks;
      next = b + (many ? most : 1);
      args.row = b * kBlockRows;
      args.acc = acc + args.row;
      if (straight) {
        const BlockPlace block = place_of_block(w_, n0_ + args.row);
        args.weights = block.vector + p_.begin(s0) / kUnitColumns * w_.bits * block.step;
        // A panel is one stream. Block after block, each pass of the first tile fetches its share of the next chunk.
        const int64_t chunk_bytes = (p_.end(s1 - 1) - p_.begin(s0)) / kUnitColumns * w_.bits * kStepBytes;
        args.ahead = p_.tall && m % kPassRows > 0 ? args.weights
                     : p_.tall ? args.weights - b * 64 + chunk_bytes + b * (chunk_bytes / kPanelBlocks)
                               : args.weights + prefetch_distance();
        blocks_tile<Dot>(w_.bits, rows, p_.pieces)(args);
      } else {
        args.weights = panel + b * 64;
        (many && most > 1 ? panel_tile<Dot, kTileBlocks> : panel_tile<Dot, 1>)(rows, p_.pieces)(args);
      }
    }
  }

  // In bytes. The hardware follows vectors that are read in the order of memory: 8 bits, and with one row of x 4 bits
  // (better still if each unit's are asked for in one go). Where the products take longer than the memory, or planes
  // alternate, it falls behind.
  int64_t prefetch_distance() const {
    constexpr int64_t kFar = 10240, kFarther = 20480;
    if (p_.kind == Kind::int8) {
      if (w_.bits == 8 || (w_.bits == 4 && a_.M == 1)) return 0;
      return w_.bits < 5 ? kFar : kFarther;
    }
    if (p_.kind == Kind::pieces && w_.bits == 8) return 0;
    return w_.bits < 5 ? kFar : kFarther;
  }

  // This tile's share of the chunk that is expanded next, which follows this one in blocks.
  LOWBIT_INLINE void prefetch_next(int64_t m, int64_t s0, int64_t s1) {
    const int64_t row_bytes = (p_.end(s1 - 1) - p_.begin(s0)) * w_.bits / 8, bytes = row_bytes * kPanelN;
    const uint8_t* next = place_of_block(w_, n0_).vector + p_.end(s1 - 1) * w_.bits / 8 * kPanelN;
    const int64_t tiles = ceil_div(min64(a_.M, kPassRows), p_.tile), t = m % kPassRows / p_.tile;
    for (int64_t i = bytes * t / tiles / 64; i < bytes * (t + 1) / tiles / 64; ++i)
      __builtin_prefetch(next + 64 * i, 0, 2);
  }

  // What is left to do to acc_ before the bias.
  void finish(int64_t m0, int64_t m1) {
    if (p_.exact) load_groups(0, 1);
    for (int64_t m = m0; m < m1; ++m) {
      float* acc = acc_ + (m - m0) * kPanelN;
      if (p_.exact)  // the sum of (code - zero) * q fits; that of code * q and a zero times that of q may wrap around
        for (int64_t n = 0; n < kPanelN; n += kLanes) {
          const Int codes = load(reinterpret_cast<const int32_t*>(acc + n));
          const Int zeros = lowbit::multiply(to_int(zero_.at(0, n)), splat(x_.total[m]));
          store(acc + n, to_float(subtract(codes, zeros)) * scale_.at(0, n));
        }
      if (p_.kind == Kind::int8 && !p_.scaled)
        for (int64_t n = 0; n < n1_ - n0_; ++n) acc[n] /= x_.inverse[m];
      if (x_.special && x_.special[m])
        for (int64_t n = n0_; n < n1_; ++n) acc[n - n0_] = special_product(m, n);
    }
    if (w_.outliers) add_outlier_products(w_.outliers, x_.columns, a_.M, m0, m1, n0_, n1_, sums_, acc_, kPanelN);
  }

  // Row m of x times row n of w, as they are.
  float special_product(int64_t m, int64_t n) {
    float total = 0;
    for (int64_t k = 0; k < w_.K; k += kChunk) {
      const int64_t count = min64(kChunk, w_.K - k);
      dequantize_codes(w_, n, k, k + count, dense_);
      to_float(a_.x, a_.dtype, m * w_.K + k, count, special_);
      for (int64_t i = 0; i < count; ++i) total += special_[i] * dense_[i];
    }
    return total;
  }

  const Linear& a_;
  const Weight& w_;
  const Plan p_;
  const PreparedX x_;
  Segment* segments_;
  float *scale_lanes_, *zero_lanes_, *middle_, *values_, *acc_, *bias_;
  Lanes scale_{}, zero_{};
  uint8_t *panel_, *quads_, *codes_;
  float *sums_, *dense_, *special_;
  int64_t n0_ = 0, n1_ = 0;
};

template <class Dot>
void linear_by(const Linear& a, const void* prepared, int64_t n_begin, int64_t n_end) {
  Arena count(nullptr);
  Multiplier<Dot>{count, a, prepared};
  Scratch scratch(Slot::worker, size_t(count.used()));
  Arena arena(scratch.data());
  Multiplier<Dot> multiply(arena, a, prepared);
  for (int64_t n = n_begin; n < n_end; n += kPanelN) multiply(n, min64(n + kPanelN, n_end));
}

template <bool kNarrow>
void linear_by_int8(const Linear& a, const Plan& p, const void* prepared, int64_t n0, int64_t n1) {
  p.kind == Kind::int8 && p.scaled ? linear_by<Int8Dot<kNarrow, true>>(a, prepared, n0, n1)
                                   : linear_by<Int8Dot<kNarrow>>(a, prepared, n0, n1);
}

// =========================================================================================================

int64_t prepared_bytes(const Linear& a) { return PreparedX(nullptr, a, plan_of(a)).bytes; }

void prepare(const Linear& a, void* prepared, int64_t m0, int64_t m1) { prepare_x(a, plan_of(a), prepared, m0, m1); }

void linear(const Linear& a, const void* prepared, int64_t n0, int64_t n1) {
  const Plan p = plan_of(a);
  switch (p.kind) {
#if defined(__AVX512BF16__)
    case Kind::bf16: return linear_by<Bf16Dot>(a, prepared, n0, n1);
#endif
#if defined(__AVX512VNNI__)
    case Kind::int8:
    case Kind::pieces: return linear_by_int8<true>(a, p, prepared, n0, n1);
    default: return;
#else
    case Kind::int8:
      return a.weight.bits < 8 ? linear_by_int8<true>(a, p, prepared, n0, n1)
                               : linear_by_int8<false>(a, p, prepared, n0, n1);
    default: return linear_by<FloatDot32>(a, prepared, n0, n1);
#endif
  }
}

}  // namespace

const CpuKernel LOWBIT_FOR_ISA(kernel) = {prepared_bytes, prepare, linear, dequantize, kPanelN};

}  // namespace packed
}  // namespace lowbit
