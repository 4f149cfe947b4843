"""The statistics plane: what is counted, kept, broadcast, elected, checked and exposed.

It imports neither `engine` nor `frontend` and is of use without them; `metrics/README.md` says how.
"""
