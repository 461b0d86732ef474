// The exact optimum of one-dimensional k-means by dynamic programming; no torch here.
#pragma once
#include <cstdint>
#include <functional>

namespace lowbit {
namespace codebook {

// parallel(count, body) calls body(begin, end) for ranges that cover 0 .. count - 1, on as many threads as it likes
using Parallel = std::function<void(int64_t, const std::function<void(int64_t, int64_t)>&)>;

// The centroids, ascending, of least sum_i h[i] (x[i] - nearest centroid)^2. x[0 .. n - 1] ascends; elements that do
// not exist are last, as infinity. h null: all 1. At most `clusters` distinct values: these, the last one repeated;
// none: 0. Keeps at most `choices` numbers of the dynamic programme's path at a time; beyond, it does some work twice.
void kmeans_optimal(const float* x, const float* h, int64_t n, int64_t clusters, float* centroids, int64_t choices,
                    const Parallel& parallel);

}  // namespace codebook
}  // namespace lowbit
