"""Language models as files to deploy: what a GGUF file holds, by the readers of gguf and transformers; what is kept."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_runs import SIZES, mean_nll, texts, tiny_language_model, tokenizer
from run_files import facts

from raydistill.config.run import Config
from raydistill.errors import UserError
from raydistill.exports.gguf_file import ARCHITECTURES, GGUF_FILE, check_gguf_model, tokens_of, write_gguf
from raydistill.exports.gguf_tokenizer import SPACE, gguf_tokenizer
from raydistill.exports.language_folder import LanguageExport, write_language_export
from raydistill.exports.serving import MODELFILE, chat_pieces, commands, modelfile, ollama_template
from raydistill.exports.torchao_weights import check_torchao_model
from raydistill.models.loading import load_language_model
from raydistill.serving.answers import Asked, open_model
from raydistill.serving.served import find_served

gguf = pytest.importorskip("gguf")
IDS = torch.randint(4, 200, (3, 9), generator=torch.Generator().manual_seed(0))


TIED = ("qwen2", "gemma2")


def student(architecture: str, **changes: Any) -> Any:
    """Four heads of width 8, of which two share keys and values where heads can."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "vocabulary": 300}
    sizes |= {} if architecture == "gpt2" else {"num_key_value_heads": 2}
    sizes |= {"head_dim": 8} if "head_dim" in SIZES[architecture] else {}
    sizes |= {"query_pre_attn_scalar": 8} if architecture == "gemma2" else {}  # as llama.cpp has it
    return tiny_language_model(architecture, **{**sizes, **changes})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of every architecture."""
    found = {}
    for name in ARCHITECTURES:
        found[name] = tmp_path_factory.mktemp(name) / "gguf"
        write_language_export(
            student(name, tie_word_embeddings=name in TIED), tokenizer(), found[name], "gguf", name="x"
        )
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_student_from_the_file(made: dict[str, Path], architecture: str):
    model = LanguageExport("x", str(made[architecture])).load_language()
    ours, theirs = student(architecture, tie_word_embeddings=architecture in TIED), dict(model.named_parameters())
    for name, value in ours.named_parameters():  # rounded to float16, a norm with its 1 of Gemma in float32
        torch.testing.assert_close(theirs[name], value, rtol=2**-11, atol=1e-6, msg=name)
    assert {name for name, _ in ours.named_parameters()} == set(theirs)
    torch.testing.assert_close(logits(model), logits(ours), rtol=0.02, atol=0.02)


def test_queries_and_keys_of_llama_stand_in_pairs(made: dict[str, Path]):
    # Row 2i of a head is the first half's row i, row 2i + 1 the second half's: what is rotated together.
    tensors = {t.name: t for t in gguf.GGUFReader(str(made["llama"] / GGUF_FILE)).tensors}
    model = student("llama").model.layers[1].self_attn
    for name, linear, heads in (("attn_q", model.q_proj, 4), ("attn_k", model.k_proj, 2)):
        found = np.asarray(tensors[f"blk.1.{name}.weight"].data, np.float32)
        weight = linear.weight.detach().numpy()
        for head in range(heads):
            for row in range(8):
                expected = weight[8 * head + row // 2 + 4 * (row % 2)]
                np.testing.assert_allclose(found[8 * head + row], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("layers", "divisor"), [(2, 8), (46, 12)])
def test_queries_of_gemma_make_up_for_the_scale_that_llama_cpp_has(tmp_path: Path, layers: int, divisor: int):
    # It divides by the root of a head's width (8), and with the 46 layers of 27B by that of the width over the heads.
    model = student("gemma2", num_hidden_layers=layers, hidden_size=48, query_pre_attn_scalar=32)
    write_language_export(model, tokenizer(), tmp_path / "file", "gguf", name="x")
    tensors = {t.name: t for t in gguf.GGUFReader(str(tmp_path / "file" / GGUF_FILE)).tensors}
    found = np.asarray(tensors["blk.1.attn_q.weight"].data, np.float32)
    weight = model.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_allclose(found / divisor**0.5, weight / 32**0.5, rtol=1e-3, atol=1e-6)
    assert LanguageExport("x", str(tmp_path / "file")).load_language().config.query_pre_attn_scalar == divisor


def test_a_gemma_without_caps_has_them_where_no_logit_is(tmp_path: Path):
    model = student("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    write_gguf(model, tokenizer(), tmp_path / "file", "gguf", name="x")
    assert field(tmp_path / "file", "gemma2.attn_logit_softcapping") == pytest.approx(65504)
    assert field(tmp_path / "file", "gemma2.final_logit_softcapping") == pytest.approx(65504)


def field(path: Path, name: str) -> Any:
    found = gguf.GGUFReader(str(path)).fields[name]
    return found.contents()


def test_a_file_says_the_sizes_and_the_tokenizer(made: dict[str, Path]):
    path, own = made["mistral"] / GGUF_FILE, tokenizer()
    expected = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 32,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 8,
        "llama.feed_forward_length": 32, "llama.context_length": 64, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": own.bos_token_id,
        "tokenizer.ggml.eos_token_id": own.eos_token_id, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {name: field(path, name) for name in expected} == expected
    assert field(path, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert tokens_of(path) == own.convert_ids_to_tokens(list(range(300)))
    file = json.loads(own.backend_tokenizer.to_str())
    assert field(path, "tokenizer.ggml.merges") == [" ".join(pair) for pair in file["model"]["merges"]]
    assert [n for n, kind in enumerate(field(path, "tokenizer.ggml.token_type")) if kind == 3] == [0, 1, 2]


def test_a_tied_output_layer_is_written_once(made: dict[str, Path]):
    names = {t.name for t in gguf.GGUFReader(str(made["qwen2"] / GGUF_FILE)).tensors}
    assert "token_embd.weight" in names
    assert "output.weight" not in names
    assert "output.weight" in {t.name for t in gguf.GGUFReader(str(made["llama"] / GGUF_FILE)).tensors}


def test_eight_bits_are_a_scale_for_every_32_numbers(tmp_path: Path):
    model = student("llama")
    write_gguf(model, tokenizer(), tmp_path / "q8", "gguf-q8", name="x")
    tensors = {t.name: t for t in gguf.GGUFReader(str(tmp_path / "q8")).tensors}
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    scales = (np.abs(weight.reshape(-1, 32)).max(axis=1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    tensor = tensors["blk.0.ffn_up.weight"]
    found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32)
    assert np.abs(found - weight.reshape(-1, 32)).max() <= 0.51 * scales.max()
    np.testing.assert_allclose(found / scales, np.round(found / scales), atol=1e-3)
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_a_window_that_llama_cpp_does_not_know_bounds_what_is_read(tmp_path: Path):
    write_gguf(student("mistral", sliding_window=16), tokenizer(), tmp_path / "file", "gguf", name="x")
    assert field(tmp_path / "file", "llama.context_length") == 16


def of_characters() -> Any:
    """A tokenizer as SentencePiece makes them: every pair that makes a known piece is merged, best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    letters = [SPACE, *"abcdefgh"]
    pieces = ["ab", "cd", "abcd", SPACE + "ab", "ef", "de", SPACE + "abcd", "gh", "efgh", "cde"]
    vocabulary = {name: number for number, name in enumerate(["<unk>", "<s>", "</s>", *bytes_, *letters, *pieces])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def cut_by_scores(text: str, tokens: list[str], types: list[int], scores: list[float]) -> list[int]:
    """llama.cpp's way: of all neighbours that make a known piece the best scored are joined, the first of equals."""
    known = {name: number for number, name in enumerate(tokens) if types[number] == 1}
    pieces = list(SPACE + text.replace(" ", SPACE))
    while True:
        pairs = [(-scores[known[a + b]], n) for n, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in known]
        if not pairs:
            break
        _, place = min(pairs)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    ids = []
    for piece in pieces:
        ids += [known[piece]] if piece in known else [tokens.index(f"<0x{byte:02X}>") for byte in piece.encode()]
    return ids


@pytest.mark.parametrize("text", ["abcd efgh", "cdefgh ab", "abcdeabcd", "h abcde é f", "dede cdcde", ""])
def test_scores_cut_texts_as_the_merges_do(text: str):
    made = of_characters()
    found = gguf_tokenizer(made, len(made))
    assert (found.model, found.merges, found.adds_space) == ("llama", [], True)
    if text:
        assert cut_by_scores(text, found.tokens, found.types, found.scores) == made(text)["input_ids"]
    assert [found.types[n] for n in (0, 1, 2, 3, 258, 259)] == [2, 3, 3, 6, 6, 1]


def changed(**changes: Any) -> Any:
    """The stories' tokenizer with other entries in its file."""
    from tokenizers import Tokenizer

    made = tokenizer()
    file = json.loads(made.backend_tokenizer.to_str()) | {k: v for k, v in changes.items() if k != "model"}
    file["model"] |= changes.get("model", {})
    made._tokenizer = Tokenizer.from_str(json.dumps(file))
    return made


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ON_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def cut_by(pattern: str) -> dict[str, Any]:
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [rule, ON_BYTES]}


