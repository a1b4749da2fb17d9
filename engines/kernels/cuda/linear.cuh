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
// Warpgroups that share a tile's channels and add up, each every kSplits-th panel.
constexpr int kSplits = QDIT_SPLITS;
constexpr int kColumns = kWarpgroups / kSplits;  // of 64 channels
constexpr int kChannels = 64 * kColumns;
constexpr int kAccumulators = kTokens / 2;
constexpr int kPanel = 128;      // bytes of k in one row of a panel
constexpr int kStep = 32;        // k of one matrix instruction
// k of one in-loop promotion within a panel; larger segments are promoted every kSegmentPanels
constexpr int kSegment = QDIT_SEGMENT;
constexpr int kSegments = kPanel / kSegment;
constexpr int kSegmentPanels = QDIT_SEGMENT_PANELS;
constexpr bool kFourBits = QDIT_WEIGHT_BITS == 4;
constexpr bool kTokenScales = QDIT_TOKEN_SCALES;      // activation scales change along k
constexpr bool kChannelScales = QDIT_CHANNEL_SCALES;  // weight scales change along k
constexpr bool kMultipliers = QDIT_MULTIPLIERS;       // int4 × integer = int8 before the product
constexpr bool kWeightZero = QDIT_WEIGHT_ZERO;
constexpr bool kInputZero = QDIT_INPUT_ZERO;
constexpr bool kPromotes = kTokenScales || kChannelScales || kWeightZero || kInputZero;
// One panel's bytes in shared memory.
constexpr int kWeightBytes = kFourBits ? kChannels * 64 : kChannels * 128;
constexpr int kInputBytes = kTokens * kPanel;
constexpr int kTokenScaleBytes = kSegments * kTokens * 4;
constexpr int kChannelScaleBytes = kSegments * kChannels * 4;
constexpr int kMultiplierBytes = kSegments * kChannels;
// 4-bit weights are multiplied as q · 16, the byte that a nibble makes without further work
constexpr float kUnit = kFourBits && !kMultipliers ? 16.0f : 1.0f;
constexpr int kStagingRow = 64 * 2 + 16;  // bytes: padded against bank conflicts
constexpr int kStagingBytes = kTokens * kStagingRow;

// What a product reads from device memory.
struct Operands {
    const uint8* x;
    const float* token_scale;
    const float* token_sum;
    const float* token_zero;
    const uint8* w;
    const float* channel_scale;
    const float* channel_zero;
    const float* channel_sum;
    const uint8* multiplier;
    int rows;           // tokens rounded up to a multiple of 16
    int weight_rows;    // channels rounded up to a multiple of 64
    int token_group;    // segments that share a token scale
    int channel_group;  // segments that share a channel scale or multiplier
};

// Where one segment's scales lie in shared memory: [kTokens] and [kChannels] floats.
struct Scales {
    const float* token_scale;
    const float* channel_scale;
    const float* token_sum;     // Σ x of the segment, for weight zero points
    const float* channel_zero;
    const float* token_zero;
    const float* channel_sum;   // Σ (w - zero) of the segment, for activation zero points
};

