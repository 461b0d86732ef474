// Many rows of x times a weight, on sm_90a: what the families share. What a family adds is how codes become operands, and
// what its groups have.
//
// A block of three warpgroups takes one piece of work after the other (persistent): ROWS rows of W by X_ROWS rows of
// x. A thread of the first warpgroup, the producer, copies tiles of W and boxes of x to a ring of stages in shared
// memory. The other two, the consumers, multiply 64 rows of W each. A stage goes round by two mbarriers: `full`, when
// its bytes have been copied, and `empty`, when all warps of the consumers have read it.
//
// W is the left operand, in registers: ldmatrix gives a thread the words of a tile that hold the codes of its own
// columns, and the family makes operands of them. x is the right operand, in shared memory as it is. The products of a
// group are summed by themselves, then scaled and added (promotion).
//
// The order of sums depends on nothing but the shape of W and the number of splits of K.
#pragma once
#include "cuda/batch_sm90.h"
#include "cuda/codes.h"
#include "cuda/primitives_sm90.h"

namespace lowbit {
namespace cuda {
namespace batch_sm90 {

constexpr int THREADS = 3 * 128, CONSUMER_WARPS = 8;
constexpr int PART = 64, OCTETS = 32;  // bytes of a row of a tile: of one part of a plane; of the plane of one bit
constexpr int BOX = 64;                // columns of a box of x
constexpr int HALF = TILE / 2;         // columns whose operands a thread holds at a time

// What a stage holds: X_ROWS rows of x in boxes, then the parts of ROWS rows of W, then their octets.
// RESERVED: bytes of shared memory that the ring leaves to the family.
template <int BITS, int X_ROWS, int RESERVED>
struct Stage {
  static constexpr int X_BOX = X_ROWS * BOX * 2, X_BYTES = TILE / BOX * X_BOX;
  static constexpr int PARTS = X_BYTES, OCTETS_AT = PARTS + BITS / 2 * ROWS * PART;
  static constexpr int BYTES = OCTETS_AT + BITS % 2 * ROWS * OCTETS;
  static constexpr int LIMIT = (225 * 1024 - RESERVED) / BYTES, COUNT = LIMIT < 4 ? LIMIT : 4;
  static_assert(COUNT >= 2, "a ring has two stages");
};

template <int BITS, int X_ROWS, int RESERVED>
constexpr int SHARED_BYTES =
    1023 + Stage<BITS, X_ROWS, RESERVED>::COUNT * (Stage<BITS, X_ROWS, RESERVED>::BYTES + 16) + RESERVED;

// What a thread holds of rows g and g + 8 of half a tile: of lanes 8j + 2t and the next, for j = 0 .. 3.
template <int BITS>
struct Words {
  static constexpr int WIDTH = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2, FIELDS = 16 / WIDTH;  // of the first plane
  static constexpr int COUNT = BITS == 1 ? 0 : BITS == 8 ? 2 : 1;                       // its parts
  uint32_t first[COUNT > 0 ? COUNT : 1][2][4], second[2][4], octets[2][4];

  // Of the 16 rows of the stage from first_row on; `parts` and `octets_at` are addresses. Planes that hold both halves
  // are shifted, so that the chunks of either are found at the same bits.
  LOWBIT_DEVICE void fetch(uint32_t parts, uint32_t octets_at, int first_row, int half) {
    const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
    LOWBIT_UNROLL
    for (int upper = 0; upper < 2; ++upper) {
      const int row = first_row + 8 * upper + lane % 8;
      const uint32_t there = parts + row * PART + ((lane / 8 ^ (row >> 1 & 3)) << 4);  // a swizzle of 64 bytes
      if constexpr (COUNT > 0) {
        LOWBIT_UNROLL
        for (int p = 0; p < COUNT; ++p)
          load_matrices(first[p][upper], there + (FIELDS == 8 ? 0 : COUNT * half + p) * ROWS * PART);
      }
      if constexpr (BITS == 6 || BITS == 7) load_matrices(second[upper], there + 2 * ROWS * PART);
      LOWBIT_UNROLL
      for (int j = 0; j < 4; ++j) {
        if constexpr (COUNT > 0 && FIELDS == 8) first[0][upper][j] >>= 8 * half;
        if constexpr (BITS == 6 || BITS == 7) second[upper][j] >>= 8 * half;
        if constexpr (BITS % 2) {
          const uint32_t two = load_pair(octets_at + (first_row + 8 * upper + g) * OCTETS + 8 * j + 2 * t);
          octets[upper][j] = (two | two << 8) >> 4 * half;
        }
      }
    }
  }

