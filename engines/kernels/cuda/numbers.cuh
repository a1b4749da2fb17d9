// 16-bit floats without CUDA's headers: QDIT_BF16 chooses bfloat16, else float16.
#pragma once

#include "ptx.cuh"

// Two floats rounded to nearest even, `low` in the low half.
__device__ __forceinline__ uint32 pack_halves(float low, float high) {
    uint32 packed;
#if QDIT_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

__device__ __forceinline__ float widen(uint16 bits) {
    float value;
#if QDIT_BF16
    value = __uint_as_float(static_cast<uint32>(bits) << 16);
#else
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
#endif
    return value;
}

__device__ __forceinline__ float low_half(uint32 packed) { return widen(static_cast<uint16>(packed)); }

__device__ __forceinline__ float high_half(uint32 packed) {
#if QDIT_BF16
    return __uint_as_float(packed & 0xFFFF0000u);
#else
    return widen(static_cast<uint16>(packed >> 16));
#endif
}

// Where a row's scale stands among those of its sixteen: a thread of the products needs rows 2q, 2q + 1, 2q + 8 and
// 2q + 9 of them, and finds them side by side.
__device__ __forceinline__ int place_of_scale(int row) {
    return (row & ~15) | (row & 6) << 1 | (row & 8) >> 2 | (row & 1);
}

// GELU in its tanh form: x · sigmoid(2u), u = sqrt(2/π) (x + 0.044715 x³).
__device__ __forceinline__ float gelu_tanh(float x) {
    const float u = 1.5957691216057308f * x * fmaf(0.044715f * x, x, 1.0f);
    return __fdividef(x, 1.0f + __expf(-u));
}

// GELU as it is defined: x Φ(x).
__device__ __forceinline__ float gelu_exact(float x) { return 0.5f * x * (1.0f + erff(0.7071067811865476f * x)); }

// The four integers round(v / scale), nearest even, as bytes. The quotient is v times the reciprocal, whose error
// is below 2^-16 for quotients up to 128; where that could decide a rounding, the division itself does.
__device__ __forceinline__ uint32 quantized4(const float (&v)[4], float scale, float reciprocal) {
    constexpr float kShift = 12582912.0f;  // 1.5 · 2^23: a sum with it ends in the rounded integer
    uint32 bits[4];
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float quotient = v[i] * reciprocal;
        const float shifted = __fadd_rn(quotient, kShift);
        bits[i] = __float_as_uint(shifted);
        most = fmaxf(most, fabsf(__fsub_rn(quotient, __fsub_rn(shifted, kShift))));
    }
    if (most > 0.5f - 0x1p-15f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(__fadd_rn(__fdiv_rn(v[i], scale), kShift));
    }
    return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
}

// round(x / scale) of one value, as quantized4 has it.
__device__ __forceinline__ float divide_and_round(float x, float scale, float reciprocal) {
    const float quotient = x * reciprocal;
    float rounded = rintf(quotient);
    if (fabsf(quotient - rounded) > 0.5f - 0x1p-14f) rounded = rintf(__fdiv_rn(x, scale));
    return rounded;
}
