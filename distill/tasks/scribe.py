"""The pen of worked solutions: it states facts, sometimes slips and corrects itself, sometimes checks a right step."""

import random


class Scribe:
    """Collects the lines of one worked solution. Deterministic given `rng`.

    slip: probability that a fact is first stated wrong, then checked and corrected at once.
    confirm: probability that a right fact is checked aloud.
    """

    def __init__(self, rng: random.Random, slip: float = 0.04, confirm: float = 0.04):
        self.rng, self.slip, self.confirm = rng, slip, confirm
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        """Starts a new top-level step."""
        self.lines.append(text)

    def more(self, text: str) -> None:
        """Goes on in the present step."""
        self.lines[-1] += text

    def text(self) -> str:
        """All steps, one a line."""
        return "\n".join(self.lines)

    def fact(self, expression: str, value: int) -> str:
        """`expression=value`, without a full stop, with a corrected slip or a confirmation now and then."""
        return self.said(f"{expression}=", value, f"{expression}=", lambda: self.near(value))

    def said(self, stated: str, value: object, checked: str, wrong) -> str:
        """`stated` + value; on a slip `stated` + wrong() + ". Check: " + `checked` + value + ", not " + wrong()."""
        draw = self.rng.random()
        if draw < self.slip:
            other = wrong()
            return f"{stated}{other}. Check: {checked}{value}, not {other}"
        if draw < self.slip + self.confirm:
            return f"{stated}{value}. Check: {checked}{value}, yes"
        return f"{stated}{value}"

    def near(self, value: int) -> int:
        """A wrong value such as a careless person writes: off by one, two or ten, of the same sign."""
        offsets = (-1, 1, -2, 2) if abs(value) < 10 else (-1, 1, -1, 1, -2, 2, -10, 10)
        return value + self.rng.choice([offset for offset in offsets if (value + offset < 0) == (value < 0)])

    def near_count(self, count: int) -> int:
        """A wrong count: one more, or one less when that is possible."""
        return count + (self.rng.choice((-1, 1)) if count else 1)
