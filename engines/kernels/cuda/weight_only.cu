// y = x (w scale)ᵀ + bias with 16-bit x and 4- or 8-bit weights, for few rows: the adaLN linears. Reads the
// weights as they are packed for the integer products. A warp takes 32 channels and all of a tile's tokens;
// each segment is summed by the matrix unit in float32 and promoted by its scale.
#include "numbers.cuh"

constexpr int kTiles = QDIT_TILE_TOKENS / 8;
constexpr bool kFourBits = QDIT_WEIGHT_BITS == 4;
constexpr bool kWeightZero = QDIT_WEIGHT_ZERO;
constexpr int kSegmentSteps = QDIT_SEGMENT / 32;  // steps of 32 k between promotions, 1, 2 or 4
constexpr int kWarps = 4;

// Four 4-bit values in the low nibbles of a word's bytes, less 8 · … as two pairs (0, 2) and (1, 3).
__device__ __forceinline__ uint32 subtract(uint32 a, uint32 b) {
    uint32 result;
#if QDIT_BF16
    asm("{.reg .b32 one;\nmov.b32 one, 0x3F803F80;\nfma.rn.bf16x2 %0, %1, one, %2;}" : "=r"(result) : "r"(a), "r"(b ^ 0x80008000u));
#else
    asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
#endif
    return result;
}

#if QDIT_BF16
constexpr uint32 kExponent = 0x43004300u;   // 128: its last bit is worth 1
constexpr uint32 kOffset4 = 0x43084308u;    // 136
#else
constexpr uint32 kExponent = 0x64006400u;   // 1024
constexpr uint32 kOffset4 = 0x64086408u;    // 1032
#endif

// Signed nibbles at bits 0-3 and 16-19 of `word` to two 16-bit floats.
__device__ __forceinline__ uint32 from_nibbles(uint32 word) {
    return subtract((word & 0x000F000Fu) ^ (kExponent | 0x00080008u), kOffset4);
}

// Signed bytes 0 and 2 of `word` (shifted for 1 and 3) to two 16-bit floats; bfloat16 holds 8 bits exactly only
// by way of float32.
__device__ __forceinline__ uint32 from_bytes(uint32 word) {
    return pack_halves(static_cast<float>(static_cast<signed char>(word)),
                       static_cast<float>(static_cast<signed char>(word >> 16)));
}

__device__ __forceinline__ void multiply(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    asm volatile(
#if QDIT_BF16
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The 16 × 32 weights of a warp's half and step, as four words: rows r and r + 8, k 4t … and 16 + 4t ….
__device__ __forceinline__ void load_words(
    uint32 (&words)[4][4], const uint8* w, int panel, int weight_rows, int channel0, int lane) {
    if constexpr (kFourBits) {
        const int slab = channel0 / 64, thread = channel0 % 64 / 16 * 32 + lane;
        const uint4* from = reinterpret_cast<const uint4*>(
            w + (static_cast<long long>(panel) * (weight_rows / 64) + slab) * 4096);
        const uint4 first = from[thread], second = from[128 + thread];
        const uint32 packed[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            words[step][0] = packed[2 * step], words[step][1] = packed[2 * step] >> 4;
            words[step][2] = packed[2 * step + 1], words[step][3] = packed[2 * step + 1] >> 4;
        }
    } else {
        const int row = channel0 + lane / 4;
        const uint8* low = w + (static_cast<long long>(panel) * weight_rows + row) * 128;
#pragma unroll
        for (int step = 0; step < 4; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                // rows 8 apart swizzle alike
                const int chunk = (2 * step + (i >> 1)) ^ (row & 7);
                words[step][i] = *reinterpret_cast<const uint32*>(low + (i & 1) * 8 * 128 + chunk * 16 + (lane & 3) * 4);
            }
    }
}

__device__ __forceinline__ uint32 widened(uint32 word) { return kFourBits ? from_nibbles(word) : from_bytes(word); }

extern "C" __global__ void __launch_bounds__(kWarps * 32) qdit_weight_only(
    const uint16* x, const uint8* w, const float* channel_scale, const float* channel_zero,
    const uint16* bias, int tokens, int channels, int width, int weight_rows, int channel_group,
    int row_stride, uint16* out) {
    launch_dependents();
    wait_for_last_kernel();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int channel0 = (blockIdx.x * kWarps + warp) * 32, token0 = blockIdx.y * kTiles * 8;
    if (channel0 >= channels) return;
    float acc[2][kTiles][4] = {};
    float d[2][kTiles][4] = {};
    float total[kTiles] = {};  // Σ x of the segment for token lane / 4, one lane's share
    const int panels = (width + 127) / 128;
    for (int panel = 0; panel < panels; ++panel) {
        uint32 words[2][4][4];
        load_words(words[0], w, panel, weight_rows, channel0, lane);
        load_words(words[1], w, panel, weight_rows, channel0 + 16, lane);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const int k = panel * 128 + step * 32 + (lane & 3) * 4;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32 a[2][4];
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    const uint32 low = words[part][step][2 * half], high = words[part][step][2 * half + 1];
                    a[part][0] = widened(low), a[part][1] = widened(high);
                    a[part][2] = widened(low >> 8), a[part][3] = widened(high >> 8);
                }
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    const int token = token0 + tile * 8 + lane / 4;
                    uint2 pair = {0, 0};
                    if (token < tokens && k + half * 16 < width)
                        pair = *reinterpret_cast<const uint2*>(x + static_cast<long long>(token) * row_stride + k + half * 16);
                    const uint32 b[2] = {__byte_perm(pair.x, pair.y, 0x5410), __byte_perm(pair.x, pair.y, 0x7632)};
                    if constexpr (kWeightZero)
                        total[tile] += low_half(pair.x) + high_half(pair.x) + low_half(pair.y) + high_half(pair.y);
                    multiply(d[0][tile], a[0], b);
                    multiply(d[1][tile], a[1], b);
                }
            }
            if ((step + 1) % kSegmentSteps == 0) {
                const long long segment = (panel * 4 + step) / kSegmentSteps / channel_group;
                const float* scales = channel_scale + segment * weight_rows + channel0 + lane / 4;
                const float* zeros = channel_zero + segment * weight_rows + channel0 + lane / 4;
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    float sums[2] = {0.0f, 0.0f};
                    if constexpr (kWeightZero) {
                        float sum = total[tile];
                        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
                        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
                        sums[0] = __shfl_sync(0xFFFFFFFFu, sum, (lane & 3) * 8);
                        sums[1] = __shfl_sync(0xFFFFFFFFu, sum, (lane & 3) * 8 + 4);
                        total[tile] = 0.0f;
                    }
#pragma unroll
                    for (int part = 0; part < 2; ++part)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int above = part * 16 + (i >> 1) * 8;
                            float value = d[part][tile][i];
                            if constexpr (kWeightZero) value = fmaf(-zeros[above], sums[i & 1], value);
                            acc[part][tile][i] = fmaf(value, scales[above], acc[part][tile][i]);
                            d[part][tile][i] = 0.0f;
                        }
                }
            }
        }
    }
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int channel = channel0 + part * 16 + (i >> 1) * 8 + lane / 4;
            const float offset = bias && channel < channels ? widen(bias[channel]) : 0.0f;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const int token = token0 + tile * 8 + (lane & 3) * 2 + (i & 1);
                if (token < tokens && channel < channels)
                    out[static_cast<long long>(token) * channels + channel] =
                        static_cast<uint16>(pack_halves(acc[part][tile][i] + offset, 0.0f));
            }
        }
}
