"""One engine process: receive, schedule, run, record, commit, send."""
