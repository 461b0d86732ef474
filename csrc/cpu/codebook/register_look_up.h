// Look-ups in registers: packed codes to words of weights (words.h), a stretch of kColumns columns at a time.
//
// A look-up has
//   Words                       the kind of words
//   kVectors, kColumns          vectors of a stretch, and columns; their order: column(v, lane)
//   rows(m)                     rows of w that a register tile takes with m rows of x: as many as registers hold
//   kMostM                      rows of x up to which register tiles look up; panels are made for more
//   kParts                      0: a row has one table; else every 1 / kParts of a stretch has its own
//   kScalesTables               whether table() multiplies entries by a stretch's scale; else tables are in memory
//   kRegisters                  of a row's or a stretch's tables, in memory as Rows (linear_words.h) makes them
//   kPlanes                     entries of a table that is held in planes (planes.h), else 0
//   kScaled                     whether scales are applied to what is looked up, not to the table
//   Table table(rows, n, b)     the tables of row n and stretch b, held in registers
//   Stretch stretch(rows, n, b, table), Int word(stretch, table, v)
//                               the stretch's codes; its words, vector after vector: v = 0, 1, ...
//
// `vpermw` looks up words of 16 bits by the low 5 bits of an index, `vpermps` words of 32 bits by the low 4. So a code
// at the bottom of a lane is its own index. A lane holds several codes; shifts bring each to the bottom in turn. The
// table repeats where codes have fewer bits than an index. Then the bits above the code can select one of two or four
// tables: that of the part of the stretch which the lane is in.
#pragma once
#include "cpu/codebook/planes.h"
#include "cpu/codebook/tables.h"
#include "cpu/codebook/words.h"

namespace lowbit {
namespace codebook {
namespace {

// Fetches into L2, where more fetches may be under way than into L1. A prefetch never faults, so `at` need not exist.
LOWBIT_INLINE void prefetch_far(const uint8_t* at, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + uintptr_t(ahead)), 0, 2);
}

// 32 entries of a table; a smaller table repeats.
struct Entries {
  Float part[2];
};

// Four rows of packed codes, at the first column of a slice.
struct PackedRows {
  const uint8_t* codes;
  int64_t row_bytes;
  int64_t ahead;         // bytes from a row to what is fetched when it is read
  int64_t count;         // columns in whole stretches, to be looked up
  const Int* tables;     // of row n and stretch b: tables + (b * kRowTile + n) * kRegisters; one per row: b = 0
  const Entries* entries;  // [n]
  const float* scales;   // of row n and stretch b: scales + n * scale_row + b * scale_step
  int64_t scale_row, scale_step;
  const float* inverse;  // [n], of the rows' steps
  const void* rest;      // panel of the columns behind
  int64_t rest_count;

