"""The audit of a live deployment: scrape it, check the laws (`metrics.laws`), print a table.

    python -m metrics.audit --url http://127.0.0.1:8000

The address is the public one: only there do the API servers' figures add up to the whole, as the laws need them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import urllib.request
from collections.abc import Sequence

from prometheus_client.parser import text_string_to_metric_families

from metrics.laws import COUNTERS, Finding, LabelSet, Samples, Status, check, check_running, is_idle

__all__ = ["AuditError", "Finding", "Status", "check", "check_running", "is_idle", "main", "parse_samples"]


class AuditError(Exception):
    """The deployment cannot be audited; the text says why in one line."""


def parse_samples(text: str) -> dict[tuple[str, LabelSet], float]:
    """The samples of a text exposition; raises ValueError."""
    return {
        (sample.name, frozenset(sample.labels.items())): float(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def main(argv: Sequence[str] | None = None) -> int:
    """0: every applicable law holds; 1: a law is violated; 2: bad use, or nothing to audit."""
    options = _parser().parse_args(argv)
    try:
        idle, findings = _audit(options.url, options.wait, options.interval)
    except AuditError as error:
        print(f"metrics.audit: {error}", file=sys.stderr)
        return 2
    state = "idle: laws are exact" if idle else f"not idle within {options.wait:g} s: laws are inequalities"
    print(f"{options.url} is {state}")
    print(format_table(findings))
    return int(any(finding.status is Status.VIOLATED for finding in findings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m metrics.audit", description="Check a live deployment's laws.")
    parser.add_argument("--url", required=True, help="the deployment's public address, e.g. http://127.0.0.1:8000")
    parser.add_argument("--wait", type=_seconds, default=10.0, help="seconds to wait until it is idle (default 10)")
    parser.add_argument(
        "--interval",
        type=_seconds,
        default=0.5,
        help="seconds between two scrapes: at least two publish intervals of an idle engine (default 0.5)",
    )
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"not a number of seconds: {text}")
    return seconds


def _audit(url: str, wait_s: float, interval_s: float) -> tuple[bool, list[Finding]]:
    """Wait until the deployment is idle, but not for ever. (was idle, findings); raises AuditError."""
    deadline = time.monotonic() + wait_s
    earlier = _scrape(url)
    while True:
        time.sleep(interval_s)
        later = _scrape(url)
        if is_idle(earlier, later):
            return True, check(later, idle=True)
        if time.monotonic() >= deadline:
            return False, check_running(earlier, later)
        earlier = later


def _scrape(url: str) -> Samples:
    """Scrape once; raises AuditError."""
    base = url if "://" in url else f"http://{url}"
    try:
        address = f"{base.rstrip('/').removesuffix('/metrics')}/metrics/engines"
        with urllib.request.urlopen(address, timeout=10) as answer:
            samples = parse_samples(answer.read().decode())
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise AuditError(f"no metrics at {url}: {error}") from error
    names = {name for name, _ in samples}
    if names.isdisjoint(COUNTERS) and "wholebatch:exporter_up" in names:
        raise AuditError(f"nothing to audit at {url}: it runs with --disable-log-stats and exports no counters")
    if names.isdisjoint(COUNTERS):
        raise AuditError(f"no series of a wholebatch deployment at {url}")
    return samples


def format_table(findings: Sequence[Finding]) -> str:
    """Write one line a finding."""
    lines = []
    for f in findings:
        status = f"VIOLATED by {f.imbalance:g}" if f.status is Status.VIOLATED else str(f.status)
        engine = f"engine {f.engine}" if f.engine else ""
        lines.append(f"{f.law:16s} {engine:10s} {status:20s} {f.sentence}{': ' + f.detail if f.detail else ''}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
