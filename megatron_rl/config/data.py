"""Where prompts come from, and which column of a file is what."""

from __future__ import annotations

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from megatron_rl.config.base import Config


class Columns(Config):
    """What a file calls the parts of a row; null: by their own names. A list of messages may stand in `prompt`, too."""

    id: str | None = None
    prompt: str | None = None
    messages: str | None = None
    answer: str | None = None
    verifier: str | None = None
    domain: str | None = None
    metadata: str | None = None

    @property
    def named(self) -> dict[str, str]:
        return {key: column for key, column in self.model_dump().items() if column is not None}


class RowFormat(Config):
    """How the rows of all prompt files of a run are read."""

    chat_template: bool = False  # apply the tokenizer's; a plain prompt is one user message
    columns: Columns = Columns()
    verifier: str | None = None  # of rows that name none
    domain: str | None = None  # of rows that name none; null: "default"
    answer_after: str | None = None  # the answer is what follows the last of these, such as "####" in GSM8K; null: all of it


class Stage(Config):
    """So many steps on prompts of these domains. The next stage begins with an epoch of its own."""

    steps: PositiveInt | None = None  # null: all that are left of the run; for the last stage alone
    domains: tuple[str, ...] | None = Field(default=None, min_length=1)  # null: all


class Curriculum(Config):
    """Prompts leave the epochs to come while the pass rate of their latest group lies outside the band."""

    pass_rate: tuple[float, float]  # [low, high], both inside
    revisit: int = Field(ge=2)  # epochs after that group, the prompt is in one again, whatever its pass rate

    @model_validator(mode="after")
    def _band(self) -> Self:
        low, high = self.pass_rate
        if not 0 <= low <= high <= 1:
            raise ValueError(f"pass_rate=[{low:g}, {high:g}]: expected 0 <= low <= high <= 1")
        if (low, high) == (0, 1):
            raise ValueError("pass_rate=[0, 1] leaves no prompt out; null is no curriculum")
        return self


class DataConfig(RowFormat):
    # Prompts: a .jsonl or .parquet file, or a data set of the `datasets` library: datasets:NAME[:CONFIGURATION][@SPLIT]
    train: str
    eval: str | None = None
    tokenizer: str  # a SentencePiece .model file or a Hugging Face directory
    shuffle: bool = True
    stages: tuple[Stage, ...] = ()  # one after the other, run.steps in all; none: all domains in all steps
    curriculum: Curriculum | None = None

    @model_validator(mode="after")
    def _one_open_end(self) -> Self:
        for number, stage in enumerate(self.stages[:-1]):
            if stage.steps is None:
                raise ValueError(f"stages.{number}.steps: null, but only the last stage may take all steps that are left")
        return self


class EvalData(RowFormat):
    eval: str  # as data.train
    tokenizer: str | None = None  # null: the checkpoint's own
