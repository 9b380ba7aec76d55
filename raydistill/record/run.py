"""A run's folder: where each stage stands, whose it is, whether it is complete, and what may be cleared away."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from raydistill.config.export import FORMATS
from raydistill.errors import UserError
from raydistill.record.commit import MANIFEST, Manifest, damage, read_manifest, set_aside, sidecar_name
from raydistill.record.fingerprint import Plan, first_difference
from raydistill.record.store import Store, open_store, unreachable


@dataclass(frozen=True)
class Part:
    """A part of a run: the stage that makes it, the folder with its plan, and the one that its manifest completes."""

    stage: str
    folder: str
    product: str


PARTS = {
    "answers": Part("prepare", "answers", "answers"),
    "data": Part("prepare", "data", "data"),
    "folds": Part("teach", "teacher/folds", "teacher/folds"),
    "teacher": Part("teach", "teacher/train", "teacher/model"),
    "cache": Part("teach", "teacher/cache", "teacher/cache"),
    "features": Part("teach", "teacher/features", "teacher/features"),
    "calibration": Part("teach", "teacher/calibration", "teacher/calibration"),
    "tune": Part("tune", "tune", "tune"),
    "student_rows": Part("train", "student_rows", "student_rows"),
    "student": Part("train", "train", "student"),
    **{f"export/{name}": Part("export", f"export/{name}", f"export/{name}") for name in FORMATS},
    "teacher-int8": Part("evaluate", "teacher/int8", "teacher/int8"),
    "control": Part("evaluate", "control/train", "control/model"),
    "report": Part("evaluate", "report", "report"),
}
LENT = ("answers", "data", "folds", "teacher", "cache", "features")
# Further teachers, of which a config may ask for any number, are parts by the names of their folders.
FURTHER_TEACHER = re.compile(r"teacher(/member-\d+)?(/fold-\d+)?")
# So are the repetitions of student and control with another seed; below `seeds/1/` is what a run has of its first one.
REPETITION = re.compile(r"seeds/\d+/(student|control)")
# What was damaged is set aside as NAME.bad-1, what was made for another plan as FOLDER.1. Other names end in numbers
# too: TensorBoard's do.
ASIDE = re.compile(
    rf"\.bad-\d+(/|$)|^({'|'.join(f'{part.folder}|{part.product}' for part in PARTS.values())}"
    rf"|{FURTHER_TEACHER.pattern}/(train|model)|seeds/\d+/(train|student|control/train|control/model))\.\d+(/|$)"
)
STAGES = ("prepare", "teach", "tune", "train", "export", "evaluate")


def part_of(name: str) -> Part:
    """The part of that name: one that every run knows, a further teacher (`teacher/member-1/fold-0`), a repetition."""
    if name in PARTS:
        return PARTS[name]
    if REPETITION.fullmatch(name):
        place, _, role = name.rpartition("/")
        return Part(PARTS[role].stage, f"{place}/{PARTS[role].folder}", f"{place}/{PARTS[role].product}")
    assert FURTHER_TEACHER.fullmatch(name), name
    return Part("teach", f"{name}/train", f"{name}/model")


def _is_lent(part: str) -> bool:
    return part in LENT or part.startswith("teacher/")


@dataclass(frozen=True)
class Run:
    """The folders of one run; data and cache may belong to another run (`teacher.cache_from`).

    `redo` names the stage that the user asked to do again: what stands there, and later parts that no longer fit, are
    kept aside under numbered names instead of being refused.
    """

    store: Store
    lender: Store | None = None
    redo: str | None = None

    def lent(self, location: str | None) -> Run:
        """This run with the data and cache of the run at a location, where one is given."""
        return replace(self, lender=open_store(location) if location else None)

    def home(self, part: str) -> Store:
        """The store in which a part stands."""
        return self.lender if self.lender and _is_lent(part) else self.store

    def complete(self, part: str) -> Manifest | None:
        return read_manifest(self.home(part), part_of(part).product)

    def require(self, part: str) -> Manifest:
        """The manifest of a part that is needed. Raises UserError that names the stage to run first."""
        manifest = self.complete(part)
        if manifest is None:
            where = self.home(part).where(part_of(part).product)
            raise UserError(f"{where}: is not complete. Run `raydistill {part_of(part).stage}` with its config first")
        return manifest

    def plan(self, part: str) -> Plan | None:
        name = f"{part_of(part).folder}/plan.json"
        home = self.home(part)
        return Plan.unsealed(home.read(name), home.where(name)) if home.exists(name) else None

    def parts(self) -> list[str]:
        """Every part that a run may have: those that all know, further teachers and repetitions that stand there."""
        names = (name.removesuffix("/train/plan.json") for name in self.home("teacher").list("teacher"))
        teachers = (name for name in names if name not in PARTS and FURTHER_TEACHER.fullmatch(name))
        repeated = (f"{place}/{role}" for place in self.store.folders("seeds") for role in ("student", "control"))
        return [*PARTS, *teachers, *(name for name in repeated if self.plan(name) is not None)]

    def begin(self, part: str, plan: Plan) -> Manifest | None:
        """Opens a part for this plan; its manifest when it is complete already, None when there is work to do.

        Raises UserError, naming the first field that differs, when the part stands there for another plan.
        """
        self._make_way(part, plan)
        if self.plan(part) is None:
            name = f"{part_of(part).folder}/plan.json"
            if self.lender and _is_lent(part):
                raise UserError(f"teacher.cache_from: {self.lender.where(name)} is missing. Finish that run first")
            self.store.write(name, plan.sealed())
        return self._made_for(part, plan)

    def standing(self, part: str, plan: Plan) -> Manifest | None:
        """As `begin`, for a part whose plan is committed with it: nothing is written before."""
        self._make_way(part, plan)
        return self._made_for(part, plan)

    def _make_way(self, part: str, plan: Plan) -> None:
        self.check(part, plan)
        if self.outdated(part, plan):
            self.set_aside(part)

    def _made_for(self, part: str, plan: Plan) -> Manifest | None:
        manifest = self.complete(part)
        if manifest is not None and manifest.fingerprint != plan.fingerprint:
            set_aside(self.store, part_of(part).product, ".")
            return None
        return manifest

    def outdated(self, part: str, plan: Plan) -> bool:
        """Whether a part stands there for another plan."""
        standing = self.plan(part)
        return standing is not None and standing.fingerprint != plan.fingerprint

    def check(self, part: str, plan: Plan) -> None:
        """Raises UserError when the part stands there for another plan and the user did not ask to redo it."""
        standing = self.plan(part)
        if standing is None or not self.outdated(part, plan):
            return
        if (self.lender and _is_lent(part)) or not self.redo or not _later(part_of(part).stage, self.redo):
            raise UserError(self._mismatch(part, standing, plan))

    def _mismatch(self, part: str, old: Plan, new: Plan) -> str:
        what, before, after = first_difference(old.inputs, new.inputs) or ("plan", old.fingerprint, new.fingerprint)
        where, stage = self.home(part).where(part_of(part).folder), part_of(part).stage
        advice = f"Take another run name, or --redo {stage} (what stands there is kept aside)"
        if self.lender and _is_lent(part):
            advice = "Set it as it was, or leave out teacher.cache_from"
        return f"{where}: {what}: was made with {_short(before)}, now asked for {_short(after)}. {advice}"

    def set_aside(self, part: str) -> None:
        """Moves a part's folders to numbered names."""
        for folder in dict.fromkeys((part_of(part).product, part_of(part).folder)):
            set_aside(self.store, folder, ".")


