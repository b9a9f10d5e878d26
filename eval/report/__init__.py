"""Tables and pictures of finished runs: a comparison of two policies, a report of several."""
