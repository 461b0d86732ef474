// The layout `blocks` of codes (definition: lowbit/backends/cpu/blocks.py): kernels whose lanes are output rows read
// it.
//
// A block is 16 rows, a chunk 32 columns of a block: `bits` vectors of 64 bytes, one word of 32 bits per row. Up to
// four blocks are a panel; the same vector of each of its blocks stands side by side. The bits of a code are split into
// planes of 8, 4, 2 or 1 bits, low bits first. A plane of width w is w consecutive vectors. Bits [8*j + w*f, +w) of a
// word of its vector i belong to column 4*q + j of the chunk, with the quad q = i*8/w + f. So after one shift the four
// bytes of a word are the codes of four neighbouring columns.
#pragma once
#include "common/operands.h"
#include "cpu/simd.h"

#if defined(__SANITIZE_ADDRESS__)  // unrolled, tiles of instrumented loads would take minutes to compile
#undef LOWBIT_UNROLL
#define LOWBIT_UNROLL _Pragma("GCC unroll 1")
#endif

namespace lowbit {
namespace {

constexpr int64_t kBlockRows = 16;
constexpr int64_t kChunkColumns = 32;
constexpr int kPanelBlocks = 4;
constexpr int64_t kPanelN = kPanelBlocks * kBlockRows;
constexpr int kQuads = 8;                   // of a chunk
constexpr int kParts = kBlockRows / kLanes;  // vectors of this instruction set in 64 bytes
constexpr int kPartBytes = 64 / kParts;

// Plane p of codes of `bits` bits: its width and its first bit, which is its first vector too.
constexpr int plane_width(int bits, int p) {
  const int widths[9][3] = {{}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};
  return p < 3 ? widths[bits][p] : 0;
}
constexpr int plane_low(int bits, int p) { return p == 0 ? 0 : plane_low(bits, p - 1) + plane_width(bits, p - 1); }

// (v >> right) of every 32-bit lane, left where negative
inline Int shifted(Int v, int right) {
  typedef uint32_t Lanes __attribute__((vector_size(sizeof(Int))));
  return right >= 0 ? Int(Lanes(v) >> right) : Int(Lanes(v) << -right);
}

// Quad q of a part of a chunk, whose vectors are `step` bytes apart: 32 bits per row, a byte per code.
template <int kBits>
inline Int quad(const uint8_t* chunk, int64_t step, int part, int q) {
  if (kBits == 8) return load_bytes(chunk + step * q + kPartBytes * part);
  Int out = zero_int();
  LOWBIT_UNROLL for (int p = 0; p < 3; ++p) {
    const int w = plane_width(kBits, p), low = plane_low(kBits, p);
    if (w == 0) break;
    const Int v = load_bytes(chunk + step * (low + q / (8 / w)) + kPartBytes * part);
    const Int moved = shifted(v, q % (8 / w) * w - low), mask = splat(int32_t((((1u << w) - 1) << low) * 0x01010101u));
    out = p == 0 ? bit_and(moved, mask) : or_masked(out, moved, mask);
  }
  return out;
}

// The address of a block's first vector, and the distance to the next one.
struct BlockPlace {
  const uint8_t* vector;
  int64_t step;  // bytes; a chunk has `bits` vectors
};

inline BlockPlace place_of_block(const Codes& w, int64_t n) {
  const int64_t panel = n / kPanelN * kPanelN, blocks = min64(kPanelBlocks, w.N / kBlockRows - panel / kBlockRows);
  return {w.packed + panel * w.row_bytes + (n - panel) / kBlockRows * 64, blocks * 64};
}

inline bool in_block(const Codes& w, int64_t n) { return w.blocks && n / kBlockRows < w.N / kBlockRows; }

// The codes of column `k` of a chunk, whose vectors are `step` bytes apart, in a part of a block: one in each lane.
inline Int column_codes(const uint8_t* chunk, int64_t step, int bits, int part, int k) {
  const int q = k / 4;
  Int out = zero_int();
  for (int p = 0; p < 3 && plane_width(bits, p); ++p) {
    const int width = plane_width(bits, p), low = plane_low(bits, p), right = k % 4 * 8 + q % (8 / width) * width;
    const Int v = load_bytes(chunk + step * (low + q / (8 / width)) + kPartBytes * part);
    out = add(out, multiply(bit_and(shifted(v, right), splat((1 << width) - 1)), splat(1 << low)));
  }
  return out;
}

// The words of one row in a chunk, `step` bytes apart, as codes: a byte each, four to a quad.
inline void chunk_quads(const void* words, int64_t step, int bits, uint32_t (&quads)[kQuads]) {
  for (uint32_t& quad : quads) quad = 0;
  for (int p = 0; p < 3 && plane_width(bits, p); ++p) {
    const int width = plane_width(bits, p), low = plane_low(bits, p);
    const uint32_t mask = ((1u << width) - 1) * 0x01010101u;
    for (int i = 0; i < width; ++i) {
      uint32_t word;
      std::memcpy(&word, static_cast<const char*>(words) + (low + i) * step, 4);
      for (int f = 0; f < 8 / width; ++f) quads[i * (8 / width) + f] |= (word >> (width * f) & mask) << low;
    }
  }
}

// The codes [k0, k1) of row n, in a block, as bytes; k0 is a multiple of 32. Whole chunks are written.
inline void block_row_codes(const Codes& w, int64_t n, int64_t k0, int64_t k1, uint8_t* out) {
  const BlockPlace block = place_of_block(w, n);
  for (int64_t u = k0 / kChunkColumns; u * kChunkColumns < k1; ++u, out += kChunkColumns) {
    uint32_t quads[kQuads];
    chunk_quads(block.vector + u * w.bits * block.step + n % kBlockRows * 4, block.step, w.bits, quads);
    std::memcpy(out, quads, sizeof quads);
  }
}

}  // namespace
}  // namespace lowbit
