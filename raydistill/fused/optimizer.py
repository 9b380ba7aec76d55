"""AdamW for stacked models: every member has its own learning rate, weight decay and clipping.

Shapes: M members.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raydistill.engine_base import MOMENTS
from raydistill.fused.stack import Stack


class MemberOptimizer:
    """torch's fused AdamW over each member's part of the stacked weights, as if it were trained alone.

    Matrices have weight decay; biases and norms, which have one dimension in a model, have none.
    """

    def __init__(self, stack: Stack, *, weight_decay: Sequence[float], clip: Sequence[float], steps: int = 0) -> None:
        self._stack, self._steps = stack, steps
        self._decay, self._clip = list(weight_decay), list(clip)
        self._moments = {
            moment: {name: torch.zeros_like(p) for name, p in stack.parameters.items()} for moment in MOMENTS
        }
        self._bind()

    def _bind(self) -> None:
        """Makes every member's views of weights and moments what torch's optimiser works on."""
        parameters = self._stack.parameters
        self._views: dict[str, list[torch.Tensor]] = {
            name: [part.requires_grad_() for part in p.detach().unbind()] for name, p in parameters.items()
        }
        groups = [
            {
                "params": [self._views[n][m] for n in parameters if (parameters[n].ndim > 2) == matrices],
                "weight_decay": d,
            }
            for m, decay in enumerate(self._decay)
            for matrices, d in ((True, decay), (False, 0.0))
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        for name, views in self._views.items():
            for member, view in enumerate(views):
                step = torch.tensor(float(self._steps), device=view.device)
                moments = {moment: self._moments[moment][name][member] for moment in MOMENTS}
                self._optimizer.state[view] = {"step": step, **moments}
        self._clip_M = torch.tensor(self._clip, device=next(iter(parameters.values())).device)

    def step(self, learning_rates: Sequence[float]) -> torch.Tensor:
        """Clips, steps and clears the gradients; every member's gradient norm before clipping, M."""
        gradients = {name: p.grad for name, p in self._stack.parameters.items()}
        norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values() if g is not None]
        norm_M = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        share_M = (self._clip_M / (norm_M + 1e-6)).clamp(max=1.0)
        for name, gradient in gradients.items():
            assert gradient is not None, f"{name} takes no part in the loss"
            gradient.mul_(share_M.view(-1, *[1] * (gradient.ndim - 1)))
            for view, part in zip(self._views[name], gradient.unbind(), strict=True):
                view.grad = part
        for group, rate in zip(
            self._optimizer.param_groups, (r for r in learning_rates for _ in range(2)), strict=True
        ):
            group["lr"] = rate
        self._optimizer.step()
        self._steps += 1
        for name, p in self._stack.parameters.items():
            p.grad = None
            for view in self._views[name]:
                view.grad = None
        return norm_M

    def keep(self, numbers: Sequence[int]) -> None:
        """Leaves these members alone, after `Stack.keep` has."""
        chosen = torch.tensor(numbers, device=self._clip_M.device)
        self._decay, self._clip = [self._decay[n] for n in numbers], [self._clip[n] for n in numbers]
        self._moments = {m: {name: v[chosen] for name, v in of.items()} for m, of in self._moments.items()}
        self._bind()

    def state(self, number: int) -> dict[str, torch.Tensor]:
        """A member's moments as "exp_avg.<weight>" and so on, by the names of its model, on the CPU."""
        return {
            f"{moment}.{name}": value
            for moment, of in self._moments.items()
            for name, value in self._stack.named({name: v[number] for name, v in of.items()}).items()
        }

    def restore(self, number: int, state: dict[str, torch.Tensor]) -> None:
        """Puts a member's moments back."""
        for moment, of in self._moments.items():
            prefix = f"{moment}."
            values = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
            for name, value in self._stack.stacked(values).items():
                of[name][number].copy_(value)
