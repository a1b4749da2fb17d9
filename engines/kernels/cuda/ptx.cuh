// Thin wrappers of the PTX instructions that the kernels are made of (PTX ISA 8.0, sm_80 and sm_90a).
// No CUDA header is included, so that NVRTC needs none.
#pragma once

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
    return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void load_matrix_x4(uint32 (&r)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ uint32 most_of_warp(uint32 value) {
    uint32 most;
    asm volatile("redux.sync.max.u32 %0, %1, 0xFFFFFFFF;" : "=r"(most) : "r"(value));
    return most;
}

// A value that stays in its register: from the thread's number the assembler would make it again in every round, and wait for that.
__device__ __forceinline__ int held(int value) { return __shfl_sync(0xFFFFFFFFu, value, threadIdx.x % 32); }

__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_init(uint32 barrier, uint32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialized barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Makes this thread's stores to shared memory visible to the matrix unit.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// This thread's loads are done before what follows.
__device__ __forceinline__ void fence_loads() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }

__device__ __forceinline__ void barrier_expect(uint32 barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32 barrier, uint32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nRETRY:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\nbra RETRY;\nDONE:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// The same by lane 0 alone, once `seen` is there: zero whatever it is, which the assembler does not find out.
__device__ __forceinline__ void barrier_arrive_after(uint32 barrier, int lane, uint32 seen) {
    asm volatile(
        "{\n.reg .pred first;\n.reg .u32 nothing;\npopc.b32 nothing, %2;\nshr.u32 nothing, nothing, 6;\n"
        "add.u32 nothing, nothing, %0;\nsetp.eq.u32 first, %1, 0;\n"
        "@first mbarrier.arrive.shared::cta.b64 _, [nothing];\n}" ::"r"(barrier),
        "r"(lane), "r"(seen)
        : "memory");
}

// Copy `bytes` (a multiple of 16, both sides aligned to 16) into this block's shared memory.
__device__ __forceinline__ void bulk_copy(uint32 to, const void* from, uint32 bytes, uint32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

// Whether this is the one lane that a warp, all of whose lanes are here, has chosen. The assembler knows that what follows is one
// lane's work, and keeps its addresses in uniform registers, where a copy wants them.
__device__ __forceinline__ bool elected() {
    uint32 chosen;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(chosen));
    return chosen != 0;
}

// Programmatic dependent launch: lets the next kernel of the stream start its preamble; waits until the last one
// has finished, before anything that it wrote is read and anything that it reads is written.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void wait_for_last_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Takes its place among `threads` that meet at a named barrier, without waiting for the others.
__device__ __forceinline__ void barrier_join(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

template <int Registers>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Matrix descriptor of a K-major operand in panels of 128 bytes a row with the 128-byte swizzle: atoms of 8 rows,
// 1024 bytes apart (PTX ISA, 'Matrix Descriptor Format'). Addresses count 16 bytes.
constexpr uint32 kDescriptorHigh = 1u << 30 | 1024 >> 4;

__device__ __forceinline__ uint32 descriptor_low(uint32 address) { return 1u << 16 | (address & 0x3FFFF) >> 4; }

// The same of an operand whose rows are all alike, without a swizzle: 128 bytes of eight rows for the first 16 k, 128 for the
// other 16, and every eight rows at the same place.
constexpr uint32 kStartHigh = 0;

__device__ __forceinline__ uint32 start_descriptor_low(uint32 address) { return (128u >> 4) << 16 | (address & 0x3FFFF) >> 4; }

__device__ __forceinline__ void store_matrix_x4_transposed(uint32 address, const uint32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     address),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
#else
__device__ __forceinline__ void launch_dependents() {}
__device__ __forceinline__ void wait_for_last_kernel() {}
#endif
