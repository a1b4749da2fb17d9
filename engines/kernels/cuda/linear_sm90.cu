// y = (x scale_x) (w scale_w)ᵀ on Hopper's integer matrix units: warpgroup instructions on tiles that one
// warpgroup copies ahead in bulk, while the others multiply and promote in turn.
//
// Every operand lies in device memory as it will lie in shared memory, so that no tensor map is needed
// (a TensorRT plugin could not pass one): activations [K/128, rows, 128], 8-bit weights likewise,
// 4-bit weights [K/128, N/64, 4096 bytes] in the order of the register operand (layouts.py).
#define QDIT_HOPPER 1
#include "linear.cuh"
#include "wgmma.cuh"  // generated for QDIT_TILE_TOKENS: wgmma_shared, wgmma_registers, wgmma_start

constexpr int kStages = QDIT_STAGES;
// Warpgroups use the matrix unit in turn, so that one promotes while another one multiplies. Left to themselves they
// share it evenly, finish together, and then leave it idle together. 1: a turn ends when its instructions are issued;
// 2: when all but the last one have finished.
constexpr int kTurns = QDIT_TURNS;
constexpr bool kInTurn = kTurns > 0;
// A warpgroup issues the next panel's matrix instructions before it promotes this one's sums.
constexpr bool kPipelined = QDIT_PIPELINED;
constexpr int kWeightBytes = kFourBits ? kChannels * 64 : kChannels * 128;
constexpr int kInputBytes = kTokens * kPanel;
constexpr int kTokenScaleBytes = kSegments * kTokens * 4;
constexpr int kChannelScaleBytes = kSegments * kChannels * 4;
constexpr int kMultiplierBytes = kSegments * kChannels;
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

struct Problem {
    const uint8* x;
    const float* token_scale;
    const float* token_sum;
    const float* token_zero;
    const uint8* w;
    const float* channel_scale;
    const float* channel_zero;
    const float* channel_sum;
    const uint8* multiplier;
    int panels;          // K / 128
    int rows;            // tokens rounded up to a multiple of 8
    int weight_rows;     // channels rounded up to a multiple of 64
    int token_group;     // segments that share a token scale
    int channel_group;   // segments that share a channel scale or multiplier
    int tiles;
    int channel_tiles;   // along N
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
    int warpgroup;
    int column;        // whose channels it has
    int part;          // of the panels, every kSplits-th from here on
    int panels;        // of a tile
    int thread;        // of the warpgroup
    int lane;
    int row;           // this thread's lower channel in the tile
    uint32 start;      // likewise, of what sums start from

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
    float (&acc)[kAccumulators], int (&d)[kAccumulators], const Consumer& own, Place& place, int panels) {
    PackedPanel packed;
    own.wait(place);
    own.load(packed, place);
    // counted down: a bound would be loaded again in every round, between the first matrix instruction and the others
    for (int left = panels; left > 0; --left) {
        Place next = place;
        next.next();
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
            const int panel = panels - left;
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
    float (&acc)[kAccumulators], const Consumer& own, Place& place, int panels) {
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
    for (; panel + 1 < panels; panel += 2) {
        both(d[1], a[1], d[0]);
        both(d[0], a[0], d[1]);
    }
    if (panel < panels) {
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

extern "C" __global__ void __launch_bounds__(kThreads, 1) qdit_linear(
    const uint8* x, const float* token_scale, const float* token_sum, const float* token_zero, const uint8* w,
    const float* channel_scale, const float* channel_zero, const float* channel_sum, const uint8* multiplier,
    const uint16* bias, const uint16* residual, const uint16* gate, int tokens, int channels, int panels, int rows,
    int weight_rows, int token_group, int channel_group, int gate_stride, int image_tokens, uint16* out) {
    extern __shared__ __align__(1024) uint8 shared[];
    const uint32 base = shared_address(shared);
    const uint32 full = base + kBarriersAt, empty = full + kStages * 8;
    // the same for a whole warp, and the compiler is to know it
    const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    const int channel_tiles = (channels + kChannels - 1) / kChannels;
    const int tiles = (tokens + kTokens - 1) / kTokens * channel_tiles;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            barrier_init(full + stage * 8, kCopyingWarps);
            barrier_init(empty + stage * 8, 4 * kColumns);
        }
        fence_barrier_init();
    }
    write_start(shared, threadIdx.x);
    __syncthreads();
    launch_dependents();

    if (warpgroup == kWarpgroups) {
        lower_registers<kProducerRegisters>();
        const Problem p{x, token_scale, token_sum, token_zero, w, channel_scale, channel_zero, channel_sum,
                        multiplier, panels, rows, weight_rows, token_group, channel_group, tiles, channel_tiles};
        produce_all(p, base, __shfl_sync(0xFFFFFFFFu, thread / 32, 0));
    } else {
        raise_registers<kConsumerRegisters>();
        wait_for_last_kernel();
        const int warp = thread / 32, lane = held(thread % 32);
        const int column = warpgroup / kSplits, part = warpgroup % kSplits;
        const Consumer own{shared, full, empty, descriptor_low(base + column * 8192),
                           descriptor_low(base + kWeightBytes), warpgroup, column, part, panels, thread, lane,
                           held(column * 64 + warp * 16 + lane / 4), start_descriptor_low(base + kStartAt)};
        uint8* staging = shared + kStagingAt + column * kStagingBytes;
        const Output output{bias, token_scale, channel_scale, residual, gate, gate_stride, image_tokens,
                            tokens, channels, out};
        if (kInTurn && warpgroup + 1 == kWarpgroups) pass_turn(warpgroup);  // the first turn is warpgroup 0's
        if (kSplits > 1 && part == 0) barrier_join(kTurnBarrier + 2 * column, 128 * kSplits);
        Place place;
        place.skip(part);
        TilePlace at(blockIdx.x, gridDim.x, channel_tiles);
        int d[kAccumulators];
        uint32 a[4][4];
        if constexpr (kOneAhead) begin_panel(d, a, own, place);
        int tile = blockIdx.x;
        do {
            const int token0 = at.token * kTokens;
            const int channel0 = at.channel * kChannels + column * 64;
#if QDIT_GATED
            for (int at = thread; at < kTokens; at += 128)
                if (token0 + at < tokens && channel0 < channels)
                    prefetch(residual + static_cast<long long>(token0 + at) * channels + channel0);
#endif
            float acc[kAccumulators];
            if constexpr (kPromotes) {
#pragma unroll
                for (int i = 0; i < kAccumulators; ++i) acc[i] = 0.0f;
            }
            bool whole = true;  // whether this warpgroup has the tile's sums in the end
            if constexpr (kPipelined) {
                accumulate_pipelined(acc, own, place, panels);
            } else if constexpr (kOneAhead) {
                accumulate_one_ahead(acc, d, a, own, place, tile + gridDim.x < tiles);
                whole = gather(acc, own);
            } else if constexpr (kPromotes) {
                accumulate(acc, d, own, place, panels);
            } else {
                accumulate_plain(d, own, place);
                whole = gather(d, own);
                if (whole) convert_all(acc, d);
            }
            if (whole) {
                finish(acc, output, token0, channel0, warp, lane);
                barrier_sync(1 + warpgroup, 128);  // the last tile has been read from the staging rows
                stage(staging, acc, warp, lane);
                barrier_sync(1 + warpgroup, 128);
                store_tile(staging, output, token0, channel0, thread);
            }
            tile += gridDim.x, at.next();
        } while (tile < tiles);
        if constexpr (kOneAhead) wgmma_wait<0>();
    }
}
