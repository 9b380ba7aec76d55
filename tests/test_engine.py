"""The engine against a plain PyTorch loop, at every ZeRO stage, with one rank and with two.

DeepSpeed takes seconds to import, so each rank is one process that runs all cases (the end of this file) and the tests
read what it saved.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raydistill import adapters
from raydistill.config.student import Lora
from raydistill.config.training import Training
from raydistill.engine import Engine, _import_deepspeed, deepspeed_config
from raydistill.engine_base import parameter_groups

STAGES = (0, 1, 2, 3)
BATCH_ROWS = (7, 3, 7, 7)  # with two ranks and three micro-batches each, a batch of 3 leaves ranks without rows
STOP = 2
CLASSES = 5  # a size that two ranks do not divide
DEADLINE_SECONDS = 240
Trace = dict[str, Any]


def build() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def batches() -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """The global batches: rows of different lengths, and their labels."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for rows in BATCH_ROWS:
        ids = torch.randint(1, 61, (rows, 9), generator=generator)
        lengths = torch.randint(3, 10, (rows, 1), generator=generator)
        mask = (torch.arange(9) < lengths).long()
        made.append(({"input_ids": ids * mask, "attention_mask": mask}, ids[:, 0] % CLASSES))
    return made


def learning_rate(step: int) -> float:
    # Small, because Adam makes steps of this size out of whatever rounding leaves of a gradient near zero.
    return 0.002 * (1 - step / len(BATCH_ROWS))


def settings(stage: int, accumulation: int = 1, offload: bool = False) -> Training:
    return Training(
        weight_decay=0.1, clip=0.4, accumulation=accumulation,
        deepspeed={"zero_stage": stage, "offload_optimizer": offload},
    )  # fmt: skip


def plain_loop() -> Trace:
    """The oracle: one process, whole batches, PyTorch's own AdamW and clipping."""
    model = build().train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], foreach=False
    )
    losses, norms = [], []
    for step, (inputs, labels) in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.4)))
        optimizer.step()
        losses.append(loss.item())
    moments = {
        f"{m}.{n}": optimizer.state[p][m] for n, p in model.named_parameters() for m in ("exp_avg", "exp_avg_sq")
    }
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters()), "moments": moments}


def thaws() -> dict[str, int]:
    """The head trains from step 0, the last layer from step 1, the first from step 2, the embeddings from step 3."""
    steps = {"bert.encoder.layer.1.": 1, "bert.encoder.layer.0.": 2, "bert.embeddings.": 3}
    return {
        name: next((step for start, step in steps.items() if name.startswith(start)), 0)
        for name, _ in build().named_parameters()
    }


def plain_thawing() -> Trace:
    """The oracle of thawing: every parameter has an AdamW of its own, which is made when it begins to train."""
    model, begins = build().train(), thaws()
    optimizers: dict[str, torch.optim.Optimizer] = {}
    losses, norms = [], []
    for step, (inputs, labels) in enumerate(batches()):
        trained = {name: p for name, p in model.named_parameters() if begins[name] <= step}
        for name in trained.keys() - optimizers.keys():
            decay = 0.1 if trained[name].ndim > 1 else 0.0
            optimizers[name] = torch.optim.AdamW([trained[name]], weight_decay=decay, foreach=False)
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
        for parameter, gradient in zip(
            trained.values(), torch.autograd.grad(loss, list(trained.values())), strict=True
        ):
            parameter.grad = gradient
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), 0.4)))
        for name in trained:
            optimizers[name].param_groups[0]["lr"] = learning_rate(step)
            optimizers[name].step()
        losses.append(loss.item())
    moments = {
        f"{m}.{n}": optimizers[n].state[p][m] for n, p in model.named_parameters() for m in ("exp_avg", "exp_avg_sq")
    }
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters()), "moments": moments}


@pytest.fixture(scope="module")
def plain() -> Trace:
    return plain_loop()