  // The codes of columns 32 * chunk + 8j + 2t and the next of the half, a pair of integers, in the zero bits of `pair`.
  LOWBIT_DEVICE uint32_t codes(int chunk, int upper, int j, uint32_t pair) const {
    constexpr uint32_t MASK = BITS > 1 ? ((1u << WIDTH) - 1) * 0x00010001u : 0, TOP = 0x00010001u << (BITS - 1);
    if constexpr (BITS > 1)
      pair = insert_bits(pair, moved(first[chunk / FIELDS][upper][j], chunk % FIELDS * WIDTH, 0), MASK);
    if constexpr (BITS == 6 || BITS == 7)
      pair = insert_bits(pair, moved(second[upper][j], 2 * chunk, 4), 0x00300030u);
    if constexpr (BITS % 2) pair = insert_bits(pair, moved(octets[upper][j], chunk, BITS - 1), TOP);
    return pair;
  }

  // With bit `from` at `to`: one shift, where a mask behind it would cost another.
  LOWBIT_DEVICE static uint32_t moved(uint32_t word, int from, int to) {
    return from > to ? word >> (from - to) : word << (to - from);
  }
};

// What all families' kernels are given: Linear<Weight>, and how it is cut into pieces of work.
struct Task {
  const CUtensorMap *parts_map, *octets_map;  // of the codes, bytes [N, tiles * 32 * BITS]: ROWS x PART, ROWS x OCTETS
  const CUtensorMap* x_map;                   // of x [M, K]: boxes of X_ROWS x BOX
  const void *bias, *outlier_values, *outlier_columns;
  const int32_t* outlier_rows;
  const uint16_t* x;
  uint16_t* y;
  int M, N, K;
  uint32_t group_factor;  // 2^31 / (chunks of a group), rounded up; 0 for one group
  int bias_dtype, outlier_dtype, wide_columns;
  float* parts;  // float32 [splits, M, N], what is written instead of y where splits > 1
  int splits;
};

// Args:
//   BITS, T: of the codes; the dtype of x and y.
//   X_ROWS: rows of x of a piece of work.
//   family: RESERVED: bytes of shared memory after the mbarriers that are the family's;
//     begin(their address): by all threads, before the first barrier;
//     begin_rows(first row of the block): by the warps that multiply, at each piece of work;
//     fetch_group(rows g and g + 8, group): begins to load what the group has; operands(group): what operand() needs of
//     it, and scale[2]; operand(words, operands, chunk, upper, j): of columns 32 * chunk + 8j + 2t and the next;
//     has_residuals(): whether operands().residual[2] multiplies the sum of x, which products with ones make.
template <int BITS, DType T, int X_ROWS, class Family>
LOWBIT_DEVICE void linear(const Task& task, Family& family) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Stage<BITS, X_ROWS, Family::RESERVED>;
  constexpr int SUMS = X_ROWS / 2;  // of a thread
  const int M = task.M, N = task.N, K = task.K, splits = task.splits;
  const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, t = lane % 4;
  const int tiles = (K + TILE - 1) / TILE, row_blocks = (N + ROWS - 1) / ROWS, x_blocks = (M + X_ROWS - 1) / X_ROWS;
  const int works = splits * row_blocks * x_blocks;
  const uint32_t stages = shared_address(0), bars = stages + S::COUNT * S::BYTES;
  const auto full = [&](int stage) { return bars + 16 * stage; };
  const auto empty = [&](int stage) { return bars + 16 * stage + 8; };

