// Launches of experts_sort.cuh.
#include "cuda/experts_sort.cuh"

namespace lowbit {
namespace cuda {
namespace experts {

int launch_sort(const void* ids, bool wide, int64_t S, int64_t repeats, int64_t E, const Tiling& tiling,
                const Sorted& sorted, Stream stream) {
  return launch(&sort_rows, static_cast<int>(E) + 2, THREADS, 8 * THREADS, stream, ids, wide, S, repeats, E,
                tiling.shift, tiling.by_place, sorted.tiles, sorted.order);
}

}  // namespace experts
}  // namespace cuda
}  // namespace lowbit
