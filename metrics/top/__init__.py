"""A live deployment in a terminal."""
