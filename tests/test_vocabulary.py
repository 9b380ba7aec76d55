"""Trimmed tokenizers: the same pieces for texts whose pieces are kept, smaller ones for others, and loadable by all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import SmallRuns
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from raydistill.data.shards import DataShard
from raydistill.data.tokens import ids_in, load_tokenizer, tokenise
from raydistill.errors import UserError
from raydistill.students.vocabulary import check_trimmable, trimmed_tokenizer
from raydistill.tickets import generate

pytestmark = pytest.mark.xdist_group("small_runs")
TEXTS = [text for text, _ in generate(300, seed=3)]
TRAIN, OTHERS = TEXTS[:30], TEXTS[30:]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def wordpiece() -> Any:
    from transformers import BertTokenizer

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=BERT, show_progress=False)
    )
    return BertTokenizer(vocab=trained.get_vocab())


def byte_level() -> tuple[dict[str, int], list[Any], Tokenizer]:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=800, special_tokens=ROBERTA, initial_alphabet=alphabet, show_progress=False),
    )
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    return trained.get_vocab(), merges, trained


def roberta() -> Any:
    from transformers import RobertaTokenizer

    vocabulary, merges, _ = byte_level()
    return RobertaTokenizer(vocab=vocabulary, merges=merges)


def gpt2() -> Any:
    from transformers import GPT2Tokenizer

    vocabulary, merges, _ = byte_level()
    return GPT2Tokenizer(vocab=vocabulary, merges=merges, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


def modernbert() -> Any:
    """As ModernBERT has it: no class of its own, and tokens behind the vocabulary that are not special."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level()[2], cls_token="<s>", pad_token="<pad>", sep_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens(["[unused0]", "    "])
    return tokenizer


def word_end() -> Any:
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    trained.decoder = decoders.BPEDecoder()
    trained.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=500, special_tokens=BERT, end_of_word_suffix="</w>", show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained, pad_token="[PAD]", unk_token="[UNK]")


def byte_fallback() -> Any:
    """SentencePiece's BPE as Llama has it: each token has several merges, and bytes stand for unknown characters."""
    from transformers import PreTrainedTokenizerFast

    _, merges, _ = byte_level()
    pieces = [f"<0x{number:02X}>" for number in range(256)]
    signs = sorted({sign for text in TRAIN for sign in text.replace(" ", "\u2581")} | {"\u2581"})
    joined = [(a.replace("\u0120", "\u2581"), b.replace("\u0120", "\u2581")) for a, b in merges]
    known = dict.fromkeys([*ROBERTA, *pieces, *signs])
    usable = []
    for left, right in joined:
        if left in known and right in known:
            known[left + right] = None
            usable.append((left, right))
    every = [(t[:cut], t[cut:]) for t in known for cut in range(1, len(t)) if t[:cut] in known and t[cut:] in known]
    order = {left + right: number for number, (left, right) in enumerate(usable)}
    every = sorted((pair for pair in every if "".join(pair) in order), key=lambda pair: order["".join(pair)])
    vocabulary = {token: number for number, token in enumerate(known)}
    tokenizer = Tokenizer(models.BPE(vocabulary, every, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def unigram(special: list[str], unknown: str) -> list[tuple[str, float]]:
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token=unknown, show_progress=False)
    )
    return [tuple(entry) for entry in json.loads(trained.to_str())["model"]["vocab"]]


def xlm_roberta() -> Any:
    from transformers import XLMRobertaTokenizer

    return XLMRobertaTokenizer(vocab=unigram(["<s>", "<pad>", "</s>", "<unk>"], "<unk>"))


def deberta_v2() -> Any:
    from transformers import DebertaV2Tokenizer

    return DebertaV2Tokenizer(vocab=unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[UNK]"))


def albert() -> Any:
    from transformers import AlbertTokenizer

    return AlbertTokenizer(vocab=unigram(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], "<unk>"))


