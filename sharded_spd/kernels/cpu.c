/* Sums of a slice in one pass over its memory, in float64, in an order that depends on its length alone. */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define PIECE 512    /* elements that are converted at a time; they stay in the first cache */
#define CHUNK 65536  /* elements of one partial sum */

enum { NONE = 0, F32 = 1, F64 = 2, BF16 = 3, F16 = 4 };

/* One slice, as nine 64-bit numbers: addresses, kinds, count, bits of the gradient's factor (a double). */
typedef struct {
    const char *weight, *anchor, *grad;
    int64_t weight_kind, anchor_kind, grad_kind;
    int64_t count, first_chunk;
    double factor;
} slice;

static void load(double *restrict out, const char *restrict from, int64_t kind, int64_t begin, int64_t n) {
    switch (kind) {
    case F32: {
        const float *p = (const float *)from + begin;
        for (int64_t i = 0; i < n; i++) out[i] = p[i];
        break;
    }
    case F64:
        memcpy(out, (const double *)from + begin, n * sizeof(double));
        break;
    case BF16: {
        const uint16_t *p = (const uint16_t *)from + begin;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)p[i] << 16;
            float x;
            memcpy(&x, &bits, sizeof x);
            out[i] = x;
        }
        break;
    }
    case F16: {
        const _Float16 *p = (const _Float16 *)from + begin;
        for (int64_t i = 0; i < n; i++) out[i] = (float)p[i];
        break;
    }
    default:
        memset(out, 0, n * sizeof(double));
    }
}

static double total(const double *lanes) {
    double halves[LANES];
    memcpy(halves, lanes, sizeof halves);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) halves[i] += halves[i + width];
    return halves[0];
}

/* sums[0] = <factor * g, w - w0>, sums[1] = |w - w0|^2 of elements [begin, end). */
static void chunk_sums(const slice *s, int64_t begin, int64_t end, double *sums) {
    double dot[LANES] = {0}, square[LANES] = {0};
    double w[PIECE], a[PIECE], g[PIECE];
    for (int64_t at = begin; at < end; at += PIECE) {
        int64_t n = end - at < PIECE ? end - at : PIECE, even = (n + LANES - 1) / LANES * LANES;
        load(w, s->weight, s->weight_kind, at, n);
        load(a, s->anchor, s->anchor_kind, at, n);
        if (s->grad_kind) load(g, s->grad, s->grad_kind, at, n);
        for (int64_t i = n; i < even; i++) w[i] = a[i] = g[i] = 0;
        for (int64_t i = 0; i < even; i += LANES)
            for (int l = 0; l < LANES; l++) {
                double d = w[i + l] - a[i + l];
                square[l] += d * d;
                w[i + l] = d;
            }
        if (s->grad_kind)
            for (int64_t i = 0; i < even; i += LANES)
                for (int l = 0; l < LANES; l++) dot[l] += g[i + l] * s->factor * w[i + l];
    }
    sums[0] = total(dot);
    sums[1] = total(square);
}

/* `slices` [num]; `partial` [chunks][2] is scratch; `out` [num][2]. */
void spd_sums(const slice *slices, int64_t num, int64_t chunks, double *partial, double *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
        int64_t low = 0, high = num - 1; /* the last slice whose first chunk is not after c */
        while (low < high) {
            int64_t middle = (low + high + 1) / 2;
            if (slices[middle].first_chunk <= c) low = middle;
            else high = middle - 1;
        }
        const slice *s = &slices[low];
        int64_t begin = (c - s->first_chunk) * CHUNK;
        int64_t end = begin + CHUNK < s->count ? begin + CHUNK : s->count;
        chunk_sums(s, begin, end, partial + 2 * c);
    }
    for (int64_t i = 0; i < num; i++) {
        int64_t last = i + 1 < num ? slices[i + 1].first_chunk : chunks;
        double dot = 0, square = 0;
        for (int64_t c = slices[i].first_chunk; c < last; c++) {
            dot += partial[2 * c];
            square += partial[2 * c + 1];
        }
        out[2 * i] = dot;
        out[2 * i + 1] = square;
    }
}
