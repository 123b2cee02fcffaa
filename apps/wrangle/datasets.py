"""The twelve data sets of the paper: where they lie, and how their rows become text (facts of the authors'
``fm_data_tasks``)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flexbatch.apps.wrangle.tables import TableError

SOURCE = "https://fm-data-tasks.s3.us-west-1.amazonaws.com/datasets.tar.gz"
TASKS = ("entity_matching", "data_imputation", "error_detection", "error_detection_spelling", "schema_matching")
YES_NO = frozenset(TASKS) - {"data_imputation"}


@dataclass(frozen=True)
class DataSet:
    """One data set. ``folder`` is relative to the root that the authors' archive unpacks to."""

    folder: str
    task: str
    suffix: str
    """The question at the end of a row's text."""
    instruction: str = ""
    noun: str = "Product"
    """The name of the two sides of a pair."""
    label: str = "label"
    """The column to impute, or that holds the answer."""
    drop: tuple[str, ...] = ()
    rename: dict[str, str] = field(default_factory=dict)
    """Maps a column to its name in the text. Columns are dropped before they are renamed."""
    group: str | None = None
    """The column by whose value hand-written examples differ; ``_A`` at the end means the left row of a pair."""
    max_tokens: int = 3

    @property
    def name(self) -> str:
        return self.folder.rsplit("/", 1)[-1]


def _matching(name: str, noun: str = "Product", suffix: str | None = None, **other: Any) -> DataSet:
    question = f" Are {noun} A and {noun} B the same?"
    return DataSet(
        f"entity_matching/structured/{name}",
        "entity_matching",
        suffix or question,
        f"{question.strip()} Yes or No?",
        noun,
        **other,
    )


BEER = {"Beer_Name": "name", "Brew_Factory_Name": "factory", "Style": "style"}
SONG = {
    "Song_Name": "name",
    "Artist_Name": "artist name",
    "Album_Name": "album name",
    "Genre": "genre",
    "Price": "price",
    "Time": "time",
    "Released": "released",
}
DATA_SETS = (
    _matching("Amazon-Google", group="manufacturer_A"),
    _matching("Beer", drop=("Style", "ABV"), rename=BEER),
    _matching("DBLP-ACM", group="venue_A"),
    _matching("DBLP-GoogleScholar", group="venue_A"),
    _matching("Fodors-Zagats"),
    _matching("iTunes-Amazon", noun="Song", suffix=" Same Song?", drop=("CopyRight",), rename=SONG),
    _matching("Walmart-Amazon", suffix=" Are A and B the Same?", drop=("category", "price", "brand")),
    DataSet(
        "data_imputation/Buy",
        "data_imputation",
        " Who is the manufacturer?",
        "Who is the manufacturer? apple, sony, lg electronics?",
        label="manufacturer",
        max_tokens=10,
    ),
    DataSet(
        "data_imputation/Restaurant",
        "data_imputation",
        " What is the city?",
        "What is the city? san fransisco, new york, denver?",
        label="city",
        max_tokens=5,
    ),
    DataSet(
        "error_detection/Hospital",
        "error_detection_spelling",
        "?",
        "Is there a x spelling error? Yes or No?",
        label="is_clean",
        group="col_name",
    ),
    DataSet(
        "error_detection/Adult",
        "error_detection",
        "? ",
        "Classify errors. nan values are not errors.",
        label="is_clean",
        group="col_name",
    ),
    DataSet(
        "schema_matching/Synthea",
        "schema_matching",
        "Are A and B the same? Yes or No?",
        "Are A and B semantically equal?",
        drop=("des1", "des2", "d1", "d2", "d3", "d4"),
        rename={"omop": "left", "table": "right"},
        group="left",
    ),
)

DEFAULTS = {
    "entity_matching": DATA_SETS[4],
    "data_imputation": DATA_SETS[8],
    "error_detection": DATA_SETS[10],
    "error_detection_spelling": DATA_SETS[9],
    "schema_matching": DATA_SETS[11],
}
"""Maps a task to the data set whose wording a data set of one's own takes."""


def find_data_set(folder: Path, task: str | None = None, label: str | None = None) -> DataSet:
    """Returns the data set of a folder: one of the twelve by the folder's name, or with ``task`` one's own in the same
    layout.

    ``label`` names the column to impute. Raises TableError that says where to get the data when the folder is
    absent.
    """
    known = next((data for data in DATA_SETS if data.name == folder.resolve().name), None)
    if not folder.is_dir():
        where = f"data/{known.folder}" if known else "data/<task>/<name>"
        names = ", ".join(data.folder for data in DATA_SETS)
        raise TableError(
            f"{folder} is not there. The authors' data sets are at {SOURCE}: download it, unpack it (tar xf "
            "datasets.tar.gz) "
            f"and give the folder of one of them (here that would be {where}). It holds {names}"
        )
    if task is None:
        if known is None:
            raise TableError(
                f"{folder.name} is none of the twelve data sets; for data of your own name the task: --task "
                f"{'|'.join(TASKS)}"
            )
        return known if label is None else replace(known, label=label)
    if task == "data_imputation":
        if label is None:
            raise TableError("data imputation needs the column to fill: --column NAME")
        question = f" What is the {label}?"
        return DataSet(str(folder), task, question, question.strip(), label=label, max_tokens=10)
    default = DEFAULTS[task]
    return replace(
        default, folder=str(folder), drop=(), rename={}, group=default.group if task.startswith("error") else None
    )
