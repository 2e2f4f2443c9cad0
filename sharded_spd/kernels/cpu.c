/* Work on slices in one pass over their memory: the sums of the projection, and Adam's step with them.

   Sums are made in float64, in an order that depends on a slice's length alone. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define PIECE 512    /* elements that are converted at a time; they stay in the first cache */
#define CHUNK 65536  /* elements of one partial sum */

enum { NONE = 0, F32 = 1, F64 = 2, BF16 = 3, F16 = 4 };

/* One slice, as nine 64-bit numbers: addresses, kinds, count, bits of the gradient's factor (a double). */
typedef struct {
    char *weight;
    const char *anchor, *grad;
    int64_t weight_kind, anchor_kind, grad_kind;
    int64_t count, first_chunk;
    double factor;
} slice;

#define REAL double
#define NAME(x) x##_f64
#include "cpu_io.h"
#undef REAL
#undef NAME
#define REAL float
#define NAME(x) x##_f32
#include "cpu_io.h"
#undef REAL
#undef NAME

static double total(const double *lanes) {
    double halves[LANES];
    memcpy(halves, lanes, sizeof halves);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) halves[i] += halves[i + width];
    return halves[0];
}

/* Adds (w - a)^2 to `square` and, where there is a gradient, factor * g * (w - a) to `dot`; w becomes w - a. */
static void add_sums(double *restrict w, double *restrict a, double *restrict g, double factor, int64_t n,
                     double *restrict square, double *restrict dot) {
    int64_t even = (n + LANES - 1) / LANES * LANES;
    for (int64_t i = n; i < even; i++) w[i] = a[i] = 0;
    for (int64_t i = 0; i < even; i += LANES)
        for (int l = 0; l < LANES; l++) {
            double d = w[i + l] - a[i + l];
            square[l] += d * d;
            w[i + l] = d;
        }
    if (!g) return;
    for (int64_t i = n; i < even; i++) g[i] = 0;
    for (int64_t i = 0; i < even; i += LANES)
        for (int l = 0; l < LANES; l++) dot[l] += g[i + l] * factor * w[i + l];
}

/* sums[0] = <factor * g, w - w0>, sums[1] = |w - w0|^2 of elements [begin, end). */
static void chunk_sums(const slice *s, int grads, int64_t begin, int64_t end, double *sums) {
    double dot[LANES] = {0}, square[LANES] = {0};
    double w[PIECE], a[PIECE], g[PIECE];
    for (int64_t at = begin; at < end; at += PIECE) {
        int64_t n = end - at < PIECE ? end - at : PIECE;
        load_f64(w, s->weight, s->weight_kind, at, n);
        load_f64(a, s->anchor, s->anchor_kind, at, n);
        if (grads) load_f64(g, s->grad, s->grad_kind, at, n);
        add_sums(w, a, grads ? g : 0, s->factor, n, square, dot);
    }
    sums[0] = total(dot);
    sums[1] = total(square);
}

/* The slice that chunk `c` belongs to, and which elements of it the chunk is. */
static int64_t find(const slice *slices, int64_t num, int64_t c, int64_t *begin, int64_t *end) {
    int64_t low = 0, high = num - 1; /* the last slice whose first chunk is not after c */
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (slices[middle].first_chunk <= c) low = middle;
        else high = middle - 1;
    }
    *begin = (c - slices[low].first_chunk) * CHUNK;
    *end = *begin + CHUNK < slices[low].count ? *begin + CHUNK : slices[low].count;
    return low;
}

/* The partial sums `partial` [chunks][columns] of each slice, one after the other: `out` [num][columns]. */
static void add_up(const slice *slices, int64_t num, int64_t chunks, const double *partial, double *out, int columns) {
    for (int64_t i = 0; i < num; i++) {
        int64_t last = i + 1 < num ? slices[i + 1].first_chunk : chunks;
        for (int k = 0; k < columns; k++) {
            double sum = 0;
            for (int64_t c = slices[i].first_chunk; c < last; c++) sum += partial[columns * c + k];
            out[columns * i + k] = sum;
        }
    }
}

/* `slices` [num]; `partial` [chunks][2] is scratch; `out` [num][2]. */
void spd_sums(const slice *slices, int64_t num, int64_t chunks, double *partial, double *out, int threads,
              int grads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
        int64_t begin, end, i = find(slices, num, c, &begin, &end);
        chunk_sums(&slices[i], grads && slices[i].grad_kind, begin, end, partial + 2 * c);
    }
    add_up(slices, num, chunks, partial, out, 2);
}

/* Adam's moments of a slice; `most` only with amsgrad. */
typedef struct {
    char *mean, *square, *most;
    int64_t kind;
} moments;

typedef struct {
    double beta1, beta2, eps, step_size, root_correction;
} numbers;

#define REAL double
#define NAME(x) x##_f64
#define SQRT sqrt
#define FMA fma
#include "cpu_adam.h"
#undef REAL
#undef NAME
#undef SQRT
#undef FMA
#define REAL float
#define NAME(x) x##_f32
#define SQRT sqrtf
#define FMA fmaf
#include "cpu_adam.h"
#undef REAL
#undef NAME
#undef SQRT
#undef FMA

