"""Saves, loads, uploads and downloads models as repositories of the Hugging Face hub, with a model card."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from fedprune import __version__
from fedprune.core import tensorfile
from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import path_exists, storage_errors
from fedprune.core.errors import MissingExtraError, ModelError, error_reason, value_text
from fedprune.core.validation import check_instance
from fedprune.output.document import Block, Document
from fedprune_export.bundles.conversion import check_onnx_parity, onnx_file, state_dict
from fedprune_export.importing import hub_folder, load
from fedprune_export.pruning.model import Model

_LOG = logging.getLogger("fedprune.export")

# The names that the hub takes: owner and name of up to 96 characters.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_TAGS = ("federated-learning", "structured-pruning", "onnx")

# Key of `config.json`: the digest of the card as it was written. Another digest means that the user edited the card,
# which is then kept.
_CARD_DIGEST = "card_sha256"

_USAGE_SECTION = """## Loading it

```python
import fedprune_export as fx

model = fx.from_pretrained("OWNER/NAME")  # this repository, or the folder
```

`model.onnx` runs in any ONNX runtime. `model.safetensors` is the state dict of the torch module:
`module.load_state_dict(safetensors.torch.load_file("model.safetensors"))`.
"""

_LICENCE_PLACEHOLDER = (
    "To be chosen by the publisher of the model; until then `license` at the head of this page is `unknown`."
)


@dataclass(frozen=True)
class ModelCard:
    """The card's facts about a model in addition to its shape.

    Attributes:
        data: The name of the data that it was trained on; empty if it has none.
        metrics: Measurements, such as accuracy, on samples of that data that no device had.
        classes: Names of its classes; by default the model's.
        license: The licence by its identifier on the hub, such as `apache-2.0`; empty for a placeholder.
        facts: Settings, for the first lines.
        sections: Paragraphs and tables by heading.
    """

    data: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    classes: Sequence[str] = ()
    license: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, Sequence[Block]] = field(default_factory=dict)

    def to_markdown(self, model: Model) -> str:
        """The card with the head that the hub reads (huggingface.co/docs/hub/model-cards)."""
        architecture = model.architecture
        task = "image-classification" if len(architecture.input_shape) == 3 and "accuracy" in self.metrics else "other"
        head: dict[str, Any] = {"library_name": "fedprune", "license": self.license or "unknown", "tags": [*_TAGS]}
        if task != "other":
            head["pipeline_tag"] = task
        if self.metrics:
            metric_rows = [{"type": name, "value": round(value, 6)} for name, value in self.metrics.items()]
            name = self.data or "own data"
            data = {"type": re.sub(r"\W+", "-", name).strip("-").lower() or "data", "name": name}
            result = {"task": {"type": task}, "dataset": data, "metrics": metric_rows}
            head["model-index"] = [{"name": architecture.name, "results": [result]}]
        # JSON is YAML, too.
        lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
        count = sum(t.size for t in model.tensors.values())
        inputs, outputs = (
            " × ".join(map(str, s)) or "1" for s in (architecture.input_shape, architecture.output_shape)
        )
        summary = f"A network of {count:,} parameters and statistics, {inputs} inputs and {outputs} outputs."
        body = Document(
            architecture.name,
            self.facts,
            {"": [summary], **self.sections, "Licence": [f"{self.license}." if self.license else _LICENCE_PLACEHOLDER]},
        )
        return "\n".join(["---", *lines, "---", "", body.to_markdown(), _USAGE_SECTION])


def save_pretrained(model: Model, folder: str | Path, *, card: ModelCard | None = None) -> Path:
    """Write a model as a folder in the hub's layout, once its graph is checked; returns the folder.

    The folder is made if it is not there. Files of an earlier model are replaced. `card` is for `README.md`; an edited
    one is kept, which is logged as a warning. Needs no network and no further library. Raises `ConfigError` if an
    argument is of another type, `ModelError` if the graph can't be written, `StorageError` if the disk fails.
    """
    check_instance("model", model, Model, "a model, such as one from fedprune_export.load")
    check_instance("folder", folder, (str, Path), "the path of a folder")
    check_instance("card", card, (ModelCard, NoneType), "a ModelCard")
    folder, card = Path(folder), card or ModelCard()
    graph = onnx_file(model.graph, model.tensors, model.architecture.name)
    check_onnx_parity(graph, model.graph)
    with storage_errors(f"can't make {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    text = card.to_markdown(model).encode()
    # Before config.json is written, which has the digest of the new card.
    edited = _is_edited(folder)
    # Loaders such as transformers' refuse a file that doesn't name its format.
    weights = tensorfile.encode(state_dict(model.tensors, model.graph), {"format": "pt"})
    write_atomically(folder / hub_folder.HUB_WEIGHTS_FILE, weights)
    write_atomically(folder / hub_folder.HUB_GRAPH_FILE, graph)
    if edited:
        _LOG.warning(
            "%s was edited and is kept: its figures may be those of an earlier model. Delete it and save again for a "
            "new one.",
            folder / hub_folder.HUB_CARD_FILE,
        )
    else:
        write_atomically(folder / hub_folder.HUB_CARD_FILE, text)
    config = json.dumps(_config(model, card, text), indent=2) + "\n"
    write_atomically(folder / hub_folder.HUB_CONFIG_FILE, config.encode())
    return folder


def from_pretrained(source: str | Path, *, revision: str | None = None, name: str | None = None) -> Model:
    """Import a model from a folder in the hub's layout, or from the hub itself.

    Args:
        source: `owner/name` on the hub, or a folder with `model.onnx`, whose weights those of a `model.safetensors`
            replace.
        revision: A branch, tag or commit of the repository on the hub.
        name: The architecture's name; by default the one in `config.json`, or that of the folder or repository.

    Raises:
        ModelError: There is no such folder or repository, or it holds something else.
        MissingExtraError: The hub is needed, and huggingface_hub is not installed.
    """
    check_instance("source", source, (str, Path), "a folder, or owner/name on the hub")
    if Path(source).is_dir():
        return load(Path(source), name=name)
    if not _REPOSITORY.fullmatch(str(source)):
        what = f"model {value_text(str(source))}"
        raise ModelError(what, expected="a folder, or owner/name on the hub", got="neither")
    hint = "If it is a folder of this machine, it isn't there; else see whether the hub has it, and is reachable."
    with _hub(f"can't get {source} from the hub", hint) as hub:
        file_names = [hub_folder.HUB_GRAPH_FILE, hub_folder.HUB_WEIGHTS_FILE, hub_folder.HUB_CONFIG_FILE]
        folder = Path(hub.snapshot_download(str(source), revision=revision, allow_patterns=file_names))
    return load(folder, name=name or hub_folder.model_name(folder, str(source).partition("/")[2]))


def push_to_hub(folder: str | Path, repository: str, *, private: bool = False, message: str = "") -> str:
    """Upload a folder of `save_pretrained`, with huggingface_hub's own login. Returns the commit's address.

    Args:
        repository: `owner/name`, which is made where it doesn't exist.
        private: Whether only its owner sees a new one.
        message: The commit's message.

    Raises:
        ModelError: The folder holds something else, or the hub refuses it.
        MissingExtraError: huggingface_hub is not installed.
    """
    folder = Path(folder)
    if not hub_folder.is_hub_folder(folder):
        expected = f"{', '.join(hub_folder.HUB_FILES)}, such as save_pretrained writes"
        raise ModelError(f"{folder}", expected=expected, got="none of that")
    if not _REPOSITORY.fullmatch(repository):
        raise ModelError("repository", expected="owner/name", got=value_text(repository))
    hint = "Log in with `hf auth login`, and see whether the repository is yours."
    with _hub(f"can't upload {folder} to {repository}", hint) as hub:
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            # Only the model's files are published, whatever is in the folder.
            allow_patterns=[*hub_folder.HUB_FILES],
            commit_message=message or f"Upload a model of fedprune {__version__}",
        )
    return str(commit.commit_url)


@contextmanager
def _hub(failure: str, hint: str) -> Iterator[Any]:
    """The hub's library. Raises `ModelError`, which begins with `failure`, for its errors."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError("the hub needs huggingface_hub, which is not installed", extra="hub") from error
    try:
        yield huggingface_hub
    except Exception as error:  # the library lets through whatever its client for HTTP raises
        raise ModelError(f"{failure} ({error_reason(error)})", hint=hint) from error


def _is_edited(folder: Path) -> bool:
    """Whether the folder has a card other than the one that was written with its `config.json`."""
    path = folder / hub_folder.HUB_CARD_FILE
    with storage_errors(f"can't read {path}"):
        if not path_exists(path):
            return False
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        return hub_folder.read_config(folder).get(_CARD_DIGEST) != digest
    except ModelError:
        return True


def _config(model: Model, card: ModelCard, text: bytes) -> dict[str, Any]:
    """Facts for programs and for the hub's count of downloads."""
    architecture = model.architecture
    config: dict[str, Any] = {
        "model_type": "fedprune",
        "name": architecture.name,
        "fedprune_version": __version__,
        "architecture": architecture.digest,
        "input_shape": architecture.input_shape,
        "output_shape": architecture.output_shape,
        _CARD_DIGEST: hashlib.sha256(text).hexdigest(),
    }
    if classes := card.classes or model.class_names:
        config["id2label"] = dict(enumerate(classes))
    return config
