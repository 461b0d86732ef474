// A Kronecker product in one launch, what is between its two products on chip. It equals the PyTorch lines
//
//   X = x[:, input_permutation.argsort()].view(M, k1, k2)
//   y = sum(a[r] @ X @ b[r].T for r in range(R)).view(M, N)[:, output_permutation] + bias
//
// with float32 sums and one rounding to the dtype of x. One factor is multiplied first, Q [NQ, KQ], the other second,
// P [NP, KP]; either may be `a`:
//
//   T[nq, kp] = sum_kq Q[nq, kq] X[kp, kq]        Y[np, nq] = sum_kp P[np, kp] T[nq, kp]
//
// Blocks stay: each reads the factors once, and then goes over the rows of x, a few at a time, while the next ones are
// on their way. A warp makes 16 rows of T for one row of x. They stay in its registers: two tiles of sums of
// mma.sync are the left operand of another one, if its columns are taken in the order in which the threads have them.
//
// Operands are numbers of 16 bits. What has more is a sum of planes: bfloat16 is one plane, float16 two, float32 three.
// A plane holds the upper 16 bits of what the planes before it leave, so that the sum is exact, and the products of
// planes are exact in float32. T is three planes. Of two operands with three planes, the product of the last planes is
// left out: it is below 2^-30 of the whole. Of T and a float16, that of the last ones is: it is below 2^-22.
// Where x and Q are float16, the first product takes them as they are.
#pragma once
#include "cuda/division.h"
#include "cuda/kron/fused.h"
#include "cuda/kron/stored.h"

