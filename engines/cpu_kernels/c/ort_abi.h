/* What this library uses of ONNX Runtime's C interface, which is stable across versions: a table of
 * functions that only grows at its end, so a function keeps its slot, and a struct that describes a
 * custom operator, whose later members are read only where `version` says that they are there.
 *
 * The wheel of ONNX Runtime has no header, so the few facts needed stand here: slots and argument
 * types as of its API version 18 (releases from 1.18 on). */
#ifndef QDIT_ORT_ABI_H
#define QDIT_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

/* The oldest API version with all that is called below; ort_kernel_allocator is the newest of it. */
#define ORT_ABI_VERSION 18

typedef struct OrtStatus OrtStatus; /* NULL: no error */
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtShape OrtShape; /* a tensor's type and shape */
typedef struct OrtValue OrtValue;
typedef struct OrtAllocator OrtAllocator;

typedef void (*OrtFunction)(void);

typedef struct {
    OrtFunction slot[279]; /* as many as version 18 has, of which we look at no more */
} OrtApi;

typedef struct {
    const OrtApi *(*get_api)(uint32_t version); /* NULL where the runtime is older than that */
    const char *(*get_version)(void);
} OrtApiBase;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_FLOAT = 1, ORT_UINT8 = 2 };       /* element types */
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 }; /* characteristics of inputs and outputs */
enum { ORT_DEFAULT_MEMORY = 0 };

typedef struct OrtCustomOp OrtCustomOp;

/* Members in ONNX Runtime's order. Those of type OrtFunction are left NULL here. */
struct OrtCustomOp {
    uint32_t version;
    OrtFunction create_without_status;
    const char *(*get_name)(const OrtCustomOp *);
    const char *(*get_provider)(const OrtCustomOp *);
    int (*get_input_type)(const OrtCustomOp *, size_t index);
    size_t (*get_input_count)(const OrtCustomOp *);
    int (*get_output_type)(const OrtCustomOp *, size_t index);
    size_t (*get_output_count)(const OrtCustomOp *);
    OrtFunction compute_without_status;
    void (*destroy)(void *kernel);
    int (*get_input_characteristic)(const OrtCustomOp *, size_t index);
    int (*get_output_characteristic)(const OrtCustomOp *, size_t index);
    int (*get_input_memory)(const OrtCustomOp *, size_t index);
    int (*get_variadic_input_count)(const OrtCustomOp *);
    int (*get_variadic_input_homogeneity)(const OrtCustomOp *);
    int (*get_variadic_output_count)(const OrtCustomOp *);
    int (*get_variadic_output_homogeneity)(const OrtCustomOp *);
    OrtStatus *(*create)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **kernel);
    OrtStatus *(*compute)(void *kernel, OrtKernelContext *);
    OrtFunction infer_shape;
    int (*get_first_version)(const OrtCustomOp *);
    int (*get_last_version)(const OrtCustomOp *);
    OrtFunction get_inplace, release_inplace, get_aliases, release_aliases;
};

/* A call of slot N as a function of that type. */
#define ORT_CALL(api, n, type) ((type)(api)->slot[n])

static inline OrtStatus *ort_status(const OrtApi *api, int code, const char *message) {
    return ORT_CALL(api, 0, OrtStatus *(*)(int, const char *))(code, message);
}

static inline void ort_release_status(const OrtApi *api, OrtStatus *status) {
    ORT_CALL(api, 93, void (*)(OrtStatus *))(status);
}

static inline OrtStatus *ort_create_domain(const OrtApi *api, const char *name,
                                           OrtCustomOpDomain **domain) {
    return ORT_CALL(api, 26, OrtStatus *(*)(const char *, OrtCustomOpDomain **))(name, domain);
}

static inline OrtStatus *ort_add_operator(const OrtApi *api, OrtCustomOpDomain *domain,
                                          const OrtCustomOp *op) {
    return ORT_CALL(api, 27, OrtStatus *(*)(OrtCustomOpDomain *, const OrtCustomOp *))(domain, op);
}

static inline OrtStatus *ort_add_domain(const OrtApi *api, OrtSessionOptions *options,
                                        OrtCustomOpDomain *domain) {
    return ORT_CALL(api, 28, OrtStatus *(*)(OrtSessionOptions *, OrtCustomOpDomain *))(options,
                                                                                       domain);
}

static inline void ort_release_domain(const OrtApi *api, OrtCustomOpDomain *domain) {
    ORT_CALL(api, 101, void (*)(OrtCustomOpDomain *))(domain);
}

/* A tensor's values. The table's one function for it is for writing, too. */
static inline OrtStatus *ort_data(const OrtApi *api, const OrtValue *value, void **data) {
    return ORT_CALL(api, 51, OrtStatus *(*)(const OrtValue *, void **))(value, data);
}

