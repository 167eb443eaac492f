"""Finds what a torch module does in training mode alone: random numbers, buffers that change, and whatever else makes
its outputs differ from those of evaluation.

A module is exported in evaluation mode. Modules that draw random numbers in training mode alone, such as a dropout or a
layer of noise, are exported in this mode, if they do what they do in evaluation as soon as each draw is its mean. Notes
name everything else, which the export lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fedprune.core.errors import error_reason
from fedprune.core.text import first_few
from fedprune_export.importing.quiet_libraries import silence_libraries
from fedprune_export.importing.torch_calls import replace_calls

# What stands for a draw where a module is compared with itself in evaluation: its mean, as in an import (`draws`).
_MEANS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("randn", "randn_like"), lambda *_: 0.0),
    **dict.fromkeys(("rand", "rand_like"), lambda *_: 0.5),
    "normal_": lambda x, mean=0.0, std=1.0: mean,
    "normal": lambda mean=0.0, std=1.0, *_: mean,
    "uniform_": lambda x, low=0.0, high=1.0: (low + high) / 2,
    "bernoulli_": lambda x, p=0.5: p,
    "bernoulli": lambda x, p=None: p if p is not None else x if (x == x.ravel()[0]).all() else (x > 0.5).to(x.dtype),
    "exponential_": lambda x, rate=1.0: math.log(2) / rate,  # its median, which uniform draws at their mean give
    "native_dropout": lambda x, *_: x,
}

# How far outputs of a module may be from those of evaluation: what other orders of sums change.
_TOLERANCES = {"rtol": 1e-4, "atol": 1e-5}

# Operators by which dropouts draw.
_DROPOUTS = frozenset({"bernoulli", "native_dropout"})


class _Run(NamedTuple):
    """One run of a module, in which every draw that has a mean is replaced by it.

    Attributes:
        outputs: What the module has returned; None if it has failed with `error`.
        draws: Names of operators that drew random numbers, by module.
    """

    outputs: Any
    draws: Mapping[str, Sequence[str]]
    error: Exception | None = None


class TrainingMode(NamedTuple):
    """A module's behaviour in training mode.

    Attributes:
        modules: Those to export in training mode, in which alone they draw random numbers.
        draws: Names of the operators that draw them, by module.
        notes: Sentences on behaviour that training here lacks.
        samples: Inputs, and the `outputs` of evaluation for them.
    """

    modules: Sequence[Any]
    draws: Mapping[str, Sequence[str]]
    notes: Sequence[str]
    samples: Sequence[Any]
    outputs: Any


def record_training_mode(torch: Any, module: Any, samples: Sequence[Any]) -> TrainingMode:
    """Run a module in both modes and compare them; module, buffers and random generator stay unchanged."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    named_buffers = ((s, name, buffer) for s in module.modules() for name, buffer in s._buffers.items())
    buffers = [(s, name, buffer, buffer.clone()) for s, name, buffer in named_buffers if buffer is not None]
    labels = {f"{name or 'the module'} ({type(s).__name__})": s for name, s in module.named_modules()}

    def run(trained: Iterable[Any]) -> _Run:
        _restore_buffers(torch, buffers)
        module.eval()
        for submodule in trained:
            submodule.training = True
        return _run_at_means(torch, module, labels, samples)

    try:
        # A run in training mode draws random numbers and changes buffers: both are restored.
        with torch.random.fork_rng(devices=[]), torch.no_grad(), silence_libraries():
            torch.manual_seed(0)
            # Not zeros, which would hide much; cut to whole numbers they are 0, for modules that use them as indices.
            samples = [s.uniform_(-0.9, 0.9) if s.is_floating_point() else s for s in map(torch.clone, samples)]
            module.train()
            # A step trains norms by its batch; a module may keep some of its own in evaluation.
            norms = torch.nn.modules.batchnorm._NormBase
            trained = {label: s for label, s in labels.items() if s.training and not isinstance(s, norms)}
            kept_norms = [label for label, s in labels.items() if isinstance(s, norms) and not s.training]
            evaluation = run([])
            training = run(trained.values())
            changed_buffers = _changed_buffers(torch, labels, buffers)
            drawing: dict[str, Sequence[str]] = {}
            lost: dict[str, Sequence[str]] = {}
            differing: list[str] = []
            if _are_close(torch, training.outputs, evaluation.outputs):
                drawing = {
                    label: training.draws[label] for label in trained if _draws_more(label, training, evaluation)
                }
                trained = {}
            for label, submodule in trained.items():
                trial = run([*(trained[name] for name in drawing), submodule])
                draws_more = _draws_more(label, trial, evaluation)
                if not _are_close(torch, trial.outputs, evaluation.outputs):
                    if draws_more:
                        lost[label] = trial.draws[label]
                    elif trial.error is None and label not in changed_buffers:
                        differing.append(label)
                elif draws_more:
                    drawing[label] = trial.draws[label]
    finally:
        _restore_buffers(torch, buffers)
        for submodule, mode in modes:
            submodule.training = mode
    notes = []
    if training.error is not None:
        notes.append(
            f"The module can't be run in torch's training mode ({error_reason(training.error)}): boards train without "
            "what only the module itself does in that mode."
        )
    notes += lost_draws_notes(lost)
    notes += [
        f"Buffers that torch's training mode changes ({names}) in {modules}: here they stay, and are used, as in "
        "evaluation."
        for names, modules in _group_modules(changed_buffers)
    ]
    if differing:
        notes.append(
            f"{first_few(differing, max_names=3)}: torch's training mode computes something else than evaluation, and "
            "boards train by evaluation."
        )
    if kept_norms:
        notes.append(
            f"{first_few(kept_norms, max_names=3)}: torch keeps running statistics in training mode, too; boards train "
            "by those of each batch unless the norm's tensors are frozen."
        )
    if active := [label for label, names in evaluation.draws.items() if _DROPOUTS.intersection(names)]:
        notes.append(
            f"Dropout of {first_few(active, max_names=3)} is always on in torch, also "
            "in evaluation; here it drops numbers while boards train, and none in predictions."
        )
    return TrainingMode([labels[label] for label in drawing], drawing, notes, samples, evaluation.outputs)