namespace lowbit {
namespace cuda {
namespace kron_fused {

// Columns of operands, in chunks of 32.
LOWBIT_DEVICE int whole_chunks(int columns) { return (columns + 31) / 32 * 32; }

// What the upper 16 bits leave: exact.
LOWBIT_DEVICE float rest_of(float value) { return value - float_of(bits_of(value) & 0xFFFF0000u); }

LOWBIT_DEVICE uint16_t round_to(DType dtype, float value) {
  return dtype == DType::f16 ? from_float<DType::f16>(value) : from_float<DType::bf16>(value);
}

// Args:
//   T: of the operands of the first product; where it is float16, x and Q are, and have one plane each.
//   P_TILES: 8 * P_TILES rows of P are multiplied at a time.
//   a_first: Q is `a`, with NQ = n1, KQ = k1, NP = n2, KP = k2; else Q is `b`.
//   q_*, p_*: the factors' parts of `Stored`; groups is 0 where one scale serves all rows.
//   planes: of Q, P and x.
//   rows: of x that a block takes at a time; stages: how many times there is room for them.
//   blocks: how many there are.
//   copy_q, copy_p, copy_x: these are copied as they are, 16 bytes at a time.
//   vectors: y is written 16 bytes at a time.
//   k2_factor, k2_shift: the Divisor by k2; n2_factor, n2_shift: that by n2.
//   *_begin, *_pitch, *_plane, y_row: the members of `Sizes`.
template <DType T, int P_TILES>
LOWBIT_KERNEL(THREADS, P_TILES <= 8 ? 2 : 1)
kernel(const void* x, void* y, const void* bias, const int32_t* input_permutation, const int32_t* output_permutation,
       const void* q_values, const void* q_scales, const void* q_zeros, const void* p_values, const void* p_scales,
       const void* p_zeros, int M, int terms, int NQ, int KQ, int NP, int KP, int a_first, int x_dtype, int bias_dtype,
       int q_dtype, int q_bits, int q_words, int q_groups, int q_group_size, int q_scales_dtype, int q_zeros_dtype,
       int p_dtype, int p_bits, int p_words, int p_groups, int p_group_size, int p_scales_dtype, int p_zeros_dtype,
       int q_planes, int p_planes, int x_planes, int rows, int stages, int blocks, int copy_q, int copy_p, int copy_x,
       int vectors, uint32_t k2_factor, int k2_shift, uint32_t n2_factor, int n2_shift, int p_begin, int x_begin,
       int y_begin, int q_pitch, int p_pitch, int y_pitch, int q_plane, int p_plane, int x_plane, int y_row) {
  const int N2 = a_first ? NP : NQ, K2 = a_first ? KP : KQ, N = NQ * NP, K = KQ * KP;
  const Divisor by_k2{k2_factor, k2_shift}, by_n2{n2_factor, n2_shift};
  const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, t = lane % 4;
  const int strips = (NQ + 15) / 16, steps = (M + rows - 1) / rows;

  // One plane of an element, two bytes at a shared address; `step` bytes to its next plane.
  auto store_planes = [&](int to, float value, int planes, int step) {
    LOWBIT_UNROLL
    for (int plane = 0; plane < 3; ++plane) {
      if (plane >= planes) break;
      store_shared(to + plane * step, static_cast<uint16_t>(bits_of(value) >> 16));
      value = rest_of(value);
    }
  };

  // All terms of a factor; zeros where its padded rows and columns have nothing.
  auto load_factor = [&](const Stored& factor, int first, int plane, int pitch, int count, int padded_count,
                         int padded_columns, int planes, bool copy, bool as_it_is) {
    if (copy) {
      const int chunks = padded_columns / 8;
      for (int i = thread_index(); i < terms * padded_count * chunks; i += THREADS) {
        const int column = i % chunks * 8, row = i / chunks % padded_count, term = i / chunks / padded_count;
        const bool beyond = row >= count || column >= factor.columns;
        const int64_t element = (static_cast<int64_t>(term) * count + row) * factor.columns + column;
        copy_async(first + term * planes * plane + row * pitch + 2 * column,
                   static_cast<const uint16_t*>(factor.values) + (beyond ? 0 : element), beyond);
      }
      return;
    }
    for (int i = thread_index(); i < terms * padded_count * padded_columns; i += THREADS) {
      const int column = i % padded_columns, row = i / padded_columns % padded_count;
      const int term = i / padded_columns / padded_count, to = first + term * planes * plane + row * pitch + 2 * column;
      const bool beyond = row >= count || column >= factor.columns;
      const float value = beyond ? 0.0f : factor.at(static_cast<int64_t>(term) * count + row, column);
      if (as_it_is)
        store_shared(to, from_float<T>(value));
      else
        store_planes(to, value, planes, plane);
    }
  };

  // What no row of x fills: zeros, written once.
  auto pad_x = [&]() {
    const int columns = whole_chunks(KQ), count = whole_chunks(KP);
    for (int i = thread_index(); i < stages * rows * x_planes * count * columns; i += THREADS) {
      const int kq = i % columns, kp = i / columns % count, plane = i / columns / count;
      if (kq >= KQ || kp >= KP) store_shared(x_begin + plane * x_plane + kp * q_pitch + 2 * kq, uint16_t(0));
    }
  };

  auto fetch_x = [&](int step, int stage) {
    for (int row = 0; row < rows; ++row) {
      const int64_t m = static_cast<int64_t>(step) * rows + row;
      if (step >= steps || m >= M) break;
      const int first = x_begin + (stage * rows + row) * x_planes * x_plane;
      if (copy_x) {
        for (int i = thread_index(); i < K / 8; i += THREADS) {
          const int kp = by_k2.quotient(8 * i), kq = 8 * i - kp * KQ;
          copy_async(first + kp * q_pitch + 2 * kq, static_cast<const uint16_t*>(x) + m * K + 8 * i, false);
        }
        continue;
      }
      for (int i = thread_index(); i < K; i += THREADS) {
        const int k = input_permutation == nullptr ? i : load(input_permutation + i);
        if (k < 0 || k >= K) continue;  // no permutation: what it says is not looked at on the host
        const int k1 = by_k2.quotient(k), k2 = k - k1 * K2, kp = a_first ? k2 : k1, kq = a_first ? k1 : k2;
        const int to = first + kp * q_pitch + 2 * kq;
        if (x_planes == 1)
          store_shared(to, load(static_cast<const uint16_t*>(x) + m * K + i));
        else
          store_planes(to, float_at(x, DType(x_dtype), m * K + i), x_planes, x_plane);
      }
    }
    commit_copies();
  };

  // Columns kp .. kp + 31 of 16 rows of T. Column 2t + i of tile j stands for kp + 8t + 2j + i, as the second product
  // wants it.
  auto first_product = [&](float(&sums)[4][4], int term, int strip, int kp, int x_first) {
    const int q_first = term * q_planes * q_plane + (16 * strip + g) * q_pitch + 16 * t;
    const int x_row = 8 * (g / 2) + g % 2, most = q_planes + x_planes > 4 ? 3 : 2;
    for (int column = 0; column < KQ; column += 32) {
      for (int plane = q_planes - 1; plane >= 0; --plane) {
        const int q_at = q_first + plane * q_plane + 2 * column;
        const Words4 upper = load_shared4(q_at), lower = load_shared4(q_at + 8 * q_pitch);
        for (int other = x_planes - 1; other >= 0; --other) {
          if (plane + other > most) continue;
          LOWBIT_UNROLL
          for (int n = 0; n < 4; ++n) {
            const int row = kp + 2 * n + x_row;
            const Words4 xs = load_shared4(x_first + other * x_plane + row * q_pitch + 2 * column + 16 * t);
            multiply_matrices<T>(sums[n], upper.x, lower.x, upper.y, lower.y, xs.x, xs.y);
            multiply_matrices<T>(sums[n], upper.z, lower.z, upper.w, lower.w, xs.z, xs.w);
          }
        }
      }
    }
  };

  auto second_product = [&](float(&sums)[P_TILES][4], const float(&between)[4][4], int term, int kp, int np) {
    const int p_first = p_begin + term * p_planes * p_plane + (np + g) * p_pitch + 2 * kp + 16 * t;
    uint32_t pieces[3][2][4];
    LOWBIT_UNROLL
    for (int i = 0; i < 8; ++i) {  // pairs: of tile i / 2, the upper or the lower row
      float first = between[i / 2][2 * (i % 2)], second = between[i / 2][2 * (i % 2) + 1];
      LOWBIT_UNROLL
      for (int piece = 0; piece < 3; ++piece) {
        pieces[piece][i / 4][i % 4] = upper_halves(bits_of(first), bits_of(second));
        first = rest_of(first), second = rest_of(second);
      }
    }
    LOWBIT_UNROLL
    for (int n = 0; n < P_TILES; ++n) {
      if (np + 8 * n >= NP) break;
      LOWBIT_UNROLL
      for (int plane = 2; plane >= 0; --plane) {
        if (plane >= p_planes) continue;
        const Words4 ps = load_shared4(p_first + plane * p_plane + 8 * n * p_pitch);
        LOWBIT_UNROLL
        for (int piece = 2; piece >= 0; --piece) {
          if (piece + plane > (p_planes == 3 ? 3 : 2)) continue;
          LOWBIT_UNROLL
          for (int s = 0; s < 2; ++s) {
            const uint32_t(&a)[4] = pieces[piece][s];
            multiply_matrices<DType::bf16>(sums[n], a[0], a[1], a[2], a[3], word(ps, 2 * s), word(ps, 2 * s + 1));
          }
        }
      }
    }
  };

  // The sums of a strip, as [n1, n2].
  auto keep_sums = [&](float(&sums)[P_TILES][4], int strip, int np, int y_first) {
    LOWBIT_UNROLL
    for (int n = 0; n < P_TILES; ++n)
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * strip + g + 8 * (i / 2), column = np + 8 * n + 2 * t + i % 2;
        if (row >= NQ || column >= NP) continue;
        const int n1 = a_first ? row : column, n2 = a_first ? column : row;
        store_shared(y_first + n1 * y_pitch + 4 * n2, sums[n][i]);
      }
  };

