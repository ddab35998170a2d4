import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from evaluation_toys import Ratings, ToyModel, Voices, toy_results
from report_toys import BENCHMARKS, JUDGES, STACKS, toy_tree

from persona.errors import UserError
from persona.evaluation.comparison import compare
from persona.evaluation.episodes import run_benchmark
from persona.evaluation.report import main, write_report
from persona.evaluation.report.charts import scale
from persona.evaluation.report.sections import history_bins
from persona.evaluation.report.table import print_table
from persona.evaluation.results import Attention, Mixture, Plots, Point, load_run, write_plots
from persona.evaluation.statistics import Metric
from persona.types import HistoryItem, Message, Persona, Score, Verdict

TWO = {"untouched": 0.3, "Persona-Plug": 0.6}
EMPTY = {"meta", "link", "input", "br", "hr", "img", "wbr"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what the tests look for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.addresses = [], [], [], [], []
        self.tables, self.rows, self.cell = {}, None, None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"][1:]] if attrs.get("href", "").startswith("#") else []
        self.addresses += [attrs[key] for key in ("src", "href") if not attrs.get(key, "#").startswith(("#", "data:"))]
        if tag not in EMPTY:
            self.open.append(tag)
        if attrs.get("role") == "region":
            self.rows = self.tables.setdefault(attrs["aria-label"], [])
        elif tag == "tr" and self.rows is not None:
            self.rows.append([])
        elif tag in ("td", "th") and self.rows is not None:
            self.cell = []

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if self.cell is not None and tag in ("td", "th"):
            self.rows[-1].append(" ".join("".join(self.cell).split()))
            self.cell = None
        elif tag == "table":
            self.rows = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)

    def table(self, label):
        """{first cell: the others} of the table in the scrolling region `label`."""
        return {row[0]: row[1:] for row in self.tables[label]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    toy_results(folder, n=84, stacks=TWO)
    return folder


@pytest.fixture(scope="module")
def text(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write_report([folder / name for name in TWO], path, title="Toy & town").read_text()


@pytest.fixture(scope="module")
def wide(tree, tmp_path_factory):
    """The page over four benchmarks."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(tree, path, baseline="untouched").read_text()


def section(text, heading):
    """The elements from a heading's id to the end of its section."""
    return text.split(f'<h2 id="{heading}"')[1].split("</section>")[0]


def books(text):
    return json.loads(text.split('id="browser-data">')[1].split("</script>")[0])


def test_the_page_nests_is_self_contained_and_its_links_lead_somewhere(text):
    page = Page(text)
    assert page.addresses == [] and "@import" not in text and "url(" not in text
    assert len(page.ids) == len(set(page.ids)) and set(page.links) <= set(page.ids)
    assert "<title>Toy &amp; town</title>" in text
    assert {"overview", "benchmark-1", "benchmark-2", "attention", "embeddings", "browser", "runs"} <= set(page.ids)


def test_every_figure_says_what_it_shows_and_every_header_cell_what_it_heads(text):
    page = Page(text)
    named = [a for tag, a in page.tags if tag == "svg" and ("aria-label" in a or "aria-hidden" in a or "x" in a)]
    assert len(named) == len([1 for tag, _ in page.tags if tag == "svg"]) > 40
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")


def test_the_numbers_are_those_of_the_summaries(folder, text):
    for stack in TWO:
        found = load_run(folder / stack / "evaluation" / "ratings").summary
        for estimate in found.estimates.values():
            shown = f"[{estimate.low:.3f}, {estimate.high:.3f}]".replace("-", "−")
            assert text.count(shown) >= 3  # overview, plot's title, table
    unscored = sum(load_run(folder / stack / "evaluation" / "ratings").summary.n_unscored for stack in TWO)
    assert unscored > 0 and f"{unscored} of 168 replies could not be scored" in text


def test_each_colour_that_is_used_is_defined_in_both_themes(text):
    used = {name for classes in re.findall(r'class="(?:mark|interval|link) (\w+)"', text) for name in [classes]}
    assert used >= {"base", "c0", "c1", "c2", "c3"}
    assert all(text.count(f"--{name}:") == 2 for name in used)


EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"\' onmouseover="alert(3) --><!-- ]]>'


