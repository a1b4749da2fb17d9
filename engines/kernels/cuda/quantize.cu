// Dynamic activation quantization, one scale a token and group of k, into the panels that the products read:
// int8 [K/128, rows, 128], 16-byte chunks swizzled by the row, and scales [K/group, rows], sixteen rows each in the
// order of place_of_scale.
// With QDIT_NORM the rows are first layer-normalized and modulated by adaLN's shift and scale, with QDIT_GELU
// they go through GELU; both in float32.
#include "numbers.cuh"

constexpr int kWidth = QDIT_WIDTH;   // K
constexpr int kGroup = QDIT_GROUP;
constexpr int kPanels = (kWidth + 127) / 128;
constexpr int kSpan = QDIT_SPAN;     // panels of a row that one warp takes
constexpr int kTeam = QDIT_TEAM;     // warps of one block that take one row's spans and share its scale
constexpr float kSteps = QDIT_STEPS;  // 127 at 8 bits; asymmetric 255
constexpr bool kAsymmetric = QDIT_ASYMMETRIC;
constexpr int kSumGroup = QDIT_SUM_GROUP;  // sums of stored integers by this many k; 0: none
constexpr float kSmallestScale = 0x1p-24f;  // quantizers.MIN_SCALE
constexpr bool kNorm = QDIT_NORM;
constexpr int kGelu = QDIT_GELU;     // 1: the tanh form, 2: the exact one
constexpr int kWarps = 8;
// Groups that lie in the lanes' four neighbouring values of whole panels need no shared memory.
constexpr bool kInRegisters = kWidth % 128 == 0 && !kAsymmetric && kSumGroup == 0 &&
                              (kGroup == 32 || kGroup == 64 || kGroup % 128 == 0);
// One scale a token: 16-bit values wait for it as they were read, in half the registers of wide ones.
constexpr bool kNarrow = !QDIT_INPUT_FLOAT32 && kInRegisters && !kNorm && kGelu == 0 && kGroup == kWidth && kGroup > 128;
constexpr int kRowBytes = kInRegisters ? 0 : kPanels * 128 * 5;
// A row that a warp holds waits for memory and for its own sums: blocks of which more share a multiprocessor hide that.
constexpr int kBlocks = kInRegisters && kSpan <= 4 ? (kGelu > 0 ? 6 : 8)
                        : kNarrow                  ? (kSpan <= 9 ? 6 : 4)
                                                   : (kNorm || kGelu > 0) && kSpan <= 9 ? 4 : 1;
static_assert(kPanels % (kSpan * kTeam) == 0 && kWarps % kTeam == 0);
static_assert(!(kNorm || !kInRegisters) || kSpan == kPanels);

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

// The largest of magnitudes: without a sign, bits compare as their floats do.
template <int Lanes>
__device__ __forceinline__ float most_of(float value) {
    if constexpr (Lanes == 32) return __uint_as_float(most_of_warp(__float_as_uint(value)));
#pragma unroll
    for (int lanes = Lanes / 2; lanes > 0; lanes /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, lanes));
    return value;
}

// Whether a lane's four values of a panel lie beyond the row: never where whole panels make it, and the compiler is to know.
__device__ __forceinline__ bool beyond(int panel, int lane) {
    return kWidth % 128 > 0 && panel * 128 + lane * 4 >= kWidth;
}

// (x − mean) / sqrt(variance + ε) · (1 + scale) + shift of the warp's row, all of which it holds.
__device__ __forceinline__ void normalize(
    float (&v)[kSpan][4], const Modulation& modulation, int row, int lane) {
    const long long offset = static_cast<long long>(row / modulation.image_tokens) * modulation.stride + lane * 4;
    float sum = 0.0f;
#pragma unroll
    for (int panel = 0; panel < kSpan; ++panel) {
        if (beyond(panel, lane)) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += v[panel][i];
    }
    const float mean = sum_of_warp(sum) / kWidth;
    float squares = 0.0f;
#pragma unroll
    for (int panel = 0; panel < kSpan; ++panel) {
        if (beyond(panel, lane)) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) v[panel][i] -= mean, squares = fmaf(v[panel][i], v[panel][i], squares);
    }
    const float inverse = rsqrtf(sum_of_warp(squares) / kWidth + modulation.epsilon);
#pragma unroll
    for (int panel = 0; panel < kSpan; ++panel) {
        if (beyond(panel, lane)) continue;
        // asked for late: rows of one image share them, so that they are near, and registers are what limits warps
        const uint2 scale = *reinterpret_cast<const uint2*>(modulation.scale + offset + panel * 128);
        const uint2 shift = *reinterpret_cast<const uint2*>(modulation.shift + offset + panel * 128);
        const float scales[4] = {low_half(scale.x), high_half(scale.x), low_half(scale.y), high_half(scale.y)};
        const float shifts[4] = {low_half(shift.x), high_half(shift.x), low_half(shift.y), high_half(shift.y)};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            v[panel][i] = fmaf(v[panel][i] * inverse, 1.0f + scales[i], shifts[i]);
    }
}