  auto multiply_rows = [&](int step, int stage) {
    for (int task = warp; task < rows * strips; task += THREADS / 32) {
      const int row = task / strips, strip = task % strips;
      if (static_cast<int64_t>(step) * rows + row >= M) break;
      const int x_first = x_begin + (stage * rows + row) * x_planes * x_plane;
      for (int np = 0; np < NP; np += 8 * P_TILES) {
        float sums[P_TILES][4] = {};
        for (int term = 0; term < terms; ++term)
          for (int kp = 0; kp < KP; kp += 32) {
            float between[4][4] = {};
            first_product(between, term, strip, kp, x_first);
            second_product(sums, between, term, kp, np);
          }
        keep_sums(sums, strip, np, y_begin + row * y_row);
      }
    }
  };

  auto store_y = [&](int64_t to, float sum) {
    if (DType(x_dtype) == DType::f32)
      store(static_cast<float*>(y) + to, sum);
    else
      store(static_cast<uint16_t*>(y) + to, round_to(DType(x_dtype), sum));
  };

  // 16 bytes at a time: four sums, or eight.
  auto write_vectors = [&](int64_t m, int y_first) {
    const bool wide = DType(x_dtype) == DType::f32;
    const int lanes = wide ? 4 : 8;
    for (int n = lanes * thread_index(); n < N; n += lanes * THREADS) {
      const int n1 = by_n2.quotient(n), n2 = n - n1 * N2, at = y_first + n1 * y_pitch + 4 * n2;
      const Words4 first = load_shared4(at), second = load_shared4(wide ? at : at + 16);
      float sums[8];
      LOWBIT_UNROLL
      for (int i = 0; i < 8; ++i) {
        sums[i] = float_of(word(i < 4 ? first : second, i % 4));
        if (bias != nullptr && i < lanes) sums[i] += float_at(bias, DType(bias_dtype), n + i);
      }
      uint32_t words[4];
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        words[i] = bits_of(sums[i]);
        if (!wide)
          words[i] = round_to(DType(x_dtype), sums[2 * i]) |
                     uint32_t(round_to(DType(x_dtype), sums[2 * i + 1])) << 16;
      }
      const Words4 vector{words[0], words[1], words[2], words[3]};
      store(reinterpret_cast<Words4*>(static_cast<char*>(y) + (m * N + n) * (wide ? 4 : 2)), vector);
    }
  };