def hostile_verdict(name, value=None):
    return Verdict(name, EVIL, "0" * 12, value, EVIL if value is None else "", EVIL)


def test_hostile_text_stays_text_wherever_it_stands(tmp_path):
    class Hostile(Voices):
        metrics = {EVIL: Metric(description=EVIL), "voice": Metric()}
        primary = EVIL

        def samples(self):
            first = super().samples()[0]
            persona = Persona(EVIL, EVIL, history=(HistoryItem("1", EVIL, EVIL),))
            message = (Message(EVIL, EVIL),)
            given = {"messages": message, "target": EVIL, "persona": persona, "options": (EVIL, "b"), "task": EVIL}
            return [replace(first, id=EVIL + mark, **given) for mark in "ab"]

        def groups(self, sample):
            return {EVIL: EVIL}

        async def episode(self, sample, roles):
            verdicts = tuple(hostile_verdict(EVIL + judge, value) for judge in "ab" for value in (None, EVIL, "x"))
            values = {EVIL: 1.0, "voice": 0.0} if sample.id.endswith("a") else {}
            return Score(values, EVIL, EVIL, verdicts, (Message(EVIL, EVIL),))

    Hostile.name = EVIL
    for number, stack in enumerate((EVIL, EVIL + "2")):
        place = tmp_path / str(number)
        run_benchmark(Hostile(), ToyModel(), place, stack=stack, settings={EVIL: EVIL * number}, progress=False)
        summary = json.loads((place / "summary.json").read_text())
        summary["environment"] = {EVIL: EVIL, "usage": {EVIL: {EVIL: 1.0}}}
        (place / "summary.json").write_text(json.dumps(summary))
        write_plots(
            place,
            Plots((Attention(EVIL, EVIL, ((EVIL, 1.0),)),), (Point(0, 0, EVIL, EVIL), Point(1, 1, "", "")),
                  mixture=Mixture((EVIL,), ((EVIL, (0.5,)),), ((1.0,),), ((EVIL, EVIL),))),
        )  # fmt: skip
    text = write_report([tmp_path], tmp_path / "report.html", title=EVIL).read_text()
    page = Page(text)
    assert "<img" not in text and "49" not in re.sub(r"\d\.\d+|#[0-9a-f]+", "", text.split("<main>")[0])
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text
    (book,) = books(text)
    sample = book["samples"][0]
    assert sample["id"] == EVIL + "a" and sample["replies"][0]["verdicts"][1]["value"] == EVIL
    # Everything was drawn: it stands there, escaped, in every section.
    for heading in ("overview", "benchmark-1", "attention", "embeddings", "mixtures", "runs"):
        assert "&lt;img src=x onerror=alert(2)&gt;" in section(text, heading).replace("<wbr>", "")


def test_one_run_alone_one_cluster_no_history(tmp_path):
    class Small(Ratings):
        def samples(self):
            return [replace(sample, persona=None) for sample in super().samples()[:1]]

    run_benchmark(Small(), ToyModel(1.0), tmp_path / "a", stack="only", settings={}, progress=False)
    text = write_report([tmp_path / "a"], tmp_path / "report.html").read_text()
    assert "no interval" in text and "By length of history" not in text
    Page(text)


def test_two_trainings_of_one_method_are_told_apart(folder, tmp_path):
    places = []
    for name, seed in (("first", 0), ("second", 1)):
        place = tmp_path / name / "evaluation" / "ratings"
        run_benchmark(Ratings(20), ToyModel(), place, stack="plug", settings={"seed": seed}, progress=False)
        places.append(place)
    text = write_report(places, tmp_path / "report.html").read_text()
    assert "plug (first)" in text and "plug (second)" in text
    once = write_report([places[0], tmp_path / "first"], tmp_path / "report.html").read_text()
    assert "1 stack on 1 benchmark" in once and "(first)" not in once


