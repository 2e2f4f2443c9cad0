/* Included once per REAL: Adam's step of elements [begin, end) of a slice, and the sums around it. */

static void NAME(adam_chunk)(const slice *s, const moments *o, const numbers *x, int64_t begin, int64_t end, double *sums) {
    double dot[LANES] = {0}, before[LANES] = {0}, after[LANES] = {0};
    double d[PIECE], a[PIECE], g64[PIECE];
    REAL w[PIECE], g[PIECE], m[PIECE], v[PIECE], most[PIECE];
    const REAL beta2 = (REAL)x->beta2, eps = (REAL)x->eps, factor = (REAL)s->factor;
    const REAL rest1 = (REAL)(1 - x->beta1), rest2 = (REAL)(1 - x->beta2);
    const REAL step = (REAL)x->step_size, root = (REAL)x->root_correction;
    for (int64_t at = begin; at < end; at += PIECE) {
        int64_t n = end - at < PIECE ? end - at : PIECE;
        load_f64(d, s->weight, s->weight_kind, at, n);
        load_f64(a, s->anchor, s->anchor_kind, at, n);
        load_f64(g64, s->grad, s->grad_kind, at, n);
        add_sums(d, a, g64, s->factor, n, before, dot);

        NAME(load)(w, s->weight, s->weight_kind, at, n);
        NAME(load)(g, s->grad, s->grad_kind, at, n);
        NAME(load)(m, o->mean, o->kind, at, n);
        NAME(load)(v, o->square, o->kind, at, n);
        if (o->most) NAME(load)(most, o->most, o->kind, at, n);
        for (int64_t i = 0; i < n; i++) g[i] *= factor;
        for (int64_t i = 0; i < n; i++) m[i] = FMA(rest1, g[i] - m[i], m[i]);
        for (int64_t i = 0; i < n; i++) v[i] = FMA(rest2 * g[i], g[i], beta2 * v[i]);
        if (o->most)
            for (int64_t i = 0; i < n; i++) most[i] = v[i] > most[i] || v[i] != v[i] ? v[i] : most[i];
        const REAL *second = o->most ? most : v;
        for (int64_t i = 0; i < n; i++) w[i] -= step * m[i] / (SQRT(second[i]) / root + eps);
        /* The moments are rounded after their use: in float16 the second one would vanish before it. */
        NAME(store)(o->mean, m, o->kind, at, n);
        NAME(store)(o->square, v, o->kind, at, n);
        if (o->most) NAME(store)(o->most, most, o->kind, at, n);
        NAME(store)(s->weight, w, s->weight_kind, at, n);

        load_f64(d, s->weight, s->weight_kind, at, n);
        add_sums(d, a, 0, 1, n, after, dot);
    }
    sums[0] += total(dot);
    sums[1] += total(before);
    sums[2] += total(after);
}
