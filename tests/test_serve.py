"""`raydistill serve`: its interface without Ray, and the whole of it on Ray Serve for once.

Shapes: N texts, K classes.
"""

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient
from serving_process import ask, head_node, left, marked, metric, serving

from raydistill import cli
from raydistill.models.loading import load_classifier
from raydistill.serving import serve
from raydistill.serving.answers import Asked, open_model
from raydistill.serving.api import Limits, Reply, make_api
from raydistill.serving.served import find_served
from raydistill.tickets import CATEGORIES

LABELS = sorted(CATEGORIES)
TEXTS = ["my card was charged twice", "where is my parcel?", "the app crashes on login", "please close my account"]
LIMITS = Limits(texts=3, characters=50)


class Busy(Exception):
    pass


def shares_of(folder: Path, text: str) -> dict[str, float]:
    """Probabilities by transformers alone."""
    from transformers import AutoTokenizer

    model, made = load_classifier("model", folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        shares = model(**made(text, return_tensors="pt")).logits[0].double().softmax(0)
    return dict(zip(LABELS, shares.tolist(), strict=True))


@pytest.fixture(scope="module")
def client(tiny_classifier: Path) -> Iterator[TestClient]:
    """The interface over a model in this process; it is busy for one text."""
    served = find_served(str(tiny_classifier))
    answer = open_model(served, Asked())

    async def ask(texts: list[str], asked: Asked) -> Reply:
        await asyncio.sleep(0)
        if texts == ["busy"]:
            raise Busy
        return Reply(answer(texts, [asked] * len(texts)), len(texts) or None)

    with TestClient(make_api(served, LIMITS, ask, (Busy,)), raise_server_exceptions=False) as made:
        yield made


def test_one_text_and_many(client: TestClient, tiny_classifier: Path):
    expected = [shares_of(tiny_classifier, text) for text in TEXTS[:3]]
    one = client.post("/predict", json={"text": f"  {TEXTS[0]}\n"}).json()
    assert one["label"] == max(expected[0], key=expected[0].__getitem__)
    assert one["probability"] == pytest.approx(max(expected[0].values()), abs=2e-6)
    many = client.post("/predict", json={"texts": TEXTS[:3], "all": True, "top": 2}).json()["answers"]
    for found, shares in zip(many, expected, strict=True):
        assert found["all"] == pytest.approx(shares, abs=2e-6)
        assert [row["label"] for row in found["top"]] == sorted(LABELS, key=lambda name: -shares[name])[:2]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "give either text or texts"),
        ({"text": "a", "texts": ["b"]}, "give either text or texts"),
        ({"text": "  "}, "text: is empty"),
        ({"texts": ["a", ""]}, "texts[1]: is empty"),
        ({"texts": []}, "texts: found 0; a request may have 1 to 3"),
        ({"texts": ["a"] * 4}, "texts: found 4; a request may have 1 to 3"),
        ({"text": "x" * 51}, "text: found 51 characters; a text may have 50"),
        ({"text": 7}, "text: input should be a valid string"),
        ({"texts": ["a", 7]}, "texts.1: input should be a valid string"),
        ({"text": "a", "txt": "b"}, "txt: extra inputs are not permitted"),
        ({"text": "a", "top": -1}, "top: input should be greater than or equal to 0"),
        (b'{"text": "\\ud800"}', "text: is not Unicode text (half of a pair of surrogates)"),
        (b"{broken", "the body is json decode error"),
        (b"", "the body is field required"),
    ],
)
def test_what_is_not_answered(client: TestClient, body: Any, error: str):
    given = (
        {"content": body, "headers": {"content-type": "application/json"}}
        if isinstance(body, bytes)
        else {"json": body}
    )
    answer = client.post("/predict", **given)
    assert (answer.status_code, answer.json()) == (422, {"error": error})


def test_too_much_at_once(client: TestClient):
    assert client.post("/predict", json={"text": "busy"}).status_code == 503
    assert client.post("/predict", json={"text": "busy"}).json() == {"error": "too many requests wait; ask again later"}
    answer = client.post("/predict", content=b" " * 10_000, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()) == (413, {"error": "the body must say its length, at most 5896 bytes"})
    endless = client.post("/predict", content=iter([b"{}"]), headers={"content-type": "application/json"})
    assert endless.status_code == 413  # without a length it could be of any


