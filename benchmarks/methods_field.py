"""The students, the methods and the caches that benchmarks/methods.py measures; plain settings of the config."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

# The runs that make the caches. All have the same validation and test rows.
BASES: dict[str, Settings] = {
    "plain": {},
}

FROM_TEACHER = {"epochs": 10, "learning_rate": 5.0e-4}
STUDENTS: dict[str, Settings] = {
    "new 2x128": {
        "student": {"init": "config", "hidden_size": 128, "num_layers": 2},
        "train": {"epochs": 20, "learning_rate": 1.0e-3},
    },
    "one layer, trimmed": {"student": {"layers": [0], "trim_vocabulary": True}, "train": FROM_TEACHER},
    "two layers, trimmed": {"student": {"layers": [0, 5], "trim_vocabulary": True}, "train": FROM_TEACHER},
}

METHODS: dict[str, Settings] = {
    "labels alone": {"loss": {"alpha": 0.0}},
    "forward KL": {},
    "forward KL, T = 2": {"loss": {"temperature": 2.0}},
    "forward KL, T = 8": {"loss": {"temperature": 8.0}},
    "forward KL, alpha = 1": {"loss": {"alpha": 1.0}},
    "reverse KL": {"loss": {"kind": "reverse_kl"}},
    "JSD": {"loss": {"kind": "jsd"}},
    "skew forward KL": {"loss": {"kind": "skew_forward_kl"}},
    "skew reverse KL": {"loss": {"kind": "skew_reverse_kl"}},
    "total variation": {"loss": {"kind": "total_variation"}},
    "MSE on logits": {"train": {}, "loss": {"kind": "logit_mse"}},
    "DKD": {"loss": {"kind": "dkd"}},
    "DIST": {"loss": {"kind": "dist"}},
    "forward KL, standardised": {"loss": {"standardise": True, "temperature": 2.0}},
    "forward KL, teacher's classes": {"loss": {"hard_targets": "teacher"}},
    "hidden states": {"loss": {"features": [{"kind": "hidden_mse"}]}},
    "hidden states, cosine": {"loss": {"features": [{"kind": "hidden_cosine"}]}},
    "attention": {"student": {"dropout": 0.0}, "loss": {"features": [{"kind": "attention_kl"}]}},
    "MiniLMv2 relations": {
        "loss": {"features": [{"kind": f"{what}_relation"} for what in ("query", "key", "value")]},
    },
    "RKD": {"loss": {"features": [{"kind": "rkd_distance", "weight": 25.0}, {"kind": "rkd_angle", "weight": 50.0}]}},
}
