#include "cpu/blocks_layout_ops.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/checks.h"
#include "cpu/blocks_layout.h"
#include "common/empty.h"
#include "cpu/tuning.h"

namespace lowbit {
namespace {

constexpr uint64_t kBytes = 0x01010101;  // one bit in each byte of a quad

// 8 codes of `bits` bits side by side <-> one in each byte, in three halvings: 4 + 4, then 2 + 2, then 1 + 1 codes.
template <int bits>
struct Eight {
  static constexpr uint64_t k4 = (uint64_t(1) << 4 * bits) - 1;
  static constexpr uint64_t k2 = ((uint64_t(1) << 2 * bits) - 1) * 0x0000000100000001;
  static constexpr uint64_t k1 = ((uint64_t(1) << bits) - 1) * 0x0001000100010001;

  static uint64_t spread(uint64_t x) {
    x = (x & k4) | (x >> 4 * bits & k4) << 32;
    x = (x & k2) | (x >> 2 * bits & k2) << 16;
    return (x & k1) | (x >> bits & k1) << 8;
  }
  static uint64_t gather(uint64_t x) {
    x = (x & k1) | (x >> 8 & k1) << bits;
    x = (x & k2) | (x >> 16 & k2) << 2 * bits;
    return (x & k4) | (x >> 32 & k4) << 4 * bits;
  }
};

// One chunk of a row: its canonical words, and its words in a block, `step` apart. quads[q]: codes 4q .. 4q+3.
template <int bits>
void block_chunk(const uint8_t* words, uint32_t* vectors, int64_t step) {
  uint32_t quads[kQuads];
  for (int q = 0; q < kQuads; q += 2) {
    uint64_t eight = 0;
    std::memcpy(&eight, words + q / 2 * bits, bits);
    eight = Eight<bits>::spread(eight);
    quads[q] = uint32_t(eight);
    quads[q + 1] = uint32_t(eight >> 32);
  }
  for (int p = 0; p < 3 && plane_width(bits, p); ++p) {
    const int width = plane_width(bits, p), low = plane_low(bits, p), fields = 8 / width;
    const uint32_t mask = uint32_t(((1u << width) - 1) * kBytes);
    for (int i = 0; i < width; ++i) {
      uint32_t word = 0;
      for (int f = 0; f < fields; ++f) word |= (quads[i * fields + f] >> low & mask) << width * f;
      vectors[(low + i) * step] = word;
    }
  }
}

template <int bits>
void unblock_chunk(uint8_t* words, const uint32_t* vectors, int64_t step) {
  uint32_t quads[kQuads];
  chunk_quads(vectors, step * 4, bits, quads);
  for (int q = 0; q < kQuads; q += 2) {
    const uint64_t eight = Eight<bits>::gather(quads[q] | uint64_t(quads[q + 1]) << 32);
    std::memcpy(words + q / 2 * bits, &eight, bits);
  }
}

// Calls visit(canonical word, block word, step) for every chunk of the blocks [b0, b1) of `blocks`: the indices of its
// first words, and the distance of its words in a block.
template <class Visit>
inline void for_chunks(int64_t blocks, int64_t b0, int64_t b1, int64_t chunks, int64_t bits, Visit visit) {
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t panel = b / kPanelBlocks * kPanelBlocks, count = min64(kPanelBlocks, blocks - panel);
    for (int64_t first = 0; first < chunks; first += kChunksAtOnce)
      for (int64_t r = 0; r < kBlockRows; ++r)
        for (int64_t u = first; u < std::min(first + kChunksAtOnce, chunks); ++u)
          visit(((b * kBlockRows + r) * chunks + u) * bits,
               ((panel * chunks + u * count) * bits + b - panel) * kBlockRows + r, count * kBlockRows);
  }
}

template <int bits>
void block_range(const uint32_t* packed, uint32_t* blocks, int64_t count, int64_t chunks, int64_t b0, int64_t b1) {
  for_chunks(count, b0, b1, chunks, bits, [&](int64_t from, int64_t to, int64_t step) {
    block_chunk<bits>(reinterpret_cast<const uint8_t*>(packed + from), blocks + to, step);
  });
}

template <int bits>
void unblock_range(const uint32_t* blocks, uint32_t* packed, int64_t count, int64_t chunks, int64_t b0, int64_t b1) {
  for_chunks(count, b0, b1, chunks, bits, [&](int64_t to, int64_t from, int64_t step) {
    unblock_chunk<bits>(reinterpret_cast<uint8_t*>(packed + to), blocks + from, step);
  });
}

using Range = void (*)(const uint32_t* in, uint32_t* out, int64_t blocks, int64_t chunks, int64_t b0, int64_t b1);
constexpr Range kBlock[] = {block_range<1>, block_range<2>, block_range<3>, block_range<4>,
                            block_range<5>, block_range<6>, block_range<7>, block_range<8>};
constexpr Range kUnblock[] = {unblock_range<1>, unblock_range<2>, unblock_range<3>, unblock_range<4>,
                              unblock_range<5>, unblock_range<6>, unblock_range<7>, unblock_range<8>};

// Every call reads this memory from end to end, so fewer, larger pages help. We ask before it is touched, and again
// once it is filled, because the allocator may have used its pages before. This is advice: a refusal changes nothing.
void ask_for_huge_pages(void* data, size_t bytes, bool filled) {
#ifdef MADV_HUGEPAGE
  constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, which older headers lack
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, filled ? kCollapse : MADV_HUGEPAGE);
#else
  (void)data, (void)bytes, (void)filled;
#endif
}

