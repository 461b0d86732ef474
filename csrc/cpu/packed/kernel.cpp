// The kernels of the family `packed` on the vectors of cpu/simd.h; compiled once per instruction set.
#include "cpu/packed/kernel.h"

#include "cpu/packed/dequantize.h"
#include "cpu/packed/expand.h"
#include "cpu/packed/groups.h"
#include "cpu/packed/prepare.h"

namespace lowbit {
namespace packed {
namespace {

inline bool integer_zeros(const CpuWeight& w) { return !w.minimum && (!w.zeros || w.zeros_dtype == DType::u8); }
inline Schedule schedule_of(const Linear& a) { return Schedule(a, integer_zeros(a.weight)); }

// y = x @ w.T, a panel of output rows at a time.
template <class Dot>
class Multiplier {
 public:
  Multiplier(Arena& arena, const Linear& a, const void* prepared)
      : a_(a),
        w_(a.weight),
        p_(schedule_of(a)),
        x_(prepared, a, p_),
        segments_(arena.take<Segment>(p_.segments)),
        groups_(arena, a.weight, p_),
        expand_(arena, a.weight, p_, !fused(kPanelN) || w_.N % kPanelN != 0),
        acc_(arena.take<float>(round_up(min64(a.M, kPassRows), p_.tile) * kPanelN)),
        bias_(arena.take<float>(kPanelN)),
        sure_(arena.take<float>(p_.kind == Kind::pieces ? round_up(min64(a.M, kPassRows), p_.tile) * kPanelN : 0)),
        next_(arena.take<int32_t>(x_.listed ? min64(a.M, kPassRows) : 0)),
        column_(arena.take<float>(x_.listed ? kPanelN : 0)),
        sums_(arena.take<float>(a.weight.outliers ? kPassRows : 0)),
        dense_(arena.take<float>(kSlice)),
        fallback_(arena.take<float>(kSlice)) {
    if (arena.counting()) return;
    for (int64_t s = 0; s < p_.segments; ++s)
      segments_[s] = {int32_t(p_.begin(s) / 4 * Dot::kSteps), int32_t(p_.end(s) / 4 * Dot::kSteps),
                      int32_t(p_.group(s))};
  }

  // y[:, n0:n1], at most kPanelN columns
  void operator()(int64_t n0, int64_t n1) {
    n0_ = n0;
    n1_ = n1;
    if (a_.bias) to_float(a_.bias, a_.bias_dtype, n0, n1 - n0, bias_);
    for (int64_t m0 = 0; m0 < a_.M; m0 += kPassRows) {
      const int64_t m1 = min64(m0 + kPassRows, a_.M);
      std::memset(acc_, 0, size_t((m1 - m0) * kPanelN) * sizeof(float));
      if (p_.kind == Kind::pieces) std::memset(sure_, 0, size_t((m1 - m0) * kPanelN) * sizeof(float));
      for (int64_t s0 = 0; s0 < p_.segments; s0 += p_.slice) {
        const int64_t s1 = min64(s0 + p_.slice, p_.segments);
        if (!p_.exact) groups_.load(n0, n1, s0, s1, fused(n1 - n0));
        if (!fused(n1 - n0) && !is_panel()) panel_ = expand_(n0, n1, s0, s1, groups_.zero);
        for (int64_t m = m0; m < m1; m += p_.tile) multiply(m, m - m0, s0, s1);
      }
      finish(m0, m1);
      write_result(a_, m0, m1, n0, n1, bias_, acc_, kPanelN);
    }
  }

 private:
  // Whether `rows` rows of w are multiplied straight from their blocks.
  bool fused(int64_t rows) const { return p_.fused && rows == kPanelN; }

  // Whether this panel is stored as it would be expanded.
  bool is_panel() const {
    return Dot::kCodes && w_.bits == 8 && p_.whole_chunks && n1_ - n0_ == kPanelN && in_block(w_, n1_ - 1);
  }

