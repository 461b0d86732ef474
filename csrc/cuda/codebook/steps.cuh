// int8 activations and a weight of the family `codebook`: the kernels before and after a product.
#pragma once
#include "cuda/codebook/int8.cuh"

namespace lowbit {
namespace cuda {
namespace codebook_int8 {

constexpr int THREADS = 256, STEP_THREADS = 8;  // of a block; that find one step

// steps[n] of codebook/int8.cuh.
//
// Args:
//   entries: of the tables of a row. table_row: from a row's tables to the next row's; 0: the same.
//   groups: scales of a row. scale_codebook .. scale_offset: of nested scales (common/codebook.h), or null.
LOWBIT_KERNEL(THREADS, 1)
find_steps(const void* codebook, const void* scales, const float* scale_codebook, const float* scale_absmax,
           const float* scale_offset, float* steps, int N, int entries, int groups, int table_row, int codebook_dtype,
           int scale_dtype) {
  constexpr int SCALES = 4 * THREADS;  // bytes of what the threads found in tables; then come those of scales
  const int thread = thread_index(), n = block_index() * (THREADS / STEP_THREADS) + thread / STEP_THREADS;
  const int64_t row = n < N ? n : N - 1;
  const Scales scale_values = {scales, scale_dtype, scale_codebook, scale_absmax, scale_offset};

  // Bits of magnitudes compare as these do, and NaN > infinity > every number.
  const auto larger = [](uint32_t largest, float value) {
    const uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
    return magnitude > largest ? magnitude : largest;
  };
  uint32_t entry = 0, scale = 0;
  for (int i = thread % STEP_THREADS; i < entries; i += STEP_THREADS)
    entry = larger(entry, float_at(codebook, DType(codebook_dtype), row * table_row + i));
  if (scales != nullptr)
    for (int i = thread % STEP_THREADS; i < groups; i += STEP_THREADS)
      scale = larger(scale, scale_values.at(row * groups + i));
  store_shared(4 * thread, float_of(entry));
  store_shared(SCALES + 4 * thread, float_of(scale));
  barrier();
  if (thread % STEP_THREADS != 0 || n >= N) return;
  for (int i = 1; i < STEP_THREADS; ++i) {
    entry = larger(entry, load_shared(4 * (thread + i)));
    scale = larger(scale, load_shared(SCALES + 4 * (thread + i)));
  }
  const float peak = scales != nullptr ? multiply(float_of(scale), float_of(entry)) : float_of(entry);
  const float step = peak / LARGEST;
  store(steps + n, step < float_of(0x00800000u) ? 1.0f : step);  // 2^-126
}

// y of the parts int32 [splits, 2, M, N], low and high.
LOWBIT_KERNEL(THREADS, 1)
add_splits(const int32_t* parts, const float* inverse, const float* steps, const void* bias, const void* outlier_values,
           const void* outlier_columns, const int32_t* outlier_rows, const void* x, void* y, int M, int N, int K,
           int splits, int bias_dtype, int outlier_dtype, int wide_columns, int dtype) {
  const int64_t i = static_cast<int64_t>(block_index()) * THREADS + thread_index(), count = static_cast<int64_t>(M) * N;
  if (i >= count) return;
  int64_t low = 0, high = 0;
  for (int split = 0; split < splits; ++split) {
    low += load(parts + 2 * split * count + i);
    high += load(parts + (2 * split + 1) * count + i);
  }
  const Finish finish = {inverse, steps, bias, outlier_values, outlier_columns, outlier_rows, x, y, N, K,
                         bias_dtype, outlier_dtype, wide_columns, dtype};
  finish(low, high, static_cast<int>(i / N), static_cast<int>(i % N));
}

}  // namespace codebook_int8
}  // namespace cuda
}  // namespace lowbit
