/* The operator qdit.cpu::GroupwiseMatMul for ONNX Runtime: a linear of product.h as a node.
 *
 *   A [..., width] float, B, scales, zero_points?, bias?, signs?  ->  Y [..., N] float
 *
 * Inputs 1 to 4 and the attributes K, N, bits and block_size are those of com.microsoft's
 * MatMulNBits. The linear's inputs are the K channels of A from `first` (0) on, of `width` (K); the
 * quantized groups of A are multiplied by `signs` [width/block_size], +1 or -1. All inputs but A
 * are constants: the kernel reads them where the session keeps them. Jobs run on the session's own
 * threads. Scratch comes from the allocator of the session's tensors, call by call, so that calls
 * may overlap; its arena hands the same warm memory out again. */
#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "node.h"

#define EXPORTED __attribute__((visibility("default")))
#define ALIGNMENT 64
#define MOST_DIMENSIONS 16

typedef struct {
    const OrtApi *api;
    OrtAllocator *allocator;
    QditLinear linear;
    int64_t first; /* the channel of A that is the linear's first one */
} Kernel;

/* One call, as its jobs see it. */
typedef struct {
    const QditLinear *linear;
    const float *x;
    int64_t rows;
    void *scratch;
    float *y;
    atomic_int failed; /* some job had no memory */
} Call;

static void quantize(void *data, size_t job) {
    Call *call = data;
    if (qdit_quantize_job(call->linear, call->x, call->rows, call->scratch, (int64_t)job) != 0) {
        atomic_store(&call->failed, 1);
    }
}

static void multiply(void *data, size_t job) {
    Call *call = data;
    if (qdit_product_job(call->linear, call->rows, call->scratch, call->y, (int64_t)job) != 0) {
        atomic_store(&call->failed, 1);
    }
}

static OrtStatus *run_jobs(const OrtApi *api, const OrtKernelContext *context,
                           void (*run)(void *, size_t), int64_t count, Call *call) {
    OrtStatus *error = NULL;
    if (count == 1) {
        run(call, 0);
    } else if (count > 1) {
        error = ort_parallel(api, context, run, (size_t)count, 0, call);
    }
    if (error == NULL && atomic_load(&call->failed)) {
        error = ort_status(api, ORT_FAIL, "no memory for a thread's part of a product");
    }
    return error;
}

static OrtStatus *run_call(const Kernel *kernel, const OrtKernelContext *context, Call *call) {
    const OrtApi *api = kernel->api;
    void *memory = NULL;
    size_t bytes = qdit_scratch_bytes(call->linear, call->rows) + ALIGNMENT;
    OrtStatus *error = ort_allocate(api, kernel->allocator, bytes, &memory);
    if (error != NULL) return error;
    uintptr_t aligned = ((uintptr_t)memory + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    call->scratch = (void *)aligned;
    error = run_jobs(api, context, quantize, qdit_quantize_jobs(call->linear, call->rows), call);
    if (error == NULL) {
        error =
            run_jobs(api, context, multiply, qdit_product_jobs(call->linear, call->rows), call);
    }
    OrtStatus *later = ort_free(api, kernel->allocator, memory);
    if (error == NULL) return later;
    if (later != NULL) ort_release_status(api, later);
    return error;
}

/* The dimensions of A, whose last one must be `width`. */
static OrtStatus *read_dims(const OrtApi *api, const OrtValue *value, int64_t width, int64_t *dims,
                            size_t *rank) {
    OrtShape *shape = NULL;
    OrtStatus *error = ort_get_shape(api, value, &shape);
    if (error != NULL) return error;
    error = ort_rank(api, shape, rank);
    if (error == NULL && (*rank < 1 || *rank > MOST_DIMENSIONS)) {
        error = refuse(api, "A must have 1 to %d dimensions, got %zu", MOST_DIMENSIONS, *rank);
    }
    if (error == NULL) error = ort_dims(api, shape, dims, *rank);
    if (error == NULL && dims[*rank - 1] != width) {
        error = refuse(api, "the last dimension of A must be %" PRId64 ", got %" PRId64, width,
                       dims[*rank - 1]);
    }
    ort_release_shape(api, shape);
    return error;
}

static OrtStatus *compute(void *state, OrtKernelContext *context) {
    const Kernel *kernel = state;
    const OrtApi *api = kernel->api;
    const OrtValue *a = NULL;
    OrtValue *output = NULL;
    int64_t dims[MOST_DIMENSIONS];
    size_t rank = 0;
    void *x = NULL, *y = NULL;
    OrtStatus *error = ort_input(api, context, INPUT_A, &a);
    if (error == NULL) error = read_dims(api, a, kernel->linear.stride, dims, &rank);
    if (error != NULL) return error;
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < rank; i++) {
        rows *= dims[i];
    }
    dims[rank - 1] = kernel->linear.n;
    error = ort_output(api, context, 0, dims, rank, &output);
    if (error != NULL || rows == 0) return error;
    error = ort_data(api, a, &x);
    if (error == NULL) error = ort_data(api, output, &y);
    if (error != NULL) return error;
    Call call = {
        .linear = &kernel->linear,
        .x = (const float *)x + kernel->first,
        .rows = rows,
        .y = y,
    };
    return run_call(kernel, context, &call);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                         void **made) {
    (void)op;
    Kernel *kernel = calloc(1, sizeof *kernel);
    if (kernel == NULL) return ort_status(api, ORT_FAIL, "no memory for a kernel");
    kernel->api = api;
    OrtStatus *error = read_linear(api, info, &kernel->linear, &kernel->first);
    if (error == NULL) error = ort_kernel_allocator(api, info, &kernel->allocator);
    if (error != NULL) {
        free(kernel);
        return error;
    }
    *made = kernel;
    return NULL;
}

