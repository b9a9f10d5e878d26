"""Where a run writes its metrics, texts and profile."""

from dataclasses import dataclass, field

from train.config.checks import check_at_least


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    start: int = 3  # the first step of the trace; the first two compile
    steps: int = 2  # how many steps

    def __post_init__(self) -> None:
        check_at_least(self, 1, "start", "steps")

    @property
    def last(self) -> int:
        """The last step of the trace."""
        return self.start + self.steps - 1


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    tensorboard: bool = True  # write metrics to output_dir/tensorboard too
    wandb_project: str | None = None  # log to this Weights & Biases project too; the key comes from the environment
    mlflow_experiment: str | None = None  # log to this MLflow experiment too; MLFLOW_TRACKING_URI says where it is
    trackio_project: str | None = None  # log to this Trackio project too
    # trackers of your own: dotted paths of classes with the methods of `train.run.trackers.Sink`
    trackers: list[str] = field(default_factory=list)
    progress: bool = True  # a progress bar, on a terminal
    completions_every: int = 0  # steps between tables of the sampled completions with their rewards; 0: none
    profile: ProfileConfig | None = None  # a trace of some steps, e.g. {start: 3, steps: 2}; null: none

    def __post_init__(self) -> None:
        check_at_least(self, 0, "completions_every")
        for name in ("mlflow_experiment", "trackio_project"):
            if getattr(self, name) == "":
                raise ValueError(f"log.{name}: expected a name, or null, got ''")
