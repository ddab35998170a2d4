"""LaMP's task rules, against texts worked out by hand."""

import pytest

from persona import data
from persona.data.lamp_tasks import FIELDS, LAMP_TASKS, TAGS, candidate_titles
from persona.errors import UserError
from persona.types import HistoryItem

ITEM = HistoryItem("1", "the text", "the label")
CITE = 'For an author of the paper with the title "Own", which? Only [1] or [2]. [1]: "First" [2]: "Second"'


def test_every_task_has_rules_and_fields():
    assert list(LAMP_TASKS) == list(FIELDS) == ["LaMP_1", "LaMP_2", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"]
    assert len(TAGS) == len(set(TAGS)) == 15
    assert data.task("LaMP_2").labels == TAGS
    assert data.task("LaMP_3").labels == ("1", "2", "3", "4", "5")


@pytest.mark.parametrize(
    ("name", "text", "with_label"),
    [
        ("LaMP_1", "the label the text", "the label the text"),
        ("LaMP_2", "the text", "tag the label: the text"),
        ("LaMP_3", "the text", "score the label: the text"),
        ("LaMP_4", "the label the text", "the label the text"),
        ("LaMP_5", "the label the text", "the label the text"),
        ("LaMP_7", "the text", "the text"),
    ],
)
def test_item_texts(name, text, with_label):
    rules = data.task(name)
    assert rules.item_text(ITEM) == text
    assert rules.item_text_with_label(ITEM) == with_label


@pytest.mark.parametrize(
    ("name", "prompt", "query"),
    [
        ("LaMP_1", CITE, "First Second"),
        ("LaMP_2", "Which tag? tags: [a, b] description: A man: alone.", "A man: alone."),
        ("LaMP_3", "Score 1 to 5. review: Good: very.", "Good: very."),
        ("LaMP_4", "A headline for the following article: The news.", "The news."),
        ("LaMP_5", "A title for the abstract of a paper: We show.", "We show."),
        ("LaMP_7", "Reply to the message as they would: hi: there", "hi: there"),
    ],
)
def test_query_is_cut_out_at_the_marker_or_is_the_whole_prompt(name, prompt, query):
    rules = data.task(name)
    assert rules.query_text(prompt) == query
    assert rules.query_text("no marker here") == "no marker here"


def test_quotation_marks_in_titles_do_not_shift_the_candidates():
    prompt = 'with the title "A "quoted" word", which? [1]: "The "end" of it" [2]: "Second"'
    assert candidate_titles(prompt) == 'The "end" of it Second'
    # Without the numbers the second and third quoted strings count, as in the reference.
    assert candidate_titles('"Own" or "First" or "Second"') == "First Second"
    assert candidate_titles('"Own" or "First"') == '"Own" or "First"'


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("LaMP_1", 'The paper with the title "one", and "two", and "Own", which title?'),
        ("LaMP_2", 'the movie "one" has the tag "x", and the movie "two" has the tag "y". Go'),
        ("LaMP_3", 'x is the score for "one", and y is the score for "two". Go'),
        ("LaMP_4", '"x" is the title for "one", and "y" is the title for "two". Go'),
        ("LaMP_5", '"x" is a title for "one", and "y" is a title for "two". Like these patterns, Go'),
        ("LaMP_7", '"one", and "two". These were written by one person. Like these patterns, Go'),
    ],
)
def test_snippets_and_join(name, prompt):
    rules = data.task(name)
    snippets = [rules.snippet(HistoryItem("1", "-", "x"), "one"), rules.snippet(HistoryItem("2", "-", "y"), "two")]
    bare = 'The paper with the title "Own", which title?' if name == "LaMP_1" else "Go"
    assert rules.join(snippets, bare) == prompt


@pytest.mark.parametrize("name", list(LAMP_TASKS))
def test_trailing_is_what_join_puts_before_the_prompt(name):
    rules = data.task(name)
    if not rules.inline:
        assert rules.join(["S"], "P") == f"S. {rules.trailing}P"


def test_names_are_found_with_hyphen_and_case_and_the_nearest_is_named():
    assert data.task("LaMP-3") is data.task("lamp_3") is LAMP_TASKS["LaMP_3"]
    with pytest.raises(UserError, match="no task 'LaMP_33'; did you mean LaMP_3"):
        data.task("LaMP_33")
    with pytest.raises(UserError, match="LaMP_6 is not supported"):
        data.task("LaMP-6")


def test_pplug_texts_differ_in_three_places():
    def both(name):
        return data.task(name), data.task(name, compat="pplug_reference")

    ours, theirs = both("LaMP_1")
    own = 'the paper with the title "Own", which?'
    assert theirs.query_text(own) == "Own" and theirs.query_text("nothing") == "nothing"
    ours, theirs = both("LaMP_4")
    assert (ours.item_text(ITEM), theirs.item_text(ITEM)) == ("the label the text", "the text the label")
    ours, theirs = both("LaMP_7")
    tweet = "Say: the tweet before or after it: hello"
    assert (ours.query_text(tweet), theirs.query_text(tweet)) == ("the tweet before or after it: hello", "hello")
    for name in ("LaMP_2", "LaMP_3", "LaMP_5"):
        ours, theirs = both(name)
        assert ours is theirs
    with pytest.raises(UserError, match="compat 'reference'"):
        data.task("LaMP_1", compat="reference")


def test_past_papers_as_training_pairs():
    example = data.task("LaMP_1").example
    assert example(ITEM) == ('Write the abstract of the paper with the title "the label".', "the text")
    assert example(HistoryItem("1", "", "the label")) is None
