"""Matrix products: MatMul, Gemm, Einsum."""

from __future__ import annotations

import string
from collections.abc import Sequence

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Dim, Pull, Shape, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import AtomRow
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Node
from fedprune_export.ir.operators import INPUT, gradient_reads
from fedprune_export.pruning.masked_reference import MaskWriter, mask_rule

gradient_reads(INPUT, "Gemm", "MatMul", "Einsum")


@channel_rule("MatMul")
def matmul_channels(channels: Channels, node: Node) -> None:
    """Tie the contracted axes and carry the others; leading axes broadcast."""
    a, b = channels.input_rows(node, 0), channels.input_rows(node, 1)
    channels.atoms.tie(a[-1], b[-2] if len(b) > 1 else b[0])
    rank = max(len(a), len(b)) - 2
    # Leading axes align on the right: an operand with fewer of them has none at first.
    leads, lead = (a[:-2], b[:-2]), list[AtomRow]()
    for axis in range(max(rank, 0)):
        rows = [r[axis - rank] for r in leads if axis - rank >= -len(r)]
        longest = max(rows, key=lambda r: r.size)
        for row in rows:
            if row.size == longest.size:
                channels.atoms.tie(longest, row)
        lead.append(longest)
    out = lead + ([a[-2]] if len(a) > 1 else []) + ([b[-1]] if len(b) > 1 else [])
    channels.set_output(node, out)


@channel_rule("Gemm")
def gemm_channels(channels: Channels, node: Node) -> None:
    """Tie the contracted axes, after transposition, and the addend to the output where it doesn't broadcast."""
    a, b = channels.input_rows(node, 0), channels.input_rows(node, 1)
    if node.attrs.get("transA"):
        a = a[::-1]
    if node.attrs.get("transB"):
        b = b[::-1]
    channels.atoms.tie(a[1], b[0])
    if channels.has_input(node, 2):
        addend = channels.input_rows(node, 2)
        if addend and addend[-1].size == b[1].size:
            channels.atoms.tie(addend[-1], b[1])
        # Rows of the addend belong to samples, which are never cut.
        channels.fix(addend[:-1])
    channels.set_output(node, [a[0], b[1]])