  // acc += rows m.. of x, as many as a register tile has, times this panel; `row` is the first one's in acc
  void multiply(int64_t m, int64_t row, int64_t s0, int64_t s1) {
    const int64_t t = m / p_.tile, before = t * p_.tile * p_.pieces, rows = p_.rows(a_.M, t);
    const int64_t blocks = ceil_div(n1_ - n0_, kBlockRows), of_rows = t * p_.tile * p_.segments + s0 * rows;
    const int pieces = p_.kind == Kind::pieces ? pieces_of(m) : 1;
    float *acc = acc_ + row * kPanelN, *sure = sure_ + row * kPanelN;
    TileArguments args{};
    args.x = x_.words + before * p_.row_steps();
    args.x_lowest = x_.lowest + t * p_.tile * p_.row_steps();
    args.x_sum = x_.sums + (t * p_.tile * p_.segments + s0 * rows) * p_.sums;
    args.x_scale = x_.scale + of_rows;
    args.x_doubt = x_.doubt + of_rows;
    args.segments = segments_ + s0;
    args.segment_count = s1 - s0;
    args.first_step = segments_[s0].begin;
    args.scale = groups_.scale;
    args.zero = groups_.zero;
    args.shift = groups_.shift;
    args.exact = p_.exact;
    args.top = float((1 << w_.bits) - 1);
    args.float_zeros = !integer_zeros(w_);
    const bool straight = fused(n1_ - n0_);
    const uint8_t* panel = is_panel() ? place_of_block(w_, n0_).vector + p_.begin(s0) / 4 * kStepBytes : panel_;
    if (!straight && in_block(w_, n0_)) prefetch_next(m, s0, s1);
    const int64_t expanded = pieces == kFourPieces && rows > 1 ? kTileBlocks / 2 : kTileBlocks;
    const int64_t most = p_.tall ? 1 : straight ? kPanelBlocks : expanded;  // at a time
    for (int64_t b = 0, next; b < blocks; b = next) {
      const bool many = b + most <= blocks;
      next = b + (many ? most : 1);
      args.row = b * kBlockRows;
      args.acc = acc + args.row;
      args.sure = sure + args.row;
      if (straight) {
        const BlockPlace block = place_of_block(w_, n0_ + args.row);
        args.weights = block.vector + p_.begin(s0) / kChunkColumns * w_.bits * block.step;
        // A panel is one stream. A tall register tile takes its blocks one by one, so with each block the first such
        // tile fetches a share of the next slice.
        const int64_t slice_bytes = (p_.end(s1 - 1) - p_.begin(s0)) / kChunkColumns * w_.bits * kStepBytes;
        args.ahead = p_.tall && m % kPassRows > 0 ? args.weights
                     : p_.tall ? args.weights - b * 64 + slice_bytes + b * (slice_bytes / kPanelBlocks)
                               : args.weights + prefetch_distance();
        blocks_tile<Dot>(w_.bits, rows, pieces)(args);
      } else {
        args.weights = panel + b * 64;
        (!many || most == 1 ? panel_tile<Dot, 1> : panel_tile<Dot, kTileBlocks>)(rows, pieces)(args);
      }
    }
  }

  // How many pieces of the rows of the register tile at row m are multiplied.
  int pieces_of(int64_t m) const {
    for (int64_t i = m; i < min64(m + p_.tile, a_.M); ++i)
      if (x_.four[i]) return kFourPieces;
    return kPieces;
  }

  int64_t prefetch_distance() const {
    if (p_.kind == Kind::int8) {
      if (w_.bits == 8 || (w_.bits == 4 && a_.M == 1)) return 0;
      return w_.bits < 5 ? kFar : kFarther;
    }
    if (p_.kind == Kind::pieces && w_.bits == 8) return 0;
    return w_.bits < 5 ? kFar : kFarther;
  }

