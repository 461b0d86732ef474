"""Libraries that hold, wrap, move, train or save a model, each with a tiny packed one."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.nn.layer import layers

from . import architectures, checks
from .architectures import PACKED, VOCAB, generated
from .checks import Found, assert_close, assert_equal, dequantized, run

INPUTS = {"input_ids": architectures.tokens()}
LABELLED = {**INPUTS, "labels": architectures.tokens()}


@dataclass(frozen=True)
class Library:
    """What runs with the packages that it needs beside transformers."""

    examine: Callable[[Found], None]
    needs: tuple[str, ...] = ()


ROWS: dict[str, Library] = {}


def row(name: str, *needs: str) -> Callable[[Callable[[Found], None]], Callable[[Found], None]]:
    def add(examine: Callable[[Found], None]) -> Callable[[Found], None]:
        ROWS[name] = Library(examine, needs)
        return examine

    return add


def examine(library: Library) -> Found:
    """Every column that has a meaning for the library."""
    found = Found(dict.fromkeys(checks.COLUMNS, checks.NOTHING))
    with checks.quiet():
        library.examine(found)
    return found


def llama(packed: bool = True, tied: bool = True) -> Any:
    model = architectures.build(architectures.ROWS["Llama, tied head" if tied else "Llama"])
    return lowbit.convert(model, PACKED) if packed else model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """After one backward pass, of all that is trained."""
    model.zero_grad()
    checks.loss_of(model, LABELLED).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in found.values()), "no gradient"
    return found  # type: ignore[return-value]


def step(model: nn.Module, inputs: Any = LABELLED) -> None:
    """One step of Adam; the loss is finite and goes on."""
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained, "nothing is trained"
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    before = checks.loss_of(model, inputs)
    before.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained), "no gradient"
    optimizer.step()
    after = checks.loss_of(model, inputs)
    assert bool(after.isfinite()) and float(after) != float(before), f"the loss stayed at {float(after)}"


# ---------------------------------------------------------------------------------------------------- accelerate


def _offload(found: Found, offload: Callable[[Any], Any]) -> None:
    model = llama()
    expected, text = run(model, INPUTS), generated(model, INPUTS)
    moved = offload(llama())

    def convert() -> None:
        late = lowbit.convert(offload(llama(packed=False)), PACKED)
        assert layers(late).keys() == layers(model).keys()
        assert_equal(run(late, INPUTS), expected)

    def forward() -> None:
        for _ in range(2):
            assert_equal(run(moved, INPUTS), expected)

    def reload() -> None:
        with tempfile.TemporaryDirectory() as folder:
            moved.save_pretrained(folder)
            assert_equal(run(type(model).from_pretrained(folder), INPUTS), expected)

    found.check("convert", convert)
    found.check("forward", forward)
    found.check("reload", reload)
    found.check("task", lambda: _same(generated(moved, INPUTS), text))


def _same(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found, expected), "other tokens"


@row("accelerate `cpu_offload`", "accelerate")
def _cpu_offload(found: Found) -> None:
    import accelerate

    _offload(found, lambda model: accelerate.cpu_offload(model, execution_device="cpu"))


@row("accelerate `cpu_offload`, buffers too", "accelerate")
def _cpu_offload_buffers(found: Found) -> None:
    import accelerate

    _offload(found, lambda model: accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True))


DEVICES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
           "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip


@row("accelerate `dispatch_model`, CPU and disk", "accelerate")
def _dispatch(found: Found) -> None:
    import accelerate

    with tempfile.TemporaryDirectory() as folder:
        _offload(found, lambda model: accelerate.dispatch_model(
            model, DEVICES, main_device="cpu", offload_dir=tempfile.mkdtemp(dir=folder), offload_buffers=True,
            force_hooks=True))  # fmt: skip


@row("`from_pretrained(device_map=)`, CPU and disk", "accelerate")
def _device_map(found: Found) -> None:
    model = llama()
    with tempfile.TemporaryDirectory() as saved, tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(saved)

        def reload() -> None:
            for device_map in ("auto", DEVICES):
                other = type(model).from_pretrained(saved, device_map=device_map, offload_folder=folder)
                assert_equal(run(other, INPUTS), run(model, INPUTS))
                _same(generated(other, INPUTS), generated(model, INPUTS))

        found.check("reload", reload)


# ---------------------------------------------------------------------------------------------------- training


@row("`AveragedModel` (EMA)")
def _average(found: Found) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = llama()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def forward() -> None:
        for _ in range(2):
            averaged.update_parameters(model)
        assert_equal(run(averaged, INPUTS), run(model, INPUTS))

    def reload() -> None:
        other = AveragedModel(llama())
        other.load_state_dict(averaged.state_dict())
        assert_equal(run(other, INPUTS), run(averaged, INPUTS))

    def training() -> None:
        trained = llama()
        lowbit.make_trainable(trained, "scales")
        ema = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        ema.update_parameters(trained)
        before = {name: p.detach().clone() for name, p in trained.named_parameters()}
        step(trained)
        ema.update_parameters(trained)
        for name, parameter in trained.named_parameters():
            expected = (before[name] + parameter.detach()) / 2
            torch.testing.assert_close(ema.module.get_parameter(name).detach(), expected)

    found.check("forward", forward)
    found.check("reload", reload)
    found.check("training", training)


@row("gradient checkpointing")
def _checkpointing(found: Found) -> None:
    def training() -> None:
        model = llama().train()
        lowbit.make_trainable(model, "scales")
        expected = gradients(model)
        for reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
            for name, grad in gradients(model).items():
                torch.testing.assert_close(grad, expected[name])
        step(model)

    found.check("training", training)


def _peft(found: Found, config: Any, covers: str) -> None:
    import peft

    def made() -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(llama(), copy.deepcopy(config))

    def spread(model: Any) -> Any:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    model = spread(made())
    names = {name for name, p in model.named_parameters() if p.requires_grad}

    def convert() -> None:
        torch.manual_seed(0)
        late = spread(lowbit.convert(peft.get_peft_model(llama(packed=False), copy.deepcopy(config)), PACKED))
        assert {name for name, p in late.named_parameters() if p.requires_grad} == names
        assert any(covers in name for name in late.lowbit_skipped), "the adapter is not listed"
        assert_close(run(late, INPUTS).logits, run(model, INPUTS).logits)

    def reload() -> None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            other = peft.PeftModel.from_pretrained(llama(), folder).eval()
            assert_equal(run(other, INPUTS).logits, run(model, INPUTS).logits)

    def training() -> None:
        trained = made()
        frozen = {name: t.clone() for name, t in trained.state_dict().items() if name.endswith((".packed", ".scales"))}
        step(trained)
        assert frozen and all(torch.equal(trained.state_dict()[name], t) for name, t in frozen.items())

    found.check("convert", convert)
    found.check("forward", lambda: assert_close(run(model, INPUTS).logits, run(dequantized(model), INPUTS).logits))
    found.check("reload", reload)
    found.check("task", lambda: _same(generated(model, INPUTS), generated(dequantized(model), INPUTS)))
    found.check("training", training)


@row("PEFT LoRA", "peft")
def _lora(found: Found) -> None:
    import peft

    _peft(found, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]), "lora_A")


@row("PEFT prompt tuning", "peft")
def _prompt_tuning(found: Found) -> None:
    import peft

    _peft(found, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prompt_encoder")


# ------------------------------------------------------------------------------------------- tokenizers and saving


def tokenizer() -> Any:
    """Words of the tiny vocabularies: ``w5``, ``w6``, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"]
    words = {word: i for i, word in enumerate(special + [f"w{i}" for i in range(len(special), VOCAB)])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]",
        mask_token="[MASK]", model_max_length=32,
    )  # fmt: skip


