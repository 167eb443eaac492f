"""BatchNormalization, by the statistics of the batch, of each sample (instance norms) or by fixed statistics."""

from __future__ import annotations

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune_export.autodiff.batch_statistics import column, inverse_deviation, normalise_by_batch, scale_channels
from fedprune_export.autodiff.element_counts import count_of, sum_axes
from fedprune_export.autodiff.tape import Pull, Tape, describe, gradient_rule
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Node
from fedprune_export.ir.instance_norms import instance_means
from fedprune_export.ir.operators import INPUT, gradient_reads
from fedprune_export.operators.group_norms import instance_norm
from fedprune_export.operators.norm_vectors import tie_vectors

gradient_reads(INPUT, "BatchNormalization")


@channel_rule("BatchNormalization")
def batch_norm_channels(channels: Channels, node: Node) -> None:
    """Scale, shift, mean and variance along the channels; each channel keeps its own statistics."""
    x = channels.input_rows(node, 0)
    tie_vectors(channels, node, x[1:2])
    has_fixed = False
    for i in (3, 4):
        has_fixed = has_fixed or (channels.is_constant(node.inputs[i]) and bool(x[1].any()))
        channels.atoms.tie(channels.input_rows(node, i)[0], x[1])
    if has_fixed:
        channels.notes.append(f"{node.op} {node.name} has constant statistics: its channels stay.")
    channels.set_output(node, x)
    for i in range(1, len(node.outputs)):
        channels.set_output(node, [x[1]], i)


@gradient_rule("BatchNormalization")
def batch_norm(tape: Tape, node: Node) -> Pull:
    """Normalise by the batch; the running statistics become outputs, with torch's unbiased variance.

    Where the statistics are frozen, normalise by them, as torch does in evaluation mode.

    A layer that is called several times moves its statistics in each call, from what the call before left. The node's
    momentum is the share of the old statistics that is kept (torch's is the share that is replaced).

    With c = x − mean, s = 1/√(var + ε) and n elements per channel:
    dγ = s · Σ dy·c, dβ = Σ dy, dx = γ · s · (dy − Σdy/n − c · s² · Σ dy·c / n). Sums are taken of centred values, so
    that a mean far from zero costs no digits.
    """
    name, gamma, beta, mean_name, var_name = node.inputs
    if not (tape.is_tensor(mean_name) and tape.is_tensor(var_name)):
        return _fixed_statistics_norm(tape, node)
    if tape.is_frozen(mean_name) != tape.is_frozen(var_name):
        raise ModelError(
            f"{describe(node)}: only one of its statistics is frozen",
            expected=f"both of {mean_name} and {var_name}, or neither",
            hint="Mend the patterns of recipe.frozen and recipe.trainable.",
        )
    if tape.is_frozen(mean_name):
        return _fixed_statistics_norm(tape, node)
    if mean_name in instance_means(tape.source.metadata):
        # The running statistics follow the mean over the batch, as torch's do.
        instance_pull, mean, variance = instance_norm(tape, node)
        _write_next_statistics(tape, node, mean, variance, count_of(tape, tape.shape(name)[2:]))
        return instance_pull
    g, eps = tape.graph, float(node.attrs.get("epsilon", 1e-5))
    x, shape = tape.value(name), tape.shape(name)
    axes = [0, *range(2, len(shape))]
    scale, shift = (tape.fit_to_width(node, i, shape[1:2]) for i in (1, 2))
    count = count_of(tape, [shape[0], *shape[2:]])
    y, centred, mean, mean_error, variance = normalise_by_batch(g, x, scale, shift, axes, eps)
    tape.enter(node.outputs[0], y, shape)
    _write_next_statistics(tape, node, mean, variance, count)

    def pull(dy: str) -> None:
        dbeta = sum_axes(g, dy, axes, keep=False)
        dot = sum_axes(g, g.emit("Mul", dy, centred), axes, keep=False)
        dot = g.emit("Sub", dot, g.emit("Mul", mean_error, dbeta))
        inverse = inverse_deviation(g, variance, eps)
        dgamma = g.emit("Mul", dot, inverse)
        if tape.needs_gradient(name):
            slope = g.emit("Div", g.emit("Mul", dgamma, inverse), count)
            base = g.emit("Sub", g.emit("Div", dbeta, count), g.emit("Mul", mean_error, slope))
            change = g.emit("Sub", dy, scale_channels(g, centred, slope, base))
            tape.add_gradient(name, g.emit("Mul", change, column(g, g.emit("Mul", scale, inverse), len(shape))))
        tape.add_gradient(gamma, dgamma)
        tape.add_gradient(beta, dbeta)

    return pull