  LOWBIT_INLINE const uint8_t* at(int n, int64_t offset) const {
    const uint8_t* here = codes + n * row_bytes + offset;
    prefetch_far(here, ahead);
    return here;
  }
};

template <int kCount>
struct Registers {
  Int v[kCount];
  Registers() = default;
  LOWBIT_INLINE explicit Registers(const Int* at) {
    LOWBIT_UNROLL for (int i = 0; i < kCount; ++i) v[i] = in_register(at[i]);
  }
};

// The tables of the parts of a stretch, or of a row (kParts = 0): entries times scale[p], that of part p.
template <class Words, int kRegisters, int kParts>
LOWBIT_INLINE Registers<kRegisters> scaled_table(const Entries& e, const float* scale, Float inverse) {
  constexpr int kFloats = kRegisters * Words::kFloats, kScales = kParts ? kParts : 1;
  Float values[kFloats];
  LOWBIT_UNROLL for (int f = 0; f < kFloats; ++f) {
    Float s = splat(scale[f * kScales / kFloats]);
    if (kScales > kFloats) s = _mm512_mask_mov_ps(s, 0xff00, splat(scale[f * kScales / kFloats + 1]));
    values[f] = _mm512_mul_ps(e.part[f % 2], s);
  }
  Registers<kRegisters> out;
  LOWBIT_UNROLL for (int r = 0; r < kRegisters; ++r) out.v[r] = Words::of(values + r * Words::kFloats, inverse);
  return out;
}

template <class LookUp>
LOWBIT_INLINE typename LookUp::Table table_of(const PackedRows& rows, int n, int64_t b) {
  constexpr int kRegisters = LookUp::kRegisters, kParts = LookUp::kParts;
  if constexpr (LookUp::kScalesTables)
    return scaled_table<typename LookUp::Words, kRegisters, kParts>(
        rows.entries[n], rows.scales + n * rows.scale_row + b * rows.scale_step, splat(rows.inverse[n]));
  return Registers<kRegisters>(rows.tables + ((kParts ? b * kRowTile : 0) + n) * kRegisters);
}

// ---------------------------------------------------------------------------------------------------------
// Tables of up to 32 entries, words of 16 bits

// The part of the stretch that each lane is in, times `step`.
template <class LookUp, int kParts>
inline Int parts_of_lanes(int step) {
  alignas(64) static constexpr struct Parts {
    int16_t part[32] = {};
    constexpr Parts() {
      for (int l = 0; l < 32; ++l) part[l] = int16_t(LookUp::column(0, l) * kParts / LookUp::kColumns);
    }
  } parts;
  return _mm512_mullo_epi16(load_bytes(parts.part), _mm512_set1_epi16(int16_t(step)));
}

inline Int select_part(Int codes, Int mask, Int part) { return _mm512_ternarylogic_epi32(codes, mask, part, 0xEA); }

// kBits: the most that codes have. 32 entries hold four tables of up to 8.
template <class W, int kParts_, int kBits, bool kScales = false>
struct SmallTable {
  using Words = W;
  static constexpr int kParts = kParts_, kRegisters = kParts == 4 && kBits == 4 ? 2 : 1;
  static constexpr int rows(int) { return 4; }
  static constexpr int64_t kMostM = kFewRows;
  static constexpr bool kNone = false, kScaled = false, kScalesTables = kScales;
  static constexpr int kPlanes = 0;
  static constexpr bool kSelects = kParts > 1;
  static constexpr int kPartStep = kParts == 4 && kBits < 4 ? 8 : 16;  // from a part's entries to the next one's
  using Table = Registers<kRegisters>;
  struct Stretch {
    Int packed, codes;
  };
  LOWBIT_INLINE static Table table(const PackedRows& rows, int n, int64_t b) {
    return table_of<SmallTable>(rows, n, b);
  }
  LOWBIT_INLINE static Int entry(const Table& t, Int index) {
    return kRegisters == 1 ? _mm512_permutexvar_epi16(index, t.v[0])
                           : _mm512_permutex2var_epi16(t.v[0], index, t.v[1 % kRegisters]);
  }
};

template <class W, int kParts, bool kScales = false>
struct Nibbles : SmallTable<W, kParts, 4, kScales> {  // 4 bits
  using Base = SmallTable<W, kParts, 4, kScales>;
  using typename Base::Stretch;
  using typename Base::Table;
  static constexpr int kVectors = 4;
  static constexpr int64_t kColumns = 128;
  static constexpr int column(int v, int lane) { return 4 * lane + v / 2 + v % 2 * 2; }
  Int mask = _mm512_set1_epi8(15), part = parts_of_lanes<Nibbles, kParts>(0x1010);
  explicit Nibbles(const Weight&) {}
  LOWBIT_INLINE Stretch stretch(const PackedRows& rows, int n, int64_t b, const Table&) const {
    const Int packed = in_register(load_bytes(rows.at(n, b * 64)));
    return {packed, packed};
  }
  LOWBIT_INLINE Int word(Stretch& b, const Table& table, int v) const {
    if (v % 2 == 0) {
      b.codes = v ? _mm512_srli_epi16(b.packed, 4) : b.packed;
      if (Base::kSelects) b.codes = select_part(b.codes, mask, part);
    }
    return Base::entry(table, v % 2 ? _mm512_srli_epi16(b.codes, 8) : b.codes);
  }
};

template <class W, int kParts>
struct Pairs : SmallTable<W, kParts, 2> {  // 2 bits: a byte per word first
  using Base = SmallTable<W, kParts, 2>;
  using typename Base::Stretch;
  using typename Base::Table;
  static constexpr int kVectors = 4;
  static constexpr int64_t kColumns = 128;
  static constexpr int column(int v, int lane) { return 4 * lane + v; }
  Int mask = _mm512_set1_epi16(3), part = parts_of_lanes<Pairs, kParts>(Base::kPartStep);
  explicit Pairs(const Weight&) {}
  LOWBIT_INLINE Stretch stretch(const PackedRows& rows, int n, int64_t b, const Table&) const {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows.at(n, b * 32)));
    const Int codes = in_register(_mm512_cvtepu8_epi16(bytes));
    return {codes, codes};
  }
  LOWBIT_INLINE Int word(Stretch& b, const Table& table, int v) const {
    const Int codes = v ? _mm512_srli_epi16(b.packed, unsigned(2 * v)) : b.packed;
    return Base::entry(table, Base::kSelects ? select_part(codes, mask, part) : codes);
  }
};

