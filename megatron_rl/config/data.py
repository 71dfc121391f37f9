"""Where prompts come from, and which column of a file is what."""

from __future__ import annotations

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


class DataConfig(RowFormat):
    # Prompts: a .jsonl or .parquet file, or a data set of the `datasets` library: datasets:NAME[:CONFIGURATION][@SPLIT]
    train: str
    eval: str | None = None
    tokenizer: str  # a SentencePiece .model file or a Hugging Face directory
    shuffle: bool = True


class EvalData(RowFormat):
    eval: str  # as data.train
    tokenizer: str | None = None  # null: the checkpoint's own
