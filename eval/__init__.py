"""Programs that judge: `python -m eval {generate,reward,compare,report}`."""
