"""What an API server consists of once the deployment's facts are known: its tally, its engines, its share of /metrics.

Made once, when the first engine has said what it is; until then the routes answer 503. Opening the tally closes the
books of this index's earlier incarnation.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import TYPE_CHECKING, Final

import zmq

from engine.wire import QUEUED_REQS, QUEUED_TOKENS, Facts, ServerConfig
from frontend.api import Conversations, OpenAIService, Terms
from frontend.counters import GroupCommit, RequestRecord
from frontend.deployment_view import DeploymentView
from frontend.engines import Admission, Asked, EngineClients, Identity, InFlight, Limits, Observer
from frontend.scrape import Exporter, Layouts, Pool, PoolLoad, ScrapeResponder, boottime, load_report
from frontend.text import Tokenizer
from frontend.tracing import RequestTrace
from metrics.bulkhead import Bulkhead
from metrics.catalogue import API_SERVER, ENGINE
from metrics.exposition import Format
from metrics.files import ExemplarStore, Origin, TallyStore, exemplars_path, tally_path
from metrics.layout import Histogram
from metrics.usage import ProcessMetrics

if TYPE_CHECKING:
    from frontend.tracing.otlp import Telemetry

log = logging.getLogger(__name__)

HOUSEKEEPING_S: Final = 1.0


class Services:
    """What an API server offers, wired. Raises StoreError where the tally cannot be opened."""

    def __init__(
        self,
        config: ServerConfig,
        facts: Facts,
        context: zmq.Context[zmq.Socket[bytes]],
        view: DeploymentView,
        tokenizer: Tokenizer,
    ) -> None:
        layouts = Layouts(config.shape(facts.max_model_len))
        identity = Identity(index=config.index, incarnation=config.incarnation)
        self._view = view
        self._num_rejected_tables = 0
        self._store = _open_store(config, layouts)
        self._exemplars: ExemplarStore | None = None
        self.record = RequestRecord(self._store.tally, layouts[API_SERVER], config.num_engines, self._exemplify)
        self.record.close_books()
        self._bulkhead = Bulkhead(self.record.fault, log)
        if config.stats.log_stats:
            with self._bulkhead.around("record"):
                path = exemplars_path(config.directory, API_SERVER, config.index)
                self._exemplars = ExemplarStore(path, layouts[API_SERVER], time.time)
        self.group = GroupCommit(self._commit, self._bulkhead)
        self.group.now()
        self._telemetry = _telemetry(config)
        self.clients = EngineClients(
            context,
            config.directory,
            identity,
            self.record,
            self.group,
            self._make_admission(config),
            observe=None if self._telemetry is None else self._observe,
        )
        self.exporter = Exporter(
            context,
            config.directory,
            identity,
            self.record,
            self._bulkhead,
            layouts[ENGINE],
            lease_s=config.stats.lease_s,
            num_api_servers=config.num_api_servers,
            on_load=self.clients.on_load,
        )
        self.scrape = self._make_scrape(config, facts, identity, layouts)
        self.openai = self._make_api(config, facts, tokenizer)
        self._process = ProcessMetrics(self._store.tally)
        self._housekeeping = asyncio.create_task(self._keep_house())
        self.pool = Pool(layouts[ENGINE], facts)
        self._unsubscribe = view.subscribe(self.clients.on_deployment)

    @property
    def is_busy(self) -> bool:
        return any(engine.num_in_flight for engine in self.record.engines)

    def pool_figures(self) -> PoolLoad | None:
        """Of the engines heard; the same in every API server."""
        return self.pool.figures(self.exporter.heard())

    def _make_scrape(self, config: ServerConfig, facts: Facts, identity: Identity, layouts: Layouts) -> ScrapeResponder:
        return ScrapeResponder(
            config.directory,
            identity,
            layouts,
            facts,
            self.exporter,
            lambda: self._view.table,
            log_stats=config.stats.log_stats,
            clock=boottime,
            pool=self._pool_samples if config.stats.metrics_view == "pool" else None,
        )

    def _pool_samples(self) -> list[tuple[str, dict[str, str], float]]:
        return self.pool.samples(self.pool_figures())

    def pool_exposition(self, form: Format) -> bytes:
        """The engines as one, as text."""
        return self.pool.exposition(self.pool_figures(), form)

    def load_report(self, asked: str) -> str | None:
        """The pool's figures for the answer to a request; None where there are none or no such format."""
        with self._bulkhead.around("scrape"):
            figures = self.pool_figures()
            return None if figures is None else load_report(asked, figures)
        return None

    async def close(self) -> None:
        """After the last request: leave the engines, commit, let go of everything."""
        self._housekeeping.cancel()
        self._unsubscribe()
        self.clients.close()
        await self.exporter.close()
        if self._telemetry is not None:
            await self._telemetry.close()
        self.group.now()
        self._store.close()
        if self._exemplars is not None:
            self._exemplars.close()

    def _commit(self) -> None:
        self.record.flush()
        self._store.commit()

    def _make_api(self, config: ServerConfig, facts: Facts, tokenizer: Tokenizer) -> OpenAIService:
        return OpenAIService(
            clients=self.clients,
            group=self.group,
            tokenizer=tokenizer,
            served_model_names=config.model.served_model_names,
            terms=terms_of(config, facts),
            conversations=_conversations(config, tokenizer),
        )

    def _make_admission(self, config: ServerConfig) -> Admission:
        return Admission(
            queue_limits(config),
            own=self._own_in_flight,
            others=self._others_in_flight,
            announce=self._announce,
            on_rejected=self._on_rejected,
        )

    def _observe(self, asked: Asked) -> Observer:
        """Tells the telemetry of each request's end."""
        assert self._telemetry is not None, "nobody asks for traces"
        return RequestTrace(asked, self._telemetry.tell, self._bulkhead)

    async def _keep_house(self) -> None:
        while True:
            with self._bulkhead.around("process"):
                self._process.update()
            while self._num_rejected_tables < self._view.num_rejected:
                self._num_rejected_tables += 1
                self.record.wire_rejected("deployment")
            if self._telemetry is not None:
                for _ in range(self._telemetry.take_faults()):
                    self.record.fault("tracing")
            self.group.now()
            await asyncio.sleep(HOUSEKEEPING_S)

    def _own_in_flight(self) -> InFlight:
        engines = self.record.engines
        return InFlight(sum(e.num_in_flight for e in engines), sum(e.num_prefill_tokens for e in engines))

    def _others_in_flight(self) -> InFlight:
        with self._bulkhead.around("scrape"):
            return self.scrape.in_flight(including_own=False)
        return InFlight(0, 0)

    def _announce(self, more: InFlight) -> None:
        """On the gauges of one engine: whoever keeps a limit adds them up. What is taken back is committed with what
        is submitted in its place, so that nobody sees neither."""
        self.record.engines[0].announce(int(more.num_sequences), int(more.num_prefill_tokens))
        if more.num_sequences > 0:
            self.group.now()

    def _exemplify(self, histogram: Histogram, value: float, origin: Origin) -> None:
        if self._exemplars is not None:
            with self._bulkhead.around("record"):
                self._exemplars.keep(histogram, value, origin)

    def _on_rejected(self, limit: str) -> None:
        self.record.rejected(limit)
        self.group.soon()