// The bytes that a lane of kLaneBits takes to hold the codes of kPerLane columns, and the bit at which these begin.
template <int kLaneBits, int kPerLane>
struct Windows {
  uint8_t spread[6][64] = {};
  uint16_t shifts[6][32] = {};
  constexpr Windows() {
    for (int bits = 1; bits <= 5; ++bits)
      for (int i = 0; i < 64; ++i) {
        const int bytes = kLaneBits / 8, first = i / bytes * kPerLane * bits;  // bit
        spread[bits][i] = uint8_t((first / 8 + i % bytes) & 63);
        if (i % bytes == 0) shifts[bits][i / 2] = uint16_t(first % 8);
      }
  }
};
template <int kLaneBits, int kPerLane>
constexpr Windows<kLaneBits, kPerLane> kWindows;

template <class W, int kPerLane, int kParts>
struct Spread : SmallTable<W, kParts, kPerLane == 4 ? 3 : 5> {  // 1, 3 or 5 bits: spread over words first
  using Base = SmallTable<W, kParts, kPerLane == 4 ? 3 : 5>;
  using typename Base::Stretch;
  using typename Base::Table;
  static constexpr int kVectors = kPerLane;
  static constexpr int64_t kColumns = 32 * kPerLane;
  static constexpr int column(int v, int lane) { return kPerLane * lane + v; }
  Int spread, shifts, next, mask, part = parts_of_lanes<Spread, kParts>(Base::kPartStep);
  int64_t bytes;
  __mmask8 words;
  explicit Spread(const Weight& w)
      : spread(load_bytes(kWindows<16, kPerLane>.spread[w.bits])),
        shifts(load_bytes(kWindows<16, kPerLane>.shifts[w.bits])),
        next(_mm512_set1_epi16(int16_t(w.bits))),
        mask(_mm512_set1_epi16(int16_t(entries(w) - 1))),
        bytes(kColumns / 8 * w.bits),
        words(__mmask8((1u << bytes / 8) - 1)) {}
  LOWBIT_INLINE Stretch stretch(const PackedRows& rows, int n, int64_t b, const Table&) const {
    const Int packed = _mm512_maskz_loadu_epi64(words, rows.at(n, b * bytes));
    const Int codes = _mm512_srlv_epi16(_mm512_permutexvar_epi8(spread, packed), shifts);
    return {codes, codes};
  }
  LOWBIT_INLINE Int word(Stretch& b, const Table& table, int v) const {
    if (v) b.codes = _mm512_srlv_epi16(b.codes, next);
    return Base::entry(table, Base::kSelects ? select_part(b.codes, mask, part) : b.codes);
  }
};

