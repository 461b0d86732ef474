#include "cpu/codebook/kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace lowbit {
namespace codebook {
namespace {

constexpr int64_t kLong = 1 << 16;  // values in a layer worth more than one thread
constexpr int64_t kSegments = 32;   // of such a layer, computed side by side

// Sums over the first i distinct values, of h, h (x - center) and h (x - center)^2.
struct Sums {
  double mass, first, second;
};

class Clustering {
 public:
  Clustering(const std::vector<Sums>& sums, int64_t choices, const Parallel& parallel)
      : sums_(sums), choices_(choices), parallel_(parallel), cost_(sums.size()), next_(sums.size()) {}

  // ends[j], j = 0 .. clusters - 1: where cluster j of the best partition of the n values from `begin` on ends.
  void partition(int64_t begin, int64_t n, int64_t clusters, int64_t* ends) {
    begin_ = begin;
    ends[clusters - 1] = begin + n;
    if (clusters == 1) return;
    if ((clusters - 1) * (n + 1) > choices_ && clusters > 2) {
      // Keep only where the first half of the clusters ends, then do each half for itself: twice the work.
      const int64_t half = clusters / 2, middle = halve(n, clusters, half);
      partition(begin, middle, half, ends);
      partition(begin + middle, n - middle, clusters - half, ends + half);
      return;
    }
    std::vector<uint32_t> choices(size_t((clusters - 1) * (n + 1)));
    const auto row = [&](int64_t j) { return choices.data() + (j - 1) * (n + 1); };
    start(n);
    for (int64_t j = 1; j < clusters; ++j) layer(n, j, row(j));
    for (int64_t j = clusters - 1; j > 0; --j) ends[j - 1] = begin + row(j)[ends[j] - begin];
  }

 private:
  // sum h (x - mean)^2 of the values l .. i - 1; from here on, values are counted from begin_
  double error(int64_t l, int64_t i) const {
    const Sums &a = sums_[size_t(begin_ + l)], &b = sums_[size_t(begin_ + i)];
    const double mass = b.mass - a.mass, first = b.first - a.first;
    return mass > 0 ? std::max(b.second - a.second - first * first / mass, 0.0) : 0.0;
  }

  // F_1(i): the error of the first i values as one cluster
  void start(int64_t n) {
    for (int64_t i = 1; i <= n; ++i) cost_[size_t(i)] = error(0, i);
  }

  // F_j+1(i) = min over l of F_j(l) + error(l, i), for j < i <= n; choice[i] = the least such l.
  void layer(int64_t n, int64_t j, uint32_t* choice) {
    if (n - j < kLong) {
      solve(j + 1, n, j, n, choice);
    } else {
      const int64_t step = (n - j) / kSegments;
      const auto split = [&](int64_t s) { return s == kSegments ? n + 1 : j + s * step; };
      const auto bound = [&](int64_t s) {
        return s == 0 ? j : s == kSegments ? n : int64_t(choice[split(s)]);
      };
      for (int64_t half = kSegments / 2; half > 0; half /= 2)
        for (int64_t s = half; s < kSegments; s += 2 * half)
          scan(split(s), bound(s - half), bound(s + half), choice);
      parallel_(kSegments, [&](int64_t s0, int64_t s1) {
        for (int64_t s = s0; s < s1; ++s) solve(split(s) + 1, split(s + 1) - 1, bound(s), bound(s + 1), choice);
      });
    }
    cost_.swap(next_);
  }

  // All i in i0 .. i1, whose best l lie in low .. high: it never falls as i grows.
  void solve(int64_t i0, int64_t i1, int64_t low, int64_t high, uint32_t* choice) {
    while (i0 <= i1) {
      const int64_t i = i0 + (i1 - i0) / 2;
      const int64_t best = scan(i, low, high, choice);
      solve(i0, i - 1, low, best, choice);
      i0 = i + 1;
      low = best;
    }
  }

  int64_t scan(int64_t i, int64_t low, int64_t high, uint32_t* choice) {
    double least = std::numeric_limits<double>::infinity();
    int64_t best = low;
    for (int64_t l = low; l <= std::min(high, i - 1); ++l) {
      const double total = cost_[size_t(l)] + error(l, i);
      if (total < least) {
        least = total;
        best = l;
      }
    }
    next_[size_t(i)] = least;
    choice[i] = uint32_t(best);
    return best;
  }

  // How many values the first `half` of the best `clusters` clusters have, remembered along the layers.
  int64_t halve(int64_t n, int64_t clusters, int64_t half) {
    std::vector<uint32_t> choice(size_t(n + 1)), middle(size_t(n + 1)), previous(size_t(n + 1));
    start(n);
    for (int64_t j = 1; j < clusters; ++j) {
      layer(n, j, choice.data());
      if (j < half) continue;
      for (int64_t i = j + 1; i <= n; ++i) {
        const uint32_t l = choice[size_t(i)];
        middle[size_t(i)] = j == half ? l : previous[l];
      }
      middle.swap(previous);
    }
    return previous[size_t(n)];
  }

  const std::vector<Sums>& sums_;
  const int64_t choices_;
  const Parallel& parallel_;
  std::vector<double> cost_, next_;  // F_j and F_j+1
  int64_t begin_ = 0;
};

}  // namespace

void kmeans_optimal(const float* x, const float* h, int64_t n, int64_t clusters, float* centroids, int64_t choices,
                    const Parallel& parallel) {
  while (n > 0 && !std::isfinite(x[n - 1])) --n;
  std::fill(centroids, centroids + clusters, 0.0f);
  if (n == 0) return;

  // Equal values count as one.
  const double center = x[n / 2];
  std::vector<float> value;
  std::vector<Sums> sums{{0, 0, 0}};
  sums.reserve(size_t(n + 1));
  for (int64_t i = 0; i < n; ++i) {
    const double weight = h ? h[i] : 1.0, distance = x[i] - center;
    if (i == 0 || x[i] != x[i - 1]) {
      value.push_back(x[i]);
      sums.push_back(sums.back());
    }
    Sums& s = sums.back();
    s.mass += weight;
    s.first += weight * distance;
    s.second += weight * distance * distance;
  }

  const int64_t distinct = int64_t(value.size());
  if (distinct <= clusters) {
    for (int64_t j = 0; j < clusters; ++j) centroids[j] = value[size_t(std::min(j, distinct - 1))];
    return;
  }
  std::vector<int64_t> ends(size_t(clusters), 0);
  Clustering(sums, choices, parallel).partition(0, distinct, clusters, ends.data());
  int64_t begin = 0;
  for (int64_t j = 0; j < clusters; ++j) {
    const Sums &a = sums[size_t(begin)], &b = sums[size_t(ends[size_t(j)])];
    const double mean = (b.first - a.first) / (b.mass - a.mass) + center;
    const double low = value[size_t(begin)], high = value[size_t(ends[size_t(j)] - 1)];
    centroids[j] = float(mean > low ? std::min(mean, high) : low);
    begin = ends[size_t(j)];
  }
}

}  // namespace codebook
}  // namespace lowbit
