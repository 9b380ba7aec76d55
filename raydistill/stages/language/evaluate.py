"""Stage evaluate of language models: teacher, student and control on test documents, which nothing else has read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from raydistill.config.cross_tokenizer import crosses_tokenizers
from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.data.token_shards import TokenShard, read_row_texts, read_token_shard
from raydistill.data.tokens import load_tokenizer
from raydistill.models.folders import model_identity
from raydistill.models.source import ModelSource
from raydistill.record.commit import Manifest, commit_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.report.language import compare_models, language_metrics, of_training, reliability, retention
from raydistill.report.over_seeds import over_seeds
from raydistill.stages.cluster import Resources, share_for_actors
from raydistill.stages.environment import device_name, environment
from raydistill.stages.evaluate import (
    base_models,
    fingerprints,
    forwards_per_row,
    hub_datasets,
    size_bytes,
    validation_curves,
)
from raydistill.stages.export import exported
from raydistill.stages.language.generation import Tokens, measure_generation
from raydistill.stages.language.harness import (
    TaskResults,
    harness_inputs,
    harness_results,
    read_results,
    write_results,
)
from raydistill.stages.language.measuring import FOLDER, MeasuringJob, OwnRows, read_measures
from raydistill.stages.language.prepare import texts_report
from raydistill.stages.language.student_rows import PART as STUDENT_ROWS
from raydistill.stages.language.student_rows import rows_report
from raydistill.stages.progress import Progress
from raydistill.stages.repetitions import Repetition, repeat, repeated, repeated_parts, repetitions
from raydistill.stages.report_files import commit_report, standing_report
from raydistill.stages.scoring import score
from raydistill.stages.student import train_student
from raydistill.stages.teachers import made_here, teacher_source
from raydistill.stages.training_job import TrainingRequest

PROMPT_TOKENS = 16  # of a text without a prompt, at most a quarter of it
TIMED_PROMPTS = 2  # that models go on with for their speed, where fewer samples are asked for


def evaluate_language(config: Config, run: Run, resources: Resources, progress: Progress) -> dict[str, Any]:
    """Writes report.json and report.html; the report. The control is trained first, when it is not there."""
    data, student = run.require("data"), run.require("student")
    control = None
    if config.evaluate.control:
        request = TrainingRequest("control", config, run, resources, teacher_source(config, run))
        control = train_student(request, progress)
        repeat("control", config, run, resources, progress)
    files = exported(config, run)
    plan = _plan(config, run, data, student, control, files)
    if run.begin("report", plan) is not None:
        progress.say("evaluate: complete")
        return standing_report(run)
    sources = {"teacher": teacher_source(config, run), "student": made_here("student", run)}
    sources |= {"control": made_here("control", run)} if config.evaluate.control else {}
    ours, sources = tuple(sources), sources | files
    share = share_for_actors(resources, actors=config.teacher.actors, cpus_per_actor=config.teacher.cpus_per_actor)
    again = {part: made_here(part, run) for part in repeated_parts(config)}
    job = MeasuringJob(
        tuple((sources | again).items()), run.home("data").root, run.store.root, FOLDER, plan.fingerprint,
        data.facts["vocabulary"], config.evaluate.dtype, config.teacher.tokens_per_batch, own_rows(config, run),
    )  # fmt: skip
    (scored,) = score([job], data, {FOLDER: ("test",)}, share, progress, "evaluate")
    commit_manifest(run.store, FOLDER, plan.fingerprint, scored.entries)
    sums = read_measures(run.store, scored.entries)
    speed = _time_models(sources, config, run, data, resources, progress)
    models = {
        name: {**language_metrics(sums, name), **speed[name], "size_bytes": size_bytes(source)}
        for name, source in sources.items()
    }
    bootstrap = {"resamples": config.evaluate.bootstrap, "seed": config.evaluate.seed}
    comparison = compare_models(sums, **bootstrap) | {"others": _others(files, models, sums, bootstrap)}
    report = _report(config, run, data, {name: models[name] for name in ours}, comparison, plan)
    report["reliability"] = {name: {"as_it_is": reliability(sums, name)} for name in ours}
    if config.evaluate.harness is not None:
        report["harness"] = _harness({name: sources[name] for name in ours}, config, run, plan, resources, progress)
    if again:
        report["seeds"] = over_seeds(
            [_training(sums, config.train.seed), *(_training(sums, one.seed, one) for one in repetitions(config))]
        )
    commit_report(run, plan.fingerprint, report)
    return report


def _others(
    files: Mapping[str, ModelSource], models: dict[str, Any], sums: dict[str, Any], bootstrap: dict[str, int]
) -> list[dict[str, Any]]:
    """The figures of exported files; what they write is not shown."""
    figures = {name: {key: value for key, value in models[name].items() if key != "samples"} for name in files}
    return [{"name": name, "kind": "export", **figures[name], **retention(sums, name, **bootstrap)} for name in files]


def _plan(
    config: Config,
    run: Run,
    data: Manifest,
    student: Manifest,
    control: Manifest | None,
    files: Mapping[str, ModelSource],
) -> Plan:
    """Everything that the report depends on."""
    inputs = {
        "data": data.fingerprint, "student": student.fingerprint,
        "control": control.fingerprint if control else None,
        "teacher": model_identity(teacher_source(config, run).folder()),
        **{f"evaluate.{name}": value for name, value in identity(config.evaluate).items()},
        **(harness_inputs(config.evaluate.harness) if config.evaluate.harness else {}),
    }  # fmt: skip
    again = {part: manifest.fingerprint for part, manifest in repeated(config, run).items()}
    inputs |= {"compared": {name: source.identity() for name, source in files.items()}} if files else {}
    return Plan("report", inputs | ({"seeds": again} if again else {}))


def _training(sums: dict[str, Any], seed: int, again: Repetition | None = None) -> dict[str, Any]:
    """What the training with a seed reached: the run's first one, or a repetition."""
    names = {role: again.part(role) if again else role for role in ("student", "control")}
    return {"seed": seed, **of_training(sums, names["student"], names["control"])}