// ---------------------------------------------------------------------------------------------------------
// Tables of up to 32 entries, float32

template <int kRegisters_, int kParts_, bool kScales>
struct FloatTable {
  using Words = FloatWords;
  static constexpr int kParts = kParts_, kRegisters = kRegisters_;
  static constexpr int rows(int) { return 4; }
  static constexpr int64_t kMostM = kFewRows;
  static constexpr bool kNone = false, kScaled = false, kScalesTables = kScales;
  static constexpr int kPlanes = 0;
  using Table = Registers<kRegisters>;
  struct Stretch {
    Int codes;
  };
  LOWBIT_INLINE static Table table(const PackedRows& rows, int n, int64_t b) {
    return table_of<FloatTable>(rows, n, b);
  }
};

template <int kParts, bool kScales>
struct Octets : FloatTable<1, kParts, kScales> {  // 4 bits: the codes of eight columns stand in one lane
  using Base = FloatTable<1, kParts, kScales>;
  using typename Base::Stretch;
  using typename Base::Table;
  static constexpr int kVectors = 8;
  static constexpr int64_t kColumns = 128;
  static constexpr int column(int v, int lane) { return 8 * lane + v; }
  explicit Octets(const Weight&) {}
  LOWBIT_INLINE Stretch stretch(const PackedRows& rows, int n, int64_t b, const Table&) const {
    return {in_register(load_bytes(rows.at(n, b * 64)))};
  }
  LOWBIT_INLINE Int word(const Stretch& b, const Table& table, int v) const {
    return _mm512_permutexvar_epi32(v ? _mm512_srli_epi32(b.codes, unsigned(4 * v)) : b.codes, table.v[0]);
  }
};

template <int kRegisters, int kParts, bool kScales, bool kHalves = false>
struct Dwords : FloatTable<kRegisters, kParts, kScales> {  // those of four columns; kHalves: 4 bits
  using Base = FloatTable<kRegisters, kParts, kScales>;
  using typename Base::Stretch;
  using typename Base::Table;
  static constexpr int kVectors = 4;
  static constexpr int64_t kColumns = 64;
  static constexpr int column(int v, int lane) { return 4 * lane + v; }
  Int spread, shifts, next;
  int64_t bytes;
  __mmask8 words;
  explicit Dwords(const Weight& w)
      : spread(load_bytes(kWindows<32, 4>.spread[w.bits])),
        shifts(load_bytes(kWindows<32, 4>.shifts[w.bits])),
        next(splat(w.bits)),
        bytes(8 * w.bits),
        words(__mmask8((1u << (kRegisters == 1 ? 2 : 1) * w.bits) - 1)) {}
  LOWBIT_INLINE Stretch stretch(const PackedRows& rows, int n, int64_t b, const Table&) const {
    if constexpr (kHalves)
      return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows.at(n, b * 32))))};
    const uint8_t* at = rows.at(n, b * bytes);
    const Int packed = kRegisters == 1 ? _mm512_castsi256_si512(_mm256_maskz_loadu_epi32(words, at))  // up to 4 bits
                                       : _mm512_maskz_loadu_epi64(words, at);
    return {_mm512_srlv_epi32(_mm512_permutexvar_epi8(spread, packed), shifts)};
  }
  LOWBIT_INLINE Int word(Stretch& b, const Table& table, int v) const {
    if constexpr (kHalves)
      return _mm512_permutexvar_epi32(v ? _mm512_srli_epi32(b.codes, unsigned(4 * v)) : b.codes, table.v[0]);
    if (v) b.codes = _mm512_srlv_epi32(b.codes, next);
    return kRegisters == 1 ? _mm512_permutexvar_epi32(b.codes, table.v[0])
                           : _mm512_permutex2var_epi32(table.v[0], b.codes, table.v[1 % kRegisters]);
  }
};

