"""Every whole network of the tests at every density: `python benchmarks/whole_models.py [--only NAME ...]`.

Cut networks beside the masked whole one, at several batch sizes and random ranks; channel groups beside
Torch-Pruning's, and the network that it has physically pruned to the same channels beside our cut one. pytest has the
quick part of it.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

from synthetic_nets import setting, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

DENSITIES = (0.25, 0.5, 0.75, 0.001)
BATCHES = (2, 4, 7)
DRAWS = 2
BOUND = 1e-5


def measure(name: str) -> dict[str, Any]:
    """One network."""
    from fedprune_export.pruning.cut import cut, masked
    from support.nets import whole_models
    from support.oracles.cutting import distance, outputs, random_selection

    start = time.process_time()
    model = whole_models.imported(name)
    imported = time.process_time() - start
    cuts: dict[str, float] = {}
    kept = 0.0
    for density in DENSITIES:
        for draw in range(DRAWS):
            selection = random_selection(model, density, seed=draw)
            if density == 0.5:
                kept = sum(v.size for v in selection.gather(model.tensors).values())
            small, whole = cut(model, selection), masked(model, selection)
            for batch in BATCHES:
                x = whole_models.samples(name, batch, seed=draw)
                far = distance(outputs(small, x), outputs(whole, x))
                key = "one" if density < 0.01 else str(density)
                cuts[key] = max(cuts.get(key, 0.0), far)
    size = sum(v.size for v in model.tensors.values())
    return {
        "name": name,
        "parameters": size,
        "nodes": len(model.graph.nodes),
        "groups": len(model.architecture.groups),
        "kept": kept / size,
        "cuts": cuts,
        "notes": [n for n in model.notes if "stay" in n],
        "torch_pruning": beside(name, model),
        "import_seconds": round(imported, 1),
        "seconds": round(time.process_time() - start, 1),
    }


def beside(name: str, model: Any) -> dict[str, Any]:
    """Torch-Pruning's groups, and its pruned network."""
    from fedprune_export.pruning.cut import cut
    from support.nets import whole_models
    from support.oracles.cutting import distance, outputs, random_selection
    from support.oracles.physical_pruning import lines, our_groups, outputs_of, prune, their_groups

    whole = whole_models.MODELS[name]
    if whole.vocabulary:
        return {"error": "it takes no words"}
    module = whole.make()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = their_groups(module)
    except Exception as error:  # noqa: BLE001 - whatever it stumbles over
        return {"error": f"it fails: {type(error).__name__}: {' '.join(str(error).split())[:80]}"}
    ours = our_groups(model.architecture, module)
    found: dict[str, Any] = {
        "theirs": sum(theirs.values()),
        "only_ours": lines(ours - theirs),
        "only_theirs": lines(theirs - ours),
    }
    if not found["only_ours"] and not found["only_theirs"]:
        selection = random_selection(model, 0.5, seed=9)
        x = whole_models.samples(name, 4)
        try:
            theirs_cut = outputs_of(prune(module, selection), x)
        except RuntimeError as error:
            found["error"] = f"same, but what it has pruned doesn't run: {' '.join(str(error).split())[:60]}"
        else:
            found["pruned"] = distance(outputs(cut(model, selection), x), theirs_cut)
    return found


def page(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    worst = max(d for r in rows for d in r["cuts"].values())
    wrong = [r["name"] for r in rows if max(r["cuts"].values()) > BOUND]
    same = [r for r in rows if "pruned" in r["torch_pruning"]]
    pruned = max((r["torch_pruning"]["pruned"] for r in same), default=0.0)
    text = f"""{len(rows)} networks, {len(DENSITIES)} densities, {DRAWS} draws of random ranks, batches of
    {", ".join(map(str, BATCHES))}: {len(wrong)} wrong cuts{": " + ", ".join(wrong) if wrong else ""}; the furthest from
    its masked original is {worst:.1e} off (the bound is {BOUND:g}). Groups equal Torch-Pruning's in {len(same)}
    networks, and there the network that it has pruned to the same channels is at most {pruned:.1e} from our cut one.
    The differences in others are explained, and decided by what runs, in `tests/export/pruning/test_torch_pruning.py`.
    {sum(r["seconds"] for r in rows):.0f} s of processor time."""
    lines = []
    for r in rows:
        cuts = " | ".join(f"{r['cuts'][k]:.0e}" for k in ("0.25", "0.5", "0.75", "one"))
        sizes = f"{r['parameters'] / 1e6:.3f} | {r['groups']} | {r['kept']:.2f}"
        lines.append(f"| {r['name']} | {sizes} | {cuts} | {verdict(r['torch_pruning'])} |")
    differ = [
        f"- {r['name']}: "
        + "; ".join(
            f"{whose}: " + " / ".join(some[:4]) + (f" / and {len(some) - 4} more" if len(some) > 4 else "")
            for whose in ("only_ours", "only_theirs")
            if (some := r["torch_pruning"].get(whose))
        )
        .replace("only_ours", "only ours")
        .replace("only_theirs", "only theirs")
        for r in rows
        if r["torch_pruning"].get("only_ours") or r["torch_pruning"].get("only_theirs")
    ]
    stays = [f"- {r['name']}: {' '.join(r['notes'][:2])}" for r in rows if r["notes"]]
    table, differences, held = "\n".join(lines), "\n".join(differ), "\n".join(stays) or "Nothing."
    return f"""# Whole networks, cut

{about["date"]}, {about["cpu"]}, one thread, Python {about["python"]}, onnxruntime {about["onnxruntime"]}, torch
{about["torch"]}, timm {about["timm"]}, Torch-Pruning {about["torch_pruning"]}. `python benchmarks/whole_models.py`

{textwrap.fill(" ".join(text.split()), 118)}

*kept*: share of the parameters that is left at density .5. *cut at*: largest relative distance from the masked whole
network. *Torch-Pruning*: "same (x)" where its groups are the same, with the distance of its pruned network from ours.

| network | parameters (M) | groups | kept | cut at .25 | .5 | .75 | one channel | Torch-Pruning |
|---|---|---|---|---|---|---|---|---|
{table}

## Groups that only one of both has

{differences}

## Channels that stay

{held}
"""


def verdict(found: dict[str, Any]) -> str:
    """What a row says of Torch-Pruning."""
    if "error" in found:
        return str(found["error"])
    return f"same ({found['pruned']:.0e})" if "pruned" in found else "differs, see below"


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut every whole network of the tests at every density.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these networks, and no page")
    options = parser.parse_args()
    import torch

    from support.nets import whole_models

    torch.set_num_threads(1)
    rows = []
    for name in options.only or whole_models.MODELS:
        rows.append(measure(name))
        row = rows[-1]
        print(name, row["groups"], f"{row['kept']:.2f}", f"{max(row['cuts'].values()):.1e}", flush=True)
        print("   ", verdict(row["torch_pruning"]), f"{row['seconds']} s", file=sys.stderr, flush=True)
    if not options.only:
        about = setting("onnxruntime", "torch", "timm")
        about["torch_pruning"] = setting("torch-pruning")["torch-pruning"]
        write("whole_models", {"setting": about, "bound": BOUND, "networks": rows}, page(about, rows))


if __name__ == "__main__":
    main()
