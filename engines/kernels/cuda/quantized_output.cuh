// The product's tile through GELU and straight into the next product's input: int8 panels with one
// scale a token and group of QDIT_OUT_GROUP (32, 64 or 128) channels.
#pragma once

#include "linear.cuh"

constexpr int kOutGroup = QDIT_OUT_GROUP;
constexpr int kGroupWarps = kOutGroup / 16;              // warps whose channels share a scale
constexpr int kGroupsHere = kOutGroup < 64 ? 64 / kOutGroup : 1;  // groups a warpgroup takes part in
constexpr float kSmallestScale = 5.9604644775390625e-08f;  // 2^-24, as quantizers.MIN_SCALE
constexpr int kMaximaBytes = 4 * kWarpgroups * kTokens * 4;
constexpr int kOutScaleBytes = kWarpgroups * kGroupsHere * kTokens * 8;

struct QuantizedOutput {
    uint8* values;   // [N / 128, rows, 128] int8, swizzled
    float* scales;   // [N / group, rows]
    int rows;        // tokens rounded up to a multiple of 8
};

// `maxima` is [4 · kWarpgroups, kTokens] for the block, `own_scales` [kGroupsHere, kTokens] pairs of
// scale and reciprocal for this warpgroup.
__device__ __forceinline__ void quantize_tile(
    float (&acc)[kAccumulators], uint8* staging, float* maxima, float2* own_scales,
    const Output& output, const QuantizedOutput& quantized, int token0, int channel0, int group,
    int thread) {
    const int warp = thread >> 5, lane = thread & 31, pair = (lane & 3) * 2;
    float* own_maxima = maxima + (group * 4 + warp) * kTokens;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[4 * j + i] = gelu_tanh(acc[4 * j + i]);
        float first = fmaxf(fabsf(acc[4 * j]), fabsf(acc[4 * j + 2]));
        float second = fmaxf(fabsf(acc[4 * j + 1]), fabsf(acc[4 * j + 3]));
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
            first = fmaxf(first, __shfl_xor_sync(0xFFFFFFFFu, first, lanes));
            second = fmaxf(second, __shfl_xor_sync(0xFFFFFFFFu, second, lanes));
        }
        if (lane < 4) *reinterpret_cast<float2*>(own_maxima + 8 * j + pair) = {first, second};
    }
    constexpr int kSharing = kOutGroup > 64 ? 128 * (kOutGroup / 64) : 128;
    const int sharing_id = 1 + (kOutGroup > 64 ? kWarpgroups + group / (kOutGroup / 64) : group);
    barrier_sync(sharing_id, kSharing);
    for (int at = thread; at < kGroupsHere * kTokens; at += 128) {
        const int part = at / kTokens, column = at - part * kTokens;
        const int first_warp = (group * 4 + part * kGroupWarps) / kGroupWarps * kGroupWarps;
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < kGroupWarps; ++i)
            most = fmaxf(most, maxima[(first_warp + i) * kTokens + column]);
        const float scale = fmaxf(__fdiv_rn(most, 127.0f), kSmallestScale);
        own_scales[at] = {scale, __frcp_rn(scale)};
        const int channel = channel0 + part * kOutGroup;
        // where warpgroups share a group, its first one writes the scale
        if (token0 + column < quantized.rows && channel < output.channels && channel % kOutGroup == 0)
            quantized.scales[static_cast<long long>(channel / kOutGroup) * quantized.rows + token0 + column] = scale;
    }
    barrier_sync(sharing_id, kSharing);
    const float2* scales = own_scales + (kOutGroup < 64 ? warp * 16 / kOutGroup : 0) * kTokens;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
        const float4 both = *reinterpret_cast<const float4*>(scales + 8 * j + pair);
        short q[4];
        q[0] = static_cast<short>(divide_and_round(acc[4 * j], both.x, both.y));
        q[1] = static_cast<short>(divide_and_round(acc[4 * j + 1], both.z, both.w));
        q[2] = static_cast<short>(divide_and_round(acc[4 * j + 2], both.x, both.y));
        q[3] = static_cast<short>(divide_and_round(acc[4 * j + 3], both.z, both.w));
        uint16* at = reinterpret_cast<uint16*>(staging + (8 * j + pair) * kStagingRow) + warp * 16 + (lane >> 2);
        at[0] = q[0], at[8] = q[2];
        at = reinterpret_cast<uint16*>(staging + (8 * j + pair + 1) * kStagingRow) + warp * 16 + (lane >> 2);
        at[0] = q[1], at[8] = q[3];
    }
    barrier_sync(1 + group, 128);
    uint8* panel = quantized.values + static_cast<long long>(channel0 / kPanel) * quantized.rows * kPanel;
    const int first_chunk = channel0 % kPanel / 16;
    for (int at = thread; at < kTokens * 4; at += 128) {
        const int row = at >> 2, chunk = at & 3, token = token0 + row;
        if (token >= quantized.rows || channel0 + chunk * 16 >= output.channels) continue;
        const uint4* from = reinterpret_cast<const uint4*>(staging + row * kStagingRow + chunk * 32);
        const uint4 low = from[0], high = from[1];
        const uint4 bytes = {__byte_perm(low.x, low.y, 0x6420), __byte_perm(low.z, low.w, 0x6420),
                             __byte_perm(high.x, high.y, 0x6420), __byte_perm(high.z, high.w, 0x6420)};
        const int swizzled = (first_chunk + chunk) ^ (token & 7);
        *reinterpret_cast<uint4*>(panel + static_cast<long long>(token) * kPanel + swizzled * 16) = bytes;
    }
}
