// Tables of kernels that run in an emulated CPU. The functions are the ordinary build's; each call
// hands the address and the registers to what bochs.py has set.
#include "dispatch.h"

namespace hma::emulated {
namespace {

// registers: the first arguments by the System V ABI; stack: those behind the return address.
using Run = int64_t (*)(const void* function, const int64_t* registers, const void* stack,
                        int64_t stack_bytes);
Run run;

struct Call {
    int64_t registers[6] = {};
    int used = 0;
    Partial stack = {};
    int64_t stack_bytes = 0;

    void pass(int64_t value) { registers[used++] = value; }
    void pass(void* pointer) { pass(int64_t(pointer)); }
    template <class T>
    void pass(const T& reference) { pass(int64_t(&reference)); }
    void pass(const Partial& large) {  // by value, above 16 bytes
        stack = large;
        stack_bytes = sizeof large;
    }
};

template <auto TABLE, auto MEMBER>
struct Emulated;

template <auto TABLE, class Result, class... Args, Result (*Kernels::*MEMBER)(Args...)>
struct Emulated<TABLE, MEMBER> {
    static Result call(Args... args) {
        Call call;
        (call.pass(args), ...);
        return Result(run(reinterpret_cast<const void*>(TABLE().*MEMBER), call.registers,
                          &call.stack, call.stack_bytes));
    }
};

template <auto TABLE, auto MEMBER, int I>
struct EmulatedEach;

template <auto TABLE, int I, int N, class Result, class... Args,
          Result (*(Kernels::*MEMBER)[N])(Args...)>
struct EmulatedEach<TABLE, MEMBER, I> {
    static Result call(Args... args) {
        Call call;
        (call.pass(args), ...);
        return Result(run(reinterpret_cast<const void*>((TABLE().*MEMBER)[I]), call.registers,
                          &call.stack, call.stack_bytes));
    }
};

template <auto TABLE>
Kernels emulated() {
    Kernels table = TABLE();
    table.pack = Emulated<TABLE, &Kernels::pack>::call;
    table.unpack = Emulated<TABLE, &Kernels::unpack>::call;
    table.write_rows = Emulated<TABLE, &Kernels::write_rows>::call;
    table.round = Emulated<TABLE, &Kernels::round>::call;
    table.hash = Emulated<TABLE, &Kernels::hash>::call;
    table.decode_scratch = Emulated<TABLE, &Kernels::decode_scratch>::call;
    table.decode = Emulated<TABLE, &Kernels::decode>::call;
    table.extend_scratch[0] = EmulatedEach<TABLE, &Kernels::extend_scratch, 0>::call;
    table.extend_scratch[1] = EmulatedEach<TABLE, &Kernels::extend_scratch, 1>::call;
    table.extend[0] = EmulatedEach<TABLE, &Kernels::extend, 0>::call;
    table.extend[1] = EmulatedEach<TABLE, &Kernels::extend, 1>::call;
    return table;
}

}  // namespace

const std::vector<Kernels>& tables() {
    static const std::vector<Kernels> all = {
#if defined(HMA_WITH_AVX512_BF16)
        emulated<avx512_bf16::kernels>(),
#endif
        emulated<avx512::kernels>(),
    };
    return all;
}

}  // namespace hma::emulated

extern "C" __attribute__((visibility("default"))) void hma_set_emulator(hma::emulated::Run to) {
    hma::emulated::run = to;
}
