// Built by streaming.py.
#include <cstddef>
#include <cstdint>

typedef uint64_t Line __attribute__((vector_size(64)));

// Sums `lines` 64-byte loads, taken in turn from `streams` neighbouring parts of them.
extern "C" uint64_t streaming_read(const Line* from, size_t lines, size_t streams) {
    Line sums[4] = {};
    const size_t part = lines / streams / 4 * 4;
    for (size_t i = 0; i < part; i += 4)
        for (size_t s = 0; s < streams; s++)
            for (size_t j = 0; j < 4; j++) sums[j] += from[s * part + i + j];
    uint64_t sum = 0;
    for (const Line& each : sums)
        for (int i = 0; i < 8; i++) sum += each[i];
    return sum;
}