TEXTS = ["w5 w17 w40", "w80 w6", "w33 w34 w35 w36"]


@row("transformers `pipeline`")
def _pipeline(found: Found) -> None:
    from transformers import pipeline

    def said(model: Any, task: str) -> Any:
        options = {"max_new_tokens": 4, "do_sample": False} if task == "text-generation" else {}
        return pipeline(task, model=model, tokenizer=tokenizer(), device="cpu")(TEXTS, **options)

    def task() -> None:
        model = llama()
        assert said(model, "text-generation") == said(dequantized(model), "text-generation"), "another text"
        row = architectures.ROWS["BERT"]
        model = lowbit.convert(architectures.build(row), PACKED)
        for ours, theirs in zip(*(said(m, "text-classification") for m in (model, dequantized(model))), strict=True):
            assert ours["label"] == theirs["label"] and abs(ours["score"] - theirs["score"]) < 1e-5

    found.check("task", task)


@row("sentence-transformers", "sentence_transformers")
def _sentence_transformers(found: Found) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        float_model = architectures.build(architectures.ROWS["BERT, masked words"]).bert
        float_model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        modules = [Transformer(folder), Pooling(32), Dense(32, 16)]
        model = SentenceTransformer(modules=modules, device="cpu")
        found.check("convert", lambda: _none(lowbit.convert(model, PACKED, skip=["2.*"])))
    expected = model.encode(TEXTS, convert_to_tensor=True)

    def reload() -> None:
        assert next(model.parameters()).dtype == torch.float32
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            other = SentenceTransformer(folder, device="cpu")
            assert layers(other).keys() == layers(model).keys()
            assert torch.equal(other.encode(TEXTS, convert_to_tensor=True), expected)

    def training() -> None:
        trained = copy.deepcopy(model)
        lowbit.make_trainable(trained, "scales")
        features = trained.tokenize(TEXTS)

        class Loss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = trained[0]

            def forward(self) -> Tensor:
                return trained(dict(features))["sentence_embedding"]  # type: ignore[no-any-return]

        lowbit.make_trainable(trained, "scales")
        for name, parameter in trained.named_parameters():
            parameter.requires_grad_("pooler" not in name)
        step(Loss(), {})

    found.check("forward", lambda: assert_close(expected, dequantized(model).encode(TEXTS, convert_to_tensor=True)))
    found.check("reload", reload)
    found.check("task", lambda: assert_close(
        model.similarity(expected, expected), dequantized(model).similarity(expected, expected)))  # fmt: skip
    found.check("training", training)


