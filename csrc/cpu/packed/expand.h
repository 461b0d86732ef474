// Panels of weights, expanded for register tiles that many rows of x use.
#pragma once
#include "cpu/arena.h"
#include "cpu/packed/dequantize.h"
#include "cpu/packed/schedule.h"

namespace lowbit {
namespace packed {
namespace {

// The codes of whole chunks of a block, quad after quad: [quads, 64 bytes].
template <int kBits>
LOWBIT_TILE void chunks_to_quads(const uint8_t* chunk, int64_t step, int64_t chunks, uint8_t* quads) {
  for (; chunks > 0; --chunks, chunk += step * kBits)
    LOWBIT_UNROLL for (int q = 0; q < kQuads; ++q, quads += 64) LOWBIT_UNROLL for (int part = 0; part < kParts; ++part)
      store_bytes(quads + part * kPartBytes, quad<kBits>(chunk, step, part, q));
}

inline decltype(&chunks_to_quads<8>) to_quads(int bits) {
  switch (bits) {
    case 2: return chunks_to_quads<2>;
    case 3: return chunks_to_quads<3>;
    case 4: return chunks_to_quads<4>;
    case 5: return chunks_to_quads<5>;
    case 6: return chunks_to_quads<6>;
    case 7: return chunks_to_quads<7>;
    default: return chunks_to_quads<8>;
  }
}

template <class Dot>
class PanelExpander {
 public:
  // needed: whether there is a panel that register tiles do not read as it is stored
  PanelExpander(Arena& arena, const CpuWeight& w, const Schedule& p, bool needed)
      : w_(w),
        p_(p),
        panel_(arena.take<uint8_t>(needed ? positions(p) / 4 * Dot::kSteps * kStepBytes : 0)),
        quads_(arena.take<uint8_t>((positions(p) + kChunkColumns) / 4 * 64)),
        codes_(arena.take<uint8_t>(positions(p) + 2 * kChunkColumns + kUnpackSlack)) {}

  // The weights of rows [n0, n1) and segments [s0, s1): [steps, kPanelBlocks, 64 bytes]. `zero`: of these rows
  const uint8_t* operator()(int64_t n0, int64_t n1, int64_t s0, int64_t s1, const StoredLanes& zero_lanes) {
    const int64_t p0 = p_.begin(s0);
    const bool many = n1 - n0 == kPanelN && in_block(w_, n1 - 1) && p_.whole_chunks;
    const int64_t blocks = many ? kTileBlocks : 1;  // at a time
    for (int64_t n = n0; n < n1; n += blocks * kBlockRows) {
      const bool chunks = in_block(w_, n) && p_.whole_chunks;
      const BlockPlace block = place_of_block(w_, n);
      const uint8_t* quads = chunks ? nullptr : quads_of(n, min64(kBlockRows, n1 - n), s0, s1, block);
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t p = p_.begin(s), count = p_.end(s) - p;
        typename Dot::Center center[kTileBlocks * kParts];
        for (int64_t part = 0; Dot::kCentred && part < blocks * kParts; ++part)
          center[part] = Dot::center(zero_lanes.at(p_.group(s), n - n0 + part * kLanes), w_.bits);
        uint8_t* to = panel_ + (p - p0) / 4 * Dot::kSteps * kStepBytes + (n - n0) / kBlockRows * 64;
        if (chunks)
          (many ? expansion<Dot, kTileBlocks> : expansion<Dot, 1>)(w_.bits)(
              block.vector + p / kChunkColumns * w_.bits * block.step, block.step, count / kChunkColumns, center, to);
        else
          expand_quads<Dot>(quads + (p - p0) / 4 * 64, count / 4, w_.bits, center, to);
      }
    }
    return panel_;
  }

 private:
  static int64_t positions(const Schedule& p) { return min64(p.slice * p.segment, p.padded) + kChunkColumns; }

  // The codes of a block's rows at the positions of segments [s0, s1), quad after quad.
  const uint8_t* quads_of(int64_t n, int64_t rows, int64_t s0, int64_t s1, const BlockPlace& block) {
    if (in_block(w_, n) && p_.in_place) {
      const int64_t begin = p_.begin(s0), first = begin / kChunkColumns, last = ceil_div(p_.end(s1 - 1), kChunkColumns);
      to_quads(w_.bits)(block.vector + first * w_.bits * block.step, block.step, last - first, quads_);
      return quads_ + (begin - first * kChunkColumns) / 4 * 64;
    }
    for (int64_t i = 0; i < rows; ++i) write_quads(n + i, s0, s1, quads_ + 4 * i);
    return quads_;
  }

  // The codes of row n at the positions of segments [s0, s1), four codes every 64 bytes; zeros between groups.
  void write_quads(int64_t n, int64_t s0, int64_t s1, uint8_t* out) {
    for (int64_t s = s0, next; s < s1; s = next) {  // a run of segments without padding in it
      next = p_.in_place ? s1 : min64(s1, (p_.group(s) + 1) * p_.per_group);
      const int64_t g = p_.group(s), begin = p_.begin(s), length = p_.end(next - 1) - begin;
      const int64_t k = p_.in_place ? begin : g * w_.group_size + (begin - g * p_.stride);
      const int64_t k_end = p_.in_place ? min64(w_.K, begin + length)
                                        : min64(min64(w_.K, (g + 1) * w_.group_size), k + length);
      const int64_t first = k / kChunkColumns * kChunkColumns;  // rows are unpacked from whole chunks on
      uint8_t* codes = codes_ + (k - first);
      if (k < k_end) row_codes(w_, n, first, k_end, codes_);
      for (int64_t i = max64(k_end - k, 0); i < length; ++i) codes[i] = 0;
      for (int64_t i = 0; i < length; i += 4, out += 64) std::memcpy(out, codes + i, 4);
    }
  }

  const CpuWeight& w_;
  const Schedule& p_;
  uint8_t *panel_, *quads_, *codes_;
};

}  // namespace
}  // namespace packed
}  // namespace lowbit