  // A piece of work. Neighbours have the same rows of W.
  struct Work {
    int first_row, first_x, split, first_tile, end_tile;
  };
  const auto work_at = [&](int i) {
    const int x_block = i % x_blocks, row_block = i / x_blocks % row_blocks, split = i / x_blocks / row_blocks;
    return Work{row_block * ROWS, x_block * X_ROWS, split, split * tiles / splits, (split + 1) * tiles / splits};
  };

  family.begin(bars + 16 * S::COUNT);
  if (thread_index() == 0) {
    for (int stage = 0; stage < S::COUNT; ++stage) {
      mbarrier_init(full(stage), 1);
      mbarrier_init(empty(stage), CONSUMER_WARPS);
    }
    mbarrier_init_done();
  }
  barrier();  // the mbarriers, and what the family began, are there for all threads

  const auto produce = [&]() {
    prefetch_map(BITS > 1 ? task.parts_map : task.octets_map);
    prefetch_map(task.x_map);
    int stage = 0, parity = 1;
    for (int i = block_index(); i < works; i += gridDim.x) {
      const Work work = work_at(i);
      for (int tile = work.first_tile; tile < work.end_tile; ++tile) {
        const uint32_t at = stages + stage * S::BYTES;
        mbarrier_wait(empty(stage), parity);
        mbarrier_arrive_expect(full(stage), S::BYTES);
        LOWBIT_UNROLL
        for (int p = 0; p < BITS / 2; ++p)
          copy_box(at + S::PARTS + p * ROWS * PART, task.parts_map, tile * (32 * BITS) + p * PART, work.first_row,
                   full(stage));
        if constexpr (BITS % 2)
          copy_box(at + S::OCTETS_AT, task.octets_map, tile * (32 * BITS) + BITS / 2 * PART, work.first_row,
                   full(stage));
        LOWBIT_UNROLL
        for (int box = 0; box < TILE / BOX; ++box)
          copy_box(at + box * S::X_BOX, task.x_map, tile * TILE + box * BOX, work.first_x, full(stage));
        if (++stage == S::COUNT) stage = 0, parity ^= 1;
      }
    }
  };

