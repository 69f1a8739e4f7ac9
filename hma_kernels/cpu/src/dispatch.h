// Which instruction set's kernels run.
#pragma once

#include <string>
#include <vector>

#include "types.h"

namespace hma {

// The best one this machine has, or what HMA_CPU_ISA or select() named.
const Kernels& kernels();

// Names this machine can run, best first.
std::vector<std::string> available();

// Throws std::invalid_argument for a name that available() lacks.
void select(const std::string& name);

// Those that this machine lacks, in an emulated CPU: test/emulation/tables.cpp, in its build only.
namespace emulated { const std::vector<Kernels>& tables(); }

}  // namespace hma
