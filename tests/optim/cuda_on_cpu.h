// What kernels.cu needs of CUDA, on a CPU: one thread after another, which it allows since none waits for another.
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#define __device__
#define __global__
#define __grid_constant__

struct Index {
    unsigned x, y, z;
};
static Index blockIdx, threadIdx;

static void __trap() { throw 0; }

static float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

static unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// Every thread of every block in turn; `arguments` as cuLaunchKernel takes them.
template <typename... Arguments, std::size_t... I>
static void each(void (*kernel)(Arguments...), unsigned x, unsigned y, unsigned threads, void** arguments, std::index_sequence<I...>) {
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
                kernel(*(std::remove_reference_t<Arguments>*)arguments[I]...);
}

#define LAUNCHER(name)                                                                                     \
    extern "C" void launch_##name(unsigned x, unsigned y, unsigned threads, void** arguments) {            \
        each_of(name, x, y, threads, arguments);                                                           \
    }

template <typename... Arguments>
static void each_of(void (*kernel)(Arguments...), unsigned x, unsigned y, unsigned threads, void** arguments) {
    each(kernel, x, y, threads, arguments, std::index_sequence_for<Arguments...>{});
}
