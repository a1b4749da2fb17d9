// What the matrix products of all architectures share: one warpgroup's accumulators, their promotion
// to float32 by group scales, and what becomes of the finished tile.
//
// A block's tile is kChannels output channels × kTokens tokens, y[token, channel] = Σ w[channel, k] x[token, k].
// Channels are the matrix unit's rows: 4-bit weights are then its register operand, and any number of
// tokens, a multiple of 8, can be its columns. A warpgroup owns 64 channels, a warp 16. Thread `lane`
// holds for token pair j (tokens 8j + 2(lane % 4) and the next one) d[4j], d[4j+1] of channel
// lane / 4 and d[4j+2], d[4j+3] of channel lane / 4 + 8.
#pragma once

#include "numbers.cuh"

constexpr int kTokens = QDIT_TILE_TOKENS;
constexpr int kWarpgroups = QDIT_WARPGROUPS;
constexpr int kChannels = 64 * kWarpgroups;
constexpr int kAccumulators = kTokens / 2;
constexpr int kPanel = 128;      // bytes of k in one row of a panel
constexpr int kStep = 32;        // k of one matrix instruction
// k of one in-loop promotion within a panel; larger segments are promoted every `segment_panels`
constexpr int kSegment = QDIT_SEGMENT;
constexpr int kSegments = kPanel / kSegment;
constexpr bool kFourBits = QDIT_WEIGHT_BITS == 4;
constexpr bool kTokenScales = QDIT_TOKEN_SCALES;      // activation scales change along k
constexpr bool kChannelScales = QDIT_CHANNEL_SCALES;  // weight scales change along k
constexpr bool kMultipliers = QDIT_MULTIPLIERS;       // int4 × integer = int8 before the product
constexpr bool kWeightZero = QDIT_WEIGHT_ZERO;
constexpr bool kInputZero = QDIT_INPUT_ZERO;
constexpr bool kPromotes = kTokenScales || kChannelScales || kWeightZero || kInputZero;
// 4-bit weights are multiplied as q · 16, the byte that a nibble makes without further work
constexpr float kUnit = kFourBits && !kMultipliers ? 16.0f : 1.0f;
constexpr int kStagingRow = 64 * 2 + 16;  // bytes: padded against bank conflicts
constexpr int kStagingBytes = kTokens * kStagingRow;

// Scales of one segment in shared memory, [kTokens] or [kChannels] floats each.
struct Scales {
    const float* token_scale;
    const float* channel_scale;
    const float* token_sum;     // Σ x of the segment, for weight zero points
    const float* channel_zero;
    const float* token_zero;
    const float* channel_sum;   // Σ (w - zero) of the segment, for activation zero points
};

// acc += scale · (integer sum, corrected for zero points), for one warp's 16 channels × kTokens.
__device__ __forceinline__ void promote(
    float (&acc)[kAccumulators], const int (&d)[kAccumulators], const Scales& scales, int channel,
    int lane) {
    float scale_low = 1.0f, scale_high = 1.0f, zero_low = 0.0f, zero_high = 0.0f, sum_low = 0.0f,
          sum_high = 0.0f;
    if constexpr (kChannelScales) {
        scale_low = scales.channel_scale[channel] / kUnit;
        scale_high = scales.channel_scale[channel + 8] / kUnit;
    }
    if constexpr (kWeightZero) {
        zero_low = scales.channel_zero[channel] * kUnit;
        zero_high = scales.channel_zero[channel + 8] * kUnit;
    }
    if constexpr (kInputZero) {
        sum_low = scales.channel_sum[channel] * kUnit;
        sum_high = scales.channel_sum[channel + 8] * kUnit;
    }
    const int pair = (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
        float t[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) t[i] = __int2float_rn(d[4 * j + i]);
        if constexpr (kWeightZero) {
            const float2 sum = *reinterpret_cast<const float2*>(scales.token_sum + 8 * j + pair);
            t[0] = fmaf(-zero_low, sum.x, t[0]);
            t[1] = fmaf(-zero_low, sum.y, t[1]);
            t[2] = fmaf(-zero_high, sum.x, t[2]);
            t[3] = fmaf(-zero_high, sum.y, t[3]);
        }
        if constexpr (kInputZero) {
            const float2 zero = *reinterpret_cast<const float2*>(scales.token_zero + 8 * j + pair);
            t[0] = fmaf(-sum_low, zero.x, t[0]);
            t[1] = fmaf(-sum_low, zero.y, t[1]);
            t[2] = fmaf(-sum_high, zero.x, t[2]);
            t[3] = fmaf(-sum_high, zero.y, t[3]);
        }
        if constexpr (kTokenScales) {
            const float2 scale = *reinterpret_cast<const float2*>(scales.token_scale + 8 * j + pair);
            if constexpr (kChannelScales) {
                t[0] *= scale_low, t[1] *= scale_low, t[2] *= scale_high, t[3] *= scale_high;
            }
            acc[4 * j] = fmaf(t[0], scale.x, acc[4 * j]);
            acc[4 * j + 1] = fmaf(t[1], scale.y, acc[4 * j + 1]);
            acc[4 * j + 2] = fmaf(t[2], scale.x, acc[4 * j + 2]);
            acc[4 * j + 3] = fmaf(t[3], scale.y, acc[4 * j + 3]);
        } else {
            acc[4 * j] = fmaf(t[0], scale_low, acc[4 * j]);
            acc[4 * j + 1] = fmaf(t[1], scale_low, acc[4 * j + 1]);
            acc[4 * j + 2] = fmaf(t[2], scale_high, acc[4 * j + 2]);
            acc[4 * j + 3] = fmaf(t[3], scale_high, acc[4 * j + 3]);
        }
    }
}

