#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace hma {
namespace {

std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> tables;
#if defined(HMA_EMULATE)
    for (const Kernels& table : emulated::tables()) tables.push_back(&table);
#endif
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("f16c");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(HMA_WITH_AVX512_BF16)
    if (v4 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"))
        tables.push_back(&avx512_bf16::kernels());
#endif
    if (v4) tables.push_back(&avx512::kernels());
    if (v3) tables.push_back(&avx2::kernels());
#endif
    tables.push_back(&scalar::kernels());
    return tables;
}

const Kernels* find(const std::string& name) {
    std::string names;
    for (const Kernels* table : usable()) {
        if (name == table->name) return table;
        names += names.empty() ? "" : ", ";
        names += table->name;
    }
    throw std::invalid_argument("HMA_CPU_ISA is " + name + "; this machine runs " + names);
}

std::atomic<const Kernels*>& selected() {
    static std::atomic<const Kernels*> table = [] {
        const char* name = std::getenv("HMA_CPU_ISA");
        return name && *name ? find(name) : usable().front();
    }();
    return table;
}

}  // namespace

const Kernels& kernels() { return *selected(); }

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Kernels* table : usable()) names.emplace_back(table->name);
    return names;
}

void select(const std::string& name) { selected() = find(name); }

}  // namespace hma
