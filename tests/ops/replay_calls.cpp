// Runs calls of ops that another machine has recorded, and compares the bytes that they write.
//
// The file holds, for each call, as 64-bit integers: the number of the op, the size of its arguments, and the number of
// buffers. The arguments follow. Then follow, for each buffer: the offset of its pointer in the arguments, its size, and
// whether the op writes it; then its bytes before the call and, if it is written, those after it.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/kernels.h"

extern "C" const char* moesaic_isa();
extern "C" int moesaic_set_isa(const char* name);
extern "C" int moesaic_run(const moesaic::Call* calls, int64_t count);

struct Buffer {
    uint8_t* memory;
    int64_t size;
    std::vector<uint8_t> expected;  // empty: the op only reads it
};

int main(int count, char** arguments) {
    if (count != 3 || !moesaic_set_isa(arguments[2])) return 2;
    std::FILE* file = std::fopen(arguments[1], "rb");
    int64_t head[3], failed = 0, calls = 0;
    const auto take = [&](void* to, size_t bytes) { return std::fread(to, 1, bytes, file) == bytes; };
    for (; take(head, sizeof head); ++calls) {
        std::vector<uint8_t> memory(head[1]);
        if (!take(memory.data(), memory.size())) return 2;
        std::vector<Buffer> buffers(head[2]);
        for (auto& buffer : buffers) {
            int64_t place[3];
            if (!take(place, sizeof place)) return 2;
            buffer.size = place[1];
            buffer.memory = static_cast<uint8_t*>(std::aligned_alloc(64, (place[1] + 127) / 64 * 64));
            buffer.expected.resize(place[2] ? place[1] : 0);
            if (!take(buffer.memory, place[1]) || !take(buffer.expected.data(), buffer.expected.size())) return 2;
            std::memcpy(memory.data() + place[0], &buffer.memory, sizeof buffer.memory);
        }
        const moesaic::Call call = {head[0], memory.data()};
        bool same = moesaic_run(&call, 1) == 0;
        for (auto& buffer : buffers) {
            same &= buffer.expected.empty() || !std::memcmp(buffer.memory, buffer.expected.data(), buffer.size);
            std::free(buffer.memory);
        }
        if (!same) std::printf("call %lld, op %lld: other bytes\n", (long long)calls, (long long)head[0]);
        failed += !same;
    }
    std::printf("%lld calls with %s\n", (long long)calls, moesaic_isa());
    return failed != 0;
}
