"""Training checkpoints: one new folder each, whole before it has its name; the newest that verifies is loaded.

A checkpoint holds full float32 weights and Adam moments by parameter name, independent of the number of workers. Two
are kept, and the best one by validation.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from raydistill.errors import UserError
from raydistill.record.commit import commit_folder, damage, read_manifest
from raydistill.record.store import Store, naming

KEPT = 2
log = logging.getLogger(__name__)


@dataclass
class State:
    """Where a training stands. Order of rows, dropout and learning rate follow from `step`, so it needs no more."""

    step: int = 0
    best_step: int = 0
    best_value: float | None = None
    last_value: float | None = None
    validations_without_gain: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on local disk."""

    folder: Path
    state: State

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(str(self.folder / "model.safetensors"))

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return load_file(str(self.folder / "optimizer.safetensors"))


class Checkpoints:
    """The checkpoints of one training, which its fingerprint names."""

    def __init__(self, store: Store, folder: str, fingerprint: str, state: type[State] = State) -> None:
        """`state` is what stands beside weights and moments: a training's, or one that holds more."""
        self._state = state
        self._store, self._folder, self._fingerprint = store, f"{folder}/checkpoints", fingerprint

    def _name(self, step: int) -> str:
        return f"{self._folder}/step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, rising; whether it verifies is seen on loading."""
        names = (folder.rpartition("/")[2] for folder in self._store.folders(self._folder))
        return sorted(int(n.removeprefix("step-")) for n in names if n.startswith("step-") and n[5:].isdigit())

    def newest(self) -> int | None:
        """The step of the newest checkpoint that verifies; one warning for every newer one that does not."""
        for step in reversed(self.steps()):
            if problem := self._problem(step):
                log.warning("%s %s; going on from an older checkpoint", self._store.where(self._name(step)), problem)
                continue
            return step
        return None

    def _problem(self, step: int) -> str:
        try:
            manifest = read_manifest(self._store, self._name(step))
        except UserError:
            return "has a damaged manifest"
        if manifest is None:
            return "has no manifest"
        if manifest.fingerprint != self._fingerprint:
            return "belongs to another training"
        broken = damage(self._store, self._name(step), manifest)
        return f"is damaged: {broken[0][0].rpartition('/')[2]} {broken[0][1]}" if broken else ""

    def load(self, step: int) -> Checkpoint:
        """A checkpoint after its files were verified. Raises UserError when one is damaged or missing."""
        if problem := self._problem(step):
            raise UserError(f"{self._store.where(self._name(step))}: {problem}. Train again with --redo")
        folder = self._store.local(self._name(step))
        return Checkpoint(folder, self._state(**json.loads((folder / "state.json").read_text())))

    def save(self, state: State, weights: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor]) -> None:
        """Commits a checkpoint, then the pointer to it, then clears away the oldest."""
        name = self._name(state.step)
        if self._store.exists(name) and not self._problem(state.step):
            return
        staged = self._store.staging(name)
        staged.mkdir(parents=True)
        with naming(staged):
            save_file({n: t.contiguous() for n, t in weights.items()}, str(staged / "model.safetensors"))
            save_file(optimizer, str(staged / "optimizer.safetensors"))
            (staged / "state.json").write_text(json.dumps(asdict(state)))
        commit_folder(self._store, staged, name, self._fingerprint)
        self._store.write(f"{self._folder}/latest.json", json.dumps({"step": state.step}).encode())
        for step in self.steps()[:-KEPT]:
            if step != state.best_step:
                self._store.remove(self._name(step))