def test_a_stack_that_is_there_twice_has_the_same_two_names_on_every_benchmark(tmp_path):
    toy_tree(tmp_path / "first", 8, {"plug": 0.5}, BENCHMARKS[:2])
    toy_tree(tmp_path / "second", 8, {"plug": 0.6}, BENCHMARKS[:1])
    table = Page(write_report([tmp_path], tmp_path / "report.html").read_text()).table("Overview table")
    assert list(table) == ["stack", "plug (first) baseline", "plug (second)"]
    assert table["plug (second)"][0] == "–" != table["plug (first) baseline"][0]  # choices


def test_as_a_command(tree, tmp_path, capsys):
    page = tmp_path / "page.html"
    given = [str(tree[0].parents[1]), "--output", str(page), "--baseline", "constant answer"]
    assert main(given) == 0 and capsys.readouterr().out == f"{page}\n"
    assert "against constant answer" in page.read_text()
    assert main([*given[:3], "--baseline", "nobody"]) == 2
    assert capsys.readouterr().err.startswith('No run has the stack "nobody"; the stacks given are Persona-Plug, ')


def test_unknown_baseline_is_one_sentence(folder, tmp_path):
    with pytest.raises(UserError, match='No run has the stack "plain"'):
        write_report([folder], tmp_path / "report.html", baseline="plain")


def test_history_bins_by_hand():
    assert history_bins([3, 1, 1]) == [(1, 1), (3, 3)]
    assert history_bins(list(range(1, 11))) == [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
    bins = history_bins([1] * 80 + list(range(2, 22)))
    assert bins[0][0] == 1 and bins[-1][1] == 21
    assert all(after[0] == before[1] + 1 for before, after in zip(bins, bins[1:], strict=False))


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        ([-2.76, -2.13], (-2.6, -2.4, -2.2)),
        ([3.0, 3.0], (2.9, 3.0, 3.1)),
        ([0.0], (-0.04, -0.02, 0.0, 0.02, 0.04)),
        ([12, 1234], (500.0, 1000.0)),
    ],
)
def test_ticks_are_round_and_inside(values, ticks):
    found = scale(values)
    assert found.ticks == pytest.approx(ticks)
    assert all(0 <= found.share(tick) <= 1 for tick in found.ticks)


def shown(value):
    return f"{value:.3f}".replace("-", "−")


def test_the_overview_has_each_benchmark_s_primary_metric(tree, wide):
    table = Page(wide).table("Overview table")
    heads = ["ratingsaccuracy ↑", "choicesaccuracy ↑", "talksin voice ↑", "a_benchmark_with_a_long_namerouge-1 ↑"]
    assert table["stack"] == heads
    labels = {"untouched": "untouched baseline"} | {s: f"{s} reads nothing" for s in STACKS if s.endswith("answer")}
    assert list(table)[1:] == [labels.get(stack, stack) for stack in STACKS]
    for place in tree:
        summary = load_run(place).summary
        column = [make.name for make in BENCHMARKS].index(summary.benchmark)
        cell = table[labels.get(summary.stack, summary.stack)][column]
        found = summary.estimates[summary.primary]
        assert cell.startswith(shown(found.value)) and f"[{shown(found.low)}, {shown(found.high)}]" in cell
        assert (f"{summary.n_unscored} of 28 unscored" in cell) == (summary.n_unscored > 0)
        assert any(mark in cell for mark in "▲▼○") == (summary.stack != "untouched")


