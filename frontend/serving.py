"""Everything of an API server that needs the deployment's facts: its tally, its engines, its share of /metrics.

Made once, when the first engine has said what it is; until then the routes answer 503. Opening the tally closes the
books of this index's earlier incarnation.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

import zmq

from frontend.config import ServerConfig
from frontend.deployment_view import DeploymentView
from frontend.engine_client import EngineClients, Identity
from frontend.exporter import Exporter, boottime
from frontend.group_commit import GroupCommit
from frontend.openai import OpenAIService
from frontend.request_record import RequestRecord
from frontend.scrape import Layouts, Scrape
from frontend.tokenizer import Tokenizer
from metrics.deployment import API_SERVER, ENGINE, Facts
from metrics.process import ProcessMetrics
from metrics.store import TallyStore, tally_path

log = logging.getLogger(__name__)

HOUSEKEEPING_S: Final = 1.0


class Serving:
    """The parts, wired. Raises StoreError where the tally cannot be opened."""

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
        self._has_logged_fault = False
        self._num_rejected_tables = 0
        self._store = _open_store(config, layouts)
        self.record = RequestRecord(self._store.tally, layouts[API_SERVER], config.num_engines)
        self.record.close_books()
        self.group = GroupCommit(self._store.commit, self._on_commit_fault)
        self.group.now()
        self.clients = EngineClients(context, config.directory, identity, self.record, self.group)
        self.exporter = Exporter(
            context,
            config.directory,
            identity,
            self.record,
            layouts[ENGINE],
            lease_s=config.lease_s,
            admin_addresses=config.admin_addresses,
            on_load=self.clients.on_load,
        )
        self.scrape = Scrape(
            config.directory,
            config.index,
            layouts,
            facts,
            self.exporter,
            lambda: view.table,
            log_stats=config.log_stats,
            clock=boottime,
        )
        self.openai = OpenAIService(
            clients=self.clients,
            tokenizer=tokenizer,
            served_model_names=config.served_model_names,
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
        )
        self._process = ProcessMetrics(self._store.tally)
        self._housekeeping = asyncio.create_task(self._keep_house())
        view.subscribe(self.clients.on_deployment)

    @property
    def is_busy(self) -> bool:
        return any(engine.num_in_flight for engine in self.record.engines)

    async def close(self) -> None:
        """After the last request: leave the engines, commit, let go of everything."""
        self._housekeeping.cancel()
        self.clients.close()
        await self.exporter.close()
        self.group.now()
        self._store.close()

    async def _keep_house(self) -> None:
        while True:
            self._process.update()
            while self._num_rejected_tables < self._view.num_rejected:
                self._num_rejected_tables += 1
                self.record.wire_rejected("deployment")
            self.group.now()
            await asyncio.sleep(HOUSEKEEPING_S)

    def _on_commit_fault(self, error: Exception) -> None:
        self.record.fault("commit")
        if not self._has_logged_fault:
            self._has_logged_fault = True
            log.error("event=bulkhead where=commit error=%r further=counted_only", str(error))


def _open_store(config: ServerConfig, layouts: Layouts) -> TallyStore:
    store = TallyStore.open(
        tally_path(config.directory, API_SERVER, config.index),
        layouts[API_SERVER],
        incarnation=config.incarnation,
        now_unix=time.time(),
        gauges_only=not config.log_stats,
    )
    if store.set_aside is not None:
        log.error("event=tally_set_aside reason=%r", store.set_aside)
    return store
