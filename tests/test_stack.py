"""A stack of models against the models themselves, as transformers computes them: logits, gradients, dropout."""

from typing import Any

import pytest
import torch
from tiny_models import tiny

from raydistill.fused.optimizer import MemberOptimizer
from raydistill.fused.stack import Stack

ARCHITECTURES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
CPU = torch.device("cpu")


def batch(seed: int, rows: int = 6) -> dict[str, torch.Tensor]:
    """Rows of 1 to 13 tokens; the first one's first is the padding token, which is then a token like others."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 14, (rows,), generator=random)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(4, 64, mask.shape, generator=random) * mask + (1 - mask)
    ids[0, 0] = 1
    return {"input_ids": ids, "attention_mask": mask}


def models(architecture: str, count: int = 3, dropout: float = 0.0, **changes: Any) -> list[Any]:
    """In training, each with weights of its own."""
    names = ("dropout", "attention_dropout", "seq_classif_dropout")
    if architecture != "distilbert":
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    shares = dict(zip(names, (dropout, dropout / 2, dropout / 3), strict=True))
    found = []
    for seed in range(count):
        model = tiny(architecture, **changes, **shares).train()
        model.set_attn_implementation("eager")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        found.append(model)
    return found


@pytest.mark.parametrize("batches", [1, 2], ids=["one batch for all", "batches of their own"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [(name, {}) for name in ARCHITECTURES]
    + [("bert", {"num_hidden_layers": 1}), ("bert", {"hidden_act": "relu"}), ("electra", {"embedding_size": 8})],
)
def test_a_stack_has_the_logits_and_gradients_of_its_members(
    architecture: str, changes: dict[str, Any], dropout: float, batches: int
):
    alone = models(architecture, dropout=dropout, **changes)
    stack = Stack(alone, device=CPU)
    inputs, seeds, of = [batch(7), batch(8)][:batches], [11, 12][:batches], [0, batches - 1, 0]
    logits = stack.logits(inputs, of, seeds)
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * pull).sum().backward()
    for number, model in enumerate(alone):
        torch.manual_seed(seeds[of[number]])
        expected = model(**inputs[of[number]]).logits
        (expected * pull[number]).sum().backward()
        torch.testing.assert_close(logits[number], expected, rtol=1e-4, atol=1e-5)
        found = stack.named({name: p.grad[number] for name, p in stack.parameters.items() if p.grad is not None})
        assert set(found) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            # A key's bias moves no softmax: its gradient is rounding.
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=2e-4, msg=name)


def test_without_seeds_nothing_is_dropped():
    (alone,) = models("bert", 1, dropout=0.5)
    found = Stack([alone], device=CPU).logits([batch(7)], [0])
    torch.testing.assert_close(found[0], alone.eval()(**batch(7)).logits, rtol=1e-4, atol=1e-5)


def test_weights_come_back_as_they_went_in_and_members_can_leave():
    alone = models("roberta", 4)
    stack = Stack(alone, device=CPU)
    stack.keep([3, 1])
    assert stack.members == 2
    for number, model in enumerate((alone[3], alone[1])):
        weights = stack.member_weights(number)
        assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    stack.load(0, stack.member_weights(1))
    torch.testing.assert_close(*stack.logits([batch(7)], [0, 0]))


def test_members_steps_are_adamws_with_their_own_rate_decay_and_clipping():
    settings = [(1e-3, 0.0, 1e9), (5e-3, 0.3, 1e9), (2e-3, 0.1, 0.05)]
    alone = models("bert")
    stack = Stack(alone, device=CPU)
    optimizer = MemberOptimizer(stack, weight_decay=[s[1] for s in settings], clip=[s[2] for s in settings])
    own = []
    for model, (rate, decay, _) in zip(alone, settings, strict=True):
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        own.append(torch.optim.AdamW(groups, lr=rate))
    for step in range(4):
        if step == 2:  # a member leaves, and what the others have stays theirs
            stack.keep([0, 2])
            optimizer.keep([0, 2])
            alone, own, settings = [alone[0], alone[2]], [own[0], own[2]], [settings[0], settings[2]]
        torch.manual_seed(step)
        for parameter in stack.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        theirs = [{n: p.grad[m] for n, p in stack.parameters.items() if p.grad is not None} for m in range(len(alone))]
        for model, gradients in zip(alone, theirs, strict=True):
            for name, gradient in stack.named(gradients).items():
                model.get_parameter(name).grad = gradient
        norms = optimizer.step([rate for rate, _, _ in settings])
        for number, (model, other, (_, _, clip)) in enumerate(zip(alone, own, settings, strict=True)):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            torch.testing.assert_close(norms[number], norm, rtol=1e-5, atol=0.0)
            other.step()
    for number, model in enumerate(alone):
        for name, value in stack.member_weights(number).items():
            torch.testing.assert_close(value, model.get_parameter(name).detach(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("gpt2", {}, "models of the type gpt2 cannot be stacked, only bert, roberta"),
        ("bert", {"is_decoder": True}, "its attention looks back only"),
    ],
)
def test_a_model_that_cannot_be_stacked_is_refused_with_the_reason(architecture: str, changes: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        Stack([tiny(architecture, **changes)], device=CPU)


def test_a_model_with_weights_of_its_own_is_refused_by_their_name():
    (model,) = models("bert", 1)
    model.bert.encoder.layer[0].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"other weights than the usual ones, such as bert\.encoder\.layer\.0"):
        Stack([model], device=CPU)
