"""The settings that each job of a server has of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.features import CUSTOM_LOSS
from fedprune_export.model_options import ImportChoices
from fedprune_server.config.setting import setting
from fedprune_server.storage.s3.bucket import IN_FOLDER, parse_bucket_url


@dataclass(frozen=True)
class JobSettings(ImportChoices):
    """A job, its model and samples, and what each job of a server has of its own."""

    job: Job = field(default_factory=Job)
    model: str | None = setting(
        None, "An ONNX file, or a torch factory as `package.module:function`, with which the job begins.", "MODEL"
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
