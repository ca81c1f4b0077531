"""Triton code of attention in tiles: what of a query's row and a key's column meets is made, used and forgotten.

Letters as in the reference. ``i`` are queries, ``j`` keys; q and k have ``d`` columns, v has ``e``. A program has a
tile of queries and goes through keys, or has a tile of keys and goes through queries; ``n`` is its matrix. Its own tile
is the rows of everything the size of the scores: then what is added up over the others is a product as it stands.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from dag_hesse.kernels.attention.forms import DOTS, MATRICES, RESULTS, VECTORS, Form, arguments
from dag_hesse.kernels.generated import HEAD, load, loop, number


@cache
def compiled(form: Form) -> Any:
    """``kernel[(tiles · matrices, probes)](*arguments, M=…, N=…, D=…, E=…)``: tiles are M queries by N keys."""
    return load(source(form), "kernel")


def source(form: Form) -> str:
    """Triton code of a form."""
    body = {"rows": _rows, "tangent": _tangent, "queries": _queries, "keys": _keys}[form.kind](form)
    constants = ", ".join(f"{n}: tl.constexpr" for n in "MNDE")
    own, other, size = ("j", "N", "keys") if form.kind == "keys" else ("i", "M", "queries")
    lines = [
        f"def kernel({', '.join(arguments(form))}, {constants}):",
        f"    T: tl.constexpr = {form.dtype}",
        f"    tiles = tl.cdiv({size}, {other})",
        "    tile = tl.program_id(0) % tiles",
        "    n = (tl.program_id(0) // tiles).to(tl.int64)",
        "    probe = tl.program_id(1).to(tl.int64)",
        f"    {own}_0 = (tile * {other}).to(tl.int64)",  # of a tile, in 64 bits; inside one, 32 are enough
        f"    {own}_r = tl.arange(0, {other})",
        f"    {own} = tile * {other} + {own}_r",
        f"    m_{own} = {own} < {size}",
        "    d = tl.arange(0, D)",
        "    m_d = d < width",
        "    e = tl.arange(0, E)",
        "    m_e = e < values",
    ]
    return HEAD + "\n@triton.jit\n" + "\n".join(lines + ["    " + line for line in body]) + "\n"


def _at(name: str) -> tuple[str, str]:
    """Where a matrix's tile lies, and which of it."""
    axes, rows, columns = MATRICES[name]
    lead = f"n * {name}_n" + (f" + probe * {name}_p" if "p" in axes else "")
    place = (
        f"p_{name} + ({lead} + {rows}_0 * {name}_i) + ({rows}_r[:, None] * {name}_i + {columns}[None, :] * {name}_j)"
    )
    return place, f"m_{rows}[:, None] & m_{columns}[None, :]"


def _load(form: Form, *names: str) -> list[str]:
    """Tiles of matrices, and parts of vectors."""
    lines = []
    for name in names:
        if name in VECTORS:
            row, axes = "(probe * matrices + n)" if VECTORS[name] else "n", _axes(form)[0]
            lines.append(f"{name} = tl.load(p_{name} + {row} * queries + i, mask=m_i, other=0.0).to(T){axes}")
        else:
            place, mask = _at(name)
            lines.append(f"{name} = tl.load({place}, mask={mask}, other=0.0){'.to(T)' if form.widened else ''}")
    return lines


def _axes(form: Form) -> tuple[str, str]:
    """How queries and keys lie in what has the size of the scores."""
    return ("[None, :]", "[:, None]") if form.kind == "keys" else ("[:, None]", "[None, :]")


def _met(form: Form, of_query: str, of_key: str, onto: str | None = None) -> str:
    """Products of rows of queries with rows of keys."""
    own, other = (of_key, of_query) if form.kind == "keys" else (of_query, of_key)
    return _dot(own, f"tl.trans({other})", onto)


def _dot(a: str, b: str, onto: str | None = None) -> str:
    plus = "" if onto is None else f", {onto}"
    return f'tl.dot({a}, {b}{plus}, input_precision="ieee", out_dtype=T)'


def _rounded(x: str) -> str:
    """As operands of products are."""
    return f"({x}).to(k.dtype)"


def _side(form: Form, name: str) -> str:
    of_i, of_j = _axes(form)
    lead = f"n // heads * {name}_b + n % heads * {name}_h + i_0 * {name}_i + j_0 * {name}_j"
    place = f"p_{name} + ({lead}) + (i_r{of_i} * {name}_i + j_r{of_j} * {name}_j)"
    return f"{name} = tl.load({place}, mask=m, other=0)"


