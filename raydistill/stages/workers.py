"""Workers of Ray Train: started in a thread of this process, watched from it, and what they came to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from raydistill.errors import first_line
from raydistill.record.store import Store
from raydistill.stages.cluster import Share, ray_storage


class Workers:
    """The workers of one training, each of which runs `loop` over what it is `sent` and "threads", its CPUs."""

    def __init__(
        self, loop: Callable[[dict[str, Any]], Any], sent: dict[str, Any], share: Share, *, store: Store, scratch: str,
        environment: dict[str, str], max_failures: int = 0,
    ) -> None:  # fmt: skip
        """Starts them. Ray keeps notes in `scratch`, a folder of the store; lost workers are replaced so often."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        each = {name: count for name, count in (("CPU", share.cpus), ("GPU", share.gpus)) if count}
        self._trainer = TorchTrainer(
            loop,
            train_loop_config=sent | {"threads": share.cpus},
            scaling_config=ScalingConfig(
                num_workers=share.workers, use_gpu=share.gpus > 0, resources_per_worker=each
            ),
            run_config=RunConfig(
                name="train",
                **ray_storage(store, scratch),
                failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=1),
                worker_runtime_env={"env_vars": environment},
            ),
        )  # fmt: skip
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, daemon=True, name="fit")
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._value = self._trainer.fit().return_value
        except BaseException as error:
            self._error = error

    @property
    def at_work(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when they have ended and hold nothing of the cluster any more, or after so long."""
        self._thread.join(seconds)

    def result(self) -> Any:
        """What rank 0 returned, once they have ended. Raises what ended them."""
        assert not self.at_work
        if self._error is not None:
            raise self._error
        return self._value

    @property
    def problem(self) -> str:
        """Why they ended, in one line; empty when they did so by themselves."""
        error = self._error
        if error is None:
            return ""
        causes = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None), error]
        return next(first_line(cause) for cause in causes if cause is not None)
