// y = x @ w.T by vectors of words (words.h), on AVX-512 with VNNI and VBMI.
//
// Where rows of x are few, register tiles look the weights up (register_look_up.h); else panels of words are made
// first. As in cpu/lanes_along_k.h y[m,n] is always the same sum.
#pragma once
#include "cpu/codebook/expander.h"
#include "cpu/codebook/register_look_up.h"
#include "cpu/codebook/steps.h"

namespace lowbit {
namespace codebook {
namespace {

// Words between rows: a power of two apart they would share sets of the L1 cache.
template <class Words>
constexpr int64_t kPad = 64 / int64_t(sizeof(typename Words::Element));
template <class Words>
constexpr int64_t kPanelRow = Words::kSlice + kPad<Words>;

// ---------------------------------------------------------------------------------------------------------
// Tiles

// acc[m * ld + n] += the sum of the lanes
template <int MR, int NR, class Words>
LOWBIT_INLINE void reduce_words(const typename Words::Sum (&sum)[MR][NR], float* acc, int64_t ld) {
  if constexpr (NR == 4) {
    reduce<MR, NR, Words>(sum, acc, ld);
  } else {
    LOWBIT_UNROLL for (int i = 0; i < MR * NR; i += 4) {
      const auto lanes = [&](int j) {
        j = j < MR * NR ? j : 0;
        return Words::lanes(sum[j / NR][j % NR]);
      };
      float s[4];
      _mm_storeu_ps(s, sum4(lanes(i), lanes(i + 1), lanes(i + 2), lanes(i + 3)));
      LOWBIT_UNROLL for (int j = 0; j < 4; ++j)
        if (i + j < MR * NR) acc[(i + j) / NR * ld + (i + j) % NR] += s[j];
    }
  }
}

// Rows of packed codes to fetch while a register tile multiplies, so that the next panel need not wait for them.
struct Ahead {
  const uint8_t* at;
  int64_t rows, row_bytes, step;  // `step` bytes for every vector of words
};

// sum[m][n] += x[m * ldx + k] * w[n * kPanelRow + k] for k < count
template <int MR, int NR, class Words>
LOWBIT_INLINE void multiply(const typename Words::Element* x, int64_t ldx, const typename Words::Element* w,
                            int64_t count, Ahead ahead, typename Words::Sum (&sum)[MR][NR]) {
  for (int64_t k = 0; k < count; k += Words::kWords, ahead.at += ahead.step) {
    for (int64_t r = 0; r < ahead.rows; ++r) prefetch_far(ahead.at, r * ahead.row_bytes);
    Int wv[NR];
    LOWBIT_UNROLL for (int n = 0; n < NR; ++n) wv[n] = in_register(load_words(w + n * kPanelRow<Words> + k));
    LOWBIT_UNROLL for (int m = 0; m < MR; ++m) {
      const Int xv = load_words(x + m * ldx + k);
      LOWBIT_UNROLL for (int n = 0; n < NR; ++n) sum[m][n] = Words::add(sum[m][n], xv, wv[n]);
    }
  }
}

// acc[m * ld + n] += the products of x with a panel
template <int MR, int NR, class Words>
void tile_words(const typename Words::Element* x, int64_t ldx, const typename Words::Element* panel, int64_t count,
                const Ahead& ahead, float* acc, int64_t ld) {
  typename Words::Sum sum[MR][NR];
  LOWBIT_UNROLL for (int m = 0; m < MR; ++m) LOWBIT_UNROLL for (int n = 0; n < NR; ++n) sum[m][n] = Words::zero();
  multiply<MR, NR, Words>(x, ldx, panel, count, ahead, sum);
  reduce_words<MR, NR, Words>(sum, acc, ld);
}

// The same with rows [n0, n0 + NR), looking up the weights.
template <int MR, int NR, class LookUp>
void tile_look_up(const LookUp& look_up, const PackedRows& rows, int n0, const typename LookUp::Words::Element* x,
                  int64_t ldx, float* acc, int64_t ld) {
  using Words = typename LookUp::Words;
  using Element = typename Words::Element;
  using Table = typename LookUp::Table;
  using Stretch = typename LookUp::Stretch;
  typename Words::Sum sum[MR][NR];
  LOWBIT_UNROLL for (int m = 0; m < MR; ++m) LOWBIT_UNROLL for (int n = 0; n < NR; ++n) sum[m][n] = Words::zero();
  Table table[NR];
  LOWBIT_UNROLL for (int n = 0; n < NR; ++n) table[n] = LookUp::table(rows, n0 + n, 0);
  for (int64_t b = 0; b < rows.count / LookUp::kColumns; ++b) {
    if (LookUp::kParts) LOWBIT_UNROLL for (int n = 0; n < NR; ++n) table[n] = LookUp::table(rows, n0 + n, b);
    Stretch stretch[NR];
    LOWBIT_UNROLL for (int n = 0; n < NR; ++n) stretch[n] = look_up.stretch(rows, n0 + n, b, table[n]);
    LOWBIT_UNROLL for (int v = 0; v < LookUp::kVectors; ++v) {
      Int xv[MR];
      LOWBIT_UNROLL for (int m = 0; m < MR; ++m)
        xv[m] = in_register(load_words(x + m * ldx + b * LookUp::kColumns + v * Words::kWords));
      LOWBIT_UNROLL for (int n = 0; n < NR; ++n) {
        const Int wv = in_register(look_up.word(stretch[n], table[n], v));
        LOWBIT_UNROLL for (int m = 0; m < MR; ++m) sum[m][n] = Words::add(sum[m][n], xv[m], wv);
      }
    }
  }
  multiply<MR, NR, Words>(x + rows.count, ldx, static_cast<const Element*>(rows.rest) + n0 * kPanelRow<Words>,
                          rows.rest_count, {}, sum);
  reduce_words<MR, NR, Words>(sum, acc, ld);
}

// x times the panel of `w`. Meanwhile it fetches the same columns of the next four rows.
template <class Words>
void multiply_panel(int64_t rows, bool four, const PackedRows& w, int bits, const typename Words::Element* x,
                    int64_t ldx, const typename Words::Element* panel, int64_t count, float* acc, int64_t ld) {
  using Tile = decltype(&tile_words<1, 1, Words>);
  static const Tile tiles[kTileM] = {tile_words<1, 4, Words>, tile_words<2, 4, Words>, tile_words<3, 4, Words>,
                                     tile_words<4, 4, Words>, tile_words<5, 4, Words>, tile_words<6, 4, Words>};
  const int64_t step = four ? kTileM : 1, tiles_left = ceil_div(rows, step);
  int64_t fetched = 0;
  for (int64_t m = 0; m < rows; m += step) {
    const Tile tile = four ? tiles[min64(step, rows - m) - 1] : tile_words<1, 1, Words>;
    const int64_t some = min64(kRowTile - fetched, ceil_div(kRowTile, tiles_left));
    const Ahead ahead{w.codes + (kRowTile + fetched) * w.row_bytes, some, w.row_bytes, Words::kWords / 8 * bits};
    tile(x + m * ldx, ldx, panel, count, ahead, acc + m * ld, ld);
    fetched += some;
  }
}

template <class LookUp>
void multiply_looked_up(const LookUp& look_up, int64_t rows, bool four, const PackedRows& w,
                        const typename LookUp::Words::Element* x, int64_t ldx, float* acc, int64_t ld) {
  using Tile = decltype(&tile_look_up<1, 1, LookUp>);
  struct Choice {
    Tile tile;
    int rows;
  };
  static const Choice choices[] = {{tile_look_up<1, LookUp::rows(1), LookUp>, LookUp::rows(1)},
                                   {tile_look_up<2, LookUp::rows(2), LookUp>, LookUp::rows(2)},
                                   {tile_look_up<3, LookUp::rows(3), LookUp>, LookUp::rows(3)},
                                   {tile_look_up<4, LookUp::rows(4), LookUp>, LookUp::rows(4)},
                                   {tile_look_up<1, 1, LookUp>, 1}};
  const int64_t step = four ? kLookUpTileM : 1;
  for (int64_t m = 0; m < rows; m += step) {
    const Choice& c = choices[four ? min64(step, rows - m) - 1 : kLookUpTileM];
    for (int n = 0; n < (four ? 4 : 1); n += c.rows) c.tile(look_up, w, n, x + m * ldx, ldx, acc + m * ld + n, ld);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Rows of w

inline Float table_entries(const Weight& w, int64_t begin, __mmask16 some) {
  if (w.codebook_dtype == DType::f32)
    return _mm512_maskz_loadu_ps(some, static_cast<const float*>(w.codebook) + begin);
  const __m256i v = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(w.codebook) + begin);
  return w.codebook_dtype == DType::f16 ? _mm512_cvtph_ps(v)
                                        : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// One row of w or four at a time: their tables, scales and panels.
template <class LookUp>
class Rows : Expander {
  using Words = typename LookUp::Words;
  using Element = typename Words::Element;
  static constexpr bool kStretchTables = LookUp::kParts > 0;
  static constexpr int kRegisters = LookUp::kRegisters;
  // Columns of a part: they share a table, or a scale of looked-up values.
  static constexpr int64_t kPartColumns = LookUp::kColumns / (kStretchTables ? LookUp::kParts : 1);

 public:
  Rows(Arena& a, const Linear& l)
      : Expander(a, l, nullptr),
        look_up(l.weight),
        panel_(a.take<Element>(kRowTile * kPanelRow<Words>)),
        tables_(a.take<Int>(kRowTile * kRegisters * (kStretchTables ? Words::kSlice / LookUp::kColumns : 1))),
        values_(a.take<float>(kSlice)),
        words_(a.take<Element>(kSlice)),
        scale_(a.take<float>(max64(kRowTile * l.weight.G + 16, kMaxEntries))),
        part_scales_(a.take<float>(spreads_scales(l.weight) ? kRowTile * parts_of(l.weight) + 16 : 0)) {}

  const LookUp look_up;

  // Whether register tiles can look up the weights completely.
  bool complete() const { return !LookUp::kNone && !planes_per_group() && (Words::kFixed || !w_.outliers); }

  // Rows [n0, n1) come next, from their first column; step[n - n0] becomes their step.
  void begin(int64_t n0, int64_t n1, float* step) {
    Expander::begin(n0, n1);
    n0_ = n0;
    step_ = step;
    for (int64_t n = n0; n < n1; ++n) step[n - n0] = 1;
  }

  // Rows [n, n + rows) come next: one or four.
  LOWBIT_SHARED void start(int64_t n, int rows) {
    n_ = n;
    rows_ = rows;
    load_scales(w_, n, 0, rows * w_.G, scale_);  // of all rows: they follow each other
    if constexpr (LookUp::kPlanes == 0 && !LookUp::kNone)
      for (int i = 0; i < rows; ++i) entries_[i] = read_entries(table_index(w_, n + i, 0));
    if (Words::kFixed)
      for (int i = 0; i < rows; ++i) step_[n + i - n0_] = step(i);
    for (int i = 0; i < rows; ++i) inverse_[i] = Words::kFixed ? 1 / step_[n + i - n0_] : 1;
    for (int i = 0; i < rows; ++i) {
      if constexpr (LookUp::kPlanes > 0)
        make_planes(i, 0);
      else if (!LookUp::kNone && !kStretchTables)
        store_entries(i);
    }
    if (spreads_scales(w_))
      for (int i = 0; i < rows; ++i) spread_scales(scale_ + i * w_.G, part_scales_ + i * parts_of(w_));
  }

  // Their columns [k0, k1), a slice. Columns that register tiles do not look up become part of the panel.
  LOWBIT_SHARED PackedRows slice(int64_t k0, int64_t k1, bool in_tiles) {
    PackedRows out;
    out.codes = w_.packed + n_ * w_.row_bytes + k0 / 8 * w_.bits;
    out.row_bytes = w_.row_bytes;
    out.ahead = in_tiles ? kRowTile * w_.row_bytes : 0;  // else register tiles fetch, see multiply_panel()
    out.count = LookUp::kNone ? 0 : (k1 - k0) / LookUp::kColumns * LookUp::kColumns;
    out.tables = tables_;
    out.entries = entries_;
    out.inverse = inverse_;
    const bool spread = spreads_scales(w_);
    out.scales = spread ? part_scales_ + k0 / kPartColumns : scale_ + k0 / w_.group_size;
    out.scale_row = spread ? parts_of(w_) : w_.G;
    out.scale_step = w_.G == 1 ? 0 : spread ? LookUp::kColumns / kPartColumns : LookUp::kColumns / w_.group_size;
    out.rest = panel_ + out.count;
    out.rest_count = round_up(k1 - k0, LookUp::kColumns) - out.count;
    if constexpr (kStretchTables && !LookUp::kScalesTables)
      for (int i = 0; i < rows_; ++i)
        w_.tables == Weight::Tables::group ? make_group_tables(out, i, k0) : make_tables(out, i);
    for (int i = 0; i < rows_; ++i) {
      Element* words = panel_ + i * kPanelRow<Words>;
      if constexpr (!LookUp::kNone)
        if (out.count && !in_tiles) {
          if constexpr (LookUp::kPlanes > 0 && !LookUp::kScaled)
            look_up_groups(out, i, k0, words);
          else
            look_up_words(look_up, out, i, words);
          if (!Words::kFixed && w_.outliers) add_outliers(i, k0, k0 + out.count, words);
        }
      if (out.rest_count) make_words(i, k0 + out.count, k1, words + out.count);
    }
    return out;
  }

  const Element* panel() const { return panel_; }

 private:
  bool planes_per_group() const { return LookUp::kPlanes && !LookUp::kScaled && w_.G > 1; }
  static bool spreads_scales(const Weight& w) {
    return (kStretchTables || LookUp::kScaled) && w.G > 1 && w.group_size > kPartColumns;
  }
  static int64_t parts_of(const Weight& w) { return ceil_div(w.K, kPartColumns); }

  // A group's scale for each of its parts; up to 15 more are written.
  void spread_scales(const float* scale, float* out) const {
    const int64_t count = parts_of(w_), per = w_.group_size / kPartColumns;
    const Int iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if ((per & (per - 1)) == 0) {
      const int shift = __builtin_ctzll(uint64_t(per));
      const Int group = _mm512_srlv_epi32(iota, splat(shift));
      for (int64_t u = 0; u < count; u += 16) store(out + u, _mm512_permutexvar_ps(group, load(scale + (u >> shift))));
    } else {
      for (int64_t g = 0, u = 0; g < w_.G; ++g)
        for (const int64_t end = min64(u + per, count); u < end; ++u) out[u] = scale[g];
    }
  }

  float step(int i) {
    if (LookUp::kPlanes || LookUp::kNone || w_.tables == Weight::Tables::group) return row_step(w_, n_ + i, values_);
    const Entries& e = entries_[i];
    const Int low = _mm512_castps_si512(_mm512_abs_ps(e.part[0])), high = _mm512_castps_si512(_mm512_abs_ps(e.part[1]));
    const float largest = float_of(uint32_t(_mm512_reduce_max_epi32(_mm512_max_epi32(low, high))));
    return step_of(largest_magnitude(scale_ + i * w_.G, w_.G, 0), largest);
  }

  Entries read_entries(int64_t index) const {
    const int64_t count = entries(w_), begin = index * count;
    const Int iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const Float low = table_entries(w_, begin, __mmask16((1u << min64(count, 16)) - 1));
    Entries e;
    e.part[0] = _mm512_permutexvar_ps(_mm512_and_si512(iota, splat(int32_t(count - 1))), low);
    e.part[1] = count == 32 ? table_entries(w_, begin + 16, 0xffff) : e.part[0];
    return e;
  }

  void store_entries(int i) {
    Int* out = tables_ + i * kRegisters;
    if constexpr (LookUp::kScaled)
      LOWBIT_UNROLL for (int r = 0; r < kRegisters; ++r) out[r] = _mm512_castps_si512(entries_[i].part[r]);
    else
      store_table(scaled_table<Words, kRegisters, 0>(entries_[i], scale_ + i * w_.G, splat(inverse_[i])), out);
  }

  static void store_table(const Registers<kRegisters>& table, Int* out) {
    LOWBIT_UNROLL for (int r = 0; r < kRegisters; ++r) out[r] = table.v[r];
  }

  // Tables of row i, for the stretches of a slice.
  void make_tables(const PackedRows& rows, int i) {
    const Entries e = entries_[i];
    const Float inverse = splat(inverse_[i]);
    const float* scale = rows.scales + i * rows.scale_row;
    Int* out = tables_ + i * kRegisters;
    for (int64_t k = 0; k < rows.count; k += LookUp::kColumns, scale += LookUp::kParts, out += kRowTile * kRegisters)
      store_table(scaled_table<Words, kRegisters, LookUp::kParts>(e, scale, inverse), out);
  }

  // The same where every group has its own entries: each part takes those of its group.
  LOWBIT_SHARED void make_group_tables(const PackedRows& rows, int i, int64_t k0) {
    constexpr int kFloats = kRegisters * Words::kFloats, kParts = LookUp::kParts;
    const Float inverse = splat(inverse_[i]);
    const float* scale = rows.scales + i * rows.scale_row;
    Int* out = tables_ + i * kRegisters;
    int64_t g = k0 / w_.group_size, left = (g + 1) * w_.group_size - k0;
    Entries e = read_entries(table_index(w_, n_ + i, g));
    for (int64_t k = 0; k < rows.count; k += LookUp::kColumns, scale += kParts, out += kRowTile * kRegisters) {
      Float values[kFloats];
      LOWBIT_UNROLL for (int p = 0; p < kParts; ++p) {
        if (left == 0) {
          e = read_entries(table_index(w_, n_ + i, ++g));
          left = w_.group_size;
        }
        left -= kPartColumns;
        const Float s = splat(scale[p]);
        LOWBIT_UNROLL for (int f = 0; f < kFloats; ++f) {
          if (kParts <= kFloats ? f * kParts / kFloats == p : p == 2 * f) values[f] = _mm512_mul_ps(e.part[f % 2], s);
          if (kParts > kFloats && p == 2 * f + 1) values[f] = _mm512_mask_mul_ps(values[f], 0xff00, e.part[0], s);
        }
      }
      LOWBIT_UNROLL for (int r = 0; r < kRegisters; ++r) out[r] = Words::of(values + r * Words::kFloats, inverse);
    }
  }

  // The table of group g of row i in planes, kept while it stays the same.
  LOWBIT_SHARED void make_planes(int i, int64_t g) {
    constexpr int64_t kEntries = LookUp::kPlanes;
    const int64_t index = table_index(w_, n_ + i, g);
    const Key key{index, LookUp::kScaled ? 1 : scale_[i * w_.G + g], LookUp::kScaled ? 1 : inverse_[i]};
    if (key == keys_[i]) return;
    keys_[i] = key;
    const Float scale = splat(key.scale), inverse = splat(key.inverse);
    const auto entry = [&](int64_t e) {
      return _mm512_mul_ps(table_entries(w_, index * kEntries + e, 0xffff), scale);
    };
    Int* out = tables_ + i * kRegisters;
    if constexpr (LookUp::kScaled || Words::kFloats == 1) {
      LOWBIT_UNROLL for (int64_t e = 0; e < kEntries; e += kLanes) store(values_ + e, entry(e));
      split_planes(values_, kEntries, out);
    } else {
      Int words[kEntries / 32];
      LOWBIT_UNROLL for (int64_t e = 0; e < kEntries; e += 32) {
        const Float values[2] = {entry(e), entry(e + 16)};
        words[e / 32] = Words::of(values, inverse);
      }
      split_planes(words, kEntries, out);
    }
  }

  // The whole stretches of row i, as words. Works on copies, because the compiler must assume that stores to `out`
  // change the originals.
  LOWBIT_SHARED static void look_up_words(const LookUp& l, const PackedRows& r, int i, Element* out) {
    const LookUp look_up = l;
    const PackedRows rows = r;
    typename LookUp::Table table = LookUp::table(rows, i, 0);
    for (int64_t b = 0; b < rows.count / LookUp::kColumns; ++b) {
      if (LookUp::kParts) table = LookUp::table(rows, i, b);
      typename LookUp::Stretch stretch = look_up.stretch(rows, i, b, table);
      LOWBIT_UNROLL for (int v = 0; v < LookUp::kVectors; ++v)
        store_words(out + b * LookUp::kColumns + v * Words::kWords, look_up.word(stretch, table, v));
    }
  }

  // The same where groups may have their own planes.
  void look_up_groups(const PackedRows& rows, int i, int64_t k0, Element* out) {
    for (int64_t k = 0; k < rows.count;) {
      const int64_t g = (k0 + k) / w_.group_size, end = min64((g + 1) * w_.group_size - k0, rows.count);
      PackedRows group = rows;
      group.codes += k / 8 * w_.bits;
      group.count = end - k;
      make_planes(i, g);
      look_up_words(look_up, group, i, out + k);
      k = end;
    }
  }

  // Replaces the words of columns [k0, k1) of row i that have an outlier.
  LOWBIT_SHARED void add_outliers(int i, int64_t k0, int64_t k1, Element* out) {
    int64_t last = -1;
    float value = 0;
    Expander::each_outlier(n_ + i, k0, k1, [&](int64_t k, float outlier) {
      const int64_t g = k / w_.group_size;
      const uint8_t* at = w_.packed + (n_ + i) * w_.row_bytes + k * w_.bits / 8;
      const int shift = int(k * w_.bits % 8);
      const int code = (at[0] | (shift + w_.bits > 8 ? at[1] << 8 : 0)) >> shift & int(entries(w_) - 1);
      if (k != last) {
        to_float(w_.codebook, w_.codebook_dtype, table_index(w_, n_ + i, g) * entries(w_) + code, 1, &value);
        value *= scale_[i * w_.G + g];
      }
      last = k;
      value += outlier;
      const Float v = splat(value), values[2] = {v, v};
      const int64_t stretch = (k - k0) / LookUp::kColumns * LookUp::kColumns;
      Element word[Words::kWords];
      store_words(word, Words::of(values, v));
      out[stretch + kOrder<LookUp>.to[k - k0 - stretch]] = word[0];
    });
  }

  // Words of any weights, zeros behind the last.
  LOWBIT_SHARED void make_words(int i, int64_t k0, int64_t k1, Element* out) {
    const Float inverse = splat(inverse_[i]);
    for (int64_t k = k0; k < k1; k += kSlice, out += kSlice) {
      const int64_t end = min64(k + kSlice, k1), count = round_up(end - k, LookUp::kColumns);
      if (Words::kFixed)
        codes_part(n_ + i, k, end, values_);
      else
        Expander::operator()(n_ + i, k, end, values_);
      for (int64_t j = end - k; j < count; ++j) values_[j] = 0;
      for (int64_t j = 0; j < count; j += Words::kWords) {
        Float v[Words::kFloats];
        LOWBIT_UNROLL for (int f = 0; f < Words::kFloats; ++f) v[f] = load(values_ + j + f * kLanes);
        store_words(words_ + j, Words::of(v, inverse));
      }
      order_words<LookUp>(words_, count, out);
    }
  }

  struct Key {
    int64_t index = -1;
    float scale = 0, inverse = 0;
    bool operator==(const Key& k) const { return index == k.index && scale == k.scale && inverse == k.inverse; }
  };

  Element* panel_;
  Int* tables_;
  float* values_;
  Element* words_;
  float *scale_, *part_scales_, *step_;
  float inverse_[kRowTile];
  Key keys_[kRowTile];
  Entries entries_[kRowTile];
  int64_t n0_, n_;
  int rows_;
};

// ---------------------------------------------------------------------------------------------------------

// Prepared x: words, slice after slice, each [M, length + kPad] with length rounded up to whole stretches (zeros).
template <class LookUp>
struct PreparedWords {
  using Words = typename LookUp::Words;
  using Element = typename Words::Element;
  Element* words;
  float* inverse;  // [M]; int8 only
  float* columns;  // [K, M]: x itself; int8 with outliers only
  int64_t bytes;
  PreparedWords(const void* prepared, const Linear& l) {
    Arena a(const_cast<void*>(prepared));
    const int64_t K = l.weight.K;
    words = a.take<Element>(l.M * (round_up(K, LookUp::kColumns) + ceil_div(K, Words::kSlice) * kPad<Words>));
    inverse = a.take<float>(l.int8 ? l.M : 0);
    columns = a.take<float>(l.int8 && l.weight.outliers ? l.M * K : 0);
    bytes = a.used();
  }
  static int64_t row(const Linear& l, int64_t k0) {
    return round_up(min64(Words::kSlice, l.weight.K - k0), LookUp::kColumns) + kPad<Words>;
  }
  Element* slice(const Linear& l, int64_t k0) const { return words + l.M * (k0 + k0 / Words::kSlice * kPad<Words>); }
};

// Row m of x as words. `values` is scratch for K floats; inverse[m] is set for int8 only.
LOWBIT_SHARED void read_row(const Linear& a, int64_t m, float* /*values*/, float* /*inverse*/, float* words) {
  to_float(a.x, a.dtype, m * a.weight.K, a.weight.K, words);
}
LOWBIT_SHARED void read_row(const Linear& a, int64_t m, float* values, float* inverse, int16_t* words) {
  const int64_t K = a.weight.K;
  if (!a.int8) {
    std::memcpy(words, static_cast<const int16_t*>(a.x) + m * K, size_t(K) * sizeof(int16_t));
    return;
  }
  to_float(a.x, a.dtype, m * K, K, values);
  const Quantizer quantize(values, K, a.x_scale);
  inverse[m] = quantize.inverse;
  if (quantize.zero)
    std::memset(words, 0, size_t(K) * sizeof(int16_t));
  else
    quantize(values, K, words);
}

template <class LookUp>
void prepare_words(const Linear& a, void* prepared, int64_t m0, int64_t m1) {
  using Words = typename LookUp::Words;
  using Element = typename Words::Element;
  const int64_t K = a.weight.K, padded = round_up(K, LookUp::kColumns);
  const PreparedWords<LookUp> out(prepared, a);
  struct Buffers {
    float* values;
    Element* words;
    Buffers(Arena& arena, int64_t count) : values(arena.take<float>(count)), words(arena.take<Element>(count)) {}
  };
  Arena count(nullptr);
  Buffers{count, padded};
  Scratch scratch(Slot::worker, size_t(count.used()));
  Arena arena(scratch.data());
  const Buffers b(arena, padded);
  std::memset(b.words + K, 0, size_t(padded - K) * sizeof(Element));
  for (int64_t m = m0; m < m1; ++m) {
    read_row(a, m, b.values, out.inverse, b.words);
    for (int64_t k0 = 0; k0 < K; k0 += Words::kSlice) {
      const int64_t row = PreparedWords<LookUp>::row(a, k0);
      order_words<LookUp>(b.words + k0, row - kPad<Words>, out.slice(a, k0) + m * row);
    }
  }
  if (a.int8 && a.weight.outliers) transpose_activations(a, m0, m1, out.columns);
}

// Finishes int8 sums: multiplies by steps, and adds outliers.
LOWBIT_SHARED void finish_int8(const Linear& a, const float* inverse, const float* columns, const float* step,
                               int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums, float* acc) {
  for (int64_t m = m0; m < m1; ++m)
    for (int64_t n = n0; n < n1; ++n) {
      float& y = acc[(m - m0) * kWordRows + (n - n0)];
      y = y * step[n - n0] / inverse[m];
    }
  if (a.weight.outliers) add_outlier_products(a.weight.outliers, columns, a.M, m0, m1, n0, n1, sums, acc, kWordRows);
}

LOWBIT_SHARED void write_rows(const Linear& a, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* acc) {
  float bias[kWordRows];
  if (a.bias) to_float(a.bias, a.bias_dtype, n0, n1 - n0, bias);
  write_result(a, m0, m1, n0, n1, bias, acc, kWordRows);
}

template <class LookUp>
void linear_words(const Linear& a, const void* prepared, int64_t n_begin, int64_t n_end) {
  using Words = typename LookUp::Words;
  using Element = typename Words::Element;
  const Weight& w = a.weight;
  const PreparedWords<LookUp> x(prepared, a);
  struct Buffers {
    Rows<LookUp> rows;
    float *acc, *step, *sums;
    Buffers(Arena& arena, const Linear& l)
        : rows(arena, l),
          acc(arena.take<float>(min64(l.M, kWordPassRows) * kWordRows)),
          step(arena.take<float>(kWordRows)),
          sums(arena.take<float>(min64(l.M, kWordPassRows))) {}
  };
  Arena count(nullptr);
  Buffers{count, a};
  Scratch scratch(Slot::worker, size_t(count.used()));
  Arena arena(scratch.data());
  Buffers b(arena, a);
  const bool few = a.M <= kFewRows, in_tiles = a.M <= LookUp::kMostM && b.rows.complete();

  for (int64_t n0 = n_begin; n0 < n_end; n0 += kWordRows) {
    const int64_t n1 = min64(n0 + kWordRows, n_end);
    for (int64_t m0 = 0; m0 < a.M; m0 += kWordPassRows) {
      const int64_t m1 = min64(m0 + kWordPassRows, a.M);
      const auto rows_at = [&](int64_t n) { return n + 4 <= n1 ? 4 : 1; };
      // rows_at(n) rows and a slice of columns
      const auto multiply_slice = [&](int64_t n, int64_t k0) {
        const int64_t ldx = PreparedWords<LookUp>::row(a, k0);
        const bool four = rows_at(n) == 4;
        const Element* xs = x.slice(a, k0) + m0 * ldx;
        float* acc = b.acc + (n - n0);
        const PackedRows rows = b.rows.slice(k0, min64(k0 + Words::kSlice, w.K), in_tiles);
        if constexpr (!LookUp::kNone)
          if (in_tiles) return multiply_looked_up(b.rows.look_up, m1 - m0, four, rows, xs, ldx, acc, kWordRows);
        multiply_panel<Words>(m1 - m0, four, rows, w.bits, xs, ldx, b.rows.panel(), ldx - kPad<Words>, acc, kWordRows);
      };
      std::memset(b.acc, 0, size_t((m1 - m0) * kWordRows) * sizeof(float));
      b.rows.begin(n0, n1, b.step);
      if (few) {  // along the rows of w, as they lie in memory
        for (int64_t n = n0; n < n1; n += rows_at(n)) {
          b.rows.start(n, rows_at(n));
          for (int64_t k0 = 0; k0 < w.K; k0 += Words::kSlice) multiply_slice(n, k0);
        }
      } else {  // a slice of x stays in L2 for all rows of w
        for (int64_t k0 = 0; k0 < w.K; k0 += Words::kSlice)
          for (int64_t n = n0; n < n1; n += rows_at(n)) {
            b.rows.start(n, rows_at(n));
            multiply_slice(n, k0);
          }
      }
      if (a.int8) finish_int8(a, x.inverse, x.columns, b.step, m0, m1, n0, n1, b.sums, b.acc);
      write_rows(a, m0, m1, n0, n1, b.acc);
    }
  }
}

// Calls run(Type<LookUp>) with the look-up for the weight and the activations.
template <class Run>
void with_words(const Linear& a, Run run) {
  if (a.int8) return with_look_up(a.weight, a.M, FixedWords(), run);
  if constexpr (kHasBf16)
    if (a.dtype == DType::bf16) return with_look_up(a.weight, a.M, Bfloat16Words(), run);
  with_look_up(a.weight, a.M, FloatWords(), run);
}

int64_t prepared_bytes(const Linear& a) {
  int64_t bytes = 0;
  with_words(a, [&](auto type) { bytes = PreparedWords<typename decltype(type)::type>(nullptr, a).bytes; });
  return bytes;
}

void prepare(const Linear& a, void* prepared, int64_t m0, int64_t m1) {
  with_words(a, [&](auto type) { prepare_words<typename decltype(type)::type>(a, prepared, m0, m1); });
}

void linear(const Linear& a, const void* prepared, int64_t n0, int64_t n1) {
  with_words(a, [&](auto type) { linear_words<typename decltype(type)::type>(a, prepared, n0, n1); });
}

}  // namespace
}  // namespace codebook
}  // namespace lowbit
