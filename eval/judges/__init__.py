"""What `python -m eval judge` is made of: tasks, the reading of replies, the back ends, the cache."""
