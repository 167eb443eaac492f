"""The settings that each job of a server has of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.features import CUSTOM_LOSS
from fedprune_server.config.setting import setting
from fedprune_server.storage.s3.bucket import IN_FOLDER, parse_bucket_url


@dataclass(frozen=True)
class JobSettings:
    """A job, its model and samples, and what each job of a server has of its own."""

    job: Job = field(default_factory=Job)
    model: str | None = setting(
        None, "An ONNX file, or a torch factory as `package.module:function`, with which the job begins.", "MODEL"
    )
    input_shape: tuple[int | str, ...] | None = setting(
        None,
        "One sample's shape, for a torch factory whose module doesn't state it, or an ONNX file with free sizes; "
        "`LEAST:MOST` for a length that varies.",
    )
    output: str | None = setting(
        None, "The output of an ONNX file from which the model is trained, or a value within it.", "NAME"
    )
    loss: str | None = setting(
        None,
        'A loss of your own, for recipe.loss = "custom": `package.module:function` of outputs and labels, or an ONNX '
        "file.",
        "LOSS",
    )
    metric: str | None = setting(
        None,
        'A metric of your own, for recipe.metric = "custom", in the forms of `loss`; a higher value is better.',
        "METRIC",
    )
    lora: str | None = setting(
        None,
        "Adapters to train; the weights are frozen: `RANK`, or `RANK:PATTERN,PATTERN` of names of "
        "linear layers' weights.",
        "RANK[:PATTERN,...]",
    )
    base: str | None = setting(
        None,
        "The precision in which frozen weights are stored, sent and loaded: `float16`, or `int8` with one scale per "
        "output channel.",
        "PRECISION",
    )
    evaluation: str | None = setting(
        None, "The server's own samples: a `.npz` file with x and y, or `package.module:function`.", "DATA"
    )
    calibration: str | None = setting(
        None,
        "Samples (labels aren't needed) on which batch-norm statistics are measured again, and on which `fedprune` "
        "can distil the global model.",
        "DATA",
    )
    database: str | None = setting(
        None,
        "A PostgreSQL database, as `postgresql+psycopg://user@host/name`; without it, SQLite in the state folder.",
        "URL",
    )
    blobs: str = setting(
        IN_FOLDER, "Where blobs are stored: `folder`, the state folder, or `s3://bucket/prefix`.", "URL"
    )
    cache_mib: int = setting(10240, "MiB of a bucket's blobs that the state folder caches.", within=(1, 10**9))
    pulls: int = setting(4, "Number of devices from which updates are pulled at the same time.", within=(1, 1000))
    workers: int = setting(1, "Number of processes that make submodels.", "N", within=(1, 1000))
    keep: int = setting(
        3, "How many of the latest global models are kept, beside the best by evaluation.", "N", within=(1, 10**6)
    )
    weight: float = setting(
        1.0,
        "The job's share of the boards, relative to the server's other jobs; 0 pauses it next to them.",
        "W",
        within=(0, 1000),
    )

    def check_job(self) -> None:
        """Raise `ConfigError` if settings don't fit together."""
        for name in ("loss", "metric"):
            if getattr(self, name) is not None and (recipe_choice := getattr(self.job.recipe, name)) != CUSTOM_LOSS:
                raise ConfigError(
                    ("model", name), expected=f"recipe.{name} = {CUSTOM_LOSS!r} with it", got=repr(recipe_choice),
                    hint=f"Say so in [job.recipe], or leave the {name} of your own out.",
                )  # fmt: skip
        if self.blobs != IN_FOLDER:
            parse_bucket_url(self.blobs)


# A server with several jobs reads these from each job's file; every other setting is the server's, and set once.
JOB_KEYS = tuple(f.name for f in fields(JobSettings))
