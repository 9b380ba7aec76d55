"""Small runs of the stages without Ray, each in a forked child that a fault may kill.

Imports cost seconds and a small run less, so this process imports once and forks a child for every run. It reads one
JSON request a line and answers with one JSON object a line. It must stay free of threads and of torch work: a fork
would inherit half of them.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import json
import logging
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import torch.distributed as dist

from raydistill import demo, demo_language, engine, stories, tickets
from raydistill.config.file import validate
from raydistill.config.run import Config
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models.loading import load_language_model, start_classifier
from raydistill.record import store
from raydistill.record.fingerprint import digest
from raydistill.record.run import open_run
from raydistill.stages import (
    evaluate,
    fused,
    group_training,
    pipeline,
    scoring,
    teach,
    teachers,
    trainer,
    training_job,
    tune,
)
from raydistill.stages.cluster import Resources
from raydistill.stages.job import TrainingJob
from raydistill.stages.language import evaluate as language_evaluate
from raydistill.stages.latency import Load, measure
from raydistill.stages.loop import run_training
from raydistill.stages.progress import Progress
from raydistill.stages.ranks import from_rank_zero
from raydistill.stages.search import Search
from raydistill.stages.trial import Outcome, Trials
from raydistill.stages.trial_training import follow

# What a run imports on its way, so that no child has to.
LATE_IMPORTS = (
    "deepspeed.module_inject.auto_ep_layer", "encodings.utf_8_sig", "fsspec.implementations.local", "pandas",
    "peft", "torch._dynamo", "torch.utils.tensorboard", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "transformers.models.encoder_decoder.configuration_encoder_decoder", "transformers.models.llama.modeling_llama",
)  # fmt: skip
TRAIN_ROWS, TEST_ROWS, SHARD_ROWS = 60, 20, 16
LANGUAGE_ROWS = 40


def write_input(folder: Path) -> None:
    """Tickets, and a tiny BERT classifier with a new head for their categories."""
    train, _ = tickets.write_tickets(folder, train_rows=TRAIN_ROWS, test_rows=TEST_ROWS)
    texts = train.read_text().splitlines()[1:]
    demo.write_new_bert(folder / "bert", texts, hidden_size=16, layers=2, heads=2, vocabulary=200)
    torch.manual_seed(0)
    teacher = start_classifier("teacher.model", folder / "bert", sorted(tickets.CATEGORIES))
    teacher.save_pretrained(folder / "teacher")
    load_tokenizer(folder / "bert", "teacher.model").save_pretrained(folder / "teacher")


def config(folder: Path, source: Path, changes: dict[str, Any]) -> Config:
    """The run in `folder` over the input in `source`; `changes` are settings by dotted name."""
    settings: dict[str, Any] = {
        "name": folder.name,
        "storage": str(folder.parent),
        "data": {
            "train": str(source / "train.csv"),
            "test": str(source / "test.csv"),
            "label": "category",
            "max_length": 48,
            "shard_rows": SHARD_ROWS,
        },
        "teacher": {"model": str(source / "teacher"), "codec": "dense-int8", "dtype": "float32"},
        "student": {"init": "config", "hidden_size": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.1},
        "train": {
            "epochs": 2, "batch_size": 16, "checkpoint_every": 3, "learning_rate": 1e-3, "precision": "fp32",
            "metric": "kl",
        },
    }  # fmt: skip
    if (source / "train.jsonl").exists():
        settings = language_settings(folder, source)
    for name, value in changes.items():
        *sections, key = name.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return validate(settings, {}, "small run")


def write_language_input(folder: Path) -> None:
    """Stories, and a tiny Llama with new weights."""
    train, _ = stories.write_stories(folder, train=LANGUAGE_ROWS, test=12)
    texts = [json.loads(line)["text"] for line in train.read_text().splitlines()]
    demo_language.write_new_llama(
        folder / "teacher", texts, hidden_size=16, layers=2, heads=2, vocabulary=300, positions=64
    )
    teacher = load_language_model("teacher.model", folder / "teacher")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in teacher.parameters():  # so that its distributions are not all the same
            parameter.add_(0.3 * torch.randn_like(parameter))
    teacher.save_pretrained(folder / "teacher")


def language_settings(folder: Path, source: Path) -> dict[str, Any]:
    """A run of language models: rows of 48 tokens, about ten steps."""
    return {
        "name": folder.name,
        "storage": str(folder.parent),
        "task": "causal_lm",
        "data": {
            "train": str(source / "train.jsonl"), "test": str(source / "test.jsonl"), "max_length": 48,
            "validation": 0.2, "shard_rows": SHARD_ROWS,
        },
        "teacher": {"model": str(source / "teacher"), "dtype": "float32"},
        "student": {
            "init": "config", "model_type": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2,
            "feed_forward": 32, "tie_embeddings": True,
        },
        "train": {
            "epochs": 2, "batch_size": 8, "checkpoint_every": 3, "learning_rate": 1e-2, "precision": "fp32",
            "metric": "kl", "log_every": 2,
        },
        "evaluate": {"latency_requests": 16, "bootstrap": 200, "samples": 2, "sample_tokens": 4},
    }  # fmt: skip


class Record:
    """What a run did, for its answer."""

    def __init__(self) -> None:
        self.operations: list[str] = []
        self.scored: list[str] = []
        self.posts: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.warnings: list[str] = []
        self.history: dict[str, list[dict[str, float]]] = {}
        self.failed: dict[str, str] = {}


def run_stages(request: dict[str, Any], record: Record) -> None:
    """`raydistill run` with one process in the place of Ray's actors and workers, and models that are not timed."""

    @contextlib.contextmanager
    def cluster(config: Config, stages: tuple[str, ...]) -> Iterator[Resources]:
        cpus = config.cluster.cpus or config.train.workers
        yield Resources(cpus=cpus, gpus=0, node_cpus=cpus, trial_drivers=1)

    def map_shards(jobs: Any, tasks: list[dict[str, Any]], share: Any, progress: Progress) -> Iterator[dict[str, Any]]:
        actor = scoring.ScoringActor(jobs, 1)
        for task in tasks:
            record.scored.append(task["file"])
            yield {name: values[0] for name, values in actor({name: [task[name]] for name in task}).items()}

    def fit(job: TrainingJob, *_: Any) -> None:
        if job.settings.workers > 1:
            return in_ranks(job.settings.workers, lambda rank: fit_rank(job, record if rank == 0 else Record()))
        if request.get("plain"):
            run_training(job, post=record.posts.append, stopped=lambda: False)
            return None
        if not dist.is_initialized():  # one for all trainings of a run: DeepSpeed keeps the groups that it made
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        run_training(job, post=record.posts.append, stopped=lambda: False)
        return None

    def time_models(sources: Any, config: Config, *_: Any) -> dict[str, Any]:
        load = Load(2, 2, 1, config.data.max_length, config.evaluate.dtype)
        return {"cpu": measure(sources, ["my card was charged twice"] * 4, load, "cpu")}

    def run_trials(search: Search, trials: Trials, *_: Any) -> None:
        if (workers := trials.config.trial_workers) > 1:
            return in_ranks(workers, lambda rank: search_rank(search, record, rank))
        while (work := search.next()) is not None:
            search.start(work.kept)
            training = group_training.training_of(work)
            while True:
                outcomes = training.step()
                record.posts += [{"trial": outcome.number, "epochs": len(outcome.curve)} for outcome in outcomes]
                if not (kept := search.update(outcomes)):
                    break
                training.keep(kept)
            training.close()
            search.leave(work.kept)
        if search.problem:
            raise UserError(search.problem)
        return None

    def on_a_node(function: Any, resources: Any, progress: Any, *arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    language_evaluate.on_a_node = on_a_node
    pipeline.cluster, scoring._map_shards, trainer._fit = cluster, map_shards, fit
    tune.run_trials = run_trials
    if request.get("no_room_for_groups"):
        group_training.FusedGroup = no_room
    if pattern := request.get("refused"):
        refuse(pattern)
    evaluate.time_models = time_models
    settings = config(Path(request["folder"]), Path(request["source"]), request.get("changes", {}))
    pipeline.run_stages(
        settings, tuple(request["stages"]), Progress(record.said.append), redo=request.get("redo") or None
    )


def no_room(*_: Any, **__: Any) -> None:
    raise MemoryError("no room")


def refuse(pattern: str) -> None:
    """From now on no file whose name fits is looked at in any way."""

    def refusing(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: store.LocalStore, name: str) -> Any:
            assert not fnmatch.fnmatch(Path(name).name, pattern), f"{name} was opened"
            return method(self, name)

        return call

    for name in ("exists", "size", "read", "input", "sha256", "local"):
        setattr(store.LocalStore, name, refusing(getattr(store.LocalStore, name)))


def in_ranks(world: int, action: Callable[[int], None]) -> None:
    """Does something as so many ranks of a process group: this process is rank 0, the others are forked here."""
    others: list[int] = []
    with tempfile.TemporaryDirectory() as meeting:

        def act(rank: int) -> None:
            dist.init_process_group("gloo", init_method=f"file://{meeting}/file", rank=rank, world_size=world)
            action(rank)
            dist.destroy_process_group()

        for rank in range(1, world):
            others.append(os.fork())
            if others[-1] == 0:
                try:
                    act(rank)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
        act(0)
        assert not any(os.waitpid(other, 0)[1] for other in others), "another rank failed"


def fit_rank(job: TrainingJob, record: Record) -> None:
    run_training(job, post=record.posts.append, stopped=lambda: False)


def search_rank(search: Search, record: Record, rank: int) -> None:
    """One of the ranks that train a search's trials, all of them one after the other; rank 0 asks the search."""

    kept: list[int] = []

    def report(outcome: Outcome) -> None:
        if rank == 0:
            record.posts.append({"trial": outcome.number, "epochs": len(outcome.curve)})
            kept[:] = search.update([outcome])

    while (work := from_rank_zero(search.next() if rank == 0 else None)) is not None:
        if rank == 0:
            search.start(work.kept)
        with contextlib.suppress(UserError):  # which was reported
            follow(work, report=report, goes_on=lambda epochs: bool(kept), stopped=lambda: False)
        if rank == 0:
            search.leave(work.kept)


def train_fused(request: dict[str, Any], record: Record) -> None:
    """The students of several settings as one group, to its end, on the data and the cache that stand in the folder.

    `members` are each one's changes, `drops` who is dropped after an epoch. The answer's `history` is the group's.
    """
    folder, source = Path(request["folder"]), Path(request["source"])
    jobs: dict[str, TrainingJob] = {}
    for name, changes in request["members"].items():
        settings = config(folder, source, changes)
        run, resources = open_run(settings.storage, settings.name), Resources(cpus=1, gpus=0, node_cpus=1)
        teacher = teachers.teacher_source(settings, run)
        asked = training_job.TrainingRequest("student", settings, run, resources, teacher)
        plan = training_job.training_plan(asked)
        jobs[name] = replace(training_job.training_job(asked, plan), folder=f"tune/trials/{name}")
    group = fused.FusedGroup(
        jobs, folder="tune/group", fingerprint=digest({name: job.fingerprint for name, job in jobs.items()}),
        post=lambda name, update: record.posts.append({"member": name, **update}),
    )  # fmt: skip
    drops: dict[str, list[str]] = request.get("drops", {})
    done = max(map(len, group.history.values()))
    group.drop([name for epoch in range(1, done + 1) for name in drops.get(str(epoch), [])])
    while not group.finished:
        found = group.epoch()
        assert found is not None
        done += 1
        group.drop(drops.get(str(done), []))
    record.history, record.failed = group.history, group.failed
    group.close()


def score_again(request: dict[str, Any], record: Record) -> None:
    """One task of teach once more, as Ray does when an answer was lost: the shard stands committed."""
    settings = config(Path(request["folder"]), Path(request["source"]), {})
    run = open_run(settings.storage, settings.name)
    plan, data = run.plan("cache"), run.require("data")
    assert plan is not None
    job = teach.teacher_job(settings, run, data, folder="teacher/cache", fingerprint=plan.fingerprint, dtype="float32")
    scoring.Scorer(job, threads=1).score_shard(data.shards("train")[0])


def child(action: Callable[[dict[str, Any], Record], None], request: dict[str, Any], answers: int) -> None:
    """Does one request under its fault and environment, and sends the answer."""
    record = Record()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda message: record.warnings.append(message.getMessage())
    logging.getLogger("raydistill").addHandler(handler)
    torch.set_num_threads(1)
    os.environ |= request.get("environment", {})
    os.environ[store.FAULT_VARIABLE] = request.get("fault", "")
    time.tzset()
    if "umask" in request:
        os.umask(request["umask"])
    if "file_bytes" in request:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
    if request.get("lost_folder"):
        with tempfile.TemporaryDirectory() as lost:
            os.chdir(lost)
    real_step, store.operations = store.step, 0

    def step(operation: str, path: str) -> None:
        record.operations.append(f"{operation} {Path(path).name}")
        real_step(operation, path)

    store.step = step
    answer: dict[str, Any] = {"error": None}
    try:
        action(request, record)
    except UserError as error:
        answer["error"] = str(error)
    except OSError as error:
        answer |= {"error": str(error), "errno": error.errno, "file": error.filename}
    except BaseException:
        answer |= {"error": traceback.format_exc(), "bug": True}
    answer |= vars(record)
    with os.fdopen(answers, "w") as pipe:
        json.dump(answer, pipe)


def forked(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a child; {"exit": status} alone when it was killed, by its fault or because it was too slow."""
    actions = {"run": run_stages, "score again": score_again, "fused": train_fused}
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        child(actions[request["do"]], request, writing)
        os._exit(0)
    os.close(writing)
    content, end = b"", time.monotonic() + request.get("deadline", 60)
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reading)
            return {"exit": "deadline"}
        chunk = os.read(reading, 1 << 16)
        if not chunk:
            break
        content += chunk
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"exit": status, **(json.loads(content) if content else {})}


def thread_names() -> set[str]:
    """Of this process; Arrow's allocator starts one and forks well."""
    return {Path(f"/proc/self/task/{thread}/comm").read_text().strip()[:6] for thread in os.listdir("/proc/self/task")}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine._import_deepspeed()
    for name in LATE_IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "input":
            pid = os.fork()
            if pid == 0:
                writes = {"classes": write_input, "language": write_language_input}
                writes[request.get("kind", "classes")](Path(request["source"]))
                os._exit(0)
            answer = {"exit": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}
        else:
            answer = forked(request)
        assert thread_names() <= {"python", "jemall"}, f"the forking process has threads: {thread_names()}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
