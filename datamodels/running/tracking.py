"""Weights & Biases, for those who watch there: `pip install datamodels-store[wandb]`.

One run per worker process, and in it a step per committed row: its scalars, its `row`, and what the design chose for
it as `choices/<factor>`. Not a run per row: each costs a second or more and a place in every list, and thousands of
them hide what they show. The runs of a store are a group of their own; the table to analyse is the store itself.
Nothing that happens here fails a row: what goes wrong is said once, and the worker goes on without.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from datamodels.errors import ConfigError
from datamodels.store import Store
from datamodels.store import commit as commits

_FINISH = 60.0  # seconds


class Tracker:
    """The run of this process at Weights & Biases; `given` are those of entity, project, job_type and name."""

    def __init__(self, store: Store, given: Mapping[str, str]):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"--wandb.{next(iter(given))}: wandb cannot be imported ({error}); "
                f"pip install 'datamodels-store[wandb]'"
            ) from None
        self._store = store
        self._run: Any = None
        name = f"{given['name']}-{store.run.id[-8:]}" if "name" in given else store.run.id
        place = {} if "WANDB_DIR" in os.environ else {"dir": str(store.path)}
        try:
            self._run = wandb.init(
                **{**given, "name": name},
                **place,
                group=store.path.resolve().name,
                config={"store": str(store.path.resolve()), "run": store.run.id, "rows": store.num_models},
                settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
            )
            self._run.define_metric("*", step_metric="row")
            store.run.note(wandb=self._run.id)
        except Exception as error:
            self._give_up(error)

    def log(self, row: int, blobs: Mapping[str, bytes]) -> None:
        """Log a row that was committed; `blobs` are its bytes per key."""
        if self._run is None:
            return
        try:
            choices = self._store.design.assignment(row, with_mask=False).choices
            values: dict[str, Any] = {"row": row, **{f"choices/{name}": value for name, value in choices.items()}}
            for key, blob in blobs.items():
                field = self._store.field(key)
                failed = isinstance(blob, commits.Failed)
                if field.shape == () and field.value_dtype.kind in "biuf" and not failed:
                    values[key] = field.decode(np.frombuffer(blob, field.disk_dtype))[0].item()
            self._run.log(values)
        except Exception as error:
            self._give_up(error)

    def close(self, exit_status: int) -> None:
        """Send what is left, but not for ever where the network has gone."""
        if self._run is None:
            return
        finish = threading.Thread(target=self._finish, args=(exit_status,), daemon=True)
        finish.start()
        finish.join(_FINISH)
        if finish.is_alive():
            self._run = None
            print("wandb: the last rows are not sent yet; `wandb sync` does it", file=sys.stderr, flush=True)

    def _finish(self, exit_status: int) -> None:
        try:
            assert self._run is not None
            self._run.finish(exit_code=exit_status)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        print(f"wandb: {type(error).__name__}: {error}; going on without it", file=sys.stderr, flush=True)
        run, self._run = self._run, None
        with contextlib.suppress(Exception):
            if run is not None:
                run.finish(exit_code=1, quiet=True)
