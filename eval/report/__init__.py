"""Tables and pictures of finished runs: a comparison of two, a report of many."""
