// How the ops of a stack of experts call their kernels: the rows of a call by expert, and one parallel region for the
// products of all of them.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/run.h"

namespace lowbit {

// The rows of a call that one expert takes, as many of them as share prepared memory.
template <class Weight>
struct ExpertCall {
  Linear<Weight> linear;
  const int32_t* rows;   // of y, in rising order; row i of y is of row i / repeats of x
  bool copies;           // x comes from rows that are not neighbours, or y goes to such: both are copied
  int64_t prepared;      // where its activations begin, in bytes
  int64_t first_row;     // of it in the calls that are run together
  int64_t first_cost, tile_cost, tiles;
};

// y[i] = x[i / repeats] @ w[ids[i]].T + bias[ids[i]], [S, N], where repeats = S / T for ids [S] and x [T, K].
// `a` says all but x and y: its weight is the whole stack, [E * N, K], its bias [E * N]. Rows whose id is E or more are
// zero: another process has their expert.
template <class Weight>
Tensor run_experts(const char* op, const Linear<Weight>& a, Tensor x, Tensor ids, int64_t E,
                   const CpuKernel<Weight>& kernel) {
  LOWBIT_CHECK(E >= 1 && a.weight.N % E == 0, op, ": num_experts must divide the rows of the weight, ", a.weight.N,
               ": got num_experts=", E);
  LOWBIT_CHECK(x.dim() == 2, op, ": x must be of shape [T, K]: got ", shape_of(x));
  check_ids(op, ids);
  const int64_t N = a.weight.N / E, K = a.weight.K, T = x.size(0), S = ids.numel();
  LOWBIT_CHECK(ids.dim() == 1 && (T == 0 ? S == 0 : S % T == 0), op, ": ids must be of shape [S], S a multiple of T=", T,
               ": got ", shape_of(ids));
  check_stack(op, a.weight, N);
  Tensor y = empty_cpu({S, N}, x.scalar_type());
  if (S == 0) return y;
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  if (!ids.is_contiguous()) ids = torch::stable::contiguous(ids);
  const int64_t repeats = S / T;
  const DType dtype = float_dtype(x.scalar_type());
  const int64_t x_bytes = K * element_size(dtype), y_bytes = N * element_size(dtype);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());

