/* fuzz.h - what the fuzz targets have in common: reading the input in order, and saying what does not hold.
 *
 * A target is one file with LLVMFuzzerTestOneInput. It turns the bytes into a case (checksums are made valid where that is
 * what an attacker can do too), gives it to the code under test and compares with an oracle written here, from the protocol
 * and not from the code. Input that ends early reads as zeros.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct fuzz_input {
    const uint8_t *at, *end;
} fuzz_input;

static inline void fuzz_bytes(fuzz_input *in, void *to, size_t length)
{
    size_t here = (size_t)(in->end - in->at), part = here < length ? here : length;
    if (part)
        memcpy(to, in->at, part);
    memset((uint8_t *)to + part, 0, length - part);
    in->at += part;
}

static inline uint64_t fuzz_number(fuzz_input *in, unsigned bytes)
{
    uint8_t raw[8];
    uint64_t value = 0;
    fuzz_bytes(in, raw, bytes);
    for (unsigned i = bytes; i-- > 0;)
        value = value << 8 | raw[i];
    return value;
}

static inline size_t fuzz_left(const fuzz_input *in) { return (size_t)(in->end - in->at); }

#define FUZZ_NEED(condition)                                                            \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                    \
        }                                                                               \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