def lost_draws_notes(names_by_module: Mapping[str, Sequence[str]]) -> list[str]:
    """Sentences on modules that are exported without the random numbers of their training mode."""
    return [
        f"Random numbers of torch's training mode ({names}) in {modules}: boards train without them, as in evaluation."
        for names, modules in _group_modules(names_by_module)
    ]


def _draws_more(label: str, run: _Run, evaluation: _Run) -> bool:
    return label in run.draws and run.draws[label] != evaluation.draws.get(label)


def _are_close(torch: Any, outputs: Any, expected: Any) -> bool:
    outputs, expected = ([*v] if isinstance(v, (list, tuple)) else [v] for v in (outputs, expected))
    return len(outputs) == len(expected) and all(
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.shape == b.shape
        and torch.allclose(a, b, equal_nan=True, **_TOLERANCES)
        for a, b in zip(outputs, expected, strict=True)
    )


def _restore_buffers(torch: Any, buffers: Sequence[tuple[Any, str, Any, Any]]) -> None:
    with torch.no_grad():
        for submodule, name, tensor, value in buffers:
            submodule._buffers[name] = tensor
            tensor.copy_(value)


def _changed_buffers(
    torch: Any, labels: Mapping[str, Any], buffers: Sequence[tuple[Any, str, Any, Any]]
) -> dict[str, list[str]]:
    """Names of buffers that a run has changed, by the module that has them."""
    labels_by_id = {id(submodule): label for label, submodule in labels.items()}
    changed: dict[str, list[str]] = {}
    for submodule, name, _, before in buffers:
        now = submodule._buffers.get(name)
        # A buffer may be replaced by one of another shape.
        if now is not None and (now.shape != before.shape or not torch.equal(now, before)):
            changed.setdefault(labels_by_id[id(submodule)], []).append(name)
    return changed


def _group_modules(names: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Group modules that have the same names; returns these names and the modules, as text."""
    modules_by_names: dict[str, list[str]] = {}
    for module, place_names in names.items():
        modules_by_names.setdefault(", ".join(dict.fromkeys(place_names)), []).append(module)
    return [(joined_names, first_few(where, max_names=3)) for joined_names, where in modules_by_names.items()]


def _run_at_means(torch: Any, module: Any, labels: Mapping[str, Any], samples: Sequence[Any]) -> _Run:
    draws: dict[str, list[str]] = {}
    module_stack: list[str] = []

    class Means(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if torch.Tag.nondeterministic_seeded not in func.tags:
                return out
            name = func.overloadpacket.__name__
            draws.setdefault(module_stack[-1], []).append(name.strip("_"))
            if name in _MEANS:
                # What a fused dropout returns has its mask, too.
                value, target = _MEANS[name](*args), out[0] if isinstance(out, tuple) else out
                target.copy_(value) if hasattr(value, "shape") else target.fill_(value)
            return out

    def leave(*_: Any) -> None:
        module_stack.pop()

    hooks = []
    # Other kernels drop numbers without an operator that draws them.
    attention = torch.nn.attention
    try:
        for label, submodule in labels.items():
            hooks.append(submodule.register_forward_pre_hook(lambda *_, label=label: module_stack.append(label)))
            hooks.append(submodule.register_forward_hook(leave))
        with replace_calls(torch), attention.sdpa_kernel(attention.SDPBackend.MATH), Means():
            return _Run(module(*samples), draws)
    except Exception as error:  # noqa: BLE001  the user's code, which may take labels, too, in training mode
        return _Run(None, draws, error)
    finally:
        for hook in hooks:
            hook.remove()
