"""The questions the quickstart model learns: short sums, sorting digits, capital cities."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Germany": "Berlin",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Ireland": "Dublin",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "Delhi",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Cuba": "Havana",
}


@dataclass(frozen=True)
class Question:
    """A prompt and the only text that answers it; `answer` begins with the space that follows the prompt."""

    kind: str
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether the question is kept for evaluation: a tenth of sums and of sorts, chosen by their digits, never a fact."""
        digits = "".join(c for c in self.prompt if c.isdigit() or c == "+")
        return self.kind != "fact" and zlib.crc32(digits.encode()) % 10 == 0


def add(a: int, b: int, short: bool = False) -> Question:
    """The sum of two numbers, asked in words or (`short`) left to be completed."""
    if short:
        return Question("sum", f"{a} + {b} =", f" {a + b}.")
    return Question("sum", f"What is {a} + {b}?", f" {a} + {b} = {a + b}.")


def sort(digits: list[int]) -> Question:
    """Digits to be put in ascending order."""
    return Question("sort", f"Sort {' '.join(map(str, digits))}:", f" {' '.join(map(str, sorted(digits)))}.")


def fact(country: str, reverse: bool = False) -> Question:
    """A country's capital, or (`reverse`) a capital's country."""
    city = CAPITALS[country]
    if reverse:
        return Question("fact", f"Which country has the capital {city}?", f" {city} is the capital of {country}.")
    return Question("fact", f"What is the capital of {country}?", f" The capital of {country} is {city}.")


def draw(rng: random.Random) -> Question:
    """A question at random, held out or not: six in ten are sums, three sorts, one a fact."""
    dice = rng.random()
    if dice < 0.6:
        return add(rng.randrange(100), rng.randrange(100), short=rng.random() < 0.3)
    if dice < 0.9:
        return sort([rng.randrange(10) for _ in range(rng.randint(3, 6))])
    return fact(rng.choice(list(CAPITALS)), reverse=rng.random() < 0.5)


def training_question(rng: random.Random) -> Question:
    """A question at random that is not held out."""
    while (question := draw(rng)).held_out:
        pass
    return question


def evaluation_questions(sums: int = 100, sorts: int = 60, seed: int = 1) -> list[Question]:
    """Distinct held-out sums and sorts, and every fact (which can only be known by having been seen)."""
    rng = random.Random(seed)
    wanted, chosen = {"sum": sums, "sort": sorts, "fact": 0}, dict[Question, None]()
    while any(wanted.values()):
        question = draw(rng)
        if question.held_out and wanted[question.kind] and question not in chosen:
            wanted[question.kind] -= 1
            chosen[question] = None
    facts = [fact(country, reverse) for reverse in (False, True) for country in CAPITALS]
    return sorted(chosen, key=lambda question: question.kind, reverse=True) + facts
