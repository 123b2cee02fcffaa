"""Counts right answers: accuracy, and precision, recall and F1 of the answer Yes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """``count`` answers were scored. Precision, recall and F1 are 0 for tasks without Yes and No."""

    count: int
    accuracy: float
    precision: float
    recall: float
    f1: float


def is_right(prediction: str, label: str, task: str) -> bool:
    """Returns whether an answer is right by the authors' rules, regardless of case and surrounding white space:
    equal to the label; or beginning with it; or, where the model may reason first, ending with it in the last
    paragraph."""
    said, wanted = prediction.strip().lower(), label.strip().lower()
    if task == "error_detection":
        return said.split("\n\n")[-1].endswith(wanted)
    if task in ("schema_matching", "error_detection_spelling"):
        return said.startswith(wanted)
    return said == wanted


def score(predictions: Sequence[str], labels: Sequence[str], task: str) -> Scores:
    """Returns the scores of predictions against labels. An answer to a No that is not No counts as a false Yes, as with
    the authors.

    F1 is 2pr / (p + r). The authors' code divides by max(1, p + r), which is lower wherever p + r < 1; their tables
    are not affected above that.
    """
    right = [is_right(prediction, label, task) for prediction, label in zip(predictions, labels, strict=True)]
    truth = [label.strip().lower() for label in labels]
    hits = sum(ok for ok, label in zip(right, truth, strict=True) if label == "yes")
    misses = truth.count("yes") - hits
    false = sum(not ok for ok, label in zip(right, truth, strict=True) if label == "no")
    precision = hits / max(1, hits + false)
    recall = hits / max(1, hits + misses)
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return Scores(len(right), sum(right) / max(1, len(right)), precision, recall, f1)