def test_trivial_answers_are_marked_and_never_best(tmp_path):
    stacks = {"a": -0.5, "b": -0.05} | {name: STACKS[name] for name in ("constant answer", "random answer")}
    places = toy_tree(tmp_path, 28, stacks, BENCHMARKS[:1])
    best = max(load_run(place).summary.estimates["accuracy"].value for place in places[:2])
    assert load_run(places[2]).summary.estimates["accuracy"].value > best  # it would win
    text = write_report(places, tmp_path / "report.html").read_text()
    marked = set(re.findall(r'class="best">([^<]+)<', section(text, "overview")))
    assert marked == {shown(best)}
    assert section(text, "overview").count("reads nothing</span>") == 2 and "2 stacks on 1 benchmark" in text


def test_nobody_is_best_where_all_are_equal(tmp_path):
    places = toy_tree(tmp_path, 14, {"a": 0.5, "b": 0.5}, BENCHMARKS[:1])
    assert 'class="best"' not in write_report(places, tmp_path / "report.html").read_text()


def test_any_stack_can_be_the_baseline_and_holm_is_over_the_page(tree, tmp_path):
    runs = [load_run(place) for place in tree]
    for baseline in ("Persona-Plug", "constant answer"):
        text = write_report(tree, tmp_path / "report.html", baseline=baseline).read_text()
        compared = compare(runs, baseline)
        assert len(compared) == 5 * 8 and f"over all {len(compared)} comparisons" in text
        for one in compared:
            if one.metric == "in voice":
                said = "p < 0.001" if one.p_holm < 0.001 else f"p = {one.p_holm:.3f}"
                assert f"Holm {said}" in section(text, "benchmark-3")


def test_all_metrics_counts_and_reasons_stand_in_the_section(tree, wide):
    table = Page(wide).table("all metrics of choices")
    assert [head.split()[0] for head in table["stack"]] == ["length", "accuracy", "n", "unscored"]
    part = section(wide, "benchmark-2")
    for stack in STACKS:
        summary = load_run(next(place for place in tree if place.parts[-2:] == ("choices", stack))).summary
        names = (stack, f"{stack} baseline", f"{stack} reads nothing")
        row = next(cells for head, cells in table.items() if head in names)
        assert row[2:] == ["28", str(summary.n_unscored)]
        for reason, n in summary.unscored_reasons.items():
            assert f"{stack}: {n} × {reason}" in part
    assert "could not be scored" in part


def test_breakdowns_by_hand(tree, wide):
    run = load_run(next(place for place in tree if place.parts[-2:] == ("choices", "untouched")))
    table = Page(wide).table("choices by level")
    assert list(table) == ["level", "level 1", "level 2", "level 10"]  # numbers count as numbers
    for level in list(table)[1:]:
        rows = [row for row in run.rows if row.groups["level"] == level]
        values = [row.values["accuracy"] for row in rows if row.values]
        cell = table[level][0]
        assert cell.startswith(shown(sum(values) / len(values))) and f"n = {len(values)}" in cell
        assert (", " in cell.split("n = ")[1]) == (len(values) < len(rows))
    assert len(Page(wide).table("choices by resident")) == 1 + 14
    assert list(Page(wide).table("talks by topic"))[1:] == ["bakery", "boat trip", "choir", "market"]


def test_what_judges_said_could_not_say_and_agree_on(tree, wide):
    page, part = Page(wide), section(wide, "benchmark-3")
    run = load_run(next(place for place in tree if place.parts[-2:] == ("talks", "Persona-Plug")))
    rows = [row for row in page.tables["judges of talks"] if row[1] == "helpful"]
    assert [row[0] for row in rows] == [judge.name for judge in JUDGES]
    for row, judge in zip(rows, JUDGES, strict=True):
        said = [v for r in run.rows for v in r.verdicts if v.judge == judge.name and v.rubric == "helpful"]
        read = [v.value for v in said if v.value is not None]
        unread = f", {len(said) - len(read)} unread" if len(read) < len(said) else ""
        assert row[2 + list(STACKS).index("Persona-Plug")] == f"{shown(sum(read) / len(read))}n = {len(read)}{unread}"
    assert "unreadable: " in part and "× no level is named" in part
    agreement = page.table("agreement of the judges of talks")
    rivals = [load_run(p).rows for p in tree if p.parts[-2] == "talks" and not p.name.endswith("answer")]
    both = sum(
        all(v.value is not None for v in row.verdicts if v.rubric == "helpful") for some in rivals for row in some
    )
    assert agreement["helpful"][0] == str(both) and list(agreement) == ["rubric", "in_voice", "helpful"]
    assert "agreement of the judges of choices" not in page.tables


