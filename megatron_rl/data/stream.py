"""The endless stream of prompts that a run draws from: stage after stage, epoch after epoch.

A group is `<epoch>:<prompt id>`, and epochs count over the whole run. An epoch is made of the prompts of the stage's domains, less
those that the curriculum leaves out when it starts. A stage starts with an epoch of its own: what the last epoch of the stage
before had not offered, or had got back, is offered no more. Groups of it that are under way go on.

Invariants:
- a group id is offered twice only if it was given back between;
- an epoch that no stage cuts short offers each prompt it is made of exactly once, whatever was saved, loaded and given back;
- a stage offers prompts of its domains alone;
- what an epoch is made of depends on the stage and on the history at its start, its order on (seed, epoch, ids) alone;
- a stream goes on only over the prompts and the seed it was saved with, and then as if it had not been interrupted;
- taking and giving back cost the same with a million prompts; the start of an epoch does not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rl.config.data import Curriculum, Stage
from megatron_rl.config.errors import UserError
from megatron_rl.data.history import PassHistory, packed, unpacked
from megatron_rl.data.order import shuffled
from megatron_rl.data.prompts import fingerprint
from megatron_rl.data.stages import refuse_unknown_domains, stage_at
from megatron_rl.types import Prompt, Score

log = logging.getLogger(__name__)
ONE_STAGE = (Stage(),)


class PromptStream:
    """ports.Prompts over a fixed set of prompts. Their numbers are those of their ids in order, whatever the order of the file."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        shuffle: bool = True,
        stages: Sequence[Stage] = (),
        curriculum: Curriculum | None = None,
    ) -> None:
        self.prompts = sorted(prompts, key=lambda prompt: prompt.id)
        self._number = {prompt.id: number for number, prompt in enumerate(self.prompts)}
        if not prompts or len(self._number) < len(prompts):
            raise ValueError(f"{len(prompts)} prompts with {len(self._number)} different ids")
        refuse_unknown_domains(stages, prompts)
        self._file_order = [self._number[prompt.id] for prompt in prompts]
        self._seed, self._shuffle, self._has_stages = seed, shuffle, bool(stages)
        self._stages, self._curriculum = stages or ONE_STAGE, curriculum
        self._fingerprint = fingerprint(prompts)
        self.history = PassHistory(len(prompts))
        self._epoch = -1
        self._start_stage(0)

    def begin(self, version: int) -> None:
        stage = stage_at(self._stages, version)
        if (stage, self._stages[stage].domains) != (self._stage, self._domains):
            self._start_stage(stage)

    def take(self) -> tuple[str, Prompt]:
        if self._given_back:
            group_id = next(iter(self._given_back))
            del self._given_back[group_id]
            return group_id, self.prompts[self._parsed(group_id)[1]]
        if self._position == len(self._order):
            self._start_epoch()
        prompt = self.prompts[self._order[self._position]]
        self._position += 1
        return f"{self._epoch}:{prompt.id}", prompt

    def give_back(self, group_id: str) -> None:
        """The group was dropped before it trained: offer its prompt again, next, under the same group id; not if a stage has
        begun since."""
        epoch, number = self._parsed(group_id)
        was_taken = epoch < self._epoch or (epoch == self._epoch and 0 <= self._place[number] < self._position)
        if group_id in self._given_back or not was_taken:
            raise ValueError(f"group {group_id} was not taken from this stream")
        if epoch >= self._stage_epoch:
            self._given_back[group_id] = None

    def judged(self, group_id: str, scores: Sequence[Score]) -> None:
        epoch, number = self._parsed(group_id)
        self.history.record(number, epoch, scores)

    def metrics(self) -> dict[str, float]:
        numbers = {"data/epoch": float(self._epoch), "data/prompts_seen_fraction": self.history.seen / len(self.prompts)}
        if self._has_stages:
            numbers["data/stage"] = float(self._stage)
        if self._curriculum:
            numbers["data/left_out"] = float(self._left_out)
        return numbers

    def _parsed(self, group_id: str) -> tuple[int, int]:
        """Its epoch and its prompt's number."""
        epoch, _, id = group_id.partition(":")
        if not epoch.isdecimal() or id not in self._number:
            raise ValueError(f"group {group_id} was not taken from this stream")
        return int(epoch), self._number[id]

    def _start_stage(self, stage: int) -> None:
        self._stage, self._domains = stage, self._stages[stage].domains
        self._stage_epoch = self._epoch + 1
        self._given_back: dict[str, None] = {}  # in order
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._epoch += 1
        members = self._of_the_stage()
        if self._curriculum:
            low, high = self._curriculum.pass_rate
            kept = members & ~self.history.outside(low, high, since=self._epoch - self._curriculum.revisit + 1)
            if kept.any():
                members = kept
            else:
                log.warning("data.curriculum: epoch %d would be empty; it offers all prompts of the stage", self._epoch)
        self._arrange(members, position=0)

    def _of_the_stage(self) -> NDArray[np.bool_]:
        domains = self._domains
        return np.array([domains is None or prompt.domain in domains for prompt in self.prompts])

    def _arrange(self, members: NDArray[np.bool_], position: int) -> None:
        """The present epoch's prompts in their order, and how many of them were taken."""
        numbers = [number for number in self._file_order if members[number]]
        if self._shuffle:
            numbers = [numbers[i] for i in shuffled([self.prompts[number].id for number in numbers], self._seed, self._epoch)]
        self._order, self._position = numbers, position
        self._left_out = int(np.count_nonzero(self._of_the_stage())) - len(numbers)
        self._place = np.full(len(self.prompts), -1)  # of each prompt in the order; -1: not in it
        self._place[numbers] = np.arange(len(numbers))

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "position": self._position,
            "members": packed(np.packbits(self._place >= 0).tobytes()),
            "stage": self._stage,
            "domains": self._domains,
            "stage_epoch": self._stage_epoch,
            "given_back": list(self._given_back),
            "history": self.history.state_dict(),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Under other settings than the checkpoint's, a stage of another number or other domains begins in the next phase, and
        another curriculum counts from the next epoch on."""
        for key, name, now in (("seed", "run.seed", self._seed), ("shuffle", "data.shuffle", self._shuffle)):
            if state[key] != now:
                raise UserError(f"{name}={now}: the checkpoint was made with {state[key]}; its prompts would come in another order")
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "data.train: the prompts (or the tokenizer or rollout.max_prompt_tokens) are not those of the checkpoint "
                f"(fingerprint {self._fingerprint}, checkpoint {state['fingerprint']}); start a new run.dir"
            )
        self._epoch, self._stage, self._stage_epoch = state["epoch"], state["stage"], state["stage_epoch"]
        self._domains = None if state["domains"] is None else tuple(state["domains"])
        self._given_back = dict.fromkeys(state["given_back"])
        self.history.load_state_dict(state["history"])
        members = np.unpackbits(np.frombuffer(unpacked(state["members"]), np.uint8), count=len(self.prompts))
        self._arrange(members.astype(bool), state["position"])
