// Instruction sets: which are compiled, which this machine runs, which one is in use.
#pragma once
#include <string>

namespace lowbit {

enum class Isa { scalar, avx2, avx512, avx512vnni, avx512bf16 };

std::string runnable_isas();  // comma list of the compiled ones that this machine can run, best first
const char* isa_name(Isa isa);

// The ISA in use: the last set_isa(), else LOWBIT_ISA, else the best this machine runs.
// Throws when LOWBIT_ISA names one that is unknown or cannot run here.
Isa current_isa();

// "" returns to the automatic choice; throws when `name` is unknown or cannot run here.
void set_isa(const std::string& name);

}  // namespace lowbit