__device__ __forceinline__ void take(float (&to)[4], const float4& from) {
    to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

// Scales of a thread's tokens of sixteen: 2q and 2q + 1 of the first eight, and of the second.
__device__ __forceinline__ float4 tokens_of(const float* values, int block, int lane) {
    return *reinterpret_cast<const float4*>(values + 16 * block + (lane & 3) * 4);
}

// Scales of so many of a tile's sixteens of tokens wait in registers while the matrix unit works; where there is no room, the
// others are read when they are wanted.
#ifdef QDIT_HOPPER
constexpr bool kHopper = true;
constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : kWarpgroups == 3 ? 160 : 240;
constexpr int kSpare = kConsumerRegisters - kTokens / 2 * (2 + QDIT_PIPELINED) - (kFourBits ? 24 : 0) - 32;
constexpr int kEarlyBlocks = kSpare < 0 ? 0 : kSpare / 4 < kTokens / 16 ? kSpare / 4 : kTokens / 16;
#else
constexpr bool kHopper = false;
constexpr int kEarlyBlocks = kTokens / 16;
#endif

// A thread's own part of them, in registers: two channels, and two neighbouring tokens of every eight.
struct OwnScales {
    float channel_scale[2] = {1.0f, 1.0f};
    float channel_zero[2], channel_sum[2];
    float4 token_scale[kEarlyBlocks > 0 ? kEarlyBlocks : 1];
};

// Integers as floats without the conversion instruction, which runs at an eighth of the rate of an addition: added
// to the bits of 1.5 · 2^23, an integer below 2^22 is the fraction of a float.
constexpr uint32 kShiftBits = 0x4B400000u;
constexpr float kShift = 12582912.0f;
// One promotion's sums stay below 2^22: 128 k of |x| <= 127 times |w| <= 128, or 16 · 8. Longer segments do not.
constexpr bool kShiftFits = kSegmentPanels == 1;
// Scales of at most 11 significant bits, as float16 has: the constant times the scale is exact, and goes with the first product.
constexpr bool kShiftScales = kChannelScales && kShiftFits && QDIT_SHORT_SCALES && !kWeightZero && !kInputZero;

__device__ __forceinline__ float shifted(int sum) { return __uint_as_float(static_cast<uint32>(sum) + kShiftBits); }

// Any sum below 2^30: high and low bits apart, rounded once as the conversion instruction rounds.
__device__ __forceinline__ float converted(int sum) {
    // 2^23 too little here and as much too much there
    const float high = __uint_as_float(static_cast<uint32>(sum >> 8) + kShiftBits) - (kShift + 32768.0f);
    const float low = __uint_as_float((static_cast<uint32>(sum) & 0xFFu) | 0x4B000000u);
    return fmaf(high, 256.0f, low);
}

// Where the matrix unit itself can start from a constant (kStarts), not even that addition is needed: a sum that is not negative
// is, read as a float, a denormal number of 2^-149 times its value, and multiply-adds take those at full speed. The constant is
// above any -sum; it has 13 significant bits where it is to be multiplied by scales of 11, which costs some of its range
// (`PackedWeight.heavy` says what is left out).
constexpr bool kStarts = kHopper && QDIT_STARTS && kPromotes && kShiftFits;
constexpr int kStart = kShiftScales ? 31 * 255 * 255 + 241 * 241 : 32 * 255 * 255;
// 2^111, so that any float16 scale times it is finite; accumulators are then 2^-38 of what they mean until the end.
constexpr float kRaise = 0x1p111f;
constexpr float kLower = 0x1p-38f;
constexpr float kScaleUnit = kStarts && kShiftScales ? kRaise : 1.0f;
constexpr float kSumUnit = kStarts ? kLower : 1.0f;

// Half of the sums by each way: the two run in different units.
__device__ __forceinline__ void convert_all(float (&acc)[kAccumulators], const int (&d)[kAccumulators]) {
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) acc[i] = i & 2 ? __int2float_rn(d[i]) : converted(d[i]);
}

__device__ __forceinline__ void load_channels(OwnScales& own, const Scales& scales, int channel) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        if constexpr (kChannelScales) own.channel_scale[row] = scales.channel_scale[channel + 8 * row] * (kScaleUnit / kUnit);
        if constexpr (kWeightZero) own.channel_zero[row] = scales.channel_zero[channel + 8 * row] * (kUnit * kSumUnit);
        if constexpr (kInputZero) own.channel_sum[row] = scales.channel_sum[channel + 8 * row] * (kUnit * kSumUnit);
    }
}

__device__ __forceinline__ void load_tokens(OwnScales& own, const Scales& scales, int lane) {
    if constexpr (kTokenScales) {
#pragma unroll
        for (int block = 0; block < kEarlyBlocks; ++block) own.token_scale[block] = tokens_of(scales.token_scale, block, lane);
    }
}

// acc += scale · (integer sum, corrected for zero points), for one warp's 16 channels × kTokens. Returns bits of every scale that
// was loaded for it: who waits for them knows that the loads are done.
__device__ __forceinline__ uint32 promote(
    float (&acc)[kAccumulators], const int (&d)[kAccumulators], const OwnScales& own, const Scales& scales,
    int lane) {
    const float shift = kStarts ? __int_as_float(kStart) : kShift;
    uint32 seen = __float_as_uint(own.channel_scale[0]) ^ __float_as_uint(own.channel_scale[1]);
    if constexpr (kWeightZero) seen ^= __float_as_uint(own.channel_zero[0]) ^ __float_as_uint(own.channel_zero[1]);
    if constexpr (kInputZero) seen ^= __float_as_uint(own.channel_sum[0]) ^ __float_as_uint(own.channel_sum[1]);
    const float offset[2] = {-shift * own.channel_scale[0], -shift * own.channel_scale[1]};
#pragma unroll
    for (int block = 0; block < kTokens / 16; ++block) {
        float token_scale[4] = {}, token_sum[4] = {}, token_zero[4] = {};
        if constexpr (kTokenScales)
            take(token_scale, block < kEarlyBlocks ? own.token_scale[block] : tokens_of(scales.token_scale, block, lane));
        if constexpr (kWeightZero) take(token_sum, tokens_of(scales.token_sum, block, lane));
        if constexpr (kInputZero) take(token_zero, tokens_of(scales.token_zero, block, lane));
        seen ^= __float_as_uint(token_scale[0]) ^ __float_as_uint(token_sum[0]) ^ __float_as_uint(token_zero[0]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = i >> 1 & 1, token = (i >> 2) * 2 + (i & 1), at = 8 * block + i;
            float t;
            if constexpr (kShiftScales) {
                t = fmaf(kStarts ? __int_as_float(d[at]) : shifted(d[at]), own.channel_scale[row], offset[row]);
            } else {
                if constexpr (kStarts) {
                    t = fmaf(__int_as_float(d[at]), kRaise, -kStart * kLower);
                } else {
                    t = kShiftFits ? shifted(d[at]) - kShift : converted(d[at]);
                }
                if constexpr (kWeightZero) t = fmaf(-own.channel_zero[row], token_sum[token], t);
                if constexpr (kInputZero) t = fmaf(-own.channel_sum[row], token_zero[token], t);
                if constexpr (kChannelScales && kTokenScales) t *= own.channel_scale[row];
            }
            if constexpr (kTokenScales) {
                acc[at] = fmaf(t, token_scale[token], acc[at]);
            } else if constexpr (kShiftScales) {
                acc[at] += t;
            } else {
                acc[at] = fmaf(t, own.channel_scale[row], acc[at]);
            }
        }
    }
    return seen;
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
    const uint16* bias;          // [N] or null
    const float* token_scale;    // [M rows], where token scales do not change along k
    const float* channel_scale;  // [N rows], likewise
    const uint16* residual;      // [M, N]
    const uint16* gate;          // [images, gate_stride]
    int gate_stride;
    int image_tokens;            // consecutive tokens of one image, which share a gate
    int tokens;                  // M
    int channels;                // N, a multiple of 8
    uint16* out;                 // [M, N]
};

