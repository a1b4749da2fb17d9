// Hopper's product: the warps that copy, each for a kind of operand.
#pragma once

#include "hopper_stages.cuh"

struct Problem : Operands {
    int panels;         // K / 128
    int tiles;
    int channel_tiles;  // along N
};

// Where the copies of one array of scales, sums or multipliers stand: its row changes every `group` segments.
template <typename Value>
struct RowCursor {
    const Value* from;
    int stride;
    int group;
    int left;

    __device__ __forceinline__ RowCursor(const Value* first, int stride, int group)
        : from(first), stride(stride), group(group), left(group) {}

    __device__ __forceinline__ void copy(uint32 to, int count, uint32 barrier) const {
        bulk_copy(to, from, count * sizeof(Value), barrier);
    }

    __device__ __forceinline__ void next() {
        if (--left == 0) left = group, from += stride;
    }
};

// One warp's copies for all tiles of this block. For each tile `begin` takes its first token and channel and how many there are of
// each, and returns the bytes of a panel; then `copy` starts a panel's copies, for the stage and to the barrier that it is given.
template <typename Begin, typename Copy>
__device__ __forceinline__ void produce(const Problem& p, uint32 base, Begin begin, Copy copy) {
    const uint32 full = base + kBarriersAt, empty = full + kStages * 8;
    Place place;
    TilePlace at(blockIdx.x, gridDim.x, p.channel_tiles);
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, at.next()) {
        const int token0 = at.token * kTokens, channel0 = at.channel * kChannels;
        const uint32 bytes = begin(token0, min(kTokens, p.rows - token0), channel0, min(kChannels, p.weight_rows - channel0));
#pragma unroll 1
        for (int panel = 0; panel < p.panels; ++panel, place.next()) {
            const uint32 ready = full + place.stage * 8;
            barrier_wait(empty + place.stage * 8, place.phase ^ 1);
            barrier_expect(ready, bytes);
            copy(place.stage, panel, ready);
        }
    }
}

// `copy` for each segment that begins in a panel or goes on in it, and `next` where one ends.
template <typename Copy, typename Next>
__device__ __forceinline__ void each_segment(int panel, Copy copy, Next next) {
#pragma unroll
    for (int part = 0; part < kSegments; ++part) {
        copy(part);
        if (kSegmentPanels == 1 || panel % kSegmentPanels == kSegmentPanels - 1) next();
    }
}

__device__ __forceinline__ void produce_weights(const Problem& p, uint32 base) {
    constexpr int kRowBytes = kFourBits ? 64 : 128;
    const long long step = static_cast<long long>(p.weight_rows) * kRowBytes;
    const uint8* from = p.w;
    int count = 0;
    RowCursor<uint8> multipliers(p.multiplier, 0, 1);
    produce(
        p, base,
        [&](int, int, int channel0, int channels) -> uint32 {
            from = p.w + static_cast<long long>(channel0) * kRowBytes;
            count = channels;
            if constexpr (kMultipliers) multipliers = RowCursor<uint8>(p.multiplier + channel0, p.weight_rows, p.channel_group);
            return channels * (kRowBytes + kMultipliers * kSegments);
        },
        [&](int stage, int panel, uint32 ready) {
            bulk_copy(base + stage * (kWeightBytes + kInputBytes), from, count * kRowBytes, ready);
            from += step;
            if constexpr (kMultipliers) {
                const uint32 to = base + kScalesAt + stage * kScaleBytes + kMultipliersAt;
                each_segment(
                    panel, [&](int part) { multipliers.copy(to + part * kChannels, count, ready); },
                    [&]() { multipliers.next(); });
            }
        });
}

__device__ __forceinline__ void produce_inputs(const Problem& p, uint32 base) {
    const long long step = static_cast<long long>(p.rows) * kPanel;
    const uint8* from = p.x;
    uint32 bytes = 0;
    produce(
        p, base,
        [&](int token0, int tokens, int, int) -> uint32 {
            from = p.x + static_cast<long long>(token0) * kPanel;
            return bytes = tokens * kPanel;
        },
        [&](int stage, int, uint32 ready) {
            bulk_copy(base + stage * (kWeightBytes + kInputBytes) + kWeightBytes, from, bytes, ready);
            from += step;
        });
}

// One side's scales, and for zero points two arrays more: `by_group` changes its row as the scales do, `by_segment` with every one.
template <int Width, bool Scales, bool ByGroup, int ScaleAt, int ByGroupAt, bool BySegment, int BySegmentAt>
struct SideOfScales {
    RowCursor<float> scale, by_group, by_segment;
    uint32 base;
    int count = 0;

    __device__ __forceinline__ uint32 begin(
        const float* scales, const float* grouped, const float* segmented, int first, int wanted, int stride, int group) {
        count = wanted;
        if constexpr (Scales) scale = RowCursor<float>(scales + first, stride, group);
        if constexpr (ByGroup) by_group = RowCursor<float>(grouped + first, stride, group);
        if constexpr (BySegment) by_segment = RowCursor<float>(segmented + first, stride, 1);
        return (Scales + ByGroup + BySegment) * kSegments * count * 4;
    }

    __device__ __forceinline__ void copy(int stage, int panel, uint32 ready) {
        const uint32 to = base + kScalesAt + stage * kScaleBytes;
        each_segment(
            panel,
            [&](int part) {
                const uint32 at = to + part * Width * 4;
                if constexpr (Scales) scale.copy(at + ScaleAt, count, ready);
                if constexpr (ByGroup) by_group.copy(at + ByGroupAt, count, ready);
                if constexpr (BySegment) by_segment.copy(at + BySegmentAt, count, ready);
            },
            [&]() {
                if constexpr (Scales) scale.next();
                if constexpr (ByGroup) by_group.next();
                if constexpr (BySegment) by_segment.next();
            });
    }
};

__device__ __forceinline__ void produce_token_scales(const Problem& p, uint32 base) {
    const RowCursor<float> none(nullptr, 0, 1);
    SideOfScales<kTokens, kTokenScales, kInputZero, 0, kTokenZeroAt, kWeightZero, kTokenSumAt> side{none, none, none, base};
    produce(
        p, base,
        [&](int token0, int tokens, int, int) -> uint32 {
            return side.begin(p.token_scale, p.token_zero, p.token_sum, token0, tokens, p.rows, p.token_group);
        },
        [&](int stage, int panel, uint32 ready) { side.copy(stage, panel, ready); });
}

__device__ __forceinline__ void produce_channel_scales(const Problem& p, uint32 base) {
    const RowCursor<float> none(nullptr, 0, 1);
    SideOfScales<kChannels, kChannelScales, kWeightZero, kChannelScaleAt, kChannelZeroAt, kInputZero, kChannelSumAt> side{
        none, none, none, base};
    produce(
        p, base,
        [&](int, int, int channel0, int channels) -> uint32 {
            return side.begin(
                p.channel_scale, p.channel_zero, p.channel_sum, channel0, channels, p.weight_rows, p.channel_group);
        },
        [&](int stage, int panel, uint32 ready) { side.copy(stage, panel, ready); });
}

// The copying warpgroup: weights do not wait for the last kernel, what it wrote does.
__device__ __forceinline__ void produce_all(const Problem& p, uint32 base, int warp) {
    if (!elected()) return;
    if (warp == 0) produce_weights(p, base);
    if (kChannelArrays > 0 && warp == 2) produce_channel_scales(p, base);
    if (warp == 0 || warp == 2) return;
    wait_for_last_kernel();
    if (warp == 1) produce_inputs(p, base);
    if (kTokenArrays > 0 && warp == 3) produce_token_scales(p, base);
}