/* The common case, all in float32 (the anchor also in bfloat16, or none): eight elements at a time in registers. */
typedef float f8 __attribute__((vector_size(32)));
typedef double d8 __attribute__((vector_size(64)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef uint32_t u8 __attribute__((vector_size(32)));

static inline f8 get8(const float *p) {
    f8 x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline f8 anchor8(const char *p, int64_t kind, int64_t i) {
    if (kind == F32) return get8((const float *)p + i);
    if (kind == NONE) return (f8){0};
    h8 half;
    memcpy(&half, (const uint16_t *)p + i, sizeof half);
    u8 bits = __builtin_convertvector(half, u8) << 16;
    f8 x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline f8 root8(f8 x) {
    f8 y;
    for (int l = 0; l < 8; l++) y[l] = sqrtf(x[l]);
    return y;
}

static inline f8 fma8(f8 a, f8 b, f8 c) {
    f8 y;
    for (int l = 0; l < 8; l++) y[l] = fmaf(a[l], b[l], c[l]);
    return y;
}

static inline __attribute__((always_inline)) void adam_fast(const slice *s, const moments *o, const numbers *x,
                                                            int64_t begin, int64_t end, double *sums,
                                                            int64_t kind) {
    float *w = (float *)s->weight, *m = (float *)o->mean, *v = (float *)o->square;
    const float *g = (const float *)s->grad;
    const float factor = (float)s->factor, rest1 = (float)(1 - x->beta1), rest2 = (float)(1 - x->beta2);
    const float beta2 = (float)x->beta2, eps = (float)x->eps;
    const float step = (float)x->step_size, root = (float)x->root_correction;
    d8 dot[2] = {{0}}, before[2] = {{0}}, after[2] = {{0}};
    for (int64_t i = begin; i < end; i += 16)
        for (int u = 0; u < 2; u++) {
            int64_t at = i + 8 * u;
            f8 grad = get8(g + at) * factor, weight = get8(w + at), mean = get8(m + at), square = get8(v + at);
            d8 a = __builtin_convertvector(anchor8(s->anchor, kind, at), d8);
            d8 d = __builtin_convertvector(weight, d8) - a;
            dot[u] += __builtin_convertvector(grad, d8) * d;
            before[u] += d * d;
            mean = fma8((f8){0} + rest1, grad - mean, mean);
            square = fma8(rest2 * grad, grad, beta2 * square);
            weight -= step * mean / (root8(square) / root + eps);
            memcpy(m + at, &mean, sizeof mean);
            memcpy(v + at, &square, sizeof square);
            memcpy(w + at, &weight, sizeof weight);
            d = __builtin_convertvector(weight, d8) - a;
            after[u] += d * d;
        }
    d8 *all[3] = {dot, before, after};
    for (int k = 0; k < 3; k++) {
        double lanes[LANES];
        memcpy(lanes, all[k], sizeof lanes);
        sums[k] += total(lanes);
    }
}

static int is_fast(const slice *s, const moments *o) {
    return s->weight_kind == F32 && s->grad_kind == F32 && o->kind == F32 && !o->most &&
           (s->anchor_kind == F32 || s->anchor_kind == BF16 || s->anchor_kind == NONE);
}

static void adam_chunk_fast(const slice *s, const moments *o, const numbers *x, int64_t begin, int64_t end,
                            double *sums) {
    int64_t even = begin + (end - begin) / 16 * 16;
    adam_chunk_f32(s, o, x, even, end, sums);
    switch (s->anchor_kind) {
    case F32: adam_fast(s, o, x, begin, even, sums, F32); break;
    case BF16: adam_fast(s, o, x, begin, even, sums, BF16); break;
    default: adam_fast(s, o, x, begin, even, sums, NONE);
    }
}

/* Adam's step of every slice; `out` [num][3]: <factor * g, d>, |d|^2 and, after the step, |d|^2. */
void spd_adam(const slice *slices, int64_t num, int64_t chunks, double *partial, double *out, int threads,
              const moments *all, const numbers *each) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
        int64_t begin, end, i = find(slices, num, c, &begin, &end);
        const slice *s = &slices[i];
        double *sums = partial + 3 * c;
        if (is_fast(s, &all[i])) adam_chunk_fast(s, &all[i], &each[i], begin, end, sums);
        else if (s->weight_kind == F64) adam_chunk_f64(s, &all[i], &each[i], begin, end, sums);
        else adam_chunk_f32(s, &all[i], &each[i], begin, end, sums);
    }
    add_up(slices, num, chunks, partial, out, 3);
}

#define REAL double
#define NAME(x) x##_f64
#include "cpu_pull.h"
#undef REAL
#undef NAME
#define REAL float
#define NAME(x) x##_f32
#include "cpu_pull.h"
#undef REAL
#undef NAME

/* Pulls every slice by its share `pull` [num] of the way back to its anchor; a share of 0 touches nothing. */
void spd_pull(const slice *slices, int64_t num, int64_t chunks, const double *pull, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t c = 0; c < chunks; c++) {
        int64_t begin, end, i = find(slices, num, c, &begin, &end);
        if (pull[i] == 0) continue;
        if (slices[i].weight_kind == F64) pull_chunk_f64(&slices[i], pull[i], begin, end);
        else pull_chunk_f32(&slices[i], pull[i], begin, end);
    }
}
