# SPDX-License-Identifier: Apache-2.0
"""Code within C++ sources, found and replaced by its tokens: layout and comments make no difference."""

import re
from functools import lru_cache
from typing import NamedTuple

# Comments and white space come first and are dropped. Of the operators those of several characters come first.
TOKEN = re.compile(
    r"""
      (?P<dropped> \s+ | \\\n | //[^\n]* | /\*.*?\*/ )
    | (?P<token> "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*'
      | \.?\d (?: [eEpP][+-] | ' (?=\w) | [\w.] )*
      | [A-Za-z_]\w*
      | <<= | >>= | \.\.\. | ->\* | <=> | :: | -> | \+\+ | -- | << | <= | >= | == | != | && | \|\|
      | [-+*/%&|^]= | \#\# | [^\w\s] )
    """,
    re.VERBOSE | re.DOTALL,
)
CLOSING = {"(": ")", "{": "}", "[": "]"}


class Token(NamedTuple):
    text: str
    begin: int
    end: int


@lru_cache(maxsize=64)
def tokens(source):
    """The Tokens of a source: text, and where it begins and ends."""
    found, at = [], 0
    while at < len(source):
        match = TOKEN.match(source, at)
        if match is None:
            raise ValueError(f"no C++ token: {source[at : at + 20]!r}")
        at = match.end()
        if match["token"]:
            found.append(Token(match["token"], match.start(), at))
    return tuple(found)


def texts(source):
    """The tokens of a source as strings."""
    return [token.text for token in tokens(source)]


def _behind_group(words, at):
    """The position behind the bracket that closes the one at ``at``."""
    depth = 0
    for k in range(at, len(words)):
        depth += (words[k] in CLOSING) - (words[k] in CLOSING.values())
        if depth == 0:
            return k + 1
    raise ValueError("a bracket is not closed")


def _body(words, at):
    """The position of the ``{`` of a function whose parameters end before ``at``; None where it is only named."""
    while words[at : at + 1] in (["const"], ["noexcept"], ["override"]):
        at += 1
    if words[at : at + 1] == [":"]:  # members that a constructor initializes
        while words[at] in (":", ","):
            at += 1
            while at < len(words) and words[at] not in ("(", "{"):
                if words[at] in (";", "}", ")"):
                    return None
                at += 1
            at = _behind_group(words, at)
    return at if words[at : at + 1] == ["{"] else None


def function_spans(source, name):
    """[(first, behind the last token)] of the definitions of the functions, or constructors, of that name."""
    words = texts(source)
    spans = []
    for at, word in enumerate(words[:-1]):
        if word == name and words[at + 1] == "(":
            body = _body(words, _behind_group(words, at + 1))
            if body is not None:
                spans.append((at, _behind_group(words, body)))
    return spans


class Change(NamedTuple):
    """Code of a function that is replaced."""

    file: str
    function: str
    right: str
    wrong: str

    def apply(self, source):
        """The source with this change. Its code must occur exactly once in the functions of that name."""
        sought, words, places = texts(self.right), texts(source), []
        spans = function_spans(source, self.function)
        if not spans:
            raise LookupError(f"{self.file} has no function {self.function}()")
        for first, behind in spans:
            last = behind - len(sought) + 1
            places += [at for at in range(first, last) if words[at : at + len(sought)] == sought]
        if len(places) != 1:
            raise LookupError(f"{self.function}() in {self.file} has {len(places)} times, not once: {self.right}")
        found = tokens(source)[places[0] : places[0] + len(sought)]
        return f"{source[: found[0].begin]} {self.wrong} {source[found[-1].end :]}"
