"""`raydistill serve` as a process of its own, and a Ray head node of a test's own to serve on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import psutil
from processes import kill_tree, program

SECONDS = 240  # that a process may take in all


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ask(url: str, body: Any = None) -> tuple[int, Any]:
    """Status and answer, which is read where it is JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, _read(answer)
    except HTTPError as error:
        return error.code, _read(error)


def _read(answer: Any) -> Any:
    text = answer.read().decode()
    return json.loads(text) if "json" in answer.headers["Content-Type"] else text


def metric(text: str, name: str) -> float:
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


@dataclass
class Serving:
    """A process that answers, and what it has said."""

    process: subprocess.Popen[str]
    port: int
    mark: str  # in the environment of all that it starts
    said: list[str]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def end(self) -> str:
        """Ends it by SIGTERM, which must go well; what it says meanwhile."""
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGTERM)
        rest = self.process.stdout.read()
        assert self.process.wait(60) == 0, rest
        assert "serve: ended" in rest
        assert "Traceback" not in rest
        return rest


@contextmanager
def serving(model: Path, *options: str, port: int | None = None, **environment: str) -> Iterator[Serving]:
    """`raydistill serve` once it says that it answers."""
    port, mark = port or free_port(), uuid.uuid4().hex
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "raydistill", "serve", str(model), "--port", str(port), *options], cwd=model.parent,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": root, "SERVE_TEST": mark, **environment},
    )  # fmt: skip
    too_slow = threading.Timer(SECONDS, process.kill)
    too_slow.start()
    said: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if "/predict" in line:
                break
        assert process.poll() is None, said
        yield Serving(process, port, mark, said)
    finally:
        too_slow.cancel()
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def marked(mark: str) -> list[psutil.Process]:
    """The processes that have inherited a mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SERVE_TEST") == mark:
                found.append(process)
    return found


def left(mark: str) -> list[psutil.Process]:
    """Those of them that do not end within some seconds."""
    deadline = time.monotonic() + 20
    while (found := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


@contextmanager
def head_node() -> Iterator[tuple[str, dict[str, str], subprocess.Popen[bytes]]]:
    """A cluster of one node of two CPUs: its address, the environment of who connects, and its process."""
    folder = Path(tempfile.mkdtemp(prefix="rd", dir="/tmp"))  # short: the names of Ray's sockets stand below it
    address, (client, agent, metrics) = f"127.0.0.1:{free_port()}", (free_port() for _ in range(3))
    environment = {"HOME": str(folder), "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={address.split(':')[1]}", f"--temp-dir={folder}/ray", "--num-cpus=2",
        "--include-dashboard=false", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}", "--object-store-memory=100000000",
    ]  # fmt: skip
    paths = {"PYTHONPATH": str(Path(__file__).parents[1])}
    with open(folder / "log", "w") as log:
        node = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment, **paths})
    try:
        while "raylet" not in {Path(program(p)).name for p in psutil.Process(node.pid).children(recursive=True)}:
            assert node.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        time.sleep(2)  # until it is known to itself
        yield address, environment, node
    finally:
        kill_tree(node.pid)
        node.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
