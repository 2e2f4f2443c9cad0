/* Work on slices in one pass over their memory: the sums of the projection, and Adam's step with them.

   Sums are made in float64, in an order that depends on a slice's length alone. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef SPD_SOURCE
#define SPD_SOURCE ""
#endif

/* Of which source this is; it is asked before anything else is called. */
const char *spd_source(void) { return SPD_SOURCE; }

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

/* Adam's moments of a slice; `most` only with amsgrad. */
typedef struct {
    char *mean, *square, *most;
    int64_t kind;
} moments;

typedef struct {
    double beta1, beta2, eps, step_size, root_correction;
} numbers;

#include "cpu_fast.h"

/* Calls one of the functions above with the anchor's kind, which is then known where it is compiled. */
#define WITH_KIND(call, ...)                                  \
    switch (s->anchor_kind) {                                 \
    case F32: call(__VA_ARGS__, F32); break;                  \
    case BF16: call(__VA_ARGS__, BF16); break;                \
    default: call(__VA_ARGS__, NONE);                         \
    }

/* Adds (w - a)^2 to `square` and, where there is a gradient, factor * g * (w - a) to `dot`; w becomes w - a. */
static void add_sums(double *restrict w, double *restrict a, double *restrict g, double factor, int64_t n,
                     double *restrict square, double *restrict dot) {
    int64_t even = (n + LANES - 1) / LANES * LANES;
    for (int64_t i = n; i < even; i++) w[i] = a[i] = 0;
    for (int64_t i = 0; i < even; i += LANES)
        for (int l = 0; l < LANES; l++) {
            double d = w[i + l] - a[i + l];
            square[l] = fma(d, d, square[l]);
            w[i + l] = d;
        }
    if (!g) return;
    for (int64_t i = n; i < even; i++) g[i] = 0;
    for (int64_t i = 0; i < even; i += LANES)
        for (int l = 0; l < LANES; l++) dot[l] = fma(g[i + l] * factor, w[i + l], dot[l]);
}

/* Adds <factor * g, w - w0> to sums[0] and |w - w0|^2 to sums[1], of elements [begin, end). */
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
    sums[0] += total(dot);
    sums[1] += total(square);
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
        const slice *s = &slices[i];
        int some = grads && s->grad_kind;
        int fast = is_fast(s) && (!some || s->grad_kind == F32);
        int64_t even = even_end(begin, end);
        double *sums = partial + 2 * c;
        sums[0] = sums[1] = 0;
        chunk_sums(s, some, even, end, sums);
        /* Both ways add up in the same order, so that a sum depends on the values alone. */
        if (!fast) chunk_sums(s, some, begin, even, sums);
        else if (some) WITH_KIND(sums_fast, s, 1, begin, even, sums)
        else WITH_KIND(sums_fast, s, 0, begin, even, sums)
    }
    add_up(slices, num, chunks, partial, out, 2);
}

#define REAL double
#define NAME(x) x##_f64
#define SQRT sqrt
#define FMA fma
#include "cpu_adam.h"
#include "cpu_pull.h"
#undef REAL
#undef NAME
#undef SQRT
#undef FMA
#define REAL float
#define NAME(x) x##_f32
#define SQRT sqrtf
#define FMA fmaf
#include "cpu_adam.h"
#include "cpu_pull.h"
#undef REAL
#undef NAME
#undef SQRT
#undef FMA

static void adam_chunk(const slice *s, const moments *o, const numbers *x, int64_t begin, int64_t end,
                       double *sums) {
    if (s->weight_kind == F64) adam_chunk_f64(s, o, x, begin, end, sums);
    else adam_chunk_f32(s, o, x, begin, end, sums);
}

/* Adam's step of every slice; `out` [num][3]: <factor * g, d>, |d|^2 and, after the step, |d|^2. */
void spd_adam(const slice *slices, int64_t num, int64_t chunks, double *partial, double *out, int threads,
              const moments *all, const numbers *each) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
        int64_t begin, end, i = find(slices, num, c, &begin, &end);
        const slice *s = &slices[i];
        const moments *o = &all[i];
        double *sums = partial + 3 * c;
        int fast = is_fast(s) && s->grad_kind == F32 && o->kind == F32 && !o->most;
        int64_t even = even_end(begin, end);
        memset(sums, 0, 3 * sizeof *sums);
        /* As in spd_sums, in the same order: the rest first, then what is taken 16 at a time. */
        adam_chunk(s, o, &each[i], even, end, sums);
        if (fast) WITH_KIND(adam_fast, s, o, &each[i], begin, even, sums)
        else adam_chunk(s, o, &each[i], begin, even, sums);
    }
    add_up(slices, num, chunks, partial, out, 3);
}


/* Pulls every slice by its share `pull` [num] of the way back to its anchor; a share of 0 touches nothing. */
void spd_pull(const slice *slices, int64_t num, int64_t chunks, const double *pull, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t c = 0; c < chunks; c++) {
        int64_t begin, end, i = find(slices, num, c, &begin, &end);
        const slice *s = &slices[i];
        if (pull[i] == 0) continue;
        int64_t even = is_fast(s) ? even_end(begin, end) : begin;
        if (s->weight_kind == F64) pull_chunk_f64(s, pull[i], even, end);
        else pull_chunk_f32(s, pull[i], even, end);
        if (even == begin) continue;
        WITH_KIND(pull_fast, s, pull[i], begin, even)
    }
}
