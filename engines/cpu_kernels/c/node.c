#include "node.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#define MESSAGE_BYTES 256
/* Keeps every product of sizes below far from the end of int64. */
#define LARGEST_SIZE (INT64_C(1) << 28)

static const char *const INPUT_NAMES[INPUT_COUNT] = {"A",           "B",    "scales",
                                                     "zero_points", "bias", "signs"};

OrtStatus *refuse(const OrtApi *api, const char *format, ...) {
    char message[MESSAGE_BYTES];
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    return ort_status(api, ORT_INVALID_ARGUMENT, message);
}

static OrtStatus *read_sizes(const OrtApi *api, const OrtKernelInfo *info, QditLinear *linear) {
    int64_t bits = 0;
    OrtStatus *error = ort_int_attribute(api, info, "K", &linear->k);
    if (error == NULL) error = ort_int_attribute(api, info, "N", &linear->n);
    if (error == NULL) error = ort_int_attribute(api, info, "bits", &bits);
    if (error == NULL) error = ort_int_attribute(api, info, "block_size", &linear->group);
    if (error != NULL) return error;
    if (linear->k < 1 || linear->n < 1 || linear->k > LARGEST_SIZE || linear->n > LARGEST_SIZE) {
        return refuse(api, "K and N must lie between 1 and 2^28, got %" PRId64 " and %" PRId64,
                      linear->k, linear->n);
    }
    if (bits != 4 && bits != 8) {
        return refuse(api, "bits must be 4 or 8, got %" PRId64, bits);
    }
    if (linear->group < 32 || linear->group % 32 != 0 || linear->k % linear->group != 0) {
        return refuse(api,
                      "block_size must be a multiple of 32 that divides K = %" PRId64
                      ", got %" PRId64,
                      linear->k, linear->group);
    }
    linear->bits = (int)bits;
    return NULL;
}

static int64_t attribute_or(const OrtApi *api, const OrtKernelInfo *info, const char *name,
                            int64_t otherwise) {
    int64_t value = 0;
    OrtStatus *missing = ort_int_attribute(api, info, name, &value);
    if (missing == NULL) return value;
    ort_release_status(api, missing);
    return otherwise;
}

/* Which channels of A are the linear's. */
static OrtStatus *read_place(const OrtApi *api, const OrtKernelInfo *info, QditLinear *linear,
                             int64_t *first) {
    *first = attribute_or(api, info, "first", 0);
    linear->stride = attribute_or(api, info, "width", linear->k);
    if (*first < 0 || linear->stride > LARGEST_SIZE || *first > linear->stride - linear->k) {
        return refuse(api,
                      "K = %" PRId64 " channels from `first` on must lie within `width`, got "
                      "%" PRId64 " and %" PRId64,
                      linear->k, *first, linear->stride);
    }
    return NULL;
}

/* Whether the node lists the input and gives it a name. */
static OrtStatus *is_given(const OrtApi *api, const OrtKernelInfo *info, size_t index,
                           int *given) {
    size_t count = 0, size = 0;
    *given = 0;
    OrtStatus *error = ort_input_count(api, info, &count);
    if (error != NULL || index >= count) return error;
    error = ort_input_name(api, info, index, NULL, &size);
    *given = error == NULL && size > 1;
    return error;
}

static OrtStatus *count_of(const OrtApi *api, const OrtValue *value, int64_t *count) {
    OrtShape *shape = NULL;
    size_t size = 0;
    OrtStatus *error = ort_get_shape(api, value, &shape);
    if (error != NULL) return error;
    error = ort_size(api, shape, &size);
    ort_release_shape(api, shape);
    *count = (int64_t)size;
    return error;
}

/* The values of a constant input of `count` values; NULL for an optional one that is not given. */
static OrtStatus *read_constant(const OrtApi *api, const OrtKernelInfo *info, size_t index,
                                int64_t count, void **data) {
    const char *name = INPUT_NAMES[index];
    const OrtValue *value = NULL;
    int given = 0, is_constant = 0;
    int64_t found = 0;
    *data = NULL;
    OrtStatus *error = is_given(api, info, index, &given);
    if (error != NULL || !given) return error;
    error = ort_constant(api, info, index, &is_constant, &value);
    if (error != NULL) return error;
    if (!is_constant || value == NULL) {
        return refuse(api, "%s must be an initializer, got a value that the graph computes", name);
    }
    error = count_of(api, value, &found);
    if (error != NULL) return error;
    if (found != count) {
        return refuse(api, "%s must have %" PRId64 " values, got %" PRId64, name, count, found);
    }
    return ort_data(api, value, data);
}

OrtStatus *read_linear(const OrtApi *api, const OrtKernelInfo *info, QditLinear *linear,
                       int64_t *first) {
    OrtStatus *error = read_sizes(api, info, linear);
    if (error == NULL) error = read_place(api, info, linear, first);
    if (error != NULL) return error;
    int64_t groups = linear->k / linear->group;
    int64_t packed = (groups * linear->bits + 7) / 8;
    int64_t counts[INPUT_COUNT] = {
        [INPUT_B] = linear->n * (linear->k * linear->bits / 8),
        [INPUT_SCALES] = linear->n * groups,
        [INPUT_ZERO_POINTS] = linear->n * packed,
        [INPUT_BIAS] = linear->n,
        [INPUT_SIGNS] = linear->stride / linear->group,
    };
    void *data[INPUT_COUNT] = {NULL};
    for (size_t index = INPUT_B; index < INPUT_COUNT && error == NULL; index++) {
        error = read_constant(api, info, index, counts[index], &data[index]);
    }
    if (error != NULL) return error;
    linear->weight = data[INPUT_B];
    linear->scale = data[INPUT_SCALES];
    linear->zero_point = data[INPUT_ZERO_POINTS];
    linear->bias = data[INPUT_BIAS];
    const float *sign = data[INPUT_SIGNS];
    linear->sign = sign == NULL ? NULL : sign + *first / linear->group;
    return NULL;
}
