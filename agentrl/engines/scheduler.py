"""Which tokens run in the next forward. No asyncio here: one thread calls `Scheduler.step` again and again.

A request first needs the keys and values of all its ids but the last: from its session's last turn, from another
sequence with the same beginning, or computed in packed chunks. From then on it is a decoding row that feeds its newest
token each step, the last prompt token being the first. So a prompt computed once serves its whole group, and logits
are made for decoding rows only. All decoding rows share one forward with the prompt chunks of new ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from agentrl.engines import EngineStats, Generation
from agentrl.engines.kv import Cache, Kept, copy_slots
from agentrl.engines.model import EngineModel, ladder
from agentrl.engines.packing import Chunk, Packer
from agentrl.engines.prefix import Prefixes, leads
from agentrl.engines.rows import Progress, Rows
from agentrl.engines.sampler import draw
from agentrl.errors import InfraError
from agentrl.trajectory import FinishReason, Floats, Ids, VersionRun, as_floats, as_ids

CHUNK = 512  # prompt tokens a step while rows decode; four times as many when none does


@dataclass(slots=True, eq=False)
class Job(Progress):
    """A request on its way. `done` is called once, from the engine's thread, with the reply or the reason why not.

    `tokens` are the ids to go through before the next one is drawn: the request's, and what was put out so far where
    the cache was lost on the way.
    """

    done: Callable[[Generation | Exception], None] = field(kw_only=True)
    tokens: Ids = field(default_factory=lambda: as_ids([]))
    leader: tuple[Kept, int] | None = None
    cached: int = 0
    versions: list[tuple[int, int]] = field(default_factory=list)

    @property
    def need(self) -> int:
        """Tokens that must be cached before the request decodes."""
        return int(self.tokens.size) - 1


class Scheduler:
    """Rows, sessions and their cache. Every method runs in the engine's one thread."""

    def __init__(
        self, model: EngineModel, rows: int, max_context: int, deterministic: bool, stats: EngineStats
    ) -> None:
        self.model = model
        self.max_context = max_context
        self.stats = stats
        self.version = 0
        self.rows = Rows(rows, model.device)
        base = 64 if rows >= 64 else 128 if rows >= 16 else 512
        self.cache = Cache(model.shapes, base, max_context, model.device, model.dtype)
        self.packer = Packer(self.cache, model.device, deterministic)
        self.sizes: tuple[int, ...] = ()
        if deterministic:
            top = -(-(rows + CHUNK) // 64) * 64
            self.sizes = ladder(model, [*(s for s in (8, 16, 32, 64, 96, 128, 192, 256, 384, 512) if s < top), top])
            self.packer.probe()
        self.waiting: deque[Job] = deque()
        self.filling: list[Job] = []
        self.sessions: dict[str, Kept] = {}
        self.prefixes = Prefixes()
        self.clock = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.filling or self.rows.count)

    def submit(self, job: Job) -> None:
        """Queue a request; those of one priority start in the order in which they come, those of larger ones before."""
        self.stats.requests += 1
        self.stats.prompt_tokens += int(job.request.ids.size)
        before = sum(other.request.priority >= job.request.priority for other in self.waiting)
        self.waiting.insert(before, job)

    def running(self) -> list[Job]:
        """The jobs that decode."""
        return [job for job in self.rows.running() if isinstance(job, Job)]

    def jobs(self) -> list[Job]:
        """Every request that has not been answered, running ones first."""
        return [*self.running(), *self.filling, *self.waiting]

    def abort(self, job: Job) -> None:
        """Answer `job` now with what it has."""
        if job in self.waiting:
            self.waiting.remove(job)
        elif job in self.filling:
            self.filling.remove(job)
        elif job.row >= 0:
            self.rows.leave(job.row)
        else:
            return
        self._finish(job, "abort")

    def fail(self, error: Exception) -> None:
        """The forward broke: every request fails, and everything cached is suspect and goes."""
        jobs = self.jobs()
        for job in self.running():
            self.rows.leave(job.row)
        self.waiting.clear()
        self.filling.clear()
        self.sessions.clear()
        self.forget()
        for job in jobs:
            job.done(error)

    def forget(self) -> None:
        """Drop all keys and values. Requests on their way compute theirs again, and go on."""
        for job in self.running():
            self.rows.leave(job.row)
            job.tokens = np.concatenate([job.request.ids, job.ids])
            self.filling.append(job)
        self.prefixes.clear()
        self.cache.clear()
        self.sessions = {name: kept for name, kept in self.sessions.items() if kept.running}
        for job in self.filling:
            job.leader = None
            job.kept.coming = job.tokens[: job.need]
            self.cache.seat(job.kept, job.need + 1)

    def release(self, session: str) -> None:
        """Free what is kept of a session; while it runs, as soon as its turn ends."""
        kept = self.sessions.pop(session, None)
        if kept is not None and not kept.running:
            self._drop(kept)

    def fork(self, parent: str, child: str) -> None:
        """Copy what is cached of `parent` to a new session `child`."""
        kept = self.sessions.get(parent)
        if kept is None or child in self.sessions:
            return
        for progress in self.rows.running():
            if progress.kept is kept:
                self.rows.read(progress)
        if kept.n == 0:
            return
        twin = Kept(child)
        self.cache.seat(twin, kept.n)
        assert kept.pool is not None and twin.pool is not None
        copy_slots(kept.pool, kept.slot, twin.pool, [twin.slot], kept.n)
        twin.ids, twin.n, twin.used = kept.ids, kept.n, self.clock
        self.sessions[child] = twin

    def score(self, ids: Ids, start: int, temperature: float) -> Floats:
        """Log-probs of ids[start:], computed at once in packed chunks. Shape [len(ids) - start]."""
        kept = Kept("")
        self.cache.seat(kept, int(ids.size))
        out: list[torch.Tensor] = []
        try:
            for begin in range(0, int(ids.size) - 1, CHUNK):
                end = min(begin + CHUNK, int(ids.size) - 1)
                keep = max(end - max(begin, start - 1), 0)
                logits = self._forward([Chunk(kept, ids, begin, end)], None, keep)
                kept.n = end
                if keep:
                    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)[-keep:]
                    targets = torch.from_numpy(ids[end - keep + 1 : end + 1].astype(np.int64)).to(logprobs.device)
                    out.append(logprobs.gather(1, targets[:, None])[:, 0])
        finally:
            self.cache.drop(kept)
        return as_floats(torch.cat(out).cpu().numpy() if out else [])

    def step(self) -> None:
        """Admit requests, run one forward over new prompt chunks and all decoding rows, and answer what ended."""
        self.clock += 1
        self._admit()
        chunks = self._fill()
        rows = self.rows
        count = rows.count
        if not chunks and not count:
            return
        self._make_room()
        logits = self._forward(chunks, rows, count)
        for chunk in chunks:
            chunk.kept.ids, chunk.kept.n = chunk.ids[: chunk.end], chunk.end
        if not count:
            return
        drawn = draw(logits, rows.draws(logits.shape[0]))
        ids, logprobs, entropies = (tensor[-count:].cpu().numpy() for tensor in drawn)
        if not np.isfinite(logprobs).all():
            raise InfraError("the model gave log-probs that are not finite; look at its weights for NaN or overflow")
        self.stats.output_tokens += count
        for row, stopped in rows.advance(ids, logprobs, entropies):
            job = rows.leave(row)
            assert isinstance(job, Job)
            self._finish(job, "stop" if stopped else "length")

    def _forward(self, chunks: list[Chunk], rows: Rows | None, keep: int) -> torch.Tensor:
        """Logits of the last `keep` tokens, at the end of [>= keep, V] (padded to a fixed size where deterministic)."""
        tokens = sum(chunk.end - chunk.begin for chunk in chunks) + (0 if rows is None else rows.count)
        if self.sizes:
            keep = next(size for size in self.sizes if size >= keep) if keep else 0
            tokens = next(size for size in self.sizes if size >= max(tokens, keep))
        ids, positions, plan = self.packer.pack(chunks, rows, tokens)
        self.stats.forwards += 1
        return self.model.run(ids, positions, plan, keep)

    def _admit(self) -> None:
        while self.waiting and len(self.filling) + self.rows.count < self.rows.capacity:
            job = self.waiting.popleft()
            request = job.request
            job.tokens = request.ids
            kept = self.sessions.get(request.session)
            if kept is None or kept.running:
                kept = Kept(request.session)
                self._evict()
                self.sessions.setdefault(request.session, kept)
            job.kept = kept
            kept.running, kept.used = True, self.clock
            kept.n = job.cached = min(kept.overlap(request.ids), job.need)
            kept.coming = job.tokens[: job.need]
            self.stats.cached_tokens += kept.n
            self.cache.seat(kept, job.need + 1)
            if kept.n == 0 and job.need:
                job.leader = self.prefixes.propose(kept, kept.coming)
            self.filling.append(job)

    def _fill(self) -> list[Chunk]:
        """Share what can be shared, turn requests whose prompt is cached into rows, and cut the others' next chunks."""
        self._share()
        budget = CHUNK if self.rows.count or self.sizes else 4 * CHUNK
        chunks, rest = [], []
        for job in self.filling:
            if job.kept.n >= job.need:
                self._start(job)
                continue
            rest.append(job)
            if job.leader is None and budget:
                end = min(job.need, job.kept.n + budget)
                chunks.append(Chunk(job.kept, job.tokens, job.kept.n, end))
                budget -= end - job.kept.n
        self.filling = rest
        return chunks

    def _start(self, job: Job) -> None:
        job.kept.coming = job.tokens[:0]
        if not job.versions or job.versions[-1][0] != self.version:
            job.versions.append((self.version, int(job.ids.size)))
        limit = min(job.request.sampling.max_tokens, self.max_context - int(job.request.ids.size))
        self.rows.enter(job, self.cache, limit)

    def _share(self) -> None:
        """Copy beginnings that their leaders have computed to those that wait for them."""
        ready: dict[tuple[int, int, int], list[Job]] = {}
        for job in self.filling:
            if job.leader is None:
                continue
            leader, n = job.leader
            if not leads(leader, job.tokens[:n]):
                job.leader = None
            elif leader.overlap(job.tokens[:n]) == n:
                assert job.kept.pool is not None
                ready.setdefault((id(leader), n, job.kept.pool.capacity), []).append(job)
        for (_, n, _), jobs in ready.items():
            source, pool = jobs[0].leader, jobs[0].kept.pool
            assert source is not None and source[0].pool is not None and pool is not None
            copy_slots(source[0].pool, source[0].slot, pool, [job.kept.slot for job in jobs], n)
            for job in jobs:
                self.stats.cached_tokens += n
                job.kept.ids, job.kept.n, job.leader = job.tokens[:n], n, None

    def _make_room(self) -> None:
        full = self.rows.outgrown()
        if full:
            self.cache.grow([self.rows.holder(row).kept for row in full])
            for row in full:
                self.rows.seat(row, self.rows.holder(row).kept, self.cache)
        if sum(pool.settle() for pool in self.cache.pools):
            for job in self.running():
                self.rows.seat(job.row, job.kept, self.cache)

    def _finish(self, job: Job, finish: FinishReason) -> None:
        kept, n = job.kept, int(job.ids.size)
        kept.running = False
        if kept.pool is not None:
            kept.pool.changed = True
        if self.sessions.get(job.request.session) is not kept:
            self._drop(kept)
        edges = [*(start for _, start in job.versions), n]
        job.done(
            Generation(
                ids=as_ids(job.ids),
                logprobs=as_floats(job.logprobs),
                finish=finish,
                versions=tuple(VersionRun(v, a, b) for (v, a), b in zip(job.versions, edges[1:], strict=True) if b > a),
                entropies=as_floats(job.entropies),
                entropy="exact",
                cached_tokens=job.cached,
            )
        )

    def _drop(self, kept: Kept) -> None:
        self.prefixes.forget(kept)
        self.cache.drop(kept)

    def _evict(self) -> None:
        """Keep at most four idle sessions a row: the least recently used quarter goes."""
        if len(self.sessions) < 4 * self.rows.capacity + 64:
            return
        idle = sorted((kept for kept in self.sessions.values() if not kept.running), key=lambda kept: kept.used)
        for kept in idle[: max(1, len(idle) // 4)]:
            self.release(kept.session)
