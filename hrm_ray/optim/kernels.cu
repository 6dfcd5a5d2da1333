// AdamATan2 over many tensors in one launch, and sign-SGD over the rows of an embedding that occur in a batch.
//
// NVRTC compiles this at first use (nvrtc.py); it brings no headers, so everything is spelt out here. MAX_TENSORS comes
// from its command line. Nothing is added up by several threads: the results are the same every time.

struct bfloat16 {
    unsigned short bits;
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ void assign(float& to, float x) { to = x; }
__device__ void assign(bfloat16& to, float x) {
    unsigned bits = __float_as_uint(x);
    if (x == x) {
        to.bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
    } else {
        to.bits = 0x7fc0;
    }
}

constexpr int THREADS = 256;
constexpr int CHUNK = 4096;  // numbers that a block updates

// Numbers that are read and written at once, in 16-byte accesses.
template <typename T, int WIDTH>
struct alignas(16) Pack {
    T at[WIDTH];
};

// A parameter, its gradient, its moments and the number of this step; all on the device.
struct Tensor {
    void* p;
    const void* g;
    float* m;
    float* v;
    const float* step;
    long long size;
    long long first_block;
};

struct Tensors {
    Tensor at[MAX_TENSORS];
    int count;
};

// What every tensor of a group has in common. Pointers are to single numbers on the device; the last two may be null.
struct Group {
    const float* lr;
    const float* weight_decay;
    const float* grad_scale;  // gradients are so many times too large
    const float* found_inf;   // not 0: nothing is to be done
    float alpha1, beta2, alpha2;  // alpha is 1 - beta, of which float would lose digits
    float log_beta1, log_beta2;
    int inside;  // where the first moment's bias correction stands
};

static_assert(sizeof(Tensor) == 56 && sizeof(Group) == 56, "fused_cuda.py lays them out so");

template <typename T>
__device__ void update(const Tensors& tensors, const Group& group) {
    if (group.found_inf && *group.found_inf != 0) return;
    int i = 0;
    for (int last = tensors.count - 1; i < last;) {  // the last tensor that begins at this block or before it
        int middle = (i + last + 1) / 2;
        if (tensors.at[middle].first_block <= blockIdx.x) {
            i = middle;
        } else {
            last = middle - 1;
        }
    }
    const Tensor& t = tensors.at[i];
    T* p = (T*)t.p;
    const T* g = (const T*)t.g;
    float* m = t.m;
    float* v = t.v;

    // 1 - beta^step without cancellation
    const float c1 = -expm1f(*t.step * group.log_beta1), c2 = -expm1f(*t.step * group.log_beta2);
    const float lr = *group.lr;
    const float m_scale = group.inside ? 1 / c1 : 1, v_scale = 1 / sqrtf(c2);
    const float step_size = group.inside ? lr : lr / c1;
    const float kept = 1 - lr * *group.weight_decay;
    const float g_scale = group.grad_scale ? 1 / *group.grad_scale : 1;
    const float alpha1 = group.alpha1, beta2 = group.beta2, alpha2 = group.alpha2;

    auto move = [&](T& p_i, T g_raw, float& m_i, float& v_i) {
        const float g_i = to_float(g_raw) * g_scale;
        m_i += alpha1 * (g_i - m_i);
        v_i = beta2 * v_i + alpha2 * g_i * g_i;
        assign(p_i, to_float(p_i) * kept - step_size * atan2f(m_i * m_scale, sqrtf(v_i) * v_scale));
    };

    const long long start = (blockIdx.x - t.first_block) * CHUNK;
    const long long end = start + CHUNK < t.size ? start + CHUNK : t.size;
    const bool aligned = ((size_t)p | (size_t)g | (size_t)m | (size_t)v) % 16 == 0;
    // One access of parameters a thread, so that those of neighbours are neighbours.
    constexpr int WIDTH = 16 / sizeof(T);
    static_assert(CHUNK % (THREADS * WIDTH) == 0, "threads begin at multiples of 16 bytes");
#pragma unroll 2
    for (long long at = start + threadIdx.x * WIDTH; at < end; at += THREADS * WIDTH) {
        if (aligned && at + WIDTH <= end) {
            Pack<T, WIDTH> p_s = *(Pack<T, WIDTH>*)(p + at);
            const Pack<T, WIDTH> g_s = *(const Pack<T, WIDTH>*)(g + at);
            Pack<float, WIDTH> m_s = *(Pack<float, WIDTH>*)(m + at), v_s = *(Pack<float, WIDTH>*)(v + at);
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) move(p_s.at[k], g_s.at[k], m_s.at[k], v_s.at[k]);
            *(Pack<T, WIDTH>*)(p + at) = p_s;
            *(Pack<float, WIDTH>*)(m + at) = m_s;
            *(Pack<float, WIDTH>*)(v + at) = v_s;
        } else {
            for (long long k = at; k < at + WIDTH && k < end; ++k) move(p[k], g[k], m[k], v[k]);
        }
    }
}

extern "C" __global__ void adam_atan2_float32(const __grid_constant__ Tensors tensors, const __grid_constant__ Group group) {
    update<float>(tensors, group);
}

extern "C" __global__ void adam_atan2_bfloat16(const __grid_constant__ Tensors tensors, const __grid_constant__ Group group) {
    update<bfloat16>(tensors, group);
}

// A block for each looked-up row (x) and THREADS of its columns (y). Equal rows stand together in `rows`; the block of the
// first of them adds up their gradients, in the order of the batch, and moves the row.
extern "C" __global__ void sign_sgd(
    float* table, const long long* rows, const long long* places, const float* gradients, const float* lr,
    const float* weight_decay, int num_looked_up, long long num_rows, int size
) {
    const int first = blockIdx.x, column = blockIdx.y * THREADS + threadIdx.x;
    const long long row = rows[first];
    if (row < 0 || row >= num_rows) __trap();
    if (column >= size || (first > 0 && rows[first - 1] == row)) return;
    float sum = 0;
#pragma unroll 8
    for (int i = first; i < num_looked_up && rows[i] == row; ++i) sum += gradients[places[i] * size + column];
    float& weight = table[row * size + column];
    weight = weight * (1 - *lr * *weight_decay) - *lr * ((sum > 0) - (sum < 0));
}