// ---------------------------------------------------------------------------------------------------------
// Tables of 64 entries and more

// 64 codes as bytes, the bits above the code arbitrary.
template <int kBits>
struct Packed64 {
  Int spread = load_bytes(kUnpack.spread[kBits]), shifts = load_bytes(kUnpack.shifts[kBits]);
  LOWBIT_INLINE Int codes(const PackedRows& rows, int n, int64_t b) const {
    const uint8_t* at = rows.at(n, b * 8 * kBits);
    if (kBits == 8) return in_register(load_bytes(at));
    const Int packed = _mm512_maskz_loadu_epi64(__mmask8((1u << kBits) - 1), at);
    return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, packed));
  }
};

// Words of 16 bits; one table at a time.
template <class W, int kBits>
struct WordPlanes {
  using Words = W;
  static constexpr int kParts = 0, kVectors = 2;
  static constexpr int rows(int tile_m) { return kBits == 6 && tile_m <= 2 ? 4 : kBits == 7 && tile_m == 1 ? 4 : 2; }
  static constexpr int64_t kMostM = kFewPlaneRows;
  static constexpr bool kNone = false, kScaled = false, kScalesTables = false;
  static constexpr int kPlanes = 1 << kBits;
  static constexpr int64_t kColumns = 64;
  static constexpr int column(int v, int lane) { return lane / 8 * 16 + 8 * v + lane % 8; }
  using Table = Planes<kBits, 2>;
  static constexpr int kRegisters = Table::kRegisters;
  struct Stretch {
    Int word[2];
  };
  Packed64<kBits> packed;
  explicit WordPlanes(const Weight&) {}
  LOWBIT_INLINE static Table table(const PackedRows& rows, int n, int64_t /*b*/) {
    return Table(rows.tables + n * kRegisters);
  }
  LOWBIT_INLINE Stretch stretch(const PackedRows& rows, int n, int64_t b, const Table& table) const {
    Stretch out;
    table.look_up(packed.codes(rows, n, b), out.word);
    return out;
  }
  LOWBIT_INLINE Int word(const Stretch& b, const Table&, int v) const { return b.word[v]; }
};

// float32; one table at a time.
template <int kBits>
struct FloatPlanes {
  using Words = FloatWords;
  static constexpr int kParts = 0, kVectors = 4;
  static constexpr int rows(int) { return kBits < 8 ? 2 : 1; }
  static constexpr int64_t kMostM = kFewPlaneRows;
  static constexpr bool kNone = false, kScaled = false, kScalesTables = false;
  static constexpr int kPlanes = 1 << kBits;
  static constexpr int64_t kColumns = 64;
  static constexpr int column(int v, int lane) { return lane / 4 * 16 + 4 * v + lane % 4; }
  using Table = Planes<kBits, 4>;
  static constexpr int kRegisters = Table::kRegisters;
  struct Stretch {
    Int word[4];
  };
  Packed64<kBits> packed;
  explicit FloatPlanes(const Weight&) {}
  LOWBIT_INLINE static Table table(const PackedRows& rows, int n, int64_t /*b*/) {
    return Table(rows.tables + n * kRegisters);
  }
  LOWBIT_INLINE Stretch stretch(const PackedRows& rows, int n, int64_t b, const Table& table) const {
    Stretch out;
    table.look_up(packed.codes(rows, n, b), out.word);
    return out;
  }
  LOWBIT_INLINE Int word(const Stretch& b, const Table&, int v) const { return b.word[v]; }
};

// ---------------------------------------------------------------------------------------------------------

