"""One engine process: receive, schedule, run, record, commit, send.

Street: both. Tokens leave on one and counts on the other, always in this order (P4): count, commit, then hand over. A
second thread, the beacon, broadcasts what the loop has committed, whatever the loop is doing.
"""
