"""A live deployment in a terminal.

Street: truth, beyond its end. It knows what any scraper may know, and nothing else.
"""
