"""Runs tried by force: killed, damaged, on full disks; each script prints a table and exits with 1 if a case fails."""
