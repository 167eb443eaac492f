"""Records what a torch module does in training mode alone: dropouts, random numbers, buffers that change, and whatever
else makes its outputs differ from those of evaluation.

A module is exported in evaluation mode. Dropouts of training mode get into the export by `torch_dropout`. Modules that
draw random numbers in training mode alone, such as a layer of noise, are exported in this mode, if they do what they do
in evaluation as soon as each draw is its mean. Notes name everything else, which the export lacks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from fedprune.core.errors import error_reason
from fedprune.core.text import first_few
from fedprune_export.importing.torch_dropout import DropoutCall, DropoutCalls

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
}

# How far outputs of a module may be from those of evaluation: what other orders of sums change.
_TOLERANCES = {"rtol": 1e-4, "atol": 1e-5}


class TrainingMode(NamedTuple):
    """A module's behaviour in training mode.

    Attributes:
        calls: Every call of a dropout; None if they are unknown.
        drawing: Modules that are exported in training mode, in which alone they draw random numbers.
        notes: Sentences on behaviour that training here lacks.
    """

    calls: Sequence[DropoutCall] | None
    drawing: Sequence[Any]
    notes: Sequence[str]


def record_training_mode(torch: Any, module: Any, samples: Sequence[Any]) -> TrainingMode:
    """Run a module in both modes and record what differs; module, buffers and random generator stay unchanged."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    named_buffers = ((s, name, buffer) for s in module.modules() for name, buffer in s._buffers.items())
    buffers = [(s, name, buffer, buffer.clone()) for s, name, buffer in named_buffers if buffer is not None]
    try:
        # A run in training mode draws random numbers and changes buffers: both are restored.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            # Not zeros, which would hide much; cut to whole numbers they are 0, for modules that use them as indices.
            samples = [s.uniform_(-0.9, 0.9) if s.is_floating_point() else s for s in map(torch.clone, samples)]
            module.eval()
            evaluation = _record_run(torch, module, samples, at_means=True)
            module.train()
            training = _record_run(torch, module, samples)
            changed_buffers = _changed_buffers(torch, module, buffers)
            _restore_buffers(torch, buffers)
            drawing, exported = _drawing_modules(torch, module, samples, evaluation, training)
            differing = _differing_modules(torch, module, samples, evaluation, buffers)
            _restore_buffers(torch, buffers)
    except Exception as error:  # noqa: BLE001  the user's code, which may take labels, too, in training mode
        note = (
            f"The module can't be run in torch's training mode ({error_reason(error)}): boards train with its dropouts,"
            " but without whatever else it does in that mode alone."
        )
        return TrainingMode(None, (), [note])
    finally:
        _restore_buffers(torch, buffers)
        for submodule, mode in modes:
            submodule.training = mode
    # A module that takes another path in training mode: its ratios belong to calls that the export doesn't meet.
    same_path = [call.name for call in exported.calls] == [call.name for call in training.calls]
    lost = {
        label: [n for n in names if n not in exported.random.get(label, ())] for label, names in training.random.items()
    }
    notes = [
        f"Random numbers of torch's training mode ({names}) in {modules}: boards train without them, as in evaluation."
        for names, modules in _group_modules({label: names for label, names in lost.items() if names})
    ]
    notes += [
        f"Buffers that torch's training mode changes ({names}) in {modules}: here they stay, and are used, as in "
        "evaluation."
        for names, modules in _group_modules(changed_buffers)
    ]
    others = [label for label in differing if not lost.get(label) and label not in changed_buffers]
    if others:
        notes.append(
            f"{first_few(others, max_names=3)}: torch's training mode computes something else than evaluation, and "
            "boards train by evaluation."
        )
    active = list(dict.fromkeys(call.module for call in evaluation.calls if call.ratio))
    if active:
        notes.append(
            f"Dropout of {first_few(active, max_names=3)} is always on in torch, also "
            "in evaluation; here it drops numbers while boards train, and none in predictions."
        )
    return TrainingMode(training.calls if same_path else None, drawing, notes)


def _drawing_modules(
    torch: Any, module: Any, samples: Sequence[Any], evaluation: _RecordedRun, training: _RecordedRun
) -> tuple[list[Any], _RecordedRun]:
    """The modules that draw more in training mode than in evaluation, and whose outputs are otherwise the same; and
    what the module does if only these are in training mode."""
    module.eval()
    submodules = {_module_label(name, submodule): submodule for name, submodule in module.named_modules()}
    drawing: list[Any] = []
    exported = evaluation
    for label in training.draws():
        if training.draws()[label] == evaluation.draws().get(label):
            continue
        submodules[label].training = True
        trial = _record_run(torch, module, samples, at_means=True)
        if _are_close(torch, trial.outputs, evaluation.outputs):
            drawing.append(submodules[label])
            exported = trial
        else:
            submodules[label].training = False
    return drawing, exported


