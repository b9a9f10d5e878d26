"""Trains TRL's GRPO on a workload of `python -m eval speed`: README.md has how it is installed and called."""

from pathlib import Path
from typing import Any

from harness import StepClock, Work, even_share, run_script

PACKAGES = "torch==2.13.0 trl==1.16.0 transformers==5.23.0 datasets==5.2.0 accelerate==1.15.0"


def train(work: Work, steps: int, clock: StepClock) -> list[float]:
    """Trains for so many steps, all completions of a step as one batch; returns their mean length in each step."""
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOTrainer

    class Steps(TrainerCallback):
        """Tells the clock when training begins and when the optimizer has made a step."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clock.end()

    def reward(completions: list[str], **_: Any) -> list[float]:
        return even_share(completions)

    policy = work.folder / "trl" / "policy"
    save_random_policy(work, policy)
    trainer = GRPOTrainer(
        model=str(policy),  # and with a KL penalty the reference policy, which is read from there too
        reward_funcs=reward,
        args=training_options(work, steps),
        train_dataset=Dataset.from_dict({"prompt": work.prompts}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(work.folder / work.tokenizer, padding_side="left"),
        callbacks=[Steps()],
    )
    trainer.train()
    logged = "completions/mean_length"
    return [row[logged] for row in trainer.state.log_history if logged in row]


def save_random_policy(work: Work, directory: Path) -> None:
    """Writes a policy with random weights; a completion ends with any of the work's end tokens."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    policy = Qwen3ForCausalLM(Qwen3Config.from_dict(work.network)).to(getattr(torch, work.dtype))
    policy.generation_config = GenerationConfig(eos_token_id=work.end_ids, pad_token_id=work.pad_id)
    policy.save_pretrained(directory)


def training_options(work: Work, steps: int) -> Any:
    """Returns the settings of TRL that do the same work, and none that is not measured."""
    import torch
    from trl import GRPOConfig

    beta1, beta2 = work.adam_betas
    return GRPOConfig(
        output_dir=str(work.folder / "trl" / "run"),
        max_steps=steps,
        per_device_train_batch_size=work.rows,
        num_generations=work.num_generations,
        max_completion_length=work.max_completion_length,
        shuffle_dataset=False,
        temperature=work.temperature,
        top_p=1.0,
        top_k=0,
        beta=work.beta,
        epsilon=work.clip,
        loss_type="dapo",  # the mean over all tokens
        optim="adamw_torch",
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_epsilon=work.adam_epsilon,
        weight_decay=work.weight_decay,
        max_grad_norm=work.max_grad_norm,
        model_init_kwargs={"dtype": work.dtype},
        bf16=False,  # nothing is cast on the way
        gradient_checkpointing=False,  # faster, where the activations fit
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    raise SystemExit(run_script("run_trl.py", PACKAGES, train))
