/* A node of the operator as ONNX Runtime knows it -> the linear of product.h. */
#ifndef QDIT_NODE_H
#define QDIT_NODE_H

#include "ort_abi.h"
#include "product.h"

enum {
    INPUT_A,
    INPUT_B,
    INPUT_SCALES,
    INPUT_ZERO_POINTS,
    INPUT_BIAS,
    INPUT_SIGNS,
    INPUT_COUNT
};

/* Fill `linear` from attributes and constant inputs, which are not copied: they are the session's
 * and live as long as the kernel. `first` is the channel of A that it begins with. An error names
 * the rule and the value that breaks it. */
OrtStatus *read_linear(const OrtApi *api, const OrtKernelInfo *info, QditLinear *linear,
                       int64_t *first);

/* An error with a message of printf's form, of 255 characters at most. */
OrtStatus *refuse(const OrtApi *api, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#endif
