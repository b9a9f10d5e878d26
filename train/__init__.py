"""Programs that learn: `python -m train {sft,reward,policy} --config FILE`."""