def _differing_modules(
    torch: Any, module: Any, samples: Sequence[Any], evaluation: _RecordedRun, buffers: Sequence[Any]
) -> list[str]:
    """The modules whose training mode changes outputs although nothing is dropped, draws are means, and norms, which a
    step trains by its batch, evaluate."""
    submodules = {_module_label(n, s): s for n, s in module.named_modules() if not _is_norm(torch, s)}

    def differs(trained: Collection[str]) -> bool:
        _restore_buffers(torch, buffers)
        module.eval()
        for label in trained:
            submodules[label].training = True
        return not _are_close(torch, _record_run(torch, module, samples, at_means=True).outputs, evaluation.outputs)

    return [label for label in submodules if differs([label])] if differs(submodules) else []


def _is_norm(torch: Any, submodule: Any) -> bool:
    return isinstance(submodule, torch.nn.modules.batchnorm._NormBase)


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


def _changed_buffers(torch: Any, module: Any, buffers: Sequence[tuple[Any, str, Any, Any]]) -> dict[str, list[str]]:
    """Names of buffers that a run has changed, by the module that has them; without those of norms."""
    module_labels = {id(submodule): _module_label(name, submodule) for name, submodule in module.named_modules()}
    changed: dict[str, list[str]] = {}
    for submodule, name, _, before in buffers:
        now = submodule._buffers.get(name)
        if _is_norm(torch, submodule) or now is None:
            continue
        # A buffer may be replaced by one of another shape.
        if now.shape != before.shape or not torch.equal(now, before):
            changed.setdefault(module_labels[id(submodule)], []).append(name)
    return changed


def _group_modules(names: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Group modules that have the same names; returns these names and the modules, as text."""
    modules_by_names: dict[str, list[str]] = {}
    for module, place_names in names.items():
        modules_by_names.setdefault(", ".join(place_names), []).append(module)
    return [(joined_names, first_few(where, max_names=3)) for joined_names, where in modules_by_names.items()]


def _module_label(name: str, submodule: Any) -> str:
    return f"{name or 'the module'} ({type(submodule).__name__})"


class _RecordedRun(DropoutCalls):
    """One run, in which nothing is dropped.

    Attributes:
        calls: Every call of a dropout, with the ratio by which it drops numbers in this mode.
        random: Other operators that drew random numbers, by module.
        outputs: What the module has returned.
    """

    def __init__(self, torch: Any) -> None:
        super().__init__(torch)
        self.calls: list[DropoutCall] = []
        self.random: dict[str, list[str]] = {}
        self.outputs: Any = None
        self.module_stack: list[str] = []

    def ratio(self, name: str, ratio: float, *, on: bool) -> float:
        self.calls.append(DropoutCall(name, ratio if on else 0.0, self.module_stack[-1]))
        return 0.0

    def draws(self) -> dict[str, list[str]]:
        """The names of calls and operators that are random, by module, whatever their ratios are."""
        draws: dict[str, list[str]] = {}
        for call in self.calls:
            draws.setdefault(call.module, []).append(call.name)
        for module, names in self.random.items():
            draws.setdefault(module, []).extend(names)
        return draws


def _record_run(torch: Any, module: Any, samples: Sequence[Any], *, at_means: bool = False) -> _RecordedRun:
    """Run a module; with `at_means` every draw that has a mean is replaced by it."""
    record = _RecordedRun(torch)

    class Random(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            # Weights of attention are answered: nothing of them is dropped.
            if torch.Tag.nondeterministic_seeded not in func.tags or "attention" in name:
                return out
            names = record.random.setdefault(record.module_stack[-1], [])
            names += [] if name.strip("_") in names else [name.strip("_")]
            mean = _MEANS.get(name)
            if mean is None or not at_means:
                return out
            value = mean(*args)
            return out.copy_(value) if hasattr(value, "shape") else out.fill_(value)

    def enter(label: str, *_: Any) -> None:
        record.module_stack.append(label)

    def leave(*_: Any) -> None:
        record.module_stack.pop()

    hooks = []
    for name, submodule in module.named_modules():
        hooks.append(submodule.register_forward_pre_hook(functools.partial(enter, _module_label(name, submodule))))
        hooks.append(submodule.register_forward_hook(leave))
    try:
        with record.answer_calls(module), Random():
            record.outputs = module(*samples)
    finally:
        for hook in hooks:
            hook.remove()
    return record
