"""GGUF files read by llama.cpp itself, by the binaries that node-llama-cpp brings: npm and its registry are needed."""

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from language_runs import texts, tokenizer
from test_language_export import ARCHITECTURES, QWEN, TIED, of_characters, student
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raydistill.exports.gguf_file import GGUF_FILE
from raydistill.exports.language_folder import write_language_export

VERSION = "3.22.1"
PACKAGES = (f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/linux-x64@{VERSION}")
PROMPTS = ["Once there was", 'The fox said: "hello', "A quiet morn", " 12 é ✓"]
SIGNS = [*"abcXYZ 0123456789  \t\n\r.,;:!?'\"-_()[]{}éüßñ漢字かな한국🙂…—", "'s", "'LL", "\u00a0", "\u200b", "👩‍👩‍👧"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")]


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Takes cases as llama_cpp.mjs says, and gives what it finds."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true}')
    command = ["npm", "install", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", *PACKAGES]
    subprocess.run(command, cwd=folder, check=True, timeout=600, capture_output=True)
    shutil.copy(Path(__file__).with_name("llama_cpp.mjs"), folder)

    def ask(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        (folder / "cases.json").write_text(json.dumps(cases))
        command = ["node", "llama_cpp.mjs", "cases.json", "found.json"]
        ran = subprocess.run(command, cwd=folder, timeout=600, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return json.loads((folder / "found.json").read_text())

    return ask


def spread(model: Any) -> Any:
    """Weights so large that next tokens are not all alike."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


CHANGED = {
    **{name: {} for name in ARCHITECTURES},
    "gemma2, another scale": {"query_pre_attn_scalar": 32},
    "gemma2, layers of 27B": {"query_pre_attn_scalar": 32, "num_hidden_layers": 46, "hidden_size": 48},
    "gemma2, no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
}


@pytest.mark.parametrize(("format_name", "most"), [("gguf", 0.005), ("gguf-q8", 0.15)])
def test_llama_cpp_answers_as_the_student_does(llama_cpp: Any, tmp_path: Path, format_name: str, most: float):
    own, asked, expected = tokenizer(), [], []
    for name, changes in CHANGED.items():
        kind = name.partition(",")[0]
        model, folder = spread(student(kind, tie_word_embeddings=kind in TIED, **changes)), tmp_path / name
        write_language_export(model, own, folder, format_name, name="x")
        ids = [own(text)["input_ids"] for text in PROMPTS]
        asked.append(
            {"path": str(folder / GGUF_FILE), "texts": PROMPTS, "rows": [{"ids": row, "steps": 6} for row in ids]}
        )
        expected.append((name, model, ids))
    for (name, model, ids), found in zip(expected, llama_cpp(asked), strict=True):
        assert found["texts"] == ids, name
        for row, answer in zip(ids, found["rows"], strict=True):
            with torch.no_grad():
                probs_V = model(input_ids=torch.tensor([row])).logits[0, -1].softmax(dim=-1)
            theirs_V = torch.zeros_like(probs_V)
            for token, probability in answer["probabilities"]:
                theirs_V[token] = probability
            depth = 2 if "27B" in name else 1  # 46 layers of random weights add up more rounding
            assert (theirs_V - probs_V).abs().max() < depth * most, name
            if format_name == "gguf":
                written = model.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False, pad_token_id=0)
                assert answer["written"][: written.shape[1] - len(row)] == written[0, len(row) :].tolist(), name


def on_bytes(*, cut: Any = None, whole: bool = False, normal: Any = None) -> Any:
    made = Tokenizer(models.BPE(ignore_merges=whole))
    if normal:
        made.normalizer = normal
    made.pre_tokenizer = cut
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=["<end>"], initial_alphabet=alphabet)
    made.train_from_iterator(texts(200), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<end>")


def by(pattern: str) -> Any:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_])


def test_llama_cpp_cuts_texts_as_the_tokenizer_does(llama_cpp: Any, tmp_path: Path):
    plain, digits = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)
    made = {
        "gpt-2": on_bytes(cut=plain),
        "smollm": on_bytes(cut=pre_tokenizers.Sequence([digits, plain])),
        "qwen2": on_bytes(cut=by(QWEN), normal=normalizers.NFC()),
        "llama-bpe": on_bytes(cut=by(QWEN.replace(r"|\p{N}| ", r"|\p{N}{1,3}| ")), whole=True),
        "SentencePiece": of_characters(),
    }
    drawn = random.Random(0)
    asked = ["".join(drawn.choices(SIGNS, k=drawn.randint(1, 60))) for _ in range(300)] + texts(20)
    cases = []
    for name, own in made.items():
        write_language_export(student("llama", vocabulary=len(own)), own, tmp_path / name, "gguf", name="x")
        cases.append({"path": str(tmp_path / name / GGUF_FILE), "texts": asked, "rows": []})
    for (name, own), found in zip(made.items(), llama_cpp(cases), strict=True):
        for text, ids in zip(asked, found["texts"], strict=True):
            assert ids == own(text, add_special_tokens=False)["input_ids"], (name, text)
