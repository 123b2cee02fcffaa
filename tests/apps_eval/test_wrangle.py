"""Wrangling on small tables that the tests write: texts, selection, scores, and the command on a real model."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.apps.wrangle.__main__ import main
from flexbatch.apps.wrangle.datasets import DATA_SETS, SOURCE, find_data_set
from flexbatch.apps.wrangle.examples import Example, Wording, read_examples
from flexbatch.apps.wrangle.job import WrangleConfig, ask, plan, run, summary
from flexbatch.apps.wrangle.scores import is_right, score
from flexbatch.apps.wrangle.shots import cluster_shots, join_shots, manual_shots, prompt, random_shots, read_manual
from flexbatch.apps.wrangle.tables import TableError, read_table
from flexbatch.request import Completion


def write(path: Path, rows: list[dict], parquet: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if parquet:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
        return
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def make_matching(root: Path, parquet: bool = False, count: int = 12) -> Path:
    """Beer: pairs of two tables, with a missing value, a number with gaps and two columns that the paper drops."""
    folder = root / "entity_matching/structured/Beer"
    for side in "AB":
        beers = [
            {
                "id": i,
                "Beer_Name": f"{'red' if i % 2 else 'dark'} ale {i} ",
                "Brew_Factory_Name": f"works {side}",
                "Style": "ale",
                "ABV": 4 + i if i else None,
            }
            for i in range(count)
        ]
        beers[1]["Brew_Factory_Name"] = None
        write(folder / f"table{side}", beers, parquet)
    for number, split in enumerate(("train", "valid", "test")):
        write(
            folder / split,
            [
                {"ltable_id": i, "rtable_id": (i + i % 2 + number) % count, "label": int(i % 2 == 0)}
                for i in range(count)
            ],
            parquet,
        )
    return folder


def make_imputation(root: Path, parquet: bool = False, count: int = 12) -> Path:
    folder = root / "data_imputation/Restaurant"
    for number, split in enumerate(("train", "valid", "test")):
        rows = [
            {
                "name": f"cafe {number}{i}",
                "addr": f"{i} main st.",
                "phone": None if i == 2 else 1000 + i,
                "city": ("new york", "denver")[i % 2],
            }
            for i in range(count)
        ]
        write(folder / split, rows, parquet)
    return folder


def make_errors(root: Path, parquet: bool = False, count: int = 12) -> Path:
    folder = root / "error_detection/Hospital"
    table = [
        {"name": f"hospital {i}" if i % 3 else f"hoxpital {i}", "state": "al" if i % 4 else "xl"} for i in range(count)
    ]
    write(folder / "table", table, parquet)
    for split in ("train", "valid", "test"):
        cells = [
            {
                "row_id": i,
                "col_name": ("name", "state")[i % 2],
                "is_clean": int("x" not in table[i][("name", "state")[i % 2]]),
            }
            for i in range(count)
        ]
        write(folder / split, cells, parquet)
    return folder


MAKERS = {"entity_matching": make_matching, "data_imputation": make_imputation, "error_detection": make_errors}


class Answers:
    """An engine that answers by rule, and remembers the prompts."""

    def __init__(self, rule) -> None:
        self.rule, self.prompts, self.forms = rule, [], []

    def stream(self, items, on_tokens=None):
        for key, text, params in items:
            assert params.stop == ("\n",) and params.greedy
            self.forms.append(params.structured_outputs)
            self.prompts.append(text)
            said = self.rule(text)
            bad = said is None
            yield (
                key,
                Completion(
                    prompt_token_ids=[],
                    text=said or "",
                    finish_reason="error" if bad else "stop",
                    error="too long" if bad else "",
                ),
            )


# Tables and texts


def test_pairs_read_as_in_the_paper(tmp_path):
    folder = make_matching(tmp_path)
    examples = read_examples(folder, find_data_set(folder), "test", Wording(missing=""))
    assert len(examples) == 12 and examples[0].label == "Yes\n" and examples[1].label == "No\n"
    sides = "Product A is name: red ale 1. factory: . Product B is name: dark ale 4. factory: works B."
    assert examples[1].text == f"{sides} Are Product A and Product B the same? "
    assert examples[1].shot.endswith("the same? No")


def test_imputation_hides_the_answer_and_prints_numbers_as_pandas_does(tmp_path):
    folder = make_imputation(tmp_path)
    first, _, third, *_ = read_examples(folder, find_data_set(folder), "train", Wording())
    assert (
        first.text == "name: cafe 00. addr: 0 main st.. phone: 1000.0. What is the city? "
        and first.label == "new york\n"
    )
    assert third.text == "name: cafe 02. addr: 2 main st.. phone: nan. What is the city? "
    spaced = read_examples(folder, find_data_set(folder), "train", Wording(separator="||"))[0]
    assert spaced.text == "name: cafe 00 || addr: 0 main st. || phone: 1000.0 || What is the city? "


def test_cells_come_from_the_table(tmp_path):
    folder = make_errors(tmp_path)
    examples = read_examples(folder, find_data_set(folder), "test", Wording())
    assert examples[0] == Example("Is there a x spelling error in name: hoxpital 0? ", "Yes\n", "name")
    assert examples[1] == Example("Is there a x spelling error in state: al? ", "No\n", "state")


@pytest.mark.parametrize("labels_in_table", [False, True])
def test_whole_rows_are_shown_for_adult(tmp_path, labels_in_table):
    folder = tmp_path / "error_detection/Adult"
    rows = [
        {"age": 30, "work": "x", "col_name": "age", "is_clean": 0},
        {"age": 31, "work": None, "col_name": "work", "is_clean": 1},
    ]
    write(folder / "table", rows if labels_in_table else [{"age": 1, "work": "y"}])
    write(
        folder / "test",
        [{"col_name": row["col_name"], "is_clean": row["is_clean"]} for row in rows] if labels_in_table else rows,
    )
    first, second = read_examples(folder, find_data_set(folder), "test", Wording())
    assert first.text == "age: 30. work: x\n\nIs there an error in age: 30?  " and first.label == "Yes\n"
    assert second.text == "age: 31. work: nan\n\nIs there an error in work: nan?  " and second.label == "No\n"


def test_schemas_are_two_names(tmp_path):
    folder = tmp_path / "schema_matching/Synthea"
    write(folder / "test", [{"omop": "person-id", "table": "patients-id", "des1": "secret", "label": 1}])
    (example,) = read_examples(folder, find_data_set(folder), "test", Wording())
    assert example == Example(
        "A is person-id. B is patients-id. Are A and B the same? Yes or No? ", "Yes\n", "person-id"
    )


@pytest.mark.parametrize("task", MAKERS)
def test_parquet_reads_as_csv(tmp_path, task):
    plain, columnar = MAKERS[task](tmp_path / "csv"), MAKERS[task](tmp_path / "parquet", parquet=True)
    data = find_data_set(plain)
    for split in ("train", "validation", "test"):
        assert read_examples(plain, data, split, Wording()) == read_examples(columnar, data, split, Wording())


NUMBERS = st.one_of(st.integers(-(10**12), 10**12).map(str), st.floats(allow_nan=False, allow_infinity=False).map(repr))
CELLS = st.one_of(NUMBERS, st.sampled_from(["", "nan", "a b", "1_0", "None"]))


@given(st.lists(CELLS, min_size=1, max_size=6))
def test_columns_print_as_pandas_prints_them(tmp_path_factory, cells):
    pandas = pytest.importorskip("pandas")
    path = tmp_path_factory.mktemp("table") / "t.csv"
    write(path, [{"id": i, "value": cell} for i, cell in enumerate(cells)])
    expected = [None if pandas.isna(value) else str(value) for value in pandas.read_csv(path)["value"]]
    assert [row["value"] for row in read_table(path)] == expected


def test_the_twelve_data_sets_are_there():
    assert len({data.name for data in DATA_SETS}) == 12
    assert sum(data.task == "entity_matching" for data in DATA_SETS) == 7


def test_errors_name_file_row_and_remedy(tmp_path):
    with pytest.raises(TableError, match=SOURCE.replace("/", ".")):
        find_data_set(tmp_path / "Beer")
    (tmp_path / "mine").mkdir()
    with pytest.raises(TableError, match="--task"):
        find_data_set(tmp_path / "mine")
    with pytest.raises(TableError, match="--column"):
        find_data_set(tmp_path / "mine", "data_imputation")
    folder = make_matching(tmp_path)
    data = find_data_set(folder)
    write(folder / "test", [{"ltable_id": 0, "rtable_id": 99, "label": 1}])
    with pytest.raises(TableError, match=r"test.csv, row 0: rtable_id is 99, and .*tableB.csv has no such id"):
        read_examples(folder, data, "test", Wording())
    write(folder / "test", [{"ltable_id": 0, "rtable_id": 1, "label": "maybe"}])
    with pytest.raises(TableError, match=r"row 0: column 'label' holds 'maybe', wanted 0 or 1"):
        read_examples(folder, data, "test", Wording())
    (folder / "test.csv").write_text("a,b\n1\n")
    with pytest.raises(TableError, match=r"line 2 \(row 0\): 1 values for 2 columns"):
        read_table(folder / "test.csv")
    (folder / "test.csv").unlink()
    with pytest.raises(TableError, match=r"holds no test\.csv or test\.parquet"):
        read_examples(folder, data, "test", Wording())


# Selection


def pool(count: int) -> list[Example]:
    return [Example(f"text {i} ", "Yes\n" if i % 4 == 0 else "No\n") for i in range(count)]


def test_random_shots_are_a_seeded_draw_and_may_be_balanced():
    train = pool(40)
    shots = random_shots(train, 10, 5)
    assert shots == random_shots(train, 10, 5) != random_shots(train, 10, 6)
    assert len({shot.text for shot in shots}) == 10
    labels = [shot.label for shot in random_shots(train, 20, 5, balanced=True)]
    assert labels.count("Yes\n") == labels.count("No\n") == 10
    with pytest.raises(TableError, match="21 shots asked for, and the training split has 20 after balancing"):
        random_shots(train, 21, 5, balanced=True)


def test_prompts_join_shots_and_end_without_white_space():
    shots = join_shots(pool(2))
    assert prompt(shots, Example("row ", "No\n")) == "text 0 Yes\n\ntext 1 No\n\nrow"
    assert prompt("", Example("row ", "No\n"), "Do it.") == "Do it. row"


def test_clusters_choose_one_mistake_of_each_kind():
    pytest.importorskip("sklearn")
    kinds = ("espresso machine", "garden chair", "mountain bicycle")
    draw = random.Random(1)
    validation = [Example(f"{draw.choice(kinds)} number {i} ", "Yes\n" if i % 3 else "No\n") for i in range(60)]
    wrong = [i % 2 == 0 for i in range(60)]
    shots = cluster_shots(validation, wrong, 3, 0)
    assert {next(kind for kind in kinds if kind in shot.text) for shot in shots} == set(kinds)
    assert all(wrong[validation.index(shot)] for shot in shots) and {shot.label for shot in shots} == {"Yes\n", "No\n"}
    assert len(cluster_shots(validation, [False] * 60, 4, 0)) == 4
    one_answer = [wrong[i] and example.label == "Yes\n" for i, example in enumerate(validation)]
    assert {shot.label for shot in cluster_shots(validation, one_answer, 3, 0)} == {"Yes\n", "No\n"}


def test_manual_shots_by_group_and_from_the_authors_file(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"acm": "shots of acm", "nan": "shots of none"}))
    manual = read_manual(tmp_path / "m.json", "DBLP-ACM")
    assert (
        manual_shots(manual, Example("", "", "acm")) == "shots of acm"
        and manual_shots(manual, Example("", "", None)) == "shots of none"
    )
    with pytest.raises(TableError, match="no hand-written shots for 'vldb'; there are some for acm, nan"):
        manual_shots(manual, Example("", "", "vldb"))
    marker = tmp_path / "executed"
    (tmp_path / "constants.py").write_text(
        f"open({str(marker)!r}, 'w')\nDATA = 'x'\n"
        "PREFIXES = {f'{DATA}/entity_matching/structured/Beer': 'beer shots', f'{DATA}/x/DBLP-ACM': {'acm': 'a'}}\n"
    )
    assert read_manual(tmp_path / "constants.py", "Beer") == "beer shots"
    assert read_manual(tmp_path / "constants.py", "DBLP-ACM") == {"acm": "a"}
    assert not marker.exists()
    with pytest.raises(TableError, match="no PREFIXES entry for Buy"):
        read_manual(tmp_path / "constants.py", "Buy")


# Scores


def test_right_answers_by_task():
    assert is_right(" Yes\n", "yes", "entity_matching") and not is_right("Yes, they are", "Yes", "entity_matching")
    assert is_right("Yes, it is", "Yes\n", "error_detection_spelling") and not is_right("No", "Yes", "schema_matching")
    assert is_right("thoughts\n\nso yes", "Yes\n", "error_detection") and not is_right(
        "yes\n\nso no", "Yes", "error_detection"
    )
    assert is_right("New York ", "new york\n", "data_imputation")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_scores_equal_scikit_learn(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    said, truth = zip(*pairs, strict=True)
    found = score(
        ["Yes" if yes else "No" for yes in said], ["Yes\n" if yes else "No\n" for yes in truth], "entity_matching"
    )
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        truth, said, average="binary", pos_label=True, zero_division=0
    )
    assert (found.precision, found.recall, found.f1) == pytest.approx((precision, recall, f1))
    assert found.accuracy == pytest.approx(metrics.accuracy_score(truth, said))


# Runs


def test_a_run_asks_every_row_once_and_scores_it(tmp_path):
    folder = make_matching(tmp_path)
    data = find_data_set(folder)
    config = WrangleConfig(folder, split="test", shots=4, trials=2, balanced=True)
    llm = Answers(lambda text: "Yes" if "dark ale" in text.rsplit("\n", 1)[1].split("Product B")[0] else "No")
    trials = run(config, data, llm)
    assert len(llm.prompts) == 24 and all(text.count("the same?") == 5 for text in llm.prompts)
    assert trials[0].prompts != trials[1].prompts, "every trial draws its own examples"
    found = summary(config, data, trials)
    assert (
        found["mean"]["accuracy"] == found["mean"]["f1"] == 1.0
        and found["deviation"]["f1"] == 0
        and found["failed_prompts"] == 0
    )


def test_clusters_take_the_models_own_mistakes(tmp_path):
    pytest.importorskip("sklearn")
    folder = make_matching(tmp_path)
    data = find_data_set(folder)
    llm = Answers(lambda text: "Yes")
    prompts, _ = plan(WrangleConfig(folder, split="test", select="clusters", shots=3), data, llm)[0]
    wrong = [
        example.shot for example in read_examples(folder, data, "validation", Wording()) if example.label == "No\n"
    ]
    assert len(llm.prompts) == 12, "the validation split was answered"
    assert sum(shot in prompts[0] for shot in wrong) == 2 and prompts[0].count("? Yes\n") == 1, (
        "two mistakes, and one of the other answer"
    )


def test_a_prompt_that_fails_is_no_answer(tmp_path):
    answers, errors = ask(Answers(lambda text: None if text == "b" else "Yes\n"), ["a", "b", "a"], 3)
    assert answers == ["Yes", None, "Yes"] and errors == ["", "too long", ""]


@pytest.mark.parametrize("task", MAKERS)
def test_the_command_end_to_end_on_the_demo_model(tmp_path, capsys, task):
    folder = MAKERS[task](tmp_path, parquet=task == "data_imputation")
    arguments = [
        str(folder),
        "--split",
        "test",
        "--shots",
        "2",
        "--trials",
        "2",
        "--output",
        str(tmp_path / "out"),
        "--model",
        "demo",
    ]
    code = main(
        [*arguments, "--device", "cpu", "--dtype", "float32", "--gpu-batch-size", "3", "--num-gpu-batches", "2"]
    )
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["task"].startswith(task) and found["trials"][0]["count"] == 12
    predictions = pyarrow.parquet.read_table(tmp_path / "out/predictions.parquet").to_pylist()
    assert len(predictions) == 24 and all(row["answer"] is not None and row["error"] is None for row in predictions)
    assert found["mean"]["accuracy"] == pytest.approx(sum(row["right"] for row in predictions) / 24)
    assert json.loads((tmp_path / "out/scores.json").read_text()) == found


def test_too_long_rows_are_errors_and_exit_code_3(tmp_path, tiny, capsys):
    folder = make_imputation(tmp_path)
    rows = [
        {"name": "long " * 400 if i == 1 else f"cafe {i}", "addr": "x", "phone": i, "city": "denver"} for i in range(4)
    ]
    write(folder / "test", rows)
    arguments = [
        str(folder),
        "--split",
        "test",
        "--shots",
        "1",
        "--output",
        str(tmp_path / "out"),
        "--model",
        str(tiny),
        "--device",
        "cpu",
    ]
    assert main(arguments) == 3
    assert json.loads(capsys.readouterr().out)["failed_prompts"] == 1
    failed = [
        row for row in pyarrow.parquet.read_table(tmp_path / "out/predictions.parquet").to_pylist() if row["error"]
    ]
    assert [row["row"] for row in failed] == [1] and "tokens" in failed[0]["error"] and failed[0]["right"] is None


def test_wrong_data_is_told_before_the_model_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("flexbatch.engine.LLM.from_config", lambda config: pytest.fail("the model was loaded"))
    folder = make_imputation(tmp_path)
    assert main([str(folder), "--select", "manual"]) == 2
    assert main([str(folder), "--task", "data_imputation", "--column", "town"]) == 2


def test_usage_errors_are_exit_code_2(tmp_path, capsys):
    assert main([str(tmp_path / "Beer")]) == 2
    assert main([str(make_matching(tmp_path)), "--trials", "0"]) == 2
    assert main([str(tmp_path / "entity_matching/structured/Beer"), "--dry-run", "--shots", "1"]) == 0
    assert capsys.readouterr().out.count("Are Product A and Product B the same?") == 2


@pytest.mark.parametrize(
    ("task", "free", "choice"),
    [
        ("entity_matching", False, ("Yes", "No", " Yes", " No")),
        ("error_detection", False, ("Yes", "No", " Yes", " No")),
        ("entity_matching", True, None),
        ("data_imputation", False, None),
    ],
)
def test_questions_of_yes_and_no_leave_no_other_answer(tmp_path, task, free, choice):
    """Also where the model's mistakes choose the shots."""
    folder = MAKERS[task](tmp_path)
    data, llm = find_data_set(folder, task, None if task != "data_imputation" else "city"), Answers(lambda text: "Yes")
    run(WrangleConfig(folder, split="test", select="clusters", shots=2, free_answers=free), data, llm)
    assert llm.forms and {form and form.choice for form in llm.forms} == {choice}