def test_cost_and_differing_judges_are_said(tree, tmp_path):
    for stack, judge in (("untouched", "m-1"), ("Persona-Plug", "m-2")):
        place = tmp_path / "evaluation" / "talks" / stack
        shutil.copytree(next(p for p in tree if p.parts[-2:] == ("talks", stack)), place)
        summary = json.loads((place / "summary.json").read_text())
        summary["environment"]["usage"] = {"judge 1": {"requests": 56, "prompt_tokens": 1234, "cost": 0.25}}
        summary["settings"]["judge"] = {"judge": {"kind": "endpoint", "model": judge}}
        (place / "summary.json").write_text(json.dumps(summary))
    text = write_report([tmp_path], tmp_path / "report.html", baseline="untouched").read_text()
    assert "All runs together cost 0.500" in text
    table = Page(text).tables["usage of talks"]
    assert table[0] == ["stack", "role", "requests", "prompt_tokens", "cost"]
    assert table[2] == ["untouched baseline", "judge 1", "56", "1234", "0.250"]
    assert "differ in more than model and stack: judge.judge.model" in text
    assert "m-1 (untouched)" in text and "m-2 (Persona-Plug)" in text


def test_prompts_that_were_cut_are_said_in_page_and_terminal(tree, tmp_path, capsys):
    place = tmp_path / "evaluation" / "talks" / "untouched"
    shutil.copytree(next(p for p in tree if p.parts[-2:] == ("talks", "untouched")), place)
    whole = write_report([place], tmp_path / "report.html").read_text()
    summary = json.loads((place / "summary.json").read_text())
    summary["cut"] = {"judge 1": {"samples": 3, "tokens": 1234}}
    (place / "summary.json").write_text(json.dumps(summary))
    text = write_report([place], tmp_path / "report.html").read_text()
    assert "untouched, judge 1: 3 of 28 samples, 1,234 tokens in all" in text and "were cut" not in whole
    print_table([place])
    assert "3 samples with a prompt that did not fit its model's positions" in capsys.readouterr().out


def test_the_browser_has_conversations_verdicts_and_choices(wide):
    found = {book["benchmark"]: book for book in books(wide)}
    assert [len(book["samples"]) for book in found.values()] == [28] * 4  # all fit
    talk = found["talks"]["samples"][0]
    assert (
        talk["persona"] == "Ada"
        and talk["description"].startswith("Ada speaks")
        and talk["groups"] == {"topic": "bakery"}
    )
    reply = next(reply for reply in talk["replies"] if reply["stack"] == "untouched")
    assert [role for role, _ in reply["transcript"]] == ["system"] + ["user", "assistant"] * 3
    assert {verdict["judge"] for verdict in reply["verdicts"]} == {judge.name for judge in JUDGES}
    assert all(verdict["raw"] and (verdict["value"] or verdict["reason"]) for verdict in reply["verdicts"])
    choice = found["choices"]["samples"][3]
    for reply in choice["replies"]:
        if not reply["reason"]:
            assert choice["options"][reply["chosen"]] == reply["raw"]
            assert (reply["outcome"] == "wrong") == (reply["raw"] != choice["target"])
        else:
            assert reply["outcome"] == "unscored" and reply["chosen"] is None
    rating = found["ratings"]["samples"][0]
    assert rating["items"] and rating["n_items"] >= len(rating["items"])
