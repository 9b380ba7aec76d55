"""A finished model behind HTTP, by Ray Serve: one deployment takes requests, the other computes them in batches."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from raydistill.config.run import Cluster
from raydistill.errors import UserError, first_line
from raydistill.serving.answers import AS_IT_IS, Asked, check_asked, open_model
from raydistill.serving.served import Served, find_served
from raydistill.stages.cluster import Resources, connect
from raydistill.stages.progress import Progress

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
POLL_SECONDS = 0.2
STATUS_SECONDS = 5.0
WAITING_BATCHES = 16  # requests that wait for a replica, as a multiple of what one batch takes; more get a 503
MODEL, API = "model", "api"  # names of the deployments


@dataclass(frozen=True)
class Service:
    """What `raydistill serve` was asked for."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None  # of a running Ray cluster; absent: a new local one
    name: str = "raydistill"  # of the application
    route: str = "/"
    replicas: int = 1
    threads: int = 1  # of each
    max_batch: int = 64
    batch_wait_ms: float = 2.0
    max_characters: int = 20_000
    asked: Asked = AS_IT_IS

    @property
    def is_alone(self) -> bool:
        """Whether it has a cluster of its own, which ends with it; under `ray job submit` it uses the job's."""
        return self.address is None and not os.environ.get("RAY_ADDRESS")


def serve_model(service: Service, progress: Progress) -> None:
    """Answers requests until SIGINT or SIGTERM, then ends all that it started.

    Raises UserError for what the user can mend, before a cluster is started where it can be known then.
    """
    check_serving()
    served = find_served(service.model)
    check_asked(served, service.asked)
    open_model(served, service.asked)(["ready?"])  # so that what is wrong with it is said here
    if service.is_alone:
        _check_port(service.host, service.port)
    with progress.catching_signals():
        import ray

        cluster = Cluster(address=service.address or "local")
        resources = connect(cluster, "--address")
        try:
            progress.listen()
            _check_room(service, resources)
            _run(service, served, resources, progress)
        finally:
            ray.shutdown()


def check_serving() -> None:
    """Raises UserError when a package is not installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"serve: needs {', '.join(missing)}. Install it: pip install 'raydistill[serve]'")


def _check_port(host: str, port: int) -> None:
    """Serve would wait for a port that is taken."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise UserError(f"--host, --port: {host}:{port}: {error.strerror}. Give another") from None


def _check_room(service: Service, resources: Resources) -> None:
    """Raises UserError for replicas that would wait for ever."""
    wanted = service.replicas * service.threads
    if wanted > resources.cpus or service.threads > resources.node_cpus:
        raise UserError(
            f"--replicas, --threads: found {service.replicas} replicas of {service.threads} threads, the cluster has"
            f" {resources.cpus} CPUs, {resources.node_cpus} on its largest node. Lower one"
        )


def _run(service: Service, served: Served, resources: Resources, progress: Progress) -> None:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    options = {"host": service.host, "port": service.port}
    try:
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config={"log_level": "ERROR"})
        application = make_application(service, served, gpus=resources.gpus)
        serve.run(application, name=service.name, route_prefix=service.route, blocking=False)
    except (RayServeException, RuntimeError, ValueError) as error:
        raise UserError(f"serve: {service.name} could not be started: {first_line(error)}") from None
    try:
        where = f"http://{service.host}:{service.port}{service.route.rstrip('/')}"
        progress.say(
            f"serve: {service.model} ({served.task}) at {where}/predict, its page is {where}/docs; Ctrl-C ends it"
        )
        _wait(service.name, progress)
    finally:
        serve.shutdown() if service.is_alone else serve.delete(service.name)
        progress.say("serve: ended")


def _wait(name: str, progress: Progress) -> None:
    """Until a signal comes; says when the application's state changes."""
    from ray import serve

    state, looked = "RUNNING", time.monotonic()
    while not progress.stopping:
        time.sleep(POLL_SECONDS)
        if time.monotonic() - looked < STATUS_SECONDS:
            continue
        looked, application = time.monotonic(), serve.status().applications.get(name)
        if application is None:
            raise UserError(f"serve: {name} was deleted from the cluster by someone else. Start it again")
        if application.status.value != state:
            state = application.status.value
            progress.say(f"serve: {name} is {state} {' '.join(application.message.split())}".rstrip())


def make_application(service: Service, served: Served, *, gpus: int = 0) -> Any:
    """The two deployments, bound to each other. The model's batches are of texts, whosever requests they come from."""
    from ray import serve
    from ray.serve.exceptions import BackPressureError

    from raydistill.serving.api import Limits, Reply, make_api

    room = 2 * service.max_batch  # a batch is computed while the next one fills
    gpu = 1 if gpus and not served.source.cpu_only else 0
    limits = Limits(service.max_batch, service.max_characters)

    @serve.deployment(
        name=MODEL, num_replicas=service.replicas, max_ongoing_requests=room,
        max_queued_requests=WAITING_BATCHES * service.max_batch,
        ray_actor_options={"num_cpus": service.threads, "num_gpus": gpu},
    )  # fmt: skip
    class Model:
        """A replica: a loaded model, which computes one batch at a time in a thread of its own."""

        def __init__(self) -> None:
            torch.set_num_threads(service.threads)
            self._answer = open_model(served, service.asked)

        @serve.batch(
            max_batch_size=service.max_batch, batch_wait_timeout_s=service.batch_wait_ms / 1000,
            batch_size_fn=lambda items: max(1, sum(len(texts) for texts, _ in items)),
        )  # fmt: skip
        async def __call__(self, items: list[tuple[list[str], Asked]]) -> list[Reply]:
            texts = [text for of_item, _ in items for text in of_item]
            asked = [_merged(service.asked, wanted) for of_item, wanted in items for _ in of_item]
            made = iter(await asyncio.to_thread(self._answer, texts, asked) if texts else [])
            sizes = [len(texts) or None] + [None] * (len(items) - 1)  # a batch is counted once
            return [Reply([next(made) for _ in of_item], size) for (of_item, _), size in zip(items, sizes, strict=True)]

    def build() -> Any:
        handle = serve.get_deployment_handle(MODEL, app_name=service.name)

        async def ask(texts: list[str], asked: Asked) -> Reply:
            return await handle.remote((texts, asked))

        return make_api(served, limits, ask, (BackPressureError,))

    ingress = serve.deployment(
        name=API, max_ongoing_requests=WAITING_BATCHES * service.max_batch, ray_actor_options={"num_cpus": 0}
    )
    return ingress(serve.ingress(build)()).bind(Model.bind())


def _merged(of_service: Asked, of_request: Asked) -> Asked:
    """What a request asks for, by the service's threshold."""
    return replace(of_service, top=of_request.top, all_classes=of_request.all_classes)