def _later(stage: str, redo: str) -> bool:
    return STAGES.index(stage) >= STAGES.index(redo)


def open_run(storage: str, name: str, *, cache_from: str | None = None, redo: str | None = None) -> Run:
    """The run of that name, and the run that lends it data and cache. Makes nothing."""
    return Run(open_store(f"{storage.rstrip('/')}/{name}"), redo=redo).lent(cache_from)


def find_run(location: str) -> Run:
    """The run at a folder or URL that the user named. Raises UserError when none is there."""
    store = open_store(location)
    try:
        found = store.exists("config.yaml")
    except Exception as error:  # each store's client raises its own kinds
        raise unreachable("RUN", location, error) from None
    if not found:
        raise UserError(f"{location}: is not a run's folder (no config.yaml). Give <storage>/<name>")
    return Run(store)


@dataclass(frozen=True)
class Finding:
    """One thing that `verify` found wrong."""

    file: str
    problem: str


def verify(run: Run, *, repair: bool = False) -> tuple[int, list[Finding]]:
    """Re-reads every committed file: how many there are, and what is wrong.

    With `repair` what is damaged is set aside under a numbered name, so that the next run makes exactly that again.
    """
    checked, findings, bad = 0, [], []
    for folder in manifest_folders(run.store):
        checked += 1
        try:
            manifest = read_manifest(run.store, folder)
        except UserError as error:
            findings.append(Finding(f"{folder}/{MANIFEST}", str(error)))
            bad.append(f"{folder}/{MANIFEST}")
            continue
        if manifest is None:  # a training that goes on has just cleared this checkpoint away
            continue
        broken = damage(run.store, folder, manifest)
        checked += len(manifest.files)
        findings += [Finding(name, problem) for name, problem in broken]
        if broken and _made_whole(run.store, folder, manifest):
            bad.append(folder)
        elif broken:
            bad += [name for file, _ in broken for name in (file, sidecar_name(file))] + [f"{folder}/{MANIFEST}"]
    for part in run.parts():
        name = f"{part_of(part).folder}/plan.json"
        if run.store.exists(name):
            checked += 1
            try:
                Plan.unsealed(run.store.read(name), name)
            except UserError as error:
                findings.append(Finding(name, str(error)))
                bad.append(name)
    for name in bad if repair else ():
        set_aside(run.store, name, ".bad-")
    return checked, findings