// Looks entries up as float32 and multiplies them by scales, so a row needs one table whatever its groups. `Entries`:
// Dwords or FloatPlanes. For groups of 16, 32 or 64 columns, or of several stretches.
template <class W, class Entries>
struct Scaled {
  using Words = W;
  static constexpr int kParts = 0;
  static constexpr int rows(int tile_m) { return Entries::rows(tile_m) == 1 ? 1 : 2; }
  static constexpr int kRegisters = Entries::kRegisters, kVectors = 4 / Words::kFloats;
  static constexpr int64_t kMostM = kFewPlaneRows;
  static constexpr bool kNone = false, kScaled = true, kScalesTables = false;
  static constexpr int kPlanes = Entries::kPlanes;
  static constexpr int64_t kColumns = 64;
  static constexpr int column(int v, int lane) { return Entries::column(v * Words::kFloats + lane / 16, lane % 16); }
  struct Table {
    typename Entries::Table entries;
    Float inverse;
  };
  struct Stretch {
    Int word[kVectors];
  };
  Entries entries;
  Int group;  // of the columns of a lane, in the stretch
  explicit Scaled(const Weight& w)
      : entries(w),
        group(_mm512_srlv_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                splat(w.group_size == 16 ? 2 : w.group_size == 32 ? 3 : 4))) {}
  LOWBIT_INLINE static Table table(const PackedRows& rows, int n, int64_t b) {
    return {Entries::table(rows, n, b), splat(rows.inverse[n])};
  }
  LOWBIT_INLINE Stretch stretch(const PackedRows& rows, int n, int64_t b, const Table& table) const {
    const float* scales = rows.scales + n * rows.scale_row + b * rows.scale_step;
    const Float scale = _mm512_permutexvar_ps(group, _mm512_castps128_ps512(_mm_loadu_ps(scales)));
    typename Entries::Stretch at = entries.stretch(rows, n, b, table.entries);
    Float value[4];
    LOWBIT_UNROLL for (int v = 0; v < 4; ++v)
      value[v] = _mm512_mul_ps(_mm512_castsi512_ps(entries.word(at, table.entries, v)), scale);
    Stretch out;
    LOWBIT_UNROLL for (int v = 0; v < kVectors; ++v)
      out.word[v] = Words::of(value + v * Words::kFloats, table.inverse);
    return out;
  }
  LOWBIT_INLINE Int word(const Stretch& b, const Table&, int v) const { return b.word[v]; }
};

// No look-up fits: weights are expanded as float32 first.
template <class W>
struct NoLookUp {
  using Words = W;
  static constexpr bool kNone = true, kScaled = false, kScalesTables = false;
  static constexpr int kParts = 0, kRegisters = 0, kVectors = 1, kPlanes = 0;
  static constexpr int64_t kMostM = 0;
  static constexpr int64_t kColumns = Words::kWords;
  static constexpr int column(int, int lane) { return lane; }
  explicit NoLookUp(const Weight&) {}
};

// ---------------------------------------------------------------------------------------------------------

// kParts for stretches of `columns` columns: tables per stretch; -1 where groups are too small or do not divide it.
inline int table_parts(const Weight& w, int64_t columns, int most) {
  if (w.G == 1) return 0;
  for (int parts = 1; parts <= most; parts *= 2)
    if (w.group_size % (columns / parts) == 0) return parts;
  return -1;
}

// Planes hold the tables of a row, or of groups of whole stretches one after the other.
inline bool has_planes(const Weight& w) {
  return w.bits > 5 && (w.G == 1 || (w.tables == Weight::Tables::group && w.group_size % 64 == 0));
}

inline bool scales_stretches(const Weight& w) {
  const int64_t g = w.group_size;
  return w.G == 1 || (w.tables != Weight::Tables::group && (g % 64 == 0 || g == 32 || g == 16));
}

template <class LookUp>
struct Type {
  using type = LookUp;
};