def _write_next_statistics(tape: Tape, node: Node, mean: str, variance: str, count: str) -> None:
    """Write the next running statistics from those of a batch; `variance` is over `count` numbers."""
    g, keep = tape.graph, float(node.attrs.get("momentum", 0.9))
    # Not 0 where a channel has a single element.
    degrees = g.emit("Max", g.emit("Sub", count, g.scalar(1)), g.scalar(1))
    # PyTorch normalises by the variance over n, but its running variance is over n − 1.
    unbiased = g.emit("Mul", variance, g.emit("Div", count, degrees))
    _write_next_statistic(tape, node.inputs[3], mean, keep)
    _write_next_statistic(tape, node.inputs[4], unbiased, keep)


def _write_next_statistic(tape: Tape, name: str, value: str, keep: float) -> None:
    """Write the next running statistic, an output of the graph. `keep`: the share of the old value in it."""
    g, following, before = tape.graph, step_contract.next_name(name), tape.value(name)
    if any(o.name == following for o in g.outputs):  # a layer that is called again, such as a twin's
        before = g.fresh(name)
        producer = g.producers()[following]
        producer.name, producer.outputs = before, [before]
    else:
        g.add_output(following, tape.shape(name))
    g.emit("Add", g.emit("Mul", before, g.scalar(keep)), g.emit("Mul", value, g.scalar(1 - keep)), out=following)


def _fixed_statistics_norm(tape: Tape, node: Node) -> Pull:
    """Normalise by frozen statistics, as at inference, or by statistics that the graph computes, mostly of weights.

    With c = (x − mean) · s and s = 1/√(var + ε): dγ = Σ dy·c, dβ = Σ dy, dx = γ · s · dy; and of computed statistics
    dmean = −γ · s · Σ dy, dvar = −γ · s² · Σ dy·c / 2.
    """
    name, gamma, beta, mean_name, var_name = node.inputs
    g, shape = tape.graph, tape.shape(node.inputs[0])
    axes = [0, *range(2, len(shape))]
    scale, shift = (tape.fit_to_width(node, i, shape[1:2]) for i in (1, 2))
    x, mean, var = (tape.value(n) for n in (name, mean_name, var_name))
    eps = float(node.attrs.get("epsilon", 1e-5))
    y = g.emit("BatchNormalization", x, scale, shift, mean, var, attrs={"epsilon": eps})
    tape.enter(node.outputs[0], y, shape)
    inverse = inverse_deviation(g, var, eps)

    def pull(dy: str) -> None:
        steepness = g.emit("Mul", scale, inverse)
        if tape.needs_gradient(gamma) or tape.needs_gradient(var_name):
            centred = g.emit("Sub", x, column(g, mean, len(shape)))
            dot = g.emit("Mul", sum_axes(g, g.emit("Mul", dy, centred), axes, keep=False), inverse)
            tape.add_gradient(gamma, dot)
            if tape.needs_gradient(var_name):
                # d s / d var = −s³ / 2.
                half = g.emit("Mul", g.emit("Mul", steepness, inverse), g.scalar(-0.5))
                tape.add_gradient(var_name, g.emit("Mul", half, dot))
        if tape.needs_gradient(beta) or tape.needs_gradient(mean_name):
            total = sum_axes(g, dy, axes, keep=False)
            tape.add_gradient(beta, total)
            if tape.needs_gradient(mean_name):
                tape.add_gradient(mean_name, g.emit("Neg", g.emit("Mul", steepness, total)))
        if tape.needs_gradient(name):
            tape.add_gradient(name, g.emit("Mul", dy, column(g, steepness, len(shape))))

    return pull
