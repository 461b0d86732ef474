// int8 activations: the kernels before and after a product.
#pragma once
#include "cuda/int8.cuh"

namespace lowbit {
namespace cuda {
namespace int8 {

// q[m] = (x[m] * inverse[m]).round().clamp(-127, 127), halves to even, with inverse = 127 * (1 / x[m].abs().max()), or
// 1 / x_scale: lowbit.backends.reference.quantize_activations, bit for bit. A block for each row.
template <DType T>
LOWBIT_KERNEL(THREADS, 1)
quantize_rows(const Element<T>* x, const float* x_scale, int8_t* q, float* inverses, int K, int columns) {
  constexpr uint32_t INFINITE = 0x7F800000u;
  constexpr int ALL = 4 * THREADS;  // bytes of what the threads found; then come those of the first 16 of them
  const int m = block_index(), thread = thread_index();
  const Element<T>* const row = x + static_cast<int64_t>(m) * K;

  // Bits of magnitudes compare as these do, and NaN > infinity > every number.
  uint32_t largest = 0;
  for (int k = thread; k < K; k += THREADS) {
    const uint32_t magnitude = bits_of(value_of<T>(load(row + k))) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  auto largest_of = [&](int at) {
    uint32_t found = 0;
    for (int i = 0; i < 16; ++i) {
      const uint32_t other = load_shared_word(at + 4 * i);
      found = other > found ? other : found;
    }
    return found;
  };
  store_shared(4 * thread, float_of(largest));
  barrier();
  if (thread < THREADS / 16) store_shared(ALL + 4 * thread, float_of(largest_of(64 * thread)));
  barrier();
  largest = largest_of(ALL);

  const bool spoiled = largest > INFINITE || (largest == INFINITE && x_scale == nullptr);
  const bool zero = spoiled || (x_scale == nullptr && largest < 0x0D800000u);  // below 2^-100
  float inverse = 1.0f;
  if (!zero) inverse = x_scale != nullptr ? 1.0f / load(x_scale) : multiply(1.0f / float_of(largest), 127.0f);
  if (thread == 0) store(inverses + m, spoiled ? not_a_number() : inverse);

  uint32_t* const to = reinterpret_cast<uint32_t*>(q + static_cast<int64_t>(m) * columns);
  for (int k = 4 * thread; k < columns; k += 4 * THREADS) {
    uint32_t four = 0;
    LOWBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (zero || k + i >= K) continue;
      float scaled = multiply(value_of<T>(load(row + k + i)), inverse);
      scaled = scaled < 127.0f ? scaled : 127.0f;
      scaled = scaled > -127.0f ? scaled : -127.0f;
      const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits, halves to even
      four |= (bits_of(scaled + round) & 0xFFu) << 8 * i;
    }
    store(to + k / 4, four);
  }
}

// y = finish(parts.sum(0)), in the order of the splits: [splits, M, N], as bits.
template <int EXACT>
LOWBIT_KERNEL(THREADS, 1)
add_splits(const uint32_t* parts, const float* outlier_parts, const float* inverse, const void* scales,
           const void* bias, void* y, int64_t count, int N, int splits, int scale_row, int scale_dtype, int bias_dtype,
           int dtype) {
  const int64_t i = static_cast<int64_t>(block_index()) * THREADS + thread_index();
  if (i >= count) return;
  uint32_t sum = load(parts + i);
  float outliers = outlier_parts != nullptr ? load(outlier_parts + i) : 0.0f;
  for (int split = 1; split < splits; ++split) {
    sum = sum_of(sum, load(parts + split * count + i), EXACT);
    if (outlier_parts != nullptr) outliers += load(outlier_parts + split * count + i);
  }
  finish(sum, outliers, inverse, scales, bias, y, static_cast<int>(i / N), static_cast<int>(i % N), N, EXACT, scale_row,
         scale_dtype, bias_dtype, dtype);
}

}  // namespace int8
}  // namespace cuda
}  // namespace lowbit
