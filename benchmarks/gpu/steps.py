"""Training steps of five nets at three widths: right and on the card; time and memory are told, not judged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.machine import Machine, timings
from benchmarks.gpu.placement import placement
from benchmarks.gpu.rounding import judge, processor_traces, session_trace, torch_trace
from benchmarks.measured_steps import BATCH, Step, batch, session_step, step_feeds, torch_step
from benchmarks.step import DENSITIES
from benchmarks.step_nets import NETS, network
from fedprune.model.architecture import widths_at
from fedprune.model.features import Features
from fedprune.model.selection import Selection
from fedprune.planning.costs import costs_at
from fedprune.planning.probe_report import CPU, CUDA
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.training.step_graph import training_graph

TURNS = 20
RESERVE_S = 160.0  # no net is begun when less time is left: the other parts need it


def measure_steps(machine: Machine) -> Iterator[dict[str, Any]]:
    """A row for each net and width."""
    nets, densities = (("lenet",), (0.25,)) if machine.dry else (NETS, DENSITIES)
    for name in machine.in_time(nets, 0.0 if machine.dry else RESERVE_S):
        model = import_onnx(export_torch(network(name)), name)
        graph = training_graph(model, Features(), CUDA).to_bytes()
        reference = OnnxSession(graph, threads=0, training=True)
        for density in densities:
            widths = widths_at(model.architecture, density)
            tensors = Selection.of(model.architecture, widths).gather(model.tensors)
            row = {"net": name, "density": density, **_row(machine, name, graph, reference, tensors)}
            if row["memory"] is not None:
                row["memory"]["planned"] = (
                    costs_at(model.architecture, widths).training_memory(BATCH, Features(), BATCH).of_width
                )
            yield row


def _row(machine: Machine, name: str, graph: bytes, reference: OnnxSession, tensors: dict[str, Any]) -> dict[str, Any]:
    device, cuda = machine.device, machine.device == CUDA
    x, y = batch(network(name).input_shape)
    free = _free_bytes(machine)
    sessions = {"ours": OnnxSession(graph, training=True, cuda=cuda)}
    traces = {"ours": session_trace(sessions["ours"], tensors, x, y)}
    memory = None if free is None else {"taken": free - (_free_bytes(machine) or 0)}
    sessions["unrecorded"] = OnnxSession(graph, training=True, cuda=cuda, records=False)
    traces["unrecorded"] = session_trace(sessions["unrecorded"], tensors, x, y)
    traces["torch"] = torch_trace(name, tensors, x, y, device)
    exact = torch_trace(name, tensors, x, y, exact=True)
    rounded = processor_traces(name, reference, tensors, x, y)
    verdicts = {unit: judge(trace, exact, rounded) for unit, trace in traces.items()}

    steps: dict[str, Step] = {
        unit: session_step(session, step_feeds(session.inputs, tensors, x, y)) for unit, session in sessions.items()
    }
    steps["torch"] = torch_step(name, tensors, x, y, torch.get_num_threads(), device)
    times = timings(steps, 2 if machine.dry else TURNS, "torch")
    nodes = placement(graph, step_feeds(reference.inputs, tensors, x, y), device, training=True)
    providers = {unit: session.provider for unit, session in sessions.items()}
    on_card = not cuda or (not nodes["work"] and not nodes["copies"] and set(providers.values()) == {CUDA})
    return {
        "provider": providers["ours"],
        "reason": sessions["ours"].cpu_reason,
        "away": {unit: verdict["away"] for unit, verdict in verdicts.items()},
        **times,
        "verdicts": verdicts,
        "placement": nodes,
        "memory": memory,
        "ok": on_card and verdicts["ours"]["ok"] and verdicts["unrecorded"]["ok"],
    }


def _free_bytes(machine: Machine) -> int | None:
    """Free memory of the card, after torch has given back what it doesn't use."""
    if machine.device == CPU:
        return None
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])
