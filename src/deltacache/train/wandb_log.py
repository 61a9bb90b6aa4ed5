"""Weights & Biases, if it is asked for: an optional extra, imported here alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.fingerprints import fingerprint_of


class WandbLog:
    """Sends rows to W&B, or with ``mode`` offline to ``OUT/wandb``, from where ``wandb sync`` sends them later.

    A resumed run goes on in the same W&B run, since its id follows from the output folder.

    Raises:
        DeltacacheError: the package is not installed, or W&B refuses to start.
    """

    def __init__(self, out: Path, kind: str, mode: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise DeltacacheError(
                f"wandb is {mode}, but the package is not installed ({error}): "
                "pip install 'deltacache[wandb]', or leave --wandb out"
            ) from error
        try:
            self._run = wandb.init(
                project="deltacache",
                name=f"{kind} {out.resolve().name}",
                id=fingerprint_of({"out": str(out.resolve())}),
                dir=out,
                config=dict(config),
                mode="offline" if mode == "offline" else "online",
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise DeltacacheError(
                f"Weights & Biases does not start ({error}): log in with `wandb login`, "
                "give --wandb offline, or leave it out"
            ) from error

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See ``EventLog``."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """See ``EventLog``: W&B writes by itself."""

    def close(self) -> None:
        """See ``EventLog``."""
        self._run.finish()
