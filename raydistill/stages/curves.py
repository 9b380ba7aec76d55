"""What a training writes for people to look at: metrics.jsonl and TensorBoard scalars."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raydistill.record.store import LocalStore, Store
from raydistill.stages.watch import Watch


class Curves:
    """Points of the training curves by step; after a stop they go on where the checkpoint stands."""

    def __init__(self, store: Store, folder: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._store, self._name, self._folder = store, f"{folder}/metrics.jsonl", f"{folder}/tensorboard"
        lines = store.read(self._name).decode().splitlines() if store.exists(self._name) else []
        self._points = [p for p in (json.loads(line) for line in lines) if p["step"] <= step]
        local = isinstance(store, LocalStore)
        self._events = Path(store.where(self._folder) if local else tempfile.mkdtemp(prefix="raydistill-events-"))
        self._writer = SummaryWriter(str(self._events), purge_step=step + 1)

    def add(
        self,
        step: int,
        epoch: float,
        values: dict[str, float],
        group: str = "train",
        notes: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Adds a point and gives it back; `notes` stand in metrics.jsonl alone."""
        point = {"step": step, "epoch": round(epoch, 4), "group": group, **values, **(notes or {})}
        self._points.append(point)
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)
        return point

    def save(self) -> None:
        """Makes what was added so far durable."""
        self._writer.flush()
        self._store.write(self._name, "".join(json.dumps(point) + "\n" for point in self._points).encode())
        if not isinstance(self._store, LocalStore):
            for path in self._events.iterdir():
                self._store.write(f"{self._folder}/{path.name}", path.read_bytes())

    def close(self) -> None:
        self.save()
        self.leave()

    def leave(self) -> None:
        """Ends without another write of the points: what was saved stays, and someone else may go on with it."""
        self._writer.close()


class WatchedCurves(Curves):
    """Curves that a watch follows; what it finds stands among the points, as the group warning, and is posted."""

    def __init__(
        self, store: Store, folder: str, step: int, watch: Watch | None, post: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__(store, folder, step)
        self._watch, self._post = watch, post
        if watch:
            for point in self._points:
                watch.add(point)  # what it finds in points from before a stop was told then

    def add(
        self,
        step: int,
        epoch: float,
        values: dict[str, float],
        group: str = "train",
        notes: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        point = super().add(step, epoch, values, group, notes)
        for alarm in self._watch.add(point) if self._watch else ():
            super().add(step, epoch, {}, "warning", asdict(alarm))
            self._post({"step": step, "warning": alarm.text})
        return point


def read_curves(store: Store, folder: str) -> list[dict[str, Any]]:
    """The points of a training so far."""
    name = f"{folder}/metrics.jsonl"
    return [json.loads(line) for line in store.read(name).decode().splitlines()] if store.exists(name) else []
