"""Where models are timed, and that what is timed is whole: on a GPU a call returns before it has computed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import LABELS, tiny

from raydistill.config.evaluate import Evaluate
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models.source import ModelSource
from raydistill.stages import timing
from raydistill.stages.cluster import Resources
from raydistill.stages.latency import Loaded, Timed, timed_device
from raydistill.stages.progress import Progress

CPUS, GPUS = Resources(cpus=4, gpus=0, node_cpus=4), Resources(cpus=4, gpus=2, node_cpus=4)
TEXTS = ["my card was charged twice", "where is my parcel?", "the app crashes on login"]


def asking(**settings: Any) -> Any:
    data = SimpleNamespace(max_length=16)
    return SimpleNamespace(evaluate=Evaluate.model_validate(settings), data=data)


def test_models_are_timed_where_the_cluster_computes_unless_devices_are_named():
    assert timing.timed_devices(asking(), CPUS) == ["cpu"]
    assert timing.timed_devices(asking(), GPUS) == ["cuda"]
    assert timing.timed_devices(asking(devices=["cpu", "cuda", "cpu"]), GPUS) == ["cpu", "cuda"]
    with pytest.raises(UserError, match="found cuda, and the cluster has no GPU"):
        timing.timed_devices(asking(devices=["cpu", "cuda"]), CPUS)


def test_a_file_for_cpus_is_timed_on_one():
    anywhere: Any = SimpleNamespace(cpu_only=False)
    on_cpus: Any = SimpleNamespace(cpu_only=True)
    assert timed_device((anywhere,), "cuda") == "cuda"
    assert timed_device((anywhere, on_cpus), "cuda") == "cpu"


@pytest.mark.parametrize(("devices", "gpus"), [(["cpu"], 0), (["cpu", "cuda"], 1)])
def test_the_task_takes_a_whole_node_and_a_gpu_where_one_is_timed(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], gpus: int
):
    import ray

    asked: dict[str, Any] = {}

    def remote(function: Any) -> Any:
        call = SimpleNamespace(remote=lambda *arguments: function(*arguments))
        return SimpleNamespace(options=lambda **options: asked.update(options) or call)

    for name, value in {"remote": remote, "wait": lambda running, timeout: (running, []), "get": dict}.items():
        monkeypatch.setattr(ray, name, value)
    monkeypatch.setattr(timing, "read_shard", lambda store, entry: SimpleNamespace(texts=TEXTS))
    monkeypatch.setattr(timing, "measure", lambda sources, texts, load, device: {"student": {"device": device}})
    run, data = (SimpleNamespace(home=lambda part: None), SimpleNamespace(shards=lambda split: [None]))
    config: Any = asking(devices=devices)
    found = timing.time_models({}, config, run, data, GPUS, Progress())  # type: ignore[arg-type]
    assert found == {device: {"student": {"device": device}} for device in devices}
    assert asked == {"num_cpus": 4, "num_gpus": gpus}


class Watched(torch.Tensor):
    """A tensor that notes what is done with it and with what comes of it."""

    calls: list[str] = []  # noqa: RUF012 - one list for all

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_clock_stops_when_the_answer_is_on_the_host(tiny_encoder: Path, tmp_path: Path):
    made = load_tokenizer(tiny_encoder, "student")
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: n for n, name in enumerate(LABELS)}}
    tiny("bert", vocab_size=len(made), num_hidden_layers=1, **names).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    part = Loaded(ModelSource("student", str(tmp_path)), torch.device("cpu"), "float32", 16)
    real = part.model.forward

    def forward(**inputs: torch.Tensor) -> Any:
        return SimpleNamespace(logits=real(**inputs).logits.as_subclass(Watched))

    part.model.forward = forward
    timed = Timed((part,), torch.device("cpu"), 16)
    with torch.inference_mode():
        Watched.calls.clear()
        assert type(timed.answer(TEXTS[0])) is int
        assert "argmax" in Watched.calls
        assert {"__int__", "item"} & set(Watched.calls)  # either waits for the device
        Watched.calls.clear()
        assert timed.rows_per_second(TEXTS) > 0
        assert Watched.calls.count("cpu") == Watched.calls.count("argmax") > 0
