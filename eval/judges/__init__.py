"""`python -m eval judge`: tasks, back ends, parsing of replies, results, the cache of replies."""
