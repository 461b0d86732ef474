// Rows of a Kronecker product, as numbers. It equals the PyTorch lines
//
//   kron = sum(torch.kron(a[r], b[r]) for r in range(R))
//   out = kron[output_permutation[ids]][:, input_permutation].to(dtype)
//
// Each product, and each sum of terms, is rounded to float32, the result once more to its dtype. Without ids it is all
// of W. A row whose id is not in [0, N) is NaN: a kernel cannot raise, and checking ids would wait for the GPU.
//
// A row of W is the outer product of a row of `a` and one of `b`. A block reads the two for some rows of `out` into
// shared memory, as float32, and then writes these rows, 16 bytes at a time.
#pragma once
#include "cuda/division.h"
#include "cuda/kron/gather.h"
#include "cuda/kron/stored.h"

namespace lowbit {
namespace cuda {
namespace kron_gather {

// Args:
//   T: of `out`.
//   a_*, b_*: the factors' parts of `Stored`; groups is 0 where one scale serves all rows.
//   rows: of `out` that a block writes.
//   vectors: the rows of `out` begin at multiples of 16 bytes.
//   unpermuted: vectors do not go beyond a row of `b`, and there is no permutation of columns.
//   k2_*, vector_*: the Divisors by K2, and by the vectors of a row.
template <DType T>
LOWBIT_KERNEL(THREADS, 4)
kernel(const void* a_values, const void* a_scales, const void* a_zeros, const void* b_values, const void* b_scales,
       const void* b_zeros, const void* ids, const int32_t* input_permutation, const int32_t* output_permutation,
       void* out, int count, int terms, int N1, int K1, int N2, int K2, int a_dtype, int a_bits, int a_words,
       int a_groups, int a_group_size, int a_scales_dtype, int a_zeros_dtype, int b_dtype, int b_bits, int b_words,
       int b_groups, int b_group_size, int b_scales_dtype, int b_zeros_dtype, int wide_ids, int rows, int vectors,
       int unpermuted, uint32_t k2_factor, int k2_shift, uint32_t vector_factor, int vector_shift) {
  constexpr int LANES = T == DType::f32 ? 4 : 8;
  const int K = K1 * K2, N = N1 * N2, first_row = block_index() * rows;
  const int row_count = count - first_row < rows ? count - first_row : rows;
  const int b_begin = (K1 + 3) / 4 * 4, term_size = b_begin + (K2 + 3) / 4 * 4;  // floats; both begin at 16 bytes
  const Divisor by_k2{k2_factor, k2_shift}, by_vectors{vector_factor, vector_shift};
  const Stored a{a_values, a_scales,     a_zeros,        a_dtype,       a_bits, a_words,
                 a_groups, a_group_size, a_scales_dtype, a_zeros_dtype, K1};
  const Stored b{b_values, b_scales,     b_zeros,        b_dtype,       b_bits, b_words,
                 b_groups, b_group_size, b_scales_dtype, b_zeros_dtype, K2};

  // The row of the product that is row i of `out`; -1: there is none.
  auto row_at = [&](int i) {
    int64_t n = i;
    if (ids != nullptr)
      n = wide_ids ? load(static_cast<const int64_t*>(ids) + i) : load(static_cast<const int32_t*>(ids) + i);
    if (n < 0 || n >= N) return -1;
    if (output_permutation != nullptr) n = load(output_permutation + n);
    return n >= 0 && n < N ? static_cast<int>(n) : -1;
  };

  auto load_factors = [&]() {
    for (int i = thread_index(); i < row_count * terms * term_size; i += THREADS) {
      const int column = i % term_size, term = i / term_size % terms, n = row_at(first_row + i / term_size / terms);
      float value = n < 0 ? not_a_number() : 0.0f;
      if (n >= 0 && column < K1) value = a.at(static_cast<int64_t>(term) * N1 + n / N2, column);
      if (n >= 0 && column >= b_begin && column - b_begin < K2)
        value = b.at(static_cast<int64_t>(term) * N2 + n % N2, column - b_begin);
      store_shared(4 * i, value);
    }
  };

  // LANES neighbours, of one row of `a` and `b`, whose products are with one number of `a`.
  auto make_vector = [&](float(&w)[LANES], int slot, int column) {
    const int k1 = by_k2.quotient(column), k2 = column - k1 * K2;
    for (int term = 0; term < terms; ++term) {
      const int first = (slot * terms + term) * term_size;
      const float left = load_shared(4 * (first + k1));
      LOWBIT_UNROLL
      for (int j = 0; j < LANES; j += 4) {
        const Words4 right = load_shared4(4 * (first + b_begin + k2 + j));
        LOWBIT_UNROLL
        for (int i = 0; i < 4; ++i) w[j + i] += multiply(left, float_of(word(right, i)));
      }
    }
  };

  auto element = [&](int slot, int column) {
    const int k = input_permutation == nullptr ? column : load(input_permutation + column);
    if (k < 0 || k >= K) return not_a_number();  // no permutation: what it says is not looked at on the host
    const int k1 = by_k2.quotient(k), k2 = k - k1 * K2;
    float sum = 0.0f;
    for (int term = 0; term < terms; ++term) {
      const int first = (slot * terms + term) * term_size;
      sum += multiply(load_shared(4 * (first + k1)), load_shared(4 * (first + b_begin + k2)));
    }
    return sum;
  };

  auto store_vector = [&](int64_t at, const float(&w)[LANES]) {
    uint32_t words[4];
    LOWBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (T == DType::f32)
        words[i] = bits_of(w[i]);
      else
        words[i] = from_float<T>(w[2 * i]) | uint32_t(from_float<T>(w[2 * i + 1])) << 16;
    }
    constexpr int SIZE = 16 / LANES;
    const Words4 vector{words[0], words[1], words[2], words[3]};
    store(reinterpret_cast<Words4*>(static_cast<char*>(out) + at * SIZE), vector);
  };

  auto write_vectors = [&]() {
    const int in_row = K / LANES;
    for (int i = thread_index(); i < row_count * in_row; i += THREADS) {
      const int slot = by_vectors.quotient(i), column = (i - slot * in_row) * LANES;
      float w[LANES] = {};
      if (unpermuted) {
        make_vector(w, slot, column);
      } else {
        LOWBIT_UNROLL
        for (int j = 0; j < LANES; ++j) w[j] = element(slot, column + j);
      }
      store_vector(static_cast<int64_t>(first_row + slot) * K + column, w);
    }
  };

  auto write_elements = [&]() {
    for (int slot = 0; slot < row_count; ++slot)
      for (int column = thread_index(); column < K; column += THREADS) {
        const int64_t at = static_cast<int64_t>(first_row + slot) * K + column;
        if constexpr (T == DType::f32)
          store(static_cast<float*>(out) + at, element(slot, column));
        else
          store(static_cast<uint16_t*>(out) + at, from_float<T>(element(slot, column)));
      }
  };

  load_factors();
  barrier();
  if (vectors)
    write_vectors();
  else
    write_elements();
}

}  // namespace kron_gather
}  // namespace cuda
}  // namespace lowbit