  auto write_result = [&](int step) {
    for (int row = 0; row < rows; ++row) {
      const int64_t m = static_cast<int64_t>(step) * rows + row;
      if (m >= M) break;
      const int y_first = y_begin + row * y_row;
      if (vectors) {
        write_vectors(m, y_first);
        continue;
      }
      for (int n = thread_index(); n < N; n += THREADS) {
        const int from = output_permutation == nullptr ? n : load(output_permutation + n);
        if (from < 0 || from >= N) continue;
        const int n1 = by_n2.quotient(from);
        float sum = load_shared(y_first + n1 * y_pitch + 4 * (from - n1 * N2));
        if (bias != nullptr) sum += float_at(bias, DType(bias_dtype), n);
        store_y(m * N + n, sum);
      }
    }
  };

  const Stored q{q_values, q_scales,     q_zeros,        q_dtype,       q_bits, q_words,
                 q_groups, q_group_size, q_scales_dtype, q_zeros_dtype, KQ};
  const Stored p{p_values, p_scales,     p_zeros,        p_dtype,       p_bits, p_words,
                 p_groups, p_group_size, p_scales_dtype, p_zeros_dtype, KP};
  load_factor(q, 0, q_plane, q_pitch, NQ, 16 * strips, whole_chunks(KQ), q_planes, copy_q, T == DType::f16);
  load_factor(p, p_begin, p_plane, p_pitch, NP, (NP + 7) / 8 * 8, whole_chunks(KP), p_planes, copy_p, false);
  pad_x();
  int stage = 0;
  if (stages > 1) fetch_x(block_index(), 0);
  for (int step = block_index(); step < steps; step += blocks) {
    fetch_x(stages > 1 ? step + blocks : step, stages > 1 ? 1 - stage : 0);
    if (stages > 1)
      wait_copies<1>();
    else
      wait_copies<0>();
    barrier();  // factors and x are there for all threads, and the results before have been written
    multiply_rows(step, stage);
    barrier();  // so are the sums
    write_result(step);
    if (stages > 1) stage = 1 - stage;
  }
  wait_copies<0>();
}

}  // namespace kron_fused
}  // namespace cuda
}  // namespace lowbit
