"""A classifier over texts, in batches of rows that are about as long.

It scores caches and test sets, says whether an exported file answers as the student does, and answers requests: so the
same text gets the same logits everywhere, but for rounding.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from raydistill.data.tokens import Tokens, load_tokenizer, pack_by_length, pad, tokenise
from raydistill.models.configuration import label_order
from raydistill.models.source import ModelSource

TOKENS_PER_BATCH = {"cpu": 512, "cuda": 16_384}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Called after the forward over these rows, with their attention mask.
Look = Callable[[npt.NDArray[np.int64], torch.Tensor], None]


class Forward:
    """A classifier in eval mode on its device: the GPU where there is one, unless another is named.

    Its logits are in the order of `labels`. Raises UserError for a model without exactly these, or that does not load.
    """

    def __init__(
        self,
        source: ModelSource,
        labels: Sequence[str],
        *,
        max_length: int,
        dtype: str = "float32",
        tokens_per_batch: int | None = None,
        device: str | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = source.folder()
        self._order = label_order(source.setting, folder, list(labels))
        self.tokenizer = load_tokenizer(folder, source.setting)
        self.model = source.load(DTYPES[dtype]).to(self.device)
        self.model.requires_grad_(False)
        self._max_length = max_length
        self._budget = tokens_per_batch or TOKENS_PER_BATCH[self.device.type]

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """The texts as the model reads them, cut at max_length."""
        return tokenise(self.tokenizer, texts, self._max_length)

    def logits(self, tokens: Tokens, look: Look | None = None) -> npt.NDArray[np.float32]:
        """float32 (N, K) in the order of the rows; `look` is called after each batch's forward."""
        result = np.empty((len(tokens), len(self._order)), np.float32)
        with torch.inference_mode():
            for batch in pack_by_length(tokens.lengths_N, self._budget):
                inputs = pad([tokens.row(int(i)) for i in batch], self.tokenizer.pad_token_id)
                inputs = {name: value.to(self.device) for name, value in inputs.items()}
                output = self.model(**inputs).logits
                if look:
                    look(batch, inputs["attention_mask"])
                result[batch] = output.float().cpu().numpy()[:, self._order]
        return result
