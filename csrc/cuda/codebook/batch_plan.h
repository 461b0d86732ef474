// How a call of codebook/batch.cuh is cut into blocks, and where its tables are.
#pragma once
#include "cuda/codebook/batch.h"

namespace lowbit {
namespace cuda {
namespace codebook_batch {

struct TablePlan : batch::Plan {
  int copies;
  bool gathers;

  int table_bytes(const codebook::Weight& w) const { return gathers ? 0 : codebook_batch::table_bytes(w, copies); }
};

// The ring with as many copies of the table as have room beside it. Tables of groups are read where they are, and so are
// those that have no room.
template <int BITS>
TablePlan table_plan_of(const Call& call, const Device& device) {
  const codebook::Weight& w = call.weight;
  TablePlan plan{};
  plan.gathers = w.tables == codebook::Weight::Tables::group && w.G > 1;
  for (int copies = 5; copies >= 0 && plan.stages == 0 && !plan.gathers; --copies) {
    const int more = table_bytes(w, copies);
    static_cast<batch::Plan&>(plan) = batch::plan_of<BITS, RESERVED>(call, device, more);
    plan.copies = copies;
    if (plan.stages == 0 && plan.m_tiles == 8 && copies == 0 &&
        batch::Shared<BITS, 4, RESERVED>::bytes(2, more) <= device.shared_bytes)
      plan.m_tiles = 4, plan.stages = 2;
  }
  plan.gathers = plan.stages == 0;
  if (plan.gathers) {
    static_cast<batch::Plan&>(plan) = batch::plan_of<BITS, RESERVED>(call, device);
    plan.m_tiles = 4, plan.cut = true;  // no other instance does so
  }
  return plan;
}

}  // namespace codebook_batch
}  // namespace cuda
}  // namespace lowbit
