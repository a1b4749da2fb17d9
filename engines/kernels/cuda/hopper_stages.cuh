// Hopper's product: what a block's shared memory holds, stage by stage, and where a warp stands in it.
#pragma once

#include "linear.cuh"

constexpr int kStages = QDIT_STAGES;
// Warpgroups use the matrix unit in turn, so that one promotes while another one multiplies. Left to themselves they
// share it evenly, finish together, and then leave it idle together. 1: a turn ends when its instructions are issued;
// 2: when all but the last one have finished.
constexpr int kTurns = QDIT_TURNS;
constexpr bool kInTurn = kTurns > 0;
// A warpgroup issues the next panel's matrix instructions before it promotes this one's sums.
constexpr bool kPipelined = QDIT_PIPELINED;
// One stage's scales, in bytes from its first.
constexpr int kChannelScaleAt = kTokenScales * kTokenScaleBytes;
constexpr int kTokenSumAt = kChannelScaleAt + kChannelScales * kChannelScaleBytes;
constexpr int kChannelZeroAt = kTokenSumAt + kWeightZero * kTokenScaleBytes;
constexpr int kTokenZeroAt = kChannelZeroAt + kWeightZero * kChannelScaleBytes;
constexpr int kChannelSumAt = kTokenZeroAt + kInputZero * kTokenScaleBytes;
constexpr int kMultipliersAt = kChannelSumAt + kInputZero * kChannelScaleBytes;
constexpr int kScaleBytes = kMultipliersAt + kMultipliers * kMultiplierBytes;
// Each warp that copies has operands of its own: one alone would take longer over a panel's copies than the others over its products.
constexpr int kTokenArrays = kTokenScales + kWeightZero + kInputZero;
constexpr int kChannelArrays = kChannelScales + kWeightZero + kInputZero;
constexpr int kCopyingWarps = 2 + (kTokenArrays > 0) + (kChannelArrays > 0);
constexpr int kScalesAt = kStages * (kWeightBytes + kInputBytes);
constexpr int kStagingAt = kScalesAt + (kStages * kScaleBytes + 127) / 128 * 128;
constexpr int kPartsAt = kStagingAt + kColumns * kStagingBytes;  // sums of the parts that are added to the first one's
constexpr int kPartBytes = kAccumulators * 128 * 4;
constexpr int kStartAt = kPartsAt + (kWarpgroups - kColumns) * kPartBytes;
constexpr int kStartBytes = kStarts ? 256 : 0;
constexpr int kBarriersAt = kStartAt + kStartBytes;
static_assert(kBarriersAt + 2 * kStages * 8 <= QDIT_SHARED_BYTES);
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : kWarpgroups == 3 ? 32 : 24;
// Named barriers: 1 … a warpgroup's own, then its turn, or two for the parts of each column's sums.
constexpr int kTurnBarrier = 1 + kWarpgroups;
static_assert(kSplits == 1 || (!kInTurn && !kPipelined && kStages >= 2 * kSplits && (!kPromotes || kSegments * kSegmentPanels == 1)));

struct Place {
    int stage = 0;
    uint32 phase = 0;
    __device__ __forceinline__ void next() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }

    __device__ __forceinline__ void skip(int panels) {
        stage += panels;
        if (stage >= kStages) stage -= kStages, phase ^= 1;
    }
};

// A tile by the places of its tokens and channels; the next one of this block without a division.
struct TilePlace {
    int token, channel;            // tiles
    int token_step, channel_step;  // of `gridDim.x` tiles
    int channel_tiles;

    __device__ __forceinline__ TilePlace(int first, int step, int across)
        : token(first / across), channel(first % across), token_step(step / across), channel_step(step % across),
          channel_tiles(across) {}

    __device__ __forceinline__ void next() {
        token += token_step, channel += channel_step;
        if (channel >= channel_tiles) channel -= channel_tiles, ++token;
    }
};