  // This register tile's share of the slice that is expanded next, which follows this one in blocks.
  LOWBIT_INLINE void prefetch_next(int64_t m, int64_t s0, int64_t s1) {
    const int64_t row_bytes = (p_.end(s1 - 1) - p_.begin(s0)) * w_.bits / 8, bytes = row_bytes * kPanelN;
    const uint8_t* next = place_of_block(w_, n0_).vector + p_.end(s1 - 1) * w_.bits / 8 * kPanelN;
    const int64_t tiles = ceil_div(min64(a_.M, kPassRows), p_.tile), t = m % kPassRows / p_.tile;
    for (int64_t i = bytes * t / tiles / 64; i < bytes * (t + 1) / tiles / 64; ++i)
      __builtin_prefetch(next + 64 * i, 0, 2);
  }

  // The steps between the sums and the bias.
  void finish(int64_t m0, int64_t m1) {
    if (p_.exact) groups_.load(n0_, n1_, 0, 1, fused(n1_ - n0_));
    for (int64_t m = m0; m < m1; ++m) {
      float* acc = acc_ + (m - m0) * kPanelN;
      if (p_.exact)  // sum((code - zero) * q) fits int32, though sum(code * q) and zero * sum(q) may wrap around
        for (int64_t n = 0; n < kPanelN; n += kLanes) {
          const Int codes = load(reinterpret_cast<const int32_t*>(acc + n));
          const Int zeros = lowbit::multiply(to_int(groups_.zero.at(0, n)), splat(x_.total[m]));
          store(acc + n, to_float(subtract(codes, zeros)) * groups_.scale.at(0, n));
        }
      if (p_.kind == Kind::int8 && !p_.scaled)
        for (int64_t n = 0; n < n1_ - n0_; ++n) acc[n] /= x_.inverse[m];
    }
    if (x_.listed) add_listed(m0, m1);
    for (int64_t m = m0; x_.fallback && m < m1; ++m) {
      float* acc = acc_ + (m - m0) * kPanelN;
      const float* sure = sure_ + (m - m0) * kPanelN;
      if (x_.fallback[m]) {
        for (int64_t n = n0_; n < n1_; ++n) acc[n - n0_] = fallback_product(m, n);
      } else if (p_.kind == Kind::pieces && !all_sure(sure, n1_ - n0_)) {
        for (int64_t n = n0_; n < n1_; ++n)
          if (!(sure[n - n0_] >= 0)) acc[n - n0_] = fallback_product(m, n);
      }
    }
    if (w_.outliers) add_outlier_products(w_.outliers, x_.columns, a_.M, m0, m1, n0_, n1_, sums_, acc_, kPanelN);
  }

  static bool all_sure(const float* sure, int64_t count) {
    int unsure = 0;
    for (int64_t i = 0; i < count; ++i) unsure |= !(sure[i] >= 0);
    return !unsure;
  }

  // acc += the listed elements of rows [m0, m1) of x times their weights, each row's in order
  void add_listed(int64_t m0, int64_t m1) {
    bool any = false;
    for (int64_t m = m0; m < m1; ++m) any |= x_.listed[m] > 0;
    if (!any) return;
    std::memset(next_, 0, size_t(m1 - m0) * sizeof(int32_t));
    for (int64_t s = 0; s < p_.segments; ++s) {
      bool loaded = false;
      int64_t column = -1;
      for (int64_t m = m0; m < m1; ++m)
        for (int32_t& i = next_[m - m0]; i < x_.listed[m]; ++i) {
          const Listed& x = x_.list[m * x_.most_listed + i];
          if (x.segment != s) break;
          if (!loaded) groups_.load(n0_, n1_, s, s + 1, fused(n1_ - n0_));
          if (x.column != column) load_column(p_.group(s), x.column);
          loaded = true;
          column = x.column;
          float* acc = acc_ + (m - m0) * kPanelN;
          for (int64_t n = 0; n < kPanelN; n += kLanes)
            store(acc + n, fma(splat(x.x), load(column_ + n), load(acc + n)));
        }
    }
  }

