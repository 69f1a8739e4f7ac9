// Compiled once an instruction set, with HMA_ISA the namespace of its table.
#include "codec.h"
#include "decode.h"
#include "extend.h"
#include "hash.h"

namespace hma::HMA_ISA {

#define HMA_TEXT(name) #name
#define HMA_NAME(name) HMA_TEXT(name)

const Kernels& kernels() {
    constexpr int regs = HMA_VECTOR_BYTES == 64 ? 4 : 2;
    using Single = Extend<float, regs>;
    using Double = Extend<double, regs>;
    static const Kernels table = {
        HMA_NAME(HMA_ISA),
        pack,
        unpack,
        write_rows,
        round,
        hash,
        Scratch::bytes,
        decode,
        {Single::LANES, Double::LANES},
        {Single::scratch, Double::scratch},
        {extend<float, regs>, extend<double, regs>},
    };
    return table;
}

}  // namespace hma::HMA_ISA
