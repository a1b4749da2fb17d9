// Hopper's product: one tile's sums over all panels, in the four orders of multiplying and promoting that schemes and tiles ask for.
#pragma once

#include "hopper_consumer.cuh"

// All segments within one panel, one after the other. `meanwhile` is done while the last one's products are on their way,
// `afterwards` once they are there, before their promotion.
template <int Part, typename Meanwhile, typename Afterwards>
__device__ __forceinline__ void multiply_segments(
    float (&acc)[kAccumulators], int (&d)[kAccumulators], const uint32 (&a)[4][4], const Consumer& own, const Place& place,
    Meanwhile meanwhile, Afterwards afterwards) {
    if constexpr (Part < kSegments) {
        constexpr int kSteps = 4 / kSegments;
        // After the instructions: before them the assembler spreads the loads between the first one and the others.
        own.issue<Part * kSteps, (Part + 1) * kSteps>(d, a, place, false);
        Segment segment;
        segment.load(own, place, Part);
        if constexpr (Part + 1 == kSegments) meanwhile();
        wgmma_wait<0>();
        if constexpr (Part + 1 == kSegments) afterwards();
        segment.promote_into(acc, d, own);
        multiply_segments<Part + 1>(acc, d, a, own, place, meanwhile, afterwards);
    }
}

// Whether two panels' register operands have room, so that a panel's instructions follow the last one's at once.
constexpr bool kOperandsAhead = !kFourBits || kWarpgroups < 3;

// A tile's integer sums over all panels where no scale changes along k.
__device__ __forceinline__ void accumulate_plain(
    int (&d)[kAccumulators], const Consumer& own, Place& place) {
    PackedPanel packed;
    uint32 a[1 + kOperandsAhead][4][4];
    const auto fetch = [&](const Place& at) {
        own.wait(at);
        own.load(packed, at);
    };
    const auto begin = [&](uint32(&operand)[4][4], const Place& at, bool goes_on) {
        own.unpack(operand, packed);
        own.issue<0, 4>(d, operand, at, goes_on);
    };
    const auto follow = [&](uint32(&operand)[4][4]) {
        const Place next = own.after(place, false);
        fetch(next);
        if constexpr (kOperandsAhead) {
            begin(operand, next, true);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
            begin(operand, next, true);
        }
        own.done(place);
        place = next;
    };
    fetch(place);
    begin(a[0], place, false);
    int left = own.count() - 1;
    for (; left > 1; left -= 2) {
        follow(a[kOperandsAhead]);
        follow(a[0]);
    }
    if (left > 0) follow(a[kOperandsAhead]);
    wgmma_wait<0>();
    own.done(place);
    place = own.after(place, true);
}

// One segment a panel, and one panel in flight: each panel's instructions are given as soon as the last one's sums are promoted.
constexpr bool kOneAhead = kPromotes && !kPipelined && kSegments == 1 && kSegmentPanels == 1;

__device__ __forceinline__ void begin_panel(
    int (&d)[kAccumulators], uint32 (&a)[4][4], const Consumer& own, const Place& place) {
    own.wait(place);
    own.unpack(a, place);
    own.issue<0, 4>(d, a, place, false);
}

// A tile's sums over all panels. Its first panel has begun, and the next tile's first one has in the end, where one `follows`:
// the matrix unit works on it while this tile is written. Where none does, the instructions are given all the same, on whatever
// is there: on a condition, the assembler would wait for them at once.
__device__ __forceinline__ void accumulate_one_ahead(
    float (&acc)[kAccumulators], int (&d)[kAccumulators], uint32 (&a)[4][4], const Consumer& own, Place& place,
    bool follows) {
    // counted down: a bound would be loaded again in every round, between the first matrix instruction and the others
    int left = own.count();
    do {
        const bool more = left > 1 || follows;
        const Place next = own.after(place, left == 1);
        Segment segment;
        segment.load(own, place, 0);
        if (more) own.wait(next);
        wgmma_wait<0>();
        PackedPanel packed;
        own.load(packed, next);
        const uint32 seen = segment.promote_into(acc, d, own);
        own.unpack(a, packed);
        own.issue<0, 4>(d, a, next, false);
        own.done_after(place, seen);
        place = next;
    } while (--left > 0);
}

