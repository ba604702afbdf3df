"""The store on disk. `Store.create`, `Store.open`; `Status` and `Failure` are what `Store.status` returns."""

from datamodels.store.store import Failure, Status, Store

__all__ = ["Failure", "Status", "Store"]
