#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace lowbit {
namespace {

struct Entry {
  Isa isa;
  const char* name;
  bool (*runs)();
};

#if defined(__x86_64__)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool runs_avx512vnni() {
  return runs_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
#endif

const Entry kIsas[] = {
#if defined(__x86_64__)
    {Isa::avx512bf16, "avx512bf16", [] { return runs_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }},
    {Isa::avx512vnni, "avx512vnni", runs_avx512vnni},
    {Isa::avx512, "avx512", runs_avx512},
    // Every CPU with AVX2 and FMA also has F16C.
    {Isa::avx2, "avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {Isa::scalar, "scalar", [] { return true; }},
};

// LOWBIT_ISAS: ",avx2,scalar,"
bool usable(const Entry& e) {
  return std::strstr(LOWBIT_ISAS, ("," + std::string(e.name) + ",").c_str()) && e.runs();
}

std::string names() {
  std::string list;
  for (const Entry& e : kIsas)
    if (usable(e)) list += (list.empty() ? "" : ",") + std::string(e.name);
  return list;
}

const Entry& find(const std::string& name, const char* source) {
  for (const Entry& e : kIsas)
    if (name == e.name && usable(e)) return e;
  throw std::runtime_error(std::string(source) + " must be one of the instruction sets this machine runs (" +
                           names() + "): got '" + name + "'");
}

const Entry& automatic() {
  const char* forced = std::getenv("LOWBIT_ISA");
  if (forced && *forced) return find(forced, "LOWBIT_ISA");
  for (const Entry& e : kIsas)
    if (usable(e)) return e;
  throw std::runtime_error(std::string("this machine runs none of the instruction sets that were compiled: ") +
                           LOWBIT_ISAS);
}

std::atomic<const Entry*> chosen{nullptr};

}  // namespace

std::string runnable_isas() { return names(); }

const char* isa_name(Isa isa) {
  for (const Entry& e : kIsas)
    if (e.isa == isa) return e.name;
  return "?";
}

Isa current_isa() {
  const Entry* e = chosen.load(std::memory_order_relaxed);
  if (!e) {
    e = &automatic();
    chosen.store(e, std::memory_order_relaxed);
  }
  return e->isa;
}

void set_isa(const std::string& name) {
  chosen.store(name.empty() ? &automatic() : &find(name, "isa"), std::memory_order_relaxed);
}

}  // namespace lowbit