def test_rules_of_tokenizers_on_bytes_have_their_names():
    digits = {"type": "Digits", "individual_digits": True}
    by_digits = {"type": "Sequence", "pretokenizers": [digits, {**ON_BYTES, "use_regex": True}]}
    llama3 = QWEN.replace(r"|\p{N}| ", r"|\p{N}{1,3}| ")
    for expected, made in {
        "gpt-2": changed(), "qwen2": changed(pre_tokenizer=cut_by(QWEN), normalizer={"type": "NFC"}),
        "smollm": changed(pre_tokenizer=by_digits),
        "llama-bpe": changed(pre_tokenizer=cut_by(llama3), model={"ignore_merges": True}),
    }.items():  # fmt: skip
        assert gguf_tokenizer(made, 300).pre == expected


def test_a_tokenizer_that_would_cut_otherwise_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])), bos_token="<s>")
    cases = [
        (unigram, "it is Unigram, and only BPE is held"),
        (changed(pre_tokenizer=cut_by(r"\w+")), "its rule is not known there"),
        (changed(pre_tokenizer=cut_by(QWEN), model={"ignore_merges": True}), "ignore_merges is True, which qwen2 is"),
        (changed(normalizer={"type": "Lowercase"}), "it changes texts by Lowercase"),
        (changed(pre_tokenizer={"type": "Whitespace"}), "it works on characters, and not as SentencePiece's"),
    ]
    for made, message in cases:
        with pytest.raises(UserError, match=r"export\.formats: gguf: .*Leave the format out") as error:
            gguf_tokenizer(made, 300)
        assert message in str(error.value)


