"""The kernels in Triton: each program works on one chunk of one slice, whose addresses are in a table.

To be launched with enable_fp_fusion=False: what is written here is what is computed, however the compiler
cuts up a block. Sums are made of float64 products: data-centre GPUs form them at half the speed of float32
and wait for memory all the same; where they are slow, the few of an element still cost less than its bytes.

Within a kernel every value is a tensor of Triton's: annotations would say nothing.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 16384
"""Elements of one partial sum, and of one program: small enough that a model of 1e8 elements fills a GPU."""

ROW_WORDS = 7
"""Addresses of weight, anchor, gradient and its factor; the factor as float64; count; the host's kinds."""

MOMENTS_WORDS = 4
"""Addresses of exp_avg, exp_avg_sq and max_exp_avg_sq; the host's kinds."""

_CHUNK = tl.constexpr(CHUNK)
_BLOCK = tl.constexpr(1024)
_HALVINGS = tl.constexpr(10)
_ROW = tl.constexpr(ROW_WORDS)
_MOMENTS = tl.constexpr(MOMENTS_WORDS)


@triton.jit
def _total(x):
    """Sum of a block by halves: the order of tl.sum follows from which thread holds what."""
    for i in tl.static_range(1, _HALVINGS + 1):
        x = tl.sum(tl.reshape(x, (2, _BLOCK >> i)), axis=0)
    return tl.sum(x, axis=0)