  const auto consume = [&]() {
    const int consumer_row = (warp - 4) * 16;  // of this warp in the block
    const bool residuals = family.has_residuals();
    int stage = 0, parity = 0;
    for (int i = block_index(); i < works; i += gridDim.x) {
      const Work work = work_at(i);
      // Rows past the last one are zeros in shared memory, have the scale of the last one, and are not stored.
      int row[2];
      LOWBIT_UNROLL
      for (int upper = 0; upper < 2; ++upper) {
        const int n = work.first_row + consumer_row + 8 * upper + g;
        row[upper] = n < N ? n : N - 1;
      }
      float sums[SUMS] = {};

      family.begin_rows(work.first_row);
      const auto group_of = [&](int chunk) {
        return static_cast<int>(multiply_high(2u * static_cast<uint32_t>(chunk), task.group_factor));
      };
      using Group = typename Family::Group;

      // Adds the products of CHUNKS chunks of half a tile, which are in one group.
      const auto multiply = [&](auto chunks, const Words<BITS>& words, uint64_t x_matrix, int chunk,
                                const Group& group) {
        constexpr int CHUNKS = decltype(chunks)::value;
        const typename Family::Operands operands = family.operands(group);
        uint32_t a[CHUNKS][2][4];
        LOWBIT_UNROLL
        for (int c = 0; c < CHUNKS; ++c)
          LOWBIT_UNROLL
          for (int step = 0; step < 2; ++step)
            LOWBIT_UNROLL
            for (int r = 0; r < 4; ++r)
              a[c][step][r] = family.operand(words, operands, chunk + c, r % 2, 2 * step + r / 2);
        float products[SUMS];
        const auto x_of = [&](int c, int step) {  // 16 columns of a box
          const int column = (chunk + c) * CHUNK + 16 * step;
          return x_matrix + (column / BOX * S::X_BOX + column % BOX * 2) / 16;
        };
        const auto promote = [&](const float(&by)[2]) {
          LOWBIT_UNROLL
          for (int s = 0; s < SUMS; ++s) sums[s] = fused_multiply_add(by[s / 2 % 2], products[s], sums[s]);
        };
        if (residuals) {
          constexpr uint32_t ONE = T == DType::f16 ? 0x3C003C00u : 0x3F803F80u;
          uint32_t ones[4] = {ONE, ONE, ONE, ONE};
          const float by[2] = {operands.scale[0] * operands.residual[0], operands.scale[1] * operands.residual[1]};
          products_begin();
          LOWBIT_UNROLL
          for (int c = 0; c < CHUNKS; ++c) {
            if (c == 0)
              multiply_begin<T, false>(products, ones, x_of(0, 0));
            else
              multiply_begin<T, true>(products, ones, x_of(c, 0));
            multiply_begin<T, true>(products, ones, x_of(c, 1));
          }
          products_end();
          products_wait();
          promote(by);
        }
        products_begin();
        LOWBIT_UNROLL
        for (int c = 0; c < CHUNKS; ++c) {
          if (c == 0)
            multiply_begin<T, false>(products, a[0][0], x_of(0, 0));
          else
            multiply_begin<T, true>(products, a[c][0], x_of(c, 0));
          multiply_begin<T, true>(products, a[c][1], x_of(c, 1));
        }
        products_end();
        products_wait();
        promote(operands.scale);
      };

      const int end = (K + CHUNK - 1) / CHUNK;  // chunks of K
      Group next = family.fetch_group(row, group_of(work.first_tile * (TILE / CHUNK)));
      for (int tile = work.first_tile; tile < work.end_tile; ++tile) {
        const uint32_t at = stages + stage * S::BYTES;
        mbarrier_wait(full(stage), parity);
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          const int first = tile * (TILE / CHUNK) + half * (HALF / CHUNK);
          if (first >= end) break;
          Words<BITS> words;
          words.fetch(at + S::PARTS, at + S::OCTETS_AT, consumer_row, half);
          const uint64_t x_matrix = describe_matrix(at + half * (HALF / BOX) * S::X_BOX);
          const int last = first + 4 < end ? first + 3 : end - 1;
          Group groups[4];
          groups[0] = next;
          // The group of the next half is on its way while this one is multiplied.
          next = family.fetch_group(row, group_of(first + 4 < end ? first + 4 : last));
          if (group_of(first) == group_of(last)) {
            multiply(std::integral_constant<int, 4>(), words, x_matrix, 0, groups[0]);
          } else {
            LOWBIT_UNROLL
            for (int c = 1; c < 4; ++c) groups[c] = family.fetch_group(row, group_of(first + c < end ? first + c : last));
            LOWBIT_UNROLL
            for (int c = 0; c < 4; ++c)
              if (first + c < end) multiply(std::integral_constant<int, 1>(), words, x_matrix, c, groups[c]);
          }
        }
        if (lane == 0) mbarrier_arrive(empty(stage));
        if (++stage == S::COUNT) stage = 0, parity ^= 1;
      }

      const auto x_row_of = [&](int s) { return work.first_x + s / 4 * 8 + 2 * t + s % 2; };
      if (task.outlier_values != nullptr && work.split == 0) {
        LOWBIT_UNROLL
        for (int upper = 0; upper < 2; ++upper) {
          const int end = load(task.outlier_rows + row[upper] + 1);
          for (int o = load(task.outlier_rows + row[upper]); o < end; ++o) {
            const float value = float_at(task.outlier_values, DType(task.outlier_dtype), o);
            const int column = task.wide_columns ? load(static_cast<const int32_t*>(task.outlier_columns) + o)
                                            : load(static_cast<const uint16_t*>(task.outlier_columns) + o);
            LOWBIT_UNROLL
            for (int s = 0; s < SUMS; ++s)
              if (s / 2 % 2 == upper && x_row_of(s) < M)
                sums[s] = fused_multiply_add(
                    value, to_float<T>(load(task.x + static_cast<int64_t>(x_row_of(s)) * K + column)), sums[s]);
          }
        }
      }
      float shift[2] = {};
      if (task.bias != nullptr && splits == 1) {
        LOWBIT_UNROLL
        for (int upper = 0; upper < 2; ++upper) shift[upper] = float_at(task.bias, DType(task.bias_dtype), row[upper]);
      }
      LOWBIT_UNROLL
      for (int s = 0; s < SUMS; ++s) {
        const int n = work.first_row + consumer_row + s / 2 % 2 * 8 + g, m = x_row_of(s);
        if (n >= N || m >= M) continue;
        if (splits > 1)
          store(task.parts + (static_cast<int64_t>(work.split) * M + m) * N + n, sums[s]);
        else
          store(task.y + static_cast<int64_t>(m) * N + n, from_float<T>(sums[s] + shift[s / 2 % 2]));
      }
    }
  };