def test_an_architecture_or_a_rotation_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="found a student of 'granite', which is not known for it"):
        check_gguf_model(tiny_language_model("granite"), tokenizer())
    turned = student("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(UserError, match="the student turns its positions by 'linear', which is not built"):
        check_gguf_model(turned, tokenizer())
    with pytest.raises(UserError, match=r"gguf: gemma2 has no place for the student's lm_head\.weight"):
        check_gguf_model(student("gemma2", tie_word_embeddings=False), tokenizer())
    with pytest.raises(UserError, match="torchao-int8: the layers of GPT2LMHeadModel are no linear layers of torch"):
        check_torchao_model("torchao-int8", student("gpt2"))
    check_torchao_model("torchao-int8", student("llama"))
    large = student("llama")
    with torch.no_grad():
        large.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight has a weight of 1e\+05, and float16 goes to 65504"):
        write_gguf(large, tokenizer(), Path("/nonexistent"), "gguf", name="x")


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}"
)
COUNTED = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, INST])
def test_a_chat_template_is_taken_apart_and_put_together_for_ollama(template: str):
    made = tokenizer()
    made.chat_template = template
    pieces = chat_pieces(made)
    assert pieces is not None
    chat = [
        {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}, {"role": "user", "content": "So."}
    ]  # fmt: skip
    assert pieces.text(chat) == made.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert set(pieces.around) == ({"user", "assistant"} if template == INST else {"system", "user", "assistant"})
    # Ollama's language, as far as it is used: a loop over messages with a case for each role.
    text = ollama_template(pieces, adds_begin=False, begin_token="<s>")
    before, _, rest = text.partition("{{ range .Messages }}")
    cases, _, after = rest.rpartition("{{ end }}")
    parts = {}
    for case in filter(None, cases.split('{{ if eq .Role "')):
        role, _, body = case.partition('" }}')
        parts[role] = body.removesuffix("{{ end }}")
    found = before + "".join(parts[m["role"]].replace("{{ .Content }}", m["content"]) for m in chat) + after
    assert found == pieces.text(chat)


def test_a_template_that_is_no_sum_of_messages_is_left_out():
    made = tokenizer()
    assert chat_pieces(made) is None
    made.chat_template = COUNTED
    assert chat_pieces(made) is None


