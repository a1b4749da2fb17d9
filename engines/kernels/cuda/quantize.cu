// Dynamic activation quantization, one scale a token and group of k, into the panels that the products read:
// int8 [K/128, rows, 128], 16-byte chunks swizzled by the row, and scales [K/group, rows].
// With QDIT_NORM the rows are first layer-normalized and modulated by adaLN's shift and scale, with QDIT_GELU
// they go through GELU; both in float32. One warp takes one row.
#include "numbers.cuh"

constexpr int kWidth = QDIT_WIDTH;   // K
constexpr int kGroup = QDIT_GROUP;
constexpr int kPanels = (kWidth + 127) / 128;
constexpr float kSteps = QDIT_STEPS;  // 127 at 8 bits; asymmetric 255
constexpr bool kAsymmetric = QDIT_ASYMMETRIC;
constexpr int kSumGroup = QDIT_SUM_GROUP;  // sums of stored integers by this many k; 0: none
constexpr float kSmallestScale = 5.9604644775390625e-08f;
constexpr bool kNorm = QDIT_NORM;
constexpr bool kGelu = QDIT_GELU;
// Groups that lie in the lanes' four neighbouring values of whole panels need no shared memory.
constexpr bool kInRegisters = kWidth % 128 == 0 && !kAsymmetric && kSumGroup == 0 &&
                              (kGroup == 32 || kGroup == 64 || kGroup % 128 == 0);
constexpr int kRowBytes = kInRegisters ? 0 : kPanels * 128 * 5;

#if QDIT_INPUT_FLOAT32
using Input = float4;
__device__ __forceinline__ void widen4(float (&v)[4], const float4& x) { v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w; }
#else
using Input = uint2;
__device__ __forceinline__ void widen4(float (&v)[4], const uint2& x) {
    v[0] = low_half(x.x), v[1] = high_half(x.x), v[2] = low_half(x.y), v[3] = high_half(x.y);
}
#endif

struct Modulation {
    const uint16* shift;  // [images, stride]
    const uint16* scale;
    int stride;
    int image_tokens;
    float epsilon;
};

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
    return value;
}

template <int Lanes>
__device__ __forceinline__ float most_of(float value) {
#pragma unroll
    for (int lanes = Lanes / 2; lanes > 0; lanes /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, lanes));
    return value;
}

// (x − mean) / sqrt(variance + ε) · (1 + scale) + shift of the warp's row, K = 4 · 32 · kPanels at most.
__device__ __forceinline__ void normalize(
    float (&v)[kPanels][4], const Modulation& modulation, int row, int lane) {
    float sum = 0.0f;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += v[panel][i];  // padding is zero
    const float mean = sum_of_warp(sum) / kWidth;
    float squares = 0.0f;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
        if (panel * 128 + lane * 4 >= kWidth) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) squares = fmaf(v[panel][i] - mean, v[panel][i] - mean, squares);
    }
    const float inverse = rsqrtf(sum_of_warp(squares) / kWidth + modulation.epsilon);
    const long long offset = static_cast<long long>(row / modulation.image_tokens) * modulation.stride;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
        const int k = panel * 128 + lane * 4;
        if (k >= kWidth) continue;
        const uint2 scale = *reinterpret_cast<const uint2*>(modulation.scale + offset + k);
        const uint2 shift = *reinterpret_cast<const uint2*>(modulation.shift + offset + k);
        const float scales[4] = {low_half(scale.x), high_half(scale.x), low_half(scale.y), high_half(scale.y)};
        const float shifts[4] = {low_half(shift.x), high_half(shift.x), low_half(shift.y), high_half(shift.y)};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            v[panel][i] = fmaf((v[panel][i] - mean) * inverse, 1.0f + scales[i], shifts[i]);
    }
}

__device__ __forceinline__ uint32 quantized4(const float (&v)[4], float scale) {
    const float reciprocal = __frcp_rn(scale);
    uint32 packed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float q = fminf(fmaxf(divide_and_round(v[i], scale, reciprocal), -kSteps - 1.0f), kSteps);
        packed |= (static_cast<uint32>(static_cast<int>(q)) & 0xFFu) << (8 * i);
    }
    return packed;
}

__device__ __forceinline__ uint8* place_of(uint8* values, int rows, int panel, int row, int lane) {
    return values + (static_cast<long long>(panel) * rows + row) * 128 + (((lane >> 2) ^ (row & 7)) << 4) + (lane & 3) * 4;
}

__device__ __forceinline__ float largest(const float (&v)[4]) {
    return fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
}