@pytest.fixture(scope="module")
def thawing() -> Trace:
    return plain_thawing()


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    """What every case left behind, by name."""
    folder = tmp_path_factory.mktemp("engine")
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def comparable(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the keys' biases: softmax cannot see them, and Adam blows up what rounding leaves of their gradient."""
    return {name: value.detach() for name, value in weights.items() if not name.endswith("key.bias")}


def assert_same(found: Trace, expected: Trace, *, first_step: int = 0, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert found["losses"] == pytest.approx(expected["losses"][first_step:], rel=rtol)
    assert found["norms"] == pytest.approx(expected["norms"][first_step:], rel=10 * rtol)
    for kind in ("weights", "moments"):
        theirs, ours = comparable(expected[kind]), comparable(found[kind])
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_oracle_clips_some_steps_and_not_others(plain: Trace):
    assert min(plain["norms"]) < 0.4 < max(plain["norms"])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_ranks_accumulation_and_stage_do_not_change_a_step(
    traces: dict[str, Trace], plain: Trace, world: int, stage: int, accumulation: int
):
    assert_same(traces[f"world{world}-stage{stage}-accumulation{accumulation}"], plain)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_resumed_equals_uninterrupted(traces: dict[str, Trace], world: int, stage: int):
    # Before the mend, stages 1 and 2 could not be saved at all: DeepSpeed links the Adam state of all parameter groups
    # after the first group's step, when the second has none yet ("exp_avg not found in optimizer state fragment").
    whole, resumed = (traces[f"world{world}-stage{stage}-{kind}"] for kind in ("accumulation1", "resumed"))
    assert resumed["losses"] == whole["losses"][STOP:]
    for kind in ("weights", "moments"):
        assert all(torch.equal(resumed[kind][name], whole[kind][name]) for name in whole[kind])


@pytest.mark.parametrize("name", ["world1-stage0-from-world2-stage1", "world2-stage1-from-world1-stage0"])
def test_a_checkpoint_does_not_depend_on_ranks_and_stage(traces: dict[str, Trace], plain: Trace, name: str):
    assert_same(traces[name], plain, first_step=STOP)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_offloaded_optimizer_changes_nothing(traces: dict[str, Trace], plain: Trace, stage: int):
    assert_same(traces[f"world1-stage{stage}-offload"], plain)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_keeps_float32_weights_and_stays_near(traces: dict[str, Trace], plain: Trace, stage: int):
    found = traces[f"world1-stage{stage}-bf16"]
    assert found["losses"] == pytest.approx(plain["losses"][:STOP], rel=0.05)
    assert found["losses"] != plain["losses"][:STOP]
    assert {value.dtype for value in found["weights"].values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
def test_tied_and_unused_parameters_and_buffers_are_saved(traces: dict[str, Trace], stage: int):
    # Before the mend, stage 0 raised KeyError for a parameter that no forward pass had used.
    found = traces[f"world1-stage{stage}-tied"]
    assert set(found["weights"]) == {"embedding.weight", "head.weight", "unused.weight", "unused.bias", "offset"}
    assert torch.equal(found["weights"]["embedding.weight"], found["weights"]["head.weight"])
    assert found["weights"]["offset"].tolist() == [1, 2, 3]
    assert not found["moments"]["exp_avg.unused.weight"].any()
    assert found["moments"]["exp_avg.embedding.weight"].any()


@pytest.mark.parametrize("stage", STAGES)
def test_state_can_be_saved_before_the_first_step(traces: dict[str, Trace], stage: int):
    found = traces[f"world1-stage{stage}-unstepped"]
    assert all(torch.equal(found["weights"][name], value) for name, value in build().state_dict().items())
    assert not any(value.any() for value in found["moments"].values())


def test_evaluation_has_no_gradient_and_ends_in_training(traces: dict[str, Trace]):
    assert traces["world1-stage0-evaluation"] == {"inside": [False, False], "after": [True, True]}


@pytest.mark.parametrize(("stage", "clip"), [(0, 0.0), (1, 0.4), (2, 0.4), (3, 0.4)])
def test_deepspeed_is_told_the_settings(stage: int, clip: float):
    config = deepspeed_config(settings(stage, accumulation=3, offload=stage > 0), "bf16")
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == clip
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert config["zero_optimization"]["stage"] == stage
    assert ("offload_optimizer" in config["zero_optimization"]) == (stage > 0)
    assert "torch_autocast" not in deepspeed_config(settings(stage), "fp32")
    assert deepspeed_config(settings(stage), "fp16")["gradient_clipping"] == 0.4


def test_weight_decay_is_for_matrices_and_each_trained_parameter_is_in_one_group():
    model = build()
    model.classifier.weight.requires_grad = False  # type: ignore[union-attr]
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    grouped = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_what_adapters_leave_frozen_is_untouched_and_in_no_checkpoint(traces: dict[str, Trace], world: int, stage: int):
    found = traces[f"world{world}-stage{stage}-adapters"]
    start = adapted()
    assert set(found["frozen"]) == set(adapters.frozen_parameters(start))
    assert all(
        torch.equal(found["frozen"][name], value) for name, value in start.named_parameters() if name in found["frozen"]
    )
    trained = {name for name, parameter in start.named_parameters() if parameter.requires_grad}
    assert set(found["weights"]) == trained
    assert set(found["moments"]) == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in trained}
    assert all(
        not torch.equal(found["weights"][name], start.get_parameter(name)) for name in trained if "lora_B" in name
    )
    plain = traces["world1-stage0-adapters"]
    for kind in ("weights", "moments"):
        for name, value in plain[kind].items():
            torch.testing.assert_close(found[kind][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_a_parameter_that_thaws_is_untouched_until_then_and_trained_like_a_new_one(
    traces: dict[str, Trace], thawing: Trace, world: int, stage: int
):
    found = traces[f"world{world}-stage{stage}-thawing"]
    assert_same(found, thawing)
    before, start = traces[f"world{world}-stage{stage}-thawing-stopped"], build().state_dict()
    for name, step in thaws().items():
        if not name.endswith("key.bias"):
            assert torch.equal(before["weights"][name], start[name]) == (step >= STOP), name
        assert before["moments"][f"exp_avg_sq.{name}"].any() == (step < STOP), name
    # Nothing goes back through what is frozen, nor through what only feeds it: (embeddings, layer 0, layer 1).
    assert found["outputs_need_gradients"] == [
        (False, False, False), (False, False, True), (False, True, True), (True, True, True),
    ]  # fmt: skip
    assert [count < found["trained"][-1] for count in found["trained"]] == [True, True, True, False]
    assert found["trained"][-1] == sum(parameter.numel() for parameter in build().parameters())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_a_training_that_stopped_before_all_had_thawed_goes_on_to_the_same(
    traces: dict[str, Trace], world: int, stage: int
):
    whole, resumed = (traces[f"world{world}-stage{stage}-thawing{kind}"] for kind in ("", "-resumed"))
    assert resumed["losses"] == whole["losses"][STOP:]
    for kind in ("weights", "moments"):
        assert all(torch.equal(resumed[kind][name], whole[kind][name]) for name in whole[kind])


@pytest.mark.parametrize("kind", ["stage1-thawing-offload", "stage2-thawing-offload", "stage0-thawing-accumulation3"])
def test_offload_and_accumulation_change_nothing_where_parameters_thaw(
    traces: dict[str, Trace], thawing: Trace, kind: str
):
    assert_same(traces[f"world1-{kind}"], thawing)


# What each rank runs.


def adapted() -> Any:
    return adapters.add_adapters(build(), Lora(rank=2), seed=0).get_base_model()


def watch_outputs(model: Any) -> dict[str, bool]:
    """Whether the outputs of the embeddings and of the layers take part in the backward, by the last forward."""
    needs: dict[str, bool] = {}

    def note(name: str, output: Any) -> None:
        needs[name] = (output[0] if isinstance(output, tuple) else output).requires_grad

    for name, module in {
        "embeddings": model.bert.embeddings,
        **dict(model.bert.encoder.layer.named_children()),
    }.items():
        needs[name] = False
        module.register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
    return needs


class Tied(torch.nn.Module):
    """An output layer that shares the embedding's weights, a layer that nothing uses, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(CLASSES, 4)
        self.unused = torch.nn.Linear(4, 3)
        self.head = torch.nn.Linear(4, CLASSES, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.tensor([1, 2, 3]))

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embedding(input_ids).mean(dim=1)))


class Rank:
    """One process: runs cases and saves their traces (rank 0)."""

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
        self.dist, self.rank, self.world, self.folder = dist, rank, world, folder

    def save(self, name: str, trace: Trace) -> None:
        if self.rank == 0:
            staged = self.folder / f"{name}.part-{self.world}"
            torch.save(trace, staged)
            staged.replace(self.folder / f"{name}.pt")

    def wait_for(self, name: str) -> Trace:
        path = self.folder / f"{name}.pt"
        deadline = time.monotonic() + DEADLINE_SECONDS / 2
        while not path.exists():
            assert time.monotonic() < deadline, f"{path.name} did not come"
            time.sleep(0.1)
        return torch.load(path)

    def case(
        self,
        name: str,
        training: Training,
        *,
        precision: str = "fp32",
        start: Trace | None = None,
        steps: int = len(BATCH_ROWS),
        thaws: dict[str, int] | None = None,
    ) -> None:
        """Trains from the first step, or goes on from a saved state after STOP steps, and saves the trace."""
        model = build()
        if start:
            model.load_state_dict(start["weights"])
        engine = Engine(model.train(), training, precision=precision, device=torch.device("cpu"), thaws=thaws)
        if start:
            engine.restore_optimizer(start["moments"], STOP)
        losses, norms, trained, needed = [], [], [], []
        needs = watch_outputs(model)
        for step in range(STOP if start else 0, steps):
            if step == STOP and not start:
                self.save(f"world{self.world}-{name}-stopped", self.state(engine))
            losses.append(self.step(engine, training.accumulation, step))
            norms.append(engine.grad_norm)
            trained.append(engine.trained_parameters)
            needed.append(tuple(needs.values()))
        told = {"losses": losses, "norms": norms, "trained": trained, "outputs_need_gradients": needed}
        self.save(f"world{self.world}-{name}", {**told, **self.state(engine)})
        engine.close()

    def state(self, engine: Engine) -> Trace:
        """What a checkpoint holds."""
        return {"weights": engine.weights(), "moments": engine.optimizer_state()}

    def step(self, engine: Any, accumulation: int, step: int) -> float:
        """One optimiser step over this rank's micro-batches; the global batch's mean loss."""
        inputs, labels = batches()[step]
        engine.begin_step(step)
        total = torch.zeros(())
        for micro in range(accumulation):
            parts = torch.arange(len(labels)).tensor_split(self.world * accumulation)
            rows = parts[self.rank * accumulation + micro]
            logits = engine.logits({name: value[rows if len(rows) else [0]] for name, value in inputs.items()})
            loss = (
                torch.nn.functional.cross_entropy(logits, labels[rows], reduction="sum")
                if len(rows)
                else 0 * logits.sum()
            )
            engine.backward(loss, len(labels))
            total += loss.detach()
        engine.step(learning_rate(step))
        self.dist.all_reduce(total)
        return float(total) / len(labels)

    def common(self) -> None:
        for stage in STAGES:
            for accumulation in (1, 3):
                self.case(f"stage{stage}-accumulation{accumulation}", settings(stage, accumulation))
            stopped = self.wait_for(f"world{self.world}-stage{stage}-accumulation1-stopped")
            self.case(f"stage{stage}-resumed", settings(stage), start=stopped)
            self.adapters(stage)
            self.case(f"stage{stage}-thawing", settings(stage), thaws=thaws())
            stopped = self.wait_for(f"world{self.world}-stage{stage}-thawing-stopped")
            self.case(f"stage{stage}-thawing-resumed", settings(stage), start=stopped, thaws=thaws())

    def one_rank(self) -> None:
        for stage in STAGES:
            self.case(f"stage{stage}-bf16", settings(stage), precision="bf16", steps=STOP)
            self.case(f"stage{stage}-unstepped", settings(stage), steps=0)
            self.tied(stage)
            if stage:
                self.case(f"stage{stage}-offload", settings(stage, offload=True))
        for stage in (1, 2):
            self.case(f"stage{stage}-thawing-offload", settings(stage, offload=True), thaws=thaws())
        self.case("stage0-thawing-accumulation3", settings(0, accumulation=3), thaws=thaws())
        self.evaluation()
        stopped = self.wait_for("world2-stage1-accumulation1-stopped")
        self.case("stage0-from-world2-stage1", settings(0), start=stopped)

    def two_ranks(self) -> None:
        stopped = self.wait_for("world1-stage0-accumulation1-stopped")
        self.case("stage1-from-world1-stage0", settings(1), start=stopped)

    def tied(self, stage: int) -> None:
        engine = Engine(Tied(), settings(stage), precision="fp32", device=torch.device("cpu"))
        for _ in range(2):
            engine.backward(engine.logits({"input_ids": torch.tensor([[0, 1], [2, 4]])})[:, 0].sum(), 2)
            engine.step(0.01)
        self.save(f"world1-stage{stage}-tied", self.state(engine))
        engine.close()

    def adapters(self, stage: int) -> None:
        import deepspeed

        model = adapted().train()
        frozen = adapters.frozen_parameters(model)
        engine = Engine(model, settings(stage), precision="fp32", device=torch.device("cpu"), frozen=frozen)
        for step in range(STOP):
            self.step(engine, 1, step)
        held = [parameter for name, parameter in model.named_parameters() if name in frozen]
        with deepspeed.zero.GatheredParameters(held, enabled=stage == 3):
            kept = {name: p.detach().clone() for name, p in model.named_parameters() if name in frozen}
        self.save(f"world{self.world}-stage{stage}-adapters", {"frozen": kept, **self.state(engine)})
        engine.close()

    def evaluation(self) -> None:
        engine = Engine(build().train(), settings(0), precision="fp32", device=torch.device("cpu"))
        inputs = batches()[0][0]
        with engine.evaluation():
            inside = [engine.module.training, engine.logits(inputs).requires_grad]
        after = [engine.module.training, engine.logits(inputs).requires_grad]
        self.save("world1-stage0-evaluation", {"inside": inside, "after": after})
        engine.close()


def run_rank(rank: int, world: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    process = Rank(rank, world, folder)
    process.common()
    process.one_rank() if world == 1 else process.two_ranks()
    process.dist.destroy_process_group()


def main(folder: Path) -> None:
    """Imports once, then forks a process of one rank and two of two ranks, which run at the same time."""
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    _import_deepspeed()
    build()
    start = multiprocessing.get_context("fork").Process
    ranks = [start(target=run_rank, args=(rank, world, folder)) for world in (1, 2) for rank in range(world)]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
        time.sleep(0.05)
    for process in ranks:
        process.terminate() if process.is_alive() else None
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