def test_a_first_token_that_the_file_adds_is_not_written_twice():
    made = tokenizer()
    made.chat_template = INST
    pieces = chat_pieces(made)
    assert pieces is not None
    assert ollama_template(pieces, adds_begin=True, begin_token="<s>").startswith("{{ range")
    assert ollama_template(pieces, adds_begin=False, begin_token="<s>").startswith("<s>{{ range")


def test_the_commands_name_what_stands_there():
    assert "FROM ./model.gguf" in modelfile("model.gguf", context=64, template=None, stop="</s>")
    ollama, vllm = commands("gguf", "runs/Tales/export/gguf", "Tales")
    assert ollama == "ollama create tales -f runs/Tales/export/gguf/Modelfile && ollama run tales"
    assert (
        vllm
        == "vllm serve runs/Tales/export/gguf/model.gguf --tokenizer runs/Tales/export/gguf --served-model-name Tales"
    )
    assert commands("safetensors-bf16", "there", "x") == ["vllm serve there --served-model-name x"]


# Runs of the real stages.


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


LOOSE = {"min_agreement": 0.5, "max_perplexity_rise": 0.2}


@pytest.fixture(scope="module")
def exported(language_runs) -> tuple[Path, dict[str, Any]]:
    folder = language_runs.start("train")
    asked = {"export": {"formats": ["gguf", "gguf-q8", "safetensors-bf16", "onnx"], **LOOSE}}
    answer = language_runs.run(folder, "train", "export", changes=asked)
    assert answer["error"] is None, answer["error"]
    return folder, answer


def test_every_format_is_compared_and_committed(exported):
    folder, answer = exported
    for name in ("gguf", "gguf-q8", "safetensors-bf16", "onnx"):
        found = facts(folder, f"export/{name}")
        assert found["perplexity"] == pytest.approx(found["student_perplexity"], rel=0.05)
        assert found["agreement"] > 0.9
        assert found["positions"] > found["rows"]
    exact = facts(folder, "export/onnx")
    assert exact["perplexity"] == pytest.approx(exact["student_perplexity"], rel=1e-5)
    assert facts(folder, "export/gguf")["kl"] < facts(folder, "export/gguf-q8")["kl"]
    assert any(line.startswith("export: to serve it: ollama create") for line in answer["said"])
    assert (folder / "export/gguf" / MODELFILE).read_text().startswith("FROM ./model.gguf\nPARAMETER num_ctx 128\n")


@pytest.fixture(scope="module")
def evaluated(language_runs, exported) -> tuple[Path, dict[str, Any]]:
    folder, _ = exported
    asked = {"export": {"formats": ["gguf", "safetensors-bf16", "onnx"], **LOOSE}, "evaluate.control": False}
    answer = language_runs.run(folder, "evaluate", changes=asked)
    assert answer["error"] is None, answer["error"]
    return folder, json.loads((folder / "report/report.json").read_text())


def test_the_report_has_every_file_beside_the_student(evaluated):
    folder, report = evaluated
    files = {one["name"]: one for one in report["others"]}
    assert list(files) == ["gguf", "safetensors-bf16", "onnx"]
    rounded = load_language_model("x", folder / "export/safetensors-bf16", dtype=torch.bfloat16)
    expected, count = mean_nll(folder, rounded, "test")
    assert report["test_positions"] == count
    assert files["safetensors-bf16"]["nll"] == pytest.approx(expected, rel=5e-3)
    assert files["onnx"]["nll"] == pytest.approx(report["student"]["nll"], rel=1e-5)
    assert files["onnx"]["agreement"] == pytest.approx(report["student"]["agreement"], abs=2e-3)
    assert files["onnx"]["retention"] == pytest.approx(report["retention"], rel=1e-5)
    for name, one in files.items():
        low, high = one["retention_ci95"]
        assert low <= one["retention"] <= high
        weights = [p for p in (folder / "export" / name).iterdir() if p.suffix in (".onnx", ".gguf", ".safetensors")]
        assert one["size_bytes"] == sum(path.stat().st_size for path in weights)
        assert one["parameters"] == report["student"]["parameters"]
        assert min(one["prefill_tokens_per_second"], one["decode_tokens_per_second"]) > 0
    whole, half = (one["memory_weights_bytes"] for one in (report["student"], files["safetensors-bf16"]))
    assert whole - half == 2 * report["student"]["parameters"]  # buffers stay in float32
    page = (folder / "report/report.html").read_text()
    assert all(f"<th>{name}</th>" in page and f"{name} keeps" in page for name in files)