// One matrix step's register operand: four int8 each of channels lane / 4 and lane / 4 + 8.
// A word holds the nibbles of channel lane / 4 in the low halves of its bytes, those of lane / 4 + 8 in the
// high ones, in two's complement: moved to the high half, a nibble is the byte q · 16.
__device__ __forceinline__ void unpack_nibbles(
    uint32 (&a)[4], uint32 first, uint32 second, uint32 multiplier_low, uint32 multiplier_high) {
    constexpr uint32 kLow = 0x0F0F0F0Fu, kHigh = 0xF0F0F0F0u, kEight = 0x08080808u, kSign = 0x80808080u;
    if constexpr (kMultipliers) {
        // u = q + 8: u·m + (128 - 8m) stays within its byte, so one product serves four of them
        const uint32 bias_low = kSign - multiplier_low * kEight, bias_high = kSign - multiplier_high * kEight;
        a[0] = (((first & kLow) ^ kEight) * multiplier_low + bias_low) ^ kSign;
        a[1] = (((first >> 4 & kLow) ^ kEight) * multiplier_high + bias_high) ^ kSign;
        a[2] = (((second & kLow) ^ kEight) * multiplier_low + bias_low) ^ kSign;
        a[3] = (((second >> 4 & kLow) ^ kEight) * multiplier_high + bias_high) ^ kSign;
    } else {
        a[0] = first << 4 & kHigh;
        a[1] = first & kHigh;
        a[2] = second << 4 & kHigh;
        a[3] = second & kHigh;
    }
}

// Everything about the output that is the same for all tiles.
struct Output {
    const uint16* bias;      // [N] or null
    const float* token_scale;    // [M rows], where token scales do not change along k
    const float* channel_scale;  // [N rows], likewise
    const uint16* residual;  // [M, N]
    const uint16* gate;      // [images, gate_stride]
    int gate_stride;
    int image_tokens;
    int tokens;              // M
    int channels;            // N
    uint16* out;             // [M, N]
};