  // 128 x 24 + 256 x 240 registers are what 384 threads of 168 have. With 40 and 232, 7 bits spill.
  if (warp < 4) {
    give_registers<24>();
    if (warp == 0 && elected()) produce();
  } else {
    take_registers<240>();
    consume();
  }
#endif
}

// y = parts.sum(0) + bias, in the order of the splits.
template <DType T>
LOWBIT_KERNEL(256, 1)
add_splits(const float* parts, const void* bias, uint16_t* y, int64_t M, int64_t N, int splits, int bias_dtype) {
  const int64_t i = static_cast<int64_t>(block_index()) * 256 + thread_index();
  if (i >= M * N) return;
  float sum = load(parts + i);
  for (int split = 1; split < splits; ++split) sum += load(parts + split * M * N + i);
  if (bias != nullptr) sum += float_at(bias, DType(bias_dtype), i % N);
  store(y + i, from_float<T>(sum));
}

// ------------------------------------------------------------------------------------------------------------ the host

// The maps of the codes and of x; an error code of CUDA, 0: none.
template <int BITS, int X_ROWS>
int make_maps(CUtensorMap& parts_map, CUtensorMap& octets_map, CUtensorMap& x_map, const Codes& w, const void* x,
              int64_t M) {
  const auto codes_map = [&](CUtensorMap& map, int columns, CUtensorMapSwizzle swizzle) {
    return make_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, w.packed, w.N, w.row_bytes, ROWS, columns, swizzle);
  };
  int error = BITS > 1 ? codes_map(parts_map, PART, CU_TENSOR_MAP_SWIZZLE_64B) : 0;
  if (error == 0 && BITS % 2) error = codes_map(octets_map, OCTETS, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (error == 0)
    error = make_map(x_map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, x, M, w.K, X_ROWS, BOX, CU_TENSOR_MAP_SWIZZLE_128B);
  return error;
}

// Starts add_splits, where there are splits.
template <DType T, class Weight>
int launch_sum(const Linear<Weight>& call, const float* parts, int splits, Stream stream) {
  if (splits == 1) return 0;
  const int sums = static_cast<int>((call.M * call.weight.N + 255) / 256);
  return launch(&add_splits<T>, sums, 256, 0, stream, parts, call.bias, static_cast<uint16_t*>(call.y), call.M,
                call.weight.N, splits, static_cast<int>(call.bias_dtype));
}

}  // namespace batch_sm90
}  // namespace cuda
}  // namespace lowbit
