/* Included once per REAL: elements [begin, end) of a slice, moved back toward their anchor. */

static void NAME(pull_chunk)(const slice *s, double share, int64_t begin, int64_t end) {
    REAL w[PIECE], a[PIECE];
    const REAL pull = (REAL)share;
    /* As torch's lerp: each form is exact at its end of the way. */
    const int near = pull < (REAL)0.5 && pull > (REAL)-0.5;
    for (int64_t at = begin; at < end; at += PIECE) {
        int64_t n = end - at < PIECE ? end - at : PIECE;
        NAME(load)(w, s->weight, s->weight_kind, at, n);
        NAME(load)(a, s->anchor, s->anchor_kind, at, n);
        if (!s->anchor_kind)
            for (int64_t i = 0; i < n; i++) a[i] = w[i] * (1 - pull);
        else if (near)
            for (int64_t i = 0; i < n; i++) a[i] = FMA(pull, a[i] - w[i], w[i]);
        else
            for (int64_t i = 0; i < n; i++) a[i] = FMA(pull - 1, a[i] - w[i], a[i]);
        NAME(store)(s->weight, a, s->weight_kind, at, n);
        /* An infinite weight has no way back: it stays. x - x is 0 only of what is finite. */
        int64_t bad = 0;
        for (int64_t i = 0; i < n; i++) bad += a[i] - a[i] != 0;
        if (!bad) continue;
        for (int64_t i = 0; i < n; i++) a[i] = a[i] - a[i] == 0 ? a[i] : w[i];
        NAME(store)(s->weight, a, s->weight_kind, at, n);
    }
}
