// Hopper's product: what one warpgroup does with a stage. It multiplies, reads scales and 4-bit weights, and lets go.
#pragma once

#include "hopper_stages.cuh"
#include "wgmma.cuh"  // generated for QDIT_TILE_TOKENS: wgmma_shared, wgmma_registers, wgmma_start

// The scales of one segment of the stage at `bytes`.
__device__ __forceinline__ Scales scales_at(const uint8* bytes, int part) {
    const auto tokens_at = [&](int at) { return reinterpret_cast<const float*>(bytes + at) + part * kTokens; };
    const auto channels_at = [&](int at) { return reinterpret_cast<const float*>(bytes + at) + part * kChannels; };
    return {tokens_at(0), channels_at(kChannelScaleAt), tokens_at(kTokenSumAt), channels_at(kChannelZeroAt),
            tokens_at(kTokenZeroAt), channels_at(kChannelSumAt)};
}

__device__ __forceinline__ const uint8* multipliers_at(const uint8* bytes, int part) {
    return bytes + kMultipliersAt + part * kChannels;
}

// All of a panel's register operands before its first instruction: one that is made later would make the assembler wait for
// the instructions before it.
__device__ __forceinline__ void settle(uint32 (&a)[4][4]) {
#pragma unroll
    for (int step = 0; step < 4; ++step)
        asm volatile("" : "+r"(a[step][0]), "+r"(a[step][1]), "+r"(a[step][2]), "+r"(a[step][3]));
}

// The operand, 256 bytes, whose product with itself sets all sums to kStart: 32 k of 255, one of which is 241 where the constant
// is to have 13 bits. Eight rows of 16 k, then eight of the other 16.
__device__ __forceinline__ void write_start(uint8* shared, int thread) {
    if constexpr (kStarts) {
        const bool last = thread < 32 && (thread & 3) == 3;  // k = 12 … 15
        if (thread < 64)
            reinterpret_cast<uint32*>(shared + kStartAt)[thread] = kShiftScales && last ? 0xF1FFFFFFu : 0xFFFFFFFFu;
        fence_shared();
    }
}

// Matrix instructions From … To - 1 of one panel into d; the first one starts anew unless `accumulate`.
// Descriptors count 16 bytes: a step of 32 bytes further on is 2 more.
template <int From, int To>
__device__ __forceinline__ void multiply(
    int (&d)[kAccumulators], uint32 start, uint32 weights, uint32 inputs, const uint32 (&a)[4][4], bool accumulate) {
    wgmma_fence();
    if constexpr (kStarts) wgmma_start(d, start, start, 0);
#pragma unroll
    for (int step = From; step < To; ++step) {
        const int keep = kStarts || step > From || accumulate;
        if constexpr (kFourBits) {
            wgmma_registers(d, a[step], inputs + 2 * step, keep);
        } else {
            wgmma_shared(d, weights + 2 * step, inputs + 2 * step, keep);
        }
        if (kTurns == 2 && step + 2 == To) wgmma_commit();
    }
    wgmma_commit();
}

// This warpgroup's turn begins, and ends once the next one may follow.
__device__ __forceinline__ void take_turn(int warpgroup) {
    if constexpr (kInTurn) barrier_sync(kTurnBarrier + warpgroup, 256);
}

__device__ __forceinline__ void pass_turn(int warpgroup) {
    if constexpr (kInTurn)
        barrier_join(kTurnBarrier + (warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1), 256);
}

// A thread's part of a panel's 4-bit weights as they are stored: 32 bytes of the warpgroup's 4096, and the multipliers of its
// two channels.
struct PackedPanel {
    uint4 words[2];
    uint32 multipliers[kSegments][2];
};

__device__ __forceinline__ void load_panel(
    PackedPanel& packed, const uint8* weights, const uint8* multipliers, int thread, int channel) {
    packed.words[0] = reinterpret_cast<const uint4*>(weights)[thread];
    packed.words[1] = reinterpret_cast<const uint4*>(weights)[128 + thread];
    if constexpr (kMultipliers) {
#pragma unroll
        for (int part = 0; part < kSegments; ++part)
            packed.multipliers[part][0] = multipliers[part * kChannels + channel],
            packed.multipliers[part][1] = multipliers[part * kChannels + channel + 8];
    }
}

// All four steps' register operands.
__device__ __forceinline__ void unpack_panel(uint32 (&a)[4][4], const PackedPanel& packed) {
    const uint4 &first = packed.words[0], &second = packed.words[1];
    const uint32 words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const int part = step * kSegments / 4;
        unpack_nibbles(
            a[step], words[2 * step], words[2 * step + 1], packed.multipliers[part][0], packed.multipliers[part][1]);
    }
}

