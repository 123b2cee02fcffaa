"""The demo models' corpus, tokenizer and files: everything of `train_demo.py` that is not training."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from benchmark.demo_template import CHAT_TEMPLATE

VOCAB_SIZE = 4096
CONTEXT = 2048
END = "<|endoftext|>"
HELD_OUT_ONE_IN = 33
WORDS = r"^[ \t]+|[\r\n]+| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|[^\S\r\n]+(?!\S)|\s+"
"""What a token may span: indentation is apart from the newline before it, so that a prompt may end with a newline,
as HumanEval's do, and the model goes on with indentation. It costs 6 % more tokens than GPT-2's pattern, which fuses
the two."""
PROMPTS = (
    "def read_lines(path):\n    with open(path) as f:\n",
    "for name in os.listdir(path):\n",
    'def is_valid(name):\n    """Return True if the name is valid."""\n',
    "    def test_append(self):\n        a = array.array(self.typecode, self.example)\n",
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model with tied embeddings."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class Corpus:
    """Token streams [tokens] int64: each file followed by the end-of-text token. ``held_out_bytes`` counts the text
    alone."""

    tokenizer: Tokenizer
    train: Tensor
    held_out: Tensor
    train_files: int
    held_out_files: int
    train_bytes: int
    held_out_bytes: int
    python: str

    @property
    def tokens_per_byte(self) -> float:
        return self.held_out.numel() / self.held_out_bytes

    def describe(self) -> str:
        return (
            f"{self.train_files:,} files of {self.python}, {self.train_bytes / 1e6:.1f} MB, "
            f"{self.train.numel() / 1e6:.2f} M tokens; "
            f"held out {self.held_out_files} files, {self.held_out_bytes / 1e6:.2f} MB, "
            f"{self.held_out.numel() / 1e3:.0f} k tokens"
        )


def held_out(path: str) -> bool:
    """Whether the file at this path (relative to the library) is kept out of training: about 3 %, the same on every
    machine."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def read_sources(folder: Path) -> dict[str, str]:
    """Every .py file below the folder that is UTF-8 and not from an installed package, by relative path, sorted."""
    sources = {}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if {"site-packages", "dist-packages", "__pycache__"} & set(name.split("/")):
            continue
        try:
            sources[name] = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
    if not sources:
        raise SystemExit(f"{folder}: no .py files; name a folder of Python sources with --corpus")
    return sources


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every string can be encoded, and nothing is added to a prompt."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_corpus(folder: Path | None, device: torch.device, held_out_tokens: int | None = None) -> Corpus:
    """Reads, splits and encodes the corpus. ``folder=None`` is the standard library of the running interpreter."""
    sources = read_sources(folder or Path(sysconfig.get_paths()["stdlib"]))
    parts = {keep: [text for name, text in sources.items() if held_out(name) == keep] for keep in (False, True)}
    tokenizer = train_tokenizer(parts[False])
    end = tokenizer.token_to_id(END)
    streams = {
        keep: torch.tensor([t for code in tokenizer.encode_batch(texts) for t in (*code.ids, end)], device=device)
        for keep, texts in parts.items()
    }
    sizes = {keep: sum(len(text.encode()) for text in texts) for keep, texts in parts.items()}
    version = "Python " + (folder.name.removeprefix("python") if folder else ".".join(map(str, sys.version_info[:3])))
    if held_out_tokens and held_out_tokens < streams[True].numel():
        sizes[True] = int(sizes[True] * held_out_tokens / streams[True].numel())
        streams[True] = streams[True][:held_out_tokens]
    return Corpus(
        tokenizer,
        streams[False],
        streams[True],
        len(parts[False]),
        len(parts[True]),
        sizes[False],
        sizes[True],
        version,
    )


def config_of(shape: Shape) -> dict:
    """The Hugging Face configuration of the shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": CONTEXT,
        "vocab_size": VOCAB_SIZE,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "float16",
    }


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_model(weights: dict[str, Tensor], shape: Shape, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a Hugging Face folder: fp16 weights, configuration and tokenizer, without optimizer state."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"model.{name}": weight.half().cpu().contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "model.safetensors").chmod(0o644)
    write_json(folder / "config.json", config_of(shape))
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            **special,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (folder / "tokenizer.json").write_text(
        json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
    )


@torch.no_grad()
def check_folder(folder: Path, model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """The stored weights, after checking that transformers computes from the folder what was trained (to fp16
    rounding)."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    difference = (reference(tokens.cpu()[None]).logits - model(tokens[None]).float().cpu()).abs().max().item()
    if not difference < 0.1:
        raise SystemExit(
            f"{folder}: logits of transformers differ from the trained model's by {difference:.3g}; the folder does "
            "not hold the trained model"
        )
    return load_file(folder / "model.safetensors", device=str(tokens.device))


def completions(folder: Path, max_tokens: int = 80) -> list[tuple[str, str]]:
    """Greedy completions by transformers from the stored folder: (prompt, continuation)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
        pairs.append((prompt, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    return pairs


def write_card(
    folder: Path, shape: Shape, corpus: Corpus, nats: float, facts: dict[str, str], pairs: list[tuple[str, str]]
) -> None:
    """The model card: what it is, how good, how to make it again, what it writes."""
    per_byte = nats * corpus.tokens_per_byte
    role = "The draft of FlexBatch's demo model, for speculation" if "draft" in shape.name else "FlexBatch's demo model"
    shown = (
        f"hidden {shape.hidden}, {shape.layers} layers, {shape.heads} query heads and {shape.kv_heads} "
        f"key/value heads of {shape.head_dim}"
    )
    samples = "\n".join(
        f"Prompt:\n\n```python\n{prompt}\n```\n\nContinuation:\n\n```python\n{text}\n```\n" for prompt, text in pairs
    )
    card = f"""# {shape.name}

{role}: a {facts["parameters"]}-parameter Llama trained on nothing but the source of the Python standard library. It \
writes plausible Python, not
correct programs, and exists so that every command of FlexBatch runs without a download.

| | |
| --- | --- |
| shape | {shown}, MLP {shape.intermediate}, tied embeddings |
| context | {CONTEXT} tokens |
| tokenizer | byte-level BPE, {VOCAB_SIZE} entries, {1 / corpus.tokens_per_byte:.2f} bytes per token; `{END}` (id 0) \
ends a file; nothing is added to a prompt |
| chat | `chat_template.jinja` writes a conversation as Python, with comments; the model was not trained to answer |
| stored as | fp16 safetensors |
| corpus | {corpus.describe()} |
| held-out loss | **{per_byte:.4f} nats/byte = {per_byte / math.log(2):.4f} bits/byte** ({nats:.4f} nats/token), \
weights as stored |
| draft against target, held-out text | {facts["draft"]} |
| training | {facts["training"]} |
| machine | {facts["machine"]} |

The loss is the mean nats per token over consecutive windows of the held-out files, times tokens per byte; \
end-of-text tokens count as tokens, not
as bytes. Files are held out by a hash of their path (`benchmark/demo_files.py`), about one in {HELD_OUT_ONE_IN}; the \
checkpoint that is best on them is kept,
so the figure is slightly optimistic.

## Make it again

```
{facts["command"]}
```

It reads the standard library of the interpreter that runs it (another version of Python gives slightly different \
numbers) and is bounded by time, so a
faster machine takes more steps. Target and draft are trained by the same command.

## What it writes (greedy)

{samples}
## License

The corpus is under the PSF License Version 2. The weights are distributed with FlexBatch under the Apache License 2.0.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