def _time_models(
    sources: dict[str, ModelSource], config: Config, run: Run, data: Manifest, resources: Resources, progress: Progress
) -> dict[str, dict[str, Any]]:
    settings = config.evaluate
    progress.say(f"evaluate: timing {settings.latency_requests} rows and {settings.samples} answers of each model")
    return on_a_node(measure_generation, resources, progress, sources, **generation_arguments(config, run, data))


def _harness(
    sources: dict[str, ModelSource], config: Config, run: Run, plan: Plan, resources: Resources, progress: Progress
) -> dict[str, TaskResults]:
    """What every model reaches in the tasks that are asked for; a model's results that stand for this plan are kept."""
    asked = config.evaluate.harness
    assert asked is not None
    found: dict[str, TaskResults] = {}
    for name, source in sources.items():
        standing = read_results(run.store, name, plan.fingerprint)
        if standing is None:
            progress.say(f"evaluate: {', '.join(asked.tasks)} for the {name}")
            standing = on_a_node(harness_results, resources, progress, source, asked, config.evaluate.dtype)
            write_results(run.store, name, plan.fingerprint, standing)
        found[name] = standing
    return found


def on_a_node(function: Any, resources: Resources, progress: Progress, *arguments: Any, **options: Any) -> Any:
    """What a function gives in a task that takes a whole node, so that nothing else of the run computes beside it."""
    import ray

    progress.check()
    remote: Any = ray.remote
    task = remote(function)
    running = task.options(num_cpus=resources.node_cpus, num_gpus=1 if resources.gpus else 0).remote(
        *arguments, **options
    )
    while not ray.wait([running], timeout=0.5)[0]:
        progress.check()
    return ray.get(running)


def generation_arguments(config: Config, run: Run, data: Manifest) -> dict[str, Any]:
    """What `measure_generation` is asked to do, with rows of test."""
    settings, shard = config.evaluate, read_token_shard(run.home("data"), data.shards("test")[0])
    rows, count = range(min(len(shard), settings.latency_requests)), max(settings.samples, TIMED_PROMPTS)
    texts = {"teacher": Tokens([shard.row(n).tolist() for n in rows], [p for p, _ in _prompts(shard, count)])}
    if (own := own_rows(config, run)) is not None:
        ours = own.shard(shard.name).tokens
        texts["student"] = Tokens([ours.row(n).tolist() for n in rows], _own_prompts(run, data, shard, count))
    return {
        "texts": texts,
        "requests": settings.latency_requests,
        "threads": settings.threads,
        "new_tokens": settings.sample_tokens,
        "samples": settings.samples,
        "dtype": settings.dtype,
    }