def einsum_terms(node: Node, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The terms of an einsum's inputs and of its output, with a letter for each axis, those of an ellipsis included."""
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
    # Letters for the axes of the longest ellipsis; a term with fewer takes the last ones, as they align on the right.
    full = [t.replace("...", "".join(free[dots - (r - len(t) + 3) : dots])) for t, r in zip(terms, ranks, strict=True)]
    if any(len(t) != r for t, r in zip(full, ranks, strict=True)):
        raise ModelError(f"{describe(node)}: letters of its equation don't fit its inputs", got=text)
    return full, out.replace("...", "".join(free[:dots]))


def _has_diagonal(terms: Sequence[str]) -> bool:
    return any(len(set(term)) < len(term) for term in terms)


@channel_rule("Einsum")
def einsum_channels(channels: Channels, node: Node) -> None:
    """Tie axes of the same letter, except those of length 1 that broadcast."""
    rows = [channels.rows[name] for name in node.inputs]
    terms, out = einsum_terms(node, [len(r) for r in rows])
    if _has_diagonal(terms):
        channels.fix_inputs(node)
        channels.fix_outputs(node)
        channels.notes.append(f"Einsum {node.name} takes a diagonal: its channels stay.")
        return
    letter_rows: dict[str, AtomRow] = {}
    for term, term_rows in zip(terms, rows, strict=True):
        for letter, row in zip(term, term_rows, strict=True):
            first = letter_rows.setdefault(letter, row)
            if first.size == row.size:
                channels.atoms.tie(first, row)
            elif row.size > first.size:
                letter_rows[letter] = row
    channels.set_output(node, [letter_rows[letter] for letter in out])


@mask_rule("MatMul")
def mask_matmul(masks: MaskWriter, node: Node) -> None:
    masks.apply(node, 0, [-1])


@mask_rule("Gemm")
def mask_gemm(masks: MaskWriter, node: Node) -> None:
    masks.apply(node, 0, [0 if node.attrs.get("transA") else 1])


@mask_rule("Einsum")
def mask_einsum(masks: MaskWriter, node: Node) -> None:
    terms, out = einsum_terms(node, [masks.rank(name) for name in node.inputs])
    for i, term in enumerate(terms):
        masks.apply(node, i, [axis for axis, letter in enumerate(term) if letter not in out])


@gradient_rule("Gemm")
def gemm(tape: Tape, node: Node) -> Pull:
    """y = alpha · A' · B' + beta · C, where ' may transpose."""
    left, right = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    is_a_transposed, is_b_transposed = int(node.attrs.get("transA", 0)), int(node.attrs.get("transB", 0))
    a, b = tape.value(left), tape.value(right)
    shape: Shape = (tape.shape(left)[1 if is_a_transposed else 0], tape.shape(right)[0 if is_b_transposed else 1])
    g = tape.graph
    inputs = [a, b] + ([tape.value(bias)] if bias else [])
    tape.enter(node.outputs[0], g.emit("Gemm", *inputs, attrs=node.attrs), shape)

    def product(p: str, q: str, transpose_p: int, transpose_q: int) -> str:
        return g.emit("Gemm", p, q, attrs={"alpha": alpha, "transA": transpose_p, "transB": transpose_q})

    def pull(dy: str) -> None:
        if tape.needs_gradient(left):
            da = product(b, dy, is_b_transposed, 1) if is_a_transposed else product(dy, b, 0, 1 - is_b_transposed)
            tape.add_gradient(left, da)
        if tape.needs_gradient(right):
            db = product(dy, a, 1, is_a_transposed) if is_b_transposed else product(a, dy, 1 - is_a_transposed, 0)
            tape.add_gradient(right, db)
        if bias and tape.needs_gradient(bias):
            dc = tape.sum_to_shape(dy, shape, tape.shape(bias))
            tape.add_gradient(bias, g.emit("Mul", dc, g.scalar(beta)) if beta != 1 else dc)

    return pull


@gradient_rule("MatMul")
def matmul(tape: Tape, node: Node) -> Pull:
    """y = A · B over broadcast batch axes; a vector is a row on the left and a column on the right."""
    left, right = node.inputs
    a, b = tape.value(left), tape.value(right)
    a_shape, b_shape = tape.shape(left), tape.shape(right)
    g = tape.graph
    is_row, is_column = len(a_shape) == 1, len(b_shape) == 1
    y = g.emit("MatMul", a, b)
    if is_row:
        a_shape = (1, *a_shape)
    if is_column:
        b_shape = (*b_shape, 1)
    if a_shape[-1] != b_shape[-2]:
        sizes = tape.shape(left), tape.shape(right)
        raise ModelError(
            f"{describe(node)}: sizes don't fit each other at every width", expected=sizes[0], got=sizes[1]
        )
    shape = (*tape.broadcast(node, a_shape[:-2], b_shape[:-2]), a_shape[-2], b_shape[-1])
    lost = ([len(shape) - 2] if is_row else []) + ([len(shape) - 1] if is_column else [])
    tape.enter(node.outputs[0], y, tuple(d for i, d in enumerate(shape) if i not in lost))

    def transpose_last(value: str, rank: int) -> str:
        order = [*range(rank - 2), rank - 1, rank - 2]
        return g.emit("Transpose", value, attrs={"perm": order})

    def flatten_lead(value: str) -> str:
        return g.emit("Flatten", value, attrs={"axis": len(shape) - 1})

    def pull(dy: str) -> None:
        if lost:
            dy = g.emit("Unsqueeze", dy, g.ints(*lost))
        matrix_a = g.emit("Unsqueeze", a, g.ints(0)) if is_row else a
        matrix_b = g.emit("Unsqueeze", b, g.ints(1)) if is_column else b
        if tape.needs_gradient(left):
            da = g.emit("MatMul", dy, transpose_last(matrix_b, len(b_shape)))
            da = tape.sum_to_shape(da, (*shape[:-2], *a_shape[-2:]), a_shape)
            tape.add_gradient(left, g.emit("Squeeze", da, g.ints(0)) if is_row else da)
        if tape.needs_gradient(right):
            if len(b_shape) == 2 and len(a_shape) == len(shape):
                # One product over all leading axes: far less work than one per position, summed.
                db = g.emit("Gemm", flatten_lead(matrix_a), flatten_lead(dy), attrs={"transA": 1})
            else:
                # Batch axes that were broadcast are summed away below.
                db = g.emit("MatMul", transpose_last(matrix_a, len(a_shape)), dy)
                db = tape.sum_to_shape(db, (*shape[:-2], *b_shape[-2:]), b_shape)
            tape.add_gradient(right, g.emit("Squeeze", db, g.ints(1)) if is_column else db)

    return pull


@gradient_rule("Einsum")
def einsum(tape: Tape, node: Node) -> Pull:
    """A sum of products by an equation; each factor's gradient is the sum of products of dy and the other factors."""
    g, names = tape.graph, node.inputs
    values, shapes = [tape.value(n) for n in names], [tape.shape(n) for n in names]
    terms, out = einsum_terms(node, [len(s) for s in shapes])
    if _has_diagonal(terms):
        raise ModelError(f"{describe(node)}: a diagonal", got=node.attrs["equation"])
    sizes: dict[str, Dim] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, dim in zip(term, shape, strict=True):
            before = sizes.get(letter, 1)
            if 1 not in (dim, before) and dim != before:
                raise ModelError(f"{describe(node)}: sizes of {letter} don't fit", expected=before, got=dim)
            sizes[letter] = before if dim == 1 else dim
    equation = f"{','.join(terms)}->{out}"
    tape.enter(node.outputs[0], g.emit("Einsum", *values, attrs={"equation": equation}), tuple(sizes[c] for c in out))

    def pull(dy: str) -> None:
        for i, name in enumerate(names):
            if not tape.needs_gradient(name):
                continue
            other_factors = [(terms[j], values[j]) for j in range(len(names)) if j != i]
            # Letters that no other factor and no output has are summed over this factor alone.
            covered = set(out).union(*[t for t, _ in other_factors])
            letters = "".join(c for c in terms[i] if c in covered)
            factors = [(out, dy), *other_factors]
            back = f"{','.join(t for t, _ in factors)}->{letters}"
            gradient = g.emit("Einsum", *[v for _, v in factors], attrs={"equation": back})
            product_shape = tuple(sizes[c] for c in letters)
            gradient = tape.sum_to_shape(
                gradient, product_shape, tuple(d for c, d in zip(terms[i], shapes[i], strict=True) if c in covered)
            )
            lost = [k for k, c in enumerate(terms[i]) if c not in covered]
            if lost:
                # Summed over by itself: every element gets the same.
                gradient = g.emit("Unsqueeze", gradient, g.ints(*lost))
                gradient = g.emit("Expand", gradient, tape.shape_of(values[i]))
            tape.add_gradient(name, gradient)

    return pull
