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

static inline int is_fast(const slice *s) {
    return s->weight_kind == F32 && (s->anchor_kind == F32 || s->anchor_kind == BF16 || s->anchor_kind == NONE);
}

/* What is taken of a chunk 16 elements at a time; the rest is taken one by one. */
static inline int64_t even_end(int64_t begin, int64_t end) { return begin + (end - begin) / 16 * 16; }

static inline void add_lanes(const d8 *parts, double *sum) {
    double lanes[LANES];
    memcpy(lanes, parts, sizeof lanes);
    *sum += total(lanes);
}

static inline __attribute__((always_inline)) void sums_fast(const slice *s, int grads, int64_t begin, int64_t end,
                                                            double *sums, int64_t kind) {
    const float *w = (const float *)s->weight, *g = (const float *)s->grad;
    d8 dot[2] = {{0}}, square[2] = {{0}};
    for (int64_t i = begin; i < end; i += 16)
        for (int u = 0; u < 2; u++) {
            int64_t at = i + 8 * u;
            d8 d = __builtin_convertvector(get8(w + at), d8) - __builtin_convertvector(anchor8(s->anchor, kind, at), d8);
            square[u] += d * d;
            if (grads) dot[u] += __builtin_convertvector(get8(g + at), d8) * s->factor * d;
        }
    add_lanes(dot, &sums[0]);
    add_lanes(square, &sums[1]);
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
    add_lanes(dot, &sums[0]);
    add_lanes(before, &sums[1]);
    add_lanes(after, &sums[2]);
}

static inline __attribute__((always_inline)) void pull_fast(const slice *s, double share, int64_t begin,
                                                            int64_t end, int64_t kind) {
    float *w = (float *)s->weight;
    const float pull = (float)share;
    const int near = pull < 0.5f && pull > -0.5f;
    for (int64_t i = begin; i < end; i += 8) {
        f8 old = get8(w + i), a = anchor8(s->anchor, kind, i), way = a - old;
        f8 new = kind == NONE ? old * (1 - pull) : near ? fma8((f8){0} + pull, way, old) : fma8((f8){0} + pull - 1, way, a);
        u8 finite = (u8)(new - new == (f8){0}); /* all bits, or none */
        u8 bits = ((u8)new & finite) | ((u8)old & ~finite);
        memcpy(w + i, &bits, sizeof bits);
    }
}