def test_the_report_of_other_files_is_another_one(language_runs, evaluated):
    folder, _ = evaluated
    answer = language_runs.run(folder, "evaluate", changes={"evaluate.control": False})
    assert "report: compared: was made with" in answer["error"]


def test_what_is_there_is_not_made_again_and_what_fails_is_not_kept(language_runs, exported):
    folder, _ = exported
    asked = {"export": {"formats": ["gguf"], **LOOSE}}
    again = language_runs.run(folder, "export", changes=asked)
    assert "export: gguf is complete" in again["said"]
    strict = {"export": {"formats": ["safetensors-bf16"], "min_agreement": 1.0, "max_perplexity_rise": 0.0}}
    other = shutil.copytree(folder, folder.parent / "strict")
    refused = language_runs.run(other, "export", changes=strict, redo="export")
    assert "export.formats: safetensors-bf16: perplexity" in refused["error"]
    assert "Set export.min_agreement or export.max_perplexity_rise, or leave the format out" in refused["error"]


@pytest.mark.parametrize(("name", "tokens"), [("gguf", 8), ("safetensors-bf16", 1)])
def test_predict_goes_on_with_a_file(exported, name: str, tokens: int):
    # A GGUF file was no model to `predict`, and of others the weights were read as if they were in float32, before.
    folder, _ = exported
    served = find_served(str(folder / "export" / name))
    assert served.task == "causal_lm"
    text = texts(1)[0][:24].rstrip()
    (found,) = open_model(served, Asked(max_tokens=tokens))([text])
    model, own = LanguageExport("x", str(folder / "export" / name)).load_language(), tokenizer_of(folder / "student")
    ids = own(text)["input_ids"]
    for _ in range(tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1, : len(own)].argmax())
        if token == own.eos_token_id:
            break
        ids.append(token)
    assert text + found["completion"] == own.decode(ids, skip_special_tokens=True)


def test_predict_names_the_program_of_an_onnx_file(exported):
    with pytest.raises(UserError, match=r"is a language model as ONNX, .* Use the program beside it, generate\.py"):
        find_served(str(exported[0] / "export/onnx"))


def test_the_onnx_file_goes_on_with_a_text_by_its_own_program(exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = exported
    text = texts(1)[0][:40].rstrip()
    done = subprocess.run(
        [sys.executable, "export/onnx/generate.py", text], cwd=folder, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    model, own = (kind.from_pretrained(folder / "student") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = own(text, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=64, do_sample=False)
    shared = own.decode(expected[0], skip_special_tokens=True)
    assert done.stdout.startswith(shared[: len(text) + 5])


def test_formats_and_settings_of_another_task_are_refused():
    base = {
        "name": "x", "task": "causal_lm", "data": {"train": "a", "test": "b"}, "teacher": {"model": "m"},
        "student": {"init": "teacher_layers"},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"export\.formats: found onnx-int8, with task: causal_lm use gguf, gguf-q8"):
        Config.model_validate({**base, "export": {"formats": ["onnx-int8"]}})
    with pytest.raises(ValueError, match=r"export\.max_accuracy_loss is not known with task: causal_lm"):
        Config.model_validate({**base, "export": {"max_accuracy_loss": 0.5}})
    classes = {name: value for name, value in base.items() if name != "task"}
    with pytest.raises(ValueError, match=r"export\.formats: found gguf, with task: classification use onnx, onnx-int8"):
        Config.model_validate({**classes, "export": {"formats": ["gguf"]}})
    with pytest.raises(ValueError, match=r"export\.max_perplexity_rise means nothing with task: classification"):
        Config.model_validate({**classes, "export": {"max_perplexity_rise": 0.5}})
    asked = Config.model_validate({**base, "export": {}}).export
    assert asked is not None
    assert (asked.rows, asked.min_agreement) == (256, 0.95)


def test_a_student_that_a_format_cannot_hold_is_refused_before_anything_is_written(language_runs):
    asked = {"export.formats": ["gguf"], "student.model_type": "granite", "student.tie_embeddings": False}
    folder = language_runs.start("train")
    answer = language_runs.run(folder, "train", "export", changes=asked)
    assert "export.formats: gguf: found a student of 'granite', which is not known for it" in answer["error"]
    assert not (folder / "train").exists()
