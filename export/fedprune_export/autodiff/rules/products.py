"""Gradient rules of matrix products."""

from __future__ import annotations

import string

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Dim, Pull, Shape, Tape, describe, rule
from fedprune_export.ir.graph import Node


@rule("Gemm")
def gemm(tape: Tape, node: Node) -> Pull:
    """y = alpha · A' · B' + beta · C, where ' may transpose."""
    left, right = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    ta, tb = int(node.attrs.get("transA", 0)), int(node.attrs.get("transB", 0))
    a, b = tape.value(left), tape.value(right)
    shape: Shape = (tape.shape(left)[1 if ta else 0], tape.shape(right)[0 if tb else 1])
    g = tape.graph
    inputs = [a, b] + ([tape.value(bias)] if bias else [])
    tape.enter(node.outputs[0], g.emit("Gemm", *inputs, attrs=node.attrs), shape)

    def product(p: str, q: str, tp: int, tq: int) -> str:
        return g.emit("Gemm", p, q, attrs={"alpha": alpha, "transA": tp, "transB": tq})

    def pull(dy: str) -> None:
        if tape.wants(left):
            tape.add(left, product(b, dy, tb, 1) if ta else product(dy, b, 0, 1 - tb))
        if tape.wants(right):
            tape.add(right, product(dy, a, 1, ta) if tb else product(a, dy, 1 - ta, 0))
        if bias and tape.wants(bias):
            dc = tape.reduced(dy, shape, tape.shape(bias))
            tape.add(bias, g.emit("Mul", dc, g.scalar(beta)) if beta != 1 else dc)

    return pull


@rule("MatMul")
def matmul(tape: Tape, node: Node) -> Pull:
    """y = A · B over broadcast batch axes; a vector is a row on the left and a column on the right."""
    left, right = node.inputs
    a, b = tape.value(left), tape.value(right)
    sa, sb = tape.shape(left), tape.shape(right)
    g = tape.graph
    row, column = len(sa) == 1, len(sb) == 1
    y = g.emit("MatMul", a, b)
    fa, fb = ((1, *sa) if row else sa), ((*sb, 1) if column else sb)
    if fa[-1] != fb[-2]:
        raise ModelError(f"{describe(node)}: sizes don't fit each other at every width", expected=sa, got=sb)
    shape = (*tape.broadcast(node, fa[:-2], fb[:-2]), fa[-2], fb[-1])
    lost = ([len(shape) - 2] if row else []) + ([len(shape) - 1] if column else [])
    tape.enter(node.outputs[0], y, tuple(d for i, d in enumerate(shape) if i not in lost))

    def swapped(value: str, rank: int) -> str:
        order = [*range(rank - 2), rank - 1, rank - 2]
        return g.emit("Transpose", value, attrs={"perm": order})

    def folded(value: str) -> str:
        return g.emit("Flatten", value, attrs={"axis": len(shape) - 1})

    def pull(dy: str) -> None:
        if lost:
            dy = g.emit("Unsqueeze", dy, g.ints(*lost))
        matrix_a = g.emit("Unsqueeze", a, g.ints(0)) if row else a
        matrix_b = g.emit("Unsqueeze", b, g.ints(1)) if column else b
        if tape.wants(left):
            da = g.emit("MatMul", dy, swapped(matrix_b, len(fb)))
            da = tape.reduced(da, (*shape[:-2], *fa[-2:]), fa)
            tape.add(left, g.emit("Squeeze", da, g.ints(0)) if row else da)
        if tape.wants(right):
            if len(fb) == 2 and len(fa) == len(shape):
                # One product over all leading axes: far less work than one per position, summed.
                db = g.emit("Gemm", folded(matrix_a), folded(dy), attrs={"transA": 1})
            else:
                db = g.emit("MatMul", swapped(matrix_a, len(fa)), dy)
                db = tape.reduced(db, (*shape[:-2], *fb[-2:]), fb)
            tape.add(right, g.emit("Squeeze", db, g.ints(1)) if column else db)

    return pull


@rule("Einsum")
def einsum(tape: Tape, node: Node) -> Pull:
    """A sum of products by an equation; each factor's gradient is the sum of products of dy and the other factors."""
    g, names = tape.graph, node.inputs
    values, shapes = [tape.value(n) for n in names], [tape.shape(n) for n in names]
    terms, out = _equation(node, [len(s) for s in shapes])
    sizes: dict[str, Dim] = {}
    for term, shape in zip(terms, shapes, strict=True):
        if len(set(term)) < len(term):
            raise ModelError(f"{describe(node)}: a diagonal", got=node.attrs["equation"])
        for letter, dim in zip(term, shape, strict=True):
            before = sizes.get(letter, 1)
            if 1 not in (dim, before) and dim != before:
                raise ModelError(f"{describe(node)}: sizes of {letter} don't fit", expected=before, got=dim)
            sizes[letter] = before if dim == 1 else dim
    equation = f"{','.join(terms)}->{out}"
    tape.enter(node.outputs[0], g.emit("Einsum", *values, attrs={"equation": equation}), tuple(sizes[c] for c in out))

    def pull(dy: str) -> None:
        for i, name in enumerate(names):
            if not tape.wants(name):
                continue
            others = [(terms[j], values[j]) for j in range(len(names)) if j != i]
            seen = set(out).union(*[t for t, _ in others])
            made = "".join(c for c in terms[i] if c in seen)
            parts = [(out, dy), *others]
            back = f"{','.join(t for t, _ in parts)}->{made}"
            gradient = g.emit("Einsum", *[v for _, v in parts], attrs={"equation": back})
            whole = tuple(sizes[c] for c in made)
            gradient = tape.reduced(
                gradient, whole, tuple(d for c, d in zip(terms[i], shapes[i], strict=True) if c in seen)
            )
            lost = [k for k, c in enumerate(terms[i]) if c not in seen]
            if lost:
                # Summed over by itself: every element gets the same.
                gradient = g.emit("Unsqueeze", gradient, g.ints(*lost))
                gradient = g.emit("Expand", gradient, tape.shape_of(values[i]))
            tape.add(name, gradient)

    return pull


def _equation(node: Node, ranks: list[int]) -> tuple[list[str], str]:
    """The terms of an einsum with a letter for each axis, those of an ellipsis included."""
    text = str(node.attrs["equation"]).replace(" ", "")
    left, arrow, out = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise ModelError(f"{describe(node)}: terms of its equation", expected=len(ranks), got=text)
    if not arrow:
        letters = [c for c in left if c.isalpha()]
        out = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    free = [c for c in string.ascii_letters if c not in text]
    dots = max((r - len(t) + 3 for t, r in zip(terms, ranks, strict=True) if "..." in t), default=0)
    # Axes of an ellipsis are aligned on the right.
    full = [t.replace("...", "".join(free[dots - (r - len(t) + 3) : dots])) for t, r in zip(terms, ranks, strict=True)]
    if any(len(t) != r for t, r in zip(full, ranks, strict=True)):
        raise ModelError(f"{describe(node)}: letters of its equation don't fit its inputs", got=text)
    return full, out.replace("...", "".join(free[:dots]))
