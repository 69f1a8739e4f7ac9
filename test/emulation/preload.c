// Preloaded before bochscpu: what its build takes from a newer C library than Debian 12's, and the
// CPU, which its Python module cannot choose: Sapphire Rapids for Cannon Lake.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

unsigned long long __isoc23_strtoull(const char* from, char** end, int base) {
    return strtoull(from, end, base);
}

int __isoc23_sscanf(const char* from, const char* format, ...) {
    va_list to;
    va_start(to, format);
    const int result = vsscanf(from, format, to);
    va_end(to);
    return result;
}

// create_corei3_cnl_cpuid(BX_CPU_C*)
void* _Z23create_corei3_cnl_cpuidP8BX_CPU_C(void* cpu) {
    void* bochs = dlopen(getenv("HMA_BOCHSCPU"), RTLD_NOLOAD | RTLD_LAZY);
    void* (*create)(void*) =
        (void* (*)(void*))dlsym(bochs, "_Z28create_sapphire_rapids_cpuidP8BX_CPU_C");
    return create(cpu);
}
