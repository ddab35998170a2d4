import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from evaluation_toys import Ratings, ToyModel, Voices, toy_results

from persona.errors import UserError
from persona.evaluation.charts import scale
from persona.evaluation.episodes import run_benchmark
from persona.evaluation.report import write_report
from persona.evaluation.results import Plots, Point, load_run, write_plots
from persona.evaluation.sections import history_bins

TWO = {"untouched": 0.3, "Persona-Plug": 0.6}
EMPTY = {"meta", "link", "input", "br", "hr", "img"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what the tests look for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.addresses = [], [], [], [], []
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

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    toy_results(folder, n=84, stacks=TWO)
    return folder


@pytest.fixture(scope="module")
def text(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write_report([folder / name for name in TWO], path, title="Toy & town").read_text()


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


def test_hostile_text_stays_text(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"

    class Hostile(Voices):
        def samples(self):
            first = super().samples()[0]
            return [replace(first, id=evil, target=evil, persona=replace(first.persona, id=evil, description=evil))]

        async def episode(self, sample, roles):
            return replace(await super().episode(sample, roles), raw=evil)

    run_benchmark(Hostile(), ToyModel(), tmp_path / "a", stack=evil, settings={evil: evil}, progress=False)
    write_plots(tmp_path / "a", Plots(points=(Point(0, 0, evil, evil), Point(1, 1, "b", "b"))))
    text = write_report([tmp_path / "a"], tmp_path / "report.html", title=evil).read_text()
    page = Page(text)
    assert "<img" not in text and "49" not in re.sub(r"\d\.\d+|#[0-9a-f]+", "", text.split("<main>")[0])
    assert [tag for tag, _ in page.tags].count("script") == 2


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