  // the rows of each expert, in order
  const void* data = ids.const_data_ptr();
  const bool narrow = ids.scalar_type() == ScalarType::Int;
  const auto id = [&](int64_t i) -> int64_t {
    return narrow ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  };
  std::vector<int64_t> begin(size_t(E) + 2, 0);
  for (int64_t i = 0; i < S; ++i) {
    LOWBIT_CHECK(id(i) >= 0, op, ": ids must not be negative: got ", id(i));
    ++begin[size_t(std::min(id(i), E)) + 1];
  }
  for (int64_t e = 0; e <= E; ++e) begin[size_t(e) + 1] += begin[size_t(e)];
  std::vector<int32_t> rows(size_t(S), 0);
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < S; ++i) rows[size_t(next[size_t(std::min(id(i), E))]++)] = int32_t(i);
  for (int64_t i = begin[size_t(E)]; i < S; ++i) std::memset(to + rows[size_t(i)] * y_bytes, 0, size_t(y_bytes));

  std::vector<ExpertCall<Weight>> calls;
  std::vector<char> copied_x, copied_y;
  int64_t prepared_bytes = 0, row_count = 0, cost = 0, copied = 0;
  const auto run = [&] {
    copied_x.resize(size_t(copied * x_bytes));
    copied_y.resize(size_t(copied * y_bytes));
    int64_t place = 0;
    for (ExpertCall<Weight>& call : calls) {
      call.linear.x = call.copies ? copied_x.data() + place * x_bytes : from + call.rows[0] / repeats * x_bytes;
      call.linear.y = call.copies ? copied_y.data() + place * y_bytes : to + call.rows[0] * y_bytes;
      if (call.copies) place += call.linear.M;
    }
    Scratch scratch(Slot::prepared, size_t(prepared_bytes));
    char* prepared = static_cast<char*>(scratch.data());
    torch::stable::parallel_for(0, row_count, grain(kTaskElements, K), [&](int64_t r0, int64_t r1) {
      for (const ExpertCall<Weight>& call : calls) {
        const int64_t m0 = std::max<int64_t>(r0 - call.first_row, 0), m1 = std::min(r1 - call.first_row, call.linear.M);
        if (m0 >= m1) continue;
        char* copy = const_cast<char*>(static_cast<const char*>(call.linear.x));
        for (int64_t m = m0; call.copies && m < m1; ++m)
          std::memcpy(copy + m * x_bytes, from + call.rows[m] / repeats * x_bytes, size_t(x_bytes));
        kernel.prepare(call.linear, prepared + call.prepared, m0, m1);
      }
    });
    // Each thread takes an equal part of the cost: the tiles that begin in it.
    const int64_t tile = kernel.row_tile;
    torch::stable::parallel_for(0, cost, grain(kTaskProducts, tile * K), [&](int64_t c0, int64_t c1) {
      for (const ExpertCall<Weight>& call : calls) {
        const auto tile_from = [&](int64_t c) {
          const int64_t before = std::max<int64_t>(c - call.first_cost, 0);
          return std::min((before + call.tile_cost - 1) / call.tile_cost, call.tiles);
        };
        const int64_t t0 = tile_from(c0), t1 = tile_from(c1);
        if (t0 < t1) kernel.linear(call.linear, prepared + call.prepared, t0 * tile, std::min(t1 * tile, N));
      }
    });
    if (copied)
      torch::stable::parallel_for(0, row_count, grain(kTaskElements, N), [&](int64_t r0, int64_t r1) {
        for (const ExpertCall<Weight>& call : calls) {
          const int64_t m1 = std::min(r1 - call.first_row, call.linear.M);
          for (int64_t m = std::max<int64_t>(r0 - call.first_row, 0); call.copies && m < m1; ++m)
            std::memcpy(to + call.rows[m] * y_bytes, static_cast<const char*>(call.linear.y) + m * y_bytes,
                        size_t(y_bytes));
        }
      });
    calls.clear();
    prepared_bytes = row_count = cost = copied = 0;
  };

  for (int64_t e = 0; e < E; ++e) {
    ExpertCall<Weight> call{};
    call.linear = a;
    call.linear.weight = rows_of(a.weight, e * N, N);
    call.linear.dtype = dtype;
    call.linear.batch_invariant = batch_invariant.load(std::memory_order_relaxed);
    if (a.bias) call.linear.bias = static_cast<const char*>(a.bias) + e * N * element_size(a.bias_dtype);
    for (int64_t r = begin[size_t(e)], most; r < begin[size_t(e) + 1]; r += most) {
      call.rows = rows.data() + r;
      call.linear.M = most = std::min(begin[size_t(e) + 1] - r, kPassRows);
      const int64_t bytes = (kernel.prepared_bytes(call.linear) + 63) / 64 * 64;
      if (!calls.empty() && size_t(prepared_bytes + bytes) > kScratchKept) run();
      // of a single row, or of neighbours, x and y are where they are
      call.copies = call.rows[most - 1] - call.rows[0] != most - 1 || (most > 1 && repeats > 1);
      call.prepared = prepared_bytes;
      call.first_row = row_count;
      call.first_cost = cost;
      call.tile_cost = most + kExpansion;
      call.tiles = (N - 1) / kernel.row_tile + 1;
      prepared_bytes += bytes;
      row_count += most;
      cost += call.tiles * call.tile_cost;
      if (call.copies) copied += most;
      calls.push_back(call);
    }
  }
  if (!calls.empty()) run();
  return y;
}

}  // namespace lowbit