def _through(form: Form, over: str) -> list[str]:
    """The head of the loop over keys or queries, and where it is."""
    step, size = ("N", "keys") if over == "j" else ("M", "queries")
    of_i, of_j = _axes(form)
    bounds = ["start_of = tl.load(p_from + tile)", "stop_of = tl.load(p_to + tile)"] if form.spans else []
    head = loop("start", "start_of", "stop_of", step) if form.spans else loop("start", "0", size, step)
    inside = [
        f"{over}_0 = tl.cast(start, tl.int64)",
        f"{over}_r = tl.arange(0, {step})",
        f"{over} = start + {over}_r",
        f"m_{over} = {over} < {size}",
    ]
    return [*bounds, head, *("    " + line for line in [*inside, f"m = m_i{of_i} & m_j{of_j}"])]


def _scores(form: Form) -> list[str]:
    """S, −∞ where there is none."""
    lines = [f"s = {_met(form, 'q', 'k')} * {number(form.scale)}"]
    lines += [_side(form, "hidden"), "s = tl.where(hidden != 0, 0.0, s)"] if "hidden" in form.sides else []
    lines += [_side(form, "bias"), "s += bias.to(T)"] if "bias" in form.sides else []
    return [*lines, 's = tl.where(m, s, float("-inf"))']


def _weights(form: Form) -> list[str]:
    return [*_scores(form), "p = tl.exp(s - lse)", *([_side(form, "drop")] if "drop" in form.sides else [])]


def _dropped(form: Form, x: str) -> str:
    x = x if form.factor == 1 else f"{x} * {number(form.factor)}"
    return f"{x} * drop.to(T)" if "drop" in form.sides else x


def _moved(form: Form) -> list[str]:
    """Ṡ, where q or k moves."""
    pairs = [("q_dot", "k")] * (0 in form.tangents) + [("q", "k_dot")] * (1 in form.tangents)
    lines = [f"s_dot = {_met(form, *pair, 's_dot' if k else None)}" for k, pair in enumerate(pairs)]
    lines += [f"s_dot *= {number(form.scale)}"] if pairs else []
    return lines + (["s_dot = tl.where(hidden != 0, 0.0, s_dot)"] if pairs and "hidden" in form.sides else [])


def _rows(form: Form) -> list[str]:
    """Log-sum-exp of the scores; 0 in rows without any, whose weights are 0 then."""
    body = [
        *_load(form, "k"),
        *_scores(form),
        "new = tl.maximum(top, tl.max(s, 1))",
        'safe = tl.where(new == float("-inf"), 0.0, new)',
        "total = total * tl.exp(top - safe) + tl.sum(tl.exp(s - safe[:, None]), 1)",
        "top = new",
    ]
    return [
        *_load(form, "q"),
        'top = tl.full([M], float("-inf"), T)',
        "total = tl.zeros([M], T)",
        *_through(form, "j"),
        *("    " + line for line in body),
        "found = tl.where(total == 0, 0.0, top + tl.log(tl.where(total == 0, 1.0, total)))",
        "tl.store(p_lse + n * queries + i, found, mask=m_i)",
    ]


def _tangent(form: Form) -> list[str]:
    """ȯut = (A ∘ Ṡ) v + A v̇ − μ out."""
    moves = bool({0, 1} & set(form.tangents))
    body = [*_load(form, "k", "v", *(DOTS[s] for s in form.tangents if s)), *_weights(form)]
    if moves:
        body += [*_moved(form), "s_dot *= p", "mu += tl.sum(s_dot, 1)"]
        body += [f"found = {_dot(_rounded(_dropped(form, 's_dot')), 'v', 'found')}"]
    if 2 in form.tangents:
        body += [f"found = {_dot(_rounded(_dropped(form, 'p')), 'v_dot', 'found')}"]
    place, mask = _at("moved")
    return [
        *_load(form, "q", "lse", "out", *(["q_dot"] if 0 in form.tangents else [])),
        "mu = tl.zeros([M], T)",
        "found = tl.zeros([M, E], T)",
        *_through(form, "j"),
        *("    " + line for line in body),
        f"tl.store({place}, found - mu[:, None] * out.to(T), mask={mask})",
        "tl.store(p_mu + (probe * matrices + n) * queries + i, mu, mask=m_i)",
    ]


