"""The report's text and HTML."""

import html
import json
import re
from html.parser import HTMLParser

import torch
from torch import nn

import lowbit
from lowbit import Codebook, Kronecker, Packed


class Model(nn.Module):
    def __init__(self, layers=3, name="<b>"):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight
        for i in range(layers):
            self.add_module(f"{name}{i}", nn.Linear(32, 32))


SPECS = {"*": Packed(bits=4, group_size=16, zeros="int"), "<b>0": Codebook(bits=3), "<b>1": Kronecker(rank=1)}


def test_the_text_ends_with_a_summary_by_family():
    report = lowbit.report(lowbit.convert(Model(), SPECS))
    families = report.by_family()
    assert {name: f["layers"] for name, f in families.items()} == {"packed": 3, "codebook": 1, "kron": 1}
    assert sum(f["bytes_before"] for f in families.values()) == (50 * 32 + 3 * 32 * 32) * 4
    # 4 bits, and per 16 columns a float16 scale and an 8-bit zero; tied layers count once
    assert families["packed"]["bytes_after"] == (50 + 32) * (16 + 2 * 3)
    assert families["packed"]["bits_per_weight"] == 4 + 24 / 16
    lines = str(report).splitlines()
    assert lines[-4:-1] == [
        "packed: 3 layers, 10.5 KB -> 1.8 KB, 5.50 bits per weight",
        f"codebook: 1 layer, 4.1 KB -> {families['codebook']['bytes_after']} B, "
        f"{families['codebook']['bits_per_weight']:.2f} bits per weight",
        f"kron: 1 layer, 4.1 KB -> {families['kron']['bytes_after'] / 1000:.1f} KB, "
        f"{families['kron']['bits_per_weight']:.2f} bits per weight",
    ]
    assert re.fullmatch(r"total: 19\.1 KB -> .* \(.*x smaller\), 5 layers packed", lines[-1])
    assert json.loads(json.dumps(report.to_dict()))["families"] == families


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.open, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1].append(data)


def test_notebooks_show_html():
    for layers in (3, 30):
        report = lowbit.report(lowbit.convert(Model(layers), SPECS, skip=["<b>2"]))
        text = report._repr_html_()
        parsed = Cells()
        parsed.feed(text)
        assert not parsed.open  # every tag is closed
        assert [row[0] for row in parsed.rows] == ["layer", *(row.name for row in report.rows)]
        assert len({len(row) for row in parsed.rows}) == 1
        assert "<b>0" not in text and html.escape("<b>0") in text
        assert html.escape(str(report).splitlines()[-1]) in text
        assert html.escape("float: <b>2: skipped by the caller") in text
        is_open = "open" in next(attrs for tag, attrs in parsed.tags if tag == "details")
        assert is_open is (layers == 3)  # a long table is shown when it is asked for


def test_parts_that_were_converted_one_by_one():
    first, second = nn.Sequential(nn.Linear(32, 32), nn.LazyLinear(4)), nn.Sequential(nn.Linear(32, 8))
    model = nn.ModuleDict({"a": first, "b": second})
    for part in model.values():
        lowbit.convert(part, Packed(bits=8))
    report = lowbit.report(model)
    assert [row.name for row in report.rows] == ["a.0", "b.0"]
    assert report.skipped == {"a.1": "its weight is not initialised yet: call the model once"}
    assert not hasattr(lowbit.dequantize(model)["a"], "lowbit_skipped")