__device__ __forceinline__ uint8* place_of(uint8* values, int rows, int panel, int row, int lane) {
    return values + (static_cast<long long>(panel) * rows + row) * 128 + (((lane >> 2) ^ (row & 7)) << 4) + (lane & 3) * 4;
}

__device__ __forceinline__ float largest(const float (&v)[4]) {
    return fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
}

// Of a range of numbers; one that is so small that its quotient is off gets the smallest scale.
__device__ __forceinline__ float scale_of(float range) {
    return fmaxf(divided(range, kSteps, 1.0f / kSteps), kSmallestScale);
}

// The largest of what all warps of a row's team have found.
__device__ __forceinline__ float most_of_team(float most, int warp, int lane) {
    most = most_of<32>(most);
    if constexpr (kTeam > 1) {
        __shared__ float maxima[kWarps];
        if (lane == 0) maxima[warp] = most;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kTeam; ++i) most = fmaxf(most, maxima[warp / kTeam * kTeam + i]);
    }
    return most;
}

#if !QDIT_INPUT_FLOAT32
// The panels first … first + kSpan - 1 of a row with one scale.
__device__ __forceinline__ void quantize_narrow(
    const uint2 (&x)[kSpan], uint8* values, float* scales, int rows, int row, int first, int warp, int lane) {
    uint32 most = 0;
#pragma unroll
    for (int panel = 0; panel < kSpan; ++panel) most = most_halves(most_halves(most, x[panel].x), x[panel].y);
    const float scale = scale_of(most_of_team(fmaxf(low_half(most), high_half(most)), warp, lane));
    const float reciprocal = reciprocal_of(scale);
#pragma unroll
    for (int panel = 0; panel < kSpan; ++panel) {
        float v[4];
        widen4(v, x[panel]);
        *reinterpret_cast<uint32*>(place_of(values, rows, first + panel, row, lane)) = quantized4(v, scale, reciprocal);
    }
    if (lane == 0 && first == 0) scales[place_of_scale(row)] = scale;
}
#endif

// The panels first … first + kSpan - 1 of a row.
__device__ __forceinline__ void quantize_in_registers(
    const float (&v)[kSpan][4], uint8* values, float* scales, int rows, int row, int first, int warp, int lane) {
    const auto store = [&](int panel, float scale, float reciprocal) {
        *reinterpret_cast<uint32*>(place_of(values, rows, first + panel, row, lane)) = quantized4(v[panel], scale, reciprocal);
    };
    if constexpr (kGroup <= 128) {
        constexpr int kLanes = kGroup / 4, kGroups = 128 / kGroup;
        float own = 0.0f;  // with one group a panel, lane i stores the scale of panel i
#pragma unroll
        for (int panel = 0; panel < kSpan; ++panel) {
            const float scale = scale_of(most_of<kLanes>(largest(v[panel])));
            store(panel, scale, reciprocal_of(scale));
            if constexpr (kGroups == 1) {
                if (lane == panel) own = scale;
            } else if (lane % kLanes == 0) {
                scales[static_cast<long long>((first + panel) * kGroups + lane / kLanes) * rows + place_of_scale(row)] = scale;
            }
        }
        if (kGroups == 1 && lane < kSpan)
            scales[static_cast<long long>(first + lane) * rows + place_of_scale(row)] = own;
    } else if constexpr (kTeam == 1) {
        constexpr int kGroupPanels = kGroup / 128;
#pragma unroll
        for (int panel = 0; panel < kSpan; panel += kGroupPanels) {
            float most = 0.0f;
#pragma unroll
            for (int i = 0; i < kGroupPanels; ++i) most = fmaxf(most, largest(v[panel + i]));
            const float scale = scale_of(most_of<32>(most)), reciprocal = reciprocal_of(scale);
#pragma unroll
            for (int i = 0; i < kGroupPanels; ++i) store(panel + i, scale, reciprocal);
            if (lane == 0) scales[static_cast<long long>((first + panel) / kGroupPanels) * rows + place_of_scale(row)] = scale;
        }
    } else {
        float most = 0.0f;
#pragma unroll
        for (int panel = 0; panel < kSpan; ++panel) most = fmaxf(most, largest(v[panel]));
        const float scale = scale_of(most_of_team(most, warp, lane)), reciprocal = reciprocal_of(scale);
#pragma unroll
        for (int panel = 0; panel < kSpan; ++panel) store(panel, scale, reciprocal);
        if (lane == 0 && first == 0) scales[place_of_scale(row)] = scale;
    }
}