// `from` may be `to`: the words of a panel fill the same memory in both orders.
void arrange(const uint32_t* from, uint32_t* to, int64_t n, int64_t chunks, int64_t bits, Range range) {
  const int64_t whole = n / kBlockRows, panels = ceil_div(whole, kPanelBlocks);
  const int64_t panel_words = kPanelBlocks * kBlockRows * chunks * bits;
  const size_t bytes = size_t(n * chunks * bits) * sizeof *to;
  if (from != to) ask_for_huge_pages(to, bytes, false);
  const int64_t grain = std::max<int64_t>(1, kTaskChunks / std::max<int64_t>(1, kPanelBlocks * kBlockRows * chunks));
  torch::stable::parallel_for(0, panels, grain, [&](int64_t p0, int64_t p1) {
    if (from != to) return range(from, to, whole, chunks, p0 * kPanelBlocks, std::min(whole, p1 * kPanelBlocks));
    std::vector<uint32_t> copy(static_cast<size_t>(panel_words));
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t begin = p * panel_words, end = std::min(whole * kBlockRows * chunks * bits, begin + panel_words);
      std::copy(from + begin, from + end, copy.begin());
      range(copy.data() - begin, to, whole, chunks, p * kPanelBlocks, std::min(whole, (p + 1) * kPanelBlocks));
    }
  });
  const int64_t done = whole * kBlockRows * chunks * bits;
  if (from != to) std::copy(from + done, from + n * chunks * bits, to + done);
  ask_for_huge_pages(to, bytes, true);
}

void check_words(const char* op, const char* name, const Tensor& t, int64_t bits, int64_t dimensions) {
  LOWBIT_CHECK(bits >= 1 && bits <= 8, op, ": bits must be between 1 and 8: got bits=", bits);
  check_device(op, name, t);
  LOWBIT_CHECK(t.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32: got ",
               dtype_name(t.scalar_type()));
  LOWBIT_CHECK(t.dim() == dimensions, op, ": ", name, " must have ", dimensions, " dimensions: got shape ",
               shape_of(t));
  LOWBIT_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

int64_t chunks_of_words(const char* op, const Tensor& packed, int64_t bits) {
  check_words(op, "packed", packed, bits, 2);
  LOWBIT_CHECK(packed.size(1) % bits == 0, op, ": packed must have a multiple of bits=", bits, " words per row: got ",
               packed.size(1));
  return packed.size(1) / bits;
}

}  // namespace

void huge_pages_cpu(Tensor packed) {
  check_device("huge_pages", "packed", packed);
  LOWBIT_CHECK(packed.is_contiguous(), "huge_pages: packed must be contiguous");
  void* data = const_cast<void*>(packed.const_data_ptr());
  const size_t bytes = size_t(packed.numel()) * size_t(packed.element_size());
  ask_for_huge_pages(data, bytes, false);
  ask_for_huge_pages(data, bytes, true);
}

Tensor block_cpu(Tensor packed, int64_t bits) {
  const int64_t n = packed.dim() ? packed.size(0) : 0, chunks = chunks_of_words("block", packed, bits);
  Tensor out = empty_cpu({n, chunks, bits, 1}, ScalarType::Int);
  arrange(static_cast<const uint32_t*>(packed.const_data_ptr()), static_cast<uint32_t*>(out.mutable_data_ptr()), n,
          chunks, bits, kBlock[bits - 1]);
  return out;
}

void block_in_place_cpu(Tensor packed, int64_t bits) {
  const int64_t chunks = chunks_of_words("block_", packed, bits);
  uint32_t* words = static_cast<uint32_t*>(packed.mutable_data_ptr());
  arrange(words, words, packed.size(0), chunks, bits, kBlock[bits - 1]);
}

Tensor unblock_cpu(Tensor blocks, int64_t bits) {
  check_words("unblock", "blocks", blocks, bits, 4);
  LOWBIT_CHECK(blocks.size(2) == bits && blocks.size(3) == 1, "unblock: blocks must be of shape [N, ceil(K/32), ", bits,
               ", 1]: got ", shape_of(blocks));
  const int64_t n = blocks.size(0), chunks = blocks.size(1);
  Tensor out = empty_cpu({n, chunks * bits}, ScalarType::Int);
  arrange(static_cast<const uint32_t*>(blocks.const_data_ptr()), static_cast<uint32_t*>(out.mutable_data_ptr()), n,
          chunks, bits, kUnblock[bits - 1]);
  return out;
}

}  // namespace lowbit
