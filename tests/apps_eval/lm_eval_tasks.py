"""Local tasks of lm-evaluation-harness, one of every request type, written by the tests: no network."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = [
    "red",
    "dark",
    "pale",
    "brown",
    "ale",
    "stout",
    "lager",
    "porter",
    "quick",
    "lazy",
    "fox",
    "jumps",
    "over",
    "product",
    "name",
    "same",
    "yes",
    "no",
]

TASKS = {
    "local_choice": (
        "multiple_choice",
        {"doc_to_choice": "{{choices}}", "doc_to_target": "label", "num_fewshot": 3, "fewshot_split": "test"},
        ("acc", "acc_norm"),
    ),
    "local_letter": (
        "multiple_choice",
        {"doc_to_choice": "{{letters}}", "doc_to_target": "label", "target_delimiter": ""},
        ("acc",),
    ),
    "local_empty": (
        "loglikelihood",
        {"doc_to_text": "", "doc_to_target": "{{answer}}", "target_delimiter": ""},
        ("perplexity", "acc"),
    ),
    "local_generate": (
        "generate_until",
        {
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n", "d"], "max_gen_toks": 16, "do_sample": False},
        },
        ("exact_match",),
    ),
    "local_rolling": (
        "loglikelihood_rolling",
        {"doc_to_text": "", "doc_to_target": "page"},
        ("word_perplexity", "bits_per_byte"),
    ),
}


def write_tasks(folder: Path, count: int, longest_page: int = 330) -> list[str]:
    """Data and YAML of all tasks, ``count`` documents each; the last page has ``longest_page`` words. Returns the
    task names."""
    draw = random.Random(0)

    def words(number: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(number))

    rows = [
        {
            "question": words(6 + i % 9),
            "choices": [words(1 + j % 3) for j in range(4)],
            "letters": [" A", " B", " C", " D"],
            "label": (3 * i) % 4,
            "answer": words(1 + i % 3),
            "page": words(20 + (longest_page - 20) * i // max(1, count - 1)),
        }
        for i in range(count)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (output_type, extra, metrics) in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
            "test_split": "test",
            "output_type": output_type,
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "metric_list": [{"metric": metric} for metric in metrics],
            **extra,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return list(TASKS)