static void destroy(void *state) {
    Kernel *kernel = state;
    ort_release_allocator(kernel->api, kernel->allocator);
    free(kernel);
}

static const char *get_name(const OrtCustomOp *op) {
    (void)op;
    return "GroupwiseMatMul";
}

static const char *get_provider(const OrtCustomOp *op) {
    (void)op;
    return NULL; /* the CPU's */
}

static int get_input_type(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index == INPUT_B || index == INPUT_ZERO_POINTS ? ORT_UINT8 : ORT_FLOAT;
}

static size_t get_input_count(const OrtCustomOp *op) {
    (void)op;
    return INPUT_COUNT;
}

static int get_output_type(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ORT_FLOAT;
}

static size_t get_output_count(const OrtCustomOp *op) {
    (void)op;
    return 1;
}

static int get_input_characteristic(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index >= INPUT_ZERO_POINTS ? ORT_OPTIONAL : ORT_REQUIRED;
}

static int get_output_characteristic(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ORT_REQUIRED;
}

static int get_input_memory(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ORT_DEFAULT_MEMORY;
}

/* Of variadic inputs and outputs, which there are none of. */
static int get_one(const OrtCustomOp *op) {
    (void)op;
    return 1;
}

static const OrtCustomOp OPERATOR = {
    .version = ORT_ABI_VERSION,
    .get_name = get_name,
    .get_provider = get_provider,
    .get_input_type = get_input_type,
    .get_input_count = get_input_count,
    .get_output_type = get_output_type,
    .get_output_count = get_output_count,
    .destroy = destroy,
    .get_input_characteristic = get_input_characteristic,
    .get_output_characteristic = get_output_characteristic,
    .get_input_memory = get_input_memory,
    .get_variadic_input_count = get_one,
    .get_variadic_input_homogeneity = get_one,
    .get_variadic_output_count = get_one,
    .get_variadic_output_homogeneity = get_one,
    .create = create,
    .compute = compute,
    .get_first_version = get_one,
    .get_last_version = get_one,
};

/* The domain outlives every session that has it, so there is one for the process; where two
 * threads make it at once, the second takes the first one's. */
static OrtStatus *get_domain(const OrtApi *api, OrtCustomOpDomain **domain) {
    static _Atomic(OrtCustomOpDomain *) shared = NULL;
    *domain = atomic_load(&shared);
    if (*domain != NULL) return NULL;
    OrtCustomOpDomain *fresh = NULL, *other = NULL;
    OrtStatus *error = ort_create_domain(api, "qdit.cpu", &fresh);
    if (error == NULL) error = ort_add_operator(api, fresh, &OPERATOR);
    if (error == NULL && atomic_compare_exchange_strong(&shared, &other, fresh)) {
        *domain = fresh;
        return NULL;
    }
    if (fresh != NULL) ort_release_domain(api, fresh);
    *domain = other;
    return error;
}

/* What ONNX Runtime looks for in a library of operators. */
EXPORTED OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi *api = base->get_api(ORT_ABI_VERSION);
    if (api == NULL) {
        const OrtApi *oldest = base->get_api(1);
        return oldest == NULL ? NULL
                              : refuse(oldest,
                                       "qdit.cpu needs ONNX Runtime 1.%d or newer, this is %s",
                                       ORT_ABI_VERSION, base->get_version());
    }
    OrtCustomOpDomain *domain = NULL;
    OrtStatus *error = get_domain(api, &domain);
    return error != NULL ? error : ort_add_domain(api, options, domain);
}

/* qdit_units under a name that is seen from outside, for Python to ask before a session is made. */
EXPORTED int qdit_available_units(void);

int qdit_available_units(void) { return qdit_units(); }