def t5() -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=unigram(["<pad>", "</s>", "<unk>"], "<unk>"))


KINDS: dict[str, Callable[[], Any]] = {
    made.__name__: made
    for made in (wordpiece, roberta, gpt2, modernbert, word_end, byte_fallback, xlm_roberta, deberta_v2, albert, t5)
}


def shards(texts: list[str], rows: int = 16) -> list[DataShard]:
    parts = [texts[start : start + rows] for start in range(0, len(texts), rows)]
    return [DataShard("x", np.arange(len(part)), part, np.zeros(len(part), np.int32)) for part in parts]


def trimmed(tokenizer: Any, texts: list[str], **options: Any) -> tuple[Any, list[int]]:
    return trimmed_tokenizer(tokenizer, shards(texts), **{"max_length": 512, "min_count": 1, **options})


def pieces(tokenizer: Any, texts: list[str]) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts)["input_ids"]]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[int], Path]:
    """A tokenizer as it is loaded, the trimmed one as users load it, the kept ids, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    KINDS[request.param]().save_pretrained(folder / "whole")
    before = load_tokenizer(folder / "whole", "x")
    new, kept = trimmed(before, TRAIN)
    new.save_pretrained(folder / "trimmed")
    return before, load_tokenizer(folder / "trimmed", "x"), kept, folder


def test_every_train_text_gives_the_same_pieces(kind):
    before, new, kept, _ = kind
    assert len(new) == len(kept) < len(before) - 5
    assert pieces(new, TRAIN) == pieces(before, TRAIN)
    assert np.array_equal(ids_in(before, new), kept)  # type: ignore[arg-type]
    assert ids_in(new, new) is None


def test_other_texts_give_the_same_pieces_or_smaller_ones(kind):
    before, new, kept, _ = kind
    known = set(before.convert_ids_to_tokens(kept))
    strange = ["", " ", "é", "naïve 世界 \U0001f600", "\x00\u200b", "x" * 300, "tab\tand  spaces", "ﬁ ½ İ"]
    same = 0
    for was, now in zip(pieces(before, OTHERS + strange), pieces(new, OTHERS + strange), strict=True):
        if known.issuperset(was):
            assert now == was
            same += 1
        else:
            assert known.issuperset(now)
            assert now.count(new.unk_token) <= was.count(before.unk_token)
    assert 10 < same < len(OTHERS)
    decoded = [[t.decode(ids, skip_special_tokens=True) for ids in t(OTHERS)["input_ids"]] for t in (before, new)]
    assert decoded[0] == decoded[1]


@settings(max_examples=20)
@given(data=st.data())
def test_whatever_is_trained_on_and_whatever_comes(kind, data: st.DataObject):
    before = kind[0]
    text = st.one_of(st.sampled_from(TEXTS), st.text(max_size=30), st.text("abcdeortls ", max_size=30))
    train = data.draw(st.lists(text, min_size=1, max_size=6))
    new, kept = trimmed(before, train)
    assert pieces(new, train) == pieces(before, train)
    known = set(before.convert_ids_to_tokens(kept))
    other = data.draw(st.lists(text, max_size=6))
    for was, now in zip(pieces(before, other) if other else [], pieces(new, other) if other else [], strict=True):
        assert now == was or not known.issuperset(was) or before.unk_token in was


def test_special_tokens_and_what_stands_around_a_text_stay(kind):
    before, new, kept, _ = kind
    for name, token in before.special_tokens_map.items():
        assert new.special_tokens_map[name] == token
    assert set(before.all_special_ids) <= set(kept)
    assert set(new.added_tokens_encoder) == set(before.added_tokens_encoder)
    pair = [t.convert_ids_to_tokens(t(TRAIN[0], TRAIN[1])["input_ids"]) for t in (before, new)]
    assert pair[0] == pair[1]
    batches = [t(TRAIN[:3], padding=True)["attention_mask"] for t in (before, new)]
    assert batches[0] == batches[1]


def test_other_programs_load_it(kind):
    from transformers import AutoTokenizer

    _, new, _, folder = kind
    assert {path.name for path in (folder / "trimmed").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    plain = Tokenizer.from_file(str(folder / "trimmed/tokenizer.json"))
    again = AutoTokenizer.from_pretrained(folder / "trimmed")
    assert [e.ids for e in plain.encode_batch(OTHERS)] == new(OTHERS)["input_ids"] == again(OTHERS)["input_ids"]


def test_a_piece_that_is_used_seldom_goes(kind):
    before = kind[0]
    _, all_used = trimmed(before, TRAIN)
    seldom, kept = trimmed(before, TRAIN, min_count=20)
    ids = np.concatenate([before(text)["input_ids"] for text in TRAIN])
    counts = np.bincount(ids, minlength=len(before))
    assert set(kept) < set(all_used)
    assert set(np.flatnonzero(counts >= 20)) <= set(kept)
    assert tokenise(seldom, TRAIN, 512).lengths_N.sum() > len(ids)


def test_what_truncation_cuts_does_not_count(kind):
    before = kind[0]
    new, kept = trimmed(before, TRAIN, max_length=8)
    # Without borders of words a text is one word, and all of it counts.
    assert len(kept) < len(kind[2]) or before.backend_tokenizer.pre_tokenizer is None
    cut = [t(TRAIN, truncation=True, max_length=8)["input_ids"] for t in (before, new)]
    assert cut[0] == [[kept[number] for number in row] for row in cut[1]]


def whole(model: Any, *, special: bool = True) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def test_a_word_that_wordpiece_gave_up_is_given_up_again():
    # It takes "ab" and finds nothing for "c". Without "ab" it would take "a" and "##bc".
    names = ["[PAD]", "[UNK]", "a", "x", "##b", "ab", "##bc", "xyz"]
    before = whole(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    new, kept = trimmed(before, ["abc", "xbc"])
    assert pieces(before, ["abc xbc"]) == [["[UNK]", "x", "##bc"]]
    assert pieces(new, ["abc xbc"]) == [["[UNK]", "x", "##bc"]]
    assert [names[number] for number in kept] == names[:-1]


def test_unknown_characters_cost_unigram_what_they_did():
    # "y" has no piece of its own. Its cost hangs on the least likely piece, "zz", which no text uses.
    entries = [("[UNK]", 0.0), ("[PAD]", 0.0), ("yb", -40.0), ("c", -40.0), ("d", -40.0), ("bcd", -1.0), ("zz", -200.0)]
    before = whole(models.Unigram([*entries, ("unused", -50.0)], unk_id=0))
    new, kept = trimmed(before, ["ybcd", "bcd"])
    assert pieces(before, ["ybcd"]) == [["yb", "c", "d"]]
    assert pieces(new, ["ybcd"]) == [["yb", "c", "d"]]
    assert len(kept) == 7


def test_bpe_keeps_what_a_token_is_made_of_and_no_other():
    names = ["[PAD]", "[UNK]", "l", "o", "w", "e", "lo", "low", "we", "lowe", "ow"]
    merges = [("l", "o"), ("lo", "w"), ("w", "e"), ("low", "e"), ("o", "w")]
    before = whole(models.BPE({name: n for n, name in enumerate(names)}, merges, unk_token="[UNK]"))
    new, kept = trimmed(before, ["low"])
    assert [names[number] for number in kept] == ["[PAD]", "[UNK]", "l", "o", "w", "e", "lo", "low"]
    assert pieces(before, ["lowe we ow"]) == [["lowe", "we", "ow"]]
    assert pieces(new, ["lowe we ow"]) == [["low", "e", "w", "e", "o", "w"]]


def test_a_tokenizer_of_whole_words_is_refused():
    before = whole(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    with pytest.raises(UserError, match=r"student\.trim_vocabulary: .* \(found WordLevel, expected BPE, Unigram, Word"):
        check_trimmable(before)


def test_a_tokenizer_without_a_file_that_can_be_trimmed_is_refused():
    from transformers import CanineTokenizer

    with pytest.raises(UserError, match=r"student\.trim_vocabulary: CanineTokenizer has no model in tokenizer\.json"):
        check_trimmable(CanineTokenizer())


def test_a_trimmed_student_is_a_hugging_face_model(runs: SmallRuns):
    from transformers import AutoModelForSequenceClassification, pipeline

    changes = {"student": {"init": "teacher_layers", "layers": [1], "trim_vocabulary": True, "max_positions": 48}}
    folder, answer = runs.trained(changes)
    assert answer["error"] is None, answer["error"]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    tokenizer = load_tokenizer(folder / "student", "x")
    assert model.config.vocab_size == len(tokenizer) < 200
    assert model.config.max_position_embeddings == 48
    found = pipeline("text-classification", model=str(folder / "student"))(
        ["Wo ist mein Paket? \U0001f600", "where is my parcel", ""], truncation=True
    )
    assert {prediction["label"] for prediction in found} <= set(model.config.label2id)


def first_loss(folder: Path) -> dict[str, float]:
    point = json.loads((folder / "train/metrics.jsonl").read_text().splitlines()[0])
    return {name: point[name] for name in ("loss", "kl", "hidden_mse", "attention_kl", "embeddings_mse")}


def test_the_teacher_beside_the_training_reads_its_own_ids(runs: SmallRuns):
    student = {"init": "teacher_layers", "layers": [0, 1], "dropout": 0.0}
    features = [{"kind": "hidden_mse"}, {"kind": "attention_kl"}, {"kind": "embeddings_mse"}]
    found = []
    for trim in (False, True):
        changes = {
            "student": student | {"trim_vocabulary": trim}, "train.loss.features": features, "train.log_every": 1,
            "train.loss.alpha": 1.0,
        }  # fmt: skip
        folder, answer = runs.trained(changes)
        assert answer["error"] is None, answer["error"]
        found.append(first_loss(folder))
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-7)
    # All layers with the teacher's ids: nothing differs from the teacher yet.
    assert found[1]["hidden_mse"] == pytest.approx(0, abs=1e-6)


def test_features_from_the_cache_are_those_of_a_trimmed_students_tokens(runs: SmallRuns):
    changes = {
        "student": {"init": "teacher_layers", "layers": [0, 1], "dropout": 0.0, "trim_vocabulary": True},
        "train.loss.features": [{"kind": "hidden_mse"}], "train.loss.features_from": "cache", "train.log_every": 1,
    }  # fmt: skip
    folder = runs.start("teach")
    answer = runs.run(folder, "teach", "train", changes=changes)
    assert answer["error"] is None, answer["error"]
    point = json.loads((folder / "train/metrics.jsonl").read_text().splitlines()[0])
    # The cache is in half precision.
    assert point["hidden_mse"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.max_positions": 40}, "student.max_positions 40 is below data.max_length 48"),
        ({"student.vocabulary_min_count": 2}, "vocabulary_min_count means nothing without trim_vocabulary: true"),
        (
            {
                "student": {"trim_vocabulary": True, "vocabulary_min_count": 2},
                "train.loss.features": [{"kind": "hidden_mse"}],
                "train.loss.features_from": "cache",
            },
            "student.vocabulary_min_count 2 cuts rows of train into other tokens than those whose features are in",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(runs: SmallRuns, changes: dict[str, Any], message: str):
    folder, answer = runs.trained({"student": {"init": "teacher_layers"}} | changes)
    assert message in answer["error"]
    assert not (folder / "train").exists()


def test_too_many_positions_are_refused_before_anything_is_written(runs: SmallRuns):
    folder, answer = runs.trained({"student": {"init": "teacher_layers", "max_positions": 4096}})
    assert answer["error"] == "student.max_positions: found 4096, the model has 128. Set at most that"
    assert not (folder / "train").exists()
