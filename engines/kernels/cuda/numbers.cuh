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

// The larger magnitudes of two pairs.
__device__ __forceinline__ uint32 most_halves(uint32 a, uint32 b) {
    uint32 most;
#if QDIT_BF16
    asm("{\n.reg .b32 a, b;\nabs.bf16x2 a, %1;\nabs.bf16x2 b, %2;\nmax.bf16x2 %0, a, b;\n}" : "=r"(most) : "r"(a), "r"(b));
#else
    asm("{\n.reg .b32 a, b;\nabs.f16x2 a, %1;\nabs.f16x2 b, %2;\nmax.f16x2 %0, a, b;\n}" : "=r"(most) : "r"(a), "r"(b));
#endif
    return most;
}

// Where a row's scale stands among those of its sixteen: a thread of the products needs rows 2q, 2q + 1, 2q + 8 and
// 2q + 9 of them, and finds them side by side.
__device__ __forceinline__ int place_of_scale(int row) {
    return (row & ~15) | (row & 6) << 1 | (row & 8) >> 2 | (row & 1);
}

// GELU in its tanh form: x · sigmoid(2u), u = sqrt(2/π) (x + 0.044715 x³). Where 2^(-2u log2 e) overflows, its reciprocal is zero.
__device__ __forceinline__ float gelu_tanh(float x) {
    constexpr float kLinear = -2.302208198144325f, kCubic = -0.1029432395800235f;  // -2 sqrt(2/π) log2 e, and that times 0.044715
    float power, sigmoid;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * fmaf(kCubic, x * x, kLinear)));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + power));
    return x * sigmoid;
}

// GELU as it is defined: x Φ(x).
__device__ __forceinline__ float gelu_exact(float x) { return 0.5f * x * (1.0f + erff(0.7071067811865476f * x)); }

// 1 / x within a rounding, for a normal x whose reciprocal is normal too.
__device__ __forceinline__ float reciprocal_of(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return fmaf(r, fmaf(-x, r, 1.0f), r);
}

// v / d, correctly rounded: the steps that the compiler's own division takes where nothing overflows and no remainder is lost.
// A quotient below 2^-78 may be off; all that it is used for rounds that to zero.
__device__ __forceinline__ float divided(float v, float d, float reciprocal) {
    const float quotient = __fmul_rn(v, reciprocal);
    return fmaf(fmaf(-d, quotient, v), reciprocal, quotient);
}

// The four integers round(v / scale), nearest even, as bytes.
__device__ __forceinline__ uint32 quantized4(const float (&v)[4], float scale, float reciprocal) {
    constexpr float kShift = 12582912.0f;  // 1.5 · 2^23: a sum with it ends in the rounded integer
    uint32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(__fadd_rn(divided(v[i], scale, reciprocal), kShift));
    return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
}
