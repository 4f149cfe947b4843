"""Who exports an engine's series: at most one API server at every instant, by lease, with no shared clock. Pure.

An engine's `Granter` writes a grant into every snapshot, an API server's `Holder` (one for each engine) reads it.

    API server   heartbeat k, stamped s_k on its clock ──►   engine   received at r_k on its clock
    API server   ◄── snapshot: grant to me, echo k           engine
    may export until s_k + lease (its clock)                 grants to another from r_k + 1.05 lease (its clock)

Invariant: k is sent before it is received, so the holder's right always ends before the next one's begins, as long as
the two clocks' rates differ by less than the margin. Whatever is lost, late, repeated or reordered only makes rights
shorter: an older snapshot is stale, an older echo ends earlier, and an echo counts only in the incarnation it names.

Live is who has sent a heartbeat within a lease that acknowledges a snapshot published less than a lease before it
arrived: a process that can speak but not hear is not live. The holder keeps its grant while it is live; otherwise
the lowest live index gets it. The caller must know that a process index is started only after its predecessor's end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from metrics.snapshot import NOWHERE, Grant, Heartbeat, Resign, Snapshot, Term, join

# How much longer than the lease the granter waits. Covers clocks of which one runs up to 2 % fast, the other 2 % slow.
LEASE_MARGIN: Final = 1.05
MAX_REMEMBERED: Final = 1024  # P9: heartbeats or publications of one lease; losing older ones only shortens rights
NEVER: Final = float("-inf")


@dataclass(slots=True)
class _Candidate:
    """The newest incarnation known of one API server, and its newest heartbeat."""

    incarnation: int
    touched_at: float  # when this entry last changed
    number: int = 0
    live_at: float = NEVER  # when the newest heartbeat came, if it made the candidate live


class Granter:
    """The engine's side: heartbeats, resignations and ends in; the grant of each snapshot out.

    Times are the engine's monotonic clock. Call `on_publish` for every snapshot, just before it is sent."""

    __slots__ = ("_candidates", "_echo", "_grant", "_hold_s", "_lease_s", "_may_grant_at", "_published", "_term")

    def __init__(self, engine_incarnation: int, lease_s: float, now: float) -> None:
        self._lease_s = lease_s
        self._hold_s = LEASE_MARGIN * lease_s
        self._term: Term = (engine_incarnation, 0)
        self._grant: Grant | None = None
        self._echo = 0
        # Until then another may export: at first, by a grant of an earlier incarnation of this engine.
        self._may_grant_at = NEVER if engine_incarnation <= 1 else now + self._hold_s
        self._candidates: dict[int, _Candidate] = {}
        self._published: dict[int, float] = {}  # sequence -> when, of the last lease

    @property
    def grant(self) -> Grant | None:
        """The grant of the last snapshot."""
        return self._grant

    def on_heartbeat(self, heartbeat: Heartbeat, now: float) -> None:
        """A heartbeat has been received."""
        candidate = self._candidate(heartbeat.api_server, heartbeat.incarnation, now)
        if candidate is None or heartbeat.number <= candidate.number:
            return  # of an incarnation that has ended; or a repeated or overtaken one
        candidate.number = heartbeat.number
        candidate.touched_at = now
        candidate.live_at = now if self._is_fresh(heartbeat, now) else NEVER

    def on_resign(self, resign: Resign, now: float) -> None:
        """The holder has stopped exporting. Says nothing about any other term than the one it names."""
        grant = self._grant
        if grant is None or grant.term != resign.term or not grant.names(resign.api_server, resign.incarnation):
            return
        self._release()
        candidate = self._candidate(resign.api_server, resign.incarnation, now)
        if candidate is not None:
            candidate.live_at = NEVER  # until its next heartbeat
            candidate.touched_at = now

    def on_ended(self, api_server: int, incarnation: int, now: float) -> None:
        """The supervisor has seen this incarnation's exit."""
        self._candidate(api_server, incarnation + 1, now)

    def on_publish(self, sequence: int, now: float) -> tuple[Grant | None, int]:
        """The grant and the echo to put into the snapshot that is about to be sent with this sequence."""
        self._forget(now)
        self._published[sequence] = now
        if self._grant is not None:
            self._renew(self._grant)
        if now >= self._may_grant_at:
            self._elect(now)
        return self._grant, self._echo

    def _renew(self, grant: Grant) -> None:
        """Let the grant rest on the holder's newest heartbeat."""
        holder = self._candidates.get(grant.api_server)
        if holder is not None and holder.incarnation == grant.incarnation and holder.live_at != NEVER:
            self._rest_on(holder)

    def _elect(self, now: float) -> None:
        """Nobody's right can last any longer: the lowest live index gets the grant, or nobody."""
        self._grant, self._echo = None, 0
        live = [index for index, c in self._candidates.items() if now - c.live_at < self._lease_s]
        if not live:
            return
        index = min(live)
        self._term = (self._term[0], self._term[1] + 1)
        self._grant = Grant(term=self._term, api_server=index, incarnation=self._candidates[index].incarnation)
        self._rest_on(self._candidates[index])

    def _rest_on(self, holder: _Candidate) -> None:
        self._echo = holder.number
        self._may_grant_at = holder.live_at + self._hold_s

    def _release(self) -> None:
        """Give the grant free: the holder's right has ended for sure."""
        self._grant, self._echo = None, 0
        self._may_grant_at = NEVER

    def _candidate(self, api_server: int, incarnation: int, now: float) -> _Candidate | None:
        """The entry of this incarnation; None when a later one is known. The first sign of a later incarnation is the
        end of all earlier ones."""
        candidate = self._candidates.get(api_server)
        if candidate is not None and candidate.incarnation > incarnation:
            return None
        if candidate is None or candidate.incarnation < incarnation:
            candidate = self._candidates[api_server] = _Candidate(incarnation, touched_at=now)
        grant = self._grant
        if grant is not None and grant.api_server == api_server and grant.incarnation < incarnation:
            self._release()
        return candidate

    def _is_fresh(self, heartbeat: Heartbeat, now: float) -> bool:
        incarnation, sequence = heartbeat.ack
        published_at = self._published.get(sequence, NEVER)
        return incarnation == self._term[0] and now - published_at < self._lease_s

    def _forget(self, now: float) -> None:
        """Drop what can no longer matter. An entry untouched for a lease is no loss: whatever is still under way from
        that time acknowledges snapshots older than a lease, and so revives nobody."""
        _drop_old(self._published, now - self._lease_s)
        for index in [i for i, c in self._candidates.items() if now - c.touched_at > self._lease_s]:
            del self._candidates[index]