  // column_ = w[n0:n1, k]
  void load_column(int64_t group, int64_t k) {
    const int64_t chunk = k / kChunkColumns;
    for (int64_t n = 0; n < n1_ - n0_; n += kBlockRows) {
      const bool stored = in_block(w_, n0_ + n);
      const BlockPlace block = place_of_block(w_, n0_ + n);
      int32_t codes[kBlockRows] = {};
      for (int64_t i = 0; !stored && i < min64(kBlockRows, n1_ - n0_ - n); ++i) {
        uint8_t row[kChunkColumns + kUnpackSlack];
        row_codes(w_, n0_ + n + i, chunk * kChunkColumns, k + 1, row);
        codes[i] = row[k % kChunkColumns];
      }
      for (int part = 0; part < kParts; ++part) {
        const Int c = stored ? column_codes(block.vector + chunk * w_.bits * block.step, block.step, w_.bits, part,
                                            int(k % kChunkColumns))
                             : load(codes + part * kLanes);
        const int64_t row = n + part * kLanes;
        Float value = (to_float(c) - groups_.zero.at(group, row)) * groups_.scale.at(group, row);
        if (w_.minimum) value = value - groups_.shift.at(group, row);
        store(column_ + row, value);
      }
    }
  }

  // Row m of x times row n of w, in float32.
  float fallback_product(int64_t m, int64_t n) {
    Float lanes = splat(0.0f);
    float total = 0;
    for (int64_t k = 0; k < w_.K; k += kSlice) {
      const int64_t count = min64(kSlice, w_.K - k);
      dequantize_codes(w_, n, k, k + count, dense_);
      to_float(a_.x, a_.dtype, m * w_.K + k, count, fallback_);
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) lanes = fma(load(fallback_ + i), load(dense_ + i), lanes);
      for (; i < count; ++i) total += fallback_[i] * dense_[i];
    }
    sum_add(lanes, &total);
    return total;
  }

  const Linear& a_;
  const CpuWeight& w_;
  const Schedule p_;
  const PreparedX x_;
  Segment* segments_;
  PanelGroups groups_;
  PanelExpander<Dot> expand_;
  float *acc_, *bias_;
  const uint8_t* panel_ = nullptr;
  float* sure_;
  int32_t* next_;
  float *column_, *sums_, *dense_, *fallback_;
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
void linear_by_int8(const Linear& a, const Schedule& p, const void* prepared, int64_t n0, int64_t n1) {
  p.kind == Kind::int8 && p.scaled ? linear_by<Int8Dot<kNarrow, true>>(a, prepared, n0, n1)
                                   : linear_by<Int8Dot<kNarrow>>(a, prepared, n0, n1);
}

// =========================================================================================================

int64_t prepared_bytes(const Linear& a) { return PreparedX(nullptr, a, schedule_of(a)).bytes; }

void prepare(const Linear& a, void* prepared, int64_t m0, int64_t m1) {
  prepare_x(a, schedule_of(a), prepared, m0, m1);
}

void linear(const Linear& a, const void* prepared, int64_t n0, int64_t n1) {
  const Schedule p = schedule_of(a);
  if constexpr (kHasBf16)
    if (p.kind == Kind::bf16) return linear_by<Bf16Dot>(a, prepared, n0, n1);
  if constexpr (!kHasVnni) {
    if (p.kind == Kind::f32) return linear_by<FloatDot32>(a, prepared, n0, n1);
    if (a.weight.bits == 8) return linear_by_int8<false>(a, p, prepared, n0, n1);
  }
  linear_by_int8<true>(a, p, prepared, n0, n1);
}

}  // namespace

const CpuKernel LOWBIT_FOR_ISA(kernel) = {prepared_bytes, prepare, linear, dequantize, kPanelN};

}  // namespace packed
}  // namespace lowbit
