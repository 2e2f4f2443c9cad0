/* Included once per REAL, the type in which elements are worked on. */

static void NAME(load)(REAL *restrict out, const char *restrict from, int64_t kind, int64_t begin, int64_t n) {
    switch (kind) {
    case F32: {
        const float *p = (const float *)from + begin;
        for (int64_t i = 0; i < n; i++) out[i] = (REAL)p[i];
        break;
    }
    case F64: {
        const double *p = (const double *)from + begin;
        for (int64_t i = 0; i < n; i++) out[i] = (REAL)p[i];
        break;
    }
    case BF16: {
        const uint16_t *p = (const uint16_t *)from + begin;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)p[i] << 16;
            float x;
            memcpy(&x, &bits, sizeof x);
            out[i] = (REAL)x;
        }
        break;
    }
    case F16: {
        const _Float16 *p = (const _Float16 *)from + begin;
        for (int64_t i = 0; i < n; i++) out[i] = (REAL)(float)p[i];
        break;
    }
    default:
        for (int64_t i = 0; i < n; i++) out[i] = 0;
    }
}

/* Stores what it has rounded, and leaves the rounded values in `x`. */
static void NAME(store)(char *restrict to, REAL *restrict x, int64_t kind, int64_t begin, int64_t n) {
    switch (kind) {
    case F32: {
        float *p = (float *)to + begin;
        for (int64_t i = 0; i < n; i++) x[i] = p[i] = (float)x[i];
        break;
    }
    case F64: {
        double *p = (double *)to + begin;
        for (int64_t i = 0; i < n; i++) p[i] = x[i];
        break;
    }
    case BF16: {
        uint16_t *p = (uint16_t *)to + begin;
        for (int64_t i = 0; i < n; i++) {
            float y = (float)x[i];
            uint32_t bits;
            memcpy(&bits, &y, sizeof bits);
            uint32_t up = bits + 0x7fff + ((bits >> 16) & 1); /* to the nearest, ties to even */
            bits = (y == y ? up : bits | 0x400000) & 0xffff0000;
            p[i] = (uint16_t)(bits >> 16);
            memcpy(&y, &bits, sizeof y);
            x[i] = (REAL)y;
        }
        break;
    }
    case F16: {
        _Float16 *p = (_Float16 *)to + begin;
        for (int64_t i = 0; i < n; i++) {
            p[i] = (_Float16)(float)x[i];
            x[i] = (REAL)(float)p[i];
        }
        break;
    }
    }
}
