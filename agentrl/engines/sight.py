"""What an engine must do with pictures, checked against a forward pass that sees them; one of text refuses them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from agentrl.content import Image
from agentrl.engines import Generation, Request
from agentrl.engines.exam import FAR, PLAIN, Exam, must
from agentrl.errors import UsageError
from agentrl.pictures import Pictures, painted
from agentrl.trajectory import as_ids

ROUGH = 100.0  # times the tolerance: the two ways that servers have to resize a picture differ by a few 1e-4 nats
_BLIND = Image(b"an engine of text does not look at it")


async def images(exam: Exam) -> str:
    """A picture in the context is read as a forward pass reads it, is told from another one, and is cached with what
    stands around it; an engine of text refuses it."""
    if not exam.engine.capabilities.images or exam.pictures is None:
        try:
            await exam.engine.generate(Request(exam.prompt(4), PLAIN, "exam-picture", "", None, (_BLIND,), ((1, 2),)))
        except UsageError:
            return "refused: it serves a model of text"
        raise AssertionError("the engine says that its model takes no pictures, and answers for one")
    eyes, worst, cached, could = exam.pictures, 0.0, 0, 0
    factor, n = eyes.factor, 2
    while eyes.tokens(painted(exam.rng, n * factor, n * factor)) != n * n:
        n += 1  # smaller ones are enlarged
    first, other, next_one = (painted(exam.rng, n * factor, m * factor) for m in (n, n, n + 1))
    block = exam.engine.capabilities.cache_block
    start = _Shown.of(exam, (), 40).with_picture(exam, first)
    replies = []
    for shown in (start, start.seeing(other)):  # the same ids: what is cached of one picture is not the other's
        reply = await exam.engine.generate(shown.request("exam-picture"))
        worst = max(worst, shown.gap(exam, reply))
        replies.append(reply)
    apart = start.seeing(other).gap(exam, replies[0])
    must(apart > FAR, f"log-probs with another picture differ by {apart:.2g} nats only: is it looked at?")
    shown = start.heard(replies[0])
    for picture in (next_one, other):
        could += (len(shown.ids) - 1) // block * block
        shown = shown.with_picture(exam, picture)
        reply = await exam.engine.generate(shown.request("exam-picture"))
        worst, cached = max(worst, shown.gap(exam, reply)), cached + reply.cached_tokens
        shown = shown.heard(reply)
    must(worst <= exam.tolerance, f"log-probs behind a picture differ from a forward pass by {worst:.2g}")
    try:
        await exam.update(1)  # also what a server keeps of a picture itself is of older weights now
        reply = await exam.engine.generate(start.request("exam-picture"))
        worst = max(worst, start.gap(exam, reply, second=True))
    finally:
        await exam.update(0)
    must(worst <= exam.tolerance, f"after new weights, log-probs behind a picture differ by {worst:.2g}")
    share = min(cached / could, 1.0)
    must(share >= 0.95, f"only {share:.1%} of the tokens with pictures that could be reused over 3 turns were")
    odd = _Shown.of(exam, (), 8).with_picture(exam, painted(exam.rng, n * factor + 5, (n + 1) * factor - 7))
    rough = odd.gap(exam, await exam.engine.generate(odd.request("exam-odd")))
    must(rough <= ROUGH * exam.tolerance, f"log-probs behind a picture that is resized differ by {rough:.2g}")
    for name in ("exam-picture", "exam-odd"):
        await exam.engine.release(name)
    return (
        f"largest difference {worst:.1e}, {rough:.1e} where a picture is resized; {apart:.2g} nats from another "
        f"picture; {share:.1%} used again over 3 turns"
    )


@dataclass(frozen=True, slots=True)
class _Shown:
    """A context with pictures."""

    ids: tuple[int, ...]
    images: tuple[Image, ...]
    places: tuple[tuple[int, int], ...]
    eyes: Pictures

    @classmethod
    def of(cls, exam: Exam, images: tuple[Image, ...], n: int) -> _Shown:
        assert exam.pictures is not None
        return cls(_words(exam, exam.pictures, n), images, (), exam.pictures)

    def with_picture(self, exam: Exam, image: Image) -> _Shown:
        """A picture, and a few words behind it."""
        before, behind = self.eyes.around
        start = len(self.ids) + 1
        stop = start + self.eyes.tokens(image)
        ids = (*self.ids, before, *[self.eyes.pad_id] * (stop - start), behind, *_words(exam, self.eyes, 7))
        return _Shown(ids, (*self.images, image), (*self.places, (start, stop)), self.eyes)

    def seeing(self, image: Image) -> _Shown:
        """The same ids with another picture of the same size in place of the last."""
        return replace(self, images=(*self.images[:-1], image))

    def heard(self, reply: Generation) -> _Shown:
        said = [int(i) for i in reply.ids if int(i) not in self.eyes.reserved_ids]
        return replace(self, ids=(*self.ids, *said))

    def request(self, session: str) -> Request:
        sampling = replace(PLAIN, stop_ids=self.eyes.reserved_ids, max_tokens=12)
        return Request(as_ids(self.ids), sampling, session, "", None, self.images, self.places)

    def gap(self, exam: Exam, reply: Generation, *, second: bool = False) -> float:
        """How far a reply's log-probs are from a forward pass with these pictures."""
        whole = as_ids([*self.ids, *reply.ids.tolist()])
        found = exam.reference(whole, len(self.ids), second=second, images=self.images, places=self.places)
        return float(np.abs(reply.logprobs - found).max(initial=0.0))


def _words(exam: Exam, eyes: Pictures, n: int) -> tuple[int, ...]:
    """`n` random ids, none of which has to do with pictures."""
    ids = exam.prompt(4 * n).tolist()
    return tuple([i for i in ids if i not in (*eyes.reserved_ids, *eyes.around)][:n])
