"""The plain PyTorch loop that raydistill is measured against: one process, one CPU, no cache and nothing to resume.

    python benchmarks/plain_loop.py teacher --train train.csv --test test.csv --model ENCODER --out TEACHER
    python benchmarks/plain_loop.py student --train train.csv --test test.csv --model TEACHER --out STUDENT [--hard]

`teacher` fine-tunes an encoder and writes its logits of the training rows; `student` learns a small BERT from them,
or with --hard from the labels alone. Each prints one JSON line. Shapes: N rows of a batch, K classes.
"""

import argparse
import copy
import csv
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    get_cosine_schedule_with_warmup,
)

MAX_LENGTH = 64
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (student logits NK, row numbers N) -> mean over N


def read_rows(path: str | Path) -> tuple[list[str], list[str]]:
    """The texts and the label names of a CSV file with the columns text and category."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    return [text for text, _ in rows], [name for _, name in rows]


def label_ids(names: list[str], classes: list[str]) -> torch.Tensor:
    """Each name's place in `classes`; KeyError for a name that is not there."""
    place = {name: i for i, name in enumerate(classes)}
    return torch.tensor([place[name] for name in names])


def batches(tokenizer, texts: list[str], order: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, Any]]:
    """Row numbers and model inputs in the given order, each batch padded to its own longest row."""
    for rows in order.split(size):
        chosen = [texts[i] for i in rows.tolist()]
        yield rows, tokenizer(chosen, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")


@torch.inference_mode()
def predict(model, tokenizer, texts: list[str], *, batch_size=32, arrival_order=True, dtype=torch.float32):
    """Logits of every text, float32, in the order of `texts`.

    Batches are rows as they arrive, or rows of like length if `arrival_order` is false. With torch.bfloat16 a
    converted copy of the model is run, which is faster than autocast: nothing is cast again for each batch.
    """
    model = (model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)).eval()
    lengths = torch.tensor([len(text) for text in texts])
    order = torch.arange(len(texts)) if arrival_order else lengths.argsort()
    logits_NK = torch.empty(len(texts), model.config.num_labels)
    for rows, inputs in batches(tokenizer, texts, order, batch_size):
        logits_NK[rows] = model(**inputs).logits.float()
    return logits_NK


def label_loss(labels: torch.Tensor) -> Loss:
    """Cross-entropy with the labels."""
    return lambda logits_NK, rows: F.cross_entropy(logits_NK, labels[rows])