// This warp has read all it needs of a stage. Its loads may still be on their way, and the copy engine would overtake them: without
// the fence, a panel in some million was promoted by the scales of the one that is copied there next.
__device__ __forceinline__ void release(uint32 empty, int lane) {
    if constexpr (kPromotes) fence_loads();
    __syncwarp();
    if (lane == 0) barrier_arrive(empty);
}

// The same without a fence, where `seen` depends on all that was loaded from the stage.
__device__ __forceinline__ void release_after(uint32 empty, int lane, uint32 seen) {
    __syncwarp();
    barrier_arrive_after(empty, lane, seen);
}

// The transposed tile into rows of tokens.
__device__ __forceinline__ void stage(uint8* staging, const float (&acc)[kAccumulators], int warp, int lane) {
    const int matrix = lane >> 3, row = lane & 7;
    const uint32 base = shared_address(staging) + ((matrix >> 1) * 8 + row) * kStagingRow + ((matrix & 1) * 8 + warp * 16) * 2;
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
        const uint32 packed[4] = {
            pack_halves(acc[4 * j], acc[4 * j + 1]), pack_halves(acc[4 * j + 2], acc[4 * j + 3]),
            pack_halves(acc[4 * j + 4], acc[4 * j + 5]), pack_halves(acc[4 * j + 6], acc[4 * j + 7])};
        store_matrix_x4_transposed(base + j * 8 * kStagingRow, packed);
    }
}

// What stays the same for a consumer's thread.
struct Consumer {
    uint8* shared;
    uint32 full;       // the first stage's barriers
    uint32 empty;
    uint32 weights;    // lower words of the first stage's descriptors
    uint32 inputs;
    uint32 start;      // of what sums start from, the same for all stages
    int warpgroup;
    int column;        // whose channels it has
    int part;          // of the panels, every kSplits-th from here on
    int panels;        // of a tile
    int thread;        // of the warpgroup
    int lane;
    int row;           // this thread's lower channel in the tile

    __device__ __forceinline__ const uint8* scales(const Place& place) const {
        return shared + kScalesAt + place.stage * kScaleBytes;
    }

    __device__ __forceinline__ uint32 offset(const Place& place) const {
        return place.stage * ((kWeightBytes + kInputBytes) >> 4);
    }

    __device__ __forceinline__ void load(PackedPanel& packed, const Place& place) const {
        if constexpr (kFourBits)
            load_panel(packed, shared + place.stage * (kWeightBytes + kInputBytes) + column * 4096,
                       multipliers_at(scales(place), 0), thread, row);
    }

    __device__ __forceinline__ void unpack(uint32 (&a)[4][4], const PackedPanel& packed) const {
        if constexpr (kFourBits) {
            unpack_panel(a, packed);
            settle(a);
        }
    }

    __device__ __forceinline__ int count() const {
        return kSplits == 1 ? panels : (panels - part + kSplits - 1) / kSplits;
    }

    // The place of this warpgroup's next panel: of this tile or, after its `last` one, of the next.
    __device__ __forceinline__ Place after(const Place& place, bool last) const {
        Place next = place;
        if constexpr (kSplits == 1) {
            next.next();
        } else {
            next.skip(last ? panels - (count() - 1) * kSplits : kSplits);
        }
        return next;
    }

    // At once, where nothing else can be done meanwhile.
    __device__ __forceinline__ void unpack(uint32 (&a)[4][4], const Place& place) const {
        PackedPanel packed;
        load(packed, place);
        unpack(a, packed);
    }

    template <int From, int To>
    __device__ __forceinline__ void issue(
        int (&d)[kAccumulators], const uint32 (&a)[4][4], const Place& place, bool accumulate) const {
        take_turn(warpgroup);
        multiply<From, To>(d, start, weights + offset(place), inputs + offset(place), a, accumulate);
        if constexpr (kTurns == 2) wgmma_wait<1>();
        pass_turn(warpgroup);
    }

    __device__ __forceinline__ void wait(const Place& place) const { barrier_wait(full + place.stage * 8, place.phase); }

    __device__ __forceinline__ void done(const Place& place) const { release(empty + place.stage * 8, lane); }

    __device__ __forceinline__ void done_after(const Place& place, uint32 seen) const {
        release_after(empty + place.stage * 8, lane, seen);
    }
};

// One segment's scales: in registers from the start, or token by token where there is no room.
struct Segment {
    Scales scales;
    OwnScales own;

    __device__ __forceinline__ void load(const Consumer& consumer, const Place& place, int part) {
        scales = scales_at(consumer.scales(place), part);
        load_channels(own, scales, consumer.row);
        load_tokens(own, scales, consumer.lane);
    }

    __device__ __forceinline__ uint32 promote_into(
        float (&acc)[kAccumulators], const int (&d)[kAccumulators], const Consumer& consumer) {
        return promote(acc, d, own, scales, consumer.lane);
    }
};
