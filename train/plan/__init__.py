"""Shows, before a run, its data, its programs and the memory it needs; nothing is trained."""
