import io
import json

from evaluation_toys import toy_results
from report_toys import BENCHMARKS, STACKS, toy_tree
from rich.console import Console

from persona.evaluation.report.table import print_table
from persona.evaluation.results import read_summary

TWO = {"untouched": 0.3, "Persona-Plug": 0.6}


def printed(folders, width=160, **options):
    console = Console(file=io.StringIO(), width=width)
    print_table(folders, console=console, **options)
    return console.file.getvalue()


def test_one_benchmark_has_all_its_metrics(tmp_path):
    folders = [place for place in toy_results(tmp_path, n=84, stacks=TWO) if place.name == "ratings"]
    text = printed(folders)
    estimate = read_summary(folders[0]).estimates["accuracy"]
    assert f"[{estimate.low:.3f}, {estimate.high:.3f}]" in text
    assert "accuracy ↑" in text and "rmse ↓" in text and "▲" in text and "\\" not in text
    assert text.index("untouched") < text.index("Persona-Plug")
    assert "Holm over 3 comparisons" in text


def test_several_benchmarks_have_one_row_per_stack_and_their_primary_metric(tree):
    text = printed(tree, 200, baseline="untouched")
    assert text.count("Overview") == 1
    firsts = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert [name for name in firsts if name] == list(STACKS)
    assert "in voice ↑" in text and "helpful" not in text  # of talks only the primary metric
    assert text.index("Persona-Plug + character adapter") < text.index("constant answer") < text.index("Against")
    found = read_summary(next(place for place in tree if place.parts[-2:] == ("choices", "untouched")))
    assert f"[{found.estimates['accuracy'].low:.3f}, {found.estimates['accuracy'].high:.3f}]" in text
    unscored = {read_summary(place).n_unscored for place in tree} - {0}
    assert unscored and all(f"{n} of 28 unscored" in text for n in unscored)


def test_a_narrow_terminal_gets_more_tables_and_no_broken_numbers(tree):
    wide, narrow = printed(tree, 200), printed(tree, 80)
    assert narrow.count("┏") == 2 > wide.count("┏") == 1
    assert all(len(line) <= 80 for line in narrow.splitlines())
    for place in tree:
        found = read_summary(place)
        entry = found.estimates[found.primary]
        assert f"[{entry.low:.3f}, {entry.high:.3f}]" in narrow


def test_trivial_answers_are_no_default_baseline(tree):
    turned = [place for name in ("constant answer", "untouched") for place in tree if place.name == name]
    assert "Against untouched on" in printed(turned)
    assert "Against constant answer on" in printed(turned, baseline="constant answer")


def test_names_are_no_markup(tmp_path):
    folders = toy_tree(tmp_path, 14, {"[red]a[/red]": 0.5}, BENCHMARKS[:1])
    assert "[red]a[/red]" in printed(folders)


def test_the_same_stack_trained_twice_has_two_rows(tmp_path):
    folders = [toy_tree(tmp_path / name, 14, {"plug": 0.5}, BENCHMARKS[:1])[0] for name in ("first", "second")]
    text = printed(folders)
    assert "plug (first)" in text and "plug (second)" in text


def test_a_stack_that_was_not_run_on_a_benchmark_has_a_dash(tree):
    some = [p for p in tree if p.name == "untouched" or p.parts[-2:] == ("talks", "Persona-Plug")]
    row = next(line for line in printed(some, 200).splitlines() if line.startswith("│ Persona-Plug "))
    assert [cell.strip()[:1] for cell in row.split("│")[2:-1]].count("–") == 3


def test_the_summary_knows_the_primary_metric(tree):
    found = {place.parts[-2]: json.loads((place / "summary.json").read_text())["primary"] for place in tree}
    # "ratings" names none and takes its first metric, "choices" names its second one.
    assert found["ratings"] == "accuracy" and found["choices"] == "accuracy" and found["talks"] == "in voice"
