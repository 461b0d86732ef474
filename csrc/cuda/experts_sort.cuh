// The rows of a stack of experts in the order and the tiles in which kernels take them. It equals the PyTorch lines
//
//   group = torch.where(ids < 0, E + 1, ids.clamp(max=E))
//   order = group.sort(stable=True).indices
//
// No atomics: the order is the same in every run.
#pragma once
#include "cuda/experts.h"

namespace lowbit {
namespace cuda {
namespace experts {

// A block for each group. Each thread counts rows that are neighbours: those of smaller groups, and of its own. Then it
// knows the places of its own ones. The tiles of a group that begins at place p are numbered from (p >> shift) + group
// on: groups do not meet there, and none has to know how many tiles another has.
//
// Args:
//   repeats: row i of y is a product with row i / repeats of x.
//   tiles: of each its expert, its first place, its rows, and What they get.
//   order: of each place the row of x and the row of y.
LOWBIT_KERNEL(THREADS, 1)
sort_rows(const void* ids, int wide, int rows, int repeats, int experts, int shift, int by_place, Words4* tiles,
          Words2* order) {
  const int group = block_index();
  auto group_of = [&](int i) {
    const int64_t id = wide ? load(static_cast<const int64_t*>(ids) + i)
                            : static_cast<int64_t>(load(static_cast<const int32_t*>(ids) + i));
    return id < 0 ? experts + 1 : id < experts ? static_cast<int>(id) : experts;
  };
  const int share = (rows + THREADS - 1) / THREADS, first = thread_index() * share;
  const int end = first + share < rows ? first + share : rows;
  int smaller = 0, same = 0;
  for (int i = first; i < end; ++i) {
    const int other = group_of(i);
    smaller += other < group, same += other == group;
  }
  store_shared(8 * thread_index(), Words2{static_cast<uint32_t>(smaller), static_cast<uint32_t>(same)});
  barrier();
  int begin = 0, count = 0, before = 0;
  for (int thread = 0; thread * share < rows; ++thread) {
    const Words2 its = load_shared2(8 * thread);
    begin += its.x, count += its.y;
    if (thread < thread_index()) before += its.y;
  }

  int place = begin + before;
  for (int i = first; i < end; ++i)
    if (group_of(i) == group)
      store(order + place++, Words2{static_cast<uint32_t>(i / repeats), static_cast<uint32_t>(i)});

  const int first_tile = by_place ? begin : (begin >> shift) + group;
  const int end_tile = by_place ? begin + count : ((begin + count) >> shift) + group + 1;
  for (int number = first_tile + thread_index(); number < end_tile; number += THREADS) {
    const int row = by_place ? number - begin : (number - first_tile) << shift;  // of the group
    const bool begins = row < count && row % (1 << shift) == 0;
    const int left = count - row, tile_rows = left < 1 << shift ? left : 1 << shift;
    const int what = !begins ? NOTHING : group < experts ? PRODUCTS : group == experts ? ZEROS : NANS;
    store(tiles + number, Words4{static_cast<uint32_t>(group), static_cast<uint32_t>(begin + row),
                                 static_cast<uint32_t>(tile_rows), static_cast<uint32_t>(what)});
  }
}

}  // namespace experts
}  // namespace cuda
}  // namespace lowbit