// Calls run(Type<LookUp>) with the look-up for the weight.
template <class Words, class Run>
void with_scaled(const Weight& w, Run run) {
  if (!scales_stretches(w)) return run(Type<NoLookUp<Words>>());
  switch (w.bits) {
    case 5: return run(Type<Scaled<Words, Dwords<2, 0, false>>>());
    case 6: return run(Type<Scaled<Words, FloatPlanes<6>>>());
    case 7: return run(Type<Scaled<Words, FloatPlanes<7>>>());
    case 8: return run(Type<Scaled<Words, FloatPlanes<8>>>());
    default: return run(Type<Scaled<Words, Dwords<1, 0, false>>>());
  }
}

template <class Run>
void with_look_up(const Weight& w, int64_t /*M*/, FloatWords, Run run) {
  const bool scales = w.tables != Weight::Tables::group;
  if (w.bits == 4) switch (table_parts(w, 128, 1)) {
    case 0: return run(Type<Octets<0, false>>());
    case 1: return scales ? run(Type<Octets<1, true>>()) : run(Type<Octets<1, false>>());
  }
  if (w.bits == 4 && table_parts(w, 64, 1) == 1)
    return scales ? run(Type<Dwords<1, 1, true, true>>()) : run(Type<Dwords<1, 1, false, true>>());
  if (w.bits < 4) switch (table_parts(w, 64, 1)) {
    case 0: return run(Type<Dwords<1, 0, false>>());
    case 1: return scales ? run(Type<Dwords<1, 1, true>>()) : run(Type<Dwords<1, 1, false>>());
  }
  if (w.bits == 5) switch (table_parts(w, 64, 1)) {
    case 0: return run(Type<Dwords<2, 0, false>>());
    case 1: return scales ? run(Type<Dwords<2, 1, true>>()) : run(Type<Dwords<2, 1, false>>());
  }
  if (has_planes(w)) switch (w.bits) {
    case 6: return run(Type<FloatPlanes<6>>());
    case 7: return run(Type<FloatPlanes<7>>());
    default: return run(Type<FloatPlanes<8>>());
  }
  with_scaled<FloatWords>(w, run);
}

template <class Words, class Run>
void with_look_up(const Weight& w, int64_t M, Words, Run run) {  // words of 16 bits
  // Whether each table is used once: by the only register tile, or for a panel.
  const bool once = w.tables != Weight::Tables::group && (M == 1 || M > Nibbles<Words, 2>::kMostM);
  if (w.bits == 4) switch (table_parts(w, 128, 4)) {
    case 0: return run(Type<Nibbles<Words, 0>>());
    case 1: return run(Type<Nibbles<Words, 1>>());
    case 2: return once ? run(Type<Nibbles<Words, 2, true>>()) : run(Type<Nibbles<Words, 2>>());
    case 4: return run(Type<Nibbles<Words, 4>>());
  }
  if (w.bits == 2) switch (table_parts(w, 128, 4)) {
    case 0: return run(Type<Pairs<Words, 0>>());
    case 1: return run(Type<Pairs<Words, 1>>());
    case 2: return run(Type<Pairs<Words, 2>>());
    case 4: return run(Type<Pairs<Words, 4>>());
  }
  if (w.bits == 1 || w.bits == 3) switch (table_parts(w, 128, 4)) {
    case 0: return run(Type<Spread<Words, 4, 0>>());
    case 1: return run(Type<Spread<Words, 4, 1>>());
    case 2: return run(Type<Spread<Words, 4, 2>>());
    case 4: return run(Type<Spread<Words, 4, 4>>());
  }
  if (w.bits == 5) switch (table_parts(w, 64, 1)) {
    case 0: return run(Type<Spread<Words, 2, 0>>());
    case 1: return run(Type<Spread<Words, 2, 1>>());
  }
  if (has_planes(w)) switch (w.bits) {
    case 6: return run(Type<WordPlanes<Words, 6>>());
    case 7: return run(Type<WordPlanes<Words, 7>>());
    default: return run(Type<WordPlanes<Words, 8>>());
  }
  with_scaled<Words>(w, run);
}

}  // namespace
}  // namespace codebook
}  // namespace lowbit