INTERPRETED = not isinstance(_total, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when this was imported: the kernels then read host memory alone."""
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _widen(x, REAL: tl.constexpr):
    if REAL == tl.float64:
        return x.to(tl.float32).to(tl.float64) if x.dtype.primitive_bitwidth == 16 else x.to(tl.float64)
    else:
        return x.to(tl.float32)


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        x = x.to(tl.float32)
        if _INTERPRETED:  # it cuts bits off where a GPU rounds to the nearest
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, bits.to(tl.uint32).to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def _load(p, at, count, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(p + at, mask=at < count, other=0.0)
    else:
        return tl.load(p + at)


@triton.jit
def _store(p, at, count, x, MASKED: tl.constexpr):
    if MASKED:
        tl.store(p + at, _narrow(x, p.dtype.element_ty), mask=at < count)
    else:
        tl.store(p + at, _narrow(x, p.dtype.element_ty))


@triton.jit
def _pointer(word, begin, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    p = tl.load(word).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p + begin


@triton.jit
def _place(rows, plan, num, chunk):
    """Which slice a chunk is of, where in it the chunk begins, and its number of elements.

    `plan`: first chunk of every slice `[num]`, count of its chunks `[num]`, slice of every chunk.
    """
    i = tl.load(plan + 2 * num + chunk)
    begin = (chunk - tl.load(plan + i)) * _CHUNK
    left = tl.load(rows + i * _ROW + 5) - begin
    return i, begin, tl.minimum(left, _CHUNK).to(tl.int32)


@triton.jit
def _factor(row, F: tl.constexpr):
    if F is None:
        return tl.load(row + 4).to(tl.float64, bitcast=True)
    else:
        return _widen(tl.load(tl.load(row + 3).to(tl.pointer_type(F))), tl.float64)


@triton.jit
def _sum_block(
    dot, square, weight, anchor, grad, at, count, A: tl.constexpr, G: tl.constexpr, MASKED: tl.constexpr
):
    d = _widen(_load(weight, at, count, MASKED), tl.float64)
    if A is not None:
        d = d - _widen(_load(anchor, at, count, MASKED), tl.float64)
    square = tl.fma(d, d, square)
    if G is not None:
        dot = tl.fma(_widen(_load(grad, at, count, MASKED), tl.float64), d, dot)
    return dot, square


@triton.jit(do_not_specialize=["num", "first"])
def sums_kernel(
    rows, plan, partial, num, first,
    W: tl.constexpr, A: tl.constexpr, G: tl.constexpr, F: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial sums of chunks `first`, ...: <f g, d>, |d|^2 and, where there are 3 columns, |d|^2 again.

    W, A, G, F: dtypes of weight, anchor, gradient and its factor; None: there is none (F: it is in the row).
    """
    chunk = first + tl.program_id(0).to(tl.int64)
    i, begin, count = _place(rows, plan, num, chunk)
    row = rows + i * _ROW
    weight = _pointer(row, begin, W, ALIGNED)
    anchor, grad = weight, weight
    if A is not None:
        anchor = _pointer(row + 1, begin, A, ALIGNED)
    if G is not None:
        grad = _pointer(row + 2, begin, G, ALIGNED)
    dot = tl.zeros((_BLOCK,), tl.float64)
    square = tl.zeros((_BLOCK,), tl.float64)
    lanes = tl.arange(0, _BLOCK)
    # Whole blocks without a mask: one of unknown length would keep their loads from being vectors.
    for block in range(0, count // _BLOCK):
        at = block * _BLOCK + lanes
        dot, square = _sum_block(dot, square, weight, anchor, grad, at, count, A, G, False)
    if count % _BLOCK != 0:
        at = count // _BLOCK * _BLOCK + lanes
        dot, square = _sum_block(dot, square, weight, anchor, grad, at, count, A, G, True)
    out = partial + chunk * COLUMNS
    if G is not None:
        tl.store(out, _total(dot) * _factor(row, F))
    else:
        tl.store(out, 0.0)
    for k in tl.static_range(1, COLUMNS):
        tl.store(out + k, _total(square))


@triton.jit(do_not_specialize=["num"])
def add_up_kernel(plan, partial, out, num, COLUMNS: tl.constexpr):
    """One column of one slice: its partial sums added up, 4 at a time and then one after the other.

    So a slice that is worked on in pieces of 4 * `CHUNK` elements comes to the same bits.
    """
    i, column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.load(plan + i)
    end = begin + tl.load(plan + num + i)
    x = tl.zeros((), tl.float64)
    # Unrolled so that several loads are under way at a time.
    for at in tl.range(begin, end, 4, loop_unroll_factor=8):
        p = partial + at * COLUMNS + column
        one = tl.load(p)
        two = tl.load(p + COLUMNS, mask=at + 1 < end, other=0.0)
        three = tl.load(p + 2 * COLUMNS, mask=at + 2 < end, other=0.0)
        four = tl.load(p + 3 * COLUMNS, mask=at + 3 < end, other=0.0)
        x += (one + two) + (three + four)
    tl.store(out + i * COLUMNS + column, x)


@triton.jit
def _root(x, REAL: tl.constexpr):
    if REAL == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _divide(x, y, REAL: tl.constexpr):
    if REAL == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _adam_block(
    dot, before, after, weight, anchor, grad, mean, square, most, factor, coefficient, small, beta2, rest2,
    eps, step, root, at, count,
    A: tl.constexpr, REAL: tl.constexpr, AMSGRAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    stored = _load(weight, at, count, MASKED)
    raw_grad = _load(grad, at, count, MASKED)
    m = _widen(_load(mean, at, count, MASKED), REAL)
    v = _widen(_load(square, at, count, MASKED), REAL)
    d, a = _widen(stored, tl.float64), 0.0
    if A is not None:
        a = _widen(_load(anchor, at, count, MASKED), tl.float64)
        d = d - a
    before = tl.fma(d, d, before)
    dot = tl.fma(_widen(raw_grad, tl.float64), d, dot)

    g = _widen(raw_grad, REAL) * factor
    m = tl.fma(coefficient, g - m, tl.where(small, m, g))
    v = tl.fma(rest2 * g, g, beta2 * v)
    second = v
    if AMSGRAD:
        old = _widen(_load(most, at, count, MASKED), REAL)
        second = tl.where((v > old) | (v != v), v, old)
        _store(most, at, count, second, MASKED)
    # Rounded after their use: in float16 the second moment would vanish before it.
    _store(mean, at, count, m, MASKED)
    _store(square, at, count, v, MASKED)
    w = _widen(stored, REAL)
    w = _narrow(w - _divide(step * m, _divide(_root(second, REAL), root, REAL) + eps, REAL), stored.dtype)
    _store(weight, at, count, w, MASKED)

    d = _widen(w, tl.float64)
    if A is not None:
        d = d - a
    if MASKED:
        d = tl.where(at < count, d, 0.0)
    return dot, before, tl.fma(d, d, after)


@triton.jit(do_not_specialize=["num", "first"])
def adam_kernel(
    rows, moments, numbers, plan, partial, num, first,
    W: tl.constexpr, A: tl.constexpr, G: tl.constexpr, F: tl.constexpr, M: tl.constexpr,
    AMSGRAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Adam's step of chunks `first`, ..., as torch's fused one, and their partial sums; M: of the moments."""
    REAL: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    chunk = first + tl.program_id(0).to(tl.int64)
    i, begin, count = _place(rows, plan, num, chunk)
    row = rows + i * _ROW
    weight = _pointer(row, begin, W, ALIGNED)
    grad = _pointer(row + 2, begin, G, ALIGNED)
    anchor = weight
    if A is not None:
        anchor = _pointer(row + 1, begin, A, ALIGNED)
    state = moments + i * _MOMENTS
    mean = _pointer(state, begin, M, ALIGNED)
    square = _pointer(state + 1, begin, M, ALIGNED)
    most = square
    if AMSGRAD:
        most = _pointer(state + 2, begin, M, ALIGNED)
    exact = _factor(row, F)
    factor = exact.to(REAL)
    number = numbers + i * 5
    beta1, beta2 = tl.load(number), tl.load(number + 1)
    rest1, rest2 = (1.0 - beta1).to(REAL), (1.0 - beta2).to(REAL)
    # As torch's lerp: each form is exact at its end of the way.
    small = rest1 < 0.5
    coefficient = tl.where(small, rest1, rest1 - 1.0)
    beta2 = beta2.to(REAL)
    eps, step, root = tl.load(number + 2).to(REAL), tl.load(number + 3).to(REAL), tl.load(number + 4).to(REAL)
    dot = tl.zeros((_BLOCK,), tl.float64)
    before = tl.zeros((_BLOCK,), tl.float64)
    after = tl.zeros((_BLOCK,), tl.float64)
    lanes = tl.arange(0, _BLOCK)
    for block in range(0, count // _BLOCK):
        at = block * _BLOCK + lanes
        dot, before, after = _adam_block(
            dot, before, after, weight, anchor, grad, mean, square, most, factor, coefficient, small, beta2,
            rest2, eps, step, root, at, count, A, REAL, AMSGRAD, False,
        )  # fmt: skip
    if count % _BLOCK != 0:
        at = count // _BLOCK * _BLOCK + lanes
        dot, before, after = _adam_block(
            dot, before, after, weight, anchor, grad, mean, square, most, factor, coefficient, small, beta2,
            rest2, eps, step, root, at, count, A, REAL, AMSGRAD, True,
        )  # fmt: skip
    out = partial + chunk * 3
    tl.store(out, _total(dot) * exact)
    tl.store(out + 1, _total(before))
    tl.store(out + 2, _total(after))


@triton.jit
def _pull_block(weight, anchor, share, at, count, A: tl.constexpr, REAL: tl.constexpr, MASKED: tl.constexpr):
    stored = _load(weight, at, count, MASKED)
    w = _widen(stored, REAL)
    if A is None:
        pulled = w * (1.0 - share)
    else:
        a = _widen(_load(anchor, at, count, MASKED), REAL)
        way = a - w
        # As torch's lerp: each form is exact at its end of the way.
        pulled = tl.where(tl.abs(share) < 0.5, w + share * way, a - way * (1.0 - share))
    pulled = _narrow(pulled, stored.dtype)
    # An infinite weight has no way back: it stays. So does one that would leave the range of its dtype.
    fine = tl.abs(_widen(pulled, REAL)) < float("inf")
    _store(weight, at, count, tl.where(fine, pulled, stored), MASKED)


@triton.jit(do_not_specialize=["num", "first"])
def pull_kernel(rows, shares, plan, num, first, W: tl.constexpr, A: tl.constexpr, ALIGNED: tl.constexpr):
    """w <- w - s * (w - w0) in chunks `first`, ..."""
    REAL: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    chunk = first + tl.program_id(0).to(tl.int64)
    i, begin, count = _place(rows, plan, num, chunk)
    share = tl.load(shares + i)
    if share != 0.0:
        row = rows + i * _ROW
        weight = _pointer(row, begin, W, ALIGNED)
        anchor = weight
        if A is not None:
            anchor = _pointer(row + 1, begin, A, ALIGNED)
        pull = share.to(REAL)
        lanes = tl.arange(0, _BLOCK)
        for block in range(0, count // _BLOCK):
            _pull_block(weight, anchor, pull, block * _BLOCK + lanes, count, A, REAL, False)
        if count % _BLOCK != 0:
            _pull_block(weight, anchor, pull, count // _BLOCK * _BLOCK + lanes, count, A, REAL, True)
