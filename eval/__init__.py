"""Programs that judge: `python -m eval {generate,reward,judge,ifeval,summaries,chat,compare,report,...}`."""