def _none(_: object) -> None: ...


@row("diffusers", "diffusers")
def _diffusers(found: Found) -> None:
    from diffusers import DiTTransformer2DModel

    def build() -> Any:
        torch.manual_seed(0)
        return checks.spread(DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=8, patch_size=2,
            num_embeds_ada_norm=8, norm_num_groups=2,
        )).eval()  # fmt: skip

    model = build()
    inputs = {"hidden_states": architectures.noise(1, 4, 8, 8), "timestep": torch.tensor([3]),
              "class_labels": torch.tensor([1])}  # fmt: skip

    def reload() -> None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            assert_equal(run(type(model).from_pretrained(folder), inputs), run(model, inputs))

    found.check("convert", lambda: checks.converted(model, PACKED, ()))
    found.check("forward", lambda: checks.forward(model, inputs))
    found.check("reload", reload)
    found.check("training", lambda: checks.training(model, inputs))


# ------------------------------------------------------------------------------------------------- compilation


@row("torch.compile")
def _compile(found: Found) -> None:
    model = llama()

    def forward() -> None:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(run(compiled, INPUTS).logits, run(dequantized(model), INPUTS).logits)

    def training() -> None:
        lowbit.make_trainable(model, "scales")
        expected = gradients(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for name, grad in gradients(compiled).items():
            torch.testing.assert_close(grad, expected[name.removeprefix("_orig_mod.")])

    found.check("forward", forward)
    found.check("training", training)


@row("torch.export")
def _export(found: Found) -> None:
    model = llama()
    model.config.use_cache = False

    def program() -> Any:
        batch = torch.export.Dim("batch", min=2, max=8)
        return torch.export.export(model, (), dict(INPUTS), dynamic_shapes={"input_ids": {0: batch}}, strict=False)

    made: list[Any] = []

    def forward() -> None:
        made.append(program())
        assert_close(made[0].module()(**INPUTS).logits, run(dequantized(model), INPUTS).logits)
        more = architectures.tokens(batch=3)
        assert_close(made[0].module()(input_ids=more).logits, run(dequantized(model), {"input_ids": more}).logits)

    def reload() -> None:
        with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
            torch.export.save(made[0], file.name)
            other = torch.export.load(file.name).module()
        assert_equal(other(**INPUTS).logits, made[0].module()(**INPUTS).logits)

    found.check("forward", forward)
    found.check("reload", reload)
