"""Games of several turns whose reward comes with the last one: nim against a random player, guess the number, locks.

A game is the environment of one conversation: `reset(row)` gives the opening's text, `step(completion)` the answer's
text, a reward, terminated, truncated. What happens is a function of the row's seed and the moves.
"""

import random
from collections.abc import Callable
from typing import Any

from upslope.language.tiny import EOS

MOST = 3  # stones that may be taken in nim
NUMBERS, GUESSES = 15, 4  # guess: bisection always finds one of 2^4 - 1 numbers in 4 guesses
LOCKS, KEYS = 8, "abcdefgh"


class Nim:
    """10 to 21 stones; each takes 1 to 3, first the model; who takes the last one wins. Its opponent plays at random.

    The text is what is left. The first player can always win: it leaves a multiple of 4. An illegal move loses.

    >>> game = Nim()
    >>> game.reset({"seed": 5}), game.step("9")
    ('17:', ('lost', 0.0, True, False))
    """

    def reset(self, row: dict[str, Any]) -> str:
        self.chance = random.Random(f"nim/{row['seed']}")
        self.left = self.chance.choice([n for n in range(10, 22) if n % (MOST + 1)])
        return f"{self.left}:"

    def legal(self) -> list[str]:
        return [str(n) for n in range(1, min(MOST, self.left) + 1)]

    def step(self, completion: str) -> tuple[str, float, bool, bool]:
        if completion not in self.legal():
            return "lost", 0.0, True, False
        self.left -= int(completion)
        if self.left == 0:
            return "won", 1.0, True, False
        self.left -= int(self.chance.choice(self.legal()))
        return ("lost", 0.0, True, False) if self.left == 0 else (f"{self.left}:", 0.0, False, False)


class Guess:
    """A number of 1 to 15 is to be found in four guesses; the answer to each is > (it is greater) or < (it is less).

    >>> game = Guess()
    >>> game.reset({"seed": 1}), game.step("8"), game.step("what")
    ('1-15:', ('<', 0.0, False, False), ('?', 0.0, False, False))
    """

    def reset(self, row: dict[str, Any]) -> str:
        self.secret = random.Random(f"guess/{row['seed']}").randint(1, NUMBERS)
        self.left = GUESSES
        return f"1-{NUMBERS}:"

    def legal(self) -> list[str]:
        return [str(n) for n in range(1, NUMBERS + 1)]

    def step(self, completion: str) -> tuple[str, float, bool, bool]:
        self.left -= 1
        if completion == str(self.secret):
            return "won", 1.0, True, False
        if self.left == 0:
            return "lost", 0.0, True, False
        if completion not in self.legal():
            return "?", 0.0, False, False
        return (">" if self.secret > int(completion) else "<"), 0.0, False, False


class Locks:
    """Eight locks, one a turn; each is a letter whose key is the one after it. The reward is the share that opened.

    The text is how many opened so far and the next lock: what a turn was worth is seen at the next and paid at the end.

    >>> game = Locks()
    >>> game.reset({"seed": 1}), game.step("e"), game.step("x")
    ('0d:', ('1c:', 0.0, False, False), ('1e:', 0.0, False, False))
    """

    def reset(self, row: dict[str, Any]) -> str:
        self.chance = random.Random(f"locks/{row['seed']}")
        self.opened, self.turn = 0, 0
        return self._next()

    def legal(self) -> list[str]:
        return list(KEYS)

    def step(self, completion: str) -> tuple[str, float, bool, bool]:
        self.opened += completion == KEYS[(KEYS.index(self.lock) + 1) % len(KEYS)]
        self.turn += 1
        if self.turn == LOCKS:
            return f"{self.opened}", self.opened / LOCKS, True, False
        return self._next(), 0.0, False, False

    def _next(self) -> str:
        self.lock = self.chance.choice(KEYS)
        return f"{self.opened}{self.lock}:"


GAMES: dict[str, Callable[[], Any]] = {"nim": Nim, "guess": Guess, "locks": Locks}


def moves(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows that teach the rules and no strategy: a game so far, played at random, and a random legal move.

    Their text has the end of sequence of the tiny model's tokenizer after every move.

    Raises:
        ValueError: an unknown game.
    """
    if name not in GAMES:
        raise ValueError(f"game is {name!r}, allowed: {', '.join(GAMES)}")
    source = random.Random(f"moves/{name}/{seed}")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        game, ended = GAMES[name](), False
        context = game.reset({"seed": source.randrange(2**31)})
        while not ended:
            move = source.choice(game.legal())
            rows.append({"prompt": context, "completion": move})
            text, _, ended, _ = game.step(move)
            context += move + EOS + text
    return rows[:count]
