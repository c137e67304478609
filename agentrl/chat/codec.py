"""Text to ids and back, with control tokens kept out of anybody's reach.

A chat template's own text may become control ids (role markers, `<tool_call>`, …); a message's
content never may. Contents are *defused*: each control string inside them is replaced by a mark of
private-use characters, which templates carry through trimming and JSON, and is encoded apart from
the rest as ordinary tokens of the same characters. What was encoded is then checked: the control
ids must be exactly those that the template's text holds.

A picture inside a content is a mark too, which names it and says how many tokens it takes; it becomes the template's
text for a picture, and the placeholder in it is repeated after all else is encoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from agentrl.errors import UsageError
from agentrl.trajectory import Ids, Place, RecordError

_OPEN, _CLOSE = "\uf8f0", "\uf8f1"  # a mark is OPEN digits CLOSE
RESERVED = (_OPEN, _CLOSE, "\uf8f2", "\uf8f3")  # defused too where content holds them; the last two are for sentinels
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_PICTURE = re.compile(f"{_OPEN}([0-9a-f]{{64}}):(\\d+){_CLOSE}")
_MARKUP = re.compile(r"[<>\[\]{}|]")
_SHAPED = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


def picture_mark(sha256: str, tokens: int) -> str:
    """What stands in a (defused) text for a picture of so many tokens."""
    return f"{_OPEN}{sha256}:{tokens}{_CLOSE}"


class Codec:
    """A tokenizer's encoder and decoder, on a private copy that nobody else can reconfigure.

    `meaningful` is text (the template, the tool format's marks) that gives a meaning to the added
    tokens named in it. Control tokens are the special ones, those, and what looks like `<|…|>`.
    `picture` is the template's text for a picture, whose placeholder is the control token `pad`.
    Raises `UsageError` for a tokenizer without a `tokenizers` backend.
    """

    def __init__(self, tokenizer: Any, meaningful: str, picture: str = "", pad: str = "") -> None:
        self._picture, self._pad = picture, pad
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UsageError(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library; "
                "save it with a tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained) and load that"
            )
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = False
        added = self._backend.get_added_tokens_decoder()
        self.control: dict[str, int] = {
            token.content: index
            for index, token in added.items()
            if token.special
            or (_MARKUP.search(token.content) and token.content in meaningful)
            or _SHAPED.fullmatch(token.content)
        }
        self.size = max((self._backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added)))
        self._is_control = np.zeros(self.size, dtype=bool)
        self._is_control[list(self.control.values())] = True
        self._control_ids = frozenset(self.control.values())
        self._control_strings = {index: string for string, index in self.control.items()}
        alternatives = sorted((*self.control, *RESERVED), key=len, reverse=True)
        self._strings = tuple(alternatives)
        self._index = {string: index for index, string in enumerate(alternatives)}
        self._control_text = re.compile("|".join(map(re.escape, alternatives)))
        self._defused: dict[int, tuple[int, ...]] = {}

    # -- decoding ---------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """All of `ids` as text, control tokens included; broken UTF-8 gives U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def listed(self, text: str) -> list[int]:
        """The ids of a template's own text, as they come."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def string_of(self, index: int) -> str:
        return self._control_strings[index]

    def has_control(self, ids: Sequence[int]) -> bool:
        return not self._control_ids.isdisjoint(ids)

    def between(
        self, text: str, n_left: int, n_right: int, contents: Sequence[tuple[int, int, int]]
    ) -> tuple[list[int], list[tuple[int, int, int]]] | None:
        """Encode `text` between anchors of `n_left` and `n_right` ids, which are left out of the result.

        `contents` are (first character, last character, line); returned as (first token, token behind,
        line), a token that straddles counting as content. None where control ids, marks or broken
        characters are inside: then the careful way must be taken.
        """
        if _OPEN in text:
            return None
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except TypeError:
            return None
        ids = encoding.ids
        ids = ids[n_left : len(ids) - n_right]
        if not self._control_ids.isdisjoint(ids):
            return None
        places: list[tuple[int, int, int]] = []
        edge = 0
        for first, last, line in contents:
            start, stop = encoding.char_to_token(first), encoding.char_to_token(last)
            if start is None or stop is None:
                return None
            start, stop = max(start - n_left, edge), max(stop + 1 - n_left, edge)
            places.append((start, stop, line))
            edge = stop
        return ids, places

    def controls(self, ids: Ids) -> list[int]:
        """The control ids among `ids`, in order. Ids outside the vocabulary raise `UsageError`."""
        try:
            return ids[self._is_control[ids]].tolist()  # type: ignore[no-any-return]
        except IndexError:
            raise UsageError(
                f"token id {int(ids.max())} is outside the tokenizer's vocabulary of {self.size}; "
                "the model and the tokenizer do not belong together"
            ) from None

    def without_control_text(self, text: str) -> str:
        return self._control_text.sub("", text)

    # -- defusing ---------------------------------------------------------------------------------

    def defuse(self, text: str) -> str:
        """`text` with each control string replaced by a mark; most text comes back as it is."""
        return self._control_text.sub(lambda m: f"{_OPEN}{self._index[m.group()]}{_CLOSE}", text)

    def defuse_all(self, value: Any) -> Any:
        """`defuse` on every string (keys too) of a JSON-like value."""
        if isinstance(value, str):
            return self.defuse(value)
        if isinstance(value, dict):
            return {self.defuse_all(key): self.defuse_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.defuse_all(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        """Undo `defuse`."""
        return _MARK.sub(lambda m: self._strings[int(m.group(1))], text)

    def control_spans(self, text: str) -> list[tuple[int, int]]:
        """(end, id) of each control string in `text`."""
        return [
            (m.end(), self.control[m.group()]) for m in self._control_text.finditer(text) if m.group() in self.control
        ]

    def starts_with_control(self, text: str) -> bool:
        match = self._control_text.match(text)
        return match is not None and match.group() in self.control

    # -- encoding ---------------------------------------------------------------------------------

    def expected(self, text: str) -> list[int]:
        """The control ids that (marked) `text` of a template must encode to."""
        return [self.control[s] for s in self._control_text.findall(_MARK.sub("", text)) if s in self.control]

    def encode(self, text: str) -> Ids:
        """Encode marked `text`. Text without marks gives what the tokenizer itself gives, unless a control
        id would come from elsewhere than the template: normalisation can make one of harmless text."""
        return self.shown(text)[0]

    def shown(self, text: str) -> tuple[Ids, tuple[Place, ...]]:
        """`encode`, and where the pictures of `text` stand."""
        pictures = _PICTURE.findall(text)
        if not pictures:
            return self._encoded(text), ()
        ids = self._encoded(_PICTURE.sub(lambda _: self._picture, text)).tolist()
        pad = self.control[self._pad]
        if ids.count(pad) != len(pictures):
            raise RecordError(f"{len(pictures)} pictures stand in a text with {ids.count(pad)} placeholders")
        whole: list[int] = []
        places: list[Place] = []
        for index in ids:
            if index != pad:
                whole.append(index)
                continue
            sha256, n = pictures[len(places)]
            places.append(Place(len(whole), len(whole) + int(n), sha256))
            whole += [pad] * int(n)
        return frozen(whole), tuple(places)

    def _encoded(self, text: str) -> Ids:
        ids = frozen(self._listed_marked(text))
        return ids if self.controls(ids) == self.expected(text) else frozen(self._strict(text))

    def _listed_marked(self, text: str) -> list[int]:
        ids: list[int] = []
        edge = 0
        for match in _MARK.finditer(text):
            ids += self._piece(text[edge : match.start()])
            ids += self._ordinary(int(match.group(1)))
            edge = match.end()
        return ids + self._piece(text[edge:])

    def _piece(self, text: str) -> list[int]:
        return self.listed(_whole(text)) if text else []

    def _ordinary(self, index: int) -> tuple[int, ...]:
        """The ids of a control string as plain characters, never its control id."""
        if index not in self._defused:
            self._defused[index] = tuple(self._plainly(self._strings[index]))
        return self._defused[index]

    def _plainly(self, text: str) -> list[int]:
        """Ids of `text` without any added token. A vocabulary that spells a control token as an
        ordinary piece too is asked for smaller pieces; what is still a control id is left out."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids if text else []
        if self.controls(frozen(ids)):
            singles = [self._plain.encode(char, add_special_tokens=False).ids for char in text]
            ids = [index for char in singles for index in char if not self._is_control[index]]
        return ids

    @cached_property
    def _plain(self) -> Tokenizer:
        spec = json.loads(self._backend.to_str())
        spec["added_tokens"] = []
        return Tokenizer.from_str(json.dumps(spec))

    def _strict(self, text: str) -> list[int]:
        """Encode so that control ids stand for the template's control strings and for nothing else."""
        ids: list[int] = []
        edge = 0
        text = _whole(text)
        for match in re.finditer(f"{_MARK.pattern}|{self._control_text.pattern}", text):
            ids += self._plainly(text[edge : match.start()])
            if match.group(1) is not None:
                ids += self._ordinary(int(match.group(1)))
            elif match.group() in self.control:
                ids.append(self.control[match.group()])
            edge = match.end()
        return ids + self._plainly(text[edge:])


def _whole(text: str) -> str:
    """`text` with lone surrogates replaced by U+FFFD: there are no bytes for them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def frozen(ids: Iterable[int]) -> Ids:
    """A read-only int32 vector of ids that are known to be valid."""
    array = np.array(ids, dtype=np.int32)
    array.flags.writeable = False
    return array
