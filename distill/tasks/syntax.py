"""Text to a syntax tree: integer expressions with + - * ( ) and one-letter variables, by recursive descent.

expression = term {("+" | "-") term} ; term = factor {"*" factor}
factor = "-" factor | "(" expression ")" | number | letter
"""

import re
from dataclasses import dataclass

from distill.errors import DataError

_TOKEN = re.compile(r"\s*(?:([0-9]+)|([A-Za-z])|([-+*()]))")
MAX_CHARS = 400


@dataclass(frozen=True)
class Num:
    """A literal or an already worked out value; it may be negative."""

    value: int


@dataclass(frozen=True)
class Var:
    """The unknown of an equation."""

    name: str


@dataclass(frozen=True)
class Neg:
    """Minus a subexpression."""

    arg: "Node"


@dataclass(frozen=True)
class Op:
    """`left symbol right`, symbol one of + - *."""

    symbol: str
    left: "Node"
    right: "Node"


Node = Num | Var | Neg | Op


def parse(text: str) -> Node:
    """The syntax tree of `text`; DataError when it is no expression of this grammar or longer than 400 characters."""
    parser = _Parser(text)
    node = parser.expression()
    if parser.peek() is not None:
        parser.fail()
    return node


class _Parser:
    def __init__(self, text: str):
        self.text, self.at, self.tokens = text, 0, self._tokenize(text)

    @staticmethod
    def _tokenize(text: str) -> list[str]:
        if len(text) > MAX_CHARS:
            raise DataError("expression is too long", where="tasks.syntax", value=len(text))
        tokens, at, end = [], 0, len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            if not match:
                raise DataError("not an integer expression", where="tasks.syntax", value=text)
            tokens.append(match.group(0).strip())
            at = match.end()
        return tokens

    def fail(self):
        raise DataError("not an integer expression", where="tasks.syntax", value=self.text)

    def peek(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self) -> str:
        token = self.peek()
        if token is None:
            self.fail()
        self.at += 1
        return token

    def expression(self) -> Node:
        node = self.term()
        while self.peek() in ("+", "-"):
            node = Op(self.take(), node, self.term())
        return node

    def term(self) -> Node:
        node = self.factor()
        while self.peek() == "*":
            node = Op(self.take(), node, self.factor())
        return node

    def factor(self) -> Node:
        token = self.take()
        if token == "-":
            arg = self.factor()
            return Num(-arg.value) if isinstance(arg, Num) else Neg(arg)
        if token == "(":
            node = self.expression()
            if self.take() != ")":
                self.fail()
            return node
        if token.isdigit():
            return Num(int(token))
        if token.isalpha():
            return Var(token)
        self.fail()


def count_operations(node: Node) -> int:
    """How many operations are still to be worked out in the tree."""
    if isinstance(node, Op):
        return 1 + count_operations(node.left) + count_operations(node.right)
    return 1 + count_operations(node.arg) if isinstance(node, Neg) else 0


def show(node: Node, parent: str = "", is_right: bool = False) -> str:
    """The tree as text without spaces and with the fewest parentheses; parse(show(tree)) has the same value."""
    if isinstance(node, Num):
        return f"({node.value})" if node.value < 0 and is_right else str(node.value)
    if isinstance(node, Var):
        return node.name
    if isinstance(node, Neg):
        return f"-({show(node.arg)})"
    text = show(node.left, node.symbol) + node.symbol + show(node.right, node.symbol, True)
    loose = node.symbol in "+-"
    needed = loose if parent == "*" else is_right and loose and parent in ("+", "-")
    return f"({text})" if needed or (is_right and parent == "*") else text


def linear(node: Node) -> tuple[int, int]:
    """(coefficient of the variable, constant) of an expression linear in its one variable; DataError otherwise."""
    if isinstance(node, Num):
        return 0, node.value
    if isinstance(node, Var):
        return 1, 0
    if isinstance(node, Neg):
        slope, constant = linear(node.arg)
        return -slope, -constant
    (left_slope, left), (right_slope, right) = linear(node.left), linear(node.right)
    if node.symbol == "*":
        if left_slope and right_slope:
            raise DataError("the equation is not linear", where="tasks.syntax", value=show(node))
        return left_slope * right + right_slope * left, left * right
    sign = 1 if node.symbol == "+" else -1
    return left_slope + sign * right_slope, left + sign * right
