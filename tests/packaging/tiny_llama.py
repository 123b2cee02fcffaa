"""Builds a model of transformers in the process that runs this; prints the size of its vocabulary."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(config)
print(model(torch.arange(5)[None]).logits.shape[-1])
