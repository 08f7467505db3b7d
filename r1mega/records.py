"""What crosses floors: frozen records of prompts, samples, rewards and training sequences.

Vocabulary: a *prompt* is one question; a *sample* is one completion of it; a *group* is all samples
of one prompt; a *batch* is one optimizer step; a *microbatch* is one forward pass (learner floor);
a *version* counts weight publications. Log-probs are named by who computed them: ``sampler_``
(the rollout engine), ``policy_`` (the learner, frozen per rollout) and ``reference_``.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question, rendered and tokenized. ``Prompt(uid="gsm8k/7", token_ids=(3, 9), ...)``"""

    uid: str
    text: str  # after the template
    token_ids: tuple[int, ...]
    question: str  # before the template
    answer: str  # the gold answer, as the reward reads it


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """One completion to draw. The seed names it: the same on whichever engine draws it."""

    prompt: Prompt
    index: int  # 0 .. group_size - 1
    seed: int

    @property
    def uid(self) -> str:
        return f"{self.prompt.uid}#{self.index}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Routers:
    """What of a model fixes the form of recorded expert ids."""

    num_layers: int  # all, the dense ones included
    num_dense_layers: int  # they come first and have no router
    topk: int
    num_experts: int

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def id_dtype(self) -> Literal["uint8", "int16"]:
        """The smallest one that holds an expert id."""
        return "uint8" if self.num_experts <= 256 else "int16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to draw: the part of a request that all requests of a rollout share."""

    temperature: float
    top_p: float = 1.0
    top_k: int = -1  # -1: off
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    routers: Routers | None = None  # have the engine return the experts that these chose


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedExperts:
    """The experts that the sampler's routers chose, [tokens, MoE layers, topk] in C order.

    Tokens are those of prompt and response but the last, which predicts nothing. DeepSeek-V3 (58
    such layers, 8 of 256 experts) takes 464 bytes per token, 15 MB for a sample of 32k tokens, so
    these stay on the rank that drew the sample until the learner knows which ranks train it.
    """

    dtype: Literal["uint8", "int16"]  # little-endian
    ids: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionRange:
    """Response tokens [start, end) were drawn from weights ``version``."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One completion. ``len(token_ids) == len(sampler_logprobs)``; a stop token is included."""

    uid: str  # "<prompt uid>#<index>"
    prompt_uid: str
    index: int
    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]  # log softmax(logits / temperature), before top-p and top-k
    text: str  # without special stop tokens
    finish_reason: FinishReason
    versions: tuple[VersionRange, ...]
    routed_experts: RoutedExperts | None = None  # on the rank that drew it


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A reward and where it came from. ``error``: the machinery failed, not the model."""

    value: float
    parts: dict[str, float]  # "accuracy" -> 1.0, "format" -> 0.0: unweighted
    reason: str = ""
    error: str | None = None
    timed_out: bool = False  # grading hit a limit: counted as wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """All samples of one prompt, ordered by index, with their scores."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    scores: tuple[Score, ...]

    @property
    def graded(self) -> list[tuple[Sample, Score]]:
        """The samples whose grading worked: the others have no say in anything."""
        pairs = zip(self.samples, self.scores, strict=True)
        return [(sample, score) for sample, score in pairs if score.error is None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """One packed unit of training: tokens, where the loss starts, and per-target-token columns.

    Target ``i`` is ``token_ids[start + i]``, predicted from the tokens before it. Every column has
    ``num_targets`` entries. Example: ``token_ids=(5, 6, 7, 8), start=2`` trains on 7 and 8.
    """

    uid: str
    token_ids: tuple[int, ...]
    start: int  # >= 1: the first token has nothing to be predicted from
    weight: float = 1.0  # of each target in the batch's loss, which is a plain weighted sum
    advantage: float = 0.0
    sampler_logprobs: tuple[float, ...] = ()
    policy_logprobs: tuple[float, ...] = ()
    reference_logprobs: tuple[float, ...] = ()
    routed_experts: RoutedExperts | None = None  # on one rank at least, where they are replayed

    @property
    def num_targets(self) -> int:
        return len(self.token_ids) - self.start


@dataclass(frozen=True, slots=True)
class Batch:
    """One optimizer step: the same records on every rank; the learner takes each rank's part."""

    sequences: tuple[Sequence, ...]
    replays_routing: bool = False  # routers take the experts recorded at sampling


class Reward(Protocol):
    """Scores samples of prompts, aligned with the input; must not hang and must not raise on
    text."""

    def __call__(self, pairs: list[tuple[Prompt, Sample]]) -> list[Score]: ...