// Any group that divides K, zero points and sums: by way of the row in shared memory.
__device__ __forceinline__ void quantize_in_shared(
    const float (&v)[kSpan][4], uint8* shared, uint8* values, float* scales, float* zeros,
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
        high = most_of<32>(high), low = -most_of<32>(fabsf(low));
        const float range = kAsymmetric ? high - low : fmaxf(-low, high);
        const float scale = scale_of(range);
        const float reciprocal = reciprocal_of(scale);
        float zero = 0.0f;
        if constexpr (kAsymmetric)
            zero = fminf(fmaxf(-rintf(divided(low, scale, reciprocal)), 0.0f), kSteps);
        constexpr float kLowest = kAsymmetric ? 0.0f : -kSteps - 1.0f;
        // stored signed: asymmetric integers and zero points are less by half their range
        constexpr float kShift = kAsymmetric ? (kSteps + 1.0f) / 2.0f : 0.0f;
        for (int k = lane; k < kGroup; k += 32) {
            const float q = rintf(divided(wide[group * kGroup + k], scale, reciprocal)) + zero;
            narrow[group * kGroup + k] = static_cast<signed char>(fminf(fmaxf(q, kLowest), kSteps) - kShift);
        }
        if (lane == 0) {
            scales[static_cast<long long>(group) * rows + place_of_scale(row)] = scale;
            if constexpr (kAsymmetric) zeros[static_cast<long long>(group) * rows + place_of_scale(row)] = zero - kShift;
        }
    }
    // Groups of padding are multiplied by zeros, and must be numbers for that, whoever owns the memory.
    constexpr int kAllGroups = (kPanels * 128 + kGroup - 1) / kGroup;
    for (int group = kGroups + lane; group < kAllGroups; group += 32) {
        scales[static_cast<long long>(group) * rows + place_of_scale(row)] = 0.0f;
        if constexpr (kAsymmetric) zeros[static_cast<long long>(group) * rows + place_of_scale(row)] = 0.0f;
    }
    __syncwarp();
    if constexpr (kSumGroup > 0) {
        for (int part = 0; part < kPanels * 128 / kSumGroup; ++part) {
            int sum = 0;
            for (int k = lane; k < kSumGroup; k += 32) sum += narrow[part * kSumGroup + k];
            const float total = sum_of_warp(static_cast<float>(sum));
            if (lane == 0) sums[static_cast<long long>(part) * rows + place_of_scale(row)] = total;
        }
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
        *reinterpret_cast<uint32*>(place_of(values, rows, panel, row, lane)) =
            *reinterpret_cast<const uint32*>(narrow + panel * 128 + lane * 4);
}

extern "C" __global__ void __launch_bounds__(kWarps * 32, kBlocks) qdit_quantize(
    const Input* x, const uint16* shift, const uint16* scale, int tokens, int rows, int row_stride,
    int modulation_stride, int image_tokens, float epsilon, uint8* values, float* scales, float* zeros,
    float* sums) {
    extern __shared__ __align__(16) uint8 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = blockIdx.x * (kWarps / kTeam) + warp / kTeam;
    const int first = (blockIdx.y * kTeam + warp % kTeam) * kSpan;
    launch_dependents();
    wait_for_last_kernel();
    // A team's warps meet at a barrier, so that none may leave: in place of a row beyond the last one they work on
    // that again, and write to the padding.
    if (kTeam == 1 && row >= tokens) return;
    const Input* from = x + static_cast<long long>(min(row, tokens - 1)) * row_stride;  // in steps of four values
#if !QDIT_INPUT_FLOAT32
    if constexpr (kNarrow) {
        uint2 own[kSpan];
#pragma unroll
        for (int panel = 0; panel < kSpan; ++panel) own[panel] = from[(first + panel) * 32 + lane];
        quantize_narrow(own, values, scales, rows, row, first, warp, lane);
        return;
    }
#endif
    float v[kSpan][4];
#pragma unroll
    for (int panel = 0; panel < kSpan; ++panel) {
        if (beyond(first + panel, lane)) {
            v[panel][0] = v[panel][1] = v[panel][2] = v[panel][3] = 0.0f;
        } else {
            const Input four = from[(first + panel) * 32 + lane];  // by value: through a reference it is two loads
            widen4(v[panel], four);
        }
    }
    if constexpr (kNorm) normalize(v, {shift, scale, modulation_stride, image_tokens, epsilon}, row, lane);
    if constexpr (kGelu > 0) {
#pragma unroll
        for (int panel = 0; panel < kSpan; ++panel)
#pragma unroll
            for (int i = 0; i < 4; ++i) v[panel][i] = kGelu == 1 ? gelu_tanh(v[panel][i]) : gelu_exact(v[panel][i]);
    }
    if constexpr (kInRegisters) {
        quantize_in_registers(v, values, scales, rows, row, first, warp, lane);
    } else {
        quantize_in_shared(v, shared + warp * kRowBytes, values, scales, zeros, sums, rows, row, lane);
    }
}