def _of_scores(form: Form) -> list[str]:
    """X, the adjoint of the scores, and Y = P ∘ C, where a tangent meets it; what is hidden has none."""
    size = "[N, M]" if form.kind == "keys" else "[M, N]"
    lines = [f"x = {_met(form, 'abar', 'v')}"] if form.first else [f"x = tl.zeros({size}, T)"]
    if form.second:
        lines += [f"c = {_met(form, 'lam', 'v')}", f"c = {_dropped(form, 'c')} - delta"]
        lines += [f"x = {_met(form, 'lam', 'v_dot', 'x')}"] if 2 in form.tangents else []
    lines += [f"x = {_dropped(form, 'x')}"]
    lines += ["x -= overlap"] if form.first else []
    if form.second:
        lines += ["x -= delta_dot"]
        lines += ["x += s_dot * c"] if {0, 1} & set(form.tangents) else []
    names = ["x"] + (["c"] if form.second else [])
    lines += [f"{n} *= p" for n in names]
    return lines + ([f"{n} = tl.where(hidden != 0, 0.0, {n})" for n in names] if "hidden" in form.sides else [])


def _of_queries(form: Form) -> list[str]:
    """What comes with a tile of queries."""
    names = ["q", "lse"] + (["abar", "out"] if form.first else [])
    if form.second:
        names += ["lam", "delta", "mu", "delta_dot"] + (["q_dot"] if 0 in form.tangents else [])
    overlap = [f"overlap = tl.sum(abar.to(T) * out.to(T), 1){_axes(form)[0]}"] if form.first else []
    return [*_load(form, *names), *overlap]


def _of_keys(form: Form) -> list[str]:
    """What comes with a tile of keys."""
    return _load(form, "k", "v", *(DOTS[s] for s in form.tangents if s and form.second))


def _less_mean(form: Form) -> list[str]:
    """Ṡ − μ."""
    moves = form.second and {0, 1} & set(form.tangents)
    return [*_moved(form), "s_dot -= mu"] if moves else []


def _store(form: Form, slot: int, found: str) -> list[str]:
    place, mask = _at(RESULTS[slot])
    there = [f"{found} += tl.load({place}, mask={mask}, other=0.0).to(T)"] if slot in form.into else []
    return [*there, f"tl.store({place}, {found}, mask={mask})"]


def _queries(form: Form) -> list[str]:
    """q̄ = scale (X k + Y k̇)."""
    body = [*_of_keys(form), *_weights(form), *_less_mean(form), *_of_scores(form)]
    body += [f"found = {_dot(_rounded('x'), 'k', 'found')}"]
    if form.second and 1 in form.tangents:
        body += [f"found = {_dot(_rounded('c'), 'k_dot', 'found')}"]
    return [
        *_of_queries(form),
        "found = tl.zeros([M, D], T)",
        *_through(form, "j"),
        *("    " + line for line in body),
        f"found *= {number(form.scale)}",
        *_store(form, 0, "found"),
    ]


def _keys(form: Form) -> list[str]:
    """k̄ = scale (Xᵀ q + Yᵀ q̇),   v̄ = Aᵀ ā + (A ∘ (Ṡ − μ))ᵀ G."""
    body = [*_of_queries(form), *_weights(form), *_less_mean(form)]
    if 2 in form.wants:
        if form.first:
            body += [f"of_v = {_dot(_rounded(_dropped(form, 'p')), 'abar', 'of_v')}"]
        if form.second and {0, 1} & set(form.tangents):
            body += [f"of_v = {_dot(_rounded(_dropped(form, 'p * s_dot')), 'lam', 'of_v')}"]
    if 1 in form.wants:
        body += [*_of_scores(form), f"of_k = {_dot(_rounded('x'), 'q', 'of_k')}"]
        if form.second and 0 in form.tangents:
            body += [f"of_k = {_dot(_rounded('c'), 'q_dot', 'of_k')}"]
    lines = [*_of_keys(form)]
    lines += ["of_k = tl.zeros([N, D], T)"] if 1 in form.wants else []
    lines += ["of_v = tl.zeros([N, E], T)"] if 2 in form.wants else []
    lines += [*_through(form, "i"), *("    " + line for line in body)]
    if 1 in form.wants:
        lines += [f"of_k *= {number(form.scale)}", *_store(form, 1, "of_k")]
    return lines + (_store(form, 2, "of_v") if 2 in form.wants else [])


__all__ = ["compiled", "source"]
