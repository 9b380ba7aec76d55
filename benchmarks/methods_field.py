"""The students, the methods and the caches that benchmarks/methods.py measures; plain settings of the config."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

# The runs that make the caches. All have the same validation and test rows. Those `of` others take the teachers that
# were fine-tuned there.
BASES: dict[str, Settings] = {
    "plain": {},
    "second": {"fine_tune": {"seed": 1, "group_by_length": True}},
    "cross-fitted": {"fine_tune": {"group_by_length": True}, "teacher": {"cross_fit": 2}, "one_teacher": False},
    "ensemble": {"of": ("plain", "second")},
    "augmented": {"of": ("plain",), "data": {"augment": {"copies": 3}}},
}

FROM_TEACHER = {"epochs": 10, "learning_rate": 5.0e-4}
TRIMMED = {"trim_vocabulary": True, "max_positions": 64}
STUDENTS: dict[str, Settings] = {
    "new 2x128": {
        "student": {"init": "config", "hidden_size": 128, "num_layers": 2},
        "train": {"epochs": 20, "learning_rate": 1.0e-3},
    },
    "one layer": {"student": {"layers": [0], **TRIMMED}, "train": FROM_TEACHER},
    "two narrow layers": {
        "student": {"layers": [0, 5], "feed_forward": 768, "embedding_size": 128, **TRIMMED},
        "train": FROM_TEACHER,
    },
    "two narrower layers": {
        "student": {"layers": [0, 5], "feed_forward": 320, "embedding_size": 128, **TRIMMED},
        "train": FROM_TEACHER,
    },
    "two narrowest layers": {
        "student": {"layers": [0, 5], "feed_forward": 192, "embedding_size": 128, **TRIMMED},
        "train": FROM_TEACHER,
    },
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
    "cross-fitted teacher": {"base": "cross-fitted"},
    "two teachers": {"base": "ensemble"},
    "augmented, 3 copies": {"base": "augmented", "train": {"epochs": 3}},
    "augmented, 3 copies, 10 epochs": {"base": "augmented", "train": {"epochs": 10}},
    "augmented, 3 copies, 20 epochs": {"base": "augmented", "train": {"epochs": 20}},
    "calibrated teacher": {"teacher": {"calibrate": True}},
    "RKD": {"loss": {"features": [{"kind": "rkd_distance", "weight": 25.0}, {"kind": "rkd_angle", "weight": 50.0}]}},
}
