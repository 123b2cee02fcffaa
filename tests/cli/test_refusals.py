"""Settings that only measure an engine are refused by the commands whose text counts, before anything is read or
loaded."""

from __future__ import annotations

import pytest

from flexbatch.apps import batch, completion
from flexbatch.apps.ray import GenerateText
from flexbatch.apps.wrangle import __main__ as wrangle
from flexbatch.validation.errors import ConfigurationError

MEASUREMENTS = [("--simulate-acceptance", "0.5"), ("--compare-plain",), ("--dummy-weights",)]
COMMANDS = [
    (batch.main, ["/nowhere.parquet", "/nowhere/out"]),
    (completion.main, ["text"]),
    (wrangle.main, ["/nowhere"]),
]


@pytest.mark.parametrize("words", MEASUREMENTS, ids=lambda words: words[0])
def test_measurements_are_refused_where_text_counts(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for main, arguments in COMMANDS:
        assert main([*arguments, *words]) == 2
        said = capsys.readouterr()
        assert words[0] in said.err and "flexbatch run" in said.err and "nowhere" not in said.err and not said.out
    name, value = words[0][2:].replace("-", "_"), 0.5 if len(words) > 1 else True
    with pytest.raises(ConfigurationError, match=words[0]):
        GenerateText(prompt_column="text", open_engine=lambda config, seen: pytest.fail("loaded"), **{name: value})