def queue_limits(config: ServerConfig) -> Limits:
    """Those of the operator, 0 for none, or else so much for each engine."""
    reqs, tokens = config.http.max_num_queued_reqs, config.http.max_num_queued_tokens
    if reqs is None:
        reqs = config.num_engines * max(QUEUED_REQS, 2 * config.scheduler.max_num_seqs)
    if tokens is None:
        tokens = config.num_engines * QUEUED_TOKENS
    return Limits(max_num_queued_reqs=reqs or None, max_num_queued_tokens=tokens or None)


def terms_of(config: ServerConfig, facts: Facts) -> Terms:
    scheduler = config.scheduler
    return Terms(
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocab_size,
        max_sequences=config.http.max_num_seqs_per_request,
        max_prompt_tokens=None if scheduler.enable_chunked_prefill else scheduler.max_num_batched_tokens,
        allows_priority=scheduler.scheduling_policy == "priority",
        always_usage=config.http.enable_force_include_usage,
    )


def _telemetry(config: ServerConfig) -> Telemetry | None:
    """None where nobody asks for it: then OpenTelemetry is not even imported."""
    if not config.stats.is_traced:
        return None
    from frontend.tracing.otlp import Telemetry

    return Telemetry(
        instance=f"{socket.gethostname()}:{config.port}/{API_SERVER}-{config.index}",
        address=config.http.host,
        port=config.port,
        traces_endpoint=config.stats.otlp_traces_endpoint,
        metrics_endpoint=config.stats.otlp_metrics_endpoint,
    )


def _open_store(config: ServerConfig, layouts: Layouts) -> TallyStore:
    store = TallyStore.open(
        tally_path(config.directory, API_SERVER, config.index),
        layouts[API_SERVER],
        incarnation=config.incarnation,
        now_unix=time.time(),
        gauges_only=not config.stats.log_stats,
    )
    if store.set_aside is not None:
        log.error("event=tally_set_aside reason=%r", store.set_aside)
    return store


def _conversations(config: ServerConfig, tokenizer: Tokenizer) -> Conversations:
    chosen = config.chat.reasoning_parser
    return Conversations(
        tokenizer,
        tool_format=config.chat.tool_call_parser,
        reasons=None if chosen == "auto" else chosen == "think",
        trusts_control_tokens=config.chat.trust_control_tokens_in_chats,
    )
