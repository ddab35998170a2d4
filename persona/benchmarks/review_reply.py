"""Answering reviews: what a business replies in public to a review, rated 1 to 5 on four dimensions by judges.

A reconstruction. The PersonaFuse paper names review-based customer service as an application (persona_fuse §5,
abstract); its reviews, its metrics and its judge were not found. Dimensions, scales and prompts here are ours, and its
figures cannot be compared with these. Reviews of one's own are a file; a few of ours come with the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from persona.benchmarks import FileBenchmarkConfig
from persona.benchmarks.counselling import RatedReplies, rubric
from persona.data.rows import field, read_jsonl
from persona.errors import UserError
from persona.evaluation.prompts import Prompt
from persona.types import Sample

_HERE = Path(__file__).parent
_SAMPLES = _HERE / "samples" / "review_reply" / "reviews.jsonl"
ANSWER = Prompt.load(_HERE / "prompts" / "review_reply" / "answer.md")


@dataclass(frozen=True)
class Review:
    """`stars`: 1 to 5, or None where the file does not say."""

    business: str
    text: str
    stars: int | None


def read_reviews(path: Path) -> dict[str, Review]:
    """Reviews by id, one {id, business, review, rating} a line; `rating` may be left out.

    Raises UserError naming the line for a missing field and a rating that is no whole number from 1 to 5.
    """
    reviews: dict[str, Review] = {}
    for number, row, _ in read_jsonl(path):
        where = f"{path}, line {number}"
        id, business, text = (field(row, name, where) for name in ("id", "business", "review"))
        stars = row.get("rating")
        if stars is not None and (isinstance(stars, bool) or stars not in range(1, 6)):
            raise UserError(f"{where} has the rating {stars!r}, which should be a whole number from 1 to 5")
        if id in reviews:
            raise UserError(f"{where} repeats the id {id!r}")
        reviews[id] = Review(business, text, stars)
    if not reviews:
        raise UserError(f"{path} holds no reviews")
    return reviews


@dataclass
class ReviewReplyConfig(FileBenchmarkConfig):
    """`path`: reviews, one {id, business, review, rating} a line. `limit` takes the first ones."""

    name: str = "review_reply"
    max_new_tokens: int = 256


class ReviewReply(RatedReplies):
    name = "review_reply"
    rubric = rubric(_HERE / "prompts" / "review_reply" / "rate.md")
    prompts = (ANSWER, rubric.prompt)
    dimensions = {
        "specificity": "what this review says is taken up",
        "tone": "the manner fits the review's mood",
        "resolution": "the matter is brought forward",
        "honesty": "nothing is claimed or promised that cannot be known",
    }
    plain = "Thank you for your review. We are always glad to hear from our customers."

    def __init__(self, config: ReviewReplyConfig) -> None:
        self._reviews = read_reviews(Path(config.path).expanduser() if config.path else _SAMPLES)
        samples = [
            Sample(id, ANSWER.messages(business=review.business, review=review.text, rating=review.stars))
            for id, review in self._reviews.items()
        ]
        super().__init__(config, samples, {sample.id: sample.messages[-1].content for sample in samples})

    def groups(self, sample: Sample) -> Mapping[str, str]:
        stars = self._reviews[sample.id].stars
        return {} if stars is None else {"stars": str(stars)}


def build(config: ReviewReplyConfig) -> ReviewReply:
    """The benchmark of a config. Raises UserError for a file that is missing or malformed."""
    return ReviewReply(config)