class Holder:
    """One API server's side, for one engine: snapshots in; heartbeats and the right to export out.

    Times are the API server's clock, one that goes on while the process is stopped and while the host sleeps
    (CLOCK_BOOTTIME). `snapshot` is the newest one received."""

    __slots__ = ("_incarnation", "_index", "_lease_s", "_number", "_resigned", "_sent", "expires_at", "snapshot")

    def __init__(self, api_server: int, incarnation: int, lease_s: float) -> None:
        self._index = api_server
        self._incarnation = incarnation
        self._lease_s = lease_s
        self._number = 0
        self._sent: dict[int, float] = {}  # number -> stamp, of the last lease
        self._resigned: Term = (0, 0)
        self.snapshot: Snapshot | None = None
        self.expires_at = NEVER

    @property
    def term(self) -> Term | None:
        """The term of the grant that this process holds, expired or not."""
        named = self._named_term()
        return None if named is None or named <= self._resigned else named

    def heartbeat(self, now: float) -> Heartbeat:
        """The next heartbeat. Call it before sending: `now` is when the lease that may rest on it begins."""
        _drop_old(self._sent, now - self._lease_s)
        self._number += 1
        self._sent[self._number] = now
        # To acknowledge a grant that has been resigned (the message is under way, or lost) would keep it alive unused.
        is_named_in_vain = self.term != self._named_term()
        ack = NOWHERE if self.snapshot is None or is_named_in_vain else self.snapshot.position
        return Heartbeat(api_server=self._index, incarnation=self._incarnation, number=self._number, ack=ack)

    def on_snapshot(self, snapshot: Snapshot, now: float) -> bool:
        """A snapshot has been received; False when it is stale: not newer than the one held."""
        if join(self.snapshot, snapshot) is not snapshot:
            return False
        _drop_old(self._sent, now - self._lease_s)
        self.snapshot = snapshot
        # P2: the lease runs from the *sending* of the echoed heartbeat, however late the snapshot comes.
        sent_at = NEVER if self._named_term() is None else self._sent.get(snapshot.echo, NEVER)
        self.expires_at = sent_at + self._lease_s
        return True

    def may_export(self, now: float) -> bool:
        """Whether the engine's series may be copied into an answer at this instant."""
        return now < self.expires_at and self.term is not None

    def resign(self) -> Resign | None:
        """Stop exporting, for good in this term; what to tell the engine, None if there is nothing to give up.

        The message may be lost: whoever leaves calls this in place of every further heartbeat."""
        named = self._named_term()
        if named is None:
            return None
        self._resigned = max(self._resigned, named)
        return Resign(api_server=self._index, incarnation=self._incarnation, term=named)

    def _named_term(self) -> Term | None:
        """The term at which the newest snapshot names this process."""
        grant = None if self.snapshot is None else self.snapshot.grant
        return grant.term if grant is not None and grant.names(self._index, self._incarnation) else None


def _drop_old(times: dict[int, float], before: float) -> None:
    """Forget entries (in order of time) from before an instant, and the oldest of too many."""
    while times:
        oldest = next(iter(times))
        if times[oldest] >= before and len(times) < MAX_REMEMBERED:
            return
        del times[oldest]
