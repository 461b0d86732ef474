// Codes as bytes to values, one table at a time (table_look_up.h): the definition, on any instruction set.
#pragma once
#include "cpu/arena.h"
#include "cpu/codebook/tables.h"

namespace lowbit {
namespace codebook {
namespace {

struct Table {
  float* values;
  explicit Table(Arena& a) : values(a.take<float>(kMaxEntries)) {}
  void load(const Weight& w, int64_t index) const { load_table(w, index, values); }
};

// The entries as words T (steps.h).
struct FixedTable {
  int16_t* words;
  explicit FixedTable(Arena& a) : words(a.take<int16_t>(kMaxEntries)) {}
  void load(const float* values, int64_t count, float scale, float inverse) const;
};

inline void FixedTable::load(const float* values, int64_t count, float scale, float inverse) const {
  float scaled[kMaxEntries];
  for (int64_t i = 0; i < count; ++i) scaled[i] = values[i] * scale;
  to_fixed(scaled, count, inverse, words);
}

inline void look_up(const uint8_t* codes, int64_t n, int /*bits*/, const Table& table, float scale, float* out) {
  const float* values = table.values;
  for (int64_t i = 0; i < n; ++i) out[i] = values[codes[i]] * scale;
}

inline void look_up(const uint8_t* codes, int64_t n, int /*bits*/, const FixedTable& table, int16_t* out) {
  const int16_t* words = table.words;
  for (int64_t i = 0; i < n; ++i) out[i] = words[codes[i]];
}

}  // namespace
}  // namespace codebook
}  // namespace lowbit