def _own_prompts(run: Run, data: Manifest, shard: TokenShard, count: int) -> list[list[int]]:
    """The texts of the same prompts in the tokens of a student with a tokenizer of its own."""
    tokenizer = load_tokenizer(made_here("student", run).folder(), "the student", pads=False)
    texts = read_row_texts(run.home("data"), data.shards("test")[0])
    begin, prompts = ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), list[list[int]]()
    for number, cut in _cuts(shard, count):
        text = texts[number][0]
        written = text.data[: text.ends_L[cut - 1]].decode(errors="ignore")
        prompts.append((begin + tokenizer(written, add_special_tokens=False)["input_ids"]) or [0])
    return prompts


def _prompts(shard: TokenShard, count: int) -> list[tuple[list[int], list[int]]]:
    """Prompts of the first documents, and what stands after each."""
    rows = [(shard.row(number).tolist(), cut) for number, cut in _cuts(shard, count)]
    return [(tokens[:cut], tokens[cut:]) for tokens, cut in rows]


def _cuts(shard: TokenShard, count: int) -> list[tuple[int, int]]:
    """Rows with which the first documents begin, and the tokens of their prompts: up to the first one that is learnt,
    or a text's begin.
    """
    found, seen = [], set[int]()
    for number, document in enumerate(shard.documents_R.tolist()):
        if document in seen or len(found) == count:
            continue
        seen.add(document)
        tokens, first = shard.row(number).tolist(), int(shard.positions(number)[0]) + 1
        cut = first if first > 1 else max(1, min(PROMPT_TOKENS, len(tokens) // 4))
        found.append((number, cut))
    return found


def _report(
    config: Config, run: Run, data: Manifest, models: dict[str, Any], comparison: dict[str, Any], plan: Plan
) -> dict[str, Any]:
    """All figures, under the names of the design."""
    cache, counts = run.require("cache"), data.facts["counts"]["test"]
    own = run.require(STUDENT_ROWS) if crosses_tokenizers(config) else None
    return {
        "schema": 1,
        "name": config.name,
        "task": config.task,
        "created": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "test_rows": counts["documents"],
        "test_positions": counts["learnt"],
        **({"test_positions": own.facts["counts"]["test"]["bytes"], "unit": "byte"} if own else {}),
        "samples": _samples(config, run, data, models),
        **models,
        **comparison,
        "agreement": models["student"].get("agreement"),
        "curves": validation_curves(config, run),
        "cache": {name: cache.facts[name] for name in ("codec", "promise", "positions", "bytes_per_position")},
        "base_models": base_models(config),
        "hub_datasets": hub_datasets(config),
        "teacher_forwards_per_row": forwards_per_row(data, cache),
        "measured": {
            "latency_requests": config.evaluate.latency_requests,
            "threads": config.evaluate.threads,
            "dtype": config.evaluate.dtype,
            "device": device_name(),
        },
        "data_report": texts_report(data.facts) + (rows_report(own.facts) if own else []),
        "fingerprints": fingerprints(run, plan),
        "environment": environment(),
        "config": config.model_dump(mode="json"),
    }


def own_rows(config: Config, run: Run) -> OwnRows | None:
    """The test rows of a student with another tokenizer than the teacher's."""
    if not crosses_tokenizers(config):
        return None
    manifest = run.require(STUDENT_ROWS)
    return OwnRows(run.store.root, tuple(manifest.shards("test")), manifest.facts["vocabulary"])


def _samples(config: Config, run: Run, data: Manifest, models: dict[str, Any]) -> list[dict[str, str]]:
    """Prompts with what test and every model go on with; the models' own lists are taken out."""
    tokenizer = load_tokenizer(teacher_source(config, run).folder(), "the teacher", pads=False)
    shard = read_token_shard(run.home("data"), data.shards("test")[0])
    texts = {name: found.pop("samples") for name, found in models.items()}
    samples = []
    for number, (prompt, rest) in enumerate(_prompts(shard, config.evaluate.samples)):
        sample = {"prompt": tokenizer.decode(prompt, skip_special_tokens=True)}
        sample["test"] = tokenizer.decode(rest[: config.evaluate.sample_tokens], skip_special_tokens=True)
        samples.append(sample | {name: of_model[number] for name, of_model in texts.items()})
    return samples