def distillation_loss(labels: torch.Tensor, teacher_logits: torch.Tensor, temperature: float, alpha: float) -> Loss:
    """alpha T^2 KL(teacher || student) at temperature T plus (1 - alpha) cross-entropy with the labels."""
    teacher_logprobs = (teacher_logits.float() / temperature).log_softmax(-1)

    def loss(logits_NK: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        student_logprobs_NK = (logits_NK / temperature).log_softmax(-1)
        kl = F.kl_div(student_logprobs_NK, teacher_logprobs[rows], log_target=True, reduction="batchmean")
        return alpha * temperature**2 * kl + (1 - alpha) * F.cross_entropy(logits_NK, labels[rows])

    return loss


def fit(
    model, tokenizer, texts: list[str], loss_of: Loss, *, epochs: int, lr: float, batch_size: int, seed: int = 0
) -> list[float]:
    """Train in place; the seconds of every step, from tokenizing its rows to the end of the optimizer's update."""
    undecayed = {name for name, _ in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name}
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in undecayed], "weight_decay": 0.01},
        {"params": [p for name, p in model.named_parameters() if name in undecayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = epochs * -(-len(texts) // batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    shuffle = torch.Generator().manual_seed(seed)
    step_seconds = []
    model.train()
    for _ in range(epochs):
        start = time.perf_counter()
        for rows, inputs in batches(tokenizer, texts, torch.randperm(len(texts), generator=shuffle), batch_size):
            with torch.autocast("cpu", torch.bfloat16):
                logits_NK = model(**inputs).logits
            loss = loss_of(logits_NK.float(), rows)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            now = time.perf_counter()
            step_seconds.append(now - start)
            start = now
    return step_seconds


def trained(model, tokenizer, texts, loss_of, out, **settings) -> dict[str, Any]:
    """Fit, save to `out` in Hugging Face format, and hand back the model, its tokenizer and the step times."""
    step_seconds = fit(model, tokenizer, texts, loss_of, **settings)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"model": model, "tokenizer": tokenizer, "step_seconds": step_seconds}


def train_teacher(model_dir, train_csv, out, *, epochs=4, lr=2e-4, batch_size=32, threads=2) -> dict[str, Any]:
    """Fine-tune the encoder in `model_dir` on the labels."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    texts, names = read_rows(train_csv)
    classes = sorted(set(names))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_dir, id2label=dict(enumerate(classes)), label2id={c: i for i, c in enumerate(classes)}, dtype="float32"
    )
    loss_of = label_loss(label_ids(names, classes))
    return trained(model, tokenizer, texts, loss_of, out, epochs=epochs, lr=lr, batch_size=batch_size)


def train_student(
    teacher_dir, train_csv, out, teacher_logits=None, *, epochs=20, lr=1e-3, batch_size=32, threads=2,
    hidden=128, layers=2, temperature=4.0, alpha=0.9, seed=0,
) -> dict[str, Any]:  # fmt: skip
    """Train a new BERT of `hidden` and `layers` on the teacher's logits [rows, K], or on the labels if there are none.

    Tokenizer and the order of the classes are the teacher's.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    texts, names = read_rows(train_csv)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    teacher = AutoConfig.from_pretrained(teacher_dir)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), intermediate_size=4 * hidden, max_position_embeddings=128,
        id2label=teacher.id2label, label2id=teacher.label2id,
    )  # fmt: skip
    labels = label_ids(names, [teacher.id2label[i] for i in range(teacher.num_labels)])
    loss_of = label_loss(labels)
    if teacher_logits is not None:
        loss_of = distillation_loss(labels, teacher_logits, temperature, alpha)
    model = BertForSequenceClassification(config)
    return trained(model, tokenizer, texts, loss_of, out, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["teacher", "student"])
    for name, text in [("model", "teacher: encoder to fine-tune; student: folder of the teacher"), ("out", "folder")]:
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    for name in ("train", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="CSV file with the columns text and category")
    for name, kind in [("epochs", int), ("lr", float), ("batch-size", int), ("threads", int)]:
        parser.add_argument(f"--{name}", type=kind)
    for name, kind in [("hidden", int), ("layers", int), ("temperature", float), ("alpha", float), ("seed", int)]:
        parser.add_argument(f"--{name}", type=kind, help="student only")
    parser.add_argument("--hard", action="store_true", help="student only: labels instead of the teacher's logits")
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    stage, hard, model_dir, out = (given.pop(key) for key in ("stage", "hard", "model", "out"))
    train, test = given.pop("train"), given.pop("test")
    if stage == "teacher":
        result = train_teacher(model_dir, train, out, **given)
        logits = predict(result["model"], result["tokenizer"], read_rows(train)[0], arrival_order=False)
        save_file({"logits": logits}, out / "train_logits.safetensors")
    else:
        logits = None if hard else load_file(model_dir / "train_logits.safetensors")["logits"]
        result = train_student(model_dir, train, out, logits, **given)
    model, seconds = result["model"], result["step_seconds"]
    texts, names = read_rows(test)
    places = predict(model, result["tokenizer"], texts, arrival_order=False).argmax(-1).tolist()
    accuracy = statistics.mean(model.config.id2label[i] == name for i, name in zip(places, names, strict=True))
    report = {"stage": stage, "hard": hard, "accuracy": round(accuracy, 4), "parameters": model.num_parameters()}
    times = {"train_seconds": round(sum(seconds), 2), "step_ms_p50": round(1000 * statistics.median(seconds), 2)}
    print(json.dumps(report | {"steps": len(seconds)} | times))


if __name__ == "__main__":
    main()