__device__ __forceinline__ void quantize_in_registers(
    const float (&v)[kPanels][4], uint8* values, float* scales, int rows, int row, int lane) {
    if constexpr (kGroup <= 128) {
        constexpr int kLanes = kGroup / 4, kGroups = 128 / kGroup;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            const float scale = fmaxf(__fdiv_rn(most_of<kLanes>(largest(v[panel])), kSteps), kSmallestScale);
            *reinterpret_cast<uint32*>(place_of(values, rows, panel, row, lane)) = quantized4(v[panel], scale);
            if (lane % kLanes == 0)
                scales[static_cast<long long>(panel * kGroups + lane / kLanes) * rows + row] = scale;
        }
    } else {
        constexpr int kSpan = kGroup / 128;
#pragma unroll
        for (int group = 0; group < kPanels / kSpan; ++group) {
            float most = 0.0f;
#pragma unroll
            for (int i = 0; i < kSpan; ++i) most = fmaxf(most, largest(v[group * kSpan + i]));
            const float scale = fmaxf(__fdiv_rn(most_of<32>(most), kSteps), kSmallestScale);
#pragma unroll
            for (int i = 0; i < kSpan; ++i) {
                const int panel = group * kSpan + i;
                *reinterpret_cast<uint32*>(place_of(values, rows, panel, row, lane)) = quantized4(v[panel], scale);
            }
            if (lane == 0) scales[static_cast<long long>(group) * rows + row] = scale;
        }
    }
}

// Any group that divides K, zero points and sums: by way of the row in shared memory.
__device__ __forceinline__ void quantize_in_shared(
    const float (&v)[kPanels][4], uint8* shared, uint8* values, float* scales, float* zeros,
    float* sums, int rows, int row, int lane) {
    float* wide = reinterpret_cast<float*>(shared);
    signed char* narrow = reinterpret_cast<signed char*>(shared + kPanels * 128 * 4);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
        *reinterpret_cast<float4*>(wide + panel * 128 + lane * 4) = {v[panel][0], v[panel][1], v[panel][2], v[panel][3]};
    for (int k = kWidth + lane; k < kPanels * 128; k += 32) narrow[k] = 0;
    __syncwarp();
    constexpr int kGroups = kWidth / kGroup;
    for (int group = 0; group < kGroups; ++group) {
        float low = 0.0f, high = 0.0f;
        for (int k = lane; k < kGroup; k += 32) {
            low = fminf(low, wide[group * kGroup + k]);
            high = fmaxf(high, wide[group * kGroup + k]);
        }
        high = most_of<32>(high), low = -most_of<32>(-low);
        const float range = kAsymmetric ? high - low : fmaxf(-low, high);
        const float scale = fmaxf(__fdiv_rn(range, kSteps), kSmallestScale);
        const float reciprocal = __frcp_rn(scale);
        float zero = 0.0f;
        if constexpr (kAsymmetric)
            zero = fminf(fmaxf(-divide_and_round(low, scale, reciprocal), 0.0f), kSteps);
        constexpr float kLowest = kAsymmetric ? 0.0f : -kSteps - 1.0f;
        // stored signed: asymmetric integers and zero points are less by half their range
        constexpr float kShift = kAsymmetric ? (kSteps + 1.0f) / 2.0f : 0.0f;
        for (int k = lane; k < kGroup; k += 32) {
            const float q = divide_and_round(wide[group * kGroup + k], scale, reciprocal) + zero;
            narrow[group * kGroup + k] = static_cast<signed char>(fminf(fmaxf(q, kLowest), kSteps) - kShift);
        }
        if (lane == 0) {
            scales[static_cast<long long>(group) * rows + row] = scale;
            if constexpr (kAsymmetric) zeros[static_cast<long long>(group) * rows + row] = zero - kShift;
        }
    }
    __syncwarp();
    if constexpr (kSumGroup > 0) {
        for (int part = 0; part < kPanels * 128 / kSumGroup; ++part) {
            int sum = 0;
            for (int k = lane; k < kSumGroup; k += 32) sum += narrow[part * kSumGroup + k];
            const float total = sum_of_warp(static_cast<float>(sum));
            if (lane == 0) sums[static_cast<long long>(part) * rows + row] = total;
        }
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
        *reinterpret_cast<uint32*>(place_of(values, rows, panel, row, lane)) =
            *reinterpret_cast<const uint32*>(narrow + panel * 128 + lane * 4);
}

extern "C" __global__ void __launch_bounds__(256) qdit_quantize(
    const Input* x, const uint16* shift, const uint16* scale, int tokens, int rows, int row_stride,
    int modulation_stride, int image_tokens, float epsilon, uint8* values, float* scales, float* zeros,
    float* sums) {
    extern __shared__ __align__(16) uint8 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = blockIdx.x * 8 + warp;
    if (row >= tokens) return;
    float v[kPanels][4];
    const Input* from = x + static_cast<long long>(row) * row_stride;  // strides count four values
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
        if (panel * 128 + lane * 4 < kWidth) {
            widen4(v[panel], from[panel * 32 + lane]);
        } else {
            v[panel][0] = v[panel][1] = v[panel][2] = v[panel][3] = 0.0f;
        }
    }
    if constexpr (kNorm) normalize(v, {shift, scale, modulation_stride, image_tokens, epsilon}, row, lane);
    if constexpr (kGelu) {
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll
            for (int i = 0; i < 4; ++i) v[panel][i] = gelu_tanh(v[panel][i]);
    }
    if constexpr (kInRegisters) {
        quantize_in_registers(v, values, scales, rows, row, lane);
    } else {
        quantize_in_shared(v, shared + warp * kRowBytes, values, scales, zeros, sums, rows, row, lane);
    }
}
