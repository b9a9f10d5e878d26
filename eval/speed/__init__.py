"""How long a step takes, and beside other trainers."""
