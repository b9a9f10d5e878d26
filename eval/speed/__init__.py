"""`python -m eval speed`: seconds and memory of a training step, also beside other trainers."""