static inline OrtStatus *ort_get_shape(const OrtApi *api, const OrtValue *value, OrtShape **shape) {
    return ORT_CALL(api, 65, OrtStatus *(*)(const OrtValue *, OrtShape **))(value, shape);
}

static inline OrtStatus *ort_rank(const OrtApi *api, const OrtShape *shape, size_t *rank) {
    return ORT_CALL(api, 61, OrtStatus *(*)(const OrtShape *, size_t *))(shape, rank);
}

static inline OrtStatus *ort_dims(const OrtApi *api, const OrtShape *shape, int64_t *dims,
                                  size_t rank) {
    return ORT_CALL(api, 62, OrtStatus *(*)(const OrtShape *, int64_t *, size_t))(shape, dims,
                                                                                  rank);
}

static inline OrtStatus *ort_size(const OrtApi *api, const OrtShape *shape, size_t *size) {
    return ORT_CALL(api, 64, OrtStatus *(*)(const OrtShape *, size_t *))(shape, size);
}

static inline void ort_release_shape(const OrtApi *api, OrtShape *shape) {
    ORT_CALL(api, 99, void (*)(OrtShape *))(shape);
}

static inline OrtStatus *ort_int_attribute(const OrtApi *api, const OrtKernelInfo *info,
                                           const char *name, int64_t *value) {
    return ORT_CALL(api, 86, OrtStatus *(*)(const OrtKernelInfo *, const char *, int64_t *))(
        info, name, value);
}

/* How many inputs the node lists, empty ones among them. */
static inline OrtStatus *ort_input_count(const OrtApi *api, const OrtKernelInfo *info,
                                         size_t *count) {
    return ORT_CALL(api, 230, OrtStatus *(*)(const OrtKernelInfo *, size_t *))(info, count);
}

/* With `name` NULL only its size with the closing zero; an empty input's is 1. */
static inline OrtStatus *ort_input_name(const OrtApi *api, const OrtKernelInfo *info, size_t index,
                                        char *name, size_t *size) {
    return ORT_CALL(api, 232, OrtStatus *(*)(const OrtKernelInfo *, size_t, char *, size_t *))(
        info, index, name, size);
}

/* The session's own tensor, which lives as long as it does. */
static inline OrtStatus *ort_constant(const OrtApi *api, const OrtKernelInfo *info, size_t index,
                                      int *is_constant, const OrtValue **value) {
    return ORT_CALL(api, 249,
                    OrtStatus *(*)(const OrtKernelInfo *, size_t, int *, const OrtValue **))(
        info, index, is_constant, value);
}

static inline OrtStatus *ort_input(const OrtApi *api, const OrtKernelContext *context, size_t index,
                                   const OrtValue **value) {
    return ORT_CALL(api, 90, OrtStatus *(*)(const OrtKernelContext *, size_t, const OrtValue **))(
        context, index, value);
}

static inline OrtStatus *ort_output(const OrtApi *api, OrtKernelContext *context, size_t index,
                                    const int64_t *dims, size_t rank, OrtValue **value) {
    return ORT_CALL(
        api, 91,
        OrtStatus *(*)(OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **))(
        context, index, dims, rank, value);
}

/* `run` for 0 ... total - 1 on the session's own threads; `batches` 0 leaves the split to it. */
static inline OrtStatus *ort_parallel(const OrtApi *api, const OrtKernelContext *context,
                                      void (*run)(void *, size_t), size_t total, size_t batches,
                                      void *data) {
    return ORT_CALL(api, 274,
                    OrtStatus *(*)(const OrtKernelContext *, void (*)(void *, size_t), size_t,
                                   size_t, void *))(context, run, total, batches, data);
}

/* What the session's tensors come from; to be released. */
static inline OrtStatus *ort_kernel_allocator(const OrtApi *api, const OrtKernelInfo *info,
                                              OrtAllocator **allocator) {
    return ORT_CALL(api, 278, OrtStatus *(*)(const OrtKernelInfo *, int, OrtAllocator **))(
        info, ORT_DEFAULT_MEMORY, allocator);
}

static inline OrtStatus *ort_allocate(const OrtApi *api, OrtAllocator *allocator, size_t bytes,
                                      void **memory) {
    return ORT_CALL(api, 75, OrtStatus *(*)(OrtAllocator *, size_t, void **))(allocator, bytes,
                                                                              memory);
}

static inline OrtStatus *ort_free(const OrtApi *api, OrtAllocator *allocator, void *memory) {
    return ORT_CALL(api, 76, OrtStatus *(*)(OrtAllocator *, void *))(allocator, memory);
}

static inline void ort_release_allocator(const OrtApi *api, OrtAllocator *allocator) {
    ORT_CALL(api, 132, void (*)(OrtAllocator *))(allocator);
}

#endif