def _made_whole(store: Store, folder: str, manifest: Manifest) -> bool:
    """Whether a folder was published as one, like a model or a checkpoint, and is made again as one."""
    has_shards = any(entry.file.endswith(".parquet") for entry in manifest.files)
    return not has_shards and not store.exists(f"{folder}/plan.json")


def manifest_folders(store: Store) -> list[str]:
    """Every folder that holds a manifest and was not set aside."""
    folders = [name.rpartition("/")[0] for name in store.list() if name.endswith(f"/{MANIFEST}")]
    return [f for f in folders if not is_aside(f) and "/." not in f"/{f}"]


def is_aside(name: str) -> bool:
    """Whether a file was set aside, or stands in a folder that was."""
    return bool(ASIDE.search(name))


def leftovers(run: Run) -> list[str]:
    """What no manifest names and no unfinished stage needs: temporary files, and what was set aside."""
    return [name for name in run.store.list() if _is_left_over(name)]


def clear(run: Run, names: list[str]) -> None:
    """Removes leftovers, each with the outermost folder that is one itself, so that no empty folder stays."""
    for outermost in dict.fromkeys(next(p for p in _leading(name) if _is_left_over(p)) for name in names):
        run.store.remove(outermost)


def _leading(name: str) -> list[str]:
    """The folders that lead to a file, outermost first, and the file."""
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _is_left_over(name: str) -> bool:
    parts = name.split("/")
    return is_aside(name) or any(p.startswith(".") and p.endswith(".tmp") for p in parts) or ".ray" in parts


def _short(value: Any) -> str:
    text = str(value) if value is not None else "nothing"
    return text if len(text) <= 40 else text[:19] + "…"
