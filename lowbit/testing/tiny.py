"""Arguments of transformers configurations of models as small as packed layers in groups of 32 allow."""

import torch

IDS = torch.arange(3, 12)[None]
LLAMA = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=101,
)  # fmt: skip
TOWER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
BERT = dict(TOWER, vocab_size=101)
GPT2 = dict(n_embd=64, n_layer=1, n_head=4, vocab_size=101, n_positions=64)
T5 = dict(d_model=64, d_kv=16, d_ff=96, num_layers=1, vocab_size=101)
