"""The statistics plane: what is counted, kept, broadcast, elected, checked and exposed."""
