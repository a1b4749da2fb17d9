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

// GELU in its tanh form: x · sigmoid(2u), u = sqrt(2/π) (x + 0.044715 x³).
__device__ __forceinline__ float gelu_tanh(float x) {
    const float u = 1.5957691216057308f * x * fmaf(0.044715f * x, x, 1.0f);
    return __fdividef(x, 1.0f + __expf(-u));
}

// round(x / s) to nearest even, the division as IEEE has it: x times the reciprocal decides, except
// within 2^-10 of a tie, where that product's error (below 2^-14 for |x / s| <= 256) could.
__device__ __forceinline__ float divide_and_round(float x, float scale, float reciprocal) {
    const float quotient = x * reciprocal;
    float rounded = rintf(quotient);
    if (fabsf(fabsf(quotient - rounded) - 0.5f) < 0.0009765625f) rounded = rintf(__fdiv_rn(x, scale));
    return rounded;
}
