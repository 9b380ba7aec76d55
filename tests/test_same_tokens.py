"""Two tokenizers: the first thing in which they differ, in words."""

import json
from typing import Any

import pytest
from language_runs import tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from raydistill.data.same_tokens import difference


@pytest.fixture(scope="module")
def made():
    return tokenizer()


def changed(made: Any, change) -> Any:
    layout = json.loads(made.backend_tokenizer.to_str())
    change(layout)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(layout)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def swapped(layout: dict[str, Any]) -> None:
    vocab = layout["model"]["vocab"]
    names = {number: name for name, number in vocab.items()}
    vocab[names[270]], vocab[names[271]] = 271, 270


def test_equal_tokenizers_do_not_differ(made):
    assert difference(made, changed(made, lambda layout: None)) is None
    assert difference(made, tokenizer()) is None


def test_of_as_many_tokens_the_first_other_one_is_named(made):
    names = made.convert_ids_to_tokens([270, 271])
    assert difference(made, changed(made, swapped)) == f"token 270 is {names[0]!r} there and {names[1]!r} here"


def test_more_tokens_are_named_with_their_side(made):
    longer = tokenizer()
    longer.add_tokens(["<more>"])
    assert difference(made, longer) == f"token {len(made)}, '<more>', is here alone"
    assert difference(longer, made) == f"token {len(made)}, '<more>', is there alone"


def test_merges_in_another_order(made):
    def change(layout: dict[str, Any]) -> None:
        merges = layout["model"]["merges"]
        merges[3], merges[4] = merges[4], merges[3]

    found = difference(made, changed(made, change))
    assert found is not None
    assert found.startswith("merge 3 is ")


def test_what_cuts_a_text_into_words(made):
    def change(layout: dict[str, Any]) -> None:
        layout["pre_tokenizer"]["add_prefix_space"] = True

    found = difference(made, changed(made, change))
    assert found is not None
    assert found.startswith("its pre-tokenizer differs: ")


def test_special_tokens_and_template(made):
    other = tokenizer()
    other.eos_token = "<pad>"
    assert difference(made, other) == "eos_token is '</s>' there and '<pad>' here"
    other = tokenizer()
    other.chat_template = "{{ messages }}"
    assert difference(made, other) is None
    assert difference(made, other, template=True) == 'its chat template is null there and "{{ messages }}" here'