__device__ __forceinline__ void stage_pairs(
    uint8* staging, const float (&acc)[kAccumulators], int warp, int lane) {
#if __CUDA_ARCH__ >= 900
    const int matrix = lane >> 3, row = lane & 7;
    const uint32 base = shared_address(staging) + ((matrix >> 1) * 8 + row) * kStagingRow +
                        ((matrix & 1) * 8 + warp * 16) * 2;
#pragma unroll
    for (int j = 0; j + 1 < kTokens / 8; j += 2) {
        const uint32 r[4] = {
            pack_halves(acc[4 * j], acc[4 * j + 1]),
            pack_halves(acc[4 * j + 2], acc[4 * j + 3]),
            pack_halves(acc[4 * j + 4], acc[4 * j + 5]),
            pack_halves(acc[4 * j + 6], acc[4 * j + 7]),
        };
        store_matrix_x4_transposed(base + j * 8 * kStagingRow, r);
    }
    constexpr int kPaired = kTokens / 16 * 2;
#else
    constexpr int kPaired = 0;
#endif
    const int channel = warp * 16 + (lane >> 2), token = (lane & 3) * 2;
#pragma unroll
    for (int j = kPaired; j < kTokens / 8; ++j) {
        uint16* at = reinterpret_cast<uint16*>(staging + (8 * j + token) * kStagingRow) + channel;
        const uint32 low = pack_halves(acc[4 * j], acc[4 * j + 1]);
        const uint32 high = pack_halves(acc[4 * j + 2], acc[4 * j + 3]);
        at[0] = static_cast<uint16>(low);
        at[8] = static_cast<uint16>(high);
        at = reinterpret_cast<uint16*>(staging + (8 * j + token + 1) * kStagingRow) + channel;
        at[0] = static_cast<uint16>(low >> 16);
        at[8] = static_cast<uint16>(high >> 16);
    }
}

// Scales that do not change along k, and the bias.
__device__ __forceinline__ void finish(
    float (&acc)[kAccumulators], const Output& output, int token0, int channel0, int warp, int lane) {
    const int channel = channel0 + warp * 16 + (lane >> 2);
    float scale_low = 1.0f, scale_high = 1.0f, bias_low = 0.0f, bias_high = 0.0f;
    const bool has_low = channel < output.channels, has_high = channel + 8 < output.channels;
    if constexpr (!kChannelScales) {
        if (has_low) scale_low = output.channel_scale[channel] / kUnit;
        if (has_high) scale_high = output.channel_scale[channel + 8] / kUnit;
    }
    if (output.bias) {
        if (has_low) bias_low = widen(output.bias[channel]);
        if (has_high) bias_high = widen(output.bias[channel + 8]);
    }
    const int pair = token0 + (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
        float2 scale = {1.0f, 1.0f};
        if constexpr (!kTokenScales) {
            // rows are padded to a multiple of 8, so a pair is inside as a whole or not at all
            if (pair + 8 * j < output.tokens)
                scale = *reinterpret_cast<const float2*>(output.token_scale + pair + 8 * j);
        }
        acc[4 * j] = fmaf(acc[4 * j] * scale_low, scale.x, bias_low);
        acc[4 * j + 1] = fmaf(acc[4 * j + 1] * scale_low, scale.y, bias_low);
        acc[4 * j + 2] = fmaf(acc[4 * j + 2] * scale_high, scale.x, bias_high);
        acc[4 * j + 3] = fmaf(acc[4 * j + 3] * scale_high, scale.y, bias_high);
    }
}

__device__ __forceinline__ uint32 gated(uint32 residual, uint32 gate, uint32 value) {
    return pack_halves(
        fmaf(low_half(gate), low_half(value), low_half(residual)),
        fmaf(high_half(gate), high_half(value), high_half(residual)));
}

// Write one warpgroup's 64 channels × kTokens, 16 bytes a thread.
__device__ __forceinline__ void store_tile(
    const uint8* staging, const Output& output, int token0, int channel0, int thread) {
#pragma unroll 4
    for (int at = thread; at < kTokens * 8; at += 128) {
        const int row = at >> 3, chunk = at & 7;
        const int token = token0 + row, channel = channel0 + chunk * 8;
        if (token >= output.tokens || channel >= output.channels) continue;
        uint4 value = *reinterpret_cast<const uint4*>(staging + row * kStagingRow + chunk * 16);
        const long long offset = static_cast<long long>(token) * output.channels + channel;
#if QDIT_GATED
        const uint4 residual = *reinterpret_cast<const uint4*>(output.residual + offset);
        const uint4 gate = *reinterpret_cast<const uint4*>(
            output.gate + static_cast<long long>(token / output.image_tokens) * output.gate_stride + channel);
        value = {gated(residual.x, gate.x, value.x), gated(residual.y, gate.y, value.y),
                 gated(residual.z, gate.z, value.z), gated(residual.w, gate.w, value.w)};
#endif
        *reinterpret_cast<uint4*>(output.out + offset) = value;
    }
}