// A tile's sums over all panels where scales change within a panel, or after several.
__device__ __forceinline__ void accumulate(
    float (&acc)[kAccumulators], int (&d)[kAccumulators], const Consumer& own, Place& place) {
    PackedPanel packed;
    own.wait(place);
    own.load(packed, place);
    // counted down: a bound would be loaded again in every round, between the first matrix instruction and the others
    for (int left = own.panels; left > 0; --left) {
        const Place next = own.after(place, left == 1);
        uint32 a[4][4];
        own.unpack(a, packed);
        const auto meet_next = [&]() {
            if (left > 1) own.wait(next);
        };
        // 4-bit weights of the next panel are read before this one's sums are promoted, and unpacked afterwards
        const auto load_next = [&]() {
            if (left > 1) own.load(packed, next);
        };
        if constexpr (kSegmentPanels > 1) {
            const int panel = own.panels - left;
            own.issue<0, 4>(d, a, place, panel % kSegmentPanels > 0);
            Segment segment;
            segment.load(own, place, 0);
            meet_next();
            wgmma_wait<0>();
            load_next();
            if (panel % kSegmentPanels == kSegmentPanels - 1) segment.promote_into(acc, d, own);
        } else {
            multiply_segments<0>(acc, d, a, own, place, meet_next, load_next);
        }
        own.done(place);
        place = next;
    }
}

// The same with one panel in flight while another one is promoted: segments of one panel each.
__device__ __forceinline__ void accumulate_pipelined(
    float (&acc)[kAccumulators], const Consumer& own, Place& place) {
    int d[2][kAccumulators];
    uint32 a[2][4][4];
    Place ahead = place;
    const auto issue = [&](int(&to)[kAccumulators], uint32(&operand)[4][4]) {
        own.wait(ahead);
        own.unpack(operand, ahead);
        own.issue<0, 4>(to, operand, ahead, false);
        ahead.next();
    };
    const auto retire = [&](Segment& segment, const int(&from)[kAccumulators]) {
        own.done_after(place, segment.promote_into(acc, from, own));
        place.next();
    };
    const auto both = [&](int(&to)[kAccumulators], uint32(&operand)[4][4], const int(&from)[kAccumulators]) {
        Segment segment;
        segment.load(own, place, 0);
        issue(to, operand);
        wgmma_wait<1>();
        retire(segment, from);
    };
    const auto last = [&](const int(&from)[kAccumulators]) {
        Segment segment;
        segment.load(own, place, 0);
        wgmma_wait<0>();
        retire(segment, from);
    };
    issue(d[0], a[0]);
    int panel = 1;
    for (; panel + 1 < own.panels; panel += 2) {
        both(d[1], a[1], d[0]);
        both(d[0], a[0], d[1]);
    }
    if (panel < own.panels) {
        both(d[1], a[1], d[0]);
        last(d[1]);
    } else {
        last(d[0]);
    }
}

// All parts' sums into the first one's registers, by shared memory. Returns whether this warpgroup has them.
template <typename Sum>
__device__ __forceinline__ bool gather(Sum (&sums)[kAccumulators], const Consumer& own) {
    if constexpr (kSplits > 1) {
        const int free = kTurnBarrier + 2 * own.column, filled = free + 1;
        Sum* parts = reinterpret_cast<Sum*>(own.shared + kPartsAt + own.column * (kSplits - 1) * kPartBytes) + own.thread;
        if (own.part > 0) {
            barrier_sync(free, 128 * kSplits);
#pragma unroll
            for (int i = 0; i < kAccumulators; ++i) parts[((own.part - 1) * kAccumulators + i) * 128] = sums[i];
            barrier_join(filled, 128 * kSplits);
            return false;
        }
        barrier_sync(filled, 128 * kSplits);
#pragma unroll
        for (int part = 0; part < kSplits - 1; ++part)
#pragma unroll
            for (int i = 0; i < kAccumulators; ++i) sums[i] += parts[(part * kAccumulators + i) * 128];
        barrier_join(free, 128 * kSplits);
    }
    return true;
}
