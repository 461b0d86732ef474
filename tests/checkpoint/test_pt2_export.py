"""Packages of AOTInductor: a process that has lowbit's ops alone gives what the model gives."""

import shutil
import subprocess
import sys

import pytest
import torch

import lowbit
from lowbit.checkpoint.exporters.pt2 import program_of
from lowbit.testing.foreign_folders import mixture

transformers = pytest.importorskip("transformers", minversion="5.0")

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=60)
SPECS = {
    "*": lowbit.Packed(bits=3, group_size=16, outliers=0.02),
    "*.q_proj": lowbit.Packed(bits=4, group_size=16, activations="int8"),
    "*.k_proj": lowbit.Codebook(bits=3, outliers=0.02),
    "*.down_proj": lowbit.Kronecker(),
}
RUN = """
import sys, torch, lowbit
run = torch._inductor.aoti_load_package(sys.argv[1])
inputs = torch.load(sys.argv[2])
torch.save([run(*each) for each in inputs], sys.argv[2])
assert "transformers" not in sys.modules
"""


def llama(**config):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1, **config)).eval()


@pytest.mark.skipif(shutil.which("g++") is None, reason="a C++ compiler is needed")
@pytest.mark.turns(3)
def test_another_process_gives_the_same(tmp_path):
    model = lowbit.convert(llama(tie_word_embeddings=True), SPECS)
    lowbit.export(model, tmp_path / "model.pt2", format="pt2", skip=["*.v_proj"])
    assert isinstance(model.model.layers[0].self_attn.v_proj, lowbit.PackedLinear)  # the model is as it was
    mask = torch.ones(3, 11).long()
    mask[1, 7:] = 0
    inputs = [(torch.randint(1, 60, (3, 11)), mask), (torch.tensor([[7]]), torch.tensor([[1]]))]
    torch.save(inputs, tmp_path / "io.pt")
    subprocess.run([sys.executable, "-c", RUN, tmp_path / "model.pt2", tmp_path / "io.pt"], check=True)
    for (ids, mask), found in zip(inputs, torch.load(tmp_path / "io.pt"), strict=True):
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["experts", "positions"])
def test_graphs(kind):
    """What is compiled: experts, and an encoder whose table of positions bounds the length."""
    sizes = dict(SIZES, max_position_embeddings=32)
    model = mixture() if kind == "experts" else transformers.RobertaModel(transformers.RobertaConfig(**sizes)).eval()
    model = lowbit.convert(model, lowbit.Packed(bits=4, group_size=16))
    with torch.no_grad():
        program = program_of(model).module()
        for shape in [(1, 1), (3, 2), (2, 30)]:
            ids = torch.randint(2, 48, shape)
            mask = torch.ones_like(ids)
            output = model(input_ids=ids, attention_mask=mask)
            expected = output.logits if kind == "experts" else output.last_hidden_state
            torch.testing.assert_close(program(ids, mask), expected, rtol=1e-4, atol=1e-5)


class DependsOnData(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) if bool(x.sum() > 0) else x


def test_what_cannot_be_written(tmp_path):
    model = lowbit.convert(llama(), SPECS)
    layer = lowbit.make_trainable(model.model.layers[0].mlp.up_proj, "scales") and "up_proj"
    with pytest.raises(ValueError, match=f"{layer}.*must be frozen .*scales are trained"):
        lowbit.export(model, tmp_path / "model.pt2", format="pt2")
    lowbit.freeze(model)
    model.model.layers[0].mlp.act_fn = DependsOnData(64, 64)
    with pytest.raises(ValueError, match="LlamaForCausalLM must be a graph for torch.export"):
        lowbit.export(model, tmp_path / "model.pt2", format="pt2")
    none = torch._inductor.config.patch({"cpp.cxx": ("no such compiler",)})
    with none, pytest.raises(ValueError, match=r"a C\+\+ compiler must be installed"):
        lowbit.export(model, tmp_path / "model.pt2", format="pt2")
    assert list(tmp_path.iterdir()) == []