// Scales that do not change along k, and the bias.
__device__ __forceinline__ void finish(
    float (&acc)[kAccumulators], const Output& output, int token0, int channel0, int warp, int lane) {
    const int channel = channel0 + warp * 16 + (lane >> 2);
    float scale_low = 1.0f / kSumUnit, scale_high = 1.0f / kSumUnit, bias_low = 0.0f, bias_high = 0.0f;
    const bool has_low = channel < output.channels, has_high = channel + 8 < output.channels;
    if constexpr (!kChannelScales) {
        if (has_low) scale_low = output.channel_scale[channel] / (kUnit * kSumUnit);
        if (has_high) scale_high = output.channel_scale[channel + 8] / (kUnit * kSumUnit);
    }
    if (output.bias) {
        if (has_low) bias_low = widen(output.bias[channel]);
        if (has_high) bias_high = widen(output.bias[channel + 8]);
    }
#pragma unroll
    for (int block = 0; block < kTokens / 16; ++block) {
        float scale[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        if constexpr (!kTokenScales) {
            // rows are padded to a multiple of 16
            if (token0 + 16 * block < output.tokens) take(scale, tokens_of(output.token_scale + token0, block, lane));
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int at = 8 * block + i, token = (i >> 2) * 2 + (i & 1);
            const float by_channel = i & 2 ? scale_high : scale_low, bias = i & 2 ? bias_high : bias_low;
            if constexpr (kTokenScales && kChannelScales) {
                acc[at] = fmaf(acc[at], by_channel, bias);  // a power of two
            } else {
                acc[at] = fmaf(acc[at] * by_channel, scale[token], bias);
            }
        }
    }
}

__device__ __forceinline__ uint32 gated(uint32 residual, uint32 gate, uint32 value) {
    return pack_halves(
        fmaf(low_half(gate), low_half(value), low_half(residual)),
        fmaf(high_half(gate), high_half(value), high_half(residual)));
}

// Write one warpgroup's 64 channels × kTokens from its staging rows, 16 bytes a thread.
__device__ __forceinline__ void store_tile(
    const uint8* staging, const Output& output, int token0, int channel0, int thread) {
    constexpr int kPasses = kTokens * 8 / 128;
    constexpr int kAtOnce = 4;  // values and residuals on their way before the first one is used
    const int chunk = thread & 7, channel = channel0 + chunk * 8;
    const int tokens = channel < output.channels ? output.tokens : 0;
    const auto token_of = [&](int pass) { return token0 + (thread >> 3) + 16 * pass; };
    const auto place_of = [&](int pass) { return static_cast<long long>(token_of(pass)) * output.channels + channel; };
#pragma unroll
    for (int first = 0; first < kPasses; first += kAtOnce) {
        uint4 value[kAtOnce];
#if QDIT_GATED
        uint4 residual[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (first + i < kPasses && token_of(first + i) < tokens)
                residual[i] = *reinterpret_cast<const uint4*>(output.residual + place_of(first + i));
#endif
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (first + i < kPasses)
                value[i] = *reinterpret_cast<const uint4*>(
                    staging + ((thread >> 3) + 16 * (first + i)) * kStagingRow + chunk * 16);
        __syncwarp();  // or each value would be read just before it is written, and wait
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (first + i >= kPasses) break;
            const int token = token_of(first + i);
            if (token >= tokens) break;
#if QDIT_GATED
            const uint4 old = residual[i], own = value[i];
            const uint4 gate = *reinterpret_cast<const uint4*>(
                output.gate + static_cast<long long>(token / output.image_tokens) * output.gate_stride + channel);
            value[i] = {gated(old.x, gate.x, own.x), gated(old.y, gate.y, own.y), gated(old.z, gate.z, own.z),
                        gated(old.w, gate.w, own.w)};
#endif
            *reinterpret_cast<uint4*>(output.out + place_of(first + i)) = value[i];
        }
    }
}