def test_health_metrics_and_the_page(client: TestClient):
    health = client.get("/health").json()
    assert (health["status"], health["task"], health["labels"]) == ("ok", "classification", LABELS)
    before = client.get("/metrics").text
    for _ in range(2):
        client.post("/predict", json={"texts": TEXTS[:2]})
    client.post("/predict", json={"text": ""})
    after = client.get("/metrics").text
    for name, more in (
        ('raydistill_requests_total{status="200"}', 2), ('raydistill_requests_total{status="422"}', 1),
        ("raydistill_texts_total", 4), ("raydistill_request_seconds_count", 3), ("raydistill_batch_texts_count", 2),
        ('raydistill_batch_texts_bucket{le="1.0"}', 0), ('raydistill_batch_texts_bucket{le="2.0"}', 2),
    ):  # fmt: skip
        assert metric(after, name) - metric(before, name) == more, name
    assert "/predict" in client.get("/openapi.json").json()["paths"]
    assert client.get("/docs").status_code == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "MODEL: ./nowhere: is no folder here and the hub gives none"),
        (["MODEL", "--port", "PORT"], "--host, --port: 127.0.0.1:PORT: Address already in use. Give another"),
        (["MODEL", "--max-tokens", "4"], "--max-tokens: is for causal_lm, and the model is for classification"),
    ],
)
def test_what_is_refused(
    tiny_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {"MODEL": str(tiny_classifier), "PORT": str(taken.getsockname()[1])}
        assert cli._main(["serve", *(names.get(name, name) for name in arguments)]) == 2
    error = capsys.readouterr().err
    assert message.replace("PORT", names["PORT"]) in error
    assert error.count("\n") == 1


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert cli._main(["serve", "anything"]) == 2
    assert "serve: needs uvicorn. Install it: pip install 'raydistill[serve]'" in capsys.readouterr().err


def answers_are_the_models(url: str, folder: Path, count: int = 32) -> None:
    """Many requests at once get the probabilities that transformers gives each text alone."""
    expected = {text: shares_of(folder, text) for text in TEXTS}
    texts = (TEXTS * count)[:count]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda text: ask(f"{url}/predict", {"text": text, "all": True}), texts))
    assert {status for status, _ in found} == {200}
    for text, (_, answer) in zip(texts, found, strict=True):
        assert answer["all"] == pytest.approx(expected[text], abs=1e-5)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("replicas", [1, 2])
def test_it_answers_many_at_once_and_ends_clean(tiny_classifier: Path, replicas: int):
    with serving(tiny_classifier, "--batch-wait-ms", "50", "--replicas", str(replicas)) as one:
        assert ask(one.url("/health"))[0] == 200, one.said
        named = [" ".join(process.cmdline()) for process in marked(one.mark)]
        assert sum("ServeReplica:raydistill:model" in name for name in named) == replicas
        answers_are_the_models(one.url(""), tiny_classifier)
        assert ask(one.url("/predict"), {"text": ""}) == (422, {"error": "text: is empty"})
        numbers = ask(one.url("/metrics"))[1]
        assert metric(numbers, "raydistill_texts_total") == 32
        assert metric(numbers, "raydistill_batch_texts_sum") == 32  # each text in one batch
        assert metric(numbers, "raydistill_batch_texts_count") < 32  # and some of them together
        one.end()
    assert not left(one.mark)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_on_a_running_cluster_one_application_ends_and_the_other_goes_on(tiny_classifier: Path):
    with head_node() as (address, environment, node):
        asked = ("--address", address)
        with serving(tiny_classifier, *asked, "--name", "first", "--route", "/one", **environment) as first:
            answers_are_the_models(first.url("/one"), tiny_classifier)
            second_options = (*asked, "--name", "second", "--route", "/two")
            with serving(tiny_classifier, *second_options, port=first.port, **environment) as second:
                answers_are_the_models(second.url("/two"), tiny_classifier)
                first.end()
                assert ask(second.url("/two/health"))[0] == 200
                answers_are_the_models(second.url("/two"), tiny_classifier, 8)
                assert ask(second.url("/one/health"))[0] == 404
                second.end()
        assert node.poll() is None  # the cluster is not theirs to end
